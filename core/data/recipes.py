"""The named datasets for pretraining, and the named sets of records: where they come from.

A dataset is a function of the folder for downloads and of max_files, which large ones need: it
returns the files to train on, and those to validate on (none: a part of the others is taken).
"""
import os
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from core.formats.hub import endpoint
from core.read import stdlib
from core.read.documents import read
from core.read.download import fetch, locked


class Recipe(NamedTuple):
    """How a named dataset is made."""
    about: str
    licence: str
    tokenizer: str
    files: Callable[[str, int], tuple[list, list]]
    vocab_size: int = 0     # tokens, special ones included; for a bpe a choice
    n_files: int = 0        # of a large one, which is not downloaded unasked
    file_mb: int = 0        # how large each is, about


GITHUB = 'https://raw.githubusercontent.com'
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


def hub(repository: str, revision: str, downloads: str, names: list[str]) -> list[Path]:
    """Files of a dataset on Hugging Face's hub; the first download's hashes are kept."""
    url, headers = endpoint()
    return [fetch(f'{repository}/{name}', f'{url}/datasets/{repository}/resolve/{revision}/{name}',
                  downloads, headers=headers) for name in names]


def tinystories(downloads: str, max_files: int) -> tuple[list, list]:
    """The second version, all of it written by GPT-4."""
    train, val = hub('roneneldan/TinyStories', 'f54c09fd23315a6f9c86f9dc80f725de7d8f9c64',
                     downloads, [f'TinyStoriesV2-GPT4-{part}.txt' for part in ('train', 'valid')])
    return [train], [val]


def wikitext(downloads: str, max_files: int) -> tuple[list, list]:
    """WikiText-103, whose rows are lines, as articles."""
    names = [f'wikitext-103-raw-v1/{part}.parquet' for part in (
        'train-00000-of-00002', 'train-00001-of-00002', 'validation-00000-of-00001')]
    *train, val = hub('Salesforce/wikitext', 'b08601e04326c79dfdd32d625aee71d232d685c3', downloads,
                      names)
    return ([join_rows(train, Path(downloads) / 'wikitext-103-train.txt')],
            [join_rows([val], Path(downloads) / 'wikitext-103-val.txt')])


def join_rows(tables: list[Path], path: Path) -> Path:
    """WikiText's rows as one text file, in which a line <|endoftext|> ends each article: the next
    begins with a heading like ' = Title = ' (those within it are ' = = Part = = ')."""
    with locked(path.with_name(f'.{path.name}.lock')):
        if path.is_file():
            return path
        tmp = path.with_name(f'{path.name}.part')
        with open(tmp, 'w', encoding='utf-8') as f:
            for table in tables:
                for record in read(table, '', 'strict', 'text'):
                    if re.fullmatch(r' = [^=].* = \n', record.data) and f.tell():
                        f.write('<|endoftext|>\n')
                    f.write(record.data)
        os.replace(tmp, path)
    return path


RECIPES = {
    'shakespeare': Recipe(
        'tiny Shakespeare: 40,000 lines of his plays, 1.1 MB', 'public domain', 'char',
        lambda downloads, max_files: ([fetch(
            'shakespeare.txt', f'{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
            downloads, size=1_115_394,
            sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')], []), 70),
    # Bytes, not characters: 9 modules use 60 rare characters, which would only widen the model.
    'python_char': Recipe(
        'source of the Python standard library on this machine, about 5 MB',
        'PSF License Version 2', 'byte',
        lambda downloads, max_files: (
            sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py')), [])),
    'python': Recipe(
        'source of the Python standard library on this machine, without its tests',
        'PSF License Version 2', 'bpe', lambda downloads, max_files: (stdlib.modules(), []), 8192),
    'austen': Recipe(
        "Jane Austen's seven novels, 4.4 MB", 'public domain in the US', 'bpe',
        lambda downloads, max_files: ([fetch(
            f'austen/{name}.txt', f'{GITHUB}/GITenberg/{repository}/{commit}/{file}', downloads,
            sha256) for name, (repository, file, commit, sha256) in AUSTEN.items()], []), 4096),
    'tinystories': Recipe(
        '2.7 million short stories that a child of three or four understands, written by GPT-4',
        'CDLA-Sharing-1.0', 'bpe', tinystories, 4096, 1, 2_250),
    'wikitext': Recipe(
        'WikiText-103: 28,000 good articles of Wikipedia', 'CC BY-SA 3.0 and GFDL', 'gpt2',
        wikitext, 0, 1, 315),
    'openwebtext': Recipe(
        '9 billion tokens of web pages, chosen as for GPT-2',
        'CC0 for the collection, the pages are of their authors', 'gpt2',
        lambda downloads, max_files: (hub(
            'Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c', downloads,
            [f'plain_text/train-{i:05d}-of-00080.parquet' for i in range(max_files)]), []),
        0, 80, 303),
    'fineweb-edu': Recipe(
        '100 billion tokens of web pages chosen for what they teach, shuffled', 'ODC-By 1.0',
        'gpt2', lambda downloads, max_files: (hub(
            'karpathy/fineweb-edu-100b-shuffle', 'main', downloads,
            [f'shard_{i:05d}.parquet' for i in range(max_files)]), []), 0, 1823, 100)}


class NamedSet(NamedTuple):
    """A set of records for post-training."""
    about: str
    licence: str
    kind: str                   # conversation, preference or labelled, of core/data/records.py
    source: str | Callable      # a URL, or what makes (where, dict) on the spot


BOOK = f'{GITHUB}/rasbt/LLMs-from-scratch/main/ch07'
SETS = {
    'instruction': NamedSet(
        '1,100 instructions with answers', 'Apache-2.0', 'conversation',
        f'{BOOK}/01_main-chapter-code/instruction-data.json'),
    'preference': NamedSet(
        '1,100 instructions, each with a polite and an impolite answer', 'Apache-2.0', 'preference',
        f'{BOOK}/04_preference-tuning-with-dpo/instruction-data-with-preference.json'),
    'sms_spam': NamedSet(
        '5,574 text messages, 13% of them spam', 'free for research', 'labelled',
        f'{GITHUB}/justmarkham/pycon-2016-tutorial/master/data/sms.tsv'),
    'python_chat': NamedSet(
        'docstring -> function: from the Python standard library on this machine',
        'PSF License Version 2', 'conversation', stdlib.docstrings),
    'python_modules': NamedSet(
        'function -> package it is from: the Python standard library on this machine',
        'PSF License Version 2', 'labelled', stdlib.origins),
    'python_bugs': NamedSet(
        'docstring -> true function against a corrupted one: the Python standard library',
        'PSF License Version 2', 'preference', stdlib.corrupted)}
