"""bench.py: what it measures and says; the peer's side with a stand-in for nanoGPT."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

import bench
from core import device as hardware
from core.net.weights import build_model
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
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
        return logits, loss + 0 * self.rest.sum()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
'''


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
    real, seen = bench.train_step, []

    def step(*args):
        seen.append(args[1][0][2])
        return real(*args)
    monkeypatch.setattr(bench, 'train_step', step)
    assert run_bench()['ours_tokens_per_second'] > 0 and seen.pop() is None
    run_bench.preset['pack_documents'] = True
    assert run_bench()['ours_tokens_per_second'] > 0
    assert seen.pop().shape == (TINY['batch_size'], TINY['block_size'])
    run_bench.preset['arch'] = 'lstm'
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


def test_limits_are_measured():
    """Of a plausible size, whatever the machine."""
    rate, bytes_per_second = hardware.matmul_rate('cpu', 'float32', 256), hardware.bandwidth('cpu')
    assert 1e9 < rate < 1e14 and 1e8 < bytes_per_second < 1e13


def test_memory_counts_what_is_there(run_bench, capsys, monkeypatch):
    """At least weights, gradients and AdamW's two moments; more with twice the rows."""
    found = run_bench(what='memory')
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    weights = 4 * train_parameters(run_bench.preset)
    assert found['ours_peak_mib'] * 2 ** 20 > 4 * weights
    run_bench.preset['batch_size'] = 2 * TINY['batch_size']
    run_bench.preset['micro_batch_size'] = 2 * TINY['batch_size']
    assert run_bench(what='memory')['ours_peak_mib'] > found['ours_peak_mib']


def train_parameters(preset: dict) -> int:
    config, _ = bench.our_config(SimpleNamespace(**preset))
    return sum(p.numel() for p in build_model(config, None, 'meta').parameters())


def test_a_step_is_as_train_makes_it(run_bench):
    """With what blocks recompute, and micro-batches no larger than the batch."""
    more = {'activation_checkpointing': True, 'batch_size': 6, 'micro_batch_size': 64}
    _, learner, batches = bench.prepared(SimpleNamespace(**run_bench.preset | more))
    assert learner.model.recompute and [len(x) for x, _, _ in batches] == [6]


def test_peak_memory_by_hand():
    """A step that holds two tensors of a mebibyte at once, beside weights of half a mebibyte."""
    model = torch.nn.Linear(256, 512, bias=False)

    def step():
        first = torch.ones(1 << 18)
        second = first + 1
        del first
        return second.sum().item()
    peak = bench.peak_memory(model, [], step, hardware.choose('cpu', 'float32', False))
    assert 2.5 * 2 ** 20 <= peak < 2.6 * 2 ** 20


def test_decode_beside_transformers(run_bench, capsys, monkeypatch):
    pytest.importorskip('transformers')
    run_bench.preset['compile'] = True
    monkeypatch.setattr(hardware, 'is_intel', lambda: True)
    found = run_bench(what='decode', vs='transformers', prompt_tokens=4, new_tokens=5, rounds=2)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    [one] = found['runs']
    assert one['same_tokens'] == 5 and one['transformers_ratio'] > 0 and one['rows'] == 1
    assert 0 < one['ours_mbu'] < 1
    assert found['ratio'] == {'float32': one['transformers_ratio_compiled']}


def test_decode_beside_llama_cpp(run_bench, capsys, monkeypatch):
    """Each kind of weights beside its nearest, one row and several; of a model that exists, too."""
    pytest.importorskip('xllamacpp')
    run_bench.preset |= {'n_embd': 64, 'n_head': 2, 'n_hidden': 96}
    options = dict(what='decode', prompt_tokens=4, new_tokens=5, rounds=1)
    found = run_bench(vs='llama.cpp', weights='float32,int8,int4', rows='1,2', **options)
    assert set(found['ratio']) == {'float32', 'int8', 'int4'}
    assert [(one['rows'], one['weights']) for one in found['runs']] == [
        (n, kind) for n in (1, 2) for kind in ('float32', 'int8', 'int4')]
    assert found['runs'][0]['same_tokens'] == 5 and 'same_tokens' not in found['runs'][3]
    assert all(one['llama.cpp_ratio'] > 0 for one in found['runs'])
    larger = SimpleNamespace(**run_bench.preset | {'vocab_size': 300})
    model = build_model(bench.our_config(larger)[0])
    monkeypatch.setattr(bench.models, 'load_run', lambda name, device: (
        model.eval(), bench.tokenizers.ByteTokenizer(), {}))
    found = run_bench(vs='', folders='out/some', weights='bfloat16', **options)
    assert found['ratio'] == {} and found['runs'][0]['ours_tokens_per_second'] > 0


@pytest.mark.parametrize('settings, message', [
    (dict(vs='no peer'), 'vs=no peer: decode is compared with transformers or llama.cpp'),
    (dict(prompt_tokens=10 ** 4), 'more than block_size'),
    (dict(weights='int3'), 'weights=int3: must be some of float32, bfloat16, int8, int4'),
    (dict(rows='1,0'), 'rows=1,0: must be numbers from 1 on'),
    (dict(weights='int8', what='train'), 'a model that is trained is not quantized')])
def test_decode_refuses(run_bench, capsys, settings, message):
    assert message in refused(capsys, run_bench, **{'what': 'decode'} | settings)


def refused(capsys, run_bench, **settings) -> str:
    with pytest.raises(Stop) as e:
        run_bench(**settings)
    return e.value.message


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


def test_size_without_data(run_bench, monkeypatch):
    """What a dataset's tokenizer is known to have is enough: nothing is downloaded for it."""
    preset = run_bench.preset | {'vocab_size': 0, 'dataset': 'openwebtext', 'tokenizer': ''}
    monkeypatch.setattr(bench, 'get_data', None)
    assert bench.our_config(SimpleNamespace(**preset))[1] == 50_261


def test_profile(run_bench, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_bench(profile=True)
    printed = capsys.readouterr().out
    assert 'aten::mm' in printed and 'Self CPU' in printed
    trace = json.loads((tmp_path / 'out' / 'bench-train-trace.json').read_text())
    assert len(trace['traceEvents']) > 100
