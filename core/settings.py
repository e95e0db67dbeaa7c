"""Typed overrides of a script's globals, and the one way to stop with a message.

A script's settings are its lowercase module-level globals of type bool, int, float or str. Config
files (plain Python) and --name=value flags override them, left to right:

    python train.py config/shakespeare.py --batch_size=32

Every name and type is checked the same way wherever it comes from.
"""
import ast
import difflib
import errno
import io
import math
import os
import runpy
import symtable
import sys
import time
import tokenize
import traceback
from contextlib import suppress
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from tqdm import tqdm

# What nanoGPT, Hugging Face and others call our settings.
OTHER_NAMES = {
    'epochs': 'num_epochs num_train_epochs',
    'max_steps': 'max_iters num_iters lr_decay_iters steps epochs num_epochs num_train_epochs',
    'learning_rate': 'lr max_lr', 'min_lr_fraction': 'min_lr', 'grad_clip': 'max_grad_norm',
    'micro_batch_size': 'gradient_accumulation_steps accumulate', 'eval_tokens': 'eval_iters',
    'block_size': 'context_length n_ctx seq_len max_seq_len max_seq_length max_length',
    'max_new_tokens': 'max_length', 'n_embd': 'd_model hidden_size', 'lora_rank': 'r lora_r',
    'log_interval': 'logging_steps', 'dtype': 'precision bf16 fp16', 'prompt': 'start',
    'temperature': 'temp', 'num_samples': 'n', 'run_dir': 'model model_name_or_path',
    'init_from': 'model model_name_or_path', 'val_fraction': 'val_split test_size'}
# At least, at most: of a setting in all scripts that have it. None: no limit on that side.
BOUNDS = {name: bounds for bounds, names in (
    # sizes of which no product of three is beyond 64 bits
    ((1, 1 << 20), 'batch_size'), ((None, 1 << 20), 'n_head n_embd'), ((None, 10_000), 'n_layer'),
    ((0, 1 << 20), 'micro_batch_size n_kv_head head_dim n_hidden vocab_size lora_rank'),
    ((0, 1 << 24), 'block_size'), ((0, 10_000), 'depth threads'),
    ((1, None), 'log_interval sample_tokens answer_tokens max_new_tokens num_samples tp '
                'pp ns_steps rope_theta rounds steps warmup prompt_tokens new_tokens '
                'shard_tokens'),
    ((0, None), 'max_steps max_minutes warmup_steps '
                'learning_rate embed_learning_rate weight_decay muon_learning_rate '
                'muon_weight_decay grad_clip spike_sigma eval_interval eval_tokens save_interval '
                'sample_interval benchmark_interval benchmark_items replicas window max_files '
                'max_records chosen_weight answers step temperature top_k'),
    ((0, 1), 'decay_fraction min_lr_fraction norm_eps prompt_loss_weight min_p near_duplicates'),
    ((0, 0.99), 'dropout lora_dropout'),
    ((0, 0.9999), 'beta1 beta2 muon_momentum'),
    ((0, 0.9), 'val_fraction test_fraction'),
    ((1e-6, None), 'lora_alpha beta epochs repetition_penalty shard_gb'),
    ((1e-6, 1), 'top_p'), ((0, 0.49), 'label_smoothing'), ((0, 2 ** 31 - 1), 'seed'),
    ((0, 3), 'zero'), ((0.01, None), 'timeout_minutes'), ((1, 100), 'shingle_words'),
    ((0, 1000), 'workers')) for name in names.split()}
NOT_RUN = '; it was not run: a config file assigns settings, and names of its own that begin with _'


class Stop(SystemExit):
    """Raised by `stop`: ends the program with status 2; `message` is the line that was printed."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


def one_line(message: str) -> str:
    """A message that may quote anything: what is not printable, as a line end is, is escaped."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def stop(message: str) -> NoReturn:
    """End the program with a one-line `message` on standard error and exit status 2."""
    message = one_line(message)
    rank = os.environ.get('RANK', '0')
    if rank != '0' and 'TORCHELASTIC_RUN_ID' in os.environ:
        time.sleep(5)   # rank 0 most likely says the same; then torchrun ends this process, too
    tqdm.write(('error: ' if rank == '0' else f'[rank {rank}] error: ') + message, file=sys.stderr)
    raise Stop(message)


def warn(message: str) -> None:
    """Print a one-line warning on standard error, if this is rank 0; the work goes on."""
    if os.environ.get('RANK', '0') == '0':  # what others would warn of is the same
        # which does not tear a progress bar
        tqdm.write('warning: ' + one_line(message), file=sys.stderr)


def is_setting(name: str, value) -> bool:
    return type(value) in (bool, int, float, str) and name.islower() and not name.startswith('_')


def settings_of(script: dict) -> dict:
    """All settings of a script with their present values."""
    return {name: value for name, value in script.items() if is_setting(name, value)}


def read_settings(path) -> dict:
    """The settings of a script with their defaults, and its other constants, read from its source:
    nothing of it is run. With the script's place as __file__ they can be given to configure."""
    source, found = Path(path).read_text(encoding='utf-8'), {'__file__': str(path)}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            with suppress(ValueError):       # what is computed is no setting
                found |= assigned(node.targets[0], ast.literal_eval(node.value))
    return found


def assigned(target, value) -> dict:
    """What an assignment gives each name: of `a, b = 1, 2` it is {'a': 1, 'b': 2}."""
    if isinstance(target, ast.Name):
        return {target.id: value}
    return {k: v for one, x in zip(target.elts, value) for k, v in assigned(one, x).items()}


def check_bounds(settings: dict, **bounds) -> None:
    """Stop if a setting lies outside of its BOUNDS, or of those that are given for this script, as
    in check_bounds(globals(), block_size=(1, None))."""
    for name, (low, high) in (BOUNDS | bounds).items():
        if not is_setting(name, settings.get(name)):
            continue
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

    Words ending in .py are config files if the script has a CONFIG, --name=value are flags, other
    words fill the settings listed in the script's POSITIONAL, the last of them taking the rest.
    Sets CONFIG to the name of the last config file, CONFIGS to the paths of all, FLAGS to the names
    of the settings given as flags, and GIVEN to all that were given. `also` are the globals of
    another script, for the names that `script` lacks.
    Stops with a message on anything unknown, of the wrong type or unreadable.
    """
    sys.excepthook = interrupted
    open_streams()
    for stream in (sys.stdout, sys.stderr):
        outlive(stream, script.get('ENDS_WITH_STDOUT', False) and stream is sys.stdout)
    if '--help' in argv or '-h' in argv:
        print_help(script['__file__'])
        raise SystemExit(0)
    also = also or {}
    known = dict.fromkeys(settings_of(also), also) | dict.fromkeys(settings_of(script), script)
    positional = list(script.get('POSITIONAL', ()))
    takes_configs = 'CONFIG' in script or 'CONFIG' in also
    words, flags, given, configs = [], [], [], []
    for word in argv:
        if word.startswith('-'):
            name, equals, text = word.removeprefix('--').partition('=')
            owner = find_owner(known, name, word)
            owner[name] = parse(owner[name], name, text if equals else None, word)
            flags.append(name)
        elif takes_configs and word.endswith('.py'):
            for name, value in read_config(word, known).items():
                owner = find_owner(known, name, f'{word}: {name}={value!r}')
                owner[name] = convert(owner[name], name, value, f'{word}: {name}={value!r}')
                given.append(name)
            configs.append(word)
        elif not positional or takes_configs and not Path(word).exists() and any(
                f'/{path.with_suffix("")}'.endswith(f'/{word}')
                for path in Path('config').rglob('*.py')):
            stop(f'{word}: unexpected word; {Path(script["__file__"]).name} takes config files '
                 '(*.py) and flags (--setting=value)' + (
                     near_config(word) or '; --help lists the settings'))
        else:
            words.append(word)
    for i, name in enumerate(positional[:len(words)]):
        script[name] = ','.join(words[i:]) if i == len(positional) - 1 else words[i]
    for scope in filter(None, (script, also)):
        scope |= {'FLAGS': tuple(flags), 'GIVEN': (*given, *flags)}
        if takes_configs:
            scope |= {'CONFIG': Path(configs[-1]).stem if configs else '', 'CONFIGS': configs}


def open_streams() -> None:
    """See to it that no output fails: what the encoding lacks is written as \\u2026, and a stream
    that is closed (Python has None for it) takes all. Input must be in its encoding."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, 'w', encoding='utf-8')
                              for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='strict' if stream is sys.stdin else 'backslashreplace')


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
    """Print one line, and no traceback, after Ctrl-C, or if a file or the memory that there is was
    in the way; whatever else was raised as always."""
    full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS
    if issubclass(kind, KeyboardInterrupt):
        print('\ninterrupted; the same command again goes on or begins anew', file=sys.stderr)
    elif issubclass(kind, MemoryError) or "can't allocate memory" in str(value):    # of torch
        stop('this machine has too little memory for that; give smaller sizes')
    elif issubclass(kind, OSError) and (value.filename or value.errno in full):
        stop(f'{value.filename or "a file"}: {value.strerror}' + (
            '; make room, and give the same command again' if value.errno in full else ''))
    else:
        sys.__excepthook__(kind, value, trace)


def find_owner(known: dict[str, dict], name: str, word: str, more: str = '') -> dict:
    """The globals that hold the setting `name`, or stop and suggest the nearest name."""
    if name not in known:
        same = name.replace('-', '_')
        near = [ours for ours, others in OTHER_NAMES.items()
                if same in others.split() and ours in known] or \
            difflib.get_close_matches(same, known, n=1, cutoff=0.5)
        stop(f'{word}: no setting named {name!r}' + (
            f', did you mean {near[0]!r}?' if near else '; --help lists the settings') + more)
    return known[name]


def near_config(word: str) -> str:
    """A question that offers the config file which `word` may mean, '' if there is none."""
    beside = Path(word).parent.glob('*.py') if word.endswith('.py') else ()
    paths = {path.stem: path for path in (*Path('config').rglob('*.py'), *beside)}
    near = difflib.get_close_matches(Path(word).stem, paths, n=1)
    return f', did you mean {paths[near[0]]}?' if near else ''


def read_config(path: str, known: dict) -> dict:
    """Run the config file `path` and return what it defines, without _private names, modules,
    functions and classes. A file that assigns anything but settings is refused before it runs: it
    is another program."""
    if not Path(path).is_file():
        stop(f'{path}: no such config file' + near_config(path))
    try:
        text = Path(path).read_bytes()
        table = symtable.symtable(text, path, 'exec')   # type: ignore  # which takes bytes, too
        bound = {symbol.get_name(): symbol for symbol in table.get_symbols()
                 if symbol.is_assigned() or symbol.is_imported()}
        for name, symbol in bound.items():
            if not (symbol.is_imported() or symbol.is_namespace() or name.startswith('_')):
                find_owner(known, name, f'{path}: {name}', NOT_RUN)
        if b'import *' not in text and not known.keys() & bound.keys():
            stop(f'{path}: assigns no setting' + NOT_RUN)
        found = runpy.run_path(path)
    except SyntaxError as e:
        stop(f'{path}, line {e.lineno or "?"}: {e.msg}')
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        text = ' '.join(str(e).split())
        stop(f'{path}, line {lines[-1] if lines else "?"}: {type(e).__name__}: {text}')
    return {name: value for name, value in found.items() if name in known or not (
        name.startswith('_') or isinstance(value, ModuleType) or callable(value))}


def parse(default, name: str, text: str | None, word: str):
    """The value of a flag: `text` in the type of the setting's default; None is a bare --flag."""
    if text is None:
        if type(default) is not bool:
            stop(f'{word}: {name} needs a value: write --{name}={default or "..."}')
        return True
    if type(default) is str:
        return convert(default, name, text, word)
    try:
        value = ast.literal_eval(text.capitalize() if type(default) is bool else text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return convert(default, name, value, word)


def convert(default, name: str, value, word: str):
    """`value` in the type of `default` (int -> float and 1e6 -> int are fine), or stop."""
    kind, given = type(default), type(value)
    if kind is float and given is int and abs(value) < 1e300:
        return float(value)
    if kind is int and given is float and value.is_integer():
        value = int(value)
    if type(value) is kind and fits(value):
        return value
    article, more = 'an' if kind is int else 'a', ''
    if type(value) is kind:
        more = {str: ' without NUL', int: ' of 64 bits'}.get(kind, '')
    stop(f'{word}: {name} takes {article} {kind.__name__}{more} (default {default!r})')


def fits(value) -> bool:
    """Whether torch and the file system can take a value: not NaN, too large, or text with NUL."""
    if type(value) is float:
        return math.isfinite(value)
    return '\0' not in value if type(value) is str else abs(value) < 1 << 63


def print_help(path) -> None:
    """Print the docstring of the script at `path`, and its settings with default and comment, in
    the groups of its source. The script is not run."""
    open_streams()
    outlive(sys.stdout, ends=True)
    source = Path(path).read_text(encoding='utf-8')
    groups, comments = setting_comments(source)
    print(ast.get_docstring(ast.parse(source)) or '')
    for i, (name, value) in enumerate(settings_of(read_settings(path)).items()):
        if i == 0 or name in groups:
            print(f'\n{groups.get(name, "settings")}:')
        print(f'  --{name}={value}'.ljust(36) + comments.get(name, '').replace('\n', f'\n{"":36}'))


def setting_comments(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """Two comments of module-level assignments in `source`, by name: the line above one, which
    begins a group, and what stands behind it, with the lines below on which that goes on."""
    by_line = {t.start[0]: t for t in
               tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    text = lambda t: t.string.lstrip('# ')
    goes_on = lambda t: t and t.start[1] and t.line.lstrip().startswith('#')
    groups, comments = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, above = node.targets[0].id, by_line.get(node.lineno - 1)
            if above and above.start[1] == 0:
                groups[name] = text(above)
            if node.end_lineno in by_line:
                below = takewhile(goes_on, map(by_line.get, count(node.end_lineno + 1)))
                comments[name] = '\n'.join(map(text, (by_line[node.end_lineno], *below)))
    return groups, comments
