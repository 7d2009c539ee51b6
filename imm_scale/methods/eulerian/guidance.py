"""Guidance inside training: the net learns the flow of a guided velocity, and is sampled without guidance.

    v_g = omega v + kappa u(x_t; t, t | y) + (1 - omega - kappa) u(x_t; t, t | null)

of MeanFlow (arXiv 2505.13447); the effective scale is omega / (1 - kappa). SoFlow's mix is the same with omega that
falls to 1 - kappa, no guidance, towards t = 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from imm_scale.choices import option
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap, per_sample

_FADE = 0.025  # SoFlow's rate


@dataclass(frozen=True)
class TrainingGuidanceConfig:
    """What the target velocity is guided by; omega = 1 and kappa = 0 is none."""

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
        return self.omega != 1.0 or self.kappa != 0.0

    @property
    def passes(self) -> int:
        """Forward passes without gradient."""
        return int(self.kappa != 0.0) + int(self.omega + self.kappa != 1.0 or self.fade is not None)

    def validate(self) -> None:
        """Raises UserError for an empty interval."""
        if self.low >= self.high:
            raise UserError(f"method.guidance.low={self.low} must be below high={self.high}")


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
