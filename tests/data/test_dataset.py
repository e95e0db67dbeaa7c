"""core/data/dataset.py: token shards, the order of windows, the shares of the ranks."""
import os
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import stopped

from core.data.dataset import (
    HEADER,
    IGNORE,
    PADDING,
    Ahead,
    PackedWindows,
    ShardWriter,
    Tokens,
    Windows,
    best_fit_decreasing,
    document_starts,
    load_split,
    open_shard,
)
from core.ranks.processes import share


def write(folder, ids, split='train', vocab_size=256, shard_tokens=1000, pieces=1) -> ShardWriter:
    """Write ids as shards, in so many calls of write."""
    writer = ShardWriter(folder, split, vocab_size, shard_tokens)
    for piece in np.array_split(np.asarray(ids, dtype=np.int64), pieces):
        rest = piece.tolist()
        while rest:
            rest = rest[writer.write(rest):]
    writer.flush()
    return writer


def windows(folder, n: int, block_size: int, seed: int = 0, **more) -> Windows:
    """Windows over the n different ids 0, 1, ..., so that an id is its own position."""
    write(folder, range(n), vocab_size=n)
    return Windows(Tokens(folder, 'train'), block_size, seed, **more)


# ---------------------------------------------------------------------------------------------
# Shards


def test_shard_bytes(tmp_path):
    writer = write(tmp_path, [1, 2, 258])
    raw = (tmp_path / 'train-00000.bin').read_bytes()
    assert raw == (b'SCRATGPT' + struct.pack('<II', 1, 2) + struct.pack('<Q', 3) + bytes(8)
                   + b'\x01\x00\x02\x00\x02\x01')
    assert HEADER.size == 32 and writer.paths == [tmp_path / 'train-00000.bin']


@pytest.mark.parametrize('vocab_size,itemsize', [(256, 2), (65_536, 2), (65_537, 4), (150_000, 4)])
def test_bytes_per_id(tmp_path, vocab_size, itemsize):
    ids = [0, 1, vocab_size - 1]
    write(tmp_path, ids, vocab_size=vocab_size)
    raw = (tmp_path / 'train-00000.bin').read_bytes()
    assert raw[12:16] == struct.pack('<I', itemsize) and len(raw) == 32 + 3 * itemsize
    assert raw[32:] == b''.join(i.to_bytes(itemsize, 'little') for i in ids)
    assert Tokens(tmp_path, 'train').read(0, 3).tolist() == ids


@pytest.mark.parametrize('n,pieces,sizes', [
    (25, 1, [10, 10, 5]), (25, 7, [10, 10, 5]), (20, 3, [10, 10]), (10, 1, [10]), (9, 9, [9]),
    (0, 1, [0])])
def test_several_shards(tmp_path, n, pieces, sizes):
    writer = write(tmp_path, range(n), shard_tokens=10, pieces=pieces)
    assert [path.name for path in writer.paths] == [
        f'train-{i:05d}.bin' for i in range(len(sizes))]
    assert sorted(tmp_path.iterdir()) == writer.paths
    assert [len(open_shard(path)) for path in writer.paths] == sizes
    assert len(Tokens(tmp_path, 'train')) == n
    assert Tokens(tmp_path, 'train').read(0, 100).tolist() == list(range(n))


@pytest.mark.parametrize('kind', [list, np.array])
def test_an_id_that_does_not_fit_is_not_cut(tmp_path, kind):
    with pytest.raises((OverflowError, ValueError)):
        ShardWriter(tmp_path, 'train', 256).write(kind([1 << 16]))


def test_read_across_borders(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, 33)
    write(tmp_path, ids, shard_tokens=7)
    tokens = Tokens(tmp_path, 'train')
    for start in range(34):
        for n in (0, 1, 6, 7, 8, 15, 33, 50):
            got = tokens.read(start, n)
            assert got.dtype == np.int64
            assert got.tolist() == ids[start:start + n].tolist(), (start, n)


def test_splits_are_apart(tmp_path):
    write(tmp_path, range(9))
    write(tmp_path, range(100, 104), split='val')
    assert Tokens(tmp_path, 'val').read(0, 99).tolist() == [100, 101, 102, 103]
    assert len(Tokens(str(tmp_path), 'train')) == 9


def test_missing_split(capsys, tmp_path):
    write(tmp_path, range(9))
    message = stopped(capsys, lambda: Tokens(tmp_path, 'val'))
    assert str(tmp_path) in message and 'val-*.bin' in message and 'prepare.py' in message


def header(magic=b'SCRATGPT', version=1, itemsize=2, n=3) -> bytes:
    return magic + struct.pack('<IIQ8x', version, itemsize, n)


@pytest.mark.parametrize('raw,parts', [
    (b'', ['not a token shard']),
    (header()[:31], ['not a token shard']),
    (header(b'NOTMAGIC') + bytes(6), ['not a token shard']),
    (header(version=2) + bytes(6), ['version 2', 'reads version 1']),
    (header(itemsize=3) + bytes(9), ['3-byte ids', '2 or 4']),
    (header(itemsize=0), ['0-byte ids']),
    (header() + bytes(5), ['37 bytes', 'promises 38']),
    (header() + bytes(7), ['39 bytes', 'promises 38']),
    (header(itemsize=4) + bytes(6), ['38 bytes', 'promises 44']),
    (header(n=0) + bytes(2), ['34 bytes', 'promises 32']),
    (header(n=2 ** 63) + bytes(6), ['38 bytes'])])
def test_damaged_shard(capsys, tmp_path, raw, parts):
    path = tmp_path / 'train-00000.bin'
    path.write_bytes(raw)
    message = stopped(capsys, lambda: Tokens(tmp_path, 'train'))
    assert message.startswith(f'{path}: ') and 'prepare.py' in message
    for part in parts:
        assert part in message, message


def test_the_damaged_one_of_several_is_named(capsys, tmp_path):
    paths = write(tmp_path, range(30), shard_tokens=10).paths
    os.truncate(paths[1], 50)
    assert stopped(capsys, lambda: Tokens(tmp_path, 'train')).startswith(f'{paths[1]}: 50 bytes')


def test_a_shard_missing_between_others(capsys, tmp_path):
    paths = write(tmp_path, range(30), shard_tokens=10).paths
    paths[1].unlink()
    assert 'train-00001.bin' in stopped(capsys, lambda: Tokens(tmp_path, 'train'))


# ---------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize('n,block_size', [
    (101, 8), (100, 8), (97, 8), (9, 8), (10, 8), (5, 8), (2, 8), (30, 1), (33, 32)])
def test_every_target_once_an_epoch(tmp_path, n, block_size):
    w = windows(tmp_path, n, block_size, seed=3)
    assert len(w) == -(-(n - 1) // block_size)
    for epoch in range(4):
        targets, short = [], 0
        for g in range(epoch * len(w), (epoch + 1) * len(w)):
            x, y, doc = w.window(g)
            assert doc is None
            assert x.shape == y.shape == (block_size,) and x.dtype == y.dtype == np.int64
            real = y != IGNORE
            length = int(real.sum())
            assert real[:length].all() and (x[length:] == 0).all()  # padded at the end only
            assert (y[:length] == x[:length] + 1).all()  # a target follows its input, always
            ring = (x[0] + np.arange(length)) % (n - 1)
            assert (x[:length] == ring).all()
            short += length < block_size
            targets += y[real].tolist()
        assert sorted(targets) == list(range(1, n))
        assert short == ((n - 1) % block_size > 0)  # one window is not full


def test_wrap_around(tmp_path):
    """The window over the end goes on with the first pair, not from the last token to the first."""
    w = windows(tmp_path, 12, 4, shuffle=False)
    w.offset = 9  # pairs 9 and 10, then 0 and 1
    x, y, _ = w.window(0)
    assert x.tolist() == [9, 10, 0, 1] and y.tolist() == [10, 11, 1, 2]


def epoch_of(w: Windows, epoch: int) -> list:
    return [tuple(w.window(g)[1]) for g in range(epoch * len(w), (epoch + 1) * len(w))]


def test_epochs_and_seeds_differ(tmp_path):
    w = windows(tmp_path, 203, 8, seed=1)
    other = Windows(w.tokens, 8, seed=2)
    orders = [epoch_of(w, e) for e in range(3)] + [epoch_of(other, e) for e in range(3)]
    assert len({tuple(order) for order in orders}) == 6
    assert len({tuple(sorted(order)) for order in orders}) > 1  # they are cut elsewhere as well
    assert all(sorted(order) != order for order in orders)


def test_pure_function_of_the_sample_number(tmp_path):
    w = windows(tmp_path, 203, 8, seed=1)
    expected = [w.window(g) for g in range(3 * len(w))]
    for g in np.random.default_rng(0).permutation(3 * len(w)):
        for one in (w, Windows(Tokens(tmp_path, 'train'), 8, 1)):  # one used before, one fresh
            x, y, _ = one.window(int(g))
            assert (x == expected[g][0]).all() and (y == expected[g][1]).all()


def test_numpys_global_random_state_plays_no_part(tmp_path):
    w = windows(tmp_path, 203, 8, seed=1)
    np.random.seed(0)
    first, state = epoch_of(w, 0), np.random.get_state()[1].tolist()
    np.random.seed(1)
    assert epoch_of(Windows(w.tokens, 8, 1), 0) == first
    np.random.seed(0)
    assert np.random.get_state()[1].tolist() == state  # and none was drawn


def test_the_order_is_frozen(tmp_path):
    """A change of the order would silently change what a resumed run reads."""
    w = windows(tmp_path, 1001, 16, seed=1337)
    assert len(w) == 63
    assert [int(w.window(g)[0][0]) for g in range(5)] == [306, 258, 514, 434, 586]
    assert [int(w.window(g)[0][0]) for g in range(63, 68)] == [831, 319, 367, 431, 943]
    assert [int(w.window(g)[0][0]) for g in range(10 ** 6, 10 ** 6 + 5)] == [
        255, 95, 15, 743, 791]


def test_the_largest_seed(tmp_path):
    w = windows(tmp_path, 101, 8, seed=2 ** 31 - 1)
    assert sorted(y for ys in epoch_of(w, 10 ** 6) for y in ys if y != IGNORE) == list(
        range(1, 101))


def test_in_order_from_the_beginning(tmp_path):
    w = windows(tmp_path, 21, 8, shuffle=False)
    for epoch in range(2):
        rows = [w.window(g) for g in range(epoch * 3, epoch * 3 + 3)]
        assert [x.tolist() for x, _, _ in rows] == [
            list(range(8)), list(range(8, 16)), [16, 17, 18, 19, 0, 0, 0, 0]]
        assert [y.tolist() for _, y, _ in rows] == [
            list(range(1, 9)), list(range(9, 17)), [17, 18, 19, 20] + [IGNORE] * 4]


def test_batch(tmp_path):
    w = windows(tmp_path, 101, 8, seed=5)
    x, y, doc = w.batch([3, PADDING, np.int64(40)])
    assert doc is None and x.shape == y.shape == (3, 8) and x.dtype == y.dtype == torch.int64
    for row, g in ((0, 3), (2, 40)):
        assert x[row].tolist() == w.window(g)[0].tolist()
        assert y[row].tolist() == w.window(g)[1].tolist()
    assert x[1].tolist() == [0] * 8 and y[1].tolist() == [IGNORE] * 8


def test_steps_cover_the_epochs(tmp_path):
    """Batches over two ranks, cut regardless of where an epoch ends, miss and repeat nothing."""
    w = windows(tmp_path, 101, 8, seed=5)  # 13 windows
    seen = []
    for step in range(13):
        for rank in range(2):
            for micro in share(step * 6, 6, rank, 2, 2):
                seen += [y for y in w.batch(micro)[1].flatten().tolist() if y != IGNORE]
    assert sorted(seen) == sorted(list(range(1, 101)) * 6)


# ---------------------------------------------------------------------------------------------
# Windows that respect documents

EOS = 0     # the same id as that of padding, so that tests see if they are confused


def documents(rng, sizes) -> list[int]:
    """Documents of so many tokens, eos between them; every other id occurs once."""
    ids = iter(rng.permutation(sum(sizes)) + 1)
    return [i for size in sizes for i in (EOS, *(next(ids) for _ in range(size)))][1:]


def packed(folder, ids, block_size: int, **more) -> PackedWindows:
    write(folder, ids, vocab_size=1 << 16, shard_tokens=7)
    return PackedWindows(Tokens(folder, 'train'), block_size, eos=EOS, **more)


def test_packing_by_hand(tmp_path):
    """Four documents; of their pieces, in order of length, the longest is that of a document cut in
    two, and the last, a mere eos, fits the second row better than the fourth."""
    ids = [1, 2, 3, EOS, 4, EOS, 11, 12, 13, 14, 15, 16, EOS, 8]
    w = packed(tmp_path, ids, 4, shuffle=False)
    rows = [[row.tolist() for row in w.window(g)] for g in range(len(w))]
    assert rows == [
        [[EOS, 11, 12, 13], [11, 12, 13, 14], [0, 0, 0, 0]],
        [[1, 2, 3, EOS], [2, 3, EOS, 8], [0, 0, 0, 1]],
        [[14, 15, 16, 0], [15, 16, EOS, IGNORE], [0, 0, 0, -1]],
        [[EOS, 4, 0, 0], [4, EOS, IGNORE, IGNORE], [0, 0, -1, -1]]]
    assert w.about == ('4 documents, of which 1 are longer than block_size=4 and cut, in 4 rows an '
                       'epoch, 18.75% of it padding')
    assert (w.n_targets, w.block_size) == (13, 4)


CASES = [[0, 3, 0, 0, 20, 1], [5], [40], [0, 0, 0], [7, 8, 9, 15, 16, 17, 23, 24], [3, 0],
         *(np.random.default_rng(i).integers(0, 30, 40).tolist() for i in range(4))]


@pytest.mark.parametrize('sizes', CASES)
def test_packed_rows(tmp_path, sizes):
    """Every target once an epoch; no document is cut that fits, none sees another."""
    ids = documents(np.random.default_rng(1), sizes)
    w = packed(tmp_path, ids, 8, seed=2)
    after = {x: y for x, y in zip(ids, ids[1:]) if x != EOS}
    firsts = {y for x, y in zip(ids, ids[1:]) if x == EOS}
    for epoch in range(2):
        targets, full = [], 0
        for g in range(epoch * len(w), (epoch + 1) * len(w)):
            x, y, doc = w.window(g)
            assert x.shape == y.shape == doc.shape == (8,)
            assert x.dtype == y.dtype == doc.dtype == np.int64
            n = int((doc >= 0).sum())
            assert n and doc[:n].tolist() == sorted(doc[:n]) and (doc[n:] == -1).all()
            assert (x[n:] == 0).all() and (y[n:] == IGNORE).all() and (y[:n] != IGNORE).all()
            assert set(doc[:n]) == set(range(doc[n - 1] + 1))
            for number in range(doc[n - 1] + 1):
                xs, ys = x[doc == number].tolist(), y[doc == number].tolist()
                assert xs[1:] == ys[:-1] and EOS not in xs[1:]
                assert ys[0] in firsts | {EOS} if xs[0] == EOS else ys[0] == after[xs[0]]
                whole = ys[-1] in (EOS, ids[-1])
                assert whole or len(xs) == 8    # what is cut off fills its row
                full += not whole
            targets += y[:n].tolist()
        assert sorted(targets) == sorted(ids[1:])
        sizes_in = [size + (i > 0) for i, size in enumerate(sizes)]
        sizes_in[-1] -= 1       # nothing follows the last token
        assert full == sum(max(0, -(-size // 8) - 1) for size in sizes_in)
        assert f'of which {sum(size > 8 for size in sizes_in)} are longer' in w.about


def naive_best_fit_decreasing(lengths, size: int) -> list[list[int]]:
    """As the paper has it: the longest piece first, into the fullest row that has room for it."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row in rows if sum(row) + length <= size]
        if not fits:
            rows.append(row := [])
            fits = [row]
        max(fits, key=sum).append(length)
    return rows


def test_as_many_rows_as_best_fit_piece_by_piece():
    rng = np.random.default_rng(0)
    for _ in range(400):
        size = int(rng.integers(1, 40))
        lengths = rng.integers(1, rng.integers(1, size + 1) + 1, rng.integers(1, 60))
        row = best_fit_decreasing(lengths, size)
        got = [sorted(lengths[row == r], reverse=True) for r in range(row.max() + 1)]
        assert sorted(got) == sorted(naive_best_fit_decreasing(lengths, size)), (size, lengths)


def test_packing_is_fast_and_small(tmp_path):
    """A million documents: less than a second, 73 bytes each; eos is looked for in small blocks."""
    rng = np.random.default_rng(0)
    began = time.process_time()
    assert best_fit_decreasing(rng.integers(1, 1025, 1_000_000), 1024).max() < 502_000
    assert time.process_time() - began < 1.5    # half a million rows
    sizes = np.clip(rng.lognormal(2, 1, 1_000_000).astype(int), 1, 1000)
    ids = np.ones(sizes.sum() + len(sizes), np.uint16)
    ids[np.cumsum(sizes + 1) - 1] = EOS
    writer = ShardWriter(tmp_path, 'train', 256)
    writer.write(ids)
    writer.flush()
    tokens = Tokens(tmp_path, 'train')
    began = time.process_time()
    w = PackedWindows(tokens, 1024, eos=EOS)
    assert time.process_time() - began < 4
    assert w.about.startswith('1,000,000 documents, of which 0 are') and '0.01% of it' in w.about
    tracemalloc.start()
    assert len(PackedWindows(tokens, 1024, eos=EOS)) == len(w)
    assert tracemalloc.get_traced_memory()[1] < 100 * len(sizes)
    tracemalloc.reset_peak()
    assert len(document_starts(tokens, 2, block=1 << 16)) == 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()


def test_eos_is_found_in_every_block(tmp_path):
    """Also where it is an epoch's first input, where two stand together; not at the very end."""
    ids = np.random.default_rng(0).integers(0, 4, 100)
    ids[[0, 20, 21, 99]] = EOS
    write(tmp_path, ids, shard_tokens=13)
    tokens = Tokens(tmp_path, 'train')
    expected = np.flatnonzero(ids[:99] == EOS).tolist()
    for block in (1, 4, 13, 50):
        assert document_starts(tokens, EOS, block).tolist() == expected
    assert document_starts(tokens, 9).tolist() == [0]


def rows_of(w, epoch: int) -> list:
    return [tuple(map(tuple, w.window(g))) for g in range(epoch * len(w), (epoch + 1) * len(w))]


def test_epochs_only_shuffle_the_packed_rows(tmp_path):
    ids = documents(np.random.default_rng(3), np.random.default_rng(3).integers(0, 30, 60))
    w = packed(tmp_path, ids, 16, seed=1)
    plain = rows_of(PackedWindows(w.tokens, 16, shuffle=False, eos=EOS), 0)
    other = PackedWindows(w.tokens, 16, seed=2, eos=EOS)
    orders = [rows_of(one, epoch) for one in (w, other) for epoch in range(3)] + [plain]
    assert len({tuple(order) for order in orders}) == 7
    assert all(sorted(order) == sorted(plain) for order in orders)


def test_packed_rows_are_a_pure_function_of_the_sample_number(tmp_path):
    ids = documents(np.random.default_rng(3), np.random.default_rng(3).integers(0, 30, 60))
    w = packed(tmp_path, ids, 16, seed=1)
    expected = [row for epoch in range(3) for row in rows_of(w, epoch)]
    for i, g in enumerate(np.random.default_rng(0).permutation(3 * len(w))):
        if i % 20 == 0:
            fresh = PackedWindows(Tokens(tmp_path, 'train'), 16, 1, eos=EOS)
        for one in (w, fresh):
            assert tuple(map(tuple, one.window(int(g)))) == expected[g]


def test_the_packing_is_frozen(tmp_path):
    """A change would silently change what a resumed run reads."""
    ids = documents(np.random.default_rng(3), [i * 7 % 31 for i in range(60)])
    w = packed(tmp_path, ids, 16, seed=1337)
    starts = lambda samples: [[start for start, _ in w.spans(w.place(g))] for g in samples]
    assert (len(w), len(ids)) == (60, 948)
    assert starts(range(4)) == [[404, 441], [575, 747], [367, 486], [91]]
    assert starts(range(10 ** 6, 10 ** 6 + 3)) == [[222, 282], [870], [409]]


def test_packed_batch(tmp_path):
    w = packed(tmp_path, documents(np.random.default_rng(3), [5, 2, 9, 0, 3]), 8, seed=1)
    batch = w.batch([1, PADDING])
    for got, want, empty in zip(batch, w.window(1), (0, IGNORE, -1)):
        assert got.shape == (2, 8) and got.dtype == torch.int64
        assert got[0].tolist() == want.tolist() and got[1].tolist() == [empty] * 8


def test_evaluation_numbers_the_documents_of_contiguous_windows(tmp_path):
    ids = [EOS, 1, EOS, EOS, 2, 3, 4, 5, 6, EOS, 7]
    write(tmp_path, ids)
    w = Windows(Tokens(tmp_path, 'train'), 4, shuffle=False, eos=EOS)
    plain = Windows(w.tokens, 4, shuffle=False)
    assert [w.window(g)[2].tolist() for g in range(len(w))] == [
        [0, 0, 1, 2], [0, 0, 0, 0], [0, 1, -1, -1]]
    for got, want in zip(w.batch([0, 1, 2])[:2], plain.batch([0, 1, 2])):
        assert got.tolist() == want.tolist()
    assert w.window(PADDING)[2].tolist() == [-1] * 4
    w.offset = 7    # the ring's beginning is not the same document as its end
    assert w.window(0)[2].tolist() == [0, 0, 1, 2]


# ---------------------------------------------------------------------------------------------
# The shares of the ranks


def test_share_by_hand():
    assert share(8, 8, 1, 3, 2) == [[11, 12], [13, -1]]  # its docstring
    assert share(8, 8, 0, 3, 2) == [[8, 9], [10, -1]]
    assert share(8, 8, 2, 3, 2) == [[14, 15], [-1, -1]]
    assert share(0, 4, 0, 1, 4) == [[0, 1, 2, 3]]
    assert share(5, 1, 1, 2, 1) == [[-1]] and PADDING == -1
    assert share(5, 1, 0, 1, 3) == [[5, -1, -1]]


def test_shares_make_up_the_batch():
    for n in range(1, 25):
        for world in range(1, 9):
            for micro in range(1, 8):
                shares = [share(100, n, rank, world, micro) for rank in range(world)]
                assert len({len(s) for s in shares}) == 1
                assert {len(rows) for s in shares for rows in s} == {micro}
                real = [g for s in shares for rows in s for g in rows if g != PADDING]
                assert real == list(range(100, 100 + n)), (n, world, micro)
                padding = len(shares[0]) * micro - -(-n // world)
                assert 0 <= padding < micro  # no more than the last micro-batch needs


# ---------------------------------------------------------------------------------------------
# load_split


def test_load_split(tmp_path):
    write(tmp_path, range(9))
    write(tmp_path, range(2), split='val')
    train = load_split(tmp_path, 'train', 8, seed=4)
    assert (train.block_size, train.seed, train.shuffle, len(train)) == (8, 4, True, 1)
    val = load_split(tmp_path, 'val', 8, shuffle=False)  # shorter than a window is fine here
    assert val.window(0)[1].tolist() == [1] + [IGNORE] * 7


def test_load_split_that_respects_documents(tmp_path):
    for split in ('train', 'val'):
        write(tmp_path, [1, 2, EOS, 3, 4, 5, 6, 7], split=split)
    train = load_split(tmp_path, 'train', 4, seed=4, eos=EOS)
    assert type(train) is PackedWindows and (train.block_size, train.seed) == (4, 4)
    assert len(train) == 2 and train.shuffle
    val = load_split(tmp_path, 'val', 4, shuffle=False, eos=EOS)
    assert type(val) is Windows and len(val) == 2
    assert val.window(0)[2].tolist() == [0, 0, 1, 1]
    assert load_split(tmp_path, 'val', 4, shuffle=False).window(0)[2] is None


def test_training_split_too_short(capsys, tmp_path):
    write(tmp_path, range(8))
    message = stopped(capsys, lambda: load_split(tmp_path, 'train', 8))
    assert message.startswith(f'{tmp_path}: ') and '8 tokens' in message
    assert 'block_size=8 needs 9' in message and 'more text' in message


@pytest.mark.parametrize('n', [0, 1])
def test_nothing_to_evaluate_on(capsys, tmp_path, n):
    write(tmp_path, range(n), split='val')
    message = stopped(capsys, lambda: load_split(tmp_path, 'val', 8))
    assert message.startswith(f'{tmp_path}: ') and f'val split has {n} tokens' in message
    assert 'val_fraction' in message


@pytest.mark.parametrize('threaded', [False, True])
def test_ahead(threaded):
    """The batches of the step that is asked for, whatever was made ahead; in turn, each once."""
    made = []

    def make(step):
        made.append(step)
        return [(torch.tensor([step]), None)]
    ahead = Ahead(make, threaded)
    assert [int(ahead(step)[0][0]) for step in (3, 4, 5, 0, 1)] == [3, 4, 5, 0, 1]
    if threaded:
        ahead.worker.shutdown()
    assert made == ([3, 4, 5, 6, 0, 1, 2] if threaded else [3, 4, 5, 0, 1])
