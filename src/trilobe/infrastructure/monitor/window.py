"""One window of captures against the baseline: the three rules, the findings in words, and the rate of false alarms."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trilobe.errors import DataError, NotEnoughData, UsageError
from trilobe.infrastructure.monitor.baseline import BINS, Baseline, distributions
from trilobe.infrastructure.monitor.exact import IntArray, fisher_rise, holm, permutation_chi2
from trilobe.statistics import clopper_pearson
from trilobe.types import Capture, Finding, FindingKind, FloatArray, LabelSpace

Verdict = Literal["ok", "alarm", "too_few"]


@dataclass(frozen=True, slots=True)
class Window:
    """What the monitor says of ``n`` captures: ``"ok"``, ``"alarm"`` (see ``findings``) or ``"too_few"`` to say.

    ``message`` is the verdict in words. ``p_values`` are corrected for all rules together, so each rule alarms where
    its own is at most ``alpha``; they are kept when nothing is found, too, and empty where there were too few.
    """

    n: int
    verdict: Verdict
    message: str
    findings: tuple[Finding, ...] = ()
    p_values: Mapping[FindingKind, float] = field(default_factory=dict)


def find(
    baseline: Baseline,
    captures: Sequence[Capture],
    space: LabelSpace,
    alpha: float = 0.01,
    share: float = 0.5,
    min_n: int = 30,
    seed: int = 0,
    n_permutations: int = 9_999,
) -> Window:
    """Hold one window of captures against the baseline.

    Three rules, corrected together by Holm (1979), so that ``alpha`` is the false-alarm rate per window of them all
    (what that covers and what not: see :mod:`trilobe.infrastructure.monitor`):

    ``class_share``: one class makes up more than ``share`` of the window, and more than the baseline explains
    (Fisher's exact test of two samples, corrected for the number of classes).
    ``low_confidence``: more confidences than explained lie under the baseline's lowest tenth. The number of a window
    under an order statistic of another sample is negative hypergeometric, whose tail is Fisher's one-sided test.
    ``class_drift``: the mix of classes differs: the smaller of two p-values, doubled. The permutation chi-square sees
    a change spread over many classes, Fisher's two-sided test of each class (corrected for their number) a change in
    one. Figure: total variation distance, 0 = the same mix to 1 = no class in common, beside the distance that
    chance alone would give.

    A finding's ``p_value`` is corrected for all rules; its ``low`` and ``high`` are 95% limits; its ``capture_ids``
    are the captures that caused it, least confident first (``class_drift``: of the most surprising class first).
    ``created_at`` is the time of the last capture: this function reads no clock.

    Raises :class:`~trilobe.errors.UsageError` for settings out of range or captures that do not belong to one bundle
    or not to ``space``, :class:`~trilobe.errors.DataError` for replies that are no distribution.

    >>> held_out = [[0.9, 0.1], [0.1, 0.9]] * 100
    >>> space = LabelSpace(("cat", "dog"))
    >>> replies = [[0.9, 0.1]] * 36 + [[0.1, 0.9]] * 4
    >>> captures = [Capture(str(i), "pets", "b1", 0.0, np.zeros(1), np.array(p)) for i, p in enumerate(replies)]
    >>> find(Baseline.from_proba(held_out), captures, space).findings[0].message
    "class 'cat' is 90% of 40 predictions [76%, 97%]; 50% expected; p < 0.0001"
    """
    _check_settings(alpha, share, min_n, n_permutations)
    n = len(captures)
    if n < min_n:
        return Window(n, "too_few", f"no verdict: {n} captures of the {min_n} needed")
    proba = _replies(baseline, captures, space)
    seen = _compare(baseline, proba, share, n_permutations, np.random.default_rng(seed))
    rules = {"class_share": _class_share, "low_confidence": _low_confidence, "class_drift": _class_drift}
    findings = tuple(
        _finding(kind, seen.p_values[kind], captures, rules[kind](baseline, proba, seen, space.names))
        for kind in seen.p_values
        if seen.p_values[kind] <= alpha
    )
    message = "; and ".join(f.message for f in findings) or f"{n} captures: nothing that chance does not explain"
    return Window(n, "alarm" if findings else "ok", message, findings, seen.p_values)


def false_alarm_rate(
    proba: ArrayLike,
    n_windows: int = 500,
    window: int = 100,
    alpha: float = 0.01,
    share: float = 0.5,
    seed: int = 0,
    n_permutations: int = 9_999,
) -> tuple[float, float, float]:
    """How often the monitor alarms on windows in which nothing happened: ``(rate, low, high)``, 95% limits.

    Splits held-out predictions ``proba (n_samples, n_classes)`` at random into a window and a baseline of the rest,
    ``n_windows`` times; such splits are exchangeable by construction, so ``rate`` exceeds ``alpha`` by chance only.
    The limits are Clopper and Pearson's (1934). Raises :class:`~trilobe.errors.NotEnoughData` where nothing is left
    for the baseline.

    >>> predictions = np.random.default_rng(0).dirichlet([1.0, 2.0, 3.0], 300)
    >>> rate, low, high = false_alarm_rate(predictions, n_windows=100, alpha=0.05)
    >>> low <= 0.05
    True
    """
    _check_settings(alpha, share, 1, n_permutations)
    array = distributions(proba, "held-out predictions")
    if not 0 < window < len(array) or n_windows < 1:
        raise NotEnoughData(
            f"{n_windows} windows of {window} from {len(array)} held-out predictions",
            expected="at least one window, smaller than the held-out data",
        )
    rng = np.random.default_rng(seed)
    alarms = 0
    for _ in range(n_windows):
        order = rng.permutation(len(array))
        baseline = Baseline.from_proba(array[order[window:]])
        seen = _compare(baseline, array[order[:window]], share, n_permutations, rng)
        alarms += min(seen.p_values.values()) <= alpha
    return alarms / n_windows, *clopper_pearson(alarms, n_windows)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A window beside its baseline, before anything is said about it."""

    counts: IntArray  # (n_classes,) predictions of each class in the window
    top: int  # the class most surprisingly above the share, where one is
    change: FloatArray  # (n_classes,) two-sided p-value of each class, corrected for their number
    n_low: int  # confidences of the window under the baseline's first edge
    chance: float  # total variation distance expected with no drift
    p_values: dict[FindingKind, float]  # corrected for all rules


def _compare(
    baseline: Baseline, proba: FloatArray, share: float, n_permutations: int, rng: np.random.Generator
) -> _Comparison:
    """Test a window ``proba (m, n_classes)`` with all rules."""
    n, m, n_classes = baseline.n, len(proba), len(baseline.class_counts)
    before = np.array(baseline.class_counts)
    counts = np.bincount(proba.argmax(axis=1), minlength=n_classes)
    n_low = int((proba.max(axis=1) < baseline.confidence_edges[0]).sum())
    rise, fall = fisher_rise(before, n, counts, m), fisher_rise(n - before, n, m - counts, m)
    change = np.minimum(1, 2 * n_classes * np.minimum(rise, fall))
    spread, chance = permutation_chi2(before, counts, n_permutations, rng)
    above = np.where(counts / m > share, rise, 1.0)
    p_values = holm(
        {
            "class_share": min(1.0, n_classes * float(above.min())),
            "low_confidence": float(fisher_rise(n // BINS, n, n_low, m)),
            "class_drift": min(1.0, 2 * min(spread, float(change.min()))),
        }
    )
    return _Comparison(counts, int(above.argmin()), change, n_low, chance, p_values)


@dataclass(frozen=True, slots=True)
class _Words:
    text: str
    figure: float
    expected: float
    low: float
    high: float
    order: IntArray  # positions of the captures that caused it
    detail: dict[str, Any]


def _class_share(baseline: Baseline, proba: FloatArray, seen: _Comparison, names: Sequence[str]) -> _Words:
    top = seen.top
    k, m, expected = int(seen.counts[top]), len(proba), baseline.class_counts[top] / baseline.n
    low, high = clopper_pearson(k, m)
    text = f"class {names[top]!r} is {_percent(k / m)} of {m} predictions [{_percent(low)}, {_percent(high)}]"
    order = _doubtful_first(proba, proba.argmax(axis=1) == top)
    return _Words(f"{text}; {_percent(expected)} expected", k / m, expected, low, high, order, {"class": names[top]})


def _low_confidence(baseline: Baseline, proba: FloatArray, seen: _Comparison, names: Sequence[str]) -> _Words:
    k, m, expected = seen.n_low, len(proba), baseline.confidence_counts[0] / baseline.n
    low, high = clopper_pearson(k, m)
    edge, mean = baseline.confidence_edges[0], float(proba.max(axis=1).mean())
    text = (
        f"{_percent(k / m)} of {m} predictions have a confidence under {edge:.2f} [{_percent(low)}, {_percent(high)}]; "
        f"{_percent(expected)} expected; the mean confidence is {mean:.2f}, {baseline.mean_confidence:.2f} expected"
    )
    order = _doubtful_first(proba, proba.max(axis=1) < edge)
    return _Words(text, k / m, expected, low, high, order, {"under": edge, "mean_confidence": mean})


def _class_drift(baseline: Baseline, proba: FloatArray, seen: _Comparison, names: Sequence[str]) -> _Words:
    """Words for another mix of classes; the limits hold for small samples, and are wide for it.

    The distance is the most by which any set of classes gained. So it is at least what single classes surely gained
    (or lost), by exact limits of all classes at once, and at most the figure plus what Hoeffding's inequality allows
    each sample over the ``2^n_classes`` sets; each side may fail with probability 0.025.
    """
    m, n, n_classes = len(proba), baseline.n, len(names)
    before, now = np.array(baseline.class_counts) / n, seen.counts / m
    limits = [
        (*clopper_pearson(int(k), m, 1 - 0.0125 / n_classes), *clopper_pearson(b, n, 1 - 0.0125 / n_classes))
        for k, b in zip(seen.counts, baseline.class_counts, strict=True)
    ]
    low_now, high_now, low_before, high_before = np.array(limits).T
    gain, loss = np.maximum(0, [low_now - high_before, low_before - high_now]).sum(axis=1)
    slack = sum(math.sqrt((n_classes * math.log(2) - math.log(0.0125)) / (2 * size)) for size in (m, n))
    distance = float(np.abs(now - before).sum() / 2)
    surprise = (now - before) / np.sqrt(np.maximum(seen.counts + before * n, 1))  # orders as the standardized residual
    moved = [int(c) for c in np.argsort(-np.abs(surprise), kind="stable") if seen.change[c] <= 0.05]
    rose = [c for c in moved if surprise[c] > 0] or [int(c) for c in np.argsort(-surprise) if surprise[c] > 0]
    shift = ", ".join(f"{names[c]!r} {_percent(before[c])} -> {_percent(now[c])}" for c in moved[:3])
    text = (
        f"the mix of predicted classes is {distance:.2f} away from the baseline's (0 = same, 1 = nothing in common) "
        f"in {m} predictions; {seen.chance:.2f} expected by chance; "
        + (f"most: {shift}" if shift else "spread over many classes, none stands out")
    )
    order = np.concatenate([_doubtful_first(proba, proba.argmax(axis=1) == c) for c in rose])
    changes = [
        {
            "class": names[c],
            "share": float(now[c]),
            "low": float(low_now[c]),
            "high": float(high_now[c]),
            "expected": float(before[c]),
            "p_value": float(seen.change[c]),
        }
        for c in moved
    ]
    low, high = float(max(gain, loss)), min(1.0, distance + slack)
    return _Words(text, distance, seen.chance, low, high, order, {"changes": changes})


def _finding(kind: FindingKind, p_value: float, captures: Sequence[Capture], words: _Words) -> Finding:
    key = "\0".join([kind, *(c.id for c in captures)])
    return Finding(
        id=hashlib.sha256(key.encode()).hexdigest(),
        endpoint=captures[0].endpoint,
        bundle_id=captures[0].bundle_id,
        kind=kind,
        message=f"{words.text}; " + ("p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"),
        figure=words.figure,
        expected=words.expected,
        low=words.low,
        high=words.high,
        p_value=p_value,
        n=len(captures),
        capture_ids=tuple(captures[i].id for i in words.order),
        detail=words.detail,
        created_at=max(c.at for c in captures),
    )


def _doubtful_first(proba: FloatArray, chosen: NDArray[np.bool_]) -> IntArray:
    """Positions of the chosen rows, least confident first."""
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(proba[rows].max(axis=1), kind="stable")]


def _percent(share: float) -> str:
    """In whole percent, below ten with one decimal: 71%, 3.3%."""
    return f"{100 * share:.0f}%" if share >= 0.0995 or share == 0 else f"{100 * share:.1f}%"


def _replies(baseline: Baseline, captures: Sequence[Capture], space: LabelSpace) -> FloatArray:
    """The replies of one window ``(n, n_classes)``, after checking that they belong to one bundle and to the space."""
    if len(space) != len(baseline.class_counts):
        raise UsageError(
            f"a label space of {len(space)} classes for a baseline of {len(baseline.class_counts)}",
            expected="the label space of the bundle that the baseline came with",
        )
    sources = sorted({(c.endpoint, c.bundle_id) for c in captures})
    if len(sources) > 1:
        raise UsageError(
            f"captures of {len(sources)} bundles or endpoints in one window: {sources[:3]}",
            expected="captures of one endpoint and one bundle: a baseline belongs to one bundle",
        )
    if len({c.id for c in captures}) < len(captures):
        raise UsageError("the same capture comes twice in one window", expected="each capture once")
    for capture in captures:
        if np.shape(capture.proba) != (len(space),):
            raise DataError(
                f"capture {capture.id!r} has a reply of shape {np.shape(capture.proba)}", expected=f"({len(space)},)"
            )
    return distributions([c.proba for c in captures], "captured replies")


def _check_settings(alpha: float, share: float, min_n: int, n_permutations: int) -> None:
    for name, value in (("alpha", alpha), ("share", share)):
        if not 0 < value < 1:
            raise UsageError(f"{name} = {value}", expected="a number between 0 and 1")
    if min_n < 1:
        raise UsageError(f"min_n = {min_n}", expected="at least 1 capture")
    if (needed := math.ceil(6 / alpha) - 1) > n_permutations:
        raise UsageError(
            f"{n_permutations} permutations cannot show a drift at alpha = {alpha}",
            expected=f"at least {needed} (three rules, two tests of drift)",
        )
