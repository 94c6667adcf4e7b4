"""An open-loop client: requests are sent when they are due, whether or not earlier ones were answered.

Times between requests are exponential (a Poisson process of ``rate``), latency counts from the moment a request was
due, so a server that stands still is charged for everyone who would have come meanwhile. Connections are kept alive,
and more are opened as more requests wait. Every answer is compared with the right ones. It runs in a process of its
own (:func:`begin`), one thread, raw sockets: about 30 microseconds of processor time a request.
"""

import multiprocessing
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

WRONG, LOST = -1, -2  # not any right answer; no answer at all. A status other than 200 is its negative: -503
ROW = np.dtype([("due", "<f8"), ("latency", "<f4"), ("said", "<i2"), ("retried", "<i2")])


@dataclass(frozen=True)
class Load:
    """What is sent, how often, and what is right.

    ``requests`` are whole HTTP requests; the end of the body of an answer to request ``i`` is, as float32 and within
    1e-5, ``right[j][i]`` of one ``j``: ``said`` is that ``j`` (or WRONG, LOST, -503). A request whose kept-alive
    connection is gone before any byte of its answer is sent once more, ``retry`` times, on a new one, as HTTP clients
    do. Times are those of ``time.monotonic()``.
    """

    port: int
    requests: Sequence[bytes]
    right: Any
    rate: float
    seconds: float
    out: Path
    retry: int = 1
    patience: float = 10.0
    most: int = 512
    seed: int = 0


def http_request(call: Any) -> bytes:
    """A ``serving.Call`` as bytes of HTTP/1.1."""
    headers = {"Host": "127.0.0.1", "Content-Length": str(len(call.body)), **call.headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {call.path} HTTP/1.1\r\n{lines}\r\n".encode() + call.body


def begin(load: Load) -> BaseProcess:
    """Start the load in a process of its own; ``join`` it, then :func:`rows` of ``load.out`` has what happened."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=(load,))
    process.start()
    return process


def failures(rows: Any) -> dict[str, int]:
    """How many requests failed, and of them by kind: lost, wrong, or the status."""
    kinds, counts = np.unique(rows["said"][rows["said"] < 0], return_counts=True)
    names = {WRONG: "wrong", LOST: "lost"}
    by_kind = {names.get(int(k), f"status {-k}"): int(n) for k, n in zip(kinds, counts, strict=True)}
    return {"failed": int(counts.sum()), **by_kind}


def rows(path: Path) -> Any:
    """What happened: one row for each request, in the order of the answers."""
    return np.fromfile(path, ROW)


@dataclass(eq=False)
class _Line:
    """One connection, and the request on it."""

    sock: socket.socket
    due: float = 0.0
    index: int = 0
    tries: int = 0
    busy: bool = False
    received: bytearray = field(default_factory=bytearray)
    length: int = -1


class _Client:
    def __init__(self, load: Load) -> None:
        self.load = load
        self.lines: dict[int, _Line] = {}
        self.idle: list[_Line] = []
        self.known: dict[tuple[int, bytes], int] = {}
        self.done: list[tuple[float, float, int, int]] = []
        self.again: deque[tuple[float, int, int]] = deque()
        self.width = np.asarray(load.right).shape[-1] * 4

    def open(self) -> _Line | None:
        try:
            sock = socket.create_connection(("127.0.0.1", self.load.port), timeout=self.load.patience)
        except OSError:
            return None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(self.load.patience)
        line = _Line(sock)
        self.lines[sock.fileno()] = line
        return line

    def send(self, due: float, index: int, tries: int) -> bool:
        """Send one request; False where no connection is free and no more may be opened."""
        line = self.idle.pop() if self.idle and not tries else None
        if line is None:
            if len(self.lines) >= self.load.most:
                return False
            line = self.open()
            if line is None:
                self.finished(due, LOST, tries)
                return True
        line.due, line.index, line.tries, line.busy, line.length = due, index, tries, True, -1
        line.received.clear()
        try:
            line.sock.sendall(self.load.requests[index])
        except OSError:
            self.broken(line)
        return True

    def receive(self, line: _Line) -> None:
        try:
            data = line.sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.broken(line)
            return
        if not line.busy:
            return
        line.received += data
        if line.length < 0:
            end = line.received.find(b"\r\n\r\n")
            if end < 0:
                return
            at = line.received.lower().find(b"content-length:", 0, end)
            line.length = end + 4 + int(line.received[at + 15 : end + 2].split(b"\r\n", 1)[0])
        if len(line.received) >= line.length:
            line.busy = False
            self.finished(line.due, self.judge(line), line.tries)
            if b"connection: close" in line.received[:300].lower():
                self.close(line)
            else:
                self.idle.append(line)

    def judge(self, line: _Line) -> int:
        """Which right answer this is; looked up by its bytes after the first time."""
        if line.received[9:12] != b"200":
            return -int(line.received[9:12])
        tail = bytes(line.received[-self.width :])
        key = (line.index, tail)
        if key not in self.known:
            said = np.frombuffer(tail, "<f4")
            fits = [j for j, right in enumerate(self.load.right) if np.allclose(said, right[line.index], atol=1e-5)]
            self.known[key] = fits[0] if fits else WRONG
        return self.known[key]

    def broken(self, line: _Line) -> None:
        """The connection is gone. Its request goes out once more if nothing of its answer had come."""
        busy = line.busy
        self.close(line)
        if busy and line.tries < self.load.retry and not line.received:
            self.again.append((line.due, line.index, line.tries + 1))
        elif busy:
            self.finished(line.due, LOST, line.tries)

    def close(self, line: _Line) -> None:
        self.lines.pop(line.sock.fileno(), None)
        with suppress(ValueError):
            self.idle.remove(line)
        line.sock.close()

    def finished(self, due: float, said: int, tries: int) -> None:
        self.done.append((due, time.monotonic() - due, said, tries))

    def overdue(self, now: float) -> None:
        """Give up requests that wait for longer than anybody would."""
        for line in [x for x in self.lines.values() if x.busy and now - x.due > self.load.patience]:
            self.close(line)
            self.finished(line.due, LOST, line.tries)


def run(load: Load) -> None:
    """The whole load, here and now; rows are written every second."""
    rng = np.random.default_rng(load.seed)
    client, start = _Client(load), time.monotonic()
    due, end, k, written = start, start + load.seconds, 0, start
    with load.out.open("wb") as out:
        while True:
            now = time.monotonic()
            while client.again and client.send(*client.again[0]):
                client.again.popleft()
            while due <= now and due < end and client.send(due, k % len(load.requests), 0):
                k += 1
                due += rng.exponential(1 / load.rate)
            busy = client.again or any(line.busy for line in client.lines.values())
            if due >= end and not busy:
                break
            wait = min(0.05, max(0.0, due - time.monotonic())) if due < end else 0.05
            readable, _, _ = select.select(list(client.lines), [], [], wait)
            for fd in readable:
                if fd in client.lines:
                    client.receive(client.lines[fd])
            if now - written > 1.0:
                client.overdue(now)
                out.write(np.array(client.done, ROW).tobytes())
                client.done.clear()
                written = now
        out.write(np.array(client.done, ROW).tobytes())
