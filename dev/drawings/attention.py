"""Figures of the chapter on attention."""
import json

import numpy as np
from figures import DATA, box, canvas

DATA_FILES = ('attention_patterns.json',)


def causal_mask():
    """The weights of the chapter's example, with a fourth token."""
    q = np.array([[1, 0], [0, 1], [1, 1], [2, 1]])
    k = np.array([[1, 0], [0, 2], [1, 1], [0, 0]])
    figure, axes = canvas(3.4, 2.6, x=(-1.6, 4.2), y=(-0.2, 4.8))
    for i in range(4):
        scores = np.exp(q[i] @ k[:i + 1].T / 2 ** 0.5)
        for j in range(4):
            seen = j <= i
            text = f'{scores[j] / scores.sum():.2f}' if seen else ''
            box(axes, j, 3 - i, 1, 1, text, fill='#cfd9e4' if seen else 'white', size=8)
        axes.text(-0.15, 3.5 - i, f'query {i + 1}', ha='right', va='center', size=8)
        axes.text(i + 0.5, 4.15, f'key {i + 1}', ha='center', size=8)
    return figure


def attention_patterns():
    """Two heads of a trained model; the data are made by dev/pictures.py."""
    found = json.loads((DATA / DATA_FILES[0]).read_text())
    figure, axes = canvas(6.2, 3.3)
    figure.clear()
    for i, head in enumerate(found['heads']):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.imshow(head['weights'], cmap='Greys', vmin=0, vmax=0.8)
        axes.set_xticks(range(len(found['text'])), list(found['text']), size=7, family='monospace')
        axes.set_yticks(range(len(found['text'])), list(found['text']), size=7, family='monospace')
        axes.set_title(f'layer {head["layer"]}, head {head["head"]}', size=9)
    return figure
