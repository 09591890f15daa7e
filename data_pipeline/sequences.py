"""Samples that are kept in memory, because they are few: preference pairs, prompts, the model's own answers.

They are split by their content, and a batch of them is one row of packed sequences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from data_pipeline.datasets import Batch
from data_pipeline.tokenize import split_by_hash


class _Hashed(Protocol):
    def content_hash(self) -> int: ...


Item = TypeVar("Item", bound=_Hashed)


def split_samples(
    samples: Sequence[Item], noun: str, n_tokens: int, val_fraction: float, val_tokens: int
) -> tuple[list[Item], list[Item]]:
    """Split samples in memory by content, so that duplicates stay on one side: (training, validation).

    noun: what they are; n_tokens: of all of them, of which at most about `val_tokens` are held out.
    """
    hashes = np.array([sample.content_hash() for sample in samples], np.uint64)
    train, val = split_by_hash(hashes, min(val_fraction, val_tokens / max(n_tokens, 1)))
    print(f"training on {len(train):,} {noun}; held out for validation: {len(val):,}")
    return [samples[i] for i in train], [samples[i] for i in val]


def content_hash(content: Any) -> int:
    """Return a 64-bit hash of what JSON can hold: duplicates have the same."""
    return int.from_bytes(hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest(), "little")


def sequence_batch(sequences: Sequence[tuple[list[int], list[bool]]]) -> Batch:
    """Return sequences of tokens as one row, packed: no padding, and they do not attend to each other.

    sequences: token ids, and for each token whether it is a target (never the first).

    input_ids, position_ids: (1, tokens); cu_seqlens: (sequences + 1,). predicts: (targets,) positions whose next token is a
    target; targets: those tokens; sequence: index of their sequence.
    """
    lengths = torch.tensor([len(ids) for ids, _ in sequences])
    ids = torch.tensor([token for tokens, _ in sequences for token in tokens])
    at = torch.tensor([learned for _, mask in sequences for learned in mask]).nonzero().squeeze(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)  # (tokens,)
    inputs = {
        "input_ids": ids[None],
        "position_ids": (torch.arange(len(ids)) - cu_seqlens[sequence])[None],
        "cu_seqlens": cu_seqlens.int(),
        "predicts": at - 1,
        "targets": ids[at],
        "sequence": sequence[at],
    }
    return Batch(inputs, len(at), len(ids), int((lengths**2).sum()))
