"""AdamW groups, Muon, and the learning-rate schedules."""
import math
import statistics

import torch
import torch.nn.functional as F
from torch import nn

from core.net.weights import named_weights

OPTIMIZERS = ('adamw', 'muon')
SCHEDULES = ('cosine', 'linear', 'wsd', 'constant')


def schedule(step: float, max_steps: int, kind: str, warmup_steps: int = 0,
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


def on_stack(iterate, matrices, dtype) -> list:
    """iterate(stack of the matrices, in dtype), as a list again."""
    return iterate(torch.stack(matrices).to(dtype)).to(matrices[0].dtype).unbind()


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

    The step of a matrix is its Nesterov momentum with all singular values set to about 1 and then
    each row (what one output learns) to length 1, times lr; weight decay is decoupled. (NorMuon, Li
    et al. 2025, divides rows by a running mean of their lengths; the current lengths do nearly as
    well.) Matrices of one shape are stacked, so that a step takes a few batched products, in the
    precision `dtype`: bfloat16 is enough. `spread(iterate, matrices, dtype)` applies the iteration
    to whole matrices, of which this process may hold parts.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, ns_steps=5,
                 dtype=torch.float32, spread=on_stack):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      ns_steps=ns_steps))
        self.dtype, self.spread = dtype, spread

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            alike: dict[tuple, list] = {}   # in shape, and in how they lie on several ranks
            for p in group['params']:
                if p.grad is not None:
                    alike.setdefault((p.shape, getattr(p, 'placements', ())), []).append(p)
            for params in alike.values():
                self.step_stacked(params, group)

    def step_stacked(self, params, group) -> None:
        """One step for matrices of one shape."""
        for p in params:
            if 'momentum' not in self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        momenta = [self.state[p]['momentum'] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
        ahead = [grad.clone() for grad in grads]
        torch._foreach_lerp_(ahead, momenta, group['momentum'])
        update = self.spread(lambda stack: F.normalize(
            newton_schulz(stack, group['ns_steps']), dim=2), ahead, self.dtype)
        if group['weight_decay']:
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_add_(params, update, alpha=-group['lr'])


def make_optimizers(model: nn.Module, optimizer: str, learning_rate: float, weight_decay: float,
                    beta1: float = 0.9, beta2: float = 0.95, muon_learning_rate: float = 0.02,
                    muon_weight_decay: float = 0.0, muon_momentum: float = 0.95,
                    ns_steps: int = 5, embed_learning_rate: float = 0.0,
                    muon_dtype=torch.float32, spread=on_stack) -> list:
    """The optimizers of a model; every group remembers its peak rate as `base_lr`.

    'adamw': AdamW for everything, decay on matrices only. 'muon': Muon for the matrices of linear
    layers inside the blocks, AdamW for all else. The embedding has a rate of its own if
    embed_learning_rate is not 0. Parameters that require no gradient are left out.
    """
    named = {name: p for name, p in named_weights(model).items() if p.requires_grad}
    hidden = [p for name, p in named.items() if p.ndim == 2 and (
        name.startswith('lstm.') or name.startswith('h.') and isinstance(
            model.get_submodule(name.rpartition('.')[0]), nn.Linear))]
    embedding = [p for name, p in named.items() if name in ('wte.weight', 'wpe.weight')]
    apart = {id(p) for p in embedding} if embed_learning_rate else set()
    if optimizer == 'muon':
        apart |= {id(p) for p in hidden}
    rest = [p for p in named.values() if id(p) not in apart]
    decays = lambda p: sum(n > 1 for n in p.shape) > 1      # not gains of (1, H, 1, 1)
    mesh_of = lambda p: getattr(p, 'device_mesh', None)     # of ranks; None: all of p is here
    groups = [{'params': [p for p in rest if decays(p)], 'weight_decay': weight_decay},
              {'params': [p for p in rest if not decays(p)], 'weight_decay': 0.0}]
    if embed_learning_rate:
        groups.append({'params': embedding, 'weight_decay': weight_decay,
                       'lr': embed_learning_rate})
    # a fused step takes either whole tensors, or those that lie on one mesh of ranks
    groups = [group | {'params': [p for p in group['params'] if mesh_of(p) == mesh]}
              for group in groups for mesh in dict.fromkeys(map(mesh_of, group['params']))]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)]
    if optimizer == 'muon':
        optimizers = [*optimizers, Muon(hidden, muon_learning_rate, muon_momentum,
                                        muon_weight_decay, ns_steps, muon_dtype, spread)]
    for group in (group for o in optimizers for group in o.param_groups):
        group['base_lr'] = group['lr']
    return optimizers


# ---------------------------------------------------------------------------------------------
# A step that is only made if its gradient is good


class LossScale:
    """Multiplies the loss so that fp16 gradients do not underflow (Micikevicius et al. 2018).

    Halved after a step whose gradient was not finite, doubled after 2,000 good ones. Every rank and
    pipeline stage sees the same norm, so all have the same scale, where torch's GradScaler looks at
    one rank only. If it is not enabled, `scale` stays 1.
    """

    def __init__(self, enabled: bool):
        self.enabled, self.good_steps = enabled, 0
        self.scale = 65536.0 if enabled else 1.0

    def update(self, finite: bool) -> None:
        """After a step whose gradient was finite, or not."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps % 2000 == 0:
            self.scale *= 2

    def state_dict(self) -> dict:
        return {'scale': self.scale, 'good_steps': self.good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict) -> None:
        """Take over what state_dict gave; nothing, if one of them is disabled."""
        if self.enabled and state:
            self.scale, self.good_steps = float(state['scale']), int(state.get('good_steps', 0))


def clip_gradients(grads, grad_clip: float, norm: float, scale: float = 1.0) -> None:
    """Divide gradients by `scale`, and scale them down to the norm grad_clip (0: any) if `norm`,
    which is that of the divided ones, is larger."""
    factor = torch.ones((), dtype=grads[0].dtype)
    if grad_clip:
        factor = (grad_clip / (factor * norm + 1e-6)).clamp(max=1.0)
    if (factor := factor.item() / scale) != 1:
        torch._foreach_mul_(grads, factor)


def spike_limit(grad_norms: list[float], sigma: float) -> float:
    """The gradient norm above which a step is a spike: mean + sigma deviations of those before it;
    infinite for sigma 0, and before there are 20 norms."""
    if not sigma or len(grad_norms) < 20:
        return math.inf
    return statistics.fmean(grad_norms) + sigma * statistics.pstdev(grad_norms)


def problem(loss: float, grad_norm: float, limit: float) -> str:
    """Why a step must be skipped, '' if its loss and gradient norm are good."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f'loss {loss:g}, gradient norm {grad_norm:g}'
    return f'gradient norm {grad_norm:.4g} is above {limit:.4g}' if grad_norm > limit else ''


def apply_gradients(optimizers, factor: float, skip: bool) -> None:
    """Step all optimizers at `factor` times their peak rates, or none, and drop the gradients.
    Skipping is a branch: a NaN times 0 is a NaN, and a step with zero gradients moves AdamW."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['base_lr'] * factor
        if not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
