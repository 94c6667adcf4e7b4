"""OCI layouts: the same bytes twice, whole or absent, nothing outside the image, readable by skopeo and by hand."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.errors import DataError, DiskFull, NotFoundError, UsageError
from trilobe.infrastructure.packaging.oci import Entry, Layer, read_image, write_image

CONFIG = {"User": "65532", "Entrypoint": ["/bin/app"], "Env": {"A": "1"}, "Labels": {"of": "us"}}
LAYERS = [
    Layer("program", [Entry("bin/app", lambda: b"#!/bin/sh\n", mode=0o755)]),
    Layer("data", [Entry("var/work", None, owner=65532), Entry("opt/b", lambda: b"b"), Entry("opt/a", lambda: b"")]),
]
skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed (make test-system)")


def write(path: Path, layers: list[Layer] = LAYERS, **more: Any) -> str:
    return write_image(path, layers, CONFIG, {"org.opencontainers.image.title": "t"}, tag="1", **more)


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_what_is_written_is_read_by_hand(tmp_path: Path, unpack: Callable[[Path], Any]) -> None:
    digest = write(tmp_path / "image", created=1e9)
    image = unpack(tmp_path / "image")
    assert image.digest == digest
    assert image.files == {"bin/app": b"#!/bin/sh\n", "opt/b": b"b", "opt/a": b""}
    assert image.config["created"] == "2001-09-09T01:46:40Z"
    assert image.config["config"]["Entrypoint"] == ["/bin/app"] and "Cmd" not in image.config["config"]
    assert "A=1" in image.config["config"]["Env"]
    assert image.members["bin/app"].mode == 0o755 and image.members["opt/a"].mode == 0o644
    assert {m.uid for n, m in image.members.items() if n != "var/work"} == {0} and image.members[
        "var/work"
    ].uid == 65532
    assert {m.mtime for m in image.members.values()} == {315_532_800}
    assert all(m.isdir() and m.mode == 0o755 for n, m in image.members.items() if n in ("bin", "opt", "var"))
    for layer in image.manifest["layers"]:
        assert image.blob(layer)[4:8] == bytes(4), "gzip holds no time"


def test_the_same_bytes_twice_whenever_and_however_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    before = os.umask(0o077)
    try:
        turned = [layer._replace(entries=list(reversed(layer.entries))) for layer in LAYERS]
        monkeypatch.chdir(tmp_path)
        write(Path("deep/two"), turned)
        write(Path("three.tar"))
    finally:
        os.umask(before)
    assert content(tmp_path / "one") == content(tmp_path / "deep" / "two")
    with tarfile.open(tmp_path / "three.tar") as tar:
        assert {m.mtime for m in tar} == {315_532_800}
        tar.extractall(tmp_path / "three", filter="data")
    assert content(tmp_path / "one") == content(tmp_path / "three")
    one = (tmp_path / "three.tar").read_bytes()
    (tmp_path / "three.tar").unlink()
    write(tmp_path / "three.tar")
    assert (tmp_path / "three.tar").read_bytes() == one


@pytest.mark.parametrize("name", ["image", "image.tar"])
def test_again_is_a_no_op_and_another_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    kept = (tmp_path / name).stat().st_mtime_ns
    write(tmp_path / name)
    with pytest.raises(UsageError, match="already holds something else"):
        write(tmp_path / name, LAYERS[:1])
    assert (tmp_path / name).stat().st_mtime_ns == kept
    assert [p.name for p in tmp_path.iterdir()] == [name], "something was left behind"


def test_what_else_is_at_the_path_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "folder.tar").mkdir()
    for name in ("file", "folder", "folder.tar"):
        with pytest.raises(UsageError, match="already holds something else"):
            write(tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "", "a/", "a\0b", "a\\b", "a\nb", ".wh.x", "a/.wh..wh..opq"],
)
def test_no_path_leaves_the_image_or_erases_from_it(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match="expected a plain relative path"):
        write(tmp_path / "image", [Layer("bad", [Entry(path, lambda: b"")])])
    assert not list(tmp_path.iterdir())


def test_a_path_comes_once_and_is_a_file_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="comes twice"):
        write(tmp_path / "image", [Layer("bad", [Entry("a", lambda: b"1"), Entry("a", lambda: b"2")])])
    with pytest.raises(UsageError, match="'a' is a file and a folder"):
        write(tmp_path / "image", [Layer("bad", [Entry("a", lambda: b"1"), Entry("a/b", lambda: b"2")])])


NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=60
).filter(lambda name: name not in (".", "..") and not name.startswith(".wh."))


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.lists(NAMES, min_size=1, max_size=4).map("/".join), st.binary(max_size=200), max_size=5))
def test_round_trip_of_any_names_and_bytes(
    tmp_path_factory: pytest.TempPathFactory, unpack: Callable[[Path], Any], files: dict[str, bytes]
) -> None:
    files = {k: v for k, v in files.items() if not any(other.startswith(f"{k}/") for other in files)}
    path = tmp_path_factory.mktemp("any") / "image"
    write(path, [Layer("any", [Entry(k, lambda v=v: v) for k, v in files.items()])])
    assert unpack(path).files == files


# A base --------------------------------------------------------------------------------------------------------------


def test_a_base_comes_first_and_is_overridden(tmp_path: Path, base: Path, unpack: Callable[[Path], Any]) -> None:
    write(tmp_path / "image", base=base)
    image = unpack(tmp_path / "image")
    assert len(image.layers) == 3 and image.files["usr/bin/python3"] == b"#!/x\n"
    assert image.config["architecture"] == "amd64" and image.config["variant"] == "v1"
    env = image.config["config"]["Env"]
    assert env[0] == "PATH=/base/bin" and "LANG=C.UTF-8" in env and "A=1" in env
    assert image.config["config"]["Labels"] == {"of": "us"} and "Cmd" not in image.config["config"]
    with tarfile.open(tmp_path / "base.tar", "w") as tar:
        tar.add(base, ".")
    write(tmp_path / "from-tar", base=tmp_path / "base.tar")
    assert content(tmp_path / "from-tar") == content(tmp_path / "image")
    _, config = read_image(base, "arm64")
    assert config["architecture"] == "arm64"


def damaged(base: Path, what: str) -> None:
    manifest, _ = read_image(base)
    blob = base / "blobs" / "sha256" / manifest["layers"][0]["digest"].removeprefix("sha256:")
    config = base / "blobs" / "sha256" / manifest["config"]["digest"].removeprefix("sha256:")
    index = json.loads((base / "index.json").read_text())
    if what == "edited layer":
        blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    elif what == "cut layer":
        blob.write_bytes(blob.read_bytes()[:-1])
    elif what == "missing layer":
        blob.unlink()
    elif what == "edited configuration":
        config.write_bytes(config.read_bytes() + b" ")
    elif what == "a digest that is a path":
        index["manifests"][0]["digest"] = "sha256:../../../../../etc/passwd"
    elif what == "two images":
        index["manifests"] *= 2
    elif what == "none":
        index["manifests"] = []
    elif what == "of Docker":
        index["manifests"][0]["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json"
    elif what == "endless JSON":
        (base / "index.json").write_bytes(b" " * (5 << 20))
        return
    elif what == "no JSON":
        (base / "index.json").write_bytes(b"{" * 100_000)
        return
    elif what == "no index":
        (base / "index.json").unlink()
        return
    (base / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("edited layer", "edited or cut"),
        ("cut layer", "edited or cut"),
        ("missing layer", "is missing"),
        ("edited configuration", "was edited"),
        ("a digest that is a path", "expected sha256: and 64"),
        ("two images", "holds 0 images for linux/amd64"),
        ("none", "holds 0 images"),
        ("of Docker", "holds a 'application/vnd.docker"),
        ("endless JSON", "larger than"),
        ("no JSON", "is not JSON"),
        ("no index", "index.json is missing"),
    ],
)
def test_a_base_that_cannot_be_trusted(tmp_path: Path, base: Path, what: str, said: str) -> None:
    damaged(base, what)
    with pytest.raises(DataError, match=said):
        write(tmp_path / "image", base=base)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_base_that_is_no_layout(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no image at .*(.|\n)*skopeo copy"):
        write(tmp_path / "image", base=tmp_path / "nowhere")
    (tmp_path / "file.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match="no tar archive"):
        write(tmp_path / "image", base=tmp_path / "file.tar")


# The disk ------------------------------------------------------------------------------------------------------------


def in_another_process(script: str) -> subprocess.CompletedProcess[str]:
    head = "from pathlib import Path\nfrom trilobe.infrastructure.packaging import oci\n"
    return subprocess.run([sys.executable, "-W", "error", "-c", head + script], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["image", "image.tar"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    """A file size limit is a full disk that a test may have."""
    done = in_another_process(f"""
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
layer = oci.Layer("noise", [oci.Entry("noise", lambda: os.urandom(60_000))])
oci.write_image(Path({str(tmp_path)!r}, {name!r}), [layer], {{}}, {{}}, tag="1")
""")
    assert DiskFull.__name__ in done.stderr.splitlines()[-2], done.stderr
    assert not list(tmp_path.iterdir())


def test_killed_while_writing_means_absent(tmp_path: Path) -> None:
    done = in_another_process(f"""
import os, signal
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
layers = [oci.Layer("a", [oci.Entry("a", lambda: b"a")]), oci.Layer("b", [oci.Entry("b", kill)])]
oci.write_image(Path({str(tmp_path)!r}, "image"), layers, {{}}, {{}}, tag="1")
""")
    assert done.returncode == -9
    assert not (tmp_path / "image").exists()
    write(tmp_path / "image")


def test_a_folder_one_may_not_write_to() -> None:
    from trilobe.errors import StorageError

    with pytest.raises(StorageError, match="could not be written"):
        write(Path("/proc/nowhere/image"))


# skopeo, the standard tool ------------------------------------------------------------------------------------------


def run(*words: object) -> str:
    done = subprocess.run(["skopeo", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@skopeo
@pytest.mark.parametrize("transport", ["oci", "oci-archive"])
def test_skopeo_inspects_and_copies(tmp_path: Path, base: Path, transport: str) -> None:
    path = tmp_path / ("image" if transport == "oci" else "image.tar")
    digest = write(path, base=base)
    said = json.loads(run("inspect", f"{transport}:{path}:1"))
    assert said["Digest"] == digest and len(said["Layers"]) == 3 and said["Labels"]["of"] == "us"
    run("copy", "--insecure-policy", f"{transport}:{path}", f"docker-archive:{tmp_path}/docker.tar:name:1")
    with tarfile.open(tmp_path / "docker.tar") as tar:
        (manifest,) = json.load(tar.extractfile("manifest.json"))  # type: ignore[arg-type]
        assert manifest["RepoTags"] == ["docker.io/library/name:1"]
        members = set()
        for layer in manifest["Layers"]:
            found = tar.extractfile(layer)
            assert found
            with tarfile.open(fileobj=found) as inner:
                members |= set(inner.getnames())
    assert {"bin/app", "opt/a", "usr/bin/python3"} <= members


@skopeo
def test_a_base_that_skopeo_wrote(tmp_path: Path, base: Path, unpack: Callable[[Path], Any]) -> None:
    for to in (f"oci:{tmp_path}/copied:v", f"oci-archive:{tmp_path}/copied.tar"):
        run("copy", "--insecure-policy", f"oci:{base}", to)
    for i, name in enumerate(("copied", "copied.tar")):
        write(tmp_path / f"image-{i}", base=tmp_path / name)
        assert unpack(tmp_path / f"image-{i}").files["usr/bin/python3"] == b"#!/x\n"


def test_gzip_is_a_layer_as_tools_expect_it(tmp_path: Path) -> None:
    write(tmp_path / "image")
    manifest, _ = read_image(tmp_path / "image")
    for layer in manifest["layers"]:
        assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
        data = (tmp_path / "image" / "blobs" / "sha256" / layer["digest"].removeprefix("sha256:")).read_bytes()
        assert gzip.decompress(data)
