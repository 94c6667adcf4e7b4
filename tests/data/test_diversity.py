"""Covering batches against slow direct definitions."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from trilobe.data import diversity
from trilobe.data.diversity import badge, facility_location, k_center, typical
from trilobe.errors import UsageError

seeds = st.integers(0, 2**32 - 1)


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tight groups far apart, and which group each row is of."""
    rng, group = np.random.default_rng(seed), np.repeat(np.arange(len(sizes)), sizes)
    return group[:, None] * 100.0 + rng.normal(0, 1, (len(group), 2)), group


def slow_k_center(x: np.ndarray, n: int, known: np.ndarray) -> list[int]:
    chosen: list[int] = []
    for _ in range(n):
        far = ((x[:, None] - np.concatenate([known, x[chosen]])) ** 2).sum(-1).min(1)
        far[chosen] = -1
        chosen.append(int(far.argmax()))
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


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 90), st.booleans())
def test_farthest_first_in_a_pool_larger_than_a_block(seed: int, n: int, alike: bool) -> None:
    """Bounds and fronts give what a pass over the whole pool for each choice gives."""
    rng = np.random.default_rng(seed)
    x, known = rng.normal(size=(90, 3)), rng.normal(size=(3, 3))
    if alike:  # tight groups: a front is used up at once
        x = x[:6][rng.integers(6, size=90)] + 1e-3 * x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diversity, "BLOCK", 8)
        assert k_center(x, n, known).tolist() == slow_k_center(x, n, known)


def gradients(proba: np.ndarray, h: np.ndarray) -> np.ndarray:
    a = proba.copy()
    a[np.arange(len(a)), a.argmax(1)] -= 1
    return (a[:, :, None] * h[:, None, :]).reshape(len(a), -1)


@pytest.mark.parametrize("block", [2, 8192])
def test_badge_draws_by_the_distances_of_the_gradients(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second and third choice are distributed as k-means++ on the gradients written out in full (chi-square)."""
    monkeypatch.setattr(diversity, "BLOCK", block)
    rng = np.random.default_rng(0)
    proba, h = rng.dirichlet(np.ones(3), 5), rng.normal(size=(5, 2))
    g = gradients(proba, h)
    apart = ((g[:, None] - g) ** 2).sum(-1)
    first = int((g**2).sum(1).argmax())
    want = np.zeros((5, 5))
    for i in range(5):
        after = np.minimum(apart[first], apart[i])
        want[i] = apart[first, i] / apart[first].sum() * after / after.sum() if i != first else 0
    seen, draws = np.zeros((5, 5)), 2000
    for seed in range(draws):
        one, two, three = badge(proba, h, 3, seed)
        assert one == first
        seen[two, three] += 1
    possible = want > 0
    assert (seen[~possible] == 0).all()
    assert chisquare(seen[possible], want[possible] * draws).pvalue > 1e-3


@given(seeds)
def test_bounds_of_the_gradients_are_their_distances(seed: int) -> None:
    rng = np.random.default_rng(seed)
    proba, h = rng.dirichlet(np.ones(4), 30), rng.normal(size=(30, 5))
    g, a = gradients(proba, h), gradients(proba, np.ones((30, 1)))
    near = diversity._Nearest(30, lambda index: (a[index], h[index]))
    near.add((a[:3], h[:3]))
    near.refresh_all()
    assert near.bound == pytest.approx(((g[:, None] - g[:3]) ** 2).sum(-1).min(1), abs=1e-9)


@given(seeds, st.integers(1, 4))
def test_facility_location_is_greedy_and_near_the_best(seed: int, n: int) -> None:
    """The lazy choice is the greedy one, and no batch reaches more than e / (e - 1) times its value (brute force)."""
    rng = np.random.default_rng(seed)
    likeness, weight = rng.random((8, 12)), rng.random(12)

    def value(batch: list[int]) -> float:
        return float(likeness[batch].max(axis=0) @ weight)

    greedy: list[int] = []
    for _ in range(n):
        greedy.append(max((i for i in range(8) if i not in greedy), key=lambda i: value([*greedy, i])))
    assert diversity._lazy_greedy(likeness, weight, n).tolist() == greedy
    best = max(value(list(batch)) for batch in combinations(range(8), n))
    assert value(greedy) >= (1 - 1 / np.e) * best


def test_facility_location_stands_for_the_doubtful() -> None:
    x = np.repeat([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]], 30, axis=0) + np.random.default_rng(0).normal(size=(90, 2))
    doubt = np.repeat([0.0, 0.8, 1.0], 30)
    assert sorted(facility_location(x, 2, doubt) // 30) == [1, 2]
    assert sorted(facility_location(x, 3) // 30) == [0, 1, 2]
    assert sorted(facility_location(x, 3, np.zeros(90)) // 30) == [0, 1, 2]  # no doubt anywhere: all vote alike
    assert sorted(facility_location(x, 3, voters=40) // 30) == [0, 1, 2]


@pytest.mark.parametrize("doubt", [[1.0, 2.0], [1.0, np.nan, 1.0], [1.0, -1.0, 1.0]])
def test_facility_location_wants_weights(doubt: list[float]) -> None:
    with pytest.raises(UsageError, match="scores of shape"):
        facility_location(np.eye(3), 2, np.array(doubt))


def test_typical_takes_the_middle_of_each_group_largest_first() -> None:
    features, group = blobs([10, 40, 20])
    index, share = typical(features, 3)
    assert group[index].tolist() == [1, 2, 0]
    assert share.tolist() == pytest.approx([40 / 70, 20 / 70, 10 / 70])
    for i in index:
        mates = features[group == group[i]]
        distance = ((mates - mates.mean(0)) ** 2).sum(1)
        assert ((features[i] - mates.mean(0)) ** 2).sum() == pytest.approx(distance.min())


def test_typical_takes_images_as_they_are() -> None:
    images = np.random.default_rng(0).random((7, 1, 4, 4)).astype(np.float32)
    assert typical(images, 3)[0].tolist() == typical(images.reshape(7, -1), 3)[0].tolist()


def test_typical_of_a_large_pool_clusters_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    features, group = blobs([300, 600, 100])
    monkeypatch.setattr(diversity, "BLOCK", 60)
    index, share = typical(features, 3)
    assert group[index].tolist() == [1, 0, 2] and share.sum() == pytest.approx(1)
    assert np.abs(share - [0.6, 0.3, 0.1]).max() < 0.15


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
        (lambda: k_center(np.eye(2), 1, np.array([[np.inf, 0]])), "NaN or infinity"),
        (lambda: facility_location(np.eye(2), 3), "3 of features"),
        (lambda: typical(np.array([[np.nan]]), 1), "NaN"),
        (lambda: badge(np.array([[0.5, 0.4]]), np.zeros((1, 2)), 1), "sum to 0.9"),
        (lambda: badge(np.array([[0.5, 0.5]]), np.zeros((2, 2)), 1), "1 probabilities and 2 features"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
