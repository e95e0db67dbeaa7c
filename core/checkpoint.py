"""The run directory: where it is, its log, and its checkpoints.

out/<run>/ holds log.jsonl, tokenizer.json, loss.png, copies of the source, and checkpoints
step-00001000/ with model.safetensors, optimizer.safetensors and state.json. A checkpoint is written
under another name and renamed when it is whole. docs/formats.md has the details.
"""
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import safetensors.torch
import torch

import model as model_module
from core import tokenizer as tokenizers
from core.settings import stop, warn
from model import GPTConfig, build_model

# ---------------------------------------------------------------------------------------------
# The directory and the log


def choose_run(base: Path, identity: dict) -> tuple[Path, dict | None]:
    """Where a run with this identity goes: (directory, state of the checkpoint to resume from).

    An unfinished run of the same identity under `base`, `base`-2, ... is resumed; otherwise the
    first free name begins a new one (state None).
    """
    number = 1
    while True:
        folder = base if number == 1 else base.with_name(f'{base.name}-{number}')
        found = steps(folder)
        if not found:  # nothing there, or a run that ended before its first checkpoint
            return folder, None
        if not is_finished(folder):
            state = read_state(folder, found[-1])
            if state['identity'] == identity:
                return folder, state
        number += 1


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


def lock(folder: Path):
    """Hold the run directory for this process, until it ends or the returned file is closed.

    Stops if another process has it: two trainers in one directory would undo each other's work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / '.lock', 'a')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stop(f'{folder} is in use by another process that trains in it; wait for it, or give this '
             'run another --out_dir')
    return file


def is_finished(folder: Path) -> bool:
    """Whether the run's log ends with its end."""
    lines = (folder / 'log.jsonl').read_text(encoding='utf-8').splitlines()
    return bool(lines) and lines[-1].startswith('{"event": "end"')


class Log:
    """Appends events to log.jsonl, one JSON object a line; does nothing when `folder` is None.

    The numbers of an event that has a step also go to `others`, functions of (step, numbers).
    """

    def __init__(self, folder: Path | None, others=()):
        self.file, self.others = None, others
        if folder:
            self.file = open(folder / 'log.jsonl', 'a', encoding='utf-8')

    def write(self, event: str, **fields) -> None:
        if not self.file:
            return
        fields = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x
                  for name, x in fields.items()}  # JSON knows neither NaN nor infinity
        self.file.write(json.dumps({'event': event, **fields}) + '\n')
        self.file.flush()
        numbers = {name: x for name, x in fields.items() if type(x) in (int, float)}
        if step := numbers.pop('step', None):
            for other in self.others:
                other(step, numbers)


def events(folder) -> list[dict]:
    """All events in a run's log, in order; a line cut off by a kill is passed over."""
    with open(Path(folder) / 'log.jsonl', encoding='utf-8') as f:
        return [json.loads(line) for line in f if line.startswith('{') and line.endswith('}\n')]


def read_log(folder, event: str) -> list[dict]:
    """The events of one kind in a run's log, in order."""
    return [e for e in events(folder) if e['event'] == event]


def cut_log(folder: Path, step: int) -> None:
    """Take everything after `step` out of the log: a resumed run does it again."""
    kept = [json.dumps(e) + '\n' for e in events(folder)
            if e.get('step', 0) <= step and e['event'] != 'end']
    tmp = folder / '.tmp-log.jsonl'
    tmp.write_text(''.join(kept), encoding='utf-8')
    os.replace(tmp, folder / 'log.jsonl')


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


def source_hash(path) -> str:
    """First 16 hex digits of the SHA-256 of a source file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# Checkpoints


def step_folder(folder, step: int) -> Path:
    return Path(folder) / f'step-{step:08d}'


def steps(folder) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    names = [path.name for path in Path(folder).glob('step-*')]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r'step-\d{8}', name))


def read_state(folder, step: int) -> dict:
    """The state.json of one checkpoint."""
    return json.loads((step_folder(folder, step) / 'state.json').read_text(encoding='utf-8'))


def save(folder: Path, step: int, model, optimizers, state: dict) -> None:
    """Write the checkpoint of `step`, then delete older ones except the best and the last two."""
    final = step_folder(folder, step)
    tmp = final.with_name(f'.tmp-{final.name}')
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    safetensors.torch.save_file(unique_tensors(model), tmp / 'model.safetensors')
    safetensors.torch.save_file(optimizer_tensors(model, optimizers), tmp / 'optimizer.safetensors')
    (tmp / 'state.json').write_text(json.dumps(state, indent=1) + '\n', encoding='utf-8')
    shutil.rmtree(final, ignore_errors=True)
    os.rename(tmp, final)
    keep = {state['best_step'], *steps(folder)[-2:]}
    for old in set(steps(folder)) - keep:
        shutil.rmtree(step_folder(folder, old))


def unique_tensors(model) -> dict[str, torch.Tensor]:
    """The model's parameters by name; a shared one only under its first name."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def optimizer_tensors(model, optimizers) -> dict[str, torch.Tensor]:
    """Optimizer state as '<parameter name>/<state name>' -> tensor."""
    names = {p: name for name, p in model.named_parameters()}
    return {f'{names[p]}/{key}': value.contiguous() for optimizer in optimizers
            for p, state in optimizer.state.items() for key, value in state.items()}


def load_weights(model, folder, step: int) -> None:
    """Fill the model's parameters from a checkpoint. Stops if names or shapes differ."""
    path = step_folder(folder, step) / 'model.safetensors'
    tensors = safetensors.torch.load_file(path)
    params = dict(model.named_parameters())
    if params.keys() != tensors.keys():
        wrong = sorted(params.keys() ^ tensors.keys())
        stop(f'{path}: holds other parameters than this model ({", ".join(wrong[:3])}, ...)')
    with torch.no_grad():
        for name, p in params.items():
            if p.shape != tensors[name].shape:
                stop(f'{path}: {name} has shape {list(tensors[name].shape)}, '
                     f'this model needs {list(p.shape)}')
            p.copy_(tensors[name])


def load_optimizers(model, optimizers, folder, step: int) -> None:
    """Fill the state of the optimizers from a checkpoint."""
    params = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group['params']}
    path = step_folder(folder, step) / 'optimizer.safetensors'
    for name, tensor in safetensors.torch.load_file(path).items():
        parameter, key = name.rsplit('/', 1)
        p = params[parameter]
        owner[p].state[p][key] = tensor.to(p.device)


def load_run(run_dir: str, step: int = 0, device: str = 'cpu'):
    """Model (in eval mode), tokenizer and state.json of a run: of its best step, or of `step`.

    Stops if the directory is no run, or has no checkpoint of that step.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        runs = ', '.join(sorted(str(path.parent) for path in Path('out').glob('*/log.jsonl')))
        stop(f'run_dir={run_dir!r}: no such directory; '
             + (f'there are {runs}' if runs else 'train first: python train.py'))
    found = steps(folder)
    if not found:
        stop(f'{folder}: holds no checkpoint (step-*)')
    if step and step not in found:
        stop(f'step={step}: {folder} has checkpoints of steps {", ".join(map(str, found))} only')
    best = read_state(folder, found[-1])['best_step']
    step = step or (best if best in found else found[-1])
    state = read_state(folder, step)
    tokenizer = tokenizers.load(folder / 'tokenizer.json')
    config = GPTConfig(**state['config'])
    if config.vocab_size < len(tokenizer):
        stop(f'{folder}: its model has vocab_size={config.vocab_size}, its tokenizer.json '
             f'{len(tokenizer)} tokens; they do not belong together')
    if state['identity']['source'] != source_hash(model_module.__file__):
        warn(f'{folder} was trained with another model.py; a copy of it is {folder}/model.py')
    model = build_model(config, device=device)
    load_weights(model, folder, step)
    return model.eval(), tokenizer, state
