"""What a dataset is called, what makes it what it is, and whether it is there already."""
import glob
import json
import os
import re
import shlex
import shutil
from pathlib import Path

from core.data.recipes import RECIPES
from core.formats import hub
from core.read import documents
from core.settings import stop
from core.text import tokenizer as tokenizers

ROOT = Path(__file__).parents[2]
META = {    # what meta.json must have
    **dict.fromkeys(('source', 'sha256', 'about', 'licence', 'tokenizer'), str),
    **dict.fromkeys(('max_id', 'train_tokens', 'val_tokens', 'vocab_size'), int), 'settings': dict}
FILES = ('validation', 'decontaminate', 'bad_words')     # settings of prepare.py that name files

def split_places(dataset: str) -> list[str]:
    """The parts of a dataset given as several with commas; a path may have commas, too."""
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


def join_places(places: list[str], path_as) -> str:
    """The places with commas between them, each path spelled by the function path_as."""
    return ','.join(place if place in RECIPES or is_url(place) else path_as(place)
                    for place in places)


def check_sizes(places: list[str], max_files: int) -> None:
    """Stop before the download of a large dataset that nobody asked for."""
    for place in places:
        recipe = RECIPES.get(place)
        if recipe and recipe.n_files and not max_files:
            stop(f'{place} ({recipe.about}) is not here yet, and {recipe.n_files:,} x '
                 f'{recipe.file_mb:,} MB to download, which is not started unasked: python '
                 f'prepare.py {place} --max_files={recipe.n_files}'
                 + ', or fewer' * (recipe.n_files > 1))


def tokenizer_label(dataset: str, tokenizer: str, vocab_size: int) -> str:
    """Names a tokenizer in one word: char, byte, gpt2, bpe4096, or of-<last part of a path>."""
    recipe = RECIPES.get(dataset)
    kind = tokenizer or (recipe.tokenizer if recipe else 'char')
    known = kind in (*tokenizers.KINDS, *hub.GPT2_SIZES)
    if not known and '/' not in kind and not Path(kind).exists():
        stop(f'tokenizer={kind}: must be char, byte, bpe, gpt2, or where a model is: a run, a '
             'folder, or a name on the hub such as Qwen/Qwen3-0.6B')
    if kind != 'bpe':   # a model's name may be that of a kind
        return kind if known else f'of-{os.path.basename(os.path.abspath(kind))}'
    least = 256 + len(tokenizers.SPECIAL)
    size = vocab_size or (recipe.vocab_size if recipe and recipe.tokenizer == 'bpe' else 4096)
    if size < least:
        stop(f'vocab_size={size}: a bpe has at least {least} tokens: the bytes and the special '
             'ones')
    return f'bpe{size}'


def count_tokens(dataset: str, tokenizer: str, vocab_size: int) -> int:
    """How many tokens the tokenizer of a dataset that need not be there has; 0: not known."""
    label = tokenizer_label(dataset, tokenizer, vocab_size)
    if label.startswith('bpe'):
        return int(label[3:])
    if label == 'char' and dataset in RECIPES and RECIPES[dataset].tokenizer == 'char':
        return RECIPES[dataset].vocab_size
    if label in hub.GPT2_SIZES:
        return 50_257 + len(tokenizers.CHAT)
    return 256 + len(tokenizers.SPECIAL) if label == 'byte' else 0


def folder_name(dataset: str, tokenizer: str, vocab_size: int) -> str:
    """The name of a dataset's folder: the dataset's, with another tokenizer than its own
    <dataset>_<tokenizer>; several datasets are joined by a plus."""
    label = tokenizer_label(dataset, tokenizer, vocab_size)
    if dataset in RECIPES and label == tokenizer_label(dataset, '', 0):
        return dataset
    # of a glob and of '.' the folder's name
    stems = [os.path.basename(os.path.abspath(re.sub(r'[^/]*[*?].*', '', place)))
             for place in split_places(dataset)]
    stems = [re.sub(rf'({"|".join(map(re.escape, documents.SUFFIXES))})?(\.gz)?$', '', stem)
             for stem in stems]
    return f'{"+".join(stems)[:100]}_{label[:100]}'


def is_made(folder) -> bool:
    """Whether a folder is a dataset, and not text that happens to have a meta.json."""
    return documents.made_here(folder) == 'a dataset'


def made_folder(dataset: str, data_dir: str) -> Path | None:
    """The finished dataset that is named by its folder; None if the name means anything else."""
    places = () if dataset in RECIPES else (dataset, os.path.join(data_dir, dataset))
    return next((Path(folder) for folder in places if is_made(folder)), None)


def find(dataset: str, data_dir: str = 'data', tokenizer: str = '', vocab_size: int = 0) -> Path:
    """The folder of a dataset that is there already. Stops if it is not."""
    folder = Path(data_dir) / folder_name(dataset, tokenizer, vocab_size)
    found = folder if is_made(folder) else made_folder(dataset, data_dir)
    if not found:
        stop(f'dataset {dataset!r}: not prepared yet: python prepare.py {shlex.quote(dataset)}')
    return found


def read_meta(folder: Path) -> dict:
    """The meta.json of a dataset. Stops if it cannot be read."""
    path = folder / 'meta.json'
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        for key, kind in META.items():
            if not isinstance(meta[key], kind) or kind is int and not 0 <= meta[key] < 1 << 63:
                raise ValueError(f'{key} is {meta[key]!r:.40}')
        [file['file'].split() for file in meta.get('inputs', [])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        stop(f'{path}: damaged ({type(e).__name__}: {e}); make the dataset again')
    return meta


def check_made_with(folder: Path, tokenizer: str, vocab_size: int, given: dict) -> None:
    """Stop if a dataset that is named by its folder was made with another kind of tokenizer, or
    with other settings, than those that are given."""
    meta = read_meta(folder)
    asked = tokenizer_label('', tokenizer, vocab_size)
    if tokenizer in tokenizers.KINDS and asked != meta['tokenizer']:
        stop(f'{folder} was made with tokenizer {meta["tokenizer"]}, not with {asked}; give the '
             'text that it was made from instead')
    for key, value in given.items():
        known = meta['settings'].get(key, value)
        same = known == value or key in FILES and os.path.realpath(
            str(known)) == os.path.realpath(value)
        if not same:
            again = shlex.join([meta['source'], f'--{key}={value}'])
            stop(f'{folder} was made with {key}={known}; to change that, give what it was made '
                 f'from: python prepare.py {again}')


def work_folder(folder: Path) -> Path:
    """Where a dataset is made, until it is finished."""
    return folder.with_name(f'.{folder.name}.work')


def up_to_date(folder: Path, wanted: dict) -> bool:
    """Whether the meta.json in `folder` says what is wanted.

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
    if changed:
        print(f'{folder}: {" and ".join(changed)} changed since it was made, so it is made again')
    elif not (work_folder(folder) / 'ready').exists():     # a kill at the very end left the rest
        shutil.rmtree(work_folder(folder), ignore_errors=True)
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


def next_command(folder: Path, meta: dict, tokenizer: str = '') -> str:
    """The command that trains on a dataset, for a shell: with its own preset, or one that fits.
    `tokenizer` is the setting that the dataset was made with."""
    label, source, here = meta['tokenizer'], meta['source'], Path(os.path.relpath(ROOT))
    known = str(folder) if folder.parent != Path('data') else folder.name
    preset = source if label == tokenizer_label(source, '', 0) else f'{source}_{label[:3]}'
    if source not in RECIPES or not (ROOT / 'config' / f'{preset}.py').is_file():
        preset = 'laptop' if label.startswith('bpe') else \
            'shakespeare' if label in tokenizers.KINDS else \
            '125m' if label == 'gpt2' and meta['train_tokens'] > 1e8 else 'continue_gpt2'
    flags = []
    if label.startswith('bpe') and preset != source:
        flags = [f'--vocab_size={label[3:]}']
    elif label.startswith('of-') and preset != source:
        flags = [f'--init_from={tokenizer or "<model>"}', '--tokenizer=']
    return shlex.join(['python', str(here / 'train.py'), str(here / 'config' / f'{preset}.py'),
                       f'--dataset={known}', *flags])


def no_network(dataset: str, problem: Exception) -> str:
    """What to do when a dataset needs a network and there is none."""
    return (f'dataset {dataset!r} needs a download, but {problem}; put the file into a directory '
            'and set DATA_MIRROR to it, connect to a network, or train on Python\'s own '
            'source with --dataset=python_char')
