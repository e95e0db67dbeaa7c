"""core/data/recipes.py and addresses: named datasets, web pages, from a server here."""
import functools
import gzip
import http.server
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Quiet, serving
from conftest import stopped_at_last as stopped
from test_corpus import documents_of, prose

from core.data import recipes
from core.data.build import build
from core.data.recipes import RECIPES


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that is served over HTTP, also as Hugging Face's hub; site.url."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('DATA_MIRROR', raising=False)
    folder = tmp_path / 'site'
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with serving(handler) as server:
        address = f'http://127.0.0.1:{server.server_port}'
        monkeypatch.setenv('HF_ENDPOINT', address)
        yield Site(folder, address)


class Handler(Quiet, http.server.SimpleHTTPRequestHandler):
    pass


class Site:
    def __init__(self, folder, url):
        self.folder, self.url = folder, url

    def put(self, path: str, content) -> str:
        """Serve bytes, or a list of texts as Parquet; returns the address."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            pyarrow = pytest.importorskip('pyarrow')
            pytest.importorskip('pyarrow.parquet').write_table(
                pyarrow.table({'text': content}), file)
        return f'{self.url}/{path}'


def hub_path(repository: str, revision: str, file: str) -> str:
    return f'datasets/{repository}/resolve/{revision}/{file}'


def test_tinystories(site):
    stories = [prose(i, 30) for i in range(4)]
    for split, part in (('train', stories[:3]), ('valid', stories[3:])):
        site.put(hub_path('roneneldan/TinyStories', 'f54c09fd23315a6f9c86f9dc80f725de7d8f9c64',
                          f'TinyStoriesV2-GPT4-{split}.txt'),
                 '<|endoftext|>\n'.join(part).encode())
    folder = build('tinystories', max_files=1)
    assert folder == Path('data/tinystories')
    assert documents_of(folder, 'train') == stories[:3]
    assert documents_of(folder, 'val') == stories[3:]
    before = (folder / 'meta.json').stat().st_mtime_ns
    assert build('tinystories') == folder     # as train.py asks for it
    assert (folder / 'meta.json').stat().st_mtime_ns == before
    assert json.loads((folder / 'meta.json').read_text())['licence'] == 'CDLA-Sharing-1.0'


def test_wikitext(site, monkeypatch):
    rows = ['', ' = First = \n', '', ' Some text . \n', ' = = Part = = \n', ' More text . \n', '',
            ' = Second = \n', ' Other words here . \n']
    revision = 'b08601e04326c79dfdd32d625aee71d232d685c3'
    for part, content in (('train-00000-of-00002', rows[:4]), ('train-00001-of-00002', rows[4:]),
                          ('validation-00000-of-00001', [' = Third = \n', ' The last one . \n'])):
        site.put(hub_path('Salesforce/wikitext', revision, f'wikitext-103-raw-v1/{part}.parquet'),
                 content)
    folder = build('wikitext', tokenizer='byte', max_files=1)
    assert documents_of(folder, 'train') == [''.join(rows[1:7]), ''.join(rows[7:])]
    assert documents_of(folder, 'val') == [' = Third = \n The last one . \n']


def test_wikitext_by_two_at_once(tmp_path, monkeypatch):
    """The second waits for the file of the first, instead of writing into it."""
    path, begun, read = tmp_path / 'text', threading.Event(), []

    def slow(table, *_):
        read.append(table)
        begun.set()
        time.sleep(0.3)
        yield from (SimpleNamespace(data=text) for text in (' = One = \n', ' Text . \n'))
    monkeypatch.setattr(recipes, 'read', slow)
    first = threading.Thread(target=recipes.join_rows, args=([tmp_path / 'table'], path))
    first.start()
    begun.wait()
    recipes.join_rows([tmp_path / 'table'], path)
    first.join()
    assert len(read) == 1 and path.read_text() == ' = One = \n Text . \n'


@pytest.mark.parametrize('name,repository,revision,file', [
    ('openwebtext', 'Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c',
     'plain_text/train-{:05d}-of-00080.parquet'),
    ('fineweb-edu', 'karpathy/fineweb-edu-100b-shuffle', 'main', 'shard_{:05d}.parquet')])
def test_large_sets(site, name, repository, revision, file):
    texts = [prose(i) for i in range(6)]
    for i in range(2):
        site.put(hub_path(repository, revision, file.format(i)), texts[3 * i:3 * i + 3])
    folder = build(name, tokenizer='byte', max_files=2, val_fraction=0.0)
    assert documents_of(folder, 'train') == texts
    folder = build(name, tokenizer='byte', max_files=1, val_fraction=0.0)
    assert documents_of(folder, 'train') == texts[:3]


@pytest.mark.parametrize('name', [name for name in RECIPES if RECIPES[name].n_files])
def test_not_downloaded_unasked(site, name, capsys):
    message = stopped(capsys, lambda: build(name))
    assert f'python prepare.py {name} --max_files=' in message and not Path('data').exists()


def test_addresses(site):
    """Text, compressed records and a web page, mixed with a file of one's own."""
    texts = [prose(i) for i in range(4)]
    page = f'<html><body><nav><a href="/">Home</a></nav><p>{texts[2]}</p></body></html>'
    Path('own.txt').write_text(texts[3])
    places = [site.put('a/story.txt', texts[0].encode()),
              site.put('b/more.jsonl.gz', gzip.compress(json.dumps({'body': texts[1]}).encode())),
              site.put('page', page.encode()), 'own.txt']
    folder = build(','.join(places), name='web', text_column='body', val_fraction=0.0)
    assert [text.strip() for text in documents_of(folder, 'train')] == [
        text.strip() for text in texts]
    kept = sorted(path.name for path in Path('data/downloads/urls').rglob('*') if path.is_file())
    assert [name[9:] for name in kept if not name.endswith(('.sha256', '.lock'))] == [
        name[9:] for name in kept if name.endswith(('story.txt', 'page.html', 'more.jsonl.gz'))]
    assert len(kept) == 9


def test_an_error_page_with_status_200(site, capsys):
    address = site.put('records.jsonl', b'<!DOCTYPE html><html>please log in</html>')
    message = stopped(capsys, lambda: build(address))
    assert message.startswith(f'{address}: the server sent an HTML page instead')
    assert not [path for path in Path('data').rglob('*') if path.name.startswith('records')]


def test_a_missing_file(site, capsys):
    message = stopped(capsys, lambda: build(f'{site.url}/nothing.txt'))
    assert 'HTTP status 404' in message and message.startswith(f'{site.url}/nothing.txt')
