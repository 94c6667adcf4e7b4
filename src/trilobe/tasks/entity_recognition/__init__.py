"""Entity recognition: which stretches of a text are names of what?

This file names the parts; each part lives in the file of its kind, or in what the tasks about texts share.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trilobe.config import Config
from trilobe.data.tags import possible_tags, tag_space
from trilobe.tasks import Part, Words, drawing, reading, texts
from trilobe.tasks.entity_recognition import data, report
from trilobe.tasks.words import decode, to_bytes, tokenize
from trilobe.types import BoolArray, Bundle, Evidence, FloatArray, LabelSpace, Response

if TYPE_CHECKING:
    from torch import nn

    from trilobe.infrastructure.pipeline import Servable


class EntityRecognition:
    """The members of :class:`trilobe.tasks.Task` for entities; an item is a text, a belief has a row for each word."""

    name = "entity_recognition"
    suffixes = reading.SUFFIXES
    strategy = "mnlp"
    architecture = "word_tagger.v1"
    free_axes = 2
    words = Words(
        noun="text",
        same="it is recognized by its characters",
        torn="the model is torn between entities",
        attack="The attack hides words: in each text the stated share of them, at random, and of several draws the one "
        "that costs most entities counts. The figure is the F1 of the entities that are left.",
        strength="{:.0%} of the words",
        why="a word counts by how far the probability of the predicted entities falls when it is hidden",
    )

    def space(self, config: Config) -> LabelSpace:
        """The tags that the labels of the settings make."""
        return tag_space(config.label_names(), config.labels.scheme)

    def watched_space(self, space: LabelSpace) -> LabelSpace:
        """The labels, and "O" for no entity."""
        return LabelSpace(("O", *data.entity_labels(space)))

    def read(self, data: bytes, suffix: str, config: Config) -> list[Part]:
        """The texts of a file with their spans; long ones in parts. See :func:`.texts.read`."""
        return [Part(*found) for found in texts.read(data, suffix, config.text.max_tokens)]

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
        """Digest of all characters: spans count every one of them, spaces too."""
        return texts.content(item, exact=True)

    def preprocessing(self, items: Sequence[str], config: Config) -> dict[str, Any]:
        """Buckets for the words of the pool, and the frozen encoder of the settings."""
        return texts.preprocessing(items, config)

    def encode(self, items: Sequence[str], preprocessing: Mapping[str, Any]) -> FloatArray:
        """Rows ``(n_words, columns)`` float32."""
        return texts.encode(items, preprocessing)

    def network(self, preprocessing: Mapping[str, Any], space: LabelSpace, width: int, seed: int) -> "nn.Module":
        """The small tagger of :mod:`.model`."""
        from trilobe.tasks.entity_recognition.model import network

        return network(preprocessing, space, width, seed)

    def augment(self, config: Config) -> Callable[..., Any] | None:
        """Nothing: the network hides words by itself while it trains."""
        return None

    def features(self, module: "nn.Module | None", X: FloatArray) -> FloatArray:
        """What the network's encoder says of a text; its words while there is no network."""
        if module is None:
            return texts.bag(X)
        from trilobe.algorithms.encoders import features

        return features(module.encoder, X)  # type: ignore[arg-type]

    def possible(self, response: Response, space: LabelSpace, item: Callable[[], str]) -> BoolArray:
        """The tags an answer leaves possible for each word."""
        text = item()
        reading.check_spans(response.spans, len(text))
        return possible_tags(response, tokenize(text), space)

    def response(self, proba: FloatArray, space: LabelSpace, item: Callable[[], str]) -> tuple[Response, float]:
        """The best legal spans, and the probability of the least certain tag: at most that all of them are right."""
        tags = data.best_tags(proba, space)
        found = data.spans(proba, space, tokenize(item()))
        return Response("spans", spans=tuple(found)), float(proba[np.arange(len(tags)), tags].min())

    def finish(self, output: FloatArray, weights: Mapping[str, NDArray[Any]]) -> FloatArray:
        """The CRF's log marginals, from the scores that the graph gives."""
        return data.log_marginals(output, weights)

    def watched(self, proba: FloatArray, space: LabelSpace) -> FloatArray:
        """The least certain word of each text, over "O" and the labels."""
        return data.watched(proba, space)

    def measure(self, proba: FloatArray, labels: Any, space: LabelSpace) -> list[Evidence]:
        """Entity F1, precision, recall; the words' accuracy and calibration error."""
        from trilobe.tasks.entity_recognition.metrics import measure

        return measure(proba, labels, space)

    def attack(self, module: "nn.Module", X: FloatArray, labels: Any, config: Config) -> list[Evidence]:
        """Entity F1 with a share ``check.eps`` of the words hidden."""
        from trilobe.tasks.entity_recognition.metrics import attack

        return attack(module, X, labels, config, self.space(config))

    def servable(self, bundle: Bundle) -> "Servable":
        """Texts in, entities out."""
        from trilobe.tasks.entity_recognition.serve import servable

        return servable(bundle)

    def explain(self, module: "nn.Module", items: Sequence[str], X: FloatArray) -> list[tuple[bytes, bytes, float]]:
        """The text with its entities, and with the words they rest on."""
        return report.explain(module, items, X)

    def picture(self, item: str) -> bytes:
        """An SVG of the text."""
        return report.picture(item)

    def terminal(self, item: str) -> str:
        """The text in lines."""
        return drawing.terminal(item)
