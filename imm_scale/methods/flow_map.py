"""The map f_{s,t} around a network G (app C.5): it takes x_t at time t straight to time s.

    f_{s,t}(x_t) = c_skip(s,t) x_t + c_out(s,t) G(c_in(t) x_t, c_noise(t), second(s,t), label)

Times are per group, in fp64, of shape (G,): the N = G * M samples of a call are G groups of M neighbours.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from imm_scale.choices import option
from imm_scale.errors import UserError
from imm_scale.fusion import fused
from imm_scale.methods.probability_path import Interpolant, ddpm_step
from imm_scale.models.base import Backbone

PARAMETERIZATIONS = ("identity", "simple_edm", "euler_fm", "velocity", "epsilon")
VELOCITIES = ("euler_fm", "velocity")  # sigma_d G is the mean velocity from t to s
SECOND_TIMES = ("s", "t_minus_s", "none")
TIME_INPUTS = ("t", "ddpm_step")


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
    time_scale: float = option(1000.0, "Times are multiplied by this before they are embedded.")
    time_input: Literal["t", "ddpm_step"] = option(
        "t", "What is embedded of a time: itself, or the step (0 to 999) of DDPM's linear schedule as noisy (DiT)."
    )

    def validate(self) -> None:
        """Raises UserError where the three do not fit together."""
        check(self.trajectory, self.parameterization, self.second_time)
        if self.time_scale <= 0:
            raise UserError(f"method.flow_map.time_scale={self.time_scale} must be above 0")


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


def per_sample(values_G: Tensor, x: Tensor) -> Tensor:
    """(G,) values as (N, 1, ..., 1) beside x (N, ...), each repeated for the samples of its group."""
    return values_G.repeat_interleave(x.shape[0] // values_G.shape[0]).view(-1, *[1] * (x.dim() - 1))


class FlowMap(nn.Module):
    """f_{s,t} with network G. The arithmetic around G has the dtype of the samples (fp32 or fp64), G its own.

    Args:
        model: the network G.
        interp: the trajectory.
        parameterization, second_time, sigma_data, time_scale: app C.5; `second_time` = `none` hides s from G.
        null_label: the label that stands for "no condition", or None for a net that has none.
        time_input: `t`, or `ddpm_step` for G to be told times as `probability_path.ddpm_step` counts them.
    """

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

    def coefficients(self, s: Tensor, t: Tensor) -> Coefficients:
        """c_in, c_skip and c_out of this map (app C.5) for times (G,)."""
        return coefficients(self.interp, self.parameterization, s, t, self.sigma_data)

    def _c_noise(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.time_input == "ddpm_step":
            s, t = ddpm_step(self.interp, s), ddpm_step(self.interp, t)
        second = {"s": s, "t_minus_s": t - s, "none": None}[self.second_time]
        return self.time_scale * t, None if second is None else self.time_scale * second

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
    ) -> Tensor:
        """f_{s,t}(x_t), without dropout.

        Args:
            x_t: (N, ...) samples at time t, fp32 or fp64.
            s, t: (G,) fp64 target and source times; N is a multiple of G.
            label: (N,) class labels.
            guidance_scale: w replaces G by w G(label) + (1 - w) G(null); 1 is off and costs nothing.

        Raises:
            UserError: guidance on a net without a null label.
        """
        c = self.coefficients(s, t)
        scaled, times = self._net_input(x_t, c, self._net_dtype(x_t)), self._c_noise(s, t)
        out = self.model(scaled, *times, label).to(x_t.dtype)
        if guidance_scale != 1.0:
            if self.null_label is None:
                raise UserError(f"guidance_scale={guidance_scale} needs a net with a null label; use guidance_scale=1")
            unconditional = self.model(scaled, *times, torch.full_like(label, self.null_label)).to(x_t.dtype)
            out = guidance_scale * out + (1.0 - guidance_scale) * unconditional
        return self._assemble(x_t, c, out)

    def pair(
        self,
        x_t: Tensor,
        x_r: Tensor,
        s: Tensor,
        r: Tensor,
        t: Tensor,
        label: Tensor,
        dropout_key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(f_{s,t}(x_t) with gradient, f_{s,r}(x_r) without), both from the current weights (alg 3).

        Shapes as in `forward`; dropout_key is (N,) keys of the dropout masks, or None to run without dropout.
        """
        inputs, c_t, c_r = self._before_pair(x_t, x_r, s, r, t, self._net_dtype(x_t))
        out_t, out_r = self.model.pair(*inputs, label, dropout_key)
        return self._after_pair(x_t, x_r, out_t, out_r, c_t, c_r)

    @fused()
    def _before_pair(
        self, x_t: Tensor, x_r: Tensor, s: Tensor, r: Tensor, t: Tensor, dtype: torch.dtype
    ) -> tuple[PairInputs, Coefficients, Coefficients]:
        """What the net is given, and the coefficients of each branch."""
        c_t, c_r = self.coefficients(s, t), self.coefficients(s, r)
        c_noise_t, second_t = self._c_noise(s, t)
        c_noise_r, second_r = self._c_noise(s, r)
        in_t, in_r = self._net_input(x_t, c_t, dtype), self._net_input(x_r, c_r, dtype)
        return (in_t, in_r, c_noise_t, c_noise_r, second_t, second_r), c_t, c_r

    @fused()
    def _after_pair(
        self, x_t: Tensor, x_r: Tensor, out_t: Tensor, out_r: Tensor, c_t: Coefficients, c_r: Coefficients
    ) -> tuple[Tensor, Tensor]:
        return self._assemble(x_t, c_t, out_t), self._assemble(x_r, c_r, out_r).detach()

    def raw(self, x_t: Tensor, t: Tensor, label: Tensor, dropout_key: Tensor | None = None) -> Tensor:
        """G(c_in(t) x_t, c_noise(t), second(t,t), label): what flow matching regresses on. Shapes as in `forward`."""
        scaled, times = self._before_raw(x_t, t, self._net_dtype(x_t))
        return self.model(scaled, *times, label, dropout_key).to(x_t.dtype)

    @fused()
    def _before_raw(self, x_t: Tensor, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        return self._net_input(x_t, self.coefficients(t, t), dtype), self._c_noise(t, t)
