"""Figures of the chapter on quantization and GGUF."""
import numpy as np
from figures import BLUE, DARK, LIGHT, ORANGE, PALE, box, canvas


def quantization_roof():
    """Tokens per second that memory and arithmetic allow."""
    figure, axes = canvas(5.2, 2.7)
    n, rows = 123_689_472, np.geomspace(1, 128, 200)
    for bits, color, style, at, text in ((32, DARK, '-', (6.4, 195), '32 bits'),
                                         (8, BLUE, '--', (2.2, 265), '8 bits'),
                                         (5, ORANGE, '-.', (1.08, 600), 'int4: 5 bits')):
        slope = rows / (n * bits / 8 / 20e9)
        axes.plot(rows, np.minimum(slope, 200e9 / (2 * n)), style, color=color)
        edge = bits / 8 * 200e9 / (2 * 20e9)
        axes.plot([edge], [200e9 / (2 * n)], 'o', color=color, ms=4)
        axes.text(*at, text, size=8, color=color)
    axes.set(xscale='log', yscale='log', xlabel='rows at a time', ylabel='tokens per second',
             ylim=(20, 1500), xlim=(1, 128))
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ['1', '2', '4', '8', '16', '32', '64', '128'])
    axes.set_yticks([30, 100, 300, 1000], ['30', '100', '300', '1,000'])
    axes.minorticks_off()
    return figure


def _error(weights, size):
    """Relative error of 4 bits in groups of `size`, with scale and zero."""
    groups = weights.reshape(-1, size)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    step = (high - low) / 15
    return ((np.round((groups - low) / step) * step + low - groups) ** 2).mean() ** 0.5 \
        / (weights ** 2).mean() ** 0.5


def quantization_error():
    """The error of one weight, and of many over the size of groups."""
    figure, _ = canvas(6.2, 2.5)
    figure.clear()
    left, right = figure.subplots(1, 2)
    w = np.linspace(-1, 0.875, 3001)
    left.plot(w, np.round(w * 8) / 8 - w, '-', color=BLUE, lw=1)
    for y in (-1 / 16, 1 / 16):
        left.axhline(y, ls=':', lw=0.8, color=DARK)
    left.text(0.9, 1 / 16 + 0.004, 's / 2', ha='right', size=8)
    left.set(xlabel='weight', ylabel='error', ylim=(-0.085, 0.085))
    rng, sizes = np.random.default_rng(0), 2 ** np.arange(3, 13)
    weights = rng.standard_normal(1 << 19)
    outliers = np.where(rng.random(1 << 19) < 0.001, 10, 1) * weights
    for values, style, color in ((weights, '-', BLUE), (outliers, '--', ORANGE)):
        right.plot(sizes, [_error(values, size) for size in sizes], style, color=color)
    right.plot([32], [_error(weights, 32)], 'o', color=DARK, ms=4)
    right.set(xscale='log', xlabel='weights in a group', ylabel='error, part of the size',
              ylim=(0, None))
    right.set_xticks([8, 32, 128, 512, 2048], ['8', '32', '128', '512', '2,048'])
    right.minorticks_off()
    return figure


def quantization_gguf():
    """The parts of a file, and what a field and a tensor's entry hold."""
    figure, axes = canvas(6.2, 2.9, x=(0, 15.5), y=(-0.1, 7.15))
    parts = ((0.2, 2.2, 'head\n24 bytes', LIGHT), (2.4, 3.4, 'fields', '#dde5ec'),
             (5.8, 3.2, 'tensors', LIGHT), (9.0, 0.9, '', 'white'),
             (9.9, 2.5, 'data of\ntensor 0', PALE),
             (12.4, 2.9, 'data of tensor 1, ...', PALE))
    for x, width, text, fill in parts:
        box(axes, x, 3.2, width, 1.3, text, fill=fill, size=8)
    axes.text(9.45, 2.85, 'zeros', ha='center', va='center', size=7.5)
    axes.plot([9.9, 9.9], [4.5, 6.6], ':', color=DARK, lw=0.9)
    axes.text(10.0, 6.45, 'a multiple of 32', va='center', size=7.5)

    def zoom(begin, end, left, right, y, down):
        for a, b in ((begin, left), (end, right)):
            axes.plot([a, b], [4.5, y] if not down else [3.2, y], '-', color=DARK, lw=0.6)
    cells = ((0.2, 1.1, 'GGUF'), (1.3, 1.3, 'version\n4 bytes'), (2.6, 1.5, 'tensors\n8 bytes'),
             (4.1, 1.5, 'fields\n8 bytes'))
    zoom(0.2, 2.4, 0.2, 5.6, 5.5, False)
    for x, width, text in cells:
        box(axes, x, 5.5, width, 1.3, text, fill='white', size=7)
    zoom(2.4, 5.8, 0.2, 6.2, 2.0, True)
    for x, width, text in ((0.2, 2.5, 'key\n(string)'), (2.7, 1.3, 'type\n4 bytes'),
                           (4.0, 2.2, 'value')):
        box(axes, x, 0.7, width, 1.3, text, fill='white', size=7)
    axes.text(3.2, 0.3, 'a field', ha='center', va='center', size=8)
    zoom(5.8, 9.0, 7.0, 15.3, 2.0, True)
    for x, width, text in ((7.0, 1.7, 'name\n(string)'), (8.7, 1.6, 'how many\n4 bytes'),
                           (10.3, 2.2, 'dimensions\n8 bytes each'), (12.5, 1.35, 'type\n4 bytes'),
                           (13.85, 1.45, 'place\n8 bytes')):
        box(axes, x, 0.7, width, 1.3, text, fill='white', size=7)
    axes.text(11.15, 0.3, 'the entry of a tensor', ha='center', va='center', size=8)
    return figure
