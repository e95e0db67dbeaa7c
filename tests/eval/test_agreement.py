"""evaluate.py beside EleutherAI's lm-evaluation-harness, on the same files, item by item."""
import json
import math
import os
import random
from pathlib import Path

import pytest
import test_hf
import test_smollm2
import torch

import evaluate
from core.eval import answers, tasks
from core.formats import gguf, hf
from core.run import models
from core.text.tokenizer import BPETokenizer

os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'
lm_eval = pytest.importorskip('lm_eval')
MIRROR = Path(os.environ.get('DATA_MIRROR', 'missing'))
HERE = Path(__file__)
TEXT = HERE.read_text() + Path(evaluate.__file__).read_text()
PRECISION = 'float32'       # of both sides


def local(name: str, file: Path, **more) -> dict:
    """A task of the harness on a file of JSON lines."""
    return {'task': name, 'dataset_path': 'json', 'test_split': 'test',
            'dataset_kwargs': {'data_files': {'test': str(file)}}, **more}


def choice(name: str, file: Path, text, choices, target, metrics=('acc', 'acc_norm'), **more):
    return local(name, file, output_type='multiple_choice', doc_to_text=text,
                 doc_to_choice=choices, doc_to_target=target,
                 metric_list=[{'metric': metric} for metric in metrics], **more)


def their_hellaswag(file: Path) -> dict:
    from lm_eval.tasks.hellaswag.utils import preprocess
    return choice('hellaswag', file, lambda doc: preprocess(f'{doc["activity_label"]}: '
                                                            f'{doc["ctx"]}'),
                  lambda doc: [*map(preprocess, doc['endings'])], lambda doc: doc['label'])


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> dict[str, Path]:
    """Questions, sentences with two readings, passages and documents, made of source code."""
    folder, drawn = tmp_path_factory.mktemp('tasks'), random.Random(3)
    lines = [line for line in TEXT.split('\n') if 20 < len(line.strip())]

    def rows(make, n=24):
        return '\n'.join(json.dumps(make(i)) for i in range(n)) + '\n'
    kinds = {
        'own': lambda i: {
            'question': '\n'.join(drawn.sample(lines, 1 + i % 4)) + ' ' * (i % 3 == 0),
            'choices': [text.strip() for text in drawn.sample(lines, 2 + i % 3)], 'label': i % 2},
        'winogrande': lambda i: {
            'sentence': f'{drawn.choice(lines)} that _ {drawn.choice(lines).strip()}',
            'option1': drawn.choice(lines)[:9], 'option2': drawn.choice(lines)[:19],
            'answer': str(1 + i % 2)},
        'lambada': lambda i: {'text': ' '.join(' '.join(drawn.sample(lines, 3)).split())},
        'text': lambda i: {'text': '\n'.join(drawn.sample(lines, 1 + 3 * i))}}
    found = {}
    for name, make in kinds.items():
        found[name] = folder / f'{name}.jsonl'
        found[name].write_text(rows(make))
    return found


def theirs_on(folder: Path, task: dict, limit: int = 0, **more) -> tuple[dict, list[dict]]:
    """The harness's results and its samples, in the order of the items."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    evaluator.add_env_info = lambda results: None   # it runs pip, for a second
    model = HFLM(pretrained=str(folder), dtype=PRECISION, device='cpu', batch_size=8, **more)
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[task], log_samples=True, bootstrap_iters=0,
                                    limit=limit or None, task_manager=manager)
    return found['results'][task['task']], sorted(found['samples'][task['task']],
                                                  key=lambda sample: sample['doc_id'])


def ours_on(folder, name: str, monkeypatch, task=None, max_items: int = 0) -> dict:
    """What evaluate.py finds: values by item, and scores."""
    if task:
        monkeypatch.setitem(tasks.TASKS, name, task)
    model, tokenizer, _ = models.load_run(str(folder))
    model.to(getattr(torch, PRECISION))
    asked = tasks.load(name, max_items)
    device = evaluate.processes.begin('cpu', '', False, 0, 1, training=False)[1]
    values = evaluate.measure(model, tokenizer, asked, evaluate.Options(), device)
    return values | {'scores': evaluate.score(values, asked)}


def same(ours: list[float], theirs: list[float], sums: list[list[float]]) -> None:
    """Equal item by item, but where the two best are within 1e-5 of each other."""
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        best, second = sorted(sums[n])[:-3:-1]
        assert a == b or best - second < 1e-5, f'item {n}: {a} and {b}, {sums[n]}'


def compare_choice(folder, name, file, their_task, monkeypatch, task, limit=0,
                   metrics=('acc', 'acc_norm')):
    found, samples = theirs_on(folder, their_task, limit)
    ours = ours_on(folder, name, monkeypatch, task, limit)
    sums = [[float(said[0][0]) for said in sample['resps']] for sample in samples]
    worst = max(abs(a - b) for mine, other in zip(ours['log_probabilities'], sums, strict=True)
                for a, b in zip(mine, other, strict=True))
    assert worst < 2e-3 if 'smollm2' in str(folder) else worst < 2e-4, worst
    for metric in metrics:
        same(ours[metric], [sample[metric] for sample in samples], ours['log_probabilities'])
        if ours[metric] == [sample[metric] for sample in samples]:
            assert ours['scores'][metric]['value'] == pytest.approx(
                found[f'{metric},none'], abs=1e-6)
    return worst


def compare_all(folder: Path, files: dict, monkeypatch, limit: int = 0) -> None:
    """Four tasks of the files, of each `limit` items."""
    own, wino = files['own'], files['winogrande']
    compare_choice(folder, str(own), own, choice(
        'own', own, '{{question}}', '{{choices}}', '{{label}}'), monkeypatch, None, limit)
    from lm_eval.tasks.winogrande import preprocess_winogrande as theirs
    compare_choice(folder, 'winogrande', wino, choice(
        'winogrande', wino, theirs.doc_to_text, theirs.doc_to_choice, theirs.doc_to_target,
        ['acc']), monkeypatch, tasks.TASKS['winogrande']._replace(file=tasks.File(str(wino), '')),
        limit, ['acc'])

    passages = files['lambada']
    found, samples = theirs_on(folder, local(
        'lambada', passages, output_type='loglikelihood',
        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
        doc_to_target="{{' '+text.split(' ')[-1]}}",
        metric_list=[{'metric': 'perplexity', 'aggregation': 'perplexity'}, {'metric': 'acc'}]),
        limit)
    ours = ours_on(folder, 'lambada', monkeypatch, tasks.TASKS['lambada']._replace(
        file=tasks.File(str(passages), '')), limit)
    assert ours['acc'] == [sample['acc'] for sample in samples]
    assert math.log(ours['scores']['perplexity']['value']) == pytest.approx(
        math.log(found['perplexity,none']), rel=1e-6)

    texts = files['text']
    found, samples = theirs_on(folder, local(
        'text', texts, output_type='loglikelihood_rolling', doc_to_text='',
        doc_to_target='{{text}}', metric_list=[{'metric': metric} for metric in (
            'word_perplexity', 'byte_perplexity', 'bits_per_byte')]), limit)
    ours = ours_on(folder, str(texts), monkeypatch, None, limit)
    nats = [sample['resps'][0][0] for sample in samples]
    nats = [float(x[0] if isinstance(x, (list, tuple)) else x) for x in nats]
    mine = [-row[0] for row in ours['bits_per_byte']]
    assert mine == pytest.approx(nats, rel=1e-6)
    scores = ours['scores']
    assert scores['bits_per_byte']['value'] == pytest.approx(found['bits_per_byte,none'], abs=1e-6)
    assert scores['word_perplexity']['value'] == pytest.approx(
        found['word_perplexity,none'], rel=1e-5)
    assert 2 ** scores['bits_per_byte']['value'] == pytest.approx(
        found['byte_perplexity,none'], abs=1e-5)


@pytest.fixture(scope='module')
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 600)


def test_tiny_qwen3(tokenizer, files, tmp_path, monkeypatch):
    """Random weights, and a window of 128 tokens, which contexts and texts overflow."""
    model = test_hf.our_model('qwen3')
    hf.save(model, tokenizer, tmp_path / 'hf')
    compare_all(tmp_path / 'hf', files, monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(not MIRROR.is_dir(), reason='needs DATA_MIRROR')
def test_austen(files, tmp_path, monkeypatch, run_train):
    """A model of ours that was trained on Jane Austen, and the 1,000 items of HellaSwag."""
    run = run_train(dataset='austen', max_steps=60, eval_interval=60, block_size=128, n_embd=128)
    model, known, _ = models.load_run(run['run_dir'])
    hf.save(model, known, tmp_path / 'hf')
    compare_all(tmp_path / 'hf', files, monkeypatch)
    compare_hellaswag(tmp_path / 'hf', monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(not test_smollm2.FILES or not MIRROR.is_dir(), reason='needs SmolLM2 and '
                    'DATA_MIRROR')
def test_smollm2_135m(files, tmp_path, monkeypatch):
    model, known, _ = gguf.load(test_smollm2.FILES[0])
    hf.save(model, known, tmp_path / 'smollm2')
    compare_hellaswag(tmp_path / 'smollm2', monkeypatch)
    # In float32 the sums of both sides, which have other batches, differ by up to 5e-4.
    monkeypatch.setattr(f'{__name__}.PRECISION', 'float64')
    compare_all(tmp_path / 'smollm2', files, monkeypatch, limit=12)


def compare_hellaswag(folder, monkeypatch, limit: int = 0) -> None:
    compare_choice(folder, 'hellaswag', None, their_hellaswag(MIRROR / 'hellaswag_val_1k.jsonl'),
                   monkeypatch, None, limit)


def test_numbers_of_gsm8k():
    """300 completions: what is taken for the answer, strictly and flexibly, and whether it is."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter
    drawn = random.Random(7)
    parts = ['####', '#### ', '##### ', ' ', '\n', '$', '-', '.', ',', '18', '1,800', '3.50', '18.',
             '-4', '$18', 'The answer is ', ' apples', '<<2*9=18>>', '####18', '#### -1,234.5',
             '18%', 'eighteen', '½', '١٨', '1 8', '..', ',,', '$.', '0018', '18.0', 'A']
    said = [''.join(drawn.choices(parts, k=drawn.randint(1, 9))) for _ in range(290)]
    said += ['', ' ', '18', '#### 18', '#### 18.', '#### $18', '#### 1,8', 'x #### 18 #### 19',
             'so 18.', '9 + 9 = $18.']
    golds = ['9 + 9 = <<9+9=18>>18\n#### 18', '#### 1,800', 'a\n#### -4', '#### 3.50']
    strict = RegexFilter(r'#### (\-?[0-9\.\,]+)')
    flexible = RegexFilter(r'(-?[$0-9.,]{2,})|(-?[0-9]+)', group_select=-1)
    hits = 0
    for n, text in enumerate(said):
        item = tasks.Item('', ['q'], answer=golds[n % 4] if n % 5 else golds[0])
        for filter_, grade in ((strict, answers.strict), (flexible, answers.flexible)):
            [[theirs]] = filter_.apply([[text]], [{}])
            right = exact_match_hf_evaluate(
                predictions=[theirs], references=[item.answer], ignore_case=True,
                regexes_to_ignore=[',', r'\$', r'(?s).*#### ', r'\.$'])['exact_match']
            assert grade(item, text) == bool(right), (text, item.answer)
            hits += bool(right)
    assert 20 < hits < 200
