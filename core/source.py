"""The source that a run is made with: a hash of each file that its script imports from the project,
of the syntax tree without docstrings and the text of messages, whose edits change no run.
"""
import ast
import functools
import gc
import hashlib
from pathlib import Path

# What computes a model. Each run keeps copies of these files.
MATHEMATICS = ('model.py', 'core/net/kernels.py')
# Functions that only tell people something, by their last name.
MESSAGES = {'stop', 'warn', 'print', 'print0', 'print_above', 'set_postfix_str'}


def source_hashes(script: str | Path) -> dict[str, str]:
    """{file: hash} of a script and of all files in its folder that it or they import: 'model.py',
    'core/net/optim.py', ... Takes a fifth of a second."""
    script, found, collecting = Path(script).resolve(), {}, gc.isenabled()
    paths = [script]
    gc.disable()    # so many new objects would set off the collection again and again
    for path in paths:      # grows meanwhile
        if path not in found and path.is_file():
            found[path], imports = read_source(path, path.stat().st_mtime_ns)
            for level, module in imports:
                base = path.parents[level - 1] if level else script.parent
                paths += [base / f'{module}.py', base / module / '__init__.py']
    if collecting:
        gc.enable()
    return {path.relative_to(script.parent).as_posix(): found[path] for path in found}


@functools.cache
def read_source(path: Path, changed: int) -> tuple[str, list]:
    """The hash of a file, last changed at that time, and [(level, module)] that it may import, with
    slashes for dots."""
    words, imports, text = [], [], path.read_bytes()
    try:
        add_words(ast.parse(text), words, imports)
    except (SyntaxError, ValueError):   # of a file that is not imported yet
        words = [repr(text)]
    return hashlib.sha256(' '.join(words).encode()).hexdigest()[:16], imports


def add_words(node, words: list[str], imports: list, message: bool = False) -> None:
    """Append what a syntax tree says to `words`, and what it imports to `imports`; `message`: the
    node is part of a message, of which strings are left out."""
    kind = type(node)
    if kind is ast.Expr and type(node.value) is ast.Constant:       # a docstring
        return
    if kind is ast.Constant:
        words += [repr(node.value)] * (not message or type(node.value) is not str)
        return
    if kind is ast.Import:
        imports += [(0, alias.name.replace('.', '/')) for alias in node.names]
    elif kind is ast.ImportFrom:
        module = (node.module or '').replace('.', '/')
        imports += [(node.level, f'{module}/{name}'.strip('/'))
                    for name in ('', *(alias.name for alias in node.names))]
    elif kind is ast.Raise and type(node.exc) is ast.Call:
        node.exc.raised = True  # type: ignore  # a mark of ours
    elif kind is ast.Call:      # what a message calls may do more than say something
        owner = getattr(node.func, 'value', None)
        name = getattr(node.func, 'id', None) or getattr(node.func, 'attr', '')
        message = name in MESSAGES or name == 'write' and getattr(owner, 'id', '') == 'tqdm' or \
            message and type(owner) in (ast.Constant, ast.JoinedStr) or hasattr(node, 'raised')
    words.append(kind.__name__)
    for field in node._fields:
        value = getattr(node, field, None)
        if value is None or value == [] or field == 'ctx':  # other Pythons have other empty fields
            continue
        words.append(field)
        for child in value if type(value) is list else (value,):
            if isinstance(child, ast.AST):
                add_words(child, words, imports, message or kind is ast.Assert and field == 'msg')
            else:
                words.append(repr(child))
    words.append(')')
