"""From probabilities of tags to entities, and from a graph's scores to probabilities. No torch: an endpoint imports it.

Texts to input is :mod:`trilobe.tasks.texts`; answers to tags is :mod:`trilobe.data.tags`. Here is the other direction:
the exact marginals of the CRF from what the exported graph gives, and the best legal sequence of tags.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilobe.data.tags import tags_to_spans
from trilobe.tasks.words import tokenize
from trilobe.types import BoolArray, FloatArray, LabelSpace, Span

SMALLEST = 1e-12  # as in trilobe.algorithms.encoders.Tagger


def entity_labels(space: LabelSpace) -> tuple[str, ...]:
    """The labels that tags are made of, in their order.

    >>> entity_labels(LabelSpace(("O", "B-CITY", "I-CITY"), scheme="BIO"))
    ('CITY',)
    """
    return tuple(dict.fromkeys(name.partition("-")[2] for name in space.names if name != "O"))


def space_of(tags: Sequence[str]) -> LabelSpace:
    """The label space of tag names, whose scheme shows in them.

    >>> space_of(["O", "B-X", "I-X"]).scheme
    'BIO'
    """
    return LabelSpace(tuple(tags), scheme="BIOES" if any(t.startswith(("E-", "S-")) for t in tags) else "BIO")


def by_label(space: LabelSpace) -> FloatArray:
    """Which label each tag stands for, ``(n_tags, 1 + n_labels)`` zeros and ones; column 0 is ``O``.

    >>> by_label(LabelSpace(("O", "B-CITY", "I-CITY"), scheme="BIO")).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    columns = ("", *entity_labels(space))
    return np.array([[float(name.partition("-")[2] == column) for column in columns] for name in space.names])


def legal(space: LabelSpace) -> BoolArray:
    """Which tag may follow which, ``(n_tags + 1, n_tags + 1)``; the last row is the beginning, the last column the end.

    >>> legal(LabelSpace(("O", "B-X", "I-X"), scheme="BIO"))[:, 2].tolist()
    [False, True, True, False]
    """
    parts = [*(name.partition("-")[::2] for name in space.names), ("edge", "")]
    open_ = [prefix in ("B", "I") for prefix, _ in parts]
    goes_on = [prefix in ("I", "E") for prefix, _ in parts]
    same = np.array([[a == b for _, b in parts] for _, a in parts])
    must_close = space.scheme == "BIOES"
    apart = ~np.array(open_)[:, None] | (not must_close)
    return np.where(np.array(goes_on), np.array(open_)[:, None] & same, apart)


def best_tags(proba: FloatArray, space: LabelSpace, rule: BoolArray | None = None) -> NDArray[np.intp]:
    """The legal sequence of tags with the most expected right tags in the logarithm: ``(T,)`` indices.

    It maximizes the sum of the log marginals over sequences that obey the scheme (Viterbi 1967).

    Args:
        proba: ``(T, n_tags)`` probabilities of each word's tag.
        space: the tags.
        rule: :func:`legal` of ``space``, where it is at hand.

    >>> space = LabelSpace(("O", "B-X", "I-X"), scheme="BIO")
    >>> best_tags(np.array([[0.4, 0.35, 0.25], [0.1, 0.2, 0.7]]), space).tolist()
    [1, 2]
    """
    rule = legal(space) if rule is None else rule
    greedy = proba.argmax(axis=1)
    if rule[np.append(-1, greedy), np.append(greedy, -1)].all():  # then nothing is better
        return np.asarray(greedy)
    cost = np.where(rule, 0.0, -1e6)
    score = np.log(np.maximum(proba, SMALLEST))
    best, came = cost[-1, :-1] + score[0], np.zeros(proba.shape, dtype=np.intp)
    for t in range(1, len(score)):
        step = best[:, None] + cost[:-1, :-1]
        came[t] = step.argmax(axis=0)
        best = step[came[t], np.arange(len(best))] + score[t]
    path = [int((best + cost[:-1, -1]).argmax())]
    for t in range(len(score) - 1, 0, -1):
        path.append(int(came[t, path[-1]]))
    return np.array(path[::-1])


def log_marginals(emissions: FloatArray, weights: Mapping[str, NDArray[Any]]) -> FloatArray:
    """The logarithm of P(tag of word t | text), ``(T, n_tags)``, exact, from scores of that shape.

    The forward and backward sums of :mod:`trilobe.algorithms.crf`, in numpy, as probabilities that are scaled at every
    word (Rabiner 1989, section V.A).

    Args:
        emissions: what the exported graph gives for a text.
        weights: of the model: ``crf.start``, ``crf.transition``, ``crf.end``, and ``rule``, what may not follow what.
    """
    rule = weights["rule"].astype(np.float64)
    start = np.exp(weights["crf.start"] + rule[-1, :-1])
    moves = np.exp(weights["crf.transition"] + rule[:-1, :-1])
    here = np.exp(emissions.astype(np.float64) - emissions.max(axis=1, keepdims=True))
    forward, backward = np.empty_like(here), np.empty_like(here)
    forward[0] = _scaled(start * here[0])
    for t in range(1, len(here)):
        forward[t] = _scaled((forward[t - 1] @ moves) * here[t])
    backward[-1] = np.exp(weights["crf.end"] + rule[:-1, -1])
    for t in range(len(here) - 2, -1, -1):
        backward[t] = _scaled(moves @ (here[t + 1] * backward[t + 1]))
    joint = forward * backward
    return np.asarray(np.log(np.maximum(joint / joint.sum(axis=1, keepdims=True), SMALLEST)))


def _scaled(p: FloatArray) -> FloatArray:
    return np.asarray(p / p.sum())


def entities(
    text: str, proba: FloatArray, space: LabelSpace, offsets: Sequence[tuple[int, int]] | None = None
) -> list[dict[str, Any]]:
    """The entities of a text: start and end in code points, label, text, and confidence.

    The confidence is the smallest probability of a tag in the span: at most that of the whole span being right.

    >>> space = LabelSpace(("O", "B-CITY", "I-CITY"), scheme="BIO")
    >>> entities("to Rome", np.array([[0.9, 0.05, 0.05], [0.2, 0.8, 0.0]]), space)
    [{'start': 3, 'end': 7, 'label': 'CITY', 'text': 'Rome', 'confidence': 0.8}]
    """
    words = tokenize(text) if offsets is None else offsets
    tags = best_tags(proba, space)
    sure = proba[np.arange(len(tags)), tags]
    starts = np.array([start for start, _ in words])
    found = []
    for s in tags_to_spans([space.names[t] for t in tags], words):
        first, behind = np.searchsorted(starts, [s.start, s.end])
        confidence = round(float(sure[first:behind].min()), 6)
        found.append({"start": s.start, "end": s.end, "label": s.label, "text": text[s.start : s.end],
                      "confidence": confidence})  # fmt: skip
    return found


def spans(proba: FloatArray, space: LabelSpace, offsets: Sequence[tuple[int, int]]) -> list[Span]:
    """The entities as spans, from probabilities ``(T, n_tags)``.

    >>> spans(np.eye(3)[[0, 1]], LabelSpace(("O", "B-X", "I-X"), scheme="BIO"), [(0, 2), (3, 7)])
    [Span(start=3, end=7, label='X')]
    """
    return tags_to_spans([space.names[t] for t in best_tags(proba, space)], offsets)


def watched(proba: FloatArray, space: LabelSpace) -> FloatArray:
    """One row a text for monitoring, ``(n, 1 + n_labels)``: its least certain word's distribution over O and labels.

    An entity the model doubts then shows as doubt, however many sure words stand around it.

    >>> space = LabelSpace(("O", "B-X", "I-X"), scheme="BIO")
    >>> watched(np.array([[[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]]), space).tolist()
    [[0.5, 0.5]]
    """
    columns = by_label(space)
    rows = [np.asarray(p, dtype=np.float64) @ columns for p in proba]
    picked = [row[row.max(axis=1).argmin()] for row in rows]
    return np.stack(picked) if picked else np.zeros((0, columns.shape[1]))
