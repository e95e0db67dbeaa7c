"""The lowest loss on tiny Shakespeare that ten minutes of two CPU cores give.

python train.py config/shakespeare_best.py

config/shakespeare.py with 6 blocks:
1,205,760 parameters, 9.53 MFLOP per token, 2,048 tokens per step
2,800 steps are 5.7 epochs; so more weight decay.
"""
from config.shakespeare import *  # noqa: F403

n_layer = 6
muon_weight_decay = 0.1
max_steps = 2800
eval_interval = 700
