"""Jane Austen's complete works: from gibberish to prose.

python train.py config/austen.py

Seven novels from Project Gutenberg, 4.2 million characters; a BPE of 4,096 makes 969,147 tokens to
train on of them, 3.9 characters each. A step reads 8 x 256 of them, so an epoch is 473 steps.
8 blocks of 4 x 384^2 (attention) + 3 x 384 x 1,024 (MLP), and one table of 4,096 x 384:
15,736,192 parameters, 103.81 MFLOP per token, 2,048 tokens per step
Every 100 steps it writes a few lines into the terminal and the log. It has 16 parameters for
each token to train on, and would soon begin to learn by heart: 1,200 steps are 2.5 epochs.
"""
dataset = 'austen'

batch_size = 8
block_size = 256

n_layer = 8
n_head = 6
n_embd = 384
norm = 'rmsnorm'
norm_eps = 1e-6
position = 'rope'
mlp = 'swiglu'
qk_norm = True
tied = True
bias = False

optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 1e-3
embed_learning_rate = 3e-3
weight_decay = 0.0
muon_weight_decay = 0.1

max_steps = 1200
schedule = 'wsd'
warmup_steps = 20
decay_fraction = 0.7
min_lr_fraction = 0.02

eval_interval = 200
sample_interval = 100
sample_tokens = 100
