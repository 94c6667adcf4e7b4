"""Partial questions: every gain against a direct sum over classes and answers, and what a person would expect."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.data.beliefs import AnswerTable, posterior, symmetric_confusion
from trilobe.data.partial import (
    choose,
    expected_decrease_in_classes,
    expected_remaining_classes,
    full_information_gain,
    information_gain,
    tree_questions,
)
from trilobe.errors import UsageError
from trilobe.types import Answer, LabelSpace, Response


def entropy(p: np.ndarray) -> float:
    return float(-sum(v * np.log(v) for v in p if v > 0))


def slow_gain(p: np.ndarray, question: np.ndarray, confusion: np.ndarray) -> float:
    """Entropy before minus expected entropy after, by Bayes' rule for each answer."""
    after = 0.0
    for inside in (question, ~question):
        joint = np.array([p[k] * sum(confusion[k, j] for j in np.flatnonzero(inside)) for k in range(len(p))])
        if joint.sum() > 0:
            after += joint.sum() * entropy(joint / joint.sum())
    return entropy(p) - after


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k, seed = draw(st.integers(2, 6)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    proba = rng.dirichlet(np.full(k, draw(st.sampled_from([0.1, 1.0, 10.0]))), size=3)
    return proba, rng.random((4, k)) < 0.5, rng.dirichlet(np.ones(k), size=k)


@given(problems())
def test_information_gain_is_the_fall_of_entropy(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    proba, questions, confusion = problem
    for errors in (None, confusion):
        gain = information_gain(proba, questions, errors)
        by_hand = [[slow_gain(p, q, np.eye(len(p)) if errors is None else errors) for q in questions] for p in proba]
        assert gain == pytest.approx(np.array(by_hand), abs=1e-9)
        assert (gain <= np.log(2) + 1e-12).all()


@given(problems())
def test_asking_for_the_class_teaches_at_least_as_much_as_any_set(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """The yes/no answer is a function of the perceived class (data processing inequality)."""
    proba, questions, confusion = problem
    for errors in (None, confusion):
        full = full_information_gain(proba, errors)
        assert (information_gain(proba, questions, errors) <= full[:, None] + 1e-9).all()
    assert full_information_gain(proba) == pytest.approx(np.array([entropy(p) for p in proba]))


@given(problems())
def test_remaining_classes_against_a_direct_sum(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    proba, questions, _ = problem
    possible = proba >= np.sort(proba, axis=1)[:, -2:-1]  # the two likeliest
    remaining = expected_remaining_classes(proba, possible, questions)
    for i, (p, left) in enumerate(zip(proba, possible, strict=True)):
        p = np.where(left, p, 0) / p[left].sum()
        for j, q in enumerate(questions):
            want = p[q].sum() * (left & q).sum() + p[~q].sum() * (left & ~q).sum()
            assert remaining[i, j] == pytest.approx(want)
    decrease = expected_decrease_in_classes(proba, possible, questions)
    assert decrease == pytest.approx(possible.sum(axis=1, keepdims=True) - remaining)


def test_binary_search_by_gain_needs_log2_questions() -> None:
    """Eight equally likely classes: the best question halves them, three answers name the class."""
    names = tuple("abcdefgh")
    parents = {n: f"{i // 2}" for i, n in enumerate(names)} | {str(i): "LR"[i // 2] for i in range(4)}
    space = LabelSpace(names, parents)
    _, questions = tree_questions(space)
    possible, asked = np.ones((1, 8), dtype=bool), 0
    truth = space.index("f")
    while possible.sum() > 1:
        p = possible / possible.sum()
        q = questions[information_gain(p, questions)[0].argmax()]
        possible &= q if q[truth] else ~q
        asked += 1
    assert asked == 3
    assert possible[0, truth]


def test_the_belief_after_the_answer_is_the_engine_s() -> None:
    """Averaged over its answers, the belief of the engine has lost exactly the expected gain of entropy."""
    space, p = LabelSpace(("a", "b", "c")), np.array([0.5, 0.3, 0.2])
    confusion, question = symmetric_confusion(1, 3, 0.8), np.array([True, False, True])
    after = 0.0
    for kind in ("one_of", "not"):
        said = [Answer("1", "q", "x", "ann", Response(kind, ("a", "c")))]  # type: ignore[arg-type]
        belief, log_evidence = posterior(AnswerTable.from_answers(said, space), p, confusion)
        after += float(np.exp(log_evidence[0])) * entropy(belief[0])
    assert entropy(p) - after == pytest.approx(float(information_gain(p[None], question[None], confusion[0])[0, 0]))


def test_cheap_questions_win_when_they_are_cheap_and_doubt_is_asked_again() -> None:
    proba = np.array([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0]])
    halves = np.array([[True, False, True, False]])
    cheap = choose(proba, halves, 3, {"full": 3.0, "partial": 1.0})
    assert cheap.question.tolist()[:2] == [0, 0]
    dear = choose(proba, halves, 3, {"full": 3.0, "partial": 2.9})
    assert dear.index.tolist() == [1, 0, 2]
    assert dear.question.tolist()[:1] == [-1]
    assert cheap.rate.tolist() == sorted(cheap.rate, reverse=True)
    assert cheap.rate[-1] == 0.0  # what is certain teaches nothing


def test_a_careless_annotator_is_worth_less() -> None:
    proba, sets = np.array([[0.5, 0.5]]), np.array([[True, False]])
    gains = [float(information_gain(proba, sets, symmetric_confusion(1, 2, a)[0])[0, 0]) for a in (0.5, 0.7, 0.9, 1.0)]
    assert gains[0] == pytest.approx(0, abs=1e-12)
    assert gains == sorted(gains)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: information_gain(np.array([[0.7, 0.7]]), np.eye(2, dtype=bool)), "sum to 1.4"),
        (lambda: information_gain(np.array([[np.nan, 1]]), np.eye(2, dtype=bool)), "NaN"),
        (lambda: information_gain(np.array([[0.5, 0.5]]), np.eye(3, dtype=bool)), "questions of shape"),
        (lambda: information_gain(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), np.ones((2, 2))), "confusion matrix"),
        (lambda: choose(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), 0), "0 questions"),
        (lambda: choose(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), 1, {"full": -1.0}), "positive"),
        (lambda: expected_remaining_classes(np.eye(2), np.zeros((2, 2), bool), np.eye(2, dtype=bool)), "class left"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
