"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm


class Progress:
    """Show what is done, rate and remaining time: a bar on a terminal, a line every ten seconds in a log.

    By default bytes that are read: where `kept` is set to the number of rows that were kept so far, the lines show it.
    """

    EVERY = 10.0  # seconds between two lines in a log

    def __init__(self, name: str, total: int, unit: str = "B") -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.kept: int | None = None
        self.bar = tqdm(total=total, desc=name, unit=unit, unit_scale=True, disable=None)
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def update(self, n: int) -> None:
        """Count `n` more units as done; a negative `n` takes units back."""
        self.done += n
        self.bar.update(n)
        now = time.monotonic()
        if self.bar.disable and self.done > 0 and now - self.last_line >= self.EVERY:
            self.last_line = now
            rate = self.done / (now - self.started)
            left = tqdm.format_interval((self.total - self.done) / rate)
            total, per_second, kept = f"{self.total:,} {self.unit}", f"{rate:,.1f} {self.unit}/s", ""
            if self.unit == "B":
                total, per_second = f"{self.total / 1e6:,.0f} MB", f"{rate / 1e6:.1f} MB/s"
                kept = f", rows kept: {self.kept:,}" if self.kept is not None else ""
            line = f"{self.name}: {self.done / self.total:.0%} of {total}, {per_second}, {left} left{kept}"
            print(line, file=sys.stderr, flush=True)
