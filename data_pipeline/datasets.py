"""What the loop trains on: samples by number, batches by sample numbers.

A data set is anything with `len()`, `batch(indices) -> Batch`, `documents(indices)` and a `fingerprint`; the loop knows no
more about it. A batch depends on nothing but the numbers asked for: that is what makes resuming exact.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.packing import Packing, pack
from data_pipeline.tokenize import TokenizedDataset


@dataclass(frozen=True)
class Batch:
    """Tensors for the model, and what the loop has to know about them.

    Attributes:
        inputs: keyword arguments for the loss function.
        n_targets: how many targets the loss sums over.
        n_tokens: tokens that are not padding.
        attention_pairs: sum over documents of their squared length: what attention costs.
        idle: it only keeps a process without samples in step with the others; nothing of it counts.
    """

    inputs: dict[str, Tensor]
    n_targets: int
    n_tokens: int
    attention_pairs: int
    dummy: bool = False

    def to(self, device: torch.device) -> Batch:
        if device.type != "cuda":
            return dataclasses.replace(self, inputs={name: x.to(device) for name, x in self.inputs.items()})
        moved = {name: x.pin_memory().to(device, non_blocking=True) for name, x in self.inputs.items()}
        return dataclasses.replace(self, inputs=moved)


class Dataset(Protocol):
    """What `trainer.trainer.fit` needs of its data."""

    fingerprint: str

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch: ...

    def documents(self, indices: Sequence[int]) -> list[int]:
        """Numbers of the documents in these samples, for error messages."""
        ...


class PackedRows:
    """Rows of packed documents of a tokenized dataset: pretraining and SFT data.

    Args:
        dataset: the tokens; where it has a `loss_mask`, only its tokens are trained on.
        documents: indices of the documents to use.
        seq_len: tokens in a row.
        seed: of the packing.
        n_bytes: bytes of text in these documents (for bits per byte).
    """

    def __init__(self, dataset: TokenizedDataset, documents: np.ndarray, seq_len: int, seed: int) -> None:
        self.dataset = dataset
        self.packing: Packing = pack(documents, dataset.lengths[documents], seq_len, seed)
        self.n_bytes = int(dataset.n_bytes[documents].sum(dtype=np.int64))
        key = json.dumps([dataset.fingerprint, seq_len, seed, hashlib.sha256(documents.tobytes()).hexdigest()])
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.packing)

    @functools.cached_property
    def n_tokens(self) -> int:
        return int(self.packing.length.sum(dtype=np.int64))

    def documents(self, indices: Sequence[int]) -> list[int]:
        bounds = self.packing.bounds
        return sorted({int(d) for r in indices for d in self.packing.document[bounds[r] : bounds[r + 1]]})

    def batch(self, indices: Sequence[int]) -> Batch:
        """Rows as tensors.

        input_ids, labels, position_ids, attention_mask: (rows, seq_len or less); labels are aligned with input_ids (the
        model shifts them), -100 at the first token of each piece, on padding and on what is not to be learned.
        cu_seqlens: (documents + 1,). The padding at the end of a row is a document of its own, so that nobody sees it.
        """
        packing, dataset = self.packing, self.dataset
        # Full rows are the rule. Where little data leaves them half empty, the common empty end is not computed.
        used = [packing.length[packing.bounds[r] : packing.bounds[r + 1]].sum() for r in indices]
        width = min(-(-int(max(used)) // 64) * 64, packing.seq_len)
        shape = (len(indices), width)
        ids = np.zeros(shape, np.int64)
        labels = np.full(shape, -100, np.int64)
        positions = np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.int64)
        boundaries = []
        for row, sample in enumerate(indices):
            at = 0
            for piece in range(packing.bounds[sample], packing.bounds[sample + 1]):
                n = int(packing.length[piece])
                begin = int(dataset.offsets[packing.document[piece]] + packing.start[piece])
                tokens = dataset.tokens[begin : begin + n]
                here = slice(at, at + n)
                ids[row, here] = tokens
                learned = tokens[1:].astype(np.int64)
                if dataset.loss_mask is not None:
                    learned = np.where(dataset.loss_mask[begin + 1 : begin + n], learned, -100)
                labels[row, at + 1 : at + n] = learned
                positions[row, here] = np.arange(n)
                mask[row, here] = 1
                boundaries.append(row * width + at)
                at += n
            if at < width:
                positions[row, at:] = np.arange(width - at)
                boundaries.append(row * width + at)
        boundaries.append(shape[0] * shape[1])
        n_padding = int((mask == 0).sum())
        lengths = np.diff(boundaries)
        inputs = {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors["cu_seqlens"] = torch.tensor(boundaries, dtype=torch.int32)
        return Batch(tensors, int((labels != -100).sum()), ids.size - n_padding, int((lengths**2).sum()))
