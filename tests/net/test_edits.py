"""What an edited model.py sets in its constructors stays, in every stage; see edits.py."""
import resource
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import edits
import pytest
import torch
from conftest import stopped, stopped_at_last
from torch import nn

import classify
import dpo
import finetune
import model as M
import sample
import train
from core.device import Device, keep_freed_memory
from core.formats import hf
from core.net import optim
from core.net.weights import build_model, copy_weights, named_weights
from core.ranks.processes import Ranks
from core.run import layout_check, models
from core.run.begin import build_optimizers, first_model
from core.settings import read_config, settings_of
from model import GPTConfig

SMALL = dict(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)
# what the edit 'all' sets that is no random number, and no training changes
CONSTANTS = {'slopes': torch.tensor([0.5, 0.25]), 'future': torch.full((4, 4), -torch.inf).triu(1),
             'frequencies': torch.polar(torch.ones(3), torch.arange(3.0))}
FIRST = {'temperature': 0.5, 'gains': 0.9, 'scale': 0.1, '0': 0.7, '1': 0.3, 'lambdas': 1.0}


@pytest.fixture
def edit(monkeypatch):
    """edit(name, **classes): model.py has that edit, until the test ends or another one comes."""
    before = {name: getattr(M, name) for name in ('Attention', 'Block', 'GPT', 'norm_layer',
                                                  'Linear')}

    def put(name='none', **more):
        for key, value in {**before, **edits.EDITS[name], **more}.items():
            monkeypatch.setattr(M, key, value)
    return put


def values(model) -> dict:
    """All parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def constants_stay(model) -> bool:
    """Whether each block has its constants."""
    found = dict(model.named_buffers())
    return all(torch.equal(found[f'h.{i}.attn.{name}'], value)
               for i in model.h for name, value in CONSTANTS.items()) and \
        found['h.1.attn.order'].tolist() == list(range(model.config.block_size))


def test_what_constructors_set_stays(edit):
    edit('all')
    config = GPTConfig(**SMALL)
    model, again, other = (build_model(config, seed) for seed in (1, 1, 2))
    assert constants_stay(model)
    found = values(model)
    for name, value in FIRST.items():
        these = [p for key, p in found.items() if key.split('.')[-1] == name]
        assert these and all((p == value).all() for p in these)
    assert (found['h.1.attn.gate.weight'] == 0).all() and found['h.1.attn.gate.bias'] == 3
    assert not found['h.0.attn.features'].requires_grad
    assert model.h['0'].attn.rate == pytest.approx(0.05)    # a number, taken from a tensor
    assert model.h['0'].mlp is model.h['1'].mlp
    for name in ('registers', 'h.0.attn.features', 'h.1.attn.table.weight', 'h.0.conv.weight'):
        assert torch.equal(found[name], values(again)[name])    # a function of the seed
        assert not torch.equal(found[name], values(other)[name])
        assert 0.001 < found[name].std() < 2
    assert not torch.equal(found['h.0.attn.features'], found['h.1.attn.features'])


def test_what_has_a_rule_is_as_before(edit):
    """Bit for bit, whatever an edit adds beside it; and the process's random numbers go on."""
    plain = named_weights(build_model(GPTConfig(**SMALL), 3))
    torch.manual_seed(5)
    expected = torch.rand(3)
    edit('values')
    torch.manual_seed(5)
    found = named_weights(build_model(GPTConfig(**SMALL), 3))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(found[name], p) for name, p in plain.items())
    assert set(found) - set(plain) == {f'h.{i}.attn.{name}' for i in (0, 1) for name in (
        'slopes', 'order', 'future', 'temperature', 'features', 'gains', 'table.weight',
        'gate.weight', 'gate.bias')}


class Gemma(nn.Module):
    """A norm whose gain is 1 + weight."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


class Ternary(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


class Tied(M.Attention):
    """Queries and keys share a matrix; the output has weight normalization."""

    def __init__(self, config):
        super().__init__(config)
        self.k_proj.weight = self.q_proj.weight
        self.o_proj = nn.utils.parametrizations.weight_norm(self.o_proj)


class Applied(M.GPT):
    """nanoGPT's way to initialize."""

    def __init__(self, config):
        super().__init__(config)
        self.apply(self.init)

    def init(self, module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.25)


def test_layers_that_are_not_as_torch_makes_them(edit):
    """Rules hold for layers that torch alone made, not for whatever has a name."""
    edit(norm_layer=lambda config, size: Gemma(size), Attention=Tied)
    model = build_model(GPTConfig(**SMALL), 1)
    assert all((p == 0).all() for name, p in model.named_parameters() if '.ln_' in name)
    attention = model.h['1'].attn
    assert attention.k_proj.weight is attention.q_proj.weight
    std = attention.o_proj.weight.std().item()
    assert std == pytest.approx(1 / 96 ** 0.5, rel=0.2)     # torch's own
    edit(GPT=Applied)
    model = build_model(GPTConfig(**SMALL), 1)
    assert all((p == 0.25).all() for name, p in model.named_parameters()
               if name.endswith('proj.weight'))
    edit(Linear=Ternary)        # only its forward pass is another one
    assert (build_model(GPTConfig(**SMALL), 1).h['0'].mlp.down_proj.weight == 0).all()


def test_memory_of_an_edited_large_model(edit):
    """Constructing 7 billion parameters takes much less memory than one block."""
    edit('values')
    preset = read_config(str(Path(train.__file__).parent / 'config' / '7b.py'), vars(train))
    known = {name: preset[name] for name in GPTConfig.__dataclass_fields__ if name in preset}
    keep_freed_memory()      # as every script does before it builds a model
    addresses = largest_mapping()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_model(GPTConfig(vocab_size=50304, **known), None, 'meta')
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before     # in KiB
    block = sum(4 * p.numel() for p in model.h['0'].parameters())
    assert M.count_parameters(model) > 6.9e9 and added * 1024 < block / 4
    assert sum(t.nbytes for t in model.own.values()) < block / 20
    assert largest_mapping() < addresses + block    # a large one would let no worker start


def largest_mapping() -> int:
    """Bytes of the largest range of addresses that this process may write to."""
    lines = [line.split()[:2] for line in open('/proc/self/maps') if ' rw' in line]
    return max(int(end, 16) - int(begin, 16)
               for begin, end in (place.split('-') for place, _ in lines))


# ---------------------------------------------------------------------------------------------
# All doors


def checked(run: str):
    """A model of a run, whose constants are what the edit sets."""
    model = models.load_run(run)[0]
    assert constants_stay(model)
    return model


def test_training_resuming_and_beginning_with_it(edit, run_train):
    edit('all')
    settings = dict(max_steps=4, eval_interval=2, optimizer='muon')
    model = checked(run_train(out_dir='out/whole', **settings)['run_dir'])
    begun = values(build_model(model.config, train.seed))
    still = {name for name, p in model.named_parameters() if torch.equal(p, begun[name])}
    assert still == {'h.0.attn.features', 'h.1.attn.features'}      # all that is frozen
    shutil.copytree('out/whole', 'out/cut')
    shutil.rmtree('out/cut/step-00000004')
    lines = Path('out/cut/log.jsonl').read_text().splitlines(keepends=True)
    Path('out/cut/log.jsonl').write_text(''.join(line for line in lines if '"end"' not in line))
    assert run_train(out_dir='out/cut', init_from='resume', **settings)['step'] == 4
    again = values(checked('out/cut'))
    assert all(torch.equal(t, again[name]) for name, t in values(model).items())
    checked(run_train(out_dir='out/b', init_from='out/whole', **settings)['run_dir'])


@pytest.fixture
def edited_base(edit, run_train):
    edit('all')
    return run_train(tokenizer='byte', block_size=96, max_steps=2, eval_interval=2,
                     out_dir='out/base')['run_dir']


@pytest.mark.slow
def test_stages_after_training(edited_base, run_stage, chats, preferences, texts):
    short = dict(run_dir=edited_base, max_steps=2, eval_interval=2)
    tuned = run_stage(finetune, dataset=str(chats), out_dir='out/sft', **short)
    assert not checked(tuned['run_dir']).h['0'].attn.features.requires_grad
    last = run_stage(finetune, dataset=str(chats), out_dir='out/last', layers='1', **short)
    a, b = values(checked(edited_base)), values(checked(last['run_dir']))
    assert {name for name in a if torch.equal(a[name], b[name])} >= {
        'registers', 'h.0.attn.temperature', 'h.0.scale', 'h.1.attn.features'}
    assert not torch.equal(a['h.1.attn.temperature'], b['h.1.attn.temperature'])
    lora = run_stage(finetune, dataset=str(chats), out_dir='out/lora', lora_rank=2, **short)
    b = values(checked(lora['run_dir']))
    assert torch.equal(a['h.1.attn.gate.bias'], b['h.1.attn.gate.bias'])
    run_stage(dpo, dataset=str(preferences), out_dir='out/dpo', **short)
    checked('out/dpo')
    run_stage(classify, dataset=str(texts), out_dir='out/class', **short)
    assert constants_stay(models.load_run('out/class', classifier=True)[0])


def test_sampling_goes_on_from_a_checkpoint(edited_base, monkeypatch, capsys):
    for name, value in dict(run_dir=edited_base, prompt='a', max_new_tokens=3, device='cpu',
                            threads=1).items():
        monkeypatch.setattr(sample, name, value)
    sample.main()


def test_files_of_another_model(edit, run_train, capsys):
    """A run or a Hugging Face folder that lacks what an edit adds, or has what it took away."""
    run = run_train(out_dir='out/plain', tokenizer='byte', max_steps=2, eval_interval=2)['run_dir']
    plain, tokenizer, _ = models.load_run(run)
    hf.save(plain, tokenizer, Path('folder'))
    edit('layer scale')
    assert 'h.0.number is missing' in stopped_at_last(capsys, lambda: models.load_run(run))
    message = stopped_at_last(capsys, lambda: models.load_run('folder'))
    assert 'lack model.layers.0.scale, which an edit of model.py has added' in message
    run = run_train(out_dir='out/edited', tokenizer='byte', max_steps=2, eval_interval=2)['run_dir']
    edit()
    assert "'h.0.number'" in stopped_at_last(capsys, lambda: models.load_run(run))


class TwoMLPs(M.Block):
    """A mixture of two MLPs."""

    def __init__(self, config):
        super().__init__(config)
        self.mlp2 = M.MLP(config)

    def forward(self, x, *rest):
        return super().forward(x, *rest) + 0.5 * self.mlp2(x)


@pytest.mark.parametrize('name', ['values', 'layer scale', 'two MLPs', 'registers', 'buffer alone'])
def test_export_refuses_what_its_format_lacks(edit, name, tmp_path, capsys):
    class Buffer(M.Attention):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer('inv_freq', torch.ones(2), persistent=False)

    classes = {'two MLPs': {'Block': TwoMLPs}, 'registers': {'GPT': edits.WithRegisters},
               'buffer alone': {'Attention': Buffer}}
    edit(name if name in edits.EDITS else 'none', **classes.get(name, {}))
    model = build_model(GPTConfig(**SMALL))
    names = {'values': 'h.0.attn', 'layer scale': 'h.0.scale', 'two MLPs': 'h.0.mlp2',
             'registers': 'registers', 'buffer alone': 'h.0.attn.inv_freq'}
    message = stopped(capsys, lambda: hf.save(model, None, tmp_path / 'folder'))
    assert message.startswith(names[name]) and not (tmp_path / 'folder').exists()


def test_adapters_refuse_layers_that_compute_something_else(edit, capsys):
    from core.net import lora
    edit(Linear=Ternary)
    model = build_model(GPTConfig(**SMALL))
    assert 'h.0.attn.q_proj is a Ternary' in stopped(
        capsys, lambda: lora.add(model, 2, 4.0, 'q_proj', 0.0, 0))


def test_copying_into_another_shape(edit, capsys):
    """A buffer of another size is the target's own; a parameter without a rule cannot be cut."""
    class Table(M.Attention):
        def __init__(self, config):
            super().__init__(config)
            self.bias = nn.Parameter(torch.randn(config.block_size, config.n_head))

    edit('values')
    large, small = (build_model(GPTConfig(**{**SMALL, 'block_size': n}), n) for n in (16, 8))
    copy_weights(large, small)
    assert constants_stay(small)
    edit(Attention=Table)
    large, small = (build_model(GPTConfig(**{**SMALL, 'block_size': n}), n) for n in (16, 8))
    message = stopped(capsys, lambda: copy_weights(large, small))
    assert message.startswith('h.0.attn.bias: has shape (16, 2)')


def test_optimizers_of_an_edited_model(edit):
    """Scalars and gains do not decay; only matrices of linear layers are Muon's."""
    edit('all')
    model = build_model(GPTConfig(**SMALL), 1)
    names = {p: name for name, p in model.named_parameters()}
    adam, muon = optim.make_optimizers(model, 'muon', 1e-3, 0.1)
    decayed = {names[p] for group in adam.param_groups if group['weight_decay']
               for p in group['params']}
    assert {'h.0.attn.table.weight', 'registers', 'wte.weight'} <= decayed
    assert not {name for name in decayed if name.split('.')[-1] in FIRST}
    hidden = {names[p].split('.')[-2] for group in muon.param_groups for p in group['params']}
    assert hidden == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj', 'gate'}


# ---------------------------------------------------------------------------------------------
# The check of a layout


@pytest.fixture
def said(tmp_path, capsys):
    """said(insist): what the check of one process says on standard output and error."""
    def check(insist=False, **changes):
        settings = SimpleNamespace(**settings_of(vars(train)) | {
            'pack_documents': True, 'data_dir': str(tmp_path), 'check_layout': insist})
        layout_check.check(Ranks(), Device('cpu', 'cpu', 'float32', False, 1.0, []),
                           GPTConfig(**{**SMALL, **changes}), settings,
                           partial(build_optimizers, settings))
        return ''.join(capsys.readouterr())
    return check


def test_layout_is_checked_once(said, edit, monkeypatch, tmp_path):
    """For each source, layout and kind of model, unless it is asked for."""
    passed = '1 x data: a small copy of this model trains as in one process\n'
    assert said() == passed and said() == said(n_embd=64, dropout=0.1) == ''
    assert said(insist=True) == said(norm='rmsnorm') == passed
    monkeypatch.setattr(layout_check, 'source_hashes', lambda script: {'model.py': 'another'})
    assert said() == passed and said() == ''
    (tmp_path / '.layouts-checked.json').write_text('{')       # whatever it is, it is written anew
    assert said() == passed and said() == ''


def test_training_checks_its_layout(run_train, monkeypatch, capsys):
    run_train(check_layout=True, max_steps=2, eval_interval=2)
    assert '\n1 x data: a small copy of this model trains' in capsys.readouterr().out

    def check(*args):
        raise KeyError('checked')
    monkeypatch.setattr(layout_check, 'check', check)
    run_train(max_steps=2, eval_interval=2)     # one process needs none
    for layout in (dict(tp=2), dict(pp=2), dict(zero=2)):
        with pytest.raises(KeyError, match='checked'):
            first_model(SimpleNamespace(**settings_of(vars(train))), 'abc', None,
                        Ranks(**layout), {})


def test_what_cannot_be_made_small_is_not_checked(said, edit):
    class Fixed(M.Attention):
        def forward(self, x, *rest):
            return super().forward(x, *rest) + torch.zeros(128)     # n_embd, as a number

    edit(Attention=Fixed)
    for _ in range(2):      # nothing has passed
        assert said(n_embd=128).startswith('warning: 1 x data: not checked: a small copy of this '
                                           'model fails in one process, too: RuntimeError: ')
