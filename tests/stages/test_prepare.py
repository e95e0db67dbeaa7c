"""prepare.py: from files, folders and named datasets to shards; what is refused; two at once."""
import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from conftest import stopped_at_last as stopped

import prepare
from core.data import named, recipes
from core.data.build import build
from core.data.dataset import Tokens
from core.data.recipes import Recipe
from core.read.download import NoNetwork
from core.settings import Stop
from core.text import tokenizer as tokenizers
from core.text.hf_tokenizer import tokenizer_json
from core.text.tokenizer import load

MIRROR = os.environ.get('DATA_MIRROR') and os.path.abspath(os.environ['DATA_MIRROR'])

TEXT = 'It was a dark and stormy night. Naïve 🎉!\n' * 5


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Everything happens in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('DATA_MIRROR', raising=False)


def write(path, text) -> str:
    """Write a file, its folders too, as it is."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def decoded(folder) -> tuple[str, str]:
    """What the splits say."""
    tok = load(Path(folder) / 'tokenizer.json')
    return tuple(tok.decode(Tokens(folder, split).read(0, 10 ** 7)) for split in ('train', 'val'))


def meta_of(folder) -> dict:
    return json.loads((Path(folder) / 'meta.json').read_text(encoding='utf-8'))


def subfolders(folder) -> list[str]:
    return [p.name for p in Path(folder).iterdir() if p.is_dir()]


def snapshot(folder) -> dict:
    """Every file below a folder with its time and content; lock files of no bytes left out."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(Path(folder).rglob('*'))
            if p.is_file() and not (p.name.endswith('.lock') and not p.stat().st_size)}


def refused(capsys, *args, **settings) -> str:
    """The message with which build stops; whatever was there before is as it was."""
    before = snapshot('.')
    message = stopped(capsys, lambda: build(*args, **settings))
    assert snapshot('.') == before
    return message


def run_main(monkeypatch, **settings) -> dict:
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(prepare, name, value)
        return prepare.main()


def raising(error):
    """A function that raises, whatever it is given."""
    def function(*_, **__):
        raise error
    return function


def refusing(path: str):
    """The function open, but for one file."""
    def opened(file, *rest, **more):
        if str(file) == path:
            raise PermissionError(13, 'Permission denied')
        return whole(file, *rest, **more)
    whole = open
    return opened


@pytest.fixture
def small_recipe(monkeypatch):
    """A named dataset that needs no network."""
    monkeypatch.setitem(named.RECIPES, 'small', recipe_of('small.txt', TEXT))


def recipe_of(path: str, text: str) -> Recipe:
    return Recipe('two lines', 'public domain', 'char',
                  lambda downloads, max_files: ([Path(write(path, text))], []))


# ---------------------------------------------------------------------------------------------
# Tokenizers


def test_bpe():
    """Learnt from the training part only; documents are encoded as they are, one by one."""
    texts = {'books/a.txt': 'spam and eggs, ' * 200, 'books/b.txt': 'eggs and spam! ' * 200,
             'books/c.txt': 'zyzzyva ' * 84}
    for path, text in texts.items():
        write(path, text)
    folder = build('books', tokenizer='bpe', vocab_size=300)
    tok = load(folder / 'tokenizer.json')
    assert folder == Path('data/books_bpe300') and tok.kind == 'bpe'
    assert not any(b'zyz' in token for token in tok.tokens)
    train, val = (Tokens(folder, split) for split in ('train', 'val'))
    cut = len(''.join(texts.values())) * 9 // 10 - 6000
    parts = [tok.encode(text) for text in (texts['books/a.txt'], texts['books/b.txt'],
                                           texts['books/c.txt'][:cut])]
    assert train.read(0, len(train)).tolist() == \
        [*parts[0], tok.eos, *parts[1], tok.eos, *parts[2]]
    assert val.read(0, len(val)).tolist() == tok.encode(texts['books/c.txt'][cut:])
    assert meta_of(folder)['tokenizer'] == 'bpe300'
    before = snapshot(folder)
    assert build('books', tokenizer='bpe', vocab_size=300) == folder
    assert snapshot(folder) == before
    assert build('books', tokenizer='bpe', vocab_size=280) == Path('data/books_bpe280')
    assert named.find('books', tokenizer='bpe', vocab_size=280) == Path('data/books_bpe280')


def test_bpe_of_too_little_text(capsys):
    folder = build(write('novel.txt', TEXT), tokenizer='bpe')
    assert folder.name == 'novel_bpe4096' and len(load(folder / 'tokenizer.json')) < 600
    assert 'no pair of them occurs twice' in capsys.readouterr().err


def test_tokenizer_of_a_model(monkeypatch):
    """A folder's tokenizer; another one there makes the dataset anew."""
    path, text = write('novel.txt', TEXT), 'the quick brown fox ' * 50
    for pattern in ('llama3', 'gpt2'):
        Path('m').mkdir(exist_ok=True)
        tok = tokenizers.BPETokenizer.train([text], 270, pattern)
        write('m/tokenizer.json', json.dumps(tokenizer_json(tok)))
        write('m/config.json', '{"eos_token_id": 265}')
        folder = build(path, tokenizer='./m')
        assert folder == Path('data/novel_of-m')
        assert load(folder / 'tokenizer.json').hash() == tok.hash()
        assert decoded(folder) == (TEXT[:len(TEXT) * 9 // 10], TEXT[len(TEXT) * 9 // 10:])


@pytest.mark.skipif(not MIRROR, reason='needs DATA_MIRROR')
def test_named_sets_with_their_tokenizers(monkeypatch):
    """Austen with its BPE, one novel a document, and Shakespeare with GPT-2's tokenizer."""
    monkeypatch.setenv('DATA_MIRROR', MIRROR)
    folder = build('austen')
    train, val = decoded(folder)
    documents = (train + val).split('<|endoftext|>')
    assert len(documents) == 7 and 'utenberg' not in train + val and '_arrangé_' in train
    assert [d.split()[0] for d in documents] == ['EMMA', 'LADY', 'MANSFIELD', 'NORTHANGER',
                                                 'Persuasion', 'PRIDE', 'SENSE']
    assert len(load(folder / 'tokenizer.json')) == 4096
    folder = build('shakespeare', tokenizer='gpt2')
    assert folder == Path('data/shakespeare_gpt2') and meta_of(folder)['vocab_size'] == 50261
    assert meta_of(folder)['train_tokens'] + meta_of(folder)['val_tokens'] == 338_025


def test_a_model_with_the_name_of_a_kind(small_recipe):
    """It neither replaces nor becomes the dataset of that kind."""
    tok = tokenizers.BPETokenizer.train([TEXT * 9], 270)
    write('char/tokenizer.json', json.dumps(tokenizer_json(tok)))
    write('char/config.json', '{}')
    before = snapshot(build('small'))
    assert build('small', tokenizer='./char') == Path('data/small_of-char')
    assert snapshot(build('small')) == before
    assert named.find('small', tokenizer='./char') == Path('data/small_of-char')
    assert named.find('small') == Path('data/small')
    assert named.count_tokens('small', 'out/bpe_run', 0) == 0
    assert named.count_tokens('austen', 'char', 0) == 0   # 4,096 are its BPE's


def test_a_dataset_with_another_tokenizer(capsys):
    build(write('novel.txt', TEXT))
    message = stopped(capsys, lambda: build('novel_char', tokenizer='bpe'))
    assert message.startswith('data/novel_char was made with tokenizer char, not with bpe4096')
    assert build('novel_char', tokenizer='char') == Path('data/novel_char')


def test_count_tokens(monkeypatch):
    """What plan.py knows of a tokenizer before there is one."""
    count = named.count_tokens
    assert count('x.txt', 'bpe', 500) == 500 and count('austen', '', 0) == 4096
    assert count('shakespeare', '', 0) == 70 and count('shakespeare', 'byte', 0) == 261
    assert count('openwebtext', '', 0) == count('x.txt', 'gpt2', 0) == 50_261
    assert count('x.txt', '', 0) == count('x.txt', 'org/name', 0) == 0
    if MIRROR:
        monkeypatch.setenv('DATA_MIRROR', MIRROR)
        folder = build('shakespeare')
        assert len(load(folder / 'tokenizer.json')) == count('shakespeare', '', 0)


@pytest.mark.parametrize('settings', [dict(tokenizer='bppe'), dict(tokenizer='nowhere/at/all'),
                                      dict(tokenizer='bpe', vocab_size=260), dict(vocab_size=500)])
def test_tokenizers_that_cannot_be(settings, monkeypatch, capsys):
    path = write('novel.txt', TEXT)
    message = stopped(capsys, lambda: run_main(monkeypatch, dataset=path, **settings))
    assert message.startswith(('tokenizer=', 'vocab_size=')) and not list(Path('.').glob('data/*/'))


# ---------------------------------------------------------------------------------------------
# What is made


@pytest.mark.parametrize('kind', ['char', 'byte'])
def test_file(kind, capsys):
    path = write('novel.txt', TEXT)
    folder = build(path, tokenizer=kind)
    assert folder == Path('data') / f'novel_{kind}'
    assert sorted(p.name for p in folder.iterdir()) == [
        'meta.json', 'report.html', 'tokenizer.json', 'train-00000.bin', 'val-00000.bin']
    cut = len(TEXT) * 9 // 10
    assert decoded(folder) == (TEXT[:cut], TEXT[cut:])
    meta = meta_of(folder)
    assert meta['val_tokens'] == len(TEXT[cut:] if kind == 'char' else TEXT[cut:].encode())
    assert f'{meta["train_tokens"]:,} tokens to train on' in capsys.readouterr().out
    assert subfolders('data') == [folder.name]


def test_meta():
    folder = build(write('novel.txt', TEXT), tokenizer='byte', val_fraction=0.2)
    meta, n = meta_of(folder), len(TEXT)
    one = hashlib.sha256(TEXT.encode()).hexdigest()
    for key, value in dict(
            name='novel_byte', about='text from novel.txt', source=str(Path('novel.txt').resolve()),
            tokenizer='byte', sha256=hashlib.sha256(one.encode()).hexdigest(), documents=1,
            characters=n, bytes=len(TEXT.encode()), vocab_size=256 + 5, max_id=max(TEXT.encode()),
            train_tokens=len(TEXT[:n * 8 // 10].encode()),
            val_tokens=len(TEXT[n * 8 // 10:].encode()), lengths=[[128, 256, 1]],
            inputs=[{'file': 'novel.txt', 'bytes': len(TEXT.encode()), 'sha256': one}],
            frequent=[[' ', 40], ['a', 25], ['t', 15]], bad=[], bytes_per_token=1.0).items():
        assert (meta[key][:3] if key == 'frequent' else meta[key]) == value, key
    assert meta['settings']['val_fraction'] == 0.2 and meta['settings']['near_duplicates'] == 0.7
    assert meta['steps']['without near duplicates'] == [1, n, 1, n]
    assert 'unknown' in meta['licence']


def test_folder():
    """Text files of all levels, in the order of their names; documents kept apart."""
    texts = {'books/b.txt': 'second' * 5, 'books/a.md': 'first!' * 5, 'books/c/d.TXT': 'third.' * 5,
             'books/cover.jpg': b'\xff\xd8\0', 'books/e.rst': 'fourth' * 5}
    for path, text in texts.items():
        write(path, text)
    folder = build('books')
    assert folder == Path('data/books_char')
    train, val = decoded(folder)
    documents = (train + val).split('<|endoftext|>')
    assert documents == ['first!' * 5, 'second' * 5, 'third.' * 5, 'fourth' * 5]
    assert val == 'fourth' * 2  # the last 10% of 120 characters, separators not counted
    ids = Tokens(folder, 'train').read(0, 1000).tolist()
    tok = load(folder / 'tokenizer.json')
    assert [i for i, t in enumerate(ids) if t == tok.special['<|endoftext|>']] == [30, 61, 92]
    meta = meta_of(folder)
    assert (meta['documents'], meta['characters'], meta['train_tokens']) == (4, 120, 111)
    assert meta['max_id'] == tok.special['<|endoftext|>']
    assert [f['file'] for f in meta['inputs']] == [
        'books/a.md', 'books/b.txt', 'books/c/d.TXT', 'books/e.rst']


def test_separators_lie_in_the_split_they_end():
    for letter in 'xyz':
        write(f'books/{letter}.txt', letter * 10)
    folder = build('books', val_fraction=0.5)
    assert decoded(folder) == ('x' * 10 + '<|endoftext|>' + 'y' * 5,
                               'y' * 5 + '<|endoftext|>' + 'z' * 10)
    folder = build(write('a.txt', 'a<|endoftext|>b\n' * 9))  # in a text, it stays text
    assert meta_of(folder)['max_id'] < meta_of(folder)['vocab_size'] - 5


def test_no_validation():
    folder = build(write('novel.txt', TEXT), val_fraction=0.0)
    assert decoded(folder) == (TEXT, '') and meta_of(folder)['val_tokens'] == 0


def test_several_shards_and_blocks(monkeypatch):
    monkeypatch.setattr(tokenizers.blocks, '__defaults__', (7,))
    folder = build(write('novel.txt', TEXT), tokenizer='byte', shard_tokens=50)
    assert ''.join(decoded(folder)) == TEXT
    assert len(list(folder.glob('train-*.bin'))) == -(-meta_of(folder)['train_tokens'] // 50)


def test_marks_and_line_ends():
    folder = build(write('dos.txt', b'\xef\xbb\xbfone\r\ntwo\r\n\r\n'))
    assert ''.join(decoded(folder)) == 'one\ntwo\n\n'


def test_replaced_bytes_are_counted(capsys):
    path = write('latin.txt', b'caf\xe9 and na\xefve; \xef\xbf\xbd was there before\n')
    folder = build(path, errors='replace', encoding='utf-8')
    assert ''.join(decoded(folder)) == 'caf\ufffd and na\ufffdve; \ufffd was there before\n'
    assert meta_of(folder)['counts']['U+FFFD'] == 3 and 'U+FFFD: 3' in capsys.readouterr().out


def test_empty_files_of_a_folder_are_left_out(capsys):
    write('books/a.txt', ' \n')
    write('books/b.txt', TEXT)
    folder = build('books')
    assert 'not empty: 2 -> 1 documents' in capsys.readouterr().out
    assert meta_of(folder)['documents'] == 1 and ''.join(decoded(folder)) == TEXT


def test_main(monkeypatch, capsys):
    meta = run_main(monkeypatch, dataset=write('novel.txt', TEXT), tokenizer='byte', name='mine')
    assert meta == meta_of('data/mine') and meta['name'] == 'mine'
    assert capsys.readouterr().out.endswith('--dataset=mine\n')


# ---------------------------------------------------------------------------------------------
# What is there already


def test_reused_while_the_text_is_the_same(capsys):
    path = write('novel.txt', TEXT)
    before = snapshot(folder := build(path))
    capsys.readouterr()
    for dataset in (path, 'novel_char', 'data/novel_char/'):
        assert build(dataset) == folder
    write(path, TEXT)  # a new time, the same text
    assert build(path) == folder
    assert snapshot(folder) == before and capsys.readouterr().out == ''


def test_reused_however_the_path_is_written():
    path = write('novel.txt', TEXT)
    before = snapshot(folder := build(path))
    for same in ('./novel.txt', str(Path(path).resolve())):
        assert build(same) == folder and snapshot(folder) == before


def test_made_again_when_the_text_changed(capsys):
    path = write('novel.txt', TEXT)
    folder = build(path)
    write(path, TEXT + 'The end; 第一.\n')
    capsys.readouterr()
    assert build(path) == folder
    assert 'sha256 changed' in capsys.readouterr().out
    assert ''.join(decoded(folder)) == TEXT + 'The end; 第一.\n'
    build(path, val_fraction=0.5)
    assert 'val_fraction changed' in capsys.readouterr().out
    assert meta_of(folder)['settings']['val_fraction'] == 0.5


def test_another_text_of_the_same_name(capsys):
    build(write('a/novel.txt', TEXT))
    path = Path(write('b/novel.txt', 'other ' + TEXT)).resolve()
    message = refused(capsys, 'b/novel.txt')
    assert f'made from {Path("a/novel.txt").resolve()}, not from {path}' in message
    assert f'python prepare.py {path} --name=' in message
    assert build('b/novel.txt', name='second') == Path('data/second')


@pytest.mark.parametrize('name', ['novel', 'downloads', '.'])
def test_a_folder_that_is_not_ours_is_never_replaced(capsys, name):
    """With --name=novel, the text itself would be in the way."""
    write('data/novel/chapter.txt', TEXT)
    write('data/downloads/large.bin', b'\0')
    assert name in refused(capsys, 'data/novel', name=name)


def test_name_of_a_named_dataset(small_recipe):
    assert build('small') == Path('data/small')
    before = snapshot('data/small')
    assert build('small') == build('small', tokenizer='char') == Path('data/small')
    assert build('small', tokenizer='byte') == Path('data/small_byte')
    assert snapshot('data/small') == before
    assert build('small', name='other') == Path('data/other')
    assert ''.join(decoded('data/other')) == TEXT


def test_one_name_for_two_named_datasets(small_recipe, monkeypatch, capsys):
    build('small', tokenizer='byte', name='mine')
    monkeypatch.setitem(named.RECIPES, 'other', recipe_of('b.txt', 'another text\n'))
    message = refused(capsys, 'other', tokenizer='byte', name='mine')
    assert 'small' in message and '--name=' in message


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize('raw,parts', [
    (b'', ['empty']),
    (b'\xef\xbb\xbf \r\n\t', ['empty']),
    (b'abc\0def', ['binary', 'offset 3', '--skip_bad']),
    ('é'.encode() * 3 + b'\xe9 \xe9', ['invalid UTF-8', 'byte offset 6', '0xe9', '--errors=']),
    (b'\xef\xbb\xbfab\xff', ['invalid UTF-8', 'byte offset 5'])])  # the mark included
def test_unusable_file(capsys, raw, parts):
    path = write('novel.txt', raw)
    write('books/novel.txt', raw)
    for dataset, file in ((path, path), ('books', 'books/novel.txt')):
        message = stopped(capsys, lambda: build(dataset))
        assert message.startswith((f'{file}: ', str(Path(dataset).resolve())))
        for part in parts:
            assert part in message, message
        assert [path for path in Path('data').iterdir() if path.name[0] != '.'] == []
    write('books/good.txt', TEXT)
    folder = build('books', skip_bad=True)
    assert ''.join(decoded(folder)) == TEXT
    assert len(meta_of(folder)['bad']) == (parts != ['empty'])


def test_folder_without_text(capsys):
    write('books/cover.jpg', b'\xff\xd8\0')
    message = refused(capsys, 'books')
    assert message.startswith('books: no text files (.txt, ') and 'but 1 others' in message
    Path('void').mkdir()
    assert 'void: no text files' in refused(capsys, 'void')


def test_unreadable_file(capsys, monkeypatch):
    path = write('novel.txt', TEXT)
    monkeypatch.setattr('builtins.open', refusing(path))
    message = stopped(capsys, lambda: build(path))
    assert message.startswith('novel.txt: cannot be read (Permission denied)')
    assert not list(Path('data').glob('[!.]*'))


def test_unknown_dataset(capsys):
    message = refused(capsys, 'shakespear')
    for part in ("dataset 'shakespear': ", 'shakespeare,', 'python_char', 'openwebtext', 'data/'):
        assert part in message
    assert 'python_char' in refused(capsys, '')
    assert list(Path('.').iterdir()) == []


def test_openwebtext_is_not_started_unasked(capsys):
    message = refused(capsys, 'openwebtext')
    assert '80 x 303 MB' in message and 'python prepare.py openwebtext --max_files=80' in message
    assert list(Path('.').iterdir()) == []


@pytest.mark.parametrize('settings', [
    {'val_fraction': 1.0}, {'val_fraction': -0.1}, {'shard_tokens': 0}, {'tokenizer': 'word'},
    {'errors': 'ignore'}])
def test_settings_out_of_range(capsys, monkeypatch, settings):
    (name, value), = settings.items()
    settings['dataset'] = write('novel.txt', TEXT)
    message = stopped(capsys, lambda: run_main(monkeypatch, **settings))
    assert message.startswith(f'{name}={value}: must be ') and not Path('data').exists()


def test_interrupted(monkeypatch):
    """A run that is killed leaves no dataset; the next one is not disturbed by its remains."""
    path = write('novel.txt', TEXT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizers.Tokenizer, 'save', raising(KeyboardInterrupt()))
        build(path)
    assert list(Path('data').glob('[!.]*')) == []
    assert ''.join(decoded(build(path))) == TEXT and subfolders('data') == ['novel_char']


# ---------------------------------------------------------------------------------------------
# Named datasets, and two processes at once


def test_python_char(monkeypatch, capsys):
    meta = run_main(monkeypatch, dataset='python_char')
    assert meta['name'] == 'python_char' and meta['source'] == 'python_char'
    assert meta['tokenizer'] == load('data/python_char/tokenizer.json').kind == 'byte'
    assert meta['documents'] > 100 and meta['bytes'] > 2_000_000 and 'PSF' in meta['licence']
    assert meta['max_id'] == 256 and meta['n_inputs'] >= meta['documents']
    train, val = decoded('data/python_char')
    assert 0.89 < len(train) / len(train + val) < 0.91 and '\nimport ' in train


def test_no_network(monkeypatch, capsys):
    problem = NoNetwork('https://host/input.txt cannot be reached (ConnectionError)')
    monkeypatch.setattr(recipes, 'fetch', raising(problem))
    with pytest.raises(NoNetwork):
        build('shakespeare')  # for train.py's fallback
    message = stopped(capsys, lambda: run_main(monkeypatch, dataset='shakespeare'))
    for part in ("'shakespeare'", 'https://host/', 'cannot be reached', 'DATA_MIRROR',
                 '--dataset=python_char'):
        assert part in message, message
    assert snapshot('data') == {}


MIRROR = os.environ.get('DATA_MIRROR') and os.path.abspath(os.environ['DATA_MIRROR'])


@pytest.mark.skipif(not MIRROR or not Path(MIRROR, 'shakespeare.txt').is_file(),
                    reason='DATA_MIRROR names no directory with shakespeare.txt')
def test_shakespeare(monkeypatch):
    monkeypatch.setenv('DATA_MIRROR', MIRROR)
    meta = run_main(monkeypatch, dataset='shakespeare')
    assert (meta['tokenizer'], meta['vocab_size'], meta['licence']) == (
        'char', 65 + 5, 'public domain')
    assert (meta['train_tokens'], meta['val_tokens']) == (1_003_854, 111_540)
    assert decoded('data/shakespeare')[0].startswith('First Citizen:\nBefore we proceed')
    assert subfolders('data') == ['shakespeare']


def build_together(barrier, path, data_dir):
    barrier.wait(60)
    build(path, data_dir, tokenizer='byte')


def test_two_processes_at_once(tmp_path, capfd):
    path = write(tmp_path / 'novel.txt', TEXT * 5000)
    context = multiprocessing.get_context('spawn')
    barrier = context.Barrier(2)
    both = [context.Process(target=build_together, args=(barrier, path, str(tmp_path / 'data')))
            for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    out = capfd.readouterr().out
    assert out.count('tokens to train on') == 1 and 'made again' not in out  # one waited
    assert ''.join(decoded(tmp_path / 'data' / 'novel_byte')) == TEXT * 5000
    assert subfolders(tmp_path / 'data') == ['novel_byte']


# ---------------------------------------------------------------------------------------------
# Odd input


def test_one_bad_row_of_many(capsys):
    """The rows after it are read; without the flag the command stops, also the next time."""
    rows = [f'{i},row number {i} of the table' for i in range(20)]
    rows[5] = '5'
    path = write('a.csv', 'id,text\n' + '\n'.join(rows))
    folder = build(path, skip_bad=True, near_duplicates=0.0)
    assert meta_of(folder)['documents'] == 19 and len(meta_of(folder)['bad']) == 1
    with pytest.raises(Stop):
        build(path, skip_bad=False)
    assert 'a.csv:7: 1 columns, not 2 (id, text)' in capsys.readouterr().err


def test_train_keeps_the_settings_of_a_dataset():
    path = write('t.txt', TEXT + 'Write to me@example.org.\n' * 3)
    build(path, mask_pii=True)
    write(path, TEXT + 'Write to you@example.org.\n' * 4)
    assert 'example' not in ''.join(decoded(build(path)))     # as train.py calls it


def test_a_changed_benchmark(capsys):
    item = 'one two three four five six seven eight nine ten eleven twelve thirteen fourteen'
    path = write('t.txt', 'a ' * 300 + item + ' z' * 300)
    write('bench.txt', 'nothing that this text has in common with any other text of this test\n')
    given = dict(decontaminate='bench.txt')
    assert item in ''.join(decoded(build(path, **given)))
    write('bench.txt', item)
    assert item not in ''.join(decoded(build(path, **given)))
    assert meta_of('data/t_char')['steps']['without benchmark items'][2] == 2
    write('bench.txt', 'too short\n')
    build(path, **given)
    assert '1 of 1 texts have fewer than 8 words' in capsys.readouterr().err


def test_odd_names(monkeypatch, capsys):
    """Brackets and commas in names, the folder itself, bytes that are no UTF-8, globs."""
    for name in ('a[1].txt', 'p,q.txt', 'caf\udce9.txt'):
        write(f'odd/{name}', f'{ascii(name)} ' + TEXT)
    assert build('odd/a[1].txt') == Path('data/a[1]_char')
    both = build('odd/p,q.txt,odd/a[1].txt')
    assert len(''.join(decoded(both)).split('<|endoftext|>')) == 2
    assert meta_of(build('odd/*.txt'))['n_inputs'] == 3
    monkeypatch.chdir('odd')
    folder = build('.')
    before = snapshot(folder)
    assert folder == Path('data/odd_char') and build('.') == folder     # not with data/
    assert snapshot(folder) == before


def test_text_beside_a_meta_json():
    """Of somebody else: that does not make the folder a dataset."""
    write('my/meta.json', '{}')
    write('my/a.txt', TEXT)
    assert ''.join(decoded(build('my'))) == TEXT


def test_a_dataset_of_other_settings(monkeypatch, capsys):
    build(write('t.txt', TEXT))
    monkeypatch.setattr(prepare, 'GIVEN', ('quality',))
    message = stopped(capsys, lambda: run_main(monkeypatch, dataset='t_char', quality='gopher'))
    assert message.startswith('data/t_char was made with quality=; to change that, give ')


@pytest.mark.parametrize('settings,part', [
    (dict(validation='nope.txt'), 'validation=nope.txt: no such file'),
    (dict(validation='t.txt'), 'nothing is left to train on'),
    (dict(encoding='hex'), 'encoding=hex: no encoding'),
    (dict(bad_words='nope'), 'bad_words=nope: no such file'),
    (dict(decontaminate='nope'), 'decontaminate=nope: no such file'),
    (dict(data_dir='t.txt'), 't.txt'), (dict(name='x' * 300), 'File name too long'),
    (dict(dataset='openwebtext,t.txt'), 'openwebtext ('),
    (dict(dataset='pipe'), 'pipe: not a regular file')])
def test_one_line_for_each(settings, part, monkeypatch, capsys):
    write('t.txt', TEXT)
    os.mkfifo('pipe')
    message = stopped(capsys, lambda: run_main(monkeypatch, **{'dataset': 't.txt', **settings}))
    assert part in message
    assert not Path('data').is_dir() or not list(Path('data').glob('[!.]*'))


def test_disk_full(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, 'No space left on device', 'data/x')
    monkeypatch.setattr('numpy.savez', full)
    message = stopped(capsys, lambda: build(write('t.txt', TEXT)))
    assert message.startswith('data/x: No space left on device')


def test_two_books_in_one_file():
    book = ('*** START OF THE PROJECT GUTENBERG EBOOK A ***\n\n{0}\n\n'
            '*** END OF THE PROJECT GUTENBERG EBOOK A ***\nlicence\n')
    text = 'header\n' + book.format(TEXT) + 'header\n' + book.format('Other ' + TEXT)
    train, val = decoded(build(write('two.txt', text)))
    assert (train + val).split('\n\n\n') == [TEXT.strip(), f'Other {TEXT}']
