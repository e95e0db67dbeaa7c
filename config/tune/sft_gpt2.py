"""OpenAI's GPT-2 (124M) becomes an assistant.

python finetune.py config/tune/sft_gpt2.py
python finetune.py config/tune/sft_gpt2.py --dataset=alpaca_data.json

Its vocabulary of 50,257 grows to 50,304, with the chat tokens on the new ids. The 1,100 default
instructions take minutes on a GPU; any file in Alpaca's form does.
"""
run_dir = 'gpt2'
dataset = 'instruction'

block_size = 512
batch_size = 8
learning_rate = 5e-5
weight_decay = 0.1
epochs = 2.0
compile = True
