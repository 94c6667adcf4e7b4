"""A small bundle, an unpacker that trusts nothing the packager says, and a base image made by hand."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.types import Bundle

EVIDENCE = [{"check": "accuracy", "figure": 0.9, "low": 0.8, "high": 0.95, "n": 100, "passed": True}]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    files = {name: f'{{"file": "{name}"}}'.encode() for name in REQUIRED_FILES}
    files["evidence.json"] = json.dumps(EVIDENCE).encode()
    return write_bundle(tmp_path / "bundle", files, "m1", {"project": "Digits_2", "task": "image_classification"})


class Unpacked:
    """An OCI layout read by hand: every digest and size checked, layers applied in order."""

    def __init__(self, layout: Path) -> None:
        self.blobs = layout / "blobs" / "sha256"
        assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
        self.index = json.loads((layout / "index.json").read_text())
        (described,) = self.index["manifests"]
        self.digest = described["digest"]
        self.manifest = json.loads(self.blob(described))
        self.config = json.loads(self.blob(self.manifest["config"]))
        self.layers = [self.tar(layer) for layer in self.manifest["layers"]]
        assert len(self.layers) == len(self.config["rootfs"]["diff_ids"])
        assert len(self.config["history"]) == len(self.layers)
        for data, unpacked in zip(self.layers, self.config["rootfs"]["diff_ids"], strict=True):
            assert unpacked == f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.members: dict[str, tarfile.TarInfo] = {}
        self.files: dict[str, bytes] = {}
        for data in self.layers:
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    self.members[member.name] = member
                    if member.isfile():
                        self.files[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]

    def blob(self, described: dict[str, Any]) -> bytes:
        data = (self.blobs / described["digest"].removeprefix("sha256:")).read_bytes()
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == described["digest"]
        assert len(data) == described["size"]
        return data

    def tar(self, layer: dict[str, Any]) -> bytes:
        data = self.blob(layer)
        return gzip.decompress(data) if layer["mediaType"].endswith("+gzip") else data

    def write(self, to: Path) -> Path:
        """The image's root as a folder."""
        for name, member in self.members.items():
            path = to / name
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.write_bytes(self.files[name])
        return to


@pytest.fixture(scope="session")
def unpack() -> Callable[[Path], Unpacked]:
    return Unpacked


def put(blobs: Path, data: bytes, kind: str) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image of two platforms, as ``skopeo copy --all`` leaves it; that of amd64 holds one file."""
    layout = tmp_path / "base"
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    described = []
    for architecture in ("arm64", "amd64"):
        packed = io.BytesIO()
        with tarfile.open(mode="w", fileobj=packed) as tar:
            info = tarfile.TarInfo("usr/bin/python3")
            info.size, info.mode = 5, 0o755
            tar.addfile(info, io.BytesIO(b"#!/x\n"))
        data = packed.getvalue()
        layer = put(blobs, gzip.compress(data), "application/vnd.oci.image.layer.v1.tar+gzip")
        config = {
            "architecture": architecture, "os": "linux", "variant": "v1",
            "config": {"Env": ["PATH=/base/bin", "PYTHON_VERSION=3.11.9", "LANG=C.UTF-8"], "Cmd": ["python3"],
                       "Labels": {"of": "base"}},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}"]},
        }  # fmt: skip
        manifest = {
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": [layer],
            "config": put(blobs, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        }  # fmt: skip
        found = put(blobs, json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
        described.append({**found, "platform": {"os": "linux", "architecture": architecture}})
    listed = json.dumps({"schemaVersion": 2, "manifests": described}).encode()
    nested = put(blobs, listed, "application/vnd.oci.image.index.v1+json")
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [nested]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return layout
