"""One shard: a plain WebDataset tar of `KEY.latent.npy` and `KEY.cls`, and an index that lets a range be checked.

All samples of a shard take the same number of bytes, so a block of neighbours is one ranged read and one strided
view. Stock webdataset reads the same tar.
"""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imm_scale import storage
from imm_scale.data.manifest import ShardInfo
from imm_scale.errors import UserError

LATENT_DTYPE = np.dtype("<f2")
# offset and length: byte range of the npy file inside the tar; crc32: of those bytes.
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("length", "<i8"), ("crc32", "<u4"), ("label", "<i4")])


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The bytes of a npy file before its data, for a C-ordered fp16 array."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": LATENT_DTYPE.str, "fortran_order": False, "shape": tuple(int(n) for n in shape)}
    )
    return stream.getvalue()


def tar_member(name: str, data: bytes) -> bytes:
    """A header and the padded data of one file, the same bytes whenever and by whomever it is written.

    Raises:
        UserError: a name that does not fit a plain (ustar) header.
    """
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mtime = 0
    try:
        header = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise UserError(f"sample name {name!r} does not fit a tar header ({error}): use a shorter one") from error
    return header + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def tar_end() -> bytes:
    """The two empty blocks that end an archive."""
    return bytes(2 * tarfile.BLOCKSIZE)


def write_shard(
    folder: str, name: str, keys: Sequence[str], latents: NDArray[np.float16], labels: Sequence[int]
) -> ShardInfo:
    """Writes `NAME.tar`, then `NAME.index.npy`, each whole or not at all.

    Args:
        folder: URL of the manifest's folder.
        name: file name of the shard, ending in .tar.
        keys: n sample names without dots.
        latents: (n, C', H, W) fp16, finite.
        labels: n class indices.

    Raises:
        UserError: values that are not finite, or a key that would not come back from the tar.
    """
    assert len(keys) == len(latents) == len(labels) > 0 and latents.dtype == LATENT_DTYPE
    if not np.isfinite(latents).all():
        bad = int(np.argmin(np.isfinite(latents).reshape(len(latents), -1).all(axis=1)))
        raise UserError(f"shard {name}: sample {keys[bad]} has values that fp16 cannot hold; check the codec's weights")
    header = npy_header(latents.shape[1:])
    index = np.empty(len(keys), INDEX_DTYPE)
    pieces: list[bytes] = []
    position = 0
    for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
        if "." in key:
            raise UserError(f"shard {name}: key {key!r} has a dot, which ends the key in a WebDataset tar: rename it")
        payload = header + latents[i].tobytes()
        index[i] = (position + tarfile.BLOCKSIZE, len(payload), zlib.crc32(payload), label)
        record = tar_member(f"{key}.latent.npy", payload) + tar_member(f"{key}.cls", str(int(label)).encode())
        pieces.append(record)
        position += len(record)
    data = b"".join([*pieces, tar_end()])
    stream = io.BytesIO()
    np.save(stream, index, allow_pickle=False)
    info = ShardInfo(name, len(keys), len(data), _sha256(data), _sha256(stream.getvalue()))
    storage.write_bytes(storage.join(folder, name), data)
    storage.write_bytes(storage.join(folder, info.index_name), stream.getvalue())
    return info


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class ShardReader:
    """Ranged, checked reads of one shard. Make it with `open_shard`."""

    url: str
    index: NDArray[Any]
    stored_shape: tuple[int, int, int]
    stride: int

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) class indices of all samples of the shard."""
        return self.index["label"].astype(np.int64)

    def read(self, start: int, stop: int) -> NDArray[np.float16]:
        """Samples [start, stop) by one ranged read: a (n, C', H, W) fp16 array of its own.

        Raises:
            UserError: the shard ends early, a sample's checksum is wrong, or its array is not of the stored shape.
        """
        rows = self.index[start:stop]
        first, length, n = int(rows["offset"][0]), int(rows["length"][0]), len(rows)
        wanted = (n - 1) * self.stride + length
        data = storage.read_range(self.url, first, first + wanted)
        self._check(data, rows, start, first, length, wanted)
        files = np.lib.stride_tricks.as_strided(
            np.frombuffer(data, np.uint8), shape=(n, length), strides=(self.stride, 1), writeable=False
        )
        header = np.frombuffer(npy_header(self.stored_shape), np.uint8)
        alike = (files[:, : len(header)] == header).all(axis=1)
        if not alike.all():
            raise UserError(
                f"shard {self.url}: sample {start + int(np.argmin(alike))} is no fp16 array of shape "
                f"{self.stored_shape}: the shard was not written by data_tools.encode, encode it again"
            )
        return files[:, len(header) :].view(LATENT_DTYPE).reshape(n, *self.stored_shape).copy()

    def _check(self, data: bytes, rows: NDArray[Any], start: int, first: int, length: int, wanted: int) -> None:
        if len(data) != wanted:
            raise UserError(
                f"shard {self.url} ends at byte {first + len(data)}, samples {start} to {start + len(rows) - 1} reach "
                f"to byte {first + wanted}: the file was cut short, copy or encode it again"
            )
        view = memoryview(data)
        for i, expected in enumerate(rows["crc32"].tolist()):
            actual = zlib.crc32(view[i * self.stride : i * self.stride + length])
            if actual != expected:
                raise UserError(
                    f"shard {self.url}: sample {start + i} at byte {first + i * self.stride} has crc32 {actual:08x}, "
                    f"its index says {expected:08x}: the file is damaged, copy or encode it again"
                )


def open_shard(folder: str, info: ShardInfo, stored_shape: tuple[int, int, int], num_classes: int) -> ShardReader:
    """Checks a shard's size and index against the manifest, without reading its samples.

    Raises:
        UserError: a missing, short or long shard; an index that is missing, changed, or describes something else.
    """
    url = storage.join(folder, info.name)
    index_url = storage.join(folder, info.index_name)
    try:
        size = storage.size(url)
    except FileNotFoundError as error:
        raise UserError(f"shard {url} of the manifest is missing: copy it there or encode it again") from error
    try:
        index_bytes = storage.read_bytes(index_url)
    except FileNotFoundError as error:
        raise UserError(f"index {index_url} is missing: copy it there or encode the shard again") from error
    if size != info.bytes:
        raise UserError(
            f"shard {url} has {size} bytes, the manifest says {info.bytes}: "
            f"the file is {'cut short' if size < info.bytes else 'another one'}, copy or encode it again"
        )
    if _sha256(index_bytes) != info.index_sha256:
        raise UserError(f"index {index_url} has another sha256 than the manifest says: copy or encode it again")
    index = np.load(io.BytesIO(index_bytes), allow_pickle=False)
    stride = _check_index(index, index_url, info, stored_shape, num_classes)
    return ShardReader(url=url, index=index, stored_shape=stored_shape, stride=stride)


def _check_index(
    index: NDArray[Any], index_url: str, info: ShardInfo, stored_shape: tuple[int, int, int], num_classes: int
) -> int:
    """The distance in bytes from one sample to the next."""
    if index.dtype != INDEX_DTYPE or index.shape != (info.samples,):
        raise UserError(
            f"index {index_url} has {index.shape} rows of {index.dtype}, the manifest says {info.samples} samples "
            f"of {INDEX_DTYPE}: encode the shard again"
        )
    length = len(npy_header(stored_shape)) + int(np.prod(stored_shape)) * LATENT_DTYPE.itemsize
    steps = np.diff(index["offset"])
    stride = int(steps[0]) if len(steps) else length
    if (steps != stride).any() or stride < length or (index["length"] != length).any():
        raise UserError(f"index {index_url}: samples are not of one length {length}: encode the shard again")
    if index["offset"][0] < 0 or int(index["offset"][-1]) + length > info.bytes:
        raise UserError(f"index {index_url} points outside the shard's {info.bytes} bytes: encode the shard again")
    labels = index["label"]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"index {index_url} has labels from {labels.min()} to {labels.max()}, the manifest {num_classes} classes: "
            "encode the shard again"
        )
    return stride
