"""OpenAI's GPT-2 (124M) goes on learning, from your own text.

python train.py config/continue_gpt2.py --dataset=my_novels/

The architecture is the model's; its vocabulary of 50,257 grows to 50,304, with the chat tokens on
the new ids. --init_from=gpt2-medium takes the next larger one.
124,475,904 parameters, 854.65 MFLOP per token, 8,192 tokens per step
Without --dataset it reads Jane Austen: about 1 million tokens, so 120 steps are an epoch. The rate
is a tenth of that of pretraining: a higher one makes it forget what it knew.
"""
init_from = 'gpt2'
dataset = 'austen'
tokenizer = 'gpt2'

batch_size = 8
max_steps = 240
learning_rate = 6e-5
warmup_steps = 20
dropout = 0.1
eval_interval = 40
sample_interval = 40
