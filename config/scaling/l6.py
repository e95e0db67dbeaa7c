"""Model 5 of the five of config/scaling: see config/scaling/l2.py.

python train.py config/scaling/l6.py

6 blocks of 4 x 96 x 96 (attention) + 3 x 96 x 256 (MLP), and two tables of 261 x 96:
715,104 parameters, 5.90 MFLOP per token, 2,048 tokens per step
10 x 715,104 tokens are 3,492 steps.
"""
from config.scaling.l2 import *  # noqa: F403

n_layer = 6
n_head = 6
n_embd = 96

batch_size = 8
max_steps = 3492
