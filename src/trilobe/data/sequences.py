"""How much a model doubts the tags of a sequence: scores on rows of probabilities, one row per token.

A batch is an object array ``(n,)`` of arrays ``(T_i, n_tags)``, or dense ``(n, T, n_tags)``. Each score is ``(n,)``,
higher = ask sooner. With p_t the marginal probabilities of token t:

==========================  =======================================  ==============================================
score                       formula                                  asks for
==========================  =======================================  ==============================================
``mnlp``                    mean_t  -log max p_t                     doubt per token: the default for sequences
``token_entropy``           mean_t  -Σ p_t log p_t                   doubt per token, however spread
``token_margin``            max_t  1 - (p_t1 - p_t2)                 the one weakest token, two tags competing
``token_least_confidence``  max_t  1 - max p_t                       the one weakest token
``total_nlp``               Σ_t  -log max p_t                        doubt of the whole text
``total_entropy``           Σ_t  -Σ p_t log p_t                      doubt of the whole text
==========================  =======================================  ==============================================

Totals grow with length, and so does the work of an annotator; means and maxima make texts of all lengths comparable.
All are computed on the tokens laid end to end, so a hundred thousand texts take as long as their tokens do.

Source: Shen, Yun, Lipton, Kronrod and Anandkumar, Deep Active Learning for Named Entity Recognition (2018, section 4);
the totals are those of Settles and Craven (2008). Deviation: on marginals the most probable tag of each token is taken
by itself; the probability of the best whole sequence is what :meth:`trilobe.algorithms.crf.CRF.decode` returns.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trilobe.data.scores import check_proba, entropy, least_confidence, margin
from trilobe.errors import UsageError
from trilobe.rows import flat, lengths
from trilobe.types import FloatArray

Rows = NDArray[Any]
How = Literal["mean", "sum", "max"]


def mnlp(proba: Rows) -> FloatArray:
    """Maximum normalized log-probability, negated: the mean over tokens of -log max p, 0 to log(n_tags).

    >>> rows = np.array([[[1.0, 0.0], [0.5, 0.5]]])
    >>> mnlp(rows).round(3).tolist()
    [0.347]
    """
    return _over("mean", _nlp, proba)


def total_nlp(proba: Rows) -> FloatArray:
    """-log of the probability of the most probable tags together, at least 0; ranks as 1 - that probability does.

    >>> total_nlp(np.array([[[0.5, 0.5], [0.5, 0.5]]])).round(3).tolist()
    [1.386]
    """
    return _over("sum", _nlp, proba)


def token_entropy(proba: Rows) -> FloatArray:
    """The mean entropy of a token, in nats, 0 to log(n_tags).

    >>> token_entropy(np.array([[[1.0, 0.0], [0.5, 0.5]]])).round(3).tolist()
    [0.347]
    """
    return _over("mean", entropy, proba)


def total_entropy(proba: Rows) -> FloatArray:
    """The summed entropy of the tokens, in nats, at least 0.

    >>> total_entropy(np.array([[[0.5, 0.5], [0.5, 0.5]]])).round(3).tolist()
    [1.386]
    """
    return _over("sum", entropy, proba)


def token_margin(proba: Rows) -> FloatArray:
    """The margin score of the weakest token, 0 to 1: one hard entity is found in however long a text.

    >>> token_margin(np.array([[[0.9, 0.1], [0.6, 0.4]]])).round(2).tolist()
    [0.8]
    """
    return _over("max", margin, proba)


def token_least_confidence(proba: Rows) -> FloatArray:
    """1 - max p of the weakest token, 0 to 1 - 1/n_tags.

    >>> token_least_confidence(np.array([[[0.9, 0.1], [0.6, 0.4]]])).round(2).tolist()
    [0.4]
    """
    return _over("max", least_confidence, proba)


def tokens(proba: Rows) -> tuple[FloatArray, NDArray[np.intp]]:
    """All tokens end to end ``(sum of T_i, n_tags)``, and how many each sequence has, ``(n,)``.

    Raises:
        UsageError: an empty sequence, rows of unlike width, probabilities that are none; it says in which sequence.

    >>> tokens(np.array([[[1.0, 0.0], [0.5, 0.5]]]))[1].tolist()
    [2]
    """
    proba = np.asarray(proba)
    if proba.ndim != (1 if proba.dtype == object else 3):
        raise UsageError(
            f"probabilities of shape {proba.shape}",
            expected="sequences: (n,) arrays of (T_i, n_tags), or (n, T, n_tags)",
            hint="for one prediction per example take margin, entropy or least_confidence",
        )
    count = np.full(len(proba), proba.shape[1]) if proba.ndim == 3 else lengths(proba)
    if not count.all():
        raise UsageError(f"sequence {int(count.argmin())} has no tokens", expected="at least one token in each")
    if not len(proba):
        return np.empty((0, 1)), count
    try:
        return check_proba(flat(proba)), count
    except (UsageError, ValueError):
        for i, row in enumerate(proba):  # slow, but it knows where
            if np.shape(row)[1:] != np.shape(proba[0])[1:]:
                shapes = f"{np.shape(row)} after {np.shape(proba[0])}"
                raise UsageError(f"sequence {i} is of shape {shapes}", expected="the same tags for all") from None
            try:
                check_proba(row)
            except UsageError as e:
                raise UsageError(f"sequence {i}: {e.problem}", expected=e.expected) from None
        raise


def over_tokens(how: How, values: FloatArray, count: NDArray[np.intp]) -> FloatArray:
    """One number per sequence from one per token: ``(sum of count,)`` to ``(len(count),)``.

    >>> over_tokens("max", np.array([1.0, 5.0, 2.0]), np.array([2, 1])).tolist()
    [5.0, 2.0]
    """
    if not len(count):
        return np.zeros(0)
    reduce = np.maximum if how == "max" else np.add
    out = reduce.reduceat(values, np.cumsum(count) - count)
    return np.asarray(out / count if how == "mean" else out)


def _over(how: How, score: Callable[[FloatArray], FloatArray], proba: Rows) -> FloatArray:
    p, count = tokens(proba)
    return over_tokens(how, score(p), count)


def _nlp(p: FloatArray) -> FloatArray:
    return np.asarray(np.abs(np.log(p.max(axis=1))))
