"""Which of 48 planted faults the tests catch: python dev/planted_faults.py [numbers].

Each fault is one edit of one file, as a slip of the hand would make it. In a copy of the project,
the default tests of the files that import the edited one run until one fails; a fault that they all
let pass meets the whole default suite (not with --quick). What survives that is a gap in the tests.
"""
import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK, DATA, NET, TEXT = ('core/run/checkpoint.py', 'core/data/dataset.py', 'core/net/optim.py',
                          'core/text/tokenizer.py')
LEARN, RECORDS = 'core/run/learner.py', 'core/data/records.py'
# file, what stands there once, what stands there then
FAULTS = [
    ('model.py', 'a * cos - b * sin, b * cos + a * sin', 'a * cos + b * sin, b * cos - a * sin'),
    ('model.py', 'mask & (k > q - window)', 'mask & (k >= q - window)'),
    ('model.py', 'return index - torch.where(new', 'return index - 0 * torch.where(new'),
    ('model.py', 'math.sqrt(3 * p.size(1))', 'math.sqrt(3 * p.size(0))'),
    ('model.py', "('o_proj.weight', 'down_proj.weight', 'lm_head", "('o_proj.weight', 'lm_head"),
    ('model.py', 'self.lm_head.weight = self.wte.weight', 'pass'),
    ('model.py', 'self.k_norm(k.to(dtype)).type_as(v)', 'k'),
    ('model.py', 'logits < kth', 'logits <= kth'),
    ('model.py', '12 * config.n_layer', '6 * config.n_layer'),
    ('model.py', 'F.silu(gate)', 'F.gelu(gate)'),
    ('model.py', '(1 - kept) / factor', '(1 - kept) * factor'),
    ('model.py', 'cache.mask(T, config.window)', 'cache.mask(T, 0)'),
    ('model.py', 'mask & (doc[:, None, :, None] == doc[:, None, None, :])', 'mask'),
    (LEARN, 'n / (self.scaler.scale * self.ranks.dp)', 'n / self.scaler.scale'),
    (LEARN, 'skip=bool(skipped)', 'skip=False'),
    (LEARN, 'math.sqrt(squared_norm) / scaler.scale', 'math.sqrt(squared_norm)'),
    (LEARN, 'self.seed, step, micro_step, ranks', 'self.seed, step, 0, ranks'),
    (LEARN, 'o.state.clear()', 'pass'),
    (LEARN, 'micro_step == len(batches) - 1', 'micro_step == 0'),
    (LEARN, 'optim.problem(means[0], norm, limit)', 'optim.problem(means[0], norm, math.inf)'),
    (NET, '(step + 1) / (warmup_steps + 1)', 'step / (warmup_steps + 1)'),
    (NET, '(1 - decay_fraction) * max_steps', 'decay_fraction * max_steps'),
    (NET, 'beta=b, alpha=c', 'beta=b, alpha=b'),
    (NET, "1 - group['lr'] * group['weight_decay'])\n        torch._foreach_add_(params, update",
     "1 - group['weight_decay'])\n        torch._foreach_add_(params, update"),
    (NET, "not decays(p)], 'weight_decay': 0.0", "not decays(p)], 'weight_decay': weight_decay"),
    (NET, '.clamp(max=1.0)', ''),
    (NET, 'statistics.pstdev(grad_norms)', 'statistics.pvariance(grad_norms)'),
    (NET, 'self.scale /= 2', 'pass'),
    (DATA, '= ids[:-1], ids[1:], True', '= ids[:-1], ids[:-1], True'),
    (DATA, 'm = min(n, self.n_targets - start)', 'm = n'),
    (DATA, 'key=[self.seed, epoch]', 'key=[self.seed, 0]'),
    (DATA, 'doc[end:] = -1', 'pass'),
    (DATA, 'bisect.bisect_left(groups, (length,))', 'bisect.bisect_left(groups, (length + 1,))'),
    (DATA, 'weights[i], np.float32)[1:]', 'weights[i], np.float32)[:-1]'),
    (TEXT, "replace('\\r\\n', '\\n').", ''),
    (TEXT, "[role == 'assistant'] * len(ids)", '[True] * len(ids)'),
    (TEXT, 'found[list(set(self.special.values()) - set(self.written.values()))] = 0', 'pass'),
    (TEXT, 'decoder.decode(self.tokens[i])', "self.tokens[i].decode(errors='replace')"),
    ('core/text/bpe.py', 'every_second(first, after) if a == b else first', 'first'),
    (RECORDS, 'weight * (1.0 if mine and it else prompt_weight)',
     '(1.0 if mine and it else prompt_weight)'),
    (RECORDS, 'if not pair[1].lost]', 'if pair]'),
    (RECORDS, '(i == len(turns) - 1 or not last_only)', 'True'),
    (RECORDS, ".lower() == 'false'", ".lower() == 'no'"),
    (CHECK, "file_hash(checkpoint / name) != expected['sha256']", 'False'),
    (CHECK, 'os.rename(old, final)', 'shutil.rmtree(old)'),
    (CHECK, "{state['best_step'], step, *before}", '{step, *before}'),
    (CHECK, '.isfinite().all()]', '.isfinite().any()]'),
    (CHECK, 'offset + at for at in', 'at for at in'),
]


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, perhaps also of what it imports from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f'{node.module}.{a.name}' for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def tests_of(name: str) -> list[str]:
    """The test files that import a file of the project, or what they share that imports it:
    the one of its name first, and those that take minutes last."""
    module = name.removesuffix('.py').replace('/', '.')
    imports = {path: imported(path) for path in sorted((ROOT / 'tests').rglob('*.py'))}
    shared = {path.stem for path, names in imports.items() if module in names
              and path.stem in ('harness', 'layouts')}
    found = [path.relative_to(ROOT).as_posix() for path, names in imports.items()
             if path.stem.startswith('test_') and {module, *shared} & names]
    long = re.findall(r"'(test_\w+)'", (ROOT / 'tests/conftest.py').read_text(encoding='utf-8'))
    return sorted(found, key=lambda path: (Path(path).stem != f'test_{Path(name).stem}',
                                           Path(path).stem in long, '/parallel/' in path, path))


def failing(copy: Path, tests: list[str], limit: int) -> str:
    """The first test that fails in the copy; '' if none does."""
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *tests]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f'(still running after {limit} s)'
    lines = [line for line in done.stdout.splitlines() if line.startswith(('FAILED', 'ERROR'))]
    if done.returncode and not lines:
        return f'(pytest ends with {done.returncode})'
    return lines[0].split(' - ')[0].split(' ', 1)[1] if lines else ''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('numbers', nargs='*', type=int, help='which faults; all, without any')
    parser.add_argument('--quick', action='store_true', help='survivors do not meet all tests')
    asked = parser.parse_args()
    numbers, survivors = asked.numbers or range(len(FAULTS)), []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / 'project'
        os.chmod(folder, 0o755)     # some tests run as a user without rights
        files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True,
                               check=True).stdout.split()
        for file in files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
        for number in numbers:
            name, old, new = FAULTS[number]
            source, began = (ROOT / name).read_text(encoding='utf-8'), time.perf_counter()
            if source.count(old) != 1:
                raise SystemExit(f'fault {number}: {old!r} does not stand once in {name}')
            (copy / name).write_text(source.replace(old, new), encoding='utf-8')
            caught = failing(copy, ['-n0', *tests_of(name)], 1800)
            if not caught and not asked.quick:
                caught = failing(copy, [], 3600)
            (copy / name).write_text(source, encoding='utf-8')
            survivors += [] if caught else [number]
            print(f'{number:3} {name}: {new!r:.50} {time.perf_counter() - began:.0f} s: '
                  f'{caught or "SURVIVES"}', flush=True)
    n = len(numbers)
    print(f'{n - len(survivors)} of {n} caught; survivors: {survivors}')


if __name__ == '__main__':
    main()
