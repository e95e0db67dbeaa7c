"""Three billion parameters: Llama 3.2's shape with Qwen3's norms of queries and keys, Muon.

torchrun --nnodes=4 --nproc_per_node=8 train.py config/3b.py

28 blocks of 3,072 x (2 x 3,072 + 2 x 1,024) (attention, 24 heads of 128, 8 of keys and values) +
3 x 3,072 x 8,192 (MLP), and one table of 50,304 x 3,072:
2,973,288,448 parameters, 22,066.50 MFLOP per token, 2,097,152 tokens per step
28,000 steps are 59 billion tokens, 20 per parameter. In memory 16 bytes per parameter make 48 GB.
The rates are not tuned at this size.
"""
dataset = 'fineweb-edu'

batch_size = 512
block_size = 4096
max_steps = 28_000
activation_checkpointing = True

n_layer = 28
n_head = 24
n_kv_head = 8
n_embd = 3072
n_hidden = 8192
norm = 'rmsnorm'
norm_eps = 1e-6
position = 'rope'
rope_theta = 500_000.0
mlp = 'swiglu'
qk_norm = True
tied = True
bias = False

optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 4e-4
embed_learning_rate = 1e-3
weight_decay = 0.0
muon_weight_decay = 0.05
schedule = 'wsd'
min_lr_fraction = 0.0
warmup_steps = 1000
