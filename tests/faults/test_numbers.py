"""Losses and gradients that are not finite, or far too large: the step is skipped, on all ranks."""
import json
import math

import pytest
from conftest import TINY
from harness import Ranks, bits, finished, note, tensors_of

import train
from core.net import optim
from core.ranks import parallel
from core.run import checkpoint
from core.run.log import read_log
from core.settings import Stop

BAD = {'NaN': math.nan, 'inf': math.inf, '-inf': -math.inf}
SETTINGS = dict(max_steps=6, eval_interval=100, dropout=0.1, optimizer='muon')


def state_of(model, optimizers) -> dict[str, bytes]:
    """All weights and moments, bit for bit."""
    return {name: bits(t.detach()) for name, t in
            {**checkpoint.model_tensors(model),
             **checkpoint.optimizer_tensors(model, optimizers)}.items()}


def spoil(train, where: str, value: float, first: int, last: int, rank=0, bad_ranks=(0,)):
    """Let loss or gradient be `value` in the steps first .. last, on bad_ranks; note the states.

    Returns a list of (step, state before, state after, why it was skipped).
    """
    real_step, real_complete, states = train.train_step, train.parallel.complete_gradients, []
    bad = []

    def step(learner, *args):
        model, optimizers = learner.model, learner.optimizers
        bad[:] = [1] if first <= args[1] <= last and rank in bad_ranks else []
        hook = None
        if bad and where == 'loss':
            hook = model.register_forward_hook(lambda module, inputs, output: output * value)
        before = state_of(model, optimizers)
        result = real_step(learner, *args)
        if hook:
            hook.remove()
        states.append((args[1], before, state_of(model, optimizers), result.skipped))
        return result

    def complete(model, ranks):     # after the ranks have exchanged their gradients
        real_complete(model, ranks)
        if bad and where == 'gradient':
            next(model.parameters()).grad.view(-1)[7] = value

    train.train_step, train.parallel.complete_gradients = step, complete
    return states


@pytest.mark.parametrize('where', ['loss', 'gradient'])
@pytest.mark.parametrize('kind', BAD)
def test_step_is_skipped(run_train, monkeypatch, capsys, where, kind):
    monkeypatch.setattr(train, 'train_step', train.train_step)  # so that they are put back
    monkeypatch.setattr(parallel, 'complete_gradients', parallel.complete_gradients)
    states = spoil(train, where, BAD[kind], 2, 3)
    run = run_train(**SETTINGS)['run_dir']
    assert [bool(skipped) for *_, skipped in states] == [False, False, True, True, False, False]
    for step, before, after, _ in states:
        assert (before == after) == (step in (2, 3))
    skips = read_log(run, 'skip')
    assert [(e['step'], e['first_sample'], e['last_sample']) for e in skips] == [(3, 8, 11),
                                                                                (4, 12, 15)]
    assert [e['step'] for e in read_log(run, 'step')] == [1, 2, 5, 6]
    state = checkpoint.read_state(run, 6)
    assert state['skipped'] == 2
    assert all(t.isfinite().all() for t in tensors_of(run, 6).values())
    captured = capsys.readouterr()
    assert '2 steps were skipped; log.jsonl says which' in captured.out
    note('NaN, inf or -inf in loss or gradient', 2,
         'steps skipped and logged with their samples, weights and moments bitwise unchanged')


def test_ten_in_a_row_end_the_run(run_train, monkeypatch, capsys):
    monkeypatch.setattr(train, 'train_step', train.train_step)
    monkeypatch.setattr(parallel, 'complete_gradients', parallel.complete_gradients)
    states = spoil(train, 'gradient', math.nan, 5, 99)
    with pytest.raises(Stop) as e:
        run_train(out_dir='out/a', **{**SETTINGS, 'max_steps': 50, 'save_interval': 2})
    assert len(states) == 15 and e.value.code == 2
    assert e.value.message.startswith('10 steps in a row were skipped, the last one for loss ')
    good = checkpoint.steps('out/a')[-1]
    assert f'the last good checkpoint is out/a/step-{good:08d}' in e.value.message
    assert all(t.isfinite().all() for t in tensors_of('out/a', good).values())
    note('NaN in every gradient', 10, 'ends after 10 in a row, names the last good checkpoint')


def test_nine_in_a_row_do_not(run_train, monkeypatch):
    monkeypatch.setattr(train, 'train_step', train.train_step)
    monkeypatch.setattr(parallel, 'complete_gradients', parallel.complete_gradients)
    states = spoil(train, 'loss', math.nan, 1, 9)
    out = run_train(**{**SETTINGS, 'max_steps': 12})
    assert out['step'] == 12 and [bool(s[3]) for s in states] == [False] + 9 * [True] + 2 * [False]


def spoil_one_rank(train, rank) -> None:
    """Steps 2 and 3: NaN in rank 1's gradient only, after the exchange; states go to a file."""
    states = spoil(train, 'gradient', math.nan, 2, 3, rank, bad_ranks=(1,))
    write_at_end(train, states, rank)


def spoil_one_rank_for_ever(train, rank) -> None:
    """From step 5 on an infinite loss on rank 1."""
    spoil(train, 'loss', math.inf, 5, 99, rank, bad_ranks=(1,))


def write_at_end(train, states, rank) -> None:
    import hashlib
    real = train.main

    def main():
        result = real()
        digest = lambda state: hashlib.sha256(b''.join(state.values())).hexdigest()
        with open(f'states-{rank}.json', 'w') as f:
            json.dump([(step, digest(a), digest(b), why) for step, a, b, why in states], f)
        return result
    train.main = main


def test_one_rank_alone(tmp_path, text_file):
    """All ranks skip the same steps and keep the same weights."""
    finished(tmp_path, 2, inject=spoil_one_rank, dataset=str(text_file),
             **{**SETTINGS, 'dropout': 0.0})
    mine, others = (json.loads((tmp_path / f'states-{rank}.json').read_text()) for rank in (0, 1))
    assert mine == others
    warm_up, *mine = mine
    assert [(step, before == after, bool(why)) for step, before, after, why in mine] == [
        (step, step in (2, 3), step in (2, 3)) for step in range(6)]
    note("NaN in one rank's gradient", 2, 'all ranks skip the step; their weights and moments stay '
         'bitwise unchanged and equal')


def test_ten_in_a_row_end_all_ranks(tmp_path, text_file):
    ranks = Ranks(tmp_path, 2, inject=spoil_one_rank_for_ever, dataset=str(text_file),
                  out_dir='out/a', max_steps=50, save_interval=2, eval_interval=50)
    assert ranks.wait() == [2, 2]
    assert 'error: 10 steps in a row were skipped' in ranks.text(0)
    assert 'the last good checkpoint is out/a/step-' in ranks.text(0)
    note("infinite loss on one rank in every step", 10,
         'all ranks end after 10 in a row, the last good checkpoint is named')


def test_weights_that_are_not_finite_are_never_saved(run_train, monkeypatch):
    """Should a step go wrong without a sign in loss or gradient."""
    real = optim.apply_gradients

    def apply(optimizers, *rest, **options):
        real(optimizers, *rest, **options)
        if poisoned:
            optimizers[0].param_groups[0]['params'][0].data[0, 0] = math.inf
    poisoned = []
    monkeypatch.setattr(optim, 'apply_gradients', apply)
    run_train(out_dir='out/a', **{**SETTINGS, 'max_steps': 4})
    poisoned.append(1)
    with pytest.raises(Stop) as e:
        run_train(out_dir='out/a', init_from='resume', **{**SETTINGS, 'max_steps': 5})
    assert 'is not finite at step 5, which is not saved; the last good checkpoint is ' \
        'out/a/step-00000004' in e.value.message
    assert checkpoint.steps('out/a') == [4]
    note('a weight becomes infinite', 1, 'not saved; ends, naming the last good checkpoint')


@pytest.mark.parametrize('sigma, skipped', [(6.0, [31]), (0.0, [])])
def test_spike(run_train, monkeypatch, sigma, skipped):
    """A gradient 1,000 times too large; the steps before it, and those after it, are not spikes."""
    steps = []

    def complete(model, ranks):
        steps.append(1)
        if len(steps) == 31:
            for p in model.parameters():
                p.grad *= 1000
    monkeypatch.setattr(parallel, 'complete_gradients', complete)
    run = run_train(**{**SETTINGS, 'max_steps': 40, 'spike_sigma': sigma})['run_dir']
    found = read_log(run, 'skip')
    assert [e['step'] for e in found] == skipped
    assert all('is above' in e['reason'] and e['grad_norm'] > 100 for e in found)
    norms = checkpoint.read_state(run, 40)['grad_norms']
    assert len(norms) == (39 if sigma else 0) and all(norm < 100 for norm in norms)


def test_spikes_are_the_same_after_a_resume(run_train, monkeypatch):
    """The recent norms are in the checkpoint."""
    settings = {**SETTINGS, 'max_steps': 60, 'spike_sigma': 1.0, 'save_interval': 30}
    whole = run_train(out_dir='out/whole', **settings)['run_dir']
    assert read_log(whole, 'skip')       # one deviation is exceeded now and then
    with monkeypatch.context() as patch:
        real = train.train_step

        def step(*args, **options):
            return real(*args, **options)._replace(asked=args[2] == 34)
        patch.setattr(train, 'train_step', step)
        assert run_train(out_dir='out/cut', **settings)['stopped']
    cut = run_train(out_dir='out/cut', **settings)['run_dir']
    keys = ('step', 'grad_norm', 'reason')
    assert [[e[k] for k in keys] for e in read_log(whole, 'skip')] == [
        [e[k] for k in keys] for e in read_log(cut, 'skip')]


def test_spike_limit():
    """By hand: norms 1 and 5 in turn have mean 3 and deviation 2."""
    norms = [1.0, 5.0] * 10
    assert optim.spike_limit(norms, 5.0) == pytest.approx(13.0)
    assert optim.spike_limit(norms, 0.0) == math.inf
    assert optim.spike_limit(norms[:19], 5.0) == math.inf


def test_scaler_that_looks_for_its_scale_is_no_failure(run_train, monkeypatch):
    """fp16 starts with a scale that may be far too large; only at scale 1 a NaN is a failure."""
    monkeypatch.setattr(train, 'train_step', train.train_step)
    monkeypatch.setattr(parallel, 'complete_gradients', parallel.complete_gradients)
    monkeypatch.setattr(train.optim, 'LossScale', lambda enabled, real=optim.LossScale: real(True))
    states = spoil(train, 'loss', math.inf, 0, 13)
    out = run_train(**{**SETTINGS, 'max_steps': 20})
    assert out['step'] == 20 and sum(bool(s[3]) for s in states) == 14
    assert checkpoint.read_state(out['run_dir'], 20)['scaler']['scale'] == 65536 / 2 ** 14
    assert TINY['dtype'] == 'float32'
