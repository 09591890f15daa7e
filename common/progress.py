"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm


class Progress:
    """Show bytes read, rate and remaining time: a bar on a terminal, a line every ten seconds in a log.

    Set `kept` to the number of rows that were kept so far; the lines show it.
    """

    EVERY = 10.0  # seconds between two lines in a log

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.kept = name, total, 0, 0
        self.bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=None)
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def update(self, n_bytes: int) -> None:
        """Count `n_bytes` more of the input as read."""
        self.done += n_bytes
        self.bar.update(n_bytes)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line >= self.EVERY:
            self.last_line = now
            rate = self.done / (now - self.started)
            left = tqdm.format_interval((self.total - self.done) / rate)
            print(
                f"{self.name}: {self.done / self.total:.0%} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{left} left, {self.kept:,} rows kept",
                file=sys.stderr,
                flush=True,
            )
