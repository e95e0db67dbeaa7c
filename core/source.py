"""The source that a run is made with: the project's files that its script imports, each as a hash
of its syntax tree, without docstrings and the text of messages: an edit of these changes no run.
"""
import ast
import functools
import gc
import hashlib
from pathlib import Path

# Functions that only tell people something, by their last name.
MESSAGES = {'stop', 'warn', 'print', 'print0', 'print_above', 'set_postfix_str'}


def source_hashes(script: str) -> dict[str, str]:
    """{file: hash} of a script and of all files in its folder that it or they import: 'model.py',
    'core/optim.py', ... Takes a tenth of a second.
    """
    path, found, collecting = Path(script).resolve(), {}, gc.isenabled()
    names = [path.name]
    gc.disable()    # so many new objects would set off the collection again and again
    for name in names:      # grows meanwhile
        file = path.parent / name
        if name not in found and file.is_file():
            found[name], imports = read_source(file, file.stat().st_mtime_ns)
            for level, module in imports:       # a relative import begins in the file's own folder
                base = Path(*Path(name).parts[:-level] if level else (), *module.split('.'))
                names += [f'{base}.py', f'{base}/__init__.py']
    if collecting:
        gc.enable()
    return dict(sorted(found.items()))


@functools.cache
def read_source(path: Path, changed: int) -> tuple[str, list]:
    """The hash of a file, last changed at that time, and [(level, module)] that it may import."""
    words, imports, text = [], [], path.read_bytes()
    try:
        add_words(ast.parse(text), words, imports)
    except (SyntaxError, ValueError):   # of a file that is not imported yet
        words = [repr(text)]
    return hashlib.sha256(' '.join(words).encode()).hexdigest()[:16], imports


def add_words(node: ast.AST, words: list[str], imports: list, message: bool = False) -> None:
    """Append what a syntax tree says to `words`, and what it imports to `imports`; `message`: the
    node is part of a message, of which strings are left out."""
    kind = type(node)
    if kind is ast.Expr and type(node.value) is ast.Constant:       # a docstring
        return
    if kind is ast.Constant:
        words += [repr(node.value)] * (not message or type(node.value) is not str)
        return
    if kind is ast.Import:
        imports += [(0, alias.name) for alias in node.names]
    elif kind is ast.ImportFrom:
        module = node.module or ''
        imports += [(node.level, f'{module}.{name}'.strip('.'))
                    for name in ('', *(alias.name for alias in node.names))]
    elif kind is ast.Raise and type(node.exc) is ast.Call:
        node.exc.raised = True
    elif kind is ast.Call:
        message = hasattr(node, 'raised') or is_message(node.func, message)
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


def is_message(func: ast.AST, within: bool) -> bool:
    """Whether strings that a function is called with are a message: it prints or stops, or it is a
    string's own, as in ', '.join(...), `within` a message. Others may do more than say something.
    """
    owner = getattr(func, 'value', None)
    name = getattr(func, 'id', None) or getattr(func, 'attr', '')
    return name in MESSAGES or name == 'write' and getattr(owner, 'id', '') == 'tqdm' or \
        within and type(owner) in (ast.Constant, ast.JoinedStr)
