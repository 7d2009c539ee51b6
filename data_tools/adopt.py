"""A manifest for shards of stock webdataset's ShardWriter, found member by member."""

import argparse
import fnmatch
import glob
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from tokenize import TokenError
from typing import Any

import numpy as np
from isal import isal_zlib  # zlib's crc32, fifty times as fast
from numpy.lib import format as npy
from numpy.typing import NDArray

from data_tools import foreign
from data_tools.encode import make_codec
from imm_scale import storage
from imm_scale.data import manifest as manifests
from imm_scale.data import tar
from imm_scale.data.manifest import Manifest, ShardInfo
from imm_scale.data.shards import FLIPPED, LABEL, LATENT, LATENT_DTYPE, index_dtype, npy_header
from imm_scale.errors import UserError

_MOST_LABEL = np.iinfo(np.int32).max  # of an index's rows
_LONGEST_LABEL = 20  # digits: Python reads no number of thousands
_MOST_CLASSES = 1_000_000  # each is counted, listed and embedded; ImageNet-21k has 21,841
# What numpy raises for headers that are none: it takes them for Python, and broken ones apart by Python's tokenizer.
_NO_HEADER = (ValueError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError, TypeError)


def adopt(args: argparse.Namespace) -> None:
    """Writes an index beside each shard and a manifest; the shards stay as they are.

    Raises:
        UserError: options missing, a manifest that is there already, shards that are damaged, lie elsewhere or hold
            something else than they are said to.
    """
    if args.codec is None or args.image_size is None:
        raise UserError("--adopt needs --codec (and --vae) and --image-size: what the shards hold does not say it")
    if args.num_classes is not None and not 1 <= args.num_classes <= _MOST_CLASSES:
        raise UserError(f"--num-classes is {args.num_classes}: it must be 1 to {_MOST_CLASSES}")
    if storage.exists(args.manifest):
        raise UserError(f"{args.manifest} exists: remove it, or name another manifest beside the shards")
    folder = storage.parent(args.manifest)
    storage.check_writable(folder or ".")
    names = shard_names(folder, args.adopt)
    image_codec = make_codec(args)
    shape, flipped = _first_sample(storage.join(folder, names[0]))
    codec = foreign.describe(args, image_codec, shape)
    survey = foreign.Survey(codec)
    scanned = [_scan(folder, name, shape, flipped, survey) for name in names]
    notes = survey.check(image_codec, args.num_classes, args.scale is not None)
    manifest = Manifest(
        codec=foreign.with_statistics(codec, survey.sums),
        latent_shape=(codec.channels, *shape[1:]),
        num_classes=args.num_classes or max(survey.labels) + 1,
        class_names=(),
        shards=tuple(info for info, _ in scanned),
        flipped=flipped,
    )
    manifests.parse(manifest.to_json(), args.manifest)  # refuses what does not fit together, as a channel of one value
    for info, index in scanned:
        storage.write_bytes(storage.join(folder, info.index_name), index)
    manifest.save(args.manifest)
    for note in notes:
        print(f"note: {note}")
    shards = f"{len(scanned)} shards" if len(scanned) > 1 else "1 shard"
    print(f"adopted {manifest.num_samples} samples in {shards}: {args.manifest} ({foreign.summary(codec)})")


# --- names ---


def shard_names(folder: str, given: Sequence[str]) -> list[str]:
    """Names of shards relative to the manifest's folder, so that the folder can be moved or copied as it is.

    Args:
        given: paths as seen from here or from that folder, absolute ones, URLs, or patterns of them.

    Raises:
        UserError: shards that are not there, lie outside the folder, are named twice, or are no .tar files.
    """
    names: list[str] = []
    for pattern in given:
        matches = sorted(_matching(folder, pattern))
        if not matches:
            raise UserError(
                f"--adopt {pattern}: no such file, neither here nor in the manifest's folder {folder or '.'}"
            )
        names += matches
    for name in names:
        if not name.endswith(".tar"):
            raise UserError(f"--adopt {name}: shards are .tar files")
        if names.count(name) > 1:
            raise UserError(f"--adopt names {name} more than once: name each shard once")
    return names


def _matching(folder: str, pattern: str) -> Iterator[str]:
    if storage.is_local(folder) and storage.is_local(pattern):
        path = storage.local_path(pattern)
        root = os.path.abspath(storage.local_path(folder))
        places = dict.fromkeys([os.path.abspath(path), os.path.abspath(os.path.join(root, path))])
        hits = [files for files in map(_local_files, places) if files]
        if len(hits) > 1:
            raise UserError(
                f"--adopt {pattern} may mean {hits[0][0]} or {hits[1][0]}: give the absolute path of the one you mean"
            )
        for file in hits[0] if hits else []:
            name = os.path.relpath(file, root)
            if name.startswith(os.pardir):  # one of the two may be named by way of a link
                name = os.path.relpath(os.path.realpath(file), os.path.realpath(root))
            yield _inside(name, file, folder)
        return
    url = pattern if not storage.is_local(pattern) else storage.join(folder, pattern)
    for file in _remote_files(url):
        yield _inside(file.removeprefix(folder.rstrip("/") + "/"), file, folder)


def _local_files(path: str) -> list[str]:
    return [path] if os.path.isfile(path) else sorted(glob.glob(path))


def _remote_files(url: str) -> list[str]:
    if storage.exists(url):
        return [url]
    parent, pattern = storage.parent(url), storage.name(url)
    return [storage.join(parent, name) for name in fnmatch.filter(storage.list_names(parent), pattern)]


def _inside(name: str, file: str, folder: str) -> str:
    if storage.is_local(name) and not name.startswith((os.pardir, "/")):
        return name
    raise UserError(
        f"--adopt {file} lies outside the manifest's folder {folder or '.'}: a data set is one folder, so that it "
        "can be moved; put the manifest above all its shards"
    )


# --- contents ---


def _first_sample(url: str) -> tuple[tuple[int, int, int], bool]:
    """Shape of the first latent, whose header every other one must have, and whether a mirrored one is beside it."""
    data = storage.read_bytes(url)
    for _, files in tar.samples(data, url):
        if LATENT in files:
            member = files[LATENT]
            shape, dtype = _header(data[member.offset : member.offset + member.size], url)
            if dtype != LATENT_DTYPE or len(shape) != 3:
                batch = "; store latents one by one, without the axis of the batch" if len(shape) == 4 else ""
                raise UserError(f"{url}: {LATENT} is {dtype} of shape {shape}: fp16 (C', H, W) is needed{batch}")
            return (shape[0], shape[1], shape[2]), FLIPPED in files
    raise UserError(f"{url} has no sample with {LATENT}: name shards of KEY.{LATENT} and KEY.{LABEL}")


def _header(content: bytes, url: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type that an array's file says it has, without reading values that it may only claim to hold."""
    stream = io.BytesIO(content)
    try:
        version = npy.read_magic(stream)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version} of the format")
        shape, _, dtype = readers[version](stream)
    except _NO_HEADER as error:
        packed = "; an .npz or .zip file, save the array by numpy.save" if content.startswith(b"PK") else ""
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{url}: {LATENT} of the first sample is no array ({reason}{packed}): write the shard again"
        ) from error
    return shape, dtype


def _scan(
    folder: str, name: str, shape: tuple[int, int, int], flipped: bool, survey: foreign.Survey
) -> tuple[ShardInfo, bytes]:
    """What the manifest needs of a shard, and its index; the survey is shown its values and labels."""
    url = storage.join(folder, name)
    data = storage.read_bytes(url)
    samples = tar.samples(data, url)
    if not samples:
        raise UserError(f"{url} has no samples: leave it out")
    index = np.empty(len(samples), index_dtype(flipped))
    latents = np.empty((1 + flipped, len(samples), *shape), LATENT_DTYPE)
    for i, (key, files) in enumerate(samples):
        required = [LATENT, LABEL, *([FLIPPED] if flipped else [])]
        if not set(required) <= files.keys() or (FLIPPED in files) != flipped:
            alike = ", and what one sample has every one needs" if FLIPPED in files or flipped else ""
            raise UserError(f"{url}: sample {key} has {', '.join(files)}; {' and '.join(required)} are needed{alike}")
        if flipped and files[FLIPPED].offset < files[LATENT].offset:
            raise UserError(f"{url}: sample {key} has {FLIPPED} before {LATENT}: write it behind, as ShardWriter does")
        where = f"{url}: sample {key}"
        index["label"][i] = _label(data, files[LABEL], where)
        for variant, (member, prefix) in enumerate([(LATENT, ""), (FLIPPED, "flip_")][: 1 + flipped]):
            content = data[files[member].offset : files[member].offset + files[member].size]
            latents[variant, i] = _values(content, shape, where)
            index[f"{prefix}offset"][i], index[f"{prefix}crc32"][i] = files[member].offset, isal_zlib.crc32(content)
            index["length"][i] = len(content)
    for variant, values in enumerate(latents):
        survey.add(values, index["label"].tolist() if variant == 0 else [], url)
    stream = io.BytesIO()
    np.save(stream, index, allow_pickle=False)
    hashes = hashlib.sha256(data).hexdigest(), hashlib.sha256(stream.getvalue()).hexdigest()
    return ShardInfo(name, len(samples), len(data), *hashes), stream.getvalue()


def _label(data: bytes, member: tar.Member, where: str) -> int:
    text = data[member.offset : member.offset + member.size]
    if not text.strip().isdigit() or len(text.strip()) > _LONGEST_LABEL or int(text) > _MOST_LABEL:
        raise UserError(f"{where} has the label {text[:40]!r}: the number of a class is needed")
    return int(text)


def _values(content: bytes, shape: tuple[int, int, int], where: str) -> NDArray[np.float16]:
    header = npy_header(shape)
    if content[: len(header)] != header or len(content) != len(header) + 2 * int(np.prod(shape)):
        raise UserError(f"{where} is no fp16 array (C order) of shape {shape} as the first one: encode it again")
    return np.frombuffer(content, LATENT_DTYPE, offset=len(header)).reshape(shape)
