"""What core/planning/memory.py counts, beside what real ranks take in a training step."""
import gc
from types import SimpleNamespace

import pytest
import torch
from conftest import note_row
from layouts import laid_out, processes_end, workers  # noqa: F401  fixtures

import bench
import train
from core.device import Device
from core.net import optim
from core.net.weights import allocate, build_model
from core.planning.memory import Layout, Watch, rank_memory
from core.ranks import parallel, processes
from core.ranks.processes import Ranks, share
from core.run.begin import build_optimizers
from core.run.learner import Learner
from core.settings import settings_of
from model import GPTConfig, init_weights

QWEN3 = dict(norm='rmsnorm', position='rope', mlp='swiglu', qk_norm=True, bias=False, tied=False)
SIZES = {   # config, rows of a micro-batch, sequences of a rank
    'small': (dict(block_size=256, vocab_size=2048, n_layer=4, n_head=4, n_kv_head=2, n_embd=256,
                   **QWEN3), 4, 8),
    'middle': (dict(block_size=512, vocab_size=8192, n_layer=8, n_head=8, n_embd=512, **QWEN3),
               2, 4),
    'GPT-2': (dict(block_size=1024, vocab_size=50_304, n_layer=12, n_head=12, n_embd=768), 1, 2)}
LAYOUTS = [
    (1, {}, False), (1, {}, True), (2, {}, False), (2, dict(zero=2), False),
    (2, dict(zero=3), True), (2, dict(tp=2), False), (2, dict(pp=2), False),
    (4, dict(zero=3, tp=2, sequence_parallel=True), False), (4, dict(zero=2, pp=2), False),
    (4, dict(zero=2, replicas=2), True)]


def learner_of(ranks, config, recompute, optimizer, dtype, per_rank, rows):
    """What train.py builds; and the number of micro-batches."""
    settings = SimpleNamespace(**settings_of(vars(train)) | {'optimizer': optimizer})
    device = Device('cpu', 'cpu', dtype, False, 1.0, [])
    model = build_model(config, None, 'meta')
    model.recompute = recompute
    parallel.place(model, ranks)
    allocate(model, 'cpu', parallel.put)
    init_weights(model, 1, parallel.put)
    optimizers = build_optimizers(settings, model, device, ranks)
    trained, n_micro = parallel.wrap(model, ranks, device, per_rank, rows)
    return Learner(model, trained, optimizers, optim.LossScale(False), device, ranks, 1.0), n_micro


def measured(ranks, layout, size, recompute, optimizer, dtype, n_rows=0) -> tuple[int, int]:
    """The most bytes of all tensors during the second step, and how many micro-batches it has."""
    laid_out(ranks, layout)
    model, rows, per_rank = SIZES[size]
    config, per_rank = GPTConfig(**model), n_rows or (4 * rows if ranks.pp > 1 else per_rank)
    gc.collect()
    with Watch() as seen:
        learner, n_micro = learner_of(ranks, config, recompute, optimizer, dtype, per_rank, rows)
        batches = []
        for samples in share(0, per_rank * ranks.dp, ranks.dp_rank, ranks.dp, rows, n_micro):
            x = torch.zeros(len(samples), config.block_size, dtype=torch.long)
            batches.append((x, x.clone(), None))
        assert not train.train_step(learner, batches, 0, 1.0).skipped
        gc.collect()
        seen.peak = 0
        train.train_step(learner, batches, 1, 1.0)
    return seen.peak, len(batches)


def compare(world, layout, recompute, size, optimizer='adamw', dtype='float32', n_rows=0):
    """Every rank within 10%; notes the one that needs most."""
    arguments = layout, size, recompute, optimizer, dtype, n_rows
    if world == 1:
        ranks = Ranks()
        processes.arrange(ranks)
        found = [measured(ranks, *arguments)]
    else:
        found = workers(world).do(measured, *arguments)
    model, rows, _ = SIZES[size]
    tp, pp = layout.get('tp', 1), layout.get('pp', 1)
    planned = Layout(world // tp // pp, tp, pp, layout.get('zero', 0), layout.get('replicas', 1),
                     layout.get('sequence_parallel', False), layout.get('pp_schedule', '1f1b'),
                     recompute, rows, found[0][1])
    pairs = []
    for rank, (peak, _) in enumerate(found):
        parts = rank_memory(GPTConfig(**model), planned, rank // (world // pp), dtype, kind='cpu',
                            optimizer=optimizer)
        pairs.append((peak, sum(parts.values())))
    for peak, counted in pairs:
        assert counted == pytest.approx(peak, rel=0.1), (pairs, parts)
    peak, counted = max(pairs)
    shown = ', '.join([f'{k}={v}' for k, v in layout.items()]) or ('DDP' if world > 1 else 'plain')
    note_row('memory of a step, MiB on the rank that needs most',
             'ranks, layout, model, measured, counted', world,
             shown + ', recomputed' * recompute + ', Muon' * (optimizer == 'muon')
             + f', {dtype}' * (dtype != 'float32') + f', {n_rows} rows' * bool(n_rows), size,
             f'{peak / 2 ** 20:,.0f}', f'{counted / 2 ** 20:,.0f}')


SLOW = [pytest.param(*case, size, marks=pytest.mark.slow) for case in LAYOUTS
        for size in SIZES if (size, *case[:2]) not in (
            ('small', 1, {}), ('small', 2, dict(zero=3)), ('small', 2, dict(tp=2)))]


@pytest.mark.parametrize('world, layout, recompute, size', [
    (1, {}, False, 'small'), (2, dict(zero=3), True, 'small'), (2, dict(tp=2), False, 'small'),
    *SLOW], ids=str)
def test_counted_is_measured(world, layout, recompute, size):
    compare(world, layout, recompute, size)


@pytest.mark.slow
@pytest.mark.parametrize('world, layout, recompute, more', [
    (1, {}, False, dict(optimizer='muon')), (1, {}, False, dict(dtype='bfloat16')),
    (1, {}, True, dict(dtype='bfloat16')), (1, {}, False, dict(n_rows=2)),
    (2, dict(zero=3), True, dict(dtype='bfloat16')), (2, dict(zero=2), False, dict(n_rows=2)),
    (2, {}, False, dict(n_rows=2)), (2, dict(zero=3), False, dict(n_rows=2)),
    (2, dict(zero=3), False, dict(optimizer='muon')),
    (2, dict(pp=2, pp_schedule='interleaved'), False, {})], ids=str)
def test_other_ways_to_train(world, layout, recompute, more):
    compare(world, layout, recompute, 'middle', **more)


def test_watch_counts_as_the_profiler_does():
    """In one process, where nothing else allocates."""
    ranks = Ranks()
    processes.arrange(ranks)
    peak, n = measured(ranks, {}, 'small', False, 'adamw', 'float32')
    model, rows, per_rank = SIZES['small']
    config = GPTConfig(**model)
    learner, _ = learner_of(ranks, config, False, 'adamw', 'float32', per_rank, rows)
    x = torch.zeros(rows, config.block_size, dtype=torch.long)
    batches = [(x, x.clone(), None)] * n
    theirs = bench.peak_memory(learner.model, learner.optimizers,
                               lambda: train.train_step(learner, batches, 0, 1.0), learner.device)
    assert peak == pytest.approx(theirs, rel=0.01)
