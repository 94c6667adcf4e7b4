"""Which revision a store has, and bringing an older one up to date. The steps themselves live in ``versions``.

A store that is up to date is opened without importing Alembic: it takes as long to load as everything else here.
"""

from pathlib import Path

from sqlalchemy import Connection, column, inspect, select, table

from trilobe.errors import StoreTooNew

FOLDER = Path(__file__).parent
HEAD = "0001"  # the newest revision in versions/


def revision(connection: Connection) -> str | None:
    """The revision of the store behind ``connection``; None where no migration ever ran.

    >>> from sqlalchemy import create_engine
    >>> with create_engine("sqlite://").connect() as connection:
    ...     revision(connection) is None
    True
    """
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(select(column("version_num")).select_from(table("alembic_version"))).scalar()


def check_known(found: str) -> None:
    """Raise StoreTooNew for a revision that is not among ours: only a newer Trilobe can have written it.

    >>> check_known("0001")
    >>> check_known("9999")
    Traceback (most recent call last):
    trilobe.errors.StoreTooNew: the store has schema revision 9999; expected at most 0001...
    """
    from alembic.script import ScriptDirectory

    if found not in {step.revision for step in ScriptDirectory(str(FOLDER)).walk_revisions()}:
        raise StoreTooNew(
            f"the store has schema revision {found}",
            expected=f"at most {HEAD}, the newest this Trilobe knows",
            hint="pip install --upgrade trilobe",
        )


def upgrade(connection: Connection) -> None:
    """Run every missing migration inside the transaction that ``connection`` is in.

    >>> from sqlalchemy import create_engine
    >>> with create_engine("sqlite://").begin() as connection:
    ...     upgrade(connection)
    ...     revision(connection) == HEAD
    True
    """
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
