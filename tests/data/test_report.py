"""core/data/report.py: the page that says what was removed, and the counts that it is made of."""
import html.parser
import json
import random

import pytest

import prepare
from core.data.report import Tally, allowed, write_report
from core.settings import settings_of
from core.text.clean import LIMITS

EVIL = '</pre><script src="http://evil.example/x.js">alert(1)</script><a href=\'//x\'>&amp;\n'
META = {
    'name': 'my_texts_bpe4096', 'about': 'text from <my> & "your" texts/', 'licence': 'unknown <i>',
    'source': '/texts', 'tokenizer': 'bpe4096', 'vocab_size': 4096, 'max_id': 4000,
    'documents': 12_345, 'characters': 6_789_012, 'bytes': 6_789_999, 'train_tokens': 1_600_000,
    'val_tokens': 400_000, 'bytes_per_token': 3.4567, 'gpt2_bytes_per_token': 4.5678,
    'steps': {'not empty': [20_001, 9_000_003, 20_000, 9_000_000],
              'without equal documents': [20_000, 9_000_000, 12_345, 6_789_012]},
    'leakage': {'0.7': 0, '0.5': 12_321},
    'rules': {'gopher: words': [77, 0], 'gopher: symbols': [1_078, 1_078], 'c4: sentences': [9, 9]},
    'counts': {'U+FFFD': 31_337, 'encoding: <b>': 2, 'masked: nothing': 0},
    'examples': {'gopher: words': [[f'a.txt<{i}>: 3', f'example {i} {EVIL}'] for i in range(3)],
                 EVIL: [[EVIL, EVIL]]},
    'bad': [f'{EVIL}{i}' for i in range(30)], 'n_bad': 30,
    'lengths': [[64, 128, 1_234], [128, 256, 0], [256, 512, 11_111]],
    'frequent': [['the', 200_000], ['\n', 1_001], [EVIL, 1]],
    'n_inputs': 1_500, 'input_bytes': 9_876_543_210,
    'inputs': [{'file': f'{EVIL}{i}.txt', 'bytes': 65_432, 'sha256': 'abcdef' * 10 + '0123'}
               for i in range(3)],
    'settings': {**settings_of(vars(prepare)), 'quality': 'gopher', 'encoding': EVIL},
}


class Page(html.parser.HTMLParser):
    """All tags and attributes of a page, and the text in its cells; tags must be balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.rows = [], [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        assert tag not in ('p', 'pre', 'td', 'th', 'title') or tag not in self.open
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')
        if tag != 'meta':
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ''
        self.texts[tag] = self.texts.get(tag, '') + data
        if tag in ('td', 'th'):
            self.rows[-1][-1] += data


def page_of(tmp_path, **changes) -> Page:
    path = tmp_path / 'report.html'
    write_report(path, {**META, **changes})
    text = path.read_text(encoding='utf-8')
    assert text.startswith('<!DOCTYPE html>\n')
    return Page(text)


def test_page_is_whole_and_has_no_references(tmp_path):
    page = page_of(tmp_path)
    assert not {'script', 'a', 'img', 'link', 'iframe', 'i', 'b'} & {*page.tags}
    assert not {'src', 'href', 'xlink:href', 'onload'} & {name for name, _ in page.attributes}
    assert not any('http' in (value or '') or '//' in (value or '') for _, value in page.attributes)
    assert 'url(' not in page.texts['style'] and '@import' not in page.texts['style']
    assert ('charset', 'utf-8') in page.attributes


def test_texts_are_shown_as_they_are(tmp_path):
    page = page_of(tmp_path)
    assert page.texts['h1'] == META['name'] and page.texts['title'].startswith(META['name'])
    assert META['about'] in page.texts['p']
    for i in range(3):
        assert f'example {i} {EVIL}' in page.texts['pre']
        assert f'a.txt<{i}>: 3' in page.texts['div']
    assert EVIL in page.texts['h3'] and ['encoding', EVIL] in page.rows
    assert ['encoding: <b>', '2'] in page.rows and [repr(EVIL), '1', '0.00%'] in page.rows
    assert [f'{EVIL}0'] in page.rows


def test_numbers(tmp_path):
    page = page_of(tmp_path)
    for row in (
            ['documents', '12,345'], ['characters', '6,789,012'],
            ['tokens to train on', '1,600,000'], ['tokens to validate on', '400,000'],
            ['tokenizer', 'bpe4096, 4,096 tokens'], ['bytes per token', '3.457'],
            ["bytes per token of GPT-2's tokenizer on the same text", '4.568'],
            ['licence', 'unknown <i>'],
            ['not empty', '20,001', '20,000', '9,000,003', '9,000,000', '100.00%'],
            ['without equal documents', '20,000', '12,345', '9,000,000', '6,789,012', '75.43%'],
            ['gopher: words', '50 to 100,000', '77', '0'],
            ['gopher: symbols', 'at most 0.1', '1,078', '1,078'],
            ['c4: sentences', 'at least 3', '9', '9'], ['U+FFFD', '31,337'],
            ['64 to 127', '1,234', '10.00%'], ['128 to 255', '0', '0.00%'],
            ['256 to 511', '11,111', '90.00%'], ["'the'", '200,000', '10.00%'],
            ["'\\n'", '1,001', '0.05%'],
            ['shingle_words', '3'], ['quality', 'gopher']):
        assert row in page.rows
    assert ['masked: nothing', '0'] not in page.rows
    texts = ' '.join(page.texts.values())
    for part in ('applied: gopher.', 'cannot be read: 30', '1,500 files, 9,876,543,210 bytes',
                 'the first of them', '65,432', 'abcdefabcdefabcd…'):
        assert part in texts
    assert sum(row[0].startswith(EVIL) for row in page.rows if len(row) == 1) == 20


def test_largest_rule_comes_first(tmp_path):
    rows = [row[0] for row in page_of(tmp_path).rows if row[0].startswith(('gopher: ', 'c4: '))]
    assert rows == ['gopher: symbols', 'gopher: words', 'c4: sentences']


def test_where_there_is_nothing_to_tell(tmp_path):
    page = page_of(tmp_path, rules={}, counts={}, examples={}, bad=[], frequent=[], n_inputs=3,
                   gpt2_bytes_per_token=None, settings={**META['settings'], 'quality': '',
                                                           'count_quality': True},
                   lengths=[[1, 2, 1]])
    assert 'applied: none.' in page.texts['p'] and 'cannot be read' not in page.texts['p']
    assert ['no document lies outside of any rule', '', '0', '0'] in page.rows
    assert 'not measured' in page.texts['td'] and 'the first of them' not in page.texts['p']


def test_names_that_are_no_unicode(tmp_path):
    """os.listdir gives a byte of a file's name that is no UTF-8 as a lone surrogate."""
    inputs = [{'file': 'caf\udce9.txt', 'bytes': 1, 'sha256': ''}]
    page = page_of(tmp_path, inputs=inputs, bad=['caf\udce9.txt: cannot be read'])
    assert 'caf' in page.texts['td']


@pytest.mark.parametrize('limits,expected', [
    ((50, 100_000), '50 to 100,000'), ((None, 0.3), 'at most 0.3'), ((None, 0), 'at most 0'),
    ((0, None), 'at least 0'), ((0, 0), '0 to 0')])
def test_allowed(limits, expected, monkeypatch):
    monkeypatch.setitem(LIMITS, 'x', limits)
    assert allowed('x') == expected


# ---------------------------------------------------------------------------------------------
# Counting


def test_tally():
    tally = Tally()
    tally.step('a', ['xx', 'y'], ['xx'])
    tally.step('a', ['zzz'], [])
    tally.rule('words', True, 'a.txt:1', 'text ' * 100, '3')
    tally.rule('words', False, 'a.txt:2', 'text', '4')
    assert tally.steps == {'a': [3, 6, 1, 2]} and tally.rules == {'words': [2, 1]}
    assert tally.examples == {'words': [['a.txt:1: 3', 'text ' * 60], ['a.txt:2: 4', 'text']]}


def happen(rng, tally: Tally) -> None:
    """Something or other is counted."""
    name = rng.choice('abc')
    texts = ['x' * rng.randint(0, 9) for _ in range(rng.randint(0, 3))]
    tally.step(name, texts, texts[1:])
    tally.counts[name] += len(texts)
    if rng.random() < 0.5:
        tally.rule(name, rng.random() < 0.5, f'file {rng.random()}', name, '0')
    if rng.random() < 0.3:
        tally.bad.append(f'bad {rng.random()}')


def test_parts_add_up_to_the_whole():
    """Also if they were on disk in between, as JSON."""
    for seed in range(20):
        rng, whole, total = random.Random(seed), Tally(), Tally()
        for _ in range(rng.randint(0, 6)):
            part, n = Tally(), rng.randint(0, 5)
            before = rng.getstate()
            for _ in range(n):
                happen(rng, part)
            rng.setstate(before)
            for _ in range(n):
                happen(rng, whole)
            total.add(json.loads(json.dumps(vars(part))))
        assert vars(total) == vars(whole)
        assert list(total.steps) == list(whole.steps)
        assert all(len(found) <= 3 for found in total.examples.values())


def test_what_was_added_is_not_changed_later():
    part, total = Tally(), Tally()
    part.step('a', ['x'], [])
    part.bad.append('bad')
    total.add(vars(part))
    total.step('a', ['x'], [])
    total.bad.append('worse')
    assert part.steps == {'a': [1, 1, 0, 0]} and part.bad == ['bad']
