"""What to ask about an example: "which class?", or a cheaper "is it one of these?", whichever teaches more per second.

A question is a set of classes; its answer is yes or no, given by somebody who perceives class l with probability
π[k, l] when the truth is k (as in :mod:`trilobe.data.beliefs`, which also turns the answer into a belief). "Which
class?" is the question with one answer per class. Examples not yet asked bring the model's prediction as ``proba``,
examples asked before bring their belief, so that a new example, a cheaper question and asking again compete in one
ranking. Which *example* is worth a full answer is scored in :mod:`trilobe.data.query`.

Source: Hu, Lipton, Anandkumar and Ramanan, Active Learning with Partial Feedback (2019): expected information gain
(section 3.1), expected remaining classes and expected decrease in classes. Deviation: answers may be noisy, and gain is
counted per second of a person's time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from trilobe.data.query import check_proba
from trilobe.errors import UsageError
from trilobe.types import BoolArray, FloatArray, LabelSpace

IntArray = NDArray[np.intp]


def tree_questions(space: LabelSpace) -> tuple[list[str], BoolArray]:
    """Every node of the label tree that divides the classes, as a question: names, and ``(n_questions, n_classes)``.

    Without a tree those are the single classes. Nodes that cover the same classes are one question.

    >>> space = LabelSpace(("cat", "dog", "car"), parents={"cat": "animal", "dog": "animal"})
    >>> names, sets = tree_questions(space)
    >>> names, sets[-1].tolist()
    (['cat', 'dog', 'car', 'animal'], [True, True, False])
    """
    names, masks, seen = [], [], set()
    for name in (*space.names, *sorted(set(space.parents.values()))):
        mask = space.mask([name])
        if mask.tobytes() not in seen and not mask.all():
            seen.add(mask.tobytes())
            names.append(name)
            masks.append(mask)
    return names, np.array(masks).reshape(-1, len(space))


def information_gain(proba: FloatArray, questions: BoolArray, confusion: FloatArray | None = None) -> FloatArray:
    """Expected fall of the entropy of each example's class by each yes/no question, in nats, at least 0.

    It is the mutual information of class and answer, H(answer) - H(answer | class): log 2 at most, reached by a
    question that splits the belief in half and is answered without error.

    Args:
        proba: ``(n, n_classes)``.
        questions: ``(n_questions, n_classes)`` the sets.
        confusion: ``(n_classes, n_classes)`` of who answers; nobody errs by default.

    Returns:
        ``(n, n_questions)``, higher = teaches more.

    >>> information_gain(np.array([[0.5, 0.25, 0.25]]), np.array([[True, False, False]])).round(3).tolist()
    [[0.693]]
    """
    proba, yes = check_proba(proba), _yes_given_class(questions, confusion, proba.shape[1])
    gain = _binary_entropy(proba @ yes.T) - proba @ _binary_entropy(yes).T
    return np.asarray(np.maximum(gain, 0.0))


def full_information_gain(proba: FloatArray, confusion: FloatArray | None = None) -> FloatArray:
    """Expected fall of the entropy by asking "which class?", in nats, ``(n,)``. Without error that is the entropy.

    >>> full_information_gain(np.array([[0.5, 0.5]])).round(3).tolist()
    [0.693]
    """
    proba = check_proba(proba)
    if confusion is None:
        return np.asarray(entr(proba).sum(axis=1))
    _check_confusion(confusion, proba.shape[1])
    gain = entr(proba @ confusion).sum(axis=1) - proba @ entr(confusion).sum(axis=1)
    return np.asarray(np.maximum(gain, 0.0))


def expected_remaining_classes(proba: FloatArray, possible: BoolArray, questions: BoolArray) -> FloatArray:
    """How many classes are left, on average, after each question is answered without error: ``(n, n_questions)``.

    Lower = better. ``possible`` ``(n, n_classes)`` says which are left now; ``proba`` is restricted to them.

    >>> everything = np.ones((1, 4), dtype=bool)
    >>> halves = np.array([[True, True, False, False]])
    >>> expected_remaining_classes(np.full((1, 4), 0.25), everything, halves).tolist()
    [[2.0]]
    """
    proba = _restricted(check_proba(proba), possible)
    inside = possible.astype(float) @ questions.T
    yes = proba @ questions.T
    return np.asarray(yes * inside + (1 - yes) * (possible.sum(axis=1, keepdims=True) - inside))


def expected_decrease_in_classes(proba: FloatArray, possible: BoolArray, questions: BoolArray) -> FloatArray:
    """How many classes are ruled out, on average, by each question: ``(n, n_questions)``, higher = better.

    >>> everything = np.ones((1, 4), dtype=bool)
    >>> expected_decrease_in_classes(np.full((1, 4), 0.25), everything, np.eye(4, dtype=bool)[:1]).tolist()
    [[1.5]]
    """
    return np.asarray(possible.sum(axis=1, keepdims=True) - expected_remaining_classes(proba, possible, questions))


@dataclass(frozen=True)
class Asked:
    """``n`` things to ask, the most telling per second first.

    ``index`` ``(n,)`` points into the examples, ``question`` ``(n,)`` into the questions (-1: "which class?"), ``rate``
    ``(n,)`` is the expected gain in nats per second.
    """

    index: IntArray
    question: IntArray
    rate: FloatArray


def choose(
    proba: FloatArray,
    questions: BoolArray,
    n: int,
    seconds: Mapping[str, float] | None = None,
    confusion: FloatArray | None = None,
    seed: int = 0,
) -> Asked:
    """The ``n`` pairs of example and question with the highest expected gain per second, one question an example.

    Args:
        proba: ``(n_examples, n_classes)``: predictions of new examples, beliefs of those asked before.
        questions: ``(n_questions, n_classes)``.
        n: how many; all examples when there are fewer.
        seconds: what people take: ``{"full": 3.0, "partial": 1.5}``, as measured.
        confusion: of who answers.
        seed: for ties.

    Raises:
        UsageError: probabilities, sets, times or a count that make no sense.

    >>> asked = choose(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), np.eye(3, dtype=bool), 1)
    >>> asked.index.tolist(), asked.question.tolist()
    ([0], [0])
    """
    cost = {"full": 3.0, "partial": 1.5, **(seconds or {})}
    if n < 1 or min(cost.values()) <= 0 or set(cost) != {"full", "partial"}:
        raise UsageError(f"{n} questions at {cost} seconds", expected="at least 1, and positive 'full' and 'partial'")
    rates = np.column_stack(
        [
            full_information_gain(proba, confusion) / cost["full"],
            information_gain(proba, questions, confusion) / cost["partial"],
        ]
    )
    best = rates.argmax(axis=1)
    rate = rates[np.arange(len(rates)), best]
    order = np.lexsort((np.random.default_rng(seed).random(len(rate)), -rate))[:n]
    return Asked(order, best[order] - 1, rate[order])


def _restricted(proba: FloatArray, possible: BoolArray) -> FloatArray:
    if possible.shape != proba.shape or not possible.any(axis=1).all():
        raise UsageError(
            f"possible classes of shape {possible.shape} for probabilities {proba.shape}",
            expected="the same shape, and a class left in every row",
        )
    kept = np.where(possible, proba, 0.0)
    total = kept.sum(axis=1, keepdims=True)
    uniform = possible / possible.sum(axis=1, keepdims=True)  # the model excludes what the answers leave
    return np.asarray(np.divide(kept, total, out=uniform.astype(float), where=total > 0))


def _yes_given_class(questions: BoolArray, confusion: FloatArray | None, k: int) -> FloatArray:
    """P(yes | class), ``(n_questions, n_classes)``: the chance to perceive a class of the set."""
    if questions.ndim != 2 or questions.shape[1] != k:
        raise UsageError(f"questions of shape {questions.shape}", expected=f"(n_questions, {k}) booleans")
    if confusion is None:
        return questions.astype(float)
    _check_confusion(confusion, k)
    return np.asarray(questions @ confusion.T)


def _check_confusion(confusion: FloatArray, k: int) -> None:
    if confusion.shape != (k, k) or not np.allclose(confusion.sum(axis=1), 1) or (confusion < 0).any():
        raise UsageError(
            f"a confusion matrix of shape {confusion.shape}", expected=f"({k}, {k}) with rows of probabilities"
        )


def _binary_entropy(p: FloatArray) -> FloatArray:
    p = np.clip(p, 0.0, 1.0)
    return np.asarray(entr(p) + entr(1 - p))
