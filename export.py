"""A trained model for other programs: python export.py out/shakespeare.

--to=hf writes a Hugging Face folder that transformers 4 and 5 load without any code of ours. It is
read back and compared with the model before it gets its name.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import importlib.util
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import torch
from safetensors import SafetensorError

from core.formats import hf
from core.run import models
from core.settings import check_bounds, check_choice, configure, stop

POSITIONAL = ('run_dir',)

run_dir = ''            # a run such as out/shakespeare, or a Hugging Face folder
to = 'hf'               # the format: hf
step = 0                # which checkpoint; 0: the best one
export_dir = ''         # where to; '': <run_dir>-hf
dtype = 'float32'       # of the weights: float32, bfloat16 or float16
shard_gb = 5.0          # most gigabytes of weights in one file

# Texts that both tokenizers must encode alike: spaces, digits, contractions, scripts, emoji.
PROBES = ("It's 12,345 words: DON'T\n\n\t  stop…\r\n", 'naïve façade Ωμέγα 漢字かな हिन्दी',
          '👩‍🚀 x_y(); ', '  lead and trail  ', '\x00\x7f\u2028\u3000')


def export_hf(model, tokenizer, folder: Path, chat: bool) -> dict:
    """Write, read back, compare; returns the largest differences of logits that were found."""
    hf.save(model, tokenizer, folder, dtype, int(shard_gb * 1e9), chat)
    for p in model.parameters():    # the file holds the weights rounded to dtype
        p.data = p.data.to(getattr(torch, dtype)).float()
    ids = torch.randint(len(tokenizer), (2, min(64, model.config.block_size)),
                        generator=torch.Generator().manual_seed(0))
    found, again = hf.load(folder)
    known = dict(found.named_parameters())
    for name, p in model.named_parameters():
        if not torch.equal(known[name], p):
            stop(f'{folder}: {name} is not what was written; nothing was exported')
    logits = model(ids)
    differences = {'read back': (logits - found(ids)).abs().max().item()}
    check_ids(tokenizer, again.encode, f'{folder}: the tokenizer that was written')
    if importlib.util.find_spec('transformers'):
        theirs = logits_of_transformers(tokenizer, folder, ids)
        differences['in transformers'] = (logits - theirs).abs().max().item()
    for where, difference in differences.items():
        if not difference <= 1e-3:
            stop(f'{folder}: {where}, logits differ by {difference:g}; nothing was exported')
    return differences


def check_ids(tokenizer, encode, where: str) -> None:
    """Stop if the function `encode` gives other ids than the tokenizer for one of PROBES, without
    the characters that the tokenizer lacks."""
    texts, form = PROBES, tokenizer.corpus_normalize
    if tokenizer.kind == 'char':
        texts = [''.join(c for c in text if c in tokenizer.chars)
                 for text in (*PROBES, tokenizer.chars)]
    for text in texts:
        text = unicodedata.normalize(form, text) if form else text
        if not tokenizer.unknown(text) and encode(text) != tokenizer.encode(text):
            stop(f'{where} gives other ids for {text!r}; nothing was exported')


def logits_of_transformers(tokenizer, folder: Path, ids):
    """The logits that transformers computes from a folder. Stops if its tokenizer differs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()
    again = AutoTokenizer.from_pretrained(folder)
    check_ids(tokenizer, lambda text: again(text, add_special_tokens=False).input_ids,
              f'{folder}: in transformers the tokenizer')
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()(ids).logits


@torch.no_grad()
def main() -> dict:
    """Export; returns the folder and the differences that the comparison found."""
    check_choice(globals(), to=('hf',), dtype=('float32', 'bfloat16', 'float16'))
    check_bounds(globals())
    models.check_named(run_dir, 'export.py {}')
    folder = Path(export_dir or f'{run_dir.rstrip("/")}-hf')
    if folder.exists():
        stop(f'{folder} is there already; delete it, or give another --export_dir')
    model, tokenizer, state = models.load_run(run_dir, step)
    tmp = folder.with_name(f'.tmp-{folder.name}')
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        differences = export_hf(model, tokenizer, tmp, state.get('task') == 'chat')
        os.rename(tmp, folder)
    except (OSError, SafetensorError) as e:
        stop(f'{folder}: {e}; nothing was exported')
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f'{folder}: step {state["step"]} of {run_dir} as {hf.architecture(model.config)}, '
          f'{dtype}, {size / 1e6:,.1f} MB')
    for where, difference in differences.items():
        print(f'  {where}: ids equal, logits equal to {difference:.2g}')
    if 'in transformers' not in differences:
        print('  transformers is not installed here: not tried in it')
    return {'folder': str(folder), 'differences': differences}


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
