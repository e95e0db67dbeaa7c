"""finetune.py and dpo.py on several processes, and killed: what they learn stays the same."""
import pytest
import torch
from conftest import TUNED
from harness import Ranks, note
from test_finetune import tensors_of

from core.run import checkpoint
from core.run.log import read_log

SETTINGS = {'chat': ('finetune', dict(answers=1, answer_tokens=4)),
            'classify': ('classify', dict(balance=True)),
            'adapters': ('finetune', dict(lora_rank=2, answers=0)),
            'dpo': ('dpo', dict(learning_rate=1e-3))}



def one_of(fast: str) -> list:
    """All kinds, of which one is not slow."""
    return [pytest.param(kind, marks=() if kind == fast else pytest.mark.slow)
            for kind in ('chat', 'dpo', 'classify', 'adapters')]


def settings_of(kind, chats, texts, preferences, base):
    stage, settings = SETTINGS[kind]
    data = preferences if stage == 'dpo' else texts if kind == 'classify' else chats
    return dict(stage=stage, dataset=str(data), run_dir=base, **{**TUNED, **settings})


@pytest.mark.parametrize('kind', one_of('chat'))
def test_two_ranks_are_one(tmp_path, chats, texts, preferences, base, kind):
    """With answers of unequal length, and a batch that does not divide by two."""
    settings = settings_of(kind, chats, texts, preferences, base) | {'batch_size': 5}
    found = {}
    for world in (1, 2):
        ranks = Ranks(tmp_path, world, out_dir=f'out/{world}', **settings)
        assert ranks.wait(120) == [0] * world, ranks.text()[-3000:]
        found[world] = [e for event in ('eval', 'step')
                        for e in read_log(tmp_path / f'out/{world}', event)]
    for one, two in zip(found[1], found[2], strict=True):
        for name in ('val_loss', 'interval', 'accuracy', 'kl', 'train_loss', 'grad_norm'):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=2e-5, abs=2e-6), (name, one, two)


@pytest.mark.parametrize('kind', one_of('dpo'))
def test_killed_and_resumed(tmp_path, chats, texts, preferences, base, kind):
    """Bitwise what an uninterrupted run has."""
    settings = settings_of(kind, chats, texts, preferences, base) | {
        'max_steps': 30, 'eval_interval': 2}
    whole = Ranks(tmp_path, out_dir='out/whole', **settings)
    assert whole.wait(120) == [0], whole.text()[-3000:]
    cut = Ranks(tmp_path, out_dir='out/cut', **settings)
    assert cut.wait_for(lambda: (checkpoint.steps(tmp_path / 'out/cut') or [0])[-1] > 4)
    cut.kill()
    assert checkpoint.steps(tmp_path / 'out/cut')[-1] < 30
    again = Ranks(tmp_path, out_dir='out/cut', **settings)
    assert again.wait(120) == [0], again.text()[-3000:]
    assert 'resuming out/cut after step' in again.text()
    found, expected = tensors_of(tmp_path / 'out/cut'), tensors_of(tmp_path / 'out/whole')
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in found.items())
    note('SIGKILL of finetune.py, dpo.py', 1, 'weights, adapters and optimizer state bitwise those '
         'of an uninterrupted run')
