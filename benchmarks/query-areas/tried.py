"""Other defaults that were tried, as arms: each starts with typical examples and differs in how it goes on.

They are here so that the choice of the default can be checked and repeated; the product has only the one that won.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from arms import TYPICAL, Arm, Turn, ours

from trilobe.data.diversity import _kmeans


def mixed(share: float, diversity: int = 10) -> Arm:
    """Margin spread over ``diversity`` candidates a question, with a share of every round picked at random."""

    def choose(t: Turn) -> Any:
        n = round(share * t.n)
        first = ours("margin", diversity)(replace(t, n=t.n - n))
        rest = np.setdiff1d(np.arange(len(t.rest)), first)
        return np.concatenate([first, np.random.default_rng(t.seed).choice(rest, n, replace=False)])

    return choose


def doubtful(share: float = 0.0) -> Arm:
    """Margin spread over the part of the pool that the model expects to get wrong, 1 - mean max p of it."""

    def choose(t: Turn) -> Any:
        wrong = float(1 - t.proba.max(axis=1).mean())
        many = max(3, round(wrong * len(t.rest) / t.n))
        return ours("margin", many)(t) if not share else mixed(share, many)(t)

    return choose


def later(until: int, then: Arm) -> Arm:
    """Typical of clusters that hold nothing labeled, until ``until`` labels; then uncertain."""

    def choose(t: Turn) -> Any:
        return uncovered(t) if len(t.known) < until else then(t)

    return choose


def uncovered(t: Turn) -> Any:
    """Clusters for all labels there will be; one example of each of the largest clusters without a label."""
    X = t.deal.like
    label = _kmeans(X, np.ones(len(X)), min(len(t.known) + t.n, 400), t.seed)
    taken = np.unique(label[t.known])
    free = label[t.rest]
    size = np.bincount(label, minlength=label.max() + 1).astype(float)
    size[taken] = 0
    chosen: list[int] = []
    for cluster in np.argsort(-size)[: t.n]:
        members = np.flatnonzero(free == cluster)
        if size[cluster] > 0 and len(members):
            center = t.like[members].mean(axis=0)
            chosen.append(int(members[((t.like[members] - center) ** 2).sum(1).argmin()]))
    rest = np.setdiff1d(np.arange(len(t.rest)), chosen)
    return np.concatenate([chosen, np.random.default_rng(t.seed).permutation(rest)[: t.n - len(chosen)]]).astype(int)


TRIED: dict[str, tuple[Arm | None, Arm]] = {
    "tried: typical, then margin": (TYPICAL, ours("margin")),
    "tried: typical, then margin spread 3": (TYPICAL, ours("margin", 3)),
    "tried: typical, then margin spread 30": (TYPICAL, ours("margin", 30)),
    "tried: typical, then least confidence spread 10": (TYPICAL, ours("least_confidence", 10)),
    "tried: typical, then badge": (TYPICAL, ours("badge")),
    "tried: typical, then margin spread 10 with 10% random": (TYPICAL, mixed(0.1)),
    "tried: typical, then uncovered to 95, then margin spread 10": (TYPICAL, later(95, ours("margin", 10))),
    "tried: typical, then margin spread over the doubtful": (TYPICAL, doubtful()),
    "tried: typical, then margin spread over the doubtful with 10% random": (TYPICAL, doubtful(0.1)),
    "tried: typical, then facility location": (TYPICAL, ours("facility_location")),
}
