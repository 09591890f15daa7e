"""The images of a tokenized dataset as tensors: pixels for an encoder that is trained, features of one that is frozen.

    load = Pixels(dataset, 48)                                    # load([0, 1]) -> (2, 3, 48, 48) uint8
    load = Features(cached_features(dataset, encoder, ...))       # load([0, 1]) -> (2, tokens, width) float16

A frozen encoder makes the same features in every epoch: they are computed once, and kept on disk like tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, stoppable
from common.files import cached_folder, explain_write_errors, short_hash, write_json
from common.progress import Progress
from data_pipeline.images import open_image
from data_pipeline.tokenize import TokenizedDataset
from model.pixels import pixel_values

if TYPE_CHECKING:
    from PIL.Image import Image

Encoder = Callable[[list["Image"]], Tensor]  # images -> features (images, tokens, width)
STOPPED = "the features of the images were not finished; no other file was changed. The same command starts them again"


def dataset_image(dataset: TokenizedDataset, number: int) -> Image:
    """Return an image of a dataset, RGB."""
    assert dataset.image_offsets is not None and dataset.image_bytes is not None
    begin, end = dataset.image_offsets[number : number + 2]
    return open_image(dataset.image_bytes[begin:end].tobytes())


class Pixels:
    """Decode images when they are asked for."""

    def __init__(self, dataset: TokenizedDataset, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __call__(self, numbers: list[int]) -> Tensor:
        return pixel_values([dataset_image(self.dataset, number) for number in numbers], self.size)


class Features:
    """Read features from a mapped file. features: (images, tokens, width) float16."""

    def __init__(self, features: np.ndarray) -> None:
        self.features = features

    def __call__(self, numbers: list[int]) -> Tensor:
        return torch.from_numpy(self.features[np.array(numbers, np.int64)])  # indexing copies


def cached_features(
    dataset: TokenizedDataset, encode: Encoder, identity: str, cache_dir: Path, batch_size: int = 32
) -> np.ndarray:
    """Return the features of all images, (images, tokens, width) float16, mapped from the cache; computed first if needed.

    Args:
        encode: the frozen encoder.
        identity: changes with the encoder and with how it prepares images.
    """
    assert dataset.image_offsets is not None
    n_images = len(dataset.image_offsets) - 1
    folder = cache_dir / f"features-{short_hash([dataset.fingerprint, identity])}"

    def build(tmp: Path) -> None:
        shape: list[int] = []
        with (tmp / "features.bin").open("wb") as file, Progress("features", n_images, "images") as progress:
            for begin in range(0, n_images, batch_size):
                numbers = range(begin, min(begin + batch_size, n_images))
                made = encode([dataset_image(dataset, i) for i in numbers]).to("cpu", torch.float16)
                if not made.isfinite().all():
                    raise UserError(f"the features of images {begin} to {numbers[-1]} do not fit into float16")
                shape = [*made.shape[1:]]
                file.write(made.numpy().tobytes())
                progress.update(len(numbers))
        write_json(tmp / "info.json", {"shape": [n_images, *shape], "encoder": identity})

    with explain_write_errors(cache_dir), stoppable(STOPPED):
        features, built = cached_folder(folder, partial(_open, n_images=n_images), build, "computing image features")
    if built:
        print(f"features: {n_images:,} images, {features.nbytes / 1e6:,.1f} MB, kept in {folder}")
    return features


def _open(folder: Path, n_images: int) -> np.ndarray | None:
    """Return the features in `folder`; None if they are not there, or damaged."""
    try:
        shape = tuple(json.loads((folder / "info.json").read_text(encoding="utf-8"))["shape"])
        features = np.memmap(folder / "features.bin", np.float16, mode="r", shape=shape)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    whole = (folder / "features.bin").stat().st_size == features.nbytes
    return features if whole and len(shape) == 3 and shape[0] == n_images else None
