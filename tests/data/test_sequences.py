"""Scores of sequences against a loop over their tokens, and what they refuse."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.data import sequences
from trilobe.data.scores import entropy, least_confidence, margin
from trilobe.errors import UsageError
from trilobe.rows import as_rows

Score = Callable[[np.ndarray], np.ndarray]
SCORES: dict[str, Score] = {
    name: getattr(sequences, name)
    for name in ("mnlp", "total_nlp", "token_entropy", "total_entropy", "token_margin", "token_least_confidence")
}


def random_rows(n: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return as_rows([rng.dirichlet(np.full(k, 0.5), size=rng.integers(1, 7)) for _ in range(n)])


def by_hand(row: np.ndarray) -> dict[str, float]:
    best = [max(p) for p in row.tolist()]
    ordered = [sorted(p, reverse=True) for p in row.tolist()]
    spread = [-sum(v * math.log(v) for v in p if v > 0) for p in row.tolist()]
    return {
        "mnlp": -sum(map(math.log, best)) / len(best),
        "total_nlp": -math.log(math.prod(best)),
        "token_entropy": sum(spread) / len(spread),
        "total_entropy": sum(spread),
        "token_margin": max(1 - (p[0] - p[1]) for p in ordered),
        "token_least_confidence": 1 - min(best),
    }


@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_scores_are_their_definitions(n: int, k: int, seed: int) -> None:
    rows = random_rows(n, k, seed)
    for name, score in SCORES.items():
        assert score(rows) == pytest.approx([by_hand(r)[name] for r in rows], abs=1e-9), name


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_dense_or_rows_single_or_double(score: Score) -> None:
    dense = np.random.default_rng(0).dirichlet(np.ones(4), size=(6, 5))
    rows = np.empty(6, dtype=object)
    for i in range(6):
        rows[i] = dense[i]
    assert score(rows).tolist() == score(dense).tolist()
    assert score(dense.astype(np.float32)) == pytest.approx(score(dense), abs=1e-5)


def test_a_text_of_one_token_is_scored_as_a_class() -> None:
    proba = np.random.default_rng(0).dirichlet(np.ones(4), size=30)
    rows = proba[:, None, :]
    assert sequences.token_margin(rows).tolist() == margin(proba).tolist()
    assert sequences.token_least_confidence(rows).tolist() == least_confidence(proba).tolist()
    assert sequences.token_entropy(rows).tolist() == sequences.total_entropy(rows).tolist() == entropy(proba).tolist()
    order = np.argsort(least_confidence(proba))
    assert np.argsort(sequences.mnlp(rows)).tolist() == order.tolist()  # -log p and 1 - p rank alike


def test_length_counts_in_totals_only() -> None:
    token = np.array([[0.6, 0.4]])
    rows = as_rows([token, np.repeat(token, 4, axis=0)])
    for name, score in SCORES.items():
        short, long = score(rows)
        assert long == pytest.approx(4 * short if name.startswith("total") else short), name


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_certain_tags_leave_no_doubt(score: Score) -> None:
    assert score(as_rows([np.eye(3), np.eye(3)[:1]])).tolist() == [0, 0]
    assert score(np.empty((0, 4, 3))).tolist() == score(np.empty(0, dtype=object)).tolist() == []


def ragged(*rows: object) -> np.ndarray:
    out = np.empty(len(rows), dtype=object)
    for i, row in enumerate(rows):
        out[i] = np.asarray(row, dtype=float)
    return out


FINE = [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("proba", "problem"),
    [
        (np.array(FINE), "take margin, entropy or least_confidence"),
        (ragged(FINE, np.empty((0, 2))), "sequence 1 has no tokens; expected at least one"),
        (np.empty((3, 0, 2)), "sequence 0 has no tokens"),
        (ragged(FINE, [[0.5, 0.5], [0.5, np.nan]]), "sequence 1: probabilities with NaN"),
        (ragged(FINE, FINE, [[0.5, 0.5], [0.5, 0.6]]), r"sequence 2: probabilities of row 1 sum to 1.1"),
        (np.array([FINE, [[-0.5, 1.5]]]), "sequence 1: a probability of -0.5"),
        (ragged(FINE, [[0.2, 0.3, 0.5]]), r"sequence 1 is of shape \(1, 3\) after \(1, 2\)"),
        (ragged([0.5, 0.5], [1.0]), r"sequence 0: probabilities of shape \(2,\)"),
        (np.ones((2, 2, 2, 2)), r"shape \(2, 2, 2, 2\)"),
    ],
)
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_what_is_no_batch_of_predictions(score: Score, proba: np.ndarray, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        score(proba)
