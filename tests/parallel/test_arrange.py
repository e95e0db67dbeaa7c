"""What cannot be laid out is refused in one line; 1,024 ranks are counted in one process."""
import logging
import multiprocessing
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import note_row, stopped
from torch.testing._internal.distributed.fake_pg import FakeStore

import plan
import train
from core.net.weights import build_model
from core.planning.memory import Layout, held, key
from core.ranks import parallel, processes
from core.ranks.processes import Ranks
from model import GPTConfig

ROOT = Path(train.__file__).parent


@pytest.mark.parametrize('world, layout, message', [
    (4, dict(tp=3), 'tp=3, pp=1: 4 processes cannot be divided into groups of 3'),
    (6, dict(tp=2, pp=2), 'tp=2, pp=2: 6 processes cannot be divided into groups of 4'),
    (1, dict(pp=2), 'tp=1, pp=2: 1 processes cannot be divided into groups of 2'),
    (4, dict(tp=2), 'tp=2 with zero=0 on 4 processes: DDP around tensor parallelism computes wrong '
                    'gradients; use --zero=2 (with --replicas=2 it keeps whole copies)'),
    (4, dict(pp=2, pp_schedule='interleaved'), 'pp_schedule=interleaved with zero=0: DDP cannot '
                                               'follow it; use --zero=2'),
    (2, dict(sequence_parallel=True), 'sequence_parallel=True: is a part of tensor parallelism'),
    (4, dict(replicas=2), 'replicas=2: without zero each of the 4 is a whole copy'),
    (4, dict(zero=2, replicas=3), 'replicas=3: must divide the 4 data-parallel ranks'),
])
def test_refused(capsys, world, layout, message):
    assert stopped(capsys, lambda: processes.arrange(Ranks(world=world), **layout)).startswith(
        message)


@pytest.mark.parametrize('layout, model, message', [
    (dict(tp=4), dict(n_head=6), 'tp=4: must divide n_head=6'),
    (dict(tp=4), dict(n_head=8, n_kv_head=2), 'tp=4: must divide n_kv_head=2'),
    (dict(tp=4), dict(n_head=4, n_hidden=90), 'tp=4: must divide n_hidden=90'),
    (dict(tp=4, sequence_parallel=True), dict(n_head=4, block_size=30),
     'tp=4: must divide block_size=30 for sequence_parallel'),
    (dict(pp=4), dict(n_layer=3), 'pp=4: 4 stages, but the model has only n_layer=3'),
    (dict(pp=4, pp_schedule='interleaved'), dict(n_layer=6), 'pp=4: 8 stages, but the model has'),
    (dict(zero=2), dict(arch='lstm'), 'arch=lstm: can only be copied to all ranks'),
])
def test_model_that_does_not_fit(capsys, layout, model, message):
    ranks = Ranks(world=4)
    processes.arrange(ranks, **layout)
    config = GPTConfig(**{**dict(n_embd=48, n_layer=4, n_head=4), **model})
    assert stopped(capsys, lambda: parallel.check_model(ranks, config)).startswith(message)


def test_zero_1_is_2(capsys):
    ranks = Ranks(world=4)
    said = processes.arrange(ranks, zero=1)
    assert ranks.zero == 2 and 'zero=1 is treated as zero=2' in said[0]


def test_coordinates():
    """tp varies fastest, then data, then the stage."""
    seen = []
    for rank in range(8):
        ranks = Ranks(rank, 8)
        processes.arrange(ranks, tp=2, pp=2, zero=2)
        seen.append((ranks.pp_rank, ranks.dp_rank, ranks.tp_rank))
    assert seen == [(p, d, t) for p in range(2) for d in range(2) for t in range(2)]


@pytest.mark.parametrize('flags, message', [
    pytest.param(['--device=cuda'], 'device=cuda: this machine', marks=pytest.mark.slow),
    pytest.param(['--tp=3'], 'tp=3, pp=1: 2 processes cannot', marks=pytest.mark.slow),
    pytest.param(['--zero=4'], 'zero=4: must be at least 0 and at most 3', marks=pytest.mark.slow),
    (['--dataset=nowhere'], "dataset 'nowhere': neither"),    # rank 1 waits for rank 0's data
    pytest.param(['--tp=2', '--n_head=3', '--n_embd=48', '--dataset=text.txt'],
                 'tp=2: must divide n_head=3', marks=pytest.mark.slow),
])
def test_one_line_from_rank_0(tmp_path, text_file, flags, message):
    """Under torchrun, which adds a report of its own."""
    if '--device=cuda' in flags and torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    (tmp_path / 'text.txt').write_text(text_file.read_text())
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         str(ROOT / 'train.py'), '--compile=False', '--n_layer=2', '--block_size=32', *flags],
        cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.findall(r'.*error: .*', result.stderr) == [
        line for line in result.stderr.splitlines() if line.startswith(f'error: {message}')]
    assert result.stderr.count('error: ') == 1 and 'train.py", line' not in result.stderr


@pytest.mark.parametrize('ended, error', [
    (True, 'gloo: Connection closed by peer'), (False, 'gloo: Connection closed by peer'),
    (True, 'gloo: Timed out waiting 60000ms')])
def test_what_a_rank_says_that_has_lost_another(capsys, monkeypatch, ended, error):
    """Nothing, if that one has ended by itself and said why; its own faults are shown always."""
    monkeypatch.setattr(processes.atexit, 'register', lambda *words: None)
    store, shown = dist.HashStore(), []
    monkeypatch.setattr(processes, 'store', store)
    if ended:
        processes.tell_end()
    explain = partial(processes.explain, lambda *words: shown.append(words), Ranks(1, 2))
    explain(RuntimeError, RuntimeError(error), None)
    err = capsys.readouterr().err
    assert err == '' if ended else err.startswith('[rank 1] error: lost another of 2 ranks in step')
    assert not shown
    explain(ValueError, ValueError('other'), None)
    assert len(shown) == 1 and capsys.readouterr().err == ''


def test_torch_does_not_advise_about_exchanges():
    from torch.distributed.tensor import _collective_utils, _redistribute
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=2)
    ranks = Ranks(0, 2)
    processes.arrange(ranks, tp=2)
    processes.form_mesh(ranks, 'cpu')
    dist.destroy_process_group()
    for module in (_collective_utils, _redistribute):
        assert not module.logger.isEnabledFor(logging.WARNING)


def counted(rank: int, layout: dict, config: GPTConfig) -> int:
    """Parameters that `rank` of 1,024 holds."""
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=1024)
    ranks = Ranks(rank, 1024)
    processes.arrange(ranks, **layout)
    processes.form_mesh(ranks, 'cpu')
    model = build_model(config, None, 'meta')
    parallel.place(model, ranks)
    dist.destroy_process_group()
    return sum(parallel.local(p).numel() for p in model.parameters())


def expected(rank: int, layout: dict, config: GPTConfig) -> int:
    """The same as core/planning counts it, without building the model."""
    tp, pp = layout.get('tp', 1), layout.get('pp', 1)
    dp = 1024 // tp // pp
    planned = Layout(dp, tp, pp, layout['zero'])
    return sum(held(key(config), planned, rank // tp // dp, rank % tp, rank // tp % dp).values())


COUNTED = [dict(zero=3), dict(zero=3, tp=8), dict(zero=2, tp=8, pp=8), dict(zero=3, tp=8, pp=4)]


@pytest.mark.parametrize('layouts', [COUNTED[3:], pytest.param(COUNTED, marks=pytest.mark.slow)],
                         ids=len)
def test_parameters_per_rank_of_70b_on_1024(layouts):
    """Exact in four layouts, on ranks at both ends and in the middle."""
    config = plan.preset_config(plan.load_preset([str(ROOT / 'config/70b.py')]))
    with multiprocessing.get_context('forkserver').Pool(1) as pool:
        for layout in layouts:
            found = [pool.apply(counted, (rank, layout, config)) for rank in (0, 509, 1023)]
            assert found == [expected(rank, layout, config) for rank in (0, 509, 1023)]
            note_row('parameters of 70B per rank, of 1,024', 'layout, first, in between, last',
                     ', '.join(f'{k}={v}' for k, v in layout.items()), *map('{:,}'.format, found))
