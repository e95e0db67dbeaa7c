"""Models: found (of a run, or of Hugging Face on disk, in DATA_MIRROR or on the hub) and loaded."""
import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import model as model_module
from core.formats import gguf, hf, hub
from core.net import lora
from core.net.weights import build_model, named_weights
from core.ranks import processes
from core.read.download import NoNetwork
from core.run.checkpoint import MANIFEST, newest, read_state, step_folder, steps
from core.settings import stop, warn
from core.source import MATHEMATICS, source_hashes
from core.text import hf_tokenizer
from core.text import tokenizer as tokenizers
from model import GPTConfig

NO_PICKLE = ' (a .pt, .bin or .ckpt file is a pickle, which could run anything: never loaded)'


def find_model(name: str, data_dir: str = 'data', weights: bool = True,
               setting: str = 'run_dir') -> Path:
    """The folder of a run, or of a Hugging Face model (see hub.find). Stops if there is neither."""
    folder = Path(name)
    try:
        if folder.is_dir() and steps(folder) or is_gguf(folder):
            return folder
        if found := hub.find(name, Path(data_dir) / 'downloads', weights):
            return found
    except NoNetwork as e:
        stop(f'{setting}={name}: {e}; put its folder into DATA_MIRROR, or give a path')
    except OSError as e:
        stop(f'{setting}={name:.80}: {e.strerror}')
    if folder.is_dir():
        names = ', '.join(sorted(path.name for path in folder.iterdir())[:5]) or 'nothing'
        stop(f'{folder}: holds no checkpoint (step-*) and no config.json, only {names}' + NO_PICKLE)
    return stop(f'{setting}={name}: {"is a file" if folder.exists() else "no such directory"}, '
                f'and no name on the hub; {known_runs()[1]}' + NO_PICKLE)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a model in one file of llama.cpp's format."""
    return path.suffix == '.gguf' and path.is_file()


def known_runs() -> tuple[str, str]:
    """The newest run in out/, and a phrase that names all of them, the newest first."""
    logs = sorted(Path('out').glob('*/log.jsonl'), key=os.path.getmtime, reverse=True)
    runs = [shlex.quote(str(path.parent)) for path in logs] or ['out/shakespeare']
    return runs[0], f'there are {", ".join(runs)}' if logs else 'train first: python train.py'


def check_named(run_dir: str, command: str) -> None:
    """Stop with the runs that there are, and how `command` takes one, if no model is given."""
    newest_run, runs = known_runs()
    if not run_dir:
        stop(f'no model given: python {command.format(newest_run)} ({runs})')


def load_tokenizer(name: str, data_dir: str = 'data'):
    """The tokenizer of a run, or of a Hugging Face model."""
    folder = find_model(name, data_dir, weights=False, setting='tokenizer')
    if found := steps(folder):
        return tokenizers.load(step_folder(folder, found[-1]) / 'tokenizer.json')
    if is_gguf(folder):
        return gguf.read_tokenizer(gguf.Header(folder))
    return hf_tokenizer.read_tokenizer(folder / 'tokenizer.json')


def load_run(run_dir: str, step: int = 0, device: str = 'cpu', data_dir: str = 'data',
             classifier: bool | None = False):
    """Model (in eval mode), tokenizer and state.json of a run: of its best step, or of `step`.

    It may also be a Hugging Face model (see hub.find), whose step is 0. If the best one is damaged,
    warns and takes the newest one that is not. Stops if there is no undamaged checkpoint, or none
    of that step, or it is a classifier where none is asked for, or the other way round (classifier
    None: it may be either).
    """
    folder = find_model(run_dir, data_dir)
    if not steps(folder):
        if step:
            stop(f'step={step}: {folder} is no run, and has no steps')
        model, tokenizer, more = (gguf if is_gguf(folder) else hf).load(folder, device)
        check_kind(model.config, run_dir, classifier)
        return model, tokenizer, {'step': 0, 'config': asdict(model.config), 'identity': {}, **more}
    step = chosen_step(folder, step)
    state, checkpoint = read_state(folder, step), step_folder(folder, step)
    tokenizer = tokenizers.load(checkpoint / 'tokenizer.json')
    config = read_config(state['config'], checkpoint)
    check_kind(config, folder, classifier)
    if config.vocab_size < len(tokenizer):
        stop(f'{folder}: its model has vocab_size={config.vocab_size}, its tokenizer.json '
             f'{len(tokenizer)} tokens; they do not belong together')
    known = state['identity'].get('source')     # older runs have something else there
    now = source_hashes(model_module.__file__)
    if isinstance(known, dict) and (other := [n for n in MATHEMATICS if known.get(n) != now[n]]):
        warn(f'{folder} was trained with another {" and ".join(other)}; copies of the source '
             f'that made it are in {folder}')
    model = build_model(config, None, device)
    load_weights(model, folder, step)
    return model.eval(), tokenizer, state


def check_kind(config: GPTConfig, where, classifier: bool | None) -> None:
    """Stop if a model is no classifier where one is asked for, or is one where none is."""
    if classifier is not None and bool(config.n_classes) != classifier:
        stop(f'{where}: ' + ('is no classifier; make one with classify.py'
             if classifier else f'is a classifier of {config.n_classes} classes, not a language '
             'model; it can be asked: python sample.py <run> --classify="text"'))


def chosen_step(folder: Path, step: int) -> int:
    """`step`, or if that is 0 the best undamaged step of a run, as its newest checkpoint says."""
    found, unread = steps(folder), ('optimizer', 'adapters')
    if step and step not in found:
        stop(f'step={step}: {folder} has checkpoints of steps {", ".join(map(str, found))} only')
    if step:
        return newest(folder, [step], unread)
    last = newest(folder, unread=unread)
    best = read_state(folder, last)['best_step']
    return newest(folder, [last, best], unread) if best in found and best != last else last


def load_base(run_dir: str, step: int, data_dir: str, block_size: int, ranks,
              classifier: bool = False):
    """The model that a stage goes on with, as load_run gives it, and the tokens of a row:
    block_size, or if that is 0 as many as the stage before had, or as the model knows, at most
    2,048. Stops if it knows fewer."""
    if ranks.rank == 0:     # downloaded before all ranks ask for it
        find_model(run_dir, data_dir)
    processes.broadcast(None, patient=True)
    model, tokenizer, state = load_run(run_dir, step, data_dir=data_dir, classifier=classifier)
    known = model.config.block_size
    if block_size > known:
        stop(f'block_size={block_size}: the model knows only {known} positions')
    return model, tokenizer, state, block_size or state.get('block_size') or min(2048, known)


def read_config(config: dict, where) -> GPTConfig:
    """The GPTConfig of a run. Stops if today's model.py does not know such a one."""
    try:
        return GPTConfig(**config)
    except (TypeError, ValueError) as e:
        stop(f'{where}: {e}')


def weights_hash(model) -> str:
    """First 16 hex digits of the SHA-256 of a model's weights on the CPU."""
    digest = hashlib.sha256()
    for name, p in sorted(named_weights(model).items()):
        digest.update(name.encode())
        digest.update(p.detach().contiguous().numpy().data)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# Loading


def read_tensors(checkpoint: Path, kind: str) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """(file, name, tensor) of all tensors in a checkpoint's <kind>.safetensors or <kind>-*, if it
    has any: an optimizer has no state before its first good step. Stops if a file that the manifest
    names is not there, or is not a safetensors file."""
    path = checkpoint / MANIFEST
    names = sorted(json.loads(path.read_text())['files']) if path.exists() else [MANIFEST]
    if lost := [name for name in names if not (checkpoint / name).exists()]:
        stop(f'{checkpoint}: has no {lost[0]} on this machine; all machines of a run must see the '
             'same out_dir')
    for path in (checkpoint / name for name in names if name.startswith(kind)):
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, OverflowError,
                MemoryError) as e:
            stop(f'{path}: cannot be read as safetensors ({type(e).__name__}: {e}); use another '
                 'checkpoint')
        for name, tensor in tensors.items():
            yield path, name, tensor


def load_weights(model, folder, step: int, put=torch.Tensor.copy_) -> None:
    """Fill the model's parameters from a checkpoint; put(p, values) fills one of which this process
    may hold a part. Of a model with adapters only these are filled, from their own file. Stops if
    names or shapes differ."""
    params, known, kind = named_weights(model), all_names(model), 'model'
    if own := lora.learnt(model):
        params, known, kind = {name: params[name] for name in own}, set(own), 'adapters'
    missing = set(params)
    for path, name, tensor in read_tensors(step_folder(folder, step), kind):
        if name not in known:
            stop(f'{path}: holds {name[:80]!r}, which this model does not have')
        if name in params:      # not of another pipeline stage
            fill(params[name], tensor, f'{path}: {name}', put)
        missing.discard(name)
    if missing:
        stop(f'{step_folder(folder, step)}: {min(missing)} is missing in {kind}*.safetensors')


def load_optimizers(model, optimizers, folder, step: int, put=torch.Tensor.copy_) -> None:
    """Fill the state of the optimizers from a checkpoint. Stops if it is that of others. Parameters
    that have had no gradient yet have no state: they begin with an empty one."""
    params, known = named_weights(model), all_names(model)
    owner = {p: o for o in optimizers for group in o.param_groups for p in group['params']}
    for path, name, tensor in read_tensors(step_folder(folder, step), 'optimizer'):
        parameter, _, key = name.rpartition('/')
        if parameter not in known:
            stop(f'{path}: holds {name[:80]!r}, the state of no parameter of this model')
        p = params.get(parameter)
        if p not in owner:      # of another pipeline stage, or frozen now
            continue
        scalar = key == 'step'
        state = torch.zeros((), device=p.device) if scalar else torch.empty_like(p.detach())
        fill(state, tensor, f'{path}: {name}', torch.Tensor.copy_ if scalar else put)
        owner[p].state[p][key] = state


def all_names(model) -> set[str]:
    """Names of the parameters of the whole model of which this may be a pipeline stage."""
    return {*named_weights(build_model(model.config, None, 'meta')), *lora.learnt(model)}


@torch.no_grad()
def fill(target: torch.Tensor, tensor: torch.Tensor, what: str, put) -> None:
    """put(target, tensor). Stops if shape or dtype differ."""
    for kind in ('shape', 'dtype'):
        if getattr(target, kind) != getattr(tensor, kind):
            stop(f'{what} has {kind} {getattr(tensor, kind)}, this model needs '
                 f'{getattr(target, kind)}')
    put(target, tensor)
