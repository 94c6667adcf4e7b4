"""An image's layers, unpacked, and its own command run: over a folder, and as Amazon SageMaker starts a container."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trilobe.infrastructure.bundle import REQUIRED_FILES
from trilobe.infrastructure.bundle import write_bundle as write_folder
from trilobe.infrastructure.packaging.image import write_bundle
from trilobe.infrastructure.packaging.installed import files_of, serving
from trilobe.statistics import softmax
from trilobe.tasks.image_classification.data import encode_png

NAMES = ["dark", "light"]
SENT = np.linspace(0, 240, 3 * 16, dtype=np.uint8).reshape(3, 4, 4, 1)


def brightness() -> bytes:
    """A graph from gray pictures of 4 x 4 to logits: how dark, how light."""
    weights = [
        numpy_helper.from_array(np.repeat(np.array([[-1, 1]], np.float32), 16, axis=0), "w"),
        numpy_helper.from_array(np.array([8, -8], np.float32), "b"),
    ]
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "w", "b"], ["logits"])]
    graph = helper.make_graph(
        nodes, "brightness", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def expected(pixels: np.ndarray) -> np.ndarray:
    """What the graph says of pictures, by hand."""
    total = (pixels / 255).reshape(len(pixels), -1).sum(axis=1) - 8
    return softmax(np.stack([-total, total], axis=1), 2.0)


@dataclass
class Container:
    """An unpacked image: its command and environment, as a container has them but for where the root is."""

    root: Path
    config: Mapping[str, Any]

    def start(self, *words: str, **more: str) -> "subprocess.Popen[bytes]":
        """Its entry point with ``words``, by a Python that looks into the image first."""
        env = dict(line.split("=", 1) for line in self.config["Env"])
        paths = {k: v for k, v in env.items() if v.startswith("/")}
        env |= {k: ":".join(f"{self.root}{place}" for place in v.split(":")) for k, v in paths.items()}
        env |= {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPROFILEIMPORTTIME": "1", **more}
        command = self.config["Entrypoint"]
        assert command[0] == "python3"
        with (self.root / "told").open("wb") as told:  # no pipe: nobody reads while a server is up
            return subprocess.Popen([sys.executable, *command[1:], *words], env=env, stdout=told, stderr=told,
                                    cwd=f"{self.root}{self.config['WorkingDir']}")  # fmt: skip

    def told(self) -> str:
        """All that the process said."""
        return (self.root / "told").read_text()

    def loaded(self) -> set[str]:
        """The packages that it said it imports."""
        lines = [line.split("|") for line in self.told().splitlines() if line.startswith("import time:")]
        return {name.strip().partition(".")[0] for _, _, name in lines}


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory, unpack: Callable[[Path], Any]) -> Container:
    tmp_path = tmp_path_factory.mktemp("container")
    files = dict.fromkeys(REQUIRED_FILES, b"{}") | {
        "model.onnx": brightness(),
        "preprocessing.json": json.dumps({"version": "resize.v1", "height": 4, "width": 4, "channels": 1}).encode(),
        "labels.json": json.dumps({"names": NAMES}).encode(),
        "calibration.json": b'{"temperature": 2}',
    }
    bundle = write_folder(tmp_path / "b", files, "m1", {"project": "tones", "task": "image_classification"})
    write_bundle(bundle, tmp_path / "image")
    image = unpack(tmp_path / "image")
    root = image.write(tmp_path / "root")
    site = root / "opt/holoscan/packages"  # those that --packages would put there, which takes ten seconds
    site.mkdir()
    for name, place in files_of(serving()[1:]):
        top = Path(name).parts[0]
        if not (site / top).exists():
            (site / top).symlink_to(Path(*place.parts[: len(place.parts) - len(Path(name).parts) + 1]))
    manifest = root / "etc/holoscan/app.json"  # its command names the bundle where it is in a container
    manifest.write_text(manifest.read_text().replace("/opt/", f"{root}/opt/"))
    return Container(root, image.config["config"])


def test_over_a_folder_without_a_database(container: Container) -> None:
    """Neither what a project's records need, nor what only training does: a container pays for it at each start."""
    for i, pixels in enumerate(SENT):
        (container.root / "var/holoscan/input" / f"{i}.png").write_bytes(encode_png(pixels))
    process = container.start(HOLOSCAN_INPUT_PATH=f"{container.root}/var/holoscan/input",
                              HOLOSCAN_OUTPUT_PATH=f"{container.root}/var/holoscan/output")  # fmt: skip
    assert process.wait(60) == 0, container.told()
    (part,) = (container.root / "var/holoscan/output").glob("part-*")
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    np.testing.assert_allclose([row["proba"] for row in rows], expected(SENT), rtol=1e-5)
    assert [row["label"] for row in rows] == [NAMES[best] for best in expected(SENT).argmax(axis=1)]
    seen = container.loaded()
    assert {"trilobe", "onnxruntime", "PIL"} <= seen
    assert not seen & {"sqlalchemy", "alembic", "torch", "onnx", "scipy", "jinja2"}


@contextmanager
def hosted(container: Container, **more: str) -> Iterator[str]:
    """As the host starts it: ``docker run IMAGE serve``, then asks ``/ping`` until it is well. Then it says stop."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = container.start(
        "serve", SAGEMAKER_BIND_TO_PORT=str(port), SAGEMAKER_SAFE_PORT_RANGE="23000-23999", **more
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, container.told()
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
    assert process.returncode == 0, "it ends when it is told to, within the 30 s that it is given"


def asked(url: str, body: bytes, kind: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind})) as answer:
        return json.load(answer)


def test_as_sagemaker_hosts_it(container: Container) -> None:
    with hosted(container, TRILOBE_OPEN="1") as url:
        tensor = {"name": "image", "shape": SENT.shape, "datatype": "UINT8", "data": SENT.ravel().tolist()}
        said = asked(f"{url}/invocations", json.dumps({"inputs": [tensor]}).encode(), "application/json")
        np.testing.assert_allclose(np.reshape(said["outputs"][0]["data"], (3, 2)), expected(SENT), rtol=1e-5)
        for kind in ("image/png", "application/x-image"):
            said = asked(f"{url}/invocations", encode_png(SENT[2]), kind)
            np.testing.assert_allclose(said["outputs"][0]["data"], expected(SENT[2:])[0], rtol=1e-5)
            assert said["parameters"] == {"label": "light", "confidence": said["outputs"][0]["data"][1]}
        with pytest.raises(urllib.error.HTTPError, match="400"):
            asked(f"{url}/invocations", b"nothing", "text/csv")
    assert not container.loaded() & {"sqlalchemy", "alembic", "torch", "onnx", "scipy", "jinja2", "grpc"}


def test_sagemaker_does_not_open_it_by_itself(container: Container) -> None:
    """Anybody may set the variables of SageMaker: that no token is asked for is said by the one made for that."""
    with pytest.raises(AssertionError, match="TRILOBE_OPEN=1 serves whoever reaches the port"), hosted(container):
        pass


def test_on_which_port_without_a_word_of_it(container: Container) -> None:
    """8080, where SageMaker asks a container that is alone."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("0.0.0.0", 8080))
            taken.listen()
        except OSError:
            pass  # somebody else has it: as good
        assert container.start("serve", TRILOBE_OPEN="1").wait(60) == 1
    assert "port 8080 of 0.0.0.0 is in use" in container.told()
