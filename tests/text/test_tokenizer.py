"""core/text/tokenizer.py: round trips, special tokens, streaming, files."""
import json

import numpy as np
import pytest
from conftest import stopped

from core.data import records
from core.data.build import build
from core.data.dataset import Tokens
from core.text import tokenizer as tokenizers
from core.text.hf_tokenizer import read_tokenizer, tokenizer_json
from core.text.tokenizer import SPECIAL, ByteTokenizer, CharTokenizer, Tokenizer, load

# 1 to 4 bytes a character, a combining accent, a joined emoji, control characters, line ends.
TEXT = ('To be, or not to be:\n\tthat is the question…\r\nNaïve façade, cafe\u0301; Ωμέγα; '
        '漢字かな; 👩‍🚀🎉\U0010ffff \x00\x1f\x7f\u2028 "quoted" \\n {"kind": 1}\n')


def make(kind: str, text: str = TEXT) -> Tokenizer:
    return tokenizers.KINDS[kind].train(text)


kinds = pytest.mark.parametrize('kind', ['byte', 'char'])


@kinds
def test_round_trip(kind):
    tok = make(kind)
    ids = tok.encode(TEXT)
    assert all(type(i) is int and 0 <= i < len(tok) for i in ids)
    assert tok.decode(ids) == TEXT
    assert tok.decode(np.array(ids, dtype=np.uint16)) == TEXT
    assert tok.encode('') == [] and tok.decode([]) == ''


def test_char_ids_are_the_sorted_characters():
    tok = CharTokenizer.train('banana\n')
    assert tok.encode('\nabn') == [0, 1, 2, 3] and len(tok) == 4 + len(SPECIAL)
    assert tok.tokens[:4] == [b'\n', b'a', b'b', b'n']
    assert len(CharTokenizer.train(TEXT).encode(TEXT)) == len(TEXT)


def test_byte_ids_are_the_bytes():
    tok = ByteTokenizer.train('whatever')
    assert tok.encode('aé🎉') == [0x61, 0xc3, 0xa9, 0xf0, 0x9f, 0x8e, 0x89]
    assert len(tok) == 256 + len(SPECIAL)


@kinds
def test_special_tokens_come_last(kind):
    tok = make(kind)
    n = len(tok) - len(SPECIAL)
    assert SPECIAL == ('<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|end|>')
    assert tok.special == {name: n + i for i, name in enumerate(SPECIAL)}
    assert tok.tokens[n:] == [name.encode() for name in SPECIAL]
    assert [tok.decode([i]) for i in tok.special.values()] == list(SPECIAL)


@kinds
def test_special_tokens_in_the_text_stay_text(kind):
    text = 'a' + ''.join(SPECIAL) + 'b'
    tok = make(kind, text)
    ids = tok.encode(text)
    assert not set(ids) & set(tok.special.values())
    assert len(ids) == len(text) and tok.decode(ids) == text


def test_unknown_character(capsys):
    tok = CharTokenizer.train('abc')
    message = stopped(capsys, lambda: tok.encode('abca🎉b🎉'))
    assert 'U+1F389' in message and 'offset 4' in message and '3 characters' in message
    assert "'byte'" in message
    message = stopped(capsys, lambda: tok.encode('\n'))
    assert "'\\n'" in message and 'U+000A' in message and 'offset 0' in message


def test_decode_of_partial_characters():
    tok = ByteTokenizer()
    party = tok.encode('🎉')
    assert tok.decode(party[:3]) == '\ufffd'
    assert tok.decode(tok.encode('a') + party[1:2] + tok.encode('b')) == 'a\ufffdb'
    assert tok.decode([0xff]) == '\ufffd'
    assert tok.decode(party[:2] + [tok.special['<|end|>']] + party) == '\ufffd<|end|>🎉'


@kinds
@pytest.mark.parametrize('beyond', [True, False], ids=['too large', 'negative'])
def test_ids_without_a_token(kind, beyond):
    tok = make(kind)
    for i in (len(tok), len(tok) + 1000) if beyond else (-1, -100):  # -100: an ignored target
        with pytest.raises(IndexError):
            tok.decode([0, i])


@kinds
def test_stream(kind):
    tok = make(kind)
    push = tok.stream()
    pieces = [push(i) for i in tok.encode(TEXT)]
    assert ''.join(pieces) == TEXT
    assert '\ufffd' not in pieces and max(map(len, pieces)) == 1


def test_stream_keeps_unfinished_characters_back():
    tok = ByteTokenizer()
    push = tok.stream()
    assert [push(i) for i in tok.encode('é🎉a')] == ['', 'é', '', '', '', '🎉', 'a']
    other = tok.stream()  # each stream has its own memory
    party = tok.encode('🎉')
    assert push(party[0]) == '' and other(party[0]) == ''
    assert push(ord('x')) == '\ufffdx'
    assert [other(i) for i in party[1:]] == ['', '', '🎉']


@kinds
def test_byte_lengths(kind):
    tok = make(kind)
    lengths = tok.byte_lengths()
    assert lengths.shape == (len(tok),) and lengths.dtype == np.int64
    assert lengths[list(tok.special.values())].tolist() == [0] * len(SPECIAL)
    for text in (TEXT, '🎉' * 3, 'a'):
        assert lengths[tok.encode(text)].sum() == len(text.encode())
    assert lengths[:len(tok) - len(SPECIAL)].min() == 1


def test_start():
    tok = CharTokenizer.train('b\na')
    assert tok.start() == tok.encode('\n')
    tok = CharTokenizer.train('ab')
    assert tok.start() == [tok.special['<|endoftext|>']]
    assert ByteTokenizer().start() == [10]


# ---------------------------------------------------------------------------------------------
# Text that comes by another door than prepare.py

COMPOSED, DECOMPOSED, LIGATURE = 'café naïve\n', 'cafe\u0301 nai\u0308ve\n', '\ufb01 ½'
DOORS = {   # door -> the ids of what is said there, without what stands around it
    'prompt': lambda tok, text: tok.prompt(text),
    'chat': lambda tok, text: tok.encode_chat([{'role': 'user', 'content': text}])[1:-1],
    'system': lambda tok, text: tok.encode_chat([{'role': 'system', 'content': text}])[1:-1],
    'answer': lambda tok, text: tok.encode_chat([{'role': 'assistant', 'content': text}])[1:-1],
    'record': lambda tok, text: records.encode(tok, 'x:1', [
        {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': text}], 10 ** 6
        )[0].tolist()[4:-1]}


def tokenizer_for(kind: str, form: str) -> Tokenizer:
    text = (COMPOSED + 'fi 1\u20442') if form else TEXT + DECOMPOSED + LIGATURE
    tok = tokenizers.BPETokenizer.train([text], 280) if kind == 'bpe' else make(kind, text)
    tok.corpus_normalize = form
    return tok


@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe'])
@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('given,form,expected', [
    (DECOMPOSED, 'NFC', COMPOSED), (DECOMPOSED, 'NFKC', COMPOSED), (DECOMPOSED, '', DECOMPOSED),
    ('\ufeff' + COMPOSED, 'NFC', COMPOSED), ('a\r\nf\rc', 'NFC', 'a\nf\nc'), ('a\0c', '', 'ac'),
    (LIGATURE, 'NFKC', 'fi 1\u20442'), (LIGATURE, '', LIGATURE), (COMPOSED, 'NFC', COMPOSED)])
def test_text_at_a_door_is_made_as_the_corpus_was(kind, door, given, form, expected, tmp_path):
    """Also by the tokenizer of a run, and of an exported model."""
    tok = tokenizer_for(kind, form)
    assert DOORS[door](tok, given) == tok.encode(expected)
    tok.save(tmp_path / 't.json')
    (tmp_path / 'tokenizer.json').write_text(json.dumps(tokenizer_json(tok)))
    for again in (load(tmp_path / 't.json'), read_tokenizer(tmp_path / 'tokenizer.json')):
        assert DOORS[door](again, given) == tok.encode(expected) and again.hash() == tok.hash()
        assert again.corpus_normalize == form


def test_an_unknown_character_is_still_refused(capsys):
    tok = tokenizer_for('char', 'NFC')
    for door in DOORS.values():
        assert "character 'é'" not in stopped(capsys, lambda: door(tok, 'e\u0301 漢'))
    assert '漢' in stopped(capsys, lambda: tok.prompt('e\u0301 漢'))


def test_the_form_of_the_corpus_is_kept(tmp_path):
    """By a chat's tokenizer, too. An old file does not state it: it was NFC by default; and it is
    no part of what old runs know as their tokenizer."""
    tok = tokenizer_for('bpe', 'NFKC')
    assert tok.with_chat().corpus_normalize == 'NFKC'
    before = tok.hash()
    tok.corpus_normalize = 'NFC'
    tok.save(tmp_path / 't.json')
    assert 'corpus' not in (tmp_path / 't.json').read_text() and tok.hash() == before
    assert load(tmp_path / 't.json').corpus_normalize == 'NFC'


def test_an_unknown_form(tmp_path, capsys):
    path = tmp_path / 't.json'
    path.write_text(json.dumps(json.loads(ByteTokenizer().to_json(corpus_normalize='NFX'))))
    assert "corpus_normalize='NFX'" in stopped(capsys, lambda: load(path))


@pytest.mark.parametrize('form', ['', 'NFC', 'NFKC'])
@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_prepare_notes_the_form(tmp_path, monkeypatch, form, kind):
    """A model's own text is always a prompt for it."""
    monkeypatch.chdir(tmp_path)
    text = DECOMPOSED * 9 + LIGATURE + ' Å한국ไทย\r\n'
    (tmp_path / 'x.txt').write_bytes(text.encode())
    folder = build('x.txt', tokenizer=kind, normalize=form, val_fraction=0.0)
    tok = load(folder / 'tokenizer.json')
    assert tok.corpus_normalize == form
    assert tok.prompt(text) == Tokens(folder, 'train').read(0, 10 ** 6).tolist()


# ---------------------------------------------------------------------------------------------
# Files


@kinds
def test_save_and_load(kind, tmp_path):
    tok = make(kind)
    path = tmp_path / 'tokenizer.json'
    tok.save(path)
    found = json.loads(path.read_text(encoding='utf-8'))
    assert found['kind'] == kind and found['special'] == tok.special
    again = load(path)
    assert type(again) is type(tok) and again.tokens == tok.tokens
    assert again.special == tok.special and again.hash() == tok.hash()
    assert again.encode(TEXT) == tok.encode(TEXT)
    again.save(tmp_path / 'again.json')
    assert (tmp_path / 'again.json').read_bytes() == path.read_bytes()
    assert load(str(path)).hash() == tok.hash()


def test_hash():
    toks = [ByteTokenizer(), *map(CharTokenizer.train, ('', 'a', 'ab', 'ac'))]
    hashes = [tok.hash() for tok in toks]
    assert len(set(hashes)) == len(toks)
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)
    assert CharTokenizer.train('ba').hash() == CharTokenizer.train('abba').hash()
    assert CharTokenizer('ba').hash() != CharTokenizer('ab').hash()


# Files and hashes of old runs must stay readable: these never change.
FROZEN = '{"kind": "char", "chars": "\\nàb", "special": {"<|endoftext|>": 3, "<|system|>": 4, ' \
         '"<|user|>": 5, "<|assistant|>": 6, "<|end|>": 7}}\n'


def test_the_format_is_frozen(tmp_path):
    path = tmp_path / 'tokenizer.json'
    path.write_text(FROZEN, encoding='utf-8')
    tok = load(path)
    assert tok.encode('bà\n') == [2, 1, 0] and tok.to_json() == FROZEN
    assert tok.hash() == '37f48399ed97cf8e'


def test_missing_file(capsys, tmp_path):
    path = tmp_path / 'tokenizer.json'
    assert stopped(capsys, lambda: load(path)) == f'{path}: no such tokenizer file'


@pytest.mark.parametrize('text', [
    '', '{', 'null', '5', '[]', '"kind"', '{}', '{"kind": "char"}',
    '{"kind": "char", "special": {}}', '{"kind": "char", "chars": 5, "special": {}}',
    '{"kind": ["char"], "special": {}}', '{"kind": "wordpiece", "special": {}}',
    '{"kind": "byte", "chars": "a", "special": {}}',
    '{"version": "1.0", "model": {"type": "BPE", "vocab": {}}}'])
def test_malformed_or_foreign_file(capsys, tmp_path, text):
    path = tmp_path / 'tokenizer.json'
    path.write_text(text)
    message = stopped(capsys, lambda: load(path))
    assert message.startswith(f'{path}: not a tokenizer file (') and 'prepare.py' in message


def test_file_that_is_no_text(capsys, tmp_path):
    path = tmp_path / 'tokenizer.json'
    path.write_bytes(b'\xff\xfe{\x00')
    assert stopped(capsys, lambda: load(path)).startswith(f'{path}: not a tokenizer file (')


def test_special_tokens_elsewhere(capsys, tmp_path):
    path = tmp_path / 'tokenizer.json'
    found = json.loads(ByteTokenizer().to_json())
    found['special']['<|end|>'] = 300
    path.write_text(json.dumps(found))
    message = stopped(capsys, lambda: load(path))
    assert message.startswith(f'{path}: its special tokens ') and '300' in message
