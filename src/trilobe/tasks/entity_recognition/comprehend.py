"""The data formats of Amazon Comprehend's custom entity recognizer: what it is trained on, and how it answers.

Training data are documents, one per line of a text file or one per file, with annotations (CSV: ``File, Line, Begin
Offset, End Offset, Type``) or with a list of entities (CSV: ``Text, Type``); or a manifest of Ground Truth (JSON lines
with the text under ``source``). Offsets count characters (Unicode code points), the end is excluded, lines count from
0. Source: Amazon Comprehend Developer Guide, "Plain-text annotation files", "Entity lists", "PDF annotation files".

All of it is read and checked before anything is kept. An error names the file and the line that has to change.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from trilobe.errors import AnswerError, NotEnoughData, UnreadableExample, UsageError
from trilobe.tasks.words import decode, tokenize
from trilobe.types import GOLD, LISTED, Span

DOCUMENTS, MANIFESTS = frozenset([".txt"]), frozenset([".manifest", ".jsonl"])
_ANNOTATIONS = ("file", "begin offset", "end offset", "type")


@dataclass(frozen=True, slots=True)
class Document:
    """A text, where it stands (``line`` from 0, None for a whole file), and its entities as far as they are known."""

    file: Path
    line: int | None
    text: str
    spans: tuple[Span, ...] | None = None

    @property
    def name(self) -> str:
        """The file, and in it the number of the line, from 1."""
        return str(self.file) if self.line is None else f"{self.file}#{self.line + 1}"


def read(files: Sequence[Path], table: str, labels: Sequence[str], by_line: bool = True) -> tuple[list[Document], str]:
    """All documents with what is known of them, and who says so: ``gold``, ``entity-list``, or nobody ("").

    Args:
        files: text files, or manifests.
        table: a CSV file of annotations or of entities, as its header says; empty: none. With annotations, a document
            without any has no entities.
        labels: the types there are.
        by_line: each line of a file is a document; annotations say by a column ``Line`` which it is.

    Raises:
        DataError: a file, a row or an offset that is wrong; nothing has been kept then.
        UsageError: files and table do not go together.
    """
    manifests = [path for path in files if path.suffix.lower() in MANIFESTS]
    if manifests and (table or len(manifests) < len(files)):
        raise UsageError(f"{manifests[0]} with other files or a table", expected="manifests alone: they hold the truth")
    if manifests:
        return _alike([d for path in files for d in _manifest(path, labels)]), GOLD
    if not table:
        return [d for path in files for d in _documents(path, by_line)], ""
    header, rows = _table(Path(table))
    if set(_ANNOTATIONS) <= set(header):
        documents = [d for path in files for d in _documents(path, "line" in header)]
        return _alike(_annotated(documents, files, Path(table), rows, labels)), GOLD
    if {"text", "type"} <= set(header):
        return _listed([d for path in files for d in _documents(path, by_line)], Path(table), rows, labels), LISTED
    raise UsageError(
        f"{table} has the columns {header}",
        expected="File, Line, Begin Offset, End Offset, Type (annotations), or Text, Type (a list of entities)",
    )


def detected(entities: Iterable[Mapping[str, Any]], file: str = "", line: int | None = None) -> dict[str, Any]:
    """What an endpoint says of a text, as Comprehend says it; ``File`` and ``Line`` as in the output of its jobs.

    >>> detected([{"start": 3, "end": 7, "label": "CITY", "text": "Rome", "confidence": 0.8}], "a.txt", 0)
    {'Entities': [{'BeginOffset': 3, 'EndOffset': 7, 'Score': 0.8, 'Text': 'Rome', 'Type': 'CITY'}], 'File': 'a.txt',
     'Line': 0}
    """
    found = [{"BeginOffset": e["start"], "EndOffset": e["end"], "Score": e["confidence"], "Text": e["text"],
              "Type": e["label"]} for e in entities]  # fmt: skip
    said: dict[str, Any] = {"Entities": found}
    return said | ({"File": file} if file else {}) | ({"Line": line} if line is not None else {})


def matches(text: str, entries: Mapping[str, str]) -> tuple[Span, ...]:
    """Where ``entries`` (text -> type) stand in a text, exactly and as whole words; where two begin, the longer.

    >>> matches("New York, not York.", {"York": "CITY", "New York": "STATE", "Yor": "NO"})
    (Span(start=0, end=8, label='STATE'), Span(start=14, end=18, label='CITY'))
    """
    return _find(text, _by_first_word(entries))


def _by_first_word(entries: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    index: dict[str, list[tuple[str, str]]] = {}
    for entry, label in sorted(entries.items(), key=lambda e: -len(e[0])):
        start, end = tokenize(entry)[0]
        index.setdefault(entry[start:end], []).append((entry, label))
    return index


def _find(text: str, index: Mapping[str, Sequence[tuple[str, str]]]) -> tuple[Span, ...]:
    words = tokenize(text)
    ends, found, behind = {end for _, end in words}, list[Span](), 0
    for start, end in words:
        for entry, label in index.get(text[start:end], ()) if start >= behind else ():
            if text.startswith(entry, start) and start + len(entry) in ends:
                behind = start + len(entry)
                found.append(Span(start, behind, label))
                break
    return tuple(found)


# --- files ----------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return decode(data)
    except OSError as e:
        raise UnreadableExample(f"{path} cannot be read: {e.strerror}", expected="a readable file") from e
    except UnreadableExample as e:
        where = str(path)
        try:
            data.decode("utf-8-sig")
        except UnicodeDecodeError as at:
            where = f"{path}:{data.count(10, 0, at.start) + 1}"
        raise UnreadableExample(f"{where}: {e.problem}", expected=e.expected, hint=e.hint) from e


def _documents(path: Path, by_line: bool) -> list[Document]:
    text = _text(path)
    if not by_line:
        return [Document(path, None, text)]
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [Document(path, i, line) for i, line in enumerate(lines) if line.strip()]


def _table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header in small letters, and the rows with their line numbers; spaces around cells do not count."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), skipinitialspace=True, strict=True)
    try:
        header = [cell.strip().lower() for cell in next(reader)]
        rows = []
        for cells in reader:
            if len(cells) != len(header) and any(cells):
                raise AnswerError(f"{path}:{reader.line_num}: {len(cells)} cells", expected=f"{len(header)}: {header}")
            if any(cells):
                rows.append((reader.line_num, {k: c.strip() for k, c in zip(header, cells, strict=True)}))
    except csv.Error as e:
        raise AnswerError(f"{path}:{reader.line_num}: {e}", expected="a CSV file, quotes doubled") from e
    if not rows:
        raise NotEnoughData(f"{path} has no rows", expected="at least one below its header")
    return header, rows


def _manifest(path: Path, labels: Sequence[str]) -> Iterable[Document]:
    for i, line in enumerate(_text(path).split("\n")):
        if not line.strip():
            continue
        where, expected = f"{path}:{i + 1}", '{"source": "...", "NAME": {"annotations": {"entities": [...]}}}'
        try:
            row = msgspec.json.decode(line)
            said = [v["annotations"]["entities"] for v in row.values() if isinstance(v, dict) and "annotations" in v]
            spans = [(e["startOffset"], e["endOffset"], e["label"]) for entities in said for e in entities]
            document = Document(path, i, decode(row["source"].encode()))
        except (msgspec.MsgspecError, RecursionError, KeyError, TypeError, AttributeError, UnreadableExample) as e:
            raise AnswerError(f"{where}: no text with entities ({e})", expected=expected) from e
        if len(said) != 1:
            raise AnswerError(f"{where} has {len(said)} sets of annotations", expected="one")
        yield _with(
            document, [(where, _span(where, str(begin), str(end), label, labels)) for begin, end, label in spans]
        )


# --- what rows say ---------------------------------------------------------------------------------------------------


def _annotated(
    documents: Sequence[Document], files: Sequence[Path], table: Path, rows: Sequence[tuple[int, dict[str, str]]],
    labels: Sequence[str],
) -> list[Document]:  # fmt: skip
    by_place = {(d.file, d.line): d for d in documents}
    said: dict[tuple[Path, int | None], list[tuple[str, Span]]] = {place: [] for place in by_place}
    for number, row in rows:
        where = f"{table}:{number}"
        file = _file(where, row["file"], files)
        line = _number(where, "Line", row["line"]) if "line" in row else None
        if (file, line) not in said:
            raise AnswerError(f"{where}: line {line} of {file} is not there, or empty", expected="lines count from 0")
        span = _span(where, row["begin offset"], row["end offset"], row["type"], labels)
        said[file, line].append((where, span))
    return [_with(document, said[place]) for place, document in by_place.items()]


def _file(where: str, name: str, files: Sequence[Path]) -> Path:
    wanted = Path(name).parts
    meant = [path for path in files if wanted and path.parts[-len(wanted) :] == wanted]
    if len(meant) != 1:
        known = ", ".join(path.name for path in files[:5])
        raise AnswerError(
            f"{where}: the file {name!r} is {'not among the documents' if not meant else 'one of several'}",
            expected=f"one of {known}" if not meant else f"enough of its path, as in {'/'.join(meant[0].parts[-2:])}",
        )
    return meant[0]


def _number(where: str, column: str, cell: str) -> int:
    if not (cell.isascii() and cell.isdigit() and len(cell) < 18):
        raise AnswerError(f"{where}: {column} is {cell!r}", expected="a whole number from 0")
    return int(cell)


def _span(where: str, begin: str, end: str, label: str, labels: Sequence[str]) -> Span:
    _known(where, label, labels)
    return Span(_number(where, "the begin offset", begin), _number(where, "the end offset", end), label)


def _known(where: str, label: str, labels: Sequence[str]) -> None:
    if label not in labels:
        raise AnswerError(
            f"{where}: unknown type {label!r}", expected=f"one of {', '.join(labels)}",
            hint="correct it, or add it to labels.names",
        )  # fmt: skip


def _with(document: Document, said: Sequence[tuple[str, Span]]) -> Document:
    """The document with its spans, each checked; what is wrong is said with the row that says it."""
    words = tokenize(document.text)
    starts, ends = {start for start, _ in words}, {end for _, end in words}
    before: tuple[str, Span] | None = None
    for where, span in sorted(said, key=lambda s: s[1]):
        text = f"{where}: {span.start} to {span.end} ({span.label}) of {document.name}"
        if not span.start < span.end <= len(document.text):
            raise AnswerError(text, expected=f"begin < end <= {len(document.text)}, its length in characters")
        if span.start not in starts or span.end not in ends:
            raise AnswerError(
                f"{text} is {document.text[span.start : span.end]!r}", expected="whole words, without spaces around"
            )
        if before and span == before[1]:
            raise AnswerError(f"{text} is said twice, first in {before[0]}", expected="each annotation once")
        if before and span.start < before[1].end:
            raise AnswerError(f"{text} overlaps that of {before[0]}", expected="entities that do not overlap")
        before = where, span
    return Document(document.file, document.line, document.text, tuple(sorted(span for _, span in said)))


def _listed(
    documents: Sequence[Document], table: Path, rows: Sequence[tuple[int, dict[str, str]]], labels: Sequence[str]
) -> list[Document]:
    entries: dict[str, str] = {}
    first: dict[str, int] = {}
    for number, row in rows:
        entry, where = row["text"], f"{table}:{number}"
        _known(where, row["type"], labels)
        if not entry:
            raise AnswerError(f"{where}: no text", expected="an entity as it stands in the documents")
        if entry in first:
            other = "" if entries[entry] == row["type"] else f" as {entries[entry]}"
            raise AnswerError(
                f"{where}: {entry!r} stands already in line {first[entry]}{other}", expected="each entity once"
            )
        entries[entry], first[entry] = row["type"], number
    index = _by_first_word(entries)
    found = [Document(d.file, d.line, d.text, _find(d.text, index)) for d in documents]
    if not any(d.spans for d in found):
        raise NotEnoughData(f"no entity of {table} stands in a document", expected="entities written as they are there")
    return found


def _alike(documents: Iterable[Document]) -> list[Document]:
    """The documents, unless the same text comes with two truths."""
    known: dict[str, Document] = {}
    checked = list(documents)
    for d in checked:
        other = known.setdefault(d.text, d)
        if other.spans != d.spans:
            raise AnswerError(
                f"{d.name} and {other.name} are the same text with different entities", expected="one truth for a text"
            )
    return checked
