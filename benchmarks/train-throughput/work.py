"""What one worker of the throughput benchmark does: hooks and networks, a step timed, a training run to a target."""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import data  # type: ignore[import-not-found]
from namespaces import set_rate  # type: ignore[import-not-found]
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from trilobe.algorithms.parallel import (
    EF_SIGN,
    EF_VOTE,
    MAJORITY_VOTE,
    SIGNUM,
    STOCHASTIC_VOTE,
    Choices,
    State,
    compressed_hook,
    hook,
)

# rate and burst of tbf: what the link carries in about a millisecond may pass at once
RATES = {"100 Mbit/s": ("100mbit", "16kb"), "500 Mbit/s": ("500mbit", "64kb"), "1 Gbit/s": ("1gbit", "128kb")}
OVERLAP_RATES = {"10 Mbit/s": ("10mbit", "8kb"), "100 Mbit/s": ("100mbit", "16kb")}
PEERS = ("ddp_fp32", "ddp_fp16", "ddp_power_sgd_1")
OURS = {
    "majority_vote": MAJORITY_VOTE,
    "vote_ties_zero": Choices(ties="zero"),
    "signum": SIGNUM,
    "stochastic_vote": STOCHASTIC_VOTE,
    "ef_vote": EF_VOTE,
    "ef_sign": EF_SIGN,
}
HOOKS = (*PEERS, *OURS)
SIZES = (784, 1024, 300, 10)  # 1,114,350 parameters
BATCH, TARGET, EVERY, LONGEST = 32, 0.6, 10, 200
# learning rate and momentum of the optimizer: for bare signs, for gradients, and for hooks with momentum of their own
BARE = ((1e-4, 0.0), (2e-4, 0.0), (4e-4, 0.0), (8e-4, 0.0), (1.6e-3, 0.0))
FULL = ((0.0125, 0.9), (0.025, 0.9), (0.05, 0.9), (0.1, 0.0), (0.2, 0.0), (0.4, 0.0))
AVERAGED = ((0.1, 0.0), (0.2, 0.0), (0.4, 0.0), (0.8, 0.0), (1.6, 0.0), (3.2, 0.0))
SETTINGS = dict.fromkeys(PEERS, FULL) | {n: AVERAGED if c.has_errors else BARE for n, c in OURS.items()}


def perceptron(sizes: tuple[int, ...] = SIZES) -> torch.nn.Sequential:
    layers = [m for a, b in itertools.pairwise(sizes) for m in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers[:-1])


def convolutions() -> torch.nn.Sequential:
    """206,922 parameters in layers whose gradients differ in size."""
    nn = torch.nn
    front = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU())
    middle = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*front, *middle, nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10))


def wrapped(net: torch.nn.Module, name: str, choices: Choices | None = None, **more: Any) -> DistributedDataParallel:
    """``net`` under DDP with a hook; in one bucket, since PowerSGD hangs with several on gloo, unless told ``cap``."""
    cap = more.get("cap", 100)
    dist._DEFAULT_FIRST_BUCKET_BYTES = int(cap * (1 << 20))  # one megabyte otherwise, whatever the cap
    model = DistributedDataParallel(net, bucket_cap_mb=cap)
    if name == "ddp_fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif name == "ddp_power_sgd_1":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif name != "ddp_fp32":
        state = State(choices or OURS[name], overlap=more.get("overlap", True)).attach(model)
        model.register_comm_hook(state, compressed_hook)
    return model


@lru_cache(1)
def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fashion-MNIST: training images (bytes) and labels, then 1,000 others to measure the loss on."""
    with np.load(data("fashion_mnist") / "fashion_mnist.npz") as file:
        x, y = (torch.from_numpy(file[k]) for k in ("x_train", "y_train"))
        more, truth = (torch.from_numpy(file[k][:1000]) for k in ("x_test", "y_test"))
    return x.flatten(1), y.long(), scaled(more.flatten(1)), truth.long()


def scaled(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - 0.286) / 0.353


def timed(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each step: in every round each takes one turn, in an order that changes, so noise hits all alike.
    ``times`` is how often as fast as the first: the median over rounds of the two in the same round."""
    for step in steps.values():
        for _ in range(4):  # buckets are rebuilt, PowerSGD begins
            step()
    order, rng = list(steps), random.Random(0)
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            dist.barrier()
            seen[name].append(1e3 * (time.perf_counter() - start))
    first = seen[next(iter(steps))]
    table = {}
    for name, took in seen.items():
        low, middle, high = statistics.quantiles(took, n=4)
        ratio = statistics.median(a / b for a, b in zip(first, took, strict=True))
        row = {"ms": middle, "low": low, "high": high, "fastest": min(took), "times": ratio}
        table[name] = {k: round(v, 2) for k, v in row.items()}
    return table


def stepper(model: DistributedDataParallel, width: int, batch: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    x, y = torch.randn(batch, width), torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def steps(rank: int, quick: bool) -> dict[str, Any]:
    """Milliseconds a step for each rate and hook."""
    torch.manual_seed(0)
    all_hooks = {name: stepper(wrapped(perceptron(), name), SIZES[0], BATCH) for name in HOOKS}
    seen = {}
    for name, (rate, burst) in RATES.items():
        set_rate(rate, burst)
        seen[name] = timed(all_hooks, 4 if quick else 25)
    set_rate("", "")
    return seen


def overlap(rank: int, quick: bool) -> dict[str, Any]:
    """Eight equal layers in buckets of one layer, much to compute: with and without exchanging beside backward."""
    torch.manual_seed(0)
    sizes = (*[384] * 9, 10)
    ways = {
        "waits": ("majority_vote", {"cap": 0.5, "overlap": False}),
        "overlaps": ("majority_vote", {"cap": 0.5}),
        "one bucket": ("majority_vote", {}),
        "ddp_fp32": ("ddp_fp32", {"cap": 0.5}),
    }
    made = {k: stepper(wrapped(perceptron(sizes), hook, **more), sizes[0], 512) for k, (hook, more) in ways.items()}
    seen = {}
    for name, (rate, burst) in OVERLAP_RATES.items():
        set_rate(rate, burst)
        slow = name == "10 Mbit/s"  # full gradients take four seconds a step there
        chosen = {k: v for k, v in made.items() if not (slow and k == "ddp_fp32")}
        seen[name] = timed(chosen, 4 if quick else 15)
    set_rate("", "")
    return seen


def losses(
    model: DistributedDataParallel, lr: float, momentum: float, seed: int, rank: int, longest: int, target: float
) -> tuple[list[float], float]:
    """Losses on the other images, every ``EVERY`` steps until ``target`` is met, and seconds without the measuring."""
    x, y, more, truth = load()
    rng = torch.Generator().manual_seed(1000 * seed + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    seen, seconds = [], 0.0
    while len(seen) * EVERY < longest:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(EVERY):
            chosen = torch.randint(len(x), (BATCH,), generator=rng)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(scaled(x[chosen])), y[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        dist.barrier()
        seconds += time.perf_counter() - start
        loss = torch.zeros(1)
        if rank == 0:
            with torch.no_grad():
                loss[0] = torch.nn.functional.cross_entropy(model.module(more), truth)
        dist.broadcast(loss, 0)
        seen.append(round(float(loss), 4) if math.isfinite(float(loss)) else math.inf)
        if seen[-1] <= target or not seen[-1] < 10:
            break
    return seen, seconds


def train(name: str, setting: tuple[float, float], seed: int, rank: int, longest: int) -> tuple[int | None, float]:
    """Steps to the target, None where it was not met in ``longest`` steps, and seconds."""
    torch.manual_seed(seed)
    seen, seconds = losses(wrapped(perceptron(), name), *setting, seed, rank, longest, TARGET)
    return (len(seen) * EVERY if seen[-1] <= TARGET else None), seconds


def tune(rank: int, quick: bool) -> dict[str, Any]:
    """For each hook the setting with the fewest steps to the target, and the steps of three seeds."""
    seen = {}
    for name in HOOKS:
        settings = SETTINGS[name][2:3] if quick else SETTINGS[name]
        tried: dict[str, int | None] = {}
        best, fewest = None, LONGEST
        for setting in settings:
            steps, _ = train(name, setting, 0, rank, fewest)
            tried[str(setting)] = steps
            if steps is not None and (best is None or steps < fewest):
                best, fewest = setting, steps
        more = [] if quick or not best else [train(name, best, seed, rank, LONGEST)[0] for seed in (1, 2)]
        seen[name] = {"tried": tried, "best": best, "steps": [tried[str(best)], *more] if best else []}
    return seen


def target(rank: int, quick: bool, settings: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Seconds to the target at 100 Mbit/s, really run, with the settings given; seed 0."""
    set_rate(*RATES["100 Mbit/s"])
    seen = {}
    for name, setting in settings.items():
        reached, seconds = train(name, setting, 0, rank, 20 if quick else LONGEST)
        seen[name] = {"steps": reached, "seconds": round(seconds, 2)}
    set_rate("", "")
    return seen


def blocks_of(size: int) -> Callable[..., Any]:
    """The pieces that have a scale of their own, no longer than ``size``."""
    plain = hook._pieces

    def shorter(sizes: tuple[int, ...], chunk: int, split: int) -> tuple[tuple[int, ...], ...]:
        cut = [[min(size, n - i) for n in row for i in range(0, n, size)] for row in plain(sizes, chunk, split)]
        return tuple(map(tuple, cut))

    return shorter


def scales(rank: int, quick: bool) -> dict[str, Any]:
    """A convolutional network by error feedback with one scale for a message, a parameter, a block: the loss around
    step 140 of 150, the best of three learning rates on seed 0, then three seeds. Errors alone are remembered."""
    length, seen, plain = 20 if quick else 150, {}, hook._pieces
    ways: list[tuple[str, Choices | None, str]] = [("ddp_fp32", None, "")]
    still = {n: replace(OURS[n], memory="error_feedback", nu=1.0) for n in ("ef_sign", "ef_vote")}
    ways += [(n, replace(c, scale_per="message"), "message") for n, c in still.items()]
    ways += [(n, c, per) for n, c in still.items() for per in ("parameter", "block of 512")]
    for name, choices, per in ways:
        hook._pieces = blocks_of(512) if per.startswith("block") else plain  # type: ignore[assignment]

        def end(lr: float, seed: int, name: str = name, choices: Choices | None = choices) -> float:
            torch.manual_seed(seed)
            model = wrapped(convolutions(), name, choices)
            found, _ = losses(model, lr, 0.0, seed, rank, length, -1.0)
            return statistics.fmean(found[-3:])

        tried = {str(lr): end(lr, 0) for lr in ((0.1,) if quick else (0.03, 0.1, 0.3))}
        best = min(tried, key=lambda k: tried[k])
        more = [] if quick else [end(float(best), seed) for seed in (1, 2)]
        seen[f"{name} {per}".strip()] = {"tried": tried, "lr": float(best), "loss": [tried[best], *more]}
    hook._pieces = plain
    return seen
