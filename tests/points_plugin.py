"""A method, a backbone, a sample space, a metric and a kernel of one's own, as docs/extending.md explains them.

Points of the plane, a small perceptron, a denoiser that is sampled by steps towards what it expects, the distance
of two means. A run uses it by `plugins: [tests.points_plugin]`; nothing in the package knows of it.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from imm_scale import UserError, register_backbone, register_method, register_metric, register_space, rng
from imm_scale.choices import BackboneConfig, MethodConfig, MetricConfig, SpaceConfig, option
from imm_scale.data.batch import Batch
from imm_scale.data.manifest import Manifest
from imm_scale.data.spaces import Artifacts, SampleSpace
from imm_scale.evaluation.metrics import Measure, Metric
from imm_scale.methods.base import GroupLosses, Method, Steps
from imm_scale.methods.mmd import KERNELS
from imm_scale.models.base import Architecture, Backbone

# --- a sample space: what samples are to a net ---


@dataclass(frozen=True)
class PointsConfig(SpaceConfig):
    name: str = option("points", "")
    unit: float = option(1.0, "What a stored 1 becomes.")


@register_space("points")
@dataclass(frozen=True)
class Points(SampleSpace):
    """Points, stored as latents of (dimensions, 1, 1)."""

    Config = PointsConfig
    dtype = torch.float32

    shape: tuple[int]
    unit: float
    num_classes: int
    class_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: PointsConfig, manifest: Manifest) -> Self:
        dimensions, *sides = manifest.latent_shape
        if sides != [1, 1]:
            raise UserError(f"data.space.name=points needs latents of (dimensions, 1, 1), not {manifest.latent_shape}")
        return cls((dimensions,), config.unit, manifest.num_classes, tuple(manifest.class_names))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        return cls(tuple(fields["shape"]), fields["unit"], fields["num_classes"], tuple(fields["class_names"]))

    def prior(self, seed: int, purpose: str, index_N: Tensor, stream: int = 0) -> Tensor:
        return rng.normal(seed, purpose, index_N, self.shape, stream)

    def from_stored(
        self, stored_N: Tensor, seed: int, purpose: str, ordinal_N: Tensor, out: Tensor | None = None
    ) -> Tensor:
        points = stored_N.flatten(1).float() * self.unit
        return points if out is None else out.copy_(points)

    @property
    def image_size(self) -> int:
        return _SIDE

    @property
    def provenance(self) -> dict[str, str]:
        return {"kind": "points", "weights": ""}

    def artifacts(self, decoder: str | None, device: torch.device, precision: str = "fp32") -> "Dots":
        return Dots()


_SIDE = 16


class Dots(Artifacts):
    """A grey picture with one white pixel: where the point lies in [-4, 4)^2."""

    def __call__(self, x_N: Tensor) -> Tensor:
        column, row = ((x_N[:, :2] + 4) * (_SIDE / 8)).long().clamp(0, _SIDE - 1).T.cpu()
        images = torch.zeros(len(x_N), _SIDE, _SIDE, 1, dtype=torch.uint8)
        images[torch.arange(len(x_N)), row, column] = 255
        return images


# --- a backbone: the network ---


@dataclass(frozen=True)
class PerceptronConfig(BackboneConfig):
    name: str = option("perceptron", "")
    width: int = option(16, "Hidden units.")
    depth: int = option(2, "Blocks.")

    def validate(self) -> None:
        if min(self.width, self.depth) < 1:
            raise UserError(f"model.width={self.width} and model.depth={self.depth} must be at least 1")


@dataclass(frozen=True)
class PerceptronArchitecture(Architecture):
    dimensions: int
    num_classes: int
    width: int
    depth: int

    def build(self) -> "Perceptron":
        return Perceptron(self)

    def example(self, samples: int) -> tuple[Tensor, Tensor, None, Tensor]:
        x, t = torch.zeros(samples, self.dimensions), torch.zeros(samples)
        return x, t, None, torch.zeros(samples, dtype=torch.int64)


@register_backbone("perceptron")
class Perceptron(Backbone):
    """Residual blocks of one hidden layer between two linear maps; time and class are added at the beginning."""

    Config = PerceptronConfig
    Architecture = PerceptronArchitecture

    def __init__(self, architecture: PerceptronArchitecture):
        super().__init__()
        width = architecture.width
        self.enter = nn.Linear(architecture.dimensions + 1, width)
        self.classes = nn.Embedding(architecture.num_classes, width)
        layers = (nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(architecture.depth))
        self.blocks = nn.ModuleList(layers)
        self.leave = nn.Linear(width, architecture.dimensions)

    @classmethod
    def architecture(cls, config: PerceptronConfig, space: SampleSpace, second_time: bool) -> PerceptronArchitecture:
        if len(space.shape) != 1:
            raise UserError(f"model.name=perceptron works on points, not on samples of shape {space.shape}")
        if second_time:
            raise UserError("model.name=perceptron takes no second time: choose another method or model")
        return PerceptronArchitecture(space.shape[0], space.num_classes, config.width, config.depth)

    def forward(
        self, x: Tensor, c_noise: Tensor, second: None, label: Tensor, dropout_key: Tensor | None = None
    ) -> Tensor:
        hidden = self.enter(torch.cat([x, c_noise.to(x.dtype)[:, None]], dim=1)) + self.classes(label)
        for block in self.blocks:
            hidden = hidden + self.run_block(block, hidden)
        return self.leave(hidden)


# --- a method: how to sample, and what to minimize so that this sampler is right ---


@dataclass(frozen=True)
class DenoiserConfig(MethodConfig):
    name: str = option("denoiser", "")
    samples_per_time: int = option(2, "Samples of a group, which share one time.")

    @property
    def group_size(self) -> int:
        return self.samples_per_time

    def validate(self) -> None:
        if self.samples_per_time < 1:
            raise UserError(f"method.samples_per_time={self.samples_per_time} must be at least 1")


class DenoiserNet(nn.Module):
    """What is expected of a point at time t, (N, D)."""

    null_label = None

    def __init__(self, model: Backbone, space: SampleSpace):
        super().__init__()
        self.model, self.space = model, space

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.model(x_t.float(), t, None, label).to(x_t.dtype)


@register_method("denoiser")
class Denoiser(Method):
    """Mean squared error of the point expected at x_t = (1 - t) x + t eps."""

    Config = DenoiserConfig

    def wrap(self, backbone: Backbone, space: SampleSpace) -> DenoiserNet:
        return DenoiserNet(backbone, space)

    def grid(self, kind: str, steps: int, space: SampleSpace) -> Tensor:
        return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)

    def sample(self, net: DenoiserNet, start: Tensor, condition: Tensor, steps: Steps) -> Tensor:
        x = start
        for t, s in pairwise(steps.times):
            expected = net(x, t.expand(len(x)), condition)
            x = expected + (s / t) * (x - expected)
        return x

    def loss(self, net: DenoiserNet, batch: Batch, seed: int) -> GroupLosses:
        t_G = rng.uniform(seed, "times", self.group(batch.ordinal))[:, 0]
        t = t_G.repeat_interleave(self.group_size)
        eps = net.space.prior(seed, "noise", batch.ordinal)
        x_t = (1 - t[:, None]).float() * batch.x + t[:, None].float() * eps
        error = (net(x_t, t, batch.condition) - batch.x).square().mean(dim=1).double()
        return GroupLosses(error.view(-1, self.group_size).mean(dim=1), t_G)


# --- a metric: how samples are judged ---


@dataclass(frozen=True)
class MeanGapConfig(MetricConfig):
    name: str = option("mean_gap", "")
    power: float = option(1.0, "Power of the distance.")


@register_metric("mean_gap")
class MeanGap(Metric):
    """Distance of the mean of the samples from that of the reference."""

    Config = MeanGapConfig
    needs = frozenset({"moments"})
    higher_is_better = False
    standard_names: ClassVar[dict[str, str]] = {}

    def measure(self, samples: Any, reference: Any, with_error: bool = True) -> dict[str, Measure]:
        gap = float((samples.moments.mean - reference.mean).norm())
        variance = float(samples.moments.covariance.trace()) / samples.moments.count
        return {"mean_gap": Measure(gap**self.config.power, variance**0.5)}


# --- a kernel: how IMM compares particles ---


def multiquadric(distance: Tensor, bandwidth: Tensor, dim: int) -> Tensor:
    """1 - sqrt(1 + w^2 d^2 / D), conditionally positive definite as the energy kernel is."""
    return 1.0 - torch.sqrt(1.0 + (bandwidth * distance).square() / dim)


KERNELS["multiquadric"] = multiquadric
