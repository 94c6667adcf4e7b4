"""Malformed requests of every kind, made by Hypothesis, against a server in its own process and against the parser.

Whatever comes, the answer is JSON with an ``error`` and a 4xx (or the connection ends): never a 500, never a
traceback in the log, never memory that grows, and others are answered meanwhile. ``benchmarks/serve-fuzz`` does the
same guided by coverage, for as long as one likes.
"""

import gzip
import json
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trilobe.errors import DataError
from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.pipeline import DATATYPES, TensorSpec
from trilobe.infrastructure.serve.protocol import HEADER_LENGTH, Call, decompress, parse_request

MAX_BODY = 200_000
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec
from trilobe.infrastructure.serve import Limits, Settings, serve_forever

def total(data):
    return {"total": data["x"].sum(axis=1, dtype=np.float64), "said": np.array([s[::-1] for s in data["s"]], object)}

def load(bundle):
    takes = TensorSpec("x", "FP32", (-1, 3)), TensorSpec("s", "BYTES", (-1,))
    gives = TensorSpec("total", "FP64", (-1,)), TensorSpec("said", "BYTES", (-1,))
    first = {"x": np.zeros((1, 3), np.float32), "s": np.array([b""], object)}
    return Servable(Pipeline([("total", total)]), takes, gives, first)

folder = Path(sys.argv[1])
limits = Limits(head=2.0, body=2.0, max_head=8192)
serve_forever(folder, "sum", load, folder, max_body=int(sys.argv[2]), settings=Settings(limits=limits))
"""
FEW = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


class Victim:
    """A server in a process of its own, and what it says."""

    def __init__(self, folder: Path) -> None:
        bundle = write_bundle(folder / "b", dict.fromkeys(REQUIRED_FILES, b"{}"), "m1", {})
        endpoint.deploy(folder, bundle.path)
        command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(MAX_BODY)]
        self.folder, self.endpoint = folder, endpoint.start(folder, "sum", command, 30)
        host, _, port = self.endpoint.url.rpartition("//")[2].rpartition(":")
        self.address = host, int(port)

    def ask(self, data: bytes, wait: float = 0.1) -> bytes:
        """All that is said to ``data``, until the end or until nothing came for ``wait`` seconds."""
        with socket.create_connection(self.address, timeout=5) as client:
            out = b""
            try:
                client.sendall(data)
                client.settimeout(wait)
                while got := client.recv(1 << 20):
                    out += got
            except TimeoutError:
                pass
            except ConnectionError:
                out = out or b""
            return out

    def well(self) -> bool:
        """Whether it answers, and rightly."""
        with Client(self.endpoint.url, "sum", timeout=5) as client:
            out = client.call({"x": np.ones((2, 3), np.float32), "s": np.array([b"ab", b"c"], object)})
        return out["total"].tolist() == [3.0, 3.0] and out["said"].tolist() == [b"ba", b"c"]

    def memory(self, what: str = "VmHWM") -> int:
        """The most bytes it ever held (or, with ``VmRSS``, now)."""
        status = Path(f"/proc/{self.endpoint.pid}/status").read_text()
        return 1024 * int(status.split(f"{what}:")[1].split()[0])


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(tmp_path_factory.mktemp("victim"))
    assert victim.well()
    before = victim.memory()
    yield victim
    grown = victim.memory() - before
    log = (victim.folder / "server.log").read_text()
    assert victim.well()
    endpoint.stop(victim.folder)
    assert grown < 100e6, f"it grew by {grown / 1e6:.0f} MB"
    assert "Traceback" not in log and "internal error" not in log, log[-3000:]


def blames_the_request(out: bytes, also: tuple[int, ...] = ()) -> list[int]:
    """The statuses in ``out``, after checking that every one that is no success explains itself and is no 500."""
    statuses = []
    for head in re.finditer(rb"(?:^|(?<=[}\n]))HTTP/1\.1 (\d{3}) [^\r]*\r\n(.*?)\r\n\r\n", out, re.DOTALL):
        status = int(head[1])
        statuses.append(status)
        assert status < 500 or status in also or status == 501, out[:1000]
        if status >= 400:
            size = int(re.search(rb"content-length: (\d+)", head[2])[1])
            body = out[head.end() : head.end() + size]
            if body and not body.startswith(b"HTTP/1.1 "):  # HEAD has none
                assert isinstance(json.loads(body)["error"], str) and "Traceback" not in body.decode()
    return statuses


# --- HTTP -----------------------------------------------------------------------------------------------------------

VALID = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]},
                {"name": "s", "shape": [1], "datatype": "BYTES", "data": ["ab"]}]}
).encode()  # fmt: skip
INFER = b"POST /v2/models/sum/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(VALID), VALID)

segments = st.sampled_from(
    ["v2", "models", "sum", "infer", "ready", "health", "live", "metrics", "repository", "index", "load", "versions",
     "..", ".", "", "%2e%2e", "%2F", "%00", "%0d%0a", "%", "%zz", "%ff", "%c0%ae", "~", "a" * 300, "?", "#", ";",
     "@", "\\", "*"]
)  # fmt: skip
targets = st.one_of(
    st.lists(segments, max_size=6).map(lambda s: "/" + "/".join(s)),
    st.sampled_from(
        ["*", "http://a/v2", "//", "http://", "a:80", "https://a@b:1/v2/health/live", "http:///../v2", "%"]
    ),
    st.text(st.characters(min_codepoint=33, max_codepoint=255), min_size=1, max_size=30),
)
methods = st.sampled_from(["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PROPFIND",
                           "get", "POST ", "", "PRI", "SOURCE", "DESCRIBE"])  # fmt: skip
headers = st.one_of(
    st.sampled_from(
        ["Content-Length: 5", "Content-Length: 0", "Content-Length: -1", "Content-Length: 5, 5", "Content-Length: 1e3",
         "Content-Length: 99999999999999999999", "Content-Length : 5", "Transfer-Encoding: chunked",
         "Transfer-Encoding: identity", "Transfer-Encoding: chunked, chunked", "Transfer-Encoding:\tchunked",
         "Connection: close", "Upgrade: h2c", "Connection: Upgrade", "Expect: 100-continue", "Expect: nonsense",
         "Content-Encoding: gzip", "Host: a\0b",
         "Content-Encoding: br", "Inference-Header-Content-Length: 3", "Inference-Header-Content-Length: -3",
         "Accept-Encoding: gzip, deflate;q=0, *;q=x", "Authorization: Basic !", "Origin: null", "X-Request-Id: a\tb",
         " folded", ": nameless", "No colon", "X" * 2000 + ": 1", "traceparent: 00-zz", "X: " + "\xff" * 50]
    ),
    st.text(st.characters(max_codepoint=255, exclude_characters="\n"), max_size=40),
)  # fmt: skip
bodies = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([VALID, b"3\r\nabc\r\n0\r\n\r\n", b"3;e=1\r\nabc\r\n0\r\nT: 1\r\n\r\n", b"ffffffffff\r\n",
                     b"-1\r\n", b"0\r\n\r\nGET /v2 HTTP/1.1\r\n\r\n", b"5\r\nabc\r\n", b"GET /v2 HTTP/1.1\r\n\r\n"]),
)  # fmt: skip


@FEW
@example("HEAD", "/", [], b"\0", "HTTP/1.1")
@given(methods, targets, st.lists(headers, max_size=6), bodies, st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/9", ""]))
def test_requests_of_odd_parts(
    victim: Victim, method: str, target: str, lines: list[str], body: bytes, version: str
) -> None:
    head = f"{method} {target} {version}\r\n" + "".join(f"{line}\r\n" for line in lines) + "\r\n"
    blames_the_request(victim.ask(head.encode("latin-1") + body, 0.03))


@FEW
@given(st.data())
def test_a_good_request_damaged(victim: Victim, data: st.DataObject) -> None:
    """Bytes changed, left out and put in, anywhere; then a good one on the same connection if it is still there."""
    whole = bytearray(INFER)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(whole)))
        cut = data.draw(st.integers(0, 4))
        whole[at : at + cut] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\r\n", b"\0", b" ", b"%"]))
        )
    blames_the_request(victim.ask(bytes(whole) + INFER, 0.03))


def flood(kind: str) -> bytes:
    """A request that would cost a server much more than it costs its sender."""
    chunked = b"POST /v2/models/sum/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    match kind:
        case "headers":
            return b"GET /v2 HTTP/1.1\r\n" + b"".join(b"X%d: 1\r\n" % i for i in range(100_000))
        case "one header":
            return b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 5_000_000
        case "path":
            return b"GET /" + b"a/" * 2_000_000
        case "requests":
            return b"GET /v2/health/live HTTP/1.1\r\n\r\n" * 50_000
        case "tiny chunks":
            return chunked + b"1\r\na\r\n" * 500_000
        case "chunk extension":
            return chunked + b"1;" + b"a" * 5_000_000
        case "trailer":
            return chunked + b"1\r\na\r\n0\r\nX: " + b"a" * 5_000_000
        case "empty lines":
            return b"\r\n" * 2_000_000
        case "body":
            return b"POST /v2/models/sum/infer HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n" + bytes(5_000_000)
        case "chunked body":
            return chunked + b"10000\r\n%b\r\n" % bytes(65536) * 100
        case _:
            return b"GET /v2/health/live HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" * 20_000


@pytest.mark.parametrize(
    "kind",
    ["headers", "one header", "path", "requests", "tiny chunks", "chunk extension", "trailer", "empty lines", "body",
     "chunked body", "upgrades"],
)  # fmt: skip
def test_floods_are_cut_short_and_others_are_answered_meanwhile(victim: Victim, kind: str) -> None:
    before, data = victim.memory(), flood(kind)
    outs: list[bytes] = []
    senders = [threading.Thread(target=lambda: outs.append(victim.ask(data, 0.5))) for _ in range(4)]
    for sender in senders:
        sender.start()
    waited = []
    while any(sender.is_alive() for sender in senders):
        start = time.monotonic()
        assert victim.well()
        waited.append(time.monotonic() - start)
    for out in outs:
        statuses = blames_the_request(out)
        assert kind in ("requests", "upgrades", "empty lines") or not statuses or statuses[0] >= 400
    assert victim.memory() - before < 60e6
    assert not waited or max(waited) < 5.0


# --- the protocol ---------------------------------------------------------------------------------------------------

odd_numbers = st.sampled_from(
    [
        0,
        -1,
        1,
        2,
        3,
        2**31,
        2**32,
        2**63,
        -(2**63),
        2**64,
        2**70,
        10**400,
        1.5,
        1e400,
        float("nan"),
        True,
        None,
        "3",
        [],
        {},
    ]
)
odd_texts = st.sampled_from(
    ["", "x", "s", "total", "FP32", "FP16", "BYTES", "BF16", "fp32", "INT4", "\0", "\ud800", "a" * 5000]
)
scalars = st.one_of(odd_numbers, odd_texts, st.booleans(), st.floats(), st.integers())
nested = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_texts, inner, max_size=3), max_leaves=8
)
shapes = st.one_of(st.lists(odd_numbers, max_size=4), st.just([1, 3]), st.just([1]), st.just([2**40, 3]), nested)
parameters = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "binary_data_output", "classification", "priority", "timeout",
                     "sequence_id", "sequence_start", "shared_memory_region", "triton_x", "mine"]),
    nested, max_size=3,
)  # fmt: skip
tensors = st.one_of(
    nested,
    st.fixed_dictionaries(
        {},
        optional={"name": st.one_of(odd_texts, st.just("x"), st.just("s"), nested), "shape": shapes,
                  "datatype": st.one_of(odd_texts, st.just("FP32"), st.just("BYTES"), nested), "parameters": parameters,
                  "data": st.one_of(nested, st.just([1, 2, 3]), st.just(["ab"]), st.just([[1, 2, 3]]))},
    ),
)  # fmt: skip
requests = st.one_of(
    nested,
    st.fixed_dictionaries(
        {},
        optional={"inputs": st.one_of(st.lists(tensors, max_size=4), nested),
                  "outputs": st.lists(tensors, max_size=3) | nested,
                  "id": scalars, "parameters": parameters | nested},
    ),
)  # fmt: skip
lengths = st.one_of(
    st.integers(-2, 3), st.integers(), st.sampled_from(["", "x", "1.0", "0x1", " 3", "3 ", "+3", "٣", "1, 1"])
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a request for inference of which something is (mostly) wrong."""
    head = json.dumps(draw(requests)).encode("utf-8", "surrogatepass")
    if draw(st.booleans()) and head:
        at = draw(st.integers(0, len(head)))
        head = (
            head[:at]
            + draw(st.sampled_from([b"", b"\xff", b"\xed\xa0\x80", b"NaN", b"[" * 3000, b"\0", b","]))
            + head[at:]
        )
    binary = draw(st.one_of(st.just(b""), st.binary(max_size=40)))
    found = {}
    if binary or draw(st.booleans()):
        found[HEADER_LENGTH] = (
            str(len(head) + draw(st.sampled_from([0, 0, 0, 1, -1]))) if draw(st.booleans()) else str(draw(lengths))
        )
    return head + binary, found


SPECS = {
    "both": ([TensorSpec("x", "FP32", (-1, 3)), TensorSpec("s", "BYTES", (-1,))], [TensorSpec("total", "FP64", (-1,))]),
    **{kind: ([TensorSpec("x", kind, (-1, -1))], [TensorSpec("total", kind, (-1,))]) for kind in DATATYPES},
    "scalar": ([TensorSpec("x", "FP32", ())], [TensorSpec("total", "FP32", ())]),
}


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls(), st.sampled_from(sorted(SPECS)))
@example((b"[" * 100_000, {}), "both")
@example((b'{"inputs":' * 50_000, {}), "both")
@example((b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1e999, 0, 0]}]}', {}), "FP32")
@example((b"", {HEADER_LENGTH: "0"}), "both")
@example((b"", {HEADER_LENGTH: "0"}), "scalar")
@example((b"", {}), "both")
def test_the_parser_gives_a_call_that_fits_or_an_error_in_words(call: tuple[bytes, dict[str, str]], kind: str) -> None:
    inputs, outputs = SPECS[kind]
    try:
        parsed = parse_request(call[0], call[1], inputs, outputs)
    except DataError as error:
        assert error.problem and len(str(error)) < 20_000
        return
    assert isinstance(parsed, Call) and set(parsed.inputs) == {spec.name for spec in inputs}
    for spec in inputs:
        spec.check(parsed.inputs[spec.name])  # the declared dtype, shape, and nothing that is not finite


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from(["gzip", "deflate", "br", "", "identity", "GZIP", "gzip, gzip"]),
    st.booleans(),
)
def test_decompression_gives_what_was_packed_or_an_error(data: bytes, encoding: str, packed: bool) -> None:
    sent = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding, bytes)(data) if packed else data
    try:
        out = decompress(sent, encoding, 150)
    except DataError:
        assert not (packed and encoding in ("gzip", "deflate") and len(data) <= 150)
        return
    assert len(out) <= 150 and (not packed or out == data)


@FEW
@given(calls(), st.sampled_from(["", "gzip", "deflate"]))
def test_calls_of_odd_parts(victim: Victim, call: tuple[bytes, dict[str, str]], encoding: str) -> None:
    body, found = call
    lines = [f"{name}: {value}" for name, value in found.items()]
    if encoding:
        body = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
        lines.append(f"Content-Encoding: {encoding}")
    head = "".join(f"{line}\r\n" for line in [*lines, f"Content-Length: {len(body)}", "Connection: close"])
    out = victim.ask(f"POST /v2/models/sum/infer HTTP/1.1\r\n{head}\r\n".encode() + body, 5.0)
    (status,) = blames_the_request(out)
    assert status in (200, 400, 413, 415)


def bomb(levels: int) -> bytes:
    data = bytes(100_000_000)
    for _ in range(levels):
        data = gzip.compress(data, 9)
    return data


def with_bytes(sizes: dict[str, int], data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Body and headers of a call whose tensors are said to be ``sizes`` of the bytes ``data`` after the JSON."""
    kinds = {"x": ([1, 3], "FP32"), "s": ([1], "BYTES")}
    described = [{"name": name, "shape": kinds[name][0], "datatype": kinds[name][1],
                  "parameters": {"binary_data_size": size}} for name, size in sizes.items()]  # fmt: skip
    head = json.dumps({"inputs": described}).encode()
    return head + data, (f"{HEADER_LENGTH}: {len(head)}",)


BAD: dict[str, tuple[bytes, tuple[str, ...], Any]] = {
    "gzip bomb": (bomb(1), ("Content-Encoding: gzip",), 413),
    "bomb in a bomb": (bomb(2), ("Content-Encoding: gzip",), 400),
    "half a gzip": (gzip.compress(VALID)[:-9], ("Content-Encoding: gzip",), 400),
    "two gzips": (gzip.compress(VALID) * 2, ("Content-Encoding: gzip",), 400),
    "gzip that is none": (VALID, ("Content-Encoding: gzip",), 400),
    "brotli": (VALID, ("Content-Encoding: br",), 415),
    "gzip twice over": (VALID, ("Content-Encoding: gzip, gzip",), 415),
    "nested lists": (b'{"inputs": ' + b"[" * 90_000, (), 400),
    "nested objects": (b'{"a":' * 30_000, (), 400),
    "nested data": (b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": ' + b"[" * 90_000,
    (), 400),
    "nothing": (b"", (), 400),
    "a list": (b"[]", (), 400),
    "null": (b"null", (), 400),
    "two bodies": (VALID + VALID, (), 400),
    "no UTF-8": (VALID.replace(b"ab", b"\xff\xfe"), (), 400),
    "half a surrogate": (VALID.replace(b"ab", b"\\ud800"), (), 400),
    "NaN": (VALID.replace(b"1, 2, 3", b"NaN, 2, 3"), (), 400),
    "infinity by overflow": (VALID.replace(b"1, 2, 3", b"1e999, 2, 3"), (), 400),
    "an endless number": (VALID.replace(b"1, 2, 3", b"1" * 50_000 + b", 2, 3"), (), 400),
    "huge shape": (VALID.replace(b"[1, 3]", b"[9223372036854775807, 3]"), (), 400),
    "huge shapes that wrap": (VALID.replace(b"[1, 3]", b"[6148914691236517206, 3]"), (), 400),
    "negative shape": (VALID.replace(b"[1, 3]", b"[-1, 3]"), (), 400),
    "empty shape": (VALID.replace(b"[1, 3]", b"[0, 3]"), (), 400),
    "inputs twice": (VALID.replace(b'"s"', b'"x"'), (), 400),
    "header longer than the body": (VALID, (f"{HEADER_LENGTH}: {len(VALID) + 1}",), 400),
    "header length twice": (VALID, (f"{HEADER_LENGTH}: {len(VALID)}", f"{HEADER_LENGTH}: 1"), 400),
    "header length of 5000 digits": (VALID, (f"{HEADER_LENGTH}: {'0' * 5000}1",), 400),
    "NaN in binary": (*with_bytes({"x": 12}, np.array([np.nan, 0, 0], "<f4").tobytes()), 400),
    "overlapping binary": (*with_bytes({"x": 12, "s": 12}, bytes(12)), 400),
    "bytes of nobody": (*with_bytes({"x": 12, "s": 4}, bytes(17)), 400),
    "negative bytes": (*with_bytes({"x": 12, "s": -4}, bytes(8)), 400),
    "bytes without end": (*with_bytes({"x": 2**64, "s": 4}, bytes(16)), 400),
    "strings beyond their bytes": (*with_bytes({"x": 12, "s": 8}, bytes(12) + b"\xff\xff\xff\xffabcd"), 400),
}  # fmt: skip


@pytest.mark.parametrize(("body", "lines", "status"), BAD.values(), ids=BAD.keys())
def test_known_attacks_get_the_status_they_deserve(
    victim: Victim, body: bytes, lines: tuple[str, ...], status: int
) -> None:
    before = victim.memory()
    head = "".join(f"{line}\r\n" for line in [*lines, f"Content-Length: {len(body)}", "Connection: close"])
    out = victim.ask(f"POST /v2/models/sum/infer HTTP/1.1\r\n{head}\r\n".encode() + body, 10.0)
    assert blames_the_request(out) == [status], out[:500]
    assert victim.memory() - before < 50e6
    assert victim.well()


def test_binary_that_is_as_it_says_is_answered(victim: Victim) -> None:
    """The bytes of the attacks above, without what is wrong with them."""
    body, lines = with_bytes({"x": 12, "s": 6}, np.ones(3, "<f4").tobytes() + b"\x02\0\0\0ab")
    head = "".join(f"{line}\r\n" for line in [*lines, f"Content-Length: {len(body)}", "Connection: close"])
    out = victim.ask(f"POST /v2/models/sum/infer HTTP/1.1\r\n{head}\r\n".encode() + body, 5.0)
    assert blames_the_request(out) == [200] and b"[3.0]" in out


@pytest.mark.parametrize(
    "path",
    ["/v2/models/../models/sum", "/v2/models/%2e%2e/sum", "/v2/models/sum%2Finfer", "/v2/models/sum%00",
     "/v2//models/sum", "/v2/models/%73um%2f..%2f..", "/v2/models/sum;x=1", "//v2/models/sum",
     "/v2/models/sum/versions/..%2f..",
     "/V2/models/sum", "/v2/models/sum/versions/%0d%0aX:1"],
)  # fmt: skip
def test_paths_mean_one_thing_only(victim: Victim, path: str) -> None:
    out = victim.ask(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode(), 5.0)
    (status,) = blames_the_request(out)
    assert status == 404 and b"\r\nX:1" not in out


@pytest.mark.parametrize("what", ["load", "unload"])
@pytest.mark.parametrize("name", ["%2e%2e", "..%2f..%2fetc", "%2Fetc%2Fpasswd", "sum%00", "a%0ab", "%ff", "nothing"])
def test_no_name_reaches_the_file_system(victim: Victim, name: str, what: str) -> None:
    out = victim.ask(f"POST /v2/repository/models/{name}/{what} HTTP/1.1\r\nConnection: close\r\n\r\n".encode(), 5.0)
    (status,) = blames_the_request(out)
    assert 400 <= status < 500
    assert victim.well()
