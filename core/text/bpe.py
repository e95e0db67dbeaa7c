"""Training a byte-level BPE: pieces of text are counted, then the most frequent pairs merged."""
import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import regex  # comes with tiktoken
from tqdm import tqdm

from core.device import cpu_count
from core.workers import ordered_map

SHARE = 1 << 22         # characters that a process counts at a time
MOST_PIECES = 500_000   # in memory; beyond, pieces that came only once are dropped
OUTSIDE, GONE = -1, -2  # ids of the positions between two pieces, and of merged seconds


def blocks(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Parts of about `size` characters, each ending with a letter before a space and a letter.
    No piece of tokenizer.PATTERNS crosses such a place: the parts encode to the ids of the whole.
    """
    begin, gap = 0, re.compile(r'(?<=[^\W\d_]) (?=[^\W\d_])')
    while len(text) - begin > size and (found := gap.search(text, begin + size)):
        yield text[begin:found.start()]
        begin = found.start()
    yield text[begin:]


def count_pieces(texts: Iterable[str], pattern: str, workers: int = 0) -> Counter:
    """How often each piece occurs in the texts; counted by `workers` processes (0: all cores)."""
    shares, counts = shares_of(texts), Counter()
    first = next(shares, [])
    large = sum(map(len, first)) >= SHARE
    if not workers:     # starting several takes longer than counting a few megabytes
        workers = cpu_count() if large else 1
    shares = tqdm(itertools.chain([first], shares), desc='counting', leave=False, disable=not large)
    for found in ordered_map(count_share, shares, workers, pattern):
        counts.update(found)
        if len(counts) > MOST_PIECES:   # as in Chinese, where few pieces come twice
            counts = Counter({piece: n for piece, n in counts.items() if n > 1})
    return counts


def shares_of(texts: Iterable[str]) -> Iterator[list[str]]:
    """Parts of the texts (see blocks), about SHARE characters together at a time."""
    share, size = [], 0
    for part in (part for text in texts for part in blocks(text)):
        share.append(part)
        size += len(part)
        if size >= SHARE:
            yield share
            share, size = [], 0
    if share:
        yield share


def count_share(parts: list[str], pattern: str) -> Counter:
    """How often each piece occurs in some of the texts."""
    split = regex.compile(pattern).findall
    return Counter(itertools.chain.from_iterable(map(split, parts)))


def learn_merges(pieces: dict[str, int], n_tokens: int) -> list[bytes]:
    """The tokens of a BPE: the 256 bytes, then again and again the union of the most frequent pair.

    pieces: how often each occurs. Stops early when no pair occurs twice. Among equally frequent
    pairs the one with the lowest ids comes first, so the result is a function of the counts.

    All distinct pieces lie in one array of ids, with the positions of their neighbours. A new pair
    contains the newest token, so one merge creates all its places, and later merges only take some
    away. Counts thus never rise, and a heap with counts that may be too high is enough: the pair at
    its top is counted again, and put back if it has become less frequent.
    """
    ids, weight = lay_out(pieces)
    after = np.arange(1, len(ids) + 1, dtype=np.int32)      # position of the right neighbour
    before = np.arange(-1, len(ids) - 1, dtype=np.int32)    # and of the left one
    after[-1] = len(ids) - 1
    tokens = [bytes([i]) for i in range(256)]
    places, heap = {}, []                                   # pair -> positions of its first token

    def put(key: int, n: int, at: np.ndarray) -> None:
        if n > 1:
            heapq.heappush(heap, (-n, key))
            places[key] = at

    def add(at: np.ndarray) -> None:
        """Note new pairs, given by the positions of their first token."""
        if not len(at):
            return
        keys = ids[at].astype(np.int64) << 32 | ids[after[at]]
        order = np.argsort(keys, kind='stable')
        keys, at = keys[order], at[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.add.reduceat(weight[at], starts)
        for key, n, part in zip(keys[starts].tolist(), counts.tolist(), np.split(at, starts[1:])):
            put(key, n, part)

    add(np.flatnonzero((ids >= 0) & (ids[after] >= 0)))
    with tqdm(total=n_tokens, initial=256, desc='merging', unit='token', leave=False,
              delay=2) as bar:
        while len(tokens) < n_tokens and heap:
            n, key = heapq.heappop(heap)
            a, b = key >> 32, key & 0xffffffff
            first = places.pop(key)
            first = first[(ids[first] == a) & (ids[after[first]] == b)]
            if (now := int(weight[first].sum())) < -n:
                put(key, now, first)
                continue
            if a == b:
                first = every_second(first, after)
            second = after[first]
            right = after[second]
            ids[first], ids[second] = len(tokens), GONE
            after[first], before[right] = right, first
            left = before[first]
            left = left[(ids[left] >= 0) & (ids[left] != len(tokens))]
            tokens.append(tokens[a] + tokens[b])
            add(np.concatenate([left, first[ids[right] >= 0]]))
            bar.update()
    return tokens


def lay_out(pieces: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all pieces in a row, OUTSIDE before, between and after them, and how often the
    piece of each occurs. Pieces of one byte have no pairs."""
    encoded = sorted((piece.encode(), n) for piece, n in pieces.items() if len(piece.encode()) > 1)
    lengths = np.array([len(piece) + 1 for piece, _ in encoded], dtype=np.int64)
    ids = np.frombuffer(b'\0'.join([b'', *(piece for piece, _ in encoded), b'']), np.uint8)
    ids = ids.astype(np.int32)
    ids[np.cumsum(lengths)] = ids[0] = OUTSIDE
    return ids, np.repeat(np.array([0, *(n for _, n in encoded)]), [1, *lengths])


def every_second(first: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The pairs of one token with itself that can be merged: every second of a row, from the left.
    """
    index = np.arange(len(first))
    begins = np.concatenate([[True], first[1:] != after[first[:-1]]])
    return first[(index - np.maximum.accumulate(index * begins)) % 2 == 0]
