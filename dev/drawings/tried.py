"""Figures of the chapter on what was tried. The numbers are those of docs/LOG.md, in the sections
"config/austen.py: the rate of the embedding" and "Speed before and after the rebuilding"."""
from figures import BLUE, DARK, ORANGE, canvas

STEPS = (200, 600, 1000, 1200)
LOW, HIGH = (1.7728, 1.5453, 1.4359, 1.3930), (1.7904, 1.5607, 1.4521, 1.4060)
SHORT = 1.7465, 1.7253
# Ratios of the new code to the old, and of the old to a copy of itself.
RATIOS = {'small,\neager': ((0.95, 0.98, 0.89, 1.02), (1.03, 0.95, 0.98)),
          'small,\ncompiled': ((0.97, 1.03, 0.96, 0.92), (0.96, 1.06, 0.99)),
          '125m,\neager': ((0.95, 0.96, 0.87), (1.03, 1.02)),
          '125m,\ncompiled': ((0.96, 0.99, 0.98), (1.02, 0.89))}


def tried_rate():
    """A short run and a long one rank two rates differently."""
    figure, axes = canvas(5.2, 2.6)
    axes.plot(STEPS, HIGH, '--', marker='s', ms=4, color=ORANGE)
    axes.plot(STEPS, LOW, '-', marker='o', ms=4, color=BLUE)
    axes.plot([200], SHORT[1:], 's', ms=6, color='white', markeredgecolor=ORANGE)
    axes.plot([200], SHORT[:1], 'o', ms=6, color='white', markeredgecolor=BLUE)
    axes.annotate('runs of 200 steps', (192, 1.735), (30, 1.64), size=8,
                  arrowprops=dict(arrowstyle='-', lw=0.6, color=DARK))
    axes.text(620, 1.585, 'rate 0.01', size=8, color=ORANGE)
    axes.text(590, 1.5, 'rate 0.003', size=8, color=BLUE, ha='right')
    axes.set(xlabel='step', ylabel='bits per byte', xlim=(0, 1260))
    return figure


def tried_same():
    """Ratios of speed of two versions, beside those of equal code."""
    figure, axes = canvas(5.6, 2.5)
    for i, both in enumerate(RATIOS.values()):
        for found, shift, marker, color in zip(both, (-0.14, 0.14), 'os', (BLUE, ORANGE)):
            axes.plot([i + shift] * len(found), found, marker, ms=5, color=color, alpha=0.85)
    axes.plot([], [], 'o', ms=5, color=BLUE, label='new against old')
    axes.plot([], [], 's', ms=5, color=ORANGE, label='old against itself')
    axes.axhline(1, lw=0.8, ls=':', color=DARK)
    axes.set_xticks(range(len(RATIOS)), list(RATIOS))
    axes.set(ylabel='ratio of speed', ylim=(0.84, 1.12), xlim=(-0.5, 3.5))
    axes.legend(frameon=False, fontsize=8, loc='upper right', ncols=2)
    return figure
