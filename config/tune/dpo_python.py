"""The true function rather than one with mistakes: from the Python standard library, no network.

python dpo.py config/tune/dpo_python.py
"""
run_dir = 'out/sft_python'
dataset = 'python_bugs'

batch_size = 8
learning_rate = 2e-4
beta = 0.1
chosen_weight = 1.0
max_records = 500       # of 5,000
epochs = 1.0
