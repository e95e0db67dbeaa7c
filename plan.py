"""Before you spend: what a preset amounts to. python plan.py, or python plan.py config/7b.py.

Without a preset it lists all of them. Parameters are counted on the meta device, which needs no
memory; FLOPs are those of a forward and a backward pass. Flags may set whatever train.py knows.
"""
import importlib.util
import json
import sys
from pathlib import Path

import prepare
from core.formats import hf
from core.net.weights import build_model
from core.run import checkpoint, models
from core.settings import configure, stop
from model import GPTConfig, count_parameters, flops_per_token

ROOT = Path(__file__).parent


def load_preset(words: list[str]) -> dict:
    """A fresh copy of train.py's globals with config files and flags applied."""
    spec = importlib.util.spec_from_file_location('preset', ROOT / 'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    configure(vars(module), words)
    module.check_settings()
    return vars(module)


def preset_config(train: dict) -> GPTConfig:
    """The architecture that the settings of train.py describe, without data or weights."""
    n_tokens = prepare.count_tokens(train['dataset'], train['tokenizer_wanted'](),
                                    train['vocab_size'])
    init_from = train['init_from']
    if init_from in hf.GPT2_SIZES:  # known by heart
        n_layer, n_head, n_embd = hf.GPT2_SIZES[init_from]
        return train['adapted'](GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                                          vocab_size=50_257), n_tokens)
    if train['from_model']():
        folder = models.find_model(init_from, train['data_dir'], False, 'init_from')
        found = checkpoint.steps(folder)
        config = GPTConfig(**checkpoint.read_state(folder, found[-1])['config']) if found else \
            hf.read_config(folder)
        return train['adapted'](config, n_tokens)
    if not (train['vocab_size'] or n_tokens):
        stop(f'dataset={train["dataset"]}: how many characters it has is known when it is '
             'prepared; give --vocab_size or another --tokenizer')
    return train['model_config'](n_tokens)


def figures(train: dict) -> dict:
    """Parameters, FLOPs per token, tokens per step and in all, FLOPs in all."""
    model = build_model(preset_config(train), None, 'meta')
    tokens = train['batch_size'] * train['block_size']
    steps = 0 if train['max_minutes'] else train['max_steps']
    flops = flops_per_token(model, train['block_size'])
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
        train = load_preset(words)
        name = train['CONFIG'] or 'gpt2'
        found = results[name] = figures(train)
        in_all = f'; {found["tokens"] / 1e6:,.1f} million tokens, {found["flops"]:.2e} FLOP in all'
        print(f'{name}\n  {line(found)}' + in_all * bool(found['tokens']))
    if not sys.stdout.isatty():     # for programs; people have read it
        print(json.dumps(results))
    return results


if __name__ == '__main__':
    if '--help' in sys.argv or '-h' in sys.argv:
        print(__doc__.strip() + '\n')
        load_preset(['--help'])
    main()
