"""Results of evaluations on disk and in words: eval.json, a table, a picture."""
import json
import math
from pathlib import Path

from core.data.corpus import save_json
from core.read.download import locked
from core.run.log import draw
from core.settings import stop

SHOWN = {       # metrics, what they are shown as, and whether a larger one is better
    'acc': ('accuracy', True), 'acc_norm': ('accuracy by length', True),
    'perplexity': ('perplexity', False), 'bits_per_byte': ('bits per byte', False),
    'bits_per_character': ('bits per character', False),
    'word_perplexity': ('perplexity per word', False),
    'strict': ('exact answers', True), 'flexible': ('last number right', True),
    'refusal': ('harmful ones refused', True),
    'over_refusal': ('harmless ones refused', False)}


def shown(metric: str) -> str:
    return SHOWN[metric][0] if metric in SHOWN else metric.replace('_', ' ')


class Results:
    """The evaluations of a model that are in eval.json, each known by hashes of all that decides
    it: weights, items, settings. Only rank 0 writes."""

    def __init__(self, folder: Path, rank: int = 0):
        self.path, self.rank = folder / 'eval.json', rank
        self.found = self.read()

    def read(self) -> list[dict]:
        """What eval.json has. Stops if that is something else."""
        if not self.path.is_file():
            return []
        try:
            found = json.loads(self.path.read_text(encoding='utf-8'))['results']
            if not all(isinstance(one['hash'], str) for one in found):
                raise ValueError('a hash is no text')
            return found
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            return stop(f'{self.path}: no results of an evaluation ({e!r:.100}); remove it, and '
                        'everything is evaluated again')

    def get(self, key: str) -> dict | None:
        return next((one for one in self.found if one['hash'] == key), None)

    def add(self, result: dict) -> None:
        """Keep a result, in the place of one of the same items, checkpoint and settings, beside
        those that another process has added meanwhile."""
        same = ('task', 'items', 'step', 'settings')

        def with_it(found: list[dict]) -> list[dict]:
            return [*(one for one in found if any(one[k] != result[k] for k in same)), result]
        if self.rank:
            self.found = with_it(self.found)
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path.with_name('.eval.json.lock')):
                self.found = with_it(self.read())
                save_json(self.path, {'results': self.found})
        except OSError as e:
            stop(f'{self.path}: {e.strerror}; make room, and the same command goes on with the '
                 'tasks that are kept already')

    def draw(self, results: list[dict]) -> bool:
        """eval.png: these scores with their intervals, or if they are there of several checkpoints
        of a run, curves."""
        same = [(one['task'], one['items'], one['settings']) for one in results]
        rows = [one for one in self.found
                if (one['task'], one['items'], one['settings']) in same]
        steps = sorted({one['step'] for one in rows})
        panels = {}
        for one in rows:
            for metric, score in one['scores'].items():
                panels.setdefault(metric, []).append((one['task'], one['step'], score))

        def fill(figure):
            axes = figure.subplots(1, len(panels), squeeze=False)[0]
            for ax, (metric, points) in zip(axes, panels.items()):
                for name in dict.fromkeys(task for task, *_ in points):
                    mine = [(step, score) for task, step, score in points if task == name]
                    mine.sort(key=lambda pair: pair[0])
                    x = [step if len(steps) > 1 else Path(name).name for step, _ in mine]
                    y = [score['value'] for _, score in mine]
                    errors = [[0, 0] if score['low'] is None else
                              [score['value'] - score['low'], score['high'] - score['value']]
                              for _, score in mine]
                    ax.errorbar(x, y, yerr=list(zip(*errors)), capsize=4, marker='o', label=name,
                                linestyle='-' if len(steps) > 1 else '')
                ax.set(title=shown(metric), xlabel='step' if len(steps) > 1 else '')
                ax.grid(alpha=0.3)
                if len(steps) > 1:
                    ax.legend()
                else:
                    ax.margins(x=0.5)
                    ax.tick_params(axis='x', rotation=20)
        return bool(panels) and draw(self.path.with_name('eval.png'), fill, 4 * len(panels), 4)


def number(x: float) -> str:
    """A score with four digits."""
    return f'{x:.4f}' if abs(x) < 100 else f'{x:,.1f}' if abs(x) < 1e6 else f'{x:.3e}'


def line(task: str, metric: str, score: dict) -> str:
    """A row of the table."""
    between = '' if score['low'] is None else \
        f'{number(score["low"])} to {number(score["high"])}'
    value = number(score['value'])
    return (f'{task[:24]:24} {shown(metric):22} {value:>9}  {between:20} {score["n"]:>7,} '
            f'{score["of"]}')


HEADER = f'{"task":24} {"score":22} {"":>9}  {"95% interval":20} {"n":>7}'


def compared(name: str, metric: str, found: dict) -> str:
    """A paired difference in words."""
    low, high, p = found['low'], found['high'], found['p_corrected']
    better = (found['difference'] > 0) == SHOWN.get(metric, ('', True))[1]
    if p >= 0.05 or math.isnan(low):
        said = 'no significant difference'
    else:
        said = f'significantly {"better" if better else "worse"}'
    return (f'{name[:24]:24} {shown(metric):22} {found["difference"]:>+9.4f}  '
            f'{low:+.4f} to {high:+.4f}   p = {p:.4f}: {said}')

