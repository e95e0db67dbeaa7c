"""What a model is worth on records: losses, intervals, and what a classifier gets right."""
import math

import numpy as np
import torch
from tqdm import tqdm

from core.ranks import parallel, processes
from core.ranks.processes import IGNORE, share
from core.run.learner import to_device

Z95 = 1.959964      # the 97.5% quantile of the normal distribution, and of Student's t with 1 to 7
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646)     # degrees of freedom


@torch.no_grad()
def sequence_losses(model, data, rows: int, device, ranks, asked=lambda: False):
    """(n, 2): for each sequence of Rows its loss in nats and the number of its targets; `rows` at a
    time, shared by the ranks, of which each gets all. None if asked() says to stop."""
    def losses(batch):
        x, y, doc, _ = batch
        return torch.stack([model(x, y, doc=doc, reduction='none').float(), y != IGNORE], dim=-1)
    return summed(model, data, rows, device, ranks, asked=asked, k=2, values=losses)


@torch.no_grad()
def class_probabilities(model, data, rows: int, device, ranks, asked=lambda: False):
    """(n, n_classes): what a classifier says of each sequence of Rows. None as above."""
    def probabilities(batch):
        x, y, doc, _ = batch
        return model(x, doc=doc).float().softmax(dim=-1) * (y != IGNORE)[..., None]
    return summed(model, data, rows, device, ranks, asked=asked, k=model.config.n_classes,
                  values=probabilities)


def summed(model, data, rows: int, device, ranks, *, asked, k: int, values):
    """(n, k): for each sequence of Rows the sum of values(batch) (B, T, k) over its positions."""
    found = torch.zeros(len(data.ids), k, dtype=torch.float64)
    with parallel.looking_on(model):
        parts = share(0, len(data), ranks.dp_rank, ranks.dp, rows)
        for samples in tqdm(parts, 'scores', delay=5, leave=False,
                            disable=True if ranks.rank else None):
            if asked():
                return None
            with device.autocast():
                sums = values(to_device(data.batch(samples), device)).cpu().double()
            owners = data.owners(samples)
            found.index_add_(0, owners[owners >= 0], sums[owners >= 0])
    return processes.all_sum(found, device).cpu().numpy()


def t95(df: int) -> float:
    """The 97.5% quantile of Student's t, half of a 95% interval in standard errors: of the table,
    or by its expansion in 1 / df (Abramowitz and Stegun 1964, 26.7.5), right to 4 decimals."""
    if df <= len(T95):
        return T95[df - 1]
    return Z95 + 2.372271 / df + 2.822499 / df ** 2 + 2.555850 / df ** 3 + 1.589534 / df ** 4


def mean_interval(losses: np.ndarray) -> tuple[float, float]:
    """Loss per target of sequence_losses (n, 2), and half of its 95% interval; NaN of one record.

    Records are independent, tokens of a record are not. The standard error of this ratio of two
    sums is that of the jackknife (Cochran 1977, "Sampling Techniques", section 6.17): sqrt((n - 1)
    / n) times the root of the sum of squared differences that leaving out one record makes. Records
    of unequal length are worth (sum targets)^2 / sum targets^2 equal ones (Kish 1965, "Survey
    Sampling", section 11.7), and Student's t has one degree of freedom less than that.
    """
    (nats, targets), n = losses.T, len(losses)
    mean = nats.sum() / targets.sum()
    if n < 2:
        return float(mean), math.nan
    change = (nats - mean * targets) / (targets.sum() - targets)
    error = math.sqrt((n - 1) / n * (change ** 2).sum())
    worth = targets.sum() ** 2 / (targets ** 2).sum()
    return float(mean), t95(max(1, round(worth) - 1)) * error


def shown(mean: float, half: float) -> str:
    """A mean and its interval as text."""
    if math.isnan(half) and math.isfinite(mean):
        return f'{mean:.4f} (one record: no interval)'
    return f'{mean:.4f} ± {half:.4f}'


def paired_interval(losses: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Difference of the losses per target of two models on the same records, and half of its 95%
    interval: pairing removes that some records are harder than others."""
    return mean_interval(np.stack([losses[:, 0] - others[:, 0], losses[:, 1]], axis=1))


def classification(probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """Of (n, k) probabilities and (n,) true classes: accuracy, macro F1, expected calibration error
    and the confusion matrix (true classes are rows).

    F1 of a class is 2 tp / (2 tp + fp + fn), 0 where nothing is; macro F1 is their mean. The
    calibration error (Guo et al. 2017, section 2) is the mean of |accuracy - confidence| over ten
    equal bins of confidence, weighted by how many fall into each.
    """
    n, k = probabilities.shape
    said = probabilities.argmax(axis=1)
    confusion = np.bincount(labels * k + said, minlength=k * k).reshape(k, k)
    hits = confusion.diagonal()
    f1 = 2 * hits / np.maximum(1, confusion.sum(axis=0) + confusion.sum(axis=1))
    confidence, right = probabilities.max(axis=1), said == labels
    bins = np.minimum(9, (confidence * 10).astype(int))
    error = sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
                for b in np.unique(bins))
    return {'accuracy': float(right.mean()), 'macro_f1': float(f1.mean()),
            'calibration_error': float(error), 'confusion': confusion.tolist()}
