"""Figures of the chapter on tokens."""
import functools
import sysconfig
from pathlib import Path

from figures import BLUE, DARK, LIGHT, ORANGE, box, canvas
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

from core.text.bpe import count_pieces, learn_merges
from core.text.tokenizer import PATTERNS, BPETokenizer, printable

CORPUS = {'low': 5, 'lower': 2, 'newest': 6, 'widest': 3}   # Sennrich et al. 2016, section 3.2
CHOSEN = '#cfd9e4'


def tokens_utf8():
    """A text as characters with their code points, and as UTF-8 bytes."""
    figure, axes = canvas(5.8, 1.7, x=(-2.3, 12.2), y=(-0.15, 4.1))
    at = 0
    for c in 'Zoë 1€':
        code = c.encode()
        box(axes, at, 2.3, len(code) * 1.25 - 0.1, 1.1, '␣' if c == ' ' else c, fill=CHOSEN, size=9)
        axes.text(at + len(code) * 0.625 - 0.05, 3.75, f'U+{ord(c):04X}', ha='center', va='center',
                  size=6)
        for byte in code:
            box(axes, at, 0, 1.15, 1.1, f'{byte:02X}', size=8)
            axes.plot([at + 0.575] * 2, [1.1, 2.3], color=DARK, lw=0.6, ls='-')
            at += 1.25
    for y, text in ((3.75, 'code point'), (2.85, 'character'), (0.55, 'bytes')):
        axes.text(-0.2, y, text, ha='right', va='center', size=8)
    return figure


def _tree(axes, word, ranks, x):
    """The merges of a word, from its letters upwards, beginning at x."""
    parts, level = [(c.encode(), x + 1.25 * i + 0.5, 0.0) for i, c in enumerate(word)], {}
    while True:
        found = [(ranks[a[0] + b[0]], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                 if a[0] + b[0] in ranks]
        if not found:
            break
        _, i = min(found)
        (a, ax, ay), (b, bx, by) = parts[i:i + 2]
        y = max(ay, by) + 1.75
        for px, py in ((ax, ay), (bx, by)):
            axes.plot([px, (ax + bx) / 2], [py, y], color=DARK, lw=0.8, ls='-', zorder=0)
        level[a + b] = ((ax + bx) / 2, y)
        parts[i:i + 2] = [(a + b, (ax + bx) / 2, y)]
    for i, c in enumerate(word):
        box(axes, x + 1.25 * i + 0.05, -0.45, 0.9, 0.9, c, fill='white')
    whole = {token for token, _, _ in parts}
    for token, (px, py) in level.items():
        width = max(1.1, 0.5 + 0.42 * len(token))
        box(axes, px - width / 2, py - 0.62, width, 1.2,
            fill=CHOSEN if token in whole else '#eef1f4')
        axes.text(px, py + 0.2, token.decode(), ha='center', va='center', size=9)
        axes.text(px, py - 0.35, str(ranks[token]), ha='center', va='center', size=7, color=BLUE)


def tokens_merges():
    """The learnt merges applied to a word of the corpus and to one that it lacks."""
    tokens = learn_merges(CORPUS, 268)
    ranks = {token: i for i, token in enumerate(tokens) if i >= 256}
    figure, axes = canvas(6.2, 2.4, x=(-0.3, 18.2), y=(-0.6, 6.05))
    _tree(axes, 'newest', ranks, 0)
    _tree(axes, 'lowest', ranks, 10)
    return figure


@functools.cache
def _measured():
    """(sizes of vocabularies, bytes per token) on source code of Python's library, one file in five
    held out. The tokens of a smaller vocabulary are the first ones of a larger one."""
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    texts = [path.read_text('utf-8') for path in files]
    held_out, pattern = '\n'.join(texts[::5]), PATTERNS['llama3']
    counts = count_pieces((text for i, text in enumerate(texts) if i % 5), pattern, 1)
    learnt, sizes, ratios = learn_merges(counts, 16_384), [], []
    for n in (256, 512, 1024, 2048, 4096, 8192, 16_384):
        tokenizer = BPETokenizer(pattern, [printable(token) for token in learnt[:n]],
                                 {'<|endoftext|>': n})
        sizes.append(n)
        ratios.append(len(held_out.encode()) / len(tokenizer.encode(held_out)))
    return sizes, ratios


def tokens_sizes():
    """What a larger vocabulary saves, and what it costs."""
    sizes, ratios = _measured()
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.2, 2.6), layout='constrained')
    left.plot(sizes, ratios, 'o-', color=BLUE, ms=3.5)
    left.set(ylabel='bytes per token', ylim=(0, 4.4))
    for channels, blocks, style, color in ((128, 3, 'o-', ORANGE), (256, 6, 's--', BLUE),
                                           (768, 12, '^:', DARK)):
        n = 12 * blocks * channels ** 2
        cost = [(n + size * channels) / ratio for size, ratio in zip(sizes, ratios)]
        right.plot(sizes, [one / cost[0] for one in cost], style, color=color, ms=3.5,
                   label=f'{blocks} blocks of {channels} channels')
        best = min(range(len(cost)), key=cost.__getitem__)
        right.plot(sizes[best], cost[best] / cost[0], 'o', ms=9, mfc='none', mec=color, mew=1)
    right.set(ylabel='operations per byte, relative', ylim=(0, 1.25))
    right.legend(fontsize=7, framealpha=1, edgecolor='white')
    for axes in (left, right):
        axes.set(xscale='log', xlabel='tokens in the vocabulary')
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f'{n:,}' for n in sizes], size=7, rotation=45)
        axes.tick_params(axis='y', labelsize=8)
        axes.grid(color=LIGHT, lw=0.4, ls='-')
    return figure
