"""The pipeline behind a text classifier's endpoint: texts in, calibrated probabilities out.

No torch, unless a frozen encoder needs it.
"""

import json

import numpy as np

from trilobe.infrastructure.bundle import read_bytes, read_json
from trilobe.infrastructure.pipeline import Arrays, Pipeline, Servable, TensorSpec
from trilobe.statistics import softmax
from trilobe.tasks.text_classification.data import encode
from trilobe.tasks.texts import graph_step, objects, sent_texts
from trilobe.types import Bundle


def servable(bundle: Bundle) -> Servable:
    """What a bundle of a text classifier does with a request.

    Input ``text``: BYTES ``[n]``, UTF-8; a long one is cut exactly as in training. Output ``proba``: FP32
    ``[n, n_classes]``, calibrated.
    """
    preprocessing = read_json(bundle, "preprocessing.json")
    temperature = float(read_json(bundle, "calibration.json")["temperature"])
    names = read_json(bundle, "labels.json")["names"]

    def prepare(arrays: Arrays) -> Arrays:
        return {"rows": objects(list(encode(sent_texts(arrays), preprocessing)))}

    def calibrate(arrays: Arrays) -> Arrays:
        return {"proba": softmax(np.stack(list(arrays["outputs"])), temperature).astype(np.float32)}

    return Servable(
        Pipeline([("preprocess", prepare), graph_step(read_bytes(bundle, "model.onnx")), ("calibrate", calibrate)]),
        inputs=(TensorSpec("text", "BYTES", (-1,)),),
        outputs=(TensorSpec("proba", "FP32", (-1, len(names))),),
        warmup={"text": objects([b"Warm up."])},
        preparation=json.dumps(preprocessing, sort_keys=True),
        labels={"proba": names},
    )
