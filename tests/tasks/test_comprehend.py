"""Comprehend's formats: what is read, and that every mistake is named with its file and line."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.errors import DataError, UsageError
from trilobe.tasks.entity_recognition.comprehend import Document, detected, matches, read
from trilobe.tasks.words import tokenize
from trilobe.types import Span

LABELS = ("ENGINEER", "MANAGER")
# The example of Amazon Comprehend's Developer Guide, "Plain-text annotation files".
TEXT = (
    "Diego Ramirez is an engineer in the high tech industry.\n"
    "Emilio Johnson has been an engineer for 14 years.\n"
    "J Doe is a judge on the Washington Supreme Court.\n"
    "Our latest new employee, Mateo Jackson, has been a manager in the industry for 4 years.\n"
)
HEADER = "File, Line, Begin Offset, End Offset, Type\n"
ROWS = "documents.txt, 0, 0, 13, ENGINEER\ndocuments.txt, 1, 0, 14, ENGINEER\ndocuments.txt, 3, 25, 38, MANAGER\n"


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.txt"
    path.write_text(TEXT)
    return path


def table(folder: Path, text: str | bytes) -> str:
    path = folder / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def said(found: list[Document]) -> dict[str, list[tuple[str, str]]]:
    return {
        d.name.rpartition("/")[2]: [(d.text[s.start : s.end], s.label) for s in d.spans or ()]
        for d in found
    }  # fmt: skip


def test_annotations_of_lines(documents: Path, tmp_path: Path) -> None:
    found, who = read([documents], table(tmp_path, HEADER + ROWS), LABELS)
    assert who == "gold"
    assert said(found) == {
        "documents.txt#1": [("Diego Ramirez", "ENGINEER")],
        "documents.txt#2": [("Emilio Johnson", "ENGINEER")],
        "documents.txt#3": [],
        "documents.txt#4": [("Mateo Jackson", "MANAGER")],
    }
    assert [d.spans for d in found][2] == (), "a line that is not mentioned has no entities, and that is known"


def test_annotations_as_other_programs_write_them(documents: Path, tmp_path: Path) -> None:
    bom, text = b"\xef\xbb\xbf", TEXT.replace("J Doe", "\n🙂 J Doe").replace("\n", "\r\n")
    documents.write_bytes(bom + text.encode())
    rows = '"documents.txt","3","2","7"," ENGINEER"\r\n"documents.txt","0","0","13","ENGINEER"\r\n\r\n'
    found, _ = read([documents], table(tmp_path, bom + (HEADER.upper() + rows).encode()), LABELS)
    assert said(found)["documents.txt#4"] == [("J Doe", "ENGINEER")], "characters are counted, not bytes; no \\r"
    assert [d.line for d in found] == [0, 1, 3, 4]


def test_annotations_of_files(tmp_path: Path) -> None:
    """Without a column Line, offsets count from the beginning of a file."""
    files = []
    for name in ("x/a.txt", "y/a.txt", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Our new one:\nMateo Jackson")
        files.append(tmp_path / name)
    rows = "File,Begin Offset,End Offset,Type\nx/a.txt,13,26,MANAGER\n"
    with pytest.raises(DataError, match="same text with different entities"):
        read(files, table(tmp_path, rows), LABELS)
    for i, path in enumerate(files):
        path.write_text(f"Our {i} one:\nMateo Jackson")
    found, _ = read(files, table(tmp_path, rows.replace("13,26", "11,24")), LABELS)
    assert [(d.line, len(d.spans or ())) for d in found] == [(None, 1), (None, 0), (None, 0)]
    with pytest.raises(DataError, match=r"table.csv:2: the file 'a.txt' is one of several; expected .* as in x/a.txt"):
        read(files, table(tmp_path, rows.replace("x/", "")), LABELS)


def test_a_list_of_entities(documents: Path, tmp_path: Path) -> None:
    rows = "Text, Type\nDiego Ramirez, ENGINEER\nDiego, MANAGER\nMateo Jackson,MANAGER\nyear,MANAGER\nNobody,MANAGER\n"
    found, who = read([documents], table(tmp_path, rows), LABELS)
    assert who == "entity-list"
    assert said(found) == {
        "documents.txt#1": [("Diego Ramirez", "ENGINEER")],
        "documents.txt#2": [],
        "documents.txt#3": [],
        "documents.txt#4": [("Mateo Jackson", "MANAGER")],
    }
    (whole,), _ = read([documents], table(tmp_path, rows), LABELS, by_line=False)
    assert whole.line is None and len(whole.spans or ()) == 2
    plain, who = read([documents], "", LABELS)
    assert who == "" and [d.spans for d in plain] == [None] * 4


def test_a_manifest(tmp_path: Path) -> None:
    """The example of the Developer Guide, "PDF annotation files"."""
    rows = [
        {"source": "Diego Ramirez is an engineer.", "Demo": {"annotations": {
            "entities": [{"endOffset": 13, "startOffset": 0, "label": "ENGINEER"}], "labels": [{"label": "ENGINEER"}]}},
         "Demo-metadata": {"entities": [{"confidence": 0.92}], "type": "groundtruth/text-span"}},
        {"source": "J Doe is a judge.", "Demo": {"annotations": {"entities": []}}},
    ]  # fmt: skip
    path = tmp_path / "output.manifest"
    path.write_text("\n".join(map(json.dumps, rows)))
    found, who = read([path], "", LABELS)
    assert who == "gold" and list(said(found).values()) == [[("Diego Ramirez", "ENGINEER")], []]

    def wrong(start: float, end: int) -> str:
        entity = {"startOffset": start, "endOffset": end, "label": "MANAGER"}
        return json.dumps({"source": "a", "D": {"annotations": {"entities": [entity]}}})

    for line, problem in (
        ('{"source-ref": "s3://a.pdf"}', "no text with entities"),
        ("[1]", "no text with entities"),
        ("{", "no text with entities"),
        ('{"source": "a"}', "0 sets of annotations"),
        ('{"source": " ", "D": {"annotations": {"entities": []}}}', "no text with entities"),
        (wrong(0.5, 1), "begin offset is '0.5'"),
        (wrong(0, 2), "expected begin < end <= 1"),
    ):
        path.write_text(json.dumps(rows[0]) + "\n\n" + line)
        with pytest.raises(DataError, match=rf"output.manifest:3.*{problem}"):
            read([path], "", LABELS)
    with pytest.raises(UsageError, match="manifests alone"):
        read([path], "table.csv", LABELS)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("other.txt,0,0,5,MANAGER", r":2: the file 'other.txt' is not among the documents; expected one of documents"),
        (",0,0,5,MANAGER", r":2: the file '' is not among"),
        ("documents.txt,9,0,5,MANAGER", r":2: line 9 of .* is not there, or empty"),
        ("documents.txt,4,0,5,MANAGER", r":2: line 4 of .* is not there, or empty"),
        ("documents.txt,-1,0,5,MANAGER", r":2: Line is '-1'; expected a whole number"),
        ("documents.txt,x,0,5,MANAGER", r":2: Line is 'x'"),
        ("documents.txt,0,zero,5,MANAGER", r":2: the begin offset is 'zero'"),
        ("documents.txt,0,0,5.0,MANAGER", r":2: the end offset is '5.0'"),
        ("documents.txt,0,0,1" + "0" * 30 + ",MANAGER", r":2: the end offset is '1000"),
        ("documents.txt,0,0,99,MANAGER", r":2: 0 to 99 .*expected begin < end <= 55, its length"),
        ("documents.txt,0,5,5,MANAGER", r":2: 5 to 5 .*expected begin < end"),
        ("documents.txt,0,1,5,MANAGER", r":2: 1 to 5 .* is 'iego'; expected whole words"),
        ("documents.txt,0,0,6,MANAGER", r":2: 0 to 6 .* is 'Diego '; expected whole words, without spaces"),
        ("documents.txt,0,0,5,JUDGE", r":2: unknown type 'JUDGE'; expected one of ENGINEER, MANAGER\n.*labels.names"),
        ("documents.txt,0,0,5,manager", r":2: unknown type 'manager'"),
        ("documents.txt,0,0,5", r":2: 4 cells; expected 5"),
        ("documents.txt,0,0,5,MANAGER,x", r":2: 6 cells; expected 5"),
        ('"documents.txt,0,0,5,MANAGER', r"table.csv:\d: unexpected end of data"),
        ("", "has no rows"),
        ("documents.txt,0,0,5,MANAGER\ndocuments.txt,0,0,5,MANAGER", r":3: 0 to 5 .* is said twice, first in .*csv:2"),
        ("documents.txt,0,0,5,MANAGER\ndocuments.txt,0,0,5,ENGINEER", r"overlaps that of .*table.csv"),
        ("documents.txt,0,6,13,MANAGER\n\ndocuments.txt,0,0,13,MANAGER", r":2: 6 to 13 .* overlaps that of .*csv:4"),
    ],
)  # fmt: skip
def test_annotations_that_are_wrong(documents: Path, tmp_path: Path, rows: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read([documents], table(tmp_path, HEADER + rows), LABELS)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("Diego,JUDGE", r":2: unknown type 'JUDGE'"),
        (",MANAGER", r":2: no text"),
        ("Diego,MANAGER\nDiego,MANAGER", r":3: 'Diego' stands already in line 2; expected each entity once"),
        ("Diego,MANAGER\nDiego,ENGINEER", r":3: 'Diego' stands already in line 2 as MANAGER"),
        ("diego,MANAGER\nDieg,MANAGER", r"no entity of .*table.csv stands in a document"),
    ],
)
def test_lists_that_are_wrong(documents: Path, tmp_path: Path, rows: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read([documents], table(tmp_path, "Text,Type\n" + rows), LABELS)


def test_files_that_are_wrong(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"table.csv has the columns \['a', 'b'\]; expected File, Line"):
        read([documents], table(tmp_path, "a,b\n1,2"), LABELS)
    with pytest.raises(DataError, match=r"table.csv:3: not UTF-8"):
        read([documents], table(tmp_path, HEADER.encode() + b"documents.txt,0,0,5,MANAGER\nM\xfcller"), LABELS)
    with pytest.raises(DataError, match=r"nowhere.csv cannot be read"):
        read([documents], str(tmp_path / "nowhere.csv"), LABELS)
    good = table(tmp_path, HEADER + ROWS)
    for data, problem in (
        (TEXT.encode() + "Müller".encode("latin-1"), r"documents.txt:5: not UTF-8"),
        (TEXT.encode("utf-16"), r"documents.txt.*UTF-16"),
        (b"", r"documents.txt.*an empty text"),
        (b"a\0b", r"documents.txt.*NUL"),
    ):
        documents.write_bytes(data)
        with pytest.raises(DataError, match=problem):
            read([documents], good, LABELS)


def test_one_text_has_one_truth(documents: Path, tmp_path: Path) -> None:
    documents.write_text("Diego works\nDiego works\n")
    row = "documents.txt,{},0,5,MANAGER\n"
    with pytest.raises(DataError, match=r"documents.txt#2 and .*documents.txt#1 are the same text with different"):
        read([documents], table(tmp_path, HEADER + row.format(0)), LABELS)
    found, _ = read([documents], table(tmp_path, HEADER + row.format(0) + row.format(1)), LABELS)
    assert len(found) == 2


WORDS = st.sampled_from(["New", "York", "new", "Newer", "a", "🙂", "b.", "-", "東京"])


PHRASES = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)


@given(st.lists(WORDS, max_size=12).map(" ".join), st.dictionaries(PHRASES, st.sampled_from(LABELS), max_size=6))
def test_matches_are_exact_whole_and_apart(text: str, entries: dict[str, str]) -> None:
    found = matches(text, entries)
    words = tokenize(text)
    starts, ends = {a for a, _ in words}, {b for _, b in words}
    for span in found:
        assert entries[text[span.start : span.end]] == span.label
        assert span.start in starts and span.end in ends
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
    covered = {i for span in found for i in range(span.start, span.end)}
    for entry in entries:  # by a slow search: nothing that stands apart from what was found was missed
        at = text.find(entry)
        while at >= 0:
            whole = at in starts and at + len(entry) in ends
            assert not whole or covered & set(range(at, at + len(entry)))
            at = text.find(entry, at + 1)


def test_the_answer_in_their_shape() -> None:
    entity: dict[str, Any] = {"start": 0, "end": 4, "label": "CITY", "text": "Rome", "confidence": 0.5}
    one = {"BeginOffset": 0, "EndOffset": 4, "Score": 0.5, "Text": "Rome", "Type": "CITY"}
    assert detected([entity]) == {"Entities": [one]}
    assert detected([entity], "a.txt", 0) == {"Entities": [one], "File": "a.txt", "Line": 0}
    assert Document(Path("a.txt"), None, "x", (Span(0, 1, "CITY"),)).name == "a.txt"
