"""Writing with a model: its cache of keys and values, drawing from logits, the fast `generate`.

model.generate does the same for one prompt, plainly. Of this file the model knows only the cache's
methods `room`, `positions`, `mask`, `update` and `advance`.
"""
import hashlib
import math

import torch

from core.device import compile_options
from core.net.lstm import State

# ---------------------------------------------------------------------------------------------
# The cache


class KVCache:
    """Keys and values of B rows, which may be of different lengths, for up to `size` positions.
    The first update makes the tensors, (B, heads, size + 1, D)."""

    def __init__(self, batch_size: int, size: int, device=None):
        self.size, self.device = size, device
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.longest = 0      # the largest of lengths, without a wait for the device
        self.even = True      # whether all rows are equally long
        self.k, self.v = {}, {}

    def room(self) -> int:
        """How many more tokens the longest row can take."""
        return self.size - self.longest

    def positions(self, T: int) -> torch.Tensor:
        """(B, T) the positions that the next T tokens of each row will have; (T,) if all agree."""
        new = torch.arange(T, device=self.device)
        return self.longest + new if self.even else self.lengths[:, None] + new

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
        T, end = k.size(2), self.longest + k.size(2)
        if layer not in self.k:
            # One position more than needed, so that a slice is returned also when the cache is
            # full: a graph compiled for slices would be compiled again for the whole tensor.
            shape = (k.size(0), k.size(1), self.size + 1, k.size(3))
            self.k[layer], self.v[layer] = k.new_zeros(shape), v.new_zeros(shape)
        for new, stored in ((k, self.k[layer]), (v, self.v[layer])):
            if self.even:
                stored[:, :, self.longest:end] = new
            else:
                stored.scatter_(2, self.positions(T)[:, None, :, None].expand_as(new), new)
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def advance(self, T: int, n_new=None) -> None:
        """Count T tokens as stored; of row b only the first n_new[b], if the rest was padding."""
        self.lengths += T if n_new is None else n_new
        if n_new is None:
            self.longest += T
        else:
            self.longest = int(self.lengths.max())
            self.even = bool((self.lengths == self.longest).all())


def new_cache(model, batch_size: int, device=None, size: int = 0):
    """An empty cache for up to `size` positions (0: block_size); an LSTM has a state instead."""
    lstm = model.config.arch == 'lstm'
    return State() if lstm else KVCache(batch_size, size or model.config.block_size, device)


# ---------------------------------------------------------------------------------------------
# Drawing tokens


def uniform(seed, position: int) -> float:
    """A random number in [0, 1) for the token at `position` of a row with this seed.

    It is a hash of the two: the same on every device and in every batch. As a multiple of 2^-24 it
    is exact in fp32.
    """
    digest = hashlib.blake2b(f'{seed} {position}'.encode(), digest_size=3).digest()
    return int.from_bytes(digest, 'big') / 2 ** 24


def draw(probs, u):
    """(B,) ids: the first at which the probabilities (B, V), added up from id 0 on, exceed u (B,),
    in [0, 1 - 2^-24]. An id of probability 0 is never drawn; where probabilities are NaN it is -1.
    """
    sums = probs.cumsum(dim=-1).masked_fill(probs == 0, 0.0)
    total = sums.amax(dim=-1)
    ids = (sums > (u * total)[:, None]).byte().argmax(dim=-1)
    return torch.where(total > 0, ids, -1)


def sample_next(logits, u, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(B,) ids drawn from logits (B, V) with the random numbers u (B,); temperature 0 takes the
    most probable ids, and no u.

    top_k keeps the k most probable tokens; min_p those with at least min_p times the probability of
    the most probable one (Nguyen et al. 2024); top_p the fewest whose probabilities sum to at least
    top_p (Holtzman et al. 2020). They apply in this order, after the temperature."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if min_p > 0:
        best = logits.max(dim=-1, keepdim=True).values
        logits = logits.masked_fill(logits < best + math.log(min_p), -math.inf)
    if top_p < 1:
        values, order = logits.sort(dim=-1, descending=True)
        before = values.softmax(dim=-1).cumsum(dim=-1) - values.softmax(dim=-1)
        values = values.masked_fill(before >= top_p, -math.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, values)
    return draw(logits.softmax(dim=-1), u)


def penalize_repetition(logits, rows, penalty: float):
    """Make tokens that a row already has less probable (CTRL, Keskar et al. 2019, section 4.1)."""
    for logit, row in zip(logits, rows):
        seen = torch.tensor(sorted(set(row)), device=logits.device)
        logit[seen] = torch.where(logit[seen] > 0, logit[seen] / penalty, logit[seen] * penalty)
    return logits


# ---------------------------------------------------------------------------------------------
# Generation


def pad_rows(rows, device):
    """Rows of ids as (B, T) ids with their `doc`: 0 for tokens, -1 for padding; None if even."""
    T = max(map(len, rows))
    idx = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    doc = torch.where(torch.arange(T, device=device) < lengths[:, None], 0, -1)
    return idx, None if all(len(row) == T for row in rows) else doc


@torch.no_grad()
def generate(model, prompts, max_new_tokens: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
             repetition_penalty=1.0, seed=0, stop_tokens=(), n_tokens=0, compiled=False):
    """Continue prompts (lists of ids, of any lengths >= 1); yields the next id of every row.

    Yields lists of B ids as they come, -1 for rows that have ended: after a stop token (which is
    still yielded) or max_new_tokens. Ids from n_tokens on are never drawn (0: all may be). Prompts
    longer than block_size lose their beginning. When the cache is full, the last half of the window
    is prefilled again. With `compiled`, all steps after the prompt share one compiled graph.

    A row's random numbers depend on its seed and its length only, not on other rows. `seed` is an
    int, of which row i takes the seed 'seed i', or a list with a seed per row.
    """
    device, step = model.lm_head.weight.device, model
    if compiled:
        step = torch.compile(model, dynamic=True, options=compile_options(device.type))
    rows = [list(prompt) for prompt in prompts]
    seeds = seed if isinstance(seed, list) else [f'{seed} {i}' for i in range(len(rows))]
    ended = [False] * len(rows)
    size = min(model.config.block_size, max(map(len, rows)) + max_new_tokens)
    cache, idx, u, was_training = None, None, None, model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if cache is None or cache.room() < 1:
                keep = size if cache is None else max(1, size // 2)
                cache = new_cache(model, len(rows), device, size)
                idx, doc = pad_rows([row[-keep:] for row in rows], device)
                logits = model(idx, doc=doc, cache=cache, n_logits=1)
            else:
                logits = step(idx, cache=cache, n_logits=1)
            logits = logits[:, -1].float()
            if n_tokens:
                logits[:, n_tokens:] = -math.inf
            if repetition_penalty != 1:
                logits = penalize_repetition(logits, rows, repetition_penalty)
            if temperature:
                u = torch.tensor([uniform(s, len(row)) for s, row in zip(seeds, rows)],
                                 device=device)
            new = sample_next(logits, u, temperature=temperature, top_k=top_k, top_p=top_p,
                              min_p=min_p)
            idx, ids = new[:, None], new.tolist()
            if min(ids) < 0:
                raise ValueError('the logits are not finite: this model cannot write')
            for i, row in enumerate(rows):
                row.append(ids[i])
                ids[i] = -1 if ended[i] else ids[i]
                ended[i] = ended[i] or ids[i] in stop_tokens
            yield ids
            if all(ended):
                return
    finally:
        model.train(was_training)
