"""Raw text to token shards: python prepare.py shakespeare, or python prepare.py my_texts/.

Whatever people have (see core/read/documents.py) is read, cleaned, freed of duplicates and of
benchmark items, and encoded with a tokenizer that is trained on it or brought along. A dataset is a
folder data/<name>/ with shards of token ids, tokenizer.json, meta.json, and report.html, which says
what was removed and why. By default only duplicates are removed. A run that was killed goes on
where it was. train.py calls `build` by itself.
"""
import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from core.data import clean
from core.data.corpus import (
    Corpus,
    Split,
    choose_validation,
    clean_all,
    drop_duplicates,
    encode_split,
    jobs,
    leakage,
    save_json,
    split_corpus,
    texts_of,
)
from core.data.dataset import HEADER, Tokens, open_shard
from core.data.recipes import RECIPES
from core.data.report import Tally, write_report
from core.device import cpu_count
from core.formats import hf
from core.ranks.processes import print0
from core.read import documents
from core.read.documents import Bad
from core.read.download import NoNetwork, fetch, file_hash, locked, stated
from core.run import models
from core.settings import check_bounds, check_choice, configure, settings_of, stop, warn
from core.source import source_hashes
from core.text import tokenizer as tokenizers

POSITIONAL = ('dataset',)

# what goes in
dataset = ''                # names, files, folders, globs, URLs; several with commas between
weights = ''                # how often each of several is used, such as 2,0.5; '': all once
validation = ''             # files to validate on; '': a part of the dataset
max_files = 0               # of a large named dataset: how many of its files are downloaded
text_column = 'text'        # where the text is in JSON lines, tables and Parquet
encoding = ''               # of text files; '': found out, and printed if it is not UTF-8
errors = 'strict'           # invalid bytes: strict stops at them, replace puts U+FFFD and counts
skip_bad = False            # leave out what cannot be read, and count it, instead of stopping
# what is changed and removed
normalize = 'NFC'           # Unicode normalization form: NFC, NFKC, or '': none
mask_pii = False            # mask e-mail addresses, IP addresses and phone numbers
quality = ''                # rules that are applied: gopher, c4 or gopher,c4 (core/data/clean.py)
count_quality = False       # count in report.html what both would remove
equal = ''                  # texts are equal up to case and white space (loose), not even that
                            # (exact); '': loose for prose, exact for code and short records
near_duplicates = 0.7       # Jaccard similarity from which documents are duplicates; 0: only equal
shingle_words = 3           # the similarity is that of the sets of so many words in a row
decontaminate = ''          # benchmark files: what has overlap_words in a row with them goes
overlap_words = 13
bad_words = ''              # C4: files with a word or phrase a line; '': none
# tokens
tokenizer = ''              # char, byte, bpe, gpt2, or where a model is whose tokenizer is taken;
                            # '': the named dataset's own, char for a path
vocab_size = 0              # of a bpe, special tokens included; 0: the dataset's own, or 4,096
val_fraction = 0.1          # of the characters, for validation; of many documents 10 million
shard_tokens = 100_000_000  # most tokens in one shard file
# system
name = ''                   # folder under data_dir; '': the dataset's, or <path's>_<tokenizer>
data_dir = 'data'           # where datasets and downloads live
workers = 0                 # processes; 0: one for each core, but one alone for little text

GIVEN = ()                  # filled by configure: the settings that were given
FILES = ('validation', 'decontaminate', 'bad_words')     # settings that name some
NOT_IN_META = ('dataset', 'name', 'data_dir', 'workers', 'tokenizer', 'vocab_size')
BATCH = 1 << 21             # bytes that are cleaned at a time
SAMPLE = 100_000_000        # most bytes from which a tokenizer is learnt


class Source(NamedTuple):
    """A part of what goes in: its files and how often they are used."""
    files: list
    weight: float = 1.0
    validation: bool = False


# ---------------------------------------------------------------------------------------------
# A dataset's name and what it must be


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
        return find_or_make(dataset, data_dir, name, tokenizer, vocab_size, given)
    except OSError as e:
        stop(f'{e.filename or data_dir}: {e.strerror or e}; the dataset was not made')


def find_or_make(dataset: str, data_dir: str, name: str, tokenizer: str, vocab_size: int,
                 given: dict) -> Path:
    """What build does; an OSError of the file system comes out."""
    recipe = RECIPES.get(dataset)
    for folder in () if recipe else (dataset, os.path.join(data_dir, dataset)):
        if is_made(folder):
            check_tokenizer(Path(folder), tokenizer, vocab_size)
            check_given(Path(folder), given)
            return Path(folder)
    name = name or folder_name(dataset, tokenizer, vocab_size)
    if name in ('', '.', '..', 'downloads') or name != Path(name).name:
        stop(f'name={name}: must be a plain folder name (other than downloads)')
    places = split_places(dataset)
    for place in places:
        if place not in RECIPES and not is_url(place) and not is_there(place):
            stop(f'dataset {place!r}: neither a named dataset ({", ".join(RECIPES)}), '
                 f'nor a folder in {data_dir}/, nor a path to text')
    folder = Path(data_dir) / name
    for place in places if not folder.exists() else ():
        check_size(place, settings_of(globals()) | given)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(folder.with_name(f'.{folder.name}.lock'))
    except OSError:     # nobody writes here, but it may be there already
        if not is_made(folder):
            raise
        lock = contextlib.nullcontext()
    with lock:
        at = lambda path: ','.join(place if place in RECIPES or is_url(place) else path(place)
                                   for place in places)
        wanted = {'source': at(os.path.abspath),
                  # stays the same where the whole project moves
                  'place': at(lambda place: os.path.relpath(os.path.realpath(place),
                                                            os.path.realpath(data_dir))),
                  'tokenizer': tokenizer_label(dataset, tokenizer, vocab_size)}
        before = read_meta(folder) if is_made(folder) else {}
        known = before.get('settings', {})
        if known and not given.get('max_files', 1):
            given = {**given, 'max_files': known['max_files']}      # as many as there are
        options = settings_of(globals()) | known | given
        wanted['settings'] = {key: options[key] for key in options if key not in NOT_IN_META}
        wanted['lists'] = [file_hash(place) for key in ('decontaminate', 'bad_words')
                           for place in lists_of(key, options)
                           ] if given else before.get('lists', [])
        ready = ready_tokenizer(tokenizer or (recipe.tokenizer if recipe else ''), data_dir)
        if ready:   # of which nothing is learnt from the text
            wanted['tokenizer_hash'] = ready.hash()
        work = folder.with_name(f'.{folder.name}.work')
        if recipe and up_to_date(folder, wanted, work):     # a recipe's text does not change
            return folder
        for place in places:
            check_size(place, options)
        tally = Tally()
        sources = find_sources(places, options, data_dir, tally)
        wanted['inputs'] = hash_files(sources)
        wanted['sha256'] = hashlib.sha256(''.join(
            found['sha256'] for found in wanted['inputs']).encode()).hexdigest()
        if recipe or not up_to_date(folder, wanted, work):
            about = '; '.join(RECIPES[place].about if place in RECIPES else f'text from {place}'
                              for place in places)
            licence = '; '.join(RECIPES[place].licence if place in RECIPES else
                                'unknown: your own text' for place in places)
            make(folder, work, sources, options, ready, tally,
                 {'name': name, 'about': about, 'licence': licence, **wanted})
    return folder


def split_places(dataset: str) -> list[str]:
    """The parts of a dataset that is given as several with commas, which a path may have, too."""
    parts, places = dataset.split(','), []
    while parts:
        n = next((n for n in (4, 3, 2) if os.path.exists(','.join(parts[:n]))), 1)
        places.append(','.join(parts[:n]))
        parts = parts[n:]
    return list(filter(None, places))


def is_url(place: str) -> bool:
    return place.startswith(('http://', 'https://'))


def is_there(place: str) -> bool:
    """Whether a place is a path that exists, or a glob that something matches."""
    return os.path.exists(place) or bool(glob.glob(place, recursive=True))


def is_made(folder) -> bool:
    """Whether a folder is a dataset, and not text that happens to have a meta.json."""
    return documents.made_here(folder) == 'a dataset'


def check_size(place: str, options: dict) -> None:
    """Stop before the download of a large dataset that nobody asked for."""
    recipe = RECIPES.get(place)
    if recipe and recipe.n_files and not options['max_files']:
        stop(f'{place} ({recipe.about}) is not here yet, and {recipe.n_files:,} x '
             f'{recipe.file_mb:,} MB to download, which is not started unasked: python prepare.py '
             f'{place} --max_files={recipe.n_files}' + ', or fewer' * (recipe.n_files > 1))


def check_given(folder: Path, given: dict) -> None:
    """Stop if a dataset that is named by its folder was made with other settings than those of the
    command line."""
    found = read_meta(folder)
    known = found.get('settings', {})
    for key in GIVEN:
        same = os.path.realpath if key in FILES else lambda value: value
        if key in known and key in given and same(given[key]) != same(known[key]):
            stop(f'{folder} was made with {key}={known[key]}; to change that, give what it was '
                 'made from: python prepare.py '
                 + shlex.join([found['source'], f'--{key}={given[key]}']))


def check_tokenizer(folder: Path, tokenizer: str, vocab_size: int) -> None:
    """Stop if a dataset that is there already has another tokenizer than the kind asked for."""
    found = read_meta(folder).get('tokenizer')
    asked = tokenizer_label('', tokenizer, vocab_size)
    if tokenizer in tokenizers.KINDS and asked != found:
        stop(f'{folder} was made with tokenizer {found}, not with {asked}; give the text that '
             'it was made from instead')


def tokenizer_label(dataset: str, tokenizer: str, vocab_size: int) -> str:
    """Names a tokenizer in one word: char, byte, gpt2, bpe4096, or of-<last part of a path>."""
    recipe = RECIPES.get(dataset)
    own = recipe.tokenizer if recipe else 'char'
    kind = tokenizer or own
    known = kind in (*tokenizers.KINDS, *hf.GPT2_SIZES)
    if not known and '/' not in kind and not Path(kind).exists():
        stop(f'tokenizer={kind}: must be char, byte, bpe, gpt2, or where a model is: a run, a '
             'folder, or a name on the hub such as Qwen/Qwen3-0.6B')
    if kind != 'bpe':   # a model's name may be that of a kind
        return kind if known else f'of-{os.path.basename(os.path.abspath(kind))}'
    size = vocab_size or (recipe.vocab_size if recipe and own == 'bpe' else 4096)
    if size < 256 + len(tokenizers.SPECIAL):
        stop(f'vocab_size={size}: a bpe has at least {256 + len(tokenizers.SPECIAL)} tokens: the '
             'bytes and the special ones')
    return f'bpe{size}'


def count_tokens(dataset: str, tokenizer: str, vocab_size: int) -> int:
    """How many tokens the tokenizer of a dataset that need not be there has; 0: not known."""
    label = tokenizer_label(dataset, tokenizer, vocab_size)
    if label.startswith('bpe'):
        return int(label[3:])
    if label == 'char' and dataset in RECIPES and RECIPES[dataset].tokenizer == 'char':
        return RECIPES[dataset].vocab_size
    fixed = {'byte': 256 + len(tokenizers.SPECIAL), **dict.fromkeys(hf.GPT2_SIZES, 50_261)}
    return fixed.get(label, 0)


def folder_name(dataset: str, tokenizer: str, vocab_size: int) -> str:
    """The name of a dataset's folder: that of a named one with its own tokenizer, or
    <dataset>_<tokenizer>, where several datasets are joined by a plus."""
    label = tokenizer_label(dataset, tokenizer, vocab_size)
    if dataset in RECIPES and label == tokenizer_label(dataset, '', 0):
        return dataset
    # of a glob and of '.' the folder's name
    stems = [os.path.basename(os.path.abspath(re.sub(r'[^/]*[*?].*', '', place)))
             for place in split_places(dataset)]
    stems = [re.sub(rf'({"|".join(map(re.escape, documents.SUFFIXES))})?(\.gz)?$', '', stem)
             for stem in stems]
    return f'{"+".join(stems)[:100]}_{label[:100]}'


def ready_tokenizer(tokenizer: str, data_dir: str):
    """A tokenizer that needs no training: gpt2, or that of a model (see find_model); or None."""
    if tokenizer in ('', *tokenizers.KINDS):
        return None
    if tokenizer in hf.GPT2_SIZES:
        return tokenizers.gpt2(Path(data_dir) / 'downloads')
    return models.load_tokenizer(tokenizer, data_dir)


def find(dataset: str, data_dir: str = 'data', tokenizer: str = '', vocab_size: int = 0) -> Path:
    """The folder of a dataset that is there already. Stops if it is not."""
    path = Path(dataset)
    known = [Path(data_dir) / folder_name(dataset, tokenizer, vocab_size)]
    known += [] if dataset in RECIPES else [path, Path(data_dir) / dataset]
    found = [folder for folder in known if is_made(folder)]
    if not found:
        stop(f'dataset {dataset!r}: not prepared yet: python prepare.py {shlex.quote(dataset)}')
    return found[0]


def read_meta(folder: Path) -> dict:
    """The meta.json of a dataset. Stops if it cannot be read."""
    path = folder / 'meta.json'
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        for key in ('source', 'sha256', 'max_id', 'about', 'licence'):
            meta[key]
    except (OSError, ValueError, TypeError, KeyError) as e:
        stop(f'{path}: damaged ({type(e).__name__}: {e}); make the dataset again')
    return meta


def up_to_date(folder: Path, wanted: dict, work: Path) -> bool:
    """Whether the meta.json in `folder` says what is wanted; if so, what was left in its work
    folder by a kill at the very end goes.

    Stops if the folder was made from another place, or is no dataset: it must not be replaced.
    """
    if not folder.exists():
        return False
    if not is_made(folder):
        stop(f'{folder} is there already and is no dataset; choose another name with --name')
    found = read_meta(folder)
    if all(found.get(key) != wanted.get(key) for key in ('source', 'place', 'sha256')):
        stop(f'{folder} was made from {found["source"]}, not from {wanted["source"]}; give this '
             f'one another name: python prepare.py {shlex.quote(wanted["source"])} --name=<name>')
    old, new = content(found), content(wanted)
    changed = [key for key, value in new.items() if old.get(key, value) != value]
    changed += ['the program'] * ('settings' not in found)
    if changed:
        print(f'{folder}: {" and ".join(changed)} changed since it was made, so it is made again')
    elif work.exists() and not (work / 'ready').exists():
        shutil.rmtree(work, ignore_errors=True)
    return not changed


def content(meta: dict) -> dict:
    """What makes a dataset what it is, of its meta.json: not how the paths of files are spelled."""
    found = {key: meta[key] for key in ('tokenizer', 'lists', 'sha256') if key in meta}
    if 'inputs' in meta:
        kinds = {documents.suffix(file['file']) for file in meta['inputs'][:1000]}
        found['kinds of files'] = sorted(kinds)
    settings = {key: bool(value) if key in FILES else value
                for key, value in meta.get('settings', {}).items()}
    return {**found, 'tokenizer_hash': meta.get('tokenizer_hash'), **settings}


# ---------------------------------------------------------------------------------------------
# What goes in


def find_sources(places: list[str], options: dict, data_dir: str, tally: Tally) -> list[Source]:
    """The files of all places, downloaded where necessary."""
    shares = options['weights'].split(',') if options['weights'] else ['1'] * len(places)
    try:
        shares = [float(share) for share in shares]
    except ValueError:
        shares = []
    if len(shares) != len(places) or not all(0 < share <= 1000 for share in shares):
        stop(f'weights={options["weights"]}: must be {len(places)} positive numbers with commas '
             f'between, one for each of {", ".join(places)}')
    downloads, sources = str(Path(data_dir) / 'downloads'), []
    for place, share in zip(places, shares):
        try:
            train, val = (RECIPES[place].files(downloads, options['max_files']) if place in RECIPES
                          else (find_files(place, options, data_dir, tally), []))
        except Bad as e:
            stop(str(e))
        sources += [Source(train, share)] + [Source(val, 1.0, True)] * bool(val)
    for place in split_places(options['validation']):
        if not is_there(place):
            stop(f'validation={place}: no such file or folder')
        sources.append(Source(find_files(place, options, data_dir, tally), 1.0, True))
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
    files, left_out = documents.find_files(place, lambda m: complain(m, options, tally), ours, made)
    if made:
        print0('made by this program, so not read as text: '
               + ', '.join(f'{folder} ({what})' for folder, what in made.items()))
    tally.counts.update({f'files left out: {suffix}': n for suffix, n in left_out.items()})
    if not files:
        stop(f'{place}: no text files ({", ".join(documents.SUFFIXES)}, each also as .gz) in this '
             f'folder, but {left_out.total():,} others')
    return files


def complain(message: str, options: dict, tally: Tally) -> None:
    """What happens about bad input: it ends the program, or is counted with skip_bad."""
    if not options['skip_bad']:
        stop(f'{message} (or leave such input out with --skip_bad)')
    warn(f'{message} (left out)')
    tally.bad.append(message)


def hash_files(sources: list[Source]) -> list[dict]:
    """Path, size and SHA-256 of all input files; those that cannot be read are told later."""
    files = [path for source in sources for path in source.files]
    inputs = []
    for path in tqdm(files, desc='hashing', unit='file', leave=False, disable=len(files) < 100):
        try:
            size, sha256 = os.path.getsize(path), file_hash(path)
        except OSError as e:
            size, sha256 = 0, f'cannot be read: {e.strerror}'
        inputs.append({'file': str(path), 'bytes': size, 'sha256': sha256})
    return inputs


def batches(sources: list[Source], options: dict, tally: Tally) -> Iterator[list]:
    """All records in order, some megabytes at a time: lists of (number of the source, record)."""
    total = sum(os.path.getsize(path) for source in sources for path in source.files
                if path.exists())
    batch, size, before = [], 0, 0
    with tqdm(total=total, unit='B', unit_scale=True, desc='cleaning', leave=False,
              disable=total < 4 * BATCH) as bar:
        for number, path in ((i, path) for i, source in enumerate(sources)
                             for path in source.files):
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
            before += os.path.getsize(path) if path.exists() else 0
        if batch:
            yield batch


def benchmark_texts(options: dict) -> Iterator[str]:
    """All strings of the benchmark files that training text must not contain."""
    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from strings(part)

    for place in lists_of('decontaminate', options):
        kind, number = documents.suffix(place), 0
        try:
            with gzip.open(place) if place.endswith('.gz') else open(place, 'rb') as f:
                for line in [f.read()] if kind == '.json' else f:
                    number += 1
                    text = line.decode('utf-8')
                    if kind not in ('.json', '.jsonl'):
                        yield text
                    elif text.strip():
                        yield from strings(json.loads(text))
        except (ValueError, OSError, EOFError) as e:
            stop(f'decontaminate={place}:{number}: cannot be read ({e}); give JSON, JSON lines or '
                 'text, also as .gz')


def lists_of(key: str, options: dict) -> list[str]:
    """The files of the setting decontaminate or bad_words. Stops if one is not there."""
    places = split_places(options[key])
    for place in places:
        if not os.path.isfile(place):
            stop(f'{key}={place}: no such file')
    return places


def bad_words_of(options: dict) -> Iterator[str]:
    """The words and phrases, a line each, that C4's rule does not allow."""
    for place in lists_of('bad_words', options):
        yield from Path(place).read_text(encoding='utf-8').splitlines()


# ---------------------------------------------------------------------------------------------
# All of it


def learn_tokenizer(label: str, corpus: Corpus, splits: tuple[Split, Split], options: dict):
    """A tokenizer for the training text; characters are taken from the validation text as well."""
    def texts(split, fraction=1.0):
        limit = np.uint64(min(fraction, 1) * (2 ** 64 - 2 ** 12))
        split = split._replace(copies=(split.copies > 0) * (corpus.rows['hash'] <= limit))
        for job in jobs(corpus, split):
            yield from texts_of(job, corpus, split)

    val, train = splits
    if not label.startswith('bpe'):
        characters = set()
        for text in itertools.chain(texts(val), texts(train)):
            characters.update(text)
        return tokenizers.KINDS[label].train(''.join(characters))
    total = int((corpus.rows['size'] * (train.copies > 0)).sum())
    tok = tokenizers.BPETokenizer.train(texts(train, SAMPLE / max(1, total)), int(label[3:]),
                                        workers=options['workers'])
    if len(tok) < int(label[3:]):
        warn(f'vocab_size={label[3:]}: after {len(tok):,} tokens no pair of them occurs twice, '
             'so there are no more')
    return tok


def make(folder: Path, work: Path, sources: list[Source], options: dict, ready_tok, tally: Tally,
         meta: dict) -> None:
    """Clean, free of duplicates, encode, report; the finished folder appears at once.

    The work folder beside it is kept until then. A run with the same input, settings and source
    code goes on with what is there.
    """
    plan = {**content(meta), 'source code': source_hashes(__file__)}
    if not (work / 'plan.json').is_file() or json.loads((work / 'plan.json').read_text()) != plan:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        save_json(work / 'plan.json', plan)
    else:
        print(f'{folder}: going on with what an earlier run has done')
    size = sum(found['bytes'] for found in meta['inputs'])
    n_workers = options['workers'] or (cpu_count() if size > 8 * BATCH else 1)
    began = time.perf_counter()
    n_batches = clean_all(work, batches(sources, options, tally), options,
                          benchmark_texts(options), bad_words_of(options), n_workers,
                          # a batch's own tally has it already
                          lambda message: complain(message, options, Tally()))
    said('cleaned', size, began, n_workers)
    corpus = Corpus(work, n_batches, tally)
    if not len(corpus.rows):
        shutil.rmtree(work)
        stop(f'{meta["source"]}: nothing is left to learn from: all of it is empty or dropped')
    began = time.perf_counter()
    given = np.array([source.validation for source in sources])
    stays, pairs = drop_duplicates(corpus, given[corpus.rows['source']], options, n_workers, tally)
    tally.warn_of_losses([str(source.files[0]) + ' and others' * (len(source.files) > 1)
                          for source in sources])
    val, cuts = choose_validation(corpus.rows, stays, given, pairs, options['near_duplicates'],
                                  options['val_fraction'])
    splits = split_corpus(corpus, stays, val, cuts,
                          np.array([source.weight for source in sources]))
    meta['leakage'] = leakage(pairs, splits, options['near_duplicates'])
    for i, source in enumerate(sources):
        mine = stays & ~val & (corpus.rows['source'] == i)
        sizes = corpus.rows['characters'].astype(np.int64)
        share = (splits[1].copies * sizes)[mine].sum() / max(1, sizes[mine].sum())
        if source.weight % 1 and abs(share / source.weight - 1) > 0.1:
            warn(f'weights={options["weights"]}: number {i + 1} is used {share:.2f} times, since '
                 'documents are taken whole; cut its text into more of them')
    said('duplicates found', int(corpus.rows['size'].sum()), began, n_workers)
    ready = work / 'ready'
    ready.mkdir(exist_ok=True)
    if not (work / 'tokenizer.json').is_file():
        began = time.perf_counter()
        tok = ready_tok or learn_tokenizer(meta['tokenizer'], corpus, splits, options)
        tok.save(work / 'tokenizer.part')
        os.replace(work / 'tokenizer.part', work / 'tokenizer.json')
        said('tokenizer ready', min(SAMPLE, int(corpus.rows['size'].sum())), began, n_workers)
    tok = ready_tok or tokenizers.load(work / 'tokenizer.json')
    tok.corpus_normalize = options['normalize']
    began = time.perf_counter()
    for split in splits:
        encode_split(corpus, split, tok, options, n_workers, ready)
    said('encoded', int(corpus.rows['size'][stays].sum()), began, n_workers)
    finish(folder, ready, corpus, stays, tok, tally, meta)
    shutil.rmtree(work)


def said(what: str, size: int, began: float, n_workers: int) -> None:
    """Print how fast a step was, if it took long enough to be measured."""
    seconds = time.perf_counter() - began
    if seconds > 2:
        print(f'  {what}: {size / 1e6:,.0f} MB in {seconds:,.0f} s, {size / 1e6 / seconds:.1f} '
              f'MB/s, {n_workers} process' + 'es' * (n_workers > 1))


def finish(folder: Path, ready: Path, corpus: Corpus, stays: np.ndarray, tok, tally: Tally,
           meta: dict) -> None:
    """Add tokenizer, meta.json and report.html to the shards, and give the folder its name."""
    counts = np.zeros(len(tok), np.int64)
    n_tokens = {}
    for split in ('train', 'val'):
        n_tokens[split] = len(Tokens(ready, split))
        for path in sorted(ready.glob(f'{split}-*.bin')):
            kind, at = open_shard(path).dtype, HEADER.size
            # read, not mapped: what is mapped stays in memory
            while len(ids := np.fromfile(path, kind, 1 << 22, offset=at)):
                counts += np.bincount(ids, minlength=len(tok))
                at += ids.nbytes
    if not n_tokens['train']:
        stop(f'{meta["source"]}: nothing is left to train on; see to weights, validation and rules')
    rows = corpus.rows[stays]
    few = Tokens(ready, 'val' if n_tokens['val'] > 1000 else 'train').read(0, 500_000).tolist()
    text = tok.decode([i for i in few if i != tok.eos])
    gpt2 = gpt2_if_here(folder.parent)
    bins = np.bincount(np.floor(np.log2(np.maximum(1, rows['characters']))).astype(np.int64))
    low = int(np.flatnonzero(bins)[0])
    meta |= {
        'documents': len(rows), 'characters': int(rows['characters'].sum(dtype=np.int64)),
        'bytes': int(corpus.rows['size'][stays].sum()), 'train_tokens': n_tokens['train'],
        'val_tokens': n_tokens['val'], 'vocab_size': len(tok),
        'max_id': int(np.flatnonzero(counts)[-1]), 'steps': tally.steps, 'rules': tally.rules,
        'counts': dict(sorted(tally.counts.items())), 'examples': tally.examples,
        'bad': tally.bad[:1000], 'n_bad': len(tally.bad),
        'bytes_per_token': len(text.encode()) / max(1, len(few)),
        'gpt2_bytes_per_token': len(text.encode()) / len(gpt2.encode(text)) if gpt2 else None,
        'lengths': [[1 << i, 2 << i, int(n)] for i, n in enumerate(bins) if i >= low],
        'frequent': [[tok.tokens[i].decode('utf-8', 'replace'), int(counts[i])]
                     for i in np.argsort(-counts, kind='stable')[:30].tolist() if counts[i]],
        'n_inputs': len(meta['inputs']),
        'input_bytes': sum(found['bytes'] for found in meta['inputs']),
        'inputs': meta['inputs'][:1000]}
    tok.save(ready / 'tokenizer.json')
    save_json(ready / 'meta.json', meta)
    write_report(ready / 'report.html', meta)
    for progress in ready.glob('.*.json'):
        progress.unlink()
    if folder.exists():     # is deleted with the work folder
        os.rename(folder, ready.with_name(f'old-{time.time_ns()}'))
    os.rename(ready, folder)
    print_summary(folder, meta)


def gpt2_if_here(data_dir: Path):
    """GPT-2's tokenizer, if its file is on this machine already, to compare with; or None."""
    places = [data_dir / 'downloads', *map(Path, filter(None, [os.environ.get('DATA_MIRROR')]))]
    return tokenizers.gpt2(data_dir / 'downloads') if any(
        (place / 'gpt2/encoder.json').is_file() for place in places) else None


def print_summary(folder: Path, meta: dict) -> None:
    """What the dataset is and what was removed from it, on a few lines."""
    print(f'{folder}: {meta["about"]} ({meta["licence"]})\n'
          f'  {meta["documents"]:,} documents, {meta["characters"]:,} characters; '
          f'{meta["tokenizer"]} tokenizer of {meta["vocab_size"]:,} tokens\n'
          f'  {meta["train_tokens"]:,} tokens to train on, {meta["val_tokens"]:,} to validate on')
    for name, (documents_in, characters_in, documents_out, characters_out) in meta['steps'].items():
        if characters_in != characters_out:
            print(f'  {name}: {documents_in:,} -> {documents_out:,} documents, {characters_in:,} '
                  f'-> {characters_out:,} characters')
    if meta['leakage'] and meta['documents'] > 1:
        print('  validation documents like one in training: ' + ', '.join(
            f'{n:,} (Jaccard {low} or more)' for low, n in meta['leakage'].items()))
    for what, n in meta['counts'].items():
        if n and what.startswith(('U+FFFD', 'NUL', 'masked', 'files')):
            print(f'  {what}: {n:,}')
    if meta['n_bad']:
        print(f'  left out because it cannot be read: {meta["n_bad"]:,}')
    print(f'  what was removed and why: {folder}/report.html')


def main() -> dict:
    """Build the dataset that the settings name; returns its meta.json."""
    check_bounds(globals(), val_fraction=(0, 0.9), shard_tokens=(1, None), vocab_size=(0, None),
                 near_duplicates=(0, 1), shingle_words=(1, 100),
                 overlap_words=(clean.SHORTEST, 1000), workers=(0, 1000))
    if encoding and not documents.is_encoding(encoding):
        stop(f'encoding={encoding}: no encoding of text that Python knows')
    check_choice(globals(), errors=('strict', 'replace'), normalize=('', 'NFC', 'NFKC'),
                 equal=('', 'exact', 'loose'),
                 quality=('', 'gopher', 'c4', 'gopher,c4', 'c4,gopher'))
    if vocab_size and not tokenizer_label(dataset, tokenizer, vocab_size).startswith('bpe'):
        stop(f'vocab_size={vocab_size}: only a bpe can have any size; add --tokenizer=bpe')
    given = settings_of(globals())
    for key in ('dataset', 'data_dir', 'name', 'tokenizer', 'vocab_size'):
        given.pop(key)
    began = time.time()
    try:
        folder = build(dataset, data_dir, name, tokenizer, vocab_size, **given)
    except NoNetwork as e:
        stop(no_network(dataset, e))
    if (folder / 'meta.json').stat().st_mtime < began:
        print(f'{folder} is up to date: nothing was to be done')
    meta = read_meta(folder)
    print(f'next: {next_command(folder, meta)}')
    return meta


def next_command(folder: Path, meta: dict) -> str:
    """The command that trains on a dataset, for a shell: with its own preset, or one that fits."""
    here, label, source = Path(os.path.relpath(Path(__file__).parent)), meta['tokenizer'], \
        meta['source']
    known = str(folder) if folder.parent != Path('data') else folder.name
    name = source if label == tokenizer_label(source, '', 0) else f'{source}_{label[:3]}'
    if source not in RECIPES or not (here / 'config' / f'{name}.py').is_file():
        name = 'laptop' if label.startswith('bpe') else 'shakespeare' if label in tokenizers.KINDS \
            else '125m' if label == 'gpt2' and meta['train_tokens'] > 1e8 else 'continue_gpt2'
    own = {'bpe': [f'--vocab_size={label[3:]}'],
           'of-': [f'--init_from={tokenizer or "<model>"}', '--tokenizer=']}
    return shlex.join(['python', str(here / 'train.py'), str(here / 'config' / f'{name}.py'),
                       f'--dataset={known}', *own.get(label[:3] if name != source else '', [])])


def no_network(dataset: str, problem: Exception) -> str:
    """What to do when a dataset needs a network and there is none."""
    return (f'dataset {dataset!r} needs a download, but {problem}; put the file into a directory '
            'and set DATA_MIRROR to it, connect to a network, or train on Python\'s own '
            'source with --dataset=python_char')


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
