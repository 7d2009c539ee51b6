"""Weights of a residual e: what turns ||e||^2 into a loss. They are constants to the gradient.

Legend: N samples, each a group of its own; square_N is ||e||^2 summed over elements, fp64.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from imm_scale.choices import option
from imm_scale.methods.probability_path import Interpolant

_TINY = 1e-12  # of a residual that is 0 where a weight divides by it


@dataclass(frozen=True)
class ResidualConfig:
    """How residuals are weighted."""

    kind: Literal["adaptive", "normalize", "l2", "ect"] = option(
        "adaptive",
        "adaptive: 1 / (||e||^2 + c)^p; normalize: e / (||e|| + c) as the gradient; l2: ||e||^2; "
        "ect: that of sqrt(||f_t - f_r||^2 + c^2) / (sigma_t - sigma_r).",
    )
    p: float = option(1.0, "adaptive: the power; at 1 the loss reads about 1 whatever happens.", range="[0, inf)")
    c: float = option(0.01, "adaptive, normalize, ect: the constant c.", range="[0, inf)")
    mean: bool = option(False, "Squares are averaged over elements instead of summed, where c is added to them.")
    of_difference: bool = option(False, "adaptive: of G less its target, which is a e, instead of e (alpha-Flow).")
    alpha: bool = option(False, "normalize: e is first multiplied by sigma_d alpha(t) / rate, which makes it sCT's.")
    inverse_eta: bool = option(False, "The loss is divided by sigma / alpha at t, sCT's prior weight.")
    warmup: float = option(
        0.0, "normalize: share of the schedule over which the derivative's part grows from 0.", range="[0, 1]"
    )


def weights(
    config: ResidualConfig,
    square_N: Tensor,
    elements: int,
    interp: Interpolant,
    t: Tensor,
    r: Tensor,
    share: Tensor,
    c_out: Tensor,
    sigma_data: float,
) -> Tensor:
    """(N,) wt of the loss wt ||e||^2, whose gradient is 2 wt e dG.

    Args:
        elements: of a sample.
        t, r: times of both points of a difference; a tangent has none.
        share: a = (t - r) / (t - s), 1 where s = t.
        c_out: of f_{s,t}.
    """
    size = square_N / elements if config.mean else square_N
    per = 1.0 / elements if config.mean else 1.0
    if config.kind == "l2":
        wt = torch.full_like(size, per)
    elif config.kind == "adaptive" and config.of_difference:
        wt = per * share / (share**2 * size + config.c) ** config.p
    elif config.kind == "adaptive":
        wt = per / (size + config.c) ** config.p
    elif config.kind == "normalize":
        factor = sigma_data * interp.alpha(t) / interp.rate if config.alpha else torch.ones_like(t)
        wt = per * factor / (factor * size.sqrt() + config.c).clamp_min(_TINY)
    else:
        wt = _consistency(config.c, square_N, interp, t, r, c_out, sigma_data)
    return wt / interp.eta(t) if config.inverse_eta else wt


def _consistency(
    c: float, square_N: Tensor, interp: Interpolant, t: Tensor, r: Tensor, c_out: Tensor, sigma_data: float
) -> Tensor:
    """Half the derivative of (sqrt(||f_t - f_r||^2 + c^2) - c) / (sigma_t - sigma_r) by G, over e."""
    scale = sigma_data * (t - r)
    distance = (scale**2 * square_N + c**2).sqrt().clamp_min(_TINY)
    levels = sigma_data * (interp.eta(t) - interp.eta(r))
    return 0.5 * c_out.abs() * scale / distance / levels.clamp_min(_TINY)
