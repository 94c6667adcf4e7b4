"""Blobs: the same bytes once, whole or not at all, and damage noticed."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.errors import StorageError, UsageError
from trilobe.infrastructure.store import Blobs


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_round_trip(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)

    @settings(max_examples=50, deadline=None, database=None)
    @given(st.binary(max_size=300))
    def check(data: bytes) -> None:
        digest = blobs.put(data)
        assert digest == hashlib.sha256(data).hexdigest()
        assert digest in blobs
        assert blobs.get(digest) == data == blobs.path(digest).read_bytes()

    check()


def test_the_same_bytes_are_kept_once(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    first = blobs.put(b"x" * 1000)
    before = blobs.path(first).stat()
    assert blobs.put(b"x" * 1000) == first
    assert files(tmp_path) == [tmp_path / first[:2] / first[2:]]
    assert blobs.path(first).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("harm", [lambda p: p.write_bytes(b"pictvre"), lambda p: p.write_bytes(b"pic"), Path.unlink])
def test_a_damaged_blob_is_an_error_that_names_the_file(tmp_path: Path, harm: object) -> None:
    blobs = Blobs(tmp_path)
    digest = blobs.put(b"picture")
    harm(blobs.path(digest))  # type: ignore[operator]
    with pytest.raises(StorageError, match=str(blobs.path(digest))):
        blobs.get(digest)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "AB" * 32, "ab" * 31, "ab" * 32 + "\n"])
def test_only_digests_name_blobs(tmp_path: Path, name: str) -> None:
    assert name not in Blobs(tmp_path)
    with pytest.raises(UsageError, match="SHA-256"):
        Blobs(tmp_path).get(name)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        Blobs(tmp_path / "blobs").put(b"picture")


def test_disk_full_leaves_nothing_behind(tmp_path: Path) -> None:
    """For real: the kernel refuses to let any file grow beyond 4096 bytes."""
    script = """
import resource, signal, sys
from pathlib import Path
from trilobe.errors import DiskFull
from trilobe.infrastructure.store.blobs import Blobs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
blobs = Blobs(Path(sys.argv[1]))
blobs.put(b"s" * 4096)
try:
    blobs.put(b"l" * 10_000)
except DiskFull as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "no space left" in done.stdout
    small, large = hashlib.sha256(b"s" * 4096).hexdigest(), hashlib.sha256(b"l" * 10_000).hexdigest()
    blobs = Blobs(tmp_path)
    assert blobs.get(small) == b"s" * 4096
    assert large not in blobs
    assert files(tmp_path) == [blobs.path(small)]
    assert blobs.put(b"l" * 10_000) == large
