"""Model 4 of the five of config/scaling: see config/scaling/l2.py.

python train.py config/scaling/l5.py

5 blocks of 4 x 80 x 80 (attention) + 3 x 80 x 216 (MLP), and two tables of 261 x 80:
430,000 parameters, 3.68 MFLOP per token, 1,536 tokens per step
10 x 430,000 tokens are 2,799 steps.
"""
from config.scaling.l2 import *  # noqa: F403

n_layer = 5
n_head = 5
n_embd = 80

batch_size = 6
max_steps = 2799
