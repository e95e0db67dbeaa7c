"""core/formats/hf.py and core/text/hf_tokenizer.py: models and tokenizers in and out."""
import http.server
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Quiet, serving, stopped
from safetensors.torch import load_file, save_file
from test_bpe import fuzz, nfc

import plan
from core.formats import hf
from core.formats.hub import COMPLETE, find
from core.net.engine import generate
from core.net.weights import build_model
from core.run import models
from core.settings import Stop
from core.text.hf_tokenizer import merges_of, read_template, read_tokenizer, tokenizer_json
from core.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, printable
from model import GPTConfig

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')
ROOT = Path(__file__).parents[2]
VOCAB = 704     # more than the tokenizer's 600: padded, as trained models are

# In a context of 32 positions some frequencies of 32 channels turn more than 4 times, some not
# once. Version 4 knows the first spelling only, version 5 both.
SCALING = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
           'original_max_position_embeddings': 32}
LLAMA3_ROPE = dict(rope_scaling=SCALING, rope_theta=500.0) if transformers.__version__ < '5' else \
    dict(rope_parameters={**SCALING, 'rope_theta': 500.0})

THEIRS = {
    'gpt2': lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=3, n_positions=128),
    'gpt2 untied': lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=3, n_positions=128, n_inner=100,
        tie_word_embeddings=False),
    'llama 2': lambda: transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128),
    'llama 3': lambda: transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        rope_theta=500000.0, rms_norm_eps=1e-5),
    'llama 3.2': lambda: transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        tie_word_embeddings=True, **LLAMA3_ROPE),
    'llama tied': lambda: transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=128, attention_bias=True, mlp_bias=True),
    'qwen2': lambda: transformers.Qwen2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True),
    'qwen3': lambda: transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128,
        tie_word_embeddings=True, rope_theta=1e6),
    'qwen3 untied': lambda: transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False)}
OURS = {
    'qwen3': dict(norm='rmsnorm', position='rope', mlp='swiglu', qk_norm=True, bias=False,
                  tied=False, n_kv_head=2, norm_eps=1e-6, head_dim=16),
    'llama': dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=False, rope_theta=3e5),
    'llama 3.2': dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=False, n_kv_head=1,
                      n_head=2, rope_theta=500.0, rope_scaling='8,1,4,32'),
    'qwen2': dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=False, qkv_bias=True,
                  n_kv_head=2, tied=False),
    'llama with biases': dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=True),
    'gpt2': {}, 'gpt2 without biases': dict(bias=False), 'gpt2 untied': dict(tied=False)}


@pytest.fixture(scope='module')
def tokenizer():
    text = Path(os.__file__).read_text(encoding='utf-8')
    return BPETokenizer.train([text], 600)


def randomize(model):
    """Weights far from their initial ones, norms and biases included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope='module')
def their_folders(tokenizer, tmp_path_factory):
    """name -> (their model, its folder) for each of THEIRS."""
    found = {}
    for name, config in THEIRS.items():
        model = randomize(transformers.AutoModelForCausalLM.from_config(config()))
        folder = tmp_path_factory.mktemp('theirs') / name
        model.save_pretrained(folder)
        (folder / 'tokenizer.json').write_text(json.dumps(tokenizer_json(tokenizer)))
        (folder / 'tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>"}')
        found[name] = model, folder
    return found


def our_model(name: str, **changes):
    return randomize(build_model(GPTConfig(**{
        'block_size': 128, 'vocab_size': VOCAB, 'n_layer': 2, 'n_head': 4, 'n_embd': 64,
        **OURS[name], **changes})))


@pytest.fixture
def folder(their_folders, tmp_path):
    """A copy of a Qwen3 folder, to be damaged."""
    shutil.copytree(their_folders['qwen3'][1], tmp_path / 'copy')
    return tmp_path / 'copy'


@torch.no_grad()
def difference(ours, theirs) -> float:
    ids = torch.randint(600, (2, 100), generator=torch.Generator().manual_seed(1))
    return (ours(ids) - theirs(ids).logits).abs().max().item()


# ---------------------------------------------------------------------------------------------
# Theirs in, ours out


@pytest.mark.parametrize('name', THEIRS)
def test_theirs_loaded(their_folders, tokenizer, name):
    theirs, folder = their_folders[name]
    ours, found, _ = hf.load(folder)
    assert difference(ours, theirs) <= 1e-4
    assert found.hash() == tokenizer.hash() and ours.config.vocab_size == VOCAB
    ids = torch.tensor([tokenizer.encode('def main(')])
    with torch.no_grad():   # and not because all logits are alike
        assert theirs(ids).logits.std() > 0.3


@pytest.mark.parametrize('sharded', [False, True], ids=['one file', 'shards'])
@pytest.mark.parametrize('name', OURS)
def test_ours_exported(tokenizer, tmp_path, name, sharded):
    ours, folder = our_model(name), tmp_path / 'exported'
    hf.save(ours, tokenizer, folder, shard_bytes=50_000 if sharded else 10 ** 9)
    assert len(list(folder.glob('*.safetensors'))) > 3 if sharded else \
        not (folder / hf.INDEX).exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.dtype == torch.float32 and type(theirs).__module__.startswith('transformers.')
    assert difference(ours, theirs) <= 1e-4
    texts = fuzz(300, seed=3)
    ids = [again(text, split_special_tokens=True).input_ids for text in texts]
    assert ids == [*map(tokenizer.encode, nfc(texts))] and again.eos_token_id == tokenizer.eos
    assert [again.decode(i) for i in ids] == nfc(texts)
    same_greedy_text(ours, theirs, tokenizer.encode('import sys\n'))


@torch.no_grad()
def same_greedy_text(ours, theirs, prompt: list[int]) -> None:
    """100 tokens are equal, up to the first whose two best logits are within 1e-3."""
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=100, do_sample=False,
                               eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
    found = [row[0] for row in generate(ours, [prompt], 100, temperature=0)]
    assert len(found) == len(expected) == 100
    for i, (a, b) in enumerate(zip(found, expected)):
        if a != b:
            best = theirs(torch.tensor([prompt + expected[:i]])).logits[0, -1].topk(2).values
            assert best[0] - best[1] <= 1e-3
            return


@pytest.mark.parametrize('name', OURS)
def test_round_trip_is_bitwise(tokenizer, tmp_path, name):
    ours = our_model(name)
    hf.save(ours, tokenizer, tmp_path / 'a', shard_bytes=100_000)
    again, found, _ = hf.load(tmp_path / 'a')
    known = dict(again.named_parameters())
    for key, p in ours.named_parameters():
        assert torch.equal(known.pop(key), p), key
    assert all(key.endswith('bias') and not p.any() for key, p in known.items())
    assert bool(known) == (name == 'gpt2 without biases')
    assert found.to_json() == tokenizer.to_json()
    hf.save(again, found, tmp_path / 'b')
    assert set(hf.to_hf(ours)) == set(load_file(tmp_path / 'b' / hf.WEIGHTS))


def test_weights_in_bfloat16(tokenizer, tmp_path):
    ours = our_model('qwen3')
    hf.save(ours, tokenizer, tmp_path / 'half', 'bfloat16')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'half', dtype='auto')
    assert theirs.dtype == torch.bfloat16
    again, _, _ = hf.load(tmp_path / 'half')
    assert all(torch.equal(p.bfloat16().float(), q) for p, q in
               zip(ours.parameters(), again.parameters()))
    assert difference(again, theirs.float()) <= 1e-4


def test_old_gpt2_files(their_folders, tmp_path):
    """openai-community/gpt2: no prefix, masks among the weights, tokens in config.json only."""
    theirs, folder = their_folders['gpt2']
    shutil.copytree(folder, tmp_path / 'old')
    tensors = {key.removeprefix('transformer.'): p
               for key, p in load_file(folder / hf.WEIGHTS).items()}
    tensors |= {'h.0.attn.bias': torch.ones(1, 1, 128, 128).tril(),
                'h.0.attn.masked_bias': torch.tensor(-1e4)}
    save_file(tensors, tmp_path / 'old' / hf.WEIGHTS)
    ours, _, _ = hf.load(tmp_path / 'old')
    assert difference(ours, theirs) <= 1e-4


def test_legacy_configs(folder, their_folders):
    """rope_theta at the top level only, as transformers 4 wrote it; rope_scaling null."""
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    theta = config.pop('rope_parameters')['rope_theta']
    path.write_text(json.dumps(config | {'rope_theta': theta, 'rope_scaling': None}))
    assert hf.read_config(folder).rope_theta == 1e6
    assert difference(hf.load(folder)[0], their_folders['qwen3'][0]) <= 1e-4


def test_llama3_rope_in_full(folder):
    """All digits, and the fields where transformers looks for them."""
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    rope = {'rope_type': 'llama3', 'factor': 1.2345678, 'low_freq_factor': 1,
            'high_freq_factor': 4.0, 'rope_theta': 1e6}
    path.write_text(json.dumps(config | {'rope_parameters': rope}))
    assert hf.read_config(folder).rope_scaling == '1.2345678,1,4,128'
    path.write_text(json.dumps(config | {'original_max_position_embeddings': 1234567,
                                         'rope_parameters': rope}))
    assert hf.read_config(folder).rope_scaling == '1.2345678,1,4,1234567'


def test_chat_template(tokenizer, tmp_path):
    hf.save(our_model('qwen3'), tokenizer, tmp_path / 'chat', chat=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'chat')
    chat = [{'role': 'system', 'content': 'Be brief.\n'}, {'role': 'user', 'content': ' {{x}} é '},
            {'role': 'assistant', 'content': ''}, {'role': 'user', 'content': "'<b>'"}]
    for reply in (False, True):
        found = theirs.apply_chat_template(chat, add_generation_prompt=reply)
        assert getattr(found, 'input_ids', found) == tokenizer.encode_chat(chat, reply)


def test_every_preset_can_be_exported(tokenizer, tmp_path):
    """All but the LSTM's: config.json says what the preset's model is."""
    presets = sorted((ROOT / 'config').glob('*.py'))
    assert len(presets) > 15
    for path in presets:
        config = plan.preset_config(plan.load_preset([str(path)]))
        if config.arch == 'lstm':
            continue
        text = json.dumps(hf.config_json(config, tokenizer, 'float32'))
        (tmp_path / 'config.json').write_text(text)
        config.dropout = 0.0
        assert hf.read_config(tmp_path) == config


@pytest.mark.parametrize('changes, message', [
    (dict(arch='lstm'), 'arch=lstm'), (dict(norm='layernorm', position='rope'), 'position=rope'),
    (dict(norm='layernorm', mlp='relu2'), 'mlp=relu2'), (dict(window=16), 'window=16'),
    (dict(norm='rmsnorm', mlp='swiglu', position='none'), 'position=none'),
    (dict(norm='rmsnorm', mlp='swiglu', position='rope', qk_norm=True, bias=True), 'bias=True'),
    (dict(norm='layernorm', n_kv_head=2), 'n_kv_head=2')])
def test_what_no_architecture_has(capsys, changes, message):
    config = GPTConfig(n_head=4, n_embd=64, **changes)
    assert stopped(capsys, lambda: hf.architecture(config)).startswith(message)


# ---------------------------------------------------------------------------------------------
# Tokenizers of others


@pytest.mark.parametrize('name', ['GPT2Tokenizer', 'Qwen2Tokenizer'])
def test_their_tokenizers(tokenizer, tmp_path, name):
    """Files that transformers writes itself, with GPT-2's and Qwen's ways of splitting text."""
    vocab = {printable(t): i for i, t in enumerate(tokenizer.ordinary)}
    merges = [(printable(a), printable(b)) for a, b in merges_of(tokenizer)]
    theirs = getattr(transformers, name)(vocab=vocab, merges=merges)
    theirs.save_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path / 'tokenizer.json')
    texts = fuzz(3000, seed=4)
    ids = [theirs(text, split_special_tokens=True).input_ids for text in texts]
    assert [(text, i) for text, i in zip(texts, ids) if ours.encode(text) != i][:3] == []
    assert ours.eos == theirs.eos_token_id and ours.bos == theirs.bos_token_id
    assert not ours.add_bos


def test_special_tokens_in_front_and_single_digits(tokenizer, tmp_path):
    """As SmolLM's: ids 0 to 4 are special, digits are split off one by one, then GPT-2's way."""
    found = tokenizer_json(tokenizer)
    n = len(tokenizer.ordinary)
    found['model']['vocab'] = {token: (i + 5) % (n + 5)
                               for token, i in found['model']['vocab'].items()}
    for token in found['added_tokens']:
        token['id'] -= n
    found['pre_tokenizer']['pretokenizers'] = [
        {'type': 'Digits', 'individual_digits': True},
        {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(found))
    ours = read_tokenizer(tmp_path / 'tokenizer.json')
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    texts = fuzz(5000, seed=8) + ['a  1 b', '  12', 'x\n\n3', ' \t4 ', "5's 6'll", 'é７ ٣٣ ½']
    assert [*map(ours.encode, nfc(texts))] == [theirs(text, split_special_tokens=True).input_ids
                                             for text in texts]
    assert ours.eos == 0 and ours.decode(ours.encode(texts[0])) == texts[0]
    hf.save(our_model('llama'), ours, tmp_path / 'again')
    assert read_tokenizer(tmp_path / 'again' / 'tokenizer.json').to_json() == ours.to_json()


def test_a_split_that_removes_what_does_not_match(tokenizer, tmp_path, capsys):
    """As GPT-4o's: the same as one that keeps everything, if all is matched; else it is refused."""
    found, path = tokenizer_json(tokenizer), tmp_path / 'tokenizer.json'
    split = found['pre_tokenizer']['pretokenizers'][0]
    split |= {'behavior': 'Removed', 'invert': True}
    path.write_text(json.dumps(found))
    ours = read_tokenizer(path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in nfc(fuzz(1000, seed=9)):
        assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids
    split['pattern'] = {'Regex': r'\p{L}+'}
    path.write_text(json.dumps(found))
    assert 'leaves out parts' in stopped(capsys, lambda: read_tokenizer(path))
    split |= {'behavior': 'Removed', 'invert': False}
    path.write_text(json.dumps(found))
    assert 'pre_tokenizer' in stopped(capsys, lambda: read_tokenizer(path))


def test_added_tokens_that_text_may_spell(tokenizer, tmp_path):
    """As Qwen3's <think>: not special, so Hugging Face takes them from any text; and NFC."""
    vocab = {printable(t): i for i, t in enumerate(tokenizer.ordinary)}
    merges = [(printable(a), printable(b)) for a, b in merges_of(tokenizer)]
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    theirs.add_tokens(['<think>', '</think>'])
    theirs.save_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path / 'tokenizer.json')
    for text in ('a <think> b</think>', '<think><think>', 'e\u0301 <thin <|endoftext|>'):
        assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids, text
    hf.save(our_model('qwen3'), ours, tmp_path / 'again')
    assert read_tokenizer(tmp_path / 'again' / 'tokenizer.json').to_json() == ours.to_json()


def test_a_template_says_what_comes_first(tokenizer, tmp_path):
    """Whatever tokenizer_config.json calls bos."""
    found = tokenizer_json(tokenizer)
    found['post_processor'] = {'type': 'Sequence', 'processors': [{'type': 'ByteLevel'}, {
        'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': '<|user|>'}},
                                                 {'Sequence': {'id': 'A'}}]}]}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(found))
    ours = read_tokenizer(tmp_path / 'tokenizer.json')
    assert ours.prompt('x') == [tokenizer.special['<|user|>'], *tokenizer.encode('x')]


def test_tokens_that_only_a_whole_piece_can_be(tokenizer, tmp_path, capsys):
    """With ignore_merges, as in Llama 3, a token needs no merge that makes it."""
    found, n = tokenizer_json(tokenizer), len(tokenizer.ordinary)
    for i in range(n, n + 5):
        name = next(name for name, j in tokenizer.special.items() if j == i)
        found['model']['vocab'][name] = i + 1
    found['model']['vocab']['Ġqzqzq'] = n
    for token in found['added_tokens']:
        token['id'] += 1
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps(found))
    assert 'not made by merging' in stopped(capsys, lambda: read_tokenizer(path))
    found['model']['ignore_merges'] = True
    path.write_text(json.dumps(found))
    ours = read_tokenizer(path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in (' qzqzq', ' qzqzq qzqzqz', 'qzqzq', *fuzz(300, seed=6)):
        assert ours.encode(*nfc([text])) == theirs(text, split_special_tokens=True).input_ids
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'tokenizer.json').write_text(json.dumps(tokenizer_json(ours)))
    assert read_tokenizer(tmp_path / 'b' / 'tokenizer.json').to_json() == ours.to_json()


def test_bos_in_front(tokenizer, tmp_path):
    """As Llama 3: a template that puts a token before every text; it survives a round trip."""
    ours = BPETokenizer(tokenizer.pattern,
                        [printable(t) for t in tokenizer.ordinary],
                        {'<|begin|>': 700, '<|end_of_text|>': 701}, bos='<|begin|>',
                        eos='<|end_of_text|>', add_bos=True)
    ours.corpus_normalize = ''
    assert ours.prompt('x') == [700, *ours.encode('x')] and ours.prompt('') == [700]
    hf.save(our_model('llama'), ours, tmp_path / 'bos')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'bos')
    assert theirs('x').input_ids == ours.prompt('x') and theirs.bos_token_id == 700
    chats = ours.with_chat()
    hf.save(our_model('llama', vocab_size=len(chats)), chats, tmp_path / 'chat', chat=True)
    assert read_template(tmp_path / 'chat', chats) and not chats.template
    assert not read_template(tmp_path / 'bos', ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'chat')
    chat = [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}]
    found = theirs.apply_chat_template(chat)
    ids = chats.encode_chat(chat)
    assert getattr(found, 'input_ids', found) == ids and ids.count(700) == 1 and ids[0] == 700
    assert read_tokenizer(tmp_path / 'bos' / 'tokenizer.json').to_json() == ours.to_json()


@pytest.mark.parametrize('make', [lambda: CharTokenizer.train('añb\n 漢'), ByteTokenizer])
def test_char_and_byte_tokenizers_come_back(tmp_path, make):
    (tmp_path / 'tokenizer.json').write_text(json.dumps(tokenizer_json(make())))
    assert read_tokenizer(tmp_path / 'tokenizer.json').to_json() == make().to_json()


def deep(levels: int) -> str:
    return '[' * levels + ']' * levels


@pytest.mark.parametrize('text', [
    '', '{', '[]', 'null', '{}', '{"model": 5}', '{"model": {"type": "BPE"}}', deep(100_000),
    '{"model": ' + deep(100_000) + '}', '{"model": {"type": "BPE", "vocab": [], "merges": []}}'])
def test_malformed_tokenizer(capsys, folder, text):
    path = folder / 'tokenizer.json'
    path.write_text(text)
    assert stopped(capsys, lambda: hf.load(folder)).startswith(f'{path}: ')


@pytest.mark.parametrize('edit, message', [
    (lambda t: t['model'].update(type='WordPiece'), "its model is 'WordPiece'"),
    (lambda t: t['model'].update(type='Unigram'), "its model is 'Unigram'"),
    (lambda t: t['model'].update(byte_fallback=True), 'byte_fallback=True'),
    (lambda t: t.update(normalizer={'type': 'Lowercase'}), "its normalizer is 'Lowercase'"),
    (lambda t: t.update(pre_tokenizer={'type': 'Metaspace'}), 'its pre_tokenizer is'),
    (lambda t: t['pre_tokenizer']['pretokenizers'][1].update(add_prefix_space=True),
     'its pre_tokenizer is'),
    (lambda t: t['pre_tokenizer']['pretokenizers'][0].update(behavior='Removed'),
     'its pre_tokenizer is'),
    (lambda t: t['pre_tokenizer']['pretokenizers'][0]['pattern'].update(Regex='('),
     'not a tokenizer that can be read (ValueError'),
    (lambda t: t['pre_tokenizer']['pretokenizers'][0]['pattern'].update(Regex=r'\p{L}+'),
     'its pattern leaves out parts'),
    (lambda t: t['pre_tokenizer']['pretokenizers'][0]['pattern'].update(
        Regex=r'\p{L}+|\p{N}+|[\p{P}\p{S}]+|\s+'), 'its pattern leaves out parts'),
    (lambda t: t['pre_tokenizer']['pretokenizers'][0]['pattern'].update(Regex=r'[\s\S]'),
     'its pre_tokenizer is'),
    (lambda t: t['pre_tokenizer']['pretokenizers'][0]['pattern'].update(Regex=''),
     'its pre_tokenizer is'),
    (lambda t: t['pre_tokenizer']['pretokenizers'].pop(0), 'no pattern'),
    (lambda t: t['model'].update(dropout=0.5), 'dropout=0.5'),
    (lambda t: t['model'].update(end_of_word_suffix='</w>'), 'end_of_word_suffix'),
    (lambda t: t['model'].update(continuing_subword_prefix='##'), 'continuing_subword_prefix'),
    (lambda t: t['added_tokens'][0].update(special=False, lstrip=True), 'what is around it'),
    (lambda t: t.update(post_processor={'type': 'TemplateProcessing', 'single': [
        {'Sequence': {'id': 'A'}}, {'SpecialToken': {'id': '<|end|>'}}]}), 'its post_processor is'),
    (lambda t: t.update(post_processor={'type': 'BertProcessing'}), 'its post_processor is'),
    (lambda t: t.update(added_tokens=[]), 'no special token'),
    (lambda t: t['added_tokens'].append({'content': '<x>', 'id': 1 << 40}), 'ValueError'),
    (lambda t: t['added_tokens'].append({'content': '<x>', 'id': 3}), 'ValueError'),
    (lambda t: t['model']['vocab'].update(zzzz=5000), 'not one after another'),
    (lambda t: t['model']['merges'].reverse(), 'not in the order of the ids'),
    (lambda t: t['model']['merges'].pop(), 'is not made by merging'),
    (lambda t: t['model']['merges'].append('a b c'), 'ValueError'),
    (lambda t: t['model']['merges'].append('q zzzz'), 'KeyError'),
    (lambda t: t['model']['merges'].append(7), 'TypeError'),
    (lambda t: t['model'].update(vocab=dict.fromkeys(t['model']['vocab'], 'a')), 'TypeError'),
    (lambda t: t['model'].update(vocab=dict.fromkeys(t['model']['vocab'], 7)), 'not one after'),
    (lambda t: t['model']['vocab'].update({'a' * 20_000: len(t['model']['vocab']) - 5}),
     'too long')])
def test_tokenizers_that_are_refused(capsys, folder, tokenizer, edit, message):
    found = tokenizer_json(tokenizer)
    edit(found)
    path = folder / 'tokenizer.json'
    path.write_text(json.dumps(found))
    text = stopped(capsys, lambda: hf.load(folder))
    assert text.startswith(f'{path}: ') and message in text and len(text) < 1000


def test_huge_tokenizer(capsys, folder, tokenizer):
    """10 million merges: refused by the size of the file, before it is parsed."""
    path = folder / 'tokenizer.json'
    found = tokenizer_json(tokenizer)
    found['model']['merges'] = ['a b'] * 10_000_000
    path.write_text(json.dumps(found))
    assert 'too large' in stopped(capsys, lambda: hf.load(folder))


# ---------------------------------------------------------------------------------------------
# Folders that are refused


@pytest.mark.parametrize('change, message', [
    (dict(model_type='mistral'), "model_type='mistral': only gpt2, llama, qwen2, qwen3"),
    (dict(model_type=None), 'model_type is missing'), (dict(model_type=7), 'model_type=7'),
    (dict(hidden_size='64'), 'hidden_size'), (dict(hidden_size=None), 'hidden_size is missing'),
    (dict(hidden_size=-64), 'hidden_size'), (dict(hidden_size=1 << 60), 'hidden_size'),
    (dict(num_hidden_layers=10 ** 9), 'num_hidden_layers=1000000000'),
    (dict(num_hidden_layers=3), 'model.layers.2'), (dict(num_hidden_layers=1), 'model.layers.1'),
    (dict(num_hidden_layers=0), 'n_layer=0'), (dict(num_attention_heads=0), 'n_head=0'),
    (dict(num_key_value_heads=3), 'n_kv_head=3'), (dict(head_dim=64), 'has shape'),
    (dict(intermediate_size=97), 'has shape [96, 64], config.json asks for [97, 64]'),
    (dict(vocab_size=100_000), 'has shape'), (dict(tie_word_embeddings=False), 'lack lm_head'),
    (dict(tie_word_embeddings='yes'), 'tie_word_embeddings'),
    (dict(hidden_act='gelu'), "hidden_act='gelu': not supported"),
    (dict(use_sliding_window=True), 'use_sliding_window=True'),
    (dict(attention_bias=True), 'attention_bias=True'),
    (dict(rope_parameters={'rope_type': 'yarn', 'factor': 4.0}), "RoPE scaling 'yarn'"),
    (dict(rope_parameters={'rope_type': 'llama3', 'rope_theta': 5e5}), 'factor is missing'),
    (dict(rope_parameters={'rope_type': 'llama3', 'factor': 8, 'low_freq_factor': 4,
                           'high_freq_factor': 4, 'original_max_position_embeddings': 32}),
     'rope_scaling=8,4,4,32'),
    (dict(rope_parameters=None, rope_scaling={'type': 'linear', 'factor': 2}), "'linear'"),
    (dict(rope_parameters={'rope_type': 'default'}, rope_scaling={'rope_type': 'linear'}),
     "'linear'"),
    (dict(num_hidden_layers=99), '99 layers'),
    (dict(quantization_config={'bits': 4}), "{'bits': 4}"),
    (dict(rms_norm_eps=float('nan')), 'rms_norm_eps=nan'), (dict(rms_norm_eps=-1), 'rms_norm_eps'),
    (dict(rope_parameters={'rope_theta': 0}), 'rope_theta=0'),
    (dict(rope_parameters={'rope_theta': 10 ** 400}), 'rope_theta=1000'),
    (dict(hidden_act='a\nerror: b'), "hidden_act='a\\nerror: b'"),
    (dict(rope_parameters=[]), 'rope_parameters'), (dict(rms_norm_eps='small'), 'rms_norm_eps'),
    (dict(model_type='llama'), 'self_attn.k_norm')])
def test_config_that_does_not_fit(capsys, folder, change, message):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in stopped(capsys, lambda: hf.load(folder))


@pytest.mark.parametrize('change', [
    dict(activation_function='relu'), dict(scale_attn_by_inverse_layer_idx=True),
    dict(add_cross_attention=True), dict(scale_attn_weights=False)])
def test_gpt2_variants(capsys, their_folders, tmp_path, change):
    shutil.copytree(their_folders['gpt2'][1], tmp_path / 'g')
    path = tmp_path / 'g' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = stopped(capsys, lambda: hf.load(tmp_path / 'g'))
    assert message.startswith(f'{path}: {next(iter(change))}=') and 'not supported' in message


@pytest.mark.parametrize('times', [80, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json'])
def test_mutated_files(folder, capsys, name, times):
    """A field of each is replaced, many times: refused in one line, or harmless."""
    path, r = folder / name, random.Random(0)
    whole = path.read_text()
    values = [None, True, -1, 0, 3, 10 ** 9, 10 ** 400, 0.5, 1e300, '', 'x', '\n', [], ['a'], {},
              {'type': 'x'}, deep(50)]
    refused = 0
    for _ in range(times):
        found = json.loads(whole)
        part, key = found, r.choice(list(found))
        while isinstance(part[key], (dict, list)) and part[key] and r.random() < 0.8:
            part = part[key]
            key = r.choice(list(part)) if isinstance(part, dict) else r.randrange(len(part))
        if r.random() < 0.2:
            del part[key]
        else:
            part[key] = r.choice(values)
        path.write_text(json.dumps(found))
        try:
            hf.load(folder)
        except Stop as e:
            refused += 1
            assert e.code == 2 and '\n' not in e.message and len(e.message) < 1000
    assert times / 6 < refused < times


@pytest.mark.parametrize('text', ['', '{', '[]', '5', deep(100_000), '\xff'])
def test_malformed_config(capsys, folder, text):
    (folder / 'config.json').write_bytes(text.encode('latin-1'))
    message = stopped(capsys, lambda: hf.load(folder))
    assert message.startswith(f'{folder}/config.json: cannot be read as JSON')


def rewrite(folder: Path, edit) -> None:
    tensors = load_file(folder / hf.WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / hf.WEIGHTS)


@pytest.mark.parametrize('edit, message', [
    (lambda t: t.update({'lm_head.weight': torch.ones(VOCAB, 64)}), 'is not its embedding'),
    (lambda t: t.update({'model.norm.weight': torch.ones(64, dtype=torch.int8)}), 'dtype I8'),
    (lambda t: t.pop('model.norm.weight'), 'lack model.norm.weight'),
    (lambda t: t.update({'model.norm.weight': torch.ones(65)}), 'has shape [65]'),
    (lambda t: t.update({'model.norm.weight': torch.ones(8, 8)}), 'has shape [8, 8]'),
    (lambda t: t.update({'adapter.weight': torch.ones(2)}), "hold 'adapter.weight'")])
def test_tensors_that_do_not_fit(capsys, folder, edit, message):
    rewrite(folder, edit)
    assert message in stopped(capsys, lambda: hf.load(folder))


def damaged_weights(folder: Path, how: str) -> None:
    path = folder / hf.WEIGHTS
    data = path.read_bytes()
    path.write_bytes({'truncated': data[:-100], 'cut in the header': data[:50], 'empty': b'',
                      'no safetensors': b'PK\x03\x04' + data,
                      'a huge header': struct.pack('<Q', 1 << 60) + data[8:],
                      'a hostile header': struct.pack('<Q', 90_000) + b'[' * 90_000}[how])


@pytest.mark.parametrize('how', ['truncated', 'cut in the header', 'empty', 'no safetensors',
                                 'a huge header', 'a hostile header'])
def test_damaged_weights(capsys, folder, how):
    damaged_weights(folder, how)
    message = stopped(capsys, lambda: hf.load(folder))
    assert message.startswith(f'{folder}/{hf.WEIGHTS}: cannot be read as safetensors')


def test_shards(capsys, tokenizer, tmp_path):
    folder = tmp_path / 'm'
    hf.save(our_model('qwen3'), tokenizer, folder, shard_bytes=50_000)
    index = json.loads((folder / hf.INDEX).read_text())
    first = folder / sorted(set(index['weight_map'].values()))[0]
    data = first.read_bytes()
    first.write_bytes(data[:-10])
    assert stopped(capsys, lambda: hf.load(folder)).startswith(f'{first}: cannot be read')
    first.unlink()
    assert stopped(capsys, lambda: hf.load(folder)).startswith(f'{first}: missing')
    first.write_bytes(data)
    for bad in ({}, [], {'a': 5}, {'a': '../x.safetensors'}, {'a': '/etc/x.safetensors'},
                {'a': 'x.bin'}):
        (folder / hf.INDEX).write_text(json.dumps({'weight_map': bad}))
        assert 'weight_map' in stopped(capsys, lambda: hf.load(folder))


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'consolidated.00.pth', 'model.pt'])
def test_pickles_are_refused(capsys, folder, name):
    (folder / hf.WEIGHTS).rename(folder / name)
    message = stopped(capsys, lambda: hf.load(folder))
    assert name in message and 'never loaded' in message and 'save_pretrained' in message


def test_tokenizer_larger_than_the_model(capsys, folder, tokenizer):
    names = {f'<{i}>': 600 + i for i in range(200)}
    found = tokenizer_json(tokenizer)
    found['added_tokens'] += [{'content': name, 'id': i} for name, i in names.items()]
    (folder / 'tokenizer.json').write_text(json.dumps(found))
    assert 'has 800 tokens' in stopped(capsys, lambda: hf.load(folder))


# ---------------------------------------------------------------------------------------------
# Names


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that answers as the hub does, from tmp_path/hub; its list of requests."""
    asked = []

    class Handler(Quiet, http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get('Authorization')))
            path = tmp_path / 'hub' / self.path[1:].replace('/resolve/main/', '/')
            found = path.is_file()
            body = path.read_bytes() if found else b'Entry not found'
            self.send_response(200 if found else 404)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Handler) as server:
        monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
        monkeypatch.delenv('DATA_MIRROR', raising=False)
        monkeypatch.chdir(tmp_path)
        yield asked


def test_from_the_hub(hub, tokenizer, tmp_path, monkeypatch):
    ours = our_model('qwen3')
    (tmp_path / 'hub' / 'org').mkdir(parents=True)
    hf.save(ours, tokenizer, tmp_path / 'hub' / 'org' / 'small', shard_bytes=100_000)
    monkeypatch.setenv('HF_TOKEN', 'secret')
    model, found, state = models.load_run('org/small')
    assert all(map(torch.equal, model.parameters(), ours.parameters()))
    assert found.hash() == tokenizer.hash() and state['step'] == 0
    assert all(token == 'Bearer secret' for _, token in hub) and len(hub) > 6
    hub.clear()
    models.load_run('org/small')
    assert hub == []                                    # all of it is there
    assert not list(Path('data/downloads').rglob('*.part'))
    (tmp_path / 'data' / 'downloads' / 'org' / 'small' / COMPLETE).unlink()
    (tmp_path / 'data' / 'downloads' / 'org' / 'small' / hf.INDEX).unlink()
    models.load_run('org/small')                    # interrupted: the rest is fetched


def test_gpt2_by_name(hub, their_folders, tmp_path):
    (tmp_path / 'hub' / 'openai-community').mkdir(parents=True)
    shutil.copytree(their_folders['gpt2'][1], tmp_path / 'hub' / 'openai-community' / 'gpt2')
    assert difference(models.load_run('gpt2')[0], their_folders['gpt2'][0]) <= 1e-4
    assert models.load_tokenizer('gpt2').eos == 595


def test_two_at_once(hub, tokenizer, tmp_path):
    """Processes that want the same model wait for one another."""
    (tmp_path / 'hub' / 'org').mkdir(parents=True)
    hf.save(our_model('qwen3'), tokenizer, tmp_path / 'hub' / 'org' / 'small', shard_bytes=50_000)
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); from core.run import models; ' \
        'models.load_run("org/small")'
    processes = [subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    asked = [path for path, _ in hub if path.endswith('.safetensors')]
    assert len(asked) == len(set(asked)) > 3


def test_gpt2_in_the_mirror_by_its_full_name(hub, folder, tmp_path, monkeypatch):
    mirror = tmp_path / 'mirror' / 'openai-community'
    mirror.mkdir(parents=True)
    folder.rename(mirror / 'gpt2')
    monkeypatch.setenv('DATA_MIRROR', str(mirror.parent))
    assert find('gpt2') == mirror / 'gpt2' and hub == []


def test_from_the_mirror(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setenv('DATA_MIRROR', str(folder.parent))
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert find('copy') == folder and hub == []
    assert models.find_model('copy') == folder


def test_names_that_lead_nowhere(capsys, hub, folder, tmp_path, monkeypatch):
    message = stopped(capsys, lambda: models.find_model('org/none'))
    assert 'org/none' in message and '404' in message
    shutil.copytree(folder, tmp_path / 'hub' / 'org' / 'pickled')
    (tmp_path / 'hub' / 'org' / 'pickled' / hf.WEIGHTS).rename(
        tmp_path / 'hub' / 'org' / 'pickled' / 'pytorch_model.bin')
    capsys.readouterr()
    with pytest.raises(SystemExit):
        models.find_model('org/pickled')
    assert 'pickle' in capsys.readouterr().err
    hub.clear()
    (tmp_path / 'runs').mkdir()
    for name in ('nowhere', 'out/nowhere', 'runs/none', '../x', 'a/b/c', '/none', 'http://x/y',
                 'a' * 300):
        message = stopped(capsys, lambda name=name: models.find_model(name))
        assert message.startswith(f'run_dir={name:.80}: ')
    assert hub == []                                    # a slip of the pen asks nobody
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('core.read.download.time.sleep', lambda s: None)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        models.find_model('org/other')
    assert 'DATA_MIRROR' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# transformers 4

OLD = ('transformers==4.57.6', 'tokenizers==0.22.2', 'huggingface_hub==0.36.0')


@pytest.mark.slow
def test_transformers_4(tmp_path):
    """The tests above with transformers 4, in an environment of its own."""
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target',
                    tmp_path / 'old', *OLD], check=True)
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__, '-k',
         'theirs_loaded or ours_exported or bfloat16 or chat_template or bos_in_front'],
        env={**os.environ, 'PYTHONPATH': str(tmp_path / 'old')}, cwd=ROOT, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    version = subprocess.run([sys.executable, '-c', 'import transformers as t; '
                              'print(t.__version__)'], capture_output=True, text=True, check=True,
                             env={**os.environ, 'PYTHONPATH': str(tmp_path / 'old')}).stdout
    assert version.strip() == '4.57.6'
