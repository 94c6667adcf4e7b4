"""``package`` with everything it can write; and what is in an image runs with nothing but what the image names."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilobe import loop
from trilobe.errors import BundleError, NotFoundError, ServeError, UsageError
from trilobe.infrastructure.bundle import open_bundle
from trilobe.infrastructure.client import Client
from trilobe.infrastructure.packaging.installed import files_of, serving

has_keys = pytest.mark.skipif(not importlib.util.find_spec("cryptography"), reason="the extra 'sign' is not installed")


def unpacked(archive: Path, root: Path) -> Path:
    """The root of an image, from its layers in order."""
    with tarfile.open(archive) as tar:
        tar.extractall(root / "layout", filter="data")
    blobs = root / "layout" / "blobs" / "sha256"
    index = json.loads((root / "layout" / "index.json").read_text())
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_bytes())
    for layer in manifest["layers"]:
        with tarfile.open(blobs / layer["digest"][7:]) as tar:
            tar.extractall(root, filter="data")
    return root


@has_keys
def test_everything_at_once_and_again(trained, trilobe, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from trilobe.infrastructure.packaging.signing import verify

    key = Ed25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    (tmp_path / "pub").write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    options = ["--oci", tmp_path / "image.tar", "--sbom", tmp_path / "bom" / "b.json", "--kubernetes", tmp_path / "k8s",
               "--sign", tmp_path / "key"]  # fmt: skip
    said = trilobe("package", "-p", trained.folder, "--json", *options)
    assert said.code == 0, said.err
    assert "image sha256:" in said.err and "it holds no Python" in said.err
    bundle = verify(Path(said.json["path"]), tmp_path / "pub")
    assert json.loads((tmp_path / "bom" / "b.json").read_text())["metadata"]["component"]["version"] == bundle.id
    assert sorted(p.name for p in (tmp_path / "k8s").iterdir()) == ["deployment.yaml", "inferenceservice.yaml"]
    root = unpacked(tmp_path / "image.tar", tmp_path / "root")
    verify(root / "opt/holoscan/models/tiny", tmp_path / "pub")
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = trilobe("package", "-p", trained.folder, "--json", *options)
    assert again.code == 0 and again.json == said.json, again.err
    assert {p: p.read_bytes() for p in kept} == kept


def test_a_bundle_packaged_before(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loop.package(trained.folder)
    assert loop.package(trained.folder, bundle=made.id[:6]).id == made.id
    moved = shutil.copytree(made.path, tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")  # where no project is
    assert loop.package(bundle="moved", sbom="moved.json").id == made.id
    assert (tmp_path / "elsewhere" / "moved.json").exists()
    (moved / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        loop.package(bundle="moved", oci="image")
    assert not (tmp_path / "elsewhere" / "image").exists()


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"base": "."}, UsageError, "--base without --oci"),
        ({"oci": "x", "packages": True}, UsageError, "--packages without --base"),
        ({"oci": "x", "base": "nowhere"}, NotFoundError, "there is no image at nowhere"),
        ({"sign": "nowhere"}, NotFoundError, "there is no key at nowhere"),
        ({"bundle": "b", "model": "m"}, UsageError, "a bundle together with a model"),
        ({"bundle": "feed"}, NotFoundError, "no bundle"),
    ],
)
def test_what_cannot_be_meant_is_told_before_any_work(
    trained, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        loop.package(trained.folder, **options)
    assert not trained.state()["bundles"]


@pytest.fixture
def image(trained, tmp_path: Path) -> tuple[Path, list[str], dict[str, str]]:
    """An unpacked image, a Python that finds the image's code and the packages it names and no other, and its words."""
    loop.package(trained.folder, oci=str(tmp_path / "image.tar"))
    root = unpacked(tmp_path / "image.tar", tmp_path / "root")
    site = root / "opt/holoscan/packages"
    site.mkdir()
    for name, place in files_of(serving()[1:]):
        top = Path(name).parts[0]
        if not (site / top).exists():
            (site / top).symlink_to(Path(*place.parts[: len(place.parts) - len(Path(name).parts) + 1]))
    environment = {"PYTHONPATH": f"{root}/opt/holoscan/app:{site}", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    return root, [sys.executable, "-S"], environment


def test_infer_needs_nothing_that_the_image_does_not_name(image, shapes, tmp_path: Path) -> None:
    from trilobe.tasks.image_classification.data import encode_png

    root, python, environment = image
    X, _ = shapes(5, 3)
    for i, picture in enumerate(X):
        (root / "var/holoscan/input" / f"{i}.png").write_bytes(encode_png(picture))
    app = json.loads((root / "etc/holoscan/app.json").read_text())
    command = app["command"].replace("/opt/", f"{root}/opt/").replace("/var/", f"{root}/var/").split()
    done = subprocess.run([*python, *command[1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = sorted((root / "var/holoscan/output").rglob("*.jsonl"))
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert len(lines) == 5
    missing = subprocess.run([*python, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "No module named 'torch'" in missing.stderr, "this Python does not see what training needs"


def started(image: tuple[Path, list[str], dict[str, str]], **more: str) -> subprocess.Popen[str]:
    """A container's process: the image's entry point with the word ``serve``, on any free port."""
    root, python, environment = image
    work = root / "var/holoscan"
    settings = (work / "trilobe.toml").read_text().replace("_port = 8001", "_port = 0")
    (work / "trilobe.toml").write_text(settings.replace("/etc/trilobe/", f"{root}/etc/trilobe/"))
    script = f"""
import os
from pathlib import Path
from trilobe.infrastructure.packaging.entry import main
main(["serve", "--port", "0"], os.environ, Path({str(root)!r}))
"""
    return subprocess.Popen([*python, "-c", script], env=environment | more, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def ready(image: tuple[Path, list[str], dict[str, str]], **more: str) -> Iterator[str]:
    """The URL of a container that serves on all addresses of this machine."""
    server = started(image, **more)
    try:
        state = image[0] / "var/holoscan/.trilobe/endpoints/tiny/state.json"
        deadline = time.monotonic() + 60
        while not (state.exists() and json.loads(state.read_text())["state"] == "ready"):
            assert server.poll() is None and time.monotonic() < deadline, server.stderr.read()  # type: ignore[union-attr]
            time.sleep(0.1)
        yield json.loads(state.read_text())["url"].replace("0.0.0.0", "127.0.0.1")
    finally:
        server.terminate()
        server.wait(30)
        server.stderr.close()  # type: ignore[union-attr]


def test_serve_needs_nothing_that_the_image_does_not_name(image, shapes) -> None:
    with ready(image, TRILOBE_OPEN="1") as url, Client(url, "tiny") as client:
        proba = client.infer(shapes(4, 3)[0])
        np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-5)
        assert open_bundle(image[0] / "opt/holoscan/models/tiny").id == client.version
    kept = {p.name for p in (image[0] / "var/holoscan/.trilobe").iterdir()}
    assert kept <= {"endpoints", "captures"}, "no database to serve what is read from a folder"


def test_an_image_takes_pictures_from_who_has_a_token(image, shapes, trilobe, tmp_path: Path) -> None:
    """The secret is what ``trilobe token --file`` wrote; a picture is posted as it is, and answered as its pixels."""
    from trilobe.tasks.image_classification.data import encode_png

    made = trilobe("token", "web", "--file", tmp_path / "tokens.json")
    assert made.code == 0, made.err
    picture = shapes(1, 3)[0]
    with ready(image, TRILOBE_TOKENS=str(tmp_path / "tokens.json")) as url:
        with Client(url, "tiny") as client, pytest.raises(ServeError, match="401: no token came with the request"):
            client.metadata()
        with Client(url, "tiny", token=made.out.strip()) as client:
            proba = client.infer(picture)
            sent = np.array([encode_png(picture[0])], dtype=object)
            np.testing.assert_array_equal(client.call({"image": sent})["proba"], proba)
        for path in ("/v2/models/tiny/infer", "/invocations"):
            headers = {"Content-Type": "image/png", "Authorization": f"Bearer {made.out.strip()}"}
            asked = urllib.request.Request(url + path, encode_png(picture[0]), headers)
            with urllib.request.urlopen(asked) as answer:
                said = json.loads(answer.read())["outputs"][0]
            np.testing.assert_allclose(said["data"], proba[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "there is no file of tokens at "),
        ({"TRILOBE_OPEN": "0"}, "TRILOBE_OPEN=1 serves whoever reaches the port"),
        ({"TRILOBE_TOKENS": "/nowhere/else.json"}, "there is no file of tokens at /nowhere/else.json"),
        ({"TRILOBE_TOKENS": "trilobe.toml"}, "trilobe.toml cannot be used"),
    ],
)
def test_an_image_does_not_serve_strangers(image, more: dict[str, str], said: str) -> None:
    server = started(image, **more)
    _, told = server.communicate(timeout=60)
    assert server.returncode in (1, 2) and said in told
