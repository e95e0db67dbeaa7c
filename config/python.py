"""A model that writes Python: the source of the standard library on this machine.

python train.py config/python.py

11 million characters; a BPE of 8,192 makes 2.6 million tokens to train on of them, 3.9 characters
each (more or less, with another version of Python). A step reads 8 x 256, so an epoch is 1,250.
6 blocks of 4 x 256^2 (attention) + 3 x 256 x 680 (MLP), and one table of 8,192 x 256:
6,807,552 parameters, 45.54 MFLOP per token, 2,048 tokens per step
"""
from config.austen import *  # noqa: F403

dataset = 'python'

n_layer = 6
n_head = 4
n_embd = 256
max_steps = 2000
eval_interval = 200
sample_interval = 200
