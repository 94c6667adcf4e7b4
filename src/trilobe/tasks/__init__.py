"""The tasks: what the loop must know about images, texts or entities, and nothing it need not.

A task is an object with the members of :class:`Task`. Each lives in a folder with the same file names: ``data.py``
(bytes to items to arrays), ``model.py`` (the network), ``metrics.py`` (what is measured), ``report.py`` (what people
see), ``serve.py`` (the pipeline behind an endpoint). The loop calls nothing else: a new task is a new folder and a line
in :func:`get`.

An *item* is an example decoded: pixels, a text, tokens. Beliefs have one row per example, or per token of it: that is
decided by :meth:`Task.possible`, and every other part follows from the shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trilobe.config import Config
from trilobe.errors import UsageError
from trilobe.types import Answer, BoolArray, Bundle, Evidence, FloatArray, LabelSpace

if TYPE_CHECKING:
    from torch import nn

    from trilobe.infrastructure.pipeline import Servable

Item = Any


class Task(Protocol):
    """What the loop asks of a task."""

    name: str
    suffixes: frozenset[str]

    def decode(self, data: bytes, config: Config) -> Item:
        """The item in a file. Raises :class:`~trilobe.errors.UnreadableExample` saying what is wrong with the bytes."""
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

    def possible(self, answer: Answer, space: LabelSpace) -> BoolArray:
        """What an answer leaves possible: ``(n_classes,)``, or ``(n_tokens, n_classes)``."""
        ...

    def measure(self, proba: FloatArray, labels: Any, space: LabelSpace) -> list[Evidence]:
        """Figures of a prediction against the truth; the first is the one that goals and gates call accuracy."""
        ...

    def attack(self, module: "nn.Module", X: FloatArray, labels: Any, config: Config) -> list[Evidence]:
        """Figures under attack, strongest last."""
        ...

    def servable(self, bundle: Bundle) -> "Servable":
        """The pipeline behind an endpoint, from a bundle alone."""
        ...

    def explain(self, module: "nn.Module", items: Sequence[Item], X: FloatArray) -> list[tuple[bytes, bytes, float]]:
        """Per item: a picture of it, a picture of why it was judged so, and how incomplete that is (0 = complete)."""
        ...

    def picture(self, item: Item) -> bytes:
        """A PNG a person can look at."""
        ...

    def terminal(self, item: Item) -> str:
        """The item drawn with the characters of a terminal."""
        ...


def get(name: str) -> Task:
    """The task of that name.

    >>> get("image_classification").name
    'image_classification'
    """
    if name == "image_classification":
        from trilobe.tasks.image_classification import ImageClassification

        return ImageClassification()
    raise UsageError(f"unknown task {name!r}", expected="'image_classification'")
