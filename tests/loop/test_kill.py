"""``kill -9`` at twenty random moments of ``trilobe run``: gone on with, each ends as if nothing had happened."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# One warm process that has imported everything and forks for each run. Nothing is opened before the fork.
STUDY = """
import json, os, signal, sys, time
import numpy, torch._dynamo, onnx, onnxscript  # not onnxruntime, which starts a thread
import trilobe.algorithms.fit, trilobe.algorithms.export, trilobe.infrastructure.pipeline, trilobe.trust.attacks
from trilobe import loop
from trilobe.types import Response
import trilobe.algorithms.fit.fitting as fitting

torch.set_num_threads(1)
truth = json.load(open(sys.argv[1]))
fitting.EVERY = 0.05  # checkpoints within a second's training

def answer(question, example, who):
    time.sleep(0.005)
    return Response("class", (truth[example.id],)), 1.0

def begin(folder, promote):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        loop.run(answer, folder, goal=2.0, promote=promote)
        code = 0
    finally:
        os._exit(code)

for line in sys.stdin:
    folder, after, promote = json.loads(line)
    started, pid = time.monotonic(), begin(folder, promote)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    print(json.dumps([status, time.monotonic() - started]), flush=True)
"""


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, but for the times of day."""
    from trilobe import loop

    with loop.opened(folder) as p:
        told = p.store.recorded("aggregate")
        curve = list(p.store.journal("curve/").values())
        model = p.store.model()
        return {
            "model": model.id,
            "weights": model.weights,
            "temperature": model.temperature,
            "beliefs": told["beliefs"],
            "questions": [(q.id, q.example_id, q.round, q.score, q.assignees) for q in p.store.questions()],
            "answers": [(a.id, a.annotator, a.response) for a in p.store.answers(current=False)],
            "curve": curve,
            "models": [m.id for m in p.store.models()],
            "evidence": [(e.check, e.figure, e.low, e.high, e.passed) for e in p.store.evidence(model.id)],
            "bundles": len(p.store.bundles()),
        }


def ask(study: Any, folder: Path, after: float | None, promote: bool = False) -> tuple[int, float]:
    assert study.stdin is not None and study.stdout is not None
    study.stdin.write(json.dumps([str(folder), after, promote]) + "\n")
    study.stdin.flush()
    status, seconds = json.loads(study.stdout.readline())
    return status, seconds


@pytest.fixture
def prepared(tiny) -> Any:
    tiny.set("train", "steps", "15")
    tiny.set("query", "answers", "2")
    tiny.set("query", "annotators", '["ann", "bob", "cy"]')
    tiny.set("run", "budget", "30")
    return tiny


@pytest.fixture(scope="module")
def study(template, tmp_path_factory: pytest.TempPathFactory) -> Any:
    truth = tmp_path_factory.mktemp("study") / "truth.json"
    truth.write_text(json.dumps(template.truth))
    command = [sys.executable, "-c", STUDY, str(truth)]
    studies = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    yield studies
    for s in studies:
        with s:
            s.kill()


def test_killed_at_any_point_it_ends_the_same(prepared, study, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    def fresh(name: str) -> Path:
        shutil.copytree(prepared.folder, tmp_path / name)
        return tmp_path / name

    ask(study[0], fresh("warm"), None)
    status, seconds = ask(study[0], fresh("reference"), None)
    assert status == 0
    expected = outcome(tmp_path / "reference")
    assert len(expected["curve"]) == 2
    moments = np.random.default_rng(20).uniform(0.0, seconds, 20)

    def one(i: int) -> Path:
        for earlier in range(8):  # should the machine be less busy than it was, a run may end before it is killed
            folder = fresh(f"killed-{i}-{earlier}")
            if ask(study[i % 2], folder, float(moments[i] * 0.6**earlier))[0] == 9:
                break
        else:
            pytest.fail(f"run {i} always ended before it was killed")
        assert ask(study[i % 2], folder, None)[0] == 0, f"run {i}, killed after {moments[i]:.2f} s, does not go on"
        return folder

    with ThreadPoolExecutor(2) as two:
        halves = two.map(lambda start: [(i, one(i)) for i in range(start, 20, 2)], (0, 1))
        done = [pair for half in halves for pair in half]
    for i, folder in done:
        found = outcome(folder)
        different = [k for k in expected if found[k] != expected[k]]
        assert not different, f"killed after {moments[i]:.2f} of {seconds:.2f} s, {different} came out otherwise"


def test_killed_again_and_again(prepared, study) -> None:
    """A run that never gets more than a part of the way at a time still arrives."""
    whole = prepared.folder.with_name("whole")
    shutil.copytree(prepared.folder, whole)
    _, seconds = ask(study[0], whole, None)
    for attempt in range(12):  # longer each time: on a busy machine one step may take what the whole took before
        status, _ = ask(study[0], prepared.folder, 0.7 * seconds * 1.2**attempt)
        if status == 0:
            break
    assert status == 0, "no progress between kills"
    assert outcome(prepared.folder) == outcome(whole)


def test_killed_while_promoting(prepared, study) -> None:
    """Check and package are gone on with as well, to the one bundle."""
    assert ask(study[0], prepared.folder, None)[0] == 0
    for after in (0.2, 1.0, 2.0):
        ask(study[0], prepared.folder, after, promote=True)
    assert ask(study[0], prepared.folder, None, promote=True)[0] == 0
    found = outcome(prepared.folder)
    assert found["bundles"] == 1 and {e[0] for e in found["evidence"]} >= {"accuracy", "parity"}
    from trilobe import loop

    with loop.opened(prepared.folder) as p:
        folders = [f.name for f in (p.state / "bundles").iterdir()]
        assert folders == [p.store.bundle().path.name], "nothing half-made beside it"
