"""A torch module as an ONNX graph, for serving without torch."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from trilobe.errors import TrainingError
from trilobe.types import FloatArray


def to_onnx(
    module: nn.Module, X: FloatArray, input_name: str = "x", output_name: str = "logits", free: int = 1
) -> bytes:
    """The module in eval mode as ONNX bytes; the first axis (examples) is free, the others are those of ``X``.

    Args:
        module: maps ``(n, ...)`` float32 to logits.
        X: an example input ``(n, ...)``; only its shape after the free axes matters.
        input_name, output_name: names in the graph.
        free: how many of the first axes may have any size: 1, or 2 for sequences ``(n, T, ...)``.

    Raises:
        TrainingError: a network that cannot be traced, for instance because its path depends on the data.

    >>> import numpy as np
    >>> graph = to_onnx(nn.Linear(2, 3), np.zeros((1, 2), dtype=np.float32))
    >>> len(graph) > 100
    True
    """
    axes = {i: torch.export.Dim(name, min=1) for i, name in enumerate(("n", "T")[:free])}
    sample = torch.ones(*(2 + i for i in range(free)), *X.shape[free:])
    expected = "a network torch.export can trace"
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                (sample,),
                dynamo=True,
                dynamic_shapes=(axes,),
                input_names=[input_name],
                output_names=[output_name],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as e:
        why = str(e.__cause__ or e).strip().split("\n")[0]
        raise TrainingError(f"the network could not be exported to ONNX: {why}", expected=expected) from e
    if program is None:
        raise TrainingError("the network could not be exported to ONNX", expected=expected)
    return bytes(program.model_proto.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of torchvision and of its own future; neither is the user's business."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
