"""Shards of images, and what is known of each when it is written, so that an interrupted job goes on after it."""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from data_tools.common import ImageShard, read_json, write_json
from imm_scale import storage
from imm_scale.data import tar
from imm_scale.errors import UserError

EXAMPLES = 8  # images of a class whose places are kept, for the contact sheet
_RECORD = re.compile(r"images-\d{6}\.json")


@dataclass(frozen=True)
class Bad:
    """An image that is left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Example:
    """Where the PNG of an image lies: bytes [offset, offset + size) of a shard."""

    label: int
    offset: int
    size: int


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, written after it.

    Attributes:
        arguments: those of the whole job.
        shape: (H, W, channels) of its images.
        first_name: the image that had this shape first.
        consumed: images of the shuffled source up to its end, the bad ones among them.
        bad: since the shard before.
        labels: how many images each class has in it.
        examples: images that are among the first of their class.
    """

    arguments: dict[str, Any]
    shard: ImageShard
    shape: tuple[int, int, int]
    first_name: str
    consumed: int
    bad: list[Bad]
    labels: dict[int, int]
    examples: list[Example]

    def save(self, out: str) -> None:
        """Writes it beside its shard."""
        write_json(storage.join(out, record_name(self.shard.name)), asdict(self))

    @classmethod
    def load(cls, url: str) -> "ShardRecord | None":
        """Reads one; None if there is none, or if it is of another version."""
        try:
            stored = read_json(url)
            return cls(
                stored["arguments"],
                ImageShard(**stored["shard"]),
                tuple(stored["shape"]),
                stored["first_name"],
                stored["consumed"],
                [Bad(**bad) for bad in stored["bad"]],
                {int(label): count for label, count in stored["labels"].items()},
                [Example(**example) for example in stored["examples"]],
            )
        except (FileNotFoundError, UserError, KeyError, TypeError, ValueError):
            return None


def shard_name(i: int) -> str:
    """File of shard i."""
    return f"images-{i:06d}.tar"


def record_name(shard: str) -> str:
    """File of a shard's record."""
    return shard.removesuffix(".tar") + ".json"


def is_record(name: str) -> bool:
    """Whether a file is a shard's record."""
    return _RECORD.fullmatch(name) is not None


def finished(out: str, arguments: dict[str, Any], moved: bool = False) -> list[ShardRecord]:
    """Records of the first shards of this job that are whole; `moved`: its source may have been at another place."""
    records: list[ShardRecord] = []
    while (record := ShardRecord.load(storage.join(out, record_name(shard_name(len(records)))))) is not None:
        url = storage.join(out, record.shard.name)
        began = {**record.arguments, "source": arguments["source"]} if moved else record.arguments
        if began != arguments or not storage.exists(url) or storage.size(url) != record.shard.bytes:
            break
        records.append(record)
    return records


@dataclass
class ShardWriter:
    """Gathers images into tars of at most so many bytes (but one image) and samples, each written whole.

    Attributes:
        arguments: those of the job, for the records.
        records: shards that are finished.
        shape: (H, W, channels) of all images, and the name of the first; None before there is one.
    """

    out: str
    arguments: dict[str, Any]
    records: list[ShardRecord]
    shape: tuple[int, int, int] | None = None
    first_name: str = ""
    consumed: int = 0
    bad: list[Bad] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    _members: list[bytes] = field(default_factory=list)
    _labels: dict[int, int] = field(default_factory=dict)
    _examples: list[Example] = field(default_factory=list)
    _bytes: int = 0
    _recorded_bad: int = 0

    def __post_init__(self) -> None:
        for record in self.records:
            self.bad += record.bad
            for label, count in record.labels.items():
                self.counts[label] = self.counts.get(label, 0) + count
            self.shape, self.first_name, self.consumed = record.shape, record.first_name, record.consumed
        self._recorded_bad = len(self.bad)

    @property
    def num_images(self) -> int:
        """Images added so far."""
        return sum(self.counts.values())

    def add(self, png: bytes, label: int) -> None:
        """One more image. Writes the shard before it, where that is full."""
        key = f"{self.num_images:08d}"
        record = tar.member(f"{key}.png", png) + tar.member(f"{key}.cls", str(label).encode())
        full = self._bytes + len(record) + len(tar.end()) > self.arguments["shard_bytes"]
        if full or sum(self._labels.values()) == self.arguments["shard_samples"]:
            self.flush()
        if self.counts.get(label, 0) < EXAMPLES:
            self._examples.append(Example(label, self._bytes + tar.BLOCK, len(png)))
        self._members.append(record)
        self._bytes += len(record)
        self.counts[label] = self.counts.get(label, 0) + 1
        self._labels[label] = self._labels.get(label, 0) + 1

    def flush(self) -> None:
        """Writes what is gathered, if anything, and then its record."""
        if not self._members:
            return
        assert self.shape is not None
        name = shard_name(len(self.records))
        data = b"".join([*self._members, tar.end()])
        storage.write_bytes(storage.join(self.out, name), data)
        shard = ImageShard(name, sum(self._labels.values()), len(data), hashlib.sha256(data).hexdigest())
        new_bad = self.bad[self._recorded_bad :]
        record = ShardRecord(
            self.arguments, shard, self.shape, self.first_name, self.consumed, new_bad, self._labels, self._examples
        )
        record.save(self.out)
        self.records.append(record)
        self._recorded_bad = len(self.bad)
        self._members, self._labels, self._examples, self._bytes = [], {}, [], 0
