"""Speed and memory, measured: python bench.py train [config] [--vs=<checkout of nanoGPT>].

train      whole training steps (forward, backward, clipping, optimizer) of a preset on ready-made
           random batches. --vs: nanoGPT trains its own model of the same shape on the same batches
memory     the most that weights, gradients, optimizer and all else take in it; --vs as above
decode     new tokens after a prompt, one by one, eager and compiled, of a preset's model or of one
           that exists: bench.py decode [MODEL] [--weights=float32,int8] [--rows=1,8].
           --vs=transformers or --vs=llama.cpp: with the same weights, for int8 and int4 their
           nearest (Q8_0, Q4_0)
runs       python bench.py runs out/*: draws the losses of runs over steps, tokens, seconds, FLOPs

What a machine can do is measured, too, by one large product of matrices and by reading memory, and
speeds come as fractions of it (MFU, MBU). After a warm-up the sides take turns; median and spread
are given. A peer's speed is measured in a process of its own, which our settings do not reach.
Presets and flags may set whatever train.py knows. In a pipe or a file the last line is JSON.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import copy
import functools
import gc
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from core import device as hardware
from core.data import named
from core.data.chosen import get_data
from core.net import optim, quant
from core.net.engine import generate
from core.net.weights import build_model
from core.ranks import parallel
from core.ranks.processes import Ranks, share
from core.run import begin, log, models
from core.run.learner import Learner
from core.settings import check_bounds, check_choice, configure, read_settings, stop
from core.text import tokenizer as tokenizers
from model import GPTConfig, count_parameters, flops_per_token
from train import train_step

POSITIONAL = ('what', 'folders')
KINDS = {'float32': 'f32', 'bfloat16': 'bf16', 'int8': 'q8_0', 'int4': 'q4_0'}  # in llama.cpp
TRAIN = Path(__file__).with_name('train.py')     # whose settings presets and flags may set

what = 'train'              # train, memory, decode or runs
folders = ''                # runs: the run directories; decode: a model, instead of a preset's
vs = ''                     # the peer: a checkout of nanoGPT, transformers or llama.cpp
rounds = 5                  # times that each side is measured
steps = 20                  # train: training steps in a round
warmup = 5                  # train: steps before the first round
profile = False             # train, decode: a trace for chrome://tracing, and the costliest lines
prompt_tokens = 64          # decode: tokens in a prompt
new_tokens = 128            # decode: tokens that are generated
rows = '1'                  # decode: prompts at a time, or several such numbers: 1,8,32
weights = ''                # decode: some of float32,bfloat16,int8,int4; '': float32 on a CPU


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
        known = named.count_tokens(preset.dataset, begin.tokenizer_wanted(preset), 0)
    known = known or len(tokenizers.load((data or get_data(preset, Ranks())[0]) / 'tokenizer.json'))
    return begin.model_config(preset, known), known


def our_learner(preset, config, dev, seed: int) -> Learner:
    """Our model with all that trains it, as train.py puts it together."""
    model, ranks = build_model(config, seed, dev.name), Ranks()
    model.recompute = preset.activation_checkpointing
    trained, _ = parallel.wrap(model, ranks, dev)
    return Learner(model, trained, begin.build_optimizers(preset, model, dev, ranks),
                   optim.LossScale(dev.dtype == 'float16'), dev, ranks, preset.grad_clip,
                   seed if preset.dropout else None)


def rows_at_once(preset, learner: Learner) -> int:
    """Sequences in a micro-batch, as train.py chooses it."""
    return parallel.rows_at_once(learner.model, learner.ranks, learner.device, preset.batch_size,
                                 preset.block_size, preset.micro_batch_size)


def prepared(preset) -> tuple[GPTConfig, Learner, list[tuple]]:
    """The preset's architecture; its model with all that trains it; and micro-batches (x, y, doc)
    of one step, as large as train.py makes them: random ids, which cost as much as any."""
    dev = choose_device(preset)
    config, known = our_config(preset)
    learner = our_learner(preset, config, dev, preset.seed)
    generator = torch.Generator().manual_seed(preset.seed)
    batches = []
    for samples in share(0, preset.batch_size, 0, 1, rows_at_once(preset, learner)):
        shape = len(samples), config.block_size
        x, y = (torch.randint(known, shape, generator=generator) for _ in range(2))
        # One document in each row is the most work.
        batches.append((x, y, torch.zeros_like(x) if preset.pack_documents else None))
    return config, learner, batches


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
    way, found = name.removeprefix('ours'), [f(ratios) for f in (statistics.median, min, max)]
    return {f'{peer}_ratio{way}': round(found[0], 3), f'{peer}_range{way}': found[1:]}


def write_profile(run) -> None:
    """Run once under torch.profiler: the trace goes to a file, the ten costliest lines to the
    screen."""
    with torch.profiler.profile() as found:
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
    if log.draw(path, fill, 6 * len(panels), 4.5):
        print(f'drawn in {path}')


# ---------------------------------------------------------------------------------------------
# Training steps


def bench_train(preset) -> dict:
    """Tokens per second and MFU of training steps; of nanoGPT's too, and the ratio."""
    config, learner, batches = prepared(preset)
    dev = learner.device
    n_parameters = count_parameters(learner.model)
    flops: dict = {'ours': flops_per_token(learner.model)}
    sides: dict = {'ours': lambda n: [train_step(learner, batches, 0, 1.0) for _ in range(n)]}
    for name, compiled in (('nanogpt_eager', False), ('nanogpt_compiled', True)):
        if vs and compiled <= dev.compile:
            from dev import peers
            recipe = peers.nanogpt_like(preset, config, compiled)
            sides[name] = peers.Apart(peers.nanogpt_steps, vs, recipe, config.vocab_size, dev,
                                      batches)
            found, flops[name] = sides[name](0)
            peers.check_size(vs, found, n_parameters)
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
                   f'{name}_mfu': round(mfu, 4), 'rounds': rounds,
                   f'{name}_first_step_seconds': round(compiling[name], 2)}
        print(f'{name:16} {spread(speeds)} tokens/s, MFU {mfu:.1%}; first step '
              f'{compiling[name]:.1f} s')
    for peer in [*times][1:]:
        result |= ratio_of(times, peer)
    if profile:
        write_profile(functools.partial(sides['ours'], 3))
    return result


# ---------------------------------------------------------------------------------------------
# Memory


def tensor_bytes(tensors) -> int:
    """Bytes of the memory behind tensors, what they share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors}.values())


def peak_memory(model, optimizers, step, dev) -> int:
    """The most bytes that tensors take in the second step.

    On a GPU as its allocator counts. On a CPU: weights and optimizer state, and on top of them
    whatever the step allocates and frees, as torch's profiler sees it.
    """
    step()
    gc.collect()
    if dev.kind == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    states = [t for o in optimizers for state in o.state.values() for t in state.values()
              if isinstance(t, torch.Tensor)]
    lasting = tensor_bytes([*model.parameters(), *model.buffers(), *states])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as found:
        step()
    events = sorted((e.start_ns(), e.nbytes())  # type: ignore  # torch's stubs lack nbytes
                    for e in found.profiler.kineto_results.events() if e.name() == '[memory]')
    return lasting + max(itertools.accumulate((n for _, n in events), initial=0))


def bench_memory(preset) -> dict:
    """Peak memory of a training step; of nanoGPT's too, and the ratio."""
    config, learner, batches = prepared(preset)
    dev = learner.device
    n_parameters = count_parameters(learner.model)
    weights = tensor_bytes(learner.model.parameters())
    step = functools.partial(train_step, learner, batches, 0, 1.0)
    ours = peak_memory(learner.model, learner.optimizers, step, dev) / 2 ** 20
    print(f'{n_parameters:,} parameters, {len(batches)} micro-batches of {len(batches[0][0])} x '
          f'{config.block_size} tokens; {ours:,.0f} MiB at most, of which '
          f'{weights / 2 ** 20:,.0f} are weights')
    result = {'what': 'memory', 'device': dev.why, 'ours_peak_mib': round(ours, 1)}
    if vs:
        from dev import peers
        del learner, step       # the other side must not find them in memory
        gc.collect()
        recipe = peers.nanogpt_like(preset, config, dev.compile)
        peer = peers.NanoGPT(vs, recipe, config.vocab_size, dev)
        peers.check_size(vs, count_parameters(peer.model), n_parameters)
        step = functools.partial(peer.step, batches)
        theirs = peak_memory(peer.model, [peer.optimizer], step, dev) / 2 ** 20
        print(f'nanogpt {theirs:,.0f} MiB at most; ours takes {ours / theirs:.2f} times as much')
        result |= {'nanogpt_peak_mib': round(theirs, 1), 'ratio': round(ours / theirs, 3)}
    return result


# ---------------------------------------------------------------------------------------------
# Decoding


def bench_decode(preset) -> dict:
    """New tokens per second, the prompt's time included, and the fraction of the memory's
    bandwidth, for each number of rows and each kind of weights; a peer's, and the ratios."""
    choose = functools.partial(hardware.choose, preset.device, compile=preset.compile,
                               threads=preset.threads, training=False)
    dev = choose(preset.dtype)
    kinds = (weights or dev.dtype).split(',')
    for kind in kinds:
        if kind not in KINDS:
            stop(f'weights={weights}: must be some of {", ".join(KINDS)}, comma-separated')
    counts = [int(n) if n.isdigit() and int(n) else stop(
        f'rows={rows}: must be numbers from 1 on, comma-separated') for n in rows.split(',')]
    if vs not in ('', 'transformers', 'llama.cpp'):
        stop(f'vs={vs}: decode is compared with transformers or llama.cpp')
    model, tokenizer, known = model_to_decode(preset, dev)
    if prompt_tokens + new_tokens > model.config.block_size:
        stop(f'prompt_tokens={prompt_tokens}, new_tokens={new_tokens}: together more than '
             f'block_size={model.config.block_size}')
    result = {'what': 'decode', 'device': dev.why[:3], 'parameters': count_parameters(model),
              'prompt_tokens': prompt_tokens, 'new_tokens': new_tokens, 'vs': vs, 'rounds': rounds,
              'ratio': {}, 'runs': []}
    print(f'{result["parameters"]:,} parameters, {prompt_tokens} prompt tokens, {new_tokens} new')
    for n, kind in itertools.product(counts, kinds):
        generator = torch.Generator().manual_seed(preset.seed)
        prompts = torch.randint(known, (n, prompt_tokens), generator=generator).tolist()
        quantized = kind in quant.KINDS
        dev = choose('float32' if quantized else kind, quantized=quantized)
        print(f'rows {n}, weights {kind}', *dev.why[:3], sep='\n  ')
        found = decode_in_turn(model, tokenizer, prompts, kind, dev)
        result['runs'].append({'rows': n, 'weights': kind} | found)
        if vs and n == counts[0] and f'{vs}_ratio' in found:
            result['ratio'][kind] = found.get(f'{vs}_ratio_compiled', found[f'{vs}_ratio'])
    return result


def model_to_decode(preset, dev):
    """The model of `folders`, or one of the preset's shape with random weights; its tokenizer, and
    how many ids it has."""
    if folders:
        model, tokenizer, _ = models.load_run(folders, device=dev.name)
        return model, tokenizer, len(tokenizer)
    config, known = our_config(preset)
    model = build_model(config, preset.seed, dev.name).eval()
    for p in model.parameters():    # zero matrices would make all tokens alike
        torch.nn.init.normal_(p, 1.0 if p.ndim < 2 else 0.0, 0.02)
    return model, tokenizers.ByteTokenizer(), known


def decode_in_turn(model, tokenizer, prompts: list, kind: str, dev) -> dict:
    """Tokens per second and fraction of bandwidth of our ways of decoding and of the peer's."""
    limit, as_given = hardware.bandwidth(dev.name), model
    if kind in quant.KINDS:
        model = copy.deepcopy(model)
        quant.quantize(model, kind)

    def ours(compiled=False):
        with dev.autocast():
            return list(generate(model, prompts, new_tokens, temperature=0, compiled=compiled))
    sides: dict = {'ours': ours}
    if dev.compile:
        sides['ours_compiled'] = functools.partial(ours, compiled=True)
    if vs:
        from dev import peers
        if theirs := peers.decoder(vs, as_given, tokenizer, KINDS[kind], len(prompts),
                                   prompt_tokens + new_tokens, dev):
            sides[vs] = functools.partial(theirs, prompts, new_tokens)
    first, result = {name: run() for name, run in sides.items()}, {}     # the warm-up
    if wanted := first.pop(vs, None):
        result['same_tokens'] = min((torch.tensor(found).T == torch.tensor(wanted)).sum().item()
                                    for found in first.values())
    times, config = in_turn(sides, dev), model.config
    limit = max(limit, hardware.bandwidth(dev.name))    # others may have had a part of it
    size = 4 if kind == 'float32' else 2
    cached = (prompt_tokens + new_tokens / 2) * 2 * config.n_kv_head * config.head_dim * size
    each = quant.bytes_read(model, size) + len(prompts) * config.n_layer * cached
    same = f'; {result["same_tokens"]} of {len(prompts) * new_tokens} greedy tokens are the same' \
        if result else ''
    print(f'  a step reads {each / 2 ** 20:,.0f} MiB, memory gives '
          f'{limit / 1e9:,.1f} GB/s{same}')
    for name, found in times.items():
        speeds = [len(prompts) * new_tokens / seconds for seconds in found]
        mbu = each * new_tokens / statistics.median(found) / limit
        result |= {f'{name}_tokens_per_second': round(statistics.median(speeds), 2),
                   f'{name}_mbu': round(mbu, 4)}
        print(f'  {name:13} {spread(speeds, 1)} tokens/s, MBU {mbu:.1%}')
    for name in sides if vs in sides else ():
        if name != vs:
            result |= ratio_of(times, vs, name)
    if profile:
        write_profile(sides.get('ours_compiled', ours))
    return result


# ---------------------------------------------------------------------------------------------
# Runs


def bench_runs(preset) -> dict:
    """Draw the validation losses of runs over steps, tokens, seconds and FLOPs: in bits per byte,
    which do not depend on the tokenizer, if every run knows them."""
    runs = {}
    for name in filter(None, folders.split(',')):
        evals, starts = log.read_log(name, 'eval', 'val_loss'), log.read_log(name, 'start')
        if evals and starts:
            flops = starts[0].get('flops_per_token', math.nan)
            runs[name] = [{**e, 'TFLOP': e.get('tokens', math.nan) * flops / 1e12} for e in evals]
        else:
            print(f'{name}: has no evaluation in its log, left out')
    if not runs:
        stop(f'folders={folders}: no run with an evaluation; python bench.py runs out/*')
    known = all(isinstance(e.get('bits_per_byte'), float) for evals in runs.values() for e in evals)
    loss = 'bits_per_byte' if known else 'val_loss'
    best = {name: min(e[loss] for e in evals) for name, evals in runs.items()}
    for name, least in best.items():
        print(f'{name}: best {loss} {least:.4f}')
    draw('runs', [(label, loss, {
        name: ([e.get(key, math.nan) for e in evals], [e[loss] for e in evals])
        for name, evals in runs.items()}) for label, key in (
            ('steps', 'step'), ('tokens', 'tokens'), ('seconds of training', 'seconds'),
            ('TFLOP', 'TFLOP'))])
    return {'what': 'runs', 'loss': loss, 'best': best}


def load_preset(preset: dict | None) -> SimpleNamespace:
    """train.py's settings, or those of a preset. Stops if they are wrong or begin with a model."""
    settings = read_settings(TRAIN) if preset is None else preset
    begin.check_settings(settings)
    found = SimpleNamespace(**settings)
    if begin.from_model(found):
        stop(f'init_from={found.init_from}: leave it out; what is measured is the model that the '
             'settings describe')
    return found


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
    found = load_preset(preset)
    if weights and what != 'decode':
        stop(f'weights={weights}: only for decode; a model that is trained is not quantized')
    if vs and what in ('train', 'memory'):
        from dev import peers
        peers.nanogpt_source(vs)      # before ours takes its time
    return report(ways[what](found))


if __name__ == '__main__':
    settings = read_settings(TRAIN)
    configure(globals(), sys.argv[1:], also=settings)
    main(settings)
