"""Making a network's confidence mean what it says: temperature scaling against beliefs."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from trilobe.errors import UsageError
from trilobe.types import FloatArray


def fit_temperature(logits: FloatArray, proba: FloatArray, low: float = 0.05, high: float = 20.0) -> float:
    """The T that makes softmax(logits / T) the best forecast of held-out beliefs (Guo et al. 2017, equation 9).

    Minimizes the mean cross-entropy from ``proba`` to the scaled softmax; convex in 1/T. Deviation from the paper:
    the targets may be soft. Never changes which class is first.

    Args:
        logits: ``(..., n_classes)`` of examples the network did not train on.
        proba: the same shape, what is believed of them (one-hot for certain labels).
        low, high: bounds of T; with nothing but right (wrong) predictions it comes close to ``low`` (``high``).

    Raises:
        UsageError: different shapes, nothing at all, NaN or infinity.

    >>> round(fit_temperature(np.array([[2.0, 0.0]] * 4), np.array([[0.75, 0.25]] * 4)), 2)
    1.82
    """
    if logits.shape != proba.shape or not len(logits):
        raise UsageError(f"logits {logits.shape} and beliefs {proba.shape}", expected="the same shape, not empty")
    if not (np.isfinite(logits).all() and np.isfinite(proba).all()):
        raise UsageError("logits or beliefs with NaN or infinity", expected="finite numbers")
    z = np.asarray(logits, dtype=np.float64)

    def loss(log_t: float) -> float:
        return float(-(proba * log_softmax(z / np.exp(log_t), axis=-1)).sum(axis=-1).mean())

    best = minimize_scalar(loss, bounds=(np.log(low), np.log(high)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(best.x))
