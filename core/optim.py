"""AdamW groups, Muon, and the learning-rate schedules."""
import math
import statistics

import torch
from torch import nn

SCHEDULES = ('cosine', 'linear', 'wsd', 'constant')


def schedule(step: int, max_steps: int, kind: str, warmup_steps: int = 0,
             decay_fraction: float = 0.5, min_lr_fraction: float = 0.0) -> float:
    """The factor on every learning rate at `step` (0 .. max_steps - 1): a pure function.

    All kinds rise linearly over warmup_steps. Then 'cosine' falls along half a cosine
    (Loshchilov & Hutter 2017), 'linear' along a line, 'wsd' (warmup-stable-decay, Hu et al. 2024)
    stays at 1 and falls along a line over the last decay_fraction of all steps; each ends at
    min_lr_fraction. 'constant' stays at 1.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == 'constant':
        return 1.0
    begin = warmup_steps
    if kind == 'wsd':
        begin = max(begin, round((1 - decay_fraction) * max_steps))
    progress = min(1.0, max(0.0, (step - begin) / max(1, max_steps - begin)))
    height = 0.5 * (1 + math.cos(math.pi * progress)) if kind == 'cosine' else 1 - progress
    return min_lr_fraction + (1 - min_lr_fraction) * height


def newton_schulz(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push the singular values of each matrix in g (n, rows, cols) towards 1.

    A quintic iteration x -> a x + (b A + c A^2) x with A = x x^T, from the matrix divided by its
    Frobenius norm (Jordan et al. 2024, "Muon"). It ends near, not at, 1: about 0.7 to 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if tall := x.size(1) > x.size(2):
        x = x.mT
    for _ in range(steps):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: for the hidden matrices (Jordan et al. 2024).

    The step of a matrix is its Nesterov momentum with all singular values set to about 1, times
    lr * sqrt(max(1, rows / cols)); weight decay is decoupled. Matrices of one shape are stacked, so
    that a step takes a few batched products. The iteration needs no precision: bfloat16 will do.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, ns_steps=5,
                 dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      ns_steps=ns_steps))
        self.dtype = dtype  # of the Newton-Schulz iteration

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list] = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                self.step_stacked(params, group, max(1, shape[0] / shape[1]) ** 0.5)

    def step_stacked(self, params, group, scale: float) -> None:
        """One step for matrices of one shape."""
        for p in params:
            if 'momentum' not in self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        momenta = [self.state[p]['momentum'] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
        ahead = torch._foreach_lerp(grads, momenta, group['momentum'])
        update = newton_schulz(torch.stack(ahead).to(self.dtype), group['ns_steps'])
        update = update.to(params[0].dtype).unbind()
        if group['weight_decay']:
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_add_(params, update, alpha=-group['lr'] * scale)


def make_optimizers(model: nn.Module, optimizer: str, learning_rate: float, weight_decay: float,
                    beta1: float = 0.9, beta2: float = 0.95, muon_learning_rate: float = 0.02,
                    muon_weight_decay: float = 0.0, muon_momentum: float = 0.95,
                    ns_steps: int = 5, embed_learning_rate: float = 0.0,
                    muon_dtype=torch.float32) -> list:
    """The optimizers of a model; every group remembers its peak rate as `base_lr`.

    'adamw': AdamW for everything, decay on matrices only. 'muon': Muon for the matrices inside the
    blocks, AdamW for embeddings, head, norms and biases. The embedding has a rate of its own if
    embed_learning_rate is not 0.
    """
    named = dict(model.named_parameters())
    hidden = [p for name, p in named.items() if p.ndim == 2 and name.startswith(('h.', 'lstm.'))]
    embedding = [p for name, p in named.items() if name in ('wte.weight', 'wpe.weight')]
    apart = {id(p) for p in embedding} if embed_learning_rate else set()
    if optimizer == 'muon':
        apart |= {id(p) for p in hidden}
    rest = [p for p in named.values() if id(p) not in apart]
    groups = [{'params': [p for p in rest if p.ndim >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in rest if p.ndim < 2], 'weight_decay': 0.0}]
    if embed_learning_rate:
        groups.append({'params': embedding, 'weight_decay': weight_decay,
                       'lr': embed_learning_rate})
    optimizers = [torch.optim.AdamW([g for g in groups if g['params']], lr=learning_rate,
                                    betas=(beta1, beta2), fused=True)]
    if optimizer == 'muon':
        optimizers.append(Muon(hidden, muon_learning_rate, muon_momentum, muon_weight_decay,
                               ns_steps, muon_dtype))
    for group in (group for o in optimizers for group in o.param_groups):
        group['base_lr'] = group['lr']
    return optimizers


def set_learning_rate(optimizers, factor: float) -> None:
    """Set every group's rate to `factor` times its peak."""
    for group in (group for o in optimizers for group in o.param_groups):
        group['lr'] = group['base_lr'] * factor


# ---------------------------------------------------------------------------------------------
# A step that is only made if its gradient is good


def clip_gradients(model: nn.Module, optimizers, scaler, grad_clip: float) -> torch.Tensor:
    """Unscale the gradients and scale them down to the norm grad_clip (0: do not); their norm."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    return norm


def spike_limit(grad_norms: list[float], sigma: float) -> float:
    """The gradient norm above which a step is a spike: mean + sigma deviations of those before it.

    Infinite as long as there are fewer than 20, and for sigma 0.
    """
    if not sigma or len(grad_norms) < 20:
        return math.inf
    return statistics.fmean(grad_norms) + sigma * statistics.pstdev(grad_norms)


def problem(loss: float, grad_norm: float, limit: float) -> str:
    """Why a step must be skipped, '' if its loss and gradient norm are good."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f'loss {loss:g}, gradient norm {grad_norm:g}'
    return f'gradient norm {grad_norm:.4g} is above {limit:.4g}' if grad_norm > limit else ''


def apply_gradients(optimizers, scaler, factor: float, skip: bool) -> None:
    """Step all optimizers at `factor` times their peak rates, or none, and drop the gradients.

    Skipping is a branch: a NaN times 0 is a NaN, and a step with zero gradients moves AdamW.
    """
    set_learning_rate(optimizers, factor)
    for optimizer in optimizers:
        if not skip:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
