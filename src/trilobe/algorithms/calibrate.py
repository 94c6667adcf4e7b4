"""Making a network's confidence mean what it says: temperature scaling against beliefs."""

import numpy as np
from scipy.optimize import minimize_scalar

from trilobe.errors import UsageError
from trilobe.statistics import softmax
from trilobe.types import FloatArray


def fit_temperature(logits: FloatArray, proba: FloatArray, low: float = 0.05, high: float = 20.0) -> float:
    """The T that makes softmax(logits / T) the best forecast of held-out beliefs (Guo et al. 2017, equation 9).

    Minimizes the mean cross-entropy from ``proba`` to the scaled softmax; convex in 1/T. Deviation from the paper:
    the targets may be soft. Never changes which class is first.

    Args:
        logits: ``(n, n_classes)`` of examples the network did not train on.
        proba: ``(n, n_classes)`` what is believed of them (one-hot for certain labels).
        low, high: bounds of T.

    >>> round(fit_temperature(np.array([[2.0, 0.0]] * 4), np.array([[0.75, 0.25]] * 4)), 2)
    1.82
    """
    if logits.shape != proba.shape or not len(logits):
        raise UsageError(f"logits {logits.shape} and beliefs {proba.shape}", expected="the same shape, not empty")

    def loss(log_inverse: float) -> float:
        p = softmax(logits, float(np.exp(-log_inverse)))
        return float(-(proba * np.log(np.maximum(p, 1e-300))).sum(axis=1).mean())

    best = minimize_scalar(loss, bounds=(-np.log(high), -np.log(low)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(-best.x))
