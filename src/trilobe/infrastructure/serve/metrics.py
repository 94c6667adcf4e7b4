"""Metrics: what a server counts about itself, shared by its worker processes, told in Prometheus's text format.

Counting happens on the path of every request, so it is a few additions to numbers in mapped memory and nothing else.
Each process has a file of its own, ``<worker>.meters-v1``, in a folder that all workers of a server know: a scrape of
any of them adds up all files, and ``kill -9`` loses nothing that was counted. A process locks its file while it lives;
one that starts takes up the file that its predecessor left and counts on, so counters never go backwards. Gauges of
processes that are gone count no more.

The names and labels that begin with ``nv_`` are Triton's (its user guide, "Metrics"), and mean the same here; those
that begin with ``trilobe_`` are what it lacks: histograms, and each step of a pipeline, with waiting and computing
apart.
"""

import errno
import fcntl
import logging
import mmap
import os
import threading
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from pathlib import Path
from struct import Struct
from typing import Any, Literal

import msgspec

from trilobe.errors import UsageError

SUFFIX = ".meters-v1"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
BOUNDS = tuple(k * 10**e for e in range(4, 11) for k in (1, 2, 5))  # nanoseconds, 10 µs to 50 s: upper ends of buckets
SIZES = tuple(2**k for k in range(11))  # rows of a batch: upper ends of buckets
logger = logging.getLogger(__name__)
_Key = tuple[str, ...]
_Slots = memoryview  # of signed integers of 64 bits; an aligned one is never seen half-written

# The numbers kept for a model, in their order. Those in nanoseconds are sums over requests.
_SUCCESS, _ROWS, _REQUEST_NS, _QUEUE_NS, _INPUT_NS, _INFER_NS, _OUTPUT_NS, _FAILED_NS, _LAST, _PENDING = range(10)
_FAILED = {reason: 10 + i for i, reason in enumerate(REASONS)}
_BUCKETS = len(BOUNDS) + 1
_REQUEST, _QUEUE, _COMPUTE = (14 + i * _BUCKETS for i in range(3))  # where histograms begin
_BATCH = 14 + 3 * _BUCKETS  # then, by the size of a batch: how many ran, and their nanoseconds
_EXACT, _LARGEST = 128, 24  # sizes are told apart up to 128; from there on they are rounded up to powers of two
_STEP_QUEUE, _STEP_QUEUE_NS, _STEP_COMPUTE, _STEP_COMPUTE_NS = 0, _BUCKETS, _BUCKETS + 1, 2 * _BUCKETS + 1
_GAUGES = {"model": _PENDING, "gauge": 0}  # which of the numbers say how it stands, rather than how often
_LENGTHS = {"model": _BATCH + 2 * (_EXACT + 1 + _LARGEST - 7), "step": 2 * _BUCKETS + 2, "counter": 1, "gauge": 1}


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, its labels and what it says."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


_MODEL = ("model", "version")
_STEP = ("model", "version", "step")
_MADE = (
    Family("nv_inference_request_success", "counter", _MODEL, "Requests answered"),
    Family("nv_inference_request_failure", "counter", (*_MODEL, "reason"), "Requests not answered, by reason"),
    Family("nv_inference_count", "counter", _MODEL, "Rows computed: a request of n rows counts n"),
    Family("nv_inference_exec_count", "counter", _MODEL, "Batches computed"),
    Family("nv_inference_pending_request_count", "gauge", _MODEL, "Requests that wait to be computed"),
    Family(
        "nv_inference_request_duration_us", "counter", _MODEL, "Time from a request's arrival to its answer, summed"
    ),
    Family("nv_inference_queue_duration_us", "counter", _MODEL, "Time that requests waited, summed"),
    Family("nv_inference_compute_input_duration_us", "counter", _MODEL, "Time to parse requests, summed"),
    Family("nv_inference_compute_infer_duration_us", "counter", _MODEL, "Time to compute each request's batch, summed"),
    Family("nv_inference_compute_output_duration_us", "counter", _MODEL, "Time to encode answers, summed"),
    Family("nv_cpu_utilization", "gauge", (), "Share of the machine's CPU time in use since the last scrape, 0 to 1"),
    Family("nv_cpu_memory_total_bytes", "gauge", (), "Memory of the machine"),
    Family("nv_cpu_memory_used_bytes", "gauge", (), "Memory of the machine that is not available"),
    Family("trilobe_request_duration_seconds", "histogram", _MODEL, "From a request's arrival to its answer"),
    Family("trilobe_queue_duration_seconds", "histogram", _MODEL, "How long each request waited to be computed"),
    Family("trilobe_compute_duration_seconds", "histogram", _MODEL, "How long each batch was computed"),
    Family("trilobe_batch_size", "histogram", _MODEL, "Rows of each batch"),
    Family("trilobe_step_queue_duration_seconds", "histogram", _STEP, "How long each request waited for a step"),
    Family("trilobe_step_compute_duration_seconds", "histogram", _STEP, "How long each run of a step took"),
    Family("trilobe_workers", "gauge", (), "Worker processes that live"),
    Family("trilobe_worker_resident_bytes", "gauge", ("worker",), "Memory of a worker process"),
)
_NAMED = (  # for Meters.count and Meters.gauge; all others are made of a model's numbers, or asked of the machine
    Family("trilobe_deferred_total", "counter", ("model",), "Answers left to a person"),
    Family("trilobe_deferral_refused_total", "counter", ("model",), "Answers in doubt that too many already wait for"),
    Family("trilobe_shadow_total", "counter", (*_MODEL, "agrees"), "Answers compared with those of the shadow version"),
    Family(
        "trilobe_step_replaced_total", "counter", ("model", "step", "reason"), "Processes of a step that were replaced"
    ),
    Family("trilobe_captures_dropped_total", "counter", (), "Captures that could not be written"),
    Family("trilobe_http_responses_total", "counter", ("code",), "HTTP responses by status"),
    Family("trilobe_grpc_responses_total", "counter", ("code",), "gRPC answers by status"),
    Family("trilobe_token_pending", "gauge", ("client", "token"), "Requests under way by a token that has max_pending"),
    Family("trilobe_connections", "gauge", (), "Open connections"),
    Family("trilobe_ready", "gauge", (), "Worker processes in which everything that should answer can"),
    Family("trilobe_worker_starts_total", "counter", ("worker",), "How often a worker process was started"),
)
FAMILIES = (*_MADE, *_NAMED)
_LABELS = {family.name: family.labels for family in _NAMED}


class Meter:
    """The figures of one version of one model. Any thread may count; times are nanoseconds.

    >>> meters = Meters()
    >>> meter = meters.of("digits", "1")
    >>> meter.batch([120_000, 80_000], rows=5, infer_ns=400_000)
    >>> meter.failed("REJECTED")
    >>> [line for line in meters.render().splitlines() if line.startswith("nv_inference_queue")]
    ['nv_inference_queue_duration_us{model="digits",version="1"} 200']
    """

    __slots__ = ("_lock", "_open", "_parts", "_slots")

    def __init__(self, slots: _Slots, lock: threading.Lock, open_step: Callable[[str], _Slots]) -> None:
        self._slots, self._lock, self._open = slots, lock, open_step
        self._parts: dict[str, Part] = {}

    def batch(self, queue_ns: Sequence[int], rows: int, infer_ns: int) -> None:
        """One batch was computed, in ``infer_ns``: how long each of its requests had waited, how many rows they had."""
        slots, n = self._slots, len(queue_ns)
        at = _BATCH + 2 * (rows if 0 <= rows <= _EXACT else _size_index(rows))
        with self._lock:
            slots[_SUCCESS] += n
            slots[_ROWS] += rows
            slots[_INFER_NS] += n * infer_ns
            slots[_COMPUTE + bisect_left(BOUNDS, infer_ns)] += 1
            slots[at] += 1
            slots[at + 1] += infer_ns
            slots[_QUEUE_NS] += sum(queue_ns)
            for ns in queue_ns:
                slots[_QUEUE + bisect_left(BOUNDS, ns)] += 1
            slots[_LAST] = time.time_ns()

    def answered(self, total_ns: Sequence[int], input_ns: int, output_ns: int) -> None:
        """Requests were answered, each so long after it arrived; ``input_ns`` went into parsing all of them,
        ``output_ns`` into encoding all their answers."""
        slots = self._slots
        with self._lock:
            for ns in total_ns:
                slots[_REQUEST + bisect_left(BOUNDS, ns)] += 1
            slots[_REQUEST_NS] += sum(total_ns)
            slots[_INPUT_NS] += input_ns
            slots[_OUTPUT_NS] += output_ns

    def failed(self, reason: str, n: int = 1, total_ns: int = 0) -> None:
        """``n`` requests were not answered, ``total_ns`` in all after they arrived; for one of :data:`REASONS`."""
        if reason not in _FAILED:
            raise UsageError(f"a failure with the reason {reason!r}", expected=f"one of {', '.join(REASONS)}")
        with self._lock:
            self._slots[_FAILED[reason]] += n
            self._slots[_FAILED_NS] += total_ns

    def pending(self, delta: int) -> None:
        """So many more requests wait than before (fewer: a negative number)."""
        with self._lock:
            self._slots[_PENDING] += delta

    def step(self, name: str, queue_ns: int, compute_ns: int, calls: int = 1) -> None:
        """One run of a step took ``compute_ns``, for ``calls`` requests of which each had waited ``queue_ns``."""
        self.part(name).batch((queue_ns,) * calls, calls, compute_ns)

    def part(self, step: str) -> "Part":
        """The same three methods for the queue of one step: its times are the step's, its failures the model's.

        >>> meter = Meters().of("digits", "1")
        >>> decode = meter.part("decode")
        >>> decode.batch([50_000], 1, 2_000_000)
        """
        part = self._parts.get(step)
        if part is None:
            part = self._parts.setdefault(step, Part(self, self._open(step), self._lock))
        return part


class Part:
    """What the queue of one step counts; see :meth:`Meter.part`."""

    __slots__ = ("_lock", "_slots", "failed", "pending")

    def __init__(self, meter: Meter, slots: _Slots, lock: threading.Lock) -> None:
        self._slots, self._lock = slots, lock
        self.failed, self.pending = meter.failed, meter.pending

    def batch(self, queue_ns: Sequence[int], rows: int, infer_ns: int) -> None:
        """One run of the step; see :meth:`Meter.batch`."""
        slots = self._slots
        with self._lock:
            slots[_STEP_COMPUTE + bisect_left(BOUNDS, infer_ns)] += 1
            slots[_STEP_COMPUTE_NS] += infer_ns
            slots[_STEP_QUEUE_NS] += sum(queue_ns)
            for ns in queue_ns:
                slots[_STEP_QUEUE + bisect_left(BOUNDS, ns)] += 1


class Tally:
    """A number that all processes of a server add up, as things stand: each has its part, which ends when it does.

    One thread of each process adds. A neighbor that begins, or dies, is seen within a second.

    >>> tally = Meters().tally("trilobe_token_pending", client="web", token="a1")
    >>> tally.add(3)
    >>> tally.add(-1)
    >>> tally.total()
    2
    """

    __slots__ = ("_around", "_key", "_ledger", "_own", "_theirs")

    def __init__(self, ledger: "_Ledger", key: _Key) -> None:
        self._ledger, self._key, self._own = ledger, key, ledger.slots(*key)
        self._around: Sequence[Mapping[_Key, _Slots]] = ()
        self._theirs: list[_Slots] = []

    def add(self, n: int) -> None:
        """So many more (fewer: a negative number)."""
        self._own[0] += n

    def total(self) -> int:
        """How many all processes that live have now."""
        around = self._ledger.neighbors()
        if around is not self._around:
            self._around, self._theirs = around, [index[self._key] for index in around if self._key in index]
        return int(self._own[0] + sum([slots[0] for slots in self._theirs]))


class Meters:
    """All figures of one process, and the sum of those of all processes that count in ``folder``.

    ``worker`` numbers the processes of a server. Without a folder, or where it cannot be written (which is said once
    on the log: metrics never keep a server from serving), the figures are this process's own. Make it in the process
    that counts, after any fork. Remove the folder, while no worker lives, to begin at zero.

    >>> meters = Meters()
    >>> meters.count("trilobe_http_responses_total", code=200)
    >>> meters.gauge("trilobe_connections", 3)
    >>> [line for line in meters.render().splitlines() if line.startswith(("trilobe_http", "trilobe_conn"))]
    ['trilobe_http_responses_total{code="200"} 1', 'trilobe_connections 3']
    """

    def __init__(self, folder: Path | None = None, worker: int = 0) -> None:
        self._lock = threading.Lock()
        self._ledger = _Ledger(folder, worker)
        self._models: dict[tuple[str, str], Meter] = {}
        self._named: dict[tuple[str, str, tuple[tuple[str, object], ...]], _Slots] = {}
        self._cpu = _cpu_times()
        self.count("trilobe_worker_starts_total", worker=self._ledger.worker)
        self.count("trilobe_captures_dropped_total", 0)
        self.gauge("trilobe_connections", 0)
        self.gauge("trilobe_ready", 0)

    def of(self, model: str, version: str) -> Meter:
        """The figures of one version of one model, from now on also in every scrape."""
        meter = self._models.get((model, version))
        if meter is None:
            slots = self._ledger.slots("model", model, version)
            meter = Meter(slots, self._lock, lambda step: self._ledger.slots("step", model, version, step))
            meter = self._models.setdefault((model, version), meter)
        return meter

    def count(self, name: str, n: int = 1, **labels: object) -> None:
        """Add ``n`` to a counter. For labels of few values: every combination is kept for good.

        Raises :class:`~trilobe.errors.UsageError` for a name or labels that :data:`FAMILIES` does not have.
        """
        slots = self._named.get(("counter", name, tuple(labels.items()))) or self._find("counter", name, labels)
        with self._lock:
            slots[0] += n

    def counted(self, name: str, **labels: object) -> int:
        """What a counter has come to in all processes.

        >>> meters = Meters()
        >>> meters.count("trilobe_http_responses_total", 2, code=200)
        >>> [meters.counted("trilobe_http_responses_total", code=code) for code in (200, 404)]
        [2, 0]
        """
        key = ("counter", name, *(_clean(str(labels[label])) for label in _LABELS[name]))
        return _summed(self._ledger.workers()).get(key, [0])[0]

    def gauge(self, name: str, value: int, **labels: object) -> None:
        """Say how it stands in this process; a scrape shows the sum over those that live. Raises as :meth:`count`."""
        slots = self._named.get(("gauge", name, tuple(labels.items()))) or self._find("gauge", name, labels)
        slots[0] = value

    def tally(self, name: str, **labels: object) -> Tally:
        """A gauge of which every process sees the sum, not only a scrape. Raises as :meth:`count`."""
        self._find("gauge", name, labels)
        return Tally(self._ledger, ("gauge", name, *(_clean(str(labels[label])) for label in _LABELS[name])))

    def close(self) -> None:
        """This process counts no more: its counters stay, its gauges go."""
        self._ledger.close()

    def _find(self, kind: str, name: str, labels: Mapping[str, object]) -> _Slots:
        if not any(f.name == name and f.kind == kind and set(f.labels) == set(labels) for f in _NAMED):
            known = [f"{f.name}{{{','.join(f.labels)}}}" for f in _NAMED if f.kind == kind]
            raise UsageError(
                f"a {kind} called {name} with the labels {sorted(labels)}", expected=f"one of {', '.join(known)}"
            )
        slots = self._ledger.slots(kind, name, *(str(labels[label]) for label in _LABELS[name]))
        self._named[kind, name, tuple(labels.items())] = slots
        return slots

    def statistics(self, model: str, version: str) -> dict[str, Any]:
        """What Triton's ``/v2/models/MODEL/stats`` says of one version, of all processes together (its extension
        "statistics"); zeros for one that was never called.

        ``compute_input`` and ``compute_output`` are the parsing and encoding of requests, hence unknown for a batch.
        There is no cache. Batches of more than 128 rows stand under the next power of two.

        >>> Meters().statistics("digits", "1")["inference_stats"]["success"]
        {'count': 0, 'ns': 0}
        """
        sums = _summed(self._ledger.workers())
        s = sums.get(("model", _clean(model), _clean(version)), [0] * _LENGTHS["model"])
        answered = sum(s[_REQUEST:_QUEUE])
        pairs = {
            "success": (s[_SUCCESS], s[_REQUEST_NS]),
            "fail": (sum(s[at] for at in _FAILED.values()), s[_FAILED_NS]),
            "queue": (s[_SUCCESS], s[_QUEUE_NS]),
            "compute_input": (answered, s[_INPUT_NS]),
            "compute_infer": (s[_SUCCESS], s[_INFER_NS]),
            "compute_output": (answered, s[_OUTPUT_NS]),
            "cache_hit": (0, 0),
            "cache_miss": (0, 0),
        }
        batches = [
            {
                "batch_size": size,
                "compute_input": {"count": 0, "ns": 0},
                "compute_infer": {"count": n, "ns": ns},
                "compute_output": {"count": 0, "ns": 0},
            }
            for size, n, ns in _batches(s)
        ]
        return {
            "name": model,
            "version": version,
            "last_inference": s[_LAST] // 1_000_000,
            "inference_count": s[_ROWS],
            "execution_count": sum(n for _, n, _ in _batches(s)),
            "inference_stats": {name: {"count": n, "ns": ns} for name, (n, ns) in pairs.items()},
            "batch_stats": batches,
        }

    def render(self) -> str:
        """All figures of all processes in Prometheus's text format 0.0.4 (:data:`CONTENT_TYPE`)."""
        lines: dict[str, list[str]] = {family.name: [] for family in FAMILIES}
        workers = self._ledger.workers()
        for key, s in sorted(_summed(workers).items()):
            if key[0] == "model":
                _tell_model(lines, key[1:], s)
            elif key[0] == "step":
                tags = _tags(_STEP, key[1:])
                queue, compute = s[_STEP_QUEUE:_STEP_QUEUE_NS], s[_STEP_COMPUTE:_STEP_COMPUTE_NS]
                _tell_times(lines, "trilobe_step_queue_duration_seconds", tags, queue, s[_STEP_QUEUE_NS])
                _tell_times(lines, "trilobe_step_compute_duration_seconds", tags, compute, s[_STEP_COMPUTE_NS])
            elif len(key) - 2 == len(_LABELS.get(key[1], key)):  # not what a version with other labels left behind
                _tell(lines, key[1], _tags(_LABELS[key[1]], key[2:]), s[0])
        alive = [worker for worker in workers if worker.alive]
        _tell(lines, "trilobe_workers", "", len(alive))
        for worker in sorted(alive, key=lambda w: w.name):
            if (size := resident_bytes(worker.pid)) is not None:
                _tell(lines, "trilobe_worker_resident_bytes", _tags(("worker",), (worker.name,)), size)
        self._tell_machine(lines)
        return "".join(
            f"# HELP {f.name} {f.help}\n# TYPE {f.name} {f.kind}\n{''.join(lines[f.name])}"
            for f in FAMILIES
            if lines[f.name]
        )

    def _tell_machine(self, lines: dict[str, list[str]]) -> None:
        now, before = _cpu_times(), self._cpu
        if now is not None and before is not None:
            passed = now[1] - before[1]
            self._cpu = now if passed else before
            _tell(lines, "nv_cpu_utilization", "", round((now[0] - before[0]) / passed, 4) if passed else 0.0)
        memory = _memory_bytes()
        if memory is not None:
            _tell(lines, "nv_cpu_memory_total_bytes", "", memory[0])
            _tell(lines, "nv_cpu_memory_used_bytes", "", memory[1])


# how it is told


def _tell(lines: dict[str, list[str]], name: str, tags: str, value: float, suffix: str = "") -> None:
    lines[name].append(f"{name}{suffix}{{{tags}}} {value!r}\n" if tags else f"{name}{suffix} {value!r}\n")


def _tags(labels: Iterable[str], values: Iterable[str]) -> str:
    r"""Labels as they stand between braces.

    >>> print(_tags(("model", "version"), ('a "b"\n\\', "1")))
    model="a \"b\"\n\\",version="1"
    """
    escaped = (value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for value in values)
    return ",".join(f'{label}="{value}"' for label, value in zip(labels, escaped, strict=True))


def _tell_histogram(
    lines: dict[str, list[str]], name: str, tags: str, ends: Sequence[str], counts: Sequence[int], total: float
) -> None:
    n = 0
    for end, more in zip((*ends, "+Inf"), counts, strict=True):
        n += more
        _tell(lines, name, f'{tags},le="{end}"', n, "_bucket")
    _tell(lines, name, tags, total, "_sum")
    _tell(lines, name, tags, n, "_count")


_ENDS = tuple(f"{ns / 1e9:g}" for ns in BOUNDS)


def _tell_times(lines: dict[str, list[str]], name: str, tags: str, counts: Sequence[int], ns: int) -> None:
    _tell_histogram(lines, name, tags, _ENDS, counts, ns / 1e9)


def _tell_model(lines: dict[str, list[str]], names: Sequence[str], s: Sequence[int]) -> None:
    tags, batches = _tags(_MODEL, names), list(_batches(s))
    _tell(lines, "nv_inference_request_success", tags, s[_SUCCESS])
    for reason, at in _FAILED.items():
        _tell(lines, "nv_inference_request_failure", f'{tags},reason="{reason}"', s[at])
    _tell(lines, "nv_inference_count", tags, s[_ROWS])
    _tell(lines, "nv_inference_exec_count", tags, sum(n for _, n, _ in batches))
    _tell(lines, "nv_inference_pending_request_count", tags, s[_PENDING])
    for name, at in (
        ("request", _REQUEST_NS),
        ("queue", _QUEUE_NS),
        ("compute_input", _INPUT_NS),
        ("compute_infer", _INFER_NS),
        ("compute_output", _OUTPUT_NS),
    ):
        _tell(lines, f"nv_inference_{name}_duration_us", tags, s[at] // 1000)
    _tell_times(lines, "trilobe_request_duration_seconds", tags, s[_REQUEST:_QUEUE], s[_REQUEST_NS])
    _tell_times(lines, "trilobe_queue_duration_seconds", tags, s[_QUEUE:_COMPUTE], s[_QUEUE_NS])
    spent = sum(ns for _, _, ns in batches)
    _tell_times(lines, "trilobe_compute_duration_seconds", tags, s[_COMPUTE:_BATCH], spent)
    sizes = [0] * (len(SIZES) + 1)
    for size, n, _ in batches:
        sizes[bisect_left(SIZES, size)] += n
    _tell_histogram(lines, "trilobe_batch_size", tags, [str(size) for size in SIZES], sizes, s[_ROWS])


def _size_index(rows: int) -> int:
    """Where batches of so many rows are counted.

    >>> [_size_index(rows) for rows in (1, 128, 129, 256, 257, 10**9)]
    [1, 128, 129, 129, 130, 145]
    """
    return max(rows, 0) if rows <= _EXACT else min(_EXACT + (rows - 1).bit_length() - 7, _EXACT + _LARGEST - 7)


def _batches(s: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The sizes of batches that ran, how many of each, and their nanoseconds."""
    for i, n in enumerate(s[_BATCH::2]):
        if n:
            yield (i if i <= _EXACT else 2 ** (i - _EXACT + 7)), n, s[_BATCH + 2 * i + 1]


# the machine, as Linux tells it; nothing is told elsewhere


def _cpu_times() -> tuple[int, int] | None:
    """Ticks in which some CPU worked, and all ticks, since the machine was started (proc(5), /proc/stat)."""
    try:
        with Path("/proc/stat").open("rb") as f:
            ticks = [int(word) for word in f.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _memory_bytes() -> tuple[int, int] | None:
    """Bytes of the machine's memory, and of those the ones that are not available."""
    try:
        rows = [line.split() for line in Path("/proc/meminfo").read_bytes().splitlines()[:3]]
        size = {row[0]: 1024 * int(row[1]) for row in rows}
        return size[b"MemTotal:"], size[b"MemTotal:"] - size[b"MemAvailable:"]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def resident_bytes(pid: int) -> int | None:
    """Bytes of memory that a process holds; None where it is gone.

    >>> resident_bytes(os.getpid()) > 1_000_000
    True
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return None


# the files


@dataclass(frozen=True, slots=True)
class _Worker:
    """What one process counted, and whether it lives."""

    name: str
    pid: int
    alive: bool
    numbers: Mapping[_Key, list[int]]


def _summed(workers: Iterable[_Worker]) -> dict[_Key, list[int]]:
    """All processes together; what waits in a dead one, and its other gauges, are gone."""
    sums: dict[_Key, list[int]] = {}
    for worker in workers:
        for key, numbers in worker.numbers.items():
            if not worker.alive and key[0] in _GAUGES:
                numbers[_GAUGES[key[0]]] = 0
            if key not in sums:
                sums[key] = numbers
            else:
                last = max(sums[key][_LAST], numbers[_LAST]) if key[0] == "model" else 0
                sums[key] = list(map(add, sums[key], numbers))
                if key[0] == "model":
                    sums[key][_LAST] = last
    return sums


def _clean(name: str) -> str:
    """The name, with whatever UTF-8 cannot say replaced."""
    return name.encode("utf-8", "replace").decode("utf-8")


# A file grows by chunks. It begins with a head and goes on with blocks, each a multiple of 8 bytes: its size (written
# last, so that a block is there or is not; 0: nothing more in this chunk), how many numbers, the size of its key and
# its CRC-32; then the key (a JSON list of strings), padded, and the numbers. Integers are in the machine's own order.
_MAGIC = b"trilobe meters 1"
_HEAD = Struct("=16sq40x")
_BLOCK = Struct("=IIII")
_SIZE = Struct("=I")
_CHUNK = max(65536, mmap.ALLOCATIONGRANULARITY)
_LOOK_SECONDS = 0.5  # how old what is known of neighbors may be


class _Ledger:
    """The numbers of this process by key, in a locked file of ``folder``, and those of its neighbors."""

    def __init__(self, folder: Path | None, worker: int) -> None:
        self.folder, self.worker = folder, str(worker)
        self._lock = threading.Lock()
        self._fd = -1
        self._mine = ""
        self._free = memoryview(b"")
        self._index: dict[_Key, _Slots] = {}
        self._around: list[Mapping[_Key, _Slots]] = []
        self._looked_at = float("-inf")
        self._warned: set[Path] = set()
        if folder is not None:
            try:
                self._take(folder)
            except OSError as error:
                self._in_memory(folder, error)

    def slots(self, kind: str, *names: str) -> _Slots:
        """The numbers of that key, from now on there; zeros at first."""
        key = (kind, *map(_clean, names))
        with self._lock:
            if key not in self._index:
                self._index[key] = self._append(msgspec.json.encode(key), _LENGTHS[kind])
            return self._index[key]

    def workers(self) -> list[_Worker]:
        """This process, then all others that count, or counted, in the folder."""
        with self._lock:
            numbers = {key: slots.tolist() for key, slots in self._index.items()}
        paths = sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder is not None else []
        others = [self._read(path) for path in paths if path.name != self._mine]
        return [_Worker(self.worker, os.getpid(), True, numbers), *(other for other in others if other is not None)]

    def neighbors(self) -> list[Mapping[_Key, _Slots]]:
        """The numbers of the other processes that live, where these write them. The same list until one is new."""
        if self.folder is None or time.monotonic() - self._looked_at < _LOOK_SECONDS:
            return self._around
        self._looked_at = time.monotonic()
        found = [self._mapped(path) for path in sorted(self.folder.glob(f"*{SUFFIX}")) if path.name != self._mine]
        self._around = [mapped[2] for mapped in found if mapped is not None and mapped[1]]
        return self._around

    def close(self) -> None:
        """Let go of the file: others may take it up, and think nobody lives there."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mappings keep the file open, and would keep the lock
            os.close(self._fd)
            self._fd = -1

    def _take(self, folder: Path) -> None:
        """Lock the first file of this worker that nobody has, and go on counting in it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (self.worker, *(f"{self.worker}.{k}" for k in range(1, 1000))):
            path = folder / f"{name}{SUFFIX}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._go_on(fd, path):
                    self._fd, self._mine, self.worker = fd, path.name, name
                    return
            except BlockingIOError:  # a predecessor that still finishes its work
                pass
            finally:
                if self._fd != fd:
                    os.close(fd)

    def _go_on(self, fd: int, path: Path) -> bool:
        """Continue what stands in the file, unless it is damaged."""
        size = os.fstat(fd).st_size
        if size == 0:
            size = _extend(fd, 0, _CHUNK)
        view = memoryview(mmap.mmap(fd, size))
        index, end, problem = _blocks(view)
        if problem:
            self._warn(path, problem)
            return False
        _HEAD.pack_into(view, 0, _MAGIC, os.getpid())
        self._index, self._free = index, view[end:]
        for key, slots in index.items():
            if key[0] in _GAUGES:
                slots[_GAUGES[key[0]]] = 0
        return True

    def _append(self, key: bytes, length: int) -> _Slots:
        start = _BLOCK.size + -(-len(key) // 8) * 8
        size = start + 8 * length
        if len(self._free) < size:
            self._free = self._more(size)
        block, self._free = self._free[:size], self._free[size:]
        _BLOCK.pack_into(block, 0, 0, length, len(key), zlib.crc32(key))
        block[_BLOCK.size : _BLOCK.size + len(key)] = key
        _SIZE.pack_into(block, 0, size)
        return block[start:].cast("q")

    def _more(self, size: int) -> memoryview:
        """A new chunk, in the file or else in memory."""
        size = -(-size // _CHUNK) * _CHUNK
        if self._mine and self.folder is not None:
            try:
                at = -(-os.fstat(self._fd).st_size // _CHUNK) * _CHUNK
                return memoryview(mmap.mmap(self._fd, _extend(self._fd, at, size), offset=at))
            except OSError as error:
                self._in_memory(self.folder, error)
        return memoryview(bytearray(size))

    def _read(self, path: Path) -> _Worker | None:
        """What another process counted so far; None for what is no such file."""
        found = self._mapped(path)
        if found is None:
            return None
        pid, alive, index = found
        numbers = {key: slots.tolist() for key, slots in index.items()}
        return _Worker(path.name.removesuffix(SUFFIX), pid, alive, numbers)

    def _mapped(self, path: Path) -> tuple[int, bool, dict[_Key, _Slots]] | None:
        """The process of another file, whether it lives, and its numbers; None for what is no such file."""
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            self._warn(path, f"{error.strerror}: ignored")
            return None
        try:
            alive = _locked(fd)
            size = os.fstat(fd).st_size
            if size == 0:  # made this very moment
                return None
            view = memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ))
            index, _, problem = _blocks(view)
            if problem:
                self._warn(path, problem)
            return (_HEAD.unpack_from(view)[1], alive, index) if index else None
        finally:
            os.close(fd)

    def _in_memory(self, folder: Path, error: OSError) -> None:
        self._warn(folder, f"{error.strerror}: what this process counts is in no scrape but its own")

    def _warn(self, path: Path, problem: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            logger.warning("metrics in %s: %s", path, problem)


def _blocks(view: memoryview) -> tuple[dict[_Key, _Slots], int, str]:
    """What stands in a file: the numbers by key, where the last of them end, and what is wrong with the rest."""
    index: dict[_Key, _Slots] = {}
    if len(view) < _HEAD.size or _HEAD.unpack_from(view)[0] not in (_MAGIC, bytes(16)):
        return index, 0, "no file of metrics: ignored"
    at = end = _HEAD.size
    while at + _BLOCK.size <= len(view):
        size, length, key_size, crc = _BLOCK.unpack_from(view, at)
        if size == 0:
            at = (at // _CHUNK + 1) * _CHUNK
            continue
        start = at + _BLOCK.size
        slots = start + -(-key_size // 8) * 8
        key = bytes(view[start : start + key_size])
        if slots + 8 * length != at + size or at + size > len(view) or zlib.crc32(key) != crc:
            return index, end, f"damaged at byte {at}: what comes after is ignored"
        try:
            names = msgspec.json.decode(key, type=tuple[str, ...])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            names = ()
        if not names or _LENGTHS.get(names[0]) != length:
            return index, end, f"not of this version at byte {at}: what comes after is ignored"
        at = end = at + size
        index[names] = view[slots:end].cast("q")
    return index, end, ""


def _extend(fd: int, at: int, size: int) -> int:
    """Add ``size`` bytes to the file at ``at``. Written, not only reserved: on a full disk it fails here, where that
    is an error, rather than at some later addition, where it would be a signal that ends the process."""
    done = os.pwrite(fd, bytes(size), at)
    if done != size:
        os.ftruncate(fd, at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return size


def _locked(fd: int) -> bool:
    """Whether the process that counts in the file lives."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
