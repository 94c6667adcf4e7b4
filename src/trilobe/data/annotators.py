"""Simulated people, for demonstrations, benchmarks and tests of everything that follows from answers.

A simulated annotator is exactly what the engine in :mod:`trilobe.data.beliefs` assumes: a confusion matrix and a
speed. It answers full and partial questions by the same perception, so estimates can be held against the truth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trilobe.errors import UsageError
from trilobe.types import FloatArray, LabelSpace, Question, Response, Span


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Somebody who perceives class l with probability ``confusion[k, l]`` when the truth is k.

    Args:
        name: how the answers are signed.
        confusion: ``(n_classes, n_classes)``, rows sum to 1.
        seconds: median time per question.

    >>> space = LabelSpace(("a", "b"))
    >>> ann = SimulatedAnnotator("ann", np.eye(2), seconds=2.0)
    >>> ann.answer(Question("q", "x"), 1, space, np.random.default_rng(0))[0].labels
    ('b',)
    """

    name: str
    confusion: FloatArray
    seconds: float = 3.0

    def __post_init__(self) -> None:
        square = self.confusion.ndim == 2 and len(set(self.confusion.shape)) == 1
        if not square or not np.allclose(self.confusion.sum(axis=1), 1) or (self.confusion < 0).any():
            raise UsageError(f"the confusion matrix of {self.name}", expected="a square of rows that sum to 1")

    @property
    def quality(self) -> float:
        """P(right) on equally frequent classes, 0 to 1."""
        return float(np.diag(self.confusion).mean())

    def answer(
        self, question: Question, truth: int, space: LabelSpace, rng: np.random.Generator
    ) -> tuple[Response, float]:
        """What they say about an example of class ``truth``, and after how many seconds (log-normal)."""
        seen = space.names[int(rng.choice(len(space), p=self.confusion[truth]))]
        seconds = float(np.round(self.seconds * np.exp(rng.normal(0, 0.35)), 1))
        if not question.choices:
            return Response("class", (seen,)), seconds
        yes = bool(space.mask(question.choices)[space.index(seen)])
        return Response("one_of" if yes else "not", question.choices), seconds


@dataclass(frozen=True)
class SimulatedReader:
    """Somebody who marks entities: overlooks some, takes some for another label, and begins some a word too late.

    Args:
        name: how the answers are signed.
        missed, confused, shortened: the chance of each of these, for each entity, 0 to 1.
        seconds: median time per text; long ones take longer.

    >>> ann = SimulatedReader("ann", missed=0.0, confused=0.0, shortened=0.0)
    >>> ann.answer([Span(3, 7, "CITY")], "to Rome", ["CITY", "DATE"], np.random.default_rng(0))[0].spans
    (Span(start=3, end=7, label='CITY'),)
    """

    name: str
    missed: float = 0.05
    confused: float = 0.02
    shortened: float = 0.05
    seconds: float = 8.0

    def __post_init__(self) -> None:
        if not all(0 <= chance <= 1 for chance in (self.missed, self.confused, self.shortened)):
            raise UsageError(repr(self), expected="chances from 0 to 1")

    def answer(
        self, truth: Sequence[Span], text: str, labels: Sequence[str], rng: np.random.Generator
    ) -> tuple[Response, float]:
        """What they mark in a text whose entities are ``truth``, and after how many seconds (log-normal)."""
        marked = []
        for span in truth:
            overlooked, mistaken, late = rng.random(3) < (self.missed, self.confused, self.shortened)
            label = span.label
            if mistaken and (others := [name for name in labels if name != span.label]):
                label = others[rng.integers(len(others))]
            words = text[span.start : span.end].split(" ")
            start = span.start + len(words[0]) + 1 if late and len(words) > 1 and words[0] else span.start
            if not overlooked:
                marked.append(Span(start, span.end, label))
        reading = self.seconds * (0.5 + len(text) / 120)
        return Response("spans", spans=tuple(marked)), float(np.round(reading * np.exp(rng.normal(0, 0.35)), 1))


def typical_crowd(space: LabelSpace, confused: Sequence[str] | None = None) -> list[SimulatedAnnotator]:
    """Two good annotators, a careless one, one who takes two classes for each other, a slow perfect one.

    Args:
        space: the classes.
        confused: the two classes that one of them mixes up (the first two by default).

    >>> [a.name for a in typical_crowd(LabelSpace(("a", "b", "c")))]
    ['ada', 'ben', 'cleo', 'dan', 'eva']
    """
    k, two = len(space), tuple(confused or space.names[:2])
    if len(set(two)) != 2:
        raise UsageError(f"{list(two)} as the classes that are confused", expected="two classes")
    i, j = map(space.index, two)

    def noisy(accuracy: float) -> FloatArray:
        one = np.full((k, k), (1 - accuracy) / (k - 1))
        np.fill_diagonal(one, accuracy)
        return one

    mixed = noisy(0.97)
    mixed[[i, j]] = 0.0
    mixed[i, [i, j]] = mixed[j, [j, i]] = [0.35, 0.65]
    return [
        SimulatedAnnotator("ada", noisy(0.95), 3.0),
        SimulatedAnnotator("ben", noisy(0.93), 3.5),
        SimulatedAnnotator("cleo", noisy(0.60), 1.5),
        SimulatedAnnotator("dan", mixed, 3.0),
        SimulatedAnnotator("eva", np.eye(k), 12.0),
    ]
