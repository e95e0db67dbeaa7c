"""The first import of every script: what must happen before torch is loaded, which takes seconds.

`--help` is answered, Ctrl-C ends with one line, and so does a start without the packages.
"""
import os
import re
import sys
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


script = getattr(sys.modules['__main__'], '__file__', None)
if script and ROOT in Path(script).resolve().parents[:2]:
    sys.excepthook = ended
    if {'--help', '-h'} & {*sys.argv[1:]}:
        from core.settings import print_help
        print_help(script)
        raise SystemExit(0)
