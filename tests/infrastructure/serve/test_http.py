"""The HTTP front on real sockets: order, limits, slow clients, clients that leave, and attempts to smuggle."""

import asyncio
import contextlib
import re
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trilobe.infrastructure.serve.http import Handler, HttpServer, Limits, Reply, Request, json_reply

Address = tuple[str, int]


class Site:
    """A server on a free port of this machine, and what it was asked."""

    def __init__(self, handler: Handler | None = None, limits: Limits | None = None) -> None:
        self.seen: list[Request] = []
        self.handler = handler or echo
        self.server = HttpServer(self.handle, limits)
        self.address: Address = ("", 0)
        self.writers: list[asyncio.StreamWriter] = []

    def handle(self, request: Request) -> "Reply | asyncio.Future[Reply]":
        self.seen.append(request)
        return self.handler(request)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that is closed with the site at the latest."""
        reader, writer = await asyncio.open_connection(*self.address)
        self.writers.append(writer)
        return reader, writer

    async def ask(self, data: bytes, wait: float = 5.0) -> bytes:
        """Everything the server says to ``data`` until it closes, or nothing came for ``wait`` seconds."""
        reader, writer = await self.connect()
        writer.write(data)
        out = await heard(reader, wait)
        writer.close()
        return out

    async def alive(self) -> bool:
        return b"200 OK" in await self.ask(b"GET /alive HTTP/1.1\r\nConnection: close\r\n\r\n")


def echo(request: Request) -> Reply:
    return 200, {"content-type": "text/plain"}, request.path.encode() + b"|" + request.body


@contextlib.asynccontextmanager
async def site(handler: Handler | None = None, limits: Limits | None = None) -> AsyncIterator[Site]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    here = Site(handler, limits)
    here.address = listener.getsockname()
    await here.server.start(listener)
    try:
        yield here
    finally:
        for writer in here.writers:
            writer.close()
        await here.server.stop(0.0)
        await asyncio.sleep(0)


async def heard(reader: asyncio.StreamReader, wait: float = 5.0) -> bytes:
    """What comes until the end, or until nothing came for ``wait`` seconds."""
    out = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while data := await asyncio.wait_for(reader.read(1 << 20), wait):
            out += data
    return out


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One response: its status and body."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode()
    size = int(next(line for line in head.splitlines() if line.startswith("content-length")).split()[1])
    return int(head.split()[1]), await reader.readexactly(size)


async def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def run(test: Awaitable[None]) -> None:
    async def whole() -> None:
        await test

    asyncio.run(whole())


def post(path: str, body: bytes, *lines: str) -> bytes:
    head = "".join(f"{line}\r\n" for line in (f"Content-Length: {len(body)}", *lines))
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def count(out: bytes, status: int | None = None) -> int:
    """How many responses there are (of that status)."""
    return len(re.findall(rb"HTTP/1\.1 %b " % (b"%d" % status if status else rb"\d\d\d"), out))


CLOSE = "Connection: close"
HTTP = b"HTTP/1.1 "


# --- order and connections --------------------------------------------------------------------------------------


def test_requests_sent_ahead_are_answered_in_their_order() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        def later(request: Request) -> asyncio.Future[Reply]:
            future: asyncio.Future[Reply] = loop.create_future()
            loop.call_later(0.05 if request.path == "/0" else 0.0, future.set_result, echo(request))
            return future

        async with site(later) as here:
            out = await here.ask(b"".join(post(f"/{i}", b"b%d" % i) for i in range(20)) + post("/z", b"", CLOSE))
        bodies = [block.split(b"\r\n\r\n")[1] for block in out.split(HTTP)[1:]]
        assert bodies == [b"/%d|b%d" % (i, i) for i in range(20)] + [b"/z|"]

    run(main())


@given(pieces=st.lists(st.integers(1, 60), max_size=40), chunked=st.lists(st.booleans(), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_where_the_bytes_are_cut_makes_no_difference(pieces: list[int], chunked: list[bool]) -> None:
    """The same requests, cut anywhere: the same answers."""
    bodies = [bytes([65 + i]) * (i * 13) for i in range(len(chunked))]
    data = b""
    for i, (body, in_chunks) in enumerate(zip(bodies, chunked, strict=True)):
        if in_chunks:
            parts = [body[at : at + 7] for at in range(0, len(body), 7)]
            sent = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
            data += b"POST /%d HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % i + sent
        else:
            data += post(f"/{i}", body)

    async def main() -> None:
        async with site() as here:
            reader, writer = await here.connect()
            at = 0
            for size in pieces:
                writer.write(data[at : at + size])
                await asyncio.sleep(0)
                at += size
            writer.write(data[at:] + b"GET /end HTTP/1.1\r\nConnection: close\r\n\r\n")
            out = await heard(reader)
        assert [(request.path, request.body) for request in here.seen[:-1]] == [
            (f"/{i}", body) for i, body in enumerate(bodies)
        ]
        assert count(out, 200) == len(bodies) + 1

    run(main())


@pytest.mark.parametrize(
    ("data", "stays", "says"),
    [
        (b"GET /a HTTP/1.1\r\n\r\n", True, b""),
        (b"GET /a HTTP/1.1\r\nConnection: keep-alive\r\n\r\n", True, b"connection: keep-alive"),
        (b"GET /a HTTP/1.1\r\nConnection: close\r\n\r\n", False, b"connection: close"),
        (b"GET /a HTTP/1.0\r\n\r\n", False, b"connection: close"),
        (b"GET /a HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", True, b"connection: keep-alive"),
    ],
)
def test_connections_stay_as_long_as_both_want(data: bytes, stays: bool, says: bytes) -> None:
    async def main() -> None:
        async with site() as here:
            reader, writer = await here.connect()
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(3)
            assert says in head and (says or b"connection:" not in head)
            if stays:
                writer.write(b"GET /b HTTP/1.1\r\n\r\n")
                assert await answer(reader) == (200, b"/b|")
            else:
                assert await heard(reader) == b""

    run(main())


@pytest.mark.parametrize("at_once", [True, False])
def test_head_has_the_length_and_no_body(at_once: bool) -> None:
    async def main() -> None:
        def reply(request: Request) -> "Reply | asyncio.Future[Reply]":
            if at_once:
                return echo(request)
            future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_result, echo(request))
            return future

        async with site(reply) as here:
            out = await here.ask(b"HEAD /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\nConnection: close\r\n\r\n")
        first, second = out.split(HTTP)[1:]
        assert b"content-length: 3" in first and first.endswith(b"\r\n\r\n")
        assert second.endswith(b"\r\n\r\n/b|")

    run(main())


def test_expect_continue_is_granted_before_the_body_and_not_for_one_that_is_too_large() -> None:
    async def main() -> None:
        async with site(limits=Limits(max_body=10)) as here:
            reader, writer = await here.connect()
            writer.write(b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
            assert await asyncio.wait_for(reader.readexactly(25), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert not here.seen
            writer.write(b"abc")
            assert await answer(reader) == (200, b"/a|abc")
            writer.write(b"POST /a HTTP/1.1\r\nContent-Length: 11\r\nExpect: 100-continue\r\n\r\n")
            status, _ = await answer(reader)
            assert status == 413

    run(main())


def test_a_post_without_a_length_has_no_body() -> None:
    async def main() -> None:
        async with site() as here:
            assert (await here.ask(b"POST /index HTTP/1.1\r\nConnection: close\r\n\r\n")).endswith(b"/index|")

    run(main())


def test_an_offer_of_another_protocol_is_ignored() -> None:
    """As sent by Java's HttpClient and ``curl --http2``: one request, with its body, one answer."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")

    async def main() -> None:
        async with site() as here:
            out = await here.ask(post("/a", b"abc", *offer) * 3 + post("/b", b"de", CLOSE))
        assert [(r.path, r.body) for r in here.seen] == [("/a", b"abc")] * 3 + [("/b", b"de")]
        assert count(out) == 4 and "upgrade" not in here.seen[0].headers

    run(main())


# --- what handlers do wrong ---------------------------------------------------------------------------------------


def test_failures_of_the_handler_are_500_and_the_connection_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        def reply(request: Request) -> "Reply | asyncio.Future[Reply]":
            future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            if request.path == "/raise":
                raise RuntimeError("secret of the house")
            if request.path == "/later":
                future.set_exception(RuntimeError("secret of the house"))
                return future
            if request.path == "/cancel":
                future.cancel()
                return future
            if request.path == "/split":
                return 200, {"x-id": "a\r\nset-cookie: b"}, b""
            if request.path == "/unicode":
                return 200, {"x-id": "\u20ac"}, b""
            return echo(request)

        async with site(reply) as here:
            reader, writer = await here.connect()
            for path, status in {"/raise": 500, "/later": 500, "/cancel": 503, "/split": 500, "/unicode": 500}.items():
                writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
                got, body = await answer(reader)
                assert got == status and b'"error"' in body and b"secret" not in body and b"cookie" not in body
            writer.write(b"GET /well HTTP/1.1\r\n\r\n")
            assert await answer(reader) == (200, b"/well|")

    run(main())
    assert "secret of the house" in caplog.text


# --- limits -------------------------------------------------------------------------------------------------------

SMALL = Limits(max_body=1000, max_head=2000)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /a HTTP/1.1\r\nX: " + b"a" * 3000 + b"\r\n\r\n", 431),
        (b"GET /a HTTP/1.1\r\nX: " + b"a" * 100_000, 431),
        (b"GET /a HTTP/1.1\r\n" + b"X: 1\r\n" * 1000 + b"\r\n", 431),
        (b"GET /a HTTP/1.1\r\n" + b"".join(b"X%d:\r\n" % i for i in range(101)) + b"\r\n", 431),
        (post("/a", b"a" * 1001), 413),
        (b"POST /a HTTP/1.1\r\nContent-Length: 1001\r\n\r\n", 413),
        (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"a" * 1000 + b"\r\n1\r\na\r\n", 413),
        (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 990, 400),  # mere framing
        (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"e" * 9000, 400),
        (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nT: " + b"e" * 9000, 400),
    ],
)
def test_limits_hold_before_the_handler_sees_anything(data: bytes, status: int) -> None:
    async def main() -> None:
        async with site(limits=SMALL) as here:
            out = await here.ask(data)
            assert out.startswith(HTTP + b"%d " % status) and count(out) == 1
            assert b'{"error":' in out and b"connection: close" in out
            assert not here.seen and here.server.responses == {status: 1}
            assert await here.alive()

    run(main())


def test_what_fits_the_limits_passes() -> None:
    async def main() -> None:
        async with site(limits=SMALL) as here:
            assert b"200 OK" in await here.ask(post("/a", b"a" * 1000, "X: " + "a" * 1900, CLOSE))
            many = "".join(f"X{i}: 1\r\n" for i in range(98))
            assert b"200 OK" in await here.ask(f"GET /a HTTP/1.1\r\n{many}Connection: close\r\n\r\n".encode())

    run(main())


def test_what_came_before_a_bad_request_is_answered_before_it_is_refused() -> None:
    async def main() -> None:
        waiting: list[asyncio.Future[Reply]] = []

        def wait(request: Request) -> asyncio.Future[Reply]:
            waiting.append(asyncio.get_running_loop().create_future())
            return waiting[-1]

        async with site(wait) as here:
            asked = asyncio.ensure_future(here.ask(post("/a", b"") + b"NONSENSE\r\n\r\n" + post("/b", b"")))
            await until(lambda: bool(waiting))
            await asyncio.sleep(0.05)
            waiting[0].set_result((200, {}, b"first"))
            out = await asked
        assert count(out) == 2 and out.index(b"first") < out.index(HTTP + b"400 ")
        assert len(here.seen) == 1

    run(main())


def test_a_client_far_ahead_of_its_answers_is_refused_and_holds_little() -> None:
    async def main() -> None:
        def never(request: Request) -> asyncio.Future[Reply]:
            return asyncio.get_running_loop().create_future()

        async with site(never, Limits(max_ahead=8)) as here:
            _, writer = await here.connect()
            writer.write(b"GET / HTTP/1.1\r\n\r\n" * 100_000)
            await until(lambda: bool(here.seen))
            await asyncio.sleep(0.1)
            (connection,) = here.server.connections
            assert len(here.seen) == 1 and len(connection.ahead) <= 8
            assert not connection.transport.is_reading()

    run(main())


def test_many_requests_ahead_do_not_keep_others_waiting() -> None:
    async def main() -> None:
        def slow(request: Request) -> Reply:
            time.sleep(0.005)
            return echo(request)

        async with site(slow) as here:
            greedy = asyncio.ensure_future(here.ask(post("/g", b"") * 60 + post("/g", b"", CLOSE)))
            await until(lambda: len(here.seen) > 2)
            assert await here.alive()
            assert not greedy.done()  # the 60 take 0.3 s, whose turns the other one shared
            assert count(await greedy) == 61

    run(main())


def test_bodies_of_all_clients_together_are_bounded() -> None:
    async def main() -> None:
        async with site(limits=Limits(max_body=1 << 20, max_held=3 << 20)) as here:
            half = b"POST /a HTTP/1.1\r\nContent-Length: 1048576\r\n\r\n" + b"a" * 900_000
            pairs = [await here.connect() for _ in range(8)]
            for _, writer in pairs:
                writer.write(half)
                await writer.drain()
            await until(lambda: here.server.held > 2 << 20)
            await asyncio.sleep(0.2)
            assert here.server.held < 4 << 20
            refused = [await heard(reader, 0.3) for reader, _ in pairs]
            assert 3 <= sum(HTTP + b"503 " in out for out in refused) <= 6
            assert await here.alive()
            for _, writer in pairs:
                writer.close()
            await until(lambda: not here.server.connections)
            assert here.server.held == 0

    run(main())


def test_bodies_that_wait_for_their_answer_count_as_well() -> None:
    async def main() -> None:
        waiting: list[asyncio.Future[Reply]] = []

        def wait(request: Request) -> asyncio.Future[Reply]:
            waiting.append(asyncio.get_running_loop().create_future())
            return waiting[-1]

        async with site(wait, Limits(max_body=1 << 20, max_held=3 << 20)) as here:
            for n in range(3):
                _, writer = await here.connect()
                writer.write(post("/a", bytes(900_000)))
                await until(lambda n=n: len(waiting) == n + 1)
            assert (await here.ask(post("/a", bytes(900_000)))).startswith(HTTP + b"503 ")
            assert len(waiting) == 3 and here.server.held == 2_700_000
            small = asyncio.ensure_future(here.ask(post("/small", b"a", CLOSE)))
            await until(lambda: len(waiting) == 4)  # small ones pass
            for future in waiting:
                future.set_result((200, {}, b""))
            assert count(await small, 200) == 1
            await until(lambda: here.server.held == 0)
            _, writer = await here.connect()
            writer.write(post("/a", bytes(900_000)))
            await until(lambda: len(waiting) == 5)
            writer.close()
            await until(lambda: waiting[-1].cancelled() and here.server.held == 0)

    run(main())


# --- slow clients and those that leave ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "drops"),
    [
        (b"GET /a HTTP/1.1\r\nX: ", b"a"),
        (b"GET /", b"a"),
        (b"\r\n", b"\r\n"),
        (b"POST /a HTTP/1.1\r\nContent-Length: 90000000\r\n\r\nabc", b"a"),
        (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    ],
    ids=["head", "path", "lines", "body", "chunks"],
)
def test_slow_clients_are_told_and_dropped(start: bytes, drops: bytes) -> None:
    async def main() -> None:
        limits = Limits(head=0.3, body=0.3, idle=60, max_body=1 << 30)
        async with site(limits=limits) as here:
            reader, writer = await here.connect()
            writer.write(start)
            told = asyncio.ensure_future(heard(reader))
            for _ in range(100):  # a drop now and then does not help
                await asyncio.sleep(0.05)
                if told.done():
                    break
                writer.write(drops)
            assert (await told).startswith(HTTP + b"408 ")
            assert not here.seen
            writer.close()
            await until(lambda: not here.server.connections)

    run(main())


def test_a_large_body_on_a_slow_line_arrives() -> None:
    """The time for a body grows with what has come: 64 KiB buy a second."""

    async def main() -> None:
        async with site(limits=Limits(body=0.2)) as here:
            reader, writer = await here.connect()
            writer.write(b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(10):
                writer.write(b"10000\r\n" + b"a" * 65536 + b"\r\n")
                await asyncio.sleep(0.08)
            writer.write(b"0\r\n\r\n")
            status, body = await answer(reader)
            assert status == 200 and len(body) == 655363

    run(main())


def test_silence_ends_a_connection() -> None:
    async def main() -> None:
        async with site(limits=Limits(head=0.2, idle=0.2)) as here:
            assert await here.ask(b"") == b""
            assert (await here.ask(b"GET /a HTTP/1.1\r\n\r\n")).endswith(b"/a|")
            await until(lambda: not here.server.connections)

    run(main())


@pytest.mark.parametrize(
    ("lines", "size"), [((), 60_000), ((CLOSE,), 60_000), ((), 100_000)], ids=["rests", "closes", "pauses"]
)
def test_a_client_that_does_not_read_loses_its_connection(lines: tuple[str, ...], size: int) -> None:
    """Whether what waits for it makes asyncio pause (over 64 KiB) or not; small buffers stand for a long line."""

    async def main() -> None:
        async with site(lambda request: (200, {}, bytes(size)), Limits(write=0.2, idle=0.2)) as here:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(here.address)
                await until(lambda: bool(here.server.connections))
                (connection,) = here.server.connections
                connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                client.sendall(post("/a", b"", *lines))
                await until(lambda: bool(here.seen))
                assert connection.transport.get_write_buffer_size() > 0
                assert connection.paused == (size == 100_000)
                await until(lambda: not here.server.connections, 10)

    run(main())


def test_a_client_that_reads_slowly_gets_time_for_a_large_answer() -> None:
    async def main() -> None:
        async with site(lambda request: (200, {}, bytes(20_000_000)), Limits(write=0.3)) as here:
            _, writer = await here.connect()
            writer.write(post("/a", b""))
            await until(lambda: bool(here.seen))
            (connection,) = here.server.connections
            assert 10 < connection.deadline - time.monotonic() < 0.3 + 20_000_000 / 65536

    run(main())


def test_who_leaves_cancels_what_it_asked_for() -> None:
    async def main() -> None:
        waiting: list[asyncio.Future[Reply]] = []

        def wait(request: Request) -> asyncio.Future[Reply]:
            waiting.append(asyncio.get_running_loop().create_future())
            return waiting[-1]

        async with site(wait) as here:
            _, writer = await here.connect()
            writer.write(post("/a", b"abc"))
            await until(lambda: bool(waiting))
            writer.close()
            await until(lambda: waiting[0].cancelled())
            assert not here.server.connections

    run(main())


def test_half_a_body_is_nobodys_request() -> None:
    async def main() -> None:
        async with site() as here:
            for cut in (5, 30, 60, -1):
                _, writer = await here.connect()
                writer.write(post("/a", b"a" * 50)[:cut])
                await writer.drain()
                writer.close()
            await until(lambda: not here.server.connections)
            assert not here.seen and here.server.held == 0
            assert await here.alive()

    run(main())


def test_two_thousand_idle_connections_are_nobodys_business() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * 2000 + 200
    if hard < needed:
        pytest.skip(f"at most {hard} open files here; the test needs {needed}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))

    async def main() -> None:
        async with site() as here:
            before = _resident()
            clients = []
            for i in range(2000):
                clients.append(socket.create_connection(here.address))
                if i % 50 == 0:
                    await asyncio.sleep(0)
            await until(lambda: len(here.server.connections) == 2000)
            start = time.monotonic()
            for _ in range(100):
                assert await here.alive()
            assert time.monotonic() - start < 10.0  # 100 ms each, on the busiest of machines
            assert (_resident() - before) / 2000 < 40_000
            for client in clients:
                client.close()
            await until(lambda: not here.server.connections)

    try:
        run(main())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _resident() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


def test_who_rests_makes_way_for_who_asks() -> None:
    async def main() -> None:
        async with site(limits=Limits(max_connections=10)) as here:
            pairs = [await here.connect() for _ in range(10)]
            await until(lambda: len(here.server.connections) == 10)
            assert await here.alive()
            assert len(here.server.connections) <= 10
            pairs.append(await here.connect())
            for _, writer in pairs:
                writer.write(b"GET /bu")  # now all of them are about to ask
            await until(lambda: sum(c.begun for c in here.server.connections) == 10)
            reader, _ = await here.connect()
            assert await heard(reader) == b""  # nobody rests: the last to come goes
            assert len(here.server.connections) == 10

    run(main())


def test_stopping_answers_what_is_under_way_and_closes() -> None:
    async def main() -> None:
        waiting: list[asyncio.Future[Reply]] = []

        def wait(request: Request) -> asyncio.Future[Reply]:
            waiting.append(asyncio.get_running_loop().create_future())
            return waiting[-1]

        async with site(wait) as here:
            idle, _ = await here.connect()
            asked = asyncio.ensure_future(here.ask(post("/a", b"") * 2))
            await until(lambda: bool(waiting))
            stopping = asyncio.ensure_future(here.server.stop(5))
            assert await heard(idle) == b""
            waiting[0].set_result((200, {}, b"done"))
            out = await asked
            assert out.endswith(b"done") and b"connection: close" in out and len(here.seen) == 1
            await stopping
            with pytest.raises(OSError):
                await here.connect()

    run(main())


# --- smuggling: what two readers could understand differently -------------------------------------------------------

CHUNKED = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
REFUSED = {
    "two lengths": b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "twice the same length": b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a list of lengths": b"POST /a HTTP/1.1\r\nContent-Length: 3, 3\r\n\r\nabc",
    "length and chunks": b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "signed length": b"POST /a HTTP/1.1\r\nContent-Length: +3\r\n\r\nabc",
    "negative length": b"POST /a HTTP/1.1\r\nContent-Length: -3\r\n\r\nabc",
    "hexadecimal length": b"POST /a HTTP/1.1\r\nContent-Length: 0x3\r\n\r\nabc",
    "endless length": b"POST /a HTTP/1.1\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\nabc",
    "length of 5000 digits": b"POST /a HTTP/1.1\r\nContent-Length: " + b"0" * 5000 + b"3\r\n\r\nabc",
    "another coding first": b"POST /a HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "another coding last": b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"POST /a HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "codings on two lines": CHUNKED[:-2] + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before the colon": b"POST /a HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded line": b"POST /a HTTP/1.1\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a vertical tab": b"POST /a HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "bare line feeds": b"GET /a HTTP/1.1\nHost: a\n\n",
    "bare carriage returns": b"GET /a HTTP/1.1\rHost: a\r\r",
    "NUL in a name": b"GET /a HTTP/1.1\r\nX\0Y: a\r\n\r\n",
    "NUL in a value": b"GET /a HTTP/1.1\r\nX: a\0b\r\n\r\n",
    "NUL in the path": b"GET /a\0b HTTP/1.1\r\n\r\n",
    "bytes that are no ASCII": b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    "negative chunk": CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "0x chunk": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "overflowing chunk": CHUNKED + b"ffffffffffffffff1\r\nabc\r\n0\r\n\r\n",
    "chunk too short": CHUNKED + b"2\r\nabc\r\n0\r\n\r\n",
    "chunk with line feeds": CHUNKED + b"3\nabc\n0\n\n",
    "line feed in an extension": CHUNKED + b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "a length as a trailer": CHUNKED + b"0\r\nContent-Length: 7\r\n\r\n",
    "HTTP/2 by force": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3.7": b"GET / HTTP/3.7\r\n\r\n",
    "a proxy's request": b"CONNECT a:80 HTTP/1.1\r\n\r\n",
    "TLS to plain HTTP": bytes.fromhex("16030100f0010000ec0303") + b"x" * 50,
    "nothing of the kind": b"hello\r\n\r\n",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_requests_with_two_readings_are_refused(data: bytes) -> None:
    async def main() -> None:
        async with site() as here:
            out = await here.ask(data)
            assert out.split(b" ", 1)[0] == b"HTTP/1.1" and out.split(b" ")[1] in (b"400", b"501")
            assert count(out) == 1 and b'{"error":' in out
            assert not here.seen

    run(main())


def test_what_is_said_twice_is_a_list_and_what_is_said_late_is_not_heard() -> None:
    async def main() -> None:
        async with site() as here:
            await here.ask(
                b"GET /a HTTP/1.1\r\nAuthorization: a\r\nauthorization: b\r\nX:\r\nConnection: close\r\n\r\n"
            )
            await here.ask(CHUNKED[:-2] + b"Connection: close\r\n\r\n1\r\na\r\n0\r\nAuthorization: evil\r\n\r\n")
        assert here.seen[0].headers == {"authorization": "a, b", "x": "", "connection": "close"}
        assert here.seen[1].body == b"a" and "authorization" not in here.seen[1].headers

    run(main())


@pytest.mark.parametrize(
    ("sent", "path", "parts", "query"),
    [
        ("http://elsewhere/v2/models?x=1", "/v2/models", ["v2", "models"], "x=1"),
        ("/a%2Fb/%2e%2e/c", "/a%2Fb/%2e%2e/c", ["a/b", "..", "c"], ""),
        ("//a//b/", "//a//b/", ["", "a", "", "b", ""], ""),
        ("*", "/", [""], ""),
        ("/%00%0d%0a", "/%00%0d%0a", ["\0\r\n"], ""),
        ("/%ff%fe%zz%", "/%ff%fe%zz%", ["\ufffd\ufffd%zz%"], ""),
    ],
)
def test_paths_arrive_as_they_were_sent(sent: str, path: str, parts: list[str], query: str) -> None:
    async def main() -> None:
        async with site() as here:
            method = "OPTIONS" if sent == "*" else "GET"
            await here.ask(f"{method} {sent} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        (request,) = here.seen
        assert (request.path, request.parts, request.query) == (path, parts, query)

    run(main())


def test_json_reply_is_compact() -> None:
    assert json_reply(200, {"a": [1, 2]})[2] == b'{"a":[1,2]}'
