"""The printed choice of device, dtype, compile and threads; this hardware's peak FLOP/s."""
import contextlib
import ctypes
import functools
import math
import os
import platform
import sys
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from core.settings import stop, warn

warn_once = functools.cache(warn)

DTYPES = {'float32': torch.float32, 'tf32': torch.float32, 'bfloat16': torch.bfloat16,
          'float16': torch.float16}

# Dense bf16 / fp16 tensor-core peaks in TFLOP/s, from the makers' data sheets.
PEAK_TFLOPS = {'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'GH200': 989, 'A100': 312,
               'A6000': 155, 'A10G': 70, 'L40S': 362, 'L4': 121, 'RTX 5090': 210, 'RTX 4090': 165,
               'RTX 3090': 71, 'V100': 125, 'T4': 65}


@dataclass
class Device:
    """What was chosen, and why."""
    name: str               # as torch knows it: cuda:0, mps, cpu
    kind: str               # cuda, mps or cpu
    dtype: str              # of the matrix products; weights are always fp32 masters
    compile: bool
    peak_flops: float       # per second, of matrix products in dtype, by the data sheet; 0: unknown
    why: list[str]          # a line for each choice

    def autocast(self, cache: bool = True):
        """The context of a forward pass. `cache`: keep weights in 16 bits until its end, for layers
        that use them again."""
        if DTYPES[self.dtype] == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.kind, DTYPES[self.dtype], cache_enabled=cache)

    @property
    def sums(self) -> torch.dtype:
        """In which losses and squares are added up; Apple's GPUs have no float64."""
        return torch.float32 if self.kind == 'mps' else torch.float64

    def synchronize(self) -> None:
        """Wait for the device, before the clock is read."""
        if self.kind != 'cpu':
            getattr(torch, self.kind).synchronize()


def choose(device: str = '', dtype: str = '', compile: bool = True, threads: int = 0, *,
           local_rank: int = 0, local_world: int = 1, training: bool = True,
           quantized: bool = False) -> Device:
    """Decide what the settings leave open ('' or 0), for training, or for decoding with weights
    that may be quantized. Stops if they ask for a device or dtype that this machine lacks."""
    kind, name, why = choose_device(device, local_rank)
    if kind == 'cpu':
        threads = threads or (torch.get_num_threads() if local_world == 1
                              else max(1, cpu_count() // local_world))
        torch.set_num_threads(threads)
        keep_freed_memory()
        why += f', {threads} threads'
        if os.environ.get('OMP_WAIT_POLICY') == 'PASSIVE':
            why += ' that sleep while they wait'
    if kind == 'cuda':
        torch.cuda.set_device(name)
    dtype, dtype_why = choose_dtype(kind, dtype, training)
    torch.set_float32_matmul_precision('high' if dtype == 'tf32' else 'highest')
    compile, compile_why = choose_compile(kind, name, compile, dtype, training, quantized)
    # Compiled for a CPU, the backward pass of an embedding adds in whatever order threads come,
    # unless told not to, which is no slower. Eager training is deterministic anyway; there the
    # switch would cost the second in which it imports the compiler.
    deterministic = kind == 'cpu' and compile
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore  # a property
    peak = peak_flops(kind, name, dtype)
    return Device(name, kind, dtype, compile, peak,
                  [f'device {name} ({why})', f'dtype {dtype} ({dtype_why})',
                   f'compile {"on" if compile else "off"} ({compile_why})',
                   f'peak {peak / 1e12:.3g} TFLOP/s (data sheet)' if peak else
                   'peak unknown: no MFU is given (bench.py train measures it)'])


def agree(device: Device, exchange: Callable) -> Device:
    """The same device, with the dtype and compile that all ranks have in common: gradients of
    different scales cannot be added. `exchange(value)` gives the values of all ranks. Stops if some
    have a GPU and others none."""
    found = exchange([device.kind, device.dtype, device.compile])
    kinds, dtypes = {kind for kind, _, _ in found}, {dtype for _, dtype, _ in found}
    if len(kinds) > 1:
        stop(f'the ranks have different devices ({", ".join(sorted(kinds))}); give one that all '
             'have, such as --device=cpu')
    if len(dtypes) > 1:     # what a GPU without bfloat16 can do, every other GPU can, too
        dtype = 'float16' if dtypes == {'float16', 'bfloat16'} else 'float32'
        device.why[1] = f'dtype {dtype} (the ranks would choose {" and ".join(sorted(dtypes))})'
        device = replace(device, dtype=dtype, peak_flops=0.0)
    if device.compile and not all(compile for _, _, compile in found):
        device.why[2] = 'compile off (it fails on another rank)'
        device = replace(device, compile=False)
    return device


def with_dtype(device: Device, dtype: str) -> Device:
    """The same device with the dtype of a run that is resumed. Stops if it lacks that."""
    choose_dtype(device.kind, dtype, True)
    torch.set_float32_matmul_precision('high' if dtype == 'tf32' else 'highest')
    device.why[1] = f'dtype {dtype} (with which the run was begun)'
    return replace(device, dtype=dtype, peak_flops=peak_flops(device.kind, device.name, dtype))


def choose_device(device: str, local_rank: int) -> tuple[str, str, str]:
    """Kind, full name and reason."""
    has_mps, why = torch.backends.mps.is_available(), 'as asked'
    if not device:
        device = 'cuda' if torch.cuda.is_available() else 'mps' if has_mps else 'cpu'
        why = 'no GPU found' if device == 'cpu' else 'found'
    kind, _, index = device.partition(':')
    if kind not in ('cuda', 'mps', 'cpu') or (index and not index.isdigit()):
        stop(f'device={device}: must be cuda, cuda:<number>, mps or cpu')
    if kind == 'cuda':
        if not torch.cuda.is_available():
            stop(f'device={device}: this machine, or its torch {torch.__version__}, has no CUDA '
                 'GPU; use --device=cpu, or install a CUDA build of torch')
        number = int(index or local_rank)
        if number >= torch.cuda.device_count():
            stop(f'device={device}: there is no GPU {number}, only {torch.cuda.device_count()}')
        return kind, f'cuda:{number}', f'{torch.cuda.get_device_name(number)}, {why}'
    if kind == 'mps' and not has_mps:
        stop(f'device={device}: this machine has no Apple GPU; use --device=cpu')
    return kind, kind, f'{cpu_info("model name") or platform.machine()}, {why}'


def cpu_count() -> int:
    """The cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_info(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; '' where there is none."""
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':', 1)[1].strip() for line in f if line.startswith(field))
    except (OSError, StopIteration):
        return ''


def choose_dtype(kind: str, dtype: str, training: bool) -> tuple[str, str]:
    """Name and reason."""
    if dtype and dtype not in DTYPES:
        stop(f'dtype={dtype}: must be one of {", ".join(DTYPES)}')
    if dtype:
        if dtype in ('float16', 'tf32') and kind == 'cpu':
            stop(f'dtype={dtype}: not for a CPU; use float32 or bfloat16')
        return dtype, 'as asked'
    if kind == 'cuda':
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return 'bfloat16', 'this GPU computes it'
        return 'float16', 'this GPU has no bfloat16; gradients are scaled'
    if kind == 'mps':
        return 'float32', 'mixed precision is untested on Apple GPUs'
    if not training:
        return 'float32', 'on a CPU, the fastest for one row at a time'
    if why := fast_bfloat16():
        return 'bfloat16', why
    return 'float32', 'faster on this CPU, whose instructions for bfloat16 are slow or missing'


def fast_bfloat16() -> str:
    """Why this CPU multiplies bfloat16 faster than float32; '' if it does not.

    A rule: on a busy machine, measurements would choose differently from start to start. With
    matrices of 1,024 x 1,024 bfloat16 is 4 times as fast on an Intel Xeon with AMX, twice on AMD's
    Zen 4, half as fast on an Intel Xeon with AVX-512 alone.
    """
    flags = cpu_info('flags').split()
    if 'amx_bf16' in flags:
        return 'this CPU multiplies it in its matrix unit, AMX'
    if 'avx512_bf16' in flags and not is_intel():
        return 'this CPU multiplies it at twice the speed of float32'
    return ''


def main_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def keep_freed_memory(keep: bool = True) -> None:
    """Have glibc keep freed memory for the next tensor, instead of asking the kernel for cleared
    pages each time: a tenth of a step of GPT-2."""
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        libc.mallopt(-3, 1 << (30 if keep else 17))     # M_MMAP_THRESHOLD: larger ones are mapped
        libc.mallopt(-1, -1)                            # M_TRIM_THRESHOLD: none
        keep_freed_memory.on = keep


keep_freed_memory.on = False


@contextlib.contextmanager
def freed_at_once():
    """Do not keep freed memory for a while. Thousands of large tensors, each freed before the next,
    would leave a heap as large as all of them, and a process with so many addresses cannot fork."""
    if not keep_freed_memory.on:
        yield
        return
    keep_freed_memory(False)
    try:
        yield
    finally:
        keep_freed_memory()


def is_intel() -> bool:
    """Whether the processor is Intel's, for which MKL is made."""
    return cpu_info('vendor_id') == 'GenuineIntel'


def choose_compile(kind: str, name: str, compile: bool, dtype: str = 'float32',
                   training: bool = True, quantized: bool = False) -> tuple[bool, str]:
    """Whether torch.compile is used, and why: a small function is compiled to see if it works."""
    if not compile:
        return False, 'as asked'
    if kind == 'mps':
        return False, 'not dependable on Apple GPUs yet'
    if not training and DTYPES[dtype] != torch.float32:
        return False, f'to decode in {dtype}, it would convert all weights again for each token'
    if not training and not quantized and kind == 'cpu' and torch.backends.mkl.is_available() \
            and not is_intel():
        return False, 'it would leave single rows to MKL, which is slow for them on this CPU'
    if why := no_compiler(kind, name):
        return False, f'it fails on this machine: {why}'
    return True, 'the first step takes a while'


@functools.cache
def no_compiler(kind: str, name: str) -> str:
    """What goes wrong when a small function is compiled for a device; '' if nothing does."""
    try:
        torch.compiler.assume_constant_result(has_flex)     # Dynamo does not trace it
        with torch.compiler.set_stance('default'):      # also where all else runs eagerly
            torch.compile(lambda x: x.sin() + 1, options=compile_options(kind))(
                torch.ones(8, device=name))
    except Exception as e:  # whatever compilers and drivers raise: eager mode needs none of them
        lines = str(e).strip().splitlines() or ['']
        return f'{type(e).__name__}: {lines[0]}'
    return ''


def has_flex(device: torch.device, head_dim: int) -> bool:
    """Whether a GPU's flex-attention takes heads of head_dim channels; says why not."""
    if why := 'head_dim is below 16' if head_dim < 16 else no_compiler('cuda', str(device)):
        warn_once(f'no flex-attention ({why}): the masks of documents and windows cost more memory')
    return not why


def compile_options(kind: str) -> dict:
    """Options of torch.compile: on a CPU, C++ also calls the kernels, which saves small models 1 to
    3% of a step or token, and dropout's random numbers are drawn by torch, in less than half of
    the time that a graph's own take."""
    return dict.fromkeys(('cpp_wrapper', 'fallback_random'), kind == 'cpu')


def fit_micro_batch(device: Device, per_rank: int, block_size: int, n_layer: int, n_embd: int,
                    *, local_world: int = 1, lasting: int = 0, recompute: bool = False) -> int:
    """Rows per forward pass: what fits half of this process's memory, and four fifths of what is
    free beside `lasting` bytes of gradients and moments, at most 32,768 tokens; so that the
    micro-batches of a step are equally large.

    Activations take about 73 bytes per token, layer and channel in fp32, 40 with 16-bit products.
    Where blocks recompute theirs, it is those of one, and 4 for the input of each.
    """
    if device.kind == 'cuda':
        free, memory = torch.cuda.mem_get_info(device.name)     # the weights are there already
        lasting += 12 << 27     # logits of a chunk of the loss (model.CHUNK_ELEMENTS), gradients
    else:
        free = memory = main_memory() // local_world
    each = 73 if DTYPES[device.dtype] == torch.float32 else 40
    per_row = block_size * n_embd * (each + 4 * n_layer if recompute else each * n_layer)
    most = min(memory // 2, (free - lasting) * 4 // 5) // per_row
    return math.ceil(per_rank / math.ceil(per_rank / max(1, min(most, 32_768 // block_size))))


def peak_flops(kind: str, name: str, dtype: str) -> float:
    """FLOP/s of matrix products in a 16-bit dtype, from the data sheet; 0 where none is known."""
    if kind == 'cuda' and DTYPES[dtype] != torch.float32:
        words = f' {torch.cuda.get_device_name(name)} '.replace('-', ' ')
        for key, tflops in PEAK_TFLOPS.items():
            if f' {key} ' in words:
                return tflops * 1e12
    return 0.0


def matmul_rate(name: str, dtype: str, size: int) -> float:
    """FLOP/s of a product of two square matrices in dtype, the best of 20."""
    a = torch.ones(size, size, device=name, dtype=DTYPES[dtype])
    return 2 * size ** 3 / min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=20))


def bandwidth(name: str) -> float:
    """Bytes per second that are read from memory: the best of 20 sums of half a gigabyte."""
    a = torch.ones(1 << 27, device=name)
    return a.nbytes / min(timeit.repeat(lambda: a.sum().item(), number=1, repeat=20))
