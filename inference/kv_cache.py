"""Keys and values of the sequences that are decoded together."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.kernels.loader import zeros
from model.LMConfig import LMConfig


class KVCache:
    """Keys and values of several sequences, allocated once.

    A row keeps its token at position p in place p, whatever the other rows do. Nothing is padded on the left, so a row
    can join or leave without the others noticing.

    Used by itself it is like any cache: each call of the model appends to all rows. `select` says otherwise.
    """

    def __init__(
        self,
        config: LMConfig,
        rows: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (2, config.n_layers, rows, config.n_kv_heads, max_len, config.head_dim)
        # Zeros: places that a mask hides are still multiplied (by 0), and what lies in fresh memory may be NaN.
        self.keys, self.values = (list(cells) for cells in zeros(shape, dtype, device))
        self.max_len = max_len
        self.select(slice(0, rows), 0)

    def select(self, rows: slice, length: int, positions: Tensor | None = None) -> None:
        """Say what the next call of the model is about.

        Args:
            rows: those it computes.
            length: tokens that the longest of them has so far.
            positions: (rows,) where the one new token of each row goes, if they are not of the same length.
        """
        self.rows, self.length, self.positions = rows, length, positions

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store new k, v (rows, kv_heads, time, head_dim); return all so far, (rows, kv_heads, length, head_dim).

        Raises ValueError if they do not fit: it never grows.
        """
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"the KV cache holds {self.max_len} tokens per row, {end} are needed: make it larger")
        keys, values = self.keys[layer][self.rows, :, :end], self.values[layer][self.rows, :, :end]
        if len(keys) != len(k):
            raise ValueError(f"the KV cache was made for {len(keys)} rows, and {len(k)} came")
        if self.positions is None:
            keys[:, :, self.length :] = k
            values[:, :, self.length :] = v
        else:
            place = self.positions.view(-1, 1, 1, 1).expand_as(k)
            keys.scatter_(2, place, k)
            values.scatter_(2, place, v)
        if layer == len(self.keys) - 1:
            self.length = end
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row."""
        for cells in (*self.keys, *self.values):
            cells[target, :, :length] = cells[source, :, :length]
