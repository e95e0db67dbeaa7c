"""Speed, measured: python bench.py train config/shakespeare.py [--vs=<checkout of nanoGPT>].

train: whole training steps (forward, backward, clipping, optimizer) of a preset on ready-made
random batches, after warm-up. With --vs nanoGPT trains its own model of the same shape on the same
batches, in turn with ours, round by round. Presets and flags may set whatever train.py knows.

tokenizer: training a BPE on Python sources, beside Hugging Face's trainer (Rust), each time in a
process of its own; then encoding, beside tiktoken itself. With --vs minbpe joins in on a slice.

Prints median and spread over rounds, and one JSON line last.
"""
import contextlib
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import sysconfig
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

what = 'train'              # what is measured: train or tokenizer
vs = ''                     # a checkout of nanoGPT or minbpe, to be measured beside ours
rounds = 5                  # times that each side is measured
steps = 20                  # training steps in a round
warmup = 5                  # steps before the first round
corpus_mb = 60              # tokenizer: megabytes of text
n_tokens = 32_768           # tokenizer: size of the vocabulary, without special tokens


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


# ---------------------------------------------------------------------------------------------
# Tokenizers


def python_sources(megabytes: float) -> tuple[list[str], list[str]]:
    """The first so many megabytes of the standard library's and site-packages' sources, by path,
    and a twentieth as much of what comes next."""
    paths = sysconfig.get_paths()
    files = {path: None for root in (paths['stdlib'], paths['purelib'])
             for path in sorted(Path(root).rglob('*.py'))}
    parts, sizes, limits = ([], []), [0, 0], (megabytes * 1e6, megabytes * 5e4)
    for path in files:
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_text(encoding='utf-8')
            i = sizes[0] >= limits[0]
            if sizes[i] >= limits[i]:
                return parts
            parts[i].append(text)
            sizes[i] += len(text.encode())
    return parts


def train_ours(texts: list[str], n: int):
    """A function text -> number of tokens, after training a BPE of n tokens with our trainer."""
    tok = tokenizers.BPETokenizer.train(texts, n + len(tokenizers.SPECIAL))
    return lambda text: len(tok.encode(text))


def train_huggingface(texts: list[str], n: int):
    """The same with the `tokenizers` library."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tokenizers.PATTERNS['llama3']), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return lambda text: len(tok.encode(text).ids)


def train_minbpe(texts: list[str], n: int):
    """The same with the minbpe in the folder `vs`."""
    sys.path.insert(0, vs)
    tok = importlib.import_module('minbpe').RegexTokenizer(tokenizers.PATTERNS['llama3'])
    tok.train('\n'.join(texts), n)
    return lambda text: len(tok.encode_ordinary(text))


TRAINERS = {'ours': train_ours, 'huggingface': train_huggingface, 'minbpe': train_minbpe}


def time_training(side: str, megabytes: float, n: int, folder: str, sender) -> None:
    """In a process of its own: seconds, peak memory in MB, bytes per token on held-out text.

    The peak is that of the process plus that of its largest child, so what they share counts twice.
    """
    globals()['vs'] = folder
    texts, held_out = python_sources(megabytes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    count = TRAINERS[side](texts, n)
    seconds = time.perf_counter() - began
    peak = sum(resource.getrusage(who).ru_maxrss
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) - before
    n_tokens = sum(map(count, held_out))
    sender.send({'seconds': seconds, 'peak_mb': peak / 1e3,
                 'bytes_per_token': sum(len(text.encode()) for text in held_out) / n_tokens})


def compare_trainers(sides: list[str], megabytes: float, n: int, times: int) -> dict:
    """Train with each side in turn, so many times; prints and returns medians."""
    found = {side: [] for side in sides}
    processes = multiprocessing.get_context('spawn')
    for _ in range(times):
        for side in sides:
            receiver, sender = processes.Pipe(duplex=False)
            process = processes.Process(target=time_training,
                                        args=(side, megabytes, n, vs, sender))
            process.start()
            sender.close()
            found[side].append(receiver.recv())
            process.join()
    results = {}
    for side, runs in found.items():
        seconds = [run['seconds'] for run in runs]
        result = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        results[side] = {name: round(value, 4) for name, value in result.items()}
        print(f'{side:12} {result["seconds"]:.2f} s (median of {times}; {min(seconds):.2f} to '
              f'{max(seconds):.2f}), {result["peak_mb"]:,.0f} MB beside the text, '
              f'{result["bytes_per_token"]:.4f} bytes per token on other text')
    return results


def bench_tokenizer() -> dict:
    """Training a BPE and encoding with it, beside those that are installed or given."""
    if vs and not (Path(vs) / 'minbpe').is_dir():
        stop(f'vs={vs}: there is no minbpe/ in it; give a checkout of minbpe')
    texts, _ = python_sources(corpus_mb)
    size = sum(len(text.encode()) for text in texts)
    digest = hashlib.sha256(''.join(texts).encode()).hexdigest()
    print(f'{len(texts):,} Python sources, {size / 1e6:.1f} MB, SHA-256 {digest}; '
          f'{n_tokens:,} tokens; {rounds} rounds')
    sides = ['ours', *(['huggingface'] if importlib.util.find_spec('tokenizers') else [])]
    result = {'what': 'tokenizer', 'bytes': size, 'sha256': digest, 'tokens': n_tokens,
              'training': compare_trainers(sides, corpus_mb, n_tokens, rounds)}
    if vs:
        print('the first megabyte, 512 tokens:')
        result['slice'] = compare_trainers([*sides, 'minbpe'], 1, 512, min(3, rounds))
    tok = tokenizers.BPETokenizer.train(texts[::10], 4096)
    parts = [part for text in texts for part in tokenizers.blocks(text)]
    ways = {'ours': tok.encode_batch,
            'tiktoken': lambda parts: tok.encoding.encode_ordinary_batch(
                parts, num_threads=hardware.cpu_count())}
    speeds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way(parts)
            speeds[name].append(size / 1e6 / (time.perf_counter() - began))
    for name, found in speeds.items():
        result[f'{name}_encoding_mb_per_second'] = round(statistics.median(found), 1)
        print(f'encoding, {name:8} {statistics.median(found):.1f} MB/s ({min(found):.1f} to '
              f'{max(found):.1f})')
    return result


def main() -> dict:
    """Measure; returns what the last line prints."""
    check_bounds(globals(), rounds=(1, None), steps=(1, None), warmup=(1, None))
    check_choice(globals(), what=('train', 'tokenizer'))
    check_bounds(globals(), corpus_mb=(1, None), n_tokens=(256, None))
    train.check_settings()
    if train.from_model():
        stop(f'init_from={train.init_from}: leave it out; what is measured is the model that the '
             'settings describe')
    result = bench_train() if what == 'train' else bench_tokenizer()
    print(json.dumps(result))
    return result


if __name__ == '__main__':
    configure(globals(), sys.argv[1:], also=vars(train))
    main()
