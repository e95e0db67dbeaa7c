"""The ways to lay a model on the GPUs, in powers of two: what each needs, how long a step takes, or
why it cannot be."""
import contextlib
import functools
import io
import itertools
import math
from dataclasses import dataclass, replace

from core.net.weights import build_model
from core.planning.machines import GPU
from core.planning.memory import Layout, key, step_memory
from core.ranks import parallel, processes
from core.ranks.pipeline import fitting
from core.ranks.processes import Ranks
from core.settings import Stop, stop
from model import GPTConfig, flops_per_token

MACHINE = 8             # GPUs in one
SPARE = 0.92            # of a GPU's memory: what fragments and CUDA's own gigabytes leave
ROWS_TOKENS = 32_768    # tokens of a micro-batch beyond which a GPU gains nothing


@dataclass(frozen=True)
class Choice:
    """A layout, what it takes, and, if it cannot be, why."""
    layout: Layout
    memory: dict[str, int]      # bytes by what for; empty if it was refused before
    seconds: float              # of a step
    parts: dict[str, float]     # ... of which compute, bubble, tensor, data and pipeline exchange
    refused: str = ''


def reason(config: GPTConfig, layout: Layout, batch_size: int, replicas: int = 0) -> str:
    """Why train.py would refuse this layout; '' if it would not. `replicas`: as the user gave it.
    """
    ranks = Ranks(world=layout.ranks)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            processes.arrange(ranks, tp=layout.tp, pp=layout.pp, zero=layout.zero,
                              replicas=replicas if layout.zero == 0 else layout.replicas,
                              sequence_parallel=layout.sequence_parallel,
                              pp_schedule=layout.pp_schedule)
            parallel.check_model(ranks, config)
    except Stop as e:
        return e.message
    if layout.dp > batch_size:
        return (f'batch_size={batch_size}: fewer sequences than the {layout.dp} data-parallel '
                'ranks; give a larger --batch_size, or fewer --gpus')
    return ''


@functools.cache
def whole_flops(arch: tuple) -> int:
    """FLOPs per token of GPTConfig(*arch), without recomputation."""
    return flops_per_token(build_model(GPTConfig(*arch), None, 'meta'))


def step_seconds(config: GPTConfig, layout: Layout, gpu: GPU, mfu: float, *,
                 n_parameters: int, muon: bool = False) -> dict[str, float]:
    """Seconds of a step, by what takes them; rows that only fill up a micro-batch count. Rates are
    those of data sheets, sums of bytes those of docs/scale.md. The exchange of data-parallel ranks
    hides behind compute as far as it can, the others' does not. It is for comparing layouts."""
    T, C, L = config.block_size, config.n_embd, config.n_layer
    again = 4 / 3 if layout.recompute else 1
    flops = whole_flops(key(config)) * again * layout.dp * layout.n_micro * layout.rows * T
    compute = flops / (layout.ranks * gpu.peak * mfu)
    # A ring of n ranks sends (n - 1) / n of the bytes for a gather or a scatter, twice for both.
    ring = lambda n: (n - 1) / n
    hidden = 2 * layout.rows * T * C        # bytes of a micro-batch's hidden states, in 16 bits
    reduces = 6 if layout.recompute else 4  # of a layer: two forward, two backward
    tensor = layout.n_micro * math.ceil(L / layout.pp) * reduces * 2 * ring(layout.tp) * hidden / (
        gpu.link if layout.tp <= MACHINE else gpu.network)
    weights = 4 * n_parameters / layout.tp / layout.pp
    near = layout.shards * layout.tp <= MACHINE
    one_machine = layout.ranks <= MACHINE
    speed = gpu.link if one_machine or near and layout.zero else gpu.network
    passes = {0: 0, 2: 2, 3: 3 * (layout.n_micro if layout.pp == 1 else 1)}[layout.zero]
    data = passes * ring(layout.shards) * weights / speed
    copies = layout.dp // layout.shards
    near = one_machine or layout.dp * layout.tp <= MACHINE
    data += 2 * ring(copies) * weights / layout.shards / (gpu.link if near else gpu.network)
    if muon:    # whole matrices are dealt out, and the updates come back
        data += (2 if layout.zero else 1) * ring(layout.dp) * weights / speed
    # DDP and ZeRO-2 exchange in one micro-batch's backward pass, ZeRO-3 in all passes.
    behind = compute if layout.zero == 3 else compute / layout.n_micro
    bubble = compute * (layout.pp - 1) / (layout.n_micro * layout.chunks)
    # stages send fp32, forward and back
    sent = 2 * 2 * hidden * layout.n_micro * layout.chunks if layout.pp > 1 else 0
    pipeline = sent / (gpu.link if one_machine else gpu.network)
    return {'compute': compute, 'bubble': bubble, 'tensor': tensor,
            'data': max(0.0, data - behind), 'pipeline': pipeline}


def candidates(n_gpus: int, fixed: dict):
    """Layouts to look at: powers of two, tensor parallelism within a machine; or as in `fixed`,
    settings of train.py that the user has given. Stops if the GPUs cannot be divided so."""
    per_machine = min(MACHINE, n_gpus)
    powers = [2 ** i for i in range(7)]

    def values(name, others):
        return [fixed[name]] if name in fixed else others
    tps, pps = values('tp', [n for n in powers if n <= per_machine]), values('pp', powers)
    groups = [(tp, pp) for tp, pp in itertools.product(tps, pps) if n_gpus % (tp * pp) == 0]
    if not groups:
        stop(f'gpus={n_gpus}: cannot be divided into groups of {tps[0]} x {pps[0]} (tp x pp); give '
             f'a multiple of {tps[0] * pps[0]}')
    for tp, pp in groups:
        dp = n_gpus // (tp * pp)
        copies = {1, dp // (per_machine // tp)} if dp * tp > per_machine > tp else {1}
        for zero, schedule, sequence in itertools.product(
                [2 if zero == 1 else zero for zero in     # as train.py takes it
                 values('zero', (0, 2, 3) if dp > 1 else (0,))],
                values('pp_schedule', ('1f1b', 'interleaved') if pp > 1 else ('1f1b',)),
                values('sequence_parallel', (tp > 1,))):
            if not zero and fixed.get('replicas') and 'zero' not in fixed:
                continue        # copies of what is not sharded are no choice
            for replicas in values('replicas', sorted(copies)) if zero else (dp,):
                yield Layout(dp, tp, pp, zero, max(1, replicas), sequence, schedule)


def choose(config: GPTConfig, gpu: GPU, n_gpus: int, batch_size: int, mfu: float, *,
           optimizer: str, dtype: str, n_parameters: int, fixed: dict | None = None
           ) -> tuple[list[Choice], list[Choice]]:
    """(the layouts that fit, fastest first; the others, with the reason of each). In `fixed` are
    settings of train.py that must be so."""
    good, refused, fixed = [], [], fixed or {}
    room = SPARE * gpu.memory - 1.5e9
    for layout in candidates(n_gpus, fixed):
        if why := reason(config, layout, batch_size, fixed.get('replicas', 0)):
            refused.append(Choice(layout, {}, math.inf, {}, why))
            continue
        per_rank, best, tight = math.ceil(batch_size / layout.dp), None, []
        for recompute in [fixed['activation_checkpointing']] if \
                'activation_checkpointing' in fixed else [False, True]:
            wanted = min(fixed.get('micro_batch_size', 0), math.ceil(per_rank / layout.pp))
            for rows in [wanted] if wanted else sizes(per_rank, config.block_size, layout.pp):
                n_micro = math.ceil(per_rank / rows)
                if layout.pp > 1:
                    n_micro = fitting(n_micro, layout)
                tried = replace(layout, recompute=recompute, rows=rows, n_micro=n_micro)
                memory = step_memory(config, tried, dtype, optimizer=optimizer)
                taken = sum(memory.values())
                if taken > room:
                    tight.append((taken, tried, memory))
                    break
                parts = step_seconds(config, tried, gpu, mfu, n_parameters=n_parameters,
                                     muon=optimizer == 'muon')
                choice = Choice(tried, memory, sum(parts.values()), parts)
                # of equals the one with more rows, which keep a GPU busier
                if best is None or choice.seconds <= 1.001 * best.seconds:
                    best = choice
        if best:
            good.append(best)
        else:
            taken, tried, memory = min(tight, key=lambda found: found[0])
            refused.append(Choice(tried, memory, math.inf, {},
                                  f'needs {taken / 1e9:,.0f} GB of {room / 1e9:,.0f}, most of it '
                                  f'for {max(memory, key=lambda k: memory[k])}'))
    return sorted(good, key=lambda choice: choice.seconds), refused


def sizes(per_rank: int, block_size: int, pp: int) -> list[int]:
    """Rows of a micro-batch to look at, so that a pipeline has at least pp of them."""
    most = max(1, min(per_rank // pp, ROWS_TOKENS // block_size))
    return [2 ** i for i in range(most.bit_length())]
