"""What the values and labels of foreign latents say about what they are, held against what their user says.

The numbers looked at: a standard deviation is never negative; a log-variance is below 0 where the posterior is narrower
than N(0, 1); labels lie below the number of classes; diffusers defines an autoencoder's `scaling_factor` as what gives
its latents about unit variance, so raw ones have a standard deviation near 1 / scaling_factor, multiplied ones near 1.
"""

import argparse
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.statistics import ChannelSums
from imm_scale.data.codec import KNOWN_STATISTICS, ImageCodec, VAECodec, posterior
from imm_scale.data.manifest import Codec, other_width
from imm_scale.data.shards import LATENT
from imm_scale.errors import UserError

EXTREME = 1e4  # no autoencoder's latent is that large; fp16 ends at 65504
# Scaling factors nearer to 1 than this leave too little between raw and multiplied latents to tell them by: data sets
# differ from one another by some tens of per cent (records._manifest prints how far each is off).
_CLEAR_FACTOR = 2.0
_FAR = 3.0  # times as wide or as narrow as expected; sets of photographs stay within a factor of 2
_SHIFTED = 0.5  # of a published std: means of one autoencoder's latents of photographs lie closer together


def describe(args: argparse.Namespace, image_codec: ImageCodec, shape: tuple[int, int, int]) -> Codec:
    """The codec of arrays of this shape, whose statistics are not known yet.

    Raises:
        UserError: channels or sizes that contradict the autoencoder or the options.
    """
    if image_codec.kind == "pixels":
        if any(value is not None for value in (args.moments, args.scale, args.shift)):
            raise UserError("--moments, --scale and --shift are for --codec vae: pixels are stored as they are")
        channels = _pixel_channels(shape)
    else:
        channels = _vae_channels(args.moments or "mean_std", image_codec, shape)
    if args.scale is not None and not 0 < args.scale < math.inf:
        raise UserError(f"--scale {args.scale}: what raw latents were multiplied by must be above 0")
    height, width = (args.image_size,) * 2 if isinstance(args.image_size, int) else args.image_size
    factor = image_codec.factor
    if (shape[1] * factor, shape[2] * factor) != (height, width):
        is_last = (shape[0] * factor, shape[1] * factor) == (height, width)
        last = "; their channels come last: transpose them to (C', H, W)" if is_last else ""
        raise UserError(
            f"latents of {shape[1]}x{shape[2]} stand for images of {shape[1] * factor}x{shape[2] * factor} pixels "
            f"(height x width, {factor} to one), --image-size says {height}x{width}{last}"
        )
    return Codec(
        kind=image_codec.kind,
        weights_hash=image_codec.weights_hash,
        image_size=height,
        channels=channels,
        factor=factor,
        mean=(),
        std=(),
        image_width=other_width(height, width),
        moments=args.moments or "mean_std",
        scale=1.0 if args.scale is None else float(args.scale),
        shift=0.0 if args.shift is None else float(args.shift),
        pixel_range=args.pixel_range or "signed",
    )


def _pixel_channels(shape: tuple[int, int, int]) -> int:
    if shape[0] not in (1, 3):
        last = "; the channels come last: transpose them to (C, H, W)" if shape[2] in (1, 3) else ""
        raise UserError(f"{LATENT} has the shape {shape}: pixels have 1 or 3 channels{last}")
    return shape[0]


def _vae_channels(moments: str, image_codec: ImageCodec, shape: tuple[int, int, int]) -> int:
    """Channels of a latent. Raises UserError where those stored are none of this autoencoder's."""
    channels = image_codec.latent_channels(3)
    expected = channels if moments == "sample" else 2 * channels
    if shape[0] == expected:
        return channels
    if shape[0] == channels:
        remedy = (
            "as many as one latent has: samples, not moments. Give --moments sample, and --scale if they were "
            "multiplied by a scaling factor, as DiT's and SiT's are by 0.18215"
        )
    elif shape[0] == 2 * channels:
        remedy = "twice as many as a latent has: moments, not samples. Give --moments mean_std or mean_logvar"
    elif shape[2] in (channels, 2 * channels):
        remedy = "the channels come last: transpose them to (C', H, W)"
    else:
        remedy = f"another autoencoder's: name theirs with --vae, or write {2 * channels} channels of moments"
    raise UserError(
        f"{LATENT} has the shape {shape}, {shape[0]} channels; --moments {moments} of this autoencoder of {channels} "
        f"latent channels needs {expected}. These are {remedy}"
    )


class Survey:
    """All values and labels of the shards, a shard at a time."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self.sums = ChannelSums.zero(codec.channels)
        self.labels: Counter[int] = Counter()
        self._negative = 0  # values of the second half
        self._lowest, self._highest = math.inf, -math.inf  # of what is drawn from: pixels, means or samples
        self._widest = 0.0  # standard deviation
        self._squares = 0.0  # of standard deviations

    @property
    def samples(self) -> int:
        """Samples met."""
        return self.labels.total()

    def add(self, stored_N: NDArray[np.float16], labels: Sequence[int], url: str) -> None:
        """Takes a shard's arrays (n, C', H, W), and labels but for mirrored ones. NaN and infinity raise UserError."""
        finite = np.isfinite(stored_N).reshape(len(stored_N), -1).all(axis=1)
        if not finite.all():
            raise UserError(
                f"{url}: {np.count_nonzero(~finite)} of {len(stored_N)} samples hold NaN or infinity, the first is "
                f"number {int(np.argmin(finite))}: encode them again (fp16 ends at 65504)"
            )
        self.labels.update(labels)
        self.sums = self.sums + ChannelSums.of(stored_N, self._codec)
        mean, std = posterior(torch.from_numpy(stored_N).float(), self._codec)
        self._lowest, self._highest = min(self._lowest, float(mean.min())), max(self._highest, float(mean.max()))
        if std is not None:
            self._negative += int(np.count_nonzero(stored_N[:, self._codec.channels :] < 0))
            self._widest = max(self._widest, float(std.abs().max()))
            self._squares += float(std.double().square().sum())

    def check(self, image_codec: ImageCodec, num_classes: int | None, scale_is_given: bool) -> list[str]:
        """What is remarkable but may be meant.

        Raises:
            UserError: values or labels that cannot be what they are said to be.
        """
        notes = self._check_labels(num_classes)
        if self._codec.kind == "pixels":
            self._check_pixels()
            return notes
        self._check_moments()
        assert isinstance(image_codec, VAECodec)
        notes += self._scale_notes(image_codec, scale_is_given)
        return [*notes, *self._published_notes(), *self._width_notes()]

    def _check_labels(self, num_classes: int | None) -> list[str]:
        lowest, highest = min(self.labels), max(self.labels)
        from_one = "; if they count from 1, write them again from 0" if lowest == 1 else ""
        if num_classes is not None and highest >= num_classes:
            raise UserError(
                f"labels go from {lowest} to {highest}, --num-classes {num_classes} allows 0 to {num_classes - 1}"
                f"{from_one or ': write them again, or give the number of classes they are of'}"
            )
        classes = num_classes or highest + 1
        empty = classes - len(self.labels)
        first = itertools.islice((label for label in itertools.count() if label not in self.labels), min(empty, 5))
        shown = ", ".join(map(str, first)) + (", ..." if empty > 5 else "")
        where = f"labels go from {lowest} to {highest}, and {empty} of {classes} classes have no sample ({shown})"
        if num_classes is None and empty:
            raise UserError(f"{where}: say how many classes there are with --num-classes{from_one}")
        return [f"{where}{from_one}"] if empty else []

    def _check_pixels(self) -> None:
        low = 0.0 if self._codec.pixel_range == "unit" else -1.0
        where = f"pixels go from {self._lowest:g} to {self._highest:g} over {self.samples} samples"
        if self._lowest < low or self._highest > 1:
            raise UserError(f"{where}: they must lie in {low:g} to 1 (store value / 127.5 - 1)")
        if self._lowest >= 0 and low < 0:
            raise UserError(f"{where}, none is darker than grey: give --pixel-range unit if 0 is black, not -1")

    def _check_moments(self) -> None:
        codec = self._codec
        if codec.has_posterior:
            values = self.sums.count * codec.channels
            share = self._negative / values
            where = f"of {values} values in the second half of the channels, over {self.samples} samples,"
            if codec.moments == "mean_std" and self._negative:
                raise UserError(
                    f"{where} {share:.1%} are negative, so they are no standard deviations. Where they are "
                    "log-variances (diffusers' latent_dist.parameters): --moments mean_logvar"
                )
            if codec.moments == "mean_logvar" and not self._negative:
                raise UserError(
                    f"{where} none is negative: as log-variances they would be of posteriors all wider than N(0, 1). "
                    "They look like standard deviations: --moments mean_std"
                )
        largest = max(abs(self._lowest), abs(self._highest), self._widest)
        if largest > EXTREME:
            raise UserError(
                f"raw values or standard deviations up to {largest:.3g} are no latents: see --moments, --scale"
            )

    def _spread(self) -> float:
        """Standard deviation of all raw values of all channels together, as scaling factors are made from it."""
        count = self.sums.count * self._codec.channels
        mean = sum(self.sums.total) / count
        return math.sqrt(max(sum(self.sums.total_squares) / count - mean**2, 0.0))

    def _scale_notes(self, vae: VAECodec, is_given: bool) -> list[str]:
        factor, spread, codec = vae.scaling_factor, self._spread(), self._codec
        stored = spread * codec.scale
        expected = 1 / factor if codec.scale == 1.0 else codec.scale / factor  # of stored ones, if it is as said
        other = 1.0 if codec.scale == 1.0 else 1 / factor  # if it is the other way round
        if stored == 0 or abs(math.log(stored / expected)) <= abs(math.log(stored / other)):
            return self._far_notes(factor, spread)
        says = "raw" if codec.scale == 1.0 else f"multiplied by {codec.scale:g}"
        shift = f" --shift {vae.shift_factor:g}" if vae.shift_factor else ""
        found = (
            f"over {self.samples} samples the stored latents have a standard deviation of {stored:.3g}; the "
            f"autoencoder's scaling_factor is {factor:g}, so raw ones have about {1 / factor:.3g} and multiplied ones 1"
        )
        if is_given or max(factor, 1 / factor) < _CLEAR_FACTOR:
            return [f"{found}: {says} they look unlikely"]
        raise UserError(
            f"{found}. These look multiplied: give --scale {factor:g}{shift}, or --scale 1 if they are raw all the same"
        )

    def _far_notes(self, factor: float, spread: float) -> list[str]:
        """Of values that fit neither reading, as those multiplied twice."""
        if spread == 0 or 1 / _FAR < spread * factor < _FAR:
            return []
        return [
            f"raw latents as they are said to be have a standard deviation of {spread:.3g}; by the autoencoder's "
            f"scaling_factor of {factor:g} about {1 / factor:.3g} is expected: see --scale"
        ]

    def _published_notes(self) -> list[str]:
        codec = self._codec
        if codec.weights_hash not in KNOWN_STATISTICS:
            return []
        means, stds = KNOWN_STATISTICS[codec.weights_hash]
        measured, _ = self.sums.mean_std()
        off = max(abs(a - b) / c for a, b, c in zip(measured, means, stds, strict=True))
        if off <= _SHIFTED:
            return []
        return [
            f"means of the channels are up to {off:.1f} standard deviations from those published for this autoencoder; "
            "EDM2 encodes pixels of 0 to 1, not -1 to 1: --pixel-range unit"
        ]

    def _width_notes(self) -> list[str]:
        """Of posteriors that are wider than their means are spread, so that more than half of a latent is noise."""
        width = math.sqrt(self._squares / (self.sums.count * self._codec.channels))
        if width <= self._spread() / math.sqrt(2):
            return []
        return [
            f"posteriors have a standard deviation of {width:.3g}, all latents together {self._spread():.3g}: most of "
            "a latent is noise, which a trained autoencoder's are not"
        ]


def with_statistics(codec: Codec, sums: ChannelSums) -> Codec:
    """The codec with mean and standard deviation of the data."""
    mean, std = sums.mean_std()
    return replace(codec, mean=mean, std=std)


def summary(codec: Codec) -> str:
    """How the stored values are read, in words."""
    if codec.kind == "pixels":
        return f"pixels from {'-1' if codec.pixel_range == 'signed' else '0'} to 1"
    raw: dict[str, Any] = {"scale": codec.scale, "shift": codec.shift}
    said = [f"{key} {value:g}" for key, value in raw.items() if value != (1.0 if key == "scale" else 0.0)]
    unit = ["of images encoded from 0 to 1"] if codec.pixel_range == "unit" else []
    return ", ".join([codec.moments, *(said or ["unscaled"]), *unit])
