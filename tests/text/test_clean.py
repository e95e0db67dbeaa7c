"""core/text/clean.py: every measure by hand, every method against a slow one that does the same."""
import random
import re
import textwrap
import time
import zlib
from collections import Counter
from itertools import product

import numpy as np
import pytest

from core.text import clean
from core.text.clean import mask, outside, strip_gutenberg
from core.text.tokenizer import normalize
from core.text.words import (
    MARKED_WORD,
    WORD,
    lower,
    ngram_hashes,
    repeats,
    word_hashes,
    word_pattern,
)

BOOK = '''The Project Gutenberg EBook of Tales, by A. Writer

This eBook is for the use of anyone anywhere at no cost

Character set encoding: {encoding}

*** START OF {this} PROJECT GUTENBERG EBOOK TALES,
AND MORE ***



Produced by An Anonymous Volunteer
and another one



TALES

by A. Writer

It was night. *** The End of the world was near.

End of the line.



End of the Project Gutenberg EBook of Tales, by A. Writer

*** END OF {this} PROJECT GUTENBERG EBOOK TALES ***

***** This file should be named 1.txt *****
Project Gutenberg-tm License
'''
STORY = '''TALES

by A. Writer

It was night. *** The End of the world was near.

End of the line.
'''


def test_header_licence_and_credits_go():
    for this in ('THIS', 'THE'):
        assert strip_gutenberg(BOOK.format(this=this, encoding='UTF-8')) == STORY


def test_other_texts_stay():
    for text in ('', STORY, '*** START OF THIS PROJECT GUTENBERG EBOOK X ***\nno end\n'):
        assert strip_gutenberg(text) == text


# ---------------------------------------------------------------------------------------------
# Normalization and masks


@pytest.mark.parametrize('text,form,expected', [
    ('\ufeffa\r\nb\rc\0d\n\r', '', 'a\nb\ncd\n\n'), ('a\ufeffb', 'NFKC', 'a\ufeffb'),
    ('e\u0301', 'NFC', 'é'), ('e\u0301', 'NFKC', 'é'), ('e\u0301', '', 'e\u0301'),
    ('ﬁ ²', 'NFC', 'ﬁ ²'), ('ﬁ ²', 'NFKC', 'fi 2'), ('', 'NFC', '')])
def test_normalize(text, form, expected):
    assert normalize(text, form) == expected == normalize(expected, form)


@pytest.mark.parametrize('text,expected', [
    ('Write to a.b+c@mail.example.org.', 'Write to [e-mail address].'),
    ('<x_y-z@müller.de>, 1@2.eu', '<[e-mail address]>, [e-mail address]'),
    ('at 10.0.0.1, 255.255.255.255.', 'at [IP address], [IP address].'),
    ('2001:db8:0:0:8:800:200C:417A', '[IP address]'),
    ('http://192.168.1.20:80/', 'http://[IP address]:80/'),
    ('Call 555-123-4567.', 'Call [phone number].'), ('(555) 123-4567', '[phone number]'),
    ('+1 555 123 4567, 555.123.4567', '[phone number], [phone number]'),
    ('020 7946 0958\n', '[phone number]\n'), ('0171234567', '[phone number]'),
    ('05 62 04 87 64 ou 044 668 18 00', '[phone number] ou [phone number]'),
    ('(0341) 49604, (0341)4960412, 09061701461', '[phone number], [phone number], [phone number]'),
    ('+33 (0)3 85 89 24 11, 13360487647', '[phone number], [phone number]'),
    ('8 (483) 396-94-77', '[phone number]'), ('555-123-4567x123', '[phone number]')])
def test_mask(text, expected):
    found, counts = mask(text)
    assert found == expected
    assert +counts == Counter(re.findall(r'\[(.+?)\]', expected))


@pytest.mark.parametrize('text', [
    '', 'a@localhost', '@app.route', 'a @ b.c', 'Python 3.11.7', 'v1.2.3.4', '1.2.3.4a',
    '1.2.3.4.5', 'lib-a1.2.3.4', '256.1.1.1', '1.1.1.256', '2024-01-15', '15.01.2024',
    '01/02/2003', '1914-1918', '12:30 2024-01-15 10:00', '$1,234,567.89', '1.234,56 €',
    '1 000 000 people', '12,345,678', '3.14159265', '1234567890', '0123456789', '100-200',
    '01.02.2003 12:30', '01-02-2003 12:30', '01 02 03', '12:30:45:50', '00:1b:44:11:3a:b7',
    '01 02 03 04 05 06 07 08', '0.0123456789',
    '0.5-1.0', 'x123-456-7890', '555-123-4567-8', 'ISBN 978-0-306-40615-7'])
def test_mask_leaves_other_numbers(text):
    assert mask(text)[0] == text


@pytest.mark.parametrize('text', [
    '12 345 678 people', '10.000.000 Euro', 'in 1999 2000 2001', 'pages 100 200 300'])
def test_mask_leaves_large_numbers_and_lists_of_numbers(text):
    assert mask(text)[0] == text


@pytest.mark.parametrize('unit', ['a.', '1-', '+1', '(12', 'a@', '12 ', 'a@b.'])
def test_mask_takes_time_in_proportion(unit):
    began = time.perf_counter()
    mask(unit * 10_000)
    assert time.perf_counter() - began < 0.4


# ---------------------------------------------------------------------------------------------
# Words and hashes


@pytest.mark.parametrize('text,words', [
    ("It's 2 o'clock, Émile!", "it s 2 o clock émile"), ('', ''), (' ... \n', ''),
    ('学而时习之，不亦说乎', '学 而 时 习 之 不 亦 说 乎'), ('猫はcat3匹', '猫 は cat3 匹'),
    ('ИВАН ΣΑΣ', 'иван σας'), ('모든 인간', '모든 인간'), ('DİYARBAKIR', 'diyarbakir')])
def test_words(text, words):
    hashes, lengths = word_hashes(text)
    assert hashes.tolist() == word_hashes(words)[0].tolist()
    assert lengths.tolist() == [len(word) for word in words.split()]


def test_lower_keeps_every_character_in_its_place():
    text = 'İa İB\u0130 ẞ Ǆ'
    assert len(text.lower()) > len(text) == len(clean.lower(text))
    assert all(a in b.lower() for a, b in zip(clean.lower(text), text))
    assert clean.lower('AÉß') == 'aéß'


def test_equal_ngrams_have_equal_hashes():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 3, 3000).astype(np.uint64)
    for n in (1, 2, 5, 13):
        grams = [tuple(words[i:i + n].tolist()) for i in range(len(words) - n + 1)]
        hashes = ngram_hashes(words, n).tolist()
        assert len(hashes) == len(grams)
        assert len(set(zip(grams, hashes))) == len(set(grams)) == len(set(hashes))
    assert len(ngram_hashes(words[:4], 5)) == 0


def test_different_ngrams_have_different_hashes():
    columns = np.array(list(product(range(10), repeat=5)), np.uint64).T
    hashes = ngram_hashes(columns, 5)
    assert hashes.shape == (1, 100_000) and len(np.unique(hashes)) == 100_000
    assert ngram_hashes(columns[:, 123], 5)[0] == hashes[0, 123]
    words = word_hashes(' '.join(map(str, range(100_012))))[0]
    assert len(np.unique(ngram_hashes(words, 13))) == 100_000


@pytest.mark.parametrize('alphabet', ['abc XYZ 019.-_\n', 'aé½中文あ・ -٣𝒜İß\ud800',
                                      'ae\u0301 \u0903', 'ab'])
def test_word_hashes_are_crcs(alphabet):
    """Of what the pattern finds, for words of one character up to some hundreds."""
    rng = random.Random(0)
    for n in (0, 1, 2, 30, 900):
        text = ''.join(rng.choices(alphabet, k=n))
        low = lower(text)
        found = [zlib.crc32(word.encode('utf-8', 'replace'))
                 for word in word_pattern(low).findall(low)]
        hashes, lengths = word_hashes(text)
        assert hashes.tolist() == found and hashes.dtype == np.uint64
        assert lengths.tolist() == [*map(len, word_pattern(low).findall(low))]


def test_text_hash():
    same = clean.text_hash('A  b\n', 'loose')
    assert same == clean.text_hash(' a\tB', 'loose') != clean.text_hash('ab', 'loose')
    assert clean.text_hash('a b') != clean.text_hash('a, b')
    assert len({clean.text_hash(str(i)) for i in range(10_000)}) == 10_000


HINDI = 'यह एक सुन्दर दिन है और हम सब बाज़ार में घूम रहे'   # 12 words


def test_words_of_all_scripts():
    words = lambda text: [text.lower()[a:b] for a, b in (
        found.span() for found in word_pattern(text.lower()).finditer(text.lower()))]
    assert words(HINDI) == HINDI.split() and len(HINDI.split()) == 12
    assert words('Cafe\u0301, naïve_1; x² 東京 สวัสดี עִבְרִית') == [
        'cafe\u0301', 'naïve_1', 'x²', '東', '京', 'สวัสดี', 'עִבְרִית']
    assert len(word_hashes(HINDI)[0]) == 12 == measures(HINDI)['words']
    other = HINDI.replace('दिन', 'दान').replace('सब', 'सेब').replace('में', 'मैं')
    sets = [clean.shingles(word_hashes(text)[0], 3) for text in (HINDI, other)]
    assert clean.jaccard(*sets) < 0.3
    item = HINDI.upper()
    (begin, end), = clean.overlaps(f'और {item}। और', clean.ngram_index([HINDI], 12))
    assert f'और {item}। और'[begin:end] == item


def test_word_patterns_agree_where_there_are_no_marks():
    chance = random.Random(0)
    for _ in range(200):
        text = ''.join(chance.choices('abÉß_ 09²½,.-–‘ⅷд東ひカ\n', k=50))
        assert WORD.findall(text) == MARKED_WORD.findall(text)


def test_repeats():
    assert repeats(np.array([5, 7, 5, 5], np.uint64)).tolist() == [False, False, True, True]
    assert repeats(np.empty(0, np.uint64)).tolist() == []
    for seed in range(50):
        hashes = np.random.default_rng(seed).integers(0, 20, 30).astype(np.uint64)
        assert repeats(hashes).tolist() == [
            hash in hashes[:i].tolist() for i, hash in enumerate(hashes.tolist())]


# ---------------------------------------------------------------------------------------------
# Quality


def measures(text: str) -> dict:
    return dict([*clean.gopher_quality(text), *clean.gopher_repetition(text),
                 *clean.c4(text, clean.ngram_index(['darn', 'heck no'], 9, 1))])


PROSE = ('It was the best of times, it was the worst of times, or so they said, all of them, and '
         'nobody asked what came of it, for there was a time for everything, and another one for '
         'everyone who had none.')
TEN = 'one two three four five six seven eight nine ten'    # 39 letters


@pytest.mark.parametrize('name,text,expected', [
    ('words', ' one two\n\tthree ', 3), ('words', '', 0),
    ('mean_word_length', 'ab abcd\tabcdef\n', 4), ('mean_word_length', 'ab, c', 2),
    ('mean_word_length', '\u3000ab\u00a0cd\u2028ef', 2),
    ('symbols', '# a ## b', 3 / 4), ('symbols', 'a... b… c d #', 2 / 5), ('symbols', 'a b', 0),
    ('bullet_lines', '- a\n  • b\nc - d\n\n* d\n', 3 / 4), ('bullet_lines', '● a\n‣ b', 1),
    ('ellipsis_lines', 'a...\nb… \n... c\n\n', 2 / 3),
    ('alphabetic_words', 'a1 22 -- été _ 猫', 3 / 6),
    ('stop_words', 'The the of cats, to-be', 2),
    ('stop_words', 'the be to of and that have with us', 8),
    ('duplicate_lines', 'a\nb\n a \n\nb\nb', 3 / 5),
    ('duplicate_lines', 'a\nb', 0),
    ('duplicate_line_characters', 'aa\nb\n aa \naa', 4 / 12),
    ('duplicate_paragraphs', 'a\nb\n\nc\n\n\na\nb\n', 1 / 3), ('duplicate_paragraphs', 'a\na', 0),
    ('duplicate_paragraph_characters', 'a\nb\n\nc\n\n\na\nb', 3 / 12),
    ('top_2_words', 'A b, a B. c', 4 / 11), ('top_2_words', 'a b c', 0),
    ('top_3_words', 'aa b c aa b c', 8 / 13), ('top_4_words', 'a b c dd a b c dd', 10 / 17),
    ('top_4_words', 'a b c a b c', 0),
    ('repeated_5_words', 'a b c d ee x A B C D EE', 6 / 23),
    ('repeated_5_words', 'a b c d e f x a b c d e f', 6 / 25),
    ('repeated_6_words', 'a b c d ee x a b c d ee', 0),
    ('repeated_10_words', f'{TEN}. {TEN}', 39 / 98), ('repeated_9_words', TEN, 0),
    ('sentences', 'One. Two! "Three?" Four 3.5 is', 3), ('sentences', 'Wait... what?', 2),
    ('lorem_ipsum', 'Lorem ipsum. lorem  ipsum', 1), ('curly_brackets', '{a} {', 2),
    ('bad_words', 'Darn, darn it! heckle', 2), ('bad_words', 'heck no, heck', 1)])
def test_measures_by_hand(name, text, expected):
    assert measures(text)[name] == pytest.approx(expected)


def test_measures_of_nothing():
    for text in ('', ' \n\n', '.'):
        assert all(np.isfinite(value) for value in measures(text).values())


def test_every_measure_has_a_limit_and_every_limit_a_measure():
    assert measures('').keys() == clean.LIMITS.keys()


@pytest.mark.parametrize('limits,inside', [
    ((1, 2), '1 1.5 2'), ((1, None), '1 1.5 2 2.001'), ((None, 2), '0.999 1 1.5 2'),
    ((None, None), '0.999 1 1.5 2 2.001'), ((None, 0), '')])
def test_outside(limits, inside, monkeypatch):
    monkeypatch.setattr(clean, 'LIMITS', {'x': limits, 'y': (4, 4)})
    for value in (0.999, 1, 1.5, 2, 2.001):
        found = outside([('x', value), ('y', 4)])
        assert found == ({} if str(value) in inside.split() else {'x': value})


@pytest.mark.parametrize('line,stays', [
    ('This line has five words.', True), ('He said: "It has five words!"', True),
    ('And is this a question?  ', True), ('It has only four.', False),
    ('There is no end to this', False), ('Please enable JavaScript to go on.', False),
    ('This site, like others, uses cookies.', False),
    ('Read our Privacy Policy before this.', False)])
def test_c4_lines(line, stays):
    assert clean.c4_lines(line) == line * stays
    rest, line = 'Here is another line, which stays.\n', f'{line}\n'
    assert clean.c4_lines(f'{rest}\n{line}{rest}') == rest + line * stays + rest


WRAPPED = textwrap.fill(PROSE, 70)


@pytest.mark.parametrize('text', [
    WRAPPED, textwrap.fill(PROSE, 50), textwrap.fill(PROSE, 100, initial_indent='    '),
    textwrap.fill(PROSE, 72, initial_indent='> ', subsequent_indent='> '),
    f'{WRAPPED}\n\n{WRAPPED}\n\n\n{WRAPPED}', PROSE])
def test_c4_lines_of_wrapped_paragraphs(text):
    """They count as the one line that they were, and keep their line breaks."""
    assert clean.c4_lines(text) == text
    after = '\n\n' if '\n' in text else '\n'
    assert clean.c4_lines(f'CHAPTER I\n\n{text}\n\nTHE END\n') == text + after


@pytest.mark.parametrize('text,left', [
    (WRAPPED.removesuffix('.'), ''), (WRAPPED.replace(',\nall', ', uses\ncookies'), ''),
    ('\n'.join(f'One line of a list of many, number {i}' for i in range(9)), ''),
    ('Buy\nSell\nAbout us and all that we do for everyone in this great town\nCall\n'
     'This is a whole sentence.', 'This is a whole sentence.'),
    (f'{PROSE}\n{PROSE.rstrip(".")}\n{PROSE}', f'{PROSE}\n{PROSE}'),
    ('A short line\nand this is the end.', 'and this is the end.')])
def test_c4_lines_of_other_paragraphs(text, left):
    assert clean.c4_lines(text) == left


def test_c4_without_bad_words():
    assert dict(clean.c4('Darn. It.', {})) == {
        'sentences': 2, 'lorem_ipsum': 0, 'curly_brackets': 0, 'bad_words': 0}


def repetition(text: str) -> dict[str, set]:
    """The same as gopher_repetition's by its docstring: the values that each measure may have."""
    words, found = text.split(), {}
    for n in range(2, 11):
        grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
        if n < 5:
            counts = Counter(grams)
            most = max(counts.values(), default=0)
            found[f'top_{n}_words'] = {most * len(''.join(gram)) / len(text) for gram in counts
                                       if counts[gram] == most > 1} or {0}
        else:
            inside = {j for i, gram in enumerate(grams) if gram in grams[:i]
                      for j in range(i, i + n)}
            found[f'repeated_{n}_words'] = {sum(len(words[j]) for j in inside) / len(text)}
    return found


def test_repetition_is_that_of_a_slow_reference():
    rng, seen = random.Random(0), Counter()
    for _ in range(300):
        kinds = [c * rng.randint(1, 4) for c in 'abcdefgh'[:rng.randint(2, 8)]]
        words = rng.choices(kinds, k=rng.randint(1, 40))
        text = ' '.join(words + words[rng.randrange(len(words)):] * rng.randrange(3))
        got = dict(clean.gopher_repetition(text))
        for name, allowed in repetition(text).items():
            assert min(abs(got[name] - value) for value in allowed) < 1e-12, (name, text)
            seen[name] += got[name] > 0
    assert min(seen.values()) > 30


# ---------------------------------------------------------------------------------------------
# Overlaps


def slow_overlaps(text: str, known: list[str], n: int) -> list[tuple[int, int]]:
    split = lambda text: [(found[0].lower(), *found.span()) for found in re.finditer(r'\w+', text)]
    words = split(text)
    inside = [False] * len(words)
    for other in known:
        other = [word for word, *_ in split(other)]
        size = min(n, len(other))
        grams = {tuple(other[i:i + size]) for i in range(len(other) - size + 1)}
        for i in range(len(words) - size + 1):
            if size >= 8 and tuple(word for word, *_ in words[i:i + size]) in grams:
                inside[i:i + size] = [True] * size
    spans = []
    for (_, begin, end), yes, before in zip(words, inside, [False, *inside]):
        if yes and before:
            spans[-1] = (spans[-1][0], end)
        elif yes:
            spans.append((begin, end))
    return spans


def test_overlaps_are_those_of_a_slow_reference():
    rng, seen = random.Random(0), Counter()
    some = lambda words: ''.join(word + rng.choice([' ', ', ', '.\n']) for word in words)
    for _ in range(300):
        vocabulary = ['a', 'B', 'éÉ', 'dd'][:rng.randint(2, 4)]
        known = [some(rng.choices(vocabulary, k=rng.randint(5, 25))) for _ in range(4)]
        words = rng.choices(vocabulary, k=rng.randint(0, 40))
        text = some(words) + rng.choice(known).upper() * rng.randrange(2) + some(words[:9])
        n = rng.choice([8, 10, 13])
        found = clean.overlaps(text, clean.ngram_index(known, n))
        assert found == slow_overlaps(text, known, n)
        seen[len(found)] += 1
    assert min(seen[0], seen[1], seen[2]) > 9


@pytest.mark.parametrize('size', range(6, 15))
def test_items_of_a_benchmark(size):
    """Short ones are found whole, shorter than 8 words never; long ones from 13 words on."""
    question = 'What is the capital of a country that has no sea, and why not?'
    words, before, after = question.split()[:size], 'İn the end, ', ' Who knows.'
    item = ' '.join(words)
    index = clean.ngram_index([item], 13)
    text = before + item.upper() + after
    found = clean.overlaps(text, index)
    assert [text[begin:end] for begin, end in found] == [item.upper().rstrip('?,')] * (size >= 8)
    assert clean.overlaps(f'{before}{" ".join(words[1:13])}{after}', index) == []
    assert len(clean.overlaps(f'{item} {item}. x {item}', index)) == 2 * (size >= 8)


def test_overlaps_of_chinese():
    text = '子曰：学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠。'
    (begin, end), = clean.overlaps(text, clean.ngram_index(['有朋自远方来，不亦乐乎？人不知'], 13))
    assert text[begin:end] == '有朋自远方来，不亦乐乎？人不知'


def test_overlaps_of_nothing():
    assert clean.ngram_index(['', 'too short'], 13) == {}
    assert clean.overlaps('', clean.ngram_index([TEN], 8)) == []
    assert clean.overlaps('short', clean.ngram_index([TEN], 8)) == []


def slow_without(text: str, spans: list, margin: int) -> list[str]:
    stays = [not any(begin - margin <= i < end + margin for begin, end in spans)
             for i in range(len(text))]
    pieces = ''.join(c if yes else '\0' for c, yes in zip(text, stays)).split('\0')
    pieces = [piece for piece in pieces if len(piece) > margin]
    return pieces if len(pieces) <= 10 else []


def test_without_overlaps_is_that_of_a_slow_reference():
    rng, seen = random.Random(0), Counter()
    for _ in range(500):
        text = ''.join(rng.choices('abc ', k=rng.randint(1, 300)))
        n_spans = rng.randint(0, min(12, len(text) // 2))
        edges = sorted(rng.sample(range(len(text) + 1), 2 * n_spans))
        spans, margin = list(zip(edges[::2], edges[1::2])), rng.choice([0, 1, 3, 30])
        pieces = clean.without_overlaps(text, spans, margin)
        assert pieces == slow_without(text, spans, margin)
        seen[len(pieces)] += 1
    assert min(seen[n] for n in range(11)) > 0


@pytest.mark.parametrize('before,after,left', [
    (400, 400, []), (401, 400, [201]), (401, 402, [201, 202]), (0, 1000, [800]), (150, 0, [])])
def test_margin_of_200_characters(before, after, left):
    text = 'x' * before + 'item' + 'y' * after
    pieces = clean.without_overlaps(text, [(before, before + 4)])
    assert [len(piece) for piece in pieces] == left
    assert text.startswith(pieces[0]) or text.endswith(pieces[0]) if pieces else True


@pytest.mark.parametrize('n_items,n_pieces', [(8, 9), (9, 10), (10, 0), (30, 0)])
def test_more_than_ten_pieces_are_none(n_items, n_pieces):
    text = 'item'.join(['x' * 700] * (n_items + 1))
    spans = [found.span() for found in re.finditer('item', text)]
    assert len(clean.without_overlaps(text, spans)) == n_pieces


# ---------------------------------------------------------------------------------------------
# Near duplicates


def pair(rng, similarity: float, size: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """The shingles of two texts, as sets that have about the Jaccard similarity."""
    shared = round(size * 2 * similarity / (1 + similarity))
    words = word_hashes(' '.join(map(str, rng.sample(range(10 ** 9), 2 * size))))[0]
    other = np.concatenate([words[:shared], words[size:2 * size - shared]])
    return clean.shingles(words[:size], 1), clean.shingles(other, 1)


def test_jaccard():
    of = lambda *values: np.array(values, np.uint64)
    assert clean.jaccard(of(1, 2, 3), of(2, 3, 4, 5)) == 2 / 5
    assert clean.jaccard(of(1, 2), of(1, 2)) == 1 and clean.jaccard(of(1), of(2)) == 0
    assert clean.jaccard(of(), of()) == clean.jaccard(of(), of(1)) == 0


def test_shingles_are_sets():
    words = word_hashes('a b a b c')[0]
    assert clean.shingles(words, 2).tolist() == sorted(set(ngram_hashes(words, 2).tolist()))
    assert len(clean.shingles(words, 2)) == 3 and len(clean.shingles(words, 5)) == 1
    assert clean.shingles(words, 6).tolist() == sorted(set(words.tolist()))
    assert clean.minhash(clean.shingles(words[:0], 3)).tolist() == [0xffffffff] * clean.N_HASHES


def test_minhash_estimates_the_similarity():
    rng, errors = random.Random(0), []
    for i in range(200):
        a, b = pair(rng, i / 200, rng.choice([40, 300, 700]))
        estimate = (clean.minhash(a) == clean.minhash(b)).mean()
        errors.append(estimate - clean.jaccard(a, b))
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.06


def test_minhash_of_real_text():
    words = BOOK.split() * 3
    a, b = (clean.shingles(word_hashes(' '.join(text))[0], 3) for text in (words, words[20:]))
    estimate = (clean.minhash(a) == clean.minhash(b)).mean()
    assert 0.5 < clean.jaccard(a, b) <= 1 and abs(estimate - clean.jaccard(a, b)) < 0.12


@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1])
def test_bands_and_rows(threshold):
    """98%, and with one row more it would be less."""
    agree = lambda rows: 1 - (1 - threshold ** rows) ** (clean.N_HASHES // rows)
    bands, rows = clean.bands_and_rows(threshold)
    assert bands == clean.N_HASHES // rows and agree(rows) >= 0.98
    assert rows == 32 or max(agree(more) for more in range(rows + 1, 33)) < 0.98


def test_similar_documents_agree_in_a_band():
    rng, cut = random.Random(0), clean.bands_and_rows(0.7)
    agree = lambda a, b: (clean.band_hashes(clean.minhash(a), *cut)
                          == clean.band_hashes(clean.minhash(b), *cut)).any()
    similar = sum(agree(*pair(rng, 0.7)) for _ in range(300))
    others = sum(agree(*pair(rng, 0.2)) for _ in range(300))
    assert similar >= 0.95 * 300 and others <= 0.04 * 300


def test_band_hashes():
    signature = np.arange(128, dtype=np.uint32)
    found = clean.band_hashes(signature, 25, 5)
    assert found.shape == (25,) and found.dtype == np.uint64 and len(set(found.tolist())) == 25
    for i in range(128):    # each value is of one band
        other = signature.copy()
        other[i] += 1000
        changed = clean.band_hashes(other, 25, 5) != found
        assert np.flatnonzero(changed).tolist() == [i // 5] * (i < 125)


# ---------------------------------------------------------------------------------------------
# Equal texts and clusters

PARAGRAPH = 'It was the best of times, it was the worst of times: so they said, all of them. '
PROGRAM = 'for i in range(3):\n    print(i)\n    print("again", i)\nprint("the end")\n'


@pytest.mark.parametrize('texts,n_kinds', [
    (['c1ccccc1', 'C1CCCCC1', 'c1ccccc1O', 'C1CCCCC1O', 'CO', 'Co', 'co'], 7),
    ([PROGRAM, PROGRAM.replace('    print("a', 'print("a'), PROGRAM.replace('    ', '\t'),
      PROGRAM.replace('\nprint("the', '\n    print("the')], 4),
    (['3<5', '3>5', '3 < 5', '5<3'], 4),
    ([PARAGRAPH, PARAGRAPH.upper(), PARAGRAPH.replace(' ', '\n'), f'  {PARAGRAPH}\n\n'], 1),
    (['1 2\n3 4', '1 2 3 4', '1  2\n3  4'], 3), (['a: 1\nb:\n  c: 2', 'a: 1\nb:\nc: 2'], 2),
    (['one\r\ntwo', 'one\ntwo', 'one\ntwo\n'], 1), (['Yes', 'yes', 'YES!', '', '\n'], 4)])
def test_equal_texts(texts, n_kinds):
    """Case and white space are ignored where they mean nothing: in prose. A setting decides."""
    kinds = lambda *how: len({clean.text_hash(text, *how) for text in texts})
    assert kinds() == kinds('') == n_kinds
    assert kinds('loose') == len({' '.join(text.lower().split()) for text in texts})
    assert kinds('exact') == (4 if texts[0] == PARAGRAPH else n_kinds)


def slow_clusters(texts: list[str], threshold: float, n: int) -> list[int]:
    sets = [clean.shingles(word_hashes(text)[0], n) for text in texts]
    found = list(range(len(texts)))
    for _ in texts:
        for i, j in product(range(len(texts)), repeat=2):
            if (clean.text_hash(texts[i]) == clean.text_hash(texts[j])
                    or threshold and clean.jaccard(sets[i], sets[j]) >= threshold):
                found[i] = found[j] = min(found[i], found[j])
    return found


def test_clusters_are_those_of_a_slow_reference():
    rng, seen = random.Random(0), Counter()
    for _ in range(40):
        vocabulary, n = 'abcdefgh!'[:rng.randint(2, 9)], rng.choice([1, 2, 3])
        texts = [' '.join(rng.choices(vocabulary, k=rng.randint(0, 14)))
                 for _ in range(rng.randint(0, 15))]
        for threshold in (0, 0.3, 0.55, 0.7, 1):
            found = clean.clusters(texts, threshold, n)
            assert found == slow_clusters(texts, threshold, n)
            seen[threshold] += len({*found})
    assert seen[0] > seen[1] > seen[0.7] > seen[0.55] > seen[0.3] > 40


def test_clusters_of_short_texts():
    texts = ['Sorry, I will call you later today', 'sorry i will call you later today!!', 'Hello',
             'hello', 'SORRY, I will call you later', 'Sorry, you will never see me again', '', '']
    assert clean.clusters(texts) == [0, 0, 2, 2, 0, 5, 6, 6]
    assert clean.clusters(texts, 0) == [0, 1, 2, 3, 4, 5, 6, 6]
    assert clean.clusters([]) == []
