"""The demonstration, played on a smaller stage: fewer rounds, the same story, every figure it promises."""

import shutil
from pathlib import Path

import pytest

from trilobe import loop
from trilobe.demos import demo, digits
from trilobe.errors import UsageError

PROMISED = {
    "rounds", "accuracy", "accuracy_random", "annotators", "gates", "findings_clean", "findings_adversarial",
    "findings_shift", "accuracy_shift_before", "accuracy_shift_after", "failed_requests", "seconds", "report",
}  # fmt: skip


def test_the_hands_never_mix() -> None:
    from trilobe.tasks.image_classification.data import content_digest

    dealt = digits.deal(0)
    hands = [dealt.pool, dealt.test, dealt.usual, dealt.changed]
    assert [len(labels) for _, labels in hands] == [997, 400, 200, 200]
    seen = [{content_digest(i) for i in images} for images, _ in hands]
    assert all(not a & b for n, a in enumerate(seen) for b in seen[:n])
    assert (digits.deal(0).pool[1] == dealt.pool[1]).all()
    assert (digits.deal(1).pool[1] != dealt.pool[1]).any()


def test_the_same_question_gets_the_same_answer() -> None:
    from trilobe.data.annotators import typical_crowd
    from trilobe.types import Example, Question

    crowd = typical_crowd(digits.SPACE)
    answer = digits.crowd_answerer({"x": 3}, crowd, seed=4)
    question, example = Question("q", "x"), Example("x", "x.png")
    assert len({answer(question, example, crowd[0].name)[0].labels for _ in range(5)}) == 1


def test_somebodys_project_is_left_alone(tmp_path: Path) -> None:
    loop.init(tmp_path / "mine", labels=["a", "b"])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"a cat")
    for folder in (tmp_path / "mine", tmp_path / "photos"):
        before = sorted(p for p in folder.rglob("*"))
        with pytest.raises(UsageError, match=r"is not empty; expected an empty folder(.|\n)*--project elsewhere"):
            demo(project=folder)
        assert sorted(p for p in folder.rglob("*")) == before


def test_an_unknown_demonstration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no demonstration 'cats'; expected digits"):
        demo("cats", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_whole_story(tmp_path: Path) -> None:
    """As it is told to people (about a minute); the learning happens in processes of its own."""
    told = demo(project=tmp_path / "demo", seed=0)
    assert set(told) >= PROMISED
    assert [r["answers"] for r in told["rounds"]] == [60 * (i + 1) for i in range(6)]
    assert told["accuracy"] > 0.9
    assert all(g["passed"] is not False for g in told["gates"])
    assert {a["name"] for a in told["annotators"]} == {"ada", "ben", "cleo", "dan", "eve"} or len(
        told["annotators"]
    ) == 5
    assert told["findings_clean"] == []
    assert {f["kind"] for f in told["findings_adversarial"]} >= {"class_share"}
    assert told["findings_shift"]
    assert told["accuracy_shift_after"] > told["accuracy_shift_before"] + 0.2
    assert told["failed_requests"] == 0
    text = Path(told["report"]).read_text("utf-8")
    assert text.rstrip().endswith("</html>") and "digits" in text
    with loop.opened(tmp_path / "demo") as p:
        assert p.store.model().id
    assert loop.show(project=tmp_path / "demo")["endpoints"][0]["state"] == "stopped", "nothing is left running"
    shutil.rmtree(tmp_path / "demo")
