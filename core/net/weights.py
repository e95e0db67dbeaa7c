"""The weights of a model: building it, memory for them, sharing, copying and adapting them."""
import contextlib
import math
import zlib

import torch
import torch.nn as nn

import model as model_module
from core.device import freed_at_once
from core.net.kernels import Linear
from core.net.lstm import LSTM
from core.settings import stop
from model import GPT, GPTConfig, init_weights

Model = GPT | LSTM


def build_model(config: GPTConfig, seed: int | None = 0, device='cpu') -> Model:
    """A model with initialized fp32 weights on `device`; the same weights for the same seed. With
    seed None, for loading others, weights that init_weights would fill have any values; on the
    device 'meta' they have no memory."""
    model = construct(config, seed or 0)
    if device != 'meta':
        allocate(model, device)
        if seed is not None:
            init_weights(model, seed)
    return model


def construct(config: GPTConfig, seed: int, real=()) -> Model:
    """A model on the device 'meta'. It remembers by name, in

    own      what its constructors set and init_weights has no rule for: buffers, and parameters
             that are not just as torch's own layers make them; with their values
    shared   the first name of a parameter that has several
    saved    what a checkpoint holds: the parameters, and the persistent buffers

    Constructors run on the CPU; their random numbers depend on the seed only. Parameters of torch's
    layers get no memory at first. If a constructor changes some, the model is constructed again,
    with memory for the parameters whose numbers, in the order of registration, are in `real`.
    """
    made = {}

    def register(layer, name, p):
        if id(p) not in made and is_torchs(layer) and len(made) not in real:
            p = nn.Parameter(torch.empty_like(p, device='meta'), p.requires_grad)
        return made.setdefault(id(p), p)

    with freed_at_once(), torch.random.fork_rng(devices=[]), torch.device('cpu'), quick_init(), \
            nn.modules.module.register_module_parameter_registration_hook(register):
        torch.default_generator.manual_seed(seed)
        model = LSTM(config) if config.arch == 'lstm' else model_module.GPT(config)
    first = {}
    shared = {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)
              if first.setdefault(p, name) != name}
    own = {name: t for name, t in (*model.named_parameters(), *model.named_buffers())
           if not has_rule(model.get_submodule(name.rpartition('.')[0]), name, t)}
    vars(model).update(own=own, shared=shared, saved=set(model.state_dict()))
    if any(t.is_meta for t in own.values()):
        # parameters that are no longer there are needed, too: others may derive from them
        ruled = {id(p) for name, p in model.named_parameters() if name not in own}
        needed = {i for i, p in enumerate(made) if p not in ruled}
        return construct(config, seed, needed if needed - {*real} else range(len(made)))
    model.to('meta')
    tie(model)
    return model


@contextlib.contextmanager
def quick_init():
    """nn.init.normal_ on 'meta', of an embedding, would import torch's compiler: a second."""
    normal = nn.init.normal_
    nn.init.normal_ = lambda tensor, *args, **options: tensor.detach().zero_() \
        if tensor.is_meta else normal(tensor, *args, **options)
    try:
        yield
    finally:
        nn.init.normal_ = normal


def is_torchs(layer) -> bool:
    """Whether torch's constructor alone makes a layer, of a kind that init_weights knows."""
    return any(type(layer).__init__ is known.__init__
               and type(layer).reset_parameters is known.reset_parameters
               for known in (Linear, nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm, nn.LSTM))


def has_rule(layer: nn.Module, name: str, t: torch.Tensor) -> bool:
    """Whether init_weights fills a tensor of a newly made layer. One that was changed after torch
    made it, as its version says, stays as it is."""
    return isinstance(t, nn.Parameter) and is_torchs(layer) and t._version == 1 and (
        name in ('wte.weight', 'wpe.weight') or not isinstance(layer, nn.Embedding))


@torch.no_grad()
def allocate(model, device, put=torch.Tensor.copy_) -> None:
    """Give a model memory on `device`, with its constructors' own values, else without any; shared
    parameters share theirs. put(tensor, values) fills one that may be here in part only."""
    # Module.to_empty(), whose torch.empty_like() imports sympy for whole tensors: half a second
    model._apply(lambda t: torch.empty_like(t, device=device) if hasattr(t, 'placements')
                 else torch.empty(t.shape, dtype=t.dtype, device=device))
    tie(model)
    for name, t in (*model.named_buffers(), *named_weights(model).items()):
        if name in model.own:
            put(t, model.own[name])
    model.own = dict.fromkeys(model.own)    # the names stay


def tie(model) -> None:
    """Share parameters again, such as the matrix of embedding and head, after some were replaced.
    """
    for name, first in model.shared.items():
        owner, _, key = name.rpartition('.')
        with contextlib.suppress(AttributeError):   # one of them is in another pipeline stage
            setattr(model.get_submodule(owner), key, model.get_parameter(first))


def named_weights(model) -> dict[str, torch.Tensor]:
    """The parameters by name, shared ones once, and the persistent buffers. A tied head is
    'wte.weight', also on a pipeline stage that has only the head."""
    found = dict(model.named_parameters())
    if model.config.tied and 'lm_head.weight' in found:
        found['wte.weight'] = found.pop('lm_head.weight')
    return found | {name: b for name, b in model.named_buffers() if name in model.saved}


@torch.no_grad()
def copy_weights(source: Model, target: Model, put=torch.Tensor.copy_) -> None:
    """Fill a model with the weights of another that may know fewer tokens, or more positions, or
    have another kind of head, which is then 0. put(p, values) fills a parameter.

    The rows of new tokens are the mean of the others, so that they are no more probable than these:
    the logit of a row of zeros would be 0, where GPT-2's are around -100. A buffer of another shape
    stays; stops at any other parameter of another shape.
    """
    known = named_weights(source)
    new_head = target.config.n_classes != source.config.n_classes
    for name, p in named_weights(target).items():
        if name.startswith('lm_head.') and new_head:
            p.zero_()
            continue
        old = known[name].to(p.device)
        if old.shape == p.shape:
            put(p, old)
        elif name in ('wte.weight', 'wpe.weight', 'lm_head.weight'):
            new = old.mean(dim=0).expand(max(0, len(p) - len(old)), *old.shape[1:])
            put(p, torch.cat([old[:len(p)], new]))
        elif isinstance(p, nn.Parameter):
            stop(f'{name}: has shape {tuple(old.shape)} in the model to begin with and '
                 f'{tuple(p.shape)} here; take the same block_size and vocabulary, or say in '
                 'copy_weights, in core/net/weights.py, how it is to change')


@torch.no_grad()
def spread_new_rows(model: nn.Module, known: int, seed: int) -> None:
    """Make the rows of tokens from number `known` on like the others: their mean, with noise of
    their deviation. Equal rows would stay equal where embeddings are frozen."""
    for name, p in named_weights(model).items():
        if name in ('wte.weight', 'lm_head.weight') and len(p) > known:
            generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {name} new'.encode()))
            noise = torch.randn(len(p) - known, p.size(1), generator=generator)
            p[known:] = p[:known].mean(dim=0) + noise.to(p.device) * p[:known].std(dim=0)


def padded(n_tokens: int, known: int = 0) -> int:
    """A vocabulary size for so many tokens: a multiple of 64 where it is large, as GPUs like it."""
    return n_tokens if n_tokens < 1000 or n_tokens <= known else math.ceil(n_tokens / 64) * 64
