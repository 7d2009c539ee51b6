"""Finished samples, part by part: what a job that was stopped need not draw again.

A part is a WebDataset shard of KEY.png, KEY.cls and, where asked for, KEY.latent.npy; beside it a record says what it
holds and its sha256. It is written after the shard, so a part with a record that fits is whole.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imm_scale import storage
from imm_scale.data import tar
from imm_scale.errors import UserError


@dataclass(frozen=True)
class Sample:
    """A finished sample: its PNG file, label, and latent where it was kept."""

    key: str
    png: bytes
    label: int
    latent: NDArray[np.float32] | None

    @property
    def image(self) -> NDArray[np.uint8]:
        """(H, W, channels)."""
        pixels = np.asarray(Image.open(io.BytesIO(self.png)))
        return pixels[:, :, None] if pixels.ndim == 2 else pixels


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
        self, part: int, images: NDArray[np.uint8], labels: list[int], latents: NDArray[np.float32] | None
    ) -> None:
        """Writes one part: images (n, H, W, 3 or 1), labels n, latents (n, C, H', W') or None."""
        start, stop = self.ranges[part]
        assert len(images) == len(labels) == stop - start
        members = []
        for i, label in enumerate(labels):
            key = key_of(start + i)
            members.append(tar.member(f"{key}.png", _png(images[i])))
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
            latent = np.load(io.BytesIO(content["latent.npy"])) if "latent.npy" in content else None
            yield Sample(key, content["png"], int(content["cls"]), latent)

    def clear(self) -> None:
        """Removes what killed writers left, and parts beyond the last, of a job that wanted more."""
        names = {storage.name(self.url(part)) for part in range(len(self.ranges))}
        names |= {storage.name(self._record_url(part)) for part in range(len(self.ranges))}
        for name in storage.list_names(self.folder):
            if name not in names:
                storage.remove(storage.join(self.folder, name))


def _png(image_HWC: NDArray[np.uint8]) -> bytes:
    channels = image_HWC.shape[-1]
    if channels not in (1, 3):
        raise UserError(f"images have {channels} channels: PNG takes 1 or 3")
    stream = io.BytesIO()
    Image.fromarray(image_HWC[:, :, 0] if channels == 1 else image_HWC).save(stream, "PNG")
    return stream.getvalue()


def _npy(array: NDArray[np.float32]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
