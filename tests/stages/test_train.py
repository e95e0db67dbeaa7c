"""train.py: the loop, resuming, its files, its messages; DDP against one process."""
import json
import math
import shlex
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import finished

import sample
import train
from core import device as hardware
from core.data import chosen
from core.data.dataset import IGNORE, ShardWriter, load_split
from core.net import optim
from core.net.lstm import LSTM
from core.net.optim import LossScale, make_optimizers
from core.ranks.processes import Ranks, share
from core.read.download import NoNetwork
from core.run import checkpoint, models
from core.run.begin import model_config
from core.run.identity import is_finished
from core.run.learner import Learner
from core.run.log import events, read_log
from core.settings import Stop, configure, read_config, settings_of
from model import GPT, GPTConfig, flops_per_token

ROOT = Path(train.__file__).parent


def stopped(capsys, run, *parts, **settings):
    """Check that a run stops with one line that has all `parts`."""
    with pytest.raises(Stop) as e:
        run(**settings)
    assert e.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith('error: ')
    for part in parts:
        assert part in message, message


def losses(run_dir):
    return [e['train_loss'] for e in read_log(run_dir, 'step')]


def test_run_directory(run_train):
    out = run_train(sample_interval=2)
    run = Path(out['run_dir'])
    assert run == Path('out/tiny') and out['step'] == 6
    log = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    assert log[0]['event'] == 'start' and log[-1]['event'] == 'end'
    assert log[0]['settings']['n_embd'] == 32 and log[0]['identity']['data']['sha256']
    steps = [e for e in log if e['event'] == 'step']
    assert [e['step'] for e in steps] == [1, 2, 3, 4, 5, 6]
    assert {'tokens', 'seconds', 'train_loss', 'learning_rate', 'grad_norm', 'tokens_per_second',
            'mfu'} <= steps[0].keys()
    assert steps[-1]['tokens'] == 6 * 4 * 32
    evals = [e for e in log if e['event'] == 'eval']
    assert [e['step'] for e in evals] == [3, 6]
    assert log[-1]['best_val_loss'] == min(e['val_loss'] for e in evals) == out['best_val_loss']
    assert [e['step'] for e in log if e['event'] == 'sample'] == [2, 4] and log[-1]['sample']
    assert checkpoint.steps(run) == [3, 6]
    for name in ('step-00000006/tokenizer.json', 'model.py', 'kernels.py', 'train.py'):
        assert (run / name).is_file()


@pytest.mark.pictures
def test_loss_png(run_train):
    pytest.importorskip('matplotlib')
    picture = (Path(run_train()['run_dir']) / 'loss.png').read_bytes()
    assert picture.startswith(b'\x89PNG') and len(picture) > 10_000


@pytest.mark.pictures
@pytest.mark.parametrize('error', [
    RuntimeError('Could not determine home directory.'), ImportError('no matplotlib'),
    OSError(28, 'No space left on device'), TypeError('a glyph\nthat fails'), KeyError('getpwuid')])
def test_a_picture_that_fails_is_a_warning(run_train, monkeypatch, capsys, error):
    def fail(*args, **options):
        raise error
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', fail)
    assert run_train(max_steps=2)['step'] == 2
    out, err = capsys.readouterr()
    assert err.count('warning: out/tiny/loss.png was not drawn (') == 1
    assert 'has the checkpoints, log.jsonl\n' in out and is_finished(Path('out/tiny'))


@pytest.mark.pictures
def test_a_user_without_a_home(run_train, monkeypatch):
    """As in a container: no HOME, and no entry in passwd."""
    monkeypatch.setattr('os.path.expanduser', lambda path: path)
    monkeypatch.delenv('MPLCONFIGDIR', raising=False)
    monkeypatch.delenv('HOME', raising=False)
    assert (Path(run_train(max_steps=2)['run_dir']) / 'loss.png').is_file()
    monkeypatch.delenv('MPLCONFIGDIR')


@pytest.mark.parametrize('name', ["out/it's my run", 'out/tiny', 'out/[a] $b; c'])
def test_what_to_do_next_can_be_pasted(run_train, monkeypatch, capsys, name):
    monkeypatch.setattr(train, 'CONFIGS', ['my configs/a.py', 'b.py'])
    run_train(max_steps=2, out_dir=name)
    commands = [shlex.split(line, comments=True) for line in
                capsys.readouterr().out.split('\nnext:\n')[1].splitlines()]
    assert [words[2] for words in commands[:2]] == [name] * 2
    assert commands[2] == ['python', 'train.py', 'my configs/a.py', 'b.py',
                           '--dataset=my_text.txt']
    script = vars(sample).copy()
    configure(script, commands[0][2:])
    with monkeypatch.context() as patch:
        for key, value in {**settings_of(script), 'prompt': 'x', 'max_new_tokens': 3}.items():
            patch.setattr(sample, key, value)
        assert sample.main()['texts']


def test_a_run_directory_that_could_not_be_read_again(run_train, capsys):
    """safetensors writes to a name that is not UTF-8, and cannot open it."""
    stopped(capsys, run_train, 'is not a name in UTF-8', '--out_dir', out_dir='out/caf\udce9')
    assert not Path('out').exists()


def test_first_loss_is_log_v_and_training_lowers_it(run_train):
    out = run_train(max_steps=40, eval_interval=40, optimizer='muon')
    found = losses(out['run_dir'])
    tokens = len(models.load_run(out['run_dir'])[1])
    assert abs(found[0] - math.log(tokens)) < 1e-5
    assert found[-1] < 0.8 * found[0] and out['val_loss'] < 0.85 * found[0]


def test_bits_per_byte_of_ascii_text(run_train):
    out = run_train()
    assert math.isclose(out['bits_per_byte'], out['val_loss'] / math.log(2), rel_tol=1e-6)


def test_finished_run_is_not_touched_and_unfinished_one_resumes(run_train, monkeypatch):
    whole = run_train(out_dir='out/whole', dropout=0.1, optimizer='muon')
    assert run_train(out_dir='out/whole', dropout=0.1, optimizer='muon',
                     batch_size=2)['run_dir'] == 'out/whole-2'

    calls = []

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    real = train.train_step
    monkeypatch.setattr(train, 'train_step', killed)
    with pytest.raises(KeyboardInterrupt):
        run_train(out_dir='out/cut', dropout=0.1, optimizer='muon')
    monkeypatch.setattr(train, 'train_step', real)
    while list(Path('out/cut').glob('.tmp*')):      # written by a thread of this process
        time.sleep(0.001)
    assert checkpoint.steps('out/cut') == [3]
    out = run_train(out_dir='out/cut', dropout=0.1, optimizer='muon')
    assert out['run_dir'] == 'out/cut' and out['step'] == 6
    assert out['val_loss'] == whole['val_loss']
    assert losses('out/cut') == losses('out/whole')  # what came after the checkpoint was cut out


def test_init_from_resume(run_train, capsys, tmp_path):
    run_train(out_dir='out/a')
    assert run_train(out_dir='out/a', init_from='resume', max_steps=8)['step'] == 8
    assert 'max_steps is 8, but was 6' in capsys.readouterr().err
    stopped(capsys, run_train, 'max_steps=7', 'has done 8 steps already', out_dir='out/a',
            init_from='resume', max_steps=7)
    stopped(capsys, run_train, 'architecture.n_layer is 3, but was 2', out_dir='out/a',
            init_from='resume', n_layer=3)
    stopped(capsys, run_train, 'optimizer is muon, but was adamw', out_dir='out/a',
            init_from='resume', optimizer='muon')
    other = tmp_path / 'other.txt'
    other.write_text('a completely different text, again and again. ' * 300)
    stopped(capsys, run_train, 'architecture.vocab_size', out_dir='out/a', init_from='resume',
            dataset=str(other))


def test_resume_with_other_data_or_tokenizer_is_refused(run_train, capsys, tmp_path, monkeypatch):
    """Also where the model would fit: the same number of characters, or the same characters."""
    text = tmp_path / 'a.txt'
    text.write_text('to be, or not to be: that is the question. ' * 300)
    run_train(out_dir='out/a', dataset=str(text))
    same = dict(out_dir='out/a', init_from='resume')
    for old, new in (('question', 'noitseuq'), ('q', 'Q')):
        text.write_text(text.read_text().replace(old, new))
        shutil.rmtree('data')
        stopped(capsys, run_train, 'data.sha256 is ', 'but was', 'restore it', dataset=str(text),
                **same)
    text.write_text(text.read_text().replace('Q', 'q').replace('noitseuq', 'question'))
    shutil.rmtree('data')
    with monkeypatch.context() as patch:
        real = train.named.read_meta
        patch.setattr(train.named, 'read_meta', lambda data: real(data) | {'val_tokens': 7})
        stopped(capsys, run_train, 'data.val_tokens is 7', dataset=str(text), **same)
    with monkeypatch.context() as patch:
        patch.setattr(train.tokenizers.CharTokenizer, 'hash', lambda self: 'x')
        stopped(capsys, run_train, 'tokenizer is x, but was', dataset=str(text), **same)


def test_eval_only_writes_nothing(run_train, capsys, tmp_path):
    out = run_train(out_dir='out/a')
    before = {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob('*'))}
    again = run_train(out_dir='out/a', eval_only=True)
    assert before == {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob('*'))}
    assert abs(again['val_loss'] - out['best_val_loss']) < 1e-6
    other = tmp_path / 'other.txt'
    other.write_text('a text of other characters. ' * 300)
    stopped(capsys, run_train, 'not prepared yet', out_dir='out/a', eval_only=True,
            dataset=str(other))
    chosen.build(str(other))
    stopped(capsys, run_train, 'different vocabularies', out_dir='out/a', eval_only=True,
            dataset=str(other))
    stopped(capsys, run_train, 'out/none', out_dir='out/none', eval_only=True)


def test_evaluation_does_not_change_training(run_train):
    a = run_train(out_dir='out/a', eval_interval=1, sample_interval=1, dropout=0.1)
    b = run_train(out_dir='out/b', eval_interval=6, dropout=0.1)
    assert losses(a['run_dir']) == losses(b['run_dir'])


def test_accumulation_is_the_same_training(run_train):
    whole = run_train(out_dir='out/whole', batch_size=6, micro_batch_size=6, eval_interval=100)
    for rows in (1, 4):   # 6 = 4 + 2: the second micro-batch is filled up with padding
        parts = run_train(out_dir=f'out/parts{rows}', batch_size=6, micro_batch_size=rows,
                          eval_interval=100)
        assert losses(parts['run_dir']) == pytest.approx(losses(whole['run_dir']), abs=1e-5)


def test_evaluation_covers_every_token_once(run_train):
    """A larger or smaller micro-batch changes nothing, and eval_tokens takes the beginning."""
    a = run_train(out_dir='out/a', micro_batch_size=1, max_steps=1)
    b = run_train(out_dir='out/b', micro_batch_size=4, max_steps=1)
    assert a['val_loss'] == pytest.approx(b['val_loss'], abs=1e-5)
    c = run_train(out_dir='out/c', eval_tokens=64, max_steps=1)
    assert c['val_loss'] != pytest.approx(b['val_loss'], abs=1e-5)


@pytest.fixture
def letters(tmp_path):
    """A folder of 60 short texts, of which at least three are in the validation split."""
    random = np.random.default_rng(0)
    (tmp_path / 'letters').mkdir()
    for i, n in enumerate(random.integers(1, 90, 60)):
        text = ''.join(random.choice(list('abcde fgh'), n))
        (tmp_path / 'letters' / f'{i:02d}.txt').write_text(f'{i:02d} {text}\n')
    return 'letters'


def test_packed_documents(run_train, letters, monkeypatch, capsys):
    """Such a run learns, resumes bitwise, and is told from one without."""
    settings = dict(dataset=letters, pack_documents=True, dropout=0.1, learning_rate=0.02)
    whole = run_train(out_dir='out/whole', **settings)
    out = capsys.readouterr().out
    line, = (line for line in out.splitlines() if line.startswith('packed '))
    assert ' documents, of which ' in line and 'rows an epoch' in line and '% of it padding' in line
    found = losses('out/whole')
    assert found[-1] < found[0] - 0.1
    assert read_log('out/whole', 'step')[-1]['tokens'] == 6 * 4 * 32
    assert run_train(out_dir='out/whole', eval_only=True, **settings)['val_loss'] == \
        pytest.approx(whole['best_val_loss'], abs=1e-6)
    evaluate = dict(out_dir='out/whole', eval_only=True, dataset=letters)
    assert run_train(**evaluate)['val_loss'] == \
        pytest.approx(whole['best_val_loss'], abs=1e-6)     # as it was trained
    with monkeypatch.context() as patch:
        patch.setattr(train, 'GIVEN', ('pack_documents',))
        alone = run_train(**evaluate, pack_documents=False)['val_loss']
    assert abs(alone - whole['best_val_loss']) > 1e-4   # what stands before a document did matter

    real = train.train_step
    monkeypatch.setattr(train, 'train_step', lambda *args: real(*args)._replace(asked=args[2] == 3))
    assert run_train(out_dir='out/cut', **settings)['stopped']
    monkeypatch.setattr(train, 'train_step', real)
    plain = {**settings, 'pack_documents': False}
    stopped(capsys, run_train, 'data.pack_documents is False, but was True', out_dir='out/cut',
            init_from='resume', **plain)
    other = run_train(out_dir='out/cut', **plain)['run_dir']
    assert other == 'out/cut-2' and losses(other) != found
    assert 'packed ' not in capsys.readouterr().out
    stopped(capsys, run_train, 'data.pack_documents is True, but was False', out_dir='out/cut-2',
            init_from='resume', **settings)
    out = run_train(out_dir='out/cut', **settings)
    assert out['run_dir'] == 'out/cut' and out['val_loss'] == whole['val_loss']
    assert losses('out/cut') == found


def test_packed_accumulation_is_the_same_training(run_train, letters):
    """Micro-batches have unequal numbers of targets."""
    settings = dict(dataset=letters, pack_documents=True, eval_interval=100, batch_size=5)
    whole = run_train(out_dir='out/whole', micro_batch_size=5, **settings)
    parts = run_train(out_dir='out/parts', micro_batch_size=2, **settings)
    assert losses(parts['run_dir']) == pytest.approx(losses(whole['run_dir']), abs=1e-5)


EOS, CPU = 3, hardware.Device('cpu', 'cpu', 'float32', False, 1.0, [])


@pytest.fixture
def corpus(tmp_path):
    """Two splits of the same documents with an untrained model, and its losses document by
    document: (folder, model, function of a list of inputs and targets -> sum)."""
    random = np.random.default_rng(1)
    ids = random.integers(0, 20, 400)   # an eos every 20 ids, and sometimes two together
    ids[[100, 101]] = EOS
    for split in ('train', 'val'):
        writer, at = ShardWriter(tmp_path, split, 20, shard_tokens=150), 0
        while at < len(ids):
            at += writer.write(ids[at:])
        writer.flush()
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=32,
                          norm='rmsnorm', mlp='swiglu', position='learned'))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))

    def alone(x, y):
        """Of inputs that are cut before every eos."""
        cuts = [0, *(i for i, t in enumerate(x) if t == EOS and i), len(x)]
        return sum(model(torch.tensor([x[a:b]]), torch.tensor([y[a:b]]), reduction='sum').item()
                   for a, b in zip(cuts, cuts[1:]))
    return tmp_path, ids.tolist(), model, alone


def test_packed_rows_have_the_losses_of_their_documents_alone(corpus):
    folder, ids, model, alone = corpus
    windows = load_split(folder, 'train', 16, seed=1, eos=EOS)
    micro_batches = [windows.batch(samples) for samples in share(0, len(windows), 0, 1, 6)]
    unseparated = [(x, y, None) for x, y, _ in micro_batches]
    learner = Learner(model, model, make_optimizers(model, 'adamw', 1e-3, 0.0, 0.9, 0.99),
                      LossScale(False), CPU, Ranks())
    step = lambda batches: train.train_step(learner, batches, 0, 0.0).means[0]
    ends = [i for i, t in enumerate(ids[:-1]) if t == EOS]
    expected = 0.0
    for start, end in zip([0, *ends], [*ends, 399]):    # a long document in pieces of 16
        for a in range(start, end, 16):
            b = min(a + 16, end)
            expected += alone(ids[a:b], ids[a + 1:b + 1]) / 399
    assert step(micro_batches) == pytest.approx(expected, rel=1e-6)
    assert step(unseparated) != pytest.approx(expected, rel=1e-3)
    assert len(windows) * 16 > windows.n_targets + 16       # more rows than without padding
    known = SimpleNamespace(byte_lengths=lambda: torch.ones(model.config.vocab_size))
    assert train.evaluate(learner, windows, known, 6)['val_loss'] == \
        pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_evaluation_of_documents(corpus):
    """The same windows and targets as without, each once; no target sees another document."""
    folder, ids, model, alone = corpus
    seen = []
    tokenizer = SimpleNamespace(byte_lengths=lambda: np.ones(20, np.int64))

    class Spy(GPT):
        def forward(self, x, y, **options):
            seen.extend(y[y != IGNORE].tolist())
            return super().forward(x, y, **options)

    model.__class__ = Spy
    results = {}
    for eos in (EOS, None):
        windows = load_split(folder, 'val', 16, shuffle=False, eos=eos)
        for rows in (1, 8):
            seen.clear()
            learner = Learner(model, model, [], LossScale(False), CPU, Ranks())
            results[eos, rows] = train.evaluate(learner, windows, tokenizer, rows)['val_loss']
            assert seen == ids[1:]
    model.__class__ = GPT
    expected = sum(alone(ids[a:min(a + 16, 399)], ids[a + 1:a + 17])
                   for a in range(0, 399, 16)) / 399
    assert results[EOS, 1] == pytest.approx(expected, rel=1e-6)
    assert results[EOS, 8] == pytest.approx(expected, rel=1e-6)
    assert results[None, 8] != pytest.approx(expected, rel=1e-3)


class Clock:
    """In place of the module time in train.py: a step takes what seconds_of(its number) says."""

    def __init__(self, monkeypatch, seconds_of):
        self.now, step = 0.0, train.train_step

        def timed(learner, batches, number, *args):
            self.now += seconds_of(number + 1)
            return step(learner, batches, number, *args)

        self.perf_counter = lambda: self.now
        monkeypatch.setattr(train, 'train_step', timed)
        monkeypatch.setattr(train, 'time', self)


@pytest.mark.parametrize('seconds_of', [
    lambda step: 0.8 if step < 50 else 0.4, *(pytest.param(f, marks=pytest.mark.slow) for f in (
        lambda step: 0.5, lambda step: 0.4 if step < 70 else 0.8,
        lambda step: 0.3 + 0.6 * (step % 2)))], ids=['faster', 'steady', 'slower', 'uneven'])
@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
def test_max_minutes(run_train, monkeypatch, seconds_of, schedule):
    """A run takes the minutes that it was given, to 5%, on a machine that becomes twice as fast or
    as slow; its rates follow the time, down to their end."""
    Clock(monkeypatch, seconds_of)
    out = run_train(max_minutes=1.0, max_steps=1000, warmup_steps=100, eval_interval=10_000,
                    schedule=schedule, n_layer=1)
    assert out['seconds'] == pytest.approx(60, rel=0.05)
    for event in read_log(out['run_dir'], 'step'):
        before = event['seconds'] - seconds_of(event['step'])
        assert event['learning_rate'] == pytest.approx(3e-3 * optim.schedule(
            before / 60 * 1000, 1000, schedule, 100, 0.5, 0.1))
    assert event['learning_rate'] < 0.15 * 3e-3    # close to min_lr_fraction


def test_max_minutes_is_resumed(run_train, monkeypatch):
    """The rest of the time is used, and no more."""
    Clock(monkeypatch, lambda step: 1.0)

    class Killed(BaseException):
        """As by SIGKILL."""

    def killed(*args):
        if len(read_log('out/timed', 'eval')) == 1:
            raise Killed
        return look(*args)

    look = train.evaluate
    settings = dict(max_minutes=1.0, eval_interval=20, n_layer=1, out_dir='out/timed')
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, 'evaluate', killed)
        run_train(**settings)
    out = run_train(**settings)
    assert out['run_dir'] == 'out/timed' and 57 <= out['seconds'] <= 63 and out['step'] == 60
    assert 'resume' in [event['event'] for event in events('out/timed')]


def test_activation_checkpointing_and_bfloat16(run_train):
    plain = run_train(out_dir='out/plain')
    again = run_train(out_dir='out/again', activation_checkpointing=True)
    assert losses(again['run_dir']) == pytest.approx(losses(plain['run_dir']), abs=1e-6)
    half = run_train(out_dir='out/half', dtype='bfloat16')
    assert losses(half['run_dir']) == pytest.approx(losses(plain['run_dir']), abs=0.05)


def test_lstm(run_train):
    out = run_train(arch='lstm', max_steps=30, eval_interval=30, n_layer=1)
    found = losses(out['run_dir'])
    assert found[-1] < found[0] - 0.3


def test_depth_is_one_knob(run_train, capsys, monkeypatch):
    out = run_train(depth=2)
    config = checkpoint.read_state(out['run_dir'], 6)['config']
    assert (config['n_layer'], config['n_head'], config['n_embd']) == (2, 2, 128)
    step = read_log(out['run_dir'], 'step')[-1]
    factor = optim.schedule(5, 6, 'cosine', warmup_steps=2, min_lr_fraction=0.1)
    assert step['learning_rate'] == pytest.approx(factor * 3e-3 * (768 / 128) ** 0.5)
    monkeypatch.setattr(train, 'FLAGS', ('n_layer',))
    stopped(capsys, run_train, 'depth=2', 'n_layer', depth=2)


@pytest.mark.parametrize('settings, parts', [
    (dict(batch_size=0), ['batch_size=0', 'at least 1']),
    (dict(n_embd=30, n_head=4), ['n_embd=30', 'n_head=4']),
    (dict(norm='batchnorm'), ['norm=batchnorm', 'rmsnorm']),
    (dict(optimizer='sgd'), ['optimizer=sgd', 'adamw']),
    (dict(dropout=1.5), ['dropout=1.5']),
    (dict(vocab_size=10), ['vocab_size=10', 'tokens']),
    (dict(block_size=100_000), ['block_size=100000', 'smaller']),
    (dict(dataset='no_such_thing'), ['no_such_thing', 'shakespeare']),
    (dict(dataset='openwebtext'), ['openwebtext', '80 x 303 MB']),
    (dict(device='cuda'), ['device=cuda', '--device=cpu']),
    (dict(dtype='int8'), ['dtype=int8', 'bfloat16']),
    (dict(init_from='nowhere'), ['init_from=nowhere']),
    (dict(timeout_minutes=0.0), ['timeout_minutes=0.0', 'at least']),
    (dict(spike_sigma=-1.0), ['spike_sigma=-1.0', 'at least 0']),
    (dict(pack_documents=True, arch='lstm'), ['pack_documents=True', 'LSTM', 'leave it out']),
])
def test_bad_settings(run_train, capsys, tmp_path, settings, parts):
    if settings.get('device') == 'cuda' and torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    stopped(capsys, run_train, *parts, **settings)
    assert not (tmp_path / 'out').exists()


def test_out_dir_that_cannot_be(run_train, capsys, tmp_path):
    (tmp_path / 'file').write_text('')
    stopped(capsys, run_train, 'file', 'choose another --out_dir', out_dir='file')
    stopped(capsys, run_train, 'file/run', 'choose another --out_dir', out_dir='file/run')
    assert (tmp_path / 'file').read_text() == ''


def test_damaged_data(run_train, capsys, tmp_path):
    run_train()
    shard = next((tmp_path / 'data' / 'source_char').glob('val-*.bin'))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    stopped(capsys, run_train, str(shard.name), 'bytes', out_dir='out/b')
    shard.write_bytes(b'GARBAGE!' + whole[8:])
    stopped(capsys, run_train, str(shard.name), 'header', out_dir='out/b')
    assert not Path('out/b').exists()


def test_short_validation_split(run_train, capsys, tmp_path):
    text = tmp_path / 'short.txt'
    text.write_text('to be or ')
    stopped(capsys, run_train, 'block_size=32', 'tokens', dataset=str(text))
    stopped(capsys, run_train, 'val', '1 tokens', dataset=str(text), block_size=4)


def test_fallback_dataset(run_train, capsys, monkeypatch, text_file):
    """Without a network the run says loudly what it is, and is not called by the config's name."""
    def no_network(name, *rest, **options):
        if name == 'shakespeare':
            raise NoNetwork('https://example.org cannot be reached')
        return real(str(text_file), *rest, **options)

    real = chosen.build
    monkeypatch.setattr(chosen, 'build', no_network)
    out = run_train(dataset='shakespeare', fallback_dataset='source_char')
    assert out['run_dir'] == 'out/source_char'
    text = capsys.readouterr().out
    assert 'THIS IS NOT SHAKESPEARE' in text and 'THIS WAS NOT SHAKESPEARE' in text
    stopped(capsys, run_train, 'python_char', 'DATA_MIRROR', dataset='shakespeare')


def test_compiled_training_is_the_same_training(run_train):
    """Compilation is the default; its warm-up step changes nothing."""
    plain = run_train(out_dir='out/plain', max_steps=3)
    compiled = run_train(out_dir='out/compiled', max_steps=3, compile=True)
    start, = read_log(compiled['run_dir'], 'start')
    assert 'compile on' in start['device'][2] and start['compile_seconds'] > 0
    assert losses(compiled['run_dir']) == pytest.approx(losses(plain['run_dir']), abs=1e-5)


def test_two_trainers_in_one_directory(run_train, capsys):
    run = run_train(out_dir='out/a')['run_dir']
    held = checkpoint.lock(Path(run))
    stopped(capsys, run_train, 'out/a is in use', out_dir='out/a', init_from='resume', max_steps=8)
    held.close()
    assert run_train(out_dir='out/a', init_from='resume', max_steps=8)['step'] == 8


def test_run_that_ended_before_its_first_checkpoint_begins_again(run_train, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_step', killed)
        with pytest.raises(KeyboardInterrupt):
            run_train(out_dir='out/a')
    assert Path('out/a/log.jsonl').exists()
    assert run_train(out_dir='out/a')['run_dir'] == 'out/a'
    assert [e['event'] for e in events('out/a')].count('start') == 1


def test_tensorboard(run_train):
    pytest.importorskip('tensorboard')
    run = run_train(tensorboard=True)['run_dir']
    assert list(Path(run).glob('events.out.tfevents.*'))


def test_wandb(run_train, monkeypatch, capsys):
    """With a stand-in for the service: it gets the settings and every number."""
    class Service:
        logged = []

        def init(self, **options):
            assert options['config']['n_embd'] == 32

        def log(self, numbers, step):
            self.logged.append((step, numbers))

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'wandb', service := Service())
        patch.setattr('importlib.util.find_spec', lambda name: True)
        run_train(wandb=True)
    assert [step for step, numbers in service.logged if 'val_loss' in numbers] == [3, 6]
    if not find_spec('wandb'):
        stopped(capsys, run_train, 'wandb=True', 'pip install wandb', wandb=True, out_dir='out/b')


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_preset_builds(path, monkeypatch):
    for name, value in read_config(str(path), vars(train)).items():
        monkeypatch.setattr(train, name, value)
    train.begin.check_settings(vars(train))
    config = model_config(SimpleNamespace(**settings_of(vars(train))), 70)
    with torch.device('meta'):
        model = LSTM(config) if config.arch == 'lstm' else GPT(config)
    assert flops_per_token(model) > 6e5


def trained(tmp_path, n, name, **settings):
    """n processes of train.py to the end; the step losses and evaluations."""
    finished(tmp_path, n, out_dir=f'out/{name}', **settings)
    run = tmp_path / 'out' / name
    return losses(run), [e['val_loss'] for e in read_log(run, 'eval')]


@pytest.mark.parametrize('optimizer, tolerance', [
    pytest.param('adamw', 1e-5, marks=pytest.mark.slow), ('muon', 2e-4)])
@pytest.mark.parametrize('worlds', [[3], pytest.param([2], marks=pytest.mark.slow)], ids=str)
def test_ranks_compute_what_one_process_computes(tmp_path, text_file, optimizer, tolerance,
                                                 worlds):
    """20 steps; a batch of 8 on 3 ranks is 3 + 3 + 2, and micro-batches of 2 leave padding rows."""
    settings = dict(dataset=str(text_file), batch_size=8, micro_batch_size=2, max_steps=20,
                    eval_interval=10, optimizer=optimizer)
    alone, alone_eval = trained(tmp_path, 1, 'one', **settings)
    assert len(alone) == 20 and alone[-1] < alone[0]
    for n in worlds:
        found, found_eval = trained(tmp_path, n, f'ranks{n}', **settings)
        assert found == pytest.approx(alone, abs=tolerance)
        assert found_eval == pytest.approx(alone_eval, abs=tolerance)


def test_memory_that_ends_in_the_middle(run_train, monkeypatch, capsys):
    """One line with the remedies; the checkpoint before is there, and the run goes on."""
    real = train.train_step

    def step(learner, batches, i, *args):
        if i == 4:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
        return real(learner, batches, i, *args)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_step', step)
        stopped(capsys, run_train, 'step 5: the GPU has too little memory; give', out_dir='out/a')
    assert run_train(out_dir='out/a')['run_dir'] == 'out/a'
