"""Disks that are full or fail: a save is lost, the run is not."""
import contextlib
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, wait_for_saving
from harness import ROOT, assert_clean, assert_same, last_step, limit_file_size, note

import train
from core.run import checkpoint
from core.run.log import Log, events
from core.settings import Stop

SURVIVED = 'warning, old ones intact, temporary removed, training goes on, later saves succeed'
SETTINGS = dict(max_steps=12, eval_interval=100, save_interval=2, dropout=0.1)


def between_steps(monkeypatch, first, last, break_it, mend_it) -> None:
    """Call break_it() before step `first`, mend_it() before step `last`; no save is under way."""
    real = train.train_step

    def step(*args, **options):
        if args[2] in (first, last):
            wait_for_saving()
        if args[2] == first:
            break_it()
        if args[2] == last:
            mend_it()
        return real(*args, **options)
    monkeypatch.setattr(train, 'train_step', step)


def note_steps(monkeypatch, run) -> dict:
    """Which checkpoints there are when the next save begins, by the last step until then."""
    found, real = {}, checkpoint.Saver.wait

    def wait(self):
        real(self)
        found[last_step(run)] = checkpoint.steps(run)
    monkeypatch.setattr(checkpoint.Saver, 'wait', wait)
    return found


def check_survived(whole, run, err, found) -> None:
    """The saves of steps 6 and 8 failed with a warning, those after succeeded, training went on."""
    for step in (6, 8):
        assert f'warning: step-{step:08d} could not be written' in err
    assert 'step-00000010 could not' not in err
    assert found[8] == found[10] == [2, 4]       # as they were
    assert_same(whole, run)
    assert_clean(run)


def test_file_size_limit(run_train, monkeypatch, capsys):
    whole = run_train(out_dir='out/whole', **SETTINGS)['run_dir']
    found = note_steps(monkeypatch, 'out/cut')
    between_steps(monkeypatch, 5, 9, lambda: limit_file_size(50_000), lambda: limit_file_size(-1))
    try:
        run = run_train(out_dir='out/cut', **SETTINGS)['run_dir']
    finally:
        limit_file_size(-1)
    check_survived(whole, run, capsys.readouterr().err, found)
    note('file-size limit below a checkpoint, lifted later', 2, SURVIVED)


@pytest.mark.parametrize('target, name', [(os, 'fsync'), (os, 'rename'), (os, 'mkdir'),
                                          (checkpoint.hf, 'save_file'), (checkpoint, 'file_hash')])
@pytest.mark.parametrize('code', [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)])
def test_errors_of_the_disk(run_train, monkeypatch, capsys, target, name, code):
    """Injected where a save calls the system."""
    whole = run_train(out_dir='out/whole', **SETTINGS)['run_dir']
    found, real, broken = note_steps(monkeypatch, 'out/cut'), getattr(target, name), []

    def call(*args, **options):
        if broken:
            raise OSError(code, os.strerror(code))
        return real(*args, **options)
    monkeypatch.setattr(target, name, call)
    between_steps(monkeypatch, 5, 9, lambda: broken.append(1), broken.clear)
    run = run_train(out_dir='out/cut', **SETTINGS)['run_dir']
    check_survived(whole, run, capsys.readouterr().err, found)
    note('EIO or ENOSPC from fsync, rename, mkdir, write or hash', 2, SURVIVED)


def test_last_save_fails(run_train, monkeypatch, capsys):
    """The run is not finished then: the same command goes on, and it ends as it should."""
    whole = run_train(out_dir='out/whole', **SETTINGS)['run_dir']
    with monkeypatch.context() as patch:
        between_steps(patch, 11, -1, lambda: limit_file_size(50_000), None)
        try:
            with pytest.raises(Stop) as e:
                run_train(out_dir='out/cut', **SETTINGS)
        finally:
            limit_file_size(-1)
    assert e.value.message.startswith('the last step, 12, could not be saved; the last good '
                                      'checkpoint is out/cut/step-00000010; make room')
    del e
    assert_same(whole, run_train(out_dir='out/cut', **SETTINGS)['run_dir'])


def test_log_on_a_full_disk(tmp_path, capsys):
    """What could not be written to the log comes with a later event."""
    log = Log(tmp_path)
    log.write('step', step=1)
    limit_file_size((tmp_path / 'log.jsonl').stat().st_size + 3)
    try:
        for step in range(2, 500):
            log.write('step', step=step)
    finally:
        limit_file_size(-1)
    log.write('step', step=500)
    assert [e['step'] for e in events(tmp_path)] == list(range(1, 501))
    assert 'log.jsonl cannot be written now (File too large)' in capsys.readouterr().err


def test_full_tmpfs(tmp_path, text_file):
    """A disk of 8 MiB on which a file leaves no room, until it is deleted."""
    mount = tmp_path / 'out'
    mount.mkdir()
    try:
        subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'tmpfs', mount], check=True,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('this system does not let its users mount a tmpfs')
    settings = {**TINY, 'dataset': text_file, 'max_steps': 5000, 'eval_interval': 5000,
                'save_interval': 50, 'log_interval': 50}
    flags = [f'--{key}={value}' for key, value in settings.items()]
    script = 'mount -t tmpfs -o size=8m tmpfs out && exec "$@"'
    command = ['unshare', '-rm', 'sh', '-c', script, 'sh', sys.executable, ROOT / 'train.py']
    with open(tmp_path / 'output', 'w') as output:
        process = subprocess.Popen([*command, *flags, '--out_dir=out/run'], cwd=tmp_path,
                                   stdout=output, stderr=output)
    inside = Path(f'/proc/{process.pid}/root{mount}')

    def wait_for(condition):
        end = time.monotonic() + 60
        while not condition():
            assert process.poll() is None and time.monotonic() < end, \
                (tmp_path / 'output').read_text()[-1000:]
            time.sleep(0.01)

    def warnings():
        return (tmp_path / 'output').read_text().count('could not be written')

    try:
        wait_for(lambda: checkpoint.steps(inside / 'run'))
        with open(inside / 'filler', 'wb', buffering=0) as f, contextlib.suppress(OSError):
            while True:
                f.write(bytes(4096))
        wait_for(lambda: warnings() >= 2)
        kept = checkpoint.steps(inside / 'run')
        failures = warnings()
        (inside / 'filler').unlink()
        wait_for(lambda: checkpoint.steps(inside / 'run')[-1] > kept[-1] + 100)
        newest = checkpoint.steps(inside / 'run')[-1]
        assert checkpoint.damage(checkpoint.step_folder(inside / 'run', newest)) == ''
        process.terminate()
    finally:
        process.wait(30)
    assert process.returncode == 0
    text = (tmp_path / 'output').read_text()
    assert 'No space left on device' in text
    note('a tmpfs fills up, and is emptied later', failures, SURVIVED)
