"""The model's operations where plain PyTorch is not fast enough. Each equals a plain line:

    Linear(i, o)(x)                     nn.Linear(i, o)(x)
    cast_once(x)                        x
    attend(q, k, v, mask, dropout)      F.scaled_dot_product_attention(
                                            q, k, v, mask, dropout, enable_gqa=True,
                                            is_causal=mask is None and q.size(2) > 1)
    flex_mask(T, doc, window, ...)      None, so that the model makes its causal_mask
    gelu(x)                             F.gelu(x, approximate='tanh')
    recomputed(f, x, y)                 f(x, y)
    lm_loss(head, x, targets, how)      F.cross_entropy(
                                            head(x).flatten(0, 1), targets.flatten(), reduction=how)
    tail(x, n)                          x[:, -n:]

To understand the model, read the right-hand side and skip the rest of this file.
tests/net/test_kernels.py puts these lines into the model and finds the same numbers; docs/LOG.md
says what each kernel is worth.
"""
import contextlib
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from core.device import has_flex, is_intel

# ---------------------------------------------------------------------------------------------
# Products


class Linear(nn.Linear):
    """nn.Linear, with faster products in fp32 on a CPU.

    Compiled training uses `ProductByCore` if each core has at least as many rows as the matrix's
    shorter side; with fewer, adding up the cores' gradients of the matrix would cost too much.
    Eager inference uses oneDNN for large matrices: for a few rows it is faster than MKL, torch's
    choice. For one row MKL is faster on Intel's processors; on others it uses one core only.
    Compiled inference has MKL alone: Inductor uses oneDNN for frozen weights only.
    """
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    fewest_rows = 2 if is_intel() else 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cores = torch.get_num_threads()    # which Dynamo would not trace

    def forward(self, x):
        weight, bias = self.weight, self.bias
        if type(x) is torch.Tensor and x.device.type == 'cpu' \
                and x.dtype == weight.dtype == torch.float32 \
                and not torch.is_autocast_enabled('cpu'):
            rows = x.numel() // self.in_features
            if torch.compiler.is_compiling():
                if torch.is_grad_enabled() and (n := self.cores) > 1 and rows % n == 0 \
                        and rows // n >= min(weight.shape):
                    y = ProductByCore.apply(x.reshape(n, -1, self.in_features), weight)
                    y = y.view(*x.shape[:-1], -1)
                    return y if bias is None else y + bias
            elif self.onednn and not torch.is_grad_enabled() and weight.numel() >= 1 << 19 \
                    and rows >= self.fewest_rows:
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
        return F.linear(x, weight, bias)


class ProductByCore(torch.autograd.Function):
    """x W^T, (cores, rows, O), of x (cores, rows, C) and W (O, C). Each core computes its own rows
    in both passes, as in the kernels between two products, so they stay in its cache; MKL would cut
    some products by columns. 4 blocks of 128 channels train 7% faster on 2 cores."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.t().expand(len(x), -1, -1))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (torch.bmm(grad, weight.expand(len(x), -1, -1)),
                torch.bmm(grad.mT, x).sum(dim=0))


def cast_once(x):
    """x in the dtype of autocast's products, if autocast is on. Otherwise each product of q, k, v,
    or of gate and up, would make its own copy, and keep it for the backward pass."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# ---------------------------------------------------------------------------------------------
# Attention

CAUSAL_BLOCK = 128
GPU = 'cuda'    # where there is flex-attention, and cuDNN among SDPA's kernels
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
compiled = functools.cache(lambda f: torch.compile(f))


def attend(q, k, v, mask, dropout: float):
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, H or fewer, S, D): (B, H, T, D).

    mask: None (causal, or all of the cache for one query), boolean or added to the scores
    (.., T, S), or a BlockMask.
    """
    gqa = {'enable_gqa': True} if q.size(1) != k.size(1) else {}
    if mask is not None and not isinstance(mask, torch.Tensor):
        return fused(flex_attention, q, k, v, block_mask=mask, **gqa)
    causal = mask is None and q.size(2) > 1     # a single query sees all keys
    short = q.device.type == 'cpu' and q.size(2) <= 4 * CAUSAL_BLOCK
    if short and mask is None and torch.compiler.is_compiling():
        if not causal and not dropout:
            return attend_with_one(q, k, v)
        if causal and not gqa:
            return attend_in_blocks(q, k, v, dropout)
    # For short windows the CPU's kernel is up to 4 times slower backward in bf16 than in fp32, and
    # less exact. A single query would wait for the conversion of all keys.
    if short and q.dtype == torch.bfloat16 and q.size(2) > 1:
        with torch.autocast('cpu', enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, dropout).type_as(q)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.type_as(q)
    # cuDNN makes a plan for each new length of keys, and its gradients with a mask can be NaN
    # (PyTorch's issue 196678): it only trains without one.
    others = q.device.type == GPU and (mask is not None or not torch.is_grad_enabled())
    with sdpa_kernel(NOT_CUDNN) if others else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                              is_causal=causal, **gqa)


def attend_in_blocks(q, k, v, dropout: float = 0.0):
    """Causal attention, all of (B, H, T, D): each block of queries with the keys up to its end.
    Compiled for a CPU and short windows this is up to twice as fast as the CPU's kernel; all
    probabilities are kept for the backward pass."""
    parts = []
    for start in range(0, q.size(2), CAUSAL_BLOCK):
        end = min(start + CAUSAL_BLOCK, q.size(2))
        scores = (q[:, :, start:end] @ k[:, :, :end].mT).float() / math.sqrt(q.size(-1))
        place = torch.arange(end, device=q.device)
        scores = scores.masked_fill(place > place[start:, None], -math.inf)
        p = F.dropout(scores.softmax(dim=-1).type_as(v), dropout)
        parts.append(p @ v[:, :, :end])
    return torch.cat(parts, dim=2)


def attend_with_one(q, k, v):
    """Attention of one query, (B, H, 1, D), to all of k and v, (B, H or fewer, S, D). Compiled for
    a CPU this saves 3% of a token's time."""
    q = q.reshape(q.size(0), k.size(1), -1, 1, q.size(-1))      # (B, H_k, H / H_k, 1, D)
    k, v = k[:, :, None], v[:, :, None]
    scores = (q.float() / math.sqrt(q.size(-1)) * k).sum(dim=-1)
    y = (scores.softmax(dim=-1)[..., None] * v).sum(dim=-2)
    return y.flatten(1, 2)[:, :, None].type_as(v)


def flex_mask(T: int, doc, window: int, device: torch.device, head_dim: int):
    """model.causal_mask as a BlockMask: flex-attention skips the blocks that are masked. None if
    only the future is masked, and where there is no flex-attention."""
    if doc is None and not 0 < window < T or device.type != GPU or not has_flex(device, head_dim):
        return None

    def sees(b, h, q, k):
        seen = k <= q
        if window:
            seen = seen & (k > q - window)
        return seen if doc is None else seen & (doc[b, q] == doc[b, k])

    B = None if doc is None else doc.size(0)
    return fused(create_block_mask, sees, B, None, T, T, device=device)


def fused(f, *args, **options):
    """f(*args, **options), compiled: as a part of the graph that is being compiled, or alone where
    the model runs eagerly. Eager flex-attention and its mask would make tensors of T x T."""
    if torch.compiler.is_compiling():
        return f(*args, **options)
    with torch.compiler.set_stance('default'):
        return compiled(f)(*args, **options)


# ---------------------------------------------------------------------------------------------
# Activation


def gelu(x):
    """GELU's approximation with a tanh (Hendrycks & Gimpel 2016, section 2): 1 + tanh(u) is
    2 sigmoid(2 u), which compiled for a CPU takes half the time."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x ** 3))
    return F.gelu(x, approximate='tanh')


LARGE = 1 << 20     # elements; below, what recomputing saves is not worth its 0.2 ms of Python


def recomputed(f, x, y):
    """f(x, y), of which the backward pass computes again what it needs, instead of keeping it. For
    an activation and the product after it (Chen et al. 2016, section 4) this costs the activation:
    torch's checkpoint stops as soon as the product has its input. Compiled, the graph chooses."""
    if torch.is_grad_enabled() and x.numel() >= LARGE and not torch.compiler.is_compiling():
        return checkpoint(f, x, y, use_reentrant=False)
    return f(x, y)


# ---------------------------------------------------------------------------------------------
# Loss

CHUNK_ELEMENTS = 1 << 24  # logits held at a time, 64 MiB in fp32; on a GPU 8 times as many


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


def token_losses(x, targets, lm_head) -> torch.Tensor:
    """(N,) cross-entropies of hidden states x (N, C), 0 where the target is -100; at least fp32."""
    logits = lm_head(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction='none')


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of logits = x @ weight.T, made one chunk of rows at a time.

    x (N, C), weight (V, C), targets (N,), -100 ignored. The gradient of the loss by the logits,
    softmax(logits) - onehot(target), follows from the logits, so the forward pass computes the
    gradients of x and weight, too, and no logits are kept or computed twice (as in Liger Kernel's
    fused linear cross-entropy, Hsu et al. 2024).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, in_graph):
        """The sum, a scalar; chunk: rows of x whose logits exist at a time; in_graph: whether the
        model is compiled, so that this should be."""
        dx = torch.empty_like(x)
        learns = ctx.needs_input_grad[1]    # with adapters it does not
        precision = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=precision) if learns else None
        total, by_logits = 0.0, compiled(loss_by_logits) if in_graph else loss_by_logits
        for i in range(0, len(x), chunk):
            rows = x[i:i + chunk]
            loss, grad = by_logits(rows @ weight.T, targets[i:i + chunk])
            total = total + loss
            dx[i:i + chunk] = grad @ weight
            if learns and rows.dtype == grad.dtype == precision:
                dweight.addmm_(grad.T, rows)    # without a second tensor of the matrix's size
            elif learns:
                dweight += grad.T @ rows
        ctx.save_for_backward(dx, dweight.to(weight.dtype) if learns else None)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors         # changed in place: a second call is an error
        dweight = dweight if dweight is None else dweight.mul_(grad.to(dweight.dtype))
        return dx.mul_(grad.to(dx.dtype)), dweight, None, None, None


def loss_by_logits(raw, target):
    """Sum of the cross-entropies of logits raw (N, V), which it may change, and its gradient."""
    grad = raw.to(torch.promote_types(raw.dtype, torch.float32))    # logits, then the gradient
    counts, at = (target != -100).to(grad.dtype)[:, None], target.clamp(min=0)[:, None]
    highest = grad.amax(dim=-1, keepdim=True)
    right = grad.gather(1, at) - highest
    mass = grad.sub_(highest).exp_().sum(dim=-1, keepdim=True)
    loss = ((mass.log() - right) * counts).sum()
    grad.div_(mass).scatter_add_(1, at, -torch.ones_like(counts)).mul_(counts)
    return loss, grad.type_as(raw)


# Not compiled as a whole: a graph would keep each chunk's gradient of the head until all are added
# up. (torch._disable_dynamo is torch.compiler.disable that imports the compiler when it is called.)
@torch._disable_dynamo
def chunked_sum(*args) -> torch.Tensor:
    return ChunkedCrossEntropy.apply(*args)


@torch._disable_dynamo
def recomputed_losses(x, targets, lm_head, chunk: int) -> torch.Tensor:
    """`token_losses` of `chunk` rows at a time, which the backward pass computes again."""
    return torch.cat([checkpoint(token_losses, f, t, lm_head, use_reentrant=False)
                      for f, t in zip(x.split(chunk), targets.split(chunk))])


def tail(x, n: int, n_real=None) -> torch.Tensor:
    """The last n of the first n_real[b] positions of each row of x (B, T, C); n_real None: of T."""
    if n_real is None:
        return x if n == x.size(1) else x[:, -n:]
    at = (n_real[:, None] - n + torch.arange(n, device=x.device)).clamp(min=0)
    return x.gather(1, at[..., None].expand(-1, -1, x.size(-1)))
