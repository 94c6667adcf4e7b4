"""Where several opinions differ: scores on the predictions of an ensemble, or of passes with dropout left on.

``samples`` is ``(n_samples, n, n_classes)``: what each member of the committee predicts. For sequences it is a list (or
an object array) of as many batches of rows, as :mod:`trilobe.data.sequences` takes them, and each score is the mean
over the tokens. One model that is torn is not doubt of this kind: it may know that the picture has no right answer.
More data settles only what members see differently.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from trilobe.data.scores import check_proba
from trilobe.data.sequences import Rows, over_tokens, tokens
from trilobe.errors import UsageError
from trilobe.types import FloatArray

Samples = FloatArray | NDArray[np.object_] | Sequence[Rows]


def bald(samples: Samples) -> FloatArray:
    """What the true model would tell about the class: H(mean p) - mean H(p), in nats, 0 to log(n_classes).

    The mutual information of the class and the member drawn (Houlsby, Huszár, Ghahramani and Lengyel 2011, equation 2;
    with dropout passes as members, Gal, Islam and Ghahramani 2017). Higher = members contradict each other.

    >>> agree, differ = [[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]
    >>> bald(np.array([agree, differ]).transpose(1, 0, 2)).round(3).tolist()
    [0.0, 0.693]
    """
    p, count = _opinions(samples)
    gain = entr(p.mean(axis=0)).sum(axis=1) - entr(p).sum(axis=2).mean(axis=0)
    return _whole(np.maximum(gain, 0.0), count)


def mean_std(samples: Samples) -> FloatArray:
    """The standard deviation of each class's probability over the members, averaged over the classes; 0 to 0.5.

    (Kampffmeyer, Salberg and Jenssen 2016; the acquisition "mean STD" of Gal et al. 2017.)

    >>> mean_std(np.array([[[1.0, 0.0]], [[0.0, 1.0]]])).tolist()
    [0.5]
    """
    p, count = _opinions(samples)
    return _whole(p.std(axis=0).mean(axis=1), count)


def mean_proba(samples: Samples) -> Rows:
    """What the committee as a whole predicts: the mean of its members, of the shape of each one's batch.

    >>> mean_proba(np.array([[[1.0, 0.0]], [[0.0, 1.0]]])).tolist()
    [[0.5, 0.5]]
    """
    p, count = _opinions(samples)
    if count is None:
        return np.asarray(p.mean(axis=0))
    out = np.empty(len(count), dtype=object)
    for i, row in enumerate(np.split(p.mean(axis=0), np.cumsum(count)[:-1])):
        out[i] = row
    return out


def _opinions(samples: Samples) -> tuple[FloatArray, NDArray[np.intp] | None]:
    """``(n_samples, n, n_classes)``; or the same of tokens, with how many each sequence has. At least two members."""
    if len(samples) < 2:
        raise UsageError(
            f"{len(samples)} prediction(s) of each example",
            expected="at least 2: an ensemble, or passes with dropout left on, as (n_samples, n, n_classes)",
        )
    members = [np.asarray(s) for s in samples]
    if any(len(m) != len(members[0]) for m in members):
        raise UsageError(f"members that saw {sorted({len(m) for m in members})} examples", expected="the same examples")
    if members[0].dtype != object and members[0].ndim == 2:
        flat, count = [check_proba(m) for m in members], None
    else:
        both = [tokens(m) for m in members]
        flat, count = [p for p, _ in both], both[0][1]
        if any((c != count).any() for _, c in both):
            raise UsageError("members that see sequences of unlike length", expected="the same tokens for all")
    if len({p.shape for p in flat}) != 1:
        raise UsageError(f"members of shapes {sorted({p.shape for p in flat})}", expected="the same classes for all")
    return np.stack(flat), count


def _whole(values: FloatArray, count: NDArray[np.intp] | None) -> FloatArray:
    return np.asarray(values) if count is None else over_tokens("mean", values, count)
