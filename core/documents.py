"""Files of any format -> documents: text, web pages, JSON lines, tables, Parquet, each also as .gz.

Reading has two halves. `read` goes through files in order, in one process, and yields records:
bytes or text of a few megabytes at most, with the place they come from. `parse` makes documents of
a record; that is the slow half, which prepare.py gives to several processes.
Whatever cannot be read raises Bad with file, line or row, and a remedy.
"""
import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import charset_normalizer  # comes with requests

TEXT, TABLES = ('.txt', '.md', '.rst', '.py'), ('.csv', '.tsv')
SUFFIXES = (*TEXT, '.html', '.htm', '.jsonl', *TABLES, '.parquet')
LONGEST = 1 << 22       # characters of a document in memory; a longer one comes in parts
LONGEST_LINE = 1 << 26  # bytes of a JSON line, characters of a line in a table
LONGEST_PAGE = 1 << 24  # bytes of a web page, which takes many times as much to understand
END = '<|endoftext|>'   # a line of it ends a document
SEPARATOR = re.compile(r'^<\|endoftext\|>\n', re.MULTILINE)
# What text may be that is not UTF-8 and does not say what it is. Neighbours of these (Latin-2, say)
# cannot be told from them, and have to be stated.
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
    data: bytes | str
    end: int                # bytes of the file up to here, for progress
    kind: str = 'text'      # text, json, html, or bad: the data say what is wrong with it
    encoding: str = 'utf-8'
    continued: bool = False     # goes on with the document of the record before it


class Document(NamedTuple):
    """One text, or a part of one that is too long to be kept in memory."""
    where: str
    text: str
    continued: bool = False


def suffix(path) -> str:
    """What decides how a file is read: its last suffix in lower case, .gz aside."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() == '.gz' else path).suffix.lower()


def find_files(place: str, bad, without: str = '') -> tuple[list[Path], Counter]:
    """The files of a path, a folder with all below it but the folder `without`, or a glob, sorted;
    and how many were left out of folders by suffix. `bad` is called with a message for what is no
    file, and for a loop of links."""
    if os.path.isfile(place):
        return [Path(place)], Counter()
    roots = [place] if os.path.isdir(place) else sorted(glob.glob(place, recursive=True))
    files, left_out, folders = [], Counter(), set()
    for root in roots:
        if not folders.isdisjoint(Path(root).parents):
            continue    # ** matches a folder and what is in it
        if os.path.isdir(root):
            folders.add(Path(root))
            below = list(walk(Path(root), bad, os.path.realpath(without)))
            files += [path for path in below if suffix(path) in SUFFIXES]
            left_out.update(suffix(path) or 'no suffix' for path in below
                            if suffix(path) not in SUFFIXES)
        elif is_file(Path(root), bad):
            files.append(Path(root))
    return files, left_out


def is_file(path: Path, bad) -> bool:
    """Whether a path is a file, or a link that should be one; pipes and the like are told."""
    known = os.path.isfile(path) or os.path.islink(path)
    if not known:
        bad(f'{path}: not a regular file; write what it gives into one')
    return known


def walk(folder: Path, bad, without: str = '', above: tuple = ()) -> Iterator[Path]:
    """All files below a folder, but hidden ones and the folder `without`, in the order of their
    names; links are followed, unless they lead back up: that is told to `bad`."""
    try:
        here = folder.stat()
        entries = sorted(os.listdir(folder))
    except OSError as e:
        bad(f'{folder}: cannot be read ({e.strerror}); see to its permissions')
        return
    if (here.st_dev, here.st_ino) in above:
        bad(f'{folder}: a link to a folder above it, which would never end; remove it')
        return
    for name in entries:
        path = folder / name
        if name.startswith('.'):
            continue
        if os.path.isdir(path):
            if os.path.realpath(path) != without:
                yield from walk(path, bad, without, (*above, (here.st_dev, here.st_ino)))
        elif is_file(path, bad):
            yield path


# ---------------------------------------------------------------------------------------------
# Files to records


def read(path: Path, encoding: str, errors: str, column: str) -> Iterator[Record]:
    """The records of a file in their order. `encoding` '' is found out, `errors` is 'strict' or
    'replace', `column` is the text's in tables and JSON lines. Raises Bad."""
    kind, where = suffix(path), path
    if encoding and not is_encoding(encoding):
        raise Bad(f'{path}: encoding={encoding} is none that Python knows for text; correct it')
    reader = {'.html': read_html, '.htm': read_html, '.jsonl': read_jsonl, '.parquet': read_parquet,
              **dict.fromkeys(TABLES, read_table)}.get(kind, read_text)
    try:
        with open(path, 'rb') as raw:
            f = gzip.open(raw) if path.suffix.lower() == '.gz' else raw
            for record in reader(path, f, raw, encoding, errors, column):
                where = record.where
                yield record
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise Bad(f'{path}: a damaged or truncated gzip file, after {where} ({e}); get it '
                  'again') from e
    except UnicodeError as e:   # a decoder's, whose offset counts from its last block
        raise Bad(f'{path}: after {where}: {e}; state its --encoding, or --errors=replace') from e
    except OSError as e:
        raise Bad(f'{path}: cannot be read ({e.strerror}); see that it is there, with permission '
                  'to read it') from e


def is_encoding(name: str) -> bool:
    """Whether Python knows an encoding of text by that name; hex and the like are none."""
    try:
        return codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        return False


def read_text(path, f, raw, encoding, errors, column) -> Iterator[Record]:
    """A text file, decoded a block at a time; of any length, and with lines of any length."""
    head = f.read(1 << 24)
    encoding = encoding or detect(path, head)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), True)
    text, block, offset, continued = '', head[:1 << 20], 0, False
    head = memoryview(head)[1 << 20:]
    while True:
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            at = offset + e.start + len(block) - len(e.object)
            raise Bad(f'{path}: invalid {encoding.upper()} at byte offset {at} '
                      f'(0x{e.object[e.start]:02x}); convert it, state its --encoding, or put '
                      'U+FFFD there with --errors=replace') from e
        offset += len(block)
        if not block and text.endswith(END):
            text += '\n'
        *whole, text = SEPARATOR.split(text)
        for part in whole:
            yield from parts(part, True, str(path), raw.tell(), encoding, continued)
            continued = False
        rest = yield from parts(text, not block, str(path), raw.tell(), encoding, continued)
        text, continued = rest, continued or len(rest) < len(text)
        if not block:
            return
        block, head = bytes(head[:1 << 20]), head[1 << 20:]
        block = block or f.read(1 << 20)


def parts(text: str, whole: bool, where: str, end: int, encoding: str, continued: bool):
    """Records of a text, none longer than LONGEST; if it is not the whole document yet, returns the
    rest, which more will follow."""
    while len(text) > LONGEST or whole and text:
        cut = min(len(text), LONGEST)
        if cut < len(text):     # between two words if there are any
            cut = max(text.rfind('\n', cut // 2, cut), text.rfind(' ', cut // 2, cut), 0) or cut
            cut -= text.startswith('<', cut)    # which at the start of a part might begin END
        yield Record(where, text[:cut], end, 'text', encoding, continued)
        text, continued = text[cut:], True
    return text


def detect(path, head: bytes) -> str:
    """The encoding of a text that begins with `head`: its byte order mark's, UTF-8 if it is that
    (or mostly that, and damaged), what a Project Gutenberg header states, or a guess."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    if (at := head.find(b'\0', 0, 8000)) >= 0:
        raise Bad(f'{path}: a binary file (NUL byte at offset {at}); only text can be prepared, '
                  'and UTF-16 without a byte order mark needs its --encoding')
    text = codecs.getincrementaldecoder('utf-8')('replace').decode(head)
    wrong = text.count('\ufffd') - head.count('\ufffd'.encode())
    if not wrong or wrong <= len(re.findall(r'[^\x00-\x7f\ufffd]', text)):
        return 'utf-8'
    stated = re.search(rb'^Character set encoding: *([\w-]+)', head[:5000], re.MULTILINE)
    if stated and is_encoding(stated[1].decode()):
        return codecs.lookup(stated[1].decode()).name
    odd, n = [], 0      # lines, since a part of one might begin or end within a character
    for line in head.splitlines():
        if not line.isascii() and n < 1 << 16:
            odd.append(line)
            n += len(line)
    odd = b'\n'.join(odd)
    western = sum(byte > 127 for byte in odd) < 0.4 * len(odd)      # few letters with accents
    names = ('cp1252',) if western else GUESSED
    found = charset_normalizer.from_bytes(odd, cp_isolation=list(names)).best()
    if not found:
        raise Bad(f'{path}: neither UTF-8 nor any other encoding that could be told; state its '
                  '--encoding')
    return found.encoding


def read_html(path, f, raw, encoding, errors, column) -> Iterator[Record]:
    page = f.read(LONGEST_PAGE + 1)
    if len(page) > LONGEST_PAGE:
        raise Bad(f'{path}: a web page of more than {LONGEST_PAGE >> 20} MiB; give its text')
    # a page states its encoding itself
    yield Record(str(path), page.decode(encoding, errors) if encoding else page, raw.tell(), 'html')


def read_jsonl(path, f, raw, encoding, errors, column) -> Iterator[Record]:
    """JSON lines, not parsed yet; one that is too long is a bad record."""
    number = 0
    while line := f.readline(LONGEST_LINE):
        number += 1
        where, whole = f'{path}:{number}', line.endswith(b'\n')
        if len(line) == LONGEST_LINE and not whole:
            while not whole and (line := f.readline(LONGEST_LINE)):
                whole = line.endswith(b'\n')
            yield bad_record(where, f'a line of more than {LONGEST_LINE >> 20} MiB; cut the text '
                             'into several records, or give it as a .txt file', raw)
        elif line.strip():
            if encoding or errors == 'replace':
                line = line.decode(encoding or 'utf-8', errors)
            yield Record(where, line, raw.tell(), 'json', encoding or 'utf-8')


def read_table(path, f, raw, encoding, errors, column) -> Iterator[Record]:
    """The rows of a CSV or TSV file whose first line names the columns; bad rows are records."""
    encoding = encoding or detect(path, f.read(1 << 24))
    encoding = 'utf-8-sig' if codecs.lookup(encoding).name == 'utf-8' else encoding
    f.seek(0)
    csv.field_size_limit(LONGEST_LINE - 1)
    lines = lines_of(io.TextIOWrapper(f, encoding, errors, newline=''))
    if suffix(path) == '.tsv':      # which knows no quotes
        rows = csv.DictReader(lines, delimiter='\t', quoting=csv.QUOTE_NONE)
    else:
        rows = csv.DictReader(lines, strict=True)
    try:
        if column not in (rows.fieldnames or ()):
            raise Bad(f'{path}:1: no column {column!r} among {", ".join(rows.fieldnames or ())}; '
                      'name the one that has the text with --text_column')
    except csv.Error as e:
        raise Bad(f'{path}:1: {e}; mend the row') from e
    while True:
        try:
            found = next(rows)[column]
            where = f'{path}:{rows.line_num}'
            yield Record(where, found, raw.tell(), 'text', encoding) if found is not None else \
                bad_record(where, f'a row without the column {column!r}; mend it', raw)
        except csv.Error as e:
            yield bad_record(f'{path}:{rows.reader.line_num}', f'{e}; mend the row', raw)
        except StopIteration:
            return


def lines_of(text) -> Iterator[str]:
    """The lines of a table without NUL characters. Of one that is too long only so much comes that
    csv refuses it."""
    while line := text.readline(LONGEST_LINE):
        more = line
        while len(more) == LONGEST_LINE and more[-1] not in '\r\n':
            more, line = text.readline(LONGEST_LINE), 'x' * LONGEST_LINE
        yield line.replace('\0', '')


def bad_record(where: str, what: str, raw) -> Record:
    """A record that is no good, while those after it may be."""
    return Record(where, f'{where}: {what}', raw.tell(), 'bad')


def read_parquet(path, f, raw, encoding, errors, column) -> Iterator[Record]:
    """The rows of a Parquet file, a few hundred in memory at a time; bad rows are records."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Bad(f'{path}: Parquet needs pyarrow: pip install pyarrow') from None
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(f)
        names = table.schema_arrow.names
        if column not in names:
            raise Bad(f'{path}: no column {column!r} among {", ".join(names)}; name the one that '
                      'has the text with --text_column')
        size, n_rows = os.path.getsize(path), table.metadata.num_rows
        for batch in table.iter_batches(256, columns=[column]):
            for value in batch.column(0):
                row += 1
                text = value.as_py()
                if isinstance(text, str):
                    yield Record(f'{path}:{row}', text, size * row // max(row, n_rows))
                else:
                    yield bad_record(f'{path}: row {row}', f'{column!r} is no text; name the '
                                     'column that has it with --text_column', raw)
    except (pyarrow.ArrowException, OSError, UnicodeError) as e:
        raise Bad(f'{path}: a damaged or truncated Parquet file, after row {row} '
                  f'({" ".join(str(e).split())[:200]}); get it again') from e


# ---------------------------------------------------------------------------------------------
# Records to documents


def parse(record: Record, column: str) -> Iterator[Document]:
    """The document of a record, or its parts if it is too long. Raises Bad."""
    where, text = record.where, record.data
    if record.kind == 'bad':
        raise Bad(text)
    if record.kind == 'json':
        text = parse_json(where, text, column)
    elif record.kind == 'html':
        text = html_to_text(where, text)
    if len(text) <= LONGEST:
        yield Document(where, text, record.continued)
    else:
        for part in parts(text, True, where, 0, '', record.continued):
            yield Document(where, part.data, part.continued)


def parse_json(where: str, line: bytes | str, column: str) -> str:
    """The text in a JSON object's field `column`. Raises Bad."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise Bad(f'{where}: not JSON ({e}); mend the line') from e
    if not isinstance(found, dict) or not isinstance(found.get(column), str):
        names = f'it has {", ".join(found)}' if isinstance(found, dict) else 'it is no object'
        raise Bad(f'{where}: no text in a field {column!r}: {names[:200]}; name the one that has '
                  'it with --text_column')
    return found[column].encode('utf-8', 'replace').decode()    # a lone surrogate is no text


def html_to_text(where: str, page: bytes | str) -> str:
    """What a reader of a web page reads: trafilatura leaves menus and footers out."""
    try:
        import trafilatura
    except ImportError:
        raise Bad(f'{where}: web pages need trafilatura: pip install trafilatura '
                  'lxml_html_clean') from None
    text = trafilatura.extract(page, include_comments=False, favor_recall=True)
    return text + '\n' if text else ''
