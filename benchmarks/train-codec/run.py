"""Packing, unpacking and voting on signs, in GB of float32 gradient a second on one core, beside a copy of the same.

OMP_NUM_THREADS=1 python benchmarks/train-codec/run.py [--quick]
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import arguments, keep, versions  # type: ignore[import-not-found]

SIZES = {"1 M": 1 << 20, "16 M": 1 << 24}


def rates(work: dict[str, Callable[[], object]], gigabytes: float, rounds: int) -> dict[str, float]:
    """GB/s of each, the median over ``rounds`` in which all take turns, so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, f in work.items():
            start = time.perf_counter()
            f()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: round(gigabytes / statistics.median(t), 1) for name, t in times.items()}


def measure(n: int, rounds: int) -> dict[str, float]:
    """All rates for ``n`` coordinates; a vote of k workers counts as k gradients."""
    import torch

    from trilobe.algorithms.parallel.codec import (
        majority,
        pack,
        pack_by_torch,
        packed_size,
        unpack,
        unpack_by_torch,
        unpack_each,
    )
    from trilobe.algorithms.parallel.compressors import mean_absolute

    x, out, copy = torch.randn(n), torch.empty(n), torch.empty(n)
    bits = torch.empty(packed_size(n), dtype=torch.uint8)
    copy_bits, noise = torch.empty_like(bits), torch.randint(-(2**62), 2**62, (15, n // 64))
    pieces = [n // 12] * 11 + [n - 11 * (n // 12)]  # bounds within bytes
    seen = rates(
        {
            "copy_into": lambda: copy.copy_(x),
            "clone": x.clone,
            "pack": lambda: pack(x, bits),
            "unpack": lambda: unpack(bits, n, 0.5, out),
            "unpack_12_scales": lambda: unpack_each(bits, [0.5] * 12, pieces, out),
            "pack_torch_path": lambda: pack_by_torch(x),
            "unpack_torch_path": lambda: unpack_by_torch(bits, n),
            "mean_absolute": lambda: mean_absolute(x),
        },
        4 * n / 1e9,
        rounds,
    )
    for k in (3, 7, 15):
        votes = list(noise[:k])
        seen |= {f"vote_{k}": rates({"v": lambda votes=votes: majority(votes)}, 4 * n * k / 1e9, rounds)["v"]}
        seen |= {f"vote_{k}_packed": round(seen[f"vote_{k}"] / 32, 2)}
    seen["copy_packed"] = rates({"c": lambda: copy_bits.copy_(bits)}, n / 8 / 1e9, rounds)["c"]
    return seen


def main() -> None:
    import torch

    chosen = arguments(__doc__)
    torch.set_num_threads(1)
    seen = {name: measure(n, 5 if chosen.quick else 31) for name, n in SIZES.items()}
    shares = {
        name: {k: round(s[k] / s["copy_into"], 2) for k in ("pack", "unpack", "unpack_12_scales", "vote_3", "vote_15")}
        for name, s in seen.items()
    }
    ratio = min(v for share in shares.values() for v in share.values())
    result = {
        "claim": "packing, unpacking and voting run at half the rate of a copy or more, on one core",
        "ratio": ratio,
        "target": "at least half the rate of a copy",
        "met": ratio >= 0.5,
        "peers": ["torch copy_"],
        "figures": {"GB_per_s": seen, "share_of_copy": shares},
        "versions": versions("torch", "numpy"),
    }
    print(json.dumps(result, indent=1))
    keep(__file__, result, chosen)


if __name__ == "__main__":
    main()
