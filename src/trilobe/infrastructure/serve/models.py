"""What is served under which name: versions, and how one takes over from another without a failed request.

A :class:`Version` is one loaded bundle with its queue. A :class:`Model` is a name: the version that answers, perhaps a
second one that gets a share of the requests (canary) or a copy of them (shadow), and older ones that can be called by
their version. The :class:`Repository` makes all of it agree with what is wished for: whatever is new is verified, built
and warmed up beside the old, then one reference is switched, then the old is drained and let go. What cannot be loaded
is reported and changes nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import DataError, ServeError, TrilobeError, UsageError
from trilobe.infrastructure.bundle import open_bundle
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.pipeline import Arrays, Servable, TensorSpec, declared, stands_alone
from trilobe.infrastructure.serve.batching import Batching, Finish, Meter, Queue, Scheduler, Trace
from trilobe.infrastructure.serve.graph import Flow, Function
from trilobe.infrastructure.serve.metrics import Meters, Part
from trilobe.infrastructure.serve.protocol import Call, Reader, Refused, Writer
from trilobe.infrastructure.serve.steps import Processes
from trilobe.types import Bundle

Load = Callable[[Bundle], Servable]
Watch = Callable[..., None]  # of the name called, a bundle's id, inputs, replies; of a shadow, what was answered beside
Threshold = Callable[[str, Bundle], float | None]
VersionState = Literal["creating", "ready", "failed", "deleting"]
DRAIN_SECONDS = 60.0
FIRST_GUESS = 1e-2  # seconds for a row of a step in Python, until it is measured: first in a thread
SHADOW_PENDING = 32  # copies that may wait; more would cost the requests themselves
logger = logging.getLogger(__name__)


class Version:
    """One loaded servable: its queue, its figures, its state.

    Rows of which it is less sure than its ``threshold`` are left to people (None: it answers all). ``files`` is the
    same for requests that bring whole files.
    """

    def __init__(
        self, name: str, id_: str, servable: Servable, queue: Queue, meter: Meter, preparation: Queue | None = None,
        rest: Queue | None = None, unseen: Queue | None = None, files: "Version | None" = None,
    ) -> None:  # fmt: skip
        self.name, self.id, self.servable, self.queue, self.meter = name, id_, servable, queue, meter
        self.preparation, self.rest = preparation, rest
        self.unseen = unseen or queue  # for calls that are captured as somebody else's: a pipeline's, or beside another
        self.proba = _judged(servable.inputs, servable.outputs[:1])
        self.threshold: float | None = None
        self.files = files
        self.reader: Reader = Reader(servable.inputs, servable.outputs, files.reader if files is not None else None)
        self.writer = Writer(servable.outputs, name, id_, servable.labels)
        self.state: VersionState = "ready"
        self.since = time.time()
        self.platform = "trilobe_pipeline"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a request must hold."""
        return self.servable.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What an answer holds."""
        return self.servable.outputs

    @property
    def busy(self) -> bool:
        """Whether requests wait for it or are under way."""
        parts = *self._queues, self.files
        return any(part.busy for part in parts if part is not None)

    @property
    def _queues(self) -> list[Queue]:
        parts = self.queue, self.preparation, self.rest, self.unseen
        return [queue for queue in parts if queue is not None]

    def tune(self, how: Batching) -> None:
        """Be run so from now on; what is under way ends as it began."""
        for queue in self._queues:
            queue.settings = how
        if self.files is not None:
            self.files.tune(_in_threads(how))

    def of(self, inputs: Arrays) -> "Version":
        """Itself, or the one for files where these ``inputs`` are some."""
        files = self.files
        return files if files is not None and inputs[files.inputs[0].name].dtype.kind == "O" else self

    @property
    def defers(self) -> bool:
        """Whether answers may be left to people."""
        return self.threshold is not None

    def submit(
        self, inputs: Arrays, rows: int, finish: Finish | None, priority: int = 0, timeout: float | None = None,
        input_ns: int = 0, trace: Trace | None = None,
    ) -> "asyncio.Future[Any]":  # fmt: skip
        """See :meth:`~trilobe.infrastructure.serve.batching.Queue.submit`."""
        return self.of(inputs).queue.submit(inputs, rows, finish, priority, timeout, input_ns, trace)


class _StepMeter:
    """The figures of one step of a flow, under the flow's own name."""

    def __init__(self, part: Part) -> None:
        self.batch = part.batch

    def answered(self, total_ns: Sequence[int], input_ns: int, output_ns: int) -> None:
        """Counted with the flow."""

    def failed(self, reason: str, n: int = 1) -> None:
        """Counted with the flow."""

    def pending(self, delta: int) -> None:
        """Counted with the flow."""


class Handed(dict[str, NDArray[Any]]):
    """The outputs of a pipeline, and the version ``of`` a model whose answer it hands on (None: it made its own)."""

    of: Version | None = None


class FlowVersion:
    """A pipeline of several steps, called like a model. Every step waits in its own queue.

    Of its requests the first input is captured, as it came, with the first output that holds probabilities of each row
    (``proba``). Where that is what a model said, untouched, it is an answer of that model's bundle: it has its
    baseline, and its threshold for what is left to people.
    """

    platform = "trilobe_flow"
    state: VersionState = "ready"
    threshold: float | None = None  # that of the model whose answer it hands on, which each request may decide

    def __init__(self, flow: Flow, outputs: tuple[TensorSpec, ...], repository: "Repository") -> None:
        self.name, self.id, self.flow, self.outputs = flow.name, "1", flow, outputs
        self.proba = _judged(flow.inputs, outputs)
        self.inputs, self.since, self.under_way = flow.inputs, time.time(), 0
        self.meter = repository.meters.of(flow.name, self.id)
        self.reader, self.writer = Reader(flow.inputs, outputs), Writer(outputs, flow.name, self.id)
        self._repository = repository
        functions = {step: run for step, run in flow.steps.items() if isinstance(run, Function)}
        self._queues = {step: self._queue(step, run) for step, run in functions.items()}

    def _queue(self, step: str, function: Function) -> Queue:
        how = self._repository.how_of_step(step, function)
        return Queue(
            f"{self.name}: {step}",
            self._repository.apart(self.name, step, function, how) if how.where == "processes" else function,
            self._repository.scheduler,
            how,
            joins=function.joins,
            cost=FIRST_GUESS,
            meter=_StepMeter(self.meter.part(step)),
            label=step,
        )

    @property
    def busy(self) -> bool:
        """Whether requests are under way."""
        return self.under_way > 0

    def tune(self) -> None:
        """Have its steps in Python run as its repository says now."""
        for step, queue in self._queues.items():
            queue.settings = self._repository.how_of_step(step, cast("Function", self.flow.steps[step]))

    @property
    def defers(self) -> bool:
        """Whether answers may be left to people."""
        return self._repository.defers and bool(self.proba)

    def submit(
        self, inputs: Arrays, rows: int, finish: Finish | None, priority: int = 0, timeout: float | None = None,
        input_ns: int = 0, trace: Trace | None = None,
    ) -> "asyncio.Future[Any]":  # fmt: skip
        """See :meth:`~trilobe.infrastructure.serve.batching.Queue.submit`."""
        followed = bool(self.proba) and (self._repository.watch is not None or self._repository.defers)
        request = _FlowRequest(priority, trace, {}, [] if followed else None)
        return self._repository.scheduler.loop.create_task(self._run(inputs, rows, finish, timeout, input_ns, request))

    async def _run(
        self, inputs: Arrays, rows: int, finish: Finish | None, timeout: float | None, input_ns: int,
        request: "_FlowRequest",
    ) -> Any:  # fmt: skip
        start = time.perf_counter_ns()
        steps = {name: partial(self._start, name, request) for name in self.flow.steps}
        self.under_way += 1
        try:
            async with asyncio.timeout(timeout):
                outputs = dict(await self.flow.run(**steps, **inputs))
            # What a graph gives is what its steps gave, whose values have been looked at there.
            outputs = declared(outputs, self.outputs, f"pipeline {self.name!r}", values=self.flow.check is None)
            computed = time.perf_counter_ns()
            if request.asked is not None:
                outputs = self._handed(inputs, rows, outputs, request)
            answer = finish(outputs) if finish is not None else outputs
        except TimeoutError:
            self.meter.failed("OTHER")
            raise Refused(504, f"{self.name!r} did not answer within {timeout:g} s") from None
        except asyncio.CancelledError:
            self.meter.failed("CANCELED")
            raise
        except Exception:
            self.meter.failed("BACKEND")
            raise
        finally:
            self.under_way -= 1
        end = time.perf_counter_ns()
        self.meter.batch([0], rows, computed - start)
        self.meter.answered([input_ns + end - start], input_ns, end - computed)
        return answer

    def _handed(self, inputs: Arrays, rows: int, outputs: Arrays, request: "_FlowRequest") -> Handed:
        """The outputs with whose they are; captured where that is wanted."""
        handed, replies = Handed(outputs), outputs[self.proba]
        if len(replies) == rows:
            handed.of = request.giver(replies)
            if self._repository.watch is not None:
                bundle_id = handed.of.id if handed.of is not None else ""
                self._repository.watch(self.name, bundle_id, inputs[self.inputs[0].name], replies)
        return handed

    def _start(self, name: str, request: "_FlowRequest", /, **arrays: NDArray[Any]) -> "asyncio.Future[Any]":
        rows, how = len(next(iter(arrays.values()))), (request.priority, None, 0, request.trace)
        queue = self._queues.get(name)
        if queue is not None:
            return queue.submit(arrays, rows, None, *how)
        version = self._repository.model(str(self.flow.steps[name])).choose()
        for spec in version.inputs:
            array = arrays.get(spec.name)
            if array is None or array.dtype != spec.dtype:
                raise ServeError(f"step {name!r} got {sorted(arrays)}", expected=f"{spec.name!r} as {spec.datatype}")
            spec.check_shape(array.shape)
        if not isinstance(version, Version) or version.preparation is None or version.rest is None:
            asked = version.unseen if isinstance(version, Version) else version
            return request.note(version, asked.submit(arrays, rows, None, *how))
        # Models with equal preparations of the same arrays share one: made once, held once.
        key = version.servable.preparation, *map(id, arrays.values())
        prepared = request.prepared.get(key)
        if prepared is None:
            prepared = request.prepared[key] = version.preparation.submit(arrays, rows, None, *how)

        async def rest(queue: Queue) -> Any:
            return await queue.submit(await prepared, rows, None, *how)

        return request.note(version, self._repository.scheduler.loop.create_task(rest(version.rest)))


@dataclass(frozen=True, slots=True)
class _FlowRequest:
    """What the steps of one request share."""

    priority: int
    trace: Trace | None
    prepared: dict[Any, "asyncio.Future[Any]"]
    asked: "list[tuple[AnyVersion, asyncio.Future[Any]]] | None" = None  # None: it does not matter who said what

    def note(self, version: "AnyVersion", answer: "asyncio.Future[Any]") -> "asyncio.Future[Any]":
        """The same ``answer``, of which it is known who gives it."""
        if self.asked is not None:
            self.asked.append((version, answer))
        return answer

    def giver(self, replies: NDArray[Any]) -> Version | None:
        """The model that said exactly that, if one did."""
        for version, answer in self.asked or ():
            given = answer.done() and not answer.cancelled() and answer.exception() is None
            if given and isinstance(version, Version) and answer.result().get(version.proba) is replies:
                return version
        return None


AnyVersion = Version | FlowVersion


@dataclass(slots=True)
class Model:
    """A name, and who answers to it. ``error`` says why the last wish was not granted (empty: it was)."""

    name: str
    versions: dict[str, AnyVersion] = field(default_factory=dict)
    current: str = ""
    canary: str = ""
    share: float = 0.0
    shadow: str = ""
    state: VersionState = "creating"
    error: str = ""
    owed: float = 0.0

    def choose(self, version: str = "") -> AnyVersion:
        """The version to answer the next request: the one asked for, or the current one, or in its turn the canary.

        Raises :class:`Refused`: 503 before anything is loaded, 404 for a version that is not.
        """
        if version:
            if version not in self.versions:
                raise Refused(
                    404, f"{self.name!r} has no version {version!r}", expected=f"one of {sorted(self.versions)}"
                )
            return self.versions[version]
        if not self.current:
            reason = self.error or "it is being loaded"
            raise Refused(503, f"model {self.name!r} is not ready: {reason}", hint="wait, or see the endpoint's status",
                          headers={"retry-after": "1"})  # fmt: skip
        if self.share:
            self.owed += self.share
            if self.owed >= 1.0 and self.canary in self.versions:
                self.owed -= 1.0
                return self.versions[self.canary]
        return self.versions[self.current]


class Repository:
    """All models of one process, and the way from what is wished for to what is served.

    Lives in one event loop; bundles are read, built and warmed up in a thread beside it. ``load`` says what a bundle
    means; ``watch`` sees what is asked by name and what is said (for captures), beside it what a shadow says;
    ``threshold`` says below which confidence a bundle behind a name leaves answers to people.
    """

    def __init__(
        self,
        load: Load,
        scheduler: Scheduler,
        meters: Meters,
        batching: Mapping[str, Batching] | None = None,
        watch: Watch | None = None,
        flows: Sequence[Flow] = (),
        threshold: Threshold = lambda name, bundle: None,
    ) -> None:
        self.flows = {flow.name: flow for flow in flows}
        self.models: dict[str, Model] = {}
        self.scheduler, self.meters, self.batching, self.watch = scheduler, meters, dict(batching or {}), watch
        self._load, self._threshold = load, threshold
        self.defers = False  # whether anything served here may leave an answer to people
        self.unloaded: list[str] = []
        # One thread for all: each new one would take, and keep, a part of the heap for itself.
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self._draining: set[asyncio.Task[None]] = set()
        self._apart: dict[tuple[str, str], Processes] = {}

    def close(self) -> None:
        """End the processes of steps; nothing may be under way any more."""
        for processes in self._apart.values():
            processes.close()

    def apart(self, flow: str, step: str, function: Function, how: Batching) -> Processes:
        """The processes that run a step of a flow, which outlive its versions."""
        if (flow, step) not in self._apart:
            n = how.replicas or self.scheduler.threads
            replaced = partial(self._replaced, flow, step)
            self._apart[flow, step] = Processes(function, n, how.limit, how.max_memory, replaced)
        return self._apart[flow, step]

    def _replaced(self, flow: str, step: str, reason: str) -> None:
        self.meters.count("trilobe_step_replaced_total", model=flow, step=step, reason=reason)

    def model(self, name: str) -> Model:
        """The model of that name, or :class:`Refused` 404."""
        if name not in self.models:
            raise Refused(404, f"unknown model {name!r}", expected=f"one of {sorted(self.models)}")
        return self.models[name]

    @property
    def draining(self) -> bool:
        """Whether a version that was let go still answers, and so takes memory."""
        return bool(self._draining)

    def how(self, name: str) -> Batching:
        """How the model of that name is run."""
        return self.batching.get(name) or self.batching.get("") or Batching()

    def how_of_step(self, step: str, run: Function) -> Batching:
        """How a step in Python is run: in threads unless it is said, for it must not keep the loop from the others."""
        return run.batching or self.batching.get(step) or _in_threads(self.how(""))

    def tune(self, batching: Mapping[str, Batching]) -> None:
        """Run everything as ``batching`` says from now on; what is under way ends as it began."""
        self.batching = dict(batching)
        for model in self.models.values():
            for version in model.versions.values():
                version.tune() if isinstance(version, FlowVersion) else version.tune(self.how(version.name))

    @property
    def ready(self) -> bool:
        """Whether everything that is wished for can answer."""
        return bool(self.models) and all(model.current for model in self.models.values())

    async def apply(self, wishes: Mapping[str, Wish]) -> None:
        """Make what is served agree with ``wishes`` (those that shall be ``loaded``).

        Each model's ``error`` says where that failed.

        Models that fail keep what they had. Never raises for a bundle's sake.
        """
        self.unloaded = sorted(name for name, wish in wishes.items() if not wish.loaded)
        wishes = {name: wish for name, wish in wishes.items() if wish.loaded}
        if both := set(wishes) & set(self.flows):
            raise ServeError(f"a model and a pipeline are both called {min(both)!r}", expected="names of their own")
        for name in [name for name in self.models if name not in wishes and name not in self.flows]:
            model = self.models.pop(name)
            model.state = "deleting"
            for version in list(model.versions.values()):
                self._let_go(model, version)
        for name, wish in wishes.items():
            await self._settle(self.models.setdefault(name, Model(name)), wish)
        self.defers = any(v.threshold is not None for model in self.models.values() for v in model.versions.values())
        for flow in self.flows.values():
            await self._settle_flow(self.models.setdefault(flow.name, Model(flow.name)), flow)

    async def _settle_flow(self, model: Model, flow: Flow) -> None:
        try:
            outputs, now = self._fit(flow, {}), model.versions.get(model.current)
            if now is None or now.outputs != outputs:
                now = FlowVersion(flow, outputs, self)
                for processes in [p for (name, _), p in self._apart.items() if name == flow.name]:
                    await self.scheduler.loop.run_in_executor(self._builder, processes.start)
        except TrilobeError as error:
            logger.error("%s", error)
            model.error, model.current, model.versions = str(error), "", {}  # it could not keep what it promises
        else:
            model.error, model.versions, model.current = "", {now.id: now}, now.id
        model.state = "ready" if model.current else "failed"

    def _is_alive(self, flow: Flow, name: str) -> bool:
        """Whether ``flow`` answers now, with the help of the model ``name``."""
        return name in flow.steps.values() and flow.name in self.models and bool(self.models[flow.name].current)

    def _fit(self, flow: Flow, instead: Mapping[str, Version]) -> tuple[TensorSpec, ...]:
        """What ``flow`` gives, with some models replaced; raises where it does not fit together."""
        known = {}
        for step, run in flow.steps.items():
            if isinstance(run, str) and run not in instead and (run not in self.models or run in self.flows):
                raise UsageError(
                    f"pipeline {flow.name!r}: step {step!r} calls the model {run!r}, which is not served",
                    expected=f"one of {sorted(set(self.models) - set(self.flows))}",
                )
            part = run if isinstance(run, Function) else instead.get(run) or self.models[run].choose()
            known[step] = part.inputs, part.outputs
        return flow.check(known) if flow.check is not None else flow.outputs

    async def _settle(self, model: Model, wish: Wish) -> None:
        loaded: dict[str, str] = {}
        model.error = ""
        for path in dict.fromkeys([wish.bundle, wish.canary, wish.shadow, *wish.older]):
            if path:
                try:
                    version = await self._loaded(model, Path(path))
                    for flow in self.flows.values():
                        if version.id != model.current and self._is_alive(flow, model.name):
                            self._fit(flow, {model.name: version})
                    loaded[path] = version.id
                except Exception as error:
                    logger.exception("bundle %s cannot be served", path)
                    reason = str(error) if isinstance(error, TrilobeError) else f"{type(error).__name__}: {error}"
                    model.error = model.error or reason
        if wish.bundle in loaded:  # all or nothing: a canary without the bundle it was compared with helps nobody
            model.current = loaded[wish.bundle]
            model.canary = loaded.get(wish.canary, "")
            model.share, model.owed = (wish.share if model.canary else 0.0), 0.0
            model.shadow = loaded.get(wish.shadow, "")
        used = {model.current, model.canary, model.shadow, *loaded.values()}
        for unused in [v for v in model.versions.values() if v.id not in used]:
            self._let_go(model, unused)
        model.state = "ready" if model.current else "failed"

    async def _loaded(self, model: Model, path: Path) -> Version:
        loop = self.scheduler.loop
        bundle = await loop.run_in_executor(self._builder, open_bundle, path)
        known = model.versions.get(bundle.id)
        if isinstance(known, Version):  # but the settings may ask for another promise
            known.threshold = self._promised(model.name, bundle, known.servable)
            return known
        servable, cost, joins = await loop.run_in_executor(self._builder, self._build, bundle)
        threshold = self._promised(model.name, bundle, servable)
        version = model.versions[bundle.id] = self._version(model.name, bundle.id, servable, cost, joins)
        version.threshold = threshold
        return version

    def _promised(self, name: str, bundle: Bundle, servable: Servable) -> float | None:
        threshold = self._threshold(name, bundle)
        if threshold is not None:
            _expect_proba(servable)
        return threshold

    def _build(self, bundle: Bundle) -> tuple[Servable, float, bool]:
        servable = self._load(bundle)
        servable.warm_up()
        return servable, _cost(servable), stands_alone(servable)

    def _version(self, name: str, id_: str, servable: Servable, cost: float, joins: bool) -> Version:
        meter = self.meters.of(name, id_)
        settings = self.how(name)
        proba = _judged(servable.inputs, servable.outputs[:1])
        seen = None
        if proba:
            source = servable.inputs[0].name

            def seen(inputs: Arrays, outputs: Arrays) -> None:
                if self.watch is not None:
                    self.watch(name, id_, inputs[source], outputs[proba])

        elif self.watch is not None:
            logger.info("what %r answers is not captured: its first output holds no probabilities of each row", name)

        def queue(part: Servable, name: str, label: str = "", seen: Any = None) -> Queue:
            # A file takes any time to be read: in a thread, and each request by itself.
            how = (_in_threads(settings), False, FIRST_GUESS) if part is servable.files else (settings, joins, cost)
            return Queue(
                name, part.run, self.scheduler, how[0], joins=how[1], cost=how[2], meter=meter, watch=seen, label=label
            )

        files = None
        if servable.files is not None:
            whole, copies = queue(servable.files, name, "", seen), queue(servable.files, name)
            files = Version(name, id_, servable.files, whole, meter, unseen=copies)
        parts = servable.parts() if joins else None
        unseen = None if seen is None else queue(servable, name)
        if parts is None:
            return Version(name, id_, servable, queue(servable, name, "", seen), meter, unseen=unseen, files=files)
        first, rest = queue(parts[0], f"{name}: preparation", f"{name}: preparation"), queue(parts[1], name, name)
        return Version(name, id_, servable, queue(servable, name, "", seen), meter, first, rest, unseen, files)

    def _let_go(self, model: Model, version: AnyVersion) -> None:
        """No new request gets it; those under way finish; then its memory is free."""
        version.state = "deleting"
        model.versions.pop(version.id, None)

        async def drain() -> None:
            deadline = time.monotonic() + DRAIN_SECONDS
            while version.busy and time.monotonic() < deadline:
                await asyncio.sleep(0.05)

        task = self.scheduler.loop.create_task(drain())
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    def answer(
        self,
        model: Model,
        chosen: AnyVersion,
        call: Call,
        finish: Finish,
        input_ns: int = 0,
        trace: Trace | None = None,
    ) -> "asyncio.Future[Any]":
        """Have a call answered by the version chosen for it; a shadow gets a copy."""
        shadow = model.versions.get(model.shadow) if model.shadow else None
        how = call.priority, call.timeout, input_ns, trace
        if not isinstance(shadow, Version) or shadow is chosen or shadow.unseen.waiting >= SHADOW_PENDING:
            return chosen.submit(call.inputs, call.rows, finish, *how)
        said: dict[str, NDArray[Any]] = {}

        def keep(outputs: dict[str, NDArray[Any]]) -> Any:
            said.update(outputs)
            return finish(outputs)

        answer = chosen.submit(call.inputs, call.rows, keep, *how)
        self._shade(chosen, shadow, call.inputs, call.rows, answer, said)
        return answer

    def _shade(
        self,
        live: AnyVersion,
        shadow: Version,
        inputs: Arrays,
        rows: int,
        answer: "asyncio.Future[Any]",
        said: Mapping[str, NDArray[Any]],
    ) -> None:
        """Ask the shadow the same, behind everybody else; count how often it agrees, and capture both answers."""
        try:
            shadow = shadow.of(inputs)
            for spec in shadow.inputs:
                spec.check(inputs[spec.name])
            copy = shadow.unseen.submit(inputs, rows, None, priority=9)
        except (DataError, KeyError):
            return

        def compare(done: "asyncio.Future[Any]") -> None:
            if done.cancelled() or done.exception() or not said:
                return
            told = done.result()
            agreed = _agreeing(said, told, rows)
            for n, agrees in ((agreed, "true"), (rows - agreed, "false")):
                self.meters.count("trilobe_shadow_total", n, model=live.name, version=shadow.id, agrees=agrees)
            if self.watch is not None and live.proba and shadow.proba:
                source = inputs[shadow.inputs[0].name]
                self.watch(live.name, shadow.id, source, told[shadow.proba], live.id, said[live.proba])

        answer.add_done_callback(lambda _: copy.add_done_callback(compare))


def _in_threads(settings: Batching) -> Batching:
    return replace(settings, where="threads")


def _agreeing(first: Arrays, second: Arrays, rows: int) -> int:
    """In how many rows two answers say the same: the most probable class of their first output, or all of it."""
    a, b = next(iter(first.values())), next(iter(second.values()))
    if a.shape != b.shape:
        return 0
    best = a.dtype.kind == "f" and a.ndim > 1
    same = np.asarray(a.argmax(axis=-1) == b.argmax(axis=-1) if best else a == b, dtype=bool)
    return int(same.reshape(rows, -1).all(axis=1).sum()) if a.shape[:1] == (rows,) else rows * bool(same.all())


def _judged(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """The first of the outputs that may hold probabilities of each row; "" where the first input is not one of rows."""
    first = inputs[0]
    if first.shape[:1] != (-1,) or (first.dtype.kind == "O" and len(first.shape) > 1):
        return ""
    return next((s.name for s in outputs if s.dtype.kind == "f" and len(s.shape) == 2 and s.shape[0] == -1), "")


def _expect_proba(servable: Servable) -> None:
    """What captures take for granted, deferral needs: the first output holds probabilities of each row."""
    first = servable.outputs[0]
    if first.dtype.kind != "f" or len(first.shape) != 2 or {servable.inputs[0].shape[:1], first.shape[:1]} != {(-1,)}:
        raise ServeError(
            f"what is in doubt cannot be left to people: the first output is {first.datatype}{list(first.shape)}",
            expected="probabilities, FP32[-1, n_classes]",
            hint="serve it without serve.defer_error and serve.defer_share",
        )


def _cost(servable: Servable) -> float:
    """Seconds of the warm-up example, at best of three: the first guess of what a row costs."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        servable.run(servable.warmup)
        best = min(best, time.perf_counter() - start)
    return best
