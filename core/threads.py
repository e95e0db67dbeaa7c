"""The first import of every script: what must happen before torch is loaded, which takes seconds.

`--help` is answered, and Ctrl-C ends with one line. OpenMP's threads are told to sleep while they
wait for each other, if the user has not said how they wait: spinning, they would slow down
everything else on the machine, and that would slow down them.
"""
import os
import sys
from pathlib import Path

from core.settings import interrupted, print_help

if not {'OMP_WAIT_POLICY', 'KMP_BLOCKTIME', 'GOMP_SPINCOUNT'} & os.environ.keys():
    os.environ['OMP_WAIT_POLICY'] = 'PASSIVE'
script = getattr(sys.modules['__main__'], '__file__', None)
if script and Path(__file__).parents[1] in Path(script).resolve().parents[:2]:
    sys.excepthook = interrupted
    if {'--help', '-h'} & {*sys.argv[1:]}:
        print_help(script)
        raise SystemExit(0)
