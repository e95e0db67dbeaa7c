"""Figures of the chapter on precision."""
from pathlib import Path

import numpy as np
import torch
from figures import BLUE, DARK, LIGHT, ORANGE, PALE, arrow, box, canvas

from core.net.weights import build_model
from model import GPTConfig


def precision_bits():
    """Three formats bit by bit, each with the bits of -6.5."""
    figure, axes = canvas(6.2, 1.75, x=(-3.3, 32.2), y=(-0.4, 9.4))
    for row, (name, dtype, integer, exponent) in enumerate((
            ('fp32', torch.float32, torch.int32, 8), ('bfloat16', torch.bfloat16, torch.int16, 8),
            ('fp16', torch.float16, torch.int16, 5))):
        n = torch.finfo(dtype).bits
        bits = torch.tensor(-6.5, dtype=dtype).view(integer).item() % 2 ** n
        y = 6.4 - 3.1 * row
        axes.text(-0.4, y + 0.7, name, ha='right', va='center', size=9)
        for i, bit in enumerate(f'{bits:0{n}b}'):
            fill = ORANGE if i == 0 else LIGHT if i <= exponent else PALE
            box(axes, i, y, 1, 1.4, bit, fill=fill, size=7)
        for start, width, text in ((1, exponent, f'exponent: {exponent} bits'),
                                   (1 + exponent, n - 1 - exponent,
                                    f'mantissa: {n - 1 - exponent} bits')):
            axes.text(start + width / 2, y + 1.6, text, size=7, ha='center', va='bottom')
        if row == 0:
            axes.text(0.5, y + 1.6, 'sign', size=7, ha='center', va='bottom')
    return figure


def precision_flow():
    """What a training step keeps in which precision."""
    figure, axes = canvas(6.2, 2.5, x=(0, 12.4), y=(-0.2, 4.8))
    wide, narrow = PALE, LIGHT
    box(axes, 0.2, 3.3, 2.2, 1.0, 'weights', fill=wide)
    box(axes, 3.9, 3.3, 2.2, 1.0, 'their copy', fill=narrow)
    box(axes, 3.9, 1.6, 2.2, 1.0, 'product', fill=narrow)
    box(axes, 0.2, 1.6, 2.2, 1.0, 'norm', fill=wide)
    box(axes, 7.4, 1.6, 2.0, 1.0, 'logits', fill=narrow)
    box(axes, 10.2, 1.6, 2.0, 1.0, 'loss', fill=wide)
    box(axes, 7.4, 3.3, 2.0, 1.0, 'optimizer', fill=wide)
    box(axes, 10.2, 3.3, 2.0, 1.0, 'gradients', fill=wide)
    box(axes, 0.2, 0.0, 5.9, 0.8, 'residual stream', fill=wide)
    arrow(axes, (2.4, 3.8), (3.9, 3.8))
    axes.text(3.15, 3.95, 'round', size=7, ha='center')
    arrow(axes, (5.0, 3.3), (5.0, 2.6))
    arrow(axes, (2.4, 2.1), (3.9, 2.1))
    axes.text(3.15, 2.25, 'round', size=7, ha='center')
    arrow(axes, (1.3, 0.8), (1.3, 1.6))
    arrow(axes, (5.0, 1.6), (5.0, 0.8))
    axes.text(5.1, 1.15, 'add', size=7, va='center')
    arrow(axes, (6.1, 2.1), (7.4, 2.1))
    axes.text(6.75, 2.25, 'head', size=7, ha='center')
    arrow(axes, (9.4, 2.1), (10.2, 2.1))
    arrow(axes, (11.2, 2.6), (11.2, 3.3))
    axes.text(11.1, 2.95, 'backward, in the same precisions', size=7, va='center', ha='right')
    arrow(axes, (10.2, 3.8), (9.4, 3.8))
    axes.plot([8.4, 8.4, 1.3], [4.3, 4.65, 4.65], color=DARK, lw=1, ls='-')
    arrow(axes, (1.3, 4.65), (1.3, 4.3))
    for x, fill, text in ((7.4, wide, '32 bits'), (9.6, narrow, '16 bits')):
        box(axes, x, 0.2, 0.5, 0.4, '', fill=fill)
        axes.text(x + 0.7, 0.4, text, size=8, va='center')
    return figure


TARGETS = 491_520   # of a step of bare train.py


def _gradients() -> np.ndarray:
    """Sizes of the gradients in the residual stream of a small model, after 40 steps on the text of
    this file, as they are when the loss is a mean over TARGETS."""
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = build_model(GPTConfig(n_layer=3, n_head=4, n_embd=64, vocab_size=256, block_size=128,
                                  position='rope', norm='rmsnorm', mlp='swiglu', tied=False,
                                  bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    streams: list = []
    for block in model.h.values():
        block.register_forward_hook(lambda module, args, out: streams.append(out))
    for _ in range(40):
        streams.clear()
        optimizer.zero_grad()
        rows = torch.stack([text[i:i + 129] for i in torch.randint(len(text) - 129, (8,)).tolist()])
        loss = model(rows[:, :-1], rows[:, 1:])
        for x in streams:
            x.retain_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([x.grad.flatten() for x in streams]).abs().numpy() * 1024 / TARGETS


def precision_gradients():
    """Sizes of gradients, beside what fp16 can hold."""
    figure, axes = canvas(6.2, 2.5)
    edges = np.arange(-44, 19)
    sizes = _gradients()
    counts = np.histogram(np.log2(sizes[sizes > 0]), edges)[0] / len(sizes)
    axes.stairs(counts, edges, label='gradients', color=BLUE, lw=1.6)
    axes.stairs(counts, edges + 16, label='the same, loss times $2^{16}$', color=ORANGE, lw=1.6,
                ls='--')
    top = counts.max() * 1.7
    axes.axvspan(-25, -14, color=LIGHT, lw=0, zorder=0)
    axes.axvspan(-14, 16, color=PALE, lw=0, zorder=0)
    for x, text in ((-35, 'fp16: becomes 0'), (-19.5, 'fewer digits'), (1, 'fp16: all digits')):
        axes.text(x, top * 0.97, text, size=8, ha='center', va='top')
    axes.set(xlim=(-44, 18), ylim=(0, top), xlabel='$\\log_2$ of the size', ylabel='share')
    axes.legend(frameon=False, fontsize=8, loc='center right')
    return figure
