"""The desk: where what a model would not answer alone waits for people, and where their answers lie for clients.

Two folders beside the endpoint's state. ``waiting/ID`` is an item with what the model made of it (one record, as in a
segment of captures): written by the server before the client hears the ID, read when questions are made. It goes when
all is done. ``answers/ID.json`` is what the client gets: written once, never changed. A file is whole or absent, any
number of processes may look, and nothing here is locked. How many items may wait is bounded: beyond that none is put
here any more, while whatever was promised to somebody stays.

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
LIMIT = 10_000  # items that may wait
LOOK_SECONDS = 1.0  # how old a count of what waits may be
_ID = re.compile(r"[0-9a-f]{32}")
logger = logging.getLogger(__name__)


class Desk:
    """The desk of the endpoint whose state is in ``folder``; one thread at a time may :meth:`keep`.

    At most ``limit`` items wait on it. Several processes may each put one more there at the same moment.

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

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self._waiting, self._answers = folder, folder / "waiting", folder / "answers"
        self.limit = limit
        self._synced_at = self._counted_at = -max(SYNC_SECONDS, LOOK_SECONDS)
        self._room = 0
        self._reported = self._full = False

    def keep(
        self, bundle_id: str, inputs: NDArray[Any], replies: FloatArray, rows: Sequence[int], model: str = ""
    ) -> list[str | None]:
        """Put those ``rows`` of a request ``(n, ...)`` and of its replies ``(n, n_classes)`` here: the id of each.

        ``model`` is the name that was called, where it is not the endpoint's own. Ids are 32 hexadecimal digits: the
        time, by which they sort, and 64 random bits, which nobody guesses. What cannot be written gets none (""); that
        is said in the log, the first time. Neither does that for which there is no room (None), which is said whenever
        the desk becomes full.
        """
        ids: list[str | None] = []
        for row in rows:
            if not self._take_room():
                ids.append(None)
                continue
            at = time.time_ns()
            id_ = f"{at:016x}{token_hex(8)}"
            try:
                self._put(id_, record(id_, at / 1e9, bundle_id, inputs, replies, row, model))
            except OSError as error:
                if not self._reported:
                    self._reported = True
                    logger.warning("what is left to people cannot be written to %s (%s)", self._waiting, error)
                id_ = ""
            ids.append(id_)
        return ids

    def _take_room(self) -> bool:
        """Whether one more may wait. Looks into the folder when what it knows is used up or, while full, a second old.

        A process uses up an eighth of the room before it looks again: others fill the same folder.
        """
        if self._room <= 0 and not (self._full and time.monotonic() - self._counted_at < LOOK_SECONDS):
            waiting = self._count()
            self._counted_at = time.monotonic()
            self._room = -(-(self.limit - waiting) // 8)
            if self._room <= 0 and not self._full:
                self._full = True
                logger.warning(
                    "%d items wait for people at %s: what is in doubt is answered without them until some are answered"
                    " (trilobe query, trilobe deliver; serve.max_waiting is %d)",
                    waiting, self.folder.name, self.limit,
                )  # fmt: skip
            elif waiting <= 0.9 * self.limit:  # not at the first that goes: one comes and goes is no news
                self._full = False
        self._room -= 1
        return self._room >= 0

    def _count(self) -> int:
        try:
            with os.scandir(self._waiting) as entries:
                return sum(_ID.fullmatch(entry.name) is not None for entry in entries)
        except OSError:  # not there yet; or not readable, which whoever writes will hear
            return 0

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


def parameters(n: int, rows: Sequence[int], ids: Sequence[str | None]) -> dict[str, Any]:
    """What an answer of ``n`` rows says about those left to people, in the kinds of value that the protocol allows.

    ``deferred`` is a boolean for one row, and a list in JSON for several; ``deferred_ids`` are the ids of all rows,
    separated by commas, nothing for those that are answered. Of what is in doubt and has no room on the desk (the id
    None) nothing is said: it is null in the list.

    >>> parameters(1, [0], ["a1"]), parameters(1, [], []), parameters(1, [0], [None])
    ({'deferred': True, 'deferred_ids': 'a1'}, {'deferred': False}, {})
    >>> parameters(3, [1, 2], [None, "a1"])
    {'deferred': '[false,null,true]', 'deferred_ids': ',,a1'}
    """
    all_ids = dict(zip(rows, ids, strict=True))
    flags = [None if all_ids.get(row, "") is None else row in all_ids for row in range(n)]
    if n == 1:
        said: dict[str, Any] = {} if flags[0] is None else {"deferred": flags[0]}
    else:
        said = {"deferred": msgspec.json.encode(flags).decode()}
    return {**said, "deferred_ids": ",".join(all_ids.get(row) or "" for row in range(n))} if any(ids) else said
