"""What samples are measured by: a vector per sample, under a name and a hash that go into every result.

Extractors take either normalized latents, as the model draws them, or the decoded uint8 images. How images become the
network's input (resize, rounding, range, layout) is part of an extractor's identity: other choices give other numbers.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from imm_scale import rng
from imm_scale.config.schema import ExtractorConfig
from imm_scale.errors import UserError


@dataclass(frozen=True)
class Output:
    """Of N samples, fp64: features (N, F), class probabilities (N, K) of a classifier, spatial features (N, S)."""

    features: Tensor
    probabilities: Tensor | None = None
    spatial: Tensor | None = None


class Extractor(Protocol):
    """Samples to features.

    Attributes:
        name: short, for metric names: `latents`, `pixels`, or the network's.
        takes: whether it is fed latents or images.
        identity: all that decides the features; its hash is the extractor's id.
    """

    @property
    def name(self) -> str:
        """Named in results and messages, such as "latents"."""

    @property
    def takes(self) -> Literal["latents", "images"]:
        """What it is called with: (N, C, H, W) normalized latents, or (N, H, W, C) uint8 images."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that decides its features, to be hashed into evaluations and references."""

    def __call__(self, samples: Tensor) -> Output:
        """Features of (N, C, H, W) latents, or of (N, H, W, C) uint8 images."""
        ...


def identity_hash(identity: Mapping[str, Any]) -> str:
    """sha256 of an extractor's identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Flat:
    """The values themselves, element by element; more than max_dim of them by a random projection.

    Args:
        name: `latents` (the normalized space the model samples in) or `pixels` (0..255 scaled to 0..1).
        max_dim: above it, a fixed Gaussian matrix (Philox draws of its row numbers, entries of variance 1 / max_dim)
            maps features to max_dim numbers; it keeps squared distances on average (Johnson and Lindenstrauss, 1984).
    """

    def __init__(self, name: Literal["latents", "pixels"], max_dim: int = 2048):
        self.takes: Literal["latents", "images"] = "latents" if name == "latents" else "images"
        self.name = name
        self.identity: dict[str, Any] = {"kind": name, "max_dim": max_dim}
        self._scale = 1.0 if name == "latents" else 1.0 / 255.0
        self._max_dim = max_dim
        self._projection: Tensor | None = None

    def __call__(self, samples: Tensor) -> Output:
        flat = samples.flatten(1).double() * self._scale
        if flat.shape[1] <= self._max_dim:
            return Output(flat)
        if self._projection is None or len(self._projection) != flat.shape[1]:
            rows = rng.normal(0, "projection", torch.arange(flat.shape[1]), (self._max_dim,))
            self._projection = rows.double() / math.sqrt(self._max_dim)
        return Output(flat @ self._projection)


LATENTS = Flat("latents")


@dataclass(frozen=True)
class Preprocessing:
    """How uint8 images become a network's input; fields as in the config's `evaluation.extractor`."""

    resize: int | None = None
    filter: str = "bicubic_antialias"
    round: bool = True
    range: tuple[float, ...] = (0.0, 255.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels: int | None = None
    layout: str = "nchw"
    order: str = "rgb"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.range) != 2:
            raise UserError(f"evaluation.extractor.range={list(self.range)} must be two numbers, as in [0,255]")
        if self.dtype == "uint8" and (tuple(self.range) != (0.0, 255.0) or self.mean or self.std):
            raise UserError("evaluation.extractor.dtype=uint8 takes a range of [0,255] and no mean or std")

    def __call__(self, images_NHWC: Tensor) -> Tensor:
        """Raises UserError for images with other channels than the network takes."""
        assert images_NHWC.dtype == torch.uint8, images_NHWC.dtype
        x = images_NHWC.permute(0, 3, 1, 2).float()
        if self.channels is not None and x.shape[1] != self.channels:
            if x.shape[1] != 1:
                raise UserError(f"images have {x.shape[1]} channels, the extractor takes {self.channels}")
            x = x.expand(-1, self.channels, -1, -1)
        if self.resize is not None and tuple(x.shape[2:]) != (self.resize, self.resize):
            mode, _, antialias = self.filter.partition("_")
            size = (self.resize, self.resize)
            x = F.interpolate(x, size, mode=mode, antialias=bool(antialias), align_corners=False)
            x = x.round().clamp(0, 255) if self.round else x
        if self.order == "bgr":
            x = x.flip(1)
        low, high = self.range
        if (low, high) != (0.0, 255.0):
            x = low + x * ((high - low) / 255.0)
        for values, apply in ((self.mean, torch.sub), (self.std, torch.div)):
            if values:
                if len(values) != x.shape[1]:
                    raise UserError(f"evaluation.extractor: {len(values)} means or stds for {x.shape[1]} channels")
                x = apply(x, torch.tensor(values)[:, None, None])
        x = x.permute(0, 2, 3, 1) if self.layout == "nhwc" else x
        return x.round().to(torch.uint8).contiguous() if self.dtype == "uint8" else x.contiguous()


def preprocessing(config: ExtractorConfig) -> Preprocessing:
    """The part of an extractor's config that says how images become the network's input."""
    settings: dict[str, Any] = {name: getattr(config, name) for name in Preprocessing.__dataclass_fields__}
    for name in ("range", "mean", "std"):
        settings[name] = tuple(settings[name])
    return Preprocessing(**settings)


def describe(extractor: Extractor) -> dict[str, Any]:
    """What an evaluation file says of it."""
    return {"name": extractor.name, "id": identity_hash(extractor.identity), **extractor.identity}


def identity_of(preprocess: Preprocessing, **network: Any) -> dict[str, Any]:
    """Identity of a network and of what its input goes through."""
    return {**network, "preprocessing": asdict(preprocess)}
