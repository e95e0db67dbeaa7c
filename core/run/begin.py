"""What a run begins with: architecture, weights and optimizers, from the settings of train.py (or
of bench.py and plan.py, which have the same names); and the same of the stages after it."""
import importlib.util
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import torch

from core.device import fit_micro_batch
from core.net import optim
from core.net.weights import allocate, build_model, copy_weights, padded
from core.ranks import parallel
from core.ranks.processes import PP_SCHEDULES, print0
from core.run import layout_check, models
from core.run.learner import Learner
from core.settings import check_bounds, check_choice, stop, warn
from model import GPTConfig, count_parameters, flops_per_token, init_weights


def check_settings(settings: dict) -> None:
    """Stop at the first of train.py's settings that is out of range, or that contradicts another
    one. FLAGS and GIVEN among them are the names that were given; see core.settings.configure."""
    s = SimpleNamespace(**{'FLAGS': (), 'GIVEN': (), **settings})
    check_bounds(settings, block_size=(1, 1 << 24), max_steps=(1, None), eval_interval=(1, None))
    check_choice(settings, optimizer=optim.OPTIMIZERS, schedule=optim.SCHEDULES,
                 pp_schedule=PP_SCHEDULES)
    for service in ('wandb', 'tensorboard'):
        if settings[service] and not importlib.util.find_spec(service):
            stop(f'{service}=True: it is not installed: pip install {service}')
    if s.warmup_steps >= s.max_steps:
        warn(f'warmup_steps={s.warmup_steps}: as long as max_steps={s.max_steps}, so the learning '
             'rate never reaches its peak')
    fixed = [name for name in ('n_layer', 'n_head', 'n_embd') if name in s.FLAGS]
    if s.depth and fixed:
        stop(f'depth={s.depth}: derives {fixed[0]}, which was also given; leave one of the two out')
    if s.sample_interval and (s.pp > 1 or s.sequence_parallel):
        stop(f'sample_interval={s.sample_interval}: no text can be written token by token with pp '
             'or sequence_parallel; leave it out, and use sample.py with the checkpoints')
    own = {f.name for f in fields(GPTConfig)} - {'block_size', 'dropout'} | {'depth'}
    given = sorted(own & {*s.GIVEN})
    if from_model(s) and given:
        stop(f'{given[0]}={settings[given[0]]}: the model in init_from={s.init_from} has its own; '
             'leave it out')
    if s.pack_documents and s.arch == 'lstm':
        stop('pack_documents=True: an LSTM cannot keep apart documents in one row; leave it out')


def from_model(settings: SimpleNamespace) -> bool:
    """Whether training begins with the weights of another model."""
    return settings.init_from not in ('scratch', 'resume')


def tokenizer_wanted(settings: SimpleNamespace) -> str:
    """Which tokenizer the dataset is to have; '': its own."""
    return settings.tokenizer or (settings.init_from if from_model(settings) else '')


def model_config(settings: SimpleNamespace, n_tokens: int) -> GPTConfig:
    """The architecture that the settings describe, for a tokenizer of n_tokens tokens."""
    size, depth = settings.vocab_size, settings.depth
    if size and size < n_tokens:
        stop(f'vocab_size={size}: the tokenizer has {n_tokens} tokens; use 0 to derive it')
    chosen: dict = {f.name: getattr(settings, f.name) for f in fields(GPTConfig)
                    if hasattr(settings, f.name)} | {'vocab_size': size or padded(n_tokens)}
    if depth:
        chosen |= {'n_layer': depth, 'n_head': depth, 'n_embd': 64 * depth}
    try:
        return GPTConfig(**chosen)
    except ValueError as e:
        stop(str(e))


def first_model(settings: SimpleNamespace, tokenizer, device, ranks, begun: dict):
    """(model to be trained or this rank's part of it, hash of the weights that it begins with or ''
    if they are random, parameters and FLOPs per token of the whole model).

    `begun` is the identity of a run to be resumed: if that began with a model, its architecture is
    taken. Stops if the model in init_from does not know the tokenizer's tokens.
    """
    source, weights = None, begun.get('weights', '')
    if weights:
        config = models.read_config(begun['architecture'], 'init_from=resume')
    elif not from_model(settings):
        config = model_config(settings, len(tokenizer))
    else:
        source, config = known_model(settings, tokenizer)
        weights = models.weights_hash(source)
    parallel.check_model(ranks, config)
    if settings.check_layout or not ranks.plain:
        layout_check.check(ranks, device, config, settings, partial(build_optimizers, settings))
    model = build_model(config, settings.seed, 'meta')
    sizes = count_parameters(model), flops_per_token(model)
    model.recompute = settings.activation_checkpointing
    parallel.place(model, ranks)
    allocate(model, device.name, parallel.put)
    if source:
        copy_weights(source, model, parallel.put)
    elif not weights:
        init_weights(model, settings.seed, parallel.put)
    return model, weights, *sizes


def known_model(settings: SimpleNamespace, tokenizer):
    """The model in init_from, and the GPTConfig with which it is trained on."""
    name = settings.init_from
    source, known, _ = models.load_run(name, data_dir=settings.data_dir)
    if known.tokens != tokenizer.tokens[:len(known)]:
        stop(f'init_from={name}: its tokenizer is not that of the dataset; leave out '
             f'--tokenizer, or prepare the text with --tokenizer={name}')
    old, config = source.config, adapted(settings, source.config, len(tokenizer))
    print0(f'begins with the weights of {name}: vocabulary {old.vocab_size:,} -> '
           f'{config.vocab_size:,}, positions {old.block_size:,} -> {config.block_size:,}')
    return source, config


def adapted(settings: SimpleNamespace, config: GPTConfig, n_tokens: int) -> GPTConfig:
    """The GPTConfig with which a model is trained on: with the block_size and dropout of the
    settings, and a vocabulary for n_tokens. Stops if it has too few positions."""
    if config.position == 'learned' and settings.block_size > config.block_size:
        stop(f'block_size={settings.block_size}: the model in init_from={settings.init_from} knows '
             f'only {config.block_size} positions')
    return replace(config, block_size=settings.block_size, dropout=settings.dropout,
                   vocab_size=max(config.vocab_size, padded(n_tokens, config.vocab_size)))


def build_optimizers(settings: SimpleNamespace, model, device, ranks) -> list:
    """The optimizers that the settings describe; depth scales AdamW's rates by 1 / sqrt(width)."""
    scale = (768 / model.config.n_embd) ** 0.5 if settings.depth else 1.0
    half = device.dtype == 'bfloat16'
    return optim.make_optimizers(
        model, settings.optimizer, settings.learning_rate * scale, settings.weight_decay,
        settings.beta1, settings.beta2, settings.muon_learning_rate, settings.muon_weight_decay,
        settings.muon_momentum, settings.ns_steps, settings.embed_learning_rate * scale,
        torch.bfloat16 if half else torch.float32, parallel.spreader(ranks))


# ---------------------------------------------------------------------------------------------
# The stages after pretraining


def check_tuning(settings: dict, command: str, sets) -> None:
    """Stop at the first setting of finetune, classify or dpo that is out of range, or contradicts
    another one; without a model, which `command` takes; without a dataset, such as one of `sets`.
    """
    s = SimpleNamespace(**{'layers': 'all', 'save_adapters': False, **settings})
    check_bounds(settings)
    check_choice(settings, schedule=optim.SCHEDULES, init_from=('', 'resume'))
    if s.layers not in ('all', 'head') and not s.layers.isdigit():
        stop(f'layers={s.layers}: must be all, head, or a number of blocks')
    if s.lora_rank and s.layers != 'all':
        stop(f'layers={s.layers} with lora_rank={s.lora_rank}: choose one of the two')
    if s.save_adapters and not s.lora_rank:
        stop('save_adapters=True: needs a lora_rank')
    models.check_named(s.run_dir, command)
    if not s.dataset:
        stop(f'no dataset given: a file, or one of {", ".join(sets)}')


def tuning_learner(settings: dict, model, ranks, device) -> Learner:
    """What trains a model in a stage after pretraining, with AdamW."""
    s = SimpleNamespace(**settings)
    trained, _ = parallel.wrap(model, ranks, device)
    optimizers = optim.make_optimizers(model, 'adamw', s.learning_rate, s.weight_decay, s.beta1,
                                       s.beta2)
    return Learner(model, trained, optimizers, optim.LossScale(device.dtype == 'float16'), device,
                   ranks, s.grad_clip, s.seed if s.dropout or s.lora_dropout else None)


def just_evaluating(model, ranks, device, block_size: int, wanted: int) -> tuple[Learner, int]:
    """What evaluates a model that does not learn; and how many rows of block_size tokens at a time:
    `wanted`, or if that is 0 as memory allows."""
    rows = wanted or fit_micro_batch(device, 64, block_size, 1, model.config.n_embd,
                                     local_world=ranks.local_world)
    return Learner(model.to(device.name), model, [], optim.LossScale(False), device, ranks), rows
