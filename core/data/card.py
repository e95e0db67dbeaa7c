"""The model card of an exported model: what its records say of it, and nothing else."""
import contextlib
import json
import shutil
from pathlib import Path

from core.data.recipes import SETS
from core.run.log import events
from model import count_parameters

USES = {
    '': 'It continues text of the kind that it was trained on. It was not taught to follow '
        'instructions.',
    'chat': 'It answers messages of the kind that it was tuned on.',
    'classify': 'It says to which of its classes a text belongs, for texts of the kind that it was '
                'trained on.'}
LIMITS = '''
What it writes may be false, offensive or copied from its training text, and nothing filters it.
Not measured, so not known: how it does on tasks or kinds of text other than those below, in other
languages, and for different groups of people; whether its training data holds personal data that
was not looked for.

Do not let it decide about people, do not present its text as that of a person, and do not use it
where a wrong answer can do harm and nobody checks it. The licences of its data, below, may forbid
more.
'''.strip()


def write_card(folder: Path, run_dir: str, state: dict, model, facts: list[str]) -> None:
    """Write README.md into the folder of an exported model, with the picture of its losses if the
    run has one; `facts` are lines on this export."""
    run, task = Path(run_dir), state.get('task', '')
    config = model.config
    tags = ['library_name: transformers', 'pipeline_tag: ' + (
        'text-classification' if task == 'classify' else 'text-generation'), 'license: unknown']
    page = ['---', *tags, '---', '', f'# {run.name}', '',
            f'A language model of {count_parameters(model):,} parameters: {config.n_layer} layers, '
            f'{config.n_embd} channels, {config.n_head} heads, {config.vocab_size:,} tokens, '
            f'windows of at most {config.block_size:,}.', '', *(f'- {fact}' for fact in facts), '',
            '## Intended use, and limits', '', USES[task], '', LIMITS]
    if (run / 'loss.png').is_file():
        shutil.copy(run / 'loss.png', folder / 'loss.png')
    stages = history(run, state['step'])
    for stage, log in stages:
        page += ['', f'## {stage}', '', *of_stage(log, (folder / 'loss.png').is_file() and
                                                  stage == stages[0][0])]
    if not stages:
        page += ['', 'How this model was trained is not recorded here.']
    elif stages[-1][1][0]['settings'].get('init_from') != 'scratch':
        page += ['', 'How the model that this began with was trained is not recorded here.']
    (folder / 'README.md').write_text('\n'.join(page) + '\n', encoding='utf-8',
                                       errors='backslashreplace')


def history(run: Path, step: int) -> list[tuple[str, list[dict]]]:
    """(title, events up to the exported step) of a run and of those that it goes on from, the last
    one first. A run is believed to be the one that was gone on from if it is still there."""
    found, seen = [], set()
    while run not in seen and (log := events(run)):
        seen.add(run)
        start = next((e for e in log if e['event'] == 'start'), None)
        if not start or not isinstance(start.get('settings'), dict):
            break
        found.append((f'Training: {run}', [start] + [
            e for e in log if e['event'] != 'start' and (not step or e.get('step', 0) <= step)]))
        base = str(start['settings'].get('run_dir') or start['settings'].get('init_from', ''))
        run, step = Path(base), 0
    return found


def of_stage(log: list[dict], picture: bool) -> list[str]:
    """The lines on one run, from the events of its log."""
    start, settings = log[0], log[0]['settings']
    identity = start.get('identity', {})
    evaluations = [e for e in log if e['event'] == 'eval']
    steps = [e for e in log if e['event'] == 'step']
    lines = [*of_data(settings, identity), '', '### How it was trained', '']
    if base := settings.get('run_dir'):
        lines.append(f'- goes on from {base}')
    done = steps[-1] if steps else {'step': 0}
    lines += [f'- {done["step"]:,} steps' + (f', {done["tokens"]:,} tokens' if 'tokens' in done
                                             else ''),
              f'- computed on: {"; ".join(map(str, start.get("device", ["not recorded"])))}; '
              f'processes: {start.get("world", "not recorded")}']
    if 'seconds' in done:
        lines.append(f'- {done["seconds"]:,.0f} seconds of training')
    if 'tokens' in done and 'flops_per_token' in start:
        lines.append(f'- {done["tokens"] * start["flops_per_token"]:.3g} FLOPs (tokens times FLOPs '
                     'of a token), without evaluations')
    else:
        lines.append('- FLOPs: not recorded')
    lines += [f'- code: commit {start.get("git") or "not recorded"}; ' + ', '.join(
        f'{name} {version}' for name, version in start.get('versions', {}).items()),
        '- settings: ' + ', '.join(f'{name}={value}' for name, value in
                                   identity.get('settings', settings).items()),
        '', '### What was measured on the validation part', '']
    if not evaluations:
        return [*lines, 'Nothing.']
    keys = [key for key in evaluations[-1] if key not in ('event', 'seconds', 'confusion')
            and isinstance(evaluations[-1][key], (int, float))]
    every = -(-len(evaluations) // 12)
    shown = [*evaluations[:-1][::every], evaluations[-1]]
    lines += [f'| {" | ".join(key.replace("_", " ") for key in keys)} |', '|---' * len(keys) + '|']
    lines += [f'| {" | ".join(number(e.get(key, "")) for key in keys)} |' for e in shown]
    if 'interval' in keys:
        lines += ['', '`interval` is half of a 95% interval of the loss before it.']
    else:
        lines += ['', 'No interval was computed: these come from one training run.']
    return [*lines, *['', '![losses](loss.png)'] * picture]


def of_data(settings: dict, identity: dict) -> list[str]:
    """What is known of the data of a run: from its meta.json if that is still the same data."""
    name, data = str(settings.get('dataset', '')), identity.get('data', {})
    known, lines = str(data.get('sha256', '')), ['### Data', '', f'- {name}']
    lines += [f'- SHA-256 of what it was trained on: {known or "not recorded"}']
    if name in SETS:
        lines += [f'- {SETS[name].about}', f'- licence: {SETS[name].licence}']
        return lines
    for path in sorted(Path(str(settings.get('data_dir', 'data'))).glob('*/meta.json')) + [
            Path(name) / 'meta.json']:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            meta = json.loads(path.read_text(encoding='utf-8'))
            if meta['sha256'] != known:
                continue
            removed = [f'- {step}: {a:,} -> {b:,} documents, {x:,} -> {y:,} characters'
                       for step, (a, x, b, y) in meta['steps'].items() if x != y]
            return [*lines, f'- {meta["about"]}', f'- licence: {meta["licence"]}',
                    f'- {meta["documents"]:,} documents, {meta["bytes"]:,} bytes, after what was '
                    f'removed; tokenizer {meta["tokenizer"]}; {meta["train_tokens"]:,} tokens to '
                    f'train on, {meta["val_tokens"]:,} to validate on',
                    '- removed before training:' + ' nothing' * (not removed),
                    *(f'  {line}' for line in removed)]
    return [*lines, '- licence, size and what was removed: not known here; the records of the '
                    'prepared data are not on this machine']


def number(value) -> str:
    """A number as a cell of a table."""
    return f'{value:,}' if isinstance(value, int) else \
        f'{value:.5g}' if isinstance(value, float) else str(value)
