"""plan.py and the presets: what each states is what it is."""
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from conftest import stopped
from forked import run_script

import plan
import train
from core.net.weights import build_model
from core.settings import Stop, configure, read_settings, settings_of
from model import count_parameters

ROOT = Path(__file__).parents[2]
PRESETS = sorted(path.stem for path in (*ROOT.glob('config/*.py'),
                                        *ROOT.glob('config/scaling/*.py'))
                 if not path.stem.startswith('planned_'))


def test_all_presets_are_there():
    wanted = {'gpt2_medium', 'gpt2_large', 'gpt2_xl', 'continue_gpt2', '125m', '1b', '3b', '7b',
              '70b', 'shakespeare_gpu', 'shakespeare_bpe', 'austen', 'python', 'laptop'}
    assert wanted <= set(PRESETS)


@pytest.fixture(scope='module')
def printed():
    """What `python plan.py` prints, in a process of its own."""
    done = run_script([str(ROOT / 'plan.py')], ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('name', ['gpt2', *PRESETS])
def test_figures_are_those_in_the_comments(printed, name):
    """Parameters, FLOPs per token, tokens per step: one line, in the output and in the preset."""
    line = plan.line(json.loads(printed.splitlines()[-1])[name])
    assert f'\n{name}\n  {line}' in f'\n{printed}'
    source = ROOT / ('train.py' if name == 'gpt2' else f'config/{name}.py')
    source = source if source.exists() else ROOT / f'config/scaling/{name}.py'
    assert f'\n{line}\n' in source.read_text(encoding='utf-8')


@pytest.mark.parametrize('name', ['gpt2', *PRESETS])
def test_figures_are_those_in_the_docs(printed, name):
    found = json.loads(printed.splitlines()[-1])[name]
    label = 'bare `train.py`: GPT-2' if name == 'gpt2' else f'`{name}`'
    assert (f'\n| {label} | {found["parameters"]:,} | {found["flops_per_token"] / 1e6:,.2f} | '
            f'{found["tokens_per_step"]:,} |\n') in (ROOT / 'docs/training.md').read_text()


@pytest.mark.parametrize('name, about', [
    ('gpt2', 124e6), ('gpt2_medium', 355e6), ('gpt2_large', 774e6), ('gpt2_xl', 1558e6),
    ('125m', 125e6), ('1b', 1e9), ('3b', 3e9), ('7b', 7e9), ('70b', 70e9),
    ('shakespeare_gpu', 10.7e6), ('austen', 15.7e6)])
def test_sizes_are_what_the_names_promise(printed, name, about):
    found = json.loads(printed.splitlines()[-1])[name]['parameters']
    assert abs(found - about) <= 0.015 * about


def test_gpt2_by_hand():
    """12 blocks of 12 C^2 weights and 13 C others, tables, a norm; 6 N + 12 L C T."""
    found = plan.figures(plan.load_preset([]))
    C, V, T = 768, 50304, 1024
    assert found['parameters'] == 12 * (12 * C * C + 13 * C) + V * C + T * C + 2 * C
    assert found['flops_per_token'] == 6 * (12 * 12 * C * C + V * C) + 12 * 12 * C * T
    assert found['tokens_per_step'] == 480 * 1024
    assert found['flops'] == found['flops_per_token'] * found['tokens'] == \
        found['flops_per_token'] * 20_000 * 480 * 1024


def test_it_is_what_training_builds(run_train, tmp_path):
    """The same parameters and FLOPs that the log of a run states."""
    run_dir = run_train(tokenizer='bpe', vocab_size=400, max_steps=1)['run_dir']
    start = json.loads(Path(run_dir, 'log.jsonl').read_text().splitlines()[0])
    words = [f'--{name}={value}' for name, value in start['settings'].items()
             if name in ('n_layer', 'n_head', 'n_embd', 'norm', 'position', 'mlp', 'qk_norm',
                         'tied', 'bias', 'vocab_size', 'tokenizer', 'block_size', 'batch_size')]
    found = plan.figures(plan.load_preset(words))
    assert found['parameters'] == start['parameters']
    assert found['flops_per_token'] == start['flops_per_token']


def test_depth():
    config = plan.preset_config(plan.load_preset(['--depth=6']))
    assert (config.n_layer, config.n_head, config.n_embd) == (6, 6, 384)
    assert count_parameters(build_model(config, None, 'meta')) == \
        plan.figures(plan.load_preset(['--depth=6']))['parameters']


def test_presets_do_not_touch_each_other():
    before = plan.load_preset([]).n_layer
    plan.load_preset([str(ROOT / 'config' / '7b.py')])
    assert train.n_layer == plan.load_preset([]).n_layer == before


def test_gpt2_by_name_needs_no_download():
    train = plan.load_preset([str(ROOT / 'config' / 'continue_gpt2.py'), '--init_from=gpt2-xl'])
    assert plan.figures(train)['parameters'] == \
        plan.figures(plan.load_preset([str(ROOT / 'config' / 'gpt2_xl.py')]))['parameters']


def test_bad_input(capsys):
    for words, part in ((['config/none.py'], 'no such config file'), (['--n_layers=3'], 'n_layer'),
                        (['--n_layer=0'], 'n_layer=0'), (['--tokenizer=wat'], 'tokenizer=wat'),
                        (['--dataset=my.txt'], 'dataset=my.txt'),
                        (['--init_from=out/none'], 'init_from=out/none')):
        assert part in stopped(capsys, lambda words=words: plan.figures(plan.load_preset(words)))


# ---------------------------------------------------------------------------------------------
# Wishes


@pytest.fixture
def run_plan(monkeypatch, tmp_path, capsys):
    """plan.py with such words on its command line, in a folder of its own; its result and what it
    printed."""
    before = settings_of(vars(plan))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        vars(plan).update(before)
        train_settings = read_settings(ROOT / 'train.py')
        monkeypatch.setattr(sys, 'argv', ['plan.py', *words])
        configure(vars(plan), list(words), also=train_settings)
        result = plan.main(train_settings)
        return result, capsys.readouterr().out
    yield run
    vars(plan).update(before)


def refused(capsys, run) -> str:
    """The message of a stop, one line of an error, after what a plan has said so far."""
    with pytest.raises(Stop) as e:
        run()
    err = capsys.readouterr().err
    assert e.value.code == 2 and err == f'error: {e.value.message}\n' and err.count('\n') == 1
    return e.value.message


def test_a_size_on_gpus(run_plan, tmp_path):
    """7B on 64 H100: balanced tokens, a time that is FLOPs / (GPUs x peak x MFU), and layouts."""
    found, said = run_plan('--params=7b', '--gpus=64', '--gpu=h100')
    assert found['parameters'] == pytest.approx(7e9, rel=0.03)
    assert found['tokens'] / found['parameters'] == pytest.approx(20, rel=0.1)
    steps = found['tokens'] / found['tokens_per_step']
    assert found['hours'] == pytest.approx(steps * found['seconds_per_step'] / 3600)
    least = found['flops'] / (64 * 989e12 * 0.36) / 3600      # at the stated MFU alone
    assert least <= found['hours'] < 1.1 * least
    assert found['dollars'] == pytest.approx(64 * found['hours'] * 2.7)
    assert found['layout']['zero'] in (2, 3) and found['bytes'] < 80e9
    assert 'approach 1' in said and 'DDP around tensor parallelism' in said
    assert json.loads(said.splitlines()[-1]) == found
    for name in ('loss', 'memory'):
        assert (tmp_path / f'out/planned_6_99b/{name}.png').stat().st_size > 10_000


def test_time_and_money_are_kept(run_plan):
    one = '--tp=1', '--pp=1', '--zero=3'     # one layout, since here all would be the same
    found, _ = run_plan('--gpus=8', '--hours=24', '--gpu=a100', *one)
    assert 23 < found['hours'] <= 24.5
    found, _ = run_plan('--params=7b', '--hours=100', '--gpu=h100', *one)
    assert 50 < found['hours'] <= 100
    found, said = run_plan('--budget=900', *one)
    assert 850 < found['dollars'] <= 900 and 'pays from' in said
    found, _ = run_plan('--flops=1e20', '--gpus=8', '--block_size=512', *one)
    assert found['flops'] == pytest.approx(1e20, rel=0.03)
    found, said = run_plan('--params=1b', '--gpus=8', '--batch_size=16', *one)
    assert found['tokens_per_step'] == 16 * 4096 and found['tokens'] > 20e9
    found, _ = run_plan('--target_loss=2.6', '--gpus=1', *one)
    assert found['parameters'] < 1e9


def test_a_preset_on_gpus(run_plan):
    found, _ = run_plan(str(ROOT / 'config/7b.py'), '--gpus=64', '--gpu=a100', '--price=2')
    assert found['tokens'] == 33_000 * 4_194_304
    assert found['dollars'] == pytest.approx(128 * found['hours'])


def test_a_corpus_of_its_own(run_plan, tmp_path, text_file, capsys):
    """Its vocabulary, its number of tokens; repeated, and refused where it is too small."""
    drawn, words = random.Random(0), text_file.read_text().split()
    (tmp_path / 'mine.txt').write_text(' '.join(drawn.choices(words, k=300_000)))
    done = run_script([str(ROOT / 'prepare.py'), 'mine.txt', '--tokenizer=byte'], tmp_path)
    assert done.returncode == 0, done.stderr
    data, = (path.parent for path in tmp_path.glob('data/*/meta.json'))
    meta = json.loads((data / 'meta.json').read_text())
    found, said = run_plan(f'--data={data}', '--gpus=1')
    assert found['tokens'] <= 4 * meta['train_tokens'] and 'each read 4.0 times' in said
    again, _ = run_plan(f'--data={data.name}', f'--data_dir={data.parent}', '--gpus=1')
    assert again['tokens'] == found['tokens']
    assert 'too few for' in refused(capsys, lambda: run_plan(f'--data={data}', '--params=1000'))
    message = refused(capsys, lambda: run_plan(f'--data={data}', '--params=100m', '--tokens=2b'))
    assert f'of which 2B are {2e9 / meta["train_tokens"]:,.0f} readings' in message


@pytest.mark.parametrize('words, message', [
    ('--gpus=8 --hours=1 --params=70b', 'gpus=8, hours=1: enough for 27.1M tokens with 70B'),
    ('--gpu=h900 --params=7b', 'gpu=h900: is not known; choose one of b200'),
    ('--params=70b --gpus=1', 'gpus=1: no layout of 70.1B parameters fits H100s of 80 GB'),
    ('--params=7b --gpus=6 --tp=3 --zero=2', 'tp=3: must divide n_head=32'),
    ('--params=7b --gpus=8 --tp=3', 'gpus=8: cannot be divided into groups of 3 x 1 (tp x pp)'),
    ('--params=7bb', 'params=7bb: must be a number from 1 to 1e+16, such as 125m'),
    ('--params=-3', 'params=-3: must be a number from 1'),
    ('--hours=3', 'hours=3: on how many GPUs? Give --gpus'),
    ('--gpus=8', 'give what you wish: --params=7b'),
    ('--target_loss=1.5', 'target_loss=1.5: no number of tokens leads there; the law ends at'),
    ('--target_loss=2 --gpus=8 --hours=1', 'target_loss=2: takes 2.'),
    ('--params=7b --tokens=1t --gpus=8 --hours=24', 'gpus=8, hours=24: 7B parameters and 1T'),
    ('--params=7b --n_layer=3', 'n_layer=3: follows from what you wish; leave it out'),
    ('--params=7b --depth=3', 'depth=3: follows'), ('--params=7b --name=a/b', 'name=a/b: must be'),
    ('--params=1e17', 'params=1e17: must be a number from 1 to 1e+16'),
    ('--params=7b --optimizer=adam', 'optimizer=adam: must be one of'),
    (f'{ROOT}/config/1b.py --gpus=8 --optimizer=adam', 'optimizer=adam: must be one of'),
    ('--params=10 --gpus=1', '10 parameters: too few for a vocabulary of'),
    ('--params=7b --gpus=8 --replicas=3 --zero=2', 'replicas=3: must divide the 8 data-parallel'),
    ('--params=7b --name=-x', 'name=-x: must be'),
    ('--params=7b --block_size=-1', 'block_size=-1: must be at least 1'),
    ('--laptop --threads=-1', 'threads=-1: must be at least 0'),
    ('--laptop --batch_size=-1', 'batch_size=-1: must be at least 1'),
    ('--laptop --budget=3', 'budget: with --laptop only'),
    ('--gpus=8 --hours=1e7', 'hours=10000000.0: must be at least 0 and at most 1000000.0'),
    ('--params=7b --gpus=8 --hours=1e-300', 'hours=1e-300: must be 0.01 at least'),
    ('--params=1e16 --gpus=8', 'asks for 1.0e+16 parameters'),
    ('--params=1e14 --gpus=8', 'more than a GPT of 32,768 channels has'),
    ('--params=7b --tokens=100b --target_loss=1.9', 'target_loss=1.9: 7B parameters and 100B'),
    ('--params=1b --gpus=8 --dtype=float32', 'dtype=float32: plans are for'),
    ('--params=7b --gpus=100000', 'give a larger --batch_size, or fewer --gpus'),
    ('--params=7b --gpus=12 --write', 'gpus=12: files are for whole machines of 8'),
    ('--mfu=1.5 --params=7b', 'mfu=1.5: must be at least 0 and at most 1'),
    ('--data=nowhere', "dataset 'nowhere': not prepared yet"),
    ('fitt', 'fitt: unexpected word'), ('fit', 'give run directories'),
    ('fit out/nowhere', 'out/nowhere: is no run'),
    ('--param=7b', "--param=7b: no setting named 'param', did you mean 'params'?"),
])
def test_wishes_that_cannot_be(run_plan, capsys, words, message):
    assert message in refused(capsys, lambda: run_plan(*words.split()))


def test_lstm_is_refused(run_plan, capsys):
    preset = str(ROOT / 'config/shakespeare_lstm.py')
    assert 'arch=lstm: plans are for GPTs' in stopped(capsys, lambda: run_plan(preset, '--gpus=1'))


def test_a_preset_and_a_wish_contradict(run_plan, capsys):
    assert 'leave one of the two out' in stopped(capsys, lambda: run_plan(
        str(ROOT / 'config/7b.py'), '--params=7b'))


def test_laptop(run_plan, capsys):
    """The machine is measured; the plan is for the time that is given."""
    found, said = run_plan('--laptop', '--hours=0.1', '--device=cpu')
    assert 0 < found['rate'] < 1.5 * found['matmul_rate'] and 'measured; 6.0 minutes' in said
    assert 10_000 < found['parameters'] < 30e6 and found['bytes'] < 8e9


def test_written_files_are_what_was_planned(run_plan, monkeypatch, tmp_path):
    """The config gives the model, the tokens and the layout of the plan; the same again is no
    error, another plan of that name is one, and nothing of it is written."""
    for name in ('config', 'cluster'):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / 'train.py', tmp_path)
    monkeypatch.setattr(plan, 'ROOT', tmp_path)
    found, said = run_plan('--params=1b', '--gpus=16', '--write')
    name, = (path.stem for path in tmp_path.glob('config/planned_*.py'))
    assert f'written: config/{name}.py, cluster/{name}.yaml, cluster/{name}.sbatch' in said
    preset = plan.load_preset([str(tmp_path / f'config/{name}.py')])
    again = plan.figures(preset)
    assert {k: found[k] for k in again} == again
    assert {k: getattr(preset, k) for k in found['layout']} == found['layout']
    text = (tmp_path / f'config/{name}.py').read_text()
    assert f'\n{plan.line(again)}\n' in text and 'Bi et al. 2024' in text
    run_plan('--params=1b', '--gpus=16', '--write')
    with pytest.raises(SystemExit):
        run_plan('--params=1b', '--gpus=8', '--write', f'--name={name}')
    assert (tmp_path / f'config/{name}.py').read_text() == text


def test_a_preset_can_be_written(run_plan, monkeypatch, tmp_path):
    """With a name that Python could not import, and a layout that is not its own."""
    for name in ('config', 'cluster'):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / 'train.py', tmp_path)
    monkeypatch.setattr(plan, 'ROOT', tmp_path)
    found, _ = run_plan(str(ROOT / 'config/7b.py'), '--gpus=64', '--gpu=b200', '--write')
    preset = plan.load_preset([str(tmp_path / 'config/planned_7b.py')])
    again = plan.figures(preset)
    assert {k: found[k] for k in again} == again and found['tokens'] == 33_000 * 4_194_304
    for name, default in (('zero', 0), ('tp', 1), ('activation_checkpointing', False)):
        assert getattr(preset, name) == found['layout'].get(name, default)


def test_fit_of_logs(run_plan, tmp_path):
    """Six logs of a known law: it is found, and drawn."""
    words = []
    for i in range(6):
        C = 1e12 * 4.0 ** i
        run = tmp_path / f'run{i}'
        run.mkdir()
        N = (C / 60) ** 0.5
        lines = [{'event': 'start', 'parameters': N, 'flops_per_token': 6 * N, 'identity': {
            'data': {'sha256': 'a'}, 'tokenizer': 't'}},
            {'event': 'eval', 'tokens': C / 6 / N, 'val_loss': 0.5 + 100 / C ** 0.2},
            {'event': 'end'}]
        (run / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
        words.append(str(run))
    found, said = run_plan('fit', *words, f'--flops={1e12 * 4 ** 6}')
    [(C, loss, low, high)] = found['predictions']
    assert loss == pytest.approx(0.5 + 100 / C ** 0.2, rel=1e-3) and low <= loss <= high
    assert found['constants']['exponent of C'][0] == pytest.approx(0.2, rel=1e-2)
    assert (tmp_path / 'out/fit/law.png').exists() and '95% intervals' in said
