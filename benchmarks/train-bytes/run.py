"""Bytes on the wire and milliseconds a step: plain DDP, torch's fp16 and PowerSGD hooks, and the hooks of Trilobe.

Each worker lives in a network namespace of its own; their veth interfaces meet on a bridge in one more. Bytes are those
that the kernel counts at a worker's interface, headers and acknowledgements included; rates are set by tc (tbf) on
what each worker sends. Needs Linux and root.

    sudo python benchmarks/train-bytes/run.py [--quick]
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import namespaces  # type: ignore[import-not-found]
from common import arguments, keep, versions  # type: ignore[import-not-found]
from namespaces import counted, set_rate  # type: ignore[import-not-found]

HERE = Path(__file__).parent

RATES = {"100 Mbit/s": ("100mbit", "64kb"), "1 Gbit/s": ("1gbit", "512kb"), "unshaped": ("", "")}
PEERS = ("ddp_fp32", "ddp_fp16", "ddp_power_sgd_1")
OURS = ("majority_vote", "signum", "ef_vote", "ef_sign", "stochastic_vote", "qsgd", "ef_top_k", "all_gather_vote")
GROWTH_STEPS = 5
SIZES = (3072, 340, 200, 10)  # 1,115,030 parameters, and little to compute at a batch of 2


def wrapped(hook: str) -> Any:
    """The network under DDP with one of the hooks; one bucket, since PowerSGD hangs with several on gloo."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel

    from trilobe.algorithms.parallel import PRESETS, Choices, State, compressed_hook

    torch.manual_seed(0)
    linear = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
    net = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1], torch.nn.ReLU(), linear[2])
    model = DistributedDataParallel(net, bucket_cap_mb=100)
    if hook == "ddp_fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "ddp_power_sgd_1":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook != "ddp_fp32":
        gather = Choices(communicator="all_gather")
        model.register_comm_hook(State({**PRESETS, "all_gather_vote": gather}[hook]).attach(model), compressed_hook)
    return model


def measure(hook: str, steps: int) -> dict[str, float]:
    """One worker's account of ``steps`` steps: bytes, median and fastest milliseconds, CPU milliseconds."""
    import statistics

    import torch
    import torch.distributed as dist

    model = wrapped(hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x, y = torch.randn(2, SIZES[0]), torch.zeros(2, dtype=torch.long)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    for _ in range(4):  # buckets are rebuilt, PowerSGD begins
        step()
    dist.barrier()
    received, sent, cpu = *counted(), time.process_time()
    times = [step() for _ in range(steps)]
    cpu = 1e3 * (time.process_time() - cpu) / steps
    dist.barrier()
    now = counted()
    return {
        "sent_kB": round((now[1] - sent) / steps / 1e3, 1),
        "received_kB": round((now[0] - received) / steps / 1e3, 1),
        "ms": round(statistics.median(times), 1),
        "fastest_ms": round(min(times), 1),
        "cpu_ms": round(cpu, 1),
    }


def predict(workers: int) -> dict[str, Any]:
    """The planner's figures for this link, by hook, and the link that it measured."""
    import torch

    from trilobe.algorithms.parallel import measure_link, plan, time_step

    link, model = measure_link(), wrapped("ddp_fp32")
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.0), torch.randn(2, SIZES[0])

    def local() -> None:
        optimizer.zero_grad()
        with model.no_sync():
            model(x).square().sum().backward()
        optimizer.step()

    chosen = plan(model, link, workers, compute_s=time_step(local))
    return {
        "latency_ms": round(1e3 * link.latency_s, 3),
        "Mbit_per_s": round(link.bytes_per_s * 8 / 1e6, 1),
        "ms": {p.name: round(1e3 * p.step_s, 1) for p in chosen.predictions},
        "reason": chosen.reason,
    }


def everything(workers: int, quick: bool) -> dict[str, Any]:
    """All rates and hooks."""
    import torch.distributed as dist

    seen: dict[str, Any] = {}
    for name, (rate, burst) in RATES.items():
        set_rate(rate, burst)
        dist.barrier()
        seen[name] = {"planner": predict(workers)}
        for hook in (*PEERS, *OURS):
            steps = 6 if quick or (rate == "100mbit" and hook in PEERS[:2]) else 20
            seen[name][hook] = measure(hook, steps)
    return seen


def child(rank: int, workers: int, folder: str, what: str) -> None:
    """All rates and hooks, or the growth alone, as one worker; worker 0 writes what it saw."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    seen = gather_or_split(rank, workers) if what == "growth" else everything(workers, what == "quick")
    if rank == 0:
        Path(folder, "seen.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def gather_or_split(rank: int, workers: int) -> dict[str, float]:
    """kB received for one exchange by each communicator, counted; no training, so that 16 fit on a small machine."""
    import torch
    import torch.distributed as dist

    from trilobe.algorithms.parallel import PLAIN, Choices, State, exchange

    n, seen = sum((a + 1) * b for a, b in itertools.pairwise(SIZES)), {}
    ways = {"all_gather": Choices(communicator="all_gather"), "two_phase": Choices(), "fp32": PLAIN}
    for name, choices in ways.items():
        state, x = State(choices), torch.randn(n)
        exchange(state, x, [x])
        dist.barrier()
        before = counted()[0]
        for _ in range(GROWTH_STEPS):
            exchange(state, torch.randn(n), [x])
        dist.barrier()
        seen[name] = round((counted()[0] - before) / GROWTH_STEPS / 1e3, 1)
    return seen


def growth() -> list[dict[str, Any]]:
    """kB that every worker receives in a step, gathering against two phases, computed and counted, 2 to 16 workers."""
    from trilobe.algorithms.parallel import Choices
    from trilobe.algorithms.parallel.planner import traffic

    n = sum((a + 1) * b for a, b in itertools.pairwise(SIZES))
    rows = []
    for workers in (2, 4, 8, 16):
        row: dict[str, Any] = {"workers": workers}
        seen = namespaces.run(str(Path(__file__).resolve()), workers, ["growth"])
        for name in ("all_gather", "two_phase"):
            choices = Choices(communicator=name)  # type: ignore[arg-type]
            row[f"{name}_kB"] = round(traffic(choices, n, workers)[0] / 1e3, 1)
            row[f"{name}_counted_kB"] = seen[name]
        rows.append(row | {"fp32_counted_kB": seen["fp32"]})
    return rows


def chart(rows: list[dict[str, Any]]) -> str:
    """What a worker receives over the number of workers, as SVG."""
    top, width, tall = 2200, 460, 240
    colors = {"all_gather": "#b4442e", "two_phase": "#1f6f8b"}
    titles = {"all_gather": "all-gather", "two_phase": "two phases"}
    parts = []
    for kb in range(0, top, 500):
        y = tall - 30 - (tall - 60) * kb / top
        parts.append(f'<line x1="50" x2="360" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="44" y="{y + 4:.1f}" text-anchor="end">{kb:,}</text>')
    for name, color in colors.items():
        points = [
            (50 + 310 * (r["workers"] - 2) / 14, tall - 30 - (tall - 60) * r[f"{name}_counted_kB"] / top) for r in rows
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
        parts.append(f'<text x="368" y="{points[-1][1] + 4:.1f}" fill="{color}">{titles[name]}</text>')
    for r in rows:
        x = 50 + 310 * (r["workers"] - 2) / 14
        parts.append(f'<text x="{x:.1f}" y="{tall - 12}" text-anchor="middle">{r["workers"]}</text>')
    parts.append(f'<text x="205" y="{tall}" text-anchor="middle">workers</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall + 6}" role="img" font-family="sans-serif" '
        'font-size="12"><title>kB received in a step by each worker, counted, over the number of workers</title>'
        f'<text x="0" y="14">kB received in a step</text>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    chosen = arguments(__doc__)
    if chosen.child:
        rank, workers, folder, what = chosen.child
        child(int(rank), int(workers), folder, what)
        return
    if not namespaces.usable():
        return
    here = str(Path(__file__).resolve())
    what = "quick" if chosen.quick else "whole"
    measured = {str(n): namespaces.run(here, n, [what]) for n in ((2,) if chosen.quick else (2, 4))}
    grown = [] if chosen.quick else growth()
    two = measured["2"]
    ratio = round(two["unshaped"]["ddp_fp32"]["sent_kB"] / two["unshaped"]["majority_vote"]["sent_kB"], 2)
    slow = two["100 Mbit/s"]
    result = {
        "claim": "majority vote sends at least 31 times fewer bytes than all-reduce in float32",
        "ratio": ratio,
        "target": "at least 31 times fewer bytes",
        "met": ratio >= 31,
        "peers": list(PEERS),
        "figures": {
            "speedup_100_mbit": round(slow["ddp_fp32"]["ms"] / slow["majority_vote"]["ms"], 2),
            "measured": measured,
            "growth": grown,
        },
        "versions": versions("torch", "numpy"),
    }
    print(json.dumps(result, indent=1))
    keep(__file__, result, chosen)
    if grown and not chosen.to:
        (HERE / "growth.svg").write_text(chart(grown), encoding="utf-8")


if __name__ == "__main__":
    main()
