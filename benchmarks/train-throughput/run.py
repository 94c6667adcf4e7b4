"""Step time and time to a target loss under limited links: plain DDP, torch's fp16 and PowerSGD hooks, and ours.

Each worker is a process in a network namespace (see train-bytes). ``--part NAME`` runs one part and keeps it in
result.json beside the others; without it all parts run. Needs Linux, root and Fashion-MNIST (TRILOBE_DATA).

    sudo -E python benchmarks/train-throughput/run.py [--quick]
"""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import namespaces  # type: ignore[import-not-found]
from common import arguments, keep, needed, versions  # type: ignore[import-not-found]

HERE = Path(__file__).parent
PARTS = {  # name: what workers do, and how many of them; the last needs what another found
    "scales 3": ("scales", 3),
    "tune 2": ("tune", 2),
    "tune 4": ("tune", 4),
    "steps 2": ("steps", 2),
    "steps 4": ("steps", 4),
    "overlap 2": ("overlap", 2),
    "target 2": ("target", 2),
}


def child(rank: int, workers: int, folder: str, what: str, quick: bool, given: dict[str, Any]) -> None:
    """One worker; worker 0 writes what it saw."""
    import torch
    import torch.distributed as dist
    import work  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    seen = getattr(work, what)(rank, quick, **({"settings": given} if given else {}))
    if rank == 0:
        Path(folder, "seen.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def run_part(part: str, quick: bool, parts: dict[str, Any]) -> dict[str, Any]:
    """One part, with the load of the machine before and after."""
    what, workers = PARTS[part]
    given = {}
    if what == "target":
        given = {name: row["best"] for name, row in parts[f"tune {workers}"]["seen"].items() if row["best"]}
    before = os.getloadavg()[0]
    words = [what, "quick" if quick else "whole", json.dumps(given)]
    seen = namespaces.run(str(Path(__file__).resolve()), workers, words, timeout=1500)
    return {"seen": seen, "load": [round(before, 1), round(os.getloadavg()[0], 1)]}


def to_target(parts: dict[str, Any]) -> dict[str, Any]:
    """Median steps over seeds, times the median step, for each link: seconds, and how often as fast as plain DDP."""
    table: dict[str, Any] = {}
    for workers in (2, 4):
        if not {f"tune {workers}", f"steps {workers}"} <= parts.keys():
            continue
        for link, steps in parts[f"steps {workers}"]["seen"].items():
            row = {}
            for name, tuned in parts[f"tune {workers}"]["seen"].items():
                if name in steps and tuned["steps"] and None not in tuned["steps"]:
                    row[name] = round(statistics.median(tuned["steps"]) * steps[name]["ms"] / 1e3, 2)
            table[f"{workers} workers, {link}"] = dict(sorted(row.items(), key=lambda kv: kv[1]))
    return table


def report(parts: dict[str, Any]) -> dict[str, Any]:
    """The result as it is kept: the target of five times plain all-reduce, and every part."""
    slow = [parts[p]["seen"]["100 Mbit/s"] for p in ("steps 2", "steps 4") if p in parts]
    ratio = min((s["majority_vote"]["times"] for s in slow), default=0.0)
    return {
        "claim": "at 100 Mbit/s a step with a majority vote takes a fifth of plain all-reduce or less",
        "ratio": ratio,
        "target": "at least 5 times as fast",
        "met": ratio >= 5,
        "peers": ["ddp_fp32", "ddp_fp16", "ddp_power_sgd_1"],
        "figures": {"seconds_to_target": to_target(parts), "parts": parts},
        "versions": versions("torch", "numpy"),
    }


def main() -> None:
    part = None
    if "--part" in sys.argv:
        at = sys.argv.index("--part")
        part = sys.argv[at + 1]
        del sys.argv[at : at + 2]
    chosen = arguments(__doc__)
    if chosen.child:
        rank, workers, folder, what, quick, given = chosen.child
        child(int(rank), int(workers), folder, what, quick == "quick", json.loads(given))
        return
    needed("fashion_mnist")
    if not namespaces.usable():
        return
    kept = chosen.to or HERE / "result.json"
    parts = json.loads(kept.read_text())["figures"]["parts"] if part and kept.exists() else {}
    quick = ("tune 2", "steps 2", "overlap 2", "target 2")
    for name in [part] if part else quick if chosen.quick else PARTS:
        parts[name] = run_part(name, chosen.quick, parts)
        result = report(parts)
        keep(__file__, result, chosen)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
