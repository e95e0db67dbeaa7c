"""Edits of model.py that users make: each is what stands in model.py instead of the classes there.

`of(name)` gives {class name: class} for monkeypatch; 'all' are most of them in one model.
"""
import torch
import torch.nn.functional as F
from torch import nn

import model as M


class WithValues(M.Attention):
    """ALiBi's slopes, a learned temperature, random features, a mask, a table, a zeroed gate."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('slopes', 2.0 ** -torch.arange(1, config.n_head + 1))
        self.register_buffer('order', torch.arange(config.block_size))
        self.register_buffer('future', torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer('frequencies', torch.polar(torch.ones(3), torch.arange(3.0)),
                             persistent=False)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.features = nn.Parameter(torch.randn(config.n_embd), requires_grad=False)
        self.gains = nn.Parameter(torch.full((1, config.n_head, 1, 1), 0.9))
        self.table = nn.Embedding(2, config.n_embd)
        self.gate = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 3.0)
        self.rate = torch.linspace(0, 0.1, 3).tolist()[1]

    def forward(self, x, *rest):
        y = super().forward(x + self.table(self.order[:x.size(1)] % 2), *rest)
        bias = self.slopes.mean() + self.features * self.frequencies.real.mean()
        return y * self.temperature * self.gains.mean() * self.gate(x).sigmoid() + bias


class WithScale(M.Block):
    """Layer scale, a convolution, a list of parameters, a norm with a running mean."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.full((config.n_embd,), 0.1))
        self.conv = nn.Conv1d(config.n_embd, config.n_embd, 3, groups=config.n_embd)
        self.mix = nn.ParameterList([torch.tensor(0.7), torch.tensor([0.3])])
        self.extra = nn.LayerNorm(config.n_embd)

    def forward(self, x, *rest):
        past = self.conv(F.pad(x.mT, (2, 0))).mT
        return super().forward(x, *rest) * self.mix[0] + self.mix[1] * self.extra(
            past * self.scale + x)


class WithRegisters(M.GPT):
    """Parameters beside the blocks, one of them random, and two blocks that share their MLP."""

    def __init__(self, config):
        super().__init__(config)
        self.registers = nn.Parameter(torch.randn(4, config.n_embd) * 0.02)
        self.lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.h['1'].mlp = self.h['0'].mlp

    def embed(self, idx, position):
        return super().embed(idx, position) * self.lambdas.mean() + self.registers.mean(0)


class Shared:
    v = None


class ValueResidual(M.Attention):
    """The values of the first block go into those of all others (Zhou et al. 2024)."""

    def __init__(self, config):
        super().__init__(config)
        self.v_proj.register_forward_hook(self.mixed)

    def forward(self, x, rope=None, mask=None, cache=None, layer=0):
        self.first = layer == 0
        return super().forward(x, rope, mask, cache, layer)

    def mixed(self, module, args, v):
        if self.first:
            Shared.v = v
            return v
        return v if Shared.v is None else 0.5 * v + 0.5 * Shared.v


class ResidualArgument(M.Block):
    """The same, handed on as an argument of the blocks."""

    def __init__(self, config):
        super().__init__(config)
        self.blend = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, rope=None, mask=None, cache=None, layer=0, first=None):
        x = super().forward(x, rope, mask, cache, layer)
        return x if first is None else x + self.blend * first


class PassesOn(M.GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.h.values():
            block.register_forward_pre_hook(self.hand, with_kwargs=True)

    def hand(self, block, args, kwargs):
        if args[4] == 0:
            self.first = args[0]
        return args, {**kwargs, 'first': self.first}


class LayerScale(M.Block):
    """A gain for each channel, and one number, of each block's output."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.full((config.n_embd,), 0.5))
        self.number = nn.Parameter(torch.tensor(0.9))

    def forward(self, x, *rest):
        return x + self.scale * self.number * super().forward(x, *rest)


class HeadGates(M.Attention):
    """A number for each head."""

    def __init__(self, config):
        super().__init__(config)
        self.gates = nn.Parameter(torch.ones(config.n_head))
        self.o_proj.register_forward_pre_hook(
            lambda module, args: (args[0].unflatten(2, (-1, self.head_dim))
                                  * self.gates[:, None]).flatten(2))


class Temperature(M.Attention):
    """A learned factor of the queries, of which each rank of tp has some heads only."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.q_proj.register_forward_hook(lambda module, args, q: q * self.temperature)


EDITS = {
    'values': {'Attention': WithValues},
    'all': {'Attention': WithValues, 'Block': WithScale, 'GPT': WithRegisters},
    'value residual': {'Attention': ValueResidual},
    'residual argument': {'Block': ResidualArgument, 'GPT': PassesOn},
    'layer scale': {'Block': LayerScale},
    'head gates': {'Attention': HeadGates},
    'temperature': {'Attention': Temperature},
    'none': {}}
