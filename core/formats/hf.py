"""Hugging Face folders: their configs, tensor names and tokenizer.json, to ours and back.

A folder holds config.json, model.safetensors (or shards with an index), tokenizer.json. Its model
is GPT-2, Llama, Qwen2 or Qwen3, which are settings of our GPT; whatever else it may be, and what
these have that we do not, is refused by its name. Nothing of a folder is executed, no pickle is
opened.
"""
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_private

from core.net.weights import Model, build_model
from core.settings import stop
from core.text.hf_tokenizer import (
    read_json,
    read_template,
    read_tokenizer,
    template_of,
    tokenizer_json,
)
from core.text.tokenizer import Tokenizer
from model import GPT, GPTConfig

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
LLAMA3_ROPE = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
KINDS = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
         'qwen3': 'Qwen3ForCausalLM'}
CLASSIFIER = 'ForSequenceClassification'    # it classifies by the last token that is no padding
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.h5', '.msgpack')

# ---------------------------------------------------------------------------------------------
# config.json

# GPTConfig's field, the field of config.json, its type, and its default (None: it must be there; 0:
# GPTConfig derives it). Both reading and writing follow these tables.
GPT2_FIELDS = (
    ('vocab_size', 'vocab_size', int, None), ('block_size', 'n_positions', int, None),
    ('n_embd', 'n_embd', int, None), ('n_layer', 'n_layer', int, None),
    ('n_head', 'n_head', int, None), ('n_hidden', 'n_inner', int, 0),
    ('norm_eps', 'layer_norm_epsilon', float, 1e-5), ('tied', 'tie_word_embeddings', bool, True))
LLAMA_FIELDS = (
    ('vocab_size', 'vocab_size', int, None), ('block_size', 'max_position_embeddings', int, None),
    ('n_embd', 'hidden_size', int, None), ('n_layer', 'num_hidden_layers', int, None),
    ('n_head', 'num_attention_heads', int, None), ('n_kv_head', 'num_key_value_heads', int, 0),
    ('head_dim', 'head_dim', int, 0), ('n_hidden', 'intermediate_size', int, None),
    ('norm_eps', 'rms_norm_eps', float, 1e-6), ('bias', 'attention_bias', bool, False),
    ('tied', 'tie_word_embeddings', bool, False))


class Fields:
    """A config.json; each field is taken with its type checked."""

    def __init__(self, path: Path, found: dict):
        self.path, self.found = path, found

    def get(self, name: str, kind: type, default=None) -> Any:
        """The field `name`, or `default` where it is missing or null; stops if that is None, too.
        Numbers must be positive and of a sensible size."""
        value = self.found.get(name)
        value = default if value is None else value
        if value is None:
            stop(f'{self.path}: {name} is missing')
        if kind is float and type(value) in (int, float):
            fits, what = 0 < value < 1e12, 'a positive number'
        elif kind is int:
            fits, what = type(value) is int and 0 <= value < 1 << 24, 'an integer from 0 to 2^24'
        else:
            fits, what = type(value) is kind, f'of type {kind.__name__}'
        if not fits:
            stop(f'{self.path}: {name}={value!r:.80}: must be {what}')
        return kind(value)

    def refuse(self, **required) -> None:
        """Stop if a field is there with another value than the one that our model computes."""
        for name, value in required.items():
            if self.found.get(name) not in (None, value):
                stop(f'{self.path}: {name}={self.found[name]!r:.80}: not supported, only '
                     f'{value}')


def read_config(folder) -> GPTConfig:
    """The architecture that a folder's config.json describes. Stops at what our GPT is not."""
    path = Path(folder) / 'config.json'
    found = Fields(path, read_json(path))
    kind = found.get('model_type', str)
    found.refuse(quantization_config=None)
    if kind not in KINDS:
        stop(f'{path}: model_type={kind!r:.80}: only {", ".join(KINDS)} can be read')
    if kind == 'gpt2':
        found.refuse(activation_function='gelu_new', add_cross_attention=False,
                     scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        more: dict = dict(norm='layernorm', position='learned', mlp='gelu', bias=True)
    else:
        found.refuse(hidden_act='silu', use_sliding_window=False)
        more = dict(norm='rmsnorm', position='rope', mlp='swiglu', **rope_settings(found))
        more |= {'qkv_bias': kind == 'qwen2'}
        if kind == 'qwen3':
            more |= dict(qk_norm=True, head_dim=found.get('head_dim', int, 128))
        if found.get('attention_bias', bool, False) and (
                kind != 'llama' or not found.get('mlp_bias', bool, False)):
            stop(f'{path}: attention_bias=True without biases in the MLP is not supported')
    fields: dict = {ours: found.get(theirs, type_, default) for ours, theirs, type_, default
                    in (GPT2_FIELDS if kind == 'gpt2' else LLAMA_FIELDS)}
    if n_classes := len(class_names(found)):
        more |= dict(n_classes=n_classes, tied=False)
    try:
        return GPTConfig(**fields | more)
    except ValueError as e:
        stop(f'{path}: {e}')


def class_names(found: Fields) -> list[str]:
    """The classes of a sequence classification model; [] of a language model."""
    architectures = found.get('architectures', list, [])
    if not any(str(name).endswith(CLASSIFIER) for name in architectures):
        return []
    names = found.get('id2label', dict)
    if len(names) < 2 or {*names} != {*map(str, range(len(names)))}:
        stop(f'{found.path}: id2label does not name two or more classes from 0 on')
    return [str(names[str(i)]) for i in range(len(names))]


def rope_settings(found: Fields) -> dict:
    """rope_theta and rope_scaling of a Llama or a Qwen3. Stops at other scalings than Llama 3.1's.
    """
    # transformers 5, too, prefers the older spelling rope_scaling
    rope = found.get('rope_scaling', dict, {}) or found.get('rope_parameters', dict, {})
    kind, scaling = rope.get('rope_type', rope.get('type', 'default')), ''
    if kind not in ('default', 'llama3'):
        stop(f'{found.path}: RoPE scaling {kind!r:.80} is not supported, only that '
             'of Llama 3.1 (llama3), and RoPE without')
    given = Fields(found.path, {**found.found, **rope})
    if kind == 'llama3':
        numbers = [repr(given.get(name, float)).removesuffix('.0') for name in LLAMA3_ROPE[:-1]]
        context = found.get(LLAMA3_ROPE[-1], int, rope.get(LLAMA3_ROPE[-1]) or
                            found.get('max_position_embeddings', int))
        scaling = ','.join([*numbers, str(context)])
    return {'rope_theta': given.get('rope_theta', float, 10000.0), 'rope_scaling': scaling}


def architecture(config: GPTConfig) -> str:
    """The public architecture that a model is, of KINDS. Stops if it is none."""
    wanted = {'arch': 'gpt', 'window': 0}
    if config.norm == 'layernorm':
        kind = 'gpt2'
        wanted |= {'position': 'learned', 'mlp': 'gelu', 'qk_norm': False, 'qkv_bias': False,
                   'n_kv_head': config.n_head, 'head_dim': config.n_embd // config.n_head}
    else:
        kind = 'qwen3' if config.qk_norm else 'qwen2' if config.qkv_bias else 'llama'
        wanted |= {'position': 'rope', 'mlp': 'swiglu'}
        wanted |= {} if kind == 'llama' else {'bias': False, 'qkv_bias': kind == 'qwen2'}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            stop(f'{name}={getattr(config, name)}: no architecture of Hugging Face has it; '
                 f'{kind}, the nearest one, has {name}={value}')
    return kind


def config_json(config: GPTConfig, tokenizer: Tokenizer, dtype: str, labels=()) -> dict:
    """The content of a model's config.json; the inverse of read_config. `labels` are the names of a
    classifier's classes."""
    kind = architecture(config)
    # transformers 4 and 5 spell the dtype and RoPE's theta differently: both spellings.
    found = {'architectures': [KINDS[kind]], 'model_type': kind, 'bos_token_id': tokenizer.bos,
             'eos_token_id': tokenizer.eos, 'dtype': dtype, 'torch_dtype': dtype}
    if labels:
        found['architectures'] = [re.sub('ForCausalLM|LMHeadModel', CLASSIFIER, KINDS[kind])]
        found |= {'id2label': {str(i): name for i, name in enumerate(labels)},
                  'label2id': {name: i for i, name in enumerate(labels)},
                  'problem_type': 'single_label_classification', 'pad_token_id': tokenizer.eos}
    for ours, theirs, _, _ in GPT2_FIELDS if kind == 'gpt2' else LLAMA_FIELDS:
        found[theirs] = getattr(config, ours)
    if kind == 'gpt2':
        dropouts = ('resid_pdrop', 'embd_pdrop', 'attn_pdrop')
        return found | {'activation_function': 'gelu_new'} | dict.fromkeys(dropouts, config.dropout)
    rope = {'rope_type': 'default', 'rope_theta': config.rope_theta}
    if config.rope_scaling:
        rope |= {'rope_type': 'llama3', **dict(zip(LLAMA3_ROPE, map(
            float, config.rope_scaling.split(','))))}
        rope[LLAMA3_ROPE[-1]] = int(rope[LLAMA3_ROPE[-1]])
    return found | {
        'hidden_act': 'silu', 'rope_theta': config.rope_theta, 'rope_parameters': rope,
        'rope_scaling': rope if config.rope_scaling else None,
        **({'mlp_bias': config.bias} if kind == 'llama' else {'use_sliding_window': False})}


# ---------------------------------------------------------------------------------------------
# Tensor names

LLAMA_NAMES = {
    'wte': 'model.embed_tokens', 'ln_f': 'model.norm', 'lm_head': 'lm_head', 'h': 'model.layers',
    'ln_1': 'input_layernorm', 'ln_2': 'post_attention_layernorm', 'attn': 'self_attn'}
GPT2_NAMES = {
    'wte': 'transformer.wte', 'wpe': 'transformer.wpe', 'ln_f': 'transformer.ln_f',
    'lm_head': 'lm_head', 'h': 'transformer.h', 'q_proj': 'c_attn', 'k_proj': 'c_attn',
    'v_proj': 'c_attn', 'o_proj': 'c_proj', 'up_proj': 'c_fc', 'down_proj': 'c_proj'}
# What old files hold beside the weights: masks, and angles that follow from rope_theta.
BUFFERS = re.compile(r'.*(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)')
# The parameters that these architectures have, under our names.
PARAMETERS = re.compile(r'(wte|wpe|lm_head)\.weight|ln_f\.(weight|bias)|h\.\d+\.(ln_[12]|attn\.'
                        r'([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj)\.(weight|bias)')


def hf_name(name: str, kind: str, n_classes: int = 0) -> str:
    """Hugging Face's name of our parameter: 'h.0.attn.q_proj.weight' for llama is
    'model.layers.0.self_attn.q_proj.weight'; GPT-2's q, k and v share one tensor."""
    if n_classes and name == 'lm_head.weight':
        return 'score.weight'
    names = GPT2_NAMES if kind == 'gpt2' else LLAMA_NAMES
    return '.'.join(names.get(part, part) for part in name.split('.'))


def third(name: str, kind: str) -> int | None:
    """Which third of GPT-2's c_attn our parameter is; None if it is a tensor of its own."""
    names = ['q_proj', 'k_proj', 'v_proj'] if kind == 'gpt2' else []
    return names.index(name.split('.')[-2]) if name.split('.')[-2] in names else None


def is_transposed(name: str, kind: str) -> bool:
    """Whether Hugging Face keeps this weight as (in, out): GPT-2's Conv1D does."""
    return kind == 'gpt2' and name.endswith('_proj.weight')


def parameters_of(model: GPT, kind: str) -> dict[str, torch.Tensor]:
    """The parameters by our names, with biases of 0 for a GPT-2 without any. Stops at a parameter
    or buffer that the architecture `kind` does not have."""
    for name in (*dict(model.named_parameters()), *dict(model.named_buffers())):
        if not PARAMETERS.fullmatch(name):
            stop(f'{name}: {kind} has nothing like it, so this edited model has no form in Hugging '
                 "Face's format; nothing was exported")
    found = {name: p.detach() for name, p in model.named_parameters()}
    if kind == 'gpt2' and not model.config.bias:
        for name, p in list(found.items()):
            if name.endswith(('_proj.weight', 'ln_1.weight', 'ln_2.weight', 'ln_f.weight')):
                found[name.removesuffix('weight') + 'bias'] = p.new_zeros(p.size(0))
    return found


def to_hf(model: GPT) -> dict[str, torch.Tensor]:
    """The model's parameters under Hugging Face's names."""
    kind, tensors = architecture(model.config), {}
    for name, p in parameters_of(model, kind).items():      # q, k and v come in this order
        key = hf_name(name, kind, model.config.n_classes)
        p = p.T if is_transposed(name, kind) else p
        tensors[key] = p if key not in tensors else torch.cat([tensors[key], p], dim=-1)
    return {key: p.contiguous() for key, p in tensors.items()}


def shards(folder: Path) -> list[str]:
    """The names of a model's safetensors files: those that its index lists, if it has one."""
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    index = read_json(folder / INDEX).get('weight_map')
    files = sorted(set(index.values()), key=str) if isinstance(index, dict) else []
    if not files or not all(isinstance(file, str) and re.fullmatch(r'[\w.-]+\.safetensors', file)
                            for file in files):
        stop(f'{folder / INDEX}: weight_map does not name safetensors files in this folder')
    return files


def open_weights(folder: Path) -> dict:
    """{tensor name: open safetensors file}. Stops if files are missing, damaged or pickles."""
    found = {}
    for file in shards(folder):
        path = folder / file
        if not path.is_file():
            for pickle in sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
                stop(f'{path}: missing; {pickle} is a pickle, which could run anything, and is '
                     'never loaded: convert it where you trust it, with transformers: '
                     f'AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...)')
            stop(f'{path}: missing; download it again')
        try:
            file = safe_open(path, 'pt')
            found |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError,
                MemoryError) as e:
            stop(f'{path}: cannot be read as safetensors ({type(e).__name__}: {e}); download it '
                 'again')
    return found


def match(config: GPTConfig, folder: Path, files: dict) -> dict[str, str]:
    """{our parameter: tensor in the folder}. Stops if one is missing, of another shape, or unknown.

    Looks at the files' headers only, so that a wrong config.json costs no memory.
    """
    kind = architecture(config)
    if config.n_layer > len(files):
        stop(f'{folder}: config.json asks for {config.n_layer:,} layers, but there are only '
             f'{len(files)} tensors')
    # openai-community/gpt2 and its like are saved without the prefix
    prefix = 'transformer.' if kind == 'gpt2' and 'wte.weight' in files else ''
    found = {}
    for name, p in build_model(config, None, 'meta').named_parameters():
        key = found[name] = hf_name(name, kind, config.n_classes).removeprefix(prefix)
        if key not in files:
            why = 'config.json asks for' if PARAMETERS.fullmatch(name) else \
                'an edit of model.py has added'
            stop(f'{folder}: its weights lack {key}, which {why}')
        stored = files[key].get_slice(key)
        if stored.get_dtype() not in ('F64', 'F32', 'F16', 'BF16'):
            stop(f'{folder}: {key} has dtype {stored.get_dtype()}; quantized weights are not '
                 'supported, only floating point of 16 bits and more')
        expected = list(p.T.shape if is_transposed(name, kind) else p.shape)
        if third(name, kind) is not None:
            expected[-1] *= 3
        if (shape := list(stored.get_shape())) != expected:
            stop(f'{folder}: {key} has shape {shape}, config.json asks for {expected}')
    unknown = [key for key in sorted(set(files) - set(found.values()))
               if not BUFFERS.fullmatch(key) and not (config.tied and key == 'lm_head.weight')]
    if unknown:
        stop(f'{folder}: its weights hold {unknown[0][:80]!r}, which config.json does not ask for')
    return found


@torch.no_grad()
def load(folder, device: str = 'cpu') -> tuple[Model, Tokenizer, dict]:
    """Model (fp32, in eval mode) and tokenizer of a Hugging Face folder, and its task ('', 'chat',
    'classify') with the labels of its classes."""
    folder = Path(folder)
    config, files = read_config(folder), open_weights(folder)
    keys = match(config, folder, files)
    tokenizer = read_tokenizer(folder / 'tokenizer.json')
    if len(tokenizer) > config.vocab_size:
        stop(f'{folder}: tokenizer.json has {len(tokenizer):,} tokens, config.json says '
             f'vocab_size={config.vocab_size:,}')
    model, kind = build_model(config, None, device), architecture(config)
    for name, p in model.named_parameters():
        tensor, part = files[keys[name]].get_tensor(keys[name]), third(name, kind)
        tensor = tensor if part is None else tensor.chunk(3, dim=-1)[part]
        p.copy_(tensor.T if is_transposed(name, kind) else tensor)
    if config.tied and 'lm_head.weight' in files:
        head = files['lm_head.weight'].get_tensor('lm_head.weight').to(device, torch.float32)
        if not torch.equal(head, model.lm_head.weight):
            stop(f'{folder}: tie_word_embeddings=True, but its lm_head.weight is not its embedding')
    labels = class_names(Fields(folder, read_json(folder / 'config.json')))
    task = 'classify' if labels else 'chat' if read_template(folder, tokenizer) else ''
    return model.eval(), tokenizer, {'task': task, 'labels': labels}


def save_file(tensors: dict, path: Path, metadata: dict | None = None) -> None:
    """Write a safetensors file with the mode that the umask and the folder give; the library's own
    function lets only the owner read it."""
    path.touch()
    mode = path.stat().st_mode
    save_private(tensors, path, metadata=metadata)
    path.chmod(mode)


def save(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: str = 'float32',
         shard_bytes: int = 5_000_000_000, *, chat: bool = False, labels=()) -> None:
    """Write a folder that transformers 4 and 5 load without any code of ours; of a `chat` model
    with its template, by which read_template knows it again; of a classifier with its labels."""
    config = model.config
    tensors = {key: p.to(getattr(torch, dtype)) for key, p in to_hf(model).items()}
    groups, room = [{}], shard_bytes
    for key, p in tensors.items():
        if groups[-1] and p.nbytes > room:
            groups.append({})
            room = shard_bytes
        groups[-1][key] = p
        room -= p.nbytes
    folder.mkdir(parents=True)
    index = {}
    for i, group in enumerate(groups, 1):
        file = WEIGHTS if len(groups) == 1 else f'model-{i:05d}-of-{len(groups):05d}.safetensors'
        save_file(group, folder / file, metadata={'format': 'pt'})
        index |= dict.fromkeys(group, file)
    eos, bos = tokenizer.eos, tokenizer.bos
    names: dict = {i: name for name, i in tokenizer.special.items()}
    ends = sorted(tokenizer.turn_ends()) if chat else [eos]
    files = {
        'config.json': config_json(config, tokenizer, dtype, labels),
        'generation_config.json': {'bos_token_id': bos, 'eos_token_id': ends, 'pad_token_id': eos},
        'tokenizer.json': tokenizer_json(tokenizer),
        'tokenizer_config.json': {
            'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': names.get(bos),
            'eos_token': names[eos], 'pad_token': names[eos], 'add_bos_token': tokenizer.add_bos,
            'model_max_length': config.block_size, 'clean_up_tokenization_spaces': False,
            **({'chat_template': template_of(tokenizer)} if chat else {})}}
    if len(groups) > 1:
        files[INDEX] = {'metadata': {'total_size': sum(p.nbytes for p in tensors.values())},
                        'weight_map': index}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n',
                                   encoding='utf-8')
