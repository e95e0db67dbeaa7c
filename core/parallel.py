"""Everything distributed: the process group, data-parallel wrapping, sums over ranks, print0.

`torchrun --nproc_per_node=N train.py` starts N processes that find each other through environment
variables; without torchrun there is one process and everything here is a no-op.
"""
import atexit
import contextlib
import functools
import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from core.settings import stop

patient_group = None    # of all ranks: for waiting while one of them prepares data


@dataclass
class Ranks:
    """This process among all of them."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0     # on this machine
    local_world: int = 1


def find_ranks() -> Ranks:
    """Who this process is, from torchrun's environment variables."""
    env = os.environ
    if 'WORLD_SIZE' not in env:
        return Ranks()
    return Ranks(int(env.get('RANK', 0)), int(env.get('WORLD_SIZE', 1)),
                 int(env.get('LOCAL_RANK', 0)), int(env.get('LOCAL_WORLD_SIZE', 1)))


def start(ranks: Ranks, device, timeout_minutes: float, progress) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs), if there is more than one process.

    A rank that waits for others longer than timeout_minutes gives up; its message names the step
    after `progress.step`.
    """
    global patient_group
    if ranks.world > 1:
        sys.excepthook = functools.partial(explain, sys.excepthook, ranks, progress)
        if device.kind == 'mps':
            stop('device=mps: PyTorch cannot train on several Apple GPUs; use one process')
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.kind == 'cuda' else 'gloo',
                                timeout=timedelta(minutes=timeout_minutes))
        patient_group = dist.new_group(backend='gloo', timeout=timedelta(days=7))


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        # Gloo's threads need the interpreter to let go of their last tensors; if it ends at that
        # moment, both wait for each other for ever.
        time.sleep(0.2)
        dist.destroy_process_group()


def print0(*words, **options) -> None:
    """Print on rank 0 only."""
    if find_ranks().rank == 0:
        print(*words, flush=True, **options)


def wrap(model, ranks: Ranks, device):
    """The model with DDP around it where there are several processes."""
    if ranks.world == 1:
        return model
    ids = [device.name] if device.kind == 'cuda' else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True)


def accumulate(model, last: bool):
    """The context of a micro-batch's passes: only the last one exchanges gradients."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def all_sum(x: torch.Tensor, device) -> torch.Tensor:
    """x summed over all ranks; on the GPU if there are several of them, else where it was."""
    if dist.is_initialized():
        x = x.to(device.name) if device.kind == 'cuda' else x
        dist.all_reduce(x)
    return x


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank; all ranks must ask together."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags)
    return flags.item() > 0


def broadcast(value, patient: bool = False):
    """Rank 0's value (what JSON can hold) on every rank; `patient`: however long rank 0 takes."""
    if not dist.is_initialized():
        return value
    group = patient_group if patient else None
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    dist.broadcast(size, 0, group=group)
    if dist.get_rank():
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0, group=group)
    return json.loads(bytes(data.tolist()))


def explain(otherwise, ranks: Ranks, progress, kind, error, trace) -> None:
    """Says in one line that other ranks are silent or lost, if that is what ended this process."""
    lost = isinstance(error, dist.DistError) or 'gloo' in str(error)    # gloo has no class for it
    if not lost:
        otherwise(kind, error, trace)
        return
    what = 'heard nothing from' if 'imed out' in str(error) else 'lost'
    print(f'[rank {ranks.rank}] error: {what} another of {ranks.world} ranks in step '
          f'{progress.step + 1} ({str(error).strip().splitlines()[0]}); so this one ends, and the '
          'same command resumes the run', file=sys.stderr, flush=True)
    # The interpreter would wait for gloo's threads, and those for ranks that are gone. It has
    # waited for other threads, such as one that saves, when this is called.
    atexit.register(os._exit, 2)
