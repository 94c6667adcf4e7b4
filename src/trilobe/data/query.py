"""Which examples to ask about next: scores on arrays, and the selection of a batch from scores.

A score is a pure function ``score(proba (n, n_classes)) -> (n,)``, higher = ask sooner. A strategy turns scores into
``n`` distinct examples and says why each was chosen. Diversity is a property of the selection, not of the score:
:func:`select` takes the best few times ``n`` and keeps one example of each cluster, so that a batch does not ask the
same thing twenty times. With nothing answered yet there is no score, and :func:`typical` picks cluster centers.

A user's own strategy is a function with the signature of :func:`margin`; pass it wherever a name is accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from trilobe.errors import NotEnoughData, UsageError
from trilobe.types import FloatArray

Score = Callable[[FloatArray], FloatArray]
IntArray = NDArray[np.intp]


def least_confidence(proba: FloatArray) -> FloatArray:
    """1 - max p, from 0 (certain) to 1 - 1/n_classes (Lewis and Gale 1994). Higher = more uncertain.

    >>> least_confidence(np.array([[0.9, 0.1], [0.5, 0.5]])).round(2).tolist()
    [0.1, 0.5]
    """
    return np.asarray(1 - check_proba(proba).max(axis=1))


def margin(proba: FloatArray) -> FloatArray:
    """1 - (largest p - second largest p), 0 to 1 (Scheffer et al. 2001). Higher = more uncertain.

    >>> margin(np.array([[0.9, 0.1], [0.5, 0.5]])).round(2).tolist()
    [0.2, 1.0]
    """
    proba = check_proba(proba)
    if proba.shape[1] < 2:
        return np.zeros(len(proba))
    second, first = np.partition(proba, -2, axis=1)[:, -2:].T
    return np.asarray(1 - (first - second))


def entropy(proba: FloatArray) -> FloatArray:
    """-sum p log p in nats, 0 to log(n_classes) (Shannon 1948). Higher = more uncertain.

    >>> entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(3).tolist()
    [0.0, 0.693]
    """
    return np.asarray(entr(check_proba(proba)).sum(axis=1))


SCORES: dict[str, Score] = {"margin": margin, "entropy": entropy, "least_confidence": least_confidence}
STRATEGIES = (*SCORES, "random", "typical")


@dataclass(frozen=True)
class Selection:
    """``index`` ``(n,)`` into the pool, best first, with ``score`` ``(n,)``; who chose (versioned name) and why."""

    index: IntArray
    score: FloatArray
    strategy: str
    reason: str


def select(
    strategy: str | Score,
    n: int,
    proba: FloatArray | None,
    features: FloatArray | None = None,
    diversity: int = 10,
    seed: int = 0,
) -> Selection:
    """Choose ``n`` of the pool (all of it when it is smaller).

    Args:
        strategy: a name of ``STRATEGIES``, or a score function.
        n: how many, at least 1.
        proba: ``(n_pool, n_classes)`` predictions; None when there is no model yet, then ``typical`` is used.
        features: ``(n_pool, n_features)`` to judge likeness by; without it no diversity is enforced.
        diversity: how many candidates per chosen example compete; 1 takes the top scores as they are.
        seed: for ties, clusters and random choice.

    Raises:
        UsageError: an unknown strategy, n below 1, scores or features that do not fit the pool or are not finite.
        NotEnoughData: an empty pool.

    >>> chosen = select("margin", 1, np.array([[0.9, 0.1], [0.6, 0.4]]))
    >>> chosen.index.tolist(), chosen.strategy
    ([1], 'margin.v1')
    """
    if n < 1:
        raise UsageError(f"{n} questions", expected="at least 1")
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {strategy!r}", expected=f"one of {', '.join(STRATEGIES)}")
    size = len(proba) if proba is not None else len(features if features is not None else ())
    if not size:
        raise NotEnoughData("there is nothing to choose from", hint="trilobe add FOLDER")
    if features is not None and len(features) != size:
        raise UsageError(f"{len(features)} rows of features for {size} examples", expected="as many")
    n, rng = min(n, size), np.random.default_rng(seed)
    if strategy == "random":
        return Selection(rng.permutation(size)[:n], np.zeros(n), "random.v1", "picked at random")
    if strategy == "typical" or proba is None:
        return typical(np.zeros((size, 1)) if features is None else features, n, seed)
    function = SCORES[strategy] if isinstance(strategy, str) else strategy
    name = f"{strategy}.v1" if isinstance(strategy, str) else getattr(strategy, "__name__", "function")
    reason = "the model is torn between classes here" if isinstance(strategy, str) else f"scores high in {name}"
    scores = np.asarray(function(proba))
    if scores.shape != (size,) or not np.isfinite(scores).all():
        raise UsageError(f"{name} gave scores of shape {scores.shape}", expected=f"({size},) finite numbers")
    order = np.lexsort((rng.random(size), -scores))  # ties in random order
    if features is None or diversity <= 1:
        top = order[:n]
    else:
        top = _spread(order[: n * diversity], features, scores, n, seed)
    return Selection(top, scores[top], name, reason)


def typical(features: FloatArray, n: int, seed: int = 0) -> Selection:
    """The examples nearest to ``n`` cluster centers: the start when nothing is answered yet (Hacohen et al. 2022).

    Deviation from the paper: plain k-means on the given features, and the member nearest to its center.

    Args:
        features: ``(n_pool, n_features)``.
        n: how many, at least 1; more than there are takes all.
        seed: of the clustering.

    >>> typical(np.array([[0.0], [0.1], [5.0], [5.2], [5.1]]), 2).index.tolist()
    [4, 0]
    """
    weight = np.ones(len(features))
    index, size = _one_per_cluster(features, weight, min(n, len(features)), seed)
    order = np.argsort(-size, kind="stable")
    return Selection(index[order], size[order] / len(features), "typical.v1", "stands for a group of similar examples")


def _spread(candidates: IntArray, features: FloatArray, scores: FloatArray, n: int, seed: int) -> IntArray:
    """``n`` of the candidates, one of each cluster where uncertain ones weigh more, best scores first."""
    weight = scores[candidates] - scores[candidates].min() + 1e-6
    index, _ = _one_per_cluster(features[candidates], weight, n, seed)
    chosen = candidates[index]
    return chosen[np.argsort(-scores[chosen], kind="stable")]


def _one_per_cluster(features: FloatArray, weight: FloatArray, n: int, seed: int) -> tuple[IntArray, FloatArray]:
    """Exactly ``n`` distinct rows, each nearest to one center of a weighted k-means, and the clusters' sizes."""
    x = np.asarray(features, dtype=np.float64).reshape(len(features), -1)
    if not np.isfinite(x).all():
        raise UsageError("features with NaN or infinity", expected="finite numbers")
    label = _kmeans(x, weight, n, seed)
    index: list[int] = []
    for cluster in range(n):
        members = np.flatnonzero(label == cluster)
        if members.size:
            center = np.average(x[members], axis=0, weights=weight[members])
            index.append(int(members[((x[members] - center) ** 2).sum(axis=1).argmin()]))
    rest = np.setdiff1d(np.arange(len(x)), index)  # identical rows leave clusters empty: fill up by weight
    index += rest[np.argsort(-weight[rest], kind="stable")][: n - len(index)].tolist()
    chosen = np.array(index, dtype=np.intp)
    return chosen, np.bincount(label, minlength=n)[label[chosen]].astype(float)


def _kmeans(x: FloatArray, weight: FloatArray, n: int, seed: int, rounds: int = 30) -> IntArray:
    """Weighted Lloyd rounds from a weighted k-means++ start (Arthur and Vassilvitskii 2007): labels ``(len(x),)``."""
    rng, centers = np.random.default_rng(seed), np.empty((n, x.shape[1]))
    nearest = np.full(len(x), np.inf)
    for i in range(n):
        chance = weight * nearest if i and (weight * nearest).sum() > 0 else weight
        centers[i] = x[rng.choice(len(x), p=chance / chance.sum())]
        nearest = np.minimum(nearest, ((x - centers[i]) ** 2).sum(axis=1))
    label = np.zeros(len(x), dtype=np.intp)
    for _ in range(rounds):
        before, label = label, _squared_distances(x, centers).argmin(axis=1)
        if (label == before).all():
            break
        mass = np.bincount(label, weights=weight, minlength=n)
        total = np.zeros_like(centers)
        np.add.at(total, label, x * weight[:, None])
        centers = np.where(mass[:, None] > 0, total / np.maximum(mass, 1e-300)[:, None], centers)
    return label


def _squared_distances(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.asarray((x**2).sum(axis=1)[:, None] - 2 * x @ y.T + (y**2).sum(axis=1))


def check_proba(proba: FloatArray) -> FloatArray:
    """``proba`` itself when it is ``(n, n_classes)`` of finite probabilities that sum to 1, else a clear error.

    >>> check_proba(np.array([[0.2, 0.2]]))
    Traceback (most recent call last):
        ...
    trilobe.errors.UsageError: probabilities of row 0 sum to 0.4; expected 1 (within 0.001)
    """
    proba = np.asarray(proba)
    if proba.ndim != 2:
        raise UsageError(f"probabilities of shape {proba.shape}", expected="(n_samples, n_classes)")
    if not np.isfinite(proba).all():
        raise UsageError("probabilities with NaN or infinity", expected="finite numbers from 0 to 1")
    if (proba < 0).any():
        raise UsageError(f"a probability of {proba.min():.4g}", expected="finite numbers from 0 to 1")
    total = proba.sum(axis=1)
    wrong = np.flatnonzero(np.abs(total - 1) > 1e-3)
    if wrong.size:
        i = int(wrong[0])
        raise UsageError(f"probabilities of row {i} sum to {total[i]:.4g}", expected="1 (within 0.001)")
    return proba
