"""Whether a model has seen in training what it is asked: the same tokens in a row in the shards."""
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.data import named
from core.data.dataset import Tokens
from core.eval.tasks import Questions
from core.run.log import events
from core.text.clean import ngram_hashes

SAME_BYTES, LEAST_TOKENS = 60, 8    # of equal text: bytes on average, and tokens at least
BLOCK = 1 << 22                     # tokens of a shard at a time
TABLE = 1 << 24                     # a first look at the lowest bits of hashes


def with_training(run: str, questions: Questions, tokenizer, data_dir: str) -> dict:
    """{'overlap': ..., 'overlap_with': ..., 'overlap_tokens': n} if the shards that a run was
    trained on are at hand: the share of items of which n tokens in a row stand there, or of a text
    the share of its tokens of which this is so (as in Touvron et al. 2023, Llama 2, appendix A.6).
    """
    folder, texts = shards_of(run, data_dir), [item.solved for item in questions.items]
    if not folder:
        return {}
    encoded = [tokenizer.encode(tokenizer.as_corpus(text)) for text in texts]
    n_tokens, n_bytes = sum(map(len, encoded)), sum(len(text.encode()) for text in texts)
    if not n_tokens:
        return {}
    n = max(LEAST_TOKENS, round(SAME_BYTES * n_tokens / n_bytes))
    grams = [ngram_hashes(np.array(ids, np.uint64), n) for ids in encoded]
    seen = find(Tokens(folder, 'train'), np.unique(np.concatenate(grams)), n)
    hits = [np.isin(mine, seen) for mine in grams]
    share = np.concatenate(hits).mean() if questions.task.kind == 'text' and sum(map(len, hits)) \
        else np.mean([mine.any() for mine in hits])
    return {'overlap': float(share), 'overlap_with': str(folder), 'overlap_tokens': n}


def shards_of(run: str, data_dir: str) -> Path | None:
    """The dataset that a run was trained on, if it is still there and the same."""
    start = next((e for e in events(run) if e['event'] == 'start'), {})
    data = start.get('identity', {}).get('data', {})
    for place in Path(data_dir).glob('*') if 'train_tokens' in data else ():
        if named.is_made(place) and named.read_meta(place)['sha256'] == data.get('sha256'):
            return place
    return None


def find(tokens: Tokens, grams: np.ndarray, n: int) -> np.ndarray:
    """Those of the sorted hashes `grams` that n tokens in a row have."""
    table = np.zeros(TABLE, bool)
    table[grams & np.uint64(TABLE - 1)] = True
    found = []
    for start in tqdm(range(0, len(tokens), BLOCK), 'overlap', leave=False, delay=2):
        block = tokens.read(start, min(BLOCK + n - 1, len(tokens) - start)).astype(np.uint64)
        hashes = ngram_hashes(block, n)
        hashes = np.unique(hashes[table[hashes & np.uint64(TABLE - 1)]])
        found.append(hashes[np.isin(hashes, grams)])
    return np.unique(np.concatenate(found)) if found else np.array([], np.uint64)
