"""core/eval/intervals.py: hand-computed cases, coverage in simulations, and the paired test."""
import math

import numpy as np
import pytest
from conftest import note_row

from core.eval import intervals


def test_wilson_by_hand():
    """Agresti and Coull 1998: 0 of 20 gives 0 to 0.161; 5 of 10 gives 0.237 to 0.763."""
    assert intervals.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert intervals.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert intervals.wilson(10, 10)[1] == pytest.approx(1.0)




def test_coverage_of_wilson():
    """The exact probabilities of all outcomes, averaged over p and at the worst one."""
    for n in (30, 100, 300, 1000):
        found = []
        for p in np.linspace(0.05, 0.95, 181):
            k = np.arange(n + 1)
            logs = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                             for i in k]) + k * math.log(p) + (n - k) * math.log(1 - p)
            inside = [low <= p <= high for low, high in (intervals.wilson(i, n) for i in k)]
            found.append(float(np.exp(logs)[inside].sum()))
        note_row('coverage of 95% intervals', 'interval, n, mean, worst', 'Wilson', n,
                 f'{np.mean(found):.1%}', f'{min(found):.1%}')
        assert 0.93 <= np.mean(found) <= 0.97 and min(found) > 0.90


@pytest.mark.parametrize('n', [30, 90, 300, pytest.param(1000, marks=pytest.mark.slow)])
def test_coverage_of_bits_per_byte(n, monkeypatch):
    """Documents of very unequal lengths, nats per byte that differ from document to document."""
    monkeypatch.setattr(intervals, 'DRAWS', 1000)
    drawn, hits, tries, truth = np.random.default_rng(n), 0, 600, 0.7
    for _ in range(tries):
        sizes = np.exp(drawn.normal(6, 1, n))
        nats = sizes * drawn.gamma(20, truth / 20, n)
        _, low, high = intervals.interval(np.stack([nats, sizes], axis=1))
        hits += low <= truth <= high
    note_row('coverage of 95% intervals', 'interval, n, mean, worst',
             'bits per byte, ' + ('t' if n < intervals.FEW else 'bootstrap'), n,
             f'{hits / tries:.1%}', '')
    assert 0.91 <= hits / tries <= 0.98


def test_groups_widen_the_interval():
    """20 documents of 10 questions that are all right or all wrong are worth 20 questions."""
    drawn = np.random.default_rng(0)
    values = np.repeat(drawn.integers(0, 2, 20).astype(float), 10)
    groups = [str(i // 10) for i in range(200)]
    alone, together = intervals.interval(values), intervals.interval(values, groups)
    assert alone[0] == together[0]
    ratio = (together[2] - together[1]) / (alone[2] - alone[1])
    assert 2.7 < ratio < 3.7        # sqrt(10), and Student's t


def test_one_document_says_nothing_of_others():
    assert math.isnan(intervals.interval(np.array([[7.0, 10.0]]))[1])
    assert intervals.interval(np.array([1.0]))[1:] == intervals.wilson(1, 1)


def test_a_model_against_itself():
    values = np.random.default_rng(1).integers(0, 2, 500).astype(float)
    mean, low, high, p = intervals.difference(values, values)
    assert (mean, low, high, p) == (0, 0, 0, 1)
    ratio = np.random.default_rng(1).uniform(1, 2, (50, 2))
    assert intervals.difference(ratio, ratio) == (0, 0, 0, 1)


def planted(drawn, n: int, gain: float, disagreement: float) -> tuple:
    """Right and wrong of two models of which the first is better by `gain`."""
    kind = drawn.random(n)
    better = kind < (disagreement + gain) / 2
    worse = (kind >= (disagreement + gain) / 2) & (kind < disagreement)
    both = drawn.integers(0, 2, n).astype(bool)
    return ((both | better) & ~worse).astype(float), ((both | worse) & ~better).astype(float)


def test_power_and_level(monkeypatch):
    """A difference of 3 points at n = 1,000, of which the models answer 10% differently: found as
    often as `power` says beforehand. None: found in 5% of cases at most."""
    monkeypatch.setattr(intervals, 'FLIPS', 2000)
    expected = intervals.power(0.03, 0.1, 1000)
    assert expected == pytest.approx(0.855, abs=0.01)   # by hand: 0.03 sqrt(1000) / 0.3148 = 3.01
    for gain, low, high in ((0.03, expected - 0.06, expected + 0.06), (0.0, 0.01, 0.075)):
        drawn = np.random.default_rng(5)
        p = [intervals.difference(*planted(drawn, 1000, gain, 0.1))[3] for _ in range(300)]
        assert low <= np.mean(np.array(p) < 0.05) <= high


def test_randomization_by_hand():
    """Three differences of +1: of 8 signs, two give a sum as large, so p is near 1/4."""
    p = intervals.difference(np.array([1.0, 1, 1, 0]), np.array([0.0, 0, 0, 0]))[3]
    assert p == pytest.approx(0.25, abs=0.02)


def test_holm_by_hand():
    assert intervals.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert intervals.holm([0.5, 0.6]) == [1.0, 1.0] and intervals.holm([]) == []


def test_pass_at_k_by_hand():
    """Of 5 programs 2 are right: one of two drawn is with 1 - (3 / 5) (2 / 4) = 0.7."""
    assert intervals.pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert intervals.pass_at_k(5, 0, 3) == 0 and intervals.pass_at_k(5, 4, 2) == 1
