"""Text classification: which of the classes is a text about?

This file names the parts; each part lives in the file of its kind, or in what the tasks about texts share.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from trilobe.config import Config
from trilobe.tasks import Part, Words, drawing, reading, texts
from trilobe.tasks.text_classification import data, report
from trilobe.tasks.words import decode, to_bytes
from trilobe.types import BoolArray, Bundle, Evidence, FloatArray, LabelSpace, Response

if TYPE_CHECKING:
    from torch import nn

    from trilobe.infrastructure.pipeline import Servable


class TextClassification:
    """The members of :class:`trilobe.tasks.Task` for texts of a class; an item is a text."""

    name = "text_classification"
    suffixes = reading.SUFFIXES
    strategy = "margin"
    architecture = "word_classifier.v1"
    free_axes = 2
    words = Words(
        noun="text",
        same="it is recognized by its words, whatever the spaces between them",
        torn="the model is torn between classes",
        attack="The attack hides words: in each text the stated share of them, at random, in several draws; a text "
        "counts only if none of them makes it wrong.",
        strength="{:.0%} of the words",
        why="a word counts by how far the probability of the predicted class falls when it is hidden",
    )

    def space(self, config: Config) -> LabelSpace:
        """The classes of the settings."""
        return config.space

    def watched_space(self, space: LabelSpace) -> LabelSpace:
        """The classes."""
        return space

    def read(self, data: bytes, suffix: str, config: Config) -> list[Part]:
        """The texts of a file with their classes; see :func:`.texts.read`."""
        return [Part(*found) for found in texts.read(data, suffix)]

    def decode(self, data: bytes, config: Config) -> str:
        """A text; see :func:`.words.decode`."""
        return decode(data)

    def captured(self, sent: NDArray[Any]) -> str:
        """The text in the bytes a client sent."""
        return texts.captured(sent)

    def to_bytes(self, item: str) -> bytes:
        """UTF-8."""
        return to_bytes(item)

    def content(self, item: str) -> str:
        """Digest of the words."""
        return texts.content(item)

    def preprocessing(self, items: Sequence[str], config: Config) -> dict[str, Any]:
        """Buckets for the words of the pool, and the frozen encoder of the settings."""
        return texts.preprocessing(items, config)

    def encode(self, items: Sequence[str], preprocessing: Mapping[str, Any]) -> FloatArray:
        """Rows ``(n_words, columns)`` float32."""
        return data.encode(items, preprocessing)

    def network(self, preprocessing: Mapping[str, Any], space: LabelSpace, width: int, seed: int) -> "nn.Module":
        """The small network of :mod:`.model`."""
        from trilobe.tasks.text_classification.model import network

        return network(preprocessing, len(space), width, seed)

    def augment(self, config: Config) -> Callable[..., Any] | None:
        """Nothing: the network hides words by itself while it trains."""
        return None

    def features(self, module: "nn.Module | None", X: FloatArray) -> FloatArray:
        """What the network's last layer sees; the words while there is no network."""
        if module is None:
            return texts.bag(X)
        from trilobe.algorithms.encoders import features

        return features(module.encoder, X)  # type: ignore[arg-type]

    def possible(self, response: Response, space: LabelSpace, item: Callable[[], str]) -> BoolArray:
        """The classes an answer leaves possible."""
        return response.possible(space)

    def response(self, proba: FloatArray, space: LabelSpace, item: Callable[[], str]) -> tuple[Response, float]:
        """The most probable class."""
        best = int(proba.argmax())
        return Response("class", (space.names[best],)), float(proba[best])

    def finish(self, output: FloatArray, weights: Mapping[str, NDArray[Any]]) -> FloatArray:
        """The logits, as they are."""
        return output

    def watched(self, proba: FloatArray, space: LabelSpace) -> FloatArray:
        """The predictions themselves."""
        return proba

    def measure(self, proba: FloatArray, labels: Any, space: LabelSpace) -> list[Evidence]:
        """Accuracy, calibration error, Brier score, log loss."""
        from trilobe.tasks.text_classification.metrics import measure

        return measure(proba, labels)

    def attack(self, module: "nn.Module", X: FloatArray, labels: Any, config: Config) -> list[Evidence]:
        """Accuracy with a share ``check.eps`` of the words hidden."""
        from trilobe.tasks.text_classification.metrics import attack

        return attack(module, X, labels, config)

    def servable(self, bundle: Bundle) -> "Servable":
        """Texts in, probabilities out."""
        from trilobe.tasks.text_classification.serve import servable

        return servable(bundle)

    def explain(self, module: "nn.Module", items: Sequence[str], X: FloatArray) -> list[tuple[bytes, bytes, float]]:
        """The text, and the words its class rests on."""
        return report.explain(module, items, X)

    def picture(self, item: str) -> bytes:
        """An SVG of the text."""
        return drawing.draw(item)

    def terminal(self, item: str) -> str:
        """The text in lines."""
        return drawing.terminal(item)
