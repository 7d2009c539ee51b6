"""The second point r of a difference: how far behind t it lies, and how that shrinks in the course of training.

Times are fp64 and of one shape (G,); progress is (G,) in [0, 1].
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from imm_scale.choices import option
from imm_scale.errors import UserError
from imm_scale.methods import imm_times
from imm_scale.methods.probability_path import Interpolant

# Below and above these shares alpha-Flow's schedule is at its ends (arXiv 2510.20771).
_SNAP = 0.005
# Below these t - r a difference of two passes has lost a fifth or more to rounding (one-sided, time_scale 1); SoFlow's
# code has 1e-4 as well.
_LEAST_SHARE = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class StepConfig:
    """r between s and t."""

    kind: Literal["share", "eta", "ect"] = option(
        "share",
        "share: r = t - a (t - s); eta: a constant step in sigma / alpha, as IMM's; ect: easy consistency tuning's.",
    )
    start: float = option(
        0.1, "share: a at the start, at most 1, which is flow matching with a target of one jump.", range="(0, 1]"
    )
    end: float = option(0.002, "share: a at the end of the schedule; the same as start: no schedule.", range="(0, 1]")
    schedule: Literal["exponential", "sigmoid"] = option("exponential", "share: how a goes from start to end.")
    steepness: float = option(25.0, "share: gamma of the sigmoid schedule.", range="(0, inf)")
    k: int = option(10, "eta: the step is the range of eta (160) / 2^k.", range="[0, 52]")
    base: float = option(2.0, "ect: q; the gap to r shrinks as q^-(stage + 1).", range="(1, inf)")
    stages: int = option(8, "ect: stages over the schedule.", range="[1, inf)")

    min_gap: float | None = option(
        None,
        "Least t - r; null takes what the precision can tell: for share 1e-4 in fp32, 5e-3 in tf32 and fp16, 2e-2 in "
        "bf16; else 0, and 1e-4 in fp16 and bf16.",
        range="[0, 1)",
    )

    def resolved(self, precision: str) -> Self:
        """With the least gap. Raises UserError for one below which a difference is all rounding."""
        least = _LEAST_SHARE[precision] if self.kind == "share" else imm_times.default_min_gap(precision)
        gap = least if self.min_gap is None else self.min_gap
        if gap < least:
            raise UserError(
                f"method.step.min_gap={gap:g} is less than precision={precision} can tell apart: at least {least:g}, "
                "or null; or method.derivative=tangent, which takes no difference"
            )
        return replace(self, min_gap=gap)

    def validate(self) -> None:
        """Raises UserError for a step that would grow."""
        if self.end > self.start:
            raise UserError(f"method.step.end={self.end} must not be above method.step.start={self.start}")

    @property
    def is_scheduled(self) -> bool:
        """Whether r depends on how far training is."""
        return self.start != self.end if self.kind == "share" else self.kind == "ect" and self.stages > 1


def share(config: StepConfig, progress: Tensor) -> Tensor:
    """a of r = t - a (t - s)."""
    if config.start == config.end:
        return torch.full_like(progress, config.start)
    if config.schedule == "exponential":  # SoFlow, arXiv 2512.15657
        return config.start * (config.end / config.start) ** progress
    falling = torch.sigmoid(-config.steepness * (progress - 0.5))
    falling = torch.where(falling > 1.0 - _SNAP, 1.0, falling)
    return (config.end + (config.start - config.end) * falling).clamp_min(config.end)


def next_time(
    interp: Interpolant, config: StepConfig, s: Tensor, t: Tensor, progress: Tensor, sigma_data: float
) -> Tensor:
    """r in [s, t], nowhere nearer to t than `min_gap` but at s."""
    return torch.minimum(_next_time(interp, config, s, t, progress, sigma_data), t - (config.min_gap or 0.0)).clamp_min(
        s
    )


def _next_time(
    interp: Interpolant, config: StepConfig, s: Tensor, t: Tensor, progress: Tensor, sigma_data: float
) -> Tensor:
    if config.kind == "share":
        return t - share(config, progress) * (t - s)
    if config.kind == "eta":
        return imm_times.map_r(interp, s, t, config.k)
    # ECT (arXiv 2406.14548): in noise levels, and all the way to the data where the rule passes it.
    level = sigma_data * interp.eta(t)
    stage = (progress * config.stages).floor().clamp_max(config.stages - 1)
    gap = config.base ** -(stage + 1.0) * (1.0 + 8.0 * torch.sigmoid(-level))
    return torch.maximum(s, interp.eta_inverse((level * (1.0 - gap)).clamp_min(0.0) / sigma_data))
