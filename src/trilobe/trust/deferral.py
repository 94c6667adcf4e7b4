"""Which live predictions go to a person: thresholds on a score of doubt, with a promise about what is left.

Any score of :mod:`trilobe.data.query` serves (higher = more uncertain), so that what is asked about in the pool and
what is deferred in production are judged alike. Two promises are on offer, each made from labeled or unlabeled examples
that are a random sample of the traffic to come, and each kept with a stated confidence over the draw of that sample:
the predictions that are *not* deferred err at most so often (:func:`threshold_for_error`), or a person sees at most
this share (:func:`threshold_for_review_rate`). The third way needs no score: sets of classes that hold the truth at
least so often (:func:`conformal_quantile`); a set with more than one class, or none, is for a person. Every promise
ends when the traffic changes, which is what monitoring watches.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from trilobe.data.query import check_proba
from trilobe.errors import NotEnoughData, UsageError
from trilobe.statistics import clopper_pearson
from trilobe.trust.metrics import check_proba as check_labeled
from trilobe.types import BoolArray, FloatArray

STARTS = (0.125, 0.25, 0.5)  # shares of the examples at which the search for a threshold may begin
STEP = 0.02  # share of the examples by which it goes on


@dataclass(frozen=True, slots=True)
class Deferral:
    """Predictions whose score reaches ``threshold`` go to a person; ``-inf`` sends all, ``inf`` none.

    ``review_rate`` is the share a person will see, with its interval at ``confidence`` (Clopper-Pearson). Promised,
    with that confidence, is ``max_error`` (of the predictions not deferred) or ``max_review_rate``, where not None.
    ``n`` examples are behind it; ``score`` names the score it belongs to, as in ``margin.v1``.
    """

    threshold: float
    review_rate: float
    review_low: float
    review_high: float
    confidence: float
    n: int
    max_error: float | None = None
    max_review_rate: float | None = None
    score: str = ""

    def __post_init__(self) -> None:
        shares = (self.review_low, self.review_rate, self.review_high, self.confidence)
        promised = [p for p in (self.max_error, self.max_review_rate) if p is not None]
        if math.isnan(self.threshold):
            raise UsageError("a deferral threshold that is not a number", expected="a number, inf or -inf")
        if not all(0 <= p <= 1 for p in (*shares, *promised)) or self.n < 1:
            raise UsageError(
                f"a deferral with shares {[*shares, *promised]} of {self.n}", expected="0 to 1, of 1 or more"
            )

    def defer(self, scores: ArrayLike) -> BoolArray:
        """Which of ``scores`` ``(n,)`` go to a person. NaN does: a prediction that cannot be judged is not trusted.

        >>> Deferral(0.5, 0.1, 0.0, 0.2, 0.95, 100).defer([0.2, 0.5, float("nan")]).tolist()
        [False, True, True]
        """
        return np.asarray(~(np.asarray(scores, dtype=np.float64) < self.threshold))

    @property
    def sentence(self) -> str:
        """What it does and promises, in words.

        >>> print(Deferral(0.5, 0.1, 0.05, 0.2, 0.95, 100, max_error=0.02).sentence)
        10.0% of the predictions go to a person (5.0% to 20.0%).
        Of the others at most 2.0% are wrong (confidence 95.0%).
        """
        if self.threshold == -math.inf:
            return "All predictions go to a person: even the most certain are not shown to be right often enough."
        interval = f"{self.review_low:.1%} to {self.review_high:.1%}"
        text = f"{self.review_rate:.1%} of the predictions go to a person ({interval})."
        if self.max_error is not None:
            text += f" Of the others at most {self.max_error:.1%} are wrong (confidence {self.confidence:.1%})."
        if self.max_review_rate is not None:
            text += f" It will be at most {self.max_review_rate:.1%} (confidence {self.confidence:.1%})."
        return text

    def to_plain(self) -> dict[str, Any]:
        """Values that JSON can hold; infinite thresholds, which it cannot, become ``"inf"`` and ``"-inf"``.

        >>> Deferral(float("inf"), 0.0, 0.0, 0.1, 0.95, 30).to_plain()["threshold"]
        'inf'
        """
        threshold = str(self.threshold) if math.isinf(self.threshold) else self.threshold
        return {**asdict(self), "threshold": threshold}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Deferral":
        """The deferral that :meth:`to_plain` wrote. Raises :class:`~trilobe.errors.UsageError` for anything else.

        >>> one = Deferral(0.25, 0.1, 0.0, 0.2, 0.95, 100, score="margin.v1")
        >>> Deferral.from_plain(one.to_plain()) == one
        True
        """
        threshold = {"inf": math.inf, "-inf": -math.inf}.get(str(values.get("threshold")), values.get("threshold"))
        strange = sorted(set(values) - set(cls.__dataclass_fields__))
        if strange:
            raise UsageError(f"a deferral with {strange}", expected=f"only {', '.join(cls.__dataclass_fields__)}")
        try:
            return msgspec.convert({**values, "threshold": threshold}, cls)
        except msgspec.ValidationError as e:
            raise UsageError(f"a deferral that cannot be read: {e}", expected="what Deferral.to_plain wrote") from e


def threshold_for_error(
    scores: ArrayLike, correct: ArrayLike, error: float = 0.05, confidence: float = 0.95, score: str = ""
) -> Deferral:
    """The threshold that defers least while the other predictions err at most ``error`` of the time.

    Selective classification with guaranteed risk (Geifman and El-Yaniv 2017), searched by fixed-sequence testing from
    several starts (Angelopoulos et al., Learn then Test, 2021): from the most certain eighth, quarter and
    half of the examples, each with its part of 1 - ``confidence``, ever more predictions are kept as long as the exact
    binomial test rejects "these err more than ``error``". Deviation: their binary search tests each step against a
    bound for all of them; a sequence keeps more. The promise is exact for scores without ties whose kept predictions
    cross ``error`` once as more are kept, which is what a score that ranks by certainty does.

    Args:
        scores: ``(n,)`` finite, higher = more uncertain, of a random sample of the traffic.
        correct: ``(n,)`` booleans: was the prediction right?
        error: the share of wrong ones to be kept below, between 0 and 1.
        confidence: of the promise, between 0 and 1.
        score: name of the score, kept with the result.

    Returns:
        A deferral of everything where the examples are enough but the predictions too bad.

    Raises:
        UsageError: shapes that differ, NaN, values out of range.
        NotEnoughData: so few examples that not even faultless ones could show it; says how many could.

    >>> found = threshold_for_error(np.arange(200) / 200, np.arange(200) < 150, error=0.05)
    >>> found.review_rate, found.defer([0.1, 0.9]).tolist()
    (0.24, [False, True])
    """
    x, right = _checked(scores, correct)
    _check_share("an error", error)
    _check_share("a confidence", confidence)
    n, order = len(x), np.argsort(x, kind="stable")
    ranked, wrong = x[order], np.cumsum(~right[order])
    fewest = math.ceil(round(math.log(1 - confidence) / math.log(1 - error), 9))
    if n < fewest:
        raise NotEnoughData(
            f"{n} examples cannot guarantee an error of at most {error:.6g}",
            expected=f"at least {fewest}, even if all are right (confidence {confidence:.6g})",
            hint="label more examples, or ask for less",
        )
    starts = sorted({max(math.ceil(share * n), fewest) for share in STARTS})
    while len(starts) > 1 and (1 - error) ** starts[0] > (1 - confidence) / len(starts):
        starts = starts[1:]  # nothing could be shown from there
    step, kept = max(1, int(STEP * n)), 0
    for start in starts:
        for rank in (*range(start, n, step), n):
            size = int(np.searchsorted(ranked, ranked[rank - 1], side="right"))  # ties are kept or deferred together
            if bdtr(wrong[size - 1], size, error) > (1 - confidence) / len(starts):
                break
            kept = max(kept, size)
    threshold = math.inf if kept == n else float(ranked[kept]) if kept else -math.inf
    return _deferral(threshold, n - kept, n, confidence, score, max_error=error)


def threshold_for_review_rate(scores: ArrayLike, rate: float, confidence: float = 0.95, score: str = "") -> Deferral:
    """The threshold that sends as many predictions as it may to a person: at most the share ``rate``.

    A one-sided tolerance limit from order statistics (Wilks 1941): the j-th smallest score is exceeded by at most
    ``rate`` of the traffic with probability P(Binomial(n, 1 - rate) < j), whatever the distribution; ties only lower
    the rate. No labels are needed.

    Args:
        scores: ``(n,)`` finite, higher = more uncertain, of a random sample of the traffic.
        rate: between 0 and 1.
        confidence: of the promise, between 0 and 1.
        score: name of the score, kept with the result.

    Raises:
        UsageError: a wrong shape, NaN, values out of range.
        NotEnoughData: so few examples that not even their largest score will do; says how many would.

    >>> found = threshold_for_review_rate(np.arange(500) / 500, rate=0.1)
    >>> found.review_rate, found.max_review_rate
    (0.076, 0.1)
    """
    x, _ = _checked(scores, None)
    _check_share("a review rate", rate)
    _check_share("a confidence", confidence)
    n = len(x)
    fewest = math.ceil(round(math.log(1 - confidence) / math.log(1 - rate), 9))
    if n < fewest:
        raise NotEnoughData(
            f"{n} examples cannot guarantee a review rate of at most {rate:.6g}",
            expected=f"at least {fewest} (confidence {confidence:.6g})",
            hint="score more of the traffic; it needs no labels",
        )
    enough = bdtr(np.arange(n), n, 1 - rate) >= confidence - 1e-12
    limit = np.sort(x)[int(enough.argmax())]
    threshold = float(np.nextafter(limit, np.inf))  # the limit itself is not deferred
    return _deferral(threshold, int((x >= threshold).sum()), n, confidence, score, max_review_rate=rate)


def conformal_quantile(proba: ArrayLike, labels: ArrayLike, error: float = 0.05) -> float:
    """The quantile q for which the sets {k: 1 - p_k <= q} hold the true class with probability 1 - ``error`` at least.

    Split conformal prediction (Vovk et al. 2005; Sadinle et al. 2019, least ambiguous sets): the
    ceil((n + 1)(1 - error))-th smallest 1 - p of the true class. The probability is over the sample and the next
    example together; it is about the sets, not about those with a single class.

    Args:
        proba: ``(n, n_classes)`` of a random sample of the traffic, none of it used in training.
        labels: ``(n,)`` class indices.
        error: between 0 and 1.

    Raises:
        UsageError: probabilities or labels that make no sense.
        NotEnoughData: fewer than 1/error - 1 examples.

    >>> conformal_quantile([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]], [0, 1, 1], error=0.5)
    0.25
    """
    p, y = check_labeled(proba, labels)
    _check_share("an error", error)
    n = len(y)
    rank = math.ceil(round((n + 1) * (1 - error), 9))
    if rank > n:
        raise NotEnoughData(
            f"{n} examples cannot guarantee sets that err at most {error:.6g}",
            expected=f"at least {math.ceil(round(1 / error - 1, 9))}",
            hint="label more examples, or ask for less",
        )
    doubt = 1 - np.asarray(p, dtype=np.float64)[np.arange(n), y]
    return float(np.partition(doubt, rank - 1)[rank - 1])


def prediction_sets(proba: FloatArray, quantile: float) -> BoolArray:
    """The classes that cannot be ruled out, ``(n, n_classes)`` booleans: those with 1 - p <= ``quantile``.

    A prediction is for a person where the set has not exactly one class.

    >>> sets = prediction_sets(np.array([[0.9, 0.1], [0.6, 0.4]]), quantile=0.65)
    >>> (sets.sum(axis=1) != 1).tolist()
    [False, True]
    """
    if not 0 <= quantile <= 1:
        raise UsageError(f"a conformal quantile of {quantile:.6g}", expected="0 to 1, as of conformal_quantile")
    return np.asarray(1 - check_proba(proba).astype(np.float64) <= quantile)


def _deferral(threshold: float, deferred: int, n: int, confidence: float, score: str, **promise: float) -> Deferral:
    low, high = clopper_pearson(deferred, n, confidence)
    return Deferral(threshold, deferred / n, low, high, confidence, n, score=score, **promise)


def _checked(scores: ArrayLike, correct: ArrayLike | None) -> tuple[FloatArray, BoolArray]:
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 1:
        raise UsageError(f"scores of shape {x.shape}", expected="(n,)")
    if not len(x):
        raise NotEnoughData("no scores", expected="a random sample of the traffic")
    if not np.isfinite(x).all():
        raise UsageError("scores with NaN or infinity", expected="finite numbers, higher = more uncertain")
    right = np.zeros(len(x), dtype=bool) if correct is None else np.asarray(correct)
    if right.shape != x.shape or not np.isin(right, (0, 1)).all():
        raise UsageError(f"correct of shape {right.shape} for {len(x)} scores", expected="as many true or false")
    return x, right.astype(bool)


def _check_share(what: str, value: float) -> None:
    if not 0 < value < 1:
        raise UsageError(f"{what} of {value:.6g}", expected="between 0 and 1")
