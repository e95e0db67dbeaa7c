"""core/corpus.py and prepare.py: what is planted is found; kills and workers change nothing."""
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bench
import prepare
from core import corpus, planted
from core.clean import text_hash
from core.dataset import Tokens, open_shard
from core.tokenizer import load


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_jsonl(path, texts) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return str(path)


def documents_of(folder, *splits) -> list[str]:
    """The documents in the shards of a dataset."""
    tok, found = load(Path(folder) / 'tokenizer.json'), []
    for split in splits or ('train', 'val'):
        text = tok.decode(Tokens(folder, split).read(0, 10 ** 8))
        found += text.split('<|endoftext|>') if text else []
    return found


def prose(seed: int, n: int = 200) -> str:
    """n words that no other seed has in this order."""
    chance = random.Random(seed)
    words = [''.join(chance.choices('abcdefghijklmnop', k=chance.randrange(2, 9)))
             for _ in range(n)]
    return ' '.join(words) + '.\n'


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---------------------------------------------------------------------------------------------
# Duplicates, validation, weights


def test_planted_duplicates_passages_and_benchmark_items(monkeypatch, capsys):
    """20 MB; the table that the README has, from a corpus of which all is known."""
    for name, value in dict(what='data', corpus_mb=20).items():
        monkeypatch.setattr(bench, name, value)
    result = bench.main()
    for name, (hidden, removed, false) in result['found'].items():
        assert hidden >= 80 and removed / hidden >= 0.95, name
        assert removed / (removed + false) >= 0.99, name
    assert result['peak_mb'] < 1000
    assert 'of 84 with Jaccard 0.50 to 0.60' in capsys.readouterr().out


def test_the_first_of_equal_documents_stays():
    texts = [prose(1), prose(2), prose(1).upper().replace(' ', '\n '), prose(3), prose(2)]
    folder = prepare.build(write_jsonl('a.jsonl', texts), val_fraction=0.0)
    assert documents_of(folder, 'train') == [texts[0], texts[1], texts[3]]
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['steps']['without equal documents'][:3:2] == [5, 3]
    assert [where for where, _ in meta['examples']['equal documents']] == ['a.jsonl:3', 'a.jsonl:5']


def test_similar_to_validation_goes_from_training():
    """Whatever comes first; files that are given for validation are."""
    train = [prose(i) for i in range(5)]
    val = [prose(3), prose(4).replace('.', ' and more.'), prose(10)]
    folder = prepare.build(write_jsonl('train.jsonl', train),
                           validation=write_jsonl('val.jsonl', val))
    assert documents_of(folder, 'train') == train[:3]
    assert documents_of(folder, 'val') == val


def test_near_duplicates_can_stay():
    texts = [prose(1), prose(1).replace('.', ' and more.')]
    path = write_jsonl('a.jsonl', texts)
    assert len(documents_of(prepare.build(path, val_fraction=0.0))) == 1
    assert len(documents_of(prepare.build(path, val_fraction=0.0, near_duplicates=0.0))) == 2


def test_validation_of_many_documents():
    """Whole ones, about a tenth of the characters, spread over the sources; the same every time."""
    first = write_jsonl('a.jsonl', [prose(i, 50 + i) for i in range(300)])
    second = write_jsonl('b.jsonl', [prose(1000 + i, 100) for i in range(300)])
    folder = prepare.build(f'{first},{second}', name='both')
    val = documents_of(folder, 'val')
    sizes = [sum(map(len, documents_of(folder, split))) for split in ('val', 'train')]
    assert 0.095 < sizes[0] / sum(sizes) <= 0.1
    hashes = {text_hash(prose(i, 50 + i)) for i in range(300)}
    assert 10 < sum(text_hash(text) in hashes for text in val) < len(val) - 10
    assert not {*val} & {*documents_of(folder, 'train')}


def test_weights():
    first = write_jsonl('a.jsonl', [prose(i) for i in range(150)])
    second = write_jsonl('b.jsonl', [prose(1000 + i) for i in range(150)])
    folder = prepare.build(f'{first},{second}', name='both', weights='2.5,0.5', val_fraction=0.1)
    train, val = documents_of(folder, 'train'), documents_of(folder, 'val')
    times = {i: train.count(prose(i)) for i in [*range(150), *range(1000, 1150)]}
    assert {times[i] for i in range(150)} == {0, 2, 3}
    assert {times[i] for i in range(1000, 1150)} == {0, 1}
    assert 50 < sum(times[i] == 3 for i in range(150)) < 90
    assert 45 < sum(times[i] for i in range(1000, 1150)) < 90
    assert len(val) == len({*val}) and not {*val} & {*train}


@pytest.mark.parametrize('weights', ['1', '1,x', '1,0', '1,-1', '1,nan', '1,2,3'])
def test_bad_weights(weights, capsys):
    first, second = write_jsonl('a.jsonl', ['a']), write_jsonl('b.jsonl', ['b'])
    with pytest.raises(SystemExit) as e:
        prepare.build(f'{first},{second}', weights=weights)
    assert e.value.code == 2 and f'weights={weights}: must be 2 positive' in e.value.message


# ---------------------------------------------------------------------------------------------
# Rules


def test_rules_are_counted_or_applied():
    good = 'The cat sat on the mat and looked at all that we have to be. ' + prose(1, 80)
    short, symbols = 'nothing but these short words', prose(2, 80) + '# ' * 40
    path = write_jsonl('a.jsonl', [good, short, symbols])
    folder = prepare.build(path, val_fraction=0.0)
    assert documents_of(folder, 'train') == [good, short, symbols]
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['rules']['gopher: words'] == [1, 0] and meta['rules']['gopher: symbols'] == [1, 0]
    folder = prepare.build(path, val_fraction=0.0, quality='gopher')
    assert documents_of(folder, 'train') == [good]
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['rules']['gopher: words'] == [1, 1]
    assert meta['examples']['gopher: words'][0] == ['a.jsonl:2: 5', short]
    folder = prepare.build(path, val_fraction=0.0, quality='gopher', min_words=5, min_stop_words=0)
    assert documents_of(folder, 'train') == [good, short]


def test_c4_drops_lines():
    text = 'Home | About | Contact\n' + 'This is a good line of text. ' * 3 + '\nno end to this one'
    folder = prepare.build(write_jsonl('a.jsonl', [text]), val_fraction=0.0, quality='c4')
    assert documents_of(folder, 'train') == ['This is a good line of text. ' * 3 + '\n']


def test_masks():
    text = 'Write to jane.doe@example.org from 192.168.0.17 or call 555-123-4567 now.\n'
    path = write_jsonl('a.jsonl', [text])
    assert documents_of(prepare.build(path, val_fraction=0.0), 'train') == [text]
    folder = prepare.build(path, val_fraction=0.0, mask_pii=True)
    assert documents_of(folder, 'train') == [
        'Write to [e-mail address] from [IP address] or call [phone number] now.\n']
    assert 'jane' not in (folder / 'meta.json').read_text()
    assert 'jane' not in (folder / 'report.html').read_text()


def test_one_document_in_parts(monkeypatch):
    """It is cleaned part by part and joined again, with no end of text between."""
    monkeypatch.setattr(prepare.documents, 'LONGEST', 5000)
    monkeypatch.setattr(prepare, 'BATCH', 12_000)
    text = ''.join(prose(i, 1000) for i in range(10))
    Path('long.txt').write_text(text)
    folder = prepare.build('long.txt')
    assert ''.join(documents_of(folder)) == text
    assert text_hash(documents_of(folder, 'train')[0]) == text_hash(text[:int(len(text) * 0.9)])


# ---------------------------------------------------------------------------------------------
# Workers and kills


def prepare_command(*flags) -> list[str]:
    return [sys.executable, prepare.__file__, 'corpus', '--name=it', '--tokenizer=bpe',
            '--vocab_size=600', '--shard_tokens=100000', '--repeated_sentences=3',
            '--workers=2', *flags]


def make_corpus(megabytes: float) -> None:
    write_jsonl('corpus/made_up.jsonl', [
        text for kind, text, _ in planted.made_up(megabytes) if kind != 'benchmark'])
    Path('corpus/long.txt').write_text(''.join(prose(i, 20_000) for i in range(10)))


def test_any_number_of_workers(monkeypatch):
    make_corpus(2)
    monkeypatch.setattr(prepare, 'BATCH', 300_000)
    folders = [prepare.build('corpus', f'data{n}', 'it', 'bpe', 600, workers=n,
                             shard_tokens=300_000) for n in (1, 2, 3)]
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    assert len(open_shard(folders[0] / 'train-00001.bin')) == 300_000


def test_a_worker_that_is_killed(monkeypatch):
    make_corpus(1)
    monkeypatch.setattr(prepare, 'BATCH', 100_000)
    monkeypatch.setattr(prepare.clean, 'minhash', lambda _: prepare.os.kill(prepare.os.getpid(), 9))
    with pytest.raises(SystemExit) as e:
        prepare.build('corpus', workers=2)
    assert 'was killed' in e.value.message and not list(Path('data').glob('[!.]*'))


@pytest.mark.parametrize('kills', [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills):
    """The next run goes on; the result is the same to the byte, and no file is ever half there."""
    make_corpus(3)
    began = time.monotonic()
    subprocess.run(prepare_command('--data_dir=whole'), check=True, capture_output=True)
    seconds, whole = time.monotonic() - began, contents('whole/it')
    chance, killed, went_on = random.Random(0), 0, 0
    while killed < kills or not Path('data/it').exists():
        process = subprocess.Popen(prepare_command('--data_dir=data'), stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        try:
            limit = 600 if killed == kills else chance.uniform(0.25, 1.0) * seconds
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            out, _ = process.communicate()
            killed += 1
        else:
            assert process.returncode == 0
        went_on += 'going on' in out
        assert not Path('data/it').exists() or contents('data/it') == whole
        for path in Path('data/.it.work/ready').glob('*.bin'):
            assert path.read_bytes() == whole[path.name]
        for path in Path('data/.it.work').glob('*.json'):
            json.loads(path.read_text())
        if Path('data/it').exists() and killed < kills:
            prepare.shutil.rmtree('data/it')
    assert contents('data/it') == whole and went_on > 0
    assert not Path('data/.it.work').exists()


def test_shards_are_gone_on_with(monkeypatch):
    """After a kill while encoding, whole shards are not written again."""
    make_corpus(2)
    monkeypatch.setattr(prepare, 'BATCH', 200_000)
    given = dict(name='it', tokenizer='byte', shard_tokens=100_000)
    whole = contents(prepare.build('corpus', 'whole', **given))
    calls, flush = [], corpus.ShardWriter.flush

    def interrupted(self):
        calls.append(self.split)
        if len(calls) == 9:
            raise KeyboardInterrupt
        flush(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus.ShardWriter, 'flush', interrupted)
        prepare.build('corpus', **given)
    written = {path: path.stat().st_mtime_ns for path in Path('data/.it.work/ready').glob('*.bin')}
    assert len(written) >= 7
    folder = prepare.build('corpus', **given)
    assert contents(folder) == whole
    assert all((folder / path.name).stat().st_mtime_ns == t for path, t in written.items())


# ---------------------------------------------------------------------------------------------
# The named novels


@pytest.mark.skipif(not prepare.os.environ.get('DATA_MIRROR'), reason='needs DATA_MIRROR')
def test_austen(monkeypatch):
    """Nothing of the licence remains, odd encodings are right, all chapters are there."""
    mirror = Path(prepare.__file__).parent / prepare.os.environ['DATA_MIRROR']
    monkeypatch.setenv('DATA_MIRROR', str(mirror))
    novels = documents_of(prepare.build('austen'), 'train')
    novels[-1:] = [novels[-1] + documents_of('data/austen', 'val')[0],
                   *documents_of('data/austen', 'val')[1:]]
    assert len(novels) == 7
    for text in novels:
        assert not re.search('(?im)gutenberg|ebook|^produced by', text)
        assert '\ufffd' not in text and 'Ã' not in text
    chapters = [len(re.findall(r'^ *(?:CHAPTER|Chapter) +(?:[IVXLC]+|\d+)\.?', text, re.MULTILINE))
                for text in novels]
    assert chapters == [55, 0, 48, 31, 24, 61, 50]
    assert len(re.findall(r'^[IVXL]+$', novels[1], re.MULTILINE)) == 41  # letters of Lady Susan
    assert '_arrangé_' in novels[4] and '£' in novels[2] and novels[0].count('“') == 2099
