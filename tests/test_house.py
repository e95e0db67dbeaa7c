"""The house: which room may import which, how many files a room has, that there are no circles."""
import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the lowest to the highest; a room imports only what stands before it, and its own files.
ORDER = ('core', 'core/read', 'core/text', 'core/net', 'core/ranks', 'core/formats', 'core/run',
         'core/data', 'core/eval', 'core/planning', 'core/web', '.')
FILES = {path.relative_to(ROOT).as_posix(): path
         for path in [*ROOT.glob('*.py'), *ROOT.glob('core/**/*.py')]}
# model.py stands between these, which do not import it, and what builds and adapts models.
MODEL_MAY_IMPORT = {'core/device.py', 'core/net/kernels.py', 'core/net/lstm.py'}


def imports(path: Path, lazy: bool) -> set[str]:
    """The project's files that a file imports at its top, or anywhere in it."""
    tree, found = ast.parse(path.read_text(encoding='utf-8')), set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            base = node.module.replace('.', '/')
            found |= {f'{base}.py', *(f'{base}/{alias.name}.py' for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.replace('.', '/') + '.py' for alias in node.names}
    return found & FILES.keys()


def room(name: str) -> str:
    return Path(name).parent.as_posix()


def test_rooms_import_downward():
    for name, path in FILES.items():
        for other in imports(path, lazy=False) - {'model.py'}:
            if name == 'model.py':
                assert other in MODEL_MAY_IMPORT, other
                assert 'model.py' not in imports(FILES[other], lazy=True), other
            assert ORDER.index(room(other)) <= ORDER.index(room(name)), (name, other)


def test_no_circles():
    """Not even one that an import inside a function would hide."""
    seen, open_ = set(), []

    def visit(name):
        assert name not in open_, ' -> '.join([*open_[open_.index(name):], name])
        if name not in seen:
            open_.append(name)
            for other in sorted(imports(FILES[name], lazy=True)):
                visit(other)
            seen.add(open_.pop())
    for name in FILES:
        visit(name)


def test_rooms_have_at_most_nine_files():
    for name in ORDER[:-1]:
        files = [path for path in (ROOT / name).glob('*.py') if path.name != '__init__.py']
        assert len(files) <= 9, name


def functions(path: Path):
    """Every function of a file, with the class that it belongs to ('' for none)."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    owner = {id(f): node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
             for f in node.body}
    return [(owner.get(id(node), ''), node) for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)]


def test_sizes():
    """Of files, functions and lists of parameters; an optimizer's hyperparameters may be more."""
    for name, path in FILES.items():
        most = 400 if room(name) == '.' and name != 'bench.py' else 450
        assert len(path.read_text(encoding='utf-8').splitlines()) <= most, name
        for owner, f in functions(path):
            where = f'{name}: {owner} {f.name}'
            assert f.end_lineno - f.lineno < (100 if f.name == 'main' else 60), where
            if name != 'core/net/optim.py':
                positional = [a.arg for a in f.args.posonlyargs + f.args.args if a.arg != 'self']
                assert len(positional) <= 6, where
