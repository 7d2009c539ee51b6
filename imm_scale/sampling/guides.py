"""Autoguidance: a weaker net as the guide (Karras et al. 2024, arXiv 2406.02507), in place of the null label.

The guide is another checkpoint or average of the run, or the weights of another one on the same samples.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from imm_scale import storage
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import export
from imm_scale.config.schema import SamplingConfig
from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap
from imm_scale.sampling import source as sources
from imm_scale.sampling.source import Source


@dataclass(frozen=True)
class Guide:
    """A guide that was read.

    Attributes:
        weights_id: hash of spec and weights, as that of a model.
        text: what it is in words, as in "small, step 700, ema 0.99".
    """

    spec: ModelSpec
    net: FlowMap
    weights_id: str
    text: str


def check_scales(config: SamplingConfig, scales: Iterable[float]) -> None:
    """Raises UserError where there is a guide and no guidance."""
    if config.guide.is_set and all(scale == 1.0 for scale in scales):
        raise UserError(
            "sampling.guide is set and guidance is off: set sampling.guidance_scale (--guidance) above 1, or no guide"
        )


def load(source: Source, config: SamplingConfig) -> Guide | None:
    """The guide that `sampling.guide` names for a model's source; None where it names none.

    Raises:
        UserError: nothing there to read, or no run to take another step or average of.
    """
    if not config.guide.is_set:
        return None
    return read(*_place(source, config))


def load_spec(source: Source, config: SamplingConfig) -> tuple[ModelSpec, str] | None:
    """Spec of the guide that `sampling.guide` names, without its weights, and what it is; None where it names none.

    Raises:
        UserError: as `load`.
    """
    return export.read_spec(*_place(source, config)) if config.guide.is_set else None


def read(url: str, ema: float | None = None, step: int | None = None) -> Guide:
    """A guide from a run, a checkpoint or an export, as `export.load` reads it."""
    spec, net, origin = export.load(url, ema, step)
    known = [("step", origin.step), ("ema", origin.ema), ("width", origin.width)]
    parts = [f"{name} {value!r}" for name, value in known if value is not None]
    text = ", ".join([storage.name(url.rstrip("/")), *parts])
    return Guide(spec, net, export.identity(spec, net), text)


def _place(source: Source, config: SamplingConfig) -> tuple[str, float | None, int | None]:
    """What to read, as `export.load` takes it: url, average, step."""
    guide = config.guide
    if guide.source is not None:
        other = sources.find(guide.source)
        return other.url, guide.ema, guide.step
    if guide.step is not None and source.run_dir is None:
        raise UserError(
            f"sampling.guide.step={guide.step}: {source.url} is no run, so it has no other step; name the guide's "
            "weights by sampling.guide.source (--guide)"
        )
    ema = config.ema if guide.ema is None else guide.ema
    return source.run_dir or source.url, ema, source.step if guide.step is None else guide.step


def put(flow_map: FlowMap, spec: ModelSpec, weights_id: str, guide: Guide) -> FlowMap:
    """The flow map of a model with a guide.

    Raises:
        UserError: a method that has no flow map, a net that is told its guidance, a guide on other samples or another
            trajectory, or the model itself.
    """
    check_fits(flow_map, spec, guide.net, guide.spec, guide.text)
    if guide.weights_id == weights_id:
        raise UserError(
            f"the guide ({guide.text}) is the model itself, so guidance would do nothing: take an earlier step, a "
            "shorter average or a smaller net"
        )
    return flow_map.guided_by(guide.net)


def check_fits(net: Any, spec: ModelSpec, guide: Any, guide_spec: ModelSpec, text: str) -> None:
    """Raises UserError for a method that has no flow map, a net that is told its guidance, or a guide, in words `text`,
    on other samples."""
    for one, of in ((net, spec), (guide, guide_spec)):
        if not isinstance(one, FlowMap):
            raise UserError(f"method.name={of.method.name} has no flow map, which sampling.guide needs")
        if of.method.tells_guidance:
            whose = "model" if one is net else f"guide ({text})"
            raise UserError(
                f"the {whose} is told its guidance (method.guidance.kind=condition), beside which there is no "
                "sampling.guide: leave it out, or take a net that was trained otherwise"
            )
    differences = _differences(spec.space, guide_spec.space)
    if differences:
        raise UserError(
            f"the guide ({text}) draws other samples than the model: {'; '.join(differences)}. Take one that was "
            "trained on the same data"
        )


def _differences(ours: SampleSpace, theirs: SampleSpace) -> Sequence[str]:
    """In what two sample spaces differ, as "sigma_data 0.5, of the guide 1.0"; names only where both have some."""
    if type(ours) is not type(theirs):
        return [f"space {type(ours).__name__}, of the guide {type(theirs).__name__}"]
    mine, its = _flat(ours), _flat(theirs)
    unnamed = {"class_names"} if not (ours.class_names and theirs.class_names) else set()
    keys = [key for key in mine if key not in unnamed and mine[key] != its[key]]
    return [f"{key} {mine[key]}, of the guide {its[key]}" for key in keys]


def _flat(space: SampleSpace) -> dict[str, Any]:
    fields = dataclasses.asdict(space)  # type: ignore[call-overload]
    codec = fields.pop("codec", {})
    stored = ("moments", "scale", "shift")  # how shards hold the same samples
    return {**fields, **{key: value for key, value in codec.items() if key not in stored}}
