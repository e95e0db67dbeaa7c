"""Making a dataset: files are found, read and cleaned, duplicates go, the rest is split, a
tokenizer is learnt, and the text is encoded. `make` tells it in this order; prepare.py and train.py
call `build`.
"""
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from core.data import corpus as steps
from core.data import named
from core.data.corpus import Corpus, Split, complain, save_json
from core.data.dataset import HEADER, Tokens, open_shard
from core.data.named import content, is_made, is_there, is_url, read_meta, split_places
from core.data.recipes import RECIPES
from core.data.report import Tally, print_summary, write_report
from core.device import cpu_count
from core.formats import hub
from core.ranks.processes import print0
from core.read import documents
from core.read.documents import Bad
from core.read.download import fetch, file_hash, locked, stated
from core.run import models
from core.settings import convert, read_settings, settings_of, stop, warn
from core.source import source_hashes
from core.text import clean
from core.text import tokenizer as tokenizers
from core.text.words import word_hashes

PREPARE = named.ROOT / 'prepare.py'     # whose settings are the options here
NOT_IN_META = ('dataset', 'name', 'data_dir', 'workers', 'tokenizer', 'vocab_size')
BATCH = 1 << 21             # bytes that are cleaned at a time
SAMPLE = 100_000_000        # most bytes from which a tokenizer is learnt


class Source(NamedTuple):
    """A part of what goes in: its files and how often they are used."""
    files: list
    weight: float = 1.0
    validation: bool = False


# ---------------------------------------------------------------------------------------------
# The pipeline


def make(folder: Path, sources: list[Source], options: dict, ready_tok, tally: Tally, meta: dict
         ) -> None:
    """Clean, drop duplicates, split, learn the tokenizer, encode, report; the finished folder
    appears at once."""
    work, sizes = begin(folder, meta), [found['bytes'] for found in meta['inputs']]
    workers = options['workers'] or (cpu_count() if sum(sizes) > 8 * BATCH else 1)
    with timed('cleaned', sum(sizes), workers):
        n_batches = steps.clean_all(work, batches(sources, sizes, options, tally), options,
                                    benchmark_index(options), bad_words_index(options), workers)
    corpus = Corpus(work, n_batches, tally)
    size = int(corpus.rows['size'].sum())
    if not size:
        shutil.rmtree(work)
        stop(f'{meta["source"]}: nothing is left to learn from: all of it is empty or dropped')
    with timed('duplicates found', size, workers):
        given = np.array([source.validation for source in sources])
        stays, pairs = steps.drop_duplicates(corpus, given, options, workers)
        tally.warn_of_losses([str(source.files[0]) + ' and others' * (len(source.files) > 1)
                              for source in sources])
        val, cuts = steps.choose_validation(corpus.rows, stays, given, pairs,
                                            options['near_duplicates'], options['val_fraction'])
        splits = steps.split_corpus(corpus, stays, val, cuts, [s.weight for s in sources])
        meta['leakage'] = steps.leakage(pairs, splits, options['near_duplicates'])
    with timed('tokenizer ready', min(SAMPLE, size), workers):
        tok = ready_tok or learn_tokenizer(meta['tokenizer'], corpus, splits, options)
        tok.corpus_normalize = options['normalize']
    with timed('encoded', int(corpus.rows['size'][stays].sum()), workers):
        for split in splits:
            steps.encode_split(corpus, split, tok, options['shard_tokens'], workers)
    finish(folder, work, tok, meta | describe(corpus, stays, tok, meta))


def begin(folder: Path, meta: dict) -> Path:
    """The work folder with what an earlier run has done, if its input, settings and source code
    were the same."""
    work = named.work_folder(folder)
    plan = {**content(meta), 'source code': source_hashes(str(PREPARE))}
    known = work / 'plan.json'
    if known.is_file() and json.loads(known.read_text()) == plan:
        print(f'{folder}: going on with what an earlier run has done')
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        save_json(known, plan)
    (work / 'ready').mkdir(exist_ok=True)
    return work


@contextlib.contextmanager
def timed(what: str, size: int, workers: int):
    """Print how fast a step was, if it took long enough to be measured."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    if seconds > 2:
        print(f'  {what}: {size / 1e6:,.0f} MB in {seconds:,.0f} s, {size / 1e6 / seconds:.1f} '
              f'MB/s, {workers} process' + 'es' * (workers > 1))


def learn_tokenizer(label: str, corpus: Corpus, splits: tuple[Split, Split], options: dict):
    """A tokenizer for the training text; characters are taken from the validation text as well. An
    earlier run's is taken as it is."""
    path = corpus.work / 'tokenizer.json'
    if path.is_file():
        return tokenizers.load(path)

    def texts(split, fraction=1.0):
        limit = np.uint64(min(fraction, 1) * (2 ** 64 - 2 ** 12))
        split = split._replace(copies=(split.copies > 0) * (corpus.rows['hash'] <= limit))
        for job in steps.jobs(corpus, split):
            yield from steps.texts_of(job, corpus, split)

    val, train = splits
    if label.startswith('bpe'):
        size, wanted = int((corpus.rows['size'] * (train.copies > 0)).sum()), int(label[3:])
        tok = tokenizers.BPETokenizer.train(texts(train, SAMPLE / max(1, size)), wanted,
                                            workers=options['workers'])
        if len(tok) < wanted:
            warn(f'vocab_size={wanted}: after {len(tok):,} tokens no pair of them occurs twice, '
                 'so there are no more')
    else:
        characters = set()
        for text in itertools.chain(texts(val), texts(train)):
            characters.update(text)
        tok = tokenizers.KINDS[label].train(''.join(characters))
    tok.save(path.with_suffix('.part'))
    os.replace(path.with_suffix('.part'), path)
    return tok


def describe(corpus: Corpus, stays: np.ndarray, tok, meta: dict) -> dict:
    """What meta.json and the report say of a dataset: counts, lengths, frequent tokens, losses."""
    ready, rows, tally = corpus.work / 'ready', corpus.rows[stays], corpus.tally
    n_train, n_val = (len(Tokens(ready, split)) for split in ('train', 'val'))
    if not n_train:
        stop(f'{meta["source"]}: nothing is left to train on; see to weights, validation and rules')
    counts = np.zeros(len(tok), np.int64)
    for path in sorted(ready.glob('*.bin')):
        kind, at = open_shard(path).dtype, HEADER.size
        # read, not mapped: what is mapped stays in memory
        while len(ids := np.fromfile(path, kind, 1 << 22, offset=at)):
            counts += np.bincount(ids, minlength=len(tok))
            at += ids.nbytes
    few = Tokens(ready, 'val' if n_val > 1000 else 'train').read(0, 500_000).tolist()
    text = tok.decode([i for i in few if i != tok.eos])
    downloads = corpus.work.parent / 'downloads'
    is_here = any(Path(place, 'gpt2/encoder.json').is_file()
                  for place in (downloads, os.environ.get('DATA_MIRROR') or downloads))
    bins = np.bincount(np.floor(np.log2(np.maximum(1, rows['characters']))).astype(np.int64))
    low = int(np.flatnonzero(bins)[0])
    return {
        'documents': len(rows), 'characters': int(rows['characters'].sum(dtype=np.int64)),
        'bytes': int(rows['size'].sum()), 'train_tokens': n_train, 'val_tokens': n_val,
        'vocab_size': len(tok), 'max_id': int(np.flatnonzero(counts)[-1]),
        'steps': tally.steps, 'rules': tally.rules, 'counts': dict(sorted(tally.counts.items())),
        'examples': tally.examples, 'bad': tally.bad[:1000], 'n_bad': len(tally.bad),
        'bytes_per_token': len(text.encode()) / max(1, len(few)),
        'gpt2_bytes_per_token': len(text.encode()) / len(
            tokenizers.gpt2(downloads).encode(text)) if is_here else None,
        'lengths': [[1 << i, 2 << i, int(n)] for i, n in enumerate(bins) if i >= low],
        'frequent': [[tok.tokens[i].decode('utf-8', 'replace'), int(counts[i])]
                     for i in np.argsort(-counts, kind='stable')[:30].tolist() if counts[i]],
        'n_inputs': len(meta['inputs']),
        'input_bytes': sum(found['bytes'] for found in meta['inputs']),
        'inputs': meta['inputs'][:1000]}


def finish(folder: Path, work: Path, tok, meta: dict) -> None:
    """Add tokenizer, meta.json and report.html to the shards, and give the folder its name."""
    ready = work / 'ready'
    tok.save(ready / 'tokenizer.json')
    save_json(ready / 'meta.json', meta)
    write_report(ready / 'report.html', meta)
    for progress in ready.glob('.*.json'):
        progress.unlink()
    if folder.exists():     # is deleted with the work folder
        os.rename(folder, work / f'old-{time.time_ns()}')
    os.rename(ready, folder)
    print_summary(folder, meta)
    shutil.rmtree(work)


# ---------------------------------------------------------------------------------------------
# Found, or made


def build(dataset: str, data_dir: str = 'data', name: str = '', tokenizer: str = '',
          vocab_size: int = 0, **given) -> Path:
    """Make the dataset unless it is there already, and return its folder.

    `dataset` is one or several of: a named dataset, a path to text, a glob, a URL; or a folder
    under `data_dir`. One that is made from files is made again when these have changed, and any
    that was made with other settings than those `given`; settings that are not given have their
    defaults, or are what it was made with. A file lock lets one process of a machine work while
    the others wait. Raises NoNetwork if a download is needed and impossible.
    """
    if not dataset:
        stop(f'no dataset given: name one of {", ".join(RECIPES)}, or a path to text')
    try:
        if folder := named.made_folder(dataset, data_dir):
            named.check_made_with(folder, tokenizer, vocab_size, given)
            return folder
        name = name or named.folder_name(dataset, tokenizer, vocab_size)
        if name in ('', '.', '..', 'downloads') or name != Path(name).name:
            stop(f'name={name}: must be a plain folder name (other than downloads)')
        places, folder = split_places(dataset), Path(data_dir) / name
        for place in places:
            if place not in RECIPES and not is_url(place) and not is_there(place):
                stop(f'dataset {place!r}: neither a named dataset ({", ".join(RECIPES)}), '
                     f'nor a folder in {data_dir}/, nor a path to text')
        if not folder.exists():
            named.check_sizes(places, given.get('max_files', 0))
        with lock_of(folder):
            label = named.tokenizer_label(dataset, tokenizer, vocab_size)
            make_if_needed(folder, places, label, tokenizer, given)
        return folder
    except OSError as e:
        stop(f'{e.filename or data_dir}: {e.strerror or e}; the dataset was not made')


def lock_of(folder: Path):
    """The lock of a dataset's folder; none is needed where nobody can write and it is there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return locked(folder.with_name(f'.{folder.name}.lock'))
    except OSError:
        if not is_made(folder):
            raise
        return contextlib.nullcontext()


def make_if_needed(folder: Path, places: list[str], label: str, tokenizer: str, given: dict
                   ) -> None:
    """Make the dataset in `folder` unless it is what it should be; its lock is held."""
    before = read_meta(folder) if is_made(folder) else {}
    options, data_dir = settings_of(read_settings(PREPARE)), str(folder.parent)
    known = {key: convert(options[key], key, value, f'{folder}/meta.json')
             for key, value in before.get('settings', {}).items() if key in options}
    if known and not given.get('max_files', 1):
        given = {**given, 'max_files': known.get('max_files', 0)}   # as many as there are
    options |= known | given
    lists = [file_hash(place) for key in ('decontaminate', 'bad_words')
             for place in lists_of(key, options)] if given else before.get('lists', [])
    wanted = {'source': named.join_places(places, os.path.abspath),
              # stays the same where the whole project moves
              'place': named.join_places(places, lambda place: os.path.relpath(
                  os.path.realpath(place), os.path.realpath(data_dir))),
              'tokenizer': label, 'settings': {
                  key: options[key] for key in options if key not in NOT_IN_META}, 'lists': lists}
    recipe = RECIPES.get(','.join(places))
    ready_tok = ready_tokenizer(tokenizer or (recipe.tokenizer if recipe else ''), data_dir)
    if ready_tok:
        wanted['tokenizer_hash'] = ready_tok.hash()
    if recipe and named.up_to_date(folder, wanted):     # a recipe's text does not change
        return
    named.check_sizes(places, options['max_files'])
    tally = Tally()
    sources = find_sources(places, options, data_dir, tally)
    inputs = hash_files([path for source in sources for path in source.files])
    wanted |= {'inputs': inputs, 'sha256': hashlib.sha256(''.join(
        found['sha256'] for found in inputs).encode()).hexdigest()}
    if recipe or not named.up_to_date(folder, wanted):
        about = [RECIPES[place].about if place in RECIPES else f'text from {place}'
                 for place in places]
        licences = [RECIPES[place].licence if place in RECIPES else 'unknown: your own text'
                    for place in places]
        make(folder, sources, options, ready_tok, tally,
             {'name': folder.name, 'about': '; '.join(about), 'licence': '; '.join(licences),
              **wanted})


def ready_tokenizer(tokenizer: str, data_dir: str):
    """A tokenizer that needs no training: gpt2, or that of a model (see find_model); or None."""
    if tokenizer in ('', *tokenizers.KINDS):
        return None
    if tokenizer in hub.GPT2_SIZES:
        return tokenizers.gpt2(Path(data_dir) / 'downloads')
    return models.load_tokenizer(tokenizer, data_dir)


# ---------------------------------------------------------------------------------------------
# What goes in


def find_sources(places: list[str], options: dict, data_dir: str, tally: Tally) -> list[Source]:
    """The files of all places, downloaded where necessary."""
    weights = options['weights'].split(',') if options['weights'] else [1] * len(places)
    try:
        weights = [float(weight) for weight in weights]
    except ValueError:
        weights = []
    if len(weights) != len(places) or not all(0 < weight <= 1000 for weight in weights):
        stop(f'weights={options["weights"]}: must be {len(places)} positive numbers with commas '
             f'between, one for each of {", ".join(places)}')
    downloads, sources = str(Path(data_dir) / 'downloads'), []
    for place, weight in zip(places, weights):
        try:
            train, val = (RECIPES[place].files(downloads, options['max_files']) if place in RECIPES
                          else (find_files(place, options, data_dir, tally), []))
        except Bad as e:
            stop(str(e))
        sources += [Source(train, weight)] + [Source(val, validation=True)] * bool(val)
    for place in split_places(options['validation']):
        if not is_there(place):
            stop(f'validation={place}: no such file or folder')
        sources.append(Source(find_files(place, options, data_dir, tally), validation=True))
    return sources


def find_files(place: str, options: dict, data_dir: str, tally: Tally) -> list[Path]:
    """The files of a path, a folder, a glob or a URL. Stops if there are none."""
    if is_url(place):
        address = urllib.parse.urlsplit(place)
        last = re.sub(r'[^\w.-]', '_', address.path.rstrip('/').rpartition('/')[2])[-80:]
        last = last if stated(last) else last.replace('.', '_')
        digest = hashlib.sha256(place.encode()).hexdigest()[:8]     # of the path and the query
        return [fetch(f'urls/{address.hostname}/{digest}-{last.lstrip(".")}', place,
                      Path(data_dir) / 'downloads', any_kind=True)]
    ours, made = (f'{data_dir}/downloads', 'out', os.environ.get('DATA_MIRROR') or 'out'), {}
    files, left_out = documents.find_files(
        place, lambda message: complain(message, options, tally), ours, made)
    if made:
        print0('made by this program, so not read as text: '
               + ', '.join(f'{folder} ({what})' for folder, what in made.items()))
    tally.counts.update({f'files left out: {suffix}': n for suffix, n in left_out.items()})
    if not files:
        stop(f'{place}: no text files ({", ".join(documents.SUFFIXES)}, each also as .gz) in this '
             f'folder, but {left_out.total():,} others')
    return files


def hash_files(files: list[Path]) -> list[dict]:
    """Path, size and SHA-256 of each file; that one cannot be read is told when it is read."""
    found = []
    for path in tqdm(files, desc='hashing', unit='file', leave=False, disable=len(files) < 100):
        try:
            size, sha256 = os.path.getsize(path), file_hash(path)
        except OSError as e:
            size, sha256 = 0, f'cannot be read: {e.strerror}'
        found.append({'file': str(path), 'bytes': size, 'sha256': sha256})
    return found


def batches(sources: list[Source], sizes: list[int], options: dict, tally: Tally
            ) -> Iterator[list]:
    """All records in order, some megabytes at a time: lists of (number of the source, record).
    `sizes` are the bytes of all files, for the progress bar."""
    files = [(i, path) for i, source in enumerate(sources) for path in source.files]
    batch, size, before = [], 0, 0
    with tqdm(total=sum(sizes), unit='B', unit_scale=True, desc='cleaning', leave=False,
              disable=sum(sizes) < 4 * BATCH) as bar:
        for (number, path), file_size in zip(files, sizes):
            try:
                for record in documents.read(path, options['encoding'], options['errors'],
                                             options['text_column']):
                    batch.append((number, record))
                    size += len(record.data)
                    if size >= BATCH:
                        yield batch
                        batch, size = [], 0
                        bar.update(before + record.end - bar.n)
            except Bad as e:
                complain(str(e), options, tally)
            before += file_size
        if batch:
            yield batch


def benchmark_index(options: dict) -> dict:
    """The n-grams (see ngram_index) of all strings in the benchmark files, which training text must
    not contain."""
    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from strings(part)

    texts = []
    for place in lists_of('decontaminate', options):
        kind, number = documents.suffix(place), 0
        try:
            with gzip.open(place) if place.endswith('.gz') else open(place, 'rb') as f:
                for line in [f.read()] if kind == '.json' else f:
                    number += 1
                    text = line.decode('utf-8')
                    if kind not in ('.json', '.jsonl'):
                        texts.append(text)
                    elif text.strip():
                        texts += strings(json.loads(text))
        except (ValueError, OSError, EOFError, RecursionError) as e:
            stop(f'decontaminate={place}:{number}: cannot be read ({e}); give JSON, JSON lines or '
                 'text, also as .gz')
    index = clean.ngram_index(texts, options['overlap_words'])
    short = sum(len(word_hashes(text)[0]) < clean.SHORTEST for text in texts)
    if options['decontaminate'] and (short or not index):
        warn(f'decontaminate={options["decontaminate"]}: {short:,} of {len(texts):,} texts '
             f'have fewer than {clean.SHORTEST} words and are not looked for')
    return index


def bad_words_index(options: dict) -> dict:
    """The words and phrases, a line each, that C4's rule does not allow."""
    lines = []
    for place in lists_of('bad_words', options):
        try:
            lines += Path(place).read_text(encoding='utf-8').splitlines()
        except (ValueError, OSError) as e:
            stop(f'bad_words={place}: cannot be read ({e}); give text in UTF-8')
    return clean.ngram_index(lines, 100, shortest=1)


def lists_of(key: str, options: dict) -> list[str]:
    """The files of the setting decontaminate or bad_words. Stops if one is not there."""
    places = split_places(options[key])
    for place in places:
        if not os.path.isfile(place):
            stop(f'{key}={place}: no such file')
    return places
