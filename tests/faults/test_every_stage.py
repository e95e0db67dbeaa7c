"""A full disk, kills, two at once, and a clock that is set back, in the stages beside train.py."""
import functools
import itertools
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import TUNED
from harness import Ranks, assert_same, limit_file_size, note

from core.run.log import events

SHORT = {**TUNED, 'max_steps': 4, 'eval_interval': 2}
STAGES = ('evaluate', 'prepare', 'finetune', 'classify', 'dpo', 'hf', 'gguf')


def the_first(*names: str) -> list:
    """Names of stages; all but the first are slow."""
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


@pytest.fixture
def settings(chats, texts, preferences, base, text_file, tmp_path):
    """Of each stage; what it makes is `made`."""
    (tmp_path / 'questions.jsonl').write_text(
        ''.join(f'{{"question": "{i} is", "choices": ["one", "a fish"], "label": 0}}\n'
                for i in range(60)))
    found = {
        'prepare': dict(dataset=str(text_file), name='it'),
        'finetune': dict(run_dir=base, dataset=str(chats), answers=0, out_dir='out/it', **SHORT),
        'classify': dict(run_dir=base, dataset=str(texts), out_dir='out/it', **SHORT),
        'dpo': dict(run_dir=base, dataset=str(preferences), out_dir='out/it', **SHORT),
        'evaluate': dict(run_dir=base, tasks='questions.jsonl', device='cpu', threads=1),
        'hf': dict(stage='export', run_dir=base, export_dir='out/it'),
        'gguf': dict(stage='export', run_dir=base, to='gguf', export_dir='out/it')}
    return {name: {'stage': name, **one} for name, one in found.items()}


def made(name: str, folder: Path) -> list[str]:
    """What a stage has made, and what it has left lying about."""
    where = {'prepare': folder / 'data', 'evaluate': folder / 'out/base'}.get(name, folder / 'out')
    found = {path.relative_to(folder).as_posix() for path in where.rglob('*') if path.is_file()}
    return sorted(path for path in found if name in ('prepare', 'evaluate') or 'base' not in path)


def fill_disk(script, rank):
    limit_file_size(3000)


@pytest.mark.parametrize('name', the_first(*STAGES))
def test_full_disk(tmp_path, settings, name):
    """One line says what could not be written; the same command succeeds when there is room."""
    if name == 'gguf':
        pytest.importorskip('gguf')
    before = made(name, tmp_path)
    cut = Ranks(tmp_path, inject=fill_disk, **settings[name])
    codes, text = cut.wait(120), cut.text()
    assert 'Traceback' not in text and codes == [2], text[-2000:]
    assert len(re.findall('^error: ', text, re.M)) == 1 and 'File too large' in text, text[-2000:]
    whole = {path for path in made(name, tmp_path) if not Path(path).name.startswith('.')}
    if name in ('evaluate', 'hf', 'gguf'):
        assert whole <= {*before}
    again = Ranks(tmp_path, **settings[name])
    assert again.wait(120) == [0], again.text()[-2000:]
    note('a full disk in prepare, finetune, classify, dpo, evaluate, export', 1, 'one line, status '
         '2; the same command succeeds when there is room')


def kill_at(n: int, script, rank):
    """The process kills itself at its n-th rename, fsync, mkdir or unlink."""
    calls = itertools.count(1)

    def count(real):
        def call(*args, **options):
            if next(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return call
    for name in ('rename', 'replace', 'fsync', 'mkdir', 'unlink'):
        setattr(os, name, count(getattr(os, name)))


def contents(name: str, folder: Path) -> dict[str, bytes]:
    """What a stage has made, without the seconds that it took."""
    return {path: re.sub(rb'"seconds": [0-9.e-]+', b'', (folder / path).read_bytes())
            for path in made(name, folder) if not path.endswith(('.png', '.lock'))}


@pytest.mark.parametrize('name', the_first('gguf', 'hf', 'evaluate', 'prepare'))
def test_killed_at_any_change_of_a_file(tmp_path, settings, name):
    """What has its name is whole, and the same command makes the same."""
    if name == 'gguf':
        pytest.importorskip('gguf')
    folder, before = tmp_path / 'whole', tmp_path / 'cut'
    for place in (folder, before):
        shutil.copytree(tmp_path, place, ignore=lambda *_: ['whole', 'cut'])
    whole = Ranks(folder, **settings[name])
    assert whole.wait(120) == [0], whole.text()[-2000:]
    expected, names = contents(name, folder), {path.name for path in folder.rglob('*')}
    for n in itertools.count(1):
        cut = Ranks(before, inject=functools.partial(kill_at, n), **settings[name])
        code, = cut.wait(120)
        found = contents(name, before)
        assert all(expected[path] == data for path, data in found.items()
                   if not path.split('/')[1].startswith('.') and '.part' not in path), n
        if code != -signal.SIGKILL:     # the kill before may have come when all was done
            assert code == 0 or 'is there already' in cut.text(), cut.text()[-2000:]
            break
    assert n > 2 and contents(name, before) == expected
    assert {path.name for path in before.rglob('*')} <= {*names, 'output-0'}
    note(f'SIGKILL before each rename, fsync, mkdir and unlink of {name}', n - 1, 'what has its '
         'name is whole; the same command makes the same, and leaves nothing else')


@pytest.mark.parametrize('name', the_first('evaluate', 'hf', 'prepare'))
def test_two_at_once(tmp_path, settings, name):
    """Both succeed, or one says in a line why not; what is made is what one alone makes."""
    folders = [tmp_path / place for place in ('alone', 'one', 'two')]
    for place in folders:
        shutil.copytree(tmp_path, place, ignore=lambda *_: ['alone', 'one', 'two'])
    for part in ('out', 'data'):    # the two share these
        shutil.rmtree(folders[2] / part)
        (folders[2] / part).symlink_to(folders[1] / part)
    alone, *two = [Ranks(folder, **settings[name]) for folder in folders]
    codes = [code for ranks in (alone, *two) for code in ranks.wait(120)]
    for code, ranks in zip(codes[1:], two):
        said = ranks.text()
        assert 'Traceback' not in said and code in (0, 2), said[-2000:]
        assert len(re.findall('^error: ', said, re.M)) == code // 2, said[-2000:]
    assert codes[0] == 0 and 0 in codes[1:]
    assert contents(name, folders[1]) == contents(name, folders[0])
    note('two of export, evaluate, prepare at once', 1, 'both succeed, or one says in a line why '
         'not; nothing is mixed')


def set_clock_back(script, rank):
    """Each look at the clock of the wall finds it an hour earlier."""
    began, hours = time.time(), itertools.count()
    time.time = lambda: began - 3600 * next(hours)


@pytest.mark.slow
def test_clock_set_back(tmp_path, settings):
    """A run ends as it does otherwise: its seconds come from a clock that only goes forward."""
    for place, inject in (('one', None), ('two', set_clock_back)):
        shutil.copytree(tmp_path, tmp_path / place, ignore=lambda *_: ['one', 'two'])
        ranks = Ranks(tmp_path / place, inject=inject, **settings['finetune'])
        assert ranks.wait(120) == [0], ranks.text()[-2000:]
    runs = [tmp_path / place / 'out/it' for place in ('one', 'two')]
    assert_same(*runs)
    seconds = [e['seconds'] for e in events(runs[1]) if 'seconds' in e]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    note('the clock is set back by hours, again and again', 1, 'as without it')
