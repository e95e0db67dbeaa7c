"""Everything distributed: the process group, data-parallel wrapping, sums over ranks, print0.

`torchrun --nproc_per_node=N train.py` starts N processes that find each other through environment
variables; without torchrun there is one process and everything here is a no-op.
"""
import contextlib
import json
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from core.settings import stop


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


def start(ranks: Ranks, device) -> None:
    """Join the process group (nccl on GPUs, gloo elsewhere), if there is more than one process."""
    if ranks.world > 1:
        if device.kind == 'mps':
            stop('device=mps: PyTorch cannot train on several Apple GPUs; use one process')
        dist.init_process_group('nccl' if device.kind == 'cuda' else 'gloo')


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
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


def broadcast(value):
    """Rank 0's value (what JSON can hold) on every rank."""
    if not dist.is_initialized():
        return value
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, 0)
    if dist.get_rank():
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))
