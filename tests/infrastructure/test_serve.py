"""Serving: every path of the protocol, every bad input, swaps under load, crashes: a real server in a real process."""

import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trilobe.errors import BundleError, NotFoundError, ServeError
from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.capture import read_captures
from trilobe.infrastructure.serve import bind

SCRIPT = """
import json, sys, time
from pathlib import Path
import numpy as np
from trilobe.infrastructure.bundle import read_bytes, read_json
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec, onnx_step
from trilobe.infrastructure.serve import serve_forever

folder, port, rate = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
Path(folder, "modules.json").write_text(json.dumps(sorted(sys.modules)))

def load(bundle):
    delay = read_json(bundle, "preprocessing.json").get("delay", 0)
    def to_float(data):
        if delay:
            time.sleep(delay if data["image"].shape[2] == 5 else 0.05)  # pictures to warm up with are 4 wide
        return {"x": data["image"].astype(np.float32) / 255}
    steps = [("to_float", to_float), onnx_step(read_bytes(bundle, "model.onnx"))]
    image, proba = TensorSpec("image", "UINT8", (-1, -1, -1, 3)), TensorSpec("proba", "FP32", (-1, 2))
    servable = Servable(Pipeline(steps), (image,), (proba,), {"image": np.zeros((1, 4, 4, 3), np.uint8)})
    Path(folder, "modules.json").write_text(json.dumps(sorted(sys.modules)))
    return servable

serve_forever(folder, "colors", load, captures=folder / "captures", port=port, capture_rate=rate, max_body=100_000)
"""
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)


def graph(weights: np.ndarray) -> bytes:
    """x (n, h, w, 3) -> mean of each channel -> softmax(mean @ weights)."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["z"]),
        helper.make_node("Softmax", ["z"], ["proba"], axis=-1),
    ]
    g = helper.make_graph(
        nodes,
        "colors",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "h", "w", 3])],
        [helper.make_tensor_value_info("proba", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(g, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def weights_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, 2)).astype(np.float32)


def expected(images: np.ndarray, seed: int) -> np.ndarray:
    z = np.exp((images.astype(np.float32) / 255).mean(axis=(1, 2)) @ weights_of(seed))
    return z / z.sum(axis=1, keepdims=True)


def make_bundle(path: Path, seed: int, model: bytes | None = None, delay: float = 0.0) -> Path:
    files = {**dict.fromkeys(REQUIRED_FILES, b"{}"), "model.onnx": graph(weights_of(seed)) if model is None else model}
    files["preprocessing.json"] = json.dumps({"delay": delay}).encode()
    return write_bundle(path, files, f"m{seed}", {}).path


def command(folder: Path, port: int = 0, rate: float = 0.0) -> list[str]:
    return [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(port), str(rate)]


def start(folder: Path, bundle: Path, **options: Any) -> endpoint.Endpoint:
    endpoint.deploy(folder, bundle)
    return endpoint.start(folder, "colors", command(folder, **options), timeout=30)


Answer = tuple[int, dict[str, str], Any]


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)


def call(url: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """Status, lower-case headers and parsed JSON (or bytes) of one request on a connection of its own."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    connection = connect(url)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        data, found = response.read(), {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()
    return response.status, found, json.loads(data) if found["content-type"] == "application/json" else data


def image_tensor(images: np.ndarray = IMAGES, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "image", "shape": images.shape, "datatype": "UINT8", "data": images.ravel().tolist()}
    return {k: v for k, v in {**tensor, **changes}.items() if v is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the one server that most tests ask."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[endpoint.Endpoint]:
    yield start(folder, make_bundle(folder / "b1", 1))
    final = endpoint.stop(folder)
    log = (folder / "server.log").read_text()
    assert final.state == "stopped" and endpoint.read_state(folder).state == "stopped"
    assert log == "", "a server that was only asked good and bad questions has nothing to complain about"


# --- the protocol ---------------------------------------------------------------------------------------------------

INFER = "/v2/models/colors/infer"


def test_every_get_path(served: endpoint.Endpoint) -> None:
    version = served.bundle_id
    status, _, server = call(served.url, "GET", "/v2")
    assert status == 200 and server["name"] == "trilobe" and "binary_tensor_data" in server["extensions"]
    assert server["version"]
    assert call(served.url, "GET", "/v2/health/live")[::2] == (200, {"live": True})
    assert call(served.url, "GET", "/v2/health/ready")[::2] == (200, {"ready": True})
    for base in ("/v2/models/colors", f"/v2/models/colors/versions/{version}", "/v2/models/%63olors"):
        assert call(served.url, "GET", base)[::2] == (
            200,
            {
                "name": "colors",
                "versions": [version],
                "platform": "trilobe_pipeline",
                "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
                "outputs": [{"name": "proba", "datatype": "FP32", "shape": [-1, 2]}],
            },
        )
        assert call(served.url, "GET", f"{base}/ready")[0] == 200
        (stats,) = call(served.url, "GET", f"{base}/stats")[2]["model_stats"]
        assert stats["version"] == version and set(stats["steps"]) == {"to_float", "model"}
        assert all(step["count"] >= 1 and step["ns"] > 0 for step in stats["steps"].values())


@pytest.mark.parametrize("data", [IMAGES.ravel().tolist(), IMAGES.tolist()], ids=["flat", "nested"])
@pytest.mark.parametrize("versioned", [False, True])
def test_json_both_ways(served: endpoint.Endpoint, data: list[Any], versioned: bool) -> None:
    path = f"/v2/models/colors/versions/{served.bundle_id}/infer" if versioned else INFER
    status, _, answer = call(served.url, "POST", path, {"id": "é-7", "inputs": [image_tensor(data=data)]})
    assert status == 200, answer
    (output,) = answer.pop("outputs")
    assert answer == {"model_name": "colors", "model_version": served.bundle_id, "id": "é-7"}
    assert (output["name"], output["datatype"], output["shape"]) == ("proba", "FP32", [3, 2])
    np.testing.assert_allclose(np.reshape(output["data"], (3, 2)), expected(IMAGES, 1), rtol=1e-5)
    assert "id" not in call(served.url, "POST", path, {"inputs": [image_tensor()]})[2]


def binary_body(**request: Any) -> tuple[bytes, dict[str, str]]:
    tensor = image_tensor(data=None, parameters={"binary_data_size": IMAGES.nbytes})
    head = json.dumps({"inputs": [tensor], **request}).encode()
    return head + IMAGES.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def read_binary(headers: dict[str, str], body: bytes) -> tuple[dict[str, Any], np.ndarray]:
    length = int(headers["inference-header-content-length"])
    answer = json.loads(body[:length])
    (output,) = answer["outputs"]
    assert output["parameters"]["binary_data_size"] == len(body) - length and "data" not in output
    return answer, np.frombuffer(body[length:], "<f4").reshape(output["shape"])


WANT = {"outputs": [{"name": "proba", "parameters": {"binary_data": True}}]}


@pytest.mark.parametrize("options", [WANT, {"parameters": {"binary_data_output": True}}], ids=["output", "request"])
@pytest.mark.parametrize("encoding", ["", "gzip", "deflate"])
def test_binary_both_ways(served: endpoint.Endpoint, options: dict[str, Any], encoding: str) -> None:
    body, headers = binary_body(id="1", **options)
    if encoding:
        body = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
        headers["Content-Encoding"] = encoding
    status, found, data = call(served.url, "POST", INFER, body, headers)
    assert status == 200, data
    answer, proba = read_binary(found, data)
    assert answer["id"] == "1" and answer["model_version"] == served.bundle_id
    np.testing.assert_allclose(proba, expected(IMAGES, 1), rtol=1e-5)


def test_binary_one_way_only(served: endpoint.Endpoint) -> None:
    body, headers = binary_body(outputs=[{"name": "proba"}])
    status, found, answer = call(served.url, "POST", INFER, body, headers)
    assert status == 200 and "inference-header-content-length" not in found
    np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (3, 2)), expected(IMAGES, 1), rtol=1e-5)
    _, found, data = call(served.url, "POST", INFER, {"inputs": [image_tensor()], **WANT})
    np.testing.assert_allclose(read_binary(found, data)[1], expected(IMAGES, 1), rtol=1e-5)
    # What is said of an output wins over what is said of the request.
    options = {
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "proba", "parameters": {"binary_data": False}}],
    }
    assert "data" in call(served.url, "POST", INFER, {"inputs": [image_tensor()], **options})[2]["outputs"][0]


def test_the_contract_of_containers_on_sagemaker(served: endpoint.Endpoint) -> None:
    assert call(served.url, "GET", "/ping")[0] == 200
    status, _, answer = call(served.url, "POST", "/invocations", {"inputs": [image_tensor()]})
    assert status == 200
    np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (3, 2)), expected(IMAGES, 1), rtol=1e-5)
    body, headers = binary_body(parameters={"binary_data_output": True})
    kind = "application/vnd.sagemaker-triton.binary+json;json-header-size="
    sent = {"Content-Type": kind + headers["Inference-Header-Content-Length"]}
    status, found, data = call(served.url, "POST", "/invocations", body, sent)
    length = found.pop("content-type").removeprefix(kind)
    assert status == 200 and "inference-header-content-length" not in found
    proba = read_binary({"inference-header-content-length": length}, data)[1]
    np.testing.assert_allclose(proba, expected(IMAGES, 1), rtol=1e-5)
    assert call(served.url, "GET", "/invocations")[0] == 405
    assert call(served.url, "POST", "/invocations", b"nothing")[0] == 400


def test_chunked_bodies(served: endpoint.Endpoint) -> None:
    connection = connect(served.url)
    body = json.dumps({"inputs": [image_tensor()]}).encode()
    connection.request("POST", INFER, iter([body[:9], body[9:]]), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()


def test_small_answers_are_not_held_back() -> None:
    """Asyncio turns Nagle's algorithm off only for sockets that say they are TCP; else each answer waits 40 ms."""
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "method", "path"),
    [
        (404, "GET", "/"),
        (404, "GET", "/v1"),
        (404, "GET", "/v2/"),
        (404, "GET", "/v2/health"),
        (404, "GET", "/v2/health/well"),
        (404, "GET", "/v2/models"),
        (404, "GET", "/v2/models/nope"),
        (404, "GET", "/v2/models/nope/ready"),
        (404, "POST", "/v2/models/nope/infer"),
        (404, "GET", "/v2/models/colors/nope"),
        (404, "GET", "/v2/models/colors/versions"),
        (404, "GET", "/v2/models/colors/versions/1"),
        (404, "GET", "/v2/models/colors/versions/1/ready"),
        (404, "POST", "/v2/models/colors/versions/1/infer"),
        (404, "GET", "/v2/models/col%2Fors"),
        (404, "GET", "/v2/models/%00"),
        (405, "POST", "/v2"),
        (405, "POST", "/v2/health/ready"),
        (405, "DELETE", "/v2/models/colors"),
        (405, "GET", "/v2/models/colors/infer"),
        (405, "PUT", "/v2/models/colors/infer"),
    ],
)
def test_wrong_paths_and_methods(served: endpoint.Endpoint, status: int, method: str, path: str) -> None:
    found, headers, answer = call(served.url, method, path)
    assert found == status and answer["error"]
    if status == 405:
        assert headers["allow"] == ("POST" if path.endswith("infer") else "GET, HEAD")


BAD = {
    "no JSON": b"nope",
    "empty": b"",
    "not UTF-8": b'{"inputs": "\xff"}',
    "NaN": b'{"inputs": [{"name": "image", "shape": [1,1,1,3], "datatype": "UINT8", "data": [NaN, 1, 2]}]}',
    "deep": b'{"inputs": ' + b"[" * 49_000,
    "deep and closed": b'{"inputs": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep data": b'{"inputs": [{"name": "image", "shape": [1,1,1,3], "datatype": "UINT8", "data": '
    + b"[" * 40_000
    + b"]" * 40_000
    + b"}]}",
    "a list": b"[]",
    "no inputs": {},
    "inputs null": {"inputs": None},
    "missing input": {"inputs": []},
    "unknown input": {"inputs": [image_tensor(name="nope")]},
    "an input more": {"inputs": [image_tensor(), image_tensor(name="nope")]},
    "an input twice": {"inputs": [image_tensor(), image_tensor()]},
    "no shape": {"inputs": [image_tensor(shape=None)]},
    "no data": {"inputs": [image_tensor(data=None)]},
    "data null": b'{"inputs": [{"name": "image", "shape": [1,1,1,3], "datatype": "UINT8", "data": null}]}',
    "data a number": {"inputs": [image_tensor(data=3)]},
    "wrong datatype": {"inputs": [image_tensor(datatype="FP32")]},
    "unknown datatype": {"inputs": [image_tensor(datatype="IMAGE")]},
    "lower case": {"inputs": [image_tensor(datatype="uint8")]},
    "fewer dimensions": {"inputs": [image_tensor(shape=[180])]},
    "more dimensions": {"inputs": [image_tensor(shape=[1, 3, 4, 5, 3])]},
    "fixed dimension": {"inputs": [image_tensor(shape=[3, 3, 4, 5])]},
    "product": {"inputs": [image_tensor(shape=[3, 4, 4, 3])]},
    "negative": {"inputs": [image_tensor(shape=[-3, -4, 5, 3])]},
    "free": {"inputs": [image_tensor(shape=[-1, 4, 5, 3])]},
    "zero": {"inputs": [image_tensor(shape=[0, 4, 5, 3], data=[])]},
    "huge": {"inputs": [image_tensor(shape=[2**62, 2**62, 2**62, 3])]},
    "larger than 64 bits": {"inputs": [image_tensor(shape=[10**40, 4, 5, 3])]},
    "wraps to the right product": {"inputs": [image_tensor(shape=[3, 2**64 + 4, 5, 3])]},
    "fractional": {"inputs": [image_tensor(shape=[3.5, 4, 5, 3])]},
    "ragged": {"inputs": [image_tensor(data=[[[[1, 2, 3]], [[1, 2]]]], shape=[1, 2, 1, 3])]},
    "nested otherwise": {"inputs": [image_tensor(data=IMAGES.reshape(3, 5, 4, 3).tolist())]},
    "partly nested": {"inputs": [image_tensor(data=IMAGES.reshape(3, 60).tolist())]},
    "too large a number": {"inputs": [image_tensor(data=[256] * 180)]},
    "far too large a number": {"inputs": [image_tensor(data=[2**70] * 180)]},
    "negative number": {"inputs": [image_tensor(data=[-1] * 180)]},
    "fractions": {"inputs": [image_tensor(data=[0.5] * 180)]},
    "strings": {"inputs": [image_tensor(data=["1"] * 180)]},
    "booleans": {"inputs": [image_tensor(data=[True] * 180)]},
    "nulls": {"inputs": [image_tensor(data=[None] * 180)]},
    "id a number": {"id": 7, "inputs": [image_tensor()]},
    "unknown output": {"inputs": [image_tensor()], "outputs": [{"name": "nope"}]},
    "an output twice": {"inputs": [image_tensor()], "outputs": [{"name": "proba"}] * 2},
    "output without name": {"inputs": [image_tensor()], "outputs": [{}]},
    "binary_data": {"inputs": [image_tensor()], "outputs": [{"name": "proba", "parameters": {"binary_data": "yes"}}]},
    "binary_data_output": {"inputs": [image_tensor()], "parameters": {"binary_data_output": 1}},
    "binary without bytes": {"inputs": [image_tensor(data=None, parameters={"binary_data_size": 180})]},
    "binary and data": {"inputs": [image_tensor(parameters={"binary_data_size": 180})]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(served: endpoint.Endpoint, name: str) -> None:
    status, _, answer = call(served.url, "POST", INFER, BAD[name])
    assert status == 400 and answer["error"], answer
    assert len(answer["error"]) < 2000


@pytest.mark.parametrize("length", ["-1", "x", "", "1.5", "9" * 30, "999999", "3", "²"])
def test_bad_header_lengths(served: endpoint.Endpoint, length: str) -> None:
    body, _ = binary_body()
    status, _, answer = call(served.url, "POST", INFER, body, {"Inference-Header-Content-Length": length})
    assert status == 400 and answer["error"]


@pytest.mark.parametrize("size", [-1, 0, 179, 181, 10**30, 180.5, True, "180", [180]])
def test_bad_binary_sizes(served: endpoint.Endpoint, size: Any) -> None:
    head = json.dumps({"inputs": [image_tensor(data=None, parameters={"binary_data_size": size})]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    status, _, answer = call(served.url, "POST", INFER, head + IMAGES.tobytes(), headers)
    assert status == 400 and "binary_data_size" in answer["error"]


def test_bytes_left_over_or_missing(served: endpoint.Endpoint) -> None:
    body, headers = binary_body()
    for wrong in (body + b"x", body[:-1]):
        assert call(served.url, "POST", INFER, wrong, headers)[0] == 400
    assert call(served.url, "POST", INFER, IMAGES.tobytes(), {"Inference-Header-Content-Length": "0"})[0] == 400


def test_bad_encodings(served: endpoint.Endpoint) -> None:
    body, headers = binary_body()
    for encoding, data, status in (
        ("br", body, 415),
        ("gzip", body, 400),
        ("gzip", gzip.compress(body)[:-1], 400),
        ("deflate", zlib.compress(body) + b"x", 400),
        ("gzip", gzip.compress(bytes(10**7)), 413),
    ):
        found, _, answer = call(served.url, "POST", INFER, data, {**headers, "Content-Encoding": encoding})
        assert found == status and answer["error"]


def test_oversized_bodies_are_refused_before_they_are_read(served: endpoint.Endpoint) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 "), "the answer must come though no body was sent"
    status, _, answer = call(served.url, "POST", INFER, bytes(2_000_000))
    assert status == 413 and "100000" in answer["error"]
    connection = connect(served.url)
    connection.request("POST", INFER, iter([bytes(60_000)] * 3), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_without_a_length_there_is_no_body(served: endpoint.Endpoint) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 400 "), "an empty body is no request for inference"


def test_clients_that_leave_half_way_harm_nobody(served: endpoint.Endpoint) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    for text in ("", "POST", f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{{"):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(text.encode())
    assert call(served.url, "GET", "/v2/health/ready")[0] == 200


# --- the process ----------------------------------------------------------------------------------------------------


def test_the_serving_process_is_light(served: endpoint.Endpoint, folder: Path) -> None:
    assert call(served.url, "POST", INFER, {"inputs": [image_tensor()]})[0] == 200
    modules = set(json.loads((folder / "modules.json").read_text()))
    assert "onnxruntime" in modules and not modules & {"torch", "sqlalchemy", "onnx", "scipy", "PIL"}


def test_importing_serve_is_light() -> None:
    script = "import sys, trilobe.infrastructure.serve as s; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    modules = set(eval(done.stdout))
    assert not modules & {"torch", "sqlalchemy", "onnx", "onnxruntime", "uvicorn", "scipy"}


def test_swap_under_load(tmp_path: Path) -> None:
    """Clients that never pause, five swaps: no request fails, every answer is wholly of the version it names."""
    folder = tmp_path / "endpoint"
    paths = [make_bundle(tmp_path / f"b{seed}", seed) for seed in (1, 2)]
    ready = start(folder, paths[0], rate=0.1)
    seed_of = {
        json.loads((path / "manifest.json").read_text())["id"]: seed for seed, path in zip((1, 2), paths, strict=True)
    }
    body, headers = binary_body(**WANT)
    answers: list[tuple[str, np.ndarray]] = []
    failures: list[Any] = []
    done = threading.Event()

    def client() -> None:
        connection = connect(ready.url)
        while not done.is_set():
            try:
                connection.request("POST", INFER, body, headers)
                response = connection.getresponse()
                data = response.read()
                if response.status != 200:
                    failures.append(data)
                    continue
                answer, proba = read_binary({k.lower(): v for k, v in response.getheaders()}, data)
                answers.append((answer["model_version"], proba))
            except (OSError, http.client.HTTPException) as error:
                failures.append(error)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for i in range(1, 6):
            time.sleep(0.1)
            now = endpoint.replace(folder, paths[i % 2], timeout=20)
            assert (now.state, seed_of[now.bundle_id]) == ("ready", i % 2 + 1)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert endpoint.stop(folder).state == "stopped"
    assert failures == [] and len(answers) > 100
    assert {version for version, _ in answers} == set(seed_of)
    for version, proba in answers:
        np.testing.assert_allclose(proba, expected(IMAGES, seed_of[version]), rtol=1e-5)
    captures = read_captures(folder / "captures", endpoint="colors")
    assert {c.bundle_id for c in captures} == set(seed_of)
    assert abs(len(captures) / (3 * len(answers)) - 0.1) < 5 * 0.3 / len(answers) ** 0.5
    for capture in captures:
        np.testing.assert_allclose(
            capture.proba, expected(capture.input[None], seed_of[capture.bundle_id])[0], rtol=1e-5
        )
        assert (capture.input == IMAGES).all(axis=(1, 2, 3)).any()


def test_a_broken_bundle_leaves_the_old_one_serving(tmp_path: Path) -> None:
    folder = tmp_path / "endpoint"
    ready = start(folder, make_bundle(tmp_path / "good", 1))
    try:
        edited = make_bundle(tmp_path / "edited", 2)
        (edited / "model.onnx").write_bytes(b"")
        with pytest.raises(BundleError, match=r"model\.onnx has 0 bytes"):
            endpoint.replace(folder, edited)
        nan = np.full((3, 2), np.nan, np.float32)
        for name, model, reason in (("garbage", b"not a graph", "cannot be loaded"), ("nan", graph(nan), "not finite")):
            broken = make_bundle(tmp_path / name, 2, model=model)
            for _ in range(2):  # asking again tries again
                with pytest.raises(ServeError, match=reason) as caught:
                    endpoint.replace(folder, broken, timeout=20)
                assert f"{ready.bundle_id} still serves" in str(caught.value)
            assert endpoint.status(folder) == ready and reason in endpoint.read_state(folder).error
            status, _, answer = call(ready.url, "POST", INFER, {"inputs": [image_tensor()]})
            assert status == 200 and answer["model_version"] == ready.bundle_id
        (folder / "desired.json").write_text("{")  # a vandal: nothing changes
        time.sleep(0.7)
        assert endpoint.status(folder) == ready
        assert (folder / "server.log").read_text().count("nothing is deployed") == 1, "said once, not at every look"
        better = endpoint.replace(folder, make_bundle(tmp_path / "better", 3), timeout=20)
        assert better.bundle_id != ready.bundle_id and better.url == ready.url
        assert endpoint.read_state(folder).error == ""
    finally:
        endpoint.stop(folder)


def test_killed_then_captures_are_readable_and_it_starts_again(tmp_path: Path) -> None:
    folder = tmp_path / "endpoint"
    ready = start(folder, make_bundle(tmp_path / "b", 1), rate=1.0)
    for _ in range(20):
        assert call(ready.url, "POST", INFER, {"inputs": [image_tensor()]})[0] == 200
    os.kill(ready.pid, signal.SIGKILL)
    assert endpoint.stop(folder).state == "stopped"
    assert endpoint.read_state(folder).state == "ready", "that file lies, and status knows"
    assert len(read_captures(folder / "captures")) >= 57, "all but the last request, whose captures follow its answer"
    again = endpoint.start(folder, "colors", command(folder, rate=1.0), timeout=30)
    try:
        assert again.state == "ready" and again.pid != ready.pid and again.bundle_id == ready.bundle_id
        assert call(again.url, "POST", INFER, {"inputs": [image_tensor()]})[0] == 200
    finally:
        endpoint.stop(folder)
    assert len(list((folder / "captures" / "colors").iterdir())) == 2
    assert len(read_captures(folder / "captures")) >= 60


def test_stopping_finishes_what_is_under_way_and_the_loop_stays_live(tmp_path: Path) -> None:
    folder = tmp_path / "endpoint"
    ready = start(folder, make_bundle(tmp_path / "slow", 1, delay=2.0), rate=1.0)
    answers: list[Answer] = []
    thread = threading.Thread(
        target=lambda: answers.append(call(ready.url, "POST", INFER, {"inputs": [image_tensor()]}))
    )
    thread.start()
    time.sleep(0.2)
    assert call(ready.url, "GET", "/v2/health/live")[0] == 200
    assert answers == [], "health is answered while the model works"
    assert endpoint.stop(folder).state == "stopped"
    thread.join()
    assert answers[0][0] == 200
    assert len(read_captures(folder / "captures")) == 3
    assert endpoint.read_state(folder).state == "stopped"


def test_not_ready_until_the_first_load(tmp_path: Path) -> None:
    """A first bundle that does not load: alive, not ready, 503; a good one mends it."""
    folder = tmp_path / "endpoint"
    endpoint.deploy(folder, make_bundle(tmp_path / "bad", 1, model=b"garbage"))
    with pytest.raises(ServeError, match=r"failed to load: .*cannot be loaded"):
        endpoint.start(folder, "colors", command(folder), timeout=30)
    assert endpoint.status(folder).state == "stopped", "start leaves nothing running"
    with (folder / "log").open("w") as log, subprocess.Popen(command(folder), stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 20
            while endpoint.status(folder).state != "failed" and time.monotonic() < deadline:
                time.sleep(0.05)
            url = endpoint.status(folder).url
            assert call(url, "GET", "/v2/health/live")[0] == 200
            for path in ("/v2/health/ready", "/v2/models/colors", "/v2/models/colors/ready"):
                status, _, answer = call(url, "GET", path)
                assert status == 503 and "not ready" in answer["error"]
            assert call(url, "POST", INFER, {"inputs": [image_tensor()]})[0] == 503
            assert endpoint.replace(folder, make_bundle(tmp_path / "good", 1), timeout=20).state == "ready"
            assert call(url, "GET", "/v2/health/ready")[0] == 200
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0, (folder / "log").read_text()


def test_what_start_refuses(tmp_path: Path, folder: Path, served: endpoint.Endpoint) -> None:
    new = tmp_path / "endpoint"
    with pytest.raises(NotFoundError, match="no endpoint was ever started"):
        endpoint.status(new)
    new.mkdir()
    with pytest.raises(ServeError, match="nothing is deployed"):
        endpoint.start(new, "colors", command(new), timeout=30)
    endpoint.deploy(new, make_bundle(tmp_path / "b", 1))
    port = int(served.url.rpartition(":")[2])
    with pytest.raises(ServeError, match=f"port {port} of 127.0.0.1 is in use"):
        endpoint.start(new, "colors", command(new, port=port), timeout=30)
    with pytest.raises(ServeError, match=r"is not ready after 0\.3 s"):
        endpoint.start(new, "colors", [sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.3)
    with pytest.raises(ServeError, match="no server runs"):
        endpoint.replace(new, tmp_path / "b")
    with pytest.raises(ServeError, match="already running"):
        endpoint.start(folder, "colors", command(folder))
    second = subprocess.run(command(folder), capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "another server already works" in second.stderr
    assert endpoint.status(folder) == served, "the second server said nothing in the first one's name"
