"""From what Amazon Comprehend's recognizer is trained on to an endpoint that says what Comprehend would."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilobe import loop
from trilobe.errors import DataError, NotFoundError, TrilobeError, UsageError
from trilobe.infrastructure.client import Client
from trilobe.tasks.entity_recognition.comprehend import detected
from trilobe.types import Response, Span

CITIES, DAYS = ["Rome", "Oslo", "New York", "Lima"], ["Monday", "Friday", "Sunday"]
HEADER = "File, Line, Begin Offset, End Offset, Type"
FAST = "\n[train]\nsteps = 60\nepochs = 0\nfolds = 2\nlr = 2e-2\n[check]\nattack_steps = 2\neps = [0.2]\n"


def lines(n: int, seed: int) -> list[tuple[str, list[tuple[int, int, str]]]]:
    """Different sentences with their entities."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        city, day = str(rng.choice(CITIES)), str(rng.choice(DAYS))
        text = str(
            rng.choice([f"We fly to {city} on {day} 🙂.", f"on {day} it rained in {city}", f"{city}, who knows"])
        )
        text += " " + " ".join(rng.choice(["then", "we", "sleep", "again", "maybe"], 3))
        found[text] = [(text.index(x), text.index(x) + len(x), kind) for x, kind in ((city, "CITY"), (day, "DAY"))
                       if x in text]  # fmt: skip
    return list(found.items())


def written(folder: Path, name: str, rows: list[tuple[str, list[tuple[int, int, str]]]]) -> tuple[Path, str]:
    """A text file with a document on each line, and its annotations."""
    (folder / name).write_text("".join(f"{text}\n" for text, _ in rows), "utf-8")
    told = [f"{name}, {i}, {a}, {b}, {kind}" for i, (_, spans) in enumerate(rows) for a, b, kind in spans]
    (folder / f"{name}.csv").write_text("\n".join([HEADER, *told]), "utf-8")
    return folder / name, str(folder / f"{name}.csv")


def project(folder: Path, more: str = "") -> Path:
    path = loop.init(folder, labels=["CITY", "DAY"], task="entity_recognition")
    path.write_text(path.read_text("utf-8") + FAST + more, "utf-8")
    return folder


def answers(folder: Path) -> dict[str, dict[str, tuple[Span, ...]]]:
    """What is kept: annotator -> text -> spans."""
    kept: dict[str, dict[str, tuple[Span, ...]]] = {}
    with loop.opened(folder) as p:
        for a in p.store.answers():
            kept.setdefault(a.annotator, {})[p.item(a.example_id)] = a.response.spans
    return kept


def state(folder: Path) -> Any:
    with loop.opened(folder) as p:
        return [p.store.examples(), p.store.questions(), p.store.answers()]


@pytest.mark.slow
def test_from_annotations_to_an_endpoint_and_back(tmp_path: Path) -> None:
    folder = project(tmp_path / "p")
    pool, test = lines(70, 0), lines(40, 1)
    documents, table = written(tmp_path, "documents.txt", pool)
    added = loop.add(documents, folder, format="comprehend", labels=table)
    assert len(added.added) == 70 == added.labeled and not added.refused
    loop.add(
        written(tmp_path, "test.txt", test)[0], folder, "test", str(tmp_path / "test.txt.csv"), format="comprehend"
    )
    loop.train(folder)
    f1 = next(e for e in loop.evaluate(folder) if e.check == "f1")
    assert f1.figure > 0.9
    bundle = loop.package(folder)

    fresh = [text for text, _ in lines(30, 2)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "new.txt").write_text("\n".join([*fresh[:20], "", " ", *fresh[20:]]), "utf-8")
    loop.infer(bundle, tmp_path / "in", tmp_path / "out", format="comprehend", lines=True)
    (part,) = (tmp_path / "out").glob("part-*")
    said = [json.loads(line) for line in part.read_bytes().splitlines()]
    assert [row["Line"] for row in said] == [*range(20), *range(22, 32)] and {row["File"] for row in said} == {
        "new.txt"
    }
    endpoint = loop.serve(project=folder, background=True)
    try:
        with Client(endpoint.url, endpoint.name) as client:
            single = [detected(client.entities([text])[0], "new.txt", row["Line"])
                      for text, row in zip(fresh, said, strict=True)]  # fmt: skip
            batch = [detected(found) for found in client.entities(fresh)]
    finally:
        loop.serve(project=folder, stop=True)
    assert single == said and [row["Entities"] for row in said] == [row["Entities"] for row in batch]
    found = [{(e["BeginOffset"], e["EndOffset"], e["Type"]) for e in row["Entities"]} for row in said]
    right = sum(got == set(spans) for got, (_, spans) in zip(found, lines(30, 2), strict=True))
    assert right > 24, "it finds what it was trained for"
    assert all(e["Text"] == text[e["BeginOffset"] : e["EndOffset"]] and 0 <= e["Score"] <= 1
               for text, row in zip(fresh, said, strict=True) for e in row["Entities"])  # fmt: skip


def test_annotations_become_gold(tmp_path: Path) -> None:
    folder = project(tmp_path / "p", "[text]\nmax_tokens = 6\n")
    rows = lines(5, 0)
    rows[0] = ("One two. We saw New York today. Then home again, and so on.", [(16, 24, "CITY")])
    documents, table = written(tmp_path, "documents.txt", [*rows, ("nothing here", [])])
    first = loop.add([documents], folder, format="comprehend", labels=table)
    kept = answers(folder)
    assert set(kept) == {"gold"} and kept["gold"]["nothing here"] == ()
    names = {e.name for e in state(folder)[0]}
    assert f"{documents}#6" in names and any(name.startswith(f"{documents}#1:") for name in names), "long ones in parts"
    inside = [(text, s) for text, spans in kept["gold"].items() for s in spans if text in rows[0][0]]
    assert [text[s.start : s.end] for text, s in inside] == ["New York"]
    before = state(folder)
    again = loop.add([documents], folder, format="comprehend", labels=table)
    assert not again.added and again.labeled == 0 and len(again.duplicates) == len(first.added)
    assert state(folder) == before


def test_a_truth_told_later(tmp_path: Path) -> None:
    folder = project(tmp_path / "p")
    documents, table = written(tmp_path, "documents.txt", lines(4, 0))
    assert loop.add(documents, folder, format="comprehend").labeled == 0
    assert loop.add(documents, folder, format="comprehend", labels=table).labeled == 4
    assert len(answers(folder)["gold"]) == 4


def test_a_list_of_entities_is_an_annotator_who_may_be_wrong(tmp_path: Path) -> None:
    folder = project(tmp_path / "p")
    documents, table = written(tmp_path, "documents.txt", lines(40, 0))
    names = tmp_path / "list.csv"
    names.write_text("Text,Type\nRome,CITY\nOslo,CITY\nNew York,CITY\nMonday,DAY\nFriday,DAY\nSunday,DAY\nwe,CITY\n")
    added = loop.add(documents, folder, format="comprehend", labels=str(names))
    assert len(added.added) == added.listed == 40 and added.labeled == 0
    listed = answers(folder)["entity-list"]
    assert any(text[s.start : s.end] == "we" for text, spans in listed.items() for s in spans)
    assert loop.aggregate(folder).annotators[0]["name"] == "entity-list"
    half = Path(table).read_text().splitlines()
    (tmp_path / "half.txt").write_text("\n".join(documents.read_text("utf-8").splitlines()[:20]))
    rows = [r.replace("documents", "half") for r in half if r.startswith("File") or int(r.split(", ")[1]) < 20]
    (tmp_path / "half.csv").write_text("\n".join(rows))
    assert loop.add(tmp_path / "half.txt", folder, format="comprehend", labels=str(tmp_path / "half.csv")).labeled == 20
    quality = {a["name"]: a["quality"] for a in loop.aggregate(folder).annotators}
    assert quality["gold"] == 1 and 0.3 < quality["entity-list"] < 1, "it is judged, with Lima and 'we' against it"
    loop.train(folder)


def test_what_a_list_says_settles_nothing(tmp_path: Path) -> None:
    """People are asked all the same; a list is not asked, costs no budget, and no point of the curve is its."""
    folder, rows = project(tmp_path / "p"), lines(30, 0)
    documents, _ = written(tmp_path, "documents.txt", rows)
    (tmp_path / "list.csv").write_text("Text,Type\nRome,CITY\nFriday,DAY\n")
    loop.add(documents, folder, format="comprehend", labels=str(tmp_path / "list.csv"))
    assert loop.show(project=folder)["questions"] == {"asked": 0, "open": 0}
    truth = dict(rows)

    def person(question: Any, example: Any, who: str) -> tuple[Response, float]:
        with loop.opened(folder) as p:
            return Response("spans", spans=tuple(Span(*s) for s in truth[p.item(example.id)])), 4.0

    ran = loop.run(person, folder, goal=1.1, budget=10, promote=False)
    assert ran.outcome == "budget" and [point["answers"] for point in ran.rounds][-1] == 10
    shown = loop.show(project=folder)
    assert shown["questions"]["asked"] == 10 and shown["annotators"] == 1
    assert len(answers(folder)["me"]) == 10 and len(answers(folder)["entity-list"]) == 30


def test_documents_of_one_file_each(tmp_path: Path) -> None:
    folder = project(tmp_path / "p")
    (tmp_path / "docs").mkdir()
    for i in range(3):
        (tmp_path / "docs" / f"{i}.txt").write_text(f"To Rome,\nfor the {i}. time")
    (tmp_path / "docs" / "note.csv").write_text("no document")
    (tmp_path / "list.csv").write_text("Text,Type\nRome,CITY\n")
    found = loop.add(tmp_path / "docs", folder, labels=str(tmp_path / "list.csv"), format="comprehend_files")
    assert len(found.added) == 3 and len(answers(folder)["entity-list"]) == 3


@pytest.mark.parametrize(
    ("documents", "table", "error", "problem"),
    [
        ("to Rome\nto Oslo", HEADER + "\nd.txt, 0, 3, 7, CITY\nd.txt, 1, 2, 7, CITY", DataError, "t.csv:3"),
        ("to Rome\nto Oslo", "Text,Type\nRome,CITY\nOslo,TOWN", DataError, r"t.csv:3: unknown type 'TOWN'"),
        ("to Rome\nM\xfcller", "Text,Type\nRome,CITY", DataError, r"d.txt:2: not UTF-8"),
        ("to Rome", "a,b\n1,2", UsageError, "has the columns"),
    ],
)  # fmt: skip
def test_nothing_is_half_imported(
    tmp_path: Path, documents: str, table: str, error: type[TrilobeError], problem: str
) -> None:
    folder = project(tmp_path / "p")
    (tmp_path / "d.txt").write_bytes(documents.encode("latin-1"))
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(error, match=problem):
        loop.add(tmp_path / "d.txt", folder, format="comprehend", labels=str(tmp_path / "t.csv"))
    assert state(folder) == [[], [], []]
    assert not [p for p in (folder / ".trilobe").rglob("*") if p.is_file() and "blobs" in p.parts]


def test_calls_that_make_no_sense(tmp_path: Path, tiny: Any) -> None:
    (tmp_path / "d.txt").write_text("to Rome")
    (tmp_path / "list.csv").write_text("Text,Type\nRome,CITY\n")
    with pytest.raises(UsageError, match="a project without any"):
        loop.add(tmp_path / "d.txt", tiny.folder, format="comprehend")
    folder = project(tmp_path / "p")
    with pytest.raises(UsageError, match="a test part known from a list"):
        loop.add(tmp_path / "d.txt", folder, "test", str(tmp_path / "list.csv"), format="comprehend")
    (tmp_path / "none").mkdir()
    with pytest.raises(NotFoundError, match="no files of a known kind"):
        loop.add(tmp_path / "none", folder, format="comprehend")


def test_the_command(tmp_path: Path, trilobe: Any) -> None:
    folder = project(tmp_path / "p")
    documents, table = written(tmp_path, "documents.txt", lines(3, 0))
    said = trilobe("add", documents, "--format", "comprehend", "--labels", table, "--project", folder)
    assert said.code == 0 and said.out == "3 added, 3 with their true label\n"
