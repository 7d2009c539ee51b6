"""The map f_{s,t} around a network G (app C.5): it takes x_t at time t straight to time s.

    f_{s,t}(x_t) = c_skip(s,t) x_t + c_out(s,t) G(c_in(t) x_t, c_noise(t), second(s,t), label)

Times are per group, in fp64, of shape (G,): the N = G * M samples of a call are G groups of M neighbours. Around a net
of several blocks they are (G, J), of each block by itself, and what the blocks are given is a `Given`.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from imm_scale.choices import option
from imm_scale.errors import UserError
from imm_scale.fusion import fused
from imm_scale.methods.probability_path import Interpolant, ddpm_step
from imm_scale.models.base import Backbone, Context

PARAMETERIZATIONS = ("identity", "simple_edm", "euler_fm", "velocity", "epsilon")
VELOCITIES = ("euler_fm", "velocity")  # sigma_d G is the mean velocity from t to s
SECOND_TIMES = ("s", "t_minus_s", "none")
TIME_INPUTS = ("t", "ddpm_step")
_LARGEST_SLOW_SCALE = 10.0  # of times whose embeddings change slowly from s to t


@dataclass(frozen=True)
class FlowMapConfig:
    """How f_{s,t} is made of a network (app C.5)."""

    trajectory: Literal["ot_fm", "vp_cosine"] = option(
        "ot_fm", "Path from data to noise: straight lines (ot_fm, the paper's choice) or variance preserving."
    )
    parameterization: Literal["identity", "simple_edm", "euler_fm", "velocity", "epsilon"] = option(
        "euler_fm",
        "What the net predicts: data, an EDM-like velocity (any trajectory), or the mean velocity (ot_fm); as nets "
        "trained elsewhere have it, velocity: the same of x_t as it is (ot_fm; SiT), epsilon: the noise (DiT).",
    )
    second_time: Literal["s", "t_minus_s", "none"] = option(
        "s", "How the net is told where to land: s, t - s (best at XL with a = 2), or not at all (flow matching)."
    )
    time_scale: float = option(1000.0, "Times are multiplied by this before they are embedded.", range="(0, inf)")
    time_input: Literal["t", "ddpm_step"] = option(
        "t", "What is embedded of a time: itself, or the step (0 to 999) of DDPM's linear schedule as noisy (DiT)."
    )

    def cautions(self) -> list[str]:
        """For methods that follow how the net changes with its times."""
        if self.time_scale <= _LARGEST_SLOW_SCALE:
            return []
        return [
            f"method.flow_map.time_scale={self.time_scale:g} multiplies every derivative by time, and their noise: all "
            "published code of this method has 1"
        ]

    def validate(self) -> None:
        """Raises UserError where the three do not fit together."""
        check(self.trajectory, self.parameterization, self.second_time)


class Coefficients(NamedTuple):
    """Scalars of the flow map, each of the shape of the times."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor


# Samples (N, ...), c_noise (G,), second time (G,) or None, each of both branches: the order of `ConditionalNet.pair`
PairInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def check(trajectory: str, parameterization: str, second_time: str) -> None:
    """Raises UserError where the three do not fit together."""
    if parameterization not in PARAMETERIZATIONS:
        raise UserError(
            f"parameterization {parameterization!r} is unknown; choose one of {', '.join(PARAMETERIZATIONS)}"
        )
    if second_time not in SECOND_TIMES:
        raise UserError(f"second_time {second_time!r} is unknown; choose one of {', '.join(SECOND_TIMES)}")
    if parameterization in VELOCITIES and trajectory != "ot_fm":
        raise UserError(
            f"parameterization {parameterization!r} needs trajectory 'ot_fm', got {trajectory!r}: "
            "use method.flow_map.parameterization=simple_edm, which fits any trajectory"
        )


def coefficients(interp: Interpolant, parameterization: str, s: Tensor, t: Tensor, sigma_data: float) -> Coefficients:
    """c_in, c_skip and c_out of f_{s,t} (app C.5), in forms without cancellation at s close to t.

    Args:
        interp: the trajectory.
        parameterization: `identity` (G predicts x), `simple_edm` or `euler_fm` (sigma_d G is the mean velocity); not
            in the paper `velocity` (the same of an x_t that is only divided by sigma_d) and `epsilon` (sigma_d G is the
            noise, so f_{s,t} is DDIM's step, arXiv 2010.02502, eq 13; infinite where alpha_t is 0).
        s, t: target and source times, 0 <= s <= t, of one shape.
        sigma_data: standard deviation of the data and of the prior.

    Raises:
        UserError: unknown parameterization, or a velocity on another trajectory than `ot_fm`.
    """
    check(interp.name, parameterization, "s")
    norm = interp.norm(t)
    determinant = interp.determinant(s, t)
    c_in = 1.0 / (sigma_data * norm)
    if parameterization in VELOCITIES:
        c_in = c_in if parameterization == "euler_fm" else torch.full_like(norm, 1.0 / sigma_data)
        return Coefficients(c_in, torch.ones_like(determinant), -sigma_data * determinant)
    if parameterization == "epsilon":
        alpha_t = interp.alpha(t)
        return Coefficients(c_in, interp.alpha(s) / alpha_t, -sigma_data * determinant / alpha_t)
    if parameterization == "simple_edm":
        c_skip = (interp.alpha(s) * interp.alpha(t) + interp.sigma(s) * interp.sigma(t)) / norm**2
        return Coefficients(c_in, c_skip, -sigma_data * determinant / norm)
    # identity, whose value at s = t = 0 (0 / 0) is the identity map: (c_skip, c_out) = (1, 0)
    sigma_t = interp.sigma(t)
    at_data = sigma_t == 0
    divisor = torch.where(at_data, torch.ones_like(sigma_t), sigma_t)
    c_skip = torch.where(at_data, torch.ones_like(sigma_t), interp.sigma(s) / divisor)
    return Coefficients(c_in, c_skip, torch.where(at_data, torch.zeros_like(sigma_t), determinant / divisor))


def derivatives(
    interp: Interpolant, parameterization: str, s: Tensor, t: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """d c_skip / dt and d c_out / dt at fixed s, of the shape of the times. Arguments as in `coefficients`."""
    alpha, sigma, dalpha, dsigma = interp.alpha(t), interp.sigma(t), interp.dalpha(t), interp.dsigma(t)
    determinant = interp.determinant(s, t)
    ddeterminant = interp.alpha(s) * dsigma - interp.sigma(s) * dalpha
    if parameterization in VELOCITIES:
        return torch.zeros_like(determinant), -sigma_data * ddeterminant
    if parameterization == "epsilon":
        dc_out = -sigma_data * (ddeterminant * alpha - determinant * dalpha) / alpha**2
        return -interp.alpha(s) * dalpha / alpha**2, dc_out
    if parameterization == "simple_edm":
        norm, stretch = interp.norm(t), interp.dlog_norm_dt(t)
        c_skip = (interp.alpha(s) * alpha + interp.sigma(s) * sigma) / norm**2
        dc_skip = (interp.alpha(s) * dalpha + interp.sigma(s) * dsigma) / norm**2 - 2.0 * stretch * c_skip
        return dc_skip, -sigma_data * (ddeterminant - stretch * determinant) / norm
    dc_out = (ddeterminant * sigma - determinant * dsigma) / sigma**2
    return -interp.sigma(s) * dsigma / sigma**2, dc_out


def exact_target(
    interp: Interpolant, parameterization: str, x: Tensor, eps: Tensor, t: Tensor, sigma_data: float
) -> Tensor:
    """What G must output at time t for f_{s,t}(x_t) = DDIM(x_t, x, s, t) to hold for every s.

    It does not depend on s; it is x itself (`identity`), the noise or a velocity over sigma_d, and so the regression
    target of flow matching. x and eps are (N, C, H, W), t (N, 1, 1, 1) or whatever broadcasts against them.
    """
    if parameterization == "identity":
        return x
    if parameterization == "epsilon":
        return eps / sigma_data
    if parameterization in VELOCITIES:
        return (eps - x) / sigma_data
    scale = (sigma_data * interp.norm(t)).to(x.dtype)
    return (interp.alpha(t).to(x.dtype) * eps - interp.sigma(t).to(x.dtype) * x) / scale


class Given(NamedTuple):
    """What blocks are given: samples x (N, ...) at times t (G,), of which each block sees those before it."""

    x: Tensor
    t: Tensor


def by_block(x: Tensor, blocks: int) -> Tensor:
    """(N J, elements of a block) of samples (N, C, H, W), a sample's blocks together; (N, elements) where J is 1."""
    if blocks == 1:
        return x.flatten(1)
    return x.unflatten(2, (blocks, -1)).transpose(1, 2).flatten(0, 1).flatten(1)


def mean_of_blocks(values: Tensor, blocks: int) -> Tensor:
    """(G,) means over blocks of (G J,) values."""
    return values if blocks == 1 else values.view(-1, blocks).mean(dim=1)


def per_sample(values_G: Tensor, x: Tensor) -> Tensor:
    """(G,) values as (N, 1, ..., 1) beside x (N, ...), each repeated for the samples of its group.

    (G, J) values, of blocks of rows, come as (N, 1, H, 1), each repeated for its block's rows too.
    """
    if values_G.dim() == 2:
        rows = values_G.repeat_interleave(x.shape[2] // values_G.shape[1], dim=1)
        return rows.repeat_interleave(x.shape[0] // rows.shape[0], dim=0)[:, None, :, None]
    return values_G.repeat_interleave(x.shape[0] // values_G.shape[0]).view(-1, *[1] * (x.dim() - 1))


class FlowMap(nn.Module):
    """f_{s,t} with network G. The arithmetic around G has the dtype of the samples (fp32 or fp64), G its own.

    Args:
        model: the network G.
        interp: the trajectory.
        parameterization, second_time, sigma_data, time_scale: app C.5; `second_time` = `none` hides s from G.
        null_label: the label that stands for "no condition", or None for a net that has none.
        time_input: `t`, or `ddpm_step` for G to be told times as `probability_path.ddpm_step` counts them.

    A net that is told its guidance (`takes_guidance`) has it in every call as `guidance`, (G, 3) fp64: 1 - 1/W of the
    scale W, and the first and last time of the interval in which it is in force. None tells it W = 1 from 0 to 1.

    Attributes:
        guide: the weaker map that guidance leads away from; None leads away from the null label.
    """

    guide: "FlowMap | None"

    def __init__(
        self,
        model: Backbone,
        interp: Interpolant,
        parameterization: str = "euler_fm",
        second_time: str = "s",
        sigma_data: float = 0.5,
        time_scale: float = 1000.0,
        null_label: int | None = None,
        time_input: str = "t",
    ):
        super().__init__()
        check(interp.name, parameterization, second_time)
        self.model = model
        self.interp = interp
        self.parameterization = parameterization
        self.second_time = second_time
        self.sigma_data = sigma_data
        self.time_scale = time_scale
        self.null_label = null_label
        self.time_input = time_input
        self.guide = None

    def guided_by(self, guide: "FlowMap") -> "FlowMap":
        """The same map and weights with a guide (autoguidance, Karras et al. 2024, arXiv 2406.02507).

        Raises:
            UserError: another trajectory, or other blocks: the two would mean different things by x_t.
        """
        if guide.interp.name != self.interp.name:
            raise UserError(
                f"the guide was trained on trajectory {guide.interp.name}, the model on {self.interp.name}: "
                "at one time they expect different noise; take a guide of the same trajectory"
            )
        if guide.blocks != self.blocks:
            raise UserError(
                f"the guide draws samples in model.blocks={guide.blocks}, the model in {self.blocks}: they would be "
                "given different things; take a guide of as many blocks"
            )
        guided = copy.copy(self)
        guided._modules = dict(self._modules)
        guided.guide = guide
        return guided

    @property
    def blocks(self) -> int:
        """J, blocks of a sample that are drawn one after another."""
        return self.model.sequence_blocks

    def context(self, given: Given) -> Context:
        """The clean stream as the net takes it: told that it stands at its time, and goes nowhere."""
        c = self.coefficients(given.t, given.t)
        return Context(self._net_input(given.x, c, self._net_dtype(given.x)), *self._c_noise(given.t, given.t))

    def _with(self, given: Given | None) -> dict[str, Any]:
        assert (given is None) == (self.blocks == 1), "a net of several blocks is given those before"
        return {} if given is None else {"context": self.context(given)}

    def coefficients(self, s: Tensor, t: Tensor) -> Coefficients:
        """c_in, c_skip and c_out of this map (app C.5) for times (G,)."""
        return coefficients(self.interp, self.parameterization, s, t, self.sigma_data)

    @property
    def sign_of_c_out(self) -> float:
        """The same at all times."""
        return 1.0 if self.parameterization == "identity" else -1.0

    def _c_noise(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.time_input == "ddpm_step":
            s, t = ddpm_step(self.interp, s), ddpm_step(self.interp, t)
        second = {"s": s, "t_minus_s": t - s, "none": None}[self.second_time]
        return self.time_scale * t, None if second is None else self.time_scale * second

    @property
    def takes_guidance(self) -> bool:
        """Whether the net is told its guidance."""
        return self.model.takes_guidance

    def _told(self, guidance: Tensor | None, t: Tensor) -> dict[str, Any]:
        """What such a net is given beside all others' arguments, for times (G,)."""
        if not self.takes_guidance:
            assert guidance is None, "this net takes no guidance"
            return {}
        none = torch.stack([torch.zeros_like(t), torch.zeros_like(t), torch.ones_like(t)], dim=1)
        return {"guidance": none if guidance is None else guidance}

    def _net_dtype(self, x: Tensor) -> torch.dtype:
        return next(self.model.parameters(), x).dtype

    @staticmethod
    def _net_input(x: Tensor, c: Coefficients, dtype: torch.dtype) -> Tensor:
        return (per_sample(c.c_in.to(x.dtype), x) * x).to(dtype)

    @staticmethod
    def _assemble(x: Tensor, c: Coefficients, out: Tensor) -> Tensor:
        return per_sample(c.c_skip.to(x.dtype), x) * x + per_sample(c.c_out.to(x.dtype), x) * out.to(x.dtype)

    def forward(
        self,
        x_t: Tensor,
        s: Tensor,
        t: Tensor,
        label: Tensor,
        guidance_scale: float = 1.0,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """f_{s,t}(x_t), without dropout.

        Args:
            x_t: (N, ...) samples at time t, fp32 or fp64.
            s, t: (G,) fp64 target and source times; N is a multiple of G.
            label: (N,) class labels.
            guidance_scale: w replaces G by w G(label) + (1 - w) G(null); with a guide g it is w f + (1 - w) g, which
                is g + w (f - g), both of the label. 1 is off and costs nothing.
            guidance: of a net that is told it, in place of guidance_scale.

        Raises:
            UserError: guidance on a net without a null label or a guide, or beside what it is told.
        """
        c = self.coefficients(s, t)
        scaled, times = self._net_input(x_t, c, self._net_dtype(x_t)), self._c_noise(s, t)
        out = self._answer(scaled, times, label, **self._told(guidance, t)).to(x_t.dtype)
        if guidance_scale != 1.0 and self.guide is None:
            null = torch.full_like(label, self._unconditional(guidance_scale))
            unconditional = self._answer(scaled, times, null, labelled=False).to(x_t.dtype)
            out = guidance_scale * out + (1.0 - guidance_scale) * unconditional
        jump = self._assemble(x_t, c, out)
        if guidance_scale != 1.0 and self.guide is not None:
            # Of the maps, not of G: the guide may predict something else. Where it does not, the two are the same.
            jump = guidance_scale * jump + (1.0 - guidance_scale) * self.guide(x_t, s, t, label)
        return jump

    def _answer(
        self, scaled: Tensor, times: tuple[Tensor, Tensor | None], label: Tensor, labelled: bool = True, **told: Tensor
    ) -> Tensor:
        """What the net says of x_t, under a label, or under the null label, which is none."""
        out: Tensor = self.model(scaled, *times, label, **told)
        return out

    def _unconditional(self, guidance_scale: float) -> int:
        """The label of what is mixed in. Raises UserError where the net has none, or is told its guidance."""
        if self.null_label is None:
            raise UserError(f"guidance_scale={guidance_scale} needs a net with a null label; use guidance_scale=1")
        if self.takes_guidance:
            raise UserError(f"guidance_scale={guidance_scale}: this net is told its guidance, use `guidance`")
        return self.null_label

    def pair(
        self,
        x_t: Tensor,
        x_r: Tensor,
        s: Tensor,
        r: Tensor,
        t: Tensor,
        label: Tensor,
        dropout_key: Tensor | None = None,
        given: Given | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(f_{s,t}(x_t) with gradient, f_{s,r}(x_r) without), both from the current weights (alg 3).

        Shapes as in `forward`; dropout_key is (N,) keys of the dropout masks, or None to run without dropout.
        """
        out_t, out_r, c_t, c_r = self.average_pair(x_t, x_r, s, r, t, label, dropout_key, given=given)
        return self._after_pair(x_t, x_r, out_t, out_r, c_t, c_r)

    def average_pair(
        self,
        x_t: Tensor,
        x_r: Tensor,
        s: Tensor,
        r: Tensor,
        t: Tensor,
        label: Tensor,
        dropout_key: Tensor | None = None,
        guidance: Tensor | None = None,
        given: Given | None = None,
    ) -> tuple[Tensor, Tensor, Coefficients, Coefficients]:
        """`average` over [s, t] with gradient and over [s, r] without, and the coefficients of f_{s,t} and f_{s,r}.

        x_r and r may be of the first samples and groups only.
        """
        inputs, c_t, c_r = self._before_pair(x_t, x_r, s, r, t, self._net_dtype(x_t))
        more = self._told(guidance, t) | self._with(given)
        out_t, out_r = self.model.pair(*inputs, label, dropout_key, **more)
        return out_t.to(x_t.dtype), out_r.detach().to(x_r.dtype), c_t, c_r

    @fused()
    def _before_pair(
        self, x_t: Tensor, x_r: Tensor, s: Tensor, r: Tensor, t: Tensor, dtype: torch.dtype
    ) -> tuple[PairInputs, Coefficients, Coefficients]:
        """What the net is given, and the coefficients of each branch."""
        c_t, c_r = self.coefficients(s, t), self.coefficients(s[: len(r)], r)
        c_noise_t, second_t = self._c_noise(s, t)
        c_noise_r, second_r = self._c_noise(s[: len(r)], r)
        in_t, in_r = self._net_input(x_t, c_t, dtype), self._net_input(x_r, c_r, dtype)
        return (in_t, in_r, c_noise_t, c_noise_r, second_t, second_r), c_t, c_r

    @fused()
    def _after_pair(
        self, x_t: Tensor, x_r: Tensor, out_t: Tensor, out_r: Tensor, c_t: Coefficients, c_r: Coefficients
    ) -> tuple[Tensor, Tensor]:
        return self._assemble(x_t, c_t, out_t), self._assemble(x_r, c_r, out_r).detach()

    def average(
        self,
        x_t: Tensor,
        s: Tensor,
        t: Tensor,
        label: Tensor,
        dropout_key: Tensor | None = None,
        guidance: Tensor | None = None,
        given: Given | None = None,
    ) -> Tensor:
        """G(c_in(t) x_t, c_noise(t), second(s,t), label): for `euler_fm` the mean velocity over [s, t] / sigma_d.

        At s = t it is what flow matching regresses on. Shapes as in `forward`, dropout_key as in `pair`.
        """
        scaled, times = self._before_average(x_t, s, t, self._net_dtype(x_t))
        more = self._told(guidance, t) | self._with(given)
        return self.model(scaled, *times, label, dropout_key, **more).to(x_t.dtype)

    @fused()
    def _before_average(
        self, x_t: Tensor, s: Tensor, t: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        return self._net_input(x_t, self.coefficients(t, t), dtype), self._c_noise(s, t)

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        label: Tensor,
        dropout_key: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The instantaneous velocity dx/dt at (x_t, t) that G means at s = t: d f_{s,t}(x_t) / ds there.

        Shapes as in `average`. For `identity` it is infinite at t = 0, where data are not moved by noise.
        """
        return self.to_velocity(x_t, self.average(x_t, t, t, label, dropout_key, guidance), t)

    @fused()
    def to_velocity(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The velocity that an output of the net (N, ...) at s = t stands for, x_t (N, ...) and t (G,)."""
        of_x, of_out = (per_sample(part.to(x_t.dtype), x_t) for part in self.velocity_coefficients(t))
        return of_x * x_t + of_out * out

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of v = a x_t + b G at s = t, each (G,): the derivatives of c_skip and c_out by s there."""
        path = self.interp
        alpha, sigma = path.alpha(t), path.sigma(t)
        if self.parameterization in VELOCITIES:
            return torch.zeros_like(t), torch.full_like(t, self.sigma_data)
        if self.parameterization == "epsilon":
            return path.dalpha(t) / alpha, self.sigma_data * path.rate / alpha
        if self.parameterization == "simple_edm":
            return path.dlog_norm_dt(t), self.sigma_data * path.rate / path.norm(t)
        of_x = path.dsigma(t) / sigma
        return of_x, path.dalpha(t) - alpha * of_x

    def with_tangent(
        self,
        x_t: Tensor,
        w: Tensor,
        s: Tensor,
        t: Tensor,
        label: Tensor,
        dropout_key: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(G, D_t G): `average` and, without gradient, its total derivative by t along dx_t/dt = w, with s held.

        The derivative is that of the whole composite: c_in(t) and both embedded times move as well; guidance does not.

        Args:
            w: a velocity, of all samples (N, ...) or of the first ones, to which D_t G then belongs.
        """
        inputs = self._before_tangent(x_t, w, s, t, self._net_dtype(x_t))
        out, derivative = self.model.with_tangent(*inputs, label, dropout_key, **self._told(guidance, t))
        return out.to(x_t.dtype), derivative.to(x_t.dtype)

    @fused()
    def _before_tangent(
        self, x_t: Tensor, w: Tensor, s: Tensor, t: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What the net is given, each beside its derivative by t."""
        path, c = self.interp, self.coefficients(t, t)
        scaled = self._net_input(x_t, c, dtype)
        c_noise, second = self._c_noise(s, t)
        n, g = len(w), len(w) * len(t) // len(x_t)
        t, c_in = t[:g], c.c_in[:g]
        dc_in = torch.zeros_like(c_in) if self.parameterization == "velocity" else -c_in * path.dlog_norm_dt(t)
        dscaled = per_sample(c_in.to(w.dtype), w) * w + per_sample(dc_in.to(w.dtype), w) * x_t[:n]
        dc_noise = torch.full_like(t, self.time_scale)
        dsecond = {"s": torch.zeros_like(t), "t_minus_s": dc_noise, "none": None}[self.second_time]
        return scaled, dscaled.to(dtype), c_noise, dc_noise, second, dsecond

    def with_target_tangent(
        self, x_t: Tensor, s: Tensor, t: Tensor, label: Tensor, dropout_key: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(G, d G / ds): `average` and its partial derivative by s, both with gradient. The net must be told s."""
        scaled, (c_noise, second) = self._before_average(x_t, s, t, self._net_dtype(x_t))
        rate = {"s": self.time_scale, "t_minus_s": -self.time_scale}[self.second_time]
        still, moves = torch.zeros_like(t), torch.full_like(t, rate)
        out, derivative = self.model.with_tangent(
            scaled, torch.zeros_like(scaled), c_noise, still, second, moves, label, dropout_key, live=True
        )
        return out.to(x_t.dtype), derivative.to(x_t.dtype)

    @fused()
    def residual(
        self,
        x_t: Tensor,
        v: Tensor,
        out: Tensor,
        derivative: Tensor,
        s: Tensor,
        t: Tensor,
        grown: Tensor | None = None,
    ) -> Tensor:
        """e (N, ...): what D_t f_{s,t}(x_t) lacks to 0 along dx_t/dt = v, over sigma_d, with the sign of dL/dG.

        For `euler_fm` it is G - v / sigma_d + (t - s) D_t G. At s = t it is the velocity's error, whatever the
        derivative, and a descent of |f_{s,t} - what it ought to be|^2 moves G along -e.

        Args:
            v: (N, ...) velocity of x_t.
            out, derivative: G and D_t G as `with_tangent` gives them.
            grown: (G,) factors of what vanishes at s = t (for `euler_fm`, and on `vp_cosine`); None for 1.
        """
        c = self.coefficients(s, t)
        dc_skip, dc_out = derivatives(self.interp, self.parameterization, s, t, self.sigma_data)
        sign = self.sign_of_c_out
        skip, dskip, scale, dscale = (
            per_sample((sign / self.sigma_data * part).to(x_t.dtype), x_t)
            for part in (c.c_skip, dc_skip, c.c_out, dc_out)
        )
        far = dskip * x_t + scale * derivative
        if grown is not None:
            far = per_sample(grown.to(x_t.dtype), x_t) * far
        return skip * v + dscale * out + far
