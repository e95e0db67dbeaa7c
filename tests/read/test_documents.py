"""core/read/documents.py: files of every format, in every encoding, and damaged in every way."""
import codecs
import gzip
import io
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from core.read import documents, tables
from core.read.documents import LONGEST, Bad, find_files, parse, read, suffix

BLOCK = 1 << 20     # bytes of a text file that are decoded at a time
SEPARATOR = '<|endoftext|>'
LOREM = ('Wer die Größe der Bäume am Südhang kennt, der weiß, dass sie im Herbst am schönsten '
         'sind, und dass man sie von der Brücke aus am besten sieht. ')
PAGE = (f'<html><head><meta charset="iso-8859-1"><title>T</title></head><body><nav><ul><li>'
        f'<a href="/">Contact</a></li></ul></nav><article><h1>Bäume</h1><p>{LOREM * 3}</p>'
        f'<p>Zweiter &amp; letzter Absatz. {LOREM}</p></article><footer>Imprint</footer></body>')


def table(**columns) -> bytes:
    """A Parquet file."""
    f = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), f)
    return f.getvalue()


def put(folder, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


class Document(NamedTuple):
    where: str
    data: str
    continued: bool


def docs(path, encoding='', errors='strict', column='text') -> list[Document]:
    return [Document(document.where, document.data, document.continued)
            for record in read(path, encoding, errors, column)
            for document in parse(record, column, errors)]


def text_of(path, *options) -> str:
    return ''.join(document.data for document in docs(path, *options))


def refused(path, *options) -> str:
    """The message about bad input, which is one line that can be printed and names the file."""
    with pytest.raises(Bad) as e:
        docs(path, *options)
    message = str(e.value)
    assert message.startswith(str(path)) and message.encode()
    assert len(message.splitlines()) == 1
    return message


# ---------------------------------------------------------------------------------------------
# Formats

FORMATS = {     # file -> its bytes, and (what follows the file in `where`, text) of each document
    'a.txt': ('Ä\r\nb\n', [('', 'Ä\nb\n')]),
    'a.md': ('# Ä\n', [('', '# Ä\n')]),
    'a.py': ('x = 1\n', [('', 'x = 1\n')]),
    'noted': ('Ä', [('', 'Ä')]),
    'empty.txt': ('', []),
    'empty.jsonl': ('', []),
    'a.jsonl': ('{"text": "Ä\\n"}\r\n \n{"id": 1, "text": "b"}', [(':1', 'Ä\n'), (':3', 'b')]),
    'bom.jsonl': ('\ufeff{"text": "Ä"}\n', [(':1', 'Ä')]),
    'a.csv': ('id,text\n1,"a, ""b""\nÄ"\n\n2,c', [(':3', 'a, "b"\nÄ'), (':5', 'c')]),
    'empty.csv': ('', []),
    'cr.csv': ('id,text\r1,a\r2,b\r', [(':2', 'a'), (':3', 'b')]),
    'bom.csv': ('\ufefftext,id\nÄ,1\n', [(':2', 'Ä')]),
    'a.TSV': ('text\tid\na, "Ä"\t1\n', [(':2', 'a, "Ä"')]),
    'a.parquet': (table(id=[1, 2], text=['Ä\n', 'b']), [(':1', 'Ä\n'), (':2', 'b')]),
    'none.parquet': (table(text=pyarrow.array([], pyarrow.string())), []),
}


@pytest.mark.parametrize('packed', ['', '.gz', '.GZ'])
@pytest.mark.parametrize('name', FORMATS)
def test_formats(tmp_path, name, packed):
    data, expected = FORMATS[name]
    data = data.encode() if isinstance(data, str) else data
    path = put(tmp_path, name + packed, gzip.compress(data) if packed else data)
    assert docs(path) == [(f'{path}{place}', text, False) for place, text in expected]


@pytest.mark.parametrize('name', ['a.html', 'a.HTM', 'a.html.gz'])
def test_web_pages(tmp_path, name):
    data = PAGE.encode('iso-8859-1')
    path = put(tmp_path, name, gzip.compress(data) if name.endswith('gz') else data)
    (where, text, continued), = docs(path)
    assert (where, continued) == (str(path), False) and text.endswith('\n')
    assert text.count(LOREM.strip()) == 4 and 'Zweiter & letzter' in text
    assert 'Contact' not in text and 'Imprint' not in text and '<' not in text


@pytest.mark.parametrize('data', ['', '\0', 'plain', '<p>', '<div>' * 50_000 + 'x'])
def test_web_pages_with_nothing_in_them(tmp_path, data):
    assert len(docs(put(tmp_path, 'a.html', data))) == 1


@pytest.mark.parametrize('name', ['a.jsonl', 'a.csv', 'a.parquet'])
def test_another_column(tmp_path, name):
    data = {'a.jsonl': '{"text": "a", "body": "b"}', 'a.csv': 'text,body\na,b\n',
            'a.parquet': table(text=['a'], body=['b'])}[name]
    path = put(tmp_path, name, data)
    assert (text_of(path), text_of(path, '', 'strict', 'body')) == ('a', 'b')


@pytest.mark.parametrize('name,expected', [
    ('a.txt', '.txt'), ('a.TXT.GZ', '.txt'), ('a.b.csv.gz', '.csv'), ('a', ''), ('a.gz', ''),
    ('a.tar.gz', '.tar'), ('x.y/a', '')])
def test_suffix(name, expected):
    assert suffix(name) == suffix(Path(name)) == expected


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.csv', 'a.txt.gz', 'a.parquet'])
def test_progress_ends_at_the_size_of_the_file(tmp_path, name):
    text = 'abc ' * 5000
    data = {'.txt': f'{text}\n{SEPARATOR}\n' * 100, '.csv': 'text\n' + f'{text}\n' * 100,
            '.jsonl': f'{{"text": "{text}"}}\n' * 100,
            '.parquet': table(text=[text] * 100)}[suffix(name)]
    path = put(tmp_path, name, gzip.compress(data.encode()) if name.endswith('gz') else data)
    ends = [record.end for record in read(path, '', 'strict', 'text')]
    assert len(ends) == 100 and ends == sorted(ends) and ends[-1] == path.stat().st_size


# ---------------------------------------------------------------------------------------------
# Encodings

TEXTS = {
    'fr': 'L’été dernier, nous avons visité un très vieux château près de la forêt, où l’on élève '
          'des chevaux. Le maître nous a montré ses écuries, et le garçon riait.\n',
    'de': LOREM + '\n',
    'ru': 'Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива '
          'по-своему. Всё смешалось в доме Облонских.\n',
    'ja': '吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗い'
          'じめじめした所でニャーニャー泣いていた事だけは記憶している。\n',
    'zh': '学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？道可道。\n',
    'tw': '學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？臺灣的天氣很好，我們去看電影。\n',
    'ko': '모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.\n',
}


@pytest.mark.parametrize('size', [1, 40, 3000])
@pytest.mark.parametrize('language,encoding', [
    ('fr', 'cp1252'), ('de', 'cp1252'), ('ru', 'cp1251'), ('ru', 'koi8_r'), ('ja', 'cp932'),
    ('ja', 'euc_jp'), ('zh', 'gb18030'), ('tw', 'big5'), ('ko', 'cp949')])
def test_encodings_that_are_guessed(tmp_path, language, encoding, size):
    for pad in ('', 'x'):   # so that characters lie on even and on odd bytes
        text = pad + TEXTS[language] * size
        path = put(tmp_path, 'a.txt', text.encode(encoding))
        assert text_of(path) == text
        assert {record.encoding for record in read(path, '', 'strict', '')} == {encoding}


def test_encoding_that_shows_late(tmp_path):
    text = 'plain\n' * BLOCK + TEXTS['fr']
    assert text_of(put(tmp_path, 'a.txt', text.encode('cp1252'))) == text


def test_replaced_characters_are_no_damage(tmp_path):
    assert text_of(put(tmp_path, 'a.txt', 'a \ufffd\ufffd b')) == 'a \ufffd\ufffd b'


@pytest.mark.parametrize('mark,encoding', [
    (b'', 'utf-8'), (codecs.BOM_UTF8, 'utf-8'), (codecs.BOM_UTF16_LE, 'utf-16-le'),
    (codecs.BOM_UTF16_BE, 'utf-16-be'), (codecs.BOM_UTF32_LE, 'utf-32-le'),
    (codecs.BOM_UTF32_BE, 'utf-32-be')])
def test_unicode_with_its_mark(tmp_path, mark, encoding):
    text = ''.join(TEXTS.values()) + '😀\n'
    path = put(tmp_path, 'a.txt', mark + (text * 1000).encode(encoding))
    assert text_of(path) == text * 1000
    rows = 'text,id\n' + ''.join(f'"{line}",1\n' for line in text.split('\n'))
    for name, data in (('a.csv', mark + rows.encode(encoding)),
                       ('a.csv.gz', gzip.compress(mark + rows.encode(encoding)))):
        assert [row.data for row in docs(put(tmp_path, name, data))] == text.split('\n')


@pytest.mark.parametrize('language,stated,used', [
    ('de', 'ISO-8859-1', 'iso8859-1'), ('ru', 'ISO-8859-5', 'iso8859-5'), ('fr', 'gibberish', 0),
    ('fr', 'hex', 0)])
def test_encoding_that_project_gutenberg_states(tmp_path, language, stated, used):
    text = TEXTS[language].replace('’', "'")
    header = f'The Project Gutenberg EBook\r\n\r\nCharacter set encoding: {stated}\r\n\r\n'
    path = put(tmp_path, 'a.txt', header.encode() + text.encode(used or 'cp1252'))
    assert text_of(path).endswith('\n\n' + text)
    assert [record.encoding for record in read(path, '', 'strict', '')] == [used or 'cp1252']


def test_stated_utf_8_is_not_believed_of_utf_8_alone(tmp_path):
    """A header may state what is not so: valid UTF-8 is UTF-8."""
    text = 'Character set encoding: ASCII\n\n' + LOREM
    assert text_of(put(tmp_path, 'a.txt', text)) == text


@pytest.mark.parametrize('name', ['a.txt', 'a.csv'])
@pytest.mark.parametrize('encoding', ['utf-16-le', 'cp866', 'latin-1', 'utf-8', 'shift_jis'])
def test_encoding_that_is_given(tmp_path, name, encoding):
    text = {'cp866': TEXTS['ru'], 'shift_jis': TEXTS['ja']}.get(encoding, LOREM).strip()
    path = put(tmp_path, name, ('text\n"' * ('csv' in name) + text + '"' * ('csv' in name)
                                ).encode(encoding))
    assert text_of(path, encoding) == text
    path = put(tmp_path, 'b.txt', 'Ä'.encode())
    assert text_of(path, 'latin-1') == 'Ã\x84'      # although it is valid UTF-8


@pytest.mark.parametrize('name', ['a.txt', 'a.csv'])
@pytest.mark.parametrize('encoding', ['nonsense', 'hex'])
def test_encoding_that_is_none(tmp_path, name, encoding):
    assert encoding in refused(put(tmp_path, name, 'text\nabc\n'), encoding)


def test_an_encoding_that_cannot_be_told(tmp_path):
    path = put(tmp_path, 'a.txt', bytes(range(128, 256)) * 20)
    assert 'state its --encoding' in refused(path)


@pytest.mark.parametrize('mark', [b'', codecs.BOM_UTF8], ids=['', 'bom'])
@pytest.mark.parametrize('at', [7, 1001, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77])
def test_damaged_utf_8(tmp_path, at, mark):
    before = (('a' if (at - len(mark)) % 2 else '') + 'é' * BLOCK * 2).encode()[:at - len(mark)]
    path = put(tmp_path, 'a.txt', mark + before + b'\xff' + 'éé'.encode())
    message = refused(path)
    assert f'at byte offset {at} (0xff)' in message and '--errors=replace' in message
    assert text_of(path, '', 'replace') == before.decode() + '\ufffdéé'
    packed = put(tmp_path, 'a.txt.gz', gzip.compress(path.read_bytes(), 1))
    assert f'at byte offset {at} (0xff)' in refused(packed)


@pytest.mark.parametrize('data,at', [
    ('é' * 9 + 'a', 19), ('é' * 9 + 'a' + ' ' * (BLOCK - 20), BLOCK - 1)])
def test_damaged_utf_8_character_that_is_not_whole(tmp_path, data, at):
    """At the end of the file, and with its first byte at the end of a block."""
    for after in (b'', b'xyz'):
        path = put(tmp_path, 'a.txt', data.encode() + b'\xc3' + after)
        assert f'at byte offset {at} (0xc3)' in refused(path)
        assert text_of(path, '', 'replace') == f'{data}\ufffd{after.decode()}'


@pytest.mark.parametrize('encoding,bad', [('utf-16', b'\x00\xd8a\x00'), ('cp932', b'\x81\x20'),
                                          ('ascii', b'\xe9')])
def test_damage_in_other_encodings(tmp_path, encoding, bad):
    before = ('abc ' * 300_000).encode(encoding)
    path = put(tmp_path, 'a.txt', before + bad)
    assert f'at byte offset {len(before)} ' in refused(path, encoding)


def test_damaged_table(tmp_path):
    path = put(tmp_path, 'a.csv', b'text\n' + b'abc\n' * 5000 + b'caf\xe9\n')
    assert docs(path)[-1] == (f'{path}:5002', 'café', False)    # a guess
    assert 'a.csv:' in refused(path, 'utf-8') and '--errors=replace' in refused(path, 'utf-8')
    assert docs(path, 'utf-8', 'replace')[-1] == (f'{path}:5002', 'caf\ufffd', False)


def test_damaged_json_line_is_replaced_as_well(tmp_path):
    path = put(tmp_path, 'a.jsonl', b'{"text": "caf\xe9"}\n')
    assert refused(path, 'utf-8').startswith(f'{path}:1: invalid UTF-8 (byte 0xe9); ')
    assert text_of(path, 'utf-8', 'replace') == 'caf\ufffd'
    assert text_of(path) == 'café'      # a guess


def test_lone_surrogate_in_json(tmp_path):
    path = put(tmp_path, 'a.jsonl', '{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert 'a lone surrogate' in refused(path)
    assert text_of(path, '', 'replace') == 'a\ufffdb 😀'


# ---------------------------------------------------------------------------------------------
# Text files: line ends, NUL, separators, any length


@pytest.mark.parametrize('pad', [0, 5, BLOCK - 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
@pytest.mark.parametrize('end', ['\r\n', '\r', '\n', '\r\r\n', '\r\n\r\n'])
def test_line_ends(tmp_path, pad, end):
    path = put(tmp_path, 'a.txt', f'{"x" * pad}{end}b{end}')
    assert text_of(path) == f'{"x" * pad}\nb\n'.replace('\n', '\n' * (1 + (len(end) > 2)))


def test_carriage_return_at_the_end(tmp_path):
    assert text_of(put(tmp_path, 'a.txt', 'a\r')) == 'a\n'


def test_nul_at_the_beginning_is_binary(tmp_path):
    for at in (0, 7999):
        path = put(tmp_path, 'a.txt', 'x' * at + '\0' + 'y' * 9000)
        assert f'binary file (NUL byte at offset {at})' in refused(path)
    text = 'x' * 8000 + '\0y'
    assert text_of(put(tmp_path, 'a.txt', text)) == text
    assert text_of(put(tmp_path, 'a.txt', 'a\0'), 'utf-8') == 'a\0'     # as was stated


@pytest.mark.parametrize('unit', ['Größe 猫 😀 ', '猫😀é', 'x', 'Zeile 猫\n'])
def test_a_line_of_30_mb(tmp_path, unit):
    text = unit * (30_000_000 // len(unit.encode()))
    path = put(tmp_path, 'a.txt', f'{text}\n{SEPARATOR}\nshort')
    *parts, last = docs(path)
    assert ''.join(part.data for part in parts) == f'{text}\n' and len(parts) > 1
    assert [part.continued for part in parts] == [False] + [True] * (len(parts) - 1)
    assert {part.where for part in parts} == {str(path)}
    assert last == (str(path), 'short', False)
    if unit[-1] in ' \n':   # is cut between words
        assert {part.data[0] for part in parts[1:]} <= {' ', '\n'}


def test_no_part_is_longer_than_stated(tmp_path):
    text = 'x' * (LONGEST + 1000) + '\n'
    path = put(tmp_path, 'a.txt', f'{text}{SEPARATOR}\nshort')
    assert text_of(path) == f'{text}short'
    assert max(len(part.data) for part in docs(path)) <= LONGEST


@pytest.mark.parametrize('pad', range(4))
def test_characters_across_blocks(tmp_path, pad):
    text = 'x' * pad + '😀' * 600_000
    assert text_of(put(tmp_path, 'a.txt', text)) == text


def separated(path) -> list[str]:
    assert not any(document.continued for document in docs(path))
    return [document.data for document in docs(path) if document.data]


@pytest.mark.parametrize('text,expected', [
    ('a\n<|endoftext|>\nb', ['a\n', 'b']), ('a\r\n<|endoftext|>\r\nb', ['a\n', 'b']),
    ('a\n<|endoftext|>', ['a\n']), ('<|endoftext|>\na', ['a']),
    ('a\n<|endoftext|>\n<|endoftext|>\n\nb', ['a\n', '\nb']),
    ('a<|endoftext|>\nb', ['a<|endoftext|>\nb']), ('<|endoftext|> a', ['<|endoftext|> a'])])
def test_separators(tmp_path, text, expected):
    assert separated(put(tmp_path, 'a.txt', text)) == expected


@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('before', range(len(SEPARATOR) + 4))
def test_separators_across_blocks(tmp_path, before, end):
    """`before` characters of the separator's line lie in the first block."""
    text = 'x' * (BLOCK - before - len(end))
    path = put(tmp_path, 'a.txt', f'{text}{end}{SEPARATOR}{end}next\n')
    assert separated(path) == [f'{text}\n', 'next\n']
    path = put(tmp_path, 'a.txt', f'{text}{end}{SEPARATOR} is a word\n')
    assert separated(path) == [f'{text}\n{SEPARATOR} is a word\n']


def test_no_separator_within_a_line_where_it_is_cut(tmp_path):
    text = 'x' * LONGEST + f'{SEPARATOR}\n' + 'y' * BLOCK
    assert text_of(put(tmp_path, 'a.txt', text)) == text


# ---------------------------------------------------------------------------------------------
# Bad input

BAD = [     # file, its bytes, what follows the file in the message, what else is in it
    ('a.jsonl', '{"text": "a"}\n{"text": \n', ':2: ', 'invalid JSON'),
    ('a.jsonl', '{"text": "a"}\n\n{"body": "a"}', ':3: ', "no text in a field 'text': it has body"),
    ('a.jsonl', '["text"]', ':1: ', "no text in a field 'text': it is no object"),
    ('a.jsonl', 'null', ':1: ', 'it is no object'),
    ('a.jsonl', '{"text": 5}', ':1: ', "no text in a field 'text'"),
    ('a.jsonl', '{"text": null}', ':1: ', "no text in a field 'text'"),
    ('a.jsonl', '[' * 100_000, ':1: ', 'invalid JSON'),
    ('a.jsonl', '{"text":' * 10_000, ':1: ', 'invalid JSON'),
    ('a.jsonl', '{"text": "a", "n": 1' + '0' * 5000 + '}', ':1: ', 'invalid JSON'),
    ('a.jsonl', '{"text": "é"}\n'.encode() * 2 + b'{"text": "caf\xe9"}', ':3: ',
     'invalid UTF-8 (byte 0xe9)'),
    ('a.jsonl', '{"a\\nb": 1}', ':1: ', "no text in a field 'text': it has a"),
    ('a.jsonl', '{"\\ud800": 1}', ':1: ', "no text in a field 'text': it has"),
    ('a.jsonl.gz', gzip.compress(b'{"text": "a"}\n{', mtime=0), ':2: ', 'invalid JSON'),
    ('a.csv', 'id,body\n1,a\n', ':1: ', 'no column text among id, body'),
    ('a.csv', '"a\nb",c\n1,2\n', ':', 'no column text among a'),
    ('a.csv', 'text\na\0b\n', ': ', 'NUL byte at offset 6'),
    ('a.csv', 'id,text\n1,"a\nb"\n2\n', ':4: ', '1 columns, not 2 (id, text)'),
    ('a.csv', 'id,text\n1,a, b\n', ':2: ', '3 columns, not 2 (id, text)'),
    ('a.csv', 'text\na\n' + 'x' * 200_000 + '\n', ':3: ', 'field larger than field limit'),
    ('a.tsv', 'id,text\n1,a\n', ':1: ', 'no column text among id,text'),
    ('a.txt.gz', 'no gzip', ': ', 'damaged or truncated gzip file'),
    ('a.csv.gz', 'no gzip', ': ', 'damaged or truncated gzip file'),
    ('a.parquet', '', ': ', 'damaged or truncated Parquet file'),
    ('a.parquet', 'no Parquet file', ': ', 'damaged or truncated Parquet file'),
    ('a.parquet', table(id=[1], body=['a']), ': ', "no column 'text' among id, body"),
    ('a.parquet', table(**{'a\nb': ['a']}), ': ', "no column 'text' among a"),
    ('a.parquet', table(text=[1, 2]), ': row 1: ', "'text' is no text"),
    ('a.parquet', table(text=['a', None]), ': row 2: ', "'text' is no text"),
    ('a.parquet', table(text=[b'a']), ': row 1: ', "'text' is no text"),
    ('a.parquet', table(text=[{'text': 'a'}]), ': row 1: ', "'text' is no text"),
]


@pytest.fixture
def short_lines(monkeypatch):
    monkeypatch.setattr(tables, 'LONGEST_LINE', 1 << 17)


@pytest.mark.parametrize('name,data,place,part', BAD, ids=[case[3] for case in BAD])
def test_bad_input(tmp_path, short_lines, name, data, place, part):
    path = put(tmp_path, name, data)
    message = refused(path)
    assert message.startswith(f'{path}{place}') and part in message


@pytest.mark.parametrize('name,data', [case[:2] for case in BAD], ids=[case[3] for case in BAD])
def test_bad_input_has_a_remedy(tmp_path, short_lines, name, data):
    """In the house's form: what is wrong; what to do."""
    with pytest.raises(Bad, match=r'; \w+'):
        docs(put(tmp_path, name, data))


@pytest.mark.parametrize('name,data', [('a.jsonl', '{"text": "a"}\n{'),
                                       ('a.csv', 'id,text\n1,a\n2\n')])
def test_documents_before_bad_input_are_given(tmp_path, name, data):
    path = put(tmp_path, name, data)
    records = (document for record in read(path, '', 'strict', 'text')
               for document in parse(record, 'text'))
    assert next(records).data == 'a'
    with pytest.raises(Bad):
        next(records)


def test_long_lines_of_json(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, 'LONGEST_LINE', BLOCK)
    line = lambda size: json.dumps({'text': 'x' * (size - 13)}) + '\n'
    path = put(tmp_path, 'a.jsonl', line(100) + line(BLOCK) + line(100))
    assert [len(document.data) for document in docs(path)] == [87, BLOCK - 13, 87]
    path = put(tmp_path, 'a.jsonl', line(100) + line(BLOCK + 1) + line(100))
    assert refused(path).startswith(f'{path}:2: a line of more than 1 MiB; cut the text')


def test_long_fields_of_tables(tmp_path):
    assert len(text_of(put(tmp_path, 'a.csv', 'text\n' + 'x' * BLOCK))) == BLOCK


ROWS = [f'Zeile {i}: {random.Random(i).random()}' for i in range(150)]
PACKED = {
    'a.txt.gz': gzip.compress(f'\n{SEPARATOR}\n'.join(ROWS).encode(), mtime=0),
    'a.jsonl.gz': gzip.compress('\n'.join(json.dumps({'text': row}) for row in ROWS).encode(),
                                mtime=0),
    'a.csv.gz': gzip.compress('\n'.join(['text', *ROWS]).encode(), mtime=0)}


@pytest.mark.parametrize('name', PACKED)
def test_truncated_gzip(tmp_path, name):
    data = PACKED[name]
    for size in [*range(1, 40), *range(40, len(data) - 40, 41), *range(len(data) - 40, len(data))]:
        assert 'damaged or truncated gzip' in refused(put(tmp_path, name, data[:size])), size
    assert [row.data.strip() for row in docs(put(tmp_path, name, data))] == ROWS


@pytest.mark.parametrize('name', PACKED)
def test_damaged_gzip(tmp_path, name):
    """It is never read as something else."""
    rng, n_bad = random.Random(0), 0
    for _ in range(150):
        data = bytearray(PACKED[name])
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        path = put(tmp_path, name, bytes(data))
        try:
            assert [row.data.strip() for row in docs(path)] == ROWS
        except Bad:
            n_bad += 1
    assert n_bad > 100


PARQUET = table(id=list(range(150)), text=ROWS)


def test_truncated_parquet(tmp_path):
    for size in [*range(0, len(PARQUET), 23), len(PARQUET) - 1]:
        message = refused(put(tmp_path, 'a.parquet', PARQUET[:size]))
        assert 'damaged or truncated Parquet file' in message


@pytest.mark.parametrize('value', [0, 1, 128, 255])
def test_damaged_end_of_parquet(tmp_path, value):
    """Where it says what the rest is; no byte there may lead to anything but Bad or rows."""
    data = table(text=ROWS[:3])
    for at in range(len(data) - int.from_bytes(data[-8:-4], 'little') - 8, len(data)):
        path = put(tmp_path, 'a.parquet', data[:at] + bytes([value]) + data[at + 1:])
        try:
            assert all(isinstance(row.data, str) for row in docs(path))
        except Bad as e:
            assert str(e).startswith(str(path)) and len(str(e).splitlines()) == 1


def test_damaged_parquet(tmp_path):
    rng, n_bad = random.Random(0), 0
    for _ in range(300):
        data = bytearray(PARQUET)
        for _ in range(rng.choice([1, 1, 3, 30])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path = put(tmp_path, 'a.parquet', bytes(data))
        try:
            assert all(isinstance(row.data, str) for row in docs(path))
        except Bad as e:
            assert str(e).startswith(str(path)) and len(str(e).splitlines()) == 1
            n_bad += 1
    assert n_bad > 100


def test_text_in_parquet_that_is_no_utf_8(tmp_path):
    data = table(text=['aaaa', 'bbbb']).replace(b'bbbb', b'bb\xff\xff')
    message = refused(put(tmp_path, 'a.parquet', data))
    assert 'row 2' in message or ':2' in message
    assert '--encoding' not in message      # which means nothing for Parquet


def test_file_that_must_not_be_read(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, 'Permission denied')

    path = put(tmp_path, 'a.txt', 'a')
    monkeypatch.setattr(documents, 'open', denied, raising=False)
    assert refused(path).startswith(f'{path}: cannot be read (Permission denied)')


def test_file_that_cannot_be_read_has_a_remedy(tmp_path):
    with pytest.raises(Bad, match=r'; \w+'):
        docs(tmp_path / 'none.txt')


@pytest.mark.parametrize('name', ['none.txt', 'none.jsonl', 'none.csv.gz', 'none.parquet',
                                  'folder'])
def test_file_that_is_not_there(tmp_path, name):
    (tmp_path / 'folder').mkdir()
    assert refused(tmp_path / name).startswith(f'{tmp_path / name}: cannot be read (')


@pytest.mark.parametrize('name,library', [('a.parquet', 'pyarrow'), ('a.html', 'trafilatura')])
def test_libraries_that_are_not_installed(tmp_path, monkeypatch, name, library):
    path = put(tmp_path, name, 'x')
    monkeypatch.setitem(sys.modules, library, None)
    assert f'pip install {library}' in refused(path)


# ---------------------------------------------------------------------------------------------
# Files of a folder


@pytest.fixture
def tree(tmp_path):
    """A folder of many things; tmp_path/other is beside it."""
    for name in ('b.txt', 'a.md', 'Z.TXT', 'sub/d.jsonl.gz', 'sub/c.html', 'sub/deep/e.csv',
                 '.hidden.txt', '.git/f.txt', 'sub/.g.txt', 'h.png', 'i.png', 'sub/j', 'k.tar.gz'):
        path = tmp_path / 'tree' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('x')
    return tmp_path / 'tree'


FOUND = ['Z.TXT', 'a.md', 'b.txt', 'sub/c.html', 'sub/d.jsonl.gz', 'sub/deep/e.csv']


def below(tree, place, bad=None) -> list[str]:
    """The files of a place below the tree; nothing may be said about them unless `bad` is given."""
    told = []
    files, _ = find_files(str(place), told.append)
    if bad is None:
        assert told == []
    else:
        bad += told
    return [os.path.relpath(path, tree) for path in files]


def test_a_folder(tree):
    assert below(tree, tree) == FOUND
    _, left_out = find_files(str(tree), print)
    assert left_out == {'.png': 2, 'no suffix': 1, '.tar': 1}


@pytest.mark.parametrize('place,expected', [
    ('b.txt', ['b.txt']), ('h.png', ['h.png']), ('*.txt', ['b.txt']), ('?.*', [
        'Z.TXT', 'a.md', 'b.txt', 'h.png', 'i.png', 'k.tar.gz']), ('sub*', FOUND[3:]),
    ('**/*.csv', ['sub/deep/e.csv']), ('nothing', []), ('*.nothing', []), ('**', FOUND)])
def test_places(tree, place, expected):
    files = below(tree, tree / place)
    if place == '**':   # takes files of every suffix
        files = [path for path in files if path in FOUND]
    assert sorted(files) == expected and files == sorted(files)


def test_folders_of_a_glob_are_counted_too(tree):
    assert find_files(f'{tree}/su*', print)[1] == Counter({'no suffix': 1})


def test_links(tree):
    """Links to files and folders are followed, however often; only not back up."""
    other = tree.parent / 'other'
    other.mkdir()
    (other / 'x.txt').write_text('x')
    (tree / 'one').symlink_to(other)
    (tree / 'two').symlink_to(other)
    (tree / 'x.txt').symlink_to(other / 'x.txt')
    assert below(tree, tree) == [*FOUND[:3], 'one/x.txt', *FOUND[3:], 'two/x.txt', 'x.txt']


@pytest.mark.parametrize('target', ['.', '..', '../deep', '../../sub'])
def test_link_that_leads_back_up(tree, target):
    link, bad = tree / 'sub/deep/loop', []
    link.symlink_to(target, target_is_directory=True)
    assert below(tree, tree, bad) == FOUND
    assert len(bad) == 1 and bad[0].startswith(f'{link}: a link to a folder above it')
    assert bad[0].endswith('; remove it')


def test_links_to_nothing(tree):
    (tree / 'self.txt').symlink_to('self.txt')
    (tree / 'gone.txt').symlink_to('nowhere')
    (tree / 'self').symlink_to('self')
    assert below(tree, tree) == [*FOUND[:3], 'gone.txt', 'self.txt', *FOUND[3:]]
    assert find_files(str(tree), print)[1]['no suffix'] == 2
    for name in ('self.txt', 'gone.txt'):
        assert 'cannot be read' in refused(tree / name)


def test_folder_that_must_not_be_read(tree, monkeypatch):
    listdir, bad = os.listdir, []

    def denied(path):
        if Path(path).name == 'deep':
            raise PermissionError(13, 'Permission denied')
        return listdir(path)

    monkeypatch.setattr(os, 'listdir', denied)
    assert below(tree, tree, bad) == FOUND[:-1]
    assert bad == [f'{tree}/sub/deep: cannot be read (Permission denied); see to its permissions']


def test_folder_that_may_be_listed_only(tree, monkeypatch):
    """So that not even the kinds of the files in it are known."""
    stat, bad = os.stat, []

    def denied(path, *args, **kwargs):
        if isinstance(path, (str, Path)) and Path(path).parent.name == 'deep':
            raise PermissionError(13, 'Permission denied')
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, 'stat', denied)
    files = below(tree, tree, bad)
    assert files[:5] == FOUND[:-1] and (bad or files == FOUND)
