"""The model of config/shakespeare.py on tokens of a small BPE instead of characters: in a minute.

python train.py config/shakespeare_bpe.py

1,024 tokens make of 1,003,854 characters 383,800 tokens, 2.6 characters each; a step reads 8 x 128
of them, as much text as 8 x 335 characters, and 1,250 steps are 3.3 epochs. Compare bits per byte:
a token's loss is that of several characters.
3 blocks of 4 x 128^2 (attention) + 3 x 128 x 344 (MLP), and two tables of 1,024 x 128:
856,128 parameters, 4.93 MFLOP per token, 1,024 tokens per step
"""
from config.shakespeare import *  # noqa: F403

tokenizer = 'bpe'
vocab_size = 1024

block_size = 128
max_steps = 1250
eval_interval = 250
