"""Small networks for texts, trained from scratch: words and their characters in, tags or classes out.

Input rows are those of :mod:`trilobe.tasks.words`: column 0 is the word's number (0 is padding, 1 a hidden word), then
come its characters, then, where there are any, features of a frozen encoder. A batch is ``(n, T, columns)``, shorter
texts filled up with zeros; what is padding never touches what is not, so a text is judged alike alone and in company.
Convolutions only: they run in parallel over the words, and export to ONNX with free ``n`` and ``T``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilobe.algorithms.crf import CRF
from trilobe.errors import UsageError
from trilobe.rows import pad
from trilobe.types import FloatArray

UNKNOWN = 1  # the number of a hidden word


class WordEncoder(nn.Module):
    """Each word in its context, ``(n, T, columns)`` to ``(n, T, size)``; zero on padding.

    A word is its embedding, the maximum over its letters of a character convolution (dos Santos and Zadrozny 2014), and
    a linear map of the extra features. Residual convolutions of growing dilation (Strubell et al. 2017) mix in the
    neighbors: with three layers, seven words on both sides. While training, words are hidden at random (their letters
    stay), which makes number 1 mean "a word never seen".

    Args:
        buckets: how many numbers words are hashed to.
        n_chars: columns of characters.
        extra: columns of features behind them.
        width: of the word embedding; half of it for characters, twice for the context.
        layers: convolutions over words.
        dropout: share of activations left out while training; a third of it of words hidden.

    >>> encoder = WordEncoder(buckets=8, n_chars=4)
    >>> encoder(torch.ones(2, 3, 5)).shape, encoder.size
    (torch.Size([2, 3, 128]), 128)
    """

    def __init__(
        self, buckets: int, n_chars: int, extra: int = 0, width: int = 64, layers: int = 3, dropout: float = 0.3
    ) -> None:
        super().__init__()
        if min(buckets, n_chars, width, layers) < 1 or extra < 0:
            raise UsageError(
                f"an encoder of {buckets} buckets, {n_chars} characters, width {width}, {layers} layers, {extra} extra",
                expected="at least 1 of each (extra: 0)",
            )
        letters, self.size = max(width // 2, 1), 2 * width
        self.n_chars, self.hidden = n_chars, dropout / 3
        self.word = nn.Embedding(buckets + 2, width, padding_idx=0)
        self.char = nn.Embedding(256, letters, padding_idx=0)
        self.spell = nn.Conv1d(letters, letters, 3, padding=1)
        self.extra = nn.Linear(extra, self.size) if extra else None
        self.join = nn.Linear(width + letters, self.size)
        self.norms = nn.ModuleList(nn.LayerNorm(self.size) for _ in range(layers + 1))
        self.mix = nn.ModuleList(nn.Conv1d(self.size, self.size, 3, padding=2**i, dilation=2**i) for i in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        real = (x[:, :, :1] > 0).to(x.dtype)
        h = self.join(self.dropout(torch.cat([self._words(x[:, :, 0].long()), self._letters(x)], dim=2)))
        if self.extra is not None:
            h = h + self.extra(self.dropout(x[:, :, 1 + self.n_chars :]))
        for norm, mix in zip(self.norms, self.mix, strict=False):
            seen = (norm(h) * real).transpose(1, 2)
            h = h + self.dropout(torch.relu(mix(seen)).transpose(1, 2))
        out: Tensor = self.norms[-1](h) * real
        return out

    def _words(self, number: Tensor) -> Tensor:
        if self.training and self.hidden:
            hide = (torch.rand(number.shape, device=number.device) < self.hidden) & (number > 0)
            number = number.masked_fill(hide, UNKNOWN)
        out: Tensor = self.word(number)
        return out

    def _letters(self, x: Tensor) -> Tensor:
        chars = x[:, :, 1 : 1 + self.n_chars].long().flatten(0, 1)
        seen = torch.relu(self.spell(self.char(chars).transpose(1, 2))) * (chars > 0).to(x.dtype)[:, None, :]
        return seen.amax(dim=2).reshape(x.shape[0], x.shape[1], -1)

    def pooled(self, x: Tensor) -> Tensor:
        """A whole text, ``(n, 2 * size)``: the largest and the mean value over its words."""
        real = (x[:, :, :1] > 0).to(x.dtype)
        h = self(x)
        highest = (h - 1e4 * (1 - real)).amax(dim=1)
        total = torch.bmm(real.transpose(1, 2), h).squeeze(1)  # a product: its order of summation depends on no batch
        return torch.cat([highest, total / real.sum(dim=1).clamp_min(1)], dim=1)


def encoder_for(preprocessing: Mapping[str, Any], width: int, layers: int = 3) -> WordEncoder:
    """The encoder that fits what ``preprocessing`` says of the input: buckets, characters, a frozen encoder's size.

    >>> encoder_for({"buckets": 8, "n_chars": 4, "encoder_size": 3}, width=8)(torch.ones(1, 2, 8)).shape
    torch.Size([1, 2, 16])
    """
    buckets, n_chars, extra = (int(preprocessing.get(key, 0)) for key in ("buckets", "n_chars", "encoder_size"))
    return WordEncoder(buckets, n_chars, extra, width, layers)


def features(encoder: WordEncoder, X: FloatArray, batch_size: int = 64) -> FloatArray:
    """:meth:`WordEncoder.pooled` of rows, in eval mode: ``(n, 2 * size)``, where texts of a kind lie close together.

    >>> features(WordEncoder(8, 4), np.ones((3, 2, 5), dtype=np.float32)).shape
    (3, 256)
    """
    encoder.eval()
    parts = [np.zeros((0, 2 * encoder.size), dtype=np.float32)]
    with torch.no_grad():
        for start in range(0, len(X), batch_size):
            padded, _ = pad(X[start : start + batch_size])
            parts.append(encoder.pooled(torch.from_numpy(padded)).numpy())
    return np.concatenate(parts)


class Tagger(nn.Module):
    """A tag for each word: an encoder, scores, and a :class:`~trilobe.algorithms.crf.CRF` over them.

    ``forward`` gives the scores before the CRF, ``(n, T, n_tags)``: what is exported. What a prediction is, is
    :meth:`log_proba`.

    Args:
        encoder: gives ``(n, T, size)``.
        n_tags: how many tags.
        tags: their names, where they follow BIO or BIOES.

    >>> tagger = Tagger(WordEncoder(8, 4), 3, ["O", "B-X", "I-X"]).eval()
    >>> tagger.log_proba(torch.ones(1, 2, 5)).exp().sum(-1).round(decimals=4).tolist()
    [[1.0, 1.0]]
    """

    def __init__(self, encoder: WordEncoder, n_tags: int, tags: Sequence[str] | None = None) -> None:
        super().__init__()
        self.encoder, self.crf = encoder, CRF(n_tags, tags)
        self.tags = tuple(tags or ())
        self.score = nn.Linear(encoder.size, n_tags)
        # Which tag may not follow which travels with the weights: whoever serves them needs it, and has no torch.
        self.register_buffer("rule", self.crf.rule.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.score(self.encoder.dropout(self.encoder(x)))
        return out

    def loss(self, x: Tensor, likelihood: Tensor, bootstrap: float = 1.0) -> Tensor:
        """The CRF's loss (its equation 1) of a batch and what is believed of it, ``(n, T, n_tags)``; a scalar.

        ``bootstrap`` has no say: a CRF's own opinion is part of its loss.
        """
        return self.crf.loss(self(x), likelihood, x[:, :, 0] > 0)

    def log_proba(self, x: Tensor) -> Tensor:
        """The logarithm of P(tag of word t | text), exact, ``(n, T, n_tags)``; on padding without meaning.

        Sums are in 64 bits: over hundreds of words, rounding in 32 would show in the fifth digit.
        """
        return torch.log(self.crf.marginals(self(x).double(), x[:, :, 0] > 0).clamp_min(1e-12)).to(x.dtype)


class TextClassifier(nn.Module):
    """A class for each text: an encoder, the maximum and the mean over the words, and scores ``(n, n_classes)``.

    >>> TextClassifier(WordEncoder(8, 4), 3).eval()(torch.ones(2, 5, 5)).shape
    torch.Size([2, 3])
    """

    def __init__(self, encoder: WordEncoder, n_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.score = nn.Linear(2 * encoder.size, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.score(self.encoder.dropout(self.encoder.pooled(x)))
        return out
