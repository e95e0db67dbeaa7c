"""The whole GPT: read from top to bottom, from what a model is made of to what it computes.

Settings of GPTConfig give exact public architectures: GPT-2 (layernorm, learned positions, gelu,
bias, tied) and Llama, Qwen2, Qwen3 (rmsnorm, rope, swiglu, grouped queries; qkv_bias; qk_norm).

Shapes: B rows, T positions, C = n_embd channels, H heads of D = head_dim channels, V = vocab_size.
What core/net/kernels.py gives computes the same as plain PyTorch, only faster; a table there shows
it: attend is F.scaled_dot_product_attention, causal without a mask, lm_loss is F.cross_entropy.
For several GPUs core/ranks/parallel.py changes the finished model: a process may keep some heads or
some blocks only, and then wte, ln_f, lm_head may be None. The code below allows for that.
"""
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from core.net.kernels import Linear, attend, cast_once, flex_mask, gelu, lm_loss, recomputed, tail


@dataclass
class GPTConfig:
    arch: str = 'gpt'           # gpt, or lstm: what it replaced, in core/net/lstm.py
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
    window: int = 0             # a token sees this many positions, itself included; 0: all
    tied: bool = True           # the head shares the embedding's matrix
    dropout: float = 0.0
    bias: bool = True           # in linear layers and layernorms
    qkv_bias: bool = False      # in the layers of queries, keys and values (Qwen2)
    n_classes: int = 0          # of a classifier, whose head gives these; 0: a language model

    def __post_init__(self):
        """Derive what is 0. Raises ValueError, naming the setting, for a model that cannot be."""
        check(self)
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.n_hidden:  # 8/3, so that swiglu's three matrices weigh as much as two of 4
            self.n_hidden = 8 * round(self.n_embd / 3) if self.mlp == 'swiglu' else 4 * self.n_embd


# ---------------------------------------------------------------------------------------------
# A block: attention, then an MLP, each on a normalized copy of the residual stream


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        n_query, n_key = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, n_query, bias=config.bias or config.qkv_bias)
        self.k_proj = Linear(config.n_embd, n_key, bias=config.bias or config.qkv_bias)
        self.v_proj = Linear(config.n_embd, n_key, bias=config.bias or config.qkv_bias)
        self.o_proj = Linear(n_query, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x, rope=None, mask=None, cache=None, layer=0):
        """x (B, T, C) to (B, T, C); rope: `rope_tables`, mask: as of `attend`, cache: a KVCache, of
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
        """x (B, T, C) to (B, T, C), each position by itself."""
        gate = self.gate_proj(x) if self.kind == 'swiglu' else None
        return recomputed(self.down, self.up_proj(x), gate)

    def down(self, up, gate):
        """The nonlinearity, and back from n_hidden channels to C."""
        if self.kind == 'swiglu':
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(gelu(up) if self.kind == 'gelu' else F.relu(up).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = norm_layer(config, config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = norm_layer(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, rope=None, mask=None, cache=None, layer=0):
        x = x + self.drop(self.attn(cast_once(self.ln_1(x)), rope, mask, cache, layer))
        return x + self.drop(self.mlp(cast_once(self.ln_2(x))))


def norm_layer(config: GPTConfig, size: int) -> nn.Module:
    if config.norm == 'rmsnorm':
        return nn.RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


# ---------------------------------------------------------------------------------------------
# The model


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

    def forward(self, idx, targets=None, *, doc=None, cache=None, n_logits=0, reduction='mean'):
        """Logits, or the loss if there are targets.

        idx        (B, T) token ids; (B, T, C) hidden states on a pipeline stage without embedding
        targets    (B, T) next tokens, -100 where none counts; then returns the cross-entropy in
                   nats: a scalar ('mean' or 'sum') or (B, T) ('none')
        doc        (B, T) numbers of the documents packed in a row: attention stays inside one,
                   positions restart; -1 marks padding, at a row's end; with a cache only it counts
        cache      a KVCache: idx continues its rows; real tokens are stored, padding is not
        n_logits   only the logits of each row's last n_logits tokens, padding aside; 0: of all
        Without a head (a pipeline stage) it returns the hidden states (B, T, C).
        """
        config = self.config
        n_real = None if doc is None else (doc >= 0).sum(dim=1)
        position, mask = self.places(idx, doc, cache)
        x = idx if self.wte is None else self.embed(idx, position)
        rope = None
        if config.position == 'rope':
            rope = rope_tables(position, config.head_dim, config.rope_theta, config.rope_scaling)
        for i, block in self.h.items():
            if self.recompute and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, None, int(i), use_reentrant=False)
            else:
                x = block(x, rope, mask, cache, int(i))
        if cache is not None:
            cache.advance(idx.size(1), n_real)
        if self.lm_head is None:
            return x
        if targets is not None:
            return lm_loss(self.lm_head, self.ln_f(x), targets, reduction)
        if n_logits:
            x = tail(x, n_logits, n_real)
        return self.lm_head(self.ln_f(x))

    def places(self, idx, doc, cache):
        """The tokens' positions, (T,) or (B, T), and the mask: which of them see which."""
        T, device, config = idx.size(1), idx.device, self.config
        if cache is not None:
            if cache.room() < T:
                raise ValueError(f'{T} more tokens do not fit the cache: {cache.room()} of '
                                 f'{cache.size} positions are left')
            return cache.positions(T), cache.mask(T, config.window)
        if config.block_size < T:
            raise ValueError(f'{T} tokens are more than block_size={config.block_size}')
        position = torch.arange(T, device=device) if doc is None else document_positions(doc)
        dropout = config.dropout and self.training      # flex-attention has none
        mask = None if dropout else flex_mask(T, doc, config.window, device, config.head_dim)
        if mask is None:
            mask = causal_mask(T, doc, config.window, device)
        return position, mask

    def embed(self, idx, position):
        """(B, T, C) token embeddings, with positions where they are added."""
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(position)
        elif self.config.position == 'sinusoidal':
            code = sinusoid(position, self.config.n_embd)
            x = x * math.sqrt(self.config.n_embd) + code.type_as(x)
        return self.drop(x)


# ---------------------------------------------------------------------------------------------
# Positions and masks


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


# ---------------------------------------------------------------------------------------------
# Writing


@torch.no_grad()
def generate(model, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0):
    """(B, T + max_new_tokens): token ids idx (B, T), continued. Call model.eval() before.

    The plain way: each token computes the whole window again. Scripts use core/net/engine.py, which
    has a cache. Temperature 0 takes the most probable token, top_k > 0 draws among that many.
    """
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size:], n_logits=1)[:, -1].float()
        if temperature == 0:
            new = logits.argmax(dim=-1, keepdim=True)
        else:
            if 0 < top_k < logits.size(-1):
                kth = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            new = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
        idx = torch.cat([idx, new], dim=1)
    return idx


# ---------------------------------------------------------------------------------------------
# Initialization, costs, and invalid configurations


@torch.no_grad()
def init_weights(model, seed: int, put=torch.Tensor.copy_) -> None:
    """All of initialization. What constructors set by themselves (core/net/weights.py notes it in
    model.own) stays. put(p, values) fills a parameter that may be here in part only.

    Norms are 1, biases 0. Matrices that write into the residual stream (o_proj, down_proj) are 0,
    so each block begins as the identity; an untied head is 0, so the first loss is exactly log(V).
    Other matrices are normal with std 1 / sqrt(3 n_in), GPT-2's 0.02 at 768 channels. Position and
    tied embeddings have std 0.02, an untied embedding 1. LSTM forget gates start open (bias 1).
    On one kind of device, a parameter's numbers depend only on (seed, its name), not on which
    others are made here.
    """
    own = getattr(model, 'own', ())
    for name, p in model.named_parameters():
        if name == 'lm_head.weight' and model.config.tied:
            name = 'wte.weight'     # on a pipeline stage without the embedding
        if name in own:
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


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model, block_size: int = 0) -> int:
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


CHOICES = {'arch': ('gpt', 'lstm'), 'norm': ('rmsnorm', 'layernorm'), 'mlp': (
    'swiglu', 'gelu', 'relu2'), 'position': ('rope', 'learned', 'sinusoidal', 'none')}


def check(config: GPTConfig) -> None:
    """Raise ValueError, naming the setting, for a model that cannot be."""
    def refuse(name, why):
        raise ValueError(f'{name}={getattr(config, name)}: {why}')
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            refuse(name, f'must be one of {", ".join(allowed)}')
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        if getattr(config, name) < 1:
            refuse(name, 'must be at least 1')
    for name in ('n_kv_head', 'head_dim', 'n_hidden', 'window', 'dropout', 'n_classes'):
        if getattr(config, name) < 0:
            refuse(name, 'must not be negative')
    n_head, n_embd, rope = config.n_head, config.n_embd, config.position == 'rope'
    if config.dropout >= 1:
        refuse('dropout', 'must be below 1')
    if config.arch == 'gpt' and not config.head_dim and n_embd % n_head:
        refuse('n_embd', f'must be divisible by n_head={n_head} (or set head_dim)')
    if n_head % (config.n_kv_head or n_head):
        refuse('n_kv_head', f'must divide n_head={n_head}')
    if rope and (head_dim := config.head_dim or n_embd // n_head) % 2:
        raise ValueError(f'head_dim={head_dim}: must be even for position=rope')
    if config.rope_scaling:
        try:
            factor, low, high, context = map(float, config.rope_scaling.split(','))
            fits = rope and factor >= 1 and 0 < low < high and context > 0
        except ValueError:
            fits = False
        if not fits:
            refuse('rope_scaling', 'must be four numbers like 32,1,4,8192 (for position=rope), '
                   'or empty')
    if config.n_classes and config.tied:
        refuse('n_classes', 'a classifier needs tied=False')
    if config.position == 'sinusoidal' and n_embd % 2:
        refuse('n_embd', 'must be even for position=sinusoidal')
