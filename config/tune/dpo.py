"""The model of config/tune/sft.py learns which of two answers is preferred: the polite one.

python dpo.py config/tune/dpo.py
"""
run_dir = 'out/sft'
dataset = 'preference'

batch_size = 8
learning_rate = 3e-4
beta = 0.1
dropout = 0.1
epochs = 3.0
