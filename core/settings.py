"""Typed overrides of a script's globals, and the one way to stop with a message.

A script's settings are its lowercase module-level globals of type bool, int, float or str. Config
files (plain Python) and --name=value flags override them, left to right:

    python train.py config/shakespeare.py --batch_size=32

Every name and type is checked the same way wherever it comes from.
"""
import ast
import difflib
import io
import math
import os
import runpy
import sys
import time
import tokenize
import traceback
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from tqdm import tqdm


class Stop(SystemExit):
    """Raised by `stop`: ends the program with status 2; `message` is the line that was printed."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


def stop(message: str) -> NoReturn:
    """End the program with a one-line `message` on standard error and exit status 2."""
    rank = os.environ.get('RANK', '0')
    if rank != '0' and 'TORCHELASTIC_RUN_ID' in os.environ:
        time.sleep(5)   # rank 0 most likely says the same; then torchrun ends this process, too
    tqdm.write(('error: ' if rank == '0' else f'[rank {rank}] error: ') + message, file=sys.stderr)
    raise Stop(message)


def warn(message: str) -> None:
    """Print a one-line warning on standard error; the work goes on."""
    tqdm.write('warning: ' + message, file=sys.stderr)  # does not tear a progress bar


def is_setting(name: str, value) -> bool:
    return type(value) in (bool, int, float, str) and name.islower() and not name.startswith('_')


def settings_of(script: dict) -> dict:
    """All settings of a script with their present values."""
    return {name: value for name, value in script.items() if is_setting(name, value)}


def check_bounds(settings: dict, **bounds) -> None:
    """Stop if a setting lies outside its interval, as in check_bounds(globals(), dropout=(0, 0.9)).

    A bound of None means no limit on that side.
    """
    for name, (low, high) in bounds.items():
        value = settings[name]
        if (low is not None and value < low) or (high is not None and value > high):
            limits = [f'at least {low}' if low is not None else '',
                      f'at most {high}' if high is not None else '']
            stop(f'{name}={value}: must be {" and ".join(filter(None, limits))}')


def check_choice(settings: dict, **choices) -> None:
    """Stop if a setting is none of its allowed values: check_choice(globals(), norm=('a', 'b'))."""
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            stop(f'{name}={settings[name]}: must be one of {", ".join(map(str, allowed))}')


def configure(script: dict, argv: list[str], also: dict | None = None) -> None:
    """Apply the command line `argv` to the globals `script` of a script, in place.

    Words ending in .py are config files, --name=value are flags, other words fill the settings
    listed in the script's POSITIONAL, the last of them taking the rest. Sets
    CONFIG to the name of the last config file, FLAGS to the names of the settings given as flags,
    and GIVEN to all that were given. `also` are the globals of another script, for the names that
    `script` lacks.
    Stops with a message on anything unknown, of the wrong type or unreadable.
    """
    sys.excepthook = interrupted
    for stream in filter(None, (sys.stdout, sys.stderr)):
        outlive(stream, script.get('ENDS_WITH_STDOUT', False) and stream is sys.stdout)
    if '--help' in argv or '-h' in argv:
        print_help(script)
        raise SystemExit(0)
    known = {name: script for name in settings_of(script)}
    known = {name: also for name in settings_of(also or {})} | known
    positional = list(script.get('POSITIONAL', ()))
    words, flags, given, config = [], [], [], ''
    for word in argv:
        if word.startswith('--'):
            name, equals, text = word[2:].partition('=')
            owner = find_owner(known, name, word)
            owner[name] = parse(owner[name], name, text if equals else None, word)
            flags.append(name)
        elif word.endswith('.py'):
            for name, value in read_config(word).items():
                owner = find_owner(known, name, f'{word}: {name}={value!r}')
                owner[name] = convert(owner[name], name, value, f'{word}: {name}={value!r}')
                given.append(name)
            config = Path(word).stem
        elif positional:
            words.append(word)
        else:
            stop(f'{word}: unexpected word; {script_name(script)} takes config files (*.py) and '
                 f'flags (--setting=value); --help lists the settings')
    for i, name in enumerate(positional[:len(words)]):
        script[name] = ','.join(words[i:]) if i == len(positional) - 1 else words[i]
    for scope in filter(None, (script, also)):
        scope |= {'CONFIG': config, 'FLAGS': tuple(flags), 'GIVEN': (*given, *flags)}


def outlive(stream, ends: bool) -> None:
    """Go on without `stream` when nobody reads it any more, as after `| head -1`, or its disk is
    full: what is being made does not depend on what is printed. With `ends` the program ends."""
    def attempt(method, *text):
        try:
            return method(*text)
        except OSError as e:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not isinstance(e, BrokenPipeError):
                (stop if ends else warn)(f'{stream.name} cannot be written: {e.strerror}')
            if ends:
                raise SystemExit(0) from None

    stream.write, stream.flush = partial(attempt, stream.write), partial(attempt, stream.flush)


def interrupted(kind, value, trace) -> None:
    """Print one line, and no traceback, after Ctrl-C; whatever else was raised as always."""
    if issubclass(kind, KeyboardInterrupt):
        print('\ninterrupted; the same command again goes on or begins anew', file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)


def find_owner(known: dict[str, dict], name: str, word: str) -> dict:
    """The globals that hold the setting `name`, or stop and suggest the nearest name."""
    if name not in known:
        near = difflib.get_close_matches(name.replace('-', '_'), known, n=1, cutoff=0.5)
        stop(f'{word}: no setting named {name!r}'
             + (f', did you mean {near[0]!r}?' if near else '; --help lists the settings'))
    return known[name]


def script_name(script: dict) -> str:
    return Path(script.get('__file__', 'this script')).name


def read_config(path: str) -> dict:
    """Run the config file `path` and return the names it defines, without modules and _private."""
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, map(str, Path(path).parent.glob('*.py')), n=1)
        stop(f'{path}: no such config file' + (f', did you mean {near[0]}?' if near else ''))
    try:
        found = runpy.run_path(path)
    except SyntaxError as e:
        stop(f'{path}, line {e.lineno}: {e.msg}')
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        text = ' '.join(str(e).split())
        stop(f'{path}, line {lines[-1] if lines else "?"}: {type(e).__name__}: {text}')
    return {name: value for name, value in found.items()
            if not name.startswith('_') and not isinstance(value, ModuleType)}


def parse(default, name: str, text: str | None, word: str):
    """The value of a flag: `text` in the type of the setting's default; None is a bare --flag."""
    if text is None:
        if type(default) is not bool:
            stop(f'{word}: {name} needs a value: write --{name}={default or "..."}')
        return True
    if type(default) is str:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if type(default) is bool else text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return convert(default, name, value, word)


def convert(default, name: str, value, word: str):
    """`value` in the type of `default` (int -> float and 1e6 -> int are fine), or stop."""
    kind = type(default)
    if type(value) is kind and not (kind is float and not math.isfinite(value)):
        return value
    if kind is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    article = 'an' if kind is int else 'a'
    stop(f'{word}: {name} takes {article} {kind.__name__} (default {default!r})')


def print_help(script: dict) -> None:
    """Print the script's docstring and every setting with its default and trailing comment."""
    comments = setting_comments(Path(script['__file__']).read_text(encoding='utf-8'))
    print((script.get('__doc__') or '').strip() + '\n\nsettings:')
    for name, value in settings_of(script).items():
        print(f'  --{name}={value}'.ljust(36) + comments.get(name, ''))


def setting_comments(source: str) -> dict[str, str]:
    """The trailing comment of each module-level assignment in `source`, by name."""
    by_line = {t.start[0]: t.string.lstrip('# ') for t in
               tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    return {node.targets[0].id: by_line[node.end_lineno] for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            and node.end_lineno in by_line}
