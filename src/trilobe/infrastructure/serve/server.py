"""The server: from a request's path to what answers it. No sockets here, and no framework.

:class:`Server` holds the models of a process and answers requests about them: the Open Inference Protocol v2 with
Triton's extensions (binary tensors, classification, statistics, model configuration, model repository), metrics, and a
description of all of it. ``http.py``, ``asgi.py`` and ``grpc.py`` bring requests; all of them end in :meth:`infer`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from secrets import token_hex
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import msgspec
from numpy.typing import NDArray

from trilobe import __version__
from trilobe.errors import BundleError, NotFoundError, TrilobeError
from trilobe.infrastructure.bundle import read_json
from trilobe.infrastructure.capture import CaptureLog
from trilobe.infrastructure.desk import Desk, doubted, parameters
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.pipeline import Arrays, TensorSpec
from trilobe.infrastructure.serve.access import Client, Gate
from trilobe.infrastructure.serve.batching import Batching, Scheduler, blame
from trilobe.infrastructure.serve.graph import Flow
from trilobe.infrastructure.serve.http import Reply, Request, json_reply
from trilobe.infrastructure.serve.logs import Access, request_id
from trilobe.infrastructure.serve.metrics import CONTENT_TYPE, Meters
from trilobe.infrastructure.serve.models import AnyVersion, Handed, Load, Model, Repository, Version
from trilobe.infrastructure.serve.protocol import HEADER_LENGTH, Call, Refused, compress, decompress
from trilobe.infrastructure.serve.traces import Trace, Traces
from trilobe.types import Bundle

MAX_BODY = 16 * 1024 * 1024
LARGE = 256 * 1024  # bytes of a body that is parsed beside the event loop, not in it
EXTENSIONS = (
    *("binary_tensor_data", "classification", "statistics", "model_configuration", "model_repository"),
    *("parameters", "schedule_policy"),
)
NOTHING: Mapping[str, Any] = MappingProxyType({})
logger = logging.getLogger(__name__)


class Result(NamedTuple):
    """An answer before it is encoded: the outputs by name, and who gave them."""

    outputs: Mapping[str, NDArray[Any]]
    version: AnyVersion
    parameters: Mapping[str, Any]


class Deferral(NamedTuple):
    """How what is in doubt is left to people: where it waits, and which confidence a bundle needs (None: none does)."""

    desk: Desk
    choose: Callable[[Bundle], float] | None = None


class _Doubtful(NamedTuple):
    """An answer some of whose rows are for people."""

    outputs: Arrays
    rows: Sequence[int]
    keep: Callable[[], list[str | None]]


class Control(NamedTuple):
    """How a client with the right to do so changes what is served: by name, the outcome in words ("" is good)."""

    load: Callable[[str], Awaitable[str]]
    unload: Callable[[str], Awaitable[str]]


class Server:
    """Everything that answers in one process. Must be made inside a running event loop.

    ``traces`` and ``access`` follow requests, where they are set; so is ``deferral``, before anything is applied.

    Args:
        name: the endpoint's own name, which the wish "" stands for.
        load: what a bundle means.
        captures: where a share of the traffic is kept.
        max_body: bytes of a request, compressed or not.
        flows: pipelines of several models.
        batching: how the models of that name are run.
        meters: where figures are kept; in memory by default.
        gate: who may do what; anybody anything by default.
        threads: how many computations may run beside each other (default: as many as there are cores).
    """

    def __init__(
        self,
        name: str,
        load: Load,
        captures: CaptureLog | None = None,
        max_body: int = MAX_BODY,
        flows: Sequence[Flow] = (),
        batching: Mapping[str, Batching] | None = None,
        meters: Meters | None = None,
        gate: Gate | None = None,
        threads: int = 0,
    ) -> None:
        self.traces: Traces | None = None
        self.access: Access | None = None
        self.deferral: Deferral | None = None
        self._classes: Any = None
        self.name, self.captures, self.max_body = name, captures, max_body
        self.meters, self.gate = meters or Meters(None), gate or Gate(None)
        self.scheduler = Scheduler(threads)
        watch = None if captures is None or captures.rate == 0 else self._watch
        self.repository = Repository(load, self.scheduler, self.meters, batching, watch, flows, self._threshold)
        self.control: Control | None = None
        self._diary = ThreadPoolExecutor(1, thread_name_prefix="captures")
        # Two at a time: as Python objects a body may take twenty-five times its size for a moment.
        self.readers = ThreadPoolExecutor(2, thread_name_prefix="reading")

    async def apply(self, wishes: Mapping[str, Wish]) -> None:
        """Make what is served agree with ``wishes``; see :meth:`Repository.apply`."""
        # The endpoint's own is first (its name is "" there): what is beside it is held against it.
        await self.repository.apply({name or self.name: wish for name, wish in sorted(wishes.items())})

    def tune(self, capture_rate: float) -> None:
        """Keep this share of the traffic from now on, 0 to 1."""
        if self.captures is not None:
            self.captures.rate = capture_rate
            self.repository.watch = self._watch if capture_rate else None

    def close(self) -> None:
        """Make the captures durable and end the threads; nothing may be under way any more."""
        self.scheduler.close()
        self.repository.close()
        self.readers.shutdown(wait=False)
        self._diary.shutdown(wait=True)
        if self.captures is not None:
            self.captures.close()

    # --- what every front end calls

    def infer(
        self,
        name: str,
        version: "str | AnyVersion",
        call: Call,
        finish: Callable[[Result], Any] = lambda result: result,
        input_ns: int = 0,
        trace: Trace | None = None,
    ) -> "asyncio.Future[Any]":
        """A future of the answer to ``call``, or of what ``finish`` makes of it where it was computed.

        ``version`` is an id, "" for whichever has its turn, or what :meth:`choose` gave.
        """
        model = self.repository.model(name)
        chosen = model.choose(version) if isinstance(version, str) else version

        def tell(outputs: Arrays, said: Mapping[str, Any] = NOTHING) -> Any:
            return finish(Result(outputs, chosen, said))

        return self._answer(model, chosen, call, tell, input_ns, trace)

    def choose(self, name: str, version: str = "") -> AnyVersion:
        """The version whose turn it is to answer a call by that name; raises :class:`Refused` where there is none."""
        return self.repository.model(name).choose(version)

    def model(self, name: str, version: str = "") -> AnyVersion:
        """What answers most calls by that name (and version); raises :class:`Refused` where nothing would."""
        model = self.repository.model(name)
        return model.choose(version or model.current)

    # --- what is left to people

    def _threshold(self, name: str, bundle: Bundle) -> float | None:
        """Below which confidence that bundle leaves answers to people, if it does.

        People know the classes of the endpoint's own, which must keep what was promised. What is served beside it and
        answers about the same does so where it can.
        """
        choose = self.deferral.choose if self.deferral is not None else None
        if choose is None:
            return None
        classes = read_json(bundle, "labels.json").get("names")
        if name == self.name:
            self._classes = classes
            return choose(bundle)
        try:
            return choose(bundle) if classes and classes == self._classes else None
        except BundleError as error:
            logger.warning("%r leaves nothing to people: %s", name, error)
            return None

    def _answer(
        self,
        model: Model,
        chosen: AnyVersion,
        call: Call,
        finish: Callable[..., Any],
        input_ns: int = 0,
        trace: Trace | None = None,
    ) -> "asyncio.Future[Any]":
        """A future of what ``finish`` makes of the outputs (and of what must be said about them, if anything)."""
        if self.deferral is None or not chosen.defers:
            return self.repository.answer(model, chosen, call, finish, input_ns, trace)
        desk, source, proba = self.deferral.desk, chosen.inputs[0].name, chosen.proba
        called = model.name if model.name != self.name else ""

        def look(outputs: Arrays) -> Any:
            giver = outputs.of if isinstance(outputs, Handed) else chosen
            if not isinstance(giver, Version) or giver.threshold is None:
                return finish(outputs)
            rows = doubted(outputs[proba], giver.threshold)
            if not rows:
                return finish(outputs, parameters(call.rows, [], []))
            keep = partial(desk.keep, giver.id, call.inputs[source], outputs[proba], rows, called)
            return _Doubtful(outputs, rows, keep)

        answer = self.repository.answer(model, chosen, call, look, input_ns, trace)
        return self.scheduler.loop.create_task(self._deferred(answer, chosen.name, call, finish))

    async def _deferred(self, answer: "asyncio.Future[Any]", name: str, call: Call, finish: Callable[..., Any]) -> Any:
        """The answer. Rows in doubt are put on the desk first: an id that a client hears is an id that is kept."""
        found = await answer
        if not isinstance(found, _Doubtful):
            return found
        ids = await self.scheduler.loop.run_in_executor(self._diary, found.keep)
        refused = ids.count(None)
        self.meters.count("trilobe_deferred_total", len(ids) - refused, model=name)
        if refused:
            self.meters.count("trilobe_deferral_refused_total", refused, model=name)
        if lost := ids.count(""):
            self.meters.count("trilobe_captures_dropped_total", lost)
        return finish(found.outputs, parameters(call.rows, found.rows, ids))

    def _fetch(self, name: str, id_: str) -> Reply:
        """What became of what was left to people under that id."""
        self.repository.model(name)
        said = self.deferral.desk.look(id_) if self.deferral is not None else None
        if said is None:
            raise Refused(404, f"{name!r} left nothing to people under that id", expected="one of its deferred_ids")
        if not said:
            return json_reply(202, {"id": id_, "status": "waiting"})
        return 200, {"content-type": "application/json"}, said

    # --- captures

    def _watch(self, name: str, *what: Any) -> None:
        """Keep rows of what was asked by that name and what was said: behind the answers, in the one thread that may.

        ``what`` is the bundle that answered, the input, its replies; of a shadow, the live bundle and its replies too.
        """
        self._diary.submit(self._capture, name if name != self.name else "", *what)

    def _capture(
        self,
        model: str,
        bundle_id: str,
        inputs: NDArray[Any],
        replies: NDArray[Any],
        live: str = "",
        live_replies: NDArray[Any] | None = None,
    ) -> None:
        captures = cast("CaptureLog", self.captures)
        dropped = captures.dropped
        try:
            captures.append(bundle_id, inputs, replies, model, live, live_replies)
        except TrilobeError as error:
            logger.warning("a request was not captured: %s", error)
        if captures.dropped > dropped:
            self.meters.count("trilobe_captures_dropped_total", captures.dropped - dropped)

    # --- HTTP

    def handle(self, request: Request) -> "Reply | asyncio.Future[Reply]":
        """The answer to a request, or a future of it. Whatever is wrong is raised; :meth:`explain` puts it in words."""
        client = self.gate.client(request.headers, request.peer)
        parts = request.parts
        if parts[:2] == ["v2", "models"] and len(parts) > 2 and parts[2:] != ["stats"]:
            return self._model(parts[2], parts[3:], request, client)
        if parts[:2] == ["v2", "repository"]:
            return self._administer(parts[2:], request, client)
        if parts == ["invocations"]:
            return self._invoke(request, client)
        return self._about(parts, request, client)

    def explain(self, error: BaseException) -> Reply:
        """The reply for what :meth:`handle`, or its future, raised."""
        status, words = blame(error)
        if status == 500:
            logger.error("a request failed", exc_info=error)
        status, headers, body = json_reply(status, {"error": words})
        return status, headers | (dict(error.headers) if isinstance(error, Refused) else {}), body

    def _about(self, parts: list[str], request: Request, client: Client) -> Reply:
        match parts:
            case ["v2"]:
                answer: Any = {"name": "trilobe", "version": __version__, "extensions": EXTENSIONS}
            case ["v2", "health", "live"]:
                answer = {"live": True}
            case ["v2", "health", "ready"] | ["ping"]:
                answer = {"ready": True}
            case ["v2", "models", "stats"]:
                client.require("metrics")
                answer = {"model_stats": [self._statistics(v) for v in self._versions()]}
            case ["v2", "openapi.json"]:
                client.require()
                from trilobe.infrastructure.serve.openapi import describe

                answer = describe(self._versions())
            case ["metrics"]:
                allow(request, "GET", "HEAD")
                client.require("metrics")
                return 200, {"content-type": CONTENT_TYPE}, self.meters.render().encode()
            case _:
                raise Refused(
                    404, f"there is nothing at {request.path!r}", expected="a path of the Open Inference Protocol v2"
                )
        allow(request, "GET", "HEAD")
        if parts[-1] in ("ready", "ping") and not self.repository.ready:
            self.repository.model(self.name).choose() if self.name in self.repository.models else None
            raise Refused(503, "not everything that should be served is ready", headers={"retry-after": "1"})
        return json_reply(200, answer)

    def _model(self, name: str, rest: list[str], request: Request, client: Client) -> "Reply | asyncio.Future[Reply]":
        version, rest = (rest[1], rest[2:]) if rest[:1] == ["versions"] and len(rest) > 1 else ("", rest)
        if rest == ["infer"]:
            allow(request, "POST")
            client.require("infer", name)
            return self._infer(name, version, request, client)
        if rest[:1] == ["answers"] and len(rest) == 2 and not version:
            allow(request, "GET", "HEAD")
            client.require("infer", name)
            return self._fetch(name, rest[1])
        if rest not in ([], ["ready"], ["stats"], ["config"]):
            raise Refused(
                404,
                f"there is nothing at {request.path!r}",
                expected="ready, config, stats, infer or answers/ID of a model",
            )
        allow(request, "GET", "HEAD")
        if rest != ["ready"]:
            client.require("metrics" if rest == ["stats"] else "")
        chosen = self.model(name, version)
        match rest:
            case ["ready"]:
                return json_reply(200, {"name": name, "ready": True})
            case ["stats"]:
                return json_reply(200, {"model_stats": [self._statistics(chosen)]})
            case ["config"]:
                return json_reply(200, self.configuration(chosen))
            case _:
                return json_reply(200, self.metadata(chosen))

    def _invoke(self, request: Request, client: Client) -> "asyncio.Future[Reply]":
        """SageMaker's contract: the endpoint's own model, the length of the JSON part in the content type."""
        allow(request, "POST")
        client.require("infer", self.name)
        if size := request.headers.get("content-type", "").partition("json-header-size=")[2]:
            request.headers[HEADER_LENGTH] = size

        async def told() -> Reply:
            status, headers, body = await self._infer(self.name, "", request, client)
            if size := headers.pop(HEADER_LENGTH, ""):
                headers["content-type"] = f"application/vnd.sagemaker-triton.binary+json;json-header-size={size}"
            return status, headers, body

        return self.scheduler.loop.create_task(told())

    def _infer(self, name: str, version: str, request: Request, client: Client) -> "asyncio.Future[Reply]":
        start = time.perf_counter_ns()
        if self.traces is not None or self.access is not None:
            return self._followed(name, version, request, client, start)
        return self._read(name, version, request, client, start)

    def _followed(
        self, name: str, version: str, request: Request, client: Client, start: int
    ) -> "asyncio.Future[Reply]":
        """One request, noted in a trace or in the log where its turn comes."""
        known_by = request.headers["x-request-id"] = request_id(request.headers) or token_hex(16)
        trace = self.traces.begin(request.headers) if self.traces is not None else None

        async def follow() -> Reply:
            try:
                reply = await self._read(name, version, request, client, start, trace)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 (explain logs what is ours)
                reply = self.explain(error)
                reply[1]["x-request-id"] = known_by
            if trace is not None:
                trace.end(name, version, reply[0])
            if self.access is not None:
                seconds = (time.perf_counter_ns() - start) / 1e9
                self.access(known_by, name, version, reply[0], seconds, client.name)
            return reply

        return self.scheduler.loop.create_task(follow())

    def _read(
        self, name: str, version: str, request: Request, client: Client, start: int, trace: Trace | None = None
    ) -> "asyncio.Future[Reply]":
        encoding = request.headers.get("content-encoding")
        if encoding or len(request.body) > LARGE:
            return self.scheduler.loop.create_task(self._read_large(name, version, request, client, start, trace))
        model = self.repository.model(name)
        chosen = model.choose(version)
        call = chosen.reader.parse(request.body, request.headers)
        return self._submit(model, chosen, request, client, call, start, trace)

    async def _read_large(
        self, name: str, version: str, request: Request, client: Client, start: int, trace: Trace | None
    ) -> Reply:
        """What would keep the loop from other clients is read in a thread."""
        model = self.repository.model(name)
        chosen = model.choose(version)

        def read() -> Call:
            body = decompress(request.body, request.headers.get("content-encoding", "").strip().lower(), self.max_body)
            return chosen.reader.parse(body, request.headers)

        call = await self.scheduler.loop.run_in_executor(self.readers, read)
        return await self._submit(model, chosen, request, client, call, start, trace)

    def _submit(
        self,
        model: Model,
        chosen: AnyVersion,
        request: Request,
        client: Client,
        call: Call,
        start: int,
        trace: Trace | None,
    ) -> "asyncio.Future[Reply]":
        accept = request.headers.get("accept-encoding")
        echo = request.headers.get("x-request-id")

        def finish(outputs: Arrays, said: Mapping[str, Any] | None = None) -> Reply:
            headers, body = chosen.writer.encode(call, outputs, said)
            if accept:
                encoding, body = compress(body, accept)
                if encoding:
                    headers["content-encoding"] = encoding
            if echo:
                headers["x-request-id"] = echo
            return 200, headers, body

        if client.limited:
            client.enter()
        try:
            answer = self._answer(model, chosen, call, finish, time.perf_counter_ns() - start, trace)
        except BaseException:
            if client.limited:
                client.leave()
            raise
        if client.limited:
            answer.add_done_callback(lambda _: client.leave())
        return answer

    def _administer(self, parts: list[str], request: Request, client: Client) -> "Reply | asyncio.Future[Reply]":
        allow(request, "POST")
        client.require("admin", parts[1] if parts[:1] == ["models"] and len(parts) > 1 else "")
        match parts:
            case ["index"]:
                try:
                    ready = bool(request.body) and bool(msgspec.json.decode(request.body, type=dict).get("ready"))
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise Refused(400, f"not usable JSON ({error})", expected='{"ready": true}, or nothing') from error
                return json_reply(200, [row for row in self.index() if not ready or row["state"] == "READY"])
            case ["models", name, "load" | "unload" as what]:
                return self.scheduler.loop.create_task(self._load_or_unload(name, what))
            case _:
                raise Refused(
                    404, f"there is nothing at {request.path!r}", expected="index, models/NAME/load or unload"
                )

    async def _load_or_unload(self, name: str, what: str) -> Reply:
        await self.administer(name, what)
        return 200, {"content-type": "application/json"}, b""

    async def administer(self, name: str, what: str) -> None:
        """Load or unload the model of that name. Raises :class:`Refused` where that cannot be."""
        if self.control is None:
            raise Refused(501, "what is served here is not changed by requests", hint="serve from a folder of models")
        try:
            problem = await (self.control.load(name) if what == "load" else self.control.unload(name))
        except NotFoundError as error:
            raise Refused(404, error.problem, expected=error.expected) from error
        if problem:
            raise Refused(400, f"failed to {what} {name!r}: {problem}")

    # --- what is said about models

    def _versions(self) -> list[AnyVersion]:
        return [version for model in self.repository.models.values() for version in model.versions.values()]

    def index(self) -> list[dict[str, str]]:
        """All models and versions with their states, in Triton's words."""
        said = {"ready": "READY", "creating": "LOADING", "failed": "UNAVAILABLE", "deleting": "UNLOADING"}
        rows = []
        for model in self.repository.models.values():
            rows += [
                {"name": model.name, "version": v.id, "state": said[v.state], "reason": ""}
                for v in model.versions.values()
            ]
            if not model.versions:
                rows.append({"name": model.name, "version": "", "state": said[model.state], "reason": model.error})
        return rows + [
            {"name": name, "version": "", "state": "UNAVAILABLE", "reason": "unloaded"}
            for name in self.repository.unloaded
        ]

    def metadata(self, version: AnyVersion) -> dict[str, Any]:
        """Name, versions, platform, and the tensors in and out."""
        model = self.repository.model(version.name)
        tensors = {"inputs": _described(version.inputs), "outputs": _described(version.outputs)}
        return {"name": version.name, "versions": list(model.versions), "platform": version.platform, **tensors}

    def configuration(self, version: AnyVersion) -> dict[str, Any]:
        """What Triton's clients know as the model's configuration, as far as it applies."""
        settings = self.repository.how(version.name)

        def tensors(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
            return [
                {
                    "name": spec.name,
                    "data_type": "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}",
                    "dims": list(spec.shape[1:]),
                }
                for spec in specs
            ]

        known = {} if version.threshold is None else {"deferral_threshold": {"string_value": str(version.threshold)}}
        if version.reader.files is not None:  # what may come as files, or as the body of a request
            known["files"] = {"string_value": version.reader.files.inputs[0].name}
        return {
            "name": version.name,
            "platform": version.platform,
            "parameters": known,
            "backend": "trilobe",
            "version_policy": {"specific": {"versions": list(self.repository.model(version.name).versions)}},
            "max_batch_size": settings.max_batch,
            "input": tensors(version.inputs),
            "output": tensors(version.outputs),
            "dynamic_batching": {
                "max_queue_delay_microseconds": int(settings.delay * 1e6),
                "default_queue_policy": {"max_queue_size": settings.max_pending},
            },
        }

    def _statistics(self, version: AnyVersion) -> dict[str, Any]:
        figures = self.meters.statistics(version.name, version.id)
        if isinstance(version, Version):
            times = version.servable.pipeline.times()
            if version.servable.files is not None:  # the same model, called with files
                for step, (n, ns) in version.servable.files.pipeline.times().items():
                    before = times.get(step, (0, 0))
                    times[step] = before[0] + n, before[1] + ns
            figures["steps"] = {step: {"count": n, "ns": ns} for step, (n, ns) in times.items()}
        if self.repository.model(version.name).shadow == version.id:
            same, other = (
                self.meters.counted("trilobe_shadow_total", model=version.name, version=version.id, agrees=agrees)
                for agrees in ("true", "false")
            )
            figures["shadow"] = {"compared": same + other, "agreed": same}
        return figures


def allow(request: Request, *methods: str) -> None:
    """Raise :class:`Refused` 405, with the methods that are allowed, unless the request's is one of them."""
    if request.method not in methods:
        raise Refused(405, f"method {request.method}", expected=methods[0], headers={"allow": ", ".join(methods)})


def _described(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]
