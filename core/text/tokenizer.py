"""Text to token ids and back: characters, bytes and byte-level BPE behind one interface.

Every tokenizer has
    kind                    'char', 'byte' or 'bpe'
    encode(text) -> ids     special-token strings in the text stay text
    decode(ids) -> text     lossless for what encode made
    tokens                  the bytes of each id, in order; a special token's are its name
    special                 name -> id of the reserved tokens
    bos, eos                ids that begin (None: nothing does) and end a text
    save(path)              one JSON file; `load(path)` reads any kind

A model may have more ids than its tokenizer has tokens, because vocabularies are padded for speed:
sampling must mask ids from `len(tokenizer)` on.
"""
import codecs
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken

from core.read.download import fetch
from core.settings import stop, warn
from core.text.bpe import blocks, count_pieces, learn_merges
from core.text.chat import ChatTemplate

# Reserved by every trained tokenizer, so that a base model can become a chat model unchanged.
ROLES = ('system', 'user', 'assistant')
CHAT = (*(f'<|{role}|>' for role in ROLES), '<|end|>')
SPECIAL = ('<|endoftext|>', *CHAT)
# The same as encode_chat, for other programs; without bos.
CHAT_TEMPLATE = ("{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + "
                 "message['content'] + '<|end|>' -}}{%- endfor -%}"
                 "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}")

# How text is split before pairs are merged: merges never cross a boundary between two pieces.
PATTERNS = {
    # Llama 3's, its (?i:...) contractions written out: only so does llama.cpp split all text alike.
    'llama3': r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
              r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    'gpt2': r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


def normalize(text: str, form) -> str:
    """The text in Unicode normalization form NFC or NFKC ('': as it is), with \\n line ends and
    without NUL characters and a byte order mark at its start."""
    text = text.removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n').replace('\0', '')
    return unicodedata.normalize(form, text) if form and not text.isascii() else text


class Tokenizer:
    """What all kinds share; a kind adds `encode` and its entry in KINDS."""
    kind = ''
    corpus_normalize = 'NFC'    # of the text that it is used on: NFC, NFKC, or '' for none
    normalize = ''              # what encode does itself, as another program's: NFC, or '': nothing
    template: ChatTemplate | None = None    # of a model that another program has trained
    written: dict[str, int] = {}    # special tokens that text may spell, as <think> in Qwen3

    def __init__(self, ordinary: list[bytes], special: dict[str, int] | None = None,
                 first: int = 0, eos: str = '<|endoftext|>'):
        end = first + len(ordinary)
        self.ordinary, self.first = ordinary, first     # of which the first has this id
        self.special = special or {name: end + i for i, name in enumerate(SPECIAL)}
        self.bos, self.eos, self.add_bos = None, self.special[eos], False
        taken = set(self.special.values())
        if len(taken) < len(self.special) or taken & {*range(first, end)} or min(taken) < 0:
            raise ValueError('two tokens with one id, or an id below 0')
        if max(*taken, first) > len(ordinary) + 100_000:    # which would need as much memory
            raise ValueError(f'token id {max(*taken, first)} is far beyond the others')
        self.tokens = [b''] * (max(*taken, end - 1) + 1)
        self.tokens[first:end] = ordinary
        for name, i in self.special.items():
            self.tokens[i] = name.encode()

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def as_corpus(self, text: str) -> str:
        """A text from a user, normalized as prepare.py normalized the training text."""
        return normalize(text, self.corpus_normalize)

    def blocks(self, text: str) -> list[str]:
        """Parts of a long text that encode to the ids of the whole."""
        return list(blocks(text))

    def decode(self, ids) -> str:
        """Text of a sequence of ids; bytes that are no valid UTF-8 become U+FFFD. Raises IndexError
        for an id that has no token."""
        ids = list(ids)
        if ids and min(ids) < 0:
            raise IndexError(f'id {min(ids)} has no token')
        return b''.join(self.tokens[i] for i in ids).decode('utf-8', errors='replace')

    def stream(self):
        """A function id -> text for tokens that come one at a time; the bytes of an unfinished
        character wait for the rest of it."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda i: decoder.decode(self.tokens[i])

    def byte_lengths(self) -> np.ndarray:
        """(len(self),) UTF-8 bytes of each token, 0 for special ones: for bits per byte."""
        return self.counts(len)

    def character_counts(self) -> np.ndarray:
        """(len(self),) characters that begin in each token, 0 for special ones."""
        return self.counts(lambda token: sum(byte & 0xC0 != 0x80 for byte in token))

    def counts(self, count) -> np.ndarray:
        """(len(self),) count(bytes of the token), 0 for special ones that no text may spell."""
        found = np.array([count(token) for token in self.tokens], dtype=np.int64)
        found[list(set(self.special.values()) - set(self.written.values()))] = 0
        return found

    def start(self) -> list[int]:
        """The ids to begin from without a prompt: bos, a line break, or the end of another text."""
        newline = self.tokens.index(b'\n') if b'\n' in self.tokens else self.eos
        return [newline if self.bos is None else self.bos]

    def prompt(self, text: str) -> list[int]:
        """The ids to continue from: those of the text, after bos where the model is used to it."""
        before: list = [self.bos] if self.add_bos else []
        return before + self.encode(self.as_corpus(text)) or self.start()

    def turn_ends(self) -> set[int]:
        """The ids at which an answer ends: <|end|>, and what can only come after it."""
        if self.template:
            return self.template.ends
        return {self.eos, *(self.special[name] for name in CHAT)}

    def known(self, text: str) -> str:
        """The text that the ids of encode stand for: as it normalizes it, and without the bytes
        that have no token."""
        return text

    def unknown(self, text: str) -> str:
        """What of a text cannot be encoded, and the remedy; '' if all can."""
        return ''

    def knows_chat(self) -> bool:
        """Whether it has the tokens of chats; one that was not made here may lack them."""
        return bool(self.template) or self.special.keys() >= set(CHAT)

    def check_chat(self) -> None:
        """Stop if the tokens of chats are missing."""
        if not self.knows_chat():
            missing = next(name for name in CHAT if name not in self.special)
            stop(f'this tokenizer has no {missing}: it knows no chats; its special tokens are '
                 f'{", ".join(list(self.special)[:8])}')

    def with_chat(self) -> 'Tokenizer':
        """The same with the tokens of chats, which only a BPETokenizer may lack."""
        return self

    def encode_chat(self, messages: list[dict], reply: bool = False) -> list[int]:
        """The ids of a conversation: <|role|>content<|end|>, turn by turn (like ChatML); bos before
        them where the model is used to it. With `reply` they end where the assistant begins.

        messages are {'role': 'system', 'user' or 'assistant', 'content': text}; raises ValueError
        for another role. A special token in a content stays text, so it cannot change the role.
        With a template of another program's, that decides how a conversation is written; stops if
        it refuses this one.
        """
        if self.template:
            try:
                return self.template.encode(self, messages, reply)
            except ValueError as e:
                stop(str(e))
        turns = [ids for ids, _ in self.encode_turns(messages)]
        return sum(turns, []) + [self.special['<|assistant|>']] * reply

    def encode_turns(self, messages: list[dict]) -> Iterator[tuple[list[int], list[bool]]]:
        """For each message its ids in a conversation, and which of them the assistant says: its
        content and the end token, not the token of its role."""
        self.check_chat()
        if self.template:
            yield from self.template.turns(self, messages)
            return
        before: list = [self.bos] if self.add_bos else []
        for role, content in ((message['role'], message['content']) for message in messages):
            if role not in ROLES:
                raise ValueError(f'role {role!r}: must be one of {", ".join(ROLES)}')
            ids = [*self.encode(self.as_corpus(content)), self.special['<|end|>']]
            before.append(self.special[f'<|{role}|>'])
            yield before + ids, [False] * len(before) + [role == 'assistant'] * len(ids)
            before = []

    def state(self) -> dict:
        """The arguments by which the constructor of its kind makes it again, but for `special`."""
        return {}

    def to_json(self, **more) -> str:
        return json.dumps({'kind': self.kind, **self.state(), **more, 'special': self.special},
                          ensure_ascii=False) + '\n'

    def hash(self) -> str:
        """16 hex digits that two tokenizers share only if they encode all text alike."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def save(self, path) -> None:
        """Write the tokenizer to `path` as one JSON file."""
        more = {'corpus_normalize': self.corpus_normalize} if self.corpus_normalize != 'NFC' else {}
        if self.template:
            more |= {'template': self.template.state()}
        Path(path).write_text(self.to_json(**more), encoding='utf-8')


class CharTokenizer(Tokenizer):
    """One id a character, for the characters of the training text only."""
    kind = 'char'

    def __init__(self, chars: str):
        self.chars = chars
        super().__init__([c.encode() for c in chars])
        self._id = {c: i for i, c in enumerate(chars)}

    @classmethod
    def train(cls, text: str) -> 'CharTokenizer':
        return cls(''.join(sorted(set(text))))

    def encode(self, text: str) -> list[int]:
        try:
            return [self._id[c] for c in text]
        except KeyError:
            stop(self.unknown(text))

    def unknown(self, text: str) -> str:
        for at, c in enumerate(text):
            if c not in self._id:
                return (f'character {c!r} (U+{ord(c):04X}) at offset {at} is not among the '
                        f'{len(self.chars)} characters that the tokenizer knows; remove it, or use '
                        "tokenizer 'byte', which knows all text")
        return ''

    def state(self) -> dict:
        return {'chars': self.chars}


class ByteTokenizer(Tokenizer):
    """One id a UTF-8 byte: any text at all, in 256 ids and no training."""
    kind = 'byte'
    BYTES = [bytes([i]) for i in range(256)]

    def __init__(self):
        super().__init__(self.BYTES)

    @classmethod
    def train(cls, text: str) -> 'ByteTokenizer':
        return cls()

    def encode(self, text: str) -> list[int]:
        return list(text.encode('utf-8'))


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019, section 2.2).

    `pattern` splits a text into pieces; within a piece, the adjacent pair of tokens whose union has
    the lowest id is merged, until no union has an id. tiktoken does the work. `bos` and `eos` are
    names of special tokens ('': none), `written` those that text may spell, as <think> in Qwen3.
    """
    kind = 'bpe'

    def __init__(self, pattern: str, ranks: list[str], special: dict[str, int], *, bos: str = '',
                 eos: str = '<|endoftext|>', add_bos: bool = False, normalize: str = '',
                 written: Iterable[str] = (), first: int = 0):
        super().__init__([unprintable(token) for token in ranks], special, first, eos)
        self.pattern, self.normalize, self.add_bos = pattern, normalize, add_bos
        self.written = {name: special[name] for name in written}
        self.bos = special[bos] if bos else None
        if normalize not in ('', 'NFC'):
            raise ValueError(f'normalize={normalize!r}')
        ids = {token: first + i for i, token in enumerate(self.ordinary)}
        if len(ids) < len(self.ordinary):
            raise ValueError('two tokens are alike')
        lost = [bytes([i]) for i in range(256) if bytes([i]) not in ids]
        if len(lost) > 64:      # SmolLM2 lacks 21
            raise ValueError(f'{len(lost)} of the 256 bytes have no token')
        ids |= {byte: len(self) + i for i, byte in enumerate(lost)}   # tiktoken needs all 256
        self.lost = re.compile(b'[%s]' % b''.join(map(re.escape, lost))) if lost else None
        self.told = False       # that something was lost
        self.encoding = tiktoken.Encoding('bpe', pat_str=pattern, mergeable_ranks=ids,
                                          special_tokens=self.written)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = 'llama3',
              workers: int = 0) -> 'BPETokenizer':
        """A tokenizer of vocab_size tokens, special ones included, or fewer if texts are short."""
        tokens = learn_merges(count_pieces(texts, PATTERNS[pattern], workers),
                              vocab_size - len(SPECIAL))
        return cls(PATTERNS[pattern], [printable(token) for token in tokens],
                   {name: len(tokens) + i for i, name in enumerate(SPECIAL)})

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Stops if the pattern fails on it, as one that backtracks may."""
        if self.normalize:
            text = unicodedata.normalize('NFC', text)
        if self.lost and self.lost.search(text.encode()):
            return self.encode_without(text)
        try:
            if self.written:
                return self.encoding.encode(text, allowed_special=set(self.written),
                                            disallowed_special=())
            return self.encoding.encode_ordinary(text)
        except BaseException as e:
            if type(e).__name__ != 'PanicException':    # of tiktoken's Rust; no Exception
                raise
        # Its regular expressions run out of stack in a million spaces, which are no loss if cut.
        ends = [found.end() for found in re.finditer(r'\s{100000}(?=[\s\S])', text)]
        if not ends:
            stop('the pattern by which the tokenizer splits text fails on this one')
        return [i for begin, end in zip([0, *ends], [*ends, len(text)])
                for i in self.encode(text[begin:end])]

    def known(self, text: str) -> str:
        if self.normalize:
            text = unicodedata.normalize('NFC', text)
        return self.lost.sub(b'', text.encode()).decode(errors='replace') if self.lost else text

    def encode_without(self, text: str) -> list[int]:
        """The ids of a text of which some bytes have no token, as control characters in SmolLM2:
        they are dropped after the text has been split, as in Hugging Face's tokenizers."""
        if not self.told:
            n = len(self.lost.findall(text.encode()))
            warn(f'{n:,} bytes of a text have no token in this vocabulary and are left out, as in '
                 'Hugging Face (said once)')
            self.told = True
        ids, names = [], '|'.join(map(re.escape, self.written))
        for part in re.split(f'({names})', text) if names else [text]:
            if part in self.written:
                ids.append(self.written[part])
                continue
            for piece in regex.findall(self.pattern, part):
                if known := self.lost.sub(b'', piece.encode()):
                    ids += self.encoding._encode_single_piece(known)
        return ids

    def with_chat(self) -> 'BPETokenizer':
        """The same with the tokens of chats behind all others, where it lacks them."""
        missing = [name for name in CHAT if name not in self.special]
        found = BPETokenizer(**self.state(), special=self.special | {
            name: len(self) + i for i, name in enumerate(missing)})
        found.corpus_normalize = self.corpus_normalize
        return found

    def blocks(self, text: str) -> list[str]:
        return super().blocks(text) if self.pattern in PATTERNS.values() else [text]

    def state(self) -> dict:
        names: dict = {i: name for name, i in self.special.items()}
        return {'pattern': self.pattern, 'bos': names.get(self.bos, ''), 'eos': names[self.eos],
                'add_bos': self.add_bos, 'normalize': self.normalize, 'written': [*self.written],
                'first': self.first, 'ranks': [printable(token) for token in self.ordinary]}


# Bytes as printable characters, GPT-2's way: most stand for themselves, the others from U+0100 on.
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted({*range(256)} - {*PLAIN})
BYTE_TO_CHAR = {b: chr(b) for b in PLAIN} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def printable(token: bytes) -> str:
    """A token as text without spaces and control characters: b' the' is 'Ġthe'."""
    return ''.join(map(BYTE_TO_CHAR.__getitem__, token))


def unprintable(text: str) -> bytes:
    """The inverse of `printable`. Raises KeyError for characters that it never makes."""
    return bytes(map(CHAR_TO_BYTE.__getitem__, text))


def gpt2(downloads) -> BPETokenizer:
    """GPT-2's tokenizer with the chat tokens behind <|endoftext|>: 50,261 tokens in all. OpenAI's
    vocab.bpe is not needed: it lists the merges, and the ids are in their order."""
    path = fetch('gpt2/encoder.json', 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/'
                 'main/encoder.json', downloads, size=1_042_301,
                 sha256='196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783')
    ids = json.loads(path.read_text(encoding='utf-8'))
    end = ids.pop('<|endoftext|>')
    return BPETokenizer(PATTERNS['gpt2'], sorted(ids, key=ids.get), bos='<|endoftext|>',
                        special={name: end + i for i, name in enumerate(SPECIAL)})


KINDS: dict = {cls.kind: cls for cls in (CharTokenizer, ByteTokenizer, BPETokenizer)}


def load(path) -> Tokenizer:
    """Read a tokenizer file. Stops, naming the file, if it is missing or not one of ours."""
    try:
        found = json.loads(Path(path).read_text(encoding='utf-8'))
        kind, special = found.pop('kind'), found.pop('special')
        form, template = found.pop('corpus_normalize', 'NFC'), found.pop('template', None)
        if form not in ('', 'NFC', 'NFKC'):
            raise ValueError(f'corpus_normalize={form!r}')
        tokenizer = KINDS[kind](**found, **({'special': special} if kind == 'bpe' else {}))
        tokenizer.corpus_normalize = form
        tokenizer.template = ChatTemplate(**template) if template else None
    except FileNotFoundError:
        stop(f'{path}: no such tokenizer file')
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        stop(f'{path}: not a tokenizer file ({type(e).__name__}: {e}); run prepare.py again')
    if tokenizer.special != special:
        stop(f'{path}: its special tokens {special} are not where {kind!r} puts them')
    return tokenizer
