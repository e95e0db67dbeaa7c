"""Pretraining: python train.py config/shakespeare.py, or torchrun --nproc_per_node=8 train.py.

Bare `python train.py` is GPT-2 small on OpenWebText: 12 blocks of 12 x 768^2 weights, tables of
50,304 x 768 and 1,024 x 768, and 121,344 biases and weights of norms:
124,475,904 parameters, 854.65 MFLOP per token, 491,520 tokens per step
A run directory (out/<config>/, without a config out/gpt2/) gets log.jsonl, loss.png and
checkpoints; the same command again resumes an unfinished run. A rank is one of its processes.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import importlib
import math
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

from core.data import named
from core.data.chosen import get_data
from core.data.dataset import IGNORE, Ahead, load_split
from core.net import optim
from core.net.engine import generate, refusal
from core.ranks import parallel, processes
from core.ranks.processes import print0, share
from core.run import begin, models
from core.run.identity import identity, identity_of, out_folder
from core.run.learner import Learner, Step, count_targets, to_device
from core.run.run import Run
from core.settings import configure, settings_of, stop
from core.source import source_hashes
from core.text import tokenizer as tokenizers

# Each lower-case name below is a setting: configure() changes it to what config files say, then to
# what --name=value says. It notes the config's name, the paths of all configs, the names that flags
# have set, and those that either has set.
CONFIG, CONFIGS, FLAGS, GIVEN = '', (), (), ()

# run
out_dir = ''                    # run directory; '': out/<config name>
init_from = 'scratch'           # scratch: new weights, or the same unfinished run goes on; resume:
                                # it does though the code was edited; or a model, such as gpt2
eval_only = False               # evaluate the run in out_dir and stop; nothing is written
seed = 1337
# data
dataset = 'openwebtext'         # a name that prepare.py knows, a folder of data/, or a path to text
fallback_dataset = ''           # taken, loudly, when dataset needs a network and there is none
data_dir = 'data'
tokenizer = ''                  # the dataset's (see prepare.py); '': its own, or that of init_from
batch_size = 480                # sequences per optimizer step, over all processes
micro_batch_size = 0            # sequences per forward pass; 0: as memory allows
block_size = 1024               # tokens in a sequence
pack_documents = False          # whole documents, kept apart: PackedWindows in core/data/dataset.py
# model (see GPTConfig in model.py)
arch = 'gpt'                    # gpt or lstm
depth = 0                       # N sets n_layer = n_head = N, n_embd = 64 N, scales AdamW's rates
n_layer = 12
n_head = 12
n_kv_head = 0                   # 0: n_head
n_embd = 768
head_dim = 0                    # 0: n_embd / n_head
n_hidden = 0                    # 0: 4 n_embd, swiglu 8/3 n_embd
norm = 'layernorm'              # layernorm or rmsnorm
norm_eps = 1e-5
position = 'learned'            # learned, rope, sinusoidal or none
rope_theta = 10000.0
rope_scaling = ''               # Llama 3.1's: factor, low and high turns, old context: 32,1,4,8192
mlp = 'gelu'                    # gelu, swiglu or relu2
qk_norm = False                 # RMSNorm of queries and keys
window = 0                      # sliding-window attention; 0: all positions
tied = True                     # output layer and embedding share one matrix
dropout = 0.0
bias = True                     # in linear layers and layernorms
vocab_size = 0                  # 0: the tokenizer's (above 1,000 rounded up to a multiple of 64);
                                # a new BPE tokenizer is trained to have this many tokens
# optimizer
optimizer = 'adamw'             # adamw, or muon for the matrices inside the blocks
learning_rate = 6e-4            # AdamW's peak
weight_decay = 0.1              # AdamW's, on matrices
beta1 = 0.9
beta2 = 0.95
embed_learning_rate = 0.0       # of embeddings; 0: learning_rate
muon_learning_rate = 0.02
muon_weight_decay = 0.0
muon_momentum = 0.95
ns_steps = 5                    # Newton-Schulz iterations in Muon
grad_clip = 1.0                 # largest gradient norm; 0: no clipping
spike_sigma = 0.0               # skip a step this many deviations above the mean norm; 0: never
# schedule
max_steps = 20_000              # 20,000 x 480 x 1,024 tokens = 9.8 billion
max_minutes = 0.0               # if given: train this long, whatever the number of steps; the
                                # schedule is that of max_steps, stretched to this time
schedule = 'cosine'             # cosine, linear, wsd or constant
warmup_steps = 700
decay_fraction = 0.5            # wsd: the part of all steps over which the rate falls
min_lr_fraction = 0.1           # what is left of the rates at the end
# intervals, in steps
eval_interval = 250
eval_tokens = 0                 # evaluate on this many validation tokens, the first; 0: on all
log_interval = 10
save_interval = 0               # 0: eval_interval
sample_interval = 0             # write a sample to the log this often; 0: only one at the end
sample_tokens = 300
benchmark_interval = 0          # ask the tasks in `benchmarks` this often; 0: never
benchmarks = 'hellaswag'        # tasks of evaluate.py, comma-separated
benchmark_items = 500           # of each task, the first; 0: all
# system
device = ''                     # '': cuda, else mps, else cpu
dtype = ''                      # '': bfloat16 if the hardware has it, else float16 (GPU) or float32
compile = True                  # torch.compile
threads = 0                     # CPU threads; 0: torch's choice
timeout_minutes = 10.0          # a rank that hears nothing from the others this long gives up
tp = 1                          # tensor parallel: this many ranks share each matrix
pp = 1                          # pipeline parallel: stages; dp = ranks / (tp * pp) share the data
zero = 0                        # sharded over data-parallel ranks: 0 nothing, 2 optimizer state and
                                # gradients, 3 weights as well
replicas = 0                    # with zero: keep this many sharded copies (HSDP); 0: one
sequence_parallel = False       # with tp: cut norms and residual stream by positions
pp_schedule = '1f1b'            # 1f1b, or interleaved: two stages a rank
check_layout = False            # try tp, pp and zero on a small copy even if they passed before
activation_checkpointing = False  # recompute blocks in the backward pass: less memory, 1/3 slower
# more logging
wandb = False                   # needs pip install wandb
tensorboard = False             # needs pip install tensorboard


# ---------------------------------------------------------------------------------------------
# A training step


def train_step(learner: Learner, batches, step: int, factor: float, limit=math.inf, request=None
               ) -> Step | None:
    """One optimizer step on this rank's micro-batches (x, y, doc), at `factor` times the learning
    rates. The gradient is that of the mean loss over the targets of all micro-batches of all ranks.
    Not applied if its norm is above `limit`; `request` may ask the run to end. None in `warm_up`.
    """
    divisor, losses = learner.loss_divisor(count_targets(batches)), []
    if learner.ranks.pp > 1:
        learner.seed_dropout(step, 0)
        losses.append(learner.trained.train(batches, divisor))      # forward, loss, backward
    else:
        for x, y, doc in learner.micro_batches(batches, step):
            with learner.autocast():
                loss = learner.trained(x, y, doc=doc, reduction='sum') / divisor
            loss.backward()
            losses.append(loss.detach())
    return learner.update(losses, factor, limit, request)


# ---------------------------------------------------------------------------------------------
# Between two steps


@torch.no_grad()
def evaluate(learner: Learner, windows, tokenizer, rows: int, asked=lambda: False) -> dict | None:
    """Loss in nats per token and bits per byte over the windows of a split, each target once; None
    if asked() says, to all ranks alike, that the run is to stop."""
    ranks, device, byte_lengths = learner.ranks, learner.device, tokenizer.byte_lengths()
    n = min(len(windows), math.ceil(eval_tokens / windows.block_size) or len(windows))
    nats, targets, n_bytes = [], 0, 0
    at_once = learner.trained.n_micro if ranks.pp > 1 else 1
    shares = share(0, n, ranks.dp_rank, ranks.dp, rows, at_once)
    with parallel.looking_on(learner.model):
        for i in range(0, len(shares), at_once):
            if asked():
                return None
            batches = [windows.batch(samples) for samples in shares[i:i + at_once]]
            if ranks.pp > 1:
                nats.append(learner.trained.evaluate(batches))
            else:
                x, y, doc = to_device(batches[0], device)
                with device.autocast(), parallel.passes(ranks):
                    nats.append(learner.model(x, y, doc=doc, reduction='sum'))
            real = torch.cat([y[y != IGNORE] for _, y, _ in batches])
            targets, n_bytes = targets + len(real), n_bytes + int(byte_lengths[real].sum())
    sums = torch.tensor([sum(torch.stack(nats).tolist()), targets, n_bytes], dtype=torch.float64)
    nats, targets, n_bytes = processes.all_sum(sums * ranks.owns_loss, device).tolist()
    return {'val_loss': nats / targets, 'bits_per_byte': nats / math.log(2) / max(1.0, n_bytes)}


def shown(scores: dict) -> str:
    """The scores of an evaluation in words."""
    return (f'validation loss {scores["val_loss"]:.4f} nats per token, '
            f'{scores["bits_per_byte"]:.4f} bits per byte')


def make_sample(model, tokenizer, asked=lambda: False) -> str | None:
    """Text that the model writes without a prompt; None if asked() says to stop."""
    ids = []
    with parallel.looking_on(model):
        for row, in generate(model, [tokenizer.start()], sample_tokens, temperature=0.8, seed=seed,
                             n_tokens=len(tokenizer)):
            if asked():
                return None
            ids.append(row)
    return tokenizer.decode(ids)


def asked_in_training(model, ranks) -> list:
    """The tasks in `benchmarks`. Stops if there is no such one, or it cannot be asked here."""
    stage = importlib.import_module('evaluate')
    found = stage.load_all(benchmarks, ranks, benchmark_items, data_dir=data_dir)
    for questions in found:
        if questions.task.kind == 'code':
            stop(f'benchmarks={questions.name}: runs programs that the model writes; evaluate the '
                 'checkpoints with evaluate.py --run_code')
        if questions.task.kind not in stage.MEASURES and (why := refusal(model)):
            stop(f'benchmarks={questions.name}: {why}')
    return found


def ask_benchmarks(learner: Learner, tokenizer, tasks: list, asked=lambda: False) -> dict | None:
    """{task: {metric: score}} of the model as it is now; None if asked() says to stop."""
    stage = importlib.import_module('evaluate')     # not among what makes a run the same run
    found = {}
    with parallel.looking_on(learner.model):
        for questions in tasks:
            values = stage.measure(learner.model, tokenizer, questions, stage.Options(),
                                   learner.device, ranks=learner.ranks, asked=asked)
            if values is None:
                return None
            found[questions.name] = {metric: one['value'] for metric, one in
                                     stage.score(values, questions).items()}
    return found


# ---------------------------------------------------------------------------------------------
# A run


def run_folder(data: Path, fell_back: bool = False) -> Path:
    """out_dir, or out/<config name>, with the dataset in its name if it is not the config's own."""
    name = CONFIG or (Path(init_from).resolve().name if init_from not in ('scratch', 'resume')
                      else 'gpt2')
    if fell_back:
        return out_folder(out_dir, data.name)
    return out_folder(out_dir, name, data.resolve().name if 'dataset' in FLAGS else '')


def evaluate_run(ranks, device) -> dict:
    """--eval_only: the best checkpoint of a run on the validation split; writes nothing."""
    settings = SimpleNamespace(**settings_of(globals()))
    data = named.find(dataset, data_dir, begin.tokenizer_wanted(settings), vocab_size)
    base = run_folder(data)
    model, known, state = models.load_run(str(base), device=device.name)
    if known.hash() != tokenizers.load(data / 'tokenizer.json').hash():
        stop(f'{base} and {data} have different vocabularies; evaluate it on the data it knows')
    config = model.config
    as_trained = state.get('identity', {}).get('data', {}).get('pack_documents', False)
    packed = pack_documents or as_trained and 'pack_documents' not in GIVEN
    eos = known.eos if packed else None
    windows = load_split(data, 'val', config.block_size, shuffle=False, eos=eos)
    learner, rows = begin.just_evaluating(model, ranks, device, config.block_size, micro_batch_size)
    scores = evaluate(learner, windows, known, rows) or {}
    print0(f'{base}, step {state["step"]}, on {data}: {shown(scores)}'
           + ', documents kept apart' * packed)
    processes.finish()
    return {'run_dir': str(base), 'step': state['step'], **scores}


def main() -> dict:
    """Train; returns the run directory, the last step, losses and the seconds of training."""
    source = source_hashes(__file__)    # before anybody edits it
    begin.check_settings(globals())
    layout = dict(tp=tp, pp=pp, zero=zero, replicas=replicas, pp_schedule=pp_schedule,
                  sequence_parallel=sequence_parallel)
    ranks, dev = processes.begin(device, dtype, compile, threads, timeout_minutes,
                                 None if eval_only else layout)
    if eval_only:
        return evaluate_run(ranks, dev)
    if benchmark_interval and not ranks.plain:
        stop(f'benchmark_interval={benchmark_interval}: each process must hold the whole model; '
             'leave out tp, pp and zero, or evaluate the checkpoints with evaluate.py')

    # Data, model, run directory
    settings = SimpleNamespace(**settings_of(globals()))
    data, meta, fell_back = get_data(settings, ranks)
    tokenizer = tokenizers.load(data / 'tokenizer.json')
    base = run_folder(data, fell_back)
    begun = identity_of(base) if init_from == 'resume' else {}
    model, weights, n_parameters, flops = begin.first_model(settings, tokenizer, dev, ranks, begun)
    config = model.config
    if meta['max_id'] >= config.vocab_size:
        stop(f'{data}: has token id {meta["max_id"]}, but the model only {config.vocab_size} ids')
    eos = tokenizer.eos if pack_documents else None
    train_windows = load_split(data, 'train', block_size, seed, eos=eos)
    val_windows = load_split(data, 'val', block_size, shuffle=False, eos=eos)
    facts = {name: meta[name] for name in ('sha256', 'train_tokens', 'val_tokens')}
    run = Run(base, identity(vars(settings), config, tokenizer, source=source, weights=weights,
                             data=facts | {'pack_documents': pack_documents}),
              ranks, dev, insist=init_from == 'resume')
    dev, tokens_per_step = run.device, batch_size * block_size
    rows = parallel.rows_at_once(model, ranks, dev, batch_size, block_size, micro_batch_size)
    if pack_documents:
        print0(f'packed {train_windows.about}')
    print0(f'data {data}: {meta["about"]}; {len(tokenizer):,} tokens in its vocabulary\n'
           f'{n_parameters:,} parameters, {flops / 1e6:,.2f} MFLOP per token; a step is '
           f'{batch_size} x {block_size} = {tokens_per_step:,} tokens, {rows} rows at a time, an '
           f'epoch {len(train_windows) / batch_size:,.1f} steps')

    # What trains it
    trained, n_micro = parallel.wrap(model, ranks, dev, math.ceil(batch_size / ranks.dp), rows)
    learner = Learner(model, trained, begin.build_optimizers(settings, model, dev, ranks),
                      optim.LossScale(dev.dtype == 'float16'), dev, ranks, grad_clip,
                      seed if dropout else None)
    rows = learner.fit_rows(train_step, train_windows.batch, rows)
    batches_of = Ahead(lambda step: [train_windows.batch(samples) for samples in share(
        step * batch_size, batch_size, ranks.dp_rank, ranks.dp, rows, n_micro)], dev.kind == 'cuda')
    compile_seconds = learner.warm_up(train_step, batches_of)
    tasks = asked_in_training(model, ranks) if benchmark_interval else []
    run.begin(learner, tokenizer, max_steps=max_steps, max_minutes=max_minutes, first=1,
              settings=vars(settings), script=__file__, kept={'config': asdict(config)},
              micro_batch_size=rows, parameters=n_parameters, flops_per_token=flops,
              compile_seconds=compile_seconds)

    with run:   # looks at the model after `step` steps, then makes the next one
        for step in run:
            if run.due(sample_interval) and not run.ends:
                text = make_sample(model, tokenizer, run.asked)
                if run.finished(text):
                    run.note('sample', f'--- sample at step {step}\n{text}\n---', text=text)
            if run.due(benchmark_interval):
                found = ask_benchmarks(learner, tokenizer, tasks, run.asked)
                if run.finished(found):
                    run.note('benchmark', f'step {step}: {found}', scores=found)
            if run.due(eval_interval):
                run.score(evaluate(learner, val_windows, tokenizer, rows, run.asked), shown,
                          tokens=step * tokens_per_step)
            run.save(save_interval or eval_interval)
            if run.over:
                break
            began = time.perf_counter()
            factor = optim.schedule(run.place, max_steps, schedule, warmup_steps, decay_fraction,
                                    min_lr_fraction)
            limit = optim.spike_limit(run.at.grad_norms, spike_sigma)
            done = train_step(learner, batches_of(step), step, factor, limit, run.request)
            if spike_sigma and not done.skipped:
                run.at.grad_norms = [*run.at.grad_norms, done.norm][-100:]
            if run.count(done, time.perf_counter() - began, log_interval,
                         first_sample=step * batch_size, last_sample=(step + 1) * batch_size - 1):
                speed = len(run.times) * tokens_per_step / sum(run.times)
                mfu = flops * speed / (dev.peak_flops * ranks.world) if dev.peak_flops else None
                run.log_step(done, learner.optimizers[0].param_groups[0]['lr'],
                             f', {speed:,.0f} tokens/s' + (f', MFU {mfu:.1%}' if mfu else ''),
                             tokens=run.at.step * tokens_per_step, tokens_per_second=speed, mfu=mfu)
        run.finish()
        text = ''
        if ranks.can_sample and not run.stopping:
            text = make_sample(model, tokenizer, run.asked) or ''
            run.finished(text)
    return end_run(run, text, fell_back, meta['about'])


def end_run(run: Run, text: str, fell_back: bool, about: str) -> dict:
    """Log the end, and print the sample and what to do next."""
    name = shlex.quote(str(run.folder))
    if text and not run.stopping:
        print0(f'\n{text}\n')
    result = run.end(
        f'  python sample.py {name}                  # type a prompt, it goes on\n'
        f'  python sample.py {name} --num_samples=3 --temperature=1.0 </dev/null\n'
        '  python ' + shlex.join(['train.py', *CONFIGS, '--dataset=my_text.txt']), sample=text)
    if fell_back and not run.stopping:
        print0(f'*** THIS WAS NOT {dataset.upper()} but {about}. With a network, or with '
               'DATA_MIRROR set, run the same command again ***')
    return result


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
