"""Finished parts as what people and other programs read: a PNG grid, a folder of PNG files, an .npz."""

import io
import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imm_scale import storage
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.sampling.parts import Parts, Sample

FORMATS = ("grid", "folder", "text", "jsonl", "npz", "webdataset")
GRID_IMAGES = 400  # a sheet of more is not looked at
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever it is written


def image_grid(images: NDArray[np.uint8], labels: Sequence[int], cell: int = 0) -> Image.Image:
    """A row a class, a column a sample; a near-square sheet where that would be a single row or column.

    Args:
        images: (N, H, W, 3 or 1) uint8, image i of class labels[i mod n].
        cell: least side of a cell; smaller images are enlarged without smoothing. 0 keeps the size.
    """
    places = _places([labels[i % len(labels)] for i in range(len(images))])
    rows, columns = (max(place[axis] for place in places) + 1 for axis in (0, 1))
    height, width, channels = images.shape[1:]
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 128, np.uint8)
    for image, (row, column) in zip(images, places, strict=True):
        top, left = row * (height + 1), column * (width + 1)
        sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
    factor = max(1, -(-cell // min(height, width)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _places(labels: Sequence[int]) -> list[tuple[int, int]]:
    """(row, column) of each image."""
    rows: dict[int, int] = {}
    filled: dict[int, int] = {}
    places = []
    for label in labels:
        row = rows.setdefault(label, len(rows))
        places.append((row, filled.get(row, 0)))
        filled[row] = filled.get(row, 0) + 1
    if len(labels) > 3 and (len(rows) == 1 or max(filled.values()) == 1):
        side = int(np.ceil(np.sqrt(len(labels))))
        return [divmod(i, side) for i in range(len(labels))]
    return places


def _samples(parts: Parts) -> Iterator[Sample]:
    for part in range(len(parts.ranges)):
        yield from parts.read(part)


def write_grid(url: str, parts: Parts) -> None:
    """The first GRID_IMAGES samples on one sheet."""
    shown = list(itertools.islice(_samples(parts), GRID_IMAGES))
    picture = io.BytesIO()
    images = np.stack([sample.image for sample in shown])
    image_grid(images, [sample.label for sample in shown], cell=32).save(picture, "PNG")
    storage.write_bytes(url, picture.getvalue())


def write_folder(url: str, parts: Parts, world: World) -> None:
    """KEY.png of every sample, ranks sharing the work, and dataset.json with the labels (as EDM's tools read it)."""
    labels: list[list[Any]] = []
    for part in range(len(parts.ranges)):
        mine = part % world.size == world.rank
        if mine or world.is_main:
            for sample in parts.read(part):
                if mine:
                    storage.write_bytes(storage.join(url, f"{sample.key}.png"), sample.files["png"])
                labels.append([f"{sample.key}.png", sample.label])
    distributed.barrier()
    if world.is_main:
        storage.write_text(storage.join(url, "dataset.json"), json.dumps({"labels": labels}))


def write_text(url: str, parts: Parts) -> None:
    """The texts of all samples, each behind a line that numbers it and names its class."""
    lines = []
    for sample in _samples(parts):
        lines += [f"--- sample {int(sample.key)}, class {sample.label}", sample.files["txt"].decode()]
    storage.write_text(url, "\n".join([*lines, ""]))


def write_jsonl(url: str, parts: Parts) -> None:
    """A JSON object a line for each sample: its key, label, tokens, and text where they stand for some."""
    lines = []
    for sample in _samples(parts):
        said: dict[str, Any] = {"key": sample.key, "label": sample.label, "tokens": sample.tokens.tolist()}
        if "txt" in sample.files:
            said["text"] = sample.files["txt"].decode()
        lines.append(json.dumps(said))
    storage.write_text(url, "\n".join([*lines, ""]))


def write_npz(url: str, parts: Parts, settings: dict[str, Any]) -> None:
    """arr_0 (N, H, W, C) uint8 images and arr_1 labels, as the ADM evaluation suite reads them; latents if kept.

    Of tokens that are no images arr_0 are the ids (N, T).

    Written array by array through a temporary file, so memory holds one part at a time.
    """
    num = parts.ranges[-1][1]
    first = next(parts.read(0))
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, "samples.npz")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            shown = "image" if "png" in first.files else "tokens"
            _stream(archive, "arr_0", getattr(first, shown), num, (getattr(one, shown) for one in _samples(parts)))
            label = np.int64(0)
            _stream(archive, "arr_1", label, num, (np.int64(sample.label) for sample in _samples(parts)))
            if first.latent is not None:
                _stream(archive, "latents", first.latent, num, (sample.latent for sample in _samples(parts)))
            _stream(archive, "settings", np.array(json.dumps(settings, sort_keys=True)), None, ())
        storage.write_file(url, path)


def _stream(archive: zipfile.ZipFile, name: str, like: Any, num: int | None, rows: Any) -> None:
    """One array of an .npz: `num` rows of the shape and type of `like`, or `like` itself."""
    like = np.asarray(like)
    shape = like.shape if num is None else (num, *like.shape)
    fields = {"descr": np.lib.format.dtype_to_descr(like.dtype), "fortran_order": False, "shape": shape}
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME), "w", force_zip64=True) as file:
        _header(file, fields)
        for row in [like] if num is None else rows:
            file.write(np.ascontiguousarray(row).tobytes())


def _header(file: IO[bytes], fields: dict[str, Any]) -> None:
    np.lib.format.write_array_header_1_0(file, fields)
