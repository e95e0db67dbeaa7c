"""Quality rules beside datatrove's: python dev/bench_rules.py --text=FILE [--rounds=5].

Gopher's and C4's rules on the same documents of 3,000 characters, on one core, in turn: what
core/text/clean.py computes, and datatrove's GopherQualityFilter, GopherRepetitionFilter and
C4QualityFilter (pip install datatrove spacy). The last line is JSON.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # the project's folder
from core.text import clean

SIZE = 3000         # characters of a document


def ours(text: str) -> bool:
    """Whether a document stays. All rules are computed, as in core/data/corpus.py."""
    kept = clean.c4_lines(text)
    measures = [clean.c4(kept, {}), clean.gopher_quality(text),
                clean.gopher_repetition(text)]
    return not any([clean.outside(some) for some in measures])      # a list: none is left out


def datatrove_filters() -> list:
    from datatrove.pipeline.filters import (  # type: ignore  # only this script needs it
        C4QualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    return [C4QualityFilter(), GopherQualityFilter(), GopherRepetitionFilter()]


def theirs(filters: list, text: str) -> bool:
    from datatrove.data import Document  # type: ignore
    # A filter gives True, or False with its reason. C4's changes the text, so each has its own.
    return all([one.filter(Document(text, '0')) is True for one in filters])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--text', required=True, help='a file of plain text')
    parser.add_argument('--rounds', type=int, default=5)
    given = parser.parse_args()
    text, filters = Path(given.text).read_text(encoding='utf-8'), datatrove_filters()
    documents = [text[i:i + SIZE] for i in range(0, len(text), SIZE)]
    ways = {'ours': ours, 'datatrove': lambda document: theirs(filters, document)}
    speeds, stay = {name: [] for name in ways}, {}
    for _ in range(given.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            stay[name] = sum(map(way, documents))
            speeds[name].append(len(text.encode()) / 1e6 / (time.perf_counter() - began))
    found = {name: round(statistics.median(some), 2) for name, some in speeds.items()}
    ratios = [a / b for a, b in zip(*speeds.values())]
    for name in ways:
        print(f'{name:10} {found[name]} MB/s ({min(speeds[name]):.2f} to {max(speeds[name]):.2f}), '
              f'{stay[name]:,} of {len(documents):,} documents stay')
    print(json.dumps({'what': 'rules', **found, 'ratio': round(statistics.median(ratios), 1)}))


if __name__ == '__main__':
    main()
