"""Bytes on the wire and milliseconds a step: plain DDP, torch's fp16 and PowerSGD hooks, and the hooks of Trilobe.

Each worker lives in a network namespace of its own; their veth interfaces meet on a bridge in one more. Bytes are those
that the kernel counts at a worker's interface, headers and acknowledgements included; rates are set by tc (tbf) on
what each worker sends. Needs Linux and root.

    sudo python benchmarks/train-bytes/run.py [--quick]
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import arguments, keep, versions  # type: ignore[import-not-found]

RATES = {"100 Mbit/s": ("100mbit", "64kb"), "1 Gbit/s": ("1gbit", "512kb"), "unshaped": ("", "")}
PEERS = ("ddp_fp32", "ddp_fp16", "ddp_power_sgd_1")
OURS = ("majority_vote", "signum", "ef_vote", "ef_sign", "stochastic_vote", "qsgd", "ef_top_k", "all_gather_vote")
SIZES = (3072, 340, 200, 10)  # 1,115,030 parameters, and little to compute at a batch of 2


def shell(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def make_namespaces(names: list[str]) -> None:
    """The first is the hub with a bridge; the others are workers 10.77.0.1, 10.77.0.2, ..."""
    hub = names[0]
    for name in names:
        shell("ip", "netns", "add", name)
        shell("ip", "-n", name, "link", "set", "lo", "up")
    shell("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
    shell("ip", "-n", hub, "link", "set", "bridge", "up")
    for i, name in enumerate(names[1:], start=1):
        shell("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", hub)
        shell("ip", "-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
        shell("ip", "-n", name, "link", "set", "eth0", "up")
        shell("ip", "-n", hub, "link", "set", f"port{i}", "master", "bridge", "up")


def counted() -> tuple[int, int]:
    """Bytes received and sent at eth0 of this process's namespace."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("eth0:"))
    fields = line.split(":")[1].split()
    return int(fields[0]), int(fields[8])


def set_rate(rate: str, burst: str) -> None:
    if rate:
        shell("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", burst, "latency", "300ms")
    else:
        subprocess.run(["tc", "qdisc", "del", "dev", "eth0", "root"], check=False, stderr=subprocess.DEVNULL)


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


def child(rank: int, workers: int, folder: str, quick: bool) -> None:
    """All rates and hooks, as one worker; worker 0 writes what it saw."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    seen: dict[str, Any] = {}
    for name, (rate, burst) in RATES.items():
        set_rate(rate, burst)
        dist.barrier()
        seen[name] = {"planner": predict(workers)}
        for hook in (*PEERS, *OURS):
            steps = 6 if quick or (rate == "100mbit" and hook in PEERS[:2]) else 20
            seen[name][hook] = measure(hook, steps)
    if rank == 0:
        Path(folder, "seen.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def run(workers: int, quick: bool) -> dict[str, Any]:
    """Namespaces up, workers through all rates and hooks, namespaces down again whatever happened."""
    names = [f"trilobe{os.getpid()}n{i}" for i in range(workers + 1)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    with tempfile.TemporaryDirectory() as folder:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            make_namespaces(names)
            for rank, name in enumerate(names[1:]):
                words = [sys.executable, __file__, "--child", str(rank), str(workers), folder, "quick" * quick]
                processes.append(subprocess.Popen(["ip", "netns", "exec", name, *words], env=quiet))
            for process in processes:
                if process.wait(timeout=400):
                    raise SystemExit(f"a worker ended with {process.returncode}")
            seen: dict[str, Any] = json.loads(Path(folder, "seen.json").read_text())
            return seen
        finally:
            for process in processes:
                process.kill()
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False)


def growth(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """kB that every worker receives in a step, gathering against two phases, computed and (where run) counted."""
    from trilobe.algorithms.parallel import Choices
    from trilobe.algorithms.parallel.planner import traffic

    n = sum((a + 1) * b for a, b in itertools.pairwise(SIZES))
    rows = []
    for workers in (2, 4, 8, 16):
        row: dict[str, Any] = {"workers": workers}
        for name, hook in (("all_gather", "all_gather_vote"), ("two_phase", "majority_vote")):
            choices = Choices(communicator=name)  # type: ignore[arg-type]
            row[f"{name}_kB"] = round(traffic(choices, n, workers)[0] / 1e3, 1)
            if str(workers) in measured:
                row[f"{name}_counted_kB"] = measured[str(workers)]["unshaped"][hook]["received_kB"]
        rows.append(row)
    return rows


def main() -> None:
    chosen = arguments(__doc__)
    if chosen.child:
        rank, workers, folder, *more = chosen.child
        child(int(rank), int(workers), folder, "quick" in more)
        return
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        print("skipped: network namespaces need root, and ip and tc (Debian's iproute2)", file=sys.stderr)
        return
    measured = {str(n): run(n, chosen.quick) for n in ((2,) if chosen.quick else (2, 4))}
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
            "growth": growth(measured),
        },
        "versions": versions("torch", "numpy"),
    }
    print(json.dumps(result, indent=1))
    keep(__file__, result, chosen)


if __name__ == "__main__":
    main()
