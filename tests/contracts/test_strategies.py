"""One contract for every way to choose: a new strategy is tested by being in the list."""

from collections.abc import Callable

import numpy as np
import pytest

from trilobe.data.query import SCORES, STRATEGIES, select


def own(proba: np.ndarray) -> np.ndarray:
    """A user's own score."""
    return -(proba**2).sum(axis=1)


def pool(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(k), n), rng.normal(size=(n, 5)).astype(np.float32)


POOLS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "ordinary": lambda: pool(60, 4),
    "one example": lambda: pool(1, 3),
    "one class": lambda: (np.ones((20, 1)), pool(20, 2)[1]),
    "all tied": lambda: (np.full((30, 3), 1 / 3), pool(30, 3)[1]),
    "certain": lambda: (np.eye(3)[np.arange(30) % 3], pool(30, 3)[1]),
    "identical rows": lambda: (np.tile([0.6, 0.4], (25, 1)), np.ones((25, 3))),
    "few distinct rows": lambda: (np.tile([0.6, 0.4], (25, 1)), np.eye(5)[np.arange(25) % 5]),
    "far apart": lambda: (pool(20, 3)[0], pool(20, 3)[1] * 1e6),
    "float32": lambda: (pool(20, 3)[0].astype(np.float32), pool(20, 3)[1]),
}


@pytest.mark.parametrize("strategy", [*STRATEGIES, own], ids=lambda s: getattr(s, "__name__", s))
@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("known", ["model and features", "model", "features"])
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_contract(strategy: str, kind: str, known: str, n: int) -> None:
    proba, x = POOLS[kind]()
    given = (proba if "model" in known else None, x if "features" in known else None)
    before = [None if a is None else a.copy() for a in given]
    chosen = select(strategy, n, *given, seed=3)
    want = min(n, len(proba))
    assert chosen.index.shape == chosen.score.shape == (want,)
    assert len(set(chosen.index.tolist())) == want, "an example is asked about once"
    assert chosen.index.dtype.kind == "i" and ((chosen.index >= 0) & (chosen.index < len(proba))).all()
    assert np.isfinite(chosen.score).all() and (np.diff(chosen.score) <= 1e-12).all(), "best first"
    assert chosen.strategy and chosen.reason
    again = select(strategy, n, *given, seed=3)
    assert again.index.tolist() == chosen.index.tolist() and again.score.tolist() == chosen.score.tolist()
    for array, old in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize("strategy", [*STRATEGIES, own], ids=lambda s: getattr(s, "__name__", s))
def test_the_global_random_state_is_neither_read_nor_changed(strategy: str) -> None:
    proba, x = pool(40, 3)
    np.random.seed(0)  # noqa: NPY002
    first, drawn = select(strategy, 5, proba, x).index.tolist(), np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert np.random.random() == drawn  # noqa: NPY002
    assert select(strategy, 5, proba, x).index.tolist() == first


@pytest.mark.parametrize("strategy", [*SCORES, own], ids=lambda s: getattr(s, "__name__", s))
def test_the_order_of_the_pool_does_not_matter_where_there_are_no_ties(strategy: str) -> None:
    proba, _ = pool(40, 3)
    order = np.random.default_rng(1).permutation(40)
    assert order[select(strategy, 5, proba[order]).index].tolist() == select(strategy, 5, proba).index.tolist()
