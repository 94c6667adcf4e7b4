"""Steps in processes of their own: the same numbers, and whatever one does to its process, nobody else notices."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from support import apart
from support.lines import line
from trilobe.errors import DataError, ServeError, UsageError
from trilobe.infrastructure import endpoint
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.serve import Batching, function
from trilobe.infrastructure.serve.batching import Queue, Scheduler
from trilobe.infrastructure.serve.graph import Function
from trilobe.infrastructure.serve.protocol import Refused
from trilobe.infrastructure.serve.steps import Processes

ONE = {"x": np.ones(1, np.float32)}


@pytest.fixture
def begin() -> Iterator[Callable[..., Processes]]:
    made: list[Processes] = []

    def begin(step: Function, n: int = 1, **options: Any) -> Processes:
        made.append(Processes(step, n, **options))
        return made[-1]

    yield begin
    for processes in made:
        processes.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def everything() -> Iterator[Processes]:
    processes = Processes(apart.everything, 1)
    yield processes
    processes.close()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_goes_there_comes_back_as_it_was(everything: Processes, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    given_ = {
        "f": data.draw(hnp.arrays(np.float32, (n, data.draw(st.integers(1, 3))), elements=st.floats(-1, 1, width=32))),
        "i": data.draw(hnp.arrays(np.int64, (n,))),
        "b": data.draw(hnp.arrays(np.bool_, (n, 2))),
        "s": np.array([*data.draw(st.lists(st.binary(max_size=20), min_size=n, max_size=n)), None], object)[:n],
    }
    back = everything(given_)
    assert {name: (array.dtype, array.shape, array.tolist()) for name, array in back.items()} == {
        f"{name}_": (array.dtype, array.shape, array.tolist()) for name, array in given_.items()
    }


def test_large_arrays_go_both_ways(begin: Callable[..., Processes]) -> None:
    """More than any buffer between the two holds."""
    x = np.arange(5_000_000, dtype=np.float32)
    assert np.array_equal(begin(apart.double)({"x": x})["y"], 2 * x)


def test_it_computes_elsewhere_and_two_at_once(begin: Callable[..., Processes]) -> None:
    processes = begin(apart.slow_pid, 2)
    processes.start()
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(int(processes(ONE)["y"][0]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 2 and os.getpid() not in seen


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (1, DataError, "step 'odd': one is not liked; expected another"),
        (2, ServeError, "step 'odd' failed: ZeroDivisionError: division by zero"),
        (3, ServeError, r"step 'odd': output 'y' has the shape \[2, 2\]"),
        (4, ServeError, r"step 'odd' ended its process \(exit code 7\)"),
        (5, ServeError, r"step 'odd' ended its process \(SIGSEGV\)"),
        (6, Refused, r"step 'odd' did not finish within 0\.5 s"),
    ],
)
def test_what_goes_wrong_there_is_said_here_and_the_next_call_is_answered(
    begin: Callable[..., Processes], code: int, error: type[Exception], words: str
) -> None:
    told: list[str] = []
    processes = begin(apart.odd, limit=0.5, told=told.append)
    processes.start()
    with pytest.raises(error, match=words):
        processes({"x": np.full(1, code, np.float32)})
    assert told == {4: ["ended", "ended"], 5: ["ended", "ended"], 6: ["hung"]}.get(code, [])
    assert processes(ONE | {"x": np.zeros(1, np.float32)})["y"].tolist() == [0]


def test_one_that_somebody_kills_is_replaced_and_its_request_answered(begin: Callable[..., Processes]) -> None:
    told: list[str] = []
    processes = begin(apart.slow_pid, told=told.append)
    first = int(processes(ONE)["y"][0])
    os.kill(first, signal.SIGKILL)  # while it is idle
    second = int(processes(ONE)["y"][0])
    threading.Timer(0.1, os.kill, (second, signal.SIGKILL)).start()  # while it computes
    third = int(processes(ONE)["y"][0])
    assert len({first, second, third}) == 3 and told == ["ended", "ended"]


def test_one_that_grows_is_replaced_after_its_answer(begin: Callable[..., Processes]) -> None:
    told: list[str] = []
    processes = begin(apart.leak, max_memory=300 << 20, told=told.append)
    pids = [int(processes(ONE)["y"][0]) for _ in range(6)]  # 100 MB more each time
    assert len(set(pids)) > 1 and set(told) == {"grown"} and len(told) == len(set(pids)) - (told[-1:] == [pids[-1]])


def test_they_end_with_close(begin: Callable[..., Processes]) -> None:
    processes = begin(apart.pid, 2)
    processes.start()
    pid = int(processes(ONE)["y"][0])
    assert alive(pid)
    start = time.monotonic()
    processes.close()
    assert not alive(pid) and time.monotonic() - start < 5


KILLED = """
import os, sys, threading, time
import numpy as np
sys.path.insert(0, {here!r})
from support import apart
from support.lines import line
from trilobe.infrastructure.serve.steps import Processes
pid = int(Processes(apart.pid, 1)({{"x": np.ones(1, np.float32)}})["y"][0])
busy = Processes(apart.forever, 1, limit=100)
busy.start()
threading.Thread(target=busy, args=({{"x": np.ones(1, np.float32)}},), daemon=True).start()
print(pid, *[p._popen.pid for p in busy._all], flush=True)
time.sleep(100)
"""


def test_they_end_where_the_server_is_killed_even_in_the_midst_of_a_loop_that_never_ends() -> None:
    script = KILLED.format(here=str(Path(apart.__file__).parents[1]))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pids = [int(pid) for pid in server.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.2)
        server.kill()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlived its server"
        time.sleep(0.05)


def test_what_no_other_process_can_find_is_refused_at_once() -> None:
    @function({"x": "FP32[-1]"}, {"y": "FP32[-1]"})
    def here(x: np.ndarray) -> dict[str, np.ndarray]:
        return {"y": x}

    with pytest.raises(UsageError, match=r"step 'here' cannot be run in a process of its own.*at the top of a module"):
        Processes(here, 1)


def test_one_that_cannot_begin_says_why(begin: Callable[..., Processes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    with pytest.raises(ServeError, match=r"the process of step 'pid' did not start \(exit code 1\)"):
        begin(apart.pid).start()


def test_one_that_hangs_keeps_nobody_else_from_the_threads() -> None:
    """All threads but one there is; it is not taken by those who wait for processes."""

    async def test() -> None:
        scheduler = Scheduler(1)
        processes = Processes(apart.forever, 2, limit=1.0)
        hanging = Queue("hanging", processes, scheduler, Batching(where="processes", replicas=2, limit=1.0))
        other = Queue("other", lambda data: {"y": data["x"]}, scheduler, Batching(where="threads"))
        stuck = [hanging.submit(ONE, 1), hanging.submit({"x": np.ones((1, 2), np.float32)[:, 0]}, 1)]
        await asyncio.sleep(0.1)
        start = time.monotonic()
        await other.submit(ONE, 1)
        assert time.monotonic() - start < 0.5
        for one in stuck:
            with pytest.raises(Refused, match=r"did not finish within 1 s"):
                await one
        assert scheduler.lost == 0 and scheduler.free == 1, "no thread is lost to it"
        scheduler.close()
        processes.close()

    asyncio.run(test())


SERVER = """
from support import apart
from support.lines import line
from trilobe.infrastructure.serve import Batching
from dataclasses import replace
own = Batching(where="processes", replicas=2, limit=1.0)
X = {"x": "FP32[-1]"}
steps = {n: replace(getattr(apart, n), batching=own) for n in ("odd", "pid")}
flows = [graph(n, X, {"y": "s.y"}, {"s": Node(step, {"x": "x"})}) for n, step in steps.items()]
"""


REPLACED = r'trilobe_step_replaced_total{model="(\w+)",step="s",reason="(\w+)"} (\d+)'


def test_a_server_answers_on_whatever_a_step_does_to_its_process(
    start: Callable[..., endpoint.Endpoint], tmp_path: Path
) -> None:
    served = start(line(2.0, tmp_path / "two"), "flows=flows", SERVER)
    failed: list[str] = []
    done: dict[str, int] = {}
    ended = threading.Event()

    def ask(name: str, x: NDArray[np.float32], expected: list[float]) -> None:
        with Client(served.url, name) as client:
            while not ended.is_set():
                try:
                    y = client.call({"x": x})["y"]
                except ServeError as error:
                    failed.append(f"{name}: {error}")
                else:
                    failed.extend([] if y.tolist() == expected else [f"{name}: {y}"])
                    done[name] = done.get(name, 0) + 1

    good = [("odd", np.zeros(1, np.float32), [0.0]), ("lines", np.ones((1, 3), np.float32), [[1.0, 1.0, 1.0]])]
    threads = [threading.Thread(target=ask, args=args) for args in good for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        with Client(served.url, "odd") as bad, Client(served.url, "pid") as pid:
            for code, words in (
                (1, "not liked"),
                (3, "shape"),
                (4, "exit code 7"),
                (5, "SIGSEGV"),
                (6, "did not finish"),
            ):
                with pytest.raises(ServeError, match=words):
                    bad.call({"x": np.full(1, code, np.float32)})
            for _ in range(3):
                os.kill(int(pid.call(ONE)["y"][0]), signal.SIGKILL)
            pid.call(ONE)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failed and min(done.values()) > 5 and len(done) == 2
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        told = answer.read().decode()
    counted = {(name, why): int(n) for name, why, n in re.findall(REPLACED, told)}
    # A batch that ends its process is tried once more, then its requests one by one.
    assert counted["odd", "ended"] >= 4 and counted["odd", "hung"] >= 1 and counted["pid", "ended"] == 3
