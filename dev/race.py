"""Who reaches a loss sooner: python dev/race.py [config] --vs=<checkout of nanoGPT>.

nanoGPT's recipe is trained from random weights to its end; ours is trained until its validation
loss is as low. The seconds, tokens and FLOPs of both are compared: first with nanoGPT's own
settings, then with the best of some learning rates for it. Both are evaluated on the whole
validation split of the same data. Evaluation stops the clock.

Presets and flags may set whatever train.py knows. In a pipe or a file the last line is JSON.
"""
import functools
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # the project's folder
import core.start  # noqa: E402, F401  it comes first, before torch

# isort: split
import torch
from tqdm import tqdm

import bench
from core.data.chosen import get_data
from core.data.dataset import IGNORE, Tokens, Windows, load_split
from core.data.named import read_meta
from core.net import optim
from core.ranks import parallel
from core.ranks.processes import Ranks, share
from core.run.learner import to_device
from core.settings import check_bounds, check_choice, configure, read_settings, stop
from dev import peers
from model import flops_per_token
from train import train_step

vs = ''                     # the peer: a checkout of nanoGPT
recipe = 'cpu'              # nanoGPT's for tiny Shakespeare on a cpu or gpu, or the preset's own
                            # sizes: same
seeds = 3                   # times that each side runs
peer_learning_rates = '2e-3,4e-3,8e-3'  # of which the best is its tuned one; '': only stock
stock_steps = 0             # our max_steps against nanoGPT's recipe; 0: the preset's
tuned_steps = 0             # ... against its tuned learning rate; 0: the preset's
eval_every = 10             # steps of ours between two evaluations
plot = False                # draw the losses: out/bench-race.png


def race_windows(setting: peers.NanoRecipe, data: Path) -> Windows:
    """The whole validation split, as both sides are looked at."""
    return Windows(Tokens(data, 'val'), setting.block_size, shuffle=False)


@torch.no_grad()
def whole_loss(loss_sum, windows: Windows, dev) -> float:
    """Nats per token over all windows of a split, each target once; loss_sum(x, y)."""
    nats, n = 0.0, 0
    for i in range(0, len(windows), 64):
        x, y, _ = to_device(windows.batch(range(i, min(i + 64, len(windows)))), dev)
        nats += float(loss_sum(x, y))
        n += int((y != IGNORE).sum())
    return nats / n


def clocked(do_step, look, n_steps: int, every: int, dev, target: float = -math.inf) -> dict:
    """Steps until look(), the loss, is not above the target, or the last one. The clock stands
    still while it looks: after every so many steps, and at the end."""
    curve, seconds, first, done = [], 0.0, 0.0, 0
    bar = tqdm(total=n_steps, unit='step', leave=False)
    for end in sorted({1, *range(every, n_steps, every), n_steps}):
        todo = range(done, end)
        seconds += bench.seconds_of(lambda todo=todo: [do_step(i) for i in todo], dev)
        first, done = first or seconds, end
        bar.update(len(todo))
        if end % every == 0 or end == n_steps:
            curve.append((end, seconds, look()))
            if curve[-1][-1] <= target:
                break
    bar.close()
    return {'loss': curve[-1][-1], 'seconds': seconds, 'first_step_seconds': first, 'steps': done,
            'curve': curve}


def run_peer(folder: str, setting: peers.NanoRecipe, data: Path, dev, seed: int) -> dict:
    """nanoGPT's recipe to its end."""
    tokens = Tokens(data, 'train')
    ids = tokens.shards[0] if len(tokens.shards) == 1 else tokens.read(0, len(tokens))
    windows = race_windows(setting, data)
    peer = peers.NanoGPT(folder, setting, read_meta(data)['max_id'] + 1, dev, seed)

    def do_step(i):
        peer.step([peer.batch(ids)], setting.factor(i))

    def look():
        peer.model.eval()
        try:
            return whole_loss(peer.loss_sum, windows, peer.dev)
        finally:
            peer.model.train()
    found = clocked(do_step, look, setting.max_iters, max(1, setting.max_iters // 10), peer.dev)
    return counted(found, setting.batch_size * setting.block_size, peer.flops_per_token())


def run_ours(preset, config, data: Path, windows: Windows, dev, seed: int, max_steps: int,
             target: float) -> dict:
    """Our preset, up to the first look at which its loss is not above the target."""
    max_steps = max_steps or preset.max_steps
    learner = bench.our_learner(preset, config, dev, seed)
    train_windows = load_split(data, 'train', preset.block_size, seed)
    at_once = bench.rows_at_once(preset, learner)

    def do_step(i):
        factor = optim.schedule(i, max_steps, preset.schedule, preset.warmup_steps,
                                preset.decay_fraction, preset.min_lr_fraction)
        batches = [train_windows.batch(samples) for samples in share(
            i * preset.batch_size, preset.batch_size, 0, 1, at_once)]
        train_step(learner, batches, i, factor)

    def look():
        with parallel.looking_on(learner.model), dev.autocast():
            return whole_loss(lambda x, y: learner.model(x, y, reduction='sum'), windows, dev)
    found = clocked(do_step, look, max_steps, eval_every, dev, target)
    return counted(found, preset.batch_size * config.block_size, flops_per_token(learner.model))


def counted(found: dict, tokens_per_step: int, flops: int) -> dict:
    """With tokens and FLOPs."""
    tokens = found['steps'] * tokens_per_step
    return found | {'tokens': tokens, 'flops': tokens * flops}


def tell(name: str, found: dict) -> None:
    print(f'{name:24} loss {found["loss"]:.4f} after {found["seconds"]:.1f} s of training (first '
          f'step {found["first_step_seconds"]:.1f}), {found["steps"]:,} steps, '
          f'{found["tokens"]:,} tokens, {found["flops"] / 1e12:.2f} TFLOP')


def peer_recipe(preset, config, dev) -> peers.NanoRecipe:
    """What nanoGPT does in the race."""
    if recipe != 'same':
        return peers.NANO_RECIPES[recipe]
    return peers.NanoRecipe(
        config.n_layer, config.n_head, config.n_embd, config.block_size, preset.batch_size,
        preset.max_steps, warmup_iters=preset.max_steps // 20, compile=dev.compile, autocast=True)


def main(preset: dict | None = None) -> dict:
    """How soon ours has the loss with which nanoGPT ends: with its own settings, and with the best
    of some learning rates."""
    check_choice(globals(), recipe=(*peers.NANO_RECIPES, 'same'))
    check_bounds(globals(), seeds=(1, None), stock_steps=(0, None), tuned_steps=(0, None),
                 eval_every=(1, None))
    preset = bench.load_preset(preset)
    if not vs:
        stop('race: needs a peer: --vs=<checkout of nanoGPT>')
    peers.nanogpt_source(vs)    # before ours takes its time
    try:
        more_rates = [float(rate) for rate in filter(None, peer_learning_rates.split(','))]
    except ValueError:
        stop(f'peer_learning_rates={peer_learning_rates}: must be numbers with commas between '
             'them, like 2e-3,4e-3')
    dev = bench.choose_device(preset)
    data = get_data(preset, Ranks())[0]
    config, _ = bench.our_config(preset, data)
    stock = peer_recipe(preset, config, dev)
    windows = race_windows(stock, data)
    print(f'{data}: validation on all {windows.n_targets:,} targets in windows of '
          f'{stock.block_size}; evaluation stops the clock, compilation does not')

    @functools.cache
    def run_peer_at(rate, seed):
        setting = replace(stock, learning_rate=rate)
        found = peers.Apart(functools.partial, run_peer, vs, setting, data, dev, seed)()
        tell(f'nanogpt at {rate:g}, seed {seed}', found)
        return found
    rates = [stock.learning_rate, *more_rates]
    settings = {'stock': (stock.learning_rate, stock_steps)}
    if len(rates) > 1:
        best = min(rates, key=lambda rate: run_peer_at(rate, 1)['loss'])
        settings['tuned'] = best, tuned_steps
    result = {'what': 'race', 'device': dev.why, 'torch': torch.__version__, 'recipe': recipe}
    curves = {}
    for kind, (rate, max_steps) in settings.items():
        found = []
        for seed in range(1, seeds + 1):
            theirs = run_peer_at(rate, seed)
            ours = run_ours(preset, config, data, windows, dev, seed, max_steps, theirs['loss'])
            tell(f'ours, to {kind}, seed {seed}', ours)
            found.append((theirs, ours))
            curves |= {f'nanoGPT, {kind}': theirs['curve'], f'ours, to {kind}': ours['curve']}
        there = [ours['loss'] <= theirs['loss'] for theirs, ours in found]
        result[kind] = {'learning_rate': rate, 'reached': sum(there)}
        for spent in ('seconds', 'tokens', 'flops'):
            ratios = [theirs[spent] / ours[spent] for theirs, ours in found]
            result[kind][f'{spent}_ratio'] = round(statistics.median(ratios), 2)
            print(f'{kind} (learning rate {rate:g}): {spent} of nanoGPT over ours '
                  f'{bench.spread(ratios, 2)}')
        if not all(there):
            print(f'*** ours came to that loss in {sum(there)} of {seeds} races only ***')
        for side, i in (('nanogpt', 0), ('ours', 1)):
            result[kind][side] = {name: statistics.median(pair[i][name] for pair in found) for name
                                  in ('loss', 'seconds', 'first_step_seconds', 'tokens', 'flops')}
    if plot:
        bench.draw('race', [('seconds of training', 'validation loss', {
            name: ([s for _, s, _ in curve], [loss for *_, loss in curve])
            for name, curve in curves.items()})])
    return bench.report(result)

if __name__ == '__main__':
    settings = read_settings(bench.TRAIN)
    configure(globals(), sys.argv[1:], also=settings)
    main(settings)
