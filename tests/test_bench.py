"""bench.py: what it measures and says; the peer's side with a stand-in for nanoGPT."""
import json
import sys

import pytest
import torch
from conftest import TINY

import bench
import train
from core import device as hardware
from core.settings import Stop
from model import build_model

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
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
        return logits, loss + 0 * self.rest.sum()

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
    real = hardware.matmul_rate
    monkeypatch.setattr(hardware, 'matmul_rate', lambda name, dtype, size: real(name, dtype, 128))
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


def test_train(run_bench, capsys, monkeypatch):
    result = run_bench()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    with monkeypatch.context() as patch:    # people have read it
        patch.setattr(sys.stdout, 'isatty', lambda: True)
        run_bench()
        assert '{"what"' not in capsys.readouterr().out
    assert result['tokens_per_step'] == TINY['batch_size'] * TINY['block_size']
    assert result['ours_tokens_per_second'] > 0 and 'nanogpt_eager_ratio' not in result


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
    assert result['nanogpt_eager_ratio'] > 0 and result['nanogpt_eager_tokens_per_second'] > 0
    assert 'times as fast' in capsys.readouterr().out


def test_a_peer_of_another_size_is_refused(run_bench, capsys, tmp_path):
    with pytest.raises(Stop):
        run_bench(vs=peer(tmp_path / 'peer', 1))
    assert 'parameters, ours' in capsys.readouterr().err
    with pytest.raises(Stop):
        run_bench(vs=str(tmp_path))
    assert 'no model.py' in capsys.readouterr().err


def deterministic():
    """A function (ends) -> whether its process is asked for deterministic algorithms."""
    def run(ends):
        if ends:
            raise MemoryError('a peer needs more memory')
        return torch.are_deterministic_algorithms_enabled()
    return run


def test_a_peer_has_a_process_of_its_own(capsys, monkeypatch):
    """Nothing that is set for ours is set there, and it ends with the object."""
    monkeypatch.setattr(hardware, 'choose_compile', lambda *_: (True, ''))
    hardware.choose('cpu', 'float32')
    assert torch.are_deterministic_algorithms_enabled()
    peer = bench.peers.Apart(deterministic)
    process = peer.process
    assert peer(False) is False and peer(False) is False and process.is_alive()
    del peer
    assert not process.is_alive()
    peer = bench.peers.Apart(deterministic)
    for ends in (True, False):      # the second one finds nobody there
        with pytest.raises(Stop):
            peer(ends)
        assert 'the process of a peer ended with status 1' in capsys.readouterr().err


def test_limits_are_measured():
    """Of a plausible size, whatever the machine."""
    rate, bytes_per_second = hardware.matmul_rate('cpu', 'float32', 256), hardware.bandwidth('cpu')
    assert 1e9 < rate < 1e14 and 1e8 < bytes_per_second < 1e13


def test_memory_counts_what_is_there(run_bench, capsys, monkeypatch):
    """At least weights, gradients and AdamW's two moments; more with twice the rows."""
    found = run_bench(what='memory')
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    weights = 4 * train_parameters()
    assert found['ours_peak_mib'] * 2 ** 20 > 4 * weights
    monkeypatch.setattr(train, 'batch_size', 2 * TINY['batch_size'])
    monkeypatch.setattr(train, 'micro_batch_size', 2 * TINY['batch_size'])
    assert run_bench(what='memory')['ours_peak_mib'] > found['ours_peak_mib']


def train_parameters() -> int:
    return sum(p.numel() for p in build_model(bench.our_config()[0], None, 'meta').parameters())


def test_peak_memory_by_hand():
    """A step that holds two tensors of a mebibyte at once, beside weights of half a mebibyte."""
    model = torch.nn.Linear(256, 512, bias=False)

    def step():
        first = torch.ones(1 << 18)
        second = first + 1
        del first
        return second.sum().item()
    peak, curve = bench.peak_memory(model, [], step, hardware.choose('cpu', 'float32', False))
    assert 2.5 * 2 ** 20 <= peak < 2.6 * 2 ** 20 and max(n for _, n in curve) == peak
    assert curve[-1][1] == pytest.approx(2 ** 19, abs=1000)     # all is free again


def test_decode_beside_transformers(run_bench, capsys, monkeypatch):
    pytest.importorskip('transformers')
    monkeypatch.setattr(train, 'compile', True)
    monkeypatch.setattr(hardware, 'is_intel', lambda: True)
    found = run_bench(what='decode', vs='transformers', rows=2, prompt_tokens=4, new_tokens=5,
                      rounds=2)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found['same_tokens'] == 10 and found['transformers_ratio'] > 0
    assert 0 < found['ours_mbu'] < 1 and found['transformers_ratio_compiled'] > 0
    assert 'no peer' in refused(capsys, run_bench, what='decode', vs='no peer')
    assert 'more than block_size' in refused(capsys, run_bench, what='decode', vs='',
                                             prompt_tokens=10 ** 4)


def refused(capsys, run_bench, **settings) -> str:
    with pytest.raises(Stop) as e:
        run_bench(**settings)
    return e.value.message


def test_race(run_bench, capsys, monkeypatch, tmp_path, text_file):
    """Ours stops at the first look at which it is as good as the peer's end."""
    monkeypatch.setattr(bench.peers, 'NANO_RECIPES', {'cpu': bench.peers.NanoRecipe(
        1, 1, 8, 16, 4, max_iters=6, warmup_iters=2, learning_rate=1e-9)})
    monkeypatch.chdir(tmp_path)
    for name, value in dict(dataset=str(text_file), tokenizer='char', max_steps=40,
                            learning_rate=1e-2, warmup_steps=0, vocab_size=0).items():
        monkeypatch.setattr(train, name, value)
    found = run_bench(what='race', vs=peer(tmp_path / 'peer', 1), seeds=2, eval_every=5,
                      peer_learning_rates='1e-8', tuned_steps=30)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    for kind in ('stock', 'tuned'):
        ours, theirs = found[kind]['ours'], found[kind]['nanogpt']
        assert found[kind]['reached'] == 2 and ours['loss'] <= theirs['loss']
        assert theirs['tokens'] == 6 * 4 * 16 and ours['tokens'] % (5 * ours_tokens()) == 0
        assert 0 < ours['first_step_seconds'] < ours['seconds']
    assert 'needs a peer' in refused(capsys, run_bench, what='race', vs='')


def ours_tokens() -> int:
    return train.batch_size * train.block_size


def test_clock_stops_at_the_target():
    losses = iter([3.0, 2.0, 1.9, 1.0])
    steps, cpu = [], hardware.choose('cpu', 'float32', False)
    found = bench.clocked(steps.append, lambda: next(losses), 8, 2, cpu, target=1.95)
    assert steps == [*range(6)] and found['steps'] == 6 and found['loss'] == 1.9
    assert [(n, loss) for n, _, loss in found['curve']] == [(2, 3.0), (4, 2.0), (6, 1.9)]
    missed = bench.clocked(steps.append, lambda: 5.0, 5, 2, cpu, target=1.0)
    assert missed['steps'] == 5 and [n for n, *_ in missed['curve']] == [2, 4, 5]


def test_nanogpt_schedule():
    """get_lr of its train.py by hand: 1e-3 x 51/101 in the warm-up, the middle, the end."""
    recipe = bench.peers.NANO_RECIPES['cpu']
    assert recipe.factor(50) == pytest.approx(51 / 101)
    assert recipe.factor(100) == pytest.approx(1.0)
    assert recipe.factor(1050) == pytest.approx(0.55) and recipe.factor(2000) == pytest.approx(0.1)


def test_runs(run_bench, capsys, monkeypatch, tmp_path):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    for name, loss, bits in (('a', 2.5, 3.5), ('b', 1.5, 4.5), ('d', 2.0, None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text('\n'.join(map(json.dumps, [
            {'event': 'start', 'flops_per_token': 10},
            {'event': 'eval', 'step': 1, 'tokens': 5, 'seconds': 0.5, 'val_loss': 3.0,
             'bits_per_byte': 5.0},
            {'event': 'eval', 'step': 2, 'tokens': 10, 'seconds': 1.0, 'val_loss': loss,
             'bits_per_byte': bits}])))
    (tmp_path / 'c').mkdir()
    found = run_bench(what='runs', folders='a,b,c')
    assert found['loss'] == 'bits_per_byte' and found['best'] == {'a': 3.5, 'b': 4.5}
    assert (tmp_path / 'out' / 'bench-runs.png').stat().st_size > 10_000
    assert 'c: has no evaluation' in capsys.readouterr().out
    found = run_bench(what='runs', folders='a,b,d')     # 'd' knows no bytes
    assert found['loss'] == 'val_loss' and found['best'] == {'a': 2.5, 'b': 1.5, 'd': 2.0}
    assert 'no run' in refused(capsys, run_bench, what='runs', folders='c')
    message = refused(capsys, run_bench, what='race', vs=peer(tmp_path / 'peer', 1),
                      peer_learning_rates='2e-3,fast')
    assert 'peer_learning_rates=2e-3,fast: must be numbers' in message


def test_size_without_data(monkeypatch):
    """What a dataset's tokenizer is known to have is enough: nothing is downloaded for it."""
    monkeypatch.setattr(train, 'vocab_size', 0)
    monkeypatch.setattr(train, 'dataset', 'openwebtext')
    monkeypatch.setattr(train, 'get_data', None)
    assert bench.our_config()[1] == 50_261


def test_profile_and_plot(run_bench, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_bench(profile=True, plot=True)
    printed = capsys.readouterr().out
    assert 'aten::mm' in printed and 'Self CPU' in printed
    trace = json.loads((tmp_path / 'out' / 'bench-train-trace.json').read_text())
    assert len(trace['traceEvents']) > 100
    assert (tmp_path / 'out' / 'bench-train.png').stat().st_size > 5_000


@pytest.mark.slow
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
