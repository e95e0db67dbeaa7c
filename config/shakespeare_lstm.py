"""The baseline: an LSTM on tiny Shakespeare, on the same batches and in the same time as the GPT.

python train.py config/shakespeare_lstm.py

2 layers of 8 x 256 x 256 weights, and two tables of 70 x 256:
1,088,512 parameters, 6.40 MFLOP per token, 2,048 tokens per step
1,750 steps take about as long as those of config/shakespeare.py.
"""
dataset = 'shakespeare'
fallback_dataset = 'python_char'

batch_size = 8
block_size = 256

arch = 'lstm'
n_layer = 2
n_embd = 256
tied = False

optimizer = 'adamw'
learning_rate = 4e-3
weight_decay = 0.0

max_steps = 1750
schedule = 'wsd'
warmup_steps = 20
decay_fraction = 0.7
min_lr_fraction = 0.02

eval_interval = 875
