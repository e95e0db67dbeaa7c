"""Figures of the chapter on classification."""
import numpy as np
from figures import BLUE, DARK, LIGHT, arrow, box, canvas


def classification_head():
    """The head at the last token."""
    words = 'You', 'have', 'won', 'a', 'prize'
    figure, axes = canvas(5.6, 3.0, x=(-7, 49), y=(-1, 29))
    for i, word in enumerate(words):
        x, last = 8.2 * i, i == len(words) - 1
        box(axes, x, 0, 7, 3.4, word, size=8)
        arrow(axes, (x + 3.5, 3.4), (x + 3.5, 6))
        arrow(axes, (x + 3.5, 12), (x + 3.5, 14.4))
        box(axes, x, 14.4, 7, 3.4, f'$h_{i + 1}$', size=8, fill='#8fa6bd' if last else 'white')
        axes.text(x + 3.5, 27, 'spam' if last else '-', ha='center', va='center', size=8)
    box(axes, 0, 6, 8.2 * 4 + 7, 6, 'the blocks of the language model:\n'
        'each position sees itself and those before', size=8, fill=LIGHT)
    x = 8.2 * 4
    arrow(axes, (x + 3.5, 17.8), (x + 3.5, 19.6))
    box(axes, x - 1.2, 19.6, 9.4, 4.2, 'head $W$', size=8, fill='#f3d9c0')
    arrow(axes, (x + 3.5, 23.8), (x + 3.5, 25.8))
    for y, text in ((1.7, 'text'), (16.1, 'vectors'), (27, 'target')):
        axes.text(-0.8, y, text, ha='right', va='center', size=8)
    return figure


def classification_confusion():
    """The table of the example, and what is read from it."""
    figure, axes = canvas(4.6, 2.5, x=(-6, 22), y=(-4.4, 11))
    for (column, row), n, fill in (((0, 1), 86, LIGHT), ((1, 1), 4, 'white'), ((0, 0), 2, 'white'),
                                   ((1, 0), 8, '#8fa6bd')):
        box(axes, 5 * column, 4 * row, 5, 4, str(n), fill=fill, size=10)
    for i, name in enumerate(('ham', 'spam')):
        axes.text(5 * i + 2.5, 8.7, name, ha='center', va='center', size=8)
        axes.text(-0.5, 6 - 4 * i, name, ha='right', va='center', size=8)
    axes.text(5, 10.3, 'said', ha='center', va='center', size=8)
    axes.text(-4.8, 4, 'true', ha='center', va='center', size=8, rotation=90)
    arrow(axes, (10.2, 2), (11.8, 2), color=BLUE)
    axes.text(12, 2, 'recall\n8 / (2 + 8) = 0.80', va='center', size=8, color=BLUE)
    arrow(axes, (7.5, -0.2), (7.5, -1.8), color=BLUE)
    axes.text(7.5, -3.1, 'precision 8 / (4 + 8) = 0.67', ha='center', va='center', size=8,
              color=BLUE)
    return figure


def _bins(margin, right):
    """(confidence, accuracy, share) of each bin of confidence; the bins are those of metrics."""
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    bins = np.minimum(9, (confidence * 10).astype(int))
    return [(confidence[bins == b].mean(), right[bins == b].mean(), (bins == b).mean())
            for b in np.unique(bins)]


def classification_reliability():
    """Confidence and accuracy, before and after temperature scaling."""
    rng = np.random.default_rng(0)
    true_margin = rng.normal(0, 1.5, 20_000)
    label = rng.random(20_000) < 1 / (1 + np.exp(-true_margin))
    margin, half = 2.2 * true_margin, 10_000
    loss = lambda t: np.logaddexp(0, np.where(label, -1, 1)[:half] * margin[:half] / t).mean()
    best = min(np.arange(1, 4, 0.01), key=loss)
    figure, axes = canvas(5.8, 2.8)
    figure.clear()
    for i, (t, title) in enumerate(((1.0, 'as it is'), (best, f'temperature {best:.2f}'))):
        axes = figure.add_subplot(1, 2, i + 1)
        shown = margin[half:] / t
        found = _bins(shown, (shown > 0) == label[half:])
        error = sum(abs(conf - acc) * share for conf, acc, share in found)
        axes.plot([0.5, 1], [0.5, 1], color='#7a7a7a', linestyle=':', lw=1)
        axes.bar([b / 10 + 0.55 for b in range(5)], [acc - 0.5 for _, acc, _ in found], 0.09,
                 bottom=0.5, color=LIGHT, edgecolor=DARK, lw=0.6)
        axes.plot([conf for conf, *_ in found], [acc for _, acc, _ in found], 'o', color=BLUE)
        axes.set(xlim=(0.5, 1), ylim=(0.5, 1), xlabel='confidence',
                 ylabel='accuracy' if i == 0 else '')
        axes.set_aspect('equal')
        axes.set_title(f'{title}: error {error:.3f}', size=9)
    return figure
