"""OCI image layouts (image-spec 1.0), written without a daemon and without a network: the same bytes twice.

Here an image is layers of named bytes and a configuration; what the files are is the business of ``image.py``. All
that could differ between two runs is fixed: the order of files, their owners, modes and times (1980-01-01, the first
day that a zip archive can hold), and the header of gzip. What a layer unpacks to, and hence the id of the image, does
not depend on the machine; its compressed bytes do, as far as the machine has another zlib.
"""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, NamedTuple, Protocol

import msgspec

from trilobe.errors import DataError, DiskFull, NotFoundError, StorageError, UsageError
from trilobe.files import FULL, sync_folder

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
TIME = 315_532_800  # 1980-01-01
_PIECE = 1 << 20
_MAX_JSON = 4 << 20  # what container registries take
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


class Entry(NamedTuple):
    """A file of a layer, read when its turn comes; a folder where ``read`` is None."""

    path: str
    read: Callable[[], bytes] | None
    mode: int = 0o644
    owner: int = 0


class Layer(NamedTuple):
    """Files that travel together, and a word on where they are from."""

    words: str
    entries: Sequence[Entry]


@dataclass(frozen=True, slots=True)
class Base:
    """An image that another one is built on: its layers and its configuration, as its layout says."""

    layers: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]


class _Blob(NamedTuple):
    digest: str
    size: int
    unpacked: str  # the digest before compression


def write_image(
    path: Path,
    layers: Sequence[Layer],
    config: Mapping[str, Any],
    annotations: Mapping[str, str],
    *,
    tag: str,
    base: Path | None = None,
    architecture: str = "amd64",
    created: float = 0.0,
) -> str:
    """Write an image as an OCI layout to ``path``: a folder, or one file where the name ends in ``.tar``.

    ``config`` holds what a container starts with (``Entrypoint``, ``Env`` as a mapping, ``User``, ...), ``created``
    is in seconds since the epoch. The layers of ``base``, itself a layout, come first, and what it configures holds
    unless ``config`` says otherwise. Whole or absent; the same image at ``path`` is left as it is.

    Returns the digest of the manifest. Raises :class:`~trilobe.errors.UsageError` for an entry that would land outside
    the image or erase files of other layers, and for a ``path`` that holds something else;
    :class:`~trilobe.errors.DataError` for a base that cannot be used; :class:`~trilobe.errors.DiskFull`.

    >>> import tempfile
    >>> hello = Layer("a greeting", [Entry("opt/hello.txt", lambda: b"hello")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     one = write_image(Path(folder, "one"), [hello], {"User": "65532"}, {}, tag="1")
    ...     two = write_image(Path(folder, "two"), [hello], {"User": "65532"}, {}, tag="1")
    ...     (one == two, sorted(p.name for p in Path(folder, "one").iterdir()))
    (True, ['blobs', 'index.json', 'oci-layout'])
    """
    path = path.absolute()
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}")
    try:
        blobs = fresh / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        under = copy_base(base, blobs, architecture) if base else Base((), {})
        written = [_write_layer(blobs, layer) for layer in layers]
        whole = _config(under.config, config, layers, written, architecture, created)
        listed = [*under.layers, *({"mediaType": f"{LAYER}+gzip", "digest": b.digest, "size": b.size} for b in written)]
        manifest = {
            "schemaVersion": 2, "mediaType": MANIFEST, "config": _write_json(blobs, CONFIG, whole), "layers": listed,
            "annotations": dict(annotations),
        }  # fmt: skip
        described = _write_json(blobs, MANIFEST, manifest)
        named = {**described, "annotations": {"org.opencontainers.image.ref.name": tag}}
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [named]}
        _write(fresh / "index.json", _json(index))
        _write(fresh / "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _publish(fresh, path)
        return str(described["digest"])
    except OSError as e:
        if e.errno in FULL:
            raise DiskFull(f"no space left to write {path}", hint="free some space and package again") from e
        raise StorageError(f"{path} could not be written: {e.strerror}", expected="a folder one may write to") from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _publish(fresh: Path, path: Path) -> None:
    """Put the finished layout where it belongs, in one step; the same one there already is left alone."""
    if path.suffix == ".tar":
        packed = fresh / "packed.tar"
        members = sorted(fresh.rglob("*"))
        with packed.open("xb") as f:
            with tarfile.open(mode="w", fileobj=f, format=tarfile.USTAR_FORMAT) as tar:
                for member in members:
                    _pack(tar, member, str(member.relative_to(fresh)))
            f.flush()
            os.fsync(f.fileno())
        if path.exists():
            _expect(path.is_file() and _digest(path) == _digest(packed), path)
            return
        packed.rename(path)
    else:
        for folder in (fresh / "blobs" / "sha256", fresh):
            sync_folder(folder)
        try:
            _expect(not path.is_file(), path)
            fresh.rename(path)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            _expect(_files(path) == _files(fresh), path)
    sync_folder(path.parent)


def _expect(same: bool, path: Path) -> None:
    if not same:
        raise UsageError(f"{path} already holds something else", expected="an unused path, or the same image")


def _files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): _digest(p) for p in folder.rglob("*") if p.is_file()}


def _config(
    under: Mapping[str, Any],
    config: Mapping[str, Any],
    layers: Sequence[Layer],
    written: Sequence[_Blob],
    architecture: str,
    created: float,
) -> dict[str, Any]:
    """The configuration of the whole image: the base's, with ours on top."""
    at = timestamp(created)
    inherited = under.get("config") or {}
    env = dict(line.partition("=")[::2] for line in inherited.get("Env") or [])
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **env, **config.get("Env", {})}
    labels = {**(inherited.get("Labels") or {}), **config.get("Labels", {})}
    ours = {**inherited, "Cmd": None, **config, "Env": [f"{k}={v}" for k, v in env.items()], "Labels": labels}
    diffs = list(under.get("rootfs", {}).get("diff_ids", []))
    past = list(under.get("history") or ({"created_by": "base image"} for _ in diffs))
    return {
        **{k: v for k, v in under.items() if k in ("variant", "os.version", "os.features")},
        "architecture": under.get("architecture", architecture),
        "os": under.get("os", "linux"),
        "created": at,
        "config": {k: v for k, v in ours.items() if v is not None},
        "rootfs": {"type": "layers", "diff_ids": diffs + [b.unpacked for b in written]},
        "history": past + [{"created": at, "created_by": f"trilobe: {layer.words}"} for layer in layers],
    }


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339, in whole seconds.

    >>> timestamp(0)
    '1970-01-01T00:00:00Z'
    """
    import datetime

    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Writable(Protocol):
    def write(self, data: bytes, /) -> Any: ...


class _Hashed(io.RawIOBase):
    """A file that keeps the digest and the number of the bytes written to it."""

    def __init__(self, to: _Writable) -> None:
        self.to, self.sha, self.size = to, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.to.write(data)
        self.sha.update(data)
        self.size += len(data)
        return len(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self.sha.hexdigest()}"


def _write_layer(blobs: Path, layer: Layer) -> _Blob:
    """A layer as a compressed tar, with the folders its files lie in, sorted by path."""
    entries = {_placed(e.path): e for e in layer.entries}
    if len(entries) != len(layer.entries):
        twice = sorted(e.path for e in layer.entries)
        raise UsageError(f"a layer with a path that comes twice among {twice[:5]}", expected="each path once")
    for path in list(entries):
        for parent in map(str, Path(path).parents):
            if entries.setdefault(parent, Entry(parent, None)).read:
                raise UsageError(f"{parent!r} is a file and a folder of the image", expected="one of them")
    entries.pop(".", None)
    part = blobs / "part"
    with part.open("xb") as f:
        packed = _Hashed(f)
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=packed, mtime=0) as zipped:
            plain = _Hashed(zipped)
            with tarfile.open(mode="w|", fileobj=plain, format=tarfile.PAX_FORMAT) as tar:
                for path in sorted(entries):
                    _add(tar, entries[path]._replace(path=path))
        f.flush()
        os.fsync(f.fileno())
    part.rename(blobs / packed.digest.removeprefix("sha256:"))
    return _Blob(packed.digest, packed.size, plain.digest)


def _placed(path: str) -> str:
    """A path inside the image. Whiteouts (``.wh.NAME``) would erase what lower layers hold, so they are refused."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or part.startswith(".wh.") for part in parts) or set(path) & set("\0\\\n"):
        raise UsageError(f"a file of the image at {path!r}", expected="a plain relative path that stays in the image")
    return path


def _add(tar: tarfile.TarFile, entry: Entry) -> None:
    data = entry.read() if entry.read else None
    mode = 0o755 if data is None and entry.mode == 0o644 else entry.mode
    tar.addfile(_head(entry.path, len(data or b""), data is None, mode, entry.owner), io.BytesIO(data or b""))


def _pack(tar: tarfile.TarFile, path: Path, name: str) -> None:
    """A file of the layout, which may be large, or a folder."""
    if path.is_dir():
        tar.addfile(_head(name, 0, True, 0o755))
    else:
        with path.open("rb") as f:
            tar.addfile(_head(name, path.stat().st_size, False, 0o644), f)


def _head(path: str, size: int, folder: bool, mode: int, owner: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.mtime, info.uid, info.gid, info.mode, info.size = TIME, owner, owner, mode, size
    info.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
    return info


def _write_json(blobs: Path, kind: str, value: Any) -> dict[str, Any]:
    """Keep a JSON blob; its descriptor."""
    data = _json(value)
    digest = hashlib.sha256(data).hexdigest()
    _write(blobs / digest, data)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}"


# Reading a layout ----------------------------------------------------------------------------------------------------


class Layout:
    """A layout on disk, folder or tar, to read from; what is read is checked against its digest.

    >>> Layout(Path("nowhere"))
    Traceback (most recent call last):
    trilobe.errors.NotFoundError: there is no image at nowhere; expected an OCI layout: a folder or a .tar
      next: skopeo copy docker://python:3.11-slim oci:base
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise NotFoundError(
                f"there is no image at {path}",
                expected="an OCI layout: a folder or a .tar",
                hint="skopeo copy docker://python:3.11-slim oci:base",
            )
        self.path = path

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """The file ``name`` of the layout."""
        try:
            if self.path.is_dir():
                with (self.path / name).open("rb") as f:
                    yield f
                return
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    if member.isreg() and member.name.removeprefix("./") == name:
                        found = tar.extractfile(member)
                        if found:
                            yield found
                            return
            raise FileNotFoundError(errno.ENOENT, "not in the archive")
        except tarfile.TarError as e:
            raise _unusable(self.path, f"it is no tar archive ({e})") from e
        except FileNotFoundError as e:
            raise _unusable(self.path, f"{name} is missing") from e

    def json(self, name: str, digest: str = "") -> dict[str, Any]:
        """A JSON file of the layout, or the blob of that digest."""
        with self.open(blob_name(digest) if digest else name) as f:
            data = f.read(_MAX_JSON + 1)
        if len(data) > _MAX_JSON:
            raise _unusable(self.path, f"{name or digest} is larger than {_MAX_JSON} bytes")
        if digest and f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise _unusable(self.path, f"the blob {digest} was edited")
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
            raise _unusable(self.path, f"{name or digest} is not JSON ({e})") from e

    def copy(self, digest: str, size: int, to: Path) -> None:
        """Copy the blob of that digest and size to the file ``to``."""
        sha, seen = hashlib.sha256(), 0
        with self.open(blob_name(digest)) as source, to.open("wb") as f:
            while piece := source.read(_PIECE):
                sha.update(piece)
                seen += len(piece)
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())
        if seen != size or f"sha256:{sha.hexdigest()}" != digest:
            raise _unusable(self.path, f"the blob {digest} was edited or cut")


def blob_name(digest: str) -> str:
    """Where a layout keeps the blob of that digest.

    >>> blob_name("sha256:../../etc/passwd")
    Traceback (most recent call last):
    trilobe.errors.DataError: the digest 'sha256:../../etc/passwd'; expected sha256: and 64 hexadecimal digits
    """
    if not isinstance(digest, str) or not _DIGEST.match(digest):
        raise DataError(f"the digest {digest!r}", expected="sha256: and 64 hexadecimal digits")
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def read_image(path: Path, architecture: str = "amd64") -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and the configuration of the image in a layout; for several, of ``linux`` on ``architecture``.

    Raises :class:`~trilobe.errors.NotFoundError` or :class:`~trilobe.errors.DataError`.
    """
    layout = Layout(path)
    listed = layout.json("index.json")
    for _ in range(4):  # an index may list indexes
        described = _chosen(path, listed.get("manifests"), architecture)
        listed = layout.json("", str(described.get("digest")))
        kind = described.get("mediaType")
        if kind == MANIFEST:
            try:
                config = layout.json("", listed["config"]["digest"])
                if len(config["rootfs"]["diff_ids"]) != len(listed["layers"]):
                    raise _unusable(path, "its configuration and its manifest disagree on the number of layers")
                return listed, config
            except (KeyError, TypeError) as e:
                raise _unusable(path, f"its manifest is incomplete ({type(e).__name__}: {e})") from e
        if kind != INDEX:
            raise _unusable(path, f"it holds a {kind!r}")
    raise _unusable(path, "its indexes do not end in an image")


def _chosen(path: Path, manifests: Any, architecture: str) -> dict[str, Any]:
    found = [m for m in manifests if isinstance(m, dict)] if isinstance(manifests, list) else []
    if len(found) > 1:
        wanted = {"os": "linux", "architecture": architecture}
        found = [m for m in found if wanted.items() <= dict(m.get("platform") or {}).items()]
    if len(found) != 1:
        raise _unusable(path, f"it holds {len(found)} images for linux/{architecture}")
    return found[0]


def copy_base(path: Path, blobs: Path, architecture: str) -> Base:
    """Copy the layers of the image at ``path`` into the folder ``blobs``, every byte checked."""
    manifest, config = read_image(path, architecture)
    kept = []
    for layer in manifest["layers"]:
        kind, digest, size = layer.get("mediaType", ""), layer.get("digest"), layer.get("size")
        if not isinstance(kind, str) or not kind.startswith(LAYER):
            raise _unusable(path, f"it has a layer of the kind {kind!r}")
        Layout(path).copy(digest, size, blobs / Path(blob_name(digest)).name)
        kept.append({"mediaType": kind, "digest": digest, "size": size})
    return Base(tuple(kept), config)


def _unusable(path: Path, problem: str) -> DataError:
    return DataError(
        f"the image {path} cannot be used: {problem}",
        expected="an OCI layout with one image for this platform",
        hint="skopeo copy docker://python:3.11-slim oci:base",
    )
