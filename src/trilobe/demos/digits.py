"""The loop on the 1,797 handwritten digits of scikit-learn, from an unlabeled pool to a repaired endpoint.

Nothing is staged: the annotators are simulated (their confusion matrices stand in ``data/annotators.py``), everything
else is the product doing its work. The digits are dealt into four hands that never mix: the pool, a held-out test part,
what clients send on good days, and what they send when the style of writing changes.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilobe import loop
from trilobe.data.annotators import SimulatedAnnotator, typical_crowd
from trilobe.data.beliefs import AnswerTable, majority_vote
from trilobe.errors import MissingExtra, TrilobeError, UsageError
from trilobe.infrastructure.capture import read_captures
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.monitor import Window, false_alarm_rate
from trilobe.loop.asking import Answerer, unpack_beliefs
from trilobe.loop.project import Project, annotators, indented, opened, seed_of, tell
from trilobe.loop.story import tell_story
from trilobe.tasks.image_classification.data import Pixels, encode, encode_png
from trilobe.trust.metrics import accuracy
from trilobe.types import Endpoint, Evidence, Example, LabelSpace, Question, Response

SPACE = LabelSpace(tuple("0123456789"))
ROUNDS, FIRST, PER_ROUND, PEOPLE = 6, 20, 20, 3
WINDOW, REPAIR = 200, 60
MARK = ".trilobe-demo"  # says that a folder may be replaced
TARGET, STRENGTH = "8", 0.15
CONFIG = f"""\
[project]
name = "digits"
seed = {{seed}}

[labels]
names = {list(SPACE.names)}

[query]
strategy = "{{strategy}}"
first = {FIRST}
n = {PER_ROUND}
answers = {PEOPLE}
annotators = {{people}}

[check.gates]
accuracy = 0.9
ece = 0.1
"robust_accuracy@0.02" = 0.5
parity = 1e-4

[monitor]
window = {WINDOW}
"""


@dataclass
class Digits:
    """The four hands: pixels ``(n, 8, 8, 1)`` and their classes ``(n,)``."""

    pool: tuple[Pixels, NDArray[np.intp]]
    test: tuple[Pixels, NDArray[np.intp]]
    usual: tuple[Pixels, NDArray[np.intp]]
    changed: tuple[Pixels, NDArray[np.intp]]


def deal(seed: int) -> Digits:
    """The digits as images, dealt at random: 997 pool, 400 test, 200 usual traffic, 200 for the new style."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise MissingExtra(
            "the digits come with scikit-learn, which is not installed", hint="pip install 'trilobe[demo]'"
        ) from e
    data = load_digits()
    images = (data.images / 16 * 255).round().astype(np.uint8)[..., None]
    order = np.random.default_rng(seed_of(seed, "deal")).permutation(len(images))
    hands = np.split(order, [len(images) - 800, len(images) - 400, len(images) - 200])
    return Digits(*((images[i], data.target[i].astype(np.intp)) for i in hands))


def new_style(images: Pixels) -> Pixels:
    """White on black becomes black on white, and slanted: the digits as another scanner and another hand make them."""
    from PIL import Image

    slant = [
        Image.fromarray(i[:, :, 0]).transform((8, 8), Image.Transform.AFFINE, (1, 0.35, -1.4, 0, 1, 0), 2)
        for i in images
    ]
    return 255 - np.stack([np.asarray(s) for s in slant])[..., None]


def crowd_answerer(truth: dict[str, int], crowd: list[SimulatedAnnotator], seed: int) -> Answerer:
    """The simulated annotators; the same question always gets the same answer of the same person."""
    by_name = {a.name: a for a in crowd}

    def answer(question: Question, example: Example, who: str) -> tuple[Response, float]:
        rng = np.random.default_rng(seed_of(seed, "answer", question.id, who))
        return by_name[who].answer(question, truth[example.id], SPACE, rng)

    return answer


def ids_of(images: Pixels, labels: NDArray[np.intp]) -> dict[str, int]:
    """Example id -> class, for images that go in as PNG files."""
    import hashlib

    return {hashlib.sha256(encode_png(i)).hexdigest(): int(label) for i, label in zip(images, labels, strict=True)}


def collect(folder: Path, digits: Digits, seed: int, strategy: str = "margin") -> loop.Added:
    """A fresh project with the pool and the test part in it; five copies and a broken file slip in, to be noticed."""
    from PIL import Image

    people = [a.name for a in typical_crowd(SPACE)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trilobe.toml").write_text(CONFIG.format(seed=seed, strategy=strategy, people=people), "utf-8")
    loop.init(folder)
    files = folder / "files"
    for split, (images, labels) in (("test", digits.test), ("pool", digits.pool)):
        for n, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = files / split / (SPACE.names[label] if split == "test" else "") / f"{n:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(image))
    for n in range(5):
        Image.fromarray(digits.pool[0][n][:, :, 0]).save(files / "pool" / f"copy-{n}.bmp")
    (files / "pool" / "broken.png").write_bytes(encode_png(digits.pool[0][0])[:60])
    loop.add([files / "test"], folder, split="test", labels="folders")
    return loop.add([files / "pool"], folder)


def learn(folder: str, truth: dict[str, int], seed: int) -> list[dict[str, Any]]:
    """The rounds of one arm until the budget is spent: its learning curve. Runs in a process of its own."""
    import torch

    torch.set_num_threads(1)  # two arms, two cores
    answerer = crowd_answerer(truth, typical_crowd(SPACE, ("3", "8")), seed)
    budget = PEOPLE * (FIRST + PER_ROUND * (ROUNDS - 1))
    return list(loop.run(answerer, folder, goal=2.0, budget=budget, promote=False).rounds)


class Caller(threading.Thread):
    """A client that keeps calling and counts what it gets."""

    def __init__(self, endpoint: Endpoint, images: Pixels) -> None:
        super().__init__(daemon=True)
        self.endpoint, self.images = endpoint, images
        self.requests = self.failed = 0
        self.seconds: list[float] = []
        self.versions: set[str] = set()
        self.enough = threading.Event()

    def run(self) -> None:
        """Call until told that it is enough."""
        with Client(self.endpoint.url, self.endpoint.name) as client:
            while not self.enough.is_set():
                self.one(client, self.images[self.requests % len(self.images)][None])
                self.enough.wait(0.004)

    def one(self, client: Client, image: Pixels) -> None:
        """One request, counted."""
        started = time.perf_counter()
        self.requests += 1
        try:
            client.infer(image)
            self.versions.add(client.version)
        except TrilobeError:
            self.failed += 1
        self.seconds.append(time.perf_counter() - started)


@dataclass
class Stage:
    """What the story needs at every step, and how long each took."""

    folder: Path
    seed: int
    digits: Digits
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

    def send(self, endpoint: Endpoint, images: Pixels) -> None:
        """Traffic: one request an image, then wait until all of it is captured."""
        caller = Caller(endpoint, images)
        before = len(read_captures(self.folder / ".trilobe" / "captures"))
        with Client(endpoint.url, endpoint.name) as client:
            for image in images:
                caller.one(client, image[None])
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if len(read_captures(self.folder / ".trilobe" / "captures")) >= before + len(images) - caller.failed:
                break
            time.sleep(0.05)
        self.count(caller)

    def count(self, caller: Caller) -> None:
        """Add a client's counts to the whole."""
        self.requests += caller.requests
        self.failed += caller.failed
        self.seconds += caller.seconds


def run(folder: Path, seed: int = 0) -> dict[str, Any]:
    """The whole story; see :func:`trilobe.demos.demo`."""
    started = time.perf_counter()
    _clear(folder)
    stage = Stage(folder, seed, deal(seed))
    try:
        _learn_and_promote(stage)
        _go_wrong_and_repair(stage)
    finally:
        with opened(folder) as p:
            if (p.endpoint_folder(None) / "state.json").exists():
                loop.serve(project=p, stop=True)
    took = time.perf_counter() - started
    told = stage.told | {"failed_requests": stage.failed, "requests": stage.requests, "seconds": round(took, 1)}
    with opened(folder) as p:
        tell_story(
            p, stages=stage.stages, command=f"trilobe demo --seed {seed}", verdict=_verdict(told),
            traffic={"requests": stage.requests, "failed": stage.failed, "swaps": 1,
                     "median_seconds": float(np.median(stage.seconds))},
        )  # fmt: skip
        path = loop.report(p)
    told["report"] = str(path)
    tell(f"\n{took:.0f} seconds. Open {path} in a browser.")
    return told


def _clear(folder: Path) -> None:
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


def _learn_and_promote(s: Stage) -> None:
    truth = ids_of(*s.digits.pool)
    control = s.folder / "control"
    with s.step("pool", "Pool: 997 unlabeled digits go in, 400 are held out to grade with"):
        added = collect(s.folder, s.digits, s.seed)
        tell(f"{len(added.added)} added, {len(added.duplicates)} duplicates recognized, {len(added.refused)} refused")
        shutil.copytree(s.folder, control, ignore=shutil.ignore_patterns("files", "control"))
        config = (control / "trilobe.toml").read_text("utf-8")
        (control / "trilobe.toml").write_text(config.replace('strategy = "margin"', 'strategy = "random"'), "utf-8")
    with s.step("learning", "Questions, answers, beliefs, model: round by round, beside random"):
        chosen, control_curve = _two_arms(s, control, truth)
        last, base = chosen[-1], control_curve[-1]
        tell(f"{last['answers']} answers: {last['accuracy']:.1%} right; picked at random: {base['accuracy']:.1%}")
        s.told |= {"rounds": chosen, "rounds_random": control_curve,
                   "accuracy": last["accuracy"], "accuracy_random": base["accuracy"]}  # fmt: skip
        _judge_answers(s, truth)
    with s.step("check", "Check: accuracy, calibration, attacks, parity of the exported graph"):
        evidence = loop.check(s.folder)
        for e in evidence:
            mark = {True: "passed", False: "FAILED", None: "no gate"}[e.passed]
            tell(f"{e.check:<22} {e.figure:8.4g}   {mark}")
        s.told["gates"] = [{"check": e.check, **_interval(e), "threshold": e.threshold, "passed": e.passed}
                           for e in evidence]  # fmt: skip
    with s.step("package and serve", "Package and serve: a sealed bundle behind the name 'digits'"):
        bundle = loop.package(s.folder)
        endpoint = loop.serve(project=s.folder, background=True)
        tell(f"bundle {bundle.id} at {endpoint.url}/v2/models/digits")


def _two_arms(s: Stage, control: Path, truth: dict[str, int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same budget of answers spent by the strategy and at random, side by side in two processes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as two:
        arms: list[Future[list[dict[str, Any]]]] = [
            two.submit(learn, str(folder), truth, s.seed) for folder in (s.folder, control)
        ]
        seen = 0
        while not all(a.done() for a in arms):
            time.sleep(0.2)
            seen = _follow(s.folder, seen)
        _follow(s.folder, seen)
        chosen, control_curve = (a.result() for a in arms)
    with opened(s.folder) as p:
        tell_story(p, curve_random=control_curve)
    return chosen, control_curve


def _follow(folder: Path, seen: int) -> int:
    """Say what the other process has got to: one process writes, others read."""
    with opened(folder) as p:
        curve = list(p.store.journal("curve/").values())
    for point in curve[seen:]:
        tell(f"round {point['round']}: {point['answers']} answers, {point['accuracy']:.1%} right")
    tell("rounds", len(curve), ROUNDS)
    return len(curve)


def _judge_answers(s: Stage, truth: dict[str, int]) -> None:
    """Hold the estimates against the truth, which only the demonstration knows."""
    true = {a.name: a.quality for a in typical_crowd(SPACE, ("3", "8"))}
    with opened(s.folder) as p:
        people = [{"name": a["name"], "estimated": a["quality"], "true": true[a["name"]], "answers": a["n"]}
                  for a in annotators(p)]  # fmt: skip
        beliefs = unpack_beliefs(p.store.blobs.get(p.store.recorded("aggregate")["beliefs"]))
        pool = {e.id for e in p.store.examples("pool")}
        table = AnswerTable.from_answers([a for a in p.store.answers() if a.example_id in pool], p.space)
        votes = majority_vote(table)
        top = np.isclose(votes, votes.max(axis=1, keepdims=True))
        right = np.array([top[i, truth[e]] / top[i].sum() for i, e in enumerate(table.examples)])
        weighed = sum(int(b.proba.argmax()) != truth[b.example_id] for b in beliefs)
        wrong = {"majority": round(len(right) - float(right.sum())), "weighed": weighed, "judged": len(beliefs)}
        tell_story(p, true_quality=true, wrong=wrong)
    for a in people:
        tell(f"{a['name']:<5} estimated {a['estimated']:.2f}, true {a['true']:.2f}")
    tell(f"wrong labels: {wrong['weighed']} weighed by that, {wrong['majority']} by majority vote, of {len(beliefs)}")
    s.told |= {"annotators": people, "wrong_labels": wrong}


def _go_wrong_and_repair(s: Stage) -> None:
    with opened(s.folder) as p:
        endpoint = loop.serve(project=p)
        first = p.store.model()
        module = p.module(first)
        old = accuracy(p.predict(first, encode(s.digits.test[0], first.preprocessing)), s.digits.test[1])
        new = accuracy(p.predict(first, encode(new_style(s.digits.test[0]), first.preprocessing)), s.digits.test[1])
        with s.step("clean traffic", "Usual traffic: nothing should be found"):
            s.send(endpoint, s.digits.usual[0])
            s.told["findings_clean"] = _watch(p)
            _count_false_alarms(s, p)
        with s.step("attack", f"Adversarial traffic: images changed so that they look like {TARGET!r} to the model"):
            s.send(endpoint, _attack(s, module, first.preprocessing))
            s.told["findings_adversarial"] = _watch(p)
            loop.explain(p)
        with s.step("new style", "Traffic in a new style: inverted and slanted digits"):
            s.send(endpoint, new_style(s.digits.changed[0]))
            s.told["findings_shift"] = _watch(p)
            loop.explain(p)
            tell(f"accuracy on the new style: {new.figure:.1%} (on the old one {old.figure:.1%})")
        with s.step("repair", f"Repair: the flagged captures become {REPAIR} questions, while a client keeps calling"):
            caller = Caller(endpoint, s.digits.usual[0])
            caller.start()
            repaired = _repair(s, p)
            caller.enough.set()
            caller.join()
            s.count(caller)
        old_after = accuracy(p.predict(repaired, encode(s.digits.test[0], first.preprocessing)), s.digits.test[1])
        new_after = accuracy(
            p.predict(repaired, encode(new_style(s.digits.test[0]), first.preprocessing)), s.digits.test[1]
        )
        tell(f"new style {new.figure:.1%} -> {new_after.figure:.1%}")
        tell(f"old style {old.figure:.1%} -> {old_after.figure:.1%}")
        tell(f"{caller.requests} requests meanwhile, {caller.failed} failed; {len(caller.versions)} bundles answered")
        s.told |= {
            "accuracy_shift_before": new.figure, "accuracy_shift_after": new_after.figure,
            "accuracy_old_before": old.figure, "accuracy_old_after": old_after.figure, "repair_answers": REPAIR,
        }  # fmt: skip
        changes = [
            {"name": "the new style", "before": _interval(new), "after": _interval(new_after)},
            {"name": "the old style", "before": _interval(old), "after": _interval(old_after)},
        ]
        counted = {"requests": caller.requests, "failed": caller.failed, "bundle_id": p.store.bundle().id}
        tell_story(p, repair={"changes": changes, "new_answers": REPAIR, **counted})


def _interval(e: Evidence) -> dict[str, float]:
    return {"figure": e.figure, "low": e.low, "high": e.high, "n": e.n}


def _watch(p: Project) -> list[dict[str, Any]]:
    window: Window = loop.monitor(p)
    for message in [f.message for f in window.findings] or [window.message]:
        tell(f"{'found' if window.findings else window.verdict}: {message}")
    return [{"id": f.id, "kind": f.kind, "message": f.message, "figure": f.figure, "low": f.low, "high": f.high,
             "p_value": f.p_value, "n": f.n} for f in window.findings]  # fmt: skip


def _count_false_alarms(s: Stage, p: Project) -> None:
    """How often the monitor cries wolf: 300 windows in which nothing happened, drawn from unseen digits."""
    model = p.store.model()
    unseen = np.concatenate([s.digits.test[0], s.digits.usual[0], s.digits.changed[0]])
    proba = p.predict(model, encode(unseen, model.preprocessing))
    rate, low, high = false_alarm_rate(proba, n_windows=300, window=WINDOW, alpha=p.config.monitor.alpha, seed=s.seed)
    tell(f"false alarms in 300 clean windows: {rate:.1%} [{low:.1%}, {high:.1%}], set: {p.config.monitor.alpha:.0%}")
    alarms = {"figure": rate, "low": low, "high": high, "n": 300}
    s.told["false_alarm_rate"] = alarms
    tell_story(p, clean={"captures": WINDOW, "findings": len(s.told["findings_clean"]), "false_alarms": alarms})


def _attack(s: Stage, module: Any, preprocessing: dict[str, Any] | Any) -> Pixels:
    from trilobe.trust.attacks import projected_gradient_descent, quantize_to_pixels

    images, labels = s.digits.usual
    X = encode(images, preprocessing)
    targets = np.full(len(labels), SPACE.index(TARGET))
    moved = projected_gradient_descent(module, X, labels, eps=STRENGTH, targets=targets, seed=s.seed)
    return quantize_to_pixels(moved).transpose(0, 2, 3, 1)


def _repair(s: Stage, p: Project) -> Any:
    truth = ids_of(new_style(s.digits.changed[0]), s.digits.changed[1])
    questions = loop.query(p, n=REPAIR, finding="newest", answers=1)
    asked = sorted({name for q in questions for name in q.assignees})
    answerer: Callable[..., Any] = crowd_answerer(truth, typical_crowd(SPACE, ("3", "8")), s.seed)
    given = loop.label(answerer, p).new
    tell(f"{given} answers by {', '.join(asked)}, whose answers have proved best")
    model = loop.train(p)
    loop.check(p, model.id)
    loop.package(p, model.id)
    loop.serve(project=p)
    return model


def _verdict(told: dict[str, Any]) -> str:
    k, n = told["accuracy_shift_before"], told["accuracy_shift_after"]
    return (
        f"A model learned from {told['rounds'][-1]['answers']} answers, was checked and served. Its traffic changed; "
        f"that was caught and explained, and {told['repair_answers']} more answers repaired it: from {k:.0%} to "
        f"{n:.0%} right on the new style, with {told['failed_requests'] or 'no'} failed requests."
    )
