"""Inductive moment matching (alg 3, eq 67): particles sent from t to s must match particles sent from r to s."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

from torch import Tensor

from imm_scale import rng
from imm_scale.choices import Passes, option
from imm_scale.data.batch import Batch
from imm_scale.errors import UserError
from imm_scale.fusion import fused
from imm_scale.methods import imm_times
from imm_scale.methods.base import FlowMapMethod, GroupLosses, prior_noise
from imm_scale.methods.flow_map import FlowMap, Given, by_block, mean_of_blocks, per_sample
from imm_scale.methods.in_blocks import draws as block_draws
from imm_scale.methods.mmd import KERNELS, grouped_mmd
from imm_scale.methods.one_time import OneTimeConfig
from imm_scale.methods.probability_path import diffuse
from imm_scale.registry import register_method

_MIN_C_OUT = 1e-8  # at s = t the bandwidth would be infinite, and the gradient NaN though the loss is 0


class Draws(NamedTuple):
    """A micro-batch as both branches meet it; times are (G,), or (G, J) of blocks, in fp64."""

    x_t: Tensor
    x_r: Tensor
    s: Tensor
    r: Tensor
    t: Tensor
    label: Tensor
    dropout_key: Tensor | None
    given: Given | None = None


@dataclass(frozen=True)
class ImmConfig(OneTimeConfig):
    """The published loss and what can be varied in it (app C, app I)."""

    DEFAULT_T_MAX: ClassVar[dict[str, float]] = imm_times.T_MAX

    name: str = option("imm", "")
    particles: int = option(
        4, "M, samples that share one (s, r, t): 4 is best at fixed batch, 1 and 2 collapse.", range="[1, inf)"
    )
    kernel: str = option("laplace", "Kernel of the discrepancy: laplace, rbf, energy, pseudo_huber, or a plugin's.")
    mapping: Literal["eta", "t", "log_snr", "inverse_eta"] = option(
        "eta", "Coordinate in which r lies a constant step nearer to the data than t."
    )
    k: int = option(
        12, "The step is the coordinate's range / 2^k: 11 to 13 are stable on latents, 15 on CIFAR-10.", range="[0, 52]"
    )
    min_gap: float | None = option(
        None, "Least t - r; null means 0 in fp32 and tf32, 1e-4 in fp16 and bf16.", range="[0, 1)"
    )
    eta_max: float = option(160.0, "Upper end of the range of sigma / alpha.", range="(0, inf)")
    eta_min: float = option(0.0, "Lower end of the range of sigma / alpha.", range="[0, inf)")
    a: float = option(1.0, "Power of alpha in the weight: 1, or 2 with second_time=t_minus_s.", range="[0, inf)")
    b: float = option(4.0, "Shift of the sigmoid in the weight: 4 on latents, 5 on CIFAR-10.", range="[-100, 100]")
    weight_factors: list[Literal["sigmoid", "dlog_snr_dt", "alpha"]] = option(  # noqa: RUF009 - copied for each instance
        ["sigmoid", "dlog_snr_dt", "alpha"], "Factors of the weight; leave some out only to see what they do."
    )

    @property
    def group_size(self) -> int:
        return self.particles

    @property
    def passes(self) -> Passes:
        return Passes(grad=1, no_grad=1)

    @property
    def why_not_blocks(self) -> str:
        return ""

    def resolved(self, precision: str) -> Self:
        gap = imm_times.default_min_gap(precision) if self.min_gap is None else self.min_gap
        return replace(super().resolved(precision), min_gap=gap)

    def validate(self) -> None:
        super().validate()
        if self.kernel not in KERNELS:
            raise UserError(f"method.kernel={self.kernel} is unknown; choose one of {', '.join(KERNELS)}")
        if self.eta_min >= self.eta_max:
            raise UserError(f"method.eta_min={self.eta_min} must be below method.eta_max={self.eta_max}")
        if self.t_max == 1.0:
            raise UserError("method.t_max=1 has no finite eta: use 0.994 on ot_fm, 0.996 on vp_cosine (null does)")
        factors = self.weight_factors
        if "dlog_snr_dt" in factors and "sigmoid" not in factors and self.t_min == 0.0:
            raise UserError(
                f"method.weight_factors={factors}: without sigmoid the weight is infinite at t = 0; "
                "set method.t_min above 0 (0.006, say)"
            )


@register_method("imm")
class InductiveMomentMatching(FlowMapMethod):
    """Inductive moment matching: particles sent from t and from r to s must agree in distribution."""

    Config = ImmConfig

    def default_grid(self, steps: int) -> str:
        """The paper's choice: a middle point at eta = 1.4 for two steps."""
        return "eta_1.4" if steps == 2 else "uniform"

    def loss(self, net: FlowMap, batch: Batch, seed: int) -> GroupLosses:
        draws = self.draw(net, batch.x, batch.condition, batch.ordinal, seed)
        y_t, y_r = net.pair(*draws)
        loss = self.discrepancy(net, y_t, y_r, draws.s.flatten(), draws.t.flatten())
        loss, t = (block_draws.mean_of_replicas(v, self.config.replicas) for v in (loss, draws.t.flatten()))
        whole, t = (mean_of_blocks(values, net.blocks) for values in (loss, t))
        return GroupLosses(whole, t, block_draws.by_place(loss, net.blocks))

    def draw_times(self, flow_map: FlowMap, group: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(s, r, t) of each group, fp64, shape (G,)."""
        c = self.config
        u = rng.uniform(seed, "times", group, 2)
        t, s = imm_times.draw(c.place(u[:, 0]), u[:, 1], c.t_min, c.t_max)
        return s, self.map_r(flow_map, s, t), t

    def map_r(self, flow_map: FlowMap, s: Tensor, t: Tensor) -> Tensor:
        """r(s, t), (G,)."""
        c = self.config
        return imm_times.map_r(flow_map.interp, s, t, c.k, c.min_gap, c.mapping, c.eta_max, c.eta_min, c.t_max)

    @fused()
    def draw(self, flow_map: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, seed: int) -> Draws:
        """All that is random about a micro-batch of x (N, C, H, W), label (N,) and ordinal (N,)."""
        blocks, replicas = flow_map.blocks, self.config.replicas
        keys = block_draws.keys(block_draws.numbers(self.group(ordinal), replicas), blocks)
        s, r, t = (block_draws.shaped(times, blocks) for times in self.draw_times(flow_map, keys, seed))
        given = self.given(flow_map, x, ordinal, seed)
        label = block_draws.repeated(self.drop_labels(flow_map, label, ordinal, seed), replicas)
        x = block_draws.repeated(x, replicas)
        eps = prior_noise(flow_map, x, block_draws.numbers(ordinal, replicas), seed)
        # DDIM(x_t, x, r, t) in its division-free form: the same eps as x_t, never fresh noise.
        x_t = diffuse(flow_map.interp, x, eps, per_sample(t, x))
        x_r = diffuse(flow_map.interp, x, eps, per_sample(r, x))
        return Draws(x_t, x_r, s, r, t, label, self.dropout_key(flow_map, ordinal, seed), given)

    @fused()
    def discrepancy(self, flow_map: FlowMap, y_t: Tensor, y_r: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """w(s, t) times the V-statistic of each group, (G,) fp64; of each block of a group, (G J,) by times (G J,)."""
        bandwidth = 1.0 / flow_map.coefficients(s, t).c_out.abs().clamp_min(_MIN_C_OUT)
        c = self.config
        y_t, y_r = (self._particles(y, flow_map.blocks) for y in (y_t, y_r))
        mmd = grouped_mmd(y_t, y_r, bandwidth, c.kernel)
        return imm_times.weight(flow_map.interp, t, c.a, c.b, c.weight_factors) * mmd

    def _particles(self, y: Tensor, blocks: int) -> Tensor:
        """(G J, M, elements of a block): the particles of a group are the same block of its samples."""
        rows = by_block(y, blocks).view(-1, self.group_size, blocks, y[0].numel() // blocks)
        return rows.transpose(1, 2).flatten(0, 1)
