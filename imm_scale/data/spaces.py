"""Sample spaces: what samples look like, where sampling starts, and how stored samples become a batch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import SpaceConfig, option
from imm_scale.data import codec as codecs
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.errors import UserError
from imm_scale.registry import register_space


class SampleSpace(ABC):
    """What a net works on. A frozen dataclass, for it travels with the weights.

    Attributes:
        shape: of one sample as the net sees it.
        dtype: of a sample as the net sees it.
        num_classes: labels are 0 to num_classes - 1.
        class_names: a name per class, or none.
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

    @classmethod
    @abstractmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """From what `dataclasses.asdict` gave, by way of JSON."""

    @abstractmethod
    def prior(self, seed: int, purpose: str, index_N: Tensor, stream: int = 0) -> Tensor:
        """(N, *shape) samples of the prior, each a function of (seed, purpose, its index, stream) alone."""

    @abstractmethod
    def from_stored(self, stored_N: Tensor, seed: int, purpose: str, ordinal_N: Tensor) -> Tensor:
        """Samples (N, *shape) from stored ones, with whatever is drawn named by (seed, purpose, ordinal)."""

    @abstractmethod
    def artifacts(self, decoder: str | None, device: torch.device) -> "Artifacts":
        """What turns samples into something people look at. Raises UserError where the decoder does not fit."""

    @property
    def sample_bytes(self) -> int:
        """Of one sample as the net sees it."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta").nbytes


class Artifacts(ABC):
    """Samples as images or the like."""

    @abstractmethod
    def __call__(self, x_N: Tensor) -> Tensor:
        """uint8 (N, H, W, channels) images of samples."""


@dataclass(frozen=True)
class LatentsConfig(SpaceConfig):
    name: str = option("latents", "")
    sigma_data: float = option(0.5, "Standard deviation of data and prior after normalization.")

    def validate(self) -> None:
        if self.sigma_data <= 0:
            raise UserError(f"data.space.sigma_data={self.sigma_data} must be above 0")


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
        return cls(config.sigma_data, manifest.latent_shape, manifest.codec, manifest.num_classes, names)

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

    def from_stored(self, stored_N: Tensor, seed: int, purpose: str, ordinal_N: Tensor) -> Tensor:
        raw = codecs.draw_raw(stored_N, self.codec.kind, seed, purpose, ordinal_N)
        return codecs.normalize(raw, self.codec.mean, self.codec.std, self.sigma_data)

    def artifacts(self, decoder: str | None, device: torch.device) -> "Images":
        return Images(self, codecs.open_codec(self.codec, decoder, str(device)))


@dataclass(frozen=True)
class Images(Artifacts):
    """Latents as the images they stand for."""

    space: Latents
    codec: codecs.ImageCodec

    def __call__(self, x_N: Tensor) -> Tensor:
        return codecs.decode(x_N, self.space.codec, self.codec, self.space.sigma_data)
