"""What ranks send each other in a step, beside what they must."""
import pytest
from conftest import note_row
from layouts import (  # noqa: F401  fixtures
    BATCH,
    BLOCK,
    MODEL,
    Case,
    exchanged,
    processes_end,
    settings_put_back,
    workers,
)
from test_layouts import MUON, SP

from core.net.weights import build_model
from model import GPTConfig, count_parameters

CONFIG = GPTConfig(**MODEL)
L, A = CONFIG.n_layer, BLOCK * CONFIG.n_embd * 4        # layers; bytes of a row's residual stream
W = 4 * count_parameters(build_model(CONFIG, None, 'meta'))     # bytes of all weights
BLOCKS = W - 4 * (2 * CONFIG.vocab_size + 1) * CONFIG.n_embd    # ... of those in the blocks
MATRICES = BLOCKS - 4 * L * (2 * CONFIG.n_embd + 2 * CONFIG.head_dim)
# A part of each vocabulary's row of logits: the largest, the sum, the target's.
LOSS = 3 * 4 * BLOCK


@pytest.mark.parametrize('world, layout, settings, least, why', [
    (2, dict(), {}, W, 'W: all-reduce of the gradients, after the last micro-batch'),
    (2, dict(zero=2), {}, 2 * W, 'W weights gathered once, W gradients scattered once'),
    (2, dict(zero=3), {}, BATCH // 2 * (2 * W + BLOCKS),
     'for each micro-batch: W gathered, blocks once more to go back, W scattered'),
    pytest.param(
        2, dict(tp=2), {}, BATCH * ((4 * L + 2) * A + LOSS), 'for each row: 2 all-reduces of A a '
        'layer forward, 2 back, 1 for embedding and head each', marks=pytest.mark.slow),
    pytest.param(
        2, SP, {}, BATCH * ((8 * L + 4) * A + LOSS), 'for each row: 2 gathers and 2 scatters of A '
        'a layer forward, as many back, 4 at the ends', marks=pytest.mark.slow),
    (2, dict(pp=2), {}, BATCH * A, 'A for each row: on, or back'),
    pytest.param(4, dict(zero=2, tp=2), {}, W + BATCH // 2 * ((4 * L + 2) * A + LOSS),
                 'half of the weights each, half of the rows', marks=pytest.mark.slow),
    (2, {}, MUON, W + MATRICES, 'W; and the updates of the matrices, each made on one rank'),
    pytest.param(2, dict(zero=2), MUON, 2 * W + 2 * MATRICES, 'as without; and the matrices whole '
                 'to one rank each, and back', marks=pytest.mark.slow),
], ids=lambda x: '-'.join(map(str, x.items())) if isinstance(x, dict) else str(x)[:9])
def test_no_more_than_needed(tmp_path, world, layout, settings, least, why):
    """Within 3%: padding of shards, and a report of three numbers."""
    found = workers(world).do(exchanged, Case(layout, {}, settings, 'float32'), str(tmp_path))
    total = max(sum(size for _, size in counts.values()) for counts in found)
    counts = ', '.join(f'{n} {name}' for name, (n, _) in sorted(found[0].items()))
    shown = ', '.join(f'{k}={v}' for k, v in layout.items()) or 'DDP'
    note_row('what a rank exchanges in a step', 'ranks, layout, collectives, kB, at least, why',
             world, shown + ', Muon' * bool(settings), counts, f'{total / 1e3:,.0f}',
             f'{least / 1e3:,.0f}', why)
    assert least <= total * 1.001 and total < 1.03 * least + 200
