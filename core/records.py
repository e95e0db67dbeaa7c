"""Records for post-training: conversations, preferences and labelled texts, read and checked.

A file is .jsonl, .json (an array), .csv or .tsv, each also as .gz. Each record is checked as soon
as it is read; what is wrong with one is a Bad with its file and line. A named set comes from a
mirror directory or its URL, or is made from the source of Python's standard library.
"""
import csv
import gzip
import hashlib
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core import stdlib
from core.documents import LONGEST_LINE, Bad, read, suffix
from core.download import NoNetwork, fetch
from core.processes import print0
from core.settings import stop
from core.tokenizer import ROLES

SUFFIXES = ('.jsonl', '.json', '.csv', '.tsv')


class Conversation(NamedTuple):
    """What a chat model learns from; the last message is the assistant's."""
    where: str
    messages: list[dict]


class Preference(NamedTuple):
    """Two answers to the same messages, of which people prefer one."""
    where: str
    messages: list[dict]
    chosen: str
    rejected: str


class Labelled(NamedTuple):
    """A text and its class."""
    where: str
    text: str
    label: str


# ---------------------------------------------------------------------------------------------
# Files to dicts


def rows_of(path: Path, columns: tuple = ()) -> Iterator[tuple[str, dict | Bad]]:
    """(file:line, record) of a file; in the place of a record that cannot be read stands the Bad
    that says why. Raises Bad where nothing after it can be read.

    A table without a header line, where that is not `columns`, has them in this order.
    """
    kind = suffix(path)
    if kind == '.jsonl':
        for record in read(path, '', 'strict', ''):
            yield record.where, parse(record.where, record.data, record.kind)
    elif kind in ('.csv', '.tsv'):
        yield from table_rows(path, kind, columns)
    elif kind == '.json':
        yield from array_rows(path, read_text(path))
    else:
        raise Bad(f'{path}: records are read from {", ".join(SUFFIXES)}; convert it')


def read_text(path: Path) -> str:
    """A whole file of UTF-8. Raises Bad."""
    try:
        with (gzip.open if path.suffix.lower() == '.gz' else open)(path, 'rb') as f:
            return f.read().decode().removeprefix('\ufeff')
    except UnicodeDecodeError as e:
        raise Bad(f'{path}: invalid UTF-8 at byte offset {e.start}; convert it') from e
    except (OSError, EOFError, zlib.error) as e:
        raise Bad(f'{path}: cannot be read ({getattr(e, "strerror", None) or e}); see that it is '
                  'there and whole') from e


def parse(where: str, line: bytes, kind: str) -> dict | Bad:
    """The object that a JSON line is, or what is wrong with it."""
    if kind == 'bad':
        return Bad(line)
    try:
        return check_object(where, json.loads(line))
    except (ValueError, RecursionError) as e:
        return Bad(f'{where}: invalid JSON ({e}); correct the line')


def check_object(where: str, record) -> dict | Bad:
    if not isinstance(record, dict):
        return Bad(f'{where}: is {type(record).__name__}, not an object {{...}}; correct it')
    return record


def array_rows(path: Path, text: str) -> Iterator[tuple[str, dict | Bad]]:
    """The records of a JSON array, with the lines where they begin."""
    decoder, at, line, counted = json.JSONDecoder(), skip(text, 0), 1, 0
    if text[at:at + 1] != '[':
        raise Bad(f'{path}:1: not an array [...]; a file with one record a line is named .jsonl')
    at = skip(text, at + 1)
    while text[at:at + 1] != ']':
        line, counted = line + text.count('\n', counted, at), at
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise Bad(f'{path}:{line}: invalid JSON ({e}); correct it') from e
        yield f'{path}:{line}', check_object(f'{path}:{line}', record)
        at = skip(text, at)
        if text[at:at + 1] == ',':
            at = skip(text, at + 1)
        elif text[at:at + 1] != ']':
            line += text.count('\n', counted, at)
            raise Bad(f'{path}:{line}: a comma or ] is missing between records; correct it')
    if (at := skip(text, at + 1)) < len(text):
        line += text.count('\n', counted, at)
        raise Bad(f'{path}:{line}: more after the array, which would be lost; join the two')


def skip(text: str, at: int) -> int:
    """The next position that is no white space."""
    while at < len(text) and text[at] in ' \t\r\n':
        at += 1
    return at


def table_rows(path: Path, kind: str, columns: tuple) -> Iterator[tuple[str, dict | Bad]]:
    """The rows of a CSV or TSV file (which knows no quotes)."""
    options = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE} if kind == '.tsv' else {'strict': True}
    rows = csv.reader(io.StringIO(read_text(path).replace('\0', ''), newline=''), **options)
    csv.field_size_limit(LONGEST_LINE - 1)
    names = None
    while True:
        where = f'{path}:{rows.line_num + 1}'
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            bad = Bad(f'{where}: {e}; mend the row')
            if 'end of data' in str(e):     # a quote without end has swallowed all other rows
                raise bad from e
            yield where, bad
            continue
        where = f'{path}:{rows.line_num}'
        if not row:
            continue
        if names is None:
            asked = {'instruction' if name == 'prompt' else name for name in row}
            names = row if set(columns) <= asked else columns
            if names is row:
                continue
        yield where, dict(zip(names, row)) if len(row) == len(names) else Bad(
            f'{where}: {len(row)} columns, not {len(names)} ({", ".join(names)}); mend the row')


# ---------------------------------------------------------------------------------------------
# Dicts to records


def raise_bad(record) -> None:
    """Raise what stands in the place of a record that could not be read."""
    if isinstance(record, Bad):
        raise record


def text_of(where: str, record: dict | Bad, name: str, empty: bool = False) -> str:
    """A field that must be there, and text; not empty unless it may be. Raises Bad."""
    raise_bad(record)
    if name not in record:
        raise Bad(f'{where}: has no {name!r}, only {", ".join(map(repr, record))[:100]}; add it')
    value = record[name]
    if not isinstance(value, str):
        raise Bad(f'{where}: {name!r} is {type(value).__name__}, must be text; correct it')
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise Bad(f'{where}: {name!r} has a lone surrogate at {e.start}; correct it') from e
    if not value.strip() and not empty:
        raise Bad(f'{where}: {name!r} is empty; fill it in, or remove the record')
    return value


def messages_of(where: str, record: dict | Bad) -> list[dict]:
    """The messages of 'messages', 'prompt', or Alpaca's 'instruction' and 'input'. Raises Bad."""
    raise_bad(record)
    if 'messages' in record:
        return check_messages(where, record['messages'])
    if 'prompt' in record:
        text = text_of(where, record, 'prompt')
    elif 'instruction' in record:
        text = text_of(where, record, 'instruction')
        if more := text_of(where, {'input': '', **record}, 'input', empty=True):
            text += f'\n\n{more}'
    else:
        raise Bad(f"{where}: has neither 'messages' nor 'prompt' nor 'instruction', only "
                  f'{", ".join(map(repr, record))[:100]}; add one')
    return [{'role': 'user', 'content': text}]


def check_messages(where: str, messages) -> list[dict]:
    """Messages as [{'role', 'content'}, ...]: an optional system message, then user and assistant
    in turn. Raises Bad."""
    if not isinstance(messages, list) or not messages:
        raise Bad(f"{where}: 'messages' must be a list of at least one message; correct it")
    checked, last = [], 'assistant'
    for i, message in enumerate(messages):
        at = f'{where}: message {i + 1}'
        if not isinstance(message, dict):
            raise Bad(f'{at} is {type(message).__name__}, must be an object; correct it')
        role = text_of(at, message, 'role')
        if role not in ROLES:
            raise Bad(f'{at} has role {role[:40]!r}: must be one of {", ".join(ROLES)}')
        if role == 'system' and i:
            raise Bad(f'{at} is of the system, which may only be the first; move it')
        if role != 'system':
            if role == last:
                raise Bad(f'{at} is a second one of the {role} in a row; join the two'
                          if any(m['role'] == role for m in checked) else
                          f'{at}: the assistant comes first; begin with the user')
            last = role
        checked.append({'role': role, 'content': text_of(at, message, 'content')})
    return checked


def conversation(where: str, record: dict | Bad) -> Conversation:
    """From 'messages', or 'prompt' or 'instruction' and 'input', with 'output'. Raises Bad."""
    messages = messages_of(where, record)
    if 'messages' not in record:
        messages.append({'role': 'assistant', 'content': text_of(where, record, 'output')})
    if messages[-1]['role'] != 'assistant':
        raise Bad(f"{where}: ends with a message of the {messages[-1]['role']}: nothing to learn "
                  'from; add the answer')
    return Conversation(where, messages)


def preference(where: str, record: dict | Bad) -> Preference:
    """From what was asked, 'chosen' and 'rejected'. Raises Bad."""
    messages = messages_of(where, record)
    if messages[-1]['role'] == 'assistant':
        raise Bad(f'{where}: the messages end with an answer; it belongs in chosen or rejected')
    if messages[-1]['role'] == 'system':
        raise Bad(f'{where}: ends with a message of the system: nothing is asked; add the question')
    chosen, rejected = text_of(where, record, 'chosen'), text_of(where, record, 'rejected')
    if chosen == rejected:
        raise Bad(f'{where}: chosen and rejected are equal: nothing to prefer; remove the record')
    return Preference(where, messages, chosen, rejected)


def labelled(where: str, record: dict | Bad) -> Labelled:
    """From 'text' and 'label', which may be a number. Raises Bad."""
    raise_bad(record)
    label = record.get('label')
    if type(label) is int:
        record = {**record, 'label': str(label)}
    return Labelled(where, text_of(where, record, 'text'), text_of(where, record, 'label').strip())


COLUMNS = {labelled: ('label', 'text'), conversation: ('instruction', 'output'),
           preference: ('instruction', 'chosen', 'rejected')}


# ---------------------------------------------------------------------------------------------
# Sets


class NamedSet(NamedTuple):
    """A set of records with a name."""
    about: str
    licence: str
    kind: Callable          # conversation, preference or labelled
    files: Callable[[Path], list] | None        # of the folder for downloads
    records: Callable[[], Iterator] | None = None       # made on the spot: (where, dict)


BOOK = 'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07'
SETS = {
    'instruction': NamedSet(
        '1,100 instructions with answers', 'Apache-2.0', conversation,
        lambda folder: [fetch('instruction.json', f'{BOOK}/01_main-chapter-code/'
                              'instruction-data.json', folder)]),
    'preference': NamedSet(
        '1,100 instructions, each with a polite and an impolite answer', 'Apache-2.0', preference,
        lambda folder: [fetch('preference.json', f'{BOOK}/04_preference-tuning-with-dpo/'
                              'instruction-data-with-preference.json', folder)]),
    'sms_spam': NamedSet(
        '5,574 text messages, 13% of them spam', 'free for research', labelled,
        lambda folder: [fetch('sms_spam.tsv', 'https://raw.githubusercontent.com/justmarkham/'
                              'pycon-2016-tutorial/master/data/sms.tsv', folder)]),
    'python_chat': NamedSet(
        'docstring -> function: from the Python standard library on this machine',
        'PSF License Version 2', conversation, None, stdlib.docstrings),
    'python_modules': NamedSet(
        'function -> package it is from: the Python standard library on this machine',
        'PSF License Version 2', labelled, None, stdlib.origins),
    'python_bugs': NamedSet(
        'docstring -> true function against a corrupted one: the Python standard library',
        'PSF License Version 2', preference, None, stdlib.corrupted),
}


def load(name: str, kind: Callable, data_dir: str, skip_bad: bool, setting='dataset') -> list:
    """The records of a named set or of a file, each made by `kind`.

    Stops at the first bad one, unless skip_bad: then they are left out, counted and warned of; so
    they are in a named set. Stops if none is left.
    """
    found = SETS.get(name)
    if found and found.kind is not kind:
        fitting = ', '.join(n for n, s in SETS.items() if s.kind is kind)
        stop(f'{setting}={name}: is a set of another kind; named sets that fit: {fitting}')
    if not found and not Path(name).is_file():
        stop(f'{setting}={name}: neither a file nor a named set ({", ".join(SETS)})')
    records, bad = [], []
    try:
        sources = [found.records()] if found and found.records else [
            rows_of(Path(path), COLUMNS[kind])
            for path in (found.files(Path(data_dir) / 'downloads') if found else [name])]
        for where, row in itertools.chain.from_iterable(sources):
            try:
                records.append(kind(where, row))
            except Bad as e:
                if not (skip_bad or found):
                    stop(f'{e}; --skip_bad leaves such records out')
                bad.append(str(e))
    except Bad as e:
        stop(str(e))
    except NoNetwork as e:
        stop(f'{setting}={name}: {e}; put the file into a folder, and set DATA_MIRROR to it')
    if bad:
        print0(f'warning: {setting}={name}: {len(bad):,} of {len(bad) + len(records):,} records '
               f'are left out, the first for: {bad[0]}', file=sys.stderr)
    if not records:
        stop(f'{setting}={name}: holds no record; give a file with at least one')
    return records


def load_split(dataset: str, validation: str, val_fraction: float, kind: Callable, data_dir: str,
               skip_bad: bool, max_records: int = 0) -> tuple[list, list]:
    """Records to train on and to validate on: those of a file of their own, or a part. Of the
    dataset at most max_records, if that is not 0.

    Which, depends on what is asked first alone: so the same question is on the same side in every
    set that has it, and in each stage. Stops if one side is empty.
    """
    found = load(dataset, kind, data_dir, skip_bad)
    if max_records:
        found = sorted(found, key=lambda r: fraction_of(f'of all: {question(r)}'))[:max_records]
    if validation:
        return found, load(validation, kind, data_dir, skip_bad, 'validation')
    held_out = [fraction_of(question(record)) < val_fraction for record in found]
    train, val = ([r for r, out in zip(found, held_out) if out == side] for side in (False, True))
    if not train or not val:
        stop(f'dataset={dataset}: its {len(found)} records leave {len(train)} to train on and '
             f'{len(val)} to validate on; give more, or another --val_fraction')
    return train, val


def question(record) -> str:
    """What a conversation begins with."""
    return next(m['content'] for m in record.messages if m['role'] == 'user')


def check_known(tokenizer, where: str, texts: list[str]) -> None:
    """Stop if the tokenizer does not know a character of the texts of a record."""
    for text in texts:
        if what := tokenizer.unknown(text):
            stop(f'{where}: {what}')


def encode(tokenizer, where: str, messages: list[dict], size: int, prompt_weight: float = 0.0,
           last_only: bool = False) -> tuple[np.ndarray, np.ndarray, bool]:
    """The first size + 1 ids of a conversation, their weights as targets, and whether anything that
    is to be learnt is among them: what the assistant says (last_only: in the last message), its end
    tokens included, has weight 1, the rest prompt_weight."""
    check_known(tokenizer, where, [message['content'] for message in messages])
    turns = list(tokenizer.encode_turns(messages))
    ids = sum((turn for turn, _ in turns), [])
    learnt = [mine and (i == len(turns) - 1 or not last_only)
              for i, (_, said) in enumerate(turns) for mine in said][:size + 1]
    weights = [1.0 if it else prompt_weight for it in learnt]
    return np.array(ids[:size + 1], np.int32), np.array(weights, np.float32), any(learnt)


def check_left_out(left_out: list, n: int, size: int) -> None:
    """Say how many of n records have no answer within `size` tokens; stop if more than 5%."""
    if len(left_out) > 0.05 * n:
        stop(f'{left_out[0].where}: has no answer within block_size={size} tokens, and so have '
             f'{len(left_out):,} of {n:,} records; shorten them, or use a longer context')
    if left_out:
        print0(f'warning: {len(left_out):,} of {n:,} records have no answer within '
               f'block_size={size} tokens and are left out, the first of them '
               f'{left_out[0].where}', file=sys.stderr)


def sha256_of(records: list) -> str:
    """64 hex digits that two lists of records share only if all but their places are equal."""
    return hashlib.sha256(json.dumps([record[1:] for record in records]).encode()).hexdigest()


def fraction_of(key: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], 'big') / (1 << 48)
