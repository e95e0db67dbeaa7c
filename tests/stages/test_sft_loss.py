"""finetune.py: the loss of conversations and classes, by hand and against transformers."""
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from test_lora import CPU, OURS, tiny

import classify
import finetune
from core.data import records
from core.data.dataset import IGNORE, rows_of
from core.formats import hf
from core.ranks.processes import Ranks
from core.run import metrics
from core.text.tokenizer import ByteTokenizer

os.environ['HF_HUB_OFFLINE'] = '1'
TOKENIZER = ByteTokenizer()
SIZE = 64
CHATS = [[('user', 'Name a city.'), ('assistant', 'Paris')],
         [('system', 'Be brief.'), ('user', 'Hi'), ('assistant', 'Hé!'), ('user', 'Who?'),
          ('assistant', 'I.')],
         [('user', '2 + 2?'), ('assistant', '4')],
         [('user', 'Sing a song of sixpence, a pocket full of rye.'), ('assistant', 'La la la')]]


def chat_rows(prompt_weight: float = 0.0) -> finetune.Rows:
    """CHATS as rows of SIZE."""
    found = [records.conversation(f'c:{i}', {'messages': [
        {'role': role, 'content': text} for role, text in chat]}) for i, chat in enumerate(CHATS)]
    return encoded(found, prompt_weight)[0]


def encoded(found: list, prompt_weight: float) -> tuple:
    """Rows of conversations, and those that are in them."""
    (part,), _ = records.fit_window('c', 'conversations', SIZE, [[
        (r, records.encode(TOKENIZER, r.where, r.messages, SIZE, prompt_weight)) for r in found]])
    return rows_of(part, SIZE, finetune.seed, finetune.pack), [record for record, _ in part]


def labelled(chat: list) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and its labels as transformers has them: the id where the assistant
    said it or ended with it, else IGNORE."""
    ids, labels = [], []
    for role, text in chat:
        said = [*text.encode(), TOKENIZER.special['<|end|>']]
        ids += [TOKENIZER.special[f'<|{role}|>'], *said]
        labels += [IGNORE, *(said if role == 'assistant' else [IGNORE] * len(said))]
    return ids, labels


def mean_loss(model, rows) -> torch.Tensor:
    """What a step over all rows reports, two rows at a time as micro-batches."""
    batches = [rows.batch(range(i, min(i + 2, len(rows)))) for i in range(0, len(rows), 2)]
    n_targets = sum(weight.double().sum() for *_, weight in batches)
    return sum(finetune.weighted_loss(model, batch) for batch in batches) / n_targets


@torch.no_grad()
def nats(model, ids: list[int]) -> list[float]:
    """-log p of each id after those before it, the first one left out."""
    log_p = model(torch.tensor([ids]))[0].double().log_softmax(dim=-1)
    return [-log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1)]


# ---------------------------------------------------------------------------------------------
# Conversations


@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize('name', OURS)
def test_transformers(monkeypatch, tmp_path, name, pack):
    """Their mean over the labels that are not -100, of padded rows, is ours."""
    transformers = pytest.importorskip('transformers')
    monkeypatch.setattr(finetune, 'pack', pack)
    model = tiny(name)
    hf.save(model, TOKENIZER, tmp_path / 'm')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm').eval()
    pairs = [[torch.tensor(part) for part in labelled(chat)] for chat in CHATS]
    pad = lambda parts, value: torch.nn.utils.rnn.pad_sequence(parts, True, value)
    ids, labels = (pad(parts, value) for parts, value in zip(zip(*pairs), (0, IGNORE)))
    seen = pad([torch.ones_like(part) for part, _ in pairs], 0)
    expected = theirs(ids, attention_mask=seen, labels=labels).loss.item()
    rows = chat_rows()
    assert len(rows) == (2 if pack else 4)
    assert abs(mean_loss(model, rows).item() - expected) <= 1e-5


@pytest.mark.parametrize('prompt_weight', [0.0, 0.3])
@pytest.mark.parametrize('name', OURS)
def test_packed_equals_unpacked(monkeypatch, name, prompt_weight):
    monkeypatch.setattr(finetune, 'prompt_loss_weight', prompt_weight)
    model, found = tiny(name).double(), []
    for pack in (True, False):
        monkeypatch.setattr(finetune, 'pack', pack)
        rows = chat_rows(prompt_weight)
        model.zero_grad()
        loss = mean_loss(model, rows)
        loss.backward()
        found.append((len(rows), loss.item(), [p.grad.clone() for p in model.parameters()]))
    (n, packed, grads), (n_unpacked, unpacked, its_grads) = found
    assert n < n_unpacked and abs(packed - unpacked) <= 1e-12
    assert max((a - b).abs().max() for a, b in zip(grads, its_grads)) <= 1e-12


@pytest.mark.parametrize('weight', [0.0, 0.3, 1.0])
def test_prompt_loss_weight(monkeypatch, weight):
    """A mean, in which what the assistant says weighs 1 and all else `weight`."""
    monkeypatch.setattr(finetune, 'prompt_loss_weight', weight)
    model, total, weights = tiny('qwen3'), 0.0, 0.0
    for chat in CHATS:
        ids, labels = labelled(chat)
        for loss, label in zip(nats(model, ids), labels[1:]):
            w = weight if label == IGNORE else 1.0
            total, weights = total + w * loss, weights + w
    found = mean_loss(model, chat_rows(weight)).item()
    assert found == pytest.approx(total / weights, abs=1e-5)


@pytest.mark.parametrize('prompt_weight', [0.0, 0.3, 1.0])
def test_what_does_not_fit(monkeypatch, prompt_weight):
    """A long conversation is cut; one without an answer within the row is left out."""
    monkeypatch.setattr(finetune, 'pack', False)
    monkeypatch.setattr(finetune, 'prompt_loss_weight', prompt_weight)
    chat = lambda question, answer: records.conversation('c:7', {'messages': [
        {'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]})
    short, long, hopeless = chat('Hi', 'Ho'), chat('Hi', 'Ho' * 40), chat('H' * 70, 'i')
    rows, kept = encoded([long] + [short] * 20 + [hopeless], prompt_weight)
    assert kept == [long] + [short] * 20 and len(rows) == 21
    weight = max((rows.batch([i])[3] for i in range(21)), key=torch.sum)
    # the inputs are SIZE ids, the first four targets are H, i, <|end|> and <|assistant|>
    assert weight.flatten().tolist() == pytest.approx([prompt_weight] * 4 + [1.0] * (SIZE - 4))
    assert mean_loss(tiny('qwen3'), rows).isfinite()


# ---------------------------------------------------------------------------------------------
# Classes


@pytest.fixture
def class_rows(monkeypatch, tmp_path):
    """class_rows(**settings): rows to train on, of 21 texts 'ham' and 7 'spam', and all three."""
    lines = [{'text': f'{"see you at" if i % 4 else "win a prize:"} {i * i}',
              'label': 'ham' if i % 4 else 'spam'} for i in range(40)]
    path = tmp_path / 'c.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))

    def rows(**settings):
        for name, value in {'dataset': str(path), **settings}.items():
            monkeypatch.setattr(classify, name, value)
        parts, names, _ = classify.class_data(TOKENIZER, SIZE, [])
        assert names == ['ham', 'spam'] and [len(part.ids) for part in parts] == [28, 4, 8]
        return parts
    return rows


def class_nats(model, rows) -> list[float]:
    """-log p of the class of each text, read alone."""
    return [-model(torch.tensor([ids[:-1]]))[0, -1].double().log_softmax(dim=-1)[ids[-1]].item()
            for ids in rows.ids]


@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize('balance', [True, False])
def test_balance(class_rows, balance, pack):
    """n / (classes x records of the class) each, so that all classes weigh the same."""
    model, parts = tiny('qwen3', n_classes=2), class_rows(balance=balance, pack=pack)
    of_class = {0: 28 / 2 / 21, 1: 28 / 2 / 7} if balance else {0: 1.0, 1: 1.0}
    expected = [of_class[ids[-1]] for ids in parts[0].ids]
    assert [w[-1] for w in parts[0].weights] == pytest.approx(expected)
    assert not any(any(w[:-1]) for w in parts[0].weights) and sum(expected) == pytest.approx(28)
    assert all(w[-1] == 1 for part in parts[1:] for w in part.weights)
    losses = class_nats(model, parts[0])
    by_hand = sum(w * loss for w, loss in zip(expected, losses)) / 28
    assert mean_loss(model, parts[0]).item() == pytest.approx(by_hand, abs=1e-5)
    if balance:     # and that is the mean of the means of the classes
        means = [sum(x for x, ids in zip(losses, parts[0].ids) if ids[-1] == c) / n
                 for c, n in ((0, 21), (1, 7))]
        assert by_hand == pytest.approx(sum(means) / 2, abs=1e-9)


@pytest.mark.parametrize('name', OURS)
@torch.no_grad()
def test_where_a_class_is_read(class_rows, name):
    """At the last token of a text, whatever stands after it, or before it, in the row."""
    model, rows = tiny(name, n_classes=2, tied=False), class_rows(pack=True)[0]
    x, y, doc, _ = rows.batch(range(len(rows)))
    last = F.pad(doc[:, 1:] != doc[:, :-1], (0, 1), value=True) & (doc >= 0)
    assert torch.equal(y != IGNORE, last) and last.sum() == 28 > 2 * len(rows)
    before = metrics.class_probabilities(model, rows, 4, CPU, Ranks())
    assert before[range(28), [ids[-1] for ids in rows.ids]] == pytest.approx(
        [math.exp(-loss) for loss in class_nats(model, rows)], abs=1e-6)
    for members in rows.members:    # other letters in the last text of each row
        rows.ids[members[-1]] = [*(65 for _ in rows.ids[members[-1]][:-1]), 0]
    after = metrics.class_probabilities(model, rows, 4, CPU, Ranks())
    changed = [members[-1] for members in rows.members]
    others = [i for members in rows.members for i in members[:-1]]
    assert len(others) > len(changed) and (before[others] == after[others]).all()
    assert (abs(before[changed] - after[changed]).max(axis=1) > 1e-4).all()
