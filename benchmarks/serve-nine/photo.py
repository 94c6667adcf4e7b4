"""From a compressed photo to what the nine models take: one function, for clients and for the server's pipeline."""

import io
from typing import Any

import numpy as np

SIZE, MODELS = 64, 9


def prepare(photo: bytes) -> Any:
    """(1, 3, 64, 64) float32: decoded (JPEG at the smallest scale that still holds 64 pixels), resized, normalized."""
    from PIL import Image

    image = Image.open(io.BytesIO(photo))
    image.draft("RGB", (SIZE, SIZE))
    pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32)
    return np.ascontiguousarray((pixels.transpose(2, 0, 1)[None] / 255 - 0.45) / 0.25)


def photos(n: int, form: str = "JPEG") -> list[bytes]:
    """``n`` photos of 640x480: views of one real photo that scikit-learn brings, compressed (JPEG: quality 90)."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    whole = Image.fromarray(load_sample_image("china.jpg")).resize((960, 720))
    out = []
    for i in range(n):
        left, top = 320 * i // max(1, n - 1), 240 * i // max(1, n - 1)
        file = io.BytesIO()
        whole.crop((left, top, left + 640, top + 480)).save(file, form, quality=90)
        out.append(file.getvalue())
    return out
