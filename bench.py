"""Speed, measured: python bench.py train config/shakespeare.py [--vs=<checkout of nanoGPT>].

train: whole training steps (forward, backward, clipping, optimizer) of a preset on ready-made
random batches, after warm-up. With --vs nanoGPT trains its own model of the same shape on the same
batches, in turn with ours, round by round. Presets and flags may set whatever train.py knows.

tokenizer: training a BPE on Python sources, beside Hugging Face's trainer (Rust), each time in a
process of its own; then encoding, beside tiktoken itself. With --vs minbpe joins in on a slice.

data: prepare.py on a made-up corpus with planted duplicates, repeated passages and benchmark items:
what it finds of them, how fast each step is, and the most memory all processes take together.

Prints median and spread over rounds, and one JSON line last.
"""
import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import random
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import train
from core import clean, parallel
from core import device as hardware
from core import tokenizer as tokenizers
from core.dataset import open_shard, share
from core.learner import Learner, count_targets, lm_loss_sums
from core.optim import LossScale
from core.processes import Ranks
from core.settings import check_bounds, check_choice, configure, stop
from model import build_model, count_parameters, flops_per_token

POSITIONAL = ('what',)

what = 'train'              # what is measured: train, tokenizer or data
vs = ''                     # a checkout of nanoGPT or minbpe, to be measured beside ours
rounds = 5                  # times that each side is measured
steps = 20                  # training steps in a round
warmup = 5                  # steps before the first round
corpus_mb = 60              # tokenizer and data: megabytes of text
line_mb = 0                 # data: and one more file of a single line of so many
n_tokens = 32_768           # tokenizer: size of the vocabulary, without special tokens


def our_step(config, dev):
    """A function that does one training step of ours on a list of micro-batches, and its model."""
    model = build_model(config, train.seed, dev.name)
    ranks = Ranks()
    trained, _ = parallel.wrap(model, ranks, dev, 1, 1)
    learner = Learner(model, trained, train.build_optimizers(model, dev, ranks),
                      LossScale(dev.dtype == 'float16'), dev, ranks, train.grad_clip, train.seed)
    return lambda batches: learner.step(batches, lm_loss_sums, count_targets(batches), 0,
                                        1.0), model


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
    scaler = torch.amp.GradScaler(dev.kind, enabled=dev.dtype == 'float16')
    compiled = torch.compile(model) if dev.compile else model

    def step(batches):
        for x, y, _ in batches:
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
    shapes = [(len(samples), config.block_size)
              for samples in share(0, train.batch_size, 0, 1, rows)]
    documents = train.respects_documents(config)    # one in each row: the most work
    batches = [(torch.randint(known, shape, generator=generator),
                torch.randint(known, shape, generator=generator),
                torch.zeros(shape, dtype=torch.long) if documents else None) for shape in shapes]
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


# ---------------------------------------------------------------------------------------------
# Data

# what every hundred documents of the corpus have beside 90 that are new
PLANTED = ('equal', 'Jaccard 0.80 to 0.82', '5% of words edited', 'Jaccard 0.50 to 0.60', 'passage',
           'passage again', 'item', 'eight words of an item', 'new', 'new')


def made_up(megabytes: float) -> Iterator[tuple[str, str, int]]:
    """Documents of about 3,000 characters: what each is (see PLANTED), its text, and the number of
    the one that it was made of. The benchmark items in some of them come as 'benchmark'. Words are
    those of Python's sources."""
    chance = random.Random(0)
    text = Path(argparse.__file__).read_text('utf-8') + Path(tarfile.__file__).read_text('utf-8')
    words = re.findall('[a-z]+', text)
    sentence = lambda n=14: ' '.join(chance.choices(words, k=n)).capitalize() + '. '
    pool = [sentence(chance.randrange(8, 20)) for _ in range(100_000)]
    size, number, passage, original = 0, 0, [], ([], '', 0)
    while size < megabytes * 1e6:
        body, kind = chance.choices(pool, k=30), 'new'
        if number % 10 == 9 and number > 100:
            kind = PLANTED[number // 10 % 10]
        name = f'Doc {number}. '
        if kind == 'equal':
            body, name, _ = original
        elif kind.startswith(('Jaccard', '5%')):
            body = edited(kind, original[0], words, chance)
        elif kind == 'passage':
            passage = [sentence(), sentence(), f'Passage {number}. ', sentence(), sentence()]
            body[10:10] = passage
        elif kind == 'passage again':
            body[20:20] = passage
        elif kind.endswith('item'):
            item = f'{sentence(20)}Item {number}. {sentence(20)}'
            body.insert(15, ' '.join(item.split()[:8]) + '. ' if kind.startswith('eight') else item)
            yield 'benchmark', item, 0
        elif number % 10 == 2:
            original = body, name, number
        text = ''.join(body) + name
        size, number = size + len(text), number + 1
        yield kind, text, original[2]


def edited(kind: str, body: list[str], words: list[str], chance) -> list[str]:
    """A document with words replaced: 5% of them, or until it is as similar as `kind` says."""
    found = ''.join(body).split(' ')
    shingles = lambda: clean.shingles(clean.word_hashes(' '.join(found))[0], 3)
    before, low = shingles(), float(kind.split()[1]) if kind.startswith('Jaccard') else 0
    places = chance.sample(range(len(found)), len(found))
    for n, i in enumerate(places):
        if not low and n >= 0.05 * len(found):
            break
        if low and n % 2 == 0 and clean.jaccard(before, shingles()) < low + (
                0.1 if low == 0.5 else 0.02):
            break
        found[i] = chance.choice(words) + '.' * found[i].endswith('.')
    return [' '.join(found)]


def memory_of_all(pid: int) -> int:
    """Bytes of a process and all below it, what they share counted once (Linux)."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines():
            total += int(line.split()[1]) * 1024 if line.startswith('Pss:') else 0
        for children in Path(f'/proc/{pid}/task').glob('*/children'):
            total += sum(memory_of_all(int(child)) for child in children.read_text().split())
    return total


def bench_data() -> dict:
    """Make a corpus, prepare it in a process of its own, and look what is left of it."""
    with tempfile.TemporaryDirectory(dir='.') as folder:
        folder = Path(folder)
        kinds = write_corpus(folder)
        began, peak, output = time.perf_counter(), 0, []
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name('prepare.py'), folder / 'corpus',
             f'--data_dir={folder}/data', '--name=bench', '--tokenizer=bpe',
             '--repeated_sentences=3', f'--decontaminate={folder}/benchmark.txt',
             '--val_fraction=0.01'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        reader = threading.Thread(target=lambda: output.extend(process.stdout), daemon=True)
        reader.start()
        while process.poll() is None:
            peak = max(peak, memory_of_all(process.pid))
            time.sleep(0.5)
        reader.join()
        if process.returncode:
            stop(f'prepare.py ended with status {process.returncode}; its output was: '
                 f'{" ".join("".join(output).split())[-500:]}')
        seconds = time.perf_counter() - began
        print(''.join(output))
        speeds = {what: float(speed) for what, speed in re.findall(
            r'^  ([a-z ]+): [\d,]+ MB in [\d,]+ s, ([\d.]+) MB/s', ''.join(output), re.MULTILINE)}
        result = {'what': 'data', 'corpus_mb': corpus_mb, 'line_mb': line_mb,
                  'seconds': round(seconds, 1), 'peak_mb': round(peak / 1e6), **speeds,
                  'found': judge(folder / 'data' / 'bench', kinds)}
    print(f'{seconds:,.0f} s in all, at most {peak / 1e6:,.0f} MB')
    return result


def write_corpus(folder: Path) -> dict[int, tuple[str, int, int]]:
    """Write corpus and benchmark into `folder`; of each document what it is, its hash, and the
    number of the one that it was made of."""
    (folder / 'corpus').mkdir()
    kinds = {}
    with (open(folder / 'corpus' / 'made_up.jsonl', 'w') as f,
          open(folder / 'benchmark.txt', 'w') as benchmark):
        for kind, text, like in made_up(corpus_mb):
            if kind == 'benchmark':
                benchmark.write(text + '\n')
                continue
            kinds[len(kinds)] = kind, clean.text_hash(text), like
            f.write(json.dumps({'text': text}) + '\n')
    if line_mb:
        with open(folder / 'corpus' / 'one_line.txt', 'w') as f:
            for i in range(int(line_mb * 10)):
                f.write(' '.join(f'{i * 20_000 + j:x}' for j in range(20_000))[:100_000])
    return kinds


def judge(folder: Path, kinds: dict[int, tuple[str, int, int]]) -> dict:
    """Compare the documents that are in the shards with what was planted; prints a table."""
    tok = tokenizers.load(folder / 'tokenizer.json')
    seen = {what: Counter() for what in (b'Doc', b'Passage', b'Item')}
    left, hashes = b'', set()
    for path in sorted(folder.glob('*.bin')):
        ids = open_shard(path)
        for i in range(0, len(ids), 1 << 22):
            left += b''.join(map(tok.tokens.__getitem__, ids[i:i + (1 << 22)].tolist()))
            last = i + (1 << 22) >= len(ids)
            *whole, left = [*left.split(b'<|endoftext|>'), *[b''] * last]
            for text in whole:
                hashes.add(clean.text_hash(text.decode()))
                for what, counts in seen.items():
                    counts.update(map(int, re.findall(what + rb' (\d+)\.', text)))
    of = lambda *names: {number for number, (kind, *_) in kinds.items() if kind in names}
    gone = {number for number in kinds if not seen[b'Doc'][number]} - of('equal')
    near, again = of(*PLANTED[1:3]), sum(n - 1 for n in seen[b'Doc'].values() if n)
    # of two that are alike the one goes that is not for validation
    gone = {next((i for i in near if kinds[i][2] == number and i not in gone), number)
            for number in gone}
    changed = {number for number in of('new', PLANTED[-3])
               if kinds[number][1] not in hashes and (seen[b'Doc'][number] or number in gone)}
    rows = [('equal documents', len(of('equal')), len(of('equal')) - again, 0)]
    rows += [(f'near duplicates: {kind}', len(of(kind)), len(gone & of(kind)), len(gone - near))
             for kind in PLANTED[1:3]]
    rows += [('repeated passages', len(of('passage')),
              sum(seen[b'Passage'][n] == 1 for n in of('passage')), len(changed)),
             ('benchmark items', len(of('item')),
              sum(not seen[b'Item'][n] for n in of('item')), len(changed))]
    print('| planted | how many | removed | recall | precision |\n|---|---|---|---|---|')
    for name, planted, removed, false in rows:
        print(f'| {name} | {planted:,} | {removed:,} | {removed / max(1, planted):.4f} | '
              f'{removed / max(1, removed + false):.4f} |')
    print(f'{len(changed):,} of {len(of("new", PLANTED[-3])):,} other documents are changed or '
          f'gone, and {len(gone & of(PLANTED[3])):,} of {len(of(PLANTED[3])):,} with {PLANTED[3]}')
    return {name: [planted, removed, false] for name, planted, removed, false in rows}


def main() -> dict:
    """Measure; returns what the last line prints."""
    check_bounds(globals(), rounds=(1, None), steps=(1, None), warmup=(1, None))
    check_choice(globals(), what=('train', 'tokenizer', 'data'))
    check_bounds(globals(), corpus_mb=(1, None), n_tokens=(256, None), line_mb=(0, None))
    train.check_settings()
    if train.from_model():
        stop(f'init_from={train.init_from}: leave it out; what is measured is the model that the '
             'settings describe')
    result = {'train': bench_train, 'tokenizer': bench_tokenizer, 'data': bench_data}[what]()
    print(json.dumps(result))
    return result


if __name__ == '__main__':
    configure(globals(), sys.argv[1:], also=vars(train))
    main()
