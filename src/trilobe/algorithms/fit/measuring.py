"""Found out before training, by training a little: a learning rate, and whether half precision pays."""

import copy
import statistics
import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from trilobe.algorithms.fit.batches import Batches
from trilobe.algorithms.fit.plan import Plan
from trilobe.algorithms.fit.training import Augment, Training, broken_gradient, conditions, require_trainable
from trilobe.errors import TrainingError
from trilobe.types import FloatArray

LOWEST, HIGHEST, RANGE = 1e-6, 10.0, 120  # the learning rates of a range test, and its steps
FASTER, ALIKE = 1.15, 0.05  # by how much half precision must be faster, and how far its loss may be off


def settle(
    module: nn.Module, X: FloatArray, likelihood: FloatArray, plan: Plan, augment: Augment | None = None
) -> Plan:
    """The plan with numbers in place of "auto". ``module`` stays as it is: copies are trained.

    ``lr``: a range test (Smith 2017, arXiv 1506.01186, section 3.3). The learning rate rises from step to step; a tenth
    of the one at which the smoothed loss was lowest is taken, since there it has begun to be too large. It follows from
    the arguments alone.

    ``precision``: some steps in single and in half precision in turn. Half is taken where it is 1.15 times as fast at
    least and the loss is the same within 5%. A clock decides, so this may come out otherwise another time: settle once
    and keep the plan where a training must repeat.

    Raises:
        TrainingError: a loss that is not finite at the smallest learning rate.

    >>> settle(nn.Linear(2, 2), np.eye(2, dtype=np.float32), np.eye(2), Plan(lr=0.1)).lr
    0.1
    """
    if plan.precision == "auto":
        alone = replace(plan, lr=1e-4 if plan.lr == "auto" else plan.lr, schedule="constant")
        half = _half_pays(module, X, likelihood, alone, augment)
        plan = replace(plan, precision="bfloat16" if half else "float32")
    if plan.lr == "auto":
        rates, losses = range_test(module, X, likelihood, plan, augment)
        plan = replace(plan, lr=float(rates[losses.argmin()] / 10))
    return plan


def range_test(
    module: nn.Module, X: FloatArray, likelihood: FloatArray, plan: Plan, augment: Augment | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Learning rates, rising, and the smoothed loss at each; it ends where the loss explodes.

    >>> rates, losses = range_test(nn.Linear(2, 2), np.eye(2, dtype=np.float32), np.eye(2), Plan())
    >>> len(rates) == len(losses) and bool((rates[1:] > rates[:-1]).all())
    True
    """
    rates, losses, mean = np.geomspace(LOWEST, HIGHEST, RANGE), list[float](), 0.0
    training = rehearsal(module, X, likelihood, replace(plan, lr=1.0, schedule="constant", steps=RANGE), augment)
    with conditions(plan, training.x):
        for step, rate in enumerate(rates):
            for group in training.optimizer.param_groups:
                group["lr"] = float(rate)
            loss = training.loss(*training.batch(step))
            mean = 0.9 * mean + 0.1 * float(loss.detach())
            smooth = mean / (1 - 0.9 ** (step + 1))
            if not np.isfinite(smooth) or smooth > 3 * min(losses, default=np.inf):
                break
            losses.append(smooth)
            training.backward(loss)
            if broken_gradient(training.module):
                break
            training.optimizer.step()
    if not losses:
        raise TrainingError(
            "the loss is not finite before anything was learned",
            expected="a finite loss",
            hint="look for extreme values in the input",
        )
    return rates[: len(losses)], np.array(losses)


def _half_pays(module: nn.Module, X: FloatArray, likelihood: FloatArray, plan: Plan, augment: Augment | None) -> bool:
    seconds: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    both = [rehearsal(module, X, likelihood, replace(plan, precision=p), augment) for p in ("float32", "bfloat16")]
    with conditions(plan, both[0].x):
        for step in range(8):
            for i, training in enumerate(both):
                began = time.perf_counter()
                loss = training.loss(*training.batch(step))
                training.backward(loss)
                training.optimizer.step()
                seconds[i].append(time.perf_counter() - began)
                losses[i].append(float(loss.detach()))
    single, half = (statistics.median(s[2:]) for s in seconds)
    apart = abs(sum(losses[1]) - sum(losses[0]))
    return single > FASTER * half and apart < ALIKE * abs(sum(losses[0]))


def rehearsal(
    module: nn.Module, X: FloatArray, likelihood: FloatArray, plan: Plan, augment: Augment | None
) -> Training:
    """The training of a copy of ``module``.

    >>> rehearsal(nn.Linear(2, 2), np.eye(2, dtype=np.float32), np.eye(2), Plan(), None).total
    300
    """
    require_trainable(module)
    twin = copy.deepcopy(module).train()
    return Training(twin, Batches(X, 0.0), Batches(likelihood, 1.0), plan, augment)
