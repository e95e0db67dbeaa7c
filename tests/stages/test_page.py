"""chat.html in a headless Chromium, with a server that plays serve.py's part."""
import contextlib
import http.server
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Quiet, serving

api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no chromium or google-chrome')

ROOT = Path(__file__).parent.parent.parent
AXE = Path(os.environ.get('AXE') or ROOT / 'node_modules/axe-core') / 'axe.min.js'
POLICY = ("default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src "
          "'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'")
RIVALS = ['" rival" 10.0%', '"7" 5.0%']      # of each token
expect = api.expect
expect.set_options(timeout=20_000)      # in milliseconds; other tests may run beside


def told(token, logprob=-0.1):
    """What a chat says of a token, which is a text or, a part of a character, bytes."""
    data = token if isinstance(token, bytes) else token.encode()
    return {'token': data.decode(errors='replace'), 'logprob': logprob, 'bytes': list(data)}


def chunk(chat, text, tokens=(), reason=None):
    if chat:
        found = {'delta': {'content': text} if text else {}, 'logprobs': {'content': [
            {**told(token), 'top_logprobs': [told(token), told(' rival', -2.3), told('7', -3.0)]}
            for token in tokens]}}
    else:
        found = {'text': text, 'logprobs': {
            'tokens': tokens, 'token_logprobs': [-0.1] * len(tokens),
            'top_logprobs': [{' rival': -2.3, '7': -3.0, token: -0.1} for token in tokens]}}
    return {'choices': [{'index': 0, **found, 'finish_reason': reason}]}


def says(*pieces, reason='stop', done=True):
    """An answer of pieces: each a token, (text, tokens), an error, or the `wait` of an event."""
    def answer(handler, body):
        chat, n = 'messages' in body, 0
        handler.begin(200, 'text/event-stream')
        for piece in pieces:
            if isinstance(piece, str):
                piece = piece, [piece]
            if isinstance(piece, tuple):
                piece, n = chunk(chat, *piece), n + len(piece[1])
            piece(20) if callable(piece) else handler.send(piece)
        handler.send(chunk(chat, '', reason=reason))
        handler.send({'choices': [], 'usage': {'completion_tokens': n}})
        handler.wfile.write(b'data: [DONE]\n\n' * done)
    return answer


def refuses(status, message, **headers):
    error = json.dumps({'error': {'message': message, 'type': 'x', 'param': None, 'code': None}})
    return lambda handler, body: handler.begin(status, 'application/json', error, **headers)


@pytest.fixture
def fake():
    """A server: what it answers next; what it was asked, (path, body), and the messages alone."""
    fake = SimpleNamespace(key='', chat=True, answers=[], asked=[], said=[], seeds=set())
    fake.go = threading.Event()

    class Handler(Quiet, http.server.BaseHTTPRequestHandler):
        def begin(self, status, kind, text='', **headers):
            self.send_response(status)
            for name, value in {'Content-Type': kind, **headers}.items():
                self.send_header(name.replace('_', '-'), value)
            self.end_headers()
            self.wfile.write(text.encode())

        def send(self, chunk):
            self.wfile.write(f'data: {json.dumps(chunk)}\n\n'.encode())

        def allowed(self):
            found = self.headers.get('Authorization') == f'Bearer {fake.key}'
            return not fake.key or found or refuses(401, 'a key, please')(self, None)

        def do_GET(self):
            if self.path == '/':
                page = (ROOT / 'chat.html').read_text(encoding='utf-8')
                self.begin(200, 'text/html; charset=utf-8', page, Content_Security_Policy=POLICY)
            elif self.allowed():
                models = json.dumps({'data': [{'id': 'smol', 'chat': fake.chat}]})
                self.begin(200, 'application/json', models)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            fake.asked.append((self.path, body))
            fake.seeds.add(body.pop('seed'))
            fake.said.append([message['content'] for message in body.get('messages', [])])
            with contextlib.suppress(ConnectionError):      # the page stops an answer
                if self.allowed():
                    (fake.answers or [says('Hello', ' you', '.')]).pop(0)(self, body)

    with serving(Handler) as server:
        fake.url = f'http://127.0.0.1:{server.server_port}/'
        yield fake
    fake.go.set()


@pytest.fixture(scope='module')
def browser():
    with api.sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])


@pytest.fixture
def open_page(browser, fake):
    """open_page(**settings of the browser); in the end: it asked nobody but its server."""
    wrong = []

    def new(**settings):
        page = browser.new_context(**settings).new_page()
        page.on('pageerror', lambda error: wrong.append(error))
        page.on('console', lambda said: 'Policy' in said.text and wrong.append(said.text))
        page.on('request', lambda r: r.url.startswith((fake.url, 'data:')) or wrong.append(r.url))
        page.goto(fake.url)
        expect(page.locator('#send')).not_to_be_empty()     # it has asked for the model
        return page

    yield new
    for context in browser.contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(open_page):
    return open_page()


def ask(page, text):
    page.get_by_label('Your message', exact=True).fill(text)
    page.keyboard.press('Enter')


def wait_for(page, *texts):     # until the model's answers are these, and done
    expect(page.locator('[aria-label=Model] .text')).to_have_text(texts)
    expect(page.locator('#send')).not_to_have_text('Stop')


def test_type_and_stream(page, fake):
    fake.answers = [says('One', ' two', fake.go.wait, '\n\n', ' three')]
    ask(page, 'Count!')
    answer = page.locator('[aria-label=Model]')
    expect(answer.locator('.text')).to_have_text('One two')     # before it is complete
    expect(page.get_by_role('log')).to_have_attribute('aria-busy', 'true')
    fake.go.set()
    wait_for(page, 'One two\n\n three')
    expect(page.get_by_role('log')).to_have_attribute('aria-busy', 'false')
    lines = answer.inner_text().split('\n')
    assert lines[:3] == ['One two', '', ' three'] and lines[-1].startswith('4 tokens, ')
    assert fake.asked == [('/v1/chat/completions', {
        'model': 'smol', 'messages': [{'role': 'user', 'content': 'Count!'}], 'stream': True,
        'temperature': 0.8, 'top_p': 1, 'max_tokens': 500, 'logprobs': True, 'top_logprobs': 5,
        'stream_options': {'include_usage': True}})]


def test_stop_keeps_what_came(page, fake):
    fake.answers = [says('A', fake.go.wait), says('One', ' two', fake.go.wait)]
    ask(page, 'Go on')
    expect(page.locator('.token')).to_have_count(1)
    page.keyboard.press('Escape')
    expect(page.locator('.tools', has_text='stopped')).to_be_visible()
    page.click('text=Retry')
    expect(page.locator('.token')).to_have_count(2)
    page.click('text=Stop')
    ask(page, 'Again')
    wait_for(page, 'One two', 'Hello you.')
    assert fake.said[2] == ['Go on', 'One two', 'Again']


def test_edit_drops_what_came_after(page, fake):
    fake.answers = [says('A'), says('B'), says('C')]
    ask(page, 'first')
    wait_for(page, 'A')
    ask(page, 'second')
    wait_for(page, 'A', 'B')
    for key in ('Escape', 'Enter'):     # the first changes nothing
        expect(page.locator('.user .text')).to_have_text(['first', 'second'])
        page.get_by_role('button', name='Edit').first.click()
        page.get_by_label('Your message, to edit').fill('other')
        page.keyboard.press(key)
    wait_for(page, 'C')
    expect(page.locator('.user .text')).to_have_text(['other'])
    assert fake.said[2] == ['other']


def test_retry_copy_and_new_with_text_that_is_no_html(open_page, fake):
    page = open_page(permissions=['clipboard-read', 'clipboard-write'])
    evil = '<img src=x onerror="document.title=1">\n\n <script>document.title=2</script>&lt;'
    fake.answers = [says('A'), says(evil[:30], evil[30:])]
    ask(page, evil)
    wait_for(page, 'A')
    page.click('text=Retry')
    wait_for(page, evil)
    expect(page.locator('.user .text')).to_have_text(evil)
    assert fake.asked[0] == fake.asked[1] and fake.said[0] == [evil] and len(fake.seeds) == 2
    page.click('text=Copy')
    expect(page.get_by_role('button', name='Copied')).to_be_visible()
    assert page.evaluate('navigator.clipboard.readText()') == evil
    page.locator('.token').first.focus()
    expect(page.locator('#tip')).to_contain_text('img src')
    assert page.title() == 'scratchGPT' and page.locator('main :is(img, script)').count() == 0
    page.click('text=New')
    expect(page.get_by_role('log')).to_be_empty()


def test_probabilities(page, fake):
    ask(page, 'Hi')
    wait_for(page, 'Hello you.')
    tip, rows = page.locator('#tip'), ['" you" 90.5%', *RIVALS]
    expect(tip).to_have_attribute('aria-live', 'polite')
    page.hover('.token:has-text("you")')
    expect(tip.locator('div')).to_have_text(rows)
    page.locator('.token').first.focus()
    expect(tip.locator('div').first).to_have_text('"Hello" 90.5%')
    for key in ('ArrowRight', 'ArrowRight', 'ArrowLeft'):
        page.keyboard.press(key)
    expect(page.locator('.token:focus')).to_have_text(' you')
    expect(tip.locator('div')).to_have_text(rows)
    page.keyboard.press('Escape')
    expect(tip).to_be_empty()


@pytest.mark.parametrize('pieces, spans', [
    ([('', ['a']), ('ab', ['b'])], ['a', 'b']),             # the text comes after its token,
    ([('a', []), ('b', ['a', 'b'])], ['a', 'b']),           # or before it
    ([('', [b'\xc3']), ('é', [b'\xa9'])], ['é']),           # half a character each
    ([('x', ['x']), ('yz', ['y', '<end>'])], ['x', 'y']),   # what is not in the text
    (['undefined'], ['undefined']),
])
def test_tokens_out_of_step(page, fake, pieces, spans):
    fake.answers = [says(*pieces)]
    ask(page, 'Hi')
    wait_for(page, ''.join(piece if isinstance(piece, str) else piece[0] for piece in pieces))
    expect(page.locator('.token')).to_have_text(spans)


def test_settings_are_sent_and_kept(page, fake):
    page.click('text=Settings')
    for name, value in {'Temperature': '0', 'Top p': '0.5', 'Seed': '42', 'Max tokens': '7',
                        'System prompt': 'Be kind.'}.items():
        page.get_by_label(name).fill(value)
    page.reload()
    fake.answers = [says('Cut', reason='length')]
    ask(page, 'Hi')
    expect(page.locator('.tools', has_text='cut at the limit of tokens')).to_be_visible()
    assert {'temperature': 0, 'top_p': 0.5, 'max_tokens': 7, 'messages': [
        {'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}],
    }.items() <= fake.asked[0][1].items() and fake.seeds == {42}


def test_reload_keeps_the_conversation(page, fake):
    ask(page, 'Hi')
    wait_for(page, 'Hello you.')
    fake.answers = [says('One', ' two', fake.go.wait)]
    ask(page, 'Go on')
    expect(page.locator('.token')).to_have_count(5)
    page.reload()       # in the middle of an answer
    wait_for(page, 'Hello you.', 'One two')
    expect(page.locator('.user .text')).to_have_text(['Hi', 'Go on'])
    page.hover('.token:has-text("you")')
    expect(page.locator('#tip')).to_contain_text('90.5%')
    page.get_by_label('Your message', exact=True).fill('not sent yet')
    page.reload()
    expect(page.get_by_label('Your message', exact=True)).to_have_value('not sent yet')


@pytest.mark.parametrize('answer, message, kept', [
    (refuses(429, '<b>full', Retry_After='3'), '<b>full (error 429; try again in 3 s)', ''),
    (says('One', {'error': {'message': 'out of memory'}}), 'out of memory', 'One'),
    (says('One', done=False), 'The server broke off in the middle of the answer.', 'One'),
    (lambda *_: None, 'The server cannot be reached (Failed to fetch). Is it running?', ''),
])
def test_error_and_retry(page, fake, answer, message, kept):
    fake.answers = [says('A'), answer]
    ask(page, 'first')
    wait_for(page, 'A')
    ask(page, 'second')
    expect(page.locator('.turn [role=alert]')).to_have_text(['', message])
    wait_for(page, 'A', kept)
    page.reload()
    page.click('text=Retry >> visible=true')
    wait_for(page, 'A', 'Hello you.')
    assert fake.said[2] == ['first', 'A', 'second']


def test_key(open_page, fake):
    fake.key = 'sesame'
    page = open_page()
    for key in ('wrong', 'sesame'):
        expect(page.locator('#notice')).to_have_text('a key, please (error 401)')
        page.get_by_label('API key').fill(key)
        with page.expect_response('**/v1/models'):
            page.keyboard.press('Enter')
    page.reload()
    ask(page, 'Hi')
    wait_for(page, 'Hello you.')
    assert 'sesame' not in page.evaluate('JSON.stringify(localStorage)')
    fake.key = 'other'
    page.click('text=Retry')
    page.get_by_label('API key').fill('other')
    page.keyboard.press('Enter')
    ask(page, 'And now?')
    wait_for(page, '', 'Hello you.')
    assert fake.said[2] == ['And now?']    # without the question that got no answer


@pytest.mark.parametrize('chat', [False, True])
def test_completion(open_page, fake, chat):
    fake.chat = chat
    page = open_page()
    expect(page.get_by_label('Mode', exact=True)).to_be_visible(visible=chat)
    if chat:
        page.get_by_label('Mode', exact=True).select_option('completion')
    fake.answers = [says(' time', ', 7'), says('!'), says('?')]
    text = page.get_by_label('The text', exact=True)
    text.fill('Once\nupon a')
    page.keyboard.press('Control+Enter')
    wait_for(page, ' time, 7')
    page.hover('.token:has-text("time")')
    expect(page.locator('#tip div')).to_have_text(['" time" 90.5%', *RIVALS])
    page.click('text=Continue')
    wait_for(page, '!')
    page.reload()
    page.click('text=Retry')
    wait_for(page, '?')
    expect(text).to_have_value('Once\nupon a time, 7?')
    assert fake.asked[0] == ('/v1/completions', {
        'model': 'smol', 'prompt': 'Once\nupon a', 'stream': True, 'temperature': 0.8, 'top_p': 1,
        'max_tokens': 500, 'logprobs': 5})
    assert [len(body['prompt']) for _, body in fake.asked] == [11, 19, 19]
    text.press('Control+Home')
    page.keyboard.type('>\n')
    expect(text).to_have_value('>\nOnce\nupon a time, 7?')
    expect(page.locator('.token')).to_have_count(0)     # they are not those of this text


def test_phone(open_page, fake):
    page = open_page(viewport={'width': 360, 'height': 640}, has_touch=True, is_mobile=True)
    fake.answers = [says('x' * 300, ' ', '\n', 'word ' * 40)]
    page.click('text=Settings')
    ask(page, 'y' * 300)
    expect(page.locator('.token')).to_have_count(4)
    for place in range(4):
        page.locator('.token').nth(place).focus()
        assert page.evaluate('document.documentElement.scrollWidth') == 360
        assert page.locator('#tip').bounding_box()['x'] >= 0


def test_keyboard_only(page, fake):
    def press(element, *keys):
        """Go to an element with the Tab key, see that it is marked, and press keys."""
        while not page.locator(f'{element}:focus').count():
            page.keyboard.press('Tab')
        expect(page.locator(':focus')).to_have_css('outline-style', 'solid')
        for key in keys:
            page.keyboard.press(key)

    fake.answers = [says('A', ' b'), says('C'), says('D')]
    press('#input', '1', 'Shift+Enter', '2', 'Enter')
    wait_for(page, 'A b')
    press('.token', 'ArrowRight')
    expect(page.locator('#tip')).to_contain_text('" b" 90.5%')
    press('.retry', 'Enter')
    wait_for(page, 'C')
    press('.edit', 'Enter', '!', 'Enter')
    wait_for(page, 'D')
    assert fake.said[0] == ['1\n2'] and fake.said[2] == ['1\n2!']


@pytest.mark.skipif(not AXE.exists(), reason='axe-core is not there: npm install axe-core')
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_axe(open_page, fake, scheme):
    page = open_page(color_scheme=scheme)
    fake.answers = [says('A', ' b'), refuses(401, 'a key, please')]
    page.evaluate(AXE.read_text(encoding='utf-8'))
    ask(page, 'one')
    wait_for(page, 'A b')
    found = page.evaluate('axe.run()')['violations']
    ask(page, 'two')
    page.click('text=Settings')
    expect(page.get_by_label('API key')).to_be_visible()
    page.locator('.token').first.focus()
    found += page.evaluate('axe.run()')['violations']
    page.get_by_label('Mode', exact=True).select_option('completion')
    found += page.evaluate('axe.run()')['violations']
    assert not [(one['id'], [node['html'] for node in one['nodes']]) for one in found
                if one['impact'] in ('serious', 'critical')]
