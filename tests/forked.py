"""Scripts in processes that are forked from one that has loaded PyTorch: a start takes 0.2 s
instead of 3. As a program this file is that process."""
import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SECONDS = 300       # that a script may take


@functools.cache
def server() -> subprocess.Popen:
    found = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE)
    atexit.register(found.kill)
    return found


def run_script(words: list[str], folder, stdin: str = '') -> subprocess.CompletedProcess:
    """What `python <words>` does in a folder, its standard output and error as text."""
    with tempfile.TemporaryDirectory() as files:
        Path(files, '0').write_text(stdin, encoding='utf-8')
        server().stdin.write(json.dumps([words, str(folder), {**os.environ}, files]) + '\n')
        server().stdin.flush()
        status = int(server().stdout.readline())
        said = [Path(files, name).read_text(encoding='utf-8', errors='replace') for name in '12']
        return subprocess.CompletedProcess(words, status, *said)


def begin(words, folder, environ, files) -> None:
    """Run a script in this process, as the interpreter would."""
    signal.alarm(SECONDS)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    for number, how in enumerate([os.O_RDONLY, *2 * [os.O_WRONLY | os.O_CREAT]]):
        os.dup2(os.open(f'{files}/{number}', how), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w', buffering=1)
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    status = 0
    try:
        runpy.run_path(words[0], run_name='__main__')
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)    # without taking PyTorch's modules apart, which takes a second


def serve() -> None:
    import matplotlib.figure  # noqa: F401
    import requests  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # noqa: F401
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            begin(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == '__main__':
    serve()
