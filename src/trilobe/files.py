"""Files that are whole or absent, for every room that writes one."""

import contextlib
import errno
import os
import secrets
from pathlib import Path

from trilobe.errors import DiskFull, StorageError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``path`` so that a reader, or a crash, sees the old file or the new one, never a part.

    Raises :class:`~trilobe.errors.DiskFull`, or :class:`~trilobe.errors.StorageError` saying what was refused.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "file"
    >>> write_atomically(path, b"whole"); path.read_bytes()
    b'whole'
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # two writers must not share one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as e:
        if e.errno in FULL:
            raise DiskFull(f"no space left to write {path}", hint="free some space and run it again") from e
        raise StorageError(f"{path} could not be written: {e.strerror}", expected="a folder one may write to") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable: on POSIX systems the folder is a file of its own.

    >>> sync_folder(Path("."))
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
