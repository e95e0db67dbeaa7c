"""Every layout of ranks computes what one process computes."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import note_row
from layouts import (  # noqa: F401  fixtures
    GPT2,
    STEPS,
    Case,
    different_weights,
    evaluations,
    layout_checked,
    one_process,
    overflow,
    processes_end,
    resume,
    save,
    settings_put_back,
    train_steps,
    workers,
)

import train
from core.ranks.processes import Ranks

SP = dict(tp=2, sequence_parallel=True)
MUON = dict(optimizer='muon')
TIED = dict(tied=True)
# by the number of ranks; those of a model and an optimizer each, but not all pairs of them
FEW = {
    2: [Case(), Case({}, GPT2, MUON),
        Case(dict(zero=2), TIED), Case(dict(zero=3), GPT2), Case(dict(zero=3), {}, MUON),
        Case(dict(tp=2), GPT2), Case(dict(tp=2), TIED, MUON), Case(SP),
        Case(SP, compile=True, rows=2, dtype='float32'),
        Case(dict(pp=2), GPT2), Case(dict(pp=2), documents=True),
        Case(dict(pp=2, pp_schedule='interleaved'), TIED)],
    4: [Case(dict(zero=2, tp=2), {}, MUON), Case(dict(zero=3, **SP), GPT2),
        Case(dict(zero=2, replicas=2), TIED), Case(dict(pp=2), TIED),
        Case(dict(zero=3, pp=2), GPT2), Case(dict(zero=2, pp=2, pp_schedule='interleaved')),
        Case(dict(tp=2, pp=2), GPT2), Case(dict(pp=2, **SP), TIED, MUON),
        Case(dict(zero=3, tp=2), settings=dict(activation_checkpointing=True)),
        Case(dict(zero=3, tp=2), dtype='float32'),
        Case(dict(zero=2, pp=2), TIED, dtype='bfloat16')],
    8: [Case(dict(zero=3, tp=2, pp=2), GPT2), Case(dict(zero=2, pp=2, **SP), TIED, MUON)],
}
LAYOUTS_OF = {
    2: [dict(), dict(zero=2), dict(zero=3), dict(tp=2), SP, dict(pp=2),
        dict(pp=2, pp_schedule='interleaved')],
    4: [dict(), dict(zero=2), dict(zero=3), dict(zero=2, replicas=2), dict(zero=3, replicas=2),
        dict(tp=2, zero=2), dict(tp=2, zero=3), dict(zero=2, **SP), dict(zero=3, **SP),
        dict(pp=2), dict(pp=2, zero=2), dict(pp=2, zero=3), dict(pp=2, tp=2), dict(pp=2, **SP),
        dict(pp=2, zero=3, pp_schedule='interleaved'), dict(pp=4),
        dict(tp=2, pp=2, pp_schedule='interleaved')],
    8: [dict(tp=2, pp=2, zero=2), dict(tp=2, pp=2, zero=3), dict(pp=2, zero=2, **SP),
        dict(zero=2, replicas=2, tp=2), dict(pp=2, zero=3, replicas=2),
        dict(tp=2, pp=2, zero=3, pp_schedule='interleaved')],
}
MANY = {world: [Case(layout, model, settings) for layout in layouts
                for model in ({}, TIED, GPT2) for settings in ({}, MUON)]
        + [Case(layout, model, settings, dtype) for layout in layouts
           for model, settings in (({}, {}), (GPT2, MUON)) for dtype in ('float32', 'bfloat16')]
        + [Case(layout, compile=True, rows=2, dtype='float32') for layout in layouts[:10:2]]
        for world, layouts in LAYOUTS_OF.items()}
# What rounding does to sums in another order, and to what comes of them in 10 steps: in loss and
# gradient norm. Muon's iteration is in float32 at most, in bfloat16 with bfloat16.
BOUNDS = {('float64', 'adamw'): 1e-10, ('float64', 'muon'): 1e-10, ('float32', 'adamw'): 1e-5,
          ('float32', 'muon'): 1e-4, ('bfloat16', 'adamw'): 0.2, ('bfloat16', 'muon'): 0.5}

reference = {}


def named(cases, slow=False):
    marks = pytest.mark.slow if slow else ()
    return [pytest.param(world, case, id=f'{world}-{case}', marks=marks)
            for world, some in cases.items() for case in some]


# of those the ones that take longest, each of a kind that others are of, too
LONG = [Case(dict(zero=3, tp=2), settings=dict(activation_checkpointing=True)),
        Case(dict(zero=3, **SP), GPT2), Case(dict(zero=2, tp=2), {}, MUON),
        Case(dict(zero=2, pp=2, **SP), TIED, MUON), Case(dict(zero=3, tp=2, pp=2), GPT2),
        Case(dict(pp=2, **SP), TIED, MUON), Case(dict(zero=3, tp=2), dtype='float32'),
        Case(dict(tp=2), GPT2), Case(dict(tp=2), TIED, MUON), Case(dict(tp=2, pp=2), GPT2)]


@pytest.mark.parametrize('world, case', named(
    {world: [case for case in cases if case not in LONG] for world, cases in FEW.items()}) + named(
    {world: [case for case in cases if case in LONG] for world, cases in FEW.items()}, slow=True)
    + named({world: [case for case in cases if case not in FEW[world]]
             for world, cases in MANY.items()}, slow=True))
def test_same_as_one_process(world, case):
    """Loss and gradient norm of 10 steps with clipping, accumulation and uneven targets."""
    key = str(Case({}, case.model, case.settings, case.dtype, documents=case.documents))
    if key not in reference:
        reference[key] = one_process(case)
    results = workers(world).do(train_steps, case)
    assert all(result == results[0] for result in results)      # the ranks agree
    worst = [max(abs(a[i] - b[i]) for a, b in zip(reference[key], results[0])) for i in (0, 1)]
    optimizer = case.settings.get('optimizer', 'adamw')
    layout = ', '.join(f'{k}={v}' for k, v in case.layout.items()) or 'DDP'
    model = 'GPT-2' if case.model == GPT2 else 'Qwen3, tied' if case.model else 'Qwen3'
    note_row('layouts against one process: the largest difference in 10 steps',
             'ranks, layout, model, optimizer, precision, loss, gradient norm', world,
             layout + ', compiled' * case.compile, model, optimizer, case.dtype,
             *(f'{x:.1e}' for x in worst))
    assert len(results[0]) == STEPS and max(worst) < BOUNDS[case.dtype, optimizer]


@pytest.mark.parametrize('world, case', named(
    {2: [Case(dict(zero=2), edit='layer scale')]}) + named(
    {2: [Case(dict(zero=3), GPT2, MUON, edit='layer scale'),
         Case(dict(tp=2), edit='layer scale'), Case(dict(pp=2), edit='layer scale')],
     4: [Case(dict(zero=3, replicas=2), edit='layer scale'),
         Case(dict(zero=2, tp=2), edit='layer scale')]}, slow=True))
def test_edited_model_as_in_one_process(world, case):
    """With numbers and gains in its blocks. FSDP does not take numbers."""
    results = workers(world).do(train_steps, case)
    expected = one_process(case)
    assert all(result == [pytest.approx(pair, abs=1e-10) for pair in expected]
               for result in results)


PASS = [(dict(pp=2), 'none'), (dict(zero=2), 'value residual'), (dict(zero=3), 'values')]
FAIL = [(dict(pp=2), 'value residual', 'the loss is '), (SP, 'layer scale', 'h.0.scale'),
        (dict(pp=2), 'all', 'the gradient of registers ')]
MORE = [(dict(tp=2), 'none'), (SP, 'none'), (dict(pp=2, pp_schedule='interleaved'), 'none'),
        (dict(tp=2), 'value residual'), (dict(tp=2), 'layer scale'), (dict(pp=2), 'values')]


@pytest.mark.parametrize('layout, edit, words', [
    *((*pair, '') for pair in PASS), *FAIL,
    *(pytest.param(*pair, '', marks=pytest.mark.slow) for pair in MORE)], ids=str)
def test_check_of_a_layout(layout, edit, words):
    """A layout that trains another model than one process is refused, and no other one. All ranks
    say the same."""
    said = workers(2).do(layout_checked, Case(layout, edit=edit, documents='tp' not in layout))
    assert said[0] == said[1] and bool(said[0]) == bool(words) and words in said[0]


TRY = """import os, sys
sys.path += [{root!r}, {root!r} + '/tests', {root!r} + '/tests/parallel']
import layouts, torch
from core.ranks import processes
from core.device import Device
ranks = processes.find_ranks()
processes.arrange(ranks, pp=2)
processes.start(ranks, Device('cpu', 'cpu', 'float32', False, 1.0, []), 10.0)
layouts.meshes[2, 1, 1] = ranks.mesh, processes.tied_group
layouts.layout_checked(ranks, layouts.Case(dict(pp=2), edit='residual argument'))
"""


@pytest.mark.slow
def test_error_in_one_stage_ends_all(tmp_path):
    """The other stage waits for what never comes; it ends, too, and one line says why."""
    root = str(Path(train.__file__).parent)
    env = {**os.environ, 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
           'MASTER_PORT': str(28000 + os.getpid() % 900)}
    ranks = [subprocess.Popen([sys.executable, '-c', TRY.format(root=root)], stderr=subprocess.PIPE,
                              env={**env, 'RANK': str(i), 'LOCAL_RANK': str(i)}, text=True)
             for i in range(2)]
    lines = [line for process in ranks for line in process.communicate(timeout=120)[1].splitlines()]
    said = [line for line in lines if 'error' in line]
    assert [process.returncode for process in ranks] == [2, 2] and len(said) == 1, lines
    assert said[0].startswith('[rank 1] error: pp=2: a small copy of this model fails, but not in '
                              "one process: AttributeError: 'PassesOn'")


@pytest.mark.parametrize('world, case', named(
    {2: [Case(dict(zero=3), GPT2), Case(dict(pp=2), TIED)],
     4: [Case(dict(tp=2, pp=2), GPT2), Case(dict(zero=3, **SP))]}))
def test_same_weights_from_the_same_seed(world, case):
    """Made in parts, where the whole may not fit."""
    assert workers(world).do(different_weights, case) == [[]] * world


@pytest.mark.parametrize('world, case', named(
    {2: [Case(dict(zero=2)), Case(dict(zero=3), GPT2), Case(dict(pp=2), TIED)],
     4: [Case(dict(zero=3, pp=2, pp_schedule='interleaved')), Case(dict(zero=2, tp=2))]})
    + named({2: [Case(SP)]}, slow=True))
def test_evaluation(world, case):
    """Between two steps; one that is cut short leaves everything as it was."""
    expected = evaluations(Ranks(), replace(case, layout={}))
    assert expected[0] is None
    for cut_short, named, scores in workers(world).do(evaluations, case):
        assert cut_short is None and named
        assert scores == pytest.approx(expected[2], abs=1e-10)


@pytest.mark.parametrize('layout', [
    dict(tp=2, pp=2), dict(zero=2, pp=2),
    pytest.param(dict(zero=3, tp=2), marks=pytest.mark.slow)], ids=str)
def test_scale_is_the_same_on_all_ranks(layout):
    """fp16's: an overflow on one of them halves it on all, and none makes that step."""
    case = Case(layout)
    results = workers(4).do(overflow, case)
    assert all(str(result) == str(results[0]) for result in results)    # a NaN is not itself
    (*first, skipped, scale), (*_, why, halved), (*third, skipped_too, same) = results[0]
    assert (skipped, scale) == ('', 65536.0) and 'inf' in why and (halved, same) == (32768.0,) * 2
    assert skipped_too == ''
    expected = one_process(case)
    assert first == pytest.approx(expected[0], abs=1e-10)
    assert third != pytest.approx(expected[2], abs=1e-6)    # there the second step was made


@pytest.mark.parametrize('layout', [dict(pp=2), dict(zero=3), *(
    pytest.param(layout, marks=pytest.mark.slow) for layout in (dict(tp=2), SP))], ids=str)
def test_logits_in_chunks(layout):
    """Where all logits of a micro-batch would be too many."""
    case = Case(layout, chunk=100)
    results = workers(2).do(train_steps, case)
    expected = one_process(replace(case, chunk=0))
    assert results[0] == [pytest.approx(pair, abs=1e-10) for pair in expected]


SAVED = {1: [dict()], 2: [dict(), dict(zero=2), dict(tp=2), dict(pp=2)],
         4: [dict(zero=3, tp=2), dict(tp=2, pp=2), dict(zero=2, pp=2, pp_schedule='interleaved')],
         8: [dict(zero=3, tp=2, pp=2)]}
PAIRS = [(a, x, b, y) for a in SAVED for x in SAVED[a] for b in SAVED for y in SAVED[b]]
folders = {}


def do(world, what, *arguments):
    """On one rank, that is: in this process."""
    return workers(world).do(what, *arguments) if world > 1 else [what(Ranks(), *arguments)]


@pytest.mark.parametrize('world, layout, new_world, new_layout', [
    pytest.param(*pair, id=f'{pair[0]}-{Case(pair[1])}-to-{pair[2]}-{Case(pair[3])}',
                 marks=() if i in (4, 23, 70) else pytest.mark.slow)
    for i, pair in enumerate(PAIRS)])
def test_saved_here_resumed_there(tmp_path_factory, world, layout, new_world, new_layout):
    """Weights and optimizer state bitwise, and the next losses are those of one process."""
    model, settings = (GPT2, MUON) if len(layout) % 2 else (TIED, {})
    case = Case(layout, model, settings)
    key = world, str(case)
    if key not in folders:
        folders[key] = tmp_path_factory.mktemp('run')
        (folders[key] / 'log.jsonl').write_text('')
        do(world, save, case, str(folders[key]), 5, len(layout) == 2)
        files = {path.name for path in (folders[key] / 'step-00000005').iterdir()}
        sharded = bool(layout)
        assert ('model.safetensors' in files) == (not sharded or len(layout) == 2)
        assert ('optimizer.safetensors' in files) != sharded
    name = str(Case({}, model, settings))
    if name not in reference:
        reference[name] = one_process(Case({}, model, settings))
    for different, losses in do(new_world, resume, Case(new_layout, model, settings),
                                str(folders[key]), 5):
        assert different == []
        assert losses == [pytest.approx(pair, abs=1e-10) for pair in reference[name][5:]]


@pytest.mark.parametrize('world, layout, new_world, new_layout', [
    (1, {}, 2, dict(pp=2)), (2, dict(zero=2), 1, {}),
    pytest.param(2, dict(pp=2), 4, dict(zero=3, tp=2), marks=pytest.mark.slow),
    pytest.param(4, dict(zero=3, tp=2), 2, dict(tp=2), marks=pytest.mark.slow)], ids=str)
def test_saved_before_the_first_good_step(tmp_path, world, layout, new_world, new_layout):
    """When no optimizer has a state; it goes on as if nothing had been."""
    (tmp_path / 'log.jsonl').write_text('')
    do(world, save, Case(layout, TIED, MUON), str(tmp_path), 0, False)
    assert not list((tmp_path / 'step-00000000').glob('optimizer*'))
    expected = one_process(Case({}, TIED, MUON))
    for different, losses in do(new_world, resume, Case(new_layout, TIED, MUON), str(tmp_path), 0):
        assert different == [] and losses == [pytest.approx(pair, abs=1e-10) for pair in expected]
