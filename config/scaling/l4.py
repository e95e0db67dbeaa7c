"""Model 3 of the five of config/scaling: see config/scaling/l2.py.

python train.py config/scaling/l4.py

4 blocks of 4 x 64 x 64 (attention) + 3 x 64 x 168 (MLP), and two tables of 261 x 64:
228,672 parameters, 2.05 MFLOP per token, 1,024 tokens per step
10 x 228,672 tokens are 2,233 steps.
"""
from config.scaling.l2 import *  # noqa: F403

n_layer = 4
n_head = 4
n_embd = 64

batch_size = 4
max_steps = 2233
