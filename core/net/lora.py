"""Low-rank adapters (Hu et al. 2021, "LoRA"): a frozen matrix W learns as W + alpha / r * B A.

`add` gives chosen linear layers two small matrices, lora_A (r, in) and lora_B (out, r), and freezes
all else; `merged` gives the weights of the same model without adapters, which every later stage can
read; core/formats/peft.py writes the adapters alone. The names of the layers stay.
"""
import contextlib
import math
import zlib

import torch
import torch.nn.functional as F
from torch import nn

from core.net.kernels import Linear
from core.net.weights import named_weights
from core.settings import stop

TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


class LoRALinear(nn.Linear):
    """A linear layer with an adapter, which shares the parameters of the layer that it replaces:
    y = x W^T + b + alpha / r * drop(x) A^T B^T (section 4.1). B is 0, so at first nothing changes.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, 'meta')
        self.weight, self.bias = layer.weight, layer.bias
        self.scale, self.on = alpha / rank, True
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        device = layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.on:
            y = y + self.scale * F.linear(F.linear(self.drop(x), self.lora_A), self.lora_B)
        return y

    def merged(self) -> torch.Tensor:
        """W + alpha / r * B A."""
        return self.weight + self.scale * (self.lora_B @ self.lora_A)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def add(model: nn.Module, rank: int, alpha: float, targets: str, dropout: float, seed: int) -> None:
    """Give the layers in `targets` (names of TARGETS with commas; '': all) adapters, and freeze all
    else. A is uniform with bound 1 / sqrt(in), as in PEFT; its numbers depend on (seed, name) only.
    Stops at a name that no layer has."""
    model.requires_grad_(False)
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name.rpartition('.')[2] in TARGETS}
    known = list(dict.fromkeys(name.rpartition('.')[2] for name in layers))
    wanted = targets.split(',') if targets else known
    for name in wanted or [targets]:
        if name not in known:
            stop(f'lora_targets={targets}: this model has ' + (
                f'no layers {name!r}, only {", ".join(known)}' if known else
                'no layers that can have adapters; leave out lora_rank'))
    for name, layer in layers.items():
        parent, _, last = name.rpartition('.')
        if last not in wanted:
            continue
        if type(layer) not in (nn.Linear, Linear):
            stop(f'lora_targets={targets}: {name} is a {type(layer).__name__}, which computes '
                 'something else than a linear layer; only such ones can have adapters')
        new = LoRALinear(layer, rank, alpha, dropout).train(layer.training)
        generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {name}.lora_A'.encode()))
        bound = 1 / math.sqrt(layer.in_features)
        start = torch.empty(new.lora_A.shape).uniform_(-bound, bound, generator=generator)
        new.lora_A.data.copy_(start)
        setattr(model.get_submodule(parent), last, new)


@contextlib.contextmanager
def off(model: nn.Module):
    """Within this context, a model computes as it did before it had adapters."""
    layers = adapters(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def learnt(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that learn in a model with adapters, by name: these, and a new head. Without
    adapters none."""
    return {name: p.detach() for name, p in named_weights(model).items()
            if p.requires_grad} if adapters(model) else {}


@torch.no_grad()
def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name, with the adapters merged into them."""
    layers = adapters(model)
    weights = {name: p.detach() for name, p in named_weights(model).items()
               if not name.endswith(('lora_A', 'lora_B'))}
    return weights | {f'{name}.weight': layer.merged() for name, layer in layers.items()}


def freeze(model, layers: str) -> None:
    """Let only a part of the model learn: 'all'; 'head', with the final norm; or, as a number, the
    last blocks with both. Stops if there are fewer blocks."""
    if layers == 'all':
        return
    n_layer, last = model.config.n_layer, 0 if layers == 'head' else int(layers)
    if last > n_layer:
        stop(f'layers={layers}: the model has only {n_layer}')
    blocks = [model.h[str(i)] for i in range(n_layer - last, n_layer)]
    learns = {p for m in (*blocks, model.ln_f, model.lm_head) for p in m.parameters()}
    for p in set(model.parameters()) - learns:
        p.requires_grad_(False)
