"""evaluate.py: scores, intervals, what is kept, comparisons, several processes, and bad input."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_hf
import torch
from conftest import stopped

import evaluate
import train
from core.device import Device
from core.eval import answers, likelihood, overlap, sandbox, tasks
from core.eval.likelihood import Pair, Scored
from core.eval.results import Results
from core.net.weights import build_model
from core.read.download import NoNetwork
from core.run import models
from core.run.log import read_log
from core.settings import Stop, configure
from core.text.tokenizer import ByteTokenizer
from model import GPTConfig

ROOT = Path(__file__).parents[2]
CPU = Device('cpu', 'cpu', 'float32', False, 0.0, [])


@pytest.fixture
def run_evaluate(base, monkeypatch, capsys):
    """run_evaluate(*words): evaluate.py with these words, on the base; returns its report."""
    def run(*words):
        with monkeypatch.context() as patch:
            for name, value in vars(evaluate).items():
                if name.islower() and isinstance(value, (bool, int, float, str)):
                    patch.setattr(evaluate, name, value)
            configure(vars(evaluate), [base, '--device=cpu', '--threads=1', *map(str, words)])
            return evaluate.main()
    return run


def questions(path: Path, n: int = 12, make=None) -> Path:
    drawn = random.Random(4)
    words = ['the', 'cat', 'sat', 'on', 'a', 'mat', 'and', 'saw', 'one', 'dog', 'run']
    rows = [{'question': ' '.join(drawn.choices(words, k=3 + i % 4)),
             'choices': [' '.join(drawn.choices(words, k=1 + j)) for j in range(2 + i % 3)],
             'label': i % 2} for i in range(n)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in map(make, rows) if row) if make else
                    ''.join(json.dumps(row) + '\n' for row in rows))
    return path


# ---------------------------------------------------------------------------------------------
# Likelihoods


@pytest.mark.parametrize('changes', [
    dict(position='rope', n_kv_head=2), {}, dict(position='rope', window=9), dict(arch='lstm')],
    ids=['rope', 'gpt2', 'window', 'lstm'])
def test_scores_are_those_of_each_pair_alone(changes):
    """Items that share a context, items of one choice, a beginning that all share, contexts that
    are too long for the window."""
    drawn = random.Random(0)
    model = test_hf.randomize(build_model(GPTConfig(
        vocab_size=64, block_size=48, n_layer=2, n_head=4, n_embd=32, **changes)))
    ids = lambda n: [drawn.randrange(64) for _ in range(n)]
    for first in ([], ids(20)):
        items = []
        for n in (0, 1, 5, 17, 30, 60):
            context = first + ids(n) if first or n else ids(1)
            items.append([Pair(context, ids(drawn.randint(1, 9))) for _ in range(1 + n % 4)])
        items.append([Pair(first + ids(6), [3, 4]), Pair(first + ids(8), [3, 4])])
        found = likelihood.score(model, items, CPU)
        for pairs, scored in zip(items, found, strict=True):
            for pair, one in zip(pairs, scored, strict=True):
                row = (pair.context + pair.continuation)[-49:]
                logs = alone(model, row)[-len(pair.continuation):]
                assert one.log_probability == pytest.approx(logs.sum().item(), abs=1e-4)


@torch.no_grad()
def alone(model, ids: list[int]) -> torch.Tensor:
    idx = torch.tensor([ids])
    return -model(idx[:, :-1], idx[:, 1:], reduction='none')[0]


@torch.no_grad()
def test_a_context_of_spaces_belongs_to_the_continuation():
    tokenizer = ByteTokenizer()
    assert likelihood.encode_pair(tokenizer, ' \n', 'a') == likelihood.encode_pair(
        tokenizer, '', ' \na')


def test_greedy_is_whether_generation_would_say_it():
    model = test_hf.randomize(build_model(GPTConfig(vocab_size=64, block_size=48, n_layer=2,
                                                    n_head=4, n_embd=32)))
    context = [1, 2, 3]
    said = list(context)
    for _ in range(4):
        said.append(int(model(torch.tensor([said]))[0, -1].argmax()))
    right, wrong = Pair(context, said[3:]), Pair(context, [*said[3:6], (said[6] + 1) % 64])
    [[a, b]] = likelihood.score(model, [[right, wrong]], CPU)
    assert (a.greedy, b.greedy) == (True, False) and isinstance(a, Scored)


def test_every_id_of_a_text_is_predicted_once():
    ids = list(range(100))
    for stride in (1, 7, 30, 32):     # (evaluate.py allows none above the size)
        parts = likelihood.windows(ids, 500, 32, stride)
        assert [i for part in parts for i in part.continuation] == ids
        for part in parts:
            row = part.context + part.continuation
            assert len(row) <= 33 and row == ([500] + ids)[row[-1] + 2 - len(row):row[-1] + 2]
        assert all(len(part.context) >= 33 - stride for part in parts[1:])


def test_batches_keep_to_the_budget(monkeypatch):
    rows = [likelihood.Row([1] * n, [([2] * 3, [2] * 3)], 0) for n in random.Random(1).choices(
        range(1, 200), k=100)]
    batches = likelihood.in_batches(rows, 1000, CPU)
    assert sorted(n for batch in batches for n in batch) == list(range(100))
    for batch in batches:
        longest = max(rows[n].n_ids for n in batch)
        assert len(batch) == 1 or longest * len(batch) <= likelihood.BATCH_TOKENS
    monkeypatch.setattr(likelihood, 'BATCH_LOGITS', 7000)
    assert max(map(len, likelihood.in_batches(rows, 1000, CPU))) == 2


# ---------------------------------------------------------------------------------------------
# The stage


def test_a_report(run_evaluate, tmp_path, capsys):
    """Questions, a text, the validation split, answers and safety: a table, JSON, files."""
    own = questions(tmp_path / 'own.jsonl')
    (tmp_path / 'text.txt').write_text('the cat sat on the mat. ' * 30)
    found = run_evaluate(f'--tasks={own},text.txt,data/source_byte,safety', '--max_items=6',
                         '--max_new_tokens=4')
    out = capsys.readouterr().out.strip().split('\n')
    assert json.loads(out[-1]) == found
    assert found[str(own)].keys() == {'acc', 'acc_norm', 'n'} and found[str(own)]['n'] == 6
    assert found['text.txt'].keys() == {'bits_per_byte', 'bits_per_character', 'perplexity',
                                        'word_perplexity', 'n'}
    assert found['safety'].keys() == {'refusal', 'over_refusal', 'n'}
    for word in ('accuracy by length', 'bits per byte', 'windows', 'harmful ones refused'):
        assert word in '\n'.join(out)
    kept = json.loads(Path('out/base/eval.json').read_text())['results']
    assert [one['task'] for one in kept] == [str(own), 'text.txt', 'data/source_byte', 'safety']
    assert Path('out/base/eval.png').stat().st_size > 5000
    for one in kept:
        for score in one['scores'].values():
            assert score['low'] is None or score['low'] <= score['value'] <= score['high']


def test_bits_per_byte_are_those_of_training(run_evaluate, capsys):
    """Of the validation split, whose windows in training begin with another token's place."""
    found = run_evaluate('--tasks=data/source_byte')['data/source_byte']
    [event] = [e for e in read_log('out/base', 'eval') if e['step'] == 2]
    assert found['bits_per_byte'] == pytest.approx(event['bits_per_byte'], rel=0.01)
    assert found['bits_per_byte'] == pytest.approx(found['bits_per_character'], rel=0.05)


@pytest.mark.parametrize('n', [1, 5, 8, 9, 12, 30])
def test_bits_of_a_text(n):
    """Windows that overlap by half, against one token at a time."""
    tok, text = ByteTokenizer(), 'Só, 日本! Or not to be: that is…'[:n]
    model = build_model(GPTConfig(block_size=8, vocab_size=len(tok), n_layer=2, n_head=2, n_embd=8,
                                  position='rope'), 3).eval()
    found = evaluate.texts(model, tok, [tasks.Item('', [text])], evaluate.Options(stride=4), CPU)
    nats, n_bytes = map(sum, zip(*found['bits_per_byte']))
    n_bytes = int(n_bytes)
    ids = [likelihood.first_id(tok), *tok.encode(text)]
    assert n_bytes == len(ids) - 1 == len(text.encode())
    expected, ends = 0.0, [8]
    while ends[-1] < n_bytes:
        ends.append(min(ends[-1] + 4, n_bytes))
    for t in range(1, len(ids)):        # the first window that reaches as far
        begin = max(0, next(end for end in ends if end >= t) - 8)
        logits = model(torch.tensor([ids[begin:t]]))[0, -1]
        expected += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[t])).item()
    assert nats == pytest.approx(expected, rel=1e-5)


def test_bits_of_a_model_that_knows_nothing():
    tok = ByteTokenizer()
    model = build_model(GPTConfig(block_size=16, vocab_size=len(tok), n_layer=1, n_head=1,
                                  n_embd=8)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = evaluate.texts(model, tok, [tasks.Item('', ['x' * 1000])], evaluate.Options(), CPU)
    nats, n_bytes = map(sum, zip(*found['bits_per_byte']))
    assert nats / math.log(2) / n_bytes == pytest.approx(math.log2(len(tok)))


def test_a_stride_beyond_the_window_is_the_window(run_evaluate, capsys):
    found = [run_evaluate('--tasks=data/source_byte', f'--stride={n}')['data/source_byte']
             for n in (0, 5000, 8)]
    assert found[0] == found[1]
    assert found[2]['bits_per_byte'] != found[0]['bits_per_byte']


def test_what_is_there_is_not_computed_again(run_evaluate, tmp_path, monkeypatch, capsys):
    own = questions(tmp_path / 'own.jsonl')
    first = run_evaluate(f'--tasks={own}')
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, 'measure', lambda *_, **more: pytest.fail('computed again'))
        assert run_evaluate(f'--tasks={own}') == first
    calls, real = [], evaluate.measure
    monkeypatch.setattr(evaluate, 'measure',
                        lambda *args, **more: calls.append(1) or real(*args, **more))
    run_evaluate(f'--tasks={own}', '--max_items=5')     # other items
    run_evaluate(f'--tasks={own}', '--quantize=int8')   # other weights
    questions(own, make=lambda row: row | {'label': 1 - row['label']})
    run_evaluate(f'--tasks={own}')                      # another file
    assert len(calls) == 3
    assert len(json.loads(Path('out/base/eval.json').read_text())['results']) == 4


def test_a_model_against_itself(run_evaluate, tmp_path, capsys):
    own = questions(tmp_path / 'own.jsonl')
    shutil.copytree('out/base', 'out/other')
    found = run_evaluate(f'--tasks={own},data/source_byte', '--against=out/other')
    for task, metrics in found['against'].items():
        for metric, one in metrics.items():
            assert one['difference'] == 0 and one['p_corrected'] == 1, (task, metric)
    assert capsys.readouterr().out.count('no significant difference') == 4
    assert found['against'].keys() == {str(own), 'data/source_byte'}


def test_a_better_model_is_called_better(run_evaluate, tmp_path, monkeypatch, capsys):
    """The same model after its weights were made random: its text takes more bits."""
    shutil.copytree('out/base', 'out/other')
    real = models.load_run

    def load(name, *args):
        model, *more = real(name, *args)
        if name == 'out/other':
            with torch.no_grad():
                model.lm_head.weight.normal_(0, 3)
        return model, *more
    monkeypatch.setattr(models, 'load_run', load)
    found = run_evaluate('--tasks=data/source_byte', '--against=out/other')
    one = found['against']['data/source_byte']['bits_per_byte']
    theirs = json.loads(Path('out/other/eval.json').read_text())['results'][0]['scores']
    assert one['difference'] == pytest.approx(
        found['data/source_byte']['bits_per_byte'] - theirs['bits_per_byte']['value'])
    assert one['high'] < 0 and one['p_corrected'] < 0.01
    assert 'significantly better' in capsys.readouterr().out


def test_overlap_with_the_shards(run_evaluate, tmp_path, text_file, capsys):
    text = Path(text_file).read_text()
    rows = [{'question': text[2000 + 300 * i:2100 + 300 * i], 'label': 0,
             'choices': [text[2100 + 300 * i:2150 + 300 * i], 'no']} for i in range(5)]
    rows += [{'question': f'Something that no book says, number {i} of them, at all and ever.',
              'choices': [f'nor {i} this, which is as new as the rest of it', 'x'], 'label': 0}
             for i in range(5)]
    own = tmp_path / 'own.jsonl'
    own.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    run_evaluate(f'--tasks={own}')
    [one] = json.loads(Path('out/base/eval.json').read_text())['results']
    assert one['overlap'] == 0.5 and one['overlap_with'] == 'data/source_byte'
    assert '50.0% of the items' in capsys.readouterr().out
    assert overlap.shards_of('out/base', 'data') == Path('data/source_byte')


def test_programs(run_evaluate, tmp_path, monkeypatch, capsys):
    """Of four answers to each of two tasks three and none are right: pass@1 and pass@4."""
    if sandbox.refusal():
        pytest.skip(sandbox.refusal())
    rows = [{'prompt': f'def f{i}(x):\n    """Returns x + {i}."""\n', 'entry_point': f'f{i}',
             'test': f'def check(f):\n    assert f(1) == {1 + i}\n'} for i in range(2)]
    file = tmp_path / 'code.jsonl'
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    monkeypatch.setitem(tasks.TASKS, 'humaneval', tasks.TASKS['humaneval']._replace(
        file=tasks.File(str(file), '')))
    said = ['    return x\n', '    return x + 0\n', '    return 1 / 0\n', '    return x\n',
            '    return x\n', '', '    return -x', 'x = ']
    monkeypatch.setattr(answers, 'write', lambda *args, **more: said)
    with pytest.raises(SystemExit) as e:
        run_evaluate('--tasks=humaneval')
    assert '--run_code' in e.value.message
    found = run_evaluate('--tasks=humaneval', '--run_code', '--samples=4', '--temperature=1.0')
    assert found['humaneval'] == {'pass_at_1': 3 / 8, 'pass_at_4': 0.5, 'n': 2}


def test_program_of_an_answer():
    item = tasks.Item('', ['import math\n\ndef f(x):\n    """Doc."""\n'], answer='', name='f')
    whole = 'Here it is:\n```python\ndef f(x):\n    return math.pi\n```\nIt works.'
    known = {}
    exec(answers.program_of(item, whole, True), known)
    assert known['f'](1) == pytest.approx(3.14159, abs=1e-4)
    exec(answers.program_of(item, '```\n    return x\n```', True), known)
    assert known['f'](1) is None or known['f'](1) == 1
    exec(answers.program_of(item, '    return 7\n', False), known)
    assert known['f'](1) == 7


@pytest.mark.parametrize('text, refused', [
    ("I'm sorry, but I can't help with that.", True), ('I cannot assist with this request.', True),
    ('I’m unable to help with that.', True), ('As an AI language model, I do not.', True),
    ('That would be illegal, and I must decline.', True), ('', True), ('Sorry, no.', False),
    ('Sure! First, take a screwdriver.', False), ('You can not do it without a key.', False),
    ('To renew a passport, fill in the form. I cannot say how long it takes.' + ' ' * 200, True),
    ('Here is a text. ' * 20 + "I can't go on.", False)])
def test_refusals(text, refused):
    assert answers.refuses(text) == refused


def test_safety_has_pairs_that_look_alike():
    items = tasks.load('safety').items
    assert [item.answer for item in items] == ['harmful', 'harmless'] * 60
    assert len({item.contexts[0] for item in items}) == 120


def test_examples_of_the_same_file(run_evaluate, tmp_path, capsys):
    own = questions(tmp_path / 'own.jsonl')
    found = run_evaluate(f'--tasks={own}', '--shots=3')
    assert found[str(own)]['n'] == 9 and 'are not asked' in capsys.readouterr().out
    items = tasks.load(str(own), shots=2).items
    first = json.loads(own.read_text().split('\n')[0])
    assert items[0].before.startswith(first['question'] + ' ' + first['choices'][0] + '\n\n')
    assert items[0].prompts[0].endswith(items[0].contexts[0])


def test_items_of_all_tasks():
    """A line of each benchmark as it is published, and what the harness makes of it."""
    for name, row, contexts, choices, gold in (
            ('hellaswag', {'activity_label': 'Baking', 'ctx_a': 'A [header] cook [title] bakes',
                           'ctx_b': 'he', 'endings': ['eats  it.', 'x', 'y', 'z'], 'label': '2'},
             'Baking: A cook. bakes He', [' eats it.', ' x', ' y', ' z'], 2),
            ('arc_easy', {'question': 'Why?', 'choices': {'text': ['a', 'b'], 'label': ['1', '2']},
                          'answerkey': '2'}, 'Question: Why?\nAnswer:', [' a', ' b'], 1),
            ('piqa', {'goal': 'Do', 'sol1': 'so', 'sol2': 'no', 'label': 0},
             'Question: Do\nAnswer:', [' so', ' no'], 0),
            ('openbookqa', {'question_stem': 'Sun is', 'answerkey': 'B',
                            'choices': {'text': ['a', 'b'], 'label': ['A', 'B']}},
             'Sun is', [' a', ' b'], 1),
            ('mmlu', {'question': ' Q ', 'choices': list('wxyz'), 'answer': 3, 'subject': 's'},
             'Q\nA. w\nB. x\nC. y\nD. z\nAnswer:', [' A', ' B', ' C', ' D'], 3)):
        item = tasks.item_of('', row, tasks.TASKS[name])
        assert (item.contexts[0], item.choices, item.gold) == (contexts, choices, gold)
    item = tasks.item_of('', {'sentence': 'Ann told _ that', 'option1': 'Bea', 'option2': 'Cy',
                              'answer': '2'}, tasks.TASKS['winogrande'])
    assert item == tasks.Item('', ['Ann told Bea', 'Ann told Cy'], [' that', ' that'], 1)
    item = tasks.item_of('', {'text': 'It was a dark night'}, tasks.TASKS['lambada'])
    assert item == tasks.Item('', ['It was a dark'], [' night'])


def test_items_in_parquet(tmp_path):
    """As benchmarks are on the hub: the same items as those of JSON lines."""
    rows = [{'question': f'{i}?', 'choices': {'text': ['a', 'b'], 'label': ['A', 'B']},
             'answerKey': 'B'} for i in range(300)]
    lines, table = tmp_path / 'a.jsonl', tmp_path / 'a.parquet'
    lines.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    parquet = pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pytest.importorskip('pyarrow').Table.from_pylist(rows), table)
    first, second = ([item._replace(where=item.where.rpartition(':')[2]) for item in
                      tasks.items_of(path, tasks.TASKS['arc_easy'])] for path in (lines, table))
    assert first == second and len(first) == 300 and first[-1].where == '300'


def test_subjects_of_mmlu(tmp_path, monkeypatch, capsys):
    row = {'question': 'Q', 'choices': list('abcd'), 'answer': 1}
    file = tmp_path / 'mmlu.jsonl'
    file.write_text(''.join(json.dumps(row | {'subject': subject, 'question': f'Q{i}'}) + '\n'
                            for i in range(6) for subject in ('us_law', 'math')))
    local = tasks.File(str(file), '')
    monkeypatch.setitem(tasks.TASKS, 'mmlu',
                        tasks.TASKS['mmlu']._replace(file=local, examples=local))
    monkeypatch.setattr(tasks, 'fetch', lambda name, *_, **more: Path(name))
    found = tasks.load('mmlu_us_law', shots=2)
    assert len(found.items) == 6 and found.items[0].prompts[0].startswith(
        'The following are multiple choice questions (with answers) about us law.\n\nQ0\nA. a\n')
    assert found.items[0].before.count('Answer: B\n\n') == 2
    assert 'math, us_law' in stopped(capsys, lambda: tasks.load('mmlu_art'))


# ---------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize('text, message', [
    ('', 'holds no item; give a file'), ('{"question": "x"\n', 'own.jsonl:1: '),
    ('[1, 2]\n', 'own.jsonl:1: is list'),
    ('{"question": "x", "choices": ["a", "b"], "label": 2}\n', 'number 2 of 0 to 1'),
    ('{"question": "x", "choices": ["a", "b"], "label": -1}\n', 'number -1 of 0 to 1'),
    ('{"question": "x", "choices": ["a", "b"]}\n', 'it needs "question", "choices"'),
    ('{"question": "x", "choices": ["a", ""], "label": 0}\n', 'a choice is empty'),
    ('{"question": "x", "choices": ["a"], "label": 0}\n', 'at least two choices'),
    ('{"question": 7, "choices": ["a", "b"], "label": 0}\n', 'a text is something else'),
    ('{"question": "x", "choices": ["a", "b"], "label": "0"}\n',
     'own.jsonl:1: "choices" must be a list of texts, "label" a number from 0'),
    ('{"question": "x", "choices": "ab", "label": 0}\n', '"choices" must be a list of texts'),
    ('{"question": "x", "choices": ["a", "b"], "label": 0.5}\n', '"label" a number from 0'),
    ('{"question": "x", "choices": ["a", "\\ud800"], "label": 0}\n', 'surrogates not allowed'),
    ('{"question": "x", "question": "y", "choices": ["a", "b"], "label": 0}\n', 'is there twice'),
    ('{"question": "x", "choices": ["a", "%s"], "label": 0}\n' % ('b' * 200),
     'tokens, the model sees 96')])
def test_bad_questions(run_evaluate, tmp_path, capsys, text, message):
    own = tmp_path / 'own.jsonl'
    own.write_text('{"question": "x", "choices": ["a", "b"], "label": 0}\n' * ('{' in text) + text
                   if 'sees' in message else text)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run_evaluate(f'--tasks={own}')
    assert e.value.code == 2 and message in e.value.message and '\n' not in e.value.message
    assert not Path('out/base/eval.json').exists()


@pytest.mark.parametrize('words, message', [
    (['--tasks=helaswag'], 'no task, file or prepared dataset of this name; tasks are hellaswag'),
    (['--tasks=missing.jsonl'], 'no task, file'), (['--tasks='], 'names no task'),
    (['--tasks=safety', '--shots=2'], 'safety has no examples'),
    (['--samples=3'], 'with temperature=0'), (['--samples=0'], 'samples=0: must be at least 1'),
    (['--max_items=-1'], 'max_items=-1: must be at least 0'),
    (['--quantize=int3', '--tasks=safety'], 'int3'),
    (['--against=out/nowhere', '--tasks=safety'], 'against=out/nowhere')])
def test_bad_settings(run_evaluate, capsys, words, message):
    with pytest.raises(SystemExit) as e:
        run_evaluate('--max_new_tokens=1', '--max_items=2', *words)
    assert e.value.code == 2 and message in e.value.message and '\n' not in e.value.message


def test_weights_that_are_no_numbers(run_evaluate, tmp_path, monkeypatch):
    """Neither a choice nor an answer: an error, never 0%."""
    own, real = questions(tmp_path / 'own.jsonl'), models.load_run

    def load(*args):
        model, *more = real(*args)
        model.lm_head.weight.data.fill_(float('nan'))
        return model, *more
    monkeypatch.setattr(models, 'load_run', load)
    for name in (own, 'safety'):
        with pytest.raises(SystemExit) as e:
            run_evaluate(f'--tasks={name}', '--max_items=2')
        assert 'the logits are not finite' in e.value.message


def test_damaged_results(run_evaluate, tmp_path, capsys):
    own = questions(tmp_path / 'own.jsonl')
    for text in ('{', '[]', '{"results": [1]}'):
        Path('out/base/eval.json').write_text(text)
        with pytest.raises(SystemExit) as e:
            run_evaluate(f'--tasks={own}')
        assert 'eval.json: no results of an evaluation' in e.value.message


# ---------------------------------------------------------------------------------------------
# During training, and in several processes


def test_benchmarks_during_training(run_train, tmp_path, capsys):
    own = questions(tmp_path / 'own.jsonl')
    run = run_train(tokenizer='byte', benchmark_interval=2, benchmarks=str(own), benchmark_items=5)
    found = read_log(run['run_dir'], 'benchmark')
    assert [e['step'] for e in found] == [2, 4, 6]
    assert all(0 <= e['scores'][str(own)]['acc'] <= 1 for e in found)
    assert train.benchmark_interval == 0


@pytest.mark.parametrize('settings, message', [
    (dict(benchmarks='humaneval'), 'runs programs'), (dict(benchmarks='helaswag'), 'no task'),
    (dict(benchmarks='safety', arch='lstm', optimizer='adamw'), 'serves GPTs only')])
def test_benchmarks_that_cannot_be(run_train, settings, message):
    """Said before the first step."""
    if settings['benchmarks'] == 'humaneval' and 'DATA_MIRROR' not in os.environ:
        pytest.skip('needs DATA_MIRROR')
    with pytest.raises(SystemExit) as e:
        run_train(tokenizer='byte', benchmark_interval=5, **settings)
    assert message in e.value.message and not read_log('out/gpt2', 'step')


def test_benchmarks_change_no_step(run_train, tmp_path, capsys):
    own = questions(tmp_path / 'own.jsonl')
    losses = [[e['train_loss'] for e in read_log(run_train(
        tokenizer='byte', benchmark_interval=n, benchmarks=str(own), out_dir=f'out/{n}')['run_dir'],
        'step')] for n in (0, 1)]
    assert losses[0] == losses[1]


def test_the_hubs_files_are_asked_for_with_the_token(monkeypatch, tmp_path):
    """Those of items and of examples; no other server gets it."""
    sent = {}

    def fetch(name, *_, headers):
        sent[name] = headers
        raise NoNetwork
    monkeypatch.setenv('HF_TOKEN', 'secret')
    monkeypatch.delenv('DATA_MIRROR', raising=False)
    monkeypatch.setattr(tasks, 'fetch', fetch)
    for name in ('mmlu', 'gsm8k'):
        task = tasks.TASKS[name]
        tasks.examples_of(task, str(tmp_path))
        with pytest.raises(Stop):
            tasks.place_of(task.file, name, str(tmp_path))
    assert len(sent) == 4
    for name, headers in sent.items():
        assert headers == ({'Authorization': 'Bearer secret'} if 'mmlu' in name else None)


def test_two_at_once_keep_both_results(tmp_path):
    """Each has begun before the other's result was there."""
    one, two = Results(tmp_path), Results(tmp_path)
    for results, task in ((one, 'a'), (two, 'b'), (one, 'c'), (two, 'a')):
        results.add({'hash': task, 'task': task, 'items': '', 'step': 1, 'settings': {}})
    assert [found['task'] for found in Results(tmp_path).found] == ['b', 'c', 'a']


@pytest.mark.slow
def test_several_processes_and_kills(base, tmp_path, capsys):
    """2 and 3 ranks, killed after the first task and begun again: the file of one process."""
    names = [questions(tmp_path / f'own{i}.jsonl', 40 + i) for i in range(3)]
    words = [str(ROOT / 'evaluate.py'), base, f'--tasks={",".join(map(str, names))},safety',
             '--device=cpu', '--threads=1', '--max_new_tokens=8', '--max_items=30']

    def results() -> list:
        found = json.loads(Path(base, 'eval.json').read_text())['results']
        return [{k: v for k, v in one.items() if k != 'seconds'} for one in found]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    expected = results()
    for n_ranks in (2, 3):
        Path(base, 'eval.json').unlink()
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                   f'--nproc_per_node={n_ranks}', *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not Path(base, 'eval.json').exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.wait()
        done = len(results())
        subprocess.run(command, check=True, capture_output=True)
        assert results() == expected
        assert 1 <= done <= 4
