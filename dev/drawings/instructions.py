"""Figures of the chapter on instruction tuning."""
import numpy as np
from figures import BLUE, DARK, LIGHT, PALE, box, canvas

USER, SAID, END = '<|user|>', '<|assistant|>', '<|end|>'
TALKS = ([USER, '2', '+', '2', '?', END, SAID, '4', END],
         [USER, 'H', 'i', END, SAID, 'Y', 'o', END])
LEARNT = ((7, 8), (5, 6, 7))        # which ids of the two conversations the assistant says


def _names(axes, x, y, width, text, fill, color=DARK):
    """A box with the name of a token, short enough to be read: a role's is turned."""
    short = {USER: 'user', SAID: 'assistant', END: 'end'}.get(text, text)
    box(axes, x, y, width, 1.5, fill=fill)
    axes.text(x + width / 2, y + 0.75, short, ha='center', va='center', color=color,
              rotation=90 if len(short) > 1 else 0, size=7 if len(short) > 1 else 8.5)


def instructions_masked():
    """Inputs, targets and documents of two packed conversations."""
    figure, axes = canvas(6.2, 2.3, x=(-2.1, 16.1), y=(-1.15, 5.6))
    x, y, doc = [], [], []
    for number, (ids, learnt) in enumerate(zip(TALKS, LEARNT)):
        x += ids[:-1]
        y += [(text, i in learnt) for i, text in enumerate(ids)][1:]
        doc += [number] * (len(ids) - 1)
    for i, (now, (then, counts)) in enumerate(zip(x, y)):
        _names(axes, i, 3.3, 1, now, '#dde5ec' if doc[i] == 0 else PALE)
        _names(axes, i, 0.6, 1, then, BLUE if counts else 'white', 'white' if counts else '#8a8a8a')
        axes.annotate('', (i + 0.5, 2.15), (i + 0.5, 3.25),
                      arrowprops=dict(arrowstyle='->', color=DARK if counts else LIGHT, lw=1))
        axes.text(i + 0.5, 0.1, '1' if counts else '0', ha='center', va='center', size=8)
        axes.text(i + 0.5, -0.7, str(doc[i]), ha='center', va='center', size=8)
    for y_ in (3.3, 0.6):
        box(axes, 15, y_, 1, 1.5, fill='white')
    axes.text(15.5, 0.1, '0', ha='center', va='center', size=8)
    axes.text(15.5, -0.7, '−1', ha='center', va='center', size=8)
    for y_, what in ((4.05, 'input'), (1.35, 'target'), (0.1, 'weight'), (-0.7, 'doc')):
        axes.text(-0.25, y_, what, ha='right', va='center', size=8)
    for at, width, what in ((0, 8, 'first conversation'), (8, 7, 'second conversation')):
        axes.plot([at + 0.1, at + width - 0.1], [5.0, 5.0], '-', color=DARK, lw=0.8)
        axes.text(at + width / 2, 5.15, what, ha='center', va='bottom', size=8)
    return figure


def instructions_packed():
    """Rows without and with packing, and a packed row's mask."""
    figure, axes = canvas(6.2, 2.35, x=(-0.1, 20.6), y=(-0.5, 7.0))
    fills = ('#9db4c8', '#c3d0db', '#7f98ad', '#dde5ec', '#b1c3d2')

    def row(x, y, size, members):
        box(axes, x, y, size * 0.7, 0.75, fill='white')
        for number, length in members:
            box(axes, x, y, length * 0.7, 0.75, str(length), fill=fills[number], size=8)
            x += length * 0.7
    for i, length in enumerate((5, 4, 3, 2, 2)):
        row(0, 4.7 - i, 5, [(i, length)])
    axes.text(1.75, 5.85, 'one in each row', ha='center', size=8)
    row(5.2, 4.7, 8, [(0, 5), (2, 3)])
    row(5.2, 3.7, 8, [(1, 4), (3, 2), (4, 2)])
    axes.text(8.0, 5.85, 'packed', ha='center', size=8)
    doc, side = np.repeat([0, 1], (5, 3)), 0.7
    for q in range(8):
        for k in range(8):
            seen = k <= q and doc[q] == doc[k]
            box(axes, 13.6 + k * side, 4.8 - q * side, side, side,
                fill=fills[0 if doc[q] == 0 else 2] if seen else 'white')
    axes.text(13.6 + 4 * side, 5.85, 'keys of the first packed row', ha='center', size=8)
    axes.text(13.3, 5.5 - 4 * side, 'queries', ha='right', va='center', size=8)
    return figure
