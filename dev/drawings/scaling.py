"""Figures of the chapter on scaling laws and planning."""
import runpy
from dataclasses import fields
from pathlib import Path

import numpy as np
from figures import BLUE, DARK, LIGHT, ORANGE, plt

from core.planning import laws
from core.planning.fit import Runs, fit
from core.planning.memory import Layout, step_memory
from model import GPTConfig

ROOT = Path(__file__).resolve().parents[2]
# docs/planning.md, "Laws of your own runs": parameters, bytes, FLOP and validation loss of l2 to l6
# and of the run that was foretold.
OWN = np.array([(42_016, 0.42e6, 1.67e11, 1.7850), (108_432, 1.08e6, 1.10e12, 1.4479),
                (228_672, 2.29e6, 4.70e12, 1.2471), (430_000, 4.30e6, 1.58e13, 1.0326),
                (715_104, 7.15e6, 4.22e13, 0.9551)])
FORETOLD = 1.69e14, 0.8341


def _small(*all_axes):
    for axes in all_axes:
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)


def scaling_own():
    """Five runs, the law, and the run that it foretold."""
    N, D, C, loss = OWN.T
    law = fit(Runs([f'l{i}' for i in range(2, 7)], N, D, C, loss), 'compute')
    many = np.geomspace(C[0], 2 * FORETOLD[0], 60)
    middle, low, high = np.array([law.predict(c) for c in many]).T
    figure, axes = plt.subplots(figsize=(5.2, 2.7), layout='constrained')
    axes.fill_between(many, low, high, color=LIGHT, alpha=0.6, lw=0, label='95% of new runs')
    axes.plot(many, middle, color=BLUE, ls='-', label='the law')
    axes.plot(C, loss, 'o', color=BLUE, ms=5, ls='none', label='five runs')
    axes.plot(*FORETOLD, 's', color=ORANGE, ms=6, ls='none', label='the sixth, made afterwards')
    for i, (x, y) in enumerate(zip(C, loss)):
        axes.annotate(f'l{i + 2}', (x, y), textcoords='offset points', xytext=(5, 5), size=8)
    axes.set(xscale='log', yscale='log', xlabel='FLOP of training',
             ylabel='nats per byte, validation')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.set_yticks([0.7, 0.8, 1, 1.2, 1.5, 2])
    axes.yaxis.set_minor_formatter('')
    axes.legend(frameon=False, fontsize=8, loc='lower left')
    _small(axes)
    return figure


def scaling_chinchilla():
    """Left: loss over size for three budgets. Right: tokens per parameter by approach."""
    law = laws.CORRECTED
    figure, (valleys, ratios) = plt.subplots(1, 2, figsize=(6.2, 2.8), layout='constrained')
    for C, color, style in ((1e20, '#7a7a7a', ':'), (1e21, ORANGE, '--'), (1e22, BLUE, '-')):
        best, _ = law.optimum(C)
        N = np.geomspace(best / 12, best * 12, 100)
        valleys.plot(N, [law.loss(n, C / 6 / n) for n in N], color=color, ls=style,
                     label=f'$10^{{{round(np.log10(C))}}}$ FLOP')
        valleys.plot(best, law.loss(*law.optimum(C)), 'o', color=color, ms=5)
    many = [law.optimum(C) for C in np.geomspace(1e19, 1e23)]
    valleys.plot([n for n, _ in many], [law.loss(n, d) for n, d in many], color=DARK, lw=0.8,
                 ls='-')
    valleys.set(xscale='log', xlabel='parameters', ylabel='nats per token', xlim=(5e7, 2e11),
                ylim=(2.1, 2.95))
    valleys.legend(frameon=False, fontsize=7, loc='upper right')
    C = np.geomspace(1e18, 1e25)
    for name, one, color, style in (('3, as published', laws.PUBLISHED, ORANGE, '--'),
                                    ('3, corrected', law, BLUE, '-')):
        ratios.plot(C, [np.divide(*one.optimum(c)[::-1]) for c in C], color=color, ls=style,
                    label=name)
    for approach, mark in ((1, 'o'), (2, 's')):
        N, D = np.array(laws.SIZES), np.array(laws.TOKENS[approach])
        ratios.plot(6 * N * D, D / N, mark, color=DARK, ms=4, ls='none', label=str(approach),
                    fillstyle='full' if approach == 1 else 'none')
    ratios.plot(6 * 70e9 * 1.4e12, 20, '*', color=DARK, ms=9, ls='none', label='Chinchilla')
    ratios.set(xscale='log', yscale='log', xlabel='FLOP of training',
               ylabel='tokens per parameter', ylim=(8, 200))
    ratios.set_yticks([10, 20, 50, 100, 200])
    ratios.yaxis.set_major_formatter('{x:g}')
    ratios.yaxis.set_minor_formatter('')
    ratios.legend(frameon=False, fontsize=7, loc='upper left', title='approach', title_fontsize=7)
    _small(valleys, ratios)
    return figure


def scaling_prices():
    """Left: what a smaller model of the same loss costs. Right: what repeated tokens are worth."""
    law = laws.CORRECTED
    figure, (factor, worth) = plt.subplots(1, 2, figsize=(6.2, 2.4), layout='constrained')
    N = 7e9
    parts = np.linspace(0.22, 1, 100)
    factor.plot(parts, [laws.overtrained(law, N, law.tokens_of(N), part)[1] for part in parts[:-1]]
                + [1], color=BLUE, ls='-')
    factor.set(xlabel='part of the parameters', ylabel='factor on the training FLOPs',
               ylim=(0.9, 5))
    epochs = np.linspace(1, 40, 200)
    worth.plot(epochs, epochs, color='#7a7a7a', ls=':', label='fresh tokens')
    worth.plot(epochs, [laws.worth(n, 1, laws.REPEATED_TOKENS) for n in epochs], color=BLUE,
               ls='-', label='repeated tokens')
    for n in (4, 16):
        worth.plot(n, laws.worth(n, 1, laws.REPEATED_TOKENS), 'o', color=ORANGE, ms=5)
        worth.annotate(f'{n} times', (n, laws.worth(n, 1, laws.REPEATED_TOKENS)), size=8,
                       textcoords='offset points', xytext=(4, -10))
    worth.set(xlabel='times that each is read', ylabel='worth, in fresh ones', ylim=(0, 24))
    worth.legend(frameon=False, fontsize=8, loc='lower right')
    _small(factor, worth)
    return figure


def scaling_memory():
    """Bytes of a step of config/7b.py, by layout."""
    preset = runpy.run_path(str(ROOT / 'config/7b.py'))
    known = {field.name for field in fields(GPTConfig)}
    config = GPTConfig(vocab_size=50304, **{k: v for k, v in preset.items() if k in known})
    layouts = (Layout(dp=64, n_micro=16), Layout(dp=64, zero=2, n_micro=16),
               Layout(dp=64, zero=3, n_micro=16),
               Layout(dp=64, zero=3, n_micro=16, recompute=True),
               Layout(dp=8, tp=8, zero=3, n_micro=128, sequence_parallel=True),
               Layout(dp=8, pp=8, zero=2, n_micro=128))
    names = ('DDP', 'zero=2', 'zero=3', 'zero=3, recomputed', 'tp=8, zero=3', 'pp=8, zero=2')
    found = [step_memory(config, layout, 'bfloat16', optimizer='adamw') for layout in layouts]
    figure, axes = plt.subplots(figsize=(6.2, 2.5), layout='constrained')
    left = np.zeros(len(layouts))
    colors = dict(zip(found[0], (BLUE, '#5d7fa3', LIGHT, ORANGE, '#f0d9c3', '#7a7a7a')))
    for part, color in colors.items():
        sizes = np.array([one[part] / 1e9 for one in found])
        axes.barh(names, sizes, left=left, color=color, label=part, height=0.65, edgecolor=DARK,
                  lw=0.4)
        left += sizes
    for i, total in enumerate(left):
        axes.text(total + 2, i, f'{total:.0f}', size=8, va='center')
    axes.axvline(80, color=DARK, lw=0.8, ls='--')
    axes.text(79, -0.42, 'an H100', size=8, va='bottom', ha='right')
    axes.set(xlabel='GB on the rank that needs most', ylim=(5.5, -0.8))
    axes.legend(frameon=False, fontsize=7, ncols=2, loc='lower right')
    _small(axes)
    return figure
