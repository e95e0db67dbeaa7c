"""What a minute of two CPU cores gives on tiny Shakespeare.

python train.py config/shakespeare_minute.py

config/shakespeare.py with 3 blocks, which buy more steps, and rates for a short run:
612,096 parameters, 4.79 MFLOP per token, 2,048 tokens per step
900 steps are 1.8 epochs. An interpolated Kneser-Ney model of 6 characters has a loss of 1.558.
"""
from config.shakespeare import *  # noqa: F403

n_layer = 3
muon_learning_rate = 0.03
muon_momentum = 0.9
learning_rate = 0.006
embed_learning_rate = 0.03
max_steps = 900
eval_interval = 450
