"""Metrics: counted as a slow direct sum counts, parsed by Prometheus's own readers, shared by processes that die."""

import itertools
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.config import ServeSection
from trilobe.errors import UsageError
from trilobe.infrastructure.serve.metrics import BOUNDS, CONTENT_TYPE, FAMILIES, REASONS, SIZES, SUFFIX, Meters

ROOT = Path(__file__).parents[3]
DASHBOARDS = Path(str(files("trilobe.infrastructure.serve") / "dashboards"))
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="needs promtool, of the Debian package prometheus")
Sample = tuple[str, tuple[tuple[str, str], ...]]


def read(text: str) -> dict[Sample, float]:
    """A rendering as Prometheus's Python client reads it."""
    parser = pytest.importorskip("prometheus_client.parser")
    found: dict[Sample, float] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            # The client calls every counter ..._total, as OpenMetrics would have it; Prometheus itself does not.
            name = sample.name.removesuffix("_total") if sample.name.startswith("nv_") else sample.name
            key = name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(meters: Meters, name: str, **labels: str) -> float:
    return read(meters.render())[name, tuple(sorted(labels.items()))]


# --- the oracle: everything that happened is kept, and added up when asked

NAMES = st.one_of(st.sampled_from(["digits", "1", 'a "b"\n\\']), st.text(max_size=8))
NS = st.one_of(st.integers(0, 10**12), st.sampled_from(BOUNDS), st.sampled_from([b + 1 for b in BOUNDS]))
ROWS = st.one_of(st.integers(0, 130), st.integers(1, 10**8), st.sampled_from(SIZES))
EVENTS = st.one_of(
    st.tuples(st.just("batch"), st.lists(NS, max_size=5), ROWS, NS),
    st.tuples(st.just("answered"), st.lists(NS, max_size=5), NS, NS),
    st.tuples(st.just("failed"), st.sampled_from(REASONS), st.integers(0, 9), NS),
    st.tuples(st.just("pending"), st.integers(-9, 9)),
    st.tuples(st.just("step"), st.sampled_from(["decode", "a\\n"]), NS, NS, st.integers(1, 9)),
)


def histogram(
    name: str, labels: dict[str, str], values: list[int], ends: tuple[int, ...], unit: int, total: int
) -> Any:
    for end in (*ends, math.inf):
        text = "+Inf" if end == math.inf else f"{end / unit:g}" if unit > 1 else str(end)
        yield f"{name}_bucket", {**labels, "le": text}, sum(v <= end for v in values)
    yield f"{name}_sum", labels, total / unit if unit > 1 else total
    yield f"{name}_count", labels, len(values)


def expected(history: list[tuple[str, str, tuple[Any, ...]]]) -> dict[Sample, float]:
    """What a rendering must say of models, by direct sums."""
    by_model: dict[tuple[str, str], list[tuple[Any, ...]]] = defaultdict(list)
    for model, version, event in history:
        by_model[model, version].append(event)
    rows: list[tuple[str, dict[str, str], float]] = []
    for (model, version), events in by_model.items():
        tags = {"model": model, "version": version}
        kinds: dict[str, list[Any]] = defaultdict(list)
        for kind, *what in events:
            kinds[kind].append(what)
        waits = [ns for queue, _, _ in kinds["batch"] for ns in queue]
        infer = [ns for _, _, ns in kinds["batch"]]
        sizes = [n for _, n, _ in kinds["batch"]]
        total = [ns for totals, _, _ in kinds["answered"] for ns in totals]
        parsing, encoding = ([r[i] for r in kinds["answered"]] for i in (1, 2))
        rows += [
            ("nv_inference_request_success", tags, len(waits)),
            ("nv_inference_count", tags, sum(sizes)),
            ("nv_inference_exec_count", tags, len(sizes)),
            ("nv_inference_pending_request_count", tags, sum(d for (d,) in kinds["pending"])),
            ("nv_inference_request_duration_us", tags, sum(total) // 1000),
            ("nv_inference_queue_duration_us", tags, sum(waits) // 1000),
            ("nv_inference_compute_input_duration_us", tags, sum(parsing) // 1000),
            ("nv_inference_compute_infer_duration_us", tags, sum(len(q) * ns for q, _, ns in kinds["batch"]) // 1000),
            ("nv_inference_compute_output_duration_us", tags, sum(encoding) // 1000),
            *histogram("trilobe_request_duration_seconds", tags, total, BOUNDS, 10**9, sum(total)),
            *histogram("trilobe_queue_duration_seconds", tags, waits, BOUNDS, 10**9, sum(waits)),
            *histogram("trilobe_compute_duration_seconds", tags, infer, BOUNDS, 10**9, sum(infer)),
            *histogram("trilobe_batch_size", tags, sizes, SIZES, 1, sum(sizes)),
        ]
        for reason in REASONS:
            n = sum(k for r, k, _ in kinds["failed"] if r == reason)
            rows.append(("nv_inference_request_failure", {**tags, "reason": reason}, n))
        for step in {s[0] for s in kinds["step"]}:
            runs = [s for s in kinds["step"] if s[0] == step]
            waits = [q for _, q, _, calls in runs for _ in range(calls)]
            spent = [ns for _, _, ns, _ in runs]
            of_step = {**tags, "step": step}
            rows += histogram("trilobe_step_queue_duration_seconds", of_step, waits, BOUNDS, 10**9, sum(waits))
            rows += histogram("trilobe_step_compute_duration_seconds", of_step, spent, BOUNDS, 10**9, sum(spent))
    return {(name, tuple(sorted(labels.items()))): n for name, labels, n in rows}


def play(meters: Meters, history: list[tuple[str, str, tuple[Any, ...]]]) -> None:
    for model, version, (kind, *what) in history:
        getattr(meters.of(model, version), kind)(*what)


def of_models(text: str) -> dict[Sample, float]:
    return {key: v for key, v in read(text).items() if any(label == "model" for label, _ in key[1])}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAMES, NAMES, EVENTS), max_size=25), st.integers(1, 3))
def test_a_rendering_is_the_direct_sum_over_all_workers(history: list[Any], n_workers: int) -> None:
    workers = [Meters(FOLDER / str(next(NUMBERS)), 0)]
    workers += [Meters(workers[0]._ledger.folder, i) for i in range(1, n_workers)]
    for i, worker in enumerate(workers):
        play(worker, history[i::n_workers])
    for worker in workers:
        assert of_models(worker.render()) == pytest.approx(expected(history), rel=1e-12)
    for worker in workers:
        worker.close()


FOLDER = Path()
NUMBERS = itertools.count()


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("meters")


@given(st.lists(EVENTS, max_size=20))
@settings(max_examples=40, deadline=None)
def test_statistics_are_those_of_triton(events: list[Any]) -> None:
    meters = Meters()
    play(meters, [("m", "1", event) for event in events])
    said = meters.statistics("m", "1")
    batches = [e for e in events if e[0] == "batch"]
    answered = [e for e in events if e[0] == "answered"]
    failed = [e for e in events if e[0] == "failed"]
    n, requests = sum(len(queue) for _, queue, _, _ in batches), sum(len(totals) for _, totals, _, _ in answered)
    want = {
        "success": (n, sum(ns for _, totals, _, _ in answered for ns in totals)),
        "fail": (sum(f[2] for f in failed), sum(f[3] for f in failed)),
        "queue": (n, sum(ns for _, queue, _, _ in batches for ns in queue)),
        "compute_input": (requests, sum(a[2] for a in answered)),
        "compute_infer": (n, sum(len(queue) * ns for _, queue, _, ns in batches)),
        "compute_output": (requests, sum(a[3] for a in answered)),
        "cache_hit": (0, 0),
        "cache_miss": (0, 0),
    }
    assert said["inference_stats"] == {name: {"count": c, "ns": ns} for name, (c, ns) in want.items()}
    assert (said["name"], said["version"]) == ("m", "1")
    assert said["inference_count"] == sum(rows for _, _, rows, _ in batches)
    assert said["execution_count"] == len(batches)
    sizes: Counter[int] = Counter()
    spent: Counter[int] = Counter()
    for _, _, rows, ns in batches:
        size = rows if rows <= 128 else min(2 ** math.ceil(math.log2(rows)), 2**24)
        sizes[size] += 1
        spent[size] += ns
    got = {b["batch_size"]: b["compute_infer"] for b in said["batch_stats"]}
    assert got == {size: {"count": k, "ns": spent[size]} for size, k in sizes.items()}
    if batches:
        assert abs(said["last_inference"] / 1000 - time.time()) < 60
    json.dumps(said)


def test_a_model_that_was_never_called_has_figures_of_zero_and_is_not_made_by_asking() -> None:
    meters = Meters()
    assert meters.statistics("nobody", "1")["batch_stats"] == []
    assert "nobody" not in meters.render()


def test_names_that_are_not_unicode_are_told_all_the_same() -> None:
    meters = Meters()
    meters.of("\udcff", "\ud800").pending(1)
    assert value(meters, "nv_inference_pending_request_count", model="?", version="?") == 1


def test_parts_are_the_steps_of_their_model() -> None:
    meters = Meters()
    part = meters.of("m", "1").part("decode")
    part.batch([1000, 2000], 7, 5000)
    part.failed("BACKEND", 2)
    part.pending(3)
    labels = {"model": "m", "version": "1"}
    assert value(meters, "trilobe_step_queue_duration_seconds_sum", **labels, step="decode") == 3e-6
    assert value(meters, "trilobe_step_compute_duration_seconds_count", **labels, step="decode") == 1
    assert value(meters, "nv_inference_request_failure", **labels, reason="BACKEND") == 2
    assert value(meters, "nv_inference_pending_request_count", **labels) == 3
    assert value(meters, "nv_inference_exec_count", **labels) == 0


def test_named_counters_and_gauges() -> None:
    meters = Meters()
    meters.count("trilobe_shadow_total", model="m", version="2", agrees="true")
    meters.count("trilobe_shadow_total", 2, agrees="true", version="2", model="m")  # in any order
    meters.count("trilobe_http_responses_total", code=503)
    meters.gauge("trilobe_connections", 12)
    meters.gauge("trilobe_connections", 5)
    assert value(meters, "trilobe_shadow_total", model="m", version="2", agrees="true") == 3
    assert value(meters, "trilobe_http_responses_total", code="503") == 1
    assert value(meters, "trilobe_connections") == 5
    assert value(meters, "trilobe_captures_dropped_total") == 0, "there before anything is dropped: rates need it"


@pytest.mark.parametrize(
    ("kind", "name", "labels"),
    [
        ("count", "trilobe_typo_total", {}),
        ("count", "trilobe_connections", {}),
        ("gauge", "trilobe_captures_dropped_total", {}),
        ("count", "trilobe_deferred_total", {}),
        ("count", "trilobe_deferred_total", {"model": "m", "version": "1"}),
        ("gauge", "nv_inference_pending_request_count", {"model": "m", "version": "1"}),
        ("gauge", "trilobe_workers", {}),
    ],
)
def test_what_is_not_in_the_list_is_refused(kind: str, name: str, labels: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="one of trilobe_"):
        getattr(Meters(), kind)(name, 1, **labels)


def test_a_reason_that_triton_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match="REJECTED, CANCELED, BACKEND, OTHER"):
        Meters().of("m", "1").failed("CANCELLED")


def test_the_machine_is_told_as_the_system_tells_it() -> None:
    meters = Meters()
    sum(range(200_000))
    said = read(meters.render())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert said["nv_cpu_memory_total_bytes", ()] == pytest.approx(pages, rel=0.01)
    assert 0 < said["nv_cpu_memory_used_bytes", ()] < said["nv_cpu_memory_total_bytes", ()]
    assert 0 <= said["nv_cpu_utilization", ()] <= 1
    assert said["trilobe_workers", ()] == 1
    resident = said["trilobe_worker_resident_bytes", (("worker", "0"),)]
    assert 0 < resident <= 1.1 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_threads_lose_nothing(tmp_path: Path) -> None:
    meters = Meters(tmp_path)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work() -> None:
        for _ in range(2000):
            meters.of("m", "1").batch([1000], 1, 1000)
            meters.count("trilobe_deferred_total", model="m")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switch)
    assert value(meters, "nv_inference_exec_count", model="m", version="1") == 8000
    assert value(meters, "trilobe_deferred_total", model="m") == 8000


# --- processes

WORKER = """
import sys
from pathlib import Path
from trilobe.infrastructure.serve.metrics import Meters

meters = Meters(Path(sys.argv[1]), int(sys.argv[2]))
meters.gauge("trilobe_connections", 7)
meter = meters.of("m", "1")
meter.pending(3)
for i in range(1, 10**9):
    meter.batch([1000, 2000], 5, 10_000)
    meters.of("m", str(i % 25)).failed("OTHER")  # new ones now and then: the file must grow
    if i % 100 == 0:
        print(i, flush=True)
        if i == int(sys.argv[3]):
            sys.stdin.read()
"""


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Worker processes, in the test's folder; none outlives it."""
    started: list[subprocess.Popen[str]] = []

    def start(worker: int, until: int = 0) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", WORKER, str(tmp_path), str(worker), str(until)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:  # closes its pipes, waits for its end
            pass


def killed(process: "subprocess.Popen[str]") -> int:
    """Kill -9; the last count that was acknowledged."""
    os.kill(process.pid, signal.SIGKILL)
    said = process.communicate()[0].split()
    return int(said[-1]) if said else 0


def test_workers_are_added_up_and_a_kill_loses_nothing(tmp_path: Path, start: Start) -> None:
    workers = [start(i) for i in range(2)]
    assert all(worker.stdout and worker.stdout.readline() for worker in workers)
    scraper = Meters(tmp_path, 9)
    labels = (("model", "m"), ("version", "1"))
    before: dict[Sample, float] = {}
    for _ in range(6):
        said = read(scraper.render())
        counters = {k: v for k, v in said.items() if k[0] == "nv_inference_request_success" or k[0].endswith("_bucket")}
        assert all(v >= before.get(k, 0) for k, v in counters.items()), "a counter went back"
        assert set(before) <= set(counters)
        before = counters
        assert said["trilobe_workers", ()] == 3
        assert said["trilobe_connections", ()] == 14
        assert said["nv_inference_pending_request_count", labels] == 6
    done = [killed(worker) for worker in workers]
    said = read(scraper.render())
    batches = said["nv_inference_exec_count", labels]
    assert sum(done) <= batches <= sum(done) + 202
    assert abs(said["nv_inference_request_success", labels] - 2 * batches) <= 4, "at most one batch each was half told"
    assert said["trilobe_workers", ()] == 1
    assert said["trilobe_connections", ()] == 0, "the connections of the dead are closed"
    assert said["nv_inference_pending_request_count", labels] == 0
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 3

    again = start(1, until=500)
    assert again.stdout and [again.stdout.readline() for _ in range(5)][-1] == "500\n"
    said = read(scraper.render())
    assert said["nv_inference_exec_count", labels] == batches + 500
    assert said["trilobe_worker_starts_total", (("worker", "1"),)] == 2
    assert said["trilobe_connections", ()] == 7
    assert said["nv_inference_pending_request_count", labels] == 3
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 3, "it took up the file it had left"
    killed(again)
    scraper.close()
    assert value(Meters(tmp_path, 5), "nv_inference_exec_count", model="m", version="1") == batches + 500


def test_a_worker_that_still_lives_keeps_its_file(tmp_path: Path) -> None:
    first = Meters(tmp_path, 0)
    second = Meters(tmp_path, 0)
    first.of("m", "1").batch([1], 1, 1)
    second.of("m", "1").batch([1], 1, 1)
    assert value(first, "nv_inference_exec_count", model="m", version="1") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"0.1{SUFFIX}", f"0{SUFFIX}"]
    first.close()
    third = Meters(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 2
    assert value(third, "nv_inference_exec_count", model="m", version="1") == 2
    second.close()
    third.close()


def test_files_grow_and_are_read_again(tmp_path: Path) -> None:
    names = [f"model {i} " + "x" * (i % 7 * 300) for i in range(60)] + ["y" * 100_000]
    first = Meters(tmp_path)
    for name in names:
        first.of(name, "1").batch([1000], 3, 1000)
    assert (tmp_path / f"0{SUFFIX}").stat().st_size > 4 * 65536
    first.close()
    second = Meters(tmp_path)
    second.of("new", "1")
    for name in [*names, "new"]:
        assert second.statistics(name, "1")["inference_count"] == (3 if name != "new" else 0)
    second.close()


def whole(folder: Path) -> bytes:
    """A file as a worker leaves it."""
    meters = Meters(folder)
    play(meters, [("m", "1", ("batch", [1000], 3, 1000)), ("m", "2", ("step", "decode", 1, 2, 3))])
    meters.count("trilobe_deferred_total", model="m")
    meters.close()
    return (folder / f"0{SUFFIX}").read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_passed_over(data: st.DataObject) -> None:
    folder = FOLDER / f"damaged-{next(NUMBERS)}"
    good = whole(folder)
    path = folder / f"0{SUFFIX}"
    used = good.rstrip(b"\0")
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(used)))]
    else:
        at = data.draw(st.integers(0, len(used)))
        junk = data.draw(st.binary(min_size=1, max_size=40))
        bad = good[:at] + junk + good[at + len(junk) :]
    path.write_bytes(bad)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("trilobe.infrastructure.serve.metrics")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        for worker in (1, 0):
            meters = Meters(folder, worker)
            meters.of("own", "1").batch([1], 4, 1)
            for _ in range(3):
                assert f'nv_inference_count{{model="own",version="1"}} {4 if worker else 8}\n' in meters.render()
            assert len(messages) <= 1, messages
            messages.clear()
            meters.close()
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def test_garbage_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"7{SUFFIX}").write_bytes(b"not ours at all" * 100)
    (tmp_path / f"8{SUFFIX}").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("nothing to do with it")
    meters = Meters(tmp_path)
    for _ in range(3):
        meters.render()
    assert len(caplog.records) == 1 and f"7{SUFFIX}: no file of metrics: ignored" in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_the_sharing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    meters = Meters(tmp_path / "file" / "metrics")
    meters.of("m", "1").batch([1], 1, 1)
    assert value(meters, "nv_inference_exec_count", model="m", version="1") == 1
    assert len(caplog.records) == 1 and "in no scrape but its own" in caplog.text


FULL = """
import resource, signal, sys
from pathlib import Path
from trilobe.infrastructure.serve.metrics import Meters

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
meters = Meters(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the disk fills up, in the middle of the second chunk
for i in range(100):
    meters.of("m", str(i)).batch([1], 2, 1)
print(meters.render())
"""


def test_a_full_disk_costs_only_the_sharing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    counts = [v for k, v in read(done.stdout).items() if k[0] == "nv_inference_count"]
    assert counts == [2] * 100
    assert done.stderr.count("\n") == 1 and "in no scrape but its own" in done.stderr
    meters = Meters(tmp_path, 1)
    shared = [v for k, v in read(meters.render()).items() if k[0] == "nv_inference_count"]
    assert set(shared) == {2} and 0 < len(shared) < 100
    meters.close()


# --- what is shipped


def everything(folder: Path | None = None) -> Meters:
    """A server that has seen everything."""
    meters = Meters(folder)
    meter = meters.of("digits", "1")
    meter.batch([120_000, 80_000], 5, 400_000)
    meter.answered([900_000], 20_000, 10_000)
    meter.failed("REJECTED")
    meter.step("decode", 1000, 2000, 3)
    meters.count("trilobe_deferred_total", model="digits")
    meters.count("trilobe_deferral_refused_total", model="digits")
    meters.count("trilobe_grpc_responses_total", code="OK")
    meters.count("trilobe_step_replaced_total", model="digits", step="decode", reason="hung")
    meters.count("trilobe_shadow_total", model="digits", version="2", agrees="false")
    meters.count("trilobe_http_responses_total", code=200)
    meters.gauge("trilobe_ready", 1)
    meters.tally("trilobe_token_pending", client="web", token="a1").add(2)
    return meters


TALLY = """
import sys, time
from pathlib import Path
from trilobe.infrastructure.serve.metrics import Meters
tally = Meters(Path(sys.argv[1]), int(sys.argv[2])).tally("trilobe_token_pending", client="web", token="a1")
tally.add(int(sys.argv[3]))
print(tally.total(), flush=True)
time.sleep(60)
"""


def test_a_tally_is_the_sum_of_those_that_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process is heard at once, and what it held is gone with it, also if it is killed."""
    monkeypatch.setattr("trilobe.infrastructure.serve.metrics._LOOK_SECONDS", 0.0)
    tally = Meters(tmp_path, 0).tally("trilobe_token_pending", client="web", token="a1")
    tally.add(2)

    def begin(worker: int, n: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", TALLY, str(tmp_path), str(worker), str(n)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    others = [begin(1, 3)]
    try:
        assert int(others[0].stdout.readline()) == 5 and tally.total() == 5
        tally.add(-2)
        assert tally.total() == 3
        others.append(begin(2, 4))
        assert int(others[1].stdout.readline()) == 7 and tally.total() == 7
        others[0].kill()
        others[0].wait()
        assert tally.total() == 4, "what a killed worker held is nobody's"
        others.append(begin(1, 1))
        assert int(others[2].stdout.readline()) == 5 and tally.total() == 5, "and its successor begins at zero"
    finally:
        for other in others:
            other.kill()
            other.wait()
            other.stdout.close()


def test_a_tally_without_a_folder_counts_alone() -> None:
    first, second = (Meters().tally("trilobe_token_pending", client="web", token="a1") for _ in range(2))
    first.add(1)
    assert (first.total(), second.total()) == (1, 0)
    with pytest.raises(UsageError, match="a gauge called"):
        Meters().tally("trilobe_token_pending", client="web")


def test_a_counter_that_had_other_labels_once_is_passed_over(tmp_path: Path) -> None:
    """What a server of before left in its folder must not keep this one from being scraped."""
    meters = everything(tmp_path)
    meters._ledger.slots("counter", "trilobe_shadow_total", "digits", "false")[0] = 98765
    meters._ledger.slots("counter", "trilobe_gone_total", "digits")[0] = 98765
    meters.close()
    text = Meters(tmp_path).render()
    assert 'trilobe_shadow_total{model="digits",version="2",agrees="false"} 1\n' in text and "98765" not in text


def test_every_metric_is_rendered_with_its_type_and_labels() -> None:
    text = everything().render()
    found = {key[0]: {label for label, _ in key[1]} for key in read(text)}
    for family in FAMILIES:
        assert f"# TYPE {family.name} {family.kind}\n" in text
        assert re.search(rf"^# HELP {family.name} \S", text, re.MULTILINE)
        names = [family.name + end for end in (("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",))]
        for name in names:
            assert found.pop(name) == set(family.labels) | ({"le"} if name.endswith("_bucket") else set())
    assert found == {}
    assert text.endswith("\n") and "\n\n" not in text


def test_the_reference_lists_every_metric() -> None:
    page = (ROOT / "docs" / "reference" / "serve-metrics.md").read_text("utf-8")
    for f in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in f.labels)
        assert f"| `{f.name}` | {f.kind} | {labels} | {f.help} |" in page
    assert page.count("\n| `") == len(FAMILIES)


def test_the_page_on_operation_speaks_of_what_there_is() -> None:
    page = (ROOT / "docs" / "how-to" / "operate.md").read_text("utf-8")
    named = {name.removesuffix("_sum") for name in re.findall(r"`((?:nv|trilobe)_\w+)`", page)}
    assert len(named) > 15 and named <= {f.name for f in FAMILIES}
    keys = set(re.findall(r"`serve\.(\w+)`", page)) | set(re.findall(r"^(\w+) = ", page, re.MULTILINE))
    assert len(keys) > 7 and keys <= set(ServeSection.__struct_fields__), keys - set(ServeSection.__struct_fields__)
    assert re.findall(r"^\| (Trilobe\w+) \|", page, re.MULTILINE) == re.findall(r"alert: (\w+)", alerts())


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DASHBOARDS / "grafana.json").read_text("utf-8"))
    return found


def expressions() -> list[str]:
    """All queries of the dashboard, with Grafana's variables filled in."""
    filled = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "10s")
            filled.append(re.sub(r"\$(job|model|version)\b", ".*", text))
    return filled


def alerts() -> str:
    return (DASHBOARDS / "alerts.yml").read_text("utf-8")


def test_the_dashboard_has_the_structure_that_grafana_reads() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 36 and board["title"] and board["uid"]
    variables = {v["name"] for v in board["templating"]["list"]}
    assert variables == {"datasource", "job", "model", "version"}
    panels = board["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        area = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & area, f"{panel['title']} overlaps"
        cells |= area
        assert panel["title"] and panel["type"] in {"row", "stat", "timeseries", "heatmap"}
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
            assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
    used = {name for e in json.dumps(panels).split("$")[1:] for name in re.findall(r"^\w+", e)}
    assert used <= variables | {"__rate_interval"}


def test_dashboard_and_alerts_ask_for_metrics_that_exist() -> None:
    there = {key[0] for key in read(everything().render())}
    rules = re.findall(r"expr: (?:\|\n((?: {10}.*\n)+)|(.*))", alerts())
    asked = set(re.findall(r"\b(?:nv|trilobe)_\w+", " ".join([*expressions(), *map("".join, rules)])))
    assert len(rules) == 12 and len(asked) > 25
    assert asked <= there, asked - there


@needs_promtool
def test_promtool_accepts_rendering_rules_and_queries(tmp_path: Path) -> None:
    linted = subprocess.run([PROMTOOL, "check", "metrics"], input=everything().render(), capture_output=True, text=True)
    complaints = [line for line in linted.stderr.splitlines() if not line.startswith("nv_")]  # Triton's names are so
    assert complaints == [] and linted.returncode in (0, 3)
    rules = [{"record": f"query:{i}", "expr": e} for i, e in enumerate(expressions())]
    (tmp_path / "queries.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    for path in (DASHBOARDS / "alerts.yml", tmp_path / "queries.yml"):
        subprocess.run([PROMTOOL, "check", "rules", path], capture_output=True, text=True, check=True)


# For each alert: series in which it must be heard, series in which it must not, both after 30 minutes.
M = 'job="trilobe",instance="a",model="m",version="1"'
FIRES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "TrilobeDown": ({'up{job="trilobe-1"}': "0x30"}, {'up{job="trilobe-1"}': "1x30", 'up{job="other"}': "0x30"}),
    "TrilobeAbsent": ({'up{job="trilobe"}': "1x30"}, {'trilobe_workers{job="trilobe"}': "1x30"}),
    "TrilobeNotReady": (
        {'trilobe_ready{job="trilobe",instance="a"}': "1x30", 'trilobe_workers{job="trilobe",instance="a"}': "2x30"},
        {'trilobe_ready{job="trilobe",instance="a"}': "2x30", 'trilobe_workers{job="trilobe",instance="a"}': "2x30"},
    ),
    "TrilobeErrors": (
        {f"nv_inference_request_success{{{M}}}": "0+980x30",
         f'nv_inference_request_failure{{{M},reason="BACKEND"}}': "0+20x30"},
        {f"nv_inference_request_success{{{M}}}": "0+999x30",
         f'nv_inference_request_failure{{{M},reason="BACKEND"}}': "0+1x30",
         f'nv_inference_request_failure{{{M},reason="CANCELED"}}': "0+50x30"},
    ),
    "TrilobeRejects": (
        {f"nv_inference_request_success{{{M}}}": "0+980x30",
         f'nv_inference_request_failure{{{M},reason="REJECTED"}}': "0+20x30"},
        {f"nv_inference_request_success{{{M}}}": "0+980x30",
         f'nv_inference_request_failure{{{M},reason="BACKEND"}}': "0+20x30"},
    ),
    "TrilobeSlow": (
        {f'trilobe_request_duration_seconds_bucket{{{M},le="0.5"}}': "0+97x30",
         f'trilobe_request_duration_seconds_bucket{{{M},le="1"}}': "0+100x30",
         f'trilobe_request_duration_seconds_bucket{{{M},le="+Inf"}}': "0+100x30"},
        {f'trilobe_request_duration_seconds_bucket{{{M},le="0.5"}}': "0+1000x30",
         f'trilobe_request_duration_seconds_bucket{{{M},le="1"}}': "0+1001x30",
         f'trilobe_request_duration_seconds_bucket{{{M},le="+Inf"}}': "0+1001x30"},
    ),
    "TrilobeQueues": (
        {f"nv_inference_queue_duration_us{{{M}}}": "0+2000000x30",
         f"nv_inference_request_duration_us{{{M}}}": "0+3000000x30",
         f"nv_inference_request_success{{{M}}}": "0+100x30"},
        {f"nv_inference_queue_duration_us{{{M}}}": "0+20000x30",
         f"nv_inference_request_duration_us{{{M}}}": "0+30000x30",
         f"nv_inference_request_success{{{M}}}": "0+100x30"},
    ),
    "TrilobePendingGrows": (
        {f"nv_inference_pending_request_count{{{M}}}": "0+20x30"},
        {f"nv_inference_pending_request_count{{{M}}}": "50 0 80 0 90 0 100 0 100 0 120 0 140 0 150 0 160 0 200"},
    ),
    "TrilobeCapturesDropped": (
        {'trilobe_captures_dropped_total{job="trilobe",instance="a"}': "0x20 1x10"},
        {'trilobe_captures_dropped_total{job="trilobe",instance="a"}': "7x30"},
    ),
    "TrilobeDeskFull": (
        {'trilobe_deferral_refused_total{job="trilobe",instance="a",model="m"}': "0x20 1x10"},
        {'trilobe_deferral_refused_total{job="trilobe",instance="a",model="m"}': "7x30"},
    ),
    "TrilobeClientsLimited": (
        {'trilobe_http_responses_total{job="trilobe",instance="a",code="200"}': "0+990x30",
         'trilobe_grpc_responses_total{job="trilobe",instance="a",code="OK"}': "0+980x30",
         'trilobe_grpc_responses_total{job="trilobe",instance="a",code="RESOURCE_EXHAUSTED"}': "0+20x30"},
        {'trilobe_http_responses_total{job="trilobe",instance="a",code="200"}': "0+999x30",
         'trilobe_http_responses_total{job="trilobe",instance="a",code="429"}': "0+1x30",
         'trilobe_grpc_responses_total{job="trilobe",instance="a",code="INTERNAL"}': "0+9x30"},
    ),
    "TrilobeWorkerRestarts": (
        {'trilobe_worker_starts_total{job="trilobe",instance="a",worker="0"}': "1x20 2 3 4 5 5 5 5 5 5 5 5"},
        {'trilobe_worker_starts_total{job="trilobe",instance="a",worker="0"}': "1x20 2x10"},
    ),
}  # fmt: skip


@needs_promtool
def test_alerts_are_heard_when_they_should_be_and_only_then(tmp_path: Path) -> None:
    assert set(FIRES) == set(re.findall(r"alert: (\w+)", alerts()))
    for name, cases in FIRES.items():
        for series, heard in zip(cases, (True, False), strict=True):
            rules = {
                "rule_files": [str(DASHBOARDS / "alerts.yml")],
                "evaluation_interval": "1m",
                "tests": [
                    {
                        "interval": "1m",
                        "input_series": [{"series": s, "values": v} for s, v in series.items()],
                        "promql_expr_test": [
                            {
                                "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
                                "eval_time": "29m",
                                "exp_samples": [{"labels": "{}", "value": 1}] if heard else [],
                            }
                        ],
                    }
                ],
            }
            (tmp_path / "test.yml").write_text(json.dumps(rules))
            done = subprocess.run(
                [str(PROMTOOL), "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True
            )
            assert done.returncode == 0, f"{name}, {heard}: {done.stdout}{done.stderr}"


class Scraped(BaseHTTPRequestHandler):
    """/metrics of a server that is busy."""

    def __init__(self, meters: Meters, *args: Any) -> None:
        self.meters = meters
        super().__init__(*args)

    def do_GET(self) -> None:
        play(self.meters, [("digits", "1", ("batch", [120_000] * 9, 12, 400_000))])
        play(self.meters, [("digits", "1", ("answered", [900_000], 20_000, 10_000))] * 9)
        play(self.meters, [("digits", "1", ("step", "decode", 1000, 2000, 3))])
        self.meters.count("trilobe_shadow_total", model="digits", version="2", agrees="false")
        body = self.meters.render().encode()
        self.send_response(200)
        self.send_header("content-type", CONTENT_TYPE)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    """A real Prometheus that scrapes a busy server each half second, with our alert rules."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("needs prometheus, the Debian package")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Scraped, everything(tmp_path / "metrics")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"127.0.0.1:{server.server_address[1]}"
    scrape = {"job_name": "trilobe", "scrape_interval": "500ms", "static_configs": [{"targets": [here]}]}
    config = {"rule_files": [str(DASHBOARDS / "alerts.yml")], "scrape_configs": [scrape]}
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    process = subprocess.Popen(
        [program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()
    server.shutdown()
    server.server_close()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def ask(url: str, path: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
        return json.loads(answer.read())["data"]


@pytest.mark.slow
def test_a_real_prometheus_answers_every_query_of_the_dashboard(prometheus: str) -> None:
    def scrapes() -> float:
        try:
            found = ask(prometheus, "/api/v1/query", query="count_over_time(trilobe_workers[1m])")["result"]
        except OSError:
            return 0
        return float(found[0]["value"][1]) if found else 0

    deadline = time.monotonic() + 60
    while scrapes() < 4 and time.monotonic() < deadline:
        time.sleep(0.25)
    for expression in expressions():
        result = ask(prometheus, "/api/v1/query", query=expression)["result"]
        assert result, f"no answer to {expression}"
        numbers = [float(series["value"][1]) for series in result]
        assert all(n == n for n in numbers) or "deferred" in expression, f"{expression} is {numbers}"
    target = ask(prometheus, "/api/v1/targets")["activeTargets"][0]
    assert target["health"] == "up" and target["lastError"] == ""
    known = {name for name in ask(prometheus, "/api/v1/label/__name__/values") if name.startswith(("nv_", "trilobe_"))}
    assert known == {key[0] for key in read(everything().render())}
