"""Figures of the chapter on preferences."""
import numpy as np
from figures import BLUE, DARK, ORANGE, canvas

BEFORE, REWARD = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])


def _best(beta):
    """The model that is best for the chapter's example."""
    scores = np.log(BEFORE) + REWARD / beta
    p = np.exp(scores - scores.max())
    return p / p.sum()


def preferences_beta():
    """Probabilities of three answers over beta, and reward against KL."""
    figure, _ = canvas(6.2, 2.5)
    figure.clear()
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    betas = np.geomspace(0.1, 30, 200)
    models = np.array([_best(beta) for beta in betas])
    for i, (color, style) in enumerate(((DARK, ':'), (ORANGE, '--'), (BLUE, '-'))):
        left.plot(betas, models[:, i], style, color=color)
    for x, y, text, color in ((0.11, 0.8, 'reward 2', BLUE), (7, 0.335, 'reward 1', ORANGE),
                              (7, 0.53, 'reward 0', DARK)):
        left.text(x, y, text, size=8, color=color)
    left.set(xscale='log', xlabel='beta', ylabel='probability', ylim=(0, 1.02))
    left.set_xticks([0.1, 1, 10], ['0.1', '1', '10'])
    kl = (models * np.log(np.maximum(models, 1e-300) / BEFORE)).sum(axis=1)
    right.plot(kl, models @ REWARD, color=BLUE)
    for beta in (0.2, 0.5, 1, 2, 10):
        p = _best(beta)
        at = (p * np.log(p / BEFORE)).sum(), p @ REWARD
        right.plot(*at, 'o', color=DARK, ms=4)
        right.text(at[0] + 0.05, at[1] - 0.12, f'{beta:g}', size=8)
    right.set(xlabel='KL, nats', ylabel='expected reward', xlim=(-0.05, 1.75), ylim=(0.55, 2.1))
    return figure


def preferences_losses():
    """DPO with and without smoothed labels, and IPO."""
    figure, axes = canvas(5.0, 2.5)
    u = np.linspace(-2, 5, 300)
    log_sigmoid = lambda u: -np.log1p(np.exp(-u))
    smooth = -0.9 * log_sigmoid(u) - 0.1 * log_sigmoid(-u)
    axes.plot(u, -log_sigmoid(u), '-', color=BLUE)
    axes.plot(u, smooth, '--', color=ORANGE)
    axes.plot(u, (u - 0.5) ** 2, ':', color=DARK)
    axes.plot([np.log(9)], [-0.9 * log_sigmoid(np.log(9)) - 0.1 * log_sigmoid(-np.log(9))], 'o',
              color=ORANGE, ms=4)
    axes.plot([0.5], [0], 'o', color=DARK, ms=4)
    axes.text(3.6, 0.1, 'DPO', color=BLUE, size=8)
    axes.text(3.6, 0.58, 'smoothed', color=ORANGE, size=8)
    axes.text(1.72, 1.75, 'IPO', color=DARK, size=8, ha='right')
    axes.set(xlabel='beta times margin', ylabel='loss', ylim=(-0.05, 2.2), xlim=(-2, 5))
    return figure
