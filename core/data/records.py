"""Records for post-training: conversations, preferences and labelled texts, read and checked.

Files are of one of SUFFIXES, each also as .gz; a wrong record is a Bad. Names decide what a field
is, and a field that changes the meaning is used or refused, never ignored.
"""
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.data.recipes import SETS
from core.ranks.processes import print0
from core.read.documents import read
from core.read.download import NoNetwork, fetch
from core.read.tables import JSON_LINES, TABLES, Bad, parse_json, suffix
from core.settings import stop, warn

SUFFIXES = (*JSON_LINES, '.json', *TABLES, '.parquet')     # .json: an array
FIELDS = {      # what a record or a message holds -> the names for it in files of others
    'messages': ('messages', 'conversations', 'conversation'),
    'prompt': ('prompt', 'question', 'instruction'),
    'input': ('input', 'context'),      # follows the prompt, or is it where there is none
    'output': ('output', 'answer', 'response', 'completion'),
    'system': ('system', 'system_prompt'), 'history': ('history',),
    'chosen': ('chosen',), 'rejected': ('rejected',), 'text': ('text',), 'label': ('label',),
    'role': ('role', 'from'), 'content': ('content', 'value'), 'weight': ('weight',)}
FIELD_OF = {name: field for field, names in FIELDS.items() for name in names}
SPEAKERS = {'system': 'system', 'user': 'user', 'human': 'user', **dict.fromkeys(
    ('assistant', 'gpt', 'chatgpt', 'bing', 'bard'), 'assistant')}
REFUSED = {     # fields that change what a record or a message means, and are not supported
    'tools', 'functions', 'function_call', 'tool_calls', 'tool_call_id', 'image', 'images', 'audio',
    'audios', 'video', 'videos', 'thinking', 'reasoning_content', 'query', 'mapping',
    'chat_messages', 'kto_tag', 'loss', 'mask', 'train', 'training'}
EMPTY = (None, '', '[]', [], {})


class Conversation(NamedTuple):
    """What a chat model learns from; the last message is the assistant's. A message may have a
    'weight' from 0 to 1, that of its tokens in the loss."""
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


def rows_of(path: Path, fields: tuple, bad: Callable[[Bad], None] | None = None
            ) -> Iterator[tuple[str, dict]]:
    """(file:line, record) of a file, names in lower case. `bad` is called for a record that cannot
    be read; without it Bad is raised. So it is where nothing after it can be read, and where a
    table lacks one of `fields`."""
    if suffix(path) not in SUFFIXES:
        raise Bad(f'{path}: records are read from {", ".join(SUFFIXES)}; convert it')
    columns = tuple(FIELDS[field] + FIELDS['input'] * (field == 'prompt') for field in fields)
    for record in read(path, '', 'strict', columns):
        try:
            if record.kind == 'bad':
                raise Bad(record.data)
            found = parse_json(record) if record.kind == 'json' else record.data
            if not isinstance(found, dict):
                raise Bad(f'{record.where}: is {type(found).__name__}, not an object {{...}}; '
                          'correct it')
            folded = {name.strip().lower(): value for name, value in found.items()}
            if len(folded) < len(found):
                raise Bad(f'{record.where}: two names differ only in capitals; remove one')
        except Bad as e:
            if not bad:
                raise
            bad(e)
        else:
            yield record.where, folded


def known(where: str, record: dict, message: bool = False) -> dict:
    """What a record or a message has, under the names in FIELDS, but what is empty. Raises Bad if
    it has one twice, or what is refused."""
    found = {}
    for name, value in record.items():
        if value in EMPTY:
            continue
        if name in REFUSED or name == 'weight' and not message:
            raise Bad(f'{where}: {name!r} changes the meaning, and is not supported; write messages'
                      " with 'role', 'content' and perhaps a 'weight' from 0 to 1, or remove it")
        field = FIELD_OF.get(name, name)
        if field in found:
            raise Bad(f'{where}: {name!r} is there under another name as well; remove one')
        found[field] = value
    return found


def unused(record: dict, fields: tuple) -> set[str]:
    """The names that a record and its messages have beside `fields`."""
    fields += ('role', 'content', 'weight')
    parts = [record, *(part for value in record.values() if isinstance(value, list)
                       for part in value if isinstance(part, dict))]
    return {name for part in parts for name, value in part.items()
            if FIELD_OF.get(name, name) not in fields and value not in EMPTY}


def text_of(where: str, record: dict, name: str) -> str:
    """A field that must be text, and not empty. Raises Bad."""
    if name not in record:
        raise Bad(f'{where}: has no {" or ".join(map(repr, FIELDS[name]))}, or it is empty, only '
                  f'{", ".join(map(repr, record))[:100]}; add it, or remove the record')
    value = record[name]
    if not isinstance(value, str):
        raise Bad(f'{where}: {name!r} is {type(value).__name__}, must be text; correct it')
    if found := re.search('[\0\ud800-\udfff]', value):
        raise Bad(f'{where}: {name!r} has NUL or a lone surrogate at {found.start()}; correct it')
    if not value.strip():
        raise Bad(f'{where}: {name!r} is empty; fill it in, or remove the record')
    return value


def listed(where: str, record: dict, name: str) -> list[dict]:
    """A field as messages {'role', 'content', perhaps 'weight'}: a list of them, one, or the text
    of an answer. Raises Bad."""
    found = record.get(name)
    if isinstance(found, dict):
        found = [found]
    elif not isinstance(found, list):
        found = [{'role': 'assistant', 'content': text_of(where, record, name)}]
    messages = []
    for i, message in enumerate(found):
        at = f'{where}: message {i + 1}'
        if not isinstance(message, dict):
            raise Bad(f'{at} is {type(message).__name__}, must be an object; correct it')
        message = known(at, message, message=True)
        role, parts = text_of(at, message, 'role'), message.get('content')
        if role not in SPEAKERS:
            raise Bad(f'{at} has role {role[:40]!r}: must be one of {", ".join(SPEAKERS)}')
        if isinstance(parts, list) and all(isinstance(part, dict) and isinstance(
                part.get('text'), str) for part in parts):
            message['content'] = '\n'.join(part['text'] for part in parts)
        messages.append({'role': SPEAKERS[role], 'content': text_of(at, message, 'content')})
        weight = message.get('weight', 1)
        if type(weight) not in (int, float) or not 0 <= weight <= 1:
            raise Bad(f'{at} has weight {str(weight)[:40]}; give a number from 0 to 1')
        messages[-1] |= {'weight': weight} if weight != 1 else {}
    return messages


def check_order(where: str, messages: list[dict]) -> None:
    """Raise Bad unless user and assistant take turns up to an answer, perhaps after a system
    message."""
    first = messages[0]['role'] == 'system'
    for i, role in enumerate(message['role'] for message in messages[first:]):
        at = f'{where}: message {i + 1 + first}'
        if role == 'system':
            raise Bad(f'{at} is of the system, which may only be the first; move it')
        if role != ('user', 'assistant')[i % 2]:
            raise Bad(f'{at} is a second one of the {role} in a row; join the two' if i else
                      f'{at}: the assistant comes first; begin with the user')
    if messages[-1]['role'] != 'assistant':
        raise Bad(f'{where}: ends with a message of the {messages[-1]["role"]}: nothing to learn '
                  'from; add the answer')


def asked(where: str, found: dict) -> list[dict]:
    """What a record's known fields ask: system, history, then messages, or prompt and input.
    Raises Bad."""
    history = found.get('history', [])
    if not isinstance(history, list) or not all(
            isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Bad(f"{where}: 'history' must be a list of pairs [user, assistant]; correct it")
    front = [{'role': 'system', 'content': found.get('system')}] * ('system' in found)
    front += [{'role': role, 'content': text} for pair in history
              for role, text in zip(('user', 'assistant'), pair)]
    front = listed(where, {'history': front}, 'history')
    if isinstance(found.get('prompt'), list) and 'messages' not in found:
        found = {**found, 'messages': found['prompt'], 'prompt': None}
    if 'messages' not in found:
        texts = [text_of(where, found, name) for name in ('prompt', 'input') if name in found]
        if not texts:
            raise Bad(f'{where}: has none of messages, prompt, instruction and so on, only '
                      f'{", ".join(map(repr, found))[:100]}; add one')
        return [*front, {'role': 'user', 'content': '\n\n'.join(texts)}]
    if not isinstance(found['messages'], list):
        raise Bad(f"{where}: 'messages' must be a list of messages; correct it")
    messages = front + listed(where, found, 'messages')
    for name in ('prompt', 'input', 'output'):
        if found.get(name) not in (None, *(message['content'] for message in messages)):
            raise Bad(f'{where}: {name!r} stands beside messages, and is none of them; make it '
                      'one, or remove it')
    return messages


def conversation(where: str, record: dict) -> Conversation:
    """From messages, or from a prompt and an output. Raises Bad."""
    found = known(where, record)
    if str(found.get('label')).lower() == 'false':
        raise Bad(f"{where}: 'label' says that the answer is not wanted; remove the record")
    apart = 'messages' not in found
    messages = asked(where, {**found, 'output': None} if apart else found)
    messages += listed(where, found, 'output') if apart else []
    check_order(where, messages)
    if not any(m['role'] == 'assistant' and m.get('weight', 1) for m in messages):
        raise Bad(f'{where}: all answers have weight 0: nothing to learn from; remove the record')
    return Conversation(where, messages)


def preference(where: str, record: dict) -> Preference:
    """From what was asked, chosen and rejected, which may be lists of messages with what was asked
    in front. Raises Bad."""
    found, sides = known(where, record), []
    for side in ('chosen', 'rejected'):
        said = listed(where, found, side)
        whole = said[0]['role'] != 'assistant'
        sides.append(asked(where, {**found, 'messages': found[side]} if whole else found)
                     + ([] if whole else said))
        check_order(where, sides[-1])
    (*messages, chosen), (*others, rejected) = sides
    if messages != others:
        raise Bad(f'{where}: chosen and rejected must differ in the last message alone; correct it')
    if chosen == rejected:
        raise Bad(f'{where}: chosen and rejected are equal: nothing to prefer; remove the record')
    if any('weight' in message for message in sum(sides, [])):
        raise Bad(f"{where}: has a 'weight', which conversations alone may have; remove it")
    return Preference(where, messages, chosen['content'], rejected['content'])


def labelled(where: str, record: dict) -> Labelled:
    """From 'text' and 'label', which may be a number. Raises Bad."""
    label = record.get('label')
    found = {**record, 'label': str(label)} if type(label) is int else record
    return Labelled(where, text_of(where, found, 'text'), text_of(where, found, 'label').strip())


# The fields that a table must have, and others that are used.
NEEDED = {labelled: ('label', 'text'), conversation: ('prompt', 'output'),
          preference: ('prompt', 'chosen', 'rejected')}
ALSO = {labelled: (), **dict.fromkeys((conversation, preference), (
    'messages', 'input', 'system', 'history'))}


# ---------------------------------------------------------------------------------------------
# Files and named sets to records


def load(name: str, kind: Callable, data_dir: str, skip_bad: bool, setting='dataset') -> list:
    """The records of a named set or of a file, each made by `kind`. Stops if one is bad; with
    skip_bad, and in a named set, these are left out and counted. Stops if none is left."""
    found = SETS.get(name)
    if found and found.kind != kind.__name__:
        fitting = ', '.join(n for n, s in SETS.items() if s.kind == kind.__name__)
        stop(f'{setting}={name}: is a set of another kind; named sets that fit: {fitting}')
    if not found and not os.path.isfile(name):
        stop(f'{setting}={name}: neither a file nor a named set ({", ".join(SETS)})')
    records, bad, more = [], [], Counter()
    def leave_out(problem: Bad) -> None:
        if not (skip_bad or found):
            stop(f'{problem}; --skip_bad leaves such records out')
        bad.append(str(problem))

    try:
        path = Path(name)
        if found and not callable(found.source):
            path = fetch(name + Path(found.source).suffix, found.source,
                         Path(data_dir) / 'downloads')
        rows = found.source() if found and callable(found.source) else \
            rows_of(path, NEEDED[kind], leave_out)
        for where, row in rows:
            try:
                records.append(kind(where, row))
                more.update(unused(row, NEEDED[kind] + ALSO[kind]))
            except Bad as e:
                leave_out(e)
    except Bad as e:
        stop(str(e))
    except NoNetwork as e:
        stop(f'{setting}={name}: {e}; put the file into a folder, and set DATA_MIRROR to it')
    if bad:
        warn(f'{setting}={name}: {len(bad):,} of {len(bad) + len(records):,} records are left out, '
             f'the first for: {bad[0]}')
    if not records:
        stop(f'{setting}={name}: holds no record; give a file with at least one')
    if more and not found:
        print0(f'{name}: fields not used: ' + ', '.join(
            f'{field} ({n:,})' for field, n in more.most_common()), file=sys.stderr)
    return records


def load_split(dataset: str, validation: str, val_fraction: float, kind: Callable, data_dir: str,
               skip_bad: bool, *, max_records: int = 0) -> tuple[list, list]:
    """Records to train on and to validate on: those of a file of their own, or a part. Of the
    dataset at most max_records, if that is not 0.

    The split is a hash of the first question, so every stage holds out the same ones. Only where a
    side would get less than half or more than twice its share, more decides (see split_keys and
    split_at), and it is said. Stops if that does not help.
    """
    found = load(dataset, kind, data_dir, skip_bad)
    keyed = list(zip(split_keys(found, val_fraction), found))
    if max_records:
        keyed = sorted(keyed, key=lambda pair: fraction_of(f'of all: {pair[0]}'))[:max_records]
    if validation:
        train = [record for _, record in keyed]
        val = load(validation, kind, data_dir, skip_bad, 'validation')
        known = set(map(said_by, train))
        if again := sum(said_by(record) in known for record in val):
            warn(f'validation={validation}: {again:,} of {len(val):,} records ask what is asked in '
                 f'{dataset}, too')
        return train, val
    keys, n = [key for key, _ in keyed], len(keyed)
    at, fits = split_at(keys, val_fraction)
    train, val = ([r for key, r in keyed if (fraction_of(key) < at) == side]
                  for side in (False, True))
    if not (train and val and fits):
        (key, most), = Counter(keys).most_common(1)
        why = f', as {most:,} of them ask the same ({key[-60:]!r})' * (most > 1)
        stop(f'dataset={dataset}: its {n:,} records leave {len(train):,} to train on and '
             f'{len(val):,} to validate on{why}; give more, another --val_fraction, or records of '
             'their own with --validation=FILE')
    if at != val_fraction or any(key != question(record) for key, record in keyed):
        print0(f'{dataset}: so many records begin alike, or so few there are, that not only the '
               'first questions decide which of them validate: in another set others may')
    return train, val


def question(record) -> str:
    """What a conversation begins with."""
    return next(m['content'] for m in record.messages if m['role'] == 'user')


def said_by(record, roles: tuple = ('system', 'user')) -> str:
    """All that is said in these roles."""
    return '\n\n'.join(m['content'] for m in record.messages if m['role'] in roles)


def split_keys(found: list, fraction: float) -> list[str]:
    """The texts whose hashes decide on which side the records are: their first questions. If a side
    would not get its share, then for those that begin as many others do ("Hello") it is all that
    the user says, or what the system and the user say."""
    keys = [question(record) for record in found]
    for roles in (('user',), ('system', 'user')):
        sizes, most = Counter(keys), min(fraction, 1 - fraction) * len(keys) / 2
        if split_at(keys, fraction)[0] != fraction:
            keys = [key if sizes[key] <= most else said_by(record, roles)
                    for key, record in zip(keys, found)]
    return keys


def split_at(keys: list[str], fraction: float) -> tuple[float, bool]:
    """The hash below which records validate: the nearest to `fraction` that gives each side half to
    twice its share, or one record. And whether there is one."""
    places, n = [*sorted(map(fraction_of, keys)), 1.0], len(keys)
    least = math.ceil(n * max(fraction / 2, 2 * fraction - 1))
    most = max(1, int(n * min(2 * fraction, (1 + fraction) / 2)))
    low, high = math.nextafter(places[least - 1], 1) if least else 0.0, places[most]
    return min(max(fraction, low), high), low <= high


def check_known(tokenizer, where: str, texts: list[str]) -> None:
    """Stop if the tokenizer does not know a character of the texts of a record."""
    for text in texts:
        if what := tokenizer.unknown(tokenizer.as_corpus(text)):
            stop(f'{where}: {what}')


class Encoded(NamedTuple):
    """A record as ids, cut to a window; of a preference two rows, of ids and of weights."""
    ids: np.ndarray | tuple
    weights: np.ndarray | tuple     # of each id as a target
    needed: int             # the window in tokens that would hold all of it
    whole: bool = True      # an answer is within the window up to its end
    lost: str = ''          # why nothing can be learnt from what the window holds


NO_ANSWER, EQUAL = 'no answer', 'two equal answers'     # why a record is lost


def encode(tokenizer, where: str, messages: list[dict], size: int, prompt_weight: float = 0.0,
           last_only: bool = False) -> Encoded:
    """The first size + 1 ids of a conversation and their weights as targets: 1 for what the
    assistant says (last_only: in the last message) and its end tokens, prompt_weight for the rest,
    each times its message's weight. The conversation is lost if no answer is among them."""
    check_known(tokenizer, where, [message['content'] for message in messages])
    ids, learnt, weights, whole = [], [], [], False
    try:
        turns = list(tokenizer.encode_turns(messages))
    except ValueError as e:     # of another program's chat template
        stop(f'{where}: {e}')
    for i, (turn, said) in enumerate(turns):
        weight = messages[i].get('weight', 1)
        mine = bool(any(said) and weight and (i == len(turns) - 1 or not last_only))
        ids += turn
        learnt += [mine and it for it in said]
        weights += [weight * (1.0 if mine and it else prompt_weight) for it in said]
        whole |= mine and len(ids) <= size + 1
    return Encoded(np.array(ids[:size + 1], np.int32), np.array(weights[:size + 1], np.float32),
                   len(ids) - 1, whole, '' if any(learnt[:size + 1]) else NO_ANSWER)


def fit_window(name: str, what: str, size: int, parts: list[list]) -> tuple[list[list], dict]:
    """The parts (to train on, to validate on, ...) of (record, Encoded) without lost records, and
    facts for the log. Says what a window of `size` tokens cuts, and what is lost. Stops if more
    than 5% of a part have no answer within the window, or 90% two equal ones."""
    lengths = sorted(it.needed for part in parts for _, it in part)
    n, cut, longest = len(lengths), sum(length > size for length in lengths), lengths[-1]
    needed = lengths[math.ceil(0.95 * n) - 1]
    said = [f'{name}: {cut:,} of {n:,} {what} are longer than the window of {size:,} tokens and '
            f'are cut; a window of {needed:,} would hold 95% of them whole, one of {longest:,} all']
    for why, most in ((NO_ANSWER, 0.05), (EQUAL, 0.9)):
        lost = [[record.where for record, it in part if it.lost == why] for part in parts]
        for some, part in zip(lost, parts):
            if len(some) > most * len(part):
                stop(f'{some[0]}: has {why} within block_size={size} tokens, and so have '
                     f'{len(some):,} of {len(part):,} records; shorten them, or use a longer '
                     'context')
        if some := sum(lost, []):
            said.append(f'{len(some):,} have {why} within it and are left out, the first {some[0]}')
    if not any(it.whole for part in parts for _, it in part):
        said.append('no answer fits whole, so the model does not learn to end one')
    if cut or len(said) > 1:
        warn('; '.join(said))
    kept = [[pair for pair in part if not pair[1].lost] for part in parts]
    return kept, {'window': {'records': n, 'cut': cut, 'left_out': n - sum(map(len, kept)),
                             'would_hold_95_percent': needed, 'longest': longest},
                  **{name: sha256_of([record for record, _ in part]) for name, part in
                     zip(('sha256', 'val_sha256', 'test_sha256'), parts)}}


def sha256_of(records: list) -> str:
    """64 hex digits that two lists of records share only if all but their places are equal."""
    return hashlib.sha256(json.dumps([record[1:] for record in records]).encode()).hexdigest()


def fraction_of(key: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], 'big') / (1 << 48)
