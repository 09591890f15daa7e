"""Words of printed lines."""

from __future__ import annotations


def counted(n: int, noun: str) -> str:
    """Return a number with its noun: "1 row", "5,300 rows"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"
