"""core/net/lora.py: low-rank adapters; PEFT is the reference for core/formats/peft.py."""
import copy
import os
from dataclasses import asdict

import pytest
import torch
from conftest import stopped
from safetensors.torch import load_file

import classify
import finetune
import model as model_module
from core.device import Device
from core.formats import hf
from core.formats import peft as files
from core.net import lora, optim
from core.net.weights import build_model, named_weights
from core.run import checkpoint, models
from core.source import source_hashes
from core.text.tokenizer import ByteTokenizer
from model import GPTConfig, count_parameters

os.environ['HF_HUB_OFFLINE'] = '1'
CPU = Device('cpu', 'cpu', 'float32', False, 1e11, [])
VOCAB = 264     # the tokenizer's 261, and some that it does not use
LLAMA = dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=False, tied=False)
OURS = {'gpt2': {}, 'llama': LLAMA,
        'qwen3': dict(LLAMA, qk_norm=True, n_kv_head=2, head_dim=16, norm_eps=1e-6)}
ALL = {'gpt2': 'q_proj,k_proj,v_proj,o_proj,up_proj,down_proj', 'llama': ','.join(lora.TARGETS),
       'qwen3': ','.join(lora.TARGETS)}
ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def tiny(name: str, seed: int = 0, **changes):
    """A model of one of the three architectures, in eval mode, with no weight that is 0 or 1."""
    model = build_model(GPTConfig(**{'block_size': 64, 'vocab_size': VOCAB, 'n_layer': 2,
                                     'n_head': 4, 'n_embd': 32, **OURS[name], **changes}))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def learnt(model, std: float = 0.2):
    """Give adapters that are at their beginning a B as if they had learnt something."""
    generator = torch.Generator().manual_seed(2)
    for layer in lora.adapters(model).values():
        layer.lora_B.copy_(std * torch.randn(layer.lora_B.shape, generator=generator))
    return model


def adapted(name: str, targets: str = '', rank: int = 3, alpha: float = 12.0,
            dropout: float = 0.0, **changes):
    """A tiny model with adapters that have learnt something."""
    model = tiny(name, **changes)
    lora.add(model, rank, alpha, targets or ALL[name], dropout, 5)
    return learnt(model).eval()


@torch.no_grad()
def difference(a, b) -> float:
    a, b = (getattr(found, 'logits', found) for found in (a(ids), b(ids)))
    return (a - b).abs().max().item()


# ---------------------------------------------------------------------------------------------
# What adapters compute


@pytest.mark.parametrize('name', OURS)
@torch.no_grad()
def test_at_first_nothing_changes(name):
    model = tiny(name)
    logits = model(ids)
    lora.add(model, 4, 16.0, ALL[name], 0.5, 0)
    assert len(lora.adapters(model)) == 2 * len(ALL[name].split(','))
    assert torch.equal(model(ids), logits)
    assert torch.equal(model.train()(ids), logits)      # what dropout leaves is multiplied by 0
    assert all(layer.lora_A.any() for layer in lora.adapters(model).values())


@pytest.mark.parametrize('name', OURS)
def test_merged(name):
    """W + alpha / r * B A, and a model without adapters that has these weights."""
    base, model = tiny(name), adapted(name)
    weights = checkpoint.model_tensors(model)
    known = named_weights(base)
    assert set(weights) == set(known)
    layers = lora.adapters(model)
    for key, p in known.items():
        layer = layers.get(key.removesuffix('.weight'))
        change = 0 if layer is None else \
            12 / 3 * layer.lora_B.double() @ layer.lora_A.double()
        assert (weights[key] - (p + change)).abs().max() <= 1e-5
        assert layer is not None or torch.equal(weights[key], p)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for key, p in named_weights(plain).items():
            p.copy_(weights[key])
    assert difference(plain, model) <= 1e-5
    assert difference(base, model) > 0.1


@pytest.mark.parametrize('name', OURS)
def test_off_gives_back_the_base(name):
    base, model = tiny(name), adapted(name)
    with_adapters = model(ids)
    with lora.off(model):
        assert torch.equal(model(ids), base(ids))
    assert torch.equal(model(ids), with_adapters)
    with pytest.raises(KeyError), lora.off(model):
        raise KeyError
    assert torch.equal(model(ids), with_adapters)
    with lora.off(base):    # dpo's reference may have none
        assert torch.equal(model(ids), with_adapters)


def test_dropout_in_training_only():
    model, without = adapted('qwen3', dropout=0.5), adapted('qwen3')
    assert difference(model, without) == 0
    model.train()
    first = model(ids)
    assert not torch.equal(first, model(ids))
    with lora.off(model):
        assert torch.equal(model(ids), tiny('qwen3')(ids))
    torch.manual_seed(0)
    mean = torch.stack([model.h['0'].mlp.up_proj(torch.ones(32)).detach() for _ in range(4000)])
    expected = without.h['0'].mlp.up_proj(torch.ones(32))
    assert (mean.mean(dim=0) - expected).abs().max() < 5 * mean.std(dim=0).max() / 4000 ** 0.5
    assert difference(model.eval(), without) == 0


def test_first_weights_are_a_function_of_seed_and_name():
    a, b, c = tiny('llama'), tiny('llama', seed=1), tiny('llama')
    lora.add(a, 4, 16.0, ALL['llama'], 0.0, 7)
    lora.add(b, 4, 16.0, 'o_proj', 0.0, 7)      # in another model, without the others
    lora.add(c, 4, 16.0, 'o_proj', 0.0, 8)
    first, (a, b, c) = a.h['0'], (model.h['1'].attn.o_proj.lora_A for model in (a, b, c))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a, first.attn.o_proj.lora_A)
    assert a.abs().max() <= 32 ** -0.5 and a.abs().max() > 0.9 * 32 ** -0.5


# ---------------------------------------------------------------------------------------------
# What learns


def step(model, optimizers, number: int) -> None:
    """An optimizer step that depends on its number alone, dropout included."""
    torch.manual_seed(number)
    n = model.config.n_classes or 256
    model(torch.randint(256, (2, 16)), torch.randint(n, (2, 16))).backward()
    optim.apply_gradients(optimizers, 1.0, skip=False)


def optimizers_of(model) -> list:
    return optim.make_optimizers(model, 'adamw', 1e-2, 0.1)


@pytest.mark.parametrize('n_classes', [0, 3])
@pytest.mark.parametrize('name', OURS)
def test_adapters_alone_learn(monkeypatch, name, n_classes):
    """And the head of a new classifier; all else stays bit by bit."""
    script, base = classify if n_classes else finetune, tiny(name)
    monkeypatch.setattr(script, 'lora_rank', 4)
    monkeypatch.setattr(script, 'lora_targets', ALL[name])
    model = classify.first_model(base, n_classes, 'cpu') if n_classes else \
        finetune.first_model(base, ByteTokenizer(), len(ByteTokenizer()), 'cpu')
    learns = {key for key, p in named_weights(model).items() if p.requires_grad}
    head = {'lm_head.weight'} if n_classes else set()
    assert learns - head == {f'{layer}.{part}' for layer in lora.adapters(model)
                             for part in ('lora_A', 'lora_B')} and head <= learns
    before = copy.deepcopy(named_weights(model))
    optimizers = optimizers_of(model.train())
    for number in range(2):     # A has no gradient as long as B is 0
        step(model, optimizers, number)
    for key, p in named_weights(model).items():
        assert torch.equal(p, before[key]) == (key not in learns), key


def test_share_of_gpt2():
    model = build_model(GPTConfig(vocab_size=50257), None, 'meta')
    n = count_parameters(model)
    lora.add(model, 8, 16.0, ALL['gpt2'], 0.0, 0)
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # r (in + out) of four 768 x 768 and two 768 x 3072 matrices in 12 layers
    assert n == 124_439_808 and learns == 12 * 8 * (4 * 1536 + 2 * 3840) == 1_327_104
    assert count_parameters(model) == n + learns and learns / n < 0.02


@pytest.mark.parametrize('name, targets, wrong, known', [
    ('gpt2', 'q_proj,gate_proj', 'gate_proj', ALL['gpt2']),
    ('qwen3', 'c_attn', 'c_attn', ALL['qwen3']), ('qwen3', 'q_proj,lm_head', 'lm_head', ''),
    ('qwen3', 'q_proj,', '', ''), ('qwen3', 'q_proj, v_proj', ' v_proj', ''),
    ('qwen3', 'proj', 'proj', ''), ('qwen3', 'attn', 'attn', '')])
def test_unknown_targets(capsys, name, targets, wrong, known):
    message = stopped(capsys, lambda: lora.add(tiny(name), 4, 16.0, targets, 0.0, 0))
    assert message.startswith(f'lora_targets={targets}: ') and repr(wrong) in message
    assert message.endswith(known.replace(',', ', '))


# ---------------------------------------------------------------------------------------------
# Checkpoints


def save(model, optimizers, run) -> None:
    """A checkpoint of step 2."""
    state = asdict(checkpoint.Progress(step=2, best_step=2)) | {
        'config': asdict(model.config),
        'identity': {'source': source_hashes(model_module.__file__)}}
    (run / 'log.jsonl').touch()     # which every run has
    saver = checkpoint.Saver(run)
    saver.save(model, optimizers, ByteTokenizer(), state)
    saver.finish(2)
    saver.lock.close()


def learner(n_classes: int = 0, rank: int = 3, targets: str = ALL['qwen3'], seed: int = 5):
    """A model with adapters, and a new head if it is a classifier, and its optimizers."""
    model = tiny('qwen3', n_classes=n_classes)
    lora.add(model, rank, 12.0, targets, 0.2, seed)
    if n_classes:
        model.lm_head.requires_grad_(True)
    return model.train(), optimizers_of(model)


@pytest.mark.parametrize('n_classes', [0, 3])
def test_checkpoint(tmp_path, capsys, n_classes):
    """It is a plain model with merged weights to every other stage, and goes on bit by bit."""
    model, optimizers = learner(n_classes)
    for number in range(2):
        step(model, optimizers, number)
    save(model, optimizers, tmp_path)
    own = set(load_file(tmp_path / 'step-00000002' / 'adapters.safetensors'))
    assert own == {key for key, p in named_weights(model).items() if p.requires_grad}

    plain, _, _ = models.load_run(str(tmp_path), classifier=bool(n_classes))
    assert capsys.readouterr().err == '' and not lora.adapters(plain)
    assert difference(plain, model.eval()) <= 1e-5
    assert difference(plain, tiny('qwen3', n_classes=n_classes)) > 0.01

    again, its_optimizers = learner(n_classes, seed=6)
    if n_classes:
        torch.nn.init.zeros_(again.lm_head.weight)  # as it is before it has learnt
    models.load_weights(again, tmp_path, 2)
    models.load_optimizers(again, its_optimizers, tmp_path, 2)
    assert difference(again.eval(), model) == 0
    for number in range(2, 4):
        step(model.train(), optimizers, number)
        step(again.train(), its_optimizers, number)
    state, its_state = (named_weights(m) | checkpoint.optimizer_tensors(m, o) for m, o in (
        (model, optimizers), (again, its_optimizers)))
    assert set(state) == set(its_state)
    assert all(torch.equal(tensor, its_state[key]) for key, tensor in state.items())


@pytest.mark.parametrize('other, message', [
    (dict(rank=4), 'has shape'), (dict(targets='q_proj'), 'which this model does not have'),
    (dict(n_classes=3), 'is missing in adapters')])
def test_checkpoint_of_other_adapters(tmp_path, capsys, other, message):
    save(*learner(), tmp_path)
    model, _ = learner(**other)
    assert message in stopped(capsys, lambda: models.load_weights(model, tmp_path, 2))


def test_checkpoint_without_adapters(tmp_path, capsys):
    save(tiny('qwen3'), [], tmp_path)
    message = stopped(capsys, lambda: models.load_weights(learner()[0], tmp_path, 2))
    assert 'is missing in adapters' in message


# ---------------------------------------------------------------------------------------------
# PEFT


@pytest.mark.parametrize('targets', ['', 'q_proj,v_proj', 'o_proj'], ids=['all', 'q and v', 'o'])
@pytest.mark.parametrize('name', OURS)
def test_adapter_loads_in_peft(tmp_path, name, targets):
    peft = pytest.importorskip('peft')
    transformers = pytest.importorskip('transformers')
    base = tiny(name)
    hf.save(base, ByteTokenizer(), tmp_path / 'base')
    model = adapted(name, targets)
    files.save(model, tmp_path / 'adapter', str(tmp_path / 'base'), 0.1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'adapter').eval()
    tensors = load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
    assert set(peft.get_peft_model_state_dict(theirs)) == set(tensors)  # GPT-2 has two c_proj
    assert difference(model, theirs) <= 1e-4 and difference(model, base) > 0.1
    with theirs.disable_adapter():
        assert difference(base, theirs) <= 1e-4
    assert difference(model, theirs.merge_and_unload()) <= 1e-4
    found = peft.PeftConfig.from_pretrained(tmp_path / 'adapter')
    assert found.lora_dropout == 0.1 and found.base_model_name_or_path == str(tmp_path / 'base')
