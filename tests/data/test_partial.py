"""Partial questions: every gain against a direct sum over classes and answers, and what a person would expect."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.data.beliefs import AnswerTable, posterior, symmetric_confusion
from trilobe.data.partial import (
    STRATEGIES,
    Strategy,
    choose,
    expected_decrease_in_classes,
    expected_remaining_classes,
    full_information_gain,
    information_gain,
    measured_seconds,
    tree_questions,
)
from trilobe.errors import AnswerError, UsageError
from trilobe.types import GOLD, Answer, LabelSpace, Question, Response

NO_FULL = {"full": np.inf, "partial": 1.0}


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
    cheap = choose(proba, halves, 3, {"full": 3.0, "partial": 1.0}, strategy="eig")
    assert cheap.question.tolist() == [0, 0]
    dear = choose(proba, halves, 3, {"full": 3.0, "partial": 2.9}, strategy="eig")
    assert dear.index.tolist() == [1, 0]  # and what is certain is not asked about
    assert dear.question.tolist()[:1] == [-1]
    assert cheap.rate.tolist() == sorted(cheap.rate, reverse=True)


def test_a_careless_annotator_is_worth_less() -> None:
    proba, sets = np.array([[0.5, 0.5]]), np.array([[True, False]])
    gains = [float(information_gain(proba, sets, symmetric_confusion(1, 2, a)[0])[0, 0]) for a in (0.5, 0.7, 0.9, 1.0)]
    assert gains[0] == pytest.approx(0, abs=1e-12)
    assert gains == sorted(gains)


@st.composite
def pools(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, what is still possible, questions."""
    k, n, seed = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    possible = rng.random((n, k)) < 0.6
    possible[np.arange(n), rng.integers(k, size=n)] = True
    return rng.dirichlet(np.full(k, 0.5), size=n), possible, rng.random((draw(st.integers(0, 5)), k)) < 0.5


@given(pools(), st.sampled_from(sorted(STRATEGIES)), st.integers(1, 15))
def test_what_is_implied_is_never_asked_and_everything_else_is(
    pool: tuple[np.ndarray, np.ndarray, np.ndarray], strategy: str, n: int
) -> None:
    proba, possible, questions = pool
    asked = choose(proba, questions, n, NO_FULL, possible=possible, strategy=strategy)
    for i, q in zip(asked.index, asked.question, strict=True):
        assert (possible[i] & questions[q]).any()
        assert (possible[i] & ~questions[q]).any()
    left = [any((row & q).any() and (row & ~q).any() for q in questions) for row in possible]
    assert len(set(asked.index)) == len(asked.index) == min(n, sum(left))


@given(pools())
def test_the_choice_is_the_best_of_all_pairs(pool: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Against a loop over every example and question, as in the paper's equations."""
    proba, possible, questions = pool
    for strategy in ("closing", "eig", "erc", "edc"):
        best = -np.inf
        for p, left in zip(np.where(possible, proba, 0), possible, strict=True):
            p = p / p.sum()
            for q in questions:
                inside, outside = (left & q).sum(), (left & ~q).sum()
                if inside and outside:
                    after = p[q].sum() * inside + p[~q].sum() * outside
                    gain = slow_gain(p, q, np.eye(len(p)))
                    by = {"closing": gain / after**0.5, "eig": gain, "erc": 1 / after, "edc": left.sum() - after}
                    best = max(best, by[strategy])
        asked = choose(proba, questions, 1, NO_FULL, possible=possible, strategy=strategy)
        assert (asked.rate[0] if len(asked.rate) else -np.inf) == pytest.approx(best, abs=1e-9)


def annotated(strategy: str, proba: np.ndarray, truth: np.ndarray, questions: np.ndarray) -> tuple[int, list[int]]:
    """Ask one after the other until every class is known: how many questions, and about whom each was."""
    possible, log = np.ones(proba.shape, dtype=bool), []
    while len(
        (asked := choose(proba, questions, 1, NO_FULL, seed=len(log), possible=possible, strategy=strategy)).index
    ):
        i, q = int(asked.index[0]), questions[asked.question[0]]
        possible[i] &= q if q[truth[i]] else ~q
        log.append(i)
    assert (possible.argmax(axis=1) == truth).all()
    assert (possible.sum(axis=1) == 1).all()
    return len(log), log


def test_baselines_do_as_the_paper_says() -> None:
    rng = np.random.default_rng(0)
    space = LabelSpace(tuple("abcdefgh"), {n: "left" if n < "e" else "right" for n in "abcdefgh"})
    truth = rng.integers(8, size=60)
    proba = 0.3 / 8 + 0.7 * np.eye(8)[np.where(rng.random(60) < 0.8, truth, rng.integers(8, size=60))]
    proba[7] = 1 / 8  # the doubtful one
    questions = tree_questions(space)[1]
    cost = {name: annotated(name, proba, truth, questions) for name in STRATEGIES}
    for name in ("al_me", "search"):  # an example is asked about until it is known
        log = cost[name][1]
        assert sum(a != b for a, b in pairwise(log)) == 59
    assert cost["al_me"][1][0] == 7
    assert cost["search"][1][0] != 7
    for name in ("closing", "eig", "erc", "edc", "aq"):  # who looks at the model's opinion needs fewer questions
        assert cost[name][0] < 0.6 * min(cost[blind][0] for blind in ("al_me", "search", "uniform"))


def test_uniform_and_aq_take_any_example() -> None:
    proba = np.array([[0.5, 0.5], [0.9, 0.1], [0.99, 0.01]])
    one = np.array([[True, False]])
    for strategy in ("uniform", "aq"):
        first = [int(choose(proba, one, 1, NO_FULL, seed=s, strategy=strategy).index[0]) for s in range(60)]
        assert min(np.bincount(first, minlength=3)) > 8
    assert {int(choose(proba, one, 1, NO_FULL, seed=s).index[0]) for s in range(9)} == {0}
    four, each = np.full((1, 4), 0.25), np.eye(4, dtype=bool)
    any_of = [int(choose(four, each, 1, NO_FULL, seed=s, strategy="uniform").question[0]) for s in range(80)]
    assert min(np.bincount(any_of, minlength=4)) > 8


def test_a_strategy_of_ones_own_enters_by_the_same_door() -> None:
    proba, questions = np.full((3, 3), 1 / 3), np.eye(3, dtype=bool)
    last = choose(proba, questions, 3, strategy=lambda p, possible, q: np.tile([0.0, 1.0, 2.0], (len(p), 1)))
    assert last.question.tolist() == [2, 2, 2]  # never "which class?", which it does not score
    third = Strategy(lambda p, possible, q: np.ones((len(p), 3)), example=lambda p, possible: np.arange(len(p)))
    assert choose(proba, questions, 3, strategy=third).index.tolist() == [2, 1, 0]
    with pytest.raises(UsageError, match="scores of shape"):
        choose(proba, questions, 3, strategy=lambda p, possible, q: np.zeros(3))


def test_who_is_asked_is_part_of_the_choice() -> None:
    """The careful one is slower: worth it where the model is torn, not where one class is nearly sure."""
    proba, sets = np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([[True, False]])
    crowd = symmetric_confusion(2, 2, 0.7)
    crowd[1] = symmetric_confusion(1, 2, 0.99)[0]
    rates = [float(information_gain(proba[:1], sets, c)[0, 0]) for c in crowd]
    for slower in (2.0, 20.0):
        asked = choose(proba, sets, 2, {"full": np.inf, "partial": [1.0, slower]}, crowd, strategy="eig")
        want = int(rates[1] / slower > rates[0])
        assert asked.annotator.tolist() == [want, want]
        assert asked.rate[0] == pytest.approx(max(rates[0], rates[1] / slower))
    one = choose(proba, sets, 2, confusion=crowd[1])
    assert one.annotator.tolist() == [0, 0]
    with pytest.raises(UsageError, match="2 confusion matrices"):
        choose(proba, sets, 2, {"partial": [1.0, 1.0, 1.0]}, crowd)


def test_pieces_make_no_difference() -> None:
    """A pool larger than one piece is ranked as a whole."""
    rng = np.random.default_rng(0)
    proba, questions = rng.dirichlet(np.ones(4), size=3000), rng.random((900, 4)) < 0.5
    gain = information_gain(proba, questions).max(axis=1)
    asked = choose(proba, questions, 10, NO_FULL, strategy="eig")
    assert asked.index.tolist() == np.argsort(-gain)[:10].tolist()


def test_an_answer_that_contradicts_an_earlier_one() -> None:
    """Taken as certain, it is an error that names who said so; from people who err, it is doubt to be asked again."""
    space = LabelSpace(("cat", "dog", "car"), {"cat": "animal", "dog": "animal", "car": "thing"})

    def said(who: str) -> AnswerTable:
        answers = [Response("one_of", ("animal",)), Response("not", ("cat", "dog"))]
        return AnswerTable.from_answers([Answer(str(i), f"q{i}", "x", who, r) for i, r in enumerate(answers)], space)

    uniform = np.full(3, 1 / 3)
    with pytest.raises(AnswerError, match="certain answers by gold leave no class possible"):
        posterior(said(GOLD), uniform, np.eye(3)[None])
    belief, _ = posterior(said("ann"), uniform, symmetric_confusion(1, 3, 0.8))
    asked = choose(belief, tree_questions(space)[1], 1, confusion=symmetric_confusion(1, 3, 0.8)[0])
    assert asked.index.tolist() == [0]


def test_measured_seconds() -> None:
    asked = [Question("f", "x"), Question("p", "x", ("a",))]

    def said(question: str, *seconds: float) -> list[Answer]:
        return [Answer(f"{question}{i}", question, "x", "ann", Response("unsure"), s) for i, s in enumerate(seconds)]

    assert measured_seconds([], asked) == {"full": 3.0, "partial": 1.5}
    unknown = said("f", 0, 0, 0, 0, 0, 0) + said("gone", 9, 9, 9, 9, 9)
    assert measured_seconds(unknown, asked) == {"full": 3.0, "partial": 1.5}
    slow = said("f", 6, 6, 6, 6, 600) + said("p", 1, 1, 1, 1)
    assert measured_seconds(slow, asked) == {"full": 6.0, "partial": 3.0}  # four are too few, the pace is known
    both = slow + said("p", 2, 0, 0)
    assert measured_seconds(both, asked) == {"full": 6.0, "partial": 1.0}
    assert choose(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), 1, measured_seconds(both, asked)).question[0] >= 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: information_gain(np.array([[0.7, 0.7]]), np.eye(2, dtype=bool)), "sum to 1.4"),
        (lambda: information_gain(np.array([[np.nan, 1]]), np.eye(2, dtype=bool)), "NaN"),
        (lambda: information_gain(np.array([[0.5, 0.5]]), np.eye(3, dtype=bool)), "questions of shape"),
        (lambda: information_gain(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), np.ones((2, 2))), "confusion matrix"),
        (lambda: choose(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), 0), "0 questions"),
        (lambda: choose(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), 1, {"full": -1.0}), "positive"),
        (lambda: choose(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), 1, {"half": 1.0}), "'partial'"),
        (lambda: choose(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), 1, strategy="eigg"), "unknown strategy 'eigg'"),
        (
            lambda: choose(np.array([[0.5, 0.5]]), np.eye(2, dtype=bool), 1, None, np.eye(2), strategy="erc"),
            "confusion matrix for strategy 'erc'",
        ),
        (lambda: choose(np.eye(2), np.eye(2, dtype=bool), 1, possible=np.zeros((2, 2), bool)), "class left"),
        (lambda: choose(np.eye(2), np.eye(2, dtype=bool), 1, possible=np.ones((3, 2), bool)), "possible classes of"),
        (lambda: tree_questions(LabelSpace(("a", "b"), {"a": "x"})), "lacks"),
        (lambda: expected_remaining_classes(np.eye(2), np.zeros((2, 2), bool), np.eye(2, dtype=bool)), "class left"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
