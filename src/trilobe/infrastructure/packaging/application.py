"""Applications: operators composed into a graph, with what they need declared beside the code.

An operator is a class whose ``compute`` takes its inputs by name and returns its outputs. An application says which
output goes to which input. It runs here, in a notebook, or packaged as an image; it is the same class each time.

>>> @outputs(loud=str)
... class Shout(Operator):
...     def compute(self, text: str) -> str:
...         return text.upper()
>>> @outputs(n=int)
... class Count(Operator):
...     def compute(self, loud: str) -> int:
...         return len(loud)
>>> class Talk(Application):
...     def compose(self) -> Flow:
...         return [(Shout(), Count())]
>>> Talk().run(text="hello")
{'n': 5}

What users of the MONAI Deploy App SDK know is here under the same names (``Operator``, ``compute``, ``Application``,
``compose``, ``@resource``, ports as ``(output, input)`` pairs). Gone are ``setup`` (the signature of ``compute`` and
``@outputs`` say it), the context objects and ``add_flow`` (``compose`` returns the flow).
"""

import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from trilobe.errors import TrilobeError, UsageError
from trilobe.infrastructure.packaging.resources import Resources, together

if typing.TYPE_CHECKING:
    from trilobe.types import Bundle

Ports = Mapping[str, str] | Collection[tuple[str, str]]
FOLDERS = ("input", "output", "models")  # inputs of an application that a package fills with folders


class Operator:
    """One step of an application. Subclass it, write ``compute``, and say with :func:`outputs` what it gives.

    The parameters of ``compute`` are the inputs, their annotations the types; one with a default may be left open. An
    operator with one output returns its value, with several a mapping by name, with none nothing. ``name`` is the
    class's unless given; two operators of one class in an application need names.
    """

    name: str = ""
    outputs: ClassVar[Mapping[str, Any]] = {}
    resources: ClassVar[Resources | None] = None
    compute: Any = None


K = TypeVar("K", bound=type[Operator])


def outputs(**kinds: Any) -> Callable[[K], K]:
    """A decorator for operators: the names and types of what ``compute`` gives.

    >>> @outputs(mask=list, volume=float)
    ... class Segment(Operator): ...
    >>> list(Segment.outputs)
    ['mask', 'volume']
    """

    def declare(operator: K) -> K:
        operator.outputs = kinds
        return operator

    return declare


Flow = Sequence[Operator | tuple[Operator, Operator] | tuple[Operator, Operator, Ports]]


@dataclass(frozen=True, slots=True)
class Step:
    """An operator in its place: where each input comes from, ``(operator, output)``; from outside where not listed."""

    name: str
    operator: Operator
    inputs: Mapping[str, inspect.Parameter]
    sources: Mapping[str, tuple[str, str]]


class Application:
    """Operators and what flows between them. Subclass it and return the flow from ``compose``.

    A flow is a list of ``(from, to)`` or ``(from, to, ports)``, where ``ports`` maps outputs to inputs; without it,
    equal names are joined, or else the only output with the only input. An operator alone may stand in the list.
    Inputs that nothing fills are the application's own, and so are outputs that nothing takes.

    ``requirements`` are further lines of ``requirements.txt`` for its package.
    """

    name: str = ""
    version: str = "0.0.0"
    resources: ClassVar[Resources | None] = None
    requirements: Sequence[str] = ()
    compose: Any = None

    def steps(self) -> list[Step]:
        """The operators in the order they run. Raises :class:`~trilobe.errors.UsageError` for a flow that cannot."""
        if not callable(self.compose):
            raise UsageError(f"{self.title} has no compose", expected="a method that returns the flow")
        return arranged(self.compose())

    @property
    def title(self) -> str:
        """Its name, or that of its class."""
        return self.name or type(self).__name__

    def needs(self) -> Resources:
        """What it declares, or else what its operators do."""
        declared = [s.operator.resources for s in self.steps()]
        return self.resources or together(r for r in declared if r)

    def run(self, **values: Any) -> dict[str, Any]:
        """Run it over values for its own inputs; its own outputs by name.

        An operator's error is raised again with the operator's name in it.
        """
        steps = self.steps()
        results: dict[tuple[str, str], Any] = {}
        _expect_inputs(self.title, steps, values)
        for step in steps:
            given = {k: results[source] for k, source in step.sources.items()}
            given |= {k: values[k] for k in step.inputs if k not in given and k in values}
            results.update(((step.name, k), v) for k, v in _computed(step, given).items())
        return {port: results[name, port] for name, port in _open(steps)}

    def run_folders(self, input: Path | str, output: Path | str, models: Path | str = "") -> dict[str, Any]:
        """Run it over a folder into a folder, as its package does: for inputs called ``input``, ``output``, ``models``.

        The folder ``output`` is made where it is missing; all three arrive as :class:`~pathlib.Path`.
        """
        folders = dict(zip(FOLDERS, (Path(input), Path(output), Path(models)), strict=True))
        if not folders["input"].exists():
            raise UsageError(f"there is no {input}", expected="a folder to read from")
        folders["output"].mkdir(parents=True, exist_ok=True)
        taken = {k for step in self.steps() for k in step.inputs if k not in step.sources}
        return self.run(**{name: folder for name, folder in folders.items() if name in taken})

    def package(
        self, path: Path | str, bundles: Sequence["Bundle"] = (), base: Path | None = None, packages: bool = False
    ) -> str:
        """Write it to ``path`` as an OCI image that is a MONAI Application Package; the digest.

        The image holds the module (or the whole package) that the class is from, and ``bundles`` as models. See
        :func:`~trilobe.infrastructure.packaging.image.write_application` for ``base`` and ``packages``.
        """
        from trilobe.infrastructure.packaging.image import write_application

        return write_application(self, Path(path), bundles, base, packages)


def arranged(flow: Flow) -> list[Step]:
    """The operators of a flow in the order they run, checked: names, ports, types, cycles.

    >>> @outputs(y=int)
    ... class A(Operator):
    ...     def compute(self, x: int) -> int: return x
    >>> a, b = A(), A()
    >>> b.name = "B"
    >>> arranged([(a, b, {"y": "x"}), (b, a, {"y": "x"})])
    Traceback (most recent call last):
    trilobe.errors.UsageError: the operators go in a circle: A -> B -> A; expected a flow that ends
    """
    operators = _named(flow)
    names = {id(o): name for name, o in operators.items()}
    inputs = {name: _inputs(name, o) for name, o in operators.items()}
    sources: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in operators}
    before: dict[str, list[str]] = {name: [] for name in operators}
    for item in flow:
        if isinstance(item, Operator):
            continue
        here, there = names[id(item[0])], names[id(item[1])]
        outputs = item[0].outputs
        ports = item[2] if len(item) > 2 else _matching(here, outputs, there, inputs[there])
        for given, taken in ports.items() if isinstance(ports, Mapping) else ports:
            _check_join(here, outputs, given, there, inputs[there], taken)
            if taken in sources[there]:
                other = sources[there][taken][0]
                raise UsageError(f"operator {there!r} gets {taken!r} from both {other!r} and {here!r}", expected="one")
            sources[there][taken] = here, given
        before[there].append(here)
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as e:
        raise UsageError(f"the operators go in a circle: {' -> '.join(e.args[1])}", expected="a flow that ends") from e
    steps = [Step(name, operators[name], inputs[name], sources[name]) for name in order]
    _open(steps)
    return steps


def _operators(flow: Flow) -> Iterator[Operator]:
    for item in flow:
        parts = (item,) if isinstance(item, Operator) else item[:2]
        for part in parts:
            if not isinstance(part, Operator):
                raise UsageError(
                    f"a flow with {part!r} in it", expected="operators, pairs of them, or (from, to, ports)"
                )
            yield part


def _named(flow: Flow) -> dict[str, Operator]:
    """The operators by name, in the order they first come."""
    named: dict[str, Operator] = {}
    for operator in _operators(flow):
        name = operator.name or type(operator).__name__
        if named.setdefault(name, operator) is not operator:
            raise UsageError(f"two operators named {name!r}", expected="a name for each", hint="set their name")
    if not named:
        raise UsageError("an application without operators", expected="at least one")
    return named


def _inputs(name: str, operator: Operator) -> dict[str, inspect.Parameter]:
    if not callable(operator.compute):
        raise UsageError(f"operator {name!r} has no compute", expected="a method that takes its inputs by name")
    try:
        found = inspect.signature(operator.compute, eval_str=True).parameters
    except NameError as e:
        raise UsageError(f"operator {name!r}: {e}", expected="annotations that can be read") from e
    odd = [p.name for p in found.values() if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if odd:
        raise UsageError(f"operator {name!r}: compute takes {odd[0]!r} in bulk", expected="each input by its name")
    return dict(found)


def _matching(
    here: str, outputs: Mapping[str, Any], there: str, inputs: Mapping[str, inspect.Parameter]
) -> dict[str, str]:
    """Which outputs go to which inputs where nobody said."""
    if alike := {port: port for port in outputs if port in inputs}:
        return alike
    if len(outputs) == len(inputs) == 1:
        return dict(zip(outputs, inputs, strict=True))
    raise UsageError(
        f"operator {here!r} gives {list(outputs)} and operator {there!r} takes {list(inputs)}",
        expected="a name in common, or ports that say what goes where",
    )


def _check_join(
    here: str, outputs: Mapping[str, Any], given: str, there: str, inputs: Mapping[str, inspect.Parameter], taken: str
) -> None:
    if given not in outputs:
        raise UsageError(f"operator {here!r} has no output {given!r}", expected=f"one of {list(outputs)}")
    if taken not in inputs:
        raise UsageError(f"operator {there!r} has no input {taken!r}", expected=f"one of {list(inputs)}")
    if not _fits(outputs[given], inputs[taken].annotation):
        came, wanted = _words(outputs[given]), _words(inputs[taken].annotation)
        raise UsageError(
            f"output {given!r} of operator {here!r} is {came}", expected=f"{wanted}, for {taken!r} of {there!r}"
        )


def _fits(given: Any, taken: Any) -> bool:
    """Whether a value of one type may go where another is asked for; what cannot be told is let through."""
    if taken in (Any, inspect.Parameter.empty) or given is Any:
        return True
    if typing.get_origin(taken) in (typing.Union, types.UnionType):
        return any(_fits(given, option) for option in typing.get_args(taken))
    given, taken = typing.get_origin(given) or given, typing.get_origin(taken) or taken
    if not (isinstance(given, type) and isinstance(taken, type)):
        return True
    return issubclass(given, taken) or (given is int and taken is float)


def _words(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _open(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """The outputs that nobody takes, ``(operator, output)``: what the application gives."""
    taken = {source for step in steps for source in step.sources.values()}
    free: dict[str, str] = {}
    for step in steps:
        for port in step.operator.outputs:
            if (step.name, port) in taken:
                continue
            if port in free:
                raise UsageError(
                    f"operators {free[port]!r} and {step.name!r} both give {port!r}", expected="one, or another name"
                )
            free[port] = step.name
    return [(name, port) for port, name in free.items()]


def _expect_inputs(title: str, steps: Sequence[Step], values: Mapping[str, Any]) -> None:
    own = {k: (step, p) for step in steps for k, p in step.inputs.items() if k not in step.sources}
    if odd := sorted(set(values) - set(own)):
        raise UsageError(f"{title} takes no {odd[0]!r}", expected=f"one of {list(own)}")
    for name, (step, parameter) in own.items():
        if name in values:
            if not _fits(type(values[name]), parameter.annotation):
                came, wanted = _words(type(values[name])), _words(parameter.annotation)
                raise UsageError(f"{name!r} of operator {step.name!r} is {came}", expected=wanted)
        elif parameter.default is parameter.empty:
            raise UsageError(f"operator {step.name!r} lacks its input {name!r}", expected="a value, or a flow into it")


def _computed(step: Step, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What one operator gives, held to what it declares."""
    outputs = step.operator.outputs
    try:
        value = step.operator.compute(**given)
    except TrilobeError as e:
        e.problem = f"operator {step.name!r}: {e.problem}"
        raise
    except Exception as e:
        raise TrilobeError(f"operator {step.name!r} failed: {type(e).__name__}: {e}") from e
    if not outputs:
        return {}
    values = {next(iter(outputs)): value} if len(outputs) == 1 else value
    if not isinstance(values, Mapping) or set(values) != set(outputs):
        came = list(values) if isinstance(values, Mapping) else _words(type(values))
        raise TrilobeError(f"operator {step.name!r} returned {came}", expected=f"a mapping with {list(outputs)}")
    for port, kind in outputs.items():
        if not _fits(type(values[port]), kind):
            raise TrilobeError(
                f"output {port!r} of operator {step.name!r} is {_words(type(values[port]))}", expected=_words(kind)
            )
    return values


def load(name: str) -> Application:
    """The application ``module:Class``, imported. Raises :class:`~trilobe.errors.UsageError`.

    >>> load("math:pi")
    Traceback (most recent call last):
    trilobe.errors.UsageError: math:pi is no application; expected module:Class of a subclass of Application
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise UsageError(f"{name} cannot be imported ({e})", expected="module:Class") from e
    if not (isinstance(found, type) and issubclass(found, Application)):
        raise UsageError(f"{name} is no application", expected="module:Class of a subclass of Application")
    return found()


def main(words: Sequence[str]) -> int:
    """Run ``module:Class INPUT OUTPUT``; models are found in ``$HOLOSCAN_MODEL_PATH``. Returns the exit code."""
    try:
        if len(words) != 3:
            raise UsageError(f"{len(words)} words", expected="module:Class INPUT OUTPUT")
        load(words[0]).run_folders(words[1], words[2], os.environ.get("HOLOSCAN_MODEL_PATH", ""))
    except TrilobeError as e:
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
        return e.exit_code
    return 0


if __name__ == "__main__":
    # Run as a script this module is called __main__; applications know it by its name.
    sys.exit(importlib.import_module("trilobe.infrastructure.packaging.application").main(sys.argv[1:]))
