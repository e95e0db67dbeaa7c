"""core/net/kernels.py: each kernel against the plain line of PyTorch that it equals."""
import math
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_model import LLAMA, close, gradients, tiny, tokens
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as M
from core.device import compile_options
from core.net import kernels
from core.net.kernels import attend_in_blocks

PLAIN = {   # what the table at the top of kernels.py says
    'Linear': nn.Linear,
    'cast_once': lambda x: x,
    'attend': lambda q, k, v, mask, dropout: F.scaled_dot_product_attention(
        q, k, v, mask, dropout, enable_gqa=True, is_causal=mask is None and q.size(2) > 1),
    'flex_mask': lambda T, doc, window, *rest: None,
    'gelu': lambda x: F.gelu(x, approximate='tanh'),
    'recomputed': lambda f, x, y: f(x, y),
    'lm_loss': lambda head, x, targets, how: F.cross_entropy(
        head(x).flatten(0, 1), targets.flatten(), reduction=how),
    'tail': lambda x, n, n_real: x[:, -n:]}


@pytest.mark.parametrize('compiling', [False, True], ids=['eager', 'as compiled'])
@pytest.mark.parametrize('name', PLAIN)
@pytest.mark.parametrize('settings', [
    {}, dict(LLAMA, n_kv_head=2), dict(position='rope', window=5)], ids=['gpt2', 'llama', 'window'])
def test_the_model_with_the_plain_line(monkeypatch, settings, name, compiling):
    """Loss, gradients and the last logits stay; and the model does call what is replaced."""
    torch.compile(lambda: 1, backend='eager')()     # so that Dynamo knows the real is_compiling
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: compiling)
    monkeypatch.setattr(kernels, 'CHUNK_ELEMENTS', 31 * 10)     # chunks of 10 of the 40 tokens
    monkeypatch.setattr(kernels, 'LARGE', 1)
    monkeypatch.setattr(kernels, 'compiled', lambda f: f)
    idx, targets, results, calls = tokens(2, 20), tokens(2, 20, seed=1), [], []
    targets[0, 3] = -100
    uses = {*PLAIN} - {'Linear'} - ({'gelu'} if settings.get('mlp') == 'swiglu' else set())
    for line in (getattr(kernels, name), PLAIN[name]):
        def called(*args, line=line):
            calls.append(name)
            return line(*args)
        monkeypatch.setattr(M, name, line if name == 'Linear' else called)
        model = tiny(**settings)
        n_called = len(calls)
        with torch.autocast('cpu', torch.bfloat16, enabled=name == 'cast_once'):
            loss, last = model(idx, targets), model(idx, n_logits=3)
        loss.backward()
        grads = gradients(model) if name != 'cast_once' else {}     # added up in another order
        results.append((loss.detach(), last.detach(), grads))
        assert (len(calls) > n_called) == (name in uses)
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    assert type(model.lm_head) is (nn.Linear if name == 'Linear' else kernels.Linear)


def test_the_table_names_what_the_model_takes():
    taken = {name for name, value in vars(M).items()
             if getattr(value, '__module__', '') == kernels.__name__}
    table = kernels.__doc__.split('\n\n')[1]
    assert taken == {*PLAIN} and all(f'    {name}(' in table for name in PLAIN)

# ---------------------------------------------------------------------------------------------
# Products


class Operations(TorchDispatchMode):
    """Remembers the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('fewest_rows', [1, 2])
def test_which_library_multiplies(monkeypatch, fewest_rows):
    """oneDNN from so many rows on, where no gradient is wanted; but not in a graph."""
    monkeypatch.setattr(kernels.Linear, 'fewest_rows', fewest_rows)
    linear = kernels.Linear(1024, 512)
    for rows, grad in ((1, False), (2, False), (2, True)):
        x = torch.randn(rows, 1024)
        with torch.set_grad_enabled(grad), Operations() as seen:
            y = linear(x)
        close(y, F.linear(x, linear.weight, linear.bias))
        wanted = linear.onednn and rows >= fewest_rows and not grad
        assert any('mkldnn' in name for name in seen.names) == wanted
    with torch.no_grad():
        close(torch.compile(linear)(x), linear(x))


@pytest.mark.parametrize('shape,frozen,bias,by_core', [
    ((2, 6, 4), '', True, True),
    ((12, 4), '', False, True),
    ((2, 6, 4), 'x', True, True),
    ((2, 6, 4), 'weight', True, True),
    ((3, 5, 4), '', True, False),       # an odd number of rows for two cores
    ((1, 6, 4), '', True, False),       # 3 rows for each core: fewer than 4 channels
])
def test_products_by_core(shape, frozen, bias, by_core):
    """Compiled training gives each core its rows: the same output and gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    linear, results = kernels.Linear(4, 8, bias=bias), []
    linear.weight.requires_grad_(frozen != 'weight')
    try:
        for f in (linear, torch.compile(linear, backend='aot_eager', fullgraph=True)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            x.requires_grad_(frozen != 'x')
            linear.zero_grad()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                y = f(x)
                y.square().sum().backward()
            assert not any(p.grad is not None and p.grad.stride() != p.stride()
                           for p in linear.parameters())
            results.append([y, x.grad, *(p.grad for p in linear.parameters())])
    finally:
        torch.set_num_threads(threads)
        torch.compiler.reset()
    assert ('aten::bmm' in {event.key for event in seen.key_averages()}) == by_core
    for plain, compiled in zip(*results, strict=True):
        assert (plain is None) == (compiled is None)
        if plain is not None:
            close(compiled, plain)


# ---------------------------------------------------------------------------------------------
# Attention and activation


def test_attention_by_hand():
    """q = k = (1, 0), (0, 1): scores are 0 or 1 / sqrt(2), so the weights are known."""
    x = torch.eye(2)[None, None]
    e = math.exp(1 / math.sqrt(2))
    want = torch.tensor([[1, 0], [1 / (1 + e), e / (1 + e)]])[None, None]
    close(kernels.attend(x, x, x, None, 0.0), want, atol=1e-6)


@pytest.mark.filterwarnings('ignore:flex_attention called without')
@pytest.mark.parametrize('n_key', [4, 2, 1])
@pytest.mark.parametrize('window', [0, 3, 150])
@torch.no_grad()
def test_flex_attention_equals_masked_attention(monkeypatch, window, n_key):
    monkeypatch.setattr(kernels, 'GPU', 'cpu')
    monkeypatch.setattr(kernels, 'has_flex', lambda device, head_dim: True)
    monkeypatch.setattr(kernels, 'compiled', lambda f: f)     # tests/net/test_gpu.py compiles it
    T, generator = 200, torch.Generator().manual_seed(0)         # more than one block of 128
    q, k, v = (torch.randn(2, n, T, 16, generator=generator) for n in (4, n_key, n_key))
    doc = torch.arange(T).div(70, rounding_mode='floor').repeat(2, 1)
    doc[1] = torch.where(torch.arange(T) < 150, 4, -1)
    for documents in (doc, None):
        flex = kernels.flex_mask(T, documents, window, torch.device('cpu'), 16)
        assert (flex is None) == (documents is None and window == 0)
        want = kernels.attend(q, k, v, M.causal_mask(T, documents, window, 'cpu'), 0.0)
        close(kernels.attend(q, k, v, flex, 0.0), want)


@pytest.mark.parametrize('T', [64, 128, 200, 256])
def test_attention_in_blocks(T):
    """The same as torch's, forward and backward, in fp64; also where the last block is shorter."""
    generator = torch.Generator().manual_seed(T)
    ours, theirs = ([torch.randn(2, 3, T, 8, generator=generator.manual_seed(i),
                                 dtype=torch.float64).requires_grad_() for i in range(3)]
                    for _ in range(2))
    y, expected = attend_in_blocks(*ours), F.scaled_dot_product_attention(*theirs, is_causal=True)
    assert torch.allclose(y, expected, atol=1e-6)       # scores are in fp32
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


@pytest.mark.parametrize('f', [attend_in_blocks, torch.compile(
    attend_in_blocks, options=compile_options('cpu'))], ids=['eager', 'compiled'])
def test_dropout_of_attention_in_blocks(f):
    """Equal scores and the values' own numbers show the weights: 1 / (keys that are seen), each
    left out in 30% of cases and otherwise larger. The gradient goes through the same ones."""
    T, rate = 200, 0.3
    q, v = torch.zeros(2, 3, T, 4), torch.eye(T).expand(2, 3, T, T).clone().requires_grad_()
    y = f(q, q, v, rate)
    full = torch.ones(T, T).tril() / torch.arange(1.0, T + 1)[:, None] / (1 - rate)
    kept = y != 0
    close(y, full * kept)
    seen = torch.ones(T, T).tril().bool().expand_as(y)
    assert abs(kept[seen].float().mean() - (1 - rate)) < 0.01
    g = torch.randn_like(y)
    y.backward(g)
    close(v.grad, y.detach().mT @ g)


def test_gelu_as_compiled(monkeypatch):
    """With a sigmoid it is what torch has with a tanh, forward and backward; also far out."""
    x, y = (torch.linspace(-40, 40, 4001, dtype=torch.float64).requires_grad_() for _ in range(2))
    expected = kernels.gelu(x)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    found = kernels.gelu(y)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for value in (expected, found):
        value.sum().backward()
    torch.testing.assert_close(y.grad, x.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('large', [False, True], ids=['kept', 'recomputed'])
def test_a_large_activation_is_computed_again(monkeypatch, large):
    """What GELU gives is not kept until the backward pass, and no product is computed twice."""
    monkeypatch.setattr(kernels, 'LARGE', 1 if large else 1 << 30)
    kept = []

    def gelu(x):
        y = F.gelu(x)
        kept.append(weakref.ref(y))
        return y
    monkeypatch.setattr(M, 'gelu', gelu)
    loss = tiny()(tokens(2, 20), tokens(2, 20, seed=1))
    assert len(kept) == 2 and all((y() is None) == large for y in kept)
    with Operations() as found:
        loss.backward()
    assert len(kept) == (4 if large else 2)
    assert found.names.count('aten.gelu.default') == (2 if large else 0)
    assert found.names.count('aten.addmm.default') == 0        # products with a bias: forward only


# ---------------------------------------------------------------------------------------------
# Loss


def test_cross_entropy_by_hand():
    """Logits (0, log 3) and (log 2, 0): probabilities 1/4, 3/4 and 2/3, 1/3."""
    head = nn.Linear(2, 2, bias=False)
    nn.init.eye_(head.weight)
    x = torch.tensor([[[0, math.log(3)], [math.log(2), 0], [5.0, 5.0]]])
    targets = torch.tensor([[0, 0, -100]])
    losses = [math.log(4), math.log(1.5), 0.0]
    close(kernels.lm_loss(head, x, targets, 'none'), torch.tensor([losses]), atol=1e-6)
    assert abs(kernels.lm_loss(head, x, targets, 'sum').item() - sum(losses)) < 1e-6
    assert abs(kernels.lm_loss(head, x, targets, 'mean').item() - sum(losses) / 2) < 1e-6


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('chunk', [1, 5, 29])       # of 30 tokens
def test_chunked_loss_equals_whole(monkeypatch, reduction, chunk, bias):
    generator = torch.Generator().manual_seed(0)
    data, targets = torch.randn(3, 10, 8, generator=generator), tokens(3, 10)
    targets[0, 4:], targets[2, 0] = -100, -100
    head = nn.Linear(8, 31, bias=bias)
    nn.init.normal_(head.weight, generator=generator)
    upstream = torch.randn(3, 10, generator=generator) if reduction == 'none' else torch.tensor(1.7)

    def run():
        head.zero_grad()
        x = data.clone().requires_grad_()
        loss = kernels.lm_loss(head, x, targets, reduction)
        loss.backward(upstream)
        with torch.no_grad():
            torch.testing.assert_close(kernels.lm_loss(head, x, targets, reduction), loss.detach())
        return loss.detach(), x.grad, *(p.grad.clone() for p in head.parameters())

    whole = run()
    monkeypatch.setattr(kernels, 'CHUNK_ELEMENTS', 31 * chunk)
    chunked = run()
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)
    want = F.cross_entropy(head(data).flatten(0, 1), targets.flatten(), reduction=reduction)
    close(chunked[0].flatten(), want.detach().flatten(), atol=1e-4)


@pytest.mark.parametrize('tied', [True, False])
def test_chunked_loss_in_the_model(monkeypatch, tied):
    model, results = tiny(tied=tied), []
    for elements in (1 << 24, 31 * 7):
        monkeypatch.setattr(kernels, 'CHUNK_ELEMENTS', elements)
        model.zero_grad()
        loss = model(tokens(2, 20), tokens(2, 20, seed=1))
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_chunked_loss_never_has_all_logits(monkeypatch, reduction):
    N, C, V = 96, 8, 64
    head, targets = nn.Linear(C, V, bias=False), tokens(1, N, V=V)

    def memory():
        """Elements of the largest tensor, and of all that are kept for the backward pass."""
        x, kept = torch.zeros(1, N, C, requires_grad=True), []
        keep = lambda t: kept.append(t) or t
        with Largest() as record:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = kernels.lm_loss(head, x, targets, reduction)
            loss.sum().backward()
        return record.numel, sum(t.numel() for t in kept)

    assert memory() >= (N * V, N * V)
    monkeypatch.setattr(kernels, 'CHUNK_ELEMENTS', 4 * V)
    largest, kept = memory()
    assert largest == N * C and kept < N * V / 2


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_mask_that_is_added(dtype):
    """As ALiBi has it: numbers, in whatever dtype, are added to the scores of every kernel."""
    q, k, v = (torch.randn(2, 2, 5, 8, dtype=dtype) for _ in range(3))
    seen = torch.ones(5, 5).tril() > 0
    masks = seen, torch.zeros(5, 5).masked_fill(~seen, -torch.inf)
    plain, added = (kernels.attend(q, k, v, mask, 0.0) for mask in masks)
    assert plain.dtype == dtype and torch.equal(plain, added)
    added = kernels.attend(q, k, v, masks[1] + torch.arange(5), 0.0)
    scores = (q.float() @ k.float().mT) / 8 ** 0.5 + masks[1] + torch.arange(5)
    torch.testing.assert_close(added.float(), scores.softmax(-1) @ v.float(), atol=2e-2, rtol=2e-2)
