"""What the two text tasks share: files to examples with exact spans, likeness without a network, hiding, drawing."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.config import Config, parse
from trilobe.errors import UnreadableExample
from trilobe.rows import as_rows
from trilobe.tasks.drawing import Mark, draw, lay, terminal
from trilobe.tasks.hiding import hidden, hide, occlusion, shares, word_marks
from trilobe.tasks.texts import bag, captured, content, encode, kept, preprocessing, read
from trilobe.tasks.words import UNKNOWN, ids, tokenize

anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


def config_of(more: str = "") -> Config:
    return parse(f'[project]\nname = "p"\ntask = "text_classification"\n[labels]\nnames = ["a", "b"]\n{more}')


def test_long_documents_become_parts_that_lose_no_span() -> None:
    sentence = "In Zürich 👍 the Billing Gateway v2.3 failed. "
    text = sentence * 50
    spans = [[i * len(sentence) + a, i * len(sentence) + b, "X"] for i in range(50) for a, b in ((3, 9), (16, 36))]
    import json

    data = json.dumps({"text": text, "spans": spans}).encode()
    found = list(read(data + b"\n" + data, ".jsonl", max_tokens=20))
    said = [(d.decode()[s.start : s.end], s.label) for d, truth, _ in found if truth for s in truth.spans]
    assert said == [("Zürich", "X"), ("Billing Gateway v2.3", "X")] * 100 or {w for w, _ in said} == {
        text[a:b] for a, b, _ in spans
    }
    assert len(said) == 200 and len(found) == 100 and len({where for _, _, where in found}) == 100
    number, _, range_ = found[-1][2].partition(":")
    start, end = map(int, range_.split("-"))
    assert number == "#2" and text[start:end] == found[-1][0].decode()
    assert [w for _, _, w in read(data, ".jsonl")] == ["#1"]


def test_partial_truth_goes_to_every_part() -> None:
    parts = list(read(b'{"text": "One two. Three.", "labels": ["a", "b"]}', ".jsonl", max_tokens=3))
    assert [(d, t.labels) for d, t, _ in parts if t] == [(b"One two.", ("a", "b")), (b"Three.", ("a", "b"))]


def test_what_clients_sent_is_read_or_refused() -> None:
    assert captured(np.frombuffer("Zürich".encode(), np.uint8)) == "Zürich"
    with pytest.raises(UnreadableExample, match="not UTF-8"):
        captured(np.frombuffer(b"\xff\xff\xff", np.uint8))


def test_sameness() -> None:
    assert content(" a\nb ") == content("a b") != content("a B")
    assert content("a b", exact=True) != content("a  b", exact=True)


def test_input_depends_on_the_text_alone() -> None:
    texts = ["One two three.", "", "四 👍", "one " * 30]
    spec = preprocessing(texts, config_of("[text]\nmax_tokens = 6"))
    X = encode(texts, spec)
    for text, row in zip(texts, X, strict=True):
        np.testing.assert_array_equal(encode([text], spec)[0], row)
    cut = encode(texts, spec, cut=True)
    assert [len(r) for r in cut] == [4, 0, 2, 6] and [len(r) for r in X] == [4, 0, 2, 30]


@given(st.integers(0, 50), st.integers(1, 20))
def test_both_ends_are_kept(n: int, most: int) -> None:
    which = kept(n, most)
    assert len(which) == min(n, most) and (np.diff(which) > 0).all()
    if n > most > 1:
        assert which[0] == 0 and which[-1] == n - 1


def test_likeness_without_a_network() -> None:
    spec = {"version": "words.v1", "buckets": 1024, "n_chars": 16}
    X = as_rows(ids(["reset my password", "password reset please", "the parcel is late", "late parcel today"], spec))
    like = bag(X) @ bag(X).T
    assert like[0, 1] > like[0, 2] and like[2, 3] > like[1, 3]
    np.testing.assert_allclose(np.diag(like), 1)
    said = np.random.default_rng(0).normal(size=3)
    with_encoder = as_rows([np.hstack([x, np.tile(said, (len(x), 1))]) for x in X])
    np.testing.assert_allclose(bag(with_encoder), np.tile(said / np.linalg.norm(said), (4, 1)))
    assert bag(X[:0]).shape == (0, 512)


@given(st.integers(1, 30), st.floats(0.01, 0.6), st.floats(0.01, 0.4), st.integers(0, 5))
def test_hiding_is_nested_and_hides_the_share_that_was_asked(n: int, eps: float, more: float, seed: int) -> None:
    X = as_rows([np.full((n, 3), 7.0, dtype=np.float32), np.full((2 * n, 3), 7.0, dtype=np.float32)])
    for few, many in zip(hidden(X, eps, 3, seed), hidden(X, eps + more, 3, seed), strict=True):
        for x, a, b in zip(X, few, many, strict=True):
            gone, more_gone = a[:, 0] == UNKNOWN, b[:, 0] == UNKNOWN
            assert gone.sum() == int(np.ceil(eps * len(x) - 1e-9)) >= 1
            assert (more_gone | ~gone).all()
            assert (a[gone, 1:] == 0).all() and (a[~gone] == x[~gone]).all()
    assert shares([0.2, 0.1, 0.2]) == [0.1, 0.2]


def test_occlusion_is_complete_for_sums_and_says_so_where_it_is_not() -> None:
    weight = np.random.default_rng(0).normal(size=10)
    x = np.arange(2, 7, dtype=np.float32)[:, None]

    def seen(X: np.ndarray) -> np.ndarray:
        return np.where(X[:, :, 0] == UNKNOWN, 0.0, weight[X[:, :, 0].astype(int)])

    falls, rest = occlusion(x, lambda X: seen(X).sum(axis=1))
    np.testing.assert_allclose(falls, weight[2:7])
    assert rest < 1e-9
    falls, rest = occlusion(x, lambda X: (X[:, :, 0] != UNKNOWN).any(axis=1).astype(float))
    assert (falls == 0).all() and rest > 0.99, "any word is enough: none alone explains it"
    many, rest = occlusion(np.full((1000, 1), 3.0), lambda X: seen(X).sum(axis=1))
    np.testing.assert_allclose(many, weight[3])
    assert rest < 1e-9 and len(many) == 1000
    assert hide(x, np.array([0]))[0, 0] == UNKNOWN and x[0, 0] == 2


@given(anything, st.integers(2, 20), st.integers(1, 6))
def test_lines_hold_all_words_in_order(text: str, columns: int, most: int) -> None:
    lines = lay(text, columns, most)
    assert len(lines) <= most and all(a < b for a, b in lines)
    assert all(lines[i][1] <= lines[i + 1][0] for i in range(len(lines) - 1))
    whole = lay(text, columns, 10_000)
    assert lines == whole[:most]
    shown = {i for a, b in whole for i in range(a, b)}
    assert {i for i, c in enumerate(text) if not c.isspace()} <= shown


@given(anything)
def test_drawings_are_well_formed_whatever_the_text(text: str) -> None:
    marks = [Mark(a, b, "#000000", 0.5, "<L&>") for a, b in tokenize(text)]
    root = ET.fromstring(draw(text, marks, columns=12))
    letters = "".join(e.text or "" for e in root.iter() if e.tag.endswith("}text"))
    if text.isalnum() and text.isascii() and text:
        assert text in letters or len(text) > 12
    lines = terminal(text).split("\n")
    assert all(c.isprintable() or c.isspace() or ord(c) > 127 for line in lines for c in line)
    assert "\x1b" not in terminal(text)


def test_drawings_show_what_is_marked() -> None:
    svg = draw("to Rome\nand back", [Mark(3, 7, "#123456", 0.25, "CITY"), Mark(5, 11, "#654321")]).decode()
    assert svg.count('fill="#123456" fill-opacity="0.25" stroke="#123456"') == 1 and ">CITY<" in svg
    assert svg.count('fill="#654321"') == 2, "a mark over two lines is two boxes"
    assert 'direction="rtl"' in draw("مرحبا").decode() and "rtl" not in svg
    assert "…" in draw("a\n" * 100, most=3).decode() and terminal("a\n" * 100, most=3) == "a\na\na\n…"
    assert len(draw("word " * 200_000)) < 20_000
    assert [m.strength for m in word_marks(np.array([0.0, 2.0]), [(0, 1), (2, 3)])] == [0.0, 0.8]
