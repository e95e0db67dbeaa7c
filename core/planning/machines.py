"""GPUs: what training reaches on them, what they cost, how often they fail; and this machine."""
import math
import statistics
import timeit
from dataclasses import replace
from typing import NamedTuple

import torch

from core.device import PEAK_TFLOPS, Device
from core.net.weights import build_model
from core.settings import stop
from model import GPTConfig, flops_per_token


class GPU(NamedTuple):
    """What a maker's data sheet says, and a rough price."""
    name: str           # in core.device.PEAK_TFLOPS, which has its FLOP/s
    memory: float       # bytes
    link: float         # bytes per second and direction to another GPU of the machine
    network: float      # ... to another machine, of one GPU's share
    watts: float        # at most, of the GPU alone
    price: float        # dollars an hour: about what clouds asked in 2025; give yours with --price

    @property
    def peak(self) -> float:
        """FLOP/s of dense bf16 (fp16) products."""
        return PEAK_TFLOPS[self.name] * 1e12


# Link: NVLink where there is one, else PCIe of 16 lanes. Network: InfiniBand or RoCE with one card
# for each GPU (400 Gbit/s; A100: 200); the others' machines share one of 25 Gbit/s.
GPUS = {
    'b200': GPU('B200', 180e9, 900e9, 50e9, 1000, 5.0),
    'h200': GPU('H200', 141e9, 450e9, 50e9, 700, 3.3),
    'h100': GPU('H100', 80e9, 450e9, 50e9, 700, 2.7),
    'a100': GPU('A100', 80e9, 300e9, 25e9, 400, 1.6),
    'l40s': GPU('L40S', 48e9, 32e9, 0.4e9, 350, 1.0),
    'v100': GPU('V100', 32e9, 150e9, 0.4e9, 300, 0.6),
    '4090': GPU('RTX 4090', 24e9, 32e9, 0.4e9, 450, 0.4),
    '3090': GPU('RTX 3090', 24e9, 32e9, 0.4e9, 350, 0.25),
    't4': GPU('T4', 16e9, 16e9, 0.4e9, 70, 0.2),
}

# (GPU, parameters, MFU, who measured it). Narayanan et al. count the recomputed forward pass, a
# quarter of their FLOPs; MFU does not. Of other GPUs the nearest of these is taken.
MFU = (
    ('a100', 124e6, 0.31, 'nanoGPT: 30 to 33%'),
    ('a100', 1.7e9, 0.33, 'Narayanan et al. 2021, table 1: 3/4 of 137 of 312 TFLOP/s'),
    ('a100', 18.4e9, 0.32, 'Narayanan et al. 2021, table 1: 3/4 of 135 of 312 TFLOP/s'),
    ('a100', 145.6e9, 0.36, 'Narayanan et al. 2021, table 1: 3/4 of 148 of 312 TFLOP/s'),
    ('h100', 124e6, 0.40, 'llm.c: 468,000 tokens/s a GPU'),
    ('h100', 1.6e9, 0.50, 'llm.c, 1,558 million parameters: about 50%'),
    ('h100', 8e9, 0.36, 'torchtitan (Liang et al. 2024), Llama 3.1 8B: 33 to 39%'),
    ('h100', 405e9, 0.40, 'Llama Team 2024, table 4: 38 to 43%'),
)

# Of servers: NVIDIA's DGX H100 takes up to 10.2 kW for 8 GPUs of 700 W. A data centre needs 1.1 to
# 1.5 times what its servers take (PUE; the Uptime Institute's average of 2023 is 1.58).
SERVER, PUE = 10_200 / (8 * 700), (1.1, 1.5)
IDLE_PART = 0.7     # of the GPU's most watts, in a step that waits for its network at times

# Llama Team 2024, section 3.3.4: 419 interruptions in 54 days of 16,384 GPUs.
HOURS_BETWEEN_FAILURES = 16_384 * 54 * 24 / 419


def find_gpu(name: str) -> GPU:
    """The GPU of this name. Stops if it is not known."""
    known = GPUS.get(name.lower().removeprefix('rtx').strip(' -_'))
    if not known:
        stop(f'gpu={name}: is not known; choose one of {", ".join(GPUS)}, or add its data sheet to '
             'core/planning/machines.py')
    return known


def expected_mfu(gpu: GPU, N: float) -> tuple[float, str]:
    """MFU to reckon with for N parameters, and where it is from: the measurement on this GPU, else
    on an H100, whose size is nearest."""
    own = [row for row in MFU if GPUS[row[0]] == gpu]
    about = '' if own else f', measured on an H100, not on {gpu.name}'
    rows = own or [row for row in MFU if row[0] == 'h100']
    _, _, mfu, source = min(rows, key=lambda row: abs(math.log(row[1] / N)))
    return mfu, source + about


def energy(gpu: GPU, gpu_hours: float) -> tuple[float, float]:
    """Kilowatt-hours at the meter, at least and at most."""
    least = gpu.watts * IDLE_PART * PUE[0]
    return gpu_hours * least / 1000, gpu_hours * gpu.watts * SERVER * PUE[1] / 1000


def between_failures(n_gpus: int) -> float:
    """Mean hours between failures of a job on so many GPUs."""
    return HOURS_BETWEEN_FAILURES / n_gpus


def save_every(save: float, mean: float) -> float:
    """Time between checkpoints that loses least, for a job that fails after `mean` on average and
    stands still for `save` to make one, in one unit: sqrt(2 save mean) (Young 1974) in Daly's
    higher order (2006, equation 37)."""
    if save >= 2 * mean:
        return mean
    x = save / (2 * mean)
    return math.sqrt(2 * save * mean) * (1 + math.sqrt(x) / 3 + x / 9) - save


def lost(save: float, every: float, mean: float, restart: float) -> float:
    """The part of all time that saving, repeating half of what lies between two checkpoints, and
    starting again take."""
    return save / (every + save) + (every / 2 + restart) / mean


def block_rate(config: GPTConfig, rows: int, dev: Device) -> float:
    """FLOP/s of forward and backward passes of `rows` sequences through two blocks of a model on
    this machine: measured for a few seconds, not compiled."""
    model = build_model(replace(config, n_layer=2), 0, dev.name)
    ids = torch.zeros(rows, config.block_size, dtype=torch.long, device=dev.name)

    def step():
        with dev.autocast():
            model(ids, ids).backward()
        dev.synchronize()
    times = timeit.repeat(step, number=1, repeat=2)     # the first is slower
    times = timeit.repeat(step, number=1, repeat=max(3, math.ceil(2 / min(times))))
    return flops_per_token(model) * ids.numel() / statistics.median(times)
