"""Every command of the README runs (shortened), and what it says about itself is true."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import prepare
from core.data import named
from core.data.build import build
from core.formats import hf
from core.net.weights import build_model
from core.text.tokenizer import gpt2
from model import GPTConfig

ROOT = Path(prepare.__file__).parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```\w*\n(.*?)^```', README, flags=re.M | re.S)
MIRROR = os.environ.get('DATA_MIRROR') and os.path.abspath(os.environ['DATA_MIRROR'])
# Those that compare with a peer need its source, which is not here; some need more than one text.
COMMANDS = [line for block in BLOCKS for line in block.splitlines()
            if re.match(r'(echo .*\| )?(python|torchrun) ', line) and '--vs=' not in line
            and (MIRROR or not re.search(r'gpt2|austen|_bpe|=bpe|tune/\w+(?<!_python)\.py|out/spam',
                                         line))]

# What makes a stage short enough for a test.
SHORT = {
    'train.py': '--max_steps=2 --eval_interval=2 --eval_tokens=512 --compile=False --threads=1 '
                '--sample_tokens=5 --batch_size=2 --block_size=256 --device=cpu --max_minutes=0',
    'finetune.py': '--max_steps=2 --eval_interval=2 --batch_size=2 --device=cpu --threads=1',
    'classify.py': '--max_steps=2 --eval_interval=2 --batch_size=2 --device=cpu --threads=1',
    'dpo.py': '--max_steps=2 --eval_interval=2 --batch_size=2 --max_records=40 --device=cpu '
              '--threads=1',
    'sample.py': '--max_new_tokens=5 --device=cpu --threads=1',
    'bench.py': '--rounds=1 --steps=1 --warmup=1 --batch_size=1 --compile=False --threads=1',
    'bench_data.py': '--corpus_mb=1',
    'bench_tokenizer.py': '--corpus_mb=1 --n_tokens=300 --rounds=1',
    'prepare.py': '', 'plan.py': '', 'export.py': '',   # short as they are
}

SECOND = re.compile(r'laptop.py --dataset=austen|tune/(sft|dpo|spam)\.py|out/(spam|sft) ')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A copy of the source where `shakespeare` is a small text that is there already."""
    folder = tmp_path_factory.mktemp('readme')
    for path in [*ROOT.glob('*.py'), *ROOT.glob('c*/**/*.py'), *ROOT.glob('dev/*.py')]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    text = 'ROMEO:\nTo be, or not to be? Once upon a time. JULIET!\n' * 100
    (folder / 'data' / 'downloads').mkdir(parents=True)
    (folder / 'shakespeare.txt').write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for name, file in (('shakespeare', folder / 'shakespeare.txt'),
                           ('python', Path(re.__file__))):
            patch.setitem(named.RECIPES, name, named.RECIPES[name]._replace(
                files=lambda downloads, max_files, file=file: ([file], [])))
            build(name, str(folder / 'data'))
    (folder / 'my_novels').mkdir()
    (folder / 'my_novels' / 'one.txt').write_text(text)
    if MIRROR:  # a small stand-in for the model of that name, with GPT-2's own tokenizer
        os.environ['DATA_MIRROR'] = MIRROR
        tok = gpt2(folder / 'data' / 'downloads')
        hf.save(build_model(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=256,
                                      vocab_size=len(tok))), tok, folder / 'gpt2')
    return folder


def run(command: str, folder) -> None:
    """Run a command of the README with what makes its stage short."""
    command = command.replace('python ', f'{shlex.quote(sys.executable)} ', 1)
    launcher = f'{shlex.quote(sys.executable)} -m torch.distributed.run '
    command = command.replace('torchrun ', launcher +
                              f'--master_port={29900 + os.getpid() % 90} ', 1)
    stage = re.search(r'(\w+\.py)', command)[1]
    short = SHORT[stage]
    if stage == 'finetune.py':
        short += ' --answers=1 --answer_tokens=3 --max_records=40'
    done = subprocess.run(f'{command} {short}', shell=True, cwd=folder, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('second', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_commands(folder, second):
    """In their order, since each may use what those before it made; those that use nothing beside
    them. None has a placeholder. The second chain from a base model to an assistant is slow."""
    assert len(COMMANDS) > 8
    commands = ['python train.py config/shakespeare.py', *COMMANDS]     # the quick start's end
    commands = [command for command in commands if bool(SECOND.search(command)) == second]
    lanes = [[c for c in commands if bool(re.search(r'(prepare|bench\w*|plan)\.py', c)) == alone]
             for alone in (False, True)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda lane: [run(command, folder) for command in lane], lanes))


@pytest.mark.parametrize('diff', [block for block in BLOCKS if block.startswith('--- a/')])
def test_worked_edit(folder, tmp_path, diff):
    copy = shutil.copytree(folder, tmp_path / 'copy')
    done = subprocess.run(['patch', '-p1'], input=diff, text=True, cwd=copy, check=True,
                          capture_output=True)
    assert 'offset' not in done.stdout and 'fuzz' not in done.stdout, done.stdout
    name = 'unicode_names' if 'unicode_names' in diff else 'shakespeare'
    run(f'python train.py config/shakespeare.py --dataset={name}', copy)


def test_quick_start_is_two_lines():
    block = next(block for block in BLOCKS if 'requirements.txt' in block)
    first, second = block.splitlines()
    assert first.endswith('pip install -r requirements.txt && '
                          'python train.py config/shakespeare.py')
    assert second.endswith('pip install -r requirements-dev.txt && python -m pytest')
    for line in (first, second):
        assert line.startswith('python3 -m venv .venv && . .venv/bin/activate && ')


def test_files_that_it_names_exist():
    for name in re.findall(r'`([\w/]+\.py)`', README):
        found = [*ROOT.glob(name), *ROOT.glob(f'config/{name}'), *ROOT.glob(f'core/**/{name}')]
        assert found, name
