"""What is asked: the control arm is a fair sample, repeats are left out, yes/no questions narrow what is believed."""

from pathlib import Path
from typing import Any

import pytest

from trilobe import loop
from trilobe.errors import UsageError
from trilobe.loop.choosing import CONTROL, control_ids
from trilobe.types import Response


def test_a_share_of_each_round_is_left_to_chance(trained: Any) -> None:
    trained.set("query", "control", "0.5")
    asked = loop.query(trained.folder, n=10)
    assert 2 <= [q.strategy for q in asked].count(CONTROL) <= 5, "5, less those that had been asked anyway"
    assert len(asked) == len({q.example_id for q in asked}) == 10
    assert all(q.reason.startswith("left to chance") for q in asked if q.strategy == CONTROL)
    loop.label(trained.answer, trained.folder)
    with loop.opened(trained.folder) as p:
        fair = control_ids(p)
        assert {q.example_id for q in asked if q.strategy == CONTROL} <= set(fair)
        everybody = {e.id for e in p.store.examples("pool")}
        assert set(fair) <= everybody and len(fair) == p.store.recorded("control")


def test_no_control_arm_beside_random_questions_or_where_it_is_turned_off(trained: Any) -> None:
    assert {q.strategy for q in loop.query(trained.folder, n=10, strategy="random")} == {"random.v1"}
    loop.label(trained.answer, trained.folder)
    trained.set("query", "control", "0.0")
    assert {q.strategy for q in loop.query(trained.folder, n=10)} == {"margin.v1"}


def test_without_a_test_part_the_fair_sample_grades(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilobe.loop.learning.ENOUGH", 5)
    monkeypatch.setattr("trilobe.loop.project.Project.truth", lambda self, split="test": ([], []))
    trained.set("query", "control", "0.9")
    loop.query(trained.folder, n=12)
    loop.label(trained.answer, trained.folder)
    loop.train(trained.folder)
    (first, *_) = loop.evaluate(trained.folder)
    with loop.opened(trained.folder) as p:
        assert first.n == len(control_ids(p)) and "picked at random" in first.detail["on"]


def test_what_repeats_is_not_asked_twice(tiny: Any, tmp_path: Path) -> None:
    """Nearly the same picture again: one changed pixel."""
    import numpy as np

    from trilobe.tasks.image_classification.data import decode, encode_png

    loop.query(tiny.folder, n=8)
    loop.label(tiny.answer, tiny.folder)
    loop.train(tiny.folder)
    with loop.opened(tiny.folder) as p:
        answered = {q.example_id for q in p.store.questions() if q.round == 1}
        for i, id_ in enumerate(sorted(answered)):
            image = np.array(decode(p.store.blobs.get(id_)))
            image[0, 0] ^= 1
            (tmp_path / f"again-{i}.png").write_bytes(encode_png(image))
    again = set(loop.add(tmp_path, tiny.folder).added)
    assert len(again) == 8
    tiny.set("query", "duplicates", "0.995")
    tiny.set("query", "control", "0.0")
    asked = {q.example_id for q in loop.query(tiny.folder, n=100)}
    assert not asked & again, "the model has been told what these are"
    loop.label(tiny.answer, tiny.folder)
    before = loop.train(tiny.folder).origin["n_examples"]
    tiny.set("query", "propagate", "true")
    assert loop.train(tiny.folder).origin["n_examples"] == before + 8, "only where the user says so do answers spread"


def test_yes_or_no_questions(trained: Any) -> None:
    parents = '{bar = "line", cross = "line", dot = "blob"}'
    trained.set("labels", "names", f'["bar", "cross", "dot"]\nparents = {parents}')
    trained.set("query", "seconds", "{full = 9.0, partial = 1.0}")
    asked = loop.query(trained.folder, n=6, partial=True)
    assert len(asked) == 6 and {q.strategy for q in asked} == {"closing.v1"}
    assert {q.choices for q in asked} <= {("bar",), ("cross",), ("dot",), ("line",), ("blob",)}, (
        "yes or no, where that is cheap"
    )
    assert all("teaches most per second" in q.reason for q in asked)

    def person(question: Any, example: Any, who: str) -> Any:
        truth = trained.truth[example.id]
        inside = truth in question.choices or ("line" in question.choices and truth in ("bar", "cross"))
        return Response("one_of" if inside else "not", question.choices), 1.0

    assert loop.label(person, trained.folder).new == 6
    loop.train(trained.folder)
    again = loop.query(trained.folder, n=60, partial=True)
    with loop.opened(trained.folder) as p:
        for q in again:
            for before in [x for x in p.store.questions() if x.example_id == q.example_id and x.id != q.id]:
                assert before.choices != q.choices or not q.choices, "never the same question twice"


def test_what_is_in_doubt_is_asked_again_of_somebody_else(trained: Any) -> None:
    trained.set("query", "annotators", '["ann", "bob"]')
    trained.set("query", "seconds", "{full = 9.0, partial = 1.0}")
    asked = {q.example_id: q for q in loop.query(trained.folder, n=6, partial=True)}
    loop.label(lambda q, e, who: (Response("one_of" if trained.truth[e.id] in q.choices else "not", q.choices), 1.0),
               trained.folder)  # fmt: skip
    loop.train(trained.folder)
    again = [q for q in loop.query(trained.folder, n=60, partial=True) if q.example_id in asked]
    assert again, "one answer of somebody who may err leaves doubt"
    for q in again:
        assert set(q.assignees).isdisjoint(asked[q.example_id].assignees)


def test_full_questions_win_where_they_cost_no_more(trained: Any) -> None:
    trained.set("query", "seconds", "{full = 1.0, partial = 1.0}")
    assert {q.choices for q in loop.query(trained.folder, n=5, partial=True)} == {()}


def test_yes_and_no_in_a_table_and_at_the_terminal(trained: Any, tmp_path: Path) -> None:
    trained.set("query", "seconds", "{full = 9.0, partial = 1.0}")
    asked = loop.query(trained.folder, n=2, partial=True)
    loop.export("questions", trained.folder, str(tmp_path / "q.csv"))
    rows = (tmp_path / "q.csv").read_text("utf-8").splitlines()
    assert "asked" in rows[0] and all(q.choices[0] in "\n".join(rows) for q in asked)
    lines = [f"{q.example_id},ann,{'yes' if i else 'no'},{q.choices[0]}" for i, q in enumerate(asked)]
    (tmp_path / "a.csv").write_text("\n".join(["example,annotator,label,asked", *lines]) + "\n")
    assert loop.label(tmp_path / "a.csv", trained.folder).new == 2
    with loop.opened(trained.folder) as p:
        said = {a.question_id: a.response.kind for a in p.store.answers()}
    assert [said[q.id] for q in asked] == ["not", "one_of"]


def test_explained(trained: Any) -> None:
    said: list[str] = []
    with loop.listening(lambda message, done=0, total=0: said.append(message)):
        asked = loop.query(trained.folder, n=10, explain=True)
    text = "\n".join(said)
    assert "10 questions of a pool of 60 examples" in text and "left to chance" in text
    assert "margin.v1 with model" in text and "seconds of people's time" in text
    for q in asked:
        assert f"{q.example_id[:10]}: what is it? because {q.reason}" in text


def test_a_strategy_of_another_package(trained: Any) -> None:
    assert {q.strategy for q in loop.query(trained.folder, n=3, strategy="trilobe.data.scores:entropy")} <= {
        "trilobe.data.scores:entropy",
        CONTROL,
    }
    with pytest.raises(UsageError, match="nowhere"):
        loop.label(trained.answer, trained.folder)
        loop.query(trained.folder, strategy="nowhere:at_all")


def test_a_committee(trained: Any) -> None:
    asked = loop.query(trained.folder, n=6, strategy="bald")
    assert {q.strategy for q in asked} <= {"bald.v1", CONTROL} and any(q.score > 0 for q in asked)
