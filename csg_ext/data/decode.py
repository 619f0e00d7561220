"""One image file to pixels: the formats that are read, the guards against damaged and hostile ones, grey and colour."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
# By content, whatever the name says: Pillow would also run Ghostscript for a PostScript file that is called .jpg.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_GREY_MODES = {"1", "L", "LA", "I", "F"}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags


def is_grey(image: Image.Image) -> bool:
    """Whether an image has no colour, by its header: its mode, and its palette, used or not. Decodes no pixels."""
    if image.mode == "P" and image.palette is not None:
        swatch = Image.new("P", (1, 1))  # image.getpalette() would decode the image
        swatch.putpalette(image.palette)
        colours = np.reshape(swatch.getpalette() or [], (-1, 3))
        return bool((colours == colours[:, :1]).all())
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")


def open_image(file: Path | BinaryIO) -> Image.Image:
    """The image with its header read and its pixels not yet decoded.

    Raises many types for a damaged file, and Image.DecompressionBombWarning for one of more pixels than
    Image.MAX_IMAGE_PIXELS (89 million).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file, formats=_FORMATS)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits scaled to 8: Pillow's own conversion clips at 255."""
    levels = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # Pillow neither scales 12 bits nor inverts where 0 is white
    levels = (levels >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - levels if tags.get(_PHOTOMETRIC) == 0 else levels)


def decode(file: Path | BinaryIO, channels: int) -> Image.Image:
    """The decoded image in mode "L" (channels 1) or "RGB" (3). Grey is ITU-R 601 luma; alpha is dropped; the first
    frame of an animation counts. Raises what open_image raises."""
    with open_image(file) as image:
        # Pillow scales a PGM of more than 8 bits to 16 and gives it the mode of 32, which only a TIFF can have.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
            image = _eight_bits(image)
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
