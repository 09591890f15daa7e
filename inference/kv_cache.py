"""Keys and values of the sequences that are decoded together, and of prefixes that prompts share."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inference.kernels.loader import zeros
from model.LMConfig import LMConfig

BLOCK = 32  # tokens of a prefix that a `PrefixCache` stores and finds together


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
        self.kv = zeros(shape, dtype, device)
        self.keys, self.values = (list(kv) for kv in self.kv)
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

    def copy(self, target: int, source: KVCache, row: int, length: int) -> None:
        """Overwrite the first `length` tokens of row `target` with those of a row of `source`, which may be this cache."""
        self.kv[:, :, target, :, :length] = source.kv[:, :, row, :, :length]


class PrefixCache:
    """Keys and values of earlier prompts and answers, for prompts that begin like them: system messages, chats so far.

    They are stored in blocks of `BLOCK` tokens. The name of a block stands for all tokens up to its end, so that it is found
    only behind the same beginning. When more than `max_bytes` are stored, what was used longest ago is dropped.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()  # the least recently used first

    def load(self, tokens: Sequence[int], cache: KVCache) -> int:
        """Copy what is stored of the beginning of `tokens` into row 0 of a cache; return how many tokens that are."""
        found: list[bytes] = []
        for name in _names(tokens):
            if name not in self._blocks:
                break
            found.append(name)
        if found:
            self._use(found)
            # (2, layers, kv_heads, tokens, head_dim)
            cache.kv[:, :, 0, :, : len(found) * BLOCK] = torch.cat([self._blocks[name] for name in found], dim=3)
        return len(found) * BLOCK

    def store(self, tokens: Sequence[int], cache: KVCache, row: int = 0) -> None:
        """Keep the whole blocks of `tokens`, which a row of a cache has."""
        names = list(_names(tokens))
        for i, name in enumerate(names):
            if name not in self._blocks:
                block = cache.kv[:, :, row, :, i * BLOCK : (i + 1) * BLOCK].clone()
                self._blocks[name] = block
                self.nbytes += block.nbytes
        self._use(names)
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._blocks.popitem(last=False)[1].nbytes

    def _use(self, names: list[bytes]) -> None:
        """Note that these blocks were used, the first one last: no block stays longer than those before it."""
        for name in reversed(names):
            self._blocks.move_to_end(name)


def _names(tokens: Sequence[int]) -> Iterator[bytes]:
    """Yield the names of the whole blocks at the beginning of `tokens`."""
    digest = hashlib.blake2b(digest_size=16)
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        digest.update(array("q", tokens[end - BLOCK : end]).tobytes())
        yield digest.digest()
