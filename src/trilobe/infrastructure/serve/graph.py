"""Pipelines of several steps over one request: a graph that is declared, or a Python function that calls steps.

Both are a :class:`Flow`: what goes in, what comes out, the steps it may start, and an async function that does so.
A step is a model served beside it (by name, so a swap reaches the flow at once) or a function. Each has its own queue
and its own batches, across all requests and flows that call it; a function may branch, loop and stop early between
calls. A request holds each array once, whoever reads it, and models with equal preparations share that too.

:func:`graph` makes a flow from a declaration, and checks it: names, datatypes, shapes, circles.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from typing import Any, NamedTuple

from numpy.typing import NDArray

from trilobe.errors import DataError, ServeError, TrilobeError, UsageError
from trilobe.infrastructure.pipeline import Arrays, TensorSpec, declared
from trilobe.infrastructure.serve.batching import Batching

Start = Callable[..., "asyncio.Future[dict[str, NDArray[Any]]]"]
FlowFunction = Callable[..., Awaitable[Mapping[str, NDArray[Any]]]]
Known = Mapping[str, tuple[Sequence[TensorSpec], Sequence[TensorSpec]]]  # of each step: what it takes, what it gives


@dataclass(frozen=True, slots=True)
class Function:
    """A step in Python: arrays of n rows by name in, arrays of n rows by name out.

    Requests that ``joins`` are computed together; where the rows of one must be alike, keep them apart. ``batching``
    says how they are computed (None: in threads, otherwise as the server's models are).
    """

    name: str
    run: Callable[..., Mapping[str, NDArray[Any]]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    joins: bool = True
    batching: Batching | None = None

    def __call__(self, data: Arrays) -> dict[str, NDArray[Any]]:
        """The declared outputs, checked; whatever else goes wrong is a ``ServeError`` that names the step."""
        try:
            made = self.run(**{spec.name: data[spec.name] for spec in self.inputs})
            return declared(made, self.outputs, f"step {self.name!r}")
        except DataError as error:
            raise DataError(f"step {self.name!r}: {error.problem}", expected=error.expected, hint=error.hint) from error
        except TrilobeError:
            raise
        except Exception as error:
            raise ServeError(f"step {self.name!r} failed: {type(error).__name__}: {error}") from error


def function(
    inputs: Mapping[str, str], outputs: Mapping[str, str], joins: bool = True, batching: Batching | None = None
) -> Callable[[Callable[..., Any]], Function]:
    """Declare a Python function as a step: what it takes and gives, in the short form of :class:`TensorSpec`.

    >>> import numpy as np
    >>> @function({"x": "FP32[-1]"}, {"y": "FP32[-1]"})
    ... def double(x):
    ...     return {"y": 2 * x}
    >>> double({"x": np.ones(2, np.float32)})
    {'y': array([2., 2.], dtype=float32)}
    """

    def declare(run: Callable[..., Any]) -> Function:
        return Function(run.__name__, run, _specs(inputs), _specs(outputs), joins, batching)

    return declare


@dataclass(frozen=True, slots=True)
class Flow:
    """Several steps behind one name.

    ``steps`` are the names it calls them by: a :class:`Function`, or the name of a model served beside it. ``run`` gets
    for each step a function that starts it, and the request's arrays, all by name. ``check`` holds it against what its
    steps take and give now, and says what it gives itself (default: nothing to hold, ``outputs``).
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    steps: Mapping[str, "Function | str"]
    run: FlowFunction
    check: Callable[[Known], tuple[TensorSpec, ...]] | None = None


def flow(
    inputs: Mapping[str, str], outputs: Mapping[str, str], steps: Sequence["Function | str"]
) -> Callable[[FlowFunction], Flow]:
    """Declare an async function as a pipeline; it gets its steps and its inputs by name.

    >>> @flow({"image": "UINT8[-1,28,28,1]"}, {"proba": "FP32[-1,10]"}, steps=["small", "large"])
    ... async def careful(small, large, image):
    ...     first = await small(image=image)
    ...     return first if first["proba"].max(axis=1).min() > 0.9 else await large(image=image)
    >>> careful.name, list(careful.steps)
    ('careful', ['small', 'large'])
    """
    named = {step if isinstance(step, str) else step.name: step for step in steps}

    def declare(run: FlowFunction) -> Flow:
        if both := set(named) & set(inputs):
            raise UsageError(f"pipeline {run!r} calls a step and an input {min(both)!r}", expected="names of their own")

        async def begin(**given: Any) -> Mapping[str, NDArray[Any]]:
            return await run(**{key: _coroutine(it) if key in named else it for key, it in given.items()})

        return Flow(getattr(run, "__name__", "flow"), _specs(inputs), _specs(outputs), named, begin)

    return declare


def _coroutine(start: Start) -> FlowFunction:
    """A step as people expect to call it: they may make a task of the call, or not await it at all."""

    async def call(**arrays: Any) -> dict[str, NDArray[Any]]:
        return await start(**arrays)

    return call


@dataclass(frozen=True, slots=True)
class Node:
    """One step of a graph: what runs, and where each of its inputs comes from: ``"input"`` or ``"step.output"``."""

    step: "Function | str"
    inputs: Mapping[str, str]


def graph(name: str, inputs: Mapping[str, str], outputs: Mapping[str, str], nodes: Mapping[str, Node]) -> Flow:
    """A flow from a declaration; steps without a path between them run side by side.

    Args:
        name: what clients call.
        inputs: the request's tensors, ``{"photo": "BYTES[-1]"}``.
        outputs: what each output of the answer is, ``{"kind": "classify.proba"}``.
        nodes: the steps by name.

    Returns:
        A flow whose ``check`` holds it against the models that are there.

    Raises:
        UsageError: a circle, an unknown name. The error names the step.

    >>> graph("loop", {"x": "FP32[-1]"}, {"y": "b.y"}, {"a": Node("m", {"x": "b.y"}), "b": Node("m", {"x": "a.y"})})
    Traceback (most recent call last):
    trilobe.errors.UsageError: pipeline 'loop' goes in a circle: a -> b -> a; ...
    """
    given_specs = _specs(inputs)
    order = _order(name, inputs, outputs, nodes)

    needs = _needs(nodes)
    plan = _Plan(nodes, needs, {n: [m for m in order if n in needs[m]] for n in order})
    first = [n for n in order if not needs[n]]

    async def run(**given: Any) -> Mapping[str, NDArray[Any]]:
        under_way = _Run(plan, given)
        try:
            under_way.start(first)
            await under_way.end
        finally:
            under_way.cancel()
        return {key: under_way.values[ref] for key, ref in outputs.items()}

    def check(known: Known) -> tuple[TensorSpec, ...]:
        given = {spec.name: spec for spec in given_specs}
        for step in order:
            takes, gives = known[step]
            where = f"pipeline {name!r}: step {step!r}"
            if {spec.name for spec in takes} != set(nodes[step].inputs):
                raise UsageError(
                    f"{where} gets {sorted(nodes[step].inputs)}", expected=f"exactly {sorted(s.name for s in takes)}"
                )
            for spec in takes:
                ref = nodes[step].inputs[spec.name]
                source = _found(given, ref, where)
                if not spec.takes(source):
                    raise UsageError(
                        f"{where} reads {ref!r}, {_short(source)}, as {spec.name!r}", expected=_short(spec)
                    )
            given |= {f"{step}.{spec.name}": spec for spec in gives}
        found = [(key, _found(given, ref, f"pipeline {name!r}: output {key!r}")) for key, ref in outputs.items()]
        return tuple(TensorSpec(key, spec.datatype, spec.shape) for key, spec in found)

    return Flow(name, given_specs, (), {n: node.step for n, node in nodes.items()}, run, check)


class _Plan(NamedTuple):
    """The nodes of a graph, the steps that each one ``needs``, and those that wait for it."""

    nodes: Mapping[str, Node]
    needs: Mapping[str, Set[str]]
    readers: Mapping[str, Sequence[str]]


class _Run:
    """One request on its way through a graph: a step is started by whichever of those it needs comes last.

    Nine steps over one array are nine entries in queues, made in one go; no task waits for any of them. ``values`` are
    the request's arrays and the steps' outputs by ``step.output``; ``end`` is done when all have run, or one has not.
    """

    __slots__ = ("end", "missing", "plan", "running", "values")

    def __init__(self, plan: _Plan, given: Mapping[str, Any]) -> None:
        self.plan, self.values = plan, dict(given)
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.missing = {step: len(needed) for step, needed in plan.needs.items()}
        self.running: dict[str, asyncio.Future[dict[str, NDArray[Any]]]] = {}

    def start(self, steps: Iterable[str]) -> None:
        """Start ``steps``, which have what they need; where nothing is under way then, this was all."""
        values = self.values
        try:
            for step in steps:
                arrays = {key: values[ref] for key, ref in self.plan.nodes[step].inputs.items()}
                future = self.running[step] = values[step](**arrays)
                future.add_done_callback(partial(self._finished, step))
        except Exception as error:  # noqa: BLE001 (what refuses a step refuses the request)
            self.end.set_exception(error)
        if not self.running and not self.end.done():
            self.end.set_result(None)

    def _finished(self, step: str, future: "asyncio.Future[dict[str, NDArray[Any]]]") -> None:
        del self.running[step]
        error = None if future.cancelled() else future.exception()
        if self.end.done():
            return
        if future.cancelled():
            self.end.cancel()
        elif error is not None:
            self.end.set_exception(error)
        else:
            for name, array in future.result().items():
                self.values[f"{step}.{name}"] = array
            missing = self.missing
            for reader in self.plan.readers[step]:
                missing[reader] -= 1
            self.start([reader for reader in self.plan.readers[step] if not missing[reader]])

    def cancel(self) -> None:
        """Take out of their queues whatever still waits."""
        for future in self.running.values():
            future.cancel()


def _needs(nodes: Mapping[str, Node]) -> dict[str, set[str]]:
    """The steps that each step reads from."""
    return {n: {ref.partition(".")[0] for ref in node.inputs.values() if "." in ref} for n, node in nodes.items()}


def _order(name: str, inputs: Mapping[str, str], outputs: Mapping[str, str], nodes: Mapping[str, Node]) -> list[str]:
    """The steps in an order in which they can run; refused where there is none or something reads what is not there."""
    sources = [(f"step {n!r}", ref) for n, node in nodes.items() for ref in node.inputs.values()]
    for where, ref in [*sources, *((f"output {key!r}", ref) for key, ref in outputs.items())]:
        start, dot, _ = ref.partition(".")
        if start not in (nodes if dot else inputs):
            what = f"steps: {sorted(nodes)}" if dot else f"inputs {sorted(inputs)}, or a step's output: step.output"
            raise UsageError(
                f"pipeline {name!r}: {where} reads {ref!r}, which is not there", expected=f"one of its {what}"
            )
    if both := set(nodes) & set(inputs):
        raise UsageError(f"pipeline {name!r} calls a step and an input {min(both)!r}", expected="names of their own")
    try:
        return list(TopologicalSorter(_needs(nodes)).static_order())
    except CycleError as error:
        raise UsageError(
            f"pipeline {name!r} goes in a circle: {' -> '.join(error.args[1])}",
            expected="steps that can run in some order",
        ) from error


def _found(given: Mapping[str, TensorSpec], ref: str, where: str) -> TensorSpec:
    if ref not in given:
        start = ref.partition(".")[0]
        has = sorted(key for key in given if key.partition(".")[0] == start)
        raise UsageError(f"{where} reads {ref!r}, which is not there", expected=f"one of {has}")
    return given[ref]


def _short(spec: TensorSpec) -> str:
    return f"{spec.datatype}{list(spec.shape)}"


def _specs(declared: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.parse(name, text) for name, text in declared.items())


def find(path: str) -> Any:
    """What ``module:name`` stands for.

    >>> find("math:pi")
    3.141592653589793
    """
    module, colon, name = path.partition(":")
    try:
        if not colon:
            raise UsageError(f"{path!r} names nothing", expected='"module:name"')
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{path!r} cannot be found ({error})", expected='"module:name" that can be imported'
        ) from error
