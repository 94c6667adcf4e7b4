"""Simulated people answer as their confusion matrix says, full and partial questions alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.data.annotators import SimulatedAnnotator, typical_crowd
from trilobe.errors import AnswerError, UsageError
from trilobe.types import LabelSpace, Question

SPACE = LabelSpace(("a", "b", "c"), parents={"a": "ab", "b": "ab"})
SKEWED = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]])


def test_frequencies_are_those_of_the_matrix() -> None:
    ann, rng = SimulatedAnnotator("ann", SKEWED), np.random.default_rng(0)
    for truth in range(3):
        said = [ann.answer(Question("q", "x"), truth, SPACE, rng)[0] for _ in range(3000)]
        assert {r.kind for r in said} == {"class"}
        share = np.bincount([SPACE.index(r.labels[0]) for r in said], minlength=3) / 3000
        np.testing.assert_allclose(share, SKEWED[truth], atol=0.03)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from(["a", "b", "c", "ab"]), min_size=1), st.integers(0, 2))
def test_a_partial_question_is_answered_by_the_same_perception(choices: set[str], truth: int) -> None:
    question = Question("q", "x", tuple(sorted(choices)))
    if SPACE.mask(question.choices).all():
        return
    full = SimulatedAnnotator("ann", SKEWED).answer(Question("q", "x"), truth, SPACE, np.random.default_rng(7))
    part = SimulatedAnnotator("ann", SKEWED).answer(question, truth, SPACE, np.random.default_rng(7))
    assert part[1] == full[1]
    assert part[0].possible(SPACE)[SPACE.index(full[0].labels[0])], "yes and no never exclude what was perceived"
    assert part[0].labels == question.choices


def test_seconds_scatter_around_the_median() -> None:
    ann, rng = SimulatedAnnotator("ann", np.eye(3), seconds=4.0), np.random.default_rng(0)
    seconds = [ann.answer(Question("q", "x"), 0, SPACE, rng)[1] for _ in range(2000)]
    assert np.median(seconds) == pytest.approx(4, abs=0.2) and min(seconds) > 0 and np.std(seconds) > 0.5


def test_the_same_generator_says_the_same() -> None:
    ann = SimulatedAnnotator("ann", SKEWED)
    twice = [[ann.answer(Question("q", "x"), 0, SPACE, rng) for _ in range(5)]
             for rng in (np.random.default_rng(1), np.random.default_rng(1))]  # fmt: skip
    assert twice[0] == twice[1]


@pytest.mark.parametrize("k", [2, 3, 10])
def test_the_typical_crowd(k: int) -> None:
    crowd = {a.name: a for a in typical_crowd(LabelSpace(tuple(f"c{i}" for i in range(k))))}
    assert crowd["eva"].quality == 1 and crowd["ada"].quality == pytest.approx(0.95)
    assert crowd["cleo"].quality == pytest.approx(0.6) and crowd["eva"].seconds > 2 * crowd["ada"].seconds
    dan = crowd["dan"].confusion
    assert dan[0, 1] == dan[1, 0] == 0.65 and dan[0, 0] == dan[1, 1] == 0.35
    np.testing.assert_allclose(np.diag(dan)[2:], 0.97)


def test_which_classes_are_confused_can_be_said() -> None:
    dan = typical_crowd(SPACE, ["c", "a"])[3].confusion
    assert dan[2, 0] == dan[0, 2] == 0.65 and dan[1, 1] == 0.97
    with pytest.raises(UsageError, match="expected two classes"):
        typical_crowd(SPACE, ["a", "a"])
    with pytest.raises(UsageError, match="expected two classes"):
        typical_crowd(SPACE, ["a", "b", "c"])
    with pytest.raises(AnswerError, match="unknown label 'z'"):
        typical_crowd(SPACE, ["a", "z"])


@pytest.mark.parametrize(
    "matrix", [np.ones((2, 2)), np.array([[1.5, -0.5], [0, 1]]), np.full((2, 2), np.nan), np.ones((2, 1)), np.ones(1)]
)
def test_a_matrix_that_is_none(matrix: np.ndarray) -> None:
    with pytest.raises(UsageError, match="confusion matrix of ann"):
        SimulatedAnnotator("ann", matrix)
