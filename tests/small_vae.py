"""A real autoencoder of the diffusers architecture, with random weights and so few of them that a test can have one."""

from pathlib import Path

import torch


def save_small_vae(folder: Path, seed: int = 0, blocks: int = 2) -> str:
    """Writes an AutoencoderKL of 4 latent channels and a factor of 2^(blocks - 1) and returns its folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
    )
    model.save_pretrained(str(folder))
    return str(folder)
