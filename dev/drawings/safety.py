"""Figures of the chapter on safety, licences and reproducibility."""
import functools

import numpy as np
import torch
from figures import BLUE, DARK, LIGHT, ORANGE, PALE, ROOT, arrow, box, canvas

from core.net.weights import build_model
from model import GPTConfig


def safety_card():
    """How a licence gets from a source to a model card."""
    figure, axes = canvas(6.2, 2.7, x=(-0.1, 15.6), y=(-0.2, 6.6))
    parts = [('source', 'a named dataset,\nor your own files', 'licence,\nSHA-256 of files'),
             ('data/<name>/\nmeta.json', 'what was read\nand removed',
              'licence, steps,\nSHA-256 of all'),
             ('out/<run>/\nlog.jsonl', 'what was trained,\nand on what',
              'settings, losses,\nSHA-256 of all'),
             ('out/<run>-hf/\nREADME.md', 'the model card', 'all of these')]
    for i, (name, what, holds) in enumerate(parts):
        x = 4.15 * i
        box(axes, x, 1.4, 3.05, 5.0, fill='white')
        axes.text(x + 1.52, 5.6, name, ha='center', va='center', size=8,
                  family='monospace' if i else None)
        axes.text(x + 1.52, 4.2, what, ha='center', va='center', size=7.5)
        box(axes, x + 0.12, 1.6, 2.8, 1.6, holds, fill=PALE, size=7)
        if i:
            arrow(axes, (x - 1.1, 5.6), (x, 5.6))
    # The card looks the dataset up by its hash.
    axes.plot([5.7, 5.7], [1.4, 0.5], color=ORANGE, lw=1, ls='-')
    axes.plot([5.7, 13.9], [0.5, 0.5], color=ORANGE, lw=1, ls='-')
    arrow(axes, (13.9, 0.5), (13.9, 1.4), color=ORANGE)
    axes.text(9.8, 0.12, 'only if its SHA-256 is the one in the log', ha='center', va='center',
              size=7.5)
    return figure


def _pairwise(x: np.ndarray) -> np.ndarray:
    """Sums of rows whose length is a power of 2, neighbours first."""
    while x.shape[1] > 1:
        x = x[:, ::2] + x[:, 1::2]
    return x[:, 0]


def safety_sums():
    """The rounding error of sums in fp32, in two orders, and its bound."""
    rng, u = np.random.default_rng(0), 2.0 ** -24
    sizes = 2 ** np.arange(2, 18)
    found = {'one after the other': [], 'in pairs': []}
    for n in sizes:
        x = rng.random((40, n), np.float32)
        exact = x.sum(axis=1, dtype=np.float64)
        for name, sums in (('one after the other', np.cumsum(x, axis=1, dtype=np.float32)[:, -1]),
                           ('in pairs', _pairwise(x))):
            found[name].append((np.abs(sums - exact) / exact).max())
    figure, axes = canvas(4.8, 2.2)
    axes.loglog(sizes, (sizes - 1) * u, color=LIGHT, ls='-', label='bound by the equation')
    for (name, errors), color, style in zip(found.items(), (ORANGE, BLUE), ('o-', 's--')):
        axes.loglog(sizes, np.maximum(errors, u / 16), style, color=color, ms=3.5, label=name)
    axes.set(xlabel='numbers added', ylabel='error / sum of sizes', ylim=(1e-8, 2e-2))
    axes.legend(fontsize=8, frameon=False)
    axes.tick_params(labelsize=8)
    return figure


def _weights(rows: int, dtype: torch.dtype, steps: int = 200) -> list[torch.Tensor]:
    """The weights after each step of a small model on the bytes of train.py: 8 windows a step, so
    many rows at a time."""
    text = torch.tensor(list((ROOT / 'train.py').read_bytes()))
    model = build_model(GPTConfig(
        vocab_size=256, block_size=32, n_layer=2, n_head=2, n_embd=32, position='rope', tied=False,
        mlp='gelu', norm='rmsnorm', bias=False), seed=0).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        places = torch.randint(len(text) - 33, (8,), generator=generator)
        ids = torch.stack([text[place:place + 33] for place in places])
        for part in ids.split(rows):
            (model(part[:, :-1], part[:, 1:], reduction='sum') / (8 * 32)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    return found


@functools.cache
def _distances() -> dict[str, list[float]]:
    return {name: [((a - b).norm() / a.norm()).item()
                   for a, b in zip(_weights(8, dtype), _weights(4, dtype))]
            for name, dtype in (('fp32', torch.float32), ('fp64', torch.float64))}


def safety_divergence():
    """Two runs that differ in the order of additions only, drifting apart."""
    figure, axes = canvas(4.8, 2.2)
    for (name, values), color, style in zip(_distances().items(), (ORANGE, BLUE), ('-', '--')):
        axes.semilogy(range(1, len(values) + 1), values, style, color=color, label=name)
        axes.text(len(values) + 3, values[-1], name, color=DARK, size=8, va='center')
    axes.set(xlabel='step', ylabel='distance of the weights', xlim=(0, 222), ylim=(1e-19, 1e-3))
    axes.tick_params(labelsize=8)
    axes.grid(axis='y', color=LIGHT, lw=0.4, ls='-')
    return figure
