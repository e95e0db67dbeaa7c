"""The book in docs/guide: what it includes is there, its numbers and examples are right, its
figures are drawn from what is there now, and it builds."""
import doctest
import functools
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'dev'))
import figures  # noqa: E402
import guide  # noqa: E402

REFERENCES = guide.GUIDE / 'references.md'
FILES = [*guide.chapters(), *sorted((guide.GUIDE / 'solutions').glob('*.md')), REFERENCES]
ids = lambda path: str(path.relative_to(guide.GUIDE))
each_file = pytest.mark.parametrize('path', FILES, ids=ids)


def test_there_is_a_book():
    numbers = [int(path.name[:2]) for path in guide.chapters()]
    assert numbers == [*range(1, len(numbers) + 1)]


@each_file
def test_included_code_is_there(path):
    for file, name, target in guide.INCLUDE.findall(path.read_text()):
        first, code = guide.find_code(ROOT / file, name)
        assert first > 0 and code
        assert (path.parent / target).resolve() == ROOT / file


@each_file
def test_links_lead_somewhere(path):
    text = re.sub(f'{guide.FENCE}|{guide.CODE}', '', path.read_text(), flags=re.M | re.S)
    for _, to in guide.LINK.findall(text):
        file, _, anchor = to.partition('#')
        if '://' in file:
            continue
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), to
        if anchor and target.parent == guide.GUIDE:
            assert f'<a id="{anchor}"></a>' in target.read_text(), to
    for anchor in guide.ANCHOR.findall(text):
        kind, _, name = anchor.partition('-')
        assert kind in ('eq', 'fig'), anchor
        if kind == 'fig':
            assert f'(figures/{name}.svg)' in text, anchor


@each_file
def test_numbers_are_those_that_commands_wrote(path):
    for number, percent, name in guide.NUMBER.findall(path.read_text()):
        file, *keys = name.split('.')
        found = json.loads((figures.DATA / f'{file}.json').read_text())
        assert found['command']
        for key in keys:
            found = found[int(key) if isinstance(found, list) else key]
        digits = len(number.partition('.')[2])
        value = found * 100 if percent else found
        assert float(number.replace(',', '')) == pytest.approx(round(value, digits)), name


@each_file
def test_examples(path, monkeypatch):
    """Blocks of Python with >>> give what the book says."""
    monkeypatch.chdir(ROOT)
    test = doctest.DocTestParser().get_doctest(path.read_text(), {}, path.name, str(path), 0)
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert result.failed == 0


@pytest.mark.parametrize('path', guide.chapters(), ids=ids)
def test_exercises_have_solutions(path):
    text = path.read_text()
    asked = re.findall(r'^(\d+)\. ', text.partition('\n## Exercises\n')[2], re.M)
    solved = re.findall(r'^(\d+)\. ', (guide.GUIDE / 'solutions' / path.name).read_text(), re.M)
    assert len(asked) >= 3 and asked == solved == [str(i + 1) for i in range(len(asked))]


def test_what_is_cited_is_listed():
    """Each work that the chapters and solutions cite is in the list, and no other one."""
    listed = re.findall(r'^- (.+?)\. \*', REFERENCES.read_text(), re.M)
    cited = set().union(*(guide.cited(path.read_text()) for path in FILES if path != REFERENCES))
    assert cited == {*listed} - {'IEEE 754', 'RFC 3629'}
    assert listed == sorted(listed, key=lambda work: work.lower().replace('ä', 'a'))
    assert len(listed) == len(set(listed)) == len(re.findall('^- ', REFERENCES.read_text(), re.M))


@pytest.mark.parametrize('text, inside, printed', [
    ('the block', False, 'the block (chapter 6)'),
    ('the block', True, 'the block, chapter 6'),
    ('the chapter on precision', False, 'chapter 6 on precision'),
    ('The chapter on precision', False, 'Chapter 6 on precision'),
    ('chapter 6', False, 'chapter 6'),
    ('The next chapter', False, 'Chapter 6'),
])
def test_a_reference_has_the_number_of_its_chapter(text, inside, printed):
    assert guide.numbered(text, 6, inside) == printed


@pytest.mark.parametrize('term, found', [
    ('Clipping', 'clipping'), ('Temperature.', 'temperature'), ('Muon', 'Muon'), ('F1', 'F1'),
    ('Jaccard\nsimilarity', 'Jaccard similarity'), ('RMSNorm', 'RMSNorm'), ('Top-k', 'top-k'),
])
def test_terms_in_the_index(term, found):
    assert guide.indexed(term) == found


@pytest.mark.parametrize('name, made_of', [(name, made_of) for name, _, made_of
                                           in figures.drawings()])
def test_figures_are_new(name, made_of):
    """Each is drawn by the code and from the data that are there now, and stands in the book."""
    assert figures.drawn_from(figures.FIGURES / f'{name}.svg') == made_of, \
        f'draw it again: python dev/figures.py {name}'
    assert any(f'(figures/{name}.svg)' in path.read_text() for path in FILES)


def test_pictures_are_figures():
    names = {name for name, *_ in figures.drawings()}
    for path in FILES:
        for _, file, name in guide.PICTURE.findall(path.read_text()):
            assert name in names, file


needs_tools = pytest.mark.skipif(not (importlib.util.find_spec('pypandoc') and
                                      importlib.util.find_spec('typst')),
                                 reason='needs pypandoc-binary and typst')


@needs_tools
@pytest.mark.parametrize('names', ['a', pytest.param('ab', marks=pytest.mark.slow)])
def test_the_same_pdf_each_time(tmp_path, monkeypatch, names):
    monkeypatch.setattr(guide, 'document', functools.cache(guide.document))
    hashes = set()
    for name in names:
        assert guide.build(tmp_path / name) > len(guide.chapters())
        hashes.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(hashes) == 1
