"""Whether compression pays here: the link and the codec are timed, each hook's step is predicted, one is chosen.

Only the time of a step is compared: how many steps a hook needs to a target is a question for training. Predictions
add computing, codec and link up, less what several buckets hide: all but the last are sent while backward computes,
which helps plain DDP most, since it sends most. That the codec competes with backward for the cores is not hidden.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trilobe.algorithms.parallel.codec import majority, packed_size
from trilobe.algorithms.parallel.compressors import COMPRESSORS, Encoding
from trilobe.algorithms.parallel.hook import HEADER, PRESETS, Choices
from trilobe.errors import UsageError

MARGIN = 0.10  # a hook must save this share of the plain step to be worth its noise
BACKWARD = 2 / 3  # of a step's computing: a gradient for the weights and one for the input, after one forward


@dataclass(frozen=True, slots=True)
class Link:
    """What joins the workers: seconds from one to the next however short the message, and bytes a second each can send.

    >>> Link.of(100, latency_s=0.001).bytes_per_s
    12500000.0
    """

    latency_s: float
    bytes_per_s: float

    @classmethod
    def of(cls, megabits: float, latency_s: float = 0.0005) -> "Link":
        """A link named by its megabits a second."""
        return cls(latency_s, megabits * 1e6 / 8)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One hook's step in seconds: ``step_s = compute_s + codec_s + link_s - hidden_s``, where ``hidden_s`` is what the
    link works beside backward; ``sent`` is bytes a worker sends in it."""

    name: str
    choices: Choices
    sent: int
    compute_s: float
    codec_s: float
    link_s: float
    hidden_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Everything added up, and what is hidden only once."""
        return self.compute_s + self.codec_s + self.link_s - self.hidden_s


@dataclass(frozen=True, slots=True)
class Plan:
    """All predictions, fastest first, the one to use, and why."""

    predictions: tuple[Prediction, ...]
    best: Prediction
    reason: str

    def __str__(self) -> str:
        rows = [
            f"{p.name:>16} {p.sent / 1e3:10.1f} kB {1e3 * p.codec_s:8.1f} ms codec {1e3 * p.link_s:8.1f} ms link "
            f"{1e3 * p.step_s:8.1f} ms step"
            for p in self.predictions
        ]
        return "\n".join([*rows, self.reason])


def plan(
    model: torch.nn.Module | int,
    link: Link,
    workers: int,
    compute_s: float = 0.0,
    candidates: Mapping[str, Choices] = PRESETS,
    buckets: int = 1,
) -> Plan:
    """Choose among ``candidates`` (one must be an all-reduce) for ``model`` (or that many parameters).

    ``compute_s`` is what a step takes before anything is sent (:func:`time_step`). The codec is timed on this machine,
    now, on one core and the CPU. ``buckets``: how many of equal size DDP makes (of 25 MB, unless told otherwise); all
    but one can be sent beside backward. Raises UsageError for a size, link or number that cannot be.

    >>> plan(1_000_000, Link.of(100), workers=2).best.name != "plain"
    True
    >>> plan(10_000, Link.of(100_000, latency_s=1e-6), workers=2, compute_s=0.1).reason
    'do not compress: plain all-reduce is within 10% of the fastest'
    """
    n = model if isinstance(model, int) else sum(p.numel() for p in model.parameters() if p.requires_grad)
    if min(n, workers, buckets) < 1 or link.bytes_per_s <= 0 or link.latency_s < 0 or compute_s < 0:
        came = f"{n} parameters in {buckets} buckets, {workers} workers, {link}, {compute_s} s of computing"
        raise UsageError(came, expected="positive sizes and rates, and times of at least 0")
    rows = [_predict(name, c, n, link, workers, compute_s, buckets) for name, c in candidates.items()]
    plain = [p for p in rows if p.choices.communicator == "all_reduce"]
    if not plain:
        raise UsageError(f"candidates {', '.join(candidates)}", expected="a plain all-reduce among them", hint="PLAIN")
    rows.sort(key=lambda p: p.step_s)
    if workers == 1 or rows[0].step_s > (1 - MARGIN) * plain[0].step_s:
        why = "one worker sends nothing" if workers == 1 else "plain all-reduce is within 10% of the fastest"
        return Plan(tuple(rows), plain[0], f"do not compress: {why}")
    times = plain[0].step_s / rows[0].step_s
    return Plan(tuple(rows), rows[0], f"{rows[0].name}: a step {times:.1f} times as fast as plain all-reduce")


def traffic(choices: Choices, n: int, workers: int) -> tuple[int, int]:
    """Bytes each worker sends in one step for ``n`` coordinates of one parameter, and how many messages wait in line.

    >>> traffic(PRESETS["plain"], 1000, 2)[0] / traffic(PRESETS["majority_vote"], 1000, 2)[0] > 25
    True
    """
    others = workers - 1
    if choices.communicator == "all_reduce":
        return round(2 * others / workers * 4 * n), 2 * others
    split = workers if choices.communicator == "two_phase" else 1
    chunk = -(-n // (64 * split)) * 64
    written = -(-COMPRESSORS[choices.compressor].size(chunk, _encoding(choices)) // 8) * 8
    row, planes = HEADER + written, 2 if choices.aggregate == "vote" and choices.ties == "zero" else 1
    if split <= 2:  # one phase
        return others * split * row, others
    return others * (row + HEADER + planes * written), 1 + others


def time_codec(choices: Choices, n: int, workers: int, repeat: int = 3) -> float:
    """Seconds in which this machine compresses, puts together and decompresses ``n`` coordinates: fastest of
    ``repeat``, on the CPU.

    >>> 0 < time_codec(PRESETS["majority_vote"], 1000, 4) < 1
    True
    """
    if choices.communicator == "all_reduce":
        return 0.0
    e, compressor = _encoding(choices), COMPRESSORS[choices.compressor]
    split = workers if choices.communicator == "two_phase" else 1
    part = -(-n // (64 * split)) * 64
    x, out, row = torch.randn(n), torch.empty(n), torch.zeros(compressor.size(n, e), dtype=torch.uint8)
    small, small_row = torch.randn(part), torch.zeros(compressor.size(part, e), dtype=torch.uint8)
    votes = [torch.randint(-(2**62), 2**62, (packed_size(part) // 8,)) for _ in range(workers | 1)]

    def once() -> None:
        if choices.memory != "none":
            x.add_(out, alpha=1e-9)
        compressor.decode(row, compressor.encode(x, row, [n], e), out, [n], e)
        if choices.has_errors:
            compressor.decode(row, [1.0], out, [n], e)
            x.sub_(out, alpha=1e-9)
        if choices.aggregate == "vote":
            majority(votes)
            return
        for _ in range(workers):
            compressor.decode(small_row, [1.0], small, [part], e)
        if split > 1:
            compressor.encode(small, small_row, [part], e)

    once()
    return min(_seconds(once) for _ in range(repeat))


def time_step(step: Callable[[], object], repeat: int = 5) -> float:
    """The median seconds of ``repeat`` calls of ``step`` after a first one: a training step under ``model.no_sync()``.

    >>> time_step(lambda: None) < 0.1
    True
    """
    step()
    return statistics.median(_seconds(step) for _ in range(repeat))


def measure_link(group: "dist.ProcessGroup | None" = None, size: int = 4_000_000) -> Link:
    """Time the link by all-reduces of one number and of ``size`` bytes; every worker calls it, and all get one answer.

    Raises UsageError with a single worker. The answer is that of the slowest link in the ring.
    """
    workers = dist.get_world_size(group)
    if workers == 1:
        raise UsageError("a link with one worker", expected="a process group of at least two")
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    small, large = torch.zeros(1, device=device), torch.zeros(size // 4, device=device)

    def reduce(x: torch.Tensor) -> None:
        dist.all_reduce(x, group=group)
        float(x[0])  # waits where the work is only enqueued

    reduce(large)  # opens connections and empties the link's burst allowance
    short = statistics.median(_seconds(lambda: reduce(small)) for _ in range(10))
    long = min(_seconds(lambda: reduce(large)) for _ in range(2))
    seen = torch.tensor([short / (2 * (workers - 1)), max(long - short, 1e-9)], dtype=torch.float64, device=device)
    dist.all_reduce(seen, group=group)
    latency, seconds = (seen / workers).tolist()
    return Link(latency, 2 * (workers - 1) / workers * size / seconds)


def _predict(
    name: str, choices: Choices, n: int, link: Link, workers: int, compute_s: float, buckets: int
) -> Prediction:
    sent, messages = traffic(choices, n, workers)
    link_s = buckets * messages * link.latency_s + sent / link.bytes_per_s
    hidden_s = min(BACKWARD * compute_s, link_s) * (buckets - 1) / buckets
    return Prediction(name, choices, sent, compute_s, time_codec(choices, n, workers), link_s, hidden_s)


def _encoding(choices: Choices) -> Encoding:
    return Encoding(torch.Generator(), False, choices.scaled, choices.levels, choices.ratio)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
