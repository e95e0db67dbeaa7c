"""serve.py: the official client, streams, limits, security, clients that leave, hostile input."""
import asyncio
import concurrent.futures
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import uvicorn
from conftest import stopped
from harness import Ranks
from test_hf import randomize

import serve
from core.device import Device
from core.net.engine import generate
from core.net.weights import build_model
from core.text.tokenizer import ByteTokenizer
from core.web import guard, protocol
from model import GPTConfig

httpx = pytest.importorskip('httpx')
openai = pytest.importorskip('openai')
ROOT = Path(__file__).parents[2]
CPU = Device('cpu', 'cpu', 'float32', False, 0.0, [])
TOKENIZER = ByteTokenizer()
HELLO = [{'role': 'user', 'content': 'Hello'}]


class Running:
    """A server in a thread of this process."""

    def __init__(self, api_key='', chats=True, hosts=('localhost', '127.0.0.1')):
        torch.manual_seed(0)
        self.model = randomize(build_model(GPTConfig(
            vocab_size=len(TOKENIZER), block_size=256, n_layer=2, n_head=4, n_embd=32)))
        self.server = serve.Server(self.model, TOKENIZER, chats, 'tiny', CPU,
                                   concurrent.futures.ThreadPoolExecutor(1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serve, 'api_key', api_key)
            app = self.server.application(set(hosts))
        self.socket = socket.create_server(('127.0.0.1', 0), backlog=512)
        self.port = self.socket.getsockname()[1]
        self.at = f'http://127.0.0.1:{self.port}'
        self.uvicorn = uvicorn.Server(uvicorn.Config(
            app, http=guard.Protocol, ws='none', access_log=False, log_level='error',
            server_header=False, h11_max_incomplete_event_size=guard.HEADER_BYTES))
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],), daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def client(self, **options):
        return openai.OpenAI(base_url=f'{self.at}/v1', max_retries=0,
                             **{'api_key': 'none', **options})

    def post(self, path='/v1/completions', **body):
        return httpx.post(self.at + path, json=body, timeout=60)

    def end(self):
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def idle(self, seconds=5.0) -> bool:
        """Whether nothing runs or waits within some time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.server.engine.rows and not self.server.engine.waiting:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope='module')
def running():
    found = Running()
    yield found
    found.end()


def wanted(model, prompt: str, n: int) -> str:
    """What `generate` gives: the way of sample.py."""
    ids = [new for new, in generate(model, [TOKENIZER.encode(prompt)], n, temperature=0,
                                    n_tokens=len(TOKENIZER), stop_tokens={TOKENIZER.eos})]
    return ''.join(map(TOKENIZER.stream(), [i for i in ids if i not in (TOKENIZER.eos, -1)]))


# ---------------------------------------------------------------------------------------------
# The official client


def test_chat(running):
    client = running.client()
    assert [model.id for model in client.models.list()] == ['tiny']
    assert client.models.retrieve('tiny').owned_by == 'scratchgpt'
    whole = client.chat.completions.create(model='tiny', messages=HELLO, max_tokens=9, seed=3)
    again = client.chat.completions.create(model='tiny', messages=HELLO, max_completion_tokens=9,
                                           seed=3)
    assert whole.choices[0].message.content == again.choices[0].message.content
    assert whole.choices[0].finish_reason in ('stop', 'length')
    assert whole.usage.completion_tokens <= 9
    assert whole.usage.prompt_tokens == len(TOKENIZER.encode_chat(HELLO, reply=True))
    parts = list(client.chat.completions.create(
        model='tiny', messages=HELLO, max_tokens=9, seed=3, stream=True,
        stream_options={'include_usage': True}))
    assert parts[0].choices[0].delta.role == 'assistant' and parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    text = ''.join(part.choices[0].delta.content or '' for part in parts[:-1])
    assert text == whole.choices[0].message.content
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({part.id for part in parts}) == 1


def test_completions(running):
    client = running.client()
    found = client.completions.create(model='tiny', prompt='To be', max_tokens=12, temperature=0)
    assert found.choices[0].text == wanted(running.model, 'To be', 12)
    both = client.completions.create(model='tiny', prompt=['To be', 'or'], max_tokens=5, n=2,
                                     temperature=1.5, seed=1)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text != both.choices[1].text
    ids = client.completions.create(model='tiny', prompt=TOKENIZER.encode('To be'), max_tokens=12,
                                    temperature=0)
    assert ids.choices[0].text == found.choices[0].text
    streamed = client.completions.create(model='tiny', prompt='To be', max_tokens=12, temperature=0,
                                         stream=True)
    assert ''.join(part.choices[0].text for part in streamed) == found.choices[0].text


def test_stop(running):
    text = wanted(running.model, 'To be', 40)
    for stops in (text[5:7], [text[9:11], 'never']):
        found = running.client().completions.create(
            model='tiny', prompt='To be', max_tokens=40, temperature=0, stop=stops)
        first = stops if isinstance(stops, str) else stops[0]
        assert found.choices[0].text == text[:text.index(first)]
        assert found.choices[0].finish_reason == 'stop'


def test_log_probabilities(running):
    """Of an answer, and of an echoed prompt: those of the model."""
    client = running.client()
    found = client.completions.create(model='tiny', prompt='To be or', max_tokens=3, temperature=0,
                                      logprobs=2, echo=True)
    logs = found.choices[0].logprobs
    ids = TOKENIZER.encode('To be or') + [
        new for new, in generate(running.model, [TOKENIZER.encode('To be or')], 3, temperature=0,
                                 n_tokens=len(TOKENIZER))]
    with torch.no_grad():
        every = running.model(torch.tensor([ids]))[0, :, :len(TOKENIZER)].log_softmax(-1)
    assert found.choices[0].text.startswith('To be or')
    assert logs.token_logprobs[0] is None and logs.top_logprobs[0] is None
    expected = [every[t, i].item() for t, i in enumerate(ids[1:])]
    assert logs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert logs.text_offset[:3] == [0, 1, 2] and ''.join(logs.tokens[:8]) == 'To be or'
    assert all(len(rivals) <= 2 for rivals in logs.top_logprobs[1:])
    assert max(logs.top_logprobs[-1].values()) == pytest.approx(logs.token_logprobs[-1], abs=1e-6)
    only = client.completions.create(model='tiny', prompt='To be or', max_tokens=0, echo=True,
                                     logprobs=1).choices[0]
    assert only.text == 'To be or' and only.logprobs.token_logprobs == logs.token_logprobs[:8]

    said = client.chat.completions.create(model='tiny', messages=HELLO, max_tokens=4, logprobs=True,
                                          top_logprobs=3, temperature=0)
    for token in said.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3 and bytes(token.bytes)
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-6)
    plain = client.chat.completions.create(model='tiny', messages=HELLO, max_tokens=4)
    assert plain.choices[0].logprobs is None


def test_asynchronous(running):
    async def ask():
        client = openai.AsyncOpenAI(base_url=f'{running.at}/v1', api_key='none', max_retries=0)
        tasks = [client.completions.create(model='tiny', prompt=text, max_tokens=20, temperature=0)
                 for text in ('a', 'To be', 'x' * 50)]
        parts = [part async for part in await client.chat.completions.create(
            model='tiny', messages=HELLO, max_tokens=5, stream=True)]
        return [found.choices[0].text for found in await asyncio.gather(*tasks)], parts
    found, parts = asyncio.run(ask())
    assert found == [wanted(running.model, text, 20) for text in ('a', 'To be', 'x' * 50)]
    assert parts[-1].choices[0].finish_reason


def test_errors_of_the_client(running):
    client = running.client()
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'; there is 'tiny'"):
        client.chat.completions.create(model='gpt-5', messages=HELLO)
    with pytest.raises(openai.BadRequestError, match='temperature: must be a number from'):
        client.chat.completions.create(model='tiny', messages=HELLO, temperature=7)
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model='tiny', prompt='x' * 300)
    assert e.value.code == 'context_length_exceeded' and e.value.param == 'prompt'
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve('a/../b')
    with pytest.raises(openai.NotFoundError, match='no such path'):
        client.embeddings.create(model='tiny', input='x')


@pytest.mark.parametrize('body, field', [
    ({'prompt': 'a', 'temprature': 0}, 'temprature'), ({'prompt': 'a', 'best_of': 3}, 'best_of'),
    ({'prompt': 'a', 'logit_bias': {'5': 1}}, 'logit_bias'), ({}, 'prompt'),
    ({'prompt': 'a', 'frequency_penalty': 0.5}, 'frequency_penalty'),
    ({'prompt': 'a', 'n': 0}, 'n'), ({'prompt': 'a', 'n': 1.5}, 'n'), ({'prompt': []}, 'prompt'),
    ({'prompt': 'a', 'max_tokens': -1}, 'max_tokens'), ({'prompt': [[]]}, 'prompt'),
    ({'prompt': 'a', 'max_tokens': True}, 'max_tokens'), ({'prompt': [1, 'a']}, 'prompt'),
    ({'prompt': [99999]}, 'prompt'), ({'prompt': [-1]}, 'prompt'), ({'prompt': 7}, 'prompt'),
    ({'prompt': 'a', 'stop': [1]}, 'stop'), ({'prompt': 'a', 'stop': ['a'] * 20}, 'stop'),
    ({'prompt': 'a', 'stream': 'yes'}, 'stream'), ({'prompt': 'a', 'seed': 'x'}, 'seed'),
    ({'prompt': 'a', 'logprobs': True}, 'logprobs'), ({'prompt': 'a', 'logprobs': 30}, 'logprobs'),
    ({'prompt': 'a', 'stream_options': 3}, 'stream_options'), ({'prompt': '\ud800'}, 'prompt'),
    ({'prompt': 'a', 'top_p': 0}, 'top_p'), ({'prompt': 'a', 'response_format': {
        'type': 'json_object'}}, 'response_format')])
def test_what_is_refused(running, body, field):
    content = json.dumps(body)
    found = httpx.post(running.at + '/v1/completions', content=content,
                       headers={'content-type': 'application/json'})
    assert found.status_code == 400, found.text
    error = found.json()['error']
    assert error['param'] == field and error['message'].startswith((field, 'prompt'))
    assert error.keys() == {'message', 'type', 'param', 'code'}


@pytest.mark.parametrize('messages', [
    [], 'x', [{}], [{'role': [], 'content': 'x'}], [{'role': {}, 'content': 'x'}], [7], None,
    [{'role': 'tool', 'content': 'x'}], [{'role': 'user'}],
    [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}],
    [{'role': 'assistant', 'content': '', 'tool_calls': [{}]}]])
def test_messages_that_are_refused(running, messages):
    found = running.post('/v1/chat/completions', messages=messages)
    assert found.status_code == 400 and found.json()['error']['param'] == 'messages'


def test_what_clients_send_by_habit(running):
    said = running.post('/v1/chat/completions', model='tiny', max_tokens=3, user='me', n=1,
                        metadata={'a': 'b'}, store=False, frequency_penalty=0, presence_penalty=0,
                        logit_bias=None, response_format={'type': 'text'}, tools=[], stop=None,
                        seed=None, temperature=None, unheard_of={'x': 1}, service_tier='auto',
                        parallel_tool_calls=True, messages=[
                            {'role': 'developer', 'content': 'Be brief.', 'name': 'x'},
                            {'role': 'user', 'content': [{'type': 'text', 'text': 'Hel'},
                                                         {'type': 'text', 'text': 'lo'}]}])
    assert said.status_code == 200, said.text
    turns = [{'role': 'system', 'content': 'Be brief.'}, HELLO[0]]
    assert said.json()['usage']['prompt_tokens'] == len(TOKENIZER.encode_chat(turns, reply=True))


def test_special_tokens_in_a_text_stay_text(running):
    body = [{'role': 'user', 'content': 'x<|end|><|assistant|>'}]
    found = running.post('/v1/chat/completions', messages=body, max_tokens=1).json()
    assert found['usage']['prompt_tokens'] == len('x<|end|><|assistant|>') + 3
    found = running.post(prompt='<|endoftext|>', max_tokens=1).json()
    assert found['usage']['prompt_tokens'] == len('<|endoftext|>')


def test_curl_lines_of_the_docs(running):
    page = (ROOT / 'docs/serving.md').read_text()
    lines = re.findall(r"^curl .*?'$", page, re.M | re.S)
    assert len(lines) == 2
    for line in lines:
        done = subprocess.run(['bash', '-c', line.replace('localhost:8000', f'{running.at[7:]}')],
                              capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)['choices'][0]['finish_reason'], done.stderr


# ---------------------------------------------------------------------------------------------
# Many at a time


def test_answers_among_others(running):
    """The same greedy answers alone and among 15 others, with prompts of many lengths."""
    drawn = random.Random(0)
    prompts = [''.join(drawn.choices('to be or not,', k=drawn.randint(1, 180))) for _ in range(16)]

    def ask(prompt):
        said = running.post(prompt=prompt, max_tokens=30, temperature=0)
        return said.json()['choices'][0]['text']
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, prompts))
    assert together == [wanted(running.model, prompt, 30) for prompt in prompts]
    assert running.idle() and running.server.engine.cache is None


def test_conversations_are_remembered(running):
    engine, before = running.server.engine, 'To be, or not to be, that is the question: '
    running.post(prompt=before, max_tokens=4)
    assert running.idle() and any(TOKENIZER.decode(ids).startswith(before) for ids in engine.known)
    found = running.post(prompt=before + 'whether', max_tokens=6, temperature=0)
    assert found.json()['choices'][0]['text'] == wanted(running.model, before + 'whether', 6)
    assert sum(map(len, engine.known)) <= engine.remember == 512


def test_a_client_that_leaves_frees_its_slot(running):
    """In the middle of a stream, and while it waits for a whole answer."""
    for stream in (True, False):
        with socket.create_connection(('127.0.0.1', running.port)) as s:
            body = json.dumps({'prompt': 'a', 'max_tokens': 250, 'stream': stream,
                               'temperature': 1.5}).encode()
            s.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
                      b'application/json\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body))
            if stream:
                s.recv(100)
            else:
                time.sleep(0.05)
        began = time.monotonic()
        assert running.idle(2) and time.monotonic() - began < 1
        assert running.server.engine.cache is None


def test_too_many(running, monkeypatch):
    monkeypatch.setattr(running.server.worker, 'queue', 0)
    monkeypatch.setattr(running.server.engine, 'slots', 2)
    found = running.post(prompt='a', n=3)
    assert found.status_code == 429 and found.headers['retry-after'] == '5'
    assert running.post(prompt='a', n=2, max_tokens=2).status_code == 200
    assert running.idle()


def test_the_smallest_temperature_is_greedy(running):
    said = running.post(prompt='To be', max_tokens=12, temperature=1e-38).json()
    assert said['choices'][0]['text'] == wanted(running.model, 'To be', 12)


def test_log_probabilities_are_those_before_the_penalty(running):
    ask = lambda penalty: running.post(
        prompt='To be or not to be', max_tokens=1, temperature=0, logprobs=5,
        repetition_penalty=penalty).json()['choices'][0]['logprobs']['top_logprobs']
    for one, other in zip(ask(1.0), ask(5.0)):
        assert one == pytest.approx(other, abs=1e-5)


def test_too_many_fields(running):
    began = time.monotonic()
    found = running.post(prompt='a', **{f'f{i}': 0 for i in range(60_000)})
    assert found.status_code == 400 and time.monotonic() - began < 5


def test_a_model_that_fails(running, monkeypatch):
    """Weights with NaN: an error, as an answer and in a stream; the server lives."""
    def fail(*args, **options):
        raise ValueError('the logits are not finite')
    with monkeypatch.context() as patch:
        patch.setattr(running.server.engine, 'forward', fail)
        assert running.post(prompt='a').status_code == 500
        streamed = running.post(prompt='a', stream=True)
        assert '"error"' in streamed.text and streamed.status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(running.server.engine, 'submit', lambda *_: {}['a bug of ours'])
        assert running.post(prompt='a').status_code == 500
    assert httpx.get(running.at + '/health').json()['status'] == 'ok'
    assert running.post(prompt='a', max_tokens=2).status_code == 200


# ---------------------------------------------------------------------------------------------
# Security


def raw(port: int, data: bytes, seconds: float = 3.0) -> bytes:
    """What a server answers to some bytes."""
    with socket.create_connection(('127.0.0.1', port), seconds) as s:
        s.sendall(data)
        found = b''
        try:
            while part := s.recv(65536):
                found += part
                if b'\r\n\r\n' in found and b'chunked' not in found:
                    break
        except (TimeoutError, ConnectionError):
            pass
        return found


def test_hosts(running):
    for host, status in ((b'localhost', b'200'), (b'127.0.0.1:%d' % running.port, b'200'),
                         (b'LOCALHOST:1', b'200'), (b'evil.example', b'421'), (b'', b'421'),
                         (b'localhost.evil.example', b'421'), (b'localhost:80@evil', b'421')):
        said = raw(running.port, b'GET /v1/models HTTP/1.1\r\nHost: %s\r\n\r\n' % host)
        assert said.startswith(b'HTTP/1.1 ' + status), (host, said[:80])


def test_other_sites(running):
    """No permission for pages elsewhere, and no type that needs none."""
    found = httpx.options(running.at + '/v1/completions', headers={
        'origin': 'http://evil.example', 'access-control-request-method': 'POST'})
    assert found.status_code == 405
    said = running.post(prompt='a', max_tokens=1)
    for answer in (found, said, httpx.get(running.at + '/')):
        assert not [name for name in answer.headers if name.startswith('access-control')]
        assert answer.headers['x-content-type-options'] == 'nosniff'
        assert "default-src 'none'" in answer.headers['content-security-policy']
        assert 'server' not in answer.headers
    for kind in ('text/plain', 'application/x-www-form-urlencoded', ''):
        found = httpx.post(running.at + '/v1/completions', content='{"prompt": "a"}',
                           headers={'content-type': kind})
        assert found.status_code == 415


def test_key():
    found = Running(api_key='secret')
    try:
        assert httpx.get(found.at + '/health').status_code == 200
        assert httpx.get(found.at + '/').status_code == 200
        for headers in ({}, {'authorization': 'Bearer wrong'}, {'authorization': 'secret'},
                        {'authorization': 'Basic secret'},
                        {'authorization': 'Bearer s\u00e9cret'.encode()}):
            for path in ('/v1/models', '/metrics', '/v1/completions', '/nothing', '//health'):
                said = httpx.get(found.at + path, headers=headers)
                assert said.status_code == 401 and 'secret' not in said.text, path
        client = found.client(api_key='secret')
        assert client.completions.create(model='tiny', prompt='a', max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError):
            found.client(api_key='other').models.list()
    finally:
        found.end()


def test_limits_of_size_and_time(running, monkeypatch):
    big = b'x' * (guard.BODY_BYTES + 1)
    head = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    assert b' 413 ' in raw(running.port, head + b'Content-Length: %d\r\n\r\n' % len(big))[:40]
    chunks = b'Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n' % (len(big), big)
    assert b' 413 ' in raw(running.port, head + chunks)[:40]
    long = b'GET / HTTP/1.1\r\nHost: localhost\r\nX: ' + b'x' * (2 * guard.HEADER_BYTES)
    assert b' 400 ' in raw(running.port, long)[:40]
    monkeypatch.setattr(guard, 'HEADER_SECONDS', 0.3)
    monkeypatch.setattr(guard, 'BODY_SECONDS', 0.3)
    for data, said in ((b'', b''), (b'GET / HT', b''), (b'GET / HTTP/1.1\r\nHost: localhost\r\n',
                                                        b''),
                       (head + b'Content-Length: 20\r\n\r\n{"p', b'HTTP/1.1 408')):
        began = time.monotonic()
        assert raw(running.port, data, 3)[:12] == said
        assert 0.2 < time.monotonic() - began < 2
    two = b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n'     # and then an unfinished one
    began = time.monotonic()
    with socket.create_connection(('127.0.0.1', running.port), 3) as s:
        s.sendall(two)
        said = b''
        while b'}' not in said:
            said += s.recv(4096)
        assert said.startswith(b'HTTP/1.1 200')
        s.sendall(two[:20])
        assert s.recv(10) == b'' and time.monotonic() - began < 2


def test_prompts_are_not_logged(running, capfd):
    running.post(prompt='a very private thing', max_tokens=2)
    running.post(prompt='a very private thing', max_tokens='x')
    raw(running.port, b'GET /private\x00thing HTTP/1.1\r\nHost: localhost\r\n\r\n')
    out, err = capfd.readouterr()
    assert 'private' not in out + err


def test_no_path_is_made_from_a_request(running):
    for path in ('/../serve.py', '/%2e%2e/serve.py', '/serve.py', '/chat.html', '/static/../x',
                 '/v1/models/../../etc/passwd', '/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd'):
        said = raw(running.port, f'GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n'.encode())
        assert b' 404 ' in said[:40] and b'root:' not in said, path


def mutated(drawn) -> bytes:
    """A request that is wrong somewhere: in its body, its headers, its path, or its bytes."""
    value = lambda: drawn.choice([
        None, True, -1, 0, 1, 3.7, 1e308, 10 ** 30, '', 'a', '\x00', 'é' * 50, [], {}, [[]],
        {'a': {'b': []}}, 'x' * 2000, [1, 2], ['a', 1], float('nan'), '\ud800'])
    body = {'prompt': 'a', 'max_tokens': 2, 'messages': HELLO}
    for _ in range(drawn.randint(0, 3)):
        names = [*sorted(protocol.KNOWN), 'unknown', '', 'é']
        body[drawn.choice(names)] = value()
    if drawn.random() < .9:
        body['max_tokens'] = drawn.choice([1, 2])
    if drawn.random() < .2:
        body['messages'] = [{drawn.choice(['role', 'content', 'x']): value() for _ in range(3)}]
    text = json.dumps(body).encode()
    kind = drawn.randint(0, 9)
    if kind == 0:
        text = text[:drawn.randrange(len(text))]
    elif kind == 1:
        text = bytes(b if drawn.random() > .02 else drawn.randrange(256) for b in text)
    elif kind == 2:
        text = drawn.choice([b'[' * 100_000, b'{"a":' * 5000, b'"', b'\xff\xfe', b'', b'NaN',
                             b'1e999', b'[]', b'{"prompt": "a", "prompt": 3}',
                             text.decode().encode('utf-16')])
    path = drawn.choice(['/v1/completions'] * 4 + ['/v1/chat/completions'] * 4 + [
        '/', '/v1', '/v1/models', '/v1/models/%00', '/metrics', '/%ff', '/v1/completions/'])
    method = drawn.choice([b'POST'] * 40 + [b'GET', b'PUT', b'DELETE', b'HEAD', b'X' * 30, b''])
    headers = [b'Host: localhost', b'Content-Type: application/json', b'Connection: close']
    if kind == 3:
        size = drawn.randint(1, 9)
        text = b''.join(b'%x\r\n%s\r\n' % (len(text[i:i + size]), text[i:i + size])
                        for i in range(0, len(text), size))
        text += drawn.choice([b'0\r\n\r\n', b'', b'g\r\n'])
        headers.append(b'Transfer-Encoding: chunked')
    else:
        size = drawn.choice([len(text)] * 9 + [len(text) + 5, 0, -1, 10 ** 20])
        headers.append(b'Content-Length: %d' % size)
    if kind == 4:
        headers.insert(drawn.randrange(4), drawn.choice([
            b'X', b': a', b'A: \x00', b'Content-Length: 3', b'Transfer-Encoding: gzip', b'Host: b',
            b'Expect: 100-continue', b'Upgrade: websocket', b'Content-Type: text/html',
            b'a' * 5000]))
    if kind == 5:
        headers.pop(drawn.randrange(len(headers)))
    return method + b' ' + path.encode() + b' HTTP/1.1\r\n' + b'\r\n'.join(headers) + \
        b'\r\n\r\n' + text


@pytest.mark.parametrize('body', ['{"prompt": "a", "max_tokens": "\\ud800"}', '{"\\udfff": 1}',
                                  '{"prompt": "\\ud83d"}', '{"prompt": ["a\\ude00"]}'])
def test_half_a_surrogate_pair(running, body):
    """JSON can name one, in a value or a name; no text has it, and no answer can repeat it."""
    said = httpx.post(running.at + '/v1/completions', content=body,
                      headers={'content-type': 'application/json'})
    assert said.status_code == 400 and 'half a surrogate' in said.json()['error']['message']


def test_a_bad_chunk_after_the_answer_has_begun(running, capfd, caplog):
    with socket.create_connection(('127.0.0.1', running.port), 10) as s:
        s.sendall(b'POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json'
                  b'\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n')
        assert b' 404 ' in s.recv(1000)
        s.sendall(b'g\r\n')
        with contextlib.suppress(ConnectionError):
            while s.recv(1000):
                pass
    assert httpx.get(running.at + '/health').json()['status'] == 'ok'
    assert 'Traceback' not in capfd.readouterr().err + caplog.text


@pytest.mark.parametrize('n', [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_requests(running, monkeypatch, capfd, n):
    """No crash, no hang, no traceback, and no 5xx."""
    monkeypatch.setattr(guard, 'BODY_SECONDS', 0.2)
    monkeypatch.setattr(guard, 'HEADER_SECONDS', 0.2)
    drawn, statuses = random.Random(n), {}

    def send(data):
        said = raw(running.port, data, 10)
        status = said[9:12].decode(errors='replace')
        assert b'Traceback' not in said and status[:1] != '5', (data[:300], said[:300])
        return status
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for status in pool.map(send, [mutated(drawn) for _ in range(n)]):
            statuses[status] = statuses.get(status, 0) + 1
    assert running.idle(20) and statuses['200'] > n / 20 and statuses['400'] > n / 5, statuses
    assert httpx.get(running.at + '/health').json()['status'] == 'ok'
    assert 'Traceback' not in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------
# The stage


def test_a_base_model_answers_no_chats():
    found = Running(chats=False)
    try:
        said = found.post('/v1/chat/completions', messages=HELLO)
        assert said.status_code == 400 and 'no chat model' in said.json()['error']['message']
        assert found.post(prompt='a', max_tokens=1).status_code == 200
    finally:
        found.end()


def test_metrics(running):
    running.post(prompt='abc', max_tokens=2)
    page = httpx.get(running.at + '/metrics').text
    for name in ('requests_total', 'generated_tokens_total', 'running', 'waiting'):
        assert f'\n# TYPE scratchgpt_{name} ' in page
    assert '\nscratchgpt_running 0\n' in page


@pytest.mark.parametrize('settings, message', [
    (dict(host='0.0.0.0'), 'an API key is needed'), (dict(port=70000), 'port=70000'),
    (dict(slots=0), 'slots=0'), (dict(run_dir=''), 'no model given'),
    (dict(host='256.1.1.1', api_key='x'), 'host=256.1.1.1')])
def test_bad_settings(base, monkeypatch, capsys, settings, message):
    for setting, value in {'run_dir': base, 'port': 0, **settings}.items():
        monkeypatch.setattr(serve, setting, value)
    assert message in stopped(capsys, serve.main)


def test_a_port_that_is_taken(base, monkeypatch, capsys):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        for setting, value in {'run_dir': base, 'port': taken.getsockname()[1]}.items():
            monkeypatch.setattr(serve, setting, value)
        assert 'is another server running?' in stopped(capsys, serve.main)


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_signal_lets_answers_end(base, tmp_path, compiled):
    """SIGTERM: an answer that is being written comes whole, then the process ends with status 0."""
    ranks = Ranks(tmp_path, stage='serve', run_dir=base, port=0, device='cpu', threads=1,
                  compile=compiled)
    assert ranks.wait_for(lambda: '\nhttp://' in ranks.text()), ranks.text()
    at = re.search(r'^http://\S+', ranks.text(), re.M)[0]
    with httpx.stream('POST', at + 'v1/completions', timeout=60, json={
            'prompt': 'a', 'max_tokens': 90, 'stream': True, 'temperature': 2}) as answer:
        lines = answer.iter_lines()
        next(lines)
        ranks.send(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2] == 'data: [DONE]' or 'data: [DONE]' in rest
    assert ranks.wait(30) == [0]
