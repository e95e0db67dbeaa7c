"""Mistakes of users and damaged files: each is refused in one line that names it, or does no harm.
Never a traceback, never a half-written folder."""
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import TINY, TUNED
from harness import PROCESSES, ROOT, json_lines, note

import bench
import plan
import prepare
import train
from core import device as hardware
from core.data import card, dataset, records
from core.eval import overlap, tasks
from core.planning import fit
from core.run import identity, log, models
from core.run.begin import check_settings
from core.settings import Stop, configure, read_settings, settings_of

ON_CPU = {'device': 'cpu', 'threads': 1}
SMALL = {**TINY, 'tokenizer': 'byte', 'max_steps': 1, 'warmup_steps': 0, 'eval_tokens': 64,
         'sample_tokens': 2, 'n_layer': 1}
TUNING = {**TUNED, 'eval_interval': 0, 'run_dir': 'out/base', 'max_steps': 1, 'batch_size': 2,
          'out_dir': 'out/new'}
# A command of each script that is right, and takes a moment.
RIGHT = {
    'prepare': {'dataset': 'text.txt', 'name': 'new', 'tokenizer': 'byte', 'workers': 1},
    'train': SMALL | {'dataset': 'source_byte', 'out_dir': 'out/new'},
    'sample': ON_CPU | {'run_dir': 'out/base', 'prompt': 'The', 'max_new_tokens': 2},
    'finetune': TUNING | {'dataset': 'chats.jsonl', 'answers': 1, 'answer_tokens': 2},
    'classify': TUNING | {'dataset': 'texts.tsv'},
    'dpo': TUNING | {'dataset': 'preferences.jsonl'},
    'evaluate': ON_CPU | {'run_dir': 'out/base', 'tasks': 'questions.jsonl', 'max_items': 2},
    'export': {'run_dir': 'out/base', 'export_dir': 'exported', 'to': 'gguf'},
    'serve': ON_CPU | {'run_dir': 'out/base', 'port': 0, 'compile': False},
    'plan': {'params': '20m', 'gpus': 8},
    'bench': SMALL | {'what': 'train', 'rounds': 1, 'steps': 1, 'warmup': 1}}
LIMIT = 20      # seconds for a case


# ---------------------------------------------------------------------------------------------
# A command, in a process of its own


def limited(gigabytes: int) -> None:
    """Give this process so much more memory. signal.alarm(LIMIT) gives it LIMIT seconds."""
    used = 1024 * int(next(line for line in open('/proc/self/status')
                           if line.startswith('VmSize')).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + (gigabytes << 30), resource.RLIM_INFINITY))


def run(name: str, argv: list[str]) -> tuple[int, str]:
    """Exit status and standard error of a script with these words, as from a shell."""
    script = importlib.import_module(name)
    before, hook, streams = dict(vars(script)), sys.excepthook, (sys.stdin, sys.stdout, sys.stderr)
    sys.stdin, sys.stdout, err = io.StringIO('Once'), io.StringIO(), io.StringIO()
    sys.stderr, status = err, 0
    signal.alarm(LIMIT)
    try:
        also = read_settings(ROOT / 'train.py') if name in ('plan', 'bench') else None
        configure(vars(script), argv, also)
        script.main(*[also] if also else [])
    except SystemExit as e:
        status = e.code
    except BaseException as e:      # as the interpreter does
        status = 2
        with suppress(Stop):
            sys.excepthook(type(e), e, e.__traceback__)
            status = 1
    finally:
        signal.alarm(0)
        vars(script).update(before)
        sys.stdin, sys.stdout, sys.stderr = streams
        sys.excepthook = hook
    return status, err.getvalue()


def tree() -> dict:
    """All files below this folder, with size and time; not locks, work folders and downloads."""
    return {str(path): path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns)
            for path in Path().rglob('*')
            if not (str(path) + '/').startswith('data/downloads/')
            and not any(part.startswith('.') for part in path.parts)}


@pytest.fixture
def folder(base, chats, preferences, texts, text_file, tmp_path):
    """A folder with a run, its dataset, and a file of every kind."""
    for path in (chats, preferences, texts):
        shutil.copy(path, tmp_path)
    shutil.copy(text_file, 'text.txt')
    Path('folder').mkdir()
    for name in ('binary.bin', 'binary.txt', 'binary.py', 'binary.jsonl'):
        Path(name).write_bytes(bytes(range(256)) * 20)
    Path('questions.jsonl').write_text(''.join(json.dumps(
        {'question': f'{i} is', 'choices': ['even', 'odd'], 'label': i % 2}) + '\n'
        for i in range(9)))
    return tmp_path


# ---------------------------------------------------------------------------------------------
# Mistakes

# Of these much takes long.
ENDLESS = {'max_steps', 'max_minutes', 'max_new_tokens', 'num_samples', 'rounds', 'steps', 'warmup',
           'samples', 'epochs', 'answer_tokens', 'sample_tokens', 'new_tokens', 'prompt_tokens'}
NOT_TEXT = ('', 'out/none', 'folder', 'binary.bin', 'binary.txt', 'binary.jsonl', 'x' * 5000, '-1',
            'a\0b', '\udc80', 'nan', '\u202e', 'None', '../..', 'questions.jsonl', 'out/base', '[]',
            '\n', ',', '/', 'int8,int9', 'cuda:99', 'float8', 'no_such')
NOT_INT = ('', 'x', '1.5', 'nan', 'inf', '1e400', '[1]', 'None', 'True', '0x', '1,000', '"1"',
           '9' * 5000, '(' * 500, '2**3', '\0', '-1')
NOT_FLOAT = ('', 'x', 'nan', '-inf', '1e400', '[1.0]', 'None', 'False', '0,1', '9' * 400, '1j',
             '-1')
NOT_BOOL = ('', 'maybe', '2', '1.5', 'None', 'nan', '0.0', 'yes', '[True]', 'truee')
HUGE = ('2147483648', '9223372036854775808', '1' + 30 * '0', '1e300')


class Case(NamedTuple):
    """Settings that differ from RIGHT, or a word (its name is ''), and whether they are `wrong`:
    must be refused; others may be harmless."""
    script: str
    changed: dict
    wrong: bool = True


CONTRADICTIONS = [Case(script, changed) for script, all_changed in {
    'train': ({'depth': 2}, {'sequence_parallel': True}, {'tp': 2}, {'n_head': 3}, {'zero': 4},
              {'n_kv_head': 3}, {'init_from': 'out/base'}, {'vocab_size': 10}, {'replicas': 2},
              {'arch': 'lstm', 'pack_documents': True}, {'dtype': 'float16'}, {'pp': 2},
              {'': 'config/none.py'}, {'': 'folder'}, {'': 'binary.py'}, {'': '-x'},
              {'': '--seed'}, {'block_size': 10 ** 6}),
    'finetune': ({'save_adapters': True}, {'layers': 'head', 'lora_rank': 4}, {'layers': '-1'},
                 {'against': 'out/base'}, {'block_size': 1000}, {'val_fraction': 0.0},
                 {'dataset': 'sms_spam'}, {'dataset': 'texts.tsv'}, {'step': 77}),
    'classify': ({'layers': '1', 'lora_rank': 4}, {'labels': 'a,b'}, {'dataset': 'chats.jsonl'}),
    'dpo': ({'loss': 'ipo', 'label_smoothing': 0.1}, {'dataset': 'chats.jsonl'}),
    'evaluate': ({'samples': 2}, {'tasks': 'safety', 'shots': 3}, {'step': 5},
                 {'tasks': 'questions.jsonl,none'}, {'quantize': 'int2'}),
    'sample': ({'prompt_file': 'text.txt'}, {'system': 'x'}, {'classify': 'x'}, {'step': 9},
               {'prompt': '', 'prompt_file': 'binary.bin'}, {'prompt': '', 'prompt_file': 'folder'},
               {'classify': 'x', 'classify_file': 'text.txt'}),
    'export': ({'dtype': 'q8_8'}, {'export_dir': 'folder'}), 'serve': ({'host': 'no such host'},),
    'prepare': ({'vocab_size': 300}, {'tokenizer': 'bpe', 'vocab_size': 9}, {'name': '../x'},
                {'errors': 'skip'}, {'validation': 'binary.bin'}, {'bad_words': 'binary.bin'},
                {'weights': '1,2'}, {'dataset': 'text.txt,none'}, {'encoding': 'hex'}),
    'plan': ({'laptop': True}, {'what': 'fit'}, {'params': 'many'}, {'gpu': 'abacus'}),
    'bench': ({'what': 'races'}, {'weights': 'int8'}, {'what': 'runs'}, {'vs': 'folder'}),
    }.items() for changed in all_changed]


def mistakes_of(script: str) -> Iterator[Case]:
    """Every mistake with every setting of a script."""
    also = read_settings(ROOT / 'train.py') if script in ('plan', 'bench') else {}
    known = settings_of(also) | settings_of(read_settings(ROOT / f'{script}.py'))
    for name, default in known.items():
        kind = type(default)
        for value in {bool: NOT_BOOL, int: NOT_INT, float: NOT_FLOAT, str: NOT_TEXT}[kind]:
            allowed = kind is str or (name, value) == ('shots', '-1')
            yield Case(script, {name: value}, not allowed)
        if kind in (int, float) and name not in ENDLESS and script != 'plan':   # which takes long
            yield from (Case(script, {name: value}, False) for value in ('0', *HUGE))
        yield from (Case(script, {wrong: default}) for wrong in (
            name + 'x', name[1:], name.replace('_', '-'), name.upper(), f'_{name}')
            if wrong not in known)


def problem(case: Case, status: int, err: str, written: list) -> str:
    """What is wrong with how a script has answered a mistake; '' if nothing is."""
    errors = re.findall(r'^\s*error: .*', err.replace('\r', '\n'), re.MULTILINE)
    named_there = {'out/base', *(word for name, value in case.changed.items()
                                 for word in (name or value, str(value)[:60] or 'given'))}
    if status not in (0, 2) or 'Traceback' in err:
        return f'exit status {status}'
    if status == 0:
        return 'accepted' if case.wrong else ''
    if len(errors) != 1:
        return f'{len(errors)} lines with an error'
    if case.wrong and not any(word in errors[0] for word in named_there):
        return 'the setting is not named'
    return f'written: {written}' if case.wrong and written else ''


def run_cases(folder: str, cases: list[Case], output: str) -> None:
    """In a process of its own: run the commands; what was wrong, and how many were refused."""
    os.chdir(folder)
    hardware.matmul_rate = lambda *_: 1e11
    importlib.import_module('uvicorn').Server.run = lambda *_, **__: None
    plan.pictures.draw = lambda *_, **__: None
    pristine = shutil.copytree('.', f'{folder}-before')
    limited(4)
    found, before = {'wrong': [], 'refused': 0, 'harmless': 0}, tree()
    for case in map(Case._make, cases):
        Path(output).write_text(json.dumps({'crashed': case}))
        words = [f'--{name}={value}' if name else value for name, value in
                 {**RIGHT[case.script], **case.changed}.items()]
        status, err = run(case.script, words)
        after = tree()
        written = [path for path in after if after[path] != before.get(path)]
        if what := problem(case, status, err, written):
            found['wrong'].append([what, case, err[-2000:]])
        found['refused' if status else 'harmless'] += 1
        if after != before:
            shutil.rmtree('.', ignore_errors=True)
            shutil.copytree(pristine, '.', dirs_exist_ok=True)
            before = tree()
    Path(output).write_text(json.dumps(found))


def in_a_process(work, seconds: float, folder: Path, *args) -> dict:
    """What work(folder, *args, file) writes into the file, in a process that must end in time."""
    output = folder.with_name(f'{folder.name}.json')
    process = PROCESSES.Process(target=work, args=(str(folder), *args, str(output)))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, output.read_text()[:3000]
    return json.loads(output.read_text())


@pytest.mark.parametrize('n', [44, pytest.param(660, marks=pytest.mark.slow)])
def test_mistakes_are_refused_in_one_line(folder, n):
    cases, rng = CONTRADICTIONS[::1 if n > 50 else 8], random.Random(0)
    for script in RIGHT:
        cases += rng.sample([*mistakes_of(script)], n // len(RIGHT))
    found = in_a_process(run_cases, 120 + n, folder, cases)
    assert not found['wrong'], '\n\n'.join(' '.join(map(str, one)) for one in found['wrong'][:9])
    assert found['refused'] > 0.6 * len(cases)
    note('a mistake in the settings of a script', len(cases),
         f'{found["refused"]:,} refused in one line, {found["harmless"]:,} harmless')


# ---------------------------------------------------------------------------------------------
# Mutated files

PIECES = (b'\0', b'\xff', b'\xef\xbb\xbf', b'\r\n', b'\n', b'"', b'{', b'}', b'[', b']', b',', b':',
          b'\\ud800', b'\\u0000', b'NaN', b'Infinity', b'-1', b'1e999', b'9' * 5000, b'null',
          b'true', b'\xc3\xa9', b'\x1f\x8b', b'\xed\xa0\x80', b'[' * 3000, b'{"a":' * 3000, b'\t',
          b'\x85', b'"' * 9, b'\xe2\x80\xa8', b'-0', b'0x1', b'"x":1,')
ODD = (None, True, -1, 0, 1, 2 ** 31, 2 ** 63, 2 ** 64, 10 ** 400, 1e308, -0.5, float('nan'),
       float('inf'), '', 'x', '\ud800', '\0', '1', [], {}, [[]], [None], {'x': 1}, ['x'], 'é' * 300)


def swapped(value, rng):
    """JSON in which a value has become another one, or is gone, or is there under another name."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        other = {k: v for k, v in value.items() if k != key}
        return rng.choice([lambda: {**value, key: swapped(value[key], rng)}] * 5 + [
            lambda: other, lambda: {**other, rng.choice(['x', key.upper(), '', f'{key} ']):
                                    value[key]}])()
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return value[:i] + [swapped(value[i], rng)] * rng.randrange(3) + value[i + 1:]
    return rng.choice(ODD)


def mutated(data: bytes, rng, is_json: bool) -> bytes:
    """The content of a file, damaged in one way."""
    kind, at = rng.randrange(9), rng.randrange(len(data))
    to = min(len(data), at + rng.choice([1, 1, 8, 100, 5000]))
    if kind < 4 and is_json:
        lines = data.decode().splitlines()
        i = rng.randrange(len(lines)) if len(lines) > 1 and lines[0].endswith('}') else slice(None)
        text = lines[i] if isinstance(i, int) else '\n'.join(lines)
        text = json.dumps(swapped(json.loads(text), rng), ensure_ascii=rng.random() < 0.7)
        lines[i] = text if isinstance(i, int) else [text]
        return '\n'.join(lines).encode(errors='surrogatepass')
    if kind < 3:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 30])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data[:to] + data[at:to] * rng.choice([1, 2, 50]) + data[to:]
    if kind == 5:
        return data[:at] + rng.choice(PIECES) + data[rng.choice([at, to]):]
    if kind == 6:
        return data[:at] + data[to:]
    if kind == 7:
        return data[:at] + rng.randbytes(to - at) + data[to:]
    text = data.decode('latin-1')
    return rng.choice([lambda: text.encode('utf-16'), lambda: text.encode('utf-16-le'),
                       lambda: b'\xef\xbb\xbf' + data, lambda: data.replace(b'\n', b'\r\n'),
                       lambda: data.replace(b'\n', b'\r'), lambda: text.encode('utf-32'),
                       lambda: text.encode('cp037'), lambda: b'', lambda: data[::-1],
                       lambda: data.replace(b'e', b'\xe9'), lambda: text.encode('utf-7')])()


CONFIG = """batch_size, block_size = 12, 64    # a comment
learning_rate = 6e-4
mlp = 'swiglu'
n_layer = n_head = 2
max_steps = 2 * 50
compile = False
_part = 3
warmup_steps = _part + 1
"""


def read_config(path: Path) -> None:
    """A config file, as train.py reads it."""
    settings = {**read_settings(train.__file__), 'CONFIG': ''}
    before = settings_of(settings)
    configure(settings, [str(path)])
    check_settings(settings)
    assert all(type(settings[name]) is type(value) for name, value in before.items())


def read_shard(path: Path) -> None:
    """A token shard, as training reads it."""
    for eos in (None, 5):
        windows = dataset.load_split(path.parent, 'train', 32, seed=1, eos=eos)
        for i in range(0, len(windows), 50):
            x, y, _ = windows.batch([i])
            assert 0 <= int(x.min()) and max(int(x.max()), int(y.max())) < 261


def read_meta(path: Path) -> None:
    """meta.json, as prepare.py reads it, whether it is given the folder or the text."""
    for name in (str(path.parent), read_meta.text):
        prepare.dataset, prepare.tokenizer, prepare.GIVEN = name, 'byte', ('val_fraction',)
        meta = prepare.main()
    assert 0 <= meta['max_id'] < 1 << 63 and meta['train_tokens'] >= 0 and meta['about'] + ''


def read_log(path: Path) -> None:
    """log.jsonl of a run, as those read it who resume, draw, fit, compare and export."""
    folder, bench.folders = path.parent, str(path.parent)
    assert identity.differences(identity.identity_of(folder), {'x': 1})
    identity.is_finished(folder)
    for reader in (lambda: fit.read_runs([str(folder)]), lambda: bench.bench_runs(None)):
        with suppress(Stop):
            reader()
    log.plot_losses(folder)
    overlap.shards_of(str(folder), 'data')
    card.write_card(Path('folder'), str(folder), read_log.state, read_log.model, ['a fact'])
    log.cut_log(folder, 1, 1)
    assert len(json_lines(path)) == len(log.events(folder))


def read_records(kind):
    """A reader of files of records, as finetune.py, classify.py and dpo.py read them."""
    def reader(path: Path) -> None:
        found = records.load(str(path), kind, 'data', False)
        json.dumps([record[1:] for record in found], ensure_ascii=False).encode()
        assert all(record.label and record.text.strip() if kind is records.labelled else
                   record.messages[-1]['content'].strip() for record in found)
        if kind is not records.labelled:
            records.load_split(str(path), '', 0.1, kind, 'data', False)
    return reader


def read_questions(path: Path) -> None:
    """A file of questions or of texts, as evaluate.py reads it."""
    for item in tasks.load(str(path)).items:
        ''.join([*item.contexts, *item.choices]).encode()
        assert not item.choices or item.choices[item.gold].strip()


def table(rows: list[dict], mark: str) -> str:
    return ''.join(f'{mark.join(row)}\n' for row in [[*rows[0]], *(row.values() for row in rows)])


FORMATS = {'.jsonl': lambda rows: ''.join(json.dumps(row) + '\n' for row in rows),
           '.json': json.dumps, '.csv': lambda rows: table(rows, ','),
           '.tsv': lambda rows: table(rows, '\t')}


def write_inputs() -> dict:
    """Write files of every kind; {path: (what it is, its reader, whether it is JSON)}."""
    chats, pairs = json_lines('chats.jsonl'), json_lines('preferences.jsonl')
    texts = [dict(zip(('label', 'text'), line.split('\t')))
             for line in Path('texts.tsv').read_text().splitlines()]
    turns = [{'messages': [{'role': 'user', 'content': c['instruction'], 'weight': 0.5},
                           {'role': 'assistant', 'content': c['output']}]} for c in chats]
    Path('config.py').write_text(CONFIG)
    Path('documents.jsonl').write_text(FORMATS['.jsonl']([{'text': x['text']} for x in texts]))
    inputs = {'config.py': ('config file', read_config), 'out/base/log.jsonl': ('log', read_log),
              'data/source_byte/train-00000.bin': ('token shard', read_shard),
              'data/source_byte/meta.json': ('meta.json', read_meta),
              'questions.jsonl': ('file of questions or texts', read_questions),
              'documents.jsonl': ('file of questions or texts', read_questions)}
    for name, rows, kind in (('chats', chats, records.conversation), ('pairs', pairs,
                             records.preference), ('texts', texts, records.labelled)):
        for ending, text_of in FORMATS.items():
            Path(name + ending).write_text(text_of(rows))
            inputs[name + ending] = ('file of records', read_records(kind))
    Path('turns.jsonl').write_text(FORMATS['.jsonl'](turns))
    return inputs | {'turns.jsonl': ('file of records', read_records(records.conversation))}


def read_mutants(folder: str, n: int, output: str) -> None:
    """In a process of its own: read n mutated files, of each kind as many."""
    os.chdir(folder)
    limited(2)
    inputs, rng = write_inputs(), random.Random(3)
    read_log.model, _, read_log.state = models.load_run('out/base')
    read_meta.text = json.loads(Path('data/source_byte/meta.json').read_text())['source']
    found = {'wrong': [], 'counts': {what: [0, 0] for what, _ in inputs.values()}}
    log.draw = lambda *_, **__: False     # slow, and takes any failure for a warning
    for path, (what, reader) in inputs.items():
        path, original = Path(path), Path(path).read_bytes()
        reader(path)
        of_kind = sum(what == other for other, _ in inputs.values())
        for _ in range(-(-n // len(found['counts']) // of_kind)):
            path.write_bytes(mutated(original, rng, path.suffix in ('.json', '.jsonl')))
            sys.stdout = sys.stderr = io.StringIO()     # which configure wraps each time
            Path(output).write_text(json.dumps({'crashed': str(path)}))
            signal.alarm(LIMIT)
            try:
                reader(path)
                found['counts'][what][1] += 1
            except Stop as e:
                found['counts'][what][0] += 1
                if path.name not in e.message and (path.parent.name or '=') not in e.message:
                    found['wrong'].append([str(path), e.message])
            except BaseException:
                shutil.copy(path, f'{output}.{len(found["wrong"])}')
                found['wrong'].append([str(path), traceback.format_exc()[-1500:]])
            signal.alarm(0)
        path.write_bytes(original)
    Path(output).write_text(json.dumps(found))


@pytest.mark.parametrize('n', [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files(folder, n):
    found = in_a_process(read_mutants, 120 + n / 20, folder, n)
    assert not found['wrong'], '\n\n'.join(map('\n'.join, found['wrong'][:9]))
    for what, (refused, harmless) in found['counts'].items():
        note(f'a mutated {what}', refused + harmless,
             f'{refused:,} refused by name, {harmless:,} harmless')
    assert sum(refused for refused, _ in found['counts'].values()) > n / 3
