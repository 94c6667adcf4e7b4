"""SignSGD's measured rate against the bound of its theorem, and the time of one step against torch's own optimizers.

1. Rate. f(x) = 1/2 sum_i L_i x_i^2 has the coordinate-wise constants L of theorem 1 (Bernstein et al. 2018) exactly,
   f* = 0 and true gradients L x; Gaussian noise of known sigma_i is added per sample. For K steps with
   lr = 1 / sqrt(|L|_1 K) and batches of K samples (their mean is drawn directly: N(0, sigma_i^2 / K)), the mean of
   |g_k|_1 over the steps and over independent runs, squared, must lie under the bound.
2. Time. Median processor milliseconds of optimizer.step() on a network of 1.1 million weights and on large tensors,
   all optimizers within each repetition, in random order, one thread; beside it one forward and backward pass of that
   network.
"""

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import arguments, estimate, keep, versions

from trilobe.algorithms.optim import EFSignSGD, Lion, SignSGD, Signum
from trilobe.files import write_atomically

HERE = Path(__file__).parent
STEPS = (10, 32, 100, 316, 1000, 3162, 10000)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Problem:
    """A quadratic: curvatures ``L``, noise ``sigma`` of one sample's gradient, starting point ``x0``, all ``(d,)``."""

    name: str
    L: Array
    sigma: Array
    x0: Array

    def bound(self, K: int) -> float:
        """The right side of theorem 1 with N = K^2."""
        f0 = 0.5 * float(np.sum(self.L * self.x0**2))
        return (math.sqrt(self.L.sum()) * (f0 + 0.5) + 2 * float(self.sigma.sum())) ** 2 / K


def problems() -> list[Problem]:
    """From where the bound is tight to where it is loose."""
    uneven = np.logspace(-2, 0, 32)
    spike = np.where(np.arange(32) < 2, 1.0, 0.0)
    return [
        Problem("one coordinate, no noise", np.ones(1), np.zeros(1), np.ones(1)),
        Problem("32 coordinates, noise on two", uneven, spike, np.full(32, 0.3)),
        Problem("32 coordinates, noise on all", uneven, np.full(32, 0.5), np.full(32, 0.3)),
    ]


def measure_rate(problem: Problem, K: int, runs: int, seed: int) -> Array:
    """The mean over K steps of |g_k|_1, for each of ``runs`` independent runs: ``(runs,)``."""
    rng = torch.Generator().manual_seed(seed)
    L, sigma = (torch.tensor(a).expand(runs, -1) for a in (problem.L, problem.sigma))
    x = nn.Parameter(torch.tensor(problem.x0).repeat(runs, 1))  # signs act on each entry: the rows are separate runs
    optimizer = SignSGD([x], lr=1 / math.sqrt(problem.L.sum() * K))
    total = torch.zeros(runs, dtype=torch.float64)
    for _ in range(K):
        true = L * x.detach()
        total += true.abs().sum(dim=1)
        x.grad = true + sigma / math.sqrt(K) * torch.randn(x.shape, generator=rng, dtype=torch.float64)
        optimizer.step()
    return (total / K).numpy()


def rates(steps: Sequence[int], runs: int) -> list[dict[str, Any]]:
    """For each problem and K: the measured left side of theorem 1 with its interval, and the bound."""
    out = []
    for problem in problems():
        rows = []
        for K in steps:
            mean = estimate(measure_rate(problem, K, runs, seed=K), digits=15)
            squared = {k: mean[k] ** 2 for k in ("mean", "low", "high")}
            rows.append({"K": K, **squared, "bound": problem.bound(K), "share": squared["mean"] / problem.bound(K)})
        xs, ys = np.log10([r["K"] for r in rows]), np.log10([r["mean"] for r in rows])
        slope = float(np.polyfit(xs[len(xs) // 2 :], ys[len(xs) // 2 :], 1)[0])
        out.append({"problem": problem.name, "runs": runs, "rows": rows, "slope": slope})
    return out


def network() -> nn.Module:
    """A small convolutional network for 32 x 32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(128, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(256, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(1024, 150), nn.ReLU(), nn.Linear(150, 10),
    )  # fmt: skip


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    """What is timed, by name: torch's own, then ours as they come, without the check, at once and one by one."""
    makes: dict[str, Callable[[Any], torch.optim.Optimizer]] = {}
    for way, how in (("foreach", {"foreach": True}), ("loop", {"foreach": False}), ("fused", {"fused": True})):
        makes[f"torch.SGD, momentum 0.9, {way}"] = lambda p, h=how: torch.optim.SGD(p, 1e-4, momentum=0.9, **h)
        makes[f"torch.AdamW, {way}"] = lambda p, h=how: torch.optim.AdamW(p, 1e-4, **h)
    kinds: list[Any] = [SignSGD, Signum, EFSignSGD, Lion]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        (", check_finite=False", {"check_finite": False}),
        (", foreach=True", {"foreach": True}),
        (", foreach=False", {"foreach": False}),
    ]
    for kind in kinds:
        makes |= {f"{kind.__name__}{word}": lambda p, k=kind, h=how: k(p, 1e-4, **h) for word, how in ways}
    return makes


def step_times(repetitions: int) -> dict[str, Any]:
    """Quartiles of one step in processor milliseconds, on two sets of weights."""
    sets = {"network": [p.shape for p in network().parameters()], "wide": [torch.Size((768, 768))] * 8}
    out: dict[str, Any] = {"repetitions": repetitions, "forward_backward_64_ms": pass_time()}
    for kind, shapes in sets.items():
        ready = {}
        for name, make in optimizers().items():
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(s)) for s in shapes]
            for p in params:
                p.grad = 0.01 * torch.randn_like(p)
            ready[name] = make(params)
        times: dict[str, list[float]] = {name: [] for name in ready}
        order = random.Random(0)
        for repetition in range(repetitions + 3):
            for name, optimizer in order.sample(list(ready.items()), len(ready)):  # a step pays for the one before
                begin = time.thread_time()  # not disturbed by what else the machine does
                optimizer.step()
                if repetition >= 3:  # the state is made
                    times[name].append(1e3 * (time.thread_time() - begin))
        rows = {n: [round(q, 3) for q in statistics.quantiles(t, n=4)] for n, t in times.items()}
        out[kind] = {"weights": sum(s.numel() for s in shapes), "tensors": len(shapes), "ms_quartiles": rows}
    return out


def pass_time(batch: int = 64, repetitions: int = 5) -> float:
    """Median processor milliseconds of one forward and backward pass on ``batch`` images."""
    module, times = network(), []
    for _ in range(repetitions):
        begin = time.thread_time()
        module(torch.randn(batch, 3, 32, 32)).square().mean().backward()
        times.append(1e3 * (time.thread_time() - begin))
    return round(statistics.median(times), 1)


def chart(result: dict[str, Any]) -> str:
    """Measured (dots, solid) against bound (dashed) over K, both axes logarithmic, one panel for each problem."""
    wide, tall, top, bottom = 240, 300, 44, 250
    decades = range(-5, 5)
    points = [v for r in result["figures"]["rate"] for row in r["rows"] for v in (row["mean"], row["bound"])]
    low, high = math.floor(math.log10(min(points))), math.ceil(math.log10(max(points)))
    y_at = lambda v: bottom - (math.log10(v) - low) / (high - low) * (bottom - top)  # noqa: E731
    parts, told = [], []
    for i, r in enumerate(result["figures"]["rate"]):
        left = 62 + i * (wide + 12)
        right = left + wide - 30
        x_at = lambda k, a=left, b=right: a + 10 + (math.log10(k) - 1) / 3 * (b - a - 20)  # noqa: E731
        parts.append(f'<text x="{left}" y="20" style="font-weight:600">{escape(r["problem"])}</text>')
        for d in (d for d in decades if low <= d <= high):
            y = y_at(10.0**d)
            parts.append(f'<path d="M{left} {y:.1f}H{right}" style="stroke:#d3d8db"/>')
            if i == 0:
                parts.append(
                    f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#59636b">{10.0**d:g}</text>'
                )
        for k in (10, 100, 1000, 10000):
            parts.append(f'<text x="{x_at(k):.1f}" y="{bottom + 20}" text-anchor="middle" fill="#59636b">{k:,}</text>')
        lines = {key: [f"{x_at(row['K']):.1f},{y_at(row[key]):.1f}" for row in r["rows"]] for key in ("bound", "mean")}
        parts.append(
            f'<polyline points="{" ".join(lines["bound"])}" '
            'style="fill:none;stroke:#59636b;stroke-width:1.6;stroke-dasharray:6 4"/>'
            f'<polyline points="{" ".join(lines["mean"])}" style="fill:none;stroke:#14599c;stroke-width:2.2"/>'
        )
        parts += ['<circle cx="{}" cy="{}" r="3" fill="#14599c"/>'.format(*p.split(",")) for p in lines["mean"]]
        y, label = y_at(r["rows"][3]["bound"]), "bound" if r["rows"][3]["share"] < 0.9 else "bound, reached"
        parts.append(f'<text x="{x_at(500):.1f}" y="{y - 8:.1f}" fill="#59636b">{label}</text>')
        y = y_at(r["rows"][2]["mean"])
        parts.append(f'<text x="{x_at(90):.1f}" y="{y + 24:.1f}" fill="#14599c" text-anchor="end">measured</text>')
        told.append(f"{r['problem']}: " + ", ".join(f"{100 * row['share']:.1f}% at {row['K']}" for row in r["rows"]))
    width = 62 + 3 * (wide + 12)
    words = "Square of the mean of |g|_1, measured and bounded, over steps K. Measured as a share of the bound: "
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" role="img" '
        'style="background:#fff;font:13px system-ui,sans-serif" fill="#1d2327">'
        f"<title>SignSGD: measured against the bound of theorem 1</title><desc>{escape(words + '; '.join(told))}</desc>"
        f"{''.join(parts)}"
        f'<text x="{width / 2}" y="{tall - 8}" text-anchor="middle" fill="#59636b">steps K = batch size '
        "(both axes logarithmic; upwards: the square of E[mean |g|_1])</text></svg>\n"
    )


def main() -> None:
    chosen = arguments(__doc__)
    torch.set_num_threads(1)
    steps, runs = (STEPS[:5], 50) if chosen.quick else (STEPS, 200)
    rate, times = rates(steps, runs), step_times(20 if chosen.quick else 150)
    share = max(row["share"] for r in rate for row in r["rows"])
    rounding = 1 + 1e-9  # where the theorem is an equality
    met = all(row["high"] <= row["bound"] * rounding for r in rate for row in r["rows"])
    result = {
        "claim": "SignSGD converges as its theorem says: the measured mean of |g|_1, squared, lies under the bound",
        "figures": {"rate": rate, "step": times},
        "ratio": round(share, 4),
        "ratio_of": "the largest measured value as a share of its bound",
        "target": "the upper limit of every interval <= its bound",
        "met": met,
        "peers": {"rate": "the bound of theorem 1", "step": f"torch {torch.__version__}"},
        "versions": versions("torch", "numpy"),
    }
    print("| problem | K | measured | bound | share of the bound |\n|---|---|---|---|---|")
    for r in rate:
        for row in r["rows"]:
            cells = [f"{row['mean']:.3g} [{row['low']:.3g}, {row['high']:.3g}]", f"{row['bound']:.3g}"]
            print("|", " | ".join([r["problem"], f"{row['K']:,}", *cells, f"{100 * row['share']:.1f}%"]), "|")
        print(f"slope over the larger K: {r['slope']:.2f}", file=sys.stderr)
    print(f"\nOne forward and backward pass on 64 images: {times['forward_backward_64_ms']} ms.")
    heads = [f"{times[k]['weights'] / 1e6:.1f} M weights in {times[k]['tensors']} tensors" for k in ("network", "wide")]
    print(f"\n| optimizer | {' | '.join(heads)} |\n|---|---|---|")
    for name in times["network"]["ms_quartiles"]:
        cells = ["{1:.2f} ({0:.2f} to {2:.2f})".format(*times[k]["ms_quartiles"][name]) for k in ("network", "wide")]
        print(f"| {name} | {' | '.join(cells)} |")
    if not chosen.quick and not chosen.to:
        write_atomically(HERE / "rate.svg", chart(result).encode())
    keep(__file__, result, chosen)


if __name__ == "__main__":
    main()
