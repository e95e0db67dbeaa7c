"""A small model for anyone's text, in ten minutes.

python train.py config/laptop.py --dataset=my_novels/

It takes a file or a folder of text, web pages, JSON lines, tables (see core/read/documents.py); a
megabyte is enough to learn from. A BPE of 4,096 tokens is learnt from the same text. The
schedule follows the clock, so it takes ten minutes on any machine.
4 blocks of 4 x 256^2 (attention) + 3 x 256 x 680 (MLP), and one table of 4,096 x 256:
4,188,928 parameters, 28.26 MFLOP per token, 2,048 tokens per step
"""
from config.austen import *  # noqa: F403

dataset = ''
tokenizer = 'bpe'
vocab_size = 4096

n_layer = 4
n_head = 4
n_embd = 256
max_minutes = 10.0
