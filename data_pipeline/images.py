"""Images as bytes from files, data URLs and Parquet, checked before anything is decoded.

    data = read_image("cat.png", image_dir)          # or a data URL, or bytes
    image = open_image(data)                         # RGB, upright, on white where it is transparent

The size stands in an image's header: a bomb, a few bytes that say 50,000 x 50,000 pixels, is refused before it takes memory.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError, first_line
from model.pixels import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 32 << 20  # of a file
MAX_PIXELS = 40_000_000  # 120 MB as RGB
MAX_SIDE = 16_384
FORMATS = {"PNG": ("png",), "JPEG": ("jpg", "jpeg", "jpe", "jfif"), "WEBP": ("webp",), "BMP": ("bmp",), "GIF": ("gif",)}
_DATA_URL = re.compile(r"data:([\w.+/-]*)((?:;[\w=.-]+)*),", re.ASCII)


class BadImage(UserError):
    """An image that cannot be used. The text says why."""


def read_image(source: Any, image_dir: Path | None) -> bytes:
    """Return the bytes of an image, checked. Raises BadImage if they are none that can be used.

    Args:
        source: bytes, a data URL, the name of a file in `image_dir`, or {"bytes", "path"} as Hugging Face's datasets have.
    """
    if isinstance(source, dict) and source.keys() & {"bytes", "path", "url"}:
        source = source.get("bytes") or source.get("url") or source.get("path")
    if isinstance(source, bytes):
        return check_image(source, "")
    if not isinstance(source, str) or not source:
        raise BadImage(f"an image is {type(source).__name__}, not bytes, a data URL or the name of a file")
    if source.startswith("data:"):
        return check_image(*_from_data_url(source))
    if re.match(r"\w+://", source):
        raise BadImage(f"{source:.80} is an address: download the images first")
    if image_dir is None:
        raise BadImage(f"{source:.80} is the name of a file: python data_process.py vlm puts the images into the data")
    path = Path(os.path.abspath(image_dir / source))  # links are followed, ".." is not
    try:
        if not path.is_relative_to(os.path.abspath(image_dir)):
            raise BadImage(f"{source:.80} lies outside of the folder of images")
        if path.stat().st_size > MAX_BYTES:
            raise BadImage(f"{source:.80} is larger than {MAX_BYTES >> 20} MB")
        data = path.read_bytes()
    except BadImage:
        raise
    except OSError as error:
        raise BadImage(f"{source:.80} cannot be read ({error.strerror})") from None
    except (ValueError, RuntimeError) as error:  # no file can have such a name; a link that leads to itself
        raise BadImage(f"{source!r:.80} cannot be read ({error})") from None
    return check_image(data, path.suffix.removeprefix(".").lower())


def open_data_url(url: str) -> Image:
    """Decode a data URL as `open_image` does. Raises BadImage."""
    return open_image(*_from_data_url(url))


def _from_data_url(url: str) -> tuple[bytes, str]:
    """Return the bytes of an image and the second half of its media type."""
    head = _DATA_URL.match(url)
    if head is None or not head[2].endswith(";base64"):
        raise BadImage(f"{url:.40}... is not a data URL in base64: data:image/png;base64,...")
    if len(url) > MAX_BYTES * 4 // 3:
        raise BadImage(f"a data URL is larger than {MAX_BYTES >> 20} MB")
    kind, _, subtype = head[1].partition("/")
    if kind != "image":
        raise BadImage(f"a data URL says that it is {head[1] or 'nothing'}, not an image")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"a data URL is not base64 ({error})") from None
    return data, subtype.removeprefix("x-").lower()


def data_url(data: bytes) -> str:
    """Return an image as text, which `read_image` reads."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        kind = _format(image).lower()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _format(image: Image) -> str:
    """Return a key of FORMATS. Many cameras put a preview behind a JPEG, which Pillow then calls an MPO."""
    return "JPEG" if image.format == "MPO" else str(image.format)


def check_image(data: bytes, extension: str) -> bytes:
    """Return `data` if it is one whole image of a known format and a sane size, and what its extension says.

    extension: of its name, or the second half of its media type; "": it has none.
    """
    open_image(data, extension)
    return data


def open_image(data: bytes, extension: str = "") -> Image:
    """Decode an image to RGB, upright, on white where it is transparent. Raises BadImage."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImage("an image has no bytes")
    if len(data) > MAX_BYTES:
        raise BadImage(f"an image is larger than {MAX_BYTES >> 20} MB")
    known = ", ".join(FORMATS)
    try:
        with Image.open(io.BytesIO(data), formats=[*FORMATS]) as image:
            width, height = image.size
            if extension and extension not in FORMATS[_format(image)]:
                raise BadImage(f"its name says {extension}, and it is a {_format(image)}: rename it")
            if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
                raise BadImage(
                    f"{width:,} x {height:,} pixels: at most {MAX_SIDE:,} on a side and {MAX_PIXELS:,} in all are read"
                )
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise BadImage("an animation: save one picture of it")
            image.load()
            return to_rgb(image)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"far more pixels than the {MAX_PIXELS:,} that are read") from None
    except UnidentifiedImageError:
        raise BadImage(f"not an image of a known format ({known})") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise BadImage(f"a damaged image ({first_line(error)})") from None
