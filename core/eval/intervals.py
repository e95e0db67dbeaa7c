"""How sure a score is: intervals of 95%, and whether two models differ.

Values are one per item, (n,), or of texts (n, 2): nats and bytes. Items of one group (answers to
the same question, parts of one document) are not independent: their sums are.
"""
import math

import numpy as np

from core.run.metrics import Z95, mean_interval

FEW = 100       # from so many documents on, a ratio's interval is that of the bootstrap
DRAWS = 4000    # of the bootstrap
FLIPS = 10_000  # of the randomization test


def wilson(k: float, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion, k of n (Wilson 1927): with p = k / n and z = 1.96,
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    p, z2 = k / n, Z95 ** 2
    middle = p + z2 / (2 * n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n)))


def grouped(values: np.ndarray, groups: list[str] | None) -> np.ndarray:
    """(n, 2) sums and counts: of each item, or of each group of items."""
    pairs = values if values.ndim == 2 else np.stack([values, np.ones(len(values))], axis=1)
    if not groups:
        return pairs
    names, owner = np.unique(np.array(groups), return_inverse=True)
    found = np.zeros((len(names), 2))
    np.add.at(found, owner, pairs)
    return found


def interval(values: np.ndarray, groups: list[str] | None = None) -> tuple[float, float, float]:
    """(mean, low, high) of scores per item or of nats per byte.

    Proportions of independent items have Wilson's interval. A mean, or a ratio of two sums, has
    that of the jackknife with Student's t (`metrics.mean_interval`), and from FEW groups on that of
    the bootstrap over groups (Efron 1979; percentiles). NaN where one group says nothing of others.
    """
    if values.ndim == 1 and not groups and np.isin(values, (0, 1)).all():
        return (float(values.mean()), *wilson(values.sum(), len(values)))
    sums = grouped(values, groups)
    mean = float(sums[:, 0].sum() / sums[:, 1].sum())
    if len(sums) < 2:
        return mean, math.nan, math.nan
    if len(sums) < FEW or values.ndim == 1:
        mean, half = mean_interval(sums)
        return mean, mean - half, mean + half
    low, high = np.percentile(resampled(sums), (2.5, 97.5))
    return mean, float(low), float(high)


def resampled(sums: np.ndarray) -> np.ndarray:
    """(DRAWS,) ratios of the sums of as many groups, drawn with replacement."""
    generator, n = np.random.default_rng(0), len(sums)
    drawn = np.stack([np.bincount(generator.integers(0, n, n), minlength=n) @ sums
                      for _ in range(DRAWS)])
    return drawn[:, 0] / drawn[:, 1]


def difference(ours: np.ndarray, theirs: np.ndarray, groups: list[str] | None = None
               ) -> tuple[float, float, float, float]:
    """(difference of the scores, low, high, p) of two models on the same items.

    Pairing removes that some items are harder than others. The interval is that of the mean
    difference with Student's t. p is that of the randomization test (Fisher 1935; Edgington 1987):
    if the models were alike, each difference could as well have had the other sign; p is how often
    random signs give a sum as large, of FLIPS drawings and the one observed.
    """
    both = grouped(ours, groups)
    sums = both[:, 0] - grouped(theirs, groups)[:, 0]
    mean, half = mean_interval(np.stack([sums, both[:, 1]], axis=1))
    sums = sums[sums != 0]
    generator, at_least = np.random.default_rng(0), 1
    seen = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    for _ in range(FLIPS // 500):
        signs = generator.integers(0, 2, (500, len(sums))) * 2.0 - 1
        at_least += int((np.abs(signs @ sums) >= seen).sum())
    return mean, mean - half, mean + half, at_least / (FLIPS + 1)


def holm(p: list[float]) -> list[float]:
    """p values corrected for their number (Holm 1979), in the given order: the smallest is
    multiplied by n, the next by n - 1, ..., none is less than one before it."""
    found, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        found[i] = largest
    return found


def power(difference: float, disagreement: float, n: int) -> float:
    """How likely a test at 5% finds a difference of two proportions on the same n items, of which
    the models answer the share `disagreement` differently (Miettinen 1968; normal approximation):
    Phi(sqrt(n) |d| / sd - 1.96), sd^2 = disagreement - d^2."""
    z = math.sqrt(n) * abs(difference) / math.sqrt(disagreement - difference ** 2) - Z95
    return 0.5 * math.erfc(-z / math.sqrt(2))


def pass_at_k(n: int, right: int, k: int) -> float:
    """The probability that one of k programs is right, if `right` of n were: 1 - C(n - right, k) /
    C(n, k), unbiased (Chen et al. 2021, section 2.1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
