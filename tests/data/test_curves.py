"""Learning curves: the intervals cover what they promise, on power laws and on real digits; verdicts err rarely."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, curve_fit

from trilobe.data.curves import Curve, compare_arms, fit_curve, plan, saving, worth
from trilobe.errors import NotEnoughData, UsageError

ROUNDS = np.array([20.0, 40, 80, 160])


def power_law(n: np.ndarray | float, a: float, first: float, c: float) -> np.ndarray:
    """From ``first`` at 20 answers to the limit ``a``."""
    return np.asarray(a - (a - first) * (np.asarray(n, dtype=float) / 20) ** -c)


def random_law(rng: np.random.Generator) -> tuple[float, float, float]:
    a = rng.uniform(0.6, 1)
    return a, rng.uniform(0.1, 0.9) * a, rng.uniform(0.2, 1.2)


@pytest.mark.parametrize("same_examples", [True, False])
@pytest.mark.parametrize("n_test", [50, 1000])
def test_intervals_cover_the_truth_beyond_the_data(same_examples: bool, n_test: int) -> None:
    """At twice the answers at least 90% of 95% intervals hold the truth; so they do for the answers to a target."""
    rng, repeats, covered, reached, gains = np.random.default_rng(n_test), 80, 0, 0, 0
    for _ in range(repeats):
        law = random_law(rng)
        truth = power_law(ROUNDS, *law)
        if same_examples:  # all scores are off by the same draw of examples, and scatter a little
            scores = truth + rng.normal() * np.sqrt(truth * (1 - truth) / n_test) + rng.normal(0, 0.01, 4)
        else:
            scores = rng.binomial(n_test, truth) / n_test
        curve = fit_curve(ROUNDS, scores.clip(0, 1), n_test)
        _, low, high = curve.predict(320)
        covered += low <= power_law(320, *law) <= high
        _, low, high = curve.answers_for(float(power_law(240, *law)))
        reached += low <= 240 <= high
        gain = worth(curve, 160, 80)
        gains += gain.low <= power_law(240, *law) - power_law(160, *law) <= gain.high
    assert min(covered, reached, gains) >= 0.9 * repeats


def test_precise_scores_give_a_narrow_interval_around_the_least_squares_curve() -> None:
    """Oracle: scipy's curve_fit, where so many examples were scored that the prior says nothing."""
    sizes = np.array([10.0, 20, 40, 80, 160, 320])
    scores = power_law(sizes, 0.9, 0.6, 0.7) + np.array([1, -1, 1, -1, 1, -1]) * 1e-3
    (a, b, c), _ = curve_fit(lambda n, a, b, c: a - b * n**-c, sizes, scores, p0=(0.9, 1, 0.5))
    curve = fit_curve(sizes, scores, stderr=1e-3)
    for n in (50, 640, 1280):
        middle, low, high = curve.predict(n)
        assert middle == pytest.approx(a - b * n**-c, abs=3e-3)
        assert low < a - b * n**-c < high
        assert high - low < 0.02


def test_a_real_curve_is_foretold() -> None:
    """Digits of scikit-learn, logistic regression: the score on 947 others after 2 and 4 times the answers."""
    datasets, linear_model = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.linear_model")
    x, y = datasets.load_digits(return_X_y=True)
    x = x / 16
    inside = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(x))
        pool, others = order[:700], order[700:]

        def score(n: int, on: np.ndarray, pool: np.ndarray = pool) -> float:
            model = linear_model.LogisticRegression(max_iter=500).fit(x[pool[:n]], y[pool[:n]])
            return float(model.score(x[on], y[on]))

        curve = fit_curve(ROUNDS, [score(int(n), others[:150]) for n in ROUNDS], n_test=150)
        for n in (320, 640):
            _, low, high = curve.predict(n)
            inside.append(low <= score(n, others[150:]) <= high)
    assert sum(inside) >= 7  # of 8


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(0, 30)), min_size=3, max_size=8, unique_by=lambda p: p[0]),
    st.integers(1, 10_000),
)
def test_whatever_comes_the_curves_rise_within_bounds(points: list[tuple[int, int]], n: int) -> None:
    sizes = [p[0] for p in points]
    if max(sizes) < 2 * min(sizes):
        sizes[0] = 3 * max(sizes)
    curve = fit_curve(sizes, [p[1] / 30 for p in points], n_test=30)
    assert (curve.at(n) <= curve.at(n + 50)).all()
    middle, low, high = curve.predict(n)
    assert 0 <= low <= middle <= high <= 1
    needed = curve.answers_for(0.7)
    assert 1 <= needed[1] <= needed[0] <= needed[2]


def test_answers_for_a_target_invert_the_prediction() -> None:
    curve = fit_curve(ROUNDS, power_law(ROUNDS, 0.9, 0.5, 0.8), stderr=1e-3)
    middle, _, _ = curve.answers_for(0.85)
    want = brentq(lambda n: float(power_law(n, 0.9, 0.5, 0.8)) - 0.85, 20, 10_000)
    assert middle == pytest.approx(want, rel=0.03)
    assert curve.predict(middle)[0] == pytest.approx(0.85, abs=1e-3)


def test_one_score_that_is_off_widens_the_interval_and_does_not_break_it() -> None:
    sizes = np.arange(20, 201, 20.0)
    scores = power_law(sizes, 0.9, 0.5, 0.8)
    spoiled = scores.copy()
    spoiled[4] -= 0.25
    clean, off = fit_curve(sizes, scores, 500).predict(400), fit_curve(sizes, spoiled, 500).predict(400)
    assert off[2] - off[1] > 1.3 * (clean[2] - clean[1])
    assert off[1] <= power_law(400, 0.9, 0.5, 0.8) <= off[2]


def test_a_plan_says_what_it_takes_and_what_it_cannot_tell() -> None:
    sure = fit_curve(ROUNDS, power_law(ROUNDS, 0.9, 0.5, 0.8), stderr=1e-3)
    told = plan(sure, 0.85, 160, seconds=3.0)
    assert told.verdict == "go on"
    assert told.low <= told.figure <= told.high < math.inf
    assert "more answers, " in told.sentence
    assert "minutes" in told.sentence
    assert plan(sure, 0.6, 160).figure == 0
    assert "is reached" in plan(sure, 0.6, 160).sentence
    assert "out of reach" in plan(sure, 0.97, 160).sentence
    vague = plan(fit_curve(ROUNDS, power_law(ROUNDS, 0.9, 0.5, 0.8), n_test=50), 0.88, 160)
    assert vague.verdict == "cannot tell yet"
    assert vague.high == math.inf
    assert "no number of answers may be enough" in vague.sentence


def test_labeling_stops_on_a_flat_curve_and_not_on_a_steep_one() -> None:
    sizes = np.array([50.0, 100, 200, 400, 800])
    flat = fit_curve(sizes, [0.902, 0.903, 0.902, 0.903, 0.903], 2000)
    assert worth(flat, 800, 100).verdict == "stop"
    assert "will not pay" in worth(flat, 800, 100).sentence
    steep = fit_curve(sizes, [0.3, 0.45, 0.58, 0.68, 0.77], 2000)
    assert worth(steep, 800, 400).verdict == "go on"
    assert worth(fit_curve([20, 40, 80], [0.5, 0.6, 0.68], 40), 80, 20).verdict == "cannot tell yet"


def test_stopping_is_rarely_wrong() -> None:
    """Curves that would still gain more than asked for are stopped in few of the cases."""
    rng, wrong = np.random.default_rng(3), 0
    for _ in range(60):
        a, c = rng.uniform(0.7, 1), rng.uniform(0.2, 1)
        first = a - 0.012 / ((ROUNDS[-1] / 20) ** -c - ((ROUNDS[-1] + 160) / 20) ** -c)  # gains 0.012 with 160 more
        scores = rng.binomial(1000, np.clip(power_law(ROUNDS, a, first, c), 0, 1)) / 1000
        wrong += worth(fit_curve(ROUNDS, scores, 1000), 160, 160, least=0.01).verdict == "stop"
    assert wrong <= 5


def test_the_saving_is_the_ratio_of_answers_with_its_interval() -> None:
    """Choosing needs a third of the answers: found with a precise random curve, open with one of 30 answers."""
    sizes = np.array([25.0, 50, 100, 200, 400])
    slow = fit_curve(sizes, power_law(sizes, 0.95, 0.4, 0.6), stderr=2e-3)
    fast = fit_curve(sizes, power_law(3 * sizes, 0.95, 0.4, 0.6), stderr=2e-3)
    for reached in (fast, float(power_law(360, 0.95, 0.4, 0.6))):
        told = saving(slow, reached, 120)
        assert told.low <= 3 <= told.high
        assert told.verdict == "choosing helps"
    assert saving(fast, slow, 120).verdict == "random is better here"
    few = np.array([5.0, 10, 20, 30])
    told = saving(fit_curve(few, [0.35, 0.42, 0.5, 0.54], n_test=200), 0.7, 300)
    assert told.verdict == "cannot tell yet"
    assert told.high > 3
    assert "known up to 30 answers only" in told.sentence


def test_the_saving_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(60):
        law = random_law(rng)
        scores = rng.binomial(300, power_law(ROUNDS, *law)) / 300
        told = saving(fit_curve(ROUNDS, scores, 300), rng.binomial(300, power_law(300, *law)) / 300, 150)
        covered += told.low <= 2 <= told.high
    assert covered >= 54


def nearest_mean(rng: np.random.Generator, n: int, parts: int, wide: float, n_test: np.ndarray) -> np.ndarray:
    """Right or wrong, ``(parts, n_test)``: means of two groups of Gaussians learned without one part of n answers each.

    The two groups stand at -1 and 1 on the first axis; ``wide`` is how widely the answers scatter.
    """
    y = np.arange(n) % 2
    x = rng.normal(0, wide, (n, 10))
    x[:, 0] += 2 * y - 1
    part = rng.permutation(n) % parts
    right = []
    for j in range(parts):
        low, high = (x[(part != j) & (y == k)].mean(axis=0) for k in (0, 1))
        right.append(((n_test[:, 1:] - (low + high) / 2) @ (high - low) > 0) == (n_test[:, 0] > 0))
    return np.array(right)


def examples(rng: np.random.Generator, n: int) -> np.ndarray:
    """``(n, 11)``: the group, and ten features."""
    group = rng.integers(0, 2, n)
    x = rng.normal(0, 1, (n, 10))
    x[:, 0] += 2 * group - 1
    return np.column_stack([group, x])


def test_two_random_arms_are_rarely_told_apart() -> None:
    """The luck of 20 answers is no advantage of the arm, however many examples score it.

    Beside it what McNemar's test would do, which compares two models and not two ways of asking.
    """
    rng, repeats, wrong, naive = np.random.default_rng(5), 250, 0, 0
    for _ in range(repeats):
        test = examples(rng, 2000)
        a, b = (nearest_mean(rng, 20, 10, 1.0, test) for _ in range(2))
        wrong += compare_arms(a, b).verdict != "cannot tell yet"
        only_a, only_b = int((a[0] & ~b[0]).sum()), int((b[0] & ~a[0]).sum())
        naive += abs(only_a - only_b) > 1.96 * math.sqrt(max(only_a + only_b, 1))
    assert wrong <= 0.08 * repeats
    assert naive >= 0.5 * repeats


def test_a_better_arm_is_found_and_a_worse_one_too() -> None:
    rng, found = np.random.default_rng(6), []
    for _ in range(20):
        test = examples(rng, 500)
        telling, noisy = nearest_mean(rng, 100, 10, 0.3, test), nearest_mean(rng, 20, 10, 5.0, test)
        found += [compare_arms(telling, noisy).verdict, compare_arms(noisy, telling).verdict]
    better, worse = found[::2], found[1::2]
    assert better.count("choosing helps") >= 10
    assert "random is better here" not in better
    assert worse.count("random is better here") == better.count("choosing helps")


@given(st.integers(2, 8), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_arms_are_compared_alike_from_both_sides(parts: int, n_test: int, seed: int) -> None:
    a, b = np.random.default_rng(seed).random((2, parts, n_test)) < 0.7
    there, back = compare_arms(a, b), compare_arms(b, a)
    assert there.figure == pytest.approx(a.mean() - b.mean())
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert -1 <= there.low <= there.figure <= there.high <= 1


def test_the_variance_of_equal_models_is_that_of_the_paired_difference() -> None:
    """Closed form: with g equal models only the examples vary, and the interval is that of a paired t-test."""
    from scipy import stats

    rng = np.random.default_rng(0)
    a, b = rng.random(400) < 0.8, rng.random(400) < 0.7
    told = compare_arms(np.tile(a, (5, 1)), np.tile(b, (5, 1)))
    want = stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval()
    assert (told.low, told.high) == pytest.approx((want.low, want.high), abs=2e-3)


CURVE: Curve = fit_curve([10, 20, 40], [0.5, 0.6, 0.7], n_test=100)
ARM = np.ones((3, 4), dtype=bool)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: fit_curve([10, 20], [0.5, 0.6], 100), NotEnoughData, "scores at 2 sizes, 10 to 20 answers"),
        (lambda: fit_curve([], [], 100), NotEnoughData, "scores at 0 sizes"),
        (lambda: fit_curve([10, 11, 12], [0.5, 0.6, 0.6], 100), NotEnoughData, "at least twice the smallest"),
        (lambda: fit_curve([1, 2, 4], [0.5, 0.6], 100), UsageError, "shape"),
        (lambda: fit_curve([0, 2, 4], [0.5, 0.6, 0.7], 100), UsageError, "positive numbers of answers"),
        (lambda: fit_curve([1, 2, math.inf], [0.5, 0.6, 0.7], 100), UsageError, "positive numbers of answers"),
        (lambda: fit_curve([1, 2, 4], [0.5, math.nan, 0.7], 100), UsageError, "numbers from 0 to 1"),
        (lambda: fit_curve([1, 2, 4], [50, 60, 70], 100), UsageError, "numbers from 0 to 1"),
        (lambda: fit_curve([1, 2, 4], [0.5, 0.6, 0.7]), UsageError, "neither n_test nor stderr"),
        (lambda: fit_curve([1, 2, 4], [0.5, 0.6, 0.7], 10, 0.1), UsageError, "both n_test and stderr"),
        (lambda: fit_curve([1, 2, 4], [0.5, 0.6, 0.7], 0), UsageError, "on 0 examples"),
        (lambda: fit_curve([1, 2, 4], [0.5, 0.6, 0.7], stderr=[0.1, 0.0, 0.1]), UsageError, "standard errors"),
        (lambda: fit_curve([1, 2, 4], [0.5, 0.6, 0.7], stderr=[0.1, 0.1]), UsageError, "standard errors"),
        (lambda: CURVE.predict(0), UsageError, "0 answers"),
        (lambda: CURVE.predict(10, level=95), UsageError, "level 95"),
        (lambda: CURVE.answers_for(1.0), UsageError, "a target score of 1"),
        (lambda: worth(CURVE, 40, 0), UsageError, "0 further answers"),
        (lambda: worth(CURVE, 40, 10, least=0.0), UsageError, "a least gain of 0"),
        (lambda: saving(CURVE, 70.0, 40), UsageError, "a score of 70"),
        (lambda: saving(CURVE, 0.7, math.nan), UsageError, "nan answers"),  # type: ignore[arg-type]
        (lambda: compare_arms(ARM, ARM[:2]), UsageError, "arms of shapes"),
        (lambda: compare_arms(ARM[0], ARM[0]), UsageError, "models by examples"),
        (lambda: compare_arms(ARM * 0.5, ARM), UsageError, "true and false"),
        (lambda: compare_arms(ARM[:1], ARM[:1]), NotEnoughData, "1 models an arm"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()  # type: ignore[operator]
