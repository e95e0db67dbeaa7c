"""What a GPU is asked for, seen on a CPU that pretends to be one: kernels of attention, masks that
are never dense, what a graph keeps, how many rows a pass has. Nothing is measured here."""
import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import stopped
from test_model import LLAMA, close, gradients, tiny, tokens
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.nn.attention.flex_attention import create_mask

import classify
import dpo
import finetune
import model as M
import train
from core import device as hardware
from core.device import Device, fit_micro_batch
from core.net import kernels, optim
from core.net.engine import generate
from core.net.weights import build_model
from core.ranks import parallel, processes
from core.ranks.processes import Ranks
from core.run import learner as learning
from core.run.learner import Learner
from core.run.log import read_log

WIDE = dict(head_dim=16, n_layer=2)
DOC = torch.tensor([[0] * 9 + [1] * 11, [0] * 15 + [-1] * 5])


@pytest.fixture
def gpu(monkeypatch):
    """Attention takes this CPU for a GPU that has flex-attention, which here is written out."""
    def flex(q, k, v, block_mask, enable_gqa=False):
        mask = create_mask(block_mask.mask_mod, q.size(0), 1, q.size(2), k.size(2), 'cpu')
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)

    monkeypatch.setattr(kernels, 'GPU', 'cpu')
    monkeypatch.setattr(kernels, 'has_flex', lambda device, head_dim: True)
    monkeypatch.setattr(kernels, 'compiled', lambda f: f)
    monkeypatch.setattr(kernels, 'flex_attention', flex)


# ---------------------------------------------------------------------------------------------
# Kernels


class Kernels:
    """Stands for kernels.F, and notes which kernels each attention may take, and its mask."""

    def __init__(self):
        self.seen = []

    def __getattr__(self, name):
        return getattr(F, name)

    def scaled_dot_product_attention(self, q, k, v, attn_mask=None, **options):
        self.seen.append((set(_cur_sdpa_kernel_backends()), attn_mask is not None))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)


def train_once(model, doc=None):
    model.train()(tokens(2, 20), tokens(2, 20, seed=1), doc=doc).backward()


def look_once(model, doc=None):
    with torch.no_grad(), parallel.looking_on(model):
        model(tokens(2, 20), doc=doc)


def decode(model, prompts):
    for _ in generate(model, prompts, 3):
        pass


@pytest.mark.parametrize('settings, run, cudnn, masked', [
    ({}, train_once, True, False),
    (dict(LLAMA, n_kv_head=2), train_once, True, False),
    (dict(window=40), train_once, True, False),                     # wider than the row
    (dict(dropout=0.5), train_once, True, False),
    (dict(dropout=0.5), lambda m: train_once(m, DOC), False, True),
    (dict(dropout=0.5, window=3), train_once, False, True),
    ({}, look_once, False, False),
    ({}, lambda m: decode(m, [[1, 2, 3]]), False, False),
    (dict(LLAMA, n_kv_head=1), lambda m: decode(m, [[1, 2, 3]] * 2), False, False),
    ({}, lambda m: decode(m, [[1, 2, 3], [4]]), False, True),        # padded
    (dict(window=2), lambda m: decode(m, [[1, 2, 3]]), False, True),
    ({}, lambda m: decode(m, [list(range(24))]), False, False)])     # the cache runs full
def test_kernels_asked_for(gpu, monkeypatch, settings, run, cudnn, masked):
    """cuDNN's may only train, without a mask; all others always may."""
    asked, before = Kernels(), set(_cur_sdpa_kernel_backends())
    monkeypatch.setattr(kernels, 'F', asked)
    run(tiny(**{**WIDE, 'block_size': 24, **settings}))
    assert asked.seen and any(mask for _, mask in asked.seen) == masked
    others = {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
    for allowed, _ in asked.seen:
        assert others <= allowed and (SDPBackend.CUDNN_ATTENTION in allowed) == cudnn
    assert set(_cur_sdpa_kernel_backends()) == before       # also between two tokens


def test_a_cpu_is_asked_for_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(kernels, 'sdpa_kernel', refuse)
    monkeypatch.setattr(kernels, 'has_flex', refuse)
    monkeypatch.setattr(kernels, 'fused', refuse)
    model = tiny(window=3)
    train_once(model, DOC)
    look_once(model, DOC)
    decode(model, [[1, 2, 3], [4]])


def test_kernels_are_chosen_in_graphs(gpu):
    """The choice is a part of the graph, which has no gap."""
    targets = []

    def backend(graph, example):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    q = torch.randn(1, 2, 600, 16)      # too long for the CPU's own way
    attend = torch.compile(kernels.attend, backend=backend, fullgraph=True)
    with torch.no_grad():
        close(attend(q, q, q, None, 0.0), kernels.attend(q, q, q, None, 0.0))
    assert targets.count(torch.nn.attention._sdpa_kernel) == 2
    targets.clear()
    attend(q.requires_grad_(), q, q, None, 0.0)
    assert targets and torch.nn.attention._sdpa_kernel not in targets


# ---------------------------------------------------------------------------------------------
# Masks


@pytest.fixture
def no_dense_mask(gpu, monkeypatch):
    """A mask of T x T is an error. Returns the stances of the compiler in which masks were made."""
    stances = []

    class Mask:     # quicker to trace than a BlockMask
        def __init__(self, mask_mod):
            self.mask_mod = mask_mod

    def refuse(T, doc, window, device):
        assert doc is None and not 0 < window < T
        return real_mask(T, doc, window, device)

    def make(sees, *sizes, device):
        if not torch.compiler.is_compiling():
            stances.append(torch._dynamo.eval_frame._stance.stance)
        return Mask(sees)

    real_mask = M.causal_mask
    monkeypatch.setattr(M, 'causal_mask', refuse)
    monkeypatch.setattr(kernels, 'create_block_mask', make)
    return stances


def whole(model):
    return torch.compile(model, backend='eager', dynamic=False)


def by_blocks(model):
    for block in model.h.values():
        block.compile(backend='eager', dynamic=False, fullgraph=True)
    return model


def recomputing(model):
    model.recompute = True
    return model


@pytest.mark.parametrize('form', [
    pytest.param(lambda m: m, id='eager'), pytest.param(recomputing, id='recompute'),
    pytest.param(by_blocks, id='blocks'),
    pytest.param(whole, id='whole', marks=pytest.mark.slow)])
@pytest.mark.parametrize('settings, doc', [
    ({}, DOC), (dict(LLAMA, n_kv_head=2, window=5), DOC), (dict(window=5), None)],
    ids=['packed', 'both', 'window'])
def test_no_dense_mask(request, monkeypatch, form, settings, doc):
    """However the model runs: the same loss and gradients as with SDPA, and as in evaluation."""
    model = tiny(head_dim=16, n_layer=1, **settings)
    idx, targets = tokens(2, 20), tokens(2, 20, seed=1)
    targets[DOC < 0] = -100
    model(idx, targets, doc=doc, reduction='sum').backward()
    want = model(idx, targets, doc=doc).detach(), gradients(model)
    stances = request.getfixturevalue('no_dense_mask')
    other = copy.deepcopy(model).train()
    other.zero_grad()
    form(other)(idx, targets, doc=doc, reduction='sum').backward()
    for name, grad in gradients(other).items():
        close(grad, want[1][name], atol=1e-4)
    with torch.no_grad(), parallel.looking_on(other):
        close(other(idx, targets, doc=doc), want[0])
    # Where all else is forced to run eagerly, this is compiled, once in each forward pass.
    assert set(stances) <= {'default'}
    assert stances
    torch.compiler.reset()


@pytest.mark.parametrize('stage', ['train', 'sft', 'unpacked', 'weighted', 'classify', 'dpo'])
def test_no_dense_mask_in_any_stage(no_dense_mask, run_train, run_stage, chats, preferences, texts,
                                    stage):
    settings = dict(max_steps=2, eval_interval=1)
    chat = dict(settings, dataset=str(chats), answers=0)
    run = {'train': lambda: run_train(**settings, pack_documents=True, window=8, n_embd=64),
           'sft': lambda: run_stage(finetune, **chat),
           'unpacked': lambda: run_stage(finetune, **chat, pack=False),
           'weighted': lambda: run_stage(finetune, **chat, prompt_loss_weight=0.5),
           'classify': lambda: run_stage(classify, **settings, dataset=str(texts)),
           'dpo': lambda: run_stage(dpo, **settings, dataset=str(preferences))}[stage]
    assert run()['step'] == 2
    assert len(no_dense_mask) >= 4      # two steps and two evaluations


def test_graphs_take_other_documents(gpu):
    """A BlockMask is an input of a block's graph: other documents do not compile it again."""
    model = by_blocks(tiny(head_dim=16, n_layer=1))
    model(tokens(2, 20), doc=DOC)
    with torch.compiler.set_stance('fail_on_recompile'):
        model(tokens(2, 20), doc=DOC.flip(0))
        model(tokens(2, 20), doc=(DOC + 1) // 2)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_flex_attention_is_compiled_where_all_is_eager(monkeypatch):
    """Really compiled, for a CPU: masks of other documents and lengths are right."""
    monkeypatch.setattr(kernels, 'GPU', 'cpu')
    monkeypatch.setattr(kernels, 'has_flex', lambda device, head_dim: True)
    stats = torch._dynamo.utils.counters['stats']
    generator = torch.Generator().manual_seed(0)
    with torch.compiler.set_stance('force_eager'):
        graphs = []
        for T, length in ((200, 70), (200, 30), (200, 199), (136, 50), (150, 20)):
            q, k, v = (torch.randn(2, n, T, 16, generator=generator) for n in (4, 2, 2))
            doc = torch.arange(T).div(length, rounding_mode='floor').repeat(2, 1)
            flex = kernels.flex_mask(T, doc, 0, torch.device('cpu'), 16)
            close(kernels.attend(q, k, v, flex, 0.0),
                  kernels.attend(q, k, v, M.causal_mask(T, doc, 0, 'cpu'), 0.0))
            graphs.append(stats['unique_graphs'])
    assert graphs[0] == graphs[1] == graphs[2] > 0      # documents are no reason to compile again
    torch.compiler.reset()


@pytest.mark.parametrize('head_dim, wrong, said', [
    (64, '', ''), (16, '', ''), (8, '', 'head_dim is below 16'),
    (64, 'RuntimeError: Failed to find C compiler', 'Failed to find C compiler')])
def test_where_there_is_no_flex_attention(capsys, monkeypatch, head_dim, wrong, said):
    """It is said once, and the mask is dense."""
    monkeypatch.setattr(hardware, 'no_compiler', lambda kind, name: wrong)
    hardware.warn_once.cache_clear()
    for _ in range(3):
        assert kernels.has_flex(torch.device('cuda', 0), head_dim) == (not said)
    err = capsys.readouterr().err
    assert err.count('warning: no flex-attention (') == bool(said) and said in err
    monkeypatch.setattr(kernels, 'GPU', 'cpu')
    if said:
        torch.compiler.assume_constant_result(kernels.has_flex)   # as where the compiler is tried
        model = tiny(head_dim=head_dim)
        want = model(tokens(2, 20), doc=DOC)
        close(torch.compile(model, backend='eager', fullgraph=True)(tokens(2, 20), doc=DOC), want)
        torch.compiler.reset()


# ---------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize('reduction', [
    'mean', *(pytest.param(name, marks=pytest.mark.slow) for name in ('sum', 'none'))])
@pytest.mark.parametrize('chunk, apart', [(7, True), (20, True), (40, False)])
def test_chunks_stay_out_of_graphs(monkeypatch, reduction, chunk, apart):
    """No graph has the logits or the head's gradient of a chunk; a single one is in the graph."""
    monkeypatch.setattr(kernels, 'CHUNK_ELEMENTS', 31 * chunk)
    compiled, sizes = [], []
    monkeypatch.setattr(kernels, 'compiled', lambda f: compiled.append(f) or f)

    def backend(graph, example):
        sizes.extend(tuple(node.meta['example_value'].shape) for node in graph.graph.nodes
                     if isinstance(node.meta.get('example_value'), torch.Tensor))
        return graph.forward

    model, results = tiny(tied=False), []
    idx, targets = tokens(2, 20), tokens(2, 20, seed=1)
    for run in (model, torch.compile(model, backend=backend)):
        model.zero_grad()
        loss = run(idx, targets, reduction=reduction)
        loss.sum().backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    logits = [size for size in sizes if size[-1:] == (31,) and size != (31, 16)]
    assert sizes and bool(logits) != apart
    # what is done with logits is compiled by itself, but only for a compiled model
    assert compiled == [kernels.loss_by_logits] * (apart and reduction != 'none')
    torch.compiler.reset()


@pytest.mark.slow
def test_loss_compiled_by_chunks(monkeypatch):
    """Really compiled: the same loss and gradients."""
    monkeypatch.setattr(kernels, 'CHUNK_ELEMENTS', 31 * 16)
    model, results = tiny(n_layer=1), []
    for in_graph in (False, True):
        model.zero_grad()
        x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        total = kernels.chunked_sum(x, model.lm_head.weight, tokens(40, 1)[:, 0], 16, in_graph)
        total.backward()
        results.append((total.detach(), x.grad, model.lm_head.weight.grad.clone()))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------
# Rows that fit


GB = 1 << 30
CUDA = Device('cpu', 'cuda', 'float32', False, 1e11, [])


def memory(monkeypatch, free: int, total: int) -> None:
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda name: (free, total))
    monkeypatch.setattr(hardware.os, 'sysconf',
                        {'SC_PAGE_SIZE': 4096, 'SC_PHYS_PAGES': total // 4096}.get)


@pytest.mark.parametrize('words, rows', [
    ([], 18), (['config/shakespeare.py'], 8), (['config/shakespeare_best.py'], 8),
    (['config/laptop.py'], 8)])
def test_rows_of_presets_on_a_cpu_stay(monkeypatch, words, rows):
    """With 24 GiB: as many as when weights and optimizer were not counted."""
    import plan
    preset = vars(plan.load_preset(words))
    config = M.GPTConfig(**{name: preset[name] for name in (
        'n_layer', 'n_head', 'n_embd', 'block_size')})
    model = build_model(config, None, 'meta')
    memory(monkeypatch, 0, 24 * GB)
    device = Device('cpu', 'cpu', 'float32', False, 1.0, [])
    args = device, preset['batch_size'], config.block_size, config.n_layer, config.n_embd
    assert fit_micro_batch(*args) == rows
    assert fit_micro_batch(*args, lasting=parallel.learning_bytes(model, Ranks())) == rows


def test_rows_beside_what_stays(monkeypatch):
    gpt2 = 1000, 1024, 12, 768
    row = 1024 * 12 * 768 * 40
    half = Device('cuda:0', 'cuda', 'bfloat16', False, 1.0, [])
    chunk = 12 << 27
    memory(monkeypatch, 80 * GB, 80 * GB)
    assert fit_micro_batch(half, *gpt2) == 32                       # 32,768 tokens
    for free in (8 * GB, 4 * GB):       # others have the rest
        memory(monkeypatch, free, 80 * GB)
        assert fit_micro_batch(half, *gpt2) == math.ceil(
            1000 / math.ceil(1000 / ((free - chunk) * 4 // 5 // row)))
    memory(monkeypatch, 8 * GB, 8 * GB)
    counts = [fit_micro_batch(half, *gpt2, lasting=n) for n in (0, GB, 4 * GB, 50 * GB)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1 and counts[2] < counts[0]
    tf32 = Device('cuda:0', 'cuda', 'tf32', False, 1.0, [])         # its tensors have 32 bits
    memory(monkeypatch, 12 * GB, 12 * GB)
    full = Device('cuda:0', 'cuda', 'float32', False, 1.0, [])
    assert fit_micro_batch(tf32, *gpt2) == fit_micro_batch(full, *gpt2) \
        < fit_micro_batch(half, *gpt2)
    # recomputed blocks keep their inputs: deeper models have fewer rows, which was not so
    deep = [fit_micro_batch(half, 1000, 4096, n, 4096, recompute=True) for n in (1, 16, 96)]
    assert deep[0] > deep[1] > deep[2] or deep[2] == 1
    assert fit_micro_batch(half, 1000, 4096, 32, 4096, recompute=True) > \
        fit_micro_batch(half, 1000, 4096, 32, 4096)


def test_bytes_that_stay():
    model = tiny()
    n = M.count_parameters(model)
    assert parallel.learning_bytes(model, Ranks()) == 12 * n
    assert parallel.learning_bytes(model, Ranks(zero=2, dp=2)) == 20 * n    # not sharded here
    assert parallel.learning_bytes(model, Ranks(zero=3, dp=2)) == 12 * n
    model.requires_grad_(False)
    assert parallel.learning_bytes(model, Ranks()) == 0
    model.ln_f.requires_grad_(True)
    assert parallel.learning_bytes(model, Ranks()) == 12 * 32


def learner_of(model, ranks=None) -> Learner:
    return Learner(model, model, optim.make_optimizers(model, 'adamw', 1e-3, 0.0, 0.9, 0.99),
                   optim.LossScale(False), CUDA, ranks or Ranks(), 1.0)


def batch_of(samples):
    x = tokens(len(samples), 20)
    return x, x.roll(-1, 1), None


@pytest.mark.parametrize('rows, fits, want', [(8, 8, 8), (8, 4, 4), (8, 3, 2), (7, 2, 2),
                                              (5, 1, 1), (1, 1, 1), (33, 5, 5)])
def test_rows_are_halved_until_they_fit(capsys, rows, fits, want):
    """A GPU that runs out of memory, in the forward or backward pass; nothing is left of it."""
    tried, model = [], tiny()

    def run(x, y, **options):
        tried.append(len(x))
        loss = model(x, y, **options)
        if tried[-1] > fits and len(tried) % 2:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
        if tried[-1] > fits:
            loss.register_hook(full)
        return loss

    def full(grad):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')

    before = copy.deepcopy(model.state_dict())
    learner = learner_of(model)
    learner.trained = run
    assert learner.fit_rows(train.train_step, batch_of, rows) == want == tried[-1]
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    said = capsys.readouterr().out.splitlines()
    assert said == [f'out of memory; tried again with {n} rows at a time' for n in tried[1:]]


def test_no_rows_fit(capsys):
    def step(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')

    message = stopped(capsys, lambda: learner_of(tiny()).fit_rows(step, batch_of, 1))
    for remedy in ('activation_checkpointing', 'block_size', 'zero', 'micro_batch_size'):
        assert remedy in message


@pytest.mark.parametrize('ranks', [Ranks(zero=2, world=2, dp=2), Ranks(tp=2, world=2),
                                   Ranks(pp=2, world=2)])
def test_ranks_that_share_a_model_do_not_try(capsys, ranks):
    """One that runs out of memory would leave the others waiting; the step before the first says
    what to do."""
    def refuse(*_):
        raise torch.OutOfMemoryError('CUDA out of memory')

    learner = learner_of(tiny(), ranks)
    assert learner.fit_rows(refuse, refuse, 8) == 8
    assert stopped(capsys, lambda: learner.warm_up(refuse, lambda step: [])) == learning.NO_MEMORY


def test_all_ranks_try_again(monkeypatch, capsys):
    """With DDP one rank's lack of memory is everybody's, and no pass exchanges gradients."""
    answers, entered = iter([True, False]), []
    monkeypatch.setattr(processes, 'any_rank', lambda full: next(answers))
    accumulate = parallel.accumulate

    def noted(trained, ranks, last):
        entered.append(last)
        return accumulate(trained, ranks, last)

    monkeypatch.setattr(parallel, 'accumulate', noted)
    learner = learner_of(tiny(), Ranks(world=2, dp=2))
    assert learner.fit_rows(train.train_step, batch_of, 8) == 4
    assert entered == [False, False]


def test_a_cpu_tries_nothing():
    learner = learner_of(tiny())
    learner.device = Device('cpu', 'cpu', 'float32', False, 1.0, [])
    assert learner.fit_rows(None, None, 8) == 8


@pytest.mark.parametrize('stage', ['train', 'sft', 'dpo'])
def test_a_run_with_the_rows_that_fit(run_train, run_stage, chats, preferences, monkeypatch, stage):
    """Its losses are those of a run that was given them."""
    settings = dict(batch_size=6, max_steps=2, eval_interval=2)
    run = {'train': lambda **more: run_train(**settings, **more),
           'sft': lambda **more: run_stage(finetune, **settings, dataset=str(chats), answers=0,
                                           **more),
           'dpo': lambda **more: run_stage(dpo, **settings, dataset=str(preferences),
                                           **more)}[stage]
    given = run(micro_batch_size=2, out_dir='out/given')
    found = []
    monkeypatch.setattr(Learner, 'fit_rows', lambda self, step_on, batch_of, rows: (
        found.append((rows, batch_of(range(rows)))), 2)[1])
    tried = run(micro_batch_size=0, out_dir='out/tried')
    assert found and found[0][0] > 2
    logs = [[(e['step'], e.get('train_loss'), e.get('val_loss')) for kind in ('step', 'eval')
             for e in read_log(Path(result['run_dir']), kind)] for result in (given, tried)]
    assert logs[0] == logs[1] and logs[0]
    start, = read_log(Path(tried['run_dir']), 'start')
    assert start['micro_batch_size'] == 2
