"""core/start.py: how OpenMP's threads wait, on an idle and on a busy machine."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import core.start

ROOT = Path(core.start.__file__).parents[1]
LOOK = "import os, core.start; print(core.start.is_busy(), os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize('running, smt, busy', [
    ([1], '0', False), ([2], '0', True), ([2, 3, 2, 2, 1], '0', False), ([9, 2], '0', True),
    ([2], '1', False), ([9], '1', True)])
def test_is_busy(monkeypatch, running, smt, busy):
    """By what runs on a machine of eight logical cores; with two threads a core, half are room."""
    looks = iter(running * 5)

    def read_text(path, *args):
        return smt if 'smt' in str(path) else f'0.1 0.1 0.1 {next(looks)}/83 9409'
    monkeypatch.setattr(Path, 'read_text', read_text)
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    assert core.start.is_busy() == busy


def test_not_linux(monkeypatch):
    monkeypatch.setattr(Path, 'read_text', lambda *_: open('/no/such/file'))
    assert not core.start.is_busy()


@pytest.mark.skipif(not Path('/proc/loadavg').exists(), reason='Linux only')
@pytest.mark.parametrize('given', [{}, {'OMP_WAIT_POLICY': 'ACTIVE'}, {'LOCAL_RANK': '0'}])
def test_threads_sleep_on_a_busy_machine(given):
    """Unless the user has chosen, or torchrun has given each process cores of its own."""
    names = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'LOCAL_RANK')
    env = {name: value for name, value in os.environ.items() if name not in names} | given
    others = [subprocess.Popen([sys.executable, '-c', 'while True: pass'])
              for _ in range(os.cpu_count() or 1)]
    try:
        code = f"import sys; sys.modules['__main__'].__file__ = 'sample.py'; {LOOK}"
        said = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, text=True,
                              capture_output=True, check=True).stdout.split()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert said == ['True', given.get('OMP_WAIT_POLICY', 'None' if given else 'PASSIVE')]
