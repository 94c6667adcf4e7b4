"""Small formulas against scipy, and intervals against the coverage they promise."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trilobe.errors import UsageError
from trilobe.statistics import bootstrap_mean, clopper_pearson, softmax, wilson

counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(hnp.arrays(float, (3, 4), elements=st.floats(-1e6, 1e6)), st.floats(0.05, 20))
def test_softmax_is_scipys(logits: np.ndarray, temperature: float) -> None:
    np.testing.assert_allclose(
        softmax(logits, temperature), scipy.special.softmax(logits / temperature, axis=-1), atol=1e-12
    )


def test_softmax_of_single_precision_is_computed_in_double() -> None:
    assert softmax(np.zeros((2, 3), np.float32)).dtype == np.float64


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_and_clopper_pearson_are_scipys(kn: tuple[int, int], level: float) -> None:
    test = scipy.stats.binomtest(*kn)
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        want = test.proportion_ci(level, method=method)
        assert ours(*kn, level) == pytest.approx((want.low, want.high), abs=1e-9)


@pytest.mark.parametrize(("p", "n"), [(0.5, 10), (0.9, 30), (0.99, 200), (0.05, 50)])
def test_coverage(p: float, n: int) -> None:
    """Summed exactly over all outcomes: Clopper-Pearson covers at least 95%, Wilson about."""
    weight = scipy.stats.binom.pmf(np.arange(n + 1), n, p)
    covered = {
        ours: sum(w for k, w in enumerate(weight) if ours(k, n)[0] <= p <= ours(k, n)[1])
        for ours in (wilson, clopper_pearson)
    }
    assert covered[clopper_pearson] >= 0.95 and covered[wilson] > 0.9


def test_nothing_tried_says_nothing() -> None:
    assert wilson(0, 0) == clopper_pearson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_counts_that_are_none(k: int, n: int) -> None:
    for ours in (wilson, clopper_pearson):
        with pytest.raises(UsageError, match=f"{k} successes of {n}"):
            ours(k, n)


def test_bootstrap_is_scipys_within_its_noise() -> None:
    x = np.random.default_rng(0).exponential(size=80)
    want = scipy.stats.bootstrap((x,), np.mean, method="percentile", rng=1, n_resamples=5000).confidence_interval
    assert bootstrap_mean(x) == pytest.approx((want.low, want.high), abs=0.03)
    assert bootstrap_mean(x) == bootstrap_mean(x) != bootstrap_mean(x, seed=1)
    low, high = bootstrap_mean(x, 0.5)
    assert bootstrap_mean(x)[0] < low < high < bootstrap_mean(x)[1]


def test_bootstrap_of_one_value_and_of_none() -> None:
    assert bootstrap_mean([3.0]) == (3.0, 3.0)
    with pytest.raises(UsageError, match="nothing"):
        bootstrap_mean([])
