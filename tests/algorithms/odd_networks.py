"""Networks that do what networks should not, and what several workers do with them: in a file, so that workers can
import them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trilobe.algorithms.fit.fitting import Job
from trilobe.algorithms.workers import Place


@dataclass(frozen=True)
class Several:
    """Jobs that the same workers do one after another."""

    jobs: tuple[Job, ...]

    def __call__(self, place: Place) -> list[Any]:
        from torch.distributed import PrefixStore

        store = place.store() if place.size > 1 else None
        return [job(replace(place, store=lambda i=i: PrefixStore(str(i), store))) for i, job in enumerate(self.jobs)]


@dataclass(frozen=True)
class Saying:
    """Says its number, and returns what ``function`` makes of it."""

    function: Callable[[int], Any]

    def __call__(self, place: Place) -> Any:
        place.say(place.rank)
        return self.function(place.rank)


class Unused(nn.Module):
    """One parameter is never used, one is frozen, and one is used in every second call only."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.frozen, self.rare = nn.Linear(8, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        self.never, self.calls = nn.Parameter(torch.ones(4)), 0
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.frozen(torch.tanh(self.used(x)))
        return h * self.rare if self.calls % 2 else h


class Mixed(nn.Module):
    """A layer in double precision between two in single."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 6), nn.Linear(6, 6).double(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(self.first(x).double())).float())


class Spoils(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Tensor:
        return above * float("nan")


class Spoiled(nn.Module):
    """From the fourth call on, the gradient of the first layer is NaN: in one worker only, where there are several."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(8, 4), nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        alone = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 1
        h = self.first(x)
        return self.last(Spoils.apply(h) if self.calls > 3 and alone else h)


class Fails(nn.Module):
    """Raises in its fourth call, in one worker."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 3 and torch.distributed.get_rank() == 1:
            raise KeyError("not in the dictionary")
        return self.layer(x)


def twice(rank: int) -> int:
    return 2 * rank


def fail_as_second(rank: int) -> int:
    import time

    if rank == 1:
        raise ValueError("the second does not like it")
    time.sleep(60)
    return rank
