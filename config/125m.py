"""A modern model of GPT-2's size: Qwen3's architecture, Muon.

torchrun --nproc_per_node=8 train.py config/125m.py

12 blocks of 4 x 768^2 (attention) + 3 x 768 x 2,048 (MLP), and one table of 50,304 x 768:
123,588,864 parameters, 854.65 MFLOP per token, 524,288 tokens per step
4,700 steps are 2.5 billion tokens, 20 per parameter (Hoffmann et al. 2022), a quarter of an epoch.
The rates are starting values, not tuned at this size.
"""
dataset = 'openwebtext'

batch_size = 512
max_steps = 4700

n_layer = 12
n_head = 12
n_kv_head = 12
n_embd = 768
n_hidden = 2048
norm = 'rmsnorm'
norm_eps = 1e-6
position = 'rope'
rope_theta = 10_000.0
mlp = 'swiglu'
qk_norm = True
tied = True
bias = False

optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 1e-3
embed_learning_rate = 3e-3
weight_decay = 0.0
muon_weight_decay = 0.05
schedule = 'wsd'
min_lr_fraction = 0.0
warmup_steps = 100
