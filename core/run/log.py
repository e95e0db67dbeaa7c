"""The log of a run: log.jsonl, one JSON object a line, the picture of its losses, and the services
that get the same numbers."""
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from core.run import checkpoint
from core.settings import stop, warn
from core.source import MATHEMATICS


class Log:
    """Appends events to log.jsonl in a folder; without one it does nothing. The numbers of an event
    with a step also go to `others`, functions of (step, numbers). A full disk is a warning: what
    could not be written is written with a later event."""

    def __init__(self, folder: Path | None, others=()):
        self.file, self.others, self.pending = None, others, b''
        if folder:
            self.file = open(folder / 'log.jsonl', 'ab', buffering=0)

    def write(self, event: str, **fields) -> None:
        if not self.file:
            return
        fields = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x
                  for name, x in fields.items()}  # JSON knows neither NaN nor infinity
        self.pending += (json.dumps({'event': event, **fields}) + '\n').encode()
        try:
            while self.pending:
                self.pending = self.pending[self.file.write(self.pending):]
        except OSError as e:
            warn(f'{self.file.name} cannot be written now ({e.strerror}); the run goes on')
        numbers = {name: x for name, x in fields.items() if type(x) in (int, float)}
        if step := numbers.pop('step', None):
            for other in self.others:
                other(step, numbers)


NUMBER = (int, float)
KINDS = {   # what those who read a log need to be of these types, if an event has it
    'event': str, 'step': int, 'seconds': NUMBER, 'tokens': NUMBER, 'parameters': NUMBER,
    'flops_per_token': NUMBER, 'settings': dict, 'identity': dict, 'versions': dict, 'device': list}


def events(folder) -> list[dict]:
    """All events in a run's log, in order; a line cut off by a kill, or damaged, is passed over."""
    path, found = Path(folder) / 'log.jsonl', []
    text = path.read_bytes().decode(errors='replace') if path.exists() else ''
    for line in text.split('\n'):
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and is_event(event):
                found.append(event)
    return found


def is_event(found: dict) -> bool:
    """Whether a line of a log can be one that Log has written."""
    identity = found.get('identity')
    return ('event' in found and (found['event'] != 'step' or 'step' in found)
            and all(isinstance(found[name], kind) and (
                kind not in (int, NUMBER) or 0 <= found[name] < 1 << 63)
                    for name, kind in KINDS.items() if name in found)
            and all(isinstance(part, dict) for name, part in (identity or {}).items()
                    if name in ('architecture', 'settings', 'data')))


def read_log(folder, event: str, number: str = '') -> list[dict]:
    """The events of one kind in a run's log, in order; with `number` those in which it is one, and
    finite: others are there as text."""
    return [e for e in events(folder) if e['event'] == event
            and (not number or isinstance(e.get(number), float) and math.isfinite(e[number]))]


def cut_log(folder: Path, step: int, evaluated: int) -> None:
    """Take out of the log what a run resumed after `step` does again; its evaluations and samples
    up to the step `evaluated` are done."""
    last = {'eval': evaluated, 'sample': evaluated, 'answer': evaluated, 'end': -1}
    kept = [json.dumps(e) + '\n' for e in events(folder)
            if e.get('step', 0) <= last.get(e['event'], step)]
    tmp = folder / '.tmp-log.jsonl'
    tmp.write_text(''.join(kept), encoding='utf-8')
    checkpoint.flush(tmp)
    os.replace(tmp, folder / 'log.jsonl')


def start_log(run: Path, state: dict | None, settings: dict, script: str, **facts) -> Log:
    """The log of a run that goes on, or begins (state None): then with copies of `script` and of
    the model's mathematics. Stops if the directory cannot be written."""
    others = service_loggers(run, settings)
    try:
        if state:
            cut_log(run, state['step'], state['evaluated'])
        else:
            (run / 'log.jsonl').unlink(missing_ok=True)  # of a run that had no checkpoint yet
            for source in (script, *MATHEMATICS):
                shutil.copy(Path(script).parent / source, run)
        log = Log(run, others)
    except OSError as e:
        stop(f'{e.filename or run}: {e.strerror}; make room, or choose another --out_dir')
    if state:
        log.write('resume', step=state['step'], settings=settings, **facts)
    else:
        log.write('start', settings=settings, git=git_hash(), **facts,
                  versions={'python': platform.python_version(), 'torch': torch.__version__})
    return log


def service_loggers(run: Path, settings: dict) -> list:
    """Functions (step, {name: number}) that send a run's numbers to the services asked for."""
    loggers = []
    if settings.get('wandb'):
        import wandb as service  # type: ignore  # not in requirements-dev.txt
        service.init(project='scratchgpt', name=run.name, dir=run, config=settings)
        loggers.append(lambda step, numbers: service.log(numbers, step=step))
    if settings.get('tensorboard'):
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run)
        loggers.append(lambda step, numbers: [writer.add_scalar(name, x, step)
                                              for name, x in numbers.items()])
    return loggers


def plot_losses(run: Path) -> bool:
    """Draw loss.png from log.jsonl: the losses of steps, those of evaluations marked, and below
    them the learning rate. Returns whether that was possible."""
    def fill(figure):
        losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        for event, key, style in (('step', 'train_loss', '-'), ('eval', 'val_loss', 'o-')):
            found = read_log(run, event, key)
            losses.plot([e['step'] for e in found], [e[key] for e in found], style,
                        label=key.replace('_', ' '))
        found = read_log(run, 'step', 'learning_rate')
        rates.plot([e['step'] for e in found], [e['learning_rate'] for e in found], color='black')
        losses.set(ylabel='nats per token', title=run.name)
        rates.set(xlabel='step', ylabel='learning rate', ylim=(0, None))
        losses.legend()
        for axes in (losses, rates):
            axes.grid(alpha=0.3)
    return draw(run / 'loss.png', fill, 8, 6)


def draw(path: Path, fill, width: float, height: float) -> bool:
    """Write the picture of width x height inches that fill(figure) draws; returns whether it was
    drawn. Any failure is a warning, for the numbers matter more."""
    tmp = path.with_name(f'.{path.name}')
    try:
        if '~' in os.path.expanduser('~'):  # a user without a home, as in a container
            os.environ.setdefault('MPLCONFIGDIR', f'{tempfile.gettempdir()}/mpl-{os.getuid()}')
        from matplotlib.figure import Figure
        figure = Figure((width, height), layout='constrained')
        fill(figure)
        figure.savefig(tmp, dpi=120)
        os.replace(tmp, path)
    except Exception as e:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        warn(f'{path} was not drawn ({type(e).__name__}: {" ".join(str(e).split())[:200]})')
        return False
    return True


def git_hash() -> str:
    """The commit of the source that runs, with a + if it was edited; '' outside a repository."""
    words = ['git', 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty=+']
    try:
        return subprocess.run(words, cwd=Path(__file__).parent, check=True, text=True,
                              capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''
