"""What number formats cost: python dev/compare_dtypes.py MODEL TEXT [--dtypes=f16,q8_0] [--kb=300].

Writes MODEL (a run, a Hugging Face folder or a GGUF file) as GGUF in each format, reads it back,
and compares with the model itself: size, logits on 4,096 tokens of the text, and bits per byte of
its last `kb` kilobytes. The weights are compared; our model computes with all of them in fp32.
"""
import argparse
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

from core.device import Device  # noqa: E402
from core.formats import gguf  # noqa: E402
from core.run import models  # noqa: E402
from core.run.metrics import text_losses  # noqa: E402


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model')
    parser.add_argument('text', type=Path)
    parser.add_argument('--dtypes', default='f32,f16,bf16,q8_0,q5_1,q5_0,q4_1,q4_0')
    parser.add_argument('--kb', type=float, default=300)
    asked = parser.parse_args()
    model, tokenizer, state = models.load_run(asked.model)
    text = asked.text.read_bytes()[-int(asked.kb * 1000):].decode(errors='ignore')
    size = min(256, model.config.block_size)
    ids = torch.tensor(tokenizer.encode(tokenizer.as_corpus(text)))
    ids = ids[:min(16, len(ids) // size) * size].view(-1, size)
    n, logits = len(tokenizer), model(ids)
    cpu = Device('cpu', 'cpu', 'float32', False, 1.0, [])

    def bits(model) -> float:
        nats, n_bytes, _ = text_losses(model, tokenizer, text, cpu)
        return nats / math.log(2) / n_bytes
    before = bits(model)
    print(f'{asked.model}: {before:.4f} bits per byte of the last {len(text.encode()):,} bytes of '
          f'{asked.text}')
    print('| dtype | MB | largest difference of logits | mean | bits per byte | more |\n' +
          '|---' * 6 + '|')
    for dtype in asked.dtypes.split(','):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'model.gguf'
            gguf.save(model, tokenizer, path, dtype, state.get('task') == 'chat', 'model')
            again, _, _ = gguf.load(path)
            mb = path.stat().st_size / 1e6
        found, after = (again(ids) - logits)[..., :n].abs(), bits(again)
        print(f'| {dtype} | {mb:,.1f} | {found.max():.2g} | {found.mean():.2g} | {after:.4f} | '
              f'{after / before - 1:+.2%} |', flush=True)


if __name__ == '__main__':
    main()
