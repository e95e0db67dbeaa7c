"""Pretraining: python train.py config/shakespeare.py, or torchrun --nproc_per_node=8 train.py.

Bare `python train.py` is GPT-2 (124M parameters) on OpenWebText. A run directory out/<config>/ gets
log.jsonl, loss.png and checkpoints; the same command again resumes an unfinished run.
"""
import importlib.util
import math
import platform
import shutil
import statistics
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import model as model_module
import prepare
from core import checkpoint, optim, parallel
from core import device as hardware
from core import tokenizer as tokenizers
from core.dataset import IGNORE, NoNetwork, load_split, share
from core.parallel import print0
from core.settings import check_bounds, check_choice, configure, settings_of, stop, warn
from model import GPTConfig, build_model, count_parameters, flops_per_token, generate

CONFIG, FLAGS = '', ()          # filled by configure: the config file's name, what flags changed

# run
out_dir = ''                    # run directory; '': out/<config name>
init_from = 'scratch'           # scratch, or resume: insist on going on with the run in out_dir
eval_only = False               # evaluate the run in out_dir and stop; nothing is written
seed = 1337
# data
dataset = 'openwebtext'         # a name that prepare.py knows, a folder of data/, or a path to text
fallback_dataset = ''           # taken, loudly, when dataset needs a network and there is none
data_dir = 'data'
batch_size = 480                # sequences per optimizer step, over all processes
micro_batch_size = 0            # sequences per forward pass; 0: as memory allows
block_size = 1024               # tokens in a sequence
# model (see GPTConfig in model.py)
arch = 'gpt'                    # gpt or lstm
depth = 0                       # one knob: n_layer=n_head=depth, n_embd=64 depth, rates to match
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
mlp = 'gelu'                    # gelu, swiglu or relu2
qk_norm = False                 # RMSNorm of queries and keys
window = 0                      # sliding-window attention; 0: all positions
tied = True                     # head and embedding share one matrix
dropout = 0.0
bias = True                     # in linear layers and layernorms
vocab_size = 0                  # 0: the tokenizer's, rounded up to a multiple of 64 above 1,000
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
# schedule
max_steps = 20_000              # 20,000 x 480 x 1,024 tokens = 9.8 billion
max_minutes = 0.0               # if given: a few steps are timed and max_steps follows from it
schedule = 'cosine'             # cosine, linear, wsd or constant
warmup_steps = 700
decay_fraction = 0.5            # wsd: the part of all steps over which the rate falls
min_lr_fraction = 0.1           # what is left of the rates at the end
# intervals, in steps
eval_interval = 250
eval_tokens = 0                 # evaluate on the first so many validation tokens; 0: on all
log_interval = 10
save_interval = 0               # 0: eval_interval
sample_interval = 0             # write a sample to the log this often; 0: only one at the end
sample_tokens = 300
# system
device = ''                     # '': cuda, else mps, else cpu
dtype = ''                      # '': bfloat16 where the hardware has it, else float16 on a GPU
compile = True                  # torch.compile
threads = 0                     # CPU threads; 0: torch's choice
activation_checkpointing = False  # recompute blocks in the backward pass: less memory, 1/3 slower
# more logging
wandb = False                   # needs pip install wandb
tensorboard = False             # needs pip install tensorboard


def check_settings() -> None:
    """Stop at the first setting that is out of range."""
    check_bounds(globals(), batch_size=(1, None), micro_batch_size=(0, None), block_size=(1, None),
                 depth=(0, None), max_steps=(1, None), max_minutes=(0, None), dropout=(0, 0.99),
                 warmup_steps=(0, None), decay_fraction=(0, 1), min_lr_fraction=(0, 1),
                 learning_rate=(0, None), embed_learning_rate=(0, None), weight_decay=(0, None),
                 muon_learning_rate=(0, None), muon_weight_decay=(0, None), beta1=(0, 0.9999),
                 beta2=(0, 0.9999), muon_momentum=(0, 0.9999), ns_steps=(1, None),
                 grad_clip=(0, None), eval_interval=(1, None), eval_tokens=(0, None),
                 log_interval=(1, None), save_interval=(0, None), sample_interval=(0, None),
                 sample_tokens=(1, None), seed=(0, 2 ** 31 - 1), threads=(0, None),
                 n_kv_head=(0, None), head_dim=(0, None), n_hidden=(0, None), window=(0, None),
                 vocab_size=(0, None), norm_eps=(0, 1), rope_theta=(1, None))
    check_choice(globals(), init_from=('scratch', 'resume'), optimizer=('adamw', 'muon'),
                 schedule=optim.SCHEDULES)
    for service in ('wandb', 'tensorboard'):
        if globals()[service] and not importlib.util.find_spec(service):
            stop(f'{service}=True: it is not installed: pip install {service}')
    if warmup_steps >= max_steps and not max_minutes:
        warn(f'warmup_steps={warmup_steps}: as long as max_steps={max_steps}, so the learning rate '
             'never reaches its peak')
    fixed = [name for name in ('n_layer', 'n_head', 'n_embd') if name in FLAGS]
    if depth and fixed:
        stop(f'depth={depth}: derives {fixed[0]}, which was also given; leave one of the two out')


# ---------------------------------------------------------------------------------------------
# What the settings leave to be derived


def choose_dataset() -> tuple[str, bool]:
    """The dataset, made if it is missing, or the fallback where there is no network; and which."""
    try:
        prepare.build(dataset, data_dir)
        return dataset, False
    except NoNetwork as e:
        if not fallback_dataset:
            stop(prepare.no_network(dataset, e))
        warn(str(e))
        return fallback_dataset, True


def model_config(n_tokens: int) -> GPTConfig:
    """The architecture that the settings describe, for a tokenizer of n_tokens tokens."""
    if vocab_size and vocab_size < n_tokens:
        stop(f'vocab_size={vocab_size}: the tokenizer has {n_tokens} tokens; use 0 to derive it')
    chosen = {field.name: globals()[field.name] for field in fields(GPTConfig)}
    padded = n_tokens if n_tokens < 1000 else math.ceil(n_tokens / 64) * 64
    chosen['vocab_size'] = vocab_size or padded
    if depth:
        chosen |= {'n_layer': depth, 'n_head': depth, 'n_embd': 64 * depth}
    try:
        return GPTConfig(**chosen)
    except ValueError as e:
        stop(str(e))


def default_out_dir(data: Path, fell_back: bool) -> Path:
    """out/<config>, with the dataset in its name where it is not the config's own."""
    name = CONFIG or 'gpt2'
    if fell_back:
        name = data.name
    elif 'dataset' in FLAGS and data.name != name:
        name = f'{name}-{data.name}'
    return Path('out') / name


def run_identity(data: Path, meta: dict, tokenizer, config: GPTConfig) -> dict:
    """All that must be unchanged for a run to be the same run, by topic."""
    def chosen(*names):
        return {name: globals()[name] for name in names}
    return {'architecture': asdict(config),
            'data': {'name': data.name, 'sha256': meta['sha256']},
            'tokenizer': tokenizer.hash(),
            'optimizer': chosen('optimizer', 'learning_rate', 'weight_decay', 'beta1', 'beta2',
                                'embed_learning_rate', 'muon_learning_rate', 'muon_weight_decay',
                                'muon_momentum', 'ns_steps', 'grad_clip'),
            'schedule': chosen('schedule', 'max_steps', 'max_minutes', 'warmup_steps',
                               'decay_fraction', 'min_lr_fraction'),
            'seed': seed, 'batch_size': batch_size,
            'source': checkpoint.source_hash(model_module.__file__)}


def build_optimizers(model, device) -> list:
    """The optimizers that the settings describe; depth scales AdamW's rates by 1 / sqrt(width)."""
    scale = (768 / model.config.n_embd) ** 0.5 if depth else 1.0
    half = device.dtype == 'bfloat16'
    return optim.make_optimizers(
        model, optimizer, learning_rate * scale, weight_decay, beta1, beta2, muon_learning_rate,
        muon_weight_decay, muon_momentum, ns_steps, embed_learning_rate * scale,
        torch.bfloat16 if half else torch.float32)


def find_run(base: Path, identity: dict) -> tuple[str, dict | None]:
    """The run directory and the state to resume from, or None for a new run; says which."""
    if init_from == 'resume':
        found = checkpoint.steps(base)
        if not found:
            stop(f'init_from=resume: {base} holds no checkpoint; start it without init_from')
        state = checkpoint.read_state(base, found[-1])
        changed = checkpoint.differences(state['identity'], identity)
        for name, was, now in changed:
            what = f'{name} is {now}, but was {was} when {base} was begun'
            if name.split('.')[0] in ('architecture', 'data', 'tokenizer') or name == \
                    'optimizer.optimizer':
                stop(f'init_from=resume: {what}; restore it, or start a new run with --out_dir')
            warn(what)
        return str(base), state
    run, state = checkpoint.choose_run(base, identity)
    if state:
        print0(f'resuming {run} after step {state["step"]}: nothing that matters has changed')
    elif run != base:
        print0(f'{base} holds another or a finished run, so this one is {run}')
    return str(run), state


# ---------------------------------------------------------------------------------------------
# The parts of the loop


def train_step(model, optimizers, scaler, device, ranks, batches, factor: float, step: int):
    """One optimizer step over this rank's micro-batches; returns loss and gradient norm (tensors).

    The gradient is that of the mean loss over all targets of all ranks, whatever their shares.
    `factor` scales the learning rates.
    """
    n_targets = torch.tensor(float(sum((y != IGNORE).sum() for _, y in batches)))
    n_targets = parallel.all_sum(n_targets, device)
    loss_sum = torch.zeros((), device=device.name)
    for micro_step, (x, y) in enumerate(batches):
        if dropout:
            key = np.random.SeedSequence((seed, step, micro_step, ranks.rank))
            torch.manual_seed(int(key.generate_state(1)[0]))
        x, y = (t.to(device.name, non_blocking=True) for t in (x, y))
        with parallel.accumulate(model, last=micro_step == len(batches) - 1):
            with device.autocast():
                loss = model(x, y, reduction='sum') / n_targets
            scaler.scale(loss * ranks.world).backward()  # DDP divides gradients by world
        loss_sum += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(grads)
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, grad_norm)
    optim.set_learning_rate(optimizers, factor)
    # An overflow in fp16 must hold back all optimizers, not only the one whose gradients have it.
    finite = not scaler.is_enabled() or bool(grad_norm.isfinite())
    for optimizer in optimizers:
        if finite:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return parallel.all_sum(loss_sum, device), grad_norm


@torch.no_grad()
def evaluate(model, windows, tokenizer, rows: int, device, ranks) -> tuple[float, float]:
    """Loss in nats per token and bits per byte over the windows of a split, each target once."""
    model.eval()
    byte_lengths = tokenizer.byte_lengths()
    n = min(len(windows), math.ceil((eval_tokens or windows.n_targets) / windows.block_size))
    nats, targets, n_bytes = [], 0, 0
    for samples in share(0, n, ranks.rank, ranks.world, rows):
        x, y = windows.batch(samples)
        with device.autocast():
            nats.append(model(x.to(device.name), y.to(device.name), reduction='sum'))
        real = y[y != IGNORE]
        targets, n_bytes = targets + len(real), n_bytes + int(byte_lengths[real].sum())
    model.train()
    sums = torch.tensor([sum(torch.stack(nats).tolist()), targets, n_bytes], dtype=torch.float64)
    nats, targets, n_bytes = parallel.all_sum(sums, device).tolist()
    return nats / targets, nats / math.log(2) / max(1.0, n_bytes)


def make_sample(model, tokenizer) -> str:
    """Text that the model writes without a prompt."""
    rows = generate(model, [tokenizer.start()], sample_tokens, temperature=0.8, seed=seed,
                    n_tokens=len(tokenizer))
    return tokenizer.decode([ids[0] for ids in rows])


def print_above(ranks, text: str) -> None:
    """Print above the progress bar, on rank 0 only."""
    if ranks.rank == 0:
        tqdm.write(text)


def evaluate_run(ranks, device) -> dict:
    """--eval_only: the best checkpoint of a run on the validation split; writes nothing."""
    data = prepare.find(dataset, data_dir)
    base = Path(out_dir) if out_dir else default_out_dir(data, fell_back=False)
    model, tokenizer, state = checkpoint.load_run(str(base), device=device.name)
    if tokenizer.hash() != tokenizers.load(data / 'tokenizer.json').hash():
        stop(f'{base} and {data} have different vocabularies; evaluate it on the data it knows')
    config = model.config
    windows = load_split(data, 'val', config.block_size, shuffle=False)
    rows = micro_batch_size or hardware.fit_micro_batch(
        device, 64, config.block_size, 1, config.n_embd, ranks.local_world)
    val_loss, bits_per_byte = evaluate(model, windows, tokenizer, rows, device, ranks)
    print0(f'{base}, step {state["step"]}, on {data}: validation loss {val_loss:.4f} nats per '
           f'token, {bits_per_byte:.4f} bits per byte')
    return {'run_dir': str(base), 'step': state['step'], 'val_loss': val_loss,
            'bits_per_byte': bits_per_byte}


def start_log(run: Path, ranks, dev, facts: dict, resumed_at: int | None) -> checkpoint.Log:
    """The run's log, begun with all that is needed to understand it; on rank 0 only."""
    if ranks.rank:
        return checkpoint.Log(None)
    if resumed_at is None:
        (run / 'log.jsonl').unlink(missing_ok=True)  # of a run that never came to a checkpoint
    else:
        checkpoint.cut_log(run, resumed_at)
    settings = settings_of(globals())
    log = checkpoint.Log(run, checkpoint.service_loggers(run, settings, wandb, tensorboard))
    if resumed_at is not None:
        log.write('resume', step=resumed_at, device=dev.why, world=ranks.world)
        return log
    for source in (model_module.__file__, __file__):
        shutil.copy(source, run)
    log.write('start', settings=settings, git=checkpoint.git_hash(),
              versions={'python': platform.python_version(), 'torch': torch.__version__},
              device=dev.why, world=ranks.world, **facts)
    return log


def print_end(run: Path, best_val_loss: float, best_step: int, seconds: float) -> None:
    """What came out of the run, and the exact commands for what to do next."""
    plotted = checkpoint.plot_losses(run)
    config = f'config/{CONFIG}.py ' if CONFIG else ''
    print(f'best validation loss {best_val_loss:.4f} at step {best_step}, after {seconds:.0f} s of '
          f'training; {run}/ has the checkpoints, log.jsonl' + (' and loss.png' if plotted else '')
          + '\n\nnext:\n'
          f'  python sample.py {run}                  # type a prompt, it goes on\n'
          f'  python sample.py {run} --num_samples=3 --temperature=1.0 </dev/null\n'
          f'  python train.py {config}--dataset=my_text.txt')


def main() -> dict:
    """Train; returns the run directory, the last step, losses and the seconds of training."""
    check_settings()
    ranks = parallel.find_ranks()
    dev = hardware.choose(device, dtype, compile, threads, ranks.local_rank, ranks.local_world)
    parallel.start(ranks, dev)
    print0(*dev.why, sep='\n')

    # Data, run directory, model
    if eval_only:
        result = evaluate_run(ranks, dev)
        parallel.finish()
        return result
    # Rank 0 decides; the others wait, then find the dataset, or make it on their own machine.
    name, fell_back = parallel.broadcast(choose_dataset() if ranks.rank == 0 else None)
    data = prepare.build(name, data_dir)
    if fell_back:
        print0(f'*** THIS IS NOT {dataset.upper()}: without a network the run uses {data} ***')
    meta = prepare.read_meta(data)
    tokenizer = tokenizers.load(data / 'tokenizer.json')
    config = model_config(len(tokenizer))
    per_rank = math.ceil(batch_size / ranks.world)
    rows = min(micro_batch_size, per_rank) or hardware.fit_micro_batch(
        dev, per_rank, block_size, 1 if activation_checkpointing else config.n_layer, config.n_embd,
        ranks.local_world)
    base = Path(out_dir) if out_dir else default_out_dir(data, fell_back)
    if meta['max_id'] >= config.vocab_size:
        stop(f'{data}: has token id {meta["max_id"]}, but the model only {config.vocab_size} ids')
    train_windows = load_split(data, 'train', block_size, seed)
    val_windows = load_split(data, 'val', block_size, shuffle=False)
    identity = run_identity(data, meta, tokenizer, config)
    if parallel.broadcast(identity['data']) != identity['data']:
        stop(f'{data} on this machine is not what rank 0 has; copy one of them to all machines')
    run, state = parallel.broadcast(find_run(base, identity) if ranks.rank == 0 else None)
    run = Path(run)
    lock = checkpoint.lock(run) if ranks.rank == 0 else None
    model = build_model(config, seed, dev.name)
    model.recompute = activation_checkpointing
    flops, tokens_per_step = flops_per_token(model), batch_size * block_size
    print0(f'{count_parameters(model):,} parameters, {flops / 1e6:,.2f} MFLOP per token; a step is '
           f'{batch_size} x {block_size} = {tokens_per_step:,} tokens, {rows} rows at a time, an '
           f'epoch {len(train_windows) / batch_size:,.1f} steps')

    # Optimizers, compilation, what a checkpoint says
    optimizers = build_optimizers(model, dev)
    scaler = dev.scaler()
    if state:
        checkpoint.load_weights(model, run, state['step'])
    trained = torch.compile(model, dynamic=False) if dev.compile else model
    trained = parallel.wrap(trained, ranks, dev)

    def batches(step):
        return [train_windows.batch(samples) for samples in
                share(step * batch_size, batch_size, ranks.rank, ranks.world, rows)]

    def time_steps(n):
        """Seconds of each of n steps that change nothing: their learning rate is 0."""
        times, scale = [], scaler.state_dict()
        for _ in range(n):
            began = time.perf_counter()
            train_step(trained, optimizers, scaler, dev, ranks, batches(0), 0.0, 0)
            dev.synchronize()
            times.append(time.perf_counter() - began)
        for o in optimizers:
            o.state.clear()
        if scale:
            scaler.load_state_dict(scale)
        return times

    compile_seconds = sum(time_steps(1)) if dev.compile else 0.0
    if dev.compile:
        print0(f'compiled in {compile_seconds:.1f} s')
    step, seconds, last_step, best_val_loss, best_step = 0, 0.0, max_steps, math.inf, 0
    if state:
        checkpoint.load_optimizers(model, optimizers, run, state['step'])
        if scaler.is_enabled() and state['scaler']:
            scaler.load_state_dict(state['scaler'])
        step, seconds = state['step'], state['seconds']
        best_val_loss, best_step = state['best_val_loss'], state['best_step']
    if max_minutes:
        each = statistics.median(time_steps(8)) if not state else 0
        last_step = state['max_steps'] if state else max(1, int(60 * max_minutes / each))
        last_step = parallel.broadcast(last_step)
        print0(f'max_minutes={max_minutes:g}: {last_step:,} steps')
    log = start_log(run, ranks, dev, resumed_at=state and step, facts={
        'dataset': identity['data'], 'config': asdict(config), 'micro_batch_size': rows,
        'parameters': count_parameters(model), 'max_steps': last_step,
        'flops_per_token': flops, 'compile_seconds': compile_seconds})
    if ranks.rank == 0:
        tokenizer.save(run / 'tokenizer.json')

    # The loop
    bar = tqdm(total=last_step, initial=step, unit='step', disable=ranks.rank != 0)
    val_loss = bits_per_byte = math.nan
    since, began = step, time.perf_counter()
    while step < last_step:
        factor = optim.schedule(step, last_step, schedule, warmup_steps, decay_fraction,
                                min_lr_fraction)
        loss, grad_norm = train_step(trained, optimizers, scaler, dev, ranks, batches(step), factor,
                                     step)
        step += 1
        bar.update()
        evaluating = step % eval_interval == 0 or step == last_step
        sampling = sample_interval and step % sample_interval == 0 and step < last_step
        saving = step % (save_interval or eval_interval) == 0 or step == last_step
        if step % log_interval == 0 or evaluating or sampling or saving:
            loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # waits for the device
            now = time.perf_counter()
            speed = (step - since) * tokens_per_step / (now - began)
            mfu = flops * speed / (dev.peak_flops * ranks.world)
            seconds, since, began = seconds + now - began, step, now
            log.write('step', step=step, tokens=step * tokens_per_step, seconds=seconds,
                      train_loss=loss, learning_rate=optimizers[0].param_groups[0]['lr'],
                      grad_norm=grad_norm, tokens_per_second=speed, mfu=mfu)
            bar.set_postfix_str(f'loss {loss:.4f}, {speed:,.0f} tokens/s, MFU {mfu:.1%}')
        if evaluating:
            val_loss, bits_per_byte = evaluate(model, val_windows, tokenizer, rows, dev, ranks)
            log.write('eval', step=step, tokens=step * tokens_per_step, seconds=seconds,
                      val_loss=val_loss, bits_per_byte=bits_per_byte)
            print_above(ranks, f'step {step}: validation loss {val_loss:.4f} nats per token, '
                               f'{bits_per_byte:.4f} bits per byte, {seconds:.0f} s of training')
            if val_loss < best_val_loss:
                best_val_loss, best_step, saving = val_loss, step, True
        if sampling:
            text = make_sample(model, tokenizer)
            log.write('sample', step=step, text=text)
            print_above(ranks, f'--- sample at step {step}\n{text}\n---')
        if saving and ranks.rank == 0:
            checkpoint.save(run, step, model, optimizers, {
                'step': step, 'seconds': seconds, 'max_steps': last_step, 'config': asdict(config),
                'best_val_loss': best_val_loss, 'best_step': best_step,
                'scaler': scaler.state_dict(), 'identity': identity})
        if evaluating or sampling or saving:
            began = time.perf_counter()
    bar.close()

    text = make_sample(model, tokenizer)
    log.write('sample', step=step, text=text)
    log.write('end', step=step, seconds=seconds, best_val_loss=best_val_loss, best_step=best_step)
    if ranks.rank == 0:
        print(f'\n{text}\n')
        print_end(run, best_val_loss, best_step, seconds)
        if fell_back:
            print(f'*** THIS WAS NOT {dataset.upper()} but {meta["about"]}. With a network, or '
                  'with DATA_MIRROR set, run the same command again ***')
    if lock:
        lock.close()
    parallel.finish()
    return {'run_dir': str(run), 'step': step, 'val_loss': val_loss, 'bits_per_byte': bits_per_byte,
            'best_val_loss': best_val_loss, 'seconds': seconds}


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
