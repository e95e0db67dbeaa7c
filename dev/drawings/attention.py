"""Figures of the chapter on attention."""
import json

import numpy as np
from figures import DATA, box, canvas

DATA_FILES = ('attention_patterns.json',)


def causal_mask():
    """The weights of the chapter's example."""
    q, k = np.array([[1, 0], [0, 1], [1, 1]]), np.array([[1, 0], [0, 2], [1, 1]])
    figure, axes = canvas(2.9, 2.1, x=(-1.6, 3.2), y=(-0.2, 3.7))
    for i in range(3):
        scores = np.exp(q[i] @ k[:i + 1].T / 2 ** 0.5)
        for j in range(3):
            seen = j <= i
            text = f'{scores[j] / scores.sum():.2f}' if seen else ''
            box(axes, j, 2 - i, 1, 1, text, fill='#cfd9e4' if seen else 'white', size=8)
        axes.text(-0.15, 2.5 - i, f'query {i + 1}', ha='right', va='center', size=8)
        axes.text(i + 0.5, 3.15, f'key {i + 1}', ha='center', size=8)
    return figure


def attention_patterns():
    """Two heads of a trained model; the data are made by dev/pictures.py."""
    found = json.loads((DATA / DATA_FILES[0]).read_text())
    figure, axes = canvas(6.2, 3.7)
    figure.clear()
    for i, head in enumerate(found['heads']):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.imshow(head['weights'], cmap='Greys', vmin=0, vmax=0.8)
        places = range(len(found['text']))
        axes.set_xticks(places, list(found['text']), size=5.5, family='monospace')
        axes.set_yticks(places, list(found['text']), size=5.5, family='monospace')
        axes.tick_params(length=1.5)
        axes.set_title(f'block {head["layer"]}, head {head["head"]}', size=9)
        axes.set(xlabel='key', ylabel='query')
    axes.annotate('line break', (found['text'].index('/') + 0.6, 27), (13, 27), size=8,
                  va='center', arrowprops={'arrowstyle': '->'})
    return figure
