"""HTTP/1.1 in front of a handler: sockets, limits, slow clients, TLS. It knows nothing of models.

The parser is llhttp's (through httptools); what is ours is the life of a connection. A handler gets whole
:class:`Request`\\ s and gives a :data:`Reply`, at once or as a future. Nothing runs between the socket and the
handler: no task, no queue, no middleware, which is what makes a request cost microseconds. Every client is bounded: in
the bytes of its headers and body (before any memory is taken), in the seconds it may take for each, in the requests it
may send ahead of their answers.
"""

import asyncio
import logging
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from socket import socket
from typing import Any, cast
from urllib.parse import unquote

import httptools
import msgspec

Reply = tuple[int, dict[str, str], bytes]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may ask of the server: sizes in bytes, times in seconds.

    ``head`` and ``body`` are how long a client may take to send its headers, and its body (plus one second for each
    64 KiB of it); ``idle`` how long a connection may rest between requests; ``write`` how long it may refuse to read.
    """

    max_body: int = 16 * 1024 * 1024
    max_head: int = 32 * 1024
    max_connections: int = 20_000
    max_ahead: int = 16
    head: float = 10.0
    body: float = 20.0
    idle: float = 75.0
    write: float = 30.0


class Request:
    """One whole request: ``path`` without its query, still percent-encoded; ``headers`` by lower-case name.

    ``peer`` is the common name of the client's certificate, where it showed one.
    """

    __slots__ = ("body", "headers", "method", "path", "peer", "query")

    def __init__(
        self, method: str, path: str, headers: dict[str, str], body: bytes = b"", query: str = "", peer: str = ""
    ) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body
        self.query, self.peer = query, peer

    @property
    def parts(self) -> list[str]:
        """The decoded segments of the path; a slash that was sent as %2F stays inside its segment.

        >>> Request("GET", "/v2/models/a%20b/ready", {}).parts
        ['v2', 'models', 'a b', 'ready']
        """
        parts = self.path.split("/")[1:]
        return [unquote(part) for part in parts] if "%" in self.path else parts


Handler = Callable[[Request], "Reply | asyncio.Future[Reply]"]


def json_reply(status: int, answer: Any) -> Reply:
    """A reply in JSON.

    >>> json_reply(404, {"error": "nothing here"})
    (404, {'content-type': 'application/json'}, b'{"error":"nothing here"}')
    """
    return status, {"content-type": "application/json"}, msgspec.json.encode(answer)


_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


class HttpServer:
    """Listens for a handler. All of it happens in one event loop; ``connections`` are those open now.

    >>> async def hello() -> bytes:
    ...     server = HttpServer(lambda request: (200, {}, b"hello " + request.parts[0].encode()))
    ...     from trilobe.infrastructure.serve.process import bind
    ...     listener = bind("127.0.0.1", 0)
    ...     await server.start(listener)
    ...     reader, writer = await asyncio.open_connection(*listener.getsockname())
    ...     writer.write(b"GET /you HTTP/1.1\\r\\nHost: here\\r\\nConnection: close\\r\\n\\r\\n")
    ...     answer = await reader.read()
    ...     writer.close()
    ...     await server.stop()
    ...     return answer.splitlines()[-1]
    >>> asyncio.run(hello())
    b'hello you'
    """

    def __init__(self, handler: Handler, limits: Limits | None = None) -> None:
        self.handler, self.limits = handler, limits or Limits()
        self.connections: set[_Connection] = set()
        self.stopping = False
        self._servers: list[asyncio.Server] = []
        self._sweep: asyncio.Task[None] | None = None

    async def start(self, listener: socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections from ``listener``."""
        loop = asyncio.get_running_loop()
        handshake = {"ssl_handshake_timeout": self.limits.head} if tls else {}
        server = await loop.create_server(
            lambda: _Connection(self, loop), sock=listener, ssl=tls, backlog=2048, **handshake
        )
        self._servers.append(server)
        self._sweep = self._sweep or loop.create_task(self._watch_clocks())

    async def stop(self, patience: float = 30.0) -> None:
        """Accept nothing more, let what is under way finish for ``patience`` seconds, close everything."""
        self.stopping = True
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.finish()
        deadline = time.monotonic() + patience
        while self.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.transport.abort()
        if self._sweep is not None:
            self._sweep.cancel()

    async def _watch_clocks(self) -> None:
        """One clock for all connections: cheaper than a timer for each request."""
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            for connection in [c for c in self.connections if now > c.deadline]:
                connection.out_of_time()


class _Connection(asyncio.Protocol):
    """One client: bytes in, requests to the handler in order, replies out in the same order."""

    transport: asyncio.Transport

    def __init__(self, server: HttpServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.limits, self.loop = server, server.limits, loop
        self.parser = httptools.HttpRequestParser(self)
        self.deadline = float("inf")
        self.under_way: asyncio.Future[Reply] | None = None
        self.busy = self.closing = self.discarding = self.paused = False
        self.ahead: deque[tuple[Request, bool]] = deque()
        self.peer = ""
        self._fresh()

    def _fresh(self) -> None:
        self.url = b""
        self.headers: dict[str, str] = {}
        self.head_bytes = self.body_bytes = 0
        self.chunks: list[bytes] = []
        self.begun = False

    # what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if len(self.server.connections) >= self.limits.max_connections or self.server.stopping:
            transport.close()
            return
        self.server.connections.add(self)
        self.deadline = time.monotonic() + self.limits.head
        certificate = transport.get_extra_info("peercert")
        if certificate:
            self.peer = next((v for part in certificate.get("subject", ()) for k, v in part if k == "commonName"), "")

    def connection_lost(self, error: Exception | None) -> None:
        self.server.connections.discard(self)
        self.ahead.clear()
        self.closing = True
        if self.under_way is not None:  # nobody waits for it any more
            self.under_way.cancel()

    def data_received(self, data: bytes) -> None:
        if self.discarding:
            return
        if not self.begun:
            self.begun = True
            if not self.busy:
                self.deadline = time.monotonic() + self.limits.head
        self.head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(501, "this server does not upgrade connections")
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if isinstance(cause, _Refuse):
                self._refuse(cause.status, str(cause))
            else:
                logger.error("a request could not be taken in", exc_info=cause)
                self._refuse(500, "internal error, see the log")
        except httptools.HttpParserError as error:
            self._refuse(400, f"this is not HTTP/1.1 ({error})")
        else:
            if not self.chunks and self.head_bytes > self.limits.max_head and self.begun and not self.body_bytes:
                self._refuse(431, f"headers of more than {self.limits.max_head} bytes")

    def eof_received(self) -> bool:
        # A client that only closed its sending side may still wait for its answer.
        return self.busy and not self.closing

    def pause_writing(self) -> None:
        self.paused = True
        self.transport.pause_reading()
        self.deadline = time.monotonic() + self.limits.write

    def resume_writing(self) -> None:
        self.paused = False
        self.deadline = float("inf") if self.busy else time.monotonic() + self.limits.idle
        self.transport.resume_reading()

    # what the parser calls

    def on_message_begin(self) -> None:
        self.begun = True

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.decode("latin-1").lower()
        if len(self.headers) >= 100:
            raise _Refuse(431, "more than 100 headers")
        self.headers[key] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.head_bytes = 0
        headers, limit = self.headers, self.limits.max_body
        length = headers.get("content-length", "")
        if length:
            size = int(length) if length.isascii() and length.isdigit() else -1
            if size < 0 or size > limit:
                raise _too_large(limit)
        elif "transfer-encoding" not in headers and self.parser.get_method() == b"POST":
            raise _Refuse(411, "a request without Content-Length; expected its length, or chunks")
        if not self.busy:
            self.deadline = time.monotonic() + self.limits.body + (int(length) / 65536 if length else 0.0)
        if headers.get("expect", "").lower() == "100-continue" and not self.busy:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        self.head_bytes = 0
        if self.body_bytes > self.limits.max_body:
            raise _too_large(self.limits.max_body)
        self.chunks.append(body)

    def on_message_complete(self) -> None:
        body = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        path, _, query = self.url.decode("latin-1").partition("?")
        if not path.startswith("/"):  # the form that proxies use: http://host/path
            path = "/" + path.partition("://")[2].partition("/")[2]
        request = Request(self.parser.get_method().decode("latin-1"), path, self.headers, body, query, self.peer)
        keep = self.parser.should_keep_alive()
        self._fresh()
        self.begun = False
        if not self.busy:
            self._start(request, keep)
            return
        self.ahead.append((request, keep))
        if len(self.ahead) >= self.limits.max_ahead:
            self.transport.pause_reading()

    # requests and replies

    def _start(self, request: Request, keep: bool) -> None:
        self.busy, self.deadline = True, float("inf")
        try:
            reply = self.server.handler(request)
        except Exception:
            logger.exception("the handler failed")
            reply = json_reply(500, {"error": "internal error, see the log"})
        keep = keep and not self.server.stopping
        if isinstance(reply, tuple):
            self._write(reply, keep, request.method == "HEAD")
            return
        self.under_way = reply
        reply.add_done_callback(lambda future: self._answered(future, keep))

    def _answered(self, future: "asyncio.Future[Reply]", keep: bool) -> None:
        self.under_way = None
        if self.closing or future.cancelled():
            return
        if error := future.exception():
            logger.error("a request failed", exc_info=error)
            self._write(json_reply(500, {"error": "internal error, see the log"}), keep)
        else:
            self._write(future.result(), keep)

    def _write(self, reply: Reply, keep: bool, head_only: bool = False) -> None:
        status, headers, body = reply
        lines = [_LINES.get(status) or f"HTTP/1.1 {status} -\r\n".encode()]
        lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items()]
        keep = keep and not self.server.stopping
        end = b"" if keep else b"connection: close\r\n"
        lines += [b"content-length: %d\r\n" % len(body), end, b"\r\n", b"" if head_only else body]
        self.transport.write(b"".join(lines))
        self.busy = False
        if not keep:
            self.closing = True
            self.transport.close()
        elif self.ahead:
            if len(self.ahead) == self.limits.max_ahead and not self.paused:
                self.transport.resume_reading()
            # Not at once: a client that sends many requests ahead shares the loop with the others.
            self.busy = True
            self.loop.call_soon(self._next)
        elif not self.paused:
            self.deadline = time.monotonic() + (self.limits.head if self.begun else self.limits.idle)

    def _next(self) -> None:
        if self.ahead and not self.closing:
            self._start(*self.ahead.popleft())

    def _refuse(self, status: int, problem: str) -> None:
        """Answer, and read on for a moment: closing at once would tear the answer from a client that still sends."""
        if self.busy or self.closing:  # earlier requests of this client are still under way: it broke the protocol
            self.transport.abort()
            return
        self.discarding = True
        status, headers, body = json_reply(status, {"error": problem})
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(
            _LINES[status] + f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.deadline = time.monotonic() + 2.0
        else:
            self.transport.close()

    def out_of_time(self) -> None:
        """The deadline has passed: say so where a request has begun, and close."""
        if self.begun and not self.discarding and not self.paused:
            self._refuse(408, "the request took too long to arrive")
            return
        if self.paused:
            self.transport.abort()
        self.closing = True
        self.transport.close()

    def finish(self) -> None:
        """The server stops: close when what is under way is answered."""
        if not self.busy and not self.begun:
            self.closing = True
            self.transport.close()


class _Refuse(Exception):
    """Raised out of the parser's callbacks."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status


def _too_large(limit: int) -> _Refuse:
    return _Refuse(413, f"the body is too large; expected at most {limit} bytes\n  next: send smaller batches")
