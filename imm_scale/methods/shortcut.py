"""Shortcut models: one jump from t to s must land where two jumps over a point m between them do.

    (t - s) u_{s,t}(x_t) = (t - m) u_{m,t}(x_t) + (m - s) u_{s,m}(x_m),   x_m = x_t - (t - m) u_{m,t}(x_t)

The two jumps are targets, without gradient. Half-way points on a grid of powers of two are those of shortcut models
(Frans et al., arXiv 2410.12557); any m is SplitMeanFlow (arXiv 2507.16884) and progressive self-distillation.

Legend: N samples, each a group of its own; times are (N,) fp64.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import Passes, option
from imm_scale.errors import UserError
from imm_scale.fusion import fused
from imm_scale.methods import two_times
from imm_scale.methods.base import GroupLosses, prior_noise, regression, zero_filled
from imm_scale.methods.flow_map import VELOCITIES, FlowMap, per_sample
from imm_scale.methods.probability_path import diffuse, velocity
from imm_scale.methods.two_times import TwoTimes, TwoTimesMethod, TwoTimesMethodConfig
from imm_scale.registry import register_method


class Draws(NamedTuple):
    """A micro-batch; v (N, ...) is the velocity of its path, `near` the share (m - s) / (t - s); times (N,) fp64."""

    x_t: Tensor
    v: Tensor
    s: Tensor
    t: Tensor
    near: Tensor
    label: Tensor
    dropout_key: Tensor | None


@dataclass(frozen=True)
class ShortcutConfig(TwoTimesMethodConfig):
    """Where m lies and how t and s are drawn."""

    name: str = option("shortcut", "")
    split: Literal["half", "uniform"] = option("half", "m half-way, or anywhere, between s and t.")
    grid: int | None = option(
        128,
        "half: s and t lie on this grid, t - s being 2^-k, as the published net is told; null: as method.times says.",
        range="[1, inf)",
    )
    clip: float | None = option(
        None, "Targets are clipped to this size, in units of sigma_d; published: 4.", range="(0, inf)"
    )

    def passes_of(self, apart: float) -> Passes:
        return Passes(grad=1, no_grad=2 * apart)

    def validate(self) -> None:
        super().validate()
        if self.flow_map.parameterization not in VELOCITIES:
            raise UserError(
                "method.name=shortcut adds mean velocities: it needs method.flow_map.parameterization=euler_fm"
            )
        if self.grid is not None and (self.grid < 2 or self.grid & (self.grid - 1)):
            raise UserError(f"method.grid={self.grid} must be a power of 2 above 1, as 128")
        if self.grid is not None and self.split == "uniform":
            raise UserError("method.split=uniform has no grid: set method.grid=null")


@register_method("shortcut")
class Shortcut(TwoTimesMethod):
    """Shortcut models and SplitMeanFlow: one jump lands where two do."""

    Config = ShortcutConfig

    def ordered_loss(
        self, net: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, apart: int, seed: int
    ) -> GroupLosses:
        draws = self.draw(net, x, label, ordinal, seed)
        target = zero_filled(self.two_jumps(net, draws, apart), draws.x_t)
        out = net.average(draws.x_t, draws.s, draws.t, draws.label, draws.dropout_key)
        return self._compared(net, out, target, draws)

    @torch.no_grad()
    def two_jumps(self, net: FlowMap, d: Draws, count: int) -> Tensor:
        """G of the two jumps over m, (count, ...), of the first so many samples."""
        x_t, s, t, label = d.x_t[:count], d.s[:count], d.t[:count], d.label[:count]
        key = None if d.dropout_key is None else d.dropout_key[:count]
        near = d.near[:count]
        m = s + near * (t - s)
        first = net.average(x_t, m, t, label, key)
        x_m = x_t - per_sample((net.sigma_data * (t - m)).to(x_t.dtype), x_t) * first
        near_N = per_sample(near.to(x_t.dtype), x_t)
        return (1.0 - near_N) * first + near_N * net.average(x_m, s, m, label, key)

    @fused()
    def draw(self, flow_map: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, seed: int) -> Draws:
        """All that is random about a micro-batch of x (N, ...), label (N,) and ordinal (N,)."""
        group, path = self.group(ordinal), flow_map.interp
        s, t, _ = self.draw_times(flow_map, group, seed)
        near = torch.full_like(t, 0.5) if self.config.split == "half" else rng.uniform(seed, "split", group)[:, 0]
        eps = prior_noise(flow_map, x, ordinal, seed)
        t_N = per_sample(t, x)
        x_t, v = diffuse(path, x, eps, t_N), velocity(path, x, eps, t_N)
        label = self.drop_labels(flow_map, label, ordinal, seed)
        return Draws(x_t, v, s, t, near, label, self.dropout_key(flow_map, ordinal, seed))

    def draw_times(self, flow_map: FlowMap, group: Tensor, seed: int) -> TwoTimes:
        """s and t of each group, on the grid where there is one."""
        c = self.config
        if c.grid is None:
            return two_times.draw(flow_map.interp, c.times, group, seed, c.t_min, c.t_max)
        u = rng.uniform(seed, "times", group, 2)
        equal = two_times.draw_equal(c.times.equal, group, seed)
        levels = c.grid.bit_length() - 1
        gap = torch.where(equal, 1.0 / c.grid, 2.0 ** -(levels * u[:, 0]).floor())
        t = gap * ((u[:, 1] / gap).floor() + 1.0)
        s = torch.where(equal, t, t - gap)
        s, t = (c.t_min + (c.t_max - c.t_min) * times for times in (s, t))
        return TwoTimes(s, t, equal)

    @fused()
    def _compared(self, net: FlowMap, out: Tensor, target: Tensor, d: Draws) -> GroupLosses:
        """Mean squares over elements: of the velocity's error where s = t, else of the two ways apart."""
        target = torch.where(per_sample(d.s < d.t, out), target, d.v / net.sigma_data)
        if self.config.clip is not None:
            target = torch.where(per_sample(d.s < d.t, out), target.clamp(-self.config.clip, self.config.clip), target)
        residual = out.detach() - target
        square = residual.double().square().flatten(1).mean(dim=1)
        wt = torch.full_like(square, 1.0 / residual[0].numel())
        return GroupLosses(regression(out, residual, wt), d.t, {"residual": square, "gap": d.t - d.s})
