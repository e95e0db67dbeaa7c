"""A character-level GPT on tiny Shakespeare, for two CPU cores in two minutes.

python train.py config/shakespeare.py

The text has 1,003,854 characters to train on. A step reads 8 x 256 = 2,048 of them, so an epoch
is 490 steps and the 1,800 steps below are 3.7 epochs: too few to overfit.
3 blocks of 4 x 128 x 128 (attention) + 3 x 128 x 344 (MLP), and two tables of 70 x 128:
611,904 parameters, 4.79 MFLOP per token, 2,048 tokens per step
Of the FLOPs 6 x 0.60 million are those of the weights, 1.18 million attention over 256 characters.
"""
dataset = 'shakespeare'
fallback_dataset = 'python_char'    # no network: learn to write Python instead, and say so

batch_size = 8
block_size = 256        # context pays: 128 ends 0.02 higher at equal time

# Qwen3's architecture in small: everything here can be exported.
n_layer = 3             # in two minutes; 6 in ten: config/shakespeare_best.py
n_head = 4              # of 32 channels: two of 64 end 0.02 higher
n_embd = 128
norm = 'rmsnorm'
norm_eps = 1e-6
position = 'rope'
mlp = 'swiglu'
qk_norm = True
tied = False
bias = False

# Muon for the matrices inside the blocks, AdamW with large rates for the rest.
optimizer = 'muon'
muon_learning_rate = 0.04
muon_momentum = 0.9
learning_rate = 0.006
embed_learning_rate = 0.03
weight_decay = 0.0
muon_weight_decay = 0.05
grad_clip = 0.0         # Muon's steps have a fixed size, whatever the gradient's

max_steps = 1800
schedule = 'wsd'
warmup_steps = 20
decay_fraction = 0.7    # falling for the last 70% of the steps
min_lr_fraction = 0.02

eval_interval = 400
