"""Our server around the small network: ``python ours.py BUNDLE PORT WORKERS [FOLDER]``.

Any bundle with a ``model.onnx`` that takes ``image`` and gives ``proba`` will do; :func:`make_bundle` makes one.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, read_bytes, write_bundle
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec, onnx_step
from trilobe.infrastructure.serve import Settings, serve_forever
from trilobe.types import Bundle

IMAGE = TensorSpec("image", "FP32", (-1, 1, 28, 28))
PROBA = TensorSpec("proba", "FP32", (-1, 10))


def make_bundle(folder: Path, model: bytes, name: str = "cnn") -> Path:
    """A bundle of one graph in ``folder``."""
    files = {**dict.fromkeys(REQUIRED_FILES, b"{}"), "model.onnx": model}
    return write_bundle(folder, files, name, {}).path


def load(bundle: Bundle) -> Servable:
    """What such a bundle means: the graph, from 28x28 images to ten probabilities."""
    pipeline = Pipeline([onnx_step(read_bytes(bundle, "model.onnx"))])
    return Servable(pipeline, (IMAGE,), (PROBA,), {"image": np.zeros((1, 1, 28, 28), np.float32)})


def serve(bundle: Path, port: int, workers: int, folder: Path) -> None:
    """Serve it as ``cnn`` from ``folder``, where it may be replaced, until told to stop."""
    endpoint.deploy(folder, bundle)
    serve_forever(folder, "cnn", load, folder / "captures", port=port, settings=Settings(workers=workers))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(sys.argv[4] if len(sys.argv) > 4 else temporary)
        serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), where)
