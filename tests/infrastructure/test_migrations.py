"""Migrations: fresh, older, newer and foreign stores. That they build the tables of ``schema`` stands in test_store."""

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from trilobe.errors import NotFoundError, StorageError, StoreTooNew
from trilobe.infrastructure.store import Store, migrations
from trilobe.types import Example

NEXT = '''"""A step of tomorrow."""
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "HEAD"


def upgrade() -> None:
    """One more table, and one more column."""
    op.create_table("tomorrow", sa.Column("id", sa.Integer, primary_key=True))
    op.add_column("examples", sa.Column("weight", sa.Double))
    BREAK
'''


def tomorrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, then: str = "pass") -> None:
    """Let this Trilobe know one more migration."""
    folder = tmp_path / "migrations"
    shutil.copytree(migrations.FOLDER, folder)
    step = NEXT.replace("HEAD", migrations.HEAD).replace("BREAK", then)
    (folder / "versions" / "9999_tomorrow.py").write_text(step)
    monkeypatch.setattr(migrations, "FOLDER", folder)
    monkeypatch.setattr(migrations, "HEAD", "9999")


def tables(file: Path) -> set[str]:
    connection = sqlite3.connect(file)
    try:
        return {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    finally:
        connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of today with one example in it."""
    with Store.open(tmp_path / ".trilobe", create=True) as store:
        store.add_examples([Example("a", "cat.png")])
    return tmp_path / ".trilobe"


def test_head_is_the_newest_step() -> None:
    assert ScriptDirectory(str(migrations.FOLDER)).get_heads() == [migrations.HEAD]


def test_an_older_store_is_migrated_and_a_copy_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(folder) as other:  # a second process, so that what it wrote may still be in the log
        other.add_examples([Example("b", "dog.png")])
        tomorrow(monkeypatch, tmp_path)
        with Store.open(folder) as store:
            assert [e.id for e in store.examples()] == ["a", "b"]
    assert "tomorrow" in tables(folder / "store.sqlite")
    copy = folder / "store.sqlite.before-9999"
    assert "tomorrow" not in tables(copy)
    monkeypatch.undo()
    (tmp_path / "back").mkdir()
    shutil.copy(copy, tmp_path / "back" / "store.sqlite")
    with Store.open(tmp_path / "back") as store:
        assert [e.id for e in store.examples()] == ["a", "b"]


def test_a_migration_that_fails_changes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tomorrow(monkeypatch, tmp_path, then='op.execute("insert into nowhere values (1)")')
    with pytest.raises(StorageError, match="nowhere"):
        Store.open(folder)
    assert "tomorrow" not in tables(folder / "store.sqlite")
    monkeypatch.undo()
    with Store.open(folder) as store:
        assert store.count_examples() == {"pool": 1, "test": 0}


def test_a_newer_store_is_refused_and_left_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tomorrow(monkeypatch, tmp_path)
    Store.open(folder).close()
    monkeypatch.undo()
    with pytest.raises(StoreTooNew, match=f"revision 9999; expected at most {migrations.HEAD}") as refused:
        Store.open(folder)
    assert "upgrade" in refused.value.hint
    assert "tomorrow" in tables(folder / "store.sqlite")


def test_an_up_to_date_store_opens_without_alembic(folder: Path) -> None:
    script = """
import sys
from pathlib import Path
from trilobe.infrastructure.store import Store
with Store.open(Path(sys.argv[1])) as store:
    print(store.count_examples()["pool"], "alembic" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


def test_another_program_s_database_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "store.sqlite")
    connection.execute("create table recipes (id integer)")
    connection.close()
    for create in (False, True):
        with pytest.raises(StorageError, match="not a Trilobe store: it holds recipes"):
            Store.open(tmp_path, create=create)
    assert tables(tmp_path / "store.sqlite") == {"recipes"}


def test_a_creation_that_was_cut_short_can_be_done_again(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").touch()
    with pytest.raises(NotFoundError, match="trilobe init"):
        Store.open(tmp_path)
    with Store.open(tmp_path, create=True) as store:
        assert store.examples() == []


def test_processes_that_create_the_same_store_at_once_agree(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from trilobe.infrastructure.store import Store
with Store.open(Path(sys.argv[1]), create=True) as store:
    store.record(sys.argv[2], True)
"""
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path / "new" / ".trilobe")]
    started = [subprocess.Popen([*command, name]) for name in "abcd"]
    assert [process.wait(60) for process in started] == [0] * 4
    with Store.open(tmp_path / "new" / ".trilobe") as store:
        assert sorted(store.journal()) == ["a", "b", "c", "d"]
