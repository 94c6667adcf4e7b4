"""Trees made for those who have none: planted groups are found, every class is a leaf, nonsense is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.data.partial import choose, tree_questions
from trilobe.data.trees import check_tree, confusion_points, mean_points, name_points, tree
from trilobe.errors import UsageError
from trilobe.types import LabelSpace


@given(st.integers(2, 24), st.integers(0, 2**32 - 1))
def test_a_tree_is_binary_and_reaches_every_class_once(k: int, seed: int) -> None:
    names = tuple(f"c{i}" for i in range(k))
    parents = tree(names, np.random.default_rng(seed).normal(size=(k, 3)))
    space = LabelSpace(names, parents)
    check_tree(space)
    nodes = set(parents.values())
    assert len(nodes) == k - 1
    for node in nodes:
        children = [space.mask([child]) for child, above in parents.items() if above == node]
        assert len(children) == 2
        assert not (children[0] & children[1]).any()
        assert (children[0] | children[1]).tolist() == space.mask([node]).tolist()
        assert node == "|".join(n for n, inside in zip(names, space.mask([node]), strict=True) if inside)


def test_where_nothing_tells_classes_apart_the_tree_is_balanced() -> None:
    names = tuple(f"c{i}" for i in range(16))
    space = LabelSpace(names, tree(names, np.eye(16)))
    assert max(len(space._ancestors(n)) for n in names) == 4


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (3, 0, 4, 1, 5, 2)])
def test_planted_groups_are_found(order: tuple[int, ...]) -> None:
    """Two groups that a model keeps apart but mixes up inside, and the same by features."""
    rng = np.random.default_rng(0)
    group = np.arange(6) // 3
    confusion = np.where(group[:, None] == group, 20.0, 1.0) + 60 * np.eye(6)
    belief = np.eye(6)[rng.integers(6, size=300)]
    proba = belief @ (confusion / confusion.sum(axis=1, keepdims=True))
    features = 5.0 * group[belief.argmax(axis=1)][:, None] + rng.normal(size=(300, 2))
    names, at = tuple(f"c{i}" for i in order), list(order)
    for points in (confusion_points(confusion), confusion_points(belief.T @ proba), mean_points(features, belief)):
        found = set(tree(names, points[at]).values())
        assert {"|".join(n for n in names if int(n[1]) // 3 == g) for g in (0, 1)} <= found


def test_it_does_not_matter_which_of_two_is_taken_for_the_other() -> None:
    """No similar pair but one that goes one way only."""
    confusion = 50 * np.eye(4)
    confusion[2, 0] = 40.0
    for matrix in (confusion, confusion.T):
        assert tree(tuple("abcd"), confusion_points(matrix))["c"] == "a|c"


def test_distances_are_hellinger_s() -> None:
    """Against the definition: 1 - sum sqrt(p q)."""
    rows = np.random.default_rng(0).dirichlet(np.ones(5), size=5)
    points = confusion_points(rows)
    for p, x in zip(rows, points, strict=True):
        for q, y in zip(rows, points, strict=True):
            assert ((x - y) ** 2).sum() / 2 == pytest.approx(1 - np.sqrt(p * q).sum())


def test_names_with_words_in_common_stand_together() -> None:
    names = ("NUM:date", "LOC:city", "NUM:count", "LOC:country", "HUM:ind", "HUM:group", "LOC:state")
    space = LabelSpace(names, tree(names, name_points(names)))
    sets = {frozenset(np.array(names)[row]) for row in tree_questions(space)[1]}
    for start in ("NUM", "LOC", "HUM"):
        assert frozenset(n for n in names if n.startswith(start)) in sets
    assert name_points(["BlueCar", "RedCar", "Ütö"])[2].tolist() == [0.0] * 4
    assert tree(("x", "y", "z"), name_points(("x", "y", "z")))  # nothing in common: any tree


def test_a_built_tree_makes_questions_that_halve() -> None:
    names = tuple(f"c{i:02}" for i in range(16))
    rng = np.random.default_rng(0)
    space = LabelSpace(names, tree(names, rng.normal(size=(16, 2))))
    _, questions = tree_questions(space)
    truth, left, asked = 11, np.ones((1, 16), dtype=bool), 0
    while left.sum() > 1:
        one = choose(np.full((1, 16), 1 / 16), questions, 1, {"full": np.inf}, possible=left)
        q = questions[one.question[0]]
        left &= q if q[truth] else ~q
        asked += 1
    assert asked <= 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LabelSpace(("a", "b"), {"a": "x", "x": "y", "y": "x", "b": "x"}), "cycle"),
        (lambda: LabelSpace(("a", "b"), {"a": "x", "c": "x"}), "'c' a parent"),
        (lambda: check_tree(LabelSpace(("a", "b"), {"a": "x"})), "lacks \\['b'\\]"),
        (lambda: check_tree(LabelSpace(("a", "b"), {"a": "b", "b": "x"})), "both as a class and as a node"),
        (lambda: tree(("a", "b"), np.zeros((3, 2))), "points of shape"),
        (lambda: tree(("a", "b"), np.array([[np.nan], [0.0]])), "finite"),
        (lambda: tree(("a", "a"), np.zeros((2, 1))), "names"),
        (lambda: confusion_points(np.zeros((2, 3))), "confusion matrix"),
        (lambda: confusion_points(-np.eye(2)), "at least 0"),
        (lambda: mean_points(np.zeros((3, 2)), np.zeros((2, 2))), "beliefs of shape"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
