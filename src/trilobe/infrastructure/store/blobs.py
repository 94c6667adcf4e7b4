"""Bytes in files named by their own SHA-256: written once, whole or not at all, checked whenever they are read.

What the bytes mean (pictures, weights) is written down elsewhere; here they are only kept.
"""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from trilobe.errors import DiskFull, StorageError, UsageError
from trilobe.files import sync_folder

_DIGEST = re.compile("[0-9a-f]{64}")
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class Blobs:
    """A folder of immutable bytes: ``put`` gives their digest, ``get`` gives them back.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     blobs = Blobs(Path(folder))
    ...     digest = blobs.put(b"a picture")
    ...     digest in blobs, blobs.get(digest), digest[:8]
    (True, b'a picture', '92b2fa58')
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, digest: str) -> Path:
        """Where the bytes of ``digest`` are, or would be. Raises UsageError for what is no SHA-256 in hex.

        >>> Blobs(Path("blobs")).path("ab" + "0" * 62).parts[:2]
        ('blobs', 'ab')
        """
        if not _DIGEST.fullmatch(digest):
            raise UsageError(f"the blob name {digest!r}", expected="a SHA-256 as 64 lowercase hexadecimal digits")
        return self.folder / digest[:2] / digest[2:]

    def __contains__(self, digest: str) -> bool:
        return bool(_DIGEST.fullmatch(digest)) and self.path(digest).is_file()

    def put(self, data: bytes) -> str:
        """Keep ``data`` and return its digest. When this returns, the bytes survive a crash and a power cut.

        The same bytes again cost one look. Raises DiskFull, with nothing half-written under the digest's name.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Blobs(Path(folder)).put(b"") == sha256().hexdigest()
        True
        """
        digest = sha256(data).hexdigest()
        path = self.path(digest)
        if path.is_file():
            return digest
        draft = self.folder / "tmp" / f"{digest}.{secrets.token_hex(4)}"
        with _explained(path):
            try:
                draft.parent.mkdir(parents=True, exist_ok=True)
                _make_folder(path.parent)
                with draft.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(path)
            except BaseException:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of ``digest``. Raises StorageError, naming the file, when they are missing or not what they were.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Blobs(Path(folder)).get("0" * 64)
        Traceback (most recent call last):
        trilobe.errors.StorageError: the blob ...0 is missing...
        """
        path = self.path(digest)
        again = "restore that file from a backup, or delete it and add the original data again"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise StorageError(f"the blob {path} is missing", hint=again) from None
        except OSError as error:
            raise StorageError(f"the blob {path} cannot be read: {error.strerror}", hint=again) from error
        if (found := sha256(data).hexdigest()) != digest:
            raise StorageError(f"the blob {path} is damaged: its bytes hash to {found[:12]}...", hint=again)
        return data


def _make_folder(folder: Path) -> None:
    """A new folder is durable once its parent is synced."""
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """The errors of the operating system as Trilobe's."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"no space left for {path} ({error.strerror})", hint="free some space and run the same command again"
            ) from error
        raise StorageError(f"cannot write {path}: {error.strerror}", expected="a folder you may write to") from error
