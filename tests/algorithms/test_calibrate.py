"""Temperature scaling finds what was hidden, agrees with a grid, and touches nothing but confidence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from trilobe.algorithms.calibrate import fit_temperature
from trilobe.errors import UsageError
from trilobe.statistics import softmax


def world(n: int, k: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are ``temperature`` times too sharp, and labels drawn from the honest ones."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 2, (n, k))
    labels = (softmax(honest).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return honest * temperature, np.eye(k)[labels]


def cross_entropy(logits: np.ndarray, proba: np.ndarray, t: float) -> float:
    z = logits / t
    log_p = z - z.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    return float(-(proba * log_p).sum(axis=1).mean())


@pytest.mark.parametrize("hidden", [0.3, 1.0, 2.5, 6.0])
def test_a_known_temperature_is_recovered(hidden: float) -> None:
    logits, proba = world(8000, 4, hidden)
    assert fit_temperature(logits, proba) == pytest.approx(hidden, rel=0.07)
    soft = softmax(logits, hidden)
    assert fit_temperature(logits, soft) == pytest.approx(hidden, rel=1e-4), "soft targets give it exactly"


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.floats(0.3, 5), st.integers(0, 99))
def test_it_is_the_minimum(k: int, hidden: float, seed: int) -> None:
    logits, proba = world(60, k, hidden, seed)
    proba = 0.9 * proba + 0.1 / k
    found = fit_temperature(logits, proba)
    grid = np.geomspace(0.05, 20, 400)
    assert cross_entropy(logits, proba, found) <= min(cross_entropy(logits, proba, t) for t in grid) + 1e-9
    if 0.06 < found < 19:
        slow = minimize(lambda v: cross_entropy(logits, proba, float(np.exp(v[0]))), [0.0], method="Nelder-Mead",
                        options={"xatol": 1e-7, "fatol": 1e-12})  # fmt: skip
        assert found == pytest.approx(float(np.exp(slow.x[0])), rel=1e-3)


def test_which_class_is_first_never_changes() -> None:
    logits, proba = world(500, 5, 3.0)
    scaled = softmax(logits, fit_temperature(logits, proba))
    assert (scaled.argmax(axis=1) == logits.argmax(axis=1)).all()


def test_bounds_hold_at_the_extremes() -> None:
    """All right: as sharp as makes a difference. All wrong, or no opinion: as flat as allowed."""
    logits = np.eye(3)[np.arange(30) % 3] * 5
    assert fit_temperature(logits, np.eye(3)[np.arange(30) % 3]) < 0.2
    assert fit_temperature(logits, np.eye(3)[(np.arange(30) + 1) % 3]) == pytest.approx(20, rel=1e-3)
    assert fit_temperature(logits, np.full((30, 3), 1 / 3), high=50) == pytest.approx(50, rel=1e-3)


def test_enormous_logits_and_a_few_errors() -> None:
    """Where exp underflows the loss must still be a slope: 5% of errors at a gap of a million."""
    labels = np.arange(200) % 2
    logits = np.eye(2)[labels] * 1e6
    wrong = np.where(np.arange(200) % 20 == 0, 1 - labels, labels)
    found = fit_temperature(logits, np.eye(2)[wrong], high=1e7)
    assert found == pytest.approx(1e6 / np.log(19), rel=1e-3)


def test_sequences_and_single_precision() -> None:
    logits, proba = world(120, 3, 2.0)
    want = fit_temperature(logits, proba)
    assert fit_temperature(logits.reshape(30, 4, 3), proba.reshape(30, 4, 3)) == pytest.approx(want)
    assert fit_temperature(logits.astype(np.float32), proba) == pytest.approx(want, rel=1e-4)


def test_what_cannot_be_calibrated() -> None:
    logits, proba = world(5, 3, 1.0)
    for a, b in ((logits, proba[:4]), (logits, proba[:, :2]), (logits[:0], proba[:0])):
        with pytest.raises(UsageError, match="the same shape, not empty"):
            fit_temperature(a, b)
    for value in (np.nan, np.inf):
        with pytest.raises(UsageError, match="NaN or infinity"):
            fit_temperature(logits * value, proba)
