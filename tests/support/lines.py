"""Small real bundles that multiply what they get, and a script that serves them."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from trilobe.infrastructure.bundle import REQUIRED_FILES, read_bytes, read_json, write_bundle
from trilobe.infrastructure.pipeline import Arrays, Pipeline, Servable, TensorSpec, onnx_step
from trilobe.types import Bundle

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from support.lines import load
from trilobe.infrastructure.serve import Batching, Flow, Limits, Node, Settings, function, graph, serve_forever
import numpy as np
import os, time

{extra}

serve_forever(Path(sys.argv[1]), "lines", load, captures=Path(sys.argv[1], "captures"), settings=Settings({settings}))
"""


def line(slope: float, path: Path, width: int = 3, key: str = "halves") -> Path:
    """A bundle that gives ``slope`` times half of what it gets, row by row: x (n, width) -> y (n, width)."""
    node = helper.make_node("Mul", ["h", "slope"], ["y"])
    g = helper.make_graph(
        [node],
        "line",
        [helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(np.array(slope, np.float32), "slope")],
    )
    model = helper.make_model(g, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    settings = json.dumps({"width": width, "key": key}).encode()
    files = {**dict.fromkeys(REQUIRED_FILES, b"{}"), "model.onnx": model, "preprocessing.json": settings}
    return write_bundle(path, files, f"slope {slope}", {}).path


def load(bundle: Bundle) -> Servable:
    """What a :func:`line` means: halve, then multiply."""
    settings = read_json(bundle, "preprocessing.json")

    def halve(data: Arrays) -> Arrays:
        return {"h": data["x"] / 2}

    return Servable(
        Pipeline([("halve", halve), onnx_step(read_bytes(bundle, "model.onnx"))]),
        (TensorSpec("x", "FP32", (-1, settings["width"])),),
        (TensorSpec("y", "FP32", (-1, settings["width"])),),
        {"x": np.ones((1, settings["width"]), np.float32)},
        preparation=settings["key"],
    )


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """An async test, bounded."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())
