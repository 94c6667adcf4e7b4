"""Work on many examples, spread over the workers of Ray: the same function on the same pieces, in the same order."""

from collections.abc import Callable
from typing import Any

from torch import nn

from trilobe.algorithms.workers import started
from trilobe.types import FloatArray


def map_on_ray(
    function: Callable[[nn.Module, FloatArray], FloatArray], module: nn.Module, X: FloatArray, at_once: int = 4096
) -> list[FloatArray]:
    """``function(module, piece)`` of each piece of ``at_once`` rows of ``X``, in order.

    Uses the cluster that the environment names (``RAY_ADDRESS``), else the cores of this machine. The module is sent
    once. At most twice as many pieces are under way as there are cores, so memory stays bounded.

    Raises:
        MissingExtra: Ray is not installed.
    """
    ray = started()
    work: Any = ray.remote(num_cpus=1)(_work)
    sent, cores = ray.put(module), int(ray.cluster_resources().get("CPU", 1))
    pieces: list[FloatArray] = []
    under_way: list[Any] = []
    for start in range(0, len(X), at_once):
        if len(under_way) >= 2 * cores:
            pieces.append(ray.get(under_way.pop(0)))
        under_way.append(work.remote(function, sent, X[start : start + at_once]))
    return pieces + [ray.get(piece) for piece in under_way]


def _work(function: Callable[[nn.Module, FloatArray], FloatArray], module: nn.Module, piece: FloatArray) -> FloatArray:
    """What a worker does; one thread, since Ray runs as many workers as there are cores."""
    import torch

    torch.set_num_threads(1)
    return function(module, piece)
