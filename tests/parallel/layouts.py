"""Training steps under any layout of ranks, and the same steps in one process."""
import functools
import json
import math
import multiprocessing
import os
import queue
import socket
import traceback
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import edits
import numpy as np
import pytest
import torch

import model as model_module
import train
from core.data.dataset import IGNORE, PADDING
from core.device import Device
from core.net import kernels, optim
from core.net.weights import allocate, build_model, named_weights
from core.ranks import parallel, processes
from core.ranks.processes import Ranks, share
from core.run import checkpoint, layout_check, models
from core.run.begin import build_optimizers
from core.run.learner import Learner
from core.settings import Stop, settings_of
from model import GPTConfig, init_weights

STEPS, BATCH, BLOCK, VOCAB = 10, 8, 16, 61     # 61: shards of the vocabulary are uneven
MODEL = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=4, n_head=4, n_kv_head=2, n_embd=32,
             norm='rmsnorm', position='rope', mlp='swiglu', qk_norm=True, bias=False, tied=False)
GPT2 = dict(n_kv_head=4, norm='layernorm', position='learned', mlp='gelu', qk_norm=False, bias=True,
            tied=True)


@dataclass
class Case:
    """A layout, and what is trained on it."""
    layout: dict = field(default_factory=dict)      # settings of processes.arrange
    model: dict = field(default_factory=dict)       # changes of MODEL
    settings: dict = field(default_factory=dict)    # of train
    dtype: str = 'float64'
    compile: bool = False
    rows: int = 1                                   # of a micro-batch
    documents: bool = False
    chunk: int = 0                                  # elements of logits held at once; 0: as always
    edit: str = 'none'                              # of model.py, see tests/edits.py

    def __str__(self):
        """As a name of a test: tp=2-GPT2-float64."""
        def listed(settings):
            return [f'{k}={v}' for k, v in settings.items()]
        return '-'.join([
            *(listed(self.layout) or ['ddp']),
            *(['GPT2'] if self.model == GPT2 else ['Qwen3', *listed(self.model)]),
            *listed(self.settings), *['documents'] * self.documents, *['compiled'] * self.compile,
            *[self.edit] * (self.edit != 'none'), self.dtype])


UNEDITED = {name: getattr(model_module, name) for name in ('Attention', 'Block', 'GPT')}


def put_edit(name: str) -> None:
    """Let model.py have an edit, or none."""
    vars(model_module).update({**UNEDITED, **edits.EDITS[name]})


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


def clear_propagated() -> None:
    """Forget which placements DTensor has found: they name the mesh of an earlier test, which is
    equal to this one's but another object, and compiled code cannot hold it."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    _clear_sharding_prop_cache()


class Trainer:
    """What train.main builds, on random numbers instead of a dataset."""

    def __init__(self, case: Case, ranks: Ranks):
        self.case, self.ranks = case, ranks
        torch.compiler.reset()      # a training process compiles for one layout only
        clear_propagated()
        put_edit(case.edit)
        kernels.CHUNK_ELEMENTS = case.chunk or 1 << 24
        for name, value in {'optimizer': 'adamw', 'learning_rate': 3e-3, 'muon_learning_rate': 0.02,
                            'embed_learning_rate': 2e-3, 'grad_clip': 0.5, 'dropout': 0.0,
                            'activation_checkpointing': False, **case.settings}.items():
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
        allocate(self.model, 'cpu', parallel.put)
        init_weights(self.model, 1, parallel.put)
        for name, p in named_weights(self.model).items():   # zeros would hide errors
            noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(p.shape, generator=noise, dtype=p.dtype)
            parallel.put(p, values * 0.1 + (p.ndim == 1 and name.endswith('weight')))
        settings = SimpleNamespace(**settings_of(vars(train)))
        self.optimizers = build_optimizers(settings, self.model, self.device, ranks)
        self.trained, self.n_micro = parallel.wrap(self.model, ranks, self.device,
                                                   math.ceil(BATCH / ranks.dp), case.rows)
        self.learner = Learner(self.model, self.trained, self.optimizers, optim.LossScale(False),
                               self.device, ranks, train.grad_clip, train.seed)

    def step(self, i: int) -> tuple[float, float]:
        """Loss and gradient norm of one step."""
        return self.train_step(i)[:2]

    def train_step(self, i: int) -> tuple:
        """One step: loss, gradient norm, why it was skipped, whether the run is to stop."""
        shares = share(i * BATCH, BATCH, self.ranks.dp_rank, self.ranks.dp, self.case.rows,
                       self.n_micro)
        batches = [batch(samples, self.case.documents) for samples in shares]
        (loss,), *rest = train.train_step(self.learner, batches, i, 1.0)
        return loss, *rest


def one_process(case: Case) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, in this process."""
    alone = replace(case, layout={}, compile=False, rows=2)
    trainer = Trainer(alone, Ranks())
    return [trainer.step(i) for i in range(STEPS)]


# ---------------------------------------------------------------------------------------------
# What processes are asked to do, all of them together: do(ranks, ...) -> result


meshes = {}


def laid_out(ranks: Ranks, layout: dict) -> None:
    """Arrange the ranks. A mesh that was there before is taken: each has threads of its own."""
    processes.arrange(ranks, **layout)
    if ranks.world == 1:
        return
    key = ranks.pp, ranks.dp, ranks.replicas
    if key not in meshes:
        processes.form_mesh(ranks, 'cpu')
        meshes[key] = ranks.mesh, processes.tied_group
    ranks.mesh, processes.tied_group = meshes[key]


def train_steps(ranks: Ranks, case: Case) -> list[tuple[float, float]]:
    laid_out(ranks, case.layout)
    trainer = Trainer(case, ranks)
    return [trainer.step(i) for i in range(STEPS)]


def layout_checked(ranks: Ranks, case: Case) -> str:
    """Why the layout of an edited model is refused; '' if it is not."""
    laid_out(ranks, case.layout)
    put_edit(case.edit)
    settings = SimpleNamespace(**settings_of(vars(train)) | {
        'optimizer': 'adamw', 'pack_documents': case.documents, 'data_dir': '/no',
        'activation_checkpointing': False, 'check_layout': True})
    device = Device('cpu', 'cpu', 'float32', False, 1.0, [])
    try:
        layout_check.check(ranks, device, GPTConfig(**{**MODEL, **case.model}), settings,
                           partial(build_optimizers, settings))
    except Stop as e:
        return e.message
    finally:
        put_edit('none')
    return ''


class Validation:
    """Takes the place of a validation split, and of its tokenizer."""
    block_size, n_targets = BLOCK, 23 * BLOCK

    def __len__(self):
        return 23

    def batch(self, samples):
        return batch([PADDING if s == PADDING else 1000 + s for s in samples], False)

    def byte_lengths(self):
        return np.ones(VOCAB, np.int64)


def evaluations(ranks: Ranks, case: Case) -> tuple:
    """A step, an evaluation that is cut short, a save's tensors, a step, an evaluation."""
    laid_out(ranks, case.layout)
    trainer = Trainer(case, ranks)
    data = Validation()

    def evaluate(batches):
        left = [0] * batches
        scores = train.evaluate(trainer.learner, data, data, case.rows,
                                lambda: not (left and left.pop() == 0))
        return scores and (scores['val_loss'], scores['bits_per_byte'])
    trainer.step(0)
    cut_short = evaluate(1)
    names = sorted(checkpoint.optimizer_tensors(trainer.model, trainer.optimizers))
    trainer.step(1)
    return cut_short, len(names) > 0, evaluate(1000)


def overflow(ranks: Ranks, case: Case) -> list:
    """Scaled losses; in the second of three steps the last rank's gradient is infinite. For each
    step: loss, gradient norm, why it was skipped, the scale after it.
    """
    laid_out(ranks, case.layout)
    trainer = Trainer(case, ranks)
    trainer.learner.scaler = optim.LossScale(True)
    real, results = parallel.complete_gradients, []

    def complete(model, ranks):
        real(model, ranks)
        if len(results) == 1 and ranks.rank == ranks.world - 1:
            parallel.local(next(model.parameters()).grad).view(-1)[0] = math.inf

    parallel.complete_gradients = complete
    try:
        for i in range(3):
            *scores, skipped, _ = trainer.train_step(i)
            results.append((*scores, skipped, trainer.learner.scaler.scale))
    finally:
        parallel.complete_gradients = real
    return results


def exchanged(ranks: Ranks, case: Case, folder: str) -> dict[str, tuple[int, int]]:
    """Collective -> how often, and how many bytes this rank hands over, in one step.

    An all-reduce, a send: the tensor; a reduce-scatter: all that is to be added up; an all-gather:
    what comes out of it.
    """
    laid_out(ranks, case.layout)
    trainer = Trainer(case, ranks)
    trainer.step(0)
    trainer.step(1)
    trace = Path(folder) / f'trace-{ranks.rank}.json'
    observer = torch.profiler.ExecutionTraceObserver().register_callback(str(trace))
    observer.start()
    trainer.step(2)     # DDP has arranged its buckets by now
    observer.stop()
    observer.unregister_callback()
    found = {}
    for node in json.loads(trace.read_text())['nodes']:
        name = node['name'].removeprefix('c10d::').strip('_').removesuffix('_base')
        if not node['name'].startswith('c10d::') or name.startswith('recv'):
            continue
        tensors = [(shape, kind) for shape, kind in zip(node['inputs']['shapes'],
                                                        node['inputs']['types'])
                   if 'Tensor(' in kind]
        sizes = []
        for shape, kind in tensors:
            shapes = shape if 'List' in kind else [shape]
            sizes.append(sum(map(math.prod, shapes)) * (8 if 'double' in kind else 4))
        count, size = found.get(name, (0, 0))
        found[name] = count + 1, size + max(sizes)
    return found


def different_weights(ranks: Ranks, case: Case) -> list[str]:
    """The parameters that, initialized in this layout, are not those of one process, bit for bit;
    all that are missing on all ranks.
    """
    laid_out(ranks, case.layout)
    put_edit(case.edit)
    expected = named_weights(build_model(GPTConfig(**{**MODEL, **case.model}), 1))
    model = build_model(GPTConfig(**{**MODEL, **case.model}), None, 'meta')
    parallel.place(model, ranks)
    allocate(model, 'cpu', parallel.put)
    init_weights(model, 1, parallel.put)
    mine = {name: parallel.gathered(p.detach()) for name, p in named_weights(model).items()}
    everywhere = set(sum(processes.exchange(list(mine)), []))
    return [name for name, p in mine.items() if not torch.equal(p, expected[name])] + \
        sorted(expected.keys() - everywhere)


def save(ranks: Ranks, case: Case, folder: str, steps: int, last: bool) -> None:
    """Train some steps, then save."""
    laid_out(ranks, case.layout)
    trainer = Trainer(case, ranks)
    for i in range(steps):
        trainer.step(i)
    state = {'step': steps, 'best_step': 0, 'config': {}, 'identity': {}}
    if ranks.rank == 0 or not ranks.plain:
        saver = checkpoint.Saver(Path(folder), ranks)
        saver.save(trainer.model, trainer.optimizers, NoTokenizer(), state, last)
        saver.finish(steps)


class NoTokenizer:
    def save(self, path):
        path.write_text('{}')


def resume(ranks: Ranks, case: Case, folder: str, step: int):
    """Load a checkpoint: what is not as in its files, bit for bit; then the steps up to STEPS."""
    laid_out(ranks, case.layout)
    trainer = Trainer(case, ranks)
    model, optimizers = trainer.model, trainer.optimizers
    models.load_weights(model, folder, step, parallel.put)
    models.load_optimizers(model, optimizers, folder, step, parallel.put)
    files = {name: t for kind in ('model', 'optimizer') for _, name, t in
             models.read_tensors(checkpoint.step_folder(folder, step), kind)}
    mine = {name: parallel.gathered(t) for name, t in sorted(
        {**checkpoint.model_tensors(model),
         **checkpoint.optimizer_tensors(model, optimizers)}.items())}
    different = [name for name, t in mine.items() if not torch.equal(t, files[name])]
    everywhere = set(sum(processes.exchange(list(mine)), []))
    return different + sorted(files.keys() - everywhere), [
        trainer.step(i) for i in range(step, STEPS)]


# ---------------------------------------------------------------------------------------------
# The processes


class Workers:
    """`world` processes that wait for work; started once."""

    def __init__(self, world: int):
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['layouts'])
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        self.world, self.answers, self.asked = world, context.Queue(), 0
        self.questions = [context.Queue() for _ in range(world)]
        self.processes = [context.Process(target=work, daemon=True, args=(
            rank, world, port, self.questions[rank], self.answers)) for rank in range(world)]
        for process in self.processes:
            process.start()

    def do(self, what, *arguments, timeout=600) -> list:
        """what(ranks, *arguments) on all ranks; the result of each. Fails if one of them does."""
        self.asked += 1
        for question in self.questions:
            question.put((self.asked, what, arguments))
        results, asked = {}, None
        while len(results) < self.world:
            try:
                asked, rank, result, error = self.answers.get(timeout=5)
            except queue.Empty:
                timeout -= 5
                dead = {rank: process.exitcode for rank, process in enumerate(self.processes)
                        if not process.is_alive()}
                error = f'no answer; processes that ended: {dead}'
                if timeout > 0 and not dead:
                    continue
            if error:
                end_processes()     # the next test gets new ones
                raise AssertionError(error if asked is None else f'rank {rank}: {error}')
            if asked == self.asked:     # not the late answer to another question
                results[rank] = result
        return [results[rank] for rank in range(self.world)]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@functools.cache
def workers(world: int) -> Workers:
    """The processes of a world size, which are started once."""
    started.append(Workers(world))
    return started[-1]


started = []


@pytest.fixture(autouse=True, scope='module')
def processes_end():
    """The processes end with the tests of a file."""
    yield
    end_processes()


def end_processes() -> None:
    while started:
        started.pop().end()
    workers.cache_clear()


@pytest.fixture(autouse=True)
def settings_put_back():
    """What a test changes in this process is undone."""
    before, chunk = settings_of(vars(train)), kernels.CHUNK_ELEMENTS
    yield
    put_edit('none')
    vars(train).update(before)
    kernels.CHUNK_ELEMENTS = chunk


def work(rank: int, world: int, port: int, questions, answers) -> None:
    """One of the processes."""
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1',
                   'MASTER_PORT': str(port), 'LOCAL_RANK': str(rank),
                   'LOCAL_WORLD_SIZE': str(world)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    ranks = processes.find_ranks()
    processes.arrange(ranks)
    processes.start(ranks, Device('cpu', 'cpu', 'float32', False, 1.0, []), 10.0)
    while True:
        asked, what, arguments = questions.get()
        try:
            answers.put((asked, rank, what(ranks, *arguments), ''))
        except BaseException:
            answers.put((asked, rank, None, traceback.format_exc()[-3000:]))
