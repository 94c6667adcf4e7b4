"""What an endpoint answers is what training would predict: the same pixels, the same function, no skew."""

import asyncio
import io
import json
import subprocess
import sys
import zlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from trilobe.algorithms.export import to_onnx
from trilobe.algorithms.fit import predict_logits
from trilobe.algorithms.weights import to_safetensors
from trilobe.errors import BundleError, DataError
from trilobe.infrastructure.bundle import REQUIRED_FILES, open_bundle, write_bundle
from trilobe.infrastructure.capture import CaptureLog, read_captures
from trilobe.infrastructure.endpoint import Wish
from trilobe.infrastructure.serve import Server
from trilobe.infrastructure.serve.http import Request
from trilobe.statistics import softmax
from trilobe.tasks import get
from trilobe.tasks.image_classification import serve
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
print(sorted({"torch", "onnx", "sqlalchemy", "scipy", "rich", "PIL"} & set(sys.modules)))
"""


def test_an_endpoint_loads_no_torch(served: tuple) -> None:  # type: ignore[type-arg]
    done = subprocess.run([sys.executable, "-c", CHILD, served[0].path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_bundle_whose_parts_are_not_json(served: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    files = {name: (served[0].path / name).read_bytes() for name in REQUIRED_FILES} | {"calibration.json": b"1.7,"}
    with pytest.raises(BundleError, match=r"calibration\.json is not JSON"):
        servable(write_bundle(tmp_path / "b", files, "m1", {}))


# Files ---------------------------------------------------------------------------------------------------------------


def photo(kind: str, mode: str, height: int, width: int) -> bytes:
    """A file as a camera, a browser or a scanner leaves it."""
    channels = {"L": 1, "P": 1, "RGB": 3, "RGBA": 4}[mode]
    image = Image.fromarray(images(1, height, width, channels)[0].squeeze(), mode)
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


PHOTOS = [photo("PNG", "L", 31, 9), photo("PNG", "RGBA", 9, 14), photo("JPEG", "RGB", 40, 60), photo("GIF", "P", 5, 5)]


def binary(files: Sequence[bytes], name: str = "image") -> tuple[dict[str, str], bytes]:
    """Headers and body of a request with files, in the binary form of the protocol."""
    data = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    tensor = {"name": name, "shape": [len(files)], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return {"inference-header-content-length": str(len(head))}, head + data


def serving(bundle: Bundle, use: Callable[[Server, Callable[..., Awaitable[tuple[int, Any]]]], Awaitable[Any]],
            **how: Any) -> Any:  # fmt: skip
    """What ``use`` gives with a server of ``bundle`` and a function that posts to it: the status and the answer."""

    async def run() -> Any:
        server = Server("pets", servable, **how)

        async def post(headers: dict[str, str], body: bytes, path: str = "/v2/models/pets/infer") -> tuple[int, Any]:
            try:
                reply = server.handle(Request("POST", path, dict(headers), body))
                status, _, said = reply if isinstance(reply, tuple) else await reply
            except Exception as error:  # noqa: BLE001 (as the front end does)
                status, _, said = server.explain(error)
            return status, json.loads(said)

        await server.apply({"": Wish(str(bundle.path))})
        try:
            return await use(server, post)
        finally:
            await asyncio.to_thread(server.close)

    return asyncio.run(run())


def test_files_are_read_as_for_training(served: tuple) -> None:  # type: ignore[type-arg]
    """No skew, to the bit: files of any kind and size in one request, decoded and encoded as training does it."""
    bundle, _, spec = served
    pixels, (taken,) = servable(bundle), servable(bundle).files.inputs  # type: ignore[union-attr]
    assert (taken.name, taken.datatype, taken.shape) == ("image", "BYTES", (-1,))
    sent = np.array(PHOTOS, dtype=object)
    trained = encode([decode(file) for file in PHOTOS], spec)
    answered = pixels.files.run({"image": sent})["proba"]  # type: ignore[union-attr]
    assert np.array_equal(pixels.pipeline.steps[2][1](pixels.pipeline.steps[1][1]({"x": trained}))["proba"], answered)


@pytest.mark.parametrize("path", ["/v2/models/pets/infer", "/invocations"])
def test_a_picture_is_posted_as_it_is(served: tuple, path: str) -> None:  # type: ignore[type-arg]
    bundle = served[0]

    async def use(server: Server, post: Any) -> list[Any]:
        kinds = ("image/png", "image/png", "Image/JPEG", "application/x-image")
        one = [await post({"content-type": k}, f, path) for k, f in zip(kinds, PHOTOS, strict=True)]
        raw = [await post({"inference-header-content-length": "0"}, b"no image", path)]
        many = await post(*binary(PHOTOS), path)
        statistics = server._statistics(server.model("pets"))
        return [*one, many, *raw, statistics, server.configuration(server.model("pets"))]

    *one, many, raw, statistics, configuration = serving(bundle, use)
    want = servable(bundle).files.run({"image": np.array(PHOTOS, dtype=object)})["proba"]  # type: ignore[union-attr]
    assert many[0] == 200 and many[1]["outputs"][0]["shape"] == [4, 3]
    np.testing.assert_allclose(np.reshape(many[1]["outputs"][0]["data"], (4, 3)), want, rtol=1e-6)
    for (status, said), row in zip(one, want, strict=True):
        assert status == 200, said
        np.testing.assert_allclose(said["outputs"][0]["data"], row, atol=1e-6)
        best = said["outputs"][0]["data"][row.argmax()]
        assert said["parameters"] == {"label": NAMES[row.argmax()], "confidence": best}
    assert "parameters" not in many[1], "who writes a request asks for classes in it"
    assert raw[0] == 400 and "not an image: it begins with 'no image'" in raw[1]["error"]
    assert statistics["steps"]["read"]["count"] == 5 and statistics["steps"]["calibrate"]["count"] >= 5
    assert configuration["parameters"]["files"] == {"string_value": "image"}


def test_pixels_are_taken_as_before(served: tuple) -> None:  # type: ignore[type-arg]
    bundle, _, spec = served
    batch = images(2, 8, 8, spec["channels"])
    tensor = {"name": "image", "shape": batch.shape, "datatype": "UINT8", "data": batch.ravel().tolist()}

    async def use(server: Server, post: Any) -> Any:
        return await post({"content-type": "application/json"}, json.dumps({"inputs": [tensor]}).encode())

    status, said = serving(bundle, use)
    assert status == 200
    np.testing.assert_allclose(
        np.reshape(said["outputs"][0]["data"], (2, 3)), servable(bundle).run({"image": batch})["proba"], rtol=1e-6
    )


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([b""], "an empty file; expected an image"),
        ([b"GIF8"], "not an image: it begins with 'GIF8'"),
        ([PHOTOS[2][:300]], "a damaged image"),
        ([PHOTOS[0], b"%PDF-1.4"], "file 2 of 2: not an image: it begins with '%PDF-1.4'"),
        ([bomb(5001, 5000)], "an image of 5001 x 5000 pixels; expected at most 25,000,000 pixels"),
        ([bomb(2**31 - 1, 2**31 - 1)], "far too large (Image size (4611686014132420609 pixels)"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(served: tuple, files: list[bytes], said: str) -> None:  # type: ignore[type-arg]
    async def use(server: Server, post: Any) -> Any:
        refused = await post(*binary(files))
        assert (await post(*binary(PHOTOS[:1])))[0] == 200, "others are answered"
        return refused

    status, answer = serving(served[0], use)
    assert status == 400 and said in answer["error"]


def test_many_pictures_are_no_way_around_the_limit(
    served: tuple,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit is that of a request: what is left of it is known before the next file is read."""
    monkeypatch.setattr(serve, "MAX_PIXELS", 1000)
    monkeypatch.setattr(serve, "SMALL", 490)
    read = servable(served[0]).files.run  # type: ignore[union-attr]
    read({"image": np.array([photo("PNG", "L", 20, 25)] * 2, dtype=object)})
    with pytest.raises(DataError, match=r"file 2 of 2: an image of 20 x 26 pixels; expected at most 480(.|\n)*1,000"):
        read({"image": np.array([photo("PNG", "L", 26, 20)] * 2, dtype=object)})
    with pytest.raises(DataError, match="file 3 of 3: an image of 10 x 10 pixels; expected at most 0"):
        serve.decode_gray({"photo": np.array([*[photo("PNG", "L", 20, 25)] * 2, photo("PNG", "L", 10, 10)], object)})


def test_a_shadow_sees_files_too(served: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """It is compared, and captured once: beside the answer, not as one of its own."""
    bundle = served[0]
    files = {name: (bundle.path / name).read_bytes() for name in REQUIRED_FILES}
    other = write_bundle(tmp_path / "other", files | {"calibration.json": b'{"temperature": 2}'}, "m2", {})

    async def use(server: Server, post: Any) -> Any:
        await server.apply({"": Wish(str(bundle.path), shadow=str(other.path))})
        assert (await post(*binary(PHOTOS)))[0] == 200
        while not (said := server._statistics(server.model("pets", other.id)))["shadow"]["compared"]:
            await asyncio.sleep(0.01)
        return said["shadow"]

    assert serving(bundle, use, captures=CaptureLog(tmp_path / "kept", "pets", 1.0)) == {"compared": 4, "agreed": 4}
    captured = [c.bundle_id for c in read_captures(tmp_path / "kept")]
    assert sorted(captured) == sorted([bundle.id] * 4 + [other.id] * 4)


def test_files_are_captured_as_they_came(served: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """So that a picture costs what its file does, and people see all of it."""

    async def use(server: Server, post: Any) -> None:
        assert (await post(*binary(PHOTOS)))[0] == 200

    serving(served[0], use, captures=CaptureLog(tmp_path, "pets", 1.0))
    captured = list(read_captures(tmp_path))
    assert [c.input.tobytes() for c in captured] == PHOTOS
    task = get("image_classification")
    for capture, file in zip(captured, PHOTOS, strict=True):
        assert np.array_equal(task.captured(capture.input), decode(file))


@given(st.binary(max_size=300), st.sampled_from(["image/png", "image/jpeg", ""]))
@settings(max_examples=60)
def test_no_body_breaks_the_door(body: bytes, kind: str) -> None:
    """Whatever comes as a picture is one, or is refused with a reason."""
    bundle = test_no_body_breaks_the_door.bundle  # type: ignore[attr-defined]
    sent = PHOTOS[0][: len(body)] + body

    async def use(server: Server, post: Any) -> list[Any]:
        return [await post({"content-type": kind}, data) for data in (body, sent)]

    for status, said in serving(bundle, use):
        assert status == 200 or (status == 400 and said["error"])


@pytest.fixture(autouse=True)
def _bundle_for_any_body(served: tuple) -> None:  # type: ignore[type-arg]
    test_no_body_breaks_the_door.bundle = served[0]  # type: ignore[attr-defined]
