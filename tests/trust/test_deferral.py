"""Deferral: the promises hold in simulation, with ties too; what is stored comes back; what cannot be said is not."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trilobe.data.query import margin
from trilobe.errors import NotEnoughData, UsageError
from trilobe.trust.deferral import (
    Deferral,
    conformal_quantile,
    prediction_sets,
    threshold_for_error,
    threshold_for_review_rate,
)


def risk(score: np.ndarray) -> np.ndarray:
    """How often a prediction of that score (0..1) is wrong, in the world of these tests."""
    return np.asarray(0.01 + 0.5 * np.clip(score - 0.4, 0, 1))


WORLD = np.linspace(0, 1, 20_001)


@pytest.mark.parametrize("levels", [0, 12])  # a continuous score, and one of 12 values
@pytest.mark.parametrize("n", [150, 600])
def test_the_kept_predictions_err_no_more_than_promised(n: int, levels: int) -> None:
    """With confidence 90% at most a tenth of the samples may lead to a threshold that keeps too many errors."""
    rng, broken, kept, repeats = np.random.default_rng(n + levels), 0, [], 200
    world = np.floor(WORLD * levels) / levels if levels else WORLD
    for _ in range(repeats):
        x = rng.random(n)
        x = np.floor(x * levels) / levels if levels else x
        found = threshold_for_error(x, rng.random(n) >= risk(x), error=0.05, confidence=0.9)
        keep = ~found.defer(world)
        kept.append(keep.mean())
        broken += bool(keep.any() and risk(world)[keep].mean() > 0.05)
    assert broken <= stats.binom.ppf(0.999, repeats, 0.1)
    assert np.mean(kept) > (0.1 if n == 150 else 0.5)  # of 0.8 that may be kept, could one see the world


def test_the_threshold_is_on_the_edge_of_the_promise() -> None:
    """All equally bad, just too bad: any threshold breaks the promise, and at most one sample in twenty yields one."""
    rng, repeats = np.random.default_rng(0), 400
    broken = sum(
        threshold_for_error(rng.random(200), rng.random(200) >= 0.0501).threshold > -math.inf for _ in range(repeats)
    )
    assert 1 <= broken <= stats.binom.ppf(0.999, repeats, 0.05)


def test_all_right_and_all_wrong() -> None:
    x = np.linspace(0, 1, 59)
    right = threshold_for_error(x, np.ones(59, dtype=bool))
    assert (right.threshold, right.review_rate) == (math.inf, 0)
    assert not right.defer([1e9]).any()
    wrong = threshold_for_error(x, np.zeros(59, dtype=bool))
    assert (wrong.threshold, wrong.review_rate) == (-math.inf, 1)
    assert wrong.defer([-1e9]).all()
    assert "All predictions go to a person" in wrong.sentence


@pytest.mark.parametrize(("error", "confidence"), [(0.05, 0.95), (0.01, 0.9), (0.5, 0.5), (0.2, 0.99)])
def test_too_few_examples_are_told_how_many_it_takes(error: float, confidence: float) -> None:
    """The smallest number is exact: one fewer is refused, and with it faultless predictions are all kept."""
    fewest = next(n for n in range(1, 2000) if stats.binom.cdf(0, n, error) <= 1 - confidence + 1e-12)
    if fewest > 1:
        with pytest.raises(NotEnoughData, match=f"at least {fewest}, even if all are right"):
            threshold_for_error(np.arange(fewest - 1), np.ones(fewest - 1), error, confidence)
    assert threshold_for_error(np.arange(fewest), np.ones(fewest), error, confidence).review_rate == 0


def test_equal_scores_share_their_fate() -> None:
    x = np.repeat([0.0, 1.0], 300)
    found = threshold_for_error(x, x == 0)
    assert found.defer([0.0, 1.0]).tolist() == [False, True]
    assert found.review_rate == 0.5
    same = threshold_for_error(np.zeros(600), np.arange(600) % 2 == 0)
    assert same.threshold == -math.inf


@given(st.integers(60, 300), st.floats(0.02, 0.4), st.integers(0, 2**32 - 1))
def test_a_looser_promise_never_defers_more(n: int, error: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, confidence = rng.random(n), 0.5
    right = rng.random(n) >= risk(x)
    strict, loose = (threshold_for_error(x, right, e, confidence) for e in (error, error + 0.1))
    if math.log(0.5) / math.log(1 - error) < n / 16:  # the same starts
        assert loose.threshold >= strict.threshold
    for found in (strict, loose):
        assert found.defer(x).mean() == pytest.approx(found.review_rate)
        assert found.review_low <= found.review_rate <= found.review_high


@pytest.mark.parametrize("levels", [0, 5])
def test_the_review_rate_is_kept_with_the_stated_confidence(levels: int) -> None:
    rng, repeats, rates = np.random.default_rng(levels), 1000, []
    for _ in range(repeats):
        x = rng.random(200)
        x, world = (np.floor(v * levels) / levels if levels else v for v in (x, WORLD[::2]))
        rates.append(threshold_for_review_rate(x, 0.2, 0.9).defer(world).mean())
    over = np.mean(np.array(rates) > 0.2 + 1e-4)
    assert over <= stats.binom.ppf(0.999, repeats, 0.1) / repeats
    if not levels:  # Wilks' limit is as tight as whole ranks allow
        assert over >= 0.05
        assert np.mean(rates) > 0.14


@pytest.mark.parametrize(("rate", "confidence"), [(0.1, 0.95), (0.01, 0.9)])
def test_the_review_rate_needs_as_many_examples_as_it_says(rate: float, confidence: float) -> None:
    fewest = next(n for n in range(1, 2000) if (1 - rate) ** n <= 1 - confidence + 1e-12)
    with pytest.raises(NotEnoughData, match=f"at least {fewest} "):
        threshold_for_review_rate(np.arange(fewest - 1.0), rate, confidence)
    assert threshold_for_review_rate(np.arange(float(fewest)), rate, confidence).review_rate == 0


def test_the_score_that_asks_is_the_score_that_defers() -> None:
    rng = np.random.default_rng(0)
    proba = rng.dirichlet([0.2, 0.2, 0.2], size=500)
    labels = np.array([rng.choice(3, p=p) for p in proba])
    found = threshold_for_error(margin(proba), proba.argmax(axis=1) == labels, 0.1, score="margin.v1")
    fresh = rng.dirichlet([0.2, 0.2, 0.2], size=5000)
    keep = ~found.defer(margin(fresh))
    assert 0.3 < keep.mean() < 1
    assert (1 - fresh.max(axis=1))[keep].mean() <= 0.1
    assert found.score == "margin.v1"
    assert "at most 10.0% are wrong" in found.sentence


def test_sets_hold_the_truth_as_often_as_promised() -> None:
    """The coverage over samples of n is Beta(k, n + 1 - k) (Vovk 2012): its mean is k / (n + 1), at least 1 - error."""
    rng, n, error, covered = np.random.default_rng(1), 99, 0.1, []
    for _ in range(300):
        proba = rng.dirichlet(np.ones(4), size=n + 200)
        labels = (proba.cumsum(axis=1) > rng.random((n + 200, 1))).argmax(axis=1)
        q = conformal_quantile(proba[:n], labels[:n], error)
        covered.append(prediction_sets(proba[n:], q)[np.arange(200), labels[n:]].mean())
    assert np.mean(covered) == pytest.approx(0.9, abs=0.01)


@given(st.integers(2, 60), st.floats(0.05, 0.9), st.integers(0, 2**32 - 1))
def test_the_quantile_covers_its_own_sample(n: int, error: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    proba, labels = rng.dirichlet(np.ones(3), size=n), rng.integers(0, 3, n)
    if math.ceil((n + 1) * (1 - error)) > n:
        with pytest.raises(NotEnoughData, match="at least"):
            conformal_quantile(proba, labels, error)
        return
    q = conformal_quantile(proba, labels, error)
    assert prediction_sets(proba, q)[np.arange(n), labels].mean() >= 1 - error
    assert (prediction_sets(proba, q) <= prediction_sets(proba, min(q + 0.1, 1.0))).all()


shares = st.floats(0, 1)
maybe = st.none() | shares


@given(
    st.builds(
        Deferral,
        threshold=st.floats(allow_nan=False),
        review_rate=shares,
        review_low=shares,
        review_high=shares,
        confidence=shares,
        n=st.integers(1, 10**9),
        max_error=maybe,
        max_review_rate=maybe,
        score=st.text(),
    )
)
def test_it_travels_as_json(deferral: Deferral) -> None:
    text = json.dumps(deferral.to_plain(), allow_nan=False)
    assert Deferral.from_plain(json.loads(text)) == deferral


PLAIN: dict[str, Any] = Deferral(0.5, 0.1, 0.0, 0.2, 0.95, 100).to_plain()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": "high"}, "cannot be read"),
        ({"threshold": None}, "cannot be read"),
        ({"threshold": math.nan}, "not a number"),
        ({"n": 0}, "of 0"),
        ({"n": 1.5}, "cannot be read"),
        ({"max_error": 2.0}, "shares"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_damaged_one_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Deferral.from_plain(PLAIN | change)
    with pytest.raises(UsageError, match="cannot be read"):
        Deferral.from_plain({"threshold": 0.5})


X, RIGHT = np.linspace(0, 1, 100), np.ones(100, dtype=bool)
PROBA, LABELS = np.full((20, 2), 0.5), np.zeros(20, dtype=int)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: threshold_for_error([], []), NotEnoughData, "no scores"),
        (lambda: threshold_for_error(X, RIGHT[:-1]), UsageError, "for 100 scores"),
        (lambda: threshold_for_error(X[:, None], RIGHT), UsageError, "scores of shape"),
        (lambda: threshold_for_error(X, X), UsageError, "true or false"),
        (lambda: threshold_for_error(np.where(X > 0.5, np.nan, X), RIGHT), UsageError, "NaN"),
        (lambda: threshold_for_error(X, RIGHT, error=0), UsageError, "an error of 0"),
        (lambda: threshold_for_error(X, RIGHT, confidence=95), UsageError, "a confidence of 95"),
        (lambda: threshold_for_review_rate(X, rate=1.0), UsageError, "a review rate of 1"),
        (lambda: threshold_for_review_rate([], rate=0.5), NotEnoughData, "no scores"),
        (lambda: threshold_for_review_rate(np.full(100, np.inf), 0.5), UsageError, "infinity"),
        (lambda: conformal_quantile(PROBA, LABELS, 0.01), NotEnoughData, "at least 99"),
        (lambda: conformal_quantile(PROBA, LABELS, 1.5), UsageError, "an error of 1.5"),
        (lambda: conformal_quantile(PROBA, LABELS + 2), UsageError, "label"),
        (lambda: prediction_sets(PROBA, 1.5), UsageError, "quantile of 1.5"),
        (lambda: prediction_sets(PROBA * 2, 0.5), UsageError, "sum to 2"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
