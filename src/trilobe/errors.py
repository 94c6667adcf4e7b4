"""Every error a user of Trilobe can meet, in one tree.

    TrilobeError                    exit code 1
    ├── UsageError                  exit code 2   the call itself is wrong: an argument, a setting, a name
    │   ├── ConfigError                           a key of trilobe.toml
    │   └── NotFoundError                         a project, model, bundle, endpoint or finding that is not there
    ├── CheckFailed                 exit code 3   a gate, a constraint or a monitor said no
    ├── DataError                                 what came in cannot be used
    │   ├── UnreadableExample                     bytes that are not a usable image (or text)
    │   ├── AnswerError                           an answer that does not fit its question or its label space
    │   └── NotEnoughData                         an empty pool, a single class, nothing answered yet
    ├── TrainingError                             NaN in weights or loss, a network that does not fit its input
    ├── StorageError                              the store refuses or cannot write
    │   ├── StoreTooNew                           written by a newer Trilobe
    │   ├── StoreBusy                             another process holds it
    │   └── DiskFull                              no space left; nothing acknowledged was lost
    ├── BundleError                               a bundle that is truncated, edited or of an unknown format
    ├── ServeError                                an endpoint that cannot start or does not answer
    │   └── PortInUse
    └── MissingExtra                              an optional dependency; the message names the extra to install

An error says what was expected, what came, and what to do next. The three parts are arguments, so that none is
forgotten and ``--json`` can hand them to a machine.

>>> print(UsageError("the share of captured traffic is 2.0", expected="a number from 0 to 1", hint="try 0.5"))
the share of captured traffic is 2.0; expected a number from 0 to 1
  next: try 0.5
"""

from typing import ClassVar


class TrilobeError(Exception):
    """The root: ``except TrilobeError`` catches everything Trilobe raises on purpose.

    Args:
        problem: what came, with the value in it.
        expected: what would have been right (optional).
        hint: the next command to run or edit to make (optional).
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, expected: str = "", hint: str = "") -> None:
        super().__init__(problem)
        self.problem, self.expected, self.hint = problem, expected, hint

    def __str__(self) -> str:
        text = self.problem + (f"; expected {self.expected}" if self.expected else "")
        return text + (f"\n  next: {self.hint}" if self.hint else "")


class UsageError(TrilobeError):
    """The call itself is wrong: an argument, a setting, a name."""

    exit_code = 2


class ConfigError(UsageError):
    """A key of ``trilobe.toml`` is unknown, of the wrong type or out of range."""


class NotFoundError(UsageError):
    """A project, example, model, bundle, endpoint or finding of that name is not there."""


class CheckFailed(TrilobeError):
    """A gate, a constraint or a monitor said no; the work itself went through."""

    exit_code = 3


class DataError(TrilobeError):
    """What came in cannot be used."""


class UnreadableExample(DataError):
    """Bytes that are not a usable example: empty, damaged, of another kind, or dangerously large."""


class AnswerError(DataError):
    """An answer that does not fit its question or its label space, or contradicts certain knowledge."""


class NotEnoughData(DataError):
    """There is nothing, or too little, to work on: an empty pool, a single class, nothing answered yet."""


class TrainingError(TrilobeError):
    """Training or prediction went numerically wrong, or a network does not fit its input."""


class StorageError(TrilobeError):
    """The store refuses to work, or the operating system refuses the store."""


class StoreTooNew(StorageError):
    """The store was written by a newer Trilobe than this one."""


class StoreBusy(StorageError):
    """Another process holds the store or the run lock."""


class DiskFull(StorageError):
    """No space left. The write was undone; everything acknowledged before it is still there."""


class BundleError(TrilobeError):
    """A bundle is truncated, edited, incomplete or of an unknown format."""


class ServeError(TrilobeError):
    """An endpoint cannot start, does not answer, or refused a request."""


class PortInUse(ServeError):
    """Another program listens on that port."""


class MissingExtra(TrilobeError):
    """An optional dependency is not installed; the message names the extra."""
