"""core/device.py: what is chosen on a CPU and why, and what is refused."""
import ctypes
import io
import math
import os
import platform
import resource

import pytest
import torch
from conftest import stopped

from core import device as hardware
from core.device import (
    DTYPES,
    PEAK_TFLOPS,
    Device,
    choose,
    choose_compile,
    choose_dtype,
    fit_micro_batch,
    peak_flops,
)

GB = 1 << 30


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch):
    """As on a machine without a GPU, whatever this one has; thread count restored."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def processor(monkeypatch, **fields) -> None:
    monkeypatch.setattr(hardware, 'cpu_info',
                        lambda field: fields.get(field.replace(' ', '_'), ''))


def test_choice_on_a_cpu(monkeypatch):
    processor(monkeypatch, model_name='Some CPU', flags='fpu avx2')
    chosen = choose(compile=False, threads=1)
    assert (chosen.name, chosen.kind, chosen.dtype, chosen.compile) == (
        'cpu', 'cpu', 'float32', False)
    assert chosen.peak_flops == 0
    device, dtype, compile, peak = chosen.why
    assert device == 'device cpu (Some CPU, no GPU found, 1 threads)'
    assert dtype.startswith('dtype float32 (') and 'bfloat16' in dtype
    assert compile == 'compile off (as asked)'
    assert peak.startswith('peak unknown')


@pytest.mark.parametrize('flags,vendor,trains_in,why', [
    ('fpu avx512_bf16 sse', 'AuthenticAMD', 'bfloat16', 'twice the speed'),
    ('fpu avx512_bf16 sse', 'GenuineIntel', 'float32', 'slow or missing'),
    ('avx512_bf16 amx_bf16', 'GenuineIntel', 'bfloat16', 'AMX'),
    ('fpu avx512f', 'AuthenticAMD', 'float32', 'slow or missing'),
    ('avx512_bf16_not', 'AuthenticAMD', 'float32', 'slow or missing'),
    ('', '', 'float32', 'slow or missing')])
def test_dtype_on_a_cpu(monkeypatch, flags, vendor, trains_in, why):
    """A rule decides, no stopwatch: so a busy machine chooses what an idle one does."""
    processor(monkeypatch, flags=flags, vendor_id=vendor)
    monkeypatch.setattr(hardware, 'timeit', None)
    assert choose(compile=False, threads=1).dtype == trains_in
    assert choose(compile=False, threads=1, training=False).dtype == 'float32'
    assert choose(dtype='float32', compile=False, threads=1).dtype == 'float32'
    chosen = choose(compile=False, threads=1).why
    assert platform.machine() in chosen[0]  # it has no name
    assert why in chosen[1]


def test_cpu_info(monkeypatch):
    lines = 'processor\t: 0\nmodel name\t: Some CPU: fast\nmodel name\t: Other\nflags\t: a b\n'
    monkeypatch.setattr('builtins.open', lambda *_: io.StringIO(lines))
    assert hardware.cpu_info('model name') == 'Some CPU: fast'
    assert hardware.cpu_info('flags') == 'a b' and hardware.cpu_info('Features') == ''

    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr('builtins.open', missing)
    assert hardware.cpu_info('model name') == ''


def test_as_asked():
    chosen = choose('cpu', 'bfloat16', threads=1)
    assert chosen.dtype == 'bfloat16'
    assert 'as asked' in chosen.why[0] and chosen.why[1] == 'dtype bfloat16 (as asked)'


def test_threads(monkeypatch):
    torch.set_num_threads(1)
    assert '1 threads' in choose(compile=False).why[0]  # torch's own choice
    assert '2 threads' in choose(compile=False, threads=2).why[0]
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(hardware, 'cpu_count', lambda: 7)  # shared out among processes
    assert '2 threads' in choose(compile=False, local_world=3).why[0]
    assert '1 threads' in choose(compile=False, local_world=8).why[0]
    assert '3 threads' in choose(compile=False, threads=3, local_world=8).why[0]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='glibc only')
def test_freed_memory_is_kept():
    """A tensor takes the pages of a larger one before it: none has to be cleared."""
    choose(compile=False, threads=1)
    torch.ones(17 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)    # 64 MiB: 16,384 pages
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000


@pytest.mark.parametrize('settings,parts', [
    ({'device': 'cuda'}, ['device=cuda: ', 'no CUDA GPU', '--device=cpu']),
    ({'device': 'cuda:1'}, ['device=cuda:1: ', 'no CUDA GPU', '--device=cpu']),
    ({'device': 'mps'}, ['device=mps: ', 'no Apple GPU', '--device=cpu']),
    ({'device': 'tpu'}, ['device=tpu: ', 'must be cuda, cuda:<number>, mps or cpu']),
    ({'device': 'cuda:x'}, ['device=cuda:x: ', 'must be cuda, cuda:<number>, mps or cpu']),
    ({'device': 'CPU'}, ['device=CPU: ', 'must be']),
    ({'dtype': 'fp32'}, ['dtype=fp32: ', 'float32, tf32, bfloat16, float16']),
    ({'dtype': 'float16'}, ['dtype=float16: ', 'CPU', 'use float32 or bfloat16'])])
def test_refused(capsys, settings, parts):
    message = stopped(capsys, lambda: choose(compile=False, threads=1, **settings))
    assert message.startswith(parts[0])
    for part in parts[1:]:
        assert part in message, message


def test_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda number: f'GPU {number}')
    assert hardware.choose_device('', 1) == ('cuda', 'cuda:1', 'GPU 1, found')
    assert hardware.choose_device('cuda:0', 1) == ('cuda', 'cuda:0', 'GPU 0, as asked')
    for device, local_rank in (('cuda:2', 0), ('cuda', 2), ('', 2)):
        message = stopped(capsys, lambda d=device, r=local_rank: hardware.choose_device(d, r))
        assert 'no GPU 2, only 2' in message


def test_dtype_of_each_kind(monkeypatch):
    for supported, name in ((True, 'bfloat16'), (False, 'float16')):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda s=supported, **_: s)
        dtype, why = choose_dtype('cuda', '', True)
        assert dtype == name and 'this GPU' in why
    assert choose_dtype('mps', '', True)[0] == 'float32'
    assert choose_dtype('cuda', 'float16', True) == ('float16', 'as asked')
    assert set(DTYPES) == {'float32', 'tf32', 'bfloat16', 'float16'}


def test_compile(monkeypatch):
    """A small function is tried first, so that a machine without a compiler trains uncompiled."""
    hardware.no_compiler.cache_clear()
    assert choose_compile('cpu', 'cpu', False) == (False, 'as asked')
    assert choose_compile('mps', 'mps', True)[0] is False
    tried = []
    monkeypatch.setattr(torch, 'compile', lambda f, options: (
        lambda x: tried.append(x.device.type) or f(x)))
    with torch.compiler.set_stance('force_eager'):      # as in evaluation: it is compiled even so
        assert choose_compile('cpu', 'cpu', True)[0] is True and tried == ['cpu']
    for intel in (True, False):     # steps of a single row, which others' MKL is slow for
        monkeypatch.setattr(hardware, 'is_intel', lambda value=intel: value)
        compiled, _ = choose_compile('cpu', 'cpu', True, 'float32', training=False)
        assert compiled == (intel or not torch.backends.mkl.is_available())
        assert not choose_compile('cpu', 'cpu', True, 'bfloat16', training=False)[0]

    def no_compiler(f, options):
        raise RuntimeError('no working C++ compiler found\n\nset TORCHDYNAMO_VERBOSE=1')

    monkeypatch.setattr(torch, 'compile', no_compiler)
    hardware.no_compiler.cache_clear()
    assert choose_compile('cpu', 'cpu', True) == (
        False, 'it fails on this machine: RuntimeError: no working C++ compiler found')
    hardware.no_compiler.cache_clear()


def test_autocast():
    a = torch.ones(2, 2)
    for name in ('float32', 'bfloat16'):
        device = Device('cpu', 'cpu', name, False, 1.0, [])
        with device.autocast():
            assert (a @ a).dtype == DTYPES[name]
        device.synchronize()


# ---------------------------------------------------------------------------------------------
# Micro-batches


def memory(monkeypatch, size: int) -> None:
    monkeypatch.setattr(os, 'sysconf', {'SC_PAGE_SIZE': 4096, 'SC_PHYS_PAGES': size // 4096}.get)


def test_micro_batches_are_even_and_fit(monkeypatch):
    device = Device('cpu', 'cpu', 'float32', False, 1.0, [])
    per_row = 64 * 4 * 128 * 73  # bytes, as the docstring says
    for rows in (1, 2, 3, 5, 8, 100):  # that fit half of the memory
        memory(monkeypatch, 2 * rows * per_row + 8192)
        for per_rank in range(1, 70):
            micro = fit_micro_batch(device, per_rank, 64, 4, 128)
            assert 1 <= micro <= min(per_rank, rows)
            n = math.ceil(per_rank / micro)
            assert n == math.ceil(per_rank / rows)  # no more passes than needed
            assert n * micro - per_rank < n  # and none more than a row short of full
            if rows & (rows - 1) == 0 and per_rank % rows == 0:
                assert per_rank % micro == 0


def test_micro_batch_limits(monkeypatch):
    device = Device('cpu', 'cpu', 'float32', False, 1.0, [])
    half = Device('cpu', 'cpu', 'bfloat16', False, 1.0, [])
    memory(monkeypatch, 1 << 50)
    assert fit_micro_batch(device, 480, 1024, 12, 768) == 32  # at most 32,768 tokens
    assert fit_micro_batch(device, 5, 100_000, 12, 768) == 1
    memory(monkeypatch, 8192)
    assert fit_micro_batch(device, 480, 1024, 12, 768) == 1  # never 0
    memory(monkeypatch, 2 * 10 * 1024 * 12 * 768 * 73)
    assert fit_micro_batch(device, 1000, 1024, 12, 768) == 10
    assert fit_micro_batch(half, 1000, 1024, 12, 768) > 10
    assert fit_micro_batch(device, 1000, 1024, 12, 768, local_world=5) == 2


# ---------------------------------------------------------------------------------------------
# The peak


@pytest.mark.parametrize('name,tflops', [
    ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA A100-SXM4-40GB', 312),
    ('NVIDIA L40S', 362), ('NVIDIA L4', 121), ('Tesla T4', 65), ('NVIDIA GH200 480GB', 989),
    ('NVIDIA GeForce RTX 4090', 165)])
def test_peak_from_the_data_sheet(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _: name)
    assert peak_flops('cuda', 'cuda:0', 'bfloat16') == tflops * 1e12
    assert peak_flops('cuda', 'cuda:0', 'float32') == 0


def test_no_peak_is_guessed(monkeypatch):
    """What is not in the table has none: an L40 is no L4, a T400 no T4, and a CPU is not timed."""
    for name in ('NVIDIA L40', 'NVIDIA T400', 'Unknown'):
        assert name not in PEAK_TFLOPS
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _, name=name: name)
        assert peak_flops('cuda', 'cuda:0', 'bfloat16') == 0
    assert peak_flops('cpu', 'cpu', 'float32') == peak_flops('mps', 'mps', 'float32') == 0


# ---------------------------------------------------------------------------------------------
# What several ranks choose


def chosen_on(*ranks) -> list[Device]:
    """What each rank has after agreeing; of each: (kind, dtype, compile)."""
    devices = [Device(kind, kind, dtype, compile, 1e12, ['', f'dtype {dtype}', 'compile'])
               for kind, dtype, compile in ranks]
    told = [[device.kind, device.dtype, device.compile] for device in devices]
    return [hardware.agree(device, lambda _: told) for device in devices]


@pytest.mark.parametrize('dtypes,agreed', [
    (('bfloat16', 'bfloat16'), 'bfloat16'), (('bfloat16', 'float32'), 'float32'),
    (('float16', 'bfloat16'), 'float16'), (('float16', 'bfloat16', 'float32'), 'float32'),
    (('float16', 'float32'), 'float32')])
def test_ranks_agree_on_a_dtype(dtypes, agreed):
    """One that all can compute: else their gradients would have different scales."""
    for device in chosen_on(*(('cuda', dtype, True) for dtype in dtypes)):
        assert device.dtype == agreed and device.compile
        assert agreed in device.why[1] and device.why[1].count('choose') == (len(set(dtypes)) > 1)
        assert device.peak_flops == (0 if len(set(dtypes)) > 1 else 1e12)


def test_ranks_agree_on_compiling_and_on_the_kind_of_device(capsys):
    devices = chosen_on(('cpu', 'float32', True), ('cpu', 'float32', False))
    assert [device.compile for device in devices] == [False, False]
    assert 'another rank' in devices[0].why[2] and devices[1].why[2] == 'compile'
    assert 'cpu, cuda' in stopped(capsys, lambda: chosen_on(('cuda', 'float16', True),
                                                           ('cpu', 'float32', True)))
