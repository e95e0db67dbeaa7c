"""Text as it comes -> text worth learning from: masks, quality rules, duplicates.

Texts are compared by their words: see core/text/words.py. Nothing here reads or writes files.
"""
import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from core.text.words import crc, inside_of, lower, ngram_hashes, repeats, word_hashes, word_pattern

# ---------------------------------------------------------------------------------------------
# What is no part of the text, or should not be

# "*** START OF THIS PROJECT GUTENBERG EBOOK EMMA ***" and "*** END OF ...", in all their spellings.
MARKER = re.compile(r'^\*\*\* ?(START|END) OF (?:THIS|THE) PROJECT GUTENBERG EBOOK.*?\*\*\*$',
                    re.MULTILINE | re.DOTALL)
# The book's end as the volunteers wrote it, and, after its start, who they were.
END_LINE = re.compile(r'^End of (?:the |this )?Project Gutenberg.*\Z', re.MULTILINE | re.DOTALL)
CREDITS = re.compile(r'\A\s*(?:Produced by|E-text prepared by|Special thanks are due)'
                     r'(?:.+\n)+?\n')


def strip_gutenberg(text: str, part: bool = False) -> str:
    """Project Gutenberg books without their headers, licences and credits; other text unchanged.

    Of a `part` of a long document a header before a lone start goes, and all after a lone end.
    """
    marks = [(found[1], *found.span()) for found in MARKER.finditer(text)] if '***' in text else []
    if part and marks and marks[0][0] == 'END':
        marks.insert(0, ('START', 0, 0))
    if part and marks and marks[-1][0] == 'START':
        marks.append(('END', len(text), len(text)))
    if not marks or [mark for mark, *_ in marks] != ['START', 'END'] * (len(marks) // 2):
        return text
    books = [END_LINE.sub('', text[begin:end])
             for (_, _, begin), (_, end, _) in zip(marks[::2], marks[1::2])]
    return '\n\n'.join(CREDITS.sub('', book).strip() + '\n' for book in books)


# Each with what must be there for it to be found, which is found out ten times as fast.
MASKS = {
    'e-mail address': (re.compile('@'), re.compile(
        r'(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}\b')),
    'IP address': (re.compile(r'\d\.\d|:[\da-fA-F]{1,4}:'), re.compile(
        r'(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}'
        r'(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]\d|\w)|'
        r'(?<![\w:])(?:[\da-fA-F]{1,4}:){7}[\da-fA-F]{1,4}(?![\w:])')),
    # with the country's code; North American and Russian; with a leading 0; Chinese mobile ones
    'phone number': (re.compile(r'\+\d|\d{9}|\d\d[ .)/-]{1,2}\d\d'), re.compile(
        r'(?<![\w.+-])(?<!\d )(?:\+\d(?:[ .()/-]{0,2}\d){7,14}|'
        r'(?:0{0,2}1[ .-]|8[ -])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{2}[ -]?\d{2}|'
        r'0\d{2,4}[ -]\d{3,4}[ -]\d{3,4}|(?=\(?0(?:[ ()/-]{0,2}\d){8,11}(?!\d))(?!0123456789)'
        r'\(?0[1-9]\d{0,4}\)?[ /-]?\d{2,9}(?: \d{2,4}){0,3}|'
        r'1[3-9]\d{9})(?:x\d{1,6})?(?!\w|[.-]\d| \d)'))}


def mask(text: str) -> tuple[str, Counter]:
    """The text with [e-mail address], [IP address], [phone number] in place of such; how many."""
    counts = Counter(dict.fromkeys(MASKS, 0))
    for name, (needed, pattern) in MASKS.items():
        if needed.search(text):
            text, counts[name] = pattern.subn(f'[{name}]', text)
    return text, counts


# ---------------------------------------------------------------------------------------------
# Equal texts


# What prose has little of: digits, brackets, operators and the like, one or some in a row.
SYMBOL = re.compile(r'[0-9#$%&()*+/:<=>@[\]^_`{|}~\\±×÷\u2190-\u2bff]+')
ASCII_SYMBOLS = ''.join(SYMBOL.findall(''.join(map(chr, range(128))))).encode()


def is_prose(text: str, n_words: int) -> bool:
    """Whether a text of n_words between spaces has ten words and four more for each symbol. Jane
    Austen's novels have a hundred for each, Python's own source has one."""
    if n_words < 10:
        return False
    if text.isascii():      # symbols in a row count once: there are at most so many
        raw = text.encode()
        if n_words >= 10 + 4 * (len(raw) - len(raw.translate(None, ASCII_SYMBOLS))):
            return True
    return n_words >= 10 + 4 * len(SYMBOL.findall(text))


def text_hash(text: str, equal: str = '') -> int:
    """64 bits that are the same for equal texts: 'exact', all characters but line ends; 'loose',
    up to case and white space; '', loose for prose (see is_prose), whose meaning stays, and exact
    for all else, such as code, formulas and short records."""
    words = text.lower().split()
    if equal == 'loose' or not equal and is_prose(text, len(words)):
        text = ' '.join(words)
    else:
        text = text.replace('\r\n', '\n').strip('\n')
    digest = hashlib.blake2b(text.encode('utf-8', 'replace'), digest_size=8).digest()
    return int.from_bytes(digest, 'little')


# ---------------------------------------------------------------------------------------------
# Quality

# What the rules allow of each measure: at least, at most.
LIMITS = {
    # Gopher, Rae et al. 2021, appendix A1.1: quality
    'words': (50, 100_000),
    'mean_word_length': (3, 10),
    'symbols': (None, 0.1),             # '#' or ellipses for each word
    'bullet_lines': (None, 0.9),
    'ellipsis_lines': (None, 0.3),
    'alphabetic_words': (0.8, None),    # words with at least one letter
    'stop_words': (2, None),            # of STOP_WORDS
    # Gopher, table A1: repetition
    'duplicate_lines': (None, 0.3),
    'duplicate_line_characters': (None, 0.2),
    'duplicate_paragraphs': (None, 0.3),
    'duplicate_paragraph_characters': (None, 0.2),
    'top_2_words': (None, 0.20),        # characters within the most frequent two words in a row
    'top_3_words': (None, 0.18),
    'top_4_words': (None, 0.16),
    'repeated_5_words': (None, 0.15),   # characters within five words in a row that came before
    'repeated_6_words': (None, 0.14),
    'repeated_7_words': (None, 0.13),
    'repeated_8_words': (None, 0.12),
    'repeated_9_words': (None, 0.11),
    'repeated_10_words': (None, 0.10),
    # C4, Raffel et al. 2020, section 2.2
    'sentences': (3, None),
    'lorem_ipsum': (None, 0),
    'curly_brackets': (None, 0),
    'bad_words': (None, 0)}
MIN_LINE_WORDS = 5      # C4: shorter lines go
STOP_WORDS = {'the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'}
BULLETS = ('•', '●', '‣', '*', '-')


@functools.lru_cache(1 << 18)
def has_letter(word: str) -> bool:
    return any(map(str.isalpha, word))


def gopher_quality(text: str) -> Iterator[tuple[str, float]]:
    """The measures of Rae et al. 2021, appendix A1.1, "Quality filtering"."""
    words = text.split()
    n = max(1, len(words))
    lines = [line for line in text.split('\n') if line.strip()]
    m = max(1, len(lines))
    yield 'words', len(words)
    yield 'mean_word_length', len(''.join(words)) / n
    yield 'symbols', max(text.count('#'), text.count('...') + text.count('…')) / n
    yield 'bullet_lines', sum(line.lstrip().startswith(BULLETS) for line in lines) / m
    yield 'ellipsis_lines', sum(line.rstrip().endswith(('...', '…')) for line in lines) / m
    yield 'alphabetic_words', sum(map(has_letter, words)) / n
    yield 'stop_words', len(STOP_WORDS.intersection(map(str.lower, {*words})))


def gopher_repetition(text: str) -> Iterator[tuple[str, float]]:
    """The measures of the same, table A1, "Repetition removal": the share of the characters in
    lines, paragraphs and n words that came before, and in the most frequent n words (which may
    overlap). Words count without what stands between them."""
    (words, lengths), size = word_hashes(text), max(1, len(text))
    for name, parts in (('line', text.split('\n')), ('paragraph', PARAGRAPH.split(text))):
        parts = [part.strip() for part in parts if part.strip()]
        counts = Counter(parts)
        again = len(parts) - len(counts)
        yield f'duplicate_{name}s', again / max(1, len(parts))
        yield f'duplicate_{name}_characters', again and sum(
            (n - 1) * len(part) for part, n in counts.items() if n > 1) / size
    for n in (2, 3, 4):
        grams, most = ngram_hashes(words, n), 0
        values, counts = np.unique(grams, return_counts=True)
        if counts.max(initial=0) > 1:
            i = counts.argmax()
            first = np.argmax(grams == values[i])
            most = counts[i] * lengths[first:first + n].sum()
        yield f'top_{n}_words', float(most / size)
    at = words
    for n in range(5, 11):
        # without repeated fives there are no repeated sixes
        at = np.flatnonzero(repeats(ngram_hashes(words, n))) if len(at) else at
        yield f'repeated_{n}_words', float(
            len(at) and lengths[inside_of([(at, n)], len(words))].sum() / size)


PARAGRAPH = re.compile(r'\n{2,}')
TERMINAL = ('.', '!', '?', '"', '”', '’')
POLICY = ('javascript', 'terms of use', 'privacy policy', 'cookie policy', 'uses cookies',
          'use of cookies', 'use cookies')
SENTENCE_END = re.compile(r'[.!?]["”’)\]]*(?:\s+|\Z)')


def is_wrapped(lines: list[str]) -> bool:
    """Whether a paragraph was broken at a fixed width, of 40 to 120 characters: four of five lines
    but the last are longer than three quarters of it."""
    lengths = [len(line.rstrip()) for line in lines]
    width = max(lengths)
    return len(lines) > 1 and 40 <= width <= 120 and 5 * sum(
        length <= 0.75 * width for length in lengths[:-1]) < len(lines)


def c4_lines(text: str) -> str:
    """The lines that Raffel et al. 2020, section 2.2, keep: those that end as a sentence does, have
    MIN_LINE_WORDS or more, and speak of no JavaScript and no cookies. A paragraph broken at a fixed
    width counts as one line, and keeps its line breaks and the blank lines after it; others go."""
    low = text.lower().replace('\n', ' ')
    words = [some for some in POLICY if some in low]    # most texts have none
    kept, wrapped = [''], False
    for blank, lines in itertools.groupby(text.splitlines(keepends=True), str.isspace):
        lines = list(lines)
        if blank and wrapped and kept[-1]:
            kept += lines
        elif not blank:
            wrapped = is_wrapped(lines)
            kept += [line if line.rstrip().endswith(TERMINAL)
                     and len(line.split()) >= MIN_LINE_WORDS
                     and not any(some in line.lower().replace('\n', ' ') for some in words) else ''
                     for line in ([''.join(lines)] if wrapped else lines)]
    return ''.join(kept)


def c4(kept: str, bad_words: dict) -> Iterator[tuple[str, float]]:
    """The measures of the same for whole pages: `kept` is what c4_lines left, as in their code,
    `bad_words` an ngram_index of words and phrases."""
    yield 'sentences', len(SENTENCE_END.findall(kept))
    yield 'lorem_ipsum', kept.lower().count('lorem ipsum')
    yield 'curly_brackets', kept.count('{')
    words = word_hashes(kept if bad_words else '')[0]
    yield 'bad_words', sum(int(np.isin(ngram_hashes(words, n), known).sum())
                           for n, known in bad_words.items())


def outside(measures: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The measures that lie outside of their LIMITS."""
    found = {}
    for name, value in measures:
        low, high = LIMITS[name]
        if (low is not None and value < low) or (high is not None and value > high):
            found[name] = value
    return found


# ---------------------------------------------------------------------------------------------
# What training text shares with other text

SHORTEST = 8    # words: what is shorter than this may be anyone's


def ngram_index(texts: Iterable[str], n: int, shortest: int = SHORTEST) -> dict[int, np.ndarray]:
    """All n words in a row of the texts, to look up: length -> sorted hashes. A text of fewer than
    n words, but `shortest` or more, counts as a whole."""
    found = {}
    for text in texts:
        words, _ = word_hashes(text)
        length = min(n, len(words))
        if len(words) >= shortest:
            found.setdefault(length, []).append(ngram_hashes(words, length))
    return {length: np.unique(np.concatenate(parts)) for length, parts in found.items()}


def overlaps(text: str, index: dict[int, np.ndarray]) -> list[tuple[int, int]]:
    """Where the text has words in a row that are in the index: (begin, end) in characters, apart
    and in order. n = 13 is that of Brown et al. 2020, appendix C."""
    words, found = word_hashes(text)[0], []
    for n, known in index.items():
        grams = ngram_hashes(words, n)
        place = np.minimum(np.searchsorted(known, grams), len(known) - 1)
        if len(begins := np.flatnonzero(known[place] == grams)):
            found.append((begins, n))
    if not found:
        return []
    inside = inside_of(found, len(words))
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    text = lower(text)
    spans = [found.span() for found in word_pattern(text).finditer(text)]
    return [(spans[begin][0], spans[end - 1][1]) for begin, end in zip(edges[::2], edges[1::2])]


def without_overlaps(text: str, spans: list[tuple[int, int]], margin: int = 200) -> list[str]:
    """What is left of a text without spans and `margin` characters around each: its pieces of more
    than `margin` characters, none if there are more than ten (Brown et al. 2020, appendix C)."""
    pieces, end = [], 0
    for begin, until in [*spans, (len(text) + margin, 0)]:
        if begin - margin - end > margin:
            pieces.append(text[end:begin - margin])
        end = max(end, until + margin)
    return pieces if len(pieces) <= 10 else []


# ---------------------------------------------------------------------------------------------
# Near duplicates: MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al. 2020, ch. 3)

N_HASHES = 128
RANDOM = np.random.Philox(0).random_raw(2 * N_HASHES).reshape(2, N_HASHES)
A, B = RANDOM[0] | np.uint64(1), RANDOM[1]


def shingles(words: np.ndarray, n: int) -> np.ndarray:
    """The set of all n words in a row, sorted; of the words themselves if they are fewer."""
    return np.unique(ngram_hashes(words, n) if len(words) >= n else words)


TOKEN = re.compile(r'\w+|[^\w\s]|\n[ \t]*')      # sees case, symbols and indentation


def same_in_detail(a: str, b: str, threshold: float, n: int) -> bool:
    """Whether texts with similar words are near duplicates: prose is; other text, short or rich in
    symbols, may differ in what is no word. From 1,000 characters on its sets of n tokens in a row
    (each symbol and indentation is one) must be as similar as the words; shorter text never is."""
    if all(is_prose(text, len(text.split())) for text in (a, b)):
        return True
    tokens = [TOKEN.findall(text) for text in (a, b)]
    return min(len(a), len(b)) >= 1000 and threshold <= jaccard(*(
        shingles(np.fromiter(map(crc, some), np.uint64, len(some)), n) for some in tokens))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of two sets of shingles; 0 if both are empty."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def minhash(shingles: np.ndarray) -> np.ndarray:
    """(N_HASHES,) uint32: the least value of each of N_HASHES hash functions over the shingles. Two
    sets have the same one with a probability equal to their Jaccard similarity."""
    low = np.full(N_HASHES, 0xffffffffffffffff, np.uint64)
    for i in range(0, len(shingles), 256):      # which fit into a core's cache
        hashes = shingles[i:i + 256, None] * A
        hashes += B
        np.minimum(low, hashes.min(axis=0), out=low)
    return (low >> np.uint64(32)).astype(np.uint32)


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """How signatures are cut into bands so that two documents with this similarity agree in at
    least one band with 98% probability, 1 - (1 - threshold^rows)^bands, and few others do."""
    fits = [rows for rows in range(1, 33)
            if 1 - (1 - threshold ** rows) ** (N_HASHES // rows) >= 0.98]
    rows = max(fits, default=1)
    return N_HASHES // rows, rows


def band_hashes(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """(bands,) uint64, a hash of each band of a signature."""
    parts = signature[:bands * rows].reshape(bands, rows).astype(np.uint64)
    return ngram_hashes(parts.T, rows)[0]


def join(first: list | np.ndarray, i: int, j: int) -> None:
    """Make one cluster of those of i and j (union-find): `first` leads from each member to an
    earlier one of its cluster, from the first one to itself."""
    i, j = root(first, i), root(first, j)
    first[max(i, j)] = min(i, j)


def root(first, i: int) -> int:
    """The first member of i's cluster."""
    while first[i] != i:
        first[i] = i = first[first[i]]
    return int(i)


def clusters(texts: list[str], threshold: float = 0.7, n: int = 3) -> list[int]:
    """The cluster of each text, as the number of the cluster's first text: all that are linked by
    pairs of texts that are equal (see text_hash), or whose sets of n words in a row have a Jaccard
    similarity of `threshold` or more (0: only if they are equal).

    Every such pair is found: of two similar sets, both ordered from the rarest member to the most
    frequent one, the first members have one in common (Bayardo et al. 2007).
    """
    first, hashes, posted = list(range(len(texts))), {}, {}
    for i, text in enumerate(texts):
        join(first, i, hashes.setdefault(text_hash(text), i))
    alone = [i for i in range(len(texts) if threshold else 0) if first[i] == i]
    sets = [shingles(word_hashes(texts[i])[0], n) for i in alone]
    _, ids, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *sets]),
                               return_inverse=True, return_counts=True)
    sets = dict(zip(alone, np.split(ids, np.cumsum([len(some) for some in sets]))))
    for i, mine in sets.items():
        rare = mine[np.argsort(counts[mine], kind='stable')]
        rare = rare[:len(rare) - int(np.ceil(threshold * len(rare) - 1e-9)) + 1]
        mates = set()
        for shingle in rare[counts[rare] > 1].tolist():
            mates.update(posted.setdefault(shingle, []))
            posted[shingle].append(i)
        for j in mates:
            if root(first, i) != root(first, j) and jaccard(mine, sets[j]) >= threshold:
                join(first, i, j)
    return [root(first, i) for i in range(len(texts))]
