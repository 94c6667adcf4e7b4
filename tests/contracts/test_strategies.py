"""One contract for every way to choose: a new strategy, ours or of an installed package, is tested by being offered."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trilobe.data import sequences
from trilobe.data.duplicates import near_duplicates
from trilobe.data.query import DUPLICATES, Selection, find, select, strategies
from trilobe.errors import NotEnoughData, UsageError
from trilobe.rows import as_rows


def own(proba: np.ndarray) -> np.ndarray:
    """A user's own score."""
    return -(proba**2).sum(axis=1)


def own_batch(features: np.ndarray, n: int) -> np.ndarray:
    """A user's own choice of a batch."""
    return np.argsort(-features.sum(axis=1), kind="stable")[:n]


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
EVERY = pytest.mark.parametrize("strategy", [*strategies(), own, own_batch], ids=lambda s: getattr(s, "__name__", s))


def of_tokens(strategy: Any) -> bool:
    return find(strategy).function.__module__ == sequences.__name__


def rows_of(proba: np.ndarray) -> np.ndarray:
    """Sequences whose tokens are all predicted alike, of lengths from 1 to 3."""
    return as_rows([np.tile(p, (1 + i % 3, 1)) for i, p in enumerate(proba)])


def ask(strategy: Any, n: int, proba: np.ndarray | None, x: np.ndarray | None, **more: Any) -> Selection:
    """``select`` with predictions of the kind that the strategy is for."""
    if proba is not None and of_tokens(strategy):
        proba = rows_of(proba)
    if proba is not None and find(strategy).scored == "samples":
        more["samples"] = np.stack([proba, np.roll(proba, 1, axis=1)])
    return select(strategy, n, proba, x, **more)


@EVERY
@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("known", ["model and features", "model", "features"])
def test_contract(strategy: Any, kind: str, known: str) -> None:
    proba, x = POOLS[kind]()
    given = (proba if "model" in known else None, x if "features" in known else None)
    if given[1] is None and find(strategy).takes.get("features"):
        with pytest.raises(UsageError, match="without features"):
            ask(strategy, 1, *given)
        return
    before = [None if a is None else a.copy() for a in given]
    for n in (1, 7, 1000):
        chosen = ask(strategy, n, *given, seed=3, duplicates=None)
        want = min(n, len(proba))
        assert chosen.index.shape == chosen.score.shape == (want,)
        assert len(set(chosen.index.tolist())) == want, "an example is asked about once"
        assert chosen.index.dtype.kind == "i" and ((chosen.index >= 0) & (chosen.index < len(proba))).all()
        assert np.isfinite(chosen.score).all() and (np.diff(chosen.score) <= 1e-12).all(), "best first"
        assert chosen.strategy and chosen.reason
        again = ask(strategy, n, *given, seed=3, duplicates=None)
        assert again.index.tolist() == chosen.index.tolist() and again.score.tolist() == chosen.score.tolist()
    for array, old in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, old)


@EVERY
@pytest.mark.parametrize("kind", POOLS)
def test_nothing_is_asked_twice(strategy: Any, kind: str) -> None:
    """As many as there are distinct ones; random choice alone takes all as they are."""
    proba, x = POOLS[kind]()
    x = x.astype(np.float32)
    distinct = len(x) if strategy == "random" else (near_duplicates(x, DUPLICATES) == np.arange(len(x))).sum()
    for n in (1, 7, 1000):
        chosen = ask(strategy, n, proba, x, seed=3)
        assert len(set(chosen.index.tolist())) == len(chosen.index) == min(n, distinct)


@EVERY
def test_the_global_random_state_is_neither_read_nor_changed(strategy: Any) -> None:
    proba, x = pool(40, 3)
    np.random.seed(0)  # noqa: NPY002
    first, drawn = ask(strategy, 5, proba, x).index.tolist(), np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert np.random.random() == drawn  # noqa: NPY002
    assert ask(strategy, 5, proba, x).index.tolist() == first


@EVERY
def test_the_order_of_the_pool_does_not_matter_where_there_are_no_ties(strategy: Any) -> None:
    """Of those that draw lots (badge, typical, random) the lot falls on positions: for them the order is no matter of
    principle, but of the seed."""
    if strategy in ("badge", "typical", "random"):
        return
    proba, x = pool(40, 3)
    order, known = np.random.default_rng(1).permutation(40), np.zeros((1, 5), dtype=np.float32)
    one = ask(strategy, 5, proba, x, diversity=1, known=known)
    two = ask(strategy, 5, proba[order], x[order], diversity=1, known=known)
    if of_tokens(strategy):  # the lengths of the tests' sequences follow the position
        rows = rows_of(proba)
        two = select(strategy, 5, rows[order], x[order], diversity=1, known=known)
    assert order[two.index].tolist() == one.index.tolist()


@EVERY
def test_lots_fall_elsewhere_with_another_seed(strategy: Any) -> None:
    proba, x = np.full((60, 3), 1 / 3), pool(60, 3)[1]
    chosen = {tuple(ask(strategy, 3, proba, x, seed=s).index.tolist()) for s in range(6)}
    assert len(chosen) > 1 or strategy in ("facility_location", own_batch)


@pytest.mark.parametrize("strategy", [s for s in strategies() if find(s).predicts])
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda p: p * np.nan, "NaN"),
        (lambda p: p * np.inf, "NaN or infinity"),
        (lambda p: p * 1.5, "sum to 1.5"),
        (lambda p: p * 3 - 2 / 3, "a probability of -"),
    ],
)
def test_what_is_no_prediction(strategy: str, spoil: Callable[[np.ndarray], np.ndarray], problem: str) -> None:
    proba, x = pool(9, 3)
    with pytest.raises(UsageError, match=problem), np.errstate(invalid="ignore"):
        ask(strategy, 2, spoil(proba), x)


@pytest.mark.parametrize("strategy", [s for s in strategies() if s != "random"])
@pytest.mark.parametrize("duplicates", [None, 0.995])
def test_features_that_are_none(strategy: str, duplicates: float | None) -> None:
    proba, x = pool(9, 3)
    with pytest.raises(UsageError, match="NaN or infinity"):
        ask(strategy, 2, proba, x * np.nan, duplicates=duplicates)
    with pytest.raises(UsageError, match="8 rows of features for 9 examples"):
        ask(strategy, 2, proba, x[:-1], duplicates=duplicates)


@EVERY
def test_no_pool_and_no_questions(strategy: Any) -> None:
    proba, x = pool(9, 3)
    with pytest.raises(UsageError, match="0 questions"):
        ask(strategy, 0, proba, x)
    with pytest.raises(NotEnoughData, match="nothing to choose from"):
        select(strategy, 2, None, x[:0])
