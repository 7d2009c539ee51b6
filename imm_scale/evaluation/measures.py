"""All metrics of one set of samples against a reference, each with its error bar and its name."""

from collections.abc import Sequence
from typing import Any

from imm_scale import config as configs
from imm_scale.config.schema import EvaluationConfig
from imm_scale.errors import UserError
from imm_scale.evaluation import networks
from imm_scale.evaluation.collect import Features
from imm_scale.evaluation.extractors import Extractor, identity_hash
from imm_scale.evaluation.metrics import FrechetDistance, Measure, Metric
from imm_scale.evaluation.networks import STANDARD_ID
from imm_scale.evaluation.reference import Reference
from imm_scale.registry import METRICS

_LEAST_COMPARED = 7  # vectors: one more than the most neighbours asked for


def chosen(metrics: Sequence[Any]) -> list[Metric]:
    """The metrics of `evaluation.metrics`, the Frechet distance first. Raises UserError for what does not exist."""
    configured = configs.metric_configs(metrics)
    instances: list[Metric] = [METRICS.get(config.name)(config) for config in configured]
    ours = [metric for metric in instances if isinstance(metric, FrechetDistance)]
    first = ours or [FrechetDistance(FrechetDistance.Config())]
    return [*first, *(metric for metric in instances if metric not in ours)]


def compares_vectors(metrics: Sequence[Any]) -> bool:
    """Whether features have to be kept, beside their moments."""
    return any("vectors" in metric.needs for metric in chosen(metrics))


def named(metric: str, extractor: Extractor) -> str:
    """A value's name with its extractor's: FID, frechet_latents, class_score_NAME."""
    names = {known: name for cls in map(METRICS.get, METRICS.names()) for known, name in cls.standard_names.items()}  # type: ignore[attr-defined]
    return names[metric] if _is_standard(extractor) and metric in names else f"{metric}_{extractor.name}"


def _is_standard(extractor: Extractor) -> bool:
    return identity_hash(extractor.identity) == STANDARD_ID


def measure(
    metrics: Sequence[Any], features: Features, reference: Reference, extractor: Extractor, with_error: bool = True
) -> dict[str, Measure]:
    """{name: measure}, the Frechet distance first.

    Args:
        metrics: as in `evaluation.metrics`.
        with_error: whether the Frechet distance gets its jackknife error, ten more square roots; else it is NaN.

    Raises:
        UserError: a metric that needs what the reference or the extractor does not have.
    """
    _check_dim(len(features.moments.mean), reference, extractor)
    check_reference(metrics, reference)
    results: dict[str, Measure] = {}
    for metric in chosen(metrics):
        _check_needs(metric, features, reference, extractor)
        values = metric.measure(features, reference, with_error)
        results |= {named(name, extractor): value for name, value in values.items()}
    return results


def _check_dim(dim: int, reference: Reference, extractor: Extractor) -> None:
    if dim != len(reference.mean):
        raise UserError(
            f"the reference has {len(reference.mean)} features, {extractor.name} gives {dim} for these images: it was "
            "made with another extractor, or from images of another size"
        )


def check(config: EvaluationConfig) -> None:
    """Before samples are drawn, or a network is read: metrics that need what this extractor does not give.

    Raises:
        UserError: naming the metric, and the key that is missing.
    """
    extractor, given_by = config.extractor, networks.name_of(config.extractor)
    has_logits = extractor.logits is not None or identity_hash(networks.identity(extractor)) == STANDARD_ID
    for metric in chosen(config.metrics):
        name = metric.config.name
        if "logits" in metric.needs and (extractor.kind == "latents" or not has_logits):
            raise UserError(f"{name} needs class logits, {given_by} gives none: see evaluation.extractor.logits")
        if "spatial" in metric.needs and extractor.spatial is None:
            raise UserError(
                f"{name} needs features with places, {given_by} gives none: name an output of four axes in "
                "evaluation.extractor.spatial"
            )
    if compares_vectors(config.metrics) and config.compared < _LEAST_COMPARED:
        raise UserError(f"evaluation.compared={config.compared} is too few: at least {_LEAST_COMPARED} are needed")
    if config.num is not None and config.num < 2:
        raise UserError(f"evaluation.num={config.num} is too few: a covariance needs at least 2 samples")


def check_reference(metrics: Sequence[Any], reference: Reference) -> None:
    """Raises UserError for metrics that need what the reference does not have."""
    for metric in chosen(metrics):
        name = metric.config.name
        if "vectors" in metric.needs and reference.kept is None:
            raise UserError(
                f"the reference holds moments only; {name} needs its features: write it again with "
                "imm-scale evaluate --make-reference"
            )
        if "spatial" in metric.needs and reference.spatial is None:
            raise UserError(
                f"the reference has no moments of features with places (mu_s, sigma_s), which {name} needs: write it "
                "again with imm-scale evaluate --make-reference and evaluation.extractor.spatial"
            )


def _check_needs(metric: Metric, features: Features, reference: Reference, extractor: Extractor) -> None:
    name = metric.config.name
    if "logits" in metric.needs and not features.classes:
        raise UserError(f"{name} needs class logits, {extractor.name} gives none: see evaluation.extractor.logits")
    if "spatial" in metric.needs:
        _check_spatial(name, features, reference, extractor)
    if "vectors" not in metric.needs:
        return
    assert reference.kept is not None
    if min(len(features.kept), len(reference.kept)) < _LEAST_COMPARED:
        ours, theirs = len(features.kept), len(reference.kept)
        raise UserError(f"{ours} samples and {theirs} of the reference are too few: at least 7 are needed")


def _check_spatial(name: str, features: Features, reference: Reference, extractor: Extractor) -> None:
    assert features.spatial_groups, "an extractor with evaluation.extractor.spatial gives them"
    assert reference.spatial is not None
    ours, theirs = len(features.spatial_groups[0].mean), len(reference.spatial.mean)
    if ours != theirs:
        raise UserError(f"{name}: the reference has {theirs} features with places, {extractor.name} gives {ours}")


def warnings(count: int, dim: int, reference: Reference) -> list[str]:
    """What a reader of the Frechet distance must know of the numbers behind it."""
    messages = []
    if count <= dim:
        messages.append(
            f"{count} samples for {dim} features: their covariance has rank {count - 1} at most, which makes the "
            "Frechet distance too large and its ordering doubtful; draw more samples (50,000 is the custom) or compare "
            "by the kernel distance, which has no such bias"
        )
    if reference.count is not None and reference.count <= dim:
        messages.append(
            f"the reference has {reference.count} images for {dim} features: the distance is biased upwards"
        )
    return messages
