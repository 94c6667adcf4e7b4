"""A step in Python in processes of its own: what hangs in one is killed, what ends one is started again.

A thread of the server hands a batch to a process that is idle and waits for what comes back. So the step computes
beside Python's lock, and whatever it does to its process (a hang, a crash, memory that grows) it does to no other
step. The process imports the function by its name; arrays travel as the bytes of their declared datatypes and the rest
as MessagePack: nothing is pickled. It ends when the server does, however that ends.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from queue import LifoQueue
from typing import Any

import msgspec
from numpy.typing import NDArray

from trilobe.errors import DataError, ServeError, TrilobeError, UsageError
from trilobe.infrastructure.pipeline import Arrays, TensorSpec, pack, unpack
from trilobe.infrastructure.serve.graph import Function, find
from trilobe.infrastructure.serve.metrics import resident_bytes
from trilobe.infrastructure.serve.protocol import Refused

START_SECONDS = 30.0  # for a process to import what it shall run
STOP_SECONDS = 1.0  # for an idle one to end when it is asked to
Told = Callable[[str], None]
PROGRAM = """
import sys
sys.path[:] = sys.argv[3:]
from trilobe.infrastructure.serve.steps import main
main(int(sys.argv[1]), sys.argv[2])
"""
logger = logging.getLogger(__name__)


class _Head(msgspec.Struct):
    """What comes before the bytes of arrays: their shapes and sizes; or what went wrong instead."""

    arrays: list[tuple[tuple[int, ...], int]] = []
    blames: str = ""  # "request" or "step"
    problem: str = ""
    expected: str = ""
    hint: str = ""


class Processes:
    """The same as ``step``, computed by up to ``n`` processes at once; as many threads may call it.

    Args:
        step: a function that can be imported by its module's name.
        n: processes.
        limit: seconds for one batch; a process that takes longer is killed.
        max_memory: bytes that a process may hold after a batch, before another takes its place (0: any).
        told: is called with the reason, ``hung``, ``ended`` or ``grown``, whenever a process had to be replaced.

    A call raises what the step raised (:class:`~trilobe.errors.DataError` where the request is to blame, else
    :class:`~trilobe.errors.ServeError`), :class:`Refused` 504 where it hung.

    >>> import numpy as np
    >>> from trilobe.tasks.image_classification.serve import decode_gray
    >>> with contextlib.closing(Processes(decode_gray, n=1)) as processes:
    ...     processes({"photo": np.array([b"no picture"], dtype=object)})
    Traceback (most recent call last):
    trilobe.errors.DataError: step 'decode_gray': not an image...
    """

    def __init__(
        self, step: Function, n: int, limit: float = 30.0, max_memory: int = 0, told: Told = lambda reason: None
    ) -> None:
        self.step, self.limit, self.max_memory, self._told = step, limit, max_memory, told
        self._path = _importable(step)
        self._idle: LifoQueue[_Process | None] = LifoQueue()  # None: not started yet
        self._all: set[_Process] = set()
        for _ in range(n):
            self._idle.put(None)

    def start(self) -> None:
        """Start all processes and wait until each has imported the step; raises :class:`ServeError` where one cannot.

        Those that compute meanwhile are left alone. What is not started so is started by the first call that needs it.
        """
        started = [self._idle.get() or self._begin() for _ in range(self._idle.qsize())]  # side by side
        try:
            for process in started:
                process.wait(START_SECONDS)
        finally:
            for process in started:
                self._idle.put(process)

    def __call__(self, data: Arrays) -> dict[str, NDArray[Any]]:
        """The declared outputs, see :class:`~trilobe.infrastructure.serve.graph.Function`."""
        process = self._idle.get() or self._begin()
        try:
            try:
                made = process.ask(data, self.step, self.limit)
            except ConnectionError:  # was it the step, or did somebody else end it? The next one shows
                process = self._instead_of(process, "ended")
                made = process.ask(data, self.step, self.limit)
            if self.max_memory and process.resident > self.max_memory:
                process = self._instead_of(process, "grown")
            return made
        except TimeoutError:
            process = self._instead_of(process, "hung")
            raise Refused(504, f"step {self.step.name!r} did not finish within {self.limit:g} s") from None
        except ConnectionError:
            how = process.ended()
            process = self._instead_of(process, "ended")
            raise ServeError(f"step {self.step.name!r} ended its process ({how})") from None
        finally:
            self._idle.put(process)

    def _begin(self) -> "_Process":
        process = _Process(self.step.name, self._path)
        self._all.add(process)
        return process

    def _instead_of(self, process: "_Process", reason: str) -> "_Process":
        logger.error("a process of step %r has %s: another takes its place", self.step.name, reason)
        self._told(reason)
        self._all.discard(process)
        process.close(0.0)
        return self._begin()

    def close(self) -> None:
        """End all processes; nothing may be under way any more."""
        for process in self._all:
            process.hang_up()
        for process in self._all:
            process.close(STOP_SECONDS)
        self._all.clear()


class _Process:
    """One of them, seen from the server."""

    def __init__(self, name: str, path: str) -> None:
        self._name = name
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(theirs.fileno()), path, *sys.path],
                stdin=subprocess.PIPE,  # closed when the server ends, however it does
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the server, which ends us in its own time
            )
        self._ready = False

    def wait(self, seconds: float) -> None:
        """Until it has imported the step."""
        if self._ready:
            return
        try:
            _receive(_Timed(self._socket, seconds), ())
        except OSError as error:
            raise ServeError(f"the process of step {self._name!r} did not start ({self.ended()})") from error
        self._ready = True

    def ask(self, data: Arrays, step: Function, limit: float) -> dict[str, NDArray[Any]]:
        """What it makes of ``data``. Raises TimeoutError after ``limit`` seconds, ConnectionError where it ended."""
        self.wait(START_SECONDS)
        line = _Timed(self._socket, limit)
        _send_arrays(line, data, step.inputs)
        return _receive(line, step.outputs)

    def ended(self) -> str:
        """How it came to an end, which it is about to."""
        try:
            code = self._popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return "it does not listen"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    @property
    def resident(self) -> int:
        """Bytes of memory it holds; 0 where it has just ended, which the next call will notice."""
        return resident_bytes(self._popen.pid) or 0

    def hang_up(self) -> None:
        """Let it know that nothing more will come."""
        self._socket.close()
        if self._popen.stdin is not None:
            self._popen.stdin.close()

    def close(self, patience: float) -> None:
        """End it: by itself within ``patience`` seconds, or not."""
        self.hang_up()
        try:
            self._popen.wait(patience)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def _importable(step: Function) -> str:
    """The name by which another process finds ``step``."""
    path = f"{step.run.__module__}:{step.run.__qualname__}"
    try:
        found = find(path) if step.run.__module__ != "__main__" else None
    except UsageError:
        found = None
    if not isinstance(found, Function) or found.run is not step.run:
        raise UsageError(
            f"step {step.name!r} cannot be run in a process of its own: {path} is not it",
            expected="a function at the top of a module that can be imported",
            hint='move it into a file, or run it in a thread: where = "threads"',
        )
    return path


# --- what travels ---------------------------------------------------------------------------------------------------


class _Timed:
    """A socket whose sending and receiving together may take so many seconds (None: any)."""

    def __init__(self, line: socket.socket, seconds: float | None) -> None:
        self._line = line
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def _left(self) -> None:
        if self._deadline is not None:
            self._line.settimeout(max(1e-3, self._deadline - time.monotonic()))

    def sendall(self, data: bytes) -> None:
        self._left()
        self._line.sendall(data)

    def receive(self, n: int) -> memoryview:
        """Exactly ``n`` bytes; ConnectionError where they end before."""
        data = memoryview(bytearray(n))
        at = 0
        while at < n:
            self._left()
            got = self._line.recv_into(data[at:])
            if not got:
                raise ConnectionResetError("the other side is gone")
            at += got
        return data


def _send(line: _Timed, head: _Head, bodies: Sequence[bytes] = ()) -> None:
    data = msgspec.msgpack.encode(head)
    line.sendall(len(data).to_bytes(8, "little") + data)
    for body in bodies:
        line.sendall(body)


def _send_arrays(line: _Timed, arrays: Arrays, specs: Sequence[TensorSpec]) -> None:
    packed = [(arrays[spec.name].shape, pack(arrays[spec.name], spec.dtype)) for spec in specs]
    _send(line, _Head([(shape, len(body)) for shape, body in packed]), [body for _, body in packed])


def _receive(line: _Timed, specs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    """The arrays that were sent, or the error that was."""
    head = msgspec.msgpack.decode(line.receive(int.from_bytes(line.receive(8), "little")), type=_Head)
    if head.blames:
        kind = DataError if head.blames == "request" else ServeError
        raise kind(head.problem, expected=head.expected, hint=head.hint)
    pairs = zip(head.arrays, specs, strict=True)
    return {spec.name: unpack(line.receive(size), spec.dtype, shape) for (shape, size), spec in pairs}


# --- the process itself ---------------------------------------------------------------------------------------------


def _end_with_the_server() -> None:
    """Wait on what is never written to: it is closed when the server has ended, killed or not."""
    os.read(0, 1)
    os._exit(0)


def _failure(error: TrilobeError) -> _Head:
    return _Head([], "request" if isinstance(error, DataError) else "step", error.problem, error.expected, error.hint)


def main(fd: int, path: str) -> None:
    """Run the step at ``path`` on whatever comes, until no more comes."""
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    line = _Timed(socket.socket(fileno=fd), None)
    try:
        step: Function = find(path)
    except TrilobeError as error:
        return _send(line, _failure(error))
    _send(line, _Head())
    with contextlib.suppress(ConnectionError):
        while True:
            arrays = _receive(line, step.inputs)
            try:
                made = step(arrays)
            except TrilobeError as error:
                _send(line, _failure(error))
            else:
                _send_arrays(line, made, step.outputs)
