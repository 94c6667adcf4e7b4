"""Traces: with the real SDK, spans as they happened, sent to a real receiver of OTLP; off, nothing at all."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from trilobe import __version__
from trilobe.errors import UsageError
from trilobe.infrastructure.serve.traces import Traces, open_traces

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def in_memory(share: float, seed: int = 0) -> tuple[Traces, Any]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Traces(provider, share, seed), exporter


def infer(traces: Traces, headers: dict[str, str], status: int = 200, error: str = "") -> bool:
    """A request through two steps; whether it was sampled."""
    trace = traces.begin(headers)
    if trace is None:
        return False
    t = time.perf_counter_ns()
    trace.step(t, t + 1_000_000, t + 3_000_000, "decode", 1)
    trace.step(t + 3_000_000, t + 4_000_000, t + 9_000_000, "model", 8)
    trace.end("digits", "2", status, error)
    return True


def test_a_request_is_a_span_with_its_waiting_and_computing_inside() -> None:
    traces, exporter = in_memory(1.0)
    before = time.time_ns()
    assert infer(traces, {"x-request-id": "a-17"})
    *inside, request = exporter.get_finished_spans()
    assert request.name == "infer digits" and request.parent is None and request.kind.name == "SERVER"
    assert request.attributes == {
        "trilobe.model": "digits",
        "trilobe.version": "2",
        "trilobe.request_id": "a-17",
        "http.response.status_code": 200,
    }
    assert [s.name for s in inside] == ["queue decode", "compute decode", "queue model", "compute model"]
    assert [s.end_time - s.start_time for s in inside] == [1_000_000, 2_000_000, 1_000_000, 5_000_000]
    assert all(s.parent.span_id == request.context.span_id for s in inside)
    assert {s.context.trace_id for s in inside} == {request.context.trace_id}
    assert dict(inside[3].attributes) == {"trilobe.step": "model", "trilobe.batch_size": 8}
    assert before - 10**8 < request.start_time <= inside[0].start_time < before + 10**9
    assert inside[0].end_time == inside[1].start_time, "what ends and what begins are one moment"


def test_a_model_alone_has_steps_without_a_name() -> None:
    traces, exporter = in_memory(1.0)
    trace = traces.begin({})
    assert trace is not None
    trace.step(1, 2, 3, rows=1)
    trace.end("digits", "2", 200)
    assert [s.name for s in exporter.get_finished_spans()] == ["queue", "compute", "infer digits"]


def test_failures_are_marked() -> None:
    traces, exporter = in_memory(1.0)
    infer(traces, {}, 500, "step 'model' failed")
    infer(traces, {}, 400)
    failed, refused = [s for s in exporter.get_finished_spans() if s.name == "infer digits"]
    assert failed.status.status_code.name == "ERROR" and failed.status.description == "step 'model' failed"
    assert refused.status.status_code.name == "UNSET", "the client's mistakes are not the server's errors"


def test_the_caller_is_the_parent_and_decides() -> None:
    traces, exporter = in_memory(0.0)
    assert not infer(traces, {}), "nobody asked for it"
    assert not infer(traces, {"traceparent": f"00-{TRACE}-{SPAN}-00"}), "the caller does not record"
    assert infer(traces, {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"})
    spans = exporter.get_finished_spans()
    assert {f"{s.context.trace_id:032x}" for s in spans} == {TRACE}
    assert f"{spans[-1].parent.span_id:016x}" == SPAN and spans[-1].parent.is_remote
    assert spans[-1].context.trace_state["vendor"] == "1"
    assert spans[-1].attributes["trilobe.request_id"] == TRACE
    always, _ = in_memory(1.0)
    assert not infer(always, {"traceparent": f"00-{TRACE}-{SPAN}-00"})


def test_a_broken_parent_is_no_parent() -> None:
    traces, exporter = in_memory(1.0)
    infer(traces, {"traceparent": f"00-{TRACE}-{'0' * 16}-01"})
    assert exporter.get_finished_spans()[-1].parent is None


def test_the_share_is_kept() -> None:
    traces, _ = in_memory(0.1)
    n = sum(traces.begin({}) is not None for _ in range(5000))
    assert 400 < n < 600  # 500 expected; four standard deviations are 85


class Receiver(HTTPServer):
    """A collector: keeps what is sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receive)
        self.requests: list[tuple[str, Any]] = []


class Receive(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        import gzip

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert isinstance(self.server, Receiver)
        self.server.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("by", ["setting", "environment"])
def test_spans_arrive_at_a_collector(collector: Receiver, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{collector.server_address[1]}"
    if by == "environment":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1.0")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "pets")
        traces = open_traces()
    else:
        traces = open_traces(url + "/", share=1.0, service="pets")
    assert traces is not None
    for _ in range(3):
        assert infer(traces, {"traceparent": f"00-{TRACE}-{SPAN}-01"})
    traces.close()
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    resources = [r for _, sent in collector.requests for r in sent.resource_spans]
    named = {a.key: a.value.string_value for r in resources for a in r.resource.attributes}
    assert named["service.name"] == "pets" and named["service.version"] == __version__
    spans = [s for r in resources for scope in r.scope_spans for s in scope.spans]
    assert len(spans) == 15 and {s.trace_id.hex() for s in spans} == {TRACE}
    assert sum(s.parent_span_id.hex() == SPAN for s in spans) == 3


def test_a_collector_that_is_not_there_costs_nothing_but_the_spans(caplog: pytest.LogCaptureFixture) -> None:
    with HTTPServer(("127.0.0.1", 0), Receive) as gone:
        url = f"http://127.0.0.1:{gone.server_address[1]}"
    before = {t.name for t in threading.enumerate()}
    traces = open_traces(url, share=1.0)
    assert traces is not None
    start = time.monotonic()
    infer(traces, {})
    assert time.monotonic() - start < 1
    traces.close()
    assert time.monotonic() - start < 9
    assert "opentelemetry" in {r.name.split(".")[0] for r in caplog.records}
    # A thread that went on would draw from random, which property tests that run after this one do not forgive.
    assert not {t.name for t in threading.enumerate()} - before


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_traces() is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_traces("http://127.0.0.1:4318") is None


def test_bad_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (-1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="from 0 to 1"):
            in_memory(share)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "many")
    with pytest.raises(UsageError, match="OTEL_TRACES_SAMPLER_ARG is 'many'"):
        open_traces("http://127.0.0.1:4318")


ABSENT = """
import sys
sys.modules["opentelemetry"] = None
from trilobe.errors import MissingExtra
from trilobe.infrastructure.serve.traces import open_traces
assert open_traces() is None
try:
    open_traces("http://127.0.0.1:4318")
except MissingExtra as error:
    print(error)
"""


def test_without_the_extra_off_is_free_and_on_names_it() -> None:
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, check=True)
    assert "trilobe[otel]" in done.stdout


def test_off_imports_nothing() -> None:
    code = (
        "import sys; from trilobe.infrastructure.serve.traces import open_traces; open_traces()\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
