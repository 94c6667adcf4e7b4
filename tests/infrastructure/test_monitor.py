"""The monitor keeps its false-alarm rate on healthy streams, finds what it says it finds, and says it with numbers."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trilobe.errors import DataError, NotEnoughData, TrilobeError, UsageError
from trilobe.infrastructure.monitor import Baseline, Window, false_alarm_rate, find
from trilobe.infrastructure.monitor.exact import chi2_statistic, fisher_rise, holm, permutation_chi2
from trilobe.types import Capture, FloatArray, LabelSpace

ZIPF = 1 / np.arange(1, 44)
STREAMS = {
    "10 even classes": np.full(10, 0.1),
    "43 sparse classes": ZIPF / ZIPF.sum(),
    "one class is 70%": np.array([0.7, 0.1, 0.05, *[0.15 / 7] * 7]),
    "two classes, 50% each": np.array([0.5, 0.5]),
}


def predictions(rng: np.random.Generator, shares: FloatArray, n: int, doubt: float = 1.0) -> FloatArray:
    """``n`` replies of which each predicts its class with a confidence of its own; more ``doubt`` lowers them all."""
    k = len(shares)
    confidence = 0.51 + 0.48 * rng.beta(6, doubt, n)
    proba = np.repeat((1 - confidence)[:, None] / (k - 1), k, axis=1)
    proba[np.arange(n), rng.choice(k, n, p=shares)] = confidence
    return proba


def raised(shares: FloatArray, c: int, share: float) -> FloatArray:
    """The same mix with class ``c`` at ``share``."""
    out: FloatArray = shares * (1 - share) / (1 - shares[c])
    out[c] = share
    return out


def captured(proba: FloatArray) -> list[Capture]:
    return [Capture(f"c{i}", "signs", "b1", 100.0 + i, np.zeros(1, np.uint8), p) for i, p in enumerate(proba)]


def space_of(k: int) -> LabelSpace:
    return LabelSpace(tuple(str(c) for c in range(k)))


def look(baseline: FloatArray, window: FloatArray, **settings: float) -> Window:
    return find(Baseline.from_proba(baseline), captured(window), space_of(baseline.shape[1]), **settings)  # type: ignore[arg-type]


def kinds(window: Window) -> set[str]:
    return {f.kind for f in window.findings}


# The level ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(("n", "m"), [(60, 30), (800, 100), (300, 600)])
def test_fresh_baselines_and_windows_keep_the_level(name: str, n: int, m: int) -> None:
    rng, times, alpha = np.random.default_rng(7), 150, 0.05
    alarms = 0
    for seed in range(times):
        data = predictions(rng, STREAMS[name], n + m)
        alarms += look(data[:n], data[n:], alpha=alpha, seed=seed, n_permutations=499).verdict == "alarm"
    assert alarms <= stats.binom.ppf(0.9999, times, alpha)


@pytest.mark.parametrize("name", STREAMS)
def test_false_alarm_rate_on_splits(name: str) -> None:
    proba = predictions(np.random.default_rng(3), STREAMS[name], 1_000)
    for alpha in (0.01, 0.1):
        rate, low, high = false_alarm_rate(proba, n_windows=300, window=100, alpha=alpha, n_permutations=999)
        assert low <= rate <= high
        assert rate <= stats.binom.ppf(0.9999, 300, alpha) / 300


def test_a_share_that_every_class_exceeds_keeps_the_level() -> None:
    """With a threshold near zero the rule looks at all classes at once, and must pay for it."""
    proba = predictions(np.random.default_rng(3), STREAMS["43 sparse classes"], 1_000)
    rate, _, _ = false_alarm_rate(proba, n_windows=200, window=100, alpha=0.1, share=1e-6, n_permutations=199)
    assert rate <= stats.binom.ppf(0.9999, 200, 0.1) / 200


def test_the_level_is_spent_not_avoided() -> None:
    """A monitor that never alarms keeps every level; this one alarms on clean windows when it is allowed to."""
    proba = predictions(np.random.default_rng(3), STREAMS["10 even classes"], 1_000)
    assert false_alarm_rate(proba, n_windows=200, alpha=0.5, n_permutations=199)[1] > 0.05


def test_saturated_confidences_keep_the_level() -> None:
    """Nearly every confidence is exactly 1: ties must not count as low."""
    rng = np.random.default_rng(0)
    proba = np.eye(4)[rng.integers(0, 4, 900)]
    proba[rng.random(900) < 0.04] = [0.6, 0.2, 0.1, 0.1]
    rate, _, _ = false_alarm_rate(proba, n_windows=200, window=100, alpha=0.05, n_permutations=999)
    assert rate <= stats.binom.ppf(0.9999, 200, 0.05) / 200


def test_an_imbalanced_but_stable_stream_stays_quiet_and_a_change_of_it_does_not() -> None:
    rng, shares = np.random.default_rng(1), STREAMS["one class is 70%"]
    baseline = predictions(rng, shares, 2_000)
    assert look(baseline, predictions(rng, shares, 400)).verdict == "ok"
    assert "class_share" in kinds(look(baseline, predictions(rng, raised(shares, 0, 0.9), 400)))


# The power ----------------------------------------------------------------------------------------------------------


def test_the_attack_is_always_found() -> None:
    """One class rises to 80% of the predictions, as in an attack that aims at it."""
    rng = np.random.default_rng(2)
    for name in ("10 even classes", "43 sparse classes"):
        shares = STREAMS[name]
        for m in (50, 200, 400):
            window = predictions(rng, raised(shares, 5, 0.8), m)
            result = look(predictions(rng, shares, 2_000), window, alpha=0.001)
            assert {"class_share", "class_drift"} <= kinds(result)
            share = next(f for f in result.findings if f.kind == "class_share")
            assert share.detail == {"class": "5"}
            assert share.low < share.figure < share.high
            assert share.capture_ids and {window[int(i[1:])].argmax() for i in share.capture_ids} == {5}
            assert share.message.startswith("class '5' is ") and share.message.endswith("p < 0.0001")


@pytest.mark.parametrize(("share", "m", "at_least"), [(0.10, 500, 0.9), (0.20, 200, 0.9), (0.10, 200, 0.3)])
def test_a_class_that_rises_from_3_percent(share: float, m: int, at_least: float) -> None:
    rng, shares = np.random.default_rng(4), raised(STREAMS["43 sparse classes"], 9, 0.033)
    found = 0
    for seed in range(30):
        window = predictions(rng, raised(shares, 9, share), m)
        result = look(predictions(rng, shares, 5_000), window, seed=seed, n_permutations=999)
        found += "class_drift" in kinds(result)
    assert found / 30 >= at_least


def test_low_confidence_alone_is_found_and_named() -> None:
    rng, shares = np.random.default_rng(5), STREAMS["10 even classes"]
    baseline, window = predictions(rng, shares, 1_000), predictions(rng, shares, 200, doubt=3.0)
    result = look(baseline, window)
    assert kinds(result) == {"low_confidence"}
    (finding,) = result.findings
    confidences = [window[int(i[1:])].max() for i in finding.capture_ids]
    assert confidences == sorted(confidences)
    assert max(confidences) < finding.detail["under"]
    assert len(confidences) == round(finding.figure * 200)
    assert finding.expected == 0.1
    assert finding.created_at == 299.0


def test_higher_confidence_is_no_finding() -> None:
    rng, shares = np.random.default_rng(5), STREAMS["10 even classes"]
    assert look(predictions(rng, shares, 1_000, doubt=3.0), predictions(rng, shares, 400)).verdict == "ok"


def test_drift_says_which_classes_and_how_far() -> None:
    rng, shares = np.random.default_rng(6), STREAMS["10 even classes"]
    there = raised(raised(shares, 2, 0.4), 7, 0.2)
    window = predictions(rng, there, 500)
    result = look(predictions(rng, shares, 3_000), window)
    (finding,) = [f for f in result.findings if f.kind == "class_drift"]
    truth = np.abs(there - shares).sum() / 2
    assert finding.low <= truth <= finding.high
    assert finding.low <= finding.figure <= finding.high
    assert finding.expected < finding.figure / 3
    changes = {c["class"]: c for c in finding.detail["changes"]}
    for c in ("2", "7"):
        assert changes[c]["low"] <= there[int(c)] <= changes[c]["high"]
        assert changes[c]["share"] > changes[c]["expected"]
    first = [int(window[int(i[1:])].argmax()) for i in finding.capture_ids]
    assert list(dict.fromkeys(first)) == [2, 7]
    json.dumps(finding.detail)


def test_a_vanished_class_names_the_classes_that_took_its_place() -> None:
    rng = np.random.default_rng(8)
    result = look(predictions(rng, np.full(4, 0.25), 2_000), predictions(rng, np.array([0, 1, 1, 1]) / 3, 400))
    (finding,) = result.findings
    assert finding.detail["changes"][0]["class"] == "0"
    assert finding.capture_ids


def test_limits_of_the_distance_cover_the_truth() -> None:
    rng, shares = np.random.default_rng(9), STREAMS["10 even classes"]
    there = raised(shares, 3, 0.5)
    for seed in range(30):
        result = look(predictions(rng, shares, 300), predictions(rng, there, 100), seed=seed, n_permutations=999)
        (finding,) = [f for f in result.findings if f.kind == "class_drift"]
        assert finding.low <= 0.4 <= finding.high


# The oracles --------------------------------------------------------------------------------------------------------

counts = st.integers(0, 60)


@given(a=counts, b=counts, c=counts, d=counts)
def test_fisher_is_scipys(a: int, b: int, c: int, d: int) -> None:
    n, m = a + c + 1, b + d + 1
    expected = stats.fisher_exact([[b, a], [m - b, n - a]], alternative="greater").pvalue
    assert fisher_rise(a, n, b, m) == pytest.approx(expected, rel=1e-7, abs=1e-300)


@given(n=st.integers(10, 200), m=st.integers(1, 80), data=st.data())
def test_low_confidence_is_the_negative_hypergeometric_tail(n: int, m: int, data: st.DataObject) -> None:
    """How many of the window fall under the k-th of the baseline: scipy draws until the k-th baseline item."""
    k, low = n // 10 + 1, data.draw(st.integers(0, m))
    expected = stats.nhypergeom.sf(low - 1, n + m, m, k) if low else 1.0
    assert fisher_rise(n // 10, n, low, m) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(before=st.lists(counts, min_size=2, max_size=8), data=st.data())
def test_chi2_is_scipys(before: list[int], data: st.DataObject) -> None:
    size = len(before)
    now = np.array(data.draw(st.lists(counts, min_size=size, max_size=size)))
    table = np.array([before, now])
    if min(table.sum(axis=1)) == 0:
        return
    expected = stats.chi2_contingency(table[:, table.any(axis=0)], correction=False).statistic
    assert chi2_statistic(table.sum(axis=0), now) == pytest.approx(expected, abs=1e-9)


def exact_p(before: list[int], now: list[int]) -> float:
    """Every table with these margins, added up: the p-value that permutations only estimate."""
    pooled, m = np.add(before, now), sum(now)
    observed = float(chi2_statistic(pooled, np.array(now)))
    total = 0.0
    for table in itertools.product(*(range(t + 1) for t in pooled)):
        if sum(table) == m and float(chi2_statistic(pooled, np.array(table))) >= observed - 1e-9:
            total += float(stats.multivariate_hypergeom.pmf(table, pooled, m))
    return total


@pytest.mark.parametrize(
    ("before", "now"), [([6, 5, 4], [1, 2, 5]), ([9, 1, 0], [2, 2, 2]), ([5, 5], [5, 5]), ([8, 4, 2, 1], [0, 1, 1, 3])]
)
def test_permutation_p_is_the_enumerated_one(before: list[int], now: list[int]) -> None:
    truth = exact_p(before, now)
    draws = [permutation_chi2(np.array(before), np.array(now), 2_000, np.random.default_rng(s))[0] for s in range(40)]
    # One p-value stopped at 20 has a relative error of about 1 / sqrt(20); 40 of them average it out.
    assert np.mean(draws) == pytest.approx(truth, rel=0.2)


def test_permutation_p_is_the_slow_shuffle() -> None:
    rng = np.random.default_rng(0)
    before, now = rng.multinomial(400, ZIPF / ZIPF.sum()), rng.multinomial(60, np.full(43, 1 / 43))
    now = (now * 0.2).astype(int) + rng.multinomial(40, ZIPF / ZIPF.sum())
    items, m = np.repeat(np.arange(43), before + now), now.sum()
    table = np.array([before, now])[:, (before + now) > 0]
    observed = stats.chi2_contingency(table, correction=False).statistic
    hits, distances = 0, []
    for _ in range(3_000):
        shuffled = np.bincount(rng.permutation(items)[:m], minlength=43)
        rest = before + now - shuffled
        hits += chi2_statistic(before + now, shuffled) >= observed - 1e-9
        distances.append(np.abs(shuffled / m - rest / rest.sum()).sum() / 2)
    fast = [permutation_chi2(before, now, 3_000, np.random.default_rng(s)) for s in range(30)]
    assert np.mean([p for p, _ in fast]) == pytest.approx(hits / 3_000, rel=0.25)
    assert np.mean([d for _, d in fast]) == pytest.approx(np.mean(distances), rel=0.02)


def test_early_stopping_keeps_p_values_exact() -> None:
    """P(p <= u) <= u for clean samples, at small u where alarms are decided and at large u."""
    rng, times = np.random.default_rng(1), 2_000
    shares = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    p = [permutation_chi2(rng.multinomial(80, shares), rng.multinomial(40, shares), 199, rng)[0] for _ in range(times)]
    for u in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(np.array(p) <= u) <= stats.binom.ppf(0.9999, times, u) / times
    assert np.mean(p) < 0.56


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_holm_rejects_as_the_step_down_procedure(values: list[float]) -> None:
    names = ("class_share", "low_confidence", "class_drift")
    corrected = holm(dict(zip(names, values, strict=True)))  # type: ignore[arg-type]
    for alpha in (0.01, 0.05, 0.3):
        rejected, ranked = set(), sorted(zip(values, names, strict=True))
        for left, (p, name) in zip((3, 2, 1), ranked, strict=True):
            if p * left > alpha:
                break
            rejected.add(name)
        assert {k for k, p in corrected.items() if p <= alpha} == rejected


# What is stored, and what comes in ----------------------------------------------------------------------------------


@st.composite
def probabilities(draw: st.DrawFn) -> FloatArray:
    shape = draw(st.integers(1, 40)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    proba = rng.dirichlet(np.full(shape[1], draw(st.sampled_from([0.01, 0.3, 1.0, 50.0]))), shape[0])
    return proba.astype(draw(st.sampled_from([np.float32, np.float64])))


@given(probabilities())
def test_baseline_survives_json(proba: FloatArray) -> None:
    baseline = Baseline.from_proba(proba)
    again = Baseline.from_json(json.loads(json.dumps(baseline.to_json(), allow_nan=False)))
    assert again == baseline
    assert baseline.n == len(proba) == sum(baseline.confidence_counts)


@given(probabilities())
def test_baseline_counts_what_it_says(proba: FloatArray) -> None:
    baseline, confidence = Baseline.from_proba(proba), proba.max(axis=1)
    assert baseline.class_counts == tuple((proba.argmax(axis=1) == c).sum() for c in range(proba.shape[1]))
    assert set(baseline.confidence_edges) <= set(confidence.tolist())
    assert baseline.confidence_counts[0] == (confidence < baseline.confidence_edges[0]).sum()
    assert baseline.confidence_counts[-1] == (confidence >= baseline.confidence_edges[-1]).sum()


@pytest.mark.parametrize(
    ("proba", "error", "words"),
    [
        (np.empty((0, 3)), NotEnoughData, "no held-out predictions"),
        ([], NotEnoughData, "no held-out predictions"),
        ([0.5, 0.5], DataError, r"shape \(2,\)"),
        ([[1.0], [1.0]], DataError, r"shape \(2, 1\)"),
        ([[0.5, 0.5], [np.nan, 1.0]], DataError, "the first is number 1"),
        ([[np.inf, 0.0]], DataError, "1 of 1"),
        ([[3.0, -2.0]], DataError, "softmax"),
        ([[0.9, 0.9]], DataError, "sum to 1"),
    ],
)
def test_predictions_that_are_none(proba: object, error: type[TrilobeError], words: str) -> None:
    with pytest.raises(error, match=words):
        Baseline.from_proba(proba)  # type: ignore[arg-type]


GOOD = Baseline.from_proba([[0.9, 0.1], [0.2, 0.8]] * 50).to_json()


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "baseline.v2"},
        {"class_counts": [1.5, 2]},
        {"class_counts": [True, 99]},
        {"class_counts": [10, 20]},
        {"class_counts": [-50, 150]},
        {"class_counts": None},
        {"confidence_edges": [0.5] * 8},
        {"confidence_edges": [0.9, 0.5, *[0.9] * 7]},
        {"confidence_edges": ["high"] * 9},
        {"confidence_counts": [0] * 10},
        {"mean_confidence": float("nan")},
    ],
    ids=str,
)
def test_damaged_baselines_are_refused(damage: dict[str, object]) -> None:
    with pytest.raises(DataError, match="baseline"):
        Baseline.from_json(GOOD | damage)


def test_a_missing_key_and_a_wrong_type_are_refused() -> None:
    with pytest.raises(DataError, match="class_counts"):
        Baseline.from_json({k: v for k, v in GOOD.items() if k != "class_counts"})
    with pytest.raises(DataError, match="a list"):
        Baseline.from_json([])  # type: ignore[arg-type]


def test_too_few_captures_give_no_verdict() -> None:
    rng, shares = np.random.default_rng(0), np.full(3, 1 / 3)
    baseline = predictions(rng, shares, 300)
    alarming = predictions(rng, np.array([1.0, 0.0, 0.0]), 29)
    for window in (alarming, alarming[:0]):
        result = look(baseline, window)
        assert (result.verdict, result.findings, result.p_values) == ("too_few", (), {})
        assert f"{len(window)} captures of the 30 needed" in result.message
    assert look(baseline, alarming, min_n=20).verdict == "alarm"


def test_a_quiet_window_says_so_with_its_p_values() -> None:
    rng, shares = np.random.default_rng(0), np.full(3, 1 / 3)
    result = look(predictions(rng, shares, 500), predictions(rng, shares, 100))
    assert result.verdict == "ok"
    assert set(result.p_values) == {"class_share", "low_confidence", "class_drift"}
    assert "100 captures" in result.message


def test_the_same_window_gives_the_same_findings() -> None:
    rng, shares = np.random.default_rng(0), np.full(5, 0.2)
    baseline, window = predictions(rng, shares, 500), predictions(rng, raised(shares, 1, 0.9), 100)
    first = look(baseline, window)
    assert first == look(baseline, window)
    assert len({f.id for f in first.findings}) == len(first.findings) >= 2


def test_captures_that_do_not_belong_together() -> None:
    rng, shares = np.random.default_rng(0), np.full(3, 1 / 3)
    baseline, space = Baseline.from_proba(predictions(rng, shares, 100)), space_of(3)
    captures = captured(predictions(rng, shares, 40))
    with pytest.raises(UsageError, match="2 bundles or endpoints"):
        find(baseline, [*captures[:-1], replace(captures[-1], bundle_id="b2")], space)
    with pytest.raises(UsageError, match="twice"):
        find(baseline, [*captures, captures[0]], space)
    with pytest.raises(UsageError, match="4 classes for a baseline of 3"):
        find(baseline, captures, space_of(4))
    with pytest.raises(DataError, match=r"'c39' has a reply of shape \(2,\)"):
        find(baseline, [*captures[:-1], replace(captures[-1], proba=np.array([0.5, 0.5]))], space)
    with pytest.raises(DataError, match="captured replies"):
        find(baseline, [*captures[:-1], replace(captures[-1], proba=np.full(3, np.nan))], space)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"share": 1.5}, "share"),
        ({"min_n": 0}, "min_n"),
        ({"alpha": 0.01, "n_permutations": 500}, "at least 599"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], words: str) -> None:
    rng, shares = np.random.default_rng(0), np.full(3, 1 / 3)
    with pytest.raises(UsageError, match=words):
        look(predictions(rng, shares, 100), predictions(rng, shares, 40), **settings)


def test_no_room_for_a_window() -> None:
    with pytest.raises(NotEnoughData, match="windows of 100 from 100"):
        false_alarm_rate(np.full((100, 2), 0.5))
