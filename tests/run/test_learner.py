"""core/run/learner.py: a step by hand, with torch's own functions."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import train
from core.device import Device
from core.net.optim import LossScale
from core.net.weights import build_model
from core.ranks.processes import IGNORE, Ranks
from core.run.learner import Learner
from model import GPTConfig

CONFIG = dict(block_size=8, vocab_size=30, n_layer=2, n_head=2, n_embd=16)


def learner(clip=0.0, scaled=False, compiled=False, **config) -> Learner:
    model = build_model(GPTConfig(**CONFIG | config), 1).train()
    optimizer = torch.optim.AdamW([{'params': [*model.parameters()], 'base_lr': 1e-2}], lr=1e-2)
    return Learner(model, model, [optimizer], LossScale(scaled),
                   Device('cpu', 'cpu', 'float32', compiled, 1.0, []), Ranks(), clip,
                   seed=3 if config.get('dropout') else None)


def batches(n=2, seed=0):
    """Micro-batches with unequal numbers of targets."""
    found = []
    for i in range(n):
        g = torch.Generator().manual_seed(seed + i)
        x, y = (torch.randint(30, (3, 8), generator=g) for _ in 'xy')
        y[0, :3 * i + 1] = IGNORE
        found.append((x, y, None))
    return found


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('clip', [0.0, 0.05, 1e4])
def test_a_step_by_hand(clip, scaled):
    """Loss, norm and weights: those of one batch of all rows, clipped by torch, if it is too long.
    """
    ours = learner(clip, scaled)
    theirs = learner()
    x, y = (torch.cat(parts) for parts in list(zip(*batches()))[:2])
    loss = F.cross_entropy(theirs.model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), clip or math.inf)
    theirs.optimizers[0].step()
    step = train.train_step(ours, batches(), 0, 1.0)
    assert step.means[0] == pytest.approx(loss.item(), rel=1e-5)
    assert step.norm == pytest.approx(norm.item(), rel=1e-4) and not step.skipped
    for a, b in zip(ours.model.parameters(), theirs.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('how', ['nan', 'limit'])
def test_a_bad_step_changes_nothing(how, scaled):
    ours = learner(1.0, scaled)
    train.train_step(ours, batches(), 0, 1.0)
    before = copy.deepcopy((ours.model.state_dict(), ours.optimizers[0].state_dict()['state']))
    if how == 'nan':
        handle = ours.model.ln_f.register_forward_hook(lambda *a: a[2] * math.nan)
    step = train.train_step(ours, batches(), 1, 1.0, limit=1e-9 if how == 'limit' else math.inf)
    if how == 'nan':
        handle.remove()
    assert step.skipped and math.isfinite(step.norm) == (how == 'limit')
    after = ours.model.state_dict(), ours.optimizers[0].state_dict()['state']
    for old, new in zip(before, after):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    assert ours.scaler.scale == (1 if not scaled else 32768 if how == 'nan' else 65536)
    assert not train.train_step(ours, batches(), 2, 1.0).skipped    # no gradient is left over
    assert all(p.isfinite().all() for p in ours.model.parameters())


def test_dropout_differs_between_micro_batches_and_steps_and_comes_again():
    ours, seeds = learner(dropout=0.5), []
    ours.model.register_forward_pre_hook(lambda *a: seeds.append(torch.initial_seed()))
    for step in (0, 1, 0):
        train.train_step(ours, batches(), step, 0.0)
    assert len({*seeds[:4]}) == 4 and seeds[4:] == seeds[:2]


def test_warm_up_leaves_no_trace():
    ours = learner(scaled=True, compiled=True)
    before = copy.deepcopy(ours.model.state_dict())
    assert ours.warm_up(train.train_step, lambda step: batches()) > 0
    torch.testing.assert_close(ours.model.state_dict(), before, rtol=0, atol=0)
    assert not ours.optimizers[0].state and ours.scaler.state_dict() == {
        'scale': 65536.0, 'good_steps': 0}
