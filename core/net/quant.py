"""Weight-only quantization: matrices as small integers with scales, for models that only write.

    int8    w = scale q, one scale for each output channel, q from -127 to 127
    int4    w = scale (q - 8) + zero for each 32 weights of a row, q from 0 to 15

Integers are rounded to nearest (Jacob et al. 2018, section 2.1; no calibration), scales are
bfloat16. `quantize` replaces linear layers and a tied embedding; norms, positions and biases stay.
"""
import torch
import torch.nn.functional as F
from torch import nn

from core.device import fast_bfloat16, main_memory
from core.net.weights import Model
from core.settings import stop
from model import count_parameters

KINDS = ('int8', 'int4')
GROUP = 32          # weights of a row that share a scale in int4
FEW_ROWS = {'int8': 64, 'int4': 128}    # up to so many, dequantizing costs more than it saves
WIDE_ROWS = {torch.bfloat16: 6, torch.float32: 24}      # from more on, floats are faster


class QuantLinear(nn.Module):
    """x W^T + b, where W (O, I) is what `dequantized` gives, however many rows x has.

    On a CPU, x and y are rounded to bfloat16, as torch's kernels for integers want it; a few rows
    take these. `wide` is a dtype in which int8 is kept, too, for more rows: it holds it exactly.
    """
    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor          # int4 only, as `scales`
    packed: torch.Tensor        # the integers once more, as torch's kernel wants them
    scales: torch.Tensor
    bias: torch.Tensor | None
    wide: torch.Tensor | None

    def __init__(self, layer: nn.Linear, kind: str, wide: torch.dtype | None = None):
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = layer.weight.shape
        q, scale, zero = (to_int8 if kind == 'int8' else to_int4)(layer.weight.detach().float())
        bias = None if layer.bias is None else layer.bias.bfloat16()
        for name, t in dict(q=q, scale=scale, zero=zero, bias=bias, packed=None, scales=None,
                            wide=q.to(wide) if wide else None).items():
            self.register_buffer(name, t)
        if kind == 'int8':      # torch's kernel reads sixteens, also beyond the end of a row
            self.packed = F.pad(q, (0, -self.in_features % 16))
            self.q = self.packed[:, :self.in_features]
        elif q.device.type == 'cpu':
            pad = (0, 0, 0, -len(q) % 16)       # it takes rows in sixteens
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                F.pad(nibbles(q).flatten(1), pad).int(), 1)
            self.scales = F.pad(torch.stack([scale, self.zero]), pad).permute(2, 1, 0).contiguous()

    def forward(self, x):
        """x (.., I) to y (.., O)."""
        if x.device.type != 'cpu':
            bias = None if self.bias is None else self.bias.type_as(x)
            return F.linear(x, self.dequantized().type_as(x), bias)
        flat = x.reshape(-1, self.in_features).bfloat16()
        if self.wide is not None and len(flat) > WIDE_ROWS[self.wide.dtype]:
            y = F.linear(flat.type_as(self.wide), self.wide) * self.scale
        elif len(flat) > FEW_ROWS[self.kind]:
            y = F.linear(flat.float(), self.dequantized()).bfloat16()
        elif self.kind == 'int8':
            flat = F.pad(flat, (0, more)) if (more := -self.in_features % 16) else flat
            y = torch.ops.aten._weight_int8pack_mm(flat, self.packed, self.scale)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, self.scales)
            y = y if len(self.packed) == self.out_features else y[:, :self.out_features]
        y = (y if self.bias is None else y + self.bias).type_as(x)  # bf16 attention would be slow
        return y.view(*x.shape[:-1], -1)

    def dequantized(self, i=...) -> torch.Tensor:
        """W, (O, I) in fp32; or its rows i, all indices that a tensor takes in its dimension 0."""
        scale = self.scale[i][..., None].float()
        if self.kind == 'int8':
            return self.q[i] * scale
        zero = self.zero[i][..., None].float() - 8 * scale
        return torch.addcmul(zero, nibbles(self.q[i]).float(), scale).flatten(-2)


class QuantEmbedding(nn.Module):
    """An embedding that shares the matrix of a quantized head."""

    def __init__(self, head: QuantLinear):
        super().__init__()
        self.head = head

    def forward(self, idx):
        return self.head.dequantized(idx)


def to_int8(w: torch.Tensor):
    """(q, scale, None) of W (O, I): int8 (O, I), bfloat16 (O,)."""
    scale = (w.abs().amax(dim=1) / 127).bfloat16()
    q = (w / scale.float().clamp(min=1e-30)[:, None]).round()
    return q.clamp(-127, 127).to(torch.int8), scale, None


def to_int4(w: torch.Tensor):
    """(q, scale, zero) of W (O, I): bytes (O, I / 32, 16), the first 16 of a group in their low
    halves, and bfloat16 (O, I / 32)."""
    groups = w.unflatten(1, (-1, GROUP))
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    q = (groups - zero.float()[..., None]) / scale.float().clamp(min=1e-30)[..., None]
    q = (q.round() + 8).clamp(0, 15).to(torch.uint8)
    return q[..., :GROUP // 2] | q[..., GROUP // 2:] << 4, scale, zero


def nibbles(q: torch.Tensor) -> torch.Tensor:
    """(.., 16) bytes as (.., 32) numbers from 0 to 15."""
    return torch.cat([q & 15, q >> 4], dim=-1)


@torch.no_grad()
def quantize(model: Model, kind: str) -> None:
    """Replace the matrices of a GPT; stops where they cannot be, or the model is being trained."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if kind not in KINDS:
        stop(f'quantize={kind}: must be one of {", ".join(KINDS)}, or empty')
    if model.config.arch != 'gpt':
        stop(f'quantize={kind}: only for a GPT, not for an {model.config.arch}; leave it out')
    if model.training:
        stop(f'quantize={kind}: rounded weights cannot learn; quantize a model after its training')
    for name, layer in layers.items():
        if kind == 'int4' and layer.in_features % GROUP:
            stop(f'quantize=int4: the rows of {name}.weight have {layer.in_features} weights, '
                 f'which {GROUP} does not divide; use int8')
    wide, n = torch.bfloat16 if fast_bfloat16() else torch.float32, count_parameters(model)
    if kind != 'int8' or not model.lm_head.weight.is_cpu or wide.itemsize * n > main_memory() // 8:
        wide = None
    for name, layer in layers.items():
        model.set_submodule(name, QuantLinear(layer, kind, wide))
    if model.config.tied:
        model.wte = QuantEmbedding(model.lm_head)   # type: ignore  # which took its place above


def bytes_read(model: Model, size: int) -> int:
    """Bytes of weights that a decoding step reads; `size` each where they are no integers."""
    looked_up, total = ('wpe.', 'wte.head.' if model.config.tied else 'wte.'), 0
    for name, t in (*model.named_parameters(), *model.named_buffers(remove_duplicate=False)):
        quantized = isinstance(model.get_submodule(name.rpartition('.')[0]), QuantLinear)
        if not name.startswith(looked_up) and not name.endswith(('.packed', '.scales', '.wide')):
            total += t.nbytes if quantized else t.numel() * size
    return total
