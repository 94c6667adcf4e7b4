"""What is exported answers as torch does, for any batch, and exporting is quiet."""

import logging
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from trilobe.algorithms.export import to_onnx
from trilobe.algorithms.fit import predict_logits
from trilobe.errors import TrainingError
from trilobe.tasks.image_classification.model import network


def run(graph: bytes, x: np.ndarray, name: str = "x") -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(None, {name: x})[0]


def worn(module: nn.Module) -> nn.Module:
    """As after training: batch statistics that are not 0 and 1."""
    rng = torch.Generator().manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = torch.randn(m.num_features, generator=rng) * 0.1
            m.running_var = torch.rand(m.num_features, generator=rng) + 0.5
    return module


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 48, 3), (4, 4, 1), (13, 7, 3)], ids=str)
def test_the_graph_answers_as_torch_does(
    shape: tuple[int, int, int], capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    height, width, channels = shape
    module = worn(network({"channels": channels, "height": height, "width": width}, 5, width=4))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        graph = to_onnx(module.train(), np.zeros((1, channels, height, width), np.float32))
    assert not list(recwarn) and capfd.readouterr() == ("", ""), "exporting is quiet"
    onnx.checker.check_model(onnx.load_from_string(graph))
    for n in (1, 7):
        x = np.random.default_rng(n).random((n, channels, height, width), dtype=np.float32)
        got = run(graph, x)
        assert got.shape == (n, 5) and got.dtype == np.float32
        np.testing.assert_allclose(got, predict_logits(module, x), atol=1e-5)


def test_names_shape_and_nothing_else_come_from_the_arguments() -> None:
    module = nn.Linear(3, 2)
    graph = to_onnx(module, np.zeros((0, 3)), "pixels", "score")
    model = onnx.load_from_string(graph)
    assert [i.name for i in model.graph.input] == ["pixels"] and [o.name for o in model.graph.output] == ["score"]
    x = np.random.default_rng(0).random((4, 3), dtype=np.float32)
    np.testing.assert_allclose(run(graph, x, "pixels"), predict_logits(module, x), atol=1e-6)


class Undecided(nn.Module):
    """Takes a path that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced() -> None:
    with pytest.raises(
        TrainingError, match=r"could not be exported to ONNX.*expected a network torch.export can trace"
    ):
        to_onnx(Undecided(), np.zeros((1, 3), np.float32))


def test_loggers_and_warnings_are_as_before() -> None:
    log, level, filters = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level, list(warnings.filters)
    to_onnx(nn.Linear(1, 1), np.zeros((1, 1)))
    assert log.level == level and list(warnings.filters) == filters
