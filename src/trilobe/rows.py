"""Batches of things of unequal length: texts of so many tokens, and what is believed of each token.

A batch is either one dense array, ``(n, ...)``, or *rows*: an object array ``(n,)`` whose entries are arrays ``(T_i,
k)``. Both are indexed, cut and counted alike (``x[index]``, ``len(x)``), so code that treats an example as a whole
needs no case for either; what looks inside uses the functions here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilobe.types import FloatArray

AnyArray = NDArray[Any]


def as_rows(arrays: Sequence[AnyArray]) -> AnyArray:
    """Arrays as one batch: stacked where all have one shape, an object array ``(n,)`` of them otherwise.

    >>> as_rows([np.zeros(2), np.ones(2)]).shape
    (2, 2)
    >>> as_rows([np.zeros((1, 2)), np.ones((3, 2))]).shape
    (2,)
    """
    if len({np.shape(a) for a in arrays}) <= 1:
        return np.stack(arrays) if len(arrays) else np.empty((0,), dtype=np.float32)
    out = np.empty(len(arrays), dtype=object)
    for i, a in enumerate(arrays):
        out[i] = np.asarray(a)
    return out


def is_ragged(x: AnyArray) -> bool:
    """Whether a batch is rows of unequal length.

    >>> is_ragged(np.zeros((2, 3)))
    False
    """
    return bool(x.dtype == object)


def lengths(x: AnyArray) -> NDArray[np.intp]:
    """How many entries each row has, ``(n,)``.

    >>> lengths(as_rows([np.zeros((1, 2)), np.ones((3, 2))])).tolist()
    [1, 3]
    """
    return np.array([len(row) for row in x], dtype=np.intp)


def flat(x: AnyArray) -> AnyArray:
    """All tokens of all rows behind each other, ``(sum of T_i, k)``; a batch ``(n, k)`` of wholes as it is.

    >>> flat(as_rows([np.zeros((1, 2)), np.ones((3, 2))])).shape
    (4, 2)
    """
    if is_ragged(x):
        return np.concatenate([np.asarray(row) for row in x])
    return x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x


def apply(function: Callable[[AnyArray], AnyArray], x: AnyArray) -> AnyArray:
    """``function`` of each row, or of a dense batch at once.

    >>> [r.tolist() for r in apply(lambda row: row + 1, as_rows([np.zeros(1), np.ones(2)]))]
    [[1.0], [2.0, 2.0]]
    """
    return as_rows([function(row) for row in x]) if is_ragged(x) else function(x)


def pad(x: Sequence[AnyArray] | AnyArray, value: float = 0.0) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Rows filled up with ``value`` to the longest: ``(n, T, ...)`` float32, and which entries are real ``(n, T)``.

    >>> padded, real = pad(as_rows([np.ones((1, 2)), np.ones((2, 2))]))
    >>> padded.shape, real.tolist()
    ((2, 2, 2), [[True, False], [True, True]])
    """
    sizes = [len(row) for row in x]
    out = np.full((len(x), max(sizes, default=0), *np.shape(x[0])[1:]), value, dtype=np.float32)
    for i, row in enumerate(x):
        out[i, : len(row)] = row
    return out, np.arange(out.shape[1]) < np.array(sizes)[:, None]
