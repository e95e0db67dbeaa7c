"""Speed and memory, measured: python bench.py train [config] [--vs=<checkout of nanoGPT>].

train      whole training steps (forward, backward, clipping, optimizer) of a preset on ready-made
           random batches. --vs: nanoGPT trains its own model of the same shape on the same batches
memory     the most that tensors take in such a step, weights, gradients and optimizer included;
           --vs as above
decode     new tokens after a prompt, one by one, with the KV cache, eager and compiled.
           --vs=transformers: its generate with the same weights
runs       python bench.py runs out/*: draws the losses of runs over steps, tokens, seconds, FLOPs

What a machine can do is measured, too, by one large product of matrices and by reading memory, and
speeds come as fractions of it (MFU, MBU). Sides take turns, round by round, after warm-up: median
and spread. A peer runs in a process of its own, for ours sets much for its process; only memory is
counted in one. Presets and flags may set whatever train.py knows. In a pipe or a file the last line
is JSON.
"""
import core.threads  # noqa: F401  it comes first, before torch

# isort: split
import functools
import gc
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from core import device as hardware
from core.data import named
from core.data.chosen import get_data
from core.formats import hf
from core.net import optim
from core.net.engine import generate
from core.net.weights import build_model
from core.ranks import parallel
from core.ranks.processes import Ranks, share
from core.run.begin import (
    build_optimizers,
    check_settings,
    from_model,
    model_config,
    tokenizer_wanted,
)
from core.run.learner import Learner
from core.run.log import draw as draw_figure
from core.run.log import read_log
from core.settings import check_bounds, check_choice, configure, read_settings, stop
from core.text import tokenizer as tokenizers
from model import count_parameters, flops_per_token
from train import train_step

POSITIONAL = ('what', 'folders')
TRAIN = Path(__file__).with_name('train.py')     # whose settings presets and flags may set

what = 'train'              # train, memory, decode or runs
folders = ''                # runs: the run directories
vs = ''                     # the peer: a checkout of nanoGPT, or transformers
rounds = 5                  # times that each side is measured
steps = 20                  # train: training steps in a round
warmup = 5                  # train: steps before the first round
profile = False             # train, decode: a trace for chrome://tracing, and the costliest lines
plot = False                # draw what was measured: out/bench-<what>.png
prompt_tokens = 64          # decode: tokens in a prompt
new_tokens = 128            # decode: tokens that are generated
rows = 1                    # decode: prompts at a time


# ---------------------------------------------------------------------------------------------
# What they share


def choose_device(preset) -> hardware.Device:
    """The device as train.py chooses it, its limits measured; prints all."""
    dev = hardware.choose(preset.device, preset.dtype, preset.compile, preset.threads)
    dev.peak_flops = hardware.matmul_rate(dev.name, dev.dtype, 2048 if dev.kind == 'cpu' else 8192)
    dev.why[3] = f'matrix products {dev.peak_flops / 1e12:.3g} TFLOP/s (measured, the limit of MFU)'
    print(*dev.why, sep='\n')
    return dev


def our_config(preset, data: Path | None = None):
    """The architecture that the settings describe, and how many tokens it is for: those of the
    dataset in `data`; without it, as many as its tokenizer is known to have."""
    known = preset.vocab_size
    if not (known or data):
        known = named.count_tokens(preset.dataset, tokenizer_wanted(preset), 0)
    known = known or len(tokenizers.load((data or get_data(preset, Ranks())[0]) / 'tokenizer.json'))
    return model_config(preset, known), known


def our_learner(preset, config, dev, seed: int) -> Learner:
    """Our model with all that trains it, as train.py puts it together."""
    model, ranks = build_model(config, seed, dev.name), Ranks()
    trained, _ = parallel.wrap(model, ranks, dev, 1, 1)
    return Learner(model, trained, build_optimizers(preset, model, dev, ranks),
                   optim.LossScale(dev.dtype == 'float16'), dev, ranks, preset.grad_clip,
                   seed if preset.dropout else None)


def our_step(learner: Learner):
    """A function that does one training step on a list of micro-batches."""
    return lambda batches: train_step(learner, batches, 0, 1.0)


def nanogpt_like(preset, config, compiled: bool):
    """nanoGPT's model of the same shape, trained with the same settings in the same dtype."""
    from dev import peers
    return peers.NanoRecipe(
        config.n_layer, config.n_head, config.n_embd, config.block_size, preset.batch_size,
        preset.max_steps, config.dropout, config.bias, preset.learning_rate, preset.warmup_steps,
        preset.weight_decay, preset.beta2, preset.grad_clip, compiled, True)


def rows_at_once(preset, config, dev) -> int:
    """Sequences in a micro-batch, as train.py chooses it."""
    return preset.micro_batch_size or hardware.fit_micro_batch(
        dev, preset.batch_size, config.block_size, config.n_layer, config.n_embd)


def random_batches(preset, config, known: int, dev) -> list[tuple]:
    """Micro-batches of one step: random ids, which cost as much as any."""
    at_once = rows_at_once(preset, config, dev)
    generator = torch.Generator().manual_seed(preset.seed)
    shapes = [(len(samples), config.block_size)
              for samples in share(0, preset.batch_size, 0, 1, at_once)]
    documents = preset.pack_documents    # one in each row: the most work
    return [(torch.randint(known, shape, generator=generator),
             torch.randint(known, shape, generator=generator),
             torch.zeros(shape, dtype=torch.long) if documents else None) for shape in shapes]


def seconds_of(run, dev, *args) -> float:
    """Wall time of run(*args), the device's work included."""
    dev.synchronize()
    began = time.perf_counter()
    run(*args)
    dev.synchronize()
    return time.perf_counter() - began


def in_turn(sides: dict, dev, *args) -> dict[str, list[float]]:
    """Seconds of each of the functions in `sides`, so many rounds, one after the other in each."""
    times = {name: [] for name in sides}
    for _ in tqdm(range(rounds), unit='round', leave=False, disable=rounds < 3):
        for name, run in sides.items():
            times[name].append(seconds_of(run, dev, *args))
    return times


def spread(found: list[float], digits: int = 0) -> str:
    """Median and range."""
    return (f'{statistics.median(found):,.{digits}f} (median of {len(found)}; '
            f'{min(found):,.{digits}f} to {max(found):,.{digits}f})')


def ratio_of(times: dict, peer: str, name: str = 'ours') -> dict:
    """How many times as fast as the peer a side of ours is, from rounds in turn; prints it."""
    ratios = [theirs / ours for ours, theirs in zip(times[name], times[peer])]
    print(f'{name} is {spread(ratios, 2)} times as fast as {peer}')
    return {f'{peer}_ratio{name.removeprefix("ours")}': round(statistics.median(ratios), 3)}


def write_profile(run) -> None:
    """Run once under torch.profiler: the trace goes to a file, the ten costliest lines to the
    screen."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        run()
    path = output(f'{what}-trace.json')
    found.export_chrome_trace(str(path))
    by = 'self_cuda_time_total' if torch.cuda.is_available() else 'self_cpu_time_total'
    print(found.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60))
    print(f'the trace is in {path}')


def output(name: str) -> Path:
    """The place of a file that is written beside the runs."""
    Path('out').mkdir(exist_ok=True)
    return Path('out') / f'bench-{name}'


def draw(name: str, panels: list[tuple[str, str, dict]]) -> None:
    """Write a picture with a panel for each (label of x, label of y, {name of a line: (x, y)})."""
    def fill(figure):
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (x_label, y_label, lines) in zip(places, panels):
            for label, (x, y) in lines.items():
                axes.plot(x, y, '.-', label=label, markersize=4)
            axes.set(xlabel=x_label, ylabel=y_label)
            axes.grid(alpha=0.3)
            axes.legend()
    path = output(name + '.png')
    if draw_figure(path, fill, figsize=(6 * len(panels), 4.5), layout='constrained'):
        print(f'drawn in {path}')


def draw_speeds(times: dict[str, list[float]], n_tokens: int) -> None:
    """Draw the tokens per second of each side, from its seconds for so many in each round."""
    draw(what, [('round', 'tokens per second', {
        name: (range(rounds), [n_tokens / seconds for seconds in found])
        for name, found in times.items()})])


# ---------------------------------------------------------------------------------------------
# Training steps


def bench_train(preset) -> dict:
    """Tokens per second and MFU of training steps; of nanoGPT's too, and the ratio."""
    dev = choose_device(preset)
    config, known = our_config(preset)
    batches = random_batches(preset, config, known, dev)
    learner = our_learner(preset, config, dev, preset.seed)
    step, flops = our_step(learner), {'ours': flops_per_token(learner.model)}
    sides = {'ours': lambda n: [step(batches) for _ in range(n)]}
    n_parameters = count_parameters(learner.model)
    for name, compiled in (('nanogpt_eager', False), ('nanogpt_compiled', True)):
        if vs and compiled <= dev.compile:
            from dev import peers
            recipe = nanogpt_like(preset, config, compiled)
            sides[name] = peers.Apart(peers.nanogpt_steps, vs, recipe, config.vocab_size, dev,
                                      batches)
            found, flops[name] = sides[name](0)
            check_size(found, n_parameters)
    tokens = preset.batch_size * config.block_size
    print(f'{n_parameters:,} parameters, {tokens:,} tokens a step in {len(batches)} micro-batches; '
          f'{rounds} rounds of {steps} steps')
    compiling = {name: seconds_of(run, dev, 1) for name, run in sides.items()}
    for run in sides.values():
        run(warmup)
    times = in_turn(sides, dev, steps)
    result = {'what': 'train', 'device': dev.why, 'parameters': n_parameters,
              'tokens_per_step': tokens, 'torch': torch.__version__,
              'matmul_tflops': round(dev.peak_flops / 1e12, 3)}
    for name, found in times.items():
        speeds = [tokens * steps / seconds for seconds in found]
        mfu = statistics.median(speeds) * flops[name] / dev.peak_flops
        result |= {f'{name}_tokens_per_second': round(statistics.median(speeds)),
                   f'{name}_mfu': round(mfu, 4),
                   f'{name}_first_step_seconds': round(compiling[name], 2)}
        print(f'{name:16} {spread(speeds)} tokens/s, MFU {mfu:.1%}; first step '
              f'{compiling[name]:.1f} s')
    for peer in [*times][1:]:
        result |= ratio_of(times, peer)
    if profile:
        write_profile(functools.partial(sides['ours'], 3))
    if plot:
        draw_speeds(times, tokens * steps)
    return result


def check_size(theirs: int, ours: int) -> None:
    """Stop if the peer's model has another number of parameters than ours."""
    if theirs != ours:
        stop(f'vs={vs}: its model has {theirs:,} parameters, ours {ours:,}; compare at the GPT-2 '
             'architecture (no preset)')


# ---------------------------------------------------------------------------------------------
# Memory


def tensor_bytes(tensors) -> int:
    """Bytes of the memory behind tensors, what they share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors}.values())


def peak_memory(model, optimizers, step, dev) -> tuple[int, list[tuple[float, int]]]:
    """The most bytes that tensors take in the second step; and on a CPU (seconds, bytes) of it.

    On a GPU as its allocator counts. On a CPU: weights and optimizer state, and on top of them
    whatever the step allocates and frees, as torch's profiler sees it.
    """
    step()
    gc.collect()
    if dev.kind == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated(), []
    states = [t for o in optimizers for state in o.state.values() for t in state.values()
              if isinstance(t, torch.Tensor)]
    lasting = tensor_bytes([*model.parameters(), *model.buffers(), *states])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as found:
        step()
    events = sorted((e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events()
                    if e.name() == '[memory]')
    curve, now = [(0.0, lasting)], lasting
    for when, n_bytes in events:
        now += n_bytes
        curve.append(((when - events[0][0]) / 1e9, now))
    return max(n for _, n in curve), curve


def bench_memory(preset) -> dict:
    """Peak memory of a training step; of nanoGPT's too, and the ratio."""
    dev = choose_device(preset)
    config, known = our_config(preset)
    batches = random_batches(preset, config, known, dev)
    result, curves, n_parameters = {'what': 'memory', 'device': dev.why}, {}, 0
    for name in ('ours', 'nanogpt')[:1 + bool(vs)]:
        if name == 'ours':
            learner = our_learner(preset, config, dev, preset.seed)
            model, optimizers, step = learner.model, learner.optimizers, our_step(learner)
            n_parameters = count_parameters(model)
            print(f'{n_parameters:,} parameters, {len(batches)} micro-batches of '
                  f'{len(batches[0][0])} x {config.block_size} tokens')
        else:
            from dev import peers
            recipe = nanogpt_like(preset, config, dev.compile)
            peer = peers.NanoGPT(vs, recipe, config.vocab_size, dev)
            model, optimizers, step = peer.model, [peer.optimizer], peer.step
            check_size(count_parameters(model), n_parameters)
        peak, curve = peak_memory(model, optimizers, functools.partial(step, batches), dev)
        curves[name] = [t for t, _ in curve], [n / 2 ** 20 for _, n in curve]
        print(f'{name:8} {peak / 2 ** 20:,.0f} MiB at most, of which '
              f'{tensor_bytes(model.parameters()) / 2 ** 20:,.0f} are weights')
        result[f'{name}_peak_mib'] = round(peak / 2 ** 20, 1)
        model = optimizers = step = learner = peer = None   # the other side must not find it
        gc.collect()
    if vs:
        result['ratio'] = round(result['ours_peak_mib'] / result['nanogpt_peak_mib'], 3)
        print(f'ours takes {result["ratio"]:.2f} times as much')
    if plot:
        draw('memory', [('seconds', 'MiB of tensors', curves)])
    return result


# ---------------------------------------------------------------------------------------------
# Decoding


def bench_decode(preset) -> dict:
    """New tokens per second of a preset's model with random weights, and the fraction of memory
    bandwidth; of transformers' generate too, and the ratio."""
    if vs not in ('', 'transformers'):
        stop(f'vs={vs}: decode is compared with transformers')
    if vs and not importlib.util.find_spec('transformers'):
        stop('vs=transformers: it is not installed: pip install transformers')
    dev = hardware.choose(preset.device, preset.dtype, preset.compile, preset.threads,
                          training=False)
    limit = hardware.bandwidth(dev.name)
    print(*dev.why[:3], sep='\n')
    config, known = our_config(preset)
    if prompt_tokens + new_tokens > config.block_size:
        stop(f'prompt_tokens={prompt_tokens}, new_tokens={new_tokens}: together more than '
             f'block_size={config.block_size}')
    model = build_model(config, preset.seed, dev.name).eval()
    for p in model.parameters():    # zero matrices would make all tokens alike
        torch.nn.init.normal_(p, 1.0 if p.ndim < 2 else 0.0, 0.02)
    generator = torch.Generator().manual_seed(preset.seed)
    prompts = torch.randint(known, (rows, prompt_tokens), generator=generator).tolist()

    def ours(compiled=False):
        with dev.autocast():
            return list(generate(model, prompts, new_tokens, temperature=0, compiled=compiled))
    sides = {'ours': ours}
    if dev.compile:
        sides['ours_compiled'] = functools.partial(ours, compiled=True)
    if vs:
        from dev import peers
        with tempfile.TemporaryDirectory() as folder:
            hf.save(model, tokenizers.ByteTokenizer(), Path(folder) / 'hf')
            theirs = peers.Apart(peers.transformers_generate, Path(folder) / 'hf', dev)
        sides['transformers'] = functools.partial(theirs, prompts, new_tokens)
    first = {name: run() for name, run in sides.items()}    # the warm-up
    same = None
    if vs:
        wanted = torch.tensor(first.pop('transformers'))[:, prompt_tokens:]
        same = min((torch.tensor(found).T == wanted).sum().item() for found in first.values())
        print(f'{same} of {rows * new_tokens} greedy tokens are the same')
    times = in_turn(sides, dev)
    limit = max(limit, hardware.bandwidth(dev.name))    # others may have had a part of it
    print(f'reading memory {limit / 1e9:,.1f} GB/s (measured before and after, the limit of MBU)')
    weights = sum(p.numel() for name, p in model.named_parameters()
                  if config.tied or name != 'wte.weight')
    size = torch.finfo(hardware.DTYPES[dev.dtype]).bits // 8
    cached = (prompt_tokens + new_tokens / 2) * 2 * config.n_kv_head * config.head_dim
    each = size * (weights + rows * config.n_layer * cached)
    print(f'{rows} x {prompt_tokens} prompt tokens, {new_tokens} new ones; a step reads '
          f'{each / 2 ** 20:,.0f} MiB')
    result = {'what': 'decode', 'device': dev.why[:3], 'parameters': count_parameters(model),
              'rows': rows, 'prompt_tokens': prompt_tokens, 'new_tokens': new_tokens,
              'bandwidth_gb_per_second': round(limit / 1e9, 2), 'same_tokens': same}
    for name, found in times.items():
        speeds = [rows * new_tokens / seconds for seconds in found]
        mbu = each * new_tokens / statistics.median(found) / limit
        result |= {f'{name}_tokens_per_second': round(statistics.median(speeds), 2),
                   f'{name}_mbu': round(mbu, 4)}
        print(f'{name:13} {spread(speeds, 1)} tokens/s with the prompt, MBU {mbu:.1%}')
    if vs:
        for name in list(sides)[:-1]:
            result |= ratio_of(times, 'transformers', name)
    if profile:
        write_profile(sides.get('ours_compiled', ours))
    if plot:
        draw_speeds(times, rows * new_tokens)
    return result


# ---------------------------------------------------------------------------------------------
# Runs


def bench_runs(preset) -> dict:
    """Draw the validation losses of runs over steps, tokens, seconds and FLOPs: in bits per byte,
    which do not depend on the tokenizer, if every run knows them."""
    paths = [Path(name) for name in folders.split(',') if name]
    lines = {}
    for path in paths:
        evals, starts = read_log(path, 'eval'), read_log(path, 'start')
        if not evals or not starts:
            print(f'{path}: has no evaluation in its log, left out')
            continue
        flops = starts[0].get('flops_per_token', math.nan)
        lines[str(path)] = evals, flops
    if not lines:
        stop(f'folders={folders}: no run with an evaluation; python bench.py runs out/*')
    loss = 'bits_per_byte'
    if any(e.get(loss) is None for evals, _ in lines.values() for e in evals):
        loss = 'val_loss'
    best = {name: min(e[loss] for e in evals) for name, (evals, _) in lines.items()}
    for name, least in best.items():
        print(f'{name}: best {loss} {least:.4f}')
    ways = {'steps': lambda e, _: e['step'], 'tokens': lambda e, _: e.get('tokens', math.nan),
            'seconds of training': lambda e, _: e['seconds'],
            'TFLOP': lambda e, flops: e.get('tokens', math.nan) * flops / 1e12}
    draw('runs', [(label, loss, {
        name: ([way(e, flops) for e in evals], [e[loss] for e in evals])
        for name, (evals, flops) in lines.items()}) for label, way in ways.items()])
    return {'what': 'runs', 'loss': loss, 'best': best}


def load_preset(preset: dict | None) -> SimpleNamespace:
    """train.py's settings, or those of a preset. Stops if they are wrong or begin with a model."""
    settings = read_settings(TRAIN) if preset is None else preset
    check_settings(settings)
    preset = SimpleNamespace(**settings)
    if from_model(preset):
        stop(f'init_from={preset.init_from}: leave it out; what is measured is the model that the '
             'settings describe')
    return preset


def report(result: dict) -> dict:
    """Print the result as JSON if programs read the output; people have read it above."""
    if not sys.stdout.isatty():
        print(json.dumps(result))
    return result


def main(preset: dict | None = None) -> dict:
    """Measure, with train.py's settings of a preset; returns what the last line prints."""
    ways = {'train': bench_train, 'memory': bench_memory, 'decode': bench_decode,
            'runs': bench_runs}
    check_choice(globals(), what=tuple(ways))
    check_bounds(globals())
    preset = load_preset(preset)
    if vs and what in ('train', 'memory'):
        from dev import peers
        peers.nanogpt_source(vs)      # before ours takes its time
    return report(ways[what](preset))


if __name__ == '__main__':
    settings = read_settings(TRAIN)
    configure(globals(), sys.argv[1:], also=settings)
    main(settings)
