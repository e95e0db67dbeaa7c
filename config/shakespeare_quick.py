"""As good as nanoGPT's CPU recipe for tiny Shakespeare, as soon as possible.

python bench.py race config/shakespeare_quick.py --vs=<checkout of nanoGPT>

config/shakespeare.py with the short windows of that recipe, and no time to compile:
810,112 parameters, 5.19 MFLOP per token, 1,024 tokens per step
"""
from config.shakespeare import *  # noqa: F403

batch_size = 16
block_size = 64
compile = False

learning_rate = 0.006
embed_learning_rate = 0.03
muon_momentum = 0.9
max_steps = 260
warmup_steps = 10
eval_interval = 130
