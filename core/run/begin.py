"""What a pretraining run begins with: architecture, weights and optimizers, from train.py's
settings (or those of bench.py and plan.py, which have the same names)."""
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import torch

from core.net import optim
from core.net.weights import allocate, build_model, copy_weights, padded
from core.ranks import parallel
from core.ranks.processes import print0
from core.run import layout_check, models
from core.settings import stop
from model import GPTConfig, count_parameters, flops_per_token, init_weights


def from_model(settings: SimpleNamespace) -> bool:
    """Whether training begins with the weights of another model."""
    return settings.init_from not in ('scratch', 'resume')


def model_config(settings: SimpleNamespace, n_tokens: int) -> GPTConfig:
    """The architecture that the settings describe, for a tokenizer of n_tokens tokens."""
    size, depth = settings.vocab_size, settings.depth
    if size and size < n_tokens:
        stop(f'vocab_size={size}: the tokenizer has {n_tokens} tokens; use 0 to derive it')
    chosen = {f.name: getattr(settings, f.name) for f in fields(GPTConfig)
              if hasattr(settings, f.name)} | {'vocab_size': size or padded(n_tokens)}
    if depth:
        chosen |= {'n_layer': depth, 'n_head': depth, 'n_embd': 64 * depth}
    try:
        return GPTConfig(**chosen)
    except ValueError as e:
        stop(str(e))


def first_model(settings: SimpleNamespace, tokenizer, device, ranks, begun: dict):
    """The model to be trained, or this rank's part of it; the hash of the weights that it begins
    with ('' if they are random); and of the whole model the parameters and FLOPs per token.

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
    """The model in init_from, and the GPTConfig with which it is trained on: its architecture with
    the block_size and dropout of the settings, and a larger vocabulary if there are more tokens."""
    name, block_size = settings.init_from, settings.block_size
    source, known, _ = models.load_run(name, data_dir=settings.data_dir)
    config = source.config
    if known.tokens != tokenizer.tokens[:len(known)]:
        stop(f'init_from={name}: its tokenizer is not that of the dataset; leave out '
             f'--tokenizer, or prepare the text with --tokenizer={name}')
    if config.position == 'learned' and block_size > config.block_size:
        stop(f'block_size={block_size}: the model in init_from={name} knows only '
             f'{config.block_size} positions')
    size = max(config.vocab_size, padded(len(tokenizer), config.vocab_size))
    print0(f'begins with the weights of {name}: vocabulary {config.vocab_size:,} -> {size:,}, '
           f'positions {config.block_size:,} -> {block_size:,}')
    return source, replace(config, block_size=block_size, dropout=settings.dropout, vocab_size=size)


def build_optimizers(settings: SimpleNamespace, model, device, ranks) -> list:
    """The optimizers that the settings describe; depth scales AdamW's rates by 1 / sqrt(width)."""
    scale = (768 / model.config.n_embd) ** 0.5 if settings.depth else 1.0
    half = device.dtype == 'bfloat16'
    return optim.make_optimizers(
        model, settings.optimizer, settings.learning_rate * scale, settings.weight_decay,
        settings.beta1, settings.beta2, settings.muon_learning_rate, settings.muon_weight_decay,
        settings.muon_momentum, settings.ns_steps, settings.embed_learning_rate * scale,
        torch.bfloat16 if half else torch.float32, parallel.spreader(ranks))
