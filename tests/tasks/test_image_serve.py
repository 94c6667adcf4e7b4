"""What an endpoint answers is what training would predict: the same pixels, the same function, no skew."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from trilobe.algorithms.export import to_onnx
from trilobe.algorithms.fit import predict_logits
from trilobe.algorithms.weights import to_safetensors
from trilobe.errors import BundleError, DataError
from trilobe.infrastructure.bundle import REQUIRED_FILES, open_bundle, write_bundle
from trilobe.statistics import softmax
from trilobe.tasks.image_classification.data import decode, encode, encode_png
from trilobe.tasks.image_classification.model import network
from trilobe.tasks.image_classification.serve import servable
from trilobe.types import Bundle

NAMES, TEMPERATURE = ["cat", "dog", "car"], 1.7
SPECS = {
    "gray": {"version": "resize.v1", "height": 8, "width": 8, "channels": 1},
    "color": {"version": "resize.v1", "height": 12, "width": 20, "channels": 3},
}


@pytest.fixture(scope="module", params=SPECS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, nn.Module, dict]:  # type: ignore[type-arg]
    spec = SPECS[request.param]
    module = network(spec, len(NAMES), width=4).eval()
    files = dict.fromkeys(REQUIRED_FILES, b"{}") | {
        "weights.safetensors": to_safetensors(module.state_dict()),
        "model.onnx": to_onnx(module, encode([], spec)),
        "preprocessing.json": json.dumps(spec).encode(),
        "labels.json": json.dumps({"names": NAMES}).encode(),
        "calibration.json": json.dumps({"temperature": TEMPERATURE}).encode(),
    }
    written = write_bundle(tmp_path_factory.mktemp("b") / "bundle", files, "m1", {"task": "image_classification"})
    return open_bundle(written.path), module, spec


def images(n: int, height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("size", ["as the network sees it", (31, 9), (1, 1), (100, 200)], ids=str)
def test_serving_predicts_as_training_does(served: tuple, n: int, size: object) -> None:  # type: ignore[type-arg]
    bundle, module, spec = served
    height, width = size if isinstance(size, tuple) else (spec["height"], spec["width"])
    batch = images(n, height, width, spec["channels"])
    proba = servable(bundle).run({"image": batch})["proba"]
    files = [encode_png(image) for image in batch]  # the path of training: files, decoded one by one
    want = softmax(predict_logits(module, encode([decode(f) for f in files], spec)), TEMPERATURE)
    assert proba.dtype == np.float32 and proba.shape == (n, 3)
    np.testing.assert_allclose(proba, want, atol=1e-6)
    np.testing.assert_allclose(proba.sum(axis=1), 1, atol=1e-6)


def test_an_item_is_answered_the_same_alone_and_in_a_batch(served: tuple) -> None:  # type: ignore[type-arg]
    bundle, _, spec = served
    batch, serving = images(5, 9, 9, spec["channels"]), servable(bundle)
    whole = serving.run({"image": batch})["proba"]
    for image, row in zip(batch, whole, strict=True):
        np.testing.assert_allclose(serving.run({"image": image[None]})["proba"][0], row, atol=1e-6)


def test_what_it_declares_is_what_it_takes(served: tuple) -> None:  # type: ignore[type-arg]
    bundle, _, spec = served
    serving = servable(bundle)
    serving.warm_up()
    (given,), (answered,) = serving.inputs, serving.outputs
    assert (given.name, given.datatype, given.shape) == ("image", "UINT8", (-1, -1, -1, spec["channels"]))
    assert (answered.name, answered.datatype, answered.shape) == ("proba", "FP32", (-1, 3))
    c = spec["channels"]
    for wrong in (
        images(1, 8, 8, 4 - c),
        images(1, 8, 8, c)[0],
        images(1, 8, 8, c).astype(np.float32),
        images(0, 8, 8, c),
    ):
        with pytest.raises(DataError, match="'image' has"):
            given.check(wrong)
    assert [name for name, _ in serving.pipeline.steps] == ["preprocess", "model", "calibrate"]


CHILD = """
import sys
from pathlib import Path
from trilobe.infrastructure.bundle import open_bundle
from trilobe.tasks import get
get("image_classification").servable(open_bundle(Path(sys.argv[1]))).warm_up()
print(sorted({"torch", "onnx", "sqlalchemy", "scipy", "rich"} & set(sys.modules)))
"""


def test_an_endpoint_loads_no_torch(served: tuple) -> None:  # type: ignore[type-arg]
    done = subprocess.run([sys.executable, "-c", CHILD, served[0].path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_bundle_whose_parts_are_not_json(served: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    files = {name: (served[0].path / name).read_bytes() for name in REQUIRED_FILES} | {"calibration.json": b"1.7,"}
    with pytest.raises(BundleError, match=r"calibration\.json is not JSON"):
        servable(write_bundle(tmp_path / "b", files, "m1", {}))
