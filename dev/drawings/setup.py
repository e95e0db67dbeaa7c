"""Figures of the chapter on setting up."""
from figures import DARK, LIGHT, PALE, arrow, box, canvas


def _stage(axes, x, y, width, name, chapters, fill=PALE, height=1.0):
    """A box with the name of a file or folder and, below it, where it is explained."""
    box(axes, x, y, width, height, fill=fill)
    axes.text(x + width / 2, y + height * (0.64 if chapters else 0.5), name, ha='center',
              va='center', size=8, family='monospace' if '.' in name or '/' in name else None)
    if chapters:
        axes.text(x + width / 2, y + height * 0.28, chapters, ha='center', va='center', size=7.5)


def setup_map():
    """The stages, what they write, and the chapters that explain them."""
    figure, axes = canvas(6.2, 3.9, x=(0, 15.5), y=(-0.1, 9.65))
    _stage(axes, 0.2, 6.0, 2.1, 'text', '', 'white')
    _stage(axes, 3.2, 6.0, 2.7, 'prepare.py', 'chapters 2, 3')
    _stage(axes, 6.8, 6.0, 2.7, 'data/<name>/', '', LIGHT)
    _stage(axes, 3.2, 4.0, 2.7, 'model.py', 'chapters 4 to 7')
    _stage(axes, 6.6, 4.0, 3.1, 'train.py', 'chapters 8 to 10, 12')
    _stage(axes, 11.4, 4.0, 2.7, 'out/<run>/', '', LIGHT)
    _stage(axes, 3.2, 8.2, 2.7, 'plan.py', 'chapter 11')
    for start, end in (((2.3, 6.5), (3.2, 6.5)), ((5.9, 6.5), (6.8, 6.5)), ((8.15, 6), (8.15, 5)),
                       ((5.9, 4.5), (6.6, 4.5)), ((9.7, 4.5), (11.4, 4.5))):
        arrow(axes, start, end)
    axes.text(2.9, 8.7, 'before a run', size=8, va='center', ha='right')
    axes.text(6.2, 8.7, 'size, tokens,\ntime, memory', size=8, va='center')
    # The stages after pretraining write runs, too.
    box(axes, 9.95, 6.0, 5.35, 3.3, fill='white')
    axes.text(12.62, 8.97, 'from a run to another run', ha='center', va='center', size=8)
    for y, name, chapters in ((7.95, 'finetune.py', 'chapters 16, 17'),
                              (7.05, 'classify.py', 'chapter 15'),
                              (6.15, 'dpo.py', 'chapter 18')):
        box(axes, 10.15, y, 4.95, 0.72)
        axes.text(10.35, y + 0.36, name, va='center', size=8, family='monospace')
        axes.text(14.95, y + 0.36, chapters, va='center', ha='right', size=7.5)
    arrow(axes, (12.2, 5.0), (12.2, 6.0))
    arrow(axes, (13.3, 6.0), (13.3, 5.0))
    # What is done with a run.
    for x, name, chapters in ((0.6, 'sample.py', 'chapter 13'), (4.4, 'evaluate.py', 'chapter 14'),
                              (8.2, 'export.py', 'chapter 19'), (12.0, 'serve.py', 'chapter 20')):
        _stage(axes, x, 1.4, 2.7, name, chapters)
        arrow(axes, (x + 1.35, 3.0), (x + 1.35, 2.4))
    axes.plot([1.95, 13.35], [3.0, 3.0], color=DARK, lw=1, ls='-')
    axes.plot([12.75, 12.75], [4.0, 3.0], color=DARK, lw=1, ls='-')
    for x, what in ((1.95, 'text, chats'), (5.75, 'scores'), (9.55, 'files for others'),
                    (13.35, 'answers by HTTP')):
        axes.text(x, 1.02, what, ha='center', va='center', size=7.5)
    axes.text(7.75, 0.2, 'of all stages: chapter 21, safety and reproducibility; '
              'chapter 22, what was tried and failed', ha='center', va='center', size=8)
    return figure


def setup_next():
    """A text as inputs and, one place later, as targets."""
    figure, axes = canvas(5.6, 1.5, x=(-1.9, 9.3), y=(-0.1, 2.9))
    text = 'to be or'
    for i in range(6):      # the last one predicts from all that came before
        axes.plot([i * 1.3 + 0.5, 6 * 1.3 + 0.5], [0.9, 1.9], color='#8a97a5', lw=0.7, ls='-')
    for i, (now, then) in enumerate(zip(text, text[1:])):
        show = lambda c: '␣' if c == ' ' else c
        box(axes, i * 1.3, 0, 1, 0.9, show(now), size=9)
        box(axes, i * 1.3, 1.9, 1, 0.9, show(then), fill='#cfd9e4', size=9)
        arrow(axes, (i * 1.3 + 0.5, 0.9), (i * 1.3 + 0.5, 1.9))
    axes.text(-0.2, 0.45, 'seen', ha='right', va='center', size=9)
    axes.text(-0.2, 2.35, 'to predict', ha='right', va='center', size=9)
    return figure
