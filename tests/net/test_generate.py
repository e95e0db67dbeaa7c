"""core/net/engine.py: the cache against no cache, drawing, generation; the LSTM behind the same
interface."""
import math

import pytest
import torch
from test_model import LLAMA, PROMPTS, close, tiny, tokens, variants

from core.net.cache import KVCache, new_cache
from core.net.draw import draw, penalize_repetition, sample_next, uniform
from core.net.engine import generate
from model import generate as plain_generate

# ---------------------------------------------------------------------------------------------
# The KV cache


@pytest.mark.parametrize('compiling', [False, True], ids=['eager', 'as compiled'])
@variants
@torch.no_grad()
def test_cached_logits_equal_uncached(settings, compiling, monkeypatch):
    model, idx = tiny(**settings), tokens(2, 24)
    want = model(idx)
    changed = idx.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 31
    moved = (model(changed) - want).abs().amax(dim=(0, 2))
    assert moved[:8].max() == 0 and moved[8:12].min() > 1e-3     # the comparison is not empty
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: compiling)
    for chunks in ([24], [7] + [1] * 17, [6, 5, 1, 8, 4], [1] * 24):
        cache = new_cache(model, 2)
        got = [model(part, cache=cache) for part in idx.split(chunks, dim=1)]
        close(torch.cat(got, dim=1), want)
        assert cache.room() == 0 and cache.lengths.tolist() == [24, 24]


@variants
@torch.no_grad()
def test_cached_rows_of_different_lengths(settings):
    """Padded prefill, single steps, a padded chunk, single steps; each row against itself alone."""
    model, idx = tiny(**settings), tokens(3, 24)
    want = [model(row[None])[0] for row in idx]
    cache, at = new_cache(model, 3), [0, 0, 0]

    def feed(*counts):
        """Feed counts[b] tokens of each row in one call; checks the logits of the last one."""
        T = max(counts)
        part = torch.full((3, T), 30)
        doc = torch.full((3, T), -1)
        for b, n in enumerate(counts):
            part[b, :n] = idx[b, at[b]:at[b] + n]
            doc[b, :n] = 0
            at[b] += n
        got = model(part, doc=None if min(counts) == T else doc, cache=cache, n_logits=1)
        assert got.shape == (3, 1, 31)
        for b in range(3):
            close(got[b, 0], want[b][at[b] - 1])
        assert cache.lengths.tolist() == at and cache.room() == 24 - max(at)

    feed(7, 3, 5)
    feed(1, 1, 1)
    feed(1, 1, 1)
    feed(2, 4, 6)
    feed(3, 3, 3)
    feed(2, 6, 1)
    assert not cache.even
    feed(1, 1, 1)
    feed(3, 1, 2)       # now all are equally long
    assert cache.even and len(set(at)) == 1
    feed(1, 1, 1)


def test_cache_mask_by_hand():
    cache = KVCache(2, 8)
    assert cache.mask(3, 0) is None                 # prefill is plainly causal
    cache.advance(2)
    assert cache.mask(1, 0) is None                 # one query sees everything
    assert cache.mask(2, 0).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert cache.mask(2, 2).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    cache.advance(2, torch.tensor([2, 1]))
    assert cache.positions(1).tolist() == [[4], [3]] and cache.room() == 4
    assert cache.mask(1, 0).int().tolist() == [[[[1, 1, 1, 1, 1]]], [[[1, 1, 1, 1, 0]]]]


@torch.no_grad()
def test_n_logits_counts_back_from_the_last_real_token():
    model, idx = tiny(**LLAMA), tokens(2, 8)
    doc = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1], [0] * 8])
    full = model(idx, doc=doc)
    got = model(idx, doc=doc, n_logits=2)
    close(got, torch.stack([full[0, 3:5], full[1, 6:8]]))
    close(model(idx, n_logits=3), model(idx)[:, -3:])


def reference_greedy(model, prompts, n):
    """What `generate` must give, without a cache: a row that is full goes on from its last half."""
    size = model.config.block_size
    rows, out = [prompt[-size:] for prompt in prompts], []
    for _ in range(n):
        rows = [row if len(row) <= size else row[-max(1, size // 2):] for row in rows]
        out.append([int(model(torch.tensor([row]))[0, -1].argmax()) for row in rows])
        rows = [row + [new] for row, new in zip(rows, out[-1])]
    return out


@variants
@torch.no_grad()
def test_generate_past_the_window_equals_the_uncached_rule(settings):
    model = tiny(**settings)
    long = tokens(1, 40)[0].tolist()                # is cropped to the last 24
    for prompts, n in (([PROMPTS[0]], 45), ([long], 15), (PROMPTS, 30)):
        assert list(generate(model, prompts, n, temperature=0)) == reference_greedy(
            model, prompts, n)
    model.config.block_size = 1
    assert list(generate(model, [[3]], 5, temperature=0)) == reference_greedy(model, [[3]], 5)


@pytest.mark.parametrize(('settings', 'graphs'), [
    pytest.param({}, (1, 2), marks=pytest.mark.slow), (LLAMA | {'window': 5}, (1, 2))],
    ids=['gpt2', 'llama, window'])
def test_compiled_generation_is_the_same(settings, graphs):
    """With one graph for all blocks and lengths of the cache, filled and begun again, too; and one
    more for several rows."""
    torch.compiler.reset()
    model, counts = tiny(**settings), torch._dynamo.utils.counters
    counts.clear()
    for prompts, n_graphs in zip(([PROMPTS[0]], PROMPTS), graphs):  # uneven, then even again
        want = ids(model, prompts, 40, temperature=0)
        assert ids(model, prompts, 40, temperature=0, compiled=True) == want
        assert counts['stats']['unique_graphs'] == n_graphs


def test_recompute_does_not_lose_the_cache():
    """With gradients on, a cached forward must be the same whether blocks are recomputed or not."""
    model, idx = tiny(), tokens(1, 6)
    model.recompute = True
    cache = new_cache(model, 1)
    got = torch.cat([model(part, cache=cache) for part in idx.split(3, dim=1)], dim=1)
    close(got, model(idx))


# ---------------------------------------------------------------------------------------------
# Generation and the LSTM


def ids(model, prompts=PROMPTS, n=10, **options):
    return list(generate(model, prompts, n, **options))


def test_generate_is_deterministic():
    model = tiny(**LLAMA)
    greedy, sampled = ids(model, temperature=0), ids(model, seed=1)
    assert len(greedy) == 10 and all(len(row) == 3 for row in greedy)
    assert ids(model, temperature=0, seed=5) == ids(model, top_k=1, seed=5) == greedy
    assert ids(model, seed=1) == sampled != ids(model, seed=2)
    for b, prompt in enumerate(PROMPTS):
        assert ids(model, [prompt], temperature=0) == [[row[b]] for row in greedy]


def test_generate_restores_training_mode_and_uses_no_dropout():
    model = tiny(dropout=0.5)
    want = ids(model, temperature=0)
    assert not model.training
    model.train()
    assert ids(model, temperature=0) == want and model.training
    unfinished = generate(model, PROMPTS, 5)
    next(unfinished)
    unfinished.close()
    assert model.training


def test_stop_tokens_end_a_row():
    model = tiny(**LLAMA)
    free = ids(model, n=200, seed=4)
    got = ids(model, n=200, seed=4, stop_tokens=(3, 8))
    assert len(got) < 200
    for b in range(3):
        row = [step[b] for step in free]
        end = min(i for i, token in enumerate(row) if token in (3, 8)) + 1
        assert [step[b] for step in got] == row[:end] + [-1] * (len(got) - end)


def test_ids_from_n_tokens_on_are_never_drawn():
    model = tiny(**LLAMA)
    assert max(max(row) for row in ids(model, n=60, temperature=50.0)) >= 20
    found = {i for row in ids(model, n=60, temperature=50.0, n_tokens=20) for i in row}
    assert max(found) < 20 and len(found) > 10


@pytest.mark.parametrize('options, support', [
    ({}, {0: 0.05, 1: 0.5, 2: 0.15, 3: 0.3}), (dict(temperature=0), {1: 1.0}),
    (dict(top_k=1), {1: 1.0}), (dict(top_k=2), {1: 0.625, 3: 0.375}),
    (dict(top_k=9), {0: 0.05, 1: 0.5, 2: 0.15, 3: 0.3}),
    (dict(min_p=0.2), {1: 0.5263, 2: 0.1579, 3: 0.3158}), (dict(min_p=0.4), {1: 0.625, 3: 0.375}),
    (dict(top_p=0.45), {1: 1.0}), (dict(top_p=0.6), {1: 0.625, 3: 0.375}),
    (dict(top_p=0.9), {1: 0.5263, 2: 0.1579, 3: 0.3158}),
    (dict(top_k=2, top_p=0.6), {1: 1.0}),           # of the two left the first has 0.625
    (dict(min_p=0.4, top_p=0.6), {1: 1.0}),
    (dict(temperature=0.5, top_p=0.7), {1: 0.7353, 3: 0.2647}),   # squares: 0.685 and 0.247
    (dict(temperature=0.5, top_p=0.65), {1: 1.0})])
def test_sample_next_by_hand(options, support):
    n = 4000
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().add(2.0).expand(n, 4)
    u = torch.tensor([uniform(7, position) for position in range(n)])
    found = sample_next(logits, u, **options).bincount(minlength=4) / n
    assert set(found.nonzero()[:, 0].tolist()) == set(support)
    assert all(abs(found[i] - p) < 0.03 for i, p in support.items())


def test_draw_by_hand():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).expand(7, 6)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.99, 1 - 2 ** -24])
    assert draw(probs, u).tolist() == [1, 1, 3, 3, 4, 4, 4]
    many = torch.full((1, 50_000), 1 / 50_000)      # whose sum is not exactly 1
    assert draw(many, u[-1:]).item() > 49_990 and draw(many, u[:1]).item() == 0


def test_a_model_that_has_diverged_does_not_write():
    model = tiny()
    with torch.no_grad():
        model.ln_f.weight[0] = math.nan
    with pytest.raises(ValueError, match='logits are not finite'):
        ids(model)


def test_uniform_numbers():
    """Even over seeds and over positions, without a trace of the number before."""
    u = torch.tensor([[uniform(f'{seed} {row}', position) for position in range(100)]
                      for seed in range(5) for row in range(20)], dtype=torch.float64)
    assert 0 <= u.min() and u.max() < 1 and torch.equal(u, u.float().double())
    assert u.unique().numel() > 9_980
    for numbers in (u.flatten(), u.T.flatten()):
        counts = (numbers * 20).long().bincount(minlength=20)
        assert ((counts - 500) ** 2 / 500).sum() < 43.8     # chi-squared, 19 degrees: p = 0.001
        assert abs(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]) < 0.033
    assert uniform('0 0', 3) == 8_861_401 / 2 ** 24        # on every machine


@pytest.mark.parametrize('settings', [LLAMA, {'arch': 'lstm'}], ids=['llama', 'lstm'])
def test_a_row_draws_alone_as_it_does_beside_others(settings):
    model, seeds = tiny(**settings), [3, 1, 7]
    options = dict(n=60, temperature=1.5, top_k=20)     # past the window of 24, too
    want = list(zip(*ids(model, seed=seeds, **options)))
    assert len(set(want)) == 3
    for b, prompt in enumerate(PROMPTS):        # alone, as the first of a call
        n = min(60, 25 - max(map(len, PROMPTS)))        # other rows do not crop it yet
        assert [step[0] for step in ids(model, [prompt], seed=[seeds[b]], **options)][:n] \
            == list(want[b][:n])
    again = ids(model, PROMPTS[::-1] + [[5]], seed=[*seeds[::-1], 8], **options)
    assert list(zip(*again))[:3] == want[::-1]
    # a seed for all: each row has numbers of its own, the first the same in every call
    same = list(zip(*ids(model, [PROMPTS[0]] * 3, seed=4, **options)))
    assert len(set(same)) == 3
    assert [step[0] for step in ids(model, [PROMPTS[0]], seed=4, **options)] == list(same[0])


def test_the_plain_generate():
    """model.generate finds what the fast one finds, and draws with the same probabilities."""
    model = tiny(**LLAMA)
    for prompt in PROMPTS:
        n = 24 - len(prompt)
        want = prompt + [step[0] for step in ids(model, [prompt], n, temperature=0)]
        idx = torch.tensor([prompt])
        for options in (dict(temperature=0), dict(top_k=1)):
            assert plain_generate(model, idx, n, **options).tolist() == [want]
    assert plain_generate(model, idx, 40, temperature=0).shape == (1, len(PROMPTS[-1]) + 40)
    B = 1000
    for options in (dict(temperature=0.7), dict(temperature=1.3, top_k=5)):
        torch.manual_seed(0)
        plain = plain_generate(model, idx.expand(B, -1), 1, **options)[:, -1]
        fast = torch.tensor(ids(model, [PROMPTS[-1]] * B, 1, **options)[0])
        counts = torch.stack([x.bincount(minlength=31) for x in (plain, fast)]).double() / B
        assert (counts[0] - counts[1]).abs().max() < 0.08
        assert ((counts > 0).sum(dim=1) == 5).all() or 'top_k' not in options


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.5, -4.0], [2.0, -1.0, 0.5, -4.0]])
    got = penalize_repetition(logits, [[0, 1, 1], [3]], 2.0)
    assert got.tolist() == [[1.0, -2.0, 0.5, -4.0], [2.0, -1.0, 0.5, -8.0]]
    model, row = tiny(), [3]
    for _ in range(15):
        logits = model(torch.tensor([row]))[0, -1].tolist()
        logits = [x if i not in row else x / 3 if x > 0 else x * 3 for i, x in enumerate(logits)]
        row.append(logits.index(max(logits)))
    got = ids(model, [[3]], n=15, temperature=0, repetition_penalty=3.0)
    assert [3] + [i for [i] in got] == row
    assert got != ids(model, [[3]], n=15, temperature=0)


@pytest.mark.parametrize('tied', [True, False])
@torch.no_grad()
def test_lstm_cache(tied):
    model, idx = tiny(arch='lstm', tied=tied), tokens(3, 12)
    want = model(idx)
    cache = new_cache(model, 3)
    got = [model(part, cache=cache) for part in idx.split([5, 1, 1, 5], dim=1)]
    close(torch.cat(got, dim=1), want)
    cache, lengths = new_cache(model, 3), [3, 7, 5]
    doc = torch.where(torch.arange(7) < torch.tensor(lengths)[:, None], 0, -1)
    got = model(idx[:, :7], doc=doc, cache=cache, n_logits=1)
    close(got[:, 0], torch.stack([want[b, n - 1] for b, n in enumerate(lengths)]))
    for step in range(4):
        new = torch.stack([idx[b, n + step] for b, n in enumerate(lengths)])
        got = model(new[:, None], cache=cache, n_logits=1)
        close(got[:, 0], torch.stack([want[b, n + step] for b, n in enumerate(lengths)]))


def test_lstm_generates_and_refuses_packed_documents():
    model, idx = tiny(arch='lstm'), tokens(2, 6)
    greedy = ids(model, n=30, temperature=0)
    for b, prompt in enumerate(PROMPTS):
        assert ids(model, [prompt], n=30, temperature=0) == [[row[b]] for row in greedy]
        assert [[row[b]] for row in greedy[:8]] == reference_greedy(model, [prompt], 8)
    with pytest.raises(ValueError, match='LSTM cannot keep apart documents'):
        model(idx, doc=torch.tensor([[0] * 6, [0, 0, 0, 1, 1, 1]]))
    doc = torch.tensor([[4] * 6, [7, 7, 7, 7, -1, -1]])
    losses = model(idx, torch.where(doc < 0, -100, idx), doc=doc, reduction='none')
    close(losses[1, :4], model(idx[1:, :4], idx[1:, :4], reduction='none')[0], atol=1e-6)
