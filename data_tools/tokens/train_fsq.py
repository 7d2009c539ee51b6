"""Trains the small autoencoder whose codes `imm-scale pack-tokens --source codes` writes."""

import argparse
import hashlib
import json

import torch
from tqdm import tqdm

from data_tools.encode import load_images
from data_tools.tokens.corpus import all_images
from imm_scale import rng, storage
from imm_scale.data.tokens.images import AUTOENCODER_FILE, FSQAutoencoder, FSQShape, read_autoencoder, to_signed
from imm_scale.errors import UserError

_BATCH = 64
_LR = 2e-3


def autoencoder(args: argparse.Namespace) -> tuple[FSQAutoencoder, bytes, str]:
    """The autoencoder of --autoencoder, or one that an interrupted job left in --out, or a new one: net, file, hash.

    A new one is stored in --out at once, so that the job goes on with it.

    Raises:
        UserError: a file that is none, or one in --out that was trained on other images or otherwise.
    """
    url = args.autoencoder or storage.join(args.out, AUTOENCODER_FILE)
    if args.autoencoder is not None or storage.exists(url):
        try:
            data = storage.read_bytes(url)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(
                f"no autoencoder at {url}: name an {AUTOENCODER_FILE}, or leave --autoencoder out"
            ) from error
        net = read_autoencoder(data, url)
        if args.autoencoder is None and net.shape.trained_on != _trained_on(args):
            raise UserError(
                f"{url} was trained on other images or otherwise: choose another --out, or name it: --autoencoder"
            )
    else:
        net = train(all_images(args.images), args.train_steps, args.seed, _trained_on(args))
        data = net.to_bytes()
        storage.write_bytes(url, data)
    return net, data, hashlib.sha256(data).hexdigest()


def _trained_on(args: argparse.Namespace) -> str:
    """Shards of the images, steps and seed, in few characters."""
    shards = [shard.sha256 for shard in load_images(args.images).shards]
    return hashlib.sha256(json.dumps([shards, args.train_steps, args.seed]).encode()).hexdigest()


def train(images_NHWC: torch.Tensor, steps: int, seed: int, trained_on: str = "") -> FSQAutoencoder:
    """An autoencoder of least squared error on uint8 (N, H, W, C) images, its learning rate falling to 0.

    Raises:
        UserError: images that are not square.
    """
    height, width, channels = images_NHWC.shape[1:]
    if height != width:
        raise UserError(f"images of {height}x{width}: the autoencoder takes squares, pack them with --size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FSQAutoencoder(FSQShape(height, channels, trained_on=trained_on))
    optimizer = torch.optim.Adam(net.parameters(), _LR)
    for step in tqdm(range(steps), desc="autoencoder", unit="step", disable=None):
        optimizer.param_groups[0]["lr"] = _LR * (1 - step / steps)
        ordinal = torch.arange(step * _BATCH, (step + 1) * _BATCH)
        rows = (rng.uniform(seed, "autoencoder", ordinal)[:, 0] * len(images_NHWC)).long()
        x_NCHW = to_signed(images_NHWC[rows])
        loss = (net(x_NCHW) - x_NCHW).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)
