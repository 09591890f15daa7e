"""Put documents of any length into rows of one length, so that almost no computation is spent on padding.

A row holds several documents; attention never crosses from one to the next (see `model.attention.varlen_attention`).
Padding every document to the row length instead would leave three quarters of the work on Chinese web text to padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 1 << 16  # pieces packed together: enough for full rows, and memory stays bounded


@dataclass(frozen=True)
class Packing:
    """Pieces of documents by row.

    Row r holds the pieces bounds[r]:bounds[r + 1]; piece i is `length[i]` tokens of document `document[i]`, from its
    token `start[i]` on.
    """

    seq_len: int
    document: np.ndarray  # (pieces,) int64
    start: np.ndarray  # (pieces,) int64
    length: np.ndarray  # (pieces,) int32
    bounds: np.ndarray  # (rows + 1,) int64

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def fill(self) -> float:
        """Return the share of the rows' tokens that are not padding."""
        return float(self.length.sum(dtype=np.int64)) / max(len(self) * self.seq_len, 1)


def pack(documents: np.ndarray, lengths: np.ndarray, seq_len: int, seed: int) -> Packing:
    """Pack documents into rows, deterministically.

    A document longer than a row is cut into pieces that overlap by one token: the last token of a piece is read again
    as the first of the next, so that every token but a document's first is predicted exactly once.

    Args:
        documents: (n,) indices of the documents.
        lengths: (n,) their lengths in tokens; each at least 2 (a single token predicts nothing).
        seq_len: tokens in a row, at least 2.
        seed: documents are shuffled before packing, so that neighbours in the file do not share rows.
    """
    if seq_len < 2:
        raise ValueError(f"rows of {seq_len} token(s) have nothing to predict: at least 2 are needed")
    if len(lengths) and lengths.min() < 2:
        raise ValueError("a document of fewer than 2 tokens has nothing to predict; leave it out")
    order = np.random.default_rng(seed).permutation(len(documents))
    documents, lengths = np.asarray(documents, np.int64)[order], np.asarray(lengths, np.int64)[order]

    step = seq_len - 1  # tokens predicted by a full piece
    n_pieces = np.maximum((lengths - 1 + step - 1) // step, 1)
    document = np.repeat(documents, n_pieces)
    first = np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    start = (np.arange(len(document)) - first) * step
    length = np.minimum(np.repeat(lengths, n_pieces) - start, seq_len).astype(np.int32)

    row_of, by_row = np.empty(len(document), np.int64), np.empty(len(document), np.int64)
    n_rows = 0
    for begin in range(0, len(document), WINDOW):
        window = slice(begin, begin + WINDOW)
        rows, used = _best_fit(length[window], seq_len)
        row_of[window] = rows + n_rows
        by_row[window] = np.argsort(rows.astype(np.uint16), kind="stable") + begin
        n_rows += used
    bounds = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=n_rows), out=bounds[1:])
    return Packing(seq_len, document[by_row], start[by_row], length[by_row], bounds)


def mix(
    documents: np.ndarray, lengths: np.ndarray, ends: np.ndarray, shares: Sequence[float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return documents in which the tokens of each file have the given share, and the passes over each file.

    The first file is taken whole and once, so that an epoch is one pass over it. Each other file is taken as often as its
    share needs: whole, perhaps several times, and then a random part of its documents. The same for the same seed.

    Args:
        documents: (n,) indices to choose from.
        lengths: tokens of each document.
        ends: (files,) the first index that is not of this file.
        shares: (files,) above 0; their sum does not matter.
    """
    source = np.searchsorted(ends, documents, side="right")
    n_tokens = np.bincount(source, lengths[documents], minlength=len(ends))
    if not n_tokens.all():
        raise ValueError(f"file {int(np.argmin(n_tokens)) + 1} has no documents to train on")
    passes = np.asarray(shares) / shares[0] * n_tokens[0] / n_tokens
    chosen = []
    for i, times in enumerate(passes):
        own = documents[source == i]
        n_rest = math.ceil(len(own) * (times % 1))
        chosen += [np.tile(own, int(times)), np.random.default_rng([seed, i]).permutation(own)[:n_rest]]
    return np.concatenate(chosen), passes


def _best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Return the row of each piece, and how many rows are used: longest piece first, each into the fullest row it fits.

    Open rows are kept by the room they have left, and bit r of `rooms` says that there is a row with room r: the best
    row is found by one bit trick instead of a search. Pieces of one length are placed together: many rows with the same
    room take one each, or a row with much room takes several.
    """
    order = np.argsort((seq_len - lengths).astype(np.min_scalar_type(seq_len)), kind="stable")  # 16 bits: linear time
    row_of: list[int] = []  # in that order
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0
    used = 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = rooms >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else seq_len
            stack = open_rows[room]
            if room < 2 * size or count == 1:  # many rows take one each
                in_row, n = 1, count
                if fitting and n > len(stack):
                    n = len(stack)
            else:  # a row with room for several is the fullest one until it is full
                in_row, n = room // size, 1
                if in_row > count:
                    in_row = count
            if fitting:
                rows = stack[: -n - 1 : -1]
                del stack[-n:]
                if not stack:
                    rooms ^= 1 << room
            else:
                rows = [*range(used, used + n)]
                used += n
            row_of += rows * in_row
            count -= n * in_row
            if left := room - in_row * size:
                open_rows[left] += rows
                rooms |= 1 << left
    placed = np.empty(len(lengths), np.int64)
    placed[order] = row_of
    return placed, used


def derive_seed(*numbers: int) -> int:
    """Return one number from several, such that neighbouring ones have unrelated random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_order(n_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits its samples: a pure function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n_samples)
