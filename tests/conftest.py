"""Shared by all tests: a small real text, and training runs in this process."""
import os

# A worker of pytest-xdist has one core.
os.environ.setdefault('OMP_NUM_THREADS', '1' if 'PYTEST_XDIST_WORKER' in os.environ else '2')

import argparse
import contextlib
import gc
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which the first optimizer would import; see pytest_collection_finish

import train
from core.run import run as run_module
from core.settings import Stop, read_settings

# A model and a schedule small enough for a test, in the modern architecture.
TINY = dict(batch_size=4, block_size=32, n_layer=2, n_head=2, n_embd=32, norm='rmsnorm',
            position='rope', mlp='swiglu', qk_norm=True, tied=False, bias=False, max_steps=6,
            warmup_steps=2, eval_interval=3, log_interval=1, sample_tokens=20, compile=False,
            device='cpu', dtype='float32', threads=1, learning_rate=3e-3)

# The files that take longest begin first, so that no process is left alone with one at the end.
LONGEST = ('test_readme', 'test_layouts', 'test_train', 'test_corpus', 'test_identity',
           'test_signals', 'test_finetune', 'test_arrange', 'test_tuning', 'test_kill')

TABLES = {}     # what tests/parallel compared and counted: title -> rows of cells, header first
FAULTS = {}     # what tests/faults did: fault -> (number of tries, what came of it)


class Quiet:
    """For a handler of an HTTP server that says nothing of its requests."""

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(handler):
    """An HTTP server on this machine, with a free port, whose requests the handler answers."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pytest_addoption(parser):
    parser.addoption('--quick', action='store_true', help='the first test of every file only')


def pytest_collection_modifyitems(config, items):
    """With --quick the first test of every file that starts no other processes of ours."""
    if config.getoption('--quick'):
        first = {item.path: item for item in reversed(items)}
        chosen = [item for path, item in reversed(first.items())
                  if path.parent.name not in ('faults', 'parallel')]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if hasattr(config, 'workerinput'):
        items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))


def pytest_collection_finish():
    """What is loaded by now stays: not looked at again whenever a test collects garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    """A worker of pytest-xdist sends what its tests have noted."""
    if hasattr(session.config, 'workeroutput'):
        session.config.workeroutput['noted'] = [TABLES, FAULTS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    tables, faults = getattr(node, 'workeroutput', {}).get('noted', [{}, {}])
    for title, rows in tables.items():
        TABLES[title] = [*TABLES.get(title, rows[:1]), *rows[1:]]
    for fault, (tries, outcome) in faults.items():
        FAULTS[fault] = FAULTS.get(fault, (0,))[0] + tries, outcome


def pytest_terminal_summary(terminalreporter):
    """The tables that docs/scale.md and docs/survival.md show."""
    for title, (header, *rows) in TABLES.items():
        terminalreporter.section(title)
        for cells in (header, ['---'] * len(header), *rows):
            terminalreporter.write_line(f'| {" | ".join(map(str, cells))} |')
    if FAULTS:
        terminalreporter.section('what a run survives')
        terminalreporter.write_line('| what happens | tries | what comes of it |\n|---|---|---|')
        for fault, (tries, outcome) in FAULTS.items():
            terminalreporter.write_line(f'| {fault} | {tries:,} | {outcome} |')


def wait_for_saving() -> None:
    for thread in threading.enumerate():
        if thread.name == 'save a checkpoint':
            thread.join()


def end_of_process() -> None:
    """What the end of a process does: a stopped run's checkpoint is written, its lock closed."""
    wait_for_saving()
    gc.collect()


def note_row(title: str, header: str, *cells) -> None:
    """A row of a table that the session ends with; `header` has the names of its columns."""
    TABLES.setdefault(title, [header.split(', ')]).append(cells)


def stopped(capsys, run) -> str:
    """The message of a stop: one line on standard error, status 2, nothing on standard output."""
    capsys.readouterr()
    with pytest.raises(Stop) as e:
        run()
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ''
    assert err == f'error: {e.value.message}\n' and '\n' not in e.value.message
    return e.value.message


def stopped_at_last(capsys, run) -> str:
    """The same where progress bars or warnings come before: the message is the last line."""
    capsys.readouterr()
    with pytest.raises(Stop) as e:
        run()
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == '' and '\n' not in e.value.message
    assert ('\n' + err).endswith(f'\nerror: {e.value.message}\n') and err.count('error: ') == 1
    return e.value.message


def without_picture(run: Path) -> bool:
    """plot_losses() with a file that is no picture."""
    return bool((run / 'loss.png').write_bytes(b'\x89PNG'))


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """loss.png takes a third of a tiny run's time; the tests that are marked `pictures` draw it."""
    if not request.node.get_closest_marker('pictures'):
        monkeypatch.setattr(run_module, 'plot_losses', without_picture)


@pytest.fixture(scope='session')
def text_file(tmp_path_factory):
    """A file of 30,000 characters of ASCII source code, which every Python brings along."""
    path = tmp_path_factory.mktemp('text') / 'source.txt'
    text = Path(argparse.__file__).read_text(encoding='utf-8')
    path.write_text(text.encode('ascii', 'ignore').decode()[:30_000], encoding='utf-8')
    return path


@pytest.fixture
def run_train(tmp_path, text_file, monkeypatch):
    """run_train(**settings): train.main() with TINY settings, in a temporary folder."""
    monkeypatch.chdir(tmp_path)

    def run(**settings):
        end_of_process()
        settings = {**TINY, 'dataset': str(text_file), **settings}
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(train, name, value)
            patch.setattr(train, 'CONFIG', 'tiny')
            return train.main()

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------
# Post-training

# How a tuned model is made small enough for a test.
TUNED = dict(batch_size=4, max_steps=6, eval_interval=3, log_interval=1, learning_rate=3e-3,
             block_size=96, device='cpu', dtype='float32', threads=1)


@pytest.fixture(scope='session')
def chats(tmp_path_factory):
    """A file of 60 conversations, of which answers are of unequal lengths."""
    path = tmp_path_factory.mktemp('chats') / 'chats.jsonl'
    words = ['red', 'green', 'blue', 'a very dark yellow', 'white']
    path.write_text(''.join(json.dumps({'instruction': f'Colour of ball {i}?', 'output':
                                        f'It is {words[i % 5]}.' * (1 + i % 3)}) + '\n'
                            for i in range(60)))
    return path


@pytest.fixture(scope='session')
def preferences(chats):
    """A file of 60 pairs of answers to the same questions."""
    path = chats.with_name('preferences.jsonl')
    path.write_text(''.join(json.dumps({
        'prompt': found['instruction'], 'chosen': found['output'],
        'rejected': f'No{"o" * (i % 4)} idea.'}) + '\n'
        for i, found in enumerate(map(json.loads, chats.read_text().splitlines()))))
    return path


@pytest.fixture(scope='session')
def texts(chats):
    """A file of 90 texts of two classes."""
    path = chats.with_name('texts.tsv')
    path.write_text(''.join(f'{"up" if i % 3 else "down"}\t{"rise" if i % 3 else "fall"} '
                            f'number {i}{" and more" * (i % 4)}\n' for i in range(90)))
    return path


@pytest.fixture(scope='session')
def made(tmp_path_factory):
    """Where the base is kept that the first test has trained."""
    return tmp_path_factory.mktemp('made')


@pytest.fixture
def base(run_train, made, tmp_path):
    """A run whose tokenizer knows all bytes, for stages that go on with it, and its dataset."""
    if not (made / 'out').exists():
        run_train(tokenizer='byte', block_size=96, max_steps=2, eval_interval=2,
                  out_dir='out/base')
        shutil.copytree('data', made / 'data')
        shutil.copytree('out', made / 'out')
    else:
        shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return 'out/base'


@pytest.fixture
def run_stage(base, monkeypatch):
    """run_stage(script, **settings): its main() with TUNED settings, on the base."""
    def run(script, **settings):
        end_of_process()
        with monkeypatch.context() as patch:
            for name, value in {'run_dir': base, **TUNED, **settings}.items():
                patch.setattr(script, name, value)
            return script.main()
    return run


@pytest.fixture
def run_bench(monkeypatch, tmp_path):
    """run_bench(**settings of bench): one short round of run_bench.preset, a tiny GPT-2."""
    import bench
    from core import device as hardware
    real = hardware.matmul_rate
    monkeypatch.setattr(hardware, 'matmul_rate', lambda name, dtype, size: real(name, dtype, 128))
    monkeypatch.setattr(hardware, 'bandwidth', lambda name: 1e11)
    threads = torch.get_num_threads()

    def run(script=bench, **settings):
        if script is bench:
            settings = {'rounds': 3, 'steps': 1, 'warmup': 1, **settings}
        for name, value in settings.items():
            monkeypatch.setattr(script, name, value)
        return script.main(run.preset)

    run.preset = read_settings(bench.TRAIN) | TINY | dict(
        norm='layernorm', position='learned', mlp='gelu', qk_norm=False, tied=True, vocab_size=50,
        learning_rate=1e-3)
    yield run
    torch.set_num_threads(threads)
