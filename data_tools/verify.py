"""Compares shards with their manifest, mends them, or adopts foreign ones: `imm-scale verify --help`."""

import argparse
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
import torch
from tqdm import tqdm

from data_tools import records
from data_tools.adopt import adopt
from data_tools.common import paths_are_the_users
from data_tools.encode import encode_shards, load_images, make_codec
from data_tools.foreign import EXTREME
from imm_scale import storage
from imm_scale.cli import entry
from imm_scale.data import tar
from imm_scale.data.codec import posterior
from imm_scale.data.manifest import Codec, Manifest, ShardInfo
from imm_scale.data.shards import FLIPPED, LABEL, ShardReader, open_of, stored_name
from imm_scale.errors import UserError

_REMEDY = "mend them with --repair --images FOLDER --codec ..., or copy these shards again"
_OF_TOKENS = (
    "remove the manifest and pack the same source again, which gives the same bytes, or copy these shards again"
)
# Options that say what foreign shards hold.
_OF_ADOPT = ("image_size", "num_classes", "moments", "scale", "shift", "pixel_range")


@paths_are_the_users()
def verify(args: argparse.Namespace) -> int:
    """0 all is well, 1 something is wrong and was not mended. Raises UserError."""
    _check_options(args)
    if args.adopt:
        adopt(args)
        return 0
    manifest = Manifest.load(args.manifest)
    folder = storage.parent(args.manifest)
    reports = check(folder, manifest, manifest.shards, args.workers)
    _print(reports, manifest)
    bad = [report.name for report in reports if report.problems]
    if not bad:
        return 0
    if not args.repair:
        print(_REMEDY if manifest.vocabulary is None else _OF_TOKENS, file=sys.stderr)
        return 1
    if manifest.vocabulary is not None:
        raise UserError(f"--repair encodes images, {args.manifest} holds tokens: {_OF_TOKENS}")
    _repair(args, folder, manifest, bad)
    again = check(folder, manifest, [info for info in manifest.shards if info.name in bad], args.workers)
    _print(again, manifest)
    return 1 if any(report.problems for report in again) else 0


def _check_options(args: argparse.Namespace) -> None:
    """Refuses options that would do nothing."""
    idle = ("repair", "images") if args.adopt else _OF_ADOPT
    for name in idle:
        if getattr(args, name) not in (None, False):
            verb = "is not for" if args.adopt else "is for"
            raise UserError(f"--{name.replace('_', '-')} {verb} --adopt: leave it out")
    if args.repair and (args.images is None or args.codec is None):
        raise UserError("--repair needs the images: give --images, --codec (and --vae) as for imm-scale encode")
    if not args.repair and not args.adopt and (args.images or args.codec or args.vae):
        raise UserError("--images, --codec and --vae are for --repair: give it too, or leave them out")
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}: it must be at least 1")


@dataclass
class Report:
    """What is wrong with a shard, and its labels."""

    name: str
    problems: list[str] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    samples: int = 0


def check(folder: str, manifest: Manifest, shards: Sequence[ShardInfo], workers: int) -> list[Report]:
    """A report on each of these shards, read by several processes."""
    jobs = [(folder, manifest, info) for info in shards]
    if workers <= 1 or len(jobs) == 1:
        return [check_shard(*job) for job in tqdm(jobs, unit="shard", disable=None)]
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        return list(tqdm(pool.map(check_shard, *zip(*jobs, strict=True)), total=len(jobs), unit="shard", disable=None))


def check_shard(folder: str, manifest: Manifest, info: ShardInfo) -> Report:
    """Reads one shard whole. What the user could mend is in the report; an unreachable store raises OSError."""
    report = Report(info.name)
    url = storage.join(folder, info.name)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        report.problems.append("missing")
        return report
    if len(data) != info.bytes:
        report.problems.append(f"{len(data)} bytes, the manifest says {info.bytes}")
    if hashlib.sha256(data).hexdigest() != info.sha256:
        report.problems.append("another sha256 than the manifest says")
    try:
        reader = open_of(manifest, folder, info)
        _check_contents(report, reader, data, url, manifest)
    except UserError as error:
        report.problems.append(str(error))
    return report


def _check_contents(report: Report, reader: ShardReader, data: bytes, url: str, manifest: Manifest) -> None:
    """Raises UserError at the first thing that makes the rest unreadable."""
    samples = tar.samples(data, url)
    report.samples = len(samples)
    if len(samples) != len(reader.index):
        report.problems.append(f"{len(samples)} samples in the tar, {len(reader.index)} in the index")
        return
    array = stored_name(manifest.stored_dtype)
    required = {array, LABEL} | ({FLIPPED} if manifest.flipped else set())
    for i, ((key, files), row) in enumerate(zip(samples, reader.index, strict=True)):
        if not required <= files.keys():
            report.problems.append(f"sample {i} ({key}) has only {', '.join(files)}")
            return
        label = data[files[LABEL].offset : files[LABEL].offset + files[LABEL].size]
        if files[array].offset != row["offset"] or not label.strip().isdigit() or int(label) != row["label"]:
            report.problems.append(f"sample {i} ({key}): offset or label differ from the index")
            return
    report.labels = Counter(reader.labels.tolist())
    out = np.empty((len(samples), reader.variants, *manifest.stored_shape), manifest.stored_dtype)
    start, end = reader.span(0, len(samples))
    reader.decode(data[start:end], 0, len(samples), out)
    first = data[files[array].offset : files[array].offset + files[array].size]
    np.load(io.BytesIO(first), allow_pickle=False)  # stock readers must be able to decode it
    if isinstance(manifest.codec, Codec):  # tokens outside the vocabulary are refused as they are decoded
        report.problems += _value_problems(out, manifest.codec)


def _value_problems(latents: np.ndarray, codec: Codec) -> list[str]:
    """What is wrong with stored latents (n, variants, C', H, W)."""
    problems = []
    if not np.isfinite(latents).all():
        problems.append(f"{np.count_nonzero(~np.isfinite(latents))} values are NaN or infinite")
    mean, std = posterior(torch.from_numpy(latents).flatten(0, 1).float(), codec)
    low = -1.0 if codec.pixel_range == "signed" else 0.0
    if codec.kind == "pixels" and ((mean < low) | (mean > 1)).any():
        problems.append(f"pixels outside {low:g} to 1")
    if std is not None and (std < 0).any():
        problems.append("negative standard deviations")
    if codec.kind == "vae" and any((part.abs() > EXTREME).any() for part in (mean, std) if part is not None):
        problems.append(f"values beyond {EXTREME:g}")
    return problems


def _print(reports: Sequence[Report], manifest: Manifest) -> None:
    bad = [report for report in reports if report.problems]
    width = max((len(report.name) for report in bad), default=0)
    for report in bad:
        for problem in report.problems:
            print(f"{report.name:{width}}  {problem}")
    labels: Counter[int] = Counter()
    for report in reports:
        labels.update(report.labels)
    counts = [labels[i] for i in range(manifest.num_classes)]
    print(
        f"{len(reports) - len(bad)} of {len(reports)} shards are right, {sum(counts)} samples in "
        f"{manifest.num_classes} classes of {min(counts)} to {max(counts)}"
    )
    empty = [i for i, count in enumerate(counts) if not count]
    if empty and len(reports) == len(manifest.shards):
        print(f"classes without a sample: {', '.join(map(str, empty[:20]))}")


def _repair(args: argparse.Namespace, folder: str, manifest: Manifest, bad: Sequence[str]) -> None:
    """Encodes these shards again; the manifest stays as it is, and so must their bytes."""
    codec, pack = make_codec(args), load_images(args.images)
    identity = records.identify(pack, codec, manifest.flipped)
    records.check_manifest(folder, identity)
    todo = [i for i in range(len(pack.shards)) if f"{records.stem(i)}.tar" in bad]
    if len(todo) != len(bad):
        raise UserError(f"{args.images} has no images of {', '.join(bad[:3])}: it is another pack")
    encode_shards(args.images, folder, pack, codec, identity, todo, args.batch_size)
    print(f"encoded {len(todo)} shards again")


main = entry("verify")

if __name__ == "__main__":
    sys.exit(main())
