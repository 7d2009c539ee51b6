"""The Eulerian identity D_t f_{s,t}(x_t) = 0 along the path: MeanFlow, iMF, alpha-Flow, SoFlow, CT, ECT and sCT.

    e = -D_t f_{s,t}(x_t) / sigma_d, for `euler_fm`  G - v / sigma_d + (t - s) D_t G

with D_t f by a tangent, or as (f_{s,t}(x_t) - f_{s,r}(x_r)) / (t - r). The gradient of a sample's loss is 2 wt e dG: a
regression of G on G - e, which is not differentiated. The presets in configs/method say which paper means what.

Legend: N samples, each a group of its own; times are (N,) fp64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from imm_scale.choices import MethodConfig, Passes, option
from imm_scale.errors import UserError
from imm_scale.fusion import fused
from imm_scale.methods import two_times
from imm_scale.methods.base import GroupLosses, prior_noise, regression, zero_filled
from imm_scale.methods.eulerian import condition, residuals, steps
from imm_scale.methods.eulerian.guidance import TrainingGuidanceConfig, guided
from imm_scale.methods.eulerian.residuals import ResidualConfig
from imm_scale.methods.eulerian.steps import StepConfig
from imm_scale.methods.flow_map import Coefficients, FlowMap, Given, by_block, mean_of_blocks, per_sample
from imm_scale.methods.in_blocks import draws as block_draws
from imm_scale.methods.probability_path import diffuse, velocity
from imm_scale.methods.two_times import TwoTimesMethod, TwoTimesMethodConfig
from imm_scale.registry import register_method

# D_t G, in forward passes: the affine layers once and five products of attention instead of two.
_TANGENT = 1.1
_LEAST = 1e-12  # of a t - s that is divided by


class Draws(NamedTuple):
    """A micro-batch on its path, with the velocity v there, all (N, ...); times (N,), or (N, J) of blocks, fp64.

    A tangent has r = t.

    Attributes:
        guidance: (N, 3), what the net is told of it; None for a net that is told none.
        own: the net's velocity at s = t, where it is known.
        given: what blocks are given.
    """

    x_t: Tensor
    x_r: Tensor
    v: Tensor
    s: Tensor
    r: Tensor
    t: Tensor
    label: Tensor
    dropout_key: Tensor | None
    progress: Tensor
    guidance: Tensor | None = None
    own: Tensor | None = None
    given: Given | None = None


@dataclass(frozen=True)
class EulerianConfig(TwoTimesMethodConfig):
    """One loss and its switches; defaults are MeanFlow's."""

    name: str = option("eulerian", "")
    derivative: Literal["tangent", "difference"] = option(
        "tangent", "D_t f by a tangent through the net, or by the difference to a second point r of the path."
    )
    tangent_mix: float = option(
        0.0,
        "Share of the net's own velocity in the tangent: 0 the path's (MeanFlow), 1 the net's (improved MeanFlow).",
        range="[0, 1]",
    )
    label_drop_at: Literal["any", "equal"] = option(
        "any", "Labels are dropped anywhere, or where s = t only, at the same share of all (MeanFlow)."
    )
    schedule_images: int | None = option(
        None, "Images over which schedules run; they stay at their end afterwards.", range="[1, inf)"
    )
    step: StepConfig = field(default_factory=StepConfig)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    guidance: TrainingGuidanceConfig = field(default_factory=TrainingGuidanceConfig)

    @property
    def jumps_to_data_only(self) -> bool:
        return self.times.s is None

    @property
    def takes_tangents(self) -> bool:
        return self.derivative == "tangent"

    @property
    def why_not_blocks(self) -> str:
        if self.takes_tangents:
            return (
                "the tangent would have to go through the masked attention of several streams, which has none; "
                "method.derivative=difference has no tangent"
            )
        if self.label_drop_at == "equal" and self.label_drop > 0.0:
            return "method.label_drop_at=equal drops labels where s = t, in which the blocks of one sample differ"
        return "velocities of its guidance are of whole samples" if self.guidance.is_on else ""

    @property
    def tells_guidance(self) -> bool:
        return self.guidance.kind == "condition"

    def check_guidance(self, scale: float, interval: Sequence[float]) -> None:
        if self.tells_guidance:
            self.guidance.check_told(scale, interval)

    def unlike(self, source: MethodConfig) -> dict[str, tuple[Any, Any]]:
        """As in the base; the key of a guidance that the net is told no longer is that of its kind."""
        found = super().unlike(source)
        if isinstance(source, EulerianConfig) and source.tells_guidance and not self.tells_guidance:
            found["guidance.kind"] = (source.guidance.kind, self.guidance.kind)
        return found

    @property
    def is_scheduled(self) -> bool:
        """Whether the loss depends on how far training is."""
        return bool(self.residual.warmup) or (self.derivative == "difference" and self.step.is_scheduled)

    def cautions(self, images: int) -> list[str]:
        cautions = super().cautions(images)
        if self.is_scheduled and self.schedule_images != images:
            assert self.schedule_images is not None, "validated"
            ends = (
                f"ends at {self.schedule_images / images:.0%} of it and stays as it is then"
                if self.schedule_images < images
                else f"is {images / self.schedule_images:.0%} through at its end"
            )
            cautions.append(
                f"method.schedule_images={self.schedule_images:,} is not the {images:,} images of this run "
                f"(train.max_steps x train.global_batch_size): the schedule {ends}"
            )
        return cautions

    def resolved(self, precision: str) -> Self:
        return replace(super().resolved(precision), step=self.step.resolved(precision))

    def passes_of(self, apart: float) -> Passes:
        guiding = self.guidance.passes if self.guidance.is_on else 0
        if self.derivative == "difference":
            return Passes(grad=1, no_grad=guiding + apart)
        own = 0.0 if self.tells_guidance or self.tangent_mix == 0.0 else apart
        return Passes(grad=1, no_grad=guiding + own, tangent=apart * _TANGENT)

    def validate(self) -> None:
        super().validate()
        self.step.validate()
        self.guidance.validate()
        if self.guidance.is_on and self.label_drop == 0.0:
            raise UserError("method.guidance mixes in the net without a label: set method.label_drop above 0, as 0.1")
        if self.tangent_mix and self.derivative == "difference":
            raise UserError("method.tangent_mix has no meaning for method.derivative=difference: leave it at 0")
        if self.label_drop_at == "equal" and self.label_drop > self.times.equal:
            raise UserError(
                f"method.label_drop={self.label_drop} where s = t only needs method.times.equal of at least that, not "
                f"{self.times.equal}"
            )
        self._check_unused()
        if self.is_scheduled and self.schedule_images is None:
            raise UserError(
                "method.schedule_images must say over how many images method.step and method.residual.warmup run: "
                "train.max_steps x train.global_batch_size, as a rule"
            )

    def _check_unused(self) -> None:
        """Raises UserError for settings that would do nothing, and for times a tangent cannot follow."""
        if self.derivative == "tangent" and self.flow_map.time_input != "t":
            raise UserError(
                f"method.flow_map.time_input={self.flow_map.time_input} has no derivative: use "
                "method.derivative=difference"
            )
        if self.derivative == "tangent" and self.step != StepConfig():
            raise UserError("method.step has no meaning for method.derivative=tangent: leave it out")
        if self.derivative == "tangent" and self.residual.kind == "ect":
            raise UserError("method.residual.kind=ect weights a difference: it needs method.derivative=difference")
        if self.derivative == "tangent" and self.residual.of_difference:
            raise UserError("method.residual.of_difference weights a difference: it needs method.derivative=difference")
        whole = self.flow_map.parameterization == "euler_fm" or self.flow_map.trajectory == "vp_cosine"
        if self.residual.warmup and (self.derivative == "difference" or not whole):
            raise UserError(
                "method.residual.warmup grows the part of the tangent: it needs method.derivative=tangent, and "
                "flow_map.parameterization=euler_fm or trajectory=vp_cosine"
            )


@register_method("eulerian")
class Eulerian(TwoTimesMethod):
    """The Eulerian identity of a flow map: MeanFlow and its kin, consistency training; configs/method has presets."""

    Config = EulerianConfig

    def ordered_loss(
        self, net: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, apart: int, seed: int
    ) -> GroupLosses:
        draws = self.draw(net, x, label, ordinal, seed)
        if self.config.guidance.is_on:
            draws = self._guided(net, draws)
        by = self._by_tangent if self.config.derivative == "tangent" else self._by_difference
        out, residual, derivative = by(net, draws, apart)
        return self._weighted(net, out, residual, derivative, draws)

    def progress(self, ordinal: Tensor) -> Tensor:
        """(G,) fp64 of schedules, from 0 to 1: a function of the clock alone."""
        group = self.group(ordinal).double()
        if self.config.schedule_images is None:
            return torch.zeros_like(group)
        return (group / self.config.schedule_images).clamp_max(1.0)

    @fused()
    def draw(self, flow_map: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, seed: int) -> Draws:
        """All that is random about a micro-batch of x (N, ...), label (N,) and ordinal (N,)."""
        c, path = self.config, flow_map.interp
        keys, blocks = block_draws.keys(self.group(ordinal), flow_map.blocks), flow_map.blocks
        drawn = two_times.draw(path, c.times, keys, seed, c.t_min, c.t_max)
        s, t, equal = (block_draws.shaped(part, blocks) for part in drawn)
        progress = self.progress(ordinal)
        progress = progress if blocks == 1 else progress[:, None]
        eps = prior_noise(flow_map, x, ordinal, seed)
        t_N = per_sample(t, x)
        x_t, v = diffuse(path, x, eps, t_N), velocity(path, x, eps, t_N)
        r, x_r = t, x_t
        if c.derivative == "difference":
            r = torch.where(equal, t, steps.next_time(path, c.step, s, t, progress, flow_map.sigma_data))
            x_r = diffuse(path, x, eps, per_sample(r, x))
        label, told = self._drop(flow_map, label, ordinal, equal, seed), None
        if c.tells_guidance:
            assert flow_map.null_label is not None, "guidance needs a null label"
            told = condition.draw(c.guidance, self.group(ordinal), equal, label == flow_map.null_label, seed)
        key, given = self.dropout_key(flow_map, ordinal, seed), self.given(flow_map, x, ordinal, seed)
        return Draws(x_t, x_r, v, s, r, t, label, key, progress, told, given=given)

    def _drop(self, flow_map: FlowMap, label: Tensor, ordinal: Tensor, equal: Tensor, seed: int) -> Tensor:
        if self.config.label_drop_at == "any" or self.config.label_drop == 0.0:
            return self.drop_labels(flow_map, label, ordinal, seed)
        share = self.config.label_drop / self.config.times.equal
        return torch.where(equal, self.drop_labels(flow_map, label, ordinal, seed, share), label)

    def _guided(self, net: FlowMap, d: Draws) -> Draws:
        """On the guided velocity, along which x_r lies as well."""
        if d.guidance is not None:
            v, own = condition.guided(net, d.x_t, d.v, d.t, d.label, d.dropout_key, d.guidance)
            d = d._replace(own=own)
        else:
            v = guided(self.config.guidance, net, d.x_t, d.v, d.t, d.label, d.dropout_key)
        back = per_sample((d.t - d.r).to(v.dtype), v)
        return d._replace(v=v, x_r=d.x_r - back * (v - d.v))

    def _by_tangent(self, net: FlowMap, d: Draws, apart: int) -> tuple[Tensor, Tensor, Tensor]:
        """G with gradient, e and (t - s) D_t G, each (N, ...); s = t for all but the first `apart` samples."""
        w, mix = d.v[:apart], self.config.tangent_mix
        if mix > 0.0:
            w = w + mix * (self._own(net, d, apart) - w)
        out, derivative = net.with_tangent(d.x_t, w, d.s, d.t, d.label, d.dropout_key, d.guidance)
        derivative = zero_filled(derivative, out)
        warmup = self.config.residual.warmup
        grown = (d.progress / warmup).clamp_max(1.0) if warmup else None
        residual = net.residual(d.x_t, d.v, out.detach(), derivative, d.s, d.t, grown)
        return out, residual, per_sample((d.t - d.s).to(out.dtype), out) * derivative

    @staticmethod
    @torch.no_grad()
    def _own(net: FlowMap, d: Draws, apart: int) -> Tensor:
        """The net's own velocity at s = t of the first `apart` samples, guided where it is told so."""
        if d.own is not None:
            return d.own[:apart]
        key = None if d.dropout_key is None else d.dropout_key[:apart]
        return net.velocity(d.x_t[:apart], d.t[:apart], d.label[:apart], key)

    def _by_difference(self, net: FlowMap, d: Draws, apart: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same with D_t f as a difference quotient; where r = t it is the velocity's error, exactly."""
        times = d.s, d.r[:apart], d.t
        pair = net.average_pair(d.x_t, d.x_r[:apart], *times, d.label, d.dropout_key, d.guidance, d.given)
        out, out_r, at_t, at_r = pair
        at_r = Coefficients(*(zero_filled(part, d.t) for part in at_r))
        return out, *self._quotient(net, out.detach(), zero_filled(out_r, out), at_t, at_r, d)

    @fused()
    def _quotient(
        self, net: FlowMap, out: Tensor, out_r: Tensor, at_t: Coefficients, at_r: Coefficients, d: Draws
    ) -> tuple[Tensor, Tensor]:
        """e and, of it, what is not the velocity's error at s = t: (t - s) D_t G for `euler_fm`."""
        apart = d.t > d.r
        gap = per_sample(torch.where(apart, d.t - d.r, 1.0), out)
        c_t, c_r = (Coefficients(*(per_sample(part, out) for part in c)) for c in (at_t, at_r))
        # In fp64: two points that hardly differ.
        moved = c_t.c_skip * d.x_t.double() - c_r.c_skip * d.x_r.double()
        moved = moved + c_t.c_out * out.double() - c_r.c_out * out_r.double()
        quotient = (net.sign_of_c_out / net.sigma_data * moved / gap).to(out.dtype)
        local = net.residual(d.x_t, d.v, out, torch.zeros_like(out), d.s, d.t)
        residual = torch.where(per_sample(apart, out), quotient, local)
        return residual, residual - local

    @fused()
    def _weighted(
        self,
        net: FlowMap,
        out: Tensor,
        residual: Tensor,
        derivative: Tensor,
        d: Draws,
    ) -> GroupLosses:
        """wt ||e||^2 (N,) fp64 with the gradient 2 wt e dG, and what to watch; of blocks the mean."""
        s, r, t = (times.flatten() for times in (d.s, d.r, d.t))
        out, residual, derivative = (by_block(part, net.blocks) for part in (out, residual, derivative))
        elements, square = residual[0].numel(), residual.double().square().sum(dim=1)
        share = torch.where(t > s, (t - r) / (t - s).clamp_min(_LEAST), 1.0)
        c_out = net.coefficients(s, t).c_out
        wt = residuals.weights(self.config.residual, square, elements, net.interp, t, r, share, c_out, net.sigma_data)
        size = derivative.double().square().mean(dim=1).sqrt()
        whole = regression(out, residual, wt), t, square / elements, size, t - s
        loss, t, square, size, gap = (mean_of_blocks(part, net.blocks) for part in whole)
        return GroupLosses(loss, t, {"residual": square, "tangent_rms": size, "gap": gap})
