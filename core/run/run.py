"""A run on its way: how far it has come, what is due, its log and checkpoints, and how it ends.

Pretraining, fine-tuning, classification and preference optimization are each a loop over a Run:

    with run:
        for step in run:        # the number of steps done: before each step, and at the end
            if run.due(eval_interval):
                run.score(evaluate(...), shown)
            run.save(save_interval)
            if run.over:
                break
            done = train_step(...)
            if run.count(done, seconds, log_interval):
                run.log_step(done, ...)

What is due between two steps comes first in a turn. So a run that was stopped in the middle of an
evaluation begins with that evaluation when it goes on.
"""
import math
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from core.formats import peft
from core.ranks import processes
from core.ranks.processes import print0
from core.run import models
from core.run.checkpoint import Progress
from core.run.identity import open_run
from core.run.learner import NO_MEMORY
from core.run.log import Log, plot_losses, start_log
from core.settings import stop


class Run:
    """A run: its folder, `at` (how far it has come), `device` (with the dtype it began with)."""

    def __init__(self, base: Path, identity: dict, ranks, device, insist: bool = False):
        """The run with this identity at `base`, or a new one; see identity.find_run."""
        self.folder, self.saver, self.state, self.device = open_run(
            base, identity, ranks, device, insist)
        self.ranks, self.identity, self.at = ranks, identity, Progress()
        self.log, self.stopping, self.times = Log(None), False, []

    def begin(self, learner, tokenizer, *, max_steps: int, settings: dict, script: str,
              kept: dict, first: int = 0, max_minutes: float = 0.0, **facts) -> None:
        """Begin at step 0, or go on from the checkpoint; stops if that is beyond max_steps.

        With max_minutes the run ends after that time of training. `first` is the first step that is
        evaluated, 0 or 1; `kept` goes into every checkpoint, `kept` and `facts` go into the log.
        """
        self.learner, self.tokenizer, self.max_minutes = learner, tokenizer, max_minutes
        self.kept, self.at.evaluated = kept | {'identity': self.identity}, first - 1
        if self.state:
            self.at.restore(self.state)
            if self.at.step > max_steps and not max_minutes:
                stop(f'max_steps={max_steps}: {self.folder} has done {self.at.step} steps already')
            learner.restore(self.folder, self.state)
        self.at.max_steps = max_steps
        if self.ranks.rank == 0:
            self.log = start_log(self.folder, self.state, settings, script, world=self.ranks.world,
                                 device=learner.device.why, max_steps=max_steps, **self.kept,
                                 **facts)

    def __enter__(self):
        self.request = StopRequest().__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.request.__exit__(kind, error, trace)
        if isinstance(error, torch.OutOfMemoryError):
            self.bar.close()
            stop(f'step {self.at.step + 1}: {NO_MEMORY}; the same command with it goes on from the '
                 'last checkpoint')

    def __iter__(self):
        self.bar = tqdm(total=None if self.max_minutes else self.at.max_steps, unit='step',
                        initial=self.at.step, disable=self.ranks.rank != 0)
        self.saved = replace(self.at)
        while True:
            self.ranks.step = self.at.step      # for the message of a rank that has lost others
            yield self.at.step

    @property
    def place(self) -> float:
        """Where the run is on its schedule, 0 to max_steps: with max_minutes by its time."""
        if not self.max_minutes:
            return self.at.step
        return min(1.0, self.at.seconds / (60 * self.max_minutes)) * self.at.max_steps

    @property
    def ends(self) -> bool:
        """Whether the run has done its steps or used its time, to the nearest step."""
        if not self.max_minutes:
            return self.at.step == self.at.max_steps
        half_a_step = self.at.seconds / max(1, self.at.step) / 2
        return self.at.step > 0 and self.at.seconds + half_a_step >= 60 * self.max_minutes

    @property
    def over(self) -> bool:
        """Whether no step is to follow."""
        return self.stopping or self.ends

    def asked(self) -> bool:
        """Whether a signal has asked any rank to end. All ranks must ask together."""
        return processes.any_rank(bool(self.request.asked))

    def due(self, interval: int) -> bool:
        """Whether what is done every `interval` steps (0: never) and at the end is still due."""
        return bool(interval and not self.stopping and self.at.evaluated < self.at.step
                    and (self.ends or self.at.step % interval == 0))

    def finished(self, made) -> bool:
        """Whether what was made between two steps is complete: not if it is None, or if a signal
        has come. Then the run stops, and makes it again when it is resumed."""
        self.stopping = self.stopping or made is None or self.asked()
        return not self.stopping

    def note(self, event: str, shown: str = '', **fields) -> None:
        """An event of this step: to the log, and above the progress bar."""
        self.log.write(event, step=self.at.step, **fields)
        if shown and self.ranks.rank == 0:
            tqdm.write(shown)

    def score(self, scores: dict | None, shown, **fields) -> bool:
        """Log an evaluation (scores have at least val_loss) and print shown(scores); returns
        whether it is `finished`."""
        if not self.finished(scores):
            return False
        scores = {name: x for name, x in scores.items() if name != 'losses'}
        self.at.note(scores['val_loss'])
        self.at.bits_per_byte = scores.get('bits_per_byte')
        self.note('eval', f'step {self.at.step}: {shown(scores)}, {self.at.seconds:.0f} s of '
                  'training', seconds=self.at.seconds, **fields, **scores)
        return True

    def save(self, interval: int) -> None:
        """Save a checkpoint if one is due: every `interval` steps, at the best step, at the end."""
        at = self.at
        if not self.stopping:
            at.evaluated = max(at.evaluated, at.step)
        due = at.step % interval == 0 or at.step == at.best_step or self.over
        if due and at.step and at != self.saved and self.saver:
            state = asdict(at) | self.kept | {'scaler': self.learner.scaler.state_dict()}
            self.saver.save(self.learner.model, self.learner.optimizers, self.tokenizer, state,
                            last=self.ends)
            self.saved = replace(at)

    def count(self, done, seconds: float, log_interval: int, **facts) -> bool:
        """Count a step (see learner.Step); returns whether it is to be logged. A skipped one is
        logged here, with `facts`; the tenth in a row ends the run."""
        at, self.stopping = self.at, done.asked
        at.step, at.seconds = at.step + 1, at.seconds + seconds
        if self.max_minutes:    # all ranks go by the clock of rank 0, or their rates would differ
            at.seconds = processes.broadcast(at.seconds)
        self.times.append(seconds)
        self.bar.update()
        if not done.skipped:
            at.skipped_in_a_row = 0
            return at.step % log_interval == 0 or self.ends
        at.skipped += 1
        self.note('skip', f'step {at.step} skipped: {done.skipped}', reason=done.skipped,
                  train_loss=done.means[0], grad_norm=done.norm, **facts)
        # In fp16 the loss scale is too large at first, and comes down by skipped steps.
        at.skipped_in_a_row += math.isfinite(done.norm) or self.learner.scaler.scale <= 1
        if at.skipped_in_a_row >= 10:
            self.bar.close()
            left = processes.broadcast(self.saver.last_good() if self.ranks.rank == 0 else None,
                                       patient=True)
            if self.ranks.rank:
                raise SystemExit(2)     # rank 0 says why
            stop(f'10 steps in a row were skipped, the last one for {done.skipped}; {left}; start '
                 'a new run with a lower learning rate, or look at the samples that log.jsonl '
                 'names')
        return False

    def log_step(self, done, learning_rate: float, shown: str = '', **fields) -> None:
        """A step: to the log and the progress bar."""
        self.log.write('step', step=self.at.step, seconds=self.at.seconds, train_loss=done.means[0],
                       grad_norm=done.norm, learning_rate=learning_rate, **fields)
        minutes = f', {self.at.seconds / 60:.1f} of {self.max_minutes:g} minutes'
        self.bar.set_postfix_str(f'loss {done.means[0]:.4f}{shown}'
                                 + minutes * bool(self.max_minutes))
        self.times = []

    def finish(self) -> None:
        """Wait for the last checkpoint, on all ranks."""
        self.bar.close()
        if self.saver:
            self.saver.finish(self.at.step)
        processes.broadcast(None, patient=True)     # rank 0 may have large files to join

    def save_adapters(self, base: str, dropout: float) -> None:
        """Write the adapters of the best step in PEFT's format."""
        if self.ranks.rank == 0 and not self.stopping:
            models.load_weights(self.learner.model, self.folder, self.at.best_step)
            peft.save(self.learner.model, self.folder / 'adapter', base, dropout)

    def end(self, commands: str, **fields) -> dict:
        """Log the end with `fields` and print the `commands` that may follow, or that the run was
        stopped. Leaves the process group. Returns what main returns."""
        at = self.at
        if self.stopping:
            print0(f'stopped after step {at.step}, which is saved in {self.folder}; the same '
                   'command goes on from there' if at.step else 'stopped before the first step')
        elif self.ranks.rank == 0:
            self.log.write('end', step=at.step, seconds=at.seconds,
                           best_val_loss=at.best_val_loss, best_step=at.best_step, **fields)
            plotted = plot_losses(self.folder)
            if at.skipped:
                print(f'{at.skipped} steps were skipped; log.jsonl says which and why '
                      '("event": "skip")')
            best = f'{at.best_val_loss:.4f}' if at.best_val_loss is not None else 'none'
            print(f'best validation loss {best} at step {at.best_step}, after {at.seconds:.0f} s '
                  f'of training; {self.folder}/ has the checkpoints, log.jsonl'
                  + ' and loss.png' * plotted + f'\n\nnext:\n{commands}')
        if self.ranks.rank == 0:
            self.saver.lock.close()
        processes.finish()
        return {'run_dir': str(self.folder), 'step': at.step, 'stopped': self.stopping,
                'seconds': at.seconds, 'val_loss': at.val_loss,
                'bits_per_byte': at.bits_per_byte, 'best_val_loss': at.best_val_loss}


class StopRequest:
    """A context in which SIGTERM, SIGUSR1 or Ctrl-C is noted in `asked`, by name; a second one ends
    the process at once. One within half a second is the first again: Slurm signals every process of
    a job, and torchrun passes its own signal on to them."""
    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __enter__(self):
        self.asked, self.since = '', 0.0
        self.before = {number: signal.signal(number, self.receive) for number in self.SIGNALS}
        return self

    def receive(self, number, frame) -> None:
        if self.asked and time.monotonic() - self.since > 0.5:
            os._exit(128 + number)
        if self.asked:
            return
        self.asked, self.since = signal.Signals(number).name, time.monotonic()
        # print() is not allowed here: the signal may have come in the middle of another print()
        os.write(2, f'\n{self.asked}: ends after this step and a checkpoint; once more: at '
                    'once\n'.encode())

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
