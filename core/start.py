"""The first import of every script: what must happen before torch is loaded, which takes seconds.

`--help` is answered, Ctrl-C ends with one line, and so does a start without the packages. On a busy
machine OpenMP's threads are made to sleep while they wait for each other.
"""
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def ended(kind, value, trace) -> None:
    """What is printed at an error that nobody caught: one line if a package is not installed."""
    needed = re.findall(r'^\w+', (ROOT / 'requirements.txt').read_text(), re.M)
    if issubclass(kind, ModuleNotFoundError) and value.name in needed:
        print(f'error: {value.name} is not installed: pip install -r requirements.txt, in the '
              'environment that runs this', file=sys.stderr, flush=True)
        os._exit(2)
    from core.settings import interrupted
    interrupted(kind, value, trace)


def is_busy() -> bool:
    """Whether other processes compute, too: what Linux says runs, in five looks within 40 ms, is
    more than there is room for beside a thread on each core. (Two threads of one core are room.)"""
    try:
        shared = Path('/sys/devices/system/cpu/smt/active').read_text().strip() == '1'
        room = 1 + (os.cpu_count() or 1) // 2 * shared
        for look in range(5):
            time.sleep(0.01 * bool(look))
            running = Path('/proc/loadavg').read_text().split()[3].partition('/')[0]
            if int(running) <= room:
                return False
    except (OSError, ValueError, IndexError):   # another system than Linux
        return False
    return True


script = getattr(sys.modules['__main__'], '__file__', None)
if script and ROOT in Path(script).resolve().parents[:2]:
    sys.excepthook = ended
    if {'--help', '-h'} & {*sys.argv[1:]}:
        from core.settings import print_help
        print_help(script)
        raise SystemExit(0)
    # By default they spin, which is fastest where they are alone. Where one of them is displaced by
    # another process, the others then take its time (docs/LOG.md, "A busy machine").
    if not {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'LOCAL_RANK'} & {*os.environ} and is_busy():
        os.environ['OMP_WAIT_POLICY'] = 'PASSIVE'
