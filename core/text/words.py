"""Words of a text and their hashes, by which texts are compared.

Words are runs of letters, marks and digits in lower case; in Chinese and Japanese, which have no
spaces, single characters. A word is known by its CRC-32, n words in a row by a 64-bit hash of
these.
"""
import functools
import re
import zlib

import numpy as np
import regex  # comes with tiktoken

CJK = '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff'
WORD = re.compile(rf'[^\W{CJK}]+|[{CJK}]')     # for texts without marks
MARK = regex.compile(r'\p{M}')     # accents and vowels that Hindi, Thai, Arabic add to letters
MARKED_WORD = regex.compile(rf'[\p{{L}}\p{{M}}\p{{N}}_--{CJK}]+|[{CJK}]', regex.V1)


def lower(text: str) -> str:
    """The text in lower case, each character where it was."""
    low = text.lower()
    return low if len(low) == len(text) else ''.join(c.lower()[:1] for c in text)


def word_pattern(text: str) -> re.Pattern | regex.Pattern:
    """The pattern that finds the words of a text in lower case."""
    return MARKED_WORD if MARK.search(text) else WORD


@functools.cache
def kinds() -> np.ndarray:
    """Of each code point: 1 for what words are made of, 2 for what is a word by itself, else 0."""
    found = np.zeros(0x110000, np.uint8)
    every = ''.join(map(chr, range(0x110000)))
    for kind, pattern in ((1, r'\w+'), (2, f'[{CJK}]+')):
        for run in re.finditer(pattern, every):
            found[run.start():run.end()] = kind
    return found


@functools.lru_cache(2)     # rules, duplicates and benchmarks ask for the same text in turn
def word_hashes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The CRC-32 of each word, (number of words,) uint64, and how many characters it has."""
    text = lower(text)
    if not text.isascii() and MARK.search(text):
        words = MARKED_WORD.findall(text)
        return (np.fromiter(map(crc, words), np.uint64, len(words)),
                np.fromiter(map(len, words), np.int64, len(words)))
    # Without marks, what a character is does not depend on its neighbours.
    raw = np.frombuffer(text.encode('utf-8', 'replace'), np.uint8)
    points = raw if text.isascii() else np.frombuffer(
        text.encode('utf-32-le', 'surrogatepass'), np.uint32)
    kind = np.zeros(len(points) + 2, np.uint8)
    kind[1:-1] = kinds()[points]
    joined = (kind == 1)[:-1] & (kind == 1)[1:]     # with the character before
    begins = np.flatnonzero((kind[1:-1] > 0) & ~joined[:-1])
    ends = np.flatnonzero((kind[1:-1] > 0) & ~joined[1:]) + 1
    if points is raw:
        return crcs(raw, begins, ends), ends - begins
    bytes_of = 1 + (points > 0x7f) + (points > 0x7ff) + (points > 0xffff)
    bytes_of[(points >= 0xd800) & (points < 0xe000)] = 1    # half a surrogate pair is written as ?
    place = np.concatenate([[0], np.cumsum(bytes_of)])
    return crcs(raw, place[begins], place[ends]), ends - begins


LONGEST = 64        # bytes of words in CRC_OF_BYTE


@functools.cache
def crc_tables() -> tuple[np.ndarray, np.ndarray]:
    """What byte b with d bytes behind it adds to a CRC-32, at [256 d + b]; and the CRC-32 of n
    zeros, at [n]. CRCs are linear (Peterson and Brown 1961): the CRC of a word is that of as many
    zeros, xor what each of its bytes adds."""
    zeros = [zlib.crc32(bytes(n)) for n in range(LONGEST + 1)]
    added = [zlib.crc32(bytes([b]) + bytes(d)) ^ zeros[d + 1]
             for d in range(LONGEST) for b in range(256)]
    return np.array(added, np.uint32), np.array(zeros, np.uint32)


def crcs(raw: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) uint64, the CRC-32 of the bytes (uint8) from each of `begins` to each of `ends`, apart
    and in order."""
    if not len(begins):
        return np.empty(0, np.uint64)
    added, zeros = crc_tables()
    sizes = ends - begins
    first = np.cumsum(sizes) - sizes        # of each word, among the bytes of all words
    to_end = np.repeat(first + sizes, sizes) - 1 - np.arange(sizes.sum())
    at = np.repeat(ends, sizes) - 1 - to_end
    each = added[(np.minimum(to_end, LONGEST - 1) << 8) + raw[at]]
    found = np.bitwise_xor.reduceat(each, first) ^ zeros[np.minimum(sizes, LONGEST)]
    for i in np.flatnonzero(sizes > LONGEST):
        found[i] = zlib.crc32(raw[begins[i]:ends[i]].tobytes())
    return found.astype(np.uint64)


@functools.lru_cache(1 << 18)   # few words are most of any text
def crc(word: str) -> int:
    return zlib.crc32(word.encode('utf-8', 'replace'))


MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))    # odd, random bits


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """(len(words) - n + 1,) uint64 hashes of n words in a row; empty if there are fewer."""
    grams = np.zeros((max(0, len(words) - n + 1), *words.shape[1:]), np.uint64)
    for i in range(n):      # Horner's rule, modulo 2^64
        grams *= MIX[0]
        grams += words[i:i + len(grams)]
    grams ^= grams >> np.uint64(31)
    grams *= MIX[1]
    return grams ^ grams >> np.uint64(29)


def inside_of(found: list[tuple[np.ndarray, int]], n_words: int) -> np.ndarray:
    """(n_words,) which words lie in what was found: (where n words in a row begin, n)."""
    changes = np.zeros(n_words + 1, np.int64)
    for begins, n in found:
        np.add.at(changes, begins, 1)
        np.add.at(changes, begins + n, -1)
    return np.cumsum(changes[:-1]) > 0


def repeats(hashes: np.ndarray) -> np.ndarray:
    """For each of (n,) hashes, whether it came before: [5, 7, 5, 5] gives [no, no, yes, yes]."""
    found, ordered = np.zeros(len(hashes), bool), np.sort(hashes)
    if (ordered[1:] == ordered[:-1]).any():     # most texts have none
        order = np.argsort(hashes, kind='stable')
        found[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return found
