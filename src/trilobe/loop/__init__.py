"""The verbs of the loop, one function each; the command line has the same names and arguments.

========================  ===========================================================================
room                      verbs
========================  ===========================================================================
:mod:`.collecting`        ``init`` ``add``
:mod:`.asking`            ``query`` ``label`` (what is chosen: :mod:`.choosing`)
:mod:`.believing`         ``aggregate``
:mod:`.learning`          ``train`` ``evaluate``
:mod:`.promoting`         ``check`` ``package``
:mod:`.serving`           ``serve``
:mod:`.access`            ``token``
:mod:`.inferring`         ``infer``
:mod:`.delivering`        ``deliver`` (what waits, and becomes questions: :mod:`.deferring`)
:mod:`.planning`          ``plan``
:mod:`.watching`          ``monitor`` ``explain``
:mod:`.cycle`             ``run``: all of the above until a goal or a budget
:mod:`.telling`           ``report`` ``show`` ``export``
========================  ===========================================================================

Every verb takes the project's folder, opens it, does one thing, keeps the result in the store and returns it. Called
again it finds what is already there, so a loop that was killed goes on where it stopped.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilobe.loop.access import token
    from trilobe.loop.asking import Labeled, label, query
    from trilobe.loop.believing import Aggregated, aggregate
    from trilobe.loop.collecting import Added, add, init
    from trilobe.loop.cycle import Ran, run
    from trilobe.loop.delivering import Delivered, deliver
    from trilobe.loop.inferring import Inferred, infer
    from trilobe.loop.learning import evaluate, train
    from trilobe.loop.planning import Planned, plan
    from trilobe.loop.project import Project, listening, opened
    from trilobe.loop.promoting import check, package
    from trilobe.loop.serving import serve
    from trilobe.loop.telling import export, report, show
    from trilobe.loop.watching import Explained, explain, monitor

# Where each name lives. A room is opened when somebody first asks for it: a server, or a container that starts,
# needs neither the database nor what only training needs.
_ROOMS = {
    "access": ("token",),
    "asking": ("Labeled", "label", "query"),
    "believing": ("Aggregated", "aggregate"),
    "collecting": ("Added", "add", "init"),
    "cycle": ("Ran", "run"),
    "delivering": ("Delivered", "deliver"),
    "inferring": ("Inferred", "infer"),
    "learning": ("evaluate", "train"),
    "planning": ("Planned", "plan"),
    "project": ("Project", "listening", "opened"),
    "promoting": ("check", "package"),
    "serving": ("serve",),
    "telling": ("export", "report", "show"),
    "watching": ("Explained", "explain", "monitor"),
}

__all__ = [
    "Added", "Aggregated", "Delivered", "Explained", "Inferred", "Labeled", "Planned", "Project", "Ran", "add",
    "aggregate", "check", "deliver", "evaluate", "explain", "export", "infer", "init", "label", "listening", "monitor",
    "opened", "package", "plan", "query", "report", "run", "serve", "show", "token", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a verb, or a room, the first time somebody asks for it (PEP 562)."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
