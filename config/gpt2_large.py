"""GPT-2 large on OpenWebText.

torchrun --nproc_per_node=8 train.py config/gpt2_large.py

36 blocks of 12 x 1,280^2 weights, tables of 50,304 x 1,280 and 1,024 x 1,280:
774,090,240 parameters, 5,199.30 MFLOP per token, 491,520 tokens per step
20,000 steps are 9.8 billion tokens, 1.1 epochs, 13 tokens per parameter.
"""
n_layer = 36
n_head = 20
n_embd = 1280
learning_rate = 2.5e-4
activation_checkpointing = True
