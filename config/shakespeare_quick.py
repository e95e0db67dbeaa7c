"""As good as nanoGPT's CPU recipe for tiny Shakespeare, as soon as possible.

python dev/race.py config/shakespeare_quick.py --vs=<checkout of nanoGPT>

config/shakespeare.py with two layers, the short windows of that recipe, and no time to compile:
413,952 parameters, 2.62 MFLOP per token, 1,024 tokens per step
"""
from config.shakespeare import *  # noqa: F403

batch_size = 16
block_size = 64
compile = False

n_layer = 2

max_steps = 230
warmup_steps = 10
eval_interval = 115
