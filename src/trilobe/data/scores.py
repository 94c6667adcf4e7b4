"""How much a model doubts one prediction: scores on an array of probabilities, ``score(proba) -> (n,)``.

Higher = more uncertain = ask sooner. A score looks at each example alone and knows nothing of batches. Predictions of
sequences are scored in :mod:`trilobe.data.sequences`, those of several models in :mod:`trilobe.data.committees`; how a
batch comes from scores stands in :mod:`trilobe.data.query`.
"""

import numpy as np

from trilobe.errors import UsageError
from trilobe.types import FloatArray


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
    p = check_proba(proba)
    return np.asarray(0.0 - np.einsum("ij,ij->i", p, np.log(np.maximum(p, 1e-38))))  # 0 log 0 is 0


def check_proba(proba: FloatArray) -> FloatArray:
    """``proba`` itself when it is ``(n, n_classes)`` of finite probabilities that sum to 1, else a clear error.

    >>> check_proba(np.array([[0.2, 0.2]]))
    Traceback (most recent call last):
        ...
    trilobe.errors.UsageError: probabilities of row 0 sum to 0.4; expected 1 (within 0.001)
    """
    proba = np.asarray(proba)
    if proba.ndim != 2 or proba.dtype == object:
        raise UsageError(f"probabilities of shape {proba.shape}", expected="(n_samples, n_classes)")
    total = proba.sum(axis=1)
    if not np.isfinite(total).all():  # a sum is finite only where all of it is
        raise UsageError("probabilities with NaN or infinity", expected="finite numbers from 0 to 1")
    if proba.size and (lowest := proba.min()) < 0:
        raise UsageError(f"a probability of {lowest:.4g}", expected="finite numbers from 0 to 1")
    wrong = np.flatnonzero(np.abs(total - 1) > 1e-3)
    if wrong.size:
        i = int(wrong[0])
        raise UsageError(f"probabilities of row {i} sum to {total[i]:.4g}", expected="1 (within 0.001)")
    return proba
