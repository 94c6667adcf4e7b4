"""The store: everything Trilobe remembers. Records in SQLite (or PostgreSQL), bytes in content-addressed files.

``schema`` names the tables, ``records`` turns nouns into rows and back, ``store`` is the one door to both, ``blobs``
keeps bytes, ``lock`` keeps two runs apart, ``migrations`` brings an older store up to date. The database is loaded by
who asks for the store: a lock, which ``infer`` takes in a container, needs none.
"""

from typing import TYPE_CHECKING, Any

from trilobe.infrastructure.store.blobs import Blobs
from trilobe.infrastructure.store.lock import run_lock

if TYPE_CHECKING:
    from trilobe.infrastructure.store.store import Store

__all__ = ["Blobs", "Store", "run_lock"]


def __getattr__(name: str) -> Any:
    """Import the store the first time somebody asks for it (PEP 562)."""
    if name == "Store":
        from trilobe.infrastructure.store.store import Store

        return Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
