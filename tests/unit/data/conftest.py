"""Small synthetic data sets, written with the project's own writer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imm_scale.data.manifest import Codec, Manifest
from imm_scale.data.shards import write_shard

NUM_CLASSES = 7

MakeDataset = Callable[..., str]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """make_dataset(shard_samples, kind="pixels", channels=2, side=3) -> URL of the manifest.

    Sample i of the data set has label i mod 7, and its first value is i / 64, which fp16 holds exactly.
    """

    def make(shard_samples: list[int], kind: str = "pixels", channels: int = 2, side: int = 3) -> str:
        folder = tmp_path / f"dataset-{kind}-{len(shard_samples)}-{sum(shard_samples)}"
        stored_channels = 2 * channels if kind == "vae" else channels
        generator = np.random.default_rng(0)
        shards = []
        first = 0
        for s, samples in enumerate(shard_samples):
            index = np.arange(first, first + samples)
            latents = np.abs(generator.standard_normal((samples, stored_channels, side, side))).astype(np.float16)
            latents[:, 0, 0, 0] = index / 64
            keys = [f"{i:06d}" for i in index]
            shards.append(write_shard(str(folder), f"part-{s:03d}.tar", keys, latents, (index % NUM_CLASSES).tolist()))
            first += samples
        factor = 1 if kind == "pixels" else 8
        codec = Codec(
            kind=kind,
            weights_hash="" if kind == "pixels" else "ab" * 32,
            image_size=side * factor,
            channels=channels,
            factor=factor,
            mean=tuple(0.25 * c for c in range(channels)),
            std=tuple(0.5 + c for c in range(channels)),
        )
        url = str(folder / "manifest.json")
        Manifest(codec, (channels, side, side), NUM_CLASSES, (), tuple(shards)).save(url)
        return url

    return make
