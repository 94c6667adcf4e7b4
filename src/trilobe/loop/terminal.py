"""Answering at the terminal: the example is drawn, the person types."""

import sys
import time
from collections.abc import Callable
from typing import Any

from trilobe.errors import AnswerError, UsageError
from trilobe.loop.project import Project
from trilobe.loop.tables import parse_label
from trilobe.types import Example, Question, Response, Span


def read_line(prompt: str) -> str:
    """A line from the keyboard. ``input`` would put the prompt on stdout, where only data goes."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


class AtTheTerminal:
    """Somebody at the keyboard: a class, its number, several joined by "|", "not:", "?"; an empty line to stop.

    Entities are written as ``Atlas Search=SERVICE; 2.1=VERSION``, "-" where there are none.
    """

    def __init__(
        self, p: Project, ask: Callable[[str], str] = read_line, show: Callable[[str], object] = sys.stderr.write
    ) -> None:
        if ask is read_line and not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask at", expected="a CSV file", hint="trilobe label answers.csv")
        self.p, self.ask, self.show = p, ask, show
        names = p.config.labels.names
        numbered = not any(name.isdigit() for name in names)  # where classes are numbers, numbers are the classes
        self.by_number = {str(i): name for i, name in enumerate(names, start=1)} if numbered else {}
        self.choices = "  ".join(f"{i}={name}" for i, name in self.by_number.items()) or ", ".join(names)

    def __call__(self, question: Question, example: Example, who: str) -> tuple[Response, float] | None:
        """Draw the example, ask until an answer fits, and time it; None to stop."""
        item = self.p.item(example.id)
        self.show(f"\n{self.p.task.terminal(item)}\n{example.name}: {question.reason}\n")
        if self.p.space.scheme:
            asked = f"which entities? words=LABEL; ... or -  labels: {self.choices}"
        else:
            yes_no = f"is it {' or '.join(question.choices)}? (y/n)"
            asked = yes_no if question.choices else f"which class? {self.choices}"
        started = time.monotonic()
        while True:
            try:
                text = self.ask(f"{who}, {asked}  (? = can't tell, empty = stop) ").strip()
            except EOFError:
                return None
            if not text:
                return None
            try:
                return self._read(question, text, item), time.monotonic() - started
            except AnswerError as e:
                self.show(f"{e}\n")

    def _read(self, question: Question, text: str, item: Any) -> Response:
        if self.p.space.scheme:
            said = Response("unsure") if text == "?" else Response("spans", spans=self._spans(text, item))
        else:
            no, rest = ("not:", text[4:]) if text.startswith("not:") else ("", text)
            said = parse_label(no + "|".join(self.by_number.get(t.strip(), t.strip()) for t in rest.split("|")),
                               question.choices)  # fmt: skip
        self.p.task.possible(said, self.p.space, lambda: item)
        return said

    def _spans(self, text: str, item: str) -> tuple[Span, ...]:
        """Words that were typed, found in the text one after the other."""
        if text == "-":
            return ()
        spans: list[Span] = []
        for part in filter(None, (t.strip() for t in text.split(";"))):
            words, _, label = (t.strip() for t in part.rpartition("="))
            start = item.find(words, spans[-1].end if spans else 0) if words else -1
            start = item.find(words) if start < 0 and words else start
            if start < 0:
                raise AnswerError(f"{part!r} is not in the text", expected="words of the text=LABEL")
            spans.append(Span(start, start + len(words), self.by_number.get(label, label)))
        return tuple(sorted(spans))
