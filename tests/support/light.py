"""The beginning of scripts that serve a model which says how light a picture is, and leaves gray ones to people."""

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from trilobe.infrastructure.deferral import chooser
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec

def load(bundle):
    def light(data):  # how light a picture is, as the probability of "light"
        p = data["image"].mean(axis=(1, 2), dtype=np.float32) / 255
        return {"proba": np.stack([1 - p, p], axis=1)}
    image, proba = TensorSpec("image", "UINT8", (-1, -1, -1)), TensorSpec("proba", "FP32", (-1, 2))
    return Servable(Pipeline([("light", light)]), (image,), (proba,), {"image": np.zeros((1, 2, 2), np.uint8)})
"""
