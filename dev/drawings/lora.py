"""Figures of the chapter on LoRA."""
import numpy as np
from figures import BLUE, DARK, ORANGE, arrow, box, canvas
from matplotlib.patches import Circle


def lora_layer():
    """A frozen matrix, and the two thin ones beside it."""
    figure, axes = canvas(5.4, 2.25, x=(-0.4, 11.6), y=(0.1, 5.1))
    box(axes, 0.1, 1.4, 0.5, 2.4, 'x', fill='white')
    box(axes, 2.6, 2.9, 2.6, 1.9, 'W\nfrozen', fill='#dde5ec')
    box(axes, 2.6, 0.55, 2.6, 0.55, 'A', fill=BLUE, color='white')
    box(axes, 6.2, 0.2, 0.55, 1.9, 'B', fill=BLUE, color='white')
    axes.text(3.9, 1.3, 'learns', ha='center', size=8)
    axes.text(6.48, 2.3, 'learns', ha='center', size=8)
    axes.text(3.9, 0.2, 'r rows', ha='center', size=8)
    arrow(axes, (0.6, 3.0), (2.6, 3.85))
    arrow(axes, (0.6, 2.2), (2.6, 0.85))
    arrow(axes, (5.2, 0.82), (6.2, 0.82))
    axes.text(5.7, 0.95, 'r', ha='center', size=8)
    axes.add_patch(Circle((8.9, 2.6), 0.28, facecolor='white', edgecolor=DARK, lw=0.8))
    axes.text(8.9, 2.6, '+', ha='center', va='center', size=11)
    arrow(axes, (5.2, 3.85), (8.62, 2.75))
    arrow(axes, (6.75, 1.0), (8.62, 2.42))
    axes.text(7.75, 1.1, 'times α / r', ha='left', size=8)
    box(axes, 10.4, 1.65, 0.5, 1.9, 'y', fill='white')
    arrow(axes, (9.18, 2.6), (10.4, 2.6))
    return figure


def lora_ranks():
    """The error of adapters that learn a known change, with the bound of Eckart and Young."""
    rng, size = np.random.default_rng(0), 32
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2))
    sigma = 0.5 ** np.arange(size)
    change = left @ np.diag(sigma) @ right
    figure, axes = canvas(5.4, 2.6)
    for rank, color, style in ((1, DARK, '-'), (2, BLUE, '--'), (4, ORANGE, '-.')):
        generator = np.random.default_rng(1)
        A, B = generator.uniform(-1, 1, (rank, size)) / size ** 0.5, np.zeros((size, rank))
        moments, found = [np.zeros((2, *p.shape)) for p in (A, B)], []
        for step in range(1, 301):
            rest = B @ A - change
            found.append((rest ** 2).sum() / (change ** 2).sum())
            for p, m, g in ((A, moments[0], B.T @ rest), (B, moments[1], rest @ A.T)):
                m[0], m[1] = 0.9 * m[0] + 0.1 * g, 0.99 * m[1] + 0.01 * g ** 2
                fast = m[0] / (1 - 0.9 ** step) / (np.sqrt(m[1] / (1 - 0.99 ** step)) + 1e-8)
                p -= 0.02 * min(1, 2 * (1 - step / 301)) * fast
        axes.plot(found, style, color=color)
        axes.text(304, found[-1], f'r = {rank}', va='center', size=8, color=color)
        axes.axhline((sigma[rank:] ** 2).sum() / (sigma ** 2).sum(), ls=':', lw=0.9, color=color)
    axes.set(yscale='log', xlabel='step', ylabel='error, part of the change', xlim=(0, 300))
    return figure
