"""GPT-2 medium on OpenWebText; bare `python train.py` is GPT-2 small, with the same settings else.

torchrun --nproc_per_node=8 train.py config/gpt2_medium.py

24 blocks of 12 x 1,024^2 weights, tables of 50,304 x 1,024 and 1,024 x 1,024:
354,871,296 parameters, 2,423.00 MFLOP per token, 491,520 tokens per step
20,000 steps are 9.8 billion tokens, 1.1 epochs, 28 tokens per parameter. The rates of this and of
the larger ones are those of GPT-3's models of these sizes (Brown et al. 2020, table 2.1).
"""
n_layer = 24
n_head = 16
n_embd = 1024
learning_rate = 3e-4
