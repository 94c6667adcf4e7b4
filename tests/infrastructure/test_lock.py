"""The run lock: one holder, named to whoever comes second, gone with its process however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trilobe.errors import StorageError, StoreBusy
from trilobe.infrastructure.store import run_lock

HOLD = """
import os, sys, time
from pathlib import Path
from trilobe.infrastructure.store.lock import run_lock
with run_lock(Path(sys.argv[1]), "trilobe run --rounds 3"):
    child, (read, write) = 1, os.pipe()
    if len(sys.argv) > 2 and not (child := os.fork()):
        os.write(write, b"runs")  # what a child does right after a fork is done
    elif len(sys.argv) > 2:
        os.read(read, 4)
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def hold(folder: Path, *more: str) -> tuple["subprocess.Popen[str]", int]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_the_second_process_is_told_who_holds_it_and_gets_it_after_a_kill(tmp_path: Path) -> None:
    process, _ = hold(tmp_path)
    with process:
        try:
            asked = time.monotonic()
            with pytest.raises(StoreBusy) as busy, run_lock(tmp_path, "trilobe train"):
                pass
            assert time.monotonic() - asked < 20, "it does not wait for the holder"
            assert f"'trilobe run --rounds 3' is running (process {process.pid}, since 20" in str(busy.value)
        finally:
            process.send_signal(signal.SIGKILL)
    with run_lock(tmp_path, "trilobe train"):
        pass


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    process, child = hold(tmp_path, "and fork")
    try:
        with process:
            process.send_signal(signal.SIGKILL)
        os.kill(child, 0)  # it lives on
        with run_lock(tmp_path, "trilobe train"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_it_is_held_once_within_a_process_too_and_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path, "trilobe run"):
        with pytest.raises(StoreBusy, match=f"process {os.getpid()}"), run_lock(tmp_path, "trilobe run"):
            pass
        raise ZeroDivisionError
    with run_lock(tmp_path, "trilobe run"):
        pass


def test_what_a_killed_holder_left_does_not_name_it(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_bytes(b'{"pid": 1, "what": "' + b"x" * 500)
    with (
        run_lock(tmp_path, "trilobe run"),
        pytest.raises(StoreBusy, match=r"^'trilobe run' is running"),
        run_lock(tmp_path, "trilobe train"),
    ):
        pass


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot open"), run_lock(tmp_path / "nowhere", "trilobe run"):
        pass
