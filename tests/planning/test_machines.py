"""GPUs: rates, energy, failures and checkpoints, by hand."""
import math

import pytest
from conftest import stopped

from core.device import PEAK_TFLOPS
from core.planning import machines
from core.planning.machines import GPUS


def test_data_sheets_are_known():
    for gpu in GPUS.values():
        assert gpu.peak == PEAK_TFLOPS[gpu.name] * 1e12 and gpu.link >= gpu.network
    assert {gpu for gpu, *_ in machines.MFU} <= set(GPUS)


def test_names(capsys):
    assert machines.find_gpu('H100') == machines.find_gpu('h100') == GPUS['h100']
    assert machines.find_gpu('RTX 4090') == machines.find_gpu('rtx4090') == GPUS['4090']
    assert stopped(capsys, lambda: machines.find_gpu('h900')).startswith(
        'gpu=h900: is not known; choose one of b200, ')


def test_mfu_is_that_of_the_nearest_measurement():
    assert machines.expected_mfu(GPUS['h100'], 7e9)[0] == 0.36
    assert machines.expected_mfu(GPUS['a100'], 1e9)[0] == 0.33
    part, source = machines.expected_mfu(GPUS['l40s'], 124e6)
    assert part == 0.40 and source.endswith('measured on an H100, not on L40S')


def test_mfu_is_what_the_sources_say():
    """llm.c's 468,000 tokens a second of 854.65 MFLOP; three quarters of Narayanan's TFLOP/s."""
    assert 468_000 * 854.65e6 / GPUS['h100'].peak == pytest.approx(0.40, abs=0.01)
    for N, tflops in ((1.7e9, 137), (18.4e9, 135), (145.6e9, 148)):
        assert machines.expected_mfu(GPUS['a100'], N)[0] == pytest.approx(
            tflops * 0.75 / 312, abs=0.005)


def test_energy_by_hand():
    """10 hours of an H100: 700 W x 0.7 x 1.1, and 1,275 W (an eighth of 10.2 kW) x 1.5."""
    assert machines.energy(GPUS['h100'], 10) == pytest.approx((5.39, 19.125))


def test_failures_by_hand():
    """16,384 GPUs failed 419 times in 54 days: every 3.1 hours."""
    assert machines.between_failures(16_384) == pytest.approx(3.093, abs=1e-3)
    assert machines.between_failures(8) == pytest.approx(6334.6, abs=0.1)


def test_the_best_interval_is_the_best():
    """Daly's is where the expected loss is least, and near Young's sqrt(2 x 1 x 200) = 20."""
    save, mean = 1.0, 200.0
    best = machines.save_every(save, mean)
    assert best == pytest.approx(20 * (1 + math.sqrt(1 / 400) / 3 + 1 / 400 / 9) - 1)
    at = machines.lost(save, best, mean, 0)
    assert at == pytest.approx(1 / (best + 1) + best / 400)
    for factor in (0.5, 0.8, 1.25, 2):
        assert machines.lost(save, best * factor, mean, 0) > at
    assert machines.save_every(500, 200) == 200     # saving takes longer than work lasts
