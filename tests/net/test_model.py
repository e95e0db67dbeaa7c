"""model.py: each formula by hand, each shortcut (cache, chunks, packing) against the long way.

Initialization leaves many matrices at 0, which would make comparisons empty: `tiny` draws all
parameters at random.
"""
import copy
import math

import pytest
import torch
import torch.nn as nn

import model as M
from core.net.cache import new_cache
from core.net.weights import build_model
from model import GPTConfig

LLAMA = dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=False, tied=False)
VARIANTS = {
    'gpt2': {},
    'llama': dict(LLAMA, n_kv_head=2),
    'qwen3': dict(LLAMA, n_kv_head=1, qk_norm=True, head_dim=6),
    'rope-window': dict(LLAMA, window=5),
    'learned-window': dict(window=4, n_kv_head=2),
    'sinusoidal': dict(position='sinusoidal', norm='rmsnorm', mlp='relu2'),
    'llama3-rope': dict(LLAMA, rope_scaling='4,1,4,16'),
    'none': dict(position='none', mlp='relu2', n_kv_head=1, head_dim=3, tied=False),
    'qk-window-bias': dict(position='rope', mlp='swiglu', qk_norm=True, window=3, head_dim=8),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 3, 1], [20, 21, 22, 2], [13]]


def tiny(**settings):
    """A small model in evaluation mode, every parameter random."""
    settings = dict(block_size=24, vocab_size=31, n_layer=2, n_head=4, n_embd=16) | settings
    model = build_model(GPTConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if 'norm' in name or 'ln_' in name else 0.0, 0.3, generator=generator)
    return model.eval()


def tokens(B, T, seed=0, V=31):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


variants = pytest.mark.parametrize('settings', VARIANTS.values(), ids=VARIANTS)


# ---------------------------------------------------------------------------------------------
# Documents and masks


@variants
def test_packed_documents_have_the_losses_they_have_alone(settings):
    model = tiny(**settings)
    idx, targets = tokens(2, 20), tokens(2, 20, seed=1)
    doc = torch.tensor([[3] * 8 + [9] * 9 + [-1] * 3, [0] * 6 + [1] * 1 + [2] * 13])
    targets[doc < 0] = -100
    got = model(idx, targets, doc=doc, reduction='none')
    for b, begin, end in ((0, 0, 8), (0, 8, 17), (1, 0, 6), (1, 6, 7), (1, 7, 20)):
        part = slice(begin, end)
        alone = model(idx[b:b + 1, part], targets[b:b + 1, part], reduction='none')
        torch.testing.assert_close(got[b, part], alone[0], atol=1e-6, rtol=1e-6)
    assert got[0, 17:].tolist() == [0, 0, 0]
    alone = model(idx[:1], targets[:1], reduction='none')
    assert (alone[0, 8:17] - got[0, 8:17]).abs().max() > 1e-3     # `doc` did matter


@variants
def test_padding_gives_no_nan_and_takes_no_part(settings):
    model, idx, targets = tiny(**settings), tokens(3, 12), tokens(3, 12, seed=1)
    doc = torch.zeros(3, 12, dtype=torch.long)
    doc[0, 7:], doc[2] = -1, -1
    targets[doc < 0] = -100
    results = []
    for padding in (0, 17):
        model.zero_grad()
        loss = model(torch.where(doc < 0, padding, idx), targets, doc=doc, reduction='sum')
        loss.backward()
        results.append((loss, gradients(model)))
    torch.testing.assert_close(results[0], results[1])
    assert all(g.isfinite().all() for g in results[0][1].values())


def test_causal_mask_by_hand():
    assert M.causal_mask(4, None, 0, 'cpu') is None and M.causal_mask(4, None, 4, 'cpu') is None
    assert M.causal_mask(4, None, 2, 'cpu').int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    doc = torch.tensor([[0, 0, 0, 1, 1], [5, 5, 6, 6, -1]])
    mask = M.causal_mask(5, doc, 2, 'cpu')
    assert mask.shape == (2, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert M.causal_mask(5, doc, 0, 'cpu')[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def test_window_reaches_exactly_that_far_back():
    model, idx = tiny(n_layer=1, window=4, position='none'), tokens(1, 10)
    want = model(idx)
    changed = idx.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 31
    moved = (model(changed) - want).abs().amax(dim=2)[0] > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [2, 3, 4, 5]


def test_document_positions():
    doc = torch.tensor([[7, 7, 8, 8, 8], [3, 3, 3, 3, -1], [1, 2, 3, 3, 1]])
    assert M.document_positions(doc).tolist() == [
        [0, 1, 0, 1, 2], [0, 1, 2, 3, 0], [0, 0, 0, 1, 0]]


def test_rope_by_hand():
    x = torch.tensor([[1.0, 2.0]])[None, None]
    got = M.rotate(x, *M.rope_tables(torch.tensor([1]), 2, 10000.0))
    c, s = math.cos(1), math.sin(1)
    close(got[0, 0, 0], torch.tensor([c - 2 * s, 2 * c + s]), atol=1e-6)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])[None, None]          # channel 0 pairs with 2, 1 with 3
    got = M.rotate(x, *M.rope_tables(torch.tensor([1]), 4, 10000.0))
    C, S = math.cos(0.01), math.sin(0.01)
    close(got[0, 0, 0], torch.tensor([c - 3 * s, 2 * C - 4 * S, 3 * c + s, 4 * C + 2 * S]),
          atol=1e-6)


def test_rope_depends_only_on_the_distance():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        at = [M.rope_tables(torch.tensor([n]), 8, 100.0) for n in (i, j)]
        return float((M.rotate(q, *at[0]) * M.rotate(k, *at[1])).sum())

    assert abs(score(5, 3) - score(12, 10)) < 1e-5 < abs(score(5, 3) - score(5, 4))
    tables = M.rope_tables(torch.tensor([[0, 5], [3, 4]]), 8, 100.0)
    assert tables[0].shape == (2, 1, 2, 4)
    close(tables[1][1, 0, 0], M.rope_tables(torch.tensor([3]), 8, 100.0)[1][0])


def test_sinusoid_is_the_papers():
    got = M.sinusoid(torch.arange(50), 6)
    for position in (0, 1, 49):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert abs(got[position, 2 * i] - math.sin(angle)) < 1e-5
            assert abs(got[position, 2 * i + 1] - math.cos(angle)) < 1e-5
    model, idx, at = tiny(position='sinusoidal'), tokens(1, 5), torch.arange(5)
    close(model.embed(idx, at), 4 * model.wte(idx) + M.sinusoid(at, 16))     # 4 = sqrt(16)


# ---------------------------------------------------------------------------------------------
# The loss


# ---------------------------------------------------------------------------------------------
# Weights, configuration, counts


@torch.no_grad()
def test_grouped_queries_are_repeated_keys_and_values():
    grouped = tiny(**LLAMA, n_kv_head=2)
    full = tiny(**LLAMA)
    weights = grouped.state_dict()
    for name in weights:
        if 'k_proj' in name or 'v_proj' in name:
            heads = weights[name].view(2, 4, 16)
            weights[name] = heads.repeat_interleave(2, dim=0).reshape(16, 16)
    full.load_state_dict(weights)
    close(full(tokens(2, 20)), grouped(tokens(2, 20)))


@torch.no_grad()
def test_mlp_and_norms_by_hand():
    x, up, gate, down = 1.5, -2.0, 0.7, 3.0
    h = up * x
    inner = math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)
    want = {'gelu': 0.5 * h * (1 + math.tanh(inner)), 'relu2': 0.0,
            'swiglu': gate * x / (1 + math.exp(-gate * x)) * h}
    for kind, value in want.items():
        mlp = M.MLP(GPTConfig(n_embd=1, n_head=1, mlp=kind, n_hidden=1, bias=False))
        for name, p in mlp.named_parameters():
            p.fill_(dict(up_proj=up, gate_proj=gate, down_proj=down)[name.split('.')[0]])
        assert abs(mlp(torch.tensor([x])).item() - down * value) < 1e-6
        if kind == 'relu2':
            assert abs(mlp(torch.tensor([-x])).item() - down * h * h) < 1e-5
    x = torch.tensor([3.0, -1.0])           # mean 1, deviations 2; mean square 5
    config = GPTConfig(norm_eps=0.5)
    close(M.norm_layer(config, 2)(x), torch.tensor([2.0, -2.0]) / 4.5 ** 0.5, atol=1e-6)
    config.norm = 'rmsnorm'
    close(M.norm_layer(config, 2)(x), x / 5.5 ** 0.5, atol=1e-6)


def test_tied_weights_are_one_tensor():
    for arch in ('gpt', 'lstm'):
        model = build_model(GPTConfig(arch=arch, n_layer=1, n_head=1, n_embd=8, vocab_size=11))
        assert model.lm_head.weight is model.wte.weight
        assert sum(p.shape == (11, 8) for p in model.parameters()) == 1
        untied = build_model(GPTConfig(arch=arch, n_layer=1, n_head=1, n_embd=8, tied=False))
        assert untied.lm_head.weight.data_ptr() != untied.wte.weight.data_ptr()


def test_init_depends_on_seed_and_name_only():
    settings = dict(block_size=8, vocab_size=31, n_head=2, n_embd=8)
    a, b, other, deep, untied = (dict(build_model(GPTConfig(**settings, **more), seed).state_dict())
                                 for more, seed in (({'n_layer': 2}, 3), ({'n_layer': 2}, 3),
                                                    ({'n_layer': 2}, 4), ({'n_layer': 4}, 3),
                                                    ({'n_layer': 2, 'tied': False}, 3)))
    for name in a:
        assert torch.equal(a[name], b[name]) and torch.equal(a[name], deep[name]), name
        assert torch.equal(a[name], untied[name]) or name in ('wte.weight', 'lm_head.weight')
        random = name.endswith(('wte.weight', 'wpe.weight', 'q_proj.weight', 'k_proj.weight',
                                'v_proj.weight', 'up_proj.weight', 'lm_head.weight'))
        assert torch.equal(a[name], other[name]) != random, name
    drawn = [p for name, p in deep.items() if name.endswith(('q_proj.weight', 'k_proj.weight'))]
    assert len({float(p[0, 0]) for p in drawn}) == 8


def test_init_is_as_stated():
    model = build_model(GPTConfig(block_size=64, vocab_size=500, n_layer=2, n_head=2, n_embd=48))
    for name, p in model.named_parameters():
        if name.endswith('.bias') or name.endswith(('o_proj.weight', 'down_proj.weight')):
            assert not p.any(), name
        elif 'ln_' in name:
            assert p.min() == p.max() == 1, name
        else:
            std = 0.02 if name.startswith('w') else 1 / math.sqrt(3 * 48)
            assert abs(p.std() / std - 1) < 0.06 and abs(p.mean()) < 0.1 * std, name
    idx = tokens(2, 20)
    x = model.embed(idx, torch.arange(20))
    assert torch.equal(model.h['1'](model.h['0'](x)), x)        # blocks begin as the identity
    untied = build_model(GPTConfig(block_size=64, vocab_size=500, n_head=2, n_embd=48, tied=False))
    assert abs(untied.wte.weight.std() - 1) < 0.02
    assert abs(untied(idx, tokens(2, 20, seed=1)).item() - math.log(500)) < 1e-6
    lstm = build_model(GPTConfig(arch='lstm', n_layer=1, n_head=1, n_embd=8, vocab_size=9))
    assert lstm.lstm.bias_ih_l0.tolist() == [0] * 8 + [1] * 8 + [0] * 16
    assert not lstm.lstm.bias_hh_l0.any() and lstm.lstm.weight_ih_l0.std() > 0.1


def test_config_derives_what_is_zero():
    config = GPTConfig()
    assert (config.head_dim, config.n_kv_head, config.n_hidden) == (64, 12, 3072)
    config = GPTConfig(mlp='swiglu', n_embd=100, n_head=4, n_kv_head=2)
    assert (config.head_dim, config.n_kv_head, config.n_hidden) == (25, 2, 264)
    config = GPTConfig(n_embd=10, n_head=4, head_dim=6, n_hidden=7)     # no division needed
    assert (config.head_dim, config.n_kv_head, config.n_hidden) == (6, 4, 7)


@pytest.mark.parametrize('settings', [
    dict(arch='rnn'), dict(norm='batch'), dict(position='alibi'), dict(mlp='glu'),
    dict(block_size=0), dict(vocab_size=0), dict(n_layer=0), dict(n_head=-1), dict(n_embd=0),
    dict(n_embd=10, n_head=4), dict(n_kv_head=5), dict(n_kv_head=24), dict(n_kv_head=-2),
    dict(head_dim=7, position='rope'), dict(n_embd=9, n_head=3, position='sinusoidal'),
    dict(head_dim=-64), dict(n_hidden=-8), dict(window=-1), dict(dropout=1.5)], ids=str)
def test_config_names_what_cannot_be(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f'^{name}={value}: '):
        GPTConfig(**settings)


def test_too_many_tokens():
    model = tiny()
    with pytest.raises(ValueError, match='25 tokens are more than block_size=24'):
        model(tokens(1, 25))
    cache = new_cache(model, 1)
    model(tokens(1, 20), cache=cache)
    with pytest.raises(ValueError, match='5 more tokens do not fit the cache: 4 of 24'):
        model(tokens(1, 5), cache=cache)
    assert cache.lengths.tolist() == [20] and model(tokens(1, 4), cache=cache).shape == (1, 4, 31)


def test_flops_per_token_by_hand():
    small = dict(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=8)
    blocks = 2 * (4 * 8 * 8 + 2 * 8 * 32)                       # q k v o, up down
    flops = 6 * (blocks + 32 * 8) + 12 * 2 * 2 * 4 * 16
    model = build_model(GPTConfig(**small))
    assert M.flops_per_token(model) == flops == 13_824
    assert M.flops_per_token(model, 8) == flops - 12 * 2 * 2 * 4 * 8
    model = build_model(GPTConfig(**small | LLAMA, n_kv_head=1, window=4, qk_norm=True))
    blocks = 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 24)           # q o, k v, gate up down
    assert M.flops_per_token(model) == 6 * (blocks + 32 * 8) + 12 * 2 * 2 * 4 * 4
    for tied in (True, False):
        model = build_model(GPTConfig(arch='lstm', **small, tied=tied))
        assert M.flops_per_token(model) == 6 * (2 * 2 * 32 * 8 + 32 * 8)


def test_gpt2_has_124_million_parameters():
    with torch.device('meta'):
        assert M.count_parameters(M.GPT(GPTConfig(vocab_size=50257))) == 124_439_808
        assert M.count_parameters(M.GPT(GPTConfig())) == 124_475_904


# ---------------------------------------------------------------------------------------------
# What is cut by parallelism, dropout, recomputing, compiling


@variants
def test_two_pipeline_stages_equal_the_model(settings):
    model = tiny(**settings)
    front, back = copy.deepcopy(model), copy.deepcopy(model)
    front.ln_f = front.lm_head = back.wte = None
    del front.h['1'], back.h['0']
    idx, targets = tokens(2, 20), tokens(2, 20, seed=1)
    doc = torch.tensor([[0] * 12 + [1] * 8, [0] * 15 + [-1] * 5])
    hidden = front(idx, doc=doc)
    assert hidden.shape == (2, 20, 16)
    close(back(hidden, doc=doc), model(idx, doc=doc), atol=1e-6)
    close(back(hidden, targets, doc=doc, reduction='sum'),
          model(idx, targets, doc=doc, reduction='sum'))
    caches, parts = [new_cache(front, 2), new_cache(back, 2)], idx.split([9, 1, 10], dim=1)
    got = [back(front(part, cache=caches[0]), cache=caches[1]) for part in parts]
    close(torch.cat(got, dim=1), model(idx))


@torch.no_grad()
def test_heads_may_be_cut_out_of_the_projections():
    config = GPTConfig(**LLAMA, n_embd=16, n_head=4, n_kv_head=2, qk_norm=True)
    whole = M.Attention(config)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    rope, got = M.rope_tables(torch.arange(6), 4, 10000.0), 0
    for half in range(2):
        part = copy.deepcopy(whole)
        for name in ('q_proj', 'k_proj', 'v_proj'):
            linear = getattr(part, name)
            linear.weight = nn.Parameter(linear.weight.chunk(2)[half])
        part.o_proj.weight = nn.Parameter(whole.o_proj.weight.chunk(2, dim=1)[half])
        got = got + part(x, rope)
    close(got, whole(x, rope))


def test_dropout_only_in_training():
    model, idx = tiny(dropout=0.3), tokens(2, 20)
    close(model(idx), tiny()(idx), atol=0)
    model.train()
    torch.manual_seed(0)
    a, b = model(idx), model(idx)
    torch.manual_seed(0)
    assert torch.equal(model(idx), a) and not torch.allclose(a, b, atol=1e-2)
    attention, x = tiny(dropout=0.5).h['0'].attn, torch.ones(1, 8, 16)
    assert torch.equal(attention(x), attention(x))
    attention.train()           # also drops attention weights
    assert not torch.allclose(attention(x), attention(x), atol=1e-2)


@pytest.mark.parametrize('settings', [dict(dropout=0.2), dict(LLAMA, window=5)])
def test_recomputing_changes_nothing(settings):
    model, results = tiny(**settings).train(), []
    for model.recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(tokens(2, 20), tokens(2, 20, seed=1))
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0], results[1], atol=1e-7, rtol=1e-6)


@variants
@torch.no_grad()
def test_bfloat16_weights_and_autocast(settings):
    model, idx = tiny(**settings), tokens(2, 20)
    doc = torch.tensor([[0] * 12 + [1] * 8, [0] * 15 + [-1] * 5])
    want = model(idx, doc=doc)
    with torch.autocast('cpu', torch.bfloat16):
        close(model(idx, doc=doc).float(), want, atol=0.05 * want.std().item() + 0.1)
    got = copy.deepcopy(model).bfloat16()(idx, doc=doc)
    assert got.dtype == torch.bfloat16
    close(got.float(), want, atol=0.05 * want.std().item() + 0.1)


@torch.no_grad()
def test_compiled_equals_eager():
    model, idx = tiny(**LLAMA, n_kv_head=2, window=5, n_layer=1), tokens(2, 20)
    close(torch.compile(model, fullgraph=True)(idx), model(idx))


def test_rope_scaling_by_hand():
    """Llama 3.1's: a frequency of many turns stays, one of few is divided, between it is mixed."""
    # 4 channels: frequencies 1 and 0.01, which turn 64 and 0.64 times in 402.1 positions
    context = 64 * 2 * math.pi
    position = torch.tensor([1.0])
    plain = [table[0] for table in M.rope_tables(position, 4, 1e4)]
    assert torch.allclose(plain[1], torch.tensor([math.sin(1), math.sin(0.01)]))
    for low, high, first, second in ((1, 4, 1.0, 0.01 / 8), (0.1, 0.2, 1.0, 0.01),
                                     (65, 70, 1 / 8, 0.01 / 8), (44, 84, 0.5 + 0.5 / 8, 0.01 / 8)):
        _, sin = M.rope_tables(position, 4, 1e4, f'8,{low},{high},{context}')
        assert torch.allclose(sin[0], torch.tensor([math.sin(first), math.sin(second)]), atol=1e-6)


@pytest.mark.parametrize('scaling', ['8', '8,1,4', '8,1,4,x', '8,4,4,32', '0.5,1,4,32', '8,1,4,0'])
def test_rope_scaling_that_cannot_be(scaling):
    with pytest.raises(ValueError, match='rope_scaling='):
        GPTConfig(position='rope', rope_scaling=scaling)
    with pytest.raises(ValueError, match='rope_scaling='):
        GPTConfig(rope_scaling='8,1,4,32')
