"""JSON lines, JSON arrays, CSV and TSV -> rows, in any encoding: one reader for all stages.

core/read/documents.py makes documents for pretraining of the rows, core/data/records.py chats,
preferences and labelled texts. A bad row becomes a record that says what is wrong, and the rows
after it are still read; where these cannot be read, Bad is raised.
"""
import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import charset_normalizer  # comes with requests

JSON_LINES, TABLES = ('.jsonl', '.ndjson', '.jsonlines'), ('.csv', '.tsv')
LONGEST_LINE = 1 << 26      # characters of a JSON line, or of a line in a table
REMEDY = ('convert it to UTF-8, or (prepare.py) state its --encoding, or put U+FFFD there with '
          '--errors=replace')
# The encodings to choose from for text that is not UTF-8 and states none. Similar ones (Latin-2,
# say) cannot be told from these, and have to be stated.
GUESSED = ('cp1252', 'cp1251', 'koi8_r', 'cp1253', 'cp1255', 'cp1256', 'cp932', 'euc_jp', 'gb18030',
           'big5', 'cp949')
MARKS = ((codecs.BOM_UTF8, 'utf-8-sig'), (codecs.BOM_UTF32_LE, 'utf-32'),
         (codecs.BOM_UTF32_BE, 'utf-32'), (codecs.BOM_UTF16_LE, 'utf-16'),
         (codecs.BOM_UTF16_BE, 'utf-16'))


class Bad(Exception):
    """Input that cannot be used; the message is one line with place and remedy."""

    def __init__(self, message: str):   # which may quote anything from the input
        plain = message.encode('utf-8', 'backslashreplace').decode()
        super().__init__(' '.join(part for part in plain.splitlines() if part))


class Record(NamedTuple):
    """A piece of a file, unparsed."""
    where: str              # file, file:line or file:row
    data: Any               # bytes or str; the list or dict of a row
    kind: str = 'text'      # text, json, row, html, or bad: the data say what is wrong with it
    encoding: str = 'utf-8'
    continued: bool = False     # goes on with the document of the record before it
    end: int = 0            # bytes of the file up to here, for progress


def bad_record(where: str, what: str) -> Record:
    """A record that is no good, while those after it may be."""
    return Record(where, f'{where}: {what}', 'bad')


def suffix(path) -> str:
    """What decides how a file is read: its last suffix in lower case, .gz aside."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() == '.gz' else path).suffix.lower()


def is_encoding(name: str) -> bool:
    """Whether Python knows an encoding of text by that name; hex and the like are none."""
    try:
        return codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        return False


def detect(path, head: bytes) -> str:
    """The encoding of a text that begins with `head`: its byte order mark's, UTF-8 if it is that
    (or mostly that, and damaged), what a Project Gutenberg header states, or a guess."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    if (at := head.find(b'\0', 0, 8000)) >= 0:
        raise Bad(f'{path}: a binary file (NUL byte at offset {at}), or UTF-16 without a byte '
                  f'order mark; {REMEDY}')
    text = codecs.getincrementaldecoder('utf-8')('replace').decode(head)
    wrong = text.count('\ufffd') - head.count('\ufffd'.encode())
    if not wrong or wrong <= len(re.findall(r'[^\x00-\x7f\ufffd]', text)):
        return 'utf-8'
    stated = re.search(rb'^Character set encoding: *([\w-]+)', head[:5000], re.MULTILINE)
    if stated and is_encoding(stated[1].decode()):
        return codecs.lookup(stated[1].decode()).name
    odd = b''           # whole lines, since a part might begin or end within a character
    for line in head.splitlines():
        if not line.isascii() and len(odd) < 1 << 16:
            odd += line + b'\n'
    western = sum(byte > 127 for byte in odd) < 0.4 * len(odd)      # few letters with accents
    names = ['cp1252'] if western else [*GUESSED]
    found = charset_normalizer.from_bytes(odd, cp_isolation=names).best()
    if not found:
        raise Bad(f'{path}: neither UTF-8 nor any other encoding that could be told; {REMEDY}')
    return found.encoding


def open_text(path, f, encoding: str, errors: str) -> tuple[io.TextIOWrapper, str]:
    """A binary file as text with its line ends, and its encoding, which is detected if it is ''.
    With errors='strict' an invalid byte becomes a lone surrogate (PEP 383), so that only the row
    with it is lost: see `check`."""
    encoding = encoding or detect(path, f.read(1 << 24))
    f.seek(0)
    errors = 'surrogateescape' if errors == 'strict' else errors
    return io.TextIOWrapper(f, encoding, errors, newline=''), encoding


def check(record: Record, text: str) -> None:
    """Raise Bad if the text that open_text gave for a record has a byte that was invalid."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Bad(f'{record.where}: invalid {record.encoding.upper()} (byte 0x'
                  f'{ord(text[e.start]) & 0xff:02x}); {REMEDY}') from e


def lines_of(text) -> Iterator[str]:
    """The lines of a text with their ends, without its byte order mark. A line that is too long is
    replaced by LONGEST_LINE characters without an end."""
    mark = '\ufeff'
    while line := text.readline(LONGEST_LINE):
        more = line
        while len(more) == LONGEST_LINE and more[-1] not in '\r\n':
            more, line = text.readline(LONGEST_LINE), 'x' * LONGEST_LINE
        yield line.removeprefix(mark)
        mark = ''


def read_lines(path, f, encoding: str, errors: str, column) -> Iterator[Record]:
    """JSON lines, not parsed yet; one that is too long is a bad record."""
    text, encoding = open_text(path, f, encoding, errors)
    for number, line in enumerate(lines_of(text), 1):
        if len(line) >= LONGEST_LINE and line[-1] not in '\r\n':
            yield bad_record(f'{path}:{number}', f'a line of more than {LONGEST_LINE >> 20} MiB; '
                             'cut the text into several records, or give it as a .txt file')
        elif line.strip():
            yield Record(f'{path}:{number}', line, 'json', encoding)


def read_array(path, f, encoding: str, errors: str, column) -> Iterator[Record]:
    """The elements of a JSON array, which is in memory as a whole, and the lines where they begin.
    """
    stream, encoding = open_text(path, f, encoding, errors)
    text = stream.read().removeprefix('\ufeff')
    skip = lambda at: re.compile('[ \t\r\n]*').match(text, at).end()
    at, line, counted, mark = skip(0), 1, 0, '['
    while text[at:at + 1] == mark:
        at, mark = skip(at + 1), ','
        line, counted, begin = line + text.count('\n', counted, at), at, at
        if text[at:at + 1] == ']':
            break
        try:
            _, at = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise Bad(f'{path}:{line}: invalid JSON ({e}); correct it') from e
        yield Record(f'{path}:{line}', text[begin:at], 'json', encoding)
        at = skip(at)
    line += text.count('\n', counted, at)
    if mark == '[':
        lists = ', '.join(re.findall(r'"(\w+)"\s*:\s*\[', text[:10_000]))[:100]
        raise Bad(f'{path}:1: not an array [...]; a file with one record a line is named .jsonl'
                  + f', and of one object save the list that you mean alone: {lists}' * bool(lists))
    if text[at:at + 1] != ']':
        raise Bad(f'{path}:{line}: a comma or ] is missing between records; correct it')
    if skip(at + 1) < len(text):
        raise Bad(f'{path}:{line + text.count(chr(10), at, skip(at + 1))}: more after the array, '
                  'which would be lost; join the two')


def once(pairs: list[tuple]) -> dict:
    """An object of JSON, which has each name once. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, = Counter(name for name, _ in pairs).most_common(1)[0][:1]
        raise ValueError(f'the name {name!r:.40} is there twice')
    return found


def parse_json(record: Record):
    """What a record of JSON holds. Raises Bad."""
    check(record, record.data)
    try:
        return json.loads(record.data, object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise Bad(f'{record.where}: invalid JSON ({e}); correct it') from e


def read_table(path, f, encoding: str, errors: str, columns) -> Iterator[Record]:
    """The rows of a CSV or TSV file (TSV has no quotes) as {name in lower case: value}.

    The first line names the columns, in any order; only a table of a label and a text may lack it.
    `columns` must be there: a name, or for each column a tuple of its possible names.
    """
    columns = columns if isinstance(columns, tuple) else ((columns.strip().lower(),),)
    text, encoding = open_text(path, f, encoding, errors)
    rows = csv_rows(path, lines_of(text), encoding)
    if not (first := next(rows, None)):
        return
    if first.kind == 'bad':
        raise Bad(first.data)
    names = [name.strip().lower() for name in first.data]
    if ('label',) in columns and len(names) == 2 and not {'label', 'text'} & {*names}:
        rows = [first, *rows]
        labels = Counter(row.data[0] for row in rows if row.kind == 'row')
        if labels[first.data[0]] > 1 or len(rows) < 3:  # else the first line seems to name columns
            names = ['label', 'text']
    if lacking := [' or '.join(known) for known in columns if not {*known} & {*names}]:
        raise Bad(f'{path}:1: no column {" and no ".join(lacking)} among {", ".join(names)[:200]}; '
                  'name the columns in the first line (prepare.py also has --text_column)')
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise Bad(f'{path}:1: the column {twice[0]!r} is there twice; rename one')
    for row in rows:
        if row.kind == 'bad':
            yield row
        elif len(row.data) == len(names):
            yield row._replace(data=dict(zip(names, row.data)))
        else:
            yield bad_record(row.where, f'{len(row.data)} columns, not {len(names)} '
                             f'({", ".join(names)[:200]}); correct the row (in a .csv file a text '
                             'with commas stands in quotes)')


def csv_rows(path, lines: Iterator[str], encoding: str) -> Iterator[Record]:
    """The rows of a table as lists, the first line among them."""
    csv.field_size_limit(LONGEST_LINE - 1)
    rows = csv.reader(lines, delimiter='\t', quoting=csv.QUOTE_NONE) if suffix(path) == '.tsv' \
        else csv.reader(lines, strict=True)
    while True:
        where = f'{path}:{rows.line_num + 1}'
        try:
            data = next(rows)
            row = Record(f'{path}:{rows.line_num}', data, 'row', encoding)
            check(row, ''.join(data))
            if data:
                yield row
        except StopIteration:
            return
        except csv.Error as e:
            if 'end of data' in str(e):
                raise Bad(f'{where}: {e}: a quote without its end has swallowed all rows after it; '
                          'close it') from e
            yield bad_record(where, f'{e}; correct the row')
        except Bad as e:
            yield Record(f'{path}:{rows.line_num}', str(e), 'bad', encoding)
