"""bench.py: what it measures and says; the peer's side with a stand-in for nanoGPT."""
import json

import pytest
import torch
from conftest import TINY

import bench
import train
from core.settings import Stop

# A model with nanoGPT's interface, and as many parameters as it is told to have.
PEER = '''
from dataclasses import dataclass
import torch
import torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int
    dropout: float; bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.rest = torch.nn.Parameter(torch.zeros({rest}))

    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0 * self.rest.sum()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
'''
GPT2 = dict(TINY, norm='layernorm', position='learned', mlp='gelu', qk_norm=False, tied=True,
            vocab_size=50, learning_rate=1e-3)


@pytest.fixture
def run_bench(monkeypatch, tmp_path):
    """run_bench(**settings of bench): one short round at a tiny GPT-2."""
    for name, value in GPT2.items():
        monkeypatch.setattr(train, name, value)
    threads = torch.get_num_threads()

    def run(**settings):
        for name, value in {'rounds': 3, 'steps': 1, 'warmup': 1, **settings}.items():
            monkeypatch.setattr(bench, name, value)
        return bench.main()

    yield run
    torch.set_num_threads(threads)


def peer(folder, rest: int) -> str:
    folder.mkdir(exist_ok=True)
    (folder / 'model.py').write_text(PEER.replace('{rest}', str(rest)))
    return str(folder)


def test_train(run_bench, capsys):
    result = run_bench()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result['tokens_per_step'] == TINY['batch_size'] * TINY['block_size']
    assert result['ours_tokens_per_second'] > 0 and 'ratio' not in result


def test_train_on_documents(run_bench, monkeypatch, capsys):
    """The model is given their numbers, as in training."""
    real, seen = train.Learner.step, []

    def step(*args):
        seen.append(args[1][0][2])
        return real(*args)
    monkeypatch.setattr(train.Learner, 'step', step)
    assert run_bench()['ours_tokens_per_second'] > 0 and seen.pop() is None
    monkeypatch.setattr(train, 'pack_documents', True)
    assert run_bench()['ours_tokens_per_second'] > 0
    assert seen.pop().shape == (TINY['batch_size'], TINY['block_size'])
    monkeypatch.setattr(train, 'arch', 'lstm')
    with pytest.raises(Stop):
        run_bench()
    assert 'pack_documents=True' in capsys.readouterr().err


def test_beside_a_peer(run_bench, capsys, tmp_path):
    parameters = run_bench()['parameters']
    result = run_bench(vs=peer(tmp_path / 'peer', parameters - 50 * TINY['n_embd']))
    assert result['ratio'] > 0 and result['nanogpt_tokens_per_second'] > 0
    assert 'times as fast' in capsys.readouterr().out


def test_a_peer_of_another_size_is_refused(run_bench, capsys, tmp_path):
    with pytest.raises(Stop):
        run_bench(vs=peer(tmp_path / 'peer', 1))
    assert 'parameters, ours' in capsys.readouterr().err
    with pytest.raises(Stop):
        run_bench(vs=str(tmp_path))
    assert 'no model.py' in capsys.readouterr().err


def test_tokenizer(monkeypatch, capsys):
    """Both trainers on a megabyte, each in its process; encoding beside tiktoken."""
    pytest.importorskip('tokenizers')
    for name, value in dict(what='tokenizer', corpus_mb=1, n_tokens=400, rounds=1).items():
        monkeypatch.setattr(bench, name, value)
    result = bench.main()
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == result and len(result['sha256']) == 64
    ours, theirs = (result['training'][side] for side in ('ours', 'huggingface'))
    assert 1e6 <= result['bytes'] < 1.3e6
    assert ours['bytes_per_token'] == pytest.approx(theirs['bytes_per_token'], rel=2e-3)
    assert ours['seconds'] > 0 and ours['peak_mb'] >= 0 and theirs['peak_mb'] >= 0
    assert result['ours_encoding_mb_per_second'] > 0.5 * result['tiktoken_encoding_mb_per_second']


def test_no_minbpe(monkeypatch, capsys, tmp_path):
    for name, value in dict(what='tokenizer', corpus_mb=1, n_tokens=300, rounds=1,
                            vs=str(tmp_path)).items():
        monkeypatch.setattr(bench, name, value)
    with pytest.raises(Stop):
        bench.main()
    assert 'no minbpe/' in capsys.readouterr().err
