"""Traces: spans of sampled requests for OpenTelemetry (extra ``otel``): the request, and in it waiting and computing.

Off unless an endpoint for OTLP is named, by a setting or by ``OTEL_EXPORTER_OTLP_ENDPOINT``: :func:`open_traces` gives
None then, and a server asks ``if traces is not None`` and nothing more. Otherwise it notes times while a sampled
request is under way, and the spans are made from them when it is answered; a thread of the SDK sends them, and drops
them where nobody listens. No context travels through the server: what the caller's ``traceparent`` says (W3C Trace
Context) is the parent, and whether the caller records decides for us, too.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from trilobe import __version__
from trilobe.errors import MissingExtra, UsageError
from trilobe.infrastructure.serve.logs import parse_traceparent, request_id

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
DEFAULT_SHARE = 0.01


class Trace:
    """One sampled request. Times are nanoseconds of ``time.perf_counter_ns``."""

    __slots__ = ("_traces", "headers", "spans", "start")

    def __init__(self, traces: "Traces", headers: Mapping[str, str]) -> None:
        self._traces, self.headers = traces, headers
        self.start = time.perf_counter_ns()
        self.spans: list[tuple[str, int, int, dict[str, Any]]] = []

    def step(self, queued: int, started: int, ended: int, name: str = "", rows: int = 0) -> None:
        """The request waited from ``queued`` to ``started`` and was computed until ``ended``, in a batch of ``rows``.

        ``name`` is the step of a pipeline (empty: the model is all there is).
        """
        what = {"trilobe.step": name} if name else {}
        self.spans.append((f"queue {name}".rstrip(), queued, started, what))
        self.spans.append((f"compute {name}".rstrip(), started, ended, {**what, "trilobe.batch_size": rows}))

    def end(self, model: str, version: str, status: int, error: str = "", grpc: str = "") -> None:
        """The request is answered, with this HTTP status; ``error`` says what went wrong.

        Over gRPC the status is what HTTP would have said, and ``grpc`` the name of what was.
        """
        self._traces.record(self, time.perf_counter_ns(), model, version, status, error, grpc)


class Traces:
    """Where spans go: a tracer provider of the SDK, and the share of requests without a parent that is recorded."""

    def __init__(
        self, provider: Any, share: float, seed: int | None = None, give_up: Callable[[], None] | None = None
    ) -> None:
        if not 0.0 <= share <= 1.0:
            raise UsageError(f"a share of {share} of the requests in traces", expected="a number from 0 to 1")
        self._otel, self._context, propagation = _imported("trace", "context", "trace.propagation.tracecontext")
        self._caller = propagation.TraceContextTextMapPropagator()
        self.provider, self.share = provider, share
        self._tracer = provider.get_tracer("trilobe", __version__)
        self._draw = random.Random(seed).random
        self._give_up = give_up

    def begin(self, headers: Mapping[str, str]) -> Trace | None:
        """A request has arrived: its trace, or None where it is not sampled. ``headers`` by lower-case name."""
        given = headers.get("traceparent")
        parent = parse_traceparent(given) if given is not None else None
        wanted = parent[2] if parent is not None else self._draw() < self.share
        return Trace(self, headers) if wanted else None

    def record(
        self, trace: Trace, ended: int, model: str, version: str, status: int, error: str = "", grpc: str = ""
    ) -> None:
        """Make the spans of a request (:meth:`Trace.end` calls this)."""
        otel = self._otel
        offset = time.time_ns() - time.perf_counter_ns()
        attributes: dict[str, Any] = {
            "trilobe.model": model,
            "trilobe.version": version,
            **(_called_by_grpc(grpc) if grpc else {"http.response.status_code": status}),
        }
        if given := request_id(trace.headers):
            attributes["trilobe.request_id"] = given
        request = self._tracer.start_span(
            f"infer {model}",
            context=self._caller.extract(trace.headers, context=self._context.Context()),
            kind=otel.SpanKind.SERVER,
            attributes=attributes,
            start_time=trace.start + offset,
        )
        if error or status >= 500:
            request.set_status(otel.Status(otel.StatusCode.ERROR, error))
        inside = otel.set_span_in_context(request, self._context.Context())
        for name, start, end, what in trace.spans:
            span = self._tracer.start_span(name, context=inside, attributes=what, start_time=start + offset)
            span.end(end + offset)
        request.end(ended + offset)

    def close(self, patience: float = 3.0) -> None:
        """Send what is left, for that many seconds at most: a collector that is gone must not keep a server alive.

        What is not sent by then is dropped, and no thread is left that tries again.
        """
        sending = threading.Thread(target=self.provider.shutdown, daemon=True)
        sending.start()
        sending.join(patience)
        if sending.is_alive() and self._give_up is not None:
            self._give_up()
            sending.join(patience)


def open_traces(endpoint: str = "", share: float | None = None, service: str = "trilobe") -> Traces | None:
    """Traces sent to ``endpoint`` by OTLP over HTTP, or None where nobody asked for them.

    Args:
        endpoint: of a collector, as ``http://localhost:4318``; empty: what the environment says
            (``OTEL_EXPORTER_OTLP_ENDPOINT``, or ``..._TRACES_ENDPOINT``; ``OTEL_SDK_DISABLED=true`` turns it off).
        share: of the requests that come without a trace of their own, 0 to 1; None: ``OTEL_TRACES_SAMPLER_ARG``, or
            0.01. A request whose ``traceparent`` says that it is recorded always is.
        service: ``service.name``, unless ``OTEL_SERVICE_NAME`` says otherwise.

    Raises :class:`~trilobe.errors.MissingExtra` where it is asked for and not installed,
    :class:`~trilobe.errors.UsageError` for a share that is none.

    >>> open_traces() is None
    True
    """
    asked = endpoint or next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")
    if not asked or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    exporters, resources, sdk, export, sampling = _imported(
        "exporter.otlp.proto.http.trace_exporter",
        "sdk.resources",
        "sdk.trace",
        "sdk.trace.export",
        "sdk.trace.sampling",
    )
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    resource = resources.Resource.create({"service.name": name, "service.version": __version__})
    # begin() has chosen already, hence ALWAYS_ON; close() is the server's to call.
    provider = sdk.TracerProvider(sampler=sampling.ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    # A setting names the collector; the variables mean what the SDK says they mean, which reads them itself.
    where = {"endpoint": f"{endpoint.rstrip('/')}/v1/traces"} if endpoint else {}
    exporter = exporters.OTLPSpanExporter(**where)
    traces = Traces(provider, _share() if share is None else share, give_up=exporter.shutdown)
    provider.add_span_processor(export.BatchSpanProcessor(exporter))  # last: it starts a thread, which close() ends
    return traces


def _called_by_grpc(status: str) -> dict[str, Any]:
    """What OpenTelemetry's conventions say of a call over gRPC that ended with this status."""
    from grpc import StatusCode

    number = StatusCode[status].value[0]
    return {"rpc.system": "grpc", "rpc.service": "inference.GRPCInferenceService", "rpc.grpc.status_code": number}


def _share() -> float:
    given = os.environ.get("OTEL_TRACES_SAMPLER_ARG", "")
    try:
        return float(given) if given else DEFAULT_SHARE
    except ValueError:
        raise UsageError(f"OTEL_TRACES_SAMPLER_ARG is {given!r}", expected="a number from 0 to 1") from None


def _imported(*names: str) -> tuple[Any, ...]:
    """Modules of OpenTelemetry; :class:`~trilobe.errors.MissingExtra` where they are not there."""
    try:
        return tuple(import_module(f"opentelemetry.{name}") for name in names)
    except ImportError as error:
        raise MissingExtra(
            f"traces were asked for, and OpenTelemetry is not installed ({error})",
            expected="its SDK and its exporter for OTLP over HTTP",
            hint="pip install 'trilobe[otel]'",
        ) from error
