"""Labelled images as they are found in a source, and their bytes."""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imm_scale.errors import explain_lfs_pointer

_ENCRYPTED = 0x1  # flag of a ZIP's entry
_MOST_BYTES = 1 << 30  # of an image's file: a larger one is no photograph, and could fill the memory


@dataclass(frozen=True, slots=True)
class Slice:
    """An image file inside another one."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ZipMember:
    """An image file in a ZIP archive: the name the archive's reader gives it, and where in the archive it begins."""

    path: str
    name: str
    start: int


Image = str | Slice | ZipMember | NDArray[np.uint8]


@dataclass
class LeftOut:
    """What of a source is no image to pack: for each reason how many files or folders, and one of them."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Counts `count` more of this reason."""
        before, example = self.reasons.get(reason, (0, name))
        self.reasons[reason] = before + count, example

    def merge(self, other: "LeftOut") -> None:
        """Adds what another one counted."""
        for reason, (count, example) in other.reasons.items():
            self.add(reason, example, count)


@dataclass
class Labelled:
    """Images with labels as they stand in the source: numbers, or names of classes.

    Attributes:
        class_names: names of the numbers 0, 1, ..., where the source says them.
        folders: names of classes that have a folder, with or without images.
        titles: what stands for a class beside its name: {"n01440764": "tench, Tinca tinca"}.
        bad: images that cannot be used, with the reason.
        notes: what looks as if something else was meant, as sentences.
        keeps: what must live as long as the images.
    """

    names: list[str] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    class_names: list[str] | None = None
    folders: set[str] = field(default_factory=set)
    titles: dict[str, str] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)
    keeps: list[Any] = field(default_factory=list)

    def add(self, name: str, label: int | str, image: Image) -> None:
        """One more image."""
        self.names.append(name)
        self.labels.append(label)
        self.images.append(image)

    def extend(self, other: "Labelled") -> None:
        """Adds the images of another archive of the same source."""
        self.names += other.names
        self.labels += other.labels
        self.images += other.images
        self.folders |= other.folders
        self.titles |= other.titles
        self.bad += other.bad
        self.left_out.merge(other.left_out)
        self.notes += other.notes
        self.keeps += other.keeps


@dataclass(frozen=True)
class Source:
    """Images with labels, numbers of `class_names`; the other fields are those of `Labelled`.

    An image is a path, a place inside a file, or (H, W) or (H, W, 3) uint8 values already in memory.
    """

    class_names: list[str]
    names: list[str]
    labels: list[int]
    images: Sequence[Image]
    bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)
    keeps: Any = field(default=None, compare=False)


def read(image: str | Slice | ZipMember, most: int = -1) -> bytes:
    """The bytes of an image's file, or at most so many from its beginning.

    Raises:
        OSError: the file cannot be read, or is a Git LFS pointer.
        ValueError: it is too large for an image.
        RuntimeError, zipfile.BadZipFile, zlib.error: it is encrypted, compressed in an unknown way or damaged.
    """
    data = _read_member(image, most) if isinstance(image, ZipMember) else _read_file(image, most)
    pointer = explain_lfs_pointer(data)
    if pointer is not None:
        raise OSError(pointer)
    return data


def _read_file(image: str | Slice, most: int) -> bytes:
    path, offset, size = (image, 0, None) if isinstance(image, str) else (image.path, image.offset, image.size)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        _check_size(size if most < 0 else most)
        file.seek(offset)
        return file.read(size if most < 0 else min(size, most))


def _read_member(member: ZipMember, most: int) -> bytes:
    archive = open_zip(member.path)
    info = archive.getinfo(member.name)
    if info.header_offset != member.start:  # several have this name, if only in the code page of the archiver
        info = next(info for info in archive.infolist() if info.header_offset == member.start)
    _check_size(info.file_size if most < 0 else most)
    if info.flag_bits & _ENCRYPTED:
        raise RuntimeError("protected by a password: unpack the archive first")
    try:
        with archive.open(info) as file:
            return file.read(most)
    except NotImplementedError as error:
        raise RuntimeError(
            f"compressed by method {info.compress_type}, which Python cannot read: unpack the archive first"
        ) from error


def _check_size(size: int) -> None:
    if size > _MOST_BYTES:
        raise ValueError(f"a file of {size} bytes is no image to train on: at most {_MOST_BYTES} are read")


@lru_cache(maxsize=64)
def open_zip(path: str) -> zipfile.ZipFile:
    """A ZIP archive that stays open in this process. Raises OSError, zipfile.BadZipFile."""
    return zipfile.ZipFile(path)
