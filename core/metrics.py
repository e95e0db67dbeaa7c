"""What a model is worth on records: losses, intervals, and what a classifier gets right."""
import math

import numpy as np
import torch

from core import parallel, processes
from core.dataset import IGNORE, share
from core.learner import to_device

Z95 = 1.959964      # standard errors of a 95% interval


@torch.no_grad()
def sequence_losses(model, data, rows: int, device, ranks, asked=lambda: False):
    """(n, 2): for each sequence of Rows its loss in nats and the number of its targets.

    `rows` at a time, shared by the ranks; all get all. None if asked() says to stop.
    """
    def losses(batch):
        x, y, doc, _ = batch
        return torch.stack([model(x, y, doc=doc, reduction='none').float(), y != IGNORE], dim=-1)
    return summed(model, data, rows, device, ranks, asked, 2, losses)


@torch.no_grad()
def class_probabilities(model, data, rows: int, device, ranks, asked=lambda: False):
    """(n, n_classes): what a classifier says of each sequence of Rows. None as above."""
    def probabilities(batch):
        x, y, doc, _ = batch
        return model(x, doc=doc).float().softmax(dim=-1) * (y != IGNORE)[..., None]
    return summed(model, data, rows, device, ranks, asked, model.config.n_classes, probabilities)


def summed(model, data, rows: int, device, ranks, asked, k: int, values):
    """(n, k): for each sequence of Rows the sum of values(batch) (B, T, k) over its positions."""
    found = torch.zeros(len(data.ids), k, dtype=torch.float64)
    with parallel.looking_on(model):
        for samples in share(0, len(data), ranks.dp_rank, ranks.dp, rows):
            if asked():
                return None
            with device.autocast():
                sums = values(to_device(data.batch(samples), device)).cpu().double()
            owners = data.owners(samples)
            found.index_add_(0, owners[owners >= 0], sums[owners >= 0])
    return processes.all_sum(found, device).cpu().numpy()


def mean_interval(losses: np.ndarray) -> tuple[float, float]:
    """Loss per target of sequence_losses (n, 2), and half of its 95% interval.

    A ratio of two sums over records that are independent while tokens of one are not: its standard
    error is sqrt(sum (nats - mean targets)^2) / sum targets (the delta method, or Cochran 1977,
    "Sampling Techniques", section 6.5). Of a single record nothing is known: NaN.
    """
    nats, targets = losses.T
    mean = nats.sum() / targets.sum()
    error = math.sqrt(((nats - mean * targets) ** 2).sum()) / targets.sum()
    return float(mean), float(Z95 * error) if len(losses) > 1 else math.nan


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
