"""The same loop on texts: entities from a file of sentences to a served, watched and repaired model."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilobe import loop
from trilobe.errors import AnswerError
from trilobe.infrastructure.client import Client
from trilobe.loop.terminal import AtTheTerminal
from trilobe.types import Response, Span

CITIES, DAYS = ["Rome", "Oslo", "New York", "Lima"], ["Monday", "Friday", "Sunday"]
FAST = "\n[train]\nsteps = 60\nepochs = 0\nfolds = 2\nlr = 2e-2\n[check]\nattack_steps = 2\neps = [0.2]\n"


def sentence(rng: np.random.Generator) -> tuple[str, list[list[Any]]]:
    """A sentence and its entities."""
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    text = str(rng.choice(["We fly to {c} on {d} 🙂.", "on {d} it rained in {c}", "{c} or home, who knows", "call me"]))
    for mark, name in (("{c}", city), ("{d}", day)):
        text = text.replace(mark, name)
    text += " " + " ".join(rng.choice(["then", "we", "sleep", "again", "maybe"], 3))
    found = [[text.index(n), text.index(n) + len(n), kind] for n, kind in ((city, "CITY"), (day, "DAY")) if n in text]
    return text, found


def lines(n: int, seed: int) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(seed), {}
    while len(rows) < n:
        text, spans = sentence(rng)
        rows[text] = spans
    return [{"text": t, "spans": s} for t, s in rows.items()]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of sentences with a model; its questions were answered from a file."""
    folder = tmp_path_factory.mktemp("texts") / "p"
    path = loop.init(folder, labels=["CITY", "DAY"], task="entity_recognition")
    path.write_text(path.read_text("utf-8") + FAST, "utf-8")
    pool, test = lines(60, 0), lines(40, 1)
    for name, rows in (("pool", [{"text": r["text"]} for r in pool]), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    assert loop.add(folder / "test.jsonl", folder, split="test", labels="inside").labeled == 40
    known = {r["text"] for r in test}
    assert len(loop.add(folder / "pool.jsonl", folder).added) == len({r["text"] for r in pool} - known)
    truth = {r["text"]: r["spans"] for r in pool + test}

    def person(question: Any, example: Any, who: str) -> tuple[Response, float]:
        with loop.opened(folder) as p:
            text = p.item(example.id)
        return Response("spans", spans=tuple(Span(*s) for s in truth[text])), 4.0

    loop.query(folder, n=6)
    loop.export("questions", folder, str(folder / "q.csv"))
    rows = table(folder / "q.csv")
    with loop.opened(folder) as p:
        for row in rows:
            row |= {"annotator": "ann", "label": json.dumps(truth[p.item(row["example"])])}
    with (folder / "q.csv").open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert loop.label(folder / "q.csv", folder).new == 6
    loop.run(person, folder, goal=1.1, budget=26, promote=False)
    return folder


def test_it_learns_and_says_so(project: Path) -> None:
    with loop.opened(project) as p:
        points = list(p.store.journal("curve/").values())
        asked = p.store.questions()
    assert points[-1]["figure"] == "f1" and points[-1]["answers"] == 26
    assert points[-1]["accuracy"] > max(0.6, points[0]["accuracy"] - 0.1), points
    strategies = {q.strategy for q in asked if q.round == 2}
    assert strategies == {"mnlp.v1", "control.v1"}, "a share of each round is left to chance"
    assert all("%) or " in q.reason for q in asked if q.strategy == "mnlp.v1")


def test_labels_go_out_as_answers_come_in(project: Path, tmp_path: Path) -> None:
    loop.export("labels", project, str(tmp_path / "l.csv"))
    rows = table(tmp_path / "l.csv")
    loop.export("answers", project, str(tmp_path / "a.csv"))
    said = {r["example"]: r["label"] for r in table(tmp_path / "a.csv")}
    assert len(rows) == 26
    for row in rows:
        assert sorted(json.loads(row["label"])) == sorted(json.loads(said[row["example"]]))
        assert 0.5 < float(row["probability"]) <= 1


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("CITY", "expected an answer about spans"),
        ("[[0, 2]]", "expected JSON"),
        ('[[0, 9999, "CITY"]]', "9999"),
        ('[[0, 1, "TOWN"]]', "TOWN|whole tokens"),
        ("[[", "expected JSON"),
    ],
)
def test_rows_that_do_not_fit_are_refused(project: Path, tmp_path: Path, label: str, problem: str) -> None:
    with loop.opened(project) as p:
        example = p.store.examples("pool")[0].id
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([["example", "annotator", "label"], [example, "bob", label]])
    refused = loop.label(tmp_path / "a.csv", project).refused or {}
    assert len(refused) == 1
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(*refused.values())


def test_entities_typed_at_the_terminal(project: Path) -> None:
    with loop.opened(project) as p:
        example = next(e for e in p.store.examples("pool") if "New York" in p.item(e.id))
        text = p.item(example.id)
        keys = iter(["New York=TOWN", "Paris=CITY", "New York = 1"])
        shown: list[str] = []
        answerer = AtTheTerminal(p, lambda prompt: (shown.append(prompt), next(keys))[1], shown.append)
        reply = answerer(p.store.questions()[0], example, "ann")
        assert reply is not None
        start = text.index("New York")
        assert reply[0] == Response("spans", spans=(Span(start, start + 8, "CITY"),))
        said = "".join(shown)
        assert "1=CITY  2=DAY" in said and "'Paris=CITY' is not in the text" in said and "TOWN" in said
        keys = iter(["-"])
        none = answerer(p.store.questions()[0], example, "ann")
        assert none is not None and none[0] == Response("spans")


def test_checked_served_watched_explained_repaired(project: Path) -> None:
    found = {e.check: e for e in loop.check(project)}
    assert {"f1", "precision", "recall", "token_accuracy", "ece", "robust_accuracy@0.2", "parity"} == set(found)
    assert found["parity"].passed and found["parity"].figure < 1e-4
    bundle = loop.package(project)
    card = (bundle.path / "README.md").read_text("utf-8")
    assert "token-classification" in card and "`entities` holds" in card and "image" not in card
    endpoint = loop.serve(project=project, background=True)
    try:
        with Client(endpoint.url, endpoint.name) as client:
            (one,) = client.entities(["🙂 We fly to Rome on Friday then"])
            for e in one:
                assert "🙂 We fly to Rome on Friday then"[e["start"] : e["end"]] == e["text"]
            proba = client.infer(["We fly to Rome", "x"])
            assert proba.shape == (2, 3) and np.allclose(proba.sum(axis=1), 1, atol=1e-5)
            rng = np.random.default_rng(0)
            for _ in range(60):  # nothing but names, where most words were none
                client.infer([" ".join(rng.choice(CITIES, rng.integers(3, 9)))])
        window = loop.monitor(project, last=60)
        assert window.findings, window.message
        explained = loop.explain(project, n=2)
        assert explained[0].image.suffix == ".svg" and explained[0].predicted in ("O", "CITY", "DAY")
        asked = loop.query(project, finding="newest", n=5)
        assert len(asked) == 5
        page = loop.report(project).read_text("utf-8")
        assert "data:image/svg+xml" in page and "entity F1" in page and "pixels" not in page
        with loop.opened(project) as p:
            shown = loop.show(asked[0].example_id, p)["example"]
        assert shown["source"].startswith("finding:")
    finally:
        loop.serve(project=project, stop=True)


def test_a_class_is_no_answer_about_spans(project: Path) -> None:
    with loop.opened(project) as p, pytest.raises(AnswerError, match="an answer about spans"):
        p.possible(Response("class", ("CITY",)), p.store.examples("pool")[0].id)
