"""Drawing tokens: from a model's logits to the next id of each row."""
import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How a request goes on, and when it ends; see `sample_next` for how ids are drawn."""
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | str = 0         # its draws depend on this and on the position only
    stop_tokens: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    logprobs: int = -1          # note each id's log-probability, and those of so many rivals
    prompt_logprobs: bool = False   # the same for the prompt's ids


class NotFinite(ValueError):
    """Logits of which none can be drawn."""


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
    return ids.masked_fill_(~(total > 0), -1)


LEAST_TEMPERATURE = 1e-5


def sample_next(logits, u, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(B,) ids drawn from logits (B, V) with the random numbers u (B,); temperature 0 takes the
    most probable ids, and no u. So does one so small that logits divided by it overflow. An id is
    -1 where logits are NaN.

    top_k keeps the k most probable tokens; min_p those with at least min_p times the probability of
    the most probable one (Nguyen et al. 2024); top_p the fewest whose probabilities sum to at least
    top_p (Holtzman et al. 2020). They apply in this order, after the temperature."""
    if temperature < LEAST_TEMPERATURE:
        best = logits.max(dim=-1)
        return torch.where(best.values.isnan(), -1, best.indices)
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


def next_ids(logits, asked: list[tuple[Sampling, list[int]]], n_tokens: int = 0) -> list[int]:
    """The ids drawn from logits (B, V), in fp32, for rows of which each has its Sampling and its
    ids so far. Ids from n_tokens on are never drawn (0: all may be). Raises ValueError where
    probabilities are NaN."""
    logits, groups = logits.float(), defaultdict(list)
    if any(s.repetition_penalty != 1 for s, _ in asked):
        logits = logits.clone()     # the caller's stay as the model gave them
    if n_tokens:
        logits[:, n_tokens:] = -math.inf
    for i, (s, ids) in enumerate(asked):
        if s.repetition_penalty != 1:
            penalize_repetition(logits[i:i + 1], [ids], s.repetition_penalty)
        groups[s.temperature, s.top_k, s.top_p, s.min_p].append(i)
    drawn = [0] * len(asked)
    for (temperature, top_k, top_p, min_p), rows in groups.items():
        u = None
        if temperature:
            u = torch.tensor([uniform(asked[i][0].seed, len(asked[i][1])) for i in rows],
                             device=logits.device)
        new = sample_next(logits if len(groups) == 1 else logits[rows], u, top_k=top_k,
                          temperature=temperature, top_p=top_p, min_p=min_p)
        for i, new_id in zip(rows, new.tolist()):
            drawn[i] = new_id
    if min(drawn) < 0:
        raise NotFinite('the logits are not finite: this model cannot write')
    return drawn
