"""core/eval/sandbox.py: right programs pass, and no other does, whatever it tries."""
import gzip
import json
import os
import resource
import socket
import subprocess
import time
from pathlib import Path

import pytest

from core.eval import sandbox

pytestmark = pytest.mark.skipif(bool(sandbox.refusal()), reason=sandbox.refusal() or 'it can run')
MIRROR = Path(os.environ.get('DATA_MIRROR', 'missing'))
TEST = 'def check(f):\n    assert f(2) == 3\n    assert f(-1) == 0\n'
RIGHT = 'def f(x):\n    return x + 1\n'

# Each is wrong: it never returns x + 1, but tries to be taken for right, or to do harm.
HOSTILE = {
    'leaves early': 'raise SystemExit(0)',
    'leaves at once': 'import os\nos._exit(0)',
    'leaves when called': 'def f(x):\n    raise SystemExit(0)',
    'leaves at once when called': 'import os\ndef f(x):\n    os._exit(0)',
    'prints the verdict': 'print("passed", flush=True)\ndef f(x):\n    return 0',
    'writes the verdict to all files': (
        'import os\nfor fd in range(32):\n    try:\n        os.write(fd, b"passed\\n")\n'
        '    except OSError:\n        pass\ndef f(x):\n    return 0'),
    'forges an answer': (
        'import os\nfor fd in range(3, 32):\n    try:\n        os.write(fd, b\'{"value": 9}\\n\')\n'
        '    except OSError:\n        pass\ndef f(x):\n    return 0'),
    'always equal': (
        'class A(int):\n    def __eq__(self, other):\n        return True\n'
        'def f(x):\n    return A(7)'),
    'always equal, no int': (
        'class A:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A()'),
    'equal list': (
        'class A(list):\n    def __eq__(self, other):\n        return True\n'
        'def f(x):\n    return A()'),
    'overrides print and open': (
        'import builtins\nbuiltins.print = builtins.open = lambda *a, **k: None\n'
        'def f(x):\n    return 0'),
    'overrides assert by its exception': (
        'import builtins\nbuiltins.AssertionError = type("A", (BaseException,), {})\n'
        'def f(x):\n    return 0'),
    'reads the frames': (
        'import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n'
        '        for key in list(frame.f_locals):\n            if "pass" in str(key).lower():\n'
        '                return frame.f_locals[key]\n        frame = frame.f_back\n    return 0'),
    'replaces json': (
        'import json\njson.dumps = lambda *a, **k: "true"\njson.loads = lambda *a, **k: [2]\n'
        'def f(x):\n    return 0'),
    'replaces pack': (
        'import sys\nsys.modules["__main__"].pack = lambda value: True\ndef f(x):\n    return 0'),
    'fork bomb': 'import os\nwhile True:\n    os.fork()',
    'fork bomb, quiet': (
        'import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass'),
    'starts a program': (
        'import subprocess\nsubprocess.run(["sleep", "1000"])\ndef f(x):\n    return 0'),
    'becomes a program': 'import os\nos.execv("/bin/sleep", ["sleep", "1000"])',
    'memory bomb': 'x = []\nwhile True:\n    x.append(bytearray(1 << 20))',
    'memory bomb when called': 'def f(x):\n    return "x" * (1 << 40)',
    'long answer': 'def f(x):\n    return "x" * (1 << 27)',
    'output flood': 'while True:\n    print("x" * 1000000)',
    'error flood': 'import sys\nwhile True:\n    sys.stderr.write("x" * 1000000)',
    'network': (
        'import socket\nsocket.create_connection(("1.1.1.1", 53), 2)\ndef f(x):\n    return x + 1'),
    'local network': (
        'import socket\nsocket.create_connection(("127.0.0.1", {port}), 2)\n'
        'def f(x):\n    return x + 1'),
    'a listener in the file system': (
        'import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect("{folder}/listener")\n'
        'def f(x):\n    return x + 1'),
    'leaves its group and outlives its parent': (
        'import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntry:\n    os.setsid()\n'
        'except OSError:\n    pass\ntime.sleep(60)'),
    'memory that is not its own': (
        'import ctypes\nc = ctypes.CDLL(None)\nif c.shmget(0, 1 << 20, 0o1600) >= 0:\n'
        '    def f(x):\n        return x + 1'),
    'writes a file': 'open("{folder}/made", "w")\ndef f(x):\n    return x + 1',
    'writes to the temporary folder': (
        'open("/tmp/scratchgpt-made", "w").write("x")\ndef f(x):\n    return x + 1'),
    'removes a file': 'import os\nos.remove("{folder}/kept")\ndef f(x):\n    return x + 1',
    'makes a symbolic link': (
        'import os\nos.symlink("/etc/passwd", "{folder}/link")\ndef f(x):\n    return x + 1'),
    'writes through a link': (
        'open("{folder}/old-link", "a").write("x")\ndef f(x):\n    return x + 1'),
    'mounts': (
        'import ctypes\nif ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0:\n'
        '    def f(x):\n        return x + 1'),
    'makes file systems writable': (
        'import ctypes, struct\nif ctypes.CDLL(None).syscall(442, -100, b"/", 0x8000, '
        'struct.pack("QQQQ", 0, 1, 0, 0), 32) == 0:\n    def f(x):\n        return x + 1'),
    'new namespaces': (
        'import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0:\n'
        '    def f(x):\n        return x + 1'),
    'signals': (
        'import os, signal\nfor pid in range(2, 40000):\n    try:\n        os.kill(pid, 9)\n'
        '    except OSError:\n        pass\n    else:\n        def f(x):\n'
        '            return x + 1'),
    'signals all': 'import os\nos.kill(-1, 9)\ndef f(x):\n    return 0',
    'ignores signals': (
        'import signal, time\nfor n in range(1, 64):\n    try:\n        signal.signal(n, 1)\n'
        '    except (OSError, ValueError):\n        pass\ntime.sleep(1000)'),
    'threads': (
        'import threading, time\nwhile True:\n    try:\n        '
        'threading.Thread(target=time.sleep, args=(1000,)).start()\n'
        '    except RuntimeError:\n        pass'),
    'threads left behind': (
        'import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n'
        'def f(x):\n    return 0'),
    'ptrace': (
        'import ctypes\nif ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0:\n'
        '    def f(x):\n        return x + 1'),
    'reads the evaluator': 'open("/proc/{pid}/environ").read()\ndef f(x):\n    return x + 1',
    'never ends': 'while True:\n    pass',
    'sleeps when called': 'import time\ndef f(x):\n    time.sleep(1000)',
    'deep recursion': 'def f(x):\n    return f(x)',
    'deep answer': (
        'def f(x):\n    y = []\n    for _ in range(100000):\n        y = [y]\n    return y'),
    'memory in files': (
        'import os\nfd = os.memfd_create("x")\nwhile os.write(fd, b"x" * (1 << 20)):\n    pass'),
    'nothing': '', 'no program': 'def f(x:\n', 'null bytes': 'def f(x):\n    return x + 1\0',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('outside')
    (path / 'kept').write_text('here')
    (path / 'old-link').symlink_to(path / 'kept')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path / 'listener'))
        listener.listen()
        yield path


@pytest.fixture(autouse=True)
def short_time(monkeypatch):
    monkeypatch.setattr(sandbox, 'SECONDS', 2.0)


def children() -> set[str]:
    """Processes of sandboxes that are running."""
    found = subprocess.run(['pgrep', '-f', 'sandbox.py (program|checker)'], text=True,
                           capture_output=True)
    return set(found.stdout.split())


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_programs_fail(name, folder, monkeypatch):
    monkeypatch.setattr(sandbox, 'SECONDS', 1.0)
    program = HOSTILE[name].replace('{folder}', str(folder)).replace('{pid}', str(os.getpid()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    said = sandbox.run(program.replace('{port}', '9'), TEST, 'f')
    assert said != sandbox.PASSED
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10, 'of 32 MiB'
    assert sorted(path.name for path in folder.iterdir()) == ['kept', 'listener', 'old-link']
    assert (folder / 'kept').read_text() == 'here'
    assert not Path('/tmp/scratchgpt-made').exists()


def test_a_checker_that_prints_on_and_on_is_cut_short():
    """It ends once it has said too much, long before its time, and not in our memory."""
    began = time.monotonic()
    said = sandbox.run('def f(): return 1', 'def check(f):\n    while True: print("x" * 99)', 'f')
    assert said == ('x' * 99 + '\n') * 3 and time.monotonic() - began < sandbox.SECONDS / 2


def test_no_process_is_left(monkeypatch):
    monkeypatch.setattr(sandbox, 'SECONDS', 1.0)
    for name in ('leaves its group and outlives its parent', 'ignores signals',
                 'fork bomb, quiet', 'threads left behind', 'never ends'):
        sandbox.run(HOSTILE[name], TEST, 'f')
    deadline = time.monotonic() + 5
    while (left := children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_right_programs_pass():
    assert sandbox.run(RIGHT, TEST, 'f') == sandbox.PASSED
    assert sandbox.run(RIGHT, 'def check(f):\n    assert f(2) == 4\n', 'f').startswith('Assertion')
    threads = 'import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n'
    assert sandbox.run(threads + RIGHT, TEST, 'f') == sandbox.PASSED
    assert sandbox.run('def f(x):\n    return 1 / 0', TEST, 'f').startswith('RuntimeError')


def test_plain_values_come_back_as_they_are():
    values = [None, True, 0, -7, 10 ** 5000, 1.5, float('inf'), '', 'é\n', [], [1, [2]], (1, 'a'),
              {1, 2}, {'a': (1, 2), 3: [None]}]
    for value in values:
        again = sandbox.unpack(json.loads(json.dumps(sandbox.pack(value))))
        assert again == value and type(again) is type(value)
    with pytest.raises(TypeError, match='no plain value'):
        sandbox.pack(type('A', (int,), {})(3))


@pytest.mark.slow
@pytest.mark.skipif(not MIRROR.is_dir(), reason='needs DATA_MIRROR')
def test_humaneval_solutions_pass(monkeypatch):
    monkeypatch.setattr(sandbox, 'SECONDS', 10.0)
    with gzip.open(MIRROR / 'humaneval.jsonl.gz') as f:
        rows = [json.loads(line) for line in f]
    said = [sandbox.run(row['prompt'] + row['canonical_solution'], row['test'],
                        row['entry_point'], row['prompt']) for row in rows]
    assert said == [sandbox.PASSED] * 164
    wrong = [sandbox.run(row['prompt'] + '    pass\n', row['test'], row['entry_point'],
                         row['prompt']) for row in rows]
    assert sandbox.PASSED not in wrong
