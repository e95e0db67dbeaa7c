"""core/run/metrics.py: losses of sequences, intervals and a classifier's scores, each by hand."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.data.dataset import IGNORE, Rows
from core.device import Device
from core.net.weights import build_model
from core.ranks.processes import Ranks
from core.run import metrics
from core.run.metrics import classification, mean_interval, paired_interval
from model import GPTConfig

CPU = Device('cpu', 'cpu', 'float32', False, 1.0, [])
VOCAB, SIZE = 50, 24

# ---------------------------------------------------------------------------------------------
# Intervals


# The 97.5% quantile of Student's t as tables have it (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
T95 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 9: 2.2622, 10: 2.2281,
       29: 2.0452, 30: 2.0423, 99: 1.9842, 100: 1.9840, 1000: 1.9623}


@pytest.mark.parametrize('df', T95)
def test_t_quantile(df):
    assert metrics.t95(df) == pytest.approx(T95[df], abs=6e-5)


def test_t_quantile_is_that_of_scipy():
    stats = pytest.importorskip('scipy.stats')
    for df in [*range(1, 200), 999, 1000, 10_000]:
        assert metrics.t95(df) == pytest.approx(stats.t.ppf(0.975, df), abs=6e-5)
    assert metrics.t95(10 ** 9) == pytest.approx(1.959964, abs=3e-4)


@pytest.mark.parametrize('losses,mean,half', [
    # without one of the two it is 4 / 3 or 2: 1/6 and 1/2 from 1.5; (2 - 1) / 2 (1/36 + 1/4) = 5/36
    ([[2, 1], [4, 3]], 1.5, 12.7062 * math.sqrt(5) / 6),
    # records of one target each: the standard deviation over the root of their number
    ([[1, 1], [2, 1], [6, 1]], 3.0, 4.3027 * math.sqrt(14 / 2) / math.sqrt(3)),
    # targets of 9 and 1: worth (9 + 1)^2 / (81 + 1) = 1.2 equal records, the least is two
    ([[10, 9], [0, 1]], 1.0, 12.7062 * math.sqrt((1 + 1 / 81) / 2)),
    ([[1, 2], [2, 4], [5, 10]], 0.5, 0.0)])
def test_mean_interval(losses, mean, half):
    found, interval = mean_interval(np.array(losses, float))
    assert found == pytest.approx(mean) and interval == pytest.approx(half, rel=1e-4)


def test_one_record_has_no_interval():
    """And it is said: not 0, not "nan"."""
    mean, half = mean_interval(np.array([[3, 2]], float))
    assert mean == 1.5 and math.isnan(half)
    assert metrics.shown(mean, half) == '1.5000 (one record: no interval)'
    assert metrics.shown(1.5, 0.25) == '1.5000 ± 0.2500'
    assert metrics.shown(math.nan, math.nan) == 'nan ± nan'     # a model that has diverged


def test_paired_interval():
    """Of the differences 1, -1 and 3 nats in 1, 2 and 3 targets: 3 / 6, and 2 / 5, 4 / 4, 0 / 3
    without one of them: 0.1, -0.5 and 0.5 away. They are worth 36 / 14 = 2.6 records."""
    ours, others = np.array([[5, 1], [7, 2], [9, 3]], float), np.array([[4, 1], [8, 2], [6, 3]])
    found, half = paired_interval(ours, others)
    assert found == pytest.approx(0.5)
    assert half == pytest.approx(4.302653 * math.sqrt(2 / 3 * (0.01 + 0.25 + 0.25)), rel=1e-4)
    assert paired_interval(others, ours) == pytest.approx((-found, half))
    assert paired_interval(ours, ours) == (0, 0)


def test_pairs_that_differ_by_a_constant():
    """However different the records are."""
    rng = np.random.default_rng(0)
    ours = np.stack([rng.exponential(50, 100), rng.integers(1, 30, 100)], axis=1)
    others = ours - [[0.25, 0]] * ours[:, 1:]
    assert paired_interval(ours, others) == pytest.approx((0.25, 0))
    assert mean_interval(ours)[1] > 0.1


def drawn(rng, n: int, lengths: str) -> np.ndarray:
    """(n, 2): records of equal, of 1 to 20, or of very unequal numbers of targets; those of one are
    alike, and of 1 to 20 the longer ones are harder."""
    targets = {'equal': np.full(n, 10), 'even': rng.integers(1, 21, n),
               'skewed': np.exp(rng.normal(3, 1, n)).round() + 1}[lengths]
    of_record = 1 + 0.05 * targets * (lengths == 'even') + rng.normal(0, 0.5, n)
    return np.stack([of_record * targets + rng.normal(0, 1, n) * np.sqrt(targets), targets], axis=1)


# the sum of n^2 over the sum of n, for n from 1 to 20, is 143.5 / 10.5
@pytest.mark.parametrize('lengths,truth', [('equal', 1), ('even', 1 + 0.05 * 143.5 / 10.5),
                                           ('skewed', 1)])
@pytest.mark.parametrize('n', [2, 5, 10, 30, 200])
def test_intervals_hold_the_truth_in_95_of_100_cases(n, lengths, truth):
    """However few records there are, of one model and of the difference of two; a little more often
    where few records of very unequal lengths can say little."""
    rng, held, paired = np.random.default_rng(n), 0, 0
    for _ in range(2000):
        losses = drawn(rng, n, lengths)
        mean, half = mean_interval(losses)
        held += abs(mean - truth) <= half
        other = losses.copy()
        other[:, 0] += drawn(rng, n, 'equal')[:, 0] / 10 * losses[:, 1]
        mean, half = paired_interval(other, losses)
        paired += abs(mean - 1) <= half
    most = 0.98 if lengths == 'skewed' else 0.97
    assert 0.93 < held / 2000 < most and 0.93 < paired / 2000 < most


def test_tokens_of_a_record_are_not_independent():
    """An interval that takes them to be so, of variance 0.5^2 + 1, is far too narrow."""
    rng, naively = np.random.default_rng(0), 0
    for _ in range(1000):
        losses = drawn(rng, 200, 'even')
        error = math.sqrt(1.25 / losses[:, 1].sum())
        naively += abs(mean_interval(losses)[0] - 1 - 0.05 * 143.5 / 10.5) <= 1.96 * error
    assert naively / 1000 < 0.75


# ---------------------------------------------------------------------------------------------
# Classes


def test_classification_by_hand():
    probabilities = np.array([[.95, .05, 0], [.65, .35, 0], [.25, .75, 0], [.55, .45, 0],
                              [.91, .09, 0]])
    found = classification(probabilities, np.array([0, 1, 1, 0, 2]))
    assert found['accuracy'] == pytest.approx(3 / 5)
    assert found['confusion'] == [[2, 0, 0], [1, 1, 0], [1, 0, 0]]
    # class 0: 2 right, 2 wrong, none missed; 1: 1 right, 1 missed; 2: nobody said it
    assert found['macro_f1'] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    # bins: two at 0.93 of which half are right, and 0.65 wrong, 0.75 right, 0.55 right
    assert found['calibration_error'] == pytest.approx((2 * .43 + .65 + .25 + .45) / 5)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize('sure,error', [(1.0, 0.5), (0.5, 0.0)])
def test_calibration(sure, error):
    """Of two classes, one in two right."""
    found = classification(np.array([[sure, 1 - sure]] * 4), np.array([0, 0, 1, 1]))
    assert found['calibration_error'] == pytest.approx(error)


def test_all_right():
    found = classification(np.eye(3), np.arange(3))
    assert found == {'accuracy': 1, 'macro_f1': 1, 'calibration_error': 0,
                     'confusion': np.eye(3, dtype=int).tolist()}


@pytest.mark.parametrize('k,never_said,never_true', [(2, [], []), (4, [], []), (4, [2], []),
                                                     (5, [], [0]), (6, [1, 5], [1, 2])])
def test_scores_are_those_of_scikit_learn(k, never_said, never_true):
    reference = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(k)
    probabilities = rng.dirichlet(np.ones(k), 300)
    probabilities[:, never_said] = 0
    labels = rng.choice([c for c in range(k) if c not in never_true], 300)
    found, said = classification(probabilities, labels), probabilities.argmax(axis=1)
    every = dict(labels=range(k))
    assert found['macro_f1'] == pytest.approx(reference.f1_score(
        labels, said, average='macro', zero_division=0, **every))
    assert found['accuracy'] == pytest.approx(reference.accuracy_score(labels, said))
    assert found['confusion'] == reference.confusion_matrix(labels, said, **every).tolist()


# ---------------------------------------------------------------------------------------------
# Passes through a model


@torch.no_grad()
def tiny(**changes):
    """A model with no weight that is 0, so that every part of it counts."""
    model = build_model(GPTConfig(
        block_size=SIZE, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16, norm='rmsnorm',
        position='rope', mlp='swiglu', bias=False, tied=False, **changes))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.train()


def sequences(n: int = 17) -> tuple[list, list]:
    """Ids, and weights of which the last is 1, of n sequences of 2 to SIZE + 1 ids."""
    rng = np.random.default_rng(1)
    lengths = [SIZE + 1, 2, *rng.integers(2, SIZE + 2, n - 2)]
    ids = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
    return ids, [[*rng.choice([0.0, 1.0], length - 1), 1.0] for length in lengths]


def by_hand(model, ids: list, weights: list) -> list:
    """[nats, targets] of one sequence, alone."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids[:-1]]))[0]
    nats = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction='none')
    counts = torch.tensor(weights[1:]) > 0
    return [nats[counts].sum().item(), counts.sum().item()]


@pytest.mark.parametrize('rows', [1, 3, 64])
@pytest.mark.parametrize('packed', [True, False], ids=['packed', 'unpacked'])
def test_sequence_losses(packed, rows):
    model, (ids, weights) = tiny(), sequences()
    expected = np.array([by_hand(model, *pair) for pair in zip(ids, weights)])
    data = Rows(ids, weights, SIZE, seed=3, packed=packed)
    assert (len(data) < len(ids)) == packed
    found = metrics.sequence_losses(model, data, rows, CPU, Ranks())
    assert found.shape == (len(ids), 2) and found.dtype == np.float64
    assert (found[:, 1] == expected[:, 1]).all()
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=2e-6)
    assert model.training and not any(p.grad is not None for p in model.parameters())


def test_packed_losses_equal_unpacked_ones():
    model, (ids, weights) = tiny(), sequences()
    packed, alone = (metrics.sequence_losses(model, Rows(ids, weights, SIZE, packed=packed), 4, CPU,
                                             Ranks()) for packed in (True, False))
    assert np.abs(packed / packed[:, 1:] - alone / alone[:, 1:]).max() < 1e-6


def test_weights_only_say_what_counts():
    model, (ids, weights) = tiny(), sequences()
    half = [[w / 2 for w in row] for row in weights]
    found, same = (metrics.sequence_losses(model, Rows(ids, w, SIZE), 4, CPU, Ranks())
                   for w in (weights, half))
    assert (found == same).all()


def test_ranks_share_the_rows():
    """What each finds of its rows adds up; all_sum has nothing to add with a single process."""
    model, data = tiny(), Rows(*sequences(), SIZE)
    whole = metrics.sequence_losses(model, data, 2, CPU, Ranks())
    parts = [metrics.sequence_losses(model, data, 2, CPU, Ranks(rank=r, world=3, dp=3, dp_rank=r))
             for r in range(3)]
    assert all((part[:, 1] == 0).any() for part in parts)
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_asked_to_stop():
    model, data, asked = tiny(), Rows(*sequences(), SIZE), iter([False, False, True])
    assert metrics.sequence_losses(model, data, 1, CPU, Ranks(), lambda: next(asked)) is None
    assert metrics.class_probabilities(tiny(n_classes=3), data, 1, CPU, Ranks(),
                                       lambda: True) is None
    assert model.training


@pytest.mark.parametrize('packed', [True, False], ids=['packed', 'unpacked'])
def test_class_probabilities(packed):
    """Read at the last token of each text, whatever is in the row beside it."""
    model, (texts, _) = tiny(n_classes=3), sequences()
    ids = [[*text[:SIZE], i % 3] for i, text in enumerate(texts)]
    weights = [[0.0] * (len(row) - 1) + [1.0] for row in ids]
    found = metrics.class_probabilities(model, Rows(ids, weights, SIZE, packed=packed), 3, CPU,
                                        Ranks())
    with torch.no_grad():
        expected = [model.eval()(torch.tensor([row[:-1]]))[0, -1].softmax(dim=0) for row in ids]
    np.testing.assert_allclose(found, torch.stack(expected), atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_targets_of_weight_0_are_not_read():
    """They may be anything: their losses are not even computed."""
    data = Rows([[1, 2, 3]], [[0.0, 0.0, 1.0]], SIZE)
    assert data.batch([0])[1][0, :3].tolist() == [IGNORE, 3, IGNORE]
    found = metrics.sequence_losses(tiny(), data, 1, CPU, Ranks())
    assert found[0, 1] == 1 and found[0, 0] > 0
