"""MiniMind-V, the vision-language model. An encoder makes features of an image, a projector makes them as wide as
embeddings, and they take the place of the image's tokens in the prompt; for the Transformer nothing else changes.

    config = LMConfig(vision_config={"encoder": "vit", "image_ids": [5] * 9, "width": 128})
    model = VisionLanguageModel(config)
    model(input_ids=ids, pixel_values=pixels)        # (images, 3, 48, 48), in the order of the prompts
    model(input_ids=ids, image_features=features)    # (images, tokens, width), from an encoder outside of the model

Published models have a frozen CLIP or SigLIP outside of their weights; other image models can take its place
(`PretrainedEncoder`). Our own small encoder is part of the model and trained with it: it is a vision Transformer
(https://arxiv.org/abs/2010.11929) of the same blocks as the language model.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from common.errors import UserError, first_line
from model.architecture import VisionConfig
from model.LMConfig import LMConfig
from model.model import MODEL_CLASSES, AttentionMetadata, RMSNorm, Transformer, TransformerBlock, TransformerOutput
from model.moe import is_tracing
from model.rope import rope_tables

if TYPE_CHECKING:
    from PIL.Image import Image


class Projection(nn.Linear):
    """A linear layer whose outputs are as large as its inputs from the start.

    Embeddings of text may be small: they are few, and known. What is new in every image must not be drowned by what the
    first layers of the language model add to it.
    """


class Convolution(nn.Module):
    """Halve the sides of an image: a convolution of 3 x 3 pixels with stride 2, then RMSNorm and GELU.

    It is written as the matrix product it is, so that optimizers treat its weight as the matrix it is.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(9 * in_channels, out_channels, bias=False)
        self.norm = RMSNorm(out_channels, norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x (images, channels, side, side) -> (images, out_channels, side / 2, side / 2)."""
        side = x.shape[-1] // 2
        windows = F.unfold(x, kernel_size=3, stride=2, padding=1)  # (images, 9 * channels, side / 2 * side / 2)
        out = F.gelu(self.norm(self.linear(windows.transpose(1, 2))))
        return out.transpose(1, 2).unflatten(2, (side, side))


class PatchPositions(nn.Embedding):
    """What is added to a patch for its place; as large as the patch itself from the start, or places are learned late."""


class VisionEncoder(nn.Module):
    """A vision Transformer: square patches become tokens, and every patch sees every other one.

    Convolutions make the tokens (https://arxiv.org/abs/2106.14881): a shape looks alike wherever it is, and a Transformer
    alone needs far more images to learn that. A linear layer adds the pixels themselves: with convolutions alone, what is
    not asked about first, colours where places are learned early, is lost and has to be found again.
    """

    def __init__(self, vision: VisionConfig, norm_eps: float) -> None:
        super().__init__()
        shape: dict[str, Any] = dict(dim=vision.width, n_layers=vision.n_layers, n_heads=vision.n_heads)
        config = LMConfig(**shape, n_kv_heads=vision.n_heads)
        self.head_dim = config.head_dim
        halvings = vision.patch_size.bit_length() - 1
        channels = [3, *(max(vision.width >> i, 8) for i in reversed(range(halvings)))]
        self.patches = nn.Sequential(
            *(Convolution(inner, outer, norm_eps) for inner, outer in itertools.pairwise(channels))
        )
        self.patch_size = vision.patch_size
        self.pixels = Projection(3 * vision.patch_size**2, vision.width)
        self.positions = PatchPositions(vision.n_patches, vision.width)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(vision.n_layers))
        self.norm = RMSNorm(vision.width, norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (images, 3, size, size), 0 to 255 -> features (images, patches, width)."""
        pixels = pixels.to(self.norm.weight.dtype) / 127.5 - 1
        patches = F.unfold(
            pixels, kernel_size=self.patch_size, stride=self.patch_size
        )  # (images, 3 * side * side, patches)
        x = self.patches(pixels).flatten(2) + self.pixels(patches.transpose(1, 2)).transpose(1, 2)
        x = x.transpose(1, 2) + self.positions.weight  # (images, patches, width)
        n_patches = x.shape[1]
        # Position 0 everywhere: nothing is rotated, because the places of patches are not in a line.
        rope = rope_tables(torch.zeros(1, n_patches, dtype=torch.long, device=x.device), self.head_dim, 1e4)
        everything = torch.ones(1, 1, n_patches, n_patches, dtype=torch.bool, device=x.device)
        metadata = AttentionMetadata(rope, mask=everything)
        for layer in self.layers:
            x, _ = layer(x, metadata)
        return self.norm(x)


class LinearProjector(nn.Module):
    """One linear layer, as in the first releases of MiniMind-V."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.vision_proj = nn.Sequential(Projection(width, dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.vision_proj(features)


class MLPProjector(nn.Module):
    """LayerNorm, Linear, GELU, Linear, as in later releases."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(width), Projection(width, dim), nn.GELU(), Projection(dim, dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(features)


PROJECTORS = {"linear": LinearProjector, "mlp": MLPProjector}


class VisionLanguageModel(Transformer):
    """A Transformer whose prompts may hold images. Without images it computes what the Transformer computes."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__(config)
        vision = config.vision
        if vision is None:
            raise ValueError("this configuration has no vision_config: it is a model of text")
        self.vision = vision
        self.vision_encoder = VisionEncoder(vision, config.norm_eps) if vision.encoder == "vit" else None
        self.vision_proj = PROJECTORS[vision.projector](vision.width, config.dim)
        for module in self.vision_modules():
            module.apply(self._init_weights)

    def vision_modules(self) -> list[nn.Module]:
        """Return the parts that the language model does not have."""
        return [module for module in (self.vision_encoder, self.vision_proj) if module is not None]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights as a Transformer does; biases start at 0."""
        super()._init_weights(module)
        if isinstance(module, PatchPositions):
            init.normal_(module.weight, std=1.0)
        if isinstance(module, Projection):
            init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            init.zeros_(module.bias)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> TransformerOutput | tuple:
        """Return what `Transformer.forward` does, of prompts with images.

        Args:
            input_ids: (batch, time), with `VisionConfig.image_ids` where an image stands.
            pixel_values: (images, 3, size, size), 0 to 255, for our own encoder; or
            image_features: (images, tokens, width), from an encoder outside of the model. In both the images are in the
                order in which they stand in the prompts, the first prompt first.

        Raises ValueError for more or fewer images than places for them.
        """
        image_features = self.encode(pixel_values, image_features)
        begins = past_key_values is None or not past_key_values.get_seq_length()
        if image_features is not None and input_ids is not None:
            kwargs["inputs_embeds"], input_ids = self.embed(input_ids, image_features), None
        elif input_ids is not None and begins and not is_tracing():  # in an answer the model may write such a token
            self._check_places(image_positions(input_ids, self.vision.image_ids), 0, len(self.vision.image_ids))
        return super().forward(input_ids, attention_mask, past_key_values=past_key_values, **kwargs)

    def encode(self, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor | None:
        """Return the features of images that are given as pixels or as features, as `forward` takes them."""
        if pixel_values is None:
            return image_features
        if self.vision_encoder is None:
            raise ValueError("this model has no encoder of its own: give image_features instead of pixel_values")
        return self.vision_encoder(pixel_values)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Give `generate` the images with the prompt only: afterwards they are in the cache.

        A cache that is given to `generate` holds what came before the prompt.
        """
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0 and not kwargs.get("is_first_iteration"):
            kwargs |= {"pixel_values": None, "image_features": None}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc,arg-type]

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat the prompts for several answers to each; the images of a prompt stay together."""
        names = [name for name in ("pixel_values", "image_features") if kwargs.get(name) is not None]
        images = {name: kwargs.pop(name) for name in names}
        if expand_size > 1 and images and input_ids is not None:
            n_tokens = image_positions(input_ids, self.vision.image_ids).sum(1)
            counts = (n_tokens // len(self.vision.image_ids)).tolist()
            for name in names:
                of_prompts = images[name].split(counts)
                images[name] = torch.cat([part for part in of_prompts for _ in range(expand_size)])
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        expanded, kwargs = expand(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return expanded, kwargs | images

    def embed(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Return embeddings (batch, time, dim) with projected features (images, tokens, width) in place of image tokens."""
        x = self.tok_embeddings(input_ids)
        here = image_positions(input_ids, self.vision.image_ids)
        projected = self.vision_proj(image_features.to(self.tok_embeddings.weight.dtype)).to(x.dtype)
        self._check_places(here, *projected.shape[:2])
        return x.masked_scatter(here[..., None], projected)

    def _check_places(self, here: Tensor, n_images: int, n_features: int) -> None:
        """Raise ValueError unless as many tokens stand for images as the images have features.

        In training on a GPU it is a RuntimeError at some later time, after which the GPU is of no use to the process: to
        wait for the number would cost time in every step.
        """
        if is_tracing():
            return
        if here.is_cuda and self.training:
            torch._assert_async(
                here.sum() == n_images * n_features, "as many images are needed as the prompts have places"
            )
        else:
            check_places(int(here.sum()), n_images, n_features, len(self.vision.image_ids))


def check_places(n_tokens: int, n_images: int, n_features: int, n_ids: int) -> None:
    """Raise ValueError unless `n_tokens` that stand for images are the places of all features of `n_images` images."""
    if n_tokens != n_images * n_features:
        raise ValueError(
            f"{n_images} images of {n_features} features, and the prompts have places for {n_tokens / n_ids:g} of {n_ids}"
        )


def image_positions(input_ids: Tensor, image_ids: tuple[int, ...]) -> Tensor:
    """Return a (batch, time) mask, True for the tokens that stand for an image: they are all there, one after the other.

    Some published models write an image as ordinary tokens, such as `@`: a single one is text.
    """
    n = len(image_ids)
    if input_ids.shape[1] < n:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    pattern = torch.tensor(image_ids, device=input_ids.device)
    begins = (input_ids.unfold(1, n, 1) == pattern).all(-1)  # (batch, time - n + 1)
    count = F.pad(begins.int(), (n, n - 1)).cumsum(1)  # of beginnings so far: some among the last n tokens?
    return count[:, n:] > count[:, :-n]


def count_image_tokens(ids: Sequence[int], image_ids: tuple[int, ...]) -> int:
    """Return how many tokens of a prompt stand for images."""
    return int(image_positions(torch.tensor([ids]), image_ids).sum())


MODEL_CLASSES["minimind-v"] = VisionLanguageModel


class PretrainedEncoder:
    """An image model of transformers in a local folder, frozen. It is no part of the model that uses its features.

    CLIP, SigLIP, DINOv2, ViT, ConvNeXt, EfficientNet and others: of a model of texts and images its image half. It makes
    `n_tokens` features of an image, each `width` wide.

    n_tokens: features of an image that a trained model takes. Some published ones leave out that of CLIP's class token.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", n_tokens: int | None = None) -> None:
        from PIL.Image import linear_gradient
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json in it; name the folder of an image model, such as a CLIP")
        try:
            kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            self.processor = processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{folder} cannot be loaded as an image model: {first_line(error)}") from error
        model = getattr(model, "vision_model", model)
        if model.main_input_name != "pixel_values":
            raise UserError(f"{folder} is a {kind} model; the folder of an image model is needed, such as a CLIP")
        size = (processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size) or {}
        side = size.get("height") or size.get("shortest_edge")  # of the squares that the model takes, in pixels
        if not side:
            raise UserError(f"{folder}: preprocessor_config.json must name one size, as height or shortest_edge")
        self.side = side
        self.model = model.eval().requires_grad_(False).to(device)
        self.folder, self.device = folder, device
        sizes = self.model.config
        self.is_clip = sizes.model_type == "clip_vision_model"
        # The class token is the first one.
        self.first = int(self.is_clip and n_tokens == (sizes.image_size // sizes.patch_size) ** 2)
        try:
            features, again = (self([linear_gradient("L").convert("RGB")]) for _ in range(2))
            self.n_tokens, self.width = features.shape[1:]
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: a {kind} model makes no features of an image: {first_line(error)}") from error
        if not torch.allclose(features, again, rtol=0.01, atol=0.01):  # a masked autoencoder leaves out other patches
            raise UserError(f"{folder}: a {kind} model makes features at random: it cannot be used")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the weights and with how images are prepared."""
        digest = hashlib.sha256(json.dumps(self.processor.to_dict(), sort_keys=True, default=str).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
        digest.update(b"no class token" * self.first)
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, images: list[Image]) -> Tensor:
        """Return the last hidden states (images, tokens, width), float32: CLIP's before its final norm.

        Images are resized to a square, so that nothing of them is cut off.
        """
        squares = [image.resize((self.side, self.side)) for image in images]
        inputs = self.processor(images=squares, return_tensors="pt", do_resize=False, do_center_crop=False)
        states = self.model(**inputs.to(self.device)).last_hidden_state[:, self.first :].float()
        return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states  # (images, width, rows, columns)
