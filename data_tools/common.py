"""What the data tools share: JSON files, and the description of packed images."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from imm_scale import storage
from imm_scale.errors import UserError, explain_os_error

PACK_NAME = "pack.json"
LABELS_NAME = "labels.json"
PACK_VERSION = 1


@contextlib.contextmanager
def paths_are_the_users() -> Iterator[None]:
    """Around a tool's work: a full disk, a quota, or a path without rights raises UserError."""
    try:
        yield
    except OSError as error:
        mistake = explain_os_error(error)
        if mistake is None:
            raise
        raise mistake from error


def read_json(url: str) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, and UserError if the file holds something else."""
    try:
        document = json.loads(storage.read_text(url))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{url} is not JSON ({error}): remove it and run the tool that wrote it again") from error
    if not isinstance(document, dict):
        raise UserError(f"{url} holds no JSON object: remove it and run the tool that wrote it again")
    return document


def write_json(url: str, document: dict[str, Any]) -> None:
    """Writes a document with sorted keys, so that equal ones are equal bytes."""
    storage.write_text(url, json.dumps(document, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class ImageShard:
    """One tar of KEY.png and KEY.cls."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Pack:
    """A finished folder of image shards. `image_shape` is (H, W, channels), `arguments` what pack was asked for."""

    arguments: dict[str, Any]
    image_shape: tuple[int, int, int]
    num_unreadable: int
    shards: tuple[ImageShard, ...]
    format_version: int = PACK_VERSION

    @property
    def num_images(self) -> int:
        """Images of all shards."""
        return sum(shard.samples for shard in self.shards)

    def save(self, folder: str) -> None:
        """Writes pack.json; it is written last, so a pack with one is whole."""
        write_json(storage.join(folder, PACK_NAME), asdict(self))


def load_pack(folder: str) -> Pack:
    """Reads a folder's pack.json. Raises FileNotFoundError, and UserError if it is not one this program reads."""
    url = storage.join(folder, PACK_NAME)
    document = read_json(url)
    if document.get("format_version") != PACK_VERSION:
        raise UserError(f"{url} has format version {document.get('format_version')}, this program reads {PACK_VERSION}")
    try:
        height, width, channels = map(_count, document["image_shape"])
        return Pack(
            arguments=dict(document["arguments"]),
            image_shape=(height, width, channels),
            num_unreadable=document["num_unreadable"],
            shards=_shards(document["shards"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{url} lacks or misnames a field ({error}): remove it and pack again") from error


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r}: a whole number above 0 is needed")
    return value


def _shards(documents: list[dict[str, Any]]) -> tuple[ImageShard, ...]:
    if not documents:
        raise ValueError("no shards")
    shards = tuple(ImageShard(**document) for document in documents)
    for shard in shards:
        _count(shard.samples), _count(shard.bytes)
        if not isinstance(shard.name, str) or shard.name != storage.name(shard.name):
            raise ValueError(f"{shard.name!r}: the name of a file in this folder is needed")
    return shards
