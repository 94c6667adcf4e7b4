"""The same function on several workers at once: processes of this machine, or actors of Ray. What it does is its own
business.

A worker is told its number, finds the others through a store, and talks to who started it. Whoever starts workers also
ends them: when one fails, all end, and none outlives the process that started it.
"""

import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from trilobe.errors import MissingExtra, TrainingError, TrilobeError, UsageError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)
Engine = Literal["here", "ray"]
Heard = Callable[[Any], None]
GRACE = 1.0  # seconds that others get to say why they failed, too: the first to fail has the reason


@dataclass(frozen=True)
class Place:
    """Where a worker finds itself: its number of how many, how to talk to who started it, how to meet the others."""

    rank: int = 0
    size: int = 1
    say: Heard = lambda said: None
    store: "Callable[[], Store]" = field(default=lambda: _unmet(), repr=False)


Work = Callable[[Place], Any]


class WorkerLost(TrainingError):
    """A worker was killed, or failed by an error that is not one of ours: another try may succeed."""


def run(work: Work, n: int, engine: Engine = "here", heard: Heard = lambda said: None) -> list[Any]:
    """What ``work`` returns at each of ``n`` workers, in their order.

    One worker here is this process itself. Otherwise ``work`` is sent to each: it must be picklable, as a function or
    a dataclass of an importable module is (Ray takes any).

    Args:
        work: is told its :class:`Place`.
        n: how many.
        engine: ``here`` starts processes of this machine, which talk over its loopback interface; ``ray`` starts actors
            with one core each on the cluster that ``RAY_ADDRESS`` names, else on the cores of this machine.
        heard: called with everything that workers say.

    Raises:
        TrilobeError: what ``work`` raised, with the number of its worker.
        WorkerLost: a worker died, or failed otherwise; with its traceback.
        UsageError: a number or an engine that cannot be, or ``work`` cannot be sent.
        MissingExtra: Ray is not installed.

    >>> run(lambda place: (place.rank, place.size), 1)
    [(0, 1)]
    """
    if n < 1:
        raise UsageError(f"{n} workers", expected="at least 1")
    if engine not in get_args(Engine):
        raise UsageError(f"engine {engine!r}", expected=f"one of {', '.join(get_args(Engine))}")
    if engine == "ray":
        return _on_ray(work, n, heard)
    return _here(work, n, heard) if n > 1 else [work(Place(say=heard))]


def available_cores() -> int:
    """The cores that this process may use.

    >>> available_cores() > 0
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Failure:
    """Why a worker could not go on, and since when (seconds on the clock of its machine)."""

    rank: int
    at: float
    error: TrilobeError | None
    text: str

    def error_of(self, n: int) -> TrilobeError:
        """The error to raise where ``n`` workers were started."""
        if self.error is not None:
            self.error.add_note(f"at worker {self.rank} of {n}:\n{self.text}")
            return self.error
        return WorkerLost(
            f"worker {self.rank} of {n} {self.text}",
            expected="all workers to arrive at the end",
            hint="correct what it names; with a checkpoint, training goes on where it stopped",
        )


def _attempt(work: Work, place: Place) -> tuple[str, Any]:
    """("done", what came) or ("failed", why)."""
    try:
        return "done", work(place)
    except TrilobeError as e:
        return "failed", _Failure(place.rank, time.time(), e, traceback.format_exc())
    except Exception as e:  # noqa: BLE001  # whatever it is, who started this worker has to hear of it
        text = f"failed: {type(e).__name__}: {e}\n{traceback.format_exc()}"
        return "failed", _Failure(place.rank, time.time(), None, text)


# ---- processes of this machine ----


def _here(work: Work, n: int, heard: Heard) -> list[Any]:
    import multiprocessing

    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that imports the main module
        raise UsageError(
            "workers are started while the main module is imported",
            expected="a script that only defines things when it is imported: workers import it, too",
            hint='put the call under: if __name__ == "__main__":',
        )
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="trilobe-") as folder, ExitStack() as ends:
        _send(work, Path(folder))
        links = {}
        for rank in range(n):
            here, there = context.Pipe()
            process = context.Process(target=_worker, args=(folder, rank, n, there), daemon=True)
            with _quiet():
                process.start()
            there.close()
            links[here] = (rank, process)
            ends.callback(_end, here, process)
        return _results(links, n, heard)


def _results(links: dict[Any, tuple[int, Any]], n: int, heard: Heard) -> list[Any]:
    """What all workers return, or the first failure; meanwhile what they say is passed on."""
    from multiprocessing.connection import wait

    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    listening, deadline = list(links), float("inf")
    while listening and time.monotonic() < deadline:
        ready: list[Any] = wait(listening, max(0.0, min(deadline - time.monotonic(), 60.0)))
        for link in ready:
            rank, process = links[link]
            try:
                kind, value = pickle.loads(link.recv_bytes())
            except (EOFError, OSError):
                process.join(GRACE)
                kind, value = "failed", _Failure(rank, 0.0, None, _fate(process.exitcode))
            if kind == "said":
                heard(value)
                continue
            listening.remove(link)
            if kind == "done":
                results[rank] = value
            else:
                failures.append(value)
                deadline = min(deadline, time.monotonic() + GRACE)
    if failures:
        raise min(failures, key=lambda f: f.at).error_of(n)
    return [results[rank] for rank in range(n)]


def _fate(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name} (where nobody did that: there was too little memory)"
    return f"ended with exit code {code}"


def _end(link: Any, process: Any) -> None:
    """A worker ends when nobody listens any more; one that does not is killed."""
    link.close()
    process.join(GRACE)
    process.kill()
    process.join()
    process.close()


def _send(work: Work, folder: Path) -> None:
    """Put ``work`` where workers find it: the arrays in it in one file, which all of them share in memory."""
    arrays: list[pickle.PickleBuffer] = []
    try:
        (folder / "work").write_bytes(pickle.dumps(work, protocol=5, buffer_callback=arrays.append))
    except (pickle.PicklingError, AttributeError, TypeError) as e:
        raise UsageError(
            f"what is to be done cannot be sent to other processes: {e}",
            expected="networks and functions that an importable module (a file) defines by name",
            hint="move them into a file of their own and import them, or use engine='ray'",
        ) from e
    with (folder / "arrays").open("wb") as f:
        sizes = [f.write(array.raw()) for array in arrays] + [f.write(b"\0")]  # an empty file can't be mapped
    (folder / "sizes").write_bytes(pickle.dumps(sizes))


def _received(folder: Path) -> Work:
    """What :func:`_send` put there; writing to its arrays changes this worker's copy alone."""
    with (folder / "arrays").open("rb") as f:
        view, arrays, at = memoryview(mmap(f.fileno(), 0, access=ACCESS_COPY)), [], 0
    for size in pickle.loads((folder / "sizes").read_bytes()):
        arrays.append(view[at : at + size])
        at += size
    work: Work = pickle.loads((folder / "work").read_bytes(), buffers=arrays)
    return work


def _worker(folder: str, rank: int, n: int, link: Any) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started it
    threading.Thread(target=_end_with, args=(link,), daemon=True).start()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"  # nobody else can connect
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), max(1, available_cores() // n)))

    def say(value: Any) -> None:
        link.send_bytes(pickle.dumps(("said", value)))

    def store() -> "Store":
        from torch._C._distributed_c10d import FileStore

        return FileStore(str(Path(folder) / "store"), n)  # no port that could be in use

    def job(place: Place) -> Any:
        return _received(Path(folder))(place)

    link.send_bytes(pickle.dumps(_attempt(job, Place(rank, n, say, store))))
    threading.Event().wait()  # until the others are done: they may still read what this one sent


def _end_with(link: Any) -> None:
    """End this process when who started it hangs up, or is gone."""
    try:
        link.recv_bytes()
    except (EOFError, OSError):
        os._exit(0)


@contextmanager
def _quiet() -> Iterator[None]:
    """What a process inherits while it starts: no C++ warnings."""
    name, before = "TORCH_CPP_LOG_LEVEL", os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault(name, "ERROR")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def _unmet() -> Any:
    raise UsageError("a worker alone has nobody to meet", expected="at least two workers")


# ---- Ray ----


def _on_ray(work: Work, n: int, heard: Heard) -> list[Any]:
    ray = started()
    if n > (cores := int(ray.cluster_resources().get("CPU", 1))):
        raise UsageError(f"{n} workers on a cluster of {cores} cores", expected=f"at most {cores}")
    actor = ray.remote(num_cpus=1, max_concurrency=2, scheduling_strategy="SPREAD")(_Actor)
    sent = ray.put(work)
    actors = [actor.remote() for _ in range(n)]
    try:
        address = ray.get(actors[0].open.remote(n)) if n > 1 else ("", 0)
        running = {a.work.remote(sent, rank, n, address): rank for rank, a in enumerate(actors)}
        return _collected(ray, actors, running, heard)
    finally:
        for a in actors:
            ray.kill(a)


def _collected(ray: Any, actors: list[Any], running: dict[Any, int], heard: Heard) -> list[Any]:
    """As :func:`_results`, of actors: these are asked for what they have to say."""
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    n, deadline = len(actors), float("inf")
    while running and time.monotonic() < deadline:
        ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0.1)
        for rank in {*running.values()}:
            try:
                for value in ray.get(actors[rank].news.remote()):
                    heard(value)
            except ray.exceptions.RayError:
                continue  # why is told by its work
        for ref in ready:
            rank = running.pop(ref)
            try:
                kind, value = ray.get(ref)
            except ray.exceptions.RayError as e:
                kind, value = "failed", _Failure(rank, 0.0, None, f"was lost: {e}")
            if kind == "done":
                results[rank] = value
            else:
                failures.append(value)
                deadline = min(deadline, time.monotonic() + GRACE)
    if failures:
        raise min(failures, key=lambda f: f.at).error_of(n)
    return [results[rank] for rank in range(n)]


def started() -> Any:
    """Ray, connected to the cluster that ``RAY_ADDRESS`` names, else to one of this machine's cores.

    Raises :class:`~trilobe.errors.MissingExtra` where it is not installed.
    """
    try:
        import ray
    except ImportError as e:
        raise MissingExtra("Ray is not installed", expected="the extra", hint="pip install 'trilobe[ray]'") from e
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    return ray


class _Actor:
    """A worker on Ray. One of its two threads works, the other answers."""

    def __init__(self) -> None:
        self.said: deque[Any] = deque()
        self.own: Store | None = None

    def open(self, n: int) -> tuple[str, int]:
        """Open the store at which ``n`` workers meet, on a port that the system picks; its address."""
        import ray
        from torch._C._distributed_c10d import TCPStore

        host = ray.util.get_node_ip_address()
        self.own = store = TCPStore(host, 0, n, is_master=True, wait_for_workers=False)
        return host, store.port

    def work(self, work: Work, rank: int, n: int, address: tuple[str, int]) -> tuple[str, Any]:
        """Do the work of worker ``rank``."""
        import torch
        from torch._C._distributed_c10d import TCPStore

        torch.set_num_threads(1)  # Ray runs as many workers as there are cores

        def store() -> "Store":
            return self.own or TCPStore(address[0], address[1], n, is_master=False)

        return _attempt(work, Place(rank, n, self.said.append, store))

    def news(self) -> list[Any]:
        """What was said since this was asked last."""
        return [self.said.popleft() for _ in range(len(self.said))]
