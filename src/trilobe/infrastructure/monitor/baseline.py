"""What a model predicts when all is well: counted once, written as JSON, read for every window."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trilobe.errors import DataError, NotEnoughData
from trilobe.types import FloatArray

FORMAT = "baseline.v1"
BINS = 10  # confidence bins; "low confidence" means the lowest of them
_REMAKE = "make it again with Baseline.from_proba on the model's held-out predictions"


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a model predicts on held-out data when all is well. Plain numbers, small enough to travel in a bundle.

    ``class_counts`` ``(n_classes,)`` says how often each class was predicted. ``confidence_edges`` are nine held-out
    confidences: the j-th has exactly ``j * n // 10`` of them before it in sorted order (order statistics, not
    interpolated, which is what makes the test of low confidence exact). ``confidence_counts`` ``(10,)`` says how
    many lie under the first edge, from it to the second, and so on; ``mean_confidence`` is 1/n_classes to 1.

    >>> Baseline.from_proba([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).class_counts
    (2, 1)
    """

    class_counts: tuple[int, ...]
    confidence_edges: tuple[float, ...]
    confidence_counts: tuple[int, ...]
    mean_confidence: float

    def __post_init__(self) -> None:
        counts = self.class_counts + self.confidence_counts
        ordered = all(a <= b for a, b in zip(self.confidence_edges, self.confidence_edges[1:], strict=False))
        sizes = len(self.class_counts) >= 2, len(self.confidence_edges) == BINS - 1, len(self.confidence_counts) == BINS
        finite = all(map(math.isfinite, (*self.confidence_edges, self.mean_confidence)))
        if not (all(sizes) and ordered and finite and min(counts) >= 0 and sum(self.confidence_counts) == self.n > 0):
            raise DataError(
                f"a baseline that contradicts itself: {self}",
                expected=f"2 or more class counts, {BINS - 1} ascending edges and {BINS} counts with the same sum",
                hint="make it again with Baseline.from_proba on the model's held-out predictions",
            )

    @property
    def n(self) -> int:
        """How many held-out predictions it was counted from."""
        return sum(self.class_counts)

    @classmethod
    def from_proba(cls, proba: ArrayLike) -> "Baseline":
        """Count held-out predictions ``proba (n_samples, n_classes)``, rows that sum to 1.

        They must be of data that the model was not trained on (nor its calibration fitted), or the window will look
        less confident than the baseline though nothing is wrong. Raises :class:`~trilobe.errors.DataError` for NaN,
        a wrong shape or rows that are no distribution, :class:`~trilobe.errors.NotEnoughData` for an empty array.

        >>> Baseline.from_proba([[0.9, 0.1]] * 20).n
        20
        """
        array = distributions(proba, "held-out predictions")
        confidence, n = array.max(axis=1), len(array)
        edges = np.sort(confidence)[np.arange(1, BINS) * n // BINS]
        return cls(
            class_counts=tuple(np.bincount(array.argmax(axis=1), minlength=array.shape[1]).tolist()),
            confidence_edges=tuple(edges.tolist()),
            confidence_counts=tuple(np.bincount(np.searchsorted(edges, confidence, "right"), minlength=BINS).tolist()),
            mean_confidence=float(confidence.mean()),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with the name of the format. :meth:`from_json` gives the same baseline back.

        >>> baseline = Baseline.from_proba([[0.9, 0.1], [0.2, 0.8]])
        >>> Baseline.from_json(baseline.to_json()) == baseline
        True
        """
        return {"format": FORMAT} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Baseline":
        """Read what :meth:`to_json` wrote; :class:`~trilobe.errors.DataError` where it is damaged or of another format.

        >>> Baseline.from_json({"format": "baseline.v9"})
        Traceback (most recent call last):
        trilobe.errors.DataError: not a readable baseline: format 'baseline.v9'; expected format 'baseline.v1'...
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            what = f"format {value.get('format')!r}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise DataError(f"not a readable baseline: {what}", expected=f"format {FORMAT!r}", hint=_REMAKE)
        try:
            return cls(
                class_counts=tuple(map(_whole, value["class_counts"])),
                confidence_edges=tuple(map(float, value["confidence_edges"])),
                confidence_counts=tuple(map(_whole, value["confidence_counts"])),
                mean_confidence=float(value["mean_confidence"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"not a readable baseline: {error!r}", expected="the values of to_json()", hint=_REMAKE
            ) from error


def distributions(proba: ArrayLike, what: str) -> FloatArray:
    """``proba`` as an array ``(n, n_classes)`` whose rows are distributions, or an error that says why not."""
    array = np.asarray(proba, dtype=float)
    if array.size == 0:
        raise NotEnoughData(f"no {what}: an array of shape {array.shape}", expected="(n_samples, n_classes)")
    if array.ndim != 2 or array.shape[1] < 2:
        raise DataError(f"{what} of shape {array.shape}", expected="(n_samples, n_classes) with 2 or more classes")
    wrong = ~np.isfinite(array).all(axis=1)
    wrong |= (np.nan_to_num(array) < 0).any(axis=1) | (np.abs(np.nan_to_num(array).sum(axis=1) - 1) > 0.01)
    if wrong.any():
        raise DataError(
            f"{int(wrong.sum())} of {len(array)} {what} are no distribution; the first is number {wrong.argmax()}",
            expected="finite values from 0 to 1 that sum to 1 in each row",
            hint="pass probabilities (after softmax), not logits; NaN means that the model itself is broken",
        )
    return array


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a whole number")
    return value
