"""Raw text to token shards: python prepare.py shakespeare, or python prepare.py my_texts/.

The pipeline, which `make` in core/data/build.py tells step by step:

    read            text, web pages, notebooks, JSON, tables, Parquet    core/read/documents.py
    clean           normalize, mask, drop by quality rules, cut out      core/text/clean.py
                    what benchmarks contain
    duplicates      drop equal and similar documents                     core/data/corpus.py
    split           take a share for validation                          core/data/corpus.py
    tokenizer       train one, or take that of a model                   core/text/tokenizer.py
    encode          write shards of token ids                            core/data/dataset.py
    report          say what was removed and why                         core/data/report.py

A dataset is a folder data/<name>/ with the shards, tokenizer.json, meta.json and report.html. By
default only duplicates are removed. A run that was killed goes on where it was. train.py prepares
its dataset in the same way.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import sys
import time

from core.data import named
from core.data.build import build
from core.read.documents import is_encoding
from core.read.download import NoNetwork
from core.settings import check_bounds, check_choice, configure, settings_of, stop
from core.text.clean import SHORTEST

POSITIONAL = ('dataset',)

# what goes in
dataset = ''                # names, files, folders, globs, URLs; several with commas between
weights = ''                # how often each of several is used, such as 2,0.5; '': all once
validation = ''             # files to validate on; '': a part of the dataset
max_files = 0               # of a large named dataset: how many of its files are downloaded
text_column = 'text'        # where the text is in JSON lines, tables and Parquet
encoding = ''               # of text files; '': found out, and printed if it is not UTF-8
errors = 'strict'           # invalid bytes: strict stops at them, replace puts U+FFFD and counts
skip_bad = False            # leave out what cannot be read, and count it, instead of stopping
# what is changed and removed
normalize = 'NFC'           # Unicode normalization form: NFC, NFKC, or '': none
mask_pii = False            # mask e-mail addresses, IP addresses and phone numbers
quality = ''                # rules that are applied: gopher, c4 or gopher,c4 (core/text/clean.py)
count_quality = False       # count in report.html what both would remove
equal = ''                  # texts are equal up to case and white space (loose), not even that
                            # (exact); '': loose for prose, exact for code and short records
near_duplicates = 0.7       # Jaccard similarity from which documents are duplicates; 0: only equal
shingle_words = 3           # the similarity is that of the sets of so many words in a row
decontaminate = ''          # benchmark files: what has overlap_words in a row with them goes
overlap_words = 13
bad_words = ''              # C4: files with a word or phrase a line; '': none
# tokens
tokenizer = ''              # char, byte, bpe, gpt2, or where a model is whose tokenizer is taken;
                            # '': the named dataset's own, char for a path
vocab_size = 0              # of a bpe, special tokens included; 0: the dataset's own, or 4,096
val_fraction = 0.1          # of the characters, for validation; of many documents 10 million
shard_tokens = 100_000_000  # most tokens in one shard file
# system
name = ''                   # folder under data_dir; '': the dataset's, or <path's>_<tokenizer>
data_dir = 'data'           # where datasets and downloads live
workers = 0                 # processes; 0: one for each core, but one alone for little text

GIVEN = ()                  # filled by configure: the settings that were given


def main() -> dict:
    """Build the dataset that the settings name; returns its meta.json."""
    check_settings()
    # Another dataset than the settings describe is made anew; one that is named by its folder has
    # its own settings, and only what was given has to agree.
    made = named.made_folder(dataset, data_dir)
    given = {key: value for key, value in settings_of(globals()).items()
             if key not in ('dataset', 'data_dir', 'name', 'tokenizer', 'vocab_size')
             and (not made or key in GIVEN)}
    began = time.time()
    try:
        folder = build(dataset, data_dir, name, tokenizer, vocab_size, **given)
    except NoNetwork as e:
        stop(named.no_network(dataset, e))
    if (folder / 'meta.json').stat().st_mtime < began:
        print(f'{folder} is up to date: nothing was to be done')
    meta = named.read_meta(folder)
    print(f'next: {named.next_command(folder, meta, tokenizer)}')
    return meta


def check_settings() -> None:
    """Stop if a setting has a value that it must not have."""
    check_bounds(globals(), overlap_words=(SHORTEST, 1000))
    check_choice(globals(), errors=('strict', 'replace'), normalize=('', 'NFC', 'NFKC'),
                 equal=('', 'exact', 'loose'),
                 quality=('', 'gopher', 'c4', 'gopher,c4', 'c4,gopher'))
    if encoding and not is_encoding(encoding):
        stop(f'encoding={encoding}: no encoding of text that Python knows')
    label = named.tokenizer_label(dataset, tokenizer, vocab_size)
    if vocab_size and not label.startswith('bpe'):
        stop(f'vocab_size={vocab_size}: only a bpe can have any size; add --tokenizer=bpe')


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
