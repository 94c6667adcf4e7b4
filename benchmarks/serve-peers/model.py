"""The small network that every server of these benchmarks runs: three convolutions, made from a seed, as an ONNX graph.

``python model.py MODEL.onnx [SEED]``. Its weights are random: what is measured is how fast it is served, and whether
every server gives its answer, never how well it classifies.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np


def small_cnn(seed: int = 0, channels: int = 1, classes: int = 10, widths: tuple[int, ...] = (16, 32, 64)) -> bytes:
    """``image`` (n, channels, height, width) float32 -> ``proba`` (n, classes): 3x3 convolutions, each with ReLU, max
    pooling after each but the last, the mean over what is left, one linear layer, softmax (He et al. 2015 weights).

    For one channel and ten classes it has 23,946 parameters.

    >>> small_cnn(0) == small_cnn(0) != small_cnn(1)
    True
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    rng = np.random.default_rng(seed)
    tensors: list[Any] = []
    nodes: list[Any] = []

    def weight(name: str, *shape: int) -> str:
        fan_in = int(np.prod(shape[1:]))
        scale = np.sqrt(2 / fan_in) if len(shape) > 1 else 0.1
        tensors.append(numpy_helper.from_array((rng.normal(size=shape) * scale).astype(np.float32), name))
        return name

    def node(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"{kind}{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    x, before = "image", channels
    for i, width in enumerate(widths):
        x = node("Conv", x, weight(f"w{i}", width, before, 3, 3), weight(f"b{i}", width), pads=[1, 1, 1, 1])
        x, before = node("Relu", x), width
        if i < len(widths) - 1:
            x = node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = node("Flatten", node("GlobalAveragePool", x))
    x = node("Gemm", x, weight("w", classes, before), weight("b", classes), transB=1)
    nodes.append(helper.make_node("Softmax", [x], ["proba"], axis=-1))
    graph = helper.make_graph(
        nodes,
        "small_cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", channels, "h", "w"])],
        [helper.make_tensor_value_info("proba", TensorProto.FLOAT, ["n", classes])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def images(n: int, seed: int = 0) -> Any:
    """``n`` random images (n, 1, 28, 28), float32 from 0 to 1, of different brightness: answers differ clearly."""
    rng = np.random.default_rng(seed)
    return (rng.random((n, 1, 28, 28)) * rng.random((n, 1, 1, 1))).astype(np.float32)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(small_cnn(int(sys.argv[2]) if len(sys.argv) > 2 else 0))
