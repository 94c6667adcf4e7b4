"""Answering at the terminal: what is drawn, what may be typed, and that only data goes to stdout."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from trilobe import loop
from trilobe.errors import UsageError
from trilobe.loop.terminal import AtTheTerminal
from trilobe.types import Response


def typed(tiny, *lines: str) -> tuple[list[tuple[Response, float] | None], str]:
    """What an answerer makes of lines, one question for each answer, and what was shown."""
    loop.query(tiny.folder, n=1)
    shown: list[str] = []
    keys = iter(lines)

    def ask(prompt: str) -> str:
        shown.append(prompt)
        try:
            return next(keys)
        except StopIteration:
            raise EOFError from None

    with loop.opened(tiny.folder) as p:
        (question,) = p.store.questions(open_only=True)
        (example,) = p.store.examples(ids=[question.example_id])
        answer = AtTheTerminal(p, ask, shown.append)
        return [answer(question, example, "ann")], "".join(shown)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dot", Response("class", ("dot",))),
        ("2", Response("class", ("cross",))),
        (" 1 | dot ", Response("one_of", ("bar", "dot"))),
        ("not:bar", Response("not", ("bar",))),
        ("?", Response("unsure")),
    ],
)
def test_what_may_be_typed(tiny, line: str, said: Response) -> None:
    (reply,), shown = typed(tiny, line)
    assert reply is not None and reply[0] == said and reply[1] >= 0
    assert "which class? 1=bar  2=cross  3=dot" in shown and "stands for a group" in shown
    assert any(c in shown for c in "▀▄█░▒▓") or "\x1b[" in shown, "the picture is drawn"


@pytest.mark.parametrize("lines", [("",), ()])
def test_stopping(tiny, lines: tuple[str, ...]) -> None:
    assert typed(tiny, *lines)[0] == [None]


def test_a_slip_is_told_and_asked_again(tiny) -> None:
    (reply,), shown = typed(tiny, "zebra", "9", "not:1|2|3", "bar")
    assert reply is not None and reply[0] == Response("class", ("bar",))
    assert "unknown label 'zebra'; expected one of: bar, cross, dot" in shown
    assert "leaves no class possible" in shown


def test_without_a_terminal(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.query(tiny.folder, n=1)
    monkeypatch.setattr("sys.stdin", io.StringIO("dot\n"))
    with pytest.raises(UsageError, match=r"no terminal to ask at; expected a CSV file(.|\n)*trilobe label answers.csv"):
        loop.label(project=tiny.folder)


def test_a_real_terminal_with_its_output_in_a_file(tiny, tmp_path: Path) -> None:
    loop.query(tiny.folder, n=2)
    keyboard, screen = pty.openpty()
    command = [sys.executable, "-m", "trilobe", "label", "--project", str(tiny.folder), "--json"]
    with (tmp_path / "out.json").open("wb") as out:
        process = subprocess.Popen(command, stdin=screen, stdout=out, stderr=subprocess.PIPE)
        os.write(keyboard, b"dot\n\n")
        _, err = process.communicate(timeout=60)
    os.close(keyboard)
    os.close(screen)
    import json

    assert json.loads((tmp_path / "out.json").read_text())["new"] == 1, "nothing but JSON on stdout"
    assert b"me, which class?" in err
