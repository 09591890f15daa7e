"""Pictures as a vision-language model takes them: RGB, upright, square, whole numbers from 0 to 255."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


def to_rgb(image: Image) -> Image:
    """Return an image as RGB, turned as its camera says, on white where it is transparent."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode == "I;16":  # 16 bits of grey: `convert` would make all but the darkest ones white
        upright = upright.point(lambda value: value * (1 / 256)).convert("L")
    if "A" in upright.getbands() or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright)
    return upright.convert("RGB")


def to_pixels(image: Image, size: int) -> np.ndarray:
    """Return an RGB image resized to a square, (3, size, size) uint8."""
    import numpy as np
    from PIL import Image

    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def pixel_values(images: Sequence[Image], size: int) -> Tensor:
    """Return RGB images as (images, 3, size, size) uint8, the input of our own encoder."""
    import numpy as np
    import torch

    pixels = np.empty((len(images), 3, size, size), np.uint8)
    for i, image in enumerate(images):
        pixels[i] = to_pixels(image, size)
    return torch.from_numpy(pixels)
