"""The one engine for answers: what people said, partially and noisily, becomes a belief about each example.

    belief(k)  ∝  prior(k)  ×  Π over answers a of  P(a | truth k, annotator of a)

Every answer about a class is a set R of classes it leaves possible: "it is a cat" is {cat}, "one of these" is the
set, "not a cat" its complement, "can't tell" all classes. The annotator j perceives class l with probability
π_j[k, l] when the truth is k, and gives an answer that contains l. So

    P(R | k, j) = Σ_{l in R} π_j[k, l]                                                                     (1)

and everything else is a choice of prior and of π:

=====================  ==============================================  =========================================
method                 prior                                           π
=====================  ==============================================  =========================================
majority vote          uniform                                         one fixed symmetric matrix for everybody
Dawid-Skene (1979)     class frequencies, estimated                    one matrix per annotator, estimated
one-coin               class frequencies, estimated                    accuracy per annotator, estimated
model-bootstrapped EM  the model's out-of-fold prediction (2018)       one matrix per annotator, estimated
noise-free partial     uniform, or the model's prediction              identity: the belief is the prior on the
answers (ALPF, 2019)                                                   intersection of the sets
gold                   any                                             identity for the annotator named ``gold``
=====================  ==============================================  =========================================

A belief is about a *unit*: an example, or one token of it. Nothing dense of size examples x annotators is made:
answers meet parameters through a sparse matrix of units x (annotator, set) pairs that really occur. Sources: Dawid and
Skene (1979), equations 2.3 to 2.5; Khetan, Lipton and Anandkumar (2018) for the model as prior; Hu et al. (2019) for
partial feedback. What the answers are asked about is chosen in :mod:`trilobe.data.query`, not here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.special import logsumexp

from trilobe.errors import AnswerError, NotEnoughData, UsageError
from trilobe.types import GOLD, Answer, Belief, BoolArray, FloatArray, LabelSpace

IntArray = NDArray[np.intp]
Pairs = tuple["csr_array[Any, Any]", IntArray, IntArray]


@dataclass(frozen=True)
class AnswerTable:
    """Answers in long form: ``n`` answers on ``n_units`` units by ``n_annotators`` people, as index arrays.

    Attributes:
        unit, annotator, response: ``(n,)`` indices; ``response`` points into ``sets``.
        sets: ``(n_sets, n_classes)`` booleans, the distinct sets of classes that answers leave possible.
        examples: the example ids; ``starts`` ``(n_examples + 1,)``: example i owns the units starts[i]:starts[i+1].
        annotators: their names.
        sequence: whether an example has several units (tokens), so that its belief is a matrix.
    """

    unit: IntArray
    annotator: IntArray
    response: IntArray
    sets: BoolArray
    examples: tuple[str, ...]
    starts: IntArray
    annotators: tuple[str, ...]
    sequence: bool = False

    @property
    def n_units(self) -> int:
        """How many rows a belief matrix has."""
        return int(self.starts[-1])

    @property
    def n_classes(self) -> int:
        """How many columns."""
        return int(self.sets.shape[1])

    @classmethod
    def from_answers(
        cls,
        answers: Sequence[Answer],
        space: LabelSpace,
        possible: Callable[[Answer], BoolArray] | None = None,
    ) -> "AnswerTable":
        """Build the table from recorded answers.

        Args:
            answers: the current answers (superseded ones left out).
            space: the label space they are about.
            possible: what an answer leaves possible: ``(n_classes,)``, or ``(n_tokens, n_classes)`` for a sequence.
                By default the answer's own set, for answers about one class.

        Raises:
            AnswerError: an answer does not fit the label space, or two answers disagree on an example's length.

        >>> from trilobe.types import Response
        >>> said = [Answer("1", "q", "x", "ann", Response("class", ("a",)))]
        >>> AnswerTable.from_answers(said, LabelSpace(("a", "b"))).n_units
        1
        """
        read = possible or (lambda a: a.response.possible(space))
        examples: dict[str, int] = {}
        people: dict[str, int] = {}
        sets: dict[bytes, int] = {}
        lengths: list[int] = []
        rows: list[tuple[int, int, int, int]] = []  # example, position, annotator, set
        sequence = False
        for answer in answers:
            masks = np.asarray(read(answer), dtype=bool)
            if masks.shape[-1] != len(space):
                raise AnswerError(
                    f"an answer on example {answer.example_id[:12]} about {masks.shape[-1]} classes",
                    expected=f"{len(space)}, as in the label space",
                )
            sequence = sequence or masks.ndim == 2
            masks = np.atleast_2d(masks)
            at = examples.setdefault(answer.example_id, len(examples))
            if at == len(lengths):
                lengths.append(len(masks))
            elif lengths[at] != len(masks):
                raise AnswerError(
                    f"answers on example {answer.example_id[:12]} cover {lengths[at]} and {len(masks)} tokens",
                    expected="the same tokens in every answer",
                )
            who = people.setdefault(answer.annotator, len(people))
            rows += [(at, i, who, sets.setdefault(m.tobytes(), len(sets))) for i, m in enumerate(masks)]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.intp)
        example, position, annotator, response = np.array(rows, dtype=np.intp).reshape(-1, 4).T
        masks_seen = np.frombuffer(b"".join(sets), dtype=bool).reshape(-1, len(space))
        return cls(
            starts[example] + position,
            annotator,
            response,
            masks_seen,
            tuple(examples),
            starts,
            tuple(people),
            sequence,
        )

    @classmethod
    def from_labels(
        cls, task: ArrayLike, worker: ArrayLike, label: ArrayLike, n_classes: int | None = None
    ) -> "AnswerTable":
        """Build the table from three columns ``(n,)``: whose answer on what was which class (index from 0).

        Task and worker names are strings or numbers; this is the vectorized door for millions of plain answers.

        Raises:
            AnswerError: columns of different lengths, or labels that are not indices of classes.

        >>> AnswerTable.from_labels(["x", "x", "y"], ["ann", "bob", "ann"], [0, 1, 1]).annotators
        ('ann', 'bob')
        """
        tasks, unit = np.unique(np.asarray(task), return_inverse=True)
        people, annotator = np.unique(np.asarray(worker), return_inverse=True)
        classes = np.asarray(label)
        if not unit.shape == annotator.shape == classes.shape or classes.ndim != 1:
            shapes = f"{unit.shape}, {annotator.shape} and {classes.shape}"
            raise AnswerError(f"columns of shapes {shapes}", expected="three of one length")
        whole = classes.dtype.kind in "iu" or not classes.size
        k = int(n_classes or classes.max(initial=-1) + 1) if whole else 0
        if not whole or classes.min(initial=0) < 0 or classes.max(initial=-1) >= k:
            came = f"{classes.dtype} labels from {classes.min()} to {classes.max()}"
            raise AnswerError(came, expected="indices of classes, from 0, below n_classes")
        classes = classes.astype(np.intp)
        starts = np.arange(len(tasks) + 1)
        return cls(
            unit, annotator, classes, np.eye(k, dtype=bool), tuple(map(str, tasks)), starts, tuple(map(str, people))
        )

    def pairs(self) -> Pairs:
        """The sparse matrix units x pairs with how often each (annotator, set) pair was said, and the pairs."""
        code = self.annotator * len(self.sets) + self.response
        found, column = np.unique(code, return_inverse=True)
        said = csr_array((np.ones(len(code)), (self.unit, column)), shape=(self.n_units, len(found)))
        return said, found // len(self.sets), found % len(self.sets)

    def beliefs(self, log_likelihood: FloatArray, prior: FloatArray) -> list[Belief]:
        """One :class:`~trilobe.types.Belief` per example; ``prior`` broadcasts to ``(n_units, n_classes)``.

        Likelihoods are scaled to a largest entry of 1. Zero is kept for what certain answers rule out: what is only
        hopeless stays above it, however many answers agree.
        """
        top = log_likelihood.max(axis=1, keepdims=True)
        likelihood = np.exp(log_likelihood - np.where(np.isfinite(top), top, 0.0))
        likelihood = np.where(np.isfinite(log_likelihood), np.maximum(likelihood, np.finfo(float).tiny), likelihood)
        priors = np.broadcast_to(prior, likelihood.shape)
        counts = np.bincount(self.unit, minlength=self.n_units)
        made = []
        for i, example in enumerate(self.examples):
            lo, hi = self.starts[i], self.starts[i + 1]
            at = slice(lo, hi) if self.sequence else lo
            made.append(Belief(example, likelihood[at], priors[at], int(counts[lo:hi].max(initial=0))))
        return made


def log_likelihood(table: AnswerTable, confusion: FloatArray) -> FloatArray:
    """Log of equation (1), summed over the answers on each unit.

    Args:
        table: the answers.
        confusion: ``(n_annotators, n_classes, n_classes)``, rows sum to 1: ``[j, k, l]`` = P(j perceives l | truth k).

    Returns:
        ``(n_units, n_classes)``, at most 0; -inf where an answer rules the class out.

    >>> table = AnswerTable.from_labels(["x"], ["ann"], [1], n_classes=2)
    >>> np.exp(log_likelihood(table, np.array([[[0.9, 0.1], [0.2, 0.8]]]))).round(2).tolist()
    [[0.1, 0.8]]
    """
    said, who, which = table.pairs()
    with np.errstate(divide="ignore"):
        return np.asarray(said @ np.log(_said_given_truth(table, confusion, who, which)))


def _said_given_truth(table: AnswerTable, confusion: FloatArray, who: IntArray, which: IntArray) -> FloatArray:
    """Equation (1) for each pair that occurs: ``(n_pairs, n_classes)``."""
    return np.asarray(np.einsum("pkl,pl->pk", confusion[who], table.sets[which]))


def posterior(table: AnswerTable, prior: FloatArray, confusion: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The belief on every unit, and the log evidence of each: the engine's one formula.

    Args:
        table: the answers.
        prior: what was believed before, ``(n_classes,)`` or ``(n_units, n_classes)``.
        confusion: ``(n_annotators, n_classes, n_classes)``.

    Returns:
        ``proba`` ``(n_units, n_classes)`` and ``log P(answers)`` ``(n_units,)``.

    Raises:
        AnswerError: certain answers contradict each other (or a prior of 0) on a unit, so that no class is left.

    >>> table = AnswerTable.from_labels(["x", "x"], ["ann", "bob"], [1, 1], n_classes=2)
    >>> posterior(table, np.array([0.5, 0.5]), symmetric_confusion(2, 2, 0.8))[0].round(3).tolist()
    [[0.059, 0.941]]
    """
    with np.errstate(divide="ignore"):
        joint = np.log(prior) + log_likelihood(table, confusion)
    evidence = logsumexp(joint, axis=1)
    lost = np.flatnonzero(~np.isfinite(evidence))
    if lost.size:
        _explain_contradiction(table, int(lost[0]), len(lost))
    return np.exp(joint - evidence[:, None]), np.asarray(evidence)


def _explain_contradiction(table: AnswerTable, unit: int, n: int) -> None:
    example = table.examples[int(np.searchsorted(table.starts, unit, side="right")) - 1]
    names = sorted({table.annotators[j] for j in table.annotator[table.unit == unit]})
    raise AnswerError(
        f"certain answers by {', '.join(names)} leave no class possible for {n} example(s), first {example[:12]}",
        expected="answers taken as certain (gold, noise-free) that agree",
        hint=f"trilobe show {example[:12]}, then answer it again",
    )


def symmetric_confusion(n_annotators: int, n_classes: int, accuracy: float) -> FloatArray:
    """Annotators who are right with probability ``accuracy`` and otherwise pick any other class.

    >>> symmetric_confusion(1, 3, 0.8)[0].round(2).tolist()
    [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    """
    one = np.full((n_classes, n_classes), (1 - accuracy) / max(n_classes - 1, 1))
    np.fill_diagonal(one, accuracy)
    return np.repeat(one[None], n_annotators, axis=0)


def majority_vote(table: AnswerTable, accuracy: float = 0.8) -> FloatArray:
    """Everybody equally good and the classes equally frequent: the engine with nothing to estimate.

    For plain answers the most probable class is the most voted one and ties stay ties; ``accuracy`` (above
    1/n_classes, at most 1) only sets how fast votes add up to certainty. Answers of ``gold`` are certain.

    Returns:
        ``(n_units, n_classes)``.

    Raises:
        UsageError: an accuracy outside of that, by which a vote for a class would speak against it.
        AnswerError: answers of ``gold`` (or of anybody, where ``accuracy`` is 1) that contradict each other.

    >>> table = AnswerTable.from_labels(["x"] * 3, ["ann", "bob", "cat"], [1, 1, 0])
    >>> majority_vote(table).argmax(axis=1).tolist()
    [1]
    """
    if not 1 / max(table.n_classes, 2) < accuracy <= 1:
        raise UsageError(f"an accuracy of {accuracy}", expected=f"above 1/{table.n_classes} (guessing), at most 1")
    confusion = symmetric_confusion(len(table.annotators), table.n_classes, accuracy)
    _fix_known(confusion, _known_matrices(table, {}))
    return posterior(table, np.full(table.n_classes, 1 / table.n_classes), confusion)[0]


@dataclass
class DawidSkene:
    """Expectation maximization over the one formula: who is good, and what is true, each from the other.

    The E-step is :func:`posterior`. The M-step counts, for each annotator, how often truth k was perceived as l: an
    answer that is a set spreads its count over the classes in it, in proportion to what the annotator was likely to
    perceive (the set of all classes counts for nothing). ``smoothing`` adds that many imagined answers per true class
    to each annotator, most of them right (a Dirichlet prior, so this is a MAP estimate): who answered little is judged
    cautiously. The penalized log-likelihood never falls from one round to the next (a property test holds it).

    Args:
        tie: ``"annotator"`` gives everyone a confusion matrix (Dawid and Skene 1979), ``"one_coin"`` an accuracy.
        smoothing: imagined answers per annotator and true class, above 0.
        max_iter: rounds at most.
        tol: stop when the penalized log-likelihood gains less than this per answer.

    Attributes (learned):
        confusion_: ``(n_annotators, n_classes, n_classes)``.
        prior_: ``(n_classes,)``, or the given ``(n_units, n_classes)``, kept off 0 and 1.
        proba_: ``(n_units, n_classes)`` the beliefs.
        objective_: the penalized log-likelihood after each round.

    >>> table = AnswerTable.from_labels([0, 0, 0, 1, 1, 1], ["a", "b", "c"] * 2, [0, 0, 1, 1, 1, 0])
    >>> DawidSkene().fit(table).proba_.argmax(axis=1).tolist()
    [0, 1]
    """

    tie: Literal["annotator", "one_coin"] = "annotator"
    smoothing: float = 1.0
    max_iter: int = 200
    tol: float = 1e-6
    confusion_: FloatArray = field(init=False, repr=False)
    prior_: FloatArray = field(init=False, repr=False)
    proba_: FloatArray = field(init=False, repr=False)
    objective_: list[float] = field(init=False, repr=False)

    def fit(
        self,
        table: AnswerTable,
        prior: FloatArray | None = None,
        known: Mapping[str, FloatArray] | None = None,
    ) -> "DawidSkene":
        """Learn from ``table``.

        Args:
            table: the answers.
            prior: a model's prediction ``(n_units, n_classes)``, made without having trained on these answers
                (out of fold); with it this is model-bootstrapped EM. Without it, class frequencies are estimated.
            known: confusion matrices held fixed, by annotator name. ``gold`` is always known to be right.

        Raises:
            NotEnoughData: no answers.
            UsageError: a prior of the wrong shape, with NaN or zeros everywhere in a row; known matrices or settings
                that make no sense.
            AnswerError: certain answers (of ``gold``, or by a known matrix) contradict each other.
        """
        if self.tie not in ("annotator", "one_coin") or not 0 < self.smoothing < np.inf:
            raise UsageError(repr(self), expected="tie 'annotator' or 'one_coin', smoothing above 0")
        if not table.unit.size:
            raise NotEnoughData("there are no answers to aggregate", hint="trilobe query, then trilobe label")
        k, said = table.n_classes, table.pairs()
        fixed = _known_matrices(table, known or {})
        given = None if prior is None else _checked_prior(prior, table)
        pseudo = self.smoothing * symmetric_confusion(1, k, 0.8)[0]
        confusion = symmetric_confusion(len(table.annotators), k, 0.8)
        _fix_known(confusion, fixed)
        share = np.full(k, 1 / k)
        self.objective_ = []
        while True:
            proba, evidence = posterior(table, share if given is None else given, confusion)
            penalty = float((pseudo * np.log(np.delete(confusion, list(fixed), axis=0))).sum())
            penalty += 0.0 if given is not None else float(np.log(share).sum())
            self.objective_.append(float(evidence.sum()) + penalty)
            if self._done(table.unit.size):
                break
            confusion = self._maximize(self._perceived(table, said, proba, confusion) + pseudo)
            _fix_known(confusion, fixed)
            share = (proba.sum(axis=0) + 1) / (len(proba) + k)
        self.confusion_, self.proba_ = confusion, proba
        self.prior_ = share if given is None else given
        return self

    def _done(self, n: int) -> bool:
        rounds = len(self.objective_)
        return rounds >= self.max_iter or (rounds > 1 and self.objective_[-1] - self.objective_[-2] < self.tol * n)

    @staticmethod
    def _perceived(table: AnswerTable, said: Pairs, proba: FloatArray, confusion: FloatArray) -> FloatArray:
        """Expected counts ``(n_annotators, n_classes, n_classes)`` of truth k perceived as l."""
        matrix, who, which = said
        truth = matrix.T @ proba  # (n_pairs, n_classes): how often each pair was said when the truth was k
        total = _said_given_truth(table, confusion, who, which)
        weight = np.divide(truth, total, out=np.zeros_like(total), where=total > 0)
        weight[table.sets[which].all(axis=1)] = 0.0  # "can't tell" teaches nothing about anybody
        counts = np.zeros_like(confusion)
        np.add.at(counts, who, weight[:, :, None] * confusion[who] * table.sets[which][:, None, :])
        return counts

    def _maximize(self, counts: FloatArray) -> FloatArray:
        if self.tie == "annotator":
            return np.asarray(counts / counts.sum(axis=2, keepdims=True))
        accuracy = np.einsum("jkk->j", counts) / counts.sum(axis=(1, 2))
        return np.concatenate([symmetric_confusion(1, counts.shape[1], a) for a in accuracy])

    def quality(self, prior: FloatArray | None = None) -> FloatArray:
        """P(an annotator names the true class), ``(n_annotators,)``, 0 to 1, higher = better.

        Averaged over the class frequencies (or ``prior`` ``(n_classes,)``).
        """
        share = self.proba_.mean(axis=0) if prior is None else prior
        return np.asarray(np.einsum("k,jkk->j", share / share.sum(), self.confusion_))


def _checked_prior(prior: FloatArray, table: AnswerTable) -> FloatArray:
    want = (table.n_units, table.n_classes)
    if prior.shape != want:
        raise UsageError(f"a prior of shape {prior.shape}", expected=f"(n_units, n_classes) = {want}")
    if not np.isfinite(prior).all() or (prior < 0).any() or (prior.sum(axis=1) <= 0).any():
        raise UsageError("a prior with NaN, negative or all-zero rows", expected="probabilities")
    floor = 1e-4 / table.n_classes  # no model is so sure that people cannot change its mind
    return np.asarray((prior / prior.sum(axis=1, keepdims=True)) * (1 - 1e-4) + floor)


def _known_matrices(table: AnswerTable, known: Mapping[str, FloatArray]) -> dict[int, FloatArray]:
    k = table.n_classes
    for name, matrix in known.items():
        if matrix.shape != (k, k) or not np.allclose(matrix.sum(axis=1), 1) or (matrix < 0).any():
            raise UsageError(f"the known confusion matrix of {name}", expected=f"({k}, {k}), rows that sum to 1")
    matrices = {**known, GOLD: np.eye(k)}
    return {j: matrices[name] for j, name in enumerate(table.annotators) if name in matrices}


def _fix_known(confusion: FloatArray, fixed: Mapping[int, FloatArray]) -> None:
    for j, matrix in fixed.items():
        confusion[j] = matrix
