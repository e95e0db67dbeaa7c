"""Files of any format -> documents: text, web pages, notebooks, JSON, tables, Parquet, also as .gz.

`read` goes through a file in one process and yields records: bytes or text of a few megabytes at
most, with their place. `parse` makes documents of a record, which is slower: several processes do
it. Whatever cannot be read raises Bad with file, line or row, and a remedy.
"""
import codecs
import functools
import glob
import gzip
import io
import itertools
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from core.read import tables
from core.read.tables import JSON_LINES, REMEDY, TABLES, Bad, Record, detect, is_encoding, suffix

TEXT = ('.txt', '.md', '.rst', '.py')
# What is read in folders. A .json file must be named, because most are settings.
SUFFIXES = (*TEXT, '.html', '.htm', '.ipynb', *JSON_LINES, *TABLES, '.parquet')
# What is refused though some of it looks like text: by its suffix, and by its first bytes.
REFUSED = ('.rtf', '.pdf', '.ps', '.doc', '.docx', '.odt', '.epub', '.pptx', '.xls', '.xlsx',
           '.zip', '.tar', '.7z', '.bz2', '.xz', '.zst', '.png', '.jpg', '.jpeg', '.gif', '.webp',
           '.mp3', '.mp4')
SIGNATURES = {b'{\\rtf': 'RTF', b'%PDF-': 'PDF', b'%!PS': 'PostScript', b'\x1f\x8b': 'gzip',
              b'PK\3\4': 'a ZIP archive, as are .docx, .xlsx, .odt and .epub'}
MADE = (('a dataset', 'meta.json', 'train-00000.bin'), ('a run', 'log.jsonl', 'model.py'),
        ('a run', 'manifest.json', 'state.json'), ('a model', 'config.json', 'model.safetensors'),
        ('a model', 'config.json', 'model.safetensors.index.json'))
LONGEST = 1 << 22       # characters of a document in memory; a longer one comes in parts
LONGEST_PAGE = 1 << 24  # bytes of a web page, whose parser takes many times as much memory
BLOCK = 1 << 20         # bytes of a text decoded at a time
END = '<|endoftext|>'   # a line of it ends a document
SEPARATOR = re.compile(r'^<\|endoftext\|>\n', re.MULTILINE)


def made_here(folder) -> str:
    """What this program has made in a folder: 'a dataset', 'a run' or 'a model'; '' if nothing."""
    return next((what for what, *files in MADE if all(
        os.path.isfile(os.path.join(folder, file)) for file in files)), '')


def find_files(place: str, bad, without=(), made=None) -> tuple[list[Path], Counter]:
    """The files of a path, of a folder with all below it, or of a glob, sorted; and how many were
    left out of folders, by suffix. Folders that are in `without` or made_here are left out, and
    noted in `made`. `bad` is called with a message for what is no file, and for loops of links."""
    made, without = {} if made is None else made, {os.path.realpath(path) for path in without}

    @functools.cache
    def is_ours(folder: Path) -> bool:
        what = 'of this program' if os.path.realpath(folder) in without else made_here(folder)
        made.update({str(folder): what} if what else {})
        return bool(what)

    if os.path.isfile(place):
        return [Path(place)], Counter()
    roots, fixed = sorted(glob.glob(place, recursive=True)), re.sub(r'[^/]*[*?[].*', '', place)
    if os.path.isdir(place):
        roots, fixed = [place], place
        if what := made_here(place):
            made[place], roots = what, []
    files, left_out, folders = [], Counter(), set()
    for root in map(Path, roots):
        above = [*list(root.parents)[::-1], root]
        if not folders.isdisjoint(above) or any(
                is_ours(folder) for folder in above if Path(fixed) in folder.parents):
            continue    # ** matches a folder and what is in it
        below = list(walk(root, bad, is_ours))
        if os.path.isdir(root):
            folders.add(root)
            left_out.update(suffix(path) or 'no suffix' for path in below
                            if suffix(path) not in SUFFIXES)
            below = [path for path in below if suffix(path) in SUFFIXES]
        files += below
    return files, left_out


def walk(path: Path, bad, is_ours, above: tuple = ()) -> Iterator[Path]:
    """A file, or all files below a folder, except hidden ones and what is_ours, by name. Links are
    followed, unless they lead back up: that is told to `bad`, as are pipes and the like."""
    if not os.path.isdir(path):
        if os.path.isfile(path) or os.path.islink(path):
            yield path
        else:
            bad(f'{path}: not a regular file; write what it gives into one')
        return
    try:
        here = (path.stat().st_dev, path.stat().st_ino)
        names = sorted(name for name in os.listdir(path) if not name.startswith('.'))
    except OSError as e:
        bad(f'{path}: cannot be read ({e.strerror}); see to its permissions')
        return
    if here in above:
        bad(f'{path}: a link to a folder above it, which would never end; remove it')
        return
    for name in names:
        if not (os.path.isdir(path / name) and is_ours(path / name)):
            yield from walk(path / name, bad, is_ours, (*above, here))


def read(path: Path, encoding: str, errors: str, column: str | tuple) -> Iterator[Record]:
    """The records of a file in order. `encoding` '' is detected, and printed if it is not UTF-8;
    `errors` is 'strict' or 'replace'; `column` is the text's in tables and Parquet, or a tuple as
    read_table takes it: then both give whole rows. Raises Bad."""
    where, told = path, encoding
    if encoding and not is_encoding(encoding):
        raise Bad(f'{path}: encoding={encoding} is none that Python knows for text; correct it')
    reader = {'.html': read_html, '.htm': read_html, '.json': tables.read_array,
              '.ipynb': read_notebook, '.parquet': read_parquet,
              **dict.fromkeys(JSON_LINES, tables.read_lines),
              **dict.fromkeys(TABLES, tables.read_table)}.get(suffix(path), read_text)
    try:
        with open(path, 'rb') as raw:
            f = gzip.open(raw) if path.suffix.lower() == '.gz' else raw
            refuse(path, f)
            for record in reader(path, f, encoding, errors, column):
                if not told and record.encoding not in ('utf-8', 'utf-8-sig'):
                    told = record.encoding
                    if os.environ.get('RANK', '0') == '0':
                        tqdm.write(f'{path}: not UTF-8, read as {told}', file=sys.stderr)
                where = record.where
                if record.kind == 'row' and isinstance(column, str):
                    record = record._replace(kind='text', data=record.data[column.strip().lower()])
                yield record._replace(end=record.end or raw.tell())
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise Bad(f'{path}: a damaged or truncated gzip file, after {where} ({e}); get it '
                  'again') from e
    except UnicodeError as e:   # a decoder's, whose offset counts from its last block
        raise Bad(f'{path}: after {where}: {e}; {REMEDY}') from e
    except OSError as e:
        raise Bad(f'{path}: cannot be read ({e.strerror}); see that it is there, with permission '
                  'to read it') from e


def refuse(path, f) -> None:
    """Raise Bad for a file that would give its syntax instead of its text."""
    head, what = f.read(8), f'a {suffix(path)} file' if suffix(path) in REFUSED else ''
    f.seek(0)
    for mark, name in SIGNATURES.items():
        what = name if head.startswith(mark) else what
    if what:
        raise Bad(f'{path}: is {what}, which is not read; save its text as .txt')


def read_text(path, f, encoding, errors, column) -> Iterator[Record]:
    """A text file, decoded a block at a time; of any length, and with lines of any length."""
    head = f.read(1 << 24)
    encoding = encoding or detect(path, head)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), True)
    blocks = itertools.chain((head[i:i + BLOCK] for i in range(0, len(head), BLOCK)),
                             iter(lambda: f.read(BLOCK), b''), [b''])
    text, offset, continued = '', 0, False
    for block in blocks:
        try:
            text += decoder.decode(block, final=not block)
            text = text if offset else text.removeprefix('\ufeff')
        except UnicodeDecodeError as e:
            at = offset + e.start + len(block) - len(e.object)
            raise Bad(f'{path}: invalid {encoding.upper()} at byte offset {at} '
                      f'(0x{e.object[e.start]:02x}); {REMEDY}') from e
        offset += len(block)
        if not block and text.endswith(END):
            text += '\n'
        *whole, text = SEPARATOR.split(text)
        for part in whole:
            yield from parts(part, True, str(path), encoding, continued)
            continued = False
        rest = yield from parts(text, not block, str(path), encoding, continued)
        text, continued = rest, continued or len(rest) < len(text)


def parts(text: str, whole: bool, where: str, encoding: str, continued: bool):
    """Records of a text, none longer than LONGEST; unless it is the `whole` document, returns the
    rest, to which more will be added."""
    while len(text) > LONGEST or whole and text:
        cut = min(len(text), LONGEST)
        if cut < len(text):     # between two words if there are any
            cut = max(text.rfind('\n', cut // 2, cut), text.rfind(' ', cut // 2, cut), 0) or cut
            cut -= text.startswith('<', cut)    # which at the start of a part might begin END
        yield Record(where, text[:cut], 'text', encoding, continued)
        text, continued = text[cut:], True
    return text


def read_html(path, f, encoding, errors, column) -> Iterator[Record]:
    page = f.read(LONGEST_PAGE + 1)
    if len(page) > LONGEST_PAGE:
        raise Bad(f'{path}: a web page of more than {LONGEST_PAGE >> 20} MiB; give its text')
    # without `encoding` the parser finds the one that the page states
    yield Record(str(path), page.decode(encoding, errors) if encoding else page, 'html')


def read_notebook(path, f, encoding, errors, column) -> Iterator[Record]:
    """The text and code cells of a Jupyter notebook in their order, without outputs."""
    text, encoding = tables.open_text(path, f, encoding, errors)
    found = Record(str(path), text.read().removeprefix('\ufeff'), 'json', encoding)
    try:
        cells = [''.join(cell['source']).strip('\n') for cell in tables.parse_json(found)['cells']
                 if cell['cell_type'] in ('markdown', 'code')]
    except (KeyError, TypeError) as e:
        raise Bad(f'{path}: no Jupyter notebook of format 4 ({e!r}); convert it') from e
    yield found._replace(data='\n\n'.join(filter(None, cells)) + '\n', kind='text')


def read_parquet(path, f, encoding, errors, column) -> Iterator[Record]:
    """The rows of a Parquet file, a few hundred in memory at a time: texts of a column, or, if
    `column` is a tuple, whole rows; bad ones are records."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Bad(f'{path}: Parquet needs pyarrow: pip install pyarrow') from None
    row, texts = 0, isinstance(column, str)
    try:
        table = pyarrow.parquet.ParquetFile(f)
        names = table.schema_arrow.names
        if texts and column not in names:
            raise Bad(f'{path}: no column {column!r} among {", ".join(names)}; name the one that '
                      'has the text with --text_column')
        size, n_rows = os.path.getsize(path), table.metadata.num_rows
        for batch in table.iter_batches(256, columns=[column] if texts else None):
            for value in batch.column(0) if texts else batch.to_struct_array():
                row += 1
                data = value.as_py()
                if isinstance(data, str) or not texts:
                    yield Record(f'{path}:{row}', data, 'text' if texts else 'row',
                                 end=size * row // max(row, n_rows))
                else:
                    yield tables.bad_record(f'{path}: row {row}', f'{column!r} is no text; name '
                                            'the column that has it with --text_column')
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise Bad(f'{path}: a damaged or truncated Parquet file, after row {row} '
                  f'({" ".join(str(e).split())[:200]}); get it again') from e


def parse(record: Record, column: str, errors: str = 'strict') -> Iterator[Record]:
    """The document of a record as text, in parts if it is longer than LONGEST; `errors` as in
    `read`, here for half characters (lone surrogates), which JSON can spell. Raises Bad."""
    where, text = record.where, record.data
    if record.kind == 'bad':
        raise Bad(text)
    if record.kind == 'json':
        found = tables.parse_json(record)
        text = found.get(column) if isinstance(found, dict) else found
        if not isinstance(text, str):
            names = f'it has {", ".join(found)}' if isinstance(found, dict) else 'it is no object'
            raise Bad(f'{where}: no text in a field {column!r}: {names[:200]}; name the one that '
                      'has it with --text_column')
    elif record.kind == 'html':
        text = html_to_text(where, text)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        if errors == 'strict':
            raise Bad(f'{where}: a lone surrogate (half of a character) at {e.start} of the text; '
                      'correct it, or put U+FFFD there with --errors=replace') from e
        text = re.sub('[\ud800-\udfff]', '\ufffd', text)
    if len(text) <= LONGEST:
        yield record._replace(data=text, kind='text')
    else:
        yield from parts(text, True, where, '', record.continued)


def html_to_text(where: str, page: bytes | str) -> str:
    """What a reader of a web page reads: trafilatura leaves menus and footers out."""
    try:
        import trafilatura
    except ImportError:
        raise Bad(f'{where}: web pages need trafilatura: pip install trafilatura '
                  'lxml_html_clean') from None
    text = trafilatura.extract(page, include_comments=False, favor_recall=True)
    return text + '\n' if text else ''
