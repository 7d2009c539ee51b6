"""The metrics that come with the package, registered by name."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from imm_scale.choices import MetricConfig, option
from imm_scale.evaluation.metrics.base import Measure, Metric, Samples, Target
from imm_scale.evaluation.metrics.density_coverage import density_coverage
from imm_scale.evaluation.metrics.frechet import Gaussian, Moments, Root, frechet, jackknife, square_root
from imm_scale.evaluation.metrics.inception_score import inception_score
from imm_scale.evaluation.metrics.kid import kernel_distance
from imm_scale.evaluation.metrics.precision_recall import precision_recall
from imm_scale.registry import register_metric


def _gaussian_distance(
    moments: Moments, groups: Sequence[Moments], reference: Gaussian, root: Root, with_error: bool
) -> Measure:
    """Of the samples' moments, with an error from those of their groups."""
    distance = frechet(moments, reference, root)
    error = jackknife(groups, reference, root) if with_error else math.nan
    return Measure(distance.value, error, distance.numerical_error)


@dataclass(frozen=True)
class FrechetConfig(MetricConfig):
    name: str = option("frechet", "")


@register_metric("frechet")
class FrechetDistance(Metric):
    """Distance between the Gaussians with the two sets' moments: FID under the Inception network."""

    Config = FrechetConfig
    needs = frozenset({"moments"})
    higher_is_better = False
    standard_names: ClassVar[dict[str, str]] = {"frechet": "FID"}

    def measure(self, samples: Samples, reference: Target, with_error: bool = True) -> dict[str, Measure]:
        return {"frechet": _gaussian_distance(samples.moments, samples.groups, reference, reference.root, with_error)}


@dataclass(frozen=True)
class SpatialFrechetConfig(MetricConfig):
    name: str = option("spatial_frechet", "")


@register_metric("spatial_frechet")
class SpatialFrechetDistance(Metric):
    """The same between features that keep their places in the image (sFID of Nash et al., arXiv 2103.03841)."""

    Config = SpatialFrechetConfig
    needs = frozenset({"moments", "spatial"})
    higher_is_better = False

    def measure(self, samples: Samples, reference: Target, with_error: bool = True) -> dict[str, Measure]:
        assert reference.spatial is not None
        groups, root = samples.spatial_groups, square_root(reference.spatial.covariance)
        return {
            "spatial_frechet": _gaussian_distance(Moments.merged(groups), groups, reference.spatial, root, with_error)
        }


@dataclass(frozen=True)
class KernelConfig(MetricConfig):
    name: str = option("kernel", "")


@register_metric("kernel")
class KernelDistance(Metric):
    """Unbiased squared maximum mean discrepancy with a cubic kernel (KID)."""

    Config = KernelConfig
    needs = frozenset({"vectors"})
    higher_is_better = False

    def measure(self, samples: Samples, reference: Target, with_error: bool = True) -> dict[str, Measure]:
        assert reference.kept is not None
        estimate = kernel_distance(samples.kept.double(), reference.kept.double())
        return {"kernel": Measure(estimate.value, estimate.error)}


def _by_neighbours(
    shares: Callable[[Tensor, Tensor], dict[str, tuple[float, float]]], samples: Samples, reference: Target
) -> dict[str, Measure]:
    """Shares and their errors by name, from the vectors (N, D) of both sets."""
    assert reference.kept is not None
    values = shares(samples.kept.double(), reference.kept.double())
    return {name: Measure(*pair, higher_is_better=True) for name, pair in values.items()}


@dataclass(frozen=True)
class PrecisionRecallConfig(MetricConfig):
    name: str = option("precision_recall", "")


@register_metric("precision_recall")
class PrecisionRecall(Metric):
    """Shares of either set on the other's manifold, with k = 3 neighbours."""

    Config = PrecisionRecallConfig
    needs = frozenset({"vectors"})
    higher_is_better = True

    def measure(self, samples: Samples, reference: Target, with_error: bool = True) -> dict[str, Measure]:
        return _by_neighbours(precision_recall, samples, reference)


@dataclass(frozen=True)
class DensityCoverageConfig(MetricConfig):
    name: str = option("density_coverage", "")


@register_metric("density_coverage")
class DensityCoverage(Metric):
    """How many of the reference's balls a sample lies in, and how many hold one, with k = 5 neighbours."""

    Config = DensityCoverageConfig
    needs = frozenset({"vectors"})
    higher_is_better = True

    def measure(self, samples: Samples, reference: Target, with_error: bool = True) -> dict[str, Measure]:
        return _by_neighbours(density_coverage, samples, reference)


@dataclass(frozen=True)
class InceptionScoreConfig(MetricConfig):
    name: str = option("inception_score", "")


@register_metric("inception_score")
class InceptionScore(Metric):
    """Exponential of the mean divergence of a sample's class probabilities from those of all."""

    Config = InceptionScoreConfig
    needs = frozenset({"logits"})
    higher_is_better = True
    standard_names: ClassVar[dict[str, str]] = {"class_score": "inception_score"}

    def measure(self, samples: Samples, reference: Target, with_error: bool = True) -> dict[str, Measure]:
        return {"class_score": Measure(*inception_score(samples.classes), higher_is_better=True)}
