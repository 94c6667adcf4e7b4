"""Logs: one line of JSON whatever is logged, ids as the clients gave them, a fair sample of the requests."""

import json
import logging
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trilobe.errors import UsageError
from trilobe.infrastructure.serve.logs import (
    ACCESS,
    FIELDS,
    JsonFormatter,
    access_log,
    parse_traceparent,
    request_id,
)

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("trilobe.serve", logging.WARNING, "file.py", 1, message, args, None)
    made.__dict__.update(extra)
    return made


class Lines(logging.Handler):
    """What is logged, as lines."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def access() -> Lines:
    logger, lines = logging.getLogger(ACCESS), Lines()
    logger.addHandler(lines)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(logging.NOTSET)


@given(st.text(), st.text(), st.integers(100, 599), st.floats(0, 1e6), st.floats(0, 4e9))
@example("a\nforged: line\r\u2028", "\x00", 200, 0.1, 0.0)
def test_every_record_is_one_line_that_says_it(
    message: str, model: str, status: int, seconds: float, at: float
) -> None:
    line = JsonFormatter().format(record("%s", message, model=model, status=status, seconds=seconds, created=at))
    assert "\n" not in line and "\r" not in line
    said = json.loads(line)
    assert (said["message"], said["level"], said["logger"]) == (message, "WARNING", "trilobe.serve")
    assert said.get("model", "") == model and (said["status"], said["seconds"]) == (status, seconds)
    assert datetime.fromisoformat(said["time"]) == datetime.fromtimestamp(at, UTC)
    assert said["time"].endswith("Z") and "T" in said["time"], "RFC 3339"


def test_only_what_is_known_is_said() -> None:
    said = json.loads(JsonFormatter().format(record("loaded", request_id="", model=None, version="2", secret="x")))
    assert set(said) == {"time", "level", "logger", "message", "version"}


def test_errors_bring_their_traceback_in_the_same_line() -> None:
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        import sys

        made = record("it failed")
        made.exc_info = sys.exc_info()
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert "Traceback" in json.loads(line)["error"] and "line two" in json.loads(line)["error"]


def test_what_json_cannot_hold_is_told_as_text() -> None:
    line = JsonFormatter().format(
        record("%s", "\udcff name", client=Path("/tmp"), model="\ud800", seconds=float("nan"))
    )
    said = json.loads(line.encode("utf-8"))
    assert said["message"] == "? name" and said["client"] == "/tmp" and said["model"] == "?" and said["seconds"] is None


@pytest.mark.parametrize(
    ("headers", "want"),
    [
        ({}, ""),
        ({"x-request-id": "a-17", "traceparent": f"00-{TRACE}-{SPAN}-01"}, "a-17"),
        ({"x-request-id": "", "traceparent": f"00-{TRACE}-{SPAN}-01"}, TRACE),
        ({"x-request-id": "two\nlines"}, ""),
        ({"x-request-id": "two words"}, ""),
        ({"x-request-id": "x" * 129}, ""),
        ({"x-request-id": "x" * 128}, "x" * 128),
        ({"x-request-id": "n\u00e9"}, ""),
        ({"traceparent": "nonsense"}, ""),
    ],
)
def test_ids_of_requests(headers: dict[str, str], want: str) -> None:
    assert request_id(headers) == want


@pytest.mark.parametrize(
    "header",
    [None, "", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{SPAN}-01",
     f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-0x"],
)  # fmt: skip
def test_invalid_traceparents(header: str | None) -> None:
    assert parse_traceparent(header) is None


def test_a_later_version_may_say_more() -> None:
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-03-what-the-future-holds") == (TRACE, SPAN, True)


HEX = st.sampled_from("0123456789abcdefg")


@given(
    st.one_of(st.just("00"), st.text(HEX, min_size=2, max_size=2)),
    st.one_of(st.just(TRACE), st.just("0" * 32), st.text(HEX, min_size=30, max_size=33)),
    st.one_of(st.just(SPAN), st.just("0" * 16), st.text(HEX, min_size=15, max_size=17)),
    st.one_of(st.just("01"), st.just("00"), st.text(HEX, min_size=1, max_size=3)),
    st.sampled_from(["", "-", "-x"]),
)
def test_traceparents_are_read_as_opentelemetry_reads_them(
    version: str, trace_id: str, span_id: str, flags: str, more: str
) -> None:
    propagation = pytest.importorskip("opentelemetry.trace.propagation.tracecontext")
    from opentelemetry import context, trace

    header = "-".join((version, trace_id, span_id, flags)) + more
    found = propagation.TraceContextTextMapPropagator().extract({"traceparent": header}, context=context.Context())
    theirs = trace.get_current_span(found).get_span_context()
    ours = parse_traceparent(header)
    if ours is not None:
        want = (f"{theirs.trace_id:032x}", f"{theirs.span_id:016x}", bool(theirs.trace_flags.sampled))
        assert ours == want
    else:
        assert not theirs.is_valid, header


def test_off_is_none() -> None:
    assert access_log(0.0) is None


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(UsageError, match="from 0 to 1"):
        access_log(share)


def test_a_request_is_a_line(access: Lines) -> None:
    log = access_log(1.0)
    assert log is not None
    log("a-17", "digits", "2", 200, 0.00031, "10.0.0.7")
    log("", "digits", "2", 404, 0.0001)
    first, second = map(json.loads, access.lines)
    assert {k: first[k] for k in FIELDS} == dict(
        zip(FIELDS, ("a-17", "digits", "2", 200, 0.00031, "10.0.0.7"), strict=True)
    )
    assert first["logger"] == ACCESS and "request_id" not in second and second["status"] == 404


def test_a_sample_is_a_fair_share_and_every_failure(access: Lines) -> None:
    log = access_log(0.1, seed=0)
    assert log is not None
    rng = random.Random(1)
    statuses = [500 if rng.random() < 0.02 else 200 for _ in range(5000)]
    for status in statuses:
        log("", "m", "1", status, 0.001)
    said = [json.loads(line)["status"] for line in access.lines]
    assert said.count(500) == statuses.count(500) > 50
    assert 400 < said.count(200) < 600  # 490 expected; four standard deviations are 84
