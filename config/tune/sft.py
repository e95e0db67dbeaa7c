"""A small model of Jane Austen's English learns to follow instructions: 1,100 of them.

python train.py config/laptop.py --dataset=austen --max_minutes=8
python finetune.py config/tune/sft.py

The instructions are those of "Build a Large Language Model (From Scratch)", chapter 7. A model of
4 million parameters that has read seven novels learns the form of an answer, hardly its content.
"""
run_dir = 'out/laptop-austen'
dataset = 'instruction'

block_size = 256
batch_size = 4          # rows of about 3 conversations
learning_rate = 1e-3
weight_decay = 0.1
dropout = 0.1
epochs = 5.0
