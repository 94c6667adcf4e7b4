"""Batches that cover: examples chosen for being unlike each other, and unlike what is already known.

Where :mod:`trilobe.data.query` scores each example alone, these look at the batch: farthest-first traversal (core-set),
and BADGE, which samples by how differently examples would change the model. Both make one pass over the pool for each
chosen example and keep one number per example, so memory stays at the size of the features.
"""

import numpy as np
from numpy.typing import NDArray

from trilobe.data.query import check_proba
from trilobe.errors import UsageError
from trilobe.types import FloatArray

IntArray = NDArray[np.intp]


def k_center(features: FloatArray, n: int, known: FloatArray | None = None, seed: int = 0) -> IntArray:
    """Greedy k-center: each choice is the example farthest from all chosen before (Sener and Savarese 2018).

    The largest distance from any example to its nearest choice is at most twice the smallest possible (Gonzalez 1985).
    Deviation: distances are Euclidean in the given features, and the paper's second, exact stage is left out.

    Args:
        features: ``(n_pool, n_features)``.
        n: how many, in 1..n_pool.
        known: ``(n_known, n_features)`` of examples already labeled, which count as chosen.
        seed: the first choice where nothing is known.

    Returns:
        ``(n,)`` indices, in the order of choice: farthest first.

    >>> k_center(np.array([[0.0], [1.0], [10.0]]), 2, known=np.array([[0.0]])).tolist()
    [2, 1]
    """
    x = _checked(features, n)
    chosen = np.empty(n, dtype=np.intp)
    if known is None or not len(known):
        chosen[0] = np.random.default_rng(seed).integers(len(x))
        nearest, start = _distances(x, x[chosen[0]]), 1
    else:
        nearest, start = np.full(len(x), np.inf, dtype=x.dtype), 0
        for row in np.asarray(known, dtype=x.dtype):
            np.minimum(nearest, _distances(x, row), out=nearest)
    nearest[chosen[:start]] = -1.0
    for i in range(start, n):
        chosen[i] = nearest.argmax()
        np.minimum(nearest, _distances(x, x[chosen[i]]), out=nearest)
        nearest[chosen[: i + 1]] = -1.0  # a copy of a chosen example may be left, the example itself not
    return chosen


def badge(proba: FloatArray, features: FloatArray, n: int, seed: int = 0) -> IntArray:
    """BADGE: k-means++ sampling of the gradients that each example's likeliest label would cause (Ash et al. 2020).

    The gradient of the last layer's weights is g = (p - onehot(argmax p)) ⊗ h, with h the features: long for uncertain
    examples, in unlike directions for unlike ones. Inner products of such vectors factor, <g, g'> = <a, a'> <h, h'>, so
    the ``n_classes * n_features`` numbers of a gradient are never written down.

    Args:
        proba: ``(n_pool, n_classes)``.
        features: ``(n_pool, n_features)`` what the last layer sees.
        n: how many, in 1..n_pool.
        seed: of the sampling.

    Returns:
        ``(n,)`` distinct indices, in the order of choice; the first has the longest gradient.

    >>> badge(np.array([[0.5, 0.5], [1.0, 0.0], [0.6, 0.4]]), np.eye(3), 2).tolist()
    [0, 2]
    """
    a, h = np.array(check_proba(proba), dtype=np.float32), _checked(features, n)
    if len(a) != len(h):
        raise UsageError(f"{len(a)} probabilities and {len(h)} features", expected="as many")
    a[np.arange(len(a)), a.argmax(axis=1)] -= 1.0
    length = np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", h, h)
    rng = np.random.default_rng(seed)
    chosen = np.empty(n, dtype=np.intp)
    chosen[0] = length.argmax()
    nearest = np.full(len(a), np.inf)
    left = np.ones(len(a), dtype=bool)
    for i in range(1, n):
        last = chosen[i - 1]
        left[last] = False
        distance = length + length[last] - 2 * (a @ a[last]) * (h @ h[last])
        np.minimum(nearest, np.maximum(distance, 0.0), out=nearest)
        weight = np.where(left, nearest, 0.0)
        total = weight.sum()
        if total > 0:
            chosen[i] = min(int(np.searchsorted(np.cumsum(weight), rng.random() * total, side="right")), len(a) - 1)
        else:  # what is left changes nothing: take it as it comes
            chosen[i] = int(np.flatnonzero(left)[0])
    return chosen


def _checked(features: FloatArray, n: int) -> FloatArray:
    x = np.asarray(features)
    if x.ndim != 2 or not 1 <= n <= len(x):
        raise UsageError(f"{n} of features of shape {x.shape}", expected="(n_pool, n_features), and n from 1 to n_pool")
    if not np.isfinite(x).all():
        raise UsageError("features with NaN or infinity", expected="finite numbers")
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float64)


def _distances(x: FloatArray, row: FloatArray) -> FloatArray:
    """Squared Euclidean distances of every row to one, a million at a time so that little memory is needed."""
    out = np.empty(len(x), dtype=x.dtype)
    for start in range(0, len(x), 65_536):
        gap = x[start : start + 65_536] - row
        out[start : start + len(gap)] = np.einsum("ij,ij->i", gap, gap)
    return out
