"""Text to token ids and back: character and byte tokenizers behind one interface.

Every tokenizer has
    kind                    'char' or 'byte'
    encode(text) -> ids     special-token strings in the text stay text
    decode(ids) -> text     lossless for what encode made
    tokens                  the bytes of each id, in order; a special token's are its name
    special                 name -> id of the reserved tokens
    save(path)              one JSON file; `load(path)` reads any kind

A model may have more ids than its tokenizer has tokens (vocabularies are padded for speed): whoever
samples must mask ids from `len(tokenizer)` on.
"""
import codecs
import hashlib
import json
from pathlib import Path

import numpy as np

from core.settings import stop

# Reserved by every trained tokenizer, so that a base model can become a chat model unchanged.
SPECIAL = ('<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|end|>')


class Tokenizer:
    """What all kinds share; a kind adds `encode` and its entry in KINDS."""
    kind = ''

    def __init__(self, ordinary: list[bytes]):
        self.special = {name: len(ordinary) + i for i, name in enumerate(SPECIAL)}
        self.tokens = list(ordinary) + [name.encode() for name in SPECIAL]

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids) -> str:
        """Text of a sequence of ids; bytes that are no valid UTF-8 become U+FFFD.

        Raises IndexError for an id that has no token.
        """
        ids = list(ids)
        if ids and min(ids) < 0:
            raise IndexError(f'id {min(ids)} has no token')
        return b''.join(self.tokens[i] for i in ids).decode('utf-8', errors='replace')

    def stream(self):
        """A function id -> text for tokens that come one at a time.

        It keeps back the bytes of an unfinished character until the rest of them has come.
        """
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda i: decoder.decode(self.tokens[i])

    def byte_lengths(self) -> np.ndarray:
        """(len(self),) UTF-8 bytes of each token, 0 for special ones: for bits per byte."""
        lengths = np.array([len(token) for token in self.tokens], dtype=np.int64)
        lengths[list(self.special.values())] = 0
        return lengths

    def start(self) -> list[int]:
        """The ids to begin from without a prompt: a line break, else the end of another text."""
        newline = self.tokens.index(b'\n') if b'\n' in self.tokens else None
        return [self.special['<|endoftext|>'] if newline is None else newline]

    def state(self) -> dict:
        """What the kind needs beyond its name to be rebuilt, as JSON."""
        return {}

    def to_json(self) -> str:
        return json.dumps({'kind': self.kind, **self.state(), 'special': self.special},
                          ensure_ascii=False) + '\n'

    def hash(self) -> str:
        """16 hex digits that two tokenizers share only if they are the same."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def save(self, path) -> None:
        """Write the tokenizer to `path` as one JSON file."""
        Path(path).write_text(self.to_json(), encoding='utf-8')


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
        except KeyError as e:
            c = e.args[0]
            stop(f'character {c!r} (U+{ord(c):04X}) at offset {text.index(c)} is not among the '
                 f"{len(self.chars)} characters that the tokenizer knows; remove it, or use "
                 f"tokenizer 'byte', which knows all text")

    def state(self) -> dict:
        return {'chars': self.chars}


class ByteTokenizer(Tokenizer):
    """One id a UTF-8 byte: any text at all, in 256 ids and no training."""
    kind = 'byte'

    def __init__(self):
        super().__init__([bytes([i]) for i in range(256)])

    @classmethod
    def train(cls, text: str) -> 'ByteTokenizer':
        return cls()

    def encode(self, text: str) -> list[int]:
        return list(text.encode('utf-8'))


KINDS = {cls.kind: cls for cls in (CharTokenizer, ByteTokenizer)}


def load(path) -> Tokenizer:
    """Read a tokenizer file. Stops, naming the file, if it is missing or not one of ours."""
    try:
        found = json.loads(Path(path).read_text(encoding='utf-8'))
        kind, special = found.pop('kind'), found.pop('special')
        tokenizer = KINDS[kind](**found)
    except FileNotFoundError:
        stop(f'{path}: no such tokenizer file')
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        stop(f'{path}: not a tokenizer file ({type(e).__name__}: {e}); run prepare.py again')
    if tokenizer.special != special:
        stop(f'{path}: its special tokens {special} are not where {kind!r} puts them')
    return tokenizer
