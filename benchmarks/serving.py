"""What the benchmarks of servers share: a server as a tree of processes, what it uses, what else happens, load.

A server is started with a token in its environment, by which all its processes are found, also those that left their
parent. Its processor time is the sum over the tree (``utime``, ``stime`` and those of children that ended), its memory
the sum of proportional set sizes (shared pages count once). Load comes from ``wrk``, one thread, closed loop; what the
machine did beside server and client is measured with each sample, and a sample with more than ``QUIET_CORES`` of it is
not quiet. Linux only.
"""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import common  # type: ignore[import-not-found]

TICK = os.sysconf("SC_CLK_TCK")
QUIET_CORES = 0.1
TOKEN = "BENCHMARK_TREE"


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# --- the machine ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the machine had done at a moment: seconds of work of all cores, seconds stolen, microseconds of pressure."""

    at: float
    busy: float
    stolen: float
    pressure: float

    @classmethod
    def now(cls) -> "Machine":
        user, nice, system, _, _, irq, soft, steal = (int(v) for v in Path("/proc/stat").read_text().split()[1:9])
        some = Path("/proc/pressure/cpu")
        pressure = float(some.read_text().split("total=")[1].split()[0]) if some.exists() else 0.0
        return cls(time.perf_counter(), (user + nice + system + irq + soft) / TICK, steal / TICK, pressure / 1e6)

    def since(self, before: "Machine", ours: float) -> dict[str, Any]:
        """Cores others used (``ours``: seconds of server and client), cores stolen, share of time under pressure."""
        span = self.at - before.at
        foreign = max(0.0, (self.busy - before.busy - ours) / span)
        stolen = (self.stolen - before.stolen) / span
        return {
            "foreign_cores": round(foreign, 3),
            "stolen_cores": round(stolen, 3),
            "psi_cpu_some": round((self.pressure - before.pressure) / span, 3),
            "quiet": foreign + stolen <= QUIET_CORES,
        }


def wait_for_quiet(patience: float) -> bool:
    """Wait up to ``patience`` seconds for a second in which the machine does next to nothing; whether there was one."""
    deadline = time.monotonic() + patience
    while True:
        before = Machine.now()
        time.sleep(1.0)
        if Machine.now().since(before, 0.0)["quiet"]:
            return True
        if time.monotonic() >= deadline:
            return False


# --- a server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    parent: int
    born: int
    seconds: float


def _processes() -> dict[int, _Process]:
    """All processes now: parent, when born (ticks), seconds of processor time with those of ended children."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                found[int(entry.name)] = _Process(
                    int(fields[1]), int(fields[19]), sum(int(v) for v in fields[11:15]) / TICK
                )
    return found


def seconds_of(pid: int) -> float:
    """Seconds of processor time of one process so far; 0 where it is gone."""
    found = _processes().get(pid)
    return found.seconds if found else 0.0


@dataclass
class Server:
    """A server under measurement: ``url`` host and port, ``process`` the root of its tree, ``log`` what it said."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    token: str
    log: Path
    started: float = field(default_factory=time.perf_counter)
    startup: float = 0.0
    known: dict[int, int] = field(default_factory=dict)

    def tree(self) -> dict[int, _Process]:
        """All processes of the tree: those with the token, what descends from them, and those that once did (a
        process may write its title over its environment and lose its parent).
        """
        mark, now = f"{TOKEN}={self.token}".encode(), _processes()
        self.known = {pid: born for pid, born in self.known.items() if pid in now and now[pid].born == born}
        for pid, process in now.items():
            with suppress(OSError):
                if pid not in self.known and mark in Path(f"/proc/{pid}/environ").read_bytes():
                    self.known[pid] = process.born
        while more := {p: v.born for p, v in now.items() if v.parent in self.known and p not in self.known}:
            self.known |= more
        return {pid: now[pid] for pid in self.known}

    def cpu(self) -> float:
        """Seconds of processor time of the tree so far (resolution: one tick for each process)."""
        return sum(process.seconds for process in self.tree().values())

    def pss(self) -> float:
        """Megabytes (10^6) of memory of the tree; pages shared with others count in part."""
        total = 0
        for pid in self.tree():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total / 1e6

    def tail(self, lines: int = 15) -> str:
        """The end of what the server said."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, patience: float = 10.0) -> None:
        """Ask the root to end, then end what is left of the tree."""
        self.tree()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        deadline = time.monotonic() + patience
        while (left := self.tree()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    answers: Callable[[int], bool],
    *,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
    patience: float = 10.0,
) -> Iterator[Server]:
    """Start ``command`` and stop it at the end; ready, and its start-up over, when ``answers(port)`` is first true."""
    token = token_hex(8)
    # OMP_NUM_THREADS=1 for all; no statistics sent anywhere.
    env = {**common.QUIET, **(environment or {}), TOKEN: token}
    folder = tempfile.mkdtemp()
    log = Path(folder, "log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, cwd=folder, start_new_session=True
        )
    server = Server(name, port, process, token, log)
    try:
        deadline = server.started + timeout
        while not answers(port):
            if process.poll() is not None or time.perf_counter() > deadline:
                what = "ended" if process.poll() is not None else f"gave no right answer in {timeout:g} s"
                raise RuntimeError(f"{name} {what}:\n{server.tail()}")
            time.sleep(0.01)
        server.startup = time.perf_counter() - server.started
        yield server
    finally:
        server.stop(patience)
        shutil.rmtree(folder, ignore_errors=True)


# --- one request, and many ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One request as it goes over the wire, without a method (POST) or host."""

    path: str
    body: bytes
    headers: Mapping[str, str]


def ask(port: int, call: Call, timeout: float = 30.0) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers (lower case) and body of the answer to one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", call.path, call.body, dict(call.headers))
        answer = connection.getresponse()
        body = answer.read()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, body
    finally:
        connection.close()


_DRIVE = """
local file = io.open(os.getenv("WRK_BODY"), "rb")
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
for name, value in string.gmatch(os.getenv("WRK_HEADERS"), "([^:\\n]+): ([^\\n]*)") do wrk.headers[name] = value end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("\\nRESULT %d %d %d %g %g %g\\n", summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(99), latency.max))
end
"""


def drive(server: Server, call: Call, connections: int, seconds: float = 3.0) -> dict[str, Any]:
    """Load ``server`` with ``wrk``: requests/s, latency in ms, failures, CPU microseconds per request, memory, machine.

    ``wrk`` counts from its own start to its end; the processor's time is taken around it, so a short rest belongs to
    the sample; a server that is idle uses none.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, body = Path(folder, "drive.lua"), Path(folder, "body")
        script.write_text(_DRIVE)
        body.write_bytes(call.body)
        headers = "\n".join(f"{name}: {value}" for name, value in call.headers.items())
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "10s", "-s", str(script)]
        machine, cpu, own = Machine.now(), server.cpu(), time.process_time()
        client = subprocess.Popen(
            [*command, f"http://127.0.0.1:{server.port}{call.path}"],
            env=os.environ | {"WRK_BODY": str(body), "WRK_HEADERS": headers},
            stdout=subprocess.PIPE,
            text=True,
        )
        said = client.stdout.read() if client.stdout else ""
        _, _, usage = os.wait4(client.pid, 0)
        client.returncode = 0
        spent = server.cpu() - cpu
        theirs = usage.ru_utime + usage.ru_stime + time.process_time() - own
        around = Machine.now().since(machine, spent + theirs)
    requests, micros, failed, p50, p99, longest = (float(v) for v in said.split("RESULT")[1].split())
    return {
        "c": connections,
        "requests_s": round(requests / micros * 1e6, 1),
        "p50_ms": round(p50 / 1000, 3),
        "p99_ms": round(p99 / 1000, 3),
        "max_ms": round(longest / 1000, 3),
        "failed": int(failed),
        "cpu_us": round(spent / max(requests, 1) * 1e6, 1),
        "cores": round(spent / (micros / 1e6), 2),
        "client_cores": round(theirs / (micros / 1e6), 2),
        "pss_mb": round(server.pss(), 1),
        **around,
    }
