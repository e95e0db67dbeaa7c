"""The smallest of five models of one shape, to fit a scaling law of your own.

python train.py config/scaling/l2.py

for L in 2 3 4 5 6; do python train.py config/scaling/l$L.py; done
python plan.py fit out/l2 out/l3 out/l4 out/l5 out/l6

L layers of 16 L channels, in heads of 16, read 10 bytes of Python's standard library for each of
their parameters. Both grow together, as compute-optimal training has it (Hoffmann et al. 2022).
Tokens are bytes, so that the tables of the vocabulary stay small. Batches grow with C^0.33, C the
FLOPs of a run (Bi et al. 2024): with equal ones the smallest run would have too few steps, and its
loss would lie above the line of the others.
2 blocks of 4 x 32 x 32 (attention) + 3 x 32 x 88 (MLP), and two tables of 261 x 32:
42,016 parameters, 0.40 MFLOP per token, 256 tokens per step
10 x 42,016 tokens are 1,641 steps.
"""
from config.shakespeare import *  # noqa: F403

dataset = 'python'
tokenizer = 'byte'
fallback_dataset = ''

n_layer = 2
n_head = 2
n_embd = 32

batch_size = 1
max_steps = 1641
eval_interval = 2000
