"""The book's figures: python dev/figures.py draws docs/guide/figures/*.svg; or some, by name.

Each public function of a module in dev/drawings/ draws the figure of its name, and returns it. A
figure carries a hash of what it is made of: the module, this file, and the data that the module
names in DATA (JSON in docs/guide/data/, which commands have written). A test compares the hashes.
"""
import hashlib
import importlib
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'dev')]
import matplotlib  # noqa: E402

matplotlib.use('svg')
import matplotlib.pyplot as plt  # noqa: E402

FIGURES, DATA = ROOT / 'docs/guide/figures', ROOT / 'docs/guide/data'
# Legible in grey: they differ in lightness.
DARK, BLUE, ORANGE, LIGHT, PALE = '#1a1a1a', '#1d4b7a', '#c96a1b', '#b8c4d0', '#eef1f4'
STYLE = {'svg.hashsalt': 'guide', 'svg.fonttype': 'path', 'font.size': 9, 'axes.spines.top': False,
         'axes.spines.right': False, 'axes.edgecolor': DARK, 'lines.linewidth': 1.6,
         'axes.prop_cycle': matplotlib.cycler(color=[BLUE, ORANGE, '#7a7a7a', DARK],
                                              linestyle=['-', '--', ':', '-.'])}


def canvas(width: float = 6.0, height: float = 3.0, **limits):
    """(figure, axes) in inches, for curves; for a drawing without axes give x=(0, 10), y=(0, 5)."""
    figure, axes = plt.subplots(figsize=(width, height), layout='constrained')
    if limits:
        axes.set(xlim=limits['x'], ylim=limits['y'])
        axes.set_aspect('equal')
        axes.axis('off')
    return figure, axes


def box(axes, x: float, y: float, width: float, height: float, text: str = '', *, fill=PALE,
        size: float = 9, color=DARK) -> None:
    """A labelled rectangle, its lower left corner at (x, y)."""
    axes.add_patch(plt.Rectangle((x, y), width, height, facecolor=fill, edgecolor=DARK, lw=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha='center', va='center', size=size, color=color)


def arrow(axes, start: tuple, end: tuple, text: str = '', *, color=DARK, size: float = 8) -> None:
    """An arrow between two points, with a label at its middle."""
    axes.annotate('', end, start, arrowprops=dict(arrowstyle='->', color=color, lw=1,
                                                  shrinkA=0, shrinkB=0))
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, f' {text}', size=size,
                  color=color, va='center')


def modules() -> list[ModuleType]:
    return [importlib.import_module(f'drawings.{path.stem}')
            for path in sorted((ROOT / 'dev/drawings').glob('*.py'))]


def drawings() -> Iterator[tuple[str, Callable, str]]:
    """(name, function, hash of what it is made of) of all figures."""
    for module in modules():
        made_of = [Path(__file__), Path(module.__file__ or ''),
                   *(DATA / name for name in getattr(module, 'DATA_FILES', ()))]
        sources = b''.join(path.read_bytes() for path in made_of)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith('_'):
                yield name, function, hashlib.sha256(sources).hexdigest()[:16]


def drawn_from(path: Path) -> str:
    """The hash in a figure; '' if there is none."""
    found = re.search(r'<!-- made of ([0-9a-f]{16}) -->', path.read_text(encoding='utf-8'))
    return found[1] if found else ''


def main(wanted: list[str]) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, draw, made_of in drawings():
        if wanted and name not in wanted:
            continue
        with plt.rc_context(STYLE):
            figure, text = draw(), io.StringIO()
            figure.savefig(text, format='svg', metadata={'Date': None})
        plt.close(figure)
        svg = text.getvalue().rstrip() + f'\n<!-- made of {made_of} -->\n'
        (FIGURES / f'{name}.svg').write_text(svg, encoding='utf-8')
        print(f'docs/guide/figures/{name}.svg')


if __name__ == '__main__':
    main(sys.argv[1:])
