"""What a training step does beside forward, loss and backward, which are in train_step of each
stage: random numbers of dropout, exchange between ranks, clipping, skipping, update."""
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from core.device import Device
from core.net import optim
from core.net.optim import LossScale
from core.ranks import parallel, processes
from core.ranks.processes import IGNORE, Ranks, print0
from core.run import models
from core.settings import stop
from model import count_parameters

NO_MEMORY = ('the GPU has too little memory; give --activation_checkpointing, a smaller '
             '--micro_batch_size or --block_size, or train.py on several GPUs --zero=3')


class Step(NamedTuple):
    """What a step has come to: the same on all ranks."""
    means: list[float]      # the loss, then the means of what else the stage sums
    norm: float             # of the gradient
    skipped: str            # why the gradient was not applied; '' if it was
    asked: bool             # whether a signal asks the run to end


@dataclass
class Learner:
    """A model, or this rank's part of it, and all that changes it."""
    model: torch.nn.Module      # has the parameters
    trained: Callable           # what runs them: see parallel.wrap
    optimizers: list
    scaler: LossScale
    device: Device
    ranks: Ranks
    grad_clip: float = 0.0      # largest gradient norm; 0: no clipping
    seed: int | None = None     # of dropout; None: there is none
    trial: bool = False         # the step is only tried: nothing is exchanged or changed

    def loss_divisor(self, n_targets: float) -> torch.Tensor:
        """What this rank divides its sums of losses by, so that the gradient is that of the mean
        loss over the n_targets of all ranks. DDP and FSDP divide gradients by the number of
        data-parallel ranks; fp16 scales the loss."""
        n = torch.tensor(float(n_targets))
        if not self.trial:
            n = processes.all_sum(n, self.device) / (self.ranks.world // self.ranks.dp)
        return n / (self.scaler.scale * self.ranks.dp)

    def micro_batches(self, batches, step: int) -> Iterator[tuple]:
        """The micro-batches of a step on the device, each with its own random numbers for dropout.
        Only the backward pass of the last one exchanges gradients."""
        for micro_step, batch in enumerate(batches):
            self.seed_dropout(step, micro_step)
            last = micro_step == len(batches) - 1 and not self.trial
            with parallel.accumulate(self.trained, self.ranks, last):
                yield to_device(batch, self.device)

    def autocast(self):
        """The context of forward passes: their precision."""
        return self.device.autocast(cache=self.ranks.zero < 3)

    def update(self, sums: list, factor: float, limit=math.inf, request=None) -> Step | None:
        """Clip the gradient and apply it, at `factor` times the learning rates; not if loss or
        gradient is not finite on any rank, or the gradient's norm is above `limit`. `sums` has for
        each micro-batch its sum of losses by `loss_divisor`, or (k,) with what else is reported."""
        if self.trial:
            return None
        ranks, device, scaler = self.ranks, self.device, self.scaler
        parallel.complete_gradients(self.model, ranks)
        # The step's only wait for the device: one sum over the ranks carries all that they must
        # agree on, which is loss, norm and requests to stop.
        asked = torch.tensor([bool(request and request.asked)], device=device.name)
        gradients = parallel.local_gradients(self.model, ranks)
        squared_norm = parallel.squared_norm(gradients, device.sums)
        nothing = torch.zeros(1, dtype=device.sums, device=device.name)
        total = sum((one.detach() for one in sums), nothing)
        report = torch.cat([total * ranks.owns_loss / ranks.dp, squared_norm[None], asked])
        *means, squared_norm, asked = processes.all_sum(report, device).tolist()
        means = [mean / scaler.scale for mean in means]
        norm = math.sqrt(squared_norm) / scaler.scale
        skipped = optim.problem(means[0], norm, limit)
        if not skipped:
            optim.clip_gradients(sum(gradients.values(), []), self.grad_clip, norm, scaler.scale)
        del gradients       # each goes as soon as its optimizer has made its step
        scaler.update(math.isfinite(norm))
        optim.apply_gradients(self.optimizers, factor, skip=bool(skipped))
        return Step(means, norm, skipped, asked > 0)

    def seed_dropout(self, step: int, micro_step: int) -> None:
        """Seed dropout for a pass. Ranks that have other data, layers or positions get other random
        numbers. Tensor-parallel ranks get the same: they drop the same elements of the residual
        stream."""
        if self.seed is None:
            return
        ranks = self.ranks
        more = () if ranks.pp == ranks.tp == 1 else (
            ranks.pp_rank, ranks.tp_rank if ranks.sequence_parallel else 0)
        key = np.random.SeedSequence((self.seed, step, micro_step, ranks.dp_rank, *more))
        torch.manual_seed(int(key.generate_state(1)[0]))

    def tell_sizes(self, n_steps: int, batch_size: int, what: str, n: int) -> dict:
        """Print how many parameters learn, in how many steps, from n rows, pairs, ...; returns the
        numbers of parameters."""
        n_all = count_parameters(self.model)
        n_learnt = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        print0(f'{n_learnt:,} of {n_all:,} parameters learn ({n_learnt / n_all:.2%}); {n_steps:,} '
               f'steps of {batch_size} {what}, {n / batch_size:,.1f} an epoch')
        return {'parameters': n_all, 'trained': n_learnt}

    def fit_rows(self, step_on, batch_of, rows: int) -> int:
        """`rows`, halved until a GPU has memory for a pass over batch_of(range(rows)) beside the
        optimizer's state. Not tried where ranks share a model: if one fails, the others wait."""
        while self.device.kind == 'cuda' and self.ranks.plain:
            state, full, self.trial = [], False, True
            try:
                state += [p.new_empty(2, *p.shape) for p in self.model.parameters()
                          if p.requires_grad]
                step_on(self, [batch_of(range(rows))], 0, 0.0)
            except torch.OutOfMemoryError:
                full = True
            state.clear()
            self.model.zero_grad()
            self.trial = False
            if not processes.any_rank(full):
                break
            if rows == 1:
                stop(NO_MEMORY)
            rows = math.ceil(rows / 2)
            print0(f'out of memory; tried again with {rows} rows at a time')
        return rows

    def warm_up(self, step_on, batches_of) -> float:
        """Compile the model by a step with a learning rate of 0, after which all is as it was;
        returns its seconds. DDP also arranges its buckets then: else the first step after resuming
        would add up gradients in another order."""
        if not self.device.compile and self.ranks.world == 1:
            return 0.0
        began, state = time.perf_counter(), self.scaler.state_dict()
        try:
            step_on(self, batches_of(0), 0, 0.0)
        except torch.OutOfMemoryError:
            stop(NO_MEMORY)
        self.device.synchronize()
        for o in self.optimizers:
            o.state.clear()
        self.scaler.load_state_dict(state)
        if self.device.compile:
            print0(f'compiled in {time.perf_counter() - began:.1f} s')
        return time.perf_counter() - began

    def restore(self, run, state: dict) -> None:
        """Take weights, optimizer state and scale from the checkpoint that `state` is of."""
        models.load_weights(self.model, run, state['step'], parallel.put)
        models.load_optimizers(self.model, self.optimizers, run, state['step'], parallel.put)
        self.scaler.load_state_dict(state['scaler'])


def count_targets(batches) -> int:
    """How many tokens micro-batches (x, y, ...) have to predict."""
    return sum(int((y != IGNORE).sum()) for _, y, *_ in batches)


def to_device(batch, device: Device) -> tuple:
    """The tensors of a batch, or None where there is none, on the device."""
    return tuple(t if t is None else t.to(device.name, non_blocking=True) for t in batch)
