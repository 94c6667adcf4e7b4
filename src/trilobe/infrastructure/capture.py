"""Captures: what an endpoint was asked and what it said, sampled into append-only segments.

A segment is ``<folder>/<endpoint>/<nanoseconds>-<pid>.captures-v1``; each process writes its own, so none locks. A
record is the length of its body (4 bytes, little-endian), the CRC-32 of its body (4 bytes) and the body, a msgpack
map; what only some records have is left out of the others. Writing is a side job: it may lose records when the disk is
full, never a request. Reading skips whatever a killed process or a failing disk left behind.
"""

import heapq
import logging
import os
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from struct import Struct
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from trilobe.errors import UsageError
from trilobe.types import Capture, FloatArray

SUFFIX = ".captures-v1"
SEGMENT_BYTES = 64 * 1024 * 1024
SYNC_SECONDS = 1.0
_HEAD = Struct("<II")
logger = logging.getLogger(__name__)


class _Record(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    at: float
    bundle_id: str
    dtype: str
    shape: tuple[int, ...]
    input: bytes
    proba: bytes
    model: str = ""
    live: str = ""
    live_proba: bytes = b""


# Every body begins like this (a map of seven to ten, whose first key is "id"): where to pick up after a damaged record.
_MARK = re.compile(rb"[\x87-\x8a]\xa2id")


class CaptureLog:
    """Samples the items of requests into segments; one thread at a time may use it.

    ``rate`` is the chance of each item to be kept, 0 to 1; ``seed`` makes the choice repeatable. ``dropped`` counts
    the records that could not be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = CaptureLog(Path(folder), "digits", rate=1.0)
    ...     log.append("b1", np.zeros((2, 8, 8, 1), np.uint8), [[0.1, 0.9], [0.8, 0.2]])
    ...     log.close()
    ...     [capture.prediction for capture in read_captures(Path(folder))]
    2
    [1, 0]
    """

    def __init__(
        self, folder: Path, endpoint: str, rate: float, seed: int | None = None, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        if not 0.0 <= rate <= 1.0:
            raise UsageError(f"the share of captured traffic is {rate}", expected="a number from 0 to 1")
        if endpoint in ("", ".", "..") or set(endpoint) & set("/\\\0"):
            raise UsageError(f"an endpoint named {endpoint!r}", expected="a plain name without slashes")
        self.folder, self.rate, self.segment_bytes = folder / endpoint, rate, segment_bytes
        self.dropped = 0
        self._rng = np.random.default_rng(seed)
        self._file: int | None = None
        self._size = 0
        self._synced_at = 0.0
        self._reported = False

    def append(
        self,
        bundle_id: str,
        inputs: NDArray[Any],
        proba: ArrayLike,
        model: str = "",
        live: str = "",
        live_proba: ArrayLike | None = None,
    ) -> int:
        """Keep each of the n items of ``inputs`` ``(n, ...)`` and ``proba`` ``(n, n_classes)`` with chance ``rate``.

        Items are arrays of numbers, or bytes (an object array), which are kept as arrays of unsigned bytes. The rest is
        as in :class:`~trilobe.types.Capture`; ``live_proba`` is ``(n, any number of classes)``.

        Returns how many were written. Never raises for the disk's sake: what cannot be written is counted in
        ``dropped`` and reported once on the log. Arrays that do not match, or that are not numbers, raise
        :class:`~trilobe.errors.UsageError`.
        """
        replies = np.asarray(proba, dtype="<f4")
        beside = None if live_proba is None else np.asarray(live_proba, dtype="<f4")
        shapes = [array.shape for array in (replies, beside) if array is not None]
        if inputs.ndim < 1 or any(len(s) != 2 or s[0] != len(inputs) for s in shapes) or not _kept(inputs):
            raise UsageError(
                f"captures of inputs {inputs.shape} {inputs.dtype} and replies {', '.join(map(str, shapes))}",
                expected="numbers (n, ...), or bytes (n,), and (n, n_classes)",
            )
        written = 0
        for i in np.flatnonzero(self._rng.random(len(inputs)) < self.rate):
            data = record(token_hex(8), time.time(), bundle_id, inputs, replies, int(i), model, live, beside)
            written += self._write(data)
        return written

    def close(self) -> None:
        """Make everything written so far durable and let go of the segment; a later ``append`` starts a new one."""
        if self._file is not None:
            try:
                os.fsync(self._file)
            except OSError as error:
                self._report(error)
            finally:
                os.close(self._file)
                self._file = None

    def _write(self, data: bytes) -> bool:
        try:
            file = self._segment(len(data))
            done = os.write(file, data)
            if done < len(data):
                raise OSError(f"only {done} of {len(data)} bytes were written")
            if time.monotonic() - self._synced_at >= SYNC_SECONDS:
                os.fsync(file)
                self._synced_at = time.monotonic()
            self._size += done
        except OSError as error:
            self.dropped += 1
            self._report(error)
            self._undo()
            return False
        return True

    def _segment(self, n_bytes: int) -> int:
        """The open segment, or a new one where ``n_bytes`` more would make it too large."""
        if self._size + n_bytes > self.segment_bytes:
            self.close()
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{time.time_ns():020d}-{os.getpid():010d}{SUFFIX}"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            self._size = 0
        return self._file

    def _undo(self) -> None:
        """Cut a half-written record away; where even that fails, readers skip it and we go on elsewhere."""
        if self._file is not None:
            try:
                os.ftruncate(self._file, self._size)
            except OSError:
                os.close(self._file)
                self._file = None

    def _report(self, error: OSError) -> None:
        if not self._reported:
            self._reported = True
            logger.warning(
                "captures cannot be written to %s (%s); requests are answered all the same", self.folder, error
            )


def record(
    id_: str,
    at: float,
    bundle_id: str,
    inputs: NDArray[Any],
    replies: FloatArray,
    i: int,
    model: str = "",
    live: str = "",
    live_replies: FloatArray | None = None,
) -> bytes:
    """Item ``i`` of a request and its reply, as it stands in a segment (or in a file of its own).

    Bytes are kept as arrays of unsigned bytes. :func:`read_record` is the inverse.

    >>> data = record("c1", 1.5, "b1", np.array([b"hi"], object), np.array([[0.25, 0.75]], "<f4"), 0)
    >>> capture = read_record(data, "digits")
    >>> capture.input.tobytes(), capture.confidence, read_record(data[:-1], "digits")
    (b'hi', 0.75, None)
    """
    if inputs.dtype.kind == "O":
        item = np.frombuffer(inputs[i], np.uint8)
    else:
        item = inputs[i, ...]  # an array even where items are single numbers: those would lose their byte order
    said, beside = (b"" if r is None else r[i].astype("<f4").tobytes() for r in (replies, live_replies))
    body = msgspec.msgpack.encode(
        _Record(id_, at, bundle_id, item.dtype.str, item.shape, item.tobytes(), said, model, live, beside)
    )
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


def read_record(data: bytes, endpoint: str) -> Capture | None:
    """The capture that :func:`record` wrote, or None where ``data`` is torn or damaged.

    >>> read_record(b"", "digits") is None
    True
    """
    if len(data) < _HEAD.size:
        return None
    size, crc = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    return _capture(endpoint, body) if len(body) == size and zlib.crc32(body) == crc else None


def read_captures(
    folder: Path,
    endpoint: str | None = None,
    since: float = 0.0,
    bundle_id: str | None = None,
    last: int | None = None,
    model: str | None = None,
) -> list[Capture]:
    """The captures under ``folder``, oldest first; of one ``endpoint``, of one bundle, from ``since`` (seconds) on.

    ``model`` keeps what was asked under that name ("": the endpoint's own).

    ``last`` keeps only that many of the newest. Safe while servers write; torn and damaged records are skipped. A
    folder that does not exist holds no captures.

    >>> read_captures(Path("nowhere"))
    []
    """
    found = (
        capture
        for path in sorted(folder.glob(f"*/*{SUFFIX}"))
        if endpoint is None or path.parent.name == endpoint
        for capture in _read_segment(path)
        if capture.at >= since
        and (bundle_id is None or capture.bundle_id == bundle_id)
        and (model is None or capture.model == model)
    )
    if last is None:
        return sorted(found, key=_age)
    return heapq.nlargest(last, found, key=_age)[::-1]


def _kept(inputs: NDArray[Any]) -> bool:
    """Whether items are numbers, or bytes."""
    return inputs.dtype.kind in "biuf" or (inputs.ndim == 1 and all(isinstance(item, bytes) for item in inputs))


def _age(capture: Capture) -> tuple[float, str]:
    return capture.at, capture.id


def _read_segment(path: Path) -> Iterator[Capture]:
    data = path.read_bytes()
    at = 0
    while found := _MARK.search(data, at + _HEAD.size):
        body = found.start()
        size, crc = _HEAD.unpack_from(data, body - _HEAD.size)
        at = body + size
        if at > len(data) or zlib.crc32(data[body:at]) != crc:
            at = body + 1 - _HEAD.size  # not a whole record: look for the next mark
        elif capture := _capture(path.parent.name, data[body:at]):
            yield capture


def _capture(endpoint: str, body: bytes) -> Capture | None:
    """The capture in ``body``, or None where its checksum is right and its content is not."""
    try:
        r = msgspec.msgpack.decode(body, type=_Record)
        item = np.frombuffer(r.input, np.dtype(r.dtype)).reshape(r.shape)
        beside = np.frombuffer(r.live_proba, "<f4") if r.live_proba else None
        return Capture(r.id, endpoint, r.bundle_id, r.at, item, np.frombuffer(r.proba, "<f4"), r.model, r.live, beside)
    except (msgspec.MsgspecError, ValueError, TypeError):
        return None
