"""Reading pictures with Pillow, and writing small ones."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress.errors import DataError, one_line

# Pillow's own limit, beyond which it warns of a bomb: 256 MiB as RGB.
MOST_PIXELS = (1 << 28) // 3

# What Pillow raises of damage, depending on the format and on the byte that is wrong.
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, RuntimeError,
    EOFError, ArithmeticError, struct.error, Image.DecompressionBombError,
)  # fmt: skip

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Whatever a file is called, Pillow would try every format it knows, and read PostScript by
# starting Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


def thumbnail(pixels: np.ndarray[Any, np.dtype[np.uint8]], side: int = 64) -> bytes:
    """Encode an image uint8 ``[H, W, C]`` as a small PNG, its longer side ``side`` pixels."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Small images are enlarged without blurring, so that their pixels can be seen.
    filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    buffer = io.BytesIO()
    image.resize(size, filter_).save(buffer, "PNG")
    return buffer.getvalue()


# --- Pictures to tensors -----------------------------------------------------------------------


def read_image(path: Path, channels: int) -> Image.Image:
    """Read a picture file as grey (``channels`` 1) or RGB (3).

    Raises:
        DataError: The file is not a picture, is truncated, has no pixels or more than
            `MOST_PIXELS`, or a pixel type beyond 8 or 16 bits.
    """
    try:
        with warnings.catch_warnings():
            # Of odd metadata, which is not used, and of bombs, which are refused below.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image, path)
                image.load()
                _check_size(image, path)
                return convert_image(image, channels)
    except _DAMAGE as error:
        raise DataError(
            f"The image {path} cannot be read: {one_line(error)}; replace it or take it away."
        ) from error


def _check_size(image: Image.Image, path: Path) -> None:
    """Refuse pictures without pixels, and such as would take the memory of hundreds."""
    pixels = image.width * image.height
    if pixels < 1 or pixels > MOST_PIXELS:
        wrong = "no pixels" if pixels < 1 else f"more than {MOST_PIXELS:,} pixels"
        raise DataError(
            f"The image {path} has {wrong} ({image.width}x{image.height}); replace it, scale it "
            "down or take it away."
        )


def convert_image(image: Image.Image, channels: int) -> Image.Image:
    """Convert a PIL image to mode L (``channels`` 1) or RGB (3).

    Raises:
        DataError: 32-bit pixels, whose range is not known.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"An image has 32-bit pixels (mode {image.mode}), whose range is not known; "
            "convert it to 8 or 16 bits."
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def image_to_array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a PIL image in mode L or RGB as uint8 ``[H, W, C]``."""
    array = np.array(image, dtype=np.uint8)  # a copy: torch takes no read-only memory
    return array[:, :, None] if array.ndim == 2 else array
