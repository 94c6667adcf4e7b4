"""A tiny project for tests: three kinds of 8 x 8 pictures, 60 to learn from, 30 held out; a whole round takes < 1 s.

And what holds for all tests: files with slow ones begin, property tests have no deadline, none leaves anything behind.
"""

import gc
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, settings

# Two test processes on two cores: a second thread of each would wait for the other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes says nothing on a busy machine. In CI the examples are the same each time: what others find
# they find at home.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True,
    derandomize="CI" in os.environ, database=None if "CI" in os.environ else settings.default.database,
)  # fmt: skip
settings.load_profile("tests")
# Threads that may go on: tqdm's, started once; those of a scheduler, which wait for work that no longer comes.
LASTING = {"tqdm_monitor", "inference"}

KINDS = ("bar", "cross", "dot")
TOML = """\
[project]
name = "tiny"

[labels]
names = ["bar", "cross", "dot"]

[query]
first = 9
n = 6

[train]
steps = 40
epochs = 0
folds = 2
width = 4
lr = 0.01
augment = false

[check]
eps = [0.02]
attack_steps = 2
attack_examples = 10
gates = {parity = 1e-4}

[monitor]
window = 60

[run]
goal = 1.0
budget = 21
"""


def draw(kind: str, rng: np.random.Generator) -> np.ndarray:
    """One noisy 8 x 8 picture of that kind, ``(8, 8, 1)`` uint8."""
    image = rng.integers(0, 60, (8, 8))
    at = int(rng.integers(2, 6))
    if kind in ("bar", "cross"):
        image[:, at] += 180
    if kind == "cross":
        image[at, :] = np.maximum(image[at, :], 190)
    if kind == "dot":
        image[at - 1 : at + 1, at - 1 : at + 1] += 190
    return image.astype(np.uint8)[:, :, None]


def pictures(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [KINDS[i % 3] for i in range(n)]
    return np.stack([draw(k, rng) for k in labels]), labels


@dataclass
class Tiny:
    """A project that is all of one test's own, and what only the test knows: the class of each example."""

    folder: Path
    truth: dict[str, str]

    def set(self, section: str, key: str, value: str) -> None:
        """Change one setting in trilobe.toml (``value`` as TOML)."""
        path = self.folder / "trilobe.toml"
        lines = [x for x in path.read_text().splitlines() if not (x.startswith(f"{key} =") and section != "labels")]
        if section == "labels":
            lines = [x for x in lines if not x.startswith("names =")]
        if f"[{section}]" not in lines:
            lines.append(f"[{section}]")
        lines.insert(lines.index(f"[{section}]") + 1, f"{key} = {value}")
        path.write_text("\n".join(lines) + "\n")

    def answer(self, question: Any, example: Any, who: str) -> Any:
        """Somebody who is always right."""
        from trilobe.types import Response

        return Response("class", (self.truth[example.id],)), 1.0

    def table(self, path: Path, n: int | None = None, who: str = "ann") -> Path:
        """A CSV file with true answers on the pool, by id."""
        pool = [e.id for e in self.examples("pool")][:n]
        rows = [f"{id_},{who},{self.truth[id_]}" for id_ in pool]
        path.write_text("\n".join(["example,annotator,label", *rows]) + "\n")
        return path

    def examples(self, split: Any = None) -> list[Any]:
        from trilobe.loop import opened

        with opened(self.folder) as p:
            return p.store.examples(split)

    def state(self) -> dict[str, Any]:
        """Everything a failed command must not change."""
        from trilobe.loop import opened

        with opened(self.folder) as p:
            return {
                "examples": [e.id for e in p.store.examples()],
                "questions": [q.id for q in p.store.questions()],
                "answers": [(a.id, a.response) for a in p.store.answers(current=False)],
                "models": [m.id for m in p.store.models()],
                "bundles": [b.id for b in p.store.bundles()],
            }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins, so that no worker waits at the end for the other's longest test."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A file of tests ends with the threads, variables and working folder it began with.

    What it leaves would trouble what runs later in this process: a thread that draws from ``random`` breaks property
    tests, and a process with threads cannot fork.
    """
    threads, variables, folder = {*threading.enumerate()}, dict(os.environ), Path.cwd()
    yield
    deadline = time.monotonic() + 20
    while left := [t for t in threading.enumerate() if t not in threads and t.name not in LASTING]:
        assert time.monotonic() < deadline, f"threads that go on: {left}"
        gc.collect()  # an executor that nobody has ends its threads
        time.sleep(0.05)
    new = {k for k in os.environ.keys() - variables.keys() if k.startswith("TRILOBE")}  # libraries set their own
    changed = {k for k, v in variables.items() if os.environ.get(k) != v} - {"PYTEST_CURRENT_TEST"}
    assert (new | changed, Path.cwd()) == (set(), folder)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny project, made once by the product itself; tests take copies."""
    from trilobe import loop
    from trilobe.tasks.image_classification.data import encode_png

    folder = tmp_path_factory.mktemp("tiny") / "project"
    folder.mkdir()
    (folder / "trilobe.toml").write_text(TOML)
    loop.init(folder)
    truth: dict[str, str] = {}
    for split, n, seed in (("pool", 60, 1), ("test", 30, 2)):
        images, labels = pictures(n, seed)
        files = folder.parent / split
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = files / label / f"{split}-{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(image))
        added = loop.add([files], folder, split=split, labels="folders" if split == "test" else "")
        with loop.opened(folder) as p:
            truth |= {e.id: Path(e.name).parent.name for e in p.store.examples(ids=list(added.added))}
    return Tiny(folder, truth)


@pytest.fixture(scope="session")
def trained_template(template: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny project after two rounds."""
    from trilobe import loop

    folder = tmp_path_factory.mktemp("trained") / "project"
    shutil.copytree(template.folder, folder)
    loop.run(Tiny(folder, template.truth).answer, folder, goal=2.0, promote=False)
    loop.export("model", folder, str(folder.parent / "model.onnx"))  # the slow part of check and package, done once
    return Tiny(folder, template.truth)


@pytest.fixture
def tiny(template: Tiny, tmp_path: Path) -> Tiny:
    """A copy of the tiny project: 60 in the pool, 30 held out, nothing asked yet."""
    shutil.copytree(template.folder, tmp_path / "project")
    return Tiny(tmp_path / "project", template.truth)


@pytest.fixture
def trained(trained_template: Tiny, tmp_path: Path) -> Tiny:
    """A copy of the tiny project with 21 answers and a model."""
    shutil.copytree(trained_template.folder, tmp_path / "project")
    return Tiny(tmp_path / "project", trained_template.truth)


@dataclass
class Said:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def trilobe() -> Callable[..., Said]:
    """The command line, in this process: ``trilobe("query", "-n", 3)``."""
    from trilobe.cli import main

    def call(*args: Any, input: str | None = None) -> Said:
        words = [os.fsdecode(a) if isinstance(a, bytes | Path) else str(a) for a in args]
        found = CliRunner().invoke(main, words, input=input)
        if found.exception and not isinstance(found.exception, SystemExit):
            raise found.exception
        return Said(found.exit_code, found.stdout, found.stderr)

    return call


@pytest.fixture
def shapes() -> Callable[[int, int], tuple[np.ndarray, list[int]]]:
    """Fresh pictures ``(n, 8, 8, 1)`` and the index of each one's class."""

    def make(n: int, seed: int) -> tuple[np.ndarray, list[int]]:
        images, labels = pictures(n, seed)
        return images, [KINDS.index(k) for k in labels]

    return make
