"""Files with many texts, labeled or not, as (text, response) pairs: JSON lines, CSV, CoNLL columns, plain text.

Every format ends in the same nouns: a text and, where the file says it, a ``class``, ``one_of`` or ``spans`` response.
What is wrong with a line is said with its number.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from trilobe.errors import AnswerError, DataError, UnreadableExample, UsageError
from trilobe.tasks.words import decode, to_bytes
from trilobe.types import Response, Span

Labeled = tuple[str, Response | None]
SUFFIXES = frozenset((".txt", ".jsonl", ".csv", ".tsv", ".conll", ".iob", ".bio"))


def read_examples(data: bytes, suffix: str) -> list[Labeled]:
    """All examples of a file.

    ================================  ==================================================================================
    suffix                            one example is
    ================================  ==================================================================================
    ``.txt``                          the whole file
    ``.jsonl``                        a line ``{"text": ...}``, where labeled with ``"label": "a"``, ``"labels": ["a",
                                      "b"]`` (one of these) or ``"spans": [[start, end, "LABEL"], ...]`` in code points
    ``.csv``, ``.tsv``                a row under a header with ``text`` and, where labeled, ``label``
    ``.conll``, ``.iob``, ``.bio``    lines ``word ... tag`` up to an empty line; the text is the words joined by spaces
    ================================  ==================================================================================

    In columns, a word without a tag has no answer for its whole text; tags may follow IOB1, BIO, BIOES or BILOU: an
    entity begins at ``B-``, ``S-`` or ``U-``, and at any other tag that does not continue the one before it.

    Raises:
        UnreadableExample: bytes, lines or columns that are not what the suffix promises.
        AnswerError: labels or spans that make no sense.
        UsageError: an unknown suffix.

    >>> read_examples(b'{"text": "to Rome", "spans": [[3, 7, "CITY"]]}', ".jsonl")[0][1].spans
    (Span(start=3, end=7, label='CITY'),)
    >>> read_examples(b"to O\\nRome I-CITY\\n", ".conll")[0][1].spans
    (Span(start=3, end=7, label='CITY'),)
    """
    readers: dict[str, Callable[[str], Iterator[Labeled]]] = {
        ".txt": lambda text: iter([(text, None)]),
        ".jsonl": _json_lines,
        ".csv": lambda text: _table(text, ","),
        ".tsv": lambda text: _table(text, "\t"),
        **dict.fromkeys((".conll", ".iob", ".bio"), _columns),
    }
    if suffix not in readers:
        raise UsageError(f"a file of texts that ends in {suffix!r}", expected=f"one of {', '.join(sorted(SUFFIXES))}")
    found = list(readers[suffix](decode(data)))
    if not found:
        raise UnreadableExample(f"no example in a {suffix} file", expected="at least one")
    return found


def check_spans(spans: tuple[Span, ...], length: int) -> None:
    """Raise :class:`~trilobe.errors.AnswerError` for a span outside a text of ``length``, or overlapping.

    >>> check_spans((Span(0, 4, "A"), Span(2, 6, "B")), 10)
    Traceback (most recent call last):
    trilobe.errors.AnswerError: the span 2 to 6 (B) overlaps 0 to 4 (A); expected spans that do not overlap
    """
    last: Span | None = None
    for span in sorted(spans):
        said = f"the span {span.start} to {span.end} ({span.label})"
        if not 0 <= span.start < span.end <= length:
            raise AnswerError(said, expected=f"0 <= start < end <= {length}, the length of the text in code points")
        if not span.label:
            raise AnswerError(f"{said} without a label", expected="a label")
        if last and span.start < last.end:
            raise AnswerError(
                f"{said} overlaps {last.start} to {last.end} ({last.label})", expected="spans that do not overlap"
            )
        last = span


def _json_lines(text: str) -> Iterator[Labeled]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as e:
            raise UnreadableExample(f"line {number} is not JSON: {e}", expected='{"text": ...} on every line') from e
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UnreadableExample(f"line {number} has no text", expected='{"text": "..."}')
        yield _checked(record["text"], number, partial(_response, record))


def _response(record: dict[str, Any]) -> Response | None:
    said = [key for key in ("label", "labels", "spans") if record.get(key) is not None]
    if not said:
        return None
    if len(said) > 1:
        raise AnswerError(f"both {said[0]!r} and {said[1]!r}", expected="one of them")
    value = record[said[0]]
    if said[0] == "label":
        if not isinstance(value, str):
            raise AnswerError(f"label {value!r}", expected="a class name")
        return Response("class", (value,))
    if not isinstance(value, list):
        raise AnswerError(f"{said[0]} {value!r}", expected="a list")
    if said[0] == "labels":
        if not all(isinstance(v, str) for v in value):
            raise AnswerError(f"labels {value!r}", expected="class names")
        return Response("one_of", tuple(value))
    return Response("spans", spans=tuple(_span(v) for v in value))


def _span(value: Any) -> Span:
    if isinstance(value, dict):
        value = [value.get(key) for key in ("start", "end", "label")]
    match value:
        case [int(start), int(end), str(label)]:
            return Span(start, end, label)
    raise AnswerError(f"the span {value!r}", expected='[start, end, "LABEL"]')


def _table(text: str, delimiter: str) -> Iterator[Labeled]:
    before = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a field may be a whole document
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = {name.strip().lower(): name for name in rows.fieldnames or () if name}
        if "text" not in names:
            raise UnreadableExample(
                f"a table with the columns {list(names)}", expected="a header with the columns text and, labeled, label"
            )
        for row in rows:
            content, label = row[names["text"]], row.get(names.get("label", "")) or ""
            if content is None or None in row:
                raise UnreadableExample(f"line {rows.line_num} has another number of fields than the header")
            yield _checked(content, rows.line_num, partial(_response, {"label": label.strip() or None}))
    except csv.Error as e:
        raise UnreadableExample(
            f"the row from line {rows.line_num + 1}: {e}", expected="a CSV file, quotes doubled"
        ) from e
    finally:
        csv.field_size_limit(before)


def _columns(text: str) -> Iterator[Labeled]:
    words: list[str] = []
    tags: list[str | None] = []
    first = 1
    for number, raw in enumerate([*text.split("\n"), ""], 1):
        line = raw.strip(" \t\r")
        if line and not line.startswith("-DOCSTART-"):
            parts = [part.strip() for part in (line.split("\t") if "\t" in line else re.split(" +", line))]
            tag = parts[-1] if len(parts) > 1 else None
            if tag is not None and not re.fullmatch(r"O|[BIESLU]-.+", tag):
                raise UnreadableExample(f"line {number} has the tag {tag!r}", expected="O, B-LABEL, I-LABEL, ...")
            if parts[0]:
                words.append(" ".join(parts[0].split()))
                tags.append(tag)
        elif words:
            yield _sentence(words, tags, first)
            words, tags = [], []
        if not words:
            first = number + 1


def _sentence(words: list[str], tags: list[str | None], number: int) -> Labeled:
    text = " ".join(words)
    if None in tags:
        if any(tags):
            raise UnreadableExample(
                f"the sentence from line {number} has words with and without a tag", expected="a tag in the last column"
            )
        return _checked(text, number, lambda: None)
    spans: list[Span] = []
    before, at = "O", 0
    for word, tag in zip(words, tags, strict=True):
        prefix, _, label = str(tag).partition("-")
        if prefix in ("I", "E", "L") and before[0] in ("B", "I") and before[2:] == label:
            spans[-1] = Span(spans[-1].start, at + len(word), label)
        elif tag != "O":
            spans.append(Span(at, at + len(word), label))
        before, at = str(tag), at + len(word) + 1
    return _checked(text, number, lambda: Response("spans", spans=tuple(spans)))


def _checked(text: str, number: int, answer: Callable[[], Response | None]) -> Labeled:
    """The example of a line, or its error with the number of the line."""
    try:
        response = answer()
        decode(to_bytes(text))
        if response is not None:
            check_spans(response.spans, len(text))
    except DataError as e:
        raise type(e)(f"line {number}: {e.problem}", expected=e.expected, hint=e.hint) from e
    return text, response
