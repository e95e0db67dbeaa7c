"""A base model becomes a classifier of texts: python classify.py config/tune/spam.py.

The model gets another head, which is read at the last token of a text. A part of the records is
learnt from, another chooses the best step, and the third, the test part, is looked at once, at the
end. What learns is the whole model, some layers of it, or low-rank adapters (LoRA).
The first word is a run, a Hugging Face folder (GPT-2, Llama, Qwen3) or a name on its hub. What
comes out is a run that is asked with python sample.py <run> --classify="some text".
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import math
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from core.data import records
from core.data.dataset import Rows, rows_of
from core.net import lora, optim
from core.net.weights import build_model, copy_weights
from core.ranks import parallel, processes
from core.ranks.processes import print0, share
from core.run import metrics, models
from core.run.begin import check_tuning, just_evaluating, tuning_learner
from core.run.identity import identity, out_folder
from core.run.learner import Learner, Step
from core.run.run import Run
from core.settings import configure, settings_of, stop
from core.source import source_hashes
from core.text import clean

POSITIONAL = ('run_dir',)
CONFIG, FLAGS, GIVEN = '', (), ()   # filled by configure

# run
run_dir = ''                # the model to begin with: a run, a Hugging Face folder, or a name: gpt2
step = 0                    # which of its checkpoints; 0: the best one
out_dir = ''                # run directory; '': out/<config name>
init_from = ''              # resume: insist on going on with the run in out_dir
random_weights = False      # begin with random ones instead: what is pretraining worth?
eval_only = False           # a classifier in run_dir, on its test part; writes nothing
seed = 1337
# data
dataset = ''                # a named set (core/data/records.py) or a JSON, CSV, TSV or Parquet file
val_fraction = 0.1          # of the records, to validate on
test_fraction = 0.2         # of the records, looked at once, at the end
labels = ''                 # the classes with commas; '': those that occur
skip_bad = False            # leave out bad records and count them, instead of stopping
data_dir = 'data'           # where downloads live
block_size = 0              # tokens in a row; 0: as run_dir learnt, or knows, at most 2,048
pack = True                 # several records in a row
balance = False             # all classes weigh the same, however many records they have
# what learns
layers = 'all'              # all; head; or the last so many blocks, with final norm and head
dropout = 0.0
lora_rank = 0               # low-rank adapters (core/net/lora.py); 0: none, all weights learn
lora_alpha = 16.0           # their weight is lora_alpha / lora_rank
lora_targets = ''           # layers that have them, such as q_proj,v_proj; '': all in the blocks
lora_dropout = 0.0
# optimizer
batch_size = 16             # rows per optimizer step, over all processes
micro_batch_size = 0        # rows per forward pass; 0: as memory allows
learning_rate = 1e-4
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0             # largest gradient norm; 0: no clipping
epochs = 3.0
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


# ---------------------------------------------------------------------------------------------
# A training step


def train_step(learner: Learner, batches, step: int, factor: float, limit=math.inf, request=None
               ) -> Step | None:
    """One optimizer step on micro-batches (x, y, doc, weight) of Rows, in which the only target of
    a text is its class, at its last token: the gradient of the weighted mean of their losses."""
    divisor, losses = learner.loss_divisor(sum(weight.sum() for *_, weight in batches)), []
    for x, y, doc, weight in learner.micro_batches(batches, step):
        with learner.autocast():
            loss = (learner.trained(x, y, doc=doc, reduction='none') * weight).sum() / divisor
        loss.backward()
        losses.append(loss.detach())
    return learner.update(losses, factor, limit, request)


# ---------------------------------------------------------------------------------------------
# Data and model


def class_parts(found: list, names: list) -> list[list]:
    """The records to train, validate and test on. Of equal texts the first stays, near copies (see
    clean.clusters) are in one part, and each class has half to twice its share in each part."""
    unique, n_other = {}, 0
    for record in found:
        stays = unique.setdefault(clean.text_hash(record.text), record)
        n_other += stays.label != record.label
    kept = list(unique.values())
    for similarity in (0.7, 0.0):
        parts, few = share_out(kept, clean.clusters([r.text for r in kept], similarity), names)
        if not few:
            break
        if not similarity:
            n = sum(record.label == few for record in kept)
            stop(f'dataset={dataset}: {n:,} different texts with the label {few!r} are too few to '
                 'train, validate and test on; add some')
        print0(f'warning: {dataset}: too many texts with the label {few!r} are near copies of each '
               'other to be kept together, so some are learnt whose copies are tested',
               file=sys.stderr)
    print0(f'{dataset}: {len(found):,} records, {len(found) - len(kept):,} of them duplicates'
           + f', {n_other:,} of these with another label' * (n_other > 0) + '; ' + ', '.join(
               f'{len(part):,} to {what}' for part, what in zip(parts, (
                   'train on', 'validate on', 'test on'))))
    return parts


def share_out(found: list, clusters: list, names: list) -> tuple[list[list], str]:
    """The records to train, validate and test on, whole clusters each; and the name of a class that
    does not have half of its share in each, or ''."""
    groups, n = {}, Counter(record.label for record in found)
    for number, record in zip(clusters, found):
        groups.setdefault(number, []).append(record)
    wanted = [{name: round(n[name] * share) for name in names}
              for share in (1 - val_fraction - test_fraction, val_fraction, test_fraction)]
    parts, have = [[], [], []], [Counter(), Counter(), Counter()]
    for group in sorted(groups.values(), key=lambda group: records.fraction_of(
            f'{seed} {min(record.text for record in group)}')):
        mine = Counter(record.label for record in group)
        to = next((i for i in (1, 2) if any(have[i][x] < wanted[i][x] for x in mine) and all(
            have[i][x] + mine[x] <= 2 * wanted[i][x] for x in mine)), 0)
        parts[to] += group
        have[to] += mine
    few = [name for name in names for had, share in zip(have, wanted)
           if had[name] < max(1, share[name] / 2)]
    return parts, few[0] if few else ''


def class_data(tokenizer, size: int, known: list) -> tuple[list[Rows], list[str], dict]:
    """Rows to train, validate and test on, the classes, and facts for the log.

    `known` are the classes of a model that has some.
    """
    found = records.load(dataset, records.labelled, data_dir, skip_bad)
    given = sorted(filter(None, map(str.strip, labels.split(','))))
    names = known or given or sorted({record.label for record in found})
    if len(names) < 2:
        stop(f'dataset={dataset}: all records have the label {names[0]!r}; a classifier needs two')
    for record in found:
        if record.label not in names:
            stop(f'{record.where}: label {record.label[:40]!r} is none of {", ".join(names)}; '
                 'correct it, or --labels')
    parts = class_parts(found, names)
    counts = Counter(record.label for record in parts[0])
    encoded = []
    for part in parts:
        encoded.append([])
        for record in part:
            records.check_known(tokenizer, record.where, [record.text])
            text = tokenizer.prompt(record.text)
            # the target at the last token is the class
            ids = np.array([*text[:size], names.index(record.label)], np.int32)
            weights = np.zeros(len(ids), np.float32)
            weights[-1] = 1.0
            if balance and part is parts[0]:
                weights[-1] = len(parts[0]) / len(names) / counts[record.label]
            encoded[-1].append((record, records.Encoded(ids, weights, len(text))))
    encoded, facts = records.fit_window(dataset, 'texts', size, encoded)
    return [rows_of(part, size, seed, pack) for part in encoded], names, facts | {'classes': names}


def first_model(source, n_classes: int, device):
    """The model that learns: with a new head, and else the weights of `source`, or random ones."""
    config = replace(source.config, dropout=dropout, n_classes=n_classes, tied=False)
    model = build_model(config, seed if random_weights else None, device)
    if random_weights:
        print0('begins with random weights')
    else:
        copy_weights(source, model)
    model.recompute = activation_checkpointing
    if lora_rank:
        lora.add(model, lora_rank, lora_alpha, lora_targets, lora_dropout, seed)
        model.lm_head.requires_grad_(True)
    lora.freeze(model, layers)
    return model.train()


# ---------------------------------------------------------------------------------------------
# Between two steps


def evaluate(learner: Learner, data: Rows, rows: int, asked=lambda: False) -> dict | None:
    """Loss, accuracy, macro F1 and calibration error; None if asked() says to stop."""
    found = metrics.class_probabilities(learner.model, data, rows, learner.device, learner.ranks,
                                        asked)
    if found is None:
        return None
    truth = np.array([ids[-1] for ids in data.ids])
    loss = float(-np.log(found[np.arange(len(truth)), truth].clip(1e-30)).mean())
    return {'val_loss': loss, **metrics.classification(found, truth)}


def shown(scores: dict) -> str:
    """The scores in words."""
    return (f'loss {scores["val_loss"]:.4f}, accuracy {scores["accuracy"]:.4f}, macro F1 '
            f'{scores["macro_f1"]:.4f}, calibration error {scores["calibration_error"]:.4f}')


# ---------------------------------------------------------------------------------------------
# A run


def evaluate_run(source, tokenizer, state: dict, size: int, device, ranks) -> dict:
    """--eval_only: a classifier on the test part of the records that it was made with; writes
    nothing."""
    (_, _, data), _, facts = class_data(tokenizer, size, state['labels'])
    if state['identity']['data'].get('test_sha256') != facts['test_sha256']:
        stop(f'dataset={dataset}: gives another test part than {run_dir} had, which may have '
             'learnt from it; give the dataset, seed and fractions of that run')
    learner, rows = just_evaluating(source, ranks, device, size, micro_batch_size)
    scores = evaluate(learner, data, rows) or {}
    print0(f'{run_dir}, step {state["step"]}: {shown(scores)}')
    processes.finish()
    return scores


def main() -> dict:
    """Train a classifier; returns the run directory, the last step and the scores."""
    code = source_hashes(__file__)      # before anybody edits it
    check_tuning(globals(), 'classify.py {} --dataset=my_texts.tsv', records.SETS)
    ranks, dev = processes.begin(device, dtype, compile, threads, timeout_minutes)

    # Model, data, run directory
    source, tokenizer, begun, size = models.load_base(run_dir, step, data_dir, block_size, ranks,
                                                      classifier=eval_only)
    if pack and source.config.arch == 'lstm':
        stop('pack=True: an LSTM cannot keep apart records in one row; add --pack=False')
    if eval_only:
        return evaluate_run(source, tokenizer, begun, size, dev, ranks)
    (train_rows, val_rows, test_rows), names, facts = class_data(tokenizer, size, [])
    model = first_model(source, len(names), dev.name)
    window = facts.pop('window')        # follows from what else is in the identity
    settings = settings_of(globals())
    weights = 'random' if random_weights else models.weights_hash(source)
    del source
    base = out_folder(out_dir, CONFIG or f'{Path(run_dir).resolve().name}-classify',
                      Path(dataset).resolve().stem if 'dataset' in FLAGS else '')
    run = Run(base, identity(settings, model.config, tokenizer, source=code, weights=weights,
                             data=facts | {'block_size': size}),
              ranks, dev, insist=init_from == 'resume')
    dev = run.device

    # What trains it
    n_steps = max_steps or math.ceil(epochs * len(train_rows) / batch_size)
    between = eval_interval or math.ceil(n_steps / 5)
    rows = parallel.rows_at_once(model, ranks, dev, batch_size, size, micro_batch_size)
    learner = tuning_learner(settings, model, ranks, dev)
    learnt = learner.tell_sizes(n_steps, batch_size, 'rows', len(train_rows))
    rows = learner.fit_rows(train_step, train_rows.batch, rows)
    batches_of = lambda i: [train_rows.batch(samples) for samples in share(
        i * batch_size, batch_size, ranks.dp_rank, ranks.dp, rows)]
    learner.warm_up(train_step, batches_of)
    run.begin(learner, tokenizer, max_steps=n_steps, settings=settings, script=__file__,
              kept={'config': asdict(model.config), 'task': 'classify', 'labels': names,
                    'block_size': size}, micro_batch_size=rows, window=window, **learnt)

    with run:
        for i in run:
            if run.due(between):
                run.score(evaluate(learner, val_rows, rows, run.asked), shown)
            run.save(between)
            if run.over:
                break
            began = time.perf_counter()
            factor = optim.schedule(i, n_steps, schedule, warmup_steps, decay_fraction,
                                    min_lr_fraction)
            done = train_step(learner, batches_of(i), i, factor, request=run.request)
            if run.count(done, time.perf_counter() - began, log_interval):
                run.log_step(done, learning_rate * factor)
        run.finish()
    scores = {} if run.stopping else test(run, test_rows, names, rows)
    return run.end(f'  python sample.py {shlex.quote(str(run.folder))} --classify="some text"',
                   **{f'test_{name}': x for name, x in scores.items()}) | scores


def test(run: Run, data: Rows, names: list[str], rows: int) -> dict:
    """The one look at the test part: the best step's scores, and a table of what it confuses."""
    best, _, _ = models.load_run(str(run.folder), device=run.device.name, classifier=True)
    scores = evaluate(replace(run.learner, model=best), data, rows) or {}
    print0(f'on the test records: {shown(scores)}')
    width = max(map(len, names)) + 2
    print0('true \\ said'.ljust(width) + ''.join(name.rjust(width) for name in names))
    for name, row in zip(names, scores['confusion']):
        print0(name.ljust(max(width, 11)) + ''.join(str(n).rjust(width) for n in row))
    return scores


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
