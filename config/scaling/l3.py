"""Model 2 of the five of config/scaling: see config/scaling/l2.py.

python train.py config/scaling/l3.py

3 blocks of 4 x 48 x 48 (attention) + 3 x 48 x 128 (MLP), and two tables of 261 x 48:
108,432 parameters, 1.02 MFLOP per token, 512 tokens per step
10 x 108,432 tokens are 2,118 steps.
"""
from config.scaling.l2 import *  # noqa: F403

n_layer = 3
n_head = 3
n_embd = 48

batch_size = 2
max_steps = 2118
