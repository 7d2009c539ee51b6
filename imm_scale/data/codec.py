"""Images <-> raw latents <-> the network's scale.

images_NHWC uint8 --encode--> stored (what a shard keeps) --draw_raw--> raw_NCHW --normalize--> z_NCHW, and back by
denormalize and decode. `pixels` stores the raw values; `vae` stores the posterior's mean and std, and training draws
raw = mean + std * noise anew each time a sample is met. Shards that other programs wrote may hold log-variances or
samples, multiplied by something: `posterior` alone knows how to read them.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.data import autoencoder
from imm_scale.data.manifest import Codec
from imm_scale.errors import UserError
from imm_scale.precision import computing

# Published mean and std per channel of the raw latents, by the sha256 of the weights.
KNOWN_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # stabilityai/sd-vae-ft-mse on ImageNet 256 (Zhou et al., "Inductive Moment Matching", 2025, released code)
    "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815": (
        (0.86488, -0.27787343, 0.21616915, 0.3738409),
        (4.85503674, 5.31922414, 3.93725398, 3.9870003),
    ),
}
# Stands for the hash of weights in nets imported without naming the autoencoder whose latents they draw.
AUTOENCODER_UNKNOWN = "not recorded"
# Values worked on at once on CPU: as fp32 they fit the cache that cores share. Smaller pieces are no faster alone, and
# slower beside the threads that read: each piece releases the GIL and has to wait for it.
_PIECE = 1 << 21
_UNTHREADED = (1 << 15) - 1  # most values on which torch starts no threads


class ImageCodec(Protocol):
    """What encoding and decoding need of a codec."""

    kind: str
    weights_hash: str
    factor: int
    precision: str
    pixel_range: str

    def latent_channels(self, image_channels: int) -> int:
        """Channels of the raw latent of images with so many channels. Raises UserError if it takes no such images."""
        ...

    def encode(self, images_NHWC: Tensor) -> Tensor:
        """uint8 (N, H, W, 3 or 1) images to the fp32 array a shard stores, (N, C', H/factor, W/factor)."""
        ...

    def decode(self, raw_NCHW: Tensor) -> Tensor:
        """Raw latents to uint8 (N, H, W, channels) images."""
        ...


class PixelsCodec:
    """Latents are the pixels themselves, scaled from 0..255 to -1..1; grey images keep one channel."""

    kind = "pixels"
    weights_hash = ""
    factor = 1
    precision = "fp32"
    pixel_range = "signed"

    def latent_channels(self, image_channels: int) -> int:
        """As many as the images have."""
        return image_channels

    def encode(self, images_NHWC: Tensor) -> Tensor:
        """(N, C, H, W) fp32 in [-1, 1] of (N, H, W, C) uint8 images."""
        return _to_unit_range(images_NHWC)

    def decode(self, raw_NCHW: Tensor) -> Tensor:
        """(N, H, W, C) uint8 images of (N, C, H, W) values in [-1, 1] (`unit`: [0, 1]), clamped and rounded."""
        return _to_uint8(raw_NCHW, self.pixel_range)


class VAECodec:
    """A diffusers AutoencoderKL in fp32, from a local folder (`save_pretrained`'s form) or by its name on the hub.

    Latents are the autoencoder's own, without diffusers' scaling_factor: the manifest's mean and std do that work.

    Args:
        folder: or OWNER/NAME of the hub; of either, FOLDER:SUBFOLDER means a folder inside.
        precision: `fp32`, or `tf32`: the weights stay as they are, a GPU rounds what it multiplies.

    Attributes:
        scaling_factor, shift_factor: by which diffusers makes latents of about unit variance, (raw - shift) * factor.

    Raises:
        UserError: no such folder, name or weights, diffusers missing, or a model that takes other than RGB.
    """

    kind = "vae"
    pixel_range = "signed"

    def __init__(self, folder: str, device: str = "cpu", precision: str = "fp32") -> None:
        self.folder = autoencoder.local_folder(folder)
        self.weights_hash = autoencoder.weights_hash(self.folder)
        self._model = autoencoder.load(self.folder).to(device).eval().requires_grad_(False)
        if self._model.config.in_channels != 3:
            raise UserError(
                f"the autoencoder in {self.folder} takes {self._model.config.in_channels} channels, not RGB"
            )
        self._device = torch.device(device)
        self.precision = precision
        self.factor: int = 2 ** (len(self._model.config.block_out_channels) - 1)
        self.scaling_factor = float(self._model.config.scaling_factor or 1.0)
        self.shift_factor = float(self._model.config.shift_factor or 0.0)

    def latent_channels(self, image_channels: int) -> int:
        """Channels of the autoencoder's latent. Raises UserError for images that are not RGB."""
        if image_channels != 3:
            raise UserError(f"the vae codec takes RGB images, these have {image_channels} channel: pack with 3")
        return int(self._model.config.latent_channels)

    @torch.no_grad()
    def encode(self, images_NHWC: Tensor) -> Tensor:
        """Posterior mean and standard deviation, (N, 2C, H', W') on CPU, of (N, H, W, 3) uint8 images."""
        with computing(self.precision, self._device):
            posterior = self._model.encode(_to_unit_range(images_NHWC.to(self._device))).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).cpu()

    @torch.no_grad()
    def decode(self, raw_NCHW: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 images of (N, C, H', W') latents."""
        with computing(self.precision, self._device):
            pixels_NCHW = self._model.decode(raw_NCHW.to(self._device, torch.float32)).sample
        return _to_uint8(pixels_NCHW, self.pixel_range)


def open_codec(codec: Codec, vae_folder: str | None = None, device: str = "cpu", precision: str = "fp32") -> ImageCodec:
    """The codec a manifest names, ready to decode; `precision` is that of a vae.

    Raises:
        UserError: a vae codec without its folder, with other weights than encoded the data, or with unknown ones.
    """
    if codec.kind == "pixels":
        pixels = PixelsCodec()
        pixels.pixel_range = codec.pixel_range
        return pixels
    if codec.weights_hash == AUTOENCODER_UNKNOWN:
        raise UserError(
            "the weights of the autoencoder these latents belong to are not recorded, so none can be checked against "
            "them: import the net again with --vae FOLDER (imm-scale import ... --vae), which records them"
        )
    if vae_folder is None:
        raise UserError("the data set holds vae latents: name the autoencoder's folder to decode them")
    vae = VAECodec(vae_folder, device, precision)
    if vae.weights_hash != codec.weights_hash:
        raise UserError(
            f"the autoencoder in {vae_folder} has weights {vae.weights_hash[:12]}, the data was encoded with "
            f"{codec.weights_hash[:12]}: use the same weights"
        )
    vae.pixel_range = codec.pixel_range
    return vae


def per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """A manifest's mean or std as (C, 1, 1) fp32. To a GPU that is a copy which waits for all work before it, so what
    normalizes batch after batch makes it once."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def normalize(raw_NCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...], sigma_data: float = 0.5) -> Tensor:
    """z = (raw - mean) / std * sigma_data per channel, fp32: the scale on which the network works."""
    z_NCHW = torch.empty(raw_NCHW.shape, dtype=torch.float32, device=raw_NCHW.device)
    normalize_into(z_NCHW, raw_NCHW, per_channel(mean, z_NCHW.device), per_channel(std, z_NCHW.device), sigma_data)
    return z_NCHW


def normalize_into(
    z_NCHW: Tensor, raw_NCHW: Tensor, mean_C11: Tensor, std_C11: Tensor, sigma_data: float = 0.5
) -> None:
    """`normalize` into given fp32 memory, which may be that of `raw_NCHW`, by statistics that are on the device."""
    assert len(mean_C11) == len(std_C11) == raw_NCHW.shape[1], (len(mean_C11), len(std_C11), raw_NCHW.shape)
    for z_n, raw_n in zip(_pieces(z_NCHW), _pieces(raw_NCHW), strict=True):
        z_n.copy_(raw_n).sub_(mean_C11).div_(std_C11).mul_(sigma_data)


def denormalize(z_NCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...], sigma_data: float = 0.5) -> Tensor:
    """The inverse of `normalize`."""
    assert len(mean) == len(std) == z_NCHW.shape[1], (len(mean), len(std), z_NCHW.shape)
    mean_C11, std_C11 = per_channel(mean, z_NCHW.device), per_channel(std, z_NCHW.device)
    return z_NCHW.float() / sigma_data * std_C11 + mean_C11


def decode(z_NCHW: Tensor, codec: Codec, image_codec: ImageCodec, sigma_data: float = 0.5) -> Tensor:
    """Network outputs to uint8 (N, H, W, channels) images, clamped and rounded.

    Raises:
        ValueError: values that are not finite.
    """
    return image_codec.decode(denormalize(z_NCHW, codec.mean, codec.std, sigma_data))


def posterior(stored_N: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation (N, C, H, W) of raw latents, None where nothing is left to draw.

    Args:
        stored_N: (N, C', H, W) as read from a shard, in the type wanted.
    """
    mean, std = stored_N.chunk(2, dim=1) if codec.has_posterior else (stored_N, None)
    if std is not None and codec.moments == "mean_logvar":
        std = std.clamp(-30.0, 20.0).mul(0.5).exp_()  # the bounds are those of diffusers' DiagonalGaussianDistribution
    if (codec.scale, codec.shift) != (1.0, 0.0):
        mean = mean / codec.scale + codec.shift
        std = None if std is None else std / codec.scale
    return mean, std


def draw_raw(stored_N: Tensor, codec: Codec, seed: int, purpose: str, ordinal_N: Tensor) -> Tensor:
    """Raw latents (N, C, H, W) from stored ones: the values as they are, or a draw of the posterior in fp32.

    Args:
        stored_N: (N, C', H, W) as read from a shard.
        ordinal_N: (N,) numbers that name each draw under (seed, purpose).
    """
    if codec.kind == "pixels":
        return stored_N
    if not codec.has_posterior:
        return posterior(stored_N.float(), codec)[0]
    raw = rng.normal(seed, purpose, ordinal_N, (stored_N.shape[1] // 2, *stored_N.shape[2:]))
    pieces = _pieces(raw)
    for raw_n, stored_n in zip(pieces, stored_N.split([len(piece) for piece in pieces]), strict=True):
        mean_n, std_n = posterior(stored_n.float(), codec)
        assert std_n is not None
        raw_n.mul_(std_n).add_(mean_n)
    return raw


def _pieces(values_N: Tensor) -> tuple[Tensor, ...]:
    """Rows worked on at once: all of them on a GPU; on CPU so few that they stay in the cache, and that torch starts no
    threads, which beside the training's own would only get in each other's way."""
    if values_N.device.type != "cpu" or not len(values_N):
        return (values_N,)
    values = _PIECE if torch.get_num_threads() == 1 else _UNTHREADED
    return values_N.split(max(1, values // values_N[0].numel()))


def _to_unit_range(images_NHWC: Tensor) -> Tensor:
    assert images_NHWC.dtype == torch.uint8 and images_NHWC.ndim == 4, (images_NHWC.dtype, images_NHWC.shape)
    return images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _to_uint8(raw_NCHW: Tensor, pixel_range: str) -> Tensor:
    if not torch.isfinite(raw_NCHW).all():
        raise ValueError("cannot decode: values are not finite")
    pixels_NCHW = raw_NCHW * 255.0 if pixel_range == "unit" else (raw_NCHW + 1.0) * 127.5
    return pixels_NCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
