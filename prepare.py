"""Raw text to token shards: python prepare.py shakespeare, or python prepare.py my_novels/.

A dataset is a folder data/<name>/ with shards of token ids, tokenizer.json and meta.json. It is
named (RECIPES below), or made from any local text file or folder of text. train.py calls `build`
by itself for a dataset that is missing.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from core import tokenizer as tokenizers
from core.dataset import NoNetwork, ShardWriter, fetch
from core.settings import check_bounds, check_choice, configure, stop, warn

POSITIONAL = ('dataset',)

dataset = ''                # a name (see RECIPES), or a text file or a folder of text files
name = ''                   # folder under data_dir; '': the dataset's, or <path's>_<tokenizer>
tokenizer = ''              # char or byte; '': the named dataset's own, char for a path
val_fraction = 0.1          # the last part of the characters, kept for validation
errors = 'strict'           # invalid UTF-8: strict stops at it, replace puts U+FFFD and counts
shard_tokens = 100_000_000  # most tokens in one shard file
data_dir = 'data'           # where datasets and downloads live

TEXT_SUFFIXES = ('.txt', '.md', '.rst', '.py')
BLOCK = 1 << 20             # characters encoded at a time


class Document(NamedTuple):
    """One text with where it came from."""
    source: str
    text: str
    replaced: int = 0       # times U+FFFD was put for invalid UTF-8


class Recipe(NamedTuple):
    """How a named dataset is made."""
    about: str
    licence: str
    tokenizer: str
    documents: Callable[[str], Iterator[Document]]  # takes the folder for downloads


# ---------------------------------------------------------------------------------------------
# Raw text


def read_text(path: Path, errors: str = 'strict') -> Document:
    """One UTF-8 text file, without a byte order mark and with \\n line ends.

    Stops, naming file and byte offset, if it is binary, empty or (unless errors='replace') not
    valid UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        stop(f'{path}: cannot be read ({e.strerror})')
    if (at := raw.find(b'\0')) >= 0:
        stop(f'{path}: a binary file (NUL byte at offset {at}); only text can be prepared')
    try:
        text, replaced = raw.decode('utf-8'), 0
    except UnicodeDecodeError as e:
        if errors == 'strict':
            stop(f'{path}: invalid UTF-8 at byte offset {e.start} (0x{raw[e.start]:02x}); '
                 f'convert it, or prepare it with: python prepare.py {path} --errors=replace')
        text = raw.decode('utf-8', errors='replace')
        replaced = text.count('\ufffd') - raw.count('\ufffd'.encode())
    text = text.removeprefix('\ufeff').replace('\r\n', '\n')
    if not text.strip():
        stop(f'{path}: empty; there is nothing to learn from')
    return Document(str(path), text, replaced)


def read_path(path: Path, errors: str = 'strict') -> Iterator[Document]:
    """The text of a file, or of all text files below a folder in the order of their names."""
    if path.is_file():
        yield read_text(path, errors)
        return
    files = sorted(p for p in path.rglob('*') if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
    if not any(file.read_bytes().strip() for file in files):
        stop(f'{path}: no text files ({", ".join(TEXT_SUFFIXES)}) in this folder, or all empty')
    for file in tqdm(files, desc='reading', unit='file', leave=False, disable=len(files) < 100):
        if not file.read_bytes().strip():
            warn(f'{file}: empty, left out')
            continue
        yield read_text(file, errors)


def shakespeare(downloads: str) -> Iterator[Document]:
    yield read_text(fetch(
        'shakespeare.txt', 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
        'tinyshakespeare/input.txt', downloads, size=1_115_394,
        sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'))


def python_char(downloads: str) -> Iterator[Document]:
    """The top-level modules of the running Python's standard library: they are always there."""
    library = Path(sysconfig.get_paths()['stdlib'])
    for path in sorted(library.glob('*.py')):
        yield read_text(path)._replace(source=path.name)


RECIPES = {
    'shakespeare': Recipe('tiny Shakespeare: 40,000 lines of his plays, 1.1 MB',
                          'public domain', 'char', shakespeare),
    # Bytes, not characters: 9 modules use 60 rare characters, which would only widen the model.
    'python_char': Recipe('source of the Python standard library on this machine, about 5 MB',
                          'PSF License Version 2', 'byte', python_char),
}
# Sets that are too large to be downloaded unasked.
LARGE = {'openwebtext': ('9 billion tokens of web pages, as GPT-2 was trained on',
                         'about 13.5 GB to download, 54 GB of text, 18 GB of tokens')}

# ---------------------------------------------------------------------------------------------
# Text to shards


def build(dataset: str, data_dir: str = 'data', name: str = '', tokenizer: str = '',
          val_fraction: float | None = None, errors: str = 'strict',
          shard_tokens: int = 100_000_000) -> Path:
    """Make the dataset unless it is there already, and return its folder.

    `dataset` is a named dataset, a folder under `data_dir`, or a path to text. A dataset made from
    a path is made again when its text has changed, and any with another val_fraction than the one
    given (None: 0.1, or whatever it was made with). A file lock lets one process of a machine work
    while the others wait. Raises NoNetwork if a download is needed and impossible.
    """
    if not dataset:
        stop(f'no dataset given: name one of {", ".join(RECIPES)}, or a path to text')
    recipe, path = RECIPES.get(dataset), Path(dataset)
    made = Path(data_dir) / dataset
    if not recipe and (path / 'meta.json').is_file():
        return path
    if dataset in LARGE and not (made / 'meta.json').is_file():
        about, size = LARGE[dataset]
        stop(f'{made} is not there: {dataset} ({about}) is {size}, which is not started unasked; '
             f'its loader is not part of this version: put token shards into {made}, or train on '
             'your own text with --dataset=<path>')
    if not recipe and (made / 'meta.json').is_file():
        return made
    if not recipe and not path.exists():
        stop(f'dataset {dataset!r}: neither a named dataset ({", ".join([*RECIPES, *LARGE])}), '
             f'nor a folder in {data_dir}/, nor a path to text')
    kind = tokenizer or (recipe.tokenizer if recipe else 'char')
    name = name or (dataset if recipe and kind == recipe.tokenizer else f'{path.stem}_{kind}')
    if name in ('', '.', '..', 'downloads') or name != Path(name).name:
        stop(f'name={name}: must be a plain folder name (other than downloads)')
    folder = Path(data_dir) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f'.{name}.lock')):
        wanted = {'source': dataset if recipe else str(path.resolve()), 'tokenizer': kind}
        if val_fraction is not None:
            wanted['val_fraction'] = val_fraction
        if recipe and up_to_date(folder, wanted):  # a recipe's text does not change
            return folder
        documents = list(recipe.documents(str(Path(data_dir) / 'downloads')) if recipe
                         else read_path(path, errors))
        wanted['sha256'] = text_hash(documents)
        if recipe or not up_to_date(folder, wanted):
            meta = {'name': name, 'about': recipe.about if recipe else f'text from {dataset}',
                    'licence': recipe.licence if recipe else 'unknown: your own text',
                    'val_fraction': 0.1, **wanted}
            write_dataset(folder, documents, meta, shard_tokens)
    return folder


def find(dataset: str, data_dir: str = 'data') -> Path:
    """The folder of a dataset that is there already. Stops if it is not."""
    path = Path(dataset)
    known = [path, Path(data_dir) / dataset, *(Path(data_dir) / f'{path.stem}_{kind}'
                                               for kind in tokenizers.KINDS)]
    found = [folder for folder in known if (folder / 'meta.json').is_file()]
    if not found:
        stop(f'dataset {dataset!r}: not prepared yet: python prepare.py {dataset}')
    return found[0]


def read_meta(folder: Path) -> dict:
    """The meta.json of a dataset. Stops if it cannot be read."""
    path = folder / 'meta.json'
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        for key in ('source', 'sha256', 'max_id', 'about', 'licence'):
            meta[key]
    except (OSError, ValueError, TypeError, KeyError) as e:
        stop(f'{path}: damaged ({type(e).__name__}: {e}); delete {folder} and make it again')
    return meta


@contextlib.contextmanager
def locked(path: Path):
    """Hold a file lock, which the system releases even if this process is killed."""
    with open(path, 'a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def text_hash(documents: list[Document]) -> str:
    """SHA-256 over all documents, their boundaries included."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.text.encode('utf-8')
        digest.update(len(data).to_bytes(8, 'little') + data)
    return digest.hexdigest()


def up_to_date(folder: Path, wanted: dict) -> bool:
    """Whether the meta.json in `folder` says what is wanted.

    Stops if the folder was made from another place, or is no dataset: it must not be replaced.
    """
    if not folder.exists():
        return False
    if not (folder / 'meta.json').is_file():
        stop(f'{folder} is there already and is no dataset; choose another name with --name')
    found = read_meta(folder)
    if found['source'] != wanted['source']:
        stop(f'{folder} was made from {found["source"]}, not from {wanted["source"]}; give this '
             f'one another name: python prepare.py {wanted["source"]} --name=<name>')
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        print(f'{folder}: {" and ".join(changed)} changed since it was made, so it is made again')
    return not changed


def write_dataset(folder: Path, documents: list[Document], meta: dict, shard_tokens: int) -> None:
    """Train the tokenizer, encode, and let the finished folder appear under its name at once."""
    whole = ''.join(document.text for document in documents)
    tok = tokenizers.KINDS[meta['tokenizer']].train(whole)
    cut = int(len(whole) * (1 - meta['val_fraction']))
    tmp = folder.with_name(f'.{folder.name}.tmp')
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    writers = {split: ShardWriter(tmp, split, len(tok), shard_tokens)
               for split in ('train', 'val')}
    position = 0
    with tqdm(total=len(whole), unit='char', unit_scale=True, desc='encoding') as bar:
        for number, (_, text, _) in enumerate(documents):
            here = min(max(cut - position, 0), len(text))
            for split, part in (('train', text[:here]), ('val', text[here:])):
                for i in range(0, len(part), BLOCK):
                    writers[split].write(tok.encode(part[i:i + BLOCK]))
                    bar.update(len(part[i:i + BLOCK]))
            position += len(text)
            if number < len(documents) - 1:
                last = 'train' if position <= cut else 'val'
                writers[last].write([tok.special['<|endoftext|>']])
    for writer in writers.values():
        writer.flush()
    tok.save(tmp / 'tokenizer.json')
    meta |= {'documents': len(documents), 'characters': len(whole),
             'bytes': sum(len(document.text.encode()) for document in documents),
             'replaced': sum(document.replaced for document in documents),
             'train_tokens': writers['train'].n_tokens, 'val_tokens': writers['val'].n_tokens,
             'vocab_size': len(tok), 'max_id': max(w.max_id for w in writers.values()),
             'files': [{'source': document.source, 'characters': len(document.text)}
                       for document in documents[:1000]]}
    (tmp / 'meta.json').write_text(json.dumps(meta, indent=1, ensure_ascii=False) + '\n',
                                   encoding='utf-8')
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(tmp, folder)
    report(folder, meta)


def report(folder: Path, meta: dict) -> None:
    invalid = f', {meta["replaced"]:,} times U+FFFD for invalid UTF-8' if meta['replaced'] else ''
    print(f'{folder}: {meta["about"]} ({meta["licence"]})\n'
          f'  {meta["documents"]:,} documents, {meta["characters"]:,} characters{invalid}; '
          f'{meta["tokenizer"]} tokenizer of {meta["vocab_size"]:,} tokens\n'
          f'  {meta["train_tokens"]:,} tokens to train on, {meta["val_tokens"]:,} to validate on')


def main() -> dict:
    """Build the dataset that the settings name; returns its meta.json."""
    check_bounds(globals(), val_fraction=(0, 0.9), shard_tokens=(1, None))
    check_choice(globals(), tokenizer=('', *tokenizers.KINDS), errors=('strict', 'replace'))
    try:
        folder = build(dataset, data_dir, name, tokenizer, val_fraction, errors, shard_tokens)
    except NoNetwork as e:
        stop(no_network(dataset, e))
    print(f'ready: python train.py config/shakespeare.py --dataset={folder.name}')
    return read_meta(folder)


def no_network(dataset: str, problem: Exception) -> str:
    """What to do when a dataset needs a network and there is none."""
    return (f'dataset {dataset!r} needs a download, but {problem}; put the file into a directory '
            'and set DATA_MIRROR to it, connect to a network, or train on Python\'s own '
            'source with --dataset=python_char')


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
