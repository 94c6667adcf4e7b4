"""The client against a real server: answers, reconnection, and the server's own words when something is wrong."""

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trilobe.errors import ServeError, UsageError
from trilobe.infrastructure import endpoint
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.client import Client
from trilobe.types import Endpoint

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from trilobe.errors import DataError
from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec
from trilobe.infrastructure.serve import serve_forever

def share_of_light(data):
    light = data["image"].mean(axis=(1, 2, 3), dtype=np.float32) / np.float32(255)
    if light.max() == 1:
        raise DataError("an image is all white", expected="something to see")
    return {"proba": np.stack([1 - light, light], axis=1)}

def load(bundle):
    specs = TensorSpec("image", "UINT8", (-1, -1, -1, 1)), TensorSpec("proba", "FP32", (-1, 2))
    example = {"image": np.zeros((1, 2, 2, 1), np.uint8)}
    return Servable(Pipeline([("light", share_of_light)]), specs[:1], specs[1:], example)

folder = Path(sys.argv[1])
serve_forever(folder, "light", load, captures=folder, port=int(sys.argv[2]), max_body=50_000)
"""


def start(folder: Path, port: int = 0) -> Endpoint:
    endpoint.deploy(folder, write_bundle(folder / "b", dict.fromkeys(REQUIRED_FILES, b"{}"), "m1", {}).path)
    return endpoint.start(folder, "light", [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(port)], 30)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("light")
    yield start(folder)
    endpoint.stop(folder)


@pytest.fixture
def client(served: Endpoint) -> Iterator[Client]:
    with Client(served.url, "light", timeout=20) as client:
        yield client


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (7, 5, 3, 1), (1, 200, 200, 1)])
def test_images_in_probabilities_out(client: Client, served: Endpoint, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    proba = client.infer(images)
    light = images.mean(axis=(1, 2, 3)) / 255
    assert proba.dtype == np.float32 and client.version == served.bundle_id
    np.testing.assert_allclose(proba, np.stack([1 - light, light], axis=1), rtol=1e-5)
    proba *= 0  # the caller's own array, to do with as it likes


def test_views_are_sent_as_they_look(client: Client) -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 6, 6, 1), dtype=np.uint8)
    assert (client.infer(images[::2, ::-1, 1:4]) == client.infer(images[::2, ::-1, 1:4].copy())).all()


def test_one_connection_serves_many_calls(client: Client) -> None:
    images = np.zeros((1, 2, 2, 1), np.uint8)
    client.infer(images)
    used = client._connection.sock
    for _ in range(5):
        client.infer(images)
        assert client.ready()
    assert client._connection.sock is used


def test_readiness_and_metadata(client: Client, served: Endpoint) -> None:
    assert client.ready()
    metadata = client.metadata()
    assert metadata["versions"] == [served.bundle_id]
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 1]}]
    with Client(served.url, "dark") as other:
        assert not other.ready()
        with pytest.raises(ServeError, match="404: unknown model 'dark'"):
            other.metadata()


def test_errors_carry_the_words_of_the_server(client: Client) -> None:
    for images, message in (
        (np.zeros((1, 2, 2, 3), np.uint8), r"400: 'image' has the shape \[1, 2, 2, 3\]"),
        (np.full((1, 2, 2, 1), 255, np.uint8), "400: step 'light': an image is all white; expected something to see"),
        (np.zeros((1, 300, 300, 1), np.uint8), "413: the body is too large"),
    ):
        with pytest.raises(ServeError, match=message):
            client.infer(images)
        assert client.infer(np.zeros((1, 2, 2, 1), np.uint8)).tolist() == [[1.0, 0.0]], "and it goes on"


def test_usage(client: Client) -> None:
    for images in (np.zeros((2, 2, 1), np.uint8), np.zeros((1, 2, 2, 1), np.float32)):
        with pytest.raises(UsageError, match="uint8"):
            client.infer(images)  # type: ignore[arg-type]
    for url in ("localhost:80", "ftp://x", "http://"):
        with pytest.raises(UsageError, match="http://host:port"):
            Client(url, "light")


def test_a_restarted_server_is_found_again(tmp_path: Path) -> None:
    images = np.zeros((1, 2, 2, 1), np.uint8)
    first = start(tmp_path)
    with Client(first.url, "light") as client:
        client.infer(images)
        endpoint.stop(tmp_path)
        with pytest.raises(ServeError, match="does not answer"):
            client.infer(images)
        assert not client.ready()
        second = start(tmp_path, port=int(first.url.rpartition(":")[2]))
        assert client.infer(images).tolist() == [[1.0, 0.0]]
        endpoint.stop(tmp_path)
        start(tmp_path, port=int(second.url.rpartition(":")[2]))
        assert client.infer(images).tolist() == [[1.0, 0.0]], "the kept connection was dropped meanwhile"
        endpoint.stop(tmp_path)


@pytest.mark.parametrize("body", [b"<html>", json.dumps({"outputs": []}).encode(), b"[]", b""])
def test_something_else_behind_the_url(body: bytes) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with (
            Client(f"http://127.0.0.1:{server.server_port}", "light", timeout=5) as client,
            pytest.raises(ServeError, match="not understood"),
        ):
            client.infer(np.zeros((1, 2, 2, 1), np.uint8))
        thread.join()
