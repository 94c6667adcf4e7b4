"""Several workers take the step that one would take, survive a kill, leave nothing behind, and say what went wrong."""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # workers inherit it

from odd_networks import Fails, Mixed, Saying, Several, Spoiled, Unused, fail_as_second, twice

from support.clusters import cluster
from trilobe.algorithms.encoders import Tagger, TextClassifier, WordEncoder
from trilobe.algorithms.fit import Plan, cross_fit, fit, fit_and_cross_fit
from trilobe.algorithms.fit.batches import checked
from trilobe.algorithms.fit.fitting import Job
from trilobe.algorithms.fit.team import Share
from trilobe.algorithms.parallel import PRESETS
from trilobe.algorithms.workers import WorkerLost, run
from trilobe.errors import MissingExtra, TrainingError, UsageError
from trilobe.rows import as_rows
from trilobe.tasks.image_classification.model import network, vary

QUICK = Plan(steps=12, epochs=1, batch_size=8, lr=1e-2, seed=1)
Case = tuple[Callable[[], nn.Module], Any, Any, Plan, Any]


def images(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((n, 1, 8, 8), dtype=np.float32), np.eye(3)[rng.integers(0, 3, n)]


def vectors(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    X = np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)
    return X, np.eye(3)[X[:, :3].argmax(1)]


def texts(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows as the tasks about texts make them, a tag for each word, a class for each text."""
    rng = np.random.default_rng(0)
    rows = [
        np.concatenate([rng.integers(2, 40, (t, 1)), rng.integers(1, 200, (t, 5))], 1).astype(np.float32)
        for t in rng.integers(1, 12, n)
    ]
    tags = as_rows([np.eye(3)[rng.integers(0, 2, len(r))] for r in rows])
    return as_rows(rows), tags, np.eye(3)[rng.integers(0, 3, n)]


def image_net(seed: int = 0) -> nn.Module:
    return network({"channels": 1, "height": 8, "width": 8}, 3, width=4, seed=seed)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return made


def tagger() -> nn.Module:
    return Tagger(WordEncoder(40, 5, width=8), 3, ["O", "B-X", "I-X"])


def classifier() -> nn.Module:
    return TextClassifier(WordEncoder(40, 5, width=8), 3)


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


ROWS, TAGS, CLASSES = texts(21)
SEQUENCES = np.random.default_rng(0).normal(size=(13, 4, 3)).astype(np.float32)
SEVERAL: dict[str, Case] = {
    "images": (image_net, *images(29), QUICK, vary),
    "tagger": (seeded(tagger), ROWS, TAGS, QUICK, None),
    "classifier": (seeded(classifier), ROWS, CLASSES, QUICK, None),
    "sequences": (seeded(lambda: nn.Linear(3, 3)), SEQUENCES, np.eye(3)[SEQUENCES.argmax(-1)], QUICK, None),
    "a worker without data": (seeded(normalized), *vectors(4), replace(QUICK, batch_size=2, optimizer="sgd"), None),
    "one example": (seeded(Mixed), *vectors(1), QUICK, None),
    "parameters without gradient": (seeded(Unused), *vectors(20), QUICK, None),
    "mixed dtypes": (seeded(Mixed), *vectors(20), QUICK, None),
    "sgd": (seeded(normalized), *vectors(20), replace(QUICK, optimizer="sgd"), None),
    "lion": (seeded(normalized), *vectors(20), replace(QUICK, optimizer="lion", lr=1e-3), None),
    "half precision": (seeded(normalized), *vectors(20), replace(QUICK, precision="bfloat16"), None),
    "patience": (
        seeded(normalized), *vectors(40),
        replace(QUICK, steps=400, lr=0.1, schedule="constant", patience=2, held_out=0.3), None,
    ),
}  # fmt: skip
HOOKS = sorted({*PRESETS} - {"plain"})


def job(case: Case) -> Job:
    make, X, likelihood, plan, augment = case
    everything = np.ones(len(X), dtype=bool)
    return Job(make(), *checked(X, likelihood), everything, plan, augment, {}, None, 3.0, False)


def hooked(hook: str) -> Case:
    full = PRESETS[hook].scaled or PRESETS[hook].aggregate == "mean"  # of the size of a gradient, which is averaged
    lr = 0.3 if full else 0.03
    plan = Plan(steps=40, epochs=0, batch_size=16, lr=lr, seed=1, hook=hook, optimizer="sgd", weight_decay=0.0)
    return seeded(lambda: nn.Linear(8, 3)), *vectors(60), plan, None


@pytest.fixture(scope="module")
def three() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """What three workers make of every case, started once for all of them."""
    cases = SEVERAL | {hook: hooked(hook) for hook in HOOKS}
    found = run(Several(tuple(map(job, cases.values()))), 3)
    assert all(weights == {} for rank in (1, 2) for _, weights in found[rank])
    return dict(zip(cases, found[0], strict=True))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


# ---- the same step ----


@pytest.mark.parametrize("name", SEVERAL)
def test_three_workers_come_to_what_one_comes_to(name: str, three: Any) -> None:
    """Dropout, hidden words, batch normalization, turned images and rows of unequal length included."""
    make, X, likelihood, plan, augment = SEVERAL[name]
    module = make()
    alone = fit(module, X, likelihood, plan, augment)
    losses, weights = three[name]
    close = 2e-2 if plan.precision == "bfloat16" else 2e-5
    np.testing.assert_allclose(losses, alone, rtol=close)
    assert distance(module.state_dict(), weights) < 20 * close
    if name == "patience":
        assert len(alone) < plan.total_steps(28), "training did stop early"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_trains(hook: str, three: Any) -> None:
    losses, _ = three[hook]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_shares_cover_a_batch_once() -> None:
    for n in range(1, 12):
        for size in range(1, 6):
            parts = [Share.of(n, rank, size) for rank in range(size)]
            seen = [i for part in parts if part.real for i in range(part.start, part.stop)]
            assert seen == list(range(n))
            assert all((part.start, part.stop) == (0, 1) for part in parts if not part.real)


# ---- workers come and go ----


def left_over() -> list[int]:
    return [p.pid for p in multiprocessing.active_children() if p.pid]


@pytest.mark.parametrize("hook", ["plain", pytest.param("ef_sign", marks=pytest.mark.slow)])
def test_a_killed_worker_costs_at_most_one_interval(
    hook: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    X, likelihood = images(29)
    plan, file = replace(QUICK, steps=40, hook=hook), tmp_path / "checkpoint"
    uninterrupted, module, seen, killed = image_net(), image_net(), list[int](), list[int]()
    fit(uninterrupted, X, likelihood, plan, vary, workers=1 if hook == "plain" else 2)

    def kill(step: int, total: int, loss: float) -> None:
        seen.append(step)
        if step == 20 and not killed:
            killed.append(left_over()[-1])
            os.kill(killed[0], signal.SIGKILL)

    with caplog.at_level(logging.WARNING):
        rest = fit(module, X, likelihood, plan, vary, file, kill, every=0.0, workers=2)
    assert "was killed by SIGKILL" in caplog.text and "goes on from the last checkpoint" in caplog.text
    assert len(rest) in range(19, 22), "one interval, here a step, is what may be lost"
    assert seen == [10, 20, 30, 40] or seen == [10, 20, 20, 30, 40]
    assert distance(module.state_dict(), uninterrupted.state_dict()) < 1e-4
    assert not file.exists() and not left_over() and not module.training


def test_workers_listen_on_the_loopback_alone_and_care_for_no_port(tmp_path: Path) -> None:
    """Also: what is stopped from outside goes on with another number of workers, and no process is left."""
    X, likelihood = images(29)
    file, whole, module = tmp_path / "checkpoint", image_net(), image_net()
    losses = fit(whole, X, likelihood, QUICK, vary)
    listening: set[str] = set()

    def look(step: int, total: int, loss: float) -> None:
        for pid in left_over():
            sockets = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.exists()}
            for kind in ("tcp", "tcp6"):
                for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
                    local, _, state, *_, inode = line.split()[1:10]
                    if state == "0A" and f"socket:[{inode}]" in sockets:
                        listening.add(local.split(":")[0])
        raise InterruptedError

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody else has it: so be it
            taken.bind(("127.0.0.1", 29500))  # the port that torch takes by default
            taken.listen()
        with pytest.raises(InterruptedError):
            fit(module, X, likelihood, QUICK, vary, file, look, every=0.0, workers=2)
    assert listening <= {"0100007F"}, "127.0.0.1 as /proc writes it"
    assert file.exists() and not left_over()
    assert fit(module, X, likelihood, QUICK, vary, file) == pytest.approx(losses[10:], rel=1e-5)
    assert distance(module.state_dict(), whole.state_dict()) < 1e-4


CHILD = """
import multiprocessing, sys, time
import numpy as np
from torch import nn
from trilobe.algorithms.fit import Plan, fit
def tell(step, total, loss):
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    time.sleep(60)
{guard}
    fit(nn.Linear(2, 2), np.eye(2, dtype=np.float32), np.eye(2), Plan(steps=10**6), progress=tell, workers=2)
"""


@pytest.mark.slow
def test_workers_go_when_who_started_them_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHILD.format(guard='if __name__ == "__main__":'))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    for _ in range(100):
        if not any(Path(f"/proc/{pid}/cmdline").exists() and running(pid) for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail(f"workers {pids} outlived who started them")


def running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_a_script_that_does_not_guard_its_main_part_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHILD.format(guard="if True:"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'put the call under: if __name__ == "__main__":' in done.stderr


# ---- what went wrong ----


@pytest.mark.parametrize("hook", ["plain", pytest.param("majority_vote", marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_is_named_before_it_spoils_weights(hook: str) -> None:
    X, likelihood = vectors(20)
    with pytest.raises(TrainingError, match=r"gradient.*'first\.weight'|'first\.bias'") as caught:
        fit(Spoiled(), X, likelihood, replace(QUICK, hook=hook), workers=2)
    assert not isinstance(caught.value, WorkerLost) and "of 2:\nTraceback" in caught.value.__notes__[0]
    assert not left_over()


def test_alone_it_is_named_too() -> None:
    X, likelihood = vectors(20)
    module = Spoiled()
    with pytest.raises(TrainingError, match=r"NaN or infinity in the gradient of 'first.weight' at step 4 of 12"):
        fit(module, X, likelihood, QUICK)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.slow
def test_an_error_of_one_worker_ends_all_with_its_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a checkpoint it is tried again first; this one fails again, so its error arrives."""
    X, likelihood = vectors(20)
    with caplog.at_level(logging.WARNING), pytest.raises(WorkerLost) as caught:
        fit(Fails(), X, likelihood, replace(QUICK, restarts=1), checkpoint=tmp_path / "c", every=0.0, workers=2)
    said = str(caught.value)
    assert said.startswith("worker 1 of 2 failed: KeyError: 'not in the dictionary'") and "odd_networks.py" in said
    assert caplog.text.count("goes on from the last checkpoint") == 1 and not left_over()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"workers": 0}, "0 workers; expected at least 1"),
        ({"workers": 2, "engine": "spark"}, "engine 'spark'; expected one of here, ray"),
        ({"workers": 2, "augment": lambda x, g: x}, r"cannot be sent to other processes(.|\n)*engine='ray'"),
        ({"plan": Plan(hook="majority_vote")}, r"hook 'majority_vote' with one worker(.|\n)*signsgd"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be(call: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(nn.Linear(8, 3), *vectors(9), **{"plan": QUICK, **call})


@pytest.mark.parametrize("workers", [1, 2])
def test_networks_that_cannot_be_trained(workers: int) -> None:
    words = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(24, 3))
    with pytest.raises(UsageError, match=r"'0\.weight' is sparse(.|\n)*sparse=False"):
        fit(words, *vectors(9), QUICK, workers=workers)
    frozen = nn.Linear(8, 3).requires_grad_(False)
    with pytest.raises(UsageError, match="nothing can be trained"):
        fit(frozen, *vectors(9), QUICK, workers=workers)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"optimizer": "adam"}, "optimizer = 'adam'; expected one of adamw, sgd"),
        ({"schedule": "cosine"}, "schedule = 'cosine'; expected one of one_cycle"),
        ({"hook": "vote"}, "hook = 'vote'; expected one of plain, majority_vote"),
        ({"lr": "fast"}, "lr = 'fast'; expected a number above 0, or 'auto'"),
        ({"held_out": 0.1}, r"held_out = 0\.1 without patience"),
        ({"precision": "auto", "deterministic": True}, "a choice that no clock makes"),
    ],
)
def test_plans_that_cannot_be(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan(**plan)


# ---- workers in general ----


def test_results_come_in_order_and_what_is_said_is_heard() -> None:
    heard: list[Any] = []
    assert run(Saying(twice), 2, heard=heard.append) == [0, 2] and sorted(heard) == [0, 1]


@pytest.mark.slow
def test_one_that_fails_does_not_wait_for_the_others() -> None:
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="worker 1 of 2 failed: ValueError: the second does not like it"):
        run(Saying(fail_as_second), 2)
    assert time.monotonic() - began < 45 and not left_over()


# ---- networks side by side ----


def test_folds_side_by_side_are_the_folds_of_one_worker_to_the_bit(tmp_path: Path) -> None:
    X, likelihood = images(20)
    alone = cross_fit(image_net, X, likelihood, QUICK, 3, vary)
    steps: list[tuple[int, int]] = []
    module, logits = fit_and_cross_fit(
        image_net, X, likelihood, QUICK, 3, vary, lambda s, t, loss: steps.append((s, t)), tmp_path / "c", workers=2
    )
    np.testing.assert_array_equal(logits, alone)
    whole = image_net()
    fit(whole, X, likelihood, QUICK, vary)
    assert distance(module.state_dict(), whole.state_dict()) == 0 and not module.training
    assert steps[-1] == (48, 48) and [s for s, _ in steps] == sorted(s for s, _ in steps)
    more: list[int] = []
    again = fit_and_cross_fit(
        image_net, X, likelihood, QUICK, 3, vary, lambda s, t, loss: more.append(s), tmp_path / "c"
    )
    np.testing.assert_array_equal(again[1], logits)
    assert distance(again[0].state_dict(), whole.state_dict()) == 0
    assert more == [], "what is done of each network was found"


def test_folds_exchange_nothing() -> None:
    with pytest.raises(UsageError, match="hook 'signum' with one worker"):
        cross_fit(image_net, *images(9), replace(QUICK, hook="signum"), workers=2)


# ---- Ray ----


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trilobe\[ray\]'"):
        fit(nn.Linear(8, 3), *vectors(9), QUICK, workers=2, engine="ray")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_on_ray_it_is_the_same(tmp_path: Path) -> None:
    class Breaks(nn.Module):
        """Ray sends what no file defines, too."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(8, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x) * (1.0 if self.calls < 4 else float("nan"))

    with cluster():
        X, likelihood = images(29)
        whole, module = image_net(), image_net()
        losses = fit(whole, X, likelihood, QUICK, vary)
        steps: list[int] = []
        came = fit(
            module, X, likelihood, QUICK, vary, tmp_path / "c", lambda s, t, loss: steps.append(s), 0.0, 2, "ray"
        )
        assert came == pytest.approx(losses, rel=1e-5) and steps == [10, 12]
        assert distance(module.state_dict(), whole.state_dict()) < 1e-4
        with pytest.raises(TrainingError, match=r"the loss became nan at step 4 of 12"):
            fit(Breaks(), *vectors(20), QUICK, workers=2, engine="ray")
        with pytest.raises(UsageError, match="3 workers on a cluster of 2 cores"):
            fit(Unused(), *vectors(20), QUICK, workers=3, engine="ray")
