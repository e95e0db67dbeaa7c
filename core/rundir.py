"""The run directory: which one a command goes on with, its log, and how a run is asked to end.

out/<run>/ holds log.jsonl, loss.png, copies of the source, and checkpoints (core/checkpoint.py).
"""
import json
import math
import os
import platform
import shutil
import signal
import subprocess
from pathlib import Path

import torch

from core import checkpoint
from core.settings import stop, warn


def find_run(base: Path, identity: dict, insist: bool = False) -> tuple[str, dict | None]:
    """Where a run with this identity goes: (directory, state of the checkpoint to resume from).

    An unfinished run of the same identity under `base`, `base`-2, ... is resumed; otherwise the
    first free name begins a new one (state None). With `insist` (init_from=resume) it is the one in
    `base`: what has changed is a warning, or a stop where it makes the checkpoint useless.
    """
    number, folder = 1, base
    while not insist:
        if not checkpoint.steps(folder):  # nothing there, or it ended before its first one
            if number > 1:
                print(f'{base} holds another or a finished run, so this one is {folder}')
            return str(folder), None
        if not is_finished(folder):
            state = checkpoint.read_state(folder, checkpoint.newest(folder))
            if state['identity'] == identity:
                print(f'resuming {folder} after step {state["step"]}: nothing that matters has '
                      'changed')
                return str(folder), state
        number += 1
        folder = base.with_name(f'{base.name}-{number}')
    if not checkpoint.steps(base):
        stop(f'init_from=resume: {base} holds no checkpoint; start it without init_from')
    state = checkpoint.read_state(base, checkpoint.newest(base))
    for name, was, now in differences(state['identity'], identity):
        what = f'{name} is {now}, but was {was} when {base} was begun'
        if name.split('.')[0] in ('architecture', 'data', 'tokenizer') or name == \
                'optimizer.optimizer':
            stop(f'init_from=resume: {what}; restore it, or start a new run with --out_dir')
        warn(what)
    return str(base), state


def differences(old: dict, new: dict, prefix: str = '') -> list[tuple]:
    """(name, old, new) of each field in which two identities differ, as 'architecture.n_layer'."""
    found = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f'{prefix}{key}.')
        elif was != now:
            found.append((prefix + key, was, now))
    return found


def is_finished(folder: Path) -> bool:
    """Whether the run's log ends with its end."""
    found = events(folder)
    return bool(found) and found[-1]['event'] == 'end'


class StopRequest:
    """Notes that SIGTERM, SIGUSR1 or Ctrl-C asks this process to end; a second one ends it at once.

    A context; `asked` is the signal's name, '' before one comes.
    """
    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __enter__(self):
        self.asked = ''
        self.before = {number: signal.signal(number, self.receive) for number in self.SIGNALS}
        return self

    def receive(self, number, frame) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = signal.Signals(number).name
        # print() is not allowed here: the signal may have come in the middle of another print()
        os.write(2, f'\n{self.asked}: ends after this step and a checkpoint; once more: at '
                    'once\n'.encode())

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """Appends events to log.jsonl, one JSON object a line; does nothing when `folder` is None.

    The numbers of an event that has a step also go to `others`, functions of (step, numbers). A
    full disk is a warning: what could not be written is written with a later event.
    """

    def __init__(self, folder: Path | None, others=()):
        self.file, self.others = None, others
        if folder:
            self.file = open(folder / 'log.jsonl', 'a', encoding='utf-8')

    def write(self, event: str, **fields) -> None:
        """Append one event."""
        if not self.file:
            return
        fields = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x
                  for name, x in fields.items()}  # JSON knows neither NaN nor infinity
        try:
            self.file.write(json.dumps({'event': event, **fields}) + '\n')
            self.file.flush()
        except OSError as e:
            warn(f'{self.file.name} cannot be written now ({e.strerror}); the run goes on')
        numbers = {name: x for name, x in fields.items() if type(x) in (int, float)}
        if step := numbers.pop('step', None):
            for other in self.others:
                other(step, numbers)


def events(folder) -> list[dict]:
    """All events in a run's log, in order; a line cut off by a kill is passed over."""
    path, found = Path(folder) / 'log.jsonl', []
    if not path.exists():
        return found
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and 'event' in event:
                found.append(event)
    return found


def read_log(folder, event: str) -> list[dict]:
    """The events of one kind in a run's log, in order."""
    return [e for e in events(folder) if e['event'] == event]


def cut_log(folder: Path, step: int, evaluated: int) -> None:
    """Take out of the log what a run resumed after `step` does again.

    `evaluated` is the last step whose evaluation and sample its checkpoint knows to be done.
    """
    last = {'eval': evaluated, 'sample': evaluated, 'end': -1}
    kept = [json.dumps(e) + '\n' for e in events(folder)
            if e.get('step', 0) <= last.get(e['event'], step)]
    tmp = folder / '.tmp-log.jsonl'
    tmp.write_text(''.join(kept), encoding='utf-8')
    checkpoint.flush(tmp)
    os.replace(tmp, folder / 'log.jsonl')


def start_log(run: Path, state: dict | None, settings: dict, sources, others, **facts) -> Log:
    """The log of a run that begins (state None), with copies of its source, or goes on.

    Stops if the directory cannot be written.
    """
    try:
        if state:
            cut_log(run, state['step'], state['evaluated'])
            log = Log(run, others)
            log.write('resume', step=state['step'], settings=settings, **facts)
            return log
        (run / 'log.jsonl').unlink(missing_ok=True)  # of a run that never came to a checkpoint
        for source in sources:
            shutil.copy(source, run)
        log = Log(run, others)
    except OSError as e:
        stop(f'{e.filename}: {e.strerror}; make room, or choose another --out_dir')
    log.write('start', settings=settings, git=git_hash(), **facts,
              versions={'python': platform.python_version(), 'torch': torch.__version__})
    return log


def service_loggers(run: Path, settings: dict, wandb: bool, tensorboard: bool) -> list:
    """Functions (step, {name: number}) that send a run's numbers to the services asked for."""
    loggers = []
    if wandb:
        import wandb as service
        service.init(project='scratchgpt', name=run.name, dir=run, config=settings)
        loggers.append(lambda step, numbers: service.log(numbers, step=step))
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run)
        loggers.append(lambda step, numbers: [writer.add_scalar(name, x, step)
                                              for name, x in numbers.items()])
    return loggers


def plot_losses(run: Path) -> bool:
    """Draw loss.png from log.jsonl; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for event, key, style in (('step', 'train_loss', '-'), ('eval', 'val_loss', 'o-')):
        found = read_log(run, event)
        axes.plot([e['step'] for e in found], [e[key] for e in found], style,
                  label=key.replace('_', ' '))
    axes.set(xlabel='step', ylabel='nats per token', title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / 'loss.png', dpi=120)
    return True


def git_hash() -> str:
    """The commit of the source that runs, with a + if it was edited; '' outside a repository."""
    try:
        here = Path(__file__).parent
        git = lambda *words: subprocess.run(['git', *words], cwd=here, check=True, text=True,
                                            capture_output=True).stdout.strip()
        return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
    except (OSError, subprocess.CalledProcessError):
        return ''
