"""Benchmarks with error bars: python evaluate.py out/austen --tasks=hellaswag,austen.

The model is a run, a Hugging Face folder, a name on its hub, or a GGUF file. Tasks are the named
ones (hellaswag, arc_easy, arc_challenge, piqa, winogrande, openbookqa, mmlu, mmlu_<subject>,
lambada, gsm8k, humaneval, safety), a file of JSON lines with questions, a text, or a prepared
dataset, of which the validation split is taken. python evaluate.py MODEL --against=OTHER says
whether the two differ. Results go to eval.json and eval.png in the run's folder, or for another
model in out/eval-<name>/; what is there already is not computed again. The last line is JSON.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import hashlib
import json
import math
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.eval import answers, intervals, likelihood, overlap, results, sandbox
from core.eval.tasks import TASKS, Questions, load_all
from core.net import quant
from core.net.draw import Sampling
from core.ranks import processes
from core.ranks.processes import print0
from core.run import models
from core.run.checkpoint import steps
from core.settings import check_bounds, configure, stop

POSITIONAL = ('run_dir',)
RULES = 1                   # counted up when a score changes its meaning: all is scored anew

run_dir = ''                # a run such as out/austen, a Hugging Face folder, a name, a GGUF file
step = 0                    # which checkpoint; 0: the best one
tasks = 'hellaswag'         # comma-separated
against = ''                # another model, to compare with
max_items = 0               # of each task, the first; 0: all
shots = -1                  # solved examples before each item; -1: as many as the task has
chat = False                # ask in the model's chat template what is answered in writing
samples = 1                 # answers to each question; humaneval then has pass@1 and pass@<samples>
temperature = 0.0           # of answers; 0: the most probable token
top_p = 1.0                 # only the fewest tokens that have this probability together
max_new_tokens = 0          # of an answer; 0: the task's
stride = 0                  # texts: tokens between two windows; 0: block_size, the fastest
run_code = False            # run what the model writes for humaneval, in a sandbox
seed = 1337
data_dir = 'data'
device = ''                 # '': cuda, else mps, else cpu
dtype = ''                  # '': bfloat16 where the GPU has it, else float16; float32 on a CPU
quantize = ''               # int8 or int4: round the weights first
threads = 0                 # CPU threads; 0: torch's choice
slots = 8                   # answers that are written at a time
timeout_minutes = 60.0      # with torchrun: a rank that hears nothing this long gives up


class Options(NamedTuple):
    """How items are asked: settings above, for whoever asks them (train.py has others)."""
    chat: bool = False
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 0
    stride: int = 0
    seed: int = 1337
    slots: int = 8


# ---------------------------------------------------------------------------------------------
# Choosing: which continuation does the model find the most probable?


def choose(model, tokenizer, items, options, device, **work) -> dict | None:
    """acc: whether the right choice c of context x has the largest log p(c | x); acc_norm: the
    largest log p(c | x) / characters of c, since short choices are more probable."""
    pairs = [[encode(tokenizer, model, item, context, choice) for context, choice in
              zip(item.prompts, item.choices)] for item in items]
    scored = likelihood.score(model, pairs, device, **work)
    if scored is None:
        return None
    found = {'acc': [], 'acc_norm': [], 'log_probabilities': []}
    for item, choices in zip(items, scored):
        sums = np.array([choice.log_probability for choice in choices])
        lengths = [len(choice) - 1 for choice in item.choices]      # without the space before it
        found['acc'].append(float(sums.argmax() == item.gold))
        found['acc_norm'].append(float((sums / lengths).argmax() == item.gold))
        found['log_probabilities'].append(sums.tolist())
    return found


def last_words(model, tokenizer, items, options, device, **work) -> dict | None:
    """acc: whether the most probable tokens spell the word; perplexity: exp(-mean log p(word))."""
    pairs = [[encode(tokenizer, model, item, item.prompts[0], item.choices[0])] for item in items]
    scored = likelihood.score(model, pairs, device, **work)
    if scored is None:
        return None
    return {'acc': [float(word.greedy) for word, in scored],
            'perplexity': [[-word.log_probability, 1.0] for word, in scored]}


def encode(tokenizer, model, item, context: str, choice: str) -> likelihood.Pair:
    """The ids of a choice after its context. Stops if the choice alone is beyond the window."""
    pair = likelihood.encode_pair(tokenizer, context, choice)
    if not 0 < len(pair.continuation) <= model.config.block_size:
        stop(f'{item.where}: the choice {choice.strip()[:40]!r} has {len(pair.continuation):,} '
             f'tokens, the model sees {model.config.block_size:,}; leave the item out')
    return pair


# ---------------------------------------------------------------------------------------------
# Texts: how many bits does a byte take?


def texts(model, tokenizer, items, options, device, **work) -> dict | None:
    """[nats, bytes], [nats, characters], [nats, tokens], [nats, words] of each document, or if
    there is one only, of each window of it. The bits per byte of all are sum nats / ln 2 / sum
    bytes, whatever the tokenizer, and the perplexity exp(sum nats / sum tokens).
    """
    size, pairs, owners = model.config.block_size, [], []
    for n, item in enumerate(items):
        text = tokenizer.as_corpus(item.contexts[0])
        ids = [i for part in tokenizer.blocks(text) for i in tokenizer.encode(part)]
        parts = likelihood.windows(ids, likelihood.first_id(tokenizer), size,
                                   min(options.stride or size, size))
        pairs += [[part] for part in parts]
        owners += [n] * len(parts)
    scored = likelihood.score(model, pairs, device, **work)
    if scored is None:
        return None
    n_bytes, characters = tokenizer.byte_lengths(), tokenizer.character_counts()
    rows = np.array([[-one.log_probability, n_bytes[pair.continuation].sum(),
                      characters[pair.continuation].sum(), len(pair.continuation)]
                     for (pair,), (one,) in zip(pairs, scored)])
    documents = np.zeros((len(items), 4))
    np.add.at(documents, owners, rows)
    words = [[float(nats), len(re.split(r'\s+', item.contexts[0]))] for nats, item in
             zip(documents[:, 0], items)]
    rows = documents if len(items) > 1 else rows
    names = {'bits_per_byte': 1, 'bits_per_character': 2, 'perplexity': 3}
    return {name: rows[:, [0, k]].tolist() for name, k in names.items()} | {
        'word_perplexity': words}


# ---------------------------------------------------------------------------------------------
# Writing: is the answer right?


def written(model, tokenizer, items, options, device, *, task, about, ranks=None, asked=None
            ) -> dict | None:
    """For each item the share of right answers among its samples; of programs pass@k, how likely
    one of k is right. A chat model is asked in its own words about what it should refuse."""
    chat = options.chat or task.kind == 'refusal' and tokenizer.knows_chat()
    prompts = [answers.prompt_of(task, item, chat) for item in items
               for _ in range(options.samples)]
    wanted = [Sampling(options.max_new_tokens or task.max_new_tokens, options.temperature,
                       top_p=options.top_p, seed=f'{options.seed} {i}',
                       stop_tokens=tokenizer.turn_ends() if chat else {tokenizer.eos},
                       stop_strings=() if chat and task.kind == 'code' else task.stop_strings)
              for i in range(len(prompts))]
    said = answers.write(model, tokenizer, prompts, device, wanted, chat=chat, about=about,
                         slots=options.slots, ranks=ranks, asked=asked)
    if said is None:
        return None
    said = [said[i:i + options.samples] for i in range(0, len(said), options.samples)]
    found: dict[str, list] = {'texts': said}
    if task.kind == 'refusal':
        for metric, kind in (('refusal', 'harmful'), ('over_refusal', 'harmless')):
            found[metric] = [float(np.mean([*map(answers.refuses, mine)]))
                             for item, mine in zip(items, said) if item.answer == kind]
    elif task.kind == 'number':
        for metric, grade in (('strict', answers.strict), ('flexible', answers.flexible)):
            found[metric] = [float(np.mean([grade(item, text) for text in mine]))
                             for item, mine in zip(items, said)]
    else:
        right = answers.right_programs(items, said, chat, ranks, about)
        for k in sorted({1, options.samples}):
            found[f'pass_at_{k}'] = [intervals.pass_at_k(options.samples, n, k) for n in right]
    return found


MEASURES = {'choice': choose, 'word': last_words, 'text': texts}


def measure(model, tokenizer, questions: Questions, options: Options, device, *, ranks=None,
            asked=lambda: False) -> dict | None:
    """The values of each metric, item by item, and what was said; None if asked() says to stop."""
    task, about = questions.task, questions.name
    if task.kind in MEASURES:
        return MEASURES[task.kind](model, tokenizer, questions.items, options, device, ranks=ranks,
                                   about=about, asked=asked)
    return written(model, tokenizer, questions.items, options, device, task=task, ranks=ranks,
                   about=about, asked=asked)


NO_SCORES = ('log_probabilities', 'texts')
IN_BITS, AS_POWER = ('bits_per_byte', 'bits_per_character'), ('perplexity', 'word_perplexity')


def as_shown(metric: str, x: float) -> float:
    """Nats per byte or character as bits, nats per token or word as a perplexity."""
    if metric in IN_BITS:
        return x / math.log(2)
    return math.exp(min(x, 700)) if metric in AS_POWER else x   # what a float can hold


def score(values: dict, questions: Questions) -> dict:
    """{metric: {value, low, high}}: means or ratios with intervals of 95%; see core/eval."""
    found = {}
    for metric, mine in values.items():
        if metric in NO_SCORES or metric == 'acc_norm' and not questions.task.by_length:
            continue
        value, low, high = (as_shown(metric, x) for x in intervals.interval(
            np.array(mine), questions.groups(len(mine))))
        found[metric] = {'value': value, 'low': None if math.isnan(low) else low,
                         'high': None if math.isnan(high) else high, 'n': len(mine),
                         'of': questions.unit if len(mine) > 1 else 'document' if
                         questions.task.kind == 'text' else 'items'}
    return found


# ---------------------------------------------------------------------------------------------
# Models and their results


def results_folder(name: str) -> Path:
    """Where the results of a model go: into a run, or next to it for what is no run."""
    folder = Path(name)
    if folder.is_dir() and steps(folder):
        return folder
    return Path('out') / f'eval-{folder.stem if models.is_gguf(folder) else folder.resolve().name}'


def evaluate_model(name: str, asked: list[Questions], options: Options, dev, ranks) -> list[dict]:
    """The results of a model on these tasks: those in its eval.json, and new ones."""
    model, tokenizer, state = models.load_run(name, step if name == run_dir else 0, dev.name,
                                              data_dir)
    weights = models.weights_hash(model)
    if quantize:
        quant.quantize(model, quantize)
    kept, found = results.Results(results_folder(name), ranks.rank), []
    settings = options._asdict() | {'dtype': dev.dtype, 'quantize': quantize}
    print0(f'{name}, step {state["step"]}' + f'; weights in {quantize}' * bool(quantize))
    for questions in asked:
        task = questions.task
        facts = [questions.sha256, weights, asdict(model.config), tokenizer.to_json(),
                 tokenizer.template and tokenizer.template.state(), settings,
                 task.stop_strings, task.max_new_tokens, RULES]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        known = processes.broadcast(kept.get(key))
        if not known:
            began = time.perf_counter()
            try:
                values = measure(model, tokenizer, questions, options, dev, ranks=ranks) or {}
            except ValueError as e:     # of logits, or of a model that cannot write here
                stop(f'{name}: {e}')
            known = overlap.with_training(name, questions, tokenizer, data_dir) \
                if ranks.rank == 0 else {}
            known |= {'task': questions.name, 'hash': key, 'step': state['step'],
                     'settings': settings, 'about': questions.about, 'items': questions.sha256,
                     'seconds': round(time.perf_counter() - began, 1),
                     'scores': score(values, questions),
                     'values': values}
            kept.add(known)
        found.append(known)
        for metric, one in known['scores'].items():
            print0(results.line(questions.name, metric, one))
        if 'overlap' in known:
            print0(f'  {known["overlap"]:.1%} of the {questions.unit} share '
                   f'{known["overlap_tokens"]} tokens in a row with {known["overlap_with"]}, on '
                   'which the model was trained')
    if ranks.rank == 0:
        drawn = kept.draw(found)
        print(f'{kept.path}' + ' and eval.png' * drawn)
    return found


def compare(ours: list[dict], theirs: list[dict], asked: list[Questions]) -> dict:
    """{task: {metric: difference, low, high, p, p_corrected}}."""
    found = {}
    for mine, other, questions in zip(ours, theirs, asked):
        for metric in mine['scores']:
            if metric in AS_POWER:      # of other tokens it is another quantity
                continue
            a, b = (np.array(one['values'][metric]) for one in (mine, other))
            if a.ndim == 2 and a.shape != b.shape:      # windows of other lengths
                continue
            *numbers, p = intervals.difference(a, b, questions.groups(len(a)))
            numbers = [as_shown(metric, x) for x in numbers]
            found[questions.name, metric] = dict(zip(('difference', 'low', 'high'), numbers),
                                                 p=p)
    corrected = intervals.holm([one['p'] for one in found.values()])
    report = {}
    for ((name, metric), one), p in zip(found.items(), corrected):
        report.setdefault(name, {})[metric] = one | {'p_corrected': p}
        print0(results.compared(name, metric, report[name][metric]))
    return report


def main() -> dict:
    """Returns {task: {metric: score, ..., 'n': items}}, as the last line of the output."""
    check_bounds(globals(), samples=(1, None), shots=(-1, None), max_items=(0, None),
                 stride=(0, None), slots=(1, None), max_new_tokens=(0, None))
    models.check_named(run_dir, 'evaluate.py {}')
    if samples > 1 and not temperature:
        stop(f'samples={samples}: with temperature=0 all are the same; give --temperature=0.8')
    ranks, dev = processes.begin(device, dtype, False, threads, timeout_minutes, training=False,
                                 quantized=bool(quantize))
    for setting, name in (('run_dir', run_dir), ('against', against)):
        if name and ranks.rank == 0:    # downloaded before all ranks ask for it
            models.find_model(name, data_dir, setting=setting)
    asked = load_all(tasks, ranks, max_items, shots, data_dir)
    if not asked:
        stop(f'tasks={tasks}: names no task; there are {", ".join(TASKS)}')
    for questions in asked:
        if questions.task.kind == 'code':
            if not run_code:
                stop(f'tasks={questions.name}: runs programs that the model writes; allow it with '
                     '--run_code (in a sandbox: see docs/evaluation.md)')
            if why := sandbox.refusal():
                stop(f'run_code=True: {why}')
        print0(f'{questions.name}: {questions.about}')
    options = Options(chat, samples, temperature, top_p, max_new_tokens, stride, seed, slots)
    print0(results.HEADER)
    found = evaluate_model(run_dir, asked, options, dev, ranks)
    report = {one['task']: {metric: score['value'] for metric, score in one['scores'].items()}
              | {'n': max(score['n'] for score in one['scores'].values())} for one in found}
    if against:
        others = evaluate_model(against, asked, options, dev, ranks)
        print0(f'\n{run_dir} minus {against}; p corrected for several comparisons (Holm)')
        report['against'] = compare(found, others, asked)
    processes.finish()
    print0(json.dumps(report))
    return report


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
