"""Figures of the chapter on the LSTM."""
import torch
from figures import BLUE, DARK, LIGHT, ORANGE, PALE, arrow, box, canvas, plt
from torch import nn

from core.net.weights import build_model
from model import GPTConfig


def _circle(axes, x: float, y: float, text: str) -> None:
    axes.add_patch(plt.Circle((x, y), 0.25, facecolor='white', edgecolor=DARK, lw=0.8, zorder=3))
    axes.text(x, y, text, size=9, ha='center', va='center', zorder=4)


def _line(axes, *points: tuple) -> None:
    """Straight pieces between points, with an arrow at the end."""
    axes.plot(*zip(*points[:-1]), color=DARK, lw=1, ls='-')
    arrow(axes, points[-2], points[-1])


def lstm_cell():
    """One step of an LSTM."""
    figure, axes = canvas(6.2, 2.9, x=(-0.6, 12.6), y=(-0.6, 5.5))
    top, gates = 4.7, 1.3
    axes.plot([0.3, 11.3], [top, top], color=BLUE, lw=2.4, ls='-')
    arrow(axes, (11.2, top), (11.7, top), color=BLUE)
    axes.text(0.2, top, '$c_{t-1}$', ha='right', va='center', size=9)
    axes.text(11.8, top, '$c_t$', va='center', size=9)
    axes.plot([0.3, 8.6], [0, 0], color=DARK, lw=1, ls='-')
    axes.text(0.2, 0, '$x_t, h_{t-1}$', ha='right', va='center', size=9)
    for x, name, text in ((2.6, '$f_t$', 'forget'), (4.6, '$i_t$', 'input'),
                          (6.6, '$g_t$', 'candidate'), (8.6, '$o_t$', 'output')):
        arrow(axes, (x, 0), (x, gates - 0.45))
        box(axes, x - 0.55, gates - 0.45, 1.1, 0.9, name, fill=PALE if name == '$g_t$' else LIGHT)
        axes.text(x + 0.1, gates - 0.95, text, size=7)
    _line(axes, (2.6, gates + 0.45), (2.6, top - 0.25))
    _line(axes, (4.6, gates + 0.45), (4.6, 3.1), (5.35, 3.1))
    _line(axes, (6.6, gates + 0.45), (6.6, 3.1), (5.85, 3.1))
    _line(axes, (5.6, 3.35), (5.6, top - 0.25))
    _line(axes, (10.2, top), (10.2, 3.85))
    box(axes, 9.65, 3.15, 1.1, 0.7, 'tanh', fill='white', size=8)
    _line(axes, (10.2, 3.15), (10.2, 2.45))
    _line(axes, (8.6, gates + 0.45), (8.6, 2.2), (9.95, 2.2))
    _line(axes, (10.45, 2.2), (11.7, 2.2))
    axes.text(11.8, 2.2, '$h_t$', va='center', size=9)
    for x, y, text in ((2.6, top, '×'), (5.6, top, '+'), (5.6, 3.1, '×'), (10.2, 2.2, '×')):
        _circle(axes, x, y, text)
    return figure


def _gradients(rnn: nn.Module, steps: int = 120) -> torch.Tensor:
    """Length of the gradient of a random direction of the last output, by the input d steps back,
    as a part of that at d = 0."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, steps + 1, 64, generator=generator).requires_grad_()
    y = rnn(x)[0][:, -1]
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    norms = x.grad.square().sum(dim=-1).mean(dim=0).sqrt().flip(0)
    return norms / norms[0]


def lstm_gradients():
    """How much of a gradient arrives d steps back, in networks that are not trained."""
    generator, plain = torch.Generator().manual_seed(0), nn.RNN(64, 64, batch_first=True)
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(0.0, (3 * 64) ** -0.5, generator=generator) if p.ndim > 1 else p.zero_()
    figure, axes = canvas(6.0, 2.6)
    axes.plot(_gradients(plain), label='without gates', color=DARK, ls=':')
    for bias, color, style in ((0.0, ORANGE, '--'), (1.0, BLUE, '-'), (4.0, '#7a7a7a', '-.')):
        lstm = build_model(GPTConfig(arch='lstm', n_layer=1, n_embd=64, vocab_size=50,
                                     tied=False)).lstm
        with torch.no_grad():
            lstm.bias_ih_l0.chunk(4)[1].fill_(bias)
        axes.plot(_gradients(lstm), label=f'LSTM, forget bias {bias:.0f}', color=color, ls=style)
    axes.set(yscale='log', ylim=(1e-12, 30), xlim=(0, 120), xlabel='steps back',
             ylabel='gradient, relative')
    axes.legend(frameon=False, fontsize=8, loc='upper right', bbox_to_anchor=(1.0, 0.88))
    return figure


def lstm_steps():
    """In which order the parts of two layers can be computed: by waves, or layer by layer."""
    figure, axes = canvas(6.2, 1.7, x=(-0.9, 15.4), y=(-0.7, 3.6))
    for left, name, step in ((0, 'LSTM', lambda t, layer: t + layer + 1),
                             (8.4, 'transformer, while it trains', lambda t, layer: layer + 1)):
        axes.text(left, 3.1, name, size=9)
        for layer in range(2):
            for t in range(6):
                x, y = left + t * 1.1, layer * 1.4
                box(axes, x, y, 0.8, 0.8, str(step(t, layer)), fill=LIGHT if layer else PALE,
                    size=8)
                if left == 0:
                    if t:
                        arrow(axes, (x - 0.3, y + 0.4), (x, y + 0.4))
                    if layer:
                        arrow(axes, (x + 0.4, 0.8), (x + 0.4, 1.4))
                elif layer:
                    for back in range(t + 1):
                        axes.plot([left + back * 1.1 + 0.4, x + 0.4], [0.8, 1.4], color=DARK,
                                  lw=0.5, ls='-')
    for left in (0, 8.4):
        axes.text(left + 3.1, -0.55, 'positions', size=8, ha='center')
    return figure
