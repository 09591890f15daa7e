"""Preference pairs for DPO: read, tokenized, split and batched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic_write, short_hash
from data_pipeline.datasets import Batch
from data_pipeline.readers import Record
from data_pipeline.records import PREFERENCE_COLUMNS, check_columns, parse_preference
from data_pipeline.sequences import content_hash, sequence_batch, split_samples
from data_pipeline.tokenize_chats import collect_rows, encode_preference
from model.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a prompt (with the header of the answer) and of two answers to it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def content_hash(self) -> int:
        """Return a 64-bit hash of the content: duplicates have the same."""
        return content_hash([self.prompt, self.chosen, self.rejected])


def read_pairs(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerFast, max_tokens: int, max_dropped: float
) -> list[EncodedPair]:
    """Return all usable pairs of the files; count and list the other rows. Raises UserError as `collect_rows`."""
    for path in paths:
        check_columns(path, PREFERENCE_COLUMNS)

    def make(record: Record) -> EncodedPair:
        return EncodedPair(*encode_preference(tokenizer, *parse_preference(record.data), max_tokens))

    invalid = "unreadable or not a valid pair"
    return collect_rows(paths, make, "preference pair", invalid, max_dropped)


class PreferencePairs:
    """Pairs as batches for `trainer.losses.dpo_loss`, which needs `add_ref_logps` to be called first.

    All answers of a batch stand one after another in a single row, each after a copy of its prompt, and do not attend to
    each other: no padding at all.
    """

    def __init__(self, pairs: list[EncodedPair], name: str) -> None:
        self.pairs = pairs
        self.fingerprint = short_hash([name, *(pair.content_hash() for pair in pairs)])
        self.ref_logps: np.ndarray | None = None  # (pairs, 2): of chosen and rejected under the reference model

    def __len__(self) -> int:
        return len(self.pairs)

    def documents(self, indices: Sequence[int]) -> list[int]:
        return sorted(indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return a batch in which sequences 2i and 2i + 1 are the chosen and the rejected answer of pair i of the batch.

        The inputs are those of `sequence_batch`, and ref_logps: (pairs, 2) float32.
        """
        pairs = [self.pairs[i] for i in indices]
        batch = sequence_batch([
            (pair.prompt + answer, [False] * len(pair.prompt) + [True] * len(answer))
            for pair in pairs
            for answer in (pair.chosen, pair.rejected)
        ])  # fmt: skip
        if self.ref_logps is not None:
            batch.inputs["ref_logps"] = torch.from_numpy(self.ref_logps[list(indices)])
        return dataclasses.replace(batch, n_targets=len(pairs))

    def add_ref_logps(
        self,
        cache_dir: Path,
        origin: Sequence[Any],
        compute: Callable[[], np.ndarray],
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """Set `ref_logps`, the log-probabilities of all answers under the reference model.

        Args:
            origin: what they depend on beside the pairs: what identifies the model, the data type.
            compute: returns them, (pairs, 2) float32; not called if they are in `cache_dir`.
            agree: returns whether they are there for all processes, where these compute together.
        """
        path = cache_dir / f"ref_logps-{short_hash([self.fingerprint, *origin])}.npy"
        self.ref_logps = _load_ref_logps(path, len(self))
        if not agree(self.ref_logps is not None):
            self.ref_logps = compute()
            if not np.isfinite(self.ref_logps).all():
                raise UserError(
                    "the starting model gives log-probabilities that are not finite: its weights are broken"
                )
            with atomic_write(path, "wb") as file:
                np.save(file, self.ref_logps)


def _load_ref_logps(path: Path, n_pairs: int) -> np.ndarray | None:
    """Return (pairs, 2) float32 from the cache; None if it is not there or damaged."""
    try:
        logps = np.load(path, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    valid = logps.shape == (n_pairs, 2) and logps.dtype == np.float32 and np.isfinite(logps).all()
    return logps if valid else None


def train_and_val_pairs(
    pairs: list[EncodedPair], tokenizer: PreTrainedTokenizerFast, val_fraction: float, val_tokens: int
) -> tuple[PreferencePairs, PreferencePairs | None]:
    """Split pairs by content: see `split_samples`."""
    n_tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    train, val = split_samples(pairs, "pairs", n_tokens, val_fraction, val_tokens)
    name = tokenizer_hash(tokenizer)
    return PreferencePairs(train, name), PreferencePairs(val, name) if val else None
