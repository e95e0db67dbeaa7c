"""train.py --init_from=<model>: training goes on from a run's or a Hugging Face model's weights."""
import os
import shutil
from pathlib import Path

import pytest
import torch

import export
import train
from core.formats import hf
from core.net.weights import build_model, copy_weights
from core.run import models
from core.run.identity import identity_of
from core.settings import Stop
from core.text.tokenizer import BPETokenizer, printable
from model import GPTConfig

STILL = dict(max_steps=1, learning_rate=0.0, weight_decay=0.0)      # a step that changes nothing


def test_from_a_run(run_train):
    first = run_train()
    run = first['run_dir']
    again = run_train(init_from=run, out_dir='out/b', **STILL)
    assert again['val_loss'] == pytest.approx(first['best_val_loss'], abs=1e-6)
    assert again['step'] == 1 and identity_of(Path('out/b'))['weights'] == \
        models.weights_hash(models.load_run(run)[0])
    assert run_train(init_from=run, **STILL)['run_dir'] == 'out/tiny-2'     # not the run itself


def test_from_an_exported_run(run_train, monkeypatch):
    """With a BPE, which the dataset then takes from the folder."""
    first = run_train(tokenizer='bpe', vocab_size=400)
    monkeypatch.setattr(export, 'run_dir', first['run_dir'])
    folder = export.main()['folder']
    again = run_train(init_from=folder, out_dir='out/b', **STILL)
    assert again['val_loss'] == pytest.approx(first['best_val_loss'], abs=1e-6)
    assert sorted(p.name for p in Path('data').iterdir() if not p.name.startswith('.')) == [
        'source_bpe400', 'source_of-tiny-hf']
    assert run_train(init_from=folder, out_dir='out/c')['val_loss'] < first['val_loss']
    assert run_train(init_from=folder, out_dir='out/c', eval_only=True)['run_dir'] == 'out/c'


def test_resumes(run_train, monkeypatch):
    run = run_train()['run_dir']
    settings = dict(init_from=run, seed=5)
    whole = run_train(out_dir='out/whole', **settings)
    real, calls = train.train_step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, 'train_step', killed)
    with pytest.raises(KeyboardInterrupt):
        run_train(out_dir='out/cut', **settings)
    monkeypatch.setattr(train, 'train_step', real)
    out = run_train(out_dir='out/cut', **settings)
    assert out['run_dir'] == 'out/cut' and out['val_loss'] == whole['val_loss']
    Path('out/cut/log.jsonl').write_text(''.join(
        line for line in Path('out/cut/log.jsonl').read_text().splitlines(True)
        if '"end"' not in line))
    other = run_train(out_dir='out/other', seed=7)['run_dir']
    assert run_train(out_dir='out/cut', init_from=other, seed=5)['run_dir'] == 'out/cut-2'
    shutil.copytree(run, 'copy')    # other names, the same weights
    assert run_train(out_dir='out/cut', init_from='copy', seed=5)['run_dir'] == 'out/cut'


def test_init_from_resume(run_train):
    """A run that began with a model goes on with more steps, without that model."""
    run = run_train(tokenizer='byte')['run_dir']
    run_train(init_from=run, tokenizer='byte', out_dir='out/b')
    Path(run).rename('elsewhere')
    out = run_train(init_from='resume', tokenizer='byte', out_dir='out/b', max_steps=8, n_layer=1)
    assert out['step'] == 8
    assert models.load_run('out/b')[0].config.n_layer == 2


@pytest.fixture
def two_tokenizers(text_file):
    """A BPE with <|endoftext|> only, as GPT-2's, and the same with the chat tokens behind it."""
    chat = BPETokenizer.train([text_file.read_text()], 405)
    ranks = [printable(token) for token in chat.ordinary]
    return BPETokenizer(chat.pattern, ranks, {'<|endoftext|>': 400}), chat


def test_a_vocabulary_that_grows(run_train, two_tokenizers):
    base, chat = two_tokenizers
    source = build_model(GPTConfig(block_size=64, vocab_size=401, n_layer=2, n_head=2, n_embd=32))
    hf.save(source, base, Path('base'))
    hf.save(build_model(GPTConfig(vocab_size=405, n_layer=1, n_head=1, n_embd=8)), chat,
            Path('chat'))
    run = run_train(init_from='base', tokenizer='./chat', **STILL)['run_dir']
    model, tok, state = models.load_run(run)
    assert tok.hash() == chat.hash() and model.config.vocab_size == 405
    assert model.config.norm == 'layernorm' and model.config.block_size == 32  # theirs and ours
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.allclose(model(ids)[..., :401], source(ids), atol=1e-6)
        assert (model(ids).softmax(-1)[..., 401:] < 0.01).all()
    assert torch.allclose(model.wte.weight[401:], source.wte.weight.mean(0).expand(4, -1))
    assert model.wpe.weight.shape == (32, 32)


def test_copy_weights():
    small = build_model(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
    large = build_model(GPTConfig(block_size=4, vocab_size=12, n_layer=1, n_head=1, n_embd=8), 1)
    copy_weights(small, large)
    assert large.lm_head.weight is large.wte.weight
    assert torch.equal(large.wte.weight[:10], small.wte.weight)
    assert torch.equal(large.wpe.weight, small.wpe.weight[:4])
    assert torch.equal(large.h['0'].attn.q_proj.weight, small.h['0'].attn.q_proj.weight)


def test_what_is_refused(run_train, two_tokenizers, monkeypatch):
    base, _ = two_tokenizers
    hf.save(build_model(GPTConfig(block_size=16, vocab_size=401, n_layer=1, n_head=1, n_embd=8)),
            base, Path('base'))

    def refused(**settings) -> str:
        with pytest.raises(Stop) as e:
            run_train(init_from='./base', **settings)
        return e.value.message
    assert refused(tokenizer='byte').startswith('init_from=./base: its tokenizer is not that')
    assert refused(block_size=17).startswith('block_size=17: ') and '16 positions' in refused()
    monkeypatch.setattr(train, 'GIVEN', ('n_layer',))
    assert refused(block_size=16).startswith('n_layer=2: the model in init_from=./base has its own')
    monkeypatch.setattr(train, 'GIVEN', ('vocab_size',))
    assert refused(block_size=16, vocab_size=999).startswith('vocab_size=999')
    monkeypatch.setattr(train, 'GIVEN', ('depth',))
    assert 'depth' in refused(block_size=16, depth=3)
    assert not os.path.exists('out')
