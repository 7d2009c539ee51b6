"""A data set of random latents, as `data_tools.encode` would leave it."""

import numpy as np

from imm_scale.data.manifest import Codec, Manifest
from imm_scale.data.shards import write_shard

SHAPE, SHARD = (8, 32, 32), 1024


def latents(shard: int, samples: int = SHARD, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    values = np.random.default_rng(shard).standard_normal((samples, *shape), np.float32)
    return np.clip(np.abs(values) / 8, 0, 1).astype(np.float16)


def write(
    url: str, kind: str, shards: int, samples: int = SHARD, shape: tuple[int, int, int] = SHAPE, classes: int = 1
) -> str:
    """URL of the manifest.

    Args:
        kind: "pixels", or "vae" whose latents have half of the stored channels.
        samples: of one shard.
        shape: as stored.
    """
    infos = [
        write_shard(
            url,
            f"s-{s:03d}.tar",
            [f"{s:03d}{i:05d}" for i in range(samples)],
            latents(s, samples, shape),
            [i % classes for i in range(samples)],
        )
        for s in range(shards)
    ]
    channels, factor = (shape[0], 1) if kind == "pixels" else (shape[0] // 2, 8)
    codec = Codec(kind, "", shape[1] * factor, channels, factor, (0.5,) * channels, (0.2,) * channels)
    Manifest(codec, (channels, *shape[1:]), classes, (), tuple(infos)).save(f"{url}/manifest.json")
    return f"{url}/manifest.json"
