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
from itertools import islice
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
    64 KiB of it that has arrived); ``idle`` how long a connection may rest between requests; ``write`` how long it may
    refuse to read (plus one second for each 64 KiB that wait for it). ``max_held`` bounds the bodies of all clients
    together, large ones (over 64 KiB) until they are answered, ``max_ahead`` the requests of one client that wait for
    their turn.
    """

    max_body: int = 16 * 1024 * 1024
    max_head: int = 32 * 1024
    max_held: int = 512 * 1024 * 1024
    max_connections: int = 20_000
    max_ahead: int = 64
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
_KEEP, _SAY_KEEP, _CLOSE = b"", b"connection: keep-alive\r\n", b"connection: close\r\n"  # the end of a reply's head
_LARGE = 65536
_RATE = 65536  # bytes a second below which a client counts as slow


def json_reply(status: int, answer: Any) -> Reply:
    """A reply in JSON.

    >>> json_reply(404, {"error": "nothing here"})
    (404, {'content-type': 'application/json'}, b'{"error":"nothing here"}')
    """
    return status, {"content-type": "application/json"}, msgspec.json.encode(answer)


_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


class HttpServer:
    """Listens for a handler. All of it happens in one event loop; ``connections`` are those open now.

    ``explain`` makes a reply of whatever the handler, or its future, raised.

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

    def __init__(
        self, handler: Handler, limits: Limits | None = None, explain: Callable[[BaseException], Reply] | None = None
    ) -> None:
        self.handler, self.limits, self.explain = handler, limits or Limits(), explain or _internal
        self.connections: set[_Connection] = set()
        self.stopping = False
        self.held = 0  # bytes of bodies that arrive, and of large ones that are not answered
        self.responses: dict[int, int] = {}  # how many were sent, by status
        self._servers: list[asyncio.Server] = []
        self._sweep: asyncio.Task[None] | None = None

    async def start(self, listener: socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections from ``listener``."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: _Connection(self, loop),
            sock=listener,
            ssl=tls,
            backlog=2048,
            ssl_handshake_timeout=self.limits.head if tls else None,
            ssl_shutdown_timeout=2.0 if tls else None,
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
                try:
                    connection.out_of_time(now)
                except Exception:  # one client must not stop the clock of the others
                    logger.exception("a connection could not be closed in order")
                    connection.transport.abort()

    def room(self) -> bool:
        """Whether one more client may come; one that rests between requests makes way for it where it must."""
        if len(self.connections) >= self.limits.max_connections:
            resting = next((c for c in islice(self.connections, 64) if not (c.busy or c.begun)), None)
            if resting is None:
                return False
            self.connections.discard(resting)
            resting.transport.abort()
        return not self.stopping


class _Connection(asyncio.Protocol):
    """One client: bytes in, requests to the handler in order, replies out in the same order.

    What has arrived is parsed first and started afterwards. While a client has requests ``ahead`` of their answers, or
    does not read those, nothing more is read from it: what it can make the server hold is one read, and one body.
    """

    transport: asyncio.Transport

    def __init__(self, server: HttpServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.limits, self.loop = server, server.limits, loop
        self.parser = httptools.HttpRequestParser(self)
        self.deadline = float("inf")
        self.under_way: asyncio.Future[Reply] | None = None
        self.busy = self.closing = self.discarding = self.paused = False
        self.ahead: deque[tuple[Request, bytes]] = deque()
        self.refusal: tuple[int, str] | None = None  # what is said once all that came before it is answered
        self.held = self.owed = self.answering = 0  # bytes counted; of large bodies not answered; of the one under way
        self.peer = ""
        self._fresh()

    def _fresh(self) -> None:
        self.url = b""
        self.headers: dict[str, str] = {}
        self.received = self.body_bytes = 0
        self.body: bytes | bytearray = b""
        self.begun = self.in_body = False

    # what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if not self.server.room():
            self.closing = True
            self.transport.abort()
            return
        self.server.connections.add(self)
        self.deadline = time.monotonic() + self.limits.head
        certificate = transport.get_extra_info("peercert")
        if certificate:
            self.peer = next((v for part in certificate.get("subject", ()) for k, v in part if k == "commonName"), "")

    def connection_lost(self, error: Exception | None) -> None:
        self.server.connections.discard(self)
        self._release()
        self.ahead.clear()
        self.closing = True
        if self.under_way is not None:  # nobody waits for it any more
            self.under_way.cancel()

    def data_received(self, data: bytes) -> None:
        if self.discarding or self.closing or self.refusal is not None:
            return
        if not self.begun:
            self.begun = True
            if not self.busy:
                self.deadline = time.monotonic() + self.limits.head
        self._parse(data)
        if self.body_bytes + self.owed != self.held:
            self._hold()
        if self.ahead:
            if not self.busy and not self.paused:
                self._start(*self.ahead.popleft())
            if self.ahead or self.refusal is not None:
                self.transport.pause_reading()

    def _parse(self, data: bytes) -> None:
        self.received += len(data)
        head_ends = -1
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            head_ends = offer.args[0]
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
            if self.received > self.limits.max_head:
                self._check_overhead()
        if head_ends >= 0:  # not where it was caught: the causes of later errors would be lost
            self._parse(self._declined() + data[head_ends:])

    def _declined(self) -> bytes:
        """The head of a request that offers another protocol, without the offer: it may be ignored (RFC 9110, 7.8)."""
        kept = {k: v for k, v in self.headers.items() if k not in ("upgrade", "connection", "http2-settings")}
        if "close" in self.headers.get("connection", "").lower():
            kept["connection"] = "close"
        lines = "".join([f"{name}: {value}\r\n" for name, value in kept.items()])
        head: bytes = self.parser.get_method() + b" " + self.url + b" HTTP/1.1\r\n" + lines.encode("latin-1") + b"\r\n"
        self.parser = httptools.HttpRequestParser(self)
        self._fresh()
        self.received = -len(head)
        return head

    def _check_overhead(self) -> None:
        """Refuse headers, chunk sizes, chunk extensions and trailers out of proportion to what they carry."""
        if self.begun and not self.in_body:
            self._refuse(431, f"headers of more than {self.limits.max_head} bytes")
        elif self.received - self.body_bytes > 2 * self.limits.max_head + self.body_bytes:
            self._refuse(400, "more bytes around the body than in it; expected larger chunks")

    def _hold(self) -> None:
        held = self.body_bytes + self.owed
        self.server.held += held - self.held
        self.held = held
        if self.server.held > self.limits.max_held:
            self._refuse(503, "too many bytes of other requests are held; try again")

    def _release(self) -> None:
        self.server.held -= self.held
        self.held = self.owed = self.answering = self.body_bytes = 0
        self.body = b""

    def eof_received(self) -> bool:
        # Whoever closes its side has left, as for Go and nginx: of a client that hangs up nothing else can be seen.
        return False

    def pause_writing(self) -> None:
        self.paused = True
        self.transport.pause_reading()
        self._write_deadline()

    def resume_writing(self) -> None:
        self.paused = False
        if self.closing:
            return
        self.deadline = float("inf") if self.busy else time.monotonic() + self.limits.idle
        if self.ahead and not self.busy:
            self.busy = True
            self.loop.call_soon(self._next)
        elif not self.ahead and self.refusal is None:
            self.transport.resume_reading()

    def _write_deadline(self) -> None:
        self.deadline = time.monotonic() + self.limits.write + self.transport.get_write_buffer_size() / _RATE

    # what the parser calls

    def on_message_begin(self) -> None:
        self.begun = True

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_body:  # a trailer: what decides about the request has been said before
            return
        key, text, headers = name.decode("latin-1").lower(), value.decode("latin-1"), self.headers
        if key in headers:  # a list (RFC 9110, 5.2), so that no two readers see different tokens or lengths
            text = f"{headers[key]}, {text}"
        if len(headers) >= 100 or len(text) > self.limits.max_head:
            raise _Refuse(431, "more than 100 headers, or one that is too long")
        headers[key] = text

    def on_headers_complete(self) -> None:
        headers, limits = self.headers, self.limits
        if self.received > limits.max_head:  # of which a body may be a part
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in headers.items())
            if size > limits.max_head:
                raise _Refuse(431, f"headers of more than {limits.max_head} bytes")
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _Refuse(501, "this server is no proxy")
            return
        self._check_framing(headers)
        self.in_body = True
        if self.busy or self.ahead:
            return
        self.deadline = self.since = time.monotonic() + limits.body
        if "expect" in headers and headers["expect"].lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _check_framing(self, headers: dict[str, str]) -> None:
        """Refuse what two readers could take for bodies of different length, where llhttp has not done so already."""
        if length := headers.get("content-length", ""):
            if not (length.isascii() and length.isdigit() and len(length) < 20):
                raise _Refuse(400, "a Content-Length that is no number of bytes")
            if int(length) > self.limits.max_body:
                raise _too_large(self.limits.max_body)
        elif coding := headers.get("transfer-encoding", ""):
            if coding.lower() != "chunked":
                raise _Refuse(501, f"the transfer encoding {coding!r}; expected chunked or none")
            if self.parser.get_http_version() != "1.1":
                raise _Refuse(400, "chunks in a request that is not HTTP/1.1")

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        if self.body_bytes > self.limits.max_body:
            raise _too_large(self.limits.max_body)
        if not self.body:
            self.body = body  # most come in one piece, which is not copied
            return
        if isinstance(self.body, bytes):
            self.body = bytearray(self.body)
        self.body += body

    def on_message_complete(self) -> None:
        if not self.in_body:  # it offers another protocol, and comes again without
            return
        if len(self.ahead) >= self.limits.max_ahead:
            raise _Refuse(429, f"more than {self.limits.max_ahead} requests ahead of their answers")
        path, _, query = self.url.decode("latin-1").partition("?")
        if not path.startswith("/"):  # the form that proxies use: http://host/path
            path = "/" + path.partition("://")[2].partition("/")[2]
        method = self.parser.get_method().decode("latin-1")
        request = Request(method, path, self.headers, bytes(self.body), query, self.peer)
        if self.parser.should_keep_alive():
            end = _SAY_KEEP if "connection" in self.headers else _KEEP  # HTTP/1.0 wants to be told
        else:
            end = _CLOSE
        if self.body_bytes > _LARGE:
            self.owed += self.body_bytes
        self._fresh()
        self.ahead.append((request, end))

    # requests and replies

    def _start(self, request: Request, end: bytes) -> None:
        self.busy, self.deadline = True, float("inf")
        self.answering = len(request.body) if self.owed and len(request.body) > _LARGE else 0
        try:
            reply = self.server.handler(request)
        except Exception as error:  # noqa: BLE001 (explain makes a reply of it, and logs what is ours)
            reply = self.server.explain(error)
        head_only = request.method == "HEAD"
        if isinstance(reply, tuple):
            self._write(reply, end, head_only)
            return
        self.under_way = reply
        reply.add_done_callback(lambda future: self._answered(future, end, head_only))

    def _answered(self, future: "asyncio.Future[Reply]", end: bytes, head_only: bool) -> None:
        self.under_way = None
        if future.cancelled():
            reply = json_reply(503, {"error": "the request was given up by the server; try again"})
        elif error := future.exception():
            reply = self.server.explain(error)
        else:
            reply = future.result()
        if not self.closing:
            self._write(reply, end, head_only)

    def _write(self, reply: Reply, end: bytes, head_only: bool = False) -> None:
        if self.server.stopping:
            end = _CLOSE
        try:
            head = _head(reply, end)
        except ValueError:
            logger.exception("a reply that cannot be written")
            reply = _failed()
            head = _head(reply, end)
        self.transport.write(head if head_only else head + reply[2])
        sent = self.server.responses
        sent[reply[0]] = sent.get(reply[0], 0) + 1
        self.busy = False
        if self.answering:
            self.owed -= self.answering
            self.held -= self.answering
            self.server.held -= self.answering
        if end is _CLOSE:
            self._close()
        elif self.ahead:
            # Not at once: a client that sends many requests ahead shares the loop with the others.
            self.busy = True
            self.loop.call_soon(self._next)
        elif self.refusal is not None:
            self._say_refusal()
        elif not self.paused:
            now, limits = time.monotonic(), self.limits
            self.since = now + limits.body
            self.deadline = self.since if self.in_body else now + (limits.head if self.begun else limits.idle)

    def _next(self) -> None:
        if self.closing:
            return
        if self.paused:  # it does not read what it has: the rest waits
            self.busy = False
            return
        request = self.ahead.popleft()
        if not self.ahead and self.refusal is None:
            self.transport.resume_reading()
        self._start(*request)

    def _close(self) -> None:
        self.closing = True
        self._write_deadline()
        self.transport.close()

    def _refuse(self, status: int, problem: str) -> None:
        if self.refusal is None:
            self.refusal = status, problem
            if not self.busy and not self.ahead:
                self._say_refusal()

    def _say_refusal(self) -> None:
        """Answer, and read on for a moment: closing at once would tear the answer from a client that still sends."""
        if self.refusal is None:
            return
        self.discarding = True
        self._release()
        status, problem = self.refusal
        reply = json_reply(status, {"error": problem})
        self.transport.write(_head(reply, _CLOSE) + reply[2])
        self.server.responses[status] = self.server.responses.get(status, 0) + 1
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.transport.resume_reading()
            self.deadline = time.monotonic() + 2.0
        else:
            self._close()

    def out_of_time(self, now: float) -> None:
        """The deadline has passed: say so where a request has begun, and close."""
        if self.closing or self.paused:  # it does not read what is sent
            self.transport.abort()
        elif self.discarding or not self.begun:
            self._close()
        elif self.in_body and now < (earned := self.since + self.body_bytes / _RATE):
            self.deadline = earned
        else:
            self._refuse(408, "the request took too long to arrive")

    def finish(self) -> None:
        """The server stops: close when what is under way is answered."""
        if not self.busy and not self.begun and not self.closing:
            self._close()


def _failed() -> Reply:
    return json_reply(500, {"error": "internal error, see the log"})


def _head(reply: Reply, end: bytes) -> bytes:
    """The head of a reply. Raises ``ValueError`` for a header that could pass for two, or is not Latin-1."""
    status, headers, body = reply
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        raise ValueError(f"a line break in {headers}")
    line = _LINES.get(status) or b"HTTP/1.1 %d -\r\n" % status
    return b"%b%bcontent-length: %d\r\n%b\r\n" % (line, lines.encode("latin-1"), len(body), end)


def _internal(error: BaseException) -> Reply:
    logger.error("a request failed", exc_info=error)
    return _failed()


class _Refuse(Exception):
    """Raised out of the parser's callbacks."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status


def _too_large(limit: int) -> _Refuse:
    return _Refuse(413, f"the body is too large; expected at most {limit} bytes\n  next: send smaller batches")
