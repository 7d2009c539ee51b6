"""WebDataset shards: neighbours KEY.jpg and KEY.cls, or KEY.json with a key for the label."""

import json
import posixpath
import re
import string
from collections.abc import Mapping
from typing import Any

from data_tools.sources import names
from data_tools.sources.base import Labelled, Slice, read
from data_tools.sources.tar_archive import Entries

_NUMBER = re.compile(r"(-?[0-9]{1,18})(\.0*)?")  # labels that were floats once too
_PADDING = string.whitespace + "\0"


def is_shard(entries: Entries) -> bool:
    """Whether a tar says labels: an image with a .cls, or with a .json where no image lies in a folder."""
    samples = list(_samples(entries).values())
    with_image = [files for files in samples if _image(files) is not None]
    flat = not any("/" in name for name in entries.files)
    return any("cls" in files or (flat and "json" in files) for files in with_image)


def labelled(path: str, entries: Entries, label_key: str) -> Labelled:
    """The samples of a shard; those without an image or a usable label are among the bad ones.

    Args:
        label_key: where the label stands in KEY.json.
    """
    result = Labelled(left_out=entries.left_out, keeps=list(entries.keeps))
    for key, files in _samples(entries).items():
        image, where = _image(files), f"{path}:{key}"
        if image is None:
            if "cls" in files:
                result.bad.append((where, f"it has {', '.join(files)}, but no image"))
            else:
                result.left_out.add("files that are no images", where, len(files))
            continue
        others = sum(map(_is_image, files)) - 1
        if others:
            result.left_out.add("further images of samples that have several", where, others)
        try:
            result.add(where, _label(files, label_key), image)
        except (OSError, ValueError, RecursionError) as error:
            result.bad.append((where, str(error)))
    return result


def _samples(entries: Entries) -> dict[str, dict[str, Slice]]:
    """{key: {extension: place}}, by the name up to its first dot; hidden files are left out."""
    samples: dict[str, dict[str, Slice]] = {}
    for name, place in entries.files.items():
        folder, base = posixpath.split(name)
        stem, dot, extension = base.partition(".")
        if dot and stem and not any(names.is_system(part, folder=True) for part in folder.split("/") if part != "."):
            samples.setdefault(posixpath.join(folder, stem), {})[extension.lower()] = place
    return samples


def _is_image(extension: str) -> bool:
    return names.is_image(f"x.{extension}")


def _image(files: Mapping[str, Slice]) -> Slice | None:
    """The image with the shortest extension, as KEY.png beside KEY.seg.png; of two such the first in the tar."""
    images = [extension for extension in files if _is_image(extension)]
    return files[min(images, key=lambda extension: extension.count("."))] if images else None


def _label(files: Mapping[str, Slice], key: str) -> int | str:
    if "cls" not in files and "json" not in files:
        raise ValueError(f"it has {', '.join(files)}, but no .cls")
    stored = "cls" if "cls" in files else "json"
    try:
        text = read(files[stored]).decode("utf-8-sig").strip(_PADDING)
    except UnicodeDecodeError as error:
        raise ValueError(f".{stored} holds bytes that are no text ({error})") from error
    label = text if stored == "cls" else _in_json(text, key)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, int | str) or label == "":
        raise ValueError(f".{stored} holds no label but {label!r}")
    number = _NUMBER.fullmatch(label) if isinstance(label, str) else None
    return int(number[1]) if number else label if isinstance(label, str) else int(label)


def _in_json(text: str, key: str) -> Any:
    document = json.loads(text)
    if not isinstance(document, dict) or key not in document:
        keys = ", ".join(map(str, document)) if isinstance(document, dict) else "none"
        raise ValueError(f".json has no key {key!r} (it has: {keys}): name the label's by --label-column")
    return document[key]
