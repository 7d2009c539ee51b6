"""Trains a small diffusers AutoencoderKL on packed images: enough of a VAE to try the latent path without a GPU."""

import os
import shutil
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from data_tools.common import load_pack
from data_tools.encode import read_batches

# Recipe of latent diffusion at toy size: squared error, and a KL term only large enough to keep latents near N(0, 1).
_CHANNELS = (16, 32, 32)  # three levels: a factor of 4
_LATENT_CHANNELS = 4
_KL_WEIGHT = 1e-4
_LEARNING_RATE = 2e-3


def build() -> Any:
    """An AutoencoderKL with random weights: RGB images to 4 channels at a quarter of the size."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(_CHANNELS),
        up_block_types=["UpDecoderBlock2D"] * len(_CHANNELS),
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=32,
    )


def images_of(pack_url: str) -> Tensor:
    """All images of a pack, uint8 (N, H, W, C)."""
    pack = load_pack(pack_url)
    return torch.cat([batch.images_NHWC for batch in read_batches(pack_url, pack, range(len(pack.shards)), 256)])


def train(pack_url: str, out: str, steps: int, batch_size: int = 32, seed: int = 0) -> None:
    """Trains on the images of a pack and writes a `save_pretrained` folder, in one move; a finished one is kept."""
    if os.path.isdir(out):
        return
    torch.manual_seed(seed)
    model = build()
    images = images_of(pack_url)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    with tqdm(range(steps), desc="autoencoder", unit="step", disable=None) as progress:
        for _ in progress:
            chosen = images[torch.randint(len(images), (batch_size,))]
            x = chosen.permute(0, 3, 1, 2).float() / 127.5 - 1.0
            posterior = model.encode(x).latent_dist
            error = (model.decode(posterior.sample()).sample - x).square().mean()
            loss = error + _KL_WEIGHT * posterior.kl().mean() / x[0].numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(error=f"{error.item():.4f}")
    staged = f"{out}.unfinished"
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    os.rename(staged, out)
    print(f"autoencoder: squared error {error.item():.4f} of the last batch, saved to {out}")
