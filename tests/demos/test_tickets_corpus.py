"""The corpus of support messages is what its card says: clean offsets, disjoint parts, held-out names that are new."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import trilobe
from trilobe.types import Span

FOLDER = Path(trilobe.__file__).parent / "demos"
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (FOLDER / "tickets.jsonl").read_text("utf-8").splitlines() if line
]
POOL, TEST = ([r for r in ROWS if r["split"] == s] for s in ("pool", "test"))
VERSION = re.compile(r"\bv?\d+(\.\w+)+(-\w+(\.\d+)?)?\b|\bv\d+\b|\b20\d\d R\d\b|\bbuild \d+\b")


def spans(row: dict[str, Any]) -> list[Span]:
    return [Span(*s) for s in row["spans"]]


def named(rows: list[dict[str, Any]], label: str) -> Counter[str]:
    """How often each entity of that label is named, without regard to case."""
    return Counter(r["text"][s.start : s.end].lower() for r in rows for s in spans(r) if s.label == label)


def f1(found: list[set[Span]], rows: list[dict[str, Any]]) -> float:
    """Strict entity F1."""
    right = sum(len(f & set(spans(r))) for f, r in zip(found, rows, strict=True))
    return 2 * right / (sum(map(len, found)) + sum(len(r["spans"]) for r in rows))


def test_every_line_is_a_message_with_spans() -> None:
    for row in ROWS:
        assert list(row) == ["text", "spans", "split"]
        assert row["split"] in ("pool", "test")
        assert row["text"] == row["text"].strip() != ""
        assert row["text"].isprintable()


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_spans_fall_on_words_and_do_not_overlap(row: dict[str, Any]) -> None:
    text, end = row["text"], 0
    for span in spans(row):
        assert span.label in ("SERVICE", "VERSION")
        assert end <= span.start < span.end <= len(text), "out of order, overlapping or outside"
        entity = text[span.start : span.end]
        assert entity == entity.strip()
        assert not (span.start and text[span.start - 1].isalnum()), f"{entity!r} begins inside a word"
        assert not (span.end < len(text) and text[span.end].isalnum()), f"{entity!r} ends inside a word"
        assert (span.label == "SERVICE") <= any(c.isalpha() for c in entity)
        assert (span.label == "VERSION") <= any(c.isdigit() for c in entity)
        end = span.end


def test_no_message_comes_twice() -> None:
    plain = Counter(re.sub(r"\W+", " ", r["text"].lower()).strip() for r in ROWS)
    assert [text for text, n in plain.items() if n > 1] == []
    masked = Counter(re.sub(r"\d+", "#", "".join(mask(r))).lower() for r in ROWS)
    assert [text for text, n in masked.items() if n > 1] == [], "one sentence with other names in it"


def mask(row: dict[str, Any]) -> str:
    """The message with each entity replaced by its label."""
    text = row["text"]
    for span in reversed(spans(row)):
        text = text[: span.start] + span.label + text[span.end :]
    return str(text)


def test_there_is_enough_of_everything() -> None:
    assert len(ROWS) >= 400
    assert len(TEST) >= 120
    for rows in (POOL, TEST):
        empty = sum(not r["spans"] for r in rows) / len(rows)
        assert 0.35 <= empty <= 0.55
        assert len(named(rows, "SERVICE")) >= 50
        assert len(named(rows, "VERSION")) >= 35
    assert sum(len(r["spans"]) > 1 for r in ROWS) >= 80
    assert sum(not r["text"].isascii() for r in ROWS) >= 15
    assert any(ord(c) > 0xFFFF for r in ROWS if r["spans"] for c in r["text"][: r["spans"][-1][0]])
    assert sum(s.label == "SERVICE" and r["text"][s.start : s.end].islower() for r in ROWS for s in spans(r)) >= 25


def test_names_are_plain_words_elsewhere() -> None:
    """In each part, some service is named in one message and an ordinary word in another."""
    for rows in (POOL, TEST):
        words = Counter(w for r in rows for w in set(re.findall(r"\w+", mask(r).lower())))
        assert sum(any(w in words for w in name.split()) for name in named(rows, "SERVICE")) >= 20


def test_most_held_out_services_are_new() -> None:
    known, held_out = named(POOL, "SERVICE"), named(TEST, "SERVICE")
    new = [name for name in held_out if name not in known]
    assert len(new) >= 0.6 * len(held_out)
    assert sum(held_out[name] for name in new) >= 0.6 * held_out.total()
    assert len(new) <= 0.8 * len(held_out), "some must be known, as in life"


def test_neither_memory_nor_a_pattern_solves_it() -> None:
    """Looking up the names of the pool, and a pattern for numbers with points, each leave most of the work."""
    known = sorted({*named(POOL, "SERVICE"), *named(POOL, "VERSION")}, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, known)) + r")(?!\w)", re.IGNORECASE)
    services = set(named(POOL, "SERVICE"))
    memory = [
        {Span(*m.span(), "SERVICE" if m[0].lower() in services else "VERSION") for m in pattern.finditer(r["text"])}
        for r in TEST
    ]
    numbers = [{Span(*m.span(), "VERSION") for m in VERSION.finditer(r["text"])} for r in TEST]
    assert f1(memory, TEST) < 0.4
    assert f1(numbers, TEST) < 0.5
    versions = sum(named(TEST, "VERSION").values())
    assert sum(len(f) for f in numbers) > versions / 2  # the pattern does find most of them,
    assert any(f - set(spans(r)) for f, r in zip(numbers, TEST, strict=True))  # and others that are none


def test_the_card_states_the_counts() -> None:
    card = (FOLDER / "tickets.md").read_text("utf-8")
    for part, rows in (("pool", POOL), ("test", TEST)):
        figures = [len(rows), sum(not r["spans"] for r in rows)]
        for label in ("SERVICE", "VERSION"):
            figures += [named(rows, label).total(), len(named(rows, label))]
        assert f"| {part} | {' | '.join(map(str, figures))} |" in card
