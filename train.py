"""Pretraining: python train.py config/shakespeare.py, or torchrun --nproc_per_node=8 train.py.

Bare `python train.py` is GPT-2 small on OpenWebText: 12 blocks of 12 x 768^2 weights, tables of
50,304 x 768 and 1,024 x 768:
124,475,904 parameters, 854.65 MFLOP per token, 491,520 tokens per step
A run directory out/<config>/ gets log.jsonl, loss.png and checkpoints; the same command again
resumes an unfinished run.
"""
import importlib.util
import math
import shlex
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import model as model_module
from core import device as hardware
from core.data import named
from core.data.build import build
from core.data.dataset import IGNORE, Ahead, load_split
from core.net import optim
from core.ranks import parallel, processes
from core.ranks.processes import print0, share
from core.read.download import NoNetwork
from core.run import checkpoint, layout_check, rundir
from core.run.learner import Learner, count_targets, lm_loss_sums, print_above, to_device
from core.settings import (
    check_bounds,
    check_choice,
    configure,
    settings_of,
    stop,
    warn,
)
from core.source import source_hashes
from core.text import tokenizer as tokenizers
from model import (
    GPTConfig,
    allocate,
    build_model,
    copy_weights,
    count_parameters,
    flops_per_token,
    generate,
    init_weights,
    padded,
)

# filled by configure: the config file's name, the paths of all, what flags changed, what flags or
# they changed
CONFIG, CONFIGS, FLAGS, GIVEN = '', (), (), ()

# run
out_dir = ''                    # run directory; '': out/<config name>
init_from = 'scratch'           # scratch; resume: insist on going on with the run in out_dir; or a
                                # model: a run, a Hugging Face folder, a name such as gpt2
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
rope_scaling = ''               # Llama 3.1's: factor, low and high turns, old context: 32,1,4,8192
mlp = 'gelu'                    # gelu, swiglu or relu2
qk_norm = False                 # RMSNorm of queries and keys
window = 0                      # sliding-window attention; 0: all positions
tied = True                     # head and embedding share one matrix
dropout = 0.0
bias = True                     # in linear layers and layernorms
vocab_size = 0                  # 0: the tokenizer's, rounded up to a multiple of 64 above 1,000; a
                                # bpe is trained to have so many
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
spike_sigma = 0.0               # skip steps whose gradient norm is so far out; 0: none
# schedule
max_steps = 20_000              # 20,000 x 480 x 1,024 tokens = 9.8 billion
max_minutes = 0.0               # if given: train for so long, whatever the number of steps; the
                                # schedule is that of max_steps, stretched to this time
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
timeout_minutes = 10.0          # a rank that hears nothing from the others for so long gives up
tp = 1                          # tensor parallel: so many ranks share each matrix
pp = 1                          # pipeline parallel: stages. The others are data parallel: dp ranks
zero = 0                        # sharded over data-parallel ranks: 0 nothing, 2 optimizer state and
                                # gradients, 3 weights as well
replicas = 0                    # with zero: keep so many sharded copies (HSDP); 0: one
sequence_parallel = False       # with tp: cut norms and residual stream by positions
pp_schedule = '1f1b'            # 1f1b, gpipe, interleaved (two stages a rank)
check_layout = False            # try tp, pp and zero on a small copy even if they passed before
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
                 grad_clip=(0, None), spike_sigma=(0, None),
                 timeout_minutes=(0.01, None), eval_interval=(1, None), eval_tokens=(0, None),
                 log_interval=(1, None), save_interval=(0, None), sample_interval=(0, None),
                 sample_tokens=(1, None), seed=(0, 2 ** 31 - 1), threads=(0, None),
                 tp=(1, None), pp=(1, None), zero=(0, 3), replicas=(0, None),
                 n_kv_head=(0, None), head_dim=(0, None), n_hidden=(0, None), window=(0, None),
                 vocab_size=(0, None), norm_eps=(0, 1), rope_theta=(1, None))
    check_choice(globals(), optimizer=('adamw', 'muon'), schedule=optim.SCHEDULES,
                 pp_schedule=processes.PP_SCHEDULES)
    for service in ('wandb', 'tensorboard'):
        if globals()[service] and not importlib.util.find_spec(service):
            stop(f'{service}=True: it is not installed: pip install {service}')
    if warmup_steps >= max_steps:
        warn(f'warmup_steps={warmup_steps}: as long as max_steps={max_steps}, so the learning rate '
             'never reaches its peak')
    fixed = [name for name in ('n_layer', 'n_head', 'n_embd') if name in FLAGS]
    if depth and fixed:
        stop(f'depth={depth}: derives {fixed[0]}, which was also given; leave one of the two out')
    own = {f.name for f in fields(GPTConfig)} - {'block_size', 'dropout'} | {'depth'}
    if sample_interval and (pp > 1 or sequence_parallel):
        stop(f'sample_interval={sample_interval}: no text can be written token by token with pp or '
             'sequence_parallel; leave it out, and use sample.py with the checkpoints')
    given = sorted(own & set(GIVEN))
    if from_model() and given:
        stop(f'{given[0]}={globals()[given[0]]}: the model in init_from={init_from} has its own; '
             'leave it out')


def from_model() -> bool:
    """Whether training begins with the weights of another model."""
    return init_from not in ('scratch', 'resume')


def respects_documents(config: GPTConfig) -> bool:
    """Whether windows respect documents. Stops if the model cannot."""
    if pack_documents and config.arch == 'lstm':
        stop('pack_documents=True: an LSTM cannot keep apart documents in one row; leave it out')
    return pack_documents


# ---------------------------------------------------------------------------------------------
# What the settings leave to be derived


def choose_dataset() -> tuple[str, bool]:
    """The dataset, made if it is missing, or the fallback where there is no network; and which."""
    if from_model():
        # downloaded before all ranks ask for it
        checkpoint.find_model(init_from, data_dir, setting='init_from')
    try:
        build_dataset(dataset, False)
        return dataset, False
    except NoNetwork as e:
        if not fallback_dataset:
            stop(named.no_network(dataset, e))
        warn(str(e))
        return fallback_dataset, True


def build_dataset(name: str, fell_back: bool) -> Path:
    """The folder of a dataset with the tokenizer that the settings ask for; the fallback's own."""
    return build(name, data_dir, tokenizer='' if fell_back else tokenizer_wanted(),
                         vocab_size=vocab_size)


def tokenizer_wanted() -> str:
    """Which tokenizer the dataset is to have; '': its own."""
    return tokenizer or (init_from if from_model() else '')


def get_data(ranks) -> tuple[Path, dict, bool]:
    """The dataset's folder, the same on all ranks, its meta.json, and whether it is the fallback.

    Rank 0 decides; the others wait, then find the dataset, or make it on their own machine.
    """
    chosen = choose_dataset() if ranks.rank == 0 else None
    name, fell_back = processes.broadcast(chosen, patient=True)
    data = build_dataset(name, fell_back)
    meta = named.read_meta(data)
    if processes.broadcast(meta['sha256'], patient=True) != meta['sha256']:
        stop(f'{data} on this machine is not what rank 0 has; copy one of them to all machines')
    if fell_back:
        print0(f'*** THIS IS NOT {dataset.upper()}: without a network the run uses {data} ***')
    return data, meta, fell_back


def model_config(n_tokens: int) -> GPTConfig:
    """The architecture that the settings describe, for a tokenizer of n_tokens tokens."""
    if vocab_size and vocab_size < n_tokens:
        stop(f'vocab_size={vocab_size}: the tokenizer has {n_tokens} tokens; use 0 to derive it')
    chosen = {f.name: globals()[f.name] for f in fields(GPTConfig) if f.name in globals()}
    chosen['vocab_size'] = vocab_size or padded(n_tokens)
    if depth:
        chosen |= {'n_layer': depth, 'n_head': depth, 'n_embd': 64 * depth}
    try:
        return GPTConfig(**chosen)
    except ValueError as e:
        stop(str(e))


def initial_model(tokenizer, device, ranks, begun: dict):
    """The model to be trained on a dataset with this tokenizer, or this rank's part of it: a new
    one, or that in init_from. And the hash of the weights in init_from, parameters, FLOP per token.

    `begun` is the identity of a run to be resumed: if that began with a model, its architecture is
    taken. Stops if the model in init_from does not know the same tokens.
    """
    source, weights = None, begun.get('weights', '')
    if weights:
        config = checkpoint.read_config(begun['architecture'], 'init_from=resume')
    elif not from_model():
        config = model_config(len(tokenizer))
    else:
        source, known, _ = checkpoint.load_run(init_from, data_dir=data_dir)
        if known.tokens != tokenizer.tokens[:len(known)]:
            stop(f'init_from={init_from}: its tokenizer is not that of the dataset; leave out '
                 f'--tokenizer, or prepare the text with --tokenizer={init_from}')
        config = adapted(source.config, len(tokenizer))
        weights = checkpoint.weights_hash(source)
        print0(f'begins with the weights of {init_from}: vocabulary '
               f'{source.config.vocab_size:,} -> {config.vocab_size:,}, positions '
               f'{source.config.block_size:,} -> {block_size:,}')
    parallel.check_model(ranks, config)
    if check_layout or not ranks.plain:
        layout_check.check(
            ranks, device, config, build_optimizers,
            {name: globals()[name] for name in ('optimizer', 'pack_documents',
                                                'activation_checkpointing')},
            Path(data_dir) / '.layouts-checked.json', check_layout)
    model = build_model(config, seed, 'meta')
    numbers = count_parameters(model), flops_per_token(model)
    model.recompute = activation_checkpointing
    parallel.place(model, ranks)
    allocate(model, device.name, parallel.put)
    if source:
        copy_weights(source, model, parallel.put)
    elif not weights:
        init_weights(model, seed, parallel.put)
    return model, weights, *numbers


def adapted(config: GPTConfig, n_tokens: int) -> GPTConfig:
    """The config of the model in init_from as it is trained here, with n_tokens tokens.

    Its architecture stays; block_size and dropout are the settings', and the vocabulary grows if
    there are more tokens than it knows. Stops if it has fewer positions than block_size.
    """
    if config.position == 'learned' and block_size > config.block_size:
        stop(f'block_size={block_size}: the model in init_from={init_from} knows only '
             f'{config.block_size} positions')
    return replace(config, block_size=block_size, dropout=dropout,
                   vocab_size=max(config.vocab_size, padded(n_tokens, config.vocab_size)))


def default_out_dir(data: Path, fell_back: bool) -> Path:
    """out/<config>, with the dataset in its name where it is not the config's own."""
    if fell_back:
        return rundir.named(data.name, '')
    return rundir.named(CONFIG or (Path(init_from).resolve().name if from_model() else 'gpt2'),
                        data.resolve().name if 'dataset' in FLAGS else '')


def build_optimizers(model, device, ranks) -> list:
    """The optimizers that the settings describe; depth scales AdamW's rates by 1 / sqrt(width)."""
    scale = (768 / model.config.n_embd) ** 0.5 if depth else 1.0
    half = device.dtype == 'bfloat16'
    return optim.make_optimizers(
        model, optimizer, learning_rate * scale, weight_decay, beta1, beta2, muon_learning_rate,
        muon_weight_decay, muon_momentum, ns_steps, embed_learning_rate * scale,
        torch.bfloat16 if half else torch.float32, parallel.spreader(ranks))


# ---------------------------------------------------------------------------------------------
# The parts of the loop


@torch.no_grad()
def evaluate(model, windows, tokenizer, rows: int, device, ranks, asked=lambda: False,
             pipe=None):
    """Loss in nats per token and bits per byte over the windows of a split, each target once.

    Of a model in several stages, `pipe` is the Pipeline. Returns None if asked() says, to all ranks
    alike, that the run is to stop.
    """
    byte_lengths = tokenizer.byte_lengths()
    n = min(len(windows), math.ceil((eval_tokens or windows.n_targets) / windows.block_size))
    nats, targets, n_bytes = [], 0, 0
    at_once = pipe.n_micro if pipe else 1
    shares = share(0, n, ranks.dp_rank, ranks.dp, rows, at_once)
    with parallel.looking_on(model):
        for i in range(0, len(shares), at_once):
            if asked():
                return None
            batches = [windows.batch(samples) for samples in shares[i:i + at_once]]
            if pipe:
                nats.append(pipe.evaluate(batches))
            else:
                x, y, doc = to_device(batches[0], device)
                with device.autocast(), parallel.passes(ranks):
                    nats.append(model(x, y, doc=doc, reduction='sum'))
            real = torch.cat([y[y != IGNORE] for _, y, _ in batches])
            targets, n_bytes = targets + len(real), n_bytes + int(byte_lengths[real].sum())
    sums = torch.tensor([sum(torch.stack(nats).tolist()), targets, n_bytes], dtype=torch.float64)
    nats, targets, n_bytes = processes.all_sum(sums * ranks.owns_loss, device).tolist()
    return nats / targets, nats / math.log(2) / max(1.0, n_bytes)


def make_sample(model, tokenizer, asked=lambda: False) -> str:
    """Text that the model writes without a prompt; cut short where asked() says to stop."""
    ids = []
    with parallel.looking_on(model):
        for row, in generate(model, [tokenizer.start()], sample_tokens, temperature=0.8, seed=seed,
                             n_tokens=len(tokenizer)):
            if asked():
                break
            ids.append(row)
    return tokenizer.decode(ids)


def schedule_step(at) -> float:
    """Where a run is on its schedule, 0 to max_steps: its step or, with max_minutes, the share of
    the time that it has used."""
    if not max_minutes:
        return at.step
    return min(1.0, at.seconds / (60 * max_minutes)) * max_steps


def is_over(at) -> bool:
    """Whether a run has done its steps or used its time, to the nearest step."""
    if not max_minutes:
        return at.step == max_steps
    half_a_step = at.seconds / max(1, at.step) / 2
    return at.step > 0 and at.seconds + half_a_step >= 60 * max_minutes


def take_stock(at, log, model, windows, tokenizer, rows, device, ranks, asked, pipe) -> bool:
    """Evaluate and write a sample, if step `at.step` is one for it; both go to the log and into at.

    Returns whether asked() said to stop meanwhile: then nothing is noted, and both are still due.
    """
    text, scores, ends = '', (), is_over(at)
    sampling = sample_interval and at.step % sample_interval == 0 and not ends
    evaluating = at.step % eval_interval == 0 or ends
    if sampling:
        text = make_sample(model, tokenizer, asked)
    if evaluating:
        scores = evaluate(model, windows, tokenizer, rows, device, ranks, asked, pipe)
    if (sampling or evaluating) and asked():
        return True
    at.evaluated = at.step
    if text:
        log.write('sample', step=at.step, text=text)
        print_above(ranks, f'--- sample at step {at.step}\n{text}\n---')
    if scores:
        val_loss, at.bits_per_byte = scores
        at.note(val_loss)
        log.write('eval', step=at.step, tokens=at.step * batch_size * windows.block_size,
                  seconds=at.seconds, val_loss=at.val_loss, bits_per_byte=at.bits_per_byte)
        print_above(ranks, f'step {at.step}: validation loss {at.val_loss:.4f} nats per token, '
                           f'{at.bits_per_byte:.4f} bits per byte, {at.seconds:.0f} s of training')
    return False


def evaluate_run(ranks, device) -> dict:
    """--eval_only: the best checkpoint of a run on the validation split; writes nothing."""
    data = named.find(dataset, data_dir, tokenizer_wanted(), vocab_size)
    base = Path(out_dir) if out_dir else default_out_dir(data, fell_back=False)
    model, known, state = checkpoint.load_run(str(base), device=device.name)
    if known.hash() != tokenizers.load(data / 'tokenizer.json').hash():
        stop(f'{base} and {data} have different vocabularies; evaluate it on the data it knows')
    config = model.config
    as_trained = state.get('identity', {}).get('data', {}).get('pack_documents', False)
    packed = respects_documents(config) or as_trained and 'pack_documents' not in GIVEN
    eos = known.eos if packed else None
    windows = load_split(data, 'val', config.block_size, shuffle=False, eos=eos)
    rows = micro_batch_size or hardware.fit_micro_batch(
        device, 64, config.block_size, 1, config.n_embd, ranks.local_world)
    val_loss, bits_per_byte = evaluate(model, windows, known, rows, device, ranks)
    print0(f'{base}, step {state["step"]}, on {data}: validation loss {val_loss:.4f} nats per '
           f'token, {bits_per_byte:.4f} bits per byte' + ', documents kept apart' * packed)
    return {'run_dir': str(base), 'step': state['step'], 'val_loss': val_loss,
            'bits_per_byte': bits_per_byte}


def end_run(run: Path, log, at, text: str, fell_back: bool, about: str) -> None:
    """Log the end; print what came out of the run, and the exact commands for what to do next."""
    log.write('end', step=at.step, seconds=at.seconds, best_val_loss=at.best_val_loss,
              best_step=at.best_step, sample=text)
    if text:
        print(f'\n{text}\n')
    plotted = rundir.plot_losses(run)
    name = shlex.quote(str(run))
    best = f'{at.best_val_loss:.4f}' if at.best_val_loss else 'none'
    if at.skipped:
        print(f'{at.skipped} steps were skipped; log.jsonl says which and why ("event": "skip")')
    print(f'best validation loss {best} at step {at.best_step}, after {at.seconds:.0f} s of '
          f'training; {run}/ has the checkpoints, log.jsonl' + (' and loss.png' if plotted else '')
          + '\n\nnext:\n'
          f'  python sample.py {name}                  # type a prompt, it goes on\n'
          f'  python sample.py {name} --num_samples=3 --temperature=1.0 </dev/null\n'
          '  python ' + shlex.join(['train.py', *CONFIGS, '--dataset=my_text.txt']))
    if fell_back:
        print(f'*** THIS WAS NOT {dataset.upper()} but {about}. With a network, or with '
              'DATA_MIRROR set, run the same command again ***')


def main() -> dict:
    """Train; returns the run directory, the last step, losses and the seconds of training."""
    source = source_hashes(__file__)    # before anybody edits it
    check_settings()
    ranks = processes.find_ranks()
    layout = (tp, pp, zero, replicas, sequence_parallel, pp_schedule)
    why = processes.arrange(ranks, *(() if eval_only else layout))
    dev = hardware.choose(device, dtype, compile, threads, ranks.local_rank, ranks.local_world)
    at = checkpoint.Progress(max_steps=max_steps)
    processes.start(ranks, dev, timeout_minutes, at)
    dev = hardware.agree(dev, processes.exchange)
    print0(*dev.why, *why, sep='\n')

    # Data, run directory, model
    if eval_only:
        result = evaluate_run(ranks, dev)
        processes.finish()
        return result
    data, meta, fell_back = get_data(ranks)
    tokenizer = tokenizers.load(data / 'tokenizer.json')
    base = Path(out_dir) if out_dir else default_out_dir(data, fell_back)
    begun = rundir.identity_of(base) if init_from == 'resume' else {}
    model, weights, n_parameters, flops = initial_model(tokenizer, dev, ranks, begun)
    config = model.config
    if meta['max_id'] >= config.vocab_size:
        stop(f'{data}: has token id {meta["max_id"]}, but the model only {config.vocab_size} ids')
    eos = tokenizer.eos if respects_documents(config) else None
    train_windows = load_split(data, 'train', block_size, seed, eos=eos)
    val_windows = load_split(data, 'val', block_size, shuffle=False, eos=eos)
    held = {name: meta[name] for name in ('sha256', 'train_tokens', 'val_tokens')}
    identity = rundir.identity(settings_of(globals()), config, tokenizer, source=source,
                               weights=weights, data=held | {'pack_documents': pack_documents})
    run, saver, state, dev = rundir.open_run(base, identity, ranks, dev, init_from == 'resume')
    per_rank = math.ceil(batch_size / ranks.dp / ranks.pp)  # a pipeline takes pp or more at a time
    rows = min(micro_batch_size, per_rank) or hardware.fit_micro_batch(
        dev, per_rank, block_size, config.n_layer, config.n_embd, ranks.local_world,
        parallel.learning_bytes(model, ranks), activation_checkpointing)
    rows = min(processes.exchange(rows))    # machines may have more memory or less
    first = ranks.rank == 0
    tokens_per_step = batch_size * block_size
    print0(f'data {data}: {meta["about"]}; {len(tokenizer):,} tokens in its vocabulary')
    if pack_documents:
        print0(f'packed {train_windows.about}')
    print0(f'{n_parameters:,} parameters, {flops / 1e6:,.2f} MFLOP per token; a step is '
           f'{batch_size} x {block_size} = {tokens_per_step:,} tokens, {rows} rows at a time, an '
           f'epoch {len(train_windows) / batch_size:,.1f} steps')

    # Optimizers, compilation, what a checkpoint says
    trained, n_micro = parallel.wrap(model, ranks, dev, math.ceil(batch_size / ranks.dp), rows)
    pipe = trained if ranks.pp > 1 else None

    learner = Learner(model, trained, build_optimizers(model, dev, ranks),
                      optim.LossScale(dev.dtype == 'float16'), dev, ranks, grad_clip,
                      seed if dropout else None)

    def make_batches(step):
        shares = share(step * batch_size, batch_size, ranks.dp_rank, ranks.dp, rows, n_micro)
        return [train_windows.batch(samples) for samples in shares]
    batches_of = Ahead(make_batches, dev.kind == 'cuda')

    def do_step(step, factor, *rest):
        batches = batches_of(step)
        return learner.step(batches, lm_loss_sums, count_targets(batches), step, factor, *rest)

    # A step to warm up. It compiles, and DDP arranges its buckets anew after it: without this, the
    # first step of a resumed run would add up gradients in another order.
    began = time.perf_counter()
    rows = learner.fit_rows(rows, train_windows.batch, lm_loss_sums)
    if dev.compile or ranks.world > 1:
        learner.time_steps(do_step, 1)
    compile_seconds = time.perf_counter() - began
    if dev.compile:
        print0(f'compiled in {compile_seconds:.1f} s')
    if state:
        rundir.resume(at, state, run, learner, limited=not max_minutes)
    log = rundir.Log(None)
    if first:
        settings = settings_of(globals())
        log = rundir.start_log(
            run, state, settings, sources=(model_module.__file__, __file__),
            others=rundir.service_loggers(run, settings, wandb, tensorboard), device=dev.why,
            world=ranks.world, identity=identity, config=asdict(config), micro_batch_size=rows,
            parameters=n_parameters, max_steps=at.max_steps, flops_per_token=flops,
            compile_seconds=compile_seconds)

    # The loop. A turn begins with what is due between two steps, so that a run that was stopped in
    # the middle of an evaluation begins with that evaluation when it goes on.
    bar = tqdm(total=None if max_minutes else max_steps, initial=at.step, unit='step',
               disable=ranks.rank != 0)
    saved, stopping, times = replace(at), False, []
    with rundir.StopRequest() as request:
        asked = lambda: processes.any_rank(bool(request.asked))
        while True:
            ends = is_over(at)
            if not stopping and at.evaluated < at.step:
                stopping = take_stock(at, log, model, val_windows, tokenizer, rows, dev, ranks,
                                      asked, pipe)
            saving = at.step % (save_interval or eval_interval) == 0 or at.step == at.best_step
            if (saving or stopping or ends) and at != saved and saver:
                saver.save(model, learner.optimizers, tokenizer, asdict(at) | {
                    'config': asdict(config), 'scaler': learner.scaler.state_dict(),
                    'identity': identity}, last=ends)
                saved = replace(at)
            if stopping or ends:
                break
            began = time.perf_counter()
            factor = optim.schedule(schedule_step(at), max_steps, schedule, warmup_steps,
                                    decay_fraction, min_lr_fraction)
            limit = optim.spike_limit(at.grad_norms, spike_sigma)
            (loss,), grad_norm, skipped, stopping = do_step(at.step, factor, limit, request)
            times.append(time.perf_counter() - began)
            at.step, at.seconds = at.step + 1, at.seconds + times[-1]
            if max_minutes:     # all ranks go by the clock of rank 0, or their rates would differ
                at.seconds = processes.broadcast(at.seconds)
            bar.update()
            if skipped:
                learner.note_skip(at, log, bar, saver, skipped, train_loss=loss,
                                  grad_norm=grad_norm, first_sample=(at.step - 1) * batch_size,
                                  last_sample=at.step * batch_size - 1)
                continue
            at.skipped_in_a_row = 0
            at.grad_norms = [*at.grad_norms, grad_norm][-100:] if spike_sigma else []
            if at.step % log_interval == 0 or is_over(at):
                speed = len(times) * tokens_per_step / sum(times)
                mfu = flops * speed / (dev.peak_flops * ranks.world) if dev.peak_flops else None
                log.write('step', step=at.step, tokens=at.step * tokens_per_step,
                          seconds=at.seconds, train_loss=loss, grad_norm=grad_norm,
                          learning_rate=learner.optimizers[0].param_groups[0]['lr'],
                          tokens_per_second=speed, mfu=mfu)
                bar.set_postfix_str(f'loss {loss:.4f}, {speed:,.0f} tokens/s'
                                    + (f', MFU {mfu:.1%}' if mfu else '')
                                    + (f', {at.seconds / 60:.1f} of {max_minutes:g} minutes'
                                       if max_minutes else ''))
                times = []
        bar.close()
        if saver:
            saver.finish(at.step)
        processes.broadcast(None, patient=True)     # rank 0 may have large files to join
        text = '' if stopping or not ranks.can_sample else make_sample(model, tokenizer, asked)
        stopping = stopping or asked()
    if stopping:
        print0(f'stopped after step {at.step}, which is saved in {run}; the same command goes on '
               'from there')
    elif first:
        end_run(run, log, at, text, fell_back, meta['about'])
    if first:
        saver.lock.close()
    processes.finish()
    return {'run_dir': str(run), 'step': at.step, 'stopped': stopping, 'seconds': at.seconds,
            'val_loss': at.val_loss, 'bits_per_byte': at.bits_per_byte,
            'best_val_loss': at.best_val_loss}


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
