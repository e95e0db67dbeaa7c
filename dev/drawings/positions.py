"""Figures of the chapter on embeddings and positions."""
import json
import math

import numpy as np
import torch
from figures import BLUE, DARK, DATA, LIGHT, ORANGE, arrow, canvas, plt

from model import rope_tables, sinusoid

DATA_FILES = ('embeddings.json',)


def _apart(places, widths, height, width):
    """Places of labels, moved until none overlaps another one."""
    places = np.array(places, float)
    for _ in range(300):
        moved = False
        for i in range(len(places)):
            for j in range(i):
                gap = places[i] - places[j]
                over = np.array([(widths[i] + widths[j]) / 2, height]) - np.abs(gap)
                if (over > 1e-9).all():
                    axis = int(over[0] / width > over[1] / height)    # the shorter way
                    push = over[axis] / 2 * (1 if gap[axis] >= 0 else -1)
                    places[i, axis] += push
                    places[j, axis] -= push
                    moved = True
        if not moved:
            break
    return places


def positions_embeddings():
    """Characters of a trained model in the plane; the data are made by dev/pictures.py."""
    found = json.loads((DATA / 'embeddings.json').read_text())
    names = {'\n': 'newline', ' ': 'space'}
    figure, axes = canvas(6.2, 4.0)
    # special tokens have longer names; the text does not have them
    shown = [(c, place) for c, place in zip(found['characters'], found['places']) if len(c) == 1]
    labels = [names.get(c, c) for c, _ in shown]
    apart = _apart([place for _, place in shown], [0.27 * len(label) for label in labels], 0.62,
                   0.27)
    for (character, _), label, (x, y) in zip(shown, labels, apart):
        color = ORANGE if character in 'aeiouAEIOU' else BLUE if character.isalpha() else DARK
        axes.text(x, y, label, size=9, color=color, ha='center', va='center', family='monospace',
                  weight='bold' if color == ORANGE else 'normal')
    x, y = np.array(found['places']).T
    axes.set(xlim=(x.min() - 0.5, x.max() + 0.5), ylim=(y.min() - 0.5, y.max() + 0.5),
             xlabel='first principal axis', ylabel='second principal axis')
    return figure


def positions_sinusoid():
    """The codes of 64 positions, and their products by distance."""
    code = sinusoid(torch.arange(64), 32)
    figure, (axes, products) = plt.subplots(1, 2, figsize=(6.2, 2.2), layout='constrained')
    image = axes.imshow(code.T, cmap='Greys', aspect='auto', interpolation='nearest')
    axes.set(xlabel='position', ylabel='channel')
    axes.spines[['top', 'right']].set_visible(True)
    figure.colorbar(image, ax=axes, ticks=(-1, 0, 1))
    for start in (10, 40):
        distance = np.arange(-start, 64 - start)
        products.plot(distance, code[start] @ code.T, label=f'$t = {start}$',
                      lw=1.2 if start == 40 else 2.4)
    products.set(xlabel='$s - t$', ylabel='$p_t \\cdot p_s$')
    products.legend(frameon=False)
    return figure


def positions_rotation():
    """A query and a key of two channels at three pairs of positions."""
    figure, all_axes = plt.subplots(1, 3, figsize=(6.2, 1.7), layout='constrained')
    for axes, (m, n) in zip(all_axes, ((0, 0), (2, 1), (7, 6))):
        axes.set(xlim=(-1.75, 1.75), ylim=(-0.45, 1.75))
        axes.set_aspect('equal')
        axes.axis('off')
        axes.axhline(0, color=LIGHT, lw=0.6, ls='-')
        axes.axvline(0, color=LIGHT, lw=0.6, ls='-')
        q, k = m, n + math.pi / 4
        for angle, length, name, color, side in (
                (q, 1.0, f'$q$ at {m}', BLUE, -1 if q < k else 1),
                (k, 2 ** 0.5, f'$k$ at {n}', ORANGE, 1 if q < k else -1)):
            x, y = length * math.cos(angle), length * math.sin(angle)
            arrow(axes, (0, 0), (x, y), color=color)
            # beside the tip, on the side that is away from the other arrow
            away = angle + side * math.pi / 2
            axes.text(x + 0.25 * math.cos(away) + 0.12 * math.cos(angle),
                      y + 0.2 * math.sin(away) + 0.12 * math.sin(angle), name, color=color, size=8,
                      ha='left' if math.cos(away) > 0.3 else 'right' if math.cos(away) < -0.3
                      else 'center', va='center')
        between = np.linspace(*sorted((q, k)), 40)
        axes.plot(0.42 * np.cos(between), 0.42 * np.sin(between), color=DARK, lw=0.9, ls='-')
        # the product of lengths, and the cosine of the angle between them
        axes.set_title(f'angle {abs(math.degrees(q - k)):.1f}°, '
                       f'product {2 ** 0.5 * math.cos(q - k):.3f}', size=8)
    return figure


def positions_wavelengths():
    """Positions per turn of each pair of channels, for heads of 128 channels."""
    figure, axes = canvas(6.2, 2.9)
    for theta, scaling, name in ((10_000, '', 'base 10,000'), (500_000, '', 'base 500,000'),
                                 (500_000, '8,1,4,8192', 'base 500,000, scaled as in Llama 3.1')):
        cos, sin = rope_tables(torch.tensor([1]), 128, theta, scaling)
        axes.plot(2 * math.pi / torch.atan2(sin, cos)[0], label=name)
    for context in (8192, 131_072):
        axes.axhline(context, color=DARK, lw=0.6, ls='-')
        axes.text(0, context * 1.15, f'context {context:,}', size=8)
    axes.set(yscale='log', xlabel='pair of channels $i$', ylabel='positions per turn')
    axes.legend(frameon=False, loc='lower right', fontsize=8)
    return figure
