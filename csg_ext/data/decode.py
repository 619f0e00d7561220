"""One image file to pixels: the formats that are read, the guards against damaged and hostile ones, grey and colour."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
# By content, whatever the name says: Pillow would also run Ghostscript for a PostScript file that is called .jpg.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_GREY_MODES = {"1", "L", "LA", "I", "F"}


def is_grey(mode: str) -> bool:
    """Whether a Pillow mode has no colour."""
    return mode in _GREY_MODES or mode.startswith("I;16")


def open_image(file: Path | BinaryIO) -> Image.Image:
    """The image with its header read and its pixels not yet decoded.

    Raises many types for a damaged file, and Image.DecompressionBombWarning for one of more pixels than
    Image.MAX_IMAGE_PIXELS (89 million).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file, formats=_FORMATS)


def decode(file: Path | BinaryIO, channels: int) -> Image.Image:
    """The decoded image in mode "L" (channels 1) or "RGB" (3). Grey is ITU-R 601 luma; alpha is dropped; the first
    frame of an animation counts. Raises what open_image raises."""
    with open_image(file) as image:
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"expected 8 or 16 bits per channel, got Pillow's mode {image.mode} (32 bits)")
        return image.convert("RGB" if channels == 3 else "L")


def fit(image: Image.Image, size: int) -> Image.Image:
    """The shorter side scaled to `size`, then the centre cropped."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 (channels, H, W)."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
