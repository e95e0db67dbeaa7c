"""SIGKILL at any time: the run goes on as if nothing had happened."""
import itertools
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from harness import Ranks, assert_clean, assert_same, finished, last_step, note

import train
from core.run import checkpoint
from core.run.log import read_log

LONG = dict(eval_interval=40, save_interval=8, optimizer='muon', dropout=0.1)


class Killed(BaseException):
    """Nothing in the source catches it, as nothing catches SIGKILL."""


class Inline:
    """A thread that works at once, so that its end is the run's end."""

    def __init__(self, target, name, args):
        self.start = lambda: target(*args)
        self.join = lambda: None


def kill_at_random(folder, world, kills, rng, **settings) -> tuple[int, int, int, int]:
    """Kill the run out/cut `kills` times, every second time inside a save, then let it finish.

    Returns how many kills hit, how many of them inside a save, and the most steps lost outside and
    inside of one.
    """
    run, hits, inside, lost_outside, lost_inside = Path(folder) / 'out/cut', 0, 0, 0, 0
    while hits < kills:
        ranks = Ranks(folder, world, out_dir='out/cut', **settings)
        assert ranks.wait_for(lambda: 'step/s' in ranks.text()), ranks.text()[-2000:]
        if hits % 2:
            part = rng.choice(['', 'model.safetensors', 'optimizer.safetensors', 'state.json',
                               'manifest.json'])
            ranks.wait_for(lambda: list(run.glob(f'.tmp-step-*/{part}')))
        else:
            time.sleep(rng.uniform(0, 0.5))
        assert ranks.alive(), 'the run must be longer for so many kills'
        ranks.kill()
        hits += 1
        saving = bool(list(run.glob('.tmp-step-*')))
        inside += saving
        lost = last_step(run) - max(checkpoint.steps(run), default=0)
        if saving:
            lost_inside = max(lost_inside, lost)
        else:
            lost_outside = max(lost_outside, lost)
    finished(folder, world, out_dir='out/cut', **settings)
    return hits, inside, lost_outside, lost_inside


def check_kills(tmp_path, text_file, world, kills, compiled, label) -> None:
    settings = dict(LONG, dataset=str(text_file), compile=compiled, max_steps=100 + 30 * kills)
    finished(tmp_path, world, out_dir='out/whole', **settings)
    hits, inside, lost_outside, lost_inside = kill_at_random(
        tmp_path, world, kills, random.Random(world), **settings)
    assert_same(tmp_path / 'out/whole', tmp_path / 'out/cut')
    assert_clean(tmp_path / 'out/cut')
    interval = settings['save_interval']
    assert lost_outside <= interval and lost_inside <= 2 * interval
    note(f'SIGKILL, {label}', hits,
         f'weights, optimizer state and log bitwise those of an uninterrupted run; {inside} hit a '
         f'save; at most {lost_outside} steps lost outside of one (saves are {interval} apart), '
         f'{lost_inside} inside')


def test_killed_once(tmp_path, text_file):
    check_kills(tmp_path, text_file, 1, 1, False, '1 process, eager')


@pytest.mark.slow
@pytest.mark.parametrize('world', [1, 2])
@pytest.mark.parametrize('compiled', [False, True])
def test_killed_fifty_times(tmp_path, text_file, world, compiled):
    label = f'{world} process{"es" * (world > 1)}, {"compiled" if compiled else "eager"}'
    check_kills(tmp_path, text_file, world, 50, compiled, label)


def killed_at(monkeypatch, target, name, number, before=True):
    """Let call `number` of target.name raise Killed, before or after its work."""
    real, calls = getattr(target, name), []

    def call(*args, **options):
        calls.append(1)
        if before and len(calls) == number:
            raise Killed
        result = real(*args, **options)
        if len(calls) == number:
            raise Killed
        return result
    monkeypatch.setattr(target, name, call)


def test_killed_within_an_epoch_and_at_its_boundary(run_train, monkeypatch):
    """27,000 tokens in batches of 32 x 32: epochs of 26.4 steps; batch 26 is of both."""
    settings = dict(max_steps=60, batch_size=32, eval_interval=100, save_interval=1, dropout=0.1)
    run_train(out_dir='out/whole', **settings)
    at = 0
    for kill in (5, 13, 21, 26, 27):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.threading, 'Thread', Inline)
            killed_at(patch, train, 'train_step', kill - at + 1)
            with pytest.raises(Killed):
                run_train(out_dir='out/cut', **settings)
        at = kill
        assert checkpoint.steps('out/cut')[-1] == kill
    run_train(out_dir='out/cut', **settings)
    assert_same('out/whole', 'out/cut')
    assert [e['step'] for e in read_log('out/cut', 'resume')] == [5, 13, 21, 26, 27]
    note('killed 3 times within an epoch, 2 times at its boundary', 5, 'bitwise equal')


@pytest.mark.parametrize('name', [
    pytest.param('fsync', marks=pytest.mark.slow), 'rename', 'mkdir'])
def test_killed_between_any_two_steps_of_a_save(run_train, monkeypatch, name):
    """Everything ends before or after each call of fsync, rename, ... in the second save."""
    settings = dict(max_steps=8, eval_interval=4, save_interval=2, dropout=0.1)
    whole = run_train(out_dir='out/whole', **settings)['run_dir']
    first, last = {'fsync': (9, 16), 'rename': (2, 2), 'mkdir': (4, 4)}[name]
    tries = 0
    for number in range(first, last + 1):
        for before in (True, False):
            run = f'out/cut-{number}-{before}'
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint.threading, 'Thread', Inline)
                killed_at(patch, os, name, number, before)
                with pytest.raises(Killed):
                    run_train(out_dir=run, **settings)
            tries += 1
            assert run_train(out_dir=run, **settings)['run_dir'] == run
            assert_same(whole, run)
            assert_clean(run)
    note('killed before or after any fsync, rename or mkdir of a save', tries,
         'bitwise equal, nothing left behind')


@pytest.mark.parametrize('target, name', [
    pytest.param(os, 'rename', marks=pytest.mark.slow), pytest.param(
        shutil, 'rmtree', marks=pytest.mark.slow),
    pytest.param(os, 'fsync', marks=pytest.mark.slow)])
def test_killed_while_a_step_is_saved_again(run_train, monkeypatch, target, name):
    """A signal cut an evaluation short; resumed, its step is saved anew, with the evaluation."""
    settings = dict(max_steps=6, eval_interval=3, dropout=0.1)
    whole = run_train(out_dir='out/whole', **settings)['run_dir']
    tries = 0
    for number, before in itertools.product(range(1, 12), (True, False)):
        run = f'out/cut-{number}-{before}'
        with monkeypatch.context() as patch:
            real = train.train_step
            patch.setattr(train, 'train_step',
                          lambda *args: real(*args)._replace(asked=args[2] == 2))
            assert run_train(out_dir=run, **settings)['stopped']
        assert checkpoint.read_state(run, 3)['evaluated'] < 3
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.threading, 'Thread', Inline)
            killed_at(patch, target, name, number, before)
            try:
                run_train(out_dir=run, **settings)
                break       # fewer calls than that
            except Killed:
                tries += 1
        assert run_train(out_dir=run, **settings)['run_dir'] == run
        assert_same(whole, run)
        assert_clean(run)
    assert tries >= 2
    note('killed while a step is saved for the second time', tries,
         'bitwise equal, nothing left behind')
