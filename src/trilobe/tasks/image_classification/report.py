"""Images as people see them: in a report, in a terminal, and with the reason laid over them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trilobe.tasks.image_classification.data import Pixels, encode_png
from trilobe.types import FloatArray

if TYPE_CHECKING:
    from torch import nn


SIDE = 96  # pixels of a picture in a report


def picture(pixels: Pixels, side: int = SIDE) -> bytes:
    """A PNG at most ``side`` pixels high and wide; small images are enlarged by whole pixels and stay what they are.

    >>> picture(np.zeros((8, 8, 1), dtype=np.uint8))[:4]
    b'\\x89PNG'
    """
    return encode_png(_at_most(pixels, side))


def _at_most(pixels: Pixels, side: int) -> Pixels:
    height, width, channels = pixels.shape
    if k := side // max(height, width):
        return pixels.repeat(k, 0).repeat(k, 1)
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    image.thumbnail((side, side))
    small = np.asarray(image)
    return small[:, :, None] if small.ndim == 2 else small


def explain(module: "nn.Module", items: Sequence[Pixels], X: FloatArray) -> list[tuple[bytes, bytes, float]]:
    """For each item its picture, the same under its FullGrad map, and the map's residual (0 = complete)."""
    from trilobe.trust.saliency import fullgrad, overlay

    maps, residuals = fullgrad(module, X)
    shown = [_at_most(item, SIDE) for item in items]
    return [
        (encode_png(image), overlay(image, heat), float(residual))
        for image, heat, residual in zip(shown, maps, residuals, strict=True)
    ]


def terminal(pixels: Pixels, width: int = 32) -> str:
    """Two pixels per character, in 24 grays: enough to answer "what is it?" at the prompt.

    At most ``width`` characters wide and ``width`` lines high; images are enlarged at most twice.

    >>> terminal(np.array([[[0]], [[255]]], dtype=np.uint8), width=1)
    '\\x1b[38;5;232m\\x1b[48;5;255m▀\\x1b[0m'
    """
    from PIL import Image

    gray = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("L")
    scale = min(2, width / gray.width, 2 * width / gray.height)
    columns, rows = max(1, round(scale * gray.width)), max(2, 2 * round(scale * gray.height / 2))
    shade = 232 + np.asarray(gray.resize((columns, rows), Image.Resampling.BOX)).astype(int) * 23 // 255
    lines = []
    for top, bottom in zip(shade[::2], shade[1::2], strict=True):
        cells = [f"\x1b[38;5;{a}m\x1b[48;5;{b}m▀" for a, b in zip(top, bottom, strict=True)]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
