"""Raw text to token shards: python prepare.py shakespeare, or python prepare.py my_novels/.

A dataset is a folder data/<name>/ with shards of token ids, tokenizer.json and meta.json. It is
named (RECIPES below), or made from any local text file or folder of text, with a tokenizer that is
trained on it or brought along. train.py calls `build` by itself for a dataset that is missing.
"""
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

from core import checkpoint, hf
from core import tokenizer as tokenizers
from core.clean import gutenberg_encoding, strip_gutenberg
from core.dataset import NoNetwork, ShardWriter, fetch, locked
from core.settings import check_bounds, check_choice, configure, stop, warn

POSITIONAL = ('dataset',)

dataset = ''                # a name (see RECIPES), or a text file or a folder of text files
name = ''                   # folder under data_dir; '': the dataset's, or <path's>_<tokenizer>
tokenizer = ''              # char, byte, bpe, gpt2, or where a model is whose tokenizer is taken;
                            # '': the named dataset's own, char for a path
vocab_size = 0              # tokens of a bpe, special ones included; 0: the dataset's own, or 4,096
val_fraction = 0.1          # the last part of the characters, kept for validation
errors = 'strict'           # invalid UTF-8: strict stops at it, replace puts U+FFFD and counts
shard_tokens = 100_000_000  # most tokens in one shard file
data_dir = 'data'           # where datasets and downloads live

TEXT_SUFFIXES = ('.txt', '.md', '.rst', '.py')


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
    vocab_size: int = 0     # tokens, special ones included; for a bpe a choice


# ---------------------------------------------------------------------------------------------
# Raw text


def read_text(path: Path, errors: str = 'strict', encoding: str = 'utf-8') -> Document:
    """One text file, without a byte order mark and with \\n line ends.

    Stops, naming file and byte offset, if it is binary, empty or (unless errors='replace') not
    valid in its encoding.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        stop(f'{path}: cannot be read ({e.strerror})')
    if (at := raw.find(b'\0')) >= 0:
        stop(f'{path}: a binary file (NUL byte at offset {at}); only text can be prepared')
    try:
        text, replaced = raw.decode(encoding), 0
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


def python(downloads: str) -> Iterator[Document]:
    """All of the running Python's standard library but its tests."""
    library = Path(sysconfig.get_paths()['stdlib'])
    apart = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', 'lib2to3'}
    for path in sorted(library.rglob('*.py')):
        if not apart & set(path.relative_to(library).parts) and path.read_bytes().strip():
            yield read_text(path)._replace(source=str(path.relative_to(library)))


AUSTEN = {  # name -> repository of GITenberg, file, commit, SHA-256
    'emma': (
        'Emma_158', '158-0.txt', '9943f6422b9246e7ad37625d6bd014b035fbfdea',
        '89b601ce13c21eca31766bdd1a554842fc9ecb7d3638cc769f41712a523e24cf'),
    'lady_susan': (
        'Lady-Susan_946', '946.txt', '6894e1c45de254d687d5a6b50f81e877e540c842',
        'ec421b0d2419494da0ba8db1b950b510ccbbebe3cf75bf15271c00b4334ff136'),
    'mansfield_park': (
        'Mansfield-Park_141', '141-0.txt', '013305e32f51ac4db88f39e220cb65d390213336',
        '15904304b4c9dd3847a96d60707e6ffb30e3558557e3cff7bc8887d17e145ba8'),
    'northanger_abbey': (
        'Northanger-Abbey_121', '121-0.txt', 'c1b554e6d17c67d26b4fbd4bcc92d7eb4f27b2e7',
        'bbd0f21dbcd079832245a4b9990caeada34965059974a99d2990507461b8647f'),
    'persuasion': (
        'Persuasion_105', '105-8.txt', 'd408e95fc4098953e8dd8eb7cac6023802cb54f4',
        'cce830b4ba2eb09dd95c49bd1a2b55db9d859f21064da933b7f3abab73d02ebe'),
    'pride_and_prejudice': (
        'Pride-and-Prejudice_1342', '1342-0.txt', '81db45c9c48c592f0b77f01fc59e677ad0a5634e',
        '48e0522844402a86a3ea98f0947ba85ea54838db3c59022299298ed968a5a163'),
    'sense_and_sensibility': (
        'Sense-and-Sensibility_161', '161.txt', '1cd7ffed1c21536f6ee2fea4d68c96e2c12ce14c',
        '9109bd8aabe8f36d0814bd6f5afad1e278b1369d66c0d3846667f0659e119d27'),
}


def austen(downloads: str) -> Iterator[Document]:
    """Jane Austen's seven novels without Project Gutenberg's header and licence."""
    for name, (repository, file, commit, sha256) in AUSTEN.items():
        path = fetch(f'austen/{name}.txt', 'https://raw.githubusercontent.com/GITenberg/'
                     f'{repository}/{commit}/{file}', downloads, sha256)
        document = read_text(path, encoding=gutenberg_encoding(path.read_bytes()))
        yield document._replace(text=strip_gutenberg(document.text))


RECIPES = {
    'shakespeare': Recipe('tiny Shakespeare: 40,000 lines of his plays, 1.1 MB',
                          'public domain', 'char', shakespeare, 70),
    # Bytes, not characters: 9 modules use 60 rare characters, which would only widen the model.
    'python_char': Recipe('source of the Python standard library on this machine, about 5 MB',
                          'PSF License Version 2', 'byte', python_char),
    'python': Recipe('source of the Python standard library on this machine, without its tests',
                     'PSF License Version 2', 'bpe', python, 8192),
    'austen': Recipe("Jane Austen's seven novels, 4.4 MB", 'public domain in the US', 'bpe', austen,
                     4096),
}
# Sets that are too large to be downloaded unasked; their tokenizer is GPT-2's.
LARGE = {'openwebtext': ('9 billion tokens of web pages, as GPT-2 was trained on',
                         'about 13.5 GB to download, 54 GB of text, 18 GB of tokens'),
         'fineweb-edu': ('1.3 trillion tokens of web pages chosen for what they teach',
                         'terabytes to download')}

# ---------------------------------------------------------------------------------------------
# Text to shards


def build(dataset: str, data_dir: str = 'data', name: str = '', tokenizer: str = '',
          val_fraction: float | None = None, errors: str = 'strict',
          shard_tokens: int = 100_000_000, vocab_size: int = 0) -> Path:
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
    for folder in () if recipe else (path, made):
        if (folder / 'meta.json').is_file():
            check_tokenizer(folder, tokenizer, vocab_size)
            return folder
    if dataset in LARGE and not (made / 'meta.json').is_file():
        about, size = LARGE[dataset]
        stop(f'{made} is not there: {dataset} ({about}) is {size}, which is not started unasked; '
             f'its loader is not part of this version: put token shards into {made}, or train on '
             'your own text with --dataset=<path>')
    if not recipe and not path.exists():
        stop(f'dataset {dataset!r}: neither a named dataset ({", ".join([*RECIPES, *LARGE])}), '
             f'nor a folder in {data_dir}/, nor a path to text')
    name = name or folder_name(dataset, tokenizer, vocab_size)
    if name in ('', '.', '..', 'downloads') or name != Path(name).name:
        stop(f'name={name}: must be a plain folder name (other than downloads)')
    folder = Path(data_dir) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f'.{name}.lock')):
        wanted = {'source': dataset if recipe else str(path.resolve()),
                  'tokenizer': tokenizer_label(dataset, tokenizer, vocab_size)}
        ready = ready_tokenizer(tokenizer or (recipe.tokenizer if recipe else ''), data_dir)
        if ready:   # of which nothing is learnt from the text
            wanted['tokenizer_hash'] = ready.hash()
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
            whole = ''.join(document.text for document in documents)
            tok = ready or learn_tokenizer(
                wanted['tokenizer'], whole[:int(len(whole) * (1 - meta['val_fraction']))], whole)
            write_dataset(folder, documents, tok, meta, shard_tokens)
    return folder


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
    own = 'gpt2' if dataset in LARGE else recipe.tokenizer if recipe else 'char'
    kind = tokenizer or own
    known = kind in (*tokenizers.KINDS, *hf.GPT2_SIZES)
    if not known and '/' not in kind and not Path(kind).exists():
        stop(f'tokenizer={kind}: must be char, byte, bpe, gpt2, or where a model is: a run, a '
             'folder, or a name on the hub such as Qwen/Qwen3-0.6B')
    if kind != 'bpe':   # a model's name may be that of a kind
        return kind if known else f'of-{Path(kind).name}'
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
    <dataset>_<tokenizer>."""
    label = tokenizer_label(dataset, tokenizer, vocab_size)
    own = dataset in RECIPES and label == tokenizer_label(dataset, '', 0)
    return dataset if own else f'{Path(dataset).stem}_{label}'


def ready_tokenizer(tokenizer: str, data_dir: str):
    """A tokenizer that needs no training: gpt2, or that of a model (see find_model); or None."""
    if tokenizer in ('', *tokenizers.KINDS):
        return None
    if tokenizer in hf.GPT2_SIZES:
        return tokenizers.gpt2(Path(data_dir) / 'downloads')
    return checkpoint.load_tokenizer(tokenizer, data_dir)


def learn_tokenizer(label: str, text: str, whole: str):
    """A tokenizer for the training text; characters are taken from the validation text as well."""
    if label.startswith('bpe'):
        tok = tokenizers.BPETokenizer.train([text], int(label[3:]))
        if len(tok) < int(label[3:]):
            warn(f'vocab_size={label[3:]}: after {len(tok):,} tokens no pair of them occurs twice, '
                 'so there are no more')
        return tok
    return tokenizers.KINDS[label].train(whole)


def find(dataset: str, data_dir: str = 'data', tokenizer: str = '', vocab_size: int = 0) -> Path:
    """The folder of a dataset that is there already. Stops if it is not."""
    path = Path(dataset)
    known = [Path(data_dir) / folder_name(dataset, tokenizer, vocab_size)]
    known += [] if dataset in RECIPES else [path, Path(data_dir) / dataset]
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
    changed = [key for key in {**wanted, 'tokenizer_hash': ''}
               if found.get(key) != wanted.get(key)]
    if changed:
        print(f'{folder}: {" and ".join(changed)} changed since it was made, so it is made again')
    return not changed


def write_dataset(folder: Path, documents: list[Document], tok, meta: dict,
                  shard_tokens: int) -> None:
    """Encode, and let the finished folder appear under its name at once."""
    characters = sum(len(document.text) for document in documents)
    cut = int(characters * (1 - meta['val_fraction']))
    tmp = folder.with_name(f'.{folder.name}.tmp')
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    writers = {split: ShardWriter(tmp, split, len(tok), shard_tokens)
               for split in ('train', 'val')}
    position = 0
    with tqdm(total=characters, unit='char', unit_scale=True, desc='encoding') as bar:
        for number, (_, text, _) in enumerate(documents):
            here = min(max(cut - position, 0), len(text))
            for split, part in (('train', text[:here]), ('val', text[here:])):
                blocks = tok.blocks(part)
                for i in range(0, len(blocks), 16):
                    for ids in tok.encode_batch(blocks[i:i + 16]):
                        writers[split].write(ids)
                    bar.update(sum(map(len, blocks[i:i + 16])))
            position += len(text)
            if number < len(documents) - 1:
                last = 'train' if position <= cut else 'val'
                writers[last].write([tok.eos])
    for writer in writers.values():
        writer.flush()
    tok.save(tmp / 'tokenizer.json')
    meta |= {'documents': len(documents), 'characters': characters,
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
    check_bounds(globals(), val_fraction=(0, 0.9), shard_tokens=(1, None), vocab_size=(0, None))
    check_choice(globals(), errors=('strict', 'replace'))
    if vocab_size and not tokenizer_label(dataset, tokenizer, vocab_size).startswith('bpe'):
        stop(f'vocab_size={vocab_size}: only a bpe can have any size; add --tokenizer=bpe')
    try:
        folder = build(dataset, data_dir, name, tokenizer, val_fraction, errors, shard_tokens,
                       vocab_size)
    except NoNetwork as e:
        stop(no_network(dataset, e))
    preset = folder.name if Path(f'config/{folder.name}.py').is_file() else 'shakespeare'
    print(f'ready: python train.py config/{preset}.py --dataset={folder.name}')
    return read_meta(folder)


def no_network(dataset: str, problem: Exception) -> str:
    """What to do when a dataset needs a network and there is none."""
    return (f'dataset {dataset!r} needs a download, but {problem}; put the file into a directory '
            'and set DATA_MIRROR to it, connect to a network, or train on Python\'s own '
            'source with --dataset=python_char')


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
