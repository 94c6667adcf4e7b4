"""Small formulas that several rooms need: probabilities from logits, intervals around figures. No model lives here."""

import numpy as np
from numpy.typing import ArrayLike

from trilobe.errors import UsageError
from trilobe.types import FloatArray


def softmax(logits: FloatArray, temperature: float = 1.0) -> FloatArray:
    """Probabilities over the last axis of ``logits / temperature``.

    >>> softmax(np.array([0.0, 0.0])).tolist()
    [0.5, 0.5]
    """
    z = np.asarray(logits, dtype=np.float64) / temperature
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(z / z.sum(axis=-1, keepdims=True))


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval for a proportion ``k / n`` (Wilson 1927, equation 4): both ends in 0..1.

    Used for accuracies: its coverage is close to ``level`` even for small ``n`` and extreme shares.

    >>> low, high = wilson(95, 100)
    >>> round(low, 3), round(high, 3)
    (0.888, 0.978)
    """
    from scipy.special import ndtri

    _check_counts(k, n)
    if n == 0:
        return 0.0, 1.0
    z = float(ndtri(0.5 + level / 2))
    p, z2n = k / n, z * z / n
    center = (p + z2n / 2) / (1 + z2n)
    half = z / (1 + z2n) * float(np.sqrt(p * (1 - p) / n + z2n / (4 * n)))
    # At the ends the formula gives 0 and 1 exactly; floating point would put the limit inside the figure.
    return 0.0 if k == 0 else center - half, 1.0 if k == n else center + half


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval for a proportion ``k / n`` (Clopper and Pearson 1934): covers at least ``level``, always.

    Used where a guarantee is stated, as in monitoring.

    >>> low, high = clopper_pearson(0, 10)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.308)
    """
    from scipy.special import betaincinv

    _check_counts(k, n)
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
    return low, high


def bootstrap_mean(values: ArrayLike, level: float = 0.95, n_boot: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of ``values`` ``(n,)`` (Efron 1979).

    >>> low, high = bootstrap_mean([1.0, 2.0, 3.0])
    >>> 1.0 <= low <= 2.0 <= high <= 3.0
    True
    """
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        raise UsageError("an interval for the mean of nothing", expected="at least one value")
    rng = np.random.default_rng(seed)
    means = [
        x[rng.integers(0, x.size, x.size)].mean() for _ in range(n_boot)
    ]  # one at a time: memory of n, not n_boot*n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_counts(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise UsageError(f"{k} successes of {n}", expected="0 <= successes <= trials")
