"""``show``, ``export``, ``report``: what a project says of itself at every stage."""

import csv
from pathlib import Path

import pytest

from trilobe import loop
from trilobe.errors import NotEnoughData, NotFoundError, StorageError, UsageError


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def test_the_next_step_is_always_one_that_works(tiny, tmp_path: Path) -> None:
    """A newcomer who types what ``show`` says arrives at a bundle."""
    loop.init(tmp_path / "new", labels=["a", "b"])
    assert loop.show(project=tmp_path / "new")["next"] == "trilobe add FOLDER"
    now = loop.show(project=tiny.folder)
    assert now["next"] == "trilobe query", "the truth of the test part is no answer"
    assert now["examples"] == {"pool": 60, "test": 30}
    assert (now["questions"], now["answers"]["current"], now["annotators"]) == ({"asked": 0, "open": 0}, 0, 0)
    loop.query(tiny.folder)
    assert loop.show(project=tiny.folder)["next"] == "trilobe label"
    loop.label(tiny.answer, tiny.folder)
    assert loop.show(project=tiny.folder)["next"] == "trilobe train"
    loop.train(tiny.folder)
    assert loop.show(project=tiny.folder)["next"] == "trilobe check"
    loop.evaluate(tiny.folder)
    loop.check(tiny.folder)
    assert loop.show(project=tiny.folder)["next"] == "trilobe package"
    loop.package(tiny.folder)
    assert loop.show(project=tiny.folder)["next"] == "trilobe serve --background"


def test_every_list(trained) -> None:
    for what in ("config", "annotators", "models", "evidence", "bundles", "findings"):
        assert isinstance(loop.show(what, trained.folder), dict)
    assert loop.show("annotators", trained.folder)["annotators"][0]["name"] == "me"
    assert [m["id"] for m in loop.show("models", trained.folder)["models"]] == trained.state()["models"]


def test_one_thing(trained) -> None:
    with loop.opened(trained.folder) as p:
        answer = p.store.answers()[-1]
        model = p.store.model()
    shown = loop.show(answer.example_id[:12], trained.folder)
    assert shown["example"]["id"] == answer.example_id
    assert shown["answers"][0]["label"] == answer.response.labels[0]
    assert max(shown["belief"], key=shown["belief"].get) == trained.truth[answer.example_id]
    assert loop.show(model.id, trained.folder)["model"]["id"] == model.id
    with pytest.raises(NotFoundError, match=r"called 'nothing'(.|\n)*trilobe show"):
        loop.show("nothing", trained.folder)


def test_export_labels_and_answers(trained, tmp_path: Path) -> None:
    loop.export("labels", trained.folder, str(tmp_path / "l.csv"))
    rows = read(tmp_path / "l.csv")
    assert len(rows) == 21 and {trained.truth[r["example"]] == r["label"] for r in rows} == {True}
    loop.export("answers", trained.folder, str(tmp_path / "a.csv"))
    assert len(read(tmp_path / "a.csv")) >= 21


def test_questions_go_out_are_filled_in_and_come_back(tiny, tmp_path: Path) -> None:
    tiny.set("query", "annotators", '["ann", "bob"]')
    loop.query(tiny.folder, n=4, answers=2)
    loop.export("questions", tiny.folder, str(tmp_path / "q.csv"))
    rows = read(tmp_path / "q.csv")
    assert len(rows) == 8 and {r["annotator"] for r in rows} == {"ann", "bob"}
    for r in rows:
        r["label"] = tiny.truth[r["example"]]
    with (tmp_path / "q.csv").open("w") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    told = loop.label(tmp_path / "q.csv", tiny.folder)
    assert (told.new, told.refused, told.open) == (8, {}, 0)


@pytest.mark.parametrize("what", ["labels", "answers", "questions"])
def test_nothing_to_export(template, tmp_path: Path, what: str) -> None:
    loop.init(tmp_path / "p", labels=["a", "b"])
    with pytest.raises(NotEnoughData, match=r"\n.*next: trilobe add"):
        loop.export(what, tmp_path / "p", str(tmp_path / "x.csv"))
    assert not (tmp_path / "x.csv").exists()


def test_export_what_is_not(tiny) -> None:
    with pytest.raises(UsageError, match=r"export 'cake'; expected labels, answers, questions or model"):
        loop.export("cake", tiny.folder)
    with pytest.raises(NotFoundError, match=r"no model yet(.|\n)*trilobe train"):
        loop.export("model", tiny.folder)


def test_a_place_one_cannot_write_to(trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"expected a folder one may write to"):
        loop.export("labels", trained.folder, str(tmp_path / "file" / "l.csv"))
    with pytest.raises(StorageError, match=r"could not be written"):
        loop.report(trained.folder, str(tmp_path / "file" / "r.html"))


def test_the_exported_model_is_the_model(trained, tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime

    loop.export("model", trained.folder, str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    with loop.opened(trained.folder) as p:
        X = p.encode(p.store.examples("test"))
        expected = p.predict(p.store.model(), X)
        temperature = p.store.model().temperature
    (logits,) = session.run(None, {session.get_inputs()[0].name: X})
    scaled = logits / temperature
    proba = np.exp(scaled - scaled.max(1, keepdims=True))
    assert np.abs(proba / proba.sum(1, keepdims=True) - expected).max() < 1e-4
