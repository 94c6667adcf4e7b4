"""One small network behind our server and behind six others: requests/s, latency, processor time, memory, start-up.

``PEERS=FOLDER python run.py [--quick] [--rounds N] [--only NAME ...] [--wait SECONDS] [--to FILE]``. FOLDER holds one
virtual environment for each peer (see README.md); a peer without one is skipped. In each round every server is
started in turn, in another order, asked about images whose answers are known, and loaded by ``wrk`` with 1, 8 and 64
connections. Samples are kept in ``samples.local`` beside this file as they come, so that an interrupted run goes on;
``--fresh`` begins again. ``python run.py --table`` prints the table of result.json.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "peers"), str(HERE.parent)]

import common  # noqa: E402
import model  # noqa: E402
import net  # noqa: E402
import numpy as np  # noqa: E402
import ours  # noqa: E402
import wires  # noqa: E402
from serving import Server, ask, drive, free_port, running, wait_for_quiet  # noqa: E402

CONNECTIONS, SECONDS, RETRIES = (1, 8, 64), 3.0, 2


@dataclass(frozen=True)
class Contender:
    """One server with one setting: ``venv`` in PEERS ("" is this interpreter), ``words`` after the interpreter, where
    MODEL, BUNDLE and PORT stand for what they are in this run.
    """

    name: str
    venv: str
    package: str
    wire: wires.Wire
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def peer(name: str, venv: str, package: str, wire: wires.Wire, *words: str, **environment: str) -> Contender:
    """A peer whose script is ``peers/VENV_cnn.py``."""
    command = words if words[0] == "-m" else (str(HERE / "peers" / f"{venv}_cnn.py"), "MODEL", "PORT", *words)
    return Contender(name, venv, package, wire, command, tuple(environment.items()))


OURS, ECHO = "trilobe", "echo on our front"
BENTO = ("-m", "bentoml", "serve", "bentoml_cnn:Cnn", "--working-dir", str(HERE / "peers"), "--host", "127.0.0.1",
         "--port", "PORT", "--api-workers", "1")  # fmt: skip
RAY = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
CONTENDERS = (
    Contender(ECHO, "", "trilobe", wires.ECHO, (str(HERE / "echo.py"), "PORT")),
    Contender(OURS, "", "trilobe", wires.V2_BINARY, (str(HERE / "ours.py"), "BUNDLE", "PORT", "1")),
    Contender("trilobe, 2 workers", "", "trilobe", wires.V2_BINARY, (str(HERE / "ours.py"), "BUNDLE", "PORT", "2")),
    Contender("trilobe, JSON", "", "trilobe", wires.V2_JSON, (str(HERE / "ours.py"), "BUNDLE", "PORT", "1")),
    peer("Triton, Python backend", "pytriton", "nvidia-pytriton", wires.V2_BINARY, "64"),
    peer("Triton, Python backend, no batches", "pytriton", "nvidia-pytriton", wires.V2_BINARY, "0"),
    peer("MLServer", "mlserver", "mlserver", wires.V2_BASE64, "64"),
    peer("MLServer, no batches", "mlserver", "mlserver", wires.V2_BASE64, "0"),
    peer("MLServer, no batches, JSON", "mlserver", "mlserver", wires.V2_JSON, "0"),
    peer("MLServer, its defaults, JSON", "mlserver", "mlserver", wires.V2_JSON, "0", "defaults"),
    peer("KServe SDK", "kserve", "kserve", wires.V2_BINARY_ID, "0"),
    peer("LitServe", "litserve", "litserve", wires.LIT_BASE64, "64"),
    peer("LitServe, fast queue", "litserve", "litserve", wires.LIT_BASE64, "64", "fast"),
    peer("LitServe, no batches", "litserve", "litserve", wires.LIT_BASE64, "0"),
    peer("BentoML", "bentoml", "bentoml", wires.BENTO_BASE64, *BENTO, PEER_BATCH="64"),
    peer("BentoML, no batches", "bentoml", "bentoml", wires.BENTO_BASE64, *BENTO, PEER_BATCH="0"),
    peer("Ray Serve", "ray", "ray", wires.RAW, "64", **RAY),
    peer("Ray Serve, no batches", "ray", "ray", wires.RAW, "0", **RAY),
)


def interpreter(contender: Contender) -> tuple[str, str]:
    """The interpreter that runs it and its version there, or "" and why it is skipped."""
    folder = os.environ.get("PEERS", "")
    if contender.venv and not folder:
        return "", "PEERS is not set"
    python = str(Path(folder, contender.venv, "bin", "python")) if contender.venv else sys.executable
    if not Path(python).exists():
        return "", f"no {python}"
    ask_version = f"from importlib.metadata import version; print(version({contender.package!r}))"
    known = subprocess.run([python, "-c", ask_version], capture_output=True, text=True, env=common.QUIET)
    return (python, known.stdout.strip()) if known.returncode == 0 else ("", f"{contender.package} is not installed")


# --- right answers --------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """Images, and what the network says of each in this process."""

    images: Any
    proba: Any

    def wrong(self, contender: Contender, port: int, indices: Sequence[int]) -> str:
        """What is wrong with the answers about some images, "" where nothing is."""
        for i in indices:
            status, headers, body = ask(port, contender.wire.write(self.images[i : i + 1]))
            if status != 200:
                return f"status {status}: {body[:300]!r}"
            said = contender.wire.read(headers, body)
            expected = self.images[i].ravel() if contender.wire is wires.ECHO else self.proba[i]
            if not np.allclose(said, expected, atol=1e-5):
                return f"image {i}: {said} is not {expected}"
        return ""

    def answers(self, contender: Contender) -> Any:
        """Whether a port gives a right answer yet."""

        def check(port: int) -> bool:
            try:
                return not self.wrong(contender, port, [0])
            except (OSError, ValueError, KeyError, IndexError, TypeError, ConnectionError):
                return False

        return check

    def check(self, contender: Contender, port: int) -> None:
        """Eight clients at once, so that images meet in batches; raises where any gets another's answer."""
        found: list[str] = []

        def client(k: int) -> None:
            found.append(self.wrong(contender, port, range(k, len(self.images), 8)))

        threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if len(found) != 8 or any(found):
            raise RuntimeError(f"{contender.name} answers wrongly: {next((f for f in found if f), 'a client failed')}")


def model_alone(run: Any, seconds: float) -> dict[str, float]:
    """Processor time of the network in this process, microseconds per image, by images at once (lower = better)."""
    out = {}
    for n in (1, 8, 32, 64):
        images, times = model.images(n), []
        over = time.perf_counter() + seconds / 4
        while time.perf_counter() < over or len(times) < 5:
            start = time.thread_time()
            for _ in range(10):
                run(images)
            times.append((time.thread_time() - start) / 10 / n)
        out[str(n)] = round(1e6 * statistics.median(times), 1)
    return out


# --- samples --------------------------------------------------------------------------------------------------------


def visit(contender: Contender, python: str, path: str, truth: Truth, wait: float, seconds: float) -> dict[str, Any]:
    """Start one server, check it, load it, stop it."""
    port = free_port()
    words = {"MODEL": path, "BUNDLE": f"{path}.bundle", "PORT": str(port)}
    command = [python, *(words.get(w, w) for w in contender.words)]
    environment = {"PEER_MODEL": path, **dict(contender.environment)}
    with running(contender.name, command, port, truth.answers(contender), environment=environment) as server:
        idle = round(server.pss(), 1)
        truth.check(contender, port)
        call = contender.wire.write(truth.images[:1])
        drive(server, call, 8, 1.0)
        samples = [s for c in CONNECTIONS for s in several(server, call, c, wait, seconds)]
    return {"startup_s": round(server.startup, 2), "idle_mb": idle, "samples": samples}


def several(server: Server, call: Any, connections: int, wait: float, seconds: float) -> list[dict[str, Any]]:
    """One sample; where the machine was not quiet meanwhile, up to RETRIES more after waiting for it. All are kept."""
    samples = [drive(server, call, connections, seconds)]
    while wait and not samples[-1]["quiet"] and len(samples) <= RETRIES and wait_for_quiet(wait):
        samples.append(drive(server, call, connections, seconds))
    return samples


def summary(visits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the quiet samples, or over all where a number of connections has none; how many of each."""
    out: dict[str, Any] = {"startup_s": statistics.median(v["startup_s"] for v in visits), "by_connections": {}}
    out["idle_mb"] = statistics.median(v["idle_mb"] for v in visits)
    for c in CONNECTIONS:
        of_c = [s for v in visits for s in v["samples"] if s["c"] == c]
        quiet = [s for s in of_c if s["quiet"]]
        used = quiet or of_c
        row: dict[str, Any] = {"quiet": len(quiet), "of": len(of_c)}
        for key in ("requests_s", "p50_ms", "p99_ms", "cpu_us", "cores", "client_cores", "pss_mb", "foreign_cores"):
            values = sorted(s[key] for s in used)
            row[key] = round(statistics.median(values), 3)
            if key in ("requests_s", "cpu_us"):
                row[f"{key}_range"] = [values[0], values[-1]]
        row["failed"] = sum(s["failed"] for s in of_c)
        out["by_connections"][str(c)] = row
    return out


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """All rounds; what is in ``samples.local`` already is not measured again."""
    names = chosen.only or [c.name for c in CONTENDERS]
    wanted = [c for c in CONTENDERS if c.name in names and not (chosen.quick and c.name not in (OURS, ECHO))]
    found = {c.name: interpreter(c) for c in wanted}
    skipped = {c.name: found[c.name][1] for c in wanted if not found[c.name][0]}
    kept = HERE / ("quick.local" if chosen.quick else "samples.local")
    if chosen.fresh or chosen.quick:
        kept.unlink(missing_ok=True)
    visits = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model.small_cnn())
        ours.make_bundle(Path(f"{path}.bundle"), model.small_cnn())
        run = net.load(str(path))
        images = model.images(32)
        truth = Truth(images, run(images))
        alone = model_alone(run, 2.0 if chosen.quick else 8.0)
        for turn in range(chosen.rounds):
            order = [c for c in wanted if c.name not in skipped]
            random.Random(turn).shuffle(order)
            for contender in order:
                if any(v["name"] == contender.name and v["round"] == turn for v in visits):
                    continue
                one = visit(contender, found[contender.name][0], str(path), truth, chosen.wait, chosen.seconds)
                visits.append({"name": contender.name, "round": turn, **one})
                with kept.open("a") as out:
                    out.write(json.dumps(visits[-1]) + "\n")
                last = one["samples"][-1]
                said = f"{last['requests_s']:.0f}/s, {last['cpu_us']:.0f} us, {last['pss_mb']:.0f} MB"
                print(f"{turn} {contender.name}: {said}, quiet {last['quiet']}", file=sys.stderr)
    by_name = {c.name: [v for v in visits if v["name"] == c.name] for c in wanted}
    servers = {name: summary(v) for name, v in by_name.items() if v}
    for c in wanted:
        if c.name in servers:
            servers[c.name] |= {"wire": c.wire.name, "version": found[c.name][1], "package": c.package}
    return {"servers": servers, "skipped": skipped, "model_us": alone, "rounds": chosen.rounds, "visits": visits}


# --- what it says ---------------------------------------------------------------------------------------------------


def cpu(servers: dict[str, Any], start: str) -> float | None:
    """The least processor time per request at 64 connections among the settings of one server; None where none ran."""
    of = [s["by_connections"]["64"]["cpu_us"] for name, s in servers.items() if name.startswith(start)]
    return min(of, default=None)


def verdicts(found: dict[str, Any]) -> dict[str, Any]:
    """Each target: what was asked, what was measured, whether it is met. Peers count with their best setting."""
    servers, alone = found["servers"], found["model_us"]["1"]
    if OURS not in servers:
        return {}
    ours = servers[OURS]
    at = ours["by_connections"]
    spent, echo = at["64"]["cpu_us"], cpu(servers, ECHO)
    best = max(s["by_connections"]["64"]["requests_s"] for name, s in servers.items() if s["package"] == "trilobe"
               and name != ECHO)  # fmt: skip
    rows: dict[str, tuple[float, str, bool]] = {}
    if echo is not None:
        allowed = 1.6 * echo + alone
        rows["CPU per request at 64 connections (us)"] = (
            spent,
            f"<= {allowed:.0f} (1.6 x echo + model)",
            spent <= allowed,
        )
    for name, least in (("MLServer", 15), ("MLServer, its defaults", 15), ("Triton", 5)):
        if theirs := cpu(servers, name):
            rows[f"times less CPU than {name}"] = round(theirs / spent, 1), f">= {least}", theirs >= least * spent
    rows["requests/s at 64 connections"] = best, ">= 8000", best >= 8000
    rows["p50 at one connection (ms)"] = at["1"]["p50_ms"], "<= 0.4", at["1"]["p50_ms"] <= 0.4
    rows["memory (MB)"] = at["64"]["pss_mb"], "<= 120", at["64"]["pss_mb"] <= 120
    rows["start-up (s)"] = ours["startup_s"], "<= 1.5", ours["startup_s"] <= 1.5
    return {key: {"figure": f, "target": t, "met": bool(m)} for key, (f, t, m) in rows.items()}


def table(result: dict[str, Any]) -> str:
    """result.json as the tables of README.md."""
    head = ("| server | version | wire | requests/s c=1 / 8 / 64 | p50 ms | p99 ms | CPU us/request | MB | start-up s "
            "| failed | quiet samples |\n" + "|---" * 11 + "|")  # fmt: skip
    rows = [head]
    for name, s in sorted(result["servers"].items(), key=lambda kv: kv[1]["by_connections"]["64"]["cpu_us"]):
        at = [s["by_connections"][str(c)] for c in CONNECTIONS]
        cells = [
            name,
            s["version"],
            s["wire"],
            " / ".join(f"{a['requests_s']:,.0f}" for a in at),
            " / ".join(f"{a['p50_ms']:.2f}" for a in at),
            " / ".join(f"{a['p99_ms']:.1f}" for a in at),
            " / ".join(f"{a['cpu_us']:,.0f}" for a in at),
            f"{at[-1]['pss_mb']:.0f}",
            f"{s['startup_s']:.2f}",
            str(sum(a["failed"] for a in at)),
            f"{sum(a['quiet'] for a in at)} of {sum(a['of'] for a in at)}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    rows += [f"\nSkipped: {name} ({why})." for name, why in result["skipped"].items()]
    alone = ", ".join(f"{us:g} ({n} at once)" for n, us in result["model_us"].items())
    rows += ["", f"The network alone, in process, CPU microseconds per image: {alone}.", ""]
    rows += ["| target | asked | measured | met |", "|---|---|---|---|"]
    rows += [
        f"| {key} | {v['target']} | {v['figure']:,g} | {'yes' if v['met'] else '**no**'} |"
        for key, v in result["verdicts"].items()
    ]
    return "\n".join(rows)


def write_readme(text: str) -> None:
    """Put the table between the marks of README.md."""
    readme = HERE / "README.md"
    before, rest = readme.read_text("utf-8").split("<!-- table -->\n")
    after = rest.split("<!-- end -->")[1]
    readme.write_text(f"{before}<!-- table -->\n{text}\n<!-- end -->{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ours and the echo, one round, under a minute")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of a sample")
    parser.add_argument("--only", nargs="*", help="names of servers as the table has them")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine, once per retry")
    parser.add_argument("--fresh", action="store_true", help="forget the samples kept so far")
    parser.add_argument(
        "--table", action="store_true", help="print the table of result.json and write it into README.md"
    )
    parser.add_argument("--to", type=Path, help="write the result to this file instead of result.json")
    chosen = parser.parse_args()
    if chosen.table:
        text = table(json.loads((chosen.to or HERE / "result.json").read_text("utf-8")))
        print(text)
        write_readme(text)
        return
    if shutil.which("wrk") is None:
        print("not run: wrk is not installed (Debian: apt-get install wrk)")
        return
    chosen.rounds = 1 if chosen.quick else chosen.rounds
    found = measure(chosen)
    said = verdicts(found)
    ratio = said.get("times less CPU than MLServer", {}).get("figure")
    result = {
        "claim": "A request costs little more than a bare echo and the model itself",
        **found,
        "verdicts": said,
        "peers": {s["package"]: s["version"] for s in found["servers"].values() if s["package"] != "trilobe"},
        "ratio": ratio,
        "ratio_of": "CPU time per request at 64 connections, MLServer's best setting over ours",
        "target": "; ".join(f"{k} {v['target']}" for k, v in said.items()),
        "met": bool(said) and all(v["met"] for v in said.values()),
        "versions": common.versions("numpy", "onnxruntime", "httptools"),
    }
    print(table(result))
    common.keep(__file__, result, chosen)
    if not chosen.quick and not chosen.to:
        write_readme(table(result))


if __name__ == "__main__":
    main()
