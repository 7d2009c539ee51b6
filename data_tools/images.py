"""Where images come from, and how one becomes a PNG of the wanted size."""

import io
import os
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from imm_scale.errors import UserError

# What Pillow raises for files that are no images, cut short, damaged, or bombs.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Source:
    """Images with labels. An image is a path, or (H, W) or (H, W, 3) uint8 values already in memory."""

    class_names: list[str]
    names: list[str]
    labels: list[int]
    images: list[str] | list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Rendered:
    """A PNG file and its image's (H, W, channels)."""

    png: bytes
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Unreadable:
    """Why an image is left out."""

    reason: str


def digits() -> Source:
    """The 1,797 real 8 x 8 handwritten digits in scikit-learn; values 0..16 become 0..255.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"--source digits needs scikit-learn ({error}): pip install 'imm-scale[demo]'") from error
    data = load_digits()
    images = np.round(data.images * (255.0 / 16.0)).astype(np.uint8)
    return Source(
        class_names=[str(name) for name in data.target_names],
        names=[f"digit {i}" for i in range(len(images))],
        labels=[int(label) for label in data.target],
        images=list(images),
    )


def folder(path: str) -> Source:
    """Every file below each subfolder, a class per subfolder, in the order of their names; hidden ones are skipped.

    Raises:
        UserError: no such folder, no class folders, or no files in them.
    """
    if not os.path.isdir(path):
        raise UserError(f"--source {path} is no folder: name a folder with a subfolder per class, or 'digits'")
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _files_below(os.path.join(path, name))
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise UserError(f"no images in {path}: it must hold a subfolder per class with the class's images in it")
    return Source(class_names=classes, names=paths, labels=labels, images=paths)


def _files_below(path: str) -> list[str]:
    return sorted(
        os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names if not name.startswith(".")
    )


def render(image: str | NDArray[np.uint8], channels: int, size: int | None) -> Rendered | Unreadable:
    """Loads, turns upright, converts to grey or RGB, crops and resizes, and writes a PNG."""
    try:
        if isinstance(image, str):
            with Image.open(image) as opened:
                picture = ImageOps.exif_transpose(opened)
        else:
            picture = Image.fromarray(image)
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


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """A centred size x size image, as published ImageNet models were trained on.

    Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, released code (box halving,
    then bicubic to the shorter side, then the centre).
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        (max(size, round(picture.width * scale)), max(size, round(picture.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))
