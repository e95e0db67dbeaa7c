"""Ranks that die or hang, and other numbers of ranks after a resume."""
import json
import os
import re
import signal
import sys
import time

import pytest
from harness import Ranks, assert_same, finished, json_lines, last_step, note
from test_signals import start_train, wait_for_step

from core.run import checkpoint
from core.run.log import read_log

SETTINGS = dict(max_steps=100_000, eval_interval=100_000, save_interval=10)


def children(pid) -> list[int]:
    """The processes that a process has started."""
    with open(f'/proc/{pid}/task/{pid}/children') as f:
        return [int(word) for word in f.read().split()]


@pytest.mark.parametrize('victim', [0, 1])
def test_dead_rank(tmp_path, text_file, victim):
    """The others notice at once, say so, and end."""
    run = tmp_path / 'out/a'
    ranks = Ranks(tmp_path, 2, dataset=str(text_file), out_dir='out/a', **SETTINGS)
    assert ranks.wait_for(lambda: checkpoint.steps(run)), ranks.text()[-2000:]
    began = time.monotonic()
    ranks.send(signal.SIGKILL, [victim])
    codes = ranks.wait(30)
    assert codes[1 - victim] == 2 and codes[victim] == -9
    assert re.search(rf'\[rank {1 - victim}\] error: lost another of 2 ranks in step \d+ \(.*\); '
                     'so this one ends, and the same command resumes', ranks.text(1 - victim))
    assert 'Traceback' not in ranks.text(1 - victim)
    assert time.monotonic() - began < 10
    note('one of two ranks killed', 1, 'the other ends with a message within seconds')


def test_hung_rank(tmp_path, text_file):
    """The other waits for timeout_minutes."""
    run = tmp_path / 'out/a'
    ranks = Ranks(tmp_path, 2, dataset=str(text_file), out_dir='out/a', timeout_minutes=0.05,
                  **SETTINGS)
    assert ranks.wait_for(lambda: checkpoint.steps(run)), ranks.text()[-2000:]
    began = time.monotonic()
    ranks.send(signal.SIGSTOP, [1])
    ranks.ranks[0].join(30)
    waited = time.monotonic() - began
    ranks.send(signal.SIGCONT, [1])
    assert ranks.wait(30) == [2, 2]
    assert 2.5 < waited < 10
    assert re.search(r'error: heard nothing from another of 2 ranks in step \d+ \(', ranks.text())
    note('one of two ranks hangs, timeout_minutes=0.05', 1,
         f'the other ends with a message after {waited:.1f} s')


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_dead_or_hung_rank_under_torchrun(tmp_path, text_file, number):
    """All processes are gone in the end, the hung one too (torchrun waits 30 s for it)."""
    run = tmp_path / 'out/a'
    process = start_train(tmp_path, sys.executable, '-m', 'torch.distributed.run',
                          '--nproc_per_node=2', f'--master_port={30600 + os.getpid() % 300}',
                          dataset=text_file, out_dir='out/a', timeout_minutes=0.05, **SETTINGS)
    wait_for_step(run, process, 20)
    ranks = children(process.pid)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[1], number)
    text = process.communicate(timeout=90)[0]
    assert process.returncode == 1
    assert not any(os.path.exists(f'/proc/{rank}') for rank in ranks)
    if number == signal.SIGSTOP:
        assert '[rank 0] error: heard nothing from another of 2 ranks in step' in text
    what = 'killed' if number == signal.SIGKILL else 'hangs (timeout_minutes=0.05)'
    note(f'under torchrun, one of two ranks {what}', 1,
         f'all have ended after {time.monotonic() - began:.0f} s')


@pytest.mark.slow
def test_three_ranks_killed(tmp_path, text_file):
    """Sums of three are not the same in any order; a resumed run must take the same one."""
    settings = dict(dataset=str(text_file), batch_size=6, max_steps=30, eval_interval=15,
                    save_interval=1)
    finished(tmp_path, 3, out_dir='out/whole', **settings)
    run = tmp_path / 'out/cut'
    for _ in range(2):
        begun = last_step(run)
        ranks = Ranks(tmp_path, 3, out_dir='out/cut', **settings)
        assert ranks.wait_for(lambda: last_step(run) > begun + 5)
        ranks.kill()
    finished(tmp_path, 3, out_dir='out/cut', **settings)
    assert_same(tmp_path / 'out/whole', run)
    note('SIGKILL, 3 processes, eager', 2, 'weights, optimizer state and log bitwise those of an '
         'uninterrupted run')


def note_samples(train, rank) -> None:
    """Write down the numbers of all training samples that this rank reads."""
    real, time_steps, warming_up = train.load_split, train.Learner.time_steps, []

    def warm_up(*args):
        warming_up.append(1)
        result = time_steps(*args)
        warming_up.clear()
        return result

    def load_split(folder, split, *rest, **options):
        windows = real(folder, split, *rest, **options)
        if split == 'train':
            batch = windows.batch

            def noted(samples):
                if not warming_up:
                    with open(f'samples-{rank}', 'a') as f:
                        f.write(json.dumps([int(x) for x in samples if x >= 0]) + '\n')
                return batch(samples)
            windows.batch = noted
        return windows
    train.load_split, train.Learner.time_steps = load_split, warm_up


def test_two_then_three_then_one_rank(tmp_path, text_file):
    """Every sample is read once, in its step, whatever the number of ranks."""
    settings = dict(dataset=str(text_file), batch_size=8, max_steps=45, eval_interval=45)
    finished(tmp_path, out_dir='out/one', **settings)
    run = tmp_path / 'out/changing'
    stops = []
    for world in (2, 3):
        ranks = Ranks(tmp_path, world, out_dir='out/changing', inject=note_samples, **settings)
        assert ranks.wait_for(lambda: last_step(run) > 14 * (len(stops) + 1) - 2)
        ranks.send(signal.SIGTERM, [world - 1])
        assert ranks.wait() == [0] * world
        stops.append(checkpoint.steps(run)[-1])
    finished(tmp_path, out_dir='out/changing', inject=note_samples, **settings)
    assert [(e['world'], e['step']) for e in read_log(run, 'resume')] == [
        (3, stops[0]), (1, stops[1])]
    seen = [sample for rank in range(3) for line in json_lines(tmp_path / f'samples-{rank}')
            for sample in line]
    assert sorted(seen) == list(range(45 * 8))
    losses = [[e['train_loss'] for e in read_log(path, 'step')]
              for path in (tmp_path / 'out/one', run)]
    assert len(losses[0]) == len(losses[1]) == 45
    worst = max(abs(a - b) for a, b in zip(*losses))
    assert worst < 1e-5
    note(f'resumed with 2, 3, 1 ranks (after steps {stops[0]} and {stops[1]} of 45)', 2,
         f'the same samples in every step; losses within {worst:.1e} of one process, not equal: '
         'sums over ranks are taken in another order')
