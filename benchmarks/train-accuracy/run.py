"""Accuracy after equal epochs: majority vote and its variants against tuned SGD, on Fashion-MNIST and CIFAR-10.

Five workers of 20 images a step, simulated one after another in one process (simulate.py; ``--child check`` compares
it with the real hook among three real processes, and every run ends with that). All methods see the same
images in the same order from the same first weights, under the same schedule; each is tuned with the same number of
learning rates on a seed of its own, by accuracy on images held out from training; the test images are looked at once,
after the last epoch, with fresh seeds. Each training run is appended to a file in the user's cache as soon as it is
done, so that a killed benchmark goes on.
"""

import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import numpy as np  # noqa: E402
import simulate  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from trilobe.algorithms.fit import belief_loss  # noqa: E402
from trilobe.algorithms.parallel import (  # noqa: E402
    EF_SIGN,
    EF_TOP_K,
    EF_VOTE,
    MAJORITY_VOTE,
    PRESETS,
    QSGD,
    SIGNUM,
    STOCHASTIC_VOTE,
    Choices,
)
from trilobe.tasks.image_classification.model import network  # noqa: E402
from trilobe.tasks.pretrained import default_cache  # noqa: E402

WORKERS, BATCH, TUNING, SEEDS, MARGIN = 5, 20, 1000, (0, 1, 2), 1.0
WARM, FIRST, LAST = 0.3, 1 / 25, 1 / 250_000  # of one cycle, as torch's OneCycleLR and the project's own training
TRAIN, HELD, TEST, EPOCHS, WIDTH = 6_000, 2_000, 10_000, 4, 8
SETS = {"fashion-mnist": "fashion_mnist", "cifar-10": "cifar10"}
Run = dict[str, Any]
# The average over time that most presets compress, with nothing compressed.
QUASI = Choices(compressor="none", memory="momentum", communicator="all_reduce", aggregate="mean", nu=EF_SIGN.nu)
# Method: what the workers exchange, the momentum of the SGD that applies it, and the lowest of six learning rates.
METHODS: dict[str, tuple[Choices | Literal["power_sgd"] | None, float, float]] = {
    "sgd": (None, 0.9, 1e-2),
    "sgd_nesterov": (None, 0.9, 1e-2),
    "sgd_quasi": (QUASI, 0.0, 1e-1),
    "majority_vote": (MAJORITY_VOTE, 0.0, 3e-3),
    "signum": (SIGNUM, 0.0, 3e-3),
    "ef_vote": (EF_VOTE, 0.0, 1e-1),
    "ef_sign": (EF_SIGN, 0.0, 1e-1),
    "power_sgd": ("power_sgd", 0.0, 1e-1),
    "ef_top_k": (EF_TOP_K, 0.0, 1e-1),
    "qsgd": (QSGD, 0.0, 1e-1),
    "stochastic_vote": (STOCHASTIC_VOTE, 0.0, 3e-3),
}
TITLES = {"sgd": "SGD, momentum 0.9, float32", "sgd_nesterov": "SGD, Nesterov's momentum 0.9, float32",
          "sgd_quasi": "SGD, quasi-hyperbolic momentum, float32", "majority_vote": "majority vote",
          "signum": "Signum, majority vote", "ef_vote": "`ef_vote`: error feedback, vote",
          "ef_sign": "`ef_sign`: error feedback, mean", "power_sgd": "PowerSGD, rank 1 (peer)",
          "ef_top_k": "`ef_top_k`: the largest 1/32", "qsgd": "`qsgd`: 4 bits",
          "stochastic_vote": "`stochastic_vote`: signs with noise"}  # fmt: skip
MARKS = ("<!-- table: run.py writes what stands between -->", "<!-- end of table -->")


def images(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X and y to train on (the held-out ones last), X and y to test with; halved to 14 x 14 or 16 x 16, in 0..1."""
    folder, n = common.data(SETS[name]), TRAIN + HELD
    if name == "fashion-mnist":
        held = np.load(folder / "fashion_mnist.npz")
        parts = [(held["x_train"][:n, None], held["y_train"][:n]), (held["x_test"][:TEST, None], held["y_test"][:TEST])]
    else:
        parts = [_jpeg(folder / f"cifar10_{part}.npz", k) for part, k in (("train_1of2", n), ("test", TEST))]
    out = []
    for x, y in parts:
        small = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean(axis=(3, 5)) / 255
        out += [torch.from_numpy(small.astype(np.float32)), torch.from_numpy(y.astype(np.int64))]
    return out[0], out[1], out[2], out[3]


def _jpeg(path: Path, n: int) -> tuple[Any, Any]:
    from PIL import Image

    held = np.load(path)
    blob, at = held["jpeg"].tobytes(), held["offsets"]
    read = [np.asarray(Image.open(io.BytesIO(blob[at[i] : at[i + 1]])).convert("RGB")) for i in range(n)]
    return np.stack(read).transpose(0, 3, 1, 2), held["labels"][:n]


class Data:
    """One set, and the order in which a seed sees it."""

    def __init__(self, name: str, train: int = TRAIN, epochs: int = EPOCHS, test: int = TEST) -> None:
        self.name, self.epochs, self.train = name, epochs, train
        self.x, self.y, self.x_test, self.y_test = images(name)
        self.x_test, self.y_test = self.x_test[:test], self.y_test[:test]
        self.told = nn.functional.one_hot(self.y, 10).float()
        self.total = epochs * (train // (WORKERS * BATCH))

    def order(self, seed: int) -> Tensor:
        """Indices ``(steps, workers, batch)``: every image once an epoch."""
        rng = np.random.default_rng(seed)
        epoch = self.total // self.epochs * WORKERS * BATCH
        rows = [rng.permutation(self.train)[:epoch].reshape(-1, WORKERS, BATCH) for _ in range(self.epochs)]
        return torch.from_numpy(np.concatenate(rows))

    def accuracy(self, net: nn.Module, test: bool) -> float:
        """The share right of the test images, or of those held out from training."""
        x, y = (self.x_test, self.y_test) if test else (self.x[TRAIN:], self.y[TRAIN:])
        net.eval()
        with torch.no_grad():
            return float((torch.cat([net(part) for part in x.split(500)]).argmax(1) == y).float().mean())


def one_cycle(step: int, total: int) -> float:
    """The factor of the learning rate at a step: up and down again along cosines (Smith and Topin 2018)."""
    top = WARM * total - 1
    a, b, share = (FIRST, 1.0, step / top) if step <= top else (1.0, LAST, (step - top) / (total - 1 - top))
    return b + (a - b) / 2 * (1 + math.cos(math.pi * share))


def train(data: Data, method: str, lr: float, seed: int) -> Run:
    """One run: accuracy on the images held out, and for a seed that is not for tuning on the test images."""
    choices, momentum, _ = METHODS[method]
    spec = dict(zip(("channels", "height", "width"), data.x.shape[1:], strict=True))
    net, order, begin = network(spec, 10, width=WIDTH, seed=seed), data.order(seed), time.process_time()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=momentum, nesterov=method == "sgd_nesterov")
    shapes = [p.shape for p in net.parameters()]
    exchange: simulate.Exchange | simulate.PowerSGD = (
        simulate.PowerSGD(WORKERS, shapes)
        if choices == "power_sgd"
        else simulate.Exchange(choices, WORKERS, [shape.numel() for shape in shapes], seed)
    )

    def loss(net: nn.Module, worker: int, step: int) -> Tensor:
        at = order[step, worker]
        return belief_loss(net(data.x[at]), data.told[at])

    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout
        net.train()
        optimizer.param_groups[0]["lr"] = lr * one_cycle(0, data.total)
        for value in simulate.steps(net, loss, optimizer, exchange, WORKERS, data.total):
            losses.append(value)
            optimizer.param_groups[0]["lr"] = lr * one_cycle(min(len(losses), data.total - 1), data.total)
    return {
        "set": data.name,
        "method": method,
        "exchange": _exchange(method),
        "lr": lr,
        "seed": seed,
        "held_out": round(data.accuracy(net, test=False), 5),
        "test": None if seed == TUNING else round(data.accuracy(net, test=True), 5),
        "loss": round(float(np.mean(losses[-20:])), 5),
        "steps": len(losses),
        "seconds": round(time.process_time() - begin, 2),
    }


def _exchange(method: str) -> str:
    """What the method was, to be kept with its runs."""
    return str(METHODS.get(method, ("", 0, 0))[:2])


class Runs:
    """Runs that are done, by what they are; a new one is trained and kept at once."""

    def __init__(self, quick: bool) -> None:
        self.quick, self.done, self.data = quick, dict[tuple[Any, ...], Run](), dict[str, Data]()
        self.path = default_cache().parent / "benchmarks" / "train-accuracy" / "runs.jsonl"
        if not quick and self.path.exists():
            for line in self.path.read_text("utf-8").splitlines():
                run = json.loads(line) if line.endswith("}") else {}
                if run and run.get("exchange") == _exchange(run["method"]):  # else the method was another one then
                    self._note(run)

    def get(self, name: str, method: str, lr: float, seed: int) -> Run:
        """The run, from the file or trained now."""
        key = (name, method, lr, seed)
        if key not in self.done:
            if name not in self.data:
                self.data[name] = Data(name, 1000, 1, 500) if self.quick else Data(name)
            run = train(self.data[name], method, lr, seed)
            if not self.quick:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as f:
                    f.write("\n" + json.dumps(run))
            self._note(run)
            print(
                time.strftime("%H:%M:%S"),
                *key,
                run["held_out"],
                run["test"],
                run["seconds"],
                file=sys.stderr,
                flush=True,
            )
        return self.done[key]

    def _note(self, run: Run) -> None:
        self.done[run["set"], run["method"], run["lr"], run["seed"]] = run

    def tuned(self, name: str, method: str) -> list[Run]:
        """The trials of a method that are done, by learning rate."""
        trials = [r for r in self.done.values() if (r["set"], r["method"], r["seed"]) == (name, method, TUNING)]
        return sorted(trials, key=lambda r: float(r["lr"]))


def rates(method: str, quick: bool = False) -> list[float]:
    """The learning rates tried with one method, a factor of 10^0.5 apart."""
    return [float(f"{METHODS[method][2] * 10 ** (i / 2):.2g}") for i in ((2,) if quick else range(6))]


def everything(runs: Runs) -> None:
    """All runs, one method after another."""
    for method, name in ((m, n) for m in METHODS for n in SETS):
        for lr in rates(method, runs.quick):
            runs.get(name, method, lr, TUNING)
        best = max(runs.tuned(name, method), key=lambda r: r["held_out"])["lr"]
        for seed in SEEDS[:1] if runs.quick else SEEDS:
            runs.get(name, method, best, seed)


def interval(values: list[float], digits: int = 2) -> dict[str, float]:
    """Mean and 95% interval of Student's t, as few seeds deserve."""
    from scipy.stats import t

    x = np.array(values)
    mean = {"mean": round(float(x.mean()), digits), "n": len(x)}
    if len(x) < 2:
        return mean
    half = float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return mean | {"low": round(float(x.mean()) - half, digits), "high": round(float(x.mean()) + half, digits)}


def figures(runs: Runs) -> dict[str, Any]:
    """Per set and method: the learning rate, test accuracy, and how many points it is above SGD, seed by seed."""
    out: dict[str, Any] = {}
    for name in SETS:
        tried = {m: runs.tuned(name, m) for m in METHODS}
        chosen = {m: max(trials, key=lambda r: r["held_out"])["lr"] for m, trials in tried.items() if trials}
        scores: dict[str, dict[int, float]] = {}
        for r in runs.done.values():
            if r["set"] == name and r["test"] is not None and r["lr"] == chosen[r["method"]]:
                scores.setdefault(r["method"], {})[r["seed"]] = 100 * r["test"]
        rows = {}
        for method in (m for m in METHODS if m in scores and scores.keys() >= {"sgd", "sgd_nesterov"}):
            own, lr, trials = scores[method], chosen[method], tried[method]
            over, harder = (
                [own[s] - scores[peer][s] for s in sorted(own.keys() & scores[peer].keys())]
                for peer in ("sgd", "sgd_nesterov")
            )
            rows[method] = {
                "lr": lr,
                "at_edge": lr in (trials[0]["lr"], trials[-1]["lr"]),
                "trials": [{k: r[k] for k in ("lr", "held_out", "loss")} for r in trials],
                "accuracy": interval(list(own.values())),
                "of_seeds": own,
                "over_sgd": interval(over),
                "over_nesterov": interval(harder),
                "within": bool(np.mean(over) >= -MARGIN),
            }
        out[name] = rows
    return out


def table(found: dict[str, Any]) -> str:
    """The README's table."""
    lines = ["| set | method | learning rate | test accuracy | points over SGD, paired | over Nesterov's | within 1 |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, rows in found.items():
        for method, row in rows.items():
            own, over, harder = (
                f"{e['mean']:{sign}.2f}" + (f" [{e['low']:{sign}.2f}, {e['high']:{sign}.2f}]" if "low" in e else "")
                for e, sign in ((row["accuracy"], ""), (row["over_sgd"], "+"), (row["over_nesterov"], "+"))
            )
            over, within = ("", "") if method == "sgd" else (over, "yes" if row["within"] else "**no**")
            harder = "" if method == "sgd_nesterov" else harder
            lr = f"{row['lr']:g}{' (edge)' if row['at_edge'] else ''}"
            lines.append(f"| {name} | {TITLES[method]} | {lr} | {own}% | {over} | {harder} | {within} |")
    return "\n".join(lines)


def fill(readme: Path, words: str) -> None:
    """Put the table where the README wants it."""
    if readme.exists():
        before, _, rest = readme.read_text("utf-8").partition(MARKS[0])
        readme.write_text(f"{before}{MARKS[0]}\n\n{words}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", "utf-8")


# Not the random ones: their noise falls on coordinates in DDP's order.
CHECKED = {"majority_vote": MAJORITY_VOTE, "signum": SIGNUM, "sgd_quasi": QUASI}
CHECKED |= {f"{name}, all-gather": replace(PRESETS[name], communicator="all_gather") for name in
            ("majority_vote", "ef_vote", "ef_sign", "ef_top_k")}  # fmt: skip


def _little(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))


def _little_loss(net: nn.Module, worker: int, step: int) -> Tensor:
    rng = torch.Generator().manual_seed(100 * worker + step)
    return nn.functional.cross_entropy(net(torch.randn(8, 20, generator=rng)), torch.arange(8) % 4)


def check_worker(rank: int, folder: str) -> None:
    """One of three real processes: ten steps with the real hook for each of CHECKED; rank 0 keeps the weights."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel

    from trilobe.algorithms.parallel import State, compressed_hook

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    kept = {}
    for name, choices in [*CHECKED.items(), ("power_sgd", None)]:
        model = DistributedDataParallel(_little())
        if choices is None:
            model.register_comm_hook(PowerSGDState(None, 1, start_powerSGD_iter=2), powerSGD_hook)
        else:
            model.register_comm_hook(State(choices).attach(model), compressed_hook)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for step in range(10):
            optimizer.zero_grad()
            _little_loss(model, rank, step).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        kept[name] = nn.utils.parameters_to_vector(model.module.parameters()).detach()
    if rank == 0:
        torch.save(kept, Path(folder) / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


def check() -> dict[str, float]:
    """The largest difference between weights after ten steps, of simulated workers and of three real processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, "--child", "worker"]
        real = [subprocess.Popen([*command, str(rank), folder], env=common.QUIET) for rank in range(3)]
        if any(p.wait() for p in real):
            raise SystemExit("a worker of the check failed")
        kept = torch.load(Path(folder) / "weights.pt", weights_only=True)
    out = {}
    for name, choices in [*CHECKED.items(), ("power_sgd", None)]:
        net = _little()
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        shapes = [p.shape for p in net.parameters()]
        exchange = (
            simulate.PowerSGD(3, shapes)
            if choices is None
            else simulate.Exchange(choices, 3, [shape.numel() for shape in shapes])
        )
        for _ in simulate.steps(net, _little_loss, optimizer, exchange, 3, 10):
            pass
        out[name] = float((nn.utils.parameters_to_vector(net.parameters()).detach() - kept[name]).abs().max())
    return out


def main() -> None:
    chosen = common.arguments(__doc__)
    torch.set_num_threads(1)
    if chosen.child and chosen.child[0] == "worker":
        check_worker(int(chosen.child[1]), chosen.child[2])
        return
    common.needed(*SETS.values())
    runs = Runs(chosen.quick)
    if not chosen.child:
        everything(runs)
    same = check()
    print("simulation against the real hook, largest difference:", same, file=sys.stderr, flush=True)
    if chosen.child == ["check"]:
        return
    found = figures(runs)
    out = {
        "claim": "accuracy after equal epochs within 1 point of tuned SGD",
        "command": "python benchmarks/train-accuracy/run.py",
        "figures": found,
        "simulation_against_hook": same,
        "ratio": {name: {m: r["over_sgd"]["mean"] for m, r in rows.items()} for name, rows in found.items()},
        "met": {name: {m: r["within"] for m, r in rows.items() if m != "sgd"} for name, rows in found.items()},
        "peers": "SGD with momentum 0.9 (Nesterov's beside it), tuned alike, its gradients in float32 by plain mean",
        "setting": {"workers": WORKERS, "batch": BATCH, "train": TRAIN, "epochs": EPOCHS, "width": WIDTH, "test": TEST},
        "versions": common.versions("numpy", "torch"),
    }
    common.keep(__file__, out, chosen)
    print(table(found))
    if not chosen.quick:
        fill(HERE / "README.md", table(found))


if __name__ == "__main__":
    main()
