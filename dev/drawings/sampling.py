"""Figures of the chapter on sampling."""
import numpy as np
from figures import BLUE, DARK, LIGHT, PALE, arrow, box, canvas

LOGITS = np.array([2.0, 1.0, 0.5, -1.0])
WORDS = 'mat', 'sofa', 'roof', 'moon'


def _softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def sampling_filters():
    """The example's probabilities under each rule."""
    p = _softmax(LOGITS)
    keep = lambda kept: np.where(kept, p, 0) / p[kept].sum()
    before = np.cumsum(p) - p
    panels = [('temperature 1', p), ('temperature 0.5', _softmax(LOGITS / 0.5)),
              ('temperature 2', _softmax(LOGITS / 2)), ('top-k, k = 2', keep(np.arange(4) < 2)),
              ('top-p, p = 0.9', keep(before < 0.9)), ('min-p, p = 0.2', keep(p >= 0.2 * p[0]))]
    figure, axes = canvas(6.2, 3.3)
    figure.clear()
    for i, (title, values) in enumerate(panels):
        axes = figure.add_subplot(2, 3, i + 1)
        axes.bar(WORDS, values, color=BLUE, width=0.7)
        axes.bar(WORDS, np.where(values == 0, p, 0), color='white', edgecolor='#7a7a7a', width=0.7,
                 linestyle='--', lw=0.8)
        for x, value in enumerate(values):
            if value:
                axes.text(x, value + 0.02, f'{value:.3f}', ha='center', size=7)
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.5, 1], ['0', '0.5', '1'] if i % 3 == 0 else ['', '', ''], size=8)
        axes.tick_params(axis='x', labelsize=8)
        axes.set_title(title, size=9)
    return figure


def _schedule(lengths, slots, fixed):
    """(slot, first step, length, number) of each request."""
    free, found = [0] * slots, []
    for number, length in enumerate(lengths):
        if fixed and number % slots == 0:
            free = [max(free)] * slots
        slot = number % slots if fixed else free.index(min(free))
        found.append((slot, free[slot], length, number))
        free[slot] += length
    return found


def sampling_slots():
    """Fixed batches above, continuous batching below."""
    figure, axes = canvas(6.2, 2.7, x=(-2.3, 11.4), y=(-0.9, 5.5))
    fills = '#8fa6bd', LIGHT, '#dbe3ea', '#f3d9c0'
    for fixed, bottom in ((True, 3.1), (False, 0.0)):
        found = _schedule((2, 8, 3, 3), 2, fixed)
        end = max(first + length for _, first, length, _ in found)
        for slot in range(2):
            box(axes, 0, bottom + (1 - slot) * 0.9, end, 0.8, fill='white')
            axes.text(-0.15, bottom + (1 - slot) * 0.9 + 0.4, f'slot {slot + 1}', ha='right',
                      va='center', size=8)
        for slot, first, length, number in found:
            for t in range(length):
                box(axes, first + t, bottom + (1 - slot) * 0.9, 1, 0.8,
                    f'{"ABCD"[number]}{t + 1}', fill=fills[number], size=8)
        axes.text(0, bottom + 1.95, 'fixed batches' if fixed else 'continuous batching', size=8)
    for t in range(11):
        axes.text(t + 0.5, -0.35, str(t + 1), ha='center', va='center', size=7)
    axes.text(-0.15, -0.35, 'step', ha='right', va='center', size=8)
    return figure


def sampling_draft():
    """One pass over the last id and a draft."""
    figure, axes = canvas(6.2, 2.2, x=(-2.6, 13.2), y=(-0.4, 5.2))
    ids, draft, drawn = [5, 7, 9, 2, 4, 5, 7, 9], [2, 4, 5, 7], [2, 4, 8, 1, 3]
    for x, i in enumerate(ids):
        box(axes, x, 3.6, 0.9, 0.9, str(i), fill='#f3d9c0' if x in (0, 1, 2, 5, 6, 7) else PALE)
    for x, i in enumerate(draft, 8):
        box(axes, x, 3.6, 0.9, 0.9, str(i), fill='white', color=BLUE)
    for x, i in enumerate(drawn, 7):
        kept = x < 10
        box(axes, x, 1.2, 0.9, 0.9, str(i), fill='#8fa6bd' if kept else 'white',
            color=DARK if kept else '#8a8a8a')
        arrow(axes, (x + 0.45, 3.55), (x + 0.45, 2.15), color=DARK if kept else '#9a9a9a')
    axes.text(-0.2, 4.05, 'ids and draft', ha='right', va='center', size=8)
    axes.text(-0.2, 1.65, 'drawn', ha='right', va='center', size=8)
    axes.text(4.0, 4.75, 'so far', ha='center', size=8)
    axes.text(10.0, 4.75, 'draft', ha='center', size=8, color=BLUE)
    axes.text(8.45, 0.7, 'kept', ha='center', va='center', size=8)
    axes.text(10.95, 0.7, 'thrown away', ha='center', va='center', size=8, color='#6a6a6a')
    axes.text(9.45, 0.05, '8 is not the draft\'s 5', ha='center', va='center', size=7)
    return figure
