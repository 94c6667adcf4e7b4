"""The nouns of Trilobe: what crosses from one lobe to another.

Frozen dataclasses of plain values and arrays, without behavior beyond what their fields imply. A noun knows nothing
of files, databases, networks or torch. Times are seconds since the epoch (float, UTC).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import AnswerError, UsageError

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
Split = Literal["pool", "test"]
GOLD = "gold"  # the annotator name that stands for the truth, known to be right
LISTED = "entity-list"  # the one that stands for what a list of names finds in texts, which may be wrong
NO_PERSON = (GOLD, LISTED)  # they are not asked, and their answers cost nothing


@dataclass(frozen=True, slots=True)
class Example:
    """One item of the pool (or of the held-out test part).

    ``id`` is the SHA-256 of the bytes, so the same bytes are the same example wherever they come from.
    """

    id: str
    name: str
    split: Split = "pool"
    source: str = "file"
    groups: Mapping[str, str] = field(default_factory=dict)
    added_at: float = 0.0


@dataclass(frozen=True, slots=True)
class LabelSpace:
    """The class names, in the order of every ``(n, n_classes)`` array; optionally the tree they form.

    ``parents`` maps a name (a class or an inner node) to its parent node; ``scheme`` names the tagging scheme of
    entity labels (``"BIO"``, ``"BIOES"``), and is empty for plain classification.

    >>> space = LabelSpace(("cat", "dog", "car"), parents={"cat": "animal", "dog": "animal"})
    >>> space.mask(["animal"]).tolist()
    [True, True, False]
    """

    names: tuple[str, ...]
    parents: Mapping[str, str] = field(default_factory=dict)
    scheme: str = ""

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            twice = sorted({n for n in self.names if self.names.count(n) > 1})
            raise UsageError(f"the label space names {twice} twice", expected="each class name once")
        nodes = {*self.names, *self.parents.values()}
        for node in self.parents:
            self._ancestors(node)
            if node not in nodes:
                raise UsageError(
                    f"the label tree gives {node!r} a parent", expected="a class, or a node that a class lies under"
                )

    def __len__(self) -> int:
        return len(self.names)

    def _ancestors(self, name: str) -> list[str]:
        path: list[str] = []
        while name in self.parents:
            name = self.parents[name]
            if name in path:
                raise UsageError(f"the label tree has a cycle through {name!r}", expected="a tree")
            path.append(name)
        return path

    def index(self, name: str) -> int:
        """The column of class ``name``. Raises :class:`~trilobe.errors.AnswerError` for a name it does not know."""
        try:
            return self.names.index(name)
        except ValueError:
            known = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
            raise AnswerError(
                f"unknown label {name!r}", expected=f"one of: {known}", hint="correct it, or add it to labels.names"
            ) from None

    def mask(self, names: Sequence[str]) -> BoolArray:
        """Which classes ``names`` cover, inner nodes of the tree included: ``(n_classes,)`` booleans."""
        wanted, nodes = set(names), set(self.names) | set(self.parents.values())
        for name in wanted - nodes:
            self.index(name)
        return np.array([n in wanted or not wanted.isdisjoint(self._ancestors(n)) for n in self.names])


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A labeled stretch of text: Unicode code points ``start`` (included) to ``end`` (excluded)."""

    start: int
    end: int
    label: str


ResponseKind = Literal["class", "one_of", "not", "unsure", "spans", "span_accepted", "span_rejected"]


@dataclass(frozen=True, slots=True)
class Response:
    """What a person said, before anybody decides what it means.

    ========================  ================================================  ==============================
    kind                      meaning                                           filled
    ========================  ================================================  ==============================
    ``class``                 "it is this class"                                ``labels`` (one)
    ``one_of``                "it is one of these" (yes to a partial question)  ``labels``
    ``not``                   "it is none of these" (no to one)                 ``labels``
    ``unsure``                "I can't tell"                                    nothing
    ``spans``                 "these, and no other, are the entities"           ``spans``
    ``span_accepted``         "this span is right"                              ``spans`` (one)
    ``span_rejected``         "this span is wrong"                              ``spans`` (one)
    ========================  ================================================  ==============================

    >>> space = LabelSpace(("a", "b", "c"))
    >>> Response("not", ("a",)).possible(space).tolist()
    [False, True, True]
    """

    kind: ResponseKind
    labels: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(ResponseKind):
            raise AnswerError(
                f"an answer of kind {self.kind!r}", expected=f"one of {', '.join(get_args(ResponseKind))}"
            )
        if (self.labels and self.kind not in ("class", "one_of", "not")) or (self.spans and "span" not in self.kind):
            stray = "spans" if self.spans else "labels"
            raise AnswerError(f"a {self.kind!r} answer with {stray}", expected=f"no {stray} in an answer of this kind")
        if self.kind == "class" and len(self.labels) != 1:
            raise AnswerError(f"a 'class' answer with labels {list(self.labels)}", expected="exactly one label")
        if self.kind in ("one_of", "not") and not self.labels:
            raise AnswerError(f"a {self.kind!r} answer without labels", expected="at least one label")
        if self.kind.startswith("span_") and len(self.spans) != 1:
            raise AnswerError(f"a {self.kind!r} answer with {len(self.spans)} spans", expected="exactly one span")

    def possible(self, space: LabelSpace) -> BoolArray:
        """The classes this answer leaves possible, ``(n_classes,)``; every answer about a class is such a set."""
        if self.kind == "unsure":
            return np.ones(len(space), dtype=bool)
        if self.kind == "class":
            space.index(self.labels[0])
        elif self.kind not in ("one_of", "not"):
            raise AnswerError(f"a {self.kind!r} answer to a question about classes", expected="a class answer")
        mask = space.mask(self.labels)
        mask = ~mask if self.kind == "not" else mask
        if not mask.any():
            said = f"{self.kind!r} {list(self.labels)}"
            raise AnswerError(f"{said} leaves no class possible", expected="at least one class left")
        return mask


@dataclass(frozen=True, slots=True)
class Question:
    """An example and what is asked of it: "which class?" (``choices`` empty) or "is it one of ``choices``?".

    ``strategy`` and ``score`` say why it was chosen (versioned name, higher = asked sooner), ``reason`` says it in
    words, ``assignees`` who should answer.
    """

    id: str
    example_id: str
    choices: tuple[str, ...] = ()
    strategy: str = "random.v1"
    score: float = 0.0
    reason: str = ""
    round: int = 0
    assignees: tuple[str, ...] = ()
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered what, when, in how many seconds. Never edited: a later one of the same person supersedes it."""

    id: str
    question_id: str
    example_id: str
    annotator: str
    response: Response
    seconds: float = 0.0
    answered_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Belief:
    """What all answers on one example amount to.

    ``likelihood`` is P(all answers | class), up to a factor, ``(n_classes,)``, or ``(n_tokens, n_classes)`` for a
    sequence. Zero marks an impossible class, so a noise-free partial answer is a set of ones and zeros, a certain
    label has a single nonzero, and noisy answers are anything between. ``prior`` is what was believed before asking
    (class frequencies or a model's prediction), of a shape that broadcasts to ``likelihood``.

    >>> Belief("x", likelihood=np.array([1.0, 1.0, 0.0]), prior=np.array([0.2, 0.6, 0.2])).proba.round(2).tolist()
    [0.25, 0.75, 0.0]
    """

    example_id: str
    likelihood: FloatArray
    prior: FloatArray
    n_answers: int = 0

    @property
    def proba(self) -> FloatArray:
        """The belief itself: prior x likelihood, normalized over the last axis."""
        joint = self.likelihood * self.prior
        return np.asarray(joint / joint.sum(axis=-1, keepdims=True))

    @property
    def possible(self) -> BoolArray:
        """Which classes the answers leave possible."""
        return np.asarray(self.likelihood > 0)


@dataclass(frozen=True, slots=True)
class Model:
    """Weights and everything needed to use, judge and remake them. ``id`` is the digest of all the rest.

    ``weights`` is the digest of a safetensors blob. ``origin`` records the code version, the data ids' digest, the
    configuration and the seed; ``temperature`` divides the logits (Guo et al. 2017, equation 9).
    """

    id: str
    task: str
    space: LabelSpace
    weights: str
    preprocessing: Mapping[str, Any]
    network: Mapping[str, Any]
    temperature: float = 1.0
    origin: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0


Direction = Literal["at_least", "at_most"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The outcome of one check on one model: a figure with its interval, held against a threshold.

    ``passed`` is None where no gate was set. ``low`` and ``high`` are the ends of a 95% interval (equal to the
    figure where it is exact).
    """

    check: str
    figure: float
    low: float
    high: float
    n: int = 0
    threshold: float | None = None
    direction: Direction = "at_least"
    passed: bool | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A portable folder with a model ready to serve, and the evidence that it may be."""

    id: str
    path: Path
    model_id: str
    manifest: Mapping[str, Any] = field(default_factory=dict)


EndpointState = Literal["creating", "ready", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A name that clients call; what stands behind it can be replaced without a client noticing."""

    name: str
    url: str
    bundle_id: str
    state: EndpointState
    pid: int = 0
    grpc: str = ""


@dataclass(frozen=True, slots=True)
class Capture:
    """A sampled record of one request item and its reply: what was sent, what was said.

    ``input`` is the item as the client sent it (for images ``(height, width, channels)`` unsigned bytes), ``proba``
    the reply ``(n_classes,)``. ``model`` is the name that was called, where that is another than the endpoint's own: a
    model beside it or a pipeline, whose ``bundle_id`` says which bundle's answer it handed on ("": it made its own).
    Of what a shadow said, which nobody heard, ``live`` is the bundle that answered and ``live_proba`` what it answered.
    """

    id: str
    endpoint: str
    bundle_id: str
    at: float
    input: NDArray[Any]
    proba: FloatArray
    model: str = ""
    live: str = ""
    live_proba: FloatArray | None = None

    @property
    def agrees(self) -> bool:
        """Whether a shadow named the class that was answered."""
        return self.live_proba is not None and self.prediction == int(np.argmax(self.live_proba))

    @property
    def prediction(self) -> int:
        """The most probable class."""
        return int(np.argmax(self.proba))

    @property
    def confidence(self) -> float:
        """The probability of the most probable class, 1/n_classes to 1."""
        return float(np.max(self.proba))


FindingKind = Literal["class_share", "low_confidence", "class_drift"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something monitoring noticed: the figure, its interval or p-value, and the captures that caused it."""

    id: str
    endpoint: str
    bundle_id: str
    kind: FindingKind
    message: str
    figure: float
    expected: float
    low: float
    high: float
    p_value: float
    n: int
    capture_ids: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
