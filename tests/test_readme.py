"""Every command of the README and of docs/ runs (shortened), and what they say about themselves is
true."""
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_script

import prepare
from core.data import named
from core.data.build import build
from core.formats import hf
from core.net.weights import build_model
from core.text.tokenizer import gpt2
from model import GPTConfig

ROOT = Path(prepare.__file__).parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in (
    ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md')))
    if path.name != 'LOG.md'}
README = PAGES['README.md']
MIRROR = os.environ.get('DATA_MIRROR') and os.path.abspath(os.environ['DATA_MIRROR'])


def blocks(page: str) -> list[str]:
    """The blocks of code on a page, a line that goes on after a backslash joined with the next."""
    found = re.findall(r'^```\w*\n(.*?)^```', page, flags=re.M | re.S)
    return [re.sub(r' *\\\n *', ' ', block) for block in found]


def is_diff(block: str) -> bool:
    return block.startswith('--- a/')


def commands(block: str) -> list[str]:
    """Its commands but for those that need what is not here: a peer's source, a real model (see
    test_smollm2.py), for some a text; a server never ends (see test_serve.py)."""
    return [line for line in block.splitlines()
            if re.match(r'(echo .*\| )?(python|torchrun) ', line)
            and '--vs=' not in line and 'smol' not in line and 'serve.py' not in line
            and (MIRROR or not re.search(
                r'gpt2|austen|_bpe|=bpe|tune/\w+(?<!_python)\.py|out/spam', line))]


# A diff is an edit of the source, and the block that follows has the commands that try it. Those of
# docs/chain.md run in tests/test_chain.py.
BLOCKS = [block for name, page in PAGES.items() if name != 'docs/chain.md'
          for block in ['', *blocks(page)]]
EDITS = [(a, commands(b)) for a, b in itertools.pairwise(BLOCKS) if is_diff(a)]
COMMANDS = [line for a, b in itertools.pairwise(BLOCKS) if not is_diff(a) and not is_diff(b)
            for line in commands(b)]

# What makes a stage short enough for a test.
SHORT = {
    'train.py': '--max_steps=2 --eval_interval=2 --eval_tokens=512 --compile=False --threads=1 '
                '--sample_tokens=5 --batch_size=2 --block_size=256 --device=cpu --max_minutes=0',
    'finetune.py': '--max_steps=2 --eval_interval=2 --batch_size=2 --device=cpu --threads=1',
    'classify.py': '--max_steps=2 --eval_interval=2 --batch_size=2 --device=cpu --threads=1',
    'dpo.py': '--max_steps=2 --eval_interval=2 --batch_size=2 --max_records=40 --device=cpu '
              '--threads=1',
    'evaluate.py': '--max_items=2 --max_new_tokens=3 --device=cpu --threads=1',
    'sample.py': '--max_new_tokens=5 --device=cpu --threads=1',
    'bench.py': '--rounds=1 --steps=1 --warmup=1 --batch_size=1 --compile=False --threads=1',
    'bench_data.py': '--corpus_mb=1',
    'bench_tokenizer.py': '--corpus_mb=1 --n_tokens=300 --rounds=1',
    'prepare.py': '', 'plan.py': '', 'export.py': '',   # short as they are
}

# The second chain from a base model to an assistant, and what takes long or is much like others.
SECOND = re.compile(r'laptop.py --dataset=austen|tune/(sft|dpo|spam)\.py|out/(spam|sft) |'
                    r'shakespeare_best|out/two|out/four|tune/dpo_gpt2')


def once(lines: list[str]) -> list[str]:
    """The first of those commands that differ in the values of settings only."""
    found = {}
    for line in lines:
        found.setdefault(re.sub(r'(--\w+)=("[^"]*"|\S+)', r'\1', line), line)
    return list(found.values())


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
    """Run a command of a page with what makes its stage short."""
    stage = re.search(r'(\w+\.py)', command)[1]
    short = SHORT[stage]
    if stage == 'finetune.py':
        short += ' --answers=1 --answer_tokens=3 --max_records=40'
    piped, _, words = command.rpartition(' | ')     # echo "..." | python ...
    program, *words = shlex.split(f'{words} {short}')
    if program == 'torchrun':
        port = 29900 + os.getpid() % 90
        done = subprocess.run([sys.executable, '-m', 'torch.distributed.run',
                               f'--master_port={port}', *words], cwd=folder, timeout=300,
                              capture_output=True, text=True)
    else:
        done = run_script(words, folder, ''.join(shlex.split(piped)[1:]))
    assert done.returncode == 0, f'{command}\n{done.stderr[-2000:]}'


def test_quick_start_is_two_commands():
    first, second = (block.strip() for block in blocks(README) if 'requirements' in block)
    assert first.endswith('pip install -r requirements.txt && '
                          'python train.py config/shakespeare.py')
    assert second.endswith('pip install -r requirements-dev.txt && python -m pytest')
    for line in (first, second):
        assert line.startswith('python3 -m venv .venv && . .venv/bin/activate && ')
        assert '\n' not in line
    for part in ('python train.py config/shakespeare.py', 'python -m pytest'):
        assert any(line.endswith(part) and len(line) <= 80 for line in README.splitlines())


@pytest.mark.parametrize('runs', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('edit', EDITS, ids=lambda edit: edit[0].split()[1])
def test_worked_edit(folder, tmp_path, edit, runs):
    """The diff applies as it stands, and what is said to follow runs (that of an edit outside
    of model.py is slow). There are five."""
    diff, lines = edit
    assert lines and len(EDITS) == 5
    copy = shutil.copytree(folder, tmp_path / 'copy')
    done = subprocess.run(['patch', '-p1'], input=diff, text=True, cwd=copy, check=True,
                          capture_output=True)
    assert 'offset' not in done.stdout and 'fuzz' not in done.stdout, done.stdout
    for line in lines:
        if runs != diff.startswith('--- a/model.py'):
            run(line, copy)


def test_ci_runs_the_test_command():
    """Word for word what stands in the README."""
    found = re.search(r'^test_command=.*?\)$', (ROOT / '.ci/run').read_text(), re.M | re.S)[0]
    said = subprocess.run(['bash', '-ec', f'{found}\necho "$test_command"'], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout
    assert said.strip() in [block.strip() for block in blocks(README)]


@pytest.mark.parametrize('where', ['README.md', *(
    pytest.param(where, marks=pytest.mark.slow) for where in ('docs', 'second chain'))])
def test_commands(folder, where):
    """In their order, since each may use what those before it made. None has a placeholder. Those
    that only docs/ has, and those in SECOND, are slow."""
    assert len(COMMANDS) > 8
    lines = once(['python train.py config/shakespeare.py', *COMMANDS])      # the quick start's end
    if where == 'second chain':
        lines = [line for line in lines if SECOND.search(line)]
    else:
        shown = '\n'.join(blocks(README))
        lines = [line for line in lines if not SECOND.search(line)
                 and (where == 'docs' or line in shown)]
    for command in lines:
        run(command, folder)


def test_readme_fits():
    lines = README.splitlines()
    assert len(lines) <= 220
    assert all(len(line) <= 120 for line in lines if not line.startswith('|'))


@pytest.mark.parametrize('page', PAGES)
def test_files_that_it_names_exist(page):
    """Sources by their name, or their place below the project or config/; and links, with the
    heading that they point at."""
    for name in re.findall(r'`((?:\w+/)*\w+\.py)[`:]', PAGES[page]):
        assert any([*ROOT.glob(name), *ROOT.glob(f'config/{name}'), *ROOT.glob(f'core/**/{name}')
                    ]) or name.startswith('config/NAME'), name
    for name in re.findall(r'`((?:cluster|config|core|data|dev|docs|tests)/[\w/.-]+)`',
                           PAGES[page]):
        assert (ROOT / name).exists() or name.startswith(('data/', 'config/NAME')), name
    for target in re.findall(r'\]\(([^)\s]+)\)', PAGES[page]):
        place, _, heading = target.partition('#')
        path = (ROOT / page).parent / place if place else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r'^#+ (.*)$', path.read_text(encoding='utf-8'), re.M)
            assert heading in [re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
                               for title in titles], target


def test_presets_of_the_readme_are_those_of_the_whole_table():
    rows = re.findall(r'^\| (?:`\w+`|bare .*?) \| [\d,]+ \| [\d,.]+ \| [\d,]+ \|', README, re.M)
    assert len(rows) == 6 and all(f'\n{row}\n' in PAGES['docs/training.md'] for row in rows)


def test_lines_to_touch_are_there():
    """Each name in CONTRIBUTING's table of places occurs in a file of its row."""
    page = PAGES['CONTRIBUTING.md']
    table = page[page.index('| what | lines to touch |'):page.index('What a change must come with')]
    rows = table.splitlines()[2:-1]
    assert len(rows) > 10
    for row in rows:
        files = [name for name in re.findall(r'`([\w/]+\.py)`', row) if 'NAME' not in name]
        source = ''.join((ROOT / name).read_text(encoding='utf-8') for name in files)
        for name in re.findall(r'`([A-Za-z_.]+)`', row):
            if not name.endswith('.py') and files:
                assert all(re.search(rf'\b{part}\b', source) for part in name.split('.')), name
