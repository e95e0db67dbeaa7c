"""Figures of the chapter on the block."""
import json

import numpy as np
import torch
from figures import BLUE, DARK, DATA, LIGHT, ORANGE, PALE, arrow, box, canvas, plt
from torch.nn import functional as F

from core.net.weights import build_model
from model import GPTConfig

DATA_FILES = ('residual_norms.json', 'loss_by_position.json')


def block_diagram():
    """A block: the stream passes, two branches read from it and add to it."""
    figure, axes = canvas(6.2, 2.3, x=(0, 12.4), y=(0, 4.6))
    y = 0.9
    arrow(axes, (0.3, y), (12.1, y))
    axes.text(0.2, y - 0.5, 'residual stream $x$, $C$ channels', size=8)
    for x, first, second in ((1.2, 'norm', 'attention'), (6.9, 'norm', 'MLP')):
        axes.plot([x, x], [y, 3.2], color=DARK, lw=1, ls='-')
        arrow(axes, (x, 3.2), (x + 0.5, 3.2))
        box(axes, x + 0.5, 2.8, 1.1, 0.8, first, fill='white', size=8)
        arrow(axes, (x + 1.6, 3.2), (x + 2.0, 3.2))
        box(axes, x + 2.0, 2.6, 1.8, 1.2, second, fill=LIGHT, size=9)
        axes.plot([x + 3.8, x + 4.5], [3.2, 3.2], color=DARK, lw=1, ls='-')
        arrow(axes, (x + 4.5, 3.2), (x + 4.5, y + 0.24))
        axes.add_patch(plt.Circle((x + 4.5, y), 0.24, facecolor='white', edgecolor=DARK, lw=0.8,
                                  zorder=3))
        axes.text(x + 4.5, y, '+', size=9, ha='center', va='center', zorder=4)
    axes.text(1.7, 4.1, 'positions exchange information', size=8)
    axes.text(7.4, 4.1, 'each position by itself', size=8)
    return figure


def block_activations():
    """The four nonlinearities."""
    x = torch.linspace(-4, 3, 400)
    figure, axes = canvas(4.6, 2.4)
    for y, name, color, style in ((F.relu(x), 'ReLU', LIGHT, '-'), (F.gelu(x), 'GELU', BLUE, '-'),
                                  (F.silu(x), 'SiLU', ORANGE, '--'),
                                  (F.relu(x).square(), 'ReLU²', DARK, ':')):
        axes.plot(x, y, label=name, color=color, ls=style)
    axes.set(ylim=(-0.5, 3), xlabel='$u$')
    axes.legend(frameon=False, fontsize=8)
    return figure


def _stream(size: float, layers: int) -> list[float]:
    """Root mean square of the stream behind the embedding and each block of a model that is not
    trained, with random output matrices, `size` times as large as the other ones."""
    model = build_model(GPTConfig(
        n_layer=layers, n_head=4, n_embd=64, vocab_size=50, block_size=32, position='rope',
        norm='rmsnorm', mlp='swiglu', bias=False, tied=False))
    generator, rms = torch.Generator().manual_seed(0), []
    for part in (model.wte, *model.h.values()):
        part.register_forward_hook(
            lambda module, args, out: rms.append(out.square().mean().sqrt().item()))
    with torch.no_grad():
        for block in model.h.values():
            for p in (block.attn.o_proj.weight, block.mlp.down_proj.weight):
                p.normal_(0.0, size / (3 * p.size(1)) ** 0.5, generator=generator)
        model(torch.arange(4 * 32).view(4, 32) % 50)
    return rms


def block_stream():
    """Size of the residual stream behind each block: not trained, by initialization; and trained.
    """
    figure, (new, trained) = plt.subplots(1, 2, figsize=(6.2, 2.4), layout='constrained')
    layers = 48
    for name, size, width, color, place in (
            ('as the other matrices', 1.0, 1.6, BLUE, (3, 1.5)),
            ('divided by $\\sqrt{2L}$ (GPT-2)', (2 * layers) ** -0.5, 4, ORANGE, (3, 0.8)),
            ('zero (here, the thin line)', 0.0, 1.2, DARK, (3, 0.62))):
        new.plot(_stream(size, layers), lw=width, ls='-', color=color)
        new.text(*place, name, size=8, color=color)
    new.set(xlabel='blocks passed', ylabel='root mean square', title='48 blocks, not trained')
    new.set_ylim(bottom=0)
    rms = json.loads((DATA / 'residual_norms.json').read_text())['rms']
    trained.plot(rms, marker='o', ms=4)
    trained.set(xlabel='blocks passed', title=f'{len(rms) - 1} blocks, trained',
                xticks=range(len(rms)))
    trained.set_ylim(bottom=0)
    for axes in (new, trained):
        axes.title.set_size(9)
    return figure


def block_loss_by_position():
    """Mean loss at each position of a window; the data are made by dev/pictures.py."""
    loss = np.array(json.loads((DATA / 'loss_by_position.json').read_text())['loss'])
    figure, axes = canvas(5.2, 2.3)
    at = np.arange(1, len(loss) + 1)
    axes.plot(at, loss, color=LIGHT, lw=0.8, ls='-')
    # means over ranges that double, each drawn at its middle
    edges = [2 ** i for i in range(int(np.log2(len(loss))) + 1)] + [len(loss) + 1]
    means = [(np.sqrt(a * (b - 1)), loss[a - 1:b - 1].mean()) for a, b in zip(edges, edges[1:])
             if b > a]
    axes.plot(*zip(*means), marker='o', ms=4, color=BLUE, ls='-')
    axes.set(xscale='log', xlabel='characters that the model sees', ylabel='nats per character',
             xticks=[1, 4, 16, 64, 256], xticklabels=['1', '4', '16', '64', '256'])
    axes.minorticks_off()
    return figure


def block_parameters():
    """Where GPT-2's parameters and FLOPs are."""
    C, L, T, V = 768, 12, 1024, 50304
    weights = {'attention': L * 4 * C * C, 'MLP': L * 8 * C * C, 'tokens': V * C,
               'positions': T * C}
    flops = {'attention': 6 * L * 4 * C * C, 'MLP': 6 * L * 8 * C * C, 'head': 6 * V * C,
             'scores': 12 * L * C * T}
    figure, axes = canvas(6.2, 1.7)
    fills = {'attention': BLUE, 'MLP': LIGHT, 'tokens': ORANGE, 'head': ORANGE, 'positions': DARK,
             'scores': PALE}
    for row, (parts, unit) in enumerate(((flops, 'FLOPs'), (weights, 'parameters'))):
        left, total = 0.0, sum(parts.values())
        for name, n in parts.items():
            share = n / total
            axes.barh(row, share, left=left, height=0.55, color=fills[name], edgecolor=DARK, lw=0.6)
            if share > 0.05:
                axes.text(left + share / 2, row, f'{name}\n{share:.0%}', size=8, ha='center',
                          va='center', color='white' if fills[name] in (BLUE, ORANGE) else DARK)
            left += share
        axes.text(-0.01, row, unit, ha='right', va='center', size=9)
    axes.axis('off')
    return figure
