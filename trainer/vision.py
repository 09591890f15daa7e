"""The steps shared by the stages that learn from images: the model, what of it is trained, rows with images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from data_pipeline.datasets import Batch, PackedRows
from data_pipeline.image_features import Encoder, Features, Pixels, cached_features
from model.architecture import VisionConfig
from model.device import resolve_device
from model.LMConfig import LMConfig
from model.model import Transformer, initial_weights
from model.pixels import pixel_values
from model.tokenizer import IMAGE_TOKEN, encode_text
from model.vision import PretrainedEncoder, VisionLanguageModel
from model.weights_file import Checkpoint, build_model
from trainer.distributed import DistEnv, main_process_first
from trainer.finetune import chat_rows
from trainer.options import VisionOptions


def image_ids(tokenizer: PreTrainedTokenizerFast, n: int) -> list[int]:
    """Return the `n` tokens that stand for an image: `<image>` where the tokenizer has it, else `<` and `>`, half each.

    The latter are those of the first published MiniMind-V, whose tokenizer has no token for images.
    """
    if (token := tokenizer.get_added_vocab().get(IMAGE_TOKEN)) is not None:
        return [token] * n
    left, right = (encode_text(tokenizer, text) for text in "<>")
    if len(left) != 1 or len(right) != 1 or n < 2:
        raise UserError(f"the tokenizer has neither {IMAGE_TOKEN} nor < and > as tokens: use another --tokenizer")
    return left * (n // 2) + right * (n - n // 2)


def load_encoder(options: VisionOptions, folder: Path, n_tokens: int | None = None) -> PretrainedEncoder:
    """Open an image model, as `PretrainedEncoder` does. Its folder is written beside the weights, for the next stage."""
    options.vision_encoder = folder.resolve()
    return PretrainedEncoder(options.vision_encoder, resolve_device(options.device), n_tokens)


def new_vision_config(
    own: VisionConfig, encoder: PretrainedEncoder | None, tokenizer: PreTrainedTokenizerFast
) -> VisionConfig:
    """Return `own`, or what fits an encoder outside of the model, with the tokens that stand for an image."""
    if encoder is None:
        return replace(own, image_ids=tuple(image_ids(tokenizer, own.n_patches)))
    ids = tuple(image_ids(tokenizer, encoder.n_tokens))
    return VisionConfig(encoder="pretrained", width=encoder.width, projector=own.projector, image_ids=ids)


def add_vision(model: Transformer, vision: VisionConfig, seed: int) -> VisionLanguageModel:
    """Return a vision-language model of the weights of `model`, with a new projector, and a new encoder if it is our own."""
    fields = model.config.own_fields() | {"vision_config": VisionConfig.complete(vars(vision))}
    config = LMConfig(**fields)
    new = {name: tensor for name, tensor in initial_weights(config, seed) if name.startswith("vision_")}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    seeing = build_model(state | new, config, "the new model").train()
    assert isinstance(seeing, VisionLanguageModel)
    return seeing


def freeze(model: VisionLanguageModel, what: str, encoder: bool) -> list[tuple[str, Tensor]]:
    """Stop the training of a part of the model; return its weights by name.

    Args:
        what: "language": all of the language model, "middle": all of it but its first and last layer, "none": nothing.
        encoder: our own encoder is frozen, too.
    """
    first, last = "layers.0.", f"layers.{model.config.n_layers - 1}."
    for name, parameter in model.named_parameters():
        if name.startswith("vision_encoder."):
            parameter.requires_grad_(not encoder)
        elif not name.startswith("vision_"):
            parameter.requires_grad_(what == "none" or (what == "middle" and name.startswith((first, last))))
    return [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]


def open_encoder(
    options: VisionOptions, model: VisionLanguageModel, origin: Checkpoint | None
) -> PretrainedEncoder | None:
    """Return the encoder outside of a trained model: that of --vision_encoder, or of the run the weights are from; None:
    the model has its own.
    """
    if model.vision.encoder == "vit":
        if options.vision_encoder is not None:
            raise UserError(
                f"this model has an encoder of its own: leave --vision_encoder {options.vision_encoder} out"
            )
        return None
    folder = options.vision_encoder or (origin.vision_encoder if origin is not None else None)
    if folder is None:
        raise UserError(
            "these weights need the image encoder they were trained with: name its folder with --vision_encoder"
        )
    return load_encoder(options, folder, len(model.vision.image_ids))


class ImageRows:
    """Rows of packed dialogues with their images. No dialogue may be longer than a row.

    Args:
        images: returns the images of these numbers as one tensor, in the order of the numbers.
        name: of that tensor among the inputs of the model.
    """

    def __init__(self, rows: PackedRows, images: Callable[[list[int]], Tensor], name: str) -> None:
        if rows.dataset.n_images is None:
            raise ValueError("this dataset has no images")
        if rows.packing.start.any():
            raise ValueError(
                f"a dialogue is longer than the rows of {rows.packing.seq_len} tokens: tokenize with that length"
            )
        self.rows, self.images, self.name = rows, images, name
        self.n_bytes, self.fingerprint, self.documents = rows.n_bytes, rows.fingerprint, rows.documents
        self.n_images = rows.dataset.n_images
        self.first_image = np.cumsum(self.n_images) - self.n_images

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return rows as `PackedRows.batch` does, and the images in the order in which they stand in the rows."""
        packing, batch = self.rows.packing, self.rows.batch(indices)
        numbers: list[int] = []
        for row in indices:
            for document in packing.document[packing.bounds[row] : packing.bounds[row + 1]]:
                first = int(self.first_image[document])
                numbers += range(first, first + int(self.n_images[document]))
        return replace(batch, inputs=batch.inputs | {self.name: self.images(numbers)})


def image_rows(
    options: VisionOptions,
    dist_env: DistEnv,
    tokenizer: PreTrainedTokenizerFast,
    model: VisionLanguageModel,
    encoder: PretrainedEncoder | None,
    frozen: Checkpoint | None = None,
) -> tuple[ImageRows, ImageRows | None]:
    """Return training and validation rows of dialogues about images.

    Args:
        encoder: what makes the features of the images, outside of the model; None: the model does.
        frozen: the weights it starts from, if its own encoder is not trained: features are then computed once.

    Raises UserError if the data has no images.
    """
    vision = model.vision
    encode: Encoder | None = encoder
    identity = encoder.fingerprint if encoder is not None else ""
    if frozen is not None:
        encode, identity = _own_encoder(model, options), frozen.fingerprint

    train, val = chat_rows(options, dist_env, tokenizer, model.config.max_seq_len, vision.image_ids)
    dataset = train.dataset
    if dataset.n_images is None or not dataset.n_images.any():
        files = " ".join(map(str, options.data_path))
        raise UserError(f"{files}: no images in it; 3-full_sft.py learns from dialogues without images")
    load: Pixels | Features
    if encode is None:
        name, load = "pixel_values", Pixels(dataset, vision.image_size)
    else:
        with main_process_first(dist_env, "computing the features of images"):
            features = cached_features(dataset, encode, identity, options.cache_folder)
        name, load = "image_features", Features(features)
    return ImageRows(train, load, name), ImageRows(val, load, name) if val else None


def _own_encoder(model: VisionLanguageModel, options: VisionOptions) -> Encoder:
    device, size = resolve_device(options.device), model.vision.image_size
    own = model.vision_encoder
    assert own is not None

    @torch.no_grad()
    def encode(images: list) -> Tensor:
        return own.to(device)(pixel_values(images, size).to(device))

    return encode
