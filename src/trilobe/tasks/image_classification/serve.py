"""The pipeline behind an image endpoint: pixels or image files in, calibrated probabilities out. No torch.

In a pipeline of several models, files are decoded by a step before them, :func:`decode_gray` or :func:`decode_color`,
once for all.
"""

import json
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import DataError, UnreadableExample
from trilobe.infrastructure.bundle import read_bytes, read_json
from trilobe.infrastructure.pipeline import Arrays, Pipeline, Servable, TensorSpec, onnx_step
from trilobe.infrastructure.serve.graph import function
from trilobe.statistics import softmax
from trilobe.tasks.image_classification.data import Pixels, decode, encode, fit_channels
from trilobe.types import Bundle

MAX_PIXELS = 25_000_000  # of all files in one request: a short file may hold many, and each takes memory and time
SMALL = 1_000_000  # pixels of a file that may be decoded beside others; a pixel takes up to 20 bytes meanwhile
_one_at_a_time = threading.Lock()


def servable(bundle: Bundle) -> Servable:
    """What a bundle of an image classifier does with a request.

    Input ``image``: UINT8 ``[n, height, width, channels]`` of any size, as decoded; it is resized here exactly as in
    training. In its place may come files (PNG, JPEG and others): BYTES ``[n]``, of any sizes, read and resized exactly
    as in training. Output ``proba``: FP32 ``[n, n_classes]``, calibrated.
    """
    preprocessing = read_json(bundle, "preprocessing.json")
    temperature = float(read_json(bundle, "calibration.json")["temperature"])
    names = read_json(bundle, "labels.json")["names"]

    def prepare(arrays: Arrays) -> Arrays:
        return {"x": encode(arrays["image"], preprocessing)}

    def read(arrays: Arrays) -> Arrays:
        return {"x": np.concatenate([encode([pixels], preprocessing) for pixels in _decoded(arrays["image"])])}

    def calibrate(arrays: Arrays) -> Arrays:
        return {"proba": softmax(arrays["logits"], temperature).astype(np.float32)}

    channels = int(preprocessing["channels"])
    model = onnx_step(read_bytes(bundle, "model.onnx"))
    example = np.zeros((1, int(preprocessing["height"]), int(preprocessing["width"]), channels), dtype=np.uint8)
    rest = [model, ("calibrate", calibrate)]
    outputs = (TensorSpec("proba", "FP32", (-1, len(names))),)
    return Servable(
        Pipeline([("preprocess", prepare), *rest]),
        inputs=(TensorSpec("image", "UINT8", (-1, -1, -1, channels)),),
        outputs=outputs,
        warmup={"image": example},
        preparation=json.dumps(preprocessing, sort_keys=True),
        labels={"proba": names},
        files=Servable(Pipeline([("read", read), *rest]), (TensorSpec("image", "BYTES", (-1,)),), outputs, {}),
    )


@function({"photo": "BYTES[-1]"}, {"image": "UINT8[-1,-1,-1,1]"}, joins=False)
def decode_gray(photo: NDArray[np.object_]) -> Arrays:
    """Image files (PNG, JPEG and others) to gray pixels, exactly as they are read for training."""
    return {"image": _pixels(photo, 1)}


@function({"photo": "BYTES[-1]"}, {"image": "UINT8[-1,-1,-1,3]"}, joins=False)
def decode_color(photo: NDArray[np.object_]) -> Arrays:
    """Image files (PNG, JPEG and others) to RGB pixels, exactly as they are read for training."""
    return {"image": _pixels(photo, 3)}


def _pixels(files: NDArray[np.object_], channels: int) -> Pixels:
    images = [fit_channels(pixels, channels) for pixels in _decoded(files)]
    if len({image.shape for image in images}) > 1:
        raise DataError(
            f"images of the sizes {sorted({image.shape[:2] for image in images})} in one request",
            expected="one size (height, width)",
            hint="send them in requests of their own",
        )
    return np.stack(images)


def _decoded(files: NDArray[np.object_]) -> Iterator[Pixels]:
    """The pixels of each file, refused where it cannot be read, or before it is where a request holds too many."""
    left = MAX_PIXELS
    for i, data in enumerate(files):
        try:
            pixels = _read(data, left)
        except UnreadableExample as e:
            which = f"file {i + 1} of {len(files)}: " if len(files) > 1 else ""
            hint = e.hint and f"scale it down: the files of a request may hold {MAX_PIXELS:,} pixels in all"
            raise DataError(f"{which}{e.problem}", expected=e.expected, hint=hint) from e
        left -= pixels.shape[0] * pixels.shape[1]
        yield pixels


def _read(data: bytes, most: int) -> Pixels:
    try:
        return decode(data, min(most, SMALL))
    except UnreadableExample:  # large, or not an image at all
        with _one_at_a_time:
            return decode(data, most)
