"""GPT-2 XL on OpenWebText.

torchrun --nproc_per_node=8 train.py config/gpt2_xl.py

48 blocks of 12 x 1,600^2 weights, tables of 50,304 x 1,600 and 1,024 x 1,600:
1,557,686,400 parameters, 10,274.00 MFLOP per token, 1,048,576 tokens per step
A step is 1,024 sequences here; 20,000 of them are 21 billion tokens, 2.3 epochs, 13 tokens per
parameter.
"""
n_layer = 48
n_head = 25
n_embd = 1600
batch_size = 1024
learning_rate = 2e-4
activation_checkpointing = True
