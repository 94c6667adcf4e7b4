"""The pipeline behind an image endpoint: pixels in, calibrated probabilities out. No torch.

Image files are decoded by a step before it, :func:`decode_gray` or :func:`decode_color`, once for all models of a
pipeline.
"""

import json

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import DataError
from trilobe.infrastructure.bundle import read_bytes, read_json
from trilobe.infrastructure.pipeline import Arrays, Pipeline, Servable, TensorSpec, onnx_step
from trilobe.infrastructure.serve.graph import function
from trilobe.statistics import softmax
from trilobe.tasks.image_classification.data import Pixels, decode, encode, fit_channels
from trilobe.types import Bundle


def servable(bundle: Bundle) -> Servable:
    """What a bundle of an image classifier does with a request.

    Input ``image``: UINT8 ``[n, height, width, channels]`` of any size, as decoded; it is resized here exactly as in
    training. Output ``proba``: FP32 ``[n, n_classes]``, calibrated.
    """
    preprocessing = read_json(bundle, "preprocessing.json")
    temperature = float(read_json(bundle, "calibration.json")["temperature"])
    names = read_json(bundle, "labels.json")["names"]

    def prepare(arrays: Arrays) -> Arrays:
        return {"x": encode(arrays["image"], preprocessing)}

    def calibrate(arrays: Arrays) -> Arrays:
        return {"proba": softmax(arrays["logits"], temperature).astype(np.float32)}

    channels = int(preprocessing["channels"])
    model = onnx_step(read_bytes(bundle, "model.onnx"))
    example = np.zeros((1, int(preprocessing["height"]), int(preprocessing["width"]), channels), dtype=np.uint8)
    return Servable(
        Pipeline([("preprocess", prepare), model, ("calibrate", calibrate)]),
        inputs=(TensorSpec("image", "UINT8", (-1, -1, -1, channels)),),
        outputs=(TensorSpec("proba", "FP32", (-1, len(names))),),
        warmup={"image": example},
        preparation=json.dumps(preprocessing, sort_keys=True),
        labels={"proba": names},
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
    images = [fit_channels(decode(data), channels) for data in files]
    if len({image.shape for image in images}) > 1:
        raise DataError(
            f"images of the sizes {sorted({image.shape[:2] for image in images})} in one request",
            expected="one size (height, width)",
            hint="send them in requests of their own",
        )
    return np.stack(images)
