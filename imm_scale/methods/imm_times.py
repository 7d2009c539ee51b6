"""When a group lives: p(t), p(s | t), the map r(s, t) (app C.6) and the weight w(s, t) (eq 13).

All functions take and return fp64 tensors of one shape, a value per group.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from imm_scale.errors import UserError
from imm_scale.methods.probability_path import Interpolant

ETA_MAX = 160.0
ETA_MIN = 0.0
# Largest time, kept below 1 so that eta stays near ETA_MAX.
T_MAX = {"ot_fm": 0.994, "vp_cosine": 0.996}
# Ends of the ranges that `log_snr` and `inverse_eta` divide by 2^k (app C.6).
LOG_SNR_RANGE_START = 0.001
INVERSE_ETA_RANGE_START = 0.005
WEIGHT_FACTORS = ("sigmoid", "dlog_snr_dt", "alpha")
MAPPINGS = ("eta", "t", "log_snr", "inverse_eta")


def default_min_gap(precision: str) -> float:
    """The least t - r that keeps the two branches apart in that precision (app I.6)."""
    return 1e-4 if precision in ("fp16", "bf16") else 0.0


def draw(u_t: Tensor, u_s: Tensor, t_min: float, t_max: float) -> tuple[Tensor, Tensor]:
    """(t, s) from two uniforms: t ~ U(t_min, t_max), s ~ U(t_min, t) (alg 3)."""
    t = t_min + (t_max - t_min) * u_t
    return t, t_min + (t - t_min) * u_s


def map_r(
    interp: Interpolant,
    s: Tensor,
    t: Tensor,
    k: int,
    min_gap: float = 0.0,
    mapping: str = "eta",
    eta_max: float = ETA_MAX,
    eta_min: float = ETA_MIN,
    t_max: float | None = None,
) -> Tensor:
    """r(s, t) in [s, t]: a step of range / 2^k towards data in the chosen coordinate, never past s.

    Args:
        interp: the trajectory.
        s, t: target and source times, s <= t.
        k: the step is the coordinate's range / 2^k.
        min_gap: least t - r; where t - s is smaller still, r = s.
        mapping: `eta` (the default), `t`, `log_snr` or `inverse_eta`.
        eta_max, eta_min: ends of the range of `eta`.
        t_max: last time of the range of `log_snr`; None for the trajectory's own.

    Raises:
        UserError: unknown mapping, or k below 0, a step longer than the range.
    """
    if k < 0:
        raise UserError(
            f"k={k} makes the step range / 2^k longer than the range: use k of at least 0, 10 to 15 as a rule"
        )
    fraction = 2.0**-k
    if mapping == "eta":
        # The clamp keeps a decrement larger than eta_t from giving a negative eta, hence r > t.
        stepped = interp.eta_inverse((interp.eta(t) - (eta_max - eta_min) * fraction).clamp_min(0.0))
    elif mapping == "t":
        stepped = t - fraction
    elif mapping == "log_snr":
        last = T_MAX[interp.name] if t_max is None else t_max
        highest, lowest = (-2.0 * math.log(interp.eta_at(end)) for end in (LOG_SNR_RANGE_START, last))
        stepped = interp.log_snr_inverse(interp.log_snr(t) + (highest - lowest) * fraction)
    elif mapping == "inverse_eta":
        step = (1.0 / interp.eta_at(INVERSE_ETA_RANGE_START) - 1.0 / interp.eta_at(1.0)) * fraction
        stepped = interp.eta_inverse(1.0 / (1.0 / interp.eta(t) + step))
    else:
        raise UserError(f"mapping {mapping!r} is unknown; choose one of {', '.join(MAPPINGS)}")
    return torch.maximum(s, torch.minimum(t - min_gap, stepped))


def weight(interp: Interpolant, t: Tensor, a: float, b: float, factors: Collection[str] = WEIGHT_FACTORS) -> Tensor:
    """w(s, t) of eq 13: 1/2 sigmoid(b - lambda_t) (-d lambda_t / dt) alpha^a / (alpha^2 + sigma^2).

    With sigmoid(b - lambda) = sigma^2 / (sigma^2 + e^-b alpha^2) and -d lambda/dt = 2 rate / (alpha sigma) the powers
    of alpha and sigma are collected before anything is computed. With all factors the poles at both ends cancel, so
    nothing over- or underflows: e^b t at t -> 0, alpha^(a-1) at t -> 1.

    Args:
        a, b: power of alpha and shift of the sigmoid.
        factors: which of `sigmoid`, `dlog_snr_dt` and `alpha` are in the product (the ablation of Table 4).
    """
    alpha, sigma = interp.alpha(t), interp.sigma(t)
    scale, alpha_power, sigma_power = 0.5, 0.0, 0.0
    denominator = torch.ones_like(t)
    if "sigmoid" in factors:
        sigma_power += 2.0
        denominator = denominator * (sigma**2 + math.exp(-b) * alpha**2)
    if "dlog_snr_dt" in factors:
        scale, alpha_power, sigma_power = 2.0 * interp.rate * scale, alpha_power - 1.0, sigma_power - 1.0
    if "alpha" in factors:
        alpha_power += a
        denominator = denominator * (alpha**2 + sigma**2)
    return scale * sigma**sigma_power * alpha**alpha_power / denominator
