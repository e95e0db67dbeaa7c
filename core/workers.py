"""Several processes that work on a stream of items and give their results back in its order."""
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from core.settings import stop


def ordered_map(function: Callable, items: Iterable, workers: int, *shared) -> Iterator:
    """function(item, *shared) for each item, in order, by `workers` processes (1: this one).

    Items are taken a few ahead of the results, so both may be streams larger than memory. `shared`
    goes to each process once. Stops if a process is killed; those whose parent is killed end.
    """
    if workers == 1:
        for item in items:
            yield function(item, *shared)
        return
    # Forking is quick, and only on Linux safe.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    with ProcessPoolExecutor(workers, context, begin, (os.getpid(), function, shared)) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            stop('one of the working processes was killed: too little memory? try --workers=1')
        finally:
            for future in waiting:
                future.cancel()


job: tuple = ()     # in a worker: the function and what it shares


def begin(parent: int, function: Callable, shared: tuple) -> None:
    """What a worker does first. It ignores Ctrl-C, for it ends with its parent."""
    global job
    job = function, shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def work(item):
    function, shared = job
    return function(item, *shared)


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
