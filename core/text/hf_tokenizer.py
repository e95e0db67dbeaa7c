"""tokenizer.json, the format of Hugging Face's `tokenizers`: our tokenizers to it, and back."""
import json
from pathlib import Path

from core.settings import stop, warn
from core.text.chat import ChatTemplate
from core.text.tokenizer import (
    CHAT_TEMPLATE,
    PATTERNS,
    SPECIAL,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    printable,
    unprintable,
)

JSON_BYTES = 1 << 26        # the largest JSON file that is read
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False,
              'use_regex': False}
ANY_CHARACTER, NO_SPLIT = r'[\s\S]', ''  # a character tokenizer's pattern, and a byte tokenizer's
# GPT-2's where digits are split off before, as SmolLM does: white space ends before a digit, too.
EACH_DIGIT = PATTERNS['gpt2'].replace(r' ?\p{N}+', r'\p{N}').replace(r'(?!\S)', r'(?![^\s\p{N}])')
# What a pattern must not pass by: it would be lost.
PROBE = "It's 12,345 x_y();\r\n 👩‍🚀 " + ''.join(map(chr, range(0x3000)))


def read_json(path: Path) -> dict:
    """The object in a JSON file. Stops, naming the file, if it is none, or suspiciously large."""
    try:
        if path.stat().st_size > JSON_BYTES:
            stop(f'{path}: {path.stat().st_size:,} bytes, too large for what it should hold')
        found = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(found, dict):
            raise ValueError(f'a {type(found).__name__}, not an object')
    except FileNotFoundError:
        stop(f'{path}: missing; a Hugging Face folder has one')
    except (OSError, ValueError, RecursionError) as e:
        stop(f'{path}: cannot be read as JSON ({type(e).__name__}: {e}); download it again')
    return found


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that merging the bytes of `token` in the order of ranks ends with; None if it
    ends with more than two."""
    parts, limit = [bytes([b]) for b in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:])]
        best = min(pairs)
        if best == limit:
            return None
        i = pairs.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def merges_of(tokenizer: BPETokenizer) -> list[tuple[bytes, bytes] | None]:
    """The merge that makes each token of more than one byte, in the order of their ids; None for
    a token that no merge makes, only a piece as a whole."""
    ranks = {token: i for i, token in enumerate(tokenizer.ordinary)}
    return [merge_of(token, ranks) for token in tokenizer.ordinary if len(token) > 1]


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """tokenizer.json of the `tokenizers` library for one of ours: it gives the same ids."""
    split = lambda pattern: {'type': 'Split', 'pattern': {'Regex': pattern},
                             'behavior': 'Isolated', 'invert': False}
    merges, splits, decoder = [], [{**BYTE_LEVEL}], {**BYTE_LEVEL}
    tokens = map(printable, tokenizer.ordinary)
    if isinstance(tokenizer, CharTokenizer):
        tokens, splits, decoder = tokenizer.chars, [split(ANY_CHARACTER)], {'type': 'Fuse'}
    elif isinstance(tokenizer, BPETokenizer):
        merges, splits = merges_of(tokenizer), [split(tokenizer.pattern), {**BYTE_LEVEL}]
    vocab = {token: tokenizer.first + i for i, token in enumerate(tokens)}
    normalize = tokenizer.normalize or tokenizer.corpus_normalize
    return {
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [{'id': i, 'content': name, 'single_word': False, 'lstrip': False,
                          'rstrip': False, 'normalized': False,
                          'special': name not in tokenizer.written}
                         for name, i in sorted(tokenizer.special.items(), key=lambda x: x[1])],
        'normalizer': {'type': normalize} if normalize else None,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': splits},
        'post_processor': begin_with(tokenizer) if tokenizer.add_bos else None,
        'decoder': decoder,
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': None,
                  'continuing_subword_prefix': None, 'end_of_word_suffix': None,
                  'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': None in merges,
                  'vocab': vocab | tokenizer.special,
                  'merges': [' '.join(map(printable, merge)) for merge in merges if merge]}}


def begin_with(tokenizer: Tokenizer) -> dict:
    """The post-processor that puts bos before every text."""
    bos = next(name for name, i in tokenizer.special.items() if i == tokenizer.bos)
    special = {'SpecialToken': {'id': bos, 'type_id': 0}}
    text, other = ({'Sequence': {'id': name, 'type_id': i}} for i, name in enumerate('AB'))
    return {'type': 'TemplateProcessing', 'single': [special, text],
            'pair': [special, text, special, other],
            'special_tokens': {bos: {'id': bos, 'ids': [tokenizer.bos], 'tokens': [bos]}}}


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, with bos and eos from the files beside it. Stops, naming
    the part, at anything but a byte-level BPE, or one of ours."""
    found = read_json(path)
    try:
        tokenizer = make_tokenizer(found, path.parent)
        tokenizer.corpus_normalize = (found.get('normalizer') or {'type': ''})['type']
        return tokenizer
    except NotSupported as e:
        stop(f'{path}: {e}; only byte-level BPE, and our own character and byte tokenizers, '
             'can be read')
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError,
            RecursionError) as e:
        stop(f'{path}: not a tokenizer that can be read ({type(e).__name__}: {str(e)[:200]})')


class NotSupported(Exception):
    """A tokenizer has a part that ours have not; the message names it."""


def make_tokenizer(found: dict, folder: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, without its truncation and padding. Raises
    NotSupported, or what bad data raises."""
    model, vocab, special, written = found['model'], dict(found['model']['vocab']), {}, []
    if model['type'] != 'BPE':
        raise NotSupported(f'its model is {model["type"]!r:.80}')
    for name in ('byte_fallback', 'dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
        if model.get(name):
            raise NotSupported(f'its model has {name}={model[name]!r:.80}')
    for token in found['added_tokens']:
        special[token['content']] = token['id']
        vocab.pop(token['content'], None)
        if not token.get('special', True):
            written.append(token['content'])
            if token.get('lstrip') or token.get('rstrip') or token.get('single_word'):
                raise NotSupported(f'its token {token["content"]!r:.80} takes what is around it')
    if not special:
        raise NotSupported('it has no special token that could end a text')
    pattern, in_front = split_pattern(found['pre_tokenizer']), front(found.get('post_processor'))
    normalizer = (found.get('normalizer') or {'type': ''})['type']
    ours = tuple(special) == SPECIAL    # which get text that is normalized already: see as_corpus
    if normalizer not in ('', 'NFC', 'NFKC'[:4 * ours]):
        raise NotSupported(f'its normalizer is {normalizer!r:.80}')
    normalizer = '' if ours else normalizer
    if pattern in (ANY_CHARACTER, NO_SPLIT):
        tokenizer, (ordinary, first) = None, in_order(vocab)
        if pattern == ANY_CHARACTER and all(len(token) == 1 for token in ordinary):
            tokenizer = CharTokenizer(''.join(ordinary))
        elif pattern == NO_SPLIT and list(map(unprintable, ordinary)) == ByteTokenizer.BYTES:
            tokenizer = ByteTokenizer()
        if not tokenizer or model['merges'] or normalizer or in_front or first:
            raise NotSupported('it has no pattern that splits text')
        if tokenizer.special != special:
            raise NotSupported(f'its special tokens {str(special)[:200]} are not '
                               f'{tokenizer.special}')
        return tokenizer
    bos, eos = bos_and_eos(folder, special)
    return make_bpe(pattern, vocab, special, model['merges'], bool(model.get('ignore_merges')),
                    bos=in_front or bos, eos=eos, add_bos=bool(in_front), normalize=normalizer,
                    written=written)


def in_order(vocab: dict[str, int]) -> tuple[list[str], int]:
    """Tokens in the order of their ids, and the first id. Raises NotSupported if an id is missing.
    """
    ordinary = sorted(vocab, key=vocab.__getitem__)
    first = vocab[ordinary[0]]
    if [vocab[token] for token in ordinary] != list(range(first, first + len(ordinary))):
        raise NotSupported('the ids of its ordinary tokens are not one after another')
    return ordinary, first


def make_bpe(pattern: str, vocab: dict[str, int], special: dict[str, int], merges: list,
             whole_pieces: bool, **more) -> BPETokenizer:
    """A byte-level BPE of ordinary tokens, special ones and merges, as other programs have them;
    `more` is for BPETokenizer. Raises NotSupported if ours would give other ids."""
    ordinary, first = in_order(vocab)
    check_merges(merges, ordinary, whole_pieces)
    tokenizer = BPETokenizer(pattern, ordinary, special, first=first, **more)
    if tokenizer.decode(tokenizer.encode(PROBE)) != tokenizer.known(PROBE):
        raise NotSupported('its pattern leaves out parts of a text')
    return tokenizer


def split_pattern(part: dict) -> str:
    """The pattern by which a pre_tokenizer splits text. Raises NotSupported for other kinds."""
    parts = part['pretokenizers'] if part['type'] == 'Sequence' else [part]
    kinds, before, last = [part['type'] for part in parts], parts[0], parts[-1]
    byte_level = last['type'] == 'ByteLevel' and not last['add_prefix_space']
    own_regex = last.get('use_regex', True)     # a ByteLevel splits by GPT-2's pattern
    if byte_level and kinds == ['ByteLevel']:
        return PATTERNS['gpt2'] if own_regex else NO_SPLIT
    if byte_level and own_regex and kinds == ['Digits', 'ByteLevel'] and \
            before['individual_digits']:
        return EACH_DIGIT
    # To remove all but what matches is the same, of a pattern that passes nothing by: see make_bpe.
    if before['type'] == 'Split' and 'Regex' in before['pattern'] and \
            (before['behavior'], before.get('invert')) in (
                ('Isolated', False), ('Isolated', None), ('Removed', True)):
        pattern = before['pattern']['Regex']
        if kinds == ['Split'] and pattern == ANY_CHARACTER or byte_level and not own_regex and \
                kinds == ['Split', 'ByteLevel'] and pattern not in ('', ANY_CHARACTER):
            return pattern
    raise NotSupported(f'its pre_tokenizer is {json.dumps(part)[:200]}')


def check_merges(merges: list, ordinary: list[str], whole_pieces: bool) -> None:
    """Raise NotSupported unless merging by these pairs is merging by the order of ids: they are in
    the order of the tokens that they make, and the pair that makes each token when ids are ranks is
    among them (or there is none, if `whole_pieces` are looked up first)."""
    tokens = [unprintable(token) for token in ordinary]
    ranks, pairs, last = {token: i for i, token in enumerate(tokens)}, set(), 0
    if sum(len(token) ** 2 for token in tokens) > 10 ** 8:
        raise NotSupported('its tokens are too long')
    for merge in merges:
        a, b = map(unprintable, merge.split(' ') if isinstance(merge, str) else merge)
        pairs.add((a, b))
        if ranks[a + b] < last:
            raise NotSupported(f'its merge {str(merge)[:80]} is not in the order of the ids')
        last = ranks[a + b]
    for token in tokens:
        merge = merge_of(token, ranks) if len(token) > 1 else None
        if len(token) > 1 and merge not in pairs and (merge or not whole_pieces):
            raise NotSupported(f'its token {printable(token)[:80]!r} is not made by merging two of '
                               'the tokens before it')


def bos_and_eos(folder: Path, special: dict[str, int]) -> tuple[str, str]:
    """The names of the tokens that begin and end a text, from tokenizer_config.json or config.json;
    '' if nothing begins it."""
    config, model = (optional_json(folder / name)
                     for name in ('tokenizer_config.json', 'config.json'))
    names: dict = {i: name for name, i in special.items()}

    def stated(key: str) -> str:
        name, i = config.get(key), model.get(f'{key}_id')
        name = name['content'] if isinstance(name, dict) else name
        name = name or names.get(i[0] if isinstance(i, list) else i)
        return name if name in special else ''

    bos, eos = stated('bos_token'), stated('eos_token')
    eos = eos or next((name for name in special if 'end' in name and 'text' in name), '')
    if not eos:
        raise NotSupported('no eos_token says which token ends a text')
    return bos, eos


def front(post_processor: dict | None) -> str:
    """The special token that is put before every text, '' if none is. Raises NotSupported if
    something else is done."""
    whole, found = post_processor or {'type': 'ByteLevel'}, ''
    for part in whole['processors'] if whole['type'] == 'Sequence' else [whole]:
        pieces = part['single'] if part['type'] == 'TemplateProcessing' else []
        kinds = [next(iter(piece)) for piece in pieces]
        if part['type'] not in ('ByteLevel', 'TemplateProcessing') or found and pieces or \
                kinds not in ([], ['Sequence'], ['SpecialToken', 'Sequence']):
            raise NotSupported(f'its post_processor is {json.dumps(whole)[:200]}')
        found = pieces[0]['SpecialToken']['id'] if len(pieces) == 2 else found
    return found


# ---------------------------------------------------------------------------------------------
# Chat templates


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template of a chat model: its own, or that of those that finetune.py has tuned."""
    if tokenizer.template:
        return tokenizer.template.source
    return '{{- bos_token -}}' * tokenizer.add_bos + CHAT_TEMPLATE


def use_template(where, tokenizer: Tokenizer, source: str, tokens: dict, ends: list) -> bool:
    """Whether a model with this chat template ('': none) is a chat model; the tokenizer then writes
    conversations by it. An answer ends with eos, one of the ids `ends`, or the special token that
    the template writes after an answer. Warns if it cannot be used."""
    if not source or source == template_of(tokenizer) and tokenizer.knows_chat():
        return bool(source)
    if wrong := [i for i in ends if type(i) is not int or not 0 <= i < len(tokenizer)]:
        stop(f'{where}: eos_token_id={wrong[0]!r:.80}: no token of its tokenizer')
    try:
        template = ChatTemplate(source, tokens, [tokenizer.eos, *ends])
        template.ends |= template.end_of_answer(tokenizer)
        tokenizer.template = template
    except ValueError as e:
        warn(f'{where}: {e}; without it the model only continues text')
    return bool(tokenizer.template)


def read_template(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a folder holds a chat model; see use_template."""
    found = optional_json(folder / 'tokenizer_config.json')
    source, jinja = found.get('chat_template') or '', folder / 'chat_template.jinja'
    if jinja.is_file():     # where transformers 5 writes it
        source = jinja.read_text(encoding='utf-8', errors='replace')
    if isinstance(source, list):    # several by name
        source = {one.get('name'): one.get('template') for one in source}.get('default', '')
    if not isinstance(source, str):
        stop(f'{folder}: chat_template is no text')
    tokens = {key: value['content'] if isinstance(value, dict) else value
              for key, value in found.items() if key.endswith('_token') and value
              and isinstance(value, (str, dict))}
    ends = optional_json(folder / 'generation_config.json').get('eos_token_id') or []
    return use_template(folder, tokenizer, source, tokens,
                        ends if isinstance(ends, list) else [ends])


def optional_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is no such file."""
    return read_json(path) if path.is_file() else {}
