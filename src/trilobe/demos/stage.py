"""What every demonstration does the same way: its folder, its steps, its clients, two arms side by side."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilobe import loop
from trilobe.errors import TrilobeError, UsageError
from trilobe.infrastructure.capture import read_captures
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.monitor import Window
from trilobe.loop.project import Project, indented, opened, tell
from trilobe.loop.story import tell_story
from trilobe.types import Endpoint, Evidence

MARK = ".trilobe-demo"  # says that a folder may be replaced
Curve = list[dict[str, Any]]
Items = Sequence[str] | NDArray[Any]


class Caller(threading.Thread):
    """A client that keeps calling with one item after the other (pixels, or a text) and counts what it gets."""

    def __init__(self, endpoint: Endpoint, items: Items) -> None:
        super().__init__(daemon=True)
        self.endpoint, self.items = endpoint, items
        self.requests = self.failed = 0
        self.seconds: list[float] = []
        self.versions: set[str] = set()
        self.enough = threading.Event()

    def run(self) -> None:
        """Call until told that it is enough."""
        with Client(self.endpoint.url, self.endpoint.name) as client:
            while not self.enough.is_set():
                self.one(client, self.items[self.requests % len(self.items)])
                self.enough.wait(0.004)

    def one(self, client: Client, item: Any) -> None:
        """One request, counted."""
        started = time.perf_counter()
        self.requests += 1
        try:
            client.infer([item] if isinstance(item, str) else item[None])
            self.versions.add(client.version)
        except TrilobeError:
            self.failed += 1
        self.seconds.append(time.perf_counter() - started)


@dataclass
class Stage:
    """What the story needs at every step, and how long each took."""

    folder: Path
    seed: int
    told: dict[str, Any] = field(default_factory=dict)
    stages: list[tuple[str, float]] = field(default_factory=list)
    requests: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """A step of the story, announced and timed."""
        tell(f"\n{len(self.stages) + 1}. {title}")
        started = time.perf_counter()
        with indented():
            yield
        self.stages.append((name, time.perf_counter() - started))

    def send(self, endpoint: Endpoint, items: Items) -> None:
        """Traffic: one request an item, then wait until all of it is captured."""
        caller = Caller(endpoint, items)
        before = len(read_captures(self.folder / ".trilobe" / "captures"))
        with Client(endpoint.url, endpoint.name) as client:
            for item in items:
                caller.one(client, item)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if len(read_captures(self.folder / ".trilobe" / "captures")) >= before + len(items) - caller.failed:
                break
            time.sleep(0.05)
        self.count(caller)

    def count(self, caller: Caller) -> None:
        """Add a client's counts to the whole."""
        self.requests += caller.requests
        self.failed += caller.failed
        self.seconds += caller.seconds


def clear(folder: Path) -> None:
    """Make room: only an earlier demonstration is removed, never anybody's project."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", expected="a folder to make", hint="trilobe demo --project elsewhere")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise UsageError(
                f"{folder} is not empty", expected="an empty folder", hint="trilobe demo --project elsewhere"
            )
        with contextlib.suppress(TrilobeError), opened(folder) as p:
            loop.serve(project=p, stop=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("A demonstration of Trilobe; `trilobe demo` may replace this folder.\n", "utf-8")


def play(
    stage: Any, command: str, verdict: Callable[[dict[str, Any]], str], *acts: Callable[[Any], None]
) -> dict[str, Any]:
    """The acts of a story, one after the other, and its report; however they end, no server is left behind."""
    started = time.perf_counter()
    try:
        for act in acts:
            act(stage)
    finally:
        with opened(stage.folder) as p:
            if (p.endpoint_folder(None) / "state.json").exists():
                loop.serve(project=p, stop=True)
    took = time.perf_counter() - started
    told: dict[str, Any] = stage.told | {"failed_requests": stage.failed, "requests": stage.requests,
                                         "seconds": round(took, 1)}  # fmt: skip
    traffic = {"requests": stage.requests, "failed": stage.failed, "swaps": 1,
               "median_seconds": float(np.median(stage.seconds))}  # fmt: skip
    with opened(stage.folder) as p:
        tell_story(p, stages=stage.stages, command=command, verdict=verdict(told), traffic=traffic)
        path = loop.report(p)
    tell(f"\n{took:.0f} seconds. Open {path} in a browser.")
    return told | {"report": str(path)}


def random_copy(folder: Path, strategy: str) -> Path:
    """A copy of a fresh project that asks at random, to be run beside it."""
    control = folder / "control"
    shutil.copytree(folder, control, ignore=shutil.ignore_patterns("files", "control"))
    config = (control / "trilobe.toml").read_text("utf-8")
    (control / "trilobe.toml").write_text(config.replace(f'strategy = "{strategy}"', 'strategy = "random"'), "utf-8")
    return control


def two_arms(folder: Path, control: Path, learn: Callable[..., Curve], rounds: int, *given: Any) -> tuple[Curve, Curve]:
    """``learn(folder, *given)`` in two processes: the same budget of answers spent by the strategy and at random."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as two:
        arms: list[Future[Curve]] = [two.submit(learn, str(where), *given) for where in (folder, control)]
        seen = 0
        while not all(a.done() for a in arms):
            time.sleep(0.2)
            seen = _follow(folder, seen, rounds)
        _follow(folder, seen, rounds)
        chosen, control_curve = (a.result() for a in arms)
    with opened(folder) as p:
        tell_story(p, curve_random=control_curve)
    return chosen, control_curve


def _follow(folder: Path, seen: int, rounds: int) -> int:
    """Say what the other process has got to: one process writes, others read."""
    with opened(folder) as p:
        curve = list(p.store.journal("curve/").values())
    for point in curve[seen:]:
        figure = point["figure"].replace("accuracy", "right")
        tell(f"round {point['round']}: {point['answers']} answers, {point['accuracy']:.1%} {figure}")
    tell("rounds", len(curve), rounds)
    return len(curve)


def told_evidence(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """Say what was checked, and give it as plain values."""
    for e in evidence:
        mark = {True: "passed", False: "FAILED", None: "no gate"}[e.passed]
        tell(f"{e.check:<22} {e.figure:8.4g}   {mark}")
    return [{"check": e.check, **interval(e), "threshold": e.threshold, "passed": e.passed} for e in evidence]


def interval(e: Evidence) -> dict[str, float]:
    """A figure with its interval, as plain values."""
    return {"figure": e.figure, "low": e.low, "high": e.high, "n": e.n}


def watch(p: Project) -> list[dict[str, Any]]:
    """Look at the newest window and say what was found."""
    window: Window = loop.monitor(p)
    for message in [f.message for f in window.findings] or [window.message]:
        tell(f"{'found' if window.findings else window.verdict}: {message}")
    return [{"id": f.id, "kind": f.kind, "message": f.message, "figure": f.figure, "low": f.low, "high": f.high,
             "p_value": f.p_value, "n": f.n} for f in window.findings]  # fmt: skip
