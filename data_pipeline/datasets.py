"""Data sets for the training loop: samples by number, batches by sample numbers.

A data set is anything with `len()`, `batch(indices) -> Batch`, `documents(indices)` and a `fingerprint`; the loop knows no
more about it. A batch depends only on the numbers that are asked for: that makes resuming exact.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import short_hash
from data_pipeline.packing import Packing, pack, sample_order
from data_pipeline.tokenize import TokenizedDataset


@dataclass(frozen=True)
class Batch:
    """Tensors for the model, and their counts.

    Attributes:
        inputs: keyword arguments for the loss function.
        n_targets: how many targets the loss sums over.
        n_tokens: tokens that are not padding.
        attention_pairs: sum over documents of their squared length: the cost of attention.
        dummy: it only keeps a process without samples in step with the others and counts for nothing.
    """

    inputs: dict[str, Tensor]
    n_targets: int
    n_tokens: int
    attention_pairs: int
    dummy: bool = False

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; to a GPU it is copied while other work continues."""
        if device.type != "cuda":
            return dataclasses.replace(self, inputs={name: x.to(device) for name, x in self.inputs.items()})
        moved = {name: x.pin_memory().to(device, non_blocking=True) for name, x in self.inputs.items()}
        return dataclasses.replace(self, inputs=moved)


class Dataset(Protocol):
    """The data that `trainer.trainer.fit` takes."""

    fingerprint: str

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch: ...

    def documents(self, indices: Sequence[int]) -> list[int]:
        """Return the numbers of the documents in these samples, for error messages."""
        ...


class PackedRows:
    """Rows of packed documents of a tokenized dataset: pretraining and SFT data.

    Args:
        dataset: the tokens; where it has a `loss_mask`, only its tokens are trained on.
        documents: indices of the documents to use.
        seq_len: tokens in a row.
        seed: of the packing.

    Attributes:
        n_bytes: bytes of text in these documents (for bits per byte).
    """

    def __init__(self, dataset: TokenizedDataset, documents: np.ndarray, seq_len: int, seed: int) -> None:
        self.dataset = dataset
        self.packing: Packing = pack(documents, dataset.lengths[documents], seq_len, seed)
        self.n_bytes = int(dataset.n_bytes[documents].sum(dtype=np.int64))
        which = hashlib.sha256(documents.tobytes()).hexdigest()
        self.fingerprint = short_hash([dataset.fingerprint, seq_len, seed, which])

    def __len__(self) -> int:
        return len(self.packing)

    @functools.cached_property
    def n_tokens(self) -> int:
        return int(self.packing.length.sum(dtype=np.int64))

    def documents(self, indices: Sequence[int]) -> list[int]:
        """Return the numbers of the documents in these rows, sorted."""
        bounds = self.packing.bounds
        return sorted({int(d) for r in indices for d in self.packing.document[bounds[r] : bounds[r + 1]]})

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return rows as tensors.

        input_ids, labels, position_ids, attention_mask: (rows, seq_len or less); labels are aligned with input_ids (the
        model shifts them), -100 at the first token of each piece, on padding and on what is not to be learned.
        cu_seqlens: (documents + 1,). The padding at the end of a row is a document of its own: no token attends to it.
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
        if ids.max() >= (n_tokens := dataset.info.get("vocab_size", 1 << 16)):
            raise UserError(
                f"{dataset.info['folder']}: tokens.bin is damaged (token {ids.max()} of a vocabulary of {n_tokens:,}); "
                "delete this folder, and the next run makes it again"
            )
        n_padding = int((mask == 0).sum())
        lengths = np.diff(boundaries)
        inputs = {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors["cu_seqlens"] = torch.tensor(boundaries, dtype=torch.int32)
        return Batch(tensors, int((labels != -100).sum()), ids.size - n_padding, int((lengths**2).sum()))


@dataclass(frozen=True)
class Schedule:
    """Assign samples to optimizer steps: a pure function of the seed, whatever was interrupted before.

    Sample g of the run is sample `sample_order(n_samples, seed, g // n_samples)[g % n_samples]` of the data set; step s
    takes the samples from s * per_step on; the last step of the run may have fewer.
    """

    n_samples: int
    per_step: int
    total_samples: int
    seed: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict, compare=False)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.total_samples / self.per_step)

    def samples(self, step: int) -> list[int]:
        """Return the data-set indices of one step, over all micro-batches and processes."""
        first = step * self.per_step
        return [self._sample(g) for g in range(first, min(first + self.per_step, self.total_samples))]

    def _sample(self, g: int) -> int:
        epoch, position = divmod(g, self.n_samples)
        order = self._orders.get(epoch)
        if order is None:  # several threads may come here
            self._orders.pop(epoch - 2, None)
            order = self._orders[epoch] = sample_order(self.n_samples, self.seed, epoch)
        return int(order[position])


@dataclass
class BatchLoader:
    """One process's micro-batches of every step, prepared by threads while earlier steps compute.

    micro_batch: rows that go through the model at once; may be lowered during a run.
    """

    data: Dataset
    schedule: Schedule
    rank: int
    world_size: int
    micro_batch: int
    num_workers: int

    def batches(self, step: int, size: int | None = None) -> list[Batch]:
        """Return this process's samples of a step in micro-batches of `size` (default: the current one)."""
        return list(self.shard(self.data, self.schedule.samples(step), size or self.micro_batch))

    def resumable(self, step: int) -> bool:
        """Return whether a run that is saved after this many steps can continue exactly."""
        return True

    def shard(self, data: Dataset, samples: list[int], micro_batch: int) -> Iterator[Batch]:
        """Yield this process's part of the samples, in as many micro-batches as every other process has.

        Where there are too few samples it repeats one in a dummy batch that does not count, because sharded parameters
        need all processes for every forward pass.
        """
        mine = samples[self.rank :: self.world_size]
        for begin in range(0, len(samples[:: self.world_size]), micro_batch):
            some = mine[begin : begin + micro_batch]
            yield data.batch(some) if some else dataclasses.replace(data.batch(samples[:1]), dummy=True)

    def prefetch(self, first: int) -> Iterator[tuple[list[Batch], BaseException | None]]:
        """Yield the batches of every step from `first` on, and None; or no batches, and why they could not be prepared.

        The error is not raised here: all processes have to learn of it before they stop.
        """

        def prepare(step: int) -> tuple[int, list[Batch]]:
            size = self.micro_batch
            return size, self.batches(step, size)

        waiting: deque[Future] = deque()
        with ThreadPoolExecutor(max(self.num_workers, 1), thread_name_prefix="batches") as pool:
            ahead = iter(range(first, self.schedule.total_steps))
            for step in range(first, self.schedule.total_steps):
                while len(waiting) <= self.num_workers and (n := next(ahead, None)) is not None:
                    waiting.append(pool.submit(prepare, n))
                future = waiting.popleft()
                if (error := future.exception()) is not None:
                    yield [], error
                    continue
                size, batches = future.result()
                yield batches if size == self.micro_batch else self.batches(step), None
