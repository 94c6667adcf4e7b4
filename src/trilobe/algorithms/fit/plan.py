"""How to train: the numbers, and the optimizer and the schedule that follow from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from trilobe.algorithms.optim import Lion, SignSGD, Signum
from trilobe.algorithms.parallel import PRESETS
from trilobe.errors import UsageError

OptimizerName = Literal["adamw", "sgd", "lion", "signum", "signsgd"]
ScheduleName = Literal["one_cycle", "constant"]
Precision = Literal["float32", "bfloat16", "auto"]


@dataclass(frozen=True)
class Plan:
    """How to train: every number that changes the result, so that it can be recorded and repeated.

    Training takes ``max(steps, epochs * batches)`` steps, unless ``patience`` ends it before.

    Args:
        steps, epochs, batch_size: how long, and how many examples at once.
        lr: the largest learning rate; ``"auto"`` finds it by a range test (see :func:`~trilobe.algorithms.fit.settle`).
        weight_decay: decoupled; for ``sgd`` that of ``torch.optim.SGD``.
        bootstrap: see :func:`~trilobe.algorithms.fit.belief_loss`.
        seed: of the order, of augmentation and of what the network draws.
        optimizer: ``adamw`` (Loshchilov and Hutter 2019), ``sgd`` (with momentum 0.9, unless ``hook`` has its own),
            or one of :mod:`trilobe.algorithms.optim`.
        schedule: ``one_cycle`` (Smith and Topin 2018) rises to ``lr`` and falls to nothing; ``constant`` stays.
        patience: epochs without progress after which training stops; 0 never stops early.
        held_out: share of the examples kept back to judge progress by; the weights that were best on them are kept.
            0 judges by the training loss of the epoch.
        precision: ``bfloat16`` computes the network in half precision (torch.autocast), ``auto`` where that is faster
            (measured, see :func:`~trilobe.algorithms.fit.settle`).
        deterministic: only operations that repeat to the bit, on one thread, however many cores there are.
        hook: how several workers exchange gradients, a name in ``trilobe.algorithms.parallel.PRESETS``.
        restarts: how often training goes on from the last checkpoint after a worker was lost. It changes no result.

    >>> Plan(steps=10, epochs=3, batch_size=4).total_steps(9)
    10
    """

    steps: int = 300
    epochs: int = 20
    batch_size: int = 32
    lr: float | Literal["auto"] = 3e-3
    weight_decay: float = 1e-2
    bootstrap: float = 1.0
    seed: int = 0
    optimizer: OptimizerName = "adamw"
    schedule: ScheduleName = "one_cycle"
    patience: int = 0
    held_out: float = 0.0
    precision: Precision = "float32"
    deterministic: bool = False
    hook: str = "plain"
    restarts: int = 2

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", get_args(OptimizerName)),
            ("schedule", get_args(ScheduleName)),
            ("precision", get_args(Precision)),
            ("hook", tuple(PRESETS)),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} = {getattr(self, name)!r}", expected=f"one of {', '.join(known)}")
        if isinstance(self.lr, str) and self.lr != "auto":
            raise UsageError(f"lr = {self.lr!r}", expected="a number above 0, or 'auto'")
        if self.held_out and not self.patience:
            raise UsageError(
                f"held_out = {self.held_out} without patience",
                expected="a number of epochs to wait for progress on what is held out",
                hint="patience = 5, or held_out = 0",
            )
        if self.deterministic and self.precision == "auto":
            raise UsageError(
                "precision = 'auto' in a deterministic training",
                expected="a choice that no clock makes",
                hint="precision = 'float32', or 'bfloat16'",
            )

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be found out."""
        return self.lr != "auto" and self.precision != "auto"

    def total_steps(self, n: int) -> int:
        """Optimizer steps for ``n`` examples."""
        return max(self.steps, self.epochs * -(-n // self.batch_size))


def optimizer_of(plan: Plan, module: nn.Module) -> torch.optim.Optimizer:
    """The plan's optimizer over the parameters of ``module``.

    >>> type(optimizer_of(Plan(optimizer="lion"), nn.Linear(1, 1))).__name__
    'Lion'
    """
    own: dict[str, Any] = {"lr": plan.lr, "weight_decay": plan.weight_decay}
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), **own)
    if plan.optimizer == "sgd":
        momentum = 0.0 if PRESETS[plan.hook].has_momentum else 0.9  # those average before they compress
        return torch.optim.SGD(module.parameters(), momentum=momentum, **own)
    signs: Callable[..., torch.optim.Optimizer] = {"lion": Lion, "signum": Signum, "signsgd": SignSGD}[plan.optimizer]
    return signs(module.parameters(), check_finite=False, **own)  # looked at before, with names


def schedule_of(plan: Plan, optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The plan's learning rate at each of ``total`` steps, as a function of the step alone.

    >>> optimizer = optimizer_of(Plan(), nn.Linear(1, 1))
    >>> round(schedule_of(Plan(), optimizer, 100).get_last_lr()[0], 6)
    0.00012
    """
    if plan.schedule == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    cycles = "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, float(plan.lr), total_steps=total, cycle_momentum=cycles)
