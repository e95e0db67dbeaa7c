"""Scaling laws of your own runs: read from logs, fitted, and extrapolated with an interval."""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.planning.laws import Law
from core.run.log import read_log
from core.settings import stop, warn

HUBER = 1e-3        # residuals of ln(loss) beyond this count linearly (Hoffmann et al. 2022, D.2)
DRAWS = 1000        # of the bootstrap
STEPS = 200         # of the fit, at most


@dataclass(frozen=True)
class Runs:
    """Finished runs: parameters, tokens, FLOPs and last validation loss of each."""
    names: list[str]
    N: np.ndarray
    D: np.ndarray
    C: np.ndarray
    loss: np.ndarray


def read_runs(folders: list[str]) -> Runs:
    """The runs in these folders. Stops at one that is not finished, or saw other data."""
    rows, names, data = [], [], {}
    for folder in folders:
        starts, evals = read_log(folder, 'start'), read_log(folder, 'eval')
        if not starts and Path(folder).is_dir() and len(folders) > 1:
            warn(f'{folder}: is no run of train.py, passed over')     # of out/*
            continue
        if not starts:
            stop(f'{folder}: is no run (it has no log.jsonl with a start); give run directories of '
                 'train.py, such as out/l2')
        if not read_log(folder, 'end') or not evals:
            stop(f'{folder}: has not ended, and its rates not fallen, so its loss says little; '
                 'finish it with the command that began it, or leave it out')
        start, last = starts[0], evals[-1]
        try:
            N, flops = start['parameters'], start['flops_per_token']
            D, loss = last['tokens'], last['val_loss']
            data[start['identity']['data']['sha256'], start['identity']['tokenizer']] = folder
        except (KeyError, TypeError) as e:
            stop(f'{folder}/log.jsonl: has no {e}; fit takes runs of train.py')
        if not (isinstance(loss, float) and math.isfinite(loss) and min(N, D, flops) > 0):
            stop(f'{folder}: ended with a loss of {loss}; leave it out')
        rows.append((N, D, flops * D, loss))
        names.append(Path(folder).name)
    if not rows:
        stop(f'{", ".join(folders)}: no runs of train.py')
    if len(data) > 1:
        stop(f'{" and ".join(data.values())}: were trained on different data, or with different '
             'tokenizers, so their losses do not compare; fit them apart')
    N, D, C, loss = np.array(rows, dtype=float).T
    return Runs(names, N, D, C, loss)


@dataclass(frozen=True)
class Fit:
    """ln L = ln(e^t0 + sum_k e^(t_k - exponent_k x_k)): theta = (t0, t_1, exponent_1, ...), and x
    the logarithms of C, or of N and D, less their means `middle`."""
    theta: np.ndarray
    middle: np.ndarray
    names: tuple[str, ...]
    residuals: np.ndarray
    drawn: np.ndarray       # (DRAWS, len(theta)) thetas of the bootstrap
    noise: np.ndarray       # (DRAWS,) deviations of ln(loss) that belong to them

    def predict(self, *amounts: float) -> tuple[float, float, float]:
        """The loss of a new run with this C (or N and D), and its 95% prediction interval: the
        uncertainty of the law, and the deviation of one run from it."""
        x = np.log(amounts) - self.middle
        generator = np.random.default_rng(1)
        many = ln_loss(self.drawn, x[None])[:, 0] + self.noise * generator.standard_normal(DRAWS)
        low, high = np.exp(np.percentile(many, (2.5, 97.5)))
        return float(np.exp(ln_loss(self.theta[None], x[None])[0, 0])), float(low), float(high)

    def constants(self) -> dict[str, tuple[float, float, float]]:
        """E, and each term's factor and exponent, with their 95% intervals."""
        def spread(of):
            low, high = np.percentile(of(self.drawn), (2.5, 97.5))
            return float(of(self.theta[None])[0]), float(low), float(high)
        found = {'E': spread(lambda t: np.exp(t[:, 0]))}
        for k, name in enumerate(self.names):
            i, j = 1 + 2 * k, 2 + 2 * k
            found[f'factor of {name}'] = spread(lambda t, i=i, j=j, k=k: np.exp(
                t[:, i] + t[:, j] * self.middle[k]))
            found[f'exponent of {name}'] = spread(lambda t, j=j: t[:, j])
        return found

    def law(self) -> Law | None:
        """As a Law of N and D; None if the fit is one of C."""
        if len(self.names) == 1:
            return None
        E, A, alpha, B, beta = (value for value, _, _ in self.constants().values())
        return Law(E, A, alpha, B, beta)


def ln_loss(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(S, n) logarithms of the losses that S parameter vectors (S, p) give at x (n, k)."""
    terms = [theta[:, 0, None] + 0 * x[None, :, 0]]
    for k in range(x.shape[1]):
        terms.append(theta[:, 1 + 2 * k, None] - theta[:, 2 + 2 * k, None] * x[None, :, k])
    return np.logaddexp.reduce(np.stack(terms), axis=0)


def jacobian(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(S, n, p) derivatives of `ln_loss`: each term's share of the loss, times -x for exponents."""
    total = ln_loss(theta, x)
    columns = [np.exp(theta[:, 0, None] - total)]
    for k in range(x.shape[1]):
        a, exponent = theta[:, 1 + 2 * k, None], theta[:, 2 + 2 * k, None]
        share = np.exp(a - exponent * x[None, :, k] - total)
        columns += [share, -x[None, :, k] * share]
    return np.stack(columns, axis=2)


def minimize(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From S starts (S, p), the least sums of Huber losses of y (S, n) - ln_loss, and where: by
    Levenberg-Marquardt with weights min(1, HUBER / |residual|), all starts at once."""
    def cost(theta):
        r = np.abs(y - ln_loss(theta, x))
        return np.where(r <= HUBER, r ** 2 / 2, HUBER * (r - HUBER / 2)).sum(axis=1)
    damping, best = np.full(len(theta), 1e-2), cost(theta)
    for _ in range(STEPS):
        r, J = y - ln_loss(theta, x), jacobian(theta, x)
        weight = np.minimum(1, HUBER / np.maximum(np.abs(r), 1e-300))
        normal = np.einsum('snp,sn,snq->spq', J, weight, J)
        slope = np.einsum('snp,sn,sn->sp', J, weight, r)
        scale = np.einsum('spp->sp', normal).max(axis=1)[:, None, None] * np.eye(theta.shape[1])
        step = np.linalg.solve(normal + (damping[:, None, None] + 1e-12) * scale,
                               slope[:, :, None])[:, :, 0]
        tried = theta + np.clip(step, -2, 2)
        new = cost(tried)
        better = new < best
        theta, best = np.where(better[:, None], tried, theta), np.where(better, new, best)
        damping = np.where(better, damping / 5, np.minimum(damping * 3, 1e6))
    return theta, best


def starts(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(S, p) places to start from: how much of the loss is irreducible, and exponents."""
    middle, found = float(y.mean()), []
    k = x.shape[1]
    for part in (0.05, 0.3, 0.6, 0.9):
        for exponent in (0.05, 0.15, 0.35, 0.7):
            rest = [middle + math.log((1 - part) / k), exponent] * k
            found.append([middle + math.log(part), *rest])
    return np.array(found)


def fit(runs: Runs, form: str) -> Fit:
    """Fit L = E + K / C^g ('compute'), or L = E + A / N^alpha + B / D^beta ('size and data').

    The bootstrap is parametric: to the fitted losses it adds normal deviations, and fits again.
    Their size is estimated from few residuals, so it is drawn, too: s sqrt(df / chi2(df)), with df
    the runs beyond the parameters, as in Student's t. Stops if there are too few runs.
    """
    x = np.log(runs.C)[:, None] if form == 'compute' else np.log(np.stack([runs.N, runs.D], 1))
    n, p = len(x), 1 + 2 * x.shape[1]
    if n <= p:
        stop(f'{n} runs: a law of {form} has {p} constants, so fit it to at least {p + 1} runs of '
             'different size')
    middle = x.mean(axis=0)
    x, y = x - middle, np.log(runs.loss)
    if (spread := x.max(axis=0) - x.min(axis=0)).min() < math.log(4):
        stop(f'the runs differ by a factor of {math.exp(spread.min()):.1f} only; a law wants a '
             'factor of 4 at least, and better 100')
    first = starts(x, y)
    found, cost = minimize(first, x, np.tile(y, (len(first), 1)))
    theta = found[cost.argmin()]
    residuals = y - ln_loss(theta[None], x)[0]
    generator = np.random.default_rng(0)
    deviation = math.sqrt((residuals ** 2).sum() / (n - p))
    noise = deviation * np.sqrt((n - p) / generator.chisquare(n - p, DRAWS))
    again = ln_loss(theta[None], x) + noise[:, None] * generator.standard_normal((DRAWS, n))
    drawn, _ = minimize(np.tile(theta, (DRAWS, 1)), x, again)
    names = ('C',) if form == 'compute' else ('N', 'D')
    return Fit(theta, middle, names, residuals, drawn, noise)


def best_form(runs: Runs) -> str:
    """'size and data' if runs of one size differ in tokens, else 'compute'."""
    ratio = np.log(runs.D / runs.N)
    return 'size and data' if len(ratio) > 5 and ratio.std() > 0.3 else 'compute'
