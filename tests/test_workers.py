"""core/workers.py: several processes, in order, and what becomes of them when one is killed."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import stopped

from core.read.documents import Bad
from core.workers import ordered_map

ROOT = Path(__file__).parent.parent


def scaled(item, *shared):
    """Later items are done earlier."""
    time.sleep(0.002 * (5 - item % 5))
    return item, sum(shared), os.getpid(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def fails(item):
    if item == 3:
        raise Bad(f'item {item}: no good')
    return item


def dies(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def count(taken: list, n: int):
    for i in range(n):
        taken.append(i)
        yield i


def no_worker_is_left() -> bool:
    return multiprocessing.active_children() == []


@pytest.mark.parametrize('workers', [1, 2, 3])
def test_order_and_shared(workers):
    items, sums, pids, deaf = zip(*ordered_map(scaled, iter(range(40)), workers, 10, 5))
    assert items == tuple(range(40)) and set(sums) == {15}
    if workers == 1:    # in this process, whose Ctrl-C works as ever
        deaf_here = signal.getsignal(signal.SIGINT) is signal.SIG_IGN   # as if run by nohup
        assert set(pids) == {os.getpid()} and set(deaf) == {deaf_here}
    else:
        assert os.getpid() not in pids and 1 < len(set(pids)) <= workers and all(deaf)
    assert no_worker_is_left()


@pytest.mark.parametrize('workers', [1, 3])
def test_nothing_to_do(workers):
    assert list(ordered_map(fails, [], workers)) == [] and no_worker_is_left()


@pytest.mark.parametrize('workers,ahead', [(1, 0), (2, 4), (3, 6)])
def test_items_are_taken_as_results_are_fetched(workers, ahead):
    taken = []
    results = ordered_map(scaled, count(taken, 30), workers)
    assert taken == []
    for i, result in enumerate(results):
        assert result[0] == i and i < len(taken) <= i + 1 + ahead
    assert len(taken) == 30


@pytest.mark.parametrize('workers', [1, 2])
def test_an_exception_reaches_the_caller(workers):
    taken, got = [], []
    with pytest.raises(Bad, match='^item 3: no good$'):
        for result in ordered_map(fails, count(taken, 1000), workers):
            got.append(result)
    assert got == [0, 1, 2] and len(taken) < 10 and no_worker_is_left()


@pytest.mark.parametrize('workers', [1, 2])
def test_an_exception_of_the_items_reaches_the_caller(workers):
    def items():
        yield 0
        raise Bad('no such file')

    with pytest.raises(Bad, match='^no such file$'):
        list(ordered_map(fails, items(), workers))
    assert no_worker_is_left()


@pytest.mark.parametrize('workers', [2, 3])
def test_a_killed_worker_stops_with_one_line(capsys, workers):
    message = stopped(capsys, lambda: list(ordered_map(dies, range(1000), workers)))
    assert 'was killed' in message and message.endswith('try --workers=1')
    assert no_worker_is_left()


def test_whoever_has_enough_may_leave():
    began, results = time.perf_counter(), ordered_map(scaled, range(10_000), 2)
    assert next(results)[0] == 0
    results.close()
    assert no_worker_is_left() and time.perf_counter() - began < 5


PARENT = r'''
import os, time
from core.workers import ordered_map

def work(item):
    os.write(1, f'{os.getpid()}\n'.encode())   # at once, as print need not
    time.sleep(60)

if __name__ == '__main__':
    list(ordered_map(work, range(100), 2))
'''


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which only waits for its exit status to be read."""
    found = subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True)
    return found.stdout.strip()[:1] not in ('', 'Z')


@pytest.mark.parametrize('with_what', [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path, with_what):
    script = tmp_path / 'parent.py'
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}) as parent:
        pids = {int(parent.stdout.readline()) for _ in range(2)}
        assert len(pids) == 2 and all(map(alive, pids))
        parent.send_signal(with_what)
        parent.wait()
    until = time.perf_counter() + 5
    while (left := list(filter(alive, pids))) and time.perf_counter() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
