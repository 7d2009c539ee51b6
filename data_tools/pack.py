"""Packs images into WebDataset tars of PNGs: `imm-scale pack --help`."""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from data_tools import images, sources
from data_tools.common import LABELS_NAME, PACK_NAME, ImageShard, Pack, load_pack, paths_are_the_users, write_json
from data_tools.images import Rendered, Unreadable
from data_tools.sources import Source
from imm_scale import rng, storage
from imm_scale.cli import entry
from imm_scale.data import tar
from imm_scale.errors import UserError

QUARANTINE_NAME = "quarantine.txt"
_WINDOW = 1024  # images handed to the workers at once: bounds what waits in memory
_OUR_NAMES = "|".join([r"images-\d{6}\.tar", *map(re.escape, (LABELS_NAME, PACK_NAME, QUARANTINE_NAME))])
_OURS = re.compile(rf"({_OUR_NAMES})(\.[0-9a-f]{{8}}\.tmp)?")


@paths_are_the_users()
def pack(args: argparse.Namespace) -> None:
    """Does what the command line asks. Raises UserError."""
    _check_arguments(args)
    arguments = _identity(args)
    if _finished(args.out, arguments):
        return
    _clear_unfinished(args.out)
    source = sources.find(args.source, args.labels, args.image_column, args.label_column)
    quarantine: list[str] = []
    writer = _ShardWriter(args.out, args.shard_bytes, args.shard_samples)
    try:
        with tqdm(total=len(source.images), unit="image", disable=None) as progress:
            shape = _write_images(args, arguments["channels"], source, writer, quarantine, progress)
    finally:
        storage.write_text(storage.join(args.out, QUARANTINE_NAME), "".join(line + "\n" for line in quarantine))
    write_json(storage.join(args.out, LABELS_NAME), {str(label): name for label, name in enumerate(source.class_names)})
    result = Pack(arguments, shape, len(quarantine), tuple(writer.shards))
    result.save(args.out)
    print(
        f"packed {result.num_images} images {'x'.join(str(n) for n in shape)} of {len(source.class_names)} classes in "
        f"{len(result.shards)} shards into {args.out}; left out: {len(quarantine)}"
    )


def _check_arguments(args: argparse.Namespace) -> None:
    for name, least in (("size", 1), ("shard_bytes", 1), ("shard_samples", 1), ("max_bad", 0), ("workers", 1)):
        value = getattr(args, name)
        if isinstance(value, int) and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide what the shards hold."""
    is_digits = args.source in sources.BUILT_IN
    return {
        "source": args.source if is_digits else os.path.abspath(args.source),
        "labels": args.labels and os.path.abspath(args.labels),
        "size": args.size,
        "channels": args.channels if args.channels is not None else (1 if is_digits else 3),
        "shard_bytes": args.shard_bytes,
        "shard_samples": args.shard_samples,
        "seed": args.seed,
    }


def _finished(out: str, arguments: dict[str, Any]) -> bool:
    try:
        existing = load_pack(out)
    except FileNotFoundError:
        return False
    differing = [
        f"{key} {existing.arguments.get(key)!r} (asked for: {value!r})"
        for key, value in arguments.items()
        if existing.arguments.get(key) != value
    ]
    if differing:
        raise UserError(f"{out} holds another pack, with {', '.join(differing)}: choose another --out")
    for shard in existing.shards:
        url = storage.join(out, shard.name)
        if not storage.exists(url) or storage.size(url) != shard.bytes:
            raise UserError(
                f"{url} is missing or not of {shard.bytes} bytes: remove {storage.join(out, PACK_NAME)} to pack again"
            )
    print(f"already packed: {existing.num_images} images in {len(existing.shards)} shards in {out}")
    return True


def _clear_unfinished(out: str) -> None:
    """Removes what an interrupted job left, and refuses a folder with anything else in it."""
    names = storage.list_names(out)
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign:
        raise UserError(f"{out} holds {foreign[0]!r}, which is no part of a pack: choose an empty or new folder")
    for name in names:
        storage.remove(storage.join(out, name))


def _write_images(
    args: argparse.Namespace,
    channels: int,
    source: Source,
    writer: "_ShardWriter",
    quarantine: list[str],
    progress: "tqdm[Any]",
) -> tuple[int, int, int]:
    """Renders all images in shuffled order and writes the shards; returns the shape they share."""
    first: tuple[str, tuple[int, int, int]] | None = None
    for i, rendered in _render_shuffled(source, channels, args.size, args.seed, args.workers):
        progress.update()
        if isinstance(rendered, Unreadable):
            quarantine.append(f"{source.names[i]}\t{rendered.reason}")
            if len(quarantine) > args.max_bad:
                raise UserError(
                    f"more than {args.max_bad} unreadable images, the last one {quarantine[-1]!r}; see "
                    f"{storage.join(args.out, QUARANTINE_NAME)}, mend them or raise --max-bad"
                )
            continue
        first = first or (source.names[i], rendered.shape)
        if rendered.shape != first[1]:
            raise UserError(
                f"images of different sizes: {first[0]} has {_size(first[1])} pixels, {source.names[i]} "
                f"{_size(rendered.shape)}: give --size to crop and resize them all"
            )
        writer.add(rendered.png, source.labels[i])
    if first is None:
        raise UserError(f"no readable images in {args.source}: {len(quarantine)} unreadable, {quarantine[0]!r} first")
    writer.flush()
    return first[1]


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _render_shuffled(
    source: Source, channels: int, size: int | None, seed: int, workers: int
) -> Iterator[tuple[int, Rendered | Unreadable]]:
    order = torch.argsort(rng.random_bits(seed, "pack", torch.arange(len(source.images))), stable=True).tolist()
    job = partial(images.render, channels=channels, size=size)
    with ExitStack() as stack:
        # Spawned, because forking a process with torch's threads may hang.
        pool = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn"))) if workers > 1 else None
        for start in range(0, len(order), _WINDOW):
            window = order[start : start + _WINDOW]
            inputs = [source.images[i] for i in window]
            yield from zip(window, pool.map(job, inputs, chunksize=16) if pool else map(job, inputs), strict=True)


class _ShardWriter:
    """Gathers images into tars of at most so many bytes (but one image) and samples, each written whole."""

    def __init__(self, out: str, shard_bytes: int, shard_samples: int) -> None:
        self._out, self._shard_bytes, self._shard_samples = out, shard_bytes, shard_samples
        self._records: list[bytes] = []
        self._count = self._bytes = 0
        self.shards: list[ImageShard] = []

    def add(self, png: bytes, label: int) -> None:
        key = f"{self._count:08d}"
        record = tar.member(f"{key}.png", png) + tar.member(f"{key}.cls", str(label).encode())
        full = self._bytes + len(record) + len(tar.end()) > self._shard_bytes
        if full or len(self._records) == self._shard_samples:
            self.flush()
        self._records.append(record)
        self._bytes += len(record)
        self._count += 1

    def flush(self) -> None:
        """Writes what is gathered, if anything."""
        if not self._records:
            return
        name = f"images-{len(self.shards):06d}.tar"
        data = b"".join([*self._records, tar.end()])
        storage.write_bytes(storage.join(self._out, name), data)
        self.shards.append(ImageShard(name, len(self._records), len(data), hashlib.sha256(data).hexdigest()))
        self._records.clear()
        self._bytes = 0


main = entry("pack")

if __name__ == "__main__":
    sys.exit(main())
