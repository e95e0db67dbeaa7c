"""One optimizer step, the same in pretraining, fine-tuning and preference optimization.

The gradient over all micro-batches of all ranks is made, looked at, clipped, and applied or left;
what the loss is, the stage says.
"""
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

from core.device import Device
from core.net import optim
from core.net.optim import LossScale
from core.ranks import parallel, processes
from core.ranks.processes import IGNORE, Ranks, print0
from core.run import checkpoint
from core.run.checkpoint import Progress
from core.settings import stop

NO_MEMORY = ('the GPU has too little memory; give --activation_checkpointing, a smaller '
             '--micro_batch_size or --block_size, or train.py on several GPUs --zero=3')


@dataclass
class Learner:
    """A model, or this rank's part of it, and all that changes it."""
    model: torch.nn.Module      # has the parameters
    trained: Callable           # what runs them: see parallel.wrap
    optimizers: list
    scaler: LossScale
    device: Device
    ranks: Ranks
    grad_clip: float            # largest gradient norm; 0: no clipping
    seed: int | None            # of dropout; None: there is none

    def step(self, batches, loss_sums, n_targets, step: int, factor: float, limit=math.inf,
             request=None) -> tuple[list[float], float, str, bool]:
        """One optimizer step over this rank's micro-batches, unless its gradient is no good.

        loss_sums(trained, batch) gives (k,) sums over a micro-batch: of the losses, then of what
        else is to be reported. The gradient is that of the sum of all ranks' losses over the sum of
        their n_targets. `factor` scales the learning rates. If loss or gradient
        are not finite on any rank, or the gradient's norm is above `limit`, weights and optimizer
        state stay as they are. Returns the k means, the gradient norm, why the step was skipped
        ('' if it was not), and whether a `request` to stop has come to any rank: the same on all.
        """
        ranks, device, scaler = self.ranks, self.device, self.scaler
        n_targets = processes.all_sum(torch.tensor(float(n_targets)), device)
        n_targets = n_targets / (ranks.world // ranks.dp)
        divisor = n_targets / (scaler.scale * ranks.dp)     # DDP and FSDP divide gradients by dp
        sums = torch.zeros(1, dtype=device.sums, device=device.name)
        if ranks.pp > 1:
            self.seed_dropout(step, 0)
            sums = sums + self.trained.train(batches, divisor)
        else:
            for micro_step, batch in enumerate(batches):
                self.seed_dropout(step, micro_step)
                batch = to_device(batch, device)
                last = micro_step == len(batches) - 1
                with parallel.accumulate(self.trained, ranks, last):
                    with device.autocast(cache=ranks.zero < 3):
                        means = loss_sums(self.trained, batch) / divisor
                    means[0].backward()
                sums = sums + means.detach()
        parallel.complete_gradients(self.model, ranks)
        # The step's only wait for the device. One sum over the ranks carries all that they must
        # agree on: were a single one to skip or to stop, the others would train another model, or
        # wait.
        asked = torch.tensor([bool(request and request.asked)], device=device.name)
        gradients = parallel.local_gradients(self.model, ranks)
        squared_norm = parallel.squared_norm(gradients, device.sums)
        report = torch.cat([sums * ranks.owns_loss / ranks.dp, squared_norm[None], asked])
        *means, squared_norm, asked = processes.all_sum(report, device).tolist()
        means = [mean / scaler.scale for mean in means]
        norm = math.sqrt(squared_norm) / scaler.scale
        skipped = optim.problem(means[0], norm, limit)
        if not skipped:
            optim.clip_gradients(sum(gradients.values(), []), self.grad_clip, norm, scaler.scale)
        del gradients       # each goes as soon as its optimizer has made its step
        scaler.update(math.isfinite(norm))
        optim.apply_gradients(self.optimizers, factor, skip=bool(skipped))
        return means, norm, skipped, asked > 0

    def seed_dropout(self, step: int, micro_step: int) -> None:
        """Other random numbers in each pass of each rank that has other data, layers or positions;
        the same ones on ranks that only share matrices, which must drop the same of the residual
        stream.
        """
        if self.seed is None:
            return
        ranks = self.ranks
        more = () if ranks.pp == ranks.tp == 1 else (
            ranks.pp_rank, ranks.tp_rank if ranks.sequence_parallel else 0)
        key = np.random.SeedSequence((self.seed, step, micro_step, ranks.dp_rank, *more))
        torch.manual_seed(int(key.generate_state(1)[0]))

    def fit_rows(self, rows: int, batch_of, loss_sums) -> int:
        """`rows`, halved until a GPU has memory for a pass over batch_of(range(rows)) beside the
        optimizer's state. The pass exchanges nothing: a rank that runs out of memory would leave
        the others waiting. So nothing is tried where ranks share a model."""
        while self.device.kind == 'cuda' and self.ranks.plain:
            state, full = [], False
            try:
                state += [p.new_empty(2, *p.shape) for p in self.model.parameters()
                          if p.requires_grad]
                with parallel.accumulate(self.trained, self.ranks, False), self.device.autocast():
                    batch = to_device(batch_of(range(rows)), self.device)
                    loss_sums(self.trained, batch)[0].backward()
            except torch.OutOfMemoryError:
                full = True
            state.clear()
            self.model.zero_grad()
            if not processes.any_rank(full):
                break
            if rows == 1:
                stop(NO_MEMORY)
            rows = math.ceil(rows / 2)
            print0(f'out of memory; tried again with {rows} rows at a time')
        return rows

    def time_steps(self, do_step, n: int) -> list[float]:
        """Seconds of each of n steps that change nothing: their learning rate is 0."""
        times, state = [], self.scaler.state_dict()
        for _ in range(n):
            began = time.perf_counter()
            try:
                do_step(0, 0.0)
            except torch.OutOfMemoryError:
                stop(NO_MEMORY)
            self.device.synchronize()
            times.append(time.perf_counter() - began)
        for o in self.optimizers:
            o.state.clear()
        self.scaler.load_state_dict(state)
        return times

    def restore(self, run, state: dict) -> None:
        """Take weights, optimizer state and scale from a run's checkpoint with this state.json."""
        checkpoint.load_weights(self.model, run, state['step'], parallel.put)
        checkpoint.load_optimizers(self.model, self.optimizers, run, state['step'], parallel.put)
        self.scaler.load_state_dict(state['scaler'])

    def note_skip(self, at: Progress, log, bar, saver, why: str, **facts) -> None:
        """Count and log a step that was skipped. The tenth in a row ends the run."""
        at.skipped += 1
        log.write('skip', step=at.step, reason=why, **facts)
        print_above(self.ranks, f'step {at.step} skipped: {why}')
        # a scaler that is still coming down to its scale overflows a few times
        at.skipped_in_a_row += math.isfinite(facts['grad_norm']) or self.scaler.scale <= 1
        if at.skipped_in_a_row >= 10:
            bar.close()
            give_up(saver, self.ranks, why)


def lm_loss_sums(trained, batch) -> torch.Tensor:
    """The loss of a language model: batch is (x, y, doc), as Windows give it."""
    x, y, doc = batch
    return trained(x, y, doc=doc, reduction='sum')[None]


def count_targets(batches) -> int:
    """How many tokens micro-batches (x, y, doc) have to predict."""
    return sum(int((y != IGNORE).sum()) for _, y, _ in batches)


def to_device(batch, device: Device) -> tuple:
    """The tensors of a batch, or None where there is none, on the device."""
    return tuple(t if t is None else t.to(device.name, non_blocking=True) for t in batch)


def print_above(ranks: Ranks, text: str) -> None:
    """Print above the progress bar, on rank 0 only."""
    if ranks.rank == 0:
        tqdm.write(text)


def give_up(saver: checkpoint.Saver, ranks: Ranks, skipped: str) -> NoReturn:
    """End a run in which no step is any good; rank 0 says why, and what is left."""
    left = processes.broadcast(saver.last_good() if ranks.rank == 0 else None, patient=True)
    if ranks.rank:
        raise SystemExit(2)
    stop(f'10 steps in a row were skipped, the last one for {skipped}; {left}; start a new run '
         'with a lower learning rate, or look at the samples that log.jsonl names')
