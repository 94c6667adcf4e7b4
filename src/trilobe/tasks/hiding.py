"""What a model says when words are hidden from it: an attack that needs no gradient, and an explanation.

A hidden word is the word number :data:`.words.UNKNOWN` without letters, which the networks of
:mod:`trilobe.algorithms.encoders` have met while training.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trilobe.rows import as_rows
from trilobe.tasks.drawing import Mark
from trilobe.tasks.words import UNKNOWN
from trilobe.types import FloatArray

GROUPS = 96  # of words that are hidden one after another to explain a long text


def hide(x: FloatArray, which: NDArray[np.intp] | NDArray[np.bool_]) -> FloatArray:
    """Input ``(T, columns)`` with the words ``which`` hidden.

    >>> hide(np.array([[7.0, 65.0], [8.0, 66.0]]), np.array([1])).tolist()
    [[7.0, 65.0], [1.0, 0.0]]
    """
    out = np.array(x)
    out[which] = 0
    out[which, 0] = UNKNOWN
    return out


def hidden(X: FloatArray, eps: float, draws: int, seed: int = 0) -> Iterator[FloatArray]:
    """``draws`` versions of ``X``, in each a share ``eps`` of every text's words hidden at random, at least one.

    Draws of one seed are nested: what is hidden at an ``eps`` is hidden at every larger one.

    >>> [int((x[0][:, 0] == 1).sum()) for x in hidden(np.full((1, 10, 3), 5.0), 0.25, 2)]
    [3, 3]
    """
    for draw in range(draws):
        dice = np.random.default_rng([seed, draw])
        rows = []
        for x in X:
            order = dice.permutation(len(x))
            rows.append(hide(x, order[: int(np.ceil(eps * len(x) - 1e-9))]))
        yield as_rows(rows)


def occlusion(x: FloatArray, score: Callable[[FloatArray], FloatArray]) -> tuple[FloatArray, float]:
    """How far the score of a text falls when a word is hidden (Zeiler and Fergus 2014, section 4, for words).

    Of a text of more than :data:`GROUPS` words, neighbors are hidden together and share what the score falls by.

    Args:
        x: the input ``(T, columns)``.
        score: of a batch ``(n, T, columns)`` the scores ``(n,)``.

    Returns:
        ``(T,)``, positive for a word the score rests on, and the share that is not explained, 0 to 1: the fall for all
        words hidden at once, less the sum of the falls one by one, against the sum of all these.

    >>> falls, rest = occlusion(np.full((2, 1), 5.0), lambda X: (X[:, :, 0] > 1).sum(axis=1))
    >>> falls.tolist(), rest
    ([1.0, 1.0], 0.0)
    """
    n = len(x)
    group = np.arange(n) * min(n, GROUPS) // n
    versions = [x, hide(x, np.ones(n, dtype=bool)), *(hide(x, group == g) for g in range(group[-1] + 1))]
    said = np.asarray(score(np.stack(versions)), dtype=np.float64)
    falls = said[0] - said[2:]
    total = said[0] - said[1]
    rest = abs(total - falls.sum()) / (abs(total) + np.abs(falls).sum() + 1e-9)
    return falls[group] / np.bincount(group)[group], float(min(rest, 1 - 1e-9))


def word_marks(falls: FloatArray, words: Sequence[tuple[int, int]]) -> list[Mark]:
    """The words of a text, colored by :func:`occlusion`: orange what the score rests on, blue what speaks against it.

    >>> [m.color for m in word_marks(np.array([2.0, -1.0]), [(0, 2), (3, 7)])]
    ['#D55E00', '#0072B2']
    """
    top = max(float(np.abs(falls).max(initial=0)), 1e-9)
    return [
        Mark(start, end, "#D55E00" if fall > 0 else "#0072B2", 0.8 * abs(float(fall)) / top)
        for fall, (start, end) in zip(falls, words, strict=True)
    ]


def shares(eps: Sequence[float]) -> list[float]:
    """Strengths of an attack, each once, weakest first.

    >>> shares([0.1, 0.05, 0.1])
    [0.05, 0.1]
    """
    return sorted(set(eps))
