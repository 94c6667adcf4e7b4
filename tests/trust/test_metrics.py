"""Figures of a classifier against scikit-learn, against direct sums, and on what cannot be measured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from trilobe.errors import NotEnoughData, UsageError
from trilobe.statistics import wilson
from trilobe.trust.metrics import (
    accuracy,
    brier,
    class_recall,
    confusion_matrix,
    expected_calibration_error,
    log_loss,
    reliability,
)

MEASURES = [accuracy, expected_calibration_error, reliability, brier, log_loss]


def sample(n: int = 300, n_classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(n_classes, 0.5), n), rng.integers(0, n_classes, n)


def slow_ece(proba: np.ndarray, labels: np.ndarray, n_bins: int) -> float:
    """Guo et al. 2017, equations 1 to 3, bin by bin."""
    total = 0.0
    for m in range(n_bins):
        inside = [
            (p.max(), p.argmax() == y)
            for p, y in zip(proba, labels, strict=True)
            if m / n_bins < p.max() <= (m + 1) / n_bins
        ]
        if inside:
            conf, acc = np.mean([c for c, _ in inside]), np.mean([hit for _, hit in inside])
            total += len(inside) / len(labels) * abs(acc - conf)
    return total


def test_accuracy_is_scikit_learns_with_wilsons_interval() -> None:
    proba, labels = sample()
    found = accuracy(proba, labels)
    assert found.figure == pytest.approx(sk.accuracy_score(labels, proba.argmax(1)))
    assert (found.low, found.high) == wilson(found.detail["correct"], 300)
    assert found.n == 300 and found.passed is None


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_ece_is_the_sum_over_bins(n_bins: int) -> None:
    proba, labels = sample()
    found = expected_calibration_error(proba, labels, n_bins=n_bins)
    assert found.figure == pytest.approx(slow_ece(proba, labels, n_bins), abs=1e-12)
    assert found.low <= found.figure <= found.high


def test_ece_tells_calibrated_from_overconfident_with_intervals_that_agree() -> None:
    rng = np.random.default_rng(1)
    proba = rng.dirichlet(np.ones(3), 4000)
    drawn = (rng.random((4000, 1)) > proba.cumsum(1)).sum(1)
    sharp = proba**3 / (proba**3).sum(1, keepdims=True)
    calibrated = expected_calibration_error(proba, drawn, n_boot=200)
    overconfident = expected_calibration_error(sharp, drawn, n_boot=200)
    assert calibrated.figure < 0.03 < overconfident.low
    assert calibrated.high < overconfident.low


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    [bar] = reliability([[0.6, 0.4]], [0], n_bins=10)
    assert (bar.start, bar.end) == (0.5, 0.6)
    [bar] = reliability([[1.0, 0.0]], [0], n_bins=10)
    assert (bar.start, bar.end, bar.count) == (0.9, 1.0, 1)


def test_the_diagram_adds_up_to_the_error_and_the_accuracy() -> None:
    proba, labels = sample()
    bars = reliability(proba, labels, n_bins=15)
    assert sum(b.count for b in bars) == 300
    assert sum(b.count * b.accuracy for b in bars) / 300 == pytest.approx(accuracy(proba, labels).figure)
    gap = sum(b.count * abs(b.accuracy - b.confidence) for b in bars) / 300
    assert gap == pytest.approx(expected_calibration_error(proba, labels, n_boot=2).figure)
    assert all(b.start < b.confidence <= b.end for b in bars)
    assert all(b.accuracy_low - 1e-12 <= b.accuracy <= b.accuracy_high + 1e-12 for b in bars)


def test_proper_scores_are_scikit_learns() -> None:
    proba, labels = sample()
    onehot = np.eye(4)[labels]
    assert log_loss(proba, labels).figure == pytest.approx(sk.log_loss(labels, proba))
    assert brier(proba, labels).figure == pytest.approx(((proba - onehot) ** 2).sum(1).mean())
    binary, truth = sample(n_classes=2)
    assert brier(binary, truth).figure == pytest.approx(2 * sk.brier_score_loss(truth, binary[:, 1]))
    assert np.isfinite(log_loss([[1.0, 0.0]], [1]).figure)


def test_confusion_and_recall_are_scikit_learns() -> None:
    proba, labels = sample()
    predicted = proba.argmax(1)
    assert (confusion_matrix(labels, predicted, 4) == sk.confusion_matrix(labels, predicted)).all()
    assert class_recall(labels, predicted, 4) == pytest.approx(sk.recall_score(labels, predicted, average=None))
    assert np.isnan(class_recall(labels, predicted, 5)[4])


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**20))
def test_figures_lie_in_their_intervals_and_ranges(n: int, n_classes: int, seed: int) -> None:
    proba, labels = sample(n, n_classes, seed)
    scores = (brier, log_loss, expected_calibration_error)
    for found in (accuracy(proba, labels), *(m(proba, labels, n_boot=20) for m in scores)):
        assert 0 <= found.low <= found.figure + 1e-12 and found.figure - 1e-12 <= found.high <= 35
        assert found.n == n


def test_the_same_seed_gives_the_same_interval() -> None:
    proba, labels = sample()
    assert expected_calibration_error(proba, labels, seed=3) == expected_calibration_error(proba, labels, seed=3)
    assert brier(proba, labels, seed=3).low != brier(proba, labels, seed=4).low


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("proba", "labels", "says"),
    [
        ([0.5, 0.5], [0], r"shape \(2,\).*\(n, n_classes\)"),
        ([[0.5, 0.5]], [0, 1], "1 rows .* 2 labels"),
        ([[0.5, 0.5], [np.nan, 1.0]], [0, 1], "row 1 .* NaN"),
        ([[0.5, 0.6]], [0], "row 0 .* sums to 1.1.*\n.*softmax"),
        ([[1.5, -0.5]], [0], "smallest value of -0.5"),
        ([[0.5, 0.5]], [2], "class 2 among the labels; expected 0 to 1"),
        ([[0.5, 0.5]], [-1], "class -1"),
        ([[0.5, 0.5]], [0.0], "float64"),
        ([[0.5, 0.5]], [[0]], r"shape \(1, 1\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, proba, labels, says) -> None:
    with pytest.raises(UsageError, match=says):
        measure(proba, labels)


def test_nothing_to_measure_on_and_no_bins() -> None:
    with pytest.raises(NotEnoughData, match="no examples"):
        accuracy(np.zeros((0, 3)), [])
    with pytest.raises(UsageError, match="0 bins"):
        reliability([[1.0]], [0], n_bins=0)
    with pytest.raises(UsageError, match="2 labels and 1 predictions"):
        confusion_matrix([0, 1], [0], 2)
    with pytest.raises(UsageError, match="class 5 among the predictions"):
        confusion_matrix([0], [5], 2)
    assert confusion_matrix([], [], 2).tolist() == [[0, 0], [0, 0]]
