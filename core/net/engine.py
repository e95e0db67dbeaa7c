"""Writing with a model: an engine for many requests that come and go.

`Engine` serves requests; `generate` continues some prompts together, with the engine where it can.
model.generate does the same for one prompt, plainly.
"""
import itertools
from collections import OrderedDict, deque
from collections.abc import Sequence

import torch

from core.net.cache import KVCache, compiled_blocks, new_cache
from core.net.draw import Sampling, next_ids

# ---------------------------------------------------------------------------------------------
# The engine


class StopStrings:
    """Passes text on piece by piece, up to the first stop string (which is left out). Text that may
    be the beginning of a stop string is kept back until that is decided."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.pending, self.found = stops, '', False

    def feed(self, text: str) -> str:
        """The part of all text so far that is sure and has not been returned yet."""
        self.pending += text
        hits = [at for s in self.stops if (at := self.pending.find(s)) >= 0]
        if hits:
            self.found = True
            return self.pending[:min(hits)]
        kept = max((n for s in self.stops for n in range(1, len(s))
                    if self.pending.endswith(s[:n])), default=0)
        out = self.pending[:len(self.pending) - kept]
        self.pending = self.pending[len(out):]
        return out

    def rest(self) -> str:
        """What was kept back, when no more text comes."""
        return '' if self.found else self.pending


class Request:
    """A prompt, and what has come after it."""

    def __init__(self, ids: list[int], sampling: Sampling, tokenizer=None):
        self.ids, self.n_prompt, self.sampling = list(ids), len(ids), sampling
        self.ended = ''         # why it has: stop (a token or string), length, cancelled
        self.start = 0          # the first id that the model still sees
        self.cached = 0         # how many ids from there on have their keys in the cache
        self.ready = False      # whether these are all but the last
        self.to_text = tokenizer.stream() if tokenizer else lambda i: ''
        self.stops = StopStrings(sampling.stop_strings)
        self.logprobs: list = []        # (of the id, [(rival, its own), ...]) from the first new id
        self.prompt_logprobs: list = []     # or from the prompt's second id on
        self.grams, self.n_grams = {}, 0        # for `draft`
        self.accepted = float(DRAFT)    # of a draft, a running mean
        self.rest = 0                   # tokens until the next draft is tried

    def take(self, new: int) -> str:
        """Add an id; returns the text that is sure now."""
        self.ids.append(new)
        stop = new in self.sampling.stop_tokens
        text = '' if stop else self.stops.feed(self.to_text(new))
        if stop or self.stops.found:
            self.ended = 'stop'
        elif len(self.ids) - self.n_prompt >= self.sampling.max_new_tokens:
            self.ended = 'length'
        return text + self.stops.rest() if self.ended else text

    def draft(self) -> list[int]:
        """What came after the last GRAM ids where they stood before, up to DRAFT ids (Saxena 2023,
        "Prompt Lookup Decoding"). Where that reaches the end, it is repeated."""
        found = None
        for end in range(max(self.n_grams, GRAM - 1) + 1, len(self.ids) + 1):
            gram = tuple(self.ids[end - GRAM:end])
            found, self.grams[gram] = self.grams.get(gram), end
        self.n_grams = len(self.ids)
        return [] if found is None else (self.ids[found:found + DRAFT] * DRAFT)[:DRAFT]


LEAST_PREFIX = 16       # ids at the beginning of a request that are worth being copied
GRAM = 3        # ids that must be the same for a draft
DRAFT = 4       # ids in a draft
COST = 3.0      # of a step of 1 + DRAFT ids, in steps of one: a rule, since a clock would choose
                # differently from run to run, and with it the last digits of logits
REST = 64       # tokens without a draft after drafts that did not pay


class Engine:
    """Continues many requests at a time, each in a row of the cache, called its slot.

    `submit` requests, then call `step` until none is left. A request's ids depend on itself only,
    not on what shares the steps with it: its draws are a hash of its seed and the position. (The
    logits' last digits do depend on the number of rows in a product.)

    slots       requests that are served at a time; others wait
    tokenizer   whose text `step` gives, and whose stop strings end a request; None: ids only
    n_tokens    ids from here on are never drawn (0: all may be)
    compiled    whether the blocks are compiled for steps of single tokens
    speculate   whether a lone request tries ids that came after the same GRAM ids before: a step
                computes them all, and those that are drawn are kept. Ids are the same without.
    piece       ids of prompts in a step, so that other requests go on meanwhile (0: no limit)
    remember    positions of ended requests that are kept for those that begin alike
    """

    def __init__(self, model, slots: int = 1, *, tokenizer=None, n_tokens: int = 0,
                 compiled: bool = False, speculate: bool = False, piece: int = 0,
                 remember: int = 0):
        if slots < 1:
            raise ValueError(f'slots={slots}: must be at least 1')
        if why := refusal(model):
            raise ValueError(why)
        self.model, self.slots, self.speculate = model, slots, speculate
        self.device = next(model.parameters()).device
        self.size = model.config.block_size
        self.n_tokens = n_tokens or (len(tokenizer) if tokenizer else 0)
        self.tokenizer, self.run = tokenizer, compiled_blocks(model) if compiled else model
        self.waiting: deque[Request] = deque()
        self.rows: list[Request] = []       # in the order of the cache's rows
        self.cache, self.piece, self.remember = None, piece, remember
        self.known: OrderedDict = OrderedDict()     # ids of ended requests -> their keys and values

    def submit(self, ids: list[int], sampling: Sampling) -> Request:
        """Take a request. Raises ValueError for a prompt that is empty or longer than the window.
        """
        if not 0 < len(ids) <= self.size:
            raise ValueError(f'a request of {len(ids):,} tokens: must be 1 to {self.size:,}, the '
                             "model's window")
        request = Request(ids, sampling, self.tokenizer)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now; its slot is free for the next step."""
        if not request.ended:
            request.ended = 'cancelled'
            if request in self.rows:
                self.leave(self.rows.index(request))
            else:
                self.waiting.remove(request)

    @torch.no_grad()
    def step(self) -> list[tuple[Request, list[int], str]]:
        """Admit what waits, if slots are free; compute the next token of each row, or a few tokens;
        free the slots of those that have ended. Returns (request, its new ids, its new text)."""
        if self.model.training:
            raise ValueError('the model is in training mode: call model.eval() first')
        while self.waiting and len(self.rows) < self.slots:
            self.rows.append(self.waiting.popleft())
        if not self.rows:
            return []
        for row in [row for row in self.rows if len(row.ids) - row.start > self.size]:
            self.leave(self.rows.index(row))    # to the end, where rows are that have no cache
            row.start, row.cached = len(row.ids) - max(1, self.size // 2), 0
            row.ready = False
            self.rows.append(row)
        n = sum(row.ready for row in self.rows)
        logits, draft = [], []
        if n:
            if self.speculate and len(self.rows) == 1:
                draft = self.draft(self.rows[0])
            ids = [row.ids[-1:] + draft for row in self.rows[:n]]
            logits.append(self.forward(self.run, 0, ids, 1 + len(draft)).flatten(0, 1))
        logits += self.prefill(n)
        ready = [row for row in self.rows if row.ready]
        if not ready:
            return []
        places = [(row.sampling, row.ids + draft[:t]) for row in ready
                  for t in range(len(draft) + 1)]
        every = torch.cat(logits) if len(logits) > 1 else logits[0]
        drawn, found = next_ids(every, places, self.n_tokens), []
        each = [drawn] if draft else [[new] for new in drawn]
        for i, (row, new) in enumerate(zip(ready, each)):
            if row.sampling.logprobs >= 0:
                row.logprobs += self.rivals(every[i:i + len(new)], new, row.sampling.logprobs)
            found.append((row, *self.keep(row, draft, new)))
            del row.logprobs[len(row.ids) - row.n_prompt:]      # of ids that were not kept
        for row, *_ in found:
            if row.ended:
                self.leave(self.rows.index(row))
        return found

    # What a step is made of

    def forward(self, run, first: int, ids: list[list[int]], n_logits: int) -> torch.Tensor:
        """Logits (B, n_logits, V) of ids (B, T), which go on the rows from number `first` on."""
        lengths = [row.cached for row in self.rows[first:first + len(ids)]]
        self.make_room(max(lengths) + len(ids[0]))
        idx, part = torch.tensor(ids, device=self.device), self.cache.part(first, lengths)
        if run is not self.model and len(ids) > 1:
            part.even = False       # so that one graph serves rows of equal lengths, too
        return run(idx, cache=part, n_logits=n_logits)

    def make_room(self, needed: int) -> None:
        """A cache for so many positions."""
        if self.cache is None:
            self.cache = KVCache(self.slots, 0, self.device)
        if self.cache.size < needed:
            self.cache.grow(min(self.size, max(256, 1 << (needed - 1).bit_length())))

    def prefill(self, n: int) -> list[torch.Tensor]:
        """Compute the prompts of the rows from number n on, as many ids as a step may; the logits
        (1, V) after each prompt that is whole now."""
        room, found = self.piece or 1 << 60, []
        for i, row in enumerate(self.rows[n:], n):
            if room <= 0:
                break
            if not row.cached:
                self.reuse(i)
            begin, asked = row.start + row.cached, row.sampling.prompt_logprobs
            part = row.ids[begin:begin + room]
            logits = self.forward(self.model, i, [part], len(part) if asked else 1)[0]
            row.cached, room = row.cached + len(part), room - len(part)
            if asked:
                wanted = row.ids[begin + 1:min(begin + len(part) + 1, row.n_prompt)]
                row.prompt_logprobs += self.rivals(logits[:len(wanted)], wanted,
                                                   max(0, row.sampling.logprobs))
            if begin + len(part) == len(row.ids):
                row.cached, row.ready = row.cached - 1, True    # the last id goes in once more,
                found.append(logits[-1:])                       # which `keep` counts
        return found

    def rivals(self, logits, ids: list[int], k: int) -> list[tuple[float, list]]:
        """(log-probability of an id, the k most probable ids with theirs) of logits (N, V) and N
        ids; before temperature and the like."""
        if not ids:
            return []
        logs = logits.float()
        logs[:, self.n_tokens or logs.size(1):] = -torch.inf
        logs = logs.log_softmax(dim=-1)
        best = logs.topk(min(k, logs.size(1)))
        own = logs.gather(1, torch.tensor(ids, device=logs.device)[:, None])[:, 0].tolist()
        return [(x, list(zip(i, y))) for x, i, y in zip(own, best.indices.tolist(),
                                                        best.values.tolist())]

    def reuse(self, i: int) -> None:
        """Copy into a new row what it begins with, if another one has computed the same."""
        row = self.rows[i]
        ids, best, source = row.ids[row.start:], LEAST_PREFIX - 1, None
        # The last id is computed in any case, all of them where their probabilities are asked for.
        most = 0 if row.sampling.prompt_logprobs else len(ids) - 1
        rows = ((other.ids[other.start:other.start + other.cached], j)
                for j, other in enumerate(self.rows[:i]))
        for known, where in itertools.chain(rows, ((key, key) for key in self.known)):
            if best >= most:    # no other can have more
                break
            n = common([ids, list(known)], min(most, len(known)))
            if n > best:
                best, source = n, where
        if source is None:
            return
        row.cached = best
        self.make_room(best)
        if isinstance(source, int):
            self.cache.move(source, i, best)
        else:
            self.known.move_to_end(source)
            self.cache.put(i, self.known[source], best)

    def note(self, row: Request, i: int) -> None:
        """Keep what a row has computed, for requests that begin alike; forget the oldest."""
        ids = tuple(row.ids[:row.cached])
        if row.start or not LEAST_PREFIX <= len(ids) <= self.remember:
            return
        for known in [known for known in self.known if ids[:len(known)] == known]:
            del self.known[known]
        self.known[ids] = self.cache.copy(i, len(ids))
        while sum(map(len, self.known)) > self.remember:
            self.known.popitem(last=False)

    def keep(self, row: Request, draft: list[int], drawn: list[int]) -> tuple[list[int], str]:
        """Give a row the ids drawn, up to the first that is not the draft's. Returns them, and
        their text."""
        new, text = [], ''
        if not row.sampling.max_new_tokens:     # only the prompt was asked about
            row.ended = 'length'
            return new, text
        for t, i in enumerate(drawn):
            new.append(i)
            text += row.take(i)
            if row.ended or draft[t:t + 1] != [i]:
                break
        row.cached += len(new)
        if draft:
            row.accepted = 0.8 * row.accepted + 0.2 * (len(new) - 1)
        return new, text

    def leave(self, i: int) -> None:
        """Take a row out; the last row that is ready gets its slot, and the first of the others
        that one's. Without rows, no cache is kept."""
        n = sum(row.ready for row in self.rows)
        if self.rows[i].ready and self.remember:
            self.note(self.rows[i], i)
        if i < n - 1:
            self.cache.move(n - 1, i, self.rows[n - 1].cached)
            self.rows[i], self.rows[n - 1] = self.rows[n - 1], self.rows[i]
            i = n - 1
        if i < n < len(self.rows) and self.rows[n].cached:
            self.cache.move(n, n - 1, self.rows[n].cached)
        del self.rows[i]
        if not self.rows:
            self.cache = None

    def draft(self, row: Request) -> list[int]:
        """Ids to try: none where drafts have given fewer ids than a step of them costs steps."""
        found, row.rest = row.draft(), row.rest - 1
        if not found or row.rest > 0 or self.size - row.cached <= DRAFT:
            return []
        if 1 + row.accepted < COST:
            row.rest, row.accepted = REST, COST     # and then once more
            return []
        return found


def common(sequences: list[list[int]], most: int) -> int:
    """How many ids, at most `most`, all the sequences begin with."""
    low, high = min(sequences), max(sequences)      # in order, these two differ the earliest
    return next((i for i in range(most) if low[i:i + 1] != high[i:i + 1]), most)


def refusal(model) -> str:
    """Why the engine cannot serve a model; '' if it can."""
    if model.config.arch != 'gpt':
        return f'the engine serves GPTs only, not an {model.config.arch}: use generate'
    if any(hasattr(p, 'device_mesh') for p in model.parameters()):
        return 'the engine serves models on one process only, and this one is sharded: use generate'
    return ''


# ---------------------------------------------------------------------------------------------
# Some prompts together


def generate(model, prompts, max_new_tokens: int, *, seed=0, n_tokens=0, compiled=False,
             **sampling):
    """Continue prompts (lists of ids, of any lengths >= 1); yields the next id of every row.

    Yields lists of B ids as they come, -1 for rows that have ended: after a stop token (which is
    still yielded) or max_new_tokens. `sampling` are settings of Sampling; of n_tokens and
    `compiled` see Engine, of long prompts and full windows `steps_of`.

    `seed` is an int, of which row i takes the seed 'seed i', or a list with a seed per row.
    """
    seeds = seed if isinstance(seed, list) else [f'{seed} {i}' for i in range(len(prompts))]
    wanted = [Sampling(max_new_tokens, seed=s, **sampling) for s in seeds]
    was_training, rows = model.training, None
    model.eval()
    try:
        for found in steps_of(model, prompts, wanted, n_tokens=n_tokens, compiled=compiled):
            rows = rows or [row for row, *_ in found]
            new = {row: ids[0] for row, ids, _ in found}
            yield [new.get(row, -1) for row in rows]
    finally:
        model.train(was_training)


def steps_of(model, prompts, wanted: list[Sampling], *, tokenizer=None, n_tokens=0, compiled=False,
             speculate=False):
    """What the steps of an engine give that continues all of these prompts; without an engine if it
    refuses the model. Prompts longer than block_size lose their beginning. When the window of a row
    is full, the last half of it is prefilled again."""
    prompts = [prompt[-model.config.block_size:] for prompt in prompts]
    if refusal(model):
        yield from steps_together(model, prompts, wanted, tokenizer, n_tokens)
        return
    engine = Engine(model, len(prompts), tokenizer=tokenizer, n_tokens=n_tokens, compiled=compiled,
                    speculate=speculate)
    for each in zip(prompts, wanted):
        engine.submit(*each)
    while engine.rows or engine.waiting:
        yield engine.step()


@torch.no_grad()
def steps_together(model, prompts, wanted, tokenizer, n_tokens: int):
    """`steps_of` for what the engine refuses: an LSTM, and a sharded model, whose processes all
    call it. The rows share one window: when the longest is full, all begin anew."""
    device = next(model.parameters()).device
    rows = [Request(*each, tokenizer) for each in zip(prompts, wanted)]
    size = min(model.config.block_size, max(map(len, prompts)) + wanted[0].max_new_tokens)
    cache = idx = None
    while not all(row.ended for row in rows):
        if cache is None or cache.room() < 1:
            keep = size if cache is None else max(1, size // 2)
            cache = new_cache(model, len(rows), device, size)
            idx, doc = pad_rows([row.ids[-keep:] for row in rows], device)
            logits = model(idx, doc=doc, cache=cache, n_logits=1)
        else:
            logits = model(idx, cache=cache, n_logits=1)
        new = next_ids(logits[:, -1], [(row.sampling, row.ids) for row in rows],
                       n_tokens or len(tokenizer or ()))
        idx = torch.tensor(new, device=device)[:, None]
        found = []
        for row, i in zip(rows, new):
            if row.ended:
                row.ids.append(i)   # it goes on unseen, with the others
            else:
                found.append((row, [i], row.take(i)))
        yield found


def pad_rows(rows, device):
    """Rows of ids as (B, T) ids with their `doc`: 0 for tokens, -1 for padding; None if even."""
    T = max(map(len, rows))
    idx = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    doc = torch.where(torch.arange(T, device=device) < lengths[:, None], 0, -1)
    return idx, None if all(len(row) == T for row in rows) else doc
