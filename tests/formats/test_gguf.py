"""core/formats/gguf.py and export.py --to=gguf: files for llama.cpp and Ollama, and back."""
import functools
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import stopped

import export
from core.formats import gguf
from core.net.weights import build_model
from core.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from model import GPTConfig

library = pytest.importorskip('gguf')
SMALL = dict(block_size=256, n_layer=2, n_head=4, n_embd=64, n_hidden=96)
LLAMA = dict(SMALL, norm='rmsnorm', position='rope', mlp='swiglu', bias=False)
MODELS = {
    'gpt2': dict(SMALL, tied=True), 'gpt2 untied, no biases': dict(SMALL, tied=False, bias=False),
    'llama': dict(LLAMA, tied=False), 'llama tied, grouped': dict(LLAMA, n_kv_head=2, tied=True),
    'llama with biases': dict(LLAMA, bias=True, tied=False),
    'llama 3.2': dict(LLAMA, head_dim=32, rope_theta=500000.0, rope_scaling='32,1,4,8192'),
    'qwen2': dict(LLAMA, qkv_bias=True, n_kv_head=2, tied=False),
    'qwen3': dict(LLAMA, qk_norm=True, head_dim=32, n_kv_head=1, tied=True)}
TEXT = "It's 12,345 words: the cat\n\tsat on naïve façades. Ωμέγα 漢字 👩‍🚀 " * 3


@functools.cache
def tokenizer(kind: str):
    sources = ''.join(path.read_text() for path in Path(export.__file__).parent.glob('*.py'))
    if kind == 'char':
        return CharTokenizer.train(TEXT + 'The \\ ')
    return ByteTokenizer() if kind == 'byte' else BPETokenizer.train([sources], 400, kind)


def model_of(settings: dict, tok):
    """A model with weights that are no zeros, and more ids than the tokenizer has."""
    torch.manual_seed(0)
    model = build_model(GPTConfig(vocab_size=len(tok) + 7, **settings)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim < 2 else 0.0, 0.1 if p.ndim < 2 else 0.3)
    return model


def same(ours, theirs) -> bool:
    """Whether all parameters are equal; those that only theirs has are 0."""
    known = dict(ours.named_parameters())
    return all(torch.equal(q, known.get(name, torch.zeros_like(q)))
               for name, q in theirs.named_parameters())


@pytest.mark.parametrize('name', MODELS)
def test_there_and_back(tmp_path, name):
    tok, path = tokenizer('llama3'), tmp_path / 'm.gguf'
    model = model_of(MODELS[name], tok)
    gguf.save(model, tok, path, 'f32', True, 'm')
    again, read, more = gguf.load(path)
    assert same(model, again) and more['task'] == 'chat' and read.template is None
    assert read.encode(TEXT) == tok.encode(TEXT) and read.special == tok.special
    config = vars(model.config) | {'norm_eps': pytest.approx(model.config.norm_eps)}
    expected = config | ({'bias': True} if name.startswith('gpt2') else {})
    assert vars(again.config) == expected


@pytest.mark.parametrize('name, kind', [*((name, 'llama3') for name in MODELS),
                                        ('llama', 'gpt2'), ('llama', 'char'), ('qwen3', 'byte')])
def test_in_llama_cpp(tmp_path, name, kind):
    """The same 40 greedy tokens, and the same ids of a text."""
    xllamacpp = pytest.importorskip('xllamacpp')
    tok, path = tokenizer(kind), tmp_path / 'm.gguf'
    model = model_of(MODELS[name], tok)
    gguf.save(model, tok, path, 'f32', False, 'm')
    prompt = tok.encode('The cat')
    with torch.no_grad():
        theirs = export.said_by_llama_cpp(path, prompt)
        assert len(theirs) == 40 and export.count_same(model, tok, prompt, theirs) == 40
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.n_parallel = str(path), 512, False, 1
    found = xllamacpp.Server(params).handle_completions({
        'prompt': TEXT, 'n_predict': 1, 'temperature': 0, 'cache_prompt': False})
    assert found['usage']['prompt_tokens'] == len(tok.encode(TEXT))


@pytest.mark.parametrize('dtype', gguf.DTYPES)
def test_precision(tmp_path, dtype):
    """Each dtype is as exact as its bits; a classifier-like vector stays in fp32."""
    tok, path = tokenizer('llama3'), tmp_path / 'm.gguf'
    model = model_of(dict(MODELS['llama'], n_embd=96, n_head=3), tok)
    gguf.save(model, tok, path, dtype, False, 'm')
    again, _, more = gguf.load(path)
    assert more == {'task': ''}
    most = {'f32': 0, 'f16': 1e-3, 'bf16': 5e-3, 'q8_0': 1e-2, 'q5_0': 0.08, 'q5_1': 0.08,
            'q4_0': 0.16, 'q4_1': 0.16}[dtype]
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        error = ((p - q).norm() / p.norm()).item()
        assert error == 0 if p.ndim < 2 else error <= most, name
        eight = dtype[:2] in ('q4', 'q5') and name in ('wte.weight', 'lm_head.weight')
        assert error < 1e-2 or not eight, name


def test_what_cannot_be_quantized(tmp_path, capsys):
    tok = tokenizer('llama3')
    model = model_of(dict(MODELS['llama'], n_embd=48, n_head=2, head_dim=32), tok)
    message = stopped(capsys, lambda: gguf.save(model, tok, tmp_path / 'x', 'q8_0', False, 'm'))
    assert message == ('dtype=q8_0: wte.weight has rows of 48, which are not whole blocks of 32 '
                       'numbers; take --dtype=f16')


def header(*fields, tensors=b'', n_tensors=0, version=3) -> bytes:
    """A file's bytes from (key, kind, bytes of the value)."""
    text = lambda s: struct.pack('<Q', len(s)) + s.encode()
    body = b''.join(text(key) + struct.pack('<I', kind) + value for key, kind, value in fields)
    return b'GGUF' + struct.pack('<IQQ', version, n_tensors, len(fields)) + body + tensors


@pytest.mark.parametrize('data, said', [
    (b'', 'cannot mmap an empty file'), (b'GGML' + bytes(60), 'does not begin with GGUF'),
    (header(version=1), 'version 1'), (b'GGUF' + struct.pack('<IQQ', 3, 0, 1 << 60), 'too many'),
    (header(('a', 9, struct.pack('<IQ', 8, 1 << 40))), 'too many'),
    (header(('a', 8, struct.pack('<Q', 1 << 62))), 'more bytes'),
    (header(('a', 9, struct.pack('<IQ', 9, 1) + bytes(99))), 'kind 9'),
    (header(('general.architecture', 8, struct.pack('<Q', 5) + b'mamba')),
     "general.architecture='mamba'"),
    (header(('general.architecture', 8, struct.pack('<Q', 5) + b'llama')), 'context_length')])
def test_bad_files(tmp_path, capsys, data, said):
    path = tmp_path / 'bad.gguf'
    path.write_bytes(data)
    message = stopped(capsys, lambda: gguf.load(path))
    assert message.startswith(f'{path}: ') and said in message


def test_cut_off_and_missing(tmp_path, capsys):
    tok, path = tokenizer('llama3'), tmp_path / 'm.gguf'
    gguf.save(model_of(MODELS['llama'], tok), tok, path, 'q8_0', False, 'm')
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert 'is cut off' in stopped(capsys, lambda: gguf.load(path))
    path.write_bytes(data.replace(b'blk.1.ffn_up.weight', b'blk.1.ffn_up.xeight'))
    assert 'blk.1.ffn_up.weight should have shape [96, 64], but is missing' in stopped(
        capsys, lambda: gguf.load(path))
    path.write_bytes(data.replace(b'llama-bpe', b'llama-bqe'))
    assert "pre='llama-bqe'" in stopped(capsys, lambda: gguf.load(path))


MUTATE = '''
import random, resource, sys
sys.path[:0] = ['.', 'tests']
from core.formats import gguf
from core.settings import Stop
path, n = sys.argv[1], int(sys.argv[2])
data = open(path, 'rb').read()
begin = gguf.Header(path).begin
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng, kinds = random.Random(0), {'read': 0, 'refused': 0}
for i in range(n):
    bad = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(begin)
        bad[at:at + rng.choice([1, 4, 8])] = rng.choice([
            bytes(1), b'\\xff' * 8, rng.randbytes(4), (1 << 40).to_bytes(8, 'little'), b''])
    if rng.random() < 0.2:
        bad = bad[:rng.randrange(begin)]
    open(path + '.bad', 'wb').write(bad)
    try:
        gguf.load(path + '.bad')
        kinds['read'] += 1
    except Stop:
        kinds['refused'] += 1
print(kinds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)
'''


@pytest.mark.parametrize('n', [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_headers(tmp_path, n):
    """Read or refused in one line, within 256 MiB, whatever stands in the header."""
    tok, path = ByteTokenizer(), tmp_path / 'm.gguf'
    gguf.save(model_of(dict(MODELS['llama'], n_layer=1), tok), tok, path, 'f32', True, 'm')
    done = subprocess.run([sys.executable, '-c', MUTATE, path, str(n)], capture_output=True,
                          text=True, cwd=Path(export.__file__).parent, timeout=n)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, grown = done.stdout.split()
    assert int(grown) < 256 << 10 and "'refused'" in done.stdout
    assert all(line.startswith(('error: ', 'warning: ')) for line in done.stderr.splitlines())


def test_package_missing(tmp_path, monkeypatch, capsys):
    tok = tokenizer('llama3')
    monkeypatch.setattr(gguf.importlib.util, 'find_spec', lambda name: None)
    message = stopped(capsys, lambda: gguf.save(model_of(MODELS['llama'], tok), tok,
                                                tmp_path / 'x', 'f32', False, 'm'))
    assert message == '--to=gguf needs a package: pip install gguf'


@pytest.mark.parametrize('to', ['gguf', 'ollama'])
def test_a_run(run_train, monkeypatch, capsys, to):
    run_dir = run_train(max_steps=3)['run_dir']
    for name, value in dict(run_dir=run_dir, to=to, dtype='f32').items():
        monkeypatch.setattr(export, name, value)
    place = Path(export.main()['folder'])
    if to == 'ollama':
        assert sorted(path.name for path in place.iterdir()) == [
            'Modelfile', 'README.md', 'loss.png', 'model-f32.gguf']
        text = (place / 'Modelfile').read_text()
        assert text.startswith('FROM ./model-f32.gguf\n') and 'TEMPLATE {{ .Prompt }}' in text
        place = place / 'model-f32.gguf'
    out = capsys.readouterr().out
    assert 'read back: ids equal, logits differ by 0 at most' in out
    assert export.models.load_tokenizer(str(place)).kind == 'char'
    assert not list(Path('out').glob('.tmp-*'))
    again = stopped(capsys, export.main)
    assert 'is there already' in again
