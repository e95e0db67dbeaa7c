"""A character-level GPT on tiny Shakespeare for a GPU, of the size of nanoGPT's.

python train.py config/shakespeare_gpu.py

6 blocks of 4 x 384^2 (attention) + 3 x 384 x 1,024 (MLP), and two tables of 70 x 384:
10,676,352 parameters, 70.94 MFLOP per token, 16,384 tokens per step
The text has 1,003,854 characters to train on, so a step reads 1.6% of it and 1,500 steps are 24.5
epochs: hence dropout and weight decay. Not measured on a GPU yet.
"""
from config.shakespeare import *  # noqa: F403

batch_size = 64

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

muon_weight_decay = 0.1
max_steps = 1500
eval_interval = 250
