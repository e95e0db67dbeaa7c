"""The assistant of config/tune/sft_gpt2.py learns which of two answers is preferred.

python dpo.py config/tune/dpo_gpt2.py

Rates are small, as in the paper (its section 6: 1e-6): with larger ones the probability of the
chosen answers falls, too.
"""
run_dir = 'out/sft_gpt2'
dataset = 'preference'

block_size = 512
batch_size = 8
learning_rate = 2e-6
beta = 0.1
epochs = 1.0
compile = True
