"""One billion parameters: Qwen3's architecture, Muon.

torchrun --nproc_per_node=8 train.py config/1b.py

18 blocks of 2,048 x (2 x 2,048 + 2 x 1,024) (attention, 16 heads of 128, 8 of keys and values) +
3 x 2,048 x 6,144 (MLP), and one table of 50,304 x 2,048:
1,009,072,640 parameters, 6,959.92 MFLOP per token, 1,048,576 tokens per step
19,000 steps are 20 billion tokens, 20 per parameter, 2.2 epochs. In memory 16 bytes per parameter
(weights, gradient, AdamW's moments; Muon has one) make 16 GB. The rates are not tuned at this size.
"""
dataset = 'openwebtext'

batch_size = 512
block_size = 2048
max_steps = 19_000
activation_checkpointing = True

n_layer = 18
n_head = 16
n_kv_head = 8
n_embd = 2048
n_hidden = 6144
norm = 'rmsnorm'
norm_eps = 1e-6
position = 'rope'
rope_theta = 100_000.0
mlp = 'swiglu'
qk_norm = True
tied = True
bias = False

optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 6e-4
embed_learning_rate = 2e-3
weight_decay = 0.0
muon_weight_decay = 0.05
schedule = 'wsd'
min_lr_fraction = 0.0
warmup_steps = 500
