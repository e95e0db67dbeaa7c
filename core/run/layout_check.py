"""Does a layout of ranks train the model that one process trains? A small copy of it is tried.

core/ranks/parallel.py knows today's model.py. After an edit, what a block hands to another beside x
may be lost between pipeline stages, for instance. So before training a small model of the same
architecture makes two steps in the layout, and two in one process.
"""
import contextlib
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from core.net import optim
from core.net.weights import allocate, build_model, copy_weights, named_weights
from core.ranks import parallel, processes
from core.ranks.processes import IGNORE, Ranks, broadcast, exchange, print0
from core.run.learner import Learner, count_targets, to_device
from core.settings import stop, warn
from core.source import source_hashes

ROWS, TOLERANCE = 2, 1e-4       # of a micro-batch; of what is to be equal, in fp32


def check(ranks, device, config, settings, make_optimizers) -> None:
    """Stop, on all ranks, if a small model of this GPTConfig trains differently in their layout.

    make_optimizers(model, device, ranks) gives the optimizers; `settings` are those of train.py.
    What has passed is noted in a file in data_dir, and tried again only with check_layout.
    """
    memory = Path(settings.data_dir) / '.layouts-checked.json'
    names = ('tp', 'pp', 'zero', 'replicas', 'sequence_parallel')
    layout = ', '.join(f'{name}={getattr(ranks, name)}' for name in names
                       if getattr(ranks, name) != getattr(Ranks(), name)) or f'{ranks.dp} x data'
    small, passed = small_copy(config, ranks), []
    source = source_hashes(str(Path(__file__).parents[2] / 'train.py'))
    chosen = settings.optimizer, settings.pack_documents, settings.activation_checkpointing
    key = repr((source, layout, ranks.dp, ranks.pp_schedule, small, chosen))
    key = hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, TypeError):
        passed = list(json.loads(memory.read_text(encoding='utf-8')))
    if broadcast(key in passed and not settings.check_layout):
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    with torch.random.fork_rng():
        said = difference(ranks, replace(device, dtype='float32', compile=False), small,
                          settings, make_optimizers, layout)
    torch.set_float32_matmul_precision(precision)
    if said := next(filter(None, exchange(said)), said):
        stop(f'{said}, for a small copy of this model: an edit does something that {layout} does '
             'not carry, such as handing more than x from block to block; leave this layout out')
    if said is not None and ranks.rank == 0:
        print0(f'{layout}: a small copy of this model trains as in one process')
        with contextlib.suppress(OSError):
            memory.write_text(json.dumps([*passed, key][-100:]), encoding='utf-8')


def small_copy(config, ranks):
    """The GPTConfig of the same architecture, as small as the ranks can share it."""
    n_key, head_dim = min(config.n_kv_head, 2 * ranks.tp), min(config.head_dim, 16)
    n_head = n_key * min(config.n_head // config.n_kv_head, 2)
    return replace(
        config, n_layer=min(config.n_layer, max(6, 2 * ranks.n_stages)), n_head=n_head,
        n_kv_head=n_key, head_dim=head_dim, n_embd=n_head * head_dim,
        n_hidden=2 * n_head * head_dim, block_size=min(config.block_size, 16 * ranks.tp),
        window=min(config.window, 5), vocab_size=min(config.vocab_size, 61), dropout=0.0)


def difference(ranks, device, config, settings, make_optimizers, layout: str) -> str | None:
    """What differs between two steps in the layout and in one process, '' if nothing does; None if
    the model does not run in one process, either: model.py may have sizes written as numbers."""
    n, generator = 2 * ranks.pp, torch.Generator().manual_seed(0)   # n: micro-batches of a rank
    batches = [random_batch(config, settings.pack_documents, generator)
               for _ in range(n * ranks.dp)]
    mine = batches[ranks.dp_rank * n:][:n]
    alone, model = build_model(config, 0, device.name), build_model(replace(config), 0, 'meta')
    for p in filter(lambda p: p.requires_grad, alone.parameters()):     # zeros would hide much
        p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p.device)

    def loss_alone() -> torch.Tensor:
        losses = [lm_loss(alone, to_device(batch, device)) for batch in batches]
        return sum(losses, torch.zeros(())) / count_targets(batches)

    try:
        with torch.no_grad():
            loss_alone()
    except Exception as e:  # whatever an edit may raise
        if ranks.rank == 0:
            warn(f'{layout}: not checked: a small copy of this model fails in one process, too: '
                 f'{told(e)}')
        return None
    try:
        model.recompute = settings.activation_checkpointing
        parallel.place(model, ranks)
        allocate(model, device.name, parallel.put)
        copy_weights(alone, model, parallel.put)
        trained, _ = parallel.wrap(model, ranks, device, n * ROWS, ROWS)
        learner = Learner(model, trained, [], optim.LossScale(False), device, ranks)
        first, found = step(learner, mine), gradients(model)
        optim.apply_gradients(make_optimizers(model, device, ranks), 1.0, False)
        second = step(learner, mine)
    except Exception as e:
        if ranks.world == 1 or processes.is_loss(e):
            raise
        processes.stop_alone(f'{layout}: a small copy of this model fails, but not in one process: '
                             f'{told(e)}; leave this layout out')
    (loss := loss_alone()).backward()
    expected = gradients(alone)
    optim.apply_gradients(make_optimizers(alone, device, Ranks()), 1.0, False)
    norms = {name: t.norm().item() for name, t in expected.items()}
    floor = math.hypot(*(norms[name] for name, _ in alone.named_parameters())) / 100
    buffers = dict(alone.named_buffers())
    differ = [(f'the {"value" if name in buffers else "gradient"} of {name} is another one with '
               f'{layout} than in one process',
               (t - expected[name]).norm().item() / (norms[name] + floor))
              for name, t in found.items()]
    losses = [(f'the loss is {x:.6g} with {layout}, {y:.6g} in one process', abs(x - y) / abs(y))
              for x, y in ((first, loss.item()), (second, loss_alone().item()))]
    return next((text for text, size in [losses[0], *differ, losses[1]]
                 if not size <= TOLERANCE), '')


def random_batch(config, packed: bool, generator) -> tuple:
    """(x, y, doc) of random tokens; some targets do not count."""
    ids = torch.randint(config.vocab_size, (ROWS, config.block_size + 1), generator=generator)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    y[0, :int(ids[0, 0]) % config.block_size] = IGNORE
    doc = torch.arange(config.block_size) > config.block_size // 3
    return x, y, doc.long().expand_as(x).contiguous() if packed else None


def lm_loss(trained, batch) -> torch.Tensor:
    """The sum of a batch's losses. Random numbers, if an edit draws any, follow from the data."""
    x, y, doc = batch
    torch.manual_seed(int(x.sum()))
    return trained(x, y, doc=doc, reduction='sum')


def step(learner, batches) -> float:
    """The mean loss of micro-batches; their gradient is in the parameters."""
    divisor, losses = learner.loss_divisor(count_targets(batches)), []
    if learner.ranks.pp > 1:
        losses.append(learner.trained.train(batches, divisor))
    else:
        for batch in learner.micro_batches(batches, 0):
            losses.append(lm_loss(learner.trained, batch) / divisor)
            losses[-1].backward()
    return learner.update(losses, 1.0).means[0]


def gradients(model) -> dict[str, torch.Tensor]:
    """By name, the whole gradients of what this rank has of a model, and its persistent buffers."""
    found = {name: p if not isinstance(p, torch.nn.Parameter) else p.grad if p.grad is not None
             else torch.zeros_like(p) for name, p in named_weights(model).items()}
    return {name: parallel.gathered(t.detach()).float().nan_to_num(0, 0, 0)    # masks
            for name, t in found.items()}


def told(error: BaseException) -> str:
    """An error in one line."""
    error = processes.root_of(error)
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[-1]}'
