"""The cache of keys and values of a model that writes: what is computed once is not again. And the
model's blocks, compiled for steps with a cache.

Of this the model knows only the methods `room`, `positions`, `mask`, `update` and `advance`.
"""
import copy
import functools

import torch
from torch import nn

from core.device import compile_options
from core.net.lstm import State
from model import Block


class KVCache:
    """Keys and values of B rows, which may be of different lengths, for up to `size` positions.
    The first update makes the tensors, (B, heads, size + 1, D)."""

    def __init__(self, batch_size: int, size: int, device=None):
        self.batch_size, self.size, self.device = batch_size, size, device
        self.first = 0        # the first of the rows that it gives and takes (see `part`)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.longest = 0      # the largest of lengths, without a wait for the device
        self.even = True      # whether all rows are equally long
        self.k, self.v = {}, {}

    def part(self, first: int, lengths: list[int]) -> 'KVCache':
        """The rows from `first` on, which have these lengths, as a cache that shares the tensors.
        """
        part = object.__new__(KVCache)      # copy.copy takes 18 us of each step
        vars(part).update(vars(self))
        part.first, part.longest = first, max(lengths)
        part.lengths = torch.tensor(lengths, device=self.device)
        part.even = min(lengths) == part.longest
        return part

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a row to another one."""
        for stored in (*self.k.values(), *self.v.values()):
            stored[target, :, :length] = stored[source, :, :length]

    def copy(self, row: int, length: int) -> tuple[dict, dict]:
        """Keys and values of the first positions of a row, by layer."""
        first, last = ({layer: stored[row, :, :length].clone() for layer, stored in kind.items()}
                       for kind in (self.k, self.v))
        return first, last

    def put(self, row: int, kept: tuple[dict, dict], length: int) -> None:
        """The first positions of what `copy` has given, into a row."""
        for kind, values in zip((self.k, self.v), kept):
            for layer, x in values.items():
                if layer not in kind:
                    kind[layer] = self.empty(x)
                kind[layer][row, :, :length] = x[:, :length]

    def empty(self, x) -> torch.Tensor:
        """A layer's tensor for keys or values like x (.., heads, T, D). It has one position more
        than needed, so that a slice is returned also when the cache is full: a graph compiled for
        slices would be compiled again for the whole tensor."""
        return x.new_zeros((self.batch_size, x.size(-3), self.size + 1, x.size(-1)))

    def grow(self, size: int) -> None:
        """Make room for `size` positions."""
        for tensors in (self.k, self.v):
            for layer, stored in tensors.items():
                larger = stored.new_zeros((*stored.shape[:2], size + 1, stored.size(3)))
                larger[:, :, :self.size] = stored[:, :, :self.size]
                tensors[layer] = larger
        self.size = size

    def room(self) -> int:
        """How many more tokens the longest row can take."""
        return self.size - self.longest

    def positions(self, T: int) -> torch.Tensor:
        """(B, T) the positions that the next T tokens of each row will have; (T,) if all agree."""
        if self.even:
            return torch.arange(self.longest, self.longest + T, device=self.device)
        return self.lengths[:, None] + torch.arange(T, device=self.device)

    def mask(self, T: int, window: int) -> torch.Tensor | None:
        """Boolean mask of T new queries over the cached and new keys; None where all is seen."""
        if self.even and not window and (T == 1 or self.longest == 0):
            return None
        q = self.positions(T)[..., None]
        k = torch.arange(self.longest + T, device=self.device)
        mask = k <= q
        if window:
            mask = mask & (k > q - window)
        return mask if self.even else mask[:, None]

    def update(self, layer: int, k, v):
        """Store a layer's new keys and values (B, heads, T, D); returns all that it has now."""
        if layer not in self.k:
            self.k[layer], self.v[layer] = self.empty(k), self.empty(v)
        return Layer(self, layer).update(0, k, v)

    def advance(self, T: int, n_new=None) -> None:
        """Count T tokens as stored; of row b only the first n_new[b], if the rest was padding."""
        self.lengths += T if n_new is None else n_new
        if n_new is None:
            self.longest += T
        else:
            self.longest = int(self.lengths.max())
            self.even = bool((self.lengths == self.longest).all())


class Layer:
    """One layer of a KVCache that has been used: what a compiled block takes, so that its graph
    serves all layers."""

    def __init__(self, cache: KVCache, layer: int):
        self.cache, self.k, self.v = cache, cache.k[layer], cache.v[layer]

    def update(self, layer: int, k, v):
        """KVCache.update, of this layer."""
        cache, T = self.cache, k.size(2)
        rows, end = slice(cache.first, cache.first + k.size(0)), cache.longest + T
        k_all, v_all = self.k[rows, :, :end], self.v[rows, :, :end]
        for new, stored in ((k, k_all), (v, v_all)):
            if cache.even:
                stored[:, :, cache.longest:] = new
            else:
                at = cache.lengths[:, None] + torch.arange(T, device=k.device)
                stored.scatter_(2, at[:, None, :, None].expand_as(new), new)
        return k_all, v_all


def new_cache(model, batch_size: int, device=None, size: int = 0):
    """An empty cache for up to `size` positions (0: block_size); an LSTM has a state instead."""
    lstm = model.config.arch == 'lstm'
    return State() if lstm else KVCache(batch_size, size or model.config.block_size, device)


# ---------------------------------------------------------------------------------------------
# Blocks that are compiled for steps with a cache


TOGETHER = 6        # blocks in a graph, at most


class CompiledBlocks(nn.Module):
    """Some blocks in a row for steps with a cache, through a graph that all such groups share."""

    def __init__(self, blocks: list[Block], run):
        super().__init__()
        self.blocks, self.run = blocks, run

    def forward(self, x, rope, mask, cache, layer):
        layers = [Layer(cache, layer + i) for i in range(len(self.blocks))]
        return self.run(self.blocks, x, rope, mask, layers)


def compiled_blocks(model):
    """The same GPT, its blocks compiled for steps with a cache of any length: one graph for each
    few of them takes half a minute to be made, one of the whole model minutes. A call of a graph
    takes 0.2 ms beside its work."""
    compiled, blocks = copy.copy(model), list(model.h.values())
    n = max(n for n in range(1, TOGETHER + 1) if len(blocks) % n == 0)
    tensors = [(name, t.dtype) for name, t in (*blocks[0].named_parameters(),
                                               *blocks[0].named_buffers())]
    run = compiled_for(f'{n} x {blocks[0]} {tensors} {model.config}',
                       next(model.parameters()).device.type)
    compiled._modules = model._modules | {'h': nn.ModuleDict({
        str(i): CompiledBlocks(blocks[i:i + n], run) for i in range(0, len(blocks), n)})}
    return compiled


@functools.cache
def compiled_for(structure: str, device: str):
    """A function of blocks and their arguments, compiled, for blocks of one structure. It does not
    look before each call whether a layer has changed, which takes up to a twentieth of a step. So
    blocks of another structure must not find its graphs, which belong to its code object."""
    def run(blocks, x, rope, mask, layers):
        for block, layer in zip(blocks, layers):
            x = block(x, rope, mask, layer)
        return x
    run.__code__ = run.__code__.replace(co_name='run')
    options = compile_options(device)
    options['guard_filter_fn'] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    return torch.compile(run, dynamic=True, options=options)
