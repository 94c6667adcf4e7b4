"""``init`` and ``add``: what goes in, what is refused with its reason, and that nothing else changes."""

import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trilobe import loop
from trilobe.errors import AnswerError, ConfigError, NotFoundError, StorageError, StoreTooNew, UsageError
from trilobe.types import GOLD


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A project with nothing in it."""
    loop.init(tmp_path / "empty", labels=["bar", "cross", "dot"])
    return tmp_path / "empty"


def gray(seed: int = 0, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


# --- init


@pytest.mark.parametrize("name", ["with space", "ünïcode-プロジェクト", "..dots..", "-dash", "プ"])
def test_any_folder_name_makes_a_project(tmp_path: Path, name: str) -> None:
    path = loop.init(tmp_path / name, labels=["ja", "néin"])
    assert path == tmp_path / name / "trilobe.toml"
    assert loop.show(project=tmp_path / name)["examples"] == {"pool": 0, "test": 0}


def test_init_again_changes_nothing_and_says_so(tmp_path: Path) -> None:
    path = loop.init(tmp_path, labels=["a", "b"])
    before = path.read_bytes()
    said: list[str] = []
    with loop.listening(lambda message, done=0, total=0: said.append(message)):
        loop.init(tmp_path, labels=["x", "y"])
    assert path.read_bytes() == before
    assert any("stays as it is" in s for s in said)


@pytest.mark.parametrize(
    ("labels", "problem"), [(["cat"], r"1 class\(es\); expected at least two"), (["a", "a"], "twice; expected each")]
)
def test_labels_that_cannot_work_are_refused_at_once(tmp_path: Path, labels: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        loop.init(tmp_path, labels=labels)
    assert not (tmp_path / "trilobe.toml").exists()


def test_labels_as_one_string(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a list of names"):
        loop.init(tmp_path, labels="cat,dog")


def test_label_names_with_quotes_survive(tmp_path: Path) -> None:
    names = ['a "quoted" one', "back\\slash", "日本"]
    loop.init(tmp_path, labels=names)
    with loop.opened(tmp_path) as p:
        assert p.space.names == tuple(names)


def test_init_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"could not be written: .*; expected a folder"):
        loop.init(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_init_in_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"expected a folder one may write to"):
        loop.init(tmp_path / "new")


# --- a project that is not in order


def test_no_project(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no trilobe.toml in .*\n.*next: trilobe init"):
        loop.add([tmp_path], tmp_path)


def test_settings_without_a_store(tmp_path: Path) -> None:
    (tmp_path / "trilobe.toml").write_text('[project]\nname = "x"\n')
    with pytest.raises(NotFoundError, match=r"no \.trilobe folder.*\n.*next: trilobe init"):
        loop.show(project=tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[project\nname = "x"', "trilobe.toml.*expected valid TOML"),
        ('[project]\nname = "x"\n[qeury]\nn = 2', "unknown key qeury(.|\n)*did you mean 'query'"),
        ('[project]\nname = "x"\n[train]\nlr = -1', "train.lr = -1"),
        ("", "project is missing"),
        ('[project]\nname = "../x"', "project.name"),
    ],
)
def test_damaged_settings(empty: Path, text: str, problem: str) -> None:
    (empty / "trilobe.toml").write_text(text)
    with pytest.raises(ConfigError, match=problem) as e:
        loop.show(project=empty)
    assert e.value.exit_code == 2


def test_settings_that_are_no_text(empty: Path) -> None:
    (empty / "trilobe.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"not UTF-8"):
        loop.show(project=empty)


def test_a_store_of_a_newer_trilobe(tiny) -> None:
    with sqlite3.connect(tiny.folder / ".trilobe" / "store.sqlite") as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    db.close()
    with pytest.raises(
        StoreTooNew, match=r"schema revision 9999; expected at most (.|\n)*pip install --upgrade trilobe"
    ):
        loop.show(project=tiny.folder)


def test_a_store_that_is_no_store(tiny) -> None:
    for leftover in (tiny.folder / ".trilobe").glob("store.sqlite-*"):
        leftover.unlink()
    (tiny.folder / ".trilobe" / "store.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StorageError, match=r"is not a database"):
        loop.show(project=tiny.folder)


# --- add


def test_one_folder_as_it_is(empty: Path, tmp_path: Path) -> None:
    gray().save(tmp_path / "a.png")
    assert len(loop.add(tmp_path / "a.png", empty).added) == 1, "a single path needs no list"
    assert len(loop.add(str(tmp_path / "a.png"), empty).duplicates) == 1


def test_bad_files_are_refused_one_by_one(empty: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    gray().save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("I am a poem")
    (folder / "cut.png").write_bytes(whole[:60])
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("not looked at")
    added = loop.add([folder], empty)
    assert len(added.added) == 1
    reasons = {Path(name).name: reason for name, reason in added.refused.items()}
    assert set(reasons) == {"zero.png", "text.png", "cut.png", "bomb.png"}
    assert "an empty file; expected an image" in reasons["zero.png"]
    assert "begins with 'I am a poem'" in reasons["text.png"]
    assert "damaged image" in reasons["cut.png"]
    assert "expected at most 50,000,000 pixels" in reasons["bomb.png"]
    assert "image.max_pixels" in reasons["bomb.png"]


def bomb() -> bytes:
    """A PNG of some hundred bytes that says it is 30,000 pixels wide and high."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_nothing_usable_is_an_error(empty: Path, tmp_path: Path) -> None:
    (tmp_path / "zero.png").write_bytes(b"")
    with pytest.raises(NotFoundError, match=r"none of 1 files could be added(.|\n)*an empty file"):
        loop.add([tmp_path / "zero.png"], empty)
    (tmp_path / "none").mkdir()
    with pytest.raises(NotFoundError, match=r"no files of a known kind.*\.png"):
        loop.add([tmp_path / "none"], empty)
    with pytest.raises(NotFoundError, match=r"no file or folder .*missing"):
        loop.add([tmp_path / "missing"], empty)
    with pytest.raises(UsageError, match=r"nothing to add"):
        loop.add([], empty)
    with pytest.raises(UsageError, match=r"split 'train'; expected 'pool' or 'test'"):
        loop.add([tmp_path], empty, split="train")


def test_every_mode_and_size_in_one_pool_trains(empty: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    gray(1).save(folder / "gray.png")
    gray(2, (20, 11)).save(folder / "tall.png")
    gray(3).convert("RGB").quantize(8).save(folder / "palette.gif")
    Image.fromarray(np.random.default_rng(4).integers(0, 256, (8, 8, 4), dtype=np.uint8)).save(folder / "alpha.png")
    Image.fromarray(np.random.default_rng(5).integers(0, 65536, (8, 8), dtype=np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(6).integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(
        folder / "turned.jpg", exif=exif
    )
    added = loop.add([folder], empty)
    assert (len(added.added), added.refused) == (6, {})
    with loop.opened(empty) as p:
        examples = p.store.examples()
        shapes = {Path(e.name).name: i.shape for e, i in zip(examples, p.items(examples), strict=True)}
        assert shapes["turned.jpg"] == (9, 6, 3), "upright"
        assert shapes["deep.png"] == (8, 8, 1)
        X = p.encode(examples)
        assert X.shape[0] == 6 and X.shape[1] == 3 and 0 <= X.min() <= X.max() <= 1
    rows = [f"{e.id},ann,{'bar' if i % 2 else 'dot'}" for i, e in enumerate(examples)]
    (tmp_path / "a.csv").write_text("\n".join(["example,annotator,label", *rows]))
    with (empty / "trilobe.toml").open("a") as f:
        f.write("\n[train]\nsteps = 5\nepochs = 0\nwidth = 2\n")
    loop.label(tmp_path / "a.csv", empty)
    assert loop.train(empty).preprocessing["channels"] == 3


def test_the_same_picture_once(empty: Path, tmp_path: Path) -> None:
    gray().save(tmp_path / "a.png")
    gray().save(tmp_path / "a.bmp")
    first = loop.add([tmp_path / "a.png"], empty)
    again = loop.add([tmp_path / "a.bmp"], empty, split="test")
    assert again.added == () and again.duplicates == {str(tmp_path / "a.bmp"): first.added[0]}


def test_file_names_that_are_no_text(empty: Path, tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9 \xff.png"
    with open(raw, "wb") as f:  # noqa: PTH123
        gray().save(f, "PNG")
    name = os.fsdecode(raw)
    (id_,) = loop.add([tmp_path], empty).added
    assert loop.show(Path(name).name, empty)["example"]["id"] == id_
    loop.query(empty)
    table = tmp_path / "questions.csv"
    loop.export("questions", empty, str(table))
    assert "caf\\udce9" in table.read_text("utf-8"), "a CSV file is text, whatever the name was"
    table.write_text(table.read_text("utf-8").replace(",,,", ",ann,bar,"), "utf-8")
    assert loop.label(table, empty).new == 1
    assert loop.report(empty).exists()


def test_our_own_files_are_no_examples(tiny) -> None:
    hidden = tiny.folder / ".trilobe" / "explanations"
    hidden.mkdir()
    gray(9).save(hidden / "heat.png")
    gray(8).save(tiny.folder / "mine.png")
    assert [Path(e.name).name for e in tiny.examples() if "mine" in e.name or "heat" in e.name] == []
    assert len(loop.add([tiny.folder], tiny.folder).added) == 1


# --- what is known beforehand


def test_truth_from_folders(tiny) -> None:
    with loop.opened(tiny.folder) as p:
        examples, labels = p.truth()
        assert len(examples) == 30
        assert [p.space.names[i] for i in labels] == [tiny.truth[e.id] for e in examples]


def test_truth_told_later_counts_and_never_leaks_across(empty: Path, tmp_path: Path) -> None:
    for i, kind in enumerate(["bar", "dot"]):
        (tmp_path / "in" / kind).mkdir(parents=True)
        gray(i).save(tmp_path / "in" / kind / f"{i}.png")
    loop.add([tmp_path / "in"], empty, split="test")
    assert loop.add([tmp_path / "in"], empty, split="pool", labels="folders").labeled == 0, "that is the other split"
    assert loop.add([tmp_path / "in"], empty, split="test", labels="folders").labeled == 2
    assert loop.add([tmp_path / "in"], empty, split="test", labels="folders").labeled == 0, "known already"
    with loop.opened(empty) as p:
        assert len(p.truth()[0]) == 2
        assert {a.annotator for a in p.store.answers()} == {GOLD}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("example,label\na.png,zebra", "a.png: unknown label 'zebra'; expected one of: bar, cross, dot"),
        ("example,class\na.png,bar", r"has the columns \['example', 'class'\]; expected also \['label'\]"),
        ("", r"has the columns \[\]"),
        ("example,label\na.png,bar\na.png,dot", "a.png is 'bar' and 'dot'; expected one class"),
        ("example,label\nsame.png,bar", "'same.png' may mean 2 files(.|\n)*one/same.png"),
    ],
)
def test_tables_of_truth_that_cannot_be_meant(empty: Path, tmp_path: Path, rows: str, problem: str) -> None:
    folder = tmp_path / "in"
    for i, name in enumerate(["a.png", "one/same.png", "two/same.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        gray(i).save(folder / name)
    (tmp_path / "t.csv").write_text(rows)
    with pytest.raises((AnswerError, UsageError), match=problem):
        loop.add([folder], empty, split="test", labels=str(tmp_path / "t.csv"))
    assert loop.show(project=empty)["examples"] == {"pool": 0, "test": 0}, "nothing went in half"
    (tmp_path / "t.csv").write_text("example,label\na.png,bar\none/same.png,dot\ntwo/same.png,cross\nother.png,bar\n")
    said: list[str] = []
    with loop.listening(lambda message, done=0, total=0: said.append(message)):
        assert loop.add([folder], empty, split="test", labels=str(tmp_path / "t.csv")).labeled == 3
    assert any("1 rows of" in s for s in said)


def test_an_unknown_folder_of_truth(empty: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "zebra").mkdir(parents=True)
    gray().save(tmp_path / "in" / "zebra" / "z.png")
    with pytest.raises(AnswerError, match=r"zebra/z.png: unknown label 'zebra'"):
        loop.add([tmp_path / "in"], empty, labels="folders")
