"""Figures of the chapter on evaluation."""
import math

import numpy as np
from figures import BLUE, DARK, LIGHT, ORANGE, arrow, box, canvas, plt

Z = 1.959964


def evaluation_branches():
    """The mask of a context and two choices in one row."""
    names = ['c1', 'c2', 'c3', 'c4', 'a1', 'a2', 'b1', 'b2', 'b3']
    branch, position = [0] * 4 + [1] * 2 + [2] * 3, [0, 1, 2, 3, 4, 5, 4, 5, 6]
    fills = {0: LIGHT, 1: '#8fa6bd', 2: '#f0c9a4'}
    figure, axes = canvas(4.0, 3.2, x=(-2.6, 9.2), y=(-1.2, 10.1))
    for i, name in enumerate(names):
        for j in range(9):
            seen = branch[j] in (0, branch[i]) and position[j] <= position[i]
            box(axes, j, 8 - i, 1, 1, fill=fills[branch[j]] if seen else 'white')
        axes.text(-0.2, 8.5 - i, f'{name} sees', ha='right', va='center', size=8)
        axes.text(i + 0.5, 9.4, name, ha='center', va='center', size=8)
        axes.text(i + 0.5, -0.5, str(position[i]), ha='center', va='center', size=8)
    axes.text(-0.2, -0.5, 'position', ha='right', va='center', size=8)
    return figure


def evaluation_sandbox():
    """Two processes and a pipe."""
    figure, axes = canvas(6.0, 2.2, x=(0, 60), y=(0, 22))
    for x, title in ((1, "the program's process"), (37, "the checker's process")):
        axes.add_patch(plt.Rectangle((x, 2), 22, 16, facecolor='white', edgecolor=DARK, lw=0.8,
                                     linestyle='--'))
        axes.text(x + 11, 19.4, title, ha='center', va='center', size=8)
    box(axes, 3, 7, 18, 7, 'def f(x): ...\nwritten by the model', size=8)
    box(axes, 39, 11, 18, 5, 'check(f): assert f(1) == 2', size=7.5)
    box(axes, 39, 4.5, 18, 4.5, 'f sends its arguments', size=7.5)
    arrow(axes, (48, 11), (48, 9))
    arrow(axes, (38.9, 7.8), (21.2, 11.5))
    arrow(axes, (21.2, 9), (38.9, 5.4))
    axes.text(30, 12.2, 'arguments, JSON', ha='center', size=7.5)
    axes.text(30, 4.2, 'plain values, JSON', ha='center', size=7.5)
    axes.text(48, 0.6, 'verdict: passed, or what failed', ha='center', va='center', size=8)
    return figure


def _wilson(k, n):
    p, z2 = k / n, Z ** 2
    middle, half = p + z2 / (2 * n), Z * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def evaluation_coverage():
    """Exact coverage of two intervals for 30 questions."""
    n, p = 30, np.linspace(0.005, 0.995, 397)
    k = np.arange(n + 1)
    chance = np.array([math.comb(n, i) for i in k])[:, None] * p ** k[:, None] * (
        1 - p) ** (n - k[:, None])
    share = k / n
    half = Z * np.sqrt(share * (1 - share) / n)
    figure, axes = canvas(5.4, 2.3)
    for (low, high), name, color, style in ((_wilson(k, n), "Wilson's", BLUE, '-'),
                                            ((share - half, share + half), 'usual', ORANGE, '--')):
        inside = (low[:, None] <= p) & (p <= high[:, None])
        axes.plot(p, (chance * inside).sum(axis=0), color=color, linestyle=style, label=name,
                  lw=1.2)
    axes.axhline(0.95, color='#7a7a7a', linestyle=':', lw=1)
    axes.set(xlabel='true share p', ylabel='holds p', ylim=(0.7, 1.005), xlim=(0, 1))
    axes.set_yticks([0.7, 0.8, 0.9, 0.95, 1])
    axes.legend(frameon=False, loc='lower center')
    return figure


def evaluation_power():
    """Power of a paired comparison of 3 points."""
    figure, axes = canvas(5.4, 2.4)
    n, d = np.geomspace(50, 10_000, 300), 0.03
    for disagree, style, color in ((0.05, '-', BLUE), (0.1, '--', ORANGE), (0.2, '-.', DARK)):
        z = np.sqrt(n) * d / math.sqrt(disagree - d * d) - Z
        axes.semilogx(n, [0.5 * math.erfc(-x / math.sqrt(2)) for x in z], style, color=color,
                      label=f'{disagree:.0%}')
    axes.axhline(0.8, color='#7a7a7a', linestyle=':', lw=1)
    axes.set(xlabel='questions', ylabel='power', ylim=(0, 1.02))
    axes.set_xticks([100, 1000, 10000], ['100', '1,000', '10,000'])
    axes.legend(frameon=False, title='answered differently', loc='lower right', fontsize=8,
                title_fontsize=8)
    return figure
