"""Steps and seconds to a target score: SGD, AdamW, Lion, Signum, SignSGD and EFSignSGD on five of our workloads.

In the spirit of AlgoPerf (Dahl et al. 2023, arXiv 2306.07179): a target on validation data for each workload, fixed
before the comparison; the same number of tuning trials for each optimizer; the best setting again with fresh seeds; a
performance profile over workloads. Seconds are processor seconds of this process (the machine is shared, and the run
may be paused), of training alone, without scoring. Each training run is appended to a file in the user's cache as soon
as it is done, so that a killed benchmark goes on.

``--child pilot`` only trains what the targets are fixed from.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import report
import torch
import workloads

from trilobe.algorithms.optim import EFSignSGD, Lion, SignSGD, Signum
from trilobe.errors import TrainingError
from trilobe.tasks.pretrained import default_cache

HERE = Path(__file__).parent
SHRINK = 3e-5  # share by which a weight shrinks at a step of the full learning rate: lr * weight_decay, for everybody
WARM, FIRST, LAST = 0.3, 1 / 25, 1 / 250_000  # of one cycle, as torch's OneCycleLR and the project's own training
TUNING, SCORINGS = 1000, 20
SEEDS = {"tabular": 8, "digits": 8, "fashion": 8, "text": 3, "tagger": 3}  # more where three left the winner open
# The middle of each optimizer's five learning rates, which are a factor of 10^0.5 apart: two decades.
MIDDLE = {"adamw": 1e-2, "sgd": 1e-1, "lion": 3e-3, "signum": 3e-3, "signsgd": 3e-3, "efsignsgd": 1.0}
HIGHER = {"text": 10**0.5, "tagger": 10**0.5}  # for all alike: AdamW's best was at the upper edge in a pilot
NAMES = ("tabular", "digits", "text", "fashion", "tagger")  # cheap ones first
Run = dict[str, Any]


def optimizer(name: str, net: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """An optimizer with its published momenta; a weight shrinks by SHRINK a step, whatever the method and ``lr``."""
    decay, ps = SHRINK / lr, list(net.parameters())
    makes: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(ps, lr, weight_decay=decay),
        "sgd": lambda: torch.optim.SGD(ps, lr, momentum=0.9, weight_decay=0.1 * decay),  # momentum makes ten of one
        "lion": lambda: Lion(ps, lr, weight_decay=decay),
        "signum": lambda: Signum(ps, lr, weight_decay=decay),
        "signsgd": lambda: SignSGD(ps, lr, weight_decay=decay),
        "efsignsgd": lambda: EFSignSGD(ps, lr, weight_decay=decay),
    }
    return makes[name]()


def one_cycle(step: int, total: int) -> float:
    """The factor of the learning rate at a step: up and down again along cosines (Smith and Topin 2018)."""
    top = WARM * total - 1
    a, b, share = (FIRST, 1.0, step / top) if step <= top else (1.0, LAST, (step - top) / (total - 1 - top))
    return b + (a - b) / 2 * (1 + math.cos(math.pi * share))


def train(work: workloads.Workload, name: str, lr: float, seed: int) -> Run:
    """One run: ``curve`` holds (step, processor seconds of training, score) at SCORINGS even places."""
    net, curve, used, failed = work.make(seed), list[tuple[int, float, float]](), 0.0, ""
    opt = optimizer(name, net, lr)
    marks = {round(work.steps * (i + 1) / SCORINGS) for i in range(SCORINGS)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout
        for step, batch in enumerate(work.batches(seed)):
            begin = time.process_time()
            net.train()
            for group in opt.param_groups:
                group["lr"] = lr * one_cycle(step, work.steps)
            loss = work.loss(net, batch)
            opt.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            try:
                opt.step()
            except TrainingError as e:
                failed = str(e).splitlines()[0]
            used += time.process_time() - begin
            if failed or not math.isfinite(float(loss.detach())):
                failed = failed or f"the loss is not finite at step {step + 1}"
                break
            if step + 1 in marks:
                net.eval()
                with torch.no_grad():
                    curve.append((step + 1, round(used, 4), round(work.score(net), 5)))
    return {"workload": work.name, "optimizer": name, "lr": lr, "seed": seed, "curve": curve, "failed": failed}


class Runs:
    """Runs that are done, by what they are; a new one is trained and kept at once."""

    def __init__(self, quick: bool) -> None:
        self.quick, self.done, self.works = quick, dict[tuple[Any, ...], Run](), dict[str, workloads.Workload]()
        self.path = default_cache().parent / "benchmarks" / "train-optimizers" / "runs.jsonl"
        if not quick and self.path.exists():
            for line in self.path.read_text("utf-8").splitlines():
                if line.endswith("}"):
                    self._note(json.loads(line))

    def get(self, name: str, opt: str, lr: float, seed: int) -> Run:
        """The run, from the file or trained now."""
        key = (name, opt, lr, seed)
        if key not in self.done:
            if name not in self.works:
                self.works[name] = workloads.build(name, self.quick)
            run = train(self.works[name], opt, lr, seed)
            if not self.quick:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as f:
                    f.write("\n" + json.dumps(run))
            self._note(run)
            last = run["curve"][-1] if run["curve"] else run["failed"]
            print(time.strftime("%H:%M:%S"), *key, last, file=sys.stderr, flush=True)
        return self.done[key]

    def _note(self, run: Run) -> None:
        self.done[run["workload"], run["optimizer"], run["lr"], run["seed"]] = run


def rates(opt: str, name: str, quick: bool = False) -> list[float]:
    """The learning rates tried with one optimizer on one workload, lowest first."""
    middle = MIDDLE[opt] * HIGHER.get(name, 1.0)
    return [float(f"{middle * 10 ** (i / 2):.2g}") for i in ((0,) if quick else (-2, -1, 0, 1, 2))]


def everything(runs: Runs) -> None:
    """All runs in the order in which they are worth most: first three seeds of everything, then more of the cheap."""
    for most in (3, max(SEEDS.values())):
        for name in NAMES:
            for opt in MIDDLE:
                tried = [runs.get(name, opt, lr, TUNING) for lr in rates(opt, name, runs.quick)]
                best = report.best(tried, workloads.TARGETS[name])
                for seed in range(1 if runs.quick else min(most, SEEDS[name])):
                    runs.get(name, opt, best["lr"], seed)


def result(runs: Runs) -> dict[str, Any]:
    """result.json, without machine and date, of whatever is done."""
    figures = report.figures(list(runs.done.values()), workloads.TARGETS, TUNING)
    wins = {name: f["winner"] for name, f in figures["workloads"].items()}
    return {
        "claim": "the project's default optimizer for a task is the one that reaches its target first",
        "command": "python benchmarks/train-optimizers/run.py",
        "figures": figures,
        "ratio": figures["scores"],
        "met": wins,  # nothing can be missed here: the target is whoever wins
        "peers": {"torch": torch.__version__, "of it": "SGD, AdamW"},
        "versions": common.versions("numpy", "torch", "scikit-learn"),
    }


def main() -> None:
    chosen = common.arguments(__doc__)
    common.needed(*workloads.NEEDS)
    torch.set_num_threads(1)
    runs = Runs(chosen.quick)
    if chosen.child == ["pilot"]:
        for name in NAMES:
            for lr in rates("adamw", name):
                runs.get(name, "adamw", lr, TUNING)
        return
    if chosen.child != ["report"]:
        everything(runs)
    out = result(runs)
    common.keep(__file__, out, chosen)
    words = report.tables(out["figures"])
    print(words)
    if not chosen.quick:
        report.fill(HERE / "README.md", words)
        report.draw(out["figures"], HERE / "curves.png")


if __name__ == "__main__":
    main()
