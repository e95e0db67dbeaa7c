"""Real training processes to be killed, stopped and lied to, and what must be equal afterwards.

Processes are forked from one that has imported torch already, so that a start takes a second.
"""
import atexit
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import socket
import sys
import threading
import time
from pathlib import Path

import torch
from conftest import FAULTS, TINY, without_picture
from safetensors.torch import load_file

import train
from core.run import checkpoint
from core.run import run as run_module
from core.run.log import events, read_log

ROOT = Path(train.__file__).parent
TIMES = ('seconds', 'tokens_per_second', 'mfu')     # what may differ between two equal runs
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(['train', 'harness', 'torch._dynamo'])
train.source_hashes(train.__file__)     # which all processes that are forked know then


def note(fault: str, tries: int, outcome: str) -> None:
    """A line of the table that the session ends with; tries of the same outcome are added up."""
    before, what = FAULTS.get(fault, (0, outcome))
    if what == outcome:
        FAULTS[fault] = (before + tries, outcome)
    elif tries > before:
        FAULTS[fault] = (tries, outcome)


# ---------------------------------------------------------------------------------------------
# Processes


def child(folder, output, env, stage, settings, inject) -> None:
    """What a forked process does: the main() of a stage in `folder`, after inject(stage, rank)."""
    os.chdir(folder)
    os.environ.update(env)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, 'w', buffering=1, closefd=False)
    sys.stderr = open(2, 'w', buffering=1, closefd=False)
    script = importlib.import_module(stage)
    for name, value in {**(TINY if stage == 'train' else {}), **settings}.items():
        setattr(script, name, value)
    script.CONFIG = 'tiny'
    run_module.plot_losses = without_picture
    if inject:
        inject(script, int(env.get('RANK', 0)))
    try:
        script.main()
    except Exception:   # what the interpreter of a script does with it
        sys.excepthook(*sys.exc_info())
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.exit(1)


class Ranks:
    """Processes of `world` ranks in `folder` that run a stage; output goes to
    <folder>/output-<rank>."""

    def __init__(self, folder, world=1, inject=None, stage='train', **settings):
        self.folder, self.world = Path(folder), world
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        self.ranks = []
        for rank in range(world):
            env = {'RANK': str(rank), 'WORLD_SIZE': str(world), 'LOCAL_RANK': str(rank),
                   'LOCAL_WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1',
                   'MASTER_PORT': str(port)} if world > 1 else {}
            self.output(rank).write_text('')
            self.ranks.append(PROCESSES.Process(target=child, args=(
                str(folder), str(self.output(rank)), env, stage, settings, inject)))
        for process in self.ranks:
            process.start()

    def output(self, rank=0) -> Path:
        return self.folder / f'output-{rank}'

    def text(self, rank=0) -> str:
        return self.output(rank).read_text(errors='replace').replace('\r', '\n')

    def send(self, number, ranks=None) -> None:
        """Send a signal to some ranks, by default to all."""
        for rank in range(self.world) if ranks is None else ranks:
            os.kill(self.ranks[rank].pid, number)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        self.wait()

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def wait(self, timeout=120) -> list[int]:
        """The exit codes. Fails if the processes are not gone in time."""
        end = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.01, end - time.monotonic()))
        if self.alive():
            text = '\n'.join(self.text(rank)[-1500:] for rank in range(self.world))
            for process in self.ranks:
                process.kill()
            raise AssertionError(f'still running after {timeout} s:\n{text}')
        return [process.exitcode for process in self.ranks]

    def wait_for(self, condition, timeout=120) -> bool:
        """Until condition() holds (True) or all processes are gone (False)."""
        end = time.monotonic() + timeout
        while not condition():
            if not self.alive():
                return False
            assert time.monotonic() < end, self.text()[-1500:]
            time.sleep(0.0005)
        return True


def finished(folder, world=1, **settings) -> None:
    """Train to the end."""
    ranks = Ranks(folder, world, **settings)
    assert ranks.wait(600) == [0] * world, ranks.text()[-3000:]


# ---------------------------------------------------------------------------------------------
# What must be equal


def tensors_of(run, step) -> dict[str, torch.Tensor]:
    folder = checkpoint.step_folder(run, step)
    return load_file(folder / 'model.safetensors') | load_file(folder / 'optimizer.safetensors')


def history(run) -> list[dict]:
    """The log without times, and without what tells of interruptions."""
    return [{k: v for k, v in event.items() if k not in TIMES} for event in events(run)
            if event['event'] in ('step', 'skip', 'eval', 'sample', 'end')]


def bits(tensor: torch.Tensor) -> bytes:
    """-0.0 and 0.0 differ here, and a NaN equals itself."""
    return tensor.contiguous().numpy().tobytes()


def assert_same(run, other) -> None:
    """Both runs came to the same end, bit for bit: weights, optimizer state, log."""
    assert checkpoint.steps(run)[-1] == checkpoint.steps(other)[-1]
    for one, two in itertools.zip_longest(history(run), history(other)):
        assert one == two
    mine = tensors_of(run, checkpoint.steps(run)[-1])
    theirs = tensors_of(other, checkpoint.steps(other)[-1])
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert bits(tensor) == bits(theirs[name]), name


def assert_clean(run) -> None:
    """Nothing temporary is left, and every checkpoint is whole."""
    assert not [*Path(run).glob('.tmp*'), *Path(run).glob('.old*')]
    for step in checkpoint.steps(run):
        assert checkpoint.damage(checkpoint.step_folder(run, step)) == ''


def last_step(run) -> int:
    """The last step in a run's log; 0 without one."""
    return max((event['step'] for event in read_log(run, 'step')), default=0)


def limit_file_size(n_bytes: int) -> None:
    """No file that this process writes may be longer; -1: any."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if n_bytes < 0 else n_bytes, hard))


def json_lines(path) -> list:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
