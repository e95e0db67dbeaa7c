"""What makes two commands the same run: content, not spelling; every setting; the source."""
import gc
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, TUNED

import classify
import dpo
import finetune
import model as model_module
import train
from core import device as hardware
from core.net.weights import build_model
from core.run import checkpoint, models
from core.run import run as run_module
from core.run.identity import MAY_DIFFER, differences, identity_of
from core.run.learner import Learner
from core.run.log import read_log
from core.settings import Stop, settings_of
from core.source import read_source, source_hashes

ROOT = Path(train.__file__).parent
DOORS = ['train', 'chat', 'classify', 'dpo']
SOME = ['train', *(pytest.param(name, marks=pytest.mark.slow) for name in DOORS[1:3]), 'dpo']


def one_of(fast: str) -> list:
    """All doors, of which one is not slow."""
    return [pytest.param(name, marks=() if name == fast else pytest.mark.slow) for name in DOORS]


class Found(Exception):
    """Carries the identity with which a script asks for its run directory."""


@pytest.fixture(scope='session')
def first_runs(tmp_path_factory):
    """An empty folder, which the first test fills with two runs that others copy."""
    return tmp_path_factory.mktemp('runs')


@pytest.fixture
def door(first_runs, tmp_path, text_file, chats, texts, preferences, monkeypatch):
    """door(name, **settings): the main() of a script with tiny settings, in a temporary folder. The
    stages after train go on with out/base; there is an out/other of equal shape, too."""
    monkeypatch.chdir(first_runs)
    scripts = {'train': train, 'chat': finetune, 'classify': classify, 'dpo': dpo}
    own = {'train': TINY | {'dataset': str(text_file), 'tokenizer': 'byte'},
           'chat': TUNED | {'run_dir': 'out/base', 'dataset': 'chats.jsonl', 'answers': 0},
           'classify': TUNED | {'run_dir': 'out/base', 'dataset': 'texts.tsv'},
           'dpo': TUNED | {'run_dir': 'out/base', 'dataset': 'preferences.jsonl'}}

    def run(name, **settings):
        gc.collect()    # closes the locks of runs that were stopped
        with monkeypatch.context() as patch:
            for key, value in {**own[name], **settings}.items():
                patch.setattr(scripts[name], key, value, raising=False)
            patch.setattr(scripts[name], 'CONFIG', 'tiny')
            return scripts[name].main()

    def identity(name, **settings) -> dict:
        """The identity alone: nothing is trained."""
        def found(base, identity, *rest):
            raise Found(identity)
        with monkeypatch.context() as patch:
            patch.setattr(run_module, 'open_run', found)
            with pytest.raises(Found) as e:
                run(name, **settings)
        return e.value.args[0]

    def cut(name, **settings) -> Path:
        """A run that a signal stopped after its first step."""
        real = scripts[name].train_step
        with monkeypatch.context() as patch:
            patch.setattr(scripts[name], 'train_step', lambda *args, **options: real(
                *args, **options)._replace(asked=True))
            result = run(name, **settings)
        assert result['stopped']
        return Path(result['run_dir'])

    for number, name in enumerate(('out/base', 'out/other')):
        if not Path(name).exists():
            run('train', block_size=96, max_steps=1, seed=number, out_dir=name)
    shutil.copytree('.', tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for path in (chats, texts, preferences):
        shutil.copy(path, '.')
    run.identity, run.cut, run.scripts, run.own = identity, cut, scripts, own
    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def stops(run, *parts) -> str:
    """Check that it stops with status 2 and one line that has all `parts`."""
    with pytest.raises(Stop) as e:
        run()
    assert e.value.code == 2 and '\n' not in e.value.message
    for part in parts:
        assert part in e.value.message, e.value.message
    return e.value.message


# ---------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize('name', one_of('classify'))
def test_spelling_does_not_count(door, name, tmp_path):
    """Of the model to begin with, of the data, of the tokenizer: absolute, relative, linked, with
    slashes, moved."""
    model = 'init_from' if name == 'train' else 'run_dir'
    given = {model: 'out/base'}
    first = door.identity(name, **given)
    data = door.own[name]['dataset']
    os.symlink('out/base', 'latest')
    shutil.copy(data, 'renamed' + Path(data).suffix)
    spelled = [{model: 'out/base/'}, {model: './out/base'}, {model: str(tmp_path / 'out' / 'base')},
               {model: 'latest'}, {'dataset': f'.//{os.path.relpath(data)}'},
               {'dataset': os.path.abspath(data)}, {'dataset': 'renamed' + Path(data).suffix}]
    if name == 'train':
        spelled += [{'dataset': 'data/source_byte'}, {'dataset': 'source_byte/'},
                    {'tokenizer': 'out/base', 'dataset': 'data/source_byte'}]
    for settings in spelled:
        assert door.identity(name, **given | settings) == first, settings
    Path('out/base').rename('elsewhere')
    assert door.identity(name, **{model: 'elsewhere'}) == first
    # ... but what they hold does
    changes = differences(first, door.identity(name, **{model: 'out/other'}))
    assert [change[0] for change in changes] == ['weights']
    text = Path(data).read_text()
    Path('other' + Path(data).suffix).write_text(text.replace('1', '7').replace('def', 'fed'))
    changes = differences(first, door.identity(
        name, **{model: 'elsewhere', 'dataset': 'other' + Path(data).suffix}))
    assert {change[0].split('.')[0] for change in changes} == {'data'}, changes


@pytest.mark.parametrize('name', ['chat', 'dpo'])
def test_spelling_of_a_validation_file_does_not_count(door, name):
    shutil.copy(door.own[name]['dataset'], 'val.jsonl')
    first = door.identity(name, validation='val.jsonl')
    assert door.identity(name, validation='./val.jsonl') == first
    assert door.identity(name) != first


@pytest.mark.parametrize('name', DOORS)
def test_every_setting_counts(door, name):
    """Also one that somebody adds to a script, without naming it anywhere else."""
    script = door.scripts[name]
    first = door.identity(name)
    known = {*MAY_DIFFER, *first['architecture'], *first['settings']}
    assert {*settings_of(vars(script))} <= known
    other = dict(learning_rate=1e-3, max_steps=7, beta2=0.9, dropout=0.1, my_idea=0.5)
    changes = differences(first, door.identity(name, **other))
    assert {change[0].split('.')[1] for change in changes} == other.keys(), changes


@pytest.mark.parametrize('name', DOORS)
def test_layout_and_intervals_do_not_count(door, name):
    changes = dict(micro_batch_size=1, threads=2, log_interval=3, eval_interval=2,
                   activation_checkpointing=True, timeout_minutes=1.0, out_dir='out/elsewhere')
    changes |= dict(sample_interval=2, sample_tokens=7, save_interval=1) if name == 'train' else {}
    changes |= dict(block_size=0) if name != 'train' else {}    # as in out/base, which has as many
    assert not differences(door.identity(name), door.identity(name, **changes))


def test_names_that_may_differ_are_settings():
    known = {name for script in (train, finetune, classify, dpo)
             for name in settings_of(vars(script))}
    assert {*MAY_DIFFER} - known <= {'check_layout'}


@pytest.mark.parametrize('name, changed, said', [
    ('train', dict(seed=2, eval_tokens=64), 'eval_tokens is 64, but was 0, seed is 2, but was'),
    ('chat', dict(dtype='bfloat16'), '(dtype is bfloat16, but was float32)'),
    pytest.param('classify', dict(learning_rate=1e-4, grad_clip=0.5, max_steps=9, balance=True),
                 'balance is True, but was False, grad_clip is 0.5, but was 1.0, learning_rate is '
                 '0.0001, but was 0.003 and 1 more', marks=pytest.mark.slow),
    pytest.param('dpo', dict(beta=0.2), '(beta is 0.2, but was 0.1)', marks=pytest.mark.slow)])
def test_another_run_is_named(door, name, changed, said, capsys):
    run = door.cut(name)
    capsys.readouterr()
    again = door.cut(name, **changed)
    assert again == run.with_name(run.name + '-2')
    assert f'{run} is another run (' in (out := capsys.readouterr().out) and said in out
    assert door(name, **changed)['run_dir'] == str(again)
    assert door(name)['run_dir'] == str(run)
    capsys.readouterr()
    assert door.cut(name) == run.with_name(run.name + '-3')     # -2 is finished as well
    assert f'{run} is finished, so this one is ' in capsys.readouterr().out


@pytest.mark.parametrize('name', SOME)
def test_dtype_is_kept(door, name, capsys, monkeypatch):
    """The run's, whatever this machine would choose; one that is given makes another run."""
    run = door.cut(name, dtype='bfloat16')
    with monkeypatch.context() as patch:
        real = hardware.choose_dtype
        patch.setattr(hardware, 'choose_dtype', lambda kind, dtype, training: real(
            kind, dtype or 'float32', training))
        capsys.readouterr()
        assert door.cut(name, dtype='') == run
        out = capsys.readouterr().out
    assert 'resuming' in out and 'dtype bfloat16 (with which the run was begun)' in out
    assert identity_of(run)['settings']['dtype'] == 'bfloat16'
    whole = door(name, dtype='bfloat16', out_dir='out/whole')
    assert door(name, dtype='bfloat16')['val_loss'] == whole['val_loss']
    assert [e['train_loss'] for e in read_log(run, 'step')] == \
        [e['train_loss'] for e in read_log('out/whole', 'step')]


# ---------------------------------------------------------------------------------------------
# Source


CODE = '''"""A module."""
import a.b
from c import d
def f(x, how='fast'):
    """Says."""
    if x > 1:   # a comment
        raise ValueError(f'{x} is {how}')
    stop('too ' + ('many' if x else 'few') + ', '.join(map(str, x)) + f' of {x}')
    warn("one" % x)
    core.settings.print0(f'{x}', 'and', sep=' ')
    tqdm.write('hello')
    assert x, 'never'
    return g('mode', key='fast')[0x10] + {'a': 1.0}['a']
'''


@pytest.mark.parametrize('old, new', [
    ('"""A module."""', ''), ('"""Says."""', '"""Tells\n    more."""'), ('# a comment', ''),
    ('{x} is {how}', '{x} was {how}!'), ("'too '", "'far too '"), ("'few'", "'no'"),
    ("', '.join", "' and '.join"), (' of {x}', ' out of {x}.'), ('"one"', '"two"'),
    ("'and'", "'or'"), ("sep=' '", "sep=''"), ('hello', 'good bye'), ('never', 'ever'),
    ('0x10', '16'), ('x > 1', '(x  >  1)'), ("'mode'", '"mode"'), ('import a.b', '\n\nimport a.b')])
def test_words_do_not_count(tmp_path, old, new):
    assert is_same(tmp_path, old, new)


@pytest.mark.parametrize('old, new', [
    ('x > 1', 'x > 2'), ('x > 1', 'x >= 1'), ("how='fast'", "how='slow'"), ("'mode'", "'other'"),
    ("key='fast'", "key='slow'"), ('1.0', '1'), ("['a']", "['b']"), ("{'a'", "{'b'"),
    ('import a.b', 'import a.e'), ('ValueError', 'TypeError'), ("stop('too", "go('too"),
    ("'and'", "run('and')"), ("warn(\"one\" % x)", 'pass'), ('str, x', 'repr, x'),
    ('assert x', 'assert not x'), ("tqdm.write('hello')", "log.write('hello')"),
    ("tqdm.write('hello')", "tqdm.write('hello'); x = 1")])
def test_code_counts(tmp_path, old, new):
    assert not is_same(tmp_path, old, new)


@pytest.mark.parametrize('text, other', [
    ("print(run('a'))", "print(run('b'))"), ("log.write('a')", "log.write('b')"),
    ('f([1], 2)', 'f([1, 2])'), ('f(a, b=1)', 'f(a, 1)'),
    ('def f(a=1, *, b): 0', 'def f(a, *, b=1): 0'),
    ('x = ""', 'x = "a"'), ('x = 1', 'x = True'), ('x = None', 'x = 0'), ('x = -1', 'x = 1'),
    ('for i in x:\n  a\nb', 'for i in x:\n  a\n  b'), ('@a\ndef f(): 0', 'def f(): 0'),
    ('from a import b', 'from .a import b'), ('x: int = 1', 'x: float = 1'),
    ('lambda: (yield)', 'lambda: 0'), ('{**a}', '{a: a}'), ('x = b""', 'x = ""')])
def test_trees_are_told_apart(tmp_path, text, other):
    (tmp_path / 'a.py').write_text(text)
    (tmp_path / 'b.py').write_text(other)
    assert read_source(tmp_path / 'a.py', 0)[0] != read_source(tmp_path / 'b.py', 0)[0]


def is_same(folder, old, new) -> bool:
    assert CODE.count(old) == 1 or new != old
    (folder / 'a.py').write_text(CODE)
    (folder / 'b.py').write_text(CODE.replace(old, new, 1))
    return read_source(folder / 'a.py', 0)[0] == read_source(folder / 'b.py', 0)[0]


def test_files_that_are_imported(tmp_path):
    files = {'train.py': 'import model\nfrom core import optim as o\nimport torch\nimport json',
             'model.py': 'def f():\n    from core.deep.er import thing',
             'core/optim.py': 'import train',
             'core/deep/er.py': 'from . import beside\nfrom ..optim import x',
             'core/deep/beside.py': '', 'core/deep/__init__.py': '1', 'bench.py': '',
             '.venv/lib/torch.py': '', 'core/half.py': 'def (', 'mine.py': 'import core.half'}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    imported = ['core/deep/__init__.py', 'core/deep/beside.py', 'core/deep/er.py', 'core/optim.py',
                'model.py', 'train.py']
    assert sorted(source_hashes(tmp_path / 'train.py')) == imported
    assert sorted(source_hashes(tmp_path / 'mine.py')) == ['core/half.py', 'mine.py']
    here = source_hashes(train.__file__)
    assert {'model.py', 'train.py', 'core/net/optim.py', 'core/ranks/pipeline.py'} <= {*here}
    assert not {'bench.py', 'finetune.py', 'core/run/metrics.py'} & {*here}


@pytest.fixture
def project(door, tmp_path, monkeypatch):
    """project(file, old, new): edit a copy of the source, as which the scripts know theirs."""
    for path in [*ROOT.glob('*.py'), *ROOT.glob('core/**/*.py')]:
        (target := tmp_path / 'project' / path.relative_to(ROOT)).parent.mkdir(
            parents=True, exist_ok=True)
        shutil.copy(path, target)
    for module in (train, finetune, classify, dpo, model_module):
        monkeypatch.setattr(module, '__file__',
                            str(tmp_path / 'project' / Path(module.__file__).name))

    def edit(file, old, new):
        path = tmp_path / 'project' / file
        assert old in (text := path.read_text())
        path.write_text(text.replace(old, new, 1))
        os.utime(path, ns=(0, edit.time))
        edit.time += 1
    edit.time = 1
    return edit


@pytest.mark.parametrize('name', one_of('train'))
def test_edited_source(door, project, name, capsys):
    """In the midst of a run: words resume it, code stops, and there are two ways on."""
    run, script = door.cut(name), Path(door.scripts[name].__file__).name
    project(script, '"""', '"""In other words. ')
    project('core/net/optim.py', 'import math', 'import math    # for pi')
    project('core/settings.py', 'must be one of', 'has to be one of')
    assert door.cut(name) == run and 'resuming' in capsys.readouterr().out
    log = (run / 'log.jsonl').read_bytes()
    for file, old, new in (('core/net/optim.py', '3.4445', '3.4446'),
                           (script, 'seed = 1337', 'seed = 1338'),
                           ('model.py', 'self.n_head', 'self.n_kv_head'),
                           ('core/net/kernels.py', '1 << 24', '1 << 23')):
        project(file, old, new)
        message = stops(lambda: door(name), f'{run}: ', f'{file} has changed', '--init_from=resume',
                        f'--out_dir={run}', 'another --out_dir')
    assert message.count('has changed') == 3 and ' and 1 more; ' in message
    assert log == (run / 'log.jsonl').read_bytes() and not run.with_name(run.name + '-2').exists()
    # another setting is another run; it is begun with the new source
    assert door.cut(name, seed=3) == run.with_name(run.name + '-2')
    assert 'seed is 3, but was 1337' in capsys.readouterr().out
    # both ways on
    assert door(name, out_dir='out/anew')['step'] == 6
    models.load_run(str(run), classifier=name == 'classify')
    assert 'was trained with another model.py and core/net/kernels.py; copies' \
        in capsys.readouterr().err
    assert door(name, init_from='resume')['run_dir'] == str(run)
    assert 'core/net/optim.py has changed' in capsys.readouterr().err
    assert read_log(run, 'end') and read_log(run, 'start')
    models.load_run(str(run), classifier=name == 'classify')
    assert 'was trained with another' not in capsys.readouterr().err


@pytest.mark.parametrize('name', one_of('train'))
def test_a_setting_that_is_new_comes_with_the_source(door, project, name):
    run = door.cut(name)
    script = Path(door.scripts[name].__file__).name
    project(script, 'seed = 1337', 'my_idea = 0.5\nseed = 1337')
    stops(lambda: door(name, my_idea=0.5), f'{script} has changed', '--init_from=resume')
    assert door.cut(name, my_idea=0.5, init_from='resume', out_dir=str(run)) == run
    assert door(name, my_idea=0.5)['run_dir'] == str(run)       # with which it goes on now


@pytest.mark.parametrize('name', SOME)
def test_insisting(door, name, capsys):
    """What makes a checkpoint useless is refused, what does not is a warning."""
    run = str(door.cut(name))
    insist = dict(init_from='resume', out_dir=run)
    data = door.own[name]['dataset']
    Path('other' + Path(data).suffix).write_text(
        Path(data).read_text().replace('1', '7').replace('def', 'fed'))
    stops(lambda: door(name, **insist, dataset='other' + Path(data).suffix), 'data.', 'but was',
          'restore it')
    if name != 'train':
            stops(lambda: door(name, **insist, run_dir='out/other'), 'weights is ')
    capsys.readouterr()
    assert door(name, **insist, max_steps=8, learning_rate=1e-4)['step'] == 8
    err = capsys.readouterr().err
    assert (f'warning: {run}: learning_rate is 0.0001, but was 0.003, max_steps is 8, but was 6'
            in err)
    stops(lambda: door(name, **insist, max_steps=7), 'max_steps=7', 'has done 8 steps already')
    stops(lambda: door(name, init_from='resume', out_dir='out/none'), 'holds no checkpoint')


def test_runs_of_an_older_version(door, capsys):
    """Whose settings are arranged otherwise, and whose source is one hash: they are not lost."""
    run = door.cut('train')
    for path in (run / 'log.jsonl', run / 'step-00000001' / 'state.json'):
        events = [json.loads(line) for line in path.read_text().splitlines()] \
            if path.suffix == '.jsonl' else [json.loads(path.read_text())]
        for event in events:
            if 'identity' in event:
                now = event['identity']
                event['identity'] = {
                    'architecture': now['architecture'], 'tokenizer': now['tokenizer'],
                    'data': now['data'] | {'name': 'source_byte'}, 'seed': 1337, 'batch_size': 4,
                    'optimizer': {'learning_rate': 3e-3}, 'source': '0123456789abcdef'}
        path.write_text(''.join(json.dumps(event) + '\n' for event in events))
    folder = run / 'step-00000001'
    files = json.loads((folder / 'manifest.json').read_text())['files']
    (folder / 'manifest.json').write_text(checkpoint.manifest(
        files | {'state.json': checkpoint.flushed(folder / 'state.json')}))
    stops(lambda: door('train'), 'source of an older version is not known', '--init_from=resume')
    models.load_run(str(run))
    assert 'trained with another' not in capsys.readouterr().err
    assert door('train', init_from='resume')['run_dir'] == str(run)


def test_the_log_is_lost(door):
    """Then a checkpoint says which run it is."""
    run = door.cut('train')
    (run / 'log.jsonl').unlink()
    assert door('train')['run_dir'] == str(run)


def test_out_dir_is_where_we_are(door, monkeypatch, tmp_path):
    data = dict(dataset=str(tmp_path / 'data' / 'source_byte'), out_dir='.')
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir('here')
    door('train', **data)
    assert door('train', **data)['run_dir'] == str(tmp_path / 'here-2')


# ---------------------------------------------------------------------------------------------
# A run whose first steps are skipped


@pytest.mark.parametrize('name, settings', [
    ('train', {'optimizer': 'muon'}), ('chat', {'lora_rank': 2}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('train', {}), ('train', {'arch': 'lstm'}), ('chat', {}),
        ('classify', {'layers': 'head'}), ('dpo', {'lora_rank': 2})))])
def test_skipped_from_the_beginning(door, name, settings, monkeypatch):
    """It is saved without a state of its optimizer, and goes on as if it had not been stopped."""
    real, calls = Learner.update, []

    def overflowing(learner, sums, *args):
        calls.append(1)
        scale = float('inf') if len(calls) <= bad else 1.0
        return real(learner, [x * scale for x in sums], *args)
    monkeypatch.setattr(Learner, 'update', overflowing)
    found = {}
    for out_dir, parts in (('out/whole', [6]), ('out/cut', [1, 6])):
        bad = 3
        calls.clear()
        for last in parts:
            run = door.cut if last == 1 else door
            run(name, out_dir=out_dir, micro_batch_size=4, **settings)
        folder = Path(out_dir) / 'step-00000006'
        found[out_dir] = {n: t for kind in ('model', 'optimizer')
                          for _, n, t in models.read_tensors(folder, kind)}
        assert len(read_log(out_dir, 'skip')) == 3
    whole, cut = found.values()
    assert whole.keys() == cut.keys() and any('/' in n for n in whole)
    assert all(torch.equal(t, cut[n]) for n, t in whole.items())


def test_a_parameter_that_had_no_gradient_yet(tmp_path, door):
    """An expert that no token has come to, or a head that is not used yet, has no state; the others
    have theirs."""
    run = door.cut('train', optimizer='muon')
    model, tokenizer, state = models.load_run(str(run))
    batch = torch.arange(32)[None]
    found = []
    for stopped in (False, True):
        model = build_model(model.config, 1)
        learn = lambda: train.optim.make_optimizers(model, 'muon', 1e-2, 0.1)
        optimizers = learn()
        for step in range(3):
            model(batch, batch).backward()
            if step < 2:
                model.ln_f.weight.grad = model.h['0'].mlp.up_proj.weight.grad = None
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if step == 1 and stopped:
                folder = tmp_path / 'out' / 'partly'
                folder.mkdir()
                (folder / 'log.jsonl').touch()
                saver = checkpoint.Saver(folder)
                saver.save(model, optimizers, tokenizer, state | {'step': 2})
                saver.finish(2)
                model = build_model(model.config, 2)
                optimizers = learn()
                models.load_weights(model, folder, 2)
                models.load_optimizers(model, optimizers, folder, 2)
        found.append({**checkpoint.model_tensors(model),
                      **checkpoint.optimizer_tensors(model, optimizers)})
    assert found[0].keys() == found[1].keys() and 'ln_f.weight/exp_avg' in found[0]
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())
