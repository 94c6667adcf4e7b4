"""Image classification: which of the classes does a picture show?

This file names the parts; each part lives in the file of its kind.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trilobe.config import Config
from trilobe.tasks import Part, Words
from trilobe.tasks.image_classification import data as images
from trilobe.tasks.image_classification import report
from trilobe.types import BoolArray, Bundle, Evidence, FloatArray, LabelSpace, Response

if TYPE_CHECKING:
    from torch import nn

    from trilobe.infrastructure.pipeline import Servable

Pixels = images.Pixels


class ImageClassification:
    """The members of :class:`trilobe.tasks.Task` for pictures; an item is pixels ``(height, width, 1 or 3)`` uint8."""

    name = "image_classification"
    suffixes = images.SUFFIXES
    strategy = "margin"
    architecture = "small_convnet.v1"
    free_axes = 1
    words = Words(
        noun="picture",
        same="it is recognized by its pixels, also in another file format",
        torn="the model is torn between classes",
        attack="The attack is projected gradient descent (Madry et al. 2018): it knows the network and changes each "
        "pixel by at most the stated share of the range from black to white.",
        strength="pixels ±{:.0%}",
        why="FullGrad (Srinivas and Fleuret 2019) divides the model's score among the pixels and the network's biases, "
        "completely",
    )

    def space(self, config: Config) -> LabelSpace:
        """The classes of the settings."""
        return config.space

    def watched_space(self, space: LabelSpace) -> LabelSpace:
        """The classes."""
        return space

    def read(self, data: bytes, suffix: str, config: Config) -> list[Part]:
        """One picture a file."""
        self.decode(data, config)
        return [Part(data)]

    def captured(self, sent: NDArray[Any]) -> Pixels:
        """The pixels, as they came; where a file came (to a pipeline that decodes it), those in it."""
        return images.decode(sent.tobytes()) if sent.ndim == 1 else sent

    def decode(self, data: bytes, config: Config) -> Pixels:
        """Pixels of an image file; see :func:`.data.decode`."""
        return images.decode(data, config.image.max_pixels)

    def to_bytes(self, item: Pixels) -> bytes:
        """A PNG of the pixels."""
        return images.encode_png(item)

    def content(self, item: Pixels) -> str:
        """Digest of the pixels."""
        return images.content_digest(item)

    def preprocessing(self, items: Sequence[Pixels], config: Config) -> dict[str, Any]:
        """Size and channels that suit the pool, and where the network comes from if it is not ours."""
        spec = images.choose_preprocessing([i.shape for i in items], config.image.size)
        return spec | ({"network": config.image.network} if config.image.network else {})

    def encode(self, items: Sequence[Pixels], preprocessing: Mapping[str, Any]) -> FloatArray:
        """``(n, channels, height, width)`` float32, 0 to 1."""
        return images.encode(items, preprocessing)

    def network(self, preprocessing: Mapping[str, Any], space: LabelSpace, width: int, seed: int) -> "nn.Module":
        """The small convolutional network of :mod:`.model`, or the one that ``image.network`` names."""
        from trilobe.tasks.image_classification import model

        if where := preprocessing.get("network"):
            return model.imported(str(where), preprocessing, len(space), seed)
        return model.network(preprocessing, len(space), width, seed)

    def augment(self, config: Config) -> Callable[..., Any] | None:
        """Small turns, moves and scales."""
        from trilobe.tasks.image_classification.model import vary

        return vary if config.train.augment else None

    def features(self, module: "nn.Module | None", X: FloatArray) -> FloatArray:
        """What the network's last layer sees; the pixels while there is no network."""
        if module is None:
            return X.reshape(len(X), -1)
        import torch

        from trilobe.tasks.image_classification.model import features

        return np.asarray(features(module.eval(), torch.from_numpy(X)).numpy())

    def possible(self, response: Response, space: LabelSpace, item: Callable[[], Pixels]) -> BoolArray:
        """The classes an answer leaves possible."""
        return response.possible(space)

    def response(self, proba: FloatArray, space: LabelSpace, item: Callable[[], Pixels]) -> tuple[Response, float]:
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
        """Accuracy and expected calibration error."""
        from trilobe.tasks.image_classification.metrics import measure

        return measure(proba, labels)

    def attack(self, module: "nn.Module", X: FloatArray, labels: Any, config: Config) -> list[Evidence]:
        """Accuracy under projected gradient descent at each strength of ``check.eps``."""
        from trilobe.tasks.image_classification.metrics import attack

        return attack(module, X, labels, config)

    def servable(self, bundle: Bundle) -> "Servable":
        """Pixels in, probabilities out."""
        from trilobe.tasks.image_classification.serve import servable

        return servable(bundle)

    def explain(self, module: "nn.Module", items: Sequence[Pixels], X: FloatArray) -> list[tuple[bytes, bytes, float]]:
        """The picture, its FullGrad heat map, and the completeness residual."""
        return report.explain(module, items, X)

    def picture(self, item: Pixels) -> bytes:
        """A PNG, small images enlarged."""
        return report.picture(item)

    def terminal(self, item: Pixels) -> str:
        """Half blocks in gray."""
        return report.terminal(item)
