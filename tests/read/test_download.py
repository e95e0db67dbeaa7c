"""core/read/download.py, against a server on this machine that misbehaves in every way."""
import contextlib
import hashlib
import http.server
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import Quiet, serving
from conftest import stopped_at_last as stopped

from core.read.download import NoNetwork, download, fetch
from core.settings import Stop

MB = 1 << 20
BODY = b''.join(hashlib.sha256(i.to_bytes(4, 'little')).digest() for i in range(3 * MB // 32))
SHA = hashlib.sha256(BODY).hexdigest()
SMALL = b'a small file\n'
SMALL_SHA = hashlib.sha256(SMALL).hexdigest()


class Handler(Quiet, http.server.BaseHTTPRequestHandler):
    """Gives each request to the next of the server's answers; the last one takes the rest."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        answer = server.answers[min(len(server.requests), len(server.answers)) - 1]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
            answer(self)
        self.close_connection = True

    def reply(self, status: int, body: bytes = b'', **headers):
        """Send an answer; Content_Range=... is a header, one of None is left out."""
        self.send_response(status)
        headers = {'Content_Length': str(len(body)), 'ETag': '"v1"', **headers}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope='module')
def running():
    with serving(Handler) as server:
        yield server


@pytest.fixture
def server(running):
    """server(answer, ...) sets the answers; server.url, server.requests."""
    def script(*answers):
        running.answers, running.requests = answers, []
        script.requests = running.requests

    script.url = f'http://127.0.0.1:{running.server_port}/data.bin'
    script.released = threading.Event()
    yield script
    script.released.set()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited between tries; no time passes."""
    seconds = []
    monkeypatch.setattr('core.read.download.time.sleep', seconds.append)
    return seconds


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, waits):
    monkeypatch.delenv('DATA_MIRROR', raising=False)
    monkeypatch.setenv('NO_PROXY', '*')


def whole(body=BODY, **headers):
    return lambda h: h.reply(200, body, **headers)


def status(code, **headers):
    return lambda h: h.reply(code, b'sorry', **headers)


def cut(at: int, **headers):
    """Promise all of BODY and break off after `at` bytes."""
    return lambda h: h.reply(200, BODY[:at], Content_Length=str(len(BODY)), **headers)


def ranged(h):
    """What a good server does with Range and If-Range."""
    if 'Range' not in h.headers or h.headers['If-Range'] != '"v1"':
        return h.reply(200, BODY)
    start = int(h.headers['Range'].removeprefix('bytes=').removesuffix('-'))
    if start >= len(BODY):
        return h.reply(416, Content_Range=f'bytes */{len(BODY)}')
    return h.reply(206, BODY[start:],
                   Content_Range=f'bytes {start}-{len(BODY) - 1}/{len(BODY)}')


def get(server, folder, **known) -> Path:
    return fetch('data.bin', server.url, folder, **known)


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix != '.lock')


# ---------------------------------------------------------------------------------------------
# It works


def test_download(server, tmp_path, capsys):
    server(whole())
    path = get(server, tmp_path / 'new' / 'folder', sha256=SHA, size=len(BODY))
    assert path == tmp_path / 'new' / 'folder' / 'data.bin' and path.read_bytes() == BODY
    assert names(path.parent) == ['data.bin', 'data.bin.sha256']
    assert (path.parent / 'data.bin.sha256').read_text() == f'{SHA}  data.bin\n'
    assert server.requests[0]['Accept-Encoding'] == 'identity'
    assert 'Range' not in server.requests[0]
    out, err = capsys.readouterr()
    assert out == '' and 'data.bin: 100%' in err and '3.15M/3.15M' in err


def test_not_downloaded_again(server, tmp_path):
    server(whole(SMALL))
    for _ in range(2):
        assert get(server, tmp_path).read_bytes() == SMALL
    assert len(server.requests) == 1


def test_no_length_given(server, tmp_path):
    server(whole(Content_Length=None))
    assert get(server, tmp_path, size=len(BODY)).read_bytes() == BODY


def test_redirect(server, tmp_path):
    server(lambda h: h.reply(302, Location=server.url + '?elsewhere'), whole(SMALL))
    assert get(server, tmp_path).read_bytes() == SMALL and len(server.requests) == 2


def test_server_error_then_success(server, tmp_path, waits):
    server(status(500), status(503), whole(SMALL))
    assert get(server, tmp_path).read_bytes() == SMALL and waits == [1, 2]
    assert names(tmp_path) == ['data.bin', 'data.bin.sha256']


# ---------------------------------------------------------------------------------------------
# Cut connections


def continued(server, request: int) -> int:
    """The byte from which a request went on."""
    headers = server.requests[request]
    assert headers['If-Range'] == '"v1"'
    return int(headers['Range'].removeprefix('bytes=').removesuffix('-'))


def test_cut_connection_is_continued(server, tmp_path, waits, capsys):
    server(cut(MB + MB // 2), ranged)
    assert get(server, tmp_path, sha256=SHA).read_bytes() == BODY
    assert MB <= continued(server, 1) <= MB + MB // 2
    assert len(server.requests) == 2 and waits == [1]
    assert names(tmp_path) == ['data.bin', 'data.bin.sha256']


def test_the_next_command_goes_on(server, tmp_path, capsys):
    """After the last try, and with Last-Modified in place of an ETag."""
    date = 'Wed, 21 Oct 2015 07:28:00 GMT'
    server(cut(2 * MB + 5, ETag=None, Last_Modified=date), status(500))
    message = stopped(capsys, lambda: get(server, tmp_path))
    assert server.url in message and 'after 4 tries' in message and 'run the same' in message
    assert len(server.requests) == 4 and not (tmp_path / 'data.bin').exists()
    server(lambda h: h.reply(206, BODY[2 * MB:], Content_Range=f'bytes {2 * MB}-/{3 * MB}'))
    (tmp_path / 'data.bin.part').write_bytes(BODY[:2 * MB])
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.requests[0]['Range'] == f'bytes={2 * MB}-'
    assert server.requests[0]['If-Range'] == date


def test_short_bodies(server, tmp_path, capsys, waits):
    """Every try ends early: stops, and tells how to go on."""
    server(cut(10))
    message = stopped(capsys, lambda: get(server, tmp_path, sha256=SHA))
    assert server.url in message and 'after 4 tries' in message and 'DATA_MIRROR' in message
    assert len(server.requests) == 4 and waits == [1, 2, 4]
    assert 'data.bin' not in names(tmp_path)


def test_no_length_and_too_short(server, tmp_path, capsys):
    server(whole(SMALL, Content_Length=None))
    message = stopped(capsys, lambda: get(server, tmp_path, size=20))
    assert '13 of 20 bytes' in message and 'data.bin' not in names(tmp_path)


def test_server_that_ignores_ranges(server, tmp_path):
    server(cut(2 * MB + 5), whole())
    assert get(server, tmp_path).read_bytes() == BODY
    assert continued(server, 1) == 2 * MB


def test_file_that_changed_meanwhile(server, tmp_path):
    server(lambda h: h.reply(200, bytes(2 * MB), Content_Length=str(3 * MB), ETag='"v0"'), ranged)
    assert get(server, tmp_path, sha256=SHA).read_bytes() == BODY
    assert server.requests[1]['If-Range'] == '"v0"'


def test_server_without_validators_is_asked_for_all(server, tmp_path):
    server(cut(2 * MB, ETag=None), whole(ETag=None))
    assert get(server, tmp_path).read_bytes() == BODY
    assert 'Range' not in server.requests[1]


@pytest.mark.parametrize('given', [f'bytes {MB}-{3 * MB - 1}/{3 * MB}', None])
def test_wrong_content_range(server, tmp_path, given):
    server(cut(2 * MB), lambda h: h.reply(206, BODY[MB:], Content_Range=given), ranged)
    assert get(server, tmp_path).read_bytes() == BODY
    assert 'Range' not in server.requests[2]  # begun again


def test_part_longer_than_the_file(server, tmp_path):
    (tmp_path / 'data.bin.part').write_bytes(BODY + b'more')
    (tmp_path / 'data.bin.part.etag').write_text('"v1"')
    server(ranged)
    assert get(server, tmp_path).read_bytes() == BODY
    assert continued(server, 0) == len(BODY) + 4 and 'Range' not in server.requests[1]


def test_always_416(server, tmp_path, capsys):
    server(status(416))
    assert server.url in stopped(capsys, lambda: get(server, tmp_path))
    assert 'data.bin' not in names(tmp_path)


def test_stall_within_the_body(server, tmp_path, capsys):
    def stall(h):
        h.reply(200, BODY[:MB + 7], Content_Length=str(len(BODY)))
        h.wfile.flush()
        server.released.wait(20)

    server(stall)
    part = tmp_path / 'x.part'
    start = time.monotonic()
    message = stopped(capsys, lambda: download(server.url, part, attempts=1, timeout=(5, 0.2)))
    assert time.monotonic() - start < 5 and server.url in message
    assert part.read_bytes() == BODY[:MB]
    server(ranged)
    download(server.url, part)
    assert part.read_bytes() == BODY and continued(server, 0) == MB
    assert names(tmp_path) == ['x.part']


def test_stall_before_any_answer(server, tmp_path, waits):
    server(lambda h: server.released.wait(20))
    with pytest.raises((NoNetwork, Stop)) as e:
        download(server.url, tmp_path / 'x.part', attempts=2, timeout=(5, 0.1))
    assert server.url in str(getattr(e.value, 'message', e.value))
    assert len(server.requests) == 2 and names(tmp_path) == []


# ---------------------------------------------------------------------------------------------
# Wrong answers


def test_always_500(server, tmp_path, capsys, waits):
    server(status(500))
    message = stopped(capsys, lambda: get(server, tmp_path))
    assert server.url in message and 'HTTP status 500' in message and 'after 4 tries' in message
    assert len(server.requests) == 4 and waits == [1, 2, 4] and names(tmp_path) == []


@pytest.mark.parametrize('code', [404, 403, 204])
def test_not_found(server, tmp_path, capsys, code):
    server(status(code))
    message = stopped(capsys, lambda: get(server, tmp_path))
    assert f'{server.url}: HTTP status {code}' in message and 'DATA_MIRROR' in message
    assert len(server.requests) == 1 and names(tmp_path) == []


def test_redirects_in_a_circle(server, tmp_path, capsys):
    server(lambda h: h.reply(302, Location=server.url))
    assert server.url in stopped(capsys, lambda: get(server, tmp_path))
    assert names(tmp_path) == []


@pytest.mark.parametrize('page', [b'<!DOCTYPE html><p>Log in', b'\n <HTML lang="en"><p>Log in'])
def test_web_page_instead_of_the_file(server, tmp_path, capsys, page):
    server(whole(page))
    message = stopped(capsys, lambda: get(server, tmp_path))
    assert server.url in message and 'HTML page instead of data.bin' in message
    assert len(server.requests) == 1 and names(tmp_path) == []


def test_web_page_that_was_asked_for(server, tmp_path):
    server(whole(b'<html>fine'))
    assert fetch('page.html', server.url, tmp_path).read_bytes() == b'<html>fine'


def test_wrong_hash(server, tmp_path, capsys):
    server(whole(SMALL))
    message = stopped(capsys, lambda: get(server, tmp_path, sha256=SHA))
    assert f'{server.url}: sha256 is {SMALL_SHA}, should be {SHA}' in message
    assert names(tmp_path) == []


def test_wrong_size(server, tmp_path, capsys):
    server(whole(SMALL))
    message = stopped(capsys, lambda: get(server, tmp_path, size=1_000_000))
    assert f'{server.url}: 13 bytes, should be 1,000,000' in message
    assert names(tmp_path) == []


def test_first_hash_is_recorded(server, tmp_path, capsys):
    server(whole(SMALL), whole(b'another file\n'))
    path = get(server, tmp_path)
    assert (tmp_path / 'data.bin.sha256').read_text() == f'{SMALL_SHA}  data.bin\n'
    path.unlink()
    message = stopped(capsys, lambda: get(server, tmp_path))  # another one on the server now
    assert server.url in message and f'should be {SMALL_SHA}' in message
    assert names(tmp_path) == ['data.bin.sha256']
    path.write_bytes(b'edited')  # or on this machine
    message = stopped(capsys, lambda: get(server, tmp_path))
    assert f'{path}: sha256 is' in message and 'delete it' in message
    assert path.read_bytes() == b'edited' and len(server.requests) == 2


def test_nobody_listens(tmp_path, waits):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{s.getsockname()[1]}/data.bin'
    with pytest.raises(NoNetwork, match=url) as e:
        fetch('data.bin', url, tmp_path)
    assert '\n' not in str(e.value) and waits == [1, 2, 4] and names(tmp_path) == []


# ---------------------------------------------------------------------------------------------
# The mirror


def test_mirror_comes_first(server, tmp_path, monkeypatch, capsys):
    mirror = tmp_path / 'mirror'
    mirror.mkdir()
    (mirror / 'data.bin').write_bytes(SMALL)
    monkeypatch.setenv('DATA_MIRROR', str(mirror))
    server(whole())
    assert get(server, tmp_path / 'new', sha256=SMALL_SHA) == mirror / 'data.bin'
    assert server.requests == [] and names(tmp_path) == ['mirror']
    assert names(mirror) == ['data.bin']  # used in place, nothing written
    message = stopped(capsys, lambda: get(server, tmp_path / 'new', sha256=SHA))
    assert f'{mirror / "data.bin"}: sha256 is {SMALL_SHA}' in message
    assert names(mirror) == ['data.bin']


def test_mirror_without_the_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv('DATA_MIRROR', str(tmp_path))
    server(whole(SMALL))
    assert get(server, tmp_path / 'new') == tmp_path / 'new' / 'data.bin'


def test_mirror_that_is_no_directory(server, tmp_path, monkeypatch, capsys):
    server(whole(SMALL))
    (tmp_path / 'file').touch()
    for name in ('nowhere', 'file'):
        monkeypatch.setenv('DATA_MIRROR', str(tmp_path / name))
        message = stopped(capsys, lambda: get(server, tmp_path / 'new'))
        assert message.startswith(f'DATA_MIRROR={tmp_path / name}: no such directory')
    assert server.requests == [] and not (tmp_path / 'new').exists()
