"""The store: everything Trilobe remembers. Records in SQLite (or PostgreSQL), bytes in content-addressed files.

``schema`` names the tables, ``records`` turns nouns into rows and back, ``store`` is the one door to both, ``blobs``
keeps bytes, ``lock`` keeps two runs apart, ``migrations`` brings an older store up to date.
"""

from trilobe.infrastructure.store.blobs import Blobs
from trilobe.infrastructure.store.lock import run_lock
from trilobe.infrastructure.store.store import Store

__all__ = ["Blobs", "Store", "run_lock"]
