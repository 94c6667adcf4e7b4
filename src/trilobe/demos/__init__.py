"""Demonstrations: the whole loop on real data with simulated people, told while it runs."""

from pathlib import Path
from typing import Any

from trilobe.errors import UsageError


def demo(what: str = "digits", project: Path | str = "trilobe-demo", seed: int = 0) -> dict[str, Any]:
    """See the whole loop on real handwritten digits, or on support messages, in two minutes.

    1,797 digits go in unlabeled. Five simulated annotators, some of them careless, answer the questions the program
    chooses; a network learns from the answers, is checked, packaged and served. Then the traffic turns bad twice: it is
    noticed, explained, asked about and repaired while clients keep calling. Ends with a report to open in a browser.

    ``tickets`` does the same for the services and versions named in 431 messages to a support team.

    Args:
        what: the demonstration: digits, or tickets.
        project: the folder to make it in; an earlier demonstration there is replaced.
        seed: for everything random.

    Returns:
        The figures, as printed by ``--json``.

    Example:
        trilobe demo
        trilobe demo tickets --json --seed 1
    """
    if what not in ("digits", "tickets"):
        raise UsageError(f"no demonstration {what!r}", expected="digits or tickets")
    from importlib import import_module

    told: dict[str, Any] = import_module(f"{__name__}.{what}").run(Path(project), seed)
    return told
