"""Records made of the source of the running Python's standard library: always there, no network.

Each function with a docstring is one: docstring -> function (chat), function -> the package it is
from (classification), the true function against a corrupted one (preferences).
"""
import ast
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LONGEST = 600       # characters of a function, without its docstring
N_PACKAGES = 8      # the packages with most functions are the classes


class Function(NamedTuple):
    where: str          # file:line
    package: str        # or module
    header: str         # def and signature
    about: str          # first paragraph of the docstring
    source: str         # without the docstring, dedented


def modules() -> list[Path]:
    """The files of the standard library without its tests, sorted."""
    library = Path(sysconfig.get_paths()['stdlib'])
    apart = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', 'lib2to3'}
    return [path for path in sorted(library.rglob('*.py'))
            if not apart & set(path.relative_to(library).parts) and path.stat().st_size]


def functions() -> Iterator[Function]:
    """The functions and methods with docstrings that are short, each source once."""
    library, seen = Path(sysconfig.get_paths()['stdlib']), set()
    for path in modules():
        try:
            text = path.read_text(encoding='utf-8')
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')     # of odd escapes in strings
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue    # a few are in other encodings, or templates
        package = path.relative_to(library).parts[0].removesuffix('.py')
        lines = text.split('\n')    # the lines of ast; str.splitlines splits elsewhere, too
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            found = function(node, lines)
            if found and found[2] not in seen:
                seen.add(found[2])
                yield Function(f'{path}:{node.lineno}', package, *found)


def function(node: ast.FunctionDef, lines: list[str]) -> tuple[str, str, str] | None:
    """(header, first paragraph of the docstring, source without it); None if unfit as an example.
    """
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return None
    first = node.body[0]
    header, body = lines[node.lineno - 1:first.lineno - 1], lines[first.end_lineno:node.end_lineno]
    if any(line[:node.col_offset].strip() for line in (*header, *body)):
        return None     # text that is less indented would be cut
    header, body = ('\n'.join(line[node.col_offset:] for line in part).strip('\n')
                    for part in (header, body))
    about, source = ' '.join(docstring.split('\n\n')[0].split()), f'{header}\n{body}'
    fit = len(source) <= LONGEST and about and header.endswith(':')
    return (header, about, source) if fit else None


def question(found: Function) -> str:
    return f'{found.header}\n{found.about}'


def docstrings() -> Iterator[tuple[str, dict]]:
    """Header and docstring -> function."""
    for found in functions():
        yield found.where, {'messages': [{'role': 'user', 'content': question(found)},
                                         {'role': 'assistant', 'content': found.source}]}


def origins() -> Iterator[tuple[str, dict]]:
    """Function -> its package, of the N_PACKAGES with most functions."""
    found = list(functions())
    packages = {name for name, _ in Counter(f.package for f in found).most_common(N_PACKAGES)}
    for f in found:
        if f.package in packages:
            yield f.where, {'text': f.source, 'label': f.package}


def corrupted() -> Iterator[tuple[str, dict]]:
    """Header and docstring -> the function, rather than one with mistakes (see corrupt)."""
    for found in functions():
        yield found.where, {'prompt': question(found), 'chosen': found.source,
                            'rejected': corrupt(found.source)}


SWAPS = {'==': '!=', '!=': '==', '<': '>', '>': '<', '+': '-', '-': '+', '*': '/', 'True': 'False',
         'False': 'True', 'and': 'or', 'or': 'and', 'is': 'in', 'in': 'is', '0': '1', '1': '0',
         'None': 'True', 'if': 'while', 'not': ''}


def corrupt(source: str) -> str:
    """The source with about one word in six exchanged for another of it, or for its opposite; a
    function of the source alone."""
    header, _, body = source.partition('\n')
    words = re.split(r'(#.*|\w+|==|!=|[<>+*-])', body)
    names = sorted({word for word in words if re.fullmatch(r'[a-zA-Z_]\w+', word)})
    generator = random.Random(source)
    at = [i for i in range(1, len(words), 2) if words[i] in SWAPS or words[i] in names]
    for i in generator.sample(at, min(len(at), max(1, len(at) // 6))):
        others = [name for name in names if name != words[i]]
        words[i] = SWAPS[words[i]] if words[i] in SWAPS else generator.choice(others or ['None'])
    return f'{header}\n{"".join(words)}'
