"""The desk: where what a model would not answer alone waits for people, and where their answers lie for clients.

Two folders beside the endpoint's state. ``waiting/ID`` is an item with what the model made of it (one record, as in a
segment of captures): written by the server before the client hears the ID, read when questions are made. It goes when
all is done. ``answers/ID.json`` is what the client gets: written once, never changed. A file is whole or absent, any
number of processes may look, and nothing here is locked.

What waits is no capture: captures are a fair sample of the traffic, which monitoring relies on, and these are not.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from trilobe.errors import StorageError
from trilobe.files import sync_folder, write_atomically
from trilobe.infrastructure.capture import read_record, record
from trilobe.types import Capture, FloatArray

SYNC_SECONDS = 1.0
_ID = re.compile(r"[0-9a-f]{32}")
logger = logging.getLogger(__name__)


class Desk:
    """The desk of the endpoint whose state is in ``folder``; one thread at a time may :meth:`keep`.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> desk = Desk(Path(folder.name))
    >>> [id_] = desk.keep("b1", np.array([b"hi", b"oh"], object), np.array([[0.5, 0.5], [1, 0]]), [0])
    >>> desk.waiting() == [id_], desk.item(id_).confidence, desk.look(id_)
    (True, 0.5, b'')
    >>> answer = desk.give(id_, {"answer": "cat"})
    >>> desk.done(id_)
    >>> desk.waiting(), desk.look(id_) == answer, desk.look("../desired")
    ([], True, None)
    >>> folder.cleanup()
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._waiting, self._answers = folder, folder / "waiting", folder / "answers"
        self._synced_at = -SYNC_SECONDS
        self._reported = False

    def keep(self, bundle_id: str, inputs: NDArray[Any], replies: FloatArray, rows: Sequence[int]) -> list[str]:
        """Put those ``rows`` of a request ``(n, ...)`` and of its replies ``(n, n_classes)`` here: the id of each.

        Ids are 32 hexadecimal digits: the time, by which they sort, and 64 random bits, which nobody guesses. What
        cannot be written gets none (""), and the first time that is said in the log.
        """
        ids = []
        for row in rows:
            at = time.time_ns()
            id_ = f"{at:016x}{token_hex(8)}"
            try:
                self._put(id_, record(id_, at / 1e9, bundle_id, inputs, replies, row))
            except OSError as error:
                if not self._reported:
                    self._reported = True
                    logger.warning("what is left to people cannot be written to %s (%s)", self._waiting, error)
                id_ = ""
            ids.append(id_)
        return ids

    def _put(self, id_: str, data: bytes) -> None:
        """Outlives the end of this process, however it ends. A power cut too, unless very much is put here at once."""
        part = self._waiting / f"{id_}.part"
        self._waiting.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                if sync := time.monotonic() - self._synced_at >= SYNC_SECONDS:
                    os.fsync(file.fileno())
            part.rename(self._waiting / id_)
            if sync:
                sync_folder(self._waiting)
                self._synced_at = time.monotonic()
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def waiting(self) -> list[str]:
        """The ids of what is not done, oldest first."""
        try:
            return sorted(path.name for path in self._waiting.iterdir() if _ID.fullmatch(path.name))
        except FileNotFoundError:
            return []

    def item(self, id_: str) -> Capture | None:
        """What waits under that id; None where it is gone, or damaged."""
        try:
            return read_record((self._waiting / id_).read_bytes(), self.folder.name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{self._waiting / id_} cannot be read: {error.strerror}") from error

    def look(self, id_: str) -> bytes | None:
        """The answer (JSON), b"" while there is none, or None for an id that was never given out.

        Any string may be asked about: only one that is an id ever becomes the name of a file.
        """
        if not _ID.fullmatch(id_):
            return None
        path = self._answers / f"{id_}.json"
        for _ in range(2):  # what is answered between the two looks is found by the second round
            with contextlib.suppress(FileNotFoundError):
                return path.read_bytes()
            if (self._waiting / id_).exists():
                return b""
        return None

    def give(self, id_: str, answer: Mapping[str, Any]) -> bytes:
        """Write the answer down for whoever fetches it, durably; the bytes of its JSON.

        Raises :class:`~trilobe.errors.StorageError` where that cannot be.
        """
        data = msgspec.json.encode(answer)
        write_atomically(self._answers / f"{id_}.json", data)
        return data

    def done(self, id_: str) -> None:
        """Nothing more is to be done about that id; its answer stays."""
        (self._waiting / id_).unlink(missing_ok=True)


def doubted(replies: NDArray[Any], threshold: float) -> list[int]:
    """Which rows ``(n, n_classes)`` of probabilities have none of at least ``threshold``.

    >>> doubted(np.array([[0.5, 0.5], [0.1, 0.9]], np.float32), 0.6)
    [0]
    """
    return np.flatnonzero(replies.max(axis=1) < threshold).tolist()


def parameters(n: int, rows: Sequence[int], ids: Sequence[str]) -> dict[str, Any]:
    """What an answer of ``n`` rows says about those left to people, in the kinds of value that the protocol allows.

    ``deferred`` is a boolean for one row, and a list in JSON for several; ``deferred_ids`` are the ids of all rows,
    separated by commas, nothing for those that are answered.

    >>> parameters(1, [0], ["a1"]), parameters(1, [], [])
    ({'deferred': True, 'deferred_ids': 'a1'}, {'deferred': False})
    >>> parameters(3, [2], ["a1"])
    {'deferred': '[false,false,true]', 'deferred_ids': ',,a1'}
    """
    all_ids = dict(zip(rows, ids, strict=True))
    flags = [row in all_ids for row in range(n)]
    said: dict[str, Any] = {"deferred": flags[0] if n == 1 else msgspec.json.encode(flags).decode()}
    return {**said, "deferred_ids": ",".join(all_ids.get(row, "") for row in range(n))} if any(ids) else said
