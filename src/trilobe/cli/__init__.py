"""The command line: every verb of the loop, with the same name and the same arguments.

Commands are made from the functions (:mod:`.commands`), results become words in :mod:`.words`. This file holds the
names only, so that ``trilobe --help`` loads neither numpy nor the loop. Data goes to stdout, talk to stderr. Exit
codes: 0 done, 1 error, 2 wrong usage, 3 a check or a monitor said no.
"""

from typing import Any

import click

from trilobe import __version__

# What the first sentence of each verb's docstring says, in a line; the order is that of the loop.
VERBS = {
    "init": "Start a project: write trilobe.toml and create the store.",
    "add": "Add examples: files, or folders with everything in them.",
    "query": "Choose what to ask next.",
    "label": "Take answers: from a CSV file, or at the terminal.",
    "aggregate": "Turn all answers on the pool into beliefs, and learn how good each annotator is.",
    "train": "Train on all beliefs, calibrate on out-of-fold predictions, and keep the model.",
    "evaluate": "Measure a model on the held-out test part, with 95% intervals.",
    "check": "Gather the evidence on a model and hold it against the gates of trilobe.toml.",
    "package": "Make a bundle: all a server needs, the evidence and the card.",
    "serve": "Put a bundle behind an endpoint name, or replace what is behind it.",
    "token": "Give a client a token for an endpoint, take its tokens back, or list who may do what.",
    "infer": "Run a bundle on files: a folder, a table or shards, with the numbers that its endpoint would give.",
    "deliver": "Give clients the answers to what endpoints left to people.",
    "monitor": "Hold what an endpoint captured against the baseline in its bundle, and keep what is found.",
    "explain": "Show what a model looked at: heat maps of captures that caused a finding, beside clean ones.",
    "run": "Ask, answer, train, evaluate until a goal or a budget is reached; then check and package.",
    "plan": "Estimate how many answers a goal takes, whether more will pay, and what choosing them has saved.",
    "report": "Write everything there is to tell as one HTML page.",
    "show": "Show where a project stands, or one thing in it.",
    "export": "Write labels, answers, open questions or the model to a file.",
    "demo": "See the whole loop on real handwritten digits, or on support messages, in two minutes.",
}

EPILOG = """\b
First steps:
  trilobe demo
  trilobe init --project pets --labels cat,dog
  trilobe add photos/ --project pets
  trilobe run --project pets

Each command explains itself: trilobe COMMAND --help. Every command takes --json.
"""


class Verbs(click.Group):
    """The group whose commands are made when they are first asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the loop."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, made from its function; none for a name that is not a verb."""
        if cmd_name not in VERBS:
            return None
        from trilobe.cli.commands import command

        return command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of ``--help``, from the names alone."""
        with formatter.section("Commands, in the order of the loop"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """As click does it; a wrong call is told on stdout as well when ``--json`` stands in it."""
        asked = {*ctx.args, *getattr(ctx, "_protected_args", ())}
        try:
            return super().invoke(ctx)
        except click.UsageError as e:
            if "--json" in asked:
                import json

                what = {"error": "UsageError", "problem": e.format_message(), "expected": "", "next": "--help"}
                click.echo(json.dumps(what, indent=2))
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, with the nearest verb in the message for an unknown one."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, 1)
            ctx.fail(f"no command {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else " See trilobe --help."))
        return super().resolve_command(ctx, args)


@click.group(
    cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="trilobe")
def main() -> None:
    """From unlabeled examples to a model in production that people can trust, and back again when it fails."""
