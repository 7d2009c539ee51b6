"""Images as sequences of tokens and back: black and white pixels, or codes of a small autoencoder.

The autoencoder rounds each of a few channels to a few levels (finite scalar quantization: Mentzer et al., "Finite
Scalar Quantization: VQ-VAE Made Simple", 2023), so it has no codebook that could collapse.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from imm_scale import storage
from imm_scale.data.manifest import TokenCodec
from imm_scale.errors import UserError

BINARY, CODES = "binary", "codes"
THRESHOLD = 128  # of 0 to 255: from here on a pixel is 1
BINARY_HASH = hashlib.sha256(f"a token is 1 where a pixel of 0 to 255 is at least {THRESHOLD}".encode()).hexdigest()
AUTOENCODER_FILE = "autoencoder.safetensors"  # beside the manifest of a data set of codes
_METADATA = "fsq"
_AT_ONCE = 64  # images; fixed, because convolutions of other batches round differently
_EDGE = 1e-3  # how far beyond the outermost levels values may go before they are rounded

Decoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FSQShape:
    """Sizes of an autoencoder.

    Attributes:
        side, channels: of its square images.
        levels: of each channel of a code; the vocabulary is their product.
        grid: codes on a side.
        width: channels inside.
        trained_on: says what it was trained on and how.
    """

    side: int
    channels: int
    levels: tuple[int, ...] = (8, 5, 5)
    grid: int = 8
    width: int = 64
    trained_on: str = ""

    @property
    def factor(self) -> int:
        """Pixels of a side that a code stands for, a power of 2; images are padded to grid x factor."""
        return 2 ** max(0, math.ceil(math.log2(self.side / self.grid)))

    @property
    def vocabulary(self) -> int:
        """Different codes."""
        return math.prod(self.levels)


def bounded(z_NCHW: Tensor, levels: tuple[int, ...]) -> Tensor:
    """(N, C, H, W) values squeezed so that rounding them gives exactly `levels` different numbers a channel."""
    count = torch.tensor(levels, dtype=z_NCHW.dtype, device=z_NCHW.device)[:, None, None]
    half = (count - 1) * (1 + _EDGE) / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0).to(z_NCHW.dtype)  # an even number of levels lies beside 0
    return torch.tanh(z_NCHW + torch.atanh(offset / half)) * half - offset


def rounded(z_NCHW: Tensor) -> Tensor:
    """Whole numbers, with the gradient of the values before (straight through)."""
    return z_NCHW + (z_NCHW.round() - z_NCHW).detach()


def to_ids(q_NCHW: Tensor, levels: tuple[int, ...]) -> Tensor:
    """(N, H W) int64 numbers of the rounded (N, C, H, W) levels, mixed radix, the first channel fastest."""
    digits = q_NCHW.long() + _lowest(levels, q_NCHW.device)
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=q_NCHW.device)[:, None, None]
    return (digits * basis).sum(dim=1).flatten(1)


def from_ids(ids_NT: Tensor, levels: tuple[int, ...], grid: int) -> Tensor:
    """The rounded (N, C, grid, grid) levels of (N, T) numbers, fp32."""
    rest, digits = ids_NT.long(), []
    for count in levels:
        digits.append(rest % count)
        rest = rest // count
    q_NCHW = torch.stack(digits, dim=1).unflatten(2, (grid, grid)) - _lowest(levels, ids_NT.device)
    return q_NCHW.float()


def _lowest(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """By how much the lowest level of each channel lies below 0."""
    return torch.tensor([count // 2 for count in levels], device=device)[:, None, None]


def _stack(inputs: int, width: int, outputs: int) -> list[nn.Module]:
    channels = [inputs, width, width, outputs]
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, 1, 1), nn.SiLU()]
    return layers[:-1]


class FSQAutoencoder(nn.Module):
    """Convolutions from an image to a grid of codes and back."""

    def __init__(self, shape: FSQShape):
        super().__init__()
        self.shape = shape
        width, pixels = shape.width, shape.channels * shape.factor**2
        # Whole patches are the channels from the start, so that every convolution works on the small grid.
        self.encoder = nn.Sequential(nn.PixelUnshuffle(shape.factor), *_stack(pixels, width, len(shape.levels)))
        self.decoder = nn.Sequential(*_stack(len(shape.levels), width, pixels), nn.PixelShuffle(shape.factor))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Reconstructions (N, C, H, W) of images in [-1, 1]."""
        return self._decoded(rounded(self._levels(x_NCHW)))

    def _levels(self, x_NCHW: Tensor) -> Tensor:
        """(N, levels, grid, grid) before they are rounded."""
        more = self.shape.grid * self.shape.factor - self.shape.side
        padded = F.pad(x_NCHW, (more // 2, more - more // 2) * 2, value=-1.0)
        return bounded(self.encoder(padded), self.shape.levels)

    def _decoded(self, q_NCHW: Tensor) -> Tensor:
        scale = torch.tensor([max(n // 2, 1) for n in self.shape.levels], device=q_NCHW.device)[:, None, None]
        side, start = self.shape.side, (self.shape.grid * self.shape.factor - self.shape.side) // 2
        pixels: Tensor = self.decoder(q_NCHW / scale)
        return pixels[..., start : start + side, start : start + side]

    @torch.no_grad()
    def encode(self, images_NHWC: Tensor) -> Tensor:
        """(N, T) int64 codes of uint8 (N, H, W, C) images."""
        parts = [self._levels(to_signed(part)).round() for part in images_NHWC.split(_AT_ONCE)]
        return to_ids(torch.cat(parts), self.shape.levels)

    @torch.no_grad()
    def decode(self, ids_NT: Tensor) -> Tensor:
        """uint8 (N, H, W, C) images of (N, T) codes."""
        q_NCHW = from_ids(ids_NT.cpu(), self.shape.levels, self.shape.grid)
        x_NCHW = torch.cat([self._decoded(part) for part in q_NCHW.split(_AT_ONCE)])
        pixels = ((x_NCHW + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous()

    def to_bytes(self) -> bytes:
        """The file of its weights and sizes."""
        # One entry: the order of several differs from process to process, and the file's hash with it.
        metadata = {_METADATA: json.dumps(asdict(self.shape), sort_keys=True)}
        weights = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        return safetensors.torch.save(weights, metadata)


def to_signed(images_NHWC: Tensor) -> Tensor:
    """(N, C, H, W) fp32 in [-1, 1] of uint8 (N, H, W, C) images."""
    return images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def read_autoencoder(data: bytes, where: str) -> FSQAutoencoder:
    """From the bytes of its file. Raises UserError, naming `where` they are from, for other files."""
    try:
        length = int.from_bytes(data[:8], "little")
        fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA])
        net = FSQAutoencoder(FSQShape(**{**fields, "levels": tuple(fields["levels"])}))
        net.load_state_dict(safetensors.torch.load(data))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{where} is no autoencoder of imm-scale pack-tokens ({type(error).__name__}: {error}): name the "
            f"{AUTOENCODER_FILE} beside a manifest of codes"
        ) from error
    return net.eval().requires_grad_(False)


def binarized(images_NHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, H W) tokens of grey images, row by row: 1 where a pixel is bright."""
    return (images_NHW >= THRESHOLD).reshape(len(images_NHW), -1).astype(np.uint8)


def open_decoder(codec: TokenCodec, folder: str) -> Decoder:
    """What turns (N, T) tokens of a manifest in `folder` into uint8 (N, H, W, channels) images.

    Raises:
        UserError: tokens of a text, or an autoencoder that is missing or not the one the data were packed with.
    """
    if codec.image_shape is None:
        raise UserError(f"tokens of {codec.tokenizer} stand for a text, not for images")
    if codec.tokenizer == BINARY:
        height, width = codec.image_shape
        return lambda ids_NT: (ids_NT.cpu().to(torch.uint8) * 255).reshape(-1, height, width, 1)
    url = storage.join(folder, AUTOENCODER_FILE)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UserError(f"no autoencoder at {url}: copy it there, it was written beside the manifest") from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != codec.tokenizer_hash:
        raise UserError(
            f"{url} has sha256 {actual[:12]}, the data were packed with {codec.tokenizer_hash[:12]}: copy that one "
            "there"
        )
    return read_autoencoder(data, url).decode
