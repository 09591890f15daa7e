"""An exact set that lives on the disk: finding duplicates among 80 million documents in a few megabytes of memory."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from array import array
from pathlib import Path
from typing import Self

KEY_BYTES = 16
PAGE_BYTES = 4096
SLOTS = PAGE_BYTES // KEY_BYTES - 1  # the first slot of a page holds its header


def content_key(text: str) -> bytes:
    """128 bits that stand for `text`: two of 10^9 different texts share them with a chance of 10^-21."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=KEY_BYTES).digest()


class DiskSet:
    """A set of 16-byte uniformly distributed keys in a temporary file, by extendible hashing.

    The low bits of a key choose an entry of the directory (in memory, 4 bytes for some 180 keys), which names a page
    of the file. A full page is split in two by one more bit, so every look-up reads exactly one page.

    The file is made in `folder`, because the system's own temporary folder is often kept in memory.
    """

    def __init__(self, folder: Path):
        # closed by __exit__
        self.file = tempfile.TemporaryFile(prefix=".seen.", suffix=".tmp", dir=folder, buffering=0)  # noqa: SIM115
        self.bits = 0  # how many bits of a key the directory looks at
        self.directory = array("I", [0])
        self.n_pages = 0
        self.page = bytearray(PAGE_BYTES)
        self._append_page([], 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        self.file.close()

    def add(self, key: bytes) -> bool:
        """Add `key`; True if it is new, False if it was there."""
        page = self.page
        hashed = int.from_bytes(key[:8], "little")
        while True:
            number = self.directory[hashed & ((1 << self.bits) - 1)]
            self.file.seek(number * PAGE_BYTES)
            self.file.readinto(page)
            end = KEY_BYTES * (1 + int.from_bytes(page[:4], "little"))
            at = page.find(key, KEY_BYTES, end)
            while at > 0 and at % KEY_BYTES:  # matched across two keys
                at = page.find(key, at + 1, end)
            if at > 0:
                return False
            if end < PAGE_BYTES:
                page[end : end + KEY_BYTES] = key
                page[:4] = (end // KEY_BYTES).to_bytes(4, "little")
                self._write(number, page)
                return True
            self._split(number, hashed)

    def _split(self, number: int, hashed: int) -> None:
        """Move the keys of the full page `number` whose next bit is 1 to a new page."""
        bits = int.from_bytes(self.page[4:8], "little")  # how many bits the keys of this page share
        keys = [bytes(self.page[i : i + KEY_BYTES]) for i in range(KEY_BYTES, PAGE_BYTES, KEY_BYTES)]
        if bits == self.bits:
            self.directory.extend(self.directory)
            self.bits += 1
        halves: tuple[list[bytes], list[bytes]] = ([], [])
        for key in keys:
            halves[int.from_bytes(key[:8], "little") >> bits & 1].append(key)
        first = hashed & ((1 << bits) - 1) | 1 << bits
        for entry in range(first, len(self.directory), 1 << (bits + 1)):
            self.directory[entry] = self.n_pages
        self._write(number, self._page(halves[0], bits + 1))
        self._append_page(halves[1], bits + 1)

    @staticmethod
    def _page(keys: list[bytes], bits: int) -> bytes:
        header = len(keys).to_bytes(4, "little") + bits.to_bytes(4, "little") + bytes(KEY_BYTES - 8)
        return (header + b"".join(keys)).ljust(PAGE_BYTES, b"\0")

    def _append_page(self, keys: list[bytes], bits: int) -> None:
        self._write(self.n_pages, self._page(keys, bits))
        self.n_pages += 1

    def _write(self, number: int, page: bytes | bytearray) -> None:
        self.file.seek(number * PAGE_BYTES)
        if self.file.write(page) != PAGE_BYTES:  # the disk took only a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
