"""The lowest loss on tiny Shakespeare that ten minutes of two CPU cores give.

python train.py config/shakespeare_best.py

config/shakespeare.py with 6 blocks:
1,205,760 parameters, 9.53 MFLOP per token, 2,048 tokens per step
4,500 steps are 9.2 epochs; so more weight decay.
"""
from config.shakespeare import *  # noqa: F403

n_layer = 6
muon_weight_decay = 0.1
max_steps = 4500
eval_interval = 900
