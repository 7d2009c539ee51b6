"""Terminal velocity matching: where a jump lands, it must move with s as the velocity there says.

    d/ds f_{s,t}(x_t) = v(f_{s,t}(x_t), s)

the Lagrangian identity, whose left side is differentiated by the weights with both its parts, and whose right side is
the net's own velocity held still (Boffi et al.'s Lagrangian self-distillation; Zhou et al., arXiv 2511.19797, take an
exponential average of the net there). Beside it flow matching fixes that velocity.

Legend: N samples, each a group of its own; times are (N,) fp64.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import Passes, option
from imm_scale.data.batch import Batch
from imm_scale.errors import UserError
from imm_scale.fusion import fused
from imm_scale.methods.base import FlowMapMethod, FlowMapMethodConfig, GroupLosses, prior_noise
from imm_scale.methods.flow_map import VELOCITIES, FlowMap, per_sample
from imm_scale.methods.probability_path import diffuse
from imm_scale.methods.two_times import standard_normal
from imm_scale.registry import register_method


class Draws(NamedTuple):
    """A micro-batch; x_t and x_u are its points at t and at u, where flow matching looks, v (N, ...) their velocity."""

    x_t: Tensor
    x_u: Tensor
    v: Tensor
    s: Tensor
    t: Tensor
    u: Tensor
    label: Tensor
    dropout_key: Tensor | None


@dataclass(frozen=True)
class TvmConfig(FlowMapMethodConfig):
    """How the times are drawn."""

    MAX_ZERO_STAGE: ClassVar[int] = 2
    WHY_NOT_BEYOND: ClassVar[str] = "its tangent calls each layer twice with gradient, and stage 3 counts on one call"

    name: str = option("tvm", "")
    gap: list[float] = option(  # noqa: RUF009 - copied for each instance
        [-0.8, 1.0], "Mean and standard deviation of the logit of t - s.", length="[2, 2]"
    )
    s: list[float] = option(  # noqa: RUF009
        [-0.4, 1.0], "The same of s, below 1 - (t - s), and of flow matching's time.", length="[2, 2]"
    )

    tangents_are_live: ClassVar[bool] = True

    @property
    def takes_tangents(self) -> bool:
        return True

    def cautions(self, images: int) -> list[str]:
        return [*super().cautions(images), *self.flow_map.cautions()]

    teacher_decay: float | None = option(
        None,
        "Decay, one of ema.decays, of the average of the net that says how a jump's end moves (published: 0.99); null: "
        "the net itself.",
        range="[0, 1)",
    )

    @property
    def passes(self) -> Passes:
        # A tangent that carries a gradient is a second pass to go back through; the velocity where it lands; and flow
        # matching, a pass of its own.
        return Passes(grad=3, no_grad=1)

    def validate(self) -> None:
        super().validate()
        told = self.flow_map.second_time != "none" and self.flow_map.time_input == "t"
        if self.flow_map.parameterization not in VELOCITIES or not told:
            raise UserError(
                f"method.name=tvm needs method.flow_map.parameterization={' or '.join(VELOCITIES)}, a second time to "
                f"move and time_input=t, not {self.flow_map.parameterization}, second_time={self.flow_map.second_time} "
                f"and {self.flow_map.time_input}"
            )
        for key in ("gap", "s"):
            value = getattr(self, key)
            if len(value) != 2 or value[1] <= 0.0:
                raise UserError(f"method.{key}={value} must be [mean, standard deviation > 0]")


@register_method("tvm")
class TerminalVelocityMatching(FlowMapMethod):
    """Terminal velocity matching: a jump's end moves with s as the net's velocity there says."""

    Config = TvmConfig

    def loss(self, net: FlowMap, batch: Batch, seed: int) -> GroupLosses:
        d = self.draw(net, batch.x, batch.condition, batch.ordinal, seed)
        out, derivative = net.with_target_tangent(d.x_t, d.s, d.t, d.label, d.dropout_key)
        gap = per_sample((d.t - d.s).to(out.dtype), out)
        moved = out - gap * derivative
        landed = (d.x_t - net.sigma_data * gap * out).detach()
        with torch.no_grad():
            velocity = self._teacher(net).velocity(landed, d.s, d.label, d.dropout_key)
        local = net.average(d.x_u, d.u, d.u, d.label, d.dropout_key)
        return self._compared(net, moved, velocity, local, d)

    def _teacher(self, net: FlowMap) -> FlowMap:
        if self.config.teacher_decay is None:
            return net
        assert self.teacher is not None, "who trains with an averaged teacher keeps one"
        teacher: FlowMap = self.teacher
        return teacher

    @fused()
    def draw(self, flow_map: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, seed: int) -> Draws:
        """All that is random about a micro-batch of x (N, ...), label (N,) and ordinal (N,)."""
        s, t, u = self.draw_times(self.group(ordinal), seed)
        path, eps = flow_map.interp, prior_noise(flow_map, x, ordinal, seed)
        x_t, x_u = (diffuse(path, x, eps, per_sample(times, x)) for times in (t, u))
        label = self.drop_labels(flow_map, label, ordinal, seed)
        return Draws(x_t, x_u, eps - x, s, t, u, label, self.dropout_key(flow_map, ordinal, seed))

    def draw_times(self, group: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """s, t = s + gap and the time of flow matching, each (N,)."""
        c, uniforms = self.config, rng.uniform(seed, "times", group, 2)
        length = torch.sigmoid(_normal(c.gap, uniforms[:, 0]))
        # Below 1 - gap: the normal's quantiles up to that of its logit.
        mean, deviation = c.s
        largest = torch.special.ndtr((torch.logit(1.0 - length) - mean) / deviation)
        s = torch.sigmoid(_normal(c.s, uniforms[:, 1] * largest))
        u = torch.sigmoid(_normal(c.s, rng.uniform(seed, "fm_times", group)[:, 0]))
        span = c.t_max - c.t_min
        s, t, u = (c.t_min + span * times for times in (s, (s + length).clamp_max(1.0), u))
        return s, t, u

    @fused()
    def _compared(self, net: FlowMap, moved: Tensor, velocity: Tensor, local: Tensor, d: Draws) -> GroupLosses:
        """Both mean squares over elements, in units of sigma_d, (N,) fp64."""
        terminal = (moved - velocity / net.sigma_data).double().square().flatten(1).mean(dim=1)
        matched = (local - d.v / net.sigma_data).double().square().flatten(1).mean(dim=1)
        monitors = {"residual": terminal.detach(), "velocity_error": matched.detach(), "gap": d.t - d.s}
        return GroupLosses(terminal + matched, d.t, monitors)


def _normal(parameters: list[float], u: Tensor) -> Tensor:
    mean, deviation = parameters
    return mean + deviation * standard_normal(u)
