"""Files of many texts: every format gives the same nouns, and a bad line is named."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.data.tags import possible_tags, spans_to_tags, tag_space, tags_to_spans
from trilobe.errors import AnswerError, DataError, UnreadableExample, UsageError
from trilobe.tasks.reading import read_examples
from trilobe.tasks.words import tokenize
from trilobe.types import Response, Span

FOLDER = Path(os.environ.get("TRILOBE_DATA", "/nowhere"))
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


def test_json_lines() -> None:
    lines = [
        {"text": "plain"},
        {"text": "one", "label": "a"},
        {"text": "some", "labels": ["a", "b"]},
        {"text": "👍 to Rome", "spans": [[5, 9, "CITY"]]},
        {"text": "none", "spans": []},
        {"text": "other form", "spans": [{"start": 0, "end": 5, "label": "X", "token": 1}], "id": 7},
    ]
    data = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    said = read_examples(data.encode(), ".jsonl")
    assert [t for t, _ in said] == [line["text"] for line in lines]
    assert [r for _, r in said] == [
        None,
        Response("class", ("a",)),
        Response("one_of", ("a", "b")),
        Response("spans", spans=(Span(5, 9, "CITY"),)),
        Response("spans"),
        Response("spans", spans=(Span(0, 5, "X"),)),
    ]


@given(st.lists(st.tuples(texts, st.sampled_from(["", "a", "b c"])), min_size=1, max_size=5))
def test_tables_give_back_what_was_written(rows: list[tuple[str, str]]) -> None:
    rows = [(t.replace("\r", " ") + "x", label) for t, label in rows]  # csv knows no lone carriage return
    out = io.StringIO()
    csv.writer(out).writerows([("text", "label"), *rows])
    said = read_examples(out.getvalue().encode(), ".csv")
    assert said == [(t, Response("class", (label,)) if label else None) for t, label in rows]
    lines = "\n".join(json.dumps({"text": t}) for t, _ in rows)
    assert read_examples(lines.encode(), ".jsonl") == [(t, None) for t, _ in rows]


def test_tables_of_other_forms() -> None:
    assert read_examples(b"\xef\xbb\xbfid,Text\n1,a\n", ".csv") == [("a", None)]
    assert read_examples(b"label\ttext\nx\ta, b\n", ".tsv") == [("a, b", Response("class", ("x",)))]
    assert len(read_examples(b'text\n"' + b"long " * 100_000 + b'"\n', ".csv")[0][0]) == 500_000
    assert read_examples("Zürich \n".encode(), ".txt") == [("Zürich \n", None)]


SCHEMES = {
    "IOB1": "U I-ORG\nN I-ORG\nUK B-ORG\nin O\nNew I-LOC\nYork I-LOC\nAl I-PER\n",
    "BIO": "U B-ORG\nN I-ORG\nUK B-ORG\nin O\nNew B-LOC\nYork I-LOC\nAl B-PER\n",
    "BIOES": "U B-ORG\nN E-ORG\nUK S-ORG\nin O\nNew B-LOC\nYork E-LOC\nAl S-PER\n",
    "BILOU": "U B-ORG\nN L-ORG\nUK U-ORG\nin O\nNew B-LOC\nYork L-LOC\nAl U-PER\n",
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("gap", ["tab", "spaces", "columns", "windows"])
def test_columns_of_every_scheme(scheme: str, gap: str) -> None:
    data = "-DOCSTART- -X- O O\n\n" + SCHEMES[scheme] + "\n\nnobody O\n"
    change = {"tab": ("\t", "\n"), "spaces": ("  ", "\n"), "columns": (" NNP I-NP ", "\n"), "windows": (" ", "\r\n")}[
        gap
    ]
    data = data.replace(" O O", "_").replace(" ", change[0]).replace("\n", change[1])
    (text, said), (other, none) = read_examples(data.encode(), ".conll")
    assert text == "U N UK in New York Al" and other == "nobody" and none == Response("spans")
    want = [Span(0, 3, "ORG"), Span(4, 6, "ORG"), Span(10, 18, "LOC"), Span(19, 21, "PER")]
    assert said is not None and list(said.spans) == want


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), min_size=1, max_size=12))
def test_columns_read_as_the_tags_mean(tags: list[str]) -> None:
    words = ["w" * (1 + i % 3) for i in range(len(tags))]
    [(text, said)] = read_examples("\n".join(map(" ".join, zip(words, tags, strict=True))).encode(), ".bio")
    space, offsets = tag_space(["X", "Y"]), tokenize(text)
    assert said is not None
    back = spans_to_tags(said.spans, offsets, space)
    assert [t[2:] for t in back] == [t[2:] for t in tags], "labels stay, only beginnings are mended"
    assert tags_to_spans(back, offsets) == list(said.spans)


def test_columns_without_tags() -> None:
    assert read_examples(b"just\nwords\n", ".conll") == [("just words", None)]
    assert read_examples(b"just O\n\nwords\n", ".iob") == [("just", Response("spans")), ("words", None)]


@pytest.mark.parametrize(
    ("data", "suffix", "kind", "message"),
    [
        (b'{"text": "a"}\n{"text": }\n', ".jsonl", UnreadableExample, "line 2 is not JSON"),
        (b'{"txt": "a"}\n', ".jsonl", UnreadableExample, "line 1 has no text"),
        (b"[1]\n", ".jsonl", UnreadableExample, "line 1 has no text"),
        (b'{"text": " "}\n', ".jsonl", UnreadableExample, "line 1: a text of spaces only"),
        (b'{"text": "a\\ud800"}\n', ".jsonl", UnreadableExample, "line 1: half a surrogate pair"),
        (b'{"text": "a\\u0000"}\n', ".jsonl", UnreadableExample, "line 1: not a text"),
        (b'\n{"text": "a", "label": 3}\n', ".jsonl", AnswerError, "line 2: label 3"),
        (b'{"text": "a", "label": "x", "spans": []}', ".jsonl", AnswerError, "line 1: both 'label' and 'spans'"),
        (b'{"text": "a", "labels": []}', ".jsonl", AnswerError, "line 1: a 'one_of' answer without labels"),
        (b'{"text": "a", "spans": [[0, 2, "X"]]}', ".jsonl", AnswerError, "line 1: the span 0 to 2"),
        (b'{"text": "abc", "spans": [[0, 2, "X"], [1, 3, "Y"]]}', ".jsonl", AnswerError, r"1 to 3 \(Y\) overlaps"),
        (b'{"text": "abc", "spans": [[0, "2", "X"]]}', ".jsonl", AnswerError, "line 1: the span"),
        (b'{"text": "abc", "spans": [[0, 2, ""]]}', ".jsonl", AnswerError, "without a label"),
        (b'{"text": "abc", "spans": 3}', ".jsonl", AnswerError, "line 1: spans 3"),
        (b"content,label\na,b\n", ".csv", UnreadableExample, "the columns"),
        (b"text,label\na,b\nc\n", ".csv", DataError, None),
        (b"text,label\na,b,c\n", ".csv", UnreadableExample, "line 2 has another number of fields"),
        (b'text\n"a', ".csv", UnreadableExample, "line 2"),
        (b"text,label\n,b\n", ".csv", UnreadableExample, "line 2: an empty text"),
        (b"a O\nb X\n", ".conll", UnreadableExample, "line 2 has the tag 'X'"),
        (b"a O\n\nb O\nc\n", ".conll", UnreadableExample, "sentence from line 3 has words with and without"),
        (b"-DOCSTART- O\n", ".conll", UnreadableExample, "no example"),
        (b"a", ".pdf", UsageError, r"ends in '\.pdf'"),
        (b"\0", ".csv", UnreadableExample, "NUL"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(data: bytes, suffix: str, kind: type[Exception], message: str | None) -> None:
    if message is None:  # a row may end early: what is missing has no label
        assert read_examples(data, suffix)[1] == ("c", None)
        return
    with pytest.raises(kind, match=message):
        read_examples(data, suffix)


COUNTS = {"eng.train": (14_041, 23_499), "eng.testa": (3_250, 5_942), "eng.testb": (3_453, 5_648)}


@pytest.mark.skipif(not (FOLDER / "conll2003").exists(), reason="TRILOBE_DATA names no folder with conll2003")
@pytest.mark.parametrize("name", COUNTS)
def test_conll_2003_has_its_published_counts(name: str) -> None:
    found = read_examples((FOLDER / "conll2003" / name).read_bytes(), ".conll")
    assert (len(found), sum(len(r.spans) for _, r in found if r)) == COUNTS[name]
    space = tag_space(["LOC", "MISC", "ORG", "PER"])
    for text, said in found[::7]:
        offsets = tokenize(text)
        assert said is not None and (possible_tags(said, offsets, space).sum(axis=1) == 1).all()
        assert tags_to_spans(spans_to_tags(said.spans, offsets, space), offsets) == sorted(said.spans)
