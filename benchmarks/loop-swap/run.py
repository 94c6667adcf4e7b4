"""A new model behind a busy endpoint: failed requests and latency, beside stopping the server and starting it again.

``python run.py [--quick] [--to FILE]``. Two small bundles are made by the product itself (60 digits, brief training,
two seeds). Four client threads in one process send one image a request, 2 ms after each reply, over kept-alive
connections, while the bundle behind the endpoint is replaced again and again; then the same clients, while the server
is stopped and started with the other bundle. Every reply is held against what the bundle it names says of that image.
"""

import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import numpy as np  # noqa: E402

THREADS, PAUSE, REST = 4, 0.002, 0.5
CONFIG = """\
[project]
name = "digits"
[labels]
names = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
[train]
steps = 60
epochs = 1
[check]
eps = [0.02]
attack_steps = 1
"""


def two_bundles(folder: Path) -> tuple[list[Any], np.ndarray]:
    """A project with two packaged models, and 16 images to ask about."""
    from sklearn.datasets import load_digits

    from trilobe import loop
    from trilobe.tasks.image_classification.data import encode_png

    data = load_digits()
    images = (data.images / 16 * 255).round().astype(np.uint8)[..., None]
    for i in range(60):
        path = folder / "files" / str(data.target[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(images[i]))
    (folder / "trilobe.toml").write_text(CONFIG, "utf-8")
    loop.init(folder)
    loop.add([folder / "files"], folder, labels="folders")
    return [loop.package(folder, loop.train(folder, seed=s).id) for s in (0, 1)], images[100:116]


@dataclass
class Load:
    """Clients at work: for each request (start, end, bundle or "" where it failed, whether the reply was right)."""

    url: str
    images: np.ndarray
    right: dict[str, np.ndarray]
    sent: list[tuple[float, float, str, bool]] = field(default_factory=list)
    enough: threading.Event = field(default_factory=threading.Event)

    def client(self, first: int) -> None:
        """One client until told that it is enough."""
        from trilobe.errors import TrilobeError
        from trilobe.infrastructure.client import Client

        i = first
        with Client(self.url, "digits", timeout=10) as client:
            while not self.enough.is_set():
                i = (i + 1) % len(self.images)
                start = time.perf_counter()
                try:
                    proba = client.infer(self.images[i : i + 1])
                    said, good = client.version, bool(np.allclose(proba[0], self.right[client.version][i], atol=1e-6))
                except TrilobeError:
                    said, good = "", False
                self.sent.append((start, time.perf_counter(), said, good))
                self.enough.wait(PAUSE)

    def during(self, change: Callable[[int], None], times: int) -> list[tuple[float, float]]:
        """Keep the clients busy while ``change(i)`` happens ``times``, with rests; when each began and ended."""
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(THREADS)]
        for t in threads:
            t.start()
        spans = []
        try:
            for i in range(times):
                time.sleep(REST)
                start = time.perf_counter()
                change(i)
                spans.append((start, time.perf_counter()))
            time.sleep(REST)
        finally:
            self.enough.set()
            for t in threads:
                t.join()
        return spans


def figures(load: Load, spans: list[tuple[float, float]], changes_to: list[str]) -> dict[str, Any]:
    """What the clients saw."""
    inside = [any(s < b and e > a for a, b in spans) for s, e, _, _ in load.sent]
    answered = [(s, e, v, i) for (s, e, v, _), i in zip(load.sent, inside, strict=True) if v]
    ms = {True: [], False: []}
    for s, e, _, i in answered:
        ms[i].append(1000 * (e - s))
    stale = sum(
        v != bundle
        for (_, b), bundle, after in zip(spans, changes_to, [a for a, _ in spans[1:]] + [np.inf], strict=True)
        for s, e, v, _ in answered
        if s > b and e < after
    )
    down = []  # from the last reply before to the first reply after, beyond the usual pause between replies
    ends = np.sort([e for _, e, _, _ in answered])
    for a, b in spans:
        near = ends[(ends > a - REST) & (ends < b + REST)]
        down.append(float(np.diff(near).max()))
    return {
        "changes": len(spans),
        "requests": len(load.sent),
        "failed": len(load.sent) - len(answered),
        "bundles seen": len({v for _, _, v, _ in answered}),
        "replies that are not their bundle's": sum(not ok for _, _, v, ok in load.sent if v),
        "replies of the old bundle after the change": stale,
        "seconds for a change": common.estimate([b - a for a, b in spans], 3),
        "longest silence around a change (s)": common.estimate(down, 3),
        "requests a second": round(len(answered) / (ends[-1] - ends[0]), 1),
        "latency (ms)": {
            name: {f"p{q:g}": round(float(np.percentile(ms[i], q)), 2) for q in (50, 99, 100)} | {"n": len(ms[i])}
            for name, i in (("during changes", True), ("between", False))
            if ms[i]
        },
    }


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def measure(folder: Path, swaps: int, restarts: int) -> dict[str, Any]:
    """Both ways on the same project, images and port."""
    from trilobe import loop
    from trilobe.infrastructure.client import Client

    bundles, images = two_bundles(folder)
    port, right = free_port(), {}
    endpoint = loop.serve(bundles[1].id, folder, port=port, background=True)
    try:
        for bundle in bundles:
            loop.serve(bundle.id, folder)
            with Client(endpoint.url, "digits") as client:
                right[bundle.id] = np.concatenate([client.infer(x[None]) for x in images])
        order = [bundles[(i + 1) % 2].id for i in range(max(swaps, restarts))]
        out = {}
        swapping = Load(endpoint.url, images, right)
        spans = swapping.during(lambda i: loop.serve(order[i], folder) and None, swaps)
        out["replace"] = figures(swapping, spans, order[:swaps])
        loop.serve(bundles[0].id, folder)

        def restart(i: int) -> None:
            loop.serve(project=folder, stop=True)
            loop.serve(order[i], folder, port=port, background=True)

        restarting = Load(endpoint.url, images, right)
        spans = restarting.during(restart, restarts)
        out["stop and start"] = figures(restarting, spans, order[:restarts])
        return out
    finally:
        loop.serve(project=folder, stop=True)


def main() -> None:
    from trilobe.statistics import clopper_pearson

    chosen = common.arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), *((5, 2) if chosen.quick else (30, 10)))
    ours, peer = found["replace"], found["stop and start"]
    limit = clopper_pearson(ours["failed"], ours["requests"])[1]
    met = (
        ours["failed"] == ours["replies that are not their bundle's"] == 0
        and ours["requests"] >= 2000
        and ours["changes"] >= 5
        and ours["bundles seen"] == 2
    )
    result = {
        "claim": "The model behind a busy endpoint is replaced without a failed request",
        "figures": found | {"upper limit of our share of failed requests (95%)": limit},
        "peers": {"stop and start": "the same server, stopped and started with the other bundle, on the same port"},
        "ratio": round(peer["longest silence around a change (s)"]["mean"]
                       / ours["longest silence around a change (s)"]["mean"], 1),
        "ratio_of": "longest time without any reply around a change, stop and start over replace",
        "target": "no failed request and no wrong reply in at least 2,000 requests and 5 changes",
        "met": met,
        "versions": common.versions("numpy", "onnxruntime", "uvicorn", "httptools"),
    }  # fmt: skip
    common.keep(__file__, result, chosen)
    print("| | " + " | ".join(found) + " |\n|---|---|---|")
    for key, value in ours.items():
        if key == "latency (ms)":
            for name in value:
                cells = [", ".join(f"{k} {v:g}" for k, v in r[key].get(name, {}).items()) for r in found.values()]
                print(f"| latency (ms), {name} | " + " | ".join(cells) + " |")
        else:
            cells = [common.words(r[key], digits=3) if isinstance(value, dict) else str(r[key]) for r in found.values()]
            print(f"| {key} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
