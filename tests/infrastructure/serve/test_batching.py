"""Batching: what waits becomes a batch, the guilty fail alone, nobody waits for ever, nobody starves."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.errors import DataError, ServeError
from trilobe.infrastructure.pipeline import Arrays
from trilobe.infrastructure.serve import batching
from trilobe.infrastructure.serve.batching import Batching, Queue, Scheduler, blame
from trilobe.infrastructure.serve.metrics import Meters
from trilobe.infrastructure.serve.protocol import Refused


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def double(data: Arrays) -> dict[str, np.ndarray]:
    return {"y": 2 * data["x"]}


def rows(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values)}


@pytest.mark.parametrize("where", ["inline", "threads"])
def test_what_waits_is_one_batch_and_everybody_gets_his_own(where: Any) -> None:
    async def test() -> None:
        sizes = []

        def watched(data: Arrays) -> dict[str, np.ndarray]:
            sizes.append(len(data["x"]))
            return double(data)

        queue = Queue("double", watched, Scheduler(1), Batching(where=where))
        asked = [rows(i, i + 0.5)["x"][: 1 + i % 2] for i in range(20)]
        waiting = [queue.submit({"x": x}, len(x)) for x in asked]
        for x, answer in zip(asked, waiting, strict=True):
            np.testing.assert_array_equal((await answer)["y"], 2 * x)
        assert sizes == [30] and not queue.busy

    run(test)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=30),
    st.integers(1, 12),
    st.sampled_from(["inline", "threads"]),
)
def test_any_mixture_is_answered_and_no_batch_is_too_large(requests: list[Any], max_batch: int, where: Any) -> None:
    """Requests of several sizes, shapes and priorities: each gets its rows, whatever it was joined with."""

    async def test() -> None:
        seen: list[tuple[int, ...]] = []

        def watched(data: Arrays) -> dict[str, np.ndarray]:
            seen.append(data["x"].shape)
            return double(data)

        queue = Queue("double", watched, Scheduler(2), Batching(max_batch=max_batch, where=where))
        asked = [(np.random.default_rng(i).normal(size=(n, w)), p) for i, (n, w, p) in enumerate(requests)]
        waiting = [queue.submit({"x": x}, len(x), priority=p) for x, p in asked]
        for (x, _), answer in zip(asked, waiting, strict=True):
            np.testing.assert_array_equal((await answer)["y"], 2 * x)
        assert all(shape[0] <= max(max_batch, max(n for n, _, _ in requests)) for shape in seen)
        assert sum(shape[0] for shape in seen) == sum(n for n, _, _ in requests)

    run(test)


@pytest.mark.parametrize("where", ["inline", "threads"])
def test_only_the_guilty_fail(where: Any) -> None:
    def picky(data: Arrays) -> dict[str, np.ndarray]:
        if (data["x"] < 0).any():
            raise DataError("a negative number")
        return double(data)

    async def test() -> None:
        queue = Queue("picky", picky, Scheduler(1), Batching(where=where), meter=(meter := Meters().of("m", "1")))
        waiting = [queue.submit(rows(v), 1) for v in (1, -1, 3)]
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [d if isinstance(d, Exception) else d["y"].tolist() for d in (done[0], done[2])] == [[2], [6]]
        assert isinstance(done[1], DataError) and blame(done[1])[0] == 400
        assert meter is queue.meter

    run(test)


def test_wrong_shapes_and_answers_that_cannot_be_encoded_are_errors_of_their_own() -> None:
    async def test() -> None:
        scheduler = Scheduler(1)
        short = Queue("short", lambda data: {"y": data["x"][:1]}, scheduler)
        with pytest.raises(ServeError, match=r"step 'short' gave 'y' with the shape \[1\]; expected 2 rows"):
            await short.submit(rows(1, 2), 2)

        def finish(outputs: dict[str, np.ndarray]) -> str:
            if outputs["y"][0] == 2:
                raise ValueError("no words for it")
            return "said"

        queue = Queue("double", double, scheduler)
        first, second = queue.submit(rows(1), 1, finish), queue.submit(rows(2), 1, finish)
        with pytest.raises(ValueError, match="no words"):
            await first
        assert await second == "said"

    run(test)


def test_the_urgent_go_first() -> None:
    async def test() -> None:
        order: list[float] = []

        def note(data: Arrays) -> dict[str, np.ndarray]:
            order.extend(data["x"].tolist())
            return double(data)

        queue = Queue("note", note, Scheduler(1), Batching(max_batch=1, where="inline"))
        priorities = {0.0: 0, 1.0: 3, 2.0: 1, 3.0: 2, 4.0: 1}
        await asyncio.gather(*[queue.submit(rows(value), 1, priority=p) for value, p in priorities.items()])
        assert order == [2, 4, 0, 3, 1], "1 is the highest, and who names none is a 2"

    run(test)


def test_a_full_queue_says_when_to_come_back() -> None:
    async def test() -> None:
        meters = Meters()
        queue = Queue("full", double, Scheduler(1), Batching(max_pending=3), cost=0.5, meter=meters.of("m", "1"))
        waiting = [queue.submit(rows(i), 1) for i in range(3)]
        with pytest.raises(Refused, match="3 requests waiting") as caught:
            queue.submit(rows(3), 1)
        assert caught.value.status == 503 and caught.value.headers == {"retry-after": "2"}
        await asyncio.gather(*waiting)
        assert 'reason="REJECTED"} 1' in meters.render()
        assert (await queue.submit(rows(4), 1))["y"][0] == 8, "and then there is room again"

    run(test)


def test_timeouts_and_cancellation() -> None:
    async def test() -> None:
        ran: list[float] = []
        free = threading.Event()

        def slow(data: Arrays) -> dict[str, np.ndarray]:
            free.wait(5)
            ran.extend(data["x"].tolist())
            return double(data)

        meters = Meters()
        queue = Queue("slow", slow, Scheduler(1), Batching(max_batch=1, where="threads"), meter=meters.of("m", "1"))
        first = queue.submit(rows(1), 1)
        late = queue.submit(rows(2), 1, timeout=0.05)
        gone = queue.submit(rows(3), 1)
        last = queue.submit(rows(4), 1)
        gone.cancel()
        with pytest.raises(Refused, match=r"did not answer within 0\.05 s") as caught:
            await late
        assert caught.value.status == 504
        free.set()
        await first
        await last
        assert ran == [1, 4], "what nobody waits for is not computed"
        assert 'reason="CANCELED"} 1' in meters.render()

    run(test)


def test_a_step_that_hangs_costs_its_own_requests_only() -> None:
    async def test() -> None:
        free = threading.Event()

        def hang(data: Arrays) -> dict[str, np.ndarray]:
            if data["x"][0] < 0:
                free.wait(10)
            return double(data)

        scheduler = Scheduler(1)
        bad = Queue("bad", hang, scheduler, Batching(where="threads", limit=0.1))
        good = Queue("good", double, scheduler, Batching(where="threads"))
        stuck = bad.submit(rows(-1), 1)
        behind = good.submit(rows(1), 1)
        with pytest.raises(Refused, match=r"step 'bad' did not finish within 0\.1 s"):
            await stuck
        assert (await behind)["y"][0] == 2, "the only thread hangs, and another has taken its place"
        assert (await bad.submit(rows(1), 1))["y"][0] == 2
        assert (bad.lost, scheduler.lost) == (1, 1)
        free.set()
        await asyncio.sleep(0.05)
        assert (await good.submit(rows(5), 1))["y"][0] == 10 and scheduler.free == 1

    run(test)


def test_of_a_batch_that_hangs_only_the_guilty_is_given_up() -> None:
    async def test() -> None:
        free = threading.Event()

        def hang(data: Arrays) -> dict[str, np.ndarray]:
            if (data["x"] < 0).any():
                free.wait(10)
            return double(data)

        queue = Queue("hang", hang, Scheduler(2), Batching(where="threads", limit=0.1))
        waiting = [queue.submit(rows(value), 1) for value in (1, -1, 3)]
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [d["y"].tolist() for d in (done[0], done[2])] == [[2], [6]]
        assert isinstance(done[1], Refused) and done[1].status == 504
        assert queue.lost == 2 and not queue.waiting
        free.set()

    run(test)


def test_delay_is_off_by_default_and_gathers_where_asked_for() -> None:
    async def test() -> None:
        scheduler = Scheduler(1)
        at_once, patient = (
            Queue("a", double, scheduler),
            Queue("b", double, scheduler, Batching(max_batch=3, delay=1.0)),
        )
        start = time.perf_counter()
        await at_once.submit(rows(1), 1)
        assert time.perf_counter() - start < 0.9
        first = patient.submit(rows(1), 1)
        await asyncio.sleep(0.02)
        assert not first.done()
        second = patient.submit(rows(2), 1)
        await asyncio.gather(first, second)
        assert patient.batches == 1 and 0.9 < time.perf_counter() - start < 10
        full = [patient.submit(rows(i), 1) for i in range(3)]
        start = time.perf_counter()
        await asyncio.gather(*full)
        assert time.perf_counter() - start < 0.9, "a full batch does not wait"

    run(test)


def test_the_place_follows_the_measured_time() -> None:
    async def test() -> None:
        places: list[bool] = []

        def work(data: Arrays) -> dict[str, np.ndarray]:
            places.append(threading.current_thread() is threading.main_thread())
            if data["x"][0] > 0:
                time.sleep(0.02)
            return double(data)

        queue = Queue("work", work, Scheduler(1))
        await queue.submit(rows(0), 1)
        for _ in range(3):
            await queue.submit(rows(1), 1)
        assert places[0] and not places[-1] and not queue.inline
        for _ in range(60):
            await queue.submit(rows(0), 1)
        assert places[-1] and queue.inline

    run(test)


def test_a_process_that_was_put_aside_once_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in four takes a hundred times as long, as on a machine with many neighbors: it stays in the loop."""

    async def test() -> None:
        now = [0]
        monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter_ns=lambda: now[0]))

        def work(data: Arrays) -> dict[str, np.ndarray]:
            now[0] += int(data["x"][0])
            return double(data)

        queue = Queue("work", work, Scheduler(1))
        for nanoseconds in [3e5, 3e5, 3e5, 3e7] * 4:
            await queue.submit(rows(nanoseconds), 1)
            assert queue.inline and queue.cost == pytest.approx(3e-4)
        await queue.submit(rows(3e7), 1)
        assert not queue.inline and queue.cost > 3e-3, "two of three are no accident"

    run(test)


def test_who_rested_has_no_claim_to_the_time_it_did_not_use() -> None:
    async def test() -> None:
        scheduler = Scheduler(1)
        busy, rested = (Queue(name, double, scheduler, Batching(where="inline")) for name in ("busy", "rested"))
        busy.used = 100.0
        await busy.submit(rows(1), 1)
        await asyncio.gather(busy.submit(rows(1), 1), rested.submit(rows(1), 1))
        assert 99 < rested.used < 101

    run(test)


def test_nobody_starves_beside_a_busy_model() -> None:
    """One thread, one model flooded: the other's few requests are answered long before the flood is over."""

    async def test() -> None:
        def slow(data: Arrays) -> dict[str, np.ndarray]:
            time.sleep(0.002)
            return double(data)

        scheduler = Scheduler(1)
        settings = Batching(max_batch=1, where="threads")
        flood, quiet = Queue("flood", slow, scheduler, settings), Queue("quiet", slow, scheduler, settings)
        many = [flood.submit(rows(i), 1) for i in range(100)]
        few = [quiet.submit(rows(i), 1) for i in range(5)]
        await asyncio.gather(*few)
        answered = sum(answer.done() for answer in many)
        assert answered <= 50, "turns go to whoever used less time"
        await asyncio.gather(*many)

    run(test)


def test_figures_agree_with_what_was_done() -> None:
    async def test() -> None:
        meters = Meters()
        queue = Queue("m", double, Scheduler(1), meter=meters.of("m", "1"))
        await asyncio.gather(*[queue.submit(rows(*range(n)), n, input_ns=1000) for n in (1, 2, 3)])
        await queue.submit(rows(1), 1)
        stats = meters.statistics("m", "1")
        assert (stats["inference_count"], stats["execution_count"]) == (7, 2)
        assert stats["inference_stats"]["success"]["count"] == 4
        assert stats["inference_stats"]["compute_input"]["ns"] == 3000

    run(test)
