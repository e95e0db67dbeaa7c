"""Fitted laws: constants that are known come back, and intervals hold what they promise."""
import json
import math

import numpy as np
import pytest
from conftest import note_row, stopped

from core.planning import fit as fitting
from core.planning.fit import Runs, fit, jacobian, ln_loss
from core.planning.laws import CORRECTED


def along_a_line(n: int, noise: float, generator) -> Runs:
    """n runs of 10 tokens a parameter, of L = 0.6 + 300 / C^0.22."""
    C = np.geomspace(1e11, 4e13, n)
    N = np.sqrt(C / 60)
    loss = (0.6 + 300 / C ** 0.22) * np.exp(noise * generator.standard_normal(n))
    return Runs([str(i) for i in range(n)], N, 10 * N, C, loss)


def spread_out(n: int, noise: float, generator) -> Runs:
    """n runs of many sizes and lengths, of the corrected law."""
    N = 10 ** generator.uniform(7, 10, n)
    D = N * 10 ** generator.uniform(0.3, 2, n)
    loss = CORRECTED.loss(N, D) * np.exp(noise * generator.standard_normal(n))
    return Runs([str(i) for i in range(n)], N, D, 6 * N * D, loss)


def test_without_noise_the_law_comes_back():
    generator = np.random.default_rng(0)
    runs = along_a_line(6, 0.0, generator)
    constants = fit(runs, 'compute').constants()
    assert constants['E'][0] == pytest.approx(0.6, rel=1e-3)
    assert constants['factor of C'][0] == pytest.approx(300, rel=1e-2)
    assert constants['exponent of C'][0] == pytest.approx(0.22, rel=1e-3)
    law = fit(spread_out(30, 0.0, generator), 'size and data').law()
    for name in ('E', 'A', 'alpha', 'B', 'beta'):
        assert getattr(law, name) == pytest.approx(getattr(CORRECTED, name), rel=0.02), name


def test_derivatives():
    """Those of ln_loss, by differences."""
    generator = np.random.default_rng(0)
    theta, x = generator.normal(size=(3, 5)) * 0.5, generator.normal(size=(4, 2))
    for i in range(5):
        step = 1e-6 * np.eye(5)[i]
        slope = (ln_loss(theta + step, x) - ln_loss(theta - step, x)) / 2e-6
        assert jacobian(theta, x)[:, :, i] == pytest.approx(slope, abs=1e-8)


def test_an_outlier_counts_little():
    """Huber's loss: a run that went wrong moves the law less than it would move least squares."""
    runs = spread_out(40, 1e-3, np.random.default_rng(1))
    wrong = np.where(np.arange(40) == 7, 1.2, 1.0)
    law = fit(Runs(runs.names, runs.N, runs.D, runs.C, runs.loss * wrong), 'size and data').law()
    assert law.loss(1e10, 2e11) == pytest.approx(CORRECTED.loss(1e10, 2e11), rel=0.005)


@pytest.mark.parametrize('n, rounds', [(5, 60), pytest.param(5, 400, marks=pytest.mark.slow),
                                       pytest.param(9, 200, marks=pytest.mark.slow)])
def test_prediction_intervals_cover(n, rounds, monkeypatch):
    """A run of four times the compute lies in the interval of 95% about that often."""
    monkeypatch.setattr(fitting, 'DRAWS', 300)
    generator, hits = np.random.default_rng(2), 0
    for _ in range(rounds):
        runs = along_a_line(n, 0.004, generator)
        C = 4 * runs.C.max()
        true = (0.6 + 300 / C ** 0.22) * math.exp(0.004 * generator.standard_normal())
        _, low, high = fit(runs, 'compute').predict(C)
        hits += low <= true <= high
    note_row('a run of four times the compute inside its 95% prediction interval',
             'runs fitted, simulations, inside', n, rounds, f'{hits / rounds:.1%}')
    assert 0.9 <= hits / rounds <= 0.995 or rounds < 100 and hits / rounds >= 0.88


def run_folder(tmp_path, name, **changes):
    """A folder with the log of a finished run."""
    folder = tmp_path / name
    folder.mkdir()
    start = {'event': 'start', 'parameters': 1000, 'flops_per_token': 6000,
             'identity': {'data': {'sha256': 'a'}, 'tokenizer': 't'}} | changes
    lines = [start, {'event': 'eval', 'tokens': 10_000, 'val_loss': 2.0}, {'event': 'end'}]
    (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
    return folder


def test_runs_that_do_not_compare(tmp_path, capsys):
    one = run_folder(tmp_path, 'one')
    other = run_folder(tmp_path, 'other', identity={'data': {'sha256': 'b'}, 'tokenizer': 't'})
    assert 'on different data' in stopped(capsys, lambda: fitting.read_runs(
        [str(one), str(other)]))
    lines = (one / 'log.jsonl').read_text().splitlines()
    (one / 'log.jsonl').write_text('\n'.join(lines[:2]) + '\n')
    assert f'{one}: has not ended' in stopped(capsys, lambda: fitting.read_runs([str(one)]))
    assert 'is no run' in stopped(capsys, lambda: fitting.read_runs([str(tmp_path)]))
    same = along_a_line(6, 0.0, np.random.default_rng(0))
    narrow = Runs(same.names, same.N, same.D, same.C ** 0 * np.arange(10, 16), same.loss)
    assert 'differ by a factor of 1.5 only' in stopped(capsys, lambda: fit(narrow, 'compute'))
    few = Runs(['a'] * 3, same.N[:3], same.D[:3], same.C[:3], same.loss[:3])
    assert '3 runs: a law of compute has 3' in stopped(capsys, lambda: fit(few, 'compute'))
