"""Disagreement of a committee against direct sums, for examples and for sequences."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.data.committees import bald, mean_proba, mean_std
from trilobe.data.scores import entropy
from trilobe.errors import UsageError
from trilobe.rows import as_rows

seeds = st.integers(0, 2**32 - 1)


def entropy_of(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


@given(st.integers(2, 5), st.integers(1, 4), seeds)
def test_bald_is_the_mutual_information_of_class_and_member(s: int, k: int, seed: int) -> None:
    samples = np.random.default_rng(seed).dirichlet(np.full(k, 0.3), size=(s, 3))
    for i, got in enumerate(bald(samples)):
        joint = samples[:, i] / s  # p(member, class)
        apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        known = sum(j * math.log(j / a) for j, a in zip(joint.ravel(), apart.ravel(), strict=True) if j > 0)
        assert got == pytest.approx(known, abs=1e-9)
        assert -1e-12 <= got <= math.log(min(k, s)) + 1e-12


@given(st.integers(2, 5), st.integers(1, 4), seeds)
def test_mean_std_by_its_definition(s: int, k: int, seed: int) -> None:
    samples = np.random.default_rng(seed).dirichlet(np.ones(k), size=(s, 3))
    by_hand = [
        sum(math.sqrt(sum((v - sum(c) / s) ** 2 for v in c) / s) for c in samples[:, i].T.tolist()) / k
        for i in range(3)
    ]
    assert mean_std(samples) == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize("score", [bald, mean_std])
def test_members_of_one_mind_leave_nothing_to_learn(score: Callable[[np.ndarray], np.ndarray]) -> None:
    torn = np.tile([[0.5, 0.5]], (4, 3, 1))
    assert score(torn) == pytest.approx(0) and entropy(torn[0]) == pytest.approx(math.log(2))


@given(st.integers(2, 4), seeds)
def test_sequences_are_the_mean_over_their_tokens(s: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, size=4)
    members = [as_rows([rng.dirichlet(np.ones(3), size=t) for t in sizes]) for _ in range(s)]
    for score in (bald, mean_std):
        by_hand = [score(np.stack([m[i] for m in members])).mean() for i in range(4)]
        assert score(members) == pytest.approx(by_hand)
    for i, row in enumerate(mean_proba(members)):
        assert row == pytest.approx(np.mean([m[i] for m in members], axis=0))
    dense = rng.dirichlet(np.ones(3), size=(s, 4, 2))
    rows = np.empty((s, 4), dtype=object)
    for i in range(s):
        for j in range(4):
            rows[i, j] = dense[i, j]
    assert bald(dense).tolist() == bald(rows).tolist()


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        (np.full((1, 3, 2), 0.5), r"1 prediction\(s\) of each example; expected at least 2"),
        ([np.full((3, 2), 0.5), np.full((2, 2), 0.5)], r"members that saw \[2, 3\] examples"),
        ([np.full((3, 2), 0.5), np.full((3, 4), 0.25)], "expected the same classes for all"),
        (np.full((2, 3, 2), 0.4), "sum to 0.8"),
        (np.full((2, 3, 2), np.nan), "NaN"),
        ([as_rows([np.eye(2), np.eye(2)[:1]]), as_rows([np.eye(2)[:1], np.eye(2)])], "of unlike length"),
        (np.full((2, 2), 0.5), "shape"),
    ],
)
@pytest.mark.parametrize("score", [bald, mean_std, mean_proba])
def test_what_is_no_committee(score: Callable[..., object], samples: object, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        score(samples)
