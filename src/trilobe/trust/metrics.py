"""How good a classifier is, from its probabilities: each figure with a 95% interval, on arrays alone.

Accuracy, calibration (the error and the bins of its diagram), proper scores, and errors class by class. No network
and no threshold lives here: what a figure must reach is decided in ``checks.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trilobe.errors import NotEnoughData, UsageError
from trilobe.statistics import wilson
from trilobe.types import Evidence, FloatArray

Proba = NDArray[np.float64]
Labels = NDArray[np.int64]
SMALLEST = 1e-15  # a probability of zero costs this much in the logarithm, not infinity


def accuracy(proba: ArrayLike, labels: ArrayLike) -> Evidence:
    """Share of examples whose most probable class is the label, with its Wilson interval. Higher = better.

    Args:
        proba: ``(n, n_classes)`` probabilities, rows summing to 1.
        labels: ``(n,)`` class indices, 0 to n_classes - 1.

    Raises:
        UsageError: shapes that do not fit, NaN, rows that do not sum to 1, labels out of range.
        NotEnoughData: no examples.

    >>> found = accuracy([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 1, 1])
    >>> round(found.figure, 3), found.n, found.detail["correct"]
    (0.667, 3, 2)
    """
    p, y = check_proba(proba, labels)
    correct = int((p.argmax(axis=1) == y).sum())
    low, high = wilson(correct, len(y))
    return Evidence("accuracy", correct / len(y), low, high, n=len(y), detail={"correct": correct})


def expected_calibration_error(
    proba: ArrayLike, labels: ArrayLike, n_bins: int = 15, n_boot: int = 1000, seed: int = 0
) -> Evidence:
    """Mean gap between confidence and accuracy over equal-width bins: 0 (calibrated) to 1. Lower = better.

    Guo et al. 2017, equation 3; bin m holds the confidences in ((m-1)/M, m/M]. The interval is a percentile bootstrap
    over examples. The error of a resample is biased upward, so the interval errs toward the worse side, and is widened
    to hold the figure where the bias would leave it outside. Arguments and errors are those of :func:`accuracy`.

    >>> expected_calibration_error([[0.75, 0.25]] * 4, [0, 0, 0, 1]).figure
    0.0
    """
    p, y = check_proba(proba, labels)
    confidence, hit, where = _binned(p, y, n_bins)
    gap = hit - confidence

    def error(rows: NDArray[np.intp]) -> float:
        return float(np.abs(np.bincount(where[rows], gap[rows], minlength=n_bins)).sum() / len(rows))

    return _bootstrapped("ece", error, len(y), {"n_bins": n_bins}, n_boot, seed)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """One bar of a reliability diagram: the examples whose confidence lies in (``start``, ``end``].

    ``accuracy_low`` and ``accuracy_high`` are the Wilson interval of ``accuracy``.
    """

    start: float
    end: float
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    count: int


def reliability(proba: ArrayLike, labels: ArrayLike, n_bins: int = 10) -> list[ReliabilityBin]:
    """The bars of the reliability diagram (Guo et al. 2017, equations 1 and 2), empty bins left out.

    Arguments and errors are those of :func:`accuracy`.

    >>> [bar] = reliability([[0.75, 0.25]] * 4, [0, 0, 0, 1])
    >>> bar.start, bar.end, bar.confidence, bar.accuracy, bar.count
    (0.7, 0.8, 0.75, 0.75, 4)
    """
    p, y = check_proba(proba, labels)
    confidence, hit, where = _binned(p, y, n_bins)
    edges = np.linspace(0, 1, n_bins + 1).round(12).tolist()
    bars = []
    for m in np.unique(where).tolist():
        inside = where == m
        count, correct = int(inside.sum()), int(hit[inside].sum())
        low, high = wilson(correct, count)
        mean = float(confidence[inside].mean())
        bars.append(ReliabilityBin(edges[m], edges[m + 1], mean, correct / count, low, high, count))
    return bars


def brier(proba: ArrayLike, labels: ArrayLike, n_boot: int = 1000, seed: int = 0) -> Evidence:
    """Mean squared distance between probabilities and the one-hot label: 0 to 2. Lower = better (Brier 1950).

    The interval is a percentile bootstrap over examples. Arguments and errors are those of :func:`accuracy`.

    >>> round(brier([[0.5, 0.5], [1.0, 0.0]], [0, 0]).figure, 3)
    0.25
    """
    p, y = check_proba(proba, labels)
    return _mean("brier", ((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1), n_boot, seed)


def log_loss(proba: ArrayLike, labels: ArrayLike, n_boot: int = 1000, seed: int = 0) -> Evidence:
    """Mean negative logarithm (nats) of the label's probability: 0 to 34.5. Lower = better.

    A probability is held at 1e-15 or more, so that a single certain error does not make the mean infinite. The interval
    is a percentile bootstrap over examples. Arguments and errors are those of :func:`accuracy`.

    >>> round(log_loss([[0.5, 0.5]], [0]).figure, 3)
    0.693
    """
    p, y = check_proba(proba, labels)
    return _mean("log_loss", -np.log(np.maximum(p[np.arange(len(y)), y], SMALLEST)), n_boot, seed)


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, n_classes: int) -> NDArray[np.int64]:
    """Counts ``(n_classes, n_classes)``: row = label, column = prediction.

    Raises:
        UsageError: lengths that differ, or a class index outside 0 to n_classes - 1.

    >>> confusion_matrix([0, 0, 1], [0, 1, 1], 2).tolist()
    [[1, 1], [0, 1]]
    """
    y, predicted = check_labels(labels, n_classes), check_labels(predictions, n_classes, "predictions")
    if len(y) != len(predicted):
        raise UsageError(f"{len(y)} labels and {len(predicted)} predictions", expected="as many of each")
    return np.bincount(y * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)


def class_recall(labels: ArrayLike, predictions: ArrayLike, n_classes: int) -> FloatArray:
    """Share of each class's examples that were predicted right, ``(n_classes,)``; NaN for a class without examples.

    Errors are those of :func:`confusion_matrix`.

    >>> class_recall([0, 0, 1], [0, 1, 1], 3).tolist()
    [0.5, 1.0, nan]
    """
    counts = confusion_matrix(labels, predictions, n_classes)
    total = counts.sum(axis=1)
    return np.where(total > 0, np.diag(counts) / np.maximum(total, 1), np.nan)


def check_proba(proba: ArrayLike, labels: ArrayLike) -> tuple[Proba, Labels]:
    """``proba`` as ``(n, n_classes)`` float64 and ``labels`` as ``(n,)`` int64, or the error that says what is wrong.

    Raises:
        UsageError: shapes that do not fit, NaN, rows that do not sum to 1 (within 1e-3), labels out of range.
        NotEnoughData: no examples.

    >>> check_proba([[0.5, 0.5]], [1])[1]
    array([1])
    """
    p = np.asarray(proba, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] < 1:
        raise UsageError(f"probabilities of shape {p.shape}", expected="(n, n_classes)")
    y = check_labels(labels, p.shape[1])
    if len(y) != len(p):
        raise UsageError(f"{len(p)} rows of probabilities and {len(y)} labels", expected="one label a row")
    if len(p) == 0:
        raise NotEnoughData(
            "there are no examples to measure on", expected="at least one", hint="set test examples aside"
        )
    if not np.isfinite(p).all():
        row = int(np.flatnonzero(~np.isfinite(p).all(axis=1))[0])
        raise UsageError(f"row {row} of the probabilities has a NaN or infinite value", expected="finite numbers")
    wrong = np.flatnonzero((np.abs(p.sum(axis=1) - 1) > 1e-3) | (p < 0).any(axis=1))
    if len(wrong):
        row = int(wrong[0])
        raise UsageError(
            f"row {row} of the probabilities sums to {p[row].sum():.4g} with a smallest value of {p[row].min():.4g}",
            expected="no negative value and a sum of 1",
            hint="if these are logits, apply softmax first",
        )
    return p, y


def check_labels(labels: ArrayLike, n_classes: int | None = None, name: str = "labels") -> Labels:
    """``labels`` as ``(n,)`` int64, from 0 and (where it is known) below ``n_classes``.

    Raises :class:`~trilobe.errors.UsageError` otherwise.

    >>> check_labels([0, 2], 3)
    array([0, 2])
    """
    y = np.asarray(labels)
    if y.size == 0:
        y = y.astype(np.int64)
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise UsageError(f"{name} of shape {y.shape} and type {y.dtype}", expected="(n,) class indices (integers)")
    wrong = y[(y < 0) | (y >= (np.inf if n_classes is None else n_classes))]
    if wrong.size:
        expected = "0 or more" if n_classes is None else f"0 to {n_classes - 1}"
        raise UsageError(f"class {wrong[0]} among the {name}", expected=expected)
    return y.astype(np.int64)


def _binned(p: Proba, y: Labels, n_bins: int) -> tuple[Proba, Proba, NDArray[np.intp]]:
    if n_bins < 1:
        raise UsageError(f"{n_bins} bins", expected="at least one")
    confidence = p.max(axis=1)
    hit = (p.argmax(axis=1) == y).astype(np.float64)
    return confidence, hit, np.digitize(confidence, np.linspace(0, 1, n_bins + 1)[1:-1], right=True)


def _mean(check: str, values: Proba, n_boot: int, seed: int) -> Evidence:
    return _bootstrapped(check, lambda rows: float(values[rows].mean()), len(values), {}, n_boot, seed)


def _bootstrapped(
    check: str, statistic: Callable[[NDArray[np.intp]], float], n: int, detail: dict[str, Any], n_boot: int, seed: int
) -> Evidence:
    """Percentile interval (Efron 1979), one resample at a time: memory stays that of one sample."""
    rng = np.random.default_rng(seed)
    figure = statistic(np.arange(n))
    resampled = [statistic(rng.integers(0, n, n)) for _ in range(n_boot)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Evidence(check, figure, min(float(low), figure), max(float(high), figure), n=n, detail=detail)
