"""Figures of the chapter on serving."""
from figures import BLUE, DARK, LIGHT, PALE, arrow, box, canvas

LENGTHS, COMES = (2, 8, 4, 3, 5, 2), (0, 0, 1, 3, 4, 6)    # the chapter's six requests
FILLS = (BLUE, '#7f98ad', '#dde5ec', '#c96a1b', '#b8c4d0', '#f0d9c3')


def _static():
    """(request, slot, begin) of batches of two, each of which begins when the one before it ends,
    and the end."""
    found, at, left = [], 0, list(range(len(LENGTHS)))
    while left:
        batch = [number for number in left if COMES[number] <= at][:2]
        left = [number for number in left if number not in batch]
        found += [(number, slot, at) for slot, number in enumerate(batch)]
        at += max(LENGTHS[number] for number in batch)
    return found, at


def _continuous():
    """The same where each request takes the slot that is free first."""
    free, found = [0, 0], []
    for number, length in enumerate(LENGTHS):
        slot = free.index(min(free))
        begin = max(free[slot], COMES[number])
        found.append((number, slot, begin))
        free[slot] = begin + length
    return found, max(free)


def serving_timetable():
    """Static and continuous batching of six requests in two slots."""
    figure, axes = canvas(6.2, 3.0, x=(-2.6, 17.3), y=(-1.0, 8.6))
    for y, schedule, name in ((5.0, _static, 'static'), (0.9, _continuous, 'continuous')):
        places, end = schedule()
        for slot in range(2):
            box(axes, 0, y + 1.15 * (1 - slot), end, 1, fill='white')
            axes.text(-0.2, y + 1.15 * (1 - slot) + 0.5, f'slot {slot + 1}', ha='right',
                      va='center', size=8)
        for number, slot, begin in places:
            dark = FILLS[number] in (BLUE, '#7f98ad', '#c96a1b')
            box(axes, begin, y + 1.15 * (1 - slot), LENGTHS[number], 1, str(number + 1),
                fill=FILLS[number], size=9, color='white' if dark else DARK)
        axes.text(-0.6, y + 2.75, name, size=8, va='center', ha='right')
        axes.text(17, y + 2.75, f'{end} steps', size=8, va='center', ha='right')
        for number, step in enumerate(COMES):
            x = step + (0.35 * number if step == 0 else 0)
            axes.plot([x], [y + 2.42], 'v', ms=4, color=DARK)
            axes.text(x, y + 2.75, str(number + 1), size=7.5, ha='center', va='center')
    for step in range(0, 18):
        axes.plot([step, step], [0.55, 0.7], '-', color=DARK, lw=0.6)
        if step % 2 == 0:
            axes.text(step, 0.2, str(step), size=7.5, ha='center', va='center')
    axes.text(8.5, -0.55, 'step', ha='center', va='center', size=8)
    return figure


def serving_parts():
    """From a client to the engine and back."""
    figure, axes = canvas(6.2, 2.75, x=(0, 15.5), y=(0, 6.9))
    for x, width, name, about, fill in (
            (0.1, 1.9, 'client', '', 'white'), (3.1, 2.6, 'Guard', 'name, key,\nsize, time', PALE),
            (6.8, 3.0, 'Server.answer', 'JSON to ids,\npieces to events', PALE),
            (11.0, 3.2, 'Worker', 'lists: who comes,\nwho leaves', PALE)):
        box(axes, x, 3.9, width, 1.9, fill=fill)
        axes.text(x + width / 2, 5.25 if about else 4.85, name, ha='center', va='center', size=8.5)
        axes.text(x + width / 2, 4.5, about, ha='center', va='center', size=7.5)
    for a, b in ((2.0, 3.1), (5.7, 6.8), (9.8, 11.0)):
        arrow(axes, (a, 5.2), (b, 5.2))
        if b != 3.1:
            arrow(axes, (b, 4.4), (a, 4.4))
    arrow(axes, (3.1, 4.4), (2.0, 4.4))
    axes.plot([0.1, 15.3], [2.85, 2.85], '--', color=DARK, lw=0.8)
    axes.text(0.1, 3.05, 'the loop of HTTP', size=8, va='bottom')
    axes.text(0.1, 2.65, 'a thread', size=8, va='top')
    box(axes, 11.0, 0.3, 3.2, 1.9, fill=LIGHT)
    axes.text(12.6, 1.65, 'Engine.step', ha='center', va='center', size=8.5)
    axes.text(12.6, 0.9, 'slots, cache,\nmodel', ha='center', va='center', size=7.5)
    arrow(axes, (11.8, 3.9), (11.8, 2.2))
    arrow(axes, (13.4, 2.2), (13.4, 3.9))
    axes.text(11.65, 3.2, 'between steps', ha='right', va='center', size=7.5)
    axes.text(13.55, 3.2, 'new ids', ha='left', va='center', size=7.5)
    axes.text(12.6, 6.15, '429 if too many wait', ha='center', va='center', size=7.5)
    axes.text(4.4, 6.15, '401, 413, 415, 421', ha='center', va='center', size=7.5)
    axes.text(8.3, 6.15, '400 if not understood', ha='center', va='center', size=7.5)
    return figure
