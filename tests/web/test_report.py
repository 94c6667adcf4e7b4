"""The report: every part alone and absent, self-contained and well formed, escaped, round trip, seen by a browser."""

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from trilobe.errors import DataError, TrilobeError, UsageError
from trilobe.types import Evidence, Finding
from trilobe.web.charts import Bin, Estimate, Series
from trilobe.web.report import (
    SECTIONS,
    Annotator,
    Answers,
    BundleFile,
    Change,
    Checks,
    Gate,
    HeatMap,
    Monitoring,
    Origin,
    Picture,
    Pool,
    Questions,
    Repair,
    ReportData,
    Serving,
    Training,
    Why,
    from_json,
    png_uri,
    render,
    to_json,
)

NAMES = tuple(str(d) for d in range(10))
share = Estimate.of_counts


def uri(pixels: np.ndarray) -> str:
    """A PNG of ``pixels`` (height, width[, 3]) in 0..1."""
    file = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)).save(file, "PNG", optimize=True)
    return png_uri(file.getvalue())


def warm(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """``pixels`` in gray with ``heat`` (both in 0..1) laid over it in orange."""
    gray = np.repeat(pixels[..., None], 3, axis=2)
    alpha = 0.75 * heat[..., None]
    return gray * (1 - alpha) + np.array([1.0, 0.35, 0.05]) * alpha


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X.reshape(-1, 8, 8) / 16, y


def heat_map(i: int, inverted: bool, predicted: str, confidence: float) -> HeatMap:
    X, y = digits()
    image = 1 - X[i] if inverted else X[i]
    smooth = image + np.roll(image, 1, 0) + np.roll(image, 1, 1)
    heat = np.zeros((8, 8)) + np.outer(np.r_[1.0, [0.1] * 6, 1.0], np.ones(8)) if inverted else smooth / smooth.max()
    return HeatMap(uri(image), uri(warm(image, heat)), predicted, confidence, truth=NAMES[y[i]])


def curve(name: str, y: list[float], style: str) -> Series:
    x = tuple(float(10 * (i + 1)) for i in range(len(y)))
    low, high = tuple(v - 0.6 * (1 - v) * 0.5 - 0.006 for v in y), tuple(min(1.0, v + 0.5 * (1 - v)) for v in y)
    return Series(name, x, tuple(y), low, high, style)  # type: ignore[arg-type]


@cache
def sample() -> ReportData:
    """A whole loop on handwritten digits, with plausible figures."""
    X, y = digits()
    rng = np.random.default_rng(0)
    pictures = tuple(Picture(uri(X[i])) for i in rng.choice(len(X), 20, replace=False))
    reasons = ["between 3 and 8", "between 1 and 8", "between 5 and 9", "like nothing asked yet", "between 4 and 7"]
    asked = tuple(Picture(uri(X[i]), f"{reasons[k % 5]}") for k, i in enumerate(rng.choice(len(X), 7, replace=False)))
    confusion = np.diag([49, 47, 50, 48, 51, 49, 50, 49, 46, 49])
    confusion[8, 1], confusion[1, 8], confusion[3, 8], confusion[9, 5], confusion[8, 3], confusion[3, 5] = 3, 2, 2, 1, 1, 1
    confusion[4, 7], confusion[9, 7] = 1, 1
    people = [("ada", 0.945, 0.95, 100, 3.1), ("ben", 0.921, 0.93, 95, 3.6), ("cleo", 0.612, 0.60, 105, 1.6),
              ("dan", 0.902, 0.906, 90, 2.9), ("eva", 0.96, 1.0, 30, 9.4)]  # fmt: skip
    window = [0.08, 0.27, 0.09, 0.07, 0.09, 0.08, 0.08, 0.09, 0.115, 0.095]
    old, new = "the old style", "the new style"
    return ReportData(
        title="Handwritten digits",
        verdict="Served since 14:02. A change of traffic was caught, explained and repaired with 60 answers, "
        "and no request was lost on the way.",
        created_at=1_790_000_000.0,
        pool=Pool(1297, 500, 4, 2, NAMES, pictures),
        questions=Questions(
            200, 20,
            curve("margin", [0.69, 0.872, 0.902, 0.93, 0.945, 0.964, 0.971, 0.98, 0.984, 0.986, 0.988, 0.986, 0.99, 0.991,
                             0.99, 0.992, 0.99, 0.991, 0.992, 0.991], "main"),
            curve("random", [0.70, 0.80, 0.886, 0.908, 0.914, 0.922, 0.924, 0.93, 0.93, 0.94, 0.938, 0.941, 0.946, 0.945,
                             0.946, 0.948, 0.951, 0.955, 0.96, 0.963], "quiet"),
            0.95, asked, how="Three runs with seeds 0, 1, 2; the lines are their means, ten answers a round.",
        ),
        answers=Answers(
            420, 200, tuple(Annotator(share(n, round(q * k), k), k, s, t) for n, q, t, k, s in people), 17, 4, 200
        ),
        training=Training(
            share("held out", 488, 500), 200, 0.012,
            (Bin(0.44, 0.5, 4), Bin(0.56, 0.5, 6), Bin(0.66, 0.7, 10), Bin(0.76, 0.75, 16), Bin(0.86, 0.9, 30),
             Bin(0.985, 0.993, 434)),
            NAMES, tuple(tuple(int(n) for n in row) for row in confusion),
        ),
        checks=Checks(
            (
                Gate("Accuracy", Evidence("accuracy", 0.976, 0.959, 0.986, 500, 0.95, passed=True),
                     "right on held-out examples"),
                Gate("Calibration", Evidence("ece", 0.012, 0.009, 0.026, 500, 0.05, "at_most", True),
                     "gap between how sure it says it is and how often it is right"),
                Gate("Robustness", Evidence("pgd", 0.812, 0.775, 0.844, 500, 0.7, passed=True),
                     "right while under attack at strength 0.1"),
                Gate("Parity", Evidence("parity", 0.031, 0.004, 0.061, 500, 0.05, "at_most", True),
                     "largest difference in accuracy between groups"),
                Gate("Membership", Evidence("membership", 0.523, 0.497, 0.549, 824, 0.6, "at_most", True),
                     "how well an outsider can tell who was in the training data (50% is a coin toss)"),
                Gate("Same answers", Evidence("export", 1.2e-6, 1.2e-6, 1.2e-6, 500, 1e-4, "at_most", True),
                     "largest difference between the trained and the exported model", "number"),
                Gate("Size", Evidence("size", 84.0, 84.0, 84.0), "kB of weights", "number"),
            ),
            tuple(share(f"strength {s}" if s else "no attack", k, 500) for s, k in
                  [(0, 488), (0.05, 458), (0.1, 406), (0.2, 262)]),
            (share("thin strokes", 245, 253), share("thick strokes", 243, 247)),
        ),
        serving=Serving(
            "9c41d07be2f8", tuple(BundleFile(n, s, d * 4) for n, s, d in [
                ("manifest.json", 3120, "a81c9d"), ("model.onnx", 84_211, "77be01"), ("weights.safetensors", 83_904, "0c11fa"),
                ("baseline.json", 21_877, "e5d210"), ("evidence.json", 4410, "44b9c8"), ("card.md", 2950, "b2a6e7")]),
            "digits", "http://127.0.0.1:8471/v1/digits", 4812, 0, 1, 0.5, 1_789_999_320.0, 0.0021,
        ),
        monitoring=Monitoring(
            1204,
            (
                Finding("f1", "digits", "9c41d07be2f8", "class_share", "“1” is answered far more often than before",
                        0.27, 0.101, 0.232, 0.311, 3.1e-19, 400, tuple("abcdefgh")),
                Finding("f2", "digits", "9c41d07be2f8", "low_confidence", "The model is unsure far more often",
                        0.335, 0.048, 0.289, 0.383, 0.0, 400, tuple("abcdefghijkl")),
            ),
            tuple(share(n, round(400 * w), 400) for n, w in zip(NAMES, window, strict=True)),
            (0.1, 0.101, 0.098, 0.1, 0.102, 0.1, 0.1, 0.1, 0.099, 0.1), ("1",),
            804, 0, share("false alarms", 2, 200),
        ),
        why=Why(
            tuple(heat_map(i, True, p, c) for i, p, c in [(0, "1", 0.41), (2, "8", 0.52), (7, "1", 0.38), (13, "1", 0.47)]),
            tuple(heat_map(i, False, NAMES[y[i]], c) for i, c in [(0, 0.99), (2, 0.97), (7, 0.99), (13, 0.98)]),
            "FullGrad (Srinivas and Fleuret 2019)",
        ),
        repair=Repair(
            (Change(old, share("", 488, 500), share("", 487, 500)), Change(new, share("", 203, 500), share("", 471, 500))),
            60, 812, 0, "e20b55c7a914",
        ),
        origin=Origin(
            "trilobe demo --seed 0", 0, "0.1.0", {"python": "3.11.7", "torch": "2.9.0", "onnxruntime": "1.23.0"},
            {"data": "5a1f09c2" * 4, "model": "c41d07be" * 4, "bundle": "9c41d07b" * 4},
            (("import", 1.4), ("query and label", 8.9), ("train", 12.2), ("check", 9.5), ("package", 2.1),
             ("serve and monitor", 14.8), ("explain", 1.1), ("repair", 7.6)),
        ),
    )  # fmt: skip
