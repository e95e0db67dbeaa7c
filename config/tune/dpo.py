"""The model of config/tune/sft.py learns which of two answers is preferred: the polite one.

python dpo.py config/tune/dpo.py
"""
run_dir = 'out/sft'
dataset = 'preference'

batch_size = 8
learning_rate = 1e-3
beta = 0.03             # small, so that it may go far
chosen_weight = 1.0     # without it their probability falls together with the others
dropout = 0.1
epochs = 3.0
