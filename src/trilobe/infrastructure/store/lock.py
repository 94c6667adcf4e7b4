"""One run at a time: an advisory lock that the kernel lets go of when its holder dies, however it dies.

The store itself needs no such lock, its writers take turns; this one keeps two whole runs of the loop apart.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trilobe.errors import StorageError, StoreBusy

_held: set[int] = set()


def _let_go() -> None:
    """A forked child (a data loader) must not keep its parent's lock alive after the parent was killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def run_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold ``folder/run.lock`` while ``what`` (the command, for the person who meets the lock) runs.

    Raises :class:`~trilobe.errors.StoreBusy` at once when another process, or another part of this one, holds it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, run_lock(Path(folder), "trilobe run"):
    ...     with run_lock(Path(folder), "trilobe train"):
    ...         pass
    Traceback (most recent call last):
    trilobe.errors.StoreBusy: 'trilobe run' is running (process ..., since ...)...
    """
    path = Path(folder) / "run.lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}", expected="a folder you may write to") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(fd)
        os.close(fd)
        raise StoreBusy(f"{holder} in {folder}", hint="wait until it is done, or stop it") from None
    _held.add(fd)
    try:
        line = json.dumps({"pid": os.getpid(), "what": what, "since": time.time()}).encode() + b"\n"
        os.ftruncate(fd, os.pwrite(fd, line, 0))
        yield
    finally:
        if fd in _held:  # not in a child that was forked meanwhile
            _held.discard(fd)
            os.ftruncate(fd, 0)
            os.close(fd)


def _holder(fd: int) -> str:
    """Who holds the lock, in words; it writes its name just after taking it, so look a few times."""
    for _ in range(20):
        try:
            found = json.loads(os.pread(fd, 4096, 0).split(b"\n")[0])
            os.kill(found["pid"], 0)
        except (ValueError, ProcessLookupError):
            time.sleep(0.005)
            continue
        except PermissionError:
            pass  # alive, and somebody else's
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return f"{found['what']!r} is running (process {found['pid']}, since {since})"
    return "another process is running"
