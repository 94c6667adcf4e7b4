"""The small network that tells the class of a text."""

from collections.abc import Mapping
from typing import Any

import torch

from trilobe.algorithms.encoders import TextClassifier, encoder_for
from trilobe.errors import UsageError


def network(preprocessing: Mapping[str, Any], n_classes: int, width: int = 16, seed: int = 0) -> TextClassifier:
    """A :class:`~trilobe.algorithms.encoders.TextClassifier` over words, characters and a frozen encoder's columns.

    Args:
        preprocessing: says buckets, characters, and columns of the frozen encoder.
        n_classes: at least 2.
        width: a quarter of the width of a word's embedding.
        seed: of the first weights.

    >>> network({"buckets": 8, "n_chars": 4}, 3, width=2).eval()(torch.ones(1, 2, 5)).shape
    torch.Size([1, 3])
    """
    if n_classes < 2:
        raise UsageError(f"a network for {n_classes} class", expected="at least 2 classes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = encoder_for(preprocessing, 4 * width, layers=2)
        return TextClassifier(encoder, n_classes)
