"""Every command of the README runs (shortened), and what it says about itself is true."""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import prepare

ROOT = Path(prepare.__file__).parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```\w*\n(.*?)^```', README, flags=re.M | re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()
            if re.match(r'(DATA_MIRROR=\S+ )?(echo .*\| )?(python|torchrun) ', line)]

# What makes a stage short enough for a test.
SHORT = {
    'train.py': '--max_steps=2 --eval_interval=2 --eval_tokens=512 --compile=False --threads=1 '
                '--sample_tokens=5 --batch_size=2 --micro_batch_size=1 --max_minutes=0 --device=cpu',
    'sample.py': '--max_new_tokens=5 --device=cpu --threads=1',
    'bench.py': '--rounds=1 --steps=1 --warmup=1 --batch_size=1 --compile=False --threads=1',
    'prepare.py': '',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A copy of the source where `shakespeare` is a small text that is there already."""
    folder = tmp_path_factory.mktemp('readme')
    for path in [*ROOT.glob('*.py'), *ROOT.glob('c*/*.py')]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    text = 'ROMEO:\nTo be, or not to be? Once upon a time.\n' * 100
    (folder / 'data').mkdir()
    meta = {'name': 'shakespeare', 'about': 'a test', 'licence': 'none', 'source': 'a test',
            'tokenizer': 'char', 'val_fraction': 0.1, 'sha256': '0' * 64}
    prepare.write_dataset(folder / 'data' / 'shakespeare', [prepare.Document('', text)], meta, 10 ** 6)
    (folder / 'my_novels').mkdir()
    (folder / 'my_novels' / 'one.txt').write_text(text)
    (folder / 'novel.txt').write_text(text)
    return folder


def shortened(command: str) -> str:
    stage = re.search(r'(\w+\.py)', command)[1]
    command = command.split(' #')[0].strip()
    command = command.replace('--nproc_per_node=8', '--nproc_per_node=2')
    command = re.sub(r'^(.*\| )?python', rf'\1{shlex.quote(sys.executable)}', command)
    command = re.sub(r'^torchrun', f'{shlex.quote(sys.executable)} -m torch.distributed.run '
                                   '--master_port=29471', command)
    return f'{command} {SHORT[stage]}'


@pytest.mark.parametrize('command', COMMANDS)
def test_command(folder, command):
    done = subprocess.run(shortened(command), shell=True, cwd=folder, capture_output=True, text=True,
                          timeout=300)
    if 'not part of the test' in command or '<' in command:
        pytest.fail(f'a command with a placeholder cannot be tested: {command}')
    assert done.returncode == 0, done.stderr[-2000:]


def test_quick_start_is_two_lines():
    block = next(block for block in BLOCKS if 'requirements.txt' in block)
    first, second = block.splitlines()
    assert first.endswith('pip install -r requirements.txt && python train.py config/shakespeare.py')
    assert second.endswith('pip install -r requirements-dev.txt && python -m pytest')
    for line in (first, second):
        assert line.startswith('python3 -m venv .venv && . .venv/bin/activate && ')


def test_stage_table_and_config_names_exist():
    for name in re.findall(r'`((?:config/|core/)?\w+\.py)`', README):
        assert (ROOT / name).is_file() or (ROOT / 'config' / name).is_file(), name
