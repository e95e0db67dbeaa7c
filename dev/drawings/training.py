"""Figures of the chapter on the training loop."""
import json
from pathlib import Path

import torch
from figures import BLUE, DARK, DATA, LIGHT, ORANGE, arrow, box, canvas, plt
from torch.nn import functional as F

from core.net import optim
from core.net.weights import build_model
from model import GPTConfig

DATA_FILES = ('shakespeare.json',)


def training_step():
    """What a step does with its micro-batches."""
    figure, axes = canvas(6.2, 2.5, x=(0, 12.4), y=(0.1, 5.1))
    for i, y in enumerate((3.7, 2.4, 1.1)):
        box(axes, 0.1, y, 1.7, 0.8, f'micro-batch {i + 1}', size=7)
        arrow(axes, (1.8, y + 0.4), (2.3, y + 0.4))
        box(axes, 2.3, y, 1.3, 0.8, 'forward', fill='white', size=7)
        arrow(axes, (3.6, y + 0.4), (4.1, y + 0.4))
        box(axes, 4.1, y, 1.6, 0.8, 'sum of losses\n/ all targets', fill='white', size=7)
        arrow(axes, (5.7, y + 0.4), (6.2, y + 0.4))
        box(axes, 6.2, y, 1.3, 0.8, 'backward', fill='white', size=7)
        arrow(axes, (7.5, y + 0.4), (8.25, 2.8 + (y - 2.4) * 0.3))
    axes.add_patch(plt.Circle((8.5, 2.8), 0.27, facecolor='white', edgecolor=DARK, lw=0.8))
    axes.text(8.5, 2.78, '+', size=10, ha='center', va='center')
    arrow(axes, (8.77, 2.8), (9.1, 2.8))
    box(axes, 9.1, 2.3, 1.25, 1.0, 'norm,\nclipping', fill=LIGHT, size=7)
    arrow(axes, (10.35, 2.8), (10.7, 2.8))
    box(axes, 10.7, 2.3, 1.6, 1.0, 'optimizer', fill=LIGHT, size=8)
    arrow(axes, (11.5, 4.3), (11.5, 3.3))
    axes.text(11.5, 4.4, 'factor of\nthe schedule', size=7, ha='center', va='bottom')
    axes.plot([11.5, 11.5, 2.95], [2.3, 0.3, 0.3], color=DARK, lw=1, ls='-')
    arrow(axes, (2.95, 0.3), (2.95, 1.1))
    axes.text(7.2, 0.4, 'new weights, for the next step', size=7, ha='center')
    return figure


def training_schedules():
    """All kinds of schedules, of 100 steps."""
    steps = range(100)
    figure, axes = canvas(5.4, 1.85)
    for kind, style, color in (('cosine', '-', BLUE), ('linear', '--', ORANGE), ('wsd', '-.', DARK),
                               ('constant', ':', '#7a7a7a')):
        axes.plot(steps, [optim.schedule(step, 100, kind, 10, 0.5, 0.1) for step in steps],
                  ls=style, color=color, label=kind)
    axes.set(xlabel='step', ylabel='factor on the rates', ylim=(0, 1.08))
    axes.xaxis.label.set_size(8)
    axes.yaxis.label.set_size(8)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8, loc='lower left', bbox_to_anchor=(0.1, -0.02))
    return figure


def _gradient():
    """The gradient of a small model's up_proj, after 30 steps on the source of this file."""
    text = Path(__file__).read_text(encoding='utf-8')
    alphabet = sorted(set(text))
    ids = torch.tensor([alphabet.index(character) for character in text])
    model = build_model(GPTConfig(
        block_size=64, vocab_size=len(alphabet), n_layer=2, n_head=2, n_embd=64, norm='rmsnorm',
        position='rope', mlp='gelu', bias=False), seed=1)
    optimizers = optim.make_optimizers(model, 'muon', 6e-3, 0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(31):
        at = torch.randint(len(ids) - 65, (8,), generator=generator).tolist()
        rows = torch.stack([ids[i:i + 65] for i in at])
        model(rows[:, :-1], rows[:, 1:]).backward()
        if step < 30:
            optim.apply_gradients(optimizers, 1.0, skip=False)
    return model.h['1'].mlp.up_proj.weight.grad


def training_muon():
    """What Newton-Schulz does to one singular value, and to those of a gradient."""
    figure, (one, many) = plt.subplots(1, 2, figsize=(6.2, 2.7), layout='constrained')
    s = torch.logspace(-4, 0, 300)
    for steps, style, color in ((1, ':', '#7a7a7a'), (3, '--', ORANGE), (5, '-', BLUE)):
        y = s
        for _ in range(steps):
            y = 3.4445 * y - 4.7750 * y ** 3 + 2.0315 * y ** 5
        one.plot(s, y, ls=style, color=color)
    one.axhline(1, color=LIGHT, lw=1, ls='-', zorder=0)
    one.set(xscale='log', ylim=(0, 1.55), xlabel='singular value before', ylabel='after')
    for x, y, text, color in ((1.1e-4, 0.8, '5 iterations', BLUE), (2.6e-3, 0.23, '3', ORANGE),
                              (5.5e-2, 0.33, '1', '#5a5a5a')):
        one.text(x, y, text, color=color, size=8)
    grad = _gradient()[None]
    pushed = optim.newton_schulz(grad)
    for g, label, style, color in (
            (grad / grad.norm(), 'gradient / its norm', ':', '#5a5a5a'),
            (pushed, 'after 5 iterations', '-', BLUE),
            (F.normalize(pushed, dim=2), 'and rows of length 1', '--', ORANGE)):
        values = torch.linalg.svdvals(g[0])
        many.plot(range(1, 1 + len(values)), values, ls=style, color=color)
        many.text(64, float(values[40]) * (0.42 if label[0] == 'a' and 'after' in label else 1.8),
                  label, color=color, size=8, ha='right')
    many.set(yscale='log', xlabel='number of the singular value', ylabel='its size',
             ylim=(1e-3, 30))
    for axes in (one, many):
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    return figure


def training_curve():
    """Losses and learning rate of python train.py config/shakespeare.py."""
    found = json.loads((DATA / 'shakespeare.json').read_text())
    figure, (losses, rate) = plt.subplots(2, 1, figsize=(6.0, 3.4), layout='constrained',
                                          sharex=True, height_ratios=(2.4, 1))
    losses.plot(found['step'], found['train_loss'], color='#8fa3b8', lw=0.9, ls='-',
                label='training, each point one batch')
    losses.plot(found['eval_step'], found['eval_loss'], 'o-', color=ORANGE, ms=4,
                label='validation, on the whole split')
    losses.set(ylabel='nats per character', ylim=(1.1, None))
    losses.legend(frameon=False, fontsize=8)
    rate.plot(found['step'], found['learning_rate'], color=BLUE, ls='-')
    rate.set(ylabel="AdamW's rate", xlabel='step', ylim=(0, None))
    for axes in (losses, rate):
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    return figure
