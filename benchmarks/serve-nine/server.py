"""Our server with nine models and one pipeline over all of them: ``python server.py BUNDLES PORT WORKERS``."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from photo import MODELS, SIZE, prepare

from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import read_bytes
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec, onnx_step
from trilobe.infrastructure.serve import Flow, Node, Settings, function, graph, serve_forever
from trilobe.types import Bundle

IMAGE = f"FP32[-1,3,{SIZE},{SIZE}]"
NAMES = [f"m{i}" for i in range(MODELS)]


def load(bundle: Bundle) -> Servable:
    """One of the nine: from the prepared image to ten probabilities."""
    image, proba = TensorSpec.parse("image", IMAGE), TensorSpec("proba", "FP32", (-1, 10))
    example = {"image": np.zeros((1, 3, SIZE, SIZE), np.float32)}
    return Servable(Pipeline([onnx_step(read_bytes(bundle, "model.onnx"))]), (image,), (proba,), example)


@function({"photo": "BYTES[-1]"}, {"image": IMAGE})
def decode(photo: Any) -> dict[str, Any]:
    """Each photo once, for all models."""
    return {"image": np.concatenate([prepare(data) for data in photo])}


def pipeline() -> Flow:
    """One compressed photo in, nine answers out."""
    nodes = {name: Node(name, {"image": "decode.image"}) for name in NAMES}
    outputs = {name.replace("m", "p"): f"{name}.proba" for name in NAMES}
    return graph("nine", {"photo": "BYTES[-1]"}, outputs, {"decode": Node(decode, {"photo": "photo"}), **nodes})


if __name__ == "__main__":
    bundles, port, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in NAMES:
            endpoint.deploy(folder, bundles / name, name)
        settings = Settings(workers=workers, flows=(pipeline(),))
        serve_forever(folder, "nine-models", load, folder / "captures", port=port, settings=settings)
