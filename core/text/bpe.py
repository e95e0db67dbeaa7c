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
OUTSIDE = -1            # id of the positions between two pieces; x << 32 | -1 is -1


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
    counts, split = Counter(), regex.compile(pattern).findall
    split_ascii = re.compile(ascii_pattern(pattern)).findall
    for block in (block for part in parts for block in blocks(part, 1 << 14)):
        counts.update(split_ascii(block) if block.isascii() else split(block))
    return counts


def ascii_pattern(pattern: str) -> str:
    """What splits ASCII text as the pattern does, for Python's `re`, which is twice as fast."""
    pattern = re.sub(r'\[[^]]*]', lambda found: found[0].replace(r'\p{L}', 'a-zA-Z').replace(
        r'\p{N}', '0-9'), pattern)
    return '(?a)' + pattern.replace(r'\p{L}', '[a-zA-Z]').replace(r'\p{N}', '[0-9]')


def learn_merges(pieces: dict[str, int], n_tokens: int) -> list[bytes]:
    """The tokens of a BPE: the 256 bytes, then again and again the union of the most frequent pair.

    pieces: how often each occurs. Stops early when no pair occurs twice. Among equally frequent
    pairs the one with the lowest ids comes first, so the result is a function of the counts.

    All distinct pieces lie in one array of ids. A new pair contains the newest token, so one merge
    creates all its places, and later merges only take some away. Counts thus never rise, and a heap
    of counts that may be too high is enough: the pair at its top is counted again, and put back if
    it has become less frequent.
    """
    ids, weight = lay_out(pieces)
    after = np.arange(1, len(ids) + 1)      # position of the right neighbour
    before = np.arange(-1, len(ids) - 1)    # and of the left one
    after[-1] = len(ids) - 1
    pair = ids << 32 | ids[after]           # negative where one of both is OUTSIDE
    tokens = [bytes([i]) for i in range(256)]
    places, heap = {}, []                   # pair -> positions of its first token

    def add(at: np.ndarray) -> None:
        """Note the new pairs that occur twice, given by the positions of their first token."""
        if not len(at := at[pair[at] >= 0]):
            return
        keys = pair[at]
        order = keys.argsort(kind='stable')
        keys, at = keys[order], at[order]
        begins = np.concatenate([[0], (keys[1:] != keys[:-1]).nonzero()[0] + 1])
        counts = np.add.reduceat(weight[at], begins)
        ends = np.append(begins[1:], len(at))
        twice = counts > 1
        for key, n, begin, end in zip(*(some[twice].tolist() for some in (
                keys[begins], counts, begins, ends))):
            heapq.heappush(heap, (-n, key))
            places[key] = at[begin:end]

    add(np.arange(len(ids)))
    with tqdm(total=n_tokens, initial=256, desc='merging', leave=False, delay=2) as bar:
        while len(tokens) < n_tokens and heap:
            n, key = heapq.heappop(heap)
            first = places.pop(key)
            first = first[pair[first] == key]
            if (now := int(weight[first].sum())) < -n:
                if now > 1:
                    heapq.heappush(heap, (-now, key))
                    places[key] = first
                continue
            a, b, new = key >> 32, key & 0xffffffff, len(tokens)
            tokens.append(tokens[a] + tokens[b])
            first = every_second(first, after) if a == b else first
            second = after[first]
            right = after[second]
            ids[first], pair[second] = new, OUTSIDE
            after[first], before[right] = right, first
            left = before[first]
            pair[first] = new << 32 | ids[right]
            left = left[ids[left] != new]       # the others are among the first
            pair[left] = ids[left] << 32 | new
            add(np.concatenate([left, first]))
            bar.update()
    return tokens


def lay_out(pieces: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all pieces in a row, OUTSIDE before, between and after them, and how often the
    piece of each occurs. Pieces of one byte have no pairs."""
    encoded = sorted((piece.encode(), n) for piece, n in pieces.items() if len(piece.encode()) > 1)
    lengths = np.array([len(piece) + 1 for piece, _ in encoded], dtype=np.int64)
    ids = np.frombuffer(b'\0'.join([b'', *(piece for piece, _ in encoded), b'']), np.uint8)
    ids = ids.astype(np.int64)
    ids[np.cumsum(lengths)] = ids[0] = OUTSIDE
    return ids, np.repeat(np.array([0, *(n for _, n in encoded)]), [1, *lengths])


def every_second(first: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The pairs of one token with itself that can be merged: every second of a row, from the left.
    """
    index = np.arange(len(first))
    begins = np.concatenate([[True], first[1:] != after[first[:-1]]])
    return first[(index - np.maximum.accumulate(index * begins)) % 2 == 0]
