"""Small data sets of tokens, written as shards in a moment."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from imm_scale.data.manifest import Manifest, TokenCodec
from imm_scale.data.shards import write_shard

SHARD_SAMPLES = 512
NET = ("data.space.name=tokens", "model.name=token_transformer")


def write(folder: Path, ids_NT: NDArray[np.integer], labels: list[int], codec: TokenCodec) -> str:
    """Ids (N, T) as shards; the manifest's URL."""
    stored, shards = ids_NT.astype(codec.stored_dtype), []
    for number, start in enumerate(range(0, len(stored), SHARD_SAMPLES)):
        stop = min(start + SHARD_SAMPLES, len(stored))
        keys = [f"{i:06d}" for i in range(start, stop)]
        shards.append(write_shard(str(folder), f"t-{number:06d}.tar", keys, stored[start:stop], labels[start:stop]))
    url = str(folder / "manifest.json")
    Manifest(codec, (stored.shape[1],), max(labels) + 1, (), tuple(shards)).save(url)
    return url


def binary_digits(folder: Path, first: int = 0, last: int | None = None) -> str:
    """Digits of scikit-learn, an id for each of 64 pixels: 1 where it is at least 8."""
    digits = load_digits()
    ids = (digits.data[first:last] >= 8).astype(np.uint8)
    codec = TokenCodec(2, "binary", "0" * 64, (8, 8), 64 * 8.0)
    return write(folder, ids, digits.target[first:last].tolist(), codec)
