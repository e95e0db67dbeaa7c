"""Pictures of a plan, and of a fitted law."""
from pathlib import Path

import numpy as np

from core.planning.fit import Fit, Runs
from core.planning.laws import Law
from core.run import log

BAND = 0.06     # two standard errors of E: 0.03 (Besiroglu et al. 2024, table 1)


def draw(folder: Path, law: Law, found: dict, choices: list) -> bool:
    """loss.png: the law's loss over FLOPs, with the plan; memory.png: bytes by layout. Returns
    whether both were drawn."""
    N, D = found['parameters'], found['tokens']
    C = 6 * N * D

    def fill_losses(figure):
        ax = figure.subplots()
        many = np.geomspace(C / 1e3, C * 1e2, 200)
        best = np.array([law.loss(*law.optimum(c)) for c in many])
        ax.plot(many, best, label='best use of these FLOPs')
        ax.fill_between(many, best - BAND, best + BAND, alpha=0.2,
                        label='two standard errors of E')
        ax.plot(C, law.loss(N, D), 'o', color='black',
                label=f'the plan: {law.loss(N, D):.2f} nats per token')
        ax.set(xscale='log', xlabel='FLOP of training, 6 N D',
               ylabel="nats per token, on Chinchilla's data")
        ax.grid(alpha=0.3)
        ax.legend()

    def fill_memory(figure):
        ax = figure.subplots()
        left, names = np.zeros(len(choices)), [str(choice.layout) for choice in choices]
        for part in choices[0].memory:
            sizes = np.array([choice.memory[part] / 1e9 for choice in choices])
            ax.barh(names, sizes, left=left, label=part)
            left += sizes
        ax.invert_yaxis()
        ax.set(xlabel='GB on the rank that needs most; the fastest layout on top')
        ax.legend(ncols=3, fontsize='small', loc='upper center', bbox_to_anchor=(0.4, -0.25))

    folder.mkdir(parents=True, exist_ok=True)
    drawn = log.draw(folder / 'loss.png', fill_losses, 7, 4)
    return log.draw(folder / 'memory.png', fill_memory, 9, 1.5 + 0.4 * len(choices)) and drawn


def draw_fit(path: Path, runs: Runs, fitted: Fit, targets: list) -> bool:
    """The runs, the law, and the (C, loss, low, high) that it predicts. Returns whether it was
    drawn."""
    def fill(figure):
        ax = figure.subplots()
        ax.plot(runs.C, runs.loss, 'o', label='runs')
        if len(fitted.names) == 1:
            many = np.geomspace(runs.C.min(), max([runs.C.max(), *(c for c, *_ in targets)]), 60)
            middle, low, high = np.array([fitted.predict(c) for c in many]).T
            ax.plot(many, middle, label='law')
            ax.fill_between(many, low, high, alpha=0.2, label='95% of new runs')
        for C, loss, low, high in targets:
            ax.errorbar(C, loss, [[loss - low], [high - loss]], fmt='s', color='black', capsize=4)
            ax.annotate(f'{loss:.3f}', (C, loss), textcoords='offset points', xytext=(8, 4))
        ax.set(xscale='log', yscale='log', xlabel='FLOP of training',
               ylabel='validation loss, nats')
        ax.yaxis.set_major_formatter('{x:g}')
        ax.yaxis.set_minor_formatter('{x:g}')
        ax.grid(alpha=0.3, which='both')
        ax.legend()

    path.parent.mkdir(parents=True, exist_ok=True)
    return log.draw(path, fill, 7, 4.5)
