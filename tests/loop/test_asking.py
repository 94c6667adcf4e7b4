"""``query``, ``label``, ``aggregate``: what is asked, what is taken as an answer, and what is made of it."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe import loop
from trilobe.errors import AnswerError, NotEnoughData, NotFoundError, UsageError
from trilobe.loop.believing import pack_beliefs, unpack_beliefs
from trilobe.loop.tables import parse_label
from trilobe.types import Belief, Response


def write(path: Path, *rows: str, header: str = "example,annotator,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", "utf-8")
    return path


# --- query


def test_typical_first_then_the_strategy(tiny) -> None:
    first = loop.query(tiny.folder)
    assert len(first) == 9 and {q.strategy for q in first} == {"typical.v1"}
    assert {q.round for q in first} == {1}
    loop.label(tiny.answer, tiny.folder)
    loop.train(tiny.folder)
    second = loop.query(tiny.folder, strategy="entropy")
    assert len(second) == 6 and {q.strategy for q in second} == {"entropy.v1"}
    assert not {q.example_id for q in first} & {q.example_id for q in second}
    assert {q.round for q in second} == {2}


def test_open_questions_come_back(tiny) -> None:
    first = loop.query(tiny.folder, n=4)
    assert loop.query(tiny.folder, n=10) == first
    assert len(tiny.state()["questions"]) == 30 + 4


def test_more_than_there_is_asks_everything_and_then_nothing_is_left(tiny) -> None:
    assert len(loop.query(tiny.folder, n=10_000)) == 60
    loop.label(tiny.answer, tiny.folder)
    with pytest.raises(NotEnoughData, match=r"every example of the pool has been asked(.|\n)*trilobe add"):
        loop.query(tiny.folder)


def test_a_score_function_of_ones_own(trained) -> None:
    def unlikely_dot(proba: np.ndarray) -> np.ndarray:
        return 1 - proba[:, 2]

    asked = loop.query(trained.folder, strategy=unlikely_dot)
    assert {q.strategy for q in asked} - {"control.v1"} == {"unlikely_dot"}


@pytest.mark.parametrize("argument", [{"n": 0}, {"n": -3}, {"answers": 0}])
def test_counts_below_one(tiny, argument: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"expected at least 1"):
        loop.query(tiny.folder, **argument)


def test_unknown_strategy(trained) -> None:
    before = trained.state()
    with pytest.raises(UsageError, match=r"unknown strategy 'clever'; expected one of margin|.*'clever'"):
        loop.query(trained.folder, strategy="clever")
    assert trained.state() == before


def test_unknown_finding(trained) -> None:
    with pytest.raises(NotEnoughData, match=r"there are no findings(.|\n)*trilobe monitor"):
        loop.query(trained.folder, finding="newest")
    with pytest.raises(NotFoundError, match=r"there is no finding"):
        loop.query(trained.folder, finding="abc")


def test_people_are_assigned_and_too_few_are_told(tiny) -> None:
    tiny.set("query", "annotators", '["ann", "bob", "cy"]')
    asked = loop.query(tiny.folder, n=30, answers=2)
    assert {len(set(q.assignees)) for q in asked} == {2}
    counts = [sum(name in q.assignees for q in asked) for name in ("ann", "bob", "cy")]
    assert min(counts) > 10, "the work is shared"


def test_more_answers_wanted_than_people(tiny) -> None:
    said: list[str] = []
    with loop.listening(lambda message, done=0, total=0: said.append(message)):
        loop.query(tiny.folder, n=3, answers=2)
    assert any("asked of 1, not of 2: name the people in query.annotators" in s for s in said)


# --- label


def test_a_table(tiny, tmp_path: Path) -> None:
    loop.query(tiny.folder, n=5)
    told = loop.label(tiny.table(tmp_path / "a.csv"), tiny.folder)
    assert (told.new, told.known, told.superseded, told.refused, told.open) == (60, 0, 0, {}, 0)
    before = tiny.state()
    again = loop.label(tmp_path / "a.csv", tiny.folder)
    assert (again.new, again.known, again.superseded) == (0, 60, 0)
    assert tiny.state() == before, "the same file again changes nothing"


def test_at_most_n_new_answers_and_the_next_call_goes_on(tiny, tmp_path: Path) -> None:
    table = tiny.table(tmp_path / "a.csv", 10)
    assert [loop.label(table, tiny.folder, n=4).new for _ in range(4)] == [4, 4, 2, 0]


def test_names_ids_and_their_first_letters(tiny, tmp_path: Path) -> None:
    a, b, c = tiny.examples("pool")[:3]
    rows = [f"{Path(a.name).name},ann,bar", f"{b.id[:8]},ann,bar", f"{c.name},ann,bar"]
    assert loop.label(write(tmp_path / "a.csv", *rows), tiny.folder).new == 3


def test_an_ambiguous_name_is_refused(tiny, tmp_path: Path) -> None:
    from PIL import Image

    for i in (1, 2):
        (tmp_path / str(i)).mkdir()
        Image.fromarray(np.full((8, 8), i, dtype=np.uint8)).save(tmp_path / str(i) / "twin.png")
    loop.add([tmp_path / "1", tmp_path / "2"], tiny.folder)
    told = loop.label(write(tmp_path / "a.csv", "twin.png,ann,bar"), tiny.folder)
    assert told.new == 0 and "2 examples called 'twin.png'" in next(iter(told.refused.values()))


BAD_ROWS = {
    "nobody-knows.png,ann,bar": "no example called 'nobody-knows.png'; expected an example's id",
    "{id},ann,zebra": "unknown label 'zebra'; expected one of: bar, cross, dot",
    "{id},ann,": "an empty label; expected a class",
    "{id},ann": "an empty label",
    "{id},,bar": "no annotator; expected a name",
    "{id}": "an empty label",
    "{id},ann,not:bar|cross|dot": "leaves no class possible",
    "{id},ann,bar,slow": "seconds = 'slow'; expected a number of seconds",
    "{id},ann,bar,nan": "seconds = 'nan'",
    "{id},ann,bar,-1": "seconds = '-1'",
    "{id},ann,bar,1,inf": "answered_at = 'inf'",
    ",ann,bar": "no example|examples called ''",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_rows_that_fit_nothing_are_refused_and_the_others_go_in(tiny, tmp_path: Path, row: str) -> None:
    import re

    a, b = tiny.examples("pool")[:2]
    header = "example,annotator,label,seconds,answered_at"
    table = write(tmp_path / "a.csv", row.format(id=a.id), f"{b.id},ann,dot,2.5,", header=header)
    told = loop.label(table, tiny.folder)
    assert told.new == 1
    ((where, reason),) = told.refused.items()
    assert where == f"{table}:2", "the line is named"
    assert re.search(BAD_ROWS[row], reason), reason


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", r"has the columns \[\]; expected also \['example', 'annotator', 'label'\]"),
        (b"example,label\nx,bar\n", r"expected also \['annotator'\](.|\n)*first line: example,annotator,label"),
        (b"example;annotator;label\nx;y;z\n", "has the columns"),
        ("example,annotator,label\nx,ann,b\xe9\n".encode("latin-1"), r"not UTF-8(.|\n)*save it again as 'CSV UTF-8'"),
        ("example,annotator,label\n".encode("utf-16"), "not UTF-8"),
        (b'example,annotator,label\n"x,ann,bar\n', "not a CSV file"),
        (b"example,annotator,label\n" + b"x" * 200_000 + b",ann,bar\n", "not a CSV file"),
    ],
)
def test_files_that_are_no_table(tiny, tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    before = tiny.state()
    with pytest.raises(UsageError, match=problem):
        loop.label(tmp_path / "a.csv", tiny.folder)
    assert tiny.state() == before


def test_no_such_file_and_a_folder(tiny, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no file .*none.csv"):
        loop.label(tmp_path / "none.csv", tiny.folder)
    with pytest.raises(UsageError, match=r"cannot be read"):
        loop.label(tmp_path, tiny.folder)


def test_what_spreadsheets_write(tiny, tmp_path: Path) -> None:
    """A byte order mark, carriage returns, spaces in the header, quotes, columns nobody asked for."""
    a, b = tiny.examples("pool")[:2]
    text = f'example , annotator,label,remark\r\n"{a.id}",ann,bar,"two\r\nlines"\r\n{b.id},ann,"bar|dot",\r\n'
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert loop.label(tmp_path / "a.csv", tiny.folder).new == 2


def test_somebody_who_contradicts_himself(tiny, tmp_path: Path) -> None:
    id_ = tiny.examples("pool")[0].id
    table = write(tmp_path / "a.csv", *[f"{id_},ann,{label}" for label in ("bar", "bar", "dot", "bar")])
    told = loop.label(table, tiny.folder)
    assert (told.new, told.known, told.superseded) == (3, 1, 2)
    before = tiny.state()
    again = loop.label(table, tiny.folder)
    assert (again.new, again.known, again.superseded) == (0, 4, 0)
    assert tiny.state() == before
    with loop.opened(tiny.folder) as p:
        (latest,) = p.store.answers(example_ids=[id_])
    assert latest.response == Response("class", ("bar",))
    with table.open("a") as f:
        f.write(f"{id_},ann,cross\n")
    assert loop.label(table, tiny.folder).new == 1, "a file that grew: only what is new"


def test_times_decide_not_the_order_of_files(tiny, tmp_path: Path) -> None:
    id_ = tiny.examples("pool")[0].id
    header = "example,annotator,label,answered_at"
    late = write(tmp_path / "late.csv", f"{id_},ann,dot,2000", header=header)
    early = write(tmp_path / "early.csv", f"{id_},ann,bar,1000", header=header)
    assert loop.label(late, tiny.folder).new == 1
    told = loop.label(early, tiny.folder)
    assert (told.new, told.superseded) == (1, 1)
    assert [loop.label(f, tiny.folder).known for f in (early, late)] == [1, 1]
    with loop.opened(tiny.folder) as p:
        assert p.store.answers(example_ids=[id_])[0].response.labels == ("dot",)


def test_answers_go_out_and_come_back_in(trained, tmp_path: Path) -> None:
    loop.export("answers", trained.folder, str(tmp_path / "answers.csv"))
    before = trained.state()
    told = loop.label(tmp_path / "answers.csv", trained.folder)
    assert (told.new, told.refused, told.superseded) == (0, {}, 0)
    assert trained.state() == before


@settings(max_examples=8, deadline=None)
@given(
    files=st.lists(
        st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["bar", "dot", "?", "not:bar"])), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    )
)
def test_any_file_twice_changes_nothing_and_its_last_word_counts(template, files) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny = type(template)(Path(folder) / "project", template.truth)
        shutil.copytree(template.folder, tiny.folder)
        ids = [e.id for e in tiny.examples("pool")[:2]]
        for said in files:
            table = write(Path(folder) / "a.csv", *[f"{ids[i]},ann,{label}" for i, label in said])
            loop.label(table, tiny.folder)
            before = tiny.state()
            again = loop.label(table, tiny.folder)
            assert (again.new, again.known) == (0, len(said))
            assert tiny.state() == before
            with loop.opened(tiny.folder) as p:
                now = {a.example_id: a.response for a in p.store.answers(example_ids=ids)}
            for i, label in dict(said).items():
                assert now[ids[i]] == parse_label(label)


def test_an_answerer_in_python_may_stop_and_go_on(tiny) -> None:
    loop.query(tiny.folder, n=5)
    left = [2]

    def tired(question, example, who):
        left[0] -= 1
        return None if left[0] < 0 else tiny.answer(question, example, who)

    told = loop.label(tired, tiny.folder)
    assert (told.new, told.open) == (2, 3)
    assert loop.label(tiny.answer, tiny.folder).new == 3


def test_an_answerer_that_says_nonsense_spoils_nothing(tiny) -> None:
    loop.query(tiny.folder, n=2)
    before = tiny.state()
    with pytest.raises(AnswerError, match=r"unknown label 'zebra'"):
        loop.label(lambda *_: (Response("class", ("zebra",)), 1.0), tiny.folder)
    assert tiny.state() == before


def test_an_answerer_that_fails_keeps_what_was_said_before(tiny) -> None:
    loop.query(tiny.folder, n=4)
    said = []

    def breaks(question, example, who):
        if len(said) == 2:
            raise RuntimeError("the connection is gone")
        said.append(1)
        return tiny.answer(question, example, who)

    with pytest.raises(RuntimeError):
        loop.label(breaks, tiny.folder)
    assert loop.label(tiny.answer, tiny.folder).new == 2


# --- aggregate


@pytest.mark.parametrize("method", ["dawid_skene", "one_coin", "majority_vote", "model"])
def test_every_method(trained, method: str) -> None:
    told = loop.aggregate(trained.folder, method)
    assert (told.n, told.n_answers, told.method) == (21, 21, method)
    with loop.opened(trained.folder) as p:
        beliefs = unpack_beliefs(p.store.blobs.get(told.beliefs))
    right = sum(p.space.names[b.proba.argmax()] == trained.truth[b.example_id] for b in beliefs)
    assert right >= 20


def test_a_bad_method(trained) -> None:
    with pytest.raises(UsageError, match=r"unknown method 'guess'; expected dawid_skene"):
        loop.aggregate(trained.folder, "guess")


def test_nothing_to_aggregate(tiny) -> None:
    with pytest.raises(NotEnoughData, match=r"no answers yet(.|\n)*trilobe query"):
        loop.aggregate(tiny.folder)


def test_a_careless_person_is_found_out(tiny, tmp_path: Path) -> None:
    rows = []
    for i, e in enumerate(tiny.examples("pool")):
        rows += [f"{e.id},{who},{tiny.truth[e.id]}" for who in ("ann", "bob")]
        rows.append(f"{e.id},careless,{('bar', 'cross', 'dot')[i * 7 % 5 % 3]}")
    loop.label(write(tmp_path / "a.csv", *rows), tiny.folder)
    quality = {a["name"]: a["quality"] for a in loop.aggregate(tiny.folder).annotators}
    assert quality["careless"] < 0.6 < 0.9 < min(quality["ann"], quality["bob"])


@given(
    st.lists(
        st.tuples(st.text(max_size=8), st.lists(st.floats(0.0625, 1), min_size=3, max_size=3), st.integers(0, 9)),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=30, deadline=None)
def test_beliefs_survive_the_way_to_bytes(made: list[tuple[str, list[float], int]]) -> None:
    beliefs = [Belief(name, np.array(row), np.full(3, 1 / 3), n) for name, row, n in made]
    back = unpack_beliefs(pack_beliefs(beliefs))
    assert [(b.example_id, b.n_answers) for b in back] == [(b.example_id, b.n_answers) for b in beliefs]
    assert all((a.likelihood == b.likelihood).all() for a, b in zip(back, beliefs, strict=True))
    assert pack_beliefs(back) == pack_beliefs(beliefs)
