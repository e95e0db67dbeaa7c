"""core/settings.py: the command line, config files, and the one way to stop."""
import errno
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import stopped
from tqdm import tqdm

import bench
import dpo
import export
import finetune
import plan
import prepare
import sample
import train
from core import settings
from core.settings import (
    Stop,
    check_bounds,
    check_choice,
    configure,
    read_settings,
    settings_of,
    stop,
    warn,
)

ROOT = Path(train.__file__).parent
CONFIGS = sorted((ROOT / 'config').glob('*.py'))

SOURCE = '''"""A fake stage.

Its second paragraph."""
import math
POSITIONAL = ('first', 'others')
CONFIG, FLAGS = '', ()
LIMIT = 10                  # a constant
_hidden = 3                 # not a setting
batch_size = 12             # sequences a step
learning_rate = 6e-4        # the peak # not the end
compile = True              # torch.compile
first = ''                  # a run
others = ''
pair = (1, 2)               # no setting either
long_one = ('a'
            'b')            # on its last line
more = 0                    # begins here
                            # and ends here

# a section
last = 0                    # alone


def helper():
    inside = 1              # not at module level
'''


def fake(**more) -> dict:
    """The globals of a script."""
    return {'__file__': 'stage.py', 'batch_size': 12, 'block_size': 64, 'learning_rate': 6e-4,
            'compile': False, 'out_dir': '', 'CONFIG': '', 'LIMIT': 10, '_private': 1,
            'pair': (1, 2), 'main': lambda: None, 'os': os, **more}


def config(tmp_path, text: str, name: str = 'tiny.py') -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def refused(capsys, *argv, **more) -> str:
    return stopped(capsys, lambda: configure(fake(**more), list(argv)))


# ---------------------------------------------------------------------------------------------
# The grammar


def test_flags_of_every_type():
    script = fake()
    configure(script, ['--batch_size=3', '--learning_rate=0.5', '--compile=true', '--out_dir=a=b'])
    assert (script['batch_size'], script['learning_rate']) == (3, 0.5)
    assert script['compile'] is True and script['out_dir'] == 'a=b'
    assert script['FLAGS'] == ('batch_size', 'learning_rate', 'compile', 'out_dir')


@pytest.mark.parametrize('text,value', [
    ('1e6', 1_000_000), ('1_000', 1000), ('-1', -1), ('2.0', 2), ('+3', 3), ('0x10', 16)])
def test_text_to_int(text, value):
    script = fake()
    configure(script, [f'--batch_size={text}'])
    assert script['batch_size'] == value and type(script['batch_size']) is int


@pytest.mark.parametrize('text,value', [('1', 1.0), ('3e-4', 3e-4), ('-0.5', -0.5), ('.5', 0.5)])
def test_text_to_float(text, value):
    script = fake()
    configure(script, [f'--learning_rate={text}'])
    assert script['learning_rate'] == value and type(script['learning_rate']) is float


@pytest.mark.parametrize('text,value', [
    ('=True', True), ('=true', True), ('=False', False), ('=false', False), ('', True)])
def test_text_to_bool(text, value):
    script = fake(compile=not value)
    configure(script, [f'--compile{text}'])
    assert script['compile'] is value and script['FLAGS'] == ('compile',)


@pytest.mark.parametrize('text', ['', '5', 'True', 'None', "'quoted'", 'out/a b', 'x.py'])
def test_text_stays_text(text):
    script = fake(out_dir='before')
    configure(script, [f'--out_dir={text}'])
    assert script['out_dir'] == text


def test_left_to_right_later_wins(tmp_path):
    a = config(tmp_path, 'batch_size = 5\nblock_size = 6\n', 'a.py')
    b = config(tmp_path, 'batch_size = 7\n', 'b.py')
    for argv, batch, name in (([a, '--batch_size=9'], 9, 'a'), (['--batch_size=9', a], 5, 'a'),
                              ([a, b], 7, 'b'), ([b, a], 5, 'a'),
                              (['--batch_size=8', '--batch_size=9'], 9, '')):
        script = fake()
        configure(script, argv)
        assert (script['batch_size'], script['CONFIG']) == (batch, name), argv
        assert script['block_size'] == (6 if a in argv else 64)


def test_config_and_flags_are_told(tmp_path):
    script = fake()
    configure(script, [])
    assert script['FLAGS'] == () and script['CONFIG'] == ''
    path = config(tmp_path, 'batch_size = 5\n')
    script = fake()
    configure(script, [path, '--batch_size=5', '--block_size=65', '--out_dir='])
    assert script['CONFIG'] == 'tiny'
    assert script['FLAGS'] == ('batch_size', 'block_size', 'out_dir')  # given, changed or not


def test_positional_words(tmp_path):
    names = {'POSITIONAL': ('first', 'others'), 'first': '', 'others': 'none'}
    path = config(tmp_path, 'batch_size = 5\n')
    for argv, first, others in (([], '', 'none'), (['a'], 'a', 'none'), (['a', 'b'], 'a', 'b'),
                                (['a', '--batch_size=5', 'b', path, 'c'], 'a', 'b,c')):
        script = fake(**names)
        configure(script, argv)
        assert (script['first'], script['others']) == (first, others), argv
    assert script['batch_size'] == 5 and script['CONFIG'] == 'tiny'
    script = fake(POSITIONAL=('out_dir',))
    configure(script, ['a', 'b', 'c'])
    assert script['out_dir'] == 'a,b,c'


def test_settings_of_another_script(tmp_path, capsys):
    """What `script` lacks goes to `also`, and every name belongs to one of the two."""
    script, also = fake(CONFIG=''), {'n_layer': 2, 'batch_size': 99, 'CONFIG': ''}
    path = config(tmp_path, 'n_layer = 3\nbatch_size = 5\n')
    configure(script, [path, '--block_size=7', '--n_layer=4'], also)
    assert (script['batch_size'], script['block_size'], 'n_layer' in script) == (5, 7, False)
    assert also == {'n_layer': 4, 'batch_size': 99, 'CONFIG': 'tiny', 'CONFIGS': [path],
                    'FLAGS': ('block_size', 'n_layer'),
                    'GIVEN': ('n_layer', 'batch_size', 'block_size', 'n_layer')}
    assert all(script[name] == also[name] for name in ('CONFIG', 'FLAGS', 'GIVEN'))
    assert "did you mean 'n_layer'?" in stopped(
        capsys, lambda: configure(script, ['--nlayer=4'], also))


def test_unexpected_word(capsys):
    message = refused(capsys, 'nothing')
    assert message.startswith('nothing: unexpected word; stage.py takes')
    assert '--help' in message


# ---------------------------------------------------------------------------------------------
# What is refused


def test_typos(capsys):
    assert refused(capsys, '--batchsize=3') == (
        "--batchsize=3: no setting named 'batchsize', did you mean 'batch_size'?")
    assert "did you mean 'batch_size'?" in refused(capsys, '--batch-size=3')
    assert "did you mean 'compile'?" in refused(capsys, '--compil')
    assert "no setting named 'zzz'; --help lists" in refused(capsys, '--zzz=1')
    assert "no setting named ''" in refused(capsys, '--')


@pytest.mark.parametrize('name', ['LIMIT', '_private', 'pair', 'main', 'os', '__file__'])
def test_what_is_no_setting_cannot_be_set(capsys, tmp_path, name):
    assert f'no setting named {name!r}' in refused(capsys, f'--{name}=1')
    if not name.startswith('_'):
        path = config(tmp_path, f'{name} = 1\n')
        assert f'{path}: {name}: no setting named {name!r}' in refused(capsys, path)


@pytest.mark.parametrize('word,kind,default', [
    ('--batch_size=True', 'int', '12'), ('--batch_size=many', 'int', '12'),
    ('--batch_size=1.5', 'int', '12'), ('--batch_size=nan', 'int', '12'),
    ('--batch_size=1e999', 'int', '12'), ('--batch_size=', 'int', '12'),
    ('--batch_size=[1]', 'int', '12'), ("--batch_size='3'", 'int', '12'),
    ('--learning_rate=nan', 'float', '0.0006'), ('--learning_rate=inf', 'float', '0.0006'),
    ('--learning_rate=-1e999', 'float', '0.0006'), ('--learning_rate=False', 'float', '0.0006'),
    ('--learning_rate=fast', 'float', '0.0006'), ('--learning_rate=1+1j', 'float', '0.0006'),
    ('--compile=1', 'bool', 'False'), ('--compile=yes', 'bool', 'False'),
    ('--compile=', 'bool', 'False')])
def test_wrong_type_of_a_flag(capsys, word, kind, default):
    message = refused(capsys, word)
    name = word[2:].partition('=')[0]
    assert message.startswith(f'{word}: {name} takes a')
    assert message.endswith(f' {kind} (default {default})')


def test_an_int_too_large_for_a_float(capsys):
    assert 'learning_rate takes a float' in refused(capsys, '--learning_rate=1' + '0' * 400)


def test_bare_flag_without_a_bool(capsys):
    assert refused(capsys, '--batch_size') == (
        '--batch_size: batch_size needs a value: write --batch_size=12')
    assert 'write --out_dir=...' in refused(capsys, '--out_dir')


# ---------------------------------------------------------------------------------------------
# Config files


def test_config_arithmetic_modules_and_private_names(tmp_path):
    path = config(tmp_path, 'import math\nimport os.path as p\n_width = 64\n'
                            'batch_size = 4 * _width\nblock_size = 1e3  # integral\n'
                            'learning_rate = 1\ncompile = batch_size > 1\n'
                            'out_dir = p.join("out", str(math.isqrt(16)))\n')
    script = fake()
    configure(script, [path])
    assert script['batch_size'] == 256 and script['block_size'] == 1000
    assert type(script['block_size']) is int and type(script['learning_rate']) is float
    assert script['compile'] is True and script['out_dir'] == 'out/4'
    assert script['_private'] == 1 and script['FLAGS'] == ()
    assert '_width' not in script and 'math' not in script


@pytest.mark.parametrize('line,part', [
    ('batchsize = 3', "batchsize: no setting named 'batchsize', did you mean 'batch_size'?"),
    ('batch_size = "3"', "batch_size='3': batch_size takes a"),
    ('batch_size = True', 'batch_size=True: batch_size takes a'),
    ('batch_size = 1.5', 'batch_size=1.5: batch_size takes a'),
    ('learning_rate = float("nan")', 'learning_rate=nan: learning_rate takes a float'),
    ('learning_rate = 1e999', 'learning_rate=inf: learning_rate takes a float'),
    ('compile = 1', 'compile=1: compile takes a bool'),
    ('out_dir = None', 'out_dir=None: out_dir takes a str'),
    ('out_dir = 5', 'out_dir=5: out_dir takes a str')])
def test_config_with_a_wrong_setting(capsys, tmp_path, line, part):
    path = config(tmp_path, f'block_size = 8\n{line}\n')
    message = refused(capsys, path)
    assert message.startswith(f'{path}: ') and part in message


def test_config_that_does_not_run(capsys, tmp_path):
    path = config(tmp_path, 'batch_size = 5\nblock_size = = 6\n')
    assert refused(capsys, path).startswith(f'{path}, line 2: invalid syntax')
    path = config(tmp_path, 'batch_size = 5\n\nblock_size = 1 // 0\n')
    assert refused(capsys, path).startswith(f'{path}, line 3: ZeroDivisionError: ')
    path = config(tmp_path, 'def f():\n    return unknown\n\nbatch_size = f()\n')
    assert refused(capsys, path).startswith(f'{path}, line 2: NameError: ')
    path = config(tmp_path, 'batch_size = 5\nimport no_such_module\n')
    assert refused(capsys, path).startswith(f'{path}, line 2: ModuleNotFoundError: ')


def test_config_error_names_the_line_of_the_config(capsys, tmp_path):
    """Also where the exception came from deep inside a library."""
    path = config(tmp_path, 'import json\n\nbatch_size = json.loads("{")\n')
    assert refused(capsys, path).startswith(f'{path}, line 3: JSONDecodeError: ')
    path = config(tmp_path, 'batch_size = 5\nraise ValueError("one\\ntwo")\n')
    assert refused(capsys, path).startswith(f'{path}, line 2: ValueError: one')


def test_missing_config(capsys, tmp_path, monkeypatch):
    config(tmp_path, 'batch_size = 5\n', 'shakespeare.py')
    path = str(tmp_path / 'shakespear.py')
    assert refused(capsys, path) == (
        f'{path}: no such config file, did you mean {tmp_path / "shakespeare.py"}?')
    monkeypatch.chdir(tmp_path)
    assert 'did you mean shakespeare.py?' in refused(capsys, 'shakspeare.py')
    (tmp_path / 'folder.py').mkdir()
    for path in ('nowhere/q.py', 'folder.py'):
        assert refused(capsys, path).startswith(f'{path}: no such config file')


RAN = 'raise SystemExit("it was run")\n'
DOORS = {'train': vars(train), 'finetune': vars(finetune), 'dpo': vars(dpo), 'bench': vars(bench)}


@pytest.mark.parametrize('text', [
    RAN, '', 'x = 5\n' + RAN, 'batch_size = 4\nmodel = 3\n' + RAN, 'class Net: pass\n' + RAN,
    'import torch\nprint(seed)\n' + RAN, 'for i in range(3): pass\nseed = 3\n' + RAN,
    'def main(): pass\n' + RAN, (ROOT / 'train.py').read_text(), (ROOT / 'sample.py').read_text(),
    (ROOT / 'core/net/optim.py').read_text(), (ROOT / 'model.py').read_text()],
    ids=lambda text: str(len(text)))
@pytest.mark.parametrize('door', [*DOORS, 'plan'])
def test_a_program_is_no_config(capsys, tmp_path, door, text):
    """It is refused by its name, and never run."""
    path = config(tmp_path, text)
    message = stopped(capsys, lambda: plan.load_preset([path]) if door == 'plan' else configure(
        DOORS[door].copy(), [path], also=vars(train).copy() if door == 'bench' else None))
    assert message.startswith(f'{path}: ') and 'it was not run' in message


@pytest.mark.parametrize('stage', [prepare, sample, export], ids=lambda stage: stage.__name__)
def test_python_files_are_data_where_no_config_is_taken(tmp_path, stage):
    script, name = vars(stage).copy(), stage.POSITIONAL[0]
    paths = [config(tmp_path, RAN, file) for file in ('a.py', 'b.py')]
    configure(script, paths)
    assert script[name] == ','.join(paths) and script['GIVEN' if name == 'dataset' else 'FLAGS'] \
        == ()


@pytest.mark.parametrize('text', [
    'from pathlib import Path\nfrom glob import *\n', 'def double(x): return 2 * x\n',
    'class Size:\n    wide = 3\n', 'import json, math\n', '_sizes = [i for i in range(3)]\n',
    'from pathlib import *\n'])
def test_what_a_config_imports_and_defines_is_its_own_affair(tmp_path, text):
    script = fake()
    configure(script, [config(tmp_path, text + 'batch_size = 4\n')])
    assert script['batch_size'] == 4 and script['GIVEN'] == ('batch_size',)


def test_a_class_is_no_value(capsys, tmp_path):
    path = config(tmp_path, 'from pathlib import Path as out_dir\n')
    assert 'out_dir takes a str' in refused(capsys, path)


@pytest.mark.parametrize('name, ours', [
    ('max_iters', 'max_steps'), ('lr', 'learning_rate'), ('min_lr', 'min_lr_fraction'),
    ('num_epochs', 'max_steps'), ('context_length', 'block_size'), ('n_ctx', 'block_size'),
    ('gradient_accumulation_steps', 'micro_batch_size'), ('d_model', 'n_embd'),
    ('max_grad_norm', 'grad_clip'), ('bf16', 'dtype'), ('logging-steps', 'log_interval')])
def test_names_of_other_programs(capsys, name, ours):
    message = stopped(capsys, lambda: configure(vars(train).copy(), [f'--{name}=5']))
    assert message.endswith(f'did you mean {ours!r}?')
    assert f'did you mean {ours!r}?' in stopped(capsys, lambda: plan.load_preset([f'--{name}']))


def test_one_dash_is_no_word(capsys):
    assert '-n=5: no setting named' in stopped(
        capsys, lambda: configure(vars(sample).copy(), ['out/base', '-n=5']))


@pytest.mark.parametrize('word, near', [
    ('shakespeare', 'config/shakespeare.py'), ('shakespear', 'config/shakespeare.py'),
    ('shakespeare.py', 'config/shakespeare.py'), ('sft', 'config/tune/sft.py'),
    ('configs/7b.py', 'config/7b.py')])
def test_a_preset_is_offered(capsys, monkeypatch, word, near):
    monkeypatch.chdir(ROOT)
    assert stopped(capsys, lambda: plan.load_preset([word])).endswith(f'did you mean {near}?')


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252', 'utf-8'])
def test_output_never_fails(monkeypatch, encoding):
    """Characters that the encoding lacks, file names that are not UTF-8, no stream at all."""
    found = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(found, encoding))
    monkeypatch.setattr(sys, 'stderr', None)
    configure(fake(), [])
    print('± 漢 caf\udce9', flush=True)
    tqdm.write('± 漢')
    warn('± 漢')
    with pytest.raises(Stop):
        stop('± 漢')
    with tqdm(total=2) as bar:
        bar.update()
    text = found.getvalue().decode(encoding)
    assert '\\udce9' in text and ('漢' if encoding == 'utf-8' else '\\u6f22') in text


def test_closed_output(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', None)
    configure(fake(), [])
    print('x')
    tqdm.write('x')


# ---------------------------------------------------------------------------------------------
# Checks and messages


def test_check_bounds(capsys):
    script = fake(dropout=0.5)
    check_bounds(script, batch_size=(12, 12), dropout=(0, 0.9), learning_rate=(None, None),
                 block_size=(1, None))
    for bounds, message in (
            ({'batch_size': (13, None)}, 'batch_size=12: must be at least 13'),
            ({'batch_size': (None, 11)}, 'batch_size=12: must be at most 11'),
            ({'block_size': (1, 64), 'dropout': (0, 0.4)},
             'dropout=0.5: must be at least 0 and at most 0.4')):
        assert stopped(capsys, lambda b=bounds: check_bounds(script, **b)) == message


def test_check_choice(capsys):
    script = fake(norm='layernorm')
    check_choice(script, norm=('layernorm', 'rmsnorm'), batch_size=(12,))
    assert stopped(capsys, lambda: check_choice(script, norm=('rmsnorm', 'none'))) == (
        'norm=layernorm: must be one of rmsnorm, none')


def test_stop_and_warn(capsys, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    assert stopped(capsys, lambda: stop('no such thing')) == 'no such thing'
    assert issubclass(Stop, SystemExit)
    warn('cropped')
    assert capsys.readouterr() == ('', 'warning: cropped\n')
    monkeypatch.setenv('RANK', '3')
    warn('cropped')
    with pytest.raises(Stop):
        stop('no such thing')
    assert capsys.readouterr().err == '[rank 3] error: no such thing\n'


def test_help(tmp_path, capsys):
    path = tmp_path / 'stage.py'
    path.write_text(SOURCE)
    script = runpy.run_path(str(path))
    before = dict(script)
    for flag in ('--help', '-h'):
        with pytest.raises(SystemExit) as e:
            configure(script, ['--batch_size=5', flag, '--nonsense'])
        assert e.value.code == 0
    assert script == before  # nothing is applied
    out, err = capsys.readouterr()
    assert err == '' and out.startswith('A fake stage.\n\nIts second paragraph.')
    lines = {line.split('=')[0].strip(): line for line in out.splitlines() if '--' in line}
    assert list(lines) == ['--batch_size', '--learning_rate', '--compile', '--first', '--others',
                           '--long_one', '--more', '--last']
    assert lines['--batch_size'].split() == ['--batch_size=12', 'sequences', 'a', 'step']
    assert '--learning_rate=0.0006' in lines['--learning_rate']
    assert lines['--learning_rate'].endswith('the peak # not the end')
    assert lines['--others'].strip() == '--others='
    assert lines['--long_one'].endswith('on its last line')
    assert f'begins here\n{"":36}and ends here\n\na section:\n  --last=0' in out


def test_comments_of_module_level_settings_only():
    groups, comments = settings.setting_comments(SOURCE)
    assert groups == {'last': 'a section'}
    assert comments['first'] == 'a run' and comments['LIMIT'] == 'a constant'
    assert 'inside' not in comments and 'others' not in comments


def test_settings_of():
    assert settings_of(fake(batch_size=None)) == {
        'block_size': 64, 'learning_rate': 6e-4, 'compile': False, 'out_dir': ''}


# ---------------------------------------------------------------------------------------------
# The real scripts


def test_the_real_train(capsys):
    script = vars(train).copy()
    configure(script, [str(ROOT / 'config' / 'shakespeare.py'), '--batch_size=32', '--eval_only'])
    assert script['CONFIG'] == 'shakespeare' and script['FLAGS'] == ('batch_size', 'eval_only')
    assert script['batch_size'] == 32 and script['eval_only'] is True
    assert script['dataset'] == 'shakespeare' and script['n_layer'] != train.n_layer
    assert train.CONFIG == '' and train.batch_size != 32
    message = stopped(capsys, lambda: configure(vars(train).copy(), ['--batchsize=3']))
    assert message == "--batchsize=3: no setting named 'batchsize', did you mean 'batch_size'?"


@pytest.mark.parametrize('stage', [prepare, train, sample], ids=lambda stage: stage.__name__)
def test_help_of_the_real_scripts(stage, capsys):
    with pytest.raises(SystemExit) as e:
        configure(vars(stage).copy(), ['--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith(stage.__doc__.splitlines()[0])
    assert set(getattr(stage, 'POSITIONAL', ())) <= set(settings_of(vars(stage)))
    for name, value in settings_of(vars(stage)).items():
        assert f'\n  --{name}={value}' in out
    assert len(out.splitlines()) >= len(settings_of(vars(stage)))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_preset_applies(path):
    script = vars(train).copy()
    before = settings_of(script)
    configure(script, [str(path)])
    after = settings_of(script)
    assert script['CONFIG'] == path.stem and after != before
    assert {name: type(value) for name, value in after.items()} == {
        name: type(value) for name, value in before.items()}


def test_interrupt_leaves_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    configure(fake(), [])
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err.startswith('\ninterrupted')
    sys.excepthook(ValueError, ValueError('other'), None)
    assert 'ValueError: other' in capsys.readouterr().err


def test_a_full_disk_leaves_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    configure(fake(), [])
    for name in ('out/a', None):
        with pytest.raises(Stop):
            sys.excepthook(OSError, OSError(errno.ENOSPC, 'No space left on device', name), None)
        assert capsys.readouterr().err == f'error: {name or "a file"}: No space left on device; ' \
            'make room, and give the same command again\n'
    sys.excepthook(OSError, OSError(errno.EINVAL, 'Invalid argument'), None)
    assert 'OSError: ' in capsys.readouterr().err


def test_importing_a_stage_does_no_work(tmp_path):
    """Nor does a subprocess with a wrong flag: one line, status 2."""
    def python(*words):
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1'}
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env=env,
                              capture_output=True, text=True)

    stages = sorted(path.stem for path in ROOT.glob('*.py'))
    done = python('-c', f'import {", ".join(stages)}')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    done = python(str(ROOT / 'prepare.py'), '--datset=x')
    message = "error: --datset=x: no setting named 'datset', did you mean 'dataset'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, '', message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('script, word', [
    ('finetune', 'sft'), ('classify', 'spam'), ('dpo', 'dpo_gpt2'), ('bench', 'shakespeare')])
def test_the_name_of_a_preset_alone(capsys, monkeypatch, script, word):
    """It is no run and no kind of benchmark: the preset's path is offered."""
    monkeypatch.chdir(ROOT)
    scope = read_settings(ROOT / f'{script}.py')
    also = read_settings(ROOT / 'train.py') if script == 'bench' else None
    message = stopped(capsys, lambda: configure(scope, [word], also=also))
    assert f'{word}.py?' in message and 'did you mean config/' in message


@pytest.mark.parametrize('word', ['/no/such/run', '[', 'a*/**b', '../out/none', '.'])
def test_a_word_is_no_pattern(monkeypatch, word):
    """Whatever a run is called, the name is taken, and the stage says what is wrong with it."""
    monkeypatch.chdir(ROOT)
    scope = read_settings(ROOT / 'classify.py')
    configure(scope, [word])
    assert scope['run_dir'] == word


def test_help_that_nobody_reads_to_its_end():
    done = subprocess.run(f'{sys.executable} train.py --help | head -1', shell=True, cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.stderr == '' and done.stdout.startswith('Pretraining')


@pytest.mark.parametrize('script, package', [
    ('train.py', 'torch'), ('sample.py', 'tiktoken'), ('dev/race.py', 'tqdm')])
def test_a_package_is_missing(tmp_path, script, package):
    """One line with the remedy, and no traceback."""
    (tmp_path / f'{package}.py').write_text(
        f'raise ModuleNotFoundError("No module named {package!r}", name={package!r})')
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, root / script], cwd=root, text=True, timeout=60,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 2 and done.stderr == (
        f'error: {package} is not installed: pip install -r requirements.txt, in the environment '
        'that runs this\n')


@pytest.mark.parametrize('raised, status, said', [
    ('open("/no/such/file")', 2, 'error: /no/such/file: No such file or directory\n'),
    ('raise MemoryError', 2, 'error: this machine has too little memory for that; give smaller '
     'sizes\n'), ('1 / 0', 1, 'Traceback ')])
def test_what_nobody_caught(raised, status, said):
    """Files and memory that lack are told in one line; what is a mistake of ours, with its place.
    """
    program = f'from core.settings import configure\nconfigure({{}}, [])\n{raised}'
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and done.stderr.startswith(said)


def test_values_that_nothing_can_take(capsys, tmp_path):
    assert 'takes an int of 64 bits' in refused(capsys, f'--batch_size={10 ** 30}')
    path = config(tmp_path, 'out_dir = "a\\0b"\n')
    assert "out_dir='a\\x00b': out_dir takes a str without NUL" in refused(capsys, path)
    with pytest.raises(Stop) as e:
        stop('a\nb\x1b[1m\u202e\ud800ü')
    assert e.value.message == 'a\\nb\\x1b[1m\\u202e\\ud800ü'
