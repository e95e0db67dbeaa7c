"""core/run/checkpoint.py: which steps stay, and files of several writers. What kills, full disks
and damage leave is in tests/faults."""
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import end_of_process
from safetensors.torch import load_file, save_file

from core.net.weights import build_model
from core.run import checkpoint
from core.text.tokenizer import ByteTokenizer
from model import GPTConfig

MODEL = build_model(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=256))


@pytest.fixture
def saver(tmp_path):
    (tmp_path / 'log.jsonl').touch()    # which every run has
    found = checkpoint.Saver(tmp_path)
    yield found
    found.lock.close()


def save(saver, step: int, best_step: int = 0) -> None:
    saver.save(MODEL, [], ByteTokenizer(), {'step': step, 'best_step': best_step, 'config': {},
                                            'identity': {}})
    saver.finish(step)


def test_the_best_and_the_last_two_steps_stay(saver):
    kept = []
    for step in range(1, 7):
        save(saver, step, best_step=min(step, 2))
        kept.append(checkpoint.steps(saver.run))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]


def test_a_step_that_was_to_be_replaced_comes_back(saver):
    """A kill after the old one's new name, before the new one is in its place; and after that."""
    save(saver, 3)
    final, old = saver.run / 'step-00000003', saver.run / '.old-step-00000003'
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    final.rename(old)
    (saver.run / '.tmp-step-00000003').mkdir()
    saver.clean_up()
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    shutil.copytree(final, old)
    (old / 'state.json').write_text('{}')
    saver.clean_up()
    assert [path.name for path in saver.run.glob('*step*')] == ['step-00000003']
    assert (final / 'state.json').read_bytes() == before['state.json']


def test_what_the_next_run_of_a_process_waits_for(saver, monkeypatch):
    """The thread that saves, and no other: the idle one of a pool never ends."""
    written = threading.Event()
    monkeypatch.setattr(saver, 'write', lambda *args: written.wait())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        saver.save(MODEL, [], ByteTokenizer(), {'step': 1})
        waiting = threading.Thread(target=end_of_process)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        written.set()
        waiting.join(20)
        assert not waiting.is_alive()


def test_files_of_several_writers_become_one(tmp_path):
    """Each tensor with the bytes that it had, whatever its file, its size and its dtype."""
    tensors = {f'{i}': torch.randn(i, 3).to(dtype) for i, dtype in enumerate(
        [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32], 1)}
    files = {}
    for rank in range(2):
        name = f'model-{rank:05d}.safetensors'
        save_file({key: t for key, t in tensors.items() if int(key) % 2 == rank}, tmp_path / name)
        files[name] = checkpoint.flushed(tmp_path / name)
    found = checkpoint.merged(tmp_path, files)
    assert list(found) == ['model.safetensors'] and not [*tmp_path.glob('model-*')]
    whole = load_file(tmp_path / 'model.safetensors')
    assert whole.keys() == tensors.keys()
    assert all(torch.equal(whole[key], t) and whole[key].dtype == t.dtype
               for key, t in tensors.items())
