"""Texts with their entities as people see them, and why the model judged a text as it did."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trilobe.statistics import softmax
from trilobe.tasks.drawing import Mark, color_of, draw
from trilobe.tasks.entity_recognition.data import best_tags, space_of, spans
from trilobe.tasks.hiding import occlusion, word_marks
from trilobe.tasks.words import tokenize
from trilobe.types import FloatArray, Span

if TYPE_CHECKING:
    from torch import nn


def picture(text: str, found: Sequence[Span] = ()) -> bytes:
    """An SVG of the text, a labeled box around each span.

    >>> b"CITY" in picture("to Rome", [Span(3, 7, "CITY")])
    True
    """
    return draw(text, [Mark(s.start, s.end, color_of(s.label), 0.15, s.label) for s in found])


def explain(module: "nn.Module", items: Sequence[str], X: FloatArray) -> list[tuple[bytes, bytes, float]]:
    """For each text its entities as predicted, the words these rest on, and what that leaves unexplained.

    The score is the sum over the words of the log-probability of the predicted tags; a word's share is how far it falls
    when that word is hidden (:func:`.hiding.occlusion`).
    """
    from trilobe.algorithms.fit import predict_logits

    space = space_of(module.tags)  # type: ignore[arg-type]
    shown = []
    for text, x in zip(items, X, strict=True):
        words = tokenize(text)
        proba = softmax(predict_logits(module, x[None])[0])
        tags = best_tags(proba, space)

        def score(versions: FloatArray, tags: NDArray[np.intp] = tags) -> FloatArray:
            said = softmax(predict_logits(module, versions, batch_size=32))
            return np.asarray(np.log(np.maximum(said[:, np.arange(len(tags)), tags], 1e-12)).sum(axis=1))

        falls, rest = occlusion(x, score)
        shown.append((picture(text, spans(proba, space, words)), draw(text, word_marks(falls, words)), rest))
    return shown
