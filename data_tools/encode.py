"""Encodes image shards to latent shards: `python -m data_tools.encode --help`."""

import argparse
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_tools.common import LABELS_NAME, PACK_NAME, ImageShard, Pack, load_pack, read_json, run, write_json
from data_tools.statistics import ChannelSums
from imm_scale import storage
from imm_scale.data.codec import ImageCodec, PixelsCodec, VAECodec
from imm_scale.data.manifest import Codec, Manifest, ShardInfo
from imm_scale.data.shards import LATENT_DTYPE, write_shard
from imm_scale.errors import UserError

MANIFEST_NAME = "manifest.json"

_DESCRIPTION = """\
Encodes the image shards of data_tools.pack to latent shards for training. For images-000000.tar it writes
latents-000000.tar, its index latents-000000.index.npy and its record latents-000000.json (written last: a shard with a
record is finished and is skipped when the command runs again). When all shards are there, the mean and standard
deviation of each channel and the list of shards go into manifest.json, which data.manifest of a training config names.

The pixels codec stores value / 127.5 - 1. The vae codec stores mean and standard deviation of the posterior of a
diffusers AutoencoderKL; training draws from it anew each time."""

_EXAMPLES = """\
examples:
  python -m data_tools.encode --images data/digits/images --out data/digits/latents --codec pixels
  python -m data_tools.encode --images data/imagenet256/images --out data/imagenet256/latents \\
      --codec vae --vae /models/sd-vae-ft-mse --device cuda --shard $SLURM_ARRAY_TASK_ID/64

With --shard I/N, job I of N encodes every N-th shard; whichever job finds all shards finished writes the manifest."""


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), encode, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "data_tools.encode",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", required=True, help="folder written by data_tools.pack, a path or an fsspec URL")
    parser.add_argument("--out", required=True, help="output folder, a path or an fsspec URL")
    parser.add_argument("--codec", required=True, choices=("pixels", "vae"))
    parser.add_argument("--vae", metavar="PATH", help="folder of a diffusers AutoencoderKL, for --codec vae")
    parser.add_argument("--device", default="cpu", help="torch device of the autoencoder (default cpu)")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once (default 32)")
    parser.add_argument("--shard", metavar="I/N", default="0/1", help="job I of N (default 0/1, all shards)")
    return parser


@dataclass(frozen=True)
class _Identity:
    """What makes latents of two jobs belong together."""

    kind: str
    weights_hash: str
    image_size: int
    channels: int
    factor: int

    def __str__(self) -> str:
        weights = f" with weights {self.weights_hash[:12]}" if self.weights_hash else ""
        return f"{self.kind}{weights}, {self.image_size} pixels a side, {self.channels} channels, factor {self.factor}"


@dataclass(frozen=True)
class _Record:
    """A finished shard."""

    identity: _Identity
    source_sha256: str
    shard: ShardInfo
    sums: ChannelSums

    def save(self, url: str) -> None:
        write_json(url, asdict(self))

    @classmethod
    def load(cls, url: str) -> "_Record":
        document = read_json(url)
        try:
            return cls(
                _Identity(**document["identity"]),
                document["source_sha256"],
                ShardInfo(**document["shard"]),
                ChannelSums(**document["sums"]),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{url} is no record of an encoded shard ({error}): choose another --out") from error


def encode(args: argparse.Namespace) -> None:
    """Does what the command line asks. Raises UserError."""
    job, jobs = _parse_shard(args.shard)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}: it must be at least 1")
    pack = _load_images(args.images)
    codec = _make_codec(args)
    identity = _identify(pack, codec)
    _check_manifest_codec(args.out, identity)
    records = [_finished_record(args.out, i, shard, identity) for i, shard in enumerate(pack.shards)]
    todo = [i for i, record in enumerate(records) if record is None and i % jobs == job]
    if not todo and all(records) and storage.exists(storage.join(args.out, MANIFEST_NAME)):
        print(f"already encoded: {pack.num_images} images in {len(pack.shards)} shards in {args.out}")
        return
    with tqdm(total=sum(pack.shards[i].samples for i in todo), unit="image", disable=None) as progress:
        for i in todo:
            _encode_shard(args, i, pack, codec, identity, progress)
    records = [_finished_record(args.out, i, shard, identity) for i, shard in enumerate(pack.shards)]
    finished = [record for record in records if record is not None]
    if len(finished) < len(records):
        print(f"{len(finished)} of {len(records)} shards are finished; the last job to finish writes the manifest")
        return
    manifest = _write_manifest(args, identity, finished)
    print(
        f"encoded {manifest.num_samples} images to latents {'x'.join(str(n) for n in manifest.latent_shape)} in "
        f"{len(manifest.shards)} shards: {storage.join(args.out, MANIFEST_NAME)}"
    )


def _parse_shard(text: str) -> tuple[int, int]:
    job, slash, jobs = text.partition("/")
    if not (slash and job.isdecimal() and jobs.isdecimal() and int(job) < int(jobs)):
        raise UserError(f"--shard {text!r}: I/N with I from 0 to N - 1 is needed, such as 0/4")
    return int(job), int(jobs)


def _load_images(folder: str) -> Pack:
    try:
        return load_pack(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"no {PACK_NAME} in {folder}: --images must name a folder that python -m data_tools.pack finished"
        ) from error


def _make_codec(args: argparse.Namespace) -> ImageCodec:
    if args.codec == "pixels":
        if args.vae is not None:
            raise UserError(f"--vae {args.vae} is for --codec vae: give one or the other")
        return PixelsCodec()
    if args.vae is None:
        raise UserError("--codec vae needs --vae PATH, the folder of a diffusers AutoencoderKL")
    return VAECodec(args.vae, args.device)


def _identify(pack: Pack, codec: ImageCodec) -> _Identity:
    height, width, image_channels = pack.image_shape
    if height != width or height % codec.factor:
        raise UserError(
            f"the images have {width}x{height} pixels, {codec.kind} needs squares with a side divisible by "
            f"{codec.factor}: pack them with --size"
        )
    return _Identity(codec.kind, codec.weights_hash, height, codec.latent_channels(image_channels), codec.factor)


def _check_manifest_codec(out: str, identity: _Identity) -> None:
    url = storage.join(out, MANIFEST_NAME)
    if not storage.exists(url):
        return
    codec = Manifest.load(url).codec
    existing = _Identity(codec.kind, codec.weights_hash, codec.image_size, codec.channels, codec.factor)
    _check_same_codec(existing, identity, url)


def _check_same_codec(existing: _Identity, wanted: _Identity, url: str) -> None:
    if existing != wanted:
        raise UserError(f"{url} is of another codec ({existing}) than asked for ({wanted}): choose another --out")


def _stem(i: int) -> str:
    return f"latents-{i:06d}"


def _finished_record(out: str, i: int, source: ImageShard, identity: _Identity) -> _Record | None:
    """The record of shard i, or None if it has yet to be encoded. Raises UserError if it is of other data."""
    url = storage.join(out, f"{_stem(i)}.json")
    if not storage.exists(url):
        return None
    record = _Record.load(url)
    _check_same_codec(record.identity, identity, url)
    if record.source_sha256 != source.sha256:
        raise UserError(f"{url} belongs to other images than {source.name} of --images: choose another --out")
    shard_url = storage.join(out, record.shard.name)
    whole = (
        storage.exists(shard_url)
        and storage.size(shard_url) == record.shard.bytes
        and storage.exists(storage.join(out, record.shard.index_name))
    )
    return record if whole else None


def _encode_shard(
    args: argparse.Namespace, i: int, pack: Pack, codec: ImageCodec, identity: _Identity, progress: "tqdm[Any]"
) -> None:
    url = storage.join(args.images, pack.shards[i].name)
    keys: list[str] = []
    labels: list[int] = []
    parts: list[NDArray[np.float16]] = []
    images: list[NDArray[np.uint8]] = []
    sums = ChannelSums.zero(identity.channels)
    for key, image, label in _read_images(url, pack.shards[i], pack.image_shape):
        keys.append(key)
        labels.append(label)
        images.append(image)
        progress.update()
        if len(images) == args.batch_size or len(keys) == pack.shards[i].samples:
            parts.append(codec.encode(torch.from_numpy(np.stack(images))).numpy().astype(LATENT_DTYPE))
            sums = sums + ChannelSums.of(parts[-1], codec.kind)
            images.clear()
    info = write_shard(args.out, f"{_stem(i)}.tar", keys, np.concatenate(parts), labels)
    _Record(identity, pack.shards[i].sha256, info, sums).save(storage.join(args.out, f"{_stem(i)}.json"))


def _read_images(
    url: str, shard: ImageShard, shape: tuple[int, int, int]
) -> Iterator[tuple[str, NDArray[np.uint8], int]]:
    """Key, (H, W, channels) image and label of every sample, as many as pack.json says."""
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UserError(f"{url} is missing: copy it there or pack again") from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise UserError(f"{url} ({len(data)} bytes) is not the file {PACK_NAME} describes: copy it or pack again")
    for sample in group_by_keys(tar_file_expander([{"url": url, "stream": io.BytesIO(data)}])):
        with Image.open(io.BytesIO(sample["png"])) as picture:
            image = np.array(picture)
        yield sample["__key__"], image.reshape(shape), int(sample["cls"])


def _write_manifest(args: argparse.Namespace, identity: _Identity, records: list[_Record]) -> Manifest:
    sums = ChannelSums.zero(identity.channels)
    for record in records:
        sums = sums + record.sums
    mean, std = sums.mean_std()
    if min(std) < 1e-5:
        raise UserError(f"channel {std.index(min(std))} has one value in all images: nothing to learn, check --images")
    class_names = _class_names(args.images)
    side = identity.image_size // identity.factor
    manifest = Manifest(
        codec=Codec(**asdict(identity), mean=mean, std=std),
        latent_shape=(identity.channels, side, side),
        num_classes=len(class_names),
        class_names=class_names,
        shards=tuple(record.shard for record in records),
    )
    manifest.save(storage.join(args.out, MANIFEST_NAME))
    return manifest


def _class_names(folder: str) -> tuple[str, ...]:
    url = storage.join(folder, LABELS_NAME)
    try:
        names = read_json(url)
        return tuple(names[str(label)] for label in range(len(names)))
    except (FileNotFoundError, KeyError) as error:
        raise UserError(f"{url} is missing or does not name classes 0, 1, ...: pack the images again") from error


if __name__ == "__main__":
    sys.exit(main())
