"""GGUF, the format of llama.cpp and Ollama: architecture, weights, tokenizer, template in one file.

The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here, with
a limit on all that it counts; the package `gguf` unpacks and packs quantized blocks, and writes.
Only what our GPT computes is read: gpt2, llama, qwen2, qwen3, with a byte-level BPE or one of ours.
"""
import importlib.util
import math
import mmap
import re
from pathlib import Path

import numpy as np
import torch

from core.formats import hf
from core.net.weights import Model, allocate, build_model
from core.settings import stop
from core.text.hf_tokenizer import (
    EACH_DIGIT,
    NotSupported,
    make_bpe,
    merges_of,
    template_of,
    use_template,
)
from core.text.tokenizer import (
    PATTERNS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    printable,
)
from model import GPT, GPTConfig, rope_tables

MAGIC, ALIGNMENT = b'GGUF', 32
HEADER_BYTES, ITEMS = 1 << 26, 1 << 21      # of a header, and of strings and numbers in its lists
NUMBERS = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?', 10: '<u8',
           11: '<i8', 12: '<f8'}
STRING, LIST = 8, 9
NORMAL, CONTROL, WRITTEN, UNUSED = 1, 3, 4, 5       # kinds of tokens
# What --dtype may be. Blocks of 32 numbers share a scale in those that are quantized.
DTYPES = ('f32', 'f16', 'bf16', 'q8_0', 'q5_1', 'q5_0', 'q4_1', 'q4_0')


# ---------------------------------------------------------------------------------------------
# Header


class Header:
    """`fields`: {key: value}, `tensors`: {name: (shape, type, offset)}, `begin` of the tensors."""

    def __init__(self, path: Path):
        """Stops, naming what is wrong, if the file is no GGUF or promises what it does not hold."""
        self.path, self.at, self.items, self.fields, self.tensors = path, 0, 0, {}, {}
        try:
            with open(path, 'rb') as f:
                self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            self.read()
        except ValueError as e:
            stop(f'{path}: cannot be read as GGUF ({e}); download it again')
        except OSError as e:
            stop(f'{path}: {e.strerror}')

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        if n > HEADER_BYTES - self.at or n > len(self.data) - self.at:
            raise ValueError(f'its header needs {n:,} more bytes at {self.at:,} than there are')
        self.at += n
        return self.data[self.at - n:self.at]

    def number(self, kind: int = 4):
        """A number of one of the kinds in NUMBERS; unsigned of 32 bits without."""
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def count(self, what: str) -> int:
        """How many of something follow, which must be a sensible number."""
        n = self.number(10)
        self.items += n
        if self.items > ITEMS:
            raise ValueError(f'{n:,} {what} are too many')
        return n

    def string(self) -> str:
        """Its length, then its bytes."""
        return self.take(self.number(10)).decode('utf-8')

    def value(self, kind: int, key: str):
        """A number, a string, or a list of one of both."""
        if kind in NUMBERS:
            return self.number(kind)
        if kind == STRING:
            return self.string()
        kind, n = (self.number(), self.count(f'items of {key}')) if kind == LIST else (kind, 0)
        if kind in NUMBERS:
            dtype = np.dtype(NUMBERS[kind])
            return np.frombuffer(self.take(n * dtype.itemsize), dtype)
        if kind != STRING:
            raise ValueError(f'{key:.80} has a value of kind {kind}')
        return [self.string() for _ in range(n)]

    def read(self) -> None:
        """All of the header. Raises ValueError, saying what is not as the format has it."""
        if self.take(4) != MAGIC:
            raise ValueError('it does not begin with GGUF')
        if (version := self.number()) not in (2, 3):
            raise ValueError(f'version {version}; 2 and 3 are known')
        n_tensors, n_fields = self.count('tensors'), self.count('fields')
        for _ in range(n_fields):
            key = self.string()
            self.fields[key] = self.value(self.number(), key)
        for _ in range(n_tensors):
            name, n_dims = self.string(), self.number()
            if n_dims > 4 or name in self.tensors:
                raise ValueError(f'tensor {name:.80} has {n_dims} dimensions, or comes twice')
            shape = tuple(self.number(10) for _ in range(n_dims))[::-1]
            self.tensors[name] = shape, self.number(), self.number(10)
        align = self.fields.get('general.alignment', ALIGNMENT)
        if type(align) is not int or not 0 < align <= 1 << 16:
            raise ValueError(f'general.alignment={align!r:.80}')
        self.begin = -(-self.at // align) * align

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in fp32. Stops if its kind is not known, or the file too short for it."""
        library = needed(f'reading {self.path}')
        shape, kind, offset = self.tensors[name]
        try:
            kind = library.GGMLQuantizationType(kind)
            block, size = library.GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise ValueError(f'rows of {shape} are not of whole blocks of {block}')
            n_bytes, begin = math.prod(shape) // block * size, self.begin + offset
            if begin + n_bytes > len(self.data):
                stop(f'{self.path}: is cut off: {name} ends at byte {begin + n_bytes:,} of '
                     f'{len(self.data):,}; download it again')
            raw = np.frombuffer(self.data, np.uint8, n_bytes, begin)
            raw = raw.reshape(*shape[:-1], shape[-1] // block * size)
            return torch.from_numpy(np.array(library.quants.dequantize(raw, kind), np.float32))
        except (ValueError, KeyError, NotImplementedError) as e:
            return stop(f'{self.path}: {name} cannot be unpacked ({e}); take a file of another '
                        'quantization, such as Q8_0')


def needed(what: str):
    """The package gguf. Stops if it is not installed."""
    if not importlib.util.find_spec('gguf'):
        stop(f'{what} needs a package: pip install gguf')
    import gguf
    return gguf


# ---------------------------------------------------------------------------------------------
# Architecture and weights

# GPTConfig's field, the field of the file after '<architecture>.', its type, its default.
FIELDS = (
    ('block_size', 'context_length', int, None), ('n_embd', 'embedding_length', int, None),
    ('n_layer', 'block_count', int, None), ('n_hidden', 'feed_forward_length', int, None),
    ('n_head', 'attention.head_count', int, None),
    ('n_kv_head', 'attention.head_count_kv', int, 0))
GPT2_FIELDS = (*FIELDS, ('norm_eps', 'attention.layer_norm_epsilon', float, None))
LLAMA_FIELDS = (*FIELDS, ('head_dim', 'attention.key_length', int, 0),
                ('norm_eps', 'attention.layer_norm_rms_epsilon', float, None),
                ('rope_theta', 'rope.freq_base', float, 10000.0))
NAMES = {'wte': 'token_embd', 'wpe': 'position_embd', 'ln_f': 'output_norm', 'lm_head': 'output',
         'h': 'blk', 'ln_1': 'attn_norm', 'ln_2': 'ffn_norm', 'q_proj': 'attn_q',
         'k_proj': 'attn_k', 'v_proj': 'attn_v', 'o_proj': 'attn_output', 'q_norm': 'attn_q_norm',
         'k_norm': 'attn_k_norm', 'gate_proj': 'ffn_gate', 'up_proj': 'ffn_up',
         'down_proj': 'ffn_down', 'attn': '', 'mlp': ''}
ROPE_FACTORS = 'rope_freqs.weight'      # what Llama 3.1 divides its frequencies by
LLAMA3 = [f'{factor},1,4,8192' for factor in (8, 32)]       # those that are published


def gguf_name(name: str, kind: str) -> str:
    """The file's name of our parameter: 'h.0.attn.q_proj.weight' is 'blk.0.attn_q.weight'; GPT-2's
    q, k and v share one tensor."""
    if kind == 'gpt2' and hf.third(name, kind) is not None:
        name = re.sub(r'attn\.[qkv]_proj', 'attn_qkv', name)
    return '.'.join(filter(None, (NAMES.get(part, part) for part in name.split('.'))))


def rope_factors(config: GPTConfig) -> torch.Tensor:
    """(head_dim / 2,): by how much rope_scaling divides each frequency. See model.rope_tables."""
    plain, scaled = (rope_tables(torch.ones(1), config.head_dim, config.rope_theta, scaling)
                     for scaling in ('', config.rope_scaling))
    angle = lambda table: torch.atan2(table[1], table[0]).flatten()     # of position 1: a frequency
    return angle(plain) / angle(scaled)


def read_config(header: Header) -> tuple[str, GPTConfig]:
    """The architecture's name and the GPTConfig. Stops at what our GPT does not compute."""
    path, kind = header.path, header.fields.get('general.architecture')
    if kind not in hf.KINDS:
        stop(f'{path}: general.architecture={kind!r:.80}: only {", ".join(hf.KINDS)} can be read')
    found = hf.Fields(path, {key.removeprefix(f'{kind}.'): value
                             for key, value in header.fields.items()})
    for name in ('expert_count', 'attention.sliding_window'):
        if found.found.get(name):
            stop(f'{path}: {name}={found.found[name]!r:.80}: not supported')
    scaling = found.found.get('rope.scaling.type', 'none')
    if scaling != 'none':
        stop(f'{path}: rope.scaling.type={scaling!r:.80}: not supported, only that of Llama 3.1')
    fields: dict = {ours: found.get(theirs, type_, default) for ours, theirs, type_, default
                    in (GPT2_FIELDS if kind == 'gpt2' else LLAMA_FIELDS)}
    if 'token_embd.weight' not in header.tensors:
        stop(f'{path}: has no token_embd.weight')
    fields |= {'vocab_size': header.tensors['token_embd.weight'][0][0],
               'tied': 'output.weight' not in header.tensors,
               'bias': 'blk.0.attn_output.bias' in header.tensors}
    if kind != 'gpt2':
        fields |= dict(norm='rmsnorm', position='rope', mlp='swiglu', qk_norm=kind == 'qwen3',
                       qkv_bias=kind == 'qwen2')
    try:
        config = GPTConfig(**fields)
    except ValueError as e:
        stop(f'{path}: {e}')
    for name in ('attention.value_length', 'rope.dimension_count'):
        if kind != 'gpt2' and found.get(name, int, config.head_dim) != config.head_dim:
            stop(f'{path}: {name}={found.found[name]}: is not head_dim={config.head_dim}')
    return kind, config if ROPE_FACTORS not in header.tensors else scaled(header, config)


def scaled(header: Header, config: GPTConfig) -> GPTConfig:
    """The config with the rope_scaling whose factors are those in the file."""
    factors = header.tensor(ROPE_FACTORS)
    for scaling in LLAMA3:
        config.rope_scaling = scaling
        if torch.allclose(rope_factors(config), factors, rtol=1e-3):
            return config
    return stop(f'{header.path}: {ROPE_FACTORS} are not those of Llama 3.1 or 3.2')


def swapped(p: torch.Tensor, n_head: int, back: bool) -> torch.Tensor:
    """Rows of a query or key matrix, as llama.cpp has them for `llama`: it rotates neighbouring
    channels of a head, where Hugging Face and we pair channel i with i + D / 2."""
    parts = (n_head, -1, 2) if back else (n_head, 2, -1)
    return p.reshape(*parts, *p.shape[1:]).transpose(1, 2).reshape(p.shape)


def heads(name: str, kind: str, config: GPTConfig) -> int:
    """How many heads' rows are in another order in the file; 0: they are as ours."""
    part = name.split('.')[-2] if kind == 'llama' else ''
    return {'q_proj': config.n_head, 'k_proj': config.n_kv_head}.get(part, 0)


@torch.no_grad()
def load(path, device: str = 'cpu') -> tuple[Model, Tokenizer, dict]:
    """Model (fp32, in eval mode) and tokenizer of a file, and its task ('' or 'chat')."""
    header = Header(Path(path))
    kind, config = read_config(header)
    tokenizer = read_tokenizer(header)
    if len(tokenizer) > config.vocab_size:
        stop(f'{path}: has {len(tokenizer):,} tokens, but an embedding for {config.vocab_size:,}')
    if config.n_layer > len(header.tensors) or config.vocab_size >= 1 << 24:
        stop(f'{path}: holds no {config.n_layer:,} layers, or no {config.vocab_size:,} tokens')
    try:
        model, left = build_model(config, None, 'meta'), set(header.tensors) - {ROPE_FACTORS}
    except (RuntimeError, ValueError, OverflowError, MemoryError):
        stop(f'{path}: its sizes, such as embedding_length={config.n_embd:,}, are none of a model')
    for name, p in model.named_parameters():
        key, part = gguf_name(name, kind), hf.third(name, kind)
        expected = list(p.shape) if part is None else [3 * p.size(0), *p.shape[1:]]
        if key not in header.tensors or list(header.tensors[key][0]) != expected:
            stop(f'{path}: {key} should have shape {expected}, but ' + (
                f'has {list(header.tensors[key][0])}' if key in header.tensors else 'is missing'))
        left.discard(key)
    if left:
        stop(f'{path}: holds {min(left)[:80]!r}, which {kind} as we know it does not have')
    allocate(model, device)
    for name, p in model.named_parameters():
        tensor, part = header.tensor(gguf_name(name, kind)), hf.third(name, kind)
        tensor = tensor if part is None else tensor.chunk(3)[part]
        n_head = heads(name, kind, config)
        p.copy_(swapped(tensor, n_head, back=True) if n_head else tensor)
    source = header.fields.get('tokenizer.chat_template', '')
    names = {i: name for name, i in tokenizer.special.items()}
    tokens = {f'{key}_token': names[i] for key in ('bos', 'eos')
              if (i := header.fields.get(f'tokenizer.ggml.{key}_token_id')) in names}
    ends = [i for key in ('eos', 'eot', 'eom')
            if (i := header.fields.get(f'tokenizer.ggml.{key}_token_id')) is not None]
    chats = use_template(path, tokenizer, source, tokens, ends)
    return model.eval(), tokenizer, {'task': 'chat' if chats else ''}


# ---------------------------------------------------------------------------------------------
# Tokenizer

# The patterns that llama.cpp knows, by its names; where there are two, the first is read.
ONE_DIGIT = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERN_OF = {
    'llama-bpe': (PATTERNS['llama3'], CONTRACTIONS + ONE_DIGIT.replace(r'\p{N}|', r'\p{N}{1,3}|')),
    'gpt-2': (PATTERNS['gpt2'],), 'smollm': (EACH_DIGIT,), 'qwen2': (CONTRACTIONS + ONE_DIGIT,)}


def read_tokenizer(header: Header) -> Tokenizer:
    """The tokenizer in a file. Stops, naming the part, at what is not a byte-level BPE or ours."""
    found = {key.removeprefix('tokenizer.ggml.'): v for key, v in header.fields.items()}
    try:
        tokens, kinds = found['tokens'], found['token_type'].tolist()
        if len(tokens) != len(kinds):
            raise ValueError(f'{len(tokens)} tokens with {len(kinds)} types')
        special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds))
                   if kind in (CONTROL, WRITTEN)}
        ordinary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds))
                    if kind == NORMAL}
        if found['model'] == 'rwkv':
            return one_by_one(list(map(unescaped, ordinary)), special)
        pre = found.get('pre', '')
        if found['model'] != 'gpt2' or pre not in PATTERN_OF:
            raise NotSupported(f'its model is {found["model"]!r:.80} with pre={pre!r:.80}; known '
                               f'are gpt2 with {", ".join(PATTERN_OF)}')
        name_of = lambda key: tokens[found[key]] if key in found else ''
        written = [token for token, kind in zip(tokens, kinds) if kind == WRITTEN]
        return make_bpe(PATTERN_OF[pre][0], ordinary, special, found['merges'], True,
                        bos=name_of('bos_token_id'), eos=name_of('eos_token_id'),
                        add_bos=bool(found.get('add_bos_token', False)), written=written)
    except (NotSupported, KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
        return stop(f'{header.path}: its tokenizer cannot be read ({type(e).__name__}: '
                    f'{str(e)[:200]})')


def one_by_one(tokens: list[bytes], special: dict[str, int]) -> Tokenizer:
    """Our character or byte tokenizer. Raises NotSupported for other lists of tokens."""
    if tokens == ByteTokenizer.BYTES:
        tokenizer = ByteTokenizer()
    else:
        chars = [token.decode() for token in tokens]
        if any(len(c) != 1 for c in chars):
            raise NotSupported('its tokens are not single characters')
        tokenizer = CharTokenizer(''.join(chars))
    if tokenizer.special != special:
        raise NotSupported(f'its special tokens {str(special)[:200]} are not {tokenizer.special}')
    return tokenizer


def escaped(token: bytes) -> str:
    """A token as llama.cpp's tokenizer `rwkv` wants it: what is not plain ASCII as \\xNN."""
    return ''.join(chr(b) if 32 < b < 127 and b != 92 else f'\\x{b:02x}' for b in token)


def unescaped(text: str) -> bytes:
    """The inverse of `escaped`."""
    return re.sub(rb'\\x([0-9a-f]{2})', lambda m: bytes([int(m[1], 16)]), text.encode())


def tokenizer_fields(tokenizer: Tokenizer, size: int, end: int) -> dict:
    """The fields `tokenizer.ggml.*` for a model of `size` ids, whose texts or answers end with the
    id `end`."""
    names, bpe = {i: name for name, i in tokenizer.special.items()}, {}
    if isinstance(tokenizer, BPETokenizer):
        pre = next((name for name, known in PATTERN_OF.items() if tokenizer.pattern in known), '')
        if not pre:
            stop('the pattern by which this tokenizer splits text is not among those that '
                 f'llama.cpp has: {tokenizer.pattern[:100]}')
        merges = [' '.join(map(printable, pair)) for pair in merges_of(tokenizer) if pair]
        bpe, spelled = {'pre': pre, 'merges': merges}, printable
    else:
        spelled = escaped
    tokens, kinds = [], []
    for i in range(size):
        if i in names:
            tokens.append(names[i])
            kinds.append(WRITTEN if names[i] in tokenizer.written else CONTROL)
        elif i < len(tokenizer) and tokenizer.tokens[i]:
            tokens.append(spelled(tokenizer.tokens[i]))
            kinds.append(NORMAL)
        else:       # bytes that are no text, so that no text holds this token
            tokens.append(f'[PAD{i}]' if bpe else f'\\xff[PAD{i}]')
            kinds.append(UNUSED)
    return {'model': 'gpt2' if bpe else 'rwkv', **bpe, 'tokens': tokens, 'token_type': kinds,
            'bos_token_id': tokenizer.eos if tokenizer.bos is None else tokenizer.bos,
            'eos_token_id': end, 'add_bos_token': tokenizer.add_bos}


# ---------------------------------------------------------------------------------------------
# Writing


def kind_of(name: str, p: torch.Tensor, dtype: str) -> str:
    """The dtype in which a tensor is written. Vectors and learned positions stay in fp32; where
    blocks have 4 or 5 bits the embedding and the head, which matter most, have 8."""
    if p.ndim < 2 or name.startswith('wpe'):
        return 'f32'
    few = dtype[:2] in ('q4', 'q5')
    return 'q8_0' if few and name in ('wte.weight', 'lm_head.weight') else dtype


def to_gguf(model: GPT, dtype: str) -> dict[str, tuple[np.ndarray, str]]:
    """{name in the file: (fp32 values, dtype)}. Stops if a row cannot be quantized."""
    config, kind, found = model.config, hf.architecture(model.config), {}
    for name, p in hf.parameters_of(model, kind).items():
        as_, key, n_head = kind_of(name, p, dtype), gguf_name(name, kind), heads(name, kind, config)
        if as_.startswith('q') and p.size(-1) % 32:
            stop(f'dtype={dtype}: {name} has rows of {p.size(-1)}, which are not whole blocks of '
                 '32 numbers; take --dtype=f16')
        p = p.float().cpu()
        p = swapped(p, n_head, back=False) if n_head else p
        if key in found:    # q, k and v of GPT-2 come in this order
            p = torch.cat([torch.from_numpy(found[key][0]), p])
        found[key] = p.contiguous().numpy(), as_
    if config.rope_scaling:
        found[ROPE_FACTORS] = rope_factors(config).numpy(), 'f32'
    return found


def save(model: GPT, tokenizer: Tokenizer, path: Path, dtype: str, chat: bool, name: str) -> None:
    """Write a model with its tokenizer, and of a `chat` model its template, as one file."""
    library, config, kind = needed('--to=gguf'), model.config, hf.architecture(model.config)
    writer, types = library.GGUFWriter(path, kind), library.GGMLQuantizationType
    writer.add_name(name)
    writer.add_file_type(library.LlamaFileType[{'f32': 'ALL_F32'}.get(
        dtype, f'MOSTLY_{dtype.upper()}')])
    for ours, theirs, type_, _ in GPT2_FIELDS if kind == 'gpt2' else LLAMA_FIELDS:
        (writer.add_uint32 if type_ is int else writer.add_float32)(
            f'{kind}.{theirs}', getattr(config, ours))
    if kind != 'gpt2':
        for more in ('attention.value_length', 'rope.dimension_count'):
            writer.add_uint32(f'{kind}.{more}', config.head_dim)
    end = tokenizer.special['<|end|>'] if chat and not tokenizer.template else tokenizer.eos
    fields = tokenizer_fields(tokenizer, config.vocab_size, end)
    if chat and tokenizer.template:     # the other ids at which an answer ends
        fields |= zip(('eot_token_id', 'eom_token_id'), sorted(tokenizer.turn_ends() - {end}))
    for key, value in fields.items():
        key = f'tokenizer.ggml.{key}'
        {str: writer.add_string, list: writer.add_array, int: writer.add_uint32,
         bool: writer.add_bool}[type(value)](key, value)
    if chat:
        writer.add_chat_template(template_of(tokenizer))
    for key, (values, as_) in to_gguf(model, dtype).items():
        if as_ == 'f32':
            writer.add_tensor(key, values)
        else:
            writer.add_tensor(key, library.quants.quantize(values, types[as_.upper()]),
                              raw_dtype=types[as_.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
