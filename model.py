"""The whole GPT: configuration, attention, MLP, norms, positions, KV cache, loss, init, generate.

Two settings of GPTConfig are exact public architectures: GPT-2 (layernorm, learned positions, gelu,
bias, tied) and Qwen3 / Llama (rmsnorm, rope, swiglu, grouped queries, qk_norm or not). At the end
stands the LSTM language model that they replaced, behind the same interface.

Shapes: B rows, T positions, C = n_embd channels, H heads of D = head_dim channels, V = vocab_size.
Nothing here knows of processes: core/ranks/parallel.py wraps the model from outside. It may cut
heads out of the projections, take blocks out of `h`, and set `wte`, `ln_f`, `lm_head` to None.
"""
import contextlib
import functools
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from core.device import compile_options, freed_at_once, has_flex, is_intel
from core.settings import stop

CHOICES = {'arch': ('gpt', 'lstm'),
           'norm': ('rmsnorm', 'layernorm'),
           'position': ('rope', 'learned', 'sinusoidal', 'none'),
           'mlp': ('swiglu', 'gelu', 'relu2')}


@dataclass
class GPTConfig:
    arch: str = 'gpt'           # gpt or lstm
    block_size: int = 1024      # longest context in tokens
    vocab_size: int = 50304     # ids; the tokenizer may use fewer
    n_layer: int = 12
    n_head: int = 12            # query heads
    n_kv_head: int = 0          # key and value heads; 0: n_head; 1: multi-query attention
    n_embd: int = 768
    head_dim: int = 0           # 0: n_embd / n_head
    n_hidden: int = 0           # channels inside the MLP; 0: 4 n_embd, swiglu 8/3 n_embd
    norm: str = 'layernorm'     # layernorm or rmsnorm
    norm_eps: float = 1e-5
    position: str = 'learned'   # learned, rope, sinusoidal or none
    rope_theta: float = 10000.0
    rope_scaling: str = ''      # Llama 3.1's: factor, low and high turns, old context; '': none
    mlp: str = 'gelu'           # gelu, swiglu or relu2
    qk_norm: bool = False       # RMSNorm of queries and keys, per head
    window: int = 0             # attention reaches this many positions back; 0: all
    tied: bool = True           # the head shares the embedding's matrix
    dropout: float = 0.0
    bias: bool = True           # in linear layers and layernorms
    n_classes: int = 0          # of a classifier, whose head gives these; 0: a language model

    def __post_init__(self):
        """Derive what is 0. Raises ValueError, naming the setting, for what cannot be."""
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f'{name}={value}: must be one of {", ".join(allowed)}')
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        for name in ('n_kv_head', 'head_dim', 'n_hidden', 'window', 'dropout', 'n_classes'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if self.dropout >= 1:
            raise ValueError(f'dropout={self.dropout}: must be below 1')
        if not self.head_dim:
            if self.arch == 'gpt' and self.n_embd % self.n_head:
                raise ValueError(f'n_embd={self.n_embd}: must be divisible by n_head={self.n_head} '
                                 '(or set head_dim)')
            self.head_dim = self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_kv_head={self.n_kv_head}: must divide n_head={self.n_head}')
        if self.position == 'rope' and self.head_dim % 2:
            raise ValueError(f'head_dim={self.head_dim}: must be even for position=rope')
        if self.rope_scaling:
            try:
                factor, low, high, context = map(float, self.rope_scaling.split(','))
                fits = self.position == 'rope' and factor >= 1 and 0 < low < high and context > 0
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(f'rope_scaling={self.rope_scaling}: must be four numbers like '
                                 '32,1,4,8192 (for position=rope), or empty')
        if self.n_classes and self.tied:
            raise ValueError(f'n_classes={self.n_classes}: the head of classes is not tied=True')
        if self.position == 'sinusoidal' and self.n_embd % 2:
            raise ValueError(f'n_embd={self.n_embd}: must be even for position=sinusoidal')
        if not self.n_hidden:  # 8/3, so that swiglu's three matrices weigh as much as two of 4
            self.n_hidden = 8 * round(self.n_embd / 3) if self.mlp == 'swiglu' else 4 * self.n_embd


# ---------------------------------------------------------------------------------------------
# Layers


def norm_layer(config: GPTConfig, size: int) -> nn.Module:
    if config.norm == 'rmsnorm':
        return nn.RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


def rope_tables(position: torch.Tensor, head_dim: int, theta: float, scaling: str = ''):
    """cos and sin of the angles position * theta^(-2i / D), i < D/2 (Su et al. 2021, section 3.2).

    position (T,) gives tables (T, D/2); position (B, T) gives (B, 1, T, D/2). `scaling` stretches
    a model to longer contexts as Llama 3.1 does: frequencies of more than `high` turns in the old
    context stay, those of fewer than `low` are divided by `factor`, in between it is interpolated.
    """
    i = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32)
    frequency = theta ** (-i / head_dim)
    if scaling:
        factor, low, high, context = map(float, scaling.split(','))
        turns = frequency * context / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = position[..., None].float() * frequency
    if position.ndim == 2:
        angle = angle[:, None]
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, H, T, D) by its positions; channel i pairs with i + D/2, as in Hugging Face."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def sinusoid(position: torch.Tensor, n_embd: int) -> torch.Tensor:
    """(..., C) sine and cosine position codes (Vaswani et al. 2017, section 3.5)."""
    i = torch.arange(0, n_embd, 2, device=position.device, dtype=torch.float32)
    angle = position[..., None].float() * 10000.0 ** (-i / n_embd)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class Linear(nn.Linear):
    """nn.Linear, with faster products in fp32 on a CPU.

    Compiled, to train: `ProductByCore`, if each core has as many rows as the matrix's shorter
    side. With fewer, the cores' gradients of the matrix, which are added up, would be larger than
    what they come from.

    Eager, where no gradient is wanted: oneDNN for large matrices, which is faster for a few rows
    than MKL, torch's choice. For a single row MKL is the faster one on Intel's processors; on
    others it reads the matrix with one core only. Graphs have MKL alone: Inductor takes oneDNN's
    products of frozen weights only.
    """
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    fewest_rows = 2 if is_intel() else 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cores = torch.get_num_threads()    # which Dynamo would not trace

    def forward(self, x):
        if type(x) is not torch.Tensor or x.device.type != 'cpu' \
                or not x.dtype == self.weight.dtype == torch.float32 \
                or torch.is_autocast_enabled('cpu'):
            return super().forward(x)
        rows = x.numel() // self.in_features
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() and (n := self.cores) > 1 and rows % n == 0 \
                    and rows // n >= min(self.weight.shape):
                y = ProductByCore.apply(x.reshape(n, -1, self.in_features), self.weight)
                y = y.view(*x.shape[:-1], -1)
                return y if self.bias is None else y + self.bias
        elif self.onednn and not torch.is_grad_enabled() and self.weight.numel() >= 1 << 19 \
                and rows >= self.fewest_rows:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')
        return super().forward(x)


class ProductByCore(torch.autograd.Function):
    """x W^T, (cores, rows, O), of x (cores, rows, C) and W (O, C): each core has its own rows in
    both passes, as in the kernels between two products, so that what it reads lies in its cache.
    MKL would cut some products by columns. 4 blocks of 128 channels train 7% faster on 2 cores.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.t().expand(len(x), -1, -1))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (torch.bmm(grad, weight.expand(len(x), -1, -1)),
                torch.bmm(grad.mT, x).sum(dim=0))


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        n_query, n_key = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, n_query, bias=config.bias)
        self.k_proj = Linear(config.n_embd, n_key, bias=config.bias)
        self.v_proj = Linear(config.n_embd, n_key, bias=config.bias)
        self.o_proj = Linear(n_query, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x, rope=None, mask=None, cache=None, layer=0):
        """(B, T, C) of (B, T, C); rope: `rope_tables`, mask: as of `attend`, cache: a KVCache, of
        which this is layer number `layer`."""
        B, T = x.shape[:2]
        # The number of heads is inferred: tensor parallelism leaves each rank a part of them.
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.q_norm is not None:  # in the weights' precision, as other norms
            dtype = self.q_norm.weight.dtype
            q, k = self.q_norm(q.to(dtype)).type_as(v), self.k_norm(k.to(dtype)).type_as(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attend(q, k, v, mask, dropout: float):
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, H or fewer, S, D): (B, H, T, D).

    mask: None (causal, or all of the cache for one query), boolean (.., T, S), or a BlockMask.
    """
    gqa = {'enable_gqa': True} if q.size(1) != k.size(1) else {}
    if mask is not None and not isinstance(mask, torch.Tensor):
        return fused(flex_attention, q, k, v, block_mask=mask, **gqa)
    causal = mask is None and q.size(2) > 1     # a single query sees all keys
    short = q.device.type == 'cpu' and q.size(2) <= 4 * CAUSAL_BLOCK
    if short and mask is None and not dropout and torch.compiler.is_compiling():
        if not causal:
            return attend_with_one(q, k, v)
        if not gqa:
            return attend_in_blocks(q, k, v)
    # For short windows the CPU's kernel is up to 4 times slower backward in bf16 than in fp32.
    if short and q.dtype == torch.bfloat16:
        with torch.autocast('cpu', enabled=False):
            return F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, dropout_p=dropout,
                is_causal=causal, **gqa).type_as(q)
    # cuDNN makes a plan for each new length of keys, and its gradients with a mask can be NaN
    # (PyTorch's issue 196678): it only trains without one.
    others = q.device.type == GPU and (mask is not None or not torch.is_grad_enabled())
    with sdpa_kernel(NOT_CUDNN) if others else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                              is_causal=causal, **gqa)


CAUSAL_BLOCK = 128
GPU = 'cuda'    # where there is flex-attention, and cuDNN among SDPA's kernels
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
compiled = functools.cache(torch.compile)


def fused(f, *args, **options):
    """f(*args, **options), compiled: in the graph under way, or alone where all else runs eagerly,
    as in evaluation. Otherwise flex-attention and its mask would make tensors of T x T."""
    if torch.compiler.is_compiling():
        return f(*args, **options)
    with torch.compiler.set_stance('default'):
        return compiled(f)(*args, **options)


def attend_in_blocks(q, k, v):
    """Causal attention, all of (B, H, T, D), written out: each block of queries with the keys up to
    its end. Compiled for a CPU this is up to twice as fast as its kernel, for short windows: all
    probabilities are kept for the backward pass."""
    parts = []
    for start in range(0, q.size(2), CAUSAL_BLOCK):
        end = min(start + CAUSAL_BLOCK, q.size(2))
        scores = (q[:, :, start:end] @ k[:, :, :end].mT).float() / math.sqrt(q.size(-1))
        place = torch.arange(end, device=q.device)
        scores = scores.masked_fill(place > place[start:, None], -math.inf)
        parts.append(scores.softmax(dim=-1).type_as(v) @ v[:, :, :end])
    return torch.cat(parts, dim=2)


def attend_with_one(q, k, v):
    """Attention of one query, (B, H, 1, D), to all of k and v, (B, H or fewer, S, D), written out:
    compiled for a CPU this is faster than its kernel, by 3% of a token's time."""
    q = q.reshape(q.size(0), k.size(1), -1, 1, q.size(-1))      # (B, H_k, H / H_k, 1, D)
    k, v = k[:, :, None], v[:, :, None]
    scores = (q.float() / math.sqrt(q.size(-1)) * k).sum(dim=-1)
    y = (scores.softmax(dim=-1)[..., None] * v).sum(dim=-2)
    return y.flatten(1, 2)[:, :, None].type_as(v)


class MLP(nn.Module):
    """Two linear layers around a nonlinearity, or SwiGLU's three (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        self.gate_proj = (Linear(config.n_embd, config.n_hidden, bias=config.bias)
                          if config.mlp == 'swiglu' else None)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        """(B, T, C) of (B, T, C), each position by itself."""
        up = self.up_proj(x)
        if self.kind == 'swiglu':
            up = F.silu(self.gate_proj(x)) * up
        elif self.kind == 'relu2':
            up = F.relu(up).square()
        else:
            up = gelu(up)
        return self.down_proj(up)


def gelu(x):
    """GELU's approximation with a tanh (Hendrycks & Gimpel 2016, section 2): 1 + tanh(u) is
    2 sigmoid(2 u), which compiled for a CPU takes half the time."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x ** 3))
    return F.gelu(x, approximate='tanh')


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = norm_layer(config, config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = norm_layer(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, rope=None, mask=None, cache=None, layer=0):
        x = x + self.drop(self.attn(autocast_once(self.ln_1(x)), rope, mask, cache, layer))
        return x + self.drop(self.mlp(autocast_once(self.ln_2(x))))


def autocast_once(x):
    """x in the dtype of autocast's products, if that is on. Otherwise each product of q, k, v, or
    of gate and up, would make a copy of its own, and keep it for the backward pass."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# ---------------------------------------------------------------------------------------------
# Documents, masks and the cache


def document_positions(doc: torch.Tensor) -> torch.Tensor:
    """(B, T) position of each token in its document: [[7, 7, 8, 8, 8]] gives [[0, 1, 0, 1, 2]]."""
    index = torch.arange(doc.size(1), device=doc.device).expand_as(doc)
    new = torch.zeros_like(doc, dtype=torch.bool)
    new[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return index - torch.where(new, index, 0).cummax(dim=1).values


def causal_mask(T: int, doc, window: int, device) -> torch.Tensor | None:
    """Boolean (T, T) or (B, 1, T, T), True where a query sees a key; None for plain causal."""
    if doc is None and not 0 < window < T:
        return None
    q, k = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)[None, :]
    mask = k <= q
    if window:
        mask = mask & (k > q - window)
    if doc is not None:
        mask = mask & (doc[:, None, :, None] == doc[:, None, None, :])
    return mask


def flex_mask(T: int, doc, window: int, device):
    """The same as a BlockMask: flex-attention skips the blocks that nobody sees."""
    if doc is None and not 0 < window < T:
        return None

    def sees(b, h, q, k):
        seen = k <= q
        if window:
            seen = seen & (k > q - window)
        return seen if doc is None else seen & (doc[b, q] == doc[b, k])

    B = None if doc is None else doc.size(0)
    return fused(create_block_mask, sees, B, None, T, T, device=device)


class KVCache:
    """Keys and values of B rows, which may be of different lengths, for up to `size` positions.

    Tensors are made at the first use, in the shape of the keys that come: (B, heads, size + 1, D).
    """

    def __init__(self, batch_size: int, size: int, device=None):
        self.size, self.device = size, device
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.longest = 0      # the largest of lengths, known without asking the device
        self.even = True      # whether all rows are equally long
        self.k, self.v = {}, {}

    def room(self) -> int:
        """How many more tokens the longest row can take."""
        return self.size - self.longest

    def positions(self, T: int) -> torch.Tensor:
        """(B, T) the positions that the next T tokens of each row will have; (T,) if all agree."""
        new = torch.arange(T, device=self.device)
        return self.longest + new if self.even else self.lengths[:, None] + new

    def mask(self, T: int, window: int) -> torch.Tensor | None:
        """Boolean mask of T new queries over the cached and new keys; None where all is seen."""
        if self.even and not window and (T == 1 or self.longest == 0):
            return None
        q = self.positions(T)[..., None]
        k = torch.arange(self.longest + T, device=self.device)
        mask = k <= q
        if window:
            mask = mask & (k > q - window)
        return mask if self.even else mask[:, None]

    def update(self, layer: int, k, v):
        """Store a layer's new keys and values (B, heads, T, D); returns all that it has now."""
        T, end = k.size(2), self.longest + k.size(2)
        if layer not in self.k:
            # With one position too many, what is returned is always a part: a graph compiled for
            # parts would have to be compiled again for the whole.
            shape = (k.size(0), k.size(1), self.size + 1, k.size(3))
            self.k[layer], self.v[layer] = k.new_zeros(shape), v.new_zeros(shape)
        for new, stored in ((k, self.k[layer]), (v, self.v[layer])):
            if self.even:
                stored[:, :, self.longest:end] = new
            else:
                at = self.positions(T)[:, None, :, None].expand_as(new)
                stored.scatter_(2, at, new)
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def advance(self, T: int, n_new=None) -> None:
        """Count T tokens as stored; of row b only the first n_new[b], if the rest was padding."""
        if n_new is None:
            self.lengths += T
            self.longest += T
        else:
            self.lengths += n_new
            self.longest = int(self.lengths.max())
            self.even = bool((self.lengths == self.longest).all())


# ---------------------------------------------------------------------------------------------
# Loss

CHUNK_ELEMENTS = 1 << 24  # logits held at a time, 64 MiB in fp32; on a GPU 8 times as many


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of logits = x @ weight.T, made one chunk of rows at a time.

    x (N, C), weight (V, C), targets (N,), -100 ignored.

    The gradient of the loss by the logits, softmax(logits) - onehot(target), is known as soon as
    the logits are: so the forward pass also makes the gradients of x and weight, and no logits are
    kept or computed twice (the idea of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, in_graph):
        """The sum, a scalar; chunk: rows of x whose logits exist at a time; in_graph: whether the
        model is compiled, so that this should be."""
        dx = torch.empty_like(x)
        learns = ctx.needs_input_grad[1]    # with adapters it does not
        dweight = torch.zeros_like(weight, dtype=at_least_float32(weight.dtype)) if learns else None
        total, by_logits = 0.0, compiled(loss_by_logits) if in_graph else loss_by_logits
        for i in range(0, len(x), chunk):
            rows = x[i:i + chunk]
            loss, grad = by_logits(rows @ weight.T, targets[i:i + chunk])
            total = total + loss
            dx[i:i + chunk] = grad @ weight
            if learns:
                dweight += grad.T @ rows
        ctx.save_for_backward(dx, dweight.to(weight.dtype) if learns else None)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        dweight = dweight if dweight is None else dweight * grad.to(dweight.dtype)
        return dx * grad.to(dx.dtype), dweight, None, None, None


def loss_by_logits(raw, target):
    """Sum of the cross-entropies of logits raw (N, V), which it may change, and its gradient."""
    grad = raw.to(at_least_float32(raw.dtype))      # logits, which become the gradient
    counts, at = (target != -100).to(grad.dtype)[:, None], target.clamp(min=0)[:, None]
    highest = grad.amax(dim=-1, keepdim=True)
    right = grad.gather(1, at) - highest
    mass = grad.sub_(highest).exp_().sum(dim=-1, keepdim=True)
    loss = ((mass.log() - right) * counts).sum()
    grad.div_(mass).scatter_add_(1, at, -torch.ones_like(counts)).mul_(counts)
    return loss, grad.type_as(raw)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What logits of this dtype become before a softmax."""
    return torch.promote_types(dtype, torch.float32)


def token_losses(x, targets, lm_head) -> torch.Tensor:
    """(N,) cross-entropies of hidden states x (N, C), 0 where the target is -100; in fp32, of an
    fp64 model in fp64.
    """
    logits = lm_head(x)
    return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), targets, ignore_index=-100,
                           reduction='none')


# In a graph, each chunk's gradient of the head would be kept until all of them are added up. (This
# is torch.compiler.disable, but imports the compiler only when it is called.)
out_of_graph = torch._disable_dynamo


@out_of_graph
def chunked_sum(*args) -> torch.Tensor:
    return ChunkedCrossEntropy.apply(*args)


@out_of_graph
def recomputed_losses(x, targets, lm_head, chunk: int) -> torch.Tensor:
    """`token_losses` of so many rows at a time, which the backward pass computes again."""
    return torch.cat([checkpoint(token_losses, f, t, lm_head, use_reentrant=False)
                      for f, t in zip(x.split(chunk), targets.split(chunk))])


def lm_loss(lm_head, x, targets, reduction: str) -> torch.Tensor:
    """Cross-entropy in nats of hidden states x (B, T, C) and targets (B, T), -100 ignored.

    reduction 'none' gives (B, T), 'sum' the total, 'mean' the total over the number of targets.
    All logits never exist at once, forward or backward, unless they are few.
    """
    flat, target = x.reshape(-1, x.size(-1)), targets.reshape(-1)
    chunk = max(1, CHUNK_ELEMENTS * (8 if x.is_cuda else 1) // lm_head.out_features)
    # In fp16 the small gradients of unlikely tokens would vanish before the scaler sees them.
    half = torch.is_autocast_enabled(x.device.type) and \
        torch.get_autocast_dtype(x.device.type) == torch.float16
    if chunk >= len(flat):
        losses = token_losses(flat, target, lm_head)
    elif reduction != 'none' and torch.is_grad_enabled() and not half and lm_head.bias is None \
            and not lm_head._forward_hooks:     # where calling it is no more than its matrix
        total = chunked_sum(flat, lm_head.weight, target, chunk, torch.compiler.is_compiling())
        return total / (target != -100).sum() if reduction == 'mean' else total
    else:
        losses = recomputed_losses(flat, target, lm_head, chunk)
    if reduction == 'none':
        return losses.view_as(targets)
    total = losses.sum()
    return total / (target != -100).sum() if reduction == 'mean' else total


def last_positions(x, n: int, n_real=None) -> torch.Tensor:
    """The last n of the first n_real[b] positions of each row of x (B, T, C); n_real None: of T."""
    if n_real is None:
        return x[:, -n:]
    at = (n_real[:, None] - n + torch.arange(n, device=x.device)).clamp(min=0)
    return x.gather(1, at[..., None].expand(-1, -1, x.size(-1)))


# ---------------------------------------------------------------------------------------------
# The models


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.recompute = False      # recompute blocks in the backward pass instead of storing them
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = (nn.Embedding(config.block_size, config.n_embd)
                    if config.position == 'learned' else None)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.h = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layer)})
        self.ln_f = norm_layer(config, config.n_embd)
        self.lm_head = Linear(config.n_embd, config.n_classes or config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight

    def new_cache(self, batch_size: int, device=None, size: int = 0) -> KVCache:
        return KVCache(batch_size, size or self.config.block_size, device)

    def forward(self, idx, targets=None, *, doc=None, cache=None, n_logits=0, reduction='mean'):
        """Logits, or the loss if there are targets.

        idx        (B, T) token ids; (B, T, C) hidden states on a pipeline stage without embedding
        targets    (B, T) next tokens, -100 where none counts; then returns the cross-entropy in
                   nats: a scalar ('mean' or 'sum') or (B, T) ('none')
        doc        (B, T) numbers of the documents packed in a row: attention stays inside one,
                   positions restart; -1 marks padding, at the end of a row
        cache      a KVCache: idx continues its rows; real tokens are stored, padding is not
        n_logits   of how many positions, counted back from each row's last real one; 0: all
        Without a head (a pipeline stage) it returns the hidden states (B, T, C).
        """
        B, T = idx.shape[:2]
        config, device = self.config, idx.device
        n_real = None if doc is None else (doc >= 0).sum(dim=1)
        if cache is not None:
            if cache.room() < T:
                raise ValueError(f'{T} more tokens do not fit the cache: {cache.room()} of '
                                 f'{cache.size} positions are left')
            position, mask = cache.positions(T), cache.mask(T, config.window)
        else:
            if config.block_size < T:
                raise ValueError(f'{T} tokens are more than block_size={config.block_size}')
            position = torch.arange(T, device=device) if doc is None else document_positions(doc)
            # On a GPU, flex-attention skips what is masked, but has no dropout; else SDPA gets it.
            flex = device.type == GPU and (doc is not None or config.window > 0) \
                and not (config.dropout and self.training) and has_flex(device, config.head_dim)
            mask = (flex_mask if flex else causal_mask)(T, doc, config.window, device)
        x = idx if self.wte is None else self.embed(idx, position)
        rope = None
        if config.position == 'rope':
            rope = rope_tables(position, config.head_dim, config.rope_theta,
                               config.rope_scaling)
        for i, block in self.h.items():
            if self.recompute and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, None, int(i), use_reentrant=False)
            else:
                x = block(x, rope, mask, cache, int(i))
        if cache is not None:
            cache.advance(T, n_real)
        if self.lm_head is None:
            return x
        if targets is not None:
            return lm_loss(self.lm_head, self.ln_f(x), targets, reduction)
        if n_logits:
            x = last_positions(x, n_logits, n_real)
        return self.lm_head(self.ln_f(x))

    def embed(self, idx, position):
        """(B, T, C) token embeddings, with positions where they are added."""
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(position)
        elif self.config.position == 'sinusoidal':
            code = sinusoid(position, self.config.n_embd)
            x = x * math.sqrt(self.config.n_embd) + code.type_as(x)
        return self.drop(x)


class LSTM(nn.Module):
    """The recurrent language model that transformers replaced: embedding, LSTM, linear head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lstm = nn.LSTM(config.n_embd, config.n_embd, config.n_layer, batch_first=True,
                            dropout=config.dropout if config.n_layer > 1 else 0.0)
        self.lm_head = Linear(config.n_embd, config.n_classes or config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight

    class State:
        """Takes the place of the KV cache: hidden and cell state, of one size for ever."""
        hidden = None

        def room(self):
            return math.inf

    def new_cache(self, batch_size: int, device=None, size: int = 0):
        return LSTM.State()

    def forward(self, idx, targets=None, *, doc=None, cache=None, n_logits=0, reduction='mean'):
        """As GPT.forward; a row holds one document, -1 in `doc` marks padding at its end."""
        x, n_real, state = self.wte(idx), None, cache.hidden if cache is not None else None
        if doc is None:
            x, state = self.lstm(x, state)
        else:
            if bool((doc.clamp(min=0) != doc[:, :1]).logical_and(doc >= 0).any()):
                raise ValueError('an LSTM cannot keep apart documents packed in one row')
            n_real = (doc >= 0).sum(dim=1)
            packed = nn.utils.rnn.pack_padded_sequence(     # a row of padding has a token, too
                x, n_real.clamp(min=1).cpu(), True, enforce_sorted=False)
            x, state = self.lstm(packed, state)
            x, _ = nn.utils.rnn.pad_packed_sequence(x, True, total_length=idx.size(1))
        if cache is not None:
            cache.hidden = state
        if targets is not None:
            return lm_loss(self.lm_head, x, targets, reduction)
        return self.lm_head(last_positions(x, n_logits, n_real) if n_logits else x)


def build_model(config: GPTConfig, seed: int | None = 0, device='cpu') -> nn.Module:
    """A model with initialized fp32 weights on `device`; the same weights for the same seed.

    With seed None the weights that init_weights would fill are left as the memory was, for whoever
    loads others; on the device 'meta' there is no memory.
    """
    model = construct(config, seed or 0)
    if device != 'meta':
        allocate(model, device)
        if seed is not None:
            init_weights(model, seed)
    return model


def construct(config: GPTConfig, seed: int, real=()) -> nn.Module:
    """A model on the device 'meta'. It remembers by name, in

    own      what its constructors set and init_weights has no rule for: buffers, and parameters
             that are not just as torch's own layers make them; with their values
    shared   the first name of a parameter that has several
    saved    what a checkpoint holds: the parameters, and the persistent buffers

    Constructors run on the CPU; their random numbers depend on the seed only. Parameters of torch's
    layers get no memory. If a constructor goes on to change some, all is made once more, and the
    parameters registered as number `real` get it.
    """
    made = {}

    def register(layer, name, p):
        if id(p) not in made and is_torchs(layer) and len(made) not in real:
            p = nn.Parameter(torch.empty_like(p, device='meta'), p.requires_grad)
        return made.setdefault(id(p), p)

    with freed_at_once(), torch.random.fork_rng(devices=[]), torch.device('cpu'), \
            nn.modules.module.register_module_parameter_registration_hook(register):
        torch.default_generator.manual_seed(seed)
        model = LSTM(config) if config.arch == 'lstm' else GPT(config)
    first = {}
    model.shared = {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)
                    if first.setdefault(p, name) != name}
    model.own = {name: t for name, t in (*model.named_parameters(), *model.named_buffers())
                 if not has_rule(model.get_submodule(name.rpartition('.')[0]), name, t)}
    model.saved = set(model.state_dict())
    if any(t.is_meta for t in model.own.values()):
        # needed is also what is no longer there: others may have been derived from it
        ruled = {id(p) for name, p in model.named_parameters() if name not in model.own}
        needed = {i for i, p in enumerate(made) if p not in ruled}
        return construct(config, seed, needed if needed - {*real} else range(len(made)))
    model.to('meta')
    tie(model)
    return model


def is_torchs(layer: nn.Module) -> bool:
    """Whether torch's constructor alone makes a layer, of a kind that init_weights knows."""
    return any(type(layer).__init__ is known.__init__
               and type(layer).reset_parameters is known.reset_parameters
               for known in (Linear, nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm, nn.LSTM))


def has_rule(layer: nn.Module, name: str, t: torch.Tensor) -> bool:
    """Whether init_weights fills a tensor of a newly made layer. A parameter whose version says
    that it was changed after torch made it stays as it is."""
    return isinstance(t, nn.Parameter) and is_torchs(layer) and t._version == 1 and (
        name in ('wte.weight', 'wpe.weight') or not isinstance(layer, nn.Embedding))


@torch.no_grad()
def allocate(model: nn.Module, device, put=torch.Tensor.copy_) -> None:
    """Give a model memory on `device`, with its constructors' own values, else without any; shared
    parameters share theirs. put(tensor, values) fills one that may be here in part only."""
    model.to_empty(device=device)
    tie(model)
    for name, t in (*model.named_buffers(), *named_weights(model).items()):
        if name in model.own:
            put(t, model.own[name])
    model.own = dict.fromkeys(model.own)    # the names stay


def tie(model: nn.Module) -> None:
    """Let parameters be shared again, such as the matrix of embedding and head, after something has
    replaced them."""
    for name, first in model.shared.items():
        owner, _, key = name.rpartition('.')
        with contextlib.suppress(AttributeError):   # one of them is in another pipeline stage
            setattr(model.get_submodule(owner), key, model.get_parameter(first))


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, shared ones once, and the persistent buffers. A tied head is
    'wte.weight', also on a pipeline stage that has only the head.
    """
    tied = model.config.tied
    return {'wte.weight' if tied and name == 'lm_head.weight' else name: p
            for name, p in model.named_parameters()} | {
                name: b for name, b in model.named_buffers() if name in model.saved}


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, put=torch.Tensor.copy_) -> None:
    """All of initialization, but for what constructors set by themselves (model.own), which stays.
    put(p, values) fills a parameter that may be here in part only.

    Norms are 1, biases 0. Matrices that write into the residual stream (o_proj, down_proj) are 0,
    so each block begins as the identity; an untied head is 0, so the first loss is exactly log(V).
    Other matrices are normal with std 1 / sqrt(3 n_in), GPT-2's 0.02 at 768 channels. Position and
    tied embeddings have std 0.02, an untied embedding 1. LSTM forget gates start open (bias 1).
    On one kind of device, a parameter's numbers depend only on (seed, its name), not on which
    others are made here.
    """
    for name, p in named_weights(model).items():
        if name in model.own:
            continue
        if p.ndim < 2:
            p.fill_(1.0 if name.endswith('.weight') else 0.0)
            if 'bias_ih' in name:                 # gates in the order input, forget, cell, output
                p.chunk(4)[1].fill_(1.0)
        elif name.endswith(('o_proj.weight', 'down_proj.weight', 'lm_head.weight')):
            p.zero_()
        else:
            std = 1 / math.sqrt(3 * p.size(1))
            if name == 'wpe.weight' or name == 'wte.weight':
                std = 0.02 if name == 'wpe.weight' or model.config.tied else 1.0
            generator = torch.Generator(p.device)
            generator.manual_seed(zlib.crc32(f'{seed} {name}'.encode()))
            values = torch.empty(p.shape, dtype=p.dtype, device=p.device)
            put(p, values.normal_(0.0, std, generator=generator))


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module, put=torch.Tensor.copy_) -> None:
    """Fill a model with the weights of another that may know fewer tokens, or more positions, or
    have another kind of head, which is then 0. put(p, values) fills a parameter.

    The rows of new tokens are the mean of the others, which makes them as improbable as any: the
    logit of a row of zeros would be 0, where GPT-2's are around -100. A buffer of another shape
    stays; stops at another parameter of one, which has no rule.
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
                 'copy_weights, in model.py, how it is to change')


@torch.no_grad()
def spread_new_rows(model: nn.Module, known: int, seed: int) -> None:
    """Make the rows of tokens from number `known` on like the others: their mean, with noise of
    their deviation. Equal ones could not be told apart where embeddings are frozen."""
    for name, p in named_weights(model).items():
        if name in ('wte.weight', 'lm_head.weight') and len(p) > known:
            generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {name} new'.encode()))
            noise = torch.randn(len(p) - known, p.size(1), generator=generator)
            p[known:] = p[:known].mean(dim=0) + noise.to(p.device) * p[:known].std(dim=0)


def padded(n_tokens: int, known: int = 0) -> int:
    """A vocabulary size for so many tokens: a multiple of 64 where it is large, as GPUs like it."""
    return n_tokens if n_tokens < 1000 or n_tokens <= known else math.ceil(n_tokens / 64) * 64


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: nn.Module, block_size: int = 0) -> int:
    """Floating-point operations per token, forward and backward: 6 N + 12 L H D T.

    Chowdhery et al. 2022 (PaLM), appendix B: N are the weights that multiply (no norms, biases or
    looked-up embeddings; the head counts, tied or not), and the attention term ignores that half of
    the scores are masked. T is the context length, at most the sliding window.
    """
    config = model.config
    looked_up = ('wpe.weight',) if config.tied else ('wpe.weight', 'wte.weight')
    n = sum(p.numel() for name, p in model.named_parameters()
            if p.ndim > 1 and name not in looked_up)
    if config.arch == 'lstm':
        return 6 * n
    T = block_size or config.block_size
    T = min(T, config.window) if config.window else T
    return 6 * n + 12 * config.n_layer * config.n_head * config.head_dim * T


# ---------------------------------------------------------------------------------------------
# Generation


def sample_next(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """(B,) ids drawn from logits (B, V); temperature 0 takes the most probable.

    top_k keeps the k most probable tokens; min_p those with at least min_p times the probability of
    the most probable one (Nguyen et al. 2024); top_p the fewest whose probabilities sum to at least
    top_p (Holtzman et al. 2020). They apply in this order, after the temperature.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if min_p > 0:
        best = logits.max(dim=-1, keepdim=True).values
        logits = logits.masked_fill(logits < best + math.log(min_p), -math.inf)
    if top_p < 1:
        values, order = logits.sort(dim=-1, descending=True)
        before = values.softmax(dim=-1).cumsum(dim=-1) - values.softmax(dim=-1)
        values = values.masked_fill(before >= top_p, -math.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, values)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def penalize_repetition(logits, rows, penalty: float):
    """Make tokens that a row already has less probable (CTRL, Keskar et al. 2019, section 4.1)."""
    for logit, row in zip(logits, rows):
        seen = torch.tensor(sorted(set(row)), device=logits.device)
        logit[seen] = torch.where(logit[seen] > 0, logit[seen] / penalty, logit[seen] * penalty)
    return logits


def pad_rows(rows, device):
    """Rows of ids as (B, T) ids with their `doc`: 0 for tokens, -1 for padding; None if even."""
    T = max(map(len, rows))
    idx = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    doc = torch.where(torch.arange(T, device=device) < lengths[:, None], 0, -1)
    return idx, None if all(len(row) == T for row in rows) else doc


@torch.no_grad()
def generate(model, prompts, max_new_tokens: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
             repetition_penalty=1.0, seed=0, stop_tokens=(), n_tokens=0, compiled=False):
    """Continue prompts (lists of ids, of any lengths >= 1); yields the next id of every row.

    Yields lists of B ids as they come, -1 for rows that have ended: after a stop token (which is
    still yielded) or max_new_tokens. Ids from n_tokens on are never drawn (0: all may be). Prompts
    longer than block_size lose their beginning. When the cache is full, the last half of the window
    is prefilled again. The same seed gives the same ids. With `compiled`, one graph of a GPT makes
    the steps of a token per row, whatever the length of the cache.
    """
    device = model.lm_head.weight.device
    step = model
    if compiled:
        step = torch.compile(model, dynamic=True, options=compile_options(device.type))
    generator = torch.Generator(device).manual_seed(seed)
    rows = [list(prompt) for prompt in prompts]
    ended = [False] * len(rows)
    size = min(model.config.block_size, max(map(len, rows)) + max_new_tokens)
    cache, idx = None, None
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if cache is None or cache.room() < 1:
                keep = size if cache is None else max(1, size // 2)
                cache = model.new_cache(len(rows), device, size)
                idx, doc = pad_rows([row[-keep:] for row in rows], device)
                logits = model(idx, doc=doc, cache=cache, n_logits=1)
            else:
                logits = step(idx, cache=cache, n_logits=1)
            logits = logits[:, -1].float()
            if n_tokens:
                logits[:, n_tokens:] = -math.inf
            if repetition_penalty != 1:
                logits = penalize_repetition(logits, rows, repetition_penalty)
            new = sample_next(logits, temperature, top_k, top_p, min_p, generator)
            idx, ids = new[:, None], new.tolist()
            for i, row in enumerate(rows):
                row.append(ids[i])
                ids[i] = -1 if ended[i] else ids[i]
                ended[i] = ended[i] or ids[i] in stop_tokens
            yield ids
            if all(ended):
                return
    finally:
        model.train(was_training)
