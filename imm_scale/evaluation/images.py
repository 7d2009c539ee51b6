"""Sets of images that lie somewhere: a folder of image files, WebDataset shards, or an .npz with arr_0."""

import io
import os
import zipfile
from collections.abc import Iterator
from typing import IO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from imm_scale import storage
from imm_scale.data import tar
from imm_scale.errors import UserError
from imm_scale.sampling import set_record

CHUNK = 64  # images read at once
_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "tif", "tiff")


class ImageSet(Protocol):
    """Images of one size, in a fixed order."""

    url: str

    def __len__(self) -> int: ...

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Index (n,) and uint8 images (n, H, W, 3 or 1), every `parts`-th chunk of CHUNK from the `part`-th on.

        Raises:
            UserError: a file that is no image, or images of different sizes.
        """
        ...


def find(url: str) -> ImageSet:
    """Raises UserError for what holds no images, or samples that are not all there."""
    set_record.check_finished(url)
    if url.endswith(".npz"):
        return NpzImages(url)
    names = storage.list_names(url)
    shards = [storage.join(url, name) for name in names if name.endswith(".tar")]
    if shards:
        return ShardImages(url, shards)
    files = sorted(_files_below(url))
    if not files:
        raise UserError(f"{url} holds no images: give a folder of image files or .tar shards, or an .npz with arr_0")
    return FolderImages(url, files)


def is_image_set(url: str) -> bool:
    """Whether something there may be a set of images, rather than weights."""
    if url.endswith(".npz"):
        return True
    names = storage.list_names(url)
    if "config.yaml" in names or "COMMITTED" in names:  # a run or a checkpoint, whatever pictures lie in it
        return False
    return any(name.lower().endswith((".tar", *_EXTENSIONS)) for name in names)


def _files_below(url: str) -> Iterator[str]:
    if storage.is_local(url):
        for parent, _, names in os.walk(storage.local_path(url)):
            yield from (os.path.join(parent, name) for name in names if _is_image(name))
    else:
        yield from (storage.join(url, name) for name in storage.list_names(url) if _is_image(name))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().rpartition(".")[2] in _EXTENSIONS


class _Stack:
    """Checks that images are alike, and stacks them."""

    def __init__(self) -> None:
        self._first: tuple[str, tuple[int, ...]] | None = None

    def decode(self, data: bytes, name: str) -> NDArray[np.uint8]:
        """(H, W, channels)."""
        try:
            with Image.open(io.BytesIO(data)) as picture:
                pixels = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise UserError(f"{name} is no readable image ({error}): remove it or write it again") from error
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        self._first = self._first or (name, pixels.shape)
        if pixels.shape != self._first[1]:
            a, b = (f"{w}x{h} with {c} channels" for h, w, c in (pixels.shape, self._first[1]))
            raise UserError(f"{name} is {a}, {self._first[0]} is {b}: images of one set must be of one size")
        return pixels


class FolderImages:
    """Image files anywhere below a folder, in the order of their names."""

    def __init__(self, url: str, files: list[str]):
        self.url, self._files = url, files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As `ImageSet.read`, (n,) and (n, H, W, C); chunks of files go to the parts in turn."""
        stack = _Stack()
        stack.decode(storage.read_bytes(self._files[0]), self._files[0])  # each rank compares with the same one
        for start in range(part * CHUNK, len(self._files), parts * CHUNK):
            files = self._files[start : start + CHUNK]
            images = np.stack([stack.decode(storage.read_bytes(name), name) for name in files])
            yield torch.arange(start, start + len(files)), torch.from_numpy(images)


class ShardImages:
    """WebDataset shards of KEY.png or the like, one shard in memory at a time."""

    def __init__(self, url: str, shards: list[str]):
        self.url, self._shards = url, shards
        self._counts: list[int] = [sum(1 for _ in self._images(shard)) for shard in shards]

    def __len__(self) -> int:
        return sum(self._counts)

    @staticmethod
    def _images(shard: str) -> Iterator[tuple[str, bytes]]:
        data = storage.read_bytes(shard)
        for key, files in tar.samples(data, shard):
            for extension, file in files.items():
                if extension.lower() in _EXTENSIONS:
                    yield f"{shard}:{key}.{extension}", data[file.offset : file.offset + file.size]

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As `ImageSet.read`, (n,) and (n, H, W, C); shards go to the parts in turn."""
        stack = _Stack()
        first = 0
        for number, (shard, count) in enumerate(zip(self._shards, self._counts, strict=True)):
            if number % parts == part:
                images = [stack.decode(data, name) for name, data in self._images(shard)]
                for start in range(0, count, CHUNK):
                    piece = np.stack(images[start : start + CHUNK])
                    yield torch.arange(first + start, first + start + len(piece)), torch.from_numpy(piece)
            first += count


class NpzImages:
    """arr_0 of an .npz, (N, H, W, 3 or 1) uint8, as the ADM evaluation suite and `imm-scale sample` write it."""

    def __init__(self, url: str):
        self.url = url
        try:
            with self._open() as file:
                self._shape = self._header(file)
        except (FileNotFoundError, KeyError, zipfile.BadZipFile, ValueError) as error:
            raise UserError(f"{url} is no .npz with images under arr_0 ({error})") from error

    def _open(self) -> IO[bytes]:
        local = storage.is_local(self.url)
        source = storage.local_path(self.url) if local else io.BytesIO(storage.read_bytes(self.url))
        return zipfile.ZipFile(source).open("arr_0.npy")

    @staticmethod
    def _header(file: IO[bytes]) -> tuple[int, ...]:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if len(shape) != 4 or fortran or dtype != np.uint8 or shape[3] not in (1, 3):
            raise ValueError(f"arr_0 is {dtype} of shape {shape}, not uint8 (N, H, W, 3 or 1)")
        return shape

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As `ImageSet.read`; every part streams the file and keeps its chunks."""
        size = int(np.prod(self._shape[1:]))
        with self._open() as file:
            self._header(file)
            for number, start in enumerate(range(0, len(self), CHUNK)):
                count = min(CHUNK, len(self) - start)
                data = file.read(count * size)
                if number % parts == part:
                    images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, *self._shape[1:])
                    yield torch.arange(start, start + count), images
