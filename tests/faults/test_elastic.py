"""torchrun restarts a job whose workers or machines die, shrinks it, and takes in new machines."""
import os
import signal
import socket
import sys
import time

import pytest
from harness import assert_same, finished, last_step, note
from test_ranks import children
from test_signals import start_train, wait_for_step

from core.run.log import read_log

# steps of a tenth of a second: starting anew takes ten
SETTINGS = dict(batch_size=64, micro_batch_size=4, block_size=64, n_embd=64, save_interval=5,
                eval_interval=1000, dtype='float32', dropout=0.0)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def losses(run) -> list[float]:
    return [event['train_loss'] for event in read_log(run, 'step')]


def resumed(run) -> list[int]:
    """With how many processes the run was resumed each time."""
    return [event['world'] for event in read_log(run, 'resume')]


@pytest.mark.slow
def test_worker_killed(tmp_path, text_file):
    """Three workers, one after another; torchrun starts all again each time."""
    settings = dict(SETTINGS, dataset=text_file, max_steps=60)
    run = tmp_path / 'out/a'
    output = tmp_path / 'output'
    with open(output, 'w') as f:
        process = start_train(tmp_path, sys.executable, '-m', 'torch.distributed.run',
                              '--standalone', '--nproc_per_node=2', '--max_restarts=3',
                              output=f, out_dir='out/a', **settings)
    for step, victim in ((12, 0), (25, 1), (38, 1)):
        wait_for_step(run, process, step)
        os.kill(sorted(children(process.pid))[victim], signal.SIGKILL)
    assert process.wait(240) == 0, output.read_text()[-3000:]
    assert resumed(run) == [2, 2, 2]
    finished(tmp_path, 2, out_dir='out/whole', **{**settings, 'dataset': str(text_file)})
    assert_same(tmp_path / 'out/whole', run)
    note('under torchrun --max_restarts=3, a worker of two killed', 3,
         'all start again and resume; weights, optimizer state and log bitwise those of an '
         'uninterrupted run')


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """Three functions: start(name, machines, **settings) starts a torchrun that stands for a
    machine, start_two(machines, **settings) two of them, and output(name) is the end of what one
    has printed.
    """
    monkeypatch.setenv('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    port = free_port()

    def start(name, machines, **settings):
        with open(tmp_path / name, 'w') as f:
            return start_train(tmp_path, sys.executable, '-m', 'torch.distributed.run',
                               f'--nnodes={machines}', '--nproc_per_node=1', '--max_restarts=5',
                               '--rdzv_id=job', '--rdzv_backend=c10d',
                               f'--rdzv_endpoint=127.0.0.1:{port}',
                               '--rdzv_conf=last_call_timeout=3,join_timeout=120',
                               output=f, out_dir='out/a', **settings)

    def start_two(machines, **settings):
        first = start('first', machines, **settings)
        time.sleep(1)
        return first, start('second', machines, **settings)
    return start, start_two, lambda name: (tmp_path / name).read_text()[-3000:]


@pytest.mark.slow
def test_worker_of_one_machine_killed(tmp_path, text_file, agent):
    """The torchruns of two machines count their restarts differently."""
    _, start_two, output = agent
    run, settings = tmp_path / 'out/a', dict(SETTINGS, dataset=text_file, max_steps=60)
    first, second = start_two('2', **settings)
    for step in (12, 30):
        wait_for_step(run, first, step)
        os.kill(children(second.pid)[0], signal.SIGKILL)
    assert (first.wait(240), second.wait(60)) == (0, 0), output('first') + output('second')
    assert resumed(run) == [2, 2]
    finished(tmp_path, 2, out_dir='out/whole', **{**settings, 'dataset': str(text_file)})
    assert_same(tmp_path / 'out/whole', run)
    note('a worker of one of two machines killed', 2, 'as with one machine')


@pytest.mark.slow
def test_machine_lost_and_replaced(tmp_path, text_file, agent):
    start, start_two, output = agent
    run, settings = tmp_path / 'out/a', dict(SETTINGS, dataset=text_file, max_steps=500)
    first, second = start_two('1:2', **settings)
    wait_for_step(run, first, 20)
    begun, = read_log(run, 'start')
    worker, = children(second.pid)
    os.kill(second.pid, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    lost = last_step(run)
    while not resumed(run):
        assert first.poll() is None, output('first')
        time.sleep(0.1)
    wait_for_step(run, first, lost + 20)
    third = start('third', '1:2', **settings)
    while len(resumed(run)) < 2:
        assert first.poll() is None, output('first')
        time.sleep(0.1)
    assert first.wait(300) == 0, output('first')
    third.wait(60)
    assert begun['world'] == 2 and resumed(run) == [1, 2]
    finished(tmp_path, 2, out_dir='out/whole', **{**settings, 'dataset': str(text_file)})
    whole = losses(tmp_path / 'out/whole')
    assert len(whole) == len(losses(run)) == 500
    worst = max(abs(a - b) for a, b in zip(whole, losses(run)))
    assert worst < 1e-3
    note('one of two machines lost, another one joins later', 1,
         f'goes on with one process, then with two; losses within {worst:.1e} of an uninterrupted '
         'run')
