"""One shard: a plain WebDataset tar of `KEY.latent.npy` and `KEY.cls`, and an index that lets a range be checked.

Where mirrored images were encoded too, `KEY.latent_flip.npy` stands between the two; sequences of tokens are
`KEY.tokens.npy`, whole numbers of the type that their vocabulary needs. All samples of a shard of ours
take the same number of bytes, so a block of neighbours is one ranged read and one strided view. Stock webdataset reads
the same tar, and shards of its ShardWriter are read here once they have an index.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal import isal_zlib  # zlib's crc32, fifty times as fast
from numpy.typing import NDArray

from imm_scale import storage
from imm_scale.data import tar
from imm_scale.data.manifest import Manifest, ShardInfo
from imm_scale.errors import UserError

LATENT_DTYPE = np.dtype("<f2")
LATENT, FLIPPED, TOKENS, LABEL = "latent.npy", "latent_flip.npy", "tokens.npy", "cls"
_STORED_DTYPES = ("<f2", "|u1", "<u2", "<i4")  # latents, then tokens
_COLUMNS = [("offset", "<i8"), ("length", "<i8"), ("crc32", "<u4"), ("label", "<i4")]
# offset and length: byte range of the npy file inside the tar; crc32: of those bytes.
INDEX_DTYPE = np.dtype(_COLUMNS)
# With mirrored latents: the same of their files, whose length is equal.
FLIPPED_INDEX_DTYPE = np.dtype([*_COLUMNS, ("flip_offset", "<i8"), ("flip_crc32", "<u4")])


class DamagedBlockError(UserError):
    """Bytes of a shard that are not what its index says; another reading may be better."""


def index_dtype(flipped: bool) -> np.dtype[Any]:
    """Type of an index's rows, with or without mirrored latents."""
    return FLIPPED_INDEX_DTYPE if flipped else INDEX_DTYPE


def stored_name(dtype: np.dtype[Any]) -> str:
    """What the file of a stored array is called in a tar, behind its key."""
    return LATENT if dtype.kind == "f" else TOKENS


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any] = LATENT_DTYPE) -> bytes:
    """The bytes of a npy file before its data, for a C-ordered array."""
    return _npy_header(dtype.str, shape)


def _npy_header(descr: Any, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": tuple(int(n) for n in shape)}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def write_shard(
    folder: str,
    name: str,
    keys: Sequence[str],
    latents: NDArray[Any],
    labels: Sequence[int],
    mirrored: NDArray[Any] | None = None,
) -> ShardInfo:
    """Writes `NAME.tar`, then `NAME.index.npy`, each whole or not at all.

    Args:
        folder: URL of the manifest's folder.
        name: file name of the shard, ending in .tar.
        keys: n sample names without dots.
        latents: (n, C', H, W) fp16, finite; or (n, T) tokens of uint8, uint16 or int32.
        labels: n class indices.
        mirrored: latents of the mirrored images, if the data set holds them.

    Raises:
        UserError: values that are not finite, or a key that would not come back from the tar.
    """
    assert len(keys) == len(latents) == len(labels) > 0 and latents.dtype.str in _STORED_DTYPES
    for values in (latents, mirrored):
        if values is not None and not np.isfinite(values).all():
            bad = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(axis=1)))
            raise UserError(
                f"shard {name}: sample {keys[bad]} has values that fp16 cannot hold; check the codec's weights"
            )
    data, index = _build(name, keys, latents, labels, mirrored)
    stream = io.BytesIO()
    np.save(stream, index, allow_pickle=False)
    info = ShardInfo(name, len(keys), len(data), _sha256(data), _sha256(stream.getvalue()))
    storage.write_bytes(storage.join(folder, name), data)
    storage.write_bytes(storage.join(folder, info.index_name), stream.getvalue())
    return info


def _build(
    name: str,
    keys: Sequence[str],
    latents: NDArray[Any],
    labels: Sequence[int],
    mirrored: NDArray[Any] | None,
) -> tuple[bytes, NDArray[Any]]:
    """The tar's bytes and its index."""
    header, file_name = npy_header(latents.shape[1:], latents.dtype), stored_name(latents.dtype)
    index = np.empty(len(keys), index_dtype(mirrored is not None))
    pieces: list[bytes] = []
    position = 0

    def add(member: str, content: bytes) -> int:
        nonlocal position
        pieces.append(tar.member(member, content))
        offset = position + tar.BLOCK
        position += len(pieces[-1])
        return offset

    for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
        if "." in key:
            raise UserError(f"shard {name}: key {key!r} has a dot, which ends the key in a WebDataset tar: rename it")
        payload = header + latents[i].tobytes()
        index["offset"][i] = add(f"{key}.{file_name}", payload)
        index["length"][i], index["crc32"][i], index["label"][i] = len(payload), isal_zlib.crc32(payload), label
        if mirrored is not None:
            payload = header + mirrored[i].tobytes()
            index["flip_offset"][i] = add(f"{key}.{FLIPPED}", payload)
            index["flip_crc32"][i] = isal_zlib.crc32(payload)
        add(f"{key}.{LABEL}", str(int(label)).encode())
    return b"".join([*pieces, tar.end()]), index


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class ShardReader:
    """Checked samples out of ranges of one shard. Make it with `open_shard`.

    Attributes:
        dtype: of the stored arrays.
        vocabulary: tokens are 0 to vocabulary - 1; None of latents.
    """

    url: str
    sha256: str
    index: NDArray[Any]
    stored_shape: tuple[int, ...]
    dtype: np.dtype[Any] = LATENT_DTYPE
    vocabulary: int | None = None

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) class indices of all samples of the shard."""
        return self.index["label"].astype(np.int64)

    @property
    def variants(self) -> int:
        """Latents per sample: 1, or 2 with the mirrored ones."""
        return 2 if self.index.dtype == FLIPPED_INDEX_DTYPE else 1

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The bytes of the tar from the first file of sample `start` to the last one of sample `stop` - 1."""
        first, last = self.index[start], self.index[stop - 1]
        end = last["flip_offset"] if self.variants == 2 else last["offset"]
        return int(first["offset"]), int(end + last["length"])

    def decode(self, data: bytes | memoryview, start: int, stop: int, out: NDArray[Any]) -> None:
        """Checks the bytes of `span(start, stop)` and copies what they hold to `out`, (n, variants, *stored shape).

        `out` with one variant takes the latents of the images as they are.

        Raises:
            DamagedBlockError: too few bytes, or a sample whose checksum is wrong.
            UserError: an array that is not of the stored shape, or a token outside the vocabulary.
        """
        rows = self.index[start:stop]
        first, end = self.span(start, stop)
        if len(data) != end - first:
            raise DamagedBlockError(
                f"shard {self.url} ends at byte {first + len(data)}, samples {start} to {stop - 1} reach to byte "
                f"{end}: the file was cut short, copy or encode it again"
            )
        header = np.frombuffer(npy_header(self.stored_shape, self.dtype), np.uint8)
        for variant in range(out.shape[1]):
            prefix = "flip_" if variant else ""
            offsets = rows[f"{prefix}offset"] - first
            length = int(rows["length"][0])
            self._check_sums(memoryview(data), offsets.tolist(), length, rows[f"{prefix}crc32"].tolist(), start, first)
            files = _files(data, offsets, length)
            alike = (files[:, : len(header)] == header).all(axis=1)
            if not alike.all():
                raise UserError(
                    f"shard {self.url}: sample {start + int(np.argmin(alike))} is no {_shown(self.dtype)} array of "
                    f"shape {self.stored_shape}: the shard was not written by imm-scale encode, encode it again"
                )
            out[:, variant] = files[:, len(header) :].view(self.dtype).reshape(-1, *self.stored_shape)
        self._check_tokens(out, start)

    def _check_tokens(self, out: NDArray[Any], start: int) -> None:
        if self.vocabulary is None or (int(out.max()) < self.vocabulary and int(out.min()) >= 0):
            return
        bad = (out >= self.vocabulary) | (out < 0)
        first = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
        raise UserError(
            f"shard {self.url}: sample {start + first} holds the token {out[first][bad[first]][0]}, the vocabulary has "
            f"0 to {self.vocabulary - 1}: it was written with another tokenizer, pack it again"
        )

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Samples [start, stop) by one ranged read: a (n, C', H, W) fp16 or (n, T) token array.

        Raises:
            UserError: as `decode` does.
        """
        out = np.empty((stop - start, 1, *self.stored_shape), self.dtype)
        self.decode(storage.read_range(self.url, *self.span(start, stop)), start, stop, out)
        return out[:, 0]

    def _check_sums(
        self, data: memoryview, offsets: list[int], length: int, expected: list[int], start: int, first: int
    ) -> None:
        for i, (offset, recorded) in enumerate(zip(offsets, expected, strict=True)):
            actual = isal_zlib.crc32(data[offset : offset + length])
            if actual != recorded:
                raise DamagedBlockError(
                    f"shard {self.url}: sample {start + i} at byte {first + offset} has crc32 {actual:08x}, "
                    f"its index says {recorded:08x}: the file is damaged, copy or encode it again"
                )


def _shown(dtype: np.dtype[Any]) -> str:
    return "fp16" if dtype == LATENT_DTYPE else str(dtype)


def _files(data: bytes | memoryview, offsets: NDArray[np.int64], length: int) -> NDArray[np.uint8]:
    """(n, length) bytes of files of one length: a view where they lie at equal distances, as in shards of ours."""
    strides = np.diff(offsets)
    if (strides == strides[:1]).all():
        stride = int(strides[0]) if len(strides) else length
        return np.ndarray((len(offsets), length), np.uint8, data, int(offsets[0]), (stride, 1))
    raw = np.frombuffer(data, np.uint8)
    return np.stack([raw[offset : offset + length] for offset in offsets.tolist()])


def open_shard(
    folder: str,
    info: ShardInfo,
    stored_shape: tuple[int, ...],
    num_classes: int,
    flipped: bool = False,
    dtype: np.dtype[Any] = LATENT_DTYPE,
    vocabulary: int | None = None,
) -> ShardReader:
    """Checks a shard's size and index against the manifest, without reading its samples.

    Args:
        stored_shape, num_classes, flipped, dtype, vocabulary: what the manifest says.

    Raises:
        UserError: a missing, short or long shard; an index that is missing, changed, or describes something else.
    """
    url = storage.join(folder, info.name)
    index_url = storage.join(folder, info.index_name)
    try:
        size = storage.size(url)
    except FileNotFoundError as error:
        raise UserError(f"shard {url} of the manifest is missing: copy it there or encode it again") from error
    if size != info.bytes:
        raise UserError(
            f"shard {url} has {size} bytes, the manifest says {info.bytes}: "
            f"the file is {'cut short' if size < info.bytes else 'another one'}, copy or encode it again"
        )
    index = _parse_index(_read_index(index_url, info), index_url, info, flipped)
    length = len(npy_header(stored_shape, dtype)) + int(np.prod(stored_shape)) * dtype.itemsize
    _check_index(index, index_url, info, length, num_classes, flipped)
    return ShardReader(url, info.sha256, index, stored_shape, dtype, vocabulary)


def open_of(manifest: Manifest, folder: str, info: ShardInfo) -> ShardReader:
    """`open_shard` of one of a manifest's shards."""
    return open_shard(
        folder,
        info,
        manifest.stored_shape,
        manifest.num_classes,
        manifest.flipped,
        manifest.stored_dtype,
        manifest.vocabulary,
    )


def _read_index(url: str, info: ShardInfo) -> bytes:
    """The index's bytes. A byte damaged on the way differs in a second reading, one damaged in the file does not."""
    before = None
    while True:
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError as error:
            raise UserError(f"index {url} is missing: copy it there or encode the shard again") from error
        if _sha256(data) == info.index_sha256:
            return data
        if data == before:
            raise UserError(f"index {url} has another sha256 than the manifest says: copy or encode it again")
        before = data


def _parse_index(data: bytes, url: str, info: ShardInfo, flipped: bool) -> NDArray[Any]:
    """The index's rows. Not by np.load, whose header parser fails now and then in threads of Python 3.11."""
    dtype = index_dtype(flipped)
    header = _npy_header(np.lib.format.dtype_to_descr(dtype), (info.samples,))
    if data[: len(header)] != header or len(data) != len(header) + info.samples * dtype.itemsize:
        raise UserError(
            f"index {url} does not hold {info.samples} rows of {dtype}, as the manifest says: encode the shard again"
        )
    return np.frombuffer(data, dtype, offset=len(header))


def _check_index(
    index: NDArray[Any],
    index_url: str,
    info: ShardInfo,
    length: int,
    num_classes: int,
    flipped: bool,
) -> None:
    if (index["length"] != length).any():
        raise UserError(f"index {index_url}: samples are not of one length {length}: encode the shard again")
    offsets = [index["offset"]] if not flipped else [index["offset"], index["flip_offset"]]
    starts = np.stack(offsets, axis=1).reshape(-1)
    if (np.diff(starts) < length).any() or starts[0] < 0 or int(starts[-1]) + length > info.bytes:
        raise UserError(f"index {index_url} points outside the shard's {info.bytes} bytes: encode the shard again")
    labels = index["label"]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"index {index_url} has labels from {labels.min()} to {labels.max()}, the manifest {num_classes} classes: "
            "encode the shard again"
        )
