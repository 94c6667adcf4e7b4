"""Bundles: portable folders with a model ready to serve and the evidence that it may be (format ``trilobe-bundle.v1``).

A bundle is whole or absent, and opening one verifies every byte the manifest lists. What the files mean is the
business of the task that wrote them; here they are names, sizes and digests. The manifest's own extra keys are for
people and reports: they are not covered by the id.

The format is ``trilobe-bundle.vMAJOR`` or ``trilobe-bundle.vMAJOR.MINOR``. A higher minor only adds keys and files,
which are ignored here; a higher major changes what is there, and is refused with the Trilobe that reads it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

import msgspec

from trilobe import __version__
from trilobe.errors import BundleError, DiskFull, StorageError, UsageError
from trilobe.files import FULL, sync_folder
from trilobe.types import Bundle

FORMAT, MAJOR = "trilobe-bundle.v1", 1
MANIFEST = "manifest.json"
REQUIRED_FILES = (
    "weights.safetensors",
    "model.onnx",
    "preprocessing.json",
    "labels.json",
    "calibration.json",
    "baseline.json",
    "evidence.json",
    "README.md",
)


class _File(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int


class _Manifest(msgspec.Struct, frozen=True):
    format: str
    id: str
    model_id: str
    created_at: float
    files: dict[str, _File]
    trilobe: str = ""  # the version that wrote it, which hence reads it


def write_bundle(path: Path, files: Mapping[str, bytes], model_id: str, meta: Mapping[str, Any]) -> Bundle:
    """Write ``files`` and their manifest to the folder ``path``: all of it or, whatever happens, none of it.

    The id is the first 12 hex digits of the SHA-256 over the sorted (name, digest) pairs, so equal content has an
    equal id. Writing what is already there is a no-op; anything else at ``path`` is left alone and raises
    :class:`~trilobe.errors.BundleError`. A name that is not plain, or one of :data:`REQUIRED_FILES` missing, raises
    :class:`~trilobe.errors.UsageError`; a full disk :class:`~trilobe.errors.DiskFull`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bundle = write_bundle(Path(folder, "b1"), dict.fromkeys(REQUIRED_FILES, b"{}"), "m1", {"task": "demo"})
    ...     (bundle.id, bundle.model_id, open_bundle(bundle.path).manifest["task"])
    ('...', 'm1', 'demo')
    """
    manifest = _manifest(files, model_id, meta)
    if path.exists():
        return _same(open_bundle(path), manifest)
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}")
    try:
        fresh.mkdir(parents=True)
        for name, data in {**files, MANIFEST: json.dumps(manifest, indent=2).encode()}.items():
            _write(fresh / name, data)
        sync_folder(fresh)
        fresh.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # somebody else was faster
            return _same(open_bundle(path), manifest)
        if error.errno in FULL:
            raise DiskFull(f"no space left to write {path}", hint="free some space and package again") from error
        raise StorageError(f"{path} could not be written: {error.strerror}", expected="a writable folder") from error
    return Bundle(manifest["id"], path, model_id, manifest)


def open_bundle(path: Path) -> Bundle:
    """Open the bundle at ``path`` after verifying all of it: names, sizes, digests, nothing missing, nothing added.

    Raises :class:`~trilobe.errors.BundleError` that names the file, what was expected of it and what came.

    >>> open_bundle(Path("nowhere"))
    Traceback (most recent call last):
    trilobe.errors.BundleError: there is no bundle at nowhere; expected a folder with manifest.json
      next: ...
    """
    raw, manifest = _read_manifest(path)
    for name in REQUIRED_FILES:
        if name not in manifest.files:
            raise _broken(path, f"the manifest does not list {name}", f"all of {', '.join(REQUIRED_FILES)}")
    if manifest.id != (expected := bundle_id({n: f.sha256 for n, f in manifest.files.items()})):
        raise _broken(path, f"{MANIFEST} was edited: its id is {manifest.id!r}", f"{expected!r} for the files it lists")
    present = {entry.name for entry in path.iterdir()}
    for name in sorted(present - set(manifest.files) - {MANIFEST}):
        raise _broken(path, f"{name} is in the folder but not in the manifest", "only the files the manifest lists")
    bundle = Bundle(manifest.id, path, manifest.model_id, raw)
    for name, file in manifest.files.items():
        if not _plain(name):
            raise _broken(path, f"the manifest lists {name!r}", "plain file names")
        if (path / name).is_symlink() or not (path / name).is_file():
            raise _broken(path, f"{name} is missing", f"a file of {file.bytes} bytes")
        read_bytes(bundle, name)
    return bundle


def read_bytes(bundle: Bundle, name: str) -> bytes:
    """The bytes of file ``name``, verified again as they are read, so that what is used is what was checked.

    >>> read_bytes(Bundle("b1", Path("b1"), "m1", {"files": {"README.md": {}}}), "labels.json")
    Traceback (most recent call last):
    trilobe.errors.BundleError: bundle b1: the manifest does not list labels.json; expected one of: README.md
      next: ...
    """
    files = bundle.manifest.get("files", {})
    if name not in files:
        raise _broken(bundle.path, f"the manifest does not list {name}", f"one of: {', '.join(sorted(files))}")
    expected = msgspec.convert(files[name], _File)
    try:
        data = (bundle.path / name).read_bytes()
    except OSError as error:
        raise _broken(bundle.path, f"{name} cannot be read ({error.strerror})", "a readable file") from error
    if len(data) != expected.bytes:
        raise _broken(bundle.path, f"{name} has {len(data)} bytes", f"{expected.bytes} bytes, as its manifest says")
    if (digest := hashlib.sha256(data).hexdigest()) != expected.sha256:
        raise _broken(bundle.path, f"{name} was edited: its SHA-256 is {digest}", expected.sha256)
    return data


def read_json(bundle: Bundle, name: str) -> Any:
    """The parsed JSON of file ``name``; raises :class:`~trilobe.errors.BundleError` where it is none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bundle = write_bundle(Path(folder, "b"), dict.fromkeys(REQUIRED_FILES, b'{"a": 1}'), "m1", {})
    ...     read_json(bundle, "labels.json")
    {'a': 1}
    """
    data = read_bytes(bundle, name)
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _broken(bundle.path, f"{name} is not JSON ({error})", "valid JSON") from error


def _manifest(files: Mapping[str, bytes], model_id: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    if missing := [name for name in REQUIRED_FILES if name not in files]:
        raise UsageError(f"a bundle without {', '.join(missing)}", expected=f"all of {', '.join(REQUIRED_FILES)}")
    if odd := [name for name in files if not _plain(name)]:
        raise UsageError(f"a bundle with a file named {odd[0]!r}", expected=f"plain file names other than {MANIFEST}")
    if taken := sorted(set(meta) & set(_Manifest.__struct_fields__)):
        raise UsageError(f"meta would overwrite {taken} of the manifest", expected="other keys")
    listed = {n: {"sha256": hashlib.sha256(files[n]).hexdigest(), "bytes": len(files[n])} for n in sorted(files)}
    head = {"format": FORMAT, "id": bundle_id({n: str(f["sha256"]) for n, f in listed.items()}), "model_id": model_id}
    made = {"created_at": source_date(time.time()), "trilobe": __version__}
    # A round trip through JSON, so that what is returned now equals what is read back later.
    whole: dict[str, Any] = json.loads(json.dumps({**head, **made, "files": listed, **meta}))
    return whole


def _read_manifest(path: Path) -> tuple[dict[str, Any], _Manifest]:
    try:
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"there is no bundle at {path}",
            expected=f"a folder with {MANIFEST}",
            hint="check the path, or package again",
        ) from error
    try:
        raw = msgspec.json.decode(data, type=dict[str, Any])
        _expect_readable(path, raw)
        return raw, msgspec.convert(raw, _Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _broken(path, f"{MANIFEST} cannot be used ({error})", "the JSON that packaging wrote") from error


def _expect_readable(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise BundleError unless the format is of our major version; which minor does not matter."""
    said = raw.get("format")
    found = re.fullmatch(r"trilobe-bundle\.v(\d{1,9})(?:\.\d{1,9})?", said) if isinstance(said, str) else None
    if found and int(found[1]) == MAJOR:
        return
    hint = "point to a Trilobe bundle"
    if found and int(found[1]) > MAJOR:
        by = str(raw.get("trilobe") or "")
        which = f"pip install 'trilobe>={by}'" if re.fullmatch(r"\d[\w.+-]{0,30}", by) else "pip install -U trilobe"
        hint = f"update Trilobe ({which}), or package again with {__version__}"
    elif found:
        hint = "package the model again with this version"
    raise BundleError(f"bundle {path} has the format {said!r}", expected=f"{FORMAT!r}, or a minor of it", hint=hint)


def _same(bundle: Bundle, manifest: Mapping[str, Any]) -> Bundle:
    """The bundle that is there, if it is the one wanted; only when and by which version it was made may differ."""
    made = {"created_at": 0, "trilobe": ""}
    if {**bundle.manifest, **made} != {**manifest, **made}:
        raise BundleError(
            f"{bundle.path} already holds the bundle {bundle.id}, different from {manifest['id']}",
            expected="an unused path, or the same content",
            hint="write to another folder; bundles are never edited",
        )
    return bundle


def bundle_id(digests: Mapping[str, str]) -> str:
    """The id of a bundle of files with these SHA-256 digests, by name.

    >>> bundle_id({"a": "0"}) == bundle_id({"a": "0"}) != bundle_id({"a": "1"})
    True
    """
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:12]


def source_date(otherwise: float) -> float:
    """Seconds since the epoch: ``SOURCE_DATE_EPOCH`` where it is set (reproducible-builds.org), else ``otherwise``.

    >>> source_date(1.5) if "SOURCE_DATE_EPOCH" not in os.environ else 1.5
    1.5
    """
    if not (said := os.environ.get("SOURCE_DATE_EPOCH")):
        return otherwise
    if not re.fullmatch(r"\d{1,11}", said):
        raise UsageError(f"SOURCE_DATE_EPOCH = {said!r}", expected="whole seconds since 1970")
    return float(said)


def _plain(name: str) -> bool:
    return name not in ("", ".", "..", MANIFEST) and not set(name) & set("/\\\0")


def _broken(path: Path, problem: str, expected: str) -> BundleError:
    return BundleError(f"bundle {path}: {problem}", expected=expected, hint="package the model again, or copy it anew")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
