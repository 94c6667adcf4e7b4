"""The tasks: what the loop must know about images, texts or entities, and nothing it need not.

A task is an object with the members of :class:`Task`. Each lives in a folder with the same file names: ``data.py``
(bytes to items to arrays), ``model.py`` (the network), ``metrics.py`` (what is measured), ``report.py`` (what people
see), ``serve.py`` (the pipeline behind an endpoint). The loop calls nothing else: a new task is a new folder and a line
in :data:`TASKS`. What the two tasks about texts share stands in ``words.py`` and ``pretrained.py``.

An *item* is an example decoded: pixels, or a text. Beliefs have one row per example, or per token of it: that is
decided by :meth:`Task.possible`, and every other part follows from the shapes (see :mod:`trilobe.rows`).
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from numpy.typing import NDArray

from trilobe.config import Config
from trilobe.errors import UsageError
from trilobe.types import BoolArray, Bundle, Evidence, FloatArray, LabelSpace, Response

if TYPE_CHECKING:
    from torch import nn

    from trilobe.infrastructure.pipeline import Servable

Item = Any


class Part(NamedTuple):
    """One example of a file: its bytes, what the file says is true of it, and where in the file it stands."""

    data: bytes
    truth: Response | None = None
    where: str = ""


class Words(NamedTuple):
    """What people call things in this task: used in reports and remarks, never in decisions.

    ``noun`` is what an example is; ``same`` when two are the same; ``torn`` why a question was chosen; ``attack`` and
    ``strength`` what an attack does, and how a chart names its strength (formatted with it); ``why`` how an explanation
    comes about.
    """

    noun: str
    same: str
    torn: str
    attack: str
    strength: str
    why: str


class Task(Protocol):
    """What the loop asks of a task.

    Besides its methods: the ``suffixes`` of its files, the ``strategy`` that asks best by default, the versioned name
    of its network (``architecture``), how many ``free_axes`` its input has (2: examples, and tokens), and its words.
    """

    name: str
    suffixes: frozenset[str]
    strategy: str
    architecture: str
    free_axes: int
    words: Words

    def space(self, config: Config) -> LabelSpace:
        """The columns of every prediction, from the settings: the classes, or the tags made of the entity labels."""
        ...

    def watched_space(self, space: LabelSpace) -> LabelSpace:
        """What monitoring counts: the classes, or the entity labels and "O"."""
        ...

    def read(self, data: bytes, suffix: str, config: Config) -> list[Part]:
        """The examples in a file. Raises :class:`~trilobe.errors.UnreadableExample` saying what is wrong with it."""
        ...

    def decode(self, data: bytes, config: Config) -> Item:
        """The item in an example's bytes. Raises :class:`~trilobe.errors.UnreadableExample`, as :meth:`read` does."""
        ...

    def captured(self, sent: NDArray[Any]) -> Item:
        """The item in what a client sent."""
        ...

    def to_bytes(self, item: Item) -> bytes:
        """An item as a file, so that a captured request can become an example. ``decode`` of it gives the item back."""
        ...

    def content(self, item: Item) -> str:
        """A digest of what a person would see: equal for the same item in two encodings."""
        ...

    def preprocessing(self, items: Sequence[Item], config: Config) -> dict[str, Any]:
        """How items of this pool become network input: plain values that travel in the bundle."""
        ...

    def encode(self, items: Sequence[Item], preprocessing: Mapping[str, Any]) -> FloatArray:
        """Items as network input, ``n`` rows. The one preprocessing of training and serving."""
        ...

    def network(self, preprocessing: Mapping[str, Any], space: LabelSpace, width: int, seed: int) -> "nn.Module":
        """A fresh network from input to logits."""
        ...

    def augment(self, config: Config) -> Callable[..., Any] | None:
        """How a training batch may be varied, or None."""
        ...

    def features(self, module: "nn.Module | None", X: FloatArray) -> FloatArray:
        """``(n, n_features)`` to judge likeness by; of the input itself while there is no model."""
        ...

    def possible(self, response: Response, space: LabelSpace, item: Callable[[], Item]) -> BoolArray:
        """What an answer leaves possible: ``(n_classes,)``, or ``(n_tokens, n_classes)``.

        Raises :class:`~trilobe.errors.AnswerError` for one that does not fit; ``item`` is called where it is needed.
        """
        ...

    def response(self, proba: FloatArray, space: LabelSpace, item: Callable[[], Item]) -> tuple[Response, float]:
        """What a prediction or a belief of one example says, as an answer would, and how probable that is."""
        ...

    def finish(self, output: FloatArray, weights: Mapping[str, NDArray[Any]]) -> FloatArray:
        """The logits of one example from what the exported graph gives for it: the same, or what a CRF makes of it."""
        ...

    def watched(self, proba: FloatArray, space: LabelSpace) -> FloatArray:
        """One row for each example of predictions, over :meth:`watched_space`: what is captured and monitored."""
        ...

    def measure(self, proba: FloatArray, labels: Any, space: LabelSpace) -> list[Evidence]:
        """Figures of a prediction against the truth; the first is the one that goals and learning curves are about."""
        ...

    def attack(self, module: "nn.Module", X: FloatArray, labels: Any, config: Config) -> list[Evidence]:
        """Figures under attack, strongest last."""
        ...

    def servable(self, bundle: Bundle) -> "Servable":
        """The pipeline behind an endpoint, from a bundle alone."""
        ...

    def explain(self, module: "nn.Module", items: Sequence[Item], X: FloatArray) -> list[tuple[bytes, bytes, float]]:
        """Per item: a picture of it, a picture of why it was judged so, and how incomplete that is (0 = complete).

        Pictures are PNG or SVG files.
        """
        ...

    def picture(self, item: Item) -> bytes:
        """A PNG or SVG a person can look at."""
        ...

    def terminal(self, item: Item) -> str:
        """The item drawn with the characters of a terminal."""
        ...


TASKS = {
    "image_classification": "ImageClassification",
    "text_classification": "TextClassification",
    "entity_recognition": "EntityRecognition",
}


def get(name: str) -> Task:
    """The task of that name.

    >>> get("image_classification").name
    'image_classification'
    """
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}", expected=", ".join(map(repr, TASKS)))
    task: Task = getattr(import_module(f"{__name__}.{name}"), TASKS[name])()
    return task
