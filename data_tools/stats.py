"""Numbers and a picture of a data set: `imm-scale stats --help`."""

import argparse
import io
import math
import sys

import numpy as np
import torch
from PIL import Image

from data_tools.common import paths_are_the_users
from data_tools.statistics import ChannelSums
from data_tools.tokens import numbers
from imm_scale import storage
from imm_scale.cli import entry
from imm_scale.data import codec as codecs
from imm_scale.data import sample_order
from imm_scale.data.dataset import Dataset
from imm_scale.errors import UserError

_CHUNK = 256


def bit_compression(pixels: int, image_channels: int, bits_per_position: float) -> float:
    """Bits of the 8-bit pixels that one latent position stands for, over the bits of that position.

    Args:
        pixels: pixels per latent position: factor^2, or frames x factor^2 of a video codec.
        bits_per_position: channels x bits of continuous latents, log2(vocabulary) of tokens.
    """
    return pixels * image_channels * 8 / bits_per_position


@paths_are_the_users()
def stats(args: argparse.Namespace) -> None:
    """Does what the command line asks. Raises UserError."""
    _check_options(args)
    dataset = Dataset(args.manifest)
    if dataset.manifest.vocabulary is not None:
        if args.page is not None:
            raise UserError(f"--page {args.page} is for latents: {args.manifest} holds tokens, leave it out")
        print("\n".join([*numbers.lines(dataset), *_classes(dataset)]))
        return
    decoder = codecs.open_codec(dataset.manifest.latent_codec, args.vae) if args.page else None
    for line in [*_moments(dataset), *_classes(dataset), *_compression(dataset, args)]:
        print(line)
    if decoder is not None:
        picture = io.BytesIO()
        _page(dataset, args, decoder).save(picture, "PNG")
        storage.write_bytes(args.page, picture.getvalue())
        print(f"page of {args.rows} classes x {args.columns} samples: {args.page}")


def _check_options(args: argparse.Namespace) -> None:
    if args.page is None and args.vae is not None:
        raise UserError(f"--vae {args.vae} decodes the page: give --page PNG, or leave it out")
    if args.page is not None and not args.page.lower().endswith(".png"):
        raise UserError(f"--page {args.page}: the page is a PNG, give it a name that ends in .png")
    for name in ("columns", "rows"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: it must be at least 1")
    if args.page is not None:
        storage.check_writable(storage.parent(args.page))


def _moments(dataset: Dataset) -> list[str]:
    codec = dataset.manifest.latent_codec
    sums = ChannelSums.zero(codec.channels)
    norms: list[np.ndarray] = []
    table = sample_order.block_table(dataset.shard_samples, _CHUNK)
    for start, size in zip(table.start.tolist(), table.size.tolist(), strict=True):
        stored = dataset.read(start, start + size)
        sums = sums + ChannelSums.of(stored, codec)
        raw, _ = codecs.posterior(torch.from_numpy(stored).float(), codec)
        z = codecs.normalize(raw, codec.mean, codec.std)
        norms.append(z.flatten(1).norm(dim=1).numpy() / math.sqrt(z[0].numel()))
    norm = np.concatenate(norms)
    mean, std = sums.mean_std()
    lines = ["channel        mean         std   manifest mean, std"]
    rows = zip(mean, std, codec.mean, codec.std, strict=True)
    lines += [f"{i:7d} {m:11.5f} {s:11.5f}   {a:.5f}, {b:.5f}" for i, (m, s, a, b) in enumerate(rows)]
    lines.append(
        f"root mean square of a normalized sample: {norm.mean():.4f} on average, {norm.min():.4f} to {norm.max():.4f}"
    )
    return lines


def _classes(dataset: Dataset) -> list[str]:
    counts = np.bincount(dataset.labels, minlength=dataset.manifest.num_classes)
    names = dataset.manifest.class_names or tuple(str(i) for i in range(len(counts)))
    lines = [f"{len(dataset)} samples in {len(counts)} classes of {counts.min()} to {counts.max()}"]
    return lines + [f"  {count:8d}  {i:5d}  {names[i]}" for i, count in enumerate(counts.tolist())]


def _compression(dataset: Dataset, args: argparse.Namespace) -> list[str]:
    codec, (_, height, width) = dataset.manifest.latent_codec, dataset.manifest.latent_shape
    patch = args.patch_size
    if patch < 1 or height % patch or width % patch or args.vocabulary < 2 or args.latent_bits < 1:
        raise UserError(
            f"--patch-size {args.patch_size}, --vocabulary {args.vocabulary} or --latent-bits {args.latent_bits} do "
            f"not fit latents of {height}x{width}"
        )
    channels = codec.channels if codec.kind == "pixels" else 3
    pixels = codec.factor**2
    continuous = bit_compression(pixels, channels, codec.channels * args.latent_bits)
    tokens = bit_compression(pixels, channels, math.log2(args.vocabulary))
    return [
        f"{height}x{width} = {height * width} positions of {codec.channels} channels; with patches of "
        f"{args.patch_size} a sequence of {height * width // args.patch_size**2}",
        f"bit compression: {continuous:.4g} (pixel bits over {codec.channels} x {args.latent_bits} bits of latent); "
        f"with tokens of a vocabulary of {args.vocabulary}: {tokens:.4g}",
    ]


def _page(dataset: Dataset, args: argparse.Namespace, decoder: codecs.ImageCodec) -> Image.Image:
    """The first samples of the first classes, decoded from their mean."""
    codec = dataset.manifest.latent_codec
    height, width = codec.image_shape
    page = Image.new("RGB", (args.columns * width, args.rows * height))
    for row in range(min(args.rows, dataset.manifest.num_classes)):
        for column, sample in enumerate(np.flatnonzero(dataset.labels == row)[: args.columns].tolist()):
            raw, _ = codecs.posterior(torch.from_numpy(dataset.read(sample, sample + 1)).float(), codec)
            pixels = decoder.decode(raw)[0].numpy()
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
            page.paste(picture, (column * width, row * height))
    return page


main = entry("stats")

if __name__ == "__main__":
    sys.exit(main())
