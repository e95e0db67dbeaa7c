"""A trained model for other programs: python export.py out/shakespeare --to=gguf.

--to=hf writes a Hugging Face folder that transformers 4 and 5 load without any code of ours;
--to=gguf one file for llama.cpp, quantized if --dtype says so; --to=ollama that file with a
Modelfile for `ollama create`. What was written is read back and compared with the model before it
gets its name; --check also asks llama.cpp (pip install xllamacpp) for the same tokens.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import contextlib
import importlib.util
import math
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import torch
from safetensors import SafetensorError

from core.data import card
from core.formats import gguf, hf
from core.read.download import locked
from core.run import models
from core.settings import check_bounds, check_choice, configure, stop

POSITIONAL = ('run_dir',)

run_dir = ''            # a run such as out/shakespeare, a Hugging Face folder, or a GGUF file
to = 'hf'               # the format: hf, gguf or ollama
step = 0                # which checkpoint; 0: the best one
export_dir = ''         # where to; '': <run_dir>-hf, <run_dir>-<dtype>.gguf or <run_dir>-ollama
dtype = ''              # of the weights: f32, f16, bf16; gguf: q8_0, q5_1, q5_0, q4_1, q4_0, too;
                        # '': f32 for hf, f16 for gguf
shard_gb = 5.0          # hf: most gigabytes of weights in one file
check = False           # gguf: whether llama.cpp, if it is installed, is to say the same tokens

DTYPES = {'f32': 'float32', 'f16': 'float16', 'bf16': 'bfloat16'}

# Texts that both tokenizers must encode alike: spaces, digits, contractions, scripts, emoji.
PROBES = ("It's 12,345 words: DON'T\n\n\t  stop…\r\n", 'naïve façade Ωμέγα 漢字かな हिन्दी',
          '👩‍🚀 x_y(); ', '  lead and trail  ', '\x00\x7f\u2028\u3000')


def export_hf(model, tokenizer, folder: Path, as_: str, state: dict) -> dict:
    """Write, read back, compare; returns the largest differences of logits that were found."""
    hf.save(model, tokenizer, folder, DTYPES[as_], int(shard_gb * 1e9),
            chat=state['task'] == 'chat', labels=state.get('labels', ()))
    for p in model.parameters():    # the file holds the weights rounded to dtype
        p.data = p.data.to(getattr(torch, DTYPES[as_])).float()
    ids = some_ids(model, tokenizer)
    found, again, _ = hf.load(folder)
    known = dict(found.named_parameters())
    for name, p in model.named_parameters():
        if not torch.equal(known[name], p):
            stop(f'{folder}: {name} is not what was written; nothing was exported')
    logits = model(ids)
    differences = {'read back': (logits - found(ids)).abs().max().item()}
    check_ids(tokenizer, again.encode, f'{folder}: the tokenizer that was written')
    if importlib.util.find_spec('transformers'):
        theirs = logits_of_transformers(model.config, tokenizer, folder, ids)
        mine = logits[:, -1] if model.config.n_classes else logits
        differences['in transformers'] = (mine - theirs).abs().max().item()
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


def logits_of_transformers(config, tokenizer, folder: Path, ids):
    """The logits that transformers computes from a folder (a classifier's: of the last token).
    Stops if its tokenizer differs."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from transformers.utils import logging
    logging.disable_progress_bar()
    again = AutoTokenizer.from_pretrained(folder)
    check_ids(tokenizer, lambda text: again(text, add_special_tokens=False).input_ids,
              f'{folder}: in transformers the tokenizer')
    kind = AutoModelForSequenceClassification if config.n_classes else AutoModelForCausalLM
    return kind.from_pretrained(folder).float().eval()(ids).logits


def some_ids(model, tokenizer) -> torch.Tensor:
    """(2, T) random ids of text, for logits that can be compared."""
    return tokenizer.first + torch.randint(
        len(tokenizer.ordinary), (2, min(64, model.config.block_size)),
        generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------
# GGUF

N_CHECKED = 40      # tokens that llama.cpp is to say


def export_gguf(model, tokenizer, path: Path, as_: str, chat: bool) -> dict:
    """Write, read back, compare; returns the largest differences of logits that were found."""
    gguf.save(model, tokenizer, path, as_, chat, Path(run_dir).stem)
    found, again, read = gguf.load(path)
    check_ids(tokenizer, again.encode, f'{path}: the tokenizer that was written')
    if (read['task'] == 'chat') != chat:
        stop(f'{path}: its chat template cannot be used; nothing was exported')
    ids = some_ids(model, tokenizer)
    n = len(tokenizer)      # ids behind them are padding
    difference = (model(ids) - found(ids))[..., :n].abs().max().item()
    if not difference <= (1e-3 if as_ == 'f32' else math.inf):
        stop(f'{path}: read back, logits differ by {difference:g}; nothing was exported')
    differences = {'read back': difference}
    if check:
        prompt = tokenizer.prompt('The ')
        if (theirs := said_by_llama_cpp(path, prompt)) is None:
            print('  xllamacpp is not installed here: not tried in llama.cpp')
        else:
            same = count_same(found, tokenizer, prompt, theirs)
            differences['in llama.cpp'] = f'{same} of {len(theirs)} greedy tokens are the same'
            if as_ == 'f32' and same < len(theirs):
                stop(f'{path}: llama.cpp says only the first {same} of {len(theirs)} greedy tokens '
                     'as we do; nothing was exported')
    return differences


def said_by_llama_cpp(path: Path, prompt: list[int]) -> list[int] | None:
    """The ids that llama.cpp adds greedily to a prompt; None if it is not installed."""
    if not importlib.util.find_spec('xllamacpp'):
        return None
    xllamacpp = importlib.import_module('xllamacpp')    # compiled: nothing says its types
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 512, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, 1      # it tells errors only
    found = xllamacpp.Server(params).handle_completions({
        'prompt': prompt, 'n_predict': N_CHECKED, 'temperature': 0, 'ignore_eos': True,
        'return_tokens': True, 'verbose': True})
    return found['__verbose']['tokens']


def count_same(model, tokenizer, prompt: list[int], theirs: list[int]) -> int:
    """How many of their greedy ids, from the first on, our model finds best, too, if it may not end
    the text either; two ids whose logits differ by less than 0.01 are as good."""
    logits = model(torch.tensor([prompt + theirs]))[0, len(prompt) - 1:-1]
    ends = tokenizer.template.ends if tokenizer.template else {tokenizer.special.get('<|end|>')}
    logits[:, [i for i in {tokenizer.eos, *ends} if i is not None]] = -math.inf
    worse = logits.max(dim=-1).values - logits.gather(1, torch.tensor(theirs)[:, None])[:, 0]
    return int((worse < 0.01).cumprod(0).sum())


def write_ollama(folder: Path, tokenizer, as_: str, chat: bool) -> None:
    """A Modelfile beside the model: Ollama reads template and end tokens from the model's file."""
    lines = [f'FROM ./model-{as_}.gguf', 'PARAMETER temperature 0.8']
    if chat:
        names = {i: name for name, i in tokenizer.special.items()}
        lines += [f'PARAMETER stop "{names[i]}"' for i in sorted(tokenizer.turn_ends())
                  if i in names]
    else:
        lines.append('TEMPLATE {{ .Prompt }}')      # it continues text
    (folder / 'Modelfile').write_text('\n'.join(lines) + '\n', encoding='utf-8')


# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def main() -> dict:
    """Export; returns where it is and the differences that the comparison found."""
    check_choice(globals(), to=('hf', 'gguf', 'ollama'))
    as_ = {name: short for short, name in DTYPES.items()}.get(dtype, dtype) or (
        'f32' if to == 'hf' else 'f16')
    check_choice({'dtype': as_}, dtype=gguf.DTYPES if to != 'hf' else tuple(DTYPES))
    check_bounds(globals())
    models.check_named(run_dir, 'export.py {}')
    base = run_dir.rstrip('/').removesuffix('.gguf')
    ending = {'hf': '-hf', 'gguf': f'-{as_}.gguf', 'ollama': '-ollama'}[to]
    target = Path(export_dir or base + ending)
    if target.exists():
        stop(f'{target} is there already; delete it, or give another --export_dir')
    model, tokenizer, state = models.load_run(run_dir, step, classifier=None)
    state = {'task': '', **state}
    chat, tmp = state['task'] == 'chat', target.with_name(f'.tmp-{target.name}')
    if model.config.n_classes and to != 'hf':
        stop(f'to={to}: {run_dir} is a classifier, and llama.cpp has none with such a head; use '
             '--to=hf')
    lock = hold(target)
    remove(tmp)
    try:
        facts = [f'step {state["step"]} of {run_dir}, exported as {as_}']
        if to == 'hf':
            differences = export_hf(model, tokenizer, tmp, as_, state)
        elif to == 'gguf':
            differences = export_gguf(model, tokenizer, tmp, as_, chat)
        else:
            tmp.mkdir(parents=True)
            differences = export_gguf(model, tokenizer, tmp / f'model-{as_}.gguf', as_, chat)
            write_ollama(tmp, tokenizer, as_, chat)
        if to != 'gguf':
            facts += [f'{where}: {said(found)}' for where, found in differences.items()]
            card.write_card(tmp, run_dir, state, model, facts)
        os.rename(tmp, target)
    except (OSError, SafetensorError) as e:
        stop(f'{target}: {e}; nothing was exported')
    finally:
        remove(tmp)
        lock.close()
    files = [target] if target.is_file() else list(target.iterdir())
    size = sum(path.stat().st_size for path in files)
    print(f'{target}: step {state["step"]} of {run_dir} as {hf.architecture(model.config)}, {as_}, '
          f'{size / 1e6:,.1f} MB')
    for where, found in differences.items():
        print(f'  {where}: {said(found)}')
    if to == 'hf' and 'in transformers' not in differences:
        print('  transformers is not installed here: not tried in it')
    if to == 'ollama':
        print(f'next: ollama create {target.name} -f {target}/Modelfile')
    if to == 'gguf':
        print(f'K-quants are made by llama.cpp: llama-quantize {target} {base}-q4_k_m.gguf Q4_K_M')
    return {'folder': str(target), 'differences': differences}


def hold(target: Path):
    """The lock of what is exported, until it is closed. Stops if another process has it: the two
    would write into one temporary folder."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return locked(target.with_name(f'.{target.name}.lock'), wait=False)
    except BlockingIOError:
        stop(f'{target} is being exported by another process; wait for it, or give another '
             '--export_dir')
    except OSError as e:
        stop(f'{target}: {e}; nothing was exported')


def said(found: float | str) -> str:
    """A comparison in words."""
    return found if isinstance(found, str) else f'ids equal, logits differ by {found:.2g} at most'


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
