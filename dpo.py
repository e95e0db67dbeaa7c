"""Preferences: python dpo.py config/tune/dpo.py.

Direct preference optimization (Rafailov et al. 2023): of two answers to the same question the
chosen one becomes more probable than the rejected one, compared with what the model thought of them
before: then it was the reference. Its log-probabilities are computed once, and kept in the run
directory. The first word is a chat model: a run, or a Hugging Face folder.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import copy
import math
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from core.data import records
from core.data.dataset import IGNORE, PADDING, Order, Rows
from core.formats import hf
from core.net import lora, optim
from core.net.weights import build_model, copy_weights
from core.ranks import parallel, processes
from core.ranks.processes import print0, share
from core.run import metrics, models
from core.run.begin import check_tuning, tuning_learner
from core.run.identity import identity, out_folder
from core.run.learner import Learner, Step
from core.run.run import Run
from core.settings import check_choice, configure, settings_of, stop, warn
from core.source import source_hashes

POSITIONAL = ('run_dir',)
CONFIG, FLAGS, GIVEN = '', (), ()   # filled by configure

# run
run_dir = ''                # the model to begin with, which is the reference
step = 0                    # which of its checkpoints; 0: the best one
out_dir = ''                # run directory; '': out/<config name>
init_from = ''              # resume: insist on going on with the run in out_dir
seed = 1337
# data
dataset = ''                # a named set (core/data/records.py) or a JSON, CSV, TSV or Parquet file
validation = ''             # a file to validate on; '': a part of the dataset
val_fraction = 0.1          # of the questions, to validate on
max_records = 0             # only so many records; 0: all
skip_bad = False            # leave out bad records and count them, instead of stopping
data_dir = 'data'           # where downloads live
block_size = 0              # most tokens of question and answer; 0: as run_dir learnt, or 2,048
# loss
loss = 'dpo'                # dpo or ipo
beta = 0.1                  # how dear it is to leave the reference
label_smoothing = 0.0       # dpo: so probable it is that the two answers were mixed up
chosen_weight = 0.0         # of -log p per token of the chosen answers, added to keep them probable
# what learns
dropout = 0.0
lora_rank = 0               # low-rank adapters (core/net/lora.py); 0: none, all weights learn
lora_alpha = 16.0           # their weight is lora_alpha / lora_rank
lora_targets = ''           # layers that have them, such as q_proj,v_proj; '': all in the blocks
lora_dropout = 0.0
save_adapters = False       # at the end the adapters alone, too, as PEFT has them: <run>/adapter
# optimizer
batch_size = 16             # pairs per optimizer step, over all processes
micro_batch_size = 0        # pairs per forward pass; 0: as memory allows
learning_rate = 1e-5
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0             # largest gradient norm; 0: no clipping
epochs = 1.0
max_steps = 0               # 0: as many as the epochs take
schedule = 'linear'         # cosine, linear, wsd or constant
warmup_steps = 10
decay_fraction = 0.5        # wsd: the part of all steps over which the rate falls
min_lr_fraction = 0.0       # what is left of the rate at the end
# intervals, in steps
eval_interval = 0           # 0: five times in all
log_interval = 10
# system
device = ''                 # '': cuda, else mps, else cpu
dtype = ''                  # '': bfloat16 where the hardware has it, else float16 on a GPU
compile = False             # torch.compile; pays for long runs
threads = 0                 # CPU threads; 0: torch's choice
timeout_minutes = 10.0      # a rank that hears nothing from the others for so long gives up
activation_checkpointing = False  # recompute blocks in the backward pass: less memory, 1/3 slower


def check_settings() -> None:
    """Stop at the first setting that is out of range, or that contradicts another one."""
    check_tuning(globals(), 'dpo.py {} --dataset=preference', records.SETS)
    check_choice(globals(), loss=('dpo', 'ipo'))
    if loss == 'ipo' and label_smoothing:
        stop(f'label_smoothing={label_smoothing}: is for loss=dpo')


# ---------------------------------------------------------------------------------------------
# The loss. `margin` is (log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected)).


def dpo_loss(margin: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(beta margin): Rafailov et al. 2023, equation 7.

    With label_smoothing e: (1 - e) times that, and e times the same of -margin: "conservative DPO",
    for labels that are wrong with probability e (Mitchell 2023, "A note on DPO with noisy
    preferences", equation 3).
    """
    return -((1 - label_smoothing) * F.logsigmoid(beta * margin)
             + label_smoothing * F.logsigmoid(-beta * margin))


def ipo_loss(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """(margin - 1 / (2 beta))^2: Azar et al. 2023, equation 17, of sums over tokens as there (TRL
    takes means). It has a finite goal, so that it does not run away from the reference where all
    prefer the same."""
    return (margin - 1 / (2 * beta)) ** 2


def pair_losses(log_p: torch.Tensor, reference: torch.Tensor, n_tokens: torch.Tensor):
    """(B,) losses and (B,) margins of pairs: log_p, reference, n_tokens (B, 2), chosen first.

    The loss that the settings name, plus chosen_weight times the chosen answer's -log p per token
    (Pang et al. 2024, "Iterative reasoning preference optimization", equation 1).
    """
    gain = log_p - reference
    margin = gain[:, 0] - gain[:, 1]
    found = ipo_loss(margin, beta) if loss == 'ipo' else dpo_loss(margin, beta, label_smoothing)
    if chosen_weight:
        found = found - chosen_weight * log_p[:, 0] / n_tokens[:, 0].clamp(min=1)
    return found, margin


def loss_sums(trained, batch) -> torch.Tensor:
    """(4,) sums over a batch of Pairs: the loss, the rewards of the chosen and of the rejected
    answers (beta log p / ref, section 5 of the paper), and the pairs in the right order by them."""
    x, y, doc, reference = batch
    log_p = -trained(x, y, doc=doc, reduction='none').sum(dim=1).view(-1, 2)
    reference, n_tokens = reference.view(-1, 2), (y != IGNORE).sum(dim=1).view(-1, 2)
    found, margin = pair_losses(log_p, reference, n_tokens)
    rewards, real = beta * (log_p - reference).T, n_tokens[:, 0] > 0
    return (torch.stack([found, *rewards, (margin > 0).float()]) * real).sum(dim=1)


def train_step(learner: Learner, batches, step: int, factor: float, limit=math.inf, request=None
               ) -> Step | None:
    """One optimizer step on micro-batches of Pairs: the gradient of the mean loss of the pairs.
    Rows of padding have no targets and do not count."""
    n_pairs = sum(int((y != IGNORE).any(dim=1).sum()) for _, y, *_ in batches) // 2
    divisor, sums = learner.loss_divisor(n_pairs), []
    for batch in learner.micro_batches(batches, step):
        with learner.autocast():
            means = loss_sums(learner.trained, batch) / divisor
        means[0].backward()
        sums.append(means.detach())
    return learner.update(sums, factor, limit, request)


# ---------------------------------------------------------------------------------------------
# Data


class Pairs(Order):
    """Preferences as rows: those of pair i are 2 i, the chosen answer, and 2 i + 1, the rejected.

    `reference` (n, 2) are the log-probabilities that the reference gives the answers.
    """

    def __init__(self, part: list, size: int):
        super().__init__(seed)
        self.rows = Rows([row for _, pair in part for row in pair.ids],
                         [row for _, pair in part for row in pair.weights], size, shuffle=False,
                         packed=False)
        self.reference = np.zeros((len(self), 2))

    def __len__(self) -> int:
        return len(self.rows) // 2

    def batch(self, samples) -> tuple:
        """x, y, doc (2 B, T), log-probabilities of the reference (2 B,) of a list of samples."""
        pairs = [PADDING if s == PADDING else self.place(int(s)) for s in samples]
        rows = [PADDING if p == PADDING else 2 * p + i for p in pairs for i in range(2)]
        x, y, doc, _ = self.rows.batch(rows)
        reference = [0.0 if p == PADDING else log_p for p in pairs for log_p in self.reference[p]]
        return x, y, doc, torch.tensor(reference, dtype=torch.float32)


def load_pairs(tokenizer, size: int) -> tuple[Pairs, Pairs, dict]:
    """Pairs to train and to validate on, and facts for the log."""
    split = records.load_split(dataset, validation, val_fraction, records.preference, data_dir,
                               skip_bad, max_records=max_records)
    parts, facts = records.fit_window(dataset, 'pairs', size, [
        [(record, encode(record, tokenizer, size)) for record in part] for part in split])
    longest = max(len(row) for part in parts for _, pair in part for row in pair.ids) - 1
    print0(f'{dataset}: {len(parts[0]):,} pairs to train on, {len(parts[1]):,} to validate on, of '
           f'at most {longest} tokens')
    return Pairs(parts[0], size), Pairs(parts[1], size), facts


def encode(record, tokenizer, size: int) -> records.Encoded:
    """The chosen and the rejected answer, each after its question. They are lost if none of one of
    them is within the window, or if the window cuts off all in which they differ."""
    pair = [records.encode(tokenizer, record.where, [*record.messages, {
        'role': 'assistant', 'content': text}], size, last_only=True) for text in record[2:]]
    ids, weights, needed, whole, lost = zip(*pair)
    equal = records.EQUAL if np.array_equal(*ids) else ''
    return records.Encoded(ids, weights, max(needed), any(whole), max(lost) or equal)


# ---------------------------------------------------------------------------------------------
# The reference


def add_reference(parts, run: Path, key: str, model, rows, *, dev, ranks) -> None:
    """Give each of the Pairs what the reference, which `model` still is, thinks of its answers:
    from the file in the run directory, or computed and written there."""
    path = run / 'reference.safetensors'
    names = [f'{key}-{name}' for name in ('train', 'val')]
    try:
        tensors = load_file(path) if path.is_file() else {}
    except (OSError, SafetensorError) as e:
        warn(f'{path} cannot be read ({e}); it is made again')
        tensors = {}
    if not all(processes.exchange(set(names) <= set(tensors))):
        tensors = {name: torch.from_numpy(-metrics.sequence_losses(
            model, pairs.rows, 2 * rows, dev, ranks)[:, 0].reshape(-1, 2)).contiguous()
            for name, pairs in zip(names, parts)}
        if ranks.rank == 0:
            try:
                hf.save_file(tensors, run / '.tmp-reference')
                (run / '.tmp-reference').replace(path)
            except (OSError, SafetensorError) as e:
                warn(f'{path} cannot be written ({e}); a resumed run will compute it again')
    for name, pairs in zip(names, parts):
        pairs.reference = tensors[name].numpy()


KL_PAIRS = 64       # all logits of two models take their time


def kl_divergence(model, reference, data: Rows, dev, ranks, asked) -> float | None:
    """Mean KL divergence of the model from the reference, in nats per token, over the positions of
    the first KL_PAIRS chosen answers: sum_v p(v) log(p(v) / ref(v)). None if asked() says to stop.
    """
    def divergences(batch):
        x, y, doc, _ = batch
        p = model(x, doc=doc).float().log_softmax(dim=-1)
        with lora.off(reference):   # where they are the same model
            q = reference(x, doc=doc).float().log_softmax(dim=-1)
        kl = (p.exp() * (p - q)).sum(dim=-1) * (y != IGNORE)
        return torch.stack([kl, y != IGNORE], dim=-1)
    first = slice(0, 2 * KL_PAIRS, 2)
    chosen = Rows(data.ids[first], data.weights[first], data.block_size, shuffle=False,
                  packed=False)
    with torch.no_grad():
        found = metrics.summed(model, chosen, 1, dev, ranks, asked=asked, k=2, values=divergences)
    return None if found is None else float(found[:, 0].sum() / found[:, 1].sum())


# ---------------------------------------------------------------------------------------------
# Between two steps


def evaluate(learner: Learner, before, pairs: Pairs, rows: int, asked) -> dict | None:
    """The scores of the model on pairs, beside the model `before`; None if asked() says to stop."""
    model, device, ranks = learner.model, learner.device, learner.ranks
    losses = metrics.sequence_losses(model, pairs.rows, 2 * rows, device, ranks, asked)
    if losses is None:
        return None
    kl = kl_divergence(model, before, pairs.rows, device, ranks, asked)
    if kl is None:
        return None
    log_p = torch.from_numpy(-losses[:, 0].reshape(-1, 2))
    reference, n_tokens = (torch.from_numpy(x) for x in (pairs.reference,
                                                         losses[:, 1].reshape(-1, 2)))
    found, margin = pair_losses(log_p, reference, n_tokens)
    gain, each = log_p - reference, log_p / n_tokens
    return {'val_loss': found.mean().item(),
            'accuracy': (log_p[:, 0] > log_p[:, 1]).double().mean().item(),
            'accuracy_per_token': (each[:, 0] > each[:, 1]).double().mean().item(),
            'reward_accuracy': (margin > 0).double().mean().item(),
            'chosen_reward': beta * gain[:, 0].mean().item(),
            'rejected_reward': beta * gain[:, 1].mean().item(),
            'reward_margin': beta * margin.mean().item(),
            'chosen_log_p': log_p[:, 0].mean().item(),
            'rejected_log_p': log_p[:, 1].mean().item(), 'kl': kl}


def shown(scores: dict) -> str:
    """The scores in words."""
    return (f'loss {scores["val_loss"]:.4f}, chosen more probable {scores["accuracy"]:.3f}, by '
            f'reward {scores["reward_accuracy"]:.3f}, margin {scores["reward_margin"]:.3f}, log p '
            f'of chosen {scores["chosen_log_p"]:.2f}, of rejected {scores["rejected_log_p"]:.2f}, '
            f'KL {scores["kl"]:.4f} nats per token')


# ---------------------------------------------------------------------------------------------
# A run


def main() -> dict:
    """Learn from preferences; returns the run directory, the last step and its scores."""
    code = source_hashes(__file__)      # before anybody edits it
    check_settings()
    ranks, dev = processes.begin(device, dtype, compile, threads, timeout_minutes)

    # Model, data, run directory
    source, tokenizer, begun, size = models.load_base(run_dir, step, data_dir, block_size, ranks)
    tokenizer.check_chat()
    if save_adapters:
        hf.architecture(source.config)      # stops if PEFT could not have it
    config, weights = replace(source.config, dropout=dropout), models.weights_hash(source)
    train_pairs, val_pairs, facts = load_pairs(tokenizer, size)
    model = build_model(config, None, dev.name)
    copy_weights(source, model)
    del source
    model.train().recompute = activation_checkpointing
    reference = model
    if lora_rank:
        lora.add(model, lora_rank, lora_alpha, lora_targets, lora_dropout, seed)
    else:
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    window = facts.pop('window')        # follows from what else is in the identity
    settings = settings_of(globals())
    base = out_folder(out_dir, CONFIG or f'{Path(run_dir).resolve().name}-dpo',
                      Path(dataset).resolve().stem if 'dataset' in FLAGS else '')
    run = Run(base, identity(settings, config, tokenizer, source=code, weights=weights,
                             data=facts | {'block_size': size}),
              ranks, dev, insist=init_from == 'resume')
    dev, length = run.device, train_pairs.rows.block_size
    rows = parallel.rows_at_once(model, ranks, dev, batch_size, length, micro_batch_size,
                                 per_sample=2)
    key = '-'.join([weights, dev.dtype, facts['sha256'][:16], facts['val_sha256'][:16],
                    str(length)])
    add_reference((train_pairs, val_pairs), run.folder, key, model, rows, dev=dev, ranks=ranks)

    # What trains it
    n_steps = max_steps or math.ceil(epochs * len(train_pairs) / batch_size)
    between = eval_interval or math.ceil(n_steps / 5)
    learner = tuning_learner(settings, model, ranks, dev)
    learnt = learner.tell_sizes(n_steps, batch_size, 'pairs', len(train_pairs))
    rows = learner.fit_rows(train_step, train_pairs.batch, rows)
    batches_of = lambda i: [train_pairs.batch(samples) for samples in share(
        i * batch_size, batch_size, ranks.dp_rank, ranks.dp, rows)]
    learner.warm_up(train_step, batches_of)
    run.begin(learner, tokenizer, max_steps=n_steps, settings=settings, script=__file__,
              kept={'config': asdict(config), 'task': begun.get('task', 'chat'),
                    'block_size': size}, micro_batch_size=rows, window=window, **learnt)

    with run:
        for i in run:
            if run.due(between):
                run.score(evaluate(learner, reference, val_pairs, rows, run.asked), shown)
            run.save(between)
            if run.over:
                break
            began = time.perf_counter()
            factor = optim.schedule(i, n_steps, schedule, warmup_steps, decay_fraction,
                                    min_lr_fraction)
            done = train_step(learner, batches_of(i), i, factor, request=run.request)
            if run.count(done, time.perf_counter() - began, log_interval):
                _, chosen, rejected, right = done.means
                run.log_step(done, learning_rate * factor, chosen_reward=chosen,
                             rejected_reward=rejected, reward_accuracy=right,
                             reward_margin=chosen - rejected)
        run.finish()
    if save_adapters:
        run.save_adapters(run_dir, lora_dropout)
    return run.end(f'  python sample.py {shlex.quote(str(run.folder))}')


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
