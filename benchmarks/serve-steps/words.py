"""A step that spends its time in Python: every word and every three letters of a text, counted in 64 columns."""

import re
import zlib
from typing import Any

import numpy as np

from trilobe.infrastructure.serve import function


@function({"text": "BYTES[-1]"}, {"counts": "FP32[-1,64]"})
def parse(text: Any) -> dict[str, Any]:
    """The counts of each text."""
    counts = np.zeros((len(text), 64), np.float32)
    for i, data in enumerate(text):
        for word in re.findall(r"\w+", data.decode("utf-8").lower()):
            for piece in (word, *(word[k : k + 3] for k in range(len(word) - 2))):
                counts[i, zlib.crc32(piece.encode()) % 64] += 1
    return {"counts": counts}
