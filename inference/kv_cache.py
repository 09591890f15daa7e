"""Keys and values of the sequences that are decoded together."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.kernels.loader import zeros
from model.LMConfig import LMConfig


class KVCache:
    """Keys and values of several sequences, allocated once.

    A row keeps its token at position p in slot p, independent of the other rows. Nothing is padded on the left, so rows
    can join or leave without moving the others.

    By default each call of the model appends to all rows, as with any cache; `select` changes that.
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
        # Zeros: masked slots are still multiplied (by 0), and uninitialised memory may hold NaN.
        self.keys, self.values = (list(kv) for kv in zeros(shape, dtype, device))
        self.max_len = max_len
        self.select(slice(0, rows), 0)

    def select(self, rows: slice, length: int, positions: Tensor | None = None) -> None:
        """Choose the rows of the next call of the model.

        Args:
            rows: the rows it computes.
            length: how many tokens the longest of them has so far.
            positions: (rows,) the position of the one new token of each row, if the rows differ in length.
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
            raise ValueError(f"the KV cache was made for {len(keys)} rows, and the call has {len(k)}")
        if self.positions is None:
            keys[:, :, self.length :] = k
            values[:, :, self.length :] = v
        else:
            slot = self.positions.view(-1, 1, 1, 1).expand_as(k)
            keys.scatter_(2, slot, k)
            values.scatter_(2, slot, v)
        if layer == len(self.keys) - 1:
            self.length = end
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row."""
        for kv in (*self.keys, *self.values):
            kv[target, :, :length] = kv[source, :, :length]
