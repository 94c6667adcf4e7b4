"""Texts as people see them, and the words a class was judged by."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trilobe.statistics import softmax
from trilobe.tasks.drawing import draw
from trilobe.tasks.hiding import occlusion, word_marks
from trilobe.tasks.text_classification.data import words_seen
from trilobe.types import FloatArray

if TYPE_CHECKING:
    from torch import nn


def explain(module: "nn.Module", items: Sequence[str], X: FloatArray) -> list[tuple[bytes, bytes, float]]:
    """For each text a picture of it, the words its class rests on, and what that leaves unexplained.

    The score is the log-probability of the predicted class; a word's share is how far it falls when that word is hidden
    (:func:`.hiding.occlusion`).
    """
    from trilobe.algorithms.fit import predict_logits

    shown = []
    for text, x in zip(items, X, strict=True):
        best = int(predict_logits(module, x[None])[0].argmax())

        def score(versions: FloatArray, best: int = best) -> FloatArray:
            return np.log(np.maximum(softmax(predict_logits(module, versions, batch_size=32))[:, best], 1e-12))

        falls, rest = occlusion(x, score)
        shown.append((draw(text), draw(text, word_marks(falls, words_seen(text, len(x)))), rest))
    return shown
