"""Speed, measured: python bench.py train config/shakespeare.py [--vs=<checkout of nanoGPT>].

Measures whole training steps (forward, backward, clipping, optimizer) of a preset on ready-made
random batches, after warm-up: median and spread over rounds, and one JSON line last. With --vs
nanoGPT trains its own model of the same shape on the same batches, in turn with ours, round by
round. Presets and flags may set whatever train.py knows.
"""
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import train
from core import device as hardware
from core import tokenizer as tokenizers
from core.dataset import share
from core.parallel import Ranks
from core.settings import check_bounds, check_choice, configure, stop
from model import build_model, count_parameters, flops_per_token

POSITIONAL = ('what',)

what = 'train'              # what is measured: train
vs = ''                     # a checkout of nanoGPT, to be measured beside ours
rounds = 5                  # times that each side is measured
steps = 20                  # training steps in a round
warmup = 5                  # steps before the first round


def our_step(config, dev):
    """A function that does one training step of ours on a list of micro-batches, and its model."""
    model = build_model(config, train.seed, dev.name)
    optimizers = train.build_optimizers(model, dev)
    scaler = dev.scaler()
    compiled = torch.compile(model, dynamic=False) if dev.compile else model
    return lambda batches: train.train_step(compiled, optimizers, scaler, dev, Ranks(), batches,
                                            1.0, 0), model


def nanogpt_step(config, dev):
    """The same for the nanoGPT in the folder `vs`, written as its train.py does it."""
    path = Path(vs) / 'model.py'
    if not path.is_file():
        stop(f'vs={vs}: there is no model.py in it; give a checkout of nanoGPT')
    spec = importlib.util.spec_from_file_location('nanogpt', path)
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    model = nanogpt.GPT(nanogpt.GPTConfig(
        block_size=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, dropout=config.dropout, bias=config.bias))
    model.to(dev.name)
    optimizer = model.configure_optimizers(train.weight_decay, train.learning_rate,
                                           (train.beta1, train.beta2), dev.kind)
    scaler = dev.scaler()
    compiled = torch.compile(model) if dev.compile else model

    def step(batches):
        for x, y in batches:
            with dev.autocast():
                _, loss = compiled(x.to(dev.name), y.to(dev.name))
                loss = loss / len(batches)
            scaler.scale(loss).backward()
        if train.grad_clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return step, model


def time_steps(step, batches, dev, n: int) -> float:
    """Seconds a step, over n steps."""
    dev.synchronize()
    began = time.perf_counter()
    for _ in range(n):
        step(batches)
    dev.synchronize()
    return (time.perf_counter() - began) / n


def bench_train() -> dict:
    """Tokens per second and MFU of training steps; of nanoGPT's too, and the ratio."""
    dev = hardware.choose(train.device, train.dtype, train.compile, train.threads)
    print(*dev.why, sep='\n')
    known = train.vocab_size or len(tokenizers.load(
        train.get_data(Ranks())[0] / 'tokenizer.json'))
    config = train.model_config(known)
    rows = train.micro_batch_size or hardware.fit_micro_batch(
        dev, train.batch_size, config.block_size, config.n_layer, config.n_embd)
    generator = torch.Generator().manual_seed(train.seed)
    batches = [tuple(torch.randint(known, (len(samples), config.block_size), generator=generator)
                     for _ in 'xy') for samples in share(0, train.batch_size, 0, 1, rows)]
    step, model = our_step(config, dev)
    sides = {'ours': step}
    if vs:
        sides['nanogpt'], peer = nanogpt_step(config, dev)
        if count_parameters(peer) != count_parameters(model):
            stop(f'vs={vs}: its model has {count_parameters(peer):,} parameters, ours '
                 f'{count_parameters(model):,}; compare at the GPT-2 architecture (no preset)')
    tokens = train.batch_size * config.block_size
    print(f'{count_parameters(model):,} parameters, {tokens:,} tokens a step in '
          f'{len(batches)} micro-batches; {rounds} rounds of {steps} steps')
    for side in sides.values():
        time_steps(side, batches, dev, warmup)
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(time_steps(side, batches, dev, steps))
    result = {'what': 'train', 'device': dev.why, 'parameters': count_parameters(model),
              'tokens_per_step': tokens, 'torch': torch.__version__}
    for name, found in times.items():
        speed = tokens / statistics.median(found)
        mfu = speed * flops_per_token(model) / dev.peak_flops
        result |= {f'{name}_tokens_per_second': round(speed), f'{name}_mfu': round(mfu, 4)}
        print(f'{name:8} {speed:,.0f} tokens/s (median; {tokens / max(found):,.0f} to '
              f'{tokens / min(found):,.0f}), MFU {mfu:.1%}')
    if vs:
        ratios = [theirs / ours for ours, theirs in zip(times['ours'], times['nanogpt'])]
        result['ratio'] = round(statistics.median(ratios), 3)
        print(f'ours is {result["ratio"]:.2f} times as fast (median; {min(ratios):.2f} to '
              f'{max(ratios):.2f})')
    return result


def main() -> dict:
    """Measure; returns what the last line prints."""
    check_bounds(globals(), rounds=(1, None), steps=(1, None), warmup=(1, None))
    check_choice(globals(), what=('train',))
    train.check_settings()
    result = bench_train()
    print(json.dumps(result))
    return result


if __name__ == '__main__':
    configure(globals(), sys.argv[1:], also=vars(train))
    main()
