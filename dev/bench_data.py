"""How much of what is planted prepare.py finds, and how fast: python dev/bench_data.py.

A corpus is made up of which all is known: equal and similar documents, and benchmark items.
prepare.py prepares it, and what is left is compared with what was planted: recall and precision,
the speed of each step, the most memory of all processes.

In a pipe or a file the last line is JSON.
"""
import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # the project's folder
import core.start  # noqa: E402, F401  it comes first, before torch

# isort: split
import bench
from core.data.dataset import open_shard
from core.settings import check_bounds, configure, stop
from core.text import clean
from core.text import tokenizer as tokenizers
from core.text.words import word_hashes

corpus_mb = 60              # megabytes of text
line_mb = 0                 # and one more file of a single line of so many
all_rules = False           # Gopher's, C4's and masks as well; what is planted is not looked for

# what every hundred documents of the corpus have beside 90 that are new
PLANTED = ('equal', 'Jaccard 0.80 to 0.82', '5% of words edited', 'Jaccard 0.50 to 0.60', 'item',
           'eight words of an item', 'new', 'new', 'new', 'new')


def made_up(megabytes: float) -> Iterator[tuple[str, str, int]]:
    """Documents of about 3,000 characters: what each is (see PLANTED), its text, and the number of
    the one that it was made of. The benchmark items in some of them come as 'benchmark'. Words are
    those of Python's sources."""
    chance = random.Random(0)
    text = Path(argparse.__file__).read_text('utf-8') + Path(tarfile.__file__).read_text('utf-8')
    words = re.findall('[a-z]+', text)
    sentence = lambda n=14: ' '.join(chance.choices(words, k=n)).capitalize() + '. '
    pool = [sentence(chance.randrange(8, 20)) for _ in range(100_000)]
    size, number, original = 0, 0, ([], '', 0)
    while size < megabytes * 1e6:
        body, kind = chance.choices(pool, k=30), 'new'
        if number % 10 == 9 and number > 100:
            kind = PLANTED[number // 10 % 10]
        name = f'Doc {number}. '
        if kind == 'equal':
            body, name, _ = original
        elif kind.startswith(('Jaccard', '5%')):
            body = edited(kind, original[0], words, chance)
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
    shingles = lambda: clean.shingles(word_hashes(' '.join(found))[0], 3)
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


def write_corpus(folder: Path, megabytes: float, line_mb: float) -> dict[int, tuple[str, int, int]]:
    """Write corpus and benchmark into `folder`, and a file of one line; of each document what it
    is, its hash, and the number of the one that it was made of."""
    (folder / 'corpus').mkdir()
    kinds = {}
    with (open(folder / 'corpus' / 'made_up.jsonl', 'w') as f,
          open(folder / 'benchmark.txt', 'w') as benchmark):
        for kind, text, like in made_up(megabytes):
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
    seen = {what: Counter() for what in (b'Doc', b'Item')}
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
    changed = {number for number in of('new', PLANTED[5])
               if kinds[number][1] not in hashes and (seen[b'Doc'][number] or number in gone)}
    rows = [('equal documents', len(of('equal')), len(of('equal')) - again, 0)]
    rows += [(f'near duplicates: {kind}', len(of(kind)), len(gone & of(kind)), len(gone - near))
             for kind in PLANTED[1:3]]
    rows += [('benchmark items', len(of('item')),
              sum(not seen[b'Item'][n] for n in of('item')), len(changed))]
    print('| planted | how many | removed | recall | precision |\n|---|---|---|---|---|')
    for name, planted, removed, false in rows:
        print(f'| {name} | {planted:,} | {removed:,} | {removed / max(1, planted):.4f} | '
              f'{removed / max(1, removed + false):.4f} |')
    print(f'{len(changed):,} of {len(of("new", PLANTED[5])):,} other documents are changed or '
          f'gone, and {len(gone & of(PLANTED[3])):,} of {len(of(PLANTED[3])):,} with {PLANTED[3]}')
    return {name: [planted, removed, false] for name, planted, removed, false in rows}


def memory_of_all(pid: int) -> int:
    """Bytes of a process and all below it, what they share counted once (Linux)."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines():
            total += int(line.split()[1]) * 1024 if line.startswith('Pss:') else 0
        for children in Path(f'/proc/{pid}/task').glob('*/children'):
            total += sum(memory_of_all(int(child)) for child in children.read_text().split())
    return total


def main() -> dict:
    """Make a corpus, prepare it in a process of its own, and look what is left of it."""
    check_bounds(globals(), corpus_mb=(1, None), line_mb=(0, None))
    with tempfile.TemporaryDirectory(dir='.') as folder:
        folder = Path(folder)
        kinds = write_corpus(folder, corpus_mb, line_mb)
        began, peak, output = time.perf_counter(), 0, []
        process = subprocess.Popen(
            [sys.executable, Path(__file__).resolve().parents[1] / 'prepare.py', folder / 'corpus',
             f'--data_dir={folder}/data', '--name=bench', '--tokenizer=bpe',
             f'--decontaminate={folder}/benchmark.txt', '--val_fraction=0.01',
             *(['--quality=gopher,c4', '--mask_pii'] if all_rules else [])],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
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
        # without what to do with it: it is gone in a moment
        print(''.join(line for line in output if not re.search(r'report\.html|python ', line)))
        speeds = {what: float(speed) for what, speed in re.findall(
            r'^  ([a-z ]+): [\d,]+ MB in [\d,]+ s, ([\d.]+) MB/s', ''.join(output), re.MULTILINE)}
        result = {'what': 'data', 'corpus_mb': corpus_mb, 'line_mb': line_mb,
                  'all_rules': all_rules, 'seconds': round(seconds, 1),
                  'peak_mb': round(peak / 1e6), **speeds,
                  'found': {} if all_rules else judge(folder / 'data' / 'bench', kinds)}
    print(f'{seconds:,.0f} s in all, at most {peak / 1e6:,.0f} MB')
    return bench.report(result)


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
