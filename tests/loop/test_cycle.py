"""``run``: the whole cycle, how it ends, what it refuses, and that it can be gone on with."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from trilobe import loop
from trilobe.errors import CheckFailed, NotEnoughData, StoreBusy, UsageError


def test_from_a_pool_to_a_bundle(tiny) -> None:
    ran = loop.run(tiny.answer, tiny.folder)
    assert ran.outcome in ("budget", "goal")
    assert [r["round"] for r in ran.rounds] == list(range(1, len(ran.rounds) + 1))
    assert [r["answers"] for r in ran.rounds] == [9, 15, 21][: len(ran.rounds)]
    assert ran.rounds[-1]["accuracy"] > 0.6, "three easily told shapes"
    assert {e.check for e in ran.evidence} == {"accuracy", "ece", "brier", "log_loss", "robust_accuracy@0.02", "parity"}
    assert ran.bundle is not None and (ran.bundle.path / "manifest.json").exists()
    assert ran.model == ran.bundle.model_id
    again = loop.run(tiny.answer, tiny.folder)
    assert (again.rounds, again.model, again.bundle.id) == (ran.rounds, ran.model, ran.bundle.id), "nothing new to do"


def test_goal(tiny) -> None:
    ran = loop.run(tiny.answer, tiny.folder, goal=0.0, promote=False)
    assert (ran.outcome, len(ran.rounds), ran.bundle) == ("goal", 1, None)


def test_rounds(tiny) -> None:
    ran = loop.run(tiny.answer, tiny.folder, goal=2.0, rounds=2, promote=False)
    assert (ran.outcome, len(ran.rounds)) == ("rounds", 2)


def test_the_pool_runs_dry(tiny) -> None:
    tiny.set("query", "first", "50")
    tiny.set("query", "n", "50")
    ran = loop.run(tiny.answer, tiny.folder, goal=2.0, budget=1000, promote=False)
    assert (ran.outcome, ran.rounds[-1]["answers"]) == ("exhausted", 60)


def test_never_more_answers_than_the_budget(tiny) -> None:
    tiny.set("query", "answers", "3")
    tiny.set("query", "annotators", '["ann", "bob", "cy"]')
    ran = loop.run(tiny.answer, tiny.folder, goal=2.0, budget=20, promote=False)
    assert ran.outcome == "budget"
    assert ran.rounds[-1]["answers"] == 18, "six questions to three people; a seventh would be 21 answers"


def test_questions_without_answers_stop_it_and_are_kept(tiny, tmp_path: Path) -> None:
    few = tiny.table(tmp_path / "few.csv", 2)
    ran = loop.run(few, tiny.folder)
    assert ran.outcome == "waiting" and ran.open > 0 and ran.bundle is None
    said: list[str] = []
    with loop.listening(lambda message, done=0, total=0: said.append(message)):
        again = loop.run(few, tiny.folder)
    assert again.open == ran.open
    assert any("trilobe export questions" in s for s in said), "the way on is told"
    assert loop.run(tiny.answer, tiny.folder, promote=False).outcome in ("budget", "goal")


def test_a_whole_table_at_once(tiny, tmp_path: Path) -> None:
    ran = loop.run(tiny.table(tmp_path / "all.csv"), tiny.folder, goal=2.0, promote=False)
    assert ran.rounds[-1]["answers"] == 60


def test_a_failed_gate_raises_and_keeps_everything(tiny) -> None:
    tiny.set("check", "gates", "{accuracy = 1.0, ece = 0.0}")
    with pytest.raises(CheckFailed, match=r"ece is .* not at most 0") as e:
        loop.run(tiny.answer, tiny.folder)
    assert e.value.exit_code == 3 and "change the gates" in e.value.hint
    kept = tiny.state()
    assert len(kept["models"]) >= 1 and not kept["bundles"]
    with loop.opened(tiny.folder) as p:
        assert any(e.passed is False for e in p.store.evidence(kept["models"][-1]))


@pytest.mark.parametrize("argument", ["budget", "rounds"])
def test_counts_below_one(tiny, argument: str) -> None:
    with pytest.raises(UsageError, match=f"{argument} = 0; expected at least 1"):
        loop.run(tiny.answer, tiny.folder, **{argument: 0})


def test_an_empty_pool(tmp_path: Path) -> None:
    loop.init(tmp_path, labels=["a", "b"])
    with pytest.raises(NotEnoughData, match=r"the pool is empty.*\n.*trilobe add"):
        loop.run(lambda *_: None, tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from trilobe.infrastructure.store import run_lock
with run_lock(Path(sys.argv[1]) / ".trilobe", "trilobe run"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_at_once(tiny) -> None:
    """The second is told at once who the first is; a killed first lets go."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tiny.folder)], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None and first.stdout.readline() == "held\n"
            started = time.monotonic()
            with pytest.raises(StoreBusy, match=rf"'trilobe run' is running \(process {first.pid}, since"):
                loop.run(tiny.answer, tiny.folder)
            assert time.monotonic() - started < 2
            assert not tiny.state()["questions"][30:], "the second one asked nothing"
        finally:
            first.kill()
    assert loop.run(tiny.answer, tiny.folder, promote=False).rounds


def test_everything_known_beforehand(tiny, tmp_path: Path) -> None:
    """A pool with its truth needs no question; one that a stranger adds later does."""
    rows = [f"{Path(e.name).name},{tiny.truth[e.id]}" for e in tiny.examples("pool")]
    (tmp_path / "truth.csv").write_text("\n".join(["example,label", *rows]))
    files = [e.name for e in tiny.examples("pool")]
    added = loop.add(files, tiny.folder, labels=str(tmp_path / "truth.csv"))
    assert (len(added.added), len(added.duplicates), added.labeled) == (0, 60, 60)
    model = loop.train(tiny.folder)
    assert model.origin["n_examples"] == 60
