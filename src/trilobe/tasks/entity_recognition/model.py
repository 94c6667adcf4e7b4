"""The small network that tags words."""

from collections.abc import Mapping
from typing import Any

import torch

from trilobe.algorithms.encoders import Tagger, encoder_for
from trilobe.types import LabelSpace


def network(preprocessing: Mapping[str, Any], space: LabelSpace, width: int = 16, seed: int = 0) -> Tagger:
    """A :class:`~trilobe.algorithms.encoders.Tagger` over words, characters and what a frozen encoder says.

    Args:
        preprocessing: says buckets, characters, and columns of the frozen encoder.
        space: the tags, with their scheme.
        width: a quarter of the width of a word's embedding.
        seed: of the first weights.

    >>> space = LabelSpace(("O", "B-X", "I-X"), scheme="BIO")
    >>> network({"buckets": 8, "n_chars": 4}, space, width=2).eval()(torch.ones(1, 2, 5)).shape
    torch.Size([1, 2, 3])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = encoder_for(preprocessing, 4 * width)
        return Tagger(encoder, len(space), space.names)
