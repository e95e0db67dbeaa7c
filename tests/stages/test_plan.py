"""plan.py and the presets: what each states is what it is."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import stopped

import plan
import train
from core.net.weights import build_model
from model import count_parameters

ROOT = Path(__file__).parents[2]
PRESETS = sorted(path.stem for path in ROOT.glob('config/*.py'))


def test_all_presets_are_there():
    wanted = {'gpt2_medium', 'gpt2_large', 'gpt2_xl', 'continue_gpt2', '125m', '1b', '3b', '7b',
              '70b', 'shakespeare_gpu', 'shakespeare_bpe', 'austen', 'python', 'laptop'}
    assert wanted <= set(PRESETS)


@pytest.fixture(scope='module')
def printed():
    """What `python plan.py` prints, in a process of its own."""
    done = subprocess.run([sys.executable, ROOT / 'plan.py'], cwd=ROOT, capture_output=True,
                          text=True, check=True, timeout=120)
    return done.stdout


@pytest.mark.parametrize('name', ['gpt2', *PRESETS])
def test_figures_are_those_in_the_comments(printed, name):
    """Parameters, FLOPs per token, tokens per step: one line, in the output and in the preset."""
    line = plan.line(json.loads(printed.splitlines()[-1])[name])
    assert f'\n{name}\n  {line}' in f'\n{printed}'
    source = ROOT / ('train.py' if name == 'gpt2' else f'config/{name}.py')
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
