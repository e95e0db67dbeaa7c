"""core/net/engine.py: requests that come, wait, end and are cancelled, against each of them alone
without a cache; drafts; stop strings; what it refuses."""
import random

import pytest
import torch
from test_model import LLAMA, PROMPTS, close, tiny

from core.net import engine as engine_module
from core.net.draw import Sampling, next_ids
from core.net.engine import DRAFT, Engine, generate
from core.text.tokenizer import CharTokenizer

MODELS = {'gpt2': {}, 'llama': dict(LLAMA, n_kv_head=2), 'window': dict(LLAMA, window=5)}


@torch.no_grad()
def alone(model, prompt, sampling):
    """What a request must get: each token from the whole window, without a cache."""
    size, ids, window = model.config.block_size, list(prompt), list(prompt)
    while len(ids) - len(prompt) < sampling.max_new_tokens:
        if len(window) > size:
            window = window[-max(1, size // 2):]
        [new] = next_ids(model(torch.tensor([window]), n_logits=1)[0], [(sampling, ids)])
        ids, window = ids + [new], window + [new]
        if new in sampling.stop_tokens:
            break
    return ids[len(prompt):]


def random_request(rng, longest=24):
    prompt = [rng.randrange(31) for _ in range(rng.randint(1, longest))]
    return prompt, Sampling(
        rng.randint(1, 40), temperature=rng.choice([0, 0.7, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 5]), top_p=rng.choice([1.0, 1.0, 0.8]),
        min_p=rng.choice([0.0, 0.0, 0.1]), repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        seed=rng.randrange(10), stop_tokens=rng.choice([(), (), (3, 8)]))


@pytest.mark.parametrize('settings', MODELS.values(), ids=MODELS)
def test_requests_that_come_and_go(settings):
    """200 of them at random times, in 5 slots, some cancelled while they wait or run."""
    model, rng, found, ends = tiny(**settings), random.Random(1), {}, set()
    engine = Engine(model, 5)
    coming, open_ = [random_request(rng) for _ in range(200)], []
    while coming or open_:
        while coming and rng.random() < 0.4:
            prompt, sampling = coming.pop()
            open_.append(request := engine.submit(prompt, sampling))
            found[request] = []
        if open_ and rng.random() < 0.05:
            engine.cancel(rng.choice(open_))
        assert len(engine.rows) <= 5
        for request, new, text in engine.step():
            assert len(new) == 1 and text == ''
            found[request] += new
        open_ = [request for request in open_ if not request.ended]
    assert engine.cache is None and not engine.rows and len(found) == 200
    for request, ids in found.items():
        prompt, n = request.ids[:request.n_prompt], len(ids)
        want = alone(model, prompt, request.sampling)
        assert ids == request.ids[request.n_prompt:] == (
            want[:n] if request.ended == 'cancelled' else want), request.sampling
        ends.add(request.ended)
        if request.ended != 'cancelled':
            stopped = ids[-1] in request.sampling.stop_tokens
            assert request.ended == ('stop' if stopped else 'length')
    assert ends == {'stop', 'length', 'cancelled'}
    assert sum(request.start > 0 for request in found) > 50     # windows that were full


@pytest.mark.parametrize('n', [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_is_left_of_many_requests(n):
    def pages():
        with open('/proc/self/statm') as f:
            return int(f.read().split()[1])
    engine, rng, before = Engine(tiny(), 8), random.Random(2), 0
    for i in range(n):
        prompt, sampling = random_request(rng, 8)
        engine.submit(prompt, sampling)
        while len(engine.waiting) > 16:
            engine.step()
        if i == n // 5:
            before = pages()
    while engine.rows or engine.waiting:
        engine.step()
    assert engine.cache is None and pages() - before < 1024     # 4 MiB


def drafted(model, prompt, sampling, speculate):
    """A request's ids, and in how many steps they came."""
    engine, steps = Engine(model, speculate=speculate), 0
    request = engine.submit(prompt, sampling)
    while not request.ended:
        engine.step()
        steps += 1
    return request.ids[request.n_prompt:], steps


@pytest.mark.parametrize('n', [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_drafts_change_nothing(n):
    """Greedy and sampled, through full windows and stop tokens; with drafts in fewer steps."""
    rng, total, saved = random.Random(3), 0, {0: 0, 1: 0}
    models = [tiny(**settings, block_size=48) for settings in MODELS.values()]
    for i in range(n):
        prompt, more = random_request(rng)
        temperature = 0.4 * (i % 2)
        sampling = Sampling(rng.randint(20, 120), temperature, seed=i, stop_tokens=more.stop_tokens,
                            repetition_penalty=more.repetition_penalty)
        want, slow = drafted(models[i % 3], prompt, sampling, False)
        got, fast = drafted(models[i % 3], prompt, sampling, True)
        assert got == want and fast <= slow == len(want)
        total, saved[i % 2] = total + len(want), saved[i % 2] + slow - fast
    assert total > 20 * n and saved[0] > 3 * n and saved[1] > n, saved


def test_drafts_by_hand():
    request = engine_module.Request([1, 2, 3, 4, 5, 1, 2], Sampling(9))
    assert request.draft() == []
    request.take(3)
    assert request.draft() == [4, 5, 1, 2]
    for i in (9, 7, 7, 7, 7):
        request.take(i)
    assert request.draft() == [7] * DRAFT       # what is repeated goes on


def test_drafts_that_do_not_pay_are_not_tried(monkeypatch):
    """Where the draft is always wrong, two in 64 tokens at most are computed."""
    model, tried = tiny(block_size=2048), []
    monkeypatch.setattr(engine_module.Request, 'draft', lambda row: [30] * DRAFT)
    run = model.forward
    monkeypatch.setattr(model, 'forward', lambda idx, **more: (
        tried.append(idx.size(1)), run(idx, **more))[1])
    drafted(model, [1], Sampling(600, temperature=5.0), True)
    assert 5 < sum(T == 1 + DRAFT for T in tried) < 40


def test_one_row_among_others_is_as_alone():
    """Also with what is drawn from three ways of sampling at once."""
    model, seeds = tiny(**LLAMA), ['a', 'b', 3]
    wanted = [Sampling(30, temperature, seed=seed) for temperature, seed in zip((0, 1, 2), seeds)]
    engine = Engine(model, 16)
    rows = [engine.submit(prompt, s) for s in wanted for prompt in PROMPTS]
    while engine.rows or engine.waiting:
        engine.step()
    for row in rows:
        assert row.ids[row.n_prompt:] == alone(model, row.ids[:row.n_prompt], row.sampling)


def test_text_and_stop_strings():
    tokenizer = CharTokenizer('abcdefghijklmnopqrstuvwxyzABCDE')
    model = tiny(vocab_size=len(tokenizer))
    ids, text, engine = tokenizer.encode('hello'), '', Engine(model, tokenizer=tokenizer)
    request = engine.submit(ids, Sampling(60, temperature=1.5, seed=1))
    while not request.ended:
        [(_, new, piece)] = engine.step()
        text += piece
    assert text == tokenizer.decode(request.ids[5:]) and len(request.ids) == 65
    stop, got = text[30:33], ''
    request = engine.submit(ids, Sampling(60, temperature=1.5, seed=1, stop_strings=[stop, 'xyzA']))
    while not request.ended:
        got += engine.step()[0][2]
    assert got == text[:text.index(stop)] and request.ended == 'stop'
    request = engine.submit(ids, Sampling(3, temperature=1.5, seed=1, stop_strings=[text[2:9]]))
    got = ''.join(engine.step()[0][2] for _ in range(3))
    assert got == text[:3] and request.ended == 'length'    # what was kept back comes at the end


def test_what_it_refuses():
    model = tiny()
    with pytest.raises(ValueError, match='slots=0: must be at least 1'):
        Engine(model, 0)
    with pytest.raises(ValueError, match='not an lstm: use generate'):
        Engine(tiny(arch='lstm'))
    engine = Engine(model)
    for n in (0, 25):
        with pytest.raises(ValueError, match=f'a request of {n} tokens: must be 1 to 24'):
            engine.submit([1] * n, Sampling(3))
    engine.submit([1], Sampling(3))
    model.train()
    with pytest.raises(ValueError, match='in training mode'):
        engine.step()


@pytest.mark.parametrize('settings', [LLAMA, {'arch': 'lstm'}], ids=['llama', 'lstm'])
def test_generate_yields_rows_in_order(settings):
    model = tiny(**settings)
    steps = list(generate(model, PROMPTS, 6, temperature=0, stop_tokens=(3, 8, 13)))
    for b, prompt in enumerate(PROMPTS):
        got = [step[b] for step in steps]
        n = len([i for i in got if i >= 0])
        assert got[n:] == [-1] * (len(got) - n)
        assert got[:n] == alone(model, prompt, Sampling(6, 0, stop_tokens=(3, 8, 13)))


def test_prompts_in_pieces():
    """Five ids of prompts in a step: others go on meanwhile, and all get what they must."""
    model, rng = tiny(**LLAMA), random.Random(6)
    engine, found = Engine(model, 4, piece=5), {}
    for _ in range(40):
        found[engine.submit(*random_request(rng))] = []
    widest = 0
    while engine.rows or engine.waiting:
        before = [row.cached for row in engine.rows]
        started = [row for row in engine.rows    # but for those whose window is full
                   if row.ready and len(row.ids) - row.start <= engine.size]
        if rng.random() < 0.1:
            engine.cancel(rng.choice([row for row in found if not row.ended]))
            started = [row for row in started if not row.ended]
        got = engine.step()
        assert {row for row, *_ in got} >= set(started)     # none waits for another's prompt
        widest = max(widest, sum(row.cached for row in engine.rows) - sum(before))
        for row, ids, _ in got:
            found[row] += ids
    for row, ids in found.items():
        want = alone(model, row.ids[:row.n_prompt], row.sampling)
        assert ids == (want[:len(ids)] if row.ended == 'cancelled' else want)


@pytest.mark.parametrize('settings', MODELS.values(), ids=MODELS)
def test_beginnings_are_copied(settings):
    """From a request that runs, or that has ended and is remembered; ids are the same, and fewer
    are computed. What is remembered stays within its bound."""
    model, rng = tiny(**settings), random.Random(7)
    shared = [rng.randrange(31) for _ in range(20)]
    engine, computed, real = Engine(model, 3, remember=60), [], model.forward
    model.forward = lambda idx, **more: computed.append(idx.numel()) or real(idx, **more)
    found = {}
    for i in range(30):
        ids = (shared if i % 3 else shared[:10]) + [rng.randrange(31) for _ in range(1 + i % 4)]
        request = engine.submit(ids, Sampling(4, seed=i))
        found[request] = []
        while engine.rows or engine.waiting if i % 2 else engine.waiting:
            for row, new, _ in engine.step():
                found[row] += new
        assert sum(map(len, engine.known)) <= 60
    while engine.rows:
        for row, new, _ in engine.step():
            found[row] += new
    del model.forward
    for row, ids in found.items():
        assert ids == alone(model, row.ids[:row.n_prompt], row.sampling)
    assert engine.known and sum(computed) < sum(map(len, (row.ids for row in found))) * 0.7


def test_log_probabilities():
    """Of each new id and of its rivals, and of the prompt's ids: those of the whole window."""
    model = tiny(**LLAMA)
    for piece, speculate in ((0, False), (4, False), (0, True)):
        engine = Engine(model, 2, piece=piece, speculate=speculate, n_tokens=29)
        prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3] if not speculate else [3, 1, 4, 1] * 4
        request = engine.submit(prompt, Sampling(8, temperature=0, logprobs=3,
                                                 prompt_logprobs=True))
        while engine.rows or engine.waiting:
            engine.step()
        with torch.no_grad():
            every = model(torch.tensor([request.ids]))[0, :, :29].log_softmax(-1)
        noted = request.prompt_logprobs + request.logprobs
        assert len(request.logprobs) == 8 and len(noted) == len(request.ids) - 1
        for t, (own, rivals) in enumerate(noted):
            best = every[t].topk(3)
            close(torch.tensor(own), every[t, request.ids[t + 1]])
            assert [i for i, _ in rivals] == best.indices.tolist()
            close(torch.tensor([x for _, x in rivals]), best.values)


def test_only_the_prompt():
    """No new tokens: a request for the log-probabilities of a prompt ends without an id."""
    engine = Engine(tiny(), 1)
    request = engine.submit([1, 2, 3], Sampling(0, prompt_logprobs=True))
    assert engine.step() == [(request, [], '')]
    assert request.ended == 'length' and len(request.prompt_logprobs) == 2 and not engine.rows
