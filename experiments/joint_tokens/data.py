"""The data sets of the study: four poker hands, verses, and black and white digits in two sizes, without classes."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments import common
from imm_scale import storage
from imm_scale.data.dataset import Dataset
from imm_scale.data.manifest import Manifest, TokenCodec
from imm_scale.data.shards import write_shard
from imm_scale.data.tokens.images import BINARY

HANDS = 4
_REPEATS = 64  # of each hand in the held-out set, sixteen times as many in the training set
_HANDS_HASH = hashlib.sha256(b"a token is a word of the name of a hand").hexdigest()


def make(name: str, folder: Path) -> dict[str, str]:
    """Writes what is not there yet; the config keys that name the data.

    Args:
        name: hands, digits, kjv or mnist.
    """
    {"hands": _hands, "digits": _digits, "kjv": _kjv, "mnist": _mnist}[name](folder)
    return {
        "data.manifest": str(folder / "manifest.json"),
        "data.holdout_manifest": str(folder / "heldout" / "manifest.json"),
    }


def _hands(folder: Path) -> None:
    """Both tokens name the hand: "high card", "two pair", "full house", "straight flush"."""
    codec = TokenCodec(HANDS, BINARY, _HANDS_HASH, (1, 2))  # as pixels, which need no tokenizer to be drawn
    hand = np.arange(HANDS).repeat(2).reshape(HANDS, 2)
    _write(folder / "heldout", np.tile(hand, (_REPEATS, 1)), codec)
    _write(folder, np.tile(hand, (16 * _REPEATS, 1)), codec)


def _digits(folder: Path) -> None:
    """1,797 digits of 8 x 8 pixels."""
    _pixels(folder, "digits", "0.25", 0)


def _mnist(folder: Path) -> None:
    """5,000 digits of 28 x 28 pixels, without the 4 at each side that are almost always empty."""
    _pixels(folder, "mnist5k", "0.08", 4)


def _pixels(folder: Path, source: str, held_out: str, margin: int) -> None:
    """Without classes: of one that is told, the first step of a sampler would know much already."""
    packed = folder / "with_classes"
    common.run("imm_scale", "pack-tokens", "--source", source, "--heldout", held_out, "--out", str(packed))
    for part in ("heldout", "."):
        dataset = Dataset(str(packed / part / "manifest.json"))
        codec = dataset.manifest.token_codec
        assert codec.image_shape is not None, "pixels of images"
        images = np.asarray(dataset.gather(np.arange(len(dataset)))).reshape(-1, *codec.image_shape)
        height, width = (side - 2 * margin for side in codec.image_shape)
        inner = images[:, margin : margin + height, margin : margin + width]
        codec = replace(codec, image_shape=(height, width), bits_in=8.0 * height * width)
        _write(folder / part, inner.reshape(len(images), -1), codec)


def _kjv(folder: Path) -> None:
    words = ("--source", "kjv", "--tokenizer", "text27", "--length", "28")
    common.run("imm_scale", "pack-tokens", *words, "--out", str(folder))


def _write(folder: Path, ids_NT: NDArray[np.integer], codec: TokenCodec) -> None:
    """Ids (N, T) of one class as a shard, the manifest last."""
    url = str(folder / "manifest.json")
    if storage.exists(url):
        return
    keys, labels = [f"{i:06d}" for i in range(len(ids_NT))], [0] * len(ids_NT)
    shard = write_shard(str(folder), "t-000000.tar", keys, ids_NT.astype(codec.stored_dtype), labels)
    Manifest(codec, (ids_NT.shape[1],), 1, (), (shard,)).save(url)
