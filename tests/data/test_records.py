"""core/data/records.py and core/read/stdlib.py: records of every format."""
import ast
import csv
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import stopped, stopped_at_last

from core.data import records
from core.data.records import SETS, conversation, fraction_of, labelled, load, preference, sha256_of
from core.read import stdlib
from core.read.download import NoNetwork
from core.text.tokenizer import ByteTokenizer, CharTokenizer

MIRROR = os.environ.get('DATA_MIRROR') and os.path.abspath(os.environ['DATA_MIRROR'])
needs_mirror = pytest.mark.skipif(not MIRROR, reason='needs DATA_MIRROR')


def says(role: str, content='x') -> dict:
    return {'role': role, 'content': content}


def chat(*contents: str) -> list[dict]:
    """Messages of the user and the assistant in turn."""
    return [says(('user', 'assistant')[i % 2], content) for i, content in enumerate(contents)]


GOOD = {conversation: {'messages': chat('Hi', 'Hello')},
        preference: {'prompt': 'Hi', 'chosen': 'Hello', 'rejected': 'Go away'},
        labelled: {'text': 'Hi', 'label': 'ham'}}


def put(folder, name: str, data: bytes | str) -> Path:
    path = folder / name
    data = data if isinstance(data, bytes) else data.encode('utf-8', 'surrogatepass')
    path.write_bytes(gzip.compress(data, mtime=0) if name.lower().endswith('.gz') else data)
    return path


def lines(*found) -> str:
    return ''.join(json.dumps(record) + '\n' for record in found)


def array(*found) -> str:
    """A record a line, from the second line on."""
    return '[\n' + ',\n'.join(map(json.dumps, found)) + '\n]\n'


def parquet(*found) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), f := io.BytesIO())
    return f.getvalue()


def read(path, kind, skip_bad=False) -> list:
    return load(str(path), kind, 'data', skip_bad)


def contents(path, kind) -> list[tuple]:
    """The records without their places."""
    return [record[1:] for record in read(path, kind)]


def refused(capsys, path, kind, skip_bad=False) -> str:
    """The message of a stop, which says what to do, too."""
    message = stopped(capsys, lambda: read(path, kind, skip_bad))
    assert re.search(r'; \w+|must be one of \w+', message)
    return message


# ---------------------------------------------------------------------------------------------
# Bad records

BAD = [     # kind, record, part of the message
    (labelled, 5, 'is int, not an object'),
    (labelled, None, 'is NoneType, not an object'),
    (labelled, ['Hi', 'ham'], 'is list, not an object'),
    (labelled, {}, "has no 'text'"),
    (labelled, {'text': 'Hi'}, "has no 'label', or it is empty, only 'text'"),
    (labelled, {'body': 'Hi', 'label': 'ham'}, "'text', or it is empty, only 'body', 'label'"),
    (labelled, {'a\nb': 'Hi'}, r"only 'a\nb'"),
    (labelled, {'\ud800': 'Hi'}, r"only '\ud800'"),
    (labelled, {'text': 5, 'label': 'ham'}, "'text' is int, must be text"),
    (labelled, {'text': 'Hi', 'label': True}, "'label' is bool, must be text"),
    (labelled, {'text': 'Hi', 'label': 1.5}, "'label' is float, must be text"),
    (labelled, {'text': 'Hi', 'label': None}, "'label' is NoneType, must be text"),
    (labelled, {'text': ' \n', 'label': 'ham'}, "'text' is empty"),
    (labelled, {'text': 'Hi', 'label': ''}, "'label' is empty"),
    (labelled, {'text': 'Hi\ud800', 'label': 'ham'}, "'text' has NUL or a lone surrogate at 2"),
    (labelled, {'text': 'Hi', 'label': '\udfff'}, "'label' has NUL or a lone surrogate at 0"),
    (conversation, {'text': 'Hi'}, "none of messages, prompt, instruction and so on, only"),
    (conversation, {'prompt': 'Hi'}, "has no 'output'"),
    (conversation, {'instruction': 'Hi', 'output': ''}, "has no 'output' or 'answer'"),
    (conversation, {'instruction': 'Hi', 'output': ' '}, "'output' is empty"),
    (conversation, {'instruction': '', 'output': 'Hello'}, 'has none of messages'),
    (conversation, {'instruction': ['Hi'], 'output': 'x'}, "message 1 is str, must be an object"),
    (conversation, {'instruction': 'Hi', 'input': 5, 'output': 'x'}, "'input' is int"),
    (conversation, {'messages': 'Hi'}, "'messages' must be a list"),
    (conversation, {'messages': {'a': 1}}, "'messages' must be a list"),
    (conversation, {'messages': []}, 'has none of messages'),
    (conversation, {'messages': ['Hi']}, 'message 1 is str, must be an object'),
    (conversation, {'messages': [{'content': 'Hi'}]}, "message 1: has no 'role' or 'from'"),
    (conversation, {'messages': [*chat('Hi'), {'role': 'assistant'}]}, "2: has no 'content' or"),
    (conversation, {'messages': [says('user', ['Hi'])]}, "message 1: 'content' is list"),
    (conversation, {'messages': [says('user', None)]}, "message 1: has no 'content' or"),
    (conversation, {'messages': [says(5)]}, "message 1: 'role' is int"),
    (conversation, {'messages': chat('Hi', '\n')}, "message 2: 'content' is empty"),
    (conversation, {'messages': chat('Hi', 'Hello\ud800')}, "2: 'content' has NUL or a lone"),
    (conversation, {'messages': [says('tool')]}, "1 has role 'tool': must be one of system, user"),
    (conversation, {'messages': [says('User')]}, "role 'User': must be one of"),
    (conversation, {'messages': [says('a\nb')]}, r"role 'a\nb': must be one of"),
    (conversation, {'messages': [*chat('Hi', 'x'), says('system')]}, '3 is of the system, which'),
    (conversation, {'messages': [says('system'), says('system')]}, 'message 2 is of the system'),
    (conversation, {'messages': [says('user')] * 2}, '2 is a second one of the user in a row'),
    (conversation, {'messages': [*chat('Hi'), *[says('assistant')] * 2]}, '3 is a second one of'),
    (conversation, {'messages': [says('assistant')]}, '1: the assistant comes first; begin with'),
    pytest.param(conversation, {'messages': [says('system'), says('assistant')]},
                 '2: the assistant comes first; begin with'),
    (conversation, {'messages': chat('Hi', 'x', 'Bye')}, 'ends with a message of the user'),
    (conversation, {'messages': [says('system')]}, 'ends with a message of the system'),
    (preference, {'chosen': 'a', 'rejected': 'b'}, 'has none of messages'),
    (preference, {'prompt': 'Hi', 'chosen': 'a'}, "has no 'rejected'"),
    (preference, {'prompt': 'Hi', 'rejected': 'a'}, "has no 'chosen'"),
    (preference, {'prompt': '', 'chosen': 'a', 'rejected': 'b'}, 'has none of messages'),
    (preference, {'prompt': 'Hi', 'chosen': '', 'rejected': 'b'}, "has no 'chosen', or it is"),
    (preference, {'prompt': 'Hi', 'chosen': 'a', 'rejected': chat('b')}, "'prompt' stands beside"),
    (preference, {'prompt': 'Hi', 'chosen': 'a', 'rejected': 'a'}, 'chosen and rejected are equal'),
    (preference, {'messages': chat('Hi', 'x'), 'chosen': 'a', 'rejected': 'b'}, '3 is a second'),
    pytest.param(preference, {'messages': [says('system')], 'chosen': 'a', 'rejected': 'b'},
                 '2: the assistant comes first'),
]


HINT = '; --skip_bad leaves such records out'


@pytest.mark.parametrize('kind,record,part', BAD)
def test_bad_records(tmp_path, capsys, kind, record, part):
    """One line says where it is, what is wrong and what to do; skip_bad leaves out it alone."""
    good = GOOD[kind]
    for name, text, place in (('a.jsonl', lines(good, record, good), 2),
                              ('a.json', array(good, record, good), 3)):
        path = put(tmp_path, name, text)
        message = refused(capsys, path, kind)
        assert message.startswith(f'{path}:{place}: ') and part in message and HINT in message
        assert [found.where for found in read(path, kind, skip_bad=True)] == [
            f'{path}:{place - 1}', f'{path}:{place + 1}']
        assert capsys.readouterr().err == (f'warning: dataset={path}: 1 of 3 records are left out, '
                                           f'the first for: {message.removesuffix(HINT)}\n')


HAM, SPAM = lines(GOOD[labelled]), '{"text": "Buy!", "label": "spam"}\n'
BAD_FILES = [   # name, data, what follows the file in the message, what else is in it
    ('a.jsonl', f'{HAM}\n{{"text": \n{HAM}', ':3: ', 'invalid JSON'),
    ('a.jsonl', f'{HAM}{HAM.strip()} {HAM}', ':2: ', 'invalid JSON (Extra data'),
    ('a.jsonl', array(GOOD[labelled]), ':1: ', 'invalid JSON'),
    ('a.jsonl', '[' * 100_000, ':1: ', 'invalid JSON'),
    ('a.jsonl', '{"n": 1' + '0' * 5000 + '}', ':1: ', 'invalid JSON'),
    ('a.jsonl', b'{"text": "\xc3\xa9", "label": "ham"}\n{"text": "\xe9", "label": "ham"}', ':2: ',
     'invalid UTF-8 (byte 0xe9)'),
    ('a.jsonl', HAM + '{"text": "é\\ud800", "label": "ham"}', ':2: ', 'lone surrogate'),
    ('a.jsonl.gz', f'{HAM}{{', ':2: ', 'invalid JSON'),
    ('a.json', f'[\n{HAM},\n{{"text": }},\n{HAM}]', ':4: ', 'invalid JSON'),
    ('a.json', f'[{HAM},\n{{\n"text": "Hi",\n"label" "ham"}}]', ':3: ', 'line 5 column 9'),
    ('a.json', f'[\n{HAM}\n{HAM}]', ':4: ', 'a comma or ] is missing'),
    ('a.json', f'[\n{HAM}', ':3: ', 'a comma or ] is missing'),
    ('a.json', f'[\n{HAM},', ':3: ', 'invalid JSON'),
    ('a.json', '[' * 100_000, ':1: ', 'invalid JSON'),
    ('a.json', '', ':1: ', 'not an array'),
    ('a.json', HAM, ':1: ', 'not an array [...]; a file with one record a line is named .jsonl'),
    ('a.json', '"Hi"', ':1: ', 'not an array'),
    ('a.json', HAM.encode('utf-16-le'), ': ', 'UTF-16 without a byte order mark'),
    pytest.param('a.json', f'[\n{HAM}]\n[{HAM}]', ':4: ', 'after'),
    ('a.csv', 'label,text\nham,Hi\nspam\n', ':3: ', '1 columns, not 2 (label, text)'),
    ('a.csv', 'label,text\nham,Hi, you\n', ':2: ', '3 columns, not 2 (label, text)'),
    ('a.csv', 'ham,Hi\nham,Hi, you\n', ':2: ', '3 columns, not 2 (label, text)'),
    ('a.csv', 'id,label,text\n1,ham\n', ':2: ', '2 columns, not 3 (id, label, text)'),
    ('a.csv', 'label,text\nham,"Hi\nyou"\nham,"Hi"x\n', ':4: ', "expected after '\"'; correct"),
    pytest.param('a.csv', 'label,text\nham,Hi\nham,"Hi\nham,Hi\nham,Hi\n', ':3: ', 'end of data'),
    ('a.csv', 'label,text\nham,\n', ':2: ', "'text' is empty"),
    pytest.param('a.csv', b'\xef\xbb\xbflabel,text\nham,caf\xe9\n', ':2: ', '(byte 0xe9)'),
    ('a.tsv', 'ham\tHi\nham\tHi\tyou\n', ':2: ', '3 columns, not 2 (label, text)'),
    ('a.tsv.gz', 'ham\tHi\nham\n', ':2: ', '1 columns, not 2 (label, text)'),
    ('a.txt', HAM, ': ', 'records are read from .jsonl, .ndjson, '),
    ('a.parquet', b'PAR1', ': ', 'damaged or truncated Parquet file, after row 0'),
    ('a.parquet', parquet({'text': 'Hi', 'label': None}), ':1: ', "'label' is NoneType"),
    ('a', HAM, ': ', 'records are read from'),
    ('a.gz', HAM, ': ', 'records are read from'),
]


@pytest.mark.parametrize('name,data,place,part', BAD_FILES)
def test_bad_files(tmp_path, capsys, name, data, place, part):
    path = put(tmp_path, name, data)
    message = refused(capsys, path, labelled)
    assert message.startswith(f'{path}{place}') and part in message


@pytest.mark.parametrize('name,data', [
    ('a.jsonl', ''), ('a.jsonl', ' \n\n'), ('a.json', '[]'), ('a.json', ' [\n] '), ('a.csv', ''),
    ('a.csv', 'label,text\n'), ('a.tsv', '\n\n'), ('a.jsonl.gz', '')])
def test_files_without_records(tmp_path, capsys, name, data):
    path = put(tmp_path, name, data)
    assert refused(capsys, path, labelled).startswith(f'dataset={path}: holds no record; give')


@pytest.mark.parametrize('name', ['none.jsonl', 'none.csv.gz', 'sms_ham', 'folder.json'])
def test_files_that_are_not_there(tmp_path, capsys, name):
    (tmp_path / 'folder.json').mkdir()
    path = tmp_path / name
    message = stopped(capsys, lambda: load(str(path), labelled, 'data', False, 'validation'))
    assert message == f'validation={path}: neither a file nor a named set ({", ".join(SETS)})'


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.json.gz', 'a.csv.gz'])
@pytest.mark.parametrize('damage', [lambda data: data[:-9], lambda data: b'no gzip'])
def test_damaged_gzip(tmp_path, capsys, name, damage):
    path = tmp_path / name
    path.write_bytes(damage(gzip.compress(HAM.encode(), mtime=0)))
    assert refused(capsys, path, labelled, skip_bad=True).startswith(f'{path}: ')


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.json.gz', 'a.csv.gz'])
def test_gzip_that_zlib_refuses(tmp_path, capsys, name):
    data = bytearray(gzip.compress(HAM.encode(), mtime=0))
    data[10] = 0xff     # a kind of block that there is not
    path = tmp_path / name
    path.write_bytes(data)
    assert refused(capsys, path, labelled).startswith(f'{path}: ')


# ---------------------------------------------------------------------------------------------
# skip_bad

MIXED = {   # file -> its text, the lines of the good records, how many are bad
    'a.jsonl': (f'{HAM}{{"text": \n{HAM}5\n\n{SPAM}{{}}\n', [1, 3, 6], 3),
    'a.json': (f'[{HAM},\n5, {{}},\n\n{SPAM},\n["ham"],{HAM}]', [1, 5, 7], 3),
    'a.csv': ('label,text\nham,Hi\nham\n"ham"x,Hi\n,Hi\nspam,Buy!\nham,Hi,you\nham,Hi\n',
              [2, 6, 8], 4),
    'a.tsv': ('ham\tHi\nham\nspam\tBuy!\nham\tHi\tyou\n\nham\tHi', [1, 3, 6], 2),
}


@pytest.mark.parametrize('packed', ['', '.gz'])
@pytest.mark.parametrize('name', MIXED)
def test_skip_bad(tmp_path, capsys, name, packed):
    text, places, n_bad = MIXED[name]
    path = put(tmp_path, name + packed, text)
    first = refused(capsys, path, labelled)
    found = read(path, labelled, skip_bad=True)
    assert [record.where for record in found] == [f'{path}:{i}' for i in places]
    assert Counter(record[1:] for record in found) == {('Hi', 'ham'): 2, ('Buy!', 'spam'): 1}
    assert capsys.readouterr().err == (f'warning: dataset={path}: {n_bad} of {n_bad + 3} records '
                                       f'are left out, the first for: {first.removesuffix(HINT)}'
                                       '\n')


def test_skip_bad_says_nothing_of_good_records(tmp_path, capsys):
    assert len(read(put(tmp_path, 'a.jsonl', HAM + SPAM), labelled, skip_bad=True)) == 2
    assert capsys.readouterr() == ('', '')


def test_skip_bad_with_nothing_left(tmp_path, capsys):
    path = put(tmp_path, 'a.jsonl', '5\n{}\n')
    message = stopped_at_last(capsys, lambda: read(path, labelled, skip_bad=True))
    assert message.startswith(f'dataset={path}: holds no record')


@pytest.mark.parametrize('name,data,part', [
    ('a.json', f'[{HAM}, {{"text": }}, {HAM}]', 'invalid JSON'),
    ('a.json', f'[{HAM} {HAM}]', 'a comma or ] is missing'),
    pytest.param('a.csv', 'label,text\nham,Hi\nham,"Hi\nham,Hi\nham,Hi\n', 'end of data')])
def test_skip_bad_stops_where_nothing_more_can_be_read(tmp_path, capsys, name, data, part):
    assert part in refused(capsys, put(tmp_path, name, data), labelled, skip_bad=True)


# ---------------------------------------------------------------------------------------------
# Good records

HAMS = [('Hi', 'ham'), ('Buy!', 'spam')]
HELLO, ASKED = [(chat('Hi', 'Hello'),)], [(chat('Hi'), 'Hello', 'Go away')]
FORMATS = [     # kind, file, data, records
    (labelled, 'a.jsonl', HAM + '\n \n' + SPAM.strip(), HAMS),
    (labelled, 'a.jsonl', '\ufeff' + HAM + SPAM, HAMS),
    (labelled, 'a.JSONL', HAM.replace('\n', '\r\n') + SPAM, HAMS),
    (labelled, 'a.json', f'\ufeff \n[{HAM},\r\n\t{SPAM}]\n', HAMS),
    (labelled, 'a.json', f'[{HAM.strip()},{SPAM.strip()}]', HAMS),
    (labelled, 'a.jsonl', '{"text": " Hi ", "label": 1, "id": 7}', [(' Hi ', '1')]),
    (labelled, 'a.jsonl', '{"text": "\\ud83d\\ude00", "label": " ham "}', [('😀', 'ham')]),
    (labelled, 'a.csv', 'label,text\nham,Hi\nspam,Buy!\n', HAMS),
    (labelled, 'a.csv', 'text,label\nHi,ham\nBuy!,spam', HAMS),
    (labelled, 'a.csv', '\ufeffid,text,label\r\n1,Hi,ham\r\n\r\n2,Buy!,spam\r\n', HAMS),
    (labelled, 'a.csv', 'ham,Hi\nspam,Buy!\n', HAMS),
    (labelled, 'a.csv', 'ham,"Hi, ""you""\nthere"\n', [('Hi, "you"\nthere', 'ham')]),
    (labelled, 'a.csv', '1,Hi\n0,Buy!\n', [('Hi', '1'), ('Buy!', '0')]),
    (labelled, 'a.tsv', 'label\ttext\nham\tHi\nspam\tBuy!\n', HAMS),
    (labelled, 'a.tsv', 'ham\tHi\n\nspam\tBuy!\n', HAMS),
    (labelled, 'a.tsv', 'ham\t"Hi, "you\nham\ty"\n', [('"Hi, "you', 'ham'), ('y"', 'ham')]),
    (labelled, 'a.parquet', parquet({'Text': 'Hi', 'label': 'ham'},
                                    {'Text': 'Buy!', 'label': 'spam'}), HAMS),
    (conversation, 'a.parquet', parquet({'id': 1, 'messages': chat('Hi', 'Hello')}), HELLO),
    (preference, 'a.parquet', parquet(GOOD[preference]), ASKED),
    (conversation, 'a.csv', 'instruction,output\nHi,Hello\n', HELLO),
    (conversation, 'a.csv', 'output,instruction\nHello,Hi\n', HELLO),
    (conversation, 'a.csv', 'instruction,input,output\nHi,,Hello\nAdd,1 2,3\n',
     [*HELLO, (chat('Add\n\n1 2', '3'),)]),
    pytest.param(conversation, 'a.csv', 'prompt,output\nHi,Hello\n', HELLO),
    (preference, 'a.csv', 'prompt,chosen,rejected\nHi,Hello,Go away\n', ASKED),
    (preference, 'a.tsv', 'rejected\tchosen\tprompt\nGo away\tHello\tHi\n', ASKED),
    pytest.param(preference, 'a.csv', 'instruction,chosen,rejected\nHi,Hello,Go away\n', ASKED),
    pytest.param(preference, 'a.csv', 'instruction,input,chosen,rejected\nHi,,Hello,Go away\n',
                 ASKED),
]


@pytest.mark.parametrize('packed', ['', '.gz'])
@pytest.mark.parametrize('kind,name,data,expected', FORMATS)
def test_formats(tmp_path, kind, name, data, expected, packed):
    assert contents(put(tmp_path, name + packed, data), kind) == expected


@pytest.mark.parametrize('name,data', [('a.jsonl.GZ', HAM), ('a.Csv.GZ', 'ham,Hi\n')])
def test_large_letters(tmp_path, name, data):
    assert contents(put(tmp_path, name, data), labelled) == HAMS[:1]


@pytest.mark.parametrize('record,expected', [
    ({'messages': chat('Hi', 'Hello')}, chat('Hi', 'Hello')),
    ({'messages': [says('system', 'Be brief.'), *chat('a', 'b', 'c', 'd')]},
     [says('system', 'Be brief.'), *chat('a', 'b', 'c', 'd')]),
    ({'messages': [{**says('user', 'Hi'), 'name': 'Bob'}, says('assistant', 'Hello')]},
     chat('Hi', 'Hello')),
    ({'prompt': 'Hi', 'output': 'Hello'}, chat('Hi', 'Hello')),
    ({'instruction': 'Hi', 'output': 'Hello'}, chat('Hi', 'Hello')),
    ({'instruction': 'Hi', 'input': '', 'output': 'Hello'}, chat('Hi', 'Hello')),
    ({'instruction': 'Add', 'input': '1 2', 'output': '3'}, chat('Add\n\n1 2', '3')),
    ({'messages': chat('Hi', 'Hello'), 'prompt': 'Hi'}, chat('Hi', 'Hello'))])
def test_conversations(tmp_path, record, expected):
    assert contents(put(tmp_path, 'a.jsonl', lines(record)), conversation) == [(expected,)]


@pytest.mark.parametrize('asked,expected', [
    ({'prompt': 'Hi'}, chat('Hi')), ({'instruction': 'Add', 'input': '1 2'}, chat('Add\n\n1 2')),
    ({'messages': chat('a', 'b', 'c')}, chat('a', 'b', 'c')),
    ({'messages': [says('system'), *chat('a')]}, [says('system'), *chat('a')])])
def test_preferences(tmp_path, asked, expected):
    path = put(tmp_path, 'a.jsonl', lines({**asked, 'chosen': 'y', 'rejected': 'n'}))
    assert contents(path, preference) == [(expected, 'y', 'n')]


def test_places_in_tables(tmp_path):
    """That of a row of several lines is its last one, as in core/read/documents.py."""
    path = put(tmp_path, 'a.csv', 'label,text\nham,"a\nb"\n\nham,c\n')
    assert [record.where for record in read(path, labelled)] == [f'{path}:3', f'{path}:5']


def test_long_fields_of_tables(tmp_path):
    path = put(tmp_path, 'a.csv', 'label,text\nham,' + 'x' * 200_000)
    limit = csv.field_size_limit(131_072)       # Python's, which holds for the whole process
    try:
        assert len(read(path, labelled)[0].text) == 200_000
    finally:
        csv.field_size_limit(limit)


# ---------------------------------------------------------------------------------------------
# Hashes, splits, ids


def test_sha256_of():
    """What counts is all but the place, in order."""
    found = [conversation('a:1', GOOD[conversation]), conversation('a:2', {
        'prompt': 'a', 'output': 'b'})]
    text = json.dumps([[chat('Hi', 'Hello')], [chat('a', 'b')]])
    assert sha256_of(found) == hashlib.sha256(text.encode()).hexdigest()
    assert sha256_of([record._replace(where='b:7') for record in found]) == sha256_of(found)
    others = [[], found[:1], found[::-1], found * 2,
              [found[0], conversation('', {'prompt': 'a', 'output': 'c'})]]
    assert len({sha256_of(other) for other in [found, *others]}) == 6
    assert sha256_of([labelled('', {'text': 'a', 'label': 'b'})]) != sha256_of(
        [labelled('', {'text': 'b', 'label': 'a'})])


@pytest.mark.parametrize('key,digits', [('', 'e3b0c44298fc'), ('abc', 'ba7816bf8f01'),
                                        ('Größe 😀', None)])
def test_fraction_of_is_stable(key, digits):
    """The first 48 bits of SHA-256, so that no split ever changes."""
    digits = digits or hashlib.sha256(key.encode()).hexdigest()[:12]
    assert fraction_of(key) == int(digits, 16) / 2 ** 48


def test_fraction_of_is_uniform():
    """Kolmogorov and Smirnov's test, which one in a thousand uniform samples fails."""
    found = np.sort([fraction_of(f'question {i}') for i in range(10_000)])
    assert 0 <= found[0] and found[-1] < 1
    assert np.abs(found - np.arange(10_000) / 10_000).max() < 1.95 / 100


def asked(questions, answer: str) -> str:
    return lines(*({'prompt': q, 'output': answer, 'chosen': answer, 'rejected': 'no'}
                   for q in questions))


def test_a_question_is_on_the_same_side_everywhere(tmp_path):
    """In sets of other kinds, with other answers, in another order and among others."""
    questions = [f'What is {i} + {i}?' for i in range(200)]
    one = put(tmp_path, 'a.jsonl', asked(questions, 'a'))
    other = put(tmp_path, 'b.jsonl', asked(questions[:50:-1], 'b'))
    split = lambda path, kind: [[records.question(r) for r in part] for part in records.load_split(
        str(path), '', 0.1, kind, 'data', False)]
    train, val = split(one, conversation)
    assert sorted(train + val) == sorted(questions) and 8 < len(val) < 35
    assert val == [q for q in questions if fraction_of(q) < 0.1]
    found = split(other, preference)
    assert set(found[0]) <= set(train) and set(found[1]) <= set(val)


def talks(*heads, n: int = 200, ends=True) -> list[list[dict]]:
    """n lists of messages that begin with what head(i) says in turn; a question of their own at the
    end, unless not `ends`."""
    return [[*heads[i % len(heads)](i), *([says('user', f'And {i} times {i}?')] if ends else [])]
            for i in range(n)]


HELLO = lambda i: chat('Hello', 'Hi!')
BEGIN_ALIKE = {
    'distinct': talks(lambda i: []),
    '70% begin with Hello': talks(*[HELLO] * 7, *[lambda i: []] * 3),
    'all begin with Hello': talks(HELLO),
    'all begin with the same two': talks(lambda i: chat('Hello', 'Hi!', 'How are you?', 'Well')),
    'half begin with one, half with another': talks(HELLO, lambda i: chat('Good day', 'Hi!')),
    'three beginnings': talks(HELLO, *(lambda i, h=h: chat(h, 'Hi!') for h in ('Hey', 'Good day'))),
    'the system says what is asked about': talks(
        lambda i: [says('system', f'Text {i}.'), says('user', 'Sum it up.')], ends=False),
    'each full prompt five times': talks(HELLO, n=40) * 5,
    'answers before differ': talks(lambda i: chat('Hello', f'Hi {i}!')),
}


@pytest.mark.parametrize('fraction', [0.1, 0.3, 0.8])
@pytest.mark.parametrize('kind', [conversation, preference])
@pytest.mark.parametrize('case', BEGIN_ALIKE)
def test_a_share_whatever_the_first_words_are(tmp_path, case, kind, fraction):
    """Half to twice of what is asked; an equal prompt is on one side, the same one in another order
    and in another stage."""
    found = [{'messages': messages, 'chosen': 'Yes', 'rejected': 'no'} if kind is preference else
             {'messages': [*messages, says('assistant', 'Yes')]} for messages in BEGIN_ALIKE[case]]
    sides = []
    for order in (found, found[::-1]):
        parts = records.load_split(str(put(tmp_path, 'a.jsonl', lines(*order))), '', fraction, kind,
                                   'data', False)
        small, asked = (parts[1], fraction) if fraction < 0.5 else (parts[0], 1 - fraction)
        assert asked / 2 <= len(small) / len(found) <= asked * 2
        assert sum(map(len, parts)) == len(found)
        sides.append([{json.dumps([m for m in r.messages[:-1] + r.messages[-1:]
                                   * (kind is preference)]) for r in part} for part in parts])
    assert sides[0] == sides[1] and not sides[0][0] & sides[0][1]
    SIDES.setdefault((case, fraction), sides[0])
    assert SIDES[case, fraction] == sides[0]    # of the other kind


SIDES = {}


@pytest.mark.parametrize('kind', [conversation, preference])
def test_one_question_cannot_be_shared_out(tmp_path, capsys, kind):
    """The message names the reason and the way out."""
    for n_others in (0, 10):
        path = put(tmp_path, 'a.jsonl', asked(['Who are you?'] * 160, 'x') + asked(
            [f'{i}?' for i in range(n_others)], 'x'))
        message = stopped_at_last(capsys, lambda path=path: records.load_split(
            str(path), '', 0.2, kind, 'data', False))
        assert f'its {160 + n_others} records leave ' in message
        assert "160 of them ask the same ('Who are you?')" in message
        assert '--validation=FILE' in message


def test_few_records_are_chosen_whatever_the_first_words_are(tmp_path):
    """max_records takes some of those that begin alike, not all or none."""
    found = [{'messages': [*messages, says('assistant', 'Yes')]}
             for messages in BEGIN_ALIKE['70% begin with Hello']]
    path = put(tmp_path, 'a.jsonl', lines(*found))
    train, val = records.load_split(str(path), '', 0.2, conversation, 'data', False,
                                    max_records=50)
    n_hello = sum(records.question(r) == 'Hello' for r in train + val)
    assert len(train + val) == 50 and 25 <= n_hello <= 45


@pytest.mark.parametrize('n', [2, 5, 10, 20, 50])
def test_a_share_of_few(tmp_path, n):
    """However their hashes lie: half to twice the share, or one."""
    for i in range(30):
        path = put(tmp_path, 'a.jsonl', asked([f'{i}, {j}' for j in range(n)], 'x'))
        train, val = records.load_split(str(path), '', 0.1, conversation, 'data', False)
        assert n * 0.05 <= len(val) <= max(1, n * 0.2) and len(train) + len(val) == n


@needs_mirror
@pytest.mark.parametrize('name', ['instruction', 'preference'])
@pytest.mark.parametrize('max_records', [0, 300])
def test_the_split_of_ordinary_sets_is_what_it_was(tmp_path, monkeypatch, name, max_records):
    """By the hash of the question alone."""
    monkeypatch.setenv('DATA_MIRROR', MIRROR)
    kind = getattr(records, SETS[name].kind)
    found = load(name, kind, str(tmp_path), False)
    if max_records:
        found = sorted(found, key=lambda r: fraction_of(f'of all: {records.question(r)}'))[:300]
    expected = [[r for r in found if (fraction_of(records.question(r)) < 0.1) == side]
                for side in (False, True)]
    assert list(records.load_split(name, '', 0.1, kind, str(tmp_path), False,
                                   max_records=max_records)) == \
        expected


def test_validation_of_its_own(tmp_path, capsys):
    a, b = (put(tmp_path, name, asked('abc', name)) for name in ('a.jsonl', 'b.jsonl'))
    train, val = records.load_split(str(a), str(b), 0.1, conversation, 'data', False)
    assert [r.where for r in train + val] == [f'{path}:{i}' for path in (a, b) for i in (1, 2, 3)]
    assert (f'warning: validation={b}: 3 of 3 records ask what is asked in {a}, too\n'
            in capsys.readouterr().err)
    message = stopped_at_last(capsys, lambda: records.load_split(
        str(a), str(tmp_path / 'c'), 0.1, conversation, 'data', False))
    assert message.startswith(f'validation={tmp_path / "c"}: neither a file')


@pytest.mark.parametrize('fraction,sides', [(0.0, '3 to train on and 0 to validate'),
                                            (1.0, '0 to train on and 3 to validate')])
def test_an_empty_side(tmp_path, capsys, fraction, sides):
    path = put(tmp_path, 'a.jsonl', asked('abc', 'x'))
    message = stopped_at_last(capsys, lambda: records.load_split(
        str(path), '', fraction, conversation, 'data', False))
    assert message.startswith(f'dataset={path}: ') and sides in message and '; give' in message
    assert 'ask the same' not in message


def test_question():
    record = conversation('', {'messages': [says('system', 's'), *chat('a', 'b', 'c', 'd')]})
    assert records.question(record) == 'a'


TOKENIZER = ByteTokenizer()
TURNS = [says('system', 's'), *chat('a', 'bc', 'd', 'e')]      # 3 + 3 + 4 + 3 + 3 ids
SAID = '---' '---' '-bc|' '---' '-e|'


@pytest.mark.parametrize('size,prompt_weight,last_only,expected', [
    (100, 0.0, False, SAID), (100, 0.25, False, SAID), (15, 0.0, False, SAID),
    (14, 0.0, False, SAID[:15]), (8, 0.0, False, SAID[:9]), (6, 0.0, False, SAID[:7]),
    (100, 0.0, True, '-' * 14 + 'e|'), (14, 0.0, True, '-' * 14 + 'e'), (13, 0.0, True, '-' * 14)])
def test_encode(size, prompt_weight, last_only, expected):
    ids, weights, *_ = records.encode(TOKENIZER, 'f:1', TURNS, size, prompt_weight, last_only)
    assert ids.tolist() == TOKENIZER.encode_chat(TURNS)[:size + 1] and len(ids) == len(weights)
    assert weights.tolist() == [prompt_weight if sign == '-' else 1.0 for sign in expected]


def test_a_character_that_the_tokenizer_does_not_know(capsys):
    tokenizer = CharTokenizer.train('abc')
    turns = [{'role': 'user', 'content': 'ab'}, {'role': 'assistant', 'content': 'cé'}]
    message = stopped(capsys, lambda: records.encode(tokenizer, 'chats.jsonl:7', turns, 64))
    assert message.startswith("chats.jsonl:7: character 'é' (U+00E9) at offset 1 is not among ")


def test_records_that_have_no_answer_left(capsys):
    """Up to one in twenty is left out, and told."""
    found = [conversation(f'a:{i}', {'messages': chat('a' * (7 if i in (7, 9) else 1), 'b')})
             for i in range(20)]
    part = [(r, records.encode(TOKENIZER, r.where, r.messages, 8)) for r in found]
    fits = part[:7]
    assert records.fit_window('a', 'conversations', 8, [fits])[0] == [fits]
    assert capsys.readouterr() == ('', '')
    lost = part[:9] + part[10:] + fits[:1]
    assert len(records.fit_window('a', 'conversations', 8, [lost])[0][0]) == 19
    assert capsys.readouterr().err == (
        'warning: a: 1 of 20 conversations are longer than the window of 8 tokens and are cut; a '
        'window of 5 would hold 95% of them whole, one of 11 all; 1 have no answer within it and '
        'are left out, the first a:7\n')
    message = stopped(capsys, lambda: records.fit_window('a', 'conversations', 8, [part]))
    assert message.startswith('a:7: ') and '2 of 20 records; shorten them' in message


# ---------------------------------------------------------------------------------------------
# Named sets


@pytest.mark.parametrize('name,kind', [(name, kind) for name, found in SETS.items()
                                       for kind in GOOD if kind.__name__ != found.kind])
def test_sets_of_another_kind(capsys, name, kind):
    message = stopped(capsys, lambda: load(name, kind, 'data', False, 'validation'))
    fitting = message.partition(': is a set of another kind; named sets that fit: ')[2].split(', ')
    assert message.startswith(f'validation={name}: ')
    assert len(fitting) == 2 and all(SETS[other].kind == kind.__name__ for other in fitting)


def test_bad_records_of_a_named_set_are_left_out(tmp_path, monkeypatch, capsys):
    """Nobody can mend them."""
    monkeypatch.setenv('DATA_MIRROR', str(tmp_path))
    path = put(tmp_path, 'instruction.json', array({'prompt': 'a', 'output': ' '}, *[
        {'prompt': 'a', 'output': 'b'}] * 2))
    assert [r[1:] for r in load('instruction', conversation, 'data', False)] == [
        (chat('a', 'b'),)] * 2
    assert capsys.readouterr().err == ('warning: dataset=instruction: 1 of 3 records are left out, '
                                       f"the first for: {path}:2: 'output' is empty; fill it in, "
                                       'or remove the record\n')


def test_no_network(tmp_path, monkeypatch, capsys):
    def fetch(name, url, folder):
        raise NoNetwork(f'{url} cannot be reached (ConnectionError)')

    monkeypatch.setattr(records, 'fetch', fetch)
    message = stopped(capsys, lambda: load('sms_spam', labelled, str(tmp_path), False))
    assert 'sms_spam' in message and 'cannot be reached' in message and 'DATA_MIRROR' in message


@needs_mirror
@pytest.mark.parametrize('name,n,n_bad', [('instruction', 1100, 0), ('preference', 1094, 6),
                                          ('sms_spam', 5574, 0)])
def test_sets_of_the_mirror(tmp_path, monkeypatch, capsys, name, n, n_bad):
    monkeypatch.setenv('DATA_MIRROR', MIRROR)
    found = load(name, getattr(records, SETS[name].kind), str(tmp_path), False)
    said = capsys.readouterr().err
    assert len(found) == n and f'{n + n_bad:,} ' in SETS[name].about
    assert f'{n_bad} of {n + n_bad:,} records are left out' in said if n_bad else not said
    assert not any(tmp_path.iterdir())
    if name == 'sms_spam':
        assert Counter(r.label for r in found) == {'ham': 4827, 'spam': 747}
        assert '13% of them spam' in SETS[name].about


@needs_mirror
def test_no_preference_validates_what_the_chat_model_has_learnt(tmp_path, monkeypatch):
    monkeypatch.setenv('DATA_MIRROR', MIRROR)
    train, val = records.load_split('instruction', '', 0.1, conversation, str(tmp_path), False)
    _, pairs = records.load_split('preference', '', 0.1, preference, str(tmp_path), False)
    learnt, held_out, compared = ({records.question(r) for r in part}
                                  for part in (train, val, pairs))
    assert not compared & learnt and len(compared & held_out) > 50


# ---------------------------------------------------------------------------------------------
# Sets made of the standard library

LIBRARY = Path(sysconfig.get_paths()['stdlib'])
FEW = [LIBRARY / name for name in ('argparse.py', 'configparser.py', 'json/decoder.py',
                                   'json/encoder.py', 'random.py', 'shutil.py', 'statistics.py')]


@pytest.fixture
def few(monkeypatch):
    """As if the standard library had only a few files: all of them take seconds."""
    monkeypatch.setattr(stdlib, 'modules', lambda: FEW)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """library(files): another standard library; returns its functions."""
    def make(files: dict) -> list:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return list(stdlib.functions())

    monkeypatch.setattr(stdlib.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
    return make


def code(tree: ast.FunctionDef, skip: int = 0) -> str:
    """All that runs, but the first `skip` statements."""
    return ast.dump(ast.Module([tree.args, *tree.body[skip:]], []))


def test_functions_are_as_in_their_files_without_docstrings(few):
    found = list(stdlib.functions())
    trees = {path: {node.lineno: node for node in ast.walk(ast.parse(path.read_text('utf-8')))
                    if isinstance(node, ast.FunctionDef)} for path in FEW}
    assert len(found) > 100 and len({f.source for f in found}) == len(found)
    for f in found:
        path, _, line = f.where.rpartition(':')
        true, (mine,) = trees[Path(path)][int(line)], ast.parse(f.source).body
        docstring = ast.get_docstring(true, clean=False)
        assert code(mine) == code(true, skip=1) and mine.name == true.name
        assert docstring not in f.source and ast.get_docstring(mine) is None
        assert f.about and f.about in ' '.join(docstring.split())
        assert f.source.startswith(f'{f.header}\n') and f.header.endswith(':')
        assert len(f.source) <= stdlib.LONGEST
        assert f.package == Path(path).relative_to(LIBRARY).parts[0].removesuffix('.py')


def test_which_files_and_functions(library, tmp_path):
    """None of tests, in other encodings, that are templates, without docstring, or twice."""
    one = lambda name, more='': f'def {name}():\n    """About it.{more}"""\n    return {name}\n'
    found = library({
        'b.py': one('first') + one('long', '\n\n    More.') + one('first') + 'def no():\n  pass\n'
        'def only():\n    """About it."""\ndef line(): "About it."; return 1\n',
        'a/c.py': one('second') + one('huge').replace('return', 'return' + ' ' * 700),
        'a/empty.py': '', 'test/t.py': one('third'), 'a/tests/t.py': one('third'),
        'site-packages/s.py': one('third'), 'a/latin.py': one('third').encode() + b'# caf\xe9',
        'template.py': one('third') + '${x}', 'notes.txt': one('third')})
    assert [(f.package, f.header, f.about, f.source) for f in found] == [
        ('a', 'def second():', 'About it.', 'def second():\n    return second'),
        ('b', 'def first():', 'About it.', 'def first():\n    return first'),
        ('b', 'def long():', 'About it.', 'def long():\n    return long')]
    assert [f.where for f in found] == [f'{tmp_path}/{place}' for place in (
        'a/c.py:1', 'b.py:1', 'b.py:4')]


def test_methods_are_dedented(library):
    f, = library({'a.py': 'class A:\n    @property\n    def b(self,\n          c=1):\n'
                          '        """About it."""\n\n        if c:\n            return c\n'})
    assert f.source == 'def b(self,\n      c=1):\n    if c:\n        return c'


def test_text_that_is_less_indented_is_not_cut(library):
    found = library({'a.py': 'class A:\n    def b(self):\n        """About it."""\n'
                             '        return """one\ntwo"""\n'})
    assert not found or 'one\ntwo' in found[0].source


@pytest.mark.parametrize('page', ['\f', '# \u2028', '# \x1c'], ids=ascii)
def test_lines_are_those_of_python(library, page):
    text = ''.join(f'def {name}():\n    """It."""\n    return 1\n{page}\n' for name in 'abc')
    assert [f.source for f in library({'a.py': text})] == [
        f'def {name}():\n    return 1' for name in 'abc']


def test_corrupted_functions_differ(few):
    """And only after their headers, in some of their words; the same each time."""
    for f in stdlib.functions():
        corrupt = stdlib.corrupt(f.source)
        assert corrupt != f.source and corrupt == stdlib.corrupt(f.source)
        here, there = f.source.split('\n'), corrupt.split('\n')
        assert here[0] == there[0] and len(here) == len(there)
        words = len(re.findall(r'\w+|==|!=|[<>+*-]', f.source.partition('\n')[2]))
        assert sum(a != b for a, b in zip(here, there)) <= max(1, words // 6)


@pytest.mark.parametrize('word', stdlib.SWAPS)
def test_words_become_their_opposites(word):
    assert stdlib.corrupt(f'def f(x):\n    x {word} 5') == f'def f(x):\n    x ' \
        f'{stdlib.SWAPS[word]} 5'


@pytest.mark.parametrize('body,others', [('name x', {'None x'}), ('one x two', {'two x two',
                                                                             'one x one'})])
def test_names_become_others(body, others):
    assert stdlib.corrupt(f'def f(x):\n    {body}').partition('\n    ')[2] in others


def test_comments_are_not_corrupted():
    comment = '# the first of all is told apart from the others by what it is, and not by place'
    for i in range(20):
        source = f'def f(x):\n    {comment}\n    return x + {i}'
        assert stdlib.corrupt(source).split('\n')[1] == f'    {comment}'


def test_sets_of_the_library(few, capsys):
    chats = load('python_chat', conversation, 'data', False)
    bugs = load('python_bugs', preference, 'data', False)
    sources = [f.source for f in stdlib.functions()]
    assert [r.messages[-1]['content'] for r in chats] == [r.chosen for r in bugs] == sources
    assert [r.where for r in chats] == [r.where for r in bugs]
    for chat_record, bug in zip(chats, bugs):
        assert chat_record.messages[:-1] == bug.messages and len(bug.messages) == 1
        header, _, about = records.question(bug).rpartition('\n')
        assert bug.chosen.startswith(f'{header}\n') and about not in bug.chosen
        assert bug.rejected.startswith(header.partition('\n')[0])
    assert capsys.readouterr() == ('', '')


def test_the_largest_packages_are_classes(few, monkeypatch):
    found = load('python_modules', labelled, 'data', False)
    counts = Counter(r.label for r in found)
    assert counts.keys() == {'argparse', 'configparser', 'json', 'random', 'shutil', 'statistics'}
    assert [r.text for r in found] == [f.source for f in stdlib.functions()]
    monkeypatch.setattr(stdlib, 'N_PACKAGES', 2)
    assert Counter(r.label for r in load('python_modules', labelled, 'data', False)) == dict(
        counts.most_common(2))
