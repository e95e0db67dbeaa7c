"""Figures of the chapter on many processes."""
from figures import BLUE, DARK, LIGHT, PALE, arrow, box, canvas, plt

SOFT = '#f0d9c3'        # a light orange


def _ring(values):
    """The states of an all-reduce on a ring: (the numbers, the cells that have just arrived)."""
    n, state = len(values), [list(row) for row in values]
    found = [([row.copy() for row in state], [])]
    for step in range(2 * n - 2):
        adds = step < n - 1
        sent = [(rank, (rank - step) % n if adds else (rank + 1 - (step - n + 1)) % n)
                for rank in range(n)]
        parts = [state[rank][chunk] for rank, chunk in sent]
        for (rank, chunk), part in zip(sent, parts):
            to = (rank + 1) % n
            state[to][chunk] = state[to][chunk] + part if adds else part
        found.append(([row.copy() for row in state], [((r + 1) % n, c) for r, c in sent]))
    return found


def parallel_ring():
    """All-reduce as reduce-scatter and all-gather."""
    figure, axes = canvas(6.2, 2.0, x=(-1.3, 17.3), y=(0.0, 5.4))
    states = _ring([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    names = ('start', 'step 1', 'step 2', 'step 3', 'step 4')
    for i, ((state, new), name) in enumerate(zip(states, names)):
        x = 3.6 * i
        axes.text(x + 1.35, 4.0, name, size=8, ha='center')
        for rank in range(3):
            for chunk in range(3):
                whole = state[rank][chunk] == (12, 15, 18)[chunk]
                fill = LIGHT if whole else SOFT if (rank, chunk) in new else 'white'
                box(axes, x + 0.9 * chunk, 2.6 - 1.2 * rank, 0.9, 0.9, str(state[rank][chunk]),
                    fill=fill, size=8)
            if not i:
                axes.text(-0.2, 3.05 - 1.2 * rank, f'rank {rank}', size=8, ha='right', va='center')
        if i:
            arrow(axes, (x - 0.75, 1.85), (x - 0.15, 1.85))
    for x, y, text in ((3.6, 9.9, 'reduce-scatter'), (10.8, 17.1, 'all-gather')):
        axes.plot([x, y], [4.75, 4.75], color=DARK, lw=0.8, ls='-')
        axes.text((x + y) / 2, 4.85, text, size=8, ha='center', va='bottom')
    return figure


def parallel_holdings():
    """What each of two ranks holds, for layouts."""
    figure, axes = canvas(5.6, 5.2, x=(-3.6, 10.6), y=(0.2, 13.3))
    size, gap = 1.4, 0.25
    strip = (size - 3 * 0.05) / 4

    def model(x, y, dark, pale):
        """Four layers; parts are (layer, from, to) in fractions of the width."""
        for layer in range(4):
            below = y + (3 - layer) * (strip + 0.05)
            axes.add_patch(plt.Rectangle((x, below), size, strip, facecolor='white',
                                         edgecolor='#8a8a8a', lw=0.4))
            for parts, color in ((pale, LIGHT), (dark, BLUE)):
                for which, start, end in parts:
                    if which == layer:
                        axes.add_patch(plt.Rectangle(
                            (x + start * size, below), (end - start) * size, strip,
                            facecolor=color, lw=0))

    every = [(layer, 0, 1) for layer in range(4)]
    layouts = (
        ('DDP', 'its own data', lambda r: (every, []), lambda r: ([], every),
         lambda r: (every, [])),
        ('zero=2', 'its own data', lambda r: (_slice(r), every), lambda r: ([], every),
         lambda r: (_slice(r), [])),
        ('zero=3', 'its own data', lambda r: (_slice(r), [(1, 0, 1)]),
         lambda r: ([], [*_slice(r), (1, 0, 1)]), lambda r: (_slice(r), [])),
        ('tp=2', 'the same data', lambda r: (_slice(r), []), lambda r: ([], _slice(r)),
         lambda r: (_slice(r), [])),
        ('pp=2', 'the same, in turn', lambda r: (_stage(r), []),
         lambda r: ([], _stage(r)), lambda r: (_stage(r), [])))
    for i, (name, reads, *parts) in enumerate(layouts):
        y = 9.4 - 2.25 * i
        axes.text(-3.5, y + 1.0, name, size=10, va='center')
        axes.text(-3.5, y + 0.4, reads, size=8, va='center')
        for rank in range(2):
            x = 5.5 * rank
            for j, of in enumerate(parts):
                dark, pale = of(rank)
                model(x + j * (size + gap), y, dark, pale)
                if not i:
                    axes.text(x + j * (size + gap) + size / 2, y + 1.6, 'WGS'[j], size=8,
                              ha='center')
            if not i:
                axes.text(x + 1.5 * size + gap, y + 2.25, f'rank {rank}', size=9, ha='center')
    for x, color, text in ((0, BLUE, 'held all the time'), (5.5, LIGHT, 'held during a step')):
        axes.add_patch(plt.Rectangle((x, 12.7), 0.5, 0.4, facecolor=color, lw=0))
        axes.text(x + 0.7, 12.9, text, size=8, va='center')
    return figure


def _slice(rank):
    """A half of each block."""
    return [(layer, rank / 2, (rank + 1) / 2) for layer in range(4)]


def _stage(rank):
    """Two of the blocks."""
    return [(layer, 0, 1) for layer in (2 * rank, 2 * rank + 1)]


def parallel_cut():
    """An MLP on two ranks: the first matrix is cut by columns, the second by rows."""
    figure, axes = canvas(6.2, 2.35, x=(0, 12.4), y=(0.3, 5.0))
    for rank, y in ((0, 2.9), (1, 0.3)):
        axes.text(0.05, y + 1.0, f'rank {rank}', size=8, va='center')
        box(axes, 1.0, y + 0.4, 1.2, 1.2, '$X$', fill='white')
        axes.text(2.4, y + 1.0, '·', size=12, ha='center', va='center')
        _cut(axes, 2.65, y + 0.3, 1.8, 1.4, 'A', rank, columns=True)
        arrow(axes, (4.6, y + 1.0), (5.1, y + 1.0))
        box(axes, 5.2, y + 0.4, 0.9, 1.2, f'$f(XA_{rank})$', fill='white', size=7)
        axes.text(6.3, y + 1.0, '·', size=12, ha='center', va='center')
        _cut(axes, 6.55, y + 0.2, 1.2, 1.6, 'B', rank, columns=False)
        arrow(axes, (7.9, y + 1.0), (8.3, y + 1.0))
        box(axes, 8.4, y + 0.4, 1.1, 1.2, f'part {rank}\nof $Y$', fill='white', size=7)
        arrow(axes, (9.5, y + 1.0), (10.05, 2.95 if rank == 0 else 2.3))
    axes.add_patch(plt.Circle((10.3, 2.62), 0.3, facecolor='white', edgecolor=DARK, lw=0.8))
    axes.text(10.3, 2.6, '+', size=10, ha='center', va='center')
    axes.text(10.55, 3.55, 'all-reduce', size=8, ha='center')
    arrow(axes, (10.6, 2.62), (11.0, 2.62))
    box(axes, 11.1, 2.02, 1.2, 1.2, '$Y$,\non both', fill=PALE, size=8)
    return figure


def _cut(axes, x, y, width, height, name, rank, columns):
    """A matrix of which this rank has one half, the other being elsewhere."""
    axes.add_patch(plt.Rectangle((x, y), width, height, facecolor='white', edgecolor='#8a8a8a',
                                 lw=0.7, ls=':'))
    if columns:
        place = x + rank * width / 2, y, width / 2, height
    else:
        place = x, y + (1 - rank) * height / 2, width, height / 2
    box(axes, *place, f'${name}_{rank}$', fill=LIGHT, size=8)


def _timetable(p, m, one_forward_one_backward):
    """(rank, kind, micro-batch, start, end) of all passes: a backward pass takes two forward's."""
    orders = []
    for rank in range(p):
        ahead = min(m, p - 1 - rank if one_forward_one_backward else m)
        order = [('F', i) for i in range(ahead)]
        for i in range(m):
            order += [('F', ahead + i)] * (ahead + i < m) + [('B', i)]
        orders.append(order)
    ends, clocks, places, found = {}, [0] * p, [0] * p, []
    while any(place < 2 * m for place in places):
        for rank in range(p):
            while places[rank] < 2 * m:
                kind, i = orders[rank][places[rank]]
                before = ('F', i, rank - 1) if kind == 'F' else (
                    ('B', i, rank + 1) if rank < p - 1 else ('F', i, rank))
                if before[2] >= 0 and before not in ends:
                    break
                start = max(clocks[rank], ends.get(before, 0))
                clocks[rank] = ends[kind, i, rank] = start + (1 if kind == 'F' else 2)
                found.append((rank, kind, i, start, clocks[rank]))
                places[rank] += 1
    return found


def parallel_timetable():
    """All forward passes first, and 1F1B: 4 stages, 8 micro-batches."""
    figure, both = plt.subplots(2, 1, figsize=(6.2, 3.3), layout='constrained', sharex=True)
    for axes, alternating, name in zip(both, (False, True), (
            'all forward passes first: a stage keeps up to 8 micro-batches',
            '1F1B: stage 0 keeps 4, stage 3 keeps 1')):
        for rank, kind, i, start, end in _timetable(4, 8, alternating):
            fill = '#dde5ec' if kind == 'F' else SOFT
            axes.add_patch(plt.Rectangle((start, 3 - rank), end - start, 0.92, facecolor=fill,
                                         edgecolor=DARK, lw=0.5))
            axes.text((start + end) / 2, 3.44 - rank, str(i + 1), size=7, ha='center', va='center')
        axes.set(xlim=(0, 33), ylim=(-0.05, 4), yticks=[3.45, 2.45, 1.45, 0.45],
                 yticklabels=[f'stage {i}' for i in range(4)])
        axes.set_title(name, size=8, loc='left')
        axes.tick_params(labelsize=7, left=False)
        axes.spines['left'].set_visible(False)
    both[1].set_xlabel('time, in forward passes', size=8)
    return figure
