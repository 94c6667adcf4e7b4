"""A thread and a process group of their own, on which the buckets of one step are exchanged while backward computes the
next ones. What is exchanged is none of this room's business.

An exchange has several collectives that depend on each other. Started from callbacks of futures, those of different
buckets would begin in an order that differs between workers, and gloo would wait for ever; one thread that takes
buckets first come, first served begins them in the same order everywhere. The group is its own because the main
thread may use the model's while backward runs (unused parameters, batch normalization across workers).
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

Work = Callable[[], None]


class Lane:
    """Runs what is handed to :meth:`submit` in order, beside the caller. All processes open one at the same moment,
    so it is for the group of all; :meth:`close` lets the thread end."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend=dist.get_backend())
        self._waiting: SimpleQueue[Work | None] = SimpleQueue()
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self._failed = False
        self._submitted = 0
        # a daemon: a worker that stops must not wait for a peer that stopped before it
        self._thread = threading.Thread(target=_run, args=(self._waiting,), name="trilobe-exchange", daemon=True)
        self._thread.start()

    def submit(self, work: Work, buffer: Tensor) -> "Future[Tensor]":
        """A future of ``buffer`` that completes when ``work`` has ended, well or not: see :meth:`drain`."""
        future: Future[Tensor] = Future()

        def run() -> None:
            error: BaseException | None = None
            try:
                if not self._failed:  # else nobody else goes on either
                    work()
            except BaseException as raised:  # noqa: BLE001  (raised again by drain)
                error, self._failed = raised, True
            future.set_result(buffer)
            self._ended.put(error)

        self._submitted += 1
        self._waiting.put(run)
        return future

    def drain(self) -> None:
        """Wait for all that was submitted; raise the first error among it."""
        errors = [self._ended.get() for _ in range(self._submitted)]
        self._submitted, self._failed = 0, False
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Let the thread end once nothing waits, and see it end, for a few seconds: one that is still about when Python
        shuts down may abort the process."""
        self._waiting.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)


def _run(waiting: "SimpleQueue[Work | None]") -> None:
    while (work := waiting.get()) is not None:
        work()
        del work  # it refers to a state, which must be free to go
