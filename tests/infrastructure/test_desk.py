"""The desk: what is put there is there, whole, whatever else is in its folders and whoever else looks."""

import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trilobe.infrastructure.desk import Desk, doubted, parameters

PROBA = np.array([[0.5, 0.5], [0.1, 0.9]], np.float32)
IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip_of_any_numbers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    desk = Desk(tmp_path_factory.mktemp("desk"))
    n = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from(["?", "u1", "<i2", ">i4", "<u8", "<f2", "<f4", ">f8"]))
    inputs = data.draw(hnp.arrays(dtype, (n, *data.draw(st.lists(st.integers(0, 3), max_size=3)))))
    replies = data.draw(
        hnp.arrays(data.draw(st.sampled_from(["<f4", "<f8"])), (n, 3), elements=st.floats(0, 1, width=16))
    )
    rows = sorted(data.draw(st.sets(st.integers(0, n - 1))))
    ids = desk.keep("bundle-é", inputs, replies, rows)
    assert desk.waiting() == ids == sorted(set(ids)) and len(ids) == len(rows)
    for row, id_ in zip(rows, ids, strict=True):
        item = desk.item(id_)
        assert item is not None
        assert (item.id, item.bundle_id, item.endpoint) == (id_, "bundle-é", desk.folder.name)
        assert item.input.dtype == inputs.dtype and item.input.tobytes() == inputs[row, ...].tobytes()
        assert item.input.shape == inputs[row].shape
        np.testing.assert_array_equal(item.proba, replies[row].astype(np.float32))


@given(texts=st.lists(st.binary(max_size=40), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_round_trip_of_texts(tmp_path_factory: pytest.TempPathFactory, texts: list[bytes]) -> None:
    desk = Desk(tmp_path_factory.mktemp("desk"))
    sent = np.empty(len(texts), object)
    sent[:] = texts
    ids = desk.keep("b1", sent, np.full((len(texts), 2), 0.5), range(len(texts)))
    assert [desk.item(id_).input.tobytes() for id_ in ids] == texts  # type: ignore[union-attr]


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(0, 30), sizes=st.lists(st.integers(1, 12), max_size=8), done=st.integers(0, 5))
def test_never_more_than_the_limit_and_the_oldest_stay(
    tmp_path_factory: pytest.TempPathFactory, limit: int, sizes: list[int], done: int
) -> None:
    desk = Desk(tmp_path_factory.mktemp("desk"), limit)
    given = [id_ for n in sizes for id_ in desk.keep("b1", np.zeros((n, 2)), np.full((n, 2), 0.5), range(n))]
    kept = given[:limit]
    assert None not in kept and given[limit:] == [None] * len(given[limit:]) and desk.waiting() == kept
    for id_ in kept[:done]:
        desk.done(str(id_))
    # Another process that looks now sees what room there is.
    again = Desk(desk.folder, limit).keep("b1", np.zeros((9, 2)), np.full((9, 2), 0.5), range(9))
    assert sum(id_ is not None for id_ in again) == min(9, limit - len(kept) + len(kept[:done]))


def test_a_desk_that_is_full_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(tmp_path, 20)
    one = np.zeros((1, 2)), np.full((1, 2), 0.5), [0]
    ids = [desk.keep("b1", *one)[0] for _ in range(25)]
    assert len(caplog.records) == 1 and "20 items wait for people" in caplog.text
    desk.done(str(ids[0]))
    desk._counted_at -= 2.0  # a second later, and one more
    assert desk.keep("b1", *one) != [None] and desk.keep("b1", *one) == [None]
    assert len(caplog.records) == 1, "one that comes and goes is no news"
    for id_ in ids[1:10]:
        desk.done(str(id_))
    desk._counted_at -= 2.0
    assert None not in [desk.keep("b1", *one)[0] for _ in range(9)]
    assert desk.keep("b1", *one) == [None] and len(caplog.records) == 2


@given(id_=st.text(max_size=40) | st.text("0123456789abcdef", min_size=32, max_size=32))
def test_whatever_is_asked_about_is_no_path(tmp_path_factory: pytest.TempPathFactory, id_: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "asked"
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    (folder / "desired.json").write_text("secret")
    assert Desk(folder).look(id_) is None


def test_strangers_and_leftovers_are_passed_over(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert desk.waiting() == [] and desk.item("0" * 32) is None
    ids = desk.keep("b1", IMAGES, PROBA, [0])
    for name in (ids[0] + ".part", ".nfs1", "README", "A" * 32):
        (tmp_path / "waiting" / name).write_bytes(b"x")
    assert desk.waiting() == ids


def test_a_damaged_item_is_none(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    (id_,) = desk.keep("b1", IMAGES, PROBA, [1])
    path = tmp_path / "waiting" / id_
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        assert desk.item(id_) is None
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert desk.item(id_) is None
    path.write_bytes(whole)
    assert desk.item(id_) is not None


def test_a_full_disk_is_said_once_and_costs_the_id_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    original = Path.rename

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with caplog.at_level(logging.WARNING):
        assert desk.keep("b1", IMAGES, PROBA, [0, 1]) == ["", ""]
        assert desk.keep("b1", IMAGES, PROBA, [0]) == [""]
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert list((tmp_path / "waiting").iterdir()) == [], "nothing half-written stays"
    monkeypatch.setattr(Path, "rename", original)
    assert desk.keep("b1", IMAGES, PROBA, [0]) == desk.waiting() != [""]


def test_an_answer_never_looks_like_nothing(tmp_path: Path) -> None:
    """Somebody who fetches while the answer is given sees it waiting, then answered, and never that it is unknown."""
    desk = Desk(tmp_path)
    ids = desk.keep("b1", np.repeat(IMAGES, 40, axis=0), np.repeat(PROBA, 40, axis=0), range(80))
    seen: dict[str, list[bytes | None]] = {id_: [] for id_ in ids}
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            for id_, found in seen.items():
                found.append(desk.look(id_))

    asker = threading.Thread(target=ask)
    asker.start()
    for id_ in ids:
        Desk(tmp_path).give(id_, {"id": id_})
        Desk(tmp_path).done(id_)
    done.set()
    asker.join()
    for id_, found in seen.items():
        answer = json.dumps({"id": id_}, separators=(",", ":")).encode()
        assert set(found) <= {b"", answer}
        assert found == sorted(found, key=len), "an answer does not go away"
        assert desk.look(id_) == answer


def test_what_is_done_twice_is_done(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    (id_,) = desk.keep("b1", IMAGES, PROBA, [0])
    desk.done(id_)
    desk.done(id_)
    assert desk.look(id_) is None, "nobody ever answered it"


TABLES = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.floats(0, 1, width=32))


@given(replies=TABLES, threshold=st.floats(0, 1, width=32))
def test_doubt_and_what_is_said_of_it(replies: np.ndarray, threshold: float) -> None:
    rows = doubted(replies, threshold)
    assert rows == [i for i, row in enumerate(replies) if not any(float(p) >= threshold for p in row)]
    said = parameters(len(replies), rows, [f"id{row}" for row in rows])
    flags = [said["deferred"]] if len(replies) == 1 else json.loads(said["deferred"])
    assert flags == [row in rows for row in range(len(replies))]
    assert all(type(value) in (bool, str) for value in said.values()), "the kinds that the protocol allows"
    ids = said.get("deferred_ids", "," * (len(replies) - 1)).split(",")
    assert ids == [f"id{row}" if row in rows else "" for row in range(len(replies))]
