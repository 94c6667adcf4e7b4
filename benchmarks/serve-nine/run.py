"""Nine small models over one photo: one call with the compressed photo, beside a client that prepares it and calls all.

``PEERS=FOLDER python run.py [--quick] [--rounds N] [--workers N] [--to FILE]``. A photo is a JPEG of 640x480. "Nine
calls" decodes, resizes and normalizes it in the client and calls nine endpoints with binary tensors over kept-alive
connections (our own client, which is leaner than most), one after the other; "nine threads" does so at once; "one call"
sends the photo to a pipeline, where the same function prepares it once for the same nine models. All run against our
server; the first two also against Triton's Python backend where PEERS has it; all on the machine itself and, with one
client, over a simulated network. Clients are processes of their own, on the same cores as the server: frames/s at
saturation is what the whole machine does, clients included. Every answer is checked.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("", "serve-peers", "serve-peers/peers"))]

import common  # noqa: E402
import numpy as np  # noqa: E402
from photo import MODELS, photos, prepare  # noqa: E402
from serving import Machine, Server, free_port, running  # noqa: E402

from trilobe.errors import TrilobeError  # noqa: E402
from trilobe.infrastructure.client import Client  # noqa: E402

NAMES = [f"m{i}" for i in range(MODELS)]
CLIENTS, FRAMES, WIDTHS = (1, 4), 8, (8, 16, 32)
OUR_SERVER, TRITON = "trilobe", "Triton, Python backend"
NETWORK = (0.5, 1000.0)  # milliseconds one way, megabits per second
LINK = "1 ms, 1 Gbit/s"


# --- the ways to ask ------------------------------------------------------------------------------------------------


def sequentially(url: str) -> Callable[[bytes], Any]:
    """Prepare here, call nine endpoints one after the other: (9, 10)."""
    clients = [Client(url, name) for name in NAMES]

    def ask(photo: bytes) -> Any:
        image = prepare(photo)
        return np.concatenate([client.call({"image": image}, ["proba"])["proba"] for client in clients])

    return ask


def nine_threads(url: str) -> Callable[[bytes], Any]:
    """Prepare here, call nine endpoints at once: (9, 10)."""
    clients, pool = [Client(url, name) for name in NAMES], ThreadPoolExecutor(MODELS)

    def ask(photo: bytes) -> Any:
        image = prepare(photo)
        answers = pool.map(lambda client: client.call({"image": image}, ["proba"])["proba"], clients)
        return np.concatenate(list(answers))

    return ask


def one_call(url: str) -> Callable[[bytes], Any]:
    """Send the photo as it is: (9, 10)."""
    client, outputs = Client(url, "nine"), [name.replace("m", "p") for name in NAMES]

    def ask(photo: bytes) -> Any:
        answer = client.call({"photo": np.array([photo], dtype=object)}, outputs)
        return np.concatenate([answer[name] for name in outputs])

    return ask


WAYS = {"nine calls": sequentially, "nine threads": nine_threads, "one call": one_call}


def child(way: str, url: str, seconds: float, folder: Path) -> dict[str, Any]:
    """One client process: frames answered, their latency, processor time."""
    files = [(folder / f"{i}.jpg").read_bytes() for i in range(FRAMES)]
    right = np.load(folder / "right.npy")
    ask = WAYS[way](url)
    for i in range(FRAMES):
        if not np.allclose(ask(files[i]), right[i], atol=1e-4):
            raise SystemExit(f"{way}: wrong answer for photo {i}")
    times, wrong, k = [], 0, 0
    cpu, start = time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begun = time.perf_counter()
        answer = ask(files[k % FRAMES])
        times.append(time.perf_counter() - begun)
        wrong += not np.allclose(answer, right[k % FRAMES], atol=1e-4)
        k += 1
    wall = time.perf_counter() - start
    return {"times": times, "wrong": wrong, "cpu": time.process_time() - cpu, "wall": wall}


# --- measuring ------------------------------------------------------------------------------------------------------


def sample(server: Server, port: int, way: str, clients: int, seconds: float, folder: Path) -> dict[str, Any]:
    """``clients`` processes at once: frames/s in all, latency, processor time of server and client for a frame."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(HERE / "run.py"), "--child", way, url, str(seconds), str(folder)]
    machine, cpu, before = Machine.now(), server.cpu(), os.times()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(clients)]
    said = [json.loads(p.communicate()[0].splitlines()[-1]) for p in processes]
    served, after = server.cpu() - cpu, os.times()
    ours = served + sum(after[:4]) - sum(before[:4])
    frames, ms = sum(len(s["times"]) for s in said), 1000 * np.concatenate([s["times"] for s in said])
    return {
        "way": way,
        "clients": clients,
        "frames_s": round(sum(len(s["times"]) / s["wall"] for s in said), 1),
        "p50_ms": round(float(np.percentile(ms, 50)), 2),
        "p99_ms": round(float(np.percentile(ms, 99)), 2),
        "server_cpu_ms": round(1000 * served / (frames + clients * FRAMES), 3),  # it also answered the first check
        "client_cpu_ms": round(1000 * sum(s["cpu"] for s in said) / frames, 3),
        "wrong": sum(s["wrong"] for s in said),
        **Machine.now().since(machine, ours),
    }


def material(folder: Path) -> None:
    """Nine networks, as bundles and as graphs, eight photos, and the right answers (8, 9, 10)."""
    import model
    import net
    import ours

    files = photos(FRAMES)
    images = np.concatenate([prepare(photo) for photo in files])
    right = []
    for i, name in enumerate(NAMES):
        graph = model.small_cnn(i, channels=3, widths=WIDTHS)
        ours.make_bundle(folder / name, graph, name)
        (folder / f"{name}.onnx").write_bytes(graph)
        right.append(net.load(str(folder / f"{name}.onnx"))(images))
    np.save(folder / "right.npy", np.stack(right, axis=1))
    for i, photo in enumerate(files):
        (folder / f"{i}.jpg").write_bytes(photo)


def alone(folder: Path, times: int = 60) -> dict[str, float]:
    """Processor time in this process, milliseconds, medians: preparing a photo, and the nine networks on it."""
    import net

    photo = (folder / "0.jpg").read_bytes()
    image, runs = prepare(photo), [net.load(str(folder / f"{name}.onnx")) for name in NAMES]
    spent: dict[str, list[float]] = {"prepare": [], "nine networks": []}
    for _ in range(times):
        start = time.thread_time()
        prepare(photo)
        middle = time.thread_time()
        for run in runs:
            run(image)
        spent["prepare"].append(1000 * (middle - start))
        spent["nine networks"].append(1000 * (time.thread_time() - middle))
    return {key: round(statistics.median(values), 3) for key, values in spent.items()}


def answers(way: str, folder: Path) -> Callable[[int], bool]:
    """Whether a port answers the first photo yet."""

    def check(port: int) -> bool:
        try:
            photo, right = (folder / "0.jpg").read_bytes(), np.load(folder / "right.npy")[0]
            return bool(np.allclose(WAYS[way](f"http://127.0.0.1:{port}")(photo), right, atol=1e-4))
        except (TrilobeError, OSError):
            return False

    return check


def measure(chosen: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All samples, and what the work alone costs: each server in turn, ways in another order each round."""
    rounds, seconds = (1, 2.0) if chosen.quick else (chosen.rounds, 4.0)
    triton = Path(os.environ.get("PEERS", "/nowhere"), "pytriton", "bin", "python")
    out = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material(folder)
        floor = alone(folder)
        commands = {OUR_SERVER: [sys.executable, str(HERE / "server.py"), str(folder), "PORT", str(chosen.workers)]}
        if triton.exists() and not chosen.quick:
            commands[TRITON] = [str(triton), str(HERE / "triton_nine.py"), str(folder), "PORT"]
        for turn in range(rounds):
            for who, command in commands.items():
                ways = list(WAYS) if who == OUR_SERVER else ["nine calls", "nine threads"]
                port, far = free_port(), free_port()
                words = [str(port) if w == "PORT" else w for w in command]
                with running(who, words, port, answers(ways[-1], folder)) as server:
                    link = [sys.executable, str(HERE / "link.py"), str(far), str(port), *map(str, NETWORK)]
                    network = subprocess.Popen(link)
                    try:
                        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                            for clients in CLIENTS:
                                one = sample(server, port, way, clients, seconds, folder)
                                out.append({"server": who, "network": "none", "round": turn, **one})
                            one = sample(server, far, way, 1, seconds, folder)
                            out.append({"server": who, "network": LINK, "round": turn, **one})
                            said = f"{out[-3]['p50_ms']} ms, {out[-2]['frames_s']} frames/s"
                            print(f"{turn} {who}, {way}: {said}", file=sys.stderr)
                    finally:
                        network.terminate()
                        network.wait()
    return out, floor


def summary(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians for each server, way, network and number of clients, over the quiet samples where there are any."""
    out = []
    for key in dict.fromkeys((s["server"], s["way"], s["network"], s["clients"]) for s in samples):
        own = [s for s in samples if (s["server"], s["way"], s["network"], s["clients"]) == key]
        quiet = [s for s in own if s["quiet"]]
        row = dict(zip(("server", "way", "network", "clients"), key, strict=True))
        for figure in ("frames_s", "p50_ms", "p99_ms", "server_cpu_ms", "client_cpu_ms", "foreign_cores"):
            row[figure] = round(statistics.median(s[figure] for s in quiet or own), 3)
        out.append(row | {"wrong": sum(s["wrong"] for s in own), "quiet": len(quiet), "of": len(own)})
    return out


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many times the throughput and how small a part of the latency one call has, beside each other way."""
    found = {(r["server"], r["way"], r["network"], r["clients"]): r for r in rows}
    out = {}
    for (server, way, network, clients), row in found.items():
        one = found.get((OUR_SERVER, "one call", network, clients))
        if one is not None and row is not one:
            key = f"{server}, {way}, {clients} client{'s'[: clients > 1]}, network: {network}"
            out[key] = {"throughput": round(one["frames_s"] / row["frames_s"], 2),
                        "latency": round(row["p50_ms"] / one["p50_ms"], 2)}  # fmt: skip
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = (
        "| server | way | network | clients | frames/s | p50 ms | p99 ms | server CPU ms/frame "
        "| client CPU ms/frame | wrong | quiet |\n" + "|---" * 11 + "|"
    )
    lines = [
        f"| {r['server']} | {r['way']} | {r['network']} | {r['clients']} | {r['frames_s']:,.0f} | {r['p50_ms']:.2f} | "
        f"{r['p99_ms']:.2f} | {r['server_cpu_ms']:.2f} | {r['client_cpu_ms']:.2f} | {r['wrong']} "
        f"| {r['quiet']} of {r['of']} |"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute; result.json stays as it is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--to", type=Path, help="write the result to this file instead of result.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        way, url, seconds, folder = chosen.child
        print(json.dumps(child(way, url, float(seconds), Path(folder))))
        return
    samples, floor = measure(chosen)
    rows = summary(samples)
    compared = ratios(rows)
    print(table(rows))
    print(f"\nThe work alone, in process, CPU ms per frame: {floor}.\n")
    for key, value in compared.items():
        print(f"one call beside {key}: {value['throughput']} times the throughput, 1/{value['latency']} of the latency")
    best = max(CLIENTS)
    ours = compared[f"{OUR_SERVER}, nine calls, 1 client, network: none"]
    many = compared[f"{OUR_SERVER}, nine calls, {best} clients, network: none"]
    result = {
        "claim": "One call for nine models over one photo, beside a client that prepares it and calls nine endpoints",
        "rows": rows,
        "compared": compared,
        "work_alone_ms": floor,
        "samples": samples,
        "peers": sorted({s["server"] for s in samples} - {OUR_SERVER}),
        "ratio": many["throughput"],
        "ratio_of": f"frames/s of one call over nine calls one after the other, same server, {best} clients",
        "target": "at least 5 times the throughput, at most a sixth of the latency",
        "met": many["throughput"] >= 5 and ours["latency"] >= 6,
        "versions": common.versions("numpy", "onnxruntime", "httptools", "pillow"),
    }
    common.keep(__file__, result, chosen)


if __name__ == "__main__":
    main()
