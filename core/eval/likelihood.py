"""How probable a model finds continuations of contexts: what tests by multiple choice are made of.

The rules are those of EleutherAI's lm-evaluation-harness, so that scores can be compared. What
continuations have in common is computed once: the context of all choices of an item, and the
examples that all items of a task begin with.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm import tqdm

from core.net.cache import KVCache
from core.net.engine import LEAST_PREFIX, common
from core.ranks import processes

BATCH_TOKENS = 1024     # tokens computed at a time, 16 times as many on a GPU
BATCH_LOGITS = 1 << 26  # logits held at a time, 256 MiB in fp32


class Pair(NamedTuple):
    """A continuation, and what stands before it, as ids."""
    context: list[int]
    continuation: list[int]


class Scored(NamedTuple):
    """Log-probability of a continuation in nats, and whether each of its ids is the likeliest."""
    log_probability: float
    greedy: bool


def encode_pair(tokenizer, context: str, continuation: str) -> Pair:
    """Ids of a context and what follows it, encoded together and cut where the context's own ids
    end. Spaces at the end of the context go to the continuation, as tokens begin with a space.
    Without a context (or one of spaces) the model's first id stands before the continuation."""
    context, continuation = tokenizer.as_corpus(context), tokenizer.as_corpus(continuation)
    before = [tokenizer.bos] if tokenizer.add_bos else []
    stripped = context.rstrip()
    if not stripped:
        ids = tokenizer.encode(context + continuation)
        first = first_id(tokenizer)
        return Pair([first], ids) if ids[:1] != [first] else Pair(ids[:1], ids[1:])
    whole = before + tokenizer.encode(context + continuation)
    ids = before + tokenizer.encode(stripped)
    return Pair(ids, whole[len(ids):])


def first_id(tokenizer) -> int:
    """The id that stands before a text: bos, or else eos, the end of another text."""
    return tokenizer.eos if tokenizer.bos is None else tokenizer.bos


def windows(ids: list[int], first: int, size: int, stride: int) -> list[Pair]:
    """A text of any length as pairs that predict each id once. Windows of `size` ids begin `stride`
    apart: an id has at least size - stride + 1 ids before it, but for those of the first window;
    the last one is filled up from the left. (`get_rolling_token_windows` in the harness, whose
    stride is the size.)"""
    found, done = [Pair([first], ids[:size])], min(size, len(ids))
    while done < len(ids):
        end = done + min(stride, len(ids) - done)
        found.append(Pair(ids[end - size - 1:done], ids[done:end]))
        done = end
    return found


# ---------------------------------------------------------------------------------------------
# Rows: pairs with a common beginning


class Row(NamedTuple):
    """Pairs that begin alike, as one sequence: what they share, then the rest of each, its branch.
    """
    shared: list[int]
    branches: list[tuple[list[int], list[int]]]     # own ids that go in; the ids that the last of
                                                    # them predict, the first perhaps after `shared`
    item: int

    @property
    def n_ids(self) -> int:
        return len(self.shared) + self.n_own

    @property
    def n_own(self) -> int:
        """Ids of all branches."""
        return sum(len(ids) for ids, _ in self.branches)


def rows_of(item: int, pairs: list[Pair], size: int) -> list[Row]:
    """The pairs of an item as one row, or each as a row of its own where they share little. A pair
    longer than the window of `size` loses the beginning of its context."""
    cut = [((pair.context + pair.continuation)[-size - 1:-1], pair.continuation) for pair in pairs]
    most = min(len(ids) - len(targets) + 1 for ids, targets in cut)
    n = common([ids for ids, _ in cut], most)
    if n < LEAST_PREFIX and len(cut) > 1:
        return [row for pair in pairs for row in rows_of(item, [pair], size)]
    return [Row(cut[0][0][:n], [(ids[n:], targets) for ids, targets in cut], item)]


class Branches:
    """Of KVCache what the model asks of it, for one pass over rows of branches: in each row a
    branch sees what is shared and itself. `prefix` is a cache of one row that all rows go on."""

    def __init__(self, rows: list[Row], device, prefix: KVCache | None = None):
        T, self.prefix = max(row.n_ids for row in rows), prefix
        self.size, first = math.inf, prefix.longest if prefix else 0
        position = torch.zeros(len(rows), T, dtype=torch.long)
        branch = torch.full((len(rows), T), -1)     # 0: shared; -1: padding, which sees itself
        for b, row in enumerate(rows):
            n = len(row.shared)
            position[b, :n], branch[b, :n] = torch.arange(n), 0
            for k, (ids, _) in enumerate(row.branches, 1):
                begin, n = n, n + len(ids)
                position[b, begin:n] = torch.arange(len(ids)) + len(row.shared)
                branch[b, begin:n] = k
        seen = (branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)
        seen &= position[:, :, None] >= position[:, None]
        self.position, self.seen = (position + first).to(device), seen.to(device)

    def room(self) -> float:
        return math.inf

    def positions(self, T: int) -> torch.Tensor:
        return self.position

    def mask(self, T: int, window: int) -> torch.Tensor:
        """(B, 1, T, S) which of the prefix and of its row each token sees."""
        first = self.prefix.longest if self.prefix else 0
        before = self.seen.new_ones((*self.seen.shape[:2], first))
        mask, places = torch.cat([before, self.seen], dim=-1), self.position
        if window:
            known = torch.arange(first, device=places.device).expand(len(places), first)
            k = torch.cat([known, places], dim=1)
            mask = mask & (k[:, None] > places[..., None] - window)
        return mask[:, None]

    def update(self, layer: int, k, v):
        if not self.prefix:
            return k, v
        n = self.prefix.longest
        before = [x[layer][:1, :, :n].expand(len(k), -1, -1, -1)
                  for x in (self.prefix.k, self.prefix.v)]
        return torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)

    def advance(self, T: int, n_new=None) -> None:
        pass


# ---------------------------------------------------------------------------------------------
# Scoring


def score(model, items: list[list[Pair]], device, ranks=None, about: str = 'scored',
          asked: Callable[[], bool] = lambda: False) -> list[list[Scored]] | None:
    """What the model (in eval mode) says of each pair of each item. Ranks share the work, all get
    all; None if asked() says, to all ranks alike, to stop."""
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    config, lstm = model.config, model.config.arch == 'lstm'    # which has no cache: each alone
    rows = [row for i, pairs in enumerate(items) for part in ([[p] for p in pairs] if lstm else
            [pairs]) for row in rows_of(i, part, config.block_size)]
    prefix = [] if lstm else beginning(rows)
    rows = [row._replace(shared=row.shared[len(prefix):]) for row in rows]
    cache, mine = cached(model, prefix, device), []
    batches = in_batches(rows, config.vocab_size, device)
    with tqdm(total=len(rows), desc=about, leave=False, delay=2, disable=True if rank else None
              ) as bar:
        for i, batch in enumerate(batches):
            if asked():
                return None
            if i % world == rank:
                mine += zip(batch, score_batch(model, [rows[n] for n in batch], cache, device))
            bar.update(len(batch))
    found = [[] for _ in items]
    for row, values in zip(rows, in_order(mine)):
        found[row.item] += [Scored(*value) for value in values]
    return found


def in_order(mine: list[tuple]) -> list:
    """The values of all ranks, of which each has some (number, value), in the order of numbers."""
    return [value for _, value in sorted(map(tuple, sum(processes.exchange(mine), [])))]


def beginning(rows: list[Row]) -> list[int]:
    """The ids that all rows share, if computing them once pays."""
    n = common([row.shared for row in rows], min(len(row.shared) for row in rows) - 1)
    return rows[0].shared[:n] if n >= LEAST_PREFIX and len(rows) > 1 else []


def in_batches(rows: list[Row], vocab_size: int, device) -> list[list[int]]:
    """The numbers of rows of similar length, the longest first: memory fails at once or never."""
    budget = BATCH_TOKENS * (16 if device.kind == 'cuda' else 1)
    batches, longest, most = [], 0, 0
    for n in sorted(range(len(rows)), key=lambda n: (-rows[n].n_ids, -rows[n].n_own)):
        row, many = rows[n], len(batches[-1]) + 1 if batches else 0
        if many and many * longest <= budget and \
                many * max(most, row.n_own) * vocab_size <= BATCH_LOGITS:
            batches[-1].append(n)
            most = max(most, row.n_own)
        else:
            batches.append([n])
            longest, most = row.n_ids, row.n_own
    return batches


@torch.no_grad()
def cached(model, prefix: list[int], device) -> KVCache | None:
    """A cache of one row that holds the prefix; None without one."""
    if not prefix:
        return None
    cache = KVCache(1, len(prefix), device.name)
    with device.autocast():
        model(torch.tensor([prefix], device=device.name), cache=cache, n_logits=1)
    return cache


@torch.no_grad()
def score_batch(model, rows: list[Row], prefix: KVCache | None, device) -> list[list[Scored]]:
    """The pairs of each row. Raises ValueError for logits that are not finite."""
    T, n = max(row.n_ids for row in rows), 1 + max(row.n_own for row in rows)
    idx, doc = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
    places = []     # (row, which of its last n ids, what that predicts), in the order of the pairs
    for b, row in enumerate(rows):
        ids = row.shared + [i for own, _ in row.branches for i in own]
        idx[b, :len(ids)], doc[b, :len(ids)] = torch.tensor(ids), 0
        end = n - row.n_own
        for own, targets in row.branches:
            end += len(own)
            at = list(range(end - len(targets), end))
            if len(own) < len(targets):
                at[0] = n - row.n_own - 1   # the last id that all share
            places += [(b, place, target) for place, target in zip(at, targets)]
    plain = not prefix and all(len(row.branches) == 1 for row in rows)
    cache = None if plain else Branches(rows, device.name, prefix)
    with device.autocast():
        logits = model(idx.to(device.name), doc=None if (doc == 0).all() else doc.to(device.name),
                       cache=cache, n_logits=n).float()
    # log p of an id is its logit minus log sum exp of all, here a few rows at a time: on a CPU four
    # times as fast, since these stay in its cache.
    parts = logits.flatten(0, 1).split(4 if device.kind == 'cpu' else 1 << 20)
    b, place, target = torch.tensor(places, device=logits.device).T
    chosen, row = logits[b, place, target], b * n + place
    logs = (chosen - torch.cat([part.logsumexp(dim=-1) for part in parts])[row]).double().cpu()
    if not logs.isfinite().all():
        raise ValueError('the logits are not finite: the weights are damaged, or training diverged')
    likeliest = (chosen == torch.cat([part.amax(dim=-1) for part in parts])[row]).cpu()
    found, at = [], 0
    for row in rows:
        found.append([])
        for _, targets in row.branches:
            part = slice(at, at + len(targets))
            found[-1].append(Scored(logs[part].sum().item(), bool(likeliest[part].all())))
            at += len(targets)
    return found
