"""Seventy billion parameters: the shape of Llama 3 70B, AdamW.

torchrun --nnodes=128 --nproc_per_node=8 train.py config/70b.py

80 blocks of 8,192 x (2 x 8,192 + 2 x 1,024) (attention, 64 heads of 128, 8 of keys and values) +
3 x 8,192 x 28,672 (MLP), and two tables of 50,304 x 8,192:
69,276,540,928 parameters, 445,391.04 MFLOP per token, 8,388,608 tokens per step
165,000 steps are 1.4 trillion tokens, 20 per parameter. The 8 GPUs of a machine share each matrix,
and the 128 machines share what is left of it: 16 bytes per parameter, 1,108 GB, are 1.1 GB for each
of 1,024 GPUs, and a block that is being worked on takes 0.4 GB more. The rates are Llama 3's, not
tuned here; it has not been trained.
"""
dataset = 'fineweb-edu'

tp = 8
sequence_parallel = True
zero = 3
activation_checkpointing = True

batch_size = 2048
block_size = 4096
max_steps = 165_000

n_layer = 80
n_head = 64
n_kv_head = 8
n_embd = 8192
n_hidden = 28_672
norm = 'rmsnorm'
position = 'rope'
rope_theta = 500_000.0
mlp = 'swiglu'
tied = False
bias = False

learning_rate = 1.5e-4
warmup_steps = 2000
