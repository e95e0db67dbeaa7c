"""Training steps under any layout of ranks, and the same steps in one process."""
import math
import os
import socket
import sys
import zlib
from dataclasses import dataclass, field

import torch

import train
from core import optim, parallel, pipeline
from core.dataset import IGNORE, PADDING, share
from core.device import Device
from core.parallel import Ranks
from model import GPTConfig, allocate, build_model, init_weights, named_weights

STEPS, BATCH, BLOCK, VOCAB = 10, 8, 16, 61     # 61: shards of the vocabulary are uneven
MODEL = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=4, n_head=4, n_kv_head=2, n_embd=32,
             norm='rmsnorm', position='rope', mlp='swiglu', qk_norm=True, bias=False, tied=False)
GPT2 = dict(n_kv_head=4, norm='layernorm', position='learned', mlp='gelu', qk_norm=False, bias=True,
            tied=True)


@dataclass
class Case:
    """A layout, and what is trained on it."""
    layout: dict = field(default_factory=dict)      # settings of parallel.arrange
    model: dict = field(default_factory=dict)       # changes of MODEL
    settings: dict = field(default_factory=dict)    # of train
    dtype: str = 'float64'
    compile: bool = False
    rows: int = 1                                   # of a micro-batch
    documents: bool = False

    def __str__(self):
        parts = [f'{k}={v}' for k, v in self.layout.items()]
        parts += ['GPT-2' if self.model == GPT2 else f'{k}={v}' for k, v in self.model.items()] \
            if self.model != GPT2 else ['GPT-2']
        parts += [f'{k}={v}' for k, v in self.settings.items()]
        return ' '.join(parts + [self.dtype] + ['compiled'] * self.compile)


def batch(samples, documents: bool):
    """(x, y, doc) of random tokens, the same for the same sample; some targets do not count."""
    x = torch.zeros(len(samples), BLOCK, dtype=torch.long)
    y = torch.full_like(x, IGNORE)
    doc = torch.zeros_like(x)
    for i, sample in enumerate(samples):
        if sample != PADDING:
            generator = torch.Generator().manual_seed(sample)
            ids = torch.randint(VOCAB, (BLOCK + 1,), generator=generator)
            n = BLOCK - sample % 5
            x[i], y[i, :n] = ids[:-1], ids[1:n + 1]
            doc[i, 3 + sample % 7:] = 1
    return x, y, doc if documents else None


class Trainer:
    """What train.main builds, on random numbers instead of a dataset."""

    def __init__(self, case: Case, ranks: Ranks):
        self.case, self.ranks = case, ranks
        for name, value in {'optimizer': 'adamw', 'learning_rate': 1e-2, 'muon_learning_rate': 0.02,
                            'grad_clip': 0.5, 'embed_learning_rate': 5e-3, 'dropout': 0.0,
                            **case.settings}.items():
            setattr(train, name, value)
        kind = 'float32' if case.dtype == 'float64' else case.dtype
        self.device = Device('cpu', 'cpu', kind, case.compile, 1.0, [])
        config = GPTConfig(**{**MODEL, **case.model})
        parallel.check_model(ranks, config)
        self.model = build_model(config, None, 'meta')
        if case.dtype == 'float64':
            self.model.double()
        self.model.recompute = train.activation_checkpointing
        parallel.place(self.model, ranks)
        allocate(self.model, 'cpu')
        init_weights(self.model, 1, parallel.put)
        for name, p in named_weights(self.model).items():   # zeros would hide errors
            noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(p.shape, generator=noise, dtype=p.dtype)
            parallel.put(p, values * 0.1 + (p.ndim == 1 and name.endswith('weight')))
        self.optimizers = train.build_optimizers(self.model, self.device, ranks)
        self.scaler = optim.LossScale(False)
        self.trained = parallel.wrap(self.model, ranks, self.device)
        self.n_micro = math.ceil(math.ceil(BATCH / ranks.dp) / case.rows)
        if ranks.pp > 1:
            self.n_micro = pipeline.fitting(self.n_micro, ranks)
            self.trained = pipeline.Pipeline(self.trained, ranks, self.device, self.n_micro,
                                             case.rows)

    def step(self, i: int) -> tuple[float, float]:
        """Loss and gradient norm of one step."""
        shares = share(i * BATCH, BATCH, self.ranks.dp_rank, self.ranks.dp, self.case.rows,
                       self.n_micro)
        batches = [batch(samples, self.case.documents) for samples in shares]
        return train.train_step(self.model, self.trained, self.optimizers, self.scaler, self.device,
                                self.ranks, batches, 1.0, i)[:2]


def one_process(case: Case) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, in this process."""
    ranks = Ranks()
    parallel.arrange(ranks)
    trainer = Trainer(Case({}, case.model, case.settings, case.dtype, False, 2, case.documents), ranks)
    return [trainer.step(i) for i in range(STEPS)]


def work(rank: int, world: int, port: int, cases: list, answers) -> None:
    """One of `world` processes: runs all cases, and puts (number, results or an error)."""
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1',
                   'MASTER_PORT': str(port), 'LOCAL_RANK': str(rank),
                   'LOCAL_WORLD_SIZE': str(world)}
    torch.set_num_threads(1)
    ranks = parallel.find_ranks()
    parallel.arrange(ranks)
    parallel.start(ranks, Device('cpu', 'cpu', 'float32', False, 1.0, []), 1.0, None)
    for i, case in enumerate(cases):
        parallel.arrange(ranks, **case.layout)
        parallel.form_mesh(ranks, 'cpu')
        trainer = Trainer(case, ranks)
        results = [trainer.step(step) for step in range(STEPS)]
        answers.put((rank, i, results))
    parallel.finish()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


if __name__ == '__main__':
    import torch.multiprocessing as mp, time
    world = int(sys.argv[1])
    cases = [eval(a) for a in sys.argv[2:]]
    context = mp.get_context('forkserver')
    context.set_forkserver_preload(['layouts'])
    answers = context.SimpleQueue()
    t = time.time()
    ps = [context.Process(target=work, args=(r, world, free_port() if r == 0 else 0, cases, answers)) for r in range(1)]
    port = free_port()
    ps = [context.Process(target=work, args=(r, world, port, cases, answers)) for r in range(world)]
    for p in ps: p.start()
    for p in ps: p.join()
    got = {}
    while not answers.empty():
        r, i, res = answers.get(); got[r, i] = res
    for i, case in enumerate(cases):
        ref = one_process(case)
        for r in range(world):
            if (r, i) not in got: print(i, case, 'rank', r, 'none'); continue
            d = [max(abs(a[k] - b[k]) for a, b in zip(ref, got[r, i])) for k in (0, 1)]
            if r == 0: print(f'{case!s:70} loss {d[0]:.1e} norm {d[1]:.1e}', '' if max(d) < 1e-10 else (ref[:2], got[r, i][:2]))
            assert got[r, i] == got[0, i]
    print(f'{time.time() - t:.1f} s')
