"""Preference pairs for DPO: reading, batching, and what the reference model thinks of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.files import atomic_write
from data_pipeline.datasets import Batch
from data_pipeline.readers import BadLine
from data_pipeline.records import iter_preferences
from data_pipeline.tokenize import LISTED, Unusable, encode_preference, split_by_key
from model.model import Transformer
from model.tokenizer import tokenizer_hash
from trainer.losses import sequence_logps


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a prompt (with the header of the answer) and of two answers to it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def key(self) -> int:
        """64-bit hash of the content: duplicates have the same."""
        content = json.dumps([self.prompt, self.chosen, self.rejected]).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def read_pairs(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerFast, max_tokens: int, max_dropped: float
) -> list[EncodedPair]:
    """All usable pairs of the files; the others are counted and listed.

    Preference data is small (people wrote it): it is kept in memory.
    Raises UserError if a file has none, or a larger share of the sound pairs than `max_dropped` leaves nothing to learn
    in `max_tokens`.
    """
    pairs: list[EncodedPair] = []
    bad: list[str] = []
    dropped: Counter[str] = Counter()
    for path in paths:
        before = len(pairs)

        def note(line: BadLine, path: Path = path) -> None:
            bad.append(f"{path}, line {line.line}: {line.reason}")

        for preference in iter_preferences(path, note):
            try:
                pairs.append(EncodedPair(*encode_preference(tokenizer, preference, max_tokens)))
            except Unusable as error:
                dropped[str(error)] += 1
        if len(pairs) == before:
            first = f" ({bad[0]})" if bad else f" ({next(iter(dropped))})" if dropped else ""
            raise UserError(f"{path}: no usable preference pair in it{first}")
    print(f"{len(pairs):,} preference pairs, {len(bad):,} unusable rows")
    for text in bad[:LISTED]:
        print(f"  {text}")
    if len(bad) > LISTED:
        print(f"  and {len(bad) - LISTED:,} more")
    for reason, count in dropped.items():
        print(f"  dropped: {count:,} pairs: {reason}")
    n_dropped = sum(dropped.values())
    n_sound = len(pairs) + n_dropped
    if n_dropped > max_dropped * n_sound:
        raise UserError(
            f"{n_dropped:,} of {n_sound:,} pairs do not fit into --max_seq_len {max_tokens}: allow more tokens there, "
            "shorten the data (data_process.py dpo --max_chars), or allow this loss with --max_dropped"
        )
    return pairs


class PreferencePairs:
    """Pairs as batches for `trainer.losses.dpo_loss`; `add_reference` has to be called first.

    All answers of a batch stand one after another in a single row, each behind a copy of its prompt, and do not see each
    other: no padding at all.
    """

    def __init__(self, pairs: list[EncodedPair], name: str) -> None:
        self.pairs = pairs
        self.fingerprint = hashlib.sha256(json.dumps([name, *(pair.key() for pair in pairs)]).encode()).hexdigest()[:16]
        self.reference: np.ndarray | None = None  # (pairs, 2): log-probability of chosen and rejected

    def __len__(self) -> int:
        return len(self.pairs)

    def documents(self, indices: Sequence[int]) -> list[int]:
        return sorted(indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Sequences 2i and 2i + 1 are the chosen and the rejected answer of pair i of the batch.

        input_ids, position_ids: (1, tokens); cu_seqlens: (sequences + 1,).
        predicts: (answer tokens,) positions whose next token belongs to an answer; targets: those next tokens;
        sequence: (answer tokens,) whose they are; reference: (pairs, 2) float32.
        """
        ids, positions, boundaries = [], [], [0]
        predicts, targets, sequence = [], [], []
        for i in indices:
            pair = self.pairs[i]
            for answer in (pair.chosen, pair.rejected):
                first = len(ids) + len(pair.prompt)
                predicts += range(first - 1, first - 1 + len(answer))
                targets += answer
                sequence += [len(boundaries) - 1] * len(answer)
                # The last token of an answer predicts nothing, but keeps the lengths simple.
                ids += pair.prompt + answer
                positions += range(len(pair.prompt) + len(answer))
                boundaries.append(len(ids))
        inputs = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32),
            "predicts": torch.tensor(predicts),
            "targets": torch.tensor(targets),
            "sequence": torch.tensor(sequence),
        }
        if self.reference is not None:
            inputs["reference"] = torch.from_numpy(self.reference[list(indices)])
        lengths = np.diff(boundaries)
        return Batch(inputs, len(indices), len(ids), int((lengths**2).sum()))

    @torch.no_grad()
    def add_reference(
        self,
        model: Transformer,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        cache_dir: Path,
        origin: str,
    ) -> None:
        """Log-probabilities of all answers under the model as it is now, computed once and kept in `cache_dir`.

        origin: fingerprint of the model's weights.
        """
        key = hashlib.sha256(json.dumps([self.fingerprint, origin, str(dtype)]).encode()).hexdigest()[:16]
        path = cache_dir / f"reference-{key}.npy"
        self.reference = _read_reference(path, len(self))
        if self.reference is not None:
            return
        was_training = model.training
        model.to(device).eval()
        sums = []
        for begin in tqdm(range(0, len(self), batch_size), desc="reference model", disable=None, leave=False):
            batch = self.batch(range(begin, min(begin + batch_size, len(self)))).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                log_probs, _ = sequence_logps(model, batch.inputs)
            sums.append(log_probs.view(-1, 2).cpu().numpy())
        model.train(was_training)
        reference = np.concatenate(sums).astype(np.float32)
        if not np.isfinite(reference).all():
            raise UserError("the starting model gives log-probabilities that are not finite: its weights are broken")
        with atomic_write(path, "wb") as file:
            np.save(file, reference)
        self.reference = reference


def _read_reference(path: Path, n_pairs: int) -> np.ndarray | None:
    """(pairs, 2) float32 from the cache; None if it is not there or damaged."""
    try:
        reference = np.load(path, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    sound = reference.shape == (n_pairs, 2) and reference.dtype == np.float32 and np.isfinite(reference).all()
    return reference if sound else None


def train_and_val_pairs(
    pairs: list[EncodedPair], tokenizer: PreTrainedTokenizerFast, val_fraction: float, val_tokens: int
) -> tuple[PreferencePairs, PreferencePairs | None]:
    """Split by content, so that duplicates stay on one side; about `val_tokens` tokens at most are held out."""
    n_tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    val_fraction = min(val_fraction, val_tokens / max(n_tokens, 1))
    keys = np.array([pair.key() for pair in pairs], np.uint64)
    train_ids, val_ids = split_by_key(keys, val_fraction)
    name = tokenizer_hash(tokenizer)
    train = PreferencePairs([pairs[i] for i in train_ids], name)
    val = PreferencePairs([pairs[i] for i in val_ids], name) if len(val_ids) else None
    print(f"training on {len(train):,} pairs; held out for validation: {len(val) if val else 0:,}")
    return train, val
