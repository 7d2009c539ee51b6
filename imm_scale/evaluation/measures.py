"""All metrics of one set of samples against a reference, each with its error bar and its name."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from imm_scale.errors import UserError
from imm_scale.evaluation.collect import Features
from imm_scale.evaluation.extractors import Extractor, identity_hash
from imm_scale.evaluation.metrics.density_coverage import density_coverage
from imm_scale.evaluation.metrics.frechet import frechet, jackknife
from imm_scale.evaluation.metrics.inception_score import inception_score
from imm_scale.evaluation.metrics.kid import kernel_distance
from imm_scale.evaluation.metrics.precision_recall import precision_recall
from imm_scale.evaluation.networks import STANDARD_ID
from imm_scale.evaluation.reference import Reference

COMPARING = ("kernel", "precision_recall", "density_coverage")  # metrics of the vectors themselves
_LEAST_COMPARED = 7  # vectors: one more than the most neighbours asked for


@dataclass(frozen=True)
class Measure:
    """A value, its standard error, and what fp64 rounding can have done to it where that is known."""

    value: float
    error: float
    numerical_error: float | None = None


def frechet_name(extractor: Extractor) -> str:
    """`FID` for the network of published FIDs, fed as it was; else frechet_NAME."""
    return "FID" if identity_hash(extractor.identity) == STANDARD_ID else f"frechet_{extractor.name}"


def _named(metric: str, extractor: Extractor) -> str:
    return f"{metric}_{extractor.name}"


def measure(
    metrics: Sequence[str], features: Features, reference: Reference, extractor: Extractor, with_error: bool = True
) -> dict[str, Measure]:
    """{name: measure}, the Frechet distance first.

    Args:
        metrics: as in `evaluation.metrics`.
        with_error: whether the Frechet distance gets its jackknife error, ten more square roots; else it is NaN.

    Raises:
        UserError: a metric that needs what the reference or the extractor does not have.
    """
    moments = features.moments
    _check_dim(len(moments.mean), reference, extractor)
    distance = frechet(moments, reference, reference.root)
    error = jackknife(features.groups, reference, reference.root) if with_error else math.nan
    found = {frechet_name(extractor): Measure(distance.value, error, distance.numerical_error)}
    if set(metrics) & set(COMPARING):
        found |= _comparisons(metrics, features, reference, extractor)
    if "inception_score" in metrics:
        if not features.classes:
            raise UserError(
                f"the Inception score needs class logits, {extractor.name} gives none: see extractor.logits"
            )
        standard = frechet_name(extractor) == "FID"
        name = "inception_score" if standard else _named("class_score", extractor)
        found[name] = Measure(*inception_score(features.classes))
    return found


def _check_dim(dim: int, reference: Reference, extractor: Extractor) -> None:
    if dim != len(reference.mean):
        raise UserError(
            f"the reference has {len(reference.mean)} features, {extractor.name} gives {dim} for these images: it was "
            "made with another extractor, or from images of another size"
        )


def _comparisons(
    metrics: Sequence[str], features: Features, reference: Reference, extractor: Extractor
) -> dict[str, Measure]:
    if reference.kept is None:
        raise UserError(
            "the reference holds moments only; kernel and neighbour metrics need its features: write it again with "
            "imm-scale evaluate --make-reference"
        )
    ours, theirs = features.kept.double(), reference.kept.double()
    if min(len(ours), len(theirs)) < _LEAST_COMPARED:
        raise UserError(f"{len(ours)} samples and {len(theirs)} of the reference are too few: at least 7 are needed")
    found: dict[str, Measure] = {}
    if "kernel" in metrics:
        estimate = kernel_distance(ours, theirs)
        found[_named("kernel", extractor)] = Measure(estimate.value, estimate.error)
    pairs: dict[str, tuple[float, float]] = {}
    pairs |= precision_recall(ours, theirs) if "precision_recall" in metrics else {}
    pairs |= density_coverage(ours, theirs) if "density_coverage" in metrics else {}
    return found | {_named(name, extractor): Measure(*pair) for name, pair in pairs.items()}


def warnings(count: int, dim: int, reference: Reference) -> list[str]:
    """What a reader of the Frechet distance must know of the numbers behind it."""
    found = []
    if count <= dim:
        found.append(
            f"{count} samples for {dim} features: their covariance has rank {count - 1} at most, which makes the "
            "Frechet distance too large and its ordering doubtful; draw more samples (50,000 is the custom) or compare "
            "by the kernel distance, which has no such bias"
        )
    if reference.count is not None and reference.count <= dim:
        found.append(f"the reference has {reference.count} images for {dim} features: the distance is biased upwards")
    return found
