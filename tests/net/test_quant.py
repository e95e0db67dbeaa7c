"""core/net/quant.py: rounding by hand, one set of weights on every path, what is refused."""
import copy
import math

import pytest
import torch
from test_model import LLAMA, close, tiny, tokens
from torch import nn

from core.net import quant
from core.net.engine import generate
from core.net.quant import GROUP, QuantLinear, quantize
from core.settings import Stop

WIDE = dict(n_embd=64, n_head=4, n_hidden=96, vocab_size=70)


def layer(n_out, n_in):
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(n_in, n_out)
    for p in made.parameters():
        p.data.normal_(0.0, 0.1, generator=generator)
    return made


def test_int8_by_hand():
    one = nn.Linear(3, 2, bias=False)
    one.weight.data = torch.tensor([[1.0, -0.5, 0.004], [0.0, 0.0, 0.0]])
    found = QuantLinear(one, 'int8')
    scale = torch.tensor(1 / 127).bfloat16().float()        # 0.00787
    assert found.q.tolist() == [[127, -64, 1], [0, 0, 0]]
    assert torch.equal(found.dequantized(), found.q * torch.tensor([[scale], [0.0]]))


def test_int4_by_hand():
    one = nn.Linear(GROUP, 1, bias=False)
    one.weight.data = torch.linspace(-1, 0.9375, GROUP)[None]      # steps of 1/16
    found = QuantLinear(one, 'int4')
    scale = torch.tensor(1.9375 / 15).bfloat16().float()
    zero = (-1 + 8 * scale).bfloat16().float()
    want = ((one.weight - zero) / scale).round().clamp(-8, 7) * scale + zero
    close(found.dequantized(), want, atol=1e-6)
    assert found.q.numel() == GROUP // 2 and len(want.unique()) == 16
    same = nn.Linear(GROUP, 1, bias=False)
    same.weight.data.fill_(0.3)         # a group without a range
    assert (QuantLinear(same, 'int4').dequantized() - 0.3).abs().max() < 1e-3


@pytest.mark.parametrize('kind, largest', [('int8', 0.5), ('int4', 0.5)])
def test_nothing_is_farther_than_half_a_step(kind, largest):
    """But for what the scales' own rounding to bfloat16 adds, 2^-8 of a value."""
    one = layer(40, 96)
    found = QuantLinear(one, kind)
    step = found.scale.float()
    step = step[:, None] if kind == 'int8' else step.repeat_interleave(GROUP, dim=1)
    off = (found.dequantized() - one.weight).abs()
    assert ((off - 2 ** -8 * one.weight.abs().amax()) / step).max() <= largest
    assert off.max() > 0.3 * step.min()     # and it is not the weights themselves


@pytest.mark.parametrize('kind, wide', [
    ('int8', None), ('int8', torch.bfloat16), ('int8', torch.float32), ('int4', None)])
@pytest.mark.parametrize('n_out, n_in', [(48, 64), (65, 32), (1, 96), (16, 320)])
@torch.no_grad()
def test_every_path_has_the_same_weights(kind, wide, n_out, n_in, monkeypatch):
    """The kernel for few rows, the product for many (of the integers as floats, if they are
    kept), and a device without such kernels."""
    one = layer(n_out, n_in)
    found, x = QuantLinear(one, kind, wide), tokens(1, 9 * n_in, V=1000).view(3, 3, -1) / 500 - 1
    want = x.bfloat16().float() @ found.dequantized().T + found.bias.float()
    if wide:
        assert torch.equal(found.wide.float() * found.scale.float()[:, None], found.dequantized())
    monkeypatch.setattr(quant, 'WIDE_ROWS', dict.fromkeys(quant.WIDE_ROWS, 9))
    few = found(x)
    monkeypatch.setattr(quant, 'FEW_ROWS', dict.fromkeys(quant.KINDS, 0))
    monkeypatch.setattr(quant, 'WIDE_ROWS', dict.fromkeys(quant.WIDE_ROWS, 0))
    many = found(x)
    assert few.shape == many.shape == (3, 3, n_out) and few.dtype == many.dtype == x.dtype
    for got in (few, many):
        assert ((got - want).abs() <= 2 ** -7 * want.abs() + 1e-2).all()
    meta = copy.deepcopy(found).to('meta')
    assert meta(x.to('meta')).shape == (3, 3, n_out)
    rows = torch.tensor([[0, n_out - 1]])
    assert torch.equal(found.dequantized(rows)[0], found.dequantized()[[0, n_out - 1]])


@pytest.mark.parametrize('n_in', [344, 8, 17, 32])
@pytest.mark.parametrize('rows', [1, 3, 20])
def test_what_lies_behind_in_memory_is_not_read(rows, n_in):
    """torch's kernel reads int8 in sixteens, whatever the length of a row."""
    memory = torch.full((rows * n_in + 64,), math.nan, dtype=torch.bfloat16)
    x = memory[:rows * n_in].view(rows, n_in)
    x.copy_(torch.randn(rows, n_in))
    layer = QuantLinear(nn.Linear(n_in, 24, bias=False), 'int8')
    want = x.float() @ layer.dequantized().T
    torch.testing.assert_close(layer(x).float(), want, atol=0.02, rtol=0.02)
    assert layer.q.shape == (24, n_in)


@pytest.mark.parametrize('kind', quant.KINDS)
@pytest.mark.parametrize('settings', [WIDE, LLAMA | WIDE, LLAMA | WIDE | {'tied': True}],
                         ids=['gpt2', 'llama', 'llama tied'])
@torch.no_grad()
def test_a_quantized_model_writes(kind, settings):
    """As the same model with the dequantized weights in fp32, up to bfloat16's rounding; alone and
    among others; the head and a tied embedding included."""
    model, plain = tiny(**settings), tiny(**settings)
    quantize(model, kind)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            plain.get_submodule(name.replace('wte.head', 'lm_head')).weight.copy_(
                module.dequantized())
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    idx = tokens(2, 20, V=70)
    want, got = plain(idx), model(idx).float()
    assert (got - want).std() < 0.03 * want.std()
    assert (want - tiny(**settings)(idx)).abs().max() > 1e-3
    if plain.config.tied:
        assert torch.equal(model.wte(idx), plain.wte(idx))
    rows = [row[:5].tolist() for row in tokens(16, 8, V=70)]
    together = list(zip(*generate(model, rows, 12, temperature=0)))
    for row, ids in zip(rows[:3], together):
        ids = torch.tensor(ids)
        alone = torch.tensor([new for new, in generate(model, [row], 12, temperature=0)])
        n = int((alone == ids).long().cumprod(0).sum())
        if n < 12:      # then two logits were as good as equal
            logits = model(torch.tensor([row + ids[:n].tolist()]), n_logits=1)[0, 0].float()
            best = logits.topk(2).values
            assert best[0] - best[1] < 4 * 2 ** -8 * best[0].abs()


def test_the_loss_of_a_quantized_model():
    model, idx = tiny(**WIDE), tokens(2, 20, V=70)
    quantize(model, 'int8')
    with torch.no_grad():
        logits = model(idx[:, :-1]).float()
        want = nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
        close(model(idx[:, :-1], idx[:, 1:]), want, atol=1e-3)


def test_bytes_of_a_step():
    """Matrices that multiply, scales, norms and biases; not what is looked up."""
    for settings in (WIDE, LLAMA | WIDE):
        model = tiny(**settings)
        matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1)
        looked_up = model.wpe.weight.numel() if model.wpe else model.wte.weight.numel()
        small = sum(p.numel() for p in model.parameters() if p.ndim == 1)
        assert quant.bytes_read(model, 4) == 4 * (matrices - looked_up + small)
        for kind, most in (('int8', 1.1), ('int4', 0.63)):
            again = copy.deepcopy(model)
            quantize(again, kind)
            found = quant.bytes_read(again, 4) - 4 * small
            assert 0.9 * most - 0.1 < found / (matrices - looked_up) < most


def refused(model, kind) -> str:
    with pytest.raises(Stop) as e:
        quantize(model, kind)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    return e.value.message


def test_what_is_refused():
    model = tiny(**WIDE)
    assert 'quantize=int3: must be one of int8, int4, or empty' in refused(model, 'int3')
    assert 'not for an lstm' in refused(tiny(arch='lstm'), 'int8')
    assert 'rounded weights cannot learn' in refused(model.train(), 'int8')
    odd = tiny(**WIDE | {'n_hidden': 100})
    assert 'rows of h.0.mlp.down_proj.weight have 100 weights, which 32' in refused(odd, 'int4')
    quantize(odd, 'int8')
