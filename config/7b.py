"""Seven billion parameters: Qwen3's architecture, Muon.

torchrun --nnodes=16 --nproc_per_node=8 train.py config/7b.py

32 blocks of 4,096 x (2 x 4,096 + 2 x 1,024) (attention, 32 heads of 128, 8 of keys and values) +
3 x 4,096 x 13,312 (MLP), and two tables of 50,304 x 4,096:
6,989,033,472 parameters, 47,138.73 MFLOP per token, 4,194,304 tokens per step
33,000 steps are 138 billion tokens, 20 per parameter. In memory 16 bytes per parameter make 112 GB:
more than one GPU has, so all of it is sharded (zero = 3). The rates are not tuned at this size.
"""
dataset = 'fineweb-edu'

zero = 3

batch_size = 1024
block_size = 4096
max_steps = 33_000
activation_checkpointing = True

n_layer = 32
n_head = 32
n_kv_head = 8
n_embd = 4096
n_hidden = 13312
norm = 'rmsnorm'
norm_eps = 1e-6
position = 'rope'
rope_theta = 500_000.0
mlp = 'swiglu'
qk_norm = True
tied = False
bias = False

optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 3e-4
embed_learning_rate = 1e-3
weight_decay = 0.0
muon_weight_decay = 0.05
schedule = 'wsd'
min_lr_fraction = 0.0
warmup_steps = 1000
