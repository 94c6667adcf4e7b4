"""What the other clients see while something goes wrong: a worker killed, a step that fails, clients that misbehave.

``python run.py [--quick] [--only FAULT ...] [--rate N] [--to FILE]``. For each fault a server of two workers is started
with a sound model and one whose first step has a trap that marked requests spring. Two open-loop clients
(``../openloop.py``) send sound requests all the time: one to the sound model, one to the trapped one, so that its good
requests meet the bad ones in batches. Then the fault happens, and goes on for a while. A request whose kept-alive
connection breaks before any byte of an answer is sent once more, as HTTP clients do; how often is told.
"""

import argparse
import http.client
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("", "serve-peers", "serve-peers/peers"))]

import common  # noqa: E402
import model  # noqa: E402
import net  # noqa: E402
import numpy as np  # noqa: E402
import openloop  # noqa: E402
import ours  # noqa: E402
import server as faulty  # noqa: E402
import wires  # noqa: E402
from serving import Call, Machine, Server, ask, free_port, running  # noqa: E402

from trilobe.errors import TrilobeError  # noqa: E402
from trilobe.infrastructure import endpoint  # noqa: E402

WORKERS, LIMIT, MAX_MEMORY = 2, 2.0, 300_000_000
MODELS = ("sound", "trapped")


def call_of(image: Any, name: str) -> Call:
    """A v2 binary call of the model ``name``."""
    call = wires.V2_BINARY.write(image)
    return Call(call.path.replace("/cnn/", f"/{name}/"), call.body, call.headers)


@dataclass
class Scene:
    """Where a fault happens: the server, its folder, until when; what the culprits heard."""

    server: Server
    folder: Path
    image: Any
    end: float
    heard: Counter[str] = field(default_factory=Counter)
    open: list[socket.socket] = field(default_factory=list)

    def going_on(self, pause: float) -> bool:
        """Rest, then whether the fault still goes on."""
        time.sleep(max(0.0, min(pause, self.end - time.monotonic())))
        return time.monotonic() < self.end

    def marked(self, mark: float) -> None:
        """One request that springs the trap; its answer is counted."""
        image = self.image.copy()
        image[0, 0, 0, 0] = mark
        try:
            status, _, body = ask(self.server.port, call_of(image, "trapped"), timeout=15)
            self.heard[f"{status}: {body[:90].decode(errors='replace')}" if status != 200 else "200"] += 1
        except (OSError, http.client.HTTPException) as error:
            self.heard[type(error).__name__] += 1

    def connect(self) -> socket.socket:
        """A connection that stays until the scene is over."""
        sock = socket.create_connection(("127.0.0.1", self.server.port), timeout=10)
        self.open.append(sock)
        return sock

    def close(self) -> None:
        for sock in self.open:
            sock.close()


# --- the faults -----------------------------------------------------------------------------------------------------


def kill_a_worker(scene: Scene) -> None:
    """SIGKILL to one of the workers, every third second."""
    while True:
        workers = [p for p, v in scene.server.tree().items() if v.parent == scene.server.process.pid]
        with suppress(ProcessLookupError, IndexError):
            os.kill(min(workers), signal.SIGKILL)
            scene.heard["workers killed"] += 1
        if not scene.going_on(3.0):
            return


def springing(mark: float, pause: float) -> Callable[[Scene], None]:
    """Marked requests, one every ``pause`` seconds, whether or not the one before was answered."""

    def fault(scene: Scene) -> None:
        threads = []
        while True:
            threads.append(threading.Thread(target=scene.marked, args=(mark,)))
            threads[-1].start()
            if not scene.going_on(pause):
                break
        for thread in threads:
            thread.join()

    return fault


def half_a_body(scene: Scene) -> None:
    """200 clients that announce a body and send half of it."""
    call = call_of(scene.image, "trapped")
    whole = openloop.http_request(call)
    for _ in range(200):
        scene.connect().sendall(whole[: -len(call.body) // 2])
    while scene.going_on(0.5):
        pass
    scene.heard.update(_said(scene.open))


def slow_headers(scene: Scene) -> None:
    """200 clients that send a byte of their headers every half second."""
    whole = openloop.http_request(call_of(scene.image, "trapped"))
    for _ in range(200):
        scene.connect()
    at = 0
    while scene.going_on(0.5):
        for sock in scene.open:
            with suppress(OSError):
                sock.send(whole[at : at + 1])
        at += 1
    scene.heard.update(_said(scene.open))


def leave(scene: Scene) -> None:
    """Clients that send a request and leave at once, 200 a second."""
    whole = openloop.http_request(call_of(scene.image, "trapped"))
    while scene.going_on(0.005):
        with suppress(OSError), socket.create_connection(("127.0.0.1", scene.server.port), timeout=5) as sock:
            sock.sendall(whole)
            scene.heard["left"] += 1


def idle_connections(scene: Scene) -> None:
    """10,000 connections, 2,000 more each second, that ask one thing and then say nothing."""
    ask_once = b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    start = time.monotonic()
    try:
        for k in range(10_000):
            scene.connect().sendall(ask_once)
            if k % 20 == 0:
                time.sleep(max(0.0, start + k / 2000 - time.monotonic()))
    except OSError as error:
        scene.heard[f"{type(error).__name__}: {error}"] += 1
    while scene.going_on(0.5):
        pass
    first = _said(scene.open)
    scene.heard.update(first)
    scene.heard["of which still open"] = sum(count for said, count in _said(scene.open).items() if said != "closed")


def _said(socks: list[socket.socket]) -> Counter[str]:
    """What the server had said to clients that wait: a status line, nothing yet, or that it closed."""
    out: Counter[str] = Counter()
    for sock in socks:
        sock.setblocking(False)
        try:
            data = sock.recv(400)
            out[data.split(b"\r\n")[0].decode() if data else "closed"] += 1
        except BlockingIOError:
            out["nothing said"] += 1
        except OSError:
            out["closed"] += 1
    return out


@dataclass(frozen=True)
class Fault:
    """A fault, and how the trapped model is run under it."""

    happen: Callable[[Scene], None]
    where: str = "auto"
    limit: float = LIMIT
    seconds: float = 10.0


FAULTS = {
    "a worker is killed every 3 s": Fault(kill_a_worker),
    "a step raises, 20 a second": Fault(springing(faulty.RAISES, 0.05)),
    "a step gives the wrong shape, 20 a second": Fault(springing(faulty.MISSHAPES, 0.05)),
    "a step hangs every 5 s (in threads, limit 2 s)": Fault(springing(faulty.HANGS, 5.0), where="threads"),
    "a step hangs once (where it runs by default)": Fault(springing(faulty.HANGS, 60.0), seconds=20.0),
    "a step leaks 8 MB, 10 a second (workers end at 300 MB)": Fault(springing(faulty.LEAKS, 0.1)),
    "200 clients send half a body": Fault(half_a_body, seconds=25.0),
    "200 clients send a byte of a header each 0.5 s": Fault(slow_headers, seconds=15.0),
    "200 clients a second leave before the answer": Fault(leave),
    "10,000 idle connections": Fault(idle_connections, seconds=20.0),
}


# --- what the others see --------------------------------------------------------------------------------------------


def seen(rows: Any, begin: float, end: float) -> dict[str, Any]:
    """Requests, failures and latency before, during and after the fault."""
    out = {}
    for name, low, high in (("before", 0.0, begin), ("during", begin, end), ("after", end, np.inf)):
        part = rows[(rows["due"] >= low) & (rows["due"] < high)]
        good = part[part["said"] == 0]["latency"] * 1000
        out[name] = {
            "requests": len(part),
            **openloop.failures(part),
            "sent_again": int((part["retried"] > 0).sum()),
        } | ({f"p{q:g}_ms": round(float(np.percentile(good, q)), 2) for q in (50, 99, 100)} if len(good) else {})
    return out


def happen(name: str, fault: Fault, rate: float, quick: bool) -> dict[str, Any]:
    """One fault on a fresh server."""
    rest, seconds = (2.0, min(fault.seconds, 4.0)) if quick else (5.0, fault.seconds)
    images = model.images(32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        right = {}
        for seed, which in enumerate(MODELS):
            graph = model.small_cnn(seed)
            ours.make_bundle(folder / "bundles" / which, graph, which)
            (folder / f"{which}.onnx").write_bytes(graph)
            right[which] = net.load(str(folder / f"{which}.onnx"))(images)
        port = free_port()
        command = [sys.executable, str(HERE / "server.py"), str(folder), str(port), str(WORKERS), fault.where,
                   str(fault.limit), str(MAX_MEMORY)]  # fmt: skip

        def answers(at: int) -> bool:
            try:
                return all(ask(at, call_of(images[:1], which))[0] == 200 for which in MODELS)
            except (OSError, http.client.HTTPException):
                return False

        with running("trilobe", command, port, answers) as server:
            time.sleep(1.0)  # both workers
            machine, memory = Machine.now(), [server.pss()]
            clients = {}
            for which in MODELS:
                requests = [openloop.http_request(call_of(images[i : i + 1], which)) for i in range(len(images))]
                load = openloop.Load(port, requests, right[which][None], rate / 2, rest + seconds + rest,
                                     folder / f"{which}.rows", patience=30.0)  # fmt: skip
                clients[which] = openloop.begin(load)
            time.sleep(0.7)  # a process begins
            first = time.monotonic()
            time.sleep(rest)
            begin = time.monotonic()
            scene = Scene(server, folder, images[:1], begin + seconds)
            culprit = threading.Thread(target=fault.happen, args=(scene,))
            culprit.start()
            while time.monotonic() < begin + seconds:
                memory.append(server.pss())
                time.sleep(0.5)
            end = time.monotonic()
            for process in clients.values():
                process.join(rest + 60)
            culprit.join(90)
            scene.close()
            memory.append(server.pss())
            try:
                workers = endpoint.read_state(folder).workers
            except TrilobeError:
                workers = {}
            others = {which: seen(openloop.rows(folder / f"{which}.rows"), begin, end) for which in MODELS}
            found = Machine.now().since(machine, 0.0)
    return {
        "fault": name,
        "others": others,
        "culprits heard": dict(scene.heard.most_common(6)),
        "memory_mb": {"before": round(memory[0], 1), "most": round(max(memory), 1), "after": round(memory[-1], 1)},
        "workers": workers,
        "seconds": round(end - begin, 1),
        "warm_up_s": round(begin - first, 1),
        "machine_busy_cores": round(found["foreign_cores"], 2),
        "psi_cpu_some": found["psi_cpu_some"],
    }


def failed(row: dict[str, Any]) -> int:
    """Requests of the others that failed, whenever."""
    return sum(part["failed"] for one in row["others"].values() for part in one.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: for each fault, what the clients of both models saw."""
    lines = [
        "| fault | the others call | requests | failed | sent again | p50 ms before / during / after | p99 ms "
        "before / during / after | longest ms during |\n" + "|---" * 8 + "|"
    ]
    for row in rows:
        for which, parts in row["others"].items():
            total = {k: sum(p[k] for p in parts.values()) for k in ("requests", "failed", "sent_again")}
            p50, p99 = (" / ".join(f"{p.get(k, nan):.1f}" for p in parts.values()) for k in ("p50_ms", "p99_ms"))
            counts = " | ".join(f"{n:,}" for n in total.values())
            longest = parts["during"].get("p100_ms", nan)
            lines.append(f"| {row['fault']} | {which} model | {counts} | {p50} | {p99} | {longest:.0f} |")
    lines += ["", "| fault | culprits heard | memory MB before / most / after | workers |", "|---|---|---|---|"]
    for row in rows:
        heard = "; ".join(f"{n} x {what}".replace("|", "/") for what, n in row["culprits heard"].items())
        memory = " / ".join(f"{v:.0f}" for v in row["memory_mb"].values())
        lines.append(f"| {row['fault']} | {heard} | {memory} | {row['workers']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: shorter, and the first four faults")
    parser.add_argument("--only", nargs="*", help="faults whose names begin so")
    parser.add_argument("--rate", type=float, default=1000.0, help="sound requests a second, in all")
    parser.add_argument("--to", type=Path, help="write the result to this file instead of result.json")
    chosen = parser.parse_args()
    wanted = [n for n in FAULTS if not chosen.only or any(n.startswith(start) for start in chosen.only)]
    rows = []
    for name in wanted[:4] if chosen.quick and not chosen.only else wanted:
        rows.append(happen(name, FAULTS[name], chosen.rate, chosen.quick))
        print(f"{name}: {failed(rows[-1])} failed", file=sys.stderr)
    print(table(rows))
    total = sum(failed(row) for row in rows)
    result = {
        "claim": "While something goes wrong, the other clients see nothing",
        "faults": rows,
        "rate": chosen.rate,
        "peers": {},
        "ratio": total,
        "ratio_of": "requests of the others that failed, over all faults",
        "target": "0 failed requests of the others",
        "met": total == 0,
        "versions": common.versions("numpy", "onnxruntime", "httptools"),
    }
    common.keep(__file__, result, chosen)


if __name__ == "__main__":
    main()
