"""Held-out sequences out of shards, arrays and text: the same ones, spread evenly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imm_scale.data import manifest
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.data.shards import write_shard
from imm_scale.errors import UserError
from imm_scale.evaluation.foreign import held_out

TOKENS = np.arange(40).reshape(10, 4)


def _write(folder: Path, codec: Any, shape: tuple[int, ...], stored: np.ndarray) -> str:
    """A manifest of two shards."""
    halves = enumerate(np.array_split(stored, 2))
    shards = [
        write_shard(str(folder), f"{i}.tar", [f"{i}-{j}" for j in range(len(h))], h, [0] * len(h)) for i, h in halves
    ]
    Manifest(codec, shape, 1, (), tuple(shards)).save(str(folder / "manifest.json"))
    return str(folder / "manifest.json")


@pytest.mark.skipif(not hasattr(manifest, "TokenCodec"), reason="shards hold no tokens yet")
def test_sequences_of_a_manifest(tmp_path):
    url = _write(tmp_path, manifest.TokenCodec(256, "bytes", "ab" * 32), (4,), TOKENS.astype(np.uint8))
    assert np.array_equal(held_out.read(url, None, None, 100), TOKENS)
    assert np.array_equal(held_out.read(url, None, None, 3), TOKENS[[0, 3, 6]])
    with pytest.raises(UserError, match=r"--length 5: .* has sequences of 4"):
        held_out.read(url, None, 5, 100)


def test_latents_are_no_tokens(tmp_path):
    codec = Codec("pixels", "", 2, 1, 1, (0.0,), (1.0,))
    url = _write(tmp_path, codec, (1, 2, 2), np.zeros((4, 1, 2, 2), np.float16))
    with pytest.raises(UserError, match=r"holds latents \(pixels\), where tokens are needed"):
        held_out.read(url, None, None, 100)


def test_an_array_and_a_text(tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    assert np.array_equal(held_out.read(str(tmp_path / "tokens.npy"), None, None, 5), TOKENS[::2])
    (tmp_path / "text").write_text("abcdefghij")
    assert held_out.read(str(tmp_path / "text"), "bytes", 3, 100).tolist() == [
        [97, 98, 99],
        [100, 101, 102],
        [103, 104, 105],
    ]
    with pytest.raises(UserError, match="10 tokens, fewer than --length 11"):
        held_out.read(str(tmp_path / "text"), "bytes", 11, 100)
