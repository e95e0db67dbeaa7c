"""Which package of the Python standard library is a function from? No network.

python train.py config/python.py --max_minutes=4
python classify.py config/tune/classify_python.py
"""
run_dir = 'out/python'
dataset = 'python_modules'

val_fraction = 0.1
test_fraction = 0.2
batch_size = 8
learning_rate = 3e-4
weight_decay = 0.1
balance = True
epochs = 3.0
