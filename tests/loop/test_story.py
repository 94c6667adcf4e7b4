"""The report at every stage: it renders, stands alone, and tells what is there and no more."""

import re
from pathlib import Path

import pytest

from trilobe import loop
from trilobe.loop.story import story


def page(folder: Path) -> str:
    path = loop.report(folder)
    assert path == folder / "report.html"
    text = path.read_text("utf-8")
    assert text.startswith("<!") and text.rstrip().endswith("</html>")
    assert not re.search(r"""(src|href)=["']?https?:""", text), "it needs no network"
    return text


def parts(folder: Path) -> set[str]:
    with loop.opened(folder) as p:
        told = story(p)
    names = ("pool", "questions", "answers", "training", "checks", "serving", "monitoring", "why", "repair")
    return {n for n in names if getattr(told, n) is not None}


def test_every_stage(tiny, tmp_path: Path) -> None:
    loop.init(tmp_path / "new", labels=["a", "b"])
    assert page(tmp_path / "new") and parts(tmp_path / "new") == set()
    assert page(tiny.folder) and parts(tiny.folder) == {"pool"}
    loop.query(tiny.folder)
    assert page(tiny.folder) and parts(tiny.folder) == {"pool", "questions"}
    loop.label(tiny.answer, tiny.folder)
    loop.aggregate(tiny.folder)
    assert page(tiny.folder) and parts(tiny.folder) == {"pool", "questions", "answers"}
    loop.train(tiny.folder)
    assert page(tiny.folder) and parts(tiny.folder) == {"pool", "questions", "answers", "training"}
    loop.check(tiny.folder)
    assert page(tiny.folder) and "checks" in parts(tiny.folder)
    loop.package(tiny.folder)
    text = page(tiny.folder)
    assert parts(tiny.folder) == {"pool", "questions", "answers", "training", "checks", "serving"}
    with loop.opened(tiny.folder) as p:
        assert p.store.bundle().id[:8] in text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a & b"])
def test_names_from_outside_are_text(tiny, tmp_path: Path, name: str) -> None:
    ids = [e.id for e in tiny.examples("pool")[:4]]
    table = tmp_path / "a.csv"
    table.write_text("\n".join(["example,annotator,label", *[f"{i},{name},{tiny.truth[i]}" for i in ids]]))
    loop.label(table, tiny.folder)
    loop.aggregate(tiny.folder)
    text = page(tiny.folder)
    assert name not in text and name.replace("&", "&amp;").replace("<", "&lt;").split(">")[0] in text


def test_a_model_of_other_classes_does_not_stop_the_report(trained) -> None:
    trained.set("labels", "names", '["bar", "cross", "dot", "star"]')
    assert page(trained.folder)
