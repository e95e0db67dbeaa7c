"""What stands before the application of a server: who may ask, how much, and for how long."""
import asyncio
import hmac

import h11
from starlette.requests import Request
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from core.web.protocol import Refused

HEADER_SECONDS, BODY_SECONDS = 10.0, 30.0   # to send the headers, and the body
HEADER_BYTES, BODY_BYTES = 16 << 10, 1 << 20
OPEN_PATHS = ('/', '/health')               # answered without a key
SECURITY = {
    'content-security-policy': (
        "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src "
        "'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"),
    'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer',
    'cross-origin-resource-policy': 'same-origin', 'cache-control': 'no-store'}


class Protocol(H11Protocol):
    """HTTP/1.1 of uvicorn, which gives a client HEADER_SECONDS for the headers of a request."""
    deadline = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except h11.LocalProtocolError:      # a bad chunk of the body, when the answer has begun
            self.transport.abort()
        unfinished = self.conn.their_state is h11.IDLE
        if self.deadline and not unfinished:
            self.deadline.cancel()
            self.deadline = None
        elif unfinished and not self.deadline:      # the next request on the same connection
            self.deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def connection_lost(self, exc) -> None:
        if self.deadline:
            self.deadline.cancel()
        super().connection_lost(exc)


class Guard:
    """An ASGI application around another one: checks Host, key and type of a request, adds headers
    for security, and answers a Refused.

    hosts   names that the header Host may have (a web page elsewhere could have the name of its own
            server resolved to this machine)
    """

    def __init__(self, app, hosts: set[str], api_key: str = ''):
        self.app, self.hosts, self.api_key = app, hosts, api_key

    async def __call__(self, scope, receive, send) -> None:
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        headers = {name.decode('latin-1'): value.decode('latin-1')
                   for name, value in scope['headers']}

        async def send_safely(message) -> None:
            if message['type'] == 'http.response.start':
                message['headers'] = [*message['headers'], *(
                    (name.encode(), value.encode()) for name, value in SECURITY.items())]
            await send(message)
        try:
            self.check(scope, headers)
        except Refused as e:
            await refusal(e)(scope, receive, send_safely)
        else:
            await self.app(scope, receive, send_safely)

    def check(self, scope, headers: dict) -> None:
        """Raise Refused for a request that is not let in, by its path and headers."""
        host = headers.get('host', '')
        name = host.rpartition(':')[0] if host.rpartition(':')[2].isdigit() else host
        if name.lower() not in self.hosts:
            raise Refused(f'this server is not {host[:100]!r}; it can be told its names with '
                          '--hosts', status=421)
        if self.api_key and scope['path'] not in OPEN_PATHS:
            given = headers.get('authorization', '')
            if not hmac.compare_digest(given.encode(), f'Bearer {self.api_key}'.encode()):
                raise Refused('the API key is missing or wrong: send "Authorization: Bearer KEY"',
                              status=401, code='invalid_api_key',
                              headers={'www-authenticate': 'Bearer'})
        kind = headers.get('content-type', '').partition(';')[0].strip().lower()
        # A page elsewhere can send other types without being asked for permission first.
        if scope['method'] == 'POST' and kind != 'application/json':
            raise Refused('the Content-Type must be application/json', status=415)
        if int(headers.get('content-length', '0')) > BODY_BYTES:
            raise too_large()


def too_large() -> Refused:
    return Refused(f'the body is larger than {BODY_BYTES:,} bytes', status=413)


def refusal(e: Refused) -> JSONResponse:
    return JSONResponse(e.body(), e.status, e.headers)


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises Refused if it is too large or too slow."""
    parts, size = [], 0

    async def read() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size > BODY_BYTES:
                raise too_large()
            parts.append(part)
    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(f'the body took more than {BODY_SECONDS:g} s', status=408) from None
    return b''.join(parts)


async def disconnected(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass
