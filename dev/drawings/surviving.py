"""Figures of the chapter on surviving."""
import numpy as np
from figures import BLUE, DARK, LIGHT, ORANGE, PALE, arrow, box, canvas

GPU_HOURS = 54 * 24 * 16384 / 419       # between two failures (Dubey et al. 2024)


def surviving_interval():
    """Young's overhead for two sizes of a cluster."""
    figure, axes = canvas(5.2, 2.7)
    tau, cost = np.geomspace(60, 3600 * 48, 400), 30
    for n, color, style, above in ((64, BLUE, '-', -13), (16384, ORANGE, '--', 8)):
        mean = 3600 * GPU_HOURS / n
        axes.loglog(tau / 60, 100 * (cost / tau + tau / (2 * mean)), color=color, linestyle=style,
                    label=f'{n:,} GPUs')
        best = np.sqrt(2 * cost * mean)
        axes.plot(best / 60, 100 * np.sqrt(2 * cost / mean), 'o', color=color)
        axes.annotate(f'{best / 60:.0f} minutes', (best / 60, 100 * np.sqrt(2 * cost / mean)),
                      (0, above), textcoords='offset points', ha='center', size=8)
    axes.set(xlabel='minutes between two saves', ylabel='time lost, %', ylim=(0.2, 200))
    axes.set_xticks([1, 10, 100, 1000], ['1', '10', '100', '1,000'])
    axes.set_yticks([1, 10, 100], ['1', '10', '100'])
    axes.legend(frameon=False, loc='upper center')
    return figure


def surviving_save():
    """The order of a save, and what a kill leaves."""
    figure, axes = canvas(6.2, 2.5, x=(0, 62), y=(0, 25))
    names = ('copy\ntensors', 'write\nfiles', 'fsync,\nSHA-256\nof each', 'manifest',
             'fsync\nfolder,\nlog', 'rename', 'fsync\nrun\nfolder', 'delete\nold')
    width, gap = 6.2, 1.45
    for i, name in enumerate(names):
        x = i * (width + gap)
        box(axes, x, 10, width, 6, name, size=7, fill='#f3d9c0' if name == 'rename' else PALE)
        axes.text(x + width / 2, 17, str(i + 1), ha='center', size=7)
        if i:
            arrow(axes, (x - gap, 13), (x, 13))
    axes.text(0, 23.2, 'training', size=8, va='center')
    box(axes, 0, 19.4, width, 2.4, 'waits', size=7, fill='white')
    box(axes, width + gap, 19.4, 62 - width - gap - 1, 2.4, 'goes on with the next steps', size=7,
        fill=LIGHT)
    middle = 5 * (width + gap) + width / 2
    axes.plot([middle, middle], [2, 9.6], color=DARK, lw=0.8, linestyle=':')
    for begin, end, text in (
            (0, middle - 0.6, 'a kill here: the step before is the newest checkpoint'),
            (middle + 0.6, 61, 'a kill here: the new one')):
        axes.annotate('', (begin, 6.5), (end, 6.5), arrowprops=dict(
            arrowstyle='<->', color=DARK, lw=0.8, shrinkA=0, shrinkB=0))
        axes.text((begin + end) / 2, 4, text, ha='center', va='center', size=8)
    return figure
