"""How a model lies on the processes: pipeline stages, tensor parallelism, ZeRO, DDP.

`place` lays a plain model on the mesh pp x replicas x shards x tp, always in this order: cut into
pipeline stages, tensor parallelism inside the blocks, sharding of parameters (FSDP2, which is
ZeRO). Then it gets memory and values; then come compilation and DDP. All of it also runs on CPUs.

torch.distributed's DTensor and FSDP take a second to import, so they are imported where they are
needed, and a tensor that lies on several ranks is known by its `placements`.
"""
import contextlib
import copy
import functools
import math

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from core import device as hardware
from core.device import compile_options
from core.net import optim
from core.net.draw import NotFinite
from core.net.weights import tie
from core.ranks import processes
from core.ranks.processes import Ranks
from core.settings import stop


def check_model(ranks: Ranks, config) -> None:
    """Stop if a model of this GPTConfig cannot be laid on the ranks."""
    if config.arch != 'gpt' and not ranks.plain:
        stop(f'arch={config.arch}: can only be copied to all ranks; leave out tp, pp and zero')
    for name in ('n_head', 'n_kv_head', 'n_hidden'):
        if getattr(config, name) % ranks.tp:
            stop(f'tp={ranks.tp}: must divide {name}={getattr(config, name)}')
    if ranks.sequence_parallel and config.block_size % ranks.tp:
        stop(f'tp={ranks.tp}: must divide block_size={config.block_size} for sequence_parallel')
    if ranks.n_stages > config.n_layer:
        stop(f'pp={ranks.pp}: {ranks.n_stages} stages, but the model has only '
             f'n_layer={config.n_layer}')


# ---------------------------------------------------------------------------------------------
# Laying a model on the mesh


def place(model, ranks: Ranks) -> None:
    """Leave of a model on the meta device what this rank is to hold, as plain tensors or DTensors.
    Then weights.allocate gives it memory, and `put` its values."""
    if ranks.pp > 1:
        keep_stages(model, ranks.stages, ranks)
    model.parts = stage_modules(model, ranks)   # a list: no submodules
    if ranks.tp > 1:
        cut_matrices(model, ranks)
    if ranks.zero:
        for part in model.parts:
            shard(part, ranks)


def keep_stages(model, stages: list[int], ranks: Ranks) -> None:
    """Drop what belongs to other pipeline stages. Names stay as they are."""
    n, n_layer = ranks.n_stages, model.config.n_layer
    kept = {i for stage in stages for i in range(stage * n_layer // n, (stage + 1) * n_layer // n)}
    model.h = torch.nn.ModuleDict({i: block for i, block in model.h.items() if int(i) in kept})
    if 0 not in stages:
        model.wte = model.wpe = None
    if n - 1 not in stages:
        model.ln_f = model.lm_head = None


def stage_modules(model, ranks: Ranks) -> list:
    """The parts of this rank's model that run as one: itself, or several views of its layers."""
    if len(ranks.stages) == 1:
        return [model]
    parts = []
    for stage in ranks.stages:
        part = copy.copy(model)
        # its own lists of submodules and of hooks
        part.__dict__ |= {k: v.copy() for k, v in model.__dict__.items() if isinstance(v, dict)}
        keep_stages(part, [stage], ranks)
        parts.append(part)
    return parts


def cut_matrices(model, ranks: Ranks) -> None:
    """Tensor parallelism (Shoeybi et al. 2019): q, k, v, gate and up are cut by rows of their
    weights, so that each rank has some heads and hidden channels, o and down by columns; embedding
    and head by tokens of the vocabulary. With sequence_parallel (Korthikanti et al. 2022) norms and
    residual stream are cut by positions inside the blocks of a stage."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
    mesh, whole = ranks.mesh['tp'], Replicate()
    cut = Shard(1) if ranks.sequence_parallel else whole
    rest = (None, None, None, None)     # of a block's and an attention's arguments after x
    plan = {
        'attn': PrepareModuleInput(input_layouts=(cut, *rest),
                                   desired_input_layouts=(whole, *rest)),
        'attn.q_proj': ColwiseParallel(), 'attn.k_proj': ColwiseParallel(),
        'attn.v_proj': ColwiseParallel(), 'attn.o_proj': RowwiseParallel(output_layouts=cut),
        'mlp': PrepareModuleInput(input_layouts=cut, desired_input_layouts=whole),
        'mlp.up_proj': ColwiseParallel(), 'mlp.down_proj': RowwiseParallel(output_layouts=cut)}
    if model.config.mlp == 'swiglu':
        plan['mlp.gate_proj'] = ColwiseParallel()
    if model.config.qk_norm:    # each rank sees some heads only: its gradient is a part of a sum
        heads = {'sequence_dim': 2, 'use_local_output': True}
        plan |= {'attn.q_norm': SequenceParallel(**heads), 'attn.k_norm': SequenceParallel(**heads)}
    if ranks.sequence_parallel:
        plan |= {'ln_1': SequenceParallel(), 'ln_2': SequenceParallel()}
    for block in model.h.values():
        parallelize_module(block, mesh, plan)
    if model.wte is not None:
        parallelize_module(model.wte, mesh, RowwiseParallel(input_layouts=whole,
                                                            output_layouts=whole))
        # its output is still under way: a compiled block that gets it as it is has wrong gradients
        model.wte.register_forward_hook(lambda module, args, x: x.clone())
    if model.lm_head is not None:
        parallelize_module(model.lm_head, mesh, ColwiseParallel(
            input_layouts=whole, output_layouts=Shard(-1), use_local_output=False))
        model.parts[-1].register_forward_hook(lambda module, args, y: gathered(y))
    tie(model)
    for part in model.parts if ranks.sequence_parallel else ():
        first, *_, last = [*part.h.values()] * 2
        parallelize_module(first, mesh, PrepareModuleInput(
            input_layouts=(whole, *rest), desired_input_layouts=(cut, *rest),
            use_local_output=True))
        parallelize_module(last, mesh, PrepareModuleOutput(
            output_layouts=cut, desired_output_layouts=whole))


def shard(part, ranks: Ranks) -> None:
    """FSDP2 around a stage and each of its blocks. ZeRO-2 gathers the parameters once a step and
    scatters the gradients once; ZeRO-3 gathers and frees the parameters of each block in each pass.
    In a pipeline both keep them whole during a step."""
    from torch.distributed.fsdp import fully_shard
    mesh = ranks.mesh['replicas', 'shards'] if ranks.replicas > 1 else ranks.mesh['shards']
    scalars = {p for p in part.parameters() if p.ndim == 0}     # each rank keeps them whole
    for block in part.h.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=ranks.zero == 3, ignored_params=scalars)
    fully_shard(part, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)


def wrap(model, ranks: Ranks, device, per_rank: int = 1, rows: int = 1) -> tuple:
    """(what to call for a loss, the number of which the number of micro-batches must be a
    multiple). It is the model, compiled if so chosen, in DDP if each rank has a copy; or the
    Pipeline of such stages, for micro-batches of `rows` of the per_rank sequences.
    """
    if device.compile:
        # A graph computes norms and activations again in the backward pass, as eager code does (see
        # kernels.recomputed), but not in small models, which would lose 3% of their speed.
        from torch._functorch import config
        config.ban_recompute_materialized_backward = model.config.n_embd < 512
    # On a CPU a model compiled whole is at most 5% faster than its blocks, and takes half a minute.
    # Tensor parallelism passes a mesh to operators, which C++ wrappers cannot.
    options = compile_options(device.kind) if ranks.tp == 1 else {}
    if device.compile and ranks.plain and (device.kind != 'cpu' or model.config.arch == 'lstm'):
        model = torch.compile(model, dynamic=False, options=options)
    elif device.compile:
        for block in model.h.values():
            block.compile(dynamic=False, options=options)
    parts = model.parts if ranks.pp > 1 else [model]
    if ranks.dp > 1 and not ranks.zero:
        ids = [device.name] if device.kind == 'cuda' else None
        parts = [DistributedDataParallel(part, ids, gradient_as_bucket_view=True,
                                         process_group=ranks.mesh['replicas'].get_group())
                 for part in parts]
    if ranks.pp == 1:
        return parts[0], 1
    from core.ranks import pipeline
    n_micro = pipeline.fitting(math.ceil(per_rank / rows), ranks)
    return pipeline.Pipeline(parts, ranks, device, n_micro, rows, passes), n_micro


def passes(ranks: Ranks):
    """The context of forward and backward passes: losses are taken of cut logits."""
    if ranks.tp == 1:
        return contextlib.nullcontext()
    from torch.distributed.tensor.parallel import loss_parallel
    return loss_parallel()


@contextlib.contextmanager
def accumulate(model, ranks: Ranks, last: bool):
    """The context of a micro-batch's passes: but for ZeRO-3 only the last exchanges gradients."""
    if ranks.zero == 2:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    elif ranks.zero:
        model.set_requires_all_reduce(last)
    quiet = isinstance(model, DistributedDataParallel) and not last
    with passes(ranks), model.no_sync() if quiet else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def looking_on(model):
    """The context of evaluation and samples. They run eagerly, since each new length would be
    compiled anew. Parameters that FSDP gathered for them are sharded again at the end."""
    model.eval()
    try:
        with torch.compiler.set_stance('force_eager'):
            yield
    except NotFinite as e:
        stop(f'{e}; begin again with a lower learning rate')
    finally:
        model.train()
        for module in model.modules():
            if hasattr(module, 'reshard'):
                module.reshard()


# ---------------------------------------------------------------------------------------------
# Parameters and gradients that lie on several ranks


def learning_bytes(model, ranks: Ranks) -> int:
    """Bytes of this rank's gradients and of AdamW's moments. During a step, ZeRO-2 also has whole
    weights and gradients."""
    return sum(12 * local(p).numel() + (8 * p.numel() // ranks.tp if ranks.zero == 2 else 0)
               for p in model.parameters() if p.requires_grad)


def rows_at_once(model, ranks: Ranks, device, batch_size: int, block_size: int, wanted: int,
                 *, per_sample: int = 1) -> int:
    """Samples in a forward pass, the same on all ranks: `wanted`, or if that is 0 as many as memory
    allows. A sample is per_sample rows of block_size tokens; a pipeline takes pp or more at once.
    """
    per_rank, config = math.ceil(batch_size / ranks.dp / ranks.pp), model.config
    rows = min(wanted, per_rank) or max(1, hardware.fit_micro_batch(
        device, per_sample * per_rank, block_size, config.n_layer, config.n_embd,
        local_world=ranks.local_world, lasting=learning_bytes(model, ranks),
        recompute=model.recompute) // per_sample)
    return min(processes.exchange(rows))    # machines may have more memory or less


def is_cut(x) -> bool:
    """Whether a tensor lies on several ranks, as a DTensor."""
    return hasattr(x, 'placements')


def gathered(x):
    """A DTensor's whole values; anything else as it is."""
    return x.full_tensor() if is_cut(x) else x


def local(x) -> torch.Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return x.to_local() if is_cut(x) else x


@torch.no_grad()
def put(target, values: torch.Tensor) -> None:
    """Fill a tensor, or the part of it on this rank, from its whole values."""
    if is_cut(target):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
        shape, offset = compute_local_shape_and_global_offset(
            target.shape, target.device_mesh, target.placements)
        values = values[tuple(slice(o, o + n) for o, n in zip(offset, shape))]
    local(target).copy_(values)


def complete_gradients(model, ranks: Ranks) -> None:
    """Add up the gradients that torch leaves in parts: of norms over heads or positions, of scalars
    (not sharded), and of the matrix that the first and the last stage share."""
    for p in model.parameters():
        if ranks.zero and p.ndim == 0 and p.grad is not None:
            for name in ('replicas', 'shards'):
                dist.all_reduce(p.grad, group=ranks.mesh[name].get_group())
            p.grad /= ranks.dp      # a mean, as FSDP gives it
        if is_cut(p.grad) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
    if ranks.pp > 1 and model.config.tied and ranks.pp_rank in (0, ranks.pp - 1):
        matrix = model.wte if model.wte is not None else model.lm_head
        dist.all_reduce(local(matrix.weight.grad), group=processes.tied_group)


def local_gradients(model, ranks: Ranks) -> dict[float, list]:
    """What this rank holds of the gradients, by the number of ranks that hold the same; under
    math.inf that of the tied matrix on the last stage, for the first stage counts it."""
    tied_again = model.config.tied and model.wte is None and model.lm_head is not None
    shared, found = model.lm_head.weight if tied_again else None, {}
    for p in model.parameters():
        if p.grad is not None:
            shards = math.prod(p.device_mesh.size(i) for i, where in enumerate(p.placements)
                               if not where.is_replicate()) if is_cut(p) else 1
            copies = math.inf if p is shared else ranks.dp * ranks.tp // shards
            found.setdefault(copies, []).append(local(p.grad))
    return found


def squared_norm(gradients: dict, dtype: torch.dtype) -> torch.Tensor:
    """This rank's share of the squared norm of all gradients, from `local_gradients`: a gradient
    that n ranks hold counts 1/n on each, so that the sum over all ranks is the whole."""
    return torch.stack([torch.nn.utils.get_total_norm(grads).to(dtype) ** 2 / copies
                        for copies, grads in gradients.items() if copies < math.inf]).sum()


def spreader(ranks: Ranks):
    """The `spread` of core.net.optim.Muon: several ranks share its work."""
    alone = ranks.tp == ranks.dp == 1 and not ranks.zero
    return optim.on_stack if alone else functools.partial(spread, ranks)


def spread(ranks: Ranks, iterate, matrices: list, dtype) -> list:
    """iterate(stack of matrices, in dtype), where each rank has some whole matrices in its stack.
    They have one shape and lie on the mesh in one way, as parts or copies: an all-to-all deals them
    out, another one (with copies an all-gather) brings the results back."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    first, stack = matrices[0], torch.stack([local(m) for m in matrices]).to(dtype)
    if is_cut(first):
        mesh, placements = first.device_mesh, [behind_stack(p) for p in first.placements]
    else:
        mesh, placements = ranks.mesh['replicas'], [Replicate()]
    size = torch.Size([len(stack), *first.shape])
    shape = {'run_check': False, 'shape': size, 'stride': first.new_empty(
        size, device='meta').stride()}
    dealt = DTensor.from_local(stack, mesh, placements, **shape).redistribute(
        placements=[Shard(0)] * mesh.ndim)
    done = DTensor.from_local(iterate(dealt.to_local()), mesh, dealt.placements, **shape)
    parts = done.redistribute(placements=placements).to_local().to(first.dtype).unbind()
    if not is_cut(first):
        return [*parts]
    return [DTensor.from_local(part, mesh, first.placements, run_check=False, shape=first.shape,
                               stride=first.stride()) for part in parts]


def behind_stack(placement):
    """How a stack of matrices lies where each matrix lies like that: dimension 0 comes before."""
    if placement.is_replicate():
        return placement
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard
    if isinstance(placement, Shard):
        return Shard(placement.dim + 1)
    return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
