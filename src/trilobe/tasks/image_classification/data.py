"""Images as they come from people, and as arrays: the same functions serve training and serving.

Bytes -> :func:`decode` -> pixels ``(height, width, channels)`` uint8 -> :func:`encode` -> input ``(n, channels, height,
width)`` float32 from 0 to 1. No torch here: an endpoint imports this file; and Pillow only where it is used.
"""

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import UnreadableExample, UsageError
from trilobe.types import FloatArray

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pgm .ppm".split())  # noqa: SIM905
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no others: some would start programs to be read
MAX_PIXELS = 50_000_000


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The pixels of an image file, upright, gray or RGB.

    EXIF rotation is applied; palettes become colors; transparency is laid on white; 16 bits become 8 by dividing by
    257 (32 bits are cut at 65535 before, floating-point values at 0 and 255); an animation gives its first frame.

    Args:
        data: the file.
        max_pixels: larger images are refused from their header, before any memory is taken.

    Returns:
        ``(height, width, channels)`` uint8, channels 1 (gray, or only grays in a palette) or 3 (RGB, or stored as RGB).

    Raises:
        UnreadableExample: empty, damaged, truncated, not an image, or too large.

    >>> decode(encode_png(np.zeros((2, 3, 1), dtype=np.uint8))).shape
    (2, 3, 1)
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise UnreadableExample("an empty file", expected="an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes this function checks itself
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise _too_large(f"an image of {width} x {height} pixels", max_pixels)
            image.load()
            return _to_pixels(ImageOps.exif_transpose(image))
    except UnreadableExample:
        raise
    except Image.DecompressionBombError as e:
        raise _too_large(f"an image that is far too large ({e})", max_pixels) from e
    except UnidentifiedImageError as e:
        start = data[:24].decode("ascii", "replace").split("\n")[0]
        raise UnreadableExample(f"not an image: it begins with {start!r}", expected="an image file") from e
    except Exception as e:  # Pillow's decoders raise many kinds on damaged files
        raise UnreadableExample(f"a damaged image: {e}", expected="a whole image file") from e


def _too_large(problem: str, max_pixels: int) -> UnreadableExample:
    return UnreadableExample(
        problem,
        expected=f"at most {max_pixels:,} pixels",
        hint="scale it down, or raise image.max_pixels in trilobe.toml",
    )


def _to_pixels(image: "Image.Image") -> Pixels:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        wide = np.asarray(image).astype(np.int64)
        return (np.clip(wide, 0, 65535) // 257).astype(np.uint8)[:, :, None]
    stored = image.mode
    if stored in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif stored in ("1", "L", "F"):
        return np.array(image.convert("L"))[:, :, None]
    pixels = np.array(image.convert("RGB"))
    gray = stored != "RGB" and (pixels == pixels[:, :, :1]).all()
    return np.ascontiguousarray(pixels[:, :, :1]) if gray else pixels


def encode_png(pixels: Pixels) -> bytes:
    """Pixels ``(height, width, 1 or 3)`` as a PNG file, without loss.

    >>> encode_png(np.zeros((1, 1, 3), dtype=np.uint8))[:4]
    b'\\x89PNG'
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def content_digest(pixels: Pixels) -> str:
    """SHA-256 of what the picture shows: two files of the same picture have the same digest.

    >>> len(content_digest(np.zeros((1, 1, 1), dtype=np.uint8)))
    64
    """
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def choose_preprocessing(shapes: Sequence[tuple[int, ...]], size: int = 0) -> dict[str, Any]:
    """How every image becomes an input: the size and channels that suit a pool.

    Args:
        shapes: ``(height, width, channels)`` of the pool's images.
        size: height and width wanted; 0 takes the median of the pool, at most 64.

    Returns:
        ``{"version": "resize.v1", "height", "width", "channels"}``, plain values that go into the bundle.

    >>> choose_preprocessing([(8, 8, 1), (8, 8, 1)])
    {'version': 'resize.v1', 'height': 8, 'width': 8, 'channels': 1}
    """
    if not shapes:
        raise UsageError("no images to choose a size from", expected="at least one", hint="trilobe add FOLDER")
    height, width, _ = np.median(np.array(shapes), axis=0).astype(int)
    scale = min(1.0, 64 / max(height, width))
    height, width = (size, size) if size else (max(4, round(height * scale)), max(4, round(width * scale)))
    channels = 3 if any(s[2] == 3 for s in shapes) else 1
    return {"version": "resize.v1", "height": int(height), "width": int(width), "channels": channels}


def encode(images: Sequence[Pixels] | Pixels, preprocessing: Mapping[str, Any]) -> FloatArray:
    """Pixels to network input: resized (bilinear, antialiased), channels matched, scaled to 0..1.

    The one preprocessing of training and serving.

    Args:
        images: ``n`` arrays ``(height, width, 1 or 3)`` uint8 of any size, or one ``(n, height, width, channels)``.
        preprocessing: from :func:`choose_preprocessing`.

    Returns:
        ``(n, channels, height, width)`` float32, C-contiguous.

    >>> spec = {"version": "resize.v1", "height": 4, "width": 4, "channels": 1}
    >>> encode([np.full((8, 8, 3), 255, dtype=np.uint8)], spec)[0, 0, 0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if preprocessing.get("version") != "resize.v1":
        raise UsageError(f"preprocessing {preprocessing.get('version')!r}", expected="'resize.v1'")
    height, width, channels = (int(preprocessing[k]) for k in ("height", "width", "channels"))
    out = np.empty((len(images), channels, height, width), dtype=np.float32)
    for i, pixels in enumerate(images):
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.dtype != np.uint8:
            raise UsageError(
                f"an image of shape {pixels.shape} and type {pixels.dtype}", expected="(height, width, 1 or 3) uint8"
            )
        out[i] = _fit_size(fit_channels(pixels, channels), height, width).transpose(2, 0, 1)
    out /= 255
    return out


def fit_channels(pixels: Pixels, channels: int) -> Pixels:
    """Gray pixels as RGB, or RGB as gray, where that is what is wanted.

    >>> fit_channels(np.zeros((2, 2, 3), dtype=np.uint8), 1).shape
    (2, 2, 1)
    """
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def _fit_size(pixels: Pixels, height: int, width: int) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized[:, :, None] if resized.ndim == 2 else resized
