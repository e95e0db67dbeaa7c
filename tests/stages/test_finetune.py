"""finetune.py: conversations and classes, from records to a run that later stages take."""
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import stopped_at_last

import classify
import dpo
import finetune
import sample
import train
from core.net import lora
from core.run import checkpoint, models
from core.run.log import read_log
from core.settings import Stop
from core.text.tokenizer import ByteTokenizer


def tensors_of(run) -> dict:
    """All weights and optimizer state of a run's last checkpoint."""
    step = checkpoint.steps(run)[-1]
    folder = checkpoint.step_folder(run, step)
    return {f'{kind}: {name}': t for kind in ('model', 'optimizer', 'adapters')
            if list(folder.glob(f'{kind}*'))
            for _, name, t in models.read_tensors(folder, kind)}


def chat(run_stage, chats, **settings):
    return run_stage(finetune, **{'dataset': str(chats), 'answers': 2, 'answer_tokens': 5,
                                  **settings})


def message_of(run) -> str:
    """The line with which it stops."""
    with pytest.raises(Stop) as e:
        run()
    assert e.value.code == 2 and '\n' not in e.value.message
    return e.value.message


def classes(run_stage, texts, **settings):
    return run_stage(classify, **{'dataset': str(texts), **settings})


def test_chat(run_stage, chats, capsys, monkeypatch):
    """It learns, evaluates before and after, answers, and talks in sample.py."""
    result = chat(run_stage, chats, out_dir='out/chat', max_steps=30, eval_interval=15)
    run = result['run_dir']
    evals = read_log(run, 'eval')
    assert [e['step'] for e in evals] == [0, 15, 30] and all(e['interval'] > 0 for e in evals)
    assert evals[-1]['val_loss'] < evals[0]['val_loss'] - 0.5
    answers = read_log(run, 'answer')
    assert len(answers) == 6 and answers[0]['expected'].startswith('It is ')
    assert capsys.readouterr().out.count('--- Colour of ball') == 2     # those of the last step
    model, tokenizer, state = models.load_run(run)
    assert state['task'] == 'chat'
    for name, value in dict(run_dir=run, prompt='Colour of ball 7?', temperature=0.0,
                            max_new_tokens=20, device='cpu').items():
        monkeypatch.setattr(sample, name, value)
    capsys.readouterr()
    assert sample.main()['texts'][0] and '<|' not in capsys.readouterr().out
    monkeypatch.setattr(sample, 'FLAGS', ('num_samples',))
    assert 'does nothing in a chat' in stopped_at_last(capsys, sample.main)
    monkeypatch.setattr(sample, 'FLAGS', ('system',))
    monkeypatch.setattr(sample, 'chat', False)
    assert 'does nothing here: out/chat continues text' in stopped_at_last(capsys, sample.main)


def test_split_is_by_question(chats, monkeypatch):
    """The same questions are held out, whatever the answers, seeds and other records."""
    for name, value in dict(dataset=str(chats), val_fraction=0.3).items():
        monkeypatch.setattr(finetune, name, value)
    held_out = [r.messages[0]['content'] for r in finetune.chat_data(TOKENIZER, 96)[2]]
    lines = chats.read_text().splitlines()
    half = chats.with_name('half.jsonl')
    half.write_text('\n'.join(line.replace('It is', 'Is it') for line in lines[::2]))
    monkeypatch.setattr(finetune, 'dataset', str(half))
    monkeypatch.setattr(finetune, 'seed', 1)
    again = [r.messages[0]['content'] for r in finetune.chat_data(TOKENIZER, 96)[2]]
    assert again == [q for q in held_out if int(q.split()[-1].strip('?')) % 2 == 0] and again


# What a window of 96 tokens cuts, at each door: its records, how many conversations, pairs or texts
# they are called, the record of a given length (in tokens with those of the chat), its data.
def said_by(door: str, length: int, n: int) -> dict:
    """The n-th record, of `length` tokens in all at the longest."""
    if door == 'classify':
        return {'text': f'{n} '.ljust(length, 'x'), 'label': 'up' if n % 2 else 'down'}
    rest = length - len(f'{n}?') - 3    # tokens of roles; the first end token, the last is no input
    asked = {'prompt': f'{n}?'}
    return asked | ({'chosen': 'x' * (rest - 1) + 'y', 'rejected': 'x' * rest} if door == 'dpo'
                    else {'output': 'x' * rest})


DOORS = {'chat': (finetune, 'conversations', lambda: finetune.chat_data(TOKENIZER, 96)),
         'dpo': (dpo, 'pairs', lambda: dpo.load_pairs(TOKENIZER, 96)),
         'classify': (classify, 'texts', lambda: classify.class_data(TOKENIZER, 96, []))}
TOKENIZER = ByteTokenizer()


@pytest.fixture
def door_data(tmp_path, monkeypatch):
    """door_data(door, found): what a stage makes of records."""
    def data(door: str, found: list) -> tuple:
        script, _, make = DOORS[door]
        path = tmp_path / f'{door}.jsonl'
        path.write_text(''.join(json.dumps(record) + '\n' for record in found))
        monkeypatch.setattr(script, 'dataset', str(path))
        return make()
    return data


@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('n_long, holds', [(20, 300), (2, 96)])
def test_records_that_the_window_cuts_are_counted(door_data, capsys, door, n_long, holds):
    """In one line, with the windows that would hold 95% of all records, and all."""
    lengths = [96] * (100 - n_long) + [200] * (n_long - n_long // 2) + [300] * (n_long // 2)
    found = [said_by(door, length, n) for n, length in enumerate(lengths)]
    facts = door_data(door, found)[-1]['window']
    out, err = capsys.readouterr()
    cut, = (line for line in (out + err).splitlines() if 'longer' in line)
    assert (f'{door}.jsonl: {n_long} of 100 {DOORS[door][1]} are longer than the window of 96 '
            f'tokens and are cut; a window of {holds} would hold 95% of them whole, one of 300 '
            'all') in cut
    assert facts == {'records': 100, 'cut': n_long, 'left_out': n_long * (door == 'dpo'),
                     'would_hold_95_percent': holds, 'longest': 300}
    door_data(door, found[:100 - n_long])
    assert 'longer' not in ''.join(capsys.readouterr())


@pytest.mark.parametrize('door', ['chat', 'dpo'])
def test_no_answer_is_whole(door_data, capsys, door):
    """Then no end token is a target: a warning."""
    differ = [said_by(door, 200, n) for n in range(60)]
    for record in differ:
        record.update({'chosen': 'y' * 200} if door == 'dpo' else {})
    door_data(door, differ)
    err = capsys.readouterr().err
    assert err.startswith('warning: ') and err.count('\n') == 1
    assert 'no answer fits whole, so the model does not learn to end one' in err
    door_data(door, [*differ, said_by(door, 96, 60)])
    assert 'no answer fits' not in ''.join(capsys.readouterr())


def test_pairs_that_the_window_makes_equal(door_data, capsys):
    """Are left out and counted; if nothing else is there, it stops."""
    found = [said_by('dpo', 97 + 60 * (n < 30), n) for n in range(100)]
    train, val, facts = door_data('dpo', found)
    err = capsys.readouterr().err
    assert len(train) + len(val) == 70 and facts['window']['left_out'] == 30
    assert err.startswith('warning: ') and err.count('\n') == 1
    assert '30 have two equal answers within it and are left out, the first ' in err
    same = lambda pairs, i: pairs.rows.ids[2 * i].tolist() == pairs.rows.ids[2 * i + 1].tolist()
    assert not any(same(part, i) for part in (train, val) for i in range(len(part)))
    message = message_of(lambda: door_data('dpo', found[:30]))
    assert 'has two equal answers within block_size=96 tokens' in message


@pytest.mark.parametrize('door', DOORS)
def test_cuts_are_in_the_log(run_stage, tmp_path, door):
    path = tmp_path / 'long.jsonl'
    path.write_text(''.join(json.dumps(said_by(door, 96 + n % 2, n)) + '\n' for n in range(60)))
    run = run_stage(DOORS[door][0], dataset=str(path), max_steps=1)['run_dir']
    start = read_log(run, 'start')[0]
    assert start['window'] == {'records': 60, 'cut': 30, 'left_out': 0,
                               'would_hold_95_percent': 97, 'longest': 97}
    assert 'window' not in start['identity']['data']


def test_classify(run_stage, texts, capsys, monkeypatch, tmp_path):
    result = classes(run_stage, texts, out_dir='out/classes', max_steps=40, eval_interval=20,
                     learning_rate=1e-2)
    assert result['accuracy'] > 0.9 and sum(map(sum, result['confusion'])) == 18
    run = result['run_dir']
    end = read_log(run, 'end')[0]
    assert end['test_accuracy'] == result['accuracy'] and 'test_calibration_error' in end
    (tmp_path / 'two.txt').write_text('rise number 500\n\nfall number 501 and more\n')
    for name, value in dict(run_dir=run, classify_file=str(tmp_path / 'two.txt'),
                            device='cpu').items():
        monkeypatch.setattr(sample, name, value)
    capsys.readouterr()
    found = sample.main()['classes']
    assert [f['label'] for f in found] == ['up', 'down']
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split('\t')[0] == 'down' and lines[1].endswith('fall number 501 and more')
    monkeypatch.setattr(sample, 'classify_file', '')
    monkeypatch.setattr(sample, 'prompt', 'rise')
    assert 'is a classifier' in stopped_at_last(capsys, sample.main)


def test_a_classifier_reads_as_much_as_it_learnt_to(run_stage, texts, monkeypatch, capsys):
    """Not as much as the model has room for: so sample.py says what the test said; it is told."""
    run = classes(run_stage, texts, block_size=40, max_steps=2)['run_dir']
    said = []
    for end in ('', 'fall ' * 5):
        for name, value in dict(run_dir=run, classify='rise number 500 '.ljust(40) + end,
                                device='cpu').items():
            monkeypatch.setattr(sample, name, value)
        capsys.readouterr()
        said.append(sample.main()['classes'])
        warned = '1 of 1 texts are longer than the 40 tokens' in capsys.readouterr().err
        assert warned == bool(end)
    assert said[0] == said[1]


def test_duplicates_go_and_classes_are_shared_out(texts, tmp_path, monkeypatch, capsys):
    """Equal texts are never on two sides; 70/10/20 of each class."""
    path = tmp_path / 'twice.tsv'
    path.write_text(texts.read_text() * 2)
    for name, value in dict(dataset=str(path), val_fraction=0.1, test_fraction=0.2).items():
        monkeypatch.setattr(classify, name, value)
    parts, names, _ = classify.class_data(TOKENIZER, 96, [])
    assert '180 records, 90 of them duplicates; 63 to train on, 9 to validate on, 18' in \
        capsys.readouterr().out
    assert names == ['down', 'up']
    assert [sum(ids[-1] == 0 for ids in part.ids) for part in parts] == [21, 3, 6]
    seen = [tuple(ids) for part in parts for ids in part.ids]
    assert len(set(seen)) == len(seen) == 90


def triples(text: str) -> set:
    """The sets of three words in a row that near duplicates are told by; here without hashes."""
    words = re.findall(r'\w+', text.lower())
    return set(zip(words, words[1:], words[2:])) if len(words) > 2 else set(words)


def most_alike(some: list[str], others: list[str]) -> float:
    """The largest Jaccard similarity of one of these and one of those, by comparing all."""
    sets = [triples(text) for text in others]
    return max((len(one & two) / max(1, len(one | two)) for one in map(triples, some)
                for two in sets), default=0.0)


@pytest.fixture
def class_parts(tmp_path, monkeypatch):
    """class_parts(dataset, seed): (text, label) of each part that class_data makes."""
    def parts(dataset, seed=1337) -> list[list[tuple]]:
        if not isinstance(dataset, str):
            path = tmp_path / 'c.jsonl'
            path.write_text(''.join(json.dumps(dict(zip(('label', 'text'), found))) + '\n'
                                    for found in dataset))
            dataset = str(path)
        for name, value in dict(dataset=dataset, seed=seed).items():
            monkeypatch.setattr(classify, name, value)
        found, names, _ = classify.class_data(TOKENIZER, 10_000, [])
        return [[(TOKENIZER.decode(ids[:-1].tolist()), names[ids[-1]]) for ids in part.ids]
                for part in found]
    return parts


def copies(i: int, n: int) -> list[str]:
    """n texts that differ in their last words."""
    word = lambda i: ''.join(chr(ord('a') + int(digit)) for digit in str(i))
    text = ' '.join(letter + word(i) for letter in 'abcdefghijklmnopqrst')
    return [f'{text} end{word(j)}' for j in range(n)]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('sizes', [[5] * 40, [1] * 150 + [30], [1, 2, 3, 4, 9] * 10, [14] * 12])
def test_near_copies_are_in_one_part(class_parts, seed, sizes):
    """Also those whose labels differ; each class has half to twice its share in each part."""
    found = [(('up', 'down')[i % 2 if i % 7 else j % 2], text)
             for i, n in enumerate(sizes) for j, text in enumerate(copies(i, n))]
    parts = class_parts(found, seed)
    assert sorted(sum(parts, [])) == sorted((text, label) for label, text in found)
    texts = [[text for text, _ in part] for part in parts]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert most_alike(texts[a], texts[b]) < 0.7
    for label in ('up', 'down'):
        n = sum(known == label for known, _ in found)
        for part, share in zip(parts, (0.7, 0.1, 0.2)):
            assert share / 2 <= sum(known == label for _, known in part) / n <= share * 2


def test_a_class_of_near_copies_alone(class_parts, capsys):
    """As lines of a program's log are: they are shared out one by one, and that is told."""
    found = [('down', text) for text in copies(0, 30)] + [('up', copies(i, 1)[0])
                                                          for i in range(1, 31)]
    parts = class_parts(found)
    assert [sum(label == 'down' for _, label in part) for part in parts] == [21, 3, 6]
    err = capsys.readouterr().err
    assert err.startswith('warning: ') and "the label 'down' are near copies of each other" in err


def test_equal_texts_with_different_labels_are_counted(class_parts, capsys):
    found = [(('up', 'down')[i % 2], text) for i in range(40) for text in copies(i, 1)]
    class_parts(found)
    assert 'different labels' not in capsys.readouterr().out
    parts = class_parts([*found, ('up', found[1][1]), ('up', found[3][1]), ('up', found[0][1])])
    assert '43 records, 3 of them duplicates, 2 of these with another label' in \
        capsys.readouterr().out
    assert sorted(sum(parts, [])) == sorted((text, label) for label, text in found)


def test_texts_that_differ_in_case_are_other_texts(class_parts):
    """Where it may mean something else; prose is equal in any case. None is in two parts."""
    rings = [(('up', 'down')[i % 2], f'{ring}{i}') for i in range(40)
             for ring in ('c1ccccc', 'C1CCCCC')]
    prose = [(('up', 'down')[i % 2], text) for i in range(40) for plain in copies(i, 1)
             for text in (plain, plain.upper())]
    parts = class_parts(rings + prose)
    assert sum(map(len, parts)) == 80 + 40
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not {t.lower() for t, _ in parts[a]} & {t.lower() for t, _ in parts[b]}


@pytest.mark.skipif('DATA_MIRROR' not in os.environ, reason='needs sms_spam.tsv from DATA_MIRROR')
@pytest.mark.parametrize('n', [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_test_text_of_sms_spam_has_a_near_copy_elsewhere(class_parts, n):
    parts = class_parts('sms_spam', 1)
    train, val, test = ([text for text, _ in part] for part in parts)
    spam = [text for text, label in parts[2] if label == 'spam']
    assert most_alike((spam + test)[:n], train) < 0.7 and most_alike(val[:n], train) < 0.7
    n_all = sum(map(len, parts))
    for part, share in zip(parts, (0.7, 0.1, 0.2)):
        n_spam = sum(label == 'spam' for _, label in part)
        assert abs(len(part) / n_all - share) < 0.005 and 0.11 < n_spam / len(part) < 0.14


@pytest.mark.parametrize('run, settings', [
    (chat, dict(lora_rank=2, lora_dropout=0.1)), (classes, dict(layers='1', balance=True)),
    pytest.param(chat, dict(dropout=0.1), marks=pytest.mark.slow),
    pytest.param(classes, dict(lora_rank=2), marks=pytest.mark.slow)],
    ids=['adapters', 'class layers', 'dropout', 'class adapters'])
def test_interrupted_and_resumed(run_stage, chats, texts, monkeypatch, run, settings):
    """Weights, adapters and optimizer state bitwise those of an uninterrupted run."""
    data = texts if run is classes else chats
    whole = run(run_stage, data, out_dir='out/whole', **settings)
    script = classify if run is classes else finetune
    real = script.train_step
    with monkeypatch.context() as patch:
        patch.setattr(script, 'train_step', lambda *args, **options: real(
            *args, **options)._replace(asked=args[2] == 3))
        assert run(run_stage, data, out_dir='out/cut', **settings)['stopped']
    cut = run(run_stage, data, out_dir='out/cut', **settings)
    assert cut['run_dir'] == 'out/cut' and cut['step'] == 6
    found, expected = tensors_of('out/cut'), tensors_of(whole['run_dir'])
    assert found.keys() == expected.keys() and len(found) > 10
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_only_some_layers_learn(run_stage, base, texts):
    before = dict(models.load_run(base)[0].named_parameters())
    for layers, expected in (('head', {'ln_f', 'lm_head'}), ('1', {'h.1', 'ln_f', 'lm_head'})):
        run = classes(run_stage, texts, out_dir=f'out/{layers}', layers=layers)['run_dir']
        after = models.load_run(run, classifier=True)[0].named_parameters()
        changed = {'.'.join(name.split('.')[:2 if name.startswith('h.') else 1])
                   for name, p in after
                   if name == 'lm_head.weight' or not torch.equal(p, before[name])}
        assert changed == expected


def test_adapters_alone(run_stage, chats):
    run = Path(chat(run_stage, chats, out_dir='out/adapters', lora_rank=2,
                    save_adapters=True)['run_dir'])
    config = json.loads((run / 'adapter/adapter_config.json').read_text())
    assert config['peft_type'] == 'LORA' and config['r'] == 2
    assert not lora.adapters(models.load_run(str(run))[0])


def test_random_weights_and_pairs(run_stage, chats, base, capsys):
    """What pretraining is worth; --eval_only compares two runs on the same records."""
    tuned = chat(run_stage, chats, out_dir='out/tuned')
    control = chat(run_stage, chats, out_dir='out/control', random_weights=True)
    assert control['run_dir'] == 'out/control'
    scores = chat(run_stage, chats, run_dir='out/tuned', eval_only=True, against='out/control')
    mean, half = scores['difference']
    assert mean == pytest.approx(tuned['best_val_loss'] - control['best_val_loss'], abs=1e-6)
    assert half > 0
    untuned = chat(run_stage, chats, run_dir='out/tuned', eval_only=True, against=base)
    assert untuned['difference'][0] < 0


@pytest.mark.parametrize('door, lines, message', [
    ('classify', 'up\tone\nup\ttwo\n', "all records have the label 'up'"),
    ('classify', 'up\tone\ndown\ttwo\n', "1 different texts with the label 'down' are too few"),
    ('chat', '{"instruction": "a", "output": "b"}\n', 'leave '),
    ('chat', ''.join(json.dumps({'instruction': f'{i}' * 200, 'output': 'b'}) + '\n'
                     for i in range(30)), 'has no answer within block_size=96 tokens'),
])
def test_records_that_are_no_good_together(run_stage, tmp_path, door, lines, message):
    path = tmp_path / ('bad.tsv' if door == 'classify' else 'bad.jsonl')
    path.write_text(lines)
    assert message in message_of(lambda: run_stage(DOORS[door][0], dataset=str(path)))
    assert not Path(f'out/base-{door}').exists()


def test_label_that_is_no_class(run_stage, texts):
    message = message_of(lambda: classes(run_stage, texts, labels='up,sideways'))
    assert f"{texts}:1: label 'down' is none of sideways, up" in message


def test_another_test_part_is_refused(run_stage, texts):
    """What a classifier is tested on is never what it has learnt from."""
    run = classes(run_stage, texts, out_dir='out/a')['run_dir']
    again = dict(run_dir=run, eval_only=True)
    assert 'accuracy' in classes(run_stage, texts, **again)
    for other in (dict(seed=7), dict(test_fraction=0.5)):
        assert 'gives another test part' in message_of(
            lambda other=other: classes(run_stage, texts, **again, **other))
    assert classes(run_stage, texts, out_dir='out/a', test_fraction=0.5)['run_dir'] == 'out/a-2'


@pytest.mark.parametrize('script', [train, finetune, dpo])
def test_a_classifier_is_no_base(run_stage, texts, chats, preferences, run_train, script):
    run = classes(run_stage, texts, out_dir='out/a')['run_dir']
    if script is train:
        assert 'is a classifier' in message_of(lambda: run_train(
            init_from=run, block_size=96, tokenizer='byte', n_layer=12))
        return
    data = preferences if script is dpo else chats
    assert 'is a classifier of 2 classes' in message_of(
        lambda: run_stage(script, run_dir=run, dataset=str(data)))


def test_lstm(run_stage, run_train, chats):
    """The other architecture: one conversation in a row."""
    run = run_train(tokenizer='byte', block_size=96, arch='lstm', out_dir='out/lstm',
                    max_steps=2, eval_interval=2)['run_dir']
    assert 'add --pack=False' in message_of(lambda: chat(run_stage, chats, run_dir=run))
    assert chat(run_stage, chats, run_dir=run, pack=False, micro_batch_size=3)['step'] == 6
    assert 'leave out lora_rank' in message_of(
        lambda: chat(run_stage, chats, run_dir=run, pack=False, lora_rank=2))


@pytest.mark.parametrize('settings, message', [
    (dict(run_dir=''), 'no model given'), (dict(dataset=''), 'no dataset given'),
    (dict(dataset='sms_spam'), 'is a set of another kind'),
    (dict(dataset='none.jsonl'), 'neither a file nor a named set'),
    (dict(layers='some'), 'layers=some'), (dict(layers='9'), 'has only 2'),
    (dict(lora_rank=2, layers='1'), 'choose one of the two'),
    (dict(lora_rank=2, lora_targets='q_proj,x'), "no layers 'x'"),
    (dict(save_adapters=True), 'needs'), (dict(against='out/x'), 'is for --eval_only'),
    (dict(block_size=97), 'knows only 96 positions'), (dict(epochs=0.0), 'epochs=0.0'),
    ], ids=str)
def test_bad_settings(run_stage, chats, settings, message):
    assert message in message_of(lambda: chat(run_stage, chats, **settings))
