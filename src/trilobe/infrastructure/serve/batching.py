"""Batching: what waits becomes a batch as soon as something can run it. No timer, unless one is asked for.

A :class:`Queue` holds the requests for one step; a :class:`Scheduler` gives the queues of a process their turns. A fast
step (under a millisecond for one row, as measured while it runs) runs in the event loop itself, on all that arrived in
one turn of it: handing it to a thread would cost more than the work. A slower one runs in worker threads, and what
arrives meanwhile is its next batch. Among queues that compete for threads, the one that used least time is next.

All methods are called in the loop's thread. Nothing here knows HTTP, models or bundles.
"""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from queue import SimpleQueue
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import DataError, ServeError, TrilobeError
from trilobe.infrastructure.pipeline import Arrays
from trilobe.infrastructure.serve.protocol import Refused

INLINE_SECONDS = 1e-3  # a row that takes longer than this is not computed in the event loop
TURN_SECONDS = 3e-3  # nor are batches that would keep the loop from its clients for longer than this
PRIORITY = 2  # of a request that names none; 1 is the highest
logger = logging.getLogger(__name__)

Finish = Callable[[dict[str, NDArray[Any]]], Any]


@dataclass(frozen=True, slots=True)
class Batching:
    """How one step is run: rows per batch, requests that may wait, seconds.

    ``delay`` is how long a request may be held for others to join it (0: not at all); ``replicas`` how many batches of
    this step may run at once (0: as many as there are threads); ``limit`` how long one batch may run before its
    requests are given up; ``where`` is ``auto`` (by measured time), ``inline``, ``threads`` or, for a function that is
    a step of a pipeline, ``processes``: then there are as many as ``replicas``, and one that holds more than
    ``max_memory`` bytes after a batch is replaced (0: none is).
    """

    max_batch: int = 64
    max_pending: int = 1024
    delay: float = 0.0
    replicas: int = 0
    limit: float = 30.0
    where: Literal["auto", "inline", "threads", "processes"] = "auto"
    max_memory: int = 0


class Meter(Protocol):
    """Where a queue says what it did (see ``metrics.py``)."""

    def batch(self, queue_ns: Sequence[int], rows: int, infer_ns: int) -> None:
        """One batch ran: the waiting times of its requests, its rows, its computing time."""

    def answered(self, total_ns: Sequence[int], input_ns: int, output_ns: int) -> None:
        """Requests were answered: how long each took in all; reading them, and writing the answers, summed."""

    def failed(self, reason: str, n: int = 1) -> None:
        """Requests failed: REJECTED, CANCELED, BACKEND or OTHER."""

    def pending(self, delta: int) -> None:
        """So many more requests wait than when this was last called."""


class Trace(Protocol):
    """Who follows one request (see ``traces.py``)."""

    def step(self, queued: int, started: int, ended: int, name: str = "", rows: int = 0) -> None:
        """It waited, and was computed in a batch of so many rows; nanoseconds of ``time.perf_counter_ns``."""


class _Ticket:
    """One request that waits, or runs."""

    __slots__ = ("alone", "arrived", "finish", "future", "input_ns", "inputs", "rows", "trace")

    def __init__(
        self,
        future: "asyncio.Future[Any]",
        inputs: Arrays,
        rows: int,
        finish: Finish | None,
        input_ns: int,
        trace: Trace | None,
    ) -> None:
        self.future, self.inputs, self.rows, self.finish = future, inputs, rows, finish
        self.input_ns, self.trace, self.alone = input_ns, trace, False
        self.arrived = time.perf_counter_ns()


_Lane = tuple[int, tuple[tuple[int, ...], ...]]  # priority, and what the rows of every input look like


class Queue:
    """Requests for one step, ``run``: from arrays with n rows each to arrays with n rows each.

    Requests whose rows look alike are joined; the row of an answer depends on its own row alone, and where a batch
    fails its requests are run one by one, so that only the guilty fail. ``cost`` is what a row usually takes, in
    seconds, as measured (the first guess is given); ``label`` is what traces call this step ("": it is all there is).

    >>> async def three() -> list[int]:
    ...     queue = Queue("double", lambda data: {"y": 2 * data["x"]}, Scheduler(1))
    ...     waiting = [queue.submit({"x": np.array([i])}, 1) for i in range(3)]
    ...     answers = [int((await one)["y"][0]) for one in waiting]
    ...     return [*answers, queue.batches]
    >>> asyncio.run(three())
    [0, 2, 4, 1]
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Arrays], Mapping[str, NDArray[Any]]],
        scheduler: "Scheduler",
        settings: Batching | None = None,
        *,
        joins: bool = True,
        cost: float = 0.0,
        meter: Meter | None = None,
        watch: Callable[[Arrays, Mapping[str, NDArray[Any]]], None] | None = None,
        label: str = "",
    ) -> None:
        self.name, self.run, self.scheduler, self.settings = name, run, scheduler, settings or Batching()
        self.joins, self.cost, self.meter, self.watch, self.label = joins, cost, meter, watch, label
        self.waiting = self.running = self.batches = self.lost = 0
        self.used = 0.0
        self._lanes: dict[_Lane, deque[_Ticket]] = {}
        self._told = 0
        self._shares: tuple[float, ...] = ()  # seconds for a row, of the last three batches

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return self.waiting > 0 or self.running > 0

    @property
    def apart(self) -> bool:
        """Whether this step computes in processes of its own, which keep to its limit themselves."""
        return self.settings.where == "processes"

    @property
    def inline(self) -> bool:
        """Whether this step runs in the event loop now."""
        return self.settings.where == "inline" or (self.settings.where == "auto" and self.cost < INLINE_SECONDS)

    def submit(
        self,
        inputs: Arrays,
        rows: int,
        finish: Finish | None = None,
        priority: int = 0,
        timeout: float | None = None,
        input_ns: int = 0,
        trace: Trace | None = None,
    ) -> "asyncio.Future[Any]":
        """A future of the outputs (arrays of ``rows`` rows), or of what ``finish`` makes of them where they are made.

        Cancelling it takes the request out of the queue. A priority of 1 goes before all others; ``timeout`` is in
        seconds; ``input_ns`` is what was spent on the request before it came here, for the figures; ``trace`` is told
        when it waited and ran. The future raises what ``run`` raised, or :class:`Refused` 504 when it is too late.
        Raises :class:`Refused` 503 with ``Retry-After`` where too many wait already.
        """
        if self.waiting >= self.settings.max_pending:
            if self.meter is not None:
                self.meter.failed("REJECTED")
            wait = max(1, round(self.waiting * self.cost))
            raise Refused(
                503,
                f"{self.name!r} has {self.waiting} requests waiting",
                expected=f"fewer than {self.settings.max_pending}",
                hint=f"try again in {wait} s",
                headers={"retry-after": str(wait)},
            )
        loop = self.scheduler.loop
        future: asyncio.Future[Any] = loop.create_future()
        ticket = _Ticket(future, inputs, rows, finish, input_ns, trace)
        lane = (priority or PRIORITY, tuple([array.shape[1:] for array in inputs.values()]))
        tickets = self._lanes.get(lane)
        if tickets is None:
            tickets = self._lanes[lane] = deque()
        tickets.append(ticket)
        self.waiting += 1
        if timeout is not None:
            timer = loop.call_later(timeout, self._late, future, timeout)
            future.add_done_callback(lambda _: timer.cancel())
        self.scheduler.wake(self)
        return future

    def _late(self, future: "asyncio.Future[Any]", timeout: float) -> None:
        if not future.done():
            future.set_exception(Refused(504, f"{self.name!r} did not answer within {timeout:g} s"))

    def take(self) -> "list[_Ticket]":
        """The next batch: the most urgent lane, the oldest request of it first, as many as fit."""
        limit = self.settings.max_batch
        if self.inline and self.cost > 0:
            limit = max(1, min(limit, int(TURN_SECONDS / self.cost)))
        while self._lanes:
            lane = next(iter(self._lanes))
            if len(self._lanes) > 1:
                lane = min(self._lanes, key=lambda key: (key[0], self._lanes[key][0].arrived))
            tickets, rows = self._lanes[lane], 0
            batch: list[_Ticket] = []
            while tickets and (not batch or self._may_join(batch[0], tickets[0], rows, limit)):
                ticket = tickets.popleft()
                self.waiting -= 1
                if not ticket.future.done():
                    batch.append(ticket)
                    rows += ticket.rows
                elif self.meter is not None:
                    self.meter.failed("CANCELED" if ticket.future.cancelled() else "OTHER")
            if not tickets:
                del self._lanes[lane]
            if batch:
                return batch
        return []

    def _may_join(self, first: "_Ticket", other: "_Ticket", rows: int, limit: int) -> bool:
        return self.joins and rows + other.rows <= limit and not (first.alone or other.alone)

    def due(self) -> float:
        """Seconds until the next batch should start: 0 unless a delay was asked for and there is room for more."""
        if not self.waiting or self.waiting >= self.settings.max_batch:
            return 0.0
        oldest = min(tickets[0].arrived for tickets in self._lanes.values())
        return max(0.0, self.settings.delay - (time.perf_counter_ns() - oldest) / 1e9)

    def compute(self, batch: "list[_Ticket]") -> "list[_Done]":
        """Run a batch and finish each answer; any thread may. Where it fails, its requests are run one by one."""
        start = time.perf_counter_ns()
        rows = sum([ticket.rows for ticket in batch])
        try:
            inputs, outputs = self._outputs(batch, rows)
        except Exception as caught:  # noqa: BLE001 (the request's future raises it)
            if len(batch) > 1:  # somebody in it is to blame: find out who
                return [done for ticket in batch for done in self.compute([ticket])]
            done = _Done(batch, rows, start, time.perf_counter_ns(), [caught])
        else:
            done = _Done(batch, rows, start, time.perf_counter_ns(), [])
            if self.watch is not None:
                self.watch(inputs, outputs)
            done.finish(outputs)
        for ticket in batch:
            if ticket.trace is not None:
                ticket.trace.step(ticket.arrived, start, done.computed, self.label, rows)
        return [done]

    def _outputs(self, batch: "list[_Ticket]", rows: int) -> tuple[Arrays, dict[str, NDArray[Any]]]:
        inputs = batch[0].inputs
        if len(batch) > 1:
            inputs = {name: np.concatenate([ticket.inputs[name] for ticket in batch]) for name in inputs}
        outputs = dict(self.run(inputs))
        if self.joins:
            for name, array in outputs.items():
                if array.shape[:1] != (rows,):
                    raise ServeError(
                        f"step {self.name!r} gave {name!r} with the shape {list(array.shape)}", expected=f"{rows} rows"
                    )
        return inputs, outputs

    def deliver(self, parts: "list[_Done]") -> None:
        """Hand the answers out; in the loop's thread."""
        for done in parts:
            self.batches += 1
            seconds = (done.computed - done.started) / 1e9
            self.used += seconds
            if self.meter is not None:
                done.count(self.meter)
            self._learn(seconds / max(1, done.rows))
            for ticket, answer in zip(done.batch, done.answers, strict=True):
                future = ticket.future
                if future.done():  # too late, or nobody waits any more
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        if self.meter is not None and self.waiting != self._told:
            self.meter.pending(self.waiting - self._told)
            self._told = self.waiting

    def _learn(self, share: float) -> None:
        """What a row costs: a moving mean of medians of three, for a process that was put aside once is not slow."""
        self._shares = recent = (*self._shares[-2:], share)
        typical = sorted(recent)[1] if len(recent) == 3 else share
        self.cost = 0.9 * self.cost + 0.1 * typical if self.cost else typical

    def give_up(self, batch: "list[_Ticket]") -> None:
        """The batch ran for too long: the thread it keeps is written off. A request that was alone hears so.

        Of several nobody knows who is to blame: each goes to the front of the queue once more, by itself.
        """
        self.running -= 1
        self.lost += 1
        logger.error("step %r has been running for over %g s: given up", self.name, self.settings.limit)
        waiting = [ticket for ticket in batch if not ticket.future.done()]
        if len(batch) > 1:
            for ticket in waiting:
                ticket.alone = True
                lane = 0, tuple([array.shape[1:] for array in ticket.inputs.values()])
                self._lanes.setdefault(lane, deque()).append(ticket)
            self.waiting += len(waiting)
            return
        for ticket in waiting:
            words = f"step {self.name!r} did not finish within {self.settings.limit:g} s"
            ticket.future.set_exception(Refused(504, words))
        if self.meter is not None:
            self.meter.failed("BACKEND", len(batch))


@dataclass(slots=True)
class _Done:
    """A batch that ran, from ``started`` to ``computed``; of each of its requests the answer, or why there is none."""

    batch: list[_Ticket]
    rows: int
    started: int
    computed: int
    answers: list[Any]
    output_ns: int = 0

    def finish(self, outputs: dict[str, NDArray[Any]]) -> None:
        """Make the answers of what the batch gave."""
        at = 0
        for ticket in self.batch:
            own = outputs
            if len(self.batch) > 1:
                own = {name: array[at : at + ticket.rows] for name, array in outputs.items()}
                at += ticket.rows
            try:
                self.answers.append(own if ticket.finish is None else ticket.finish(own))
            except Exception as caught:  # noqa: BLE001 (an answer that cannot be encoded is one request's trouble)
                self.answers.append(caught)
        self.output_ns = time.perf_counter_ns() - self.computed

    def count(self, meter: Meter) -> None:
        """Tell the figures."""
        good = [t for t, answer in zip(self.batch, self.answers, strict=True) if not isinstance(answer, Exception)]
        if failed := len(self.batch) - len(good):
            meter.failed("BACKEND", failed)
        if good:
            rows = sum([ticket.rows for ticket in good])
            meter.batch([self.started - ticket.arrived for ticket in good], rows, self.computed - self.started)
            # An answer is written as soon as its batch is computed, and sent when all of the batch are written.
            spent = self.computed + self.output_ns
            total = [ticket.input_ns + spent - ticket.arrived for ticket in good]
            meter.answered(total, sum([ticket.input_ns for ticket in good]), self.output_ns)


_used = attrgetter("used")


class Scheduler:
    """Turns for the queues of one event loop, and the threads they share (as many as cores, by default).

    Inline queues get one batch in each turn of the loop; the others get threads, the least served first. Must be made
    inside a running loop.
    """

    def __init__(self, threads: int = 0) -> None:
        self.loop = asyncio.get_running_loop()
        self.free = self.threads = threads or len(os.sched_getaffinity(0))
        self.lost = 0
        self._under_way = 0
        self._ready: dict[Queue, None] = {}
        self._least = 0.0  # seconds used by the least served of those that had something to run
        self._turn_is_due = False
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._started = 0

    def wake(self, queue: Queue) -> None:
        """``queue`` has something to run."""
        if queue not in self._ready:
            if not queue.running and queue.used < self._least:  # who rested has no claim to the time it did not use
                queue.used = self._least
            self._ready[queue] = None
        if not self._turn_is_due:
            self._turn_is_due = True
            self.loop.call_soon(self._turn)

    def close(self) -> None:
        """End the threads once they are idle."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _turn(self) -> None:
        self._turn_is_due = False
        ready = self._ready
        queues = list(ready) if len(ready) < 2 else sorted(ready, key=_used)
        if queues:
            self._least = queues[0].used
        inline = []
        for queue in queues:
            if queue.settings.delay and (pause := queue.due()):
                del ready[queue]
                self.loop.call_later(pause, self.wake, queue)
                continue
            if not queue.inline:
                self._dispatch(queue)
            elif batch := queue.take():
                inline.append((queue, batch))
            if not queue.waiting:
                del ready[queue]
        # All batches are computed, then all handed out: each kind of work finds its code and data in the caches.
        computed = [(queue, queue.compute(batch)) for queue, batch in inline]
        for queue, done in computed:
            queue.deliver(done)
        if any(queue.inline or self._may_run(queue) for queue in ready):
            self._turn_is_due = True
            self.loop.call_soon(self._turn)

    def _may_run(self, queue: Queue) -> bool:
        room = queue.apart or self.free > 0
        return room and queue.running < (queue.settings.replicas or self.threads) and queue.waiting > 0

    def _dispatch(self, queue: Queue) -> None:
        if not self._may_run(queue):
            return
        batch = queue.take()
        if not batch:
            return
        job = _Job(queue, batch)
        queue.running += 1
        self._under_way += 1
        if not queue.apart:  # its thread only waits, and takes no core from the others
            self.free -= 1
            job.timer = self.loop.call_later(queue.settings.limit, self._give_up, job)
        if self._started < self._under_way + self.lost:
            self._started += 1
            threading.Thread(target=self._work, name="inference", daemon=True).start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            done = job.queue.compute(job.batch)
            if job.given_up:
                return
            try:
                self.loop.call_soon_threadsafe(self._back, job, done)
            except RuntimeError:  # the loop has ended: nobody waits
                return

    def _back(self, job: "_Job", done: list[_Done]) -> None:
        if job.given_up:  # a moment too late; its thread has a successor already and must go
            self._jobs.put(None)
            return
        if job.timer is not None:
            job.timer.cancel()
            self.free += 1
        self._under_way -= 1
        job.queue.running -= 1
        job.queue.deliver(done)
        self._continue(job.queue)

    def _give_up(self, job: "_Job") -> None:
        job.given_up = True
        self.lost += 1
        self.free += 1
        self._under_way -= 1
        job.queue.give_up(job.batch)
        self._continue(job.queue)

    def _continue(self, queue: Queue) -> None:
        if queue.waiting:
            self.wake(queue)
        elif self._ready and not self._turn_is_due:
            self._turn_is_due = True
            self.loop.call_soon(self._turn)


@dataclass(slots=True, eq=False)
class _Job:
    queue: Queue
    batch: list[_Ticket]
    given_up: bool = False
    timer: asyncio.TimerHandle | None = None


def blame(error: BaseException) -> tuple[int, str]:
    """The HTTP status and the words for an error of a step: 400s blame the request, 500 ourselves.

    >>> blame(DataError("a text that is not UTF-8"))
    (400, 'a text that is not UTF-8')
    >>> blame(ZeroDivisionError())
    (500, 'internal error, see the log')
    """
    if isinstance(error, DataError):
        return (error.status if isinstance(error, Refused) else 400), str(error)
    return 500, str(error) if isinstance(error, TrilobeError) else "internal error, see the log"
