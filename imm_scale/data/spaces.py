"""Sample spaces: what samples look like, where sampling starts, and how stored samples become a batch."""

import io
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import SpaceConfig, option
from imm_scale.data import codec as codecs
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.errors import UserError
from imm_scale.registry import register_space

DECODED_AT_ONCE = 8  # images; fixed, because convolutions of other batches round differently


class SampleSpace(ABC):
    """What a net works on. A frozen dataclass, for it travels with the weights.

    Attributes:
        shape: of one sample as the net sees it.
        dtype: of a sample as the net sees it.
        num_classes: labels are 0 to num_classes - 1.
        class_names: a name per class, or none.
        sigma_data: standard deviation of samples and prior; flow maps need it, other spaces may lack it.
    """

    Config: ClassVar[type[SpaceConfig]]
    dtype: ClassVar[torch.dtype]
    shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]

    @classmethod
    @abstractmethod
    def of(cls, config: Any, manifest: Manifest) -> Self:
        """The space of a data set, as a config has it. Raises UserError where the two do not fit."""

    def to_fields(self) -> dict[str, Any]:
        """For `from_fields`, by way of JSON."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    @abstractmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """From what `to_fields` gave, by way of JSON."""

    @abstractmethod
    def prior(self, seed: int, purpose: str, index_N: Tensor, stream: int = 0) -> Tensor:
        """(N, *shape) samples of the prior, each a function of (seed, purpose, its index, stream) alone."""

    @abstractmethod
    def from_stored(
        self, stored_N: Tensor, seed: int, purpose: str, ordinal_N: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Samples (N, *shape) from stored ones, on their device, with what is drawn named by (seed, purpose, ordinal).

        Args:
            out: memory for them, which may be longer than this call's samples only by the caller's slicing.
        """

    def reading(self, manifest: Manifest) -> Self:
        """This space for samples that are stored as a manifest says. Raises UserError for samples of another space."""
        return self

    @abstractmethod
    def artifacts(self, decoder: str | None, device: torch.device, precision: str = "fp32") -> "Artifacts":
        """What turns samples into something people look at.

        Args:
            decoder: folder of the network that decodes them, where one does (`sampling.vae`).
            precision: of that network.

        Raises:
            UserError: the decoder does not fit.
        """

    @property
    def needs_decoder(self) -> bool:
        """Whether `artifacts` needs a network."""
        return False

    @property
    @abstractmethod
    def image_size(self) -> int | tuple[int, int] | None:
        """Height and width of the images that `artifacts` makes, one number for both where they are square, None where
        they have no such size."""

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width of the images that `artifacts` makes, None where they have no such size."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    @abstractmethod
    def provenance(self) -> dict[str, str]:
        """Kind and weights' hash of what made samples of images, for the record of an evaluation."""

    def unlike(self, source: "SampleSpace") -> dict[str, tuple[Any, Any]]:
        """What samples of `source` are otherwise than here, to a net: {config key: (there, here)}."""
        if type(source) is not type(self):
            return {"data.space.name": (type(source).__name__, type(self).__name__)}
        there, here = getattr(source, "sigma_data", None), getattr(self, "sigma_data", None)
        differing: dict[str, tuple[Any, Any]] = {} if there == here else {"data.space.sigma_data": (there, here)}
        known = codecs.AUTOENCODER_UNKNOWN not in (source.provenance["weights"], self.provenance["weights"])
        if source.provenance["kind"] != self.provenance["kind"] or (known and source.provenance != self.provenance):
            differing["data.codec"] = (_what_made(source), _what_made(self))
        return differing

    def notes_on(self, source: "SampleSpace") -> list[str]:
        """A sentence on each thing in which samples of `source`, which is not `unlike`, are other numbers than here."""
        return []

    def classes_of(self, source: "SampleSpace") -> list[int | None]:
        """For each class here its number in `source`: by name where both name theirs, else the same number."""
        if source.class_names and self.class_names:
            numbers = {name: number for number, name in reversed(list(enumerate(source.class_names)))}
            return [numbers.get(name) for name in self.class_names]
        return [number if number < source.num_classes else None for number in range(self.num_classes)]

    @property
    def sample_bytes(self) -> int:
        """Of one sample as the net sees it."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta").nbytes


def _what_made(space: SampleSpace) -> str:
    """Kind and hash, as in "vae 1b134cded8eb", and what else there is."""
    kind, weights, *rest = space.provenance.values()
    return " ".join([part for part in (kind, weights[:12], *rest) if part])


class Artifacts(ABC):
    """Samples as what people look at: images, unless `formats` says otherwise.

    Attributes:
        precision: of the network that decodes, None where there is none.
        formats: those of `imm-scale sample --format` that they can be written in; the first two are the default.
    """

    precision: str | None = None
    formats: tuple[str, ...] = ("grid", "npz", "folder", "webdataset")

    @abstractmethod
    def __call__(self, x_N: Tensor) -> Tensor:
        """uint8 (N, H, W, channels) images of samples. Raises UserError for samples that are none."""

    def files(self, x_N: Tensor) -> list[dict[str, bytes]]:
        """Of each of N samples, the files it is kept as, by ending."""
        return [{"png": png(image)} for image in self(x_N).numpy()]


def png(image_HWC: NDArray[np.uint8]) -> bytes:
    """The file of an image (H, W, 3 or 1). Raises UserError for another number of channels."""
    channels = image_HWC.shape[-1]
    if channels not in (1, 3):
        raise UserError(f"images have {channels} channels: PNG takes 1 or 3")
    stream = io.BytesIO()
    Image.fromarray(image_HWC[:, :, 0] if channels == 1 else image_HWC).save(stream, "PNG")
    return stream.getvalue()


@dataclass(frozen=True)
class LatentsConfig(SpaceConfig):
    name: str = option("latents", "")
    sigma_data: float = option(0.5, "Standard deviation of data and prior after normalization.", range="(0, inf)")
    mean: list[float] | None = option(  # noqa: RUF009 - None, or a list of its own
        None, "Per channel, subtracted from the stored samples; null takes the manifest's, measured on the data."
    )
    std: list[float] | None = option(  # noqa: RUF009 - as above
        None,
        "Per channel, the stored samples' deviation that becomes sigma_data; null takes the manifest's.",
        range="(0, inf)",
    )

    def normalized(self, codec: Codec) -> Codec:
        """The codec with this section's mean and std. Raises UserError where their length is not its channels'."""
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != codec.channels:
                raise UserError(f"data.space.{key}={values} has {len(values)} numbers for {codec.channels} channels")
        mean = codec.mean if self.mean is None else tuple(self.mean)
        std = codec.std if self.std is None else tuple(self.std)
        return replace(codec, mean=mean, std=std)


@register_space("latents")
@dataclass(frozen=True)
class Latents(SampleSpace):
    """Arrays of (C, H, W): pixels or an autoencoder's latents, normalized to one standard deviation."""

    Config = LatentsConfig
    dtype = torch.float32

    sigma_data: float
    shape: tuple[int, int, int]
    codec: Codec
    num_classes: int
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, config: LatentsConfig, manifest: Manifest) -> Self:
        names = tuple(manifest.class_names)
        codec = config.normalized(manifest.latent_codec)
        channels, height, width = manifest.latent_shape
        return cls(config.sigma_data, (channels, height, width), codec, manifest.num_classes, names)

    def to_fields(self) -> dict[str, Any]:
        return {**asdict(self), "codec": self.codec.to_fields()}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        codec = fields["codec"]
        return cls(
            sigma_data=fields["sigma_data"],
            shape=tuple(fields["shape"]),
            codec=Codec(**{**codec, "mean": tuple(codec["mean"]), "std": tuple(codec["std"])}),
            num_classes=fields["num_classes"],
            class_names=tuple(fields["class_names"]),
        )

    def prior(self, seed: int, purpose: str, index_N: Tensor, stream: int = 0) -> Tensor:
        """N(0, sigma_d^2 I), fp32."""
        return self.sigma_data * rng.normal(seed, purpose, index_N, self.shape, stream)

    def from_stored(
        self, stored_N: Tensor, seed: int, purpose: str, ordinal_N: Tensor, out: Tensor | None = None
    ) -> Tensor:
        raw = codecs.draw_raw(stored_N, self.codec, seed, purpose, ordinal_N)
        z = torch.empty(raw.shape, dtype=torch.float32, device=raw.device) if out is None else out
        codecs.normalize_into(z, raw, *_scale(self.codec, raw.device), self.sigma_data)
        return z

    def reading(self, manifest: Manifest) -> Self:
        stored, differing = manifest.latent_codec, Latents.of(LatentsConfig(), manifest).unlike(self)
        differing.pop("data.space.sigma_data", None)
        if manifest.latent_shape != self.shape:
            differing["data.latent_shape"] = (self.shape, manifest.latent_shape)
        for key, (ours, theirs) in differing.items():
            raise UserError(
                f"data.manifest holds other samples than the net's: {key} {theirs}, not {ours}; name its data"
            )
        return replace(self, codec=replace(self.codec, moments=stored.moments, scale=stored.scale, shift=stored.shift))

    def notes_on(self, source: SampleSpace) -> list[str]:
        assert isinstance(source, Latents)
        there, here = ((*space.codec.mean, *space.codec.std) for space in (source, self))
        if there == here:
            return []
        mean, std = (f"[{','.join(map(repr, values))}]" for values in (source.codec.mean, source.codec.std))
        return [
            "samples are normalized by these data's mean and std; the source's would be data.space.mean="
            f"{mean} data.space.std={std}"
        ]

    @property
    def needs_decoder(self) -> bool:
        return self.codec.kind == "vae"

    @property
    def image_size(self) -> tuple[int, int]:
        return self.codec.image_shape

    @property
    def provenance(self) -> dict[str, str]:
        pixels = {"pixels": self.codec.pixel_range} if self.codec.pixel_range != "signed" else {}
        return {"kind": self.codec.kind, "weights": self.codec.weights_hash, **pixels}

    def artifacts(self, decoder: str | None, device: torch.device, precision: str = "fp32") -> "Images":
        return Images(self, codecs.open_codec(self.codec, decoder, str(device), precision))


@cache
def _scale(codec: Codec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C, 1, 1) on a device, sent there once: every batch asks for them."""
    return codecs.per_channel(codec.mean, device), codecs.per_channel(codec.std, device)


class Images(Artifacts):
    """Latents as the images they stand for, a few at a time."""

    def __init__(self, space: Latents, codec: codecs.ImageCodec):
        self._space, self._codec = space, codec
        self.precision = codec.precision

    def __call__(self, x_N: Tensor) -> Tensor:
        space = self._space
        parts = x_N.split(DECODED_AT_ONCE)
        return torch.cat([codecs.decode(x, space.codec, self._codec, space.sigma_data) for x in parts])
