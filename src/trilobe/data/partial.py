"""What to ask about an example: "which class?", or a cheaper "is it one of these?", whichever teaches more per second.

A question is a set of classes; its answer is yes or no, given by somebody who perceives class l with probability
π[k, l] when the truth is k (as in :mod:`trilobe.data.beliefs`, which also turns the answer into a belief). "Which
class?" is the question with one answer per class. Examples not yet asked bring the model's prediction as ``proba``,
examples asked before bring their belief, so that a new example, a cheaper question and asking again compete in one
ranking, over everybody who may be asked. Which *example* is worth a full answer is scored in
:mod:`trilobe.data.query`; where the sets come from when there is no tree, in :mod:`trilobe.data.trees`.

A strategy chooses an example and a question about it. What it does not score, it leaves to chance:

=================  ==========================  =============================  ===============================
strategy           example                     question                       in the paper
=================  ==========================  =============================  ===============================
``closing``        the best question decides   gain of information over the   (ours, the default)
                                               root of the classes remaining
``eig``            the best question decides   largest gain of information    ALPF-EIG
``erc``            the best question decides   fewest classes remaining       ALPF-ERC
``edc``            the best question decides   most classes ruled out         ALPF-EDC
``aq``             any                         largest gain of information    AQ-EIG (active question)
``al_me``          most uncertain, then to     halves the classes left        AL-ME (active example, full
                   the end of its search                                      binary search for its label)
``search``         any, then to the end        halves the classes left        the naive baseline
``uniform``        any                         any that is not implied        random pairs
=================  ==========================  =============================  ===============================

Source: Hu, Lipton, Anandkumar and Ramanan, Active Learning with Partial Feedback (2019): expected information gain
(section 3.1), expected remaining classes and expected decrease in classes. Deviation: answers may be noisy, and gain is
counted per second of a person's time. ``closing`` is not in the paper: of the paper's three sometimes one and
sometimes another is best, and it was level with the best or ahead on each of five data sets
(``benchmarks/query-partial``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from trilobe.data.query import check_proba
from trilobe.data.trees import check_tree
from trilobe.errors import UsageError
from trilobe.types import Answer, BoolArray, FloatArray, LabelSpace, Question

IntArray = NDArray[np.intp]
DEFAULT_SECONDS = {"full": 3.0, "partial": 1.5}


def tree_questions(space: LabelSpace) -> tuple[list[str], BoolArray]:
    """Every node of the label tree that divides the classes, as a question: names, and ``(n_questions, n_classes)``.

    Without a tree those are the single classes. Nodes that cover the same classes are one question.

    Raises:
        UsageError: a tree that lacks a class, or has a class above others.

    >>> space = LabelSpace(("cat", "dog", "car"), {"cat": "animal", "dog": "animal", "car": "thing"})
    >>> names, sets = tree_questions(space)
    >>> names, sets[-1].tolist()
    (['cat', 'dog', 'car', 'animal'], [True, True, False])
    """
    check_tree(space)
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


Score = Callable[[FloatArray, BoolArray, BoolArray], FloatArray]
RowScore = Callable[[FloatArray, BoolArray], FloatArray]


@dataclass(frozen=True)
class Strategy:
    """How example and question are chosen. What is left out is left to chance.

    Attributes:
        question: ``(proba (n, n_classes), possible (n, n_classes), questions (n_questions, n_classes))`` ->
            ``(n, n_questions)``, at least 0, higher = better; divided by the seconds it takes. ``proba`` is 0 where
            not possible.
        full: ``(proba, possible)`` -> ``(n,)``, the same for "which class?"; without it, that is never asked.
        example: ``(proba, possible)`` -> ``(n,)``, higher = comes first; without it, its best question decides.
    """

    question: Score
    full: RowScore | None = None
    example: RowScore | None = None


def _informed(confusion: FloatArray | None = None, example: RowScore | None = None) -> Strategy:
    return Strategy(
        lambda proba, possible, questions: information_gain(proba, questions, confusion),
        lambda proba, possible: full_information_gain(proba, confusion),
        example,
    )


def _closing(confusion: FloatArray | None = None) -> Strategy:
    """A bit is worth more to a learner where it all but settles the class than where many classes stay open."""
    return Strategy(
        lambda proba, possible, questions: (
            information_gain(proba, questions, confusion)
            / np.sqrt(expected_remaining_classes(proba, possible, questions))
        ),
        lambda proba, possible: full_information_gain(proba, confusion),
    )


def _certainty(proba: FloatArray, possible: BoolArray, questions: BoolArray) -> FloatArray:
    """1 over the expected remaining classes: ranks as they do, and can be divided by seconds. 1 = known."""
    return np.asarray(1 / expected_remaining_classes(proba, possible, questions))


def _halving(proba: FloatArray, possible: BoolArray, questions: BoolArray) -> FloatArray:
    """The smaller part of the classes left, as a share of them: 1/2 for a question that halves them."""
    inside, left = possible.astype(float) @ questions.T, possible.sum(axis=1, keepdims=True)
    return np.asarray(np.minimum(inside, left - inside) / left)


def _any_question(proba: FloatArray, possible: BoolArray, questions: BoolArray) -> FloatArray:
    return np.zeros((len(proba), len(questions)))


def _any_example(proba: FloatArray, possible: BoolArray) -> FloatArray:
    return np.zeros(len(proba))


def _begun(proba: FloatArray, possible: BoolArray) -> FloatArray:
    return (~possible.all(axis=1)).astype(float)


def _begun_or_doubtful(proba: FloatArray, possible: BoolArray) -> FloatArray:
    return np.asarray(entr(proba).sum(axis=1) + np.log(len(proba.T) + 1) * _begun(proba, possible))


ALLOWING_FOR_ERRORS: dict[str, Callable[[FloatArray | None], Strategy]] = {
    "closing": _closing,
    "eig": _informed,
    "aq": lambda confusion: _informed(confusion, _any_example),
}
STRATEGIES: dict[str, Strategy] = {
    **{name: make(None) for name, make in ALLOWING_FOR_ERRORS.items()},
    "erc": Strategy(_certainty, lambda proba, possible: np.ones(len(proba))),
    "edc": Strategy(expected_decrease_in_classes, lambda proba, possible: possible.sum(axis=1) - 1.0),
    "al_me": Strategy(_halving, example=_begun_or_doubtful),
    "search": Strategy(_halving, example=_begun),
    "uniform": Strategy(_any_question, example=_any_example),
}


@dataclass(frozen=True)
class Asked:
    """``n`` things to ask, the best first.

    ``index`` ``(n,)`` points into the examples, ``question`` ``(n,)`` into the questions (-1: "which class?"),
    ``annotator`` ``(n,)`` into those who may be asked, ``rate`` ``(n,)`` is the question's score per second: for
    ``eig`` the expected gain in nats.
    """

    index: IntArray
    question: IntArray
    rate: FloatArray
    annotator: IntArray


def choose(
    proba: FloatArray,
    questions: BoolArray,
    n: int,
    seconds: Mapping[str, ArrayLike] | None = None,
    confusion: FloatArray | None = None,
    seed: int = 0,
    possible: BoolArray | None = None,
    strategy: str | Strategy | Score = "closing",
) -> Asked:
    """The ``n`` best triples of example, question and annotator, one question an example.

    A question whose answer is implied by what is still possible is never asked, so what has a single class left is
    not asked about. One pass over the examples in pieces: memory grows with the examples, not with examples times
    questions.

    Args:
        proba: ``(n_examples, n_classes)``: predictions of new examples, beliefs of those asked before.
        questions: ``(n_questions, n_classes)``.
        n: how many; fewer come back when there is less to ask.
        seconds: what people take, ``{"full": 3.0, "partial": 1.5}``: as :func:`measured_seconds` finds them, numbers
            or one for each annotator. Infinity: never asked that way.
        confusion: of who answers, ``(n_classes, n_classes)``, or of each who may, ``(n_annotators, n_classes,
            n_classes)``. Nobody errs by default.
        seed: for ties, and for what the strategy leaves to chance.
        possible: ``(n_examples, n_classes)`` what the answers so far leave, as ``Belief.possible``; by default
            where ``proba`` is above 0, which is wrong where a model rounds to 0.
        strategy: a name of ``STRATEGIES``, a :class:`Strategy`, or just its ``question``.

    Raises:
        UsageError: probabilities, sets, times, a count or a strategy that make no sense.

    >>> asked = choose(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), np.eye(3, dtype=bool)[:1], 2)
    >>> asked.index.tolist(), asked.question.tolist()
    ([0], [0])
    """
    proba = check_proba(proba)
    possible = proba > 0 if possible is None else possible
    _check_possible(proba, possible)
    _yes_given_class(questions, None, proba.shape[1])
    people = _people(strategy, seconds, confusion, n)
    rng, columns = np.random.default_rng(seed), 1 + len(questions)
    pick, rate, first = np.zeros(len(proba), dtype=np.intp), np.zeros(len(proba)), np.zeros(len(proba))
    size = max(1, 2_000_000 // (len(people) * columns + proba.shape[1]))
    for start in range(0, len(proba), size):
        at = slice(start, start + size)
        left, p = possible[at], _restricted(proba[at], possible[at])
        inside, n_left = left.astype(np.float32) @ questions.T, left.sum(axis=1, keepdims=True)
        telling = np.column_stack([n_left > 1, (inside > 0) & (inside < n_left)])
        rates = np.hstack([_rates(scored, cost, p, left, questions) for scored, cost in people])
        rates[~np.tile(telling, len(people))] = -np.inf
        pick[at] = _argmax(rates, rng)
        rate[at] = rates[np.arange(len(p)), pick[at]]
        example = people[0][0].example
        first[at] = _row_score(example, p, left) if example else rate[at]
    askable = np.flatnonzero(rate > -np.inf)
    order = askable[np.lexsort((rng.random(len(askable)), -first[askable]))][:n]
    return Asked(order, pick[order] % columns - 1, rate[order], pick[order] // columns)


def _people(
    strategy: str | Strategy | Score, seconds: Mapping[str, ArrayLike] | None, confusion: FloatArray | None, n: int
) -> list[tuple[Strategy, tuple[float, float]]]:
    """For each who may be asked: the strategy as it scores their answers, and what a full and a partial one cost."""
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {strategy!r}", expected=f"one of {', '.join(STRATEGIES)}, or a function")
    chosen = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
    plan = chosen if isinstance(chosen, Strategy) else Strategy(chosen)
    if confusion is not None and strategy not in ALLOWING_FOR_ERRORS:
        able = ", ".join(ALLOWING_FOR_ERRORS)
        raise UsageError(f"a confusion matrix for strategy {strategy!r}", expected=f"one of {able} where people err")
    cost = {**DEFAULT_SECONDS, **(seconds or {})}
    each = [np.asarray(c, dtype=float).reshape(-1) for c in (cost["full"], cost["partial"])]
    if n < 1 or min(c.min(initial=np.inf) for c in each) <= 0 or set(cost) != set(DEFAULT_SECONDS):
        raise UsageError(f"{n} questions at {cost} seconds", expected="at least 1, and positive 'full' and 'partial'")
    matrices = [None] if confusion is None else list(confusion[None] if confusion.ndim == 2 else confusion)
    sizes = (len(matrices), len(each[0]), len(each[1]))
    if not {*sizes} <= {1, max(sizes)}:
        raise UsageError(
            f"{sizes[0]} confusion matrices, {sizes[1]} full and {sizes[2]} partial times",
            expected="one, or one for each annotator",
        )
    scored = [plan if m is None else ALLOWING_FOR_ERRORS[str(strategy)](m) for m in matrices]
    full, partial = (np.broadcast_to(c, max(sizes)).tolist() for c in each)
    return [(scored[j % len(scored)], (full[j], partial[j])) for j in range(max(sizes))]


def _rates(
    scored: Strategy, cost: tuple[float, float], proba: FloatArray, possible: BoolArray, questions: BoolArray
) -> FloatArray:
    """Score per second of "which class?" and of each question, ``(n, 1 + n_questions)``; -inf for what is not asked."""
    rates = np.full((len(proba), 1 + len(questions)), -np.inf)
    if scored.full and np.isfinite(cost[0]):
        rates[:, 0] = _row_score(scored.full, proba, possible) / cost[0]
    if len(questions) and np.isfinite(cost[1]):
        scores = np.asarray(scored.question(proba, possible, questions))
        if scores.shape != (len(proba), len(questions)) or np.isnan(scores).any():
            raise UsageError(
                f"scores of shape {scores.shape} for questions", expected=f"({len(proba)}, {len(questions)}) numbers"
            )
        rates[:, 1:] = scores / cost[1]
    return rates


def _row_score(score: RowScore, proba: FloatArray, possible: BoolArray) -> FloatArray:
    scores = np.asarray(score(proba, possible))
    if scores.shape != (len(proba),) or np.isnan(scores).any():
        raise UsageError(f"scores of shape {scores.shape} for examples", expected=f"({len(proba)},) numbers")
    return scores


def _argmax(rates: FloatArray, rng: np.random.Generator) -> IntArray:
    """The best column of each row, any of several equals."""
    best: IntArray = rates.argmax(axis=1)
    equal = rates == rates[np.arange(len(rates)), best][:, None]
    several = np.flatnonzero(equal.sum(axis=1) > 1)
    best[several] = (rng.random((len(several), rates.shape[1])) * equal[several]).argmax(axis=1)
    return best


def measured_seconds(
    answers: Sequence[Answer],
    questions: Sequence[Question],
    default: Mapping[str, float] = DEFAULT_SECONDS,
    at_least: int = 5,
) -> dict[str, float]:
    """What one answer of each kind takes: the median of the recorded seconds.

    Times of 0 (unknown) or below do not count. A kind with fewer than ``at_least`` measured answers is taken from the
    other kind and the proportion of the defaults; with neither measured, from the defaults.

    Args:
        answers: as recorded; those to questions that are not given are left out.
        questions: what was asked; a question with choices is partial, one without is full.
        default: seconds of both kinds, ``"full"`` and ``"partial"``.
        at_least: how many answers make a median.

    >>> from trilobe.types import Response
    >>> said = [Answer(str(i), "q", "x", "ann", Response("class", ("a",)), seconds=4.0) for i in range(5)]
    >>> measured_seconds(said, [Question("q", "x")])
    {'full': 4.0, 'partial': 2.0}
    """
    kinds = {q.id: "partial" if q.choices else "full" for q in questions}
    times: dict[str, list[float]] = {"full": [], "partial": []}
    for answer in answers:
        if answer.question_id in kinds and 0 < answer.seconds < np.inf:
            times[kinds[answer.question_id]].append(answer.seconds)
    known = {kind: float(np.median(t)) for kind, t in times.items() if len(t) >= max(at_least, 1)}
    pace = float(np.mean([known[kind] / default[kind] for kind in known])) if known else 1.0
    return {kind: known.get(kind, pace * default[kind]) for kind in times}


def _check_possible(proba: FloatArray, possible: BoolArray) -> None:
    if possible.shape != proba.shape or not possible.any(axis=1).all():
        raise UsageError(
            f"possible classes of shape {possible.shape} for probabilities {proba.shape}",
            expected="the same shape, and a class left in every row",
        )


def _restricted(proba: FloatArray, possible: BoolArray) -> FloatArray:
    _check_possible(proba, possible)
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
