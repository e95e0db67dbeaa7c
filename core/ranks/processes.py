"""The processes: what each of them does, the mesh they form, what they tell each other, print0.

`torchrun --nproc_per_node=N train.py` starts N processes that find each other through environment
variables; without torchrun there is one process and everything here is a no-op.
"""
import atexit
import contextlib
import functools
import json
import logging
import os
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from core import device as hardware
from core.settings import stop

IGNORE = -100     # the target of a position that does not count
PADDING = -1      # the number of a sample that only fills a micro-batch up

patient_group = None    # of all ranks: for waiting while one of them prepares data
writing_group = None    # of all ranks: for the threads that write checkpoints
tied_group = None       # of the first and last pipeline stage with the same data and cut
store = None            # what all ranks can read and write


@dataclass
class Ranks:
    """This process among all of them, and what each does for the model."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0     # on this machine
    local_world: int = 1
    tp: int = 1             # ranks that share each matrix
    pp: int = 1             # stages, one after another
    dp: int = 1             # groups of ranks that read different data: replicas x shards
    replicas: int = 1       # copies of all parameters
    zero: int = 0           # what is sharded over the others: 0 nothing, 2, 3
    sequence_parallel: bool = False
    pp_schedule: str = '1f1b'
    mesh: DeviceMesh | None = None
    tp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    step: int = 0           # steps done, for messages

    @property
    def plain(self) -> bool:
        """Whether this rank has all of every parameter: one process, or DDP."""
        return self.tp == self.pp == 1 and not self.zero

    @property
    def can_sample(self) -> bool:
        """Whether all ranks together can write text: token by token, through the whole model."""
        return self.pp == 1 and not self.sequence_parallel

    @property
    def owns_loss(self) -> float:
        """1.0 on the ranks whose losses are to be added up, else 0.0."""
        return float(self.tp_rank == 0 and self.pp_rank == self.pp - 1)

    @property
    def stages(self) -> list[int]:
        """The pipeline stages of this rank, of `n_stages`."""
        return list(range(self.pp_rank, self.n_stages, self.pp))

    @property
    def n_stages(self) -> int:
        return self.pp * (2 if self.pp_schedule == 'interleaved' and self.pp > 1 else 1)


def find_ranks() -> Ranks:
    """Who this process is, from torchrun's environment variables."""
    env = os.environ
    if 'WORLD_SIZE' not in env:
        return Ranks()
    return Ranks(int(env.get('RANK', 0)), int(env.get('WORLD_SIZE', 1)),
                 int(env.get('LOCAL_RANK', 0)), int(env.get('LOCAL_WORLD_SIZE', 1)))


PP_SCHEDULES = ('1f1b', 'interleaved')


def arrange(ranks: Ranks, *, tp: int = 1, pp: int = 1, zero: int = 0, replicas: int = 0,
            sequence_parallel: bool = False, pp_schedule: str = '1f1b') -> list[str]:
    """Decide what each rank does: dp follows from the number of ranks. Returns lines to print.
    `replicas` copies of the parameters are kept, each sharded over dp / replicas ranks (HSDP; 0: 1
    with zero, else dp). Stops at what does not divide, or what torch would compute wrongly."""
    world = ranks.world
    if world % (tp * pp):
        stop(f'tp={tp}, pp={pp}: {world} processes cannot be divided into groups of {tp * pp}; '
             f'start a multiple of {tp * pp}')
    dp = world // (tp * pp)
    said = []
    if zero == 1:
        said, zero = ['zero=1 is treated as zero=2, which also shards the gradients'], 2
    if sequence_parallel and tp == 1:
        stop('sequence_parallel=True: is a part of tensor parallelism; give --tp too')
    if tp > 1 and dp > 1 and not zero:
        stop(f'tp={tp} with zero=0 on {world} processes: DDP around tensor parallelism computes '
             f'wrong gradients; use --zero=2 (with --replicas={dp} it keeps whole copies)')
    if pp > 1 and dp > 1 and not zero and pp_schedule == 'interleaved':
        stop('pp_schedule=interleaved with zero=0: DDP cannot follow it; use --zero=2')
    if replicas and not zero:
        stop(f'replicas={replicas}: without zero each of the {dp} is a whole copy; leave it out')
    replicas = replicas or (1 if zero else dp)
    if dp % replicas:
        stop(f'replicas={replicas}: must divide the {dp} data-parallel ranks')
    ranks.tp, ranks.pp, ranks.dp, ranks.zero, ranks.replicas = tp, pp, dp, zero, replicas
    ranks.sequence_parallel, ranks.pp_schedule = sequence_parallel, pp_schedule
    rest, ranks.tp_rank = divmod(ranks.rank, tp)
    ranks.pp_rank, ranks.dp_rank = divmod(rest, dp)
    if world > 1:
        parts = [f'{dp} x data' + (f' (ZeRO-{zero}' + f', {replicas} copies' * (replicas > 1) + ')'
                                   if zero else ' (DDP)' if dp > 1 else ''),
                 f'{tp} x tensor' + ', sequence' * sequence_parallel,
                 f'{pp} x pipeline' + f' ({pp_schedule})' * (pp > 1)]
        said.append(f'{world} processes: ' + ', '.join(parts))
    return said


def begin(device: str, dtype: str, compile: bool, threads: int, timeout_minutes: float,
          layout: dict | None = None, **purpose) -> tuple:
    """The ranks, which have found each other, and the device on which they agree, as a script's
    settings ask for them; prints both. `layout` has arguments of `arrange`, `purpose` of
    `device.choose`."""
    ranks = find_ranks()
    said = arrange(ranks, **layout or {})
    found = hardware.choose(device, dtype, compile, threads, local_rank=ranks.local_rank,
                            local_world=ranks.local_world, **purpose)
    start(ranks, found, timeout_minutes)
    found = hardware.agree(found, exchange)
    print0(*found.why, *said, sep='\n')
    return ranks, found


def start(ranks: Ranks, device, timeout_minutes: float) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs), if there is more than one process, and
    form the mesh. A rank that waits for others longer than timeout_minutes gives up."""
    global patient_group, writing_group, store
    if ranks.world == 1 and not ranks.zero:
        return
    if device.kind == 'mps':
        stop('device=mps: PyTorch cannot train on several Apple GPUs; use one process, and zero=0')
    # gloo connects each rank with each other, for each group
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    backend = 'cpu:gloo,cuda:nccl' if device.kind == 'cuda' else 'gloo'
    timeout = timedelta(minutes=timeout_minutes)
    if ranks.world == 1:    # to measure what sharding costs
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        store, rank, world = next(dist.rendezvous('env://', timeout=timeout))
        if ranks.local_world == world:
            # torchrun keeps its store when it starts processes again, with the addresses of those
            # before them. (On several machines torchruns count restarts differently.)
            count = os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)
            store = dist.PrefixStore(f'start-{count}', store)
        sys.excepthook = functools.partial(explain, sys.excepthook, ranks)
        atexit.register(tell_end)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    patient_group = dist.new_group(backend='gloo', timeout=timedelta(days=7))
    # files take some ranks longer than others
    writing_group = dist.new_group(backend='gloo', timeout=6 * timeout)
    form_mesh(ranks, device.kind, timeout)


def form_mesh(ranks: Ranks, kind: str, timeout=timedelta(minutes=10)) -> None:
    """The mesh of all ranks; the process group exists."""
    global tied_group
    # It would advise about exchanges that are rare here, and about gloo.
    for name in ('_redistribute', '_collective_utils'):
        logging.getLogger(f'torch.distributed.tensor.{name}').setLevel(logging.ERROR)
    # nothing here changes what a block or a model returns in place
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view tensor')
    ranks.mesh = init_device_mesh(
        kind, (ranks.pp, ranks.replicas, ranks.dp // ranks.replicas, ranks.tp),
        mesh_dim_names=('pp', 'replicas', 'shards', 'tp'))
    if ranks.pp > 1:
        ends = ranks.mesh.mesh[[0, -1]].flatten(1).T.tolist()
        tied_group, _ = dist.new_subgroups_by_enumeration(ends, timeout=timeout)
    for name in ranks.mesh.mesh_dim_names:
        _set_pg_timeout(timeout, ranks.mesh.get_group(name))


def tell_end() -> None:
    """Tell the other ranks that this one has ended by itself, and has said why."""
    with contextlib.suppress(RuntimeError):     # it may have gone with rank 0
        store.set('ended', '')


def finish() -> None:
    """Leave the process group."""
    atexit.unregister(tell_end)
    if dist.is_initialized():
        time.sleep(0.2)     # gloo's threads let go of tensors; a deadlock if the interpreter ends
        dist.destroy_process_group()


def print0(*words, **options) -> None:
    """Print on rank 0 only."""
    if find_ranks().rank == 0:
        print(*words, flush=True, **options)


# ---------------------------------------------------------------------------------------------
# What ranks tell each other


def share(first: int, n: int, rank: int, world: int, micro_batch_size: int,
          multiple: int = 1) -> list[list[int]]:
    """The samples first .. first + n - 1 that `rank` of `world` reads, cut into micro-batches. All
    ranks get the same number of equally large ones, a multiple of `multiple`; shares are filled up
    with PADDING: share(8, 8, 1, 3, 2) is [[11, 12], [13, -1]]."""
    per_rank = -(-n // world)
    padded = -(-per_rank // (micro_batch_size * multiple)) * micro_batch_size * multiple
    mine = list(range(first + rank * per_rank, first + min(n, (rank + 1) * per_rank)))
    mine += [PADDING] * (padded - len(mine))
    return [mine[i:i + micro_batch_size] for i in range(0, padded, micro_batch_size)]


def all_sum(x: torch.Tensor, device) -> torch.Tensor:
    """x summed over all ranks; on the GPU if there are several of them, else where it was."""
    if dist.is_initialized():
        x = x.to(device.name) if device.kind == 'cuda' else x
        dist.all_reduce(x)
    return x


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank; all ranks must ask together."""
    return any(exchange(flag))


def broadcast(value, patient: bool = False):
    """Rank 0's value (what JSON can hold) on every rank; `patient`: however long a rank takes."""
    return exchange(value, patient_group if patient else None)[0]


def exchange(value, group=None) -> list:
    """The values (what JSON can hold) of all ranks, in their order; a thread needs a `group` of its
    own. Raises ConnectionError if a rank is silent or lost."""
    if not dist.is_initialized():
        return [value]
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    try:
        dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
        longest = int(max(sizes))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, F.pad(data, (0, longest - len(data))), group=group)
    except RuntimeError as e:
        raise ConnectionError(f'another rank is silent or lost: {e}') from e
    return [json.loads(bytes(text[:size].tolist())) for text, size in zip(texts, sizes)]


def root_of(error: BaseException) -> BaseException:
    """What went wrong first: the stages of a pipeline wrap it."""
    while error.__cause__:
        error = error.__cause__
    return error


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another rank is silent or lost; gloo has no class for it."""
    cause = root_of(error)
    return isinstance(cause, dist.DistError) or 'gloo' in str(cause)


def explain(otherwise, ranks: Ranks, kind, error, trace) -> None:
    """Say in one line that other ranks are silent or lost, if that is what ended this process; say
    nothing if one of them has ended by itself, for its message stands above. All other errors go to
    otherwise(kind, error, trace)."""
    if not is_loss(error):
        otherwise(kind, error, trace)
        return
    cause, said = str(root_of(error)).strip(), False
    what = 'heard nothing from' if 'imed out' in cause else 'lost'
    with contextlib.suppress(RuntimeError):
        said = store.check(['ended'])
    if not said:
        print(f'[rank {ranks.rank}] error: {what} another of {ranks.world} ranks in step '
              f'{ranks.step + 1} ({cause.splitlines()[0]}); so this one ends, and the same command '
              'resumes the run', file=sys.stderr, flush=True)
    # The interpreter would wait for gloo's threads, and those for ranks that are gone. It has
    # waited for other threads, such as one that saves, when this is called.
    atexit.register(os._exit, 2)


def stop_alone(message: str) -> NoReturn:
    """Stop while other ranks wait for this one; gloo's threads are not waited for."""
    try:
        stop(message)
    finally:
        tell_end()
        os._exit(2)
