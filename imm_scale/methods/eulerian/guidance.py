"""Guidance inside training: the net learns the flow of a guided velocity, and is sampled in one pass a step.

Of kind `fixed` it is one guidance for all, and samples have none of their own:

    v_g = omega v + kappa u(x_t; t, t | y) + (1 - omega - kappa) u(x_t; t, t | null)

of MeanFlow (arXiv 2505.13447); the effective scale is omega / (1 - kappa). SoFlow's mix is the same with omega that
falls to 1 - kappa, no guidance, towards t = 1. Of kind `condition` the net is told it: condition.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from imm_scale.choices import option
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap, per_sample

_FADE = 0.025  # SoFlow's rate
LATEST_START, EARLIEST_END = 0.5, 0.5  # of the intervals that a net is told
_OF_KIND = {"fixed": ("omega", "kappa", "low", "high", "fade"), "condition": ("largest", "power")}


@dataclass(frozen=True)
class TrainingGuidanceConfig:
    """What the target velocity is guided by; omega = 1 and kappa = 0 is none."""

    kind: Literal["fixed", "condition"] = option(
        "fixed",
        "fixed: one guidance, by omega and kappa, which samples have at sampling.guidance_scale=1; condition: the net "
        "is told scale and interval, which samples choose (improved MeanFlow).",
    )
    largest: float = option(8.0, "condition: the largest scale W it is told; 1 is the least.", range="(1, inf)")
    power: float = option(1.0, "condition: scales are drawn with density ~ W^-power.", range="[0, inf)")
    omega: float = option(1.0, "Weight of the path's velocity.", range="(0, inf)")
    kappa: float = option(
        0.0, "Weight of the net's own velocity with the label; the rest is that without it.", range="[0, 1)"
    )
    low: float = option(0.0, "Guided from this time on.", range="[0, 1)")
    high: float = option(1.0, "Guided up to this time.", range="(0, 1]")
    fade: float | None = option(
        None, "Time above which guidance falls to none at 1, as SoFlow's; null: it does not.", range="(0, 1)"
    )

    @property
    def is_on(self) -> bool:
        return self.kind == "condition" or self.omega != 1.0 or self.kappa != 0.0

    @property
    def passes(self) -> int:
        """Forward passes without gradient, that of the net's own velocity for the tangent included for a condition."""
        if self.kind == "condition":
            return 2
        return int(self.kappa != 0.0) + int(self.omega + self.kappa != 1.0 or self.fade is not None)

    def validate(self) -> None:
        """Raises UserError for an empty interval, or settings of the other kind."""
        others = [key for kind, keys in _OF_KIND.items() if kind != self.kind for key in keys]
        for field in fields(self):
            if field.name in others and getattr(self, field.name) != field.default:
                raise UserError(
                    f"method.guidance.{field.name}={getattr(self, field.name)} has no meaning for "
                    f"method.guidance.kind={self.kind}: leave it out"
                )
        if self.low >= self.high:
            raise UserError(f"method.guidance.low={self.low} must be below high={self.high}")

    def check_told(self, scale: float, interval: Sequence[float]) -> None:
        """Raises UserError for what a net of kind `condition` was never told."""
        if not 1.0 <= scale <= self.largest:
            raise UserError(
                f"sampling.guidance_scale={scale:g}: this net was told scales from 1, no guidance, to "
                f"method.guidance.largest={self.largest:g}: choose one of them"
            )
        low, high = interval
        if scale != 1.0 and not (low <= LATEST_START and high >= EARLIEST_END):
            raise UserError(
                f"sampling.guidance_interval={[low, high]}: this net was told intervals that start at {LATEST_START:g} "
                f"at the latest and end at {EARLIEST_END:g} at the earliest: choose such one, as [0.4,0.65]"
            )


def faded(t: Tensor, start: float) -> Tensor:
    """1 up to `start`, then smoothly to 0 at t = 1."""
    left = ((1.0 - t) / (1.0 - start)).clamp(0.0, 1.0)
    return torch.where(left < 1.0, 1.0 - torch.exp(-_FADE * left / (1.0 - left).clamp_min(1e-6)), 1.0)


@torch.no_grad()
def guided(
    config: TrainingGuidanceConfig,
    net: FlowMap,
    x_t: Tensor,
    v: Tensor,
    t: Tensor,
    label: Tensor,
    dropout_key: Tensor | None,
) -> Tensor:
    """v_g (N, ...) where t (N,) is in the interval and the label (N,) was not dropped, else v."""
    assert net.null_label is not None, "guidance needs a null label"
    omega = torch.full_like(t, config.omega)
    if config.fade is not None:
        plain = 1.0 - config.kappa
        omega = plain + faded(t, config.fade) * (omega - plain)
    mixed = per_sample(omega.to(v.dtype), v) * v
    if config.kappa != 0.0:
        mixed = mixed + config.kappa * net.velocity(x_t, t, label, dropout_key)
    if config.omega + config.kappa != 1.0 or config.fade is not None:
        rest = per_sample((1.0 - config.kappa - omega).to(v.dtype), v)
        mixed = mixed + rest * net.velocity(x_t, t, torch.full_like(label, net.null_label), dropout_key)
    here = (t >= config.low) & (t <= config.high) & (label != net.null_label)
    return torch.where(per_sample(here, v), mixed, v)
