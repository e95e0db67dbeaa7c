"""A server that answers as OpenAI's does, and a page to talk to: python serve.py out/sft.

The model is a run, a Hugging Face folder, a name on its hub, or a GGUF file. Programs find
/v1/chat/completions (for chat models), /v1/completions and /v1/models at the printed address,
people the page; /health and /metrics (Prometheus) are for whoever runs it. Requests join and leave
the batch between two tokens. Needs pip install starlette uvicorn.
"""
import core.start  # noqa: F401  it comes first, before torch

# isort: split
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from core import device as hardware
from core.net import quant
from core.net.draw import Sampling
from core.net.engine import Engine
from core.run import models
from core.settings import check_bounds, configure, stop

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    from core.web import guard
    from core.web.guard import Guard, disconnected, read_body
    from core.web.protocol import Asked, Refused, Shape, parse, read_request, sampling
    from core.web.worker import Job, Worker, pieces_of
except ImportError as e:
    stop(f'serve.py needs {e.name}: pip install starlette uvicorn')

POSITIONAL = ('run_dir',)

run_dir = ''                # a run such as out/sft, a Hugging Face folder, a name, or a GGUF file
step = 0                    # which checkpoint; 0: the best one
host = '127.0.0.1'          # the address to listen at; any other than loopback needs an api_key
port = 8000                 # 0: any that is free
hosts = ''                  # other names of this server, comma-separated, that clients may use
api_key = ''                # clients must send it; safer in the environment: SCRATCHGPT_API_KEY
name = ''                   # what clients call the model; '': the last part of run_dir
slots = 16                  # requests that are answered at a time
queue = 64                  # requests that may wait; then 429
piece = 256                 # tokens of prompts in a step: larger is faster, smaller more even
remember = 0                # tokens of conversations kept for the next turn; 0: twice the window
seed = 1337                 # of requests that give none: the same question, the same answer
device = ''                 # '': cuda, else mps, else cpu
dtype = ''                  # '': bfloat16 where the GPU has it, else float16; float32 on a CPU
quantize = ''               # int8 or int4: round the weights, for less memory and more speed
compile = True              # compile the blocks before the first request: half a minute, later less
threads = 0                 # CPU threads; 0: torch's choice
data_dir = 'data'

PAGE = Path(__file__).with_name('chat.html')


# ---------------------------------------------------------------------------------------------
# The answers


class Server:
    """The application: a model with its tokenizer, and what is asked of it. `thread` is the one
    in which the model computes."""

    def __init__(self, model, tokenizer, chats: bool, served: str, dev, thread: ThreadPoolExecutor):
        self.thread = thread
        self.tokenizer, self.chats, self.name, self.dev = tokenizer, chats, served, dev
        self.size, self.started = model.config.block_size, int(time.time())
        self.engine = Engine(model, slots, tokenizer=tokenizer, piece=piece, compiled=dev.compile,
                             remember=remember or 2 * self.size)
        self.counts = Counter()
        self.templates = ThreadPoolExecutor(1)      # a chat template has one process

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        self.worker = Worker(self.engine, self.dev, queue, self.thread)
        self.task = asyncio.create_task(self.worker.run())
        yield
        self.task.cancel()

    def application(self, names: set[str]) -> Guard:
        """The ASGI application, which answers to these names of hosts."""
        post, routes = ['POST'], [
            Route('/', self.page), Route('/health', self.health), Route('/metrics', self.metrics),
            Route('/v1/models', self.models), Route('/v1/models/{id:path}', self.one_model)]
        routes += [Route('/v1/chat/completions', self.chat_completions, methods=post),
                   Route('/v1/completions', self.completions, methods=post)]
        errors = {Refused: lambda request, e: guard.refusal(e),
                  404: lambda request, e: guard.refusal(Refused('no such path', status=404)),
                  405: lambda request, e: guard.refusal(Refused('no such method', status=405))}
        app = Starlette(routes=routes, lifespan=self.lifespan, exception_handlers=errors)
        app.router.redirect_slashes = False
        return Guard(app, names, api_key)

    async def page(self, request: Request):
        return FileResponse(PAGE, media_type='text/html')

    async def health(self, request: Request):
        lives = not self.task.done()
        found = {'status': 'ok' if lives else 'failed', 'running': len(self.engine.rows),
                 'waiting': len(self.engine.waiting)}
        return JSONResponse(found, 200 if lives else 503)

    async def metrics(self, request: Request):
        """Prometheus' text format, version 0.0.4."""
        counts, lines = self.counts | self.worker.counts, []
        for metric, kind, about, value in (
                ('requests_total', 'counter', 'requests answered', counts['requests']),
                ('refused_total', 'counter', 'requests refused', counts['refused']),
                ('cancelled_total', 'counter', 'answers that a client left', counts['cancelled']),
                ('prompt_tokens_total', 'counter', 'tokens of prompts', counts['prompt']),
                ('generated_tokens_total', 'counter', 'tokens written', counts['tokens']),
                ('running', 'gauge', 'requests in slots', len(self.engine.rows)),
                ('waiting', 'gauge', 'requests that wait', len(self.engine.waiting)),
                ('remembered_tokens', 'gauge', 'positions kept of ended requests',
                 sum(map(len, list(self.engine.known))))):
            lines += [f'# HELP scratchgpt_{metric} {about}', f'# TYPE scratchgpt_{metric} {kind}',
                      f'scratchgpt_{metric} {value}']
        return PlainTextResponse('\n'.join(lines) + '\n',
                                 media_type='text/plain; version=0.0.4')

    def card(self) -> dict:
        return {'id': self.name, 'object': 'model', 'created': self.started,
                'owned_by': 'scratchgpt', 'chat': self.chats, 'max_model_len': self.size}

    async def models(self, request: Request):
        return JSONResponse({'object': 'list', 'data': [self.card()]})

    async def one_model(self, request: Request):
        self.check_model(request.path_params['id'])
        return JSONResponse(self.card())

    def check_model(self, given) -> None:
        if given not in (None, self.name):
            raise Refused(f'no model {str(given)[:80]!r}; there is {self.name!r}', 'model', 404,
                          'model_not_found')

    async def chat_completions(self, request: Request):
        if not self.chats:
            raise Refused(f'{self.name} is no chat model; ask /v1/completions', 'model')
        return await self.answer(request, chat=True)

    async def completions(self, request: Request):
        return await self.answer(request, chat=False)

    async def answer(self, request: Request, chat: bool):
        """What a request asks for, as a whole or as a stream."""
        try:
            body = parse(await read_body(request))
            self.check_model(body.get('model'))
            asked = read_request(body, chat)
            prompts = [await self.encode(prompt, chat) for prompt in asked.prompts]
            jobs, pieces = [], asyncio.Queue()
            ends = self.tokenizer.turn_ends() if chat else {self.tokenizer.eos}
            for prompt, ids in zip(asked.prompts, prompts):
                for n in range(asked.n):
                    wanted = sampling(asked, n, self.size - len(ids), ends,
                                      seed if asked.seed is None else asked.seed)
                    echo = (prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)) \
                        if asked.echo else ''
                    jobs.append(Job(len(jobs), ids, wanted, pieces, echo))
            self.worker.submit(jobs)
        except Refused:
            self.counts['refused'] += 1
            raise
        except ClientDisconnect:
            return PlainTextResponse('', 400)
        self.counts['requests'] += 1
        self.counts['prompt'] += sum(map(len, prompts))
        shape = Shape(asked, self.name, self.tokenizer)
        if asked.stream:
            return StreamingResponse(self.events(asked, shape, jobs),
                                     media_type='text/event-stream')
        return await self.whole(request, asked, shape, jobs)

    async def encode(self, prompt, chat: bool) -> list[int]:
        """The ids of a prompt, which leave room for an answer."""
        loop = asyncio.get_running_loop()
        if chat:
            try:
                ids = await loop.run_in_executor(self.templates, self.tokenizer.encode_chat, prompt,
                                                 True)
            except SystemExit as e:     # what the model's own template refuses
                raise Refused(str(getattr(e, 'message', e)), 'messages') from None
        elif isinstance(prompt, list):
            if wrong := [i for i in prompt if not 0 <= i < len(self.tokenizer)]:
                raise Refused(f'prompt: there is no token {wrong[0]}', 'prompt')
            ids = prompt
        else:
            if why := self.tokenizer.unknown(self.tokenizer.as_corpus(prompt)):
                raise Refused(why, 'prompt')
            ids = await loop.run_in_executor(None, self.tokenizer.prompt, prompt)
        if len(ids) >= self.size:
            raise Refused(f'the prompt has {len(ids):,} tokens, and with the answer the model sees '
                          f'{self.size:,}', 'messages' if chat else 'prompt',
                          code='context_length_exceeded')
        return ids

    async def whole(self, request: Request, asked: Asked, shape: Shape, jobs: list[Job]):
        """All answers at once; nothing if the client has left."""
        async def collect() -> list[dict]:
            parts = [[] for _ in jobs]
            async for piece in pieces_of(jobs):
                parts[piece.index].append(piece)
            return [shape.choice(i, ''.join(piece.text for piece in mine),
                                 [i for piece in mine for i in piece.ids],
                                 [log for piece in mine for log in piece.logs], mine[-1].ended)
                    for i, mine in enumerate(parts)]
        answers = asyncio.create_task(collect())
        leaving = asyncio.create_task(disconnected(request))
        try:
            await asyncio.wait([leaving, answers], return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                return PlainTextResponse('', 499)
            return JSONResponse(shape.body(answers.result(), usage=usage(asked, jobs)))
        finally:
            leaving.cancel()
            answers.cancel()
            self.worker.cancel(jobs)

    async def events(self, asked: Asked, shape: Shape, jobs: list[Job]):
        """The answers as server-sent events, piece by piece."""
        def event(found) -> str:
            return f'data: {json.dumps(found, ensure_ascii=False)}\n\n'
        try:
            if asked.chat:
                for job in jobs:
                    yield event(shape.body([shape.role(job.index)]))
            async for piece in pieces_of(jobs):
                if piece.text or piece.ids and asked.logprobs >= 0:
                    yield event(shape.body([shape.choice(
                        piece.index, piece.text, piece.ids, piece.logs, None)]))
                if piece.ended:
                    yield event(shape.body([shape.choice(piece.index, '', [], [], piece.ended)]))
            if asked.usage:
                yield event(shape.body([], usage=usage(asked, jobs)))
            yield 'data: [DONE]\n\n'
        except Refused as e:
            yield event(e.body())
        finally:
            self.worker.cancel(jobs)


def usage(asked: Asked, jobs: list[Job]) -> dict:
    """The numbers of tokens: each prompt counts once, whatever the number of its answers."""
    prompt = sum(len(job.ids) for job in jobs[::asked.n])
    answers = sum(len(job.request.ids) - job.request.n_prompt for job in jobs)
    return {'prompt_tokens': prompt, 'completion_tokens': answers, 'total_tokens': prompt + answers}


# ---------------------------------------------------------------------------------------------
# A server


def listen() -> socket.socket:
    """A socket at host and port. Stops if that cannot be."""
    try:
        return socket.create_server((host, port), backlog=512,
                                    family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except (OSError, OverflowError) as e:
        stop(f'host={host}, port={port}: {e}; is another server running? Give another --port')


def load(thread: ThreadPoolExecutor) -> Server:
    """The model, ready to answer."""
    dev = hardware.choose(device, dtype, compile, threads, training=False, quantized=bool(quantize))
    print(*dev.why[:3], sep='\n')
    model, tokenizer, state = models.load_run(run_dir, step, dev.name, data_dir)
    if quantize:
        quant.quantize(model, quantize)
    served = name or Path(run_dir).resolve().name.removesuffix('.gguf')
    try:
        server = Server(model, tokenizer, state.get('task') == 'chat', served, dev, thread)
    except ValueError as e:
        stop(f'{run_dir}: {e}')
    print(f'{served}: a {"chat" if server.chats else "base"} model, step {state["step"]}'
          + f', weights in {quantize}' * bool(quantize))
    # Of one row, of a few and of many there are graphs.
    for n in tqdm(sorted({1, min(2, slots), slots} if dev.compile else {}), desc='compiling',
                  disable=None):
        rows = [server.engine.submit([0], Sampling(2)) for _ in range(n)]
        with dev.autocast():
            while not all(row.ended for row in rows):
                server.engine.step()
    return server


def main() -> dict:
    """Serve until a signal comes; answers that are being written are finished first."""
    global api_key
    check_bounds(globals(), slots=(1, None), queue=(0, None), piece=(0, None), remember=(0, None),
                 port=(0, 65535))
    models.check_named(run_dir, 'serve.py {}')
    api_key = api_key or os.environ.get('SCRATCHGPT_API_KEY', '')
    local = host in ('127.0.0.1', 'localhost', '::1')
    if not local and not api_key:
        stop(f'host={host}: others can reach this address, so an API key is needed: set '
             'SCRATCHGPT_API_KEY')
    socket_ = listen()
    # All of torch runs in one thread: if OpenMP had threads for a second one, more than there are
    # cores, each product would wait for them asleep, and steps would take twice as long.
    thread = ThreadPoolExecutor(1)
    try:
        server = thread.submit(load, thread).result()
    except KeyboardInterrupt:       # Python would wait for the thread, which may be compiling
        print('\ninterrupted', file=sys.stderr, flush=True)
        os._exit(130)
    at = socket_.getsockname()[1]
    names = {'localhost', '127.0.0.1', '[::1]', host, *filter(None, hosts.lower().split(','))}
    print(f'http://{f"[{host}]" if ":" in host else host}:{at}/  the page; Ctrl-C ends', flush=True)
    config = uvicorn.Config(
        server.application(names), http=guard.Protocol, ws='none', access_log=False,
        log_level='error', server_header=False, date_header=False, limit_concurrency=1000,
        h11_max_incomplete_event_size=guard.HEADER_BYTES, timeout_graceful_shutdown=60)
    for number in (signal.SIGTERM, signal.SIGINT):      # uvicorn raises them again at its end
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[socket_])
    return {'requests': server.counts['requests']}


if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
