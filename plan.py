"""Before you spend: what to train, how, for how long and for how much; and the files to run it.

python plan.py                                     what every preset amounts to
python plan.py --params=7b --gpus=64 --gpu=h100    a model of this size: tokens, time, cost, layout
python plan.py --gpus=8 --hours=24                 the best model for what you have; or --budget=900
python plan.py config/7b.py --gpus=64              a preset on these GPUs
python plan.py --laptop                            what this machine can train in an hour
python plan.py fit out/l2 out/l3 out/l4 out/l5     a scaling law of your own runs

--write adds config/planned_<name>.py, and the files that start it on Slurm and Kubernetes. Flags
may also set whatever train.py knows (python train.py --help). In a pipe the last line is JSON.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

from core import device as hardware
from core.data import named
from core.formats import hf, hub
from core.net.weights import build_model
from core.planning import fit as fitting
from core.planning import launch, laws, layouts, machines, pictures
from core.planning.memory import Layout, checkpoint_bytes, step_memory
from core.planning.shape import LAYOUT, layout_settings, settings_for
from core.planning.wishes import Wishes, amount, shown
from core.run import checkpoint, models
from core.run.begin import adapted, check_settings, from_model, model_config, tokenizer_wanted
from core.settings import check_bounds, configure, read_settings, settings_of, stop
from model import GPTConfig, count_parameters, flops_per_token

CONFIG, CONFIGS, FLAGS, GIVEN = '', (), (), ()
POSITIONAL = ('what', 'folders')
ROOT = Path(__file__).parent

what = ''               # fit: a law of the runs in `folders`; '': a plan
folders = ''            # fit: finished runs of train.py
# what you wish: any of these; the rest follows
params = ''             # parameters: 125m, 7b
tokens = ''             # to train on: 300b; repeated ones count
flops = ''              # of training: 1e21
hours = 0.0             # of training, on all GPUs
budget = 0.0            # dollars for GPUs
target_loss = 0.0       # nats per token, on Chinchilla's scale: see core/planning/laws.py
data = ''               # a prepared dataset: its vocabulary, and how many tokens there are
# what you have
gpus = 0                # 0: 8, or 1 for a small model
gpu = 'h100'            # see core/planning/machines.py
price = 0.0             # dollars for a GPU's hour; 0: a rough one of 2025
mfu = 0.0               # part of the peak FLOP/s that training reaches; 0: as others measured it
storage_gb = 2.0        # gigabytes a second that checkpoints are written with, by all together
restart_minutes = 10.0  # from a failure until training goes on
laptop = False          # this machine, for one hour (or --hours)
# what comes of it
name = ''               # of the files; '': from the parameters
write = False           # write them


# ---------------------------------------------------------------------------------------------
# Presets


def load_preset(words: list[str], changed: dict | None = None) -> SimpleNamespace:
    """train.py's settings, those that are `changed` and then config files and flags applied. Stops
    where train.py would."""
    settings = read_settings(ROOT / 'train.py') | (changed or {})
    configure(settings, words)
    check_settings(settings)
    return SimpleNamespace(**settings)


def preset_config(preset: SimpleNamespace) -> GPTConfig:
    """The architecture that the settings of train.py describe, without data or weights."""
    made = named.made_folder(preset.dataset, preset.data_dir)
    n_tokens = named.read_meta(made).get('vocab_size', 0) if made and not preset.tokenizer else \
        named.count_tokens(preset.dataset, tokenizer_wanted(preset), preset.vocab_size)
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
    per_step = preset.batch_size * preset.block_size
    steps = 0 if preset.max_minutes else preset.max_steps
    per_token = flops_per_token(model, preset.block_size)
    return {'parameters': count_parameters(model), 'flops_per_token': per_token,
            'tokens_per_step': per_step, 'tokens': per_step * steps,
            'flops': per_token * per_step * steps}


def line(found: dict) -> str:
    """The figures that a preset states in its docstring."""
    return (f'{found["parameters"]:,} parameters, {found["flops_per_token"] / 1e6:,.2f} MFLOP per '
            f'token, {found["tokens_per_step"]:,} tokens per step')


def list_presets(words: list[str]) -> dict:
    """Print the figures of the preset that the words name, without words of all; by name."""
    presets = [words] if words else [[], *([str(path)] for path in sorted(
        (*ROOT.glob('config/*.py'), *ROOT.glob('config/scaling/*.py'))))]
    results = {}
    for words in presets:
        preset = load_preset(words)
        label = preset.CONFIG or 'gpt2'
        found = results[label] = figures(preset)
        in_all = f'; {found["tokens"] / 1e6:,.1f} million tokens, {found["flops"]:.2e} FLOP in all'
        print(f'{label}\n  {line(found)}' + in_all * bool(found['tokens']))
    return results


# ---------------------------------------------------------------------------------------------
# What to train


def settle(wishes: Wishes, serving: bool) -> tuple[float, float]:
    """N and D of the wishes; prints what the laws say of them, and with `serving` what smaller
    models that are as good would cost."""
    N, D = wishes.solve(laws.CORRECTED)
    law, C = laws.CORRECTED, 6 * N * D
    print(f'{shown(N)} parameters, {shown(D)} tokens ({D / N:,.1f} per parameter), {C:.2e} FLOP'
          f'\n  balanced for {shown(N)} parameters: '
          f'{shown(laws.tokens_by_table(N, 1))} tokens (Hoffmann et al. 2022, approach 1), '
          f'{shown(laws.tokens_by_table(N, 2))} (2), {shown(law.tokens_of(N))} (3, corrected)')
    print(f'  loss on Chinchilla\'s data {law.loss(N, D):.3f} nats per token; the best of these '
          f'FLOPs {law.loss(*law.optimum(C)):.3f}')
    if D > wishes.unique:
        repeated = laws.loss_repeated(law, N, D, wishes.unique)
        print(f'  {shown(wishes.unique)} tokens are different, each read {D / wishes.unique:.1f} '
              f'times: loss {repeated:.3f} (Muennighoff et al. 2023; up to 4 times cost little, '
              'beyond 16 more repeats bring nothing)')
    if serving:
        for part in (0.75, 0.5, 0.35):
            more, factor, served = laws.overtrained(law, N, D, part)
            if math.isinf(more):    # so few parameters never get there
                break
            dollars = factor * C / wishes.rate(part * N) / 3600 * wishes.price
            print(f'  as good: {shown(part * N)} parameters, {shown(more)} tokens, {factor:.2f} '
                  f'times the FLOPs (${dollars:,.0f}); pays from {shown(served)} served tokens on')
    return N, D


# ---------------------------------------------------------------------------------------------
# How, how long, for how much


def price_it(found: dict, card: machines.GPU, n_gpus: int, step_seconds: float) -> dict:
    """Print time, cost and energy of all steps; returns them."""
    seconds = step_seconds * found['tokens'] / found['tokens_per_step']
    gpu_hours, dollars = n_gpus * seconds / 3600, price or card.price
    least, most = machines.energy(card, gpu_hours)
    print(f'in the first of them, on {n_gpus} x {card.name}:\n'
          f'  {duration(seconds)}, {found["tokens"] / seconds:,.0f} tokens/s; {gpu_hours:,.0f} '
          f'GPU-hours at ${dollars:.2f} are ${gpu_hours * dollars:,.0f}; {least:,.0f} to '
          f'{most:,.0f} kWh')
    return {'hours': seconds / 3600, 'dollars': gpu_hours * dollars, 'kwh': [least, most]}


def save_it(found: dict, n_gpus: int, step_seconds: float, size: int) -> dict:
    """Print how often to save checkpoints of `size` bytes; returns it."""
    mean = machines.between_failures(n_gpus)
    # Training waits while tensors are copied, at 2 GB/s and with a second for the rest; then they
    # are written beside it.
    waits, writes = (1 + size / n_gpus / 2e9) / 3600, size / storage_gb / 1e9 / 3600
    every = max(machines.save_every(waits, mean), writes)
    part = machines.lost(waits, every, mean, restart_minutes / 60)
    steps = found['tokens'] // found['tokens_per_step']
    interval = min(steps, max(1, round(every * 3600 / step_seconds)))
    print(f'  a checkpoint of {size / 1e9:,.1f} GB every {duration(every * 3600)} ({interval:,} '
          f'steps): {n_gpus} GPUs fail once in {duration(mean * 3600)} (Llama 3\'s rate), so '
          f'{part:.1%} of the time is lost (Daly 2006)')
    return {'checkpoint_bytes': size, 'save_interval': interval, 'lost': part}


def duration(seconds: float) -> str:
    for unit, size in (('days', 86_400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * size:
            return f'{seconds / size:,.1f} {unit}'
    return f'{seconds:.0f} seconds'


def lay_out(preset: SimpleNamespace, found: dict, card: machines.GPU, n_gpus: int, fixed: dict
            ) -> tuple[list, list]:
    """Print the layouts that fit and are as `fixed` says, fastest first, and why the others do not.
    Stops if none does."""
    config = preset_config(preset)
    dtype = preset.dtype or ('float16' if card.name in ('V100', 'T4') else 'bfloat16')
    if dtype not in ('float16', 'bfloat16'):
        stop(f'dtype={dtype}: plans are for products in 16 bits; leave it out')
    part, source = (mfu, 'as you gave it') if mfu else machines.expected_mfu(
        card, found['parameters'])
    good, refused = layouts.choose(config, card, n_gpus, preset.batch_size, part,
                                   optimizer=preset.optimizer, dtype=dtype,
                                   n_parameters=found['parameters'],
                                   fixed=fixed)
    if not good:
        nearest = min(refused, key=lambda choice: sum(choice.memory.values()) or math.inf)
        if not nearest.memory:
            stop(nearest.refused)
        stop(f'gpus={n_gpus}: no layout of {shown(found["parameters"])} parameters fits '
             f'{card.name}s of {card.memory / 1e9:.0f} GB ({nearest.layout} {nearest.refused}); '
             'give more --gpus, a --gpu with more memory, or fewer --params')
    print(f'MFU of {part:.2g} without what a layout adds ({source})\n{len(good)} layouts fit, '
          'fastest first (GB and seconds a step are estimates):')
    for choice in good[:5]:
        parts = ', '.join(f'{k} {v:.2f}' for k, v in choice.parts.items() if v >= 0.005)
        print(f'  {choice.layout}, micro-batches of {choice.layout.rows}: '
              f'{sum(choice.memory.values()) / 1e9:.1f} GB, {choice.seconds:.2f} s ({parts})')
    reasons = {}        # alike but for their numbers
    for choice in refused:
        reasons.setdefault(re.sub(r'[\d,]+', '', choice.refused), []).append(choice)
    print(f'{len(refused)} do not:')
    for which in reasons.values():
        print(f'  {which[0].layout}: {which[0].refused}'
              + f' (and {len(which) - 1} more like it)' * (len(which) > 1))
    return good, refused


def plan(preset: SimpleNamespace | None, given: dict) -> dict:
    """Settle what to train, price it, lay it out; draw, and write the files if asked."""
    card = machines.find_gpu(gpu)
    if preset is None:
        wishes = Wishes.read(given | globals(), card)
        N, D = settle(wishes, not params)
        settings, groups = settings_for(N, D, data, given, wishes.allowed(N)[0])
        preset = load_preset([], settings)
        found = figures(preset)
        n_gpus = wishes.gpus_for(N, found['flops'])
    else:
        check_settings(vars(preset))
        groups = [(f'as in {", ".join(CONFIGS)} and as you gave it', {
            k: v for k, v in given.items() if k not in LAYOUT})]
        n_gpus, found = gpus or 8, figures(preset)
    if preset.arch != 'gpt':
        stop(f'arch={preset.arch}: plans are for GPTs')
    if not found['tokens']:
        stop(f'max_steps={preset.max_steps}, max_minutes={preset.max_minutes}: a plan needs a '
             'number of steps; give --max_steps, and --max_minutes=0')
    print(f'{line(found)}; {shown(found["tokens"])} tokens')
    good, refused = lay_out(preset, found, card, n_gpus, {
        k: v for k, v in given.items() if k in LAYOUT and k in FLAGS})
    cost = price_it(found, card, n_gpus, good[0].seconds)
    saving = save_it(found, n_gpus, good[0].seconds, checkpoint_bytes(
        preset_config(preset), preset.optimizer))
    label = name or 'planned_' + re.sub(r'\W', '_', CONFIG or shown(found['parameters']).lower())
    if pictures.draw(Path('out') / label, laws.CORRECTED, found, good[:8]):
        print(f'drawn: out/{label}/loss.png, out/{label}/memory.png')
    if write:
        write_plan(label, found, groups, good[0].layout, saving=saving, cost=cost, n_gpus=n_gpus)
    return found | cost | saving | {
        'layout': layout_settings(good[0].layout), 'layouts': len(good), 'refused': len(refused),
        'bytes': sum(good[0].memory.values()), 'seconds_per_step': good[0].seconds}


def write_plan(label, found, groups, layout, *, saving, cost, n_gpus) -> None:
    """Write the config, and what starts it on Slurm and Kubernetes."""
    per_machine = min(layouts.MACHINE, n_gpus)
    n_machines, over = divmod(n_gpus, per_machine)
    if over:
        stop(f'gpus={n_gpus}: files are for whole machines of {per_machine}; give a multiple of it')
    start = f'torchrun --nnodes={n_machines} --nproc_per_node={per_machine} train.py'
    summary = (f'Planned for {n_gpus} x {machines.find_gpu(gpu).name}: about '
               f'{duration(cost["hours"] * 3600)}.\n\n'
               f'{start} config/{label}.py\n\n{line(found)}')
    groups = [*groups, (f'on {n_gpus} GPUs: {layout}', layout_settings(layout)),
              ('as often as failures want it (Daly 2006)',
               {'save_interval': saving['save_interval']})]
    text = launch.config_text(summary, groups)
    size = label, n_machines, per_machine
    launch.write_files(ROOT, {
        f'config/{label}.py': text, f'cluster/{label}.yaml': launch.kubernetes_text(*size),
        f'cluster/{label}.sbatch': launch.slurm_text(*size, cost['hours'])})


# ---------------------------------------------------------------------------------------------
# This machine, and your own runs


def plan_laptop(given: dict) -> dict:
    """Measure this machine, and plan for an hour on it."""
    dev = hardware.choose(given.get('device', ''), given.get('dtype', ''), threads=given.get(
        'threads', 0))
    limit = hardware.matmul_rate(dev.name, dev.dtype, 2048 if dev.kind == 'cpu' else 8192)
    seconds = (hours or 1.0) * 3600

    def planned(rate: float):
        allowed = {'flops': flops or f'{rate * seconds:e}', 'hours': 0.0}
        wishes = Wishes.read(given | globals() | allowed, machines.GPUS['t4'])
        settings, groups = settings_for(*wishes.solve(laws.CORRECTED), data, {
            'batch_size': 8, **given, 'max_minutes': seconds / 60})
        return wishes, load_preset([], settings), groups
    # the size depends on the rate, which depends on the size
    rate = 0.3 * limit
    for _ in range(2):
        preset = planned(rate)[1]
        rate = machines.block_rate(preset_config(preset), preset.batch_size, dev)
    wishes, preset, groups = planned(rate)
    print(*dev.why[:2], f'products of matrices {limit / 1e9:,.0f} GFLOP/s, blocks of this model '
          f'{rate / 1e9:,.0f} ({rate / limit:.0%}), measured; {duration(seconds)} are '
          f'{rate * seconds:.1e} FLOP', sep='\n')
    N, D = settle(wishes, False)
    found, label = figures(preset), name or f'planned_laptop_{shown(N).lower()}'
    layout = Layout(rows=preset.batch_size)
    needed = sum(step_memory(preset_config(preset), layout, dev.dtype, dev.kind,
                             preset.optimizer).values())
    print(f'{line(found)}\nthe step takes {needed / 1e9:.2f} GB; the schedule follows the clock')
    if write:
        text = launch.config_text(f'Planned for {duration(seconds)} on this machine.\n\npython '
                                  f'train.py config/{label}.py\n\n{line(found)}', groups)
        launch.write_files(ROOT, {f'config/{label}.py': text})
    return found | {'matmul_rate': limit, 'rate': rate, 'bytes': needed}


def fit_runs() -> dict:
    """Fit a law to finished runs, and say what a larger run would reach."""
    if not folders:
        stop('fit: give run directories of train.py, such as out/l2 out/l3')
    runs = fitting.read_runs([folder for folder in folders.split(',') if folder])
    form = fitting.best_form(runs)
    fitted = fitting.fit(runs, form)
    for label, N, D, C, loss, off in zip(runs.names, runs.N, runs.D, runs.C, runs.loss,
                                         fitted.residuals):
        print(f'{label}: {shown(N)} parameters, {shown(D)} tokens, {C:.2e} FLOP, loss {loss:.4f} '
              f'({off:+.2%} beside the law)')
    print(f'a law of {form}, with 95% intervals of the bootstrap:')
    constants = fitted.constants()
    for label, (value, low, high) in constants.items():
        print(f'  {label} {value:.4g} ({low:.4g} to {high:.4g})')
    targets, law = [], fitted.law()
    for C in [amount(flops, 'flops')] if flops else [4 * runs.C.max(), 16 * runs.C.max()]:
        if law and min(law.alpha, law.beta) <= 0:
            stop('the loss does not fall with both parameters and tokens, so nothing is foretold; '
                 'leave out runs that learnt their data by heart')
        amounts = law.optimum(C) if law else (C,)
        loss, low, high = fitted.predict(*amounts)
        targets.append((C, loss, low, high))
        print(f'{C:.2e} FLOP, {C / runs.C.max():.1f} times the largest run: loss {loss:.4f}, a '
              f'new run with 95% between {low:.4f} and {high:.4f}')
    path = Path('out/fit/law.png')
    if pictures.draw_fit(path, runs, fitted, targets):
        print(f'drawn: {path}')
    return {'form': form, 'constants': constants, 'predictions': targets}


def main(train: dict | None = None) -> dict:
    """Plan, fit, or list the presets, with `train` as train.py's settings; returns what the last
    line prints."""
    train = read_settings(ROOT / 'train.py') if train is None else train
    given = {k: v for k, v in train.items() if k in GIVEN}
    check_bounds(globals(), gpus=(0, 100_000), hours=(0, 1e6), budget=(0, 1e12), price=(0, 1e4),
                 mfu=(0, 1), target_loss=(0, 100), storage_gb=(1e-3, 1e6),
                 restart_minutes=(0, 1e6))
    check_bounds(train, block_size=(1, 1 << 24))
    if not re.fullmatch(r'([A-Za-z]([A-Za-z0-9_-]{0,48}[A-Za-z0-9])?)?', name):
        stop(f'name={name}: must be letters, digits, - and _, and begin with a letter')
    if what not in ('', 'fit'):
        stop(f'{what}: unexpected word; plan.py takes a config file, or fit and run directories')
    own = {*FLAGS} & {*settings_of(globals())}
    if what == 'fit':
        result = fit_runs()
    elif laptop:
        if clash := own & {'gpus', 'budget', 'target_loss', 'params', 'tokens', 'price'}:
            stop(f'{min(clash)}: with --laptop only --hours, --flops and --data say how much')
        result = plan_laptop(given)
    elif CONFIGS or not own:
        if clash := own & {'params', 'tokens', 'flops', 'target_loss', 'data', 'budget',
                              'hours'}:
            stop(f'{min(clash)}: {", ".join(CONFIGS)} says what is trained; leave one of the two '
                 'out, or change it with flags of train.py')
        result = plan(SimpleNamespace(**train), given) if own else list_presets(sys.argv[1:])
    else:
        result = plan(None, given)
    if not sys.stdout.isatty():     # for programs; people have read it
        print(json.dumps(result))
    return result


if __name__ == '__main__':
    settings = read_settings(ROOT / 'train.py')
    configure(globals(), sys.argv[1:], also=settings)
    main(settings)
