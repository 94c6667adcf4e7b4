"""The tests behind every finding: class counts in, exact p-values out. No capture and no word stands here.

All compare two samples, because a baseline is one too: a test that takes it as the truth alarms on its errors.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trilobe.types import FindingKind, FloatArray

IntArray = NDArray[np.int64]
ENOUGH = 20  # permutations at least as extreme as the window, after which no more are drawn


def fisher_rise(before: ArrayLike, n: int, now: ArrayLike, m: int) -> FloatArray:
    """One-sided p-value that ``now`` of ``m`` is a larger share than ``before`` of ``n`` (Fisher 1935, two samples).

    Given both together, the number of them in the window is hypergeometric; this is its upper tail, ``now``
    included. Counts may be arrays ``(k,)``: one test each, uncorrected.

    >>> float(fisher_rise(1, 10, 5, 10).round(4))
    0.0704
    """
    from scipy.stats import hypergeom

    before, now = np.asarray(before), np.asarray(now)
    return np.asarray(hypergeom.sf(now - 1, n + m, before + now, m))


def chi2_statistic(pooled: IntArray, now: IntArray) -> FloatArray:
    """Pearson's chi-square between two samples, >= 0, higher = more different: ``(...)`` for ``now (..., n_classes)``.

    ``pooled (n_classes,)`` counts both samples, ``now`` one of them. With margins fixed, the sum over both rows of
    the table is ``N^2 / (n m) * sum((now - expected)^2 / pooled)``; a class in neither sample adds nothing.

    >>> float(chi2_statistic(np.array([25, 15]), np.array([15, 5])).round(4))
    2.6667
    """
    m, total = now.sum(axis=-1, keepdims=True), pooled.sum()
    squares = (now - pooled * m / total) ** 2 / np.maximum(pooled, 1)
    return np.asarray((squares.sum(axis=-1, keepdims=True) * total**2 / (m * (total - m)))[..., 0])


def permutation_chi2(
    before: IntArray, now: IntArray, n_permutations: int, rng: np.random.Generator
) -> tuple[float, float]:
    """P-value of the two-sample chi-square by permutation, and the total variation distance that chance gives.

    Shuffling predictions between two samples gives the window multivariate hypergeometric counts, which are drawn
    directly: exact with sparse cells, where the chi-square distribution is not. Drawing stops at the 20th result at
    least as extreme, with p = 20 / draws; else p = (1 + extreme) / (1 + ``n_permutations``). Both are exact p-values
    (Besag and Clifford 1991, equation 1.2; Phipson and Smyth 2010 for the + 1).

    >>> p, chance = permutation_chi2(np.array([50, 50]), np.array([20, 5]), 999, np.random.default_rng(0))
    >>> 0.002 < p < 0.03, 0.05 < chance < 0.12
    (True, True)
    """
    pooled, n, m = before + now, int(before.sum()), int(now.sum())
    observed = float(chi2_statistic(pooled, now)) * (1 - 1e-9)  # equal counts must compare as equal despite rounding
    drawn, extreme, distance = 0, 0, 0.0
    while drawn < n_permutations:
        block = min(max(256, drawn), n_permutations - drawn)
        windows = rng.multivariate_hypergeometric(pooled, m, size=block, method="marginals")
        distance += float(np.abs(windows / m - (pooled - windows) / n).sum()) / 2
        hits = np.cumsum(chi2_statistic(pooled, windows) >= observed) + extreme
        if hits[-1] >= ENOUGH:
            return ENOUGH / (drawn + int(np.searchsorted(hits, ENOUGH)) + 1), distance / (drawn + block)
        drawn, extreme = drawn + block, int(hits[-1])
    return (1 + extreme) / (1 + drawn), distance / drawn


def holm(p_values: Mapping[FindingKind, float]) -> dict[FindingKind, float]:
    """Correct several tests so that any false alarm at all stays at the level (Holm 1979): each times those left.

    >>> holm({"class_share": 0.01, "low_confidence": 0.5, "class_drift": 0.02})
    {'class_share': 0.03, 'low_confidence': 0.5, 'class_drift': 0.04}
    """
    corrected, worst = dict(p_values), 0.0
    for rank, kind in enumerate(sorted(p_values, key=p_values.__getitem__)):
        worst = max(worst, min(1.0, p_values[kind] * (len(p_values) - rank)))
        corrected[kind] = worst
    return corrected
