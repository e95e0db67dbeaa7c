"""The first import of every script: what must happen before torch is loaded, which takes seconds.

`--help` is answered, and Ctrl-C ends with one line.
"""
import sys
from pathlib import Path

from core.settings import interrupted, print_help

script = getattr(sys.modules['__main__'], '__file__', None)
if script and Path(__file__).parents[1] in Path(script).resolve().parents[:2]:
    sys.excepthook = interrupted
    if {'--help', '-h'} & {*sys.argv[1:]}:
        print_help(script)
        raise SystemExit(0)
