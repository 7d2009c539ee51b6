"""Packs images into WebDataset tars of PNGs: `imm-scale pack --help`."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from data_tools import images, sources
from data_tools.common import LABELS_NAME, PACK_NAME, Pack, load_pack, paths_are_the_users, write_json
from data_tools.images import Rendered, Unreadable
from data_tools.packing import closing, contact_sheet, identity, shard_writer
from data_tools.packing.shard_writer import Bad, ShardWriter
from data_tools.sources import Located, Source
from data_tools.sources.label_files import read_map
from data_tools.sources.names import printable
from imm_scale import rng, storage
from imm_scale.cli import entry
from imm_scale.errors import UserError

QUARANTINE_NAME = "quarantine.txt"
_WINDOW = 1024  # images handed to the workers at once: bounds what waits in memory
_MOST_OF_OTHER_SIZE = 0.01  # of the images: more are no accident, and the set needs --size
_FILES = [
    r"images-\d{6}\.(tar|json)",
    r"contact-\d{3,}\.png",
    *map(re.escape, (LABELS_NAME, PACK_NAME, QUARANTINE_NAME)),
]
_OURS = re.compile(rf"({'|'.join(_FILES)})(\.[0-9a-f]{{8}}\.tmp)?")


@paths_are_the_users()
def pack(args: argparse.Namespace) -> None:
    """Does what the command line asks. Raises UserError."""
    _check_arguments(args)
    label_map = None if args.labels is None else read_map(os.path.expanduser(args.labels))
    located = sources.locate(args.source)
    _check_outside(args.out, located)
    arguments = identity.of(args, located, label_map)
    if _finished(args.out, arguments, args.source_moved):
        return
    _check_folder(args.out)
    if located.kind == "built_in" and os.path.isdir(args.source[0]):
        print(f"{args.source[0]} means the built-in set; the folder of that name here is ./{args.source[0]}")
    if located.splits:
        print(f"files of several splits are packed together: {', '.join(located.splits)}")
    if located.folders:
        print(f"files of several folders are packed together: {printable(', '.join(located.folders[:5]))}")
    source = sources.find(located, label_map, args.image_column, args.label_column)
    writer = _writer(args.out, arguments, source, args.source_moved)
    try:
        _write_images(args, source, writer)
    finally:
        lines = [f"{printable(bad.name)}\t{printable(bad.reason)}\n" for bad in writer.bad]
        storage.write_text(storage.join(args.out, QUARANTINE_NAME), "".join(lines))
    _finish(args.out, source, writer)


def _check_arguments(args: argparse.Namespace) -> None:
    for name, least in (("size", 1), ("shard_bytes", 1), ("shard_samples", 1), ("max_bad", 0), ("workers", 1)):
        value = getattr(args, name)
        if isinstance(value, int) and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
    height, width = [args.size] * 2 if isinstance(args.size, int) else args.size or (1, 1)
    if height * width > images.MOST_PIXELS:
        raise UserError(f"--size {height}x{width}: at most {images.MOST_PIXELS} pixels are made of an image")
    identity.background(args.background)
    if args.labels is not None and args.source[0] in sources.BUILT_IN:
        raise UserError(f"--labels is for sources of your own: {args.source[0]} has its labels")
    if not storage.exists(storage.join(args.out, PACK_NAME)):
        storage.check_writable(args.out)


def _check_outside(out: str, located: Located) -> None:
    """What is written must not be among what is read: the next time it would be images and files of the source."""
    if located.tree is None or not storage.is_local(out):
        return
    folder, target = os.path.realpath(located.given[0]), os.path.realpath(storage.local_path(out))
    if os.path.commonpath([folder, target]) == folder:
        raise UserError(f"--out {out} lies inside --source {located.where}: choose a folder outside of it")


def _finished(out: str, arguments: dict[str, Any], moved: bool) -> bool:
    try:
        existing = load_pack(out)
    except FileNotFoundError:
        if moved and not any(map(shard_writer.is_record, storage.list_names(out))):
            raise UserError(f"--source-moved: there is no pack in {out} that could be of a moved source") from None
        return False
    identity.check_same(out, existing, arguments, moved)
    if moved:
        replace(existing, arguments={**existing.arguments, "source": arguments["source"]}).save(out)
    print(f"already packed: {existing.num_images} images in {len(existing.shards)} shards in {out}")
    return True


def _check_folder(out: str) -> None:
    foreign = [name for name in storage.list_names(out) if not _OURS.fullmatch(name)]
    if foreign:
        raise UserError(f"{out} holds {foreign[0]!r}, which is no part of a pack: choose an empty or new folder")


def _writer(out: str, arguments: dict[str, Any], source: Source, moved: bool) -> ShardWriter:
    """Goes on after the shards of the same job that are whole, and removes everything else of an unfinished one."""
    records = shard_writer.finished(out, arguments, moved)
    kept = {name for record in records for name in (record.shard.name, shard_writer.record_name(record.shard.name))}
    for name in storage.list_names(out):
        if name not in kept:
            storage.remove(storage.join(out, name))
    writer = ShardWriter(out, arguments, records)
    if records:
        print(f"goes on after the {writer.num_images} images in {len(records)} shards that are in {out}")
    else:
        writer.bad += [Bad(name, reason) for name, reason in source.bad]
    return writer


def _write_images(args: argparse.Namespace, source: Source, writer: ShardWriter) -> None:
    """Renders all images that are not in shards yet in shuffled order, and writes the shards."""
    background = identity.background(args.background)
    job = partial(images.render, channels=writer.arguments["channels"], size=args.size, background=background)
    order = torch.argsort(rng.random_bits(args.seed, "pack", torch.arange(len(source.images))), stable=True).tolist()
    rendered = _render(source, order[writer.consumed :], job, args.workers)
    other_sizes = sum("pixels, where" in bad.reason for bad in writer.bad)
    _check_bad(args, writer, other_sizes)
    with tqdm(total=len(order), initial=writer.consumed, unit="image", disable=None) as progress:
        for i, result in rendered:
            bad = _problem(result, i, source, writer)
            if bad is None:
                assert isinstance(result, Rendered)
                writer.add(result.png, source.labels[i])
            else:
                writer.bad.append(bad)
                other_sizes += isinstance(result, Rendered)
                _check_bad(args, writer, other_sizes)
            writer.consumed += 1
            progress.update()
    if writer.shape is None:
        first = writer.bad[0]
        raise UserError(
            f"no readable images in {printable(', '.join(args.source))}: {len(writer.bad)} are unreadable, the first "
            f"{printable(first.name)} ({printable(first.reason)})"
        )
    if other_sizes > _MOST_OF_OTHER_SIZE * len(order):
        raise UserError(_sizes_differ(writer, other_sizes))
    writer.flush()


def _problem(result: Rendered | Unreadable, i: int, source: Source, writer: ShardWriter) -> Bad | None:
    """Why a result is no image of the pack; the first image of all says their shape."""
    if isinstance(result, Unreadable):
        return Bad(source.names[i], result.reason)
    if writer.shape is None:
        writer.shape, writer.first_name = result.shape, source.names[i]
    if result.shape != writer.shape:
        return Bad(
            source.names[i], f"{_size(result.shape)} pixels, where {writer.first_name} has {_size(writer.shape)}"
        )
    return None


def _check_bad(args: argparse.Namespace, writer: ShardWriter, other_sizes: int) -> None:
    if len(writer.bad) <= args.max_bad:
        return
    if 2 * other_sizes > len(writer.bad):
        raise UserError(_sizes_differ(writer, other_sizes))
    last = writer.bad[-1]
    raise UserError(
        f"more than {args.max_bad} unreadable images, the last one {printable(last.name)} ({printable(last.reason)}); "
        f"see {storage.join(args.out, QUARANTINE_NAME)}, mend them or raise --max-bad"
    )


def _sizes_differ(writer: ShardWriter, other_sizes: int) -> str:
    last = next(bad for bad in reversed(writer.bad) if "pixels, where" in bad.reason)
    return (
        f"images of different sizes, {other_sizes} not of that of the first: {printable(last.name)} has "
        f"{printable(last.reason)}: give --size to crop and resize them all"
    )


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _render(source: Source, order: list[int], job: Any, workers: int) -> Iterator[tuple[int, Rendered | Unreadable]]:
    with ExitStack() as stack:
        # Spawned, because forking a process with torch's threads may hang.
        spawn = get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, _leave_interrupts) if workers > 1 else None
        if pool is not None:
            stack.callback(pool.shutdown, cancel_futures=True)  # at Ctrl-C nobody waits for a whole window
        for start in range(0, len(order), _WINDOW):
            window = order[start : start + _WINDOW]
            inputs = [source.images[i] for i in window]
            try:
                yield from zip(window, pool.map(job, inputs, chunksize=16) if pool else map(job, inputs), strict=True)
            except BrokenProcessPool as error:
                raise UserError(
                    f"a process of --workers {workers} was killed, most likely as the memory was full: take fewer; the "
                    "same command goes on where it stopped"
                ) from error


def _leave_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; only the one that gives out the work answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _finish(out: str, source: Source, writer: ShardWriter) -> None:
    """Writes what describes the shards, last of all pack.json, and says what was packed."""
    assert writer.shape is not None
    write_json(storage.join(out, LABELS_NAME), {str(label): name for label, name in enumerate(source.class_names)})
    sheets = contact_sheet.draw(out, writer.records, source.class_names)
    shards = tuple(record.shard for record in writer.records)
    Pack(writer.arguments, writer.shape, len(writer.bad), shards).save(out)
    for shard in shards:
        storage.remove(storage.join(out, shard_writer.record_name(shard.name)))
    print(
        f"packed {writer.num_images} images {'x'.join(str(n) for n in writer.shape)} of {len(source.class_names)} "
        f"classes in {len(shards)} shards into {out}"
    )
    quarantine = storage.join(out, QUARANTINE_NAME)
    lines = closing.table(source.class_names, writer.counts) + closing.left_out(source.left_out, writer.bad, quarantine)
    lines += [f"note: {note}" for note in source.notes + closing.alike(source.class_names)]
    print("\n".join([*lines, f"see what went in: {storage.join(out, sheets[0])}, 8 images of each class"]))


main = entry("pack")

if __name__ == "__main__":
    sys.exit(main())
