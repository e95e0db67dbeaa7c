"""core/read/tables.py at both doors: documents for pretraining, and records for the later stages.

What a file holds is read the same, or refused the same, wherever it is given; names decide what a
field is, and what changes the meaning of a record is never ignored.
"""
import gzip
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stopped, stopped_at_last

import finetune
import sample
from core.data import records
from core.data.dataset import rows_of
from core.data.records import conversation, labelled, preference
from core.read import documents, tables
from core.read.documents import Bad
from core.settings import Stop
from core.text.tokenizer import ByteTokenizer


def put(folder, name: str, data: bytes | str) -> Path:
    path = folder / name
    data = data if isinstance(data, bytes) else data.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith('.gz') else data)
    return path


def says(role: str, content: str = 'x', **more) -> dict:
    return {'role': role, 'content': content, **more}


def chat(*contents: str) -> list[dict]:
    return [says(('user', 'assistant')[i % 2], content) for i, content in enumerate(contents)]


def one(folder, kind, record: dict):
    """What load makes of a file with one record, without its place."""
    path = put(folder, 'a.jsonl', json.dumps(record) + '\n')
    found, = records.load(str(path), kind, 'data', False)
    return found[1:]


# ---------------------------------------------------------------------------------------------
# The doors: each gives the texts of a file


def as_documents(path, encoding='', errors='strict', skip_bad=False) -> list[str]:
    found = []
    for record in documents.read(path, encoding, errors, 'text'):
        try:
            found += [document.data for document in documents.parse(record, 'text', errors)]
        except Bad:
            if not skip_bad:
                raise
    return found


def as_labelled(path, skip_bad=False) -> list[str]:
    return [r.text for r in records.load(str(path), labelled, 'data', skip_bad)]


def as_answers(path, skip_bad=False) -> list[str]:
    return [r.messages[-1]['content'] for r in records.load(str(path), conversation, 'data',
                                                            skip_bad)]


def as_chosen(path, skip_bad=False) -> list[str]:
    return [r.chosen for r in records.load(str(path), preference, 'data', skip_bad)]


DOORS = {   # -> how it reads, and what stands beside the text
    'prepare': (as_documents, 'text', {'label': 'ham'}),
    'classify': (as_labelled, 'text', {'label': 'ham'}),
    'chat': (as_answers, 'output', {'prompt': 'Hi'}),
    'dpo': (as_chosen, 'chosen', {'prompt': 'Hi', 'rejected': 'no'})}
FORMATS = ['a.jsonl', 'a.ndjson', 'a.json', 'a.csv', 'a.tsv', 'a.jsonl.gz', 'a.csv.gz']


def written(name: str, field: str, beside: dict, texts: list[str]) -> str:
    rows = [{**beside, field: text} for text in texts]
    kind = documents.suffix(name)
    if kind == '.json':
        return json.dumps(rows, ensure_ascii=False, indent=1)
    if kind in tables.TABLES:
        mark = {'.csv': ',', '.tsv': '\t'}[kind]
        return ''.join(mark.join(row) + '\n' for row in (rows[0], *(r.values() for r in rows)))
    return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


TEXTS = ['Der Bär fährt nach Köln, über große Brücken.'.replace(',', ''), 'Ein schönes Mädchen.']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'cp1252'])
@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('door', DOORS)
def test_encodings_are_found_out_at_every_door(tmp_path, capsys, door, name, encoding):
    read, field, beside = DOORS[door]
    path = put(tmp_path, name, written(name, field, beside, TEXTS).encode(encoding))
    assert read(path) == TEXTS
    told = f'{path}: not UTF-8, read as {encoding}\n' in capsys.readouterr().err
    assert told == (not encoding.startswith('utf-8'))


@pytest.mark.parametrize('name', [*FORMATS, 'a.txt'])
@pytest.mark.parametrize('data,stated', [
    ('utf-8-sig', 'utf-8'), ('utf-16', 'utf-16'), ('utf-16-le', 'utf-16-le'), ('cp1251', 'cp1251'),
    ('cp037', 'cp037')])
def test_encodings_that_are_stated(tmp_path, name, data, stated):
    texts = TEXTS if data != 'cp1251' else ['Все счастливые', 'семьи']
    text = written(name, 'text', {'label': 'x'}, texts) if name != 'a.txt' else '\n'.join(texts)
    path = put(tmp_path, name, text.encode(data))
    assert '\n'.join(as_documents(path, stated)) == '\n'.join(texts)


def test_a_mark_before_a_stated_encoding_without_one(tmp_path):
    for name, text in (('a.txt', 'Äb'), ('a.jsonl', '{"text": "Äb"}'), ('a.csv', 'text\nÄb')):
        path = put(tmp_path, name, b'\xff\xfe' + text.encode('utf-16-le'))
        assert as_documents(path, 'utf-16-le') == ['Äb']


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('door', DOORS)
def test_one_byte_that_is_wrong_is_one_bad_row(tmp_path, capsys, door, name):
    """It is told by name with what to do; the rows around it are still read."""
    read, field, beside = DOORS[door]
    texts = [*TEXTS, 'caf?', *TEXTS]
    path = put(tmp_path, name, written(name, field, beside, texts).encode().replace(
        b'caf?', b'caf\xe9'))
    with pytest.raises((Bad, Stop)) as e:
        read(path)
    message = str(getattr(e.value, 'message', e.value))
    place = {'.json': ''}.get(documents.suffix(name), f':{3 + ("sv" in name)}')
    assert message.startswith(f'{path}{place}') and 'invalid UTF-8 (byte 0xe9); convert' in message
    assert read(path, skip_bad=True) == TEXTS * 2


def test_replacing_is_counted_the_same_in_all_formats(tmp_path):
    for name in FORMATS:
        path = put(tmp_path, name, written(name, 'text', {'label': 'x'}, [*TEXTS, 'caf?']).encode(
            ).replace(b'caf?', b'caf\xe9'))
        assert as_documents(path, '', 'replace')[-1] == 'caf\ufffd'


@pytest.mark.parametrize('door', DOORS)
def test_lone_surrogates(tmp_path, capsys, door):
    """Half of a character is no text: never a question mark that nobody counts."""
    read, field, beside = DOORS[door]
    path = put(tmp_path, 'a.jsonl', json.dumps({**beside, field: 'good'}) + '\n' + json.dumps(
        {**beside, field: 'a\ud800b'}) + '\n')
    with pytest.raises((Bad, Stop)) as e:
        read(path)
    message = str(getattr(e.value, 'message', e.value))
    assert message.startswith(f'{path}:2: ') and 'lone surrogate' in message
    assert read(path, skip_bad=True) == ['good']
    if door == 'prepare':
        assert read(path, '', 'replace') == ['good', 'a\ufffdb']


@pytest.mark.parametrize('name,cells', [('a.csv', 'x, y'), ('a.tsv', 'x\ty'), ('a.csv', None)])
@pytest.mark.parametrize('door', DOORS)
def test_a_row_with_another_number_of_columns_is_bad(tmp_path, door, name, cells):
    """An unquoted comma never drops the rest of a text."""
    read, field, beside = DOORS[door]
    text = written(name, field, beside, ['one', 'two', 'three'])
    assert text.count('two') == 1
    mark = '\t' if 'tsv' in name else ','
    text = text.replace('two', cells) if cells else text.replace(f'{mark}two', '')
    path = put(tmp_path, name, text)
    with pytest.raises((Bad, Stop)) as e:
        read(path)
    message = str(getattr(e.value, 'message', e.value))
    assert message.startswith(f'{path}:3: ') and f'columns, not {1 + len(beside)} (' in message
    assert read(path, skip_bad=True) == ['one', 'three']


@pytest.mark.parametrize('door', DOORS)
def test_a_quote_without_an_end_stops(tmp_path, door):
    """With skip_bad, too: the rows that it swallows are many, not one."""
    read, field, beside = DOORS[door]
    path = put(tmp_path, 'a.csv', written('a.csv', field, beside, ['one', '"two', 'three']))
    with pytest.raises((Bad, Stop)) as e:
        read(path, skip_bad=True)
    message = str(getattr(e.value, 'message', e.value))
    assert message.startswith(f'{path}:3: ') and 'swallowed all rows' in message


# ---------------------------------------------------------------------------------------------
# Names decide


@pytest.mark.parametrize('names,kind,expected', [
    ('question,rejected,chosen', preference, (chat('q'), 'c', 'r')),
    ('chosen,rejected,question', preference, (chat('q'), 'c', 'r')),
    (' Question ,Rejected,CHOSEN', preference, (chat('q'), 'c', 'r')),
    ('id,rejected,prompt,chosen', preference, (chat('q'), 'c', 'r')),
    ('rejected,instruction,chosen,system', preference,
     ([says('system', 's'), *chat('q')], 'c', 'r')),
    ('answer,question', conversation, (chat('q', 'o'),)),
    ('response,instruction', conversation, (chat('q', 'o'),)),
    ('completion,prompt', conversation, (chat('q', 'o'),)),
    ('output,input', conversation, (chat('i', 'o'),)),
    ('Response,Context', conversation, (chat('i', 'o'),)),
    ('response,context,question', conversation, (chat('q\n\ni', 'o'),)),
    ('system_prompt,answer,prompt', conversation, ([says('system', 's'), *chat('q', 'o')],)),
    ('id,text,label', labelled, ('t', 'l')), ('text,label', labelled, ('t', 'l'))])
def test_columns_in_any_order(tmp_path, names, kind, expected):
    cells = {'question': 'q', 'prompt': 'q', 'instruction': 'q', 'chosen': 'c', 'rejected': 'r',
             'input': 'i', 'context': 'i', 'text': 't', 'label': 'l', 'id': '7', 'system': 's',
             'system_prompt': 's'}
    row = [cells.get(name.strip().lower(), 'o') for name in names.split(',')]
    for name, mark in (('a.csv', ','), ('a.tsv', '\t')):
        path = put(tmp_path, name, f'{names}\n{",".join(row)}\n'.replace(',', mark))
        found, = records.load(str(path), kind, 'data', False)
        assert found[1:] == expected


@pytest.mark.parametrize('kind,text,lacks', [
    (preference, 'question,worse,better\nq,a,b\n', 'chosen and no rejected'),
    (preference, 'Hi,Hello,Go away\n', 'prompt or question or instruction or input or context'),
    (preference, 'prompt;chosen;rejected\nq;a;b\n', 'prompt or question'),
    (conversation, 'Hi,Hello\n', 'prompt or question'),
    (conversation, 'ask,reply\na,b\n', 'no output or answer or response or completion'),
    (conversation, 'question,solution\na,b\n', 'no column output or answer'),
    (conversation, 'question,answer\na,b\n'.replace('question', ''), 'prompt or question'),
    (labelled, 'v1,v2\nham,a\nspam,b\nham,c\n', 'label and no text among v1, v2'),
    (labelled, 'review,sentiment\na,pos\nb,neg\nc,pos\n', 'label and no text'),
    (labelled, 'category,text\na,b\n', 'no column label among'),
    (labelled, 'a,b,c\n1,2,3\n', 'label and no text'),
    (labelled, 'a\n1\n', 'label and no text')])
def test_a_header_that_lacks_a_name_stops(tmp_path, capsys, kind, text, lacks):
    path = put(tmp_path, 'a.csv', text)
    for skip_bad in (False, True):
        message = stopped(capsys, lambda: records.load(str(path), kind, 'data', skip_bad))
        assert message.startswith(f'{path}:1: no column ') and lacks in message
        assert text.split('\n')[0].replace(',', ', ').lower() in message    # the columns found


def test_a_column_that_is_there_twice(tmp_path, capsys):
    for names in ('text,label,text', 'Text,label,text '):
        path = put(tmp_path, 'a.csv', f'{names}\na,b,c\n')
        assert "the column 'text' is there twice" in stopped(
            capsys, lambda: records.load(str(path), labelled, 'data', False))
        with pytest.raises(Bad, match="'text' is there twice"):
            as_documents(path)
    path = put(tmp_path, 'a.jsonl', '{"Text": "a", "text": "b", "label": "c"}\n')
    assert 'differ only in capitals' in stopped(
        capsys, lambda: records.load(str(path), labelled, 'data', False))


@pytest.mark.parametrize('extra', [{'question': 'b'}, {'instruction': 'b'}])
def test_two_names_of_the_same(tmp_path, capsys, extra):
    path = put(tmp_path, 'a.jsonl', json.dumps({'prompt': 'a', 'output': 'c', **extra}))
    assert 'under another name as well; remove one' in stopped(
        capsys, lambda: records.load(str(path), conversation, 'data', False))


def test_classify_file_is_read_by_names(tmp_path, monkeypatch, capsys):
    texts = lambda name, data: (monkeypatch.setattr(sample, 'classify_file', str(
        put(tmp_path, name, data))), sample.texts_to_classify())[1]
    assert texts('a.csv', 'id,Text\n1,a\n2,b\n') == ['a', 'b']
    assert texts('a.jsonl', '{"text": "Bär"}\n'.encode('utf-16')) == ['Bär']
    assert texts('a.txt', 'schöner Bär\r\n\r\nb'.encode('cp1252')) == ['schöner Bär', 'b']
    assert texts('a.txt.gz', '\ufeffa\u2028b\n') == ['a\u2028b']
    for data in ('a\nb\n', 'id,body\n1,a\n'):
        path = put(tmp_path, 'b.csv', data)
        monkeypatch.setattr(sample, 'classify_file', str(path))
        assert stopped(capsys, sample.texts_to_classify).startswith(f'{path}:1: no column text')


# ---------------------------------------------------------------------------------------------
# What others write

HUMAN, GPT = {'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}
CHATS = {
    'ShareGPT': ({'id': 'x_0', 'conversations': [HUMAN, GPT]}, chat('a', 'b')),
    'ShareGPT with a system': ({'conversations': [{'from': 'system', 'value': 's'}, HUMAN, GPT],
                                'tools': '[]'}, [says('system', 's'), *chat('a', 'b')]),
    'ShareGPT, other names': ({'conversations': [{'from': 'user', 'value': 'a'}, {
        'from': 'chatgpt', 'value': 'b'}, HUMAN, {'from': 'bing', 'value': 'c'}]},
        chat('a', 'b', 'a', 'c')),
    'LLaMA-Factory': ({'conversations': [HUMAN, GPT], 'system': 's', 'tools': ''},
                      [says('system', 's'), *chat('a', 'b')]),
    'lmsys': ({'conversation_id': '1', 'model': 'm', 'conversation': chat('a', 'b')},
              chat('a', 'b')),
    'Alpaca': ({'instruction': 'a', 'input': None, 'output': 'b'}, chat('a', 'b')),
    'Alpaca, all of it': ({'instruction': 'a', 'input': 'i', 'output': 'b', 'system': 's',
                           'history': [['q', 'r'], ['t', 'u']], 'text': 'abc'},
                          [says('system', 's'), *chat('q', 'r', 't', 'u', 'a\n\ni', 'b')]),
    'empty ones': ({'instruction': 'a', 'input': '', 'output': 'b', 'system': '', 'history': []},
                   chat('a', 'b')),
    'Dolly': ({'instruction': 'a', 'context': 'i', 'response': 'b', 'category': 'qa'},
              chat('a\n\ni', 'b')),
    'OpenOrca': ({'id': 'niv.1', 'system_prompt': 's', 'question': 'a', 'response': 'b'},
                 [says('system', 's'), *chat('a', 'b')]),
    'HelpSteer': ({'prompt': 'a', 'response': 'b', 'helpfulness': 4, 'verbosity': 0},
                  chat('a', 'b')),
    'GSM8K': ({'question': 'a', 'answer': 'b'}, chat('a', 'b')),
    'no_robots': ({'prompt': 'a', 'prompt_id': '1', 'messages': chat('a', 'b'), 'category': 'Chat'},
                  chat('a', 'b')),
    'TRL': ({'prompt': chat('a'), 'completion': [says('assistant', 'b')]}, chat('a', 'b')),
    'TRL, texts': ({'prompt': 'a', 'completion': 'b'}, chat('a', 'b')),
    'KTO, wanted': ({'prompt': 'a', 'completion': 'b', 'label': True}, chat('a', 'b')),
    'OpenAI': ({'messages': [
        says('system', 's'), says('user', 'a'), says('assistant', 'x', weight=0),
        says('user', 'c'), says('assistant', 'b', weight=1)]},
               [says('system', 's'), says('user', 'a'), says('assistant', 'x', weight=0),
                *chat('c', 'b')]),
    'parts': ({'messages': [says('user', [{'type': 'text', 'text': 'a'}, {
        'type': 'input_text', 'text': 'b'}]), says('assistant', 'c')]}, chat('a\nb', 'c')),
    'nulls': ({'messages': [says('user', 'a', tool_calls=None, name='Bob'), says(
        'assistant', 'b', function_call=None, weight=None)], 'tools': None}, chat('a', 'b')),
}


@pytest.mark.parametrize('name', CHATS)
def test_conversations_as_others_write_them(tmp_path, name):
    record, expected = CHATS[name]
    assert one(tmp_path, conversation, record) == (expected,)


TAIL = lambda text: [says('assistant', text)]
PAIRS = {
    'UltraFeedback': ({'prompt': 'a', 'prompt_id': '1', 'messages': chat('a', 'y'),
                       'chosen': chat('a', 'y'), 'rejected': chat('a', 'n'), 'score_chosen': 8.5},
                      chat('a')),
    'several turns': ({'chosen': chat('a', 'b', 'c', 'y'), 'rejected': chat('a', 'b', 'c', 'n')},
                      chat('a', 'b', 'c')),
    'a system beside lists': ({'system': 's', 'chosen': chat('a', 'y'),
                               'rejected': chat('a', 'n')}, [says('system', 's'), *chat('a')]),
    'TRL': ({'prompt': chat('a'), 'chosen': TAIL('y'), 'rejected': TAIL('n')}, chat('a')),
    'TRL, a text': ({'prompt': 'a', 'chosen': TAIL('y'), 'rejected': 'n'}, chat('a')),
    'orca_dpo_pairs': ({'system': 's', 'question': 'a', 'chosen': 'y', 'rejected': 'n'},
                       [says('system', 's'), *chat('a')]),
    'no system': ({'system': '', 'question': 'a', 'chosen': 'y', 'rejected': 'n'}, chat('a')),
    'LLaMA-Factory': ({'conversations': [HUMAN], 'chosen': {**GPT, 'value': 'y'},
                       'rejected': {**GPT, 'value': 'n'}}, chat('a')),
    'ShareGPT': ({'conversations': [HUMAN], 'chosen': [{**GPT, 'value': 'y'}],
                  'rejected': [{**GPT, 'value': 'n'}]}, chat('a')),
    'history': ({'history': [['q', 'r']], 'instruction': 'a', 'input': None, 'chosen': 'y',
                 'rejected': 'n'}, chat('q', 'r', 'a')),
}


@pytest.mark.parametrize('name', PAIRS)
def test_preferences_as_others_write_them(tmp_path, name):
    record, expected = PAIRS[name]
    assert one(tmp_path, preference, record) == (expected, 'y', 'n')


TOOL = [{'type': 'function', 'function': {'name': 'f'}}]
NOT_READ = [    # kind, record, part of the message
    *[(conversation, {'prompt': 'a', 'output': 'b', name: value}, f"'{name}' changes the meaning")
      for name, value in {'tools': TOOL, 'functions': '[{}]', 'images': ['a.png'], 'image': 'a.png',
                          'audios': ['a.wav'], 'query': 'q', 'weight': 0.5, 'kto_tag': True,
                          'mask': [0, 1], 'loss': False}.items()],
    (conversation, {'title': 't', 'mapping': {'1': {'message': None}}}, "'mapping' changes"),
    (conversation, {'uuid': '1', 'chat_messages': [{'sender': 'human'}]}, "'chat_messages' cha"),
    *[(conversation, {'messages': [says('user'), says('assistant', 'b', **{name: value})]},
       f"message 2: '{name}' changes the meaning")
      for name, value in {'tool_calls': TOOL, 'function_call': {'name': 'f'}, 'train': False,
                          'loss': True, 'mask': 0, 'training': True, 'images': ['a'],
                          'reasoning_content': 'hm', 'thinking': 'hm'}.items()],
    *[(conversation, {'messages': [says('user'), says('assistant', 'b', weight=weight)]},
       'message 2 has weight') for weight in (True, -1, 2, '0', float('nan'), [0])],
    (conversation, {'messages': [says('user'), says('assistant', 'b', weight=0)]},
     'all answers have weight 0'),
    (conversation, {'messages': [says('user'), says('assistant', None, tool_calls=TOOL)]},
     "'tool_calls' changes"),
    (conversation, {'messages': [says('user', [{'type': 'image_url', 'image_url': {'url': 'u'}}, {
        'type': 'text', 'text': 'a'}]), says('assistant')]}, "message 1: 'content' is list"),
    (conversation, {'conversations': [{'from': 'observation', 'value': 'a'}, GPT]},
     "role 'observation': must be one of system, user, human"),
    (conversation, {'conversations': [{'from': 'gpt', 'value': 'a'}, HUMAN]}, 'comes first'),
    (conversation, {'messages': chat('a', 'b'), 'context': 'c'}, "'input' stands beside messages"),
    (conversation, {'messages': chat('a', 'b'), 'prompt': 'c'}, "'prompt' stands beside messages"),
    (conversation, {'messages': chat('a', 'b'), 'answer': 'c'}, "'output' stands beside messages"),
    (conversation, {'messages': [says('system'), *chat('a', 'b')], 'system': 's'},
     'message 2 is of the system'),
    (conversation, {'prompt': 'a', 'output': 'b', 'history': 'c'}, "'history' must be a list"),
    (conversation, {'prompt': 'a', 'output': 'b', 'history': [['c']]}, "'history' must be a list"),
    (conversation, {'prompt': 'a', 'output': 'b', 'history': [['c', None]]}, "has no 'content'"),
    (conversation, {'prompt': 'a', 'completion': 'b', 'label': False}, "'label' says"),
    (conversation, {'messages': json.dumps(chat('a', 'b'))}, "'messages' must be a list"),
    (conversation, {'message_id': '1', 'parent_id': None, 'text': 'a', 'role': 'prompter'},
     'has none of messages'),
    (preference, {'chosen': '\n\nHuman: a\n\nAssistant: y', 'rejected': '\n\nHuman: a'},
     'has none of messages'),
    (preference, {'chosen': chat('a', 'b', 'c', 'y'), 'rejected': chat('a', 'x', 'c', 'n')},
     'must differ in the last message alone'),
    (preference, {'chosen': chat('a', 'y'), 'rejected': chat('a', 'y', 'c', 'n')}, 'must differ'),
    (preference, {'chosen': chat('a', 'y', 'c'), 'rejected': chat('a', 'n', 'c')}, 'of the user'),
    (preference, {'prompt': 'z', 'chosen': chat('a', 'y'), 'rejected': chat('a', 'n')},
     "'prompt' stands beside messages"),
    (preference, {'prompt': 'a', 'chosen': [says('assistant', 'y', weight=0)], 'rejected': 'n'},
     "has a 'weight'"),
    (preference, {'prompt': 'a', 'chosen': 'y', 'rejected': 'n', 'images': ['a.png']}, "'images'"),
]


@pytest.mark.parametrize('kind,record,part', NOT_READ)
def test_what_changes_the_meaning_is_never_ignored(tmp_path, capsys, kind, record, part):
    path = put(tmp_path, 'a.jsonl', json.dumps(record))
    message = stopped(capsys, lambda: records.load(str(path), kind, 'data', False))
    assert message.startswith(f'{path}:1: ') and part in message and re.search('[;:] ', message)


def test_what_is_not_used_is_named_once_with_its_count(tmp_path, capsys):
    rows = [{'prompt': f'q{i}', 'output': 'a', 'id': i, 'source': 's' * (i % 2), 'note': None}
            for i in range(1200)]
    rows += [{'messages': [says('user', 'a', name='Bob'), says('assistant', 'b', name='Al')]}]
    path = put(tmp_path, 'a.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
    records.load(str(path), conversation, 'data', False)
    assert capsys.readouterr().err == (f'{path}: fields not used: id (1,200), source (600), '
                                       'name (1)\n')
    records.load(str(put(tmp_path, 'a.csv', 'text,label,,x\na,b,,c\n')), labelled, 'data', False)
    assert capsys.readouterr().err.endswith(': fields not used: x (1)\n')


# ---------------------------------------------------------------------------------------------
# The weight of a message


def test_the_weight_of_a_message_is_that_of_its_tokens():
    turns = [says('user', 'a'), says('assistant', 'bc', weight=0), says('user', 'd'),
             says('assistant', 'e', weight=0.5), says('user', 'f', weight=0.5),
             says('assistant', 'g')]
    found = conversation('', {'messages': turns}).messages
    for prompt_weight in (0.0, 0.25):
        encoded = records.encode(ByteTokenizer(), 'f:1', found, 64, prompt_weight)
        p = prompt_weight
        assert encoded.weights.tolist() == [p] * 3 + [0] * 4 + [p] * 3 + [p / 2, .5, .5] \
            + [p / 2] * 3 + [p, 1, 1] and not encoded.lost
    assert records.encode(ByteTokenizer(), 'f:1', found[:3], 64).lost


def test_weights_between_0_and_1_are_used_by_the_loss(monkeypatch):
    """Against the losses of single tokens; and a step uses the sums that never make all logits
    only where all weights are 0 or 1."""
    for name, value in {'prompt_loss_weight': 0.0, 'pack': False, 'seed': 1}.items():
        monkeypatch.setattr(finetune, name, value)

    def trained(x, y, doc, reduction):
        each = torch.where(y < 0, 0.0, x.double() + 1)
        return each.sum() if reduction == 'sum' else each

    for weight, whole in ((0.5, False), (0, True)):
        turns = [says('user', 'a'), says('assistant', 'b', weight=weight), *chat('c', 'd')]
        record = conversation('', {'messages': turns})
        rows = rows_of([(record, records.encode(ByteTokenizer(), '', record.messages, 64))], 64,
                       1, False)
        batch = rows.batch([0])
        x, *_, w = batch
        expected = ((x + 1) * w).sum().item()
        assert np.unique(w.numpy()).tolist() == sorted({0, weight, 1})
        assert finetune.weighted_loss(trained, batch).item() == pytest.approx(expected)
        if whole:
            assert finetune.weighted_loss(trained, batch, True).item() == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------
# Single files that prepare.py is given

NOTEBOOK = {'nbformat': 4, 'metadata': {}, 'cells': [
    {'cell_type': 'markdown', 'source': ['# Bär\n', 'text']},
    {'cell_type': 'code', 'source': 'x = 1\nprint(x)', 'outputs': [{'text': ['1\n']}]},
    {'cell_type': 'raw', 'source': ['raw']}, {'cell_type': 'code', 'source': []}]}


@pytest.mark.parametrize('data,expected', [
    ([{'text': 'a'}, {'id': 1, 'text': 'b'}], ['a', 'b']), (['a', 'b'], ['a', 'b']), ([], [])])
def test_a_json_file_is_its_records(tmp_path, data, expected):
    for name in ('a.json', 'a.json.gz'):
        assert as_documents(put(tmp_path, name, json.dumps(data, indent=2))) == expected


def test_strings_are_documents_in_json_lines_as_well(tmp_path):
    assert as_documents(put(tmp_path, 'a.jsonl', '"a"\n"b"\n')) == ['a', 'b']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_a_notebook_is_its_cells(tmp_path, encoding):
    data = json.dumps(NOTEBOOK, ensure_ascii=False).encode(encoding)
    assert as_documents(put(tmp_path, 'a.ipynb', data)) == ['# Bär\ntext\n\nx = 1\nprint(x)\n']


def archive() -> bytes:
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        z.writestr(zipfile.ZipInfo('word/document.xml'), '<w:t>text</w:t>')    # of no time
    return f.getvalue()


@pytest.mark.parametrize('name,data,part', [
    ('a.json', '{"data": [{"text": "a"}], "meta": {"tags": ["x"]}}', 'you mean alone: data, tags'),
    ('a.json', '{"text": "a"}\n{"text": "b"}\n', 'a file with one record a line is named .jsonl'),
    ('a.json', '"text"', 'not an array'), ('a.json', 'plain text', 'not an array'),
    ('a.json', '[{"body": "a"}]', "no text in a field 'text': it has body"),
    ('a.json', '[1, 2]', 'it is no object'), ('a.json', '[{"text": "a"}', 'a comma or ]'),
    ('a.ipynb', '{"worksheets": []}', 'no Jupyter notebook of format 4'),
    ('a.ipynb', '[]', 'no Jupyter notebook of format 4'), ('a.ipynb', '{', 'invalid JSON'),
    ('a.ipynb', '{"cells": [{"cell_type": "code"}]}', 'no Jupyter notebook of format 4'),
    ('a.rtf', r'{\rtf1\ansi Hello}', 'is RTF'), ('a.txt', r'{\rtf1\ansi Hello}', 'is RTF'),
    ('a.doc', r'{\rtf1\ansi Hello}', 'is RTF'), ('a.rtf.gz', r'{\rtf1\ansi Hello}', 'is RTF'),
    ('a.pdf', '%PDF-1.4\n1 0 obj <</Type /Catalog>>', 'is PDF'),
    ('a.txt', '%PDF-1.4\n1 0 obj', 'is PDF'), ('noted', '%PDF-1.4\n1 0 obj', 'is PDF'),
    ('a.ps', '%!PS-Adobe-3.0\n', 'is PostScript'), ('a.docx', archive(), 'a ZIP archive'),
    ('a.txt', archive(), 'a ZIP archive'), ('a.jsonl', archive(), 'a ZIP archive'),
    ('a.txt', gzip.compress(b'text', mtime=0), 'is gzip'),
    ('a.txt.gz', gzip.compress(b'text', mtime=0), 'is gzip'),
    *[(f'a{kind}', 'some text', f'a {kind} file') for kind in (
        '.doc', '.odt', '.epub', '.xlsx', '.tar', '.zip', '.png', '.jpg', '.xz', '.pdf')],
    ('a.tar.gz', 'some text', 'a .tar file'), ('a.JPG', 'some text', 'a .jpg file')])
def test_syntax_is_never_text(tmp_path, name, data, part):
    path = put(tmp_path, name, data)
    with pytest.raises(Bad) as e:
        as_documents(path)
    assert str(e.value).startswith(f'{path}') and part in str(e.value) and '; ' in str(e.value)


def test_other_suffixes_are_still_text(tmp_path):
    for name in ('notes', 'a.c', 'a.tex', 'a.log'):
        assert as_documents(put(tmp_path, name, '# A {text}\n')) == ['# A {text}\n']


def test_folders_count_what_they_pass_over(tmp_path):
    for name in ('a.txt', 'b.json', 'c.pdf', 'd.ipynb', 'e.ndjson'):
        put(tmp_path, name, 'x')
    files, left_out = documents.find_files(str(tmp_path), print)
    assert [path.name for path in files] == ['a.txt', 'd.ipynb', 'e.ndjson']
    assert left_out == {'.json': 1, '.pdf': 1}


def test_validation_files_are_read_by_the_same_rules(tmp_path, capsys):
    a = put(tmp_path, 'a.jsonl', '{"question": "a", "answer": "b"}\n')
    b = put(tmp_path, 'b.csv', 'output,frage\nb,a\n')
    message = stopped_at_last(capsys, lambda: records.load_split(
        str(a), str(b), 0.1, conversation, 'data', False))
    assert message.startswith(f'{b}:1: no column prompt or question')
