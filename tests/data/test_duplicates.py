"""Near-duplicates against the comparison of all pairs, and how surely they are found."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.data.duplicates import middle, near_duplicates
from trilobe.errors import UsageError

seeds = st.integers(0, 2**32 - 1)


def likeness(x: np.ndarray, y: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Equation (1), for all pairs."""
    x, y = x - center, y - center
    size = (x**2).sum(1)[:, None] + (y**2).sum(1)
    apart = ((x[:, None] - y) ** 2).sum(-1)
    return 1 - np.divide(apart, size, out=np.zeros_like(apart), where=size > 0)


def scene(seed: int, n: int = 60, d: int = 6, noise: float = 0.05) -> np.ndarray:
    """Rows of which several are near each other."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n // 3, d))[rng.integers(n // 3, size=n)] + rng.normal(size=(n, d)) * noise


@settings(deadline=None, max_examples=40)
@given(seeds, st.sampled_from([0.9, 0.98, 0.999]), st.integers(0, 8))
def test_new_ones_are_unlike_and_the_others_are_like_the_one_they_repeat(seed: int, threshold: float, m: int) -> None:
    x, known = scene(seed), scene(seed)[:m] + 0.01
    found = near_duplicates(x, threshold, known, recall=1 - 1e-9)
    is_new = found == np.arange(len(x))
    center = middle(x)
    for i in np.flatnonzero(~is_new):
        original = x[found[i]] if found[i] >= 0 else known[~found[i]]
        assert likeness(x[i : i + 1], original[None], center)[0, 0] >= threshold - 1e-4
        assert found[i] < 0 or is_new[found[i]], "likeness is not handed on"
    among = likeness(x[is_new], x[is_new], center)
    assert (among[np.triu_indices_from(among, 1)] < threshold + 1e-4).all()
    together = near_duplicates(np.concatenate([known, x]), threshold, center=center, recall=1 - 1e-9)
    assert (np.where(together[m:] < m, ~together[m:], together[m:] - m) == found).all()
    old = known[together[:m] == np.arange(m)]  # one that repeats another of them stands for nobody
    assert (likeness(x[is_new], old, center) < threshold + 1e-4).all()


def test_recall_at_the_threshold() -> None:
    """Of 2,000 pairs exactly at the threshold, at least the stated part is found (and nothing else)."""
    rng, n, d, threshold = np.random.default_rng(0), 2000, 48, 0.98
    x = rng.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    aside = rng.normal(size=(n, d))
    aside -= (aside * x).sum(1, keepdims=True) * x
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    angle = np.arccos(threshold) - 1e-4
    pairs = np.concatenate([x, np.cos(angle) * x + np.sin(angle) * aside])
    for recall in (0.9, 0.99):
        found = near_duplicates(pairs, threshold, center=np.zeros(d), recall=recall)
        hit = (found[n:] == np.arange(n)).mean()
        assert hit > recall - 3 * np.sqrt(recall * (1 - recall) / n)
        assert (found[:n] == np.arange(n)).all()


@given(seeds, st.integers(2, 40))
@settings(deadline=None, max_examples=30)
def test_equal_rows_are_always_found(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))[rng.integers(n, size=n)] * 10.0 ** rng.integers(-3, 4)
    x[x > 1] = -0.0
    first = [next(j for j in range(n) if (x[j] == x[i]).all()) for i in range(n)]
    for threshold in (1.0, 1 - 1e-12):
        assert near_duplicates(x, threshold).tolist() == first


def test_all_alike_all_different_and_nothing() -> None:
    assert near_duplicates(np.ones((500, 4))).tolist() == [0] * 500
    assert near_duplicates(np.eye(50)).tolist() == list(range(50))
    assert near_duplicates(np.zeros((0, 3))).tolist() == []
    assert near_duplicates(np.zeros((0, 3)), known=np.eye(3)).tolist() == []
    assert near_duplicates(np.ones((2, 3)), known=np.zeros((0, 3))).tolist() == [0, 0]


def test_what_all_have_in_common_is_no_likeness() -> None:
    """A fixed camera: the cosine of any two is 0.9999, and yet they are different."""
    x = 100 + np.random.default_rng(0).normal(size=(300, 32))
    assert (x[0] @ x[1]) / np.linalg.norm(x[0]) / np.linalg.norm(x[1]) > 0.9998
    assert (near_duplicates(x, 0.9) == np.arange(300)).all()


def test_length_counts() -> None:
    x = np.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
    assert near_duplicates(x, 0.9).tolist() == [0, 1, 2, 3]


def test_a_long_drift_is_not_one_example() -> None:
    """Each frame is like the next; the first and the last are not."""
    x = np.cumsum(np.random.default_rng(0).normal(size=(2000, 8)), axis=0)
    found = near_duplicates(x, 0.98, recall=1 - 1e-9)
    kept = np.flatnonzero(found == np.arange(2000))
    assert 10 < len(kept) < 1000
    alike = likeness(x, x[kept], middle(x))
    assert alike.max(axis=1).min() >= 0.98 - 1e-4, "every frame is like one that is kept"


def test_from_a_file_in_blocks_as_from_memory(tmp_path: Path) -> None:
    x = scene(0, 30_000, 8, 0.02).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = near_duplicates(mapped)
    assert found.tolist() == near_duplicates(x).tolist()
    assert 9000 < (found == np.arange(len(x))).sum() < 12_000


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"features": np.zeros(3)}, r"features of shape \(3,\)"),
        ({"features": np.eye(3), "known": np.eye(2)}, r"and known ones of \(2, 2\)"),
        ({"features": np.eye(3) * np.nan}, "NaN"),
        ({"features": np.eye(3), "known": np.full((1, 3), np.inf)}, "NaN or infinity"),
        ({"features": np.eye(3), "threshold": 0.0}, "a threshold of 0.0"),
        ({"features": np.eye(3), "threshold": 1.1}, "a threshold of 1.1"),
        ({"features": np.eye(3), "recall": 1.0}, "a recall of 1.0"),
    ],
)
def test_what_makes_no_sense(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        near_duplicates(**arguments)  # type: ignore[arg-type]
