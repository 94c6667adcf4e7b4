"""Files that are whole or absent: under failure, under a full disk, under two writers and under kill -9."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.errors import StorageError
from trilobe.files import write_atomically


@given(st.binary(max_size=1000))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "deep" / "er" / "file"
    write_atomically(path, b"before")
    write_atomically(path, data)
    assert path.read_bytes() == data and list(path.parent.iterdir()) == [path]


def test_where_one_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="could not be written"):
            write_atomically(path, b"new")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"} and (tmp_path / "file").read_bytes() == b"old"


FULL = """
import resource, sys
from pathlib import Path
from trilobe.errors import DiskFull
from trilobe.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), b"x" * 5000)
except DiskFull as e:
    print(e)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True)
    assert f"no space left to write {path}" in done.stdout and "next:" in done.stdout
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from trilobe.files import write_atomically
n = 0
print("ready", flush=True)
while True:
    n += 1
    write_atomically(Path(sys.argv[1]), bytes([n % 256]) * 200_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"\0" * 200_000)
    for wait in (0.0, 0.01, 0.03):
        with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE) as child:
            assert child.stdout and child.stdout.readline()
            threading.Event().wait(wait)
            child.kill()
        data = path.read_bytes()
        assert len(data) == 200_000 and len(set(data)) == 1


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(byte: bytes) -> None:
        for _ in range(20):
            write_atomically(path, byte * 50_000)

    threads = [threading.Thread(target=write, args=(b,)) for b in (b"a", b"b", b"c")]
    for t in threads:
        t.start()
    seen = set()
    while any(t.is_alive() for t in threads):
        if path.exists():
            data = path.read_bytes()
            seen.add((len(data), len(set(data))))
    for t in threads:
        t.join()
    assert seen <= {(50_000, 1)} and list(tmp_path.iterdir()) == [path]
    assert len(set(path.read_bytes())) == 1
