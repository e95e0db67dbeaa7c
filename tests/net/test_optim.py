"""core/net/optim.py: schedules by hand, Muon and AdamW against their formulas, the groups."""
import copy

import pytest
import torch
from torch import nn

from core.net import optim
from core.net.optim import Muon, apply_gradients, make_optimizers, newton_schulz, schedule
from core.net.weights import build_model
from model import GPTConfig


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize('kind', optim.SCHEDULES)
def test_warmup(kind):
    got = [schedule(step, 20, kind, warmup_steps=4) for step in range(5)]
    assert got == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule(0, 20, kind) == 1.0


@pytest.mark.parametrize('kind, settings, want', [
    ('cosine', dict(warmup_steps=2), {2: 1, 4: 0.5 + 0.125 ** 0.5, 6: 0.5, 10: 0}),
    ('cosine', dict(min_lr_fraction=0.2), {0: 1, 5: 0.6, 10: 0.2}),
    ('linear', dict(warmup_steps=2), {2: 1, 4: 0.75, 6: 0.5, 9: 0.125, 10: 0}),
    ('linear', dict(min_lr_fraction=0.2), {0: 1, 5: 0.6, 10: 0.2}),
    ('wsd', dict(decay_fraction=0.4), {0: 1, 5: 1, 6: 1, 7: 0.75, 9: 0.25, 10: 0}),
    ('wsd', dict(min_lr_fraction=0.2), {5: 1, 6: 0.84, 10: 0.2}),
    ('wsd', dict(decay_fraction=0.9, warmup_steps=5), {5: 1, 6: 0.8, 10: 0}),
    ('wsd', dict(decay_fraction=0.0), {0: 1, 9: 1}),
    ('constant', dict(warmup_steps=2, min_lr_fraction=0.2), {2: 1, 6: 1, 10: 1})])
def test_schedule_by_hand(kind, settings, want):
    """Of 10 steps; step 10, which is never made, is where the schedule ends."""
    got = {step: schedule(step, 10, kind, **settings) for step in want}
    assert got == pytest.approx(want)


@pytest.mark.parametrize('kind', optim.SCHEDULES)
def test_schedule_is_pure_and_falls_to_its_end(kind):
    def value(step):
        return schedule(step, 50, kind, 5, min_lr_fraction=0.1)

    forward = [value(step) for step in range(50)]
    assert forward == [value(step) for step in reversed(range(50))][::-1]
    assert all(a >= b for a, b in zip(forward[5:], forward[6:]))
    assert all(0 < x <= 1 for x in forward)
    if kind != 'constant':
        assert value(50) == value(60) == pytest.approx(0.1)
        assert 0.1 < forward[-1] < 0.15


# ---------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize('shape', [(3, 32, 12), (3, 12, 32), (2, 16, 16)])
def test_newton_schulz(shape):
    """It keeps the singular vectors and moves the singular values, here 0.1 to 1, towards 1."""
    u, _, v = torch.linalg.svd(random(*shape), full_matrices=False)
    values = torch.linspace(0.1, 1, u.size(2))
    x = newton_schulz(u * values @ v)
    assert x.shape == shape
    pushed = u.mT @ x @ v.mT
    diagonal = pushed.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    close(pushed, torch.diag_embed(diagonal))
    close(newton_schulz(1000 * u * values @ v), x)
    g = random(*shape, seed=1)
    s = torch.linalg.svdvals(newton_schulz(g))
    assert s.max() < 1.3 and (s.min() > 0.6 or shape[1] == shape[2])
    close(newton_schulz(g), torch.cat([newton_schulz(one[None]) for one in g]))
    assert not newton_schulz(torch.zeros(shape)).any()


def orthogonalized(g, steps=5):
    """Newton-Schulz of one matrix, written down plainly."""
    x = g / g.norm()
    for _ in range(steps):
        if g.size(0) > g.size(1):
            A = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * A + 2.0315 * A @ A)
        else:
            A = x @ x.T
            x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
@pytest.mark.parametrize('momentum', [0.95, 0.5])
def test_muon_equals_the_plain_algorithm(momentum, weight_decay):
    shapes = [(8, 6), (12, 3), (8, 6), (4, 16), (5, 5)]
    params = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    frozen = nn.Parameter(random(8, 6))             # gets no gradient
    muon = Muon([*params, frozen], lr=0.1, momentum=momentum, weight_decay=weight_decay)
    want = [p.detach().clone() for p in params]
    velocity = [torch.zeros(shape) for shape in shapes]
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = random(*shapes[i], seed=100 * step + i)
            velocity[i] = momentum * velocity[i] + (1 - momentum) * p.grad
            nesterov = momentum * velocity[i] + (1 - momentum) * p.grad
            update = orthogonalized(nesterov)
            update = update / update.square().sum(dim=1, keepdim=True).sqrt()
            want[i] = want[i] * (1 - 0.1 * weight_decay) - 0.1 * update
        grads = [p.grad.clone() for p in params]
        muon.step()
        close([p.data for p in params], want)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads))
    assert torch.equal(frozen, random(8, 6))


@pytest.mark.parametrize('ns_steps', [1, 3])
def test_muon_uses_ns_steps_and_leaves_rows_without_gradient(ns_steps):
    """Each row of the step is as long as the rate, whatever its gradient; or 0, if that is 0."""
    p = nn.Parameter(torch.zeros(8, 3))
    p.grad = random(8, 3) * torch.tensor([0.0, 1, 100, 1e-3, 1, 0, 1, 1])[:, None]
    Muon([p], lr=0.5, momentum=0.0, ns_steps=ns_steps).step()
    x = orthogonalized(p.grad, ns_steps)
    lengths = x.norm(dim=1, keepdim=True)
    close(p.data, -0.5 * x / lengths.clamp(min=1e-9))
    assert p.data.norm(dim=1).tolist() == pytest.approx([0, .5, .5, .5, .5, 0, .5, .5])


def test_muon_resumes_from_its_state_dict():
    def step(p, muon, seed):
        p.grad = random(6, 4, seed=seed)
        muon.step()
        return p.data

    p = nn.Parameter(random(6, 4))
    muon = Muon([p])
    step(p, muon, 1)
    q, r = copy.deepcopy(p), copy.deepcopy(p)
    resumed = Muon([q])
    resumed.load_state_dict(copy.deepcopy(muon.state_dict()))
    want = step(p, muon, 2)
    assert torch.equal(step(q, resumed, 2), want)
    assert not torch.allclose(step(r, Muon([r]), 2), want, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# The groups


def small(**settings):
    return build_model(GPTConfig(**dict(block_size=8, vocab_size=11, n_layer=2, n_head=2,
                                        n_embd=8) | settings))


@pytest.mark.parametrize('embed_learning_rate', [0.0, 0.3])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('settings', [
    {}, dict(tied=False, norm='rmsnorm', position='rope', mlp='swiglu', qk_norm=True, bias=False),
    dict(arch='lstm'), dict(arch='lstm', tied=False)], ids=str)
def test_groups(settings, optimizer, embed_learning_rate):
    model = small(**settings)
    optimizers = make_optimizers(model, optimizer, 0.01, 0.1, muon_learning_rate=0.02,
                                 muon_weight_decay=0.05, embed_learning_rate=embed_learning_rate)
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, Muon][:1 + (optimizer == 'muon')]
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for o in optimizers:
        for group in o.param_groups:
            assert group['base_lr'] == group['lr']
            for p in group['params']:
                assert names[id(p)] not in found
                found[names[id(p)]] = (type(o), group['lr'], group['weight_decay'])
    want = {}
    for name, p in model.named_parameters():
        want[name] = (torch.optim.AdamW, 0.01, 0.1 if p.ndim > 1 else 0.0)
        if p.ndim > 1 and name.startswith(('h.', 'lstm.')) and optimizer == 'muon':
            want[name] = (Muon, 0.02, 0.05)
        if name in ('wte.weight', 'wpe.weight') and embed_learning_rate:
            want[name] = (torch.optim.AdamW, 0.3, 0.1)
    assert found == want


def test_settings_reach_the_optimizers():
    adamw, muon = make_optimizers(small(), 'muon', 0.01, 0.1, 0.8, 0.9, 0.02, 0.05, 0.7, 3)
    assert adamw.param_groups[0]['betas'] == (0.8, 0.9)
    assert (muon.param_groups[0]['momentum'], muon.param_groups[0]['ns_steps']) == (0.7, 3)


def test_learning_rates():
    optimizers = make_optimizers(small(), 'muon', 0.01, 0.1, embed_learning_rate=0.3)
    for factor in (0.5, 0.25, 1.0, 0.0, 0.5):       # always of the peak, never of the last
        apply_gradients(optimizers, factor, skip=True)
        rates = [group['lr'] for o in optimizers for group in o.param_groups]
        assert rates == pytest.approx([factor * x for x in (0.01, 0.3, 0.02)])


def test_adamw_is_the_papers():
    """Loshchilov & Hutter 2019, algorithm 2: decoupled decay, moments corrected for their start."""
    model = small(tied=False)
    lr, decay, beta1, beta2, eps = 0.01, 0.1, 0.8, 0.95, 1e-8
    [adamw] = make_optimizers(model, 'adamw', lr, decay, beta1, beta2)
    named = dict(model.named_parameters())
    want = {name: p.detach().clone() for name, p in named.items()}
    m = {name: torch.zeros_like(p) for name, p in named.items()}
    v = {name: torch.zeros_like(p) for name, p in named.items()}
    for t in (1, 2, 3):
        for i, (name, p) in enumerate(named.items()):
            p.grad = g = random(*p.shape, seed=1000 * t + i)
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g ** 2
            step = (m[name] / (1 - beta1 ** t)) / ((v[name] / (1 - beta2 ** t)).sqrt() + eps)
            want[name] = want[name] * (1 - lr * (decay if p.ndim > 1 else 0)) - lr * step
        adamw.step()
    close({name: p.data for name, p in named.items()}, want, atol=1e-6)


@pytest.mark.parametrize('clip, factor', [(0.0, 1.0), (2.5, 0.5), (5.0, 1.0), (100.0, 1.0)])
def test_clipping_by_hand(clip, factor):
    """A gradient of norm 5 and one that was scaled by 8; a short one is not made longer."""
    for scale in (1.0, 8.0):
        grads = [torch.tensor([3.0]) * scale, torch.tensor([4.0]) * scale]
        optim.clip_gradients(grads, clip, 5.0, scale)
        assert [g.item() for g in grads] == pytest.approx([3 * factor, 4 * factor], rel=1e-5)
