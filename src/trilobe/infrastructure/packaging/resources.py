"""What an application, or one operator of it, needs of the machine that runs it; declared beside the code.

The names and defaults are those of the package manifest of a MONAI Application Package 1.0 (``pkg.json``, table
"Package Manifest Fields").
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec

from trilobe.errors import UsageError

_UNITS = {"Mi": 2**20, "Gi": 2**30}


class Resources(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Cores, memory and GPUs; ``None`` is "not said". Sizes are text such as ``"512Mi"`` or ``"1.5Gi"``.

    ``cpu`` and ``gpu`` may be fractions, rounded to the nearest tenth as the specification wants them. The limits
    are for hosts that enforce some; ``fragments`` are the parts of a distributed application, by name.

    >>> Resources(cpu=2, memory="2GiB").memory
    '2Gi'
    >>> Resources(memory="2 apples")
    Traceback (most recent call last):
    trilobe.errors.UsageError: memory = '2 apples'; expected a size such as '512Mi' or '1.5Gi'
    """

    cpu: float = 1
    cpu_limit: float | None = None
    gpu: float = 0
    gpu_limit: float | None = None
    memory: str = "1Gi"
    memory_limit: str | None = None
    gpu_memory: str | None = None
    gpu_memory_limit: str | None = None
    shared_memory: str = "64Mi"
    fragments: dict[str, "Resources"] = {}

    def __post_init__(self) -> None:
        for name in ("cpu", "cpu_limit", "gpu", "gpu_limit"):
            if (value := getattr(self, name)) is not None:
                msgspec.structs.force_setattr(self, name, _count(name, value))
        for name in ("memory", "memory_limit", "gpu_memory", "gpu_memory_limit", "shared_memory"):
            if (value := getattr(self, name)) is not None:
                msgspec.structs.force_setattr(self, name, _size(name, value))

    def to_json(self) -> dict[str, Any]:
        """As ``pkg.json`` holds it, without what was not said.

        >>> Resources(cpu=0.5, gpu=1).to_json()
        {'cpu': 0.5, 'gpu': 1, 'memory': '1Gi', 'sharedMemory': '64Mi'}
        """
        plain = msgspec.to_builtins(self)
        return {k: v for k, v in plain.items() if v not in (None, {})}


class Needy(Protocol):
    """A class that may say what it needs."""

    resources: ClassVar[Resources | None]


T = TypeVar("T", bound=type[Needy])


def resource(
    cpu: float = 1, memory: str = "1Gi", gpu: float = 0, gpu_memory: str | None = None, shared_memory: str = "64Mi"
) -> Callable[[T], T]:
    """A decorator for operators and applications: what they need of a machine.

    >>> from trilobe.infrastructure.packaging.application import Operator
    >>> @resource(cpu=2, memory="2Gi")
    ... class Segment(Operator): ...
    >>> Segment.resources.memory
    '2Gi'
    """
    needed = Resources(cpu=cpu, memory=memory, gpu=gpu, gpu_memory=gpu_memory, shared_memory=shared_memory)

    def declare(what: T) -> T:
        what.resources = needed
        return what

    return declare


def together(parts: Iterable[Resources]) -> Resources:
    """What parts need that live in one process and run one after the other: the most cores, the sum of memory.

    >>> together([Resources(cpu=2), Resources(memory="512Mi")]).to_json()
    {'cpu': 2, 'gpu': 0, 'memory': '1536Mi', 'sharedMemory': '64Mi'}
    """
    every = list(parts)
    if not every:
        return Resources()
    on_gpu = [p.gpu_memory for p in every if p.gpu_memory]
    return Resources(
        cpu=max(p.cpu for p in every),
        gpu=max(p.gpu for p in every),
        memory=_sum(p.memory for p in every),
        gpu_memory=_sum(on_gpu) if on_gpu else None,
        shared_memory=max((p.shared_memory for p in every), key=bytes_of),
    )


def bytes_of(size: str) -> int:
    """A size in bytes.

    >>> bytes_of("1.5Gi")
    1610612736
    """
    return round(float(size[:-2]) * _UNITS[size[-2:]])


def _sum(sizes: Iterable[str]) -> str:
    total = sum(map(bytes_of, sizes))
    if total % _UNITS["Gi"] == 0:
        return f"{total // _UNITS['Gi']}Gi"
    return f"{-(-total // _UNITS['Mi'])}Mi"


def _count(name: str, value: Any) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6
    tenths = round(float(value), 1) if usable else 0.0
    if not usable or (name.startswith("cpu") and not tenths):
        raise UsageError(f"{name} = {value!r}", expected="a number of devices such as 1 or 0.5")
    return int(tenths) if tenths.is_integer() else tenths


def _size(name: str, value: Any) -> str:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)(Mi|Gi)B?", value) if isinstance(value, str) else None
    if not found or float(found[1]) <= 0:
        raise UsageError(f"{name} = {value!r}", expected="a size such as '512Mi' or '1.5Gi'")
    return found[1] + found[2]
