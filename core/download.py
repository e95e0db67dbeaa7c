"""Getting files: from a mirror directory, an earlier download, or the web, whole or not at all."""
import contextlib
import fcntl
import hashlib
import os
import sys
import time
from pathlib import Path

import requests
from tqdm import tqdm

from core.settings import stop


@contextlib.contextmanager
def locked(path: Path):
    """Hold a file lock, which the system releases even if this process is killed."""
    with open(path, 'a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


class NoNetwork(Exception):
    """The file is not on this machine and could not be reached; the message says what was tried."""


def fetch(name: str, url: str, folder, sha256: str = '', size: int = 0, headers: dict | None = None,
          optional: bool = False, mirrored: bool = True) -> Path | None:
    """The path of the file `name`: from the mirror directory, an earlier download, or `url`.

    DATA_MIRROR=<dir>, if set, is looked at first and used in place. A download goes to `folder`,
    appears under its final name only when whole and right, and leaves its hash beside it in
    `<name>.sha256`; `sha256` (64 hex digits) and `size` (bytes) are checked when given, otherwise
    the hash of the first download is what later ones must have. `headers` go with the request. If
    the server has no such file, returns None where it is `optional`. Without `mirrored` it is not
    looked for in the mirror.
    Raises NoNetwork if no server can be reached. Stops on an answer that is not the file.
    """
    mirror = os.environ.get('DATA_MIRROR')
    if mirror and mirrored:
        if not Path(mirror).is_dir():
            stop(f'DATA_MIRROR={mirror}: no such directory; correct it or unset it')
        if (Path(mirror) / name).is_file():
            return verify(Path(mirror) / name, sha256, size)
    path = Path(folder) / name
    record = Path(folder) / f'{name}.sha256'
    if not sha256 and record.is_file():
        sha256 = record.read_text().partition(' ')[0]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f'.{path.name}.lock')):
            part = Path(folder) / f'{name}.part'
            if not path.is_file():      # another process may have brought it meanwhile
                if not download(url, part, size, headers=headers, optional=optional):
                    return None
                verify(part, sha256, size, delete=True, shown=url)
                record.write_text(f'{file_hash(part)}  {path.name}\n')  # as sha256sum -c has it
                os.replace(part, path)
    return verify(path, sha256, size)


def file_hash(path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, 'rb') as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, sha256: str, size: int, delete: bool = False, shown: str = '') -> Path:
    """`path`, if its size and hash are as given ('' and 0: any); otherwise stops, naming it."""
    found_size = path.stat().st_size
    wrong = ''
    if size and found_size != size:
        wrong = f'{found_size:,} bytes, should be {size:,}'
    elif sha256 and (found := file_hash(path)) != sha256:
        wrong = f'sha256 is {found}, should be {sha256}'
    if wrong:
        if delete:
            path.unlink()
        stop(f'{shown or path}: {wrong}; '
             + ('nothing was kept: try again later, or, if the file may have changed since it was '
                'first downloaded, delete its .sha256' if delete else 'delete it and try again'))
    return path


def download(url: str, part: Path, size: int = 0, attempts: int = 4, timeout=(10, 60),
             headers: dict | None = None, optional: bool = False) -> bool:
    """Stream `url` into the file `part`, going on where an earlier try stopped; True if it came.

    Retries dropped connections, stalls and 5xx answers `attempts` times in all, waiting 1, 2, 4 s.
    An interrupted part is continued only if the server confirms (If-Range) that the file is still
    the same one. A 404 returns False where the file is `optional`. Raises NoNetwork when no
    connection could be made, stops on any other failure.
    """
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
                if answer.status_code == 416:  # the part is longer than the file now is
                    part.unlink(missing_ok=True)
                    problem = 'HTTP status 416'
                    continue
                if answer.status_code >= 500 or answer.status_code in (408, 429):
                    problem = f'HTTP status {answer.status_code}'
                    continue
                if optional and answer.status_code == 404:
                    return False
                if answer.status_code not in (200, 206):
                    stop(f'{url}: HTTP status {answer.status_code} {answer.reason}; '
                         'check the address, or put the file into DATA_MIRROR')
                start = done if answer.status_code == 206 else 0
                given = answer.headers.get('Content-Range', '')
                if start and not given.startswith(f'bytes {start}-'):
                    part.unlink()
                    problem = 'the server continued at the wrong byte'
                    continue
                length = answer.headers.get('Content-Length')
                total = start + int(length) if length else size
                if validator := answer.headers.get('ETag', answer.headers.get('Last-Modified')):
                    validator_file.write_text(validator)
                write_body(answer, part, start, total, url)
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout,
                requests.exceptions.ChunkedEncodingError) as e:
            problem = type(e).__name__
            continue
        except OSError as e:  # of requests or of the file system
            stop(f'{url}: {e}; check the address, or put the file into DATA_MIRROR')
        if not total or part.stat().st_size == total:
            validator_file.unlink(missing_ok=True)
            return True
        problem = f'the body ended after {part.stat().st_size:,} of {total:,} bytes'
    if not reached:
        raise NoNetwork(f'{url} cannot be reached ({problem})')
    return stop(f'{url}: {problem}, after {attempts} tries; run the same command again to go '
                'on, or put the file into DATA_MIRROR')


def write_body(answer, part: Path, start: int, total: int, url: str) -> None:
    """Append the body of an HTTP answer to `part` from byte `start` on, with a progress bar."""
    name = part.name.removesuffix('.part')
    with (open(part, 'ab' if start else 'wb') as f,
          tqdm(total=total or None, initial=start, unit='B', unit_scale=True, desc=name) as bar):
        for block in answer.iter_content(1 << 16):
            head = block[:200].lstrip().lower()
            if start == 0 and f.tell() == 0 and head.startswith((b'<!doctype html', b'<html')) \
                    and not name.endswith(('.html', '.htm')):
                bar.close()
                for file in (part, part.with_name(part.name + '.etag')):
                    file.unlink(missing_ok=True)
                stop(f'{url}: the server sent an HTML page instead of {name} (an error or login '
                     'page?); check the address, or put the file into DATA_MIRROR')
            f.write(block)
            bar.update(len(block))
