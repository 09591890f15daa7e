"""Put a MiniMind-V and the CLIP it sees through into one folder: a LLaVA, which transformers knows.

The parts of a LLaVA compute what ours do where the projector is linear:

CLIP               the last hidden state before the final norm, with or without the class token
projector          linear_1, activation, linear_2: ours, nothing, and the identity
language model     that of `export.huggingface`
token of an image  one, repeated. Where ours is a pattern of others, it is <image>: embeddings of these tokens are not used

A LLaVA has no LayerNorm in front of the projector, and takes SigLIP's hidden state before the final norm, where we take the
one after it: such models are not exported, nor those with any encoder but CLIP.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from common.errors import UserError
from common.files import write_json
from export.huggingface import (
    CONFIG,
    LLAVA,
    PROCESSOR,
    export_state,
    llama_config,
    read_json,
    to_llama_state,
    write_folder,
)
from export.self_check import MAX_KL, Agreement, load_stock, measure, model_logits, sample_pixels
from model.model import Transformer
from model.tokenizer import IMAGE_TOKEN, load_tokenizer
from model.vision import PretrainedEncoder, VisionLanguageModel, image_positions
from model.weights_file import Checkpoint, dtype_name

# In front of a chat template: the parts of a message become its text, the images first, as in `with_images`.
PARTS_TO_TEXT = (
    "{% set flat = namespace(messages=[], text='') %}"
    "{% for message in messages %}"
    "{% if message['content'] is string or message['content'] is none %}"
    "{% set flat.messages = flat.messages + [message] %}"
    "{% else %}"
    "{% set flat.text = '' %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set flat.text = flat.text + '<image>\n' %}{% endif %}"
    "{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{% set flat.text = flat.text + part['text'] %}{% endif %}"
    "{% endfor %}"
    "{% set flat.messages = flat.messages + [dict(message, content=flat.text)] %}"
    "{% endif %}"
    "{% endfor %}"
    "{% set messages = flat.messages %}"
)


def open_clip(source: Checkpoint, tokenizer: PreTrainedTokenizerFast, folder: Path | None) -> PretrainedEncoder:
    """Return the encoder of a model that a LLaVA can hold. folder: None: as in the description of the weights.

    Raises UserError if a LLaVA would not compute the same, or the encoder is not found.
    """
    vision, path = source.config.vision, source.path
    assert vision is not None
    if vision.encoder == "vit":
        other = "" if folder is None else f" (leave --vision_encoder {folder} out)"
        raise UserError(f"{path} has an image encoder of its own, and only --format minimind holds such a model{other}")
    if vision.projector != "linear":
        raise UserError(
            f"{path}: its projector begins with a LayerNorm, which a LLaVA does not have; a model of 8-pretrain_vlm.py "
            "--projector linear can be exported"
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        raise UserError(f"{path}: a LLaVA needs a token for images, and the tokenizer has no {IMAGE_TOKEN}")
    folder = folder or source.vision_encoder
    if folder is None:
        raise UserError(f"{path} needs the image encoder it was trained with: --vision_encoder FOLDER")
    encoder = PretrainedEncoder(folder, n_tokens=len(vision.image_ids))
    if not encoder.is_clip:
        raise UserError(f"{folder} is no CLIP: only a model that sees through a CLIP can be exported as a LLaVA")
    if (encoder.n_tokens, encoder.width) != (len(vision.image_ids), vision.width):
        raise UserError(
            f"{folder} makes {encoder.n_tokens} features of width {encoder.width}; {path} was trained with "
            f"{len(vision.image_ids)} of width {vision.width}: name the encoder it was trained with"
        )
    return encoder


def write_llava(
    folder: Path,
    model: Transformer,
    encoder: PretrainedEncoder,
    tokenizer_dir: Path,
    dtype: torch.dtype,
    description: dict,
) -> None:
    """Write the files that transformers reads, under the names of the published LLaVAs."""
    assert isinstance(model, VisionLanguageModel)
    config, vision, tokenizer = model.config, model.vision, load_tokenizer(tokenizer_dir)
    clip = encoder.model.config
    select = "default" if encoder.first else "full"  # default: without the class token
    text = llama_config(config, dtype)
    content = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": LLAVA,
        "vision_config": {name: value for name, value in clip.to_dict().items() if name[0] != "_"},  # _name_or_path
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "image_seq_length": len(vision.image_ids),
        "projector_hidden_act": "linear",  # transformers' name for no activation
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": select,
        **{name: text[name] for name in ("tie_word_embeddings", "dtype", "transformers_version")},
    }
    weights = export_state(model, dtype)
    state = {f"language_model.{name}": tensor for name, tensor in to_llama_state(weights, config).items()}
    for name in ("weight", "bias"):
        state[f"multi_modal_projector.linear_1.{name}"] = weights[f"vision_proj.vision_proj.0.{name}"]
    state["multi_modal_projector.linear_2.weight"] = torch.eye(config.dim, dtype=dtype)
    state["multi_modal_projector.linear_2.bias"] = torch.zeros(config.dim, dtype=dtype)
    for name, tensor in encoder.model.state_dict().items():
        state[f"vision_tower.vision_model.{name}"] = tensor.to(dtype).contiguous()
    write_folder(folder, content, config, state, tokenizer_dir, description)

    square = {"height": clip.image_size, "width": clip.image_size}
    resizing = {"do_resize": True, "resample": Image.Resampling.BICUBIC, "size": square, "do_center_crop": False}
    image_processor = encoder.processor.to_dict() | resizing
    write_json(folder / "preprocessor_config.json", image_processor | {"processor_class": "LlavaProcessor"})
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": clip.patch_size,
        "num_additional_image_tokens": 1,  # the class token
        "vision_feature_select_strategy": select,
    }
    write_json(folder / PROCESSOR, processor)
    template = PARTS_TO_TEXT + tokenizer.get_chat_template()
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")


@torch.no_grad()
def compare_llava(
    folder: Path, model: Transformer, encoder: PretrainedEncoder, rows: list[list[int]], tolerance: float | None = None
) -> Agreement:
    """Compare the logits of a folder of `write_llava` with those of its source, about an image, as `compare_folder` does.

    Pictures go through the image processor in the folder. tolerance: None: 1e-4.
    """
    assert isinstance(model, VisionLanguageModel)
    dtype: torch.dtype = getattr(torch, read_json(folder / CONFIG)["dtype"])
    picture = sample_picture(encoder.model.config.image_size)
    stored = copy.deepcopy(encoder)
    stored.model.to(dtype).float()

    def logits(weights: torch.dtype, encode: PretrainedEncoder) -> list[Tensor]:
        ours = copy.deepcopy(model).to(weights).float()
        return model_logits(ours, rows, {"image_features": encode([picture])})

    theirs: Any = load_stock(AutoModelForImageTextToText, folder)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    pixels = processor.image_processor(images=picture, return_tensors="pt")
    exported = []
    for row in rows:
        ids = torch.tensor([row])
        ids[image_positions(ids, model.vision.image_ids)] = theirs.config.image_token_id
        exported.append(theirs(input_ids=ids, **pixels).logits[0])
    source = logits(torch.float32, encoder) if dtype != torch.float32 else None
    tolerance = 1e-4 if tolerance is None else tolerance
    return measure(exported, logits(dtype, stored), source, tolerance, MAX_KL.get(dtype_name(dtype)))


def sample_picture(size: int) -> Image.Image:
    """Return `sample_pixels` as a picture."""
    return Image.fromarray(sample_pixels(size).permute(1, 2, 0).to(torch.uint8).numpy())
