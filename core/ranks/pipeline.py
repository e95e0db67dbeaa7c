"""Pipeline parallelism: the micro-batches of a step on their way through the stages of a model."""
import torch
from torch.distributed import pipelining
from torch.nn.parallel import DistributedDataParallel

SCHEDULES = {'1f1b': pipelining.Schedule1F1B,
             'interleaved': pipelining.ScheduleInterleaved1F1B}


def fitting(n_micro: int, ranks) -> int:
    """The least number of micro-batches, from n_micro on, that the schedule can take."""
    n = max(n_micro, ranks.pp)
    while ranks.pp_schedule == 'interleaved' and n % (n // ranks.pp):
        n += 1
    return n


class Pipeline:
    """Runs this rank's stages, the modules `parts`, compiled or in DDP. Each step has `n_micro`
    micro-batches of rows x block_size tokens. passes(ranks) is the context of the passes."""

    def __init__(self, parts, ranks, device, n_micro: int, rows: int, passes):
        self.ranks, self.n_micro, self.device = ranks, n_micro, torch.device(device.name)
        self.autocast, self.passes = device.autocast, passes
        self.first = 0 in ranks.stages
        self.divisor = 1.0      # of the losses, in the step under way
        stages = [self.stage(part, i, device, rows) for i, part in zip(ranks.stages, parts)]
        single = len(stages) == 1
        self.schedule = SCHEDULES[ranks.pp_schedule](
            stages[0] if single else stages, n_micro, scale_grads=False,
            loss_fn=lambda loss, target: loss / self.divisor)

    def stage(self, part, i: int, device, rows: int):
        """Stage i. The shapes that it receives and sends are given: else it would try them out."""
        inner = part.module if isinstance(part, DistributedDataParallel) else part
        config, n = inner.config, self.ranks.n_stages
        dtype = next(inner.parameters()).dtype
        hidden = torch.empty(rows, config.block_size, config.n_embd, dtype=dtype, device='meta',
                             requires_grad=True)
        ids = torch.empty(rows, config.block_size, dtype=torch.long, device='meta')
        sent = hidden if i < n - 1 else torch.empty((), dtype=dtype, device='meta')
        return pipelining.PipelineStage(
            part, i, n, self.device, input_args=hidden if i else ids,
            output_args=sent, group=self.ranks.mesh['pp'].get_group())

    def run(self, batches, divisor, step) -> torch.Tensor:
        """Sum of the losses of n_micro batches (x, y, doc), over divisor; 0 without the last stage.
        `step` is the schedule's step, which adds up gradients, or its eval."""
        x, y, doc = (None if t[0] is None else torch.cat(t).to(self.device)
                     for t in zip(*batches))
        self.divisor, losses = divisor, []
        options = {} if doc is None else {'doc': doc}
        # autocast is entered here so that micro-batches share what it converts
        with self.passes(self.ranks), self.autocast(cache=self.ranks.zero < 3):
            step(*((x,) if self.first else ()), targets=y, reduction='sum', target=y,
                 losses=losses, return_outputs=False, **options)
        return torch.stack(losses).detach().sum() if losses else y.new_zeros((), dtype=torch.float)

    def train(self, batches, divisor) -> torch.Tensor:
        """Forward and backward passes: the gradient of the sum of all losses over divisor."""
        return self.run(batches, divisor, self.schedule.step)

    def evaluate(self, batches) -> torch.Tensor:
        """The sum of the losses."""
        return self.run(batches, 1.0, self.schedule.eval)
