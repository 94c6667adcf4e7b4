"""Which examples are nearly the same as another, so that nobody is asked the same thing twice.

Two rows x and y of features are nearly identical when

    2 <x - c, y - c>  ≥  threshold · (‖x - c‖² + ‖y - c‖²)                                                        (1)

with c the middle of all: their cosine, seen from the middle, and with their lengths compared too. It is at most the
cosine, it is 1 only for equal rows, and it does not mistake what all examples have in common (a white page, a fixed
camera, the positive mean of a network's features) for likeness. In distances, (1) reads ‖x - y‖² ≤ (1 - threshold)
(‖x - c‖² + ‖y - c‖²): at 0.98 nearly identical rows lie seven times closer than any two rows do on average.

Pairs are found by random hyperplanes (SimHash, Charikar 2002: two rows fall on the same side of one with probability
1 - angle/π) and then tested exactly, so a row is never called a duplicate wrongly. How many tables of hyperplanes it
takes to find a pair at the threshold with probability ``recall`` follows from that formula; likelier pairs are found
more surely, equal rows always. Memory beside the features is a few numbers per row, and features may be a memory-mapped
file. What is done with a duplicate (leave it out, or let the answer spread) is decided elsewhere.
"""

from collections.abc import Callable, Iterator
from math import acos, ceil, log, log1p, log2, pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import UsageError
from trilobe.types import BoolArray, FloatArray

IntArray = NDArray[np.intp]
Take = Callable[[IntArray], FloatArray]
BLOCK = 8192


def near_duplicates(
    features: FloatArray,
    threshold: float = 0.98,
    known: FloatArray | None = None,
    center: FloatArray | None = None,
    recall: float = 0.99,
    seed: int = 0,
) -> IntArray:
    """For each row the row that it repeats: its own number where it is new.

    No two new rows are nearly identical (but for what ``recall`` lets pass), and every other row is nearly identical to
    the new one that it points to: likeness is not handed on from neighbor to neighbor.

    Args:
        features: ``(n, n_features)``.
        threshold: likeness from which two rows are one, as in equation (1), above 0; at 1 only equal rows are.
        known: ``(n_known, n_features)`` rows that came before: what repeats row j of them gets the number ``~j``, which
            is negative.
        center: ``(n_features,)`` from where likeness is seen; :func:`middle` of the features by default.
        recall: the probability with which a pair exactly at the threshold is found, below 1.
        seed: of the hyperplanes.

    Returns:
        ``(n,)`` integers.

    Raises:
        UsageError: features that are no finite matrix, or a threshold or recall out of range.

    >>> x = np.array([[0.0, 9.0], [5.0, 0.0], [0.0, 9.0], [0.0, 9.1], [-5.0, 0.0]])
    >>> near_duplicates(x).tolist(), near_duplicates(x, 1.0).tolist()
    ([0, 1, 0, 0, 4], [0, 1, 0, 3, 4])
    >>> near_duplicates(x, known=np.array([[5.0, 0.0]])).tolist()
    [0, -1, 0, 0, 4]
    """
    x = np.asanyarray(features)
    old = np.empty((0, *x.shape[1:]), dtype=x.dtype) if known is None else np.asanyarray(known)
    if x.ndim != 2 or old.shape[1:] != x.shape[1:]:
        raise UsageError(
            f"features of shape {x.shape}" + (f" and known ones of {old.shape}" if known is not None else ""),
            expected="(n, n_features), and as many features of what is known",
        )
    if not 0 < threshold <= 1 or not 0 < recall < 1:
        raise UsageError(
            f"a threshold of {threshold} and a recall of {recall}", expected="both above 0, recall below 1"
        )
    c = middle(x) if center is None else np.asarray(center, dtype=np.float32)

    def take(index: IntArray) -> FloatArray:
        """Rows of what is known and, behind them, of the features."""
        if not len(old):
            return np.asarray(x[index], dtype=np.float32)
        out = np.empty((len(index), x.shape[1]), dtype=np.float32)
        new = index >= len(old)
        out[~new], out[new] = old[index[~new]], x[index[new] - len(old)]
        return out

    n = len(old) + len(x)
    size = _per_row(take, n, lambda rows: np.einsum("ij,ij->i", rows - c, rows - c))
    if not np.isfinite(size).all():
        raise UsageError("features with NaN or infinity", expected="finite numbers")

    def alike(i: IntArray, j: IntArray) -> BoolArray:
        """Equation (1) for the pairs (i, j)."""
        out = np.empty(len(i), dtype=bool)
        for start in range(0, len(i), BLOCK):
            part = slice(start, start + BLOCK)
            gap = take(i[part])
            gap -= take(j[part])
            out[part] = np.einsum("ij,ij->i", gap, gap) <= (1 - threshold) * (size[i[part]] + size[j[part]])
        return out

    first = np.arange(n)
    while True:
        for codes in _tables(take, n, c, threshold, recall, seed):
            _merge(first, codes, alike)
        while (first[first] != first).any():
            first = first[first]
        late = np.flatnonzero(first != np.arange(len(first)))
        lost = late[~alike(late, first[late])]  # alike only through one that repeats another
        first[lost] = lost
        if not lost.size:
            found = first[len(old) :]
            return np.where(found < len(old), ~found, found - len(old))


def middle(features: FloatArray) -> FloatArray:
    """The mean of the rows, ``(n_features,)`` float32; of some 32,768 evenly spread ones where there are more.

    >>> middle(np.array([[0.0, 1.0], [2.0, 3.0]])).tolist()
    [1.0, 2.0]
    """
    some = np.asarray(features[:: max(1, len(features) // 32_768)], dtype=np.float64)
    mean = some.mean(axis=0) if len(some) else np.zeros(some.shape[1:])
    return np.asarray(mean, dtype=np.float32)


def _tables(take: Take, n: int, c: FloatArray, threshold: float, recall: float, seed: int) -> Iterator[IntArray]:
    """Codes ``(n,)``, one table after the other; rows of one code are to be compared. First come equal rows."""
    rng = np.random.default_rng(seed)
    odd = rng.integers(2**63, size=len(c), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    yield _per_row(take, n, lambda rows: ((rows + 0.0).view(np.uint32) * odd).sum(axis=1).view(np.int64))  # no -0.0
    if threshold == 1:
        return
    same = 1 - acos(threshold) / pi
    bits = max(1, min(ceil(log2(n + 1)) + 4, 52, int(log(0.1) / log(same))))  # a pair meets in a tenth of the tables
    power = 2.0 ** np.arange(bits)
    for _ in range(ceil(log(1 - recall) / log1p(-(same**bits)))):
        planes = rng.standard_normal((len(c), bits)).astype(np.float32)
        yield _per_row(take, n, lambda rows, planes=planes: ((rows - c) @ planes > 0) @ power)  # type: ignore[misc]


def _per_row(take: Take, n: int, function: Callable[[FloatArray], NDArray[Any]]) -> NDArray[Any]:
    """``function`` of all rows, a block at a time: ``(n,)``."""
    blocks = [np.arange(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    return np.concatenate([function(take(block)) for block in blocks]) if blocks else np.empty(0)


def _merge(first: IntArray, codes: NDArray[Any], alike: Callable[[IntArray, IntArray], BoolArray]) -> None:
    """Within each code, compare all rows still new with the first of them; those alike repeat it, the others go on."""
    new = np.flatnonzero(first == np.arange(len(first)))
    new = new[np.argsort(codes[new], kind="stable")]
    while new.size:
        begins = np.r_[True, codes[new[1:]] != codes[new[:-1]]]
        leader = new[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
        rest, leader = new[~begins], leader[~begins]
        same = alike(rest, leader)
        first[rest[same]] = leader[same]
        new = rest[~same]
