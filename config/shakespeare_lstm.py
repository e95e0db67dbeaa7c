"""The baseline: an LSTM language model on tiny Shakespeare, at config/shakespeare.py's time.

python train.py config/shakespeare_lstm.py
"""
dataset = 'shakespeare'
fallback_dataset = 'python_char'

batch_size = 32
block_size = 64
arch = 'lstm'
n_layer = 1
n_embd = 256            # 0.56 million parameters
tied = False
optimizer = 'adamw'
learning_rate = 4e-3
weight_decay = 0.0
max_steps = 2000
schedule = 'wsd'
warmup_steps = 20
decay_fraction = 0.7
min_lr_fraction = 0.02
eval_interval = 500
