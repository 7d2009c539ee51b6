"""A manifest for shards of stock webdataset's ShardWriter, found member by member."""

import argparse
import hashlib
import io
from typing import Any

import numpy as np
from isal import isal_zlib  # zlib's crc32, fifty times as fast
from numpy.typing import NDArray

from data_tools.encode import make_codec
from data_tools.statistics import ChannelSums
from imm_scale import storage
from imm_scale.data import tar
from imm_scale.data.manifest import Codec, Manifest, ShardInfo
from imm_scale.data.shards import INDEX_DTYPE, LABEL, LATENT, LATENT_DTYPE, npy_header
from imm_scale.errors import UserError


def adopt(args: argparse.Namespace) -> None:
    """Writes an index beside each shard and a manifest; the shards stay as they are.

    Raises:
        UserError: options missing, a manifest that is there already, shards that are damaged or hold something else.
    """
    if args.codec is None or args.image_size is None:
        raise UserError("--adopt needs --codec (and --vae) and --image-size: what the shards hold does not say it")
    if storage.exists(args.manifest):
        raise UserError(f"{args.manifest} exists: remove it, or name another manifest beside the shards")
    codec = make_codec(args)
    folder = storage.parent(args.manifest)
    shape = _stored_shape(storage.join(folder, args.adopt[0]))
    channels = shape[0] // 2 if codec.kind == "vae" else shape[0]
    sums, shards, most = ChannelSums.zero(channels), [], 0
    for name in args.adopt:
        info, index, latents = _scan(folder, name, shape)
        storage.write_bytes(storage.join(folder, info.index_name), _index_bytes(index))
        sums = sums + ChannelSums.of(latents, codec.kind)
        shards.append(info)
        most = max(most, int(index["label"].max()))
    mean, std = sums.mean_std()
    identity = Codec(codec.kind, codec.weights_hash, args.image_size, channels, codec.factor, mean, std)
    num_classes = args.num_classes or most + 1
    manifest = Manifest(identity, (channels, *shape[1:]), num_classes, (), tuple(shards))
    manifest.save(args.manifest)
    Manifest.load(args.manifest)  # refuses what does not fit together, as an image size that is wrong
    print(f"adopted {manifest.num_samples} samples in {len(shards)} shards: {args.manifest}")


def _stored_shape(url: str) -> tuple[int, int, int]:
    """Shape of the first latent, whose header every other one must have."""
    data = storage.read_bytes(url)
    for _, files in tar.samples(data, url):
        if LATENT in files:
            member = files[LATENT]
            array = np.load(io.BytesIO(data[member.offset : member.offset + member.size]), allow_pickle=False)
            if array.dtype != LATENT_DTYPE or array.ndim != 3:
                raise UserError(f"{url}: {LATENT} is {array.dtype} of shape {array.shape}: fp16 (C', H, W) is needed")
            return array.shape
    raise UserError(f"{url} has no sample with {LATENT}: name shards of KEY.{LATENT} and KEY.{LABEL}")


def _scan(folder: str, name: str, shape: tuple[int, int, int]) -> tuple[ShardInfo, NDArray[Any], NDArray[np.float16]]:
    """What the manifest needs of a shard, its index, and its latents (n, C', H, W)."""
    url = storage.join(folder, name)
    data = storage.read_bytes(url)
    samples = tar.samples(data, url)
    header = npy_header(shape)
    index = np.empty(len(samples), INDEX_DTYPE)
    latents = np.empty((len(samples), *shape), LATENT_DTYPE)
    for i, (key, files) in enumerate(samples):
        if not {LATENT, LABEL} <= files.keys():
            raise UserError(f"{url}: sample {key} has {', '.join(files)}; {LATENT} and {LABEL} are needed")
        latent, label = (data[m.offset : m.offset + m.size] for m in (files[LATENT], files[LABEL]))
        if latent[: len(header)] != header or len(latent) != len(header) + latents[i].nbytes:
            raise UserError(f"{url}: sample {key} is no fp16 array of shape {shape} as the first one: encode it again")
        if not label.strip().isdigit():
            raise UserError(f"{url}: sample {key} has the label {label!r}: a number is needed")
        index[i] = (files[LATENT].offset, len(latent), isal_zlib.crc32(latent), int(label))
        latents[i] = np.frombuffer(latent, LATENT_DTYPE, offset=len(header)).reshape(shape)
    hashes = hashlib.sha256(data).hexdigest(), hashlib.sha256(_index_bytes(index)).hexdigest()
    return ShardInfo(name, len(samples), len(data), *hashes), index, latents


def _index_bytes(index: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, index, allow_pickle=False)
    return stream.getvalue()
