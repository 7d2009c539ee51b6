"""Inductive moment matching (alg 3, eq 67): particles sent from t to s must match particles sent from r to s."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from imm_scale import rng
from imm_scale.flow_map import FlowMap, per_sample
from imm_scale.fusion import fused
from imm_scale.interpolant import diffuse
from imm_scale.objectives import times
from imm_scale.objectives.base import GroupLosses, Objective, prior_noise
from imm_scale.objectives.kernels import grouped_mmd

_MIN_C_OUT = 1e-8  # at s = t the bandwidth would be infinite, and the gradient NaN though the loss is 0


class Draws(NamedTuple):
    """A micro-batch as both branches meet it; times are (G,) in fp64."""

    x_t: Tensor
    x_r: Tensor
    s: Tensor
    r: Tensor
    t: Tensor
    label: Tensor
    dropout_key: Tensor | None


@dataclass(frozen=True)
class InductiveMomentMatching(Objective):
    """The published loss. Field by field as the `objective` section of the config."""

    particles: int
    t_min: float
    t_max: float
    k: int = 12
    min_gap: float = 0.0
    mapping: str = "eta"
    eta_max: float = times.ETA_MAX
    eta_min: float = times.ETA_MIN
    kernel: str = "laplace"
    a: float = 1.0
    b: float = 4.0
    weight_factors: tuple[str, ...] = times.WEIGHT_FACTORS
    label_drop: float = 0.1
    dropout: bool = False

    def draw_times(self, flow_map: FlowMap, group: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(s, r, t) of each group, fp64, shape (G,)."""
        u = rng.uniform(seed, "times", group, 2)
        t, s = times.draw(u[:, 0], u[:, 1], self.t_min, self.t_max)
        return s, self.map_r(flow_map, s, t), t

    def map_r(self, flow_map: FlowMap, s: Tensor, t: Tensor) -> Tensor:
        """r(s, t), (G,)."""
        return times.map_r(
            flow_map.interp, s, t, self.k, self.min_gap, self.mapping, self.eta_max, self.eta_min, self.t_max
        )

    def __call__(self, flow_map: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, seed: int) -> GroupLosses:
        draws = self.draw(flow_map, x, label, ordinal, seed)
        y_t, y_r = flow_map.pair(*draws)
        return GroupLosses(self.discrepancy(flow_map, y_t, y_r, draws.s, draws.t), draws.t)

    @fused()
    def draw(self, flow_map: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, seed: int) -> Draws:
        """All that is random about a micro-batch."""
        s, r, t = self.draw_times(flow_map, self.group(ordinal), seed)
        eps = prior_noise(flow_map, x, ordinal, seed)
        # DDIM(x_t, x, r, t) in its division-free form: the same eps as x_t, never fresh noise.
        x_t = diffuse(flow_map.interp, x, eps, per_sample(t, x))
        x_r = diffuse(flow_map.interp, x, eps, per_sample(r, x))
        label = self.drop_labels(flow_map, label, ordinal, seed)
        return Draws(x_t, x_r, s, r, t, label, self.dropout_key(ordinal, seed))

    @fused()
    def discrepancy(self, flow_map: FlowMap, y_t: Tensor, y_r: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """w(s, t) times the V-statistic of each group, (G,) fp64."""
        bandwidth = 1.0 / flow_map.coefficients(s, t).c_out.abs().clamp_min(_MIN_C_OUT)
        shape = (t.shape[0], self.particles, -1)
        mmd = grouped_mmd(y_t.reshape(shape), y_r.reshape(shape), bandwidth, self.kernel)
        return times.weight(flow_map.interp, t, self.a, self.b, self.weight_factors) * mmd
