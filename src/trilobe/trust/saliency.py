"""Which parts of an image made the network say what it says: full gradients, and how to draw them.

A piecewise-linear network's logit is exactly the sum of what comes from the input and what comes from each bias
(Srinivas and Fleuret 2019, "Full-Gradient Representation for Neural Network Visualization"). That sum is checked, and
its residual returned beside every map. A module is left as it was found.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from trilobe.errors import UsageError
from trilobe.trust.attacks import check_images, check_logits, evaluating
from trilobe.trust.metrics import check_labels
from trilobe.types import FloatArray

RESCALE_EPS = 1e-6  # of the authors' code: keeps the rescaling of an all-zero layer finite
RESIDUAL_EPS = 1e-3  # a logit smaller than this is zero for all that a network says

# Ten even steps of matplotlib's "inferno" (public domain): lightness rises all the way, so brighter is always more.
INFERNO = np.array(
    [
        [0, 0, 4],
        [27, 12, 66],
        [75, 12, 107],
        [120, 28, 109],
        [165, 44, 96],
        [207, 68, 70],
        [237, 105, 37],
        [251, 154, 6],
        [247, 208, 60],
        [252, 255, 164],
    ]
)


@dataclass(frozen=True, slots=True)
class FullGradient:
    """The full gradients of a batch: everything that the logit of each image's target is the sum of.

    ``logits`` ``(n,)`` are those of the ``targets`` ``(n,)``; ``input_term`` ``(n, channels, height, width)`` is the
    image times the logit's gradient; ``bias_terms`` holds, for each use of a layer with a bias in the order of the
    calls, the layer's name and bias times gradient ``(n, ...)`` of its output's shape; ``residual`` ``(n,)`` is the
    share of the logit that the sum misses.
    """

    targets: NDArray[np.int64]
    logits: FloatArray
    input_term: FloatArray
    bias_terms: tuple[tuple[str, FloatArray], ...]
    residual: FloatArray


class SaliencyMaps(NamedTuple):
    """``maps`` ``(n, height, width)`` from 0 to 1 (higher = mattered more) and ``residual`` ``(n,)`` (0 = complete)."""

    maps: FloatArray
    residual: FloatArray


def full_gradient(module: nn.Module, X: ArrayLike | Tensor, targets: ArrayLike | None = None) -> FullGradient:
    """Decompose the logit of ``targets`` into the input's and the biases' shares (equations 3 and 4 of the paper).

    Counted are the biases of Conv2d and Linear, and the implicit bias of BatchNorm2d (bias - mean / sqrt(var + eps) *
    weight); a layer used twice counts twice. With ReLU, max or average pooling and sums between them, the residual is
    rounding (1e-4 or less). Other nonlinearities (GELU, sigmoid, attention) and constants added elsewhere (a mean
    subtracted by hand) are biases too: the residual says how much they hold.

    Args:
        module: gives ``(n, n_classes)`` logits; images in a batch must not influence each other.
        X: ``(n, channels, height, width)``, in the range that the module takes.
        targets: ``(n,)`` class indices; the predicted classes where None.

    Raises:
        UsageError: shapes or targets that do not fit.
        TrainingError: the module gives NaN.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> parts = full_gradient(net, torch.ones(1, 1, 4, 4))
    >>> [(name, term.shape) for name, term in parts.bias_terms]
    [('0', (1, 2, 2, 2)), ('3', (1, 3))]
    >>> bool(parts.residual[0] < 1e-4)
    True
    """
    parts = _decompose(module, check_images(X, unit=False), targets, lambda term, _: term)
    return FullGradient(
        parts.targets.cpu().numpy(),
        parts.logits.cpu().numpy(),
        parts.input_term.cpu().numpy(),
        tuple((share.name, share.kept.cpu().numpy()) for share in parts.shares if share.kept is not None),
        parts.residual().cpu().numpy(),
    )


def fullgrad(
    module: nn.Module, X: ArrayLike | Tensor, targets: ArrayLike | None = None, batch_size: int = 32
) -> SaliencyMaps:
    """FullGrad saliency maps (equation 5 of the paper), one forward and one backward pass for a whole batch.

    The input's share and that of every convolution and batch normalization with a spatial output are each made
    absolute, rescaled from 0 to 1 within each image, upsampled bilinearly and summed, as the authors' code does. Here
    channels are summed before upsampling: it is linear, so the map is the same. Each map is then rescaled to 0..1.
    Arguments and errors are those of :func:`full_gradient`, whose ``residual`` comes beside the maps.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    >>> maps, residual = fullgrad(net, torch.rand(5, 1, 4, 4))
    >>> maps.shape, float(maps.max()), bool(residual.max() < 1e-4)
    ((5, 4, 4), 1.0, True)
    """
    x = check_images(X, unit=False)
    wanted = None if targets is None else check_labels(targets, name="targets")
    if wanted is not None and len(wanted) != len(x):
        raise UsageError(f"{len(x)} images and {len(wanted)} targets", expected="one target an image")
    maps, residual = [], []
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        parts = _decompose(module, x[part], None if wanted is None else wanted[part], _drawn)
        total = _rescaled(parts.input_term).sum(1)
        for share in parts.shares:
            if share.kept is not None:
                total += interpolate(share.kept[:, None], x.shape[2:], mode="bilinear", align_corners=True)[:, 0]
        low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
        maps.append(((total - low) / (high - low).clamp(min=torch.finfo(total.dtype).tiny)).cpu().numpy())
        residual.append(parts.residual().cpu().numpy())
    return SaliencyMaps(np.concatenate(maps), np.concatenate(residual))


def overlay(image: NDArray[np.uint8], saliency: FloatArray, scale: int = 1, alpha: float = 0.5) -> bytes:
    """The image with its saliency map laid over it as a heat map, as the bytes of a PNG file.

    Args:
        image: ``(height, width, 3)`` or ``(height, width, 1)`` or ``(height, width)`` bytes.
        saliency: ``(map_height, map_width)``, 0 to 1, resized (bicubic) to the picture.
        scale: how many times larger than the image the picture is, 1 or more.
        alpha: weight of the heat map, 0 (only the image) to 1 (only the map).

    Raises:
        UsageError: shapes, types or values that do not fit.

    >>> overlay(np.zeros((4, 4, 3), np.uint8), np.eye(4))[:4]
    b'\\x89PNG'
    """
    pixels, heat = np.asarray(image), np.asarray(saliency, dtype=np.float32)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise UsageError(
            f"an image of shape {pixels.shape} and type {pixels.dtype}", expected="(height, width, 1 or 3) bytes"
        )
    if heat.ndim != 2 or not (np.isfinite(heat).all() and 0 <= heat.min() <= heat.max() <= 1):
        raise UsageError(f"a map of shape {heat.shape}", expected="(height, width) with values 0 to 1")
    if scale < 1 or not 0 <= alpha <= 1:
        raise UsageError(f"scale={scale}, alpha={alpha}", expected="a scale of at least 1, alpha from 0 to 1")
    size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
    picture = Image.fromarray(pixels).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    grown = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.blend(picture, Image.fromarray(colors(grown)), alpha).save(buffer, "PNG")
    return buffer.getvalue()


def colors(values: ArrayLike) -> NDArray[np.uint8]:
    """The "inferno" color ``(..., 3)`` of each value: black for 0, over purple and orange, to pale yellow for 1.

    >>> colors([0.0, 1.0]).tolist()
    [[0, 0, 4], [252, 255, 164]]
    """
    v = np.clip(np.asarray(values, dtype=np.float64), 0, 1)
    steps = np.linspace(0, 1, len(INFERNO))
    channels = [np.rint(np.interp(v, steps, channel)).astype(np.uint8) for channel in INFERNO.T]
    return np.stack(channels, axis=-1)


@dataclass(slots=True)
class _Share:
    """What one use of one layer adds to the logit: the sum for each image, and what its caller wanted of the rest."""

    name: str
    total: Tensor | float = 0.0
    kept: Any = None


@dataclass(frozen=True, slots=True)
class _Parts:
    targets: Tensor
    logits: Tensor
    input_term: Tensor
    shares: list[_Share]

    def residual(self) -> Tensor:
        """|logit - (input's share + biases' shares)| / max(|logit|, 1e-3), ``(n,)``."""
        total = self.input_term.flatten(1).sum(1, dtype=torch.float64)
        for share in self.shares:
            total = total + share.total
        logits = self.logits.double()
        return (logits - total).abs() / logits.abs().clamp(min=RESIDUAL_EPS)


Keep = Callable[[Tensor, nn.Module], Any]
BIASED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


def _decompose(module: nn.Module, x: Tensor, targets: ArrayLike | None, keep: Keep) -> _Parts:
    with evaluating(module) as device, torch.enable_grad():
        x = x.to(device).requires_grad_()
        with _biases_watched(module, len(x), keep) as shares:
            logits = check_logits(module(x), len(x))
            chosen = logits.argmax(1) if targets is None else _check_targets(targets, *logits.shape).to(device)
            picked = logits.gather(1, chosen[:, None])[:, 0]
            (gradient,) = torch.autograd.grad(picked.sum(), x)
    return _Parts(chosen, picked.detach(), (gradient * x).detach(), shares)


@contextmanager
def _biases_watched(module: nn.Module, n: int, keep: Keep) -> Iterator[list[_Share]]:
    """Fill a list with the share of each use of each layer with a bias, while a gradient passes through it.

    A hook on the output's gradient, set before anything downstream can write over that output, also serves networks
    with in-place activations; and what is not kept is freed layer by layer.
    """
    shares: list[_Share] = []

    def watch(name: str, layer: nn.Module, output: Tensor) -> None:
        bias, share = _bias(layer), _Share(name)
        if bias is None or not output.requires_grad:
            return
        shares.append(share)

        def meet(gradient: Tensor) -> None:
            term = gradient * bias
            share.total, share.kept = term.reshape(n, -1).sum(1, dtype=torch.float64), keep(term, layer)

        output.register_hook(meet)  # type: ignore[no-untyped-call]

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda layer, _, output: watch(name, layer, output)

    hooks = [
        part.register_forward_hook(hook_of(name)) for name, part in module.named_modules() if isinstance(part, BIASED)
    ]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _bias(layer: nn.Module) -> Tensor | None:
    """What the layer adds to its output whatever its input, of a shape that broadcasts to that output."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
        weight = layer.weight if layer.weight is not None else 1.0
        shift = -layer.running_mean / (layer.running_var + layer.eps).sqrt() * weight
        bias = shift if bias is None else bias + shift
    return bias if bias is None or isinstance(layer, nn.Linear) else bias[:, None, None]


def _drawn(term: Tensor, layer: nn.Module) -> Tensor | None:
    """The share in the map, ``(n, height, width)``: only layers with a place in the image have one."""
    spatial = term.ndim == 4 and isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
    return _rescaled(term).sum(1) if spatial else None


def _rescaled(term: Tensor) -> Tensor:
    """Absolute values, moved and scaled to 0..1 within each image (the authors' ``_postProcess``)."""
    size = term.detach().abs()
    size = size - size.amin((1, 2, 3), keepdim=True)
    return size / (size.amax((1, 2, 3), keepdim=True) + RESCALE_EPS)


def _check_targets(targets: ArrayLike, n: int, n_classes: int) -> Tensor:
    chosen = check_labels(targets, n_classes, "targets")
    if len(chosen) != n:
        raise UsageError(f"{n} images and {len(chosen)} targets", expected="one target an image")
    return torch.from_numpy(chosen)
