"""Figures of the chapter on data."""
import numpy as np
from figures import BLUE, DARK, LIGHT, ORANGE, PALE, arrow, box, canvas
from matplotlib import pyplot as plt

from core.text import clean

# The example of the chapter: two sets, six hash functions (a x + b) mod 7.
FIRST, SECOND = {1, 2, 3, 4}, {1, 2, 5, 6}
FUNCTIONS = [(2, 1), (3, 2), (5, 3), (4, 3), (6, 2), (1, 3)]
BOTH, ONE, OTHER = '#8fa6bd', '#e6ebf0', '#f3d9c3'


def data_pipeline():
    """The steps from files to shards, and what leaves at each."""
    figure, axes = canvas(6.2, 2.05, x=(-0.1, 15.6), y=(0.1, 5.1))
    steps = [('read', 'files to\ndocuments', 'what cannot\nbe read'),
             ('clean', 'one form,\nmasks, rules', 'bad text,\nbenchmarks'),
             ('duplicates', 'equal, then\nsimilar', 'all but\none'),
             ('split', 'train and\nvalidation', ''),
             ('tokenizer', 'learn it from\ntrain', ''),
             ('encode', 'text to ids,\nshards', ''),
             ('report', 'what was\nremoved', '')]
    for i, (name, what, gone) in enumerate(steps):
        x = 2.24 * i
        box(axes, x, 2.4, 1.95, 2.6)
        axes.text(x + 0.97, 4.45, name, ha='center', va='center', size=8.5)
        axes.text(x + 0.97, 3.3, what, ha='center', va='center', size=7)
        if i:
            arrow(axes, (x - 0.29, 3.7), (x, 3.7))
        if gone:
            arrow(axes, (x + 0.97, 2.4), (x + 0.97, 1.35), color=ORANGE)
            axes.text(x + 0.97, 0.6, gone, ha='center', va='center', size=7, color=DARK)
    return figure


def data_minhash():
    """The union of two sets in the order of each of six hash functions."""
    figure, axes = canvas(4.9, 2.55, x=(-3.4, 11.6), y=(-0.9, 7.2))
    for row, (a, b) in enumerate(FUNCTIONS):
        y = 5.5 - 1.05 * row
        order = sorted(FIRST | SECOND, key=lambda x: (a * x + b) % 7)
        axes.text(-0.25, y + 0.45, f'({a if a > 1 else ""}x + {b}) mod 7', ha='right', va='center',
                  size=8)
        for i, x in enumerate(order):
            fill = BOTH if x in FIRST & SECOND else ONE if x in FIRST else OTHER
            box(axes, i * 1.05, y, 0.95, 0.9, str(x), fill=fill, size=8)
        agree = order[0] in FIRST & SECOND
        axes.text(6.6, y + 0.45, 'least values agree' if agree else 'they differ', va='center',
                  size=8, weight='bold' if agree else 'normal')
    axes.text(0.47, 6.75, 'first', ha='center', size=8)
    for x, fill, text in ((-2.2, BOTH, 'in both sets'), (2.2, ONE, 'in the first only'),
                          (7.0, OTHER, 'in the second only')):
        box(axes, x, -0.85, 0.5, 0.5, fill=fill)
        axes.text(x + 0.65, -0.6, text, va='center', size=8)
    return figure


def _pair(rng, similarity: float):
    """The signatures of two random sets of so many common members, of 200 in all."""
    both = round(200 * similarity)
    members = rng.integers(0, 2 ** 63, 200, dtype=np.uint64)
    alone = (200 - both) // 2
    sets = members[:both + alone], np.concatenate([members[:both], members[both + alone:]])
    return [clean.minhash(some) for some in sets]


def data_bands():
    """How near the estimate is, and which pairs become candidates."""
    rng, grid = np.random.default_rng(0), np.linspace(0.1, 0.9, 17)
    bands, rows = clean.bands_and_rows(0.7)
    estimates, shares = [], []
    for similarity in grid:
        pairs = [_pair(rng, similarity) for _ in range(400)]
        estimates.append([(a == b).mean() for a, b in pairs])
        shares.append(np.mean([(clean.band_hashes(a, bands, rows) ==
                                clean.band_hashes(b, bands, rows)).any() for a, b in pairs]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.2, 2.6), layout='constrained')
    left.plot([0, 1], [0, 1], color=LIGHT, lw=1, ls='-')
    for similarity, found in zip(grid, estimates):
        left.plot([similarity] * 400, found, '.', color=BLUE, ms=1.5)
    left.set(xlabel='Jaccard similarity', ylabel='equal values of 128', xlim=(0, 1), ylim=(0, 1))
    x = np.linspace(0, 1, 200)
    right.plot(x, 1 - (1 - x ** rows) ** bands, color=BLUE, ls='-', label='by the equation')
    right.plot(grid, shares, 'o', color=ORANGE, ms=3.5, ls='none', label='400 pairs each')
    right.axvline(0.7, color=DARK, lw=0.8, ls=':')
    right.set(xlabel='Jaccard similarity', ylabel='share that is compared', xlim=(0, 1),
              ylim=(0, 1.03))
    right.legend(fontsize=7, frameon=False, loc='upper left')
    for axes in (left, right):
        axes.tick_params(labelsize=8)
    return figure


def data_ring():
    """Eleven tokens as a ring of ten inputs, cut into windows of four from place 7 on."""
    figure, axes = canvas(4.9, 1.95, x=(-3.3, 12.2), y=(-3.0, 3.1))
    shades = ['#cfd9e4', PALE, '#f3d9c3']
    for place in range(10):
        angle = np.pi / 2 - 2 * np.pi * place / 10
        window = (place - 7) % 10 // 4
        x, y = 2.2 * np.cos(angle), 2.2 * np.sin(angle)
        box(axes, x - 0.45, y - 0.45, 0.9, 0.9, str(place), fill=shades[window], size=9)
    for after in (6, 0, 4):     # a window ends behind this place
        angle = np.pi / 2 - 2 * np.pi * (after + 0.5) / 10
        axes.plot(*([r * f(angle) for r in (1.5, 2.9)] for f in (np.cos, np.sin)), color=DARK,
                  lw=1.2, ls='-')
    for window, middle in ((0, 8.5), (1, 2.5), (2, 5.5)):
        angle = np.pi / 2 - 2 * np.pi * middle / 10
        axes.text(1.05 * np.cos(angle), 1.05 * np.sin(angle), str(window), ha='center',
                  va='center', size=10, weight='bold')
    for row, (window, inputs, targets) in enumerate((
            (2, (5, 6), (6, 7)), (0, (7, 8, 9, 0), (8, 9, 10, 1)),
            (1, (1, 2, 3, 4), (2, 3, 4, 5)))):
        y = 1.0 - 1.3 * row
        axes.text(4.1, y + 0.45, f'sample {row}: window {window}', va='center', size=8)
        for i, (given, wanted) in enumerate(zip(inputs, targets)):
            box(axes, 8.1 + i, y, 0.95, 0.9, fill=shades[window])
            axes.text(8.57 + i, y + 0.45, f'{given}→{wanted}', ha='center', va='center', size=7)
    axes.text(10.1, 2.25, 'input → target', ha='center', size=8)
    return figure
