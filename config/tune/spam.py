"""Is a text message spam? 5,574 of them, 13% spam.

python train.py config/laptop.py --dataset=austen --max_minutes=8
python classify.py config/tune/spam.py

The SMS Spam Collection has 400 duplicates, which go first. The base knows Jane Austen's English,
not that of text messages.
"""
run_dir = 'out/laptop-austen'
dataset = 'sms_spam'

val_fraction = 0.1
test_fraction = 0.2
block_size = 256
batch_size = 4          # rows of about 7 messages
learning_rate = 3e-4
weight_decay = 0.1
dropout = 0.1
epochs = 4.0
