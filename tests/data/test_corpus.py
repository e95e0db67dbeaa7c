"""core/data/corpus.py and prepare.py: what is planted is found; kills change nothing."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare
from core.data import corpus
from core.data.build import build
from core.data.dataset import Tokens, open_shard
from core.text import clean
from core.text.clean import text_hash
from core.text.tokenizer import load
from core.text.words import word_hashes
from dev import bench_data


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


@pytest.mark.parametrize('megabytes', [4, pytest.param(20, marks=pytest.mark.slow)])
def test_planted_duplicates_and_benchmark_items(monkeypatch, capsys, megabytes):
    """The table of docs/data.md (20 MB), from a corpus of which all is known."""
    monkeypatch.setattr(bench_data, 'corpus_mb', megabytes)
    result = bench_data.main()
    for name, (hidden, removed, false) in result['found'].items():
        assert hidden >= 4 * megabytes and removed / hidden >= 0.95, name
        assert removed / (removed + false) >= 0.99, name
    assert result['peak_mb'] < 1000
    out = capsys.readouterr().out
    assert f'of {84 if megabytes == 20 else 16} with Jaccard 0.50 to 0.60' in out
    assert 'documents' in out and 'python ' not in out and 'report.html' not in out     # it is gone


def test_the_first_of_equal_documents_stays():
    texts = [prose(1), prose(2), prose(1).upper().replace(' ', '\n '), prose(3), prose(2)]
    folder = build(write_jsonl('a.jsonl', texts), val_fraction=0.0)
    assert documents_of(folder, 'train') == [texts[0], texts[1], texts[3]]
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['steps']['without equal documents'][:3:2] == [5, 3]
    assert [where for where, _ in meta['examples']['equal documents']] == ['a.jsonl:3', 'a.jsonl:5']


def test_similar_to_validation_goes_from_training():
    """Whatever comes first; files that are given for validation are."""
    train = [prose(i) for i in range(5)]
    val = [prose(3), prose(4).replace('.', ' and more.'), prose(10)]
    folder = build(write_jsonl('train.jsonl', train),
                   validation=write_jsonl('val.jsonl', val))
    assert documents_of(folder, 'train') == train[:3]
    assert documents_of(folder, 'val') == val


def test_near_duplicates_can_stay():
    texts = [prose(1), prose(1).replace('.', ' and more.')]
    path = write_jsonl('a.jsonl', texts)
    assert len(documents_of(build(path, val_fraction=0.0))) == 1
    assert len(documents_of(build(path, val_fraction=0.0, near_duplicates=0.0))) == 2


def test_validation_of_many_documents():
    """Whole ones, about a tenth of the characters, spread over the sources; the same every time."""
    first = write_jsonl('a.jsonl', [prose(i, 50 + i) for i in range(300)])
    second = write_jsonl('b.jsonl', [prose(1000 + i, 100) for i in range(300)])
    folder = build(f'{first},{second}', name='both')
    val = documents_of(folder, 'val')
    sizes = [sum(map(len, documents_of(folder, split))) for split in ('val', 'train')]
    assert 0.095 < sizes[0] / sum(sizes) <= 0.1
    hashes = {text_hash(prose(i, 50 + i)) for i in range(300)}
    assert 10 < sum(text_hash(text) in hashes for text in val) < len(val) - 10
    assert not {*val} & {*documents_of(folder, 'train')}


def test_weights():
    first = write_jsonl('a.jsonl', [prose(i) for i in range(150)])
    second = write_jsonl('b.jsonl', [prose(1000 + i) for i in range(150)])
    folder = build(f'{first},{second}', name='both', weights='2.5,0.5', val_fraction=0.1)
    train, val = documents_of(folder, 'train'), documents_of(folder, 'val')
    times = {i: train.count(prose(i)) for i in [*range(150), *range(1000, 1150)]}
    assert {times[i] for i in range(150)} == {0, 2, 3}
    assert {times[i] for i in range(1000, 1150)} == {0, 1}
    assert 50 < sum(times[i] == 3 for i in range(150)) < 90
    assert 45 < sum(times[i] for i in range(1000, 1150)) < 90
    assert len(val) == len({*val}) and not {*val} & {*train}


def near(text: str, i: int) -> str:
    """A near copy: one word in forty is another one, a different one for each i."""
    words = text.split()
    words[i % 40::40] = [f'copy{i}'] * len(words[i % 40::40])
    return ' '.join(words) + '\n'


def shares(folder) -> tuple[list[str], list[str], float]:
    """Documents to train and to validate on, and the part of the characters that validates."""
    train, val = (documents_of(folder, split) for split in ('train', 'val'))
    sizes = [sum(map(len, texts)) for texts in (train, val)]
    return train, val, sizes[1] / sum(sizes)


def like(texts: list[str], others: list[str], low: float) -> int:
    """How many of the texts have a similar one among the others, by comparing all with all."""
    sets = [[clean.shingles(word_hashes(text)[0], 3) for text in some]
            for some in (texts, others)]
    return sum(any(clean.jaccard(mine, other) >= low for other in sets[1]) for mine in sets[0])


@pytest.mark.parametrize('settings', [{'weights': '3'}, *(
    pytest.param(settings, marks=pytest.mark.slow) for settings in (
        {}, {'weights': '0.5'}, {'workers': 2}, {'val_fraction': 0.3}))])
def test_share_of_validation_with_many_copies(settings):
    """A share of what stays, whatever the number of copies, and nothing like it in training."""
    texts = [near(prose(i), j) for j in range(5) for i in range(120)]
    folder = build(write_jsonl('a.jsonl', texts), **settings)
    train, val, share = shares(folder)
    wanted = settings.get('val_fraction', 0.1) * 120
    assert abs(len(val) - wanted) <= 1 and len({*val}) == len(val) and like(val, train, 0.5) == 0
    assert len({*train}) + len(val) == 120 or settings.get('weights') == '0.5'
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['leakage'] == {'0.7': 0, '0.5': 0}


def test_leakage_is_measured():
    """Similar documents below the threshold stay on both sides, and are counted."""
    half = lambda i: ' '.join(prose(i % 120).split()[:150] + prose(1000 + i).split()[:50])
    texts = [half(i) for i in range(240)]       # in pairs with a similarity of 0.6
    folder = build(write_jsonl('a.jsonl', texts))
    train, val, _ = shares(folder)
    meta = json.loads((folder / 'meta.json').read_text())
    assert len(train) + len(val) == 240 and meta['leakage']['0.7'] == 0 == like(val, train, 0.7)
    assert 0.5 * like(val, train, 0.5) < meta['leakage']['0.5'] <= like(val, train, 0.5)
    folder = build('a.jsonl', name='off', near_duplicates=0.0)
    assert json.loads((folder / 'meta.json').read_text())['leakage'] == {}


def test_equal_copies_are_one_document():
    """With near_duplicates=0, too; few documents in many copies are few."""
    texts = [prose(i % 150) for i in range(450)]
    train, val, share = shares(build(write_jsonl('a.jsonl', texts), near_duplicates=0.0))
    assert len(train) == 135 and len(val) == 15
    train, val, share = shares(build(write_jsonl('b.jsonl', texts[:20] * 10)))
    assert abs(share - 0.1) < 0.001 and len(train) + len(val) <= 21


def test_copies_of_given_validation_go_from_training():
    """Near copies of it, in any number; what differs in a symbol only is no copy."""
    val = [prose(i) for i in range(10)] + ['a = 3 + 4']
    train = [near(text, j) for text in val[:10] for j in range(5)] + [
        *(prose(i) for i in range(20, 40)), 'a = 3 - 4', 'a = 3 + 4']
    folder = build(write_jsonl('train.jsonl', train),
                   validation=write_jsonl('val.jsonl', val))
    assert documents_of(folder, 'train') == train[50:-1] and documents_of(folder, 'val') == val


SIZES = {'a giant': [120_000] + [360] * 149, 'two giants': [54_000, 180_000] + [300] * 130,
         'steps': [120_000, *[24_000] * 5, *[240] * 145], 'equal': [600] * 150,
         'doubling': [60 * 2 ** min(12, i // 10) for i in range(140)],
         'growing': list(range(120, 1320, 6))}


@pytest.mark.parametrize('fraction', [0.1, 0.02, 0.5])
@pytest.mark.parametrize('kind', SIZES)
def test_share_of_validation_whatever_the_sizes(kind, fraction):
    """The share is met within a document of median size, and most small ones are trained on."""
    sizes = np.array(SIZES[kind])
    rows = np.zeros(len(sizes), corpus.DOCUMENT)
    for seed in range(5):
        chance = np.random.default_rng(seed)
        rows['characters'] = chance.permutation(sizes)
        rows['hash'] = chance.permutation(len(sizes))
        stays, none = np.ones(len(sizes), bool), np.zeros(1, bool)
        val, cuts = corpus.choose_validation(rows, stays, none, set(), 0.7, fraction)
        chars = rows['characters'].astype(int)
        got = chars[val].sum() + sum(chars[i] - at for i, at in cuts.items())
        assert abs(got - fraction * chars.sum()) <= max(np.median(chars), 1 + len(cuts))
        small = chars <= np.median(chars)
        # where sizes differ by thousands, all small ones are no more than the last gap
        assert kind == 'doubling' or (val & small).sum() <= max(1, (fraction + 0.12) * small.sum())


def test_a_giant_document_and_small_ones():
    texts = [prose(0, 20_000), *(prose(i, 60) for i in range(1, 150))]
    train, val, share = shares(build(write_jsonl('a.jsonl', texts)))
    assert abs(share - 0.1) < 0.005 and 130 <= len(train) <= 140
    giants = [max(some, key=len) for some in (train, val)]
    assert ''.join(giants) == texts[0] and {*train, *val} - {*giants} == {*texts[1:]}


def test_a_long_document_is_one(monkeypatch):
    """Though it comes in more parts than would be many documents."""
    monkeypatch.setattr('core.read.documents.LONGEST', 1000)
    Path('long.txt').write_text(text := prose(0, 20_000))
    train, val, share = shares(build('long.txt'))
    assert abs(share - 0.1) < 1e-4 and ''.join(train + val) == text


def test_all_alike_can_be_split():
    """Small records whose words are the same are no duplicates; validation is not empty."""
    texts = [f'{a} x = {b} y {c} z' for a in '+-*/%' for b in '<>!&|' for c in '+-*/%^']
    folder = build(write_jsonl('a.jsonl', texts))
    train, val, share = shares(folder)
    assert sorted(filter(None, train + val)) == sorted(texts) and 0 < len(val) < 20
    leak = json.loads((folder / 'meta.json').read_text())['leakage']
    assert leak['0.7'] == len(val) == like(val, train, 0.7)


SUMS = [f'{name} = {a} {sign} {b}' for name in 'ab' for a in range(5) for b in range(5)
        for sign in '+-*/']
CODE = [f'def f(a, b):\n    if a {less} b:\n        return a {sign} b\n{space}return b {sign} a\n'
        for less in ('<', '>', '<=') for sign in '+-*/' for space in ('    ', '        ')]


@pytest.mark.parametrize('texts', [
    SUMS, CODE, [f'return a {sign} b' for sign in '+-*/%&|^'],
    ['c1ccccc1', 'C1CCCCC1', 'c1ccncc1', 'C1CCNCC1', 'CO', 'Co'], ['3<5', '3>5', '3 < 5'],
    ['मैं कल घर गया था।', 'मैं कल घर गई थी।', 'मैं कल घर जाऊँगा।', 'मैं कल घर जाऊँगी।'],
    ['x \u2264 y', 'x \u2265 y'], ['{"a": 1}', '{"a": -1}', '["a", 1]'], ['!!!', '???', '...'],
    ['SELECT a FROM t WHERE b = 1', 'SELECT a FROM t WHERE b <> 1'], ['Yes.', 'Yes?', 'yes']])
def test_short_texts_that_differ_in_symbols_or_case_stay(texts):
    for flags in ({}, {'near_duplicates': 0.0, 'name': 'equal'}):
        folder = build(write_jsonl('a.jsonl', texts * 2), **flags)
        assert sorted(documents_of(folder)) == sorted(texts) or len(texts) < 100 and sorted(
            ''.join(documents_of(folder))) == sorted(''.join(texts))


@pytest.mark.parametrize('change,goes', [
    (lambda text: text.replace('value', 'number', 1), True), (lambda text: text.upper(), False),
    (lambda text: '# a licence\n' + text, True), (lambda text: text.replace(' + ', ' - '), False)])
def test_near_copies_of_code(change, goes):
    """Long texts that are rich in symbols are compared with all their symbols."""
    code = ''.join(f'def f{i}(a, value):\n    x = a + value + {i} + a + value + x + a\n'
                   f'    return x + a[{i}]\n\n' for i in range(40))
    folder = build(write_jsonl('a.jsonl', [code, change(code)]), val_fraction=0.0)
    assert len(documents_of(folder)) == 2 - goes


@pytest.mark.parametrize('settings,texts,words', [
    ({'quality': 'c4'}, ['Home\nAbout us and more\n' * 30 + 'This is one whole line of text.\n'
                         * 5] * 3, 'c4: lines.*Home'),
    ({'quality': 'gopher'}, [prose(i, 30) for i in range(9)], 'gopher: words.*a.jsonl:1: 30'),
    ({}, [near(prose(1), i) for i in range(9)], 'without near duplicates.*a.jsonl:2'),
    ({}, [prose(1)] * 9, 'without equal documents.*a.jsonl:2'),
    ({}, [prose(i) for i in range(9)], '')])
def test_loss_of_more_than_half_is_loud(settings, texts, words, capsys, monkeypatch):
    """Of any source: the step or rule is named, with the share and an example."""
    other = write_jsonl('b.jsonl', [prose(i, 400) for i in range(100, 150)])
    for measure in ('stop_words', 'sentences'):
        monkeypatch.setitem(clean.LIMITS, measure, (None, None))
    build(f'{write_jsonl("a.jsonl", texts)},{other}', name='it', **settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if 'characters went' in line]
    assert bool(lines) == bool(words)
    assert not words or re.search(f'a.jsonl: ([6-9].|100)%.*{words}', lines[0])


@pytest.mark.parametrize('weights', ['1', '1,x', '1,0', '1,-1', '1,nan', '1,2,3'])
def test_bad_weights(weights, capsys):
    first, second = write_jsonl('a.jsonl', ['a']), write_jsonl('b.jsonl', ['b'])
    with pytest.raises(SystemExit) as e:
        build(f'{first},{second}', weights=weights)
    assert e.value.code == 2 and f'weights={weights}: must be 2 positive' in e.value.message


# ---------------------------------------------------------------------------------------------
# Rules


def test_rules_are_counted_or_applied(capsys, monkeypatch):
    good = 'The cat sat on the mat and looked at all that we have to be. ' + prose(1, 80)
    short, symbols = 'nothing but these short words', prose(2, 80) + '# ' * 40
    path = write_jsonl('a.jsonl', [good, short, symbols])
    folder = build(path, val_fraction=0.0)
    assert documents_of(folder, 'train') == [good, short, symbols]
    assert json.loads((folder / 'meta.json').read_text())['rules'] == {}    # that cost nothing
    folder = build(path, val_fraction=0.0, count_quality=True)
    assert documents_of(folder, 'train') == [good, short, symbols]
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['rules']['gopher: words'] == [1, 0] and meta['rules']['gopher: symbols'] == [1, 0]
    assert 'outside of' not in capsys.readouterr().out      # what nobody asked for is no news
    folder = build(path, val_fraction=0.0, quality='gopher')
    assert documents_of(folder, 'train') == [good]
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['rules']['gopher: words'] == [1, 1]
    assert meta['examples']['gopher: words'][0] == ['a.jsonl:2: 5', short]
    monkeypatch.setitem(clean.LIMITS, 'words', (5, None))
    monkeypatch.setitem(clean.LIMITS, 'stop_words', (0, None))
    folder = build(path, 'other', val_fraction=0.0, quality='gopher')
    assert documents_of(folder, 'train') == [good, short]


def test_c4_drops_lines():
    text = 'Home | About | Contact\n' + 'This is a good line of text. ' * 3 + '\nno end to this one'
    folder = build(write_jsonl('a.jsonl', [text]), val_fraction=0.0, quality='c4')
    assert documents_of(folder, 'train') == ['This is a good line of text. ' * 3 + '\n']
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['rules']['c4: lines'] == [1, 0]
    assert meta['examples']['c4: lines'] == [['a.jsonl:1', 'Home | About | Contact']]


def test_c4_drops_blank_lines():
    """Which are outside of no rule."""
    lines = [f'This is sentence number {i} of them.\n' for i in range(4)]
    folder = build(write_jsonl('a.jsonl', ['\n'.join(lines)]), val_fraction=0.0, quality='c4')
    assert documents_of(folder, 'train') == [''.join(lines)]
    assert 'c4: lines' not in json.loads((folder / 'meta.json').read_text())['rules']


def test_masks():
    text = 'Write to jane.doe@example.org from 192.168.0.17 or call 555-123-4567 now.\n'
    path = write_jsonl('a.jsonl', [text])
    assert documents_of(build(path, val_fraction=0.0), 'train') == [text]
    folder = build(path, val_fraction=0.0, mask_pii=True)
    assert documents_of(folder, 'train') == [
        'Write to [e-mail address] from [IP address] or call [phone number] now.\n']
    assert 'jane' not in (folder / 'meta.json').read_text()
    assert 'jane' not in (folder / 'report.html').read_text()


def test_one_document_in_parts(monkeypatch):
    """It is cleaned part by part and joined again, with no end of text between."""
    monkeypatch.setattr('core.read.documents.LONGEST', 5000)
    monkeypatch.setattr('core.data.build.BATCH', 12_000)
    text = ''.join(prose(i, 1000) for i in range(10))
    Path('long.txt').write_text(text)
    folder = build('long.txt')
    assert ''.join(documents_of(folder)) == text
    assert text_hash(documents_of(folder, 'train')[0]) == text_hash(text[:int(len(text) * 0.9)])


# ---------------------------------------------------------------------------------------------
# Workers and kills


def prepare_command(*flags) -> list[str]:
    return [sys.executable, prepare.__file__, 'corpus', '--name=it', '--tokenizer=bpe',
            '--vocab_size=600', '--shard_tokens=100000',
            '--workers=2', *flags]


def make_corpus(megabytes: float) -> None:
    write_jsonl('corpus/made_up.jsonl', [
        text for kind, text, _ in bench_data.made_up(megabytes) if kind != 'benchmark'])
    Path('corpus/long.txt').write_text(''.join(prose(i, 20_000) for i in range(10)))


def test_any_number_of_workers(monkeypatch):
    make_corpus(1)
    monkeypatch.setattr('core.data.build.BATCH', 300_000)
    folders = [build('corpus', f'data{n}', 'it', 'bpe', 600, workers=n,
                     shard_tokens=300_000) for n in (1, 2, 3)]
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    assert len(open_shard(folders[0] / 'train-00001.bin')) == 300_000


def test_a_worker_that_is_killed(monkeypatch):
    make_corpus(1)
    monkeypatch.setattr('core.data.build.BATCH', 100_000)
    monkeypatch.setattr(clean, 'minhash', lambda _: os.kill(os.getpid(), 9))
    with pytest.raises(SystemExit) as e:
        build('corpus', workers=2)
    assert 'was killed' in e.value.message and not list(Path('data').glob('[!.]*'))


@pytest.mark.parametrize('kills', [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills):
    """The next run goes on; the result is the same to the byte, and no file is ever half there."""
    make_corpus(1)
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
            shutil.rmtree('data/it')
    assert contents('data/it') == whole and (went_on > 0 or kills == 1)
    assert not Path('data/.it.work').exists()


def test_shards_are_gone_on_with(monkeypatch):
    """After a kill while encoding, whole shards are not written again."""
    make_corpus(1)
    monkeypatch.setattr('core.data.build.BATCH', 200_000)
    given = dict(name='it', tokenizer='byte', shard_tokens=100_000)
    whole = contents(build('corpus', 'whole', **given))
    calls, flush = [], corpus.ShardWriter.flush

    def interrupted(self):
        calls.append(self.split)
        if len(calls) == 9:
            raise KeyboardInterrupt
        flush(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus.ShardWriter, 'flush', interrupted)
        build('corpus', **given)
    written = {path: path.stat().st_mtime_ns for path in Path('data/.it.work/ready').glob('*.bin')}
    assert len(written) >= 7
    folder = build('corpus', **given)
    assert contents(folder) == whole
    assert all((folder / path.name).stat().st_mtime_ns == t for path, t in written.items())


# ---------------------------------------------------------------------------------------------
# The named novels


@pytest.mark.skipif(not os.environ.get('DATA_MIRROR'), reason='needs DATA_MIRROR')
def test_austen(monkeypatch):
    """Nothing of the licence remains, odd encodings are right, all chapters are there."""
    mirror = Path(prepare.__file__).parent / os.environ['DATA_MIRROR']
    monkeypatch.setenv('DATA_MIRROR', str(mirror))
    novels = documents_of(build('austen'), 'train')
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
