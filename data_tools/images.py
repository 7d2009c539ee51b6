"""How an image becomes a PNG of the wanted size."""

import io
import logging
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_tools import sources
from data_tools.packing.metadata import unread_format, without_metadata
from data_tools.sources.names import FORMATS

# What decoders and archives raise for files that are no images, cut short, damaged, or bombs. Decoders meet anything.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
MOST_PIXELS = 178_956_970  # where Pillow stops by itself: 0.5 GiB of RGB
_ORIENTATION = 0x0112  # tag of EXIF
_UPRIGHT = {  # source: EXIF 2.32, table 6
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LONGEST = 8  # times as long as what is cut out of it: longer strips lose their ends before they are resized
WHITE = (255, 255, 255)


logging.getLogger("PIL").setLevel(logging.CRITICAL)  # of a broken file the reason is returned, with its name


@dataclass(frozen=True)
class Rendered:
    """A PNG file and its image's (H, W, channels)."""

    png: bytes
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Unreadable:
    """Why an image is left out."""

    reason: str


def render(
    image: sources.Image, channels: int, size: int | Sequence[int] | None, background: tuple[int, int, int] = WHITE
) -> Rendered | Unreadable:
    """Loads, turns upright, lays on a background, converts to grey or RGB, crops and resizes, and writes a PNG.

    Args:
        size: pixels on a side of a square, or (height, width); None leaves the size as it is.
        background: RGB of what shows through transparent pixels.
    """
    try:
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else _load(sources.read(image), size)
        if picture.mode.startswith(("I", "F")):
            return Unreadable(f"mode {picture.mode} has more than 8 bits a channel: convert it first")
        picture = _opaque(picture, background).convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        return Unreadable(str(error))
    except _UNREADABLE as error:
        return Unreadable(f"{type(error).__name__}: {error}")
    if size is not None:
        picture = center_crop(picture, size)
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return Rendered(stream.getvalue(), (picture.height, picture.width, channels))


def _load(data: bytes, size: int | Sequence[int] | None) -> Image.Image:
    """The pixels, upright. Where the file fails as it is, its metadata may be what is broken."""
    if not data:
        raise ValueError("the file is empty")
    try:
        return _decode(data, size)
    except _UNREADABLE as error:
        pixels_only = without_metadata(data)
        if isinstance(error, UnidentifiedImageError) and pixels_only is None:
            raise UnidentifiedImageError(unread_format(data)) from None
        if pixels_only is None or pixels_only == data:
            raise
        try:
            return _decode(pixels_only, size)
        except _UNREADABLE:
            raise error from None  # of the file as it is


def _decode(data: bytes, size: int | Sequence[int] | None) -> Image.Image:
    with _own_limit_of_pixels(), Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        if opened.width * opened.height > MOST_PIXELS and size is not None:
            height, width = _sides(size)
            opened.draft(None, (2 * width, 2 * height))  # a JPEG can be decoded at an eighth of its size
        if opened.width * opened.height > MOST_PIXELS:
            raise ValueError(f"{opened.width}x{opened.height} are more than {MOST_PIXELS} pixels: shrink it first")
        opened.load()
        method = _UPRIGHT.get(_orientation(opened))
        picture = opened.copy() if method is None else opened.transpose(method)
        return _with_true_transparency(picture, opened.format, data)


def _with_true_transparency(picture: Image.Image, form: str | None, data: bytes) -> Image.Image:
    """The image where Pillow gives a PNG's colour key in other units than its pixels, or a TGA alpha it has not."""
    key = picture.info.get("transparency")
    if form == "PNG" and isinstance(key, int | tuple):
        bits = data[24]  # of the header; grey of fewer is scaled to 8, of colours of 16 the upper 8 are kept
        factor = 255 // (2**bits - 1) if bits <= 8 else 1 / 256
        scaled = tuple(int(value * factor) for value in (key if isinstance(key, tuple) else (key,)))
        picture.info["transparency"] = scaled if isinstance(key, tuple) else scaled[0]
    # The descriptor says how many bits of alpha a pixel has; where it says none, a fourth byte of 0 means nothing.
    if form == "TGA" and picture.mode == "RGBA" and not data[17] & 0x0F and not picture.getchannel("A").getbbox():
        return picture.convert("RGB")
    return picture


@contextmanager
def _own_limit_of_pixels() -> Iterator[None]:
    """Pillow's limit is checked before an image can be told to decode smaller, and half of it prints a warning."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation; 1, upright, where the EXIF is broken or says nothing sensible."""
    try:
        stored = picture.getexif().get(_ORIENTATION, 1)
        return stored if isinstance(stored, int) else 1
    except _UNREADABLE:
        return 1


def _opaque(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image as it looks before a background: what colour lies below full transparency is never seen."""
    if not picture.has_transparency_data:
        return picture
    front = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", front.size, (*background, 255)), front)


def center_crop(picture: Image.Image, size: int | Sequence[int]) -> Image.Image:
    """A centred size x size image, as published ImageNet models were trained on, or one of (height, width).

    Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, released code (box halving,
    then bicubic to the shorter side, then the centre). Of other shapes, the side that is short for the shape counts.
    """
    height, width = _sides(size)
    picture = _middle_of_strip(picture, height, width)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    picture = picture.resize(
        (max(width, round(picture.width * scale)), max(height, round(picture.height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _middle_of_strip(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Without the ends of a long strip, which would be enlarged to any number of pixels before they are cut off."""
    scale = max(width / picture.width, height / picture.height)
    left, top = (
        max(0, side - int(_LONGEST * target / scale)) // 2
        for side, target in ((picture.width, width), (picture.height, height))
    )
    if left == top == 0:
        return picture
    return picture.crop((left, top, picture.width - left, picture.height - top))
