"""Demonstrations: the whole loop on real data with simulated people, told while it runs."""

from pathlib import Path
from typing import Any

from trilobe.errors import UsageError


def demo(what: str = "digits", project: Path | str = "trilobe-demo", seed: int = 0) -> dict[str, Any]:
    """See the whole loop on real handwritten digits, in two minutes.

    1,797 digits go in unlabeled. Five simulated annotators, some of them careless, answer the questions the program
    chooses; a network learns from the answers, is checked, packaged and served. Then the traffic turns bad twice: it is
    noticed, explained, asked about and repaired while clients keep calling. Ends with a report to open in a browser.

    Args:
        what: the demonstration; digits is the one there is.
        project: the folder to make it in; an earlier demonstration there is replaced.
        seed: for everything random.

    Returns:
        The figures, as printed by ``--json``.

    Example:
        trilobe demo
        trilobe demo --json --seed 1
    """
    if what != "digits":
        raise UsageError(f"no demonstration {what!r}", expected="digits")
    from trilobe.demos.digits import run

    return run(Path(project), seed)
