"""Bytes of memory that a rank needs in a training step: counted, not measured.

What one block and the head keep for the backward pass, and the most that their passes take, are
found by running them once on fake tensors, which have shapes and no memory: so an edited model.py
is counted as it is. The rest is arithmetic over what core/ranks/parallel.py and torch do in a step.
tests/parallel/test_memory.py compares the sums with what real ranks take.
"""
import contextlib
import functools
import math
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from core.net import kernels, optim
from core.net.weights import build_model, named_weights
from model import GPTConfig, norm_layer, rope_tables


@dataclass(frozen=True)
class Layout:
    """How a model lies on the ranks: settings of train.py. The data-parallel ranks are `dp`."""
    dp: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    replicas: int = 1               # sharded copies: dp / replicas ranks share one
    sequence_parallel: bool = False
    pp_schedule: str = '1f1b'
    recompute: bool = False         # activation_checkpointing
    rows: int = 1                   # sequences in a micro-batch
    n_micro: int = 1                # micro-batches of a rank in a step

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def shards(self) -> int:
        """Ranks among which a copy of the parameters is divided."""
        return self.dp // self.replicas if self.zero else 1

    @property
    def chunks(self) -> int:
        """Pipeline stages that one rank holds."""
        return 2 if self.pp > 1 and self.pp_schedule == 'interleaved' else 1

    def in_flight(self, pp_rank: int) -> int:
        """Passes through one stage whose activations a rank of a pipeline keeps at once: those of
        the schedule's warm-up and one more (Narayanan et al. 2021, section 2.2)."""
        warm_up = (self.chunks - 1) * self.pp + self.chunks * (self.pp - 1 - pp_rank)
        return min(warm_up + 1, self.chunks * self.n_micro)

    def __str__(self):
        words = [f'dp={self.dp}'] + [f'{k}={v}' for k, v in (
            ('tp', self.tp), ('pp', self.pp)) if v > 1] + [f'zero={self.zero}'] * (self.zero > 0)
        words += [f'replicas={self.replicas}'] * (self.zero > 0 and self.replicas > 1)
        words += ['sequence_parallel'] * self.sequence_parallel
        words += ['interleaved'] * (self.chunks > 1) + ['recomputed'] * self.recompute
        return ', '.join(words)


# ---------------------------------------------------------------------------------------------
# Parameters


@functools.cache
def shapes(arch: tuple) -> dict[str, tuple]:
    """Name -> shape of the parameters of GPTConfig(*arch); a tied head is no parameter of its own.
    """
    model = build_model(GPTConfig(*arch), None, 'meta')
    return {name: tuple(p.shape) for name, p in named_weights(model).items()}


def key(config: GPTConfig) -> tuple:
    """A config as a tuple, which can be a key of a cache."""
    return tuple(vars(config).values())


def part_of(n: int, parts: int, i: int) -> int:
    """Of n rows, cut into parts as torch.chunk cuts them, those in part i."""
    each = -(-n // parts)
    return max(0, min(n - i * each, each))


@functools.cache
def held(arch: tuple, layout: Layout, pp_rank: int = 0, tp_rank: int = 0,
         shard: int | None = None) -> dict[str, int]:
    """Name -> number of elements of the parameters of GPTConfig(*arch) on a rank, as place() in
    core/ranks/parallel.py lays them: of pipeline and tensor parallelism, and with `shard` of that
    part of them only."""
    config, n_stages, found = GPTConfig(*arch), layout.pp * layout.chunks, {}
    stages = range(pp_rank, n_stages, layout.pp)
    layers = {i for s in stages for i in range(s * config.n_layer // n_stages,
                                               (s + 1) * config.n_layer // n_stages)}
    for name, shape in shapes(arch).items():
        first, last = 0 in stages, n_stages - 1 in stages
        if name.startswith('h.'):
            here = int(name.split('.')[1]) in layers
        elif name == 'wte.weight':
            here = first or last and config.tied
        else:
            here = first if name.startswith('wpe.') else last
        if not here:
            continue
        rows, columns = shape[0], math.prod(shape[1:])
        if len(shape) > 1 and name.endswith(('o_proj.weight', 'down_proj.weight')):
            columns = part_of(columns, layout.tp, tp_rank)
        elif len(shape) > 1 and not name.startswith('wpe.') or name.endswith(
                tuple(f'{p}_proj.bias' for p in ('q', 'k', 'v', 'gate', 'up'))):
            rows = part_of(rows, layout.tp, tp_rank)
        if shard is not None:
            rows = part_of(rows, layout.shards, shard)
        found[name] = rows * columns
    return found


# ---------------------------------------------------------------------------------------------
# Passes through one block and through the head, on tensors without memory


class Watch(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations make, while they live. With `known` tensors
    left out."""

    def __init__(self, known=()):
        super().__init__()
        self.live, self.peak = {}, 0
        self.known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.multiprocessing.reductions import StorageWeakRef
        from torch.utils._pytree import tree_leaves
        if any(hasattr(kind, 'placements') for kind in types):
            return NotImplemented       # a DTensor: what it does with its parts is seen
        out = func(*args, **(kwargs or {}))
        grown = False
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.known:
                    seen = self.live.get(storage._cdata)
                    if seen is None or seen.expired():
                        self.live[storage._cdata], grown = StorageWeakRef(storage), True
        if grown:
            self.peak = max(self.peak, self.now)
        return out

    @property
    def now(self) -> int:
        """Bytes at present. (A storage may grow and shrink, as FSDP has it.)"""
        total = 0
        for place, ref in list(self.live.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is None:
                del self.live[place]
            else:
                total += storage.nbytes()
        return total


@dataclass(frozen=True)
class Passes:
    """Bytes of a module's forward and backward pass."""
    kept: int       # from the one to the other, its input left out
    back: int       # the most during the backward pass, what was kept included
    grads: int      # of the gradients that it leaves, in fp32


@contextlib.contextmanager
def as_on(kind: str):
    """Let kernels do what they do on a device of this kind: on a CPU they convert bf16 for short
    windows, and take fewer logits at a time."""
    before = kernels.CAUSAL_BLOCK, kernels.CHUNK_ELEMENTS
    if kind != 'cpu':
        kernels.CAUSAL_BLOCK, kernels.CHUNK_ELEMENTS = 0, 8 * before[1]
    try:
        yield
    finally:
        kernels.CAUSAL_BLOCK, kernels.CHUNK_ELEMENTS = before


def watch(make, run, dtype: str, fresh: bool) -> Passes:
    """make() gives a module and its input x; run(module, x) its output. With `fresh` the gradients
    are new memory, else they are added to those that are there."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        module, x = make()
        parameters = list(module.parameters())
        if not fresh:
            for p in parameters:
                p.grad = torch.empty_like(p)
        known = [*parameters, *(p.grad for p in parameters if p.grad is not None), x]
        with Watch(known) as seen:
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype in ('bfloat16', 'float16')):
                y = run(module, x)
            kept = seen.now
            y.backward(torch.empty_like(y))
            return Passes(kept, seen.peak, 4 * sum(p.numel() for p in parameters))


@functools.cache
def block_passes(arch: tuple, rows: int, T: int, dtype: str, kind: str, fresh: bool) -> Passes:
    """One block's, for `rows` sequences of T tokens."""
    config = GPTConfig(*arch)

    def make():
        return model_module.Block(config), torch.empty(rows, T, config.n_embd, requires_grad=True)

    def run(block, x):
        rope = None
        if config.position == 'rope':
            rope = rope_tables(torch.arange(T), config.head_dim, config.rope_theta)
        return block(x, rope)
    with as_on(kind):
        return watch(make, run, dtype, fresh)


@functools.cache
def norm_kept(arch: tuple, rows: int, T: int, dtype: str) -> int:
    """Bytes that a norm of the residual stream keeps, with the copy that products read."""
    config = GPTConfig(*arch)
    return watch(lambda: (norm_layer(config, config.n_embd),
                          torch.empty(rows, T, config.n_embd, requires_grad=True)),
                 lambda norm, x: kernels.cast_once(norm(x)), dtype, True).kept


@functools.cache
def head_passes(arch: tuple, rows: int, T: int, dtype: str, kind: str, fresh: bool) -> Passes:
    """The last norm's, the head's and the loss's."""
    config = GPTConfig(*arch)

    def make():
        head = kernels.Linear(config.n_embd, config.vocab_size, bias=False)
        return torch.nn.ModuleList([norm_layer(config, config.n_embd), head]), torch.empty(
            rows, T, config.n_embd, requires_grad=True)

    def run(modules, x):
        targets = torch.zeros(rows, T, dtype=torch.long)
        return kernels.lm_loss(modules[1], modules[0](x), targets, 'sum')
    with as_on(kind):
        return watch(make, run, dtype, fresh)


@functools.cache
def muon_extra(shape: tuple, n: int, half: bool) -> int:
    """The most bytes that Muon's step takes for n matrices of a shape, beside their gradients and
    momenta."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(shape)) for _ in range(n)]
        muon = optim.Muon(params, dtype=torch.bfloat16 if half else torch.float32)
        for p in params:
            p.grad = torch.empty(shape)
            muon.state[p]['momentum'] = torch.empty(shape)
        known = [t for p in params for t in (p, p.grad, muon.state[p]['momentum'])]
        with Watch(known) as seen:
            muon.step()
        return seen.peak


# ---------------------------------------------------------------------------------------------
# A rank's step


def step_memory(config: GPTConfig, layout: Layout, dtype: str, kind: str = 'cuda',
                optimizer: str = 'adamw') -> dict[str, int]:
    """Bytes by what they are for, of the rank that needs most: weights, optimizer, gradients,
    activations, gathered (whole weights, and whole gradients, of what is otherwise sharded), and
    work (of the operation at the peak)."""
    found = [rank_memory(config, layout, pp_rank, dtype, kind=kind, optimizer=optimizer)
             for pp_rank in range(layout.pp)]
    return max(found, key=lambda parts: sum(parts.values()))


def rank_memory(config: GPTConfig, layout: Layout, pp_rank: int, dtype: str, *, kind: str = 'cuda',
                optimizer: str = 'adamw') -> dict[str, int]:
    """`step_memory` of the ranks of one pipeline stage, the first of those that share a matrix."""
    # What a rank holds does not depend on its batches: `held` remembers one answer for all of them.
    laid = key(config), replace(layout, rows=1, n_micro=1, recompute=False), pp_rank
    whole = held(*laid)
    mine = held(*laid, shard=0) if layout.zero else whole
    n_whole, n_mine = sum(whole.values()), sum(mine.values())
    n_root = sum(n for name, n in whole.items() if not name.startswith('h.'))
    n_blocks = len({name.split('.')[1] for name in whole if name.startswith('h.')})
    n_block = (n_whole - n_root) // max(1, n_blocks)

    # Are gradients scattered block by block? Are they new memory in each pass, or are they added
    # to those of the micro-batch before?
    scattered = layout.zero == 3 or layout.zero == 2 and layout.n_micro == 1
    fresh = scattered or layout.n_micro == 1
    gradients = 4 * (n_mine if scattered else n_whole)
    if layout.tp > 1 and not config.tied:   # the embedding's is whole until the end of the step
        gradients += 4 * whole.get('wte.weight', 0) * (layout.tp - 1)
    gathered = 0
    if layout.zero == 2 or layout.zero and layout.pp > 1:
        gathered = 4 * n_whole                      # all weights, during the step
    elif layout.zero:
        gathered = 4 * (n_root + 2 * n_block)       # of blocks the one at work and the next
    elif layout.dp > 1:
        gathered = 4 * n_whole                      # DDP's buckets

    block = local_block(config, layout, dtype, kind, fresh)
    head = local_head(config, layout, dtype, kind, fresh) if pp_rank == layout.pp - 1 else None
    stream = 4 * layout.rows * config.block_size * config.n_embd
    cut = layout.tp if layout.sequence_parallel else 1
    kept = stream // cut if layout.recompute else block.kept
    activations = stream // cut + kept * math.ceil(
        n_blocks / layout.chunks) * layout.in_flight(pp_rank)
    if layout.pp > 1:       # torch has a buffer for what each micro-batch receives
        activations += stream * (layout.n_micro + (pp_rank == 0))

    # Where the head's passes begin; in the last block's backward pass, where the head's new
    # gradient and what is being scattered of another block may lie beside it; at the end of the
    # first block's; in the optimizer's step.
    alone = layout.n_micro == 1         # no gradients are there at first
    left = activations - (0 if layout.recompute else block.kept)
    beside = (head.grads if head and fresh else 0) + 4 * n_block * scattered
    lasting = {'weights': 4 * n_mine, 'optimizer': sum(
        n * (4 if is_muons(name, optimizer) else 8) for name, n in mine.items())}
    moments = [
        (0 if alone else gradients, activations, gathered, head.back if head else 0),
        (0 if alone else gradients, left, gathered, block.back + beside),
        (gradients, stream // cut, gathered, block.back),
        (4 * n_mine, 0, gathered if layout.zero == 0 else 0,
         update_extra(config, layout, n_blocks, dtype) if optimizer == 'muon' else 0)]
    names = 'gradients', 'activations', 'gathered', 'work'
    return lasting | dict(zip(names, max(moments, key=sum)))


def update_extra(config: GPTConfig, layout: Layout, n_blocks: int, dtype: str) -> int:
    """Bytes of Muon's step for the matrices of the most common shape, of which each rank takes a
    share whole."""
    n = n_blocks * (2 if config.mlp == 'swiglu' else 1)
    shape = config.n_hidden // layout.tp, config.n_embd
    copies = 4 * n * math.prod(shape) if layout.zero == 0 and layout.dp > 1 else 0
    return copies + muon_extra(shape, math.ceil(n / layout.dp), dtype != 'float32')


def local_block(config: GPTConfig, layout: Layout, dtype: str, kind: str, fresh: bool) -> Passes:
    """One block's passes on a rank, with its part of heads and hidden channels."""
    tp, T = layout.tp, config.block_size
    part = replace(config, n_head=config.n_head // tp, n_kv_head=config.n_kv_head // tp,
                   n_hidden=config.n_hidden // tp)
    found = block_passes(key(part), layout.rows, T, dtype, kind, fresh)
    if layout.sequence_parallel:        # both norms see their part of the positions only
        less = 2 * norm_kept(key(config), layout.rows, T, dtype) * (tp - 1) // tp
        found = replace(found, kept=found.kept - less, back=found.back - less)
    return found


def local_head(config: GPTConfig, layout: Layout, dtype: str, kind: str, fresh: bool) -> Passes:
    """The head's passes on a rank, with its part of the vocabulary."""
    part = replace(config, vocab_size=-(-config.vocab_size // layout.tp), tied=False)
    found = head_passes(key(part), layout.rows, config.block_size, dtype, kind, fresh)
    logits = 4 * layout.rows * config.block_size * part.vocab_size
    # the loss of cut logits has one tensor more of their size
    return replace(found, back=found.back + logits * (layout.tp > 1))


def is_muons(name: str, optimizer: str) -> bool:
    """Whether Muon, which keeps one number for each weight, trains a parameter."""
    return optimizer == 'muon' and name.startswith('h.') and name.endswith('_proj.weight')


def checkpoint_bytes(config: GPTConfig, optimizer: str) -> int:
    """Of weights and the optimizer's moments, in fp32."""
    return sum(n * (8 if is_muons(name, optimizer) else 12)
               for name, n in held(key(config), Layout()).items())
