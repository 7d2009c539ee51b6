"""Shards of windows and their manifest; an interrupted job goes on after its whole shards, to the same bytes."""

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.common import read_json, write_json
from data_tools.tokens.spool import Spool
from imm_scale import rng, storage
from imm_scale.data.manifest import Manifest, ShardInfo, TokenCodec
from imm_scale.data.shards import write_shard
from imm_scale.data.tokens.images import AUTOENCODER_FILE
from imm_scale.data.tokens.tokenizers import TOKENIZER_FILE
from imm_scale.errors import UserError

MANIFEST, IDENTITY, HELD_OUT = "manifest.json", "tokens.json", "heldout"
_RECORD = re.compile(r"tokens-\d{6}\.json")
_NAMES = [r"tokens-\d{6}\.(tar|json|index\.npy)", *map(re.escape, (MANIFEST, IDENTITY, HELD_OUT))]
_NAMES += map(re.escape, (AUTOENCODER_FILE, TOKENIZER_FILE))
_OURS = re.compile(rf"({'|'.join(_NAMES)})(\.[0-9a-f]{{8}}\.tmp)?")


@dataclass(frozen=True)
class Target:
    """What a folder is to hold.

    Attributes:
        folder: URL.
        identity: what decides its bytes, for the records of finished shards.
        starts, labels: (n,) where windows begin in the spool, and their classes.
        length: tokens of a window.
        num_classes, class_names: as the manifest has them.
        files: to be written beside the manifest.
    """

    folder: str
    identity: dict[str, Any]
    codec: TokenCodec
    starts: NDArray[np.int64]
    labels: NDArray[np.int64]
    length: int
    num_classes: int
    class_names: tuple[str, ...]
    files: dict[str, bytes]


def check_folder(folder: str) -> None:
    """Raises UserError where something else lies in it."""
    foreign = [name for name in storage.list_names(folder) if not _OURS.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{folder} holds {foreign[0]!r}, which is no part of packed tokens: choose an empty or new folder"
        )


def write(target: Target, spool: Spool, shard_samples: int, seed: int, title: str) -> Manifest:
    """Shuffles the windows once, writes the shards that are not there yet, and last the manifest."""
    bits = rng.random_bits(seed, "pack", torch.arange(len(target.starts)))
    order = torch.argsort(bits, stable=True).numpy()
    shards: list[ShardInfo] = []
    with tqdm(total=len(order), desc=title, unit="window", disable=None) as progress:
        for first in range(0, len(order), shard_samples):
            rows = order[first : first + shard_samples]
            shards.append(_shard(target, spool, len(shards), first, rows))
            progress.update(len(rows))
    for name, data in target.files.items():
        storage.write_bytes(storage.join(target.folder, name), data)
    manifest = Manifest(target.codec, (target.length,), target.num_classes, target.class_names, tuple(shards))
    manifest.save(storage.join(target.folder, MANIFEST))
    return manifest


def remove_records(folder: str) -> None:
    """Once all is there, what finished shards left beside them."""
    for name in storage.list_names(folder):
        if _RECORD.fullmatch(name):
            storage.remove(storage.join(folder, name))


def _stem(number: int) -> str:
    return f"tokens-{number:06d}"


def _shard(target: Target, spool: Spool, number: int, first: int, rows: NDArray[np.int64]) -> ShardInfo:
    """A shard and then its record, or what the record of a finished one says."""
    url = storage.join(target.folder, f"{_stem(number)}.json")
    finished = _finished(target, url)
    if finished is not None:
        return finished
    tokens_NT = spool.tokens[target.starts[rows, None] + np.arange(target.length)]
    keys = [f"{first + i:08d}" for i in range(len(rows))]
    info = write_shard(target.folder, f"{_stem(number)}.tar", keys, tokens_NT, target.labels[rows].tolist())
    write_json(url, {"identity": target.identity, "shard": asdict(info)})
    return info


def _finished(target: Target, url: str) -> ShardInfo | None:
    """What a record of this job says of a shard that is there, in its whole length."""
    try:
        record = read_json(url)
        info = ShardInfo(**record["shard"])
    except (FileNotFoundError, UserError, KeyError, TypeError):
        return None
    tar, index = (storage.join(target.folder, name) for name in (info.name, info.index_name))
    whole = storage.exists(tar) and storage.size(tar) == info.bytes and storage.exists(index)
    return info if whole and record["identity"] == target.identity else None


def check_identity(folder: str, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished pack of the same tokens, None of an unfinished one or a new folder.

    Raises:
        UserError: the folder holds other tokens, or lacks a shard.
    """
    try:
        existing = read_json(storage.join(folder, IDENTITY))
    except FileNotFoundError:
        return None
    differing = [key for key in identity if key != "source" and existing.get(key) != identity[key]]
    if differing:
        said = ", ".join(f"{key} {existing.get(key)!r} (asked for: {identity[key]!r})" for key in differing)
        raise UserError(f"{folder} holds other tokens; they differ in {said}: choose another --out")
    url = storage.join(folder, MANIFEST)
    if not storage.exists(url):
        return None
    manifest = Manifest.load(url)
    for info in manifest.shards:
        shard = storage.join(folder, info.name)
        if not storage.exists(shard) or storage.size(shard) != info.bytes:
            raise UserError(f"{shard} is missing or not of {info.bytes} bytes: remove {url} to pack again")
    return manifest
