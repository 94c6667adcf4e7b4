"""Learning curves: how many more answers a score needs, whether they would pay, and what choosing them has saved.

The design, for a project of 20 to 300 answers of which a tenth were asked at random. (1) Scores are taken on unbiased
examples only: held out, or of the random arm; never on chosen ones. (2) *Does choosing help?* Train on the m random
answers and on equally many chosen ones, score both on the same examples, and compare (:func:`compare_arms`); the luck
of the draw is counted by leaving out a part of the answers at a time. It is a statement about m answers, and the first
that can be made. (3) *How much does it save?* The curve of the random arm, from nested subsets of its answers, is
extended to the score reached with all n answers (:func:`saving`). From 30 random answers to 300 that is ten times
beyond the data, so the interval is wide and often open to one side: it is shown, not hidden. (4) *Would more pay?* The
curve of the rounds so far gives the gain of the next answers (:func:`worth`) and the answers to a target
(:func:`plan`); neither compares arms, so nothing but the curve itself is assumed.

The curve is a power law with a limit, score(n) = a - b n^-c (Viering and Loog, The Shape of Learning Curves, 2022,
table 1, POW3; Hestness et al. 2017), rising, within 0 and 1. From a handful of points no single curve
follows, so :func:`fit_curve` keeps thousands of equally plausible ones, and every figure below is a median and an
interval over them. Where a curve is no power law, the intervals are too narrow: real ones with a late jump exist.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from trilobe.errors import NotEnoughData, UsageError
from trilobe.types import FloatArray

EXPONENTS = (0.05, 2.0)  # of the power law: below, no limit is in sight; above, the rise is over at once
PRIOR_DRAWS = 3.0  # how many points the assumption "scores scatter as n_test coin flips do" is worth
N_CURVES = 4000

Verdict = Literal["stop", "go on", "random is better here", "choosing helps", "cannot tell yet"]


@dataclass(frozen=True, slots=True)
class Told:
    """What to tell the user: a figure (``low`` to ``high`` at the level asked for), a verdict, and a sentence."""

    figure: float
    low: float
    high: float
    verdict: Verdict
    sentence: str


@dataclass(frozen=True, eq=False)
class Curve:
    """Equally plausible learning curves score(n) = ``limit`` - ``drop`` n^-``exponent``, each array ``(n_curves,)``.

    They describe the score on the examples it was taken on; ``shift`` ``(n_curves,)`` is how far the score on all
    examples may lie from that, in standard errors of ``n_test`` examples. Without ``n_test`` it is not counted.
    ``stderr`` is the typical standard error of one score, ``sizes`` and ``scores`` ``(n_points,)`` are what came.
    """

    sizes: FloatArray
    scores: FloatArray
    limit: FloatArray
    drop: FloatArray
    exponent: FloatArray
    shift: FloatArray
    stderr: float
    n_test: int | None = None

    def at(self, n: float) -> FloatArray:
        """The score of every curve after ``n`` answers, on the examples it was taken on: ``(n_curves,)``, 0..1.

        >>> curve = fit_curve([20, 40, 80], [0.6, 0.7, 0.75], n_test=500)
        >>> bool((curve.at(100) >= curve.at(50)).all())
        True
        """
        _check_count("answers", n)
        return np.asarray(np.clip(self.limit - self.drop * n**-self.exponent, 0.0, 1.0))

    def predict(self, n: float, level: float = 0.95) -> tuple[float, float, float]:
        """The score to expect after ``n`` answers on examples like those scored: median, low, high, each 0..1.

        The interval is about the expected score; a single model's score scatters around it.

        >>> curve = fit_curve([20, 40, 80, 160], [0.6, 0.7, 0.75, 0.78], n_test=500)
        >>> middle, low, high = curve.predict(320)
        >>> low < middle < high, 0.75 < middle < 0.85
        (True, True)
        """
        on_test = self.at(n)
        return _interval(np.clip(on_test + self.shift * self._spread(on_test), 0.0, 1.0), level)

    def answers_for(self, target: float, level: float = 0.95) -> tuple[float, float, float]:
        """How many answers in all the expected score needs to reach ``target`` (in 0..1): median, low, high.

        ``inf`` where more than the stated share of the curves end below the target: no number of answers is enough
        there, or the data cannot tell. :func:`plan` says it in words.

        >>> curve = fit_curve([20, 40, 80, 160], [0.6, 0.7, 0.75, 0.78], n_test=500)
        >>> middle, low, high = curve.answers_for(0.99)
        >>> middle, high
        (inf, inf)
        """
        if not 0 < target < 1:
            raise UsageError(f"a target score of {target:.6g}", expected="between 0 and 1")
        return _interval(self._answers(target - self.shift * self._spread(np.array(target))), level)

    def _spread(self, score: FloatArray) -> FloatArray:
        """Standard error of ``n_test`` examples around a score; 0 where no ``n_test`` is known."""
        return np.zeros_like(score) if self.n_test is None else np.sqrt(score * (1 - score) / self.n_test)

    def _answers(self, target: FloatArray) -> FloatArray:
        """Answers after which each curve passes its target: the power law solved for n, at least 1."""
        left = self.limit - target
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            n = (self.drop / np.where(left > 0, left, 1.0)) ** (1 / self.exponent)
        return np.where(left > 0, np.maximum(n, 1.0), np.inf)


def fit_curve(sizes: ArrayLike, scores: ArrayLike, n_test: int | None = None, stderr: ArrayLike | None = None) -> Curve:
    """The learning curves that ``scores`` after ``sizes`` answers leave plausible.

    Bayes' rule on a grid over the score at the first size, the score at the last size and the exponent, uniform (the
    exponent in its logarithm) where the curve rises and its limit is at most 1. Scores scatter around the curve with
    phi times their standard error; phi is unknown and integrated out in closed form (Student's t; Gelman et al. 2013,
    section 3.3), so that an outlier, or the luck of small training sets, widens the interval. A grid needs no seed and
    is right at the bounds, where resampled least squares piles up.

    Args:
        sizes: ``(n_points,)`` numbers of answers, positive; a size may come more than once.
        scores: ``(n_points,)`` in 0..1: shares of right answers, or another score if ``stderr`` is given.
        n_test: how many examples every score was taken on: the same ones each time. Sets the standard errors, and the
            distance to the score on all examples.
        stderr: instead: the standard errors of the scores, a number or ``(n_points,)``, positive: of a mean over
            several draws, or of an F1 by bootstrap.

    Raises:
        UsageError: shapes that differ, values out of range, NaN, both or neither of ``n_test`` and ``stderr``.
        NotEnoughData: fewer than 3 different sizes, or the largest less than twice the smallest.

    >>> curve = fit_curve([10, 20, 40, 80], [0.5, 0.6, 0.68, 0.73], n_test=1000)
    >>> middle, low, high = curve.predict(160)
    >>> 0.70 < low < middle < high < 0.85
    True
    """
    n, y, error = _checked_points(sizes, scores, n_test, stderr)
    x = n / n.max()
    box = np.array([(0.0, 1.0), (0.0, 1.0), np.log(EXPONENTS)])
    edge = box
    for _ in range(4):  # the grid closes in on what is plausible, so that 10 and 10,000 test examples do alike
        axes = [np.linspace(low, high, 24) for low, high in box]
        grid = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")])
        first, last, power = grid[0], grid[1], np.exp(grid[2])
        weight = _plausibility(x, y, error, n_test, first, last, power)
        likely = grid[:, weight > 1e-4 * weight.max()]
        step = (box[:, 1] - box[:, 0]) / 23
        box = np.column_stack([likely.min(axis=1) - step, likely.max(axis=1) + step])
        box = box.clip(edge[:, :1], edge[:, 1:])
    # Systematic resampling: curve i stands for the i-th of equal slices of the plausibility.
    slices = (np.arange(N_CURVES) + 0.5) / N_CURVES
    pick = np.searchsorted(np.cumsum(weight) / weight.sum(), slices).clip(max=weight.size - 1)
    first, last, power = first[pick], last[pick], power[pick]
    shift = np.zeros(N_CURVES) if n_test is None else ndtri(_scattered(math.sqrt(5)))
    limit = _limit(x.min(), first, last, power)
    typical = float(np.median(error)) if n_test is None else float(np.sqrt(y.mean() * (1 - y.mean()) / n_test))
    return Curve(n, y, limit, (limit - last) * n.max() ** power, power, shift, typical, n_test)


def plan(curve: Curve, target: float, n_now: int, seconds: float | None = None, level: float = 0.95) -> Told:
    """How many more answers until the expected score reaches ``target``; with ``seconds`` per answer, how long.

    The figure counts further answers (0 when there; ``inf`` where the curve ends below). The verdict is "stop" when
    the target is out of reach even at the good end of the interval or already reached at the bad end, "go on" when it
    is within reach even at the bad end, else "cannot tell yet".

    >>> curve = fit_curve([20, 40, 80, 160], [0.6, 0.7, 0.75, 0.78], n_test=500)
    >>> plan(curve, 0.999, 160).verdict
    'stop'
    """
    _check_count("answers so far", n_now)
    figure, low, high = (max(n - n_now, 0.0) for n in curve.answers_for(target, level))
    if high == 0:
        return Told(0.0, 0.0, 0.0, "stop", f"A score of {target:.3g} is reached with the {n_now} answers there are.")
    limit = _interval(np.clip(curve.limit, 0.0, 1.0), level)
    if low == math.inf:
        said = f"A score of {target:.3g} is out of reach of more answers: they lead to {limit[0]:.3g}"
        return Told(figure, low, high, "stop", f"{said} ({limit[1]:.3g} to {limit[2]:.3g}). Change the model instead.")
    time = "" if seconds is None else f", {_duration(figure * seconds)}"
    about = "more than the curve can tell" if figure == math.inf else f"about {_count(figure)} more answers{time}"
    end = "no number of answers may be enough" if high == math.inf else f"{_count(high)} at most"
    sentence = f"A score of {target:.3g} takes {about} ({_count(low)} at least, {end}; {level:.0%} interval)."
    return Told(figure, low, high, "go on" if high < math.inf else "cannot tell yet", sentence)


def worth(curve: Curve, n_now: int, n_more: int, least: float = 0.01, level: float = 0.95) -> Told:
    """Whether ``n_more`` further answers will pay: the expected gain of the score, against the ``least`` that would.

    "stop" when even the upper end of the gain's interval is below ``least``; "go on" when its lower end reaches it.

    >>> flat = fit_curve([50, 100, 200, 400, 800], [0.902, 0.903, 0.903, 0.902, 0.903], n_test=2000)
    >>> worth(flat, 800, 100).verdict
    'stop'
    """
    _check_count("answers so far", n_now)
    _check_count("further answers", n_more)
    if not 0 < least < 1:
        raise UsageError(f"a least gain of {least:.6g}", expected="between 0 and 1")
    figure, low, high = _interval(curve.at(n_now + n_more) - curve.at(n_now), level)
    gain = (
        f"{n_more} more answers would raise the score by {figure:.2g} ({low:.2g} to {high:.2g}, {level:.0%} interval)"
    )
    if high < least:
        return Told(
            figure, low, high, "stop", f"More labels will not pay: {gain}, less than the {least:.2g} asked for."
        )
    if low >= least:
        return Told(figure, low, high, "go on", f"More labels pay: {gain}.")
    return Told(figure, low, high, "cannot tell yet", f"It is open whether more labels pay: {gain}.")


def saving(random: Curve, reached: "float | Curve", n: int, level: float = 0.95) -> Told:
    """How many random answers each of ``n`` answers was worth: those needed for the same score, divided by ``n``.

    Args:
        random: the curve of the random arm.
        reached: the score after ``n`` answers, taken on the same examples as those of ``random``; or the curve of all
            answers, which steadies it.
        n: the answers it took, positive.
        level: of the interval.

    Returns:
        The ratio, 1 = nothing saved, ``inf`` where the random curve ends below the score. A score given as a number is
        held to scatter as a typical point of the curve does.

    >>> slow = fit_curve([10, 20, 40, 80, 160], [0.50, 0.58, 0.65, 0.71, 0.76], n_test=4000)
    >>> told = saving(slow, 0.80, 60)
    >>> told.verdict, told.low > 1.5
    ('choosing helps', True)
    """
    _check_count("answers", n)
    if isinstance(reached, Curve):
        target = reached.at(n)[_scattered(math.sqrt(2)).argsort()]
    else:
        if not 0 <= reached <= 1:
            raise UsageError(f"a score of {reached:.6g}", expected="0 to 1")
        target = reached + random.stderr * ndtri(_scattered(math.sqrt(2)))
    figure, low, high = _interval(random._answers(target) / n, level)
    verdict: Verdict = "choosing helps" if low > 1 else "random is better here" if high < 1 else "cannot tell yet"
    times = "over 10" if figure > 10 else f"{figure:.2g}"
    end = "beyond any number" if high == math.inf else "over 10" if high > 10 else f"{high:.2g}"
    sentence = (
        f"Asking at random would have taken {times} times as many answers "
        f"({low:.2g} to {end}, {level:.0%} interval): {verdict}."
    )
    if n * figure > 2 * random.sizes.max():
        sentence += f" The random curve is known up to {random.sizes.max():.0f} answers only."
    return Told(figure, low, high, verdict, sentence)


def compare_arms(chosen: ArrayLike, random: ArrayLike, level: float = 0.95) -> Told:
    """Whether chosen answers teach more than equally many random ones: the difference of two scores, -1..1.

    The difference is that of the means over examples and models. Its variance has two parts: over the examples (paired,
    as both arms are scored on the same ones), and over the answers each model happened to learn from, by a jackknife
    that leaves out one part of g (Efron and Stein 1981: not too small on average). The interval is Student's t with
    Satterthwaite's degrees of freedom (1946). McNemar's test, often used here, compares two models, not two ways of
    asking: of two random arms of 20 answers it calls one better in most cases.

    Args:
        chosen: ``(g, n_test)`` booleans: is model j, trained on the chosen answers without their j-th part, right on
            example i? 10 parts serve; with fewer, 95% intervals miss in up to 8% of simulated cases.
        random: ``(g, n_test)`` the same for as many random answers.
        level: of the interval.

    Returns:
        Positive = choosing is better. The arms are held to be independent, and the chosen answers exchangeable, which
        they are only nearly: each was chosen after those before it.

    Raises:
        UsageError: shapes that differ, other values than true and false.
        NotEnoughData: a single model an arm (the luck of the draw cannot be told from a difference), or fewer than 2
            examples.

    >>> right, wrong = np.ones((5, 100), dtype=bool), np.zeros((5, 100), dtype=bool)
    >>> wrong[:, :40] = True
    >>> compare_arms(right, wrong).verdict
    'choosing helps'
    """
    a, b = _checked_arms(chosen, random)
    parts, n_test = a.shape
    difference = a - b
    by_model, by_example = difference.mean(axis=1), difference.mean(axis=0)
    figure = float(difference.mean())
    # Models differ by what they learned from, and by chance on each example: the second part counts as sampling.
    chance = float(((difference - by_model[:, None] - by_example + figure) ** 2).sum()) / ((parts - 1) * (n_test - 1))
    luck = (parts - 1) ** 2 / parts * max(float(by_model.var(ddof=1)) - chance / n_test, 0.0)
    # One example counted on each side keeps the variance above zero where the models agree everywhere.
    sampling = (n_test * float(by_example.var()) + 1 / n_test) / (n_test * (n_test - 1))
    freedom = (luck + sampling) ** 2 / (luck**2 / (parts - 1) + sampling**2 / (n_test - 1))
    half = float(stdtrit(freedom, 0.5 + level / 2)) * math.sqrt(luck + sampling)
    low, high = max(figure - half, -1.0), min(figure + half, 1.0)
    verdict: Verdict = "choosing helps" if low > 0 else "random is better here" if high < 0 else "cannot tell yet"
    sentence = (
        f"Equally many chosen answers score {figure:+.3f} against random ones "
        f"({low:+.3f} to {high:+.3f}, {level:.0%} interval, {n_test} examples): {verdict}."
    )
    return Told(figure, low, high, verdict, sentence)


def _plausibility(
    x: FloatArray,
    y: FloatArray,
    error: FloatArray,
    n_test: int | None,
    first: FloatArray,
    last: FloatArray,
    power: FloatArray,
) -> FloatArray:
    """Posterior weight of every grid point ``(m,)``; 0 where the curve falls or passes 1."""
    limit = _limit(x.min(), first, last, power)
    log_weight = np.full(first.size, -np.inf)
    ok = (last >= first) & (limit <= 1)
    curve = limit[ok, None] - (limit - last)[ok, None] * x ** -power[ok, None]
    if n_test is None:
        variance = np.broadcast_to(error**2, curve.shape)
    else:
        p = np.clip(curve, 0.5 / n_test, 1 - 0.5 / n_test)  # no score is certain
        variance = p * (1 - p) / n_test
    squares = ((y - curve) ** 2 / variance).sum(axis=1)
    freedom = PRIOR_DRAWS + len(y)
    log_weight[ok] = -0.5 * np.log(variance).sum(axis=1) - 0.5 * freedom * np.log(PRIOR_DRAWS + squares)
    return np.asarray(np.exp(log_weight - log_weight.max()))


def _limit(x_first: float, first: FloatArray, last: FloatArray, power: FloatArray) -> FloatArray:
    """The limit a of the power law through ``first`` at ``x_first`` and ``last`` at 1: a - (a - last) x^-c."""
    return np.asarray(last + (last - first) / (x_first**-power - 1))


def _interval(values: FloatArray, level: float) -> tuple[float, float, float]:
    """Median and the two ends that leave out (1 - level) / 2 each; order statistics, as values may be infinite."""
    if not 0 < level < 1:
        raise UsageError(f"an interval of level {level:.6g}", expected="between 0 and 1, such as 0.95")
    found = np.quantile(values, [0.5, (1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(found[0]), float(found[1]), float(found[2])


def _scattered(irrational: float) -> FloatArray:
    """``(N_CURVES,)`` evenly over 0..1, in an order that has nothing to do with that of the curves (Weyl 1916)."""
    return np.asarray(np.modf((np.arange(N_CURVES) + 0.5) * irrational)[0])


def _checked_points(
    sizes: ArrayLike, scores: ArrayLike, n_test: int | None, stderr: ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Sizes, scores and standard errors (NaN with ``n_test``), ``(n_points,)`` each, or what is wrong with them."""
    n, y = np.asarray(sizes, dtype=float), np.asarray(scores, dtype=float)
    if n.ndim != 1 or n.shape != y.shape:
        raise UsageError(f"sizes of shape {n.shape} and scores of shape {y.shape}", expected="(n_points,) both")
    if not (np.isfinite(n).all() and (n > 0).all()):
        raise UsageError(f"sizes {n.tolist()}", expected="positive numbers of answers")
    if not ((y >= 0) & (y <= 1)).all():
        raise UsageError(f"scores {y.tolist()}", expected="numbers from 0 to 1")
    if (n_test is None) == (stderr is None):
        came = "neither n_test nor stderr" if n_test is None else "both n_test and stderr"
        raise UsageError(came, expected="one of them", hint="n_test=how many examples each score was taken on")
    if n_test is not None and n_test < 1:
        raise UsageError(f"scores on {n_test} examples", expected="at least 1")
    error = np.full(n.shape, np.nan) if stderr is None else np.asarray(stderr, dtype=float)
    if stderr is not None and (error.shape not in ((), n.shape) or not ((error > 0) & np.isfinite(error)).all()):
        raise UsageError(f"standard errors {error.tolist()}", expected="one positive number, or one a score")
    if len(set(n.tolist())) < 3 or n.max() < 2 * n.min():
        came = f"scores at {len(set(n.tolist()))} sizes" + (f", {n.min():g} to {n.max():g} answers" if n.size else "")
        raise NotEnoughData(
            f"{came} do not show a curve",
            expected="at least 3 different sizes, the largest at least twice the smallest",
            hint="train on subsets of the answers, or answer another round",
        )
    return n, y, np.broadcast_to(error, n.shape)


def _checked_arms(chosen: ArrayLike, random: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both arms as ``(g, n_test)`` zeros and ones, or what is wrong with them."""
    a, b = np.asarray(chosen), np.asarray(random)
    if a.shape != b.shape or a.ndim != 2:
        raise UsageError(f"arms of shapes {a.shape} and {b.shape}", expected="(g, n_test) both: models by examples")
    if not all(np.isin(arm, (0, 1)).all() for arm in (a, b)):
        raise UsageError("arms with other values than true and false", expected="whether each answer was right")
    if len(a) < 2 or a.shape[1] < 2:
        raise NotEnoughData(
            f"{len(a)} models an arm on {a.shape[1]} examples",
            expected="at least 2 models, each without another part of the answers, and 2 examples",
        )
    return a.astype(float), b.astype(float)


def _check_count(what: str, n: float) -> None:
    if not (math.isfinite(n) and n >= 1):
        raise UsageError(f"{n:.6g} {what}", expected="at least 1")


def _count(n: float) -> str:
    """A number of answers with two digits that mean something: 1234.5 is said "1,200"."""
    if n < 100:
        return f"{math.ceil(n)}"
    return f"{float(f'{n:.2g}'):,.0f}" if n < 1e6 else "over a million"


def _duration(seconds: float) -> str:
    """Seconds in the unit people plan in."""
    if seconds == math.inf:
        return "no end of time"
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"
