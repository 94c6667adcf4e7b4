"""Images as people see them: in a report, in a terminal, and with the reason laid over them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from trilobe.tasks.image_classification.data import Pixels, encode_png
from trilobe.types import FloatArray

if TYPE_CHECKING:
    from torch import nn


def picture(pixels: Pixels, side: int = 96) -> bytes:
    """A PNG at most ``side`` pixels high; small images are enlarged by whole pixels, so that they stay what they are.

    >>> picture(np.zeros((8, 8, 1), dtype=np.uint8))[:4]
    b'\\x89PNG'
    """
    height, width, channels = pixels.shape
    if height < side:
        k = max(1, side // max(height, width))
        return encode_png(np.ascontiguousarray(pixels.repeat(k, 0).repeat(k, 1)))
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    image.thumbnail((side, side))
    small = np.asarray(image)
    return encode_png(small[:, :, None] if small.ndim == 2 else small)


def explain(module: "nn.Module", items: Sequence[Pixels], X: FloatArray) -> list[tuple[bytes, bytes, float]]:
    """For each item its picture, the picture under its FullGrad map, and the map's completeness residual."""
    from trilobe.trust.saliency import fullgrad, overlay

    maps, residuals = fullgrad(module, X)
    scale = [max(1, 96 // max(i.shape[:2])) for i in items]
    return [
        (picture(item), overlay(item, heat, scale=k), float(residual))
        for item, heat, residual, k in zip(items, maps, residuals, scale, strict=True)
    ]


def terminal(pixels: Pixels, width: int = 32) -> str:
    """Two pixels per character, in 24 grays: enough to answer "what is it?" at the prompt.

    >>> terminal(np.array([[[0]], [[255]]], dtype=np.uint8), width=1)
    '\\x1b[38;5;232m\\x1b[48;5;255m▀\\x1b[0m'
    """
    gray = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("L")
    columns = min(width, max(gray.width, min(width, 2 * gray.width))) if gray.width > 1 else 1
    rows = max(2, 2 * round(columns * gray.height / gray.width / 2))
    shade = 232 + np.asarray(gray.resize((columns, rows), Image.Resampling.BOX)).astype(int) * 23 // 255
    lines = []
    for top, bottom in zip(shade[::2], shade[1::2], strict=True):
        cells = [f"\x1b[38;5;{a}m\x1b[48;5;{b}m▀" for a, b in zip(top, bottom, strict=True)]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
