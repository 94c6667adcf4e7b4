"""The small network for images that trains on a laptop, and how a training image may be varied."""

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilobe.errors import UsageError


def network(preprocessing: Mapping[str, Any], n_classes: int, width: int = 16, seed: int = 0) -> nn.Module:
    """A convolutional network from ``(n, channels, height, width)`` in 0..1 to logits ``(n, n_classes)``.

    Convolution, batch normalization and rectifier in stages that halve the image and widen until it is small, then a
    pooled linear layer: piecewise linear, so that FullGrad explains it completely.

    Args:
        preprocessing: says channels, height and width.
        n_classes: at least 2.
        width: channels of the first stage.
        seed: of the first weights.

    >>> net = network({"channels": 1, "height": 8, "width": 8}, n_classes=10)
    >>> net.eval()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    if n_classes < 2:
        raise UsageError(f"a network for {n_classes} class", expected="at least 2 classes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side, channels = min(preprocessing["height"], preprocessing["width"]), width
        layers: list[nn.Module] = [*_stage(int(preprocessing["channels"]), channels), *_stage(channels, 2 * channels)]
        channels *= 2
        while side >= 8:
            wider = min(2 * channels, 4 * width) if side >= 16 else channels
            layers += [nn.MaxPool2d(2), *_stage(channels, wider)]
            channels, side = wider, side // 2
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * channels, n_classes)]
        return nn.Sequential(*layers)


def imported(where: str, preprocessing: Mapping[str, Any], n_classes: int, seed: int = 0) -> nn.Module:
    """Somebody else's network: what the function at ``package.module:function`` returns.

    It is called with the preprocessing (channels, height and width among it) and the number of classes, and gives a
    module from ``(n, channels, height, width)`` in 0..1 to logits ``(n, n_classes)``. Whatever of it is frozen
    (``requires_grad_(False)``) stays as it is: a pretrained backbone with a new last layer is three lines.

    Raises:
        UsageError: nothing at that path, or what comes is no module that gives so many logits.

    >>> imported("trilobe.tasks.image_classification.model:network", {"channels": 1, "height": 8, "width": 8}, 3)[-1]
    Linear(in_features=128, out_features=3, bias=True)
    """
    expected = "package.module:function of (preprocessing, n_classes) that returns a torch module"
    try:
        module_name, _, name = where.partition(":")
        function = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UsageError(f"image.network = {where!r}: {e}", expected=expected, hint="edit trilobe.toml") from e
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = function(preprocessing, n_classes)
    if not isinstance(net, nn.Module):
        raise UsageError(f"image.network = {where!r} gave a {type(net).__name__}", expected=expected)
    shape = [2, *(int(preprocessing[side]) for side in ("channels", "height", "width"))]
    with torch.no_grad():
        came = tuple(net.eval()(torch.zeros(shape)).shape)
    if came != (2, n_classes):
        raise UsageError(f"image.network = {where!r} gives {came} for 2 images", expected=f"(2, {n_classes})")
    return net


def _stage(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def features(module: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """What the last linear layer sees, ``(n, n_features)``: where alike images lie close together.

    >>> net = network({"channels": 1, "height": 8, "width": 8}, n_classes=3)
    >>> features(net.eval(), torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 128])
    """
    seen: list[Tensor] = []
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            for i in range(0, max(len(x), 1), batch_size):
                module(x[i : i + batch_size])
    finally:
        handle.remove()
    return torch.cat(seen).flatten(1)


def vary(x: Tensor, generator: torch.Generator) -> Tensor:
    """A batch ``(n, c, h, w)``, each image turned (10 degrees), moved, scaled and sheared (10%) a little at random.

    No mirroring: a mirrored digit or sign is another thing.

    >>> vary(torch.zeros(2, 1, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 8, 8])
    """

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(x), generator=generator) * 2 - 1) * limit

    angle, scale, shear = uniform(math.radians(10)), 1 + uniform(0.1), uniform(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, shear - sin, uniform(0.2)], 1), torch.stack([sin, cos, uniform(0.2)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False, padding_mode="border")
