"""The run directory: which one a command goes on with, its log, and how a run is asked to end.

out/<run>/ holds log.jsonl, loss.png, copies of the source, and checkpoints (checkpoint.py).
"""
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from core import device as hardware
from core.ranks import parallel, processes
from core.run import checkpoint
from core.run.checkpoint import Saver
from core.settings import stop, warn

# Settings in which two starts of one run may differ: paths and what chooses the data, since hashes
# of what they hold are compared; where and how the work is done; how often it is looked at.
MAY_DIFFER = (
    'out_dir', 'init_from', 'run_dir', 'step', 'dataset', 'validation', 'fallback_dataset',
    'data_dir', 'tokenizer', 'labels', 'max_records', 'skip_bad', 'block_size',
    'device', 'compile', 'threads', 'micro_batch_size', 'activation_checkpointing', 'tp', 'pp',
    'zero', 'replicas', 'sequence_parallel', 'pp_schedule', 'timeout_minutes', 'check_layout',
    'eval_only', 'against', 'eval_interval', 'log_interval', 'save_interval', 'sample_interval',
    'sample_tokens', 'answers', 'answer_tokens', 'save_adapters', 'wandb', 'tensorboard')


def identity(settings: dict, config, tokenizer, **facts) -> dict:
    """All that must be unchanged for a run to be the same run: architecture, hashes of data,
    tokenizer, first weights and source, and each setting that is not in MAY_DIFFER: so also one
    that somebody adds to a script. It is as JSON gives it back."""
    architecture = asdict(config)
    kept = {k: x for k, x in settings.items() if k not in architecture and k not in MAY_DIFFER}
    return json.loads(json.dumps({'architecture': architecture, 'settings': kept,
                                  'tokenizer': tokenizer.hash(), **facts}))


def find_run(base: Path, identity: dict, insist: bool = False) -> tuple[Saver, dict | None]:
    """Where a run with this identity goes: (its locked directory, state to resume from or None).

    An unfinished run of the same identity under `base`, `base`-2, ... is resumed; otherwise the
    first free name begins a new one (state None). Stops if there is none, but one that differs in
    its source alone. With `insist` (init_from=resume) it is the one in `base`: what has changed is
    a warning, or a stop where it makes the checkpoint useless.
    """
    if insist:
        saver = Saver(base) if base.is_dir() else None
        if not saver or not checkpoint.steps(base):
            stop(f'init_from=resume: {base} holds no checkpoint; start it without init_from')
        return saver, check_changes(base, read_newest(saver), identity)
    number, why, edited = 0, '', ''
    stem = base.resolve() if base.name in ('', '..') else base
    while True:
        number += 1
        folder = base if number == 1 else Path(f'{stem}-{number}')
        # Nobody else may write while it is looked at; but another run's directory is passed by.
        if is_finished(folder):
            why = why or f'{folder} is finished'
            continue
        if changes := checkpoint.steps(folder) and differences(identity_of(folder), identity):
            source = [change for change in changes if change[0].split('.')[0] == 'source']
            # a setting that only one of the two knows comes with another source
            if any(None not in change for change in changes if change not in source):
                why = why or f'{folder} is another run ({told(changes)})'
            else:
                edited = edited or (
                    f'{folder}: {told(source or changes)}; to go on with that, add '
                    f'--init_from=resume --out_dir={folder}; to begin a new run, give another '
                    '--out_dir')
            continue
        if edited and not checkpoint.steps(folder):
            stop(edited)
        saver = Saver(folder)
        if is_finished(folder):     # since it was first looked at
            saver.lock.close()
            continue
        if checkpoint.steps(folder):
            state = read_newest(saver)
            print(f'resuming {folder} after step {state["step"]}: nothing that matters has changed')
            return saver, state
        if number > 1:
            print(f'{why}, so this one is {folder}')
        return saver, None


def open_run(base: Path, identity: dict, ranks, device, insist: bool = False):
    """(run directory, Saver of a rank that writes, state to resume from or None, device): what
    find_run gives rank 0, on all ranks, and the device with the dtype of a run that is resumed, if
    none is given. The identity gets that dtype.
    """
    saver = state = None
    if ranks.rank == 0:
        saver, state = find_run(base, identity, insist)
    run, state = processes.broadcast(saver and [str(saver.run), state], patient=True)
    if not ranks.plain:     # all write
        writers = parallel.writers(ranks)
        saver = saver or Saver(Path(run), writers)
        saver.writers = writers
    kept = state and state['identity'].get('settings', {}).get('dtype')
    if kept and kept != device.dtype and not identity['settings']['dtype']:
        device = hardware.with_dtype(device, kept)
        processes.print0(device.why[1])
    identity['settings']['dtype'] = device.dtype
    return Path(run), saver, state, device


def resume(at, state: dict, run: Path, learner, limited: bool = True) -> None:
    """Go back to where a checkpoint was saved. Stops if the run has done more steps than it is to
    do now, if they are limited."""
    planned = at.max_steps
    at.restore(state).max_steps = planned
    if limited and at.step > planned:
        stop(f'max_steps={planned}: {run} has done {at.step} steps already')
    learner.restore(run, state)


def load_base(run_dir: str, step: int, data_dir: str, block_size: int, ranks,
              classifier: bool = False):
    """The model that a stage goes on with, as load_run gives it, and how many tokens a row has:
    block_size, or if that is 0 as many as the stage before had, or as the model knows, at most
    2,048. Stops if it knows fewer.
    """
    if ranks.rank == 0:     # downloaded before all ranks ask for it
        checkpoint.find_model(run_dir, data_dir)
    processes.broadcast(None, patient=True)
    model, tokenizer, state = checkpoint.load_run(run_dir, step, data_dir=data_dir,
                                                  classifier=classifier)
    known = model.config.block_size
    if block_size > known:
        stop(f'block_size={block_size}: the model knows only {known} positions')
    return model, tokenizer, state, block_size or state.get('block_size') or min(2048, known)


def named(name: str, data: str) -> Path:
    """Where a run goes: out/<name>, with the dataset if that is another than the config's own."""
    return Path('out') / (f'{name}-{data}' if data not in ('', name) else name)


def read_newest(saver: Saver) -> dict:
    """The state of the newest undamaged checkpoint. Stops if there is none."""
    saver.saved = checkpoint.newest(saver.run)
    return checkpoint.read_state(saver.run, saver.saved)


def identity_of(folder: Path) -> dict:
    """The identity with which a run was begun or last resumed, by its log, or else by its newest
    checkpoint; empty without them."""
    found = [e['identity'] for e in events(folder) if 'identity' in e]
    if not found and (steps := checkpoint.steps(folder)):
        found = [checkpoint.read_state(folder, steps[-1])['identity']]
    return found[-1] if found else {}


def check_changes(base: Path, state: dict, identity: dict) -> dict:
    """The state, if it can be resumed with another identity: changes are a warning, or a stop where
    the checkpoint would be of no use. A field that is new comes with a source that was edited."""
    changes = differences(state['identity'], identity)
    useless = [change for change in changes if None not in change and (
        change[0].split('.')[0] in ('architecture', 'data', 'tokenizer', 'weights')
        or change[0] == 'settings.optimizer')]
    if useless:
        stop(f'init_from=resume: {base}: {told(useless)}; restore it, or start a new run with '
             '--out_dir')
    if changes:
        warn(f'{base}: {told(changes)}')
    return state


def differences(old: dict, new: dict, prefix: str = '') -> list[tuple]:
    """(name, old, new) of each field in which two identities differ, as 'architecture.n_layer'; a
    dtype that is not given does not."""
    found = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f'{prefix}{key}.')
        elif was != now and (prefix + key, now) != ('settings.dtype', ''):
            found.append((prefix + key, was, now))
    return found


def told(changes: list[tuple]) -> str:
    """Three of some differences in words; settings first, which may have caused the others."""
    changes = sorted(changes, key=lambda change: not change[0].startswith('settings.'))
    words = ['the source of an older version is not known' if name == 'source' else
             f'{name[7:]} has changed' if name.startswith('source.') else
             f'{name.removeprefix("settings.")} is {now!s:.20}, but was {was!s:.20}'
             for name, was, now in changes[:3]]
    return ', '.join(words) + f' and {len(changes) - 3} more' * (len(changes) > 3)


def is_finished(folder: Path) -> bool:
    """Whether the run's log ends with its end."""
    found = events(folder)
    return bool(found) and found[-1]['event'] == 'end'


class StopRequest:
    """Notes that SIGTERM, SIGUSR1 or Ctrl-C asks this process to end; a second one ends it at once.

    A context; `asked` is the signal's name, '' before one comes. A second one so soon after it that
    no person can have sent it is the same one again: Slurm signals every process of a job, and
    torchrun hands its own signal on to those that have had it already.
    """
    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __enter__(self):
        self.asked, self.since = '', 0.0
        self.before = {number: signal.signal(number, self.receive) for number in self.SIGNALS}
        return self

    def receive(self, number, frame) -> None:
        """The handler: note the first signal, end at the second."""
        if self.asked and time.monotonic() - self.since > 0.5:
            os._exit(128 + number)
        if self.asked:
            return
        self.asked, self.since = signal.Signals(number).name, time.monotonic()
        # print() is not allowed here: the signal may have come in the middle of another print()
        os.write(2, f'\n{self.asked}: ends after this step and a checkpoint; once more: at '
                    'once\n'.encode())

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """Appends events to log.jsonl, one JSON object a line; does nothing when `folder` is None.

    The numbers of an event that has a step also go to `others`, functions of (step, numbers). A
    full disk is a warning: what could not be written is kept, and written with a later event.
    """

    def __init__(self, folder: Path | None, others=()):
        self.file, self.others, self.pending = None, others, b''
        if folder:
            self.file = open(folder / 'log.jsonl', 'ab', buffering=0)

    def write(self, event: str, **fields) -> None:
        """Append one event."""
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
    last = {'eval': evaluated, 'sample': evaluated, 'answer': evaluated, 'end': -1}
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
        stop(f'{e.filename or run}: {e.strerror}; make room, or choose another --out_dir')
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
    """Draw loss.png from log.jsonl; returns whether that was possible."""
    def fill(figure):
        axes = figure.subplots()
        for event, key, style in (('step', 'train_loss', '-'), ('eval', 'val_loss', 'o-')):
            found = read_log(run, event)
            axes.plot([e['step'] for e in found], [e[key] for e in found], style,
                      label=key.replace('_', ' '))
        axes.set(xlabel='step', ylabel='nats per token', title=run.name)
        axes.grid(alpha=0.3)
        axes.legend()
    return draw(run / 'loss.png', fill, figsize=(8, 5))


def draw(path: Path, fill, **options) -> bool:
    """Write the picture that fill(figure) draws. A failure, whatever it is, is a warning: the
    numbers are more important than their picture. Returns whether it was drawn."""
    try:
        if '~' in os.path.expanduser('~'):  # a user without a home, as in a container
            os.environ.setdefault('MPLCONFIGDIR', f'{tempfile.gettempdir()}/mpl-{os.getuid()}')
        from matplotlib.figure import Figure
        figure = Figure(**options)
        fill(figure)
        figure.savefig(path, dpi=120)
    except Exception as e:
        warn(f'{path} was not drawn ({type(e).__name__}: {" ".join(str(e).split())[:200]})')
        return False
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
