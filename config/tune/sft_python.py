"""Header and docstring -> function: from the Python standard library on this machine, no network.

python train.py config/python.py --max_minutes=4
python finetune.py config/tune/sft_python.py
"""
run_dir = 'out/python'
dataset = 'python_chat'

batch_size = 8          # rows of about 3 functions
learning_rate = 5e-4
weight_decay = 0.1
epochs = 1.0
