"""What is found out before training: rates that train, half precision only where it pays, and honest profiles; and the
settings of a training that they belong to."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trilobe.algorithms.fit import Plan, fit, predict_logits, profile, range_test, settle
from trilobe.algorithms.fit.batches import held_back
from trilobe.algorithms.parallel import Link
from trilobe.errors import TrainingError

AUTO = Plan(steps=60, epochs=0, batch_size=16, lr="auto", seed=1)
FAST = Link(1e-5, 1e10)


def vectors(n: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    X = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    return X * np.float32(scale), np.eye(3)[X[:, :3].argmax(1)]


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 3)


def weights(module: nn.Module) -> bytes:
    return b"".join(v.numpy().tobytes() for v in module.state_dict().values())


# ---- a learning rate ----


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "signum", "signsgd"])
def test_the_rate_that_is_found_trains_whatever_the_optimizer(optimizer: Any) -> None:
    X, likelihood = vectors(200)
    plan = replace(AUTO, optimizer=optimizer, steps=200)
    module = layers()
    before = weights(module)
    found = settle(module, X, likelihood, plan)
    assert weights(module) == before and found == settle(module, X, likelihood, plan)
    assert isinstance(found.lr, float) and replace(found, lr="auto") == plan
    fit(module, X, likelihood, plan)
    assert (predict_logits(module, X).argmax(1) == likelihood.argmax(1)).mean() > 0.85


def test_larger_inputs_get_a_smaller_rate() -> None:
    """Of a linear network, the largest step that is stable falls with the square of the input's size."""
    rates = []
    for scale in (1.0, 30.0):
        found, losses = range_test(linear(), *vectors(200, scale), replace(AUTO, optimizer="sgd"))
        assert (np.diff(found) > 0).all() and np.isfinite(losses).all()
        rates.append(found[losses.argmin()])
    assert rates[0] / rates[1] > 20


def test_a_range_test_of_what_is_broken() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

    with pytest.raises(TrainingError, match="not finite before anything was learned"):
        settle(Broken(8, 3), *vectors(20), AUTO)


# ---- a precision ----


class Timed(nn.Linear):
    """Sleeps in one of the two precisions; in half precision it may compute something else."""

    def __init__(self, slow_in_half: bool, factor: float = 1.0) -> None:
        super().__init__(8, 3)
        self.slow_in_half, self.factor, self.halves = slow_in_half, factor, 0

    def forward(self, x: Tensor) -> Tensor:
        half = torch.is_autocast_enabled("cpu")
        self.halves += half
        time.sleep(0.01 * (half == self.slow_in_half))
        return super().forward(x) * (self.factor if half else 1.0)


@pytest.mark.parametrize(
    ("module", "precision"),
    [(Timed(True), "float32"), (Timed(False), "bfloat16"), (Timed(False, factor=5.0), "float32")],
    ids=["slower", "faster", "faster but wrong"],
)
def test_half_precision_only_where_it_pays(module: nn.Module, precision: str) -> None:
    plan = replace(AUTO, lr=1e-2, precision="auto")
    assert settle(module, *vectors(40), plan) == replace(plan, precision=precision)


def test_half_precision_is_used_where_the_plan_says_so_and_trains() -> None:
    X, likelihood = vectors(200)
    module, single = Timed(False), linear()
    plan = replace(AUTO, lr=0.1, steps=100, precision="bfloat16")
    fit(module, X, likelihood, plan)
    fit(single, X, likelihood, replace(plan, precision="float32"))
    assert module.halves == 100 and all(p.dtype == torch.float32 for p in module.parameters())
    right = [(predict_logits(m, X).argmax(1) == likelihood.argmax(1)).mean() for m in (module, single)]
    assert right[0] > right[1] - 0.03


# ---- when to stop, and how to repeat ----

PATIENT = Plan(steps=600, epochs=0, batch_size=16, lr=0.3, seed=1, schedule="constant", patience=3, held_out=0.25)


def test_it_stops_and_keeps_what_was_best_on_what_is_held_out() -> None:
    """Noise that can only be learned by heart: the loss of what is held out turns up soon."""
    rng = np.random.default_rng(0)
    X, likelihood = rng.normal(size=(60, 8)).astype(np.float32), np.eye(3)[rng.integers(0, 3, 60)]
    stopped, whole = layers(), layers()
    steps = fit(stopped, X, likelihood, PATIENT)
    held = held_back(60, 0.25, PATIENT.seed)
    everything = fit(whole, X[~held], likelihood[~held], replace(PATIENT, patience=0, held_out=0.0))
    assert held.sum() == 15 and everything[: len(steps)] == steps, "what is held out is not trained on"
    assert len(everything) == 600 and len(steps) < 300 and len(steps) % 3 == 0

    def loss(module: nn.Module) -> float:
        logits = torch.from_numpy(predict_logits(module, X[held]))
        return float(nn.functional.cross_entropy(logits, torch.from_numpy(likelihood[held].argmax(1))))

    assert loss(stopped) < loss(whole)
    shorter = layers()
    fit(shorter, X, likelihood, replace(PATIENT, steps=len(steps) - 3 * 3))  # all but the epochs it waited in vain
    assert weights(shorter) == weights(stopped)


def test_without_a_held_out_part_the_training_loss_decides() -> None:
    X, likelihood = vectors(60)
    nothing = np.ones_like(likelihood)  # nothing to learn: every epoch is as the one before
    assert len(fit(linear(), X, nothing, replace(PATIENT, held_out=0.0, bootstrap=0.0, lr=1e-12))) < 60
    falling = replace(PATIENT, held_out=0.0, lr=1e-3, steps=80)
    assert len(fit(linear(), X, likelihood, falling)) == 80, "it falls until the end"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("plan", [PATIENT, replace(PATIENT, optimizer="sgd", held_out=0.0, lr=0.01)])
def test_patience_survives_an_interruption(plan: Plan, late: bool, tmp_path: Path) -> None:
    X, likelihood = vectors(60)
    whole, resumed = layers(), layers()
    losses = fit(whole, X, likelihood, plan)

    def stop(step: int, total: int, loss: float) -> None:
        if step == (total if late else 20):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(resumed, X, likelihood, plan, checkpoint=tmp_path / "c", progress=stop, every=0.0)
    resumed = layers()
    assert fit(resumed, X, likelihood, plan, checkpoint=tmp_path / "c") == ([] if late else losses[20:])
    assert weights(resumed) == weights(whole)


def test_a_deterministic_training_runs_on_one_thread_and_leaves_all_as_it_was() -> None:
    seen: list[tuple[bool, int]] = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()))
            return super().forward(x[:, :8])

    X = np.zeros((20, 2000), dtype=np.float32)  # large enough for two threads
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fit(Looks(8, 3), X, np.ones((20, 3)), Plan(steps=1, epochs=0, deterministic=True))
        fit(Looks(8, 3), X, np.ones((20, 3)), Plan(steps=1, epochs=0))
        assert seen == [(True, 1), (False, 2)] and torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(before)


# ---- a profile ----


def test_a_profile_says_where_the_time_goes() -> None:
    X, likelihood = vectors(200)
    module = Timed(False)
    before = weights(module)
    seen = profile(module, X, likelihood, Plan(lr=0.1), networks=6, link=FAST)
    assert weights(module) == before
    assert 0.01 < seen.forward_s < 0.1 and seen.forward_s > 0.7 * seen.step_s
    assert 0 < seen.cores_used < 0.6, "it sleeps most of the time"
    assert seen.samples_per_s == pytest.approx(200 / 7 / seen.step_s)
    assert seen.parameters == 27 and 0 <= seen.parallel_fraction <= 1
    assert [f.workers for f in seen.forecasts] == [2, 4, 8]
    assert seen.forecasts[0].side_by_side <= 2.001
    assert seen.larger_batch > 1.5 and "batches of 64" in str(seen), "a step sleeps as long whatever its size"
    assert json.loads(json.dumps(asdict(seen)))["forecasts"][0]["here_by"] == seen.forecasts[0].here_by


def test_where_batches_cost_most_they_come_first() -> None:
    def slowly(x: Tensor, generator: torch.Generator) -> Tensor:
        time.sleep(0.01)
        return x

    seen = profile(linear(), *vectors(40), Plan(), slowly, encode_s=1e6, link=FAST)
    assert seen.data_s > 0.01 and all(f.here < 1.3 for f in seen.forecasts), "every worker varies whole batches"
    assert any("making batches" in line for line in seen.advice)
    assert any("reading the examples took" in line for line in seen.advice)


@pytest.mark.slow
def test_a_profile_of_two_processes() -> None:
    seen = profile(layers(), *vectors(60), Plan())
    assert 0 < seen.link_s < 0.1 and seen.link_bytes_per_s > 1e6
    assert any("does not pay" in line for line in seen.advice), "a step of a millisecond is not worth sharing"
