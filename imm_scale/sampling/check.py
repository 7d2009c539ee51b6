"""What can be said of samples before any weights are read, and before a job waits in a queue."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from imm_scale import build
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import export
from imm_scale.config.schema import SamplingConfig
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap
from imm_scale.sampling import guides, profiles
from imm_scale.sampling.draw import Drawer, plan_of
from imm_scale.sampling.source import Source


def check(
    source: Source, config: SamplingConfig, scales: Sequence[float], step_counts: Sequence[int], typed: Collection[str]
) -> None:
    """Every plan that the settings make with a model.

    Args:
        scales: of guidance, each with all step counts.
        typed: keys that were given for this command, and that therefore have to do something.

    Raises:
        UserError: what cannot be drawn, or weights or a guide that are not there.
    """
    guides.check_scales(config, scales)
    newest = source.at_newest()
    spec, _ = export.read_spec(newest.weights_url, config.ema)
    net, guide = _net(spec), guides.load_spec(newest, config)
    if guide is not None:
        guide_net = _net(guide[0])
        guides.check_fits(net, spec, guide_net, *guide)
        net = net.guided_by(guide_net)
    if config.grid == "best" and "unmask" not in spec.method.SAMPLERS:
        raise UserError(
            f"sampling.grid=best takes step sizes from the profile of a masked net, and method.name={spec.method.name} "
            "has none: name another grid, or leave it out"
        )
    by_steps = profiles.written_out(newest, config, step_counts, None)
    _check_plans(net, spec, by_steps, scales, typed)


def check_before_training(
    spec: ModelSpec,
    config: SamplingConfig,
    scales: Sequence[float],
    step_counts: Sequence[int],
    typed: Collection[str],
) -> None:
    """As `check`, of a model whose weights, and whose guide's, are still to come. Raises UserError."""
    guides.check_scales(config, scales)
    net = _net(spec)
    if config.guide.is_set and isinstance(net, FlowMap):
        net = net.guided_by(net)  # which guide it is does not matter to a plan
    if config.grid == "best":  # of a profile that is still to come
        config = dataclasses.replace(config, grid="uniform")
    _check_plans(net, spec, dict.fromkeys(step_counts, config), scales, typed)


def _net(spec: ModelSpec) -> Any:
    with torch.device("meta"):
        return build.net(spec)


def _check_plans(
    net: Any,
    spec: ModelSpec,
    by_steps: Mapping[int, SamplingConfig],
    scales: Sequence[float],
    typed: Collection[str],
) -> None:
    drawers = []
    for scale in scales:
        for steps, config in by_steps.items():
            chosen = dataclasses.replace(config, guidance_scale=scale, compile=False)
            drawers.append(Drawer(net, spec, plan_of(chosen, spec, steps, config.num, config.seed)))
    for config in by_steps.values():
        _refuse_idle(spec, config, drawers, typed)


def _refuse_idle(spec: ModelSpec, config: SamplingConfig, drawers: Sequence[Drawer], typed: Collection[str]) -> None:
    """Raises UserError for what was typed and does nothing."""
    for key in ("sampling.vae", "sampling.vae_precision"):
        if key in typed and not spec.space.needs_decoder:
            raise UserError(f"{key} does nothing here: no autoencoder decodes what this model draws; leave it out")
    if "sampling.order" in typed and not any(one.plan.sampler == "unmask" for one in drawers):
        raise UserError(
            f"sampling.order={config.order} does nothing here: sampling.sampler=unmask reads it; leave it out"
        )
    if "sampling.guidance_interval" in typed and not any(
        one.plan.guidance.at(t) != 1.0 for one in drawers for t in one.times[:-1]
    ):
        raise UserError(
            f"sampling.guidance_interval={config.guidance_interval} does nothing here: guidance is off, or no step "
            "begins inside; set sampling.guidance_scale (--guidance) and an interval that holds a time of the grid"
        )
