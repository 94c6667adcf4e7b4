"""Commands made from functions: the signature gives the options, the docstring the help, the errors the exit codes.

Parameters before ``project`` are arguments of the command line, the others are options. A verb's docstring has the
sections Args and Example, which appear in ``--help`` as they stand.
"""

import inspect
import io
import json
import logging
import re
import shlex
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from trilobe.cli import VERBS
from trilobe.errors import TrilobeError, UsageError

SHORT = {"project": "-p", "n": "-n"}


def command(name: str) -> click.Command:
    """The command of a verb."""
    if name == "demo":
        from trilobe.demos import demo as function
    else:
        from trilobe import loop

        function = getattr(loop, name)
    doc = inspect.getdoc(function) or ""
    summary, args, example = read_docstring(doc)
    signature = list(inspect.signature(function, eval_str=True).parameters.values())
    first = [p.name for p in signature].index("project")
    parameters = [
        *(_parameter(p, args.get(p.name, ""), positional=i < first) for i, p in enumerate(signature)),
        click.Option(["--json", "as_json"], is_flag=True, help="print the result as JSON, for machines"),
    ]
    named = [f"{p.human_readable_name}: {args[p.name or '']}" for p in parameters
             if isinstance(p, click.Argument) and p.name in args]  # fmt: skip
    positional = "\n".join(textwrap.fill(said, 76, initial_indent="  ", subsequent_indent="    ") for said in named)
    text = summary + (f"\n\n\b\nArguments:\n{positional}" if positional else "")
    return click.Command(
        name, callback=_callback(function), params=parameters, help=text, short_help=summary.split("\n")[0],
        epilog="\b\nExample:\n" + example,
    )  # fmt: skip


def read_docstring(doc: str) -> tuple[str, dict[str, str], str]:
    """The parts of a verb's docstring: the text before any section, what each argument is, the example.

    >>> read_docstring("Do it.\\n\\nArgs:\\n    n: how many,\\n        at least 1.\\n\\nExample:\\n    trilobe do")
    ('Do it.', {'n': 'how many, at least 1.'}, '  trilobe do')
    """
    parts = re.split(r"^(Args|Returns|Raises|Example):\n", doc.replace("``", ""), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    args = {
        m[1]: " ".join(m[2].split())
        for m in re.finditer(r"^    (\w+): ((?:.|\n(?!    \w+: ))*)", sections.get("Args", ""), re.MULTILINE)
    }
    lines = [line.strip() for line in sections.get("Example", "").strip().splitlines()]
    return parts[0].strip(), args, "\n".join(f"  {line}" for line in lines)


def _parameter(p: inspect.Parameter, text: str, positional: bool) -> click.Parameter:
    kind, many = _kind(p.annotation)
    required = p.default is inspect.Parameter.empty
    if positional:
        return click.Argument([p.name], type=kind, nargs=-1 if many else 1, required=required,
                              default=None if required or many else p.default)  # fmt: skip
    name = p.name.replace("_", "-")
    if kind is bool:
        switch = f"--{name}/--no-{name}" if p.default else f"--{name}"
        return click.Option([switch], is_flag=True, default=p.default, help=text, show_default=bool(p.default))
    flags = [f"--{name}", *([SHORT[p.name]] if p.name in SHORT else [])]
    shown = p.default not in (None, "", ()) and not required
    return click.Option(flags, type=kind, default=None if many else p.default, help=text, show_default=shown)


def _kind(annotation: Any) -> tuple[Any, bool]:
    """The click type of an annotation, and whether several values are meant."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    options = tuple(o for o in options if o is not type(None))
    for plain in (bool, int, float):
        if plain in options:
            return plain, False
    for o in options:
        origin = typing.get_origin(o)
        if origin is typing.Literal:
            return click.Choice(typing.get_args(o)), False
        if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
            return Assignments(), False
        if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
            return (Several() if str in typing.get_args(o) else click.Path()), True
    return str, False


class Several(click.ParamType[Any]):
    """Values separated by commas."""

    name = "a,b,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split, without empty parts."""
        return tuple(v.strip() for v in value.split(",") if v.strip()) if isinstance(value, str) else value


class Assignments(click.ParamType[Any]):
    """Numbers by name: ``accuracy=0.9,ece=0.1``."""

    name = "name=number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split into names and numbers, with an error that says which part is wrong."""
        if not isinstance(value, str):
            return value
        found = {}
        for part in filter(None, value.split(",")):
            name, _, number = part.partition("=")
            try:
                found[name.strip()] = float(number)
            except ValueError:
                self.fail(f"{part!r} is not of the form name=number", param, ctx)
        return found


def _callback(function: Callable[..., Any]) -> Callable[..., None]:
    def call(as_json: bool, **values: Any) -> None:
        from trilobe.cli.words import Terminal, exit_code, plain, words
        from trilobe.loop import listening

        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        given = {k: v for k, v in values.items() if v is not None}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default == () and name not in given:
                given[name] = ()
        for stream in (sys.stdout, sys.stderr):  # a file name may be no text
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            if as_json and given.get("to") == "-":
                raise UsageError(
                    "--json while the data itself goes to stdout", expected="--json with --to FILE, or without"
                )
            with Terminal() as terminal, listening(terminal):
                result = function(**given)
        except TrilobeError as e:
            e.hint = to_type(e.hint, values.get("project"))
            _complain(e, as_json)
            sys.exit(e.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; what was acknowledged is kept, run it again to go on", err=True)
            sys.exit(130)
        text = json.dumps(plain(result), indent=2) if as_json else words(function.__name__, result)
        if text:
            click.echo(text if as_json else to_type(text, values.get("project")))
        sys.exit(exit_code(result))

    return call


def to_type(text: str, project: str | None) -> str:
    """A text in which commands are as they must be typed for a project that is not in this folder.

    >>> to_type("next: trilobe label answers.csv", "pets")
    'next: trilobe label --project pets answers.csv'
    """
    if project in (None, "", "."):
        return text
    where = f" --project {shlex.quote(str(project))}"
    verbs = "|".join(VERBS)
    return re.sub(rf"\btrilobe (?:{verbs})\b(?![^\n]*--project)", lambda m: m[0] + where, text)


def _complain(e: TrilobeError, as_json: bool) -> None:
    if as_json:
        what = {"error": type(e).__name__, "problem": e.problem, "expected": e.expected, "next": e.hint}
        click.echo(json.dumps(what, indent=2))
    style = click.style(f"{type(e).__name__}: ", fg="red", bold=True)
    click.echo(style + str(e), err=True)
