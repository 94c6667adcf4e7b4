"""Ten minutes at 80% of what the server can do, with a new model every 20 seconds: failures, memory, latency.

``python run.py [--quick] [--minutes N] [--workers N] [--share 0.8] [--to FILE]``. First ``wrk`` with 64 connections
finds the maximum, then an open-loop client (Poisson arrivals, ``../openloop.py``) sends that share of it while the
bundle is replaced again and again. Every answer is held against what the two bundles say of its image. Memory is the
sum of proportional set sizes, once a second.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / name) for name in ("", "serve-peers", "serve-peers/peers")]

import common  # noqa: E402
import model  # noqa: E402
import net  # noqa: E402
import numpy as np  # noqa: E402
import openloop  # noqa: E402
import ours  # noqa: E402
import wires  # noqa: E402
from serving import Machine, Server, ask, drive, free_port, running, seconds_of  # noqa: E402

from trilobe.infrastructure import endpoint  # noqa: E402


def bundles(folder: Path) -> tuple[list[Path], Any, Any]:
    """Two bundles with different weights, 64 images, and what each says of them (2, 64, 10)."""
    images, paths, right = model.images(64), [], []
    for seed in (0, 1):
        graph = model.small_cnn(seed)
        paths.append(ours.make_bundle(folder / f"b{seed}", graph, f"seed-{seed}"))
        (folder / f"{seed}.onnx").write_bytes(graph)
        right.append(net.load(str(folder / f"{seed}.onnx"))(images))
    return paths, images, np.stack(right)


def maximum(server: Server, image: Any, seconds: float, times: int) -> float:
    """Requests/s of the closed loop at 64 connections, median."""
    call = wires.V2_BINARY.write(image)
    drive(server, call, 64, 1.0)
    return statistics.median(drive(server, call, 64, seconds)["requests_s"] for _ in range(times))


def slope(at: Any, values: Any) -> dict[str, float]:
    """Least squares in units per minute with its 95% interval (t distribution over independent points)."""
    from scipy.stats import linregress, t

    fit = linregress(np.asarray(at) / 60, values)
    half = t.ppf(0.975, len(at) - 2) * fit.stderr
    return {
        k: round(float(v), 4) for k, v in (("mean", fit.slope), ("low", fit.slope - half), ("high", fit.slope + half))
    }


def soak(server: Server, folder: Path, paths: list[Path], load: openloop.Load, every: float) -> dict[str, Any]:
    """Load the server, swap, look at its memory: when each swap began and ended, memory and machine each second."""
    swaps, memory, machine = [], [], []
    client = openloop.begin(load)
    start = time.monotonic()
    before, used = Machine.now(), (server.cpu(), seconds_of(client.pid or 0))
    try:
        while client.is_alive():
            now = time.monotonic()
            if now - start > every * (len(swaps) + 1) and now - start < load.seconds - 1:
                endpoint.replace(folder, paths[(len(swaps) + 1) % 2])
                swaps.append((now, time.monotonic()))
            memory.append((now - start, round(server.pss(), 2)))
            if len(memory) % 60 == 0:
                after, more = Machine.now(), (server.cpu(), seconds_of(client.pid or 0))
                cores = [(b - a) / (after.at - before.at) for a, b in zip(used, more, strict=True)]
                machine.append({"server_cores": round(cores[0], 2), "client_cores": round(cores[1], 2),
                                **after.since(before, sum(more) - sum(used))})  # fmt: skip
                before, used = after, more
            time.sleep(max(0.0, 1.0 - (time.monotonic() - now)))
    finally:
        client.terminate()
        client.join()
    return {"swaps": swaps, "memory": memory, "machine": machine, "start": start}


def per_minute(rows: Any, start: float) -> list[dict[str, Any]]:
    """Requests, failures and latency (ms) by the minute in which requests were due."""
    out = []
    for minute in range(int((rows["due"].max() - start) // 60) + 1):
        part = rows[(rows["due"] - start >= 60 * minute) & (rows["due"] - start < 60 * (minute + 1))]
        if len(part):
            p50, p99, longest = np.percentile(part["latency"] * 1000, (50, 99, 100))
            out.append({"minute": minute, "requests": len(part), "failed": int((part["said"] < 0).sum()),
                        "p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2),
                        "max_ms": round(float(longest), 1)})  # fmt: skip
    return out


def figures(seen: dict[str, Any], rows: Any, n_bundles: int) -> dict[str, Any]:
    """Everything the soak says."""
    start, swaps = seen["start"], seen["swaps"]
    ok = rows[rows["said"] >= 0]
    stale = 0
    for i, (_, done) in enumerate(swaps):  # after swap i the bundle (i + 1) % n answers, until the next one begins
        until = swaps[i + 1][0] if i + 1 < len(swaps) else np.inf
        within = (ok["due"] > done) & (ok["due"] + ok["latency"] < until)
        stale += int((within & (ok["said"] != (i + 1) % n_bundles)).sum())
    near = np.zeros(len(ok), bool)
    for a, b in swaps:
        near |= (ok["due"] >= a - 0.1) & (ok["due"] <= b + 0.1)
    ms = ok["latency"] * 1000
    minutes = per_minute(rows, start)
    at, mb = np.array([a for a, _ in seen["memory"]]), np.array([m for _, m in seen["memory"]])
    # A swap holds two models for a moment: one point per interval between swaps, its median.
    block = np.digitize(at, [a - start for a, _ in swaps])
    later = [k for k in np.unique(block) if k > 0]  # the first load of everything is growth, but no leak
    points = [(float(at[block == k].mean()), round(float(np.median(mb[block == k])), 2)) for k in later]
    p99 = [m["p99_ms"] for m in minutes[:-1] or minutes]
    return {
        "requests": len(rows),
        "requests_s": round(len(rows) / float(rows["due"].max() - start), 1),
        **openloop.failures(rows),
        "sent_again": int((rows["retried"] > 0).sum()),
        "swaps": len(swaps),
        "stale": stale,
        "swap_s": common.estimate([b - a for a, b in swaps], 3) if swaps else None,
        "latency_ms": {name: {f"p{q:g}": round(float(np.percentile(ms[where], q)), 2) for q in (50, 99, 99.9, 100)}
                       for name, where in (("around swaps", near), ("between", ~near)) if where.any()},
        "minutes": minutes,
        "p99_slope_ms_per_minute": slope([60.0 * k for k in range(len(p99))], p99) if len(p99) > 2 else None,
        "p99_worst_over_best": round(max(p99) / min(p99), 2),  # over the median, one that only grows looked stable
        "memory_mb": {"first": float(mb[0]), "last": float(mb[-1]), "most": float(mb.max())},
        "memory_slope_mb_per_minute": slope(*zip(*points, strict=True)) if len(points) > 2 else None,
        "memory_points": [(round(a, 1), m) for a, m in points],
        "machine": seen["machine"],
    }  # fmt: skip


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Find the maximum, then soak."""
    seconds, every = (24.0, 5.0) if chosen.quick else (60.0 * chosen.minutes, chosen.every)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, images, right = bundles(folder)
        port, served = free_port(), folder / "endpoint"
        served.mkdir()
        command = [sys.executable, str(HERE.parent / "serve-peers" / "ours.py"), str(paths[0]), str(port),
                   str(chosen.workers), str(served)]  # fmt: skip
        call = wires.V2_BINARY.write(images[:1])

        def answers(at: int) -> bool:
            try:
                return ask(at, call)[0] == 200
            except OSError:
                return False

        with running("trilobe", command, port, answers) as server:
            most = chosen.maximum or maximum(server, images[:1], 1.0 if chosen.quick else 20.0, 3)
            requests = [openloop.http_request(wires.V2_BINARY.write(images[i : i + 1])) for i in range(len(images))]
            load = openloop.Load(port, requests, right, chosen.share * most, seconds, folder / "rows")
            print(f"maximum {most:.0f}/s; {load.rate:.0f}/s for {seconds:.0f} s", file=sys.stderr)
            seen = soak(server, served, paths, load, every)
            found = figures(seen, openloop.rows(load.out), len(paths))
            log = server.tail(5)
    return {"maximum_requests_s": most, "share": chosen.share, "workers": chosen.workers, **found, "log": log}


def flat(slope_: dict[str, float] | None, allowed: float) -> bool:
    """Whether a slope's interval holds zero, or the whole of it is too small to matter."""
    return slope_ is not None and (slope_["low"] <= 0 <= slope_["high"] or abs(slope_["mean"]) < allowed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a minute; result.json stays as it is")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between swaps")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.8, help="of the maximum")
    parser.add_argument("--maximum", type=float, default=0.0, help="requests/s, where known; measured otherwise")
    parser.add_argument("--to", type=Path, help="write the result to this file instead of result.json")
    chosen = parser.parse_args()
    if shutil.which("wrk") is None:
        print("not run: wrk is not installed (Debian: apt-get install wrk)")
        return
    found = measure(chosen)
    met = (
        found["failed"] == found["stale"] == 0
        and flat(found["memory_slope_mb_per_minute"], 0.05)
        and found["p99_worst_over_best"] <= 2.0
        and chosen.minutes >= 10.0
    )
    result = {
        "claim": "Ten minutes at 80% of the maximum, a new model every 20 s: no failed request, memory and p99 flat",
        "figures": found,
        "peers": {},
        "ratio": found["p99_worst_over_best"],
        "ratio_of": "p99 of the worst minute over that of the best",
        "target": "0 failed; memory slope 0 or below 0.05 MB/min; worst p99 at most twice the best; ten minutes",
        "met": met,
        "versions": common.versions("numpy", "onnxruntime", "httptools"),
    }
    common.keep(__file__, result, chosen)
    f = found
    print(f"{f['requests']:,} requests at {f['requests_s']:,.0f}/s, {f['failed']} failed, "
          f"{f['sent_again']} sent again, {f['swaps']} swaps, {f['stale']} stale")  # fmt: skip
    print("latency (ms): " + "; ".join(f"{k}: {v}" for k, v in f["latency_ms"].items()))
    print(f"memory {f['memory_mb']}, slope {f['memory_slope_mb_per_minute']} MB/min")
    print("| minute | requests | failed | p50 ms | p99 ms | longest ms |\n|---|---|---|---|---|---|")
    for m in f["minutes"]:
        print(f"| {m['minute']} | {m['requests']:,} | {m['failed']} | {m['p50_ms']} | {m['p99_ms']} | {m['max_ms']} |")


if __name__ == "__main__":
    main()
