"""The documents of a dataset in the making, and the steps of the pipeline over them.

A work folder has a few files for each batch of documents (their texts, hashes, counts), written by
several processes; what is there is not done again. In memory a document is a row of numbers.
"""
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from core.data.dataset import ShardWriter
from core.data.report import Tally
from core.read import documents
from core.read.documents import Bad
from core.settings import stop, warn
from core.text import clean
from core.text.tokenizer import normalize
from core.text.words import repeats, word_hashes
from core.workers import ordered_map

MANY = 100                      # documents: from so many on validation takes whole ones, at random
VAL_CHARACTERS = 10_000_000     # most that it takes of them


# ---------------------------------------------------------------------------------------------
# Cleaning: records to documents in the work folder, one batch a process

DOCUMENT = np.dtype([('size', '<i8'), ('characters', '<i4'), ('hash', '<u8'), ('source', '<i4'),
                     ('continued', '?')])


def complain(message: str, options: dict, tally: Tally | None = None) -> None:
    """What happens about bad input: it ends the program, or is counted with skip_bad."""
    if not options['skip_bad']:
        stop(f'{message} (or leave such input out with --skip_bad)')
    warn(f'{message} (left out)')
    if tally:
        tally.bad.append(message)


def clean_all(work: Path, batches: Iterable[list], options: dict, index: dict, banned: dict,
              n_workers: int) -> int:
    """Clean all batches of records into `work`, but those that are there; how many they are. What
    is in `index` (of a benchmark) is cut out, `banned` are bad words: see clean.ngram_index."""
    numbers = itertools.count()
    missing = ((number, batch) for batch, number in zip(batches, numbers)
               if not (work / f'{number:06d}.json').is_file())
    for bad in ordered_map(clean_batch, missing, n_workers, work, options, index, banned):
        for message in bad:     # which are in the batch's own tally
            complain(message, options)
    return next(numbers)


def clean_batch(job, work: Path, options: dict, index: dict, banned: dict) -> list[str]:
    """Clean a batch of records and write what is left; returns what was bad in it."""
    number, records = job
    tally, texts, rows, bands, places = Tally(), [], [], [], []
    cut = clean.bands_and_rows(options['near_duplicates'] or 1)
    for source, record in records:
        try:
            found = list(documents.parse(record, options['text_column'], options['errors']))
        except Bad as e:
            tally.bad.append(str(e))
            continue
        if record.kind == 'text':
            tally.counts[f'encoding: {record.encoding}'] += not record.continued
        for text, continued in (piece for document in found for piece in clean_document(
                document, options, index, banned, tally, source)):
            raw = text.encode('utf-8')
            rows.append((len(raw), len(text), clean.text_hash(text, options['equal']), source,
                         continued))
            texts.append(raw)
            places.append(record.where)
            words = word_hashes(text)[0]
            signature = clean.minhash(clean.shingles(words, options['shingle_words']))
            bands.append(clean.band_hashes(signature, *cut))
    if tally.bad and not options['skip_bad']:
        return tally.bad
    path = work / f'{number:06d}'
    path.with_suffix('.txt').write_bytes(b''.join(texts))
    np.savez(path.with_suffix('.npz'), documents=np.array(rows, DOCUMENT),
             bands=np.array(bands, np.uint64).reshape(len(rows), cut[0]).T)
    save_json(path.with_suffix('.json'), {'tally': vars(tally), 'places': places})  # comes last
    return tally.bad


def clean_document(document, options: dict, index: dict, banned: dict, tally: Tally, source: int
                   ) -> Iterator[tuple[str, bool]]:
    """What is left of a document, and whether it goes on with the part before it: one text, none,
    or the pieces around what it shares with a benchmark."""
    where, text = document.where, normalize(document.data, options['normalize'])
    tally.counts['NUL characters removed'] += document.data.count('\0')
    tally.counts['U+FFFD'] += text.count('\ufffd')
    left = [text] if text.strip() else []
    tally.step('not empty', [document.data], left, source)
    if not left:
        return
    part = document.continued or len(text) >= documents.LONGEST // 2
    body = clean.strip_gutenberg(text, part)
    tally.step("without Project Gutenberg's licence", left, [body], source)
    if options['mask_pii']:
        body, masked = clean.mask(body)
        tally.counts.update({f'masked: {kind}': n for kind, n in masked.items()})
    body = follow_rules(body, where, options, banned, tally, source)
    if body is None:
        return
    pieces = [body]
    if index:
        found = clean.overlaps(body, index)
        pieces = clean.without_overlaps(body, found) if found else pieces
        tally.step('without benchmark items', [body], pieces, source)
        for begin, end in found[:3]:
            tally.example('benchmark items', where, body[begin:end])
    for i, piece in enumerate(pieces):
        yield piece, document.continued and i == 0 and body.startswith(piece)


def follow_rules(body: str, where: str, options: dict, banned: dict, tally: Tally, source: int
                 ) -> str | None:
    """What the quality rules leave of a text; None if they drop it. Families of rules that are not
    applied are only counted, and not computed unless they are to be counted."""
    applied = {*options['quality'].split(',')} - {''}
    families = {'gopher', 'c4'} if options['count_quality'] else applied
    if not families:
        return body
    measures, kept = {}, body
    if 'c4' in families:
        kept = clean.c4_lines(body)
        tally.counts["characters outside of C4's lines"] += len(body) - len(kept)
        if len(kept) < len(body):
            left = {*map(str.strip, kept.splitlines()), ''}
            gone = [line for line in body.splitlines() if line.strip() not in left]
            if gone:    # more than blank lines
                tally.rule('c4: lines', False, where, gone[0], '')
        measures['c4'] = clean.c4(kept, banned)
    if 'c4' in applied:
        tally.step('c4: lines', [body], [kept], source)
        body = kept
    if 'gopher' in families:
        measures['gopher'] = (*clean.gopher_quality(body), *clean.gopher_repetition(body))
    bad = set()
    for family, values in measures.items():
        for measure, value in clean.outside(values).items():
            tally.rule(f'{family}: {measure}', family in applied, where, body, f'{value:.4g}')
            bad.add(family)
    for family in bad:
        tally.counts[f'documents outside of {family} rules'] += 1
    dropped = bool(bad & applied)
    tally.step('good by the rules', [body], [] if dropped else [body], source)
    return None if dropped else body


def save_json(path: Path, value) -> None:
    """Write a JSON file that is either whole or not there."""
    tmp = path.with_name(f'{path.name}.part')
    text = json.dumps(value, indent=1, ensure_ascii=False) + '\n'
    try:    # names of files may have bytes that are no UTF-8
        tmp.write_text(text, encoding='utf-8', errors='backslashreplace')
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------
# Duplicates


class Corpus:
    """The documents in the work folder, one row each; their text stays on disk."""

    def __init__(self, work: Path, n_batches: int, tally: Tally):
        self.work, self.n_batches, self.tally, parts = work, n_batches, tally, []
        for number in range(n_batches):
            tally.add(json.loads((work / f'{number:06d}.json').read_text('utf-8'))['tally'])
            parts.append(np.load(work / f'{number:06d}.npz')['documents'])
        self.rows = np.concatenate([np.empty(0, DOCUMENT), *parts])
        self.first = np.cumsum([0, *map(len, parts)])       # number of each batch's first document
        self.batch = np.repeat(np.arange(n_batches), [len(part) for part in parts])
        ends = np.cumsum(self.rows['size'])
        begins = ends - self.rows['size']
        self.offset = begins - begins[np.minimum(self.first[self.batch], max(0, len(begins) - 1))]

    def place(self, i: int) -> tuple[int, int, int, int]:
        """Where document i is: its number, batch, offset in it and size in bytes."""
        return int(i), int(self.batch[i]), int(self.offset[i]), int(self.rows['size'][i])

    def example(self, i: int) -> tuple[str, str]:
        """Where document i came from, and its beginning."""
        batch = int(self.batch[i])
        found = json.loads((self.work / f'{batch:06d}.json').read_text('utf-8'))['places']
        return found[i - self.first[batch]], read_document(self.work, self.place(i))[:300]


def read_document(work: Path, place: tuple[int, int, int, int]) -> str:
    """The text of a document in the work folder; for its place see Corpus."""
    _, batch, offset, size = place
    with open(work / f'{batch:06d}.txt', 'rb') as f:
        f.seek(offset)
        return f.read(size).decode('utf-8')


def drop_duplicates(corpus: Corpus, given: np.ndarray, options: dict, n_workers: int
                    ) -> tuple[np.ndarray, set]:
    """Which documents stay: of equal and of similar ones the first, or one of a source `given` for
    validation; and what else is similar: (number, number of an earlier one, Jaccard similarity of
    0.5 or more)."""
    rows, tally, pairs = corpus.rows, corpus.tally, set()
    given = given[rows['source']]
    threshold, order = options['near_duplicates'], np.argsort(~given, kind='stable')
    stays = np.ones(len(rows), bool)
    stays[order[repeats(rows['hash'][order])]] = False
    sizes = rows['characters'].astype(np.int64)
    tally.step_of_all('without equal documents', rows['source'], sizes, sizes * stays)
    for i in np.flatnonzero(~stays)[:3]:
        tally.example('equal documents', *corpus.example(i))
    if not threshold:
        return stays, pairs
    before = sizes * stays
    bands = np.lib.format.open_memmap(corpus.work / 'bands.npy', 'w+', np.uint64, (
        clean.bands_and_rows(threshold)[0], len(rows)))
    for number in range(corpus.n_batches):
        bands[:, corpus.first[number]:corpus.first[number + 1]] = np.load(
            corpus.work / f'{number:06d}.npz')['bands']
    for band in tqdm(bands, desc='near duplicates', unit='band', leave=False,
                     disable=len(rows) < 1000):
        buckets = (list(map(corpus.place, bucket)) for bucket in equal_in(
            band, order[stays[order]]))
        for found in ordered_map(check_bucket, buckets, n_workers, corpus.work, threshold,
                                 options['shingle_words']):
            for i, like, similarity, gone in found:
                if not gone:
                    pairs.add((i, like, similarity))
                    continue
                stays[i] = False
                if len(tally.examples.get('near duplicates', ())) < 3:
                    where, text = corpus.example(i)
                    tally.example('near duplicates', f'{where}, like {corpus.example(like)[0]}',
                                  text)
    tally.step_of_all('without near duplicates', rows['source'], before, sizes * stays)
    return stays, {(i, j, similarity) for i, j, similarity in pairs if stays[i] and stays[j]}


def equal_in(band: np.ndarray, alive: np.ndarray) -> Iterator[np.ndarray]:
    """The groups of two and more documents of `alive` with the same hash in a band."""
    by_hash = alive[np.argsort(band[alive], kind='stable')]
    ends = np.append(np.flatnonzero(np.diff(band[by_hash])) + 1, len(by_hash))
    begins = np.append(0, ends[:-1])
    many = ends - begins > 1
    return (by_hash[begin:end] for begin, end in zip(begins[many], ends[many]))


def check_bucket(places: list, work: Path, threshold: float, n: int
                 ) -> list[tuple[int, int, float, bool]]:
    """Which of documents with an equal band are similar (0.5 or more) to an earlier one that stays:
    their numbers, the similarity, and whether they are duplicates."""
    kept, found = [], []
    for place in places:
        text = read_document(work, place)
        shingles = clean.shingles(word_hashes(text)[0], n)
        like = sorted(((clean.jaccard(shingles, other), -i, other_text)
                       for i, other, other_text in kept), reverse=True)
        gone = [some for some in like if some[0] >= threshold and clean.same_in_detail(
            text, some[2], threshold, n)][:1]
        found += [(place[0], -i, similarity, bool(gone)) for similarity, i, _ in gone or like[:3]
                  if similarity >= min(0.5, threshold)]
        if not gone and len(kept) < 8:  # more kinds than this in one bucket are not worth the time
            kept.append((place[0], shingles, text))
    return found


# ---------------------------------------------------------------------------------------------
# Documents to shards


class Split(NamedTuple):
    """How often each document goes into a split. Of those in `cuts` so many characters go into the
    training split, and the rest into the other."""
    name: str
    copies: np.ndarray
    cuts: dict[int, int]


def choose_validation(rows: np.ndarray, stays: np.ndarray, given: np.ndarray, pairs: set,
                      threshold: float, fraction: float) -> tuple[np.ndarray, dict[int, int]]:
    """Which documents are for validation, and of which others the last part is: number ->
    characters before it.

    They are those of a source `given` for it, or `fraction` of the characters: of MANY documents
    and more at most VAL_CHARACTERS, whole clusters of similar ones in an order by their hashes, as
    far as they fit. A large document (than a tenth of this share of all that are not larger, and
    than ten of median size) would leave most small ones to validation: it gives its last part, too.
    Of fewer documents, or if none fits, it is the last part of the text.
    """
    sizes, number = rows['characters'] * stays.astype(np.int64), np.arange(len(rows))
    val, cuts = given[rows['source']], {}
    if given.any() or not fraction or not sizes.any():
        return val, cuts

    def cut(begin, end):
        ends = np.cumsum(sizes[begin:end])
        place = int(ends[-1] * (1 - fraction))
        i = min(int(np.searchsorted(ends, place, side='right')), len(ends) - 1)
        cuts[begin + i] = place - int(ends[i] - sizes[begin + i])
        val[begin + i + 1:end] = True

    whole = np.maximum.accumulate(np.where(rows['continued'], 0, number))   # each one's first part
    if len(np.unique(whole[sizes > 0])) >= MANY:
        fraction, group = min(fraction, VAL_CHARACTERS / sizes.sum()), whole.copy()
        for i, j, similarity in pairs:
            if similarity >= threshold:
                clean.join(group, i, j)
        while (group[group] != group).any():
            group = group[group]
        size = np.bincount(group, sizes, len(rows))
        order = np.argsort(size, kind='stable')[(size == 0).sum():]
        shares = fraction * np.cumsum(size[order])
        most = np.maximum(shares / 10, 10 * np.median(size[order]))
        last = np.flatnonzero(size[order] <= most)[-1]
        room, fits, large = shares[last], order[:last + 1], order[last + 1:]
        for i in fits[np.argsort(rows['hash'][fits], kind='stable')]:
            if size[i] <= room:
                room, val[i] = room - size[i], True
        val = val[group]
        for i in large[np.bincount(group[whole == number], minlength=len(rows))[large] == 1]:
            cut(int(i), int(np.searchsorted(whole, i, side='right')))
    if not (val.any() or cuts):
        cut(0, len(rows))
    return val, cuts


def split_corpus(corpus: Corpus, stays: np.ndarray, val: np.ndarray, cuts: dict[int, int],
                 weights: list[float]) -> tuple[Split, Split]:
    """The validation and the training split; `weights` are those of the sources."""
    rows, train = corpus.rows, stays & ~val
    weight = np.array(weights)[rows['source']]
    copies = np.floor(weight).astype(np.int64)      # of a part of a copy that part of the documents
    copies += (rows['hash'] & np.uint64(0xffffffff)) < np.uint64(2 ** 32) * (weight % 1)
    once = (stays & val).astype(np.int64)
    once[[*cuts]] = 1
    for i, wanted in enumerate(weights):
        sizes = rows['characters'] * (train & (rows['source'] == i)).astype(np.int64)
        used = (copies * sizes).sum() / max(1, sizes.sum())
        if wanted % 1 and abs(used / wanted - 1) > 0.1:
            warn(f'weights={",".join(f"{one:g}" for one in weights)}: number {i + 1} is used '
                 f'{used:.2f} times, since documents are taken whole; cut its text into more of '
                 'them')
    return Split('val', once, cuts), Split('train', copies * train, cuts)


def leakage(pairs: set, splits: tuple[Split, Split], threshold: float) -> dict[str, int]:
    """How many documents in validation have one in training with such a Jaccard similarity or more:
    {'0.7': 0, '0.5': 12}; nothing if threshold is 0."""
    val, train = (split.copies > 0 for split in splits)
    return {f'{low:g}': len({i for *pair, similarity in pairs if similarity >= low
                             for i, j in (pair, pair[::-1]) if val[i] and train[j]})
            for low in sorted({threshold, 0.5}, reverse=True) if threshold}


def jobs(corpus: Corpus, split: Split) -> Iterator[tuple]:
    """The work of encoding a split: batch, documents of it, and which begin after another."""
    first = True
    for copy in range(int(split.copies.max(initial=0))):
        chosen = split.copies > copy
        whole = np.append(False, chosen[:-1])   # whether the document before it is in it, too
        fresh = ~(corpus.rows['continued'] & whole)
        for number in range(corpus.n_batches):
            begin, end = corpus.first[number], corpus.first[number + 1]
            here = np.flatnonzero(chosen[begin:end])
            if len(here):
                after = fresh[begin:end][here]
                if first:
                    after[0], first = False, False
                yield number, here, after


def texts_of(job: tuple, corpus: Corpus, split: Split) -> Iterator[str]:
    """The texts of a job (see jobs), in order."""
    number, here, _ = job
    for i in here + corpus.first[number]:
        text = read_document(corpus.work, corpus.place(i))
        if i in split.cuts:
            text = text[:split.cuts[i]] if split.name == 'train' else text[split.cuts[i]:]
        yield text


def encode_job(job: tuple, corpus: Corpus, split: Split, tok) -> np.ndarray:
    """The ids of a job, an end-of-text token before each document that begins after another."""
    parts = []
    for after, text in zip(job[2], texts_of(job, corpus, split)):
        parts += [[tok.eos]] * bool(after)
        parts += [tok.encode(block) for block in tok.blocks(text)]
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def encode_split(corpus: Corpus, split: Split, tok, shard_tokens: int, n_workers: int) -> None:
    """Write the shards of a split into work/ready, going on after the last whole one."""
    ready = corpus.work / 'ready'
    progress = ready / f'.{split.name}.json'        # jobs before it are done, `skip` ids of it too
    done = json.loads(progress.read_text()) if progress.is_file() else {
        'job': 0, 'skip': 0, 'shards': 0, 'whole': False}
    if done['whole']:
        return
    writer = ShardWriter(ready, split.name, len(tok), shard_tokens, done['shards'])
    todo = itertools.islice(enumerate(jobs(corpus, split)), done['job'], None)
    todo, numbered = itertools.tee(todo)
    total = int((corpus.rows['size'] * split.copies).sum())
    with tqdm(total=total, unit='B', unit_scale=True, desc=f'encoding {split.name}',
              leave=False, disable=total < 1 << 23) as bar:
        results = ordered_map(encode_job, (job for _, job in todo), n_workers, corpus, split, tok)
        for (number, job), ids in zip(numbered, results):
            at = done['skip'] if number == done['job'] else 0
            while at < len(ids):
                at += writer.write(ids[at:])
                if not writer.filled:       # a shard is whole
                    save_json(progress, {'job': number, 'skip': at, 'shards': len(writer.paths),
                                         'whole': False})
            bar.update(int(corpus.rows['size'][job[1] + corpus.first[job[0]]].sum()))
    writer.flush()
    save_json(progress, {'whole': True})
