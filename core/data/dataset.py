"""What training reads: token shards and records, and the order in which windows of them are read.
docs/formats.md writes down every byte of a shard."""
import bisect
import os
import struct
from collections.abc import Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from core.data.named import is_made, read_meta
from core.ranks.processes import IGNORE, PADDING
from core.settings import stop

# ---------------------------------------------------------------------------------------------
# Token shards

MAGIC, VERSION = b'SCRATGPT', 1
HEADER = struct.Struct('<8sIIQ8x')  # magic, version, bytes per id (2 or 4), number of ids; 32 bytes


class ShardWriter:
    """Writes ids to `<folder>/<split>-00000.bin` and on, at most `shard_tokens` in each; after the
    `n_shards` that are there already. A shard appears when it is whole."""

    def __init__(self, folder, split: str, vocab_size: int, shard_tokens: int = 100_000_000,
                 n_shards: int = 0):
        self.folder, self.split, self.shard_tokens = Path(folder), split, shard_tokens
        self.dtype = np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')
        self.file, self.filled, self.paths = None, 0, [self.path(i) for i in range(n_shards)]

    def path(self, number: int) -> Path:
        return self.folder / f'{self.split}-{number:05d}.bin'

    def write(self, ids) -> int:
        """Append ids until the shard is full; returns how many were written."""
        ids = np.asarray(ids[:self.shard_tokens - self.filled], dtype=np.int64)
        low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
        if low < 0 or high > np.iinfo(self.dtype).max:
            raise ValueError(f'ids from {low} to {high} do not fit {self.dtype}')
        self.begin()
        self.file.write(ids.astype(self.dtype).tobytes())
        self.filled += len(ids)
        if self.filled == self.shard_tokens:
            self.flush()
        return len(ids)

    def begin(self) -> None:
        """Begin a shard, unless one is begun."""
        if not self.file:
            self.file = open(self.path(len(self.paths)).with_suffix('.part'), 'wb')
            self.file.write(bytes(HEADER.size))

    def flush(self) -> None:
        """Give the shard that is being filled its name; an empty one, too, if there is none yet."""
        if not self.file and self.paths:
            return
        self.begin()
        self.file.seek(0)
        self.file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self.filled))
        self.file.close()
        path = self.path(len(self.paths))
        os.replace(path.with_suffix('.part'), path)
        self.paths.append(path)
        self.file, self.filled = None, 0


class Tokens:
    """The ids of one split, read from its shards as if they were a single array."""

    def __init__(self, folder, split: str):
        self.folder, self.split = Path(folder), split
        paths = sorted(self.folder.glob(f'{split}-*.bin'))
        if not paths:
            stop(f'{self.folder}: no {split}-*.bin in it; make the dataset with prepare.py')
        for number, path in enumerate(paths):
            if path.name != f'{split}-{number:05d}.bin':
                stop(f'{self.folder}: {split}-{number:05d}.bin is missing; delete the folder and '
                     'run prepare.py again')
        self.shards = [open_shard(path) for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.max_id = read_meta(self.folder)['max_id'] if is_made(self.folder) else 1 << 32

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, n: int) -> np.ndarray:
        """(n,) int64 ids from position `start` on; fewer at the end of the split."""
        parts = []
        stop_at = min(start + n, len(self))
        while start < stop_at:
            i = int(np.searchsorted(self.ends, start, side='right'))
            begin = self.ends[i] - len(self.shards[i])
            parts.append(self.shards[i][start - begin:stop_at - begin])
            if parts[-1].max() > self.max_id:
                stop(f'{self.folder}/{self.split}-{i:05d}.bin: damaged: it has token id '
                     f'{parts[-1].max()}, and the largest is {self.max_id}; delete its folder and '
                     'run prepare.py again')
            start = min(stop_at, int(self.ends[i]))
        return np.concatenate(parts or [np.empty(0)]).astype(np.int64)


def open_shard(path: Path) -> np.ndarray:
    """The ids of one shard file as a memory map. Stops if header or size are wrong."""
    size = path.stat().st_size
    with open(path, 'rb') as f:
        head = f.read(HEADER.size)
    remedy = 'delete its folder and run prepare.py again'
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        stop(f'{path}: not a token shard (wrong header); {remedy}')
    _, version, itemsize, n = HEADER.unpack(head)
    if version != VERSION or itemsize not in (2, 4):
        stop(f'{path}: shard version {version} with {itemsize}-byte ids; this code reads '
             f'version {VERSION} with 2 or 4; {remedy}')
    if size != HEADER.size + n * itemsize:
        stop(f'{path}: {size:,} bytes, but its header promises '
             f'{HEADER.size + n * itemsize:,}; {remedy}')
    if n == 0:
        return np.empty(0, f'<u{itemsize}')
    return np.memmap(path, dtype=f'<u{itemsize}', mode='r', offset=HEADER.size, shape=(n,))


# ---------------------------------------------------------------------------------------------
# The order of windows


class Order(Sized):
    """The order in which len(self) samples are read, epoch by epoch: sample number g lies in epoch
    g // len(self). It is a pure function of (seed, epoch); with shuffle=False there is one."""
    epoch = order = None

    def __init__(self, seed: int, shuffle: bool = True):
        self.seed, self.shuffle = seed, shuffle

    def set_epoch(self, epoch: int) -> int:
        """Work out the order of epoch number `epoch`; returns a random number of 64 bits of it."""
        # Philox's raw words, unlike numpy's shuffles, are the same in every version of numpy.
        words = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self) + 1)
        self.epoch, self.order = epoch, np.argsort(words[:-1], kind='stable')
        return int(words[-1])

    def place(self, sample: int) -> int:
        """Which one of its epoch, before they were shuffled, a sample is."""
        epoch, i = divmod(sample, len(self))
        if not self.shuffle:
            return i
        if epoch != self.epoch:
            self.set_epoch(epoch)
        return int(self.order[i])


class Windows(Order):
    """Cuts a split into windows of `block_size` inputs with their next tokens as targets.

    Every epoch covers each target exactly once: the split is read as a ring, cut from a random
    position on, and its windows are shuffled. With shuffle=False, for evaluation, it is read from
    the beginning. With `eos`, the id that ends a text, a window comes with the numbers of its
    documents, for the model to keep apart.
    """
    about = ''      # what was packed, in words

    def __init__(self, tokens: Tokens, block_size: int, seed: int = 0, shuffle: bool = True,
                 eos: int | None = None):
        super().__init__(seed, shuffle)
        self.tokens, self.block_size, self.eos = tokens, block_size, eos
        self.n_targets, self.offset = len(tokens) - 1, 0

    def __len__(self) -> int:
        return (self.n_targets + self.block_size - 1) // self.block_size

    def set_epoch(self, epoch: int) -> int:
        """Work out also where the epoch starts."""
        word = super().set_epoch(epoch)
        self.offset = word % self.n_targets
        return word

    def spans(self, i: int) -> list[tuple[int, int]]:
        """(start, length) in the split of each stretch of inputs in window i of an epoch."""
        n = min(self.block_size, self.n_targets - i * self.block_size)
        start = (self.offset + i * self.block_size) % self.n_targets
        m = min(n, self.n_targets - start)  # fewer than n where it passes the end of the ring
        return [(start, m), (0, n - m)] if m < n else [(start, n)]

    def window(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Inputs, targets and document numbers (block_size,) of a sample; PADDING is an empty one.
        Documents are numbered 0, 1, ... in the window, its unused end is -1; None without eos."""
        x = np.zeros(self.block_size, np.int64)
        y = np.full(self.block_size, IGNORE, np.int64)
        begins, end = np.zeros(self.block_size, bool), 0
        for start, n in [] if sample == PADDING else self.spans(self.place(sample)):
            ids = self.tokens.read(start, n + 1)
            x[end:end + n], y[end:end + n], begins[end] = ids[:-1], ids[1:], True
            end += n
        if self.eos is None:
            return x, y, None
        doc = np.cumsum(begins | (x == self.eos)) - 1
        doc[end:] = -1
        return x, y, doc

    def batch(self, samples) -> tuple:
        """Inputs, targets and document numbers (or None) of sample numbers: (B, block_size) each.
        """
        rows = zip(*(self.window(int(sample)) for sample in samples))
        return tuple(None if row[0] is None else torch.from_numpy(np.stack(row)) for row in rows)


class PackedWindows(Windows):
    """Packs whole documents into windows of `block_size` inputs, so that few are cut.

    The inputs of a document are the eos before it (the first has none) and its tokens, its targets
    its tokens and the eos after it: every epoch covers each target once. A longer document is cut
    into full windows and a rest; the rests and the other documents share windows, by best-fit
    decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3.1). What
    is in a window depends on the tokens alone; an epoch only shuffles the windows.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int = 0, shuffle: bool = True, *,
                 eos: int):
        super().__init__(tokens, block_size, seed, shuffle, eos)
        documents = document_starts(tokens, eos)
        sizes = np.diff(documents, append=self.n_targets)
        n_pieces = -(-sizes // block_size)
        before = np.cumsum(n_pieces) - n_pieces     # pieces of earlier documents
        starts = np.repeat(documents - before * block_size, n_pieces)
        starts += np.arange(len(starts)) * block_size
        lengths = np.diff(starts, append=self.n_targets).astype(np.int32)
        row = best_fit_decreasing(lengths, block_size)
        order = np.argsort(row, kind='stable')
        self.starts, self.lengths = starts[order], lengths[order]
        self.ends = np.cumsum(np.bincount(row))     # row r has the pieces ends[r - 1] to ends[r]
        padding = 1 - self.n_targets / (len(self) * block_size)
        self.about = (f'{len(documents):,} documents, of which {(sizes > block_size).sum():,} are '
                      f'longer than block_size={block_size} and cut, in {len(self):,} rows an '
                      f'epoch, {padding:.2%} of it padding')

    def __len__(self) -> int:
        return len(self.ends)

    def spans(self, i: int) -> list[tuple[int, int]]:
        """(start, length) in the split of each piece of a document in row i."""
        pieces = slice(self.ends[i - 1] if i else 0, self.ends[i])
        return list(zip(self.starts[pieces].tolist(), self.lengths[pieces].tolist()))


def document_starts(tokens: Tokens, eos: int, block: int = 1 << 22) -> np.ndarray:
    """Positions of the inputs with which documents begin: 0 and every eos, read block by block."""
    found = [np.zeros(1, np.int64)]
    for shard, end in zip(tokens.shards, tokens.ends):
        for i in range(0, len(shard), block):
            found.append(np.flatnonzero(shard[i:i + block] == eos) + (end - len(shard) + i))
    starts = np.unique(np.concatenate(found))
    return starts[starts < len(tokens) - 1]     # the last token is no input


def best_fit_decreasing(lengths: np.ndarray, size: int) -> np.ndarray:
    """The row of each piece: longest first, each goes to the row of `size` with least room for it.
    Pieces of one length, and rows with the same pieces, are dealt with in groups: about size x
    log(size) turns, however many pieces there are."""
    by_length = np.argsort(-lengths, kind='stable')
    row = np.empty(len(lengths), np.int64)
    groups = []         # (room, first row, number of rows), ascending
    done = n_rows = 0   # how many pieces have a row, how many rows there are
    counts = np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            i = bisect.bisect_left(groups, (length,))
            if i < len(groups):
                room, first, n = groups.pop(i)
            else:
                room, first, n = size, n_rows, -(-left // (size // length))
                n_rows += n
            # A row that got one is the best fit for the next one, until it has no room for another.
            each = room // length
            taken = min(left, n * each)
            row[by_length[done:done + taken]] = first + np.arange(taken) // each
            done, left = done + taken, left - taken
            full, rest = divmod(taken, each)
            partly = int(rest > 0)
            for n_of, pieces in ((full, each), (partly, rest), (n - full - partly, 0)):
                if n_of and room > pieces * length:
                    bisect.insort(groups, (room - pieces * length, first, n_of))
                first += n_of
    return row


class Rows(Order):
    """Sequences of at most block_size + 1 ids with a weight for each as a target, in rows.

    Several in a row of block_size, packed by best fit and kept apart by document numbers; or, if
    not `packed`, one in each, no longer than the longest needs (to a multiple of 8).
    """

    def __init__(self, ids: list, weights: list, block_size: int, seed: int = 0,
                 shuffle: bool = True, packed: bool = True):
        super().__init__(seed, shuffle)
        self.ids, self.weights = ids, weights
        lengths = np.array([len(row) - 1 for row in ids], np.int64)
        self.block_size = block_size if packed else min(block_size, -(-lengths.max() // 8) * 8)
        row = best_fit_decreasing(lengths, block_size) if packed else np.arange(len(ids))
        self.members = [part.tolist() for part in np.split(
            np.argsort(row, kind='stable'), np.cumsum(np.bincount(row))[:-1])]

    def __len__(self) -> int:
        return len(self.members)

    def sequences(self, sample: int) -> list[int]:
        """The numbers of the sequences in the row of a sample; PADDING has none."""
        return [] if sample == PADDING else self.members[self.place(sample)]

    def owners(self, samples) -> torch.Tensor:
        """(B, T) the number of the sequence that each position belongs to; -1 is padding."""
        rows = np.full((len(samples), self.block_size), -1, np.int64)
        for row, sample in zip(rows, samples):
            members = self.sequences(int(sample))
            found = np.repeat(members, [len(self.ids[i]) - 1 for i in members])
            row[:len(found)] = found
        return torch.from_numpy(rows)

    def batch(self, samples) -> tuple:
        """Inputs, targets, document numbers and the targets' weights, (B, T) each. Targets without
        weight are IGNORE; documents are numbered from 0 in each row, -1 is padding."""
        shape = len(samples), self.block_size
        x, y = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        doc, weight = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
        for r, sample in enumerate(samples):
            end = 0
            for number, i in enumerate(self.sequences(int(sample))):
                ids, w = np.asarray(self.ids[i]), np.asarray(self.weights[i], np.float32)[1:]
                at = slice(end, end := end + len(w))
                x[r, at], doc[r, at], weight[r, at] = ids[:-1], number, w
                y[r, at] = np.where(w > 0, ids[1:], IGNORE)
        return tuple(map(torch.from_numpy, (x, y, doc, weight)))


class Ahead:
    """make(step), one step after the other: micro-batches, tuples of tensors. Where a GPU computes,
    a thread makes those of the next step meanwhile, in memory that it fetches without waiting."""

    def __init__(self, make, threaded: bool):
        self.make, self.coming = make, {}       # step -> what the thread makes of it
        self.worker = ThreadPoolExecutor(1) if threaded else None

    def pinned(self, step: int) -> list[tuple]:
        """make(step) in page-locked memory."""
        lock = lambda t: t.pin_memory() if t is not None and torch.cuda.is_available() else t
        return [tuple(map(lock, batch)) for batch in self.make(step)]

    def __call__(self, step: int) -> list[tuple]:
        if not self.worker:
            return self.make(step)
        found = self.coming.get(step) or self.worker.submit(self.pinned, step)
        self.coming = {step + 1: self.worker.submit(self.pinned, step + 1)}
        return found.result()


def load_split(folder, split: str, block_size: int, seed: int = 0, shuffle: bool = True,
               eos: int | None = None) -> Windows:
    """The windows of one split. Stops if it is too short to fill a single one. With `eos`, the id
    that ends a text, they respect documents: packed, or, if not shuffled, numbered."""
    tokens = Tokens(folder, split)
    if len(tokens) < block_size + 1 and split == 'train':
        stop(f'{folder}: its training split has {len(tokens):,} tokens, a window of '
             f'block_size={block_size} needs {block_size + 1:,}; use more text or a smaller '
             'block_size')
    if len(tokens) < 2:
        stop(f'{folder}: its {split} split has {len(tokens)} tokens, nothing to evaluate on; '
             'use more text or a larger val_fraction in prepare.py')
    # Evaluation is not packed: it has the same windows and targets as without eos, so that the two
    # losses can be compared; only, no target sees more than its own document.
    if eos is None or not shuffle:
        return Windows(tokens, block_size, seed, shuffle, eos)
    return PackedWindows(tokens, block_size, seed, eos=eos)


def rows_of(part: list, size: int, seed: int, packed: bool) -> Rows:
    """Rows of size tokens of a list of (record, Encoded): see core/data/records.py."""
    return Rows([it.ids for _, it in part], [it.weights for _, it in part], size, seed,
                packed=packed)
