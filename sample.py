"""Text from a trained model: python sample.py out/shakespeare --prompt="ROMEO:".

The model is a run, a Hugging Face folder (GPT-2, Llama, Qwen3), or a name on its hub, like gpt2.
A chat model answers, and remembers the conversation; a classifier gives the class of a text.

The prompt comes from --prompt, from a file, from standard input, or, on a terminal, from the
keyboard. Text goes to standard output as it comes, everything else to standard error.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch

from core import device as hardware
from core.data import records
from core.net import quant
from core.net.draw import Sampling
from core.net.engine import pad_rows, refusal, steps_of
from core.read.documents import Bad, read, suffix
from core.run import models
from core.settings import Stop, check_bounds, configure, stop, warn

POSITIONAL = ('run_dir',)
ENDS_WITH_STDOUT = True     # when nobody reads the text any more
FLAGS = ()                  # filled by configure
# The least probability of a shade, and its colour among a terminal's 256: white to red.
SHADES = ((0.5, 0), (0.2, 230), (0.05, 222), (0.01, 215), (0.0, 209))

run_dir = ''                # a run such as out/shakespeare, a Hugging Face folder, or a name: gpt2
step = 0                    # which checkpoint; 0: the best one
prompt = ''                 # text to continue
prompt_file = ''            # read the prompt from this file; - is standard input
chat = True                 # talk with a chat model; False: it continues text
system = ''                 # a chat's system message
classify = ''               # a text for a classifier
classify_file = ''          # or a file of them: .txt (one a line), .jsonl, .json, .csv or .tsv
num_samples = 1
max_new_tokens = 500
temperature = 0.8           # 0: always the most probable token
top_k = 0                   # only the k most probable tokens; 0: all
top_p = 1.0                 # only the fewest tokens that have this probability together
min_p = 0.0                 # only tokens this probable, relative to the most probable one
repetition_penalty = 1.0    # above 1: tokens already there become less probable
stop_strings = ''           # end before any of these, comma-separated; \n is a line break
seed = 1337                 # sample i uses seed + i
device = ''                 # '': cuda, else mps, else cpu
dtype = ''                  # '': bfloat16 where the GPU has it, else float16; float32 on a CPU
quantize = ''               # int8 or int4: round the weights, for less memory and more speed
colour = False              # shade each token by the probability that the model gave it
speculate = True            # try what followed the same three tokens before; off where it is slower
compile = False             # compile the blocks, for long texts: half a minute; 1.2 times the speed
threads = 0                 # CPU threads; 0: torch's choice


def read_prompt() -> str | None:
    """The prompt that flags, a file or standard input give; None asks for it at the keyboard."""
    if prompt and prompt_file:
        stop('prompt and prompt_file: both are given; leave one of them out')
    if prompt_file and prompt_file != '-':
        try:
            return Path(prompt_file).read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as e:
            stop(f'prompt_file={prompt_file}: {e.strerror if isinstance(e, OSError) else e}')
    if prompt or sys.stdin is None:
        return prompt
    return None if sys.stdin.isatty() and not prompt_file else sys.stdin.read()


def check_flags(chats: bool, asked: bool) -> None:
    """Stop at a flag that has no effect: with a classifier, in a chat, or in continuing text."""
    if asked:
        idle = ('prompt', 'prompt_file', 'num_samples', 'system', 'chat', 'colour')
        why = 'with a classifier; leave it out'
    elif chats:
        idle, why = ('num_samples',), 'in a chat; add --chat=False'
    else:
        idle = ('system', 'chat') if chat else ('system',)
        why = f'here: {run_dir} continues text; leave it out, or give a chat model (see ' \
            'finetune.py) and no --chat=False'
    for name in idle:
        if name in FLAGS:
            stop(f'{name}={globals()[name]}: does nothing {why}')


def shade(text: str, logprob: float) -> str:
    """`text` in black on a terminal's colour for its probability (before temperature and the
    like); as it is if that is high."""
    found = next((code for least, code in SHADES if math.exp(logprob) >= least), 0)
    return text if not found else '\n'.join(
        f'\x1b[38;5;16;48;5;{found}m{part}\x1b[0m' if part else '' for part in text.split('\n'))


def write_one(model, tokenizer, ids: list[int], sample_seed: int, dev,
              chatting: bool = False) -> tuple[str, int]:
    """Generate once and print the text as it comes; returns it and the number of tokens."""
    sampling = Sampling(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
        f'{sample_seed} 0',     # as the first row of a call of `generate` draws
        logprobs=0 if colour else -1,
        stop_tokens=tokenizer.turn_ends() if chatting else {tokenizer.eos},
        stop_strings=[tokenizer.as_corpus(s.replace('\\n', '\n'))
                      for s in stop_strings.split(',') if s])
    written, n = '', 0
    with dev.autocast():
        for [(row, new, text)] in steps_of(
                model, [ids], [sampling], tokenizer=tokenizer, compiled=dev.compile,
                speculate=speculate and not colour):    # then a text belongs to one token
            print(shade(text, row.logprobs[-1][0]) if colour else text, end='', flush=True)
            written, n = written + text, n + len(new)
    print(flush=True)
    return written, n


def write_samples(model, tokenizer, text: str, dev) -> list[str]:
    """Continue `text` num_samples times; prints tokens per second to standard error."""
    ids = tokenizer.prompt(text)
    if len(ids) > model.config.block_size:
        warn(f'the prompt has {len(ids):,} tokens, the model sees the last '
             f'{model.config.block_size:,} of them')
    texts = []
    for i in range(num_samples):
        print(f'--- sample {i + 1}\n' * (num_samples > 1) + text, end='', flush=True)
        began = time.perf_counter()
        out, n = write_one(model, tokenizer, ids, seed + i, dev)
        took = time.perf_counter() - began
        print(f'[{n} tokens in {took:.1f} s, {n / took:,.0f} tokens/s]', file=sys.stderr)
        texts.append(out)
    return texts


# ---------------------------------------------------------------------------------------------
# A chat


class Chat:
    """A conversation in the terminal."""
    HELP = ('/reset forgets the conversation, /system TEXT begins one with this system message, '
            '/save FILE appends it to a file for finetune.py, Ctrl-D ends')

    def __init__(self, model, tokenizer, dev):
        self.model, self.tokenizer, self.dev = model, tokenizer, dev
        self.n_turns = 0
        self.begin(system)

    def begin(self, text: str) -> None:
        """Begin a conversation, with a system message if text is not empty."""
        self.messages = [{'role': 'system', 'content': text}] if text else []

    def fitted(self) -> list[int]:
        """The ids of the conversation, without the oldest turns where it leaves no room for an
        answer of a quarter of the window."""
        size = self.model.config.block_size
        room = size - min(max_new_tokens, size // 4)
        seen = list(self.messages)
        first = int(seen[0]['role'] == 'system')
        while len(ids := self.tokenizer.encode_chat(seen, reply=True)) > room and \
                len(seen) > first + 2:
            del seen[first:first + 2]
        if len(seen) < len(self.messages):
            warn(f'the conversation is longer than the window of {size} tokens: the model does not '
                 f'see the first {(len(self.messages) - len(seen)) // 2} questions with their '
                 'answers any more')
        if len(ids) > room:
            warn(f'what is left has {len(ids):,} tokens: the model sees the last {room:,}')
            ids = ids[-room:]
        return ids

    def say(self, text: str) -> str:
        """The model's answer, which is printed as it comes."""
        self.messages.append({'role': 'user', 'content': text})
        try:
            out, _ = write_one(self.model, self.tokenizer, self.fitted(), seed + self.n_turns,
                               self.dev, chatting=True)
        except (Stop, KeyboardInterrupt):
            self.messages.pop()     # it got no answer
            raise
        self.n_turns += 1
        self.messages.append({'role': 'assistant', 'content': out})
        return out

    def answer(self, line: str) -> None:
        """Act on a line from the keyboard: a command if it begins with a slash."""
        word, _, rest = line.partition(' ')
        rest = rest.strip()
        if not line.startswith('/'):
            if line.strip():
                self.say(line)
        elif word == '/reset' and not rest:
            self.messages = [m for m in self.messages[:1] if m['role'] == 'system']
        elif word == '/system':
            self.begin(rest)
        elif word == '/save' and rest and len(self.messages) < 2:
            warn('there is nothing to save yet')
        elif word == '/save' and rest:
            try:
                with open(rest, 'a', encoding='utf-8') as f:
                    f.write(json.dumps({'messages': self.messages}, ensure_ascii=False) + '\n')
                print(f'appended to {rest}', file=sys.stderr)
            except OSError as e:
                warn(f'{rest}: {e.strerror}; not saved')
        else:
            print(self.HELP, file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# A classifier


def texts_to_classify() -> list[str]:
    """The text of --classify, or those of a file. Stops if there is none."""
    if classify and classify_file:
        stop('classify and classify_file: both are given; leave one of them out')
    if not classify_file:
        return [classify]
    path = Path(classify_file)
    try:
        if suffix(path) == '.txt':
            text = ''.join(record.data for record in read(path, '', 'strict', ''))
            texts = [line for line in text.split('\n') if line.strip()]
        else:
            texts = [records.text_of(where, row, 'text') for where, row in
                     records.rows_of(path, ('text',))]
    except Bad as e:
        stop(str(e))
    return texts or stop(f'classify_file={path}: holds no text; give at least one')


@torch.no_grad()
def write_classes(model, tokenizer, state: dict, dev) -> list[dict]:
    """Print the class of each text, its probability and, of several, the text."""
    texts, found, labels = texts_to_classify(), [], state['labels']
    size = state.get('block_size', model.config.block_size)     # what it learnt to read
    encoded = [tokenizer.prompt(text) for text in texts]
    if cut := sum(len(ids) > size for ids in encoded):
        warn(f'{cut:,} of {len(texts):,} texts are longer than the {size:,} tokens that the '
             'classifier reads, and are cut')
    for i in range(0, len(texts), 32):
        rows = [ids[:size] for ids in encoded[i:i + 32]]
        idx, doc = pad_rows(rows, dev.name)
        with dev.autocast():
            said = model(idx, doc=doc, n_logits=1)[:, -1].float().softmax(dim=-1)
        for text, row in zip(texts[i:], said.tolist()):
            best = max(range(len(row)), key=row.__getitem__)
            found.append({'label': labels[best], 'probability': row[best]})
            shown = ' '.join(text.split())
            print(f'{labels[best]}\t{row[best]:.4f}' + f'\t{shown}' * bool(classify_file),
                  flush=True)
    return found


def main() -> dict:
    """Returns the texts that were generated, without the prompt, or the classes."""
    check_bounds(globals())
    models.check_named(run_dir, 'sample.py {}')
    asked = bool(classify or classify_file)
    for name in ('prompt', 'system', 'classify', 'stop_strings'):
        if (value := globals()[name]) != value.encode(errors='ignore').decode():
            stop(f'{name}={value}: is not valid UTF-8')
    try:
        text = None if asked else read_prompt()
        dev = hardware.choose(device, dtype, compile and not asked, threads, training=False,
                              quantized=bool(quantize))
        model, tokenizer, state = models.load_run(run_dir, step, dev.name, classifier=asked)
        if quantize:
            quant.quantize(model, quantize)
        if colour and (why := refusal(model)):
            stop(f'colour=True: {why.partition(":")[0]}; leave it out')
        if dev.compile and model.config.arch == 'lstm':
            dev.compile, dev.why[2] = False, 'compile off (an LSTM has no blocks)'
        print(f'{run_dir}, step {state["step"]}; {"; ".join(dev.why[:3])}' +
              f'; weights in {quantize}' * bool(quantize), file=sys.stderr)
        chats = chat and state.get('task') == 'chat'
        check_flags(chats, asked)
        if asked:
            return {'classes': write_classes(model, tokenizer, state, dev)}
        talk = Chat(model, tokenizer, dev)
        if text is not None:
            return {'texts': [talk.say(text.strip('\n'))] if chats else
                    write_samples(model, tokenizer, text, dev)}
        print(Chat.HELP if chats else
              'type a prompt; an empty one starts from nothing; Ctrl-D ends', file=sys.stderr)
        while True:
            line = input('> ')
            with contextlib.suppress(Stop):     # a message about an unknown character was printed
                talk.answer(line) if chats else write_samples(model, tokenizer, line, dev)
    except UnicodeDecodeError as e:     # of standard input
        stop(f'the text given is not valid {e.encoding.upper()} ({e.reason} at {e.start})')
    except UnicodeError as e:   # UTF-16 without its mark, and the like
        stop(f'the text given cannot be read: {e}')
    except ValueError as e:     # of logits that are not finite
        stop(f'{run_dir}: {e}')
    except (KeyboardInterrupt, EOFError):
        print(file=sys.stderr)
    return {'texts': []}


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
