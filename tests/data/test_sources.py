"""What goes into a dataset, whatever it is called and wherever it lies; and what does not."""
import contextlib
import gzip
import http.server
import importlib
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import Quiet, serving
from conftest import stopped_at_last as stopped
from test_prepare import decoded, meta_of, raising, run_main, snapshot, write

import bench
import export
import plan
import prepare
import sample
import train
from core import settings
from core.data import named
from core.data.build import build
from core.formats import hub
from core.read import download
from core.read.documents import find_files
from core.read.download import NoNetwork, fetch, kind_of, locked
from core.run import checkpoint
from core.settings import Stop, configure

TEXT = 'It was a dark and stormy night. Naïve 🎉!\n' * 5
OTHER = 'Nothing in here has any words of that in common.\n'
ROOT = Path(prepare.__file__).parent


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Everything happens in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('DATA_MIRROR', raising=False)
    monkeypatch.setenv('NO_PROXY', '*')


# ---------------------------------------------------------------------------------------------
# A web address: Content-Type and first bytes decide how it is read

LINES = '{"text": "a first line of some words"}\n{"text": "and a second one"}\n'
PAGE = '<!DOCTYPE html><html><body><article><p>' + 'A page of words, and more of them. ' * 9 + \
    '</p></article></body></html>'
FRAGMENT = '<p>A fragment of a page</p><div>without a head.</div>'
ANGLES = 'if a < b and c > d: <nobody> & "nothing"\n' * 3
TABLE = 'id,text\n1,"of a, table"\n2,another row\n'


class Handler(Quiet, http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        kind, body, headers = self.server.answer
        self.send_response(200)
        for name, value in ({'Content-Type': kind} if kind else {}).items() | headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)


@pytest.fixture(scope='module')
def running():
    with serving(Handler) as server:
        yield server


@pytest.fixture
def serve(running):
    """serve(path, Content-Type, body) is the address of what is served."""
    def give(path: str, kind: str, body: str | bytes, **headers) -> str:
        running.answer = kind, body if isinstance(body, bytes) else body.encode(), headers
        return f'http://127.0.0.1:{running.server_port}/{path}'
    return give


PLAIN, UTF8 = 'text/plain', 'text/plain; charset=utf-8'
SERVED = [      # name, Content-Type, body, suffix
    ('1342.txt.utf-8', UTF8, TEXT, '.txt'), ('1342.txt.utf-8', '', TEXT, '.txt'),
    ('LICENSE', PLAIN, TEXT, '.txt'), ('LICENSE', '', TEXT, '.txt'),
    ('LICENSE', 'application/octet-stream', TEXT, '.txt'), ('LICENSE', 'text/html', ANGLES, '.txt'),
    ('a.txt', 'text/html', TEXT, '.txt'), ('a.txt', 'text/html', ANGLES + FRAGMENT, '.txt'),
    ('README.md', PLAIN, '# A title\n' + TEXT, '.md'), ('get?format=txt', PLAIN, TEXT, '.txt'),
    ('get?file=a.html', PLAIN, TEXT, '.txt'), ('index.php?id=3', 'text/html', PAGE, '.html'),
    ('', 'text/html; charset=utf-8', PAGE, '.html'), ('page', '', PAGE, '.html'),
    ('page', 'application/xhtml+xml', '<?xml version="1.0"?>\n<!-- c -->\n' + PAGE, '.html'),
    ('page', 'TEXT/HTML', FRAGMENT, '.html'), ('v1.2', 'text/html', PAGE, '.html'),
    ('a.html', PLAIN, PAGE, '.html'), ('data.json', 'application/json', LINES, '.jsonl'),
    ('data.json', '', LINES, '.jsonl'), ('data', 'application/json', LINES, '.jsonl'),
    ('data', 'application/x-ndjson', LINES, '.jsonl'), ('data.jsonl', PLAIN, LINES, '.jsonl'),
    ('data.json', 'application/json', '[{"text": "an array"}]', '.json'),
    ('rows?format=json', 'application/json', '[\n {"text": "of lines"}\n]', '.json'),
    ('rows', '', '\ufeff{"text": "with a mark"}\n', '.jsonl'),
    ('rows', '', '{\n "text": "an object"\n}', '.json'),
    ('book', '', '[Illustration]\n\n{It is text.}\n' + TEXT, '.txt'),
    ('export?format=csv', 'text/csv', TABLE, '.csv'), ('a.csv', PLAIN, TABLE, '.csv'),
    ('a.txt', 'text/csv; header=present', TABLE, '.csv'), ('a.py', 'text/x-python', TEXT, '.py'),
    ('export', 'text/tab-separated-values', TABLE.replace(',', '\t'), '.tsv'),
    ('a.txt.gz', 'application/gzip', gzip.compress(TEXT.encode(), mtime=0), '.txt.gz'),
    ('file', 'application/x-gzip', gzip.compress(TEXT.encode(), mtime=0), '.txt.gz'),
    ('file', '', gzip.compress(LINES.encode(), mtime=0), '.jsonl.gz'),
    ('file', 'text/html', gzip.compress(PAGE.encode(), mtime=0), '.html.gz'),
    ('a.txt.gz', 'application/gzip', gzip.compress(TEXT.encode(), mtime=0)[:-20], '.txt.gz'),
    ('a.txt', PLAIN, '', '.txt'),
    ('table', 'application/vnd.apache.parquet', b'PAR1' + b'\0' * 20, '.parquet')]


@pytest.mark.parametrize('name,kind,body,suffix', SERVED)
def test_kind_of_what_is_served(tmp_path, name, kind, body, suffix):
    part = tmp_path / f'ab12-{name.partition("?")[0]}.part'
    part.write_bytes(body if isinstance(body, bytes) else body.encode())
    assert kind_of(part, kind) == suffix


@pytest.mark.parametrize('name,kind,body,expected', [
    ('ebooks/1342.txt.utf-8', UTF8, TEXT, TEXT), ('LICENSE', 'text/html', ANGLES, ANGLES),
    ('get?format=txt', PLAIN, TEXT, TEXT), ('blob', None, TEXT, TEXT),
    ('data.json', 'application/json', LINES, 'a first line of some words'),
    ('x.csv', 'text/csv', TABLE, 'of a, table'), ('p', 'text/html', PAGE, 'A page of words'),
    ('file', 'application/gzip', gzip.compress(TEXT.encode(), mtime=0), TEXT)])
def test_addresses(serve, monkeypatch, name, kind, body, expected):
    """The same without a network, the second time."""
    if kind == 'text/html' and body is PAGE:
        pytest.importorskip('trafilatura')
    address = serve(name, kind, body)
    settings = dict(name='it', val_fraction=0.0, near_duplicates=0.0)
    folder = build(address, **settings)
    assert decoded(folder)[0].startswith(expected)
    monkeypatch.setattr(download.requests, 'get', raising(NoNetwork()))
    before = snapshot('data')
    assert build(address, **settings) == folder and snapshot('data') == before
    shutil.rmtree(folder)
    assert decoded(build(address, **settings))[0].startswith(expected)


def test_packed_on_the_way(serve):
    """A server that packs although it was asked not to: its length is that of what it sends."""
    address = serve('a.txt', PLAIN, gzip.compress(TEXT.encode()), **{'Content-Encoding': 'gzip'})
    assert ''.join(decoded(build(address, name='it'))) == TEXT


@pytest.mark.parametrize('name,body,part', [
    ('a.txt', PAGE, 'the server sent an HTML page instead of'),
    ('1342.txt.utf-8', PAGE, 'the server sent an HTML page instead of'),
    ('a.json', ' \n<html><p>Log in', 'the server sent an HTML page instead of'),
    ('a.pdf', '%PDF-1.4\n1 0 obj\n', 'is PDF, which'), ('get', '{\\rtf1 a}', 'is RTF, which'),
    ('image', b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR', 'a binary file')])
def test_refused_addresses(serve, capsys, name, body, part):
    address = serve(name, 'text/html', body)
    message = stopped(capsys, lambda: build(address, name='it'))
    assert part in message and not list(Path('data').glob('[!.d]*'))


def test_a_suffix_for_addresses_only(serve, tmp_path):
    """Other downloads have the names that they were asked for."""
    address = serve('x', 'application/json', LINES)
    assert fetch('model/config.json', address, tmp_path) == tmp_path / 'model/config.json'
    assert fetch('model/x', address, tmp_path, any_kind=True) == tmp_path / 'model/x.jsonl'
    assert fetch('model/x', 'http://nowhere.invalid', tmp_path, any_kind=True).suffix == '.jsonl'


# ---------------------------------------------------------------------------------------------
# What this program made is no input

MADE = {'a dataset': ('meta.json', 'train-00000.bin', 'report.html', 'tokenizer.json'),
        'a run': ('log.jsonl', 'model.py', 'train.py', 'loss.png'),
        'a model': ('config.json', 'model.safetensors', 'README.md', 'tokenizer.json')}
RUN = ('log.jsonl', 'model.py', 'step-00000010/state.json', 'step-00000010/manifest.json')
SHARDED = ('config.json', 'model.safetensors.index.json', 'README.md')


@pytest.mark.parametrize('files', [*MADE.values(), RUN, SHARDED])
@pytest.mark.parametrize('place,where', [
    ('.', 'made'), ('.', 'a/b/made'), ('a', 'a/made'), ('*', 'made'), ('**/*', 'a/made'),
    ('**', 'a/made'), ('a/*/*', 'a/made'), ('a/**/*.*', 'a/b/made')])
def test_what_was_made_is_left_out(files, place, where, tmp_path):
    write('a/text.txt', TEXT)
    write('text.md', TEXT)
    for name in files:
        write(f'{where}/{name}', 'made')
    made = {}
    found, _ = find_files(place, print, (), made)
    assert {path.name for path in found} <= {'text.txt', 'text.md'}
    assert [Path(path).resolve() for path in made] == [tmp_path / where]
    kinds = {files: kind for kind, files in MADE.items()}
    assert made.popitem()[1] == kinds.get(files, 'a run' if files is RUN else 'a model')


def test_what_is_not_made_here():
    """Files with such a name are no sign of it; and what is named itself is read."""
    write('a/meta.json', '{}')
    write('a/log.jsonl', LINES)
    write('b/model.py', TEXT)
    write('b/config.json', '{}')
    names = [path.name for path in find_files('.', print)[0]]
    assert 'log.jsonl' in names and 'model.py' in names
    for name in MADE['a dataset']:
        write(f'made/{name}', TEXT)
    for place in ('made/report.html', 'made/*.html'):
        assert find_files(place, print)[0] == [Path('made/report.html')]


def test_text_in_data_prepared_twice(capsys):
    """Beside downloads, datasets, runs and what is half made; and the project's folder itself."""
    write('data/novel.txt', TEXT)
    write('data/sub/other.md', 'other ' + TEXT)
    write('data/downloads/austen/emma.txt', 'no ' + TEXT)
    write('data/.old_char.work/ready/report.html', 'no')
    write('out/base/log.jsonl', '{"event": "start"}\n')
    write('out/base/model.py', 'no')
    write('out/samples.txt', 'no')
    for place in ('data', 'data/', '.', './', 'data/*', 'data/**'):
        folder = build(place, val_fraction=0.0, near_duplicates=0.0, name='it')
        assert meta_of(folder)['n_inputs'] == 2 and 'no ' not in decoded(folder)[0]
        before = snapshot('data')
        capsys.readouterr()
        assert build(place, val_fraction=0.0, near_duplicates=0.0, name='it') == folder
        out = capsys.readouterr().out
        assert snapshot('data') == before and out.count('\n') == 1
        assert out.startswith('made by this program, so not read as text: ')
        assert 'data/downloads' in out and ('data/it (a dataset)' in out)
    assert 'out (' not in out
    build('.', name='it')
    assert 'out (of this program)' in capsys.readouterr().out


@pytest.mark.parametrize('place', ['out/base', 'out/base/'])
def test_a_run_is_no_text(place, capsys):
    write('out/base/log.jsonl', '{"event": "start"}\n')
    write('out/base/model.py', 'x = 1\n')
    assert 'no text files' in stopped_after_note(capsys, lambda: build(place))


def stopped_after_note(capsys, run) -> str:
    """The message of a stop after the line that says what was left out."""
    capsys.readouterr()
    with pytest.raises(Stop) as e:
        run()
    assert capsys.readouterr().out.startswith('made by this program')
    return e.value.message


# ---------------------------------------------------------------------------------------------
# A dataset is what its input holds, not how that is spelled

SPELLED = ['novel.txt', './novel.txt', 'sub/../novel.txt', '/novel.txt', 'link/novel.txt', '*.txt']


def spelled(name: str) -> str:
    return str(Path.cwd() / name[1:]) if name.startswith('/') else name


@pytest.mark.parametrize('first', SPELLED[:2])
@pytest.mark.parametrize('second', SPELLED)
def test_spelling_of_paths(first, second, tmp_path, capsys):
    """Of the text and of the files that settings name; also after the text has changed."""
    Path('sub').mkdir()
    Path('link').symlink_to('.')
    write('novel.txt', TEXT)
    write('v/val.txt', OTHER)
    write('v/bad.txt', 'badword\n')
    given = dict(name='it', validation='v/val.txt', bad_words='v/bad.txt',
                 decontaminate='v/bad.txt')
    folder = build(spelled(first), **given)
    before = snapshot(folder)
    other = dict(name='it', validation='./v/../v/val.txt', bad_words=f'{tmp_path}/v/bad.txt',
                 decontaminate='link/v/bad.txt')
    assert build(spelled(second), **other) == folder and snapshot(folder) == before
    if second != '*.txt':
        write('novel.txt', 'more ' + TEXT)
        build(spelled(second), **other)
        assert decoded(folder)[0].startswith('more ')


@pytest.mark.parametrize('first,second', [('books', 'books/'), ('books', './books'),
                                          ('books/', 'books/*.txt'), ('books/*', 'books'),
                                          ('books', 'books/a.txt,books/b.txt'), ('books', 'copy')])
def test_spelling_of_folders(first, second):
    write('books/a.txt', TEXT)
    write('books/b.txt', 'b ' + TEXT)
    shutil.copytree('books', 'copy')
    before = snapshot(folder := build(first, name='it'))
    assert build(second, name='it') == folder and snapshot(folder) == before


@pytest.mark.parametrize('inside', [True, False])
def test_a_project_that_moved(tmp_path, monkeypatch, inside):
    """Its dataset is the same; and so it is from another working directory."""
    text = write('old/novel.txt' if inside else 'novel.txt', TEXT)
    monkeypatch.chdir('old' if inside else Path('old').mkdir() or 'old')
    folder = build('novel.txt' if inside else '../novel.txt')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    os.rename('old', 'new')
    text = text.replace('old/', 'new/')
    folder = build(text, 'new/data')
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write(text, 'more ' + TEXT)
    monkeypatch.chdir('new')
    assert decoded(build('novel.txt' if inside else '../novel.txt'))[0][:5] == 'more '


def test_work_goes_on_however_the_path_is_spelled(monkeypatch, capsys):
    write('novel.txt', TEXT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr('core.data.build.finish', raising(KeyboardInterrupt()))
        build('novel.txt')
    os.rename('data/.novel_char.work', 'work')
    Path('sub/data').mkdir(parents=True)
    os.rename('work', 'sub/data/.novel_char.work')
    monkeypatch.chdir('sub')
    capsys.readouterr()
    build(str(Path('../novel.txt').resolve()))
    assert 'going on with what an earlier run has done' in capsys.readouterr().out


def test_the_same_bytes_read_otherwise(capsys):
    """By another suffix, another tokenizer or another rule: that is another dataset."""
    write('a.txt', LINES)
    write('a.jsonl', LINES)
    assert build('a.txt', name='it') == Path('data/it')
    build('a.jsonl', name='it')
    assert 'kinds of files changed' in capsys.readouterr().out
    assert decoded('data/it')[0].startswith('a first line')
    write('val.txt', OTHER)
    build('a.jsonl', name='it', validation='val.txt')
    assert 'and validation changed' in capsys.readouterr().out


def test_a_setting_of_a_dataset_spelled_otherwise(capsys):
    write('t.txt', TEXT)
    write('v.txt', OTHER)
    build('t.txt', validation='v.txt')
    assert build('t_char', validation='./v.txt') == Path('data/t_char')
    message = stopped(capsys, lambda: build('t_char', validation='t.txt'))
    assert message.startswith('data/t_char was made with validation=v.txt; ')


@pytest.mark.parametrize('model', ['.', './', '../here/.'])
def test_a_tokenizer_named_by_a_relative_path(model, tmp_path, monkeypatch):
    Path('here').mkdir()
    monkeypatch.chdir('here')
    assert named.tokenizer_label('x.txt', model, 0) == 'of-here'


# ---------------------------------------------------------------------------------------------
# A shared folder that must not be written to


@pytest.fixture
def read_only():
    """A folder, and a function after which nobody may write to it, but into what is called free."""
    with tempfile.TemporaryDirectory(dir='/tmp') as folder:
        os.chmod(folder, 0o755)

        def freeze():
            for path in [Path(folder), *Path(folder).rglob('*')]:
                path.chmod(0o777 if path.name == 'free' else 0o555 if path.is_dir() else 0o444)
            if os.getuid() == 0:
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                open(f'{folder}/x', 'w')

        yield Path(folder), freeze
        if os.getuid() == 0:
            os.seteuid(0)
        for path in [Path(folder), *Path(folder).rglob('*')]:
            path.chmod(0o755)


def test_a_dataset_in_a_read_only_folder(read_only, monkeypatch, capsys, small):
    folder, freeze = read_only
    monkeypatch.chdir(folder)
    write('novel.txt', TEXT)
    build('novel.txt')
    build('small')
    freeze()
    for name in ('novel.txt', 'novel_char', 'data/novel_char', str(folder / 'novel.txt')):
        assert build(name) == Path('data/novel_char')
    assert build('small') == Path('data/small')
    message = stopped(capsys, lambda: build('novel.txt', tokenizer='byte'))
    assert 'Permission denied; the dataset was not made' in message


@pytest.fixture
def small(monkeypatch):
    """A named dataset that needs no network."""
    path = Path(write('small.txt', TEXT)).resolve()
    monkeypatch.setitem(named.RECIPES, 'small', named.RECIPES['shakespeare']._replace(
        files=lambda downloads, max_files: ([path], [])))
    path.parent.chmod(0o755)
    path.chmod(0o644)


def test_a_model_in_read_only_downloads(read_only, monkeypatch):
    folder, freeze = read_only
    for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json', hub.COMPLETE):
        write(folder / 'org/one' / name, '{}')
        write(folder / 'org/two' / name, '{}')
    (folder / 'org/two' / hub.COMPLETE).unlink()
    os.mkdir(folder / 'here')
    monkeypatch.chdir(folder / 'here')
    freeze()
    assert hub.find('org/one', folder) == folder / 'org/one'
    assert hub.find('org/two', folder, weights=False) == folder / 'org/two'


def test_a_download_in_a_read_only_folder(read_only, serve):
    folder, freeze = read_only
    address = serve('x', PLAIN, TEXT)
    path = fetch('urls/x', address, folder, any_kind=True)
    freeze()
    assert fetch('urls/x', address, folder, any_kind=True) == path


def test_a_run_in_a_read_only_folder(read_only, run_train, monkeypatch):
    """It can be sampled, evaluated and exported elsewhere; nothing is written into it."""
    folder, freeze = read_only
    monkeypatch.chdir(folder)
    given = dict(max_steps=2, eval_interval=2, dataset='novel.txt', tokenizer='byte')
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None)  # no transformers
    write('novel.txt', TEXT * 5)
    run_train(**given, out_dir='out/x')
    os.mkdir('free')
    freeze()
    assert run_train(**given, out_dir='out/x', eval_only=True)['val_loss'] > 0
    for script, chosen in (sample, dict(prompt='It', max_new_tokens=3)), (
            export, dict(export_dir='free/hf')):
        for name, value in dict(run_dir='out/x', **chosen).items():
            monkeypatch.setattr(script, name, value)
        assert script.main()
    assert Path('free/hf/model.safetensors').is_file()


@pytest.mark.parametrize('error', [OSError(37, 'No locks available')])
def test_a_file_system_without_locks(error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(download.fcntl, 'flock', raising(error))
    for lock in (lambda: locked(tmp_path / '.lock'), lambda: checkpoint.lock(tmp_path)):
        with lock():
            assert 'cannot be locked (No locks available)' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Nobody reads what is printed


@pytest.fixture
def closed(monkeypatch):
    """Standard output and error are a pipe whose reader has gone, as under `2>&1 | head -1`."""
    def close(script):
        reader, writer = os.pipe()
        os.close(reader)
        stream = open(writer, 'w', buffering=1)
        for name in ('stdout', 'stderr'):
            monkeypatch.setattr(sys, name, stream)
        configure(vars(script) | {'CONFIG': '', 'FLAGS': (), 'GIVEN': ()}, [])
        return stream
    hook = sys.excepthook
    yield close
    sys.excepthook = hook


def test_preparing_outlives_its_reader(closed, monkeypatch):
    write('novel.txt', TEXT)
    closed(prepare)
    run_main(monkeypatch, dataset='novel.txt')
    assert ''.join(decoded('data/novel_char')) == TEXT


def test_planning_outlives_its_reader(closed, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['plan.py', str(ROOT / 'config/shakespeare.py')])
    closed(plan)
    assert plan.main()


def test_training_and_exporting_outlive_their_reader(closed, run_train):
    closed(train)
    assert run_train(max_steps=2, eval_interval=2, out_dir='out/x')['run_dir'] == 'out/x'
    assert Path('out/x/step-00000002/manifest.json').is_file()


@pytest.mark.parametrize('script', [prepare, train, export, plan, bench])
def test_a_full_disk_behind_stdout(script, capfd):
    stream = open('/dev/full', 'w')
    settings.outlive(stream, getattr(script, 'ENDS_WITH_STDOUT', False))
    for _ in range(3):
        print('x', file=stream, flush=True)
    assert capfd.readouterr().err.count('warning: /dev/full cannot be written: No space left') == 1


def test_sampling_ends_with_its_reader(closed, run_train, monkeypatch):
    run = run_train(max_steps=2, eval_interval=2, out_dir='out/x', tokenizer='byte')['run_dir']
    written = []
    monkeypatch.setattr(sample, 'run_dir', run)
    monkeypatch.setattr(sample, 'prompt', 'def')
    monkeypatch.setattr(sample, 'device', 'cpu')
    stream = closed(sample)
    write_stream = stream.write
    stream.write = lambda text: written.append(text) or write_stream(text)
    with pytest.raises(SystemExit) as e:
        sample.main()
    assert e.value.code == 0 and len(written) < 5


@pytest.mark.slow
@pytest.mark.parametrize('line', [
    'prepare.py python_char', 'prepare.py --help', 'plan.py config/shakespeare.py',
    'train.py --help', 'sample.py --help'])
def test_pipes_to_head(line):
    done = subprocess.run(f'{shlex.quote(sys.executable)} -u {ROOT}/{line} 2>&1 | head -c 1; '
                          'echo ${PIPESTATUS[0]}', shell=True, executable='/bin/bash',
                          capture_output=True, text=True, cwd=ROOT if 'plan' in line else None)
    assert done.stdout[1:] == '0\n' and not done.stderr
    if 'python_char' in line:
        assert decoded('data/python_char')


# ---------------------------------------------------------------------------------------------
# A system without file locks


def test_windows_is_told(monkeypatch, capsys):
    """Before any script has imported anything else that Windows lacks."""
    import core
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    with pytest.raises(SystemExit) as e:
        importlib.reload(core)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == '' and err.count('\n') == 1
    assert err.startswith('error: ') and 'Linux' in err and 'macOS' in err and 'WSL' in err


@pytest.mark.parametrize('script', ['prepare', 'model', 'train', 'sample', 'finetune', 'dpo',
                                    'export', 'plan', 'bench'])
def test_every_script_tells_it(script, monkeypatch, capsys):
    """None of them imports what Windows lacks before core."""
    for name in [name for name in sys.modules if name.partition('.')[0] in (
            'core', 'model', 'prepare', 'train', 'dpo', 'finetune', 'export', 'sample', 'bench')]:
        monkeypatch.delitem(sys.modules, name)
    for name in ('fcntl', 'resource', 'termios', 'pwd', 'grp'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / f'{script}.py'), run_name='__main__')
    assert e.value.code == 2 and capsys.readouterr().err.startswith('error: this system has no')


# ---------------------------------------------------------------------------------------------
# What prepare.py says comes next


@pytest.mark.parametrize('dataset,settings,config,flags', [
    ('a b.txt', {}, 'shakespeare', ['--dataset=a b_char']),
    ('a b.txt', dict(tokenizer='byte'), 'shakespeare', ['--dataset=a b_byte']),
    ('a b.txt', dict(tokenizer='bpe'), 'laptop',
     ['--dataset=a b_bpe4096', '--vocab_size=4096']),
    ('a b.txt', dict(tokenizer='bpe', vocab_size=300), 'laptop',
     ['--dataset=a b_bpe300', '--vocab_size=300']),
    ('a b.txt', dict(name="it's"), 'shakespeare', ["--dataset=it's"]),
    ('a b.txt', dict(data_dir='d e', name='python'), 'shakespeare', ['--dataset=d e/python']),
    ('a b.txt', dict(name='7b'), 'shakespeare', ['--dataset=7b']),
    ('shakespeare', {}, 'shakespeare', ['--dataset=shakespeare']),
    ('shakespeare', dict(tokenizer='bpe', vocab_size=1024), 'shakespeare_bpe',
     ['--dataset=shakespeare_bpe1024', '--vocab_size=1024']),
    ('shakespeare', dict(tokenizer='bpe', vocab_size=300), 'shakespeare_bpe',
     ['--dataset=shakespeare_bpe300', '--vocab_size=300']),
    ('austen', {}, 'austen', ['--dataset=austen']),
    ('austen', dict(tokenizer='char'), 'shakespeare', ['--dataset=austen_char']),
    ('tinystories', dict(max_files=1), 'laptop',
     ['--dataset=tinystories', '--vocab_size=4096'])])
def test_the_next_command(dataset, settings, config, flags, monkeypatch, capsys):
    """It can be given to a shell as it is, and trains on the dataset with a preset that fits."""
    path = Path(write('a b.txt', TEXT)).resolve()
    for name in ('shakespeare', 'austen', 'tinystories'):
        monkeypatch.setitem(named.RECIPES, name, named.RECIPES[name]._replace(
            files=lambda downloads, max_files: ([path], [])))
    for times in range(2):
        run_main(monkeypatch, dataset=dataset, **settings)
        out = capsys.readouterr().out
        assert ('is up to date: nothing was to be done' in out) == bool(times)
    python, script, preset, *found = shlex.split(out.splitlines()[-1].removeprefix('next: '))
    assert python == 'python' and Path(script).samefile(ROOT / 'train.py')
    assert Path(preset).samefile(ROOT / 'config' / f'{config}.py') and found == flags
    monkeypatch.syspath_prepend(ROOT)
    chosen = dict(vars(train))
    configure(chosen, [preset, *found])
    folder = build(chosen['dataset'], chosen['data_dir'], tokenizer=chosen['tokenizer'],
                   vocab_size=chosen['vocab_size'])
    assert meta_of(folder)['characters'] == len(TEXT)


@pytest.mark.parametrize('label,tokens,config,flag', [
    ('gpt2', 1e6, 'continue_gpt2', ''), ('gpt2', 2e8, '125m', ''),
    ('of-run', 1e6, 'continue_gpt2', "'--init_from=out/my run' --tokenizer=")])
def test_the_next_command_for_a_models_tokenizer(label, tokens, config, flag, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = named.next_command(Path('data/x'), {'tokenizer': label, 'source': '/x',
                                                'train_tokens': tokens}, 'out/my run')
    assert found == f'python train.py config/{config}.py --dataset=x {flag}'.rstrip()


@pytest.mark.parametrize('run', [
    lambda: named.find('my text.txt'), lambda: build('b/my text.txt'),
    lambda: build('my text_char', quality='c4')])
def test_names_with_spaces_are_quoted(run, capsys):
    write('my text.txt', TEXT)
    write('b/my text.txt', 'other ' + TEXT)
    if 'build' in run.__code__.co_names:
        build('my text.txt')
    message = stopped(capsys, run)
    line = message[message.index('python prepare.py'):].replace('<name>', 'name')
    words = shlex.split(line)
    assert words[:2] == ['python', 'prepare.py'] and words[2].endswith('my text.txt')
    assert all(word.startswith('--') for word in words[3:])
