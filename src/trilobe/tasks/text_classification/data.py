"""Texts to input for a classifier: what :mod:`trilobe.tasks.texts` does, with long texts cut in their middle."""

from collections.abc import Mapping, Sequence
from typing import Any

from trilobe.tasks import texts
from trilobe.tasks.words import tokenize
from trilobe.types import FloatArray


def encode(items: Sequence[str], preprocessing: Mapping[str, Any]) -> FloatArray:
    """Rows ``(n_words, columns)`` float32, of a long text its first and last ``max_tokens / 2`` words.

    >>> spec = {"version": "words.v1", "buckets": 1024, "n_chars": 16, "max_tokens": 4}
    >>> encode(["one two three four five six"], spec).shape
    (1, 4, 17)
    """
    return texts.encode(items, preprocessing, cut=True)


def words_seen(text: str, n: int) -> list[tuple[int, int]]:
    """Where the ``n`` words of a text stand that its input has rows for.

    >>> words_seen("one two three", 2)
    [(0, 3), (8, 13)]
    """
    offsets = tokenize(text)
    return [offsets[i] for i in texts.kept(len(offsets), n)]
