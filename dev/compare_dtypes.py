"""What number formats cost: python dev/compare_dtypes.py MODEL TEXT [--dtypes=f16,q8_0] [--kb=300].

MODEL is a run, a Hugging Face folder or a GGUF file. f32, f16, .. q4_0: it is written as GGUF and
read back; our model computes with all of these in fp32. float32, bfloat16, int8, int4: as sample.py
computes with --dtype or --quantize, with the tokens per second of the text's end (64 and then 128
new ones, greedily, the median of 5, eager). Each is compared with the model itself: size, logits on
4,096 tokens of the text, bits per byte of its last `kb` kilobytes, and how many of 200 greedy
tokens come before the first that differs.
"""
import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

import evaluate  # noqa: E402
from core.device import Device, keep_freed_memory  # noqa: E402
from core.eval.tasks import Item  # noqa: E402
from core.formats import gguf  # noqa: E402
from core.net import quant  # noqa: E402
from core.net.engine import generate  # noqa: E402
from core.run import models  # noqa: E402


def as_dtype(model, tokenizer, dtype: str, chat: bool):
    """The model in another number format, its size in MB, and the device that it computes with."""
    cpu = Device('cpu', 'cpu', 'float32', False, 1.0, [])
    if dtype in ('float32', 'bfloat16', *quant.KINDS):
        again, size = copy.deepcopy(model), 2 if dtype == 'bfloat16' else 4
        if dtype in quant.KINDS:
            quant.quantize(again, dtype)
        cpu.dtype = 'bfloat16' if dtype == 'bfloat16' else 'float32'
        return again, quant.bytes_read(again, size) / 1e6, cpu
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.gguf'
        gguf.save(model, tokenizer, path, dtype, chat, 'model')
        return gguf.load(path)[0], path.stat().st_size / 1e6, cpu


def new_tokens(model, prompt: list[int], n: int, cpu: Device) -> list[int]:
    with cpu.autocast():
        return [new for new, in generate(model, [prompt], n, temperature=0)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model')
    parser.add_argument('text', type=Path)
    parser.add_argument('--dtypes', default='f32,f16,bf16,q8_0,q5_1,q5_0,q4_1,q4_0')
    parser.add_argument('--kb', type=float, default=300)
    asked = parser.parse_args()
    keep_freed_memory()
    model, tokenizer, state = models.load_run(asked.model)
    text = asked.text.read_bytes()[-int(asked.kb * 1000):].decode(errors='ignore')
    size = min(256, model.config.block_size)
    ids = torch.tensor(tokenizer.encode(tokenizer.as_corpus(text)))
    prompt, ids = ids[-64:].tolist(), ids[:min(16, len(ids) // size) * size].view(-1, size)
    n, logits = len(tokenizer), model(ids)
    cpu = Device('cpu', 'cpu', 'float32', False, 1.0, [])

    def bits(model, cpu) -> float:
        asked = evaluate.Options(stride=model.config.block_size // 2)
        found = evaluate.texts(model, tokenizer, [Item('', [text])], asked, cpu)['bits_per_byte']
        nats, n_bytes = map(sum, zip(*found))
        return nats / math.log(2) / n_bytes
    before, wanted = bits(model, cpu), new_tokens(model, prompt, 200, cpu)
    print(f'{asked.model}: {before:.4f} bits per byte of the last {len(text.encode()):,} bytes of '
          f'{asked.text}')
    print('| dtype | MB | largest difference of logits | mean | bits per byte | more | greedy '
          'tokens | tokens/s |\n' + '|---' * 8 + '|')
    for dtype in asked.dtypes.split(','):
        again, mb, cpu = as_dtype(model, tokenizer, dtype, state.get('task') == 'chat')
        with cpu.autocast():
            found = (again(ids) - logits)[..., :n].abs()
        after, said, times = bits(again, cpu), new_tokens(again, prompt, 200, cpu), []
        same = next((i for i, pair in enumerate(zip(said, wanted)) if len({*pair}) > 1), 200)
        for _ in range(5):
            began = time.perf_counter()
            new_tokens(again, prompt, 128, cpu)
            times.append(time.perf_counter() - began)
        print(f'| {dtype} | {mb:,.1f} | {found.max():.2g} | {found.mean():.2g} | {after:.4f} | '
              f'{after / before - 1:+.2%} | {same} | {128 / statistics.median(times):,.1f} |',
              flush=True)


if __name__ == '__main__':
    main()
