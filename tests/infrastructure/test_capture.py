"""Captures: nothing lost that was written, nothing raised for what was damaged, no request harmed by a full disk."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trilobe.errors import UsageError
from trilobe.infrastructure.capture import SUFFIX, CaptureLog, read_captures, record

PROBA = np.array([[0.25, 0.75]], np.float32)


def write(folder: Path, n: int, endpoint: str = "digits", bundle: str = "b1", **options) -> CaptureLog:
    """n captures whose input is their number."""
    log = CaptureLog(folder, endpoint, rate=1.0, **options)
    for i in range(n):
        assert log.append(bundle, np.full((1, 2, 2, 1), i, np.uint8), PROBA) == 1
    log.close()
    return log


def numbers(folder: Path, **filters) -> list[int]:
    return [int(capture.input.flat[0]) for capture in read_captures(folder, **filters)]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*{SUFFIX}"))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip_of_any_numbers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("any")
    n = data.draw(st.integers(0, 4))
    dtype = data.draw(st.sampled_from(["?", "u1", "<i2", ">i4", "<u8", "<f2", "<f4", ">f8"]))
    shape = (n, *data.draw(st.lists(st.integers(0, 3), max_size=3)))
    inputs = data.draw(hnp.arrays(dtype, shape))
    proba = data.draw(hnp.arrays(np.float32, (n, 3)))
    log = CaptureLog(folder, "e", rate=1.0)
    assert log.append("bundle-é", inputs, proba) == n
    log.close()
    found = read_captures(folder)
    assert len({c.id for c in found}) == n
    for i, capture in enumerate(found):
        assert (capture.endpoint, capture.bundle_id) == ("e", "bundle-é")
        assert capture.input.dtype == inputs.dtype and capture.input.tobytes() == inputs[i, ...].tobytes()
        assert capture.input.shape == inputs[i].shape
        assert capture.proba.tobytes() == proba[i].tobytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_only_some_captures_have(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The name that was called, and beside a shadow's reply what was answered: there and back, in any mixture."""
    folder = tmp_path_factory.mktemp("some")
    log, kept = CaptureLog(folder, "e", rate=1.0), []
    for _ in range(data.draw(st.integers(1, 4))):
        model, live = (data.draw(st.text(max_size=40)) for _ in range(2))
        beside = data.draw(st.none() | hnp.arrays(np.float32, (1, data.draw(st.integers(1, 5)))))
        item = data.draw(st.binary(max_size=30))
        assert log.append("b1", np.array([item, None], object)[:1], PROBA, model, live, beside) == 1
        kept.append((item, model, live, None if beside is None else beside[0].tobytes()))
    log.close()
    found = [(c.input.tobytes(), c.model, c.live, c.live_proba) for c in read_captures(folder)]
    assert sorted(map(str, kept)) == sorted(str((*f[:3], None if f[3] is None else f[3].tobytes())) for f in found)
    for name in {k[1] for k in kept}:
        assert len(read_captures(folder, "e", model=name)) == sum(k[1] == name for k in kept)


def test_captures_of_before_can_be_read_and_new_ones_without_more_are_the_same_bytes(tmp_path: Path) -> None:
    """A segment as it was written before there was anything optional, byte for byte."""
    import zlib

    import msgspec

    fields = {"id": "00ff", "at": 1.5, "bundle_id": "b1", "dtype": "|u1", "shape": [2], "input": b"hi"}
    body = msgspec.msgpack.encode({**fields, "proba": PROBA.tobytes()})
    old = len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body
    assert record("00ff", 1.5, "b1", np.array([b"hi"], object), PROBA, 0) == old
    more = record("00fe", 2.5, "b1", np.array([b"ho"], object), PROBA, 0, "inspect", "b0", PROBA[:, ::-1])
    path = tmp_path / "e" / f"1{SUFFIX}"
    path.parent.mkdir()
    path.write_bytes(old + more[:20] + more + old)
    first, last, second = read_captures(tmp_path)
    assert [(c.model, c.live, c.live_proba) for c in (first, last)] == [("", "", None)] * 2
    assert (second.model, second.live, second.agrees) == ("inspect", "b0", False)
    assert second.live_proba is not None and second.live_proba.tolist() == [0.75, 0.25]


def test_what_does_not_fit_beside_is_refused(tmp_path: Path) -> None:
    log = CaptureLog(tmp_path, "e", rate=1.0)
    for beside in (np.ones(2), np.ones((2, 2)), np.ones((1, 2, 2))):
        with pytest.raises(UsageError, match="captures of inputs"):
            log.append("b1", np.zeros((1, 2)), PROBA, "", "b0", beside)
    assert not (tmp_path / "e").exists()


def test_a_segment_cut_at_every_byte_of_its_last_record(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (path,) = segments(tmp_path)
    start = path.stat().st_size
    path.unlink()
    write(tmp_path, 3)
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    assert len(whole) * 2 == start * 3
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        assert numbers(tmp_path) == [0, 1]
    path.write_bytes(whole)
    assert numbers(tmp_path) == [0, 1, 2]


def test_a_flipped_byte_costs_one_record_wherever_it_is(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    size = len(whole) // 3
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        assert numbers(tmp_path) == [n for n in range(3) if n != i // size], f"byte {i}"


def test_bytes_that_look_like_records_inside_one_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, 1, endpoint="a")
    record = np.frombuffer(segments(tmp_path)[0].read_bytes(), np.uint8)
    log = CaptureLog(tmp_path, "b", rate=1.0)
    log.append("b1", np.stack([record, record]), np.repeat(PROBA, 2, axis=0))
    log.close()
    assert [c.input.tolist() for c in read_captures(tmp_path, endpoint="b")] == [record.tolist()] * 2


def test_a_right_checksum_over_nonsense_is_skipped(tmp_path: Path) -> None:
    import zlib

    write(tmp_path, 1)
    (path,) = segments(tmp_path)
    body = path.read_bytes()[8:].replace(b"\xa3|u1", b"\xa3|zz")
    with path.open("ab") as file:
        file.write(len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body)
    assert numbers(tmp_path) == [0]


def test_filters(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write(tmp_path, 2, bundle="b2")
    write(tmp_path, 1, endpoint="other")
    times = [capture.at for capture in read_captures(tmp_path)]
    assert times == sorted(times) and len(times) == 6
    assert numbers(tmp_path, endpoint="digits") == [0, 1, 2, 0, 1]
    assert numbers(tmp_path, bundle_id="b2") == [0, 1]
    assert numbers(tmp_path, endpoint="digits", last=4) == [1, 2, 0, 1]
    assert numbers(tmp_path, since=times[2]) == [2, 0, 1, 0]
    assert numbers(tmp_path, last=0) == numbers(tmp_path / "absent") == []


def test_sampling_is_by_item_repeatable_and_of_the_right_rate(tmp_path: Path) -> None:
    images, proba = np.arange(4000, dtype="<u4"), np.repeat(PROBA, 4000, axis=0)
    kept = []
    for seed in (1, 1, 2):
        log = CaptureLog(tmp_path / str(len(kept)), "e", rate=0.25, seed=seed)
        n = log.append("b1", images, proba)
        log.close()
        kept.append([int(c.input) for c in read_captures(tmp_path / str(len(kept)))])
        assert len(kept[-1]) == n and 850 < n < 1150  # 5 standard deviations
    assert kept[0] == kept[1] != kept[2]
    assert CaptureLog(tmp_path / "none", "e", rate=0.0).append("b1", images, proba) == 0
    assert not (tmp_path / "none").exists()


def test_segments_rotate_in_order(tmp_path: Path) -> None:
    write(tmp_path, 10, segment_bytes=400)
    assert len(segments(tmp_path)) > 3 and all(path.stat().st_size <= 400 for path in segments(tmp_path))
    assert numbers(tmp_path) == list(range(10))
    in_file_order = [n for path in segments(tmp_path) for n in _numbers_of(path, tmp_path)]
    assert in_file_order == list(range(10))


def _numbers_of(path: Path, folder: Path) -> list[int]:
    alone = folder / "alone" / "digits"
    alone.mkdir(parents=True, exist_ok=True)
    (alone / path.name).write_bytes(path.read_bytes())
    found = numbers(folder / "alone")
    (alone / path.name).unlink()
    return found


def test_reading_while_writing(tmp_path: Path) -> None:
    writer = threading.Thread(target=write, args=(tmp_path, 200))
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(numbers(tmp_path))
    writer.join()
    assert all(found == list(range(len(found))) for found in seen)
    assert numbers(tmp_path) == list(range(200))


def child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    header = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom trilobe.infrastructure.capture import CaptureLog\n"
    )
    command = [sys.executable, "-W", "error", "-c", header + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_two_processes_write_two_segments(tmp_path: Path) -> None:
    write(tmp_path, 2)
    script = "log = CaptureLog(Path(sys.argv[1]), 'digits', 1.0)\n"
    script += "log.append('b1', np.full((1, 1), 9, np.uint8), [[1.0]])\nlog.close()"
    assert child(script, tmp_path).returncode == 0
    assert len(segments(tmp_path)) == 2
    assert numbers(tmp_path) == [0, 1, 9]


def test_a_killed_process_loses_nothing_it_wrote(tmp_path: Path) -> None:
    script = "import os, signal\nlog = CaptureLog(Path(sys.argv[1]), 'digits', 1.0)\n"
    script += "for i in range(5): log.append('b1', np.full((1, 1), i, np.uint8), [[1.0]])\n"
    script += "os.kill(os.getpid(), signal.SIGKILL)"
    assert child(script, tmp_path).returncode == -9
    assert numbers(tmp_path) == [0, 1, 2, 3, 4]


def test_a_full_disk_drops_records_and_harms_nobody(tmp_path: Path) -> None:
    """The file size limit makes the kernel write a part of a record and then refuse, as a full disk does."""
    script = """
import json, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
log = CaptureLog(Path(sys.argv[1]), 'digits', 1.0)
def send(numbers): return [log.append('b1', np.full((1, 20), i, np.uint8), [[1.0]]) for i in numbers]
written = send(range(12))
dropped, size = log.dropped, next(Path(sys.argv[1]).glob('*/*')).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
written += send(range(12, 14))
log.close()
print(json.dumps([written, dropped, size]))
"""
    done = child(script, tmp_path)
    assert done.returncode == 0, done.stderr
    written, dropped, size = json.loads(done.stdout)
    fit = sum(written[:12])
    assert 0 < fit < 12 and dropped == 12 - fit
    assert size % fit == 0, "a part of a record was left"
    assert written == [1] * fit + [0] * (12 - fit) + [1, 1], "it recovers when there is space again"
    assert numbers(tmp_path) == [*range(fit), 12, 13]
    assert done.stderr.count("captures cannot be written") == 1, done.stderr


def test_a_folder_that_cannot_be_made_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    log = CaptureLog(tmp_path / "file", "digits", rate=1.0)
    with caplog.at_level(logging.WARNING):
        assert log.append("b1", np.zeros((3, 1)), np.repeat(PROBA, 3, axis=0)) == 0
    log.close()
    assert log.dropped == 3 and len(caplog.records) == 1


def test_usage(tmp_path: Path) -> None:
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="from 0 to 1"):
            CaptureLog(tmp_path, "e", rate)
    for name in ("", ".", "..", "a/b"):
        with pytest.raises(UsageError, match="plain name"):
            CaptureLog(tmp_path, name, 1.0)
    log = CaptureLog(tmp_path, "e", 1.0)
    for inputs, proba in (
        (np.zeros((2, 1)), PROBA),
        (np.zeros(()), PROBA),
        (np.array(["a"]), PROBA),
        (np.array([object()]), PROBA),
        (np.zeros((1, 1)), PROBA[0]),
    ):
        with pytest.raises(UsageError, match="captures of inputs"):
            log.append("b1", inputs, proba)
    assert not list(tmp_path.iterdir())
