"""What the scripts share. File locks come first: Windows lacks them, and more that is used here."""
import importlib.util
import sys

if importlib.util.find_spec('fcntl') is None:
    print('error: this system has no fcntl, the file locks of Unix: scratchGPT runs on Linux and '
          'macOS, and on Windows within WSL', file=sys.stderr)
    raise SystemExit(2)
