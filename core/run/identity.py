"""Which run a command goes on with: what must be unchanged for a run to be the same run."""
import json
from dataclasses import asdict
from pathlib import Path

from core import device as hardware
from core.ranks import processes
from core.run import checkpoint
from core.run.checkpoint import Saver
from core.run.log import events
from core.settings import stop, warn

# Settings in which two starts of one run may differ: paths and what chooses the data, since hashes
# of what they hold are compared; where and how the work is done; how often it is looked at.
MAY_DIFFER = (
    'out_dir', 'init_from', 'run_dir', 'step', 'dataset', 'validation', 'fallback_dataset',
    'data_dir', 'tokenizer', 'labels', 'max_records', 'skip_bad', 'block_size', 'device',
    'compile', 'threads', 'micro_batch_size', 'activation_checkpointing', 'tp', 'pp', 'zero',
    'replicas', 'sequence_parallel', 'pp_schedule', 'timeout_minutes', 'check_layout',
    'eval_only', 'against', 'eval_interval', 'log_interval', 'save_interval', 'sample_interval',
    'benchmark_interval', 'benchmarks', 'benchmark_items', 'sample_tokens', 'answers',
    'answer_tokens', 'save_adapters', 'wandb', 'tensorboard')


def identity(settings: dict, config, tokenizer, **facts) -> dict:
    """All that must be unchanged for a run to be the same run: architecture, hashes of data,
    tokenizer, first weights and source, and each setting that is not in MAY_DIFFER: so also one
    that somebody adds to a script. It is as JSON gives it back."""
    architecture = asdict(config)
    kept = {k: x for k, x in settings.items() if k not in architecture and k not in MAY_DIFFER}
    return json.loads(json.dumps({'architecture': architecture, 'settings': kept,
                                  'tokenizer': tokenizer.hash(), **facts}))


def open_run(base: Path, identity: dict, ranks, device, insist: bool = False):
    """(run directory, Saver of a rank that writes, state to resume from or None, device), on all
    ranks; see find_run. Device and identity get the dtype of a run that is resumed, if none is
    given."""
    saver = state = None
    if ranks.rank == 0:
        saver, state = find_run(base, identity, ranks, insist)
    run, state = processes.broadcast(saver and [str(saver.run), state], patient=True)
    if not ranks.plain:     # all write
        saver = saver or Saver(Path(run), ranks)
    kept = state and state['identity'].get('settings', {}).get('dtype')
    if kept and kept != device.dtype and not identity['settings']['dtype']:
        device = hardware.with_dtype(device, kept)
        processes.print0(device.why[1])
    identity['settings']['dtype'] = device.dtype
    return Path(run), saver, state, device


def find_run(base: Path, identity: dict, ranks, insist: bool) -> tuple[Saver, dict | None]:
    """(Saver of the directory in which a run with this identity goes on or begins, state to resume
    from or None).

    An unfinished run of the same identity under `base`, `base`-2, ... is resumed; otherwise the
    first free name begins a new one. Stops if a run there differs in its source alone. With
    `insist` (init_from=resume) it is the one in `base`; see check_changes.
    """
    if insist:
        saver = Saver(base, ranks) if base.is_dir() else None
        if not saver or not checkpoint.steps(base):
            stop(f'init_from=resume: {base} holds no checkpoint; start it without init_from')
        state = read_newest(saver)
        check_changes(base, differences(state['identity'], identity))
        return saver, state
    stem = base.resolve() if base.name in ('', '..') else base
    number, why, edited = 0, '', ''
    while True:
        number += 1
        folder = base if number == 1 else Path(f'{stem}-{number}')
        if is_finished(folder):
            why = why or f'{folder} is finished'
            continue
        if checkpoint.steps(folder) and (changes := differences(identity_of(folder), identity)):
            source = [change for change in changes if change[0].split('.')[0] == 'source']
            # A setting that only one of the two knows comes with another source.
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
        saver = Saver(folder, ranks)    # locked from here on, so look again
        if not is_finished(folder):
            break
        saver.lock.close()
    if checkpoint.steps(folder):
        state = read_newest(saver)
        print(f'resuming {folder} after step {state["step"]}: nothing that matters has changed')
        return saver, state
    if number > 1:
        print(f'{why}, so this one is {folder}')
    return saver, None


def out_folder(out_dir: str, name: str, data: str = '') -> Path:
    """Where a run goes: out_dir or, if that is '', out/<name>, with `data` if that is another."""
    return Path(out_dir or f'out/{name}' + f'-{data}' * (data not in ('', name)))


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


def check_changes(base: Path, changes: list[tuple]) -> None:
    """Warn of what has changed since a checkpoint; stop where that makes it useless. A field that
    is new comes with a source that was edited."""
    useless = [change for change in changes if None not in change and (
        change[0].split('.')[0] in ('architecture', 'data', 'tokenizer', 'weights')
        or change[0] == 'settings.optimizer')]
    if useless:
        stop(f'init_from=resume: {base}: {told(useless)}; restore it, or start a new run with '
             '--out_dir')
    if changes:
        warn(f'{base}: {told(changes)}')


def differences(old: dict, new: dict, prefix: str = '') -> list[tuple]:
    """(name such as 'architecture.n_layer', old, new) of each field in which two identities differ,
    but for a dtype that is not given."""
    found = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f'{prefix}{key}.')
        elif was != now and (prefix + key, now) != ('settings.dtype', ''):
            found.append((prefix + key, was, now))
    return found


def told(changes: list[tuple]) -> str:
    """The first three differences in words; settings first, which may have caused the others."""
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
