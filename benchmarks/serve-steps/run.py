"""A step that computes in Python, in threads of the server and in processes of its own, and what its neighbor sees.

``python run.py [--quick] [--rounds N] [--to FILE]``. The server holds a pipeline of one step (``words.py``, some
milliseconds a text) and beside it the small network of ``../serve-peers``. Load is ``wrk``, closed loop: the step by
one and by eight connections, the network by one connection, alone and while eight press the step. Both servers run all
the time, samples take turns.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("", "serve-peers"))]

import common  # noqa: E402
import model  # noqa: E402
import numpy as np  # noqa: E402
import ours  # noqa: E402
import wires  # noqa: E402
import words  # noqa: E402
from serving import Call, Server, ask, drive, free_port, running  # noqa: E402

from trilobe.infrastructure import endpoint  # noqa: E402
from trilobe.infrastructure.serve import Batching, Node, Settings, graph, serve_forever  # noqa: E402
from trilobe.infrastructure.serve.graph import find  # noqa: E402

TEXT = " ".join(f"Number {i} of the words that somebody wrote, and {i * i} more." for i in range(20))
WHERE = ("threads", "processes")


def serve(bundle: Path, port: int, where: Any, folder: Path) -> None:
    """The server under measurement."""
    node = Node(find("words:parse"), {"text": "text"})
    flow = graph("words", {"text": "BYTES[-1]"}, {"counts": "parse.counts"}, {"parse": node})
    settings = Settings(flows=(flow,), batching={"parse": Batching(where=where)})
    endpoint.deploy(folder, bundle)
    serve_forever(folder, "cnn", ours.load, folder / "captures", port=port, settings=settings)


def text_call() -> Call:
    """One text, in JSON as clients by hand send it; the answer is binary."""
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
    body = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return Call("/v2/models/words/infer", body, {"Content-Type": "application/json"})


def answers(port: int) -> bool:
    """Whether the pipeline gives the right counts."""
    try:
        status, _, body = ask(port, text_call())
    except OSError:
        return False
    right = words.parse.run(np.array([TEXT.encode(), None], object)[:1])["counts"]
    return status == 200 and body.endswith(right.tobytes())


def pressed(server: Server, network: Call, seconds: float) -> dict[str, Any]:
    """The network by one connection while eight press the step."""
    with ThreadPoolExecutor(1) as pool:
        press = pool.submit(drive, server, text_call(), 8, seconds + 1.0)
        sample = drive(server, network, 1, seconds)
        press.result()
    return sample


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians."""
    keys = ("requests_s", "p50_ms", "p99_ms", "max_ms", "cpu_us", "cores", "foreign_cores")
    return {key: round(statistics.median(s[key] for s in samples), 3) for key in keys} | {
        "failed": sum(s["failed"] for s in samples), "samples": len(samples)
    }  # fmt: skip


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--to", type=Path, default=HERE / "result.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        bundle, port, where, folder = chosen.child
        serve(Path(bundle), int(port), where, Path(folder))
        return
    rounds, seconds = (1, 1.0) if chosen.quick else (chosen.rounds, 3.0)
    network = wires.V2_BINARY.write(model.images(1))
    got: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    memory = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as temporary:
        bundle = ours.make_bundle(Path(temporary, "bundle"), model.small_cnn(0), "s")
        servers = []
        for where in WHERE:
            port, folder = free_port(), Path(temporary, where)
            folder.mkdir()
            command = [sys.executable, str(HERE / "run.py"), "--child", str(bundle), str(port), where, str(folder)]
            servers.append((where, stack.enter_context(running(where, command, port, answers))))
        for _ in range(rounds):
            for where, server in random.sample(servers, len(servers)):
                for c in (1, 8):
                    got[where, f"the step, {c} connections"].append(drive(server, text_call(), c, seconds))
                got[where, "the network, alone"].append(drive(server, network, 1, seconds))
                got[where, "the network, beside the step"].append(pressed(server, network, seconds))
        memory = {where: round(server.pss(), 1) for where, server in servers}
    rows = [{"where": where, "what": what, **summary(samples)} for (where, what), samples in got.items()]
    print("| load | computed in | requests/s | p50 ms | p99 ms | CPU us/request | failed |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["what"], row["where"])):
        cpu = "" if "beside" in row["what"] else f"{row['cpu_us']:,.0f}"
        figures = f"{row['requests_s']:,.0f} | {row['p50_ms']:.2f} | {row['p99_ms']:.1f} | {cpu} | {row['failed']}"
        print(f"| {row['what']} | {row['where']} | {figures} |")
    print(memory)
    waits = {row["where"]: row["p50_ms"] for row in rows if "beside" in row["what"]}
    result = {
        "claim": "A step that computes in Python: processes of its own beside threads of the server",
        "rows": rows,
        "memory_mb": memory,
        "ratio": round(waits["threads"] / waits["processes"], 2),
        "ratio_of": "median latency of the network beside the busy step, threads over processes",
        "target": "the neighbor waits at most half as long",
        "met": waits["threads"] >= 2 * waits["processes"],
        "peers": ["threads of the same server"],
        "versions": common.versions("numpy", "onnxruntime"),
    }
    common.keep(__file__, result, chosen)


if __name__ == "__main__":
    main()
