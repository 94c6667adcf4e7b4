"""Coverage-guided fuzzing of what an endpoint reads from strangers: the HTTP front and the protocol, in process.

``python run.py [--quick] [--seconds N] [--corpus FOLDER] [--to FILE]`` with an interpreter that has ``atheris`` (this
one, or ``--peer-python``). Three targets, N seconds each. Besides crashes, hangs and memory, each execution is held
against a second opinion: requests that the front lets through against h11 (another HTTP parser: two readings of the
same bytes are how requests are smuggled), tensors against ``json`` and numpy.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402

ROOMS = [
    "trilobe.infrastructure.pipeline",
    *(f"trilobe.infrastructure.serve.{n}" for n in ("http", "protocol", "access")),
]
BODY = json.dumps(
    {"id": "1", "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]},
                           {"name": "s", "shape": [1], "datatype": "BYTES", "data": ["ab"]}],
     "outputs": [{"name": "y", "parameters": {"binary_data": True, "classification": 2}}]}
).encode()  # fmt: skip
BINARY = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}},
                {"name": "s", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}}]}
).encode()  # fmt: skip
CHUNKED = b"POST /v2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
SEEDS = {
    "http": [
        b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.0\r\n\r\n",
        CHUNKED + b"3\r\nabc\r\n5;e=1\r\nhello\r\n0\r\nT: 1\r\n\r\nGET /b HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nHEAD /b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\na",
    ],
    "call": [b"\0" + BODY, b"\1" + len(BINARY).to_bytes(2, "little") + BINARY + bytes(12) + b"\2\0\0\0ab",
             b"\2" + b'{"inputs":[{"name":"x","shape":[2,2],"datatype":"INT8","data":[[1,2],[3,4]]}]}'],
    "packed": [b"\0" + zlib.compress(BODY), b"\1Bearer tlb_01234567_" + b"0" * 64, b"\1Basic YTpi"],
}  # fmt: skip
WORDS = r"""
HTTP/1.1 HTTP/1.0 \x0d\x0a \x0d\x0a\x0d\x0a 0\x0d\x0a\x0d\x0a POST\x20 GET\x20 CONNECT\x20 Host:\x20a chunked
Content-Length:\x20 Transfer-Encoding:\x20chunked Connection:\x20close Connection:\x20Upgrade Upgrade:\x20h2c
Expect:\x20100-continue keep-alive \"inputs\": \"shape\":[ \"datatype\":\" \"parameters\":{ \"data\":[
\"binary_data_size\": FP32 BYTES INT8 BOOL FP16 NaN 1e999 -1 9223372036854775808 \\ud800 [[ ]] {} null true
Bearer\x20tlb_ Basic\x20"""


# --- in the process that has atheris --------------------------------------------------------------------------------


def child(target: str, seconds: str, folder: str) -> None:
    """Fuzz one target; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=ROOMS):
        import trilobe.infrastructure.serve.access
        import trilobe.infrastructure.serve.http
        import trilobe.infrastructure.serve.protocol  # noqa: F401
    test = {"http": http_target, "call": call_target, "packed": packed_target}[target]()
    limits = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=5", "-rss_limit_mb=1500"]
    files = [f"-dict={folder}/words.dict", f"-artifact_prefix={folder}/{target}-"]
    atheris.Setup([sys.argv[0], *limits, *files, "-print_final_stats=1", f"{folder}/{target}"], test)
    atheris.Fuzz()


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.out, self.closed, self.reading = bytearray(), False, True

    def write(self, data: bytes) -> None:
        """Written after the end is lost, as on a socket."""
        if not self.closed:
            self.out += data

    def close(self) -> None:
        """No more of either direction."""
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        """What is read from now on waits."""
        self.reading = False

    def resume_reading(self) -> None:
        """Go on."""
        self.reading = True

    def get_extra_info(self, name: str) -> None:
        """No certificate."""

    def get_write_buffer_size(self) -> int:
        """All is gone at once."""
        return 0

    def can_write_eof(self) -> bool:
        """As a plain socket."""
        return True

    def write_eof(self) -> None:
        """As a plain socket."""


class Loop:
    """Of an event loop what a connection needs: things to be done a little later."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []

    def call_soon(self, do: Callable[[], None]) -> None:
        """Remember it."""
        self.later.append(do)

    def turn(self) -> None:
        """Do what has been put off, and what that puts off."""
        while self.later:
            self.later.pop(0)()


def http_target() -> Callable[[bytes], None]:
    """Bytes as they come from a socket, cut in two; replies at once or a turn later."""
    from typing import cast

    from trilobe.infrastructure.serve.http import HttpServer, Limits, Request, _Connection, json_reply

    limits = Limits(max_body=2000, max_head=1000, max_ahead=4)

    def test(data: bytes) -> None:
        loop, wire, seen = Loop(), Wire(), []

        def handle(request: Request) -> Any:
            seen.append(request)
            return json_reply(200, {"path": request.path, "parts": request.parts, "n": len(request.body)})

        server = HttpServer(handle, limits)
        connection = _Connection(server, cast("Any", loop))
        connection.connection_made(cast("Any", wire))
        cut = data[0] if data else 0
        for piece in (data[1 : 1 + cut], data[1 + cut :]):
            if piece and not wire.closed:
                connection.data_received(piece)
                loop.turn()
        connection.connection_lost(None)
        if server.held or server.connections:
            raise AssertionError(f"left behind: {server.held} bytes, {len(server.connections)} connections")
        said = statuses(bytes(wire.out), [request.method for request in seen])
        if len(said) not in (len(seen), len(seen) + 1):
            raise AssertionError(f"{len(seen)} requests, {said}")
        if any(status >= 500 and status not in (501, 503) for status in said):
            raise AssertionError(f"a failure of ours: {bytes(wire.out)!r}")
        for ours, theirs in zip(seen, second_opinion(data[1:]), strict=False):
            if "upgrade" not in data.lower().decode("latin-1") and (ours.method, ours.body) != theirs:
                raise AssertionError(f"we read {ours.method} {ours.body!r}, h11 reads {theirs}")

    return test


def statuses(out: bytes, methods: list[str]) -> list[int]:
    """The statuses of the responses in ``out``, taken apart as a client would who sent requests of these methods."""
    found: list[int] = []
    while out:
        head, end, out = out.partition(b"\r\n\r\n")
        if not (line := re.fullmatch(rb"HTTP/1\.1 (\d{3}) [^\r\n]*((?:\r\n[a-z-]+: [^\r\n]*)*)", head)) or not end:
            raise AssertionError(f"no response: {head!r}")
        if line[1] == b"100":
            continue
        size = int(re.findall(rb"\r\ncontent-length: (\d+)(?=\r\n|\Z)", line[2])[0])
        if len(found) < len(methods) and methods[len(found)] == "HEAD":
            size = 0
        found.append(int(line[1]))
        if len(out) < size:
            raise AssertionError(f"{len(out)} bytes of {size}")
        out = out[size:]
    return found


def second_opinion(data: bytes) -> list[tuple[str, bytes]]:
    """Method and body of each request that h11 finds in ``data``, as far as it accepts them."""
    import h11

    found: list[tuple[str, bytes]] = []
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    method, body = "", b""
    try:
        connection.receive_data(data)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                method, body = event.method.decode(), b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                found.append((method, body))
                connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is not h11.DONE:
                    return found
                connection.start_next_cycle()
            else:
                return found
    except (h11.RemoteProtocolError, h11.LocalProtocolError):
        return found


def call_target() -> Callable[[bytes], None]:
    """A body for one of several models, with or without binary tensors after its JSON."""
    import numpy as np

    from trilobe.errors import DataError
    from trilobe.infrastructure.pipeline import DATATYPES, TensorSpec
    from trilobe.infrastructure.serve.protocol import HEADER_LENGTH, Reader, Writer

    y = TensorSpec("y", "FP32", (-1, 4))
    both = [TensorSpec("x", "FP32", (-1, 3)), TensorSpec("s", "BYTES", (-1,))]
    models = [both, both, *([TensorSpec("x", kind, (-1, -1))] for kind in DATATYPES), [TensorSpec("x", "FP32", ())]]
    readers = [(inputs, Reader(inputs, [y])) for inputs in models]
    writer = Writer([y], "m", "v1")
    proba = np.zeros((1, 4), np.float32)

    def test(data: bytes) -> None:
        if len(data) < 3:
            return
        binary = data[0] % 2
        inputs, reader = readers[data[0] // 2 % len(readers)] if data[0] > 1 else readers[0]
        body = data[3:] if binary else data[1:]
        headers = {HEADER_LENGTH: str(int.from_bytes(data[1:3], "little"))} if binary else {}
        try:
            call = reader.parse(body, headers)
        except DataError as error:
            str(error)
            return
        for spec in inputs:
            spec.check(call.inputs[spec.name])
        against_json(body[: int(headers[HEADER_LENGTH])] if binary else body, call, np)
        try:
            writer.encode(call, {"y": proba})
        except DataError:
            return

    return test


def against_json(head: bytes, call: Any, np: Any) -> None:
    """Tensors that came as JSON are what ``json`` and numpy make of them."""
    if not head:
        return
    for tensor in json.loads(head.decode("utf-8", "replace"))["inputs"]:
        array, data = call.inputs[tensor["name"]], tensor.get("data")
        if data is None:
            continue
        flat: list[Any] = data
        while flat and isinstance(flat[0], list):
            flat = [value for row in flat for value in row]
        with np.errstate(over="ignore"):
            expected = np.array([v.encode() for v in flat] if array.dtype.kind == "O" else flat, dtype=array.dtype)
        if not np.array_equal(expected, array.ravel()):
            raise AssertionError(f"{tensor['name']}: {array.ravel()} for {flat}")


def packed_target() -> Callable[[bytes], None]:
    """Compressed bodies, what clients accept, and what they show at the gate."""
    from trilobe.errors import DataError
    from trilobe.infrastructure.pipeline import takes_from_files
    from trilobe.infrastructure.serve.access import Gate, create_token
    from trilobe.infrastructure.serve.protocol import compress, decompress

    folder = Path(tempfile.mkdtemp())
    token = create_token(folder, "fuzz")
    gate = Gate(folder)

    def test(data: bytes) -> None:
        kind, rest = data[:1], data[1:]
        text = rest.decode("latin-1")
        if kind in b"\1\2":
            if gate.client({"authorization": text}).may("infer") and token not in text:
                raise AssertionError(f"let in: {text!r}")
            compress(b"abc" * 1000, text)
            return
        try:
            if kind == b"\3":
                takes_from_files(rest)
            elif len(decompress(rest, ("deflate", "gzip")[data[0] % 2] if data else "", 10_000)) > 10_000:
                raise AssertionError("more than its limit")
        except DataError as error:
            str(error)

    return test


# --- in the process that asks ---------------------------------------------------------------------------------------


def fuzz(python: str, target: str, seconds: int, folder: Path) -> dict[str, Any]:
    """Run one target for a time; what libFuzzer says of it."""
    corpus = folder / target
    corpus.mkdir(parents=True, exist_ok=True)
    known = len(list(corpus.iterdir()))
    for i, seed in enumerate(SEEDS[target]):
        (corpus / f"seed-{i}").write_bytes((b"\x20" if target == "http" else b"") + seed)
    (folder / "words.dict").write_text("".join(f'"{word}"\n' for word in WORDS.split()))
    command = [python, "-W", "ignore", str(HERE / "run.py"), "--child", target, str(seconds), str(folder)]
    done = subprocess.run(command, capture_output=True, env=common.QUIET, check=False)
    said = (done.stderr + done.stdout).decode("utf-8", "replace")
    covered = [int(n) for n in re.findall(r"cov: (\d+)", said)]
    stats = {name: int(n) for name, n in re.findall(r"stat::(\w+):\s+(\d+)", said)}
    crashes = sorted(path.name for kind in ("crash", "timeout", "oom") for path in folder.glob(f"{target}-{kind}-*"))
    if done.returncode != 0 or crashes or not stats:
        print(said[-6000:], file=sys.stderr)
    return {
        "seconds": seconds,
        "executions": stats.get("number_of_executed_units", 0),
        "per_second": stats.get("average_exec_per_sec", 0),
        "coverage": {"first": covered[0] if covered else 0, "last": covered[-1] if covered else 0},
        "corpus": {"before": known, "after": len(list(corpus.iterdir()))},
        "peak_rss_mb": stats.get("peak_rss_mb", 0),
        "crashes": len(crashes) if crashes else int(done.returncode != 0),
    }


def option(name: str, default: str) -> str:
    """A flag of this script alone, taken out of the command line."""
    if name not in sys.argv:
        return default
    at = sys.argv.index(name)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


def main() -> None:
    """Fuzz each target, print the table, keep the result."""
    seconds, corpus = int(option("--seconds", "0")), option("--corpus", "")
    chosen = common.arguments(__doc__)
    if chosen.child:
        child(*chosen.child)
        return
    python, version = common.find_peer("atheris", chosen.peer_python)
    if not python:
        print("not run: no interpreter here has atheris (pip install atheris, or --peer-python PYTHON)")
        return
    seconds = seconds or (10 if chosen.quick else 300)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(corpus or made).resolve()
        found = {target: fuzz(python, target, seconds, folder) for target in SEEDS}
    print(f"{'target':<8} {'executions':>12} {'a second':>9} {'coverage':>14} {'peak MB':>8} {'crashes':>8}")
    for target, f in found.items():
        grown = f"{f['coverage']['first']} to {f['coverage']['last']}"
        figures = f"{f['per_second']:>9,} {grown:>14} {f['peak_rss_mb']:>8} {f['crashes']:>8}"
        print(f"{target:<8} {f['executions']:>12,} {figures}")
    crashes = sum(f["crashes"] for f in found.values())
    result = {
        "claim": "Nothing that a stranger sends crashes what reads it, hangs it, or is read in two ways",
        "command": f"python benchmarks/serve-fuzz/run.py --seconds {seconds}",
        "targets": found,
        "crashes": crashes,
        "ratio": None,
        "met": crashes == 0 and all(f["executions"] for f in found.values()),
        "peers": {"h11": "a second reading of the same requests", "json and numpy": "a second reading of tensors"},
        "versions": common.versions("httptools", "msgspec", "h11", "numpy") | {"atheris": version},
        "load_average": [round(n, 2) for n in os.getloadavg()],
    }
    common.keep(__file__, result, chosen)


if __name__ == "__main__":
    main()
