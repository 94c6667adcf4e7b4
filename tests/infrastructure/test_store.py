"""The store: what goes in comes out, in order, all or nothing, through kills, full disks and many processes at once.

Every test that is not about a file of SQLite runs on PostgreSQL too where a server and its driver are installed.
"""

import importlib.util
import json
import math
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect
from sqlalchemy import text as sql

from trilobe.errors import DiskFull, MissingExtra, NotFoundError, StorageError, StoreBusy, UsageError
from trilobe.infrastructure.store import Store, schema
from trilobe.infrastructure.store import store as module
from trilobe.types import (
    Answer,
    Bundle,
    Evidence,
    Example,
    Finding,
    LabelSpace,
    Model,
    Question,
    Response,
    Span,
)

# Where a store can be ------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    folder: Path
    url: str | None

    def open(self, create: bool = False) -> Store:
        return Store.open(self.folder, self.url, create=create)

    def run(self, script: str, *more: str) -> "subprocess.Popen[str]":
        """A Python process that finds an open ``store`` and ``more`` as strings in ``args``."""
        head = (
            "import sys, json, os, time\nfrom pathlib import Path\n"
            "from trilobe.errors import *\nfrom trilobe.types import *\n"
            "from trilobe.infrastructure.store import Store\n"
            "folder, url, *args = sys.argv[1:]\n"
            "def open_store(): return Store.open(Path(folder), url or None)\n"
        )
        command = [sys.executable, "-W", "error", "-c", head + script, str(self.folder), self.url or "", *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A real server of our own, on a socket in a folder of its own; its url without the database."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'trilobe[postgres]'")
    home = Path(tempfile.mkdtemp(prefix="trilobe-"))
    as_user: list[str] = []
    if os.geteuid() == 0:  # initdb refuses root
        if "postgres" not in {user.pw_name for user in pwd.getpwall()}:
            pytest.skip("running as root, and there is no user postgres to run the server as")
        shutil.chown(home, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    control = [*as_user, str(Path(initdb).with_name("pg_ctl")), "-D", str(home / "data"), "-w", "-s"]
    settings = f"-c listen_addresses='' -c unix_socket_directories={home}"
    quiet: dict[str, Any] = {"cwd": home, "stdout": subprocess.DEVNULL, "check": True}
    try:
        subprocess.run(
            [*as_user, initdb, "-D", str(home / "data"), "-U", "postgres", "-A", "trust", "-E", "UTF8"], **quiet
        )
        subprocess.run([*control, "-o", settings, "-l", str(home / "log"), "start"], **quiet)
        try:
            yield f"postgresql://postgres@/DATABASE?host={home}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(home, ignore_errors=True)


_names = count()


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a store was just created."""
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres")
        import psycopg

        name = f"t{next(_names)}"
        with psycopg.connect(url.replace("DATABASE", "postgres"), autocommit=True) as connection:
            connection.execute(f"create database {name}")
        url = url.replace("DATABASE", name)
    place = Place(tmp_path / ".trilobe", url)
    place.open(create=True).close()
    return place


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open() as store:
        yield store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A store of SQLite with 500 examples, closed."""
    with Store.open(tmp_path, create=True) as store:
        store.add_examples([Example(f"e{i}", "x" * 100) for i in range(500)])
    return tmp_path / "store.sqlite"


# What goes in comes out ----------------------------------------------------------------------------------------------

words = st.one_of(st.text(max_size=20), st.binary(max_size=20).map(lambda b: b.decode("utf-8", "surrogateescape")))
numbers = st.floats().map(lambda x: x + 0.0)  # SQLite keeps no sign of zero
counts = st.integers(0, 2**31 - 1)
names = st.lists(words, max_size=4).map(tuple)
values = st.dictionaries(
    words,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
some = names.filter(bool)
spans = st.builds(Span, counts, counts, words)
spaces = st.one_of(
    st.lists(words, unique=True, max_size=5).map(lambda n: LabelSpace(tuple(n))),
    st.just(LabelSpace(("Öl", "\udcff", "c"), {"Öl": "n", "\udcff": "n", "n": "root"}, "BIOES")),
)
responses = st.one_of(
    words.map(lambda w: Response("class", (w,))),
    st.builds(Response, st.sampled_from(["one_of", "not"]), some),
    st.just(Response("unsure")),
    st.lists(spans, max_size=3).map(lambda s: Response("spans", (), tuple(s))),
    st.builds(Response, st.sampled_from(["span_accepted", "span_rejected"]), st.just(()), st.tuples(spans)),
)
examples = st.builds(
    Example, words, words, st.sampled_from(["pool", "test"]), words, st.dictionaries(words, words), numbers
)
questions = st.builds(Question, words, words, names, words, numbers, words, counts, names, numbers)
answers = st.builds(Answer, words, words, words, words, responses, numbers, numbers)
models = st.builds(Model, words, words, spaces, words, values, values, numbers, values, values, numbers)
evidence = st.builds(
    Evidence,
    words,
    numbers,
    numbers,
    numbers,
    counts,
    st.none() | st.floats(allow_nan=False).map(lambda x: x + 0.0),
    st.sampled_from(["at_least", "at_most"]),
    st.none() | st.booleans(),
    values,
)
bundles = st.builds(Bundle, words, words.map(Path), words, values)
findings = st.builds(
    Finding,
    words,
    words,
    words,
    st.sampled_from(["class_share", "low_confidence", "class_drift"]),
    words,
    numbers,
    numbers,
    numbers,
    numbers,
    numbers,
    counts,
    names,
    values,
    numbers,
)


class Undo(Exception):
    pass


def test_the_migrations_build_the_tables_of_the_schema(store: Store) -> None:
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, schema.metadata) == []
        assert set(inspect(connection).get_table_names()) == {*schema.metadata.tables, "alembic_version"}


def test_every_noun_comes_back_as_it_went_in(store: Store) -> None:
    """Each draw in a transaction that is then undone; ``repr`` compares NaN, types and the order of keys too."""

    @settings(max_examples=40, deadline=None, database=None)
    @given(examples, questions, answers, models, evidence, bundles, findings, words, values)
    def check(
        example: Example,
        question: Question,
        answer: Answer,
        model: Model,
        proof: Evidence,
        bundle: Bundle,
        finding: Finding,
        key: str,
        value: Any,
    ) -> None:
        question = replace(question, example_id=example.id)
        answer = replace(answer, question_id=question.id, example_id=example.id)
        bundle = replace(bundle, model_id=model.id)
        with pytest.raises(Undo), store.transaction():
            store.add_examples([example])
            store.add_questions([question])
            store.add_answers([answer])
            store.add_model(model)
            store.add_evidence(model.id, [proof])
            store.add_bundle(bundle)
            store.add_findings([finding])
            store.record(key, value)
            assert repr(store.examples(ids=[example.id])) == repr([example])
            assert repr(store.questions(ids=[question.id])) == repr([question])
            assert repr(store.answers(example_ids=[example.id])) == repr([answer])
            assert repr(store.model(model.id)) == repr(model)
            assert repr(store.evidence(model.id)) == repr([proof])
            assert repr(store.bundle(bundle.id)) == repr(bundle)
            assert repr(store.finding(finding.id)) == repr(finding)
            assert repr(store.recorded(key)) == repr(value)
            assert list(store.journal(key[:3])) == [key]
            raise Undo
        assert store.count_examples() == {"pool": 0, "test": 0}

    check()


def test_arrays_and_numpy_scalars_in_values(store: Store) -> None:
    arrays = [np.arange(6, dtype=np.uint8).reshape(2, 3), np.array(0.1), np.zeros((0, 3), np.float32), np.array(["é"])]
    for array in arrays:
        store.record("array", {"deep": [array]})
        back = store.recorded("array")["deep"][0]
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        assert np.array_equal(back, array)
        assert back.flags.writeable
    store.record("scalars", [np.int64(2**62), np.float64(0.1), np.bool_(True), (1, 2), None])
    assert store.recorded("scalars") == [2**62, 0.1, True, [1, 2], None]
    store.add_model(Model("m", "t", LabelSpace(("a",)), "w", {}, {}))
    odd = Evidence("c", np.float32(0.5), np.float64(0.1), 1, np.int64(3), np.float32(0.25), "at_most", np.bool_(True))  # type: ignore[arg-type]
    store.add_evidence("m", [odd])
    assert store.evidence("m") == [Evidence("c", 0.5, 0.1, 1.0, 3, 0.25, "at_most", True)]


@pytest.mark.parametrize("value", [{1: "a"}, {"a": {2: 3}}, object(), b"bytes", np.array([None]), 1j])
def test_what_json_would_change_is_refused_and_nothing_written(store: Store, value: Any) -> None:
    with pytest.raises(UsageError, match="in a value to store"):
        store.record("key", value)
    assert store.journal() == {}


# Examples ------------------------------------------------------------------------------------------------------------


def test_duplicates_by_id_and_by_content_also_within_a_call_and_across_splits(store: Store) -> None:
    a, b, c = Example("a", "a.png"), Example("b", "b.jpg", "test"), Example("c", "c.bmp")
    assert store.add_examples([a, replace(a, name="again.png"), b], {"a": "1", "b": "1"}) == (
        [a],
        [(replace(a, name="again.png"), "a"), (b, "a")],
    )
    assert store.add_examples([b, c, replace(a, split="test")], {"b": "1", "c": "2"}) == (
        [c],
        [(b, "a"), (replace(a, split="test"), "a")],
    )
    assert store.add_examples([b]) == ([b], [])  # without a digest of its content it cannot be recognized
    assert store.count_examples() == {"pool": 2, "test": 1}


def test_examples_come_in_the_order_they_were_added(store: Store) -> None:
    some = [Example(f"{i * 7919 % 100:02}", "n", "test" if i % 3 else "pool") for i in range(100)]
    for start in range(0, 100, 10):
        store.add_examples(some[start : start + 10])
    assert store.examples() == some
    assert store.examples("test") == [e for e in some if e.split == "test"]
    assert store.examples(ids=["03", "unknown", "01", "03"]) == [e for e in some if e.id in ("01", "03")]
    assert store.examples("pool", ids=[]) == []


def test_ten_thousand_at_once(store: Store) -> None:
    """More ids than a database takes variables; the order holds across the pieces."""
    some = [Example(f"{i * 7919 % 12_000:05}", "n") for i in range(12_000)]
    assert len(store.add_examples(some, {e.id: f"c{e.id}" for e in some})[0]) == 12_000
    assert store.examples(ids=[e.id for e in reversed(some)]) == some
    asked = [Question(f"q{e.id}", e.id) for e in some]
    assert store.add_questions(asked) == 12_000
    said = [Answer(f"a{e.id}", f"q{e.id}", e.id, "ann", Response("unsure")) for e in some]
    assert store.add_answers(said) == 12_000
    assert store.add_answers(said) == 0
    assert store.answers(example_ids=[e.id for e in some]) == said


# Questions and answers -----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(store: Store) -> Store:
    """Two examples; ``q1`` for ann and bob, ``q2`` for anybody, ``q3`` in round 1 for ann."""
    store.add_examples([Example("x", "x.png"), Example("y", "y.png")])
    store.add_questions(
        [
            Question("q1", "x", assignees=("ann", "bob")),
            Question("q2", "y", ("cat",)),
            Question("q3", "y", round=1, assignees=("ann",)),
        ]
    )
    return store


def say(id: str, question: str, who: str, what: str, at: float = 0.0) -> Answer:
    return Answer(id, question, {"q1": "x"}.get(question, "y"), who, Response("class", (what,)), 1.0, at)


def test_a_question_is_asked_once(asked: Store) -> None:
    again = [Question("q1", "y"), Question("q4", "x"), Question("q4", "y")]
    assert asked.add_questions(again) == 1
    assert [(q.id, q.example_id) for q in asked.questions()] == [("q1", "x"), ("q2", "y"), ("q3", "y"), ("q4", "x")]
    assert [q.id for q in asked.questions(round=1)] == ["q3"]
    assert [q.id for q in asked.questions(round=0, ids=["q3", "q2"])] == ["q2"]


def test_open_questions(asked: Store) -> None:
    def left(**which: Any) -> list[str]:
        return [q.id for q in asked.questions(open_only=True, **which)]

    assert left() == ["q1", "q2", "q3"]
    asked.add_answers([say("1", "q1", "ann", "cat"), say("2", "q2", "eve", "cat"), say("3", "q3", "eve", "cat")])
    assert left() == ["q1", "q3"]  # bob is missing; eve was not asked q3
    asked.add_answers([say("4", "q1", "bob", "cat")])
    assert left() == ["q3"]
    assert left(round=0) == []
    asked.add_answers([say("5", "q3", "ann", "cat")])
    assert left(round=1) == []


def test_only_the_latest_answer_of_a_person_counts(asked: Store) -> None:
    said = [
        say("1", "q1", "ann", "cat", at=10),
        say("2", "q1", "bob", "cat", at=10),
        say("3", "q1", "ann", "dog", at=30),
        say("4", "q1", "ann", "cow", at=20),  # arrived late: it was said before 3
        say("5", "q2", "ann", "cat", at=5),
        say("6", "q2", "ann", "dog", at=5),  # at the same moment: the later one written
    ]
    assert [asked.add_answers(said[:3]), asked.add_answers(said), asked.add_answers(said)] == [3, 3, 0]
    assert asked.answers(current=False) == said
    assert [a.id for a in asked.answers()] == ["2", "3", "6"]
    assert [a.id for a in asked.answers(example_ids=["y"])] == ["6"]
    assert [a.id for a in asked.answers(current=False, example_ids=["y", "z"])] == ["5", "6"]
    assert asked.count_superseded() == 3


def test_current_answers_against_a_plain_loop(asked: Store) -> None:
    @settings(max_examples=30, deadline=None, database=None)
    @given(st.lists(st.tuples(st.sampled_from(["q1", "q2"]), st.sampled_from("abc"), st.integers(0, 3)), max_size=20))
    def check(drawn: list[tuple[str, str, int]]) -> None:
        said = [say(str(i), question, who, "cat", at) for i, (question, who, at) in enumerate(drawn)]
        latest: dict[tuple[str, str], Answer] = {}
        for answer in said:
            key = answer.question_id, answer.annotator
            if key not in latest or answer.answered_at >= latest[key].answered_at:
                latest[key] = answer
        with pytest.raises(Undo), asked.transaction():
            asked.add_answers(said)
            assert asked.answers() == sorted(latest.values(), key=said.index)
            assert asked.count_superseded() == len(said) - len(latest)
            raise Undo

    check()


def test_an_answer_that_was_written_down_never_changes(asked: Store) -> None:
    first = say("1", "q1", "ann", "cat")
    asked.add_answers([first])
    assert asked.add_answers([say("1", "q1", "ann", "dog", at=99)]) == 0
    assert asked.answers(current=False) == [first]


@pytest.mark.parametrize("stray", [say("2", "q9", "ann", "cat"), replace(say("2", "q1", "ann", "cat"), example_id="y")])
def test_answers_are_written_all_or_none(asked: Store, stray: Answer) -> None:
    with pytest.raises(NotFoundError, match="not in the store"):
        asked.add_answers([say("1", "q1", "ann", "cat"), stray])
    assert asked.answers() == []


# Models, evidence, bundles, findings, journal ------------------------------------------------------------------------


def model(id: str) -> Model:
    return Model(id, "image_classification", LabelSpace(("cat", "dog")), "0" * 64, {"size": [28, 28]}, {"width": 8})


def test_models_by_id_by_prefix_and_the_newest(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no model yet") as none:
        store.model()
    assert "trilobe train" in none.value.hint
    for id in ("b1", "a1", "a12", "a1"):
        store.add_model(model(id))
    assert [m.id for m in store.models()] == ["b1", "a1", "a12"]
    assert [store.model(id).id for id in (None, "b", "a1", "a12")] == ["a12", "b1", "a1", "a12"]
    for unclear, said in (("a", "a1, a12"), ("c", "b1, a1, a12"), ("A1", "b1, a1, a12"), ("%", "b1, a1, a12")):
        with pytest.raises(NotFoundError, match=said):
            store.model(unclear)


def test_evidence_of_the_same_check_is_replaced(store: Store) -> None:
    store.add_model(model("m"))
    store.add_model(model("n"))
    old, kept, new = Evidence("accuracy", 0.5, 0.4, 0.6), Evidence("attack", 1, 1, 1), Evidence("accuracy", 0.9, 0.8, 1)
    store.add_evidence("m", [old, kept])
    store.add_evidence("n", [old])
    store.add_evidence("m", [new])
    assert store.evidence("m") == [kept, new]
    assert store.evidence("n") == [old]
    with pytest.raises(NotFoundError):
        store.add_evidence("unknown", [old])


def test_bundles(store: Store) -> None:
    store.add_model(model("m"))
    one, two = Bundle("1", Path("a/b"), "m", {"format": 1}), Bundle("2", Path("c"), "m")
    store.add_bundle(one)
    store.add_bundle(two)
    assert [store.bundles(), store.bundle(), store.bundle("1")] == [[one, two], two, one]
    moved = replace(one, path=Path("elsewhere"))
    store.add_bundle(moved)
    assert [store.bundles(), store.bundle()] == [[two, moved], moved]


def test_findings(store: Store) -> None:
    one = Finding("f1", "digits", "b", "class_share", "more 3s", 0.4, 0.1, 0.3, 0.5, 1e-300, 200, ("c1", "c2"))
    two = replace(one, id="f2", endpoint="letters")
    store.add_findings([one, two])
    store.add_findings([replace(one, message="changed")])
    assert [store.findings(), store.findings("letters"), store.finding("f1")] == [[one, two], [two], one]
    with pytest.raises(NotFoundError, match="no finding 'x'"):
        store.finding("x")


def test_the_journal_keeps_order_and_replaces(store: Store) -> None:
    for key, value in (("b/1", 1), ("a/1", [1.5]), ("b%", None), ("B/1", "x"), ("b/2", 2), ("b/1", {"now": True})):
        store.record(key, value)
    assert list(store.journal().items()) == [
        ("b/1", {"now": True}),
        ("a/1", [1.5]),
        ("b%", None),
        ("B/1", "x"),
        ("b/2", 2),
    ]
    assert list(store.journal("b/")) == ["b/1", "b/2"]
    assert store.journal("b%") == {"b%": None}
    assert [store.recorded("b%", 7), store.recorded("c", 7), store.recorded("c")] == [None, 7, None]


# Transactions --------------------------------------------------------------------------------------------------------


def test_a_transaction_is_all_or_nothing_and_invisible_until_its_end(place: Place) -> None:
    with place.open() as store, place.open() as other:
        with store.transaction():
            store.record("a", 1)
            with store.transaction():
                store.record("b", 2)
            assert store.journal() == {"a": 1, "b": 2}
            assert other.journal() == {}  # and the reader does not wait
        assert other.journal() == {"a": 1, "b": 2}
        with pytest.raises(Undo), store.transaction():
            store.record("c", 3)
            raise Undo
        assert store.journal() == other.journal() == {"a": 1, "b": 2}


def test_an_error_caught_inside_a_transaction_still_fails_the_whole(store: Store) -> None:
    with pytest.raises(StorageError, match="nothing of it was written"), store.transaction():
        store.record("before", 1)
        with pytest.raises(NotFoundError):
            store.add_answers([say("1", "q9", "ann", "cat")])
    assert store.journal() == {}
    store.record("after", 2)
    assert store.journal() == {"after": 2}


def test_threads_share_a_store_and_each_has_its_own_transaction(store: Store) -> None:
    def work(name: str) -> None:
        for i in range(20):
            with store.transaction():
                store.record("count", store.recorded("count", 0) + 1)
                store.record(f"{name}/{i}", i)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.recorded("count") == 80
    assert len(store.journal()) == 81


def test_processes_write_and_read_at_once(place: Place) -> None:
    """Three read, add one and write; a fourth only reads and must never see half of a transaction."""
    write = """
with open_store() as store:
    for i in range(200):
        with store.transaction():
            store.record("count", store.recorded("count", 0) + 1)
            store.record(f"left/{args[0]}/{i}", i)
            store.record(f"right/{args[0]}/{i}", i)
"""
    read = """
with open_store() as store:
    n = 0
    while n < 600:
        keys = list(store.journal())
        time.sleep(0.005)
        n = sum(key.startswith("right") for key in keys)
        if n != sum(key.startswith("left") for key in keys):
            sys.exit("half a transaction")
"""
    started = [place.run(write, name) for name in "abc"] + [place.run(read)]
    try:
        for process in started:
            with process:
                assert process.wait(100) == 0
    finally:
        for process in started:
            process.kill()
    with place.open() as store:
        assert store.recorded("count") == 600
        assert len(store.journal("left/")) == len(store.journal("right/")) == 600


def test_what_was_acknowledged_survives_kill_9(place: Place) -> None:
    """Ten writers in turn, each killed at some moment: all that was acknowledged is there, and no half transaction."""
    script = """
import random, signal
random.seed(int(args[0]))
said = []
for turn in range(10):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with open_store() as store:
            i = 0
            while True:
                with store.transaction():
                    store.record(f"left/{turn}/{i}", i)
                    store.record(f"right/{turn}/{i}", "x" * 1000)
                os.write(theirs, f"{turn}/{i}\\n".encode())
                i += 1
    os.close(theirs)
    with open(ours) as pipe:
        said.append(pipe.readline())
        time.sleep(random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said += pipe.readlines()
print(json.dumps([line.strip() for line in said]))
"""
    with place.run(script, "1") as process:
        said = json.loads(process.communicate(timeout=100)[0])
    with place.open() as store:
        left, right = store.journal("left/"), store.journal("right/")
        if place.url is None:
            with store._engine.connect() as connection:
                assert connection.execute(sql("PRAGMA integrity_check")).scalar() == "ok"
    assert len({line.split("/")[0] for line in said}) == 10
    assert {f"left/{line}" for line in said} <= left.keys()
    assert {f"right/{line}" for line in said} <= right.keys()
    assert [k.removeprefix("left/") for k in left] == [k.removeprefix("right/") for k in right]


def test_a_writer_that_waited_too_long_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT", 1)
    with place.open() as store, place.open() as other, store.transaction():
        store.record("a", 1)
        asked = time.monotonic()
        with pytest.raises(StoreBusy, match="another process has been writing"):
            other.record("b", 2)
        assert 0.9 < time.monotonic() - asked < 20


# Trouble with the file, and the wrong place --------------------------------------------------------------------------


def test_settings_of_the_connection(file: Path) -> None:
    with Store.open(file.parent) as store, store._engine.connect() as connection:
        pragma = [connection.execute(sql(f"PRAGMA {p}")).scalar() for p in ("journal_mode", "synchronous")]
        assert pragma == ["wal", 2]
        assert connection.execute(sql("PRAGMA busy_timeout")).scalar() == 30_000
        assert connection.execute(sql("PRAGMA foreign_keys")).scalar() == 1


def test_disk_full_undoes_the_write(file: Path) -> None:
    """SQLite's own limit on the number of pages: the error is the one of a full disk."""
    with Store.open(file.parent) as store:
        with store._engine.connect() as connection:
            pages = connection.execute(sql("PRAGMA page_count")).scalar_one()
            connection.execute(sql(f"PRAGMA max_page_count = {pages + 5}"))
        with pytest.raises(DiskFull, match="no space left"), store.transaction():
            store.record("started", True)
            store.add_examples([Example(f"new{i}", "y" * 100) for i in range(2_000)])
        assert store.journal() == {}
        assert store.count_examples()["pool"] == 500
        with store._engine.connect() as connection:
            connection.execute(sql("PRAGMA max_page_count = 1000000"))
            assert connection.execute(sql("PRAGMA integrity_check")).scalar() == "ok"
        assert len(store.add_examples([Example(f"new{i}", "y" * 100) for i in range(2_000)])[0]) == 2_000


def test_a_file_that_may_not_grow_keeps_what_was_acknowledged(file: Path) -> None:
    """For real: the kernel refuses to let any file grow beyond twice the size of this one."""
    script = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(args[0]), int(args[0])))
n = 0
try:
    with open_store() as store:
        while True:
            store.record(f"key{n}", "x" * 500)
            n += 1
except DiskFull:
    print(n)
"""
    with Place(file.parent, None).run(script, str(2 * file.stat().st_size)) as process:
        n = int(process.communicate(timeout=60)[0])
    assert n > 0
    with Store.open(file.parent) as store:
        assert list(store.journal()) == [f"key{i}" for i in range(n)]
        assert store.count_examples()["pool"] == 500


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").write_bytes(b"dear diary, " * 1000)
    for create in (False, True):
        with pytest.raises(StorageError, match=r"store\.sqlite is not a database"):
            Store.open(tmp_path, create=create)


def test_a_damaged_file(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for page in range(4, len(data) // 4096):
        data[page * 4096 : (page + 1) * 4096] = b"\xff" * 4096
    file.write_bytes(data)
    with pytest.raises(StorageError, match="damaged"), Store.open(file.parent) as store:
        store.examples()


def test_no_store_here(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no store at .*store\.sqlite") as missing:
        Store.open(tmp_path / "nowhere")
    assert missing.value.hint == "trilobe init"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://u:secret@h/d", "store.sqlite", ""])
def test_urls_that_make_no_store(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="the store url") as refused:
        Store.open(tmp_path, url, create=True)
    assert "secret" not in str(refused.value)


def test_records_elsewhere_by_url(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records' / 'all.db'}"
    with Store.open(tmp_path / ".trilobe", url, create=True) as store:
        store.record("here", store.blobs.put(b"bytes"))
    assert (tmp_path / "records" / "all.db").exists()
    with Store.open(tmp_path / ".trilobe", url) as store:
        assert store.blobs.get(store.recorded("here")) == b"bytes"


def test_a_project_in_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 ? # %20")
    with Store.open(folder, create=True) as store:
        store.record("here", store.blobs.put(b"bytes"))
    assert (folder / "store.sqlite").exists()


def test_a_server_that_does_not_answer_and_a_driver_that_is_missing(tmp_path: Path) -> None:
    url = f"postgresql://someone:secret@/store?host={tmp_path}"
    if importlib.util.find_spec("psycopg") is None:
        with pytest.raises(MissingExtra, match="psycopg") as failed:
            Store.open(tmp_path, url)
        assert "trilobe[postgres]" in failed.value.hint
    else:
        with pytest.raises(StorageError, match="failed") as broken:
            Store.open(tmp_path, url)
        assert "secret" not in str(broken.value)


def test_an_empty_database_is_no_store_yet(place: Place) -> None:
    if place.url is None:
        pytest.skip("for SQLite see test_migrations")
    with place.open() as store, store._engine.begin() as connection:
        connection.execute(sql("drop schema public cascade"))
        connection.execute(sql("create schema public"))
    with pytest.raises(NotFoundError, match="no store at postgresql"):
        place.open()


def test_numbers_are_exact(store: Store) -> None:
    store.add_model(model("m"))
    exact = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, 2.0**53 + 2]
    store.add_evidence("m", [Evidence(f"c{i}", x, x, x) for i, x in enumerate(exact)])
    assert [e.figure for e in store.evidence("m")] == exact


def test_bundles_are_found_after_the_project_has_moved(tmp_path: Path) -> None:
    """Packaged under a relative path or in another place: the folder that lies in the project is the one."""
    old, new = tmp_path / "old", tmp_path / "new"
    with Store.open(old / ".trilobe", create=True) as store:
        store.add_model(model("m1"))
        store.add_bundle(Bundle("b1", Path("nowhere/.trilobe/bundles/pets-b1"), "m1", {}))
        assert store.bundle("b1").path == Path("nowhere/.trilobe/bundles/pets-b1"), "nothing better is known"
    old.rename(new)
    (new / ".trilobe" / "bundles" / "pets-b1").mkdir(parents=True)
    with Store.open(new / ".trilobe") as store:
        assert store.bundle().path == store.bundles()[0].path == new / ".trilobe" / "bundles" / "pets-b1"
