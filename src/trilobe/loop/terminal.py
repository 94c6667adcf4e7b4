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


def terminal_answerer(
    p: Project, ask: Callable[[str], str] = read_line, show: Callable[[str], object] = sys.stderr.write
) -> Callable[[Question, Example, str], tuple[Response, float] | None]:
    """Somebody at the keyboard: a class name, its number, several joined by "|", "not:", "?"; empty to stop."""
    if ask is read_line and not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask at", expected="a CSV file", hint="trilobe label answers.csv")
    choices = "  ".join(f"{i}={name}" for i, name in enumerate(p.space.names, start=1))
    names = {str(i): name for i, name in enumerate(p.space.names, start=1) if str(i) not in p.space.names}

    def answer(question: Question, example: Example, who: str) -> tuple[Response, float] | None:
        show(p.task.terminal(p.items([example])[0]) + f"\n{example.name}: {question.reason}\n")
        asked = f"one of {', '.join(question.choices)}? (y/n)" if question.choices else f"which class? {choices}"
        started = time.monotonic()
        while True:
            try:
                text = ask(f"{who}, {asked}  (? = can't tell, empty = stop) ").strip()
            except EOFError:
                return None
            if not text:
                return None
            try:
                if question.choices and text.lower() in ("y", "yes", "n", "no"):
                    said = Response("one_of" if text.lower().startswith("y") else "not", question.choices)
                else:
                    no, text = ("not:", text[4:]) if text.startswith("not:") else ("", text)
                    said = parse_label(no + "|".join(names.get(t.strip(), t.strip()) for t in text.split("|")))
                said.possible(p.space)
            except AnswerError as e:
                show(f"{e}\n")
                continue
            return said, time.monotonic() - started

    return answer
