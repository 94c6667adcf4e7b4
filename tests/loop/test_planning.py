"""``plan labels``: what is estimated follows from what was measured, and says what it could not measure."""

from typing import Any

import numpy as np
import pytest

from trilobe import loop
from trilobe.errors import NotEnoughData, NotFoundError, UsageError
from trilobe.loop import planning
from trilobe.loop.choosing import _random_order
from trilobe.loop.planning import compare, notice


def test_a_plan_from_answers_that_came_at_once(tiny: Any, tmp_path: Any) -> None:
    loop.label(tiny.table(tmp_path / "a.csv", 40), tiny.folder)
    loop.train(tiny.folder)
    loop.evaluate(tiny.folder)
    plan = loop.plan(project=tiny.folder, target=0.9)
    assert [p["answers"] for p in plan.points] == [5, 10, 20, 40] and plan.target == 0.9
    assert plan.needed.low <= plan.needed.figure <= plan.needed.high and "0.9" in plan.needed.sentence
    assert plan.gain.low >= 0 and "answers would raise the score" in plan.gain.sentence
    assert plan.choosing is None and "left to chance" in plan.why


def test_rounds_graded_on_the_control_arm_are_one_curve(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a test part: the arm grows from round to round, and its points still compare."""
    monkeypatch.setattr("trilobe.loop.learning.ENOUGH", 2)
    monkeypatch.setattr("trilobe.loop.project.Project.truth", lambda self, split="test": ([], []))
    trained.set("query", "control", "0.9")
    for _ in range(3):
        loop.query(trained.folder, n=12)
        loop.label(trained.answer, trained.folder)
        loop.train(trained.folder)
        loop.evaluate(trained.folder)
    with loop.opened(trained.folder) as p:
        kept = [c for c in p.store.journal("curve/").values() if c["on"] == planning._newest_yardstick(p)]
        assert [c["answers"] for c in kept] == [33, 45, 57] and kept[-1]["n"] > kept[0]["n"]


def test_the_rounds_are_the_curve(trained: Any) -> None:
    loop.run(trained.answer, trained.folder, goal=2.0, budget=50, promote=False)
    plan = loop.plan(project=trained.folder)
    with loop.opened(trained.folder) as p:
        kept = [c["accuracy"] for c in p.store.journal("curve/").values()]
    assert [c["accuracy"] for c in plan.points] == kept and plan.answers == 50


def test_arms_are_compared_on_equal_numbers(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LEAST", 8)
    monkeypatch.setattr(planning, "PARTS", 3)
    trained.set("query", "control", "0.5")
    loop.run(trained.answer, trained.folder, goal=2.0, budget=45, promote=False)
    with loop.opened(trained.folder) as p:
        arms = compare(p, p.store.model())
        assert arms.choosing and arms.choosing.verdict in ("choosing helps", "random is better here", "cannot tell yet")
        assert arms.saved and "random" in arms.saved.sentence
        assert compare(p, p.store.model()) == arms, "kept, not trained again"


def test_random_is_better_here(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that asks about one class only learns less; it is noticed, and given up where that is allowed."""
    monkeypatch.setattr(planning, "LEAST", 8)
    monkeypatch.setattr(planning, "PARTS", 4)
    trained.set("query", "control", "0.5")
    trained.set("query", "switch", "true")
    with loop.opened(trained.folder) as p:
        bars = [e for e in p.store.examples("pool") if trained.truth[e.id] == "bar"]
        order = _random_order(p, p.store.examples("pool"))[:20]
        p.store.record("control", 20)
        asked = {e.id: e for e in [*order, *bars]}
    rows = [f"{id_},ann,{trained.truth[id_]}" for id_ in asked]
    path = trained.folder / "a.csv"
    path.write_text("\n".join(["example,annotator,label", *rows]) + "\n")
    loop.label(path, trained.folder)
    model = loop.train(trained.folder)
    with loop.opened(trained.folder) as p:
        said: list[str] = []
        monkeypatch.setattr(planning, "_beliefs", only_bars_and(p, {e.id for e in bars}, {e.id for e in order}))
        with loop.listening(lambda message, done=0, total=0: said.append(message)):
            assert not notice(p, model)
        assert p.strategy == "random" and any("random is better here" in s for s in said)
        assert "from now on questions are random" in said


def only_bars_and(p: Any, bars: set[str], chance: set[str]) -> Any:
    """The beliefs, as if nothing but bars had been chosen."""
    real = planning._beliefs

    def beliefs(project: Any, model: Any) -> Any:
        return [b for b in real(project, model) if b.example_id in bars | chance]

    return beliefs


def test_stopping_when_it_will_not_pay(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with loop.opened(trained.folder) as p:
        for i, answers in enumerate((100, 200, 400, 800, 1600)):
            score = 0.95 + 0.0001 * i
            point = {"round": i, "answers": answers, "accuracy": score, "low": score - 0.005, "high": score + 0.005,
                     "n": 5000, "on": "held-out test part", "figure": "accuracy", "model": ""}  # fmt: skip
            p.store.record(f"curve/{answers:07d}", point)
        said: list[str] = []
        with loop.listening(lambda message, done=0, total=0: said.append(message)):
            assert not notice(p, p.store.model()), "it is said, and nothing more"
        assert any("More labels will not pay" in s for s in said)
    trained.set("run", "worth", "0.01")
    with loop.opened(trained.folder) as p:
        assert notice(p, p.store.model())


def test_nothing_to_plan_with(tiny: Any) -> None:
    with pytest.raises((NotEnoughData, NotFoundError), match="no model yet"):
        loop.plan(project=tiny.folder)


def test_bad_input(trained: Any) -> None:
    for target in (0.0, 1.0, -1.0):
        with pytest.raises(UsageError, match="between 0 and 1"):
            loop.plan(project=trained.folder, target=target)
    with pytest.raises(UsageError, match="further answers"):
        loop.plan(project=trained.folder, more=0)
    assert np.isfinite(loop.plan(project=trained.folder).gain.figure)
