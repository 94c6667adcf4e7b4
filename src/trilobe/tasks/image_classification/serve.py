"""The pipeline behind an image endpoint: decode-free pixels in, calibrated probabilities out. No torch."""

import numpy as np

from trilobe.infrastructure.bundle import read_bytes, read_json
from trilobe.infrastructure.pipeline import Arrays, Pipeline, Servable, TensorSpec, onnx_step
from trilobe.statistics import softmax
from trilobe.tasks.image_classification.data import encode
from trilobe.types import Bundle


def servable(bundle: Bundle) -> Servable:
    """What a bundle of an image classifier does with a request.

    Input ``image``: UINT8 ``[n, height, width, channels]`` of any size, as decoded; it is resized here exactly as in
    training. Output ``proba``: FP32 ``[n, n_classes]``, calibrated.
    """
    preprocessing = read_json(bundle, "preprocessing.json")
    temperature = float(read_json(bundle, "calibration.json")["temperature"])
    n_classes = len(read_json(bundle, "labels.json")["names"])

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
        outputs=(TensorSpec("proba", "FP32", (-1, n_classes)),),
        warmup={"image": example},
    )
