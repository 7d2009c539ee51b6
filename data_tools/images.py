"""How an image becomes a PNG of the wanted size."""

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from data_tools import sources

# What Pillow and zipfile raise for files that are no images, cut short, damaged, or bombs.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Rendered:
    """A PNG file and its image's (H, W, channels)."""

    png: bytes
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Unreadable:
    """Why an image is left out."""

    reason: str


def render(image: sources.Image, channels: int, size: int | Sequence[int] | None) -> Rendered | Unreadable:
    """Loads, turns upright, converts to grey or RGB, crops and resizes, and writes a PNG."""
    try:
        if isinstance(image, np.ndarray):
            picture = Image.fromarray(image)
        else:
            with Image.open(io.BytesIO(sources.read(image))) as opened:
                picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith(("I", "F")):
            return Unreadable(f"mode {picture.mode} has more than 8 bits a channel: convert it first")
        picture = picture.convert("L" if channels == 1 else "RGB")
        if size is not None:
            picture = center_crop(picture, size)
    except _UNREADABLE as error:
        return Unreadable(f"{type(error).__name__}: {error}")
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return Rendered(stream.getvalue(), (picture.height, picture.width, channels))


def center_crop(picture: Image.Image, size: int | Sequence[int]) -> Image.Image:
    """A centred size x size image, as published ImageNet models were trained on, or one of (height, width).

    Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, released code (box halving,
    then bicubic to the shorter side, then the centre). Of other shapes, the side that is short for the shape counts.
    """
    height, width = (size, size) if isinstance(size, int) else size
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    picture = picture.resize(
        (max(width, round(picture.width * scale)), max(height, round(picture.height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
