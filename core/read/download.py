"""Getting files: from a mirror directory, an earlier download, or the web, whole or not at all."""
import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import sys
import time
import zlib
from pathlib import Path

import requests
from tqdm import tqdm

from core.read.documents import SUFFIXES
from core.settings import stop, warn

# What decides how a download is read: its Content-Type, and its first bytes.
TYPES = {'text/html': '.html', 'application/xhtml+xml': '.html', 'text/csv': '.csv',
         'text/tab-separated-values': '.tsv', 'application/json': '.json', 'text/json': '.json',
         'application/x-ndjson': '.jsonl', 'application/jsonl': '.jsonl',
         'application/vnd.apache.parquet': '.parquet'}
UNTOLD = ('', 'application/octet-stream', 'binary/octet-stream')
PAGE = re.compile(rb'\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype html|html)\b', re.I | re.S)
MARKUP = re.compile(rb'</(html|body|title|div|p|a|span|li|h\d|td|b|i|em|strong)\s*>', re.I)
JSON = re.compile(rb'\s*(\[\s*[\[{"\]]|\{\s*["}])')


def stated(name: str) -> str:
    """The kind of file that a name states: '.txt' for 1342.txt.utf-8, '' for LICENSE."""
    return next((kind for kind in reversed(Path(name.lower()).suffixes)
                 if kind in (*SUFFIXES, '.json', '.ipynb')), '')


def kind_of(part: Path, content_type: str) -> str:
    """The suffix that says how to read what was served: Content-Type ('': not given) and first
    bytes decide; where they leave it open, as text/plain does, its name without .part."""
    by_name, line, head = stated(part.stem), b'', b''
    with open(part, 'rb') as f:
        packed = '.gz' if f.read(2) == b'\x1f\x8b' else ''
    with (contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error),   # documents.read tells it
          (gzip.open if packed else open)(part, 'rb') as f):
        line = f.readline(1 << 26).removeprefix(b'\xef\xbb\xbf')
        head = line + f.read(1 << 16)
    given = content_type.partition(';')[0].strip().lower() if not packed else ''
    told = TYPES.get(given, '')
    if PAGE.match(head) or told == '.html' and not by_name and MARKUP.search(head):
        return '.html' + packed
    if JSON.match(head) and by_name not in ('.jsonl', '.ipynb') and (
            '.json' in (told, by_name) or not by_name and given in UNTOLD):
        with contextlib.suppress(ValueError, RecursionError):
            return ('.jsonl' if isinstance(json.loads(line), dict) else '.json') + packed
        return '.json' + packed
    return (by_name or '.txt' if told in ('', '.html', '.json') else told) + packed


def locked(path: Path, wait: bool = True):
    """The file of a lock that is held until it is closed, or this process ends. Raises
    BlockingIOError if another process has it and we do not `wait`, or another OSError if the file
    cannot be opened. A file system without locks is a warning."""
    file = open(path, 'a')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as e:
        warn(f'{path.parent} cannot be locked ({e.strerror}): see to it that no other process '
             'works in it')
    return file


class NoNetwork(Exception):
    """The file is not on this machine and could not be reached; the message says what was tried."""


class TryAgain(Exception):
    """An answer that may be another one a moment later."""


def fetch(name: str, url: str, folder, sha256: str = '', *, size: int = 0,
          headers: dict | None = None, optional: bool = False, mirrored: bool = True,
          any_kind: bool = False) -> Path:
    """The path of the file `name`: in DATA_MIRROR (unless not `mirrored`), of an earlier download,
    or from `url`. Raises NoNetwork if no server can be reached; stops at an answer that is not the
    file, unless the server has no such file and it is `optional`: then nothing is at the path.

    A download goes to `folder`, appears under its final name only when whole and right, and leaves
    its hash in `<name>.sha256`, which later ones must have. `sha256` (64 hex digits) and `size`
    (bytes) are checked when given. With `any_kind` the name gets the suffix that kind_of finds.
    """
    mirror = os.environ.get('DATA_MIRROR')
    if mirror and mirrored:
        if not Path(mirror).is_dir():
            stop(f'DATA_MIRROR={mirror}: no such directory; correct it or unset it')
        if (Path(mirror) / name).is_file():
            return verify(Path(mirror) / name, sha256, size)
    record, part = Path(folder) / f'{name}.sha256', Path(folder) / f'{name}.part'

    def noted() -> tuple[str, Path]:
        """The hash and the place that the first download has left; '' and `name` before it."""
        digest, _, file = (record.read_text() if record.is_file() else '').partition('  ')
        return digest, record.with_name(Path(file.strip() or name).name)

    if not noted()[1].is_file():
        record.parent.mkdir(parents=True, exist_ok=True)
        with locked(record.with_name(f'.{Path(name).name}.lock')):
            first, path = noted()
            if not path.is_file():      # another process may have brought it meanwhile
                content_type = download(url, part, size, headers=headers, optional=optional)
                if content_type is None:
                    return path
                verify(part, sha256 or first, size, url)
                kind = kind_of(part, content_type) if any_kind else ''
                path = record.with_name(Path(name).name.removesuffix(kind) + kind)
                record.write_text(f'{file_hash(part)}  {path.name}\n')  # as sha256sum -c has it
                os.replace(part, path)
    first, path = noted()
    return verify(path, sha256 or first, size)


def file_hash(path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, 'rb') as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, sha256: str, size: int, url: str = '') -> Path:
    """`path`, if its size and hash are as given ('' and 0: any). Otherwise stops, and deletes it if
    it has just come from `url`."""
    wrong, found_size = '', path.stat().st_size
    if size and found_size != size:
        wrong = f'{found_size:,} bytes, should be {size:,}'
    elif sha256 and (found := file_hash(path)) != sha256:
        wrong = f'sha256 is {found}, should be {sha256}'
    if wrong and url:
        path.unlink()
        stop(f'{url}: {wrong}; nothing was kept: try again later, or, if the file may have changed '
             'since it was first downloaded, delete its .sha256')
    return stop(f'{path}: {wrong}; delete it and try again') if wrong else path


def download(url: str, part: Path, size: int = 0, *, attempts: int = 4, timeout=(10, 60),
             headers: dict | None = None, optional: bool = False) -> str | None:
    """Stream `url` into the file `part`, going on where an earlier try stopped if the server
    confirms (If-Range) that the file is the same; returns its Content-Type, or None at a 404 if the
    file is `optional`. Tries `attempts` times, waiting 1, 2, 4 s. Raises NoNetwork when no
    connection could be made, stops on any other failure."""
    validator_file = part.with_name(part.name + '.etag')
    reached, problem = False, ''
    for attempt in range(attempts):
        if attempt:
            tqdm.write(f'{url}: {problem}; trying again', file=sys.stderr)
            time.sleep(2 ** (attempt - 1))
        try:
            asked = {**(headers or {}), 'Accept-Encoding': 'identity'}
            done = part.stat().st_size if part.exists() and validator_file.exists() else 0
            if done:
                asked |= {'Range': f'bytes={done}-', 'If-Range': validator_file.read_text()}
            with requests.get(url, headers=asked, stream=True, timeout=timeout) as answer:
                reached = True
                if optional and answer.status_code == 404:
                    return None
                receive(answer, part, done, size, url)
            validator_file.unlink(missing_ok=True)
            return answer.headers.get('Content-Type', '')
        except TryAgain as e:
            problem = str(e)
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout,
                requests.exceptions.ChunkedEncodingError) as e:
            problem = type(e).__name__
        except OSError as e:  # of requests or of the file system
            stop(f'{url}: {e}; check the address, or put the file into DATA_MIRROR')
    if not reached:
        raise NoNetwork(f'{url} cannot be reached ({problem})')
    return stop(f'{url}: {problem}, after {attempts} tries; run the same command again to go '
                'on, or put the file into DATA_MIRROR')


def receive(answer, part: Path, done: int, size: int, url: str) -> None:
    """Write the body of an HTTP answer to `part`, of which `done` bytes are there already, with a
    progress bar. Raises TryAgain at a failure that may pass; stops at others, and at a web page if
    the name says that it is to be something else."""
    code, given = answer.status_code, answer.headers.get('Content-Range', '')
    start = done if code == 206 else 0
    if code == 416 or start and not given.startswith(f'bytes {start}-'):
        part.unlink(missing_ok=True)    # it is longer than the file now is, or would get a gap
        raise TryAgain('HTTP status 416' if code == 416 else
                       'the server continued at the wrong byte')
    if code >= 500 or code in (408, 429):
        raise TryAgain(f'HTTP status {code}')
    remedy = 'check the address, or put the file into DATA_MIRROR'
    if code not in (200, 206):
        stop(f'{url}: HTTP status {code} {answer.reason}; {remedy}')
    packed, length = (answer.headers.get(f'Content-{x}') for x in ('Encoding', 'Length'))
    total = start + int(length) if length and not packed else size
    name, validator_file = part.name.removesuffix('.part'), part.with_name(part.name + '.etag')
    if validator := answer.headers.get('ETag', answer.headers.get('Last-Modified')):
        validator_file.write_text(validator)
    with (open(part, 'ab' if start else 'wb') as f,
          tqdm(total=total or None, initial=start, unit='B', unit_scale=True, desc=name) as bar):
        for block in answer.iter_content(1 << 16):
            if f.tell() == 0 and Path(name).suffix not in ('', '.html', '.htm') and \
                    block[:200].lstrip().lower().startswith((b'<!doctype html', b'<html')):
                bar.close()
                for file in (part, validator_file):
                    file.unlink(missing_ok=True)
                stop(f'{url}: the server sent an HTML page instead of {name} (an error or login '
                     f'page?); {remedy}')
            f.write(block)
            bar.update(len(block))
    if total and part.stat().st_size != total:
        raise TryAgain(f'the body ended after {part.stat().st_size:,} of {total:,} bytes')
