"""Scores of one prediction against their definitions."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.data.scores import check_proba, entropy, least_confidence, margin
from trilobe.errors import UsageError

SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "margin": margin,
    "entropy": entropy,
    "least_confidence": least_confidence,
}


def random_proba(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.5), n)


@given(st.integers(2, 6), st.integers(0, 99))
def test_scores_are_their_definitions(k: int, seed: int) -> None:
    proba = random_proba(5, k, seed)
    for row, lc, m, h in zip(proba, least_confidence(proba), margin(proba), entropy(proba), strict=True):
        ordered = sorted(row.tolist(), reverse=True)
        assert lc == pytest.approx(1 - ordered[0])
        assert m == pytest.approx(1 - (ordered[0] - ordered[1]))
        assert h == pytest.approx(-sum(p * math.log(p) for p in ordered if p > 0))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("k", [2, 3, 10])
def test_scores_are_largest_when_torn_and_zero_when_certain(name: str, k: int) -> None:
    score, highest = SCORES[name], {"margin": 1.0, "entropy": math.log(k), "least_confidence": 1 - 1 / k}[name]
    torn, certain = np.full((1, k), 1 / k), np.eye(k)[:1]
    assert score(torn)[0] == pytest.approx(highest) and score(certain)[0] == pytest.approx(0)
    assert (score(random_proba(200, k)) <= highest + 1e-12).all()


def test_a_single_class_leaves_no_doubt() -> None:
    for score in SCORES.values():
        assert score(np.ones((3, 1))).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("proba", "problem"),
    [
        (np.array([0.5, 0.5]), r"shape \(2,\)"),
        (np.array([[0.5, np.nan]]), "NaN"),
        (np.array([[np.inf, 0.5]]), "NaN or infinity"),
        (np.array([[0.5, 0.5], [0.5, 0.6]]), "row 1 sum to 1.1"),
        (np.array([[1.5, -0.5]]), "probability of -0.5"),
    ],
)
@pytest.mark.parametrize("score", [*SCORES.values(), check_proba])
def test_what_is_no_probability(score: object, proba: np.ndarray, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        score(proba)  # type: ignore[operator]


@pytest.mark.parametrize("score", SCORES.values())
def test_single_precision_is_enough(score: Callable[[np.ndarray], np.ndarray]) -> None:
    proba = random_proba(500, 20)
    assert score(proba.astype(np.float32)) == pytest.approx(score(proba), abs=1e-5)
