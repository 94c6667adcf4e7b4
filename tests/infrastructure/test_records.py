"""Files as records: what was written is read, in stretches of any length, and nothing is remembered."""

import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.errors import DataError, UnreadableExample
from trilobe.infrastructure import records
from trilobe.infrastructure.records import Reading, Record, count, find, units

TEXTS = Reading(frozenset([".txt"]), column="text", inputs=("text",))
IMAGES = Reading(frozenset([".png"]), inputs=("image",))


def read(path: Path, how: Reading = TEXTS, n: int = 1000) -> list[list[Record]]:
    return [list(unit.records) for unit in units(find(path, how, path / "out"), path, how, n)]


ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


@given(st.lists(ANY, min_size=1, max_size=8), st.integers(1, 5))
def test_what_is_written_to_a_table_is_read(tmp_path_factory: pytest.TempPathFactory, texts: list[str], n: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    for delimiter, name in ((",", "t.csv"), ("\t", "t.tsv")):
        with (folder / name).open("w", encoding="utf-8", newline="") as f:
            csv.writer(f, delimiter=delimiter).writerows([["n", "text"], *([i, t] for i, t in enumerate(texts))])
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    parts = read(folder, n=n)
    assert [len(p) for p in parts] == [min(n, len(texts) - i) for _ in range(3) for i in range(0, len(texts), n)]
    found: dict[str, list[object]] = {}
    for record in (r for part in parts for r in part):
        found.setdefault(record.file, []).append(record.value)
    assert found == {name: [t.encode() for t in texts] for name in ("t.csv", "t.jsonl", "t.tsv")}


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=9), st.integers(1, 4), st.data())
def test_units_are_named_by_what_is_in_them(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], n: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for i, content in enumerate(contents):
        (folder / f"{i}.txt").write_bytes(content)

    def keys() -> list[str]:
        return [unit.key for unit in units(find(folder, TEXTS, folder / "out"), folder, TEXTS, n)]

    before = keys()
    assert keys() == before and len(set(before)) == len(before)
    changed = data.draw(st.integers(0, len(contents) - 1))
    (folder / f"{changed}.txt").write_bytes(contents[changed] + b"x")
    after = keys()
    assert [a != b for a, b in zip(before, after, strict=True)] == [i == changed // n for i in range(len(before))]


def test_a_unit_that_is_not_used_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(10)))
    firsts = [next(unit.records).value for unit in units(find(tmp_path, TEXTS, tmp_path / "o"), tmp_path, TEXTS, 4)]
    assert firsts == [b"0", b"4", b"8"]


def test_what_is_too_large_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 101)
    (tmp_path / "b.jsonl").write_text('{"text": "%s"}\n{"text": "fine"}\n' % ("x" * 3_000_000))
    (tmp_path / "c.csv").write_text('text\n"%s"\nfine\n' % ("x" * 200))
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for size in (101, 4):
            info = tarfile.TarInfo(f"{size}.txt")
            info.size = size
            tar.addfile(info, io.BytesIO(b"y" * size))
    found = {r.name: r.value for part in read(tmp_path) for r in part}
    assert [name for name, value in found.items() if isinstance(value, DataError)] == [
        "a.txt", "b.jsonl#1", "c.csv#1", "d.tar/101.txt",
    ]  # fmt: skip
    assert str(found["b.jsonl#1"]) == "3,000,013 bytes; expected at most 100 for one input"
    assert found["b.jsonl#2"] == b"fine" == found["c.csv#2"] and found["d.tar/4.txt"] == b"yyyy"


PEAKS = """
import sys, tarfile, tracemalloc
from pathlib import Path
from trilobe.infrastructure.records import Reading, count, units

archive, images = Path(sys.argv[1], "a.tar"), Reading(frozenset([".png"]), inputs=("image",))

def peak(n):
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(n):
            tar.addfile(tarfile.TarInfo(f"{i}.png"))
    tracemalloc.start()
    assert sum(1 for unit in units([archive], archive.parent, images, 10) for _ in unit.records) == n
    assert count(archive, images) == n
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most

peak(10)
print(peak(300), peak(3000))
"""


def test_an_archive_is_not_remembered(tmp_path: Path) -> None:
    """In a process of its own: whatever else happens in this one must not count."""
    done = subprocess.run([sys.executable, "-c", PEAKS, str(tmp_path)], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many < few + 200_000


def test_counts_are_about_right(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 7)
    (tmp_path / "b.csv").write_text("text\na\nb\n")
    np.save(tmp_path / "c.npy", np.zeros((5, 2)))
    (tmp_path / "d.npy").write_bytes(b"")
    (tmp_path / "e.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "f.npy", np.float32(1))
    (tmp_path / "g.tar").write_bytes(b"")
    counts = [count(path, TEXTS) for path in sorted(tmp_path.iterdir())]
    assert counts == [7, 3, 5, 0, 0, 0, 0]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a.txt").write_text("x")
    listed = records.os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)  # type: ignore[call-overload]

    monkeypatch.setattr(records.os, "scandir", scandir)
    with pytest.raises(UnreadableExample, match=r"/a cannot be listed: Permission denied"):
        list(find(tmp_path, TEXTS, tmp_path / "out"))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "b\udcff.txt").write_text("x")
    [[record]] = read(tmp_path)
    assert record.name == "b\\udcff.txt" and record.value == b"x"
