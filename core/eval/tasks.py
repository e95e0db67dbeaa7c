"""What models are asked: the named tasks, where their files are, and how a line becomes an item.

Prompts, choices and answers are those of lm-evaluation-harness, except where docs/evaluation.md
says otherwise. A task is an entry of TASKS, or a file of the user's:

    {"question": "The sky is", "choices": ["blue", "a fish"], "label": 0}      JSON lines
"""
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.data import named
from core.data.dataset import Tokens
from core.data.recipes import GITHUB, RECIPES
from core.data.records import rows_of, text_of
from core.formats.hub import endpoint
from core.ranks import processes
from core.read.documents import read
from core.read.download import NoNetwork, fetch
from core.read.tables import JSON_LINES, Bad, suffix
from core.settings import stop
from core.text import tokenizer as tokenizers


class Item(NamedTuple):
    """A question. Of one that is answered by choosing, a context and a continuation per choice
    (the contexts are mostly one and the same); of one that is answered by writing, one context."""
    where: str
    contexts: list[str]
    choices: list[str] = []     # as they follow, mostly after a space
    gold: int = 0               # the right choice
    answer: str = ''            # what is right, written: an answer, a test program, or a kind
    group: str = ''             # a subject: its examples come from the same
    name: str = ''              # of a program: the function that is tested
    document: str = ''          # items of one document are not independent
    before: str = ''            # the prompt's beginning: words of the task, solved examples

    @property
    def prompts(self) -> list[str]:
        """What stands before each choice, or before the answer."""
        return [self.before + context for context in self.contexts]

    @property
    def solved(self) -> str:
        """The question with its right answer."""
        right = self.choices[self.gold] if self.choices else f' {self.answer}'
        return self.contexts[self.gold] + right


class File(NamedTuple):
    """A file of a benchmark: in DATA_MIRROR under its name or that of `part`, or downloaded."""
    name: str
    url: str
    sha256: str = ''            # '': the first download's is kept
    part: str = ''              # a part of it that a mirror may have instead


class Task(NamedTuple):
    """A benchmark. kind: choice (acc, acc_norm), word (the last word: acc, perplexity), number
    (an answer that ends with one), code (pass@k), refusal, or text (bits per byte)."""
    about: str
    licence: str
    kind: str
    item: Callable[[dict], dict]        # the fields of an Item
    file: File
    examples: File | None = None        # of which prompts may begin with some
    shots: int = 0                      # that many
    before: str = ''                    # what the prompt begins with
    stop_strings: tuple = ()
    max_new_tokens: int = 256
    by_length: bool = True      # choice: whether choices differ, so that acc_norm means something


# ---------------------------------------------------------------------------------------------
# Lines to items. Names of fields are in lower case here.


def question(context: str, choices, gold: int, **more) -> dict:
    """An item whose choices all follow one context, after a space."""
    return {'contexts': [context] * len(choices), 'choices': [' ' + choice for choice in choices],
            'gold': gold, **more}


def hellaswag(row: dict) -> dict:
    def plain(text: str) -> str:    # brackets are left over from WikiHow
        text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
        return text.replace('  ', ' ')
    context = f'{row["ctx_a"]} {row["ctx_b"].capitalize()}' if 'ctx_a' in row else row['ctx']
    return question(plain(f'{row["activity_label"]}: {context}'),
                    [*map(plain, row['endings'])], int(row['label']))


def arc(row: dict) -> dict:
    return question(f'Question: {row["question"]}\nAnswer:', row['choices']['text'],
                    row['choices']['label'].index(row['answerkey']))


def piqa(row: dict) -> dict:
    return question(f'Question: {row["goal"]}\nAnswer:', [row['sol1'], row['sol2']],
                    int(row['label']))


def winogrande(row: dict) -> dict:
    """The choices stand in the context, and what is scored is the rest of the sentence."""
    begin, end = row['sentence'].split('_', 1)
    return {'contexts': [begin + row['option1'], begin + row['option2']],
            'choices': [f' {end.strip()}'] * 2, 'gold': int(row['answer']) - 1}


def openbookqa(row: dict) -> dict:
    return question(row['question_stem'], row['choices']['text'],
                    row['choices']['label'].index(row['answerkey'].strip()))


def mmlu(row: dict) -> dict:
    letters = [f'{letter}. {choice}' for letter, choice in zip('ABCD', row['choices'], strict=True)]
    return question('\n'.join([row['question'].strip(), *letters, 'Answer:']), 'ABCD',
                    int(row['answer']), group=row['subject'])


def lambada(row: dict) -> dict:
    context, last = row['text'].rsplit(' ', 1)
    return {'contexts': [context], 'choices': [f' {last}']}


def gsm8k(row: dict) -> dict:
    return {'contexts': [f'Question: {row["question"]}\nAnswer:'], 'answer': row['answer']}


def humaneval(row: dict) -> dict:
    return {'contexts': [row['prompt']], 'answer': row['test'], 'name': row['entry_point']}


def safety(row: dict) -> dict:
    if row['kind'] not in ('harmful', 'harmless'):
        raise ValueError(f'kind {row["kind"]!r}: must be harmful or harmless')
    return {'contexts': [row['request']], 'answer': row['kind']}


def own(row: dict) -> dict:
    """A row of the user's own benchmark: question, choices, label; some other names are known."""
    context = row.get('question', row.get('context', row.get('query')))
    label = row.get('label', row.get('gold'))
    if context is None or label is None or 'choices' not in row:
        raise ValueError('it needs "question", "choices" (a list of texts) and "label" (the number '
                         'of the right one, from 0)')
    if not isinstance(row['choices'], list) or type(label) is not int:
        raise ValueError('"choices" must be a list of texts, "label" a number from 0')
    return question(context, row['choices'], label, document=str(row.get('document', '')))


def on_hub(repository: str, revision: str, name: str, sha256: str = '') -> File:
    """A file of a dataset on Hugging Face's hub."""
    return File(f'{repository}/{name}', f'{endpoint()[0]}/datasets/{repository}/resolve/{revision}/'
                f'{name}', sha256)


ARC = ('allenai/ai2_arc', '210d026faf9955653af8916fad021475a3f00453')
BOOK = ('allenai/openbookqa', '388097ea7776314e93a529163e0fea805b8a6454')
HELLASWAG = ('Rowan/hellaswag', '218ec52e09a7e7462a5400043bb9a69a41d06b76')
MMLU = ('cais/mmlu', 'c30699e8356da336a370243923dbaf21066bb9fe')
PIQA = ('baber/piqa', '142f6d7367fd9877f0fb3b5734ea6a545f54cdd1')
WINOGRANDE = ('allenai/winogrande', '01e74176c63542e6b0bcb004dcdea22d94fb67b5')
MATH = f'{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/' \
    'grade_school_math/data'
ONE = '-00000-of-00001.parquet'
HERE = Path(__file__).parent

TASKS = {
    'hellaswag': Task(
        'how an everyday scene goes on, 10,042 items', 'MIT', 'choice', hellaswag,
        on_hub(*HELLASWAG, f'data/validation{ONE}')._replace(part='hellaswag_val_1k.jsonl'),
        on_hub(*HELLASWAG, f'data/train{ONE}')),
    'arc_easy': Task(
        'science at school, 2,376 questions', 'CC BY-SA 4.0', 'choice', arc,
        on_hub(*ARC, f'ARC-Easy/test{ONE}'), on_hub(*ARC, f'ARC-Easy/train{ONE}')),
    'arc_challenge': Task(
        'science at school, 1,172 questions that word counts do not answer', 'CC BY-SA 4.0',
        'choice', arc, on_hub(*ARC, f'ARC-Challenge/test{ONE}'),
        on_hub(*ARC, f'ARC-Challenge/train{ONE}')),
    'piqa': Task(
        'how things are done, 1,838 goals', 'not stated', 'choice', piqa,
        on_hub(*PIQA, 'piqa_validation.parquet',
               '2b17ee1215b1ceb2ddabf4c90a05c5a8b833bef9d207960f57d111c43a2080f3'),
        on_hub(*PIQA, 'piqa_train.parquet')),
    'winogrande': Task(
        'what a pronoun stands for, 1,267 sentences', 'CC BY 4.0', 'choice', winogrande,
        on_hub(*WINOGRANDE, f'winogrande_xl/validation{ONE}'),
        on_hub(*WINOGRANDE, f'winogrande_xl/train{ONE}'), by_length=False),
    'openbookqa': Task(
        'elementary science with common knowledge, 500 questions', 'not stated', 'choice',
        openbookqa, on_hub(*BOOK, f'main/test{ONE}',
                           'cd5483e366daa230c1c87bbdc512d8b7229f14f6dd04d19fc8b1a3855aaaa8a3'),
        on_hub(*BOOK, f'main/train{ONE}')),
    'mmlu': Task(
        'exams of 57 subjects, 14,042 questions; mmlu_anatomy: one of them', 'MIT', 'choice', mmlu,
        on_hub(*MMLU, f'all/test{ONE}'), on_hub(*MMLU, f'all/dev{ONE}'), 5,
        'The following are multiple choice questions (with answers) about {subject}.\n\n',
        by_length=False),
    'lambada': Task(
        'the last word of a passage, 5,153 of them', 'modified MIT', 'word', lambada,
        on_hub('EleutherAI/lambada_openai', '900124bf3b8235c6daf21033af9948b3f07346c4',
               'data/lambada_test.jsonl',
               '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226')),
    'gsm8k': Task(
        'word problems of grade school, 1,319 of them', 'MIT', 'number', gsm8k,
        File('gsm8k_test.jsonl', f'{MATH}/test.jsonl',
             '3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14'),
        File('gsm8k_train.jsonl', f'{MATH}/train.jsonl',
             '17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465'), 5,
        stop_strings=('Question:', '</s>', '<|im_end|>')),
    'humaneval': Task(
        'Python functions by their docstrings, 164 of them', 'MIT', 'code', humaneval,
        File('humaneval.jsonl.gz', f'{GITHUB}/openai/human-eval/'
             '6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz',
             'b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef'),
        stop_strings=('\nclass', '\ndef', '\n#', '\nif', '\nprint'), max_new_tokens=512),
    'safety': Task(
        '60 harmful requests and 60 harmless ones that look alike', 'as this project', 'refusal',
        safety, File(str(HERE / 'safety.jsonl'), ''), max_new_tokens=64)}


# ---------------------------------------------------------------------------------------------
# Reading


class Questions(NamedTuple):
    """The items of a task, ready to be asked."""
    name: str
    task: Task
    items: list[Item]
    about: str          # what was read, in words
    sha256: str         # of the items, with their examples

    @property
    def unit(self) -> str:
        """What scores have one value of."""
        return 'items' if self.task.kind != 'text' else \
            'documents' if len(self.items) > 1 else 'windows'

    def groups(self, n_values: int) -> list[str] | None:
        """Of each item the document that it is from; None if none is known, or if values are not
        one for each item."""
        names = [item.document or f' {n}' for n, item in enumerate(self.items)]
        known = any(item.document for item in self.items) and n_values == len(names)
        return names if known else None


def load(name: str, max_items: int = 0, shots: int = -1, data_dir: str = 'data') -> Questions:
    """The first max_items items (0: all) of a task of TASKS, of mmlu_<subject>, of a file in JSON
    lines, of a text or of a dataset's validation split; with `shots` solved examples before each
    (-1: as many as the task has). Stops if a file is not at hand, or a line of it is wrong."""
    base, _, subject = name.partition('_') if name.startswith('mmlu_') else (name, '', '')
    task = TASKS.get(base) or own_task(name, data_dir)
    shots, whole = task.shots if shots < 0 else shots, True
    if shots and task.kind in ('code', 'refusal', 'word', 'text'):
        stop(f'shots={shots}: {name} has no examples; leave it out')
    if task.kind == 'text':
        path, items = Path(task.file.name), list(documents_of(task.file.name, data_dir))
    else:
        path, whole = place_of(task.file, name, data_dir)
        items = list(items_of(path, task))
    said = [f'only {path.name}, a part of it, is at hand'] * (not whole)
    if subject and not any(item.group == subject for item in items):
        stop(f'tasks={name}: no such subject; there are '
             f'{", ".join(sorted({item.group for item in items}))}')
    items = [item for item in items if subject in ('', item.group)]
    if shots:
        examples = examples_of(task, data_dir)
        if examples is None:
            examples, items = items[:shots], items[shots:]
            said.append(f'its first {shots} items serve as examples, and are not asked')
        items = [item._replace(before=beginning(item, task, examples, shots)) for item in items]
        said.append(f'{shots} solved examples before each')
    items = items[:max_items or None]
    if not items:
        stop(f'tasks={name}: {path} holds no item' + f' after {shots} examples' * bool(shots) +
             '; give a file with at least one more')
    asked = json.dumps([task.kind, *(item._replace(where='') for item in items)])
    licence = f'; licence {task.licence}' * bool(task.licence)
    said.insert(0, f'{task.about} ({len(items):,} asked{licence})')
    return Questions(name, task, items, '; '.join(said),
                     hashlib.sha256(asked.encode()).hexdigest()[:16])


def load_all(names: str, ranks, max_items: int = 0, shots: int = -1, data_dir: str = 'data'
             ) -> list[Questions]:
    """The tasks with these names, comma-separated. Rank 0 reads them first, since a file may have
    to be downloaded."""
    read = lambda: [load(name, max_items, shots, data_dir) for name in names.split(',') if name]
    found = read() if ranks.rank == 0 else []
    processes.broadcast(None, patient=True)
    return found if ranks.rank == 0 else read()


def own_task(name: str, data_dir: str) -> Task:
    """The task of a user's file or of a dataset. Stops if there is neither."""
    file = File(name, '')
    if folder := dataset_folder(name, data_dir):
        return Task(f'the validation split of {folder}', 'as its meta.json says', 'text', own, file)
    if not os.path.isfile(name):
        stop(f'tasks={name}: no task, file or prepared dataset of this name; tasks are '
             f'{", ".join(TASKS)}')
    try:
        first = next(iter(rows_of(Path(name), ())))[1] if suffix(name) in JSON_LINES else {}
    except (Bad, StopIteration):
        first = {'choices': []}     # which reading it will tell
    if 'choices' in first:
        return Task(f'the questions of {name}', 'not known', 'choice', own, file)
    return Task(f'the text of {name}', 'not known', 'text', own, file)


def dataset_folder(name: str, data_dir: str) -> Path | None:
    """The folder of a prepared dataset; None if the name is another thing."""
    if name in RECIPES:
        folder = Path(data_dir) / named.folder_name(name, '', 0)
        return folder if named.is_made(folder) else None
    return named.made_folder(name, data_dir)


def documents_of(name: str, data_dir: str) -> Iterator[Item]:
    """The documents of a dataset's validation split, of JSON lines with a "text", or of a file,
    which is one."""
    try:
        if folder := dataset_folder(name, data_dir):
            tokenizer, tokens = tokenizers.load(folder / 'tokenizer.json'), Tokens(folder, 'val')
            ids = tokens.read(0, len(tokens))
            for part in np.split(ids, np.flatnonzero(ids == tokenizer.eos)):
                if text := tokenizer.decode(part[part != tokenizer.eos].tolist()):
                    yield Item(name, [text])
        elif suffix(name) in JSON_LINES:
            for where, row in rows_of(Path(name), ()):
                yield Item(where, [text_of(where, row, 'text')])
        else:
            text = ''.join(record.data for record in read(Path(name), '', 'strict', 'text'))
            if text:
                yield Item(name, [text])
    except Bad as e:
        stop(str(e))


def place_of(file: File, name: str, data_dir: str) -> tuple[Path, bool]:
    """Where a file is, and whether it is the whole one. Downloads it, or stops."""
    if Path(file.name).is_file():
        return Path(file.name), True
    mirror = Path(os.environ.get('DATA_MIRROR') or '.')
    part = mirror / file.part
    if file.part and part.is_file() and not any(
            (folder / file.name).is_file() for folder in (mirror, Path(data_dir) / 'downloads')):
        return part, False
    try:
        return fetched(file, data_dir), True
    except NoNetwork as e:
        stop(f'tasks={name}: {e}; put the file into a folder as {file.name}, and set DATA_MIRROR '
             'to the folder')


def fetched(file: File, data_dir: str) -> Path:
    """The file, from DATA_MIRROR, an earlier download or the network. Raises NoNetwork."""
    address, headers = endpoint()
    return fetch(file.name, file.url, Path(data_dir) / 'downloads', file.sha256,
                 headers=headers if file.url.startswith(address) else None)


def items_of(path: Path, task: Task) -> Iterator[Item]:
    """The items of a file. Stops at the first line that is wrong."""
    try:
        for where, row in rows_of(path, ()):
            yield item_of(where, row, task)
    except Bad as e:
        stop(str(e))


def item_of(where: str, row: dict, task: Task) -> Item:
    """The item of a row. Raises Bad if it cannot be one."""
    try:
        item = Item(where, **task.item(row))
        texts = [*item.contexts, *item.choices, item.answer, item.group]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError('a text is something else')
        ''.join(texts).encode()     # raises ValueError for half a surrogate pair
        if item.choices and not 0 <= item.gold < len(item.choices):
            raise ValueError(f'the right choice is number {item.gold} of 0 to '
                             f'{len(item.choices) - 1}')
        if not all(choice.strip() for choice in item.choices):
            raise ValueError('a choice is empty')
        if task.kind == 'choice' and len(item.choices) < 2:
            raise ValueError('there must be at least two choices')
        return item
    except KeyError as e:
        raise Bad(f'{where}: has no {e.args[0]!r}, only {", ".join(row)[:100]}; correct it') from e
    except (ValueError, TypeError, AttributeError) as e:
        raise Bad(f'{where}: {e}; correct it') from e


def examples_of(task: Task, data_dir: str) -> list[Item] | None:
    """The items of the file that a task has for examples; None if that is not at hand."""
    try:
        return list(items_of(fetched(task.examples, data_dir), task)) if task.examples else None
    except NoNetwork:
        return None


def beginning(item: Item, task: Task, examples: list[Item], shots: int) -> str:
    """What the prompt of an item begins with: the task's words, and solved examples of its group.
    """
    text = task.before.format(subject=item.group.replace('_', ' '))
    mine = [example.solved for example in examples if example.group == item.group]
    return text + ''.join(f'{solved}\n\n' for solved in mine[:shots])
