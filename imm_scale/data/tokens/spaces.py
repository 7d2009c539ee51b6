"""Sample spaces of token sequences: the tokens themselves, or views of them as real numbers for flow maps.

Legend: N samples, T tokens, K their vocabulary, C channels of a view.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import SpaceConfig, option
from imm_scale.data.manifest import Manifest, TokenCodec
from imm_scale.data.spaces import Artifacts, SampleSpace
from imm_scale.data.tokens.artifacts import Texts, TokenImages
from imm_scale.data.tokens.images import AUTOENCODER_FILE, CODES, open_decoder
from imm_scale.data.tokens.tokenizers import TOKENIZER_FILE, FromFile, tokenizer_of
from imm_scale.errors import UserError
from imm_scale.registry import register_space

_MOST_ONE_HOT = 256  # channels: a longer vector for each token holds little but zeros


@dataclass(frozen=True)
class TokensConfig(SpaceConfig):
    UNIT: ClassVar[str] = "sequences"

    name: str = option("tokens", "")


@dataclass(frozen=True)
class TokenSpace(SampleSpace):
    """What all spaces of token sequences know.

    Attributes:
        length: tokens of a sample, T.
        codec: vocabulary and tokenizer.
    """

    length: int
    codec: TokenCodec
    num_classes: int
    class_names: tuple[str, ...]

    @property
    def vocabulary(self) -> int:
        """Ids are 0 to vocabulary - 1."""
        return self.codec.vocabulary

    def to_fields(self) -> dict[str, Any]:
        return {**super().to_fields(), "codec": self.codec.to_fields()}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        codec = TokenCodec.from_fields(fields["codec"])
        return cls(**{**fields, "codec": codec, "class_names": tuple(fields["class_names"])})

    def reading(self, manifest: Manifest) -> Self:
        differing = _token_codec(manifest).unlike(self.codec)
        if manifest.latent_shape != (self.length,):
            differing["latent_shape"] = ((self.length,), manifest.latent_shape)
        for key, (ours, theirs) in differing.items():
            raise UserError(
                f"data.manifest holds other samples than the net's: {key} {theirs}, not {ours}; name its data"
            )
        return self

    def unlike(self, source: SampleSpace) -> dict[str, tuple[Any, Any]]:
        if not isinstance(source, TokenSpace):
            return super().unlike(source)
        differing = {f"data.codec.{key}": pair for key, pair in self.codec.unlike(source.codec).items()}
        if type(source) is not type(self):
            differing["data.space.name"] = (type(source).__name__, type(self).__name__)
        if source.length != self.length:
            differing["data.latent_shape"] = ((source.length,), (self.length,))
        return differing

    def artifacts(self, decoder: str | None, device: torch.device, precision: str = "fp32") -> Artifacts:
        if self.needs_decoder and decoder is None:
            what = AUTOENCODER_FILE if self.codec.image_shape is not None else TOKENIZER_FILE
            raise UserError(
                f"the tokens of this model stand for what {what} makes of them: name the folder it is in, that of the "
                "manifest, by --vae (sampling.vae)"
            )
        if self.codec.image_shape is not None:
            return TokenImages(self.tokens, open_decoder(self.codec, decoder or ""))
        return Texts(self.tokens, tokenizer_of(self.codec, decoder or "").decode)

    @property
    def needs_decoder(self) -> bool:
        return self.codec.tokenizer in (FromFile.name, CODES)

    @abstractmethod
    def tokens(self, x_N: Tensor) -> Tensor:
        """Ids (N, T) int64 of samples (N, ...) as the net has them."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        return self.codec.image_shape

    @property
    def provenance(self) -> dict[str, str]:
        return {"kind": self.codec.tokenizer, "weights": self.codec.tokenizer_hash}


@register_space("tokens")
@dataclass(frozen=True)
class Tokens(TokenSpace):
    """Sequences of token ids; the prior is all masked, id K."""

    Config = TokensConfig
    dtype = torch.int64

    @classmethod
    def of(cls, config: TokensConfig, manifest: Manifest) -> Self:
        codec = _token_codec(manifest)
        return cls(manifest.latent_shape[0], codec, manifest.num_classes, tuple(manifest.class_names))

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.length,)

    def prior(self, seed: int, purpose: str, index_N: Tensor, stream: int = 0) -> Tensor:
        """Masks alone, (N, T) int64."""
        return index_N.new_full((len(index_N), self.length), self.vocabulary)

    def from_stored(
        self, stored_N: Tensor, seed: int, purpose: str, ordinal_N: Tensor, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            return stored_N.long()
        return out.copy_(stored_N)

    def tokens(self, x_N: Tensor) -> Tensor:
        return x_N


@dataclass(frozen=True)
class RealTokensConfig(SpaceConfig):
    """What views as real numbers share."""

    UNIT: ClassVar[str] = "sequences"

    sigma_data: float = option(0.5, "Standard deviation of data and prior.", range="(0, inf)")


@dataclass(frozen=True)
class OneHotConfig(RealTokensConfig):
    name: str = option("onehot", "")


@dataclass(frozen=True)
class BitsConfig(RealTokensConfig):
    name: str = option("bits", "")


@dataclass(frozen=True)
class _RealTokens(TokenSpace):
    """Token sequences as (C, 1, T) real numbers, which a DiT of patch size 1 takes for an image of one row."""

    sigma_data: float = 0.5
    dtype = torch.float32

    @classmethod
    def of(cls, config: RealTokensConfig, manifest: Manifest) -> Self:
        codec, names = _token_codec(manifest), tuple(manifest.class_names)
        return cls(manifest.latent_shape[0], codec, manifest.num_classes, names, config.sigma_data)

    @property
    @abstractmethod
    def channels(self) -> int:
        """Numbers for a token."""

    @abstractmethod
    def real(self, ids_NT: Tensor) -> Tensor:
        """(N, T, C) of deviation 1 where all ids are equally likely."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.channels, 1, self.length)

    def prior(self, seed: int, purpose: str, index_N: Tensor, stream: int = 0) -> Tensor:
        """N(0, sigma_d^2 I), fp32."""
        return self.sigma_data * rng.normal(seed, purpose, index_N, self.shape, stream)

    def from_stored(
        self, stored_N: Tensor, seed: int, purpose: str, ordinal_N: Tensor, out: Tensor | None = None
    ) -> Tensor:
        x = self.sigma_data * self.real(stored_N.long()).transpose(1, 2)[:, :, None]
        return x if out is None else out.copy_(x)


@register_space("onehot")
@dataclass(frozen=True)
class OneHot(_RealTokens):
    """x^i = c (onehot - 1 / K) with c^2 (1 - 1/K) / K = sigma_d^2, so that equally likely ids have that variance."""

    Config = OneHotConfig

    @classmethod
    def of(cls, config: RealTokensConfig, manifest: Manifest) -> Self:
        vocabulary = _token_codec(manifest).vocabulary
        if vocabulary > _MOST_ONE_HOT:
            raise UserError(
                f"data.space.name=onehot is for up to {_MOST_ONE_HOT} different tokens, the data have {vocabulary}: "
                "use data.space.name=bits"
            )
        return super().of(config, manifest)

    @property
    def channels(self) -> int:
        return self.vocabulary

    def real(self, ids_NT: Tensor) -> Tensor:
        k = self.vocabulary
        return (F.one_hot(ids_NT, k) - 1.0 / k) * (k / math.sqrt(k - 1.0))

    def tokens(self, x_N: Tensor) -> Tensor:
        """The likeliest of each place, by its largest number."""
        return x_N[:, :, 0].argmax(dim=1)


@register_space("bits")
@dataclass(frozen=True)
class Bits(_RealTokens):
    """The ceil(log2 K) binary digits of each id as signs."""

    Config = BitsConfig

    @property
    def channels(self) -> int:
        return max(1, (self.vocabulary - 1).bit_length())

    def real(self, ids_NT: Tensor) -> Tensor:
        places = torch.arange(self.channels, device=ids_NT.device)
        return 2.0 * (ids_NT[:, :, None] >> places & 1) - 1.0

    def tokens(self, x_N: Tensor) -> Tensor:
        """By the signs; what is above the vocabulary is its last id."""
        places = torch.arange(self.channels, device=x_N.device)
        ids = ((x_N[:, :, 0] > 0).long() << places[:, None]).sum(dim=1)
        return ids.clamp_max(self.vocabulary - 1)


def _token_codec(manifest: Manifest) -> TokenCodec:
    if not isinstance(manifest.codec, TokenCodec):
        raise UserError(
            f"data.space.name=tokens, onehot and bits are for tokens, as imm-scale pack-tokens writes them; the "
            f"manifest holds {manifest.codec.kind} of {manifest.latent_shape}: use data.space.name=latents"
        )
    return manifest.codec
