"""dpo.py: the loss, by hand and against TRL, and which tokens are in it."""
import copy
import json
import math
import os

import pytest
import torch
from conftest import stopped
from test_lora import CPU, tiny

import dpo
from core.data import records
from core.data.dataset import IGNORE, PADDING
from core.formats import hf
from core.ranks.processes import Ranks
from core.text.tokenizer import ByteTokenizer

os.environ['HF_HUB_OFFLINE'] = '1'
TOKENIZER = ByteTokenizer()
ASKED = [('Name a city.', 'Paris', 'no'), ('2 + 2?', 'It is four, of course.', 'Five é!'),
         ('Sing.', 'La', 'I would rather not sing today.'), ('Hm', 'Yes?', 'What is it now?')]


def record_of(question: str, chosen: str, rejected: str, before: tuple = ()) -> dict:
    """A record with messages; `before` are earlier ones, of user and assistant in turn."""
    roles = ('user', 'assistant') * 3
    return {'messages': [{'role': role, 'content': text}
                         for role, text in zip(roles, (*before, question))],
            'chosen': chosen, 'rejected': rejected}


RECORDS = [record_of(*asked) for asked in ASKED]
RECORDS[3] = record_of(*ASKED[3], before=('Are you there?', 'I am.'))


def write(path, found: list) -> str:
    path.write_text(''.join(json.dumps(record) + '\n' for record in found))
    return str(path)


def pairs_of(found: list, size: int = 64) -> dpo.Pairs:
    """Records as Pairs."""
    kept = [records.preference(f'r:{i}', record) for i, record in enumerate(found)]
    return dpo.Pairs([(record, dpo.encode(record, TOKENIZER, size)) for record in kept], size)


# ---------------------------------------------------------------------------------------------
# By hand


SIGMOID_1 = 1 / (1 + math.exp(-1))      # 0.7310586, so -log of it is 0.3132617


@pytest.mark.parametrize('loss, margin, value, gradient', [
    # beta = 0.5
    (lambda m: dpo.dpo_loss(m, 0.5), 0.0, math.log(2), -0.25),
    (lambda m: dpo.dpo_loss(m, 0.5), 2.0, 0.3132617, -0.5 * (1 - SIGMOID_1)),
    (lambda m: dpo.dpo_loss(m, 0.5), -2.0, 1.3132617, -0.5 * SIGMOID_1),
    (lambda m: dpo.dpo_loss(m, 0.5), -1e4, 5000.0, -0.5),
    # 0.8 x 0.3132617 + 0.2 x 1.3132617, -0.5 (0.8 x 0.2689414 - 0.2 x 0.7310586)
    (lambda m: dpo.dpo_loss(m, 0.5, 0.2), 2.0, 0.5132617, -0.0344707),
    (lambda m: dpo.dpo_loss(m, 0.5, 0.2), 0.0, math.log(2), -0.15),
    # least where the model is as sure as the labels are right: the entropy of (0.8, 0.2)
    (lambda m: dpo.dpo_loss(m, 0.5, 0.2), 2 * math.log(4), 0.5004024, 0.0),
    # (2 - 1)^2, (0 - 1)^2, and its goal
    (lambda m: dpo.ipo_loss(m, 0.5), 2.0, 1.0, 2.0),
    (lambda m: dpo.ipo_loss(m, 0.5), 0.0, 1.0, -2.0),
    (lambda m: dpo.ipo_loss(m, 0.1), 5.0, 0.0, 0.0)])
def test_losses_by_hand(loss, margin, value, gradient):
    m = torch.tensor(margin, requires_grad=True)
    found = loss(m)
    found.backward()
    assert found.item() == pytest.approx(value, abs=1e-6)
    assert m.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize('settings, losses', [
    (dict(loss='dpo', beta=0.5), (0.3132617, 1.3132617)),
    (dict(loss='dpo', beta=0.5, label_smoothing=0.2), (0.5132617, 1.1132617)),
    (dict(loss='ipo', beta=0.5), (1.0, 9.0))])
def test_sums_by_hand(monkeypatch, settings, losses):
    """Two pairs with margins 2 and -2, of tokens with given losses."""
    for name, value in settings.items():
        monkeypatch.setattr(dpo, name, value)
    nats = torch.tensor([[0, 1, 2.], [4, 0, 0], [1, 1, 1], [0, 0, 2]])      # log p -3, -4, -3, -2
    reference = torch.tensor([-4., -3, -2, -3])     # so gains are 1, -1, -1, 1
    y = torch.where(nats > 0, 7, IGNORE)
    found = dpo.loss_sums(lambda *_, **__: nats, (y, y, y, reference))
    # rewards are beta times the gains; one of two pairs is in the right order
    assert found.tolist() == pytest.approx([sum(losses), 0, 0, 1], abs=1e-6)
    first = dpo.loss_sums(lambda *_, **__: nats[:2], (y[:2], y[:2], y[:2], reference[:2]))
    assert first.tolist() == pytest.approx([losses[0], 0.5, -0.5, 1], abs=1e-6)


def log_p_by_hand(model, messages: list, answer: str) -> float:
    """Log-probability of an answer and its end after the messages, token by token."""
    prompt = TOKENIZER.encode_chat(messages, reply=True)
    said = [*TOKENIZER.encode(answer), TOKENIZER.special['<|end|>']]
    total = 0.0
    for i, token in enumerate(said):
        logits = model(torch.tensor([prompt + said[:i]]))[0, -1]
        total += logits.log_softmax(dim=-1)[token].item()
    return total


@torch.no_grad()
def test_which_tokens_count(monkeypatch):
    """Those of the last answer, the end token included; none of the question, none of its role."""
    monkeypatch.setattr(dpo, 'beta', 0.5)
    model, pairs = tiny('qwen3'), pairs_of(RECORDS)
    for sample in range(len(pairs)):
        record = RECORDS[pairs.place(sample)]
        x, y, doc, _ = batch = pairs.batch([sample])
        said = [TOKENIZER.decode(row[row != IGNORE].tolist()) for row in y]
        assert said == [f'{record[name]}<|end|>' for name in ('chosen', 'rejected')]
        for ids, row, known in zip(x, y, doc):
            n = int((known >= 0).sum())
            assert torch.equal(ids[1:n][row[:n - 1] != IGNORE], row[:n - 1][row[:n - 1] != IGNORE])
        _, *rewards, _ = dpo.loss_sums(model, batch).tolist()
        by_hand = [0.5 * log_p_by_hand(model, record['messages'], record[name])
                   for name in ('chosen', 'rejected')]
        assert rewards == pytest.approx(by_hand, rel=1e-5)


def gradients(model, pairs, samples) -> tuple[torch.Tensor, list]:
    """loss_sums of a batch, and the gradients of its loss."""
    model.zero_grad()
    found = dpo.loss_sums(model, pairs.batch(samples))
    found[0].backward()
    return found.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize('loss', ['dpo', 'ipo'])
def test_padding_counts_nothing(monkeypatch, loss):
    monkeypatch.setattr(dpo, 'loss', loss)
    model, pairs = tiny('qwen3'), pairs_of(RECORDS)
    pairs.reference[:] = torch.randn(4, 2) - 20
    sums, grads = gradients(model, pairs, [0, 1])
    padded, padded_grads = gradients(model, pairs, [0, PADDING, 1, PADDING])
    assert padded.tolist() == pytest.approx(sums.tolist(), rel=1e-6)
    for a, b in zip(grads, padded_grads):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    alone, none = gradients(model, pairs, [PADDING])
    assert not alone.any() and not any(grad.any() for grad in none)


def test_each_pair_once_an_epoch():
    """With its own log-probabilities of the reference, whatever the order."""
    pairs = pairs_of(RECORDS)
    pairs.reference[:] = torch.arange(8.).view(4, 2)
    orders = []
    for epoch in range(3):
        orders.append([pairs.place(4 * epoch + i) for i in range(4)])
        _, y, _, reference = pairs.batch(range(4 * epoch, 4 * epoch + 4))
        for i, p in enumerate(orders[-1]):
            assert reference[2 * i:2 * i + 2].tolist() == [2 * p, 2 * p + 1]
            chosen = y[2 * i][y[2 * i] != IGNORE]
            assert TOKENIZER.decode(chosen[:-1].tolist()) == RECORDS[p]['chosen']
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_pair_without_a_preference(monkeypatch, capsys, tmp_path):
    """Of a file it is refused by its line, or left out and counted."""
    found = [*RECORDS[:2], {**RECORDS[2], 'rejected': RECORDS[2]['chosen']}, RECORDS[3]]
    path = write(tmp_path / 'p.jsonl', found)
    monkeypatch.setattr(dpo, 'dataset', path)
    monkeypatch.setattr(dpo, 'validation', write(tmp_path / 'v.jsonl', RECORDS))
    message = stopped(capsys, lambda: dpo.load_pairs(TOKENIZER, 64))
    assert message.startswith(f'{path}:3: chosen and rejected are equal')
    monkeypatch.setattr(dpo, 'skip_bad', True)
    train, val, _ = dpo.load_pairs(TOKENIZER, 64)
    out, err = capsys.readouterr()
    assert (len(train), len(val)) == (3, 4) and '3 pairs to train on, 4 to' in out
    assert '1 of 4 records are left out' in err and f'{path}:3' in err


# ---------------------------------------------------------------------------------------------
# TRL


def their_trainer(trl, folder, label_smoothing: float):
    """TRL's trainer on exported models, and its batch of all RECORDS, as it prepares them.

    Its 'sigmoid' knows no label smoothing e. With l the loss of a margin and r that of its
    opposite, 'sigmoid' is l, 'robust' is ((1 - e) l - e r) / (1 - 2 e), and (1 - e) l + e r is
    2 (1 - e) times the first less (1 - 2 e) times the second.
    """
    datasets, transformers = (pytest.importorskip(name) for name in ('datasets', 'transformers'))
    model, reference = (transformers.AutoModelForCausalLM.from_pretrained(folder / name)
                        for name in ('policy', 'reference'))
    e = label_smoothing
    smoothed = dict(loss_type=['sigmoid', 'robust'], label_smoothing=e,
                    loss_weights=[2 * (1 - e), -(1 - 2 * e)]) if e else {}
    args = trl.DPOConfig(output_dir=str(folder), beta=0.3, bf16=False, use_cpu=True,
                         report_to='none', **smoothed)
    answer = lambda text: [{'role': 'assistant', 'content': text}]
    trainer = trl.DPOTrainer(
        model, reference, args, train_dataset=datasets.Dataset.from_list([
            {'prompt': r['messages'], 'chosen': answer(r['chosen']),
             'rejected': answer(r['rejected'])} for r in RECORDS]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / 'policy'))
    return trainer, trainer.data_collator(list(trainer.train_dataset))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """(what is trained, the reference, the folder where both are in Hugging Face's format)."""
    folder = tmp_path_factory.mktemp('exported')
    reference = tiny('qwen3')
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    hf.save(reference, TOKENIZER, folder / 'reference', chat=True)
    hf.save(policy, TOKENIZER, folder / 'policy', chat=True)
    return policy, reference, folder


@pytest.mark.parametrize('label_smoothing', [0.0, 0.2])
def test_trl(monkeypatch, tmp_path, exported, label_smoothing):
    """Loss, gradients, rewards: from the file and both models to the numbers, by both programs."""
    trl = pytest.importorskip('trl')
    policy, reference, folder = exported
    trainer, batch = their_trainer(trl, folder, label_smoothing)
    theirs = trainer.compute_loss(trainer.model.train(), batch)
    theirs.backward()

    path = write(tmp_path / 'r.jsonl', RECORDS)
    for name, value in dict(dataset=path, validation=path, beta=0.3,
                            label_smoothing=label_smoothing).items():
        monkeypatch.setattr(dpo, name, value)
    parts = dpo.load_pairs(TOKENIZER, 64)[:2]
    dpo.add_reference(parts, tmp_path, 'key', copy.deepcopy(reference), 3, dev=CPU,
                      ranks=Ranks())
    sums, _ = gradients(policy, parts[0], range(len(RECORDS)))
    loss, chosen, rejected, accuracy = (sums / len(RECORDS)).tolist()
    assert abs(loss - theirs.item()) <= 1e-5 and abs(loss - math.log(2)) > 0.01
    found = {name: numbers[-1] for name, numbers in trainer._metrics['train'].items()}
    assert [chosen, rejected, accuracy] == pytest.approx(
        [found['rewards/chosen'], found['rewards/rejected'], found['rewards/accuracies']],
        abs=1e-5)

    ours = copy.deepcopy(policy)    # gradients in the place of weights get their names
    with torch.no_grad():
        for p, q in zip(ours.parameters(), policy.parameters()):
            p.copy_(q.grad / len(RECORDS))
    ours = hf.to_hf(ours)
    known = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert set(ours) == set(known)
    assert max((ours[name] - grad).abs().max() for name, grad in known.items()) <= 1e-5
    assert max(grad.abs().max() for grad in known.values()) > 0.01
