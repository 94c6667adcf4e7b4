"""Our server with one sound model and one with a trap: ``python server.py FOLDER PORT WORKERS WHERE LIMIT MAX_MEMORY``.

FOLDER has the bundles ``sound`` and ``trapped`` (and becomes the endpoint's folder). A row of ``trapped`` whose first
pixel is one of the numbers below makes its first step go wrong, as code that people write does.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "serve-peers"))
from ours import IMAGE, PROBA

from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import read_bytes
from trilobe.infrastructure.pipeline import Pipeline, Servable, onnx_step
from trilobe.infrastructure.serve import Batching, Settings, serve_forever
from trilobe.types import Bundle

RAISES, HANGS, MISSHAPES, LEAKS = 1e6, 2e6, 3e6, 4e6
LEAK_BYTES = 8_000_000
kept: list[Any] = []


def trap(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a faulty step does with the rows that are marked."""
    image = data["image"]
    marks = image[:, 0, 0, 0]
    if (marks == RAISES).any():
        raise ValueError("this step has a bug")
    if (marks == HANGS).any():
        time.sleep(3600)
    if (marks == MISSHAPES).any():
        return {"image": image[:-1] if len(image) > 1 else image[:, :, :1, :1].repeat(2, axis=0)}
    if (marks == LEAKS).any():
        kept.append(np.ones(LEAK_BYTES, np.uint8))
    return {"image": image}


def load(bundle: Bundle) -> Servable:
    """The network, behind the trap where the bundle's model is called so."""
    steps = [onnx_step(read_bytes(bundle, "model.onnx"))]
    if bundle.model_id == "trapped":
        steps.insert(0, ("trap", trap))
    return Servable(Pipeline(steps), (IMAGE,), (PROBA,), {"image": np.zeros((1, 1, 28, 28), np.float32)})


if __name__ == "__main__":
    folder, port, workers, where = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    for name in ("sound", "trapped"):
        endpoint.deploy(folder, folder / "bundles" / name, name)
    settings = Settings(
        workers=workers,
        batching={"trapped": Batching(where=where, limit=float(sys.argv[5]))},
        max_memory=int(sys.argv[6]),
    )
    serve_forever(folder, "faults", load, folder / "captures", port=port, settings=settings)
