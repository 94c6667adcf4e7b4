"""Tables that people fill in: CSV files of answers and of known labels, read row by row with reasons for refusals."""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trilobe.errors import AnswerError, NotFoundError, UsageError
from trilobe.loop.project import Project, digest, tell
from trilobe.types import Answer, Example, Question, Response, Span


def read_table(path: Path | str, needed: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header, each with its line number; absent cells are empty.

    Raises :class:`~trilobe.errors.NotFoundError` or :class:`~trilobe.errors.UsageError` naming the file, and what is
    wrong: not UTF-8, not CSV, without one of the ``needed`` columns.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        have = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = have
        rows = [(reader.line_num, {k: v for k, v in row.items() if k is not None}) for row in reader]
    except FileNotFoundError:
        raise NotFoundError(f"no file {path}", expected="a CSV file") from None
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path} is not UTF-8 ({e.reason} at byte {e.start})",
            expected="a CSV file in UTF-8",
            hint="save it again as 'CSV UTF-8'",
        ) from e
    except csv.Error as e:
        raise UsageError(f"{path} is not a CSV file ({e})", expected="a CSV file with commas between cells") from e
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}", expected="a CSV file in UTF-8") from e
    if missing := [c for c in needed if c not in have]:
        raise UsageError(
            f"{path} has the columns {have}", expected=f"also {missing}", hint=f"first line: {','.join(needed)}"
        )
    return rows


@dataclass(frozen=True)
class _Told:
    """A usable row: who says what of which question, and when, if the file says so."""

    question: Question
    who: str
    response: Response
    seconds: float
    at: float | None

    @property
    def key(self) -> tuple[str, str]:
        return self.question.id, self.who


def take_answers(p: Project, path: Path | str, n: int | None) -> tuple[int, int, dict[str, str]]:
    """Keep the answers in a file: how many (at most ``n``) were new, how many known, and which rows were refused.

    A file read twice changes nothing. A row with a time is known if that person has given that answer at that time.
    Rows without one tell, in their order, how an opinion went on: those with which the kept history ends are known.
    """
    rows, fresh, refused = _usable(p, path)
    history: dict[tuple[str, str], list[Answer]] = {}
    for a in sorted(p.store.answers(current=False), key=lambda a: a.answered_at):
        history.setdefault((a.question_id, a.annotator), []).append(a)
    seen = {(*key, a.response, a.answered_at) for key, chain in history.items() for a in chain}
    skip, said = _overlaps(rows, history), dict[tuple[str, str], Response]()
    new: list[Answer] = []
    known = 0
    for row in rows:
        if n is not None and len(new) == n:
            break
        chain = history.setdefault(row.key, [])
        last = chain[-1] if chain else None
        if row.at is not None:
            is_known, at, mark = (*row.key, row.response, row.at) in seen, row.at, str(row.at)
        else:
            repeated, said[row.key] = said.get(row.key) == row.response, row.response
            is_known = repeated or skip[row.key] > 0 or (last is not None and last.response == row.response)
            skip[row.key] -= not repeated
            at, mark = max(time.time(), last.answered_at if last else 0.0), last.id if last else ""
        if is_known:
            known += 1
            continue
        new.append(keep := make_answer(row.question, row.who, row.response, row.seconds, at, mark))
        chain.append(keep)
        seen.add((*row.key, row.response, at))
    used = {a.question_id for a in new}
    with p.store.transaction():
        p.store.add_questions([q for q in fresh if q.id in used])
        p.store.add_answers(new)
    for where, reason in refused.items():
        tell(f"refused {where}: {reason}")
    return len(new), known, refused


def make_answer(q: Question, who: str, response: Response, seconds: float, at: float, mark: str = "") -> Answer:
    """An answer whose id follows from what was said; ``mark`` tells it from the same thing said at another time."""
    plain = [response.kind, response.labels, response.spans]
    return Answer(digest(q.id, who, plain, mark)[:16], q.id, q.example_id, who, response, seconds, at)


def _overlaps(rows: Sequence[_Told], history: dict[tuple[str, str], list[Answer]]) -> dict[tuple[str, str], int]:
    """Of each person and question: with how many of the opinions told without a time the kept history ends."""
    told: dict[tuple[str, str], list[Response]] = {}
    for row in rows:
        if row.at is None and (opinions := told.setdefault(row.key, []))[-1:] != [row.response]:
            opinions.append(row.response)
    found = {}
    for key, opinions in told.items():
        kept = [a.response for a in history.get(key, [])]
        lengths = range(min(len(kept), len(opinions)), 0, -1)
        found[key] = next((k for k in lengths if kept[-k:] == opinions[:k]), 0)
    return found


def _usable(p: Project, path: Path | str) -> tuple[list[_Told], list[Question], dict[str, str]]:
    """The rows that can be used, questions made for examples that nobody had asked about, reasons for the others."""
    find = finder(p.store.examples())
    questions = {(q.example_id, choices): q for q in p.store.questions() for choices in (None, q.choices)}
    rows: list[_Told] = []
    fresh: list[Question] = []
    refused: dict[str, str] = {}
    for line, cells in read_table(path, ["example", "annotator", "label"]):
        try:
            example = find(cells["example"].strip())
            asked = tuple(c.strip() for c in cells["asked"].split("|")) if cells.get("asked", "").strip() else None
            question = questions.get((example, asked)) or _volunteered(example)
            response = parse_label(cells["label"].strip(), asked or question.choices)
            if not (who := cells["annotator"].strip()):
                raise AnswerError("no annotator", expected="a name in the column annotator")
            seconds, at = _number(cells, "seconds") or 0.0, _number(cells, "answered_at")
            p.possible(response, example)
        except AnswerError as e:
            refused[f"{path}:{line}"] = str(e)
            continue
        if questions.setdefault((example, None), question) is question and question.strategy == "volunteered.v1":
            fresh.append(question)
        rows.append(_Told(question, who, response, seconds, at))
    return rows, fresh, refused


def _volunteered(example: str) -> Question:
    """The question that somebody answered unasked."""
    return Question(digest("volunteered", example)[:16], example, strategy="volunteered.v1", reason="answered unasked")


def _number(cells: dict[str, str], name: str) -> float | None:
    """A time in seconds, if there is one."""
    if not (text := cells.get(name, "").strip()):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e12:
        raise AnswerError(f"{name} = {text!r}", expected="a number of seconds, or nothing")
    return value


def finder(examples: Sequence[Example]) -> Callable[[str], str]:
    """From what people write (an id, its first letters, a file name) to the id of the one example that is meant."""
    by_name: dict[str, set[str]] = {}
    ids = {e.id for e in examples}
    for e in examples:
        for name in {e.name, Path(e.name).name}:
            by_name.setdefault(name, set()).add(e.id)

    def find(text: str) -> str:
        hits = {text} & ids or by_name.get(text) or {i for i in ids if len(text) >= 6 and i.startswith(text)}
        if len(hits) != 1:
            what = "no example" if not hits else f"{len(hits)} examples"
            raise AnswerError(
                f"{what} called {text!r}", expected="an example's id, its first letters, or its file name"
            )
        return next(iter(hits))

    return find


def parse_label(text: str, choices: Sequence[str] = ()) -> Response:
    """What a person wrote, as a response: ``cat``, ``cat|dog``, ``not:cat``, ``?``; spans as JSON; yes or no.

    Args:
        text: what was written.
        choices: what was asked about, where "yes" and "no" are answers.

    >>> parse_label("not:cat|dog")
    Response(kind='not', labels=('cat', 'dog'), spans=())
    >>> parse_label("yes", ["animal"]).kind
    'one_of'
    >>> parse_label('[[3, 11, "CITY"]]').spans
    (Span(start=3, end=11, label='CITY'),)
    """
    if text == "?":
        return Response("unsure")
    if not text:
        raise AnswerError("an empty label", expected="a class, 'a|b', 'not:a', spans or '?'")
    if choices and text.lower() in ("y", "yes", "n", "no"):
        return Response("one_of" if text.lower().startswith("y") else "not", tuple(choices))
    if text.startswith("["):
        return Response("spans", spans=_spans(text))
    names = tuple(name.strip() for name in text.removeprefix("not:").split("|"))
    if text.startswith("not:"):
        return Response("not", names)
    return Response("class", names) if len(names) == 1 else Response("one_of", names)


def _spans(text: str) -> tuple[Span, ...]:
    try:
        return tuple(Span(*_checked_span(*entry)) for entry in json.loads(text))
    except (ValueError, TypeError) as e:
        raise AnswerError(
            f"the spans {text[:60]!r}", expected='JSON: [[start, end, "LABEL"], ...] in characters, [] for none'
        ) from e


def _checked_span(start: object, end: object, label: object) -> tuple[int, int, str]:
    if type(start) is not int or type(end) is not int or type(label) is not str:
        raise TypeError
    return start, end, label


def written(response: Response) -> str:
    """A response as people write it: the inverse of :func:`parse_label`.

    >>> written(Response("not", ("cat", "dog")))
    'not:cat|dog'
    """
    if "span" in response.kind:
        return json.dumps([[s.start, s.end, s.label] for s in response.spans], ensure_ascii=False)
    return {"not": "not:", "unsure": "?"}.get(response.kind, "") + "|".join(response.labels)
