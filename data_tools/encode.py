"""Encodes image shards to latent shards: `imm-scale encode --help`."""

import argparse
import hashlib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data_tools import records, tasks
from data_tools.common import PACK_NAME, ImageShard, Pack, load_pack, paths_are_the_users
from data_tools.records import Identity, Record
from data_tools.statistics import ChannelSums
from imm_scale import precision, storage
from imm_scale.cli import entry
from imm_scale.data import tar
from imm_scale.data.codec import ImageCodec, PixelsCodec, VAECodec
from imm_scale.data.prefetch import Prefetcher
from imm_scale.data.shards import LATENT_DTYPE, write_shard
from imm_scale.errors import UserError
from imm_scale.parallel import world

_BATCHES_AHEAD = 4
_DECODERS = 4  # threads that decode PNGs ahead of the encoder


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be known before an autoencoder is loaded, or a job waits in a queue."""
    _check_codec(args)
    tasks.check(args.task_index, args.num_tasks)
    if not getattr(args, "may_come", False):
        load_images(args.images)
        records.class_names(args.images)
    storage.check_writable(args.out)


def _check_codec(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not fit together."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}: it must be at least 1")
    if args.codec == "pixels":
        if args.vae is not None:
            raise UserError(f"--vae {args.vae} is for --codec vae: give one or the other")
        if getattr(args, "precision", "fp32") != "fp32":
            raise UserError(f"--precision {args.precision} is for --codec vae: {args.codec} computes nothing")
    elif args.vae is None:
        raise UserError("--codec vae needs --vae PATH, the folder or hub name of a diffusers AutoencoderKL")
    else:
        _named_device(args.device)


def make_codec(args: argparse.Namespace) -> ImageCodec:
    """Raises UserError for options that do not fit together or an autoencoder that cannot be loaded."""
    _check_codec(args)
    if args.codec == "pixels":
        return PixelsCodec()
    return VAECodec(args.vae, _device(args.device))


def _named_device(name: str) -> torch.device:
    """Whether it is here or not. Raises UserError for what torch does not know."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device of torch: use cpu, cuda or, say, cuda:1") from error


def _device(name: str) -> str:
    """The torch device asked for, which `cuda` leaves to the rank. Raises UserError for one that is not there."""
    device = _named_device(name)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: torch sees {count} GPUs here; use another or --device cpu")
    if device.type == "cuda":
        return str(world.device(world.detect())) if name == "cuda" else name
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"--device {name} cannot be used here ({reason}): use another or --device cpu") from error
    return name


def _set_precision(codec: ImageCodec, name: str) -> None:
    """Raises UserError for tf32 where no GPU computes in it."""
    precision.check(name, "--precision")
    codec.precision = name


def load_images(folder: str) -> Pack:
    """Raises UserError where there is no finished pack."""
    try:
        return load_pack(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"no {PACK_NAME} in {folder}: --images must name a folder that imm-scale pack finished"
        ) from error


@paths_are_the_users()
def encode(args: argparse.Namespace) -> None:
    """Does what the command line asks. Raises UserError."""
    precision.set_tf32(False)  # but where --precision allows it
    _check_codec(args)
    if args.codec == "vae":
        _device(args.device)
    check(args)
    codec = make_codec(args)
    _set_precision(codec, args.precision)
    pack = load_images(args.images)
    identity = records.identify(pack, codec, args.flip)
    records.check_manifest(args.out, identity)
    manifest_exists = storage.exists(storage.join(args.out, records.MANIFEST_NAME))
    done = _finished(args.out, pack, identity)
    if all(done) and manifest_exists:
        print(f"already encoded: {pack.num_images} images in {len(pack.shards)} shards in {args.out}")
        return
    if not args.finalize:
        share = tasks.find(args.out, args.task_index, args.num_tasks, os.environ)
        todo = [i for i, record in enumerate(done) if record is None and share.owns(i)]
        records.clear_temporaries(args.out, {records.stem(i) for i in range(len(done)) if share.owns(i)})
        busy = encode_shards(args.images, args.out, pack, codec, identity, todo, args.batch_size)
        if todo:
            print(f"{len(todo)} shards in {busy.wall_seconds:.1f} s, the encoder busy for {busy.share:.1%} of them")
        done = _finished(args.out, pack, identity)
        if not all(done):
            print(f"{sum(map(bool, done))} of {len(done)} shards are finished; the last task writes the manifest")
            return
    manifest = records.finalize(args.images, args.out, pack, done)
    print(
        f"encoded {manifest.num_samples} images to latents {'x'.join(str(n) for n in manifest.latent_shape)} in "
        f"{len(manifest.shards)} shards: {storage.join(args.out, records.MANIFEST_NAME)}"
    )


def _finished(out: str, pack: Pack, identity: Identity) -> list[Record | None]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda i: records.finished(out, i, pack.shards[i], identity), range(len(pack.shards))))


@dataclass(frozen=True)
class Busy:
    """How long the encoder worked, of how long it took."""

    encoder_seconds: float
    wall_seconds: float

    @property
    def share(self) -> float:
        """Part of the wall time in which the encoder was at work."""
        return self.encoder_seconds / self.wall_seconds


@dataclass(frozen=True)
class _Images:
    """Some images of one shard; `last` says that the shard ends with them."""

    shard: int
    keys: list[str]
    labels: list[int]
    images_NHWC: torch.Tensor
    last: bool


def encode_shards(
    images: str, out: str, pack: Pack, codec: ImageCodec, identity: Identity, todo: Sequence[int], batch_size: int
) -> Busy:
    """Encodes these shards of a pack; reading and decoding run ahead of the encoder, writing behind it."""
    began, busy = time.perf_counter(), 0.0
    writing: Future[None] | None = None
    done: list[_Images] = []
    stored: list[tuple[NDArray[np.float16], NDArray[np.float16] | None]] = []
    total = sum(pack.shards[i].samples for i in todo)
    with ThreadPoolExecutor(1) as writer, tqdm(total=total, unit="image", disable=None) as progress:
        ahead = Prefetcher(read_batches(images, pack, todo, batch_size), _BATCHES_AHEAD)
        try:
            for batch in ahead:
                start = time.perf_counter()
                stored.append(_encode_batch(codec, batch.images_NHWC, identity.flipped))
                busy += time.perf_counter() - start
                done.append(batch)
                progress.update(len(batch.keys))
                if batch.last:
                    if writing is not None:
                        writing.result()
                    source = pack.shards[batch.shard]
                    writing = writer.submit(_write, out, batch.shard, source, identity, done, stored)
                    done, stored = [], []
            if writing is not None:
                writing.result()
        finally:
            ahead.close()
    return Busy(busy, time.perf_counter() - began)


def _encode_batch(
    codec: ImageCodec, images_NHWC: torch.Tensor, flipped: bool
) -> tuple[NDArray[np.float16], NDArray[np.float16] | None]:
    latents = codec.encode(images_NHWC).numpy().astype(LATENT_DTYPE)
    mirrored = codec.encode(images_NHWC.flip(2)).numpy().astype(LATENT_DTYPE) if flipped else None
    return latents, mirrored


def _write(
    out: str,
    i: int,
    source: ImageShard,
    identity: Identity,
    batches: list[_Images],
    stored: list[tuple[NDArray[np.float16], NDArray[np.float16] | None]],
) -> None:
    """The shard, its index, and last its record. The sums hold mirrored latents too, as training meets both."""
    sums, codec = ChannelSums.zero(identity.channels), identity.codec()
    for latents, mirrored in stored:
        for values in (latents, mirrored):
            if values is not None:
                sums = sums + ChannelSums.of(values, codec)
    keys = [key for batch in batches for key in batch.keys]
    labels = [label for batch in batches for label in batch.labels]
    mirrored_all = [values for _, values in stored if values is not None]
    info = write_shard(
        out,
        f"{records.stem(i)}.tar",
        keys,
        np.concatenate([latents for latents, _ in stored]),
        labels,
        np.concatenate(mirrored_all) if mirrored_all else None,
    )
    Record(identity, source.sha256, info, sums).save(out, i)


def read_batches(images: str, pack: Pack, todo: Sequence[int], batch_size: int) -> Iterator[_Images]:
    """All images of these shards; a batch never crosses a shard, so that each shard's bytes follow from it alone."""
    num_classes = len(records.class_names(images))
    with ThreadPoolExecutor(_DECODERS) as pool:
        for i in todo:
            url = storage.join(images, pack.shards[i].name)
            data = _read_shard(url, pack.shards[i])
            samples = tar.samples(data, url)
            for start in range(0, len(samples), batch_size):
                part = samples[start : start + batch_size]
                pngs = [_content(data, files["png"]) for _, files in part]
                decoded = pool.map(partial(_decode, shape=pack.image_shape, url=url), pngs)
                yield _Images(
                    shard=i,
                    keys=[key for key, _ in part],
                    labels=[_label(_content(data, files["cls"]), num_classes, url) for _, files in part],
                    images_NHWC=torch.from_numpy(np.stack(list(decoded))),
                    last=start + batch_size >= len(samples),
                )


def _read_shard(url: str, shard: ImageShard) -> bytes:
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UserError(f"{url} is missing: copy it there or pack again") from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        data = storage.read_bytes(url)  # perhaps damaged on the way
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise UserError(f"{url} ({len(data)} bytes) is not the file {PACK_NAME} describes: copy it or pack again")
    return data


def _content(data: bytes, member: tar.Member) -> bytes:
    return data[member.offset : member.offset + member.size]


def _label(text: bytes, num_classes: int, url: str) -> int:
    label = int(text)
    if label >= num_classes:
        raise UserError(f"{url} has label {label}, labels.json beside it names {num_classes} classes: pack again")
    return label


def _decode(png: bytes, shape: tuple[int, int, int], url: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as picture:
        values = np.array(picture)
    values = values[..., None] if values.ndim == 2 else values
    if values.shape != shape:
        raise UserError(f"{url} has images of shape {values.shape}, {PACK_NAME} says {shape}: pack again")
    return values


main = entry("encode")

if __name__ == "__main__":
    sys.exit(main())
