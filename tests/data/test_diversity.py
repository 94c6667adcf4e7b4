"""Covering batches against slow direct definitions."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.data.diversity import badge, k_center
from trilobe.errors import UsageError

seeds = st.integers(0, 2**32 - 1)


def slow_k_center(x: np.ndarray, n: int, known: np.ndarray) -> list[int]:
    centers, chosen = [*known], []
    for _ in range(n):
        far = [-1.0 if i in chosen else min(((v - c) ** 2).sum() for c in centers) for i, v in enumerate(x)]
        chosen.append(int(np.argmax(far)))
        centers.append(x[chosen[-1]])
    return chosen


@given(seeds, st.integers(1, 12))
def test_farthest_first_by_its_definition(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x, known = rng.normal(size=(12, 3)), rng.normal(size=(2, 3))
    assert k_center(x, n, known).tolist() == slow_k_center(x, n, known)


@settings(max_examples=20)
@given(seeds)
def test_radius_is_at_most_twice_the_best(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(9, 2))

    def radius(centers: np.ndarray) -> float:
        return float(np.sqrt(((x[:, None] - centers) ** 2).sum(-1).min(1).max()))

    best = min(radius(x[list(c)]) for c in combinations(range(9), 3))
    assert radius(x[k_center(x, 3, seed=seed)]) <= 2 * best + 1e-9


@given(seeds)
def test_badge_distances_are_those_of_the_gradients(seed: int) -> None:
    """The same draws as k-means++ on the gradients written out in full."""
    rng = np.random.default_rng(seed)
    proba, h, n = rng.dirichlet(np.ones(4), 20), rng.normal(size=(20, 5)), 6
    a = proba.copy()
    a[np.arange(20), a.argmax(1)] -= 1
    g = (a[:, :, None] * h[:, None, :]).reshape(20, -1)
    draw, chosen = np.random.default_rng(seed), [int((g**2).sum(1).argmax())]
    nearest = np.full(20, np.inf)
    while len(chosen) < n:
        nearest = np.minimum(nearest, ((g - g[chosen[-1]]) ** 2).sum(1))
        weight = nearest.copy()
        weight[chosen] = 0
        chosen.append(int(np.searchsorted(np.cumsum(weight), draw.random() * weight.sum(), side="right")))
    got = badge(proba, h, n, seed).tolist()
    assert sum(x == y for x, y in zip(got, chosen, strict=True)) >= n - 1  # float32 may move one draw at an edge


@pytest.mark.parametrize("n", [1, 5, 6])
def test_choices_are_distinct_also_among_copies_and_certain_examples(n: int) -> None:
    x, certain = np.zeros((6, 2)), np.tile([1.0, 0.0], (6, 1))
    assert len(set(k_center(x, n).tolist())) == n
    assert len(set(badge(certain, x, n).tolist())) == n


def test_certain_examples_are_all_alike_and_asked_once() -> None:
    proba = np.array([[1.0, 0.0]] * 50 + [[0.5, 0.5]] * 3)
    h = np.random.default_rng(0).normal(size=(53, 4))
    for seed in range(5):
        assert {50, 51, 52} < set(badge(proba, h, 4, seed).tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: k_center(np.zeros((2, 2)), 3), "3 of features of shape"),
        (lambda: k_center(np.zeros((2, 2)), 0), "0 of features"),
        (lambda: k_center(np.array([[np.nan]]), 1), "NaN"),
        (lambda: badge(np.array([[0.5, 0.4]]), np.zeros((1, 2)), 1), "sum to 0.9"),
        (lambda: badge(np.array([[0.5, 0.5]]), np.zeros((2, 2)), 1), "1 probabilities and 2 features"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
