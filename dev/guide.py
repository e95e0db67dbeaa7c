"""The book as a PDF: python dev/guide.py makes out/guide.pdf from docs/guide/*.md.

The chapters are Markdown that GitHub shows as it is; pandoc makes Typst of it, and Typst the PDF
(pip install pypandoc-binary typst: both work without a network). What a chapter may hold besides
plain Markdown, mathematics in $..$ and $$..$$, tables and pictures:

    [model.py: MLP.forward](../../model.py)   alone in a paragraph: that code, with line numbers
    **a term**                                a term, where it is explained: goes into the index
    1.448<!-- shakespeare.val_loss -->        a number from docs/guide/data/shakespeare.json
    <a id="eq-softmax"></a>                   in the line before $$..$$: its name
    <a id="fig-mask"></a>                     in the line before a picture: its name
    [equation](#eq-softmax), [Figure](#fig-mask)    references, with the number behind the word
    [the block](06-block.md)                  a reference to a chapter: its number is added
    Young 1974, (Su et al. 2021)              a work that is listed in docs/guide/references.md
    ```python with >>>                        an example, which tests/test_guide.py runs

Solutions of the exercises are in docs/guide/solutions/, a file of the same name for each chapter.
"""
import ast
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / 'docs' / 'guide'
FENCE, CODE = r'^```.*?^```$', r'`[^`\n]+`(?:\{=typst\})?'
INCLUDE = re.compile(r'^\[([\w./-]+\.py)(?:: ([\w.]+))?\]\(([^)]+)\)$', re.M)
ANCHOR = re.compile(r'^<a id="([\w-]+)"></a>\n', re.M)
EQUATION = re.compile(ANCHOR.pattern + r'\$\$(.+?)\$\$', re.M | re.S)
NUMBER = re.compile(r'(-?[\d,]*\.?\d+(?:e[+-]?\d+)?)(%?)<!-- ([\w.-]+) -->')
PICTURE = re.compile(r'^!\[([^\]]+)\]\((figures/([\w-]+)\.svg)\)', re.M)
LINK = re.compile(r'(?<!!)\[([^\]]+)\]\(([^)\s]+)\)')
TERM = re.compile(r'\*\*([^*]+)\*\*')
CITATION = re.compile(r"([A-Z][\w-]+(?: et al\.| and [A-Z][\w-]+| Team)?),? \(?((?:19|20)\d\d)\b")
PROPER = ('Bradley', 'Jaccard', 'Kullback', 'Muon', 'Wilson')     # in the index with a capital


def chapters() -> list[Path]:
    """The files of the chapters, in order."""
    return sorted(GUIDE.glob('[0-9][0-9]-*.md'))


def find_code(path: Path, name: str) -> tuple[int, str]:
    """(number of the first line, text) of a function, class, method or constant in a Python file;
    of all of it without a name. Raises LookupError if there is none."""
    text = path.read_text(encoding='utf-8')
    lines, nodes = text.splitlines(), ast.parse(text).body
    if not name:
        return 1, text.rstrip()
    for part in name.split('.'):
        node = next((node for node in nodes if part in names_of(node)), None)
        if node is None:
            raise LookupError(f'{path.relative_to(ROOT)}: has no {name}')
        nodes = getattr(node, 'body', [])
    first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', ()))])
    found = lines[first - 1:node.end_lineno]
    indent = min(len(line) - len(line.lstrip()) for line in found if line.strip())
    return first, '\n'.join(line[indent:] for line in found)


def names_of(node) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.name] if hasattr(node, 'name') else []


def outside(pattern: str, text: str, change: Callable[[str], str]) -> str:
    """`text` with all that does not match `pattern` changed."""
    parts = re.split(f'({pattern})', text, flags=re.M | re.S)
    return ''.join(part if i % 2 else change(part) for i, part in enumerate(parts))


def quoted(text: str) -> str:
    """A string of Typst."""
    return json.dumps(text, ensure_ascii=False)


def listing(file: str, name: str) -> str:
    """A piece of the repository's code, as Typst."""
    first, code = find_code(ROOT / file, name)
    return f'```{{=typst}}\n#listing({quoted(file)}, {first}, {quoted(code)})\n```'


def link(match: re.Match) -> str:
    """A link as it is in the PDF: references to equations and figures are numbered, chapters are
    places of the same document, and a file of the repository is told by its name."""
    text, to = match.groups()
    place = to.partition('#')[2]
    if place.startswith(('eq-', 'fig-')):
        return f'`#ref(<{place}>, supplement: [{text}])`{{=typst}}'
    if (GUIDE / Path(to).name).is_file():
        before = match.string[:match.start()].rpartition('\n\n')[2]
        inside = before.count('(') > before.count(')')      # no brackets within brackets
        return f'[{numbered(text, int(Path(to).name[:2]), inside)}](#ch-{Path(to).stem})'
    return match[0] if '://' in to or to.startswith('#') else text


def numbered(text: str, number: int, inside: bool = False) -> str:
    """The words of a reference to a chapter, with its number; `inside` brackets without further
    ones."""
    if re.search(r'\bchapter\s+\d', text, re.I):
        return text
    if re.fullmatch(r'the (next|previous) (chapter|one)|the chapter before', text, re.I):
        return f'{"Chapter" if text[0] == "T" else "chapter"} {number}'
    found, n = re.subn(r'\b([Tt])he chapter\s+(?=on )',
                       lambda m: f'{"C" if m[1] == "T" else "c"}hapter {number} ', text)
    return found if n else f'{text}, chapter {number}' if inside else f'{text} (chapter {number})'


def indexed(term: str) -> str:
    """A term as it is in the index: in lower case, unless it is a name or an abbreviation."""
    term = ' '.join(term.split()).rstrip('.')
    common = re.match(r'[A-Z][a-z]+(?![A-Za-z])', term) and not term.startswith(PROPER)
    return term[0].lower() + term[1:] if common else term


def cited(text: str) -> set[str]:
    """The works that a text cites, as in references.md: {'Su et al. 2021', ..}."""
    return {f'{names} {year}' for names, year in CITATION.findall(' '.join(text.split()))}


def to_pandoc(text: str, label: str) -> str:
    """A chapter, with what pandoc does not know written as Typst; `label` names the chapter."""
    def include(part: str) -> str:
        return INCLUDE.sub(lambda m: listing(m[1], m[2] or ''), part)

    def change(part: str) -> str:
        part = EQUATION.sub(r'$$\2$$`<\1>`{=typst}', part)
        part = PICTURE.sub(r'![\1](\2){#fig-\3}', ANCHOR.sub('', part))
        part = re.sub(r'^# .*', rf'\g<0> {{#ch-{label}}}', part, flags=re.M)
        return LINK.sub(link, NUMBER.sub(r'\1\2', part))

    def note_terms(part: str) -> str:
        return TERM.sub(lambda m: f'**{m[1]}**`#term({quoted(indexed(m[1]))})`{{=typst}}',
                        part)
    text = outside(FENCE, outside(FENCE, text, include), change)
    return outside(f'{FENCE}|{CODE}', text, note_terms)


def to_typst(text: str, label: str) -> str:
    import pypandoc
    return pypandoc.convert_text(to_pandoc(text, label), 'typst', format='markdown-citations',
                                 extra_args=['--wrap=none', '--columns=999'])


def document() -> str:
    """The whole book in Typst."""
    parts = [(GUIDE / 'style.typ').read_text(encoding='utf-8')]
    parts += [to_typst(path.read_text(encoding='utf-8'), path.stem) for path in chapters()]
    solutions = ['```{=typst}\n#set heading(numbering: none)\n```', '# Solutions']
    for path in chapters():
        title = path.read_text(encoding='utf-8').partition('\n')[0].removeprefix('# ')
        solved = GUIDE / 'solutions' / path.name
        solutions += [f'## {title}', solved.read_text(encoding='utf-8').partition('\n')[2]]
    parts += [to_typst('\n\n'.join(solutions), 'solutions'),
              to_typst((GUIDE / 'references.md').read_text(encoding='utf-8'), 'references'),
              '#index-of-terms()']
    return '\n\n'.join(parts)


def build(target: Path) -> int:
    """Write the PDF; the number of its pages."""
    import typst
    target.parent.mkdir(parents=True, exist_ok=True)
    # The source lies beside the figures while Typst reads both.
    with tempfile.NamedTemporaryFile('w', dir=GUIDE, suffix='.typ', encoding='utf-8') as source:
        source.write(document())
        source.flush()
        pdf = typst.compile(source.name, root=str(GUIDE), ignore_system_fonts=True, timestamp=0)
    target.write_bytes(pdf)
    return len(re.findall(rb'/Type ?/Page\b', pdf))


if __name__ == '__main__':
    target = Path(sys.argv[1] if sys.argv[1:] else 'out/guide.pdf')
    print(f'{target}: {build(target)} pages, {target.stat().st_size / 1e6:.1f} MB')
