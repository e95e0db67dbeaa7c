"""A base model becomes an assistant: python finetune.py config/tune/sft.py.

It learns to answer from conversations (supervised fine-tuning, SFT). The loss is that of the
assistant's tokens only. Several conversations lie in a row, with no attention between them. What
learns is the whole model, some layers of it, or low-rank adapters (LoRA).
The first word is a run, a Hugging Face folder (GPT-2, Llama, Qwen3) or a name on its hub. What
comes out is a run directory like any other: out/<config>/.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import math
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from core.data import records
from core.data.dataset import Rows, rows_of
from core.formats import hf
from core.net import lora, optim
from core.net.engine import generate
from core.net.weights import build_model, copy_weights, padded, spread_new_rows
from core.ranks import parallel, processes
from core.ranks.processes import print0, share
from core.run import metrics, models
from core.run.begin import check_tuning, just_evaluating, tuning_learner
from core.run.identity import identity, out_folder
from core.run.learner import Learner, Step
from core.run.run import Run
from core.settings import configure, settings_of, stop
from core.source import source_hashes

POSITIONAL = ('run_dir',)
CONFIG, FLAGS, GIVEN = '', (), ()   # filled by configure

# run
run_dir = ''                # the model to begin with: a run, a Hugging Face folder, or a name: gpt2
step = 0                    # which of its checkpoints; 0: the best one
out_dir = ''                # run directory; '': out/<config name>
init_from = ''              # resume: insist on going on with the run in out_dir
random_weights = False      # begin with random ones instead: what is pretraining worth?
eval_only = False           # evaluate run_dir on the validation part; writes nothing
against = ''                # with eval_only: another run on the same records, compared in pairs
seed = 1337
# data
dataset = ''                # a named set (core/data/records.py) or a JSON, CSV, TSV or Parquet file
validation = ''             # a file to validate on; '': a part of the dataset
val_fraction = 0.1          # of the records, to validate on
max_records = 0             # only so many records; 0: all
skip_bad = False            # leave out bad records and count them, instead of stopping
data_dir = 'data'           # where downloads live
block_size = 0              # tokens in a row; 0: as run_dir learnt, or knows, at most 2,048
pack = True                 # several records in a row
prompt_loss_weight = 0.0    # of the tokens that the assistant does not say
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
answers = 3                 # so many validation prompts are answered at each evaluation, in
                            # log.jsonl, and at the end on the screen
answer_tokens = 100         # ... with at most so many tokens
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
    """One optimizer step on micro-batches (x, y, doc, weight) of Rows: the gradient of the weighted
    mean of the losses of the assistant's tokens."""
    divisor, losses = learner.loss_divisor(sum(weight.sum() for *_, weight in batches)), []
    # If no token has a part of its weight, the sum of losses is enough: logits never exist at once.
    whole = all(((weight == 0) | (weight == 1)).all() for *_, weight in batches)
    for batch in learner.micro_batches(batches, step):
        with learner.autocast():
            loss = weighted_loss(learner.trained, batch, whole) / divisor
        loss.backward()
        losses.append(loss.detach())
    return learner.update(losses, factor, limit, request)


def weighted_loss(trained, batch, whole: bool = False):
    """The weighted sum of the losses of a micro-batch; `whole`: all its weights are 0 or 1, and
    targets without weight are -100."""
    x, y, doc, weight = batch
    if whole:
        return trained(x, y, doc=doc, reduction='sum')
    return (trained(x, y, doc=doc, reduction='none') * weight).sum()


# ---------------------------------------------------------------------------------------------
# Data and model


def chat_data(tokenizer, size: int) -> tuple[Rows, Rows, list, dict]:
    """Rows to train on and to validate on, the conversations of these, and facts for the log."""
    split = records.load_split(dataset, validation, val_fraction, records.conversation, data_dir,
                               skip_bad, max_records=max_records)
    (train, val), facts = records.fit_window(dataset, 'conversations', size, [
        [(r, records.encode(tokenizer, r.where, r.messages, size, weight)) for r in part]
        for part, weight in zip(split, (prompt_loss_weight, 0.0))])
    train_rows, val_rows = (rows_of(part, size, seed, pack) for part in (train, val))
    print0(f'{dataset}: {len(train):,} conversations to train on in {len(train_rows):,} rows of '
           f'{size}, {len(val):,} to validate on')
    return train_rows, val_rows, [r for r, _ in val], facts


def first_model(source, tokenizer, n_known: int, device):
    """The model that learns: with the weights of `source`, which knows the first n_known tokens, or
    random ones."""
    config = source.config
    vocab = max(config.vocab_size, padded(len(tokenizer), config.vocab_size))
    if len(tokenizer) > n_known:
        print0(f'{run_dir}: has no tokens for chats, which are new; vocabulary '
               f'{config.vocab_size:,} -> {vocab:,}')
        if save_adapters:
            stop(f'save_adapters=True: adapters alone do not fit {run_dir}, which has no tokens '
                 'for chats; leave it out: the run has the merged weights')
    config = replace(config, dropout=dropout, vocab_size=vocab)
    model = build_model(config, seed if random_weights else None, device)
    if random_weights:
        print0('begins with random weights')
    else:
        copy_weights(source, model)
        if len(tokenizer) > n_known:
            spread_new_rows(model, n_known, seed)
    model.recompute = activation_checkpointing
    if lora_rank:
        lora.add(model, lora_rank, lora_alpha, lora_targets, lora_dropout, seed)
    lora.freeze(model, layers)
    return model.train()


# ---------------------------------------------------------------------------------------------
# Between two steps


def evaluate(learner: Learner, data: Rows, rows: int, asked=lambda: False) -> dict | None:
    """Loss per token of the assistant and its 95% interval; None if asked() says to stop."""
    losses = metrics.sequence_losses(learner.model, data, rows, learner.device, learner.ranks,
                                     asked)
    if losses is None:
        return None
    loss, interval = metrics.mean_interval(losses)
    return {'val_loss': loss, 'interval': interval, 'losses': losses}


def shown(scores: dict) -> str:
    """The scores in words."""
    return (f'loss {metrics.shown(scores["val_loss"], scores["interval"])} nats per token of the '
            'assistant')


def answer(model, tokenizer, found: list, asked=lambda: False) -> list[str] | None:
    """What the model says, greedily, instead of the last message of each conversation; None if
    asked() says to stop."""
    if not found:
        return []
    prompts = [tokenizer.encode_chat(record.messages[:-1], reply=True) for record in found]
    end = tokenizer.turn_ends()
    said = [[] for _ in prompts]
    with parallel.looking_on(model):
        for new in generate(model, prompts, answer_tokens, temperature=0, stop_tokens=end,
                            n_tokens=len(tokenizer)):
            if asked():
                return None
            for row, i in zip(said, new):
                row += [i] * (i >= 0 and i not in end)
    return [tokenizer.decode(row) for row in said]


def note_answers(run: Run, conversations: list, said: list[str]) -> None:
    """Log answers; at the end print them, too."""
    for record, text in zip(conversations, said):
        question = record.messages[-2]['content']
        run.note('answer', f'--- {question}\n{text}\n---' if run.ends else '',
                 question=question, answer=text, expected=record.messages[-1]['content'])


# ---------------------------------------------------------------------------------------------
# A run


def evaluate_run(source, tokenizer, state: dict, size: int, device, ranks) -> dict:
    """--eval_only: a run, and what it differs by from another one, on records that it has not
    learnt from; writes nothing."""
    data = chat_data(tokenizer, size)[1]
    learner, rows = just_evaluating(source, ranks, device, size, micro_batch_size)
    scores = evaluate(learner, data, rows) or {}
    print0(f'{run_dir}, step {state["step"]}: {shown(scores)}')
    if against:
        other, known, found = models.load_run(against, device=device.name, data_dir=data_dir)
        if known.hash() != tokenizer.hash() or size > other.config.block_size:
            stop(f'against={against}: has another tokenizer, or knows fewer than {size} positions')
        theirs = evaluate(replace(learner, model=other), data, rows) or {}
        scores['difference'] = metrics.paired_interval(scores['losses'], theirs['losses'])
        print0(f'{against}, step {found["step"]}: loss {theirs["val_loss"]:.4f}; '
               f'the difference is {metrics.shown(*scores["difference"])} (95%, pairs)')
    processes.finish()
    return scores


def main() -> dict:
    """Fine-tune; returns the run directory, the last step and the scores."""
    code = source_hashes(__file__)      # before anybody edits it
    check_tuning(globals(), 'finetune.py {} --dataset=my_chats.jsonl', records.SETS)
    if against and not eval_only:
        stop(f'against={against}: is for --eval_only')
    ranks, dev = processes.begin(device, dtype, compile, threads, timeout_minutes)

    # Model, data, run directory
    source, tokenizer, begun, size = models.load_base(run_dir, step, data_dir, block_size, ranks)
    if pack and source.config.arch == 'lstm':
        stop('pack=True: an LSTM cannot keep apart records in one row; add --pack=False')
    if eval_only:
        return evaluate_run(source, tokenizer, begun, size, dev, ranks)
    if save_adapters:
        hf.architecture(source.config)      # stops if PEFT could not have it
    n_known = len(tokenizer)
    if not tokenizer.knows_chat():
        tokenizer = tokenizer.with_chat()
    train_rows, val_rows, conversations, facts = chat_data(tokenizer, size)
    conversations = conversations[:answers]
    model = first_model(source, tokenizer, n_known, dev.name)
    window = facts.pop('window')        # follows from what else is in the identity
    settings = settings_of(globals())
    weights = 'random' if random_weights else models.weights_hash(source)
    del source
    base = out_folder(out_dir, CONFIG or f'{Path(run_dir).resolve().name}-chat',
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
              kept={'config': asdict(model.config), 'task': 'chat', 'labels': [],
                    'block_size': size}, micro_batch_size=rows, window=window, **learnt)

    with run:
        for i in run:
            if run.due(between):
                scores = evaluate(learner, val_rows, rows, run.asked)
                said = answer(model, tokenizer, conversations, run.asked) if scores else None
                if run.score(None if said is None else scores, shown):
                    note_answers(run, conversations, said or [])
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
    if save_adapters:
        run.save_adapters(run_dir, lora_dropout)
    return run.end(f'  python sample.py {shlex.quote(str(run.folder))}')


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
