"""Preferences: python dpo.py config/tune/dpo.py.

Direct preference optimization (Rafailov et al. 2023): of two answers to the same question the
chosen one becomes more probable than the rejected one, compared with what the model thought of them
before: then it was the reference. Its log-probabilities are computed once, and kept in the run
directory. The first word is a chat model: a run, or a Hugging Face folder.
"""
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
from tqdm import tqdm

import model as model_module
from core import device as hardware
from core.data import records
from core.data.dataset import IGNORE, PADDING, Order, Rows
from core.formats import hf
from core.net import lora, optim
from core.ranks import parallel, processes
from core.ranks.processes import print0, share
from core.run import checkpoint, metrics, rundir
from core.run.learner import Learner, print_above
from core.settings import (
    check_bounds,
    check_choice,
    configure,
    settings_of,
    stop,
    warn,
)
from core.source import source_hashes
from model import build_model, copy_weights, count_parameters

POSITIONAL = ('run_dir',)
CONFIG, FLAGS, GIVEN = '', (), ()   # filled by configure

# run
run_dir = ''                # the model to begin with, which is the reference
step = 0                    # which of its checkpoints; 0: the best one
out_dir = ''                # run directory; '': out/<config name>
init_from = ''              # resume: insist on going on with the run in out_dir
seed = 1337
# data
dataset = ''                # a named set (core/data/records.py), or a .jsonl, .json, .csv or .tsv
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
    """Stop at the first setting that is out of range."""
    check_bounds(globals(), batch_size=(1, None), micro_batch_size=(0, None), block_size=(0, None),
                 val_fraction=(0, 0.9), max_records=(0, None), beta=(1e-6, None),
                 label_smoothing=(0, 0.49), dropout=(0, 0.99), lora_rank=(0, None),
                 lora_alpha=(1e-6, None), lora_dropout=(0, 0.99), learning_rate=(0, None),
                 weight_decay=(0, None), chosen_weight=(0, None), beta1=(0, 0.9999),
                 beta2=(0, 0.9999), grad_clip=(0, None), epochs=(1e-6, None),
                 max_steps=(0, None), warmup_steps=(0, None), decay_fraction=(0, 1),
                 min_lr_fraction=(0, 1), eval_interval=(0, None), log_interval=(1, None),
                 seed=(0, 2 ** 31 - 1), threads=(0, None), timeout_minutes=(0.01, None),
                 step=(0, None))
    check_choice(globals(), loss=('dpo', 'ipo'), schedule=optim.SCHEDULES,
                 init_from=('', 'resume'))
    if loss == 'ipo' and label_smoothing:
        stop(f'label_smoothing={label_smoothing}: is for loss=dpo')
    if save_adapters and not lora_rank:
        stop('save_adapters=True: needs a lora_rank')
    checkpoint.check_named(run_dir, 'dpo.py {} --dataset=preference')
    if not dataset:
        stop(f'no dataset given: a file, or one of {", ".join(records.SETS)}')


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
    """Of a batch of Pairs the sums of: loss, reward of the chosen and of the rejected answers (beta
    log p / ref, as in section 5 of the paper), pairs in the right order by it."""
    x, y, doc, reference = batch
    log_p = -trained(x, y, doc=doc, reduction='none').sum(dim=1).view(-1, 2)
    reference, n_tokens = reference.view(-1, 2), (y != IGNORE).sum(dim=1).view(-1, 2)
    found, margin = pair_losses(log_p, reference, n_tokens)
    rewards, real = beta * (log_p - reference).T, n_tokens[:, 0] > 0
    return (torch.stack([found, *rewards, (margin > 0).float()]) * real).sum(dim=1)


NAMES = ('train_loss', 'chosen_reward', 'rejected_reward', 'reward_accuracy')   # of loss_sums


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
    return *(Pairs(part, size) for part in parts), facts


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


def add_reference(parts, run: Path, key: str, model, rows, dev, ranks) -> None:
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
        found = metrics.summed(model, chosen, 1, dev, ranks, asked, 2, divergences)
    return None if found is None else float(found[:, 0].sum() / found[:, 1].sum())


def take_stock(at, log, model, before, pairs, rows, dev, ranks, asked) -> bool:
    """Evaluate, beside the model `before`; all goes to the log, the loss into at.

    Returns whether asked() said to stop meanwhile: then nothing is noted, and it is still due.
    """
    losses = metrics.sequence_losses(model, pairs.rows, 2 * rows, dev, ranks, asked)
    kl = losses is not None and kl_divergence(model, before, pairs.rows, dev, ranks, asked)
    if asked():
        return True
    log_p = torch.from_numpy(-losses[:, 0].reshape(-1, 2))
    reference, n_tokens = (torch.from_numpy(x) for x in (pairs.reference,
                                                         losses[:, 1].reshape(-1, 2)))
    found, margin = pair_losses(log_p, reference, n_tokens)
    gain, each = log_p - reference, log_p / n_tokens
    scores = {'val_loss': found.mean().item(),
              'accuracy': (log_p[:, 0] > log_p[:, 1]).double().mean().item(),
              'accuracy_per_token': (each[:, 0] > each[:, 1]).double().mean().item(),
              'reward_accuracy': (margin > 0).double().mean().item(),
              'chosen_reward': beta * gain[:, 0].mean().item(),
              'rejected_reward': beta * gain[:, 1].mean().item(),
              'reward_margin': beta * margin.mean().item(),
              'chosen_log_p': log_p[:, 0].mean().item(),
              'rejected_log_p': log_p[:, 1].mean().item(), 'kl': kl}
    at.note(scores['val_loss'])
    log.write('eval', step=at.step, seconds=at.seconds, **scores)
    print_above(ranks, f'step {at.step}: loss {at.val_loss:.4f}, chosen more probable '
                       f'{scores["accuracy"]:.3f}, by reward {scores["reward_accuracy"]:.3f}, '
                       f'margin {scores["reward_margin"]:.3f}, log p of chosen '
                       f'{scores["chosen_log_p"]:.2f}, of rejected {scores["rejected_log_p"]:.2f}, '
                       f'KL {kl:.4f} nats per token')
    return False


def main() -> dict:
    """Learn from preferences; returns the run directory, the last step and its scores."""
    code = source_hashes(__file__)      # before anybody edits it
    check_settings()
    ranks = processes.find_ranks()
    why = processes.arrange(ranks)
    dev = hardware.choose(device, dtype, compile, threads, ranks.local_rank, ranks.local_world)
    at = checkpoint.Progress(evaluated=-1)
    processes.start(ranks, dev, timeout_minutes, at)
    dev = hardware.agree(dev, processes.exchange)
    print0(*dev.why, *why, sep='\n')

    # Model, data, reference
    source, tokenizer, begun, size = rundir.load_base(run_dir, step, data_dir, block_size, ranks)
    tokenizer.check_chat()
    if save_adapters:
        hf.architecture(source.config)      # stops if PEFT could not have it
    config, weights = replace(source.config, dropout=dropout), checkpoint.weights_hash(source)
    train_pairs, val_pairs, facts = load_pairs(tokenizer, size)
    model = build_model(config, None, dev.name)
    copy_weights(source, model)
    model.recompute = activation_checkpointing
    reference = model
    if lora_rank:
        lora.add(model, lora_rank, lora_alpha, lora_targets, lora_dropout, seed)
    else:
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    del source
    window = facts.pop('window')        # follows from what else is in the identity
    identity = rundir.identity(settings_of(globals()), config, tokenizer, source=code,
                               data=facts | {'block_size': size}, weights=weights)
    base = Path(out_dir) if out_dir else rundir.named(
        CONFIG or f'{Path(run_dir).resolve().name}-dpo',
        Path(dataset).resolve().stem if 'dataset' in FLAGS else '')
    run, saver, state, dev = rundir.open_run(base, identity, ranks, dev, init_from == 'resume')
    per_rank = math.ceil(batch_size / ranks.dp)
    rows = min(micro_batch_size, per_rank) or max(1, hardware.fit_micro_batch(
        dev, 2 * per_rank, train_pairs.rows.block_size, config.n_layer, config.n_embd,
        ranks.local_world, parallel.learning_bytes(model, ranks), activation_checkpointing) // 2)
    rows = min(processes.exchange(rows))    # machines may have more memory or less
    key = '-'.join([weights, dev.dtype, facts['sha256'][:16], facts['val_sha256'][:16],
                    str(train_pairs.rows.block_size)])
    add_reference((train_pairs, val_pairs), run, key, model, rows, dev, ranks)

    # Optimizer, what a checkpoint says
    at.max_steps = max_steps or math.ceil(epochs * len(train_pairs) / batch_size)
    between = eval_interval or math.ceil(at.max_steps / 5)
    n_learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_parameters = count_parameters(model)
    print0(f'{n_learnt:,} of {n_parameters:,} parameters learn ({n_learnt / n_parameters:.2%}); '
           f'{at.max_steps:,} steps of {batch_size} pairs, {len(train_pairs) / batch_size:,.1f} an '
           'epoch')
    trained, n_micro = parallel.wrap(model, ranks, dev, per_rank, rows)
    learner = Learner(model, trained, optim.make_optimizers(
        model, 'adamw', learning_rate, weight_decay, beta1, beta2),
        optim.LossScale(dev.dtype == 'float16'), dev, ranks, grad_clip,
        seed if dropout or lora_dropout else None)
    facts = {'config': asdict(config), 'identity': identity, 'task': begun.get('task', 'chat'),
             'block_size': size}

    def do_step(step, factor, *rest):
        shares = share(step * batch_size, batch_size, ranks.dp_rank, ranks.dp, rows, n_micro)
        batches = [train_pairs.batch(samples) for samples in shares]
        n_pairs = sum(sample != PADDING for samples in shares for sample in samples)
        return learner.step(batches, loss_sums, n_pairs, step, factor, *rest)

    model.train()
    rows = learner.fit_rows(rows, train_pairs.batch, loss_sums)
    if dev.compile or ranks.world > 1:      # as in train.py
        learner.time_steps(do_step, 1)
    if state:
        rundir.resume(at, state, run, learner)
    log = rundir.Log(None)
    if ranks.rank == 0:
        log = rundir.start_log(
            run, state, settings_of(globals()), (model_module.__file__, __file__), (),
            device=dev.why, world=ranks.world, micro_batch_size=rows, parameters=n_parameters,
            trained=n_learnt, max_steps=at.max_steps, window=window, **facts)

    # The loop
    bar = tqdm(total=at.max_steps, initial=at.step, unit='step', disable=ranks.rank != 0)
    saved, stopping = replace(at), False
    with rundir.StopRequest() as request:
        asked = lambda: processes.any_rank(bool(request.asked))
        while True:
            ends, due = at.step == at.max_steps, at.step % between == 0
            if (due or ends) and at.evaluated < at.step and not stopping:
                stopping = take_stock(at, log, model, reference, val_pairs, rows, dev, ranks, asked)
            if (due or stopping or ends) and at.step and at != saved and saver:
                saver.save(model, learner.optimizers, tokenizer, asdict(at) | facts | {
                    'scaler': learner.scaler.state_dict()}, last=ends)
                saved = replace(at)
            if stopping or ends:
                break
            began = time.perf_counter()
            factor = optim.schedule(at.step, at.max_steps, schedule, warmup_steps, decay_fraction,
                                    min_lr_fraction)
            means, grad_norm, skipped, stopping = do_step(at.step, factor, math.inf, request)
            at.step, at.seconds = at.step + 1, at.seconds + time.perf_counter() - began
            bar.update()
            if skipped:
                learner.note_skip(at, log, bar, saver, skipped, train_loss=means[0],
                                  grad_norm=grad_norm)
                continue
            at.skipped_in_a_row = 0
            if at.step % log_interval == 0 or at.step == at.max_steps:
                log.write('step', step=at.step, seconds=at.seconds, grad_norm=grad_norm,
                          learning_rate=learning_rate * factor, **dict(zip(NAMES, means)),
                          reward_margin=means[1] - means[2])
                bar.set_postfix_str(f'loss {means[0]:.4f}')
        bar.close()
        if saver:
            saver.finish(at.step)
        processes.broadcast(None, patient=True)
    if stopping:
        print0(f'stopped after step {at.step}, which is saved in {run}; the same command goes on'
               if at.step else 'stopped before the first step')
    elif ranks.rank == 0:
        if save_adapters:
            checkpoint.load_weights(model, run, at.best_step)
            lora.save(model, run / 'adapter', run_dir, lora_dropout)
        log.write('end', step=at.step, seconds=at.seconds, best_val_loss=at.best_val_loss,
                  best_step=at.best_step)
        plotted = rundir.plot_losses(run)
        print(f'best validation loss {at.best_val_loss or math.nan:.4f} at step {at.best_step}; '
              f'{run}/ has the checkpoints, log.jsonl' + ' and loss.png' * plotted + '\n\nnext:\n'
              f'  python sample.py {shlex.quote(str(run))}')
    if ranks.rank == 0:
        saver.lock.close()
    processes.finish()
    return {'run_dir': str(run), 'step': at.step, 'stopped': stopping, 'val_loss': at.val_loss,
            'best_val_loss': at.best_val_loss, 'seconds': at.seconds}


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
