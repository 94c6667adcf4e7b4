"""Many inputs at once, without an endpoint: what a pipeline says of records, and the folder of parts it is written to.

A *part* is a file with what was said of one unit of records, named by a digest of them and of the settings. It is whole
or absent, so a run that was killed goes on by leaving out the parts that are there, and comes to the same bytes.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trilobe.errors import DataError, StorageError, TrilobeError, UsageError
from trilobe.files import write_atomically
from trilobe.infrastructure.pipeline import Arrays, Servable
from trilobe.infrastructure.records import Record, Unit
from trilobe.infrastructure.store.lock import run_lock

WINDOW = 64 * 1024 * 1024  # bytes of rows that are held at once, however many a batch may have
STATE = ".infer"  # in the output folder: the lock, the settings, and what failed in which part
FAILED = "failed.jsonl"
_PART = re.compile(r"part-\d{6}-[0-9a-f]{12}\.\w+(\.[0-9a-f]{8}\.part)?")

Answer = Mapping[str, Any]  # of one record, a row of each output: an array, a number, or bytes


def results(
    servable: Servable, records: Iterable[Record], rows: Callable[[Record], Arrays], batch: int
) -> Iterator[tuple[Record, Answer | TrilobeError]]:
    """What ``servable`` says of every record, in order: a row of each output, or what kept it from answering.

    Args:
        servable: gets rows that are alike in shape together, at most ``batch`` of them.
        records: any number; as many as a batch are held at a time, and about :data:`WINDOW` bytes of rows at most.
        rows: one row of every input, of a record with a value; may raise :class:`~trilobe.errors.DataError`.
        batch: at least 1.

    >>> from trilobe.infrastructure.pipeline import Pipeline, TensorSpec
    >>> x, y = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))
    >>> one = {"x": np.ones(1, np.float32)}
    >>> servable = Servable(Pipeline([("add", lambda data: {"y": data["x"] + 1})]), (x,), (y,), one)
    >>> records = [Record("a", b"2"), Record("b", DataError("it is empty"))]
    >>> rows = lambda record: {"x": np.float32(record.value)}
    >>> [answer for _, answer in results(servable, records, rows, batch=8)]
    [{'y': np.float32(3.0)}, DataError('it is empty')]
    """
    window: list[tuple[Record, Arrays | TrilobeError]] = []
    held = 0
    for record in records:
        row = _row(record, rows)
        window.append((record, row))
        held += sum(a.nbytes for a in row.values()) if not isinstance(row, TrilobeError) else 0
        held += len(record.value) if isinstance(record.value, bytes) else 0
        if len(window) == batch or held >= WINDOW:
            yield from _answered(servable, window)
            window, held = [], 0
    yield from _answered(servable, window)


def _row(record: Record, rows: Callable[[Record], Arrays]) -> Arrays | TrilobeError:
    if isinstance(record.value, DataError):
        return record.value
    try:
        return rows(record)
    except DataError as e:
        return e


def _answered(
    servable: Servable, window: Sequence[tuple[Record, Arrays | TrilobeError]]
) -> Iterator[tuple[Record, Answer | TrilobeError]]:
    alike: dict[Any, list[tuple[int, Arrays]]] = {}
    said: list[Answer | TrilobeError] = [row for _, row in window]
    for i, (_, row) in enumerate(window):
        if not isinstance(row, TrilobeError):
            alike.setdefault(tuple((name, a.shape, a.dtype) for name, a in row.items()), []).append((i, row))
    for group in alike.values():
        for (i, _), answer in zip(group, _run(servable, [row for _, row in group]), strict=True):
            said[i] = answer
    return zip([record for record, _ in window], said, strict=True)


def _run(servable: Servable, rows: Sequence[Arrays]) -> list[Answer | TrilobeError]:
    """Rows that are alike, computed together; where that fails, one by one, so that one does not spoil the others."""
    try:
        inputs = {spec.name: np.stack([row[spec.name] for row in rows]) for spec in servable.inputs}
        for spec in servable.inputs:
            spec.check(inputs[spec.name])
        outputs = servable.run(inputs)
    except TrilobeError as e:
        return [e] if len(rows) == 1 else [_run(servable, [row])[0] for row in rows]
    return [{name: array[i] for name, array in outputs.items()} for i in range(len(rows))]


@dataclass
class Folder:
    """A folder of parts in the making; see :func:`writing`."""

    path: Path
    suffix: str
    settings: str  # a digest of them
    made: list[str] = field(default_factory=list)

    def has(self, unit: Unit) -> bool:
        """Whether the part of ``unit``, the next one, is there already; if so, it counts as made."""
        name = self._name(unit)
        if there := (self.path / name).is_file():
            self.made.append(name)
        return there

    def write(self, unit: Unit, part: bytes, failed: bytes) -> None:
        """Write the next part and, before it, what failed in it: where a part is, all that belongs to it is."""
        name = self._name(unit)
        if failed:
            write_atomically(self._failed(name), failed)
        write_atomically(self.path / name, part)
        self.made.append(name)

    def n_failed(self) -> int:
        """How many records failed in the part made last."""
        path = self._failed(self.made[-1])
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def finish(self) -> None:
        """Gather what failed in ``failed.jsonl``, and remove parts of inputs that are no longer there."""
        logs = [path for path in map(self._failed, self.made) if path.is_file()]
        keep = {*self.made, *(path.name for path in logs)}
        for folder in (self.path, self.path / STATE):
            for old in [p for p in folder.iterdir() if _PART.fullmatch(p.name) and p.name not in keep]:
                old.unlink(missing_ok=True)
        if logs:
            write_atomically(self.path / FAILED, b"".join(path.read_bytes() for path in logs))
        else:
            (self.path / FAILED).unlink(missing_ok=True)

    def _name(self, unit: Unit) -> str:
        key = hashlib.sha256(f"{self.settings}/{unit.key}".encode()).hexdigest()
        return f"part-{len(self.made):06}-{key[:12]}{self.suffix}"

    def _failed(self, name: str) -> Path:
        return self.path / STATE / (name.removesuffix(self.suffix) + ".failed")


@contextmanager
def writing(path: Path, suffix: str, settings: Mapping[str, Any]) -> Iterator[Folder]:
    """The folder of parts at ``path``, made where it is not there, for this process alone.

    Raises :class:`~trilobe.errors.UsageError` where it holds results made with other ``settings`` (plain values),
    :class:`~trilobe.errors.StoreBusy` where another process writes to it, :class:`~trilobe.errors.StorageError` where
    one cannot.

    >>> import tempfile
    >>> unit = Unit("a" * 64, iter([]))
    >>> with tempfile.TemporaryDirectory() as out, writing(Path(out), ".jsonl", {"bundle": "b1"}) as folder:
    ...     before = folder.has(unit)
    ...     folder.write(unit, b"{}\\n", b"")
    ...     folder.finish()
    ...     before, folder.made
    (False, ['part-000000-...jsonl'])
    """
    try:
        (path / STATE).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"{path} cannot be made: {e.strerror}", expected="a folder one may write to") from e
    with run_lock(path / STATE, "trilobe infer"):
        kept, now = path / STATE / "settings.json", json.dumps(settings, indent=1, sort_keys=True).encode()
        before = kept.read_bytes() if kept.is_file() else now
        if before != now:
            raise UsageError(
                f"{path} holds results of another run: {_difference(before, settings)}",
                expected="an empty folder, or the same call again",
                hint="name another folder, or remove this one",
            )
        write_atomically(kept, now)
        yield Folder(path, suffix, hashlib.sha256(now).hexdigest())


def _difference(before: bytes, settings: Mapping[str, Any]) -> str:
    try:
        old = json.loads(before)
        return ", ".join(f"{k} = {old.get(k)!r}, not {v!r}" for k, v in settings.items() if old.get(k) != v)
    except (ValueError, AttributeError):
        return f"{STATE}/settings.json is damaged"
