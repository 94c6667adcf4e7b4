"""What lies in files as records, one input each: files of a kind, tables, arrays, archives.

A record is read when it is asked for and not held longer, so a table may be larger than memory. What cannot be read is
a record too, with the reason; it keeps no other from being read. What a record's bytes mean is not decided here.
"""

import csv
import hashlib
import itertools
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from trilobe.errors import DataError, NotFoundError, UnreadableExample, UsageError

MAX_BYTES = 256 * 1024 * 1024  # of one record; a longer one is refused before it is read
TABLES = (".jsonl", ".csv", ".tsv")
SHARDS = (".npy", ".npz", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, slots=True)
class Record:
    """One input: where it stands, and its value: bytes of a file or of a text, a row of every input, or what is wrong.

    ``line`` counts from 0 within ``file``, where that holds many; ``id`` is what the file calls the record.

    >>> Record("a.csv", b"text", line=2).name
    'a.csv#3'
    """

    file: str
    value: bytes | Mapping[str, NDArray[Any]] | DataError
    line: int | None = None
    id: str | int | None = None

    @property
    def name(self) -> str:
        """The file, and in it the number of the record, from 1."""
        return self.file if self.line is None else f"{self.file}#{self.line + 1}"


@dataclass(frozen=True, slots=True)
class Unit:
    """Records that make one part. ``key`` is a digest of what they are made of: equal only for equal records."""

    key: str
    records: Iterator[Record]


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read.

    ``singles`` are the suffixes of files that are one record each, ``column`` holds the texts of a table (empty: there
    are no tables), with ``lines`` each line of a text file is a record, ``inputs`` are what arrays are rows of.
    """

    singles: frozenset[str]
    column: str = ""
    lines: bool = False
    inputs: tuple[str, ...] = ()

    def many(self, path: Path) -> str:
        """The kind of a file with many records; empty for one that is a record itself, or is not read at all.

        >>> how = Reading(frozenset([".txt"]), column="text")
        >>> how.many(Path("a.CSV")), how.many(Path("b.tar.gz")), how.many(Path("c.txt"))
        ('.csv', '.tar.gz', '')
        """
        name = path.name.lower()
        kinds = (*SHARDS, *(TABLES if self.column else ()), *((".txt",) if self.lines else ()))
        return next((kind for kind in kinds if name.endswith(kind)), "")

    def reads(self, path: Path) -> bool:
        """Whether a file of this name is read."""
        return bool(self.many(path)) or path.suffix.lower() in self.singles


def find(source: Path, how: Reading, out: Path) -> Iterator[Path]:
    """The files under ``source`` that are read, in a stable order; a single file is itself. ``out`` is left alone.

    Raises :class:`~trilobe.errors.NotFoundError` where there is none, :class:`~trilobe.errors.UsageError` where what
    is written would be read.

    >>> next(find(Path("nowhere"), Reading(frozenset([".png"])), Path("out")))
    Traceback (most recent call last):
    trilobe.errors.NotFoundError: no file or folder nowhere; expected an existing path
    """
    if source.resolve() == out.resolve():
        raise UsageError(f"the results would be written to {out}, which is read", expected="another folder")
    if not source.exists():
        raise NotFoundError(f"no file or folder {source}", expected="an existing path")
    nothing = True
    for path in _under(source, out.resolve()) if source.is_dir() else [source]:
        if how.reads(path) and path.is_file():
            nothing = False
            yield path
    if nothing:
        kinds = sorted({*how.singles, *SHARDS, *(TABLES if how.column else ())})
        raise NotFoundError(f"nothing in {source} can be read", expected=f"files that end in {', '.join(kinds)}")


def _under(folder: Path, out: Path) -> Iterator[Path]:
    """All files under ``folder`` but those in ``out``; the names of one folder are held at a time."""

    def complain(error: OSError) -> None:
        raise UnreadableExample(f"{error.filename} cannot be listed: {error.strerror}", expected="a readable folder")

    for top, folders, names in os.walk(folder, onerror=complain):
        folders[:] = sorted((f for f in folders if Path(top, f).resolve() != out), key=os.fsencode)
        for name in sorted(names, key=os.fsencode):
            yield Path(top, name)


def count(path: Path, how: Reading) -> int:
    """About how many records a file has, for the bar: lines of a text, members of an archive; 0 where it is unknown.

    >>> count(Path("photo.png"), Reading(frozenset([".png"])))
    1
    """
    kind = how.many(path)
    try:
        if not kind:
            return 1
        if kind == ".npy":
            return len(np.load(path, mmap_mode="r", allow_pickle=False))
        if kind in (*TABLES, ".txt"):
            with path.open("rb") as file:
                return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        if kind == ".tar":
            with tarfile.open(path, "r:") as tar:
                return sum(Path(member.name).suffix.lower() in how.singles for member in _walk(tar))
    except (OSError, ValueError, TypeError, EOFError, tarfile.TarError):
        pass  # said when it is read
    return 0


def units(files: Iterable[Path], root: Path, how: Reading, n: int) -> Iterator[Unit]:
    """The records of ``files`` in stretches of at most ``n``; files that are a record each share a unit.

    A unit must be used up before the next is asked for: both come from one reader. Names are relative to ``root``.

    >>> import tempfile
    >>> how = Reading(frozenset([".txt"]), column="text")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.csv")
    ...     _ = path.write_text("id,text\\n7,one\\n8,two\\n9,three\\n")
    ...     [[(r.name, r.id, r.value) for r in unit.records] for unit in units([path], Path(folder), how, 2)]
    [[('a.csv#1', '7', b'one'), ('a.csv#2', '8', b'two')], [('a.csv#3', '9', b'three')]]
    """
    for many, group in itertools.groupby(files, how.many):
        if not many:
            while chunk := list(itertools.islice(group, n)):
                key = hashlib.sha256()
                for path in chunk:
                    key.update(f"{_name(path, root)}\0{_digest(path)}\n".encode())
                yield Unit(key.hexdigest(), (Record(_name(path, root), _bytes(path)) for path in chunk))
            continue
        for path in group:
            content, records = _digest(path), _records(path, _name(path, root), how)
            for i in itertools.count():
                if (first := next(records, None)) is None:
                    break
                key = hashlib.sha256(f"{_name(path, root)}\0{content}\0{i}\0{n}".encode())
                unit = itertools.chain([first], itertools.islice(records, n - 1))
                yield Unit(key.hexdigest(), unit)
                for _ in unit:  # whoever skipped it has not read it
                    pass


def _name(path: Path, root: Path) -> str:
    relative = path.relative_to(root) if path != root else Path(path.name)
    return relative.as_posix().encode("utf-8", "backslashreplace").decode()  # a file name may be no text


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        return f"unreadable: {e.strerror}"


def _bytes(path: Path) -> bytes | DataError:
    try:
        return _large(size) if (size := path.stat().st_size) > MAX_BYTES else path.read_bytes()
    except OSError as e:
        return UnreadableExample(f"cannot be read: {e.strerror}")


def _large(size: int) -> DataError:
    return UnreadableExample(f"{size:,} bytes", expected=f"at most {MAX_BYTES:,} for one input")


def _records(path: Path, name: str, how: Reading) -> Iterator[Record]:
    """The records of a file with many. What keeps the rest of it from being read is a record too, the last."""
    kind, at = how.many(path), 0
    readers: dict[str, Callable[[], Iterator[Record]]] = {
        ".jsonl": lambda: _json_lines(path, name, how.column),
        ".csv": lambda: _table(path, name, how.column, ","),
        ".tsv": lambda: _table(path, name, how.column, "\t"),
        ".txt": lambda: (Record(name, value, i) for i, value in _lines(path)),
        ".npy": lambda: _rows(path, name, how.inputs),
        ".npz": lambda: _rows(path, name, how.inputs),
        **dict.fromkeys((".tar", ".tar.gz", ".tgz"), lambda: _members(path, name, how.singles)),
    }
    try:
        for record in readers[kind]():
            yield record
            at += 1
    except DataError as e:
        yield Record(name, e)
    except OSError as e:
        yield Record(name, UnreadableExample(f"cannot be read: {e.strerror or e}"))
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as e:
        yield Record(name, UnreadableExample(f"damaged behind record {at}: {e}", expected=f"a whole {kind} file"))


def _lines(path: Path) -> Iterator[tuple[int, bytes | DataError]]:
    """The lines of a text that are not blank, with their numbers from 0; one that is too long is not held."""
    with path.open("rb") as file:
        for number in itertools.count():
            line = file.readline(MAX_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_BYTES:
                size = len(line)
                while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                    size += len(line)
                yield number, _large(size)
                continue
            line = line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").rstrip(b"\r\n")
            if line.strip():
                yield number, line


def _json_lines(path: Path, name: str, column: str) -> Iterator[Record]:
    for i, line in _lines(path):
        if isinstance(line, DataError):
            yield Record(name, line, i)
            continue
        value: bytes | DataError
        id_ = None
        try:
            row = msgspec.json.decode(line)
            value, id_ = row[column].encode(), row.get("id")
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
            value = UnreadableExample(f"not JSON: {e}", expected=f'{{"{column}": "..."}}')
        except (KeyError, TypeError, AttributeError):
            value = UnreadableExample(f"no text under {column!r}", expected=f'{{"{column}": "..."}}')
        yield Record(name, value, i, id_ if isinstance(id_, str | int) else None)


def _table(path: Path, name: str, column: str, delimiter: str) -> Iterator[Record]:
    """The rows of a table with a header. Bytes that are no UTF-8 spoil their row only."""
    before = csv.field_size_limit(MAX_BYTES)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = [cell.strip().lower() for cell in next(rows, [])]
            if column.lower() not in header:
                raise UnreadableExample(f"a table with the columns {header}", expected=f"a header with {column!r}")
            at, id_at = header.index(column.lower()), header.index("id") if "id" in header else None
            for i in itertools.count():
                try:
                    while not (row := next(rows)):  # a blank line
                        pass
                except StopIteration:
                    return
                except csv.Error as e:
                    yield Record(name, UnreadableExample(f"line {rows.line_num}: {e}", expected="quotes doubled"), i)
                    continue
                yield Record(name, _cell(row, at, len(header), rows.line_num), i,
                             None if id_at is None or id_at >= len(row) else _said(row[id_at]))  # fmt: skip
    finally:
        csv.field_size_limit(before)


def _cell(row: Sequence[str], at: int, columns: int, line: int) -> bytes | DataError:
    if len(row) != columns:
        return UnreadableExample(f"line {line} has {len(row)} cells", expected=f"{columns}, as in the header")
    try:
        return row[at].encode()
    except UnicodeEncodeError:
        return UnreadableExample(f"line {line} is not UTF-8", expected="a table in UTF-8")


def _said(cell: str) -> str:
    return cell.encode("utf-8", "backslashreplace").decode()


def _rows(path: Path, name: str, inputs: Sequence[str]) -> Iterator[Record]:
    """The rows of one array (``.npy``), or of all inputs by name (``.npz``). Nothing is unpickled."""
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        if len(inputs) != 1:
            raise UnreadableExample("one array", expected=f"an .npz file with {', '.join(inputs)}")
        arrays = {inputs[0]: loaded}
    else:
        with loaded:
            if missing := set(inputs) - set(loaded.files):
                raise UnreadableExample(f"arrays called {loaded.files}", expected=f"also {sorted(missing)}")
            arrays = {key: loaded[key] for key in inputs}
    sizes = {len(a) if a.ndim else -1 for a in arrays.values()}
    if len(sizes) != 1 or -1 in sizes:
        raise UnreadableExample(
            f"arrays of the shapes {[a.shape for a in arrays.values()]}", expected="as many rows in all"
        )
    for i in range(sizes.pop()):
        yield Record(name, {key: _sent(np.asarray(a[i])) for key, a in arrays.items()}, i)


def _sent(value: NDArray[Any]) -> NDArray[Any]:
    """A string of fixed width as BYTES, as in a request; anything else as it is."""
    if value.dtype.kind not in "US" or value.ndim:
        return value
    text = value.item()
    return np.array(text.encode() if isinstance(text, str) else text, dtype=object)


def _walk(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, without a memory of those before."""
    while (member := tar.next()) is not None:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]


def _members(path: Path, name: str, suffixes: frozenset[str]) -> Iterator[Record]:
    """The files in an archive whose kind is read, in its order, without unpacking it (WebDataset's shards)."""
    with tarfile.open(path, "r|*") as tar:
        for member in _walk(tar):
            if not member.isfile() or Path(member.name).suffix.lower() not in suffixes:
                continue
            file = _said(f"{name}/{member.name}")
            if member.size > MAX_BYTES:
                yield Record(file, _large(member.size))
            elif content := tar.extractfile(member):
                yield Record(file, content.read())
    if path.suffix.lower() == ".tar":
        with path.open("rb") as raw:
            raw.seek(max(0, path.stat().st_size - 1024))
            if any(raw.read()):  # an archive ends with zeros
                raise UnreadableExample("the archive ends before its end", expected="a whole .tar file")
