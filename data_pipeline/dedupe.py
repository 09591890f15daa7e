"""Find duplicates among 80 million documents with a few megabytes of memory."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Self


def content_key(text: str) -> bytes:
    """Return 128 bits that stand for `text`: two of 10^9 different texts share them with a chance of 10^-21."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


class KeySet:
    """An exact set of keys in a temporary SQLite file. It lies in `folder`: the system's own place may be in memory."""

    CACHE_KB = 16_384

    def __init__(self, folder: Path) -> None:
        handle, self.name = tempfile.mkstemp(prefix=".seen.", suffix=".tmp", dir=folder)
        os.close(handle)
        self.database = sqlite3.connect(self.name, isolation_level=None)
        self.cursor = self.database.cursor()
        # It need not survive a crash: no journal, no waiting for the disk, one transaction that never ends.
        for setting in (
            "journal_mode=OFF",
            "synchronous=OFF",
            "locking_mode=EXCLUSIVE",
            f"cache_size=-{self.CACHE_KB}",
        ):
            self._execute(f"PRAGMA {setting}")
        self._execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
        if os.name != "nt":  # an open file without a name vanishes with its process, even a killed one
            os.unlink(self.name)
        self._execute("BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.database.close()
        Path(self.name).unlink(missing_ok=True)

    def add(self, key: bytes) -> bool:
        """Add `key`; return True if it is new, False if it was there."""
        return self._execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1

    def _execute(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        try:
            return self.cursor.execute(statement, values)
        except sqlite3.OperationalError as error:
            Path(self.name).unlink(missing_ok=True)
            # A quota or a limit on the size of files is an error of writing to SQLite.
            full = error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None
