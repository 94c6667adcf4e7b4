"""Which examples to ask about next: one door for every strategy, and the selection of a batch.

A strategy is a function that names what it needs. One without ``n`` is a *score*: it gets the probabilities (or
``samples``, if that is what its argument is called) and returns ``(n_pool,)``, higher = ask sooner; :func:`select` then
takes the best few times ``n`` and keeps one example of each cluster, so that a batch does not ask the same thing twenty
times. One with an argument ``n`` *chooses* the batch itself: it returns ``n`` distinct indices, or those and their
scores, and may name any of

    proba, samples, features, known, scores, size, n, seed

as arguments (those of :func:`select`; ``scores`` is the default uncertainty, ``size`` that of the pool). A name with a
default value may be missing, one without must be there.

Our own strategies stand in ``STRATEGIES`` as ``module:function``, the same form in which other packages offer theirs as
entry points of the group ``trilobe.strategies``, and in which a user may name any function. Formulas are in
:mod:`trilobe.data.scores`, :mod:`trilobe.data.sequences`, :mod:`trilobe.data.committees` and
:mod:`trilobe.data.diversity`.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilobe.data.committees import Samples, mean_proba
from trilobe.data.diversity import spread
from trilobe.data.duplicates import middle, near_duplicates
from trilobe.data.scores import check_proba, entropy, least_confidence, margin
from trilobe.data.sequences import Rows
from trilobe.errors import NotEnoughData, UsageError
from trilobe.types import FloatArray

__all__ = ["STRATEGIES", "Selection", "Strategy", "check_proba", "entropy", "find", "least_confidence", "margin",
           "select", "strategies", "top"]  # fmt: skip

IntArray = NDArray[np.intp]
GROUP = "trilobe.strategies"
DUPLICATES = 0.995  # likeness from which an example repeats another; docs/reference/query.md says what that leaves out
ROWS = 65_536  # of a large array that are read at a time

_TORN = "the model is torn between classes here"
_UNSURE = "the model is unsure how to tag this"
_SPLIT = "the members of the committee contradict each other here"
STRATEGIES: Mapping[str, tuple[str, str]] = {
    "margin": ("trilobe.data.scores:margin", _TORN),
    "entropy": ("trilobe.data.scores:entropy", _TORN),
    "least_confidence": ("trilobe.data.scores:least_confidence", _TORN),
    "mnlp": ("trilobe.data.sequences:mnlp", _UNSURE),
    "token_margin": ("trilobe.data.sequences:token_margin", _UNSURE),
    "token_entropy": ("trilobe.data.sequences:token_entropy", _UNSURE),
    "token_least_confidence": ("trilobe.data.sequences:token_least_confidence", _UNSURE),
    "total_nlp": ("trilobe.data.sequences:total_nlp", _UNSURE),
    "total_entropy": ("trilobe.data.sequences:total_entropy", _UNSURE),
    "bald": ("trilobe.data.committees:bald", _SPLIT),
    "mean_std": ("trilobe.data.committees:mean_std", _SPLIT),
    "k_center": ("trilobe.data.diversity:k_center", "unlike everything asked before"),
    "badge": ("trilobe.data.diversity:badge", "would change the model, and not as the others do"),
    "facility_location": ("trilobe.data.diversity:facility_location", "stands for doubtful examples like it"),
    "typical": ("trilobe.data.diversity:typical", "stands for a group of similar examples"),
    "random": ("trilobe.data.query:at_random", "picked at random"),
}
"""Name -> where it is, and why what it picks is asked. On disk a name carries its version: ``margin.v1``."""


@dataclass(frozen=True)
class Strategy:
    """A function, the name it is recorded under, why it asks, and what it ``takes``: argument -> is it needed?"""

    function: Callable[..., Any]
    name: str
    reason: str
    takes: Mapping[str, bool]

    @property
    def chooses(self) -> bool:
        """Whether it chooses the batch itself, instead of scoring each example."""
        return "n" in self.takes

    @property
    def predicts(self) -> bool:
        """Whether it needs a model's predictions."""
        return not self.chooses or any(self.takes.get(name) for name in ("proba", "samples", "scores"))

    @property
    def scored(self) -> str:
        """What a score is a function of."""
        return "samples" if next(iter(self.takes), "") == "samples" else "proba"


@dataclass(frozen=True)
class Selection:
    """``index`` ``(n,)`` into the pool, best first, with ``score`` ``(n,)``; who chose (versioned name) and why."""

    index: IntArray
    score: FloatArray
    strategy: str
    reason: str


def strategies() -> list[str]:
    """The names that :func:`find` knows: ours, then those of other installed packages.

    >>> strategies()[:2]
    ['margin', 'entropy']
    """
    return [*STRATEGIES, *sorted(name for name in _offered() if name not in STRATEGIES)]


def find(strategy: str | Callable[..., Any], sequences: bool = False) -> Strategy:
    """What is meant by a name, by ``"package.module:function"``, or by a function.

    For sequences, margin, entropy and least_confidence mean token_margin, token_entropy and token_least_confidence.

    Raises:
        UsageError: a name that nobody offers, or something that can't be imported or called.

    >>> find("margin").name, find("entropy", sequences=True).name, find("numpy:ptp").reason
    ('margin.v1', 'token_entropy.v1', 'scores high in numpy:ptp')
    """
    if callable(strategy):
        return _described(strategy, getattr(strategy, "__name__", type(strategy).__name__))
    if sequences and f"token_{strategy}" in STRATEGIES:
        strategy = f"token_{strategy}"
    if strategy in STRATEGIES:
        where, reason = STRATEGIES[strategy]
        return _described(_imported(where), f"{strategy}.v1", reason)
    if strategy in _offered():
        where, version = _offered()[strategy]
        return _described(_imported(where), f"{strategy}.v{version}")
    if ":" in strategy:
        return _described(_imported(strategy), strategy)
    raise UsageError(
        f"unknown strategy {strategy!r}",
        expected=f"one of {', '.join(strategies())}; package.module:function; or a function",
    )


def select(
    strategy: str | Callable[..., Any],
    n: int,
    proba: Rows | None,
    features: FloatArray | None = None,
    diversity: int = 10,
    seed: int = 0,
    known: FloatArray | None = None,
    samples: Samples | None = None,
    duplicates: float | None = DUPLICATES,
) -> Selection:
    """Choose ``n`` of the pool; fewer when it is smaller, or when what is left repeats what is asked.

    Args:
        strategy: as in :func:`find`.
        n: how many, at least 1.
        proba: ``(n_pool, n_classes)`` predictions, or rows of them for sequences; None when there is no model yet: then
            a strategy that needs them gives way to ``typical``.
        features: ``(n_pool, ...)`` to judge likeness by; without it no diversity is enforced.
        diversity: how many candidates per chosen example compete, for scores; 1 takes the top scores as they are.
        seed: for ties, clusters and random choice.
        known: ``(n_known, ...)`` features of what was asked before.
        samples: ``(n_samples, n_pool, n_classes)`` predictions of a committee, whose mean is ``proba`` by default.
        duplicates: likeness (:mod:`trilobe.data.duplicates`) from which an example repeats one in ``known``, or a
            better one of the batch, and is left out; 1 leaves out equal rows only, None nothing. Random choice leaves
            out nothing either, so that it stays a fair sample.

    Raises:
        UsageError: an unknown strategy, n below 1, something a strategy needs that is not given, or scores, indices or
            features that do not fit the pool or are not finite.
        NotEnoughData: an empty pool, or one in which everything repeats what is known.

    >>> chosen = select("margin", 1, np.array([[0.9, 0.1], [0.6, 0.4]]))
    >>> chosen.index.tolist(), chosen.strategy
    ([1], 'margin.v1')
    >>> select("k_center", 1, None, np.array([[0.0], [1.0], [9.0]]), known=np.array([[0.0]])).index.tolist()
    [2]
    """
    if n < 1:
        raise UsageError(f"{n} questions", expected="at least 1")
    if proba is None and samples is not None and len(samples):
        proba = mean_proba(samples)
    found = find(strategy, proba is not None and _is_rows(proba))
    size = len(proba) if proba is not None else len(features if features is not None else ())
    if not size:
        raise NotEnoughData("there is nothing to choose from", hint="trilobe add FOLDER")
    if features is not None and len(features) != size:
        raise UsageError(f"{len(features)} rows of features for {size} examples", expected="as many")
    known = known if known is not None and len(known) else None
    features, known = (None if f is None else np.asanyarray(f).reshape(len(f), -1) for f in (features, known))
    if proba is None and found.predicts:
        found = find("typical")
    given = {"proba": proba, "samples": samples, "features": features, "known": known}
    if found.chooses:
        return _chosen(found, given | {"size": size, "n": n, "seed": seed}, duplicates)
    scores, tie = _scores(found, given[found.scored], size), np.random.default_rng(seed).random(size)
    if features is None:
        pick = _best(scores, tie, n)
    else:
        wanted = n * max(1, diversity)
        pick = _new(lambda m: _best(scores, tie, m), wanted, features, known, duplicates)
        if len(pick) > n:
            pick = spread(pick, features[pick], scores[pick], n, seed)
    return Selection(pick, scores[pick], found.name, found.reason)


def top(
    chunks: Iterable[Rows] | Rows, n: int, strategy: str | Callable[..., Any] = "margin", seed: int = 0
) -> Selection:
    """The ``n`` highest scores of a pool of any size, in the memory of one chunk and ``n`` rows.

    What :func:`select` gives without features, ties included, but the predictions come piece by piece.

    Args:
        chunks: batches of predictions, one after the other; or one array, such as ``np.load(path, mmap_mode="r")``,
            which is then read 65,536 rows at a time.
        n: how many, at least 1.
        strategy: a score, as in :func:`find`.
        seed: for ties.

    Raises:
        UsageError: a strategy that chooses whole batches, n below 1, predictions that are none.
        NotEnoughData: no predictions.

    >>> top(([[p, 1 - p]] for p in (0.9, 0.6, 0.7)), 2).index.tolist()
    [1, 2]
    """
    if n < 1:
        raise UsageError(f"{n} questions", expected="at least 1")
    rng, start = np.random.default_rng(seed), 0
    index, score, tie = np.empty(0, dtype=np.intp), np.empty(0), np.empty(0)
    found = find(strategy)
    for chunk in _pieces(chunks):
        found = find(strategy, _is_rows(chunk))
        if found.chooses:
            raise UsageError(f"{found.name} on a stream of predictions", expected="a score, such as margin")
        new = _scores(found, chunk, len(chunk))
        score, tie = np.append(score, new), np.append(tie, rng.random(len(chunk)))
        index = np.append(index, np.arange(start, start + len(chunk)))
        start += len(chunk)
        best = _best(score, tie, n)
        index, score, tie = index[best], score[best], tie[best]
    if not start:
        raise NotEnoughData("there is nothing to choose from", hint="trilobe add FOLDER")
    return Selection(index, score, found.name, found.reason)


def at_random(size: int, n: int, seed: int = 0) -> tuple[IntArray, FloatArray]:
    """``n`` of ``size``, each set as likely as any other, with scores of 0.

    >>> sorted(at_random(3, 3)[0].tolist())
    [0, 1, 2]
    """
    return np.random.default_rng(seed).permutation(size)[:n], np.zeros(n)


def _chosen(found: Strategy, given: dict[str, Any], duplicates: float | None) -> Selection:
    """What a strategy chooses; of a pool without duplicates, where its choice has any."""
    features, size = given["features"], given["size"]
    index, score = _choice(found, given, np.arange(size))
    if features is None or duplicates is None or found.function is at_random:
        return Selection(index, score, found.name, found.reason)
    known = given["known"]
    repeats = near_duplicates(features[index], duplicates, known, middle(features))
    if (repeats != np.arange(len(index))).any():
        keep = _new(lambda m: np.arange(size)[:m], size + 1, features, known, duplicates)
        index, score = _choice(found, given, keep)
    return Selection(index, score, found.name, found.reason)


def _choice(found: Strategy, given: dict[str, Any], keep: IntArray) -> tuple[IntArray, FloatArray]:
    """Call a strategy on a part of the pool, and see that what comes back are that many distinct ones of it."""
    part = given | {"size": len(keep), "n": min(given["n"], len(keep))}
    if len(keep) < given["size"]:
        part |= {name: given[name][keep] for name in ("proba", "features") if given[name] is not None}
        part["samples"] = None if given["samples"] is None else [np.asarray(s)[keep] for s in given["samples"]]
    if "scores" in found.takes and part["proba"] is not None:
        part["scores"] = _scores(find("mnlp" if _is_rows(part["proba"]) else "margin"), part["proba"], len(keep))
    for name, needed in found.takes.items():
        if needed and part.get(name) is None:
            raise UsageError(f"{found.name} without {name}", expected=f"{name}, which it cannot choose without")
    came = found.function(**{name: part[name] for name in found.takes if part.get(name) is not None})
    n = part["n"]
    index, score = came if isinstance(came, tuple) else (came, 1 - np.arange(n) / n)
    index, score = np.asarray(index), np.asarray(score, dtype=np.float64)
    right = index.shape == score.shape == (n,) and index.dtype.kind in "iu" and np.isfinite(score).all()
    if not right or len(np.unique(index)) < n or index.min() < 0 or index.max() >= len(keep):
        raise UsageError(
            f"{found.name} chose indices of shape {index.shape}",
            expected=f"({n},) distinct ones from 0 to {len(keep) - 1}",
        )
    return keep[index], score


def _scores(found: Strategy, proba: Any, size: int) -> FloatArray:
    if proba is None:
        raise UsageError(
            f"{found.name} without {found.scored}", expected=f"{found.scored}, which it cannot choose without"
        )
    scores = np.asarray(found.function(proba))
    if scores.shape != (size,) or not np.isfinite(scores).all():
        raise UsageError(f"{found.name} gave scores of shape {scores.shape}", expected=f"({size},) finite numbers")
    return scores


def _best(scores: FloatArray, tie: FloatArray, n: int) -> IntArray:
    """The ``n`` highest scores (or all), best first; of equal ones those with the lower ``tie``."""
    few = np.arange(len(scores))
    if n < len(scores):
        few = np.flatnonzero(scores >= np.partition(scores, -n)[-n])  # with all that are equal at the edge
    return np.asarray(few[np.lexsort((tie[few], -scores[few]))[:n]])


def _new(
    first: Callable[[int], IntArray], n: int, features: FloatArray, known: FloatArray | None, likeness: float | None
) -> IntArray:
    """Of an order, whose ``first(m)`` are known, the first ``n`` that repeat neither what is known nor one before."""
    size, center = n, middle(features)
    while True:
        head = first(size)
        if likeness is None:
            return head
        new: IntArray = head[near_duplicates(features[head], likeness, known, center) == np.arange(len(head))]
        if len(new) >= n or len(head) < size:
            break
        size *= 2
    if not len(new):
        raise NotEnoughData(
            "everything in the pool repeats what is known",
            expected=f"an example less than {likeness} like it",
            hint="add other examples, or pass duplicates=None",
        )
    return new[:n]


def _described(function: Callable[..., Any], name: str, reason: str = "") -> Strategy:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some compiled functions don't tell
        parameters = {}.values()
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    takes = {p.name: p.default is p.empty for p in named}
    return Strategy(function, name, reason or f"{'chosen by' if 'n' in takes else 'scores high in'} {name}", takes)


def _imported(where: str) -> Callable[..., Any]:
    module, _, path = where.partition(":")
    try:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UsageError(f"the strategy {where!r} can't be imported: {e}", expected="package.module:function") from e
    if not callable(found):
        raise UsageError(f"the strategy {where!r} is a {type(found).__name__}", expected="a function")
    return found  # type: ignore[no-any-return]


@cache
def _offered() -> dict[str, tuple[str, str]]:
    """Strategies of installed packages: where each is, and the version of its package."""
    return {e.name: (e.value, e.dist.version if e.dist else "0") for e in entry_points(group=GROUP)}


def _is_rows(proba: Any) -> bool:
    proba = np.asanyarray(proba)
    return bool(proba.dtype == object or proba.ndim == 3)


def _pieces(chunks: Any) -> Iterator[Any]:
    if not isinstance(chunks, np.ndarray):
        yield from (np.asarray(chunk) for chunk in chunks)
        return
    for start in range(0, len(chunks), ROWS):
        yield chunks[start : start + ROWS]
