"""Images for a vision-language model: from pictures to what it takes.

prepare = ImageProcessor.for_checkpoint(checkpoint)
chat = [{"role": "user", "content": f"{IMAGE}\\nWhat is this?"}]
ids, _ = render_chat(tokenizer, chat, add_generation_prompt=True, image_ids=prepare.model.vision.image_ids)
generate_text(prepare.model, tokenizer, [ids], images=[prepare([image])])
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from inference.generator import Images
from model.model import Transformer
from model.pixels import pixel_values
from model.vision import PretrainedEncoder, VisionLanguageModel
from model.weights_file import Checkpoint

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class ImageProcessor:
    """Make of images what a model takes: pixels for its own encoder, or features of one outside of it."""

    model: VisionLanguageModel
    encoder: PretrainedEncoder | None

    @classmethod
    def for_checkpoint(cls, checkpoint: Checkpoint, vision_encoder: Path | None = None) -> ImageProcessor:
        """Return what fits a model. vision_encoder: the folder of its encoder; None: as in the description of the weights.

        Raises UserError for a text-only model, or whose encoder is not found or does not fit.
        """
        model = require_vision(checkpoint.model, checkpoint.path)
        if model.vision.encoder == "vit":
            if vision_encoder is not None:
                raise UserError(f"{checkpoint.path} has an image encoder of its own; leave out --vision_encoder")
            return cls(model, None)
        folder = vision_encoder or checkpoint.vision_encoder
        if folder is None:
            raise UserError(f"{checkpoint.path} needs the image encoder it was trained with: --vision_encoder FOLDER")
        return cls(model, PretrainedEncoder(folder, model.tok_embeddings.weight.device, len(model.vision.image_ids)))

    def __call__(self, images: list[Image]) -> Images | None:
        """Return the images of one prompt as the model takes them; None: it has none."""
        if not images:
            return None
        if self.encoder is not None:
            features = self.encoder(images)
            expected = (len(self.model.vision.image_ids), self.model.vision.width)
            if features.shape[1:] != expected:
                raise UserError(
                    f"{self.encoder.folder} makes {features.shape[1]} features of width {features.shape[2]}; this model "
                    f"was trained with {expected[0]} of width {expected[1]}: use the encoder it was trained with"
                )
            return Images("image_features", features)
        return Images("pixel_values", pixel_values(images, self.model.vision.image_size))


def require_vision(model: Transformer, path: Path) -> VisionLanguageModel:
    """Return the model. Raises UserError if it is a text-only one."""
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f"{path} does not see images; 8-pretrain_vlm.py and 9-sft_vlm.py make a model that does")
    return model
