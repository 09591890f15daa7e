"""The tensors of a training state on the disk, written and read by `torch.distributed.checkpoint` (DCP).

Every process writes what it has: its shards of sharded tensors, its part of those that all hold. Any number of processes
reads them back, each the shards that it needs.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_METADATA = "torch.distributed.checkpoint.metadata"
_LAYOUT_CLASSES = {
    (_METADATA, "Metadata"), (_METADATA, "MetadataIndex"), (_METADATA, "StorageMeta"), (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"), (_METADATA, "ChunkStorageMetadata"), (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    ("torch", "Size"), ("torch", "float32"), ("torch", "float64"), ("torch", "bfloat16"), ("torch", "int64"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}  # fmt: skip


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` (whole, or DTensors) into `folder`. Every process has to call it.

    Raises the error of the process that failed, for example OSError, on every process.
    """
    with _without_single_process_warning():
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
        except CheckpointException as error:
            raise _first_failure(error) from error


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read from `folder` into `tensors`, in place. Every process has to call it, for the same names."""
    with _without_single_process_warning():
        try:
            dcp.load(tensors, storage_reader=_Reader(folder))
        except CheckpointException as error:
            raise _first_failure(error) from error


def tensor_layout(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of every tensor in `folder`, by name."""
    entries = _Reader(folder).read_metadata().state_dict_metadata
    return {name: (x.size, x.properties.dtype) for name, x in entries.items() if isinstance(x, TensorStorageMetadata)}


class _LayoutUnpickler(pickle.Unpickler):
    """DCP keeps the layout of its files as a pickle, which could run code: only the classes of a layout are loaded."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _LAYOUT_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _LayoutUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _without_single_process_warning() -> warnings.catch_warnings:
    """Return a context without DCP's warning that there is only one process."""
    return warnings.catch_warnings(action=None if dist.is_initialized() else "ignore", category=UserWarning)


def _first_failure(error: CheckpointException) -> BaseException:
    exception, _trace = next(iter(error.failures.values()))
    return exception
