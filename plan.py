"""Before you spend: what a preset amounts to. python plan.py, or python plan.py config/7b.py.

Without a preset it lists all of them. Parameters are counted on the meta device, which needs no
memory; FLOPs are those of a forward and a backward pass. Flags may set whatever train.py knows:
python train.py --help lists it.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from core.data import named
from core.formats import hf, hub
from core.net.weights import build_model
from core.run import checkpoint, models
from core.run.begin import adapted, check_settings, from_model, model_config, tokenizer_wanted
from core.settings import configure, read_settings, stop
from model import GPTConfig, count_parameters, flops_per_token

ROOT = Path(__file__).parent


def load_preset(words: list[str]) -> SimpleNamespace:
    """train.py's settings with config files and flags applied."""
    settings = read_settings(ROOT / 'train.py')
    configure(settings, words)
    check_settings(settings)
    return SimpleNamespace(**settings)


def preset_config(preset: SimpleNamespace) -> GPTConfig:
    """The architecture that the settings of train.py describe, without data or weights."""
    n_tokens = named.count_tokens(preset.dataset, tokenizer_wanted(preset), preset.vocab_size)
    init_from = preset.init_from
    if init_from in hub.GPT2_SIZES:  # known by heart
        n_layer, n_head, n_embd = hub.GPT2_SIZES[init_from]
        return adapted(preset, GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                                         vocab_size=50_257), n_tokens)
    if from_model(preset):
        folder = models.find_model(init_from, preset.data_dir, False, 'init_from')
        found = checkpoint.steps(folder)
        config = GPTConfig(**checkpoint.read_state(folder, found[-1])['config']) if found else \
            hf.read_config(folder)
        return adapted(preset, config, n_tokens)
    if not (preset.vocab_size or n_tokens):
        stop(f'dataset={preset.dataset}: how many characters it has is known when it is '
             'prepared; give --vocab_size or another --tokenizer')
    return model_config(preset, n_tokens)


def figures(preset: SimpleNamespace) -> dict:
    """Parameters, FLOPs per token, tokens per step and in all, FLOPs in all."""
    model = build_model(preset_config(preset), None, 'meta')
    tokens = preset.batch_size * preset.block_size
    steps = 0 if preset.max_minutes else preset.max_steps
    flops = flops_per_token(model, preset.block_size)
    return {'parameters': count_parameters(model), 'flops_per_token': flops,
            'tokens_per_step': tokens, 'tokens': tokens * steps, 'flops': flops * tokens * steps}


def line(found: dict) -> str:
    """The figures that a preset states in its docstring."""
    return (f'{found["parameters"]:,} parameters, {found["flops_per_token"] / 1e6:,.2f} MFLOP per '
            f'token, {found["tokens_per_step"]:,} tokens per step')


def main() -> dict:
    """Print the figures of the presets asked for; returns them by name."""
    words = sys.argv[1:]
    presets = [words] if words else [[], *([str(path)] for path in sorted(
        ROOT.glob('config/*.py')))]
    results = {}
    for words in presets:
        preset = load_preset(words)
        name = preset.CONFIG or 'gpt2'
        found = results[name] = figures(preset)
        in_all = f'; {found["tokens"] / 1e6:,.1f} million tokens, {found["flops"]:.2e} FLOP in all'
        print(f'{name}\n  {line(found)}' + in_all * bool(found['tokens']))
    if not sys.stdout.isatty():     # for programs; people have read it
        print(json.dumps(results))
    return results


if __name__ == '__main__':
    main()
