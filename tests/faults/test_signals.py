"""SIGTERM, SIGUSR1, Ctrl-C: all ranks agree on a step, save it and exit with 0."""
import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from harness import (
    ROOT,
    Ranks,
    assert_clean,
    assert_same,
    finished,
    json_lines,
    last_step,
    note,
)

import train
from core.run import checkpoint
from core.run.log import read_log

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Steps of about 0.1 s, and evaluations of seconds.
SETTINGS = dict(batch_size=64, micro_batch_size=4, block_size=64, n_embd=64, eval_interval=6,
                save_interval=4, max_steps=100, dropout=0.1)


@pytest.fixture(scope='module')
def long_text(tmp_path_factory):
    """Source code of 400,000 characters, so that an evaluation takes a while."""
    path = tmp_path_factory.mktemp('long') / 'long.txt'
    files = sorted(Path(argparse.__file__).parent.glob('*.py'))
    text = ''.join(file.read_text(encoding='utf-8', errors='ignore') for file in files)
    path.write_text(text.encode('ascii', 'ignore').decode()[:400_000])
    return path


def time_parts(train, rank) -> None:
    """Let rank 0 write down how long each step, evaluation and save takes."""
    def timed(what, real):
        def call(*args, **options):
            began = time.perf_counter()
            result = real(*args, **options)
            if rank == 0:
                with open('times', 'a') as f:
                    f.write(f'["{what}", {time.perf_counter() - began}]\n')
            return result
        return call
    train.train_step = timed('step', train.train_step)
    train.evaluate = timed('evaluation', train.evaluate)
    save = checkpoint.Saver.save

    def save_whole(self, *args, **options):
        save(self, *args, **options)
        self.wait()
    checkpoint.Saver.save = timed('save', save_whole)


def signal_at_random(folder, tries, rng, **settings) -> list[float]:
    """Stop the run out/cut `tries` times, in a step, an evaluation or a save; the delays in s."""
    run, delays = Path(folder) / 'out/cut', []
    for i in range(tries):
        begun = last_step(run)
        ranks = Ranks(folder, 2, out_dir='out/cut', **settings)
        phase = ('step', 'evaluation', 'save')[i % 3]
        if phase == 'step':
            ready = ranks.wait_for(lambda: last_step(run) > begun)
        elif phase == 'evaluation':
            ready = ranks.wait_for(lambda: last_step(run) > begun and last_step(run) % 6 == 0)
        else:
            ready = ranks.wait_for(lambda: list(run.glob('.tmp-step-*')))
        assert ready, ranks.text()[-2000:]
        if phase != 'save':
            time.sleep(rng.uniform(0, 0.2))
        number, targets = rng.choice(SIGNALS), rng.choice([[0], [1], [0, 1]])
        began = time.monotonic()
        ranks.send(number, targets)
        assert ranks.wait(60) == [0, 0], ranks.text(0)[-2000:] + ranks.text(1)[-2000:]
        delays.append(time.monotonic() - began)
        stopped = int(re.search(r'stopped after step (\d+)', ranks.text())[1])
        assert stopped == last_step(run) == checkpoint.steps(run)[-1]
        assert_clean(run)
    return sorted(delays)


def check_signals(tmp_path, text, tries) -> None:
    settings = dict(SETTINGS, dataset=str(text), max_steps=8 + 6 * tries)
    delays = signal_at_random(tmp_path, tries, random.Random(0), **settings)
    finished(tmp_path, 2, out_dir='out/cut', **settings)
    finished(tmp_path, 2, out_dir='out/whole', inject=time_parts, **settings)
    assert_same(tmp_path / 'out/whole', tmp_path / 'out/cut')
    times = json_lines(tmp_path / 'times')
    step, evaluation, save = (max(s for what, s in times if what == part)
                              for part in ('step', 'evaluation', 'save'))
    p99 = delays[min(len(delays) - 1, int(0.99 * len(delays)))]
    # 0.5 s: a process that leaves its group and its interpreter
    assert p99 < step + save + 0.5 and evaluation > step + save
    note('SIGTERM, SIGUSR1 or SIGINT to one rank or both of two, in a step, an evaluation or a '
         'save', tries, f'exit status 0, the same step saved, goes on bitwise equal; gone after at '
         f'most {p99:.2f} s (step {step:.2f}, save {save:.2f}, evaluation {evaluation:.1f} s)')


def test_signals(tmp_path, long_text):
    check_signals(tmp_path, long_text, 2)

@pytest.mark.slow
def test_thirty_signals(tmp_path, long_text):
    check_signals(tmp_path, long_text, 30)


@pytest.mark.parametrize('number', [
    SIGNALS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS[1:])])
def test_second_signal(tmp_path, long_text, number):
    """It ends the process at once, wherever it is; what was saved is there."""
    run = tmp_path / 'out/a'
    ranks = Ranks(tmp_path, dataset=str(long_text), out_dir='out/a',
                  **{**SETTINGS, 'batch_size': 1000, 'save_interval': 1})
    assert ranks.wait_for(lambda: checkpoint.steps(run)), ranks.text()[-2000:]
    ranks.send(number)
    time.sleep(0.7)
    began = time.monotonic()
    ranks.send(number)
    assert ranks.wait(20) == [128 + number]
    assert time.monotonic() - began < 1
    assert f'{number.name}: ends after this step and a checkpoint' in ranks.text()
    assert checkpoint.damage(checkpoint.step_folder(run, checkpoint.steps(run)[-1])) == ''
    note('a second signal', 1, 'ends at once with 128 + its number')


def start_train(folder, *launcher, output=subprocess.PIPE, **settings) -> subprocess.Popen:
    """train.py as a user starts it, in a session of its own; its output may go to a file."""
    flags = [f'--{key}={value}' for key, value in {**TINY, **settings}.items()]
    return subprocess.Popen([*launcher, ROOT / 'train.py', *flags], cwd=folder, text=True,
                            stdout=output, stderr=subprocess.STDOUT,
                            start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def wait_for_step(run, process, step=1) -> None:
    end = time.monotonic() + 60
    while last_step(run) < step:
        assert process.poll() is None and time.monotonic() < end, \
            (process.communicate()[0] or '')[-2000:]
        time.sleep(0.01)


def test_ctrl_c_at_the_command_line(tmp_path, text_file):
    run = tmp_path / 'out/a'
    process = start_train(tmp_path, sys.executable, dataset=text_file, out_dir='out/a',
                          max_steps=100_000, eval_interval=100_000)
    wait_for_step(run, process)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and 'Traceback' not in text
    assert 'SIGINT: ends after this step and a checkpoint; once more: at once' in text
    assert re.search(r'stopped after step \d+, which is saved in out/a; the same command goes on',
                     text)
    assert read_log(run, 'end') == []


@pytest.mark.slow
@pytest.mark.parametrize('number', SIGNALS)
def test_signal_to_torchrun(tmp_path, text_file, number):
    """It hands the signal on to its processes, which save; its own exit status is 1."""
    run = tmp_path / 'out/a'
    process = start_train(tmp_path, sys.executable, '-m', 'torch.distributed.run',
                          '--nproc_per_node=2', f'--master_port={30100 + os.getpid() % 400}',
                          '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1',
                          dataset=text_file, out_dir='out/a', max_steps=100_000,
                          eval_interval=100_000)
    wait_for_step(run, process)
    os.kill(process.pid, number)
    text = process.communicate(timeout=60)[0]
    stopped = int(re.search(r'stopped after step (\d+)', text)[1])
    assert checkpoint.steps(run)[-1] == stopped and process.returncode == 1
    assert_clean(run)
    note('a signal to torchrun', 1, 'its processes save and exit with 0')


def test_signal_in_the_last_sample(run_train, monkeypatch):
    """The run is not finished then; the same command writes the sample and ends it."""
    whole = run_train(out_dir='out/whole')['run_dir']
    real = train.make_sample

    def sample(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'make_sample', sample)
        assert run_train(out_dir='out/cut')['stopped']
    assert read_log('out/cut', 'end') == []
    assert run_train(out_dir='out/cut')['run_dir'] == 'out/cut'
    assert_same(whole, 'out/cut')
    assert [e['sample'] for e in read_log('out/cut', 'end')] == [
        e['sample'] for e in read_log(whole, 'end')]
