"""Scores against definitions, and what a selection of a batch must and must not do."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.data.query import SCORES, check_proba, entropy, least_confidence, margin, select, typical
from trilobe.errors import NotEnoughData, UsageError


def random_proba(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.5), n)


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tight groups far apart, and which group each row is of."""
    rng, group = np.random.default_rng(seed), np.repeat(np.arange(len(sizes)), sizes)
    return group[:, None] * 100.0 + rng.normal(0, 1, (len(group), 2)), group


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


def test_without_diversity_the_top_scores_are_taken_in_order() -> None:
    proba = random_proba(50, 3)
    for chosen in (select("margin", 5, proba), select("margin", 5, proba, proba, diversity=1)):
        assert chosen.index.tolist() == np.argsort(-margin(proba))[:5].tolist()
        assert chosen.score.tolist() == margin(proba)[chosen.index].tolist()
        assert (chosen.strategy, chosen.reason) == ("margin.v1", "the model is torn between classes here")


def test_diversity_asks_once_per_group_of_like_examples() -> None:
    features, group = blobs([20, 20, 20])
    doubt = np.where(group == 0, 0.50, np.where(group == 1, 0.55, 0.60)) + np.random.default_rng(0).random(60) * 1e-3
    proba = np.stack([doubt, 1 - doubt], axis=1)
    assert set(group[select("margin", 3, proba, features, diversity=1).index]) == {0}
    spread = select("margin", 3, proba, features, diversity=20)
    assert sorted(group[spread.index]) == [0, 1, 2] and (np.diff(spread.score) <= 0).all()


def test_only_the_best_few_times_n_compete() -> None:
    features, group = blobs([5, 5, 90])
    doubt = np.where(group == 2, 0.99, 0.5)
    proba = np.stack([doubt, 1 - doubt], axis=1)
    chosen = select("margin", 2, proba, features, diversity=5)
    assert sorted(group[chosen.index]) == [0, 1]


def test_ties_fall_by_seed_not_by_position() -> None:
    proba = np.full((100, 2), 0.5)
    first = {tuple(select("margin", 3, proba, seed=s).index.tolist()) for s in range(10)}
    assert len(first) > 5


def test_typical_takes_the_middle_of_each_group_largest_first() -> None:
    features, group = blobs([10, 40, 20])
    chosen = typical(features, 3)
    assert group[chosen.index].tolist() == [1, 2, 0]
    assert chosen.score.tolist() == pytest.approx([40 / 70, 20 / 70, 10 / 70])
    for i in chosen.index:
        mates = features[group == group[i]]
        distance = ((mates - mates.mean(0)) ** 2).sum(1)
        assert ((features[i] - mates.mean(0)) ** 2).sum() == pytest.approx(distance.min())


def test_typical_takes_images_as_they_are() -> None:
    images = np.random.default_rng(0).random((7, 1, 4, 4)).astype(np.float32)
    assert typical(images, 3).index.tolist() == typical(images.reshape(7, -1), 3).index.tolist()


def test_without_a_model_typical_is_used_whatever_was_wished() -> None:
    features, _ = blobs([5, 5])
    chosen = select("margin", 2, None, features)
    assert chosen.strategy == "typical.v1" and chosen.index.tolist() == typical(features, 2).index.tolist()


def test_random_is_neutral() -> None:
    proba = np.stack([np.linspace(0.5, 1, 50), np.linspace(0.5, 0, 50)], axis=1)
    counts = np.zeros(50)
    for seed in range(400):
        counts[select("random", 10, proba, seed=seed).index] += 1
    assert abs(counts[:25].sum() - 2000) < 150 and counts.min() > 40


def test_a_users_function_is_named_in_the_reason() -> None:
    def reddest(proba: np.ndarray) -> np.ndarray:
        return proba[:, 0]

    chosen = select(reddest, 1, np.array([[0.1, 0.9], [0.8, 0.2]]))
    assert (chosen.index.tolist(), chosen.strategy, chosen.reason) == ([1], "reddest", "scores high in reddest")


@pytest.mark.parametrize(
    "score", [lambda p: p, lambda p: p[:1, 0], lambda p: p[:, 0] * np.nan, lambda p: -np.log(p[:, 0] * 0 + 1) + np.inf]
)
def test_scores_of_a_users_function_are_checked(score: object) -> None:
    with pytest.raises(UsageError, match="gave scores of shape"):
        select(score, 1, random_proba(4, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("proba", [None, random_proba(4, 2)], ids=["no model", "model"])
def test_wrong_wishes(proba: np.ndarray | None) -> None:
    features = np.eye(4)
    with pytest.raises(UsageError, match="unknown strategy 'margn'; expected one of margin, entropy"):
        select("margn", 2, proba, features)
    for n in (0, -1):
        with pytest.raises(UsageError, match=f"{n} questions; expected at least 1"):
            select("margin", n, proba, features)
    with pytest.raises(UsageError, match="NaN or infinity"):
        select("margin", 2, proba, features * np.nan)


def test_a_pool_of_nothing_and_features_of_another() -> None:
    for proba, features in ((None, None), (None, np.zeros((0, 3))), (np.zeros((0, 2)), np.zeros((0, 3)))):
        with pytest.raises(NotEnoughData, match="nothing to choose from"):
            select("margin", 2, proba, features)
    with pytest.raises(UsageError, match="3 rows of features for 4 examples"):
        select("margin", 2, random_proba(4, 2), np.eye(3))
