"""Checkpoints: out/<run>/step-00001000/, written whole or not at all, verified when read.

A directory holds model.safetensors, optimizer.safetensors, tokenizer.json, state.json, and
manifest.json with the size and hash of each. Ranks that share a model write model-00000.safetensors
and so on. Tensors are stored whole, under their parameter's name, so that any number of processes
can read the parts they need. docs/formats.md has the details.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError

from core.formats import hf
from core.net import lora
from core.net.weights import named_weights
from core.ranks import parallel, processes
from core.read.download import file_hash, locked
from core.settings import stop, warn

MANIFEST, VERSION = 'manifest.json', 1


@dataclass
class Progress:
    """How far a run has come; state.json has these fields."""
    step: int = 0                       # optimizer steps done
    seconds: float = 0.0                # of training
    max_steps: int = 0
    evaluated: int = 0                  # evaluation and sample of the steps up to here are done
    val_loss: float | None = None       # of the last evaluation; None where there was none
    bits_per_byte: float | None = None
    best_step: int = 0
    best_val_loss: float | None = None
    skipped: int = 0                    # steps whose loss or gradient was no good
    skipped_in_a_row: int = 0           # of them, those since the last good one
    grad_norms: list = field(default_factory=list)  # of the last 100 steps, with spike_sigma

    def note(self, val_loss: float) -> None:
        """Note the loss of an evaluation. The best one is not step 0, which is not saved."""
        self.evaluated, self.val_loss = self.step, val_loss
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        if self.step and math.isfinite(val_loss) and val_loss < best:
            self.best_val_loss, self.best_step = val_loss, self.step

    def restore(self, state: dict) -> 'Progress':
        """Take everything from the state.json of a checkpoint."""
        for f in fields(self):
            setattr(self, f.name, state[f.name])
        return self


def step_folder(folder, step: int) -> Path:
    return Path(folder) / f'step-{step:08d}'


def steps(folder) -> list[int]:
    """The steps of a run's checkpoints, ascending, damaged ones included."""
    names = [path.name for path in Path(folder).glob('step-*')]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r'step-\d{8}', name))


def manifest(files: dict) -> str:
    """The text of manifest.json for {name: {size, sha256}}; its checksum covers the rest of it."""
    body = {'version': VERSION, 'files': files}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, 'checksum': checksum}, indent=1) + '\n'


def damage(checkpoint: Path, unread=()) -> str:
    """What is wrong with the files of a checkpoint, '' if each is as its manifest says; files whose
    names begin with one of `unread` are not hashed."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding='utf-8')
        files = json.loads(text)['files']
        if text != manifest(files):
            return f'{MANIFEST} is not as version {VERSION} writes it'
        for name, expected in files.items():
            size = (checkpoint / name).stat().st_size
            if size != expected['size']:
                return f'{name} has {size:,} bytes, should have {expected["size"]:,}'
            if not name.startswith(unread) and file_hash(checkpoint / name) != expected['sha256']:
                return f'{name} is not what was written: its sha256 has changed'
    except FileNotFoundError as e:
        return f'{Path(e.filename).name} is missing'
    except OSError as e:
        return f'{Path(e.filename or checkpoint).name}: {e.strerror}'
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f'{MANIFEST} cannot be read'
    return ''


def newest(folder, among: list[int] | None = None, unread=()) -> int:
    """The newest undamaged step of a run, or of the steps `among`. Warns of each damaged one that
    it passes over; stops if all are damaged."""
    for step in reversed(steps(folder) if among is None else among):
        problem = damage(step_folder(folder, step), unread)
        if not problem:
            return step
        warn(f'{step_folder(folder, step)} is damaged ({problem}); it is passed over')
    return stop(f'{folder}: every checkpoint asked for is damaged; nothing was changed: restore '
                'one from a backup, or start a new run with another --out_dir')


def read_state(folder, step: int) -> dict:
    """The state.json of one checkpoint. Stops if it is none."""
    path = step_folder(folder, step) / 'state.json'
    try:
        state = json.loads(path.read_text(encoding='utf-8'))
        if not (isinstance(state['identity'], dict) and isinstance(state['config'], dict)
                and state['step'] == step and Progress().restore(state)):
            raise ValueError('not the state of this step of a run')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        stop(f'{path}: cannot be read as the state of a run ({type(e).__name__}: {e}); delete '
             f'{path.parent}, which is no checkpoint of this program')
    return state


# ---------------------------------------------------------------------------------------------
# Saving


def lock(folder: Path):
    """Hold the run directory for this process, until it ends or the returned file is closed. Stops
    if another process has it: two trainers in one directory would undo each other's work."""
    try:
        str(folder).encode()    # safetensors could not read what it has written there
        folder.mkdir(parents=True, exist_ok=True)
        return locked(folder / '.lock', wait=False)
    except UnicodeEncodeError:
        stop(f'{str(folder)!r}: is not a name in UTF-8; choose another --out_dir')
    except BlockingIOError:
        stop(f'{folder} is in use by another process that trains in it; wait for it, or give this '
             'run another --out_dir')
    except OSError as e:
        stop(f'{e.filename}: {e.strerror}; choose another --out_dir')


class Saver:
    """Writes the checkpoints of a run: copies at once; files, flushing and hashing in a thread.

    Where the ranks share a model each has a Saver and writes a part, else rank 0 alone. On rank 0
    it holds the lock of the run directory, and `saved` is the newest step if that is complete,
    else 0.
    """

    def __init__(self, run: Path, ranks=None):
        self.run, self.thread, self.saved = run, None, 0
        self.ranks = ranks or processes.Ranks()
        if self.ranks.rank == 0:
            self.lock = lock(run)
            self.clean_up()

    def clean_up(self) -> None:
        """Undo what a save left that failed or was killed."""
        for old in self.run.glob('.old-step-*'):    # a step that was about to be replaced
            final = self.run / old.name.removeprefix('.old-')
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # on a failing disk: at the next start
                    os.rename(old, final)
        for tmp in self.run.glob('.tmp-step-*'):
            shutil.rmtree(tmp, ignore_errors=True)

    def save(self, model, optimizers, tokenizer, state: dict, last: bool = False) -> None:
        """Save a step; once it is complete, all others but the best and the one before it go. The
        `last` step of a run has one model.safetensors, however many ranks write. An error of the
        file system is a warning, and leaves what was there. Stops if a tensor is not finite."""
        self.wait()
        self.saved = 0      # until this one is complete
        files = {'model': self.copies(model_tensors(model)),
                 'adapters': self.copies(lora.learnt(model)),
                 'optimizer': self.copies(optimizer_tensors(model, optimizers))}
        constant = dict(model.named_buffers())      # such as a mask with infinities
        bad = [name for tensors in files.values() for name, tensor in tensors.items()
               if name not in constant and not torch.stack(torch.aminmax(tensor)).isfinite().all()]
        if bad := sum(self.exchange(bad), []):
            if self.ranks.rank:
                raise SystemExit(2)     # rank 0 says why
            stop(f'{bad[0]} is not finite at step {state["step"]}, which is not saved; '
                 f'{self.last_good()}')
        self.thread = threading.Thread(target=self.write, name='save a checkpoint',
                                       args=(files, tokenizer, state, last))
        self.thread.start()

    def copies(self, tensors: dict) -> dict[str, torch.Tensor]:
        """In main memory, whole, the tensors that this rank is to write: the ranks that hold the
        same layers deal them out by size."""
        ranks, mine = self.ranks, {}
        load = [0] * (1 if ranks.plain else ranks.dp * ranks.tp)
        me = 0 if ranks.plain else ranks.dp_rank * ranks.tp + ranks.tp_rank
        for name in sorted(tensors):
            tensor = parallel.gathered(tensors[name])
            index = load.index(min(load))
            load[index] += tensor.numel()
            if index == me:
                mine[name] = tensor.to('cpu', copy=True).contiguous()
        return mine

    def exchange(self, value) -> list:
        """The value of each rank that writes."""
        return [value] if self.ranks.plain else processes.exchange(value, processes.writing_group)

    def write(self, files: dict, tokenizer, state: dict, last: bool) -> None:
        """The thread: write and hash this rank's files; rank 0 completes what all have written."""
        first, step = self.ranks.rank == 0, state['step']
        tmp = self.run / f'.tmp-{step_folder(self.run, step).name}'
        try:
            self.together(lambda: tmp.mkdir() if first else None)
            parts = self.together(lambda: self.write_files(tmp, files, tokenizer, state))
            if first:
                written = {name: entry for part in parts for name, entry in part.items()}
                self.complete(tmp, merged(tmp, written) if last else written, state)
        except OSError as e:
            if first:
                self.clean_up()
                warn(f'step-{step:08d} could not be written ({e}); the checkpoints before it are '
                     'as they were, and the run goes on')

    def together(self, work: Callable) -> list:
        """work() of each rank that writes. Raises OSError on all of them if it fails on one."""
        error, result = '', None
        try:
            result = work()
        except (OSError, SafetensorError) as e:
            error = str(e)
        answers = self.exchange([error, result])
        if errors := [error for error, _ in answers if error]:
            raise OSError(errors[0])
        return [result for _, result in answers]

    def write_files(self, tmp: Path, files: dict, tokenizer, state: dict) -> dict:
        """Write and flush this rank's files; their lines in the manifest."""
        suffix, names = '' if self.ranks.plain else f'-{self.ranks.rank:05d}', []
        for kind, tensors in files.items():
            if tensors:
                names.append(f'{kind}{suffix}.safetensors')
                hf.save_file(tensors, tmp / names[-1])
        if self.ranks.rank == 0:
            tokenizer.save(tmp / 'tokenizer.json')
            text = json.dumps(state, indent=1) + '\n'
            (tmp / 'state.json').write_text(text, encoding='utf-8')
            names += ['tokenizer.json', 'state.json']
        return {name: flushed(tmp / name) for name in sorted(names)}

    def complete(self, tmp: Path, files: dict, state: dict) -> None:
        """Write the manifest of `files`, rename; then delete what is no longer needed."""
        step = state['step']
        final = step_folder(self.run, step)
        (tmp / MANIFEST).write_text(manifest(files), encoding='utf-8')
        for path in (tmp / MANIFEST, tmp, self.run / 'log.jsonl'):
            flush(path)
        if final.exists():  # the same step again, or damaged: there until the new one is
            os.rename(final, self.run / f'.old-{final.name}')
        os.rename(tmp, final)
        flush(self.run)
        self.saved = step
        self.clean_up()
        before = [old for old in steps(self.run) if old < step][-1:]
        for old in set(steps(self.run)) - {state['best_step'], step, *before}:
            shutil.rmtree(step_folder(self.run, old), ignore_errors=True)

    def last_good(self) -> str:
        """A phrase that names the newest undamaged checkpoint."""
        self.wait()
        if not steps(self.run):
            return 'there is no checkpoint yet'
        return f'the last good checkpoint is {step_folder(self.run, newest(self.run))}'

    def wait(self) -> None:
        """Until the checkpoint under way is complete, or given up."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def finish(self, step: int) -> None:
        """Wait for the run's last checkpoint. Stops if it could not be written."""
        self.wait()
        if self.saved != step and self.ranks.rank == 0:
            stop(f'the last step, {step}, could not be saved; {self.last_good()}; make room and '
                 'run the same command again')


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flushed(path: Path) -> dict:
    """Flush a file; its line in the manifest."""
    flush(path)
    return {'size': path.stat().st_size, 'sha256': file_hash(path)}


def merged(tmp: Path, files: dict) -> dict:
    """Join model-*.safetensors into one model.safetensors; the manifest's lines after that. Such a
    file is 8 bytes with the size of a header, the header, and the tensors' bytes at the offsets
    that it names: headers are joined, bytes copied, and no tensor gets into memory."""
    parts = sorted(name for name in files if name.startswith('model-'))
    if not parts:
        return files
    header, offset, begins = {}, 0, []
    for name in parts:
        with open(tmp / name, 'rb') as f:
            size = int.from_bytes(f.read(8), 'little')
            entries = json.loads(f.read(size))
        entries.pop('__metadata__', None)
        for tensor, entry in entries.items():
            header[tensor] = entry | {'data_offsets': [offset + at for at in entry['data_offsets']]}
        begins.append(8 + size)
        offset += (tmp / name).stat().st_size - begins[-1]
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(tmp / 'model.safetensors', 'wb') as whole:
        whole.write(len(text).to_bytes(8, 'little') + text)
        for name, begin in zip(parts, begins):
            with open(tmp / name, 'rb') as f:
                f.seek(begin)
                shutil.copyfileobj(f, whole, 1 << 24)
            (tmp / name).unlink()
    return {name: entry for name, entry in files.items() if name not in parts} | {
        'model.safetensors': flushed(tmp / 'model.safetensors')}


def model_tensors(model) -> dict[str, torch.Tensor]:
    """The model's weights by name, with adapters merged into them; a shared one once."""
    return {name: p for name, p in lora.merged(model).items() if not elsewhere(model, name)}


def elsewhere(model, name: str) -> bool:
    """Whether a weight of a pipeline stage is that of another stage, which shares it."""
    return name == 'wte.weight' and model.wte is None


def optimizer_tensors(model, optimizers) -> dict[str, torch.Tensor]:
    """Optimizer state as '<parameter name>/<state name>' -> tensor."""
    names = {p: name for name, p in named_weights(model).items()}
    return {f'{names[p]}/{key}': value for optimizer in optimizers
            for p, state in optimizer.state.items() if not elsewhere(model, names[p])
            for key, value in state.items()}
