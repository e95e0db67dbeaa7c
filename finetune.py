"""A base model becomes an assistant, or a classifier: python finetune.py config/tune/sft.py.

The first word is a run, a Hugging Face folder (GPT-2, Llama, Qwen3) or a name on its hub.
task='chat' learns to answer from conversations: loss on the assistant's tokens only, several
conversations in a row, with no attention between them. task='classify' gives the model another
head, read at the last token of a text. Either in full, in some layers, or with low-rank adapters.
What comes out is a run directory like any other: out/<config>/.
"""
import functools
import math
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import model as model_module
from core import device as hardware
from core.data import clean, records
from core.data.dataset import Rows
from core.formats import hf
from core.net import lora, optim
from core.ranks import parallel, processes
from core.ranks.processes import print0, share
from core.run import checkpoint, metrics, rundir
from core.run.learner import Learner, print_above
from core.settings import check_bounds, check_choice, configure, settings_of, stop
from core.source import source_hashes
from model import build_model, copy_weights, count_parameters, generate, padded

POSITIONAL = ('run_dir',)
CONFIG, FLAGS, GIVEN = '', (), ()   # filled by configure

# run
run_dir = ''                # the model to begin with: a run, a Hugging Face folder, or a name: gpt2
step = 0                    # which of its checkpoints; 0: the best one
out_dir = ''                # run directory; '': out/<config name>
init_from = ''              # resume: insist on going on with the run in out_dir
random_weights = False      # begin with random ones instead: what is pretraining worth?
eval_only = False           # evaluate run_dir, on the test part for a classifier; writes nothing
against = ''                # with eval_only: another run on the same records, compared in pairs
seed = 1337
# data
task = 'chat'               # chat or classify
dataset = ''                # a named set (core/data/records.py), or a .jsonl, .json, .csv or .tsv
validation = ''             # chat: a file to validate on; '': a part of the dataset
val_fraction = 0.1          # of the records, to validate on
test_fraction = 0.2         # classify: of the records, looked at once, at the end
labels = ''                 # classify: the classes with commas; '': those that occur
max_records = 0             # chat: only so many records; 0: all
skip_bad = False            # leave out bad records and count them, instead of stopping
data_dir = 'data'           # where downloads live
block_size = 0              # tokens in a row; 0: as run_dir learnt, or knows, at most 2,048
pack = True                 # several records in a row
prompt_loss_weight = 0.0    # chat: of the tokens that the assistant does not say
balance = False             # classify: all classes weigh the same, however many records they have
# what learns
layers = 'all'              # all; head; or the last so many blocks, with final norm and head
dropout = 0.0
lora_rank = 0               # low-rank adapters (core/net/lora.py); 0: none, all weights learn
lora_alpha = 16.0           # their weight is lora_alpha / lora_rank
lora_targets = ''           # layers that have them, such as q_proj,v_proj; '': all in the blocks
lora_dropout = 0.0
save_adapters = False       # at the end the adapters alone, too, as PEFT has them: <run>/adapter
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
answers = 3                 # chat: so many validation prompts are answered at each evaluation, in
                            # log.jsonl, and at the end on the screen
answer_tokens = 100         # ... with at most so many tokens
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
                 val_fraction=(0, 0.9), test_fraction=(0, 0.9), max_records=(0, None),
                 prompt_loss_weight=(0, 1),
                 dropout=(0, 0.99), lora_rank=(0, None), lora_alpha=(1e-6, None),
                 lora_dropout=(0, 0.99), learning_rate=(0, None), weight_decay=(0, None),
                 beta1=(0, 0.9999), beta2=(0, 0.9999), grad_clip=(0, None), epochs=(1e-6, None),
                 max_steps=(0, None), warmup_steps=(0, None), decay_fraction=(0, 1),
                 min_lr_fraction=(0, 1), eval_interval=(0, None), log_interval=(1, None),
                 answers=(0, None), answer_tokens=(1, None), seed=(0, 2 ** 31 - 1),
                 threads=(0, None), timeout_minutes=(0.01, None), step=(0, None))
    check_choice(globals(), task=('chat', 'classify'), schedule=optim.SCHEDULES,
                 init_from=('', 'resume'))
    if layers not in ('all', 'head') and not layers.isdigit():
        stop(f'layers={layers}: must be all, head, or a number of blocks')
    if lora_rank and layers != 'all':
        stop(f'layers={layers} with lora_rank={lora_rank}: choose one of the two')
    if save_adapters and (not lora_rank or task != 'chat'):
        stop('save_adapters=True: needs task=chat and a lora_rank')
    other = {'chat': ('balance', 'labels', 'test_fraction'),
             'classify': ('validation', 'max_records', 'prompt_loss_weight', 'answers', 'against',
                          'answer_tokens')}[task]
    for name in other:
        if name in FLAGS:
            stop(f'{name}={globals()[name]}: does nothing with task={task}; leave it out')
    if against and not eval_only:
        stop(f'against={against}: is for --eval_only')
    checkpoint.check_named(run_dir, 'finetune.py {} --dataset=my_chats.jsonl')
    if not dataset:
        stop(f'no dataset given: a file, or one of {", ".join(records.SETS)}')


# ---------------------------------------------------------------------------------------------
# Records to rows


def chat_data(tokenizer, size: int) -> tuple[Rows, Rows, list, dict]:
    """Rows to train on and to validate on, the conversations of these, and facts for the log."""
    split = records.load_split(dataset, validation, val_fraction, records.conversation, data_dir,
                               skip_bad, max_records=max_records)
    (train, val), facts = records.fit_window(dataset, 'conversations', size, [
        [(r, records.encode(tokenizer, r.where, r.messages, size, weight)) for r in part]
        for part, weight in zip(split, (prompt_loss_weight, 0.0))])
    train_rows, val_rows = to_rows(train, size), to_rows(val, size)
    print0(f'{dataset}: {len(train):,} conversations to train on in {len(train_rows):,} rows of '
           f'{size}, {len(val):,} to validate on')
    return train_rows, val_rows, [r for r, _ in val], facts


def to_rows(part: list, size: int) -> Rows:
    """Rows of (record, Encoded)."""
    return Rows([it.ids for _, it in part], [it.weights for _, it in part], size, seed, packed=pack)


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
                 'correct it')
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
    return [to_rows(part, size) for part in encoded], names, facts | {'classes': names}


# ---------------------------------------------------------------------------------------------
# The model


def initial_model(source, tokenizer, n_known: int, n_classes: int, dev):
    """The model in its shape for the task, with the weights of `source`, or random ones; `source`
    knows the first n_known tokens."""
    config = source.config
    vocab = max(config.vocab_size, padded(len(tokenizer), config.vocab_size))
    if len(tokenizer) > n_known:
        print0(f'{run_dir}: has no tokens for chats, which are new; vocabulary '
               f'{config.vocab_size:,} -> {vocab:,}')
        if save_adapters:
            stop(f'save_adapters=True: adapters alone do not fit {run_dir}, which has no tokens '
                 'for chats; leave it out: the run has the merged weights')
    config = replace(config, dropout=dropout, vocab_size=vocab, n_classes=n_classes,
                     tied=config.tied and not n_classes)
    model = build_model(config, seed if random_weights else None, dev.name)
    if random_weights:
        print0('begins with random weights')
    else:
        copy_weights(source, model)
        if len(tokenizer) > n_known:
            model_module.spread_new_rows(model, n_known, seed)
    model.recompute = activation_checkpointing
    if lora_rank:
        lora.add(model, lora_rank, lora_alpha, lora_targets, lora_dropout, seed)
        if n_classes:
            model.lm_head.requires_grad_(True)
    elif layers != 'all':
        last = 0 if layers == 'head' else int(layers)
        if last > config.n_layer:
            stop(f'layers={layers}: the model has only {config.n_layer}')
        blocks = [model.h[str(i)] for i in range(config.n_layer - last, config.n_layer)]
        learns = {p for m in (*blocks, model.ln_f, model.lm_head) for p in m.parameters()}
        for p in set(model.parameters()) - learns:
            p.requires_grad_(False)
    return model


def loss_sums(trained, batch, whole: bool = False) -> torch.Tensor:
    """The weighted loss of a micro-batch of Rows; `whole`: all its weights are 0 or 1."""
    x, y, doc, weight = batch
    if whole:       # logits never exist at once
        return trained(x, y, doc=doc, reduction='sum')[None]
    return (trained(x, y, doc=doc, reduction='none') * weight).sum()[None]


# ---------------------------------------------------------------------------------------------
# Evaluation


def evaluate(model, data, rows, dev, ranks, asked=lambda: False) -> dict | None:
    """Loss and, of a classifier, accuracy and so on, on Rows. None if asked() says to stop."""
    if task == 'chat':
        losses = metrics.sequence_losses(model, data, rows, dev, ranks, asked)
        if losses is None:
            return None
        loss, interval = metrics.mean_interval(losses)
        return {'val_loss': loss, 'interval': interval, 'losses': losses}
    found = metrics.class_probabilities(model, data, rows, dev, ranks, asked)
    if found is None:
        return None
    truth = np.array([ids[-1] for ids in data.ids])
    loss = float(-np.log(found[np.arange(len(truth)), truth].clip(1e-30)).mean())
    return {'val_loss': loss, **metrics.classification(found, truth)}


def shown(scores: dict) -> str:
    """The scores in a line."""
    if 'accuracy' in scores:
        return (f'loss {scores["val_loss"]:.4f}, accuracy {scores["accuracy"]:.4f}, macro F1 '
                f'{scores["macro_f1"]:.4f}, calibration error {scores["calibration_error"]:.4f}')
    return (f'loss {metrics.shown(scores["val_loss"], scores["interval"])} nats per token of the '
            'assistant')


def answer(model, tokenizer, found: list, asked=lambda: False) -> list[str]:
    """What the model says, greedily, instead of the last message of each conversation."""
    if not found:
        return []
    prompts = [tokenizer.encode_chat(record.messages[:-1], reply=True) for record in found]
    end = tokenizer.turn_ends()
    said = [[] for _ in prompts]
    with parallel.looking_on(model):
        for new in generate(model, prompts, answer_tokens, temperature=0, stop_tokens=end,
                            n_tokens=len(tokenizer)):
            if asked():
                break
            for row, i in zip(said, new):
                row += [i] * (i >= 0 and i not in end)
    return [tokenizer.decode(row) for row in said]


def take_stock(at, log, model, tokenizer, data, conversations, rows, dev, ranks, asked) -> bool:
    """Evaluate, and answer some prompts; all goes to the log, the scores into at.

    Returns whether asked() said to stop meanwhile: then nothing is noted, and it is still due.
    """
    scores = evaluate(model, data, rows, dev, ranks, asked)
    said = answer(model, tokenizer, conversations, asked) if scores else []
    if asked():
        return True
    at.note(scores['val_loss'])
    scores.pop('losses', None)
    log.write('eval', step=at.step, seconds=at.seconds, **scores)
    print_above(ranks, f'step {at.step}: {shown(scores)}, {at.seconds:.0f} s of training')
    for record, text in zip(conversations, said):
        log.write('answer', step=at.step, question=record.messages[-2]['content'], answer=text,
                  expected=record.messages[-1]['content'])
        if at.step == at.max_steps:     # those of other steps are in the log only
            print_above(ranks, f'--- {record.messages[-2]["content"]}\n{text}\n---')
    return False


def evaluate_only(source, tokenizer, state, size: int, dev, ranks) -> dict:
    """--eval_only: a run, and what it differs by from another one, on records that it has not
    learnt from; writes nothing."""
    if task == 'chat':
        data = chat_data(tokenizer, size)[1]
    else:
        (_, _, data), _, facts = class_data(tokenizer, size, state['labels'])
        known = state['identity']['data'].get('test_sha256')
        if known != facts['test_sha256']:
            stop(f'dataset={dataset}: gives another test part than {run_dir} had, which may have '
                 'learnt from it; give the dataset, seed and fractions of that run')
    rows = micro_batch_size or hardware.fit_micro_batch(dev, 64, size, 1, source.config.n_embd,
                                                        ranks.local_world)
    scores = evaluate(source.to(dev.name), data, rows, dev, ranks)
    print0(f'{run_dir}, step {state["step"]}: {shown(scores)}')
    if against:
        other, known, found = checkpoint.load_run(against, device=dev.name, data_dir=data_dir)
        if known.hash() != tokenizer.hash() or size > other.config.block_size:
            stop(f'against={against}: has another tokenizer, or knows fewer than {size} positions')
        losses = metrics.sequence_losses(other, data, rows, dev, ranks)
        scores['difference'] = metrics.paired_interval(scores['losses'], losses)
        print0(f'{against}, step {found["step"]}: loss {metrics.mean_interval(losses)[0]:.4f}; '
               f'the difference is {metrics.shown(*scores["difference"])} (95%, pairs)')
    return scores


def main() -> dict:
    """Fine-tune; returns the run directory, the last step and the scores."""
    code = source_hashes(__file__)      # before anybody edits it
    check_settings()
    ranks = processes.find_ranks()
    why = processes.arrange(ranks)
    dev = hardware.choose(device, dtype, compile, threads, ranks.local_rank, ranks.local_world)
    at = checkpoint.Progress(evaluated=-1)
    processes.start(ranks, dev, timeout_minutes, at)
    dev = hardware.agree(dev, processes.exchange)
    print0(*dev.why, *why, sep='\n')

    # Model and data
    source, tokenizer, begun, size = rundir.load_base(
        run_dir, step, data_dir, block_size, ranks, classifier=eval_only and task == 'classify')
    if pack and source.config.arch == 'lstm':
        stop('pack=True: an LSTM cannot keep apart records in one row; add --pack=False')
    if eval_only:
        scores = evaluate_only(source, tokenizer, begun, size, dev, ranks)
        processes.finish()
        return scores
    if save_adapters:
        hf.architecture(source.config)      # stops if PEFT could not have it
    n_known = len(tokenizer)
    if task == 'chat' and not tokenizer.knows_chat():
        tokenizer = tokenizer.with_chat()
    conversations, names, test_rows = [], [], None
    if task == 'chat':
        train_rows, val_rows, found, facts = chat_data(tokenizer, size)
        conversations = found[:answers]
    else:
        (train_rows, val_rows, test_rows), names, facts = class_data(tokenizer, size, [])
    model = initial_model(source, tokenizer, n_known, len(names), dev)
    window = facts.pop('window')        # follows from what else is in the identity
    identity = rundir.identity(
        settings_of(globals()), model.config, tokenizer, source=code,
        data=facts | {'block_size': size},
        weights='random' if random_weights else checkpoint.weights_hash(source))
    del source
    at.max_steps = max_steps or math.ceil(epochs * len(train_rows) / batch_size)
    between = eval_interval or math.ceil(at.max_steps / 5)
    base = Path(out_dir) if out_dir else rundir.named(
        CONFIG or f'{Path(run_dir).resolve().name}-{task}',
        Path(dataset).resolve().stem if 'dataset' in FLAGS else '')
    run, saver, state, dev = rundir.open_run(base, identity, ranks, dev, init_from == 'resume')

    # Optimizer, what a checkpoint says
    n_learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_parameters = count_parameters(model)
    print0(f'{n_learnt:,} of {n_parameters:,} parameters learn ({n_learnt / n_parameters:.2%}); '
           f'{at.max_steps:,} steps of {batch_size} rows, {len(train_rows) / batch_size:,.1f} an '
           'epoch')
    per_rank = math.ceil(batch_size / ranks.dp)
    rows = min(micro_batch_size, per_rank) or hardware.fit_micro_batch(
        dev, per_rank, size, model.config.n_layer, model.config.n_embd, ranks.local_world,
        parallel.learning_bytes(model, ranks), activation_checkpointing)
    rows = min(processes.exchange(rows))    # machines may have more memory or less
    trained, n_micro = parallel.wrap(model, ranks, dev, per_rank, rows)
    learner = Learner(model, trained, optim.make_optimizers(
        model, 'adamw', learning_rate, weight_decay, beta1, beta2),
        optim.LossScale(dev.dtype == 'float16'), dev, ranks, grad_clip,
        seed if dropout or lora_dropout else None)
    facts = {'config': asdict(model.config), 'identity': identity, 'task': task, 'labels': names,
             'block_size': size}

    def do_step(step, factor, *rest):
        shares = share(step * batch_size, batch_size, ranks.dp_rank, ranks.dp, rows, n_micro)
        batches = [train_rows.batch(samples) for samples in shares]
        n_targets = sum(weight.sum() for *_, weight in batches)
        whole = all(((weight == 0) | (weight == 1)).all() for *_, weight in batches)
        return learner.step(batches, functools.partial(loss_sums, whole=whole), n_targets, step,
                            factor, *rest)

    model.train()
    rows = learner.fit_rows(rows, train_rows.batch, loss_sums)
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
                stopping = take_stock(at, log, model, tokenizer, val_rows, conversations, rows, dev,
                                      ranks, asked)
            if (due or stopping or ends) and at.step and at != saved and saver:
                saver.save(model, learner.optimizers, tokenizer, asdict(at) | facts | {
                    'scaler': learner.scaler.state_dict()}, last=ends)
                saved = replace(at)
            if stopping or ends:
                break
            began = time.perf_counter()
            factor = optim.schedule(at.step, at.max_steps, schedule, warmup_steps, decay_fraction,
                                    min_lr_fraction)
            (loss,), grad_norm, skipped, stopping = do_step(at.step, factor, math.inf, request)
            at.step, at.seconds = at.step + 1, at.seconds + time.perf_counter() - began
            bar.update()
            if skipped:
                learner.note_skip(at, log, bar, saver, skipped, train_loss=loss,
                                  grad_norm=grad_norm)
                continue
            at.skipped_in_a_row = 0
            if at.step % log_interval == 0 or at.step == at.max_steps:
                log.write('step', step=at.step, seconds=at.seconds, train_loss=loss,
                          grad_norm=grad_norm, learning_rate=learning_rate * factor)
                bar.set_postfix_str(f'loss {loss:.4f}')
        bar.close()
        if saver:
            saver.finish(at.step)
        processes.broadcast(None, patient=True)
    result = {'run_dir': str(run), 'step': at.step, 'stopped': stopping, 'val_loss': at.val_loss,
              'best_val_loss': at.best_val_loss, 'seconds': at.seconds}
    if stopping:
        print0(f'stopped after step {at.step}, which is saved in {run}; the same command goes on'
               if at.step else 'stopped before the first step')
    else:
        result |= end_run(run, at, log, test_rows, names, rows, dev, ranks, model)
    if ranks.rank == 0:
        saver.lock.close()
    processes.finish()
    return result


def end_run(run, at, log, test_rows, names, rows, dev, ranks, model) -> dict:
    """Test a classifier's best step, once; log the end; say what to do next."""
    scores = {}
    if test_rows:
        best, _, _ = checkpoint.load_run(str(run), device=dev.name, classifier=True)
        scores = evaluate(best, test_rows, rows, dev, ranks)
        print0(f'on the test records: {shown(scores)}')
        width = max(map(len, names)) + 2
        print0('true \\ said'.ljust(width) + ''.join(name.rjust(width) for name in names))
        for name, row in zip(names, scores['confusion']):
            print0(name.ljust(max(width, 11)) + ''.join(str(n).rjust(width) for n in row))
    if save_adapters and ranks.rank == 0:
        checkpoint.load_weights(model, run, at.best_step)
        lora.save(model, run / 'adapter', run_dir, lora_dropout)
    log.write('end', step=at.step, seconds=at.seconds, best_val_loss=at.best_val_loss,
              best_step=at.best_step, **{f'test_{k}': v for k, v in scores.items()})
    plotted = ranks.rank == 0 and rundir.plot_losses(run)
    print0(f'best validation loss {at.best_val_loss or math.nan:.4f} at step {at.best_step}; '
           f'{run}/ has the checkpoints, log.jsonl' + ' and loss.png' * plotted + '\n\nnext:\n'
           f'  python sample.py {shlex.quote(str(run))}' + ' --classify="some text"' * bool(names))
    return scores


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
