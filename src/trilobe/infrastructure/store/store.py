"""The one door to the records: what the loop writes down and asks for, as nouns, on SQLite or PostgreSQL.

Every writing call is one transaction, or joins the one around it (``with store.transaction():``). Writers take turns,
readers never wait, and what a call returned from survives kill -9 and a power cut. Bytes are in ``Store.blobs``.
"""

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Select,
    Table,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError, StatementError

from trilobe.errors import (
    DiskFull,
    MissingExtra,
    NotFoundError,
    StorageError,
    StoreBusy,
    TrilobeError,
    UsageError,
)
from trilobe.infrastructure.store import migrations, schema
from trilobe.infrastructure.store.blobs import Blobs
from trilobe.infrastructure.store.records import WORDS, columns, escape, row
from trilobe.types import Answer, Bundle, Evidence, Example, Finding, Model, Question, Split

Noun = TypeVar("Noun")
_WAIT = 30.0  # seconds that a writer waits for its turn
_LOCK = 0x7411_0BE0  # any constant: the PostgreSQL advisory lock that makes writers take turns
_CHUNK = 5_000  # values per statement; SQLite takes 32766, PostgreSQL 65535


class Store:
    """Everything a project remembers.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with Store.open(Path(folder.name), create=True) as store:
    ...     added, duplicates = store.add_examples([Example("a1", "cat.png"), Example("a1", "copy.png")])
    ...     [e.name for e in added], [(e.name, first) for e, first in duplicates], store.count_examples()
    (['cat.png'], [('copy.png', 'a1')], {'pool': 1, 'test': 0})
    >>> folder.cleanup()
    """

    blobs: Blobs

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.blobs, self._folder = Blobs(folder / "blobs"), folder
        self._engine, self._joined = engine, _Joined()
        is_file = engine.dialect.name == "sqlite"
        self._where = str(engine.url.database) if is_file else engine.url.render_as_string(hide_password=True)

    @classmethod
    def open(cls, folder: Path, url: str | None = None, create: bool = False) -> "Store":
        """The store of the project whose ``.trilobe`` is ``folder``; records are at ``url`` if that is given.

        An older store is migrated first (a copy stays at ``store.sqlite.before-<revision>``). Raises NotFoundError
        when there is none and ``create`` is False, StoreTooNew when a newer Trilobe wrote it, StorageError when it is
        damaged or unreachable, MissingExtra when PostgreSQL's driver is not installed.

        >>> Store.open(Path("nowhere/.trilobe"))
        Traceback (most recent call last):
        trilobe.errors.NotFoundError: there is no store at nowhere/.trilobe/store.sqlite...
        """
        folder = Path(folder)
        where = _location(folder, url)
        if where.drivername == "sqlite":
            file = Path(where.database or "")
            if not file.exists() and not create:
                raise _absent(str(file))
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"cannot create {file.parent}: {error.strerror}") from error
        store = cls(_engine(where), folder)
        try:
            store._bring_up_to_date(create)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give the connections back; nothing is pending, every call has already committed."""
        self._engine.dispose()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # Examples

    def add_examples(
        self, examples: Sequence[Example], contents: Mapping[str, str] | None = None
    ) -> tuple[list[Example], list[tuple[Example, str]]]:
        """Add what is new: ``(added, [(duplicate, id of the one already there), ...])``.

        ``contents`` maps example ids to a digest of the decoded content (pixels), which recognizes the same picture in
        another file. The same id or the same content, in either split and also within the call, is a duplicate.
        """
        contents, table = contents or {}, schema.examples
        added: list[Example] = []
        duplicates: list[tuple[Example, str]] = []
        rows: list[dict[str, Any]] = []
        with self._write() as connection:
            by_id = {id: id for id in _existing(connection, table.c.id, [e.id for e in examples])}
            by_content = dict(
                _chunked(connection, select(table.c.content, table.c.id), table.c.content, contents.values())
            )
            for example in examples:
                content = contents.get(example.id)
                first = by_id.get(example.id) or (by_content.get(content) if content else None)
                if first is not None:
                    duplicates.append((example, first))
                    continue
                added.append(example)
                rows.append(row(example, content=content))
                by_id[example.id] = example.id
                if content:
                    by_content[content] = example.id
            _insert(connection, table, rows)
        return added, duplicates

    def examples(self, split: Split | None = None, ids: Sequence[str] | None = None) -> list[Example]:
        """Examples in the order they came, of one ``split`` or of both, all or those of ``ids`` that are there."""
        query = _query(schema.examples, Example)
        if split is not None:
            query = query.where(schema.examples.c.split == split)
        return self._nouns(Example, query, schema.examples.c.id, ids)

    def count_examples(self) -> dict[str, int]:
        """How many examples each split holds."""
        split = schema.examples.c.split
        with self._read() as connection:
            found = connection.execute(select(split, func.count()).group_by(split)).all()
        return {"pool": 0, "test": 0} | dict(found)

    # Questions and answers

    def add_questions(self, questions: Sequence[Question]) -> int:
        """Add questions; those whose id is there already are left alone. Returns how many were new."""
        return self._add_new(schema.questions, questions)

    def questions(
        self, round: int | None = None, ids: Sequence[str] | None = None, open_only: bool = False
    ) -> list[Question]:
        """Questions in the order they came. Open: an assignee has not answered, or nobody has if none is assigned."""
        table, query = schema.questions, _query(schema.questions, Question)
        if round is not None:
            query = query.where(table.c.round == round)
        found = self._nouns(Question, query, table.c.id, ids)
        if not open_only:
            return found
        answered: dict[str, set[str]] = {}
        by = schema.answers.c
        with self._read() as connection:
            pairs = select(by.question_id, by.annotator)
            if round is not None:
                pairs = pairs.join(table, table.c.id == by.question_id).where(table.c.round == round)
            for question_id, annotator in connection.execute(pairs):
                answered.setdefault(question_id, set()).add(annotator)
        return [q for q in found if q.id not in answered or not answered[q.id].issuperset(q.assignees)]

    def add_answers(self, answers: Sequence[Answer]) -> int:
        """Write answers down, all or none; those whose id is there already are left alone. Returns how many were new.

        Raises NotFoundError for an answer to a question (about that example) that was never asked.
        """
        return self._add_new(schema.answers, answers)

    def answers(self, current: bool = True, example_ids: Sequence[str] | None = None) -> list[Answer]:
        """Answers in the order they came; ``current``: of each person only the latest answer to each question."""
        query = _query(schema.answers, Answer)
        query = query.where(~_superseded()) if current else query
        return self._nouns(Answer, query, schema.answers.c.example_id, example_ids)

    def count_superseded(self) -> int:
        """How many answers a later one of the same person replaced."""
        with self._read() as connection:
            query = select(func.count()).select_from(schema.answers).where(_superseded())
            return int(connection.execute(query).scalar_one())

    # Models, evidence, bundles, findings

    def add_model(self, model: Model) -> None:
        """Keep a model; its id is the digest of all the rest, so the same one again changes nothing."""
        self._add_new(schema.models, [model])

    def models(self) -> list[Model]:
        """All models, oldest first."""
        return self._nouns(Model, _query(schema.models, Model))

    def model(self, id: str | None = None) -> Model:
        """The model of that id, or of the only id that starts so; the newest for None."""
        return self._one(Model, schema.models, id, hint="trilobe train makes one")

    def add_evidence(self, model_id: str, evidence: Sequence[Evidence]) -> None:
        """Keep the outcomes of checks; they replace what the same checks said about that model before."""
        table = schema.evidence
        with self._write() as connection:
            checks = list({e.check for e in evidence})
            connection.execute(delete(table).where(table.c.model_id == model_id, table.c.check.in_(checks)))
            _insert(connection, table, [row(e, model_id=model_id) for e in evidence])

    def evidence(self, model_id: str) -> list[Evidence]:
        """What the checks said about that model, in the order they ran."""
        query = _query(schema.evidence, Evidence).where(schema.evidence.c.model_id == model_id)
        return self._nouns(Evidence, query)

    def add_bundle(self, bundle: Bundle) -> None:
        """Keep where a bundle is and what its manifest says; packaged again, it is the newest and where it is now."""
        with self._write() as connection:
            connection.execute(delete(schema.bundles).where(schema.bundles.c.id == bundle.id))
            _insert(connection, schema.bundles, [row(bundle)])

    def bundles(self) -> list[Bundle]:
        """All bundles, oldest first. One that is not where it was is looked for in the project's own folder."""
        return [self._found(bundle) for bundle in self._nouns(Bundle, _query(schema.bundles, Bundle))]

    def bundle(self, id: str | None = None) -> Bundle:
        """The bundle of that id, or of the only id that starts so; the newest for None."""
        return self._found(self._one(Bundle, schema.bundles, id, hint="trilobe package makes one"))

    def _found(self, bundle: Bundle) -> Bundle:
        """The bundle with a path that works from here: the project may have moved, or another folder be the current."""
        here = self._folder / "bundles" / bundle.path.name
        return replace(bundle, path=here) if here.exists() and not bundle.path.exists() else bundle

    def add_findings(self, findings: Sequence[Finding]) -> None:
        """Keep what monitoring noticed; those whose id is there already are left alone."""
        self._add_new(schema.findings, findings)

    def findings(self, endpoint: str | None = None) -> list[Finding]:
        """Findings in the order they came, of one endpoint or of all."""
        query = _query(schema.findings, Finding)
        if endpoint is not None:
            query = query.where(schema.findings.c.endpoint == endpoint)
        return self._nouns(Finding, query)

    def finding(self, id: str) -> Finding:
        """The finding of that id, or of the only id that starts so."""
        return self._one(Finding, schema.findings, id, hint="trilobe monitor looks for new ones")

    # The journal: what a verb already did

    def record(self, key: str, value: Any) -> None:
        """Write a JSON value down under ``key``; a key written before gets the new value and keeps its place."""
        table = schema.journal
        with self._write() as connection:
            change = update(table).where(table.c.key == key).values(value=value)
            if connection.execute(change).rowcount == 0:
                _insert(connection, table, [{"key": key, "value": value}])

    def recorded(self, key: str, default: Any = None) -> Any:
        """The value under ``key``, or ``default``."""
        with self._read() as connection:
            found = connection.execute(select(schema.journal.c.value).where(schema.journal.c.key == key)).one_or_none()
        return default if found is None else found[0]

    def journal(self, prefix: str = "") -> dict[str, Any]:
        """Every key that starts with ``prefix`` and its value, in the order the keys came."""
        table = schema.journal
        start = func.substr(table.c.key, 1, len(escape(prefix)), type_=WORDS)
        query = select(table.c.key, table.c.value).where(start == prefix).order_by(table.c.seq)
        with self._read() as connection:
            return dict(connection.execute(query).all())

    # Transactions

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """``with store.transaction():`` makes the calls inside one unit, all or nothing; inner ones join the outer.

        A call that failed inside fails the whole, also when its error was caught. It belongs to the thread that
        opened it, and other writers wait for its end, so keep it short.
        """
        with self._write():
            yield

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        joined = self._joined
        if joined.connection is not None:
            try:
                with _explained(self._where):
                    yield joined.connection
            except BaseException:
                joined.failed = True
                raise
            return
        with _explained(self._where), self._engine.connect() as connection:
            connection = connection.execution_options(trilobe_write=True)
            with connection.begin():
                joined.connection, joined.failed = connection, False
                try:
                    yield connection
                finally:
                    joined.connection = None
                if joined.failed:
                    raise StorageError("a call inside this transaction failed, so nothing of it was written")

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with _explained(self._where):
            if self._joined.connection is not None:
                yield self._joined.connection
                return
            with self._engine.connect() as connection, connection.begin():
                yield connection

    # What the calls above are made of

    def _bring_up_to_date(self, create: bool) -> None:
        with self._read() as connection:
            found = migrations.revision(connection)
            strangers = [] if found else inspect(connection).get_table_names()
        if found == migrations.HEAD:
            return
        if strangers:
            raise StorageError(
                f"{self._where} is not a Trilobe store: it holds {', '.join(sorted(strangers)[:5])}",
                expected="an empty database or a Trilobe store",
            )
        if found is None and not create:
            raise _absent(self._where)
        with self._write() as connection:
            found = migrations.revision(connection)  # another process may have been faster
            if found == migrations.HEAD:
                return
            if found is not None:
                migrations.check_known(found)
                if self._engine.dialect.name == "sqlite":
                    _copy(Path(self._engine.url.database or ""), f".before-{migrations.HEAD}")
            migrations.upgrade(connection)

    def _add_new(self, table: Table, nouns: Sequence[Any]) -> int:
        by_id: dict[str, Any] = {}
        for noun in nouns:
            by_id.setdefault(noun.id, noun)
        with self._write() as connection:
            known = _existing(connection, table.c.id, list(by_id))
            rows = [row(noun) for id, noun in by_id.items() if id not in known]
            _insert(connection, table, rows)
        return len(rows)

    def _nouns(
        self,
        noun: type[Noun],
        query: Select[Any],
        column: Column[Any] | None = None,
        among: Sequence[str] | None = None,
    ) -> list[Noun]:
        with self._read() as connection:
            if column is None or among is None:
                rows = connection.execute(query).all()
            else:
                rows = sorted(_chunked(connection, query, column, among), key=lambda found: found.seq)
        return [noun(*found[1:]) for found in rows]

    def _one(self, noun: type[Noun], table: Table, id: str | None, hint: str) -> Noun:
        what = noun.__name__.lower()
        with self._read() as connection:
            known = list(connection.execute(select(table.c.id).order_by(table.c.seq)).scalars())
        matches = known[-1:] if id is None else [k for k in known if k == id] or [k for k in known if k.startswith(id)]
        if len(matches) == 1:
            return self._nouns(noun, _query(table, noun).where(table.c.id == matches[0]))[0]
        if matches:
            raise NotFoundError(f"{len(matches)} {what}s start with {id!r}", expected=f"one of: {', '.join(matches)}")
        asked = f"there is no {what} yet" if not known else f"there is no {what} {id!r}"
        raise NotFoundError(asked, expected=f"one of: {', '.join(known[-12:])}" if known else "", hint=hint)


class _Joined(threading.local):
    """The transaction this thread is in, if any."""

    connection: Connection | None = None
    failed: bool = False


def _query(table: Table, noun: type[Any]) -> Select[Any]:
    return select(table.c.seq, *columns(table, noun)).order_by(table.c.seq)


def _superseded() -> ColumnElement[bool]:
    """Whether the same person gave a later answer to the same question; of two at one time, the later one written."""
    this, other = schema.answers.c, schema.answers.alias("other").c
    later = (other.answered_at > this.answered_at) | ((other.answered_at == this.answered_at) & (other.seq > this.seq))
    return exists().where(other.question_id == this.question_id, other.annotator == this.annotator, later)


def _chunked(connection: Connection, query: Select[Any], column: Column[Any], among: Any) -> list[Any]:
    """The rows of ``query`` whose ``column`` is ``among`` any number of values."""
    values = list(dict.fromkeys(among))
    parts = [values[i : i + _CHUNK] for i in range(0, len(values), _CHUNK)]
    return [found for part in parts for found in connection.execute(query.where(column.in_(part)))]


def _existing(connection: Connection, column: Column[Any], among: Sequence[str]) -> set[str]:
    return {found[0] for found in _chunked(connection, select(column), column, among)}


def _insert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(table), rows)


def _absent(where: str) -> NotFoundError:
    return NotFoundError(f"there is no store at {where}", hint="trilobe init")


def _location(folder: Path, url: str | None) -> URL:
    """Where the records are; SQLite in ``folder`` unless ``url`` says otherwise."""
    if url is None:
        return URL.create("sqlite", database=str(folder / "store.sqlite"))
    expected = "sqlite:///path/to/store.sqlite or postgresql://user@host/database"
    try:
        where = make_url(url)
    except ArgumentError as error:
        raise UsageError(f"the store url {url!r}", expected=expected) from error
    if where.get_backend_name() == "postgresql":
        return where.set(drivername="postgresql+psycopg")
    if where.get_backend_name() != "sqlite" or where.database in (None, "", ":memory:"):
        raise UsageError(f"the store url {where.render_as_string()!r}", expected=expected)
    return where.set(drivername="sqlite")


def _engine(where: URL) -> Engine:
    try:
        engine = create_engine(where)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"the store is at {where.render_as_string()}, but the driver {error.name!r} is not installed",
            hint="pip install 'trilobe[postgres]'",
        ) from error
    if where.drivername == "sqlite":
        event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _take_turn)
    return engine


def _set_up(connection: Any, _: Any) -> None:
    """A new SQLite connection: one log that readers need not wait for, on disk before anything is acknowledged."""
    connection.isolation_level = None  # transactions begin where `_take_turn` says, not where the driver guesses
    connection.execute(f"PRAGMA busy_timeout = {int(_WAIT * 1000)}")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    until = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:  # two processes creating the same store: this one ignores the timeout
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _take_turn(connection: Connection) -> None:
    """Writers take the lock when they begin, so that none of two can find out halfway that it must start over."""
    write = connection.get_execution_options().get("trilobe_write", False)
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
    elif write:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{int(_WAIT)}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def _copy(file: Path, suffix: str) -> None:
    """A copy of a SQLite store with everything committed, whole or not at all."""
    target, draft = file.with_name(file.name + suffix), file.with_name(file.name + suffix + ".part")
    draft.unlink(missing_ok=True)
    source, copy = sqlite3.connect(file), sqlite3.connect(draft)
    try:
        source.backup(copy)
    finally:
        source.close()
        copy.close()
    draft.replace(target)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """The errors of the database as Trilobe's."""
    try:
        yield
    except StatementError as error:
        if isinstance(error.orig, TrilobeError):  # a value that no column takes
            raise error.orig from None
        raise _translated(error, error.orig, where) from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise _translated(error, error, where) from error


# A full disk, quota or limit shows in these ways too, when a file is written, grown or mapped; 53100: PostgreSQL.
_NO_SPACE = ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_SHMMAP", "SQLITE_IOERR_TRUNCATE", "53100")


def _translated(error: Exception, cause: BaseException | None, where: str) -> StorageError | NotFoundError:
    said = str(cause).strip().split("\n")[0]
    code = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or ""
    if code.startswith("SQLITE_FULL") or code in _NO_SPACE:
        return DiskFull(
            f"no space left for {where} ({said}); this write was undone",
            hint="free some space and run the same command again",
        )
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or code == "55P03":
        return StoreBusy(f"another process has been writing to {where} for {_WAIT:.0f} seconds", hint="try again later")
    if isinstance(error, IntegrityError):
        return NotFoundError(
            f"something refers to what is not in the store ({said})", expected="what it refers to, first"
        )
    if code.startswith("SQLITE_NOTADB"):
        return StorageError(f"{where} is not a database", hint="move that file away, or restore it from a backup")
    if code.startswith("SQLITE_CORRUPT"):
        return StorageError(f"{where} is damaged ({said})", hint="restore it from a backup")
    return StorageError(f"the store at {where} failed: {said}")
