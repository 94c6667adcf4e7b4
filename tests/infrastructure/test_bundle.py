"""Bundles: whole or absent, verified byte by byte when opened, and clear about what is wrong."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe import __version__
from trilobe.errors import BundleError, DiskFull, UsageError
from trilobe.infrastructure.bundle import (
    MANIFEST,
    REQUIRED_FILES,
    bundle_id,
    open_bundle,
    read_bytes,
    read_json,
    write_bundle,
)

FILES = {name: f'{{"file": "{name}"}}'.encode() for name in REQUIRED_FILES}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", FILES, "m1", {"task": "images", "n": 3}).path


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_what_is_written_is_read(path: Path) -> None:
    bundle = open_bundle(path)
    assert bundle.manifest["task"] == "images" and bundle.model_id == "m1" and bundle.path == path
    assert {name: read_bytes(bundle, name) for name in FILES} == FILES
    assert read_json(bundle, "labels.json") == {"file": "labels.json"}
    assert len(bundle.id) == 12 and int(bundle.id, 16) >= 0


@settings(max_examples=20, deadline=None)
@given(extra=st.dictionaries(st.from_regex(r"[a-z]{1,9}\.bin", fullmatch=True), st.binary(max_size=99), max_size=3))
def test_round_trip_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, extra: dict[str, bytes]) -> None:
    files = {**FILES, **extra}
    written = write_bundle(tmp_path_factory.mktemp("any") / "b", files, "m1", {})
    opened = open_bundle(written.path)
    assert opened == written
    assert {name: read_bytes(opened, name) for name in files} == files


def test_the_id_is_that_of_the_content(path: Path, tmp_path: Path) -> None:
    same = write_bundle(tmp_path / "same", dict(reversed(FILES.items())), "m2", {})
    other = write_bundle(tmp_path / "other", {**FILES, "README.md": b"other"}, "m1", {})
    assert same.id == open_bundle(path).id != other.id


def test_writing_again_is_a_no_op_and_writing_another_an_error(path: Path) -> None:
    before = (path / MANIFEST).read_bytes()
    write_bundle(path, FILES, "m1", {"task": "images", "n": 3})
    for files, model in (({**FILES, "README.md": b"other"}, "m1"), (FILES, "m2")):
        with pytest.raises(BundleError, match="already holds the bundle"):
            write_bundle(path, files, model, {"task": "images", "n": 3})
    assert (path / MANIFEST).read_bytes() == before
    assert list(path.parent.iterdir()) == [path], "something was left behind"


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_missing_truncated_edited_file_is_named(path: Path, name: str) -> None:
    file = path / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=f"{name} has {len(whole) - 1} bytes; expected {len(whole)}"):
        open_bundle(path)
    file.write_bytes(whole[:-1] + b"!")
    with pytest.raises(BundleError, match=f"{name} was edited"):
        open_bundle(path)
    file.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing") as caught:
        open_bundle(path)
    assert caught.value.expected and caught.value.hint


def test_every_single_flipped_byte_of_a_file_is_noticed(path: Path) -> None:
    file = path / "labels.json"
    whole = file.read_bytes()
    for i in range(len(whole)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(BundleError):
            open_bundle(path)


def test_what_does_not_belong_is_named(path: Path, tmp_path: Path) -> None:
    (path / "extra.txt").write_text("x")
    with pytest.raises(BundleError, match=r"extra\.txt is in the folder but not in the manifest"):
        open_bundle(path)
    (path / "extra.txt").unlink()
    (path / "labels.json").rename(tmp_path / "labels.json")
    (path / "labels.json").symlink_to(tmp_path / "labels.json")
    with pytest.raises(BundleError, match=r"labels\.json is missing"):
        open_bundle(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "trilobe-bundle.v2", "trilobe": "2.3.1"}, r"update Trilobe \(pip install 'trilobe>=2.3.1'\)"),
        ({"format": "trilobe-bundle.v10.1", "trilobe": "9 && evil"}, r"update Trilobe \(pip install -U trilobe\)"),
        ({"format": "trilobe-bundle.v0"}, "package the model again with this version"),
        ({"format": "trilobe-bundle.v1.x"}, "point to a Trilobe bundle"),
        ({"format": "trilobe-bundle.v1.0.0"}, "point to a Trilobe bundle"),
        ({"format": "zip"}, "point to a Trilobe bundle"),
        ({"format": None}, "format None"),
        ({"id": "0" * 12}, "was edited"),
        ({"files": 3}, "cannot be used"),
        ({"files": {}}, "does not list weights.safetensors"),
        ({"model_id": 3}, "cannot be used"),
    ],
)
def test_bad_manifests(path: Path, changes: dict[str, object], message: str) -> None:
    edit_manifest(path, **changes)
    with pytest.raises(BundleError, match=message):
        open_bundle(path)


def test_a_newer_minor_is_read_and_what_it_adds_is_ignored(path: Path) -> None:
    """The rule of the format: within a major version there are only additions."""
    manifest = json.loads((path / MANIFEST).read_text())
    (path / "later.json").write_bytes(b"{}")
    files = {name: {**file, "compressed": False} for name, file in manifest["files"].items()}
    files["later.json"] = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    digests = {name: file["sha256"] for name, file in files.items()}
    edit_manifest(path, format="trilobe-bundle.v1.7", files=files, id=bundle_id(digests), deferral={"threshold": 0.7})
    bundle = open_bundle(path)
    assert bundle.manifest["deferral"] == {"threshold": 0.7} and read_json(bundle, "later.json") == {}
    (path / "later.json").write_bytes(b"[]")
    with pytest.raises(BundleError, match=r"later\.json was edited"):
        open_bundle(path)


def test_a_bundle_from_before_the_manifest_named_its_version(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest.pop("trilobe") == __version__
    (path / MANIFEST).write_text(json.dumps(manifest))
    opened = open_bundle(path)
    assert write_bundle(path, FILES, "m1", {"task": "images", "n": 3}) == opened, "the same, by another version"


def test_the_time_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    made = [write_bundle(tmp_path / name, FILES, "m1", {}) for name in "ab"]
    assert (made[0].path / MANIFEST).read_bytes() == (made[1].path / MANIFEST).read_bytes()
    assert made[0].manifest["created_at"] == 1e9
    for wrong in ("yesterday", "-1", "1.5", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
            write_bundle(tmp_path / "c", FILES, "m1", {})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"a"', b"[" * 100_000, b"null"])
def test_unparsable_manifests(path: Path, content: bytes) -> None:
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=MANIFEST):
        open_bundle(path)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", MANIFEST])
def test_only_plain_names(path: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="plain file names"):
        write_bundle(tmp_path / "new", {**FILES, name: b""}, "m1", {})
    assert not (tmp_path / "new").exists()
    files = json.loads((path / MANIFEST).read_text())["files"]
    files[name] = {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "bytes": 0}
    edit_manifest(path, files=files, id=bundle_id({n: f["sha256"] for n, f in files.items()}))
    with pytest.raises(BundleError, match="plain file names"):
        open_bundle(path)


def test_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"without model\.onnx"):
        write_bundle(tmp_path / "b", {n: b"" for n in REQUIRED_FILES if n != "model.onnx"}, "m1", {})
    with pytest.raises(UsageError, match="overwrite"):
        write_bundle(tmp_path / "b", FILES, "m1", {"id": "x"})
    with pytest.raises(BundleError, match="there is no bundle"):
        open_bundle(tmp_path / "b")
    bundle = write_bundle(tmp_path / "b", FILES, "m1", {})
    with pytest.raises(BundleError, match="does not list"):
        read_bytes(bundle, "../b/labels.json")
    bundle = write_bundle(tmp_path / "c", {**FILES, "labels.json": b"{"}, "m1", {})
    with pytest.raises(BundleError, match="not JSON"):
        read_json(bundle, "labels.json")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file size limit is a full disk that a test may have: writes fail half way with EFBIG."""
    script = f"""
import resource, signal
from pathlib import Path
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
write_bundle(Path({str(tmp_path)!r}, "b"), dict.fromkeys(REQUIRED_FILES, bytes(60_000)), "m1", {{}})
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert DiskFull.__name__ in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_killed_while_writing_means_absent(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from trilobe.infrastructure import bundle
write, left = bundle._write, 4
def killer(path, data):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
bundle._write = killer
bundle.write_bundle(Path({str(tmp_path)!r}, "b"), dict.fromkeys(bundle.REQUIRED_FILES, b"x"), "m1", {{}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9
    assert not (tmp_path / "b").exists()
    assert open_bundle(write_bundle(tmp_path / "b", FILES, "m1", {}).path).model_id == "m1"
