"""Finished samples, part by part: what a job that was stopped need not draw again.

A part is a WebDataset shard of a sample's files (KEY.png; of tokens KEY.tokens.npy and KEY.txt), KEY.cls and, where
asked for, KEY.latent.npy; beside it a record says what it holds and its sha256. It is written
after the shard, so a part with a record that fits is whole.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imm_scale import storage
from imm_scale.data import tar


@dataclass(frozen=True)
class Sample:
    """A finished sample: its files by ending, and its label."""

    key: str
    files: Mapping[str, bytes]
    label: int

    @property
    def image(self) -> NDArray[np.uint8]:
        """(H, W, channels)."""
        pixels = np.asarray(Image.open(io.BytesIO(self.files["png"])))
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    @property
    def latent(self) -> NDArray[np.float32] | None:
        """As the net drew it, where it was kept."""
        return self._array("latent.npy") if "latent.npy" in self.files else None

    @property
    def tokens(self) -> NDArray[np.int32]:
        """(T,) ids, of samples that are tokens."""
        return self._array("tokens.npy")

    def _array(self, ending: str) -> NDArray[Any]:
        return np.load(io.BytesIO(self.files[ending]), allow_pickle=False)


def key_of(index: int) -> str:
    """WebDataset key of sample number `index`."""
    return f"{index:06d}"


@dataclass(frozen=True)
class Parts:
    """The parts of one set of samples.

    Attributes:
        folder: URL they lie in.
        identity: hash of all that decides the samples; parts of another one are not kept.
        ranges: (first, last + 1) sample of each.
    """

    folder: str
    identity: str
    ranges: list[tuple[int, int]]

    def url(self, part: int) -> str:
        """URL of a part's shard, whether it is there or not."""
        return storage.join(self.folder, f"samples-{part:06d}.tar")

    def _record_url(self, part: int) -> str:
        return storage.join(self.folder, f"samples-{part:06d}.json")

    def _record(self, part: int, data: bytes) -> str:
        start, stop = self.ranges[part]
        sha256 = hashlib.sha256(data).hexdigest()
        return json.dumps({"identity": self.identity, "start": start, "stop": stop, "sha256": sha256}, indent=1)

    def is_intact(self, part: int) -> bool:
        """Whether the part is there, holds these samples, and is undamaged."""
        try:
            record = storage.read_text(self._record_url(part))
            return record == self._record(part, storage.read_bytes(self.url(part)))
        except FileNotFoundError:
            return False

    def write(
        self,
        part: int,
        files: Sequence[Mapping[str, bytes]],
        labels: Sequence[int],
        latents: NDArray[np.float32] | None = None,
    ) -> None:
        """Writes one part: n samples' files by ending, n labels, and latents (n, C, H', W') or None."""
        start, stop = self.ranges[part]
        assert len(files) == len(labels) == stop - start
        members = []
        for i, label in enumerate(labels):
            key = key_of(start + i)
            members += [tar.member(f"{key}.{ending}", content) for ending, content in files[i].items()]
            members.append(tar.member(f"{key}.cls", str(label).encode()))
            if latents is not None:
                members.append(tar.member(f"{key}.latent.npy", _npy(latents[i])))
        data = b"".join([*members, tar.end()])
        storage.write_bytes(self.url(part), data)
        storage.write_text(self._record_url(part), self._record(part, data))

    def read(self, part: int) -> Iterator[Sample]:
        """The samples of one part, in order."""
        data = storage.read_bytes(self.url(part))
        for key, files in tar.samples(data, self.url(part)):
            content = {name: data[file.offset : file.offset + file.size] for name, file in files.items()}
            yield Sample(key, content, int(content["cls"]))

    def clear(self) -> None:
        """Removes what killed writers left, and parts beyond the last, of a job that wanted more."""
        names = {storage.name(self.url(part)) for part in range(len(self.ranges))}
        names |= {storage.name(self._record_url(part)) for part in range(len(self.ranges))}
        for name in storage.list_names(self.folder):
            if name not in names:
                storage.remove(storage.join(self.folder, name))


def _npy(array: NDArray[np.float32]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
