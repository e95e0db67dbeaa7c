"""Training a BPE and encoding with it, measured: python dev/bench_tokenizer.py.

Our trainer learns a vocabulary on the Python sources of this machine, beside two in Rust where they
are installed (`tokenizers` of Hugging Face, `rustbpe`), each time in a process of its own: seconds,
memory, bytes per token. --vs=<checkout of minbpe>: that one too, on a slice. Then encoding in
several processes, beside tiktoken in as many threads.

In a pipe or a file the last line is JSON.
"""
import contextlib
import hashlib
import importlib
import importlib.util
import multiprocessing
import statistics
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # the project's folder
import core.start  # noqa: E402, F401  it comes first, before torch

# isort: split
import numpy as np

import bench
from core import device as hardware
from core.settings import check_bounds, configure, stop
from core.text import tokenizer as tokenizers
from core.text.bpe import blocks, shares_of
from core.workers import ordered_map

vs = ''                     # a checkout of minbpe
rounds = 5                  # times that each side is measured
corpus_mb = 60              # megabytes of text
n_tokens = 32_768           # size of the vocabulary, without special tokens


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


def train_ours(texts: list[str], n: int, folder: str):
    """A function text -> number of tokens, after training a BPE of n tokens with our trainer."""
    tok = tokenizers.BPETokenizer.train(texts, n + len(tokenizers.SPECIAL))
    return lambda text: len(tok.encode(text))


def train_huggingface(texts: list[str], n: int, folder: str):
    """The `tokenizers` library."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tokenizers.PATTERNS['llama3']), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return lambda text: len(tok.encode(text).ids)


def train_rustbpe(texts: list[str], n: int, folder: str):
    """The `rustbpe` library."""
    from rustbpe import Tokenizer  # type: ignore  # which has no stubs
    tok = Tokenizer()
    tok.train_from_iterator(texts, vocab_size=n, pattern=tokenizers.PATTERNS['llama3'])
    return lambda text: len(tok.encode(text))


def train_minbpe(texts: list[str], n: int, folder: str):
    """The minbpe in a folder."""
    sys.path.insert(0, folder)
    tok = importlib.import_module('minbpe').RegexTokenizer(tokenizers.PATTERNS['llama3'])
    tok.train('\n'.join(texts), n)
    return lambda text: len(tok.encode_ordinary(text))


TRAINERS = {'ours': train_ours, 'tokenizers': train_huggingface, 'rustbpe': train_rustbpe,
            'minbpe': train_minbpe}


def time_training(side: str, megabytes: float, n: int, folder: str, sender) -> None:
    """In a process of its own: seconds, peak memory in MB, bytes per token on held-out text.

    The peak is that of the process plus that of its largest child, so what they share counts twice.
    """
    import resource  # which only Unix has
    texts, held_out = python_sources(megabytes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    count = TRAINERS[side](texts, n, folder)
    seconds = time.perf_counter() - began
    peak = sum(resource.getrusage(who).ru_maxrss
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) - before
    n_tokens = sum(map(count, held_out))
    sender.send({'seconds': seconds, 'peak_mb': peak / 1e3,
                 'bytes_per_token': sum(len(text.encode()) for text in held_out) / n_tokens})


def encode(parts: list[str], tok) -> np.ndarray:
    """The ids of some text, as a process of prepare.py encodes it."""
    return np.concatenate([np.array(tok.encode(part), np.int32) for part in parts])


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


def main() -> dict:
    """Training a BPE and encoding with it, beside those that are installed or given."""
    check_bounds(globals(), rounds=(1, None), corpus_mb=(1, None), n_tokens=(256, None))
    if vs and not (Path(vs) / 'minbpe').is_dir():
        stop(f'vs={vs}: there is no minbpe/ in it; give a checkout of minbpe')
    texts, _ = python_sources(corpus_mb)
    size = sum(len(text.encode()) for text in texts)
    digest = hashlib.sha256(''.join(texts).encode()).hexdigest()
    print(f'{len(texts):,} Python sources, {size / 1e6:.1f} MB, SHA-256 {digest}; '
          f'{n_tokens:,} tokens; {rounds} rounds')
    sides = ['ours', *filter(importlib.util.find_spec, ('tokenizers', 'rustbpe'))]
    result = {'what': 'tokenizer', 'bytes': size, 'sha256': digest, 'tokens': n_tokens,
              'training': compare_trainers(sides, corpus_mb, n_tokens, rounds)}
    if vs:
        print('the first megabyte, 512 tokens:')
        result['slice'] = compare_trainers([*sides, 'minbpe'], 1, 512, min(3, rounds))
    tok = tokenizers.BPETokenizer.train(texts[::10], 4096)
    workers = hardware.cpu_count()
    parts = [part for text in texts for part in blocks(text)]
    ways = {'ours': lambda: list(ordered_map(encode, shares_of(texts), workers, tok)),
            'tiktoken': lambda: tok.encoding.encode_ordinary_batch(parts, num_threads=workers)}
    speeds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            speeds[name].append(size / 1e6 / (time.perf_counter() - began))
    for name, found in speeds.items():
        result[f'{name}_encoding_mb_per_second'] = round(statistics.median(found), 1)
        print(f'encoding, {name:8} {statistics.median(found):.1f} MB/s ({min(found):.1f} to '
              f'{max(found):.1f})')
    return bench.report(result)


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
