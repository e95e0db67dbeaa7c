"""Layouts: what is refused and why, what each exchanges, which is fastest."""
from dataclasses import replace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.planning import layouts, memory
from core.planning.layouts import choose, reason, step_seconds
from core.planning.machines import GPUS
from core.planning.memory import Layout, held, key, rank_memory, step_memory
from core.planning.shape import choose as shape_for
from model import GPTConfig

H100 = GPUS['h100']
SMALL = GPTConfig(block_size=1024, vocab_size=50_304, n_layer=12, n_head=12, n_embd=768)


def chosen(config, n_gpus, **more):
    options = {'optimizer': 'adamw', 'dtype': 'bfloat16', 'n_parameters': sum(
        held(key(config), Layout()).values())} | more
    return choose(config, more.pop('gpu', H100), n_gpus, 512, 0.4, **{
        k: v for k, v in options.items() if k != 'gpu'})


def test_reasons_are_those_of_train():
    assert reason(SMALL, Layout(tp=8), 512) == 'tp=8: must divide n_head=12'
    assert reason(SMALL, Layout(dp=2, tp=2), 512).startswith('tp=2 with zero=0 on 4 processes')
    assert 'fewer sequences' in reason(SMALL, Layout(dp=4), 2)
    assert reason(SMALL, Layout(dp=2, tp=2, zero=3), 512) == ''


def test_a_pipeline_has_at_least_pp_micro_batches():
    good, _ = chosen(SMALL, 8, fixed={'pp': 4, 'zero': 2})
    assert good and all(choice.layout.n_micro >= 4 for choice in good)
    good, _ = chosen(SMALL, 8, fixed={'replicas': 2})
    assert good and all(choice.layout.zero and choice.layout.replicas == 2 for choice in good)


def test_every_stage_is_looked_at():
    """Of 9 layers on 4 stages the last has 3, the others 2: an earlier one holds more
    micro-batches, a later one more layers."""
    config = replace(SMALL, n_layer=9)
    layout = Layout(pp=4, n_micro=8)
    found = [sum(rank_memory(config, layout, i, 'bfloat16').values()) for i in range(4)]
    assert sum(step_memory(config, layout, 'bfloat16').values()) == max(found)


def test_one_gpu_needs_no_layout():
    good, refused = chosen(SMALL, 1)
    assert [str(choice.layout) for choice in good] == ['dp=1'] and not refused
    assert good[0].parts['tensor'] == good[0].parts['bubble'] == good[0].parts['data'] == 0


def test_what_fits_is_what_the_memory_says():
    """A 7B fits no single H100, and eight only if it is divided."""
    seven = GPTConfig(block_size=2048, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                      n_hidden=13_312, vocab_size=50_304, norm='rmsnorm', position='rope',
                      mlp='swiglu', qk_norm=True, bias=False, tied=False)
    good, refused = chosen(seven, 1)
    assert not good and all(choice.refused.startswith('needs 1') for choice in refused)
    good, refused = chosen(seven, 8)
    room = layouts.SPARE * H100.memory - 1.5e9
    assert all(sum(choice.memory.values()) <= room for choice in good)
    assert good and all(choice.layout.zero or choice.layout.tp * choice.layout.pp > 1
                        for choice in good)
    assert any('needs' in choice.refused and str(choice.layout).startswith('dp=8,')
               for choice in refused)
    seconds = [choice.seconds for choice in good]
    assert seconds == sorted(seconds)


def test_seconds_by_hand():
    """8 GPUs of 1e12 FLOP/s at half of it, 1e9 and 1e8 bytes a second."""
    gpu = H100._replace(link=1e9, network=1e8)
    N, tokens = 1_000_000, 512 * 1024
    flops = layouts.whole_flops(key(SMALL)) * tokens
    rate = 8 * H100.peak * 0.5
    plain = step_seconds(SMALL, Layout(8, zero=2, n_micro=64), gpu, 0.5, n_parameters=N)
    assert plain['compute'] == pytest.approx(flops / rate)
    # gathered once, scattered once: 7/8 of 4 bytes each, behind one of 64 micro-batches
    assert plain['data'] == pytest.approx(max(0, 2 * 7 / 8 * 4 * N / 1e9 - flops / rate / 64))
    again = step_seconds(SMALL, Layout(8, recompute=True, n_micro=64), gpu, 0.5, n_parameters=N)
    assert again['compute'] == pytest.approx(4 / 3 * plain['compute'])
    # 4 all-reduces a layer of a row of 1,024 x 768 in 2 bytes, each 2 x 1/2 of it
    cut = step_seconds(SMALL, Layout(4, 2, zero=2, n_micro=128), gpu, 0.5, n_parameters=N)
    tensor = cut['tensor']
    assert tensor == pytest.approx(128 * 12 * 4 * 2 * 1024 * 768 / 1e9)
    pipe = step_seconds(SMALL, Layout(2, pp=4, zero=2, n_micro=256), gpu, 0.5, n_parameters=N)
    assert pipe['bubble'] == pytest.approx(pipe['compute'] * 3 / 256)
    # fp32 hidden states of 256 rows, forward and back
    assert pipe['pipeline'] == pytest.approx(2 * 256 * 4 * 1024 * 768 / 1e9)
    # rows that only fill up: 3 micro-batches of 2 on 96 ranks are 576, not 512
    filled = step_seconds(SMALL, Layout(96, rows=2, n_micro=3), gpu, 0.5, n_parameters=N)
    assert filled['compute'] == pytest.approx(flops / 512 * 576 / (96 * H100.peak * 0.5))


@pytest.mark.parametrize('N', [1e6, 30e6, 124e6, 1e9, 7e9, 13e9, 70e9, 175e9])
def test_shapes(N):
    """Near the size that was asked, and what a model may be; the count is the model's own."""
    vocab = 512 if N < 2e6 else 50_304 if N > 1e8 else 4096
    shape = shape_for(N, vocab)
    config = GPTConfig(n_layer=shape.n_layer, n_head=shape.n_head, n_kv_head=shape.n_kv_head,
                       n_embd=shape.n_embd, n_hidden=shape.n_hidden, vocab_size=vocab,
                       norm='rmsnorm', position='rope', mlp='swiglu', qk_norm=True, bias=False,
                       tied=shape.tied)
    assert sum(held(key(config), Layout()).values()) == shape.parameters()
    assert shape.flops_per_token(1024) == layouts.whole_flops(key(config))
    assert shape.parameters() == pytest.approx(N, rel=0.03)
    if N >= 1e9:
        assert shape.n_layer % 4 == 0 and shape.n_head % 2 == 0
    if N == 7e9:    # config/7b.py's
        assert (shape.n_layer, shape.n_embd, shape.n_hidden) == (32, 4096, 13_312)


def test_memory_without_flash_attention_is_that_of_the_scores():
    """12 heads x 1,024 x 1,024 probabilities in each of 12 layers, in fp32."""
    layout = Layout(rows=1)
    flash = step_memory(SMALL, layout, 'float32')
    memory.block_passes.cache_clear()
    with sdpa_kernel(SDPBackend.MATH):
        math_ = step_memory(SMALL, layout, 'float32')
    memory.block_passes.cache_clear()
    assert math_['activations'] - flash['activations'] == pytest.approx(
        12 * 12 * 1024 ** 2 * 4, rel=0.01)
