"""Answering at the terminal: the example is drawn, the person types."""

import sys
import time
from collections.abc import Callable

from trilobe.errors import AnswerError, UsageError
from trilobe.loop.project import Project
from trilobe.loop.tables import parse_label
from trilobe.types import Example, Question, Response


def read_line(prompt: str) -> str:
    """A line from the keyboard. ``input`` would put the prompt on stdout, where only data goes."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


class AtTheTerminal:
    """Somebody at the keyboard: a class, its number, several joined by "|", "not:", "?"; an empty line to stop."""

    def __init__(
        self, p: Project, ask: Callable[[str], str] = read_line, show: Callable[[str], object] = sys.stderr.write
    ) -> None:
        if ask is read_line and not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask at", expected="a CSV file", hint="trilobe label answers.csv")
        self.p, self.ask, self.show = p, ask, show
        names = p.space.names
        numbered = not any(name.isdigit() for name in names)  # where classes are numbers, numbers are the classes
        self.by_number = {str(i): name for i, name in enumerate(names, start=1)} if numbered else {}
        self.choices = "  ".join(f"{i}={name}" for i, name in self.by_number.items()) or ", ".join(names)

    def __call__(self, question: Question, example: Example, who: str) -> tuple[Response, float] | None:
        """Draw the example, ask until an answer fits, and time it; None to stop."""
        self.show(f"\n{self.p.task.terminal(self.p.items([example])[0])}\n{example.name}: {question.reason}\n")
        asked = f"one of {', '.join(question.choices)}? (y/n)" if question.choices else f"which class? {self.choices}"
        started = time.monotonic()
        while True:
            try:
                text = self.ask(f"{who}, {asked}  (? = can't tell, empty = stop) ").strip()
            except EOFError:
                return None
            if not text:
                return None
            try:
                return self._read(question, text), time.monotonic() - started
            except AnswerError as e:
                self.show(f"{e}\n")

    def _read(self, question: Question, text: str) -> Response:
        if question.choices and text.lower() in ("y", "yes", "n", "no"):
            return Response("one_of" if text.lower().startswith("y") else "not", question.choices)
        no, text = ("not:", text[4:]) if text.startswith("not:") else ("", text)
        said = parse_label(no + "|".join(self.by_number.get(t.strip(), t.strip()) for t in text.split("|")))
        said.possible(self.p.space)
        return said
