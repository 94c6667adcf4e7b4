"""``infer``: a bundle on folders, tables and shards, without an endpoint and without knowing what is in the bundle.

The pipeline is the endpoint's own, and so are its numbers. How files become records, and records parts, stands in
:mod:`trilobe.infrastructure.records` and :mod:`trilobe.infrastructure.batch`; here the task says what a record's bytes
mean, and a format what a line looks like.
"""

import csv
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from trilobe import tasks
from trilobe.config import Config, ProjectSection
from trilobe.errors import BundleError, DataError, NotFoundError, TrilobeError, UsageError
from trilobe.infrastructure.batch import FAILED, Answer, results, writing
from trilobe.infrastructure.bundle import MANIFEST, open_bundle
from trilobe.infrastructure.pipeline import Arrays, Servable, stands_alone
from trilobe.infrastructure.records import Reading, Record, count, find, units
from trilobe.loop.project import Project, opened, positive, tell
from trilobe.types import Bundle

PART = 1000  # records of a part: what a crash can cost
REMARK = 60.0  # seconds between remarks on the pace, for those who see no bar


@dataclass(frozen=True)
class _Format:
    """How a part is written: the suffix of its file, what stands in its head, and the line of an answer."""

    suffix: str
    head: bytes
    line: Callable[[Record, Answer], bytes]


@dataclass(frozen=True)
class Inferred:
    """What came of the inputs: ``n`` of them, of which ``n_failed`` have no answer and ``n_kept`` had theirs already.

    ``seconds`` is what this call took, ``path`` the folder of the parts.
    """

    n: int
    n_failed: int
    n_kept: int
    seconds: float
    path: Path


def infer(
    bundle: "Bundle | Path | str" = "",
    source: Path | str = "",
    out: Path | str = "",
    project: "Project | Path | str" = ".",
    batch: int = 32,
    format: Literal["jsonl", "csv", "comprehend"] = "jsonl",
    column: str = "text",
    lines: bool = False,
    strict: bool = False,
) -> Inferred:
    """Run a bundle on files: a folder, a table or shards, with the numbers that its endpoint would give.

    Read are images or texts (one file each), tables with a column of texts (JSON lines, CSV, TSV), arrays (NPY, or NPZ
    with one array per input) and tar archives of images or texts. Each stretch of up to 1000 inputs becomes one file
    in the output folder, whole or absent: killed and called again, the run goes on and ends with the same bytes. What
    cannot be read is told in failed.jsonl and stops nothing.

    Args:
        bundle: a path, or an id (or its first letters) in the project; by default the one in HOLOSCAN_MODEL_PATH, or
            the project's newest.
        source: a file, or a folder with everything in it; HOLOSCAN_INPUT_PATH by default.
        out: the folder for the results; HOLOSCAN_OUTPUT_PATH by default.
        project: the project's folder, where the bundle is named by its id.
        batch: inputs computed together; it changes the speed, never a number.
        format: jsonl, csv, or comprehend (for entities, as Amazon Comprehend writes them).
        column: of a table, the one with the texts.
        lines: each line of a text file is one text.
        strict: stop at the first input that cannot be answered.

    Returns:
        How many inputs there were, failed, were answered before, and the seconds.

    Raises:
        DataError: nothing could be answered, or with ``strict`` one thing could not.
        StoreBusy: another process writes to the same folder.

    Example:
        trilobe infer bundles/pets-6bf09b3b4671 photos/ answers/
        trilobe infer 6bf09b tickets.csv answers/ --column message --format csv
    """
    positive(batch=batch)
    began = time.monotonic()
    chosen = _bundle(bundle, project)
    come, to = _path("source", source, "HOLOSCAN_INPUT_PATH"), _path("out", out, "HOLOSCAN_OUTPUT_PATH")
    task = _task(chosen)
    servable = task.servable(chosen)
    how = _reading(task, servable, column, lines)
    form = _FORMATS[format](servable)
    settings = {"layout": "infer.v1", "bundle": chosen.id, "source": str(come.resolve()), "format": format,
                "column": column, "lines": lines, "part": PART}  # fmt: skip
    rows = _rows(task, servable)
    servable.warm_up()
    together = batch if stands_alone(servable) else 1  # as the endpoint does
    pace = _Pace(sum(count(path, how) for path in find(come, how, to)))
    with writing(to, form.suffix, settings) as folder:
        for unit in units(find(come, how, to), come, how, PART):
            there = folder.has(unit)
            counted = pace.count(unit.records, there)
            if there:
                for _ in counted:
                    pass
                pace.n_failed += folder.n_failed()
                continue
            answers = results(servable, counted, rows, together)
            part, failed = _written(answers, form, strict)
            pace.n_failed += len(failed)
            folder.write(unit, b"".join([form.head, *part]), b"".join(failed))
        folder.finish()
    tell("inferring", pace.n, pace.n)
    if pace.n_failed == pace.n:
        raise DataError(
            f"none of {pace.n} inputs could be answered", expected="at least one", hint=f"see {to / FAILED}"
        )
    return Inferred(pace.n, pace.n_failed, pace.n_kept, time.monotonic() - began, to)


def _written(
    answers: Iterable[tuple[Record, Answer | TrilobeError]], form: _Format, strict: bool
) -> tuple[list[bytes], list[bytes]]:
    """The lines of a part, and of the log of what failed in it."""
    part, failed = [], []
    for record, answer in answers:
        if not isinstance(answer, TrilobeError):
            part.append(form.line(record, answer))
            continue
        if strict:
            raise DataError(f"{record.name}: {answer.problem}", expected=answer.expected, hint=answer.hint)
        failed.append(_json({**_said_of(record), "problem": answer.problem, "expected": answer.expected}))
    return part, failed


class _Pace:
    """Counts records, and says how fast they go and how long the rest will take."""

    def __init__(self, total: int) -> None:
        self.total, self.n, self.n_kept, self.n_failed = total, 0, 0, 0
        self._began = self._bar = self._remark = time.monotonic()

    def count(self, records: Iterable[Record], there: bool) -> Iterator[Record]:
        """The same records, counted as they go by."""
        for record in records:
            yield record
            self.n += 1
            self.n_kept += there
            now = time.monotonic()
            if now > self._bar + 0.1:
                self._bar = now
                tell("inferring", self.n, max(self.total, self.n + 1))
            if now > self._remark + REMARK:
                self._remark = now
                pace = (self.n - self.n_kept) / (now - self._began)
                left = f", {max(0, self.total - self.n) / pace:,.0f} s left" if pace and self.total else ""
                tell(f"{self.n:,} of about {max(self.total, self.n):,} inputs, {pace:,.1f} a second{left}")


# --- what comes in --------------------------------------------------------------------------------------------------


def _bundle(bundle: "Bundle | Path | str", project: "Project | Path | str") -> Bundle:
    """A bundle by its path, which needs no project, or by its id, which does.

    Where none is named, it is the only one in HOLOSCAN_MODEL_PATH, where that is set, or the project's newest.
    """
    if isinstance(bundle, Bundle):
        return open_bundle(bundle.path)
    if not bundle and (models := os.environ.get("HOLOSCAN_MODEL_PATH")):
        found = [path.parent for path in (*Path(models).glob(MANIFEST), *Path(models).glob(f"*/{MANIFEST}"))]
        if len(found) != 1:
            raise NotFoundError(f"{len(found)} bundles in {models}", expected="one, or its name in the call")
        bundle = found[0]
    if bundle and Path(bundle).is_dir():
        return open_bundle(Path(bundle))
    try:
        with opened(project) as p:
            return open_bundle(p.store.bundle(str(bundle) or None).path)
    except NotFoundError as e:
        raise NotFoundError(
            f"no bundle {str(bundle)!r}: {e.problem}" if bundle else f"no bundle was named, and {e.problem}",
            expected="the path of a bundle, or its id inside a project",
            hint="trilobe package",
        ) from e


def _path(name: str, given: Path | str, variable: str) -> Path:
    if given or os.environ.get(variable):
        return Path(given or os.environ[variable])
    raise UsageError(f"no {name} was named", expected=f"a path, or one in {variable}")


def _task(bundle: Bundle) -> tasks.Task:
    name = bundle.manifest.get("task")
    if name not in tasks.TASKS:
        raise BundleError(
            f"bundle {bundle.id} is for the task {name!r}", expected=f"one of {', '.join(tasks.TASKS)}",
            hint="update Trilobe",
        )  # fmt: skip
    return tasks.get(name)


def _reading(task: tasks.Task, servable: Servable, column: str, lines: bool) -> Reading:
    texts = ".txt" in task.suffixes
    if lines and not texts:
        raise UsageError("lines of text files, for a bundle that reads none", expected="files or archives of images")
    singles = frozenset([".txt"]) if texts else task.suffixes
    return Reading(singles, column if texts else "", lines, tuple(spec.name for spec in servable.inputs))


def _rows(task: tasks.Task, servable: Servable) -> Callable[[Record], Arrays]:
    """A record as one row of every input: arrays as they came, bytes as the task decodes them."""
    from trilobe.tasks.image_classification.data import fit_channels

    config, specs = Config(project=ProjectSection(name="infer")), servable.inputs

    def rows(record: Record) -> Arrays:
        if isinstance(record.value, Mapping):
            return record.value
        if len(specs) != 1 or isinstance(record.value, DataError):
            raise DataError("one file", expected=f".npz files with the inputs {', '.join(s.name for s in specs)}")
        item = task.decode(record.value, config)
        if specs[0].datatype == "BYTES":
            return {specs[0].name: np.array(task.to_bytes(item), dtype=object)}
        return {specs[0].name: fit_channels(item, specs[0].shape[-1])}

    return rows


# --- what goes out --------------------------------------------------------------------------------------------------


def _said_of(record: Record) -> dict[str, Any]:
    return {"name": record.name} | ({"id": record.id} if record.id is not None else {})


def _json(row: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(row) + b"\n"


def _plain(value: Any) -> Any:
    """A row of an output as JSON: numbers as the endpoint writes them, bytes that are JSON as what they say."""
    if not isinstance(value, bytes):
        return value.tolist()
    if value[:1] in (b"[", b"{"):
        with suppress(msgspec.MsgspecError):
            msgspec.json.decode(value)
            return msgspec.Raw(value)
    return value.decode("utf-8", "backslashreplace")


def _decided(answer: Answer, names: Sequence[str]) -> dict[str, Any]:
    """The most probable class and its probability, where the answer is about classes."""
    if not names:
        return {}
    proba = answer["proba"]
    return {"label": names[int(proba.argmax())], "confidence": float(proba.max())}


def _jsonl(servable: Servable) -> _Format:
    names = servable.labels.get("proba", ())

    def line(record: Record, answer: Answer) -> bytes:
        said = {name: _plain(value) for name, value in answer.items()}
        return _json({**_said_of(record), **_decided(answer, names), **said})

    return _Format(".jsonl", b"", line)


def _csv(servable: Servable) -> _Format:
    """A column for each number, named by its class where it has one."""
    names = servable.labels.get("proba", ())
    width = {spec.name: max(0, spec.shape[1]) if len(spec.shape) == 2 else 0 for spec in servable.outputs}
    head = ["name", "id", *(["label", "confidence"] if names else [])]
    for name, n in width.items():
        head += [f"{name}.{column}" for column in servable.labels.get(name, range(n))] if n else [name]

    def line(record: Record, answer: Answer) -> bytes:
        cells = [record.name, "" if record.id is None else record.id, *_decided(answer, names).values()]
        for name, n in width.items():
            value = _plain(answer[name])
            cells += value if n else [value if isinstance(value, str | int | float) else _json(value)[:-1].decode()]
        return _table_row(cells)

    return _Format(".csv", _table_row(head), line)


def _table_row(cells: Sequence[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _comprehend(servable: Servable) -> _Format:
    from trilobe.tasks.entity_recognition.comprehend import detected

    if "entities" not in {spec.name for spec in servable.outputs}:
        raise UsageError("format = 'comprehend' for a bundle that finds no entities", expected="jsonl or csv")

    def line(record: Record, answer: Answer) -> bytes:
        return _json(detected(msgspec.json.decode(answer["entities"]), record.file, record.line))

    return _Format(".jsonl", b"", line)


_FORMATS = {"jsonl": _jsonl, "csv": _csv, "comprehend": _comprehend}
