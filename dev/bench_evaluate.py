"""Evaluation beside lm-evaluation-harness: python dev/bench_evaluate.py MODEL [--items=200].

Both score the first items of HellaSwag (hellaswag_val_1k.jsonl in DATA_MIRROR) with the same model
in fp32, in turn; what is timed is scoring, without loading of model and data. The harness has the
batch size that is fastest for it, of those given. Needs pip install lm-eval.
"""
import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'

import evaluate  # noqa: E402
from core.eval import tasks  # noqa: E402
from core.formats import hf  # noqa: E402
from core.ranks import processes  # noqa: E402
from core.run import models  # noqa: E402


def theirs(folder: Path, asked: tasks.Questions, sizes: list[int]):
    """A function that scores the items by the harness; its fastest batch size."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    requests = [Instance('loglikelihood', {}, pair, 0) for item in asked.items
                for pair in zip(item.prompts, item.choices)]
    found = {}
    for size in sizes:
        model = HFLM(pretrained=str(folder), dtype='float32', device='cpu', batch_size=size)
        run = functools.partial(model.loglikelihood, disable_tqdm=True)
        began = time.perf_counter()
        run(requests[:len(requests) // 4])
        found[size] = time.perf_counter() - began, run
    best = min(found, key=lambda size: found[size][0])
    print(f'lm-eval, batch sizes and seconds for a quarter: '
          f'{ {size: round(seconds, 1) for size, (seconds, _) in found.items()} }')
    return lambda: [said[0] for said in found[best][1](requests)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model')
    parser.add_argument('--items', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--batch_sizes', default='1,8,32')
    given = parser.parse_args()
    _, dev = processes.begin('cpu', 'float32', False, 0, 1, training=False)
    model, tokenizer, _ = models.load_run(given.model)
    asked = tasks.load('hellaswag', given.items)
    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, tokenizer, Path(folder) / 'hf')
        other = theirs(Path(folder) / 'hf', asked, [*map(int, given.batch_sizes.split(','))])
        times = {'ours': [], 'lm-eval': []}
        for _ in range(given.rounds):
            for name, run in (('ours', lambda: evaluate.measure(
                    model, tokenizer, asked, evaluate.Options(), dev)), ('lm-eval', other)):
                began = time.perf_counter()
                found = run()
                times[name].append(time.perf_counter() - began)
                if name == 'ours':
                    sums = [x for item in found['log_probabilities'] for x in item]
        print(f'largest difference of a log-probability: '
              f'{max(abs(a - b) for a, b in zip(sums, found)):.1e}')
    for name, seconds in times.items():
        print(f'{name:8} {statistics.median(seconds):7.1f} s ({min(seconds):.1f} to '
              f'{max(seconds):.1f})')
    ratios = [a / b for a, b in zip(times['ours'], times['lm-eval'])]
    print(f'ours takes {statistics.median(ratios):.2f} of its time ({min(ratios):.2f} to '
          f'{max(ratios):.2f})')


if __name__ == '__main__':
    main()
